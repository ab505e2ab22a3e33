"""DetCo: patches against a known picture, the three contrasts against slow formulas, MoCo v2 as its special case."""
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import detco
import moco
from conftest import assert_same_weights, in_processes, in_two_processes, rows, run_script, without_speed

run = partial(run_script, detco)
TINY = dict(arch="resnet18w0.25", dim=16, queue=40, temperature=0.2, size=64)


def tiny(**settings):
    common.seed_everything(0)
    return detco.DetCo(**{**TINY, **settings})


def a_batch(n=8, size=64):
    g = torch.Generator().manual_seed(1)
    region, patch = detco.jigsaw_sizes(size)
    picture = lambda side: torch.randint(0, 256, (n, 3, side, side), generator=g, dtype=torch.uint8)
    corner = lambda: torch.randint(0, region - patch, (n, 9, 2), generator=g)
    return {"x_q": picture(size), "x_k": picture(size), "p_q": picture(region), "p_k": picture(region),
            "at_q": corner(), "at_k": corner(), "index": torch.arange(n)}


def plain(model):
    model.photometric = common.Photometric()
    return model.eval()


def test_running_statistics_are_those_of_whole_views():
    model, views = tiny(), a_batch()
    views["p_q"] //= 8  # dark patches: other statistics
    views["p_k"] //= 8
    before = model.encoder_q.backbone.bn1.running_mean.clone()
    model.photometric = common.Photometric()
    model(views)
    for encoder, x in ((model.encoder_q, views["x_q"]), (model.encoder_k, views["x_k"])):
        norm = encoder.backbone.bn1
        seen = encoder.backbone.conv1(model.photometric(x)).mean(dim=(0, 2, 3))
        assert torch.allclose(norm.running_mean, before + 0.1 * (seen - before), atol=1e-6)
        assert norm.num_batches_tracked == 1


# --- views ---

def test_sizes_are_the_papers_at_224_and_in_proportion_elsewhere():
    assert detco.jigsaw_sizes(224) == (255, 64) and detco.jigsaw_sizes(112) == (126, 32)
    assert all(detco.jigsaw_sizes(size)[0] // 3 >= detco.jigsaw_sizes(size)[1] > 0 for size in range(32, 600))


def test_nine_patches_lie_each_in_its_own_cell_of_a_large_region(photograph):
    rng, seen = np.random.default_rng(0), []
    for _ in range(100):
        batch = detco.views(common.LazyImage(photograph, 0), rng, 224, 0.2)
        assert batch["x_q"].shape == (3, 224, 224) and batch["p_k"].shape == (3, 255, 255)
        for name in ("at_q", "at_k"):
            inside = batch[name] - torch.tensor([[x * 85, y * 85] for y in range(3) for x in range(3)])
            assert inside.min() >= 0 and inside.max() <= 21
            seen.append(inside)
    assert torch.stack(seen).min() == 0 and torch.stack(seen).max() == 21
    assert set(detco.views(common.LazyImage(photograph, 0), rng, 64, 0.2, local=False)) == {"x_q", "x_k"}


def test_patches_are_cut_at_their_corners():
    x = torch.arange(2 * 3 * 20 * 30.0).view(2, 3, 20, 30)
    corners = torch.stack([torch.randint(0, 20, (2, 9)), torch.randint(0, 10, (2, 9))], dim=-1)
    out = detco.patches(x, corners, 8).unflatten(0, (2, 9))
    for n in range(2):
        for k in range(9):
            left, top = corners[n, k].tolist()
            assert torch.equal(out[n, k], x[n, :, top:top + 8, left:left + 8])


# --- model ---

def nce(q, k, negatives, temperature=0.2):
    """Eq. 2 one query at a time."""
    losses = []
    for i in range(len(q)):
        scores = [math.exp((q[i] @ other).item() / temperature) for other in [k[i], *negatives]]
        losses.append(-math.log(scores[0] / sum(scores)))
    return np.mean(losses)


def encode_slowly(encoder, x, region, corners, patch):
    """Global and local embeddings of every stage, one image and one patch at a time."""
    norm = common.Photometric()
    unit = lambda v: F.normalize(v, dim=1)
    g, local = [[] for _ in encoder.stages], [[] for _ in encoder.stages]
    for n in range(len(x)):
        stages = encoder.backbone(norm(x[n:n + 1]))
        nine = [encoder.backbone(norm(region[n:n + 1])[:, :, y:y + patch, x_:x_ + patch])
                for x_, y in corners[n].tolist()]
        for j, i in enumerate(encoder.stages):
            g[j].append(unit(encoder.mlp_global[j](stages[i].mean((2, 3)))))
            local[j].append(unit(encoder.mlp_local[j](torch.cat([f[i].mean((2, 3)) for f in nine], dim=1))))
    return [torch.cat(v) for v in g], [torch.cat(v) for v in local]


@pytest.mark.parametrize("share", [False, True])
def test_loss_equals_equations_1_to_5_written_out_slowly(share):
    model, batch = plain(tiny(weights=[0.0, 0.4, 0.7, 1.0], share_queue=share)), a_batch(4)
    for p in model.encoder_k.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    queues_g, queues_l = ([q.keys.clone() for q in queues] for queues in (model.queue_global, model.queue_local))
    assert len(queues_g) == len(queues_l) == (1 if share else 3)
    with torch.no_grad():
        loss, _ = model(batch)
        q_g, q_l = encode_slowly(model.encoder_q, batch["x_q"], batch["p_q"], batch["at_q"], model.patch_side)
        k_g, k_l = encode_slowly(model.encoder_k, batch["x_k"], batch["p_k"], batch["at_k"], model.patch_side)
    total = 0
    for i, w in enumerate([0.4, 0.7, 1.0]):
        g, local = queues_g[0 if share else i], queues_l[0 if share else i]
        total += w * (nce(q_g[i], k_g[i], g) + nce(q_l[i], k_l[i], local) + nce(q_l[i], k_g[i], g))
    assert loss.item() == pytest.approx(total, rel=1e-4)
    model.update()
    # in the order of the batch
    torch.testing.assert_close(model.queue_global[0].keys[:4], k_g[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.queue_local[-1].keys[8 if share else 0:][:4], k_l[-1], atol=1e-5, rtol=1e-4)


def test_without_patches_and_with_the_last_stage_alone_it_is_moco_v2():
    common.seed_everything(1)
    theirs = moco.MoCo("resnet18w0.25", 60, dim=16, queue=40, bn_splits=2)
    ours = tiny(weights=[0.0, 0.0, 0.0, 1.0], local=False, bn_splits=2)
    state = {name.replace("projector", "mlp_global.0").replace("queue.", "queue_global.0."): x
             for name, x in theirs.state_dict().items()}
    ours.load_state_dict(state)
    batch, results = a_batch(), []
    for model in (theirs, ours):
        common.seed_everything(7)
        loss, stats = model(batch)
        loss.backward()
        model.update()
        results.append((loss, stats, [p.grad for p in model.encoder_q.parameters()], [*model.state_dict().values()]))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    for k in (2, 3):
        assert len(results[0][k]) == len(results[1][k]) and all(map(torch.equal, results[0][k], results[1][k]))


def test_a_stage_of_weight_0_has_no_head_and_the_heads_are_apart():
    model = tiny(weights=[0.0, 0.0, 1.0, 1.0])
    assert len(model.encoder_q.mlp_global) == len(model.encoder_q.mlp_local) == len(model.queue_global) == 2
    full = detco.Encoder("resnet50", [0.1, 0.4, 0.7, 1], 128, 8, True)
    assert [mlp[0].weight.shape for mlp in full.mlp_global] == [(2048, c) for c in (256, 512, 1024, 2048)]
    assert [mlp[0].weight.shape for mlp in full.mlp_local] == [(2048, 9 * c) for c in (256, 512, 1024, 2048)]
    loss, _ = tiny()(a_batch())
    assert loss.isfinite()


def test_the_nine_patches_of_a_batch_pass_the_backbone_at_once():
    model, passes = tiny(), []
    for name in ("encoder_q", "encoder_k"):
        record = lambda module, x, y, name=name: passes.append((name, len(x[0])))
        getattr(model, name).backbone.register_forward_hook(record)
    loss, _ = model(a_batch())
    assert passes == [("encoder_q", 8), ("encoder_q", 72), ("encoder_k", 8), ("encoder_k", 72)]
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder_q.parameters())
    assert all(p.grad is None for p in model.encoder_k.parameters())


def test_the_shuffle_covers_views_and_patches_and_is_undone():
    model, batch, seen = tiny(), a_batch(), []
    model.photometric.forward = lambda x: x.float()
    one = torch.arange(8, dtype=torch.uint8).view(-1, 1, 1, 1)
    batch |= {"x_k": one.expand(-1, 3, 64, 64), "p_k": one.expand(-1, 3, *batch["p_k"].shape[2:])}
    batch["at_k"] = torch.arange(8).view(-1, 1, 1).expand(-1, 9, 2)
    embed = lambda x: (seen.append(x[:, 0, 0, 0].tolist()), [x[:, :1, 0, 0].float().expand(-1, 16)] * 4)[1]
    model.encoder_k.forward, model.encoder_k.encode_patches = embed, lambda x: embed(x[::9])
    model(batch)
    assert seen[0] == seen[1] != list(range(8)) and sorted(seen[0]) == list(range(8))
    assert all(k[:, 0].tolist() == list(range(8)) for keys in model.new for k in keys)


def test_regions_are_60_percent_or_more_and_views_are_mirrored_half_of_the_time():
    ramp = np.stack([*np.meshgrid(np.linspace(0, 255, 300), np.linspace(0, 255, 300)), np.zeros((300, 300))], axis=-1)
    image = common.LazyImage(Image.fromarray(ramp.astype(np.uint8)), 0)
    rng, areas, flips = np.random.default_rng(0), [], []
    for _ in range(200):
        batch = detco.views(image, rng, 64, 0.2)
        areas.append([np.prod([np.ptp(batch[name][k].numpy()) / 255 for k in (0, 1)])
                      for name in ("x_q", "p_q", "p_k")])
        flips.append([bool(batch[name][0, 0, 0] > batch[name][0, 0, -1]) for name in ("x_q", "x_k", "p_q", "p_k")])
    assert np.min(areas, axis=0)[0] < 0.3 and np.min(areas, axis=0)[1:].min() > 0.54
    assert np.mean(flips, axis=0) == pytest.approx([0.5] * 4, abs=0.12)


def gradients(**settings):
    model, batch = plain(tiny(**settings)), a_batch()
    share = 8 // common.world_size()
    ddp = common.wrap_ddp(model, torch.device("cpu"))
    loss, _ = ddp({name: x[common.rank() * share:][:share] for name, x in batch.items()})
    loss.backward()
    model.update()
    return (loss.item(), [p.grad.numpy() for p in model.encoder_q.parameters() if p.requires_grad],
            [q.keys.numpy() for q in [*model.queue_global, *model.queue_local]])


def shallow_gradients():
    return gradients(weights=[1.0, 1.0, 1.0, 0.0])


@pytest.mark.parametrize("step", [gradients, shallow_gradients])
def test_two_processes_equal_one(step):
    loss, alone, keys = step()
    results = in_processes(2, step)
    assert np.mean([r[0] for r in results]) == pytest.approx(loss, abs=1e-4)
    for _, together, their_keys in results:
        for a, b in zip(alone, together):
            assert np.abs(a - b).max() < 1e-4
        assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(keys, their_keys))


# --- the script ---

def arguments(data, out, *more):
    return ["--data", str(data), "--out", str(out), "--arch", "resnet18w0.25", "--size", "32", "--batch-size", "16",
            "--queue", "32",
            "--momentum", "0.9", "--workers", "0", "--print-every", "1", "--lr", "0.1", *map(str, more)]


def test_a_run_goes_on_where_it_stopped(pictures, tmp_path, monkeypatch):
    plan = ["--epochs", 2, "--augment", "rand"]
    assert run(monkeypatch, *arguments(pictures, tmp_path / "whole", *plan)) == 0
    assert run(monkeypatch, *arguments(pictures, tmp_path / "parts", *plan, "--max-steps", 2)) == 0
    assert run(monkeypatch, *arguments(pictures, tmp_path / "parts", *plan, "--workers", 2)) == 0
    assert without_speed(rows(tmp_path / "whole")) == without_speed(rows(tmp_path / "parts"))
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    with Image.open(tmp_path / "whole" / "views.png") as picture:
        assert picture.width > 500 and picture.height > 1000


def test_two_processes_train_and_one_goes_on(pictures, tmp_path, monkeypatch):
    plan = arguments(pictures, tmp_path, "--epochs", 2)
    assert in_two_processes(detco, *plan, "--max-steps", 4) == [0, 0]
    assert run(monkeypatch, *plan) == 0
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 7))


@pytest.mark.parametrize("more", [["--no-local"], ["--no-local", "--weights", 0, 0, 0, 1], ["--share-queue"],
                                  ["--amp", "bf16"]])
def test_every_variant_trains(pictures, tmp_path, monkeypatch, more):
    assert run(monkeypatch, *arguments(pictures, tmp_path, "--max-steps", 2, *more)) == 0


def test_weights_that_are_all_zero_are_an_error(pictures, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *arguments(pictures, tmp_path, "--weights", 0, 0, 0, 0)) == 2
    assert capsys.readouterr().err.count("\n") == 1
