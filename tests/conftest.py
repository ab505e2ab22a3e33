"""What the tests share: the modules on the path, processes that talk over gloo, a folder of pictures."""
import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402


def _member(rank, world, port, function, args, results):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    common.init_distributed()
    results[rank] = function(*args)
    common.dist.destroy_process_group()


def in_processes(world, function, *args):
    """[what function(*args) returns in process 0, 1, ...], joined by gloo; plain values and numpy arrays."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_member, (world, port, function, args, results), nprocs=world)
        return [results[rank] for rank in range(world)]


def write_pictures(folder, count, size=40, seed=0):
    """`count` drawn shapes as PNG in folders named by class."""
    shapes = common.Shapes(count, size, seed, single=True)
    names = list(common.KINDS)
    for i in range(count):
        path = Path(folder, names[i % len(names)], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shapes.scene(i)[0]).save(path)
    return Path(folder)


def run_script(module, monkeypatch, *argv):
    """module.main() as the command line runs it; gives the exit code."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    try:
        module.main()
    except SystemExit as stop:
        return stop.code
    return 0


def rows(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def weights(out):
    return torch.load(Path(out, "last.pt"), weights_only=True)["model"]


def without_speed(rows):
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "data_wait")} for row in rows]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root / "train", 96)
    write_pictures(root / "val", 36, seed=1)
    return root


@pytest.fixture
def photograph():
    """A smooth 600 x 400 picture with something to see in every corner."""
    y, x = np.mgrid[0:400, 0:600]
    channels = [128 + 100 * np.sin(x / 40 + k) * np.cos(y / 55 - k) for k in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
