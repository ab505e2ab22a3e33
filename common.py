"""What the five methods share but none of the papers is about. Each section can be read on its own:

    How a program ends          usage errors, signals, a full disk, no memory: one line each instead of a traceback
    Processes                   torchrun's processes, gathering, DistributedDataParallel, Shuffling BN
    Networks                    BatchNorm, ResNet stages, RoIAlign, the MLP of projectors
    Contrast                    the queue, InfoNCE, the momentum update
    Optimization                LARS and learning rates
    Color augmentation          torchvision's color transforms on a whole batch, on the device
    Images                      an image, crops of it, a folder of images
    Shapes                      drawn images with boxes, masks and classes: the data of every demo
    Batches                     from images to batches on the device
    Weights to start from       --init: our checkpoints and other people's
    Runs                        checkpoints, log.jsonl, views.png
    Long work before training   how far it is, and files made by all processes together
    Evaluation                  the kNN monitor and the object probe
    Command line                the flags that all methods share

Two conventions hold everywhere. Boxes and crops are xyxy, in pixels of the image that the docstring names. A view is
uint8 [3, S, S] until it is on the device, where `Photometric` turns a whole batch into normalized floats.
"""
import argparse
import atexit
import errno
import fcntl
import hashlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import threading
import time
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.transforms import RandAugment
from torchvision.transforms.functional import pil_to_tensor as to_tensor  # PIL RGB -> uint8 [3, H, W]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's RGB statistics, as in torchvision
Image.MAX_IMAGE_PIXELS = None                             # --max-pixels is the limit


# --- How a program ends ----------------------------------------------------------------------------------------------

def fail(message, everywhere=False, code=2):
    """End the program with an error message, from process 0 alone unless `everywhere`. Code 2 is a usage error."""
    if everywhere or int(os.environ.get("RANK", 0)) == 0:
        with suppress(OSError):  # nobody reads
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun stops all processes as soon as one ends: let process 0 speak first
    sys.exit(code)


def print_line(line):
    """Print a line if anybody reads it: a run goes on when its terminal or the `tee` that it is piped to has ended."""
    try:
        print(line, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Stop:
    """Ends the program on SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP with nothing lost; exit code 128 + signal.

    While a run trains (`.holding`), a signal is only noted in `.signal`, and `Run.until_stopped` ends the run after the
    step. Otherwise the program ends at once: what it has finished is on disk. A second signal ends it at once,
    unless it comes within 3 seconds of the first: torchrun passes on a signal that its processes may already have.
    """

    def __init__(self):
        self.signal, self.since, self.holding = 0, 0.0, False

    def listen(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
                signal.signal(number, self.receive)
        os.register_at_fork(after_in_child=ignore_signals)
        atexit.register(kill_workers)
        sys.excepthook = report_crash
        # TensorBoard's thread passes its OSError on to the main thread, which reports it.
        threading.excepthook = lambda args: isinstance(args.exc_value, OSError) or threading.__excepthook__(args)

    def receive(self, number, frame):
        earlier = self.signal
        if earlier and time.monotonic() < self.since + 3:
            return
        self.signal, self.since = number, time.monotonic()
        if self.holding and not earlier:
            return
        if not earlier and int(os.environ.get("RANK", 0)) == 0:
            with suppress(OSError):  # nobody reads
                name = signal.Signals(number).name.encode()
                os.write(2, b"stopped by %s: run the same command again to resume\n" % name)
        with suppress(OSError, RuntimeError):  # likewise, or the signal came amid a print
            sys.stdout.flush()
        kill_workers()
        os._exit(128 + number)  # not sys.exit, whose exception Python drops in some callbacks, as around a fork

    def agreed(self):
        """The signal that any process has received, or 0; the same in all. All must call it after the same step."""
        flag = torch.tensor(self.signal)  # on the CPU, so that no process waits for its device
        if world_size() > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


stop = Stop()


def ignore_signals(worker=None):
    """Make a child process ignore the signals that its parent handles.

    DataLoader calls this in a worker, with the worker's number. A worker ignores SIGTERM too, and ends with its parent
    even if the parent is killed, since the next run may write the same files.
    """
    if worker is not None:
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL if worker is None else signal.SIG_IGN)


def kill_workers():
    """End the loader workers, which ignore the SIGTERM that multiprocessing sends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch would take their end for a crash
    for child in multiprocessing.active_children():
        child.kill()


def report_crash(kind, error, trace):
    """sys.excepthook: one line if the machine is at fault or the settings ask too much of it; else the traceback."""
    text, chain = str(error).strip() or kind.__name__, [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    fault = next((x for x in chain if isinstance(x, OSError)), None)
    line, code = text.splitlines()[-1][:200], 1
    if stop.signal:  # whatever the error is, it comes from the other processes having ended
        line = (f"ended by {signal.Signals(stop.signal).name}: run the same command again to resume from the last "
                "checkpoint")
        code = 128 + stop.signal
    elif isinstance(error, MemoryError) or re.search("out of memory|not enough memory|[Aa]llocate|Storage size", text):
        flags = "--batch-size, --size or --workers" if stop.holding else "--queue, --dim, --arch or --size"
        line, code = f"out of memory: lower {flags} ({line})", 2
    elif "DataLoader worker" in text:
        line += "; if memory or shared memory (/dev/shm) is short, lower --workers"
    elif fault:
        line = f"{fault.filename}: {fault.strerror}" if fault.filename else str(fault)
    elif not (dist.is_initialized() and re.search("[Cc]onnection|remote process|Gloo|NCCL", text)):
        sys.__excepthook__(kind, error, trace)
        sys.exit(1)
    fail(line, everywhere=True, code=code)


# --- Processes -------------------------------------------------------------------------------------------------------

def init_distributed():
    """The device of this process, after it has joined the others that torchrun started, if any."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True       # all batches of training have one shape
        torch.set_float32_matmul_precision("high")  # TF32, except within `exact_products`
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=timedelta(hours=1),  # the others may wait while process 0 computes AP
                                **rendezvous())
    stop.listen()  # not earlier: a process that waits for the others runs no Python, and SIGTERM has to end it
    return device


def rendezvous():
    """Arguments of init_process_group by which the processes find each other, also after torchrun has restarted them.

    torchrun's store then still holds the addresses of dead processes. Process 0 therefore opens a store that ends with
    itself, and tells the others its port through torchrun's. If nobody answers there, they look the port up again.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store, rank, size = next(dist.rendezvous("env://"))
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        store.set("port", str(own.port))
        return dict(store=own, rank=rank, world_size=size)
    while True:
        try:
            shared = dist.TCPStore(host, int(store.get("port")), timeout=timedelta(seconds=5))
            shared.set_timeout(timedelta(minutes=5))
            return dict(store=shared, rank=rank, world_size=size)
        except dist.DistError:
            time.sleep(0.2)


@contextmanager
def exact_products():
    """Context in which float32 matrices are multiplied in full float32. TF32's 10 bits suffice only for training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def finish():
    """Leave the processes that `init_distributed` joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def barrier():
    """Wait until every process has come here."""
    if world_size() > 1:
        dist.barrier()


class AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        rows = x.new_empty(world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(rows, x.contiguous())
        return rows

    @staticmethod
    def backward(ctx, grad):
        own = grad.new_empty(len(grad) // world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


def all_gather(x):
    """[N, ...] -> [world*N, ...]: the rows of all processes in rank order. N must be the same in all of them.

    The gradient of a row, summed over all processes, goes to the process that the row came from.
    """
    return AllGather.apply(x) if world_size() > 1 else x


def wrap_ddp(model, device, compiled=False):
    """The model for the loop to call: compiled if asked for, its gradients averaged over the processes.

    On a GPU, the color augmentation is compiled in any case if the machine has a compiler: it then passes over the
    batch 30 times instead of 120.
    """
    if compiled:
        model.compile()
    elif device.type == "cuda" and importlib.util.find_spec("triton") and shutil.which("cc"):
        for module in model.modules():
            if isinstance(module, Photometric):
                module.apply_draw = torch.compile(module.apply_draw)
    if world_size() == 1:
        return model
    ddp = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                              gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False  # or each forward pass would send process 0's; torch 2.15 deprecates the argument
    return ddp


class Shuffle:
    """Shuffling BN (MoCo Sec. 3.3): spreads a batch over processes and BN groups in a random order, and undoes it.

    A query and its key are then normalized among different images, so that BN statistics cannot give away which key
    belongs to which query. One Shuffle serves all inputs of a step, n rows in each process. Gradients pass through.
    Shuffle images as uint8, since they travel between processes.
    """

    def __init__(self, n, device):
        order = all_gather(torch.rand(n, device=device)).argsort(stable=True)  # [world*n], the same in every process
        own_share = lambda rows: rows.chunk(world_size())[rank()]
        self.there, self.back = own_share(order), own_share(order.argsort())

    def __call__(self, x):
        return all_gather(x)[self.there]

    def undo(self, x):
        return all_gather(x)[self.back]


# --- Networks --------------------------------------------------------------------------------------------------------

class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that splits a batch into equal groups and normalizes each by its own statistics, in training.

    One process with 8 groups trains as 8 processes do. The running statistics see one group after another.
    """

    def __init__(self, channels, groups=8):
        super().__init__(channels)
        self.groups = groups

    def forward(self, x):
        if not self.training or self.groups == 1:
            return super().forward(x)
        return torch.cat([super(GroupBatchNorm2d, self).forward(part) for part in x.chunk(self.groups)])


class NormalizeAcrossProcesses(torch.autograd.Function):
    """x normalized by the mean and variance over all processes; the gradient flows through these moments too.

    x: [N, C] or [N, C, H, W]; weight, bias, mean, var: [C]; count: [C], how many values a channel has in all processes.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, count, eps):
        ctx.save_for_backward(x, weight, mean, var, count)  # x as it came, in bf16 under autocast
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, var, count = ctx.saved_tensors
        _, *own = torch.ops.aten.native_batch_norm_backward(grad, x, weight, mean, var, None, None, False, ctx.eps,
                                                            [False, True, True])  # of weight and bias, from these rows
        total = torch.stack(own)
        dist.all_reduce(total)
        scale = weight * torch.rsqrt(var + ctx.eps)
        # dx = scale * (grad - mean(grad) - x_hat * mean(grad * x_hat)), with x_hat the normalized x
        slope, offset = -scale / count * total
        through_moments = F.batch_norm(x, mean, var, slope, offset, eps=ctx.eps)
        return through_moments.addcmul_(grad, scale.view(-1, *[1] * (x.ndim - 2))), *own, None, None, None, None


class SyncBatchNorm(nn.BatchNorm2d):
    """BN over the batches of all processes, which may differ in size: nn.SyncBatchNorm for the CPU too.

    x: [N, C] or [N, C, H, W]. torch's own makes the host wait for the device, to look for empty batches; this does not.
    """

    def _check_input_dim(self, x):  # BatchNorm2d's takes [N, C, H, W] alone
        pass

    def forward(self, x):
        if world_size() == 1 or not self.training:
            return super().forward(x)
        with torch.no_grad():
            running = torch.stack([self.running_mean, self.running_var])                # copies, to be written to
            own = torch.stack(torch.batch_norm_update_stats(x, *running, 0.0))          # mean and variance, [2, C]
            count = torch.full_like(own[:1], x.numel() // x.shape[1])
            counts, means, variances = all_gather(torch.cat([count, own])[None]).unbind(dim=1)  # [world, C] each
            count = counts.sum(dim=0)
            share = counts / count
            mean = (share * means).sum(dim=0)
            var = (share * (variances + (means - mean) ** 2)).sum(dim=0)
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        return NormalizeAcrossProcesses.apply(x, self.weight, self.bias, mean, var, count, self.eps)


class Backbone(ResNet):
    """torchvision's ResNet without `fc` and with `width` times the channels; returns the outputs of its stages."""

    def __init__(self, block, layers, width, **kwargs):
        self.width = width
        super().__init__(block, layers, **kwargs)
        del self.fc, self.avgpool

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64 and self.width != 1:  # the first stage: replace torchvision's stem of 64 channels
            self.inplanes = round(64 * self.width)
            self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
            self.bn1 = self._norm_layer(self.inplanes)
        stage = super()._make_layer(block, round(planes * self.width), *args, **kwargs)
        self.channels = [*getattr(self, "channels", []), self.inplanes]  # of c2, c3, c4, c5
        return stage

    def forward(self, x, stages=4):
        x, outputs = self.maxpool(self.relu(self.bn1(self.conv1(x)))), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4)[:stages]:
            if x.device.type == "cpu" and x.shape[-1] == 1:
                # In bf16, torch 2.15 puts garbage into the gradient of weights that see nothing but padding.
                with torch.autocast("cpu", enabled=False):
                    x = stage(x.float())
            else:
                x = stage(x)
            outputs.append(x)  # [N, C2, H/4, W/4], then [N, C3, H/8, W/8], ...
        return outputs

    def train_first(self, stages):
        """Freeze the stages after the first `stages`: nothing will use their outputs."""
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4)[stages:]:
            stage.requires_grad_(False)


LAYERS = {18: (BasicBlock, [2, 2, 2, 2]), 34: (BasicBlock, [3, 4, 6, 3]), 50: (Bottleneck, [3, 4, 6, 3]),
          101: (Bottleneck, [3, 4, 23, 3]), 152: (Bottleneck, [3, 8, 36, 3]), 200: (Bottleneck, [3, 24, 36, 3])}


def resnet(arch, norm_layer=None, zero_init_residual=False):
    """A Backbone: [N, 3, H, W] -> [c2, c3, c4, c5] at strides 4, 8, 16, 32, with torchvision's names in `state_dict`.

    arch: `resnet18 34 50 101 152 200`, with `wX` for X times the channels (`resnet50w4`), or `resnext50_32x8d`. X is at
    least 0.25: torch's CPU kernels crash on convolutions of 8 channels in channels_last. Exits with 2 if the arch is
    unknown. zero_init_residual: the last BN gamma of each residual block starts at 0, as in SoCo's and DetCon's code.
    """
    plain = re.fullmatch(r"resnet(\d+)(?:w(\d*\.?\d+))?", arch)
    grouped = re.fullmatch(r"resnext(50|101|152)_([1-9]\d?)x([1-9]\d?)d", arch)
    if grouped:
        depth, width, more = int(grouped[1]), 1, dict(groups=int(grouped[2]), width_per_group=int(grouped[3]))
    elif plain and int(plain[1]) in LAYERS and 0.25 <= float(plain[2] or 1) <= 16:
        depth, width, more = int(plain[1]), float(plain[2] or 1), {}
    else:
        fail(f"unknown --arch {arch}: take resnet{', resnet'.join(map(str, LAYERS))}, with wX for X times the "
             "channels, X from 0.25 to 16 (resnet50w4), or resnext50_32x8d")
    return Backbone(*LAYERS[depth], width, norm_layer=norm_layer, zero_init_residual=zero_init_residual, **more)


def roi_align(features, boxes, output_size, stride):
    """[N*K, C, S, S], image-major: each box pooled to output_size, half-pixel aligned as in Detectron2's ROIAlignV2.

    features: [N, C, H, W] at `stride`; boxes: [N, K, 4] xyxy in pixels of the network's input. It is computed in
    float32 even under autocast, since bf16 cannot tell pixel 256 from 257.
    """
    x, = to_float32(features)
    image = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])[:, None]
    rois = torch.cat([image.to(x), boxes.flatten(0, 1).to(x)], dim=1)  # [N*K, 5]
    pooled = torchvision.ops.roi_align(x, rois, output_size, 1 / stride, aligned=True)
    return pooled.to(features.dtype, memory_format=torch.channels_last)


def mlp(width, hidden, dim, bias=True):
    """Linear, BN over all processes, ReLU, linear: a projector or predictor of SoCo, DetCon. bias: the last one's."""
    return nn.Sequential(nn.Linear(width, hidden), SyncBatchNorm(hidden), nn.ReLU(inplace=True),
                         nn.Linear(hidden, dim, bias))


# --- Contrast --------------------------------------------------------------------------------------------------------

class Queue(nn.Module):
    """A first-in-first-out dictionary of keys (MoCo Sec. 3.2).

    `.keys` is [size, dim], L2-normalized, random at first. `.enqueue` overwrites the oldest rows in place: call it
    after the backward pass of the loss.
    """

    def __init__(self, dim, size):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))  # where the next key goes

    @torch.no_grad()
    def enqueue(self, keys):
        """Put in the normalized keys [N, dim] of all processes, in rank order; any N, the same in all processes."""
        self.put(all_gather(keys.detach()))

    @torch.no_grad()
    def put(self, keys, count=None):
        """Put in rows [N, dim] that are the same in all processes.

        With `count`, a tensor, only the first `count` of them; N must then be at most the size of the queue.
        """
        count = len(keys) if count is None else count
        size = len(self.keys)
        place = torch.arange(len(keys), device=keys.device)[-size:]  # if there are more than fit, the last ones stay
        index = (self.position + place) % size
        self.keys[index] = torch.where((place < count)[:, None], keys[-size:].to(self.keys.dtype), self.keys[index])
        self.position.copy_((self.position + count) % size)


def to_float32(*tensors):
    """The tensors in float32; those in float64 stay."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def info_nce(q, k, negatives, temperature):
    """InfoNCE (MoCo Eq. 1): tell each query's own key from the negatives.

    q, k: [N, D], negatives: [K, D], all L2-normalized. Returns the mean over N, in nats:
    about log(K + 1) for a network that knows nothing.
    """
    with torch.autocast(q.device.type, enabled=False):                   # bf16 is too coarse for a similarity / 0.07
        q, k, negatives = to_float32(q, k, negatives)
        positive = (q * k).sum(dim=1, keepdim=True)                      # [N, 1]
        logits = torch.cat([positive, q @ negatives.T], dim=1)           # [N, 1 + K]
        target = torch.zeros(len(q), dtype=torch.long, device=q.device)  # the key is column 0
        return F.cross_entropy(logits / temperature, target)


@torch.no_grad()
def pretext_accuracy(q, k, negatives):
    """The share of queries that are nearer to their own key than to every negative. A tie does not count."""
    with torch.autocast(q.device.type, enabled=False):
        q, k, negatives = to_float32(q, k, negatives)
        return ((q * k).sum(dim=1) > (q @ negatives.T).amax(dim=1)).float().mean()


@torch.no_grad()
def momentum_update(target, online, m):
    """t = m*t + (1-m)*o for all parameters (MoCo Eq. 2). Buffers (BN's running statistics) stay the target's own."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - m)


# --- Optimization ----------------------------------------------------------------------------------------------------

class LARS(torch.optim.SGD):
    """SGD with momentum that scales each tensor's update by trust * ||weight|| / ||update|| (You et al. 2017).

    Biases and norm parameters (ndim <= 1) get neither weight decay nor the scaling, as in SimCLR and BYOL. A tensor
    whose gradient is zero is not scaled either: scaled-up weight decay would wipe out what the step does not train.
    `step` overwrites the gradients.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=1e-3):
        super().__init__(params, lr, momentum, foreach=True)
        self.weight_decay, self.trust = weight_decay, trust

    @torch.no_grad()
    def step(self):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None and p.ndim > 1]
        if params:
            norms = lambda tensors: torch.stack(torch._foreach_norm(tensors))
            updates = [p.grad for p in params]  # from here on a gradient becomes its update, in place
            weight, gradient = norms(params), norms(updates)
            torch._foreach_add_(updates, params, alpha=self.weight_decay)
            ratio = torch.where((weight > 0) & (gradient > 0), self.trust * weight / norms(updates), 1.0)
            torch._foreach_mul_(updates, list(ratio.unbind()))
        super().step()


def cosine(start, end, step, total):
    """Half a cosine, from `start` at step 0 to `end` at step `total` and after."""
    return end if step >= total else end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


def learning_rate(base, step, total, warmup=0, drops=None):
    """The learning rate of one step: a linear rise from 0 over the first `warmup` steps, then half a cosine to 0.

    With `drops`, fractions of the run, the rate falls to a tenth at each of them instead (MoCo v1: .6, .8).
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if drops:
        return base * 0.1 ** sum(step >= drop * total for drop in drops)
    return cosine(base, 0.0, step - warmup, total - warmup)


# --- Color augmentation ----------------------------------------------------------------------------------------------

class Photometric(nn.Module):
    """uint8 views [N, 3, H, W] -> augmented and normalized floats, each sample with a draw of its own.

    The distributions are those of torchvision's ColorJitter (its four operations in a random order, applied with
    probability `jitter_p`), RandomGrayscale, GaussianBlur (`sigma` in pixels of the view; its kernel is a tenth of the
    view wide, 23 pixels at 224; torchvision mirrors the view at its border, this does not) and RandomSolarize, in this
    order. The device's default generator draws.
    """

    def __init__(self, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, jitter_p=1.0, grayscale_p=0.0,
                 blur_p=0.0, sigma=(0.1, 2.0), solarize_p=0.0):
        super().__init__()
        self.jitter_p, self.grayscale_p, self.blur_p, self.solarize_p = jitter_p, grayscale_p, blur_p, solarize_p
        self.sigma, self.jitters = sigma, any((brightness, contrast, saturation, hue))
        self.register_buffer("strength", torch.tensor([brightness, contrast, saturation, hue]), persistent=False)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def draw(self, n):
        """Random parameters for n samples: a dict of tensors with n rows."""
        uniform = lambda *shape: torch.rand(n, *shape, device=self.mean.device)
        jitter, draws = uniform(1) < self.jitter_p, uniform(4)
        low = (1 - self.strength[:3]).clamp(min=0)
        factor = torch.lerp(low.expand(n, 3), 1 + self.strength[:3], draws[:, :3])
        hue = (2 * draws[:, 3] - 1) * self.strength[3]
        narrow, wide = self.sigma
        return {
            "factor": torch.where(jitter, factor, 1.0),          # [n, 3] brightness, contrast, saturation
            "hue": torch.where(jitter[:, 0], hue, 0.0),          # [n] turns of the color circle
            "order": uniform(4).argsort(dim=1),                  # [n, 4] the ops, first to last; op 3 is hue
            "grayscale": uniform() < self.grayscale_p,           # [n]
            "blur": uniform() < self.blur_p,                     # [n]
            "sigma": narrow + (wide - narrow) * uniform(),       # [n] pixels
            "solarize": uniform() < self.solarize_p,             # [n]
        }

    @torch.no_grad()
    def forward(self, views):
        with torch.autocast(views.device.type, enabled=False):
            x = self.apply_draw(views.float() / 255, self.draw(len(views)))
            return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def apply_draw(self, x, draw):
        """x [N, 3, H, W] in [0, 1] after the drawn operations, all samples at once."""
        if self.jitters:
            # Three blends before hue and three after it serve all 24 orders, since a blend with factor 1 does nothing.
            factor = F.pad(draw["factor"], (0, 1), value=1.0).gather(1, draw["order"])  # [N, 4] by place in the order
            hue_at = (draw["order"] == 3).float().argmax(dim=1)                         # [N]
            for place in (0, 1, 2):
                x = self.blend(x, draw["order"][:, place], torch.where(place < hue_at, factor[:, place], 1.0))
            x = self.turn_hue(x, draw["hue"])
            for place in (1, 2, 3):
                x = self.blend(x, draw["order"][:, place], torch.where(place > hue_at, factor[:, place], 1.0))
        if self.grayscale_p:
            x = torch.where(draw["grayscale"].view(-1, 1, 1, 1), luma(x), x)
        if self.blur_p:
            x = self.gaussian_blur(x, torch.where(draw["blur"], draw["sigma"], 1e-3))  # so narrow a kernel does nothing
        if self.solarize_p:
            x = torch.where(draw["solarize"].view(-1, 1, 1, 1) & (x >= 0.5), 1 - x, x)
        return x

    @staticmethod
    def blend(x, op, factor):
        """x with another brightness (op 0), contrast (1) or saturation (2).

        That is, x moved `factor` times as far from black, from the picture's mean gray, or from each pixel's gray.
        x: [N, 3, H, W] in [0, 1]; op and factor: [N]. Factor 1 does nothing, whatever the op.
        """
        op, factor = op.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1)
        gray = luma(x)                                                        # [N, 1, H, W]
        anchor = torch.where(op == 2, gray, gray.mean(dim=(2, 3), keepdim=True) * (op == 1))
        return torch.lerp(anchor, x, factor).clamp_(0, 1)

    @staticmethod
    def turn_hue(x, turns):
        """x with HSV's hue shifted by `turns` [N] of the color circle. The minimum and maximum of RGB stay."""
        top, low = x.amax(dim=1), x.amin(dim=1)                               # [N, H, W]
        chroma = top - low
        r, g, b = x.unbind(dim=1)
        sector = torch.where(top == r, g - b, torch.where(top == g, b - r, r - g))
        start = torch.where(top == r, 0.0, torch.where(top == g, 2.0, 4.0))
        hue = start + sector / chroma.clamp(min=1e-8) + 6 * turns.view(-1, 1, 1)  # in sixths of the circle
        k = torch.stack([hue + 5, hue + 3, hue + 1], dim=1) % 6               # [N, 3, H, W], Smith 1978
        return top[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)

    @staticmethod
    def gaussian_blur(x, sigma):
        """x blurred by Gaussians of `sigma` [N] pixels: a banded matrix times the columns, then the rows."""
        def band(size):
            d = torch.arange(size, device=x.device)
            d = d - d[:, None]
            weight = torch.exp(-0.5 * (d / sigma.view(-1, 1, 1)) ** 2) * (d.abs() <= max(1, size // 20))
            return (weight / weight.sum(dim=-1, keepdim=True))[:, None]       # [N, 1, size, size], at the border too
        return band(x.shape[2]) @ x @ band(x.shape[3]).mT


def luma(x):
    """[N, 3, H, W] RGB -> [N, 1, H, W] gray, with torchvision's weights."""
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def denormalize(x):
    """The inverse of Photometric's normalization, to look at views: [..., 3, H, W] in [0, 1]."""
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
    return (x * std + mean).clamp(0, 1)


def rand_augment(image, rng, magnitude=28, augment=RandAugment):
    """A PIL image after torchvision's RandAugment: 2 operations of `magnitude` (0 to 30), drawn by rng.

    Magnitude 28 changes a picture as much as strength 10 of 10 does in InfoMin, which DUPR cites.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2 ** 63)))
        return augment(magnitude=magnitude)(image)


# --- Images ----------------------------------------------------------------------------------------------------------

SUFFIXES = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".tif", b".tiff")
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # {EXIF orientation: what turns the picture upright}
PAUSES = 0.2, 1, 4                      # seconds before a file is read again


class Unreadable(Exception):
    """A file that cannot be decoded."""


@contextmanager
def decoding():
    """Context that turns every exception that Pillow raises for a damaged file into Unreadable."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, struct.error, zlib.error) as error:
        raise Unreadable(error) from error


def open_image(path):
    """A PIL image, not decoded yet. If reading fails, as on a network file system, it tries again after a pause."""
    for pause in (*PAUSES, None):
        try:
            return Image.open(io.BytesIO(Path(path).read_bytes()))
        except OSError as error:
            if error.errno is None or pause is None:  # Pillow's errors have no number: this is not an image
                raise
            time.sleep(pause)


class LazyImage:
    """An image that is decoded when views are cropped from it.

    `.size` is (width, height) of the upright image, `.index` the image's place in its source.
    """

    def __init__(self, pil, index):
        self.pil, self.index = pil, index
        self.file, self.scale = getattr(pil, "fp", None), None  # the scale at which `pil` was last decoded, if it was
        orientation = 1 if pil.format == "TIFF" else pil.getexif().get(0x0112)  # Pillow turns a TIFF itself
        self.turn = TURNS.get(orientation)
        self.size = pil.size[::-1] if orientation in (5, 6, 7, 8) else pil.size

    def decode(self, scale=1.0):
        """The upright PIL image, RGB. A JPEG is decoded at its decoder's smallest scale that is at least `scale`."""
        scale = min(scale, 1.0)
        with decoding():
            if self.file and self.scale not in (None, scale):  # it has been decoded at another scale
                self.pil = Image.open(self.file)
            self.scale = scale
            if scale < 1:
                self.pil.draft(None, [math.ceil(side * scale) for side in self.pil.size])
            self.pil.load()  # a torn file fails here
            image = self.pil
            if image.mode.startswith("I"):  # 16-bit gray: the high byte
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode == "P":           # by way of RGBA, or Pillow warns about a palette with transparency
                image = image.convert("RGBA")
            if image.mode != "RGB":         # convert would copy an RGB image
                image = image.convert("RGB")
            return image if self.turn is None else image.transpose(self.turn)

    @property
    def shrunk_size(self):
        """(width, height) with a longer side of at most 500 pixels, as most images of ImageNet have."""
        return tuple(max(1, round(side * min(1.0, 500 / max(self.size)))) for side in self.size)

    def shrunk(self):
        """The upright image as uint8 [H, W, 3], of `shrunk_size`, for which the scales of segmentation are meant."""
        scale = self.shrunk_size[0] / self.size[0]
        return np.asarray(self.decode(scale).resize(self.shrunk_size, Image.Resampling.BILINEAR))

    def crop(self, crops, sizes, resample=Image.Resampling.BILINEAR):
        """RGB PIL images: each of `crops` (xyxy, pixels of the image) resized to a square whose side is in `sizes`.

        Call it once for all crops of an image. It decodes once, at the smallest scale that gives each crop its pixels,
        so that a 12-megapixel photograph costs little more than a small one.
        """
        image = self.decode(max(size / min(x2 - x1, y2 - y1) for (x1, y1, x2, y2), size in zip(crops, sizes)))
        width, height = image.size
        sx, sy = width / self.size[0], height / self.size[1]
        boxes = [(x1 * sx, y1 * sy, min(x2 * sx, width), min(y2 * sy, height)) for x1, y1, x2, y2 in crops]
        return [image.resize((size, size), resample, box) for box, size in zip(boxes, sizes)]


def random_crop(size, area, rng):
    """(x1, y1, x2, y2) in whole pixels of an image of (width, height), drawn as torchvision's RandomResizedCrop does.

    area: (low, high) of the crop's share of the image. The ratio of its width to its height is 3/4 to 4/3.
    """
    width, height = size
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # none fits: the largest, centered
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def to_view(boxes, crop, size, flip=False):
    """Boxes [n, 4] in pixels of the view that shows `crop` at size x size, mirrored if `flip`.

    boxes, crop: xyxy, in pixels of the image. A box may reach beyond the view.
    """
    corner, side = np.tile(crop[:2], 2), np.tile(np.subtract(crop[2:], crop[:2]), 2)
    boxes = (boxes - corner) * (size / side)
    if flip:
        boxes = np.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], axis=1)
    return boxes


def center_crop(size):
    """(x1, y1, x2, y2): the square in the middle of an image of (width, height), 224/256 of its shorter side."""
    side = max(1, round(min(size) * 224 / 256))
    x, y = (size[0] - side) // 2, (size[1] - side) // 2
    return x, y, x + side, y + side


class ImageFolder:
    """All images below a folder, in the same order on every file system. Links are followed, hidden files left out.

    The names lie in one buffer, since a list of ten million strings would grow with each loader worker.
    """

    max_pixels = 2 * 10 ** 8  # the largest image that is read: --max-pixels

    def __init__(self, root):
        self.root, self.bad = Path(root), set()  # bad: files found undecodable
        if not str(root) or not self.root.is_dir():
            fail(f"no such folder: {root}")
        self.keep(scan(os.fsencode(self.root)))
        if not len(self):
            fail(f"no images below {root} (looked for {' '.join(s.decode() for s in SUFFIXES)})")

    def keep(self, names):
        """Make b"a/1.jpg\\0a/2.jpg\\0..." the names of the images."""
        self.names = np.frombuffer(names, np.uint8)
        self.ends = np.flatnonzero(self.names == 0)

    def __len__(self):
        return len(self.ends)

    def name(self, i):
        """Path of image i below the root."""
        start = self.ends[i - 1] + 1 if i else 0
        return os.fsdecode(self.names[start:self.ends[i]].tobytes())

    def image(self, i):
        """Image i as a LazyImage. Raises Unreadable."""
        with decoding():
            image = open_image(self.root / self.name(i))
            if image.width * image.height > self.max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels are more than --max-pixels {self.max_pixels}")
            return LazyImage(image, i)

    def labels(self, classes=None):
        """(class of each image [N], names of the classes). A class is the first folder below the root, as in ImageNet.

        classes: the names to number by (default: those found, sorted). Exits with 2 if an image is of no such class.
        """
        folders = [self.name(i).rpartition(os.sep)[0].partition(os.sep)[0] for i in range(len(self))]
        if "" in folders:
            fail(f"{self.root}: images must lie in folders named by class")
        number = {name: k for k, name in enumerate(classes or sorted(set(folders)))}
        unknown = set(folders) - set(number)
        if unknown:
            fail(f"{self.root}: class {min(unknown)} is not among the training classes")
        return torch.tensor([number[folder] for folder in folders]), list(number)

    def fingerprint(self):
        """Plain values that tell this data from other data, wherever the folder lies."""
        return {"images": len(self), "names": zlib.crc32(self.names)}


def check_stems(folder):
    """Exit with 2 if images differ only in their extensions: they would share a PNG of masks or labels."""
    stem, count = Counter(os.path.splitext(folder.name(i))[0] for i in range(len(folder))).most_common(1)[0]
    if count > 1:
        fail(f"{count} images are named {stem} with different extensions and would share a PNG of masks: rename them")


def scan(root):
    """The paths of all images below `root`, each ended by a zero byte, sorted by folder and then by name."""
    refuse = lambda error: fail(f"cannot list {os.fsdecode(error.filename)}: {error.strerror}")
    root, found, visited = os.path.join(root, b""), {}, set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in visited:  # by a link that leads back up
            folders.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(b"."))
        images = sorted(name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(b"."))
        prefix = os.path.join(folder, b"")[len(root):]
        found[prefix] = b"".join(prefix + name + b"\0" for name in images)
    return b"".join(found[prefix] for prefix in sorted(found))


# --- Shapes ----------------------------------------------------------------------------------------------------------

def polygon(k):
    """The outline of a regular polygon with k corners."""
    return lambda u, v, r, a: r * np.cos(a % (2 * np.pi / k) - np.pi / k) - np.cos(np.pi / k)


# {class: (outline, pattern)}, functions of a point: (u, v), from -1 to 1 across the shape, and the same in polar
# coordinates (r, a). A point is inside the shape if its outline is <= 0, and has the second color if pattern is > 0.
SHAPE_CLASSES = {
    "ball": (lambda u, v, r, a: r - 0.95, lambda u, v, r, a: np.sin(9 * v)),
    "tile": (lambda u, v, r, a: np.maximum(abs(u), abs(v)) - 0.8, lambda u, v, r, a: np.sin(7 * u) * np.sin(7 * v)),
    "sail": (polygon(3), lambda u, v, r, a: np.cos(13 * u) + np.cos(13 * v) - 0.6),
    "star": (lambda u, v, r, a: r - 0.68 - 0.3 * np.cos(5 * a), lambda u, v, r, a: 0.4 - r),
    "flower": (lambda u, v, r, a: r - 0.72 - 0.25 * np.cos(8 * a), lambda u, v, r, a: np.cos(8 * a)),
    "cross": (lambda u, v, r, a: np.minimum(np.maximum(3 * abs(u), abs(v)), np.maximum(abs(u), 3 * abs(v))) - 0.95,
              lambda u, v, r, a: np.maximum(np.cos(15 * u), np.cos(15 * v)) - 0.8),
    "ring": (lambda u, v, r, a: abs(r - 0.7) - 0.27, lambda u, v, r, a: np.sin(8 * a)),
    "moon": (lambda u, v, r, a: np.maximum(r - 0.95, 0.7 - np.hypot(u - 0.5, v)),
             lambda u, v, r, a: np.sin(9 * (u + v))),
    "leaf": (lambda u, v, r, a: np.hypot(u, 2 * v) - 0.95, lambda u, v, r, a: np.cos(14 * (u - abs(v))) - 0.3),
    "cell": (polygon(6), lambda u, v, r, a: np.sin(14 * r)),
    "heart": (lambda u, v, r, a: np.hypot(u, 0.2 - v - 0.7 * abs(u) ** 0.7) - 0.75,
              lambda u, v, r, a: np.sin(9 * v + 2 * np.arcsin(np.sin(9 * u)))),
    "gear": (lambda u, v, r, a: r - 0.83 - 0.12 * np.sign(np.sin(9 * a)), lambda u, v, r, a: np.sin(2 * a + 11 * r)),
}


def color(rng, gray):
    """A muted color near a gray level. Bright ones would tell pictures apart without a look at their shapes."""
    return np.clip(gray + rng.uniform(-45, 45, 3), 0, 255)


class Shapes(ImageFolder):
    """Drawn scenes with boxes, masks and classes: the data of every demo and of the tests.

    A class has its own outline and pattern, as birds have feathers and cars have wheels. Colors, size, pose and ground
    are random. Picture i of a seed is the same everywhere. `single`: picture i shows one object, of class i modulo
    the number of classes, on plainer ground.
    """

    def __init__(self, count, size=64, seed=0, single=False):
        self.size, self.seed, self.single, self.pictures, self.bad = size, seed, single, None, set()
        self.keep("".join(f"shape {size} {seed} {single} {i}\0" for i in range(count)).encode())

    def scene(self, i):
        """(image [S, S, 3] uint8, boxes [n, 4] float32 xyxy pixels, masks [n, S, S] bool, classes [n] int64).

        Boxes and masks are of what is visible. An object is not listed if more than 60 % of it is hidden, or if it
        shows fewer than 9 pixels. No torch in here: it would wait forever for its threads, which do not survive the
        fork of `draw_all`.
        """
        rng = np.random.default_rng((3, self.seed, i))
        size, grid = self.size, np.arange(self.size) + 0.5
        x, y = grid[None, :], grid[:, None]
        kinds = len(SHAPE_CLASSES)
        classes = [i % kinds] if self.single else rng.integers(kinds, size=rng.integers(1, 6))
        image = self.ground(rng, x, y)
        masks, areas = np.zeros((len(classes), size, size), bool), np.zeros(len(classes))
        for n, kind in enumerate(classes):
            rows, columns, inside = self.paint(image, rng, x, y, *list(SHAPE_CLASSES.values())[kind])
            masks[:n, rows, columns] &= ~inside  # it hides the objects before it
            masks[n, rows, columns] = inside
            areas[n] = inside.sum()
        image = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
        visible = masks.sum(axis=(1, 2)) >= np.maximum(9, 0.4 * areas)
        boxes = [Image.fromarray(mask).getbbox() for mask in masks[visible]]
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        return image, boxes, masks[visible], np.asarray(classes)[visible].astype(np.int64)

    def ground(self, rng, x, y):
        """A gradient between two colors and, in a scene, waves: float [S, S, 3]."""
        angle = rng.uniform(0, 2 * np.pi)
        slope = np.clip((x * np.cos(angle) + y * np.sin(angle)) / self.size * 0.7 + 0.5, 0, 1)[..., None]
        image = color(rng, rng.uniform(20, 235)) * slope + color(rng, rng.uniform(20, 235)) * (1 - slope)
        for _ in range(0 if self.single else 3):
            wave = rng.normal(0, 10 / self.size, 2)
            image = image + np.sin(x * wave[0] + y * wave[1] + rng.uniform(0, 6))[..., None] * rng.uniform(-25, 25, 3)
        return image

    def paint(self, image, rng, x, y, outline, pattern):
        """Paint an object into `image` -> the rows and columns that it spans, as slices, and its mask in there."""
        radius = self.size * (rng.uniform(0.32, 0.46) if self.single else rng.uniform(0.1, 0.28))
        cx, cy = rng.uniform(0.85 * radius, self.size - 0.85 * radius, 2)
        tilt, stretch = rng.uniform(-0.5, 0.5), rng.uniform(0.85, 1.18)
        gray = rng.uniform(20, 235)
        colors = np.stack([color(rng, gray), color(rng, (gray + rng.uniform(85, 170)) % 255)])
        span = 1.3 * radius
        rows = slice(max(0, int(cy - span)), int(cy + span) + 1)
        columns = slice(max(0, int(cx - span)), int(cx + span) + 1)
        dx, dy = (x[:, columns] - cx) / radius, (y[rows] - cy) / radius
        u = (dx * np.cos(tilt) + dy * np.sin(tilt)) * stretch
        v = (dy * np.cos(tilt) - dx * np.sin(tilt)) / stretch
        place = u, v, np.hypot(u, v), np.arctan2(v, u) + np.pi / 2  # polygons and stars stand on their base
        alpha = np.clip(0.5 - outline(*place) * radius, 0, 1)[..., None]  # the edge is one pixel wide
        mix = np.clip(0.5 + 3 * pattern(*place), 0, 1)[..., None]
        image[rows, columns] += alpha * (colors[0] * (1 - mix) + colors[1] * mix - image[rows, columns])
        return rows, columns, alpha[..., 0] > 0.5

    def draw_all(self):
        """The same Shapes, with all pictures drawn now, on all cores, into memory that workers share.

        Sets `.pictures`, `.boxes`, `.classes`, and `.segments`: label maps uint8 [N, S, S] with 0 for the ground and 1,
        2, ... for the objects.
        """
        with multiprocessing.get_context("fork").Pool(cores()) as pool:
            scenes = pool.imap(self.labeled_scene, range(len(self)), chunksize=64)
            pictures, self.boxes, self.classes, segments = zip(*scenes)
        self.pictures, self.segments = np.stack(pictures), np.stack(segments)
        return self

    def labeled_scene(self, i):
        """(image, boxes, classes, label map) of picture i."""
        image, boxes, masks, classes = self.scene(i)
        labels = np.arange(1, len(masks) + 1, dtype=np.uint8)
        return image, boxes, classes, np.tensordot(labels, masks, axes=1)

    def objects(self, i):
        """Boxes [n, 4] and classes [n] of picture i; after `draw_all`."""
        return self.boxes[i], self.classes[i]

    def image(self, i):
        return LazyImage(Image.fromarray(self.scene(i)[0] if self.pictures is None else self.pictures[i]), i)

    def labels(self, classes=None):
        return torch.arange(len(self)) % len(SHAPE_CLASSES), list(SHAPE_CLASSES)


# --- Batches ---------------------------------------------------------------------------------------------------------

def seed_everything(*key):
    """Seed torch's generators, the device's too, with integers such as (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence((4, len(key), *key)).generate_state(1, np.uint64)[0]))


class Views(Dataset):
    """Item (epoch, index) is views(image, rng), a dict of tensors. Its random draws depend on the item alone.

    An image that cannot be decoded is named under "bad", and another one takes its place.
    """

    def __init__(self, source, views, seed):
        self.source, self.views, self.seed = source, views, seed

    def __getitem__(self, item):
        rng = np.random.default_rng((1, self.seed, *item))
        index, bad = item[1], ""
        for _ in range(20):
            try:
                return {"index": item[1], **self.views(self.source.image(index), rng), "bad": bad}
            except Unreadable as error:
                bad = bad or f"{self.source.name(index)} ({error})"
                index = int(rng.integers(len(self.source)))
        raise Unreadable(f"{bad}, nor 19 others in a row, more than 1 %: fix or remove them")


def global_batches(images, batch_size, seed, first, last):
    """This process's share of the batches of steps first ... last - 1 of a run, as lists of (epoch, index).

    Global batch k of an epoch holds the same images, whatever the number of processes.
    """
    ordered, share = None, batch_size // world_size()
    for step in range(first, last):
        epoch, k = divmod(step, images // batch_size)
        if epoch != ordered:
            ordered, order = epoch, np.random.default_rng((2, seed, epoch)).permutation(images)
        start = k * batch_size + rank() * share
        yield [(epoch, int(i)) for i in order[start:start + share]]


def even_share(count):
    """This process's share of range(count), equally large in all: the first few indices may come twice."""
    return np.arange(rank(), count + -count % world_size(), world_size()) % count


def collate_lists(rows):
    """A batch of samples whose tensors differ in size: a list of tensors under each name."""
    return {name: [row[name] for row in rows] for name in rows[0] if name != "index"}


class Loader:
    """Iterates over batches on the device, dicts of tensors: `views` of the images of `source`.

    views: as in Views; batches: lists of (epoch, index). A file that cannot be decoded is named once. If these are more
    than 1 % of the files seen, the program ends with code 2. `.waited`: the seconds spent waiting for images.
    """

    def __init__(self, source, views, batches, workers, device, seed=0, collate=None):
        self.source, self.device, self.waited, self.seen = source, device, 0.0, 0
        self.loader = DataLoader(Views(source, views, seed), batch_sampler=batches, num_workers=workers,
                                 collate_fn=collate, pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
                                 multiprocessing_context="fork" if workers else None)

    def __iter__(self):
        start, to_device = time.perf_counter(), lambda x: x.to(self.device, non_blocking=True)
        try:
            for batch in self.loader:
                self.waited += time.perf_counter() - start
                self.report_bad_files(batch.pop("bad"))
                yield {name: [to_device(row) for row in x] if isinstance(x, list) else to_device(x)
                       for name, x in batch.items()}
                start = time.perf_counter()
        except Unreadable as error:
            fail(f"cannot decode {str(error).splitlines()[-1].rpartition('Unreadable: ')[2]}", everywhere=True)

    def report_bad_files(self, reports):
        self.seen += len(reports)
        bad = self.source.bad
        for report in set(reports) - {""} - bad:
            bad.add(report)
            print(f"cannot decode {report}: another image takes its place", file=sys.stderr, flush=True)
        if len(bad) > 0.01 * min(len(self.source), max(self.seen, 1000)):  # a few at the start prove nothing
            fail(f"{len(bad)} of the first {min(self.seen, len(self.source))} files cannot be decoded, more than "
                 "1 %: fix or remove them", everywhere=True)


# --- Weights to start from -------------------------------------------------------------------------------------------

# {method: (the network that is trained, the one that follows it)}
NETWORKS = {"moco": ("encoder_q", "encoder_k"), "detco": ("encoder_q", "encoder_k"), "dupr": ("encoder_q", "encoder_k"),
            "soco": ("online", "target"), "detcon": ("online", "target")}

# {our module: theirs}. {0}, {1} and {2} count from 0, 1 and 2; {b} is a block, {c} one of its convolutions, and {n} the
# mark of a network, as in LAYOUTS. All fc1 flatten an RoI in the same order: channel, row, column.
RESNET = {"backbone.conv1": "conv1", "backbone.bn1": "bn1", "backbone.layer{1}": "layer{1}"}
MOCO = {"backbone": "encoder{n}", "projector": "encoder{n}.fc", "queue.keys": "queue", "queue.position": "queue_ptr"}
SOCO = {
    "backbone": "encoder{n}",
    "fpn.inner_blocks.{0}.0": "neck{n}.lateral_convs.{0}.conv",
    "fpn.inner_blocks.{0}.1": "neck{n}.lateral_convs.{0}.bn",
    "fpn.layer_blocks.{0}.0": "neck{n}.fpn_convs.{0}.conv", "fpn.layer_blocks.{0}.1": "neck{n}.fpn_convs.{0}.bn",
    "head.{0}.0": "head{n}.conv{1}", "head.{0}.1": "head{n}.bn{1}", "head.5": "head{n}.fc1",
    "projector.0": "projector{n}.linear1", "projector.1": "projector{n}.bn1", "projector.3": "projector{n}.linear2",
    "predictor.0": "predictor{n}.linear1", "predictor.1": "predictor{n}.bn1", "predictor.3": "predictor{n}.linear2"}
DETECTRON2 = {
    "backbone.conv1": "stem.conv1", "backbone.bn1": "stem.conv1.norm",
    "backbone.layer{1}.{b}.conv{c}": "res{2}.{b}.conv{c}", "backbone.layer{1}.{b}.bn{c}": "res{2}.{b}.conv{c}.norm",
    "backbone.layer{1}.{b}.downsample.0": "res{2}.{b}.shortcut",
    "backbone.layer{1}.{b}.downsample.1": "res{2}.{b}.shortcut.norm",
    "fpn.inner_blocks.{0}.0": "fpn_lateral{2}", "fpn.inner_blocks.{0}.1": "fpn_lateral{2}.norm",
    "fpn.layer_blocks.{0}.0": "fpn_output{2}", "fpn.layer_blocks.{0}.1": "fpn_output{2}.norm",
    "head.{0}.0": "box_head.conv{1}", "head.{0}.1": "box_head.conv{1}.norm", "head.5": "box_head.fc1"}
# {a name in the file: (what it is, its method, its table, {mark of a network: which it is})}; the first found decides
LAYOUTS = {
    "encoder_q.backbone.conv1.weight": ("ours", None, {"": "encoder{n}"}, {"_q": "online", "_k": "target"}),
    "online.backbone.conv1.weight": ("ours", None, {"": "{n}"}, {"online": "online", "target": "target"}),
    "encoder_q.fc.weight": ("MoCo v1 of the authors", "moco", MOCO, {"_q": "online", "_k": "target"}),
    "encoder_q.fc.0.weight": ("MoCo v2 of the authors", "moco", MOCO, {"_q": "online", "_k": "target"}),
    "neck.fpn_convs.0.conv.weight": ("SoCo of the authors, FPN", "soco", SOCO, {"": "online", "_k": "target"}),
    "encoder.conv1.weight": ("SoCo of the authors, C4", "soco", SOCO, {"": "online", "_k": "target"}),
    "stem.conv1.weight": ("a Detectron2 file", None, DETECTRON2, {"": "online"}),
    "backbone.conv1.weight": ("a classifier, as ours", None, {"backbone": "backbone"}, {"": "online"}),
    "fc.weight": ("torchvision's ResNet", None, RESNET, {"": "online"}),
    "conv1.weight": ("a ResNet without classifier, as DetCo of the authors", None, RESNET, {"": "online"})}


def module_names(table, mark=""):
    """{our module: theirs}: one of the tables above with its counts filled in; no stage has more than 36 blocks."""
    return {ours.format(k, k + 1, k + 2, b=b, c=c): theirs.format(k, k + 1, k + 2, b=b, c=c, n=mark)
            for ours, theirs in table.items() for k, b, c in product(range(4), range(36), (1, 2, 3))}


def longest_prefix(name, modules):
    """The longest name among `modules` that the name of a tensor begins with, or an empty string."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


class PlainUnpickler(pickle.Unpickler):
    """Reads plain values and NumPy arrays, and refuses whatever else a pickle names."""

    known = {"collections.OrderedDict", "_codecs.encode", "numpy.ndarray", "numpy.dtype",
             "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "numpy._core.numeric._frombuffer"}

    def find_class(self, module, name):
        module = module.replace("numpy.core", "numpy._core")  # as NumPy 2 calls it
        if f"{module}.{name}" not in self.known:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return super().find_class(module, name)


def unpickled(path):
    """The dict in a file of torch.save, or in a .pkl of Detectron2. Nothing in the file is executed.

    Exits with 2 if it holds more than tensors, arrays and plain values.
    """
    try:
        if str(path).endswith(".pkl"):
            with open(path, "rb") as file:
                state = PlainUnpickler(file, encoding="latin1").load()
            arrays = {name: x for name, x in state.get("model", state).items() if isinstance(x, np.ndarray)}
            return {**state, "model": {name: torch.tensor(x) for name, x in arrays.items()}}
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options in SoCo's files
            return {**torch.load(path, map_location="cpu", weights_only=True)}
    except Exception as error:  # a damaged file may make anything of an unpickler
        other = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it holds {other[1]}, and only tensors, arrays and plain values are read" if other else str(error)[:80]
        fail(f"{path} cannot be read ({' '.join(why.split())}): take another file, or remove it if it is damaged")


class Weights(NamedTuple):
    """What a file of weights holds, by our names: `backbone.*`, SoCo's `fpn.*` and `head.*`, `projector.*`, ...

    online, target: the tensors of the two networks; target is empty if the file has only one. settings: those of our
    run; of any other file, the arch alone.
    """

    what: str
    checksum: str
    method: str | None
    settings: dict
    online: dict
    target: dict

    def sentence(self, taken):
        """One line that says what the file is, which of its parts were taken, and which have no place."""
        names = {"fpn": "pyramid", "head": "box head", "fc": "classifier"}
        left = [names.get(part, part) for part in parts(self.online) if part not in taken]
        line = f"{self.what}: {', '.join(names.get(part, part) for part in taken)}"
        return line + (f"; no place for {', '.join(left)}" if left else "")

    def choose_arch(self, args):
        """Set args.arch, and the file's checksum as a setting of the run. Exits with 2 if --arch is another."""
        if args.arch not in (None, self.settings["arch"]):
            fail(f"--init {args.init} is a {self.settings['arch']}, not --arch {args.arch}: leave --arch out")
        args.arch, args.init_checksum = self.settings["arch"], self.checksum


def parts(tensors):
    """{"backbone": {name: tensor}, "fpn": {...}, ...}: the tensors by the first word of their names."""
    found = defaultdict(dict)
    for name, x in tensors.items():
        found[name.partition(".")[0]][name] = x
    return found


def read_weights(path):
    """The Weights in a file of ours, of MoCo's, DetCo's or SoCo's authors, of torchvision's ResNet or of Detectron2.

    Exits with 2 if it is none of these, or if its backbone is not a ResNet that --arch can name.
    """
    state = unpickled(path)
    model = next((state[key] for key in ("model", "state_dict") if isinstance(state.get(key), dict)), state)
    model = {re.sub(r"^(module|roi_heads)\.", "", str(name)): x for name, x in model.items() if torch.is_tensor(x)}
    what, method, places = layout(path, state, model)
    networks = {"online": {}, "target": {}}
    for name, x in model.items():
        prefix = longest_prefix(name, places)
        network, module = places.get(prefix, ("online", ""))
        networks[network][(module + name[len(prefix):]).removeprefix(".")] = x
    if "queue_ptr" in model and method == "moco":  # there a key is a column
        networks["online"]["queue.keys"] = torch.atleast_2d(networks["online"]["queue.keys"]).mT.contiguous()
        networks["online"]["queue.position"] = model["queue_ptr"].squeeze()
    for tensors in networks.values():
        for name in [name for name in tensors if name.endswith(".running_mean")]:  # Detectron2 does not count batches
            tensors.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    settings = state["settings"] if isinstance(state.get("settings"), dict) else {}
    arch = backbone_arch(path, settings.get("arch"), parts(networks["online"])["backbone"])
    author = f" by {' '.join(str(state['__author__']).split())[:40]}" if "__author__" in state else ""
    epoch = f", epoch {state['epoch']}" if isinstance(state.get("epoch"), int) else ""
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return Weights(f"{path}: {what}{author}{epoch}, {arch}", checksum, method, {**settings, "arch": arch}, **networks)


def layout(path, state, model):
    """(what the file is, its method or None, {module there: (network, module here)}). Exits with 2 if it is unknown."""
    method = str(state.get("method")) if isinstance(state.get("settings"), dict) else None
    if method and method not in (*NETWORKS, "classify"):
        fail(f"{path} is of {method}: take a checkpoint of {', '.join(NETWORKS)} or classify")
    known = next((name for name in LAYOUTS if name in model), None)
    if not known:
        fail(f"{path} has no ResNet by names that are known here: ours, torchvision's, Detectron2's, or those of "
             "MoCo's, DetCo's and SoCo's authors")
    what, theirs, table, marks = LAYOUTS[known]
    places = {}
    for mark, network in reversed(marks.items()):  # the online network last: it gets what has no mark, as a queue
        places |= {there: (network, here) for here, there in module_names(table, mark).items()}
    what = f"{method} of this project" if method else what
    return what, method or theirs, places


def backbone_arch(path, arch, tensors):
    """The --arch of tensors named backbone.*: `arch`, or if it is None, the one that their shapes imply.

    Exits with 2 if the tensors are not those of that network.
    """
    shapes = {name.removeprefix("backbone."): list(x.shape) for name, x in tensors.items()}
    if not arch:
        block = Bottleneck if "layer1.0.conv3.weight" in shapes else BasicBlock
        counts = [len({name.split(".")[1] for name in shapes if name.startswith(f"layer{k}.")}) for k in (1, 2, 3, 4)]
        depth = next((depth for depth, layers in LAYERS.items() if layers == (block, counts)), 50)
        stem, conv = (shapes.get(name, []) for name in ("conv1.weight", "layer1.0.conv2.weight"))
        arch = f"resnet{depth}" + (f"w{stem[0] / 64:g}" if len(stem) == 4 and stem[0] != 64 else "")
        if len(conv) == 4 and conv[0] > conv[1] > 0:  # its groups have conv[1] channels each
            arch = f"resnext{depth}_{conv[0] // conv[1]}x{conv[1]}d"
    with torch.device("meta"):
        wanted = {name: list(x.shape) for name, x in resnet(str(arch)).state_dict().items()}
    for name in wanted | shapes:
        here, there = (x.get(name, "missing") for x in (wanted, shapes))
        if here != there:
            fail(f"{path} is not a {arch}: {name} is {there} there, {here} in a {arch}")
    return arch


def weights_to_start_from(args):
    """The Weights that --init names, after --arch has been set; None if the run has begun and the file is gone."""
    last = Path(args.out, "last.pt")
    if last.exists() and not Path(args.init).exists():
        settings = load(last)["settings"]
        args.arch, args.init_checksum = args.arch or settings.get("arch"), settings.get("init_checksum") or "missing"
        return None
    weights = read_weights(args.init)
    weights.choose_arch(args)
    return weights


def start_from(model, method, weights):
    """Put weights into both networks of a method's model, and print one line that says what was taken.

    Backbone, pyramid and box head are taken from any file, other parts only from a file of the same method. A part is
    taken if all its names and shapes are those of the model.
    """
    state, same_method = model.state_dict(), weights.method == method
    loaded, taken = {}, {}  # taken: {part: True}, in order and each part once
    shapes = lambda tensors: {name: x.shape for name, x in tensors.items()}
    sources = weights.online, weights.target if same_method and weights.target else weights.online
    for network, tensors in zip(NETWORKS[method], sources):
        for part, own in parts(tensors).items():
            for prefix in (f"{network}.", ""):  # a predictor or a queue belongs to no network
                named = {f"{prefix}{name}": x for name, x in own.items()}
                here = {name: x for name, x in state.items() if name.startswith(f"{prefix}{part}.")}
                if shapes(named) == shapes(here) and (same_method or part in ("backbone", "fpn", "head")):
                    loaded |= named
                    taken[part] = True
    model.load_state_dict(loaded, strict=False)
    if rank() == 0:
        print(weights.sentence(taken))


# --- Runs ------------------------------------------------------------------------------------------------------------

RUNTIME_SETTINGS = {"data", "out", "workers", "max_steps", "save_every", "print_every", "knn", "tensorboard", "prepare",
                    "train", "val", "eval_every", "init", "start"}  # may change when a run goes on


@contextmanager
def atomic_write(path):
    """Context with a binary file to write, which appears at `path` complete or not at all. An OSError names `path`."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except BaseException as error:
        Path(f"{path}.tmp").unlink(missing_ok=True)
        fault = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind an error
        if isinstance(fault, OSError) and fault.errno:
            raise OSError(fault.errno, fault.strerror, str(path)) from error
        raise


LOCKED = []  # files that stay open, since a lock ends when its file is closed


def lock(folder, flag=""):
    """Make a folder, and keep other runs out of it until process 0 ends. Exits with 2 if another run is at work there.

    A record lock ends with its process, however the process ends; workers do not inherit it; it works on NFS.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if rank() > 0:
            return
        LOCKED.append(open(Path(folder, ".lock"), "w"))
    except OSError as error:
        fail(f"cannot write {flag}{folder}: {error.strerror}")
    for _ in range(20):  # a run that was killed may take seconds to die
        try:
            return fcntl.lockf(LOCKED[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            time.sleep(0.5)
        except OSError:  # a file system without locks
            return
    fail(f"another run is at work in {folder}: wait until it has ended, or take another folder")


def load(path):
    """A checkpoint of ours, as a dict on the CPU. Exits with 2 if it is not one."""
    state = unpickled(path)
    missing = {"model", "optimizer", "epoch", "step", "method", "settings", "generators"} - set(state)
    if missing:
        fail(f"{path} is not a checkpoint of this project: it lacks {', '.join(sorted(missing))}")
    return state


def read_log(path):
    """The rows of a log.jsonl, except a last line that a kill has cut short. Exits with 2 if it is not one."""
    try:
        rows = [json.loads(row) for row in Path(path).read_text().splitlines() if row.endswith("}")]
        if not all(isinstance(row["step"], int) for row in rows):
            raise ValueError("a step is not a number")
    except (OSError, ValueError, TypeError, KeyError) as error:
        fail(f"{path} is not a log.jsonl of this project ({type(error).__name__}: {error}): fix or remove it")
    return rows


class Run:
    """A run in its folder, --out: it begins or resumes there, saves last.pt, and logs to log.jsonl, the console and
    TensorBoard. Exits with 2 if the folder holds another run.

    `.step` counts the steps done (the loop adds one), `.total` those of the whole run; `.last` is where --max-steps
    stops it. The log of a resumed run reads like that of an uninterrupted one.
    """

    def __init__(self, args, source, method, model, optimizer):
        self.args, self.source, self.method, self.model, self.optimizer = args, source, method, model, optimizer
        self.steps_per_epoch = len(source) // args.batch_size
        if not self.steps_per_epoch:
            fail(f"{len(source)} images do not fill a batch of {args.batch_size}: "
                 f"take --batch-size {len(source)} or less")
        self.total = args.epochs * self.steps_per_epoch
        self.last = min(self.total, args.max_steps or self.total)
        self.settings = {name: x for name, x in vars(args).items() if name not in RUNTIME_SETTINGS}
        self.settings |= source.fingerprint()
        self.out, self.step, self.board = Path(args.out), 0, None
        lock(self.out, "--out ")
        if Path(self.out, "last.pt").exists():
            self.resume(load(Path(self.out, "last.pt")))
        elif args.start:
            start_from(model, method, args.start)
        own = [self.step, zlib.crc32(json.dumps(self.settings, sort_keys=True).encode())]
        if len(all_gather(torch.tensor([own], device=next(model.parameters()).device)).unique(dim=0)) > 1:
            fail("the processes see different folders: --data and --out must be the same on every node")
        if rank() == 0:
            self.open_logs()

    def resume(self, state):
        """Go on from the checkpoint `state`. Exits with 2 if it is of a run with other settings."""
        there, here = {"method": state["method"], **state["settings"]}, {"method": self.method, **self.settings}
        other = [f"{name} {there.get(name)} (now {here.get(name)})" for name in sorted(here.keys() | there.keys())
                 if here.get(name) != there.get(name)]
        if other:
            fail(f"{self.out} holds a run with other settings: {', '.join(other)}; correct them or take another --out")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            fail(f"{self.out}/last.pt does not fit the model ({' '.join(str(error).split())[:80]}): take another --out")
        torch.set_rng_state(state["generators"]["torch"])
        self.step = state["step"]

    def open_logs(self):
        """Cut log.jsonl back to the step of the checkpoint, and open TensorBoard."""
        rows = [row for row in self.rows() if self.step and row["step"] <= self.step]
        with atomic_write(Path(self.out, "log.jsonl")) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        if self.args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                fail("--tensorboard needs the package tensorboard: pip install tensorboard")
            self.board = SummaryWriter(self.args.out, purge_step=self.step)

    def save(self):
        """Write last.pt, from process 0 alone."""
        if rank() == 0:
            state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                         epoch=self.step // self.steps_per_epoch, step=self.step, method=self.method,
                         settings=self.settings, generators={"torch": torch.get_rng_state()})
            with atomic_write(Path(self.out, "last.pt")) as file:
                torch.save(state, file)
        self.restart_clock()

    def batches(self, views, device, collate=None):
        """All batches that are left of the run, on the device: `views` of the images. Epochs follow each other."""
        steps = global_batches(len(self.source), self.args.batch_size, self.args.seed, self.step, self.last)
        self.loader = Loader(self.source, views, steps, self.args.workers, device, self.args.seed, collate)
        self.restart_clock()
        return self.until_stopped()

    def until_stopped(self):
        """The loader's batches. If a signal comes, all processes save and end after the same step."""
        stop.holding = True
        try:
            for batch in self.loader:
                yield batch
                number = stop.agreed()
                if number and self.step < self.last:
                    self.save()
                    barrier()  # torchrun kills the others as soon as one has ended
                    if rank() == 0:
                        print_line(f"stopped by {signal.Signals(number).name}, saved after step {self.step} of "
                                   f"{self.total}: run the same command again to resume")
                    finish()
                    sys.exit(128 + number)
        finally:
            stop.holding = False

    def restart_clock(self):
        """Measure images_per_s and data_wait of the next row from here on."""
        self.mark = time.perf_counter(), self.step, self.loader.waited

    def log(self, loss, stats, lr):
        """Write a row for the step just done, averaged over the processes: the only wait for the device in a step.

        Exits with 2 if the loss is not finite, as all that follows would be lost.
        """
        figures = torch.stack([loss.detach().float(), *(x.detach().float() for x in stats.values())])
        if world_size() > 1:
            dist.all_reduce(figures)
        figures = (figures / world_size()).tolist()
        if not math.isfinite(figures[0]):
            fail(f"the loss is {figures[0]} after step {self.step}: lower --lr, or try --amp off")
        start, step, waited = self.mark
        self.restart_clock()
        took = self.mark[0] - start
        self.write({"loss": figures[0], "lr": lr, **dict(zip(stats, figures[1:])),
                    "images_per_s": round((self.step - step) * self.args.batch_size / took, 1),
                    "data_wait": round((self.loader.waited - waited) / took, 3)})

    def monitor(self, encoder, pair, device, stage=5):
        """Write a row with the kNN accuracy of a stage of `encoder.backbone` on the pair (train, val).

        If these are drawn shapes, the row also has the object probe, with `encoder.pool` (default: `pool_stages`) for
        the features of boxes, and is written only before the first step and after the last.
        """
        drawn = isinstance(pair[0], Shapes)
        if drawn and self.step not in (0, self.total):
            return
        with evaluating(encoder), torch.autocast(device.type, torch.bfloat16, enabled=self.args.amp == "bf16"):
            row = {"knn": knn(encoder.backbone, *pair, self.args.size, device, self.args.workers, stage=stage)}
            if drawn:
                size, seed, pool = pair[0].size, pair[0].seed, getattr(encoder, "pool", pool_stages)
                scenes = Shapes(1200, size, seed).draw_all(), Shapes(400, size, seed + 1).draw_all()
                figures = probe(encoder.backbone, *scenes, detector_size(size), device, self.args.workers, pool)
                row |= {f"probe_{name}": x for name, x in figures.items()}
        self.write(row)
        self.restart_clock()

    def write(self, values):
        """Write `values` as a row of log.jsonl, a line on the console, and points in TensorBoard."""
        if rank() > 0:
            return
        row = {"epoch": self.step // self.steps_per_epoch, "step": self.step, **values}
        path = Path(self.out, "log.jsonl")
        try:
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # from write or close, which do not name the path
            raise OSError(error.errno, error.strerror, str(path)) from error
        print_line(self.console_line(values))
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, self.step)

    def console_line(self, values):
        """For example: epoch 3/16  step 320/512  loss 2.41  accuracy 12 %  118 images/s  1:34 left"""
        epoch = math.ceil(self.step / self.steps_per_epoch)
        words = [f"epoch {epoch}/{self.args.epochs}", f"step {self.step}/{self.total}"]
        for name, x in values.items():
            if name in ("lr", "images_per_s", "data_wait"):
                continue
            share = re.search(r"accuracy|knn|probe|overlap|paired|top\d|mIoU|^c\d", name)
            words.append(f"{name} {100 * x:.3g} %" if share else f"{name} {x:.3g}")
        if "images_per_s" in values:
            words.append(f"{values['images_per_s']:.0f} images/s")
            if values["data_wait"] > 0.2:
                words.append(f"{values['data_wait']:.0%} of the time waiting for images")
            left = (self.last - self.step) * self.args.batch_size / max(values["images_per_s"], 1e-3)
            words.append(f"{clock(left)} left")
        return "  ".join(words)

    def rows(self):
        """The rows of log.jsonl so far."""
        path = Path(self.out, "log.jsonl")
        return read_log(path) if path.exists() else []

    def summary(self, **hints):
        """Print where the run ended: the mean of each named stat's last five rows, with a hint on how to read it."""
        rows, at_first = self.rows(), "at first" if self.args.init else "untrained"
        knns = [row["knn"] for row in rows if "knn" in row]
        stats = {name: [row[name] for row in rows if name in row][-5:] for name in hints}
        figures = [f"{name} {np.mean(values):.3g} ({hints[name]})" for name, values in stats.items() if values]
        if knns:
            figures += [f"kNN {knns[-1]:.1%}" + (f" ({at_first} {knns[0]:.1%})" if "knn" in rows[0] else "")]
        probes = [{name[6:]: x for name, x in row.items() if name.startswith("probe_")}
                  for row in rows if "probe_c2" in row]
        if len(probes) == 2:
            probed = ", ".join(f"{name} {after:.1%} ({before:.1%})"
                               for (name, after), before in zip(probes[1].items(), probes[0].values()))
            figures += [f"objects recognized from {probed}"]
        if rank() == 0:
            print_line(f"step {self.step} of {self.total}: {', '.join(figures)}")


def save_views(path, *views):
    """Write a picture, from process 0 alone: the views of an image side by side, the images below each other.

    views: view 1, view 2, ... of all images, each [N, 3, S, S] in [0, 1]; small ones are enlarged.
    """
    if rank() == 0:
        pictures = torch.stack(views, dim=1).flatten(0, 1).cpu()  # [N * views, 3, S, S]
        pictures = F.interpolate(pictures, scale_factor=max(1, 128 // pictures.shape[-1]))
        with atomic_write(path) as file:
            torchvision.utils.save_image(pictures, file, "png", nrow=len(views))


# --- Long work before training ---------------------------------------------------------------------------------------

def clock(seconds):
    """Seconds as 0:05, 1:34 or 2:01:34."""
    return str(timedelta(seconds=round(seconds))).removeprefix("0:").removeprefix("0")


class Progress:
    """Prints to stderr, every ten seconds, how much of a long task is done and how long the rest will take."""

    def __init__(self, what, total):
        self.what, self.total, self.start = what, total, time.perf_counter()
        self.printed = self.start

    def __call__(self, done):
        now = time.perf_counter()
        if rank() == 0 and now > self.printed + 10:
            self.printed = now
            left = (now - self.start) / max(done, 1) * (self.total - done)
            print(f"{self.what}: {done / self.total:.0%}, {clock(left)} left", file=sys.stderr, flush=True)


def need_opencv(flag, instead):
    """Exit with 2 if OpenCV's segmentation, which `flag` asks for, is not installed."""
    try:
        from cv2.ximgproc import segmentation  # noqa: F401
    except ImportError:
        fail(f"{flag} needs OpenCV's contrib modules: pip install opencv-contrib-python-headless (and no other OpenCV "
             f"beside it); {instead} needs none")


def make_files(label, count, path, write, device):
    """Make those of the files path(0) ... path(count - 1) that are missing, on all cores of all processes.

    write(k, file) writes the content of file k. If it raises Unreadable, the file is named and left out. The processes
    meet every few seconds, so that none waits for another one longer than their connection allows.
    """
    def make(k):
        """Make file k, in a worker -> what went wrong, or an empty string."""
        try:
            path(k).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path(k)) as file:
                write(k, file)
        except Unreadable as error:
            print(f"cannot decode {error}: no {path(k).name}", file=sys.stderr, flush=True)
        except OSError as error:
            return f"cannot write {path(k)}: {error.strerror}"
        return ""

    total = lambda n: int(all_gather(torch.tensor([n], device=device)).sum())
    tasks = [k for k in range(count) if not path(k).exists()]
    if total(len(tasks)) != len(tasks) * world_size():  # here all have looked, and none has written yet
        fail(f"the processes see different {label}: put them where every node sees them")
    if not tasks:
        return
    lock(path(0).parent)
    made = iter(DataLoader(tasks[rank()::world_size()], batch_size=None, collate_fn=make, num_workers=cores(),
                           worker_init_fn=ignore_signals, multiprocessing_context="fork"))
    own, finished, progress = 0, 0, Progress(label, len(tasks))
    while finished < len(tasks):
        meet = time.perf_counter() + 5
        for error in made:
            if error:
                fail(error, everywhere=True)
            own += 1
            if time.perf_counter() > meet:
                break
        finished = total(own)
        progress(finished)


# --- Evaluation ------------------------------------------------------------------------------------------------------

@contextmanager
def evaluating(network):
    """Context in which the network is in eval mode, with the running statistics of process 0 in all processes."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    for buffer in network.buffers() if world_size() > 1 else ():
        dist.broadcast(buffer, src=0)
    try:
        yield
    finally:
        for module in training:
            module.training = True


def map_images(function, source, view, indices, batch_size, device, workers=0, collate=None, seed=0):
    """Yields (batch, function(batch)), batch by batch, for the images `indices` of `source`; prints progress."""
    progress, done = Progress(f"{len(indices)} images", len(indices)), 0
    batches = BatchSampler(((0, int(i)) for i in indices), batch_size, drop_last=False)  # all of epoch 0
    for batch in Loader(source, view, batches, workers, device, seed, collate):
        yield batch, function(batch)
        done += len(next(iter(batch.values())))
        progress(done)


def extract_features(backbone, source, indices, size, device, workers, stage=5):
    """Yields (indices [n], features [n, C]) of center crops: a stage's output, averaged and L2-normalized."""
    normalize = Photometric().to(device)

    def view(image, rng):
        return {"view": to_tensor(image.crop([center_crop(image.size)], [size])[0])}

    def encode(batch):
        c = backbone(normalize(batch["view"]), stage - 1)[-1]
        return F.normalize(c.float().mean(dim=(2, 3)), dim=1)

    for batch, rows in map_images(encode, source, view, indices, 512, device, workers):
        yield batch["index"], rows


@torch.no_grad()
@exact_products()
def knn(backbone, train, val, size, device, workers=0, k=200, temperature=0.07, stage=5):
    """Top-1 accuracy in [0, 1] of weighted k nearest neighbors on a frozen stage, c5 or another (Wu et al. 2018).

    train, val: sources with labels. Each process compares its share of the training images with all M validation
    images, and keeps the k nearest of each. No training feature is ever stored.
    """
    labels, classes = train.labels()
    truth, _ = val.labels(classes)
    k, labels = min(k, len(train)), labels.to(device)
    features = partial(extract_features, backbone, size=size, device=device, workers=workers, stage=stage)
    with evaluating(backbone):
        index, rows = (all_gather(torch.cat(x)) for x in zip(*features(val, even_share(len(val)))))
        queries = torch.empty(len(val), rows.shape[1], device=device).index_copy_(0, index, rows)  # [M, C]
        best = torch.full((len(val), k), -2.0, device=device)           # [M, k] similarities of the nearest so far
        label = torch.zeros_like(best, dtype=torch.long)                # [M, k] their classes
        for index, rows in features(train, range(rank(), len(train), world_size())):
            with torch.autocast(device.type, enabled=False):  # the backbone may run in bf16, similarities may not
                best, place = torch.cat([best, queries @ rows.T], dim=1).topk(k)
            label = torch.cat([label, labels[index].expand(len(val), -1)], dim=1).gather(1, place)
    best, place = all_gather(best.T).T.topk(k)                          # of all processes' nearest, [M, world*k]
    label = all_gather(label.T).T.gather(1, place)
    votes = torch.zeros(len(val), len(classes), device=device).scatter_add_(1, label, torch.exp(best / temperature))
    return (votes.argmax(dim=1) == truth.to(device)).float().mean().item()


def pool_stages(stages, boxes):
    """{"c2": [n, C2 * 9], ..., "c5"}: RoIAlign of each box to 3 x 3 cells. boxes: a list of [k, 4], one an image."""
    return {f"c{i}": torchvision.ops.roi_align(c.float(), boxes, 3, 0.5 ** i, aligned=True).flatten(1)
            for i, c in enumerate(stages, start=2)}


def object_view(image, rng, source, size):
    """{"view": the image made square, uint8 [3, size, size], "boxes": [k, 4] xyxy in its pixels, "classes": [k]}."""
    boxes, classes = source.objects(image.index)  # boxes in pixels of the image
    frame = 0, 0, *image.size
    view, = image.crop([frame], [size])
    boxes = torch.from_numpy(to_view(boxes, frame, size)).float()
    return {"view": to_tensor(view), "boxes": boxes, "classes": torch.from_numpy(classes)}


def box_features(encode, source, images, size, device, workers=0):
    """({name: features [n, D]}, classes [n]) of all boxes in the images `images` of `source`, resized to size x size.

    encode(views [N, 3, S, S], boxes) gives the features. All processes share the work and return all features.
    """
    view, own = partial(object_view, source=source, size=size), []
    encode_batch = lambda batch: encode(torch.stack(batch["view"]), batch["boxes"])
    own_images = list(images)[rank()::world_size()]
    for batch, rows in map_images(encode_batch, source, view, own_images, 64, device, workers, collate_lists):
        own.append({name: x.cpu() for name, x in {**rows, "classes": torch.cat(batch["classes"])}.items()})
    shares = [own]
    if world_size() > 1:
        shares = [None] * world_size()
        dist.all_gather_object(shares, own)
    found = [rows for share in shares for rows in share]
    features = {name: torch.cat([rows[name] for rows in found]).to(device) for name in found[0]}
    classes = features.pop("classes")
    return features, classes


def ridge(x, y, x_val):
    """Scores [M, K] of x_val [M, D] for each class, by ridge regression on x [N, D] and its classes y [N, K], one-hot.

    The strength is the one with the best leave-one-out accuracy. One eigendecomposition gives the fits of them all.
    """
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x, x_val = (((rows - mean) / std).double() for rows in (x, x_val))
    if x.shape[1] > len(x):                              # outside the span of the rows nothing can be learned
        span = torch.linalg.qr(x.T).Q
        x, x_val = x @ span, x_val @ span
    target = y.double()
    prior = target.mean(dim=0)
    power, axes = torch.linalg.eigh(x.T @ x)
    z, best_accuracy, best_weight = x @ axes, -1, None
    for strength in len(x) * 10.0 ** torch.arange(-4, 4):
        inverse = 1 / (power.clamp(min=0) + strength)    # [D]
        weight = inverse[:, None] * (z.T @ (target - prior))
        leverage = 1 / len(x) + z ** 2 @ inverse         # [N]
        fit = prior + z @ weight
        left_out = target - (target - fit) / (1 - leverage)[:, None]
        accuracy = (left_out.argmax(dim=1) == y.argmax(dim=1)).double().mean().item()
        if accuracy > best_accuracy:
            best_accuracy, best_weight = accuracy, weight
    return prior + x_val @ axes @ best_weight


def detector_size(size):
    """The side in pixels of a detector's image if pre-training's has `size`: 800 for 224, in whole strides of 32."""
    return 32 * round(size * 800 / 224 / 32)


@torch.no_grad()
@exact_products()
def probe(backbone, train, val, size, device, workers=0, pool=pool_stages):
    """{"c2": ..., "c5"}: the accuracy in [0, 1] of a linear classifier of the objects in boxes, by stage.

    train, val: sources with objects, to learn from and to evaluate on. pool(stages, boxes): as `pool_stages`.
    """
    normalize = Photometric().to(device)
    encode = lambda views, boxes: pool(backbone(normalize(views)), boxes)
    features = lambda source: box_features(encode, source, range(len(source)), size, device, workers)
    with evaluating(backbone):
        (x, y), (x_val, y_val) = features(train), features(val)
    scores = {name: ridge(x[name], F.one_hot(y), x_val[name]) for name in x}
    return {name: (s.argmax(dim=1) == y_val).float().mean().item() for name, s in scores.items()}


# --- Command line ----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """The flags that all methods share; a method adds its own to `.own`.

    Defaults come from `paper`, or first from `demo` if no --data is given. The scripts of transfer/, which start from
    trained weights, have no demo, and add --data, --init, --arch and --size themselves.
    """

    def __init__(self, doc, paper, demo=None):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.paper, self.demo = paper, demo or {}
        self.set_defaults(data=None, prepare=False, start=None)  # start: the Weights that --init names
        self.own = self.add_argument_group("the paper's" if demo else "of this script")
        add = self.add_argument_group("common to all" + (" five methods" if demo else "")).add_argument
        count = bounded(int, 1)
        if demo:
            add("--data", metavar="DIR",
                help="images, searched recursively; DIR/train if there (default: drawn shapes)")
            add("--init", metavar="FILE", help="weights to start from: last.pt, those that the authors of MoCo, DetCo "
                "or SoCo released, torchvision's ResNet, Detectron2's .pkl (default: random)")
            add("--arch", help="resnet18 34 50 101 152 200, with wX for X times the channels; resnext50_32x8d")
            add("--size", type=bounded(int, 32, 8192), help="side of a view in pixels; 32 is the network's stride")
            add("--knn", metavar="DIR", help="labeled train/, val/: kNN top-1 each epoch (default: no; demo: shapes)")
            add("--compile", action="store_true", help="torch.compile the model")
        add("--out", metavar="DIR", default=f"runs/{Path(sys.argv[0]).stem}",
            help="where checkpoint, log and picture go; resumed if it holds a run (default: %(default)s)")
        add("--epochs", type=count, help="passes over the data")
        add("--batch-size", type=bounded(int, 2), help="images a step, over all processes")
        add("--lr", type=bounded(float, 0, 1e3), help="learning rate at the paper's batch size; scaled linearly")
        add("--workers", type=bounded(int, 0, 256),
            help=f"loader processes of each process (default: {paper.get('workers', 16)}, or its cores if fewer; "
                 "0 without a GPU)")
        add("--seed", type=bounded(int, 0, 2 ** 63), default=0, help="of every random draw (default: 0)")
        add("--max-steps", type=count, help="stop early, with a checkpoint (default: no)")
        add("--save-every", type=count, default=1000, help="steps between checkpoints (default: 1000)")
        add("--print-every", type=count, help="steps between lines of the log")
        add("--max-pixels", type=bounded(int, 1), default=ImageFolder.max_pixels,
            help="an image with more counts as one that cannot be decoded (default: %(default)s)")
        add("--amp", choices=["bf16", "off"], help="mixed precision (default: bf16 on GPUs since Ampere)")
        add("--tensorboard", action="store_true", help="write TensorBoard scalars too")

    def format_help(self):
        for action in self._actions:
            if action.dest in self.paper and "(default" not in action.help:
                demo = f"; demo: {self.demo[action.dest]}" if action.dest in self.demo else ""
                action.help += f" (default: {self.paper[action.dest]}{demo})"
        return super().format_help()

    def error(self, message):
        fail(f"{message} (see --help)")

    def parse(self, variant=lambda args: {}):
        """The arguments. A default comes from variant(args), or from `demo` if no --data is given, or from `paper`.

        The `args` that `variant` gets have the other defaults already.
        """
        args = self.parse_args()
        for name, value in vars(args).items():
            if "" in (value if isinstance(value, list) else [value]):
                fail(f"--{name.replace('_', '-')} is empty")
        ImageFolder.max_pixels = args.max_pixels
        if args.workers is None:  # on a CPU the network needs the cores
            args.workers = min(self.paper.get("workers", 16), cores()) if torch.cuda.is_available() else 0
        if self.demo and args.init:
            args.start = weights_to_start_from(args)
        given = {name: value for name, value in vars(args).items() if value is not None}
        defaults = {**self.paper, **(self.demo if args.data is None else {})}
        defaults |= variant(argparse.Namespace(**{**vars(args), **defaults, **given}))
        vars(args).update({**defaults, **given})
        if args.amp is None:
            native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            args.amp = "bf16" if native else "off"
        if args.batch_size % world_size() and not args.prepare:
            fail(f"--batch-size {args.batch_size} does not divide over {world_size()} processes: "
                 f"take {math.ceil(args.batch_size / world_size()) * world_size()}")
        return args


def bounded(kind, low, high=1e9):
    """An argparse type: a number of type `kind`, int or float, from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:  # nan is in no range
            bounds = f"at least {low}" if kind(text) < low else f"from {low} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


def choose_bn_splits(args):
    """If args.bn_splits is not given, set it to 8 BN groups a process, or fewer in a small batch.

    Exits with 2 if the batch does not fall into equal groups.
    """
    if args.bn_splits is None:
        fits = lambda groups: args.batch_size % groups == 0 and args.batch_size >= 4 * groups
        args.bn_splits = next(filter(fits, (8, 4, 2)), 1)
    groups = args.bn_splits if world_size() == 1 else world_size()
    if args.batch_size % groups or args.batch_size < 2 * groups:
        fail(f"a batch of {args.batch_size} does not fall into {groups} BN groups of 2 images or more: "
             "change --batch-size or --bn-splits")


def warn_if_queue_is_long(args, source):
    """Print a note if the queue holds more keys than there are images."""
    if args.queue > len(source) and rank() == 0:
        print(f"note: the queue holds {args.queue} keys and the data {len(source)} images, so older keys of a query's "
              f"own image are among its negatives; --queue {max(1, len(source) // 2)} or less avoids that")


def cores():
    """The number of CPU cores for each process that torchrun started on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def open_data(args, single=True):
    """(images to train on, a pair of sources to monitor with or None): from folders, or drawn if no --data is given.

    single: whether the drawn pictures to train on show one object each, or several.
    """
    shapes = lambda count, seed, single=True: Shapes(count, 48, args.seed + seed, single).draw_all()
    if args.data is None:
        source, pair = shapes(8192, 0, single), (shapes(3072, 1), shapes(768, 2))
    else:
        source, pair = open_folder(args.data), None
    if len(source) < args.batch_size and not args.prepare:
        fail(f"{len(source)} images do not fill a batch of {args.batch_size}: take --batch-size {len(source)} or less")
    if args.knn:
        pair = tuple(ImageFolder(Path(args.knn, part)) for part in ("train", "val"))
        pair[1].labels(pair[0].labels()[1])  # wrong folders are an error now, not after an epoch
    return source, pair


def open_folder(data):
    """The ImageFolder DATA/train if there is one, else DATA."""
    train = Path(data, "train")
    return ImageFolder(train if data and train.is_dir() else data)
