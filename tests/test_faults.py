"""What a cluster, a disk and a folder do to a run. `attack.py` does it at random, and many times."""
import errno
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

import common
import moco
from conftest import assert_same_weights, fork, in_processes, rows, run_script, script, without_speed, write_pictures

TINY = ["--arch", "resnet18w0.25", "--size", "32", "--batch-size", "16", "--queue", "64", "--epochs", "30",
        "--print-every", "1"]


# --- Signals ---------------------------------------------------------------------------------------------------------

def test_a_run_that_is_asked_to_stop_saves_says_so_and_goes_on_as_if_nothing_had_been(pictures, tmp_path, monkeypatch):
    plan = lambda out, *more: ["--data", pictures, "--out", tmp_path / out, *TINY, *more]
    log = tmp_path / "stopped.txt"
    stopped = fork(log, script, "moco.py", *plan("stopped", "--workers", 2))
    while stopped.is_alive() and not (log.exists() and "step 3/90" in log.read_text()):
        time.sleep(0.005)
    os.killpg(stopped.pid, signal.SIGTERM)                                   # as a cluster: workers and all
    stopped.join()
    said, step = log.read_text(), rows(tmp_path / "stopped")[-1]["step"]
    assert stopped.exitcode == 128 + signal.SIGTERM and 3 <= step < 90
    assert said.splitlines()[-1] == (f"stopped by SIGTERM, saved after step {step} of 90: "
                                     "run the same command again to resume")
    assert "Traceback" not in said
    for out in ("stopped", "whole"):
        assert run_script(moco, monkeypatch, *plan(out, "--max-steps", step + 2)) == 0
    assert without_speed(rows(tmp_path / "stopped")) == without_speed(rows(tmp_path / "whole"))
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def stops(signaled):
    """The step at which a process stops when that one gets a signal in step 3."""
    stop = common.Stop()
    for step in range(1, 10):
        if step == 3 and common.rank() == signaled:
            stop.signal = 15
        if stop.agreed():
            return step


def test_all_processes_stop_at_the_same_step_when_one_is_asked_to():
    assert in_processes(3, stops, 1) == [3, 3, 3] and stops(0) == 3


@pytest.mark.parametrize("holding, later, ends", [(False, 1, [130]), (True, 1, []), (True, 5, [143])])
def test_a_second_signal_ends_a_run_at_once_unless_it_is_an_echo(monkeypatch, holding, later, ends):
    stop, clock, ended = common.Stop(), [100.0], []
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(common.os, "_exit", ended.append)
    stop.holding = holding
    stop.receive(signal.SIGINT, None)
    clock[0] += later
    stop.receive(signal.SIGTERM, None)
    assert ended == ends


def stop_without_a_reader():
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 2)
    common.stop.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_a_program_whose_messages_nobody_reads_ends_with_the_signals_code_too(tmp_path):
    process = fork(tmp_path / "said.txt", stop_without_a_reader)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM


def train_in(ours, terminal, *argv):
    """moco.py as a program that a terminal has started; `ours` is the terminal's other end, which its window holds."""
    os.close(ours)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in (1, 2):
        os.dup2(terminal, number)
    script("moco.py", *argv)


def test_a_run_whose_terminal_is_closed_saves(pictures, tmp_path):
    ours, terminal = pty.openpty()
    run = fork(tmp_path / "said.txt", train_in, ours, terminal, "--data", pictures, "--out", tmp_path, *TINY)
    os.close(terminal)
    said = b""
    while b"step 3/90" not in said:
        said += os.read(ours, 1000)
    os.close(ours)                                                            # the kernel sends SIGHUP
    run.join()
    step = rows(tmp_path)[-1]["step"]
    assert run.exitcode == 128 + signal.SIGHUP and 3 <= step < 90
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == step


class Dropping:
    """Gets a signal where Python drops exceptions."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def drop_and_go_on():
    common.stop.listen()
    Dropping()
    time.sleep(60)


def test_a_signal_whose_exit_python_drops_ends_the_program_all_the_same(tmp_path):
    process = fork(tmp_path / "said.txt", drop_and_go_on)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert (tmp_path / "said.txt").read_text() == "stopped by SIGTERM: run the same command again to resume\n"


# --- Restarts, and two runs in one folder ----------------------------------------------------------------------------

def meet(rank, port, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      TORCHELASTIC_USE_AGENT_STORE="True")
    common.init_distributed()
    results[rank] = common.all_gather(torch.tensor([rank])).tolist()
    common.finish()


def test_processes_meet_although_the_launchers_store_holds_what_the_dead_have_left():
    launcher = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for key in ("port", "default_pg/0//0//cpu//0", "default_pg/0//0//cpu//1"):
        launcher.set(key, "1")                                               # nobody listens there
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(meet, (launcher.port, results), nprocs=2, start_method="fork")
        assert dict(results) == {0: [0, 1], 1: [0, 1]}


def test_a_folder_has_one_run_at_a_time_and_is_free_when_that_is_killed(tmp_path, monkeypatch, capsys):
    hold = ("import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
            "print('held', flush=True); time.sleep(99)")
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    other.stdout.readline()
    monkeypatch.setattr(common.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as stop:
        common.lock(tmp_path)
    assert stop.value.code == 2 and "another run is at work" in capsys.readouterr().err
    other.kill()
    other.wait()
    common.lock(tmp_path)


def test_a_workers_end_is_that_of_its_run_even_when_that_is_killed():
    ours, theirs = os.pipe()
    run = os.fork()
    if run == 0:
        worker = os.fork() == 0
        signal.alarm(60)
        if worker:
            common.ignore_signals(0)
            os.write(theirs, b"at work")
        signal.pause()
    os.close(theirs)
    assert os.read(ours, 7) == b"at work"
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    assert select.select([ours], [], [], 20)[0] and os.read(ours, 1) == b""  # nobody holds the pipe's other end


# --- Disks -----------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's disk that is always full")
@pytest.mark.parametrize("write", [lambda file: file.write(bytes(10 ** 6)),
                                   lambda file: torch.save(torch.zeros(10 ** 6), file)])
def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path, write):
    path = tmp_path / "last.pt"
    path.write_text("old")
    Path(f"{path}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as full:
        with common.atomic_write(path) as file:
            write(file)
    assert full.value.errno == errno.ENOSPC and full.value.filename == str(path)
    assert os.listdir(tmp_path) == ["last.pt"] and path.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's disk that is always full")
def test_a_disk_that_is_full_when_the_log_is_written_is_named(tmp_path):
    Path(tmp_path, "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError) as full:
        common.Run.write(SimpleNamespace(out=tmp_path, step=1, steps_per_epoch=1), {"loss": 1.0})
    assert full.value.errno == errno.ENOSPC and full.value.filename == str(tmp_path / "log.jsonl")


@pytest.mark.parametrize("error, code, says", [
    (OSError(errno.ENOSPC, "No space left on device", "out/last.pt"), 1, "out/last.pt: No space left on device"),
    (OSError(errno.EMFILE, "Too many open files"), 1, "error: [Errno 24] Too many open files"),
    (MemoryError(), 2, "out of memory: lower --queue"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), 2, "out of memory: lower"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "out of memory: lower"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 1, "lower --workers")])
def test_what_the_machine_lacks_is_one_line(capsys, error, code, says):
    with pytest.raises(SystemExit) as stop:
        common.report_crash(type(error), error, None)
    err = capsys.readouterr().err
    assert stop.value.code == code and says in err and err.count("\n") == 1


def test_a_loss_that_is_no_number_ends_the_run(pictures, tmp_path, monkeypatch, capsys):
    honest = common.info_nce
    monkeypatch.setattr(common, "info_nce", lambda *x: honest(*x) * float("nan"))
    assert run_script(moco, monkeypatch, "--data", pictures, "--out", tmp_path / "run", *TINY) == 2
    assert "error: the loss is nan after step 1: lower --lr, or try --amp off" in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as stop:
        common.report_crash(ValueError, ValueError("a fault"), None)
    assert stop.value.code == 1 and "ValueError: a fault" in capsys.readouterr().err


def test_a_read_that_fails_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    source, failures = common.ImageFolder(write_pictures(tmp_path, 1)), [errno.EIO, errno.ESTALE, errno.ENOENT]
    read, slept = Path.read_bytes, []

    def moody(path):
        if failures:
            raise OSError(failures.pop(), "for a moment")
        return read(path)
    monkeypatch.setattr(Path, "read_bytes", moody)
    monkeypatch.setattr(common.time, "sleep", slept.append)
    assert source.image(0).decode().size == (40, 40) and slept == list(common.PAUSES)
    failures += [errno.EIO] * 4
    with pytest.raises(common.Unreadable):
        source.image(0)


@pytest.mark.parametrize("name, header", [
    ("a.png", b"P6 50000 50000 255\n"),
    ("a.bmp", b"BM" + bytes(8) + struct.pack("<IIIIHH", 54, 40, 50000, 50000, 1, 24) + bytes(24))])
def test_a_header_of_gigapixels_counts_as_undecodable_before_anything_is_decoded(tmp_path, monkeypatch, name, header):
    (tmp_path / name).write_bytes(header)
    source = common.ImageFolder(tmp_path)
    with pytest.raises(common.Unreadable, match="--max-pixels"):
        source.image(0)
    monkeypatch.setattr(common.ImageFolder, "max_pixels", 10 ** 10)
    assert source.image(0).size == (50000, 50000)                            # the limit alone stood in its way
