"""What a cluster, a folder or a hand at the keyboard does to a run, many times over, and how it ended. Not for pytest.

    python tests/attack.py                                  everything, as often as `COUNTS` says: an hour on one core
    python tests/attack.py kills --first 20 --count 10      trials 20 to 29 of one part

    kills, signals    SIGKILL, or a signal, at random moments of a run of a method or of detect.py, one to three times;
                      then the same command once more
    restarts          SIGKILL of a random process of a run under torchrun --max-restarts, on one node or on two
    files             damaged image files
    commands          wrong command lines of every script

A run is good when it ends with exit code 0 and with the weights and the log of a run that nobody disturbed, without a
traceback, and leaves no temporary file. A wrong command line is good when one line on stderr refuses it and the exit
code is 2. Prints what was not good, and a table. Every process is a fork of this one, which has imported torch, except
that every fifth restart is one of torchrun's own processes. Trial k of a seed is always the same one, up to the moment
at which a signal comes.
"""
import argparse
import io
import os
import random
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess as Process
from pathlib import Path

import torch
import torchvision.models.detection  # noqa: F401  what the runs will import
from PIL import Image
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from conftest import ROOT, fork, rows, script, status_of, weights, without_speed, write_pictures, write_scenes
import common

COUNTS = {"kills": 50, "signals": 20, "restarts": 20, "files": 1000, "commands": 300}
SMALL = ["--arch", "resnet18w0.25", "--epochs", "2", "--save-every", "1", "--print-every", "1"]
TINY = [*SMALL, "--data", "pictures", "--size", "32", "--batch-size", "16"]
RUNS = {"moco.py": [*TINY, "--queue", "64", "--knn", "pictures"], "detco.py": [*TINY, "--queue", "64"],
        "dupr.py": [*TINY, "--queue", "64"], "soco.py": [*TINY, "--hidden", "64"], "detcon.py": TINY,
        "transfer/detect.py": [*SMALL, "--init", "random", "--train", "scenes/images", "scenes/annotations.json",
                               "--size", "64", "64", "--rois", "16", "--batch-size", "4"]}


def end(process, timeout=900):
    """Wait for a process -> its exit code, minus the signal that killed it, or "hung"."""
    process.join(timeout)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return "hung"
    return process.exitcode


def result(out):
    return weights(out), without_speed(rows(out))


def verdict(out, logs, code, reference):
    """What is wrong with a run that has ended, or "good". logs: what its processes have printed."""
    if code != 0:
        return f"exit code {code}"
    if any("Traceback" in Path(log).read_text() for log in logs):
        return "a traceback"
    if left := [path.name for path in Path(out).rglob("*.tmp")]:
        return f"left {left}"
    (theirs, their_rows), (ours, our_rows) = reference, result(out)
    if theirs.keys() != ours.keys() or not all(torch.equal(theirs[name], ours[name]) for name in theirs):
        return "other weights"
    return "good" if their_rows == our_rows else "another log"


def references(start):
    """{script: (what it gives undisturbed, how long that takes)}. start(script, argv, out) -> (exit code, logs)."""
    found = {}
    for name, argv in RUNS.items():
        begin, out = time.monotonic(), f"reference-{Path(name).stem}"
        code, logs = start(name, [*argv, "--out", out, "--workers", "0"], out)
        if code != 0:
            sys.exit(f"{name} does not run:\n" + "\n".join(Path(log).read_text() for log in logs))
        found[name] = result(out), time.monotonic() - begin
    return found


def alone(name, argv, out):
    return end(fork(f"{out}.log", script, name, *argv)), [f"{out}.log"]


def disturb(trials, numbers):
    """Runs that get one of the signals `numbers` at random moments, the main process alone or its whole group."""
    found = references(alone)
    for k, rng in trials:
        name = list(RUNS)[k % len(RUNS)]
        reference, took = found[name]
        out, codes = f"run-{k}", []
        argv = [*RUNS[name], "--out", out, "--workers", rng.choice(["0", "2"])]
        for _ in range(rng.randint(1, 3)):
            process, number = fork(f"{out}.log", script, name, *argv), rng.choice(numbers)
            time.sleep(rng.uniform(0.2, took))
            if process.is_alive():
                (os.kill if number == signal.SIGKILL and rng.random() < 0.5 else os.killpg)(process.pid, number)
            codes.append(end(process))
            if codes[-1] not in (0, -number, 128 + number):
                break
        else:
            codes.append(alone(name, argv, out)[0])
        yield f"{name} {codes}, {Path(out).resolve()}", verdict(out, [f"{out}.log"], codes[-1], reference)


def kills(trials):
    yield from disturb(trials, [signal.SIGKILL])


def signals(trials):
    yield from disturb(trials, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])


def worker(name, *argv):
    """One of the processes that a launcher starts, as a fork: what `script` is to a command line."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # not the launcher's
    code = status_of(script, name, *argv)
    if code:
        os._exit(code)


def launcher(port, nodes, folder, name, *argv):
    """What torchrun does, with workers that are forks."""
    logs = DefaultLogsSpecs(log_dir=folder, redirects=Std.ALL)
    config = LaunchConfig(nodes, nodes, 2 // nodes, logs, "attack", rdzv_backend="c10d", max_restarts=3,
                          rdzv_endpoint=f"localhost:{port}", start_method="fork", monitor_interval=0.2)
    elastic_launch(config, worker)(name, *argv)


def torchrun(name, argv, out, nodes=1, forks=True):
    """Two processes on as many nodes, each with its launcher -> (launchers, their folders of logs).

    forks: torchrun's agent starts forks that have imported torch; else torchrun itself starts Python.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}", "--max-restarts=3", "--rdzv-backend=c10d",
             f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=attack", "--monitor-interval=0.2", "--redirects=3"]
    launchers, folders = [], [f"{out}-node-{node}" for node in range(nodes)]
    for folder in folders:
        Path(folder).mkdir()
        if forks:
            started = fork(f"{folder}.txt", launcher, port, nodes, folder, name, *argv)
        else:
            started = fork(f"{folder}.txt", run.main, [*flags, f"--log-dir={folder}", str(ROOT / name), *argv])
        launchers.append(started)
    return launchers, folders


def workers_logs(folders):
    """What the processes have printed, without their launchers, whose tracebacks of the dead are torchrun's own."""
    return [path for folder in folders for path in Path(folder).rglob("*.log")]


def together(name, argv, out):
    (launched,), folders = torchrun(name, argv, out)
    return end(launched), workers_logs(folders)


def restarts(trials):
    found = references(together)
    for k, rng in trials:
        name, nodes, out, forks = list(RUNS)[k % len(RUNS)], 1 + k // len(RUNS) % 2, f"run-{k}", k % 5 > 0
        reference, took = found[name]
        launchers, folders = torchrun(name, [*RUNS[name], "--out", out, "--workers", "0"], out, nodes, forks)
        moment, victims = time.monotonic() + rng.uniform(0.2, took if forks else 3 * took), []
        while any(map(Process.is_alive, launchers)) and (time.monotonic() < moment or not victims):
            time.sleep(0.05)
            pids = [launched.pid for launched in launchers]
            victims = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and parent(pid) in pids]
        if victims:
            os.kill(rng.choice(victims), signal.SIGKILL)
        codes = [end(launched, timeout=600) for launched in launchers]
        how = verdict(out, workers_logs(folders), next(filter(None, codes), 0), reference)
        yield f"{name} on {nodes} nodes, {'forks' if forks else 'Python'} {codes}, {Path(out).resolve()}", how


def parent(pid):
    try:
        return int(Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def damage(data, rng):
    """Bytes of an image file, no longer as they were."""
    data, kind = bytearray(data), rng.randrange(5)
    if kind == 0:
        return data[:rng.randrange(len(data))]
    if kind == 1:
        start = rng.randrange(len(data))
        data[start:start + rng.randrange(1, 400)] = bytes(rng.randrange(1, 400))
        return data
    if kind == 2:  # a size, or anything else in the header, beyond reason
        start = rng.randrange(min(64, len(data) - 4))
        side = rng.choice([0, 10 ** 5, 2 ** 16, 2 ** 31 - 1, 2 ** 32 - 1])
        data[start:start + 4] = struct.pack(rng.choice("<>") + "I", side)
        return data
    for _ in range(1 if kind == 3 else 50):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return data


def files(trials):
    image, sound = Image.fromarray(common.Shapes(1, 96, 0).scene(0)[0]), []
    for suffix, mode in [(".jpg", "RGB"), (".jpg", "CMYK"), (".png", "RGB"), (".png", "P"), (".png", "I;16"),
                         (".webp", "RGB"), (".bmp", "RGB"), (".tif", "RGB"), (".tif", "L")]:
        file = io.BytesIO()
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(file, Image.registered_extensions()[suffix])
        sound.append((suffix, file.getvalue()))
    sound.append((".png", b"P6 40000 40000 255\n" + bytes(100)))  # Pillow reads it as what it is
    folder = Path("files")
    folder.mkdir()
    for k, rng in trials:
        suffix, data = rng.choice(sound)
        (folder / f"{k}{suffix}").write_bytes(damage(data, rng))
    source = common.ImageFolder(folder)
    for k in range(len(source)):
        try:
            view = source.image(k).crop([(0, 0, 8, 8)], [32])[0]
            yield source.name(k), "good" if view.mode == "RGB" and view.size == (32, 32) else f"{view.mode} {view.size}"
        except common.Unreadable:
            yield source.name(k), "good"
        except Exception as error:
            yield source.name(k), repr(error)


WRONG = ["", "-1", "0", "nan", "inf", "1e400", "x", "99999999999999", "/nowhere", "resnet18w99999", "\u00e9", "1 2",
         ".", "garbage", "garbage/x", "empty", "pictures", "scenes/annotations.json", "reference-moco/last.pt", "--",
         "random"]


def right_commands():
    """[(script, arguments)] that are right, and soon done, on data that is written here."""
    for part in ("train", "val"):
        write_scenes(Path("maps", part), 8)
        maps = [f"maps/{part}/{name}" for name in ("annotations.json", "images", "labels")]
        end(fork("maps.log", script, "transfer/coco_masks.py", "--labels", *maps))
    Path("garbage").write_bytes(random.Random(0).randbytes(5000))
    Path("empty").mkdir()
    scenes = ["scenes/images", "scenes/annotations.json"]
    last, few = "reference-moco/last.pt", ["--workers", "0", "--max-steps", "1"]
    if alone("moco.py", [*RUNS["moco.py"], *few, "--out", "reference-moco"], "reference-moco")[0] != 0:
        sys.exit(Path("reference-moco.log").read_text())
    tiny = ["--init", last, "--size", "32", "--batch-size", "16", *few]
    look = ["--init", last, "random", "--data", "pictures", "--images", "2"]
    return [*((name, [*argv, *few]) for name, argv in RUNS.items()),
            *(("transfer/classify.py", ["--protocol", protocol, "--data", "pictures", *tiny])
              for protocol in ("linear", "knn", "svm")),
            ("transfer/classify.py", ["--protocol", "objects", "--train", *scenes, "--val", *scenes, *tiny]),
            ("transfer/segment.py", ["--data", "maps", "--classes", "13", *tiny, "--batch-size", "4"]),
            ("transfer/convert.py", [last, "converted.pkl"]),
            ("transfer/coco_masks.py", [*scenes[::-1], "masks"]),
            ("transfer/look.py", ["attention", *look]), ("transfer/look.py", ["iou", *look]),
            ("transfer/look.py", ["proposals", *look[3:], "--proposals", "random"])]


def commands(trials):
    right = [(name, argv, flags(name, argv)) for name, argv in right_commands()]
    for k, rng in trials:
        code = 0
        while code == 0:  # what runs was not wrong
            name, argv, known = rng.choice(right)
            argv, kind = list(argv), rng.random()
            if kind < 0.7:
                argv += [rng.choice(known), rng.choice(WRONG)]
            elif kind < 0.8:
                argv += [rng.choice([rng.choice(known) + "s", "-" + rng.choice(known), rng.choice(known)])]
            else:
                place = rng.choice([place for place, word in enumerate(argv) if not word.startswith("--")])
                argv[place] = rng.choice(WRONG)
            log = Path(f"command-{k}.log")
            log.unlink(missing_ok=True)
            code = end(fork(log, script, name, *argv), timeout=120)
        said = log.read_text()
        lines = [line for line in said.splitlines() if "error:" in line]
        good = code == 2 and len(lines) == 1 and "Traceback" not in said
        yield f"{name} {argv}: {said[-300:]}", "good" if good else f"exit code {code}"


def flags(name, argv):
    """All flags of a script, by its --help."""
    end(fork("help.log", script, name, *argv, "--help"))
    said = Path("help.log").read_text()
    Path("help.log").unlink()
    return sorted(set(re.findall(r"--[a-z][a-z-]+", said)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=", ".join(COUNTS))
    parser.add_argument("--first", type=int, default=0, help="the trial to begin with (default: 0)")
    parser.add_argument("--count", type=int, help="how many trials (default: the usual)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for what in args.what or COUNTS:
        folder = tempfile.mkdtemp(prefix="attack-")  # no TemporaryDirectory: a fork that ends would remove it
        os.chdir(folder)
        write_pictures(Path("pictures", "train"), 48)
        write_pictures(Path("pictures", "val"), 12, seed=1)
        write_scenes("scenes", 12)
        start, ends = time.monotonic(), Counter()
        count = args.count or COUNTS[what] - args.first
        trials = ((k, random.Random(f"{what} {args.seed} {k}")) for k in range(args.first, args.first + count))
        for case, how in globals()[what](trials):
            ends[how] += 1
            if how != "good":
                print(f"{what}: {case}: {how}", flush=True)
            elif ends.total() % 10 == 0:
                print(f"{what}: {ends.total()} of {count}", flush=True)
        table.append(f"{what:10} {ends.total():5} {ends['good']:5} good {time.monotonic() - start:6.0f} s")
        os.chdir("/")
        if ends.total() == ends["good"]:
            shutil.rmtree(folder)
    print("\n".join(table))


if __name__ == "__main__":
    main()
