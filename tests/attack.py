"""What a cluster, a folder or a hand at the keyboard does to a run, many times over, and how it ended. Not for pytest.

    python tests/attack.py                            everything, with the counts of `COUNTS`
    python tests/attack.py kills signals --count 10   SIGKILL, or a signal, at random moments of a run of a method or
                                                      detect.py, which is started again until it has ended
    python tests/attack.py restarts                   SIGKILL of a process under torchrun's agent, one node or two
    python tests/attack.py files                      damaged image files
    python tests/attack.py commands                   wrong command lines

A run is good when it ends with exit code 0 and the weights and log of one that nobody disturbed, without a traceback
and with no temporary file left. Prints what was not good, and a table. Every run is a fork of this process, which has
torch at hand.
"""
import argparse
import atexit
import io
import os
import random
import re
import runpy
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
import torchvision.models.detection  # noqa: F401  what the runs will import
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from conftest import ROOT, rows, weights, without_speed, write_pictures, write_scenes
import common

COUNTS = {"kills": 50, "signals": 20, "restarts": 20, "files": 1000, "commands": 300}
SMALL = ["--arch", "resnet18w0.25", "--epochs", "2", "--save-every", "2", "--print-every", "1"]
TINY = [*SMALL, "--data", "pictures", "--size", "32", "--batch-size", "16"]
RUNS = {"moco.py": [*TINY, "--queue", "64", "--knn", "pictures"], "detco.py": [*TINY, "--queue", "64"],
        "dupr.py": [*TINY, "--queue", "64"], "soco.py": TINY, "detcon.py": TINY,
        "transfer/detect.py": [*SMALL, "--init", "random", "--train", "scenes/images", "scenes/annotations.json",
                               "--size", "64", "64", "--rois", "16", "--batch-size", "4"]}


def script(name, argv):
    """Run a script of the repository as the command line does, to the end of this process."""
    sys.argv = [name, *argv]
    code = 0
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
            code = 1
        except SystemExit as stop:
            code = stop.code
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def fork(log, function, *args):
    """Start function(*args) in a process group of its own, its output in the file `log` -> its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    try:
        function(*args)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def end(pid, timeout=900):
    """Wait for a process -> its exit code, minus the signal that killed it, or "hung"."""
    late = time.monotonic() + timeout
    while time.monotonic() < late:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def result(out):
    return weights(out), without_speed(rows(out))


def verdict(out, log, code, reference):
    """What is wrong with a run that has ended, or "good"."""
    if code != 0:
        return f"exit code {code}"
    if "Traceback" in Path(log).read_text():
        return "a traceback"
    if left := [path.name for path in Path(out).rglob("*.tmp")]:
        return f"left {left}"
    (theirs, their_rows), (ours, our_rows) = reference, result(out)
    if not all(torch.equal(theirs[name], ours[name]) for name in theirs):
        return "other weights"
    return "good" if their_rows == our_rows else "another log"


def references():
    """{script: (what it gives undisturbed, how long it takes)}."""
    found = {}
    for name, argv in RUNS.items():
        start, out = time.monotonic(), f"reference-{Path(name).stem}"
        code = end(fork(f"{out}.log", script, name, [*argv, "--out", out, "--workers", "0"]))
        if code != 0:
            sys.exit(f"{name} does not run: see {Path(out).resolve()}.log")
        found[name] = result(out), time.monotonic() - start
    return found


def disturbed(count, rng, numbers):
    """Runs that get one of the signals `numbers` at random moments, the main process alone or its whole group."""
    found = references()
    for k in range(count):
        name = list(RUNS)[k % len(RUNS)]
        reference, took = found[name]
        out, codes = f"run-{k}", []
        argv = [*RUNS[name], "--out", out, "--workers", rng.choice(["0", "2"])]
        for _ in range(rng.randint(1, 3)):
            pid, number = fork(f"{out}.log", script, name, argv), rng.choice(numbers)
            time.sleep(rng.uniform(0.3, took))
            (os.kill if number == signal.SIGKILL and rng.random() < 0.5 else os.killpg)(pid, number)
            codes.append(end(pid))
            if codes[-1] not in (0, -number, 128 + number):
                break
        else:
            codes.append(end(fork(f"{out}.log", script, name, argv)))
        yield f"{name} {codes}", verdict(out, f"{out}.log", codes[-1], reference)


def kills(count, rng):
    yield from disturbed(count, rng, [signal.SIGKILL])


def signals(count, rng):
    yield from disturbed(count, rng, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])


def agent(port, nodes, argv):
    """What torchrun does on one of the nodes."""
    config = LaunchConfig(min_nodes=nodes, max_nodes=nodes, nproc_per_node=2 // nodes, run_id="attack", max_restarts=3,
                          rdzv_backend="c10d", rdzv_endpoint=f"localhost:{port}", start_method="fork",
                          monitor_interval=0.1)
    sys.argv = ["moco.py", *argv]
    elastic_launch(config, runpy.run_path)(str(ROOT / "moco.py"), None, "__main__")
    os._exit(0)


def torchrun(out, nodes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [*RUNS["moco.py"], "--out", out, "--workers", "0"]
    return [fork(f"{out}-{node}.log", agent, port, nodes, argv) for node in range(nodes)]


def restarts(count, rng):
    start = time.monotonic()
    if any([end(pid) for pid in torchrun("reference", 1)]):
        sys.exit(f"two processes do not run: see {Path('reference-0.log').resolve()}")
    took, reference = time.monotonic() - start, result("reference")
    for k in range(count):
        nodes, out = 1 + k % 2, f"run-{k}"
        agents = torchrun(out, nodes)
        time.sleep(rng.uniform(0.3, took))
        victims = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and parent(pid) in agents]
        if victims:
            os.kill(rng.choice(victims), signal.SIGKILL)
        codes = [end(pid) for pid in agents]
        what = verdict(out, f"{out}-0.log", max(codes, key=lambda code: code != 0), reference)
        yield f"{nodes} nodes {codes}", "good" if what == "a traceback" else what  # the agent's, of the one it lost


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


def files(count, rng):
    image, sound = Image.fromarray(common.Shapes(1, 96, 0).scene(0)[0]), []
    for suffix, mode in [(".jpg", "RGB"), (".jpg", "CMYK"), (".png", "RGB"), (".png", "P"), (".png", "I;16"),
                         (".webp", "RGB"), (".bmp", "RGB"), (".tif", "RGB"), (".tif", "L")]:
        file = io.BytesIO()
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(file, Image.registered_extensions()[suffix])
        sound.append((suffix, file.getvalue()))
    sound.append((".png", b"P6 40000 40000 255\n" + bytes(100)))  # Pillow reads it as what it is
    folder = Path("files")
    folder.mkdir()
    for k in range(count):
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


def commands(count, rng):
    flags = {}
    for name in RUNS:
        end(fork(f"{Path(name).stem}.help", script, name, ["--help"]))
        flags[name] = sorted(set(re.findall(r"--[a-z][a-z-]+", Path(f"{Path(name).stem}.help").read_text())))
    wrong = ["", "-1", "0", "nan", "inf", "1e400", "x", "99999999999999", "/nowhere", "resnet18w99999", "é", "1 2"]
    for k in range(count):
        name = rng.choice(list(RUNS))
        flag, value, log = rng.choice(flags[name]), rng.choice(wrong), f"command-{k}.log"
        argv = [*RUNS[name], "--max-steps", "1", "--out", f"out-{k}", "--workers", "0", flag, value]
        code = end(fork(log, script, name, argv))
        said = Path(log).read_text()
        one_line = len([line for line in said.splitlines() if "error:" in line]) == 1
        good = code == 0 or code == 2 and one_line
        good = good and "Traceback" not in said
        yield f"{name} {flag} {value!r}: {said[-300:]}", "good" if good else f"exit code {code}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=", ".join(COUNTS))
    parser.add_argument("--count", type=int, help="how often (default: the usual)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for what in args.what or COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            write_pictures(Path("pictures", "train"), 96)
            write_pictures(Path("pictures", "val"), 24, seed=1)
            write_scenes("scenes", 24)
            start, ends = time.monotonic(), Counter()
            for case, how in globals()[what](args.count or COUNTS[what], random.Random(args.seed)):
                ends[how] += 1
                if how != "good":
                    print(f"{what}: {case}: {how}", flush=True)
            table.append(f"{what:10} {sum(ends.values()):5} {ends['good']:5} good {time.monotonic() - start:6.0f} s")
            os.chdir("/")
    print("\n".join(table))


if __name__ == "__main__":
    main()
