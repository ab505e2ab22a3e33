"""What a GPU will be asked to do, held on machines without one; where there is one, every script runs on it."""
import functools
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import common
import detcon
import fake_gpu
from conftest import GPUS, ROOT, rows, write_pictures

METHODS = ["moco", "detco", "dupr", "soco", "detcon_s", "detcon_b"]
SMALL = {**dict.fromkeys(("moco", "detco", "dupr"), dict(queue=64, dim=16)),
         **dict.fromkeys(("soco", "detcon_s", "detcon_b"), dict(hidden=24, dim=16))}


def in_a_child(test):
    """Run a test in a forked process: autograd's threads of a device, once started, keep this one from forking."""
    @functools.wraps(test)
    def run(**arguments):
        child = multiprocessing.get_context("fork").Process(target=test, kwargs=arguments)
        child.start()
        child.join()
        assert child.exitcode == 0
    return run


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("name", METHODS)
@in_a_child
def test_a_step_never_makes_the_host_wait_for_the_gpu(name, world):
    ledger = fake_gpu.counted(name, world, **SMALL[name])
    assert not ledger.waits and ledger.launches > 500
    assert ledger.loss.device.type == "cuda" and ledger.loss.dtype == torch.float32


WAITS = {"item": lambda x: x.sum().item(), "truth": lambda x: bool((x > 0).any()), "mask": lambda x: x[x > 0],
         "write": lambda x: x.index_put_((x > 0,), x.sum()), "nonzero": lambda x: (x > 0).nonzero(),
         "cpu": lambda x: x.cpu(),
         "tensor": lambda x: x + torch.tensor([1.0, 2.0], device=x.device), "list": lambda x: x[[1, 0]],
         "tolist": lambda x: x.tolist(), "select": lambda x: torch.masked_select(x, x > 0)}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_noticed_wherever_it_is(name):
    with fake_gpu.pretended() as ledger:
        x = torch.ones(2, device="cuda")
        assert not ledger.waits
        WAITS[name](x)
    assert len(ledger.waits) == 1


@in_a_child
def test_a_wait_in_backward_is_noticed():
    with fake_gpu.pretended() as ledger:
        y = torch.ones(2, device="cuda").requires_grad_().sin()
        y.register_hook(lambda gradient: gradient * gradient.sum().item())
        assert not ledger.waits
        y.sum().backward()
    assert len(ledger.waits) == 1


def test_the_ledger_counts_launches_bytes_and_memory():
    with fake_gpu.pretended() as ledger:
        x = torch.ones(1000, 1000, device="cuda", dtype=torch.bfloat16)       # writes 2 MB
        y = x.view(-1)                                                        # looks at it
        y = y.float()                                                         # reads 2, writes 4
        y += 1                                                                # reads 4, writes 4
    assert ledger.launches == 3
    assert ledger.bytes == 2e6 + 6e6 + 8e6


@pytest.mark.parametrize("world", [1, 8])
def test_batch_norm_keeps_its_bf16_input_for_backward_and_nothing_else_of_that_size(world):
    kept = []
    with fake_gpu.pretended(world):
        norm = fake_gpu.move(common.SyncBatchNorm(16))
        x = torch.zeros(32, 16, 64, 64, dtype=torch.bfloat16, device="cuda").requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
            y = norm(x)
        assert y.dtype == torch.bfloat16
    assert sum(y.numel() * y.itemsize for y in kept) < 1.01 * x.numel() * 2


def test_only_the_log_waits_and_once():
    run = object.__new__(common.Run)
    run.args, run.loader = SimpleNamespace(batch_size=8), SimpleNamespace(waited=0.0)
    run.step, run.mark = 1, (0.0, 0, 0.0)
    with fake_gpu.pretended() as ledger, mock.patch.object(common.Run, "write", lambda self, row: row):
        loss = torch.zeros((), device="cuda")
        run.log(loss, {"accuracy": loss, "positive": loss}, lr=0.1)
    assert [name for name, _ in ledger.waits] == ["tolist"]


@pytest.mark.parametrize("name", METHODS)
@in_a_child
def test_compiled_a_model_is_one_graph_and_gives_the_same_loss(name):
    model, _ = fake_gpu.build(name, "resnet18w0.25", 64, splits=2, **SMALL[name])
    batch = {key: torch.zeros(4, *shape, dtype=kind) for key, (shape, kind) in fake_gpu.shapes(name, 64).items()}
    for key, x in batch.items():
        if x.dtype == torch.uint8:
            x.random_(256)
        if "box" in key:
            x[..., 2:] = 30.0
        if "mask" in key or key == "overlap":
            x.fill_(1)
    losses = []
    for compiled in (False, True):
        if compiled:
            model.compile(backend="eager", fullgraph=True)
        common.seed_everything(0)
        loss, _ = model(batch)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("family, solarize_p", [(common.Photometric, 0.0), (detcon.Colors, 0.5)])
@in_a_child
def test_colors_compile_as_one_graph_and_stay_the_same(family, solarize_p):
    colors = family(0.4, 0.4, 0.4, 0.1, jitter_p=0.8, grayscale_p=0.2, blur_p=0.5, solarize_p=solarize_p)
    x, draw = torch.rand(6, 3, 32, 32), colors.draw(6)
    compiled = torch.compile(colors.apply_draw, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, draw), colors.apply_draw(x, draw), atol=2e-6, rtol=0)


@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no GPU")
@pytest.mark.parametrize("name", ["moco", "detco", "dupr", "soco", "detcon"])
def test_each_script_trains_on_a_gpu(name, tmp_path):
    environment = {key: x for key, x in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    environment |= {"CUDA_VISIBLE_DEVICES": GPUS} if GPUS else {}
    write_pictures(tmp_path / "data", 48)
    flags = ["--data", tmp_path / "data", "--out", tmp_path / "out", "--arch", "resnet18w0.25", "--size", "64",
             "--batch-size", "16", "--epochs", "2", "--print-every", "1", "--workers", "2"]
    flags += {"soco": ["--proposals", "random"], "detcon": ["--masks", "grid5"]}.get(name, ["--queue", "64"])
    subprocess.run([sys.executable, ROOT / f"{name}.py", *flags], env=environment, check=True)
    log = rows(tmp_path / "out")
    assert len(log) == 6 and all(np.isfinite(row["loss"]) for row in log)
