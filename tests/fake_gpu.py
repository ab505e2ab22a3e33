"""A pretended GPU, for machines without one: a step runs on FakeTensorMode's CUDA tensors, which have no values.

    ledger = fake_gpu.counted("soco", world=8)
    ledger.waits, ledger.launches, ledger.bytes, ledger.peak
"""
import traceback
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import detco
import detcon
import dupr
import moco
import soco

CUDA, META = torch.device("cuda", 0), torch.device("meta")
ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
# The host must know the result of these, or its shape.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
         aten.unique_consecutive, aten.equal, aten.is_nonzero, aten.bincount}
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.lift_fresh,
        aten.detach}


class Ledger(TorchDispatchMode):
    """What a step asks of the GPU: `waits`, (operation, line of ours) of all that make the host wait; `launches`,
    operations that do work; `bytes` that they read and write; `peak`, of memory, in bytes, with what `move` brought.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.launches, self.bytes, self.peak, self.alive = [], 0, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func == torch.ops.prim.device.default:
            return META  # C++ is told so, as it would ask CUDA for its streams; Python sees cuda:0
        kwargs, name = dict(kwargs or {}), func.overloadpacket
        if kwargs.get("device") == META:
            kwargs["device"] = CUDA
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        on_gpu = any(x.device == CUDA for x in given)
        if on_gpu and name == aten._local_scalar_dense:
            self.wait(name)
            return True if args[0].dtype == torch.bool else 1
        if on_gpu and name in WAITS:
            self.wait(name)
            out = args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.long)  # as if all were nonzero
        elif name == aten.batch_norm_update_stats:  # has no kernel for tensors without values
            out = tuple(torch.empty(args[0].shape[1], device=CUDA) for _ in range(2))
        else:
            if on_gpu and name in (aten.index, aten.index_put, aten.index_put_):
                args = args[0], [self.places(x, name) for x in args[1]], *args[2:]
            if on_gpu and name == aten.repeat_interleave and kwargs.get("output_size") is None:
                self.wait(name)
            out = func(*args, **kwargs)
            if name == aten._to_copy:
                self.copied(args[0], out, kwargs.get("non_blocking"))
            if name == aten.copy_:
                self.copied(args[1], args[0], args[2:] == (True,))
        self.book(func, given, [x for x in tree_leaves(out) if isinstance(x, FakeTensor)])
        return out

    def wait(self, name):
        ours = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent in (ROOT, ROOT / "tests")
                and Path(frame.filename) != Path(__file__)]
        line = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].line}" if ours else "in backward"
        self.waits.append((str(name), line))

    def places(self, index, name):
        """An index as whole numbers on the GPU; a mask must be counted first, and one on the CPU be sent."""
        if index is None or index.dtype != torch.bool and index.device == CUDA:
            return index
        self.wait(f"{name} by a mask, or by indices that lie on the CPU")
        return torch.zeros(index.numel(), dtype=torch.long, device=CUDA)

    def copied(self, source, target, non_blocking):
        """A copy to the GPU need not wait, if it is asked not to; one from there must."""
        if source.device != target.device and (target.device != CUDA or not non_blocking):
            self.wait(f"copy from {source.device} to {target.device}")

    def book(self, func, given, made):
        """Count an operation that works on the GPU, and the memory that it made."""
        storages = {StorageWeakRef(x.untyped_storage()) for x in given}
        new = not made or any(StorageWeakRef(x.untyped_storage()) not in storages for x in made)  # no mere view
        if (new or func._schema.is_mutable) and func.overloadpacket not in FREE:
            if any(x.device == CUDA for x in given + made):
                self.launches += 1
                self.bytes += sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in given + made)
        for x in made:
            if x.device == CUDA:
                self.alive[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        if self.launches % 20 == 0:  # what is gone by now?
            self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
            self.peak = max(self.peak, sum(self.alive.values()))


@contextmanager
def pretended(world=1):
    """Tensors made on "cuda" are pretended within, and so is a group of `world` processes; gives the Ledger."""
    ledger, sends = Ledger(), lambda *args, **kwargs: None

    def device(x):
        return META if x.fake_mode.in_kernel_invocation else x.fake_device

    def tolist(x):
        ledger.wait("tolist")
        return np.zeros(x.shape).tolist()

    with ExitStack() as stack:
        for target, name, value in [
                (torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
                (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
                (common, "world_size", lambda: world), (common.dist, "all_gather_into_tensor", sends),
                (common.dist, "reduce_scatter_tensor", sends), (common.dist, "all_reduce", sends),
                (common.dist, "broadcast", sends)]:
            stack.enter_context(mock.patch.object(target, name, value))
        for name, value in {"device": property(device), "tolist": tolist,
                            "is_cuda": property(lambda x: x.fake_device == CUDA)}.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, value, create=True))
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), ledger):
            stack.enter_context(mode)
        yield ledger


def move(x):
    """A module, in place, or a tensor of the CPU, as if moved to the pretended GPU; within `pretended`."""
    if isinstance(x, nn.Module):
        for module in x.modules():
            for table in (module._parameters, module._buffers):
                table.update({name: move(y) for name, y in table.items() if y is not None})
        return x
    fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)
    return nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake


def shapes(name, size):
    """{name: (shape, type)} of what one image puts into a batch of a method."""
    view, box = ((3, size, size), torch.uint8), torch.float32
    if name == "moco":
        return {"x_q": view, "x_k": view, "index": ((), torch.long)}
    if name == "detco":
        region = ((3, detco.jigsaw_sizes(size)[0], detco.jigsaw_sizes(size)[0]), torch.uint8)
        return {**{f"x_{k}": view for k in "qk"}, **{f"p_{k}": region for k in "qk"},
                **{f"at_{k}": ((9, 2), torch.long) for k in "qk"}}
    if name == "dupr":
        return {**{f"x_{k}": view for k in "qk"}, **{f"box_{k}": ((1, 4), box) for k in "qk"},
                **{f"flip_{k}": ((), torch.bool) for k in "qk"}, "overlap": ((), torch.bool)}
    if name == "soco":
        sides = enumerate((size, size, size // 2), start=1)
        return {**{f"view{i}": ((3, side, side), torch.uint8) for i, side in sides},
                **{f"boxes{i}": ((4, 4), box) for i in (1, 2, 3)}}
    return {**{f"x{i}": view for i in (1, 2)}, **{f"ids{i}": ((16,), torch.long) for i in (1, 2)},
            **{f"masks{i}": ((16, -(-size // 32), -(-size // 32)), torch.float32) for i in (1, 2)}}


def build(name, arch, size, splits, **settings):
    """A method's model, and what makes its optimizer of parameters. name: a script's, or detcon_s, detcon_b."""
    if name in ("moco", "detco", "dupr"):
        method = {"moco": partial(moco.MoCo, images=1000), "detco": partial(detco.DetCo, size=size), "dupr": dupr.DUPR}
        sgd = partial(torch.optim.SGD, lr=0.03, momentum=0.9, weight_decay=1e-4)
        return method[name](arch, bn_splits=splits, **settings), sgd
    if name == "soco":
        made = soco.SoCo(arch, size=size, **settings)
    else:
        made = detcon.DetCon(arch, name[-1], size, **settings)
    return made, partial(common.LARS, lr=1.0, momentum=0.9, weight_decay=1e-6)


def step(name, model, optimizer, batch, momentum=0.99):
    """One step as the scripts take it, in bf16 -> loss and stats."""
    with torch.autocast("cuda", torch.bfloat16):
        loss, stats = model(batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if name in ("moco", "detco", "dupr"):
        model.update()
    else:
        model.update(momentum)
    return loss, stats


def counted(name, world=1, arch="resnet18w0.25", size=64, images=8, **settings):
    """The Ledger of a method's step, of `images` a process."""
    model, optimizer = build(name, arch, size, splits=8 if world == 1 and images >= 32 else 1, **settings)
    model.to(memory_format=torch.channels_last)
    what = shapes(name, size).items()
    with pretended(world) as ledger:
        move(model)
        optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
        batch = {key: torch.zeros(images, *shape, dtype=kind, device=CUDA) for key, (shape, kind) in what}
        ledger.waits, ledger.launches, ledger.bytes = [], 0, 0
        ledger.loss, ledger.stats = step(name, model, optimizer, batch)
    return ledger
