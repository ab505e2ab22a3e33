"""DetCon: the loss against a slow version, masks against painted pictures, the script as a user runs it."""
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
import detcon
from conftest import (assert_same_weights, in_processes, in_two_processes, rows, run_script, without_speed,
                      write_pictures)

run = partial(run_script, detcon)


# --- loss ---

def latents(n=4, m=5, d=8, seed=0, masks=4):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, m, d, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    return [*rows, *(torch.randint(0, masks, (n, m), generator=g) for _ in range(2))]


def slow_loss(pred1, pred2, target1, target2, ids1, ids2, temperature):
    """Equations 1 to 3 and the design's rules with loops and dictionaries, in both directions."""
    n, m, _ = pred1.shape
    unit = lambda v: v / v.norm()
    total = 0
    for pred, other, own, ids, other_ids in [(pred1, target2, target1, ids1, ids2),
                                             (pred2, target1, target2, ids2, ids1)]:
        for image in range(n):
            drawn = {}
            for k in ids[image].tolist():
                drawn[k] = drawn.get(k, 0) + 1
            for i in range(m):
                region = ids[image, i].item()
                similarity = lambda v: unit(pred[image, i]) @ unit(v) / temperature
                everything = [similarity(other[a, b]) for a in range(n) for b in range(m)]
                everything += [similarity(own[a, b]) for a in range(n) for b in range(m)
                               if (a, ids[a, b].item()) != (image, region)]
                log_sum = torch.stack(everything).logsumexp(0)
                positives = [similarity(other[image, b]) for b in range(m) if other_ids[image, b].item() == region]
                if positives:
                    losses = [log_sum - s for s in positives]
                    total = total + sum(losses) / len(losses) / drawn[region] / (n * m)
    return total


@pytest.mark.parametrize("masks", [1, 2, 4, 40])
def test_loss_and_gradients_equal_the_slow_version_with_loops_and_dictionaries(masks):
    inputs = latents(masks=masks)
    fast, slow = detcon.detcon_loss(*inputs, 0.1), slow_loss(*inputs, 0.1)
    assert fast.item() == pytest.approx(slow.detach().item() if torch.is_tensor(slow) else slow, abs=1e-9)
    if masks < 40:
        for a, b in zip(torch.autograd.grad(fast, inputs[:4]), torch.autograd.grad(slow, inputs[:4])):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("case", ["usual", "few_regions", "some_unpaired", "one_image", "one_mask"])
@pytest.mark.parametrize("variant", ["s", "b"])
def test_loss_and_gradients_equal_those_of_the_released_code(case, variant):
    with np.load(Path(__file__).with_name("detcon_loss.npz")) as released:  # float64, but float32 in places
        get = lambda name: torch.from_numpy(np.asarray(released[f"{case}/{name}"]))
        p1, p2, t1, t2 = (get(name).requires_grad_() for name in ("pred1", "pred2", "target1", "target2"))
        ids = get("ids1"), get("ids2")
        if variant == "b":
            loss, inputs, names = detcon.detcon_loss(p1, p2, t1, t2, *ids, 0.1), [p1, t2], ["b_pred1", "b_target2"]
        else:
            loss, inputs, names = detcon.detcon_loss(p1, p2, p1, p2, *ids, 0.1), [p1], ["s_1"]
        assert loss.item() == pytest.approx(get(f"loss_{variant}").item(), rel=2e-7)
        for grad, name in zip(torch.autograd.grad(loss, inputs), names):
            want = get(f"grad_{name}")
            assert (grad - want).norm() <= 2e-7 * want.norm(), name


def test_loss_of_s_trains_through_predictions_and_targets_alike():
    z1, z2, _, _, ids1, ids2 = latents()
    fast, slow = detcon.detcon_loss(z1, z2, z1, z2, ids1, ids2, 0.1), slow_loss(z1, z2, z1, z2, ids1, ids2, 0.1)
    for a, b in zip(torch.autograd.grad(fast, [z1, z2]), torch.autograd.grad(slow, [z1, z2])):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)


def test_one_global_mask_is_simclrs_nt_xent():
    z1, z2, *_ = latents(n=6, m=1)
    ids = torch.zeros(6, 1, dtype=torch.long)
    z = F.normalize(torch.cat([z1[:, 0], z2[:, 0]]), dim=1)
    total = 0
    for i in range(12):                                                # Chen et al. 2020, Eq. 1
        scores = {j: math.exp((z[i] @ z[j]).item() / 0.1) for j in range(12) if j != i}
        total -= math.log(scores[(i + 6) % 12] / sum(scores.values())) / 12
    # both ways added
    assert detcon.detcon_loss(z1, z2, z1, z2, ids, ids, 0.1).item() == pytest.approx(2 * total, rel=1e-6)


def test_a_mask_that_the_other_view_lacks_has_no_loss_but_is_a_negative():
    p1, p2, t1, t2, _, _ = latents(n=1, m=2)
    ids1, ids2 = torch.tensor([[0, 1]]), torch.tensor([[0, 0]])
    loss = detcon.detcon_loss(p1, p2, t1, t2, ids1, ids2, 0.1)
    grads = torch.autograd.grad(loss, [p1, t1])
    assert grads[0][0, 1].abs().sum() == 0 and grads[0][0, 0].abs().sum() > 0
    assert grads[1][0, 1].abs().sum() > 0                              # a target among others


def share_of_loss(variant):
    """Loss and gradients of this process's share of latents made up for four images."""
    inputs = latents()
    share = 4 // common.world_size()
    mine = [x.detach()[common.rank() * share:][:share].requires_grad_(x.is_floating_point()) for x in inputs]
    p1, p2, t1, t2, ids1, ids2 = mine
    t1, t2 = (p1, p2) if variant == "s" else (t1.detach(), t2.detach())
    loss = detcon.detcon_loss(p1, p2, t1, t2, ids1, ids2, 0.1)
    if common.world_size() > 1:                                        # and alone again
        apart = detcon.detcon_loss(p1, p2, t1, t2, ids1, ids2, 0.1, gather=False).item()
        assert apart == pytest.approx(slow_loss(p1, p2, t1, t2, ids1, ids2, 0.1).item(), abs=1e-9)
    grads = torch.autograd.grad(loss, [p1, p2])
    return loss.item(), [g.numpy() / common.world_size() for g in grads]


@pytest.mark.parametrize("variant", ["s", "b"])
def test_loss_of_two_processes_equals_that_of_one(variant):
    loss, grads = share_of_loss(variant)
    results = in_processes(2, share_of_loss, variant)
    assert np.mean([r[0] for r in results]) == pytest.approx(loss, abs=1e-5)
    for k in (0, 1):
        together = np.concatenate([r[1][k] for r in results])
        assert np.abs(together - grads[k]).max() < 1e-5


# --- views and masks ---

def slow_shares(mask, cells):
    """{region: share of each cell} of `shares`, region by region from its pixels; sizes that `cells` divides."""
    sets = mask[..., None] if mask.ndim == 2 else mask
    if mask.dtype == np.uint16:
        regions = {k: mask // 2 ** k % 2 == 1 for k in range(16)}
    else:
        regions = {256 * c + k: sets[..., c] == k for c in range(sets.shape[2]) for k in range(256)}
    return {k: F.adaptive_avg_pool2d(torch.from_numpy(x)[None].double(), cells)[0].numpy() for k, x in regions.items()}


def three_masks(rng, size):
    """Labels, three sets of labels and overlapping bits, in patches and with single pixels."""
    patches = lambda high, *more: np.kron(rng.integers(0, high, (6, 6, *more)),
                                          np.ones((size // 6, size // 6, *[1] * len(more)), int))
    masks = patches(9).astype(np.uint8), patches(5, 3).astype(np.uint8), patches(1 << 16).astype(np.uint16)
    for mask in masks:
        mask[rng.integers(size, size=20), rng.integers(size, size=20)] = 200
    masks[2][:size // 2, :size // 2] = 0                                                    # no mask at all
    return masks


@pytest.mark.parametrize("hard", [False, True])
def test_shares_of_cells_equal_those_counted_region_by_region(hard):
    for mask in three_masks(np.random.default_rng(0), 96):
        share, slow = detcon.shares(mask, 3, hard), slow_shares(mask, 3)
        sets = [range(16)] if mask.dtype == np.uint16 else [range(256 * c, 256 * c + 256)
                                                            for c in range(len(share) // 256)]
        for regions in sets:
            for i, j in np.ndindex(3, 3):
                cell = {k: slow[k][i, j] for k in regions}
                if hard:                                                                    # the first of the largest
                    winner = max(cell, key=lambda k: (cell[k], -k))
                    cell = {k: float(k == winner and cell[k] > 0) for k in regions}
                assert {k: share[k, i, j] for k in regions} == pytest.approx(cell, abs=1e-12)


def test_a_size_that_32_does_not_divide_has_a_share_in_every_cell():
    for size in (33, 50, 100):
        share = detcon.shares(np.zeros((size, size), np.uint8), -(-size // 32))
        assert share.shape == (256, -(-size // 32), -(-size // 32)) and (share[0] == 1).all() and not share[1:].any()


def test_masks_are_pooled_by_share_by_winner_or_by_one_cell_within():
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 48:], mask[60:, :8] = 1, 2                                   # 1: half of the right cells; 2: wins no cell
    mask[:32, 40:] = 1                                                   # and 3/4 of the one above
    draw = lambda hard, one_cell: detcon.draw(detcon.shares(mask, 2, hard), 4000, np.random.default_rng(0), one_cell)
    ids, weights = draw(False, False)
    assert set(ids) == {0, 1, 2}
    assert weights[ids == 1][0].tolist() == [[0, 0.75], [0, 0.5]]
    assert weights[ids == 2][0].tolist() == [[0, 0], [1 / 32, 0]]
    ids, weights = draw(True, False)
    assert set(ids) == {0, 1}                                            # a tie goes to the first
    assert weights[ids == 1][0].tolist() == [[0, 1], [0, 0]] and weights[ids == 0][0].tolist() == [[1, 0], [1, 1]]
    ids, weights = draw(False, True)
    assert set(ids) == {0, 1, 2} and (np.sort(weights.reshape(-1, 4)) == [0, 0, 0, 1]).all()
    assert weights[ids == 1].mean(axis=0) == pytest.approx(np.array([[0, 0.6], [0, 0.4]]), abs=0.05)


def test_one_view_has_two_draws_of_its_masks_and_no_second_picture():
    image, labels = common.LazyImage(Image.new("RGB", (100, 60)), 0), np.arange(16, dtype=np.uint8).reshape(4, 4)
    batch = detcon.views(image, np.random.default_rng(0), lambda image: labels, 64, 40, count=1, keep=True)
    assert "x2" not in batch and batch["ids1"].tolist() != batch["ids2"].tolist()
    first = dict(zip(batch["ids1"].tolist(), batch["members1"]))
    second = dict(zip(batch["ids2"].tolist(), batch["members2"]))
    assert len(first.keys() & second.keys()) > 2
    assert all(torch.equal(first[k], second[k]) for k in first.keys() & second.keys())


def test_grid_membership_is_the_share_of_each_cell_in_the_square():
    image = common.LazyImage(Image.new("RGB", (100, 60)), 0)
    mask = detcon.crop_labels(np.arange(4, dtype=np.uint8).reshape(2, 2), (0, 0, 100, 60), image.size, 96)
    share = detcon.shares(mask, 3)
    assert share[0].tolist() == [[1, 0.5, 0], [0.5, 0.25, 0], [0, 0, 0]] and not share[4:].any()
    assert share[3].tolist() == [[0, 0, 0], [0, 0.25, 0.5], [0, 0.5, 1]]


def test_masks_move_with_the_picture_through_crop_and_mirror_in_both_views():
    rng, picture = np.random.default_rng(0), np.zeros((120, 200, 3), np.uint8)
    labels = np.zeros((120, 200), np.uint8)
    for k, (x1, y1, x2, y2) in enumerate([(0, 0, 90, 70), (100, 20, 180, 110), (10, 75, 80, 120)], start=1):
        picture[y1:y2, x1:x2, k - 1], labels[y1:y2, x1:x2] = 255, k
    image = common.LazyImage(Image.fromarray(picture), 0)
    mirrored = []
    for _ in range(200):
        batch = detcon.views(image, rng, lambda image: labels, 64, 16, keep=True)
        for i in (1, 2):
            x, ids, members = batch[f"x{i}"].float() / 255, batch[f"ids{i}"].tolist(), batch[f"members{i}"]
            for k, member in zip(ids, members):
                if k and 400 < member.sum() < 0.8 * 64 * 64:
                    assert x[k - 1][member].mean() > 0.85              # the object's color, but for the edge
                    assert x[k - 1][~member].mean() < 0.15
            cells = batch[f"masks{i}"]
            assert cells.shape == (16, 2, 2) and cells.sum(dim=(1, 2)).min() > 0
            torch.testing.assert_close(cells[0], F.avg_pool2d(members[:1].float(), 32)[0])
            if 1 in ids and 2 in ids and x[0].max() > 0.99 and x[1].max() > 0.99:
                center = [members[ids.index(k)].nonzero().float().mean(dim=0)[1] for k in (1, 2)]
                mirrored.append(bool(center[0] > center[1]))
    assert len(mirrored) > 50 and np.mean(mirrored) == pytest.approx(0.5, abs=0.12)


def test_16_masks_are_drawn_from_those_present_with_replacement_and_bits_may_overlap():
    bits = np.zeros((40, 40), np.uint16)
    bits[:20], bits[10:30, :30] = 1 << 3, bits[10:30, :30] | 1 << 15
    bits[10:20, :30] = 1 << 3 | 1 << 15
    draw = lambda mask, n: detcon.draw(detcon.shares(mask, 2), n, np.random.default_rng(0))
    ids, _ = draw(bits, 200)
    assert set(ids.tolist()) == {3, 15} and 60 < (ids == 3).sum() < 140
    assert detcon.member(bits, 3).sum() == 20 * 40 and detcon.member(bits, 15).sum() == 20 * 30
    three = np.stack([np.full((4, 4), 7), np.full((4, 4), 7), np.eye(4) * 9], axis=2).astype(np.uint8)
    ids, _ = draw(three, 100)
    assert set(ids.tolist()) == {7, 256 + 7, 512, 512 + 9}
    assert np.array_equal(detcon.member(three, 512 + 9), np.eye(4) > 0) and detcon.member(three, 256 + 7).all()
    ids, weights = draw(np.zeros((8, 8), np.uint16), 16)
    assert ids.tolist() == [-1] * 16 and (weights == 1).all()          # no mask at all: the view is one
    assert detcon.member(np.zeros((8, 8), np.uint16), -1).all()


def test_colors_are_those_of_the_table_in_a_1():
    s1, s2, b1, b2 = (detcon.color_augmentation(v, i, 224) for v in "sb" for i in (1, 2))
    assert s1.strength.tolist() == s2.strength.tolist() == pytest.approx([0.8, 0.8, 0.8, 0.2])
    assert b1.strength.tolist() == b2.strength.tolist() == pytest.approx([0.4, 0.4, 0.2, 0.1])
    assert [p.blur_p for p in (s1, s2, b1, b2)] == [1.0, 0.0, 1.0, 0.1]
    assert [p.solarize_p for p in (s1, s2, b1, b2)] == [0, 0, 0, 0.2] and s1.sigma == (0.1, 2.0)
    assert {type(p) for p in (s1, s2, b1, b2)} == {detcon.Colors}  # A.1: shifted by an offset


def test_felzenszwalb_separates_two_areas_and_large_pictures_are_segmented_small():
    picture = np.full((200, 300, 3), (200, 60, 40), np.uint8)
    picture[:, 150:] = (40, 60, 200)
    labels = detcon.felzenszwalb(common.LazyImage(Image.fromarray(picture), 0), [1000])
    assert labels.shape == (200, 300) and len(np.unique(labels)) == 2
    assert len(np.unique(labels[:, :145])) == len(np.unique(labels[:, 155:])) == 1
    large = common.LazyImage(Image.fromarray(picture).resize((1500, 1000)), 0)
    assert detcon.felzenszwalb(large, [500, 1000, 1500]).shape == (333, 500, 3)


@pytest.fixture
def folder(tmp_path):
    return common.ImageFolder(write_pictures(tmp_path / "data", 3))


@pytest.mark.parametrize("make, says", [
    (lambda path: None, "no mask"), (lambda path: path.write_bytes(b"torn"), "cannot identify"),
    (lambda path: Image.new("L", (40, 39)).save(path), "is 40 x 39, its image 40 x 40"),
    (lambda path: Image.new("I", (40, 40), 70000).save(path, "tiff"), "neither 8-bit"),
    (lambda path: Image.new("F", (40, 40)).save(path, "tiff"), "neither 8-bit"),
    (lambda path: Image.new("RGBA", (40, 40)).save(path), "neither 8-bit"),
    (lambda path: Image.new("LA", (40, 40)).save(path), "neither 8-bit")])
def test_a_mask_that_is_missing_or_wrong_is_named(folder, tmp_path, make, says):
    path = detcon.mask_path(tmp_path / "masks", folder, 1)
    path.parent.mkdir(parents=True)
    make(path)
    with pytest.raises(common.Unreadable, match=says):
        detcon.read_mask(folder.image(1), tmp_path / "masks", folder)


def test_masks_come_back_as_they_were_written(folder, tmp_path):
    path = detcon.mask_path(tmp_path / "masks", folder, 0)
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for mask in [rng.integers(0, 256, (40, 40)).astype(np.uint8), rng.integers(0, 65536, (40, 40)).astype(np.uint16),
                 rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)]:
        Image.fromarray(mask).save(path)
        back = detcon.read_mask(folder.image(0), tmp_path / "masks", folder)
        assert back.dtype == mask.dtype and np.array_equal(back, mask)


# --- model ---

def tiny(variant="s", **settings):
    common.seed_everything(0)
    return detcon.DetCon(**{**dict(arch="resnet18w0.25", variant=variant, size=64, hidden=24, dim=16), **settings})


def a_batch(n=4, m=6, size=64):
    g = torch.Generator().manual_seed(1)
    batch = {f"x{i}": torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8) for i in (1, 2)}
    batch |= {f"ids{i}": torch.randint(0, 4, (n, m), generator=g) for i in (1, 2)}
    return batch | {f"masks{i}": torch.rand(n, m, size // 32, size // 32, generator=g) for i in (1, 2)}


def plain(model):
    model.photometric = nn.ModuleList(common.Photometric() for _ in range(2))
    return model.eval()


@pytest.mark.parametrize("variant", ["s", "b"])
def test_model_pools_masks_and_contrasts_them_as_written_out_slowly(variant):
    model, batch = plain(tiny(variant)), a_batch()
    if variant == "b":
        for p in model.target.parameters():
            p.data += 0.05 * torch.randn(p.shape)

    def encode(network, i):
        c5 = network.backbone(model.photometric[0](batch[f"x{i}"]))[-1]
        rows = []
        for n in range(4):
            for mask in batch[f"masks{i}"][n]:
                h = sum(mask[a, b] * c5[n, :, a, b] for a in range(2) for b in range(2)) / mask.sum()
                rows.append(network.projector(h[None])[0])
        return torch.stack(rows).view(4, 6, -1)

    z = [encode(model.online, i) for i in (1, 2)]
    pred = [model.predictor(x.flatten(0, 1)).view_as(x) for x in z] if variant == "b" else z
    target = [encode(model.target, i) for i in (1, 2)] if variant == "b" else z
    loss, stats = model(batch)
    assert loss.item() == pytest.approx(slow_loss(*pred, *target, batch["ids1"], batch["ids2"], 0.1).item(), rel=1e-4)
    paired = [[any(a == b for b in batch["ids2"][n].tolist()) for a in batch["ids1"][n].tolist()] for n in range(4)]
    assert stats["paired"].item() == pytest.approx(np.mean(paired))


@pytest.mark.parametrize("variant", ["s", "b"])
def test_one_view_is_two_equal_views_to_a_network_without_batch_statistics(variant):
    model, batch = plain(tiny(variant)), a_batch()
    batch["x2"] = batch["x1"]
    two, _ = model(batch)
    del batch["x2"]
    assert model(batch)[0].item() == pytest.approx(two.item(), rel=1e-5)


def test_negatives_from_two_images_at_a_time_are_the_loss_of_each_two_alone():
    model, batch = plain(tiny(negatives=2)), a_batch()
    halves = [{name: x[part] for name, x in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    loss = model(batch)[0].item()
    model.negatives = None
    assert loss == pytest.approx(np.mean([model(half)[0].item() for half in halves]), rel=1e-5)
    assert loss < model(batch)[0].item() - 0.3


def test_accuracy_is_one_for_a_network_that_knows_and_zero_for_one_that_says_the_same_to_all():
    model, ids = tiny(), torch.tensor([[0, 1, 1], [0, 2, 5]])
    own = F.one_hot(ids + 8 * torch.arange(2)[:, None], 16).float()
    assert model.stats(own, own, ids, ids)["accuracy"] == 1
    assert model.stats(torch.ones(2, 3, 16), torch.ones(2, 3, 16), ids, ids)["accuracy"] == 0
    assert model.stats(own, own.flip(0), ids, ids)["accuracy"] == 0


def test_every_residual_block_starts_as_the_identity_and_no_head_has_a_bias_in_its_last_layer():
    model = tiny("b")
    blocks = [block for stage in (1, 2, 3, 4) for block in getattr(model.online.backbone, f"layer{stage}")]
    x = torch.rand(2, blocks[1].conv1.in_channels, 8, 8)
    assert torch.equal(blocks[1](x), x) and all(not block.bn2.weight.any() for block in blocks)
    for head in (model.online.projector, model.predictor, model.target.projector):
        assert head[0].bias is not None and head[3].bias is None


@pytest.mark.parametrize("variant", ["s", "b"])
def test_a_step_trains_the_online_network_and_b_s_target_follows_by_momentum_alone(variant):
    model = tiny(variant)
    before = [p.clone() for p in model.target.parameters()] if variant == "b" else []
    optimizer = common.LARS([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # at first the convolutions of a block lie behind a gamma of 0
        optimizer.zero_grad()
        loss, _ = model(a_batch())
        loss.backward()
        optimizer.step()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum()]
    assert not [name for name in silent if not name.endswith("0.bias")]
    model.update(0.9)
    if variant == "b":
        for old, t, o in zip(before, model.target.parameters(), model.online.parameters()):
            torch.testing.assert_close(t, 0.9 * old + 0.1 * o.detach())
    else:
        assert not hasattr(model, "target") and not hasattr(model, "predictor")


def test_resnet200_has_the_papers_size_at_twice_the_width_and_trains_a_step():
    with torch.device("meta"):
        backbone = common.resnet("resnet200w2")
    assert backbone.channels == [512, 1024, 2048, 4096]
    assert 240e6 < sum(p.numel() for p in backbone.parameters()) < 260e6                  # Table 3: 250 million
    model = tiny("s", arch="resnet200w0.25", size=32)                                     # as deep
    optimizer = common.LARS(model.parameters(), lr=0.1)
    before = model.online.backbone.conv1.weight.clone()
    loss, _ = model(a_batch(n=2, m=2, size=32))
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and not torch.equal(before, model.online.backbone.conv1.weight)


# --- the script ---

def arguments(data, out, *more):
    return ["--data", str(data), "--out", str(out), "--arch", "resnet18w0.25", "--size", "32", "--batch-size", "16",
            "--hidden",
            "32", "--dim", "16", "--warmup", "1", "--workers", "0", "--print-every", "1", "--fh-scale", "50",
            *map(str, more)]


@pytest.mark.parametrize("variant", ["s", "b"])
def test_a_run_makes_its_masks_and_goes_on_where_it_stopped(pictures, tmp_path, monkeypatch, variant):
    plan = ["--epochs", 2, "--variant", variant]
    assert run(monkeypatch, *arguments(pictures, tmp_path / "whole", *plan)) == 0
    assert run(monkeypatch, *arguments(pictures, tmp_path / "parts", *plan, "--max-steps", 2)) == 0
    assert run(monkeypatch, *arguments(pictures, tmp_path / "parts", *plan)) == 0
    assert len(list((tmp_path / "whole" / "fh-50").rglob("*.png"))) == 48
    log = rows(tmp_path / "whole")
    assert without_speed(log) == without_speed(rows(tmp_path / "parts")) and len(log) == 6
    assert {"loss", "accuracy", "positive", "paired"} <= set(log[0])
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    with Image.open(tmp_path / "whole" / "views.png") as picture:
        assert picture.width > 500 and picture.height > 2 * picture.width - 100


def test_masks_made_before_are_not_made_again(pictures, tmp_path, monkeypatch):
    plan = arguments(pictures, tmp_path, "--prepare")
    monkeypatch.setattr(detcon, "DetCon", None)                        # which takes no model
    assert run(monkeypatch, *plan) == 0
    files = sorted((tmp_path / "fh-50").rglob("*.png"))
    files[0].unlink()
    Image.new("L", (40, 40), 77).save(files[1])
    assert run(monkeypatch, *plan) == 0
    assert files[0].exists() and np.asarray(Image.open(files[1])).min() == 77


def test_masks_can_be_made_of_the_drawn_shapes_too_whose_names_have_no_extension(tmp_path, monkeypatch):
    monkeypatch.setitem(detcon.DEMO, "epochs", 1)
    monkeypatch.setattr(common.Run, "monitor", lambda *args, **more: None)
    monkeypatch.setattr(common, "open_data", lambda args, single: (common.Shapes(70, 48).draw_all(), None))
    assert run(monkeypatch, "--masks", "fh", "--out", tmp_path, "--workers", 0) == 0
    assert len(list((tmp_path / "fh-1000").glob("*.png"))) == 70 and not rows(tmp_path)


def test_an_unknown_backbone_is_reported_before_any_mask_is_made(pictures, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *arguments(pictures, tmp_path, "--arch", "resnet51")) == 2
    assert "unknown --arch resnet51" in capsys.readouterr().err and not (tmp_path / "fh-50").exists()


def test_two_processes_make_masks_and_train_and_one_goes_on(pictures, tmp_path, monkeypatch):
    plan = arguments(pictures, tmp_path, "--epochs", 2)
    assert in_two_processes(detcon, *plan, "--max-steps", 4) == [0, 0]
    assert run(monkeypatch, *plan) == 0
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 7))
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path))


@pytest.mark.parametrize("more", [["--masks", "grid1"], ["--masks", "grid5", "--variant", "b"], ["--schedule", "steps"],
                                  ["--fh-scale", 20, 50, 80], ["--amp", "bf16", "--size", 48],
                                  ["--mask-pooling", "hard", "--masks", "grid5"],
                                  ["--mask-pooling", "sample", "--masks", "grid5", "--views", 1, "--negatives", 4]])
def test_every_variant_trains(pictures, tmp_path, monkeypatch, more):
    assert run(monkeypatch, *arguments(pictures, tmp_path, "--max-steps", 2, *more)) == 0


@pytest.mark.parametrize("more, says", [
    (["--masks", "grid17"], "grid1 to grid16"), (["--masks", "/no/such"], "no such folder"),
    (["--masks", "truth"], "drawn shapes"),
    (["--masks", "grid5", "--prepare"], "nothing to make"), (["--fh-scale", "5", "6"], "one scale or three"),
    (["--momentum", "0.9"], "DetCon-S has no target network"), (["--negatives", "5"], "does not divide the 16 images")])
def test_usage_errors_end_with_2_and_one_line(pictures, tmp_path, monkeypatch, capsys, more, says):
    assert run(monkeypatch, *arguments(pictures, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_torn_jpeg_is_named_and_the_masks_of_the_others_are_made(tmp_path, monkeypatch, capfd):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (200, 200, 3)).astype(np.uint8)).save(tmp_path / "data" / f"{i}.jpg")
    torn = (tmp_path / "data" / "2.jpg").read_bytes()
    (tmp_path / "data" / "2.jpg").write_bytes(torn[:len(torn) // 2])
    assert run(monkeypatch, *arguments(tmp_path / "data", tmp_path / "out", "--prepare")) == 0
    made = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    assert made == [".lock", "0.png", "1.png", "3.png", "fh-50"]
    assert "truncated" in capfd.readouterr().err


def test_two_images_that_would_share_a_mask_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    for name in ("a.jpg", "a.png", "b.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / "data" / name)
    assert run(monkeypatch, *arguments(tmp_path / "data", tmp_path / "out", "--prepare")) == 2
    assert "2 images are named a" in capsys.readouterr().err


def test_settings_follow_the_variant_as_the_appendix_has_them(pictures, tmp_path, monkeypatch):
    def settings(*more):
        monkeypatch.setattr(sys, "argv", ["detcon.py", "--data", str(pictures), *more])
        return detcon.arguments()

    s, b, long = settings(), settings("--variant", "b"), settings("--variant", "b", "--epochs", "1000")
    assert (s.lr, s.weight_decay, s.hidden, s.dim, s.num_masks) == (4.8, 1e-6, 2048, 128, 16)
    assert (b.lr, b.weight_decay, b.hidden, b.dim, b.momentum) == (4.8, 1e-6, 4096, 256, 0.99)
    assert (long.lr, long.weight_decay, long.momentum) == (3.2, 1.5e-6, 0.996)
    assert settings("--masks", "grid1").num_masks == 1 and settings("--masks", "grid2").num_masks == 16


def test_a_run_goes_on_with_its_masks_moved_but_not_with_others(pictures, tmp_path, monkeypatch, capsys):
    plan = lambda masks, steps: arguments(pictures, tmp_path / "out", "--masks", masks, "--max-steps", steps)
    assert run(monkeypatch, *arguments(pictures, tmp_path, "--prepare")) == 0
    assert run(monkeypatch, *plan(tmp_path / "fh-50", 2)) == 0
    (tmp_path / "fh-50").rename(tmp_path / "moved")
    assert run(monkeypatch, *plan(tmp_path / "moved", 3)) == 0 and len(rows(tmp_path / "out")) == 3
    for path in (tmp_path / "moved").rglob("*.png"):
        Image.new("L", (40, 40)).save(path)
    assert run(monkeypatch, *plan(tmp_path / "moved", 4)) == 2
    assert "other settings: masks" in capsys.readouterr().err


def test_a_folder_of_other_masks_ends_the_run(pictures, tmp_path, monkeypatch, capsys):
    (tmp_path / "masks").mkdir()
    assert run(monkeypatch, *arguments(pictures, tmp_path / "out", "--masks", tmp_path / "masks")) == 2
    assert "no mask" in capsys.readouterr().err
