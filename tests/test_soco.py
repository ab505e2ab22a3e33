"""SoCo: geometry against painted pictures, the model against slow formulas, proposals, the script as a user runs it."""
import itertools
import math
import os
import resource
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image

import common
import soco
from conftest import (assert_same_weights, exit_code, fork, in_processes, in_two_processes, rows, run_script, script,
                      weights, without_speed, write_pictures)

run = partial(run_script, soco)
SIZES = [64, 64, 32, 54]


def painted(size, box):
    """A blue picture of (width, height) with a red box."""
    picture = np.full((size[1], size[0], 3), (0, 0, 255), np.uint8)
    x1, y1, x2, y2 = box
    picture[y1:y2, x1:x2] = (255, 0, 0)
    return common.LazyImage(Image.fromarray(picture), 0)


def extent(view):
    """The place of the paint in a view [3, S, S]: x1, y1, x2, y2 to a fraction of a pixel, by how red its edges are."""
    red = view[0].double() / 255
    across, down = red.amax(dim=0), red.amax(dim=1)
    edges = lambda line: (line.nonzero()[0].item() + 1 - line[line.nonzero()[0]].item(),
                          line.nonzero()[-1].item() + line[line.nonzero()[-1]].item())
    (x1, x2), (y1, y2) = edges(across), edges(down)
    return torch.tensor([x1, y1, x2, y2])


# --- views ---

@pytest.mark.parametrize("size", [(320, 200), (90, 333), (64, 64), (70, 130)])
def test_paint_stays_in_its_box_through_crop_resize_and_flip_in_every_view(size):
    rng = np.random.default_rng(0)
    for _ in range(150):
        w, h = (int(side * rng.uniform(0.35, 0.7)) for side in size)
        x, y = int(rng.integers(size[0] - w + 1)), int(rng.integers(size[1] - h + 1))
        box = x, y, x + w, y + h
        batch = soco.object_views(painted(size, box), rng, lambda image, rng: np.array([box], float), SIZES, 2, 0.0)
        for i, side in enumerate(SIZES, start=1):
            assert batch[f"view{i}"].shape == (3, side, side) and batch[f"view{i}"].dtype == torch.uint8
            assert (batch[f"boxes{i}"][0] - extent(batch[f"view{i}"])).abs().max() < 1, (i, size, box)
            assert torch.equal(batch[f"boxes{i}"][0], batch[f"boxes{i}"][1])  # one proposal, twice, without jitter


def test_jittered_boxes_stay_within_a_tenth_of_the_paint_and_in_the_view():
    rng, moved = np.random.default_rng(1), []
    box = 60, 30, 180, 130
    for _ in range(300):
        batch = soco.object_views(painted((320, 200), box), rng, lambda image, rng: np.array([box], float), SIZES, 4,
                                  0.5)
        for i, side in enumerate(SIZES, start=1):
            boxes, paint = batch[f"boxes{i}"], extent(batch[f"view{i}"])
            # a crop shows .61 of a side or more
            reach = 0.15 * torch.tensor([120 / 320, 100 / 200] * 2) * side / 0.61 + 1
            assert ((boxes - paint).abs() <= reach).all()              # a tenth of the center, half a tenth of the side
            assert boxes.min() >= 0 and boxes.max() <= side and (boxes[:, 2:] - boxes[:, :2]).min() > 3
            moved.append(((boxes - paint).abs().amax(dim=1) > 1).float().mean().item())
    assert 0.3 < np.mean(moved) < 0.5                                  # half of them, less those moved by little


def test_box_jitter_moves_center_and_side_by_up_to_a_tenth_each_on_its_own_draw():
    boxes = np.tile([10.0, 20, 50, 120], (20000, 1))                   # 40 wide, 100 high
    out = soco.jitter(boxes, 0.5, np.random.default_rng(0))
    still = (out == boxes).all(axis=1)
    assert still.mean() == pytest.approx(0.5, abs=0.02)
    x, y = (out[~still, :2] + out[~still, 2:]).T / 2
    w, h = (out[~still, 2:] - out[~still, :2]).T
    draws = np.stack([(x - 30) / 40, (y - 70) / 100, (w - 40) / 40, (h - 100) / 100])
    assert np.abs(draws).max() <= 0.1 + 1e-9 and np.abs(draws).max(axis=1) == pytest.approx([0.1] * 4, abs=1e-3)
    assert draws.var(axis=1) == pytest.approx([0.2 ** 2 / 12] * 4, rel=0.05)
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.03


def test_a_box_is_jittered_before_the_view_clips_it():
    image, rng = painted((320, 200), (0, 0, 1, 1)), np.random.default_rng(0)
    beyond = lambda image, rng: np.array([[-100.0, -60, 420, 260]])    # more than .15 of its side beyond every border
    # jitter may take it out of V2, all but 16 of 224 pixels
    left = lambda image, rng: np.array([[-300.0, -300, 200, 500]])
    for _ in range(100):
        batch = soco.object_views(image, rng, beyond, SIZES, 2, 1.0)
        assert all((batch[f"boxes{i}"] == torch.tensor([0.0, 0, s, s])).all() for i, s in enumerate(SIZES, start=1))
        batch = soco.object_views(image, rng, left, SIZES, 2, 1.0)
        for i, side in enumerate(SIZES, start=1):
            x1, y1, x2, y2 = batch[f"boxes{i}"].T
            assert ((x2 - x1) > 0.071 * side).all() and ((y2 - y1) == side).all()


def test_v1_is_the_whole_image_v2_half_of_it_or_more_and_v3_shows_the_same_as_v2():
    ramp = np.stack([*np.meshgrid(np.linspace(0, 255, 300), np.linspace(0, 255, 300)), np.zeros((300, 300))], axis=-1)
    image = common.LazyImage(Image.fromarray(ramp.astype(np.uint8)), 0)
    rng, flips, areas = np.random.default_rng(0), [], []
    for _ in range(200):
        batch = soco.object_views(image, rng, lambda image, rng: np.array([[30.0, 30, 270, 270]]), SIZES, 1, 0.0)
        span = [(v[:2].amax(dim=(1, 2)).float() - v[:2].amin(dim=(1, 2)).float()) / 255 for v in
                (batch[f"view{i}"] for i in range(1, 5))]                                # share of the image: x, y
        assert span[0].min() > 0.97
        assert (span[1] - span[2]).abs().max() < 0.06
        areas.append([(s[0] * s[1]).item() for s in (span[1], span[3])])
        flips.append([bool(batch[f"view{i}"][0, 0, 0] > batch[f"view{i}"][0, 0, -1]) for i in range(1, 5)])
        boxes = lambda i: batch[f"boxes{i}"].numpy()
        whole = lambda i: (0, 0, SIZES[i - 1], SIZES[i - 1])
        straight = lambda i: common.to_view(boxes(i), whole(i), SIZES[i - 1], flip=flips[-1][i - 1])
        assert straight(2) == pytest.approx(2 * straight(3), abs=1e-3)
    areas = np.array(areas)
    assert areas.min() > 0.45 and areas.max() > 0.9 and abs(np.corrcoef(areas.T)[0, 1]) < 0.2  # V2, V4: two crops
    assert np.mean(flips, axis=0) == pytest.approx([0.5] * 4, abs=0.12)
    assert np.abs(np.corrcoef(np.array(flips).T) - np.eye(4)).max() < 0.25


def test_k_different_proposals_are_taken_where_there_are_as_many_and_copies_where_there_are_fewer():
    boxes = np.array([[10.0 * k, 10 + k, 10 * k + 60, 80] for k in range(6)])
    image, rng = painted((120, 100), (0, 0, 1, 1)), np.random.default_rng(0)
    seen, twice = set(), set()
    for _ in range(100):
        taken = soco.object_views(image, rng, lambda image, rng: boxes, [64, 64], 4, 0.0)["boxes1"]
        assert len({tuple(b) for b in taken.tolist()}) == 4
        seen |= {round(b[1], 2) for b in taken.tolist()}
        few = soco.object_views(image, rng, lambda image, rng: boxes[:3] / 2 + 20, [64, 64], 4, 0.0)["boxes1"]
        copies = Counter(tuple(b) for b in few.tolist())
        assert sorted(copies.values()) == [1, 1, 2]                    # none is lost
        twice.add(copies.most_common(1)[0][0])
    assert len(seen) == 6 and len(twice) >= 3                          # all come up


@pytest.mark.parametrize("boxes", [np.zeros((0, 4)), np.array([[1.0, 1, 4, 4]])])
def test_an_image_with_no_proposal_in_sight_is_one_whole_object_in_every_view(boxes):
    batch = soco.object_views(painted((200, 100), (0, 0, 9, 9)), np.random.default_rng(0), lambda image, rng: boxes,
                              SIZES, 3, 0.0)
    for i, side in enumerate(SIZES, start=1):
        assert torch.equal(batch[f"boxes{i}"], torch.tensor([0.0, 0, side, side]).expand(3, 4))


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (5, 5)])
def test_images_smaller_than_a_box_give_views_and_boxes_all_the_same(size):
    for boxes in [np.array([[-50.0, -20, 300, 200]]), np.array([[0.0, 0, *size]])]:
        batch = soco.object_views(painted(size, (0, 0, 1, 1)), np.random.default_rng(0), lambda image, rng: boxes,
                                  SIZES, 2, 0.5)
        for i, side in enumerate(SIZES, start=1):
            b = batch[f"boxes{i}"]
            assert b.min() >= 0 and b.max() <= side and (b[:, 2:] - b[:, :2] > 0.7 * side).all()
    assert soco.filter_proposals(np.array([[0.0, 0, 1, 1]]), (1, 1)).tolist() == [[0, 0, 1, 1]]


def test_a_proposal_counts_as_inside_with_16_of_224_pixels_a_side():
    crop = np.array([100.0, 50, 100 + 448, 50 + 112])  # a pixel of the view is 2 wide and half a pixel high
    boxes = np.array([[50.0, 0, 132.1, 58.1], [50, 0, 131.9, 58.1], [50, 0, 132.1, 57.9], [548, 50, 700, 100]])
    assert soco.inside(boxes, crop).tolist() == [True, False, False, False]


# --- model ---

TINY = dict(arch="resnet18w0.25", size=64, hidden=24, dim=16)


def tiny(**settings):
    common.seed_everything(0)
    model = soco.SoCo(**{**TINY, **settings})
    for p in model.online.backbone.parameters():  # a block whose last gamma is 0 hides its other weights
        if p.ndim == 1:
            p.data += 0.2 * torch.rand(p.shape)
    for p in model.target.parameters():                                # so that a mix-up of the two networks shows
        p.data += 0.05 * torch.randn(p.shape)
    return model


def plain(model):
    """No color draws, and BN with made-up running statistics."""
    model.photometric = nn.ModuleList(common.Photometric() for _ in model.photometric)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.uniform_(-0.1, 0.1), m.running_var.uniform_(0.5, 1.5)
    return model.eval()


def a_batch(n=4, k=3, sizes=SIZES, seed=1):
    g = torch.Generator().manual_seed(seed)
    batch = {}
    for i, side in enumerate(sizes, start=1):
        low = torch.rand(n, k, 2, generator=g) * 0.5 * side
        high = low + (0.1 + 0.4 * torch.rand(n, k, 2, generator=g)) * side
        high[0, 0], low[0, 0], high[-1, -1] = side, 0, side           # the whole view, and one that ends at the border
        batch |= {f"view{i}": torch.randint(0, 256, (n, 3, side, side), generator=g, dtype=torch.uint8),
                  f"boxes{i}": torch.cat([low, high], dim=2)}
    return batch


def test_levels_change_at_48_96_and_192_pixels_of_a_view_of_224_and_in_proportion():
    sides = [1, 48, 48.1, 96, 96.1, 192, 192.1, 224]  # Sec. 3.3: 0-48^2, 49^2-96^2, 97^2-192^2, 193^2-224^2
    boxes = torch.tensor([[5.0, 7, 5 + side, 7 + side] for side in sides])
    assert soco.assign_levels(boxes, 224).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert soco.assign_levels(boxes / 2, 112).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    # V3: the same objects, a level lower
    assert soco.assign_levels(boxes / 2, 224).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert soco.assign_levels(torch.tensor([[0.0, 0, 192, 192]]), 224).tolist() == [2]      # all of V4
    wide = torch.tensor([[0.0, 0, 24, 96], [0, 0, 24.1, 96]])                        # it is the area that counts
    assert soco.assign_levels(wide, 224).tolist() == [0, 1]


@pytest.mark.parametrize("side", [224, 112, 100, 32])
def test_pooling_the_assigned_level_equals_pooling_all_levels_and_keeping_one(side):
    g = torch.Generator().manual_seed(0)
    sides = [math.ceil(side / stride) for stride in (4, 8, 16, 32)]
    pyramid = [torch.randn(2, 5, s, s, generator=g, dtype=torch.float64, requires_grad=True) for s in sides]
    low = torch.rand(2, 40, 2, generator=g, dtype=torch.float64) * side * 0.9
    boxes = torch.cat([low, low + torch.rand(2, 40, 2, generator=g, dtype=torch.float64) * (side - low)], dim=2)
    boxes[:, 0] = torch.tensor([0.0, 0, side, side])
    boxes[:, 1] = torch.tensor([side - 2.0, side - 2, side, side])
    levels = torch.randint(0, 4, (2, 40), generator=g)
    ours = soco.pyramid_roi_align(pyramid, boxes, levels, 7)
    weight = torch.randn(ours.shape, generator=g, dtype=torch.float64)
    our_grads = torch.autograd.grad((ours * weight).sum(), pyramid)
    every = torch.stack([torchvision.ops.roi_align(p, list(boxes), 7, 1 / stride, aligned=True)
                         for p, stride in zip(pyramid, (4, 8, 16, 32))])
    torch.testing.assert_close(soco.pyramid_roi_align(pyramid, boxes, None, 7), every.sum(dim=0))
    slow = every[levels.flatten(), torch.arange(80)]
    torch.testing.assert_close(ours, slow)
    for a, b in zip(our_grads, torch.autograd.grad((slow * weight).sum(), pyramid)):
        torch.testing.assert_close(a, b)


def test_without_head_and_levels_a_box_is_the_average_of_what_all_levels_pool():
    model, batch = plain(tiny(head=False, levels=False)), a_batch()
    encoder, x = model.online, model.photometric[0](batch["view1"])
    encoder.projector = nn.Identity()
    pyramid = encoder.fpn(dict(enumerate(encoder.backbone(x))))
    slow = sum(torchvision.ops.roi_align(p, list(batch["boxes1"]), 7, 1 / (4 * 2 ** level), aligned=True)
               for level, p in pyramid.items()).mean(dim=(2, 3))
    torch.testing.assert_close(encoder(x, batch["boxes1"]), slow)
    assert not list(encoder.head.parameters())


def probed_boxes(scenes):
    """How many boxes a process has the features of after it has pooled those of its share of the scenes."""
    encoder = tiny().online.eval()
    encode = lambda views, boxes: encoder.pool(encoder.backbone(common.Photometric()(views)), boxes)
    with torch.no_grad():
        rows, classes = common.box_features(encode, scenes, range(len(scenes)), 48, torch.device("cpu"))
    assert {len(x) for x in rows.values()} == {len(classes)} and {"pyramid", "head"} <= rows.keys()
    return len(classes)


def test_processes_with_unequal_shares_probe_together():
    scenes = common.Shapes(129, 48).draw_all()  # 65 and 64 of them: two batches of 64, and one
    assert in_processes(2, probed_boxes, scenes) == [sum(map(len, scenes.boxes))] * 2


def encode_slowly(encoder, view, box, size):
    """Eq. 1 and the projector for one box of one view [3, S, S], with torchvision's parts put together anew."""
    x = ((view.float() / 255 - torch.tensor(common.MEAN).view(3, 1, 1)) / torch.tensor(common.STD).view(3, 1, 1))[None]
    c2, c3, c4, c5 = encoder.backbone(x)
    if encoder.detector == "fpn":
        pyramid = encoder.fpn({"0": c2, "1": c3, "2": c4, "3": c5})
        side = math.sqrt((box[2] - box[0]) * (box[3] - box[1])) * 224 / size
        level = 0 if side <= 48 else 1 if side <= 96 else 2 if side <= 192 else 3
        roi = torchvision.ops.roi_align(pyramid[str(level)], [box[None]], 7, 1 / 2 ** (level + 2), aligned=True)
        h = encoder.head(roi)
    else:
        roi = torchvision.ops.roi_align(c4, [box[None]], 14, 1 / 16, aligned=True)
        h = F.adaptive_avg_pool2d(encoder.backbone.layer4(roi), 1).flatten(1)
    return encoder.projector(h)[0]


@pytest.mark.parametrize("detector, views", [("fpn", 2), ("fpn", 3), ("fpn", 4), ("c4", 2)])
def test_loss_equals_equations_1_to_6_written_out_box_by_box(detector, views):
    model, batch = plain(tiny(detector=detector, views=views)), a_batch(sizes=SIZES[:views])
    loss, stats = model(batch)
    online = lambda i, n, k: model.predictor(encode_slowly(model.online, batch[f"view{i}"][n],
                                                           batch[f"boxes{i}"][n, k], 64)[None])[0]
    target = lambda i, n, k: encode_slowly(model.target, batch[f"view{i}"][n], batch[f"boxes{i}"][n, k], 64)
    cosine = lambda a, b: (a @ b / a.norm() / b.norm()).item()
    total, forth_and_back = 0.0, {i: [] for i in range(2, views + 1)}
    for n, k, i in itertools.product(range(4), range(3), range(2, views + 1)):
        forth, back = cosine(online(1, n, k), target(i, n, k)), cosine(online(i, n, k), target(1, n, k))
        total += (-2 * forth - 2 * back) / 3 / 4                       # 1/K over proposals, mean over images
        forth_and_back[i] += [forth, back]
    assert loss.item() == pytest.approx(total, abs=1e-4)
    for i, values in forth_and_back.items():
        assert stats[f"cosine{i}"].item() == pytest.approx(np.mean(values), abs=1e-4)


def test_loss_is_symmetric_in_two_views():
    model, batch = plain(tiny(views=2)), a_batch(sizes=[64, 64])
    swapped = {name[:-1] + {"1": "2", "2": "1"}[name[-1]]: x for name, x in batch.items()}
    assert model(batch)[0].item() == pytest.approx(model(swapped)[0].item(), abs=1e-5)


@pytest.mark.parametrize("views", [3, 4])
def test_every_view_passes_each_network_once(views):
    model, passes = tiny(views=views), []
    for name in ("online", "target"):
        record = lambda module, x, y, name=name: passes.append((name, x[0].shape[-1]))
        getattr(model, name).backbone.register_forward_hook(record)
    model(a_batch(sizes=SIZES[:views]))
    assert sorted(passes) == sorted((name, side) for name in ("online", "target") for side in SIZES[:views])


@pytest.mark.parametrize("detector", ["fpn", "c4"])
def test_a_step_trains_all_of_the_online_network_and_the_target_follows_by_momentum_alone(detector):
    views = 3 if detector == "fpn" else 2
    model = tiny(detector=detector, views=views)
    before = {name: p.clone() for name, p in model.target.named_parameters()}
    optimizer = common.LARS([*model.online.parameters(), *model.predictor.parameters()], lr=1.0, weight_decay=1e-5)
    loss, _ = model(a_batch(sizes=SIZES[:views]))
    loss.backward()
    silent = [name for name, p in model.named_parameters() if not name.startswith("target.")
              and (p.grad is None or not p.grad.abs().sum())]
    # a bias in front of a BN changes nothing
    assert not [name for name in silent if not name.endswith("0.bias")], silent
    assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.target.named_parameters())
    model.update(0.9)
    online = dict(model.online.named_parameters())
    for name, p in model.target.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * online[name].detach())
    assert not any(name.startswith("predictor") for name in dict(model.target.named_modules()))


def test_std_is_zero_for_a_collapsed_network_and_about_one_over_root_dim_for_a_spread_one():
    model, batch = tiny(views=2, dim=256), a_batch(8, sizes=[64, 64])
    model.target.forward = lambda x, boxes: torch.randn(len(x) * boxes.shape[1], 256)
    assert model(batch)[1]["std"].item() == pytest.approx(1 / 16, rel=0.1)
    model.target.forward = lambda x, boxes: torch.ones(len(x) * boxes.shape[1], 256)
    assert model(batch)[1]["std"].item() == pytest.approx(0, abs=1e-6)


def test_fpn_and_head_are_those_of_detectron2s_mask_rcnn_with_norms():
    encoder = soco.ObjectEncoder("resnet50", "fpn", 224, 4096, 256)
    shapes = {name: tuple(p.shape) for name, p in encoder.state_dict().items()}
    assert [shapes[f"fpn.inner_blocks.{i}.0.weight"]
            for i in range(4)] == [(256, c, 1, 1) for c in (256, 512, 1024, 2048)]
    assert [shapes[f"fpn.layer_blocks.{i}.0.weight"] for i in range(4)] == [(256, 256, 3, 3)] * 4
    assert [shapes[f"head.{i}.0.weight"] for i in range(4)] == [(256, 256, 3, 3)] * 4
    assert shapes["head.5.weight"] == (1024, 256 * 49) and shapes["fpn.inner_blocks.0.1.running_var"] == (256,)
    assert shapes["projector.0.weight"] == (4096, 1024) and shapes["projector.3.weight"] == (256, 4096)
    c4 = soco.ObjectEncoder("resnet50", "c4", 224, 4096, 256)
    assert not any(name.startswith(("fpn", "head")) for name in c4.state_dict()) and c4.projector[0].in_features == 2048


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def gradients():
    """Loss and gradients of a training step, BN on, of this process's share of one batch of 4, in float64."""
    model, batch = tiny(views=3).double(), a_batch(sizes=SIZES[:3])
    model.photometric = nn.ModuleList(nn.Sequential(common.Photometric(), Double()) for _ in range(3))
    share = 4 // common.world_size()
    ddp = common.wrap_ddp(model, torch.device("cpu"))
    loss, _ = ddp({name: x[common.rank() * share:][:share] for name, x in batch.items()})
    loss.backward()
    grads = [p.grad.numpy() for p in [*model.online.parameters(), *model.predictor.parameters()]]
    return loss.item(), grads, [b.numpy() for b in model.buffers()]


def test_two_processes_equal_one_by_synchronized_batchnorm():
    loss, alone, buffers = gradients()
    results = in_processes(2, gradients)
    assert np.mean([r[0] for r in results]) == pytest.approx(loss, abs=1e-6)
    for _, together, their_buffers in results:
        for a, b in zip([*alone, *buffers], [*together, *their_buffers]):
            assert np.abs(a - b).max() <= 1e-6 + 1e-5 * np.abs(a).max()


# --- proposals ---

def box_of(w, h, x=5, y=5):
    return [x, y, x + w, y + h]


def test_proposals_are_kept_by_aspect_and_size_with_both_ends_included():
    size = 200, 50                                                     # sqrt(WH) is 100
    kept = [box_of(30, 30), box_of(60, 20), box_of(20, 60), box_of(80, 80), box_of(90, 30)]
    dropped = [box_of(29, 30), box_of(62, 20), box_of(20, 62), box_of(80, 81), box_of(10, 10)]
    assert soco.filter_proposals(np.array(kept + dropped, float), size).tolist() == kept


def test_an_image_whose_proposals_all_fail_falls_back_step_by_step():
    keep = lambda *boxes: soco.filter_proposals(np.array(boxes, float).reshape(-1, 4), (200, 200)).tolist()
    good, small, tiny = box_of(60, 60), box_of(40, 32), box_of(31, 31)
    long, thin = box_of(190, 32), box_of(190, 31)
    assert keep(tiny, thin, long, small, good) == [good]               # the paper's requirements
    assert keep(tiny, thin, long, small) == [small]                    # the aspect alone, and 32 pixels a side
    assert keep(tiny, thin, long) == [long]                            # 32 pixels a side
    assert keep(tiny, thin) == keep() == [[0, 0, 200, 200]]            # the whole image


@pytest.mark.parametrize("size", [(100, 100), (500, 333), (90, 600)])
def test_random_boxes_lie_in_the_image_and_pass_the_papers_filter(size):
    boxes = soco.random_boxes(size, 2000, np.random.default_rng(0))
    assert boxes.min() >= 0 and (boxes[:, 2:] <= np.array(size) + 1e-6).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    scale = np.sqrt(w * h / size[0] / size[1])
    assert len(boxes) > 1000 and scale.min() >= 0.3 and scale.max() <= 0.8 and scale.std() > 0.05
    assert (w / h).min() >= 1 / 3 and (w / h).max() <= 3
    center = (boxes[:, :2] + boxes[:, 2:]) / 2 / size
    assert center.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.02)


def test_there_are_a_hundred_random_boxes_in_every_image_of_usual_shape_and_a_strip_is_one_object():
    rng = np.random.default_rng(0)
    for size in [(500, 375), (300, 500), (500, 200), (64, 64)]:
        assert min(len(soco.random_boxes(size, 100, rng)) for _ in range(100)) == 100
    assert soco.random_boxes((10, 1000), 100, rng).tolist() == [[0, 0, 10, 1000]]


@pytest.mark.parametrize("size, orientation", [((300, 200), 1), ((1500, 1000), 1), ((300, 200), 6)])
def test_selective_search_finds_an_object_in_pixels_of_the_upright_image(size, orientation, tmp_path):
    rng = np.random.default_rng(0)
    picture = np.full((size[1], size[0], 3), (70, 120, 60), np.uint8)
    x1, y1, x2, y2 = (int(side * share) for side, share in zip(size * 2, (0.2, 0.3, 0.6, 0.8)))
    picture[y1:y2, x1:x2] = (200, 60, 40)
    image = Image.fromarray((picture + rng.normal(0, 3, picture.shape)).clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image if orientation == 1 else image.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "1.jpg", exif=exif, quality=95)
    boxes = soco.find_objects(common.ImageFolder(tmp_path), 0)
    iou = torchvision.ops.box_iou(torch.tensor([[x1, y1, x2, y2]]).float(), torch.from_numpy(boxes))
    assert iou.max() > 0.95
    assert np.array_equal(boxes, soco.find_objects(common.ImageFolder(tmp_path), 0))


def test_an_undecodable_file_is_named_and_has_no_proposals(tmp_path, capsys):
    (tmp_path / "torn.jpg").write_bytes(b"no picture")
    assert soco.find_objects(common.ImageFolder(tmp_path), 0).shape == (0, 4)
    assert "torn.jpg" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    return common.ImageFolder(write_pictures(tmp_path / "data", 5))


BOXES = [np.array([[1, 2, 30, 40]]), np.zeros((0, 4)), np.array([[0, 0, 9, 9], [3, 3, 20, 30]]),
         np.array([[5, 5, 8, 8]]), np.zeros((0, 4))]


def test_proposals_of_any_origin_come_back_image_by_image(folder, tmp_path):
    soco.save_proposals(tmp_path / "own.npz", folder, [*BOXES[:4], []])
    proposals = soco.read_proposals(tmp_path / "own.npz", folder)
    for i in range(5):
        assert np.array_equal(proposals(folder.image(i), None), BOXES[i])


def test_a_bad_proposals_file_is_refused_in_one_line_that_says_what_is_wrong(folder, tmp_path, capsys):
    path = tmp_path / "bad.npz"
    good = dict(boxes=np.concatenate(BOXES), offsets=np.cumsum([0, *map(len, BOXES)]), names=folder.names)
    write_pictures(tmp_path / "other", 5, seed=1)
    Path(tmp_path / "other", folder.name(3)).rename(tmp_path / "other" / "new.png")
    renamed = common.ImageFolder(tmp_path / "other").names
    cases = [
        ("is not an .npz", lambda: path.write_bytes(b"PK\3\4 no archive")),
        ("is not an .npz", lambda: path.write_bytes(b"")),
        ("is not an .npz", lambda: np.savez(path, boxes=good["boxes"])),
        ("is not an .npz", lambda: np.save(open(path, "wb"), good["boxes"])),
        ("of other images: number 5", lambda: np.savez(path, **{**good, "names": good["names"][:-1]})),
        ("of other images: number 5",
         lambda: np.savez(path, **{**good, "names": np.append(good["names"], np.uint8([65, 0]))})),
        ("not sound", lambda: np.savez(path, **{**good, "offsets": good["offsets"].astype(float)})),
        ("not sound", lambda: np.savez(path, **{**good, "offsets": np.array([0, 3, 1, 4, 4, 4], np.uint64)})),
        ("not sound", lambda: np.savez(path, **{**good, "boxes": good["boxes"] + 1j})),
        ("boxes of 4 images, but --data has 5", lambda: soco.save_proposals(path, folder, BOXES[:4])),
        ("of other images: number", lambda: np.savez(path, **{**good, "names": renamed})),
        (r"number 0 is '\udcff",
         lambda: np.savez(path, **{**good, "names": np.append(np.uint8([255]), good["names"])})),
        ("not sound", lambda: np.savez(path, **{**good, "boxes": good["boxes"][:, :3]})),
        ("not sound", lambda: np.savez(path, **{**good, "boxes": good["boxes"] * np.nan})),
        ("not sound", lambda: np.savez(path, **{**good, "boxes": good["boxes"][:, [2, 3, 0, 1]]})),
        ("not sound", lambda: np.savez(path, **{**good, "offsets": good["offsets"] + 1})),
        ("not sound", lambda: np.savez(path, **{**good, "offsets": np.array([0, 3, 1, 4, 4, 4])})),
        ("not sound", lambda: np.savez(path, **{**good, "offsets": np.array([[0, 4]])})),
    ]
    for says, make in cases:
        make()
        with pytest.raises(SystemExit) as stop:
            soco.read_proposals(path, folder)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and says in error and error.count("\n") == 1, (says, error)


def prepare(data, out):
    return ["--data", data, "--prepare", "--proposals", out / "p.npz", "--out", out]


def test_proposals_whose_making_was_killed_are_finished_without_doing_work_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soco, "PART", 12)
    data = write_pictures(tmp_path / "data", 100, size=120)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    parts = lambda: list(killed.glob("*.parts/*.npz"))
    process = fork(tmp_path / "said.txt", exit_code, soco, *prepare(data, killed))
    while process.is_alive() and len(parts()) < 3:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert 3 <= len(parts()) < 9 and not (killed / "p.npz").exists()
    marked = {int(part.stem): dict(np.load(part)) for part in parts()}
    for part in parts():                                               # made anew, these would not have the mark
        np.savez(part, boxes=marked[int(part.stem)]["boxes"] + 0.125, counts=marked[int(part.stem)]["counts"])
    for out in (killed, whole):
        assert run(monkeypatch, *prepare(data, out)) == 0
    one, two = (dict(np.load(out / "p.npz")) for out in (whole, killed))
    for k in marked:
        rows = slice(one["offsets"][12 * k], one["offsets"][min(12 * (k + 1), 100)])
        one["boxes"][rows] += 0.125
    assert all(np.array_equal(one[name], two[name]) for name in ("boxes", "offsets", "names"))
    assert len(one["offsets"]) == 101 and not list(killed.glob("*.parts")) and Image.open(killed / "p.png").width > 1000


# --- the script ---

def arguments(data, out, *more):
    return ["--data", str(data), "--out", str(out), "--arch", "resnet18w0.25", "--size", "32", "--batch-size", "8",
            "--num-proposals", "2", "--hidden", "32", "--dim", "16", "--warmup", "1", "--workers", "0",
            "--print-every", "1", *map(str, more)]


def test_a_run_makes_its_proposals_and_goes_on_where_it_stopped(pictures, tmp_path, monkeypatch):
    data, plan = pictures / "val", ["--epochs", 2, "--knn", pictures]
    assert run(monkeypatch, *arguments(data, tmp_path / "whole", *plan)) == 0
    assert run(monkeypatch, *arguments(data, tmp_path / "parts", *plan, "--max-steps", 2)) == 0
    state = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)
    assert (state["step"], state["epoch"], state["method"]) == (2, 0, "soco")
    (tmp_path / "parts" / "proposals.npz").rename(tmp_path / "moved.npz")             # a file may move
    assert run(monkeypatch, *arguments(data, tmp_path / "parts", *plan, "--proposals", tmp_path / "moved.npz")) == 0
    log = rows(tmp_path / "whole")
    assert without_speed(log) == without_speed(rows(tmp_path / "parts"))
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 7))
    assert {"loss", "lr", "std", "cosine2", "cosine3", "images_per_s", "data_wait"} <= set(log[1])
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    state = weights(tmp_path / "whole")
    different = sum((state[name.replace("online", "target")] != tensor).any().item()
                    for name, tensor in state.items() if name.startswith("online.backbone.layer"))
    assert different > 40
    with Image.open(tmp_path / "whole" / "views.png") as picture:
        assert picture.width > 3 * 256 and picture.height > 8 * 256


def test_a_killed_run_started_again_gives_the_same_weights_bit_for_bit(pictures, tmp_path, monkeypatch):
    plan = lambda out: arguments(pictures / "val", tmp_path / out, "--epochs", 5, "--save-every", 2, "--proposals",
                                 "random")
    process = fork(tmp_path / "said.txt", script, "soco.py", *plan("killed"))
    log = tmp_path / "killed" / "log.jsonl"
    while process.is_alive() and (not log.exists() or log.read_text().count("\n") < 6):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for out in ("killed", "whole"):
        assert run(monkeypatch, *plan(out)) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    assert without_speed(rows(tmp_path / "whole")) == without_speed(rows(tmp_path / "killed"))


def test_two_processes_make_proposals_and_train_and_one_goes_on(pictures, tmp_path, monkeypatch):
    plan = arguments(pictures / "val", tmp_path / "two", "--epochs", 2)
    assert in_two_processes(soco, *plan, "--max-steps", 4) == [0, 0]
    assert run(monkeypatch, *arguments(pictures / "val", tmp_path / "one", "--prepare")) == 0
    one, two = (dict(np.load(tmp_path / out / "proposals.npz")) for out in ("one", "two"))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert run(monkeypatch, *plan) == 0
    log = rows(tmp_path / "two")
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 7))
    assert all(math.isfinite(row["loss"]) for row in log)


@pytest.mark.parametrize("more", [["--detector", "c4"], ["--views", 4], ["--views", 2], ["--proposals", "whole"],
                                  ["--proposals", "whole", "--detector", "fpn"],
                                  ["--views", 2, "--jitter", 0, "--no-levels", "--no-head"],
                                  ["--amp", "bf16"], ["--size", 64, "--small-size", 48, "--num-proposals", 1]])
def test_every_variant_trains(pictures, tmp_path, monkeypatch, more):
    assert run(monkeypatch, *arguments(pictures, tmp_path, "--proposals", "random", "--max-steps", 2, *more)) == 0


@pytest.mark.parametrize("more, detector, views", [
    ([], "c4", 2), (["--detector", "fpn"], "fpn", 3), (["--detector", "fpn", "--views", 4], "fpn", 4),
    (["--data", "here"], "fpn", 3), (["--data", "here", "--detector", "c4"], "c4", 2)])
def test_the_demo_is_soco_c4_and_a_detector_brings_its_own_views(monkeypatch, more, detector, views):
    monkeypatch.setattr("sys.argv", ["soco.py", *map(str, more)])
    args = soco.arguments()
    assert (args.detector, args.views) == (detector, views)


@pytest.mark.parametrize("more, says", [
    (["--detector", "c4", "--views", "3"], "views V1 and V2 alone"),
    (["--detector", "c4", "--no-head"], "for --detector fpn"),
    (["--detector", "c4", "--small-size", "16"], "no V3"), (["--views", "2", "--small-size", "16"], "no V3"),
    (["--size", 48, "--small-size", 64], "--small-size 64 is above --size 48"),
    (["--proposals", "truth"], "drawn shapes"),
    (["--proposals", "random", "--prepare"], "nothing to make"), (["--proposals", "randon"], "ends in .npz"),
    (["--warmup", "inf"], "from 0"), (["--batch-size", "1"], "at least 2"), (["--num-proposals", "0"], "1"),
    (["--proposals", "/proc/no/p.npz"], "cannot write /proc/no/p.npz"), (["--arch", "resnet51"], "unknown --arch")])
def test_usage_errors_end_with_2_and_one_line(pictures, tmp_path, monkeypatch, capsys, more, says):
    assert run(monkeypatch, *arguments(pictures, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_without_opencv_a_line_says_what_to_install(pictures, tmp_path, monkeypatch, capsys):
    for name in ("cv2", "cv2.ximgproc"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(monkeypatch, *arguments(pictures, tmp_path)) == 2
    assert "pip install opencv-contrib-python-headless" in capsys.readouterr().err


@pytest.mark.parametrize("count", [2, 5, 70])
def test_prepare_works_for_few_images_with_few_files_open_and_a_broken_image(tmp_path, monkeypatch, count):
    data = write_pictures(tmp_path / "data", count)
    next(data.rglob("*.png")).write_bytes(b"torn")
    monkeypatch.setattr(soco, "PART", 1)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1]))
    try:
        assert run(monkeypatch, *arguments(data, tmp_path / "out", "--prepare")) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert len(np.load(tmp_path / "out" / "proposals.npz")["offsets"]) == count + 1
    assert (tmp_path / "out" / "proposals.png").exists()


def test_a_run_with_other_proposals_is_refused(pictures, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *arguments(pictures, tmp_path, "--max-steps", 1, "--proposals", "random")) == 0
    assert run(monkeypatch, *arguments(pictures, tmp_path, "--max-steps", 2)) == 2
    assert "proposals random (now" in capsys.readouterr().err
