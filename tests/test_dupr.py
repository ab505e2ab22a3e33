"""DUPR: patch correspondence in painted pictures, Eq. 2 to 8 against slow formulas, the script as a user runs it."""
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import common
import dupr
from conftest import assert_same_weights, in_processes, in_two_processes, rows, run_script, without_speed

run = partial(run_script, dupr)
TINY = dict(arch="resnet18w0.25", dim=16, queue=40, temperature=0.2)


def tiny(**settings):
    common.seed_everything(0)
    return dupr.DUPR(**{**TINY, **settings})


def a_batch(n=8, size=64):
    g = torch.Generator().manual_seed(1)
    batch = {"index": torch.arange(n), "overlap": torch.rand(n, generator=g) < 0.7}
    for name in "qk":
        low = torch.rand(n, 1, 2, generator=g) * 0.5 * size
        batch |= {f"x_{name}": torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8),
                  f"box_{name}": torch.cat([low, low + 0.4 * size], dim=2),
                  f"flip_{name}": torch.rand(n, generator=g) < 0.5}
    return batch


def plain(model):
    model.photometric = common.Photometric()
    return model.eval()


# --- views and correspondence ---

def test_a_colored_dot_lands_in_the_same_patch_of_both_views_mirrored_ones_too():
    rng, found, flips = np.random.default_rng(0), 0, []
    for _ in range(400):
        picture = np.zeros((240, 360, 3), np.uint8)
        x, y = int(rng.integers(20, 340)), int(rng.integers(20, 220))  # anywhere
        picture[y - 14:y + 14, x - 14:x + 14] = (255, 255, 255)
        batch = dupr.two_views(common.LazyImage(Image.fromarray(picture), 0), rng, 112, 0.2)
        if not batch["overlap"]:
            assert torch.allclose(torch.cat([batch["box_q"], batch["box_k"]]), torch.tensor([[0.0, 0, 112, 112]] * 2))
            continue
        places = []
        for name in "qk":  # the pixels themselves as a feature map of stride 1
            region = common.roi_align(batch[f"x_{name}"][None].float(), batch[f"box_{name}"][None], 7, stride=1)
            region = torch.where(batch[f"flip_{name}"], region.flip(3), region)[0, 0]
            weight = region / region.sum().clamp(min=1e-9)
            center = [(weight.sum(dim=1 - k) * torch.arange(7)).sum().item() for k in (0, 1)]
            places.append((region.max().item(), center))
        if min(places[0][0], places[1][0]) > 60:
            found += 1
            assert np.abs(np.subtract(places[0][1], places[1][1])).max() < 0.75, places
            flips.append((batch["flip_q"].item(), batch["flip_k"].item()))
    assert found > 150 and {(a, b) for a, b in flips} == {(a, b) for a in (True, False) for b in (True, False)}


def test_the_intersection_is_the_same_part_of_the_image_in_both_views():
    ramp = np.stack([*np.meshgrid(np.linspace(0, 255, 400), np.linspace(0, 255, 400)), np.zeros((400, 400))], axis=-1)
    image, rng, missed = common.LazyImage(Image.fromarray(ramp.astype(np.uint8)), 0), np.random.default_rng(0), 0
    for _ in range(300):
        batch = dupr.two_views(image, rng, 64, 0.2)
        missed += not batch["overlap"]
        if not batch["overlap"]:
            continue
        seen = []
        for name in "qk":
            x1, y1, x2, y2 = batch[f"box_{name}"][0].tolist()
            assert -1e-3 <= x1 < x2 <= 64 + 1e-3 and -1e-3 <= y1 < y2 <= 64 + 1e-3
            if min(x2 - x1, y2 - y1) < 8:
                break
            center = batch[f"x_{name}"][:2, int((y1 + y2) / 2), int((x1 + x2) / 2)].float()
            seen.append(center)
        if len(seen) == 2:
            assert (seen[0] - seen[1]).abs().max() < 8
    assert missed < 12                                                 # the paper's "very low": 51 of 1472


# --- model ---

def slow_forward(model, batch):
    """Image and patch embeddings of both networks, an image and a patch at a time."""
    out = []
    for network, name in ((model.encoder_q, "q"), (model.encoder_k, "k")):
        v, r = [[] for _ in network.h], [[] for _ in network.g]
        for n in range(len(batch["x_q"])):
            f = network.backbone(common.Photometric()(batch[f"x_{name}"][n:n + 1]))
            for j, m in enumerate(network.image_levels):
                v[j].append(F.normalize(network.h[j](f[m].mean((2, 3))), dim=1)[0])
            for j, m in enumerate(network.patch_levels):
                side, stride = 64 // 4 // 2 ** m, 4 * 2 ** m
                region = torchvision.ops.roi_align(f[m], [batch[f"box_{name}"][n]], side, 1 / stride, aligned=True)
                order = reversed(range(side)) if batch[f"flip_{name}"][n] else range(side)
                columns = list(order)
                r[j].append(torch.stack([F.normalize(network.g[j](region[:, :, y:y + 1, x:x + 1]).flatten(), dim=0)
                                         for y in range(side) for x in columns]))
        out.append(([torch.stack(x) for x in v], [torch.stack(x) for x in r]))
    return out


def nce(q, k, negatives, temperature=0.2):
    scores = [math.exp((q @ other).item() / temperature) for other in [k, *negatives]]
    return -math.log(scores[0] / sum(scores))


def test_loss_equals_equations_2_to_8_written_out_patch_by_patch():
    model, batch = plain(tiny()), a_batch(4)
    batch["overlap"] = torch.tensor([True, False, True, True])
    for p in model.encoder_k.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    images, patches = ([q.keys.clone() for q in queues] for queues in (model.image_queues, model.patch_queues))
    with torch.no_grad():
        loss, stats = model(batch)
        (v_q, r_q), (v_k, r_k) = slow_forward(model, batch)
    total = 0
    for alpha, q, k, queue in zip([0.1, 0.4, 0.7, 1.0], v_q, v_k, images):
        total += alpha * np.mean([nce(q[n], k[n], queue) for n in range(4)])                                 # Eq. 8
    for q, k, queue in zip(r_q, r_k, patches):
        total += np.mean([nce(q[n, p], k[n, p], queue) for n in (0, 2, 3) for p in range(q.shape[1])])      # Eq. 7
    assert [r.shape[1] for r in r_q] == [16, 4]                        # S of conv4_x and conv5_x at 64 pixels
    assert loss.item() == pytest.approx(total, rel=1e-4) and stats["overlap"] == 0.75
    model.update()
    torch.testing.assert_close(model.image_queues[2].keys[:4], v_k[2], atol=1e-5, rtol=1e-4)
    new = model.patch_queues[0].keys[:32]
    distance = torch.cdist(new, r_k[0].flatten(0, 1)).min(dim=1)
    assert distance.values.max() < 1e-2 and not any(16 <= i < 32 for i in distance.indices.tolist())  # not of image 1
    assert torch.equal(model.patch_queues[0].keys[32:], patches[0][32:])
    assert (model.patch_queues[1].keys[:12] != patches[1][:12]).any(dim=1).all()


@pytest.mark.parametrize("size, places", [(224, [196, 49]), (48, [9, 4]), (100, [49, 16])])
def test_rois_are_7_and_14_on_conv5_and_conv4_at_224_and_each_levels_size_elsewhere(size, places):
    model = tiny()
    _, r = model.encoder_q(torch.randn(1, 3, size, size), torch.tensor([[[0.0, 0, size, size]]]), torch.tensor([False]))
    assert [x.shape[1] for x in r] == places


def test_roi_size_lays_the_same_grid_over_every_level():
    model = tiny(roi_size=3)
    loss, _ = model(a_batch())
    loss.backward()
    assert [x.shape[1] for x in model.new[1]] == [9, 9] and loss.isfinite()


@pytest.mark.parametrize("augment, calls", [("moco", []), ("rand", [(17, dupr.ColorRandAugment)] * 2),
                                            ("rand-moves", [(17, torchvision.transforms.RandAugment)] * 2)])
def test_each_view_is_augmented_as_the_flags_say(monkeypatch, photograph, augment, calls):
    seen = []
    monkeypatch.setattr(common, "rand_augment",
                        lambda view, rng, *drawn_from: (seen.append(drawn_from), view)[1])
    dupr.two_views(common.LazyImage(photograph, 0), np.random.default_rng(0), 64, 0.2, augment, 17)
    assert seen == calls


def test_randaugment_colors_the_views_and_moves_no_pixel():
    picture, changed = np.full((60, 100, 3), 60, np.uint8), 0
    picture[:, 50:] = (200, 150, 100)
    for seed in range(60):
        out = np.asarray(common.rand_augment(Image.fromarray(picture), np.random.default_rng(seed),
                                             augment=dupr.ColorRandAugment)).astype(int)
        assert np.ptp(out[:, :47], axis=(0, 1)).max() <= 2 and np.ptp(out[:, 53:], axis=(0, 1)).max() <= 2
        changed += np.abs(out - picture).max() > 10
    assert changed > 30
    moved = [np.ptp(np.asarray(common.rand_augment(Image.fromarray(picture),
                                                   np.random.default_rng(s)))[:, 53:], axis=(0, 1)).max() > 2
             for s in range(40)]
    assert 8 < np.sum(moved)                                          # DetCo's may


def test_the_shuffle_covers_views_boxes_and_mirroring_and_is_undone():
    model, batch, seen = tiny(), a_batch(), []
    model.photometric.forward = lambda x: x.float()
    batch["x_k"] = torch.arange(8, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)
    batch["box_k"] = torch.arange(8.0).view(-1, 1, 1).expand(-1, 1, 4)
    batch["flip_k"] = torch.arange(8) % 2 == 1

    def encoder_k(x, box, flip):
        seen.append(x[:, 0, 0, 0].tolist())
        assert seen[-1] == box[:, 0, 0].tolist() and [n % 2 == 1 for n in seen[-1]] == flip.tolist()
        v = x[:, :1, 0, 0].float().expand(-1, 16)
        return [v] * 4, [v[:, None].expand(-1, p, -1) for p in (16, 4)]

    model.encoder_k.forward = encoder_k
    model(batch)
    assert seen[0] != list(range(8)) and sorted(seen[0]) == list(range(8))
    assert all(k[:, 0].tolist() == list(range(8)) for k in model.new[0])
    assert model.new[1][0][:, 3, 0].tolist() == list(range(8))


def test_no_overlap_at_all_gives_no_patch_loss_and_no_nan():
    model, batch = tiny(alpha=[0.0] * 4), a_batch()
    batch["overlap"][:] = False
    loss, _ = model(batch)
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.abs().sum() for p in model.encoder_q.parameters())
    model.update()
    assert model.patch_queues[0].keys.isfinite().all()


def test_a_level_of_weight_0_has_neither_head_nor_queue():
    model = tiny(alpha=[0.0, 0.0, 0.0, 1.0], beta=[0.0, 0.0, 0.0, 1.0])
    assert len(model.image_queues) == len(model.patch_queues) == len(model.encoder_q.h) == len(model.encoder_q.g) == 1
    loss, _ = model(a_batch())
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.encoder_q.parameters())


def unit(*shape, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


@pytest.mark.parametrize("temperature", [0.15, 0.005])
def test_patch_loss_in_parts_equals_the_whole_with_its_gradient(monkeypatch, temperature):
    monkeypatch.setattr(dupr, "PART", 50 * 300)                                           # 50 rows at a time, then 35
    q, k, negatives = unit(5, 67, 16).requires_grad_(), unit(5, 67, 16, seed=1), unit(300, 16, seed=2)
    overlap = torch.tensor([True, True, False, True, False])
    loss, hits = dupr.patch_nce(q, (q + k).detach(), overlap, negatives, temperature)
    rows, keys = q[overlap].flatten(0, 1).double(), (q + k).detach()[overlap].flatten(0, 1).double()
    own, others = (rows * keys).sum(dim=1, keepdim=True), rows @ negatives.double().T
    whole = -torch.log_softmax(torch.cat([own, others], dim=1) / temperature, dim=1)[:, 0].mean()
    assert loss.item() == pytest.approx(whole.item(), abs=1e-6, rel=1e-6)
    ours, theirs = (torch.autograd.grad(3 * x, q)[0] for x in (loss, whole))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max() and not ours[~overlap].any()
    assert hits.item() == pytest.approx((own > others.amax(dim=1, keepdim=True)).double().mean().item(), abs=1e-6)
    assert 0 < hits < 1


def test_patch_loss_has_the_gradient_of_finite_differences():
    q, k, negatives = (unit(n, 4, seed=n, dtype=torch.float64) for n in (6, 6, 9))
    assert torch.autograd.gradcheck(lambda q: dupr.InfoNCEInParts.apply(q, k.roll(1, 0), negatives, 0.2)[0],
                                    q.requires_grad_())


def test_patch_loss_is_float32_under_autocast():
    q, k, negatives = unit(2, 50, 16).requires_grad_(), unit(2, 50, 16, seed=1), unit(100, 16, seed=2)
    outside = dupr.patch_nce(q, k, torch.ones(2, dtype=torch.bool), negatives, 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        inside = dupr.patch_nce(q, k, torch.ones(2, dtype=torch.bool), negatives, 0.07)
    assert inside == outside and all(map(torch.equal, *(torch.autograd.grad(x[0], q) for x in (inside, outside))))


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def test_patch_loss_never_holds_all_similarities(monkeypatch):
    monkeypatch.setattr(dupr, "PART", 2 ** 14)
    with Largest() as largest:
        dupr.patch_nce(unit(8, 64, 8).requires_grad_(), unit(8, 64, 8), torch.ones(8, dtype=torch.bool), unit(1024, 8),
                       0.2)[0].backward()
    assert largest.elements == 2 ** 14 < 512 * 1024


def a_batch_of_mixed_overlap():
    """8 pairs, of which four overlap: one in the first of two processes, three in the second."""
    return a_batch() | {"overlap": torch.tensor([True, False, False, False, True, True, True, False])}


def gradients(**settings):
    model, batch = plain(tiny(**settings)), a_batch_of_mixed_overlap()
    share = 8 // common.world_size()
    ddp = common.wrap_ddp(model, torch.device("cpu"))
    loss, _ = ddp({name: x[common.rank() * share:][:share] for name, x in batch.items()})
    loss.backward()
    model.update()
    grads = [p.grad.numpy() for p in model.encoder_q.parameters() if p.requires_grad]
    return loss.item(), grads, [q.keys.numpy() for q in model.image_queues]


def shallow_gradients():
    return gradients(alpha=[1.0, 1.0, 1.0, 0.0], beta=[0.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("step", [gradients, shallow_gradients])
def test_two_processes_equal_one(step):
    loss, alone, keys = step()
    results = in_processes(2, step)
    assert np.mean([r[0] for r in results]) == pytest.approx(loss, abs=1e-4)
    for _, together, their_keys in results:
        for a, b in zip(alone, together):
            assert np.abs(a - b).max() < 1e-4
        assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(keys, their_keys))


OVERLAPS = [[True, False, False, False, True, True, True, False], [False] * 5 + [True] + [False] * 2, [False] * 8]


def patch_queues():
    """For each of OVERLAPS and both levels: the queue before and after a step of this process, and all patches."""
    results, share = [], 8 // common.world_size()
    for overlap in OVERLAPS:
        model, batch = plain(tiny(queue=100, patch_keys=12)), a_batch() | {"overlap": torch.tensor(overlap)}
        before = [q.keys.numpy().copy() for q in model.patch_queues]
        common.seed_everything(common.rank())
        with torch.no_grad():
            model({name: x[common.rank() * share:][:share] for name, x in batch.items()})
        model.update()
        patches = [common.all_gather(k).numpy() for k in model.new[1]]                    # [8, P, D] of each level
        results += [(overlap, old, q.keys.numpy(), int(q.position), k)
                    for old, q, k in zip(before, model.patch_queues, patches)]
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_patch_queues_take_patch_keys_of_the_global_batch_whatever_the_number_of_processes(world):
    results = [patch_queues()] if world == 1 else in_processes(2, patch_queues)
    for overlap, before, after, position, patches in results[0]:
        new = min(12, sum(overlap) * patches.shape[1])  # of four pairs 12; of one 12 of 16, or all 4; of none none
        assert position == new and (after[new:] == before[new:]).all()
        distance = np.linalg.norm(after[:new, None] - patches.reshape(1, -1, 16), axis=2)
        nearest = distance.argmin(axis=1)
        images = set(nearest // patches.shape[1])
        assert len(set(nearest)) == new and all(overlap[n] for n in images)
        assert not new or distance.min(axis=1).max() < 1e-5
        assert len(images) >= min(sum(overlap), 2)                     # not of one image, and so not of one process
    for one, other in zip(results[0], results[-1]):
        assert (one[2] == other[2]).all() and one[3] == other[3]


def test_patches_are_drawn_from_the_whole_global_batch_alike():
    common.seed_everything(0)
    k, overlap = torch.arange(60.0).view(6, 10, 1), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    counts = torch.zeros(60)
    for _ in range(3000):
        keys, count = dupr.sample_patches(k, overlap, 4)
        assert count == 4
        counts[keys[:, 0].long()] += 1
    assert not counts.view(6, 10)[~overlap].any()
    assert (counts.view(6, 10)[overlap] - 300).abs().max() < 85                           # 300 each, sd 16


# --- the script ---

def arguments(data, out, *more):
    return ["--data", str(data), "--out", str(out), "--arch", "resnet18w0.25", "--size", "32", "--batch-size", "16",
            "--queue", "64",
            "--momentum", "0.9", "--workers", "0", "--print-every", "1", "--lr", "0.1", *map(str, more)]


def test_a_run_goes_on_where_it_stopped(pictures, tmp_path, monkeypatch):
    plan = ["--epochs", 2]
    assert run(monkeypatch, *arguments(pictures, tmp_path / "whole", *plan)) == 0
    assert run(monkeypatch, *arguments(pictures, tmp_path / "parts", *plan, "--max-steps", 2)) == 0
    assert run(monkeypatch, *arguments(pictures, tmp_path / "parts", *plan, "--workers", 2)) == 0
    assert without_speed(rows(tmp_path / "whole")) == without_speed(rows(tmp_path / "parts"))
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    with Image.open(tmp_path / "whole" / "views.png") as picture:
        assert picture.width > 900 and picture.height > 3600


def test_two_processes_train_and_one_goes_on(pictures, tmp_path, monkeypatch):
    plan = arguments(pictures, tmp_path, "--epochs", 2)
    assert in_two_processes(dupr, *plan, "--max-steps", 4) == [0, 0]
    assert run(monkeypatch, *plan) == 0
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 7))


@pytest.mark.parametrize("more", [["--augment", "moco"], ["--beta", 0, 0, 0, 0], ["--alpha", 0, 0, 0, 0],
                                  ["--amp", "bf16"],
                                  ["--augment", "rand-moves", "--augment-magnitude", 9, "--roi-size", 3]])
def test_every_variant_trains(pictures, tmp_path, monkeypatch, more):
    assert run(monkeypatch, *arguments(pictures, tmp_path, "--max-steps", 2, *more)) == 0


def test_temperature_is_that_of_the_main_experiments_or_of_the_ablations(pictures, monkeypatch):
    def settings(*more):
        monkeypatch.setattr(sys, "argv", ["dupr.py", "--data", str(pictures), *more])
        return dupr.arguments()

    assert settings().temperature == 0.15 and settings("--augment", "moco").temperature == 0.2


def test_weights_that_are_all_zero_are_an_error(pictures, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *arguments(pictures, tmp_path, "--alpha", 0, 0, 0, 0, "--beta", 0, 0, 0, 0)) == 2
    assert capsys.readouterr().err.count("\n") == 1
