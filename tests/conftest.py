"""What the tests share: the modules on the path, processes that are forked (so that none imports torch again), and
folders of pictures.
"""
import atexit
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"            # as in the processes of `fork`, whose results are compared bit for bit

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # for the one test that asks for them
os.environ["CUDA_VISIBLE_DEVICES"] = ""        # all others are of the CPU, on a machine with GPUs too, in every process

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402


STOPPING = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP  # what a run that is asked to stop listens to


def _member(rank, world, port, function, args, results):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    common.init_distributed()
    results[rank] = function(*args)
    common.finish()


def in_processes(world, function, *args):
    """[what function(*args) returns in process 0, 1, ...], joined by gloo; plain values and numpy arrays."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.get_context("fork").Manager() as manager:
        results = manager.dict()
        mp.start_processes(_member, (world, port, function, args, results), nprocs=world, start_method="fork")
        return [results[rank] for rank in range(world)]


def exit_code(module, *argv):
    """module.main() as the command line runs it, to its end; leaves sys.argv changed."""
    sys.argv = [f"{module.__name__}.py", *map(str, argv)]
    try:
        module.main()
    except SystemExit as stop:
        return stop.code
    return 0


def in_two_processes(module, *argv):
    """The exit codes of module.main() in two processes that find each other as torchrun's do."""
    return in_processes(2, exit_code, module, *argv)


def status_of(function, *args):
    """The exit code of a program that is function(*args); an exception goes to sys.excepthook, as Python's end does."""
    try:
        function(*args)
    except SystemExit as stop:
        return stop.code or 0
    except BaseException as error:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as stop:
            return stop.code
        return 1
    return 0


def _child(log, function, args):
    os.setsid()
    atexit._clear()
    for number in (*STOPPING, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    torch.set_num_threads(1)
    code = status_of(function, *args)
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def fork(log, function, *args):
    """Start function(*args) as a program of its own, in a process group of its own, its output in the file `log` -> the
    process. It ends with the exit code that a new Python would give; its signals are those of a new Python.
    """
    process = mp.get_context("fork").Process(target=_child, args=(log, function, args))
    process.start()
    return process


def script(name, *argv):
    """Run a script of the repository as the command line does: for `fork`."""
    sys.argv = [name, *map(str, argv)]
    runpy.run_path(str(ROOT / name), run_name="__main__")


def write_pictures(folder, count, size=40, seed=0):
    """`count` drawn shapes as PNG in folders named by class."""
    shapes = common.Shapes(count, size, seed, single=True)
    names = list(common.SHAPE_CLASSES)
    for i in range(count):
        path = Path(folder, names[i % len(names)], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shapes.scene(i)[0]).save(path)
    return Path(folder)


def runs(mask):
    """COCO's run lengths of a mask [H, W] bool: of outside, inside, outside, ..., column by column."""
    flat = np.concatenate([[False], mask.flatten(order="F")])
    return np.diff(np.concatenate([np.flatnonzero(np.diff(flat)), [len(flat) - 1]]), prepend=0).tolist()


def write_scenes(folder, count, size=64, seed=0):
    """Drawn scenes as PNG with COCO annotations: category ids 10, 20, ...; a box's upper corners as keypoints."""
    shapes, names = common.Shapes(count, size, seed), list(common.SHAPE_CLASSES)
    folder = Path(folder)
    (folder / "images").mkdir(parents=True)
    dataset = {"images": [], "annotations": [], "categories": [
        {"id": 10 * (k + 1), "name": name, "keypoints": ["left_top", "right_top"]} for k, name in enumerate(names)]}
    for i in range(count):
        image, boxes, masks, classes = shapes.scene(i)
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        dataset["images"].append({"id": 100 + i, "file_name": f"{i}.png", "width": size, "height": size})
        for (x1, y1, x2, y2), mask, k in zip(boxes.tolist(), masks, classes.tolist()):
            dataset["annotations"].append({
                "id": len(dataset["annotations"]) + 1, "image_id": 100 + i, "category_id": 10 * (k + 1), "iscrowd": 0,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(mask.sum()), "num_keypoints": 2,
                "segmentation": {"size": [size, size], "counts": runs(mask)}, "keypoints": [x1, y1, 2, x2 - 1, y1, 2]})
    (folder / "annotations.json").write_text(json.dumps(dataset))
    return folder


def write_checkpoint(path, method, model, arch):
    """A last.pt with drawn BN statistics, as if `model` had been trained."""
    for name, x in model.state_dict().items():
        if name.endswith("running_mean"):
            x.copy_(0.1 * torch.randn(len(x)))
        if name.endswith("running_var"):
            x.copy_(0.5 + torch.rand(len(x)))
    torch.save(dict(model=model.state_dict(), optimizer={}, epoch=0, step=0, method=method, settings={"arch": arch},
                    generators={}), path)
    return path


def run_script(module, monkeypatch, *argv):
    """module.main() as the command line runs it, in this process, whose signals stay pytest's -> the exit code."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    try:
        return exit_code(module, *argv)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def rows(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def weights(out):
    return torch.load(Path(out, "last.pt"), weights_only=True)["model"]


def assert_same_weights(out, other):
    """The last checkpoints of two runs hold the same numbers, bit for bit."""
    ours, theirs = weights(out), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def without_speed(rows):
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "data_wait")} for row in rows]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root / "train", 48)
    write_pictures(root / "val", 24, seed=1)
    return root


@pytest.fixture
def photograph():
    """A smooth 600 x 400 picture with something to see in every corner."""
    y, x = np.mgrid[0:400, 0:600]
    channels = [128 + 100 * np.sin(x / 40 + k) * np.cos(y / 55 - k) for k in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.fixture(autouse=True)
def unlocked():
    """A test's runs have ended with it: their locks, one open file each, do not add up in this process."""
    yield
    while common.LOCKED:
        common.LOCKED.pop().close()
