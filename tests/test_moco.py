"""MoCo: the model against slow formulas, and the script as a user runs it."""
import math
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
import moco
from conftest import (ROOT, assert_same_weights, fork, in_processes, in_two_processes, rows, run_script, script,
                      weights, without_speed)

run = partial(run_script, moco)
TINY = dict(arch="resnet18w0.25", dim=16, queue=40, temperature=0.2)


def tiny(mechanism="queue", images=60, **settings):
    common.seed_everything(0)
    return moco.MoCo(images=images, mechanism=mechanism, **{**TINY, **settings})


def a_batch(n=8, size=32):
    views = torch.randint(0, 256, (2, n, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return {"x_q": views[0], "x_k": views[1], "index": torch.arange(n) * 3}


def plain(model):
    """No color draws, and BN that does not look at the batch: what is left must not depend on how the batch is cut."""
    model.photometric = common.Photometric()
    return model.eval()


def slow_loss(q, k, negatives, temperature):
    """Eq. 1 with one query at a time."""
    losses = []
    for i in range(len(q)):
        scores = [(q[i] @ other).item() for other in [k[i], *negatives(i)]]
        scores = [math.exp(s / temperature) for s in scores]
        losses.append(-math.log(scores[0] / sum(scores)))
    return np.mean(losses)


# --- views ---

def test_views_are_two_crops_of_the_same_image_each_mirrored_half_of_the_time(photograph):
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 600, dtype=np.uint8)[None, :, None], (400, 1, 3)))
    rng, mirrored = np.random.default_rng(0), []
    for _ in range(300):
        views = moco.two_views(common.LazyImage(ramp, 7), rng, 32, 0.2)
        assert views.pop("index") == 7
        assert {name: (v.shape, v.dtype)
                for name, v in views.items()} == dict.fromkeys(("x_q", "x_k"), ((3, 32, 32), torch.uint8))
        mirrored.append([bool(v[0, 0, 0] > v[0, 0, -1]) for v in views.values()])
    share = np.mean(mirrored, axis=0)
    both = np.mean(np.all(mirrored, axis=1))
    assert share == pytest.approx([0.5, 0.5], abs=0.1) and both == pytest.approx(0.25, abs=0.08)


# --- model ---

def test_versions_have_the_heads_and_colors_of_their_papers():
    one, two = tiny(version=1), tiny(version=2)
    assert isinstance(one.encoder_q.projector, nn.Linear)
    assert [type(m) for m in two.encoder_q.projector] == [nn.Linear, nn.ReLU, nn.Linear]
    assert two.encoder_q.projector[0].weight.shape == (128, 128)
    assert two.encoder_q.projector[2].weight.shape == (16, 128)
    assert one.photometric.strength.tolist() == pytest.approx([0.4, 0.4, 0.4, 0.4]) and one.photometric.blur_p == 0
    assert two.photometric.strength.tolist() == pytest.approx([0.4, 0.4, 0.4, 0.1]) and two.photometric.blur_p == 0.5
    assert moco.PAPER["temperature"] == 0.2 and moco.VERSION_1["temperature"] == 0.07 and moco.PAPER["queue"] == 65536


def test_queue_loss_equals_eq_1_with_the_keys_of_past_batches_alone():
    model, batch = plain(tiny()), a_batch()
    before = model.queue.keys.clone()
    loss, stats = model(batch)
    q = model.encoder_q(model.photometric(batch["x_q"]))
    k = model.encoder_k(model.photometric(batch["x_k"]))
    torch.testing.assert_close(q.norm(dim=1), torch.ones(8))
    assert loss.item() == pytest.approx(slow_loss(q, k, lambda i: before, 0.2), rel=1e-4)
    assert stats["positive"].item() == pytest.approx((q * k).sum(1).mean().item(), rel=1e-4)
    model.update()
    torch.testing.assert_close(model.queue.keys[:8], k)           # in the order of the batch, shuffled or not
    assert torch.equal(model.queue.keys[8:], before[8:])


def test_a_step_trains_the_query_network_and_the_key_network_follows_by_momentum_alone():
    model, batch = tiny(momentum=0.9), a_batch()
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.1)
    k_before = [p.clone() for p in model.encoder_k.parameters()]
    loss, _ = model(batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder_q.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())
    optimizer.step()
    model.update()
    for old, k, q in zip(k_before, model.encoder_k.parameters(), model.encoder_q.parameters()):
        torch.testing.assert_close(k, 0.9 * old + 0.1 * q.detach())   # Eq. 2


def test_batch_mechanism_contrasts_with_the_other_keys_of_the_batch_and_trains_through_them():
    model, batch = plain(tiny("batch")), a_batch()
    loss, _ = model(batch)
    q, k = (model.encoder_q(model.photometric(batch[name])) for name in ("x_q", "x_k"))
    assert loss.item() == pytest.approx(slow_loss(q, k, lambda i: [k[j] for j in range(8) if j != i], 0.2), rel=1e-4)
    own = torch.autograd.grad(loss, list(model.encoder_q.parameters()))
    similarity = q @ k.T / 0.2
    both = torch.autograd.grad(F.cross_entropy(similarity, torch.arange(8)), list(model.encoder_q.parameters()))
    for a, b in zip(own, both):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    _, stats = model.contrast_within_batch(F.normalize(torch.ones(8, 4), dim=1), F.normalize(torch.ones(8, 4), dim=1))
    assert stats["accuracy"] == 0  # a constant output hits nothing


def test_bank_draws_from_all_images_but_those_of_the_batch():
    model = tiny("bank", images=20, queue=4000)
    model.bank = torch.arange(20.0)[:, None].repeat(1, 16)
    index = torch.tensor([7, 0, 19, 8, 3])
    positives, negatives = model.look_up(index)
    assert positives[:, 0].tolist() == index.tolist()
    counts = negatives[:, 0].long().bincount(minlength=20)
    assert (counts[index] == 0).all()
    others = counts[counts > 0]
    assert len(others) == 15 and others.min() > 200 and others.max() < 340  # 4000 / 15 = 267 each


def test_bank_never_draws_an_image_of_the_batch_even_one_that_is_there_twice():
    model = tiny("bank", images=12, queue=3000)
    model.bank = torch.arange(12.0)[:, None].repeat(1, 16)
    for index in ([5, 5, 6], [0, 0, 0], [11, 4, 11, 4], [9, 8, 8, 11], [1, 0, 1, 3, 3]):
        drawn = set(model.look_up(torch.tensor(index))[1][:, 0].tolist())
        assert drawn <= set(range(12)) - set(index) and len(drawn) == 12 - len(index)


def test_bank_cuts_no_key_and_writes_a_stand_in_to_its_own_entry(tmp_path):
    for name in "abc":
        Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    views = common.Views(common.ImageFolder(tmp_path), partial(moco.two_views, size=32, min_area=0.2, key=False),
                         seed=0)
    item = views[0, 1]
    assert set(item) == {"x_q", "index", "bad"} and item["index"] in (0, 2) and item["bad"].startswith("b.png")
    assert views[0, 2]["index"] == 2


def test_bank_entries_mix_old_and_new_features_of_their_own_image():
    model, batch = plain(tiny("bank", momentum=0.5)), a_batch()
    before = model.bank.clone()
    loss, _ = model(batch)
    q = model.encoder_q(model.photometric(batch["x_q"])).detach()
    model.update()
    index = batch["index"]
    torch.testing.assert_close(model.bank[index], F.normalize(0.5 * before[index] + 0.5 * q, dim=1))
    rest = torch.ones(60, dtype=bool).index_fill(0, index, False)
    assert torch.equal(model.bank[rest], before[rest])
    loss.backward()
    assert not hasattr(model, "encoder_k")


@pytest.mark.parametrize("shuffle", [True, False])
def test_shuffling_gives_a_key_other_companions_than_its_query_and_brings_it_back(shuffle):
    model = tiny(shuffle=shuffle)
    model.photometric = nn.Identity()
    x = torch.arange(16, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    where = model.encode_shuffled(lambda x: torch.arange(16.0)[:, None], x)   # each key's place in the network's batch
    who = model.encode_shuffled(lambda x: x[:, 0, 0, :1], x)
    assert who.flatten().tolist() == list(range(16))                          # keys come back to their queries
    assert (where.flatten().tolist() == list(range(16))) is not shuffle
    assert sorted(where.flatten().tolist()) == list(range(16))


def gradients(mechanism):
    """Loss and gradient of a step of this process's share of one batch of 8."""
    model, batch = plain(tiny(mechanism)), a_batch()
    share = 8 // common.world_size()
    mine = slice(common.rank() * share, (common.rank() + 1) * share)
    ddp = common.wrap_ddp(model, torch.device("cpu"))
    loss, _ = ddp({name: x[mine] for name, x in batch.items()})
    loss.backward()
    model.update()
    keys = model.queue.keys[:8].numpy() if mechanism == "queue" else None
    return loss.item(), [p.grad.numpy() for p in model.encoder_q.parameters()], keys


@pytest.mark.parametrize("mechanism", ["queue", "batch"])
def test_two_processes_equal_one(mechanism):
    loss, alone, keys = gradients(mechanism)
    results = in_processes(2, gradients, mechanism)
    assert np.mean([r[0] for r in results]) == pytest.approx(loss, abs=1e-5)
    for _, together, their_keys in results:
        for a, b in zip(alone, together):
            assert np.abs(a - b).max() < 1e-5
        if mechanism == "queue":
            assert np.abs(keys - their_keys).max() < 1e-6


def test_schedules_are_those_of_the_papers():
    rate = lambda schedule, step, total=1000, warmup=0: moco.learning_rate(
        SimpleNamespace(lr=0.03, batch_size=1024, schedule=schedule), step, total, warmup)
    assert [rate("steps", step) for step in (0, 599, 600, 799,
                                             800)] == pytest.approx([0.12, 0.12, 0.012, 0.012, 0.0012])
    assert [rate("cosine", step) for step in (0, 500, 1000)] == pytest.approx([0.12, 0.06, 0])
    steps = (0, 62499, 62500, 125000, 1249999)  # Sec. 4: 0.12, times 0.9 every 62.5k
    assert [rate("instagram", step, 1250000)
            for step in steps] == pytest.approx([0.12, 0.12, 0.108, 0.0972, 0.12 * 0.9 ** 19])
    assert rate("instagram", 4, warmup=10) == pytest.approx(0.06)


# --- the script ---

def arguments(data, out, *more):
    return ["--data", str(data), "--out", str(out), "--arch", "resnet18w0.25", "--size", "32", "--batch-size", "16",
            "--queue", "32", "--momentum", "0.9", "--workers", "0", "--print-every", "1", "--lr", "0.1",
            *map(str, more)]


def test_a_run_leaves_checkpoint_log_and_picture_and_goes_on_where_it_stopped(pictures, tmp_path, monkeypatch):
    plan = ["--epochs", 2, "--knn", pictures]
    assert run(monkeypatch, *arguments(pictures, tmp_path / "whole", *plan)) == 0
    assert run(monkeypatch, *arguments(pictures, tmp_path / "parts", *plan, "--max-steps", 2)) == 0
    state = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)
    assert {"model", "optimizer", "epoch", "step", "method", "settings", "generators"} <= set(state)
    assert (state["step"], state["epoch"], state["method"]) == (2, 0, "moco")
    assert run(monkeypatch, *arguments(pictures, tmp_path / "parts", *plan)) == 0
    log = rows(tmp_path / "whole")
    assert without_speed(log) == without_speed(rows(tmp_path / "parts"))
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 7))
    assert [row["epoch"] for row in log if "knn" in row] == [0, 1, 2] and "knn" in log[0]
    assert {"epoch", "step", "loss", "lr", "images_per_s", "data_wait", "accuracy"} <= set(log[1])
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    backbone = {k.removeprefix("encoder_q.backbone."): v for k, v in weights(tmp_path / "whole").items()
                if k.startswith("encoder_q.backbone.")}
    common.resnet("resnet18w0.25").load_state_dict(backbone)
    with Image.open(tmp_path / "whole" / "views.png") as picture:
        assert picture.width > 200 and picture.height > picture.width


def test_a_run_killed_again_and_again_gives_the_same_weights_bit_for_bit(pictures, tmp_path, monkeypatch):
    plan = lambda out, *more: arguments(pictures, tmp_path / out, "--epochs", 12, "--save-every", 4, *more)
    log = tmp_path / "killed" / "log.jsonl"
    for workers, lines in ((0, 9), (2, 21)):
        process = fork(tmp_path / "said.txt", script, "moco.py", *plan("killed", "--workers", workers))
        while process.is_alive() and (not log.exists() or log.read_text().count("\n") < lines):
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        saved = torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"]
        assert lines // 4 * 4 <= saved < 36
    for out in ("killed", "whole"):
        assert run(monkeypatch, *plan(out)) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    assert without_speed(rows(tmp_path / "whole")) == without_speed(rows(tmp_path / "killed"))


def test_two_processes_train_under_torchrun_and_one_goes_on(pictures, tmp_path, monkeypatch):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "moco.py")]
    plan = arguments(pictures, tmp_path, "--epochs", 2, "--knn", pictures)
    done = subprocess.run([*command, *plan, "--max-steps", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run(monkeypatch, *plan) == 0
    log = rows(tmp_path)
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 7))
    assert all(math.isfinite(row["loss"]) for row in log if "loss" in row)


@pytest.mark.parametrize("more", [["--version", 1], ["--mechanism", "bank"], ["--mechanism", "batch", "--no-shuffle"],
                                  ["--amp", "bf16"], ["--size", 64, "--bn-splits", 1]])
def test_every_variant_trains(pictures, tmp_path, monkeypatch, more):
    assert run(monkeypatch, *arguments(pictures, tmp_path, "--max-steps", 2, *more)) == 0
    log = rows(tmp_path)
    assert len(log) == 2 and all(math.isfinite(row["loss"]) for row in log)
    settings = torch.load(tmp_path / "last.pt", weights_only=True)["settings"]
    assert settings["temperature"] == (0.07 if "--version" in more else 0.2)
    assert settings["momentum"] == 0.9 and settings["schedule"] == ("steps" if "--version" in more else "cosine")


def test_without_data_the_demo_trains_on_drawn_shapes(tmp_path, monkeypatch):
    assert run(monkeypatch, "--out", tmp_path, "--max-steps", 2, "--print-every", 1) == 0
    log = rows(tmp_path)
    assert [sorted(row.keys() & {"probe_c2", "loss"}) for row in log] == [["probe_c2"], ["loss"], ["loss"]]
    settings = torch.load(tmp_path / "last.pt", weights_only=True)["settings"]
    assert {name: settings[name] for name in moco.DEMO if name != "print_every"} == {
        name: value for name, value in moco.DEMO.items() if name != "print_every"}
    assert log[0]["probe_c5"] < 0.35  # 12 classes, untrained


@pytest.mark.parametrize("change, says", [
    (["--data", "nowhere"], "no such folder: nowhere"),
    (["--data", "EMPTY"], "no images below"),
    (["--arch", "vgg16"], "unknown --arch vgg16"),
    (["--arch", "resnet18w0.24"], "unknown --arch resnet18w0.24"),
    (["--batch-size", 200], "48 images do not fill a batch of 200"),
    (["--batch-size", 15, "--bn-splits", 4], "does not fall into 4 BN groups"),
    (["--size", 31], "31 must be at least 32"),
    (["--size", "big"], "--size"),
    (["--queue", 0], "0 must be at least 1"),
    (["--lr", "nan"], "nan must be from 0"),
    (["--temperature", 0], "0 must be at least 0.001"),
    (["--min-area", 1.5], "1.5 must be from 0.001 to 1"),
    (["--data", ""], "--data is empty"),
    (["--size", 10 ** 11], "must be from 32 to 8192"),
    (["--queue", 10 ** 14], "must be from 1 to 1e+09"),
    (["--arch", "resnet18w99999"], "unknown --arch resnet18w99999"),
    (["--knn", ""], "--knn is empty"),
    (["--mechanism", "bank", "--batch-size", 48], "a batch of all 48 images leaves none"),
    (["--knn", "EMPTY"], "no such folder"),
    (["--knn", "STRANGE"], "class c is not among the training classes"),
    (["--what"], "unrecognized arguments: --what"),
    (["--out", "FILE"], "--out"),
])
def test_a_usage_error_is_one_line_and_exit_code_2(pictures, tmp_path, monkeypatch, capsys, change, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("something")
    for path in ("strange/train/a/1.png", "strange/val/c/1.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"")
    change = [{"STRANGE": tmp_path / "strange", "EMPTY": tmp_path / "empty", "FILE": tmp_path / "file"}.get(part, part)
              for part in change]
    assert run(monkeypatch, *arguments(pictures, tmp_path / "out"), *change) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("moco.py: error: ") and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "something"


def test_a_batch_that_does_not_divide_over_the_processes_is_a_usage_error(pictures, tmp_path, capfd):
    assert in_two_processes(moco, *arguments(pictures, tmp_path), "--batch-size", "15") == [2, 2]
    says = "moco.py: error: --batch-size 15 does not divide over 2 processes: take 16\n"
    error = capfd.readouterr().err
    assert error.count("error:") == 1 == error.count(says)


def test_with_a_bank_two_processes_may_take_all_images_at_once(pictures, tmp_path):
    plan = arguments(pictures, tmp_path, "--mechanism", "bank", "--batch-size", "48", "--max-steps", 1)
    assert in_two_processes(moco, *plan) == [0, 0]


def test_a_folder_with_another_run_or_a_damaged_one_is_refused_and_kept(pictures, tmp_path, monkeypatch, capsys):
    plan = arguments(pictures, tmp_path, "--max-steps", 2)
    assert run(monkeypatch, *plan) == 0
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for more, says in [(["--lr", 0.2], "lr 0.1 (now 0.2)"), (["--version", 1], "version 2 (now 1)"),
                       (["--data", pictures / "val"], "images 48 (now 24)"), (["--seed", 1], "seed 0 (now 1)")]:
        assert run(monkeypatch, *plan, *more) == 2
        assert says in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    for name, damage in [("cannot be read", kept["last.pt"][:5000]), ("cannot be read", b"not a checkpoint at all")]:
        (tmp_path / "last.pt").write_bytes(damage)
        assert run(monkeypatch, *plan) == 2
        err = capsys.readouterr().err
        assert name in err and err.count("\n") == 1 and (tmp_path / "last.pt").read_bytes() == damage
    torch.save({"weights": torch.ones(2)}, tmp_path / "last.pt")
    assert run(monkeypatch, *plan) == 2 and "lacks" in capsys.readouterr().err
    (tmp_path / "last.pt").write_bytes(kept["last.pt"])
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["model"]["encoder_q.projector.0.weight"]
    torch.save(state, tmp_path / "last.pt")
    assert run(monkeypatch, *plan) == 2 and "does not fit the model" in capsys.readouterr().err
    (tmp_path / "last.pt").write_bytes(kept["last.pt"])
    assert run(monkeypatch, *plan, "--max-steps", 3, "--workers", 1, "--print-every", 2, "--save-every", 5) == 0


def test_data_may_move_to_another_folder_between_runs(pictures, tmp_path, monkeypatch):
    (tmp_path / "moved").symlink_to(pictures)
    assert run(monkeypatch, *arguments(pictures, tmp_path / "out", "--max-steps", 2)) == 0
    assert run(monkeypatch, *arguments(tmp_path / "moved", tmp_path / "out", "--max-steps", 3)) == 0


def test_a_queue_larger_than_the_data_is_pointed_out_once(pictures, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *arguments(pictures, tmp_path, "--max-steps", 1, "--queue", 200)) == 0
    assert capsys.readouterr().out.count("the queue holds 200 keys and the data 48 images") == 1


def test_help_groups_the_flags_and_shows_both_defaults(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the paper's:" in out and "common to all five methods:" in out
    assert "(default: 65536; demo:" in out and "(default: resnet50; demo: resnet18w0.25)" in out
