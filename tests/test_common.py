"""The contracts of common.py, each against something that was not written with it."""
import colorsys
import math
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF

import common
import detcon
from conftest import in_processes


# --- gathering ---

def gathered():
    rank = common.rank()
    x = (torch.arange(6.0).view(3, 2) + 100 * rank).requires_grad_()
    rows = common.all_gather(x)
    weight = torch.arange(12.0).view(6, 2) + 1000 * rank  # process r uses row i with a weight of its own
    (rows * weight).sum().backward()
    return rows.detach().numpy(), x.grad.numpy()


def test_all_gather_keeps_rank_order_and_sends_the_summed_gradient_home():
    (rows0, grad0), (rows1, grad1) = in_processes(2, gathered)
    expected = np.concatenate([np.arange(6.0).reshape(3, 2), np.arange(6.0).reshape(3, 2) + 100])
    assert (rows0 == expected).all() and (rows1 == expected).all()
    used = sum(np.arange(12.0).reshape(6, 2) + 1000 * rank for rank in (0, 1))
    assert (grad0 == used[:3]).all() and (grad1 == used[3:]).all()


def test_all_gather_alone_is_the_identity():
    x = torch.randn(3, 2)
    assert common.all_gather(x) is x


def shuffled():
    common.seed_everything(common.rank())  # processes need not draw alike
    x = torch.arange(4)[:, None] + 10 * common.rank()
    shuffle = common.Shuffle(4, x.device)
    return shuffle(x).flatten().tolist(), shuffle.undo(shuffle(x)).flatten().tolist(), x.flatten().tolist()


def test_shuffle_spreads_rows_over_processes_and_undo_brings_each_back():
    (there0, back0, own0), (there1, back1, own1) = in_processes(2, shuffled)
    assert back0 == own0 and back1 == own1
    assert sorted(there0 + there1) == sorted(own0 + own1)
    assert set(there0) != set(own0)


# --- backbone ---

def test_resnet_has_torchvisions_keys_and_gives_its_features():
    theirs = torchvision.models.resnet18()
    ours = common.resnet("resnet18")
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in state.items()}
    ours.load_state_dict(state)
    theirs.eval(), ours.eval()
    x = torch.randn(2, 3, 64, 96)
    stages = ours(x)
    assert [s.shape[1:] for s in stages] == [(64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]
    theirs.fc = nn.Identity()
    torch.testing.assert_close(stages[-1].mean((2, 3)), theirs(x))


@pytest.mark.parametrize("arch", ["resnet18w0.25", "resnet50w0.25"])
def test_weights_that_see_only_padding_get_no_gradient_in_bf16(arch):
    torch.manual_seed(0)
    net = common.resnet(arch).to(memory_format=torch.channels_last)
    x = torch.randn(32, 3, 16, 16).to(memory_format=torch.channels_last)
    for _ in range(5):
        litter = [torch.full((4096 * n,), torch.nan) for n in (1, 2, 4, 8, 16, 32)]  # for kernels that forget to clear
        del litter
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            c5 = net(x)[-1]
        c5.float().square().sum().backward()
        for name, p in net.named_parameters():
            assert p.grad.isfinite().all(), name
        strided = net.layer4[0].conv1 if "18" in arch else net.layer4[0].conv2
        border = strided.weight.grad.clone()
        border[:, :, 1, 1] = 0                                             # c4 has a single pixel, under the center
        assert strided.stride == (2, 2) and not border.any()


def test_w_multiplies_every_channel_count():
    wide, plain = common.resnet("resnet50w2"), common.resnet("resnet50")
    assert wide.channels == [2 * c for c in plain.channels] == [512, 1024, 2048, 4096]
    for (name, w), p in zip(wide.named_parameters(), plain.parameters()):
        times = [1 if name == "conv1.weight" and d == 1 or d > 1 else 2 for d in range(w.ndim)]
        assert list(w.shape) == [t * s for t, s in zip(times, p.shape)], name
    assert common.resnet("resnet18w0.25").channels == [16, 32, 64, 128]
    assert len(common.resnet("resnet200w0.25").layer3) == 36


def test_resnext_has_torchvisions_keys_and_shapes_and_the_papers_46_million_parameters():
    ours, theirs = common.resnet("resnext50_32x4d").state_dict(), torchvision.models.resnext50_32x4d().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")}
    rx50 = common.resnet("resnext50_32x8d")                                               # MoCo Table 1: RX50, 46M
    assert 45.5e6 < sum(p.numel() for p in rx50.parameters()) < 46.5e6 and rx50.channels == [256, 512, 1024, 2048]
    assert rx50.layer1[0].conv2.groups == 32 and rx50.layer1[0].conv2.weight.shape == (256, 8, 3, 3)


def test_batch_norm_groups_have_statistics_of_their_own():
    grouped, plain = common.GroupBatchNorm2d(3, groups=4), nn.BatchNorm2d(3)
    x = torch.randn(8, 3, 5, 5) * torch.arange(1.0, 9.0).view(-1, 1, 1, 1)
    expected = torch.cat([plain(x[i:i + 2]) for i in (0, 2, 4, 6)])  # four processes' batches, one after another
    torch.testing.assert_close(grouped(x), expected)
    torch.testing.assert_close(grouped.running_var, plain.running_var)
    torch.testing.assert_close(grouped.eval()(x), plain.eval()(x))


def test_roi_align_takes_boxes_in_input_pixels_half_pixel_aligned():
    # A feature that holds its own position: cell (i, j) at stride 4 has its center at pixel (4j + 2, 4i + 2).
    y, x = torch.meshgrid(torch.arange(16.0) * 4 + 2, torch.arange(16.0) * 4 + 2, indexing="ij")
    features = torch.stack([torch.stack([x, y]), torch.stack([x, y]) + 1000])  # two images [2, 2, 16, 16]
    boxes = torch.tensor([[[8.0, 12.0, 24.0, 20.0], [10.0, 10.0, 30.0, 50.0]]] * 2)
    pooled = common.roi_align(features, boxes, 2, stride=4)
    assert pooled.shape == (4, 2, 2, 2)
    for n in range(2):
        for k, (x1, y1, x2, y2) in enumerate(boxes[n].tolist()):
            for i in range(2):
                for j in range(2):
                    center = (x1 + (j + 0.5) * (x2 - x1) / 2 + 1000 * n, y1 + (i + 0.5) * (y2 - y1) / 2 + 1000 * n)
                    assert pooled[2 * n + k, :, i, j].tolist() == pytest.approx(center, abs=1e-3)


# --- queue, loss, momentum ---

def test_queue_wraps_round_when_the_batch_does_not_divide_it():
    queue, slow = common.Queue(4, 10), deque(maxlen=10)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(10))
    slow.extend(queue.keys.clone())
    for step, n in enumerate([4, 4, 4, 3, 10, 23, 1]):
        rows = F.normalize(torch.randn(n, 4), dim=1)
        queue.enqueue(rows)
        slow.extend(rows)
        in_order = torch.roll(queue.keys, -int(queue.position), dims=0)  # the oldest first
        assert torch.equal(in_order, torch.stack(list(slow))), step
    copy = common.Queue(4, 10)
    copy.load_state_dict(queue.state_dict())
    assert torch.equal(copy.keys, queue.keys) and copy.position == queue.position


def test_queue_puts_in_the_first_rows_alone_when_told_how_many():
    queue, slow = common.Queue(4, 10), deque(maxlen=10)
    slow.extend(queue.keys.clone())
    for count in (3, 0, 6, 5, 10):
        rows = F.normalize(torch.randn(10 if count > 6 else 6, 4), dim=1)
        queue.put(rows, torch.tensor(count))
        slow.extend(rows[:count])
        assert torch.equal(torch.roll(queue.keys, -int(queue.position), dims=0), torch.stack(list(slow))), count


def enqueued():
    queue = common.Queue(1, 8)
    queue.enqueue(torch.arange(3.0)[:, None] + 10 * common.rank())
    return queue.keys[:6].flatten().tolist()


def test_queue_takes_the_keys_of_all_processes_in_rank_order():
    assert in_processes(2, enqueued) == [[0, 1, 2, 10, 11, 12]] * 2


def test_info_nce_equals_the_formula_and_log_k_plus_1_for_a_constant_network():
    q, k, negatives = (F.normalize(torch.randn(n, 6), dim=1) for n in (5, 5, 7))
    slow = []
    for i in range(5):  # MoCo Eq. 1, term by term
        over = [math.exp(float(q[i] @ other) / 0.2) for other in [k[i], *negatives]]
        slow.append(-math.log(over[0] / sum(over)))
    assert common.info_nce(q, k, negatives, 0.2).item() == pytest.approx(np.mean(slow), rel=1e-5)
    same = F.normalize(torch.ones(5, 6), dim=1)
    assert common.info_nce(same, same, same[:1].expand(7, -1), 0.2).item() == pytest.approx(math.log(8), rel=1e-5)
    assert common.pretext_accuracy(same, same, same[:1].expand(7, -1)) == 0  # a constant output hits nothing


def test_info_nce_does_not_lose_precision_under_autocast():
    q, k, negatives = (F.normalize(torch.randn(n, 128), dim=1) for n in (8, 8, 64))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = common.info_nce(q, k, negatives, 0.07)
    assert mixed == common.info_nce(q, k, negatives, 0.07)


def test_momentum_update_moves_parameters_and_leaves_buffers():
    online, target = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    online[1].running_mean.fill_(5.0)
    expected = [0.9 * t.detach() + 0.1 * o.detach() for t, o in zip(target.parameters(), online.parameters())]
    common.momentum_update(target, online, 0.9)
    for t, e in zip(target.parameters(), expected):
        torch.testing.assert_close(t.detach(), e)
    assert (target[1].running_mean == 0).all()


# --- schedules and LARS ---

def test_cosine_starts_and_ends_and_stays_there():
    assert common.cosine(0.99, 1.0, 0, 100) == pytest.approx(0.99)
    assert common.cosine(0.99, 1.0, 50, 100) == pytest.approx(0.995)
    assert common.cosine(3.0, 1.0, 25, 100) == pytest.approx(1 + 2 * (1 + math.sqrt(0.5)) / 2)
    assert common.cosine(0.99, 1.0, 100, 100) == common.cosine(0.99, 1.0, 170, 100) == 1.0
    assert common.cosine(1.0, 0.0, 0, 0) == 0.0


def test_learning_rate_warms_up_and_falls():
    rates = [common.learning_rate(2.0, step, 100, warmup=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and rates[10] == pytest.approx(2.0)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True) and rates[-1] < 0.001
    drops = [common.learning_rate(1.0, step, 200, drops=(0.6, 0.8)) for step in (119, 120, 159, 160)]
    assert drops == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_lars_equals_its_formula_tensor_by_tensor():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    slow = {n: p.detach().clone() for n, p in net.named_parameters()}
    velocity = {n: torch.zeros_like(p) for n, p in slow.items()}
    optimizer = common.LARS(net.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01, trust=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(6, 5)).square().sum().backward()
        for name, p in net.named_parameters():
            update = p.grad.clone()
            if p.ndim > 1:
                update += 0.01 * slow[name]
                update *= 0.02 * slow[name].norm() / update.norm()
            velocity[name] = 0.9 * velocity[name] + update
            slow[name] = slow[name] - 0.3 * velocity[name]
        optimizer.step()
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.detach(), slow[name], msg=name)


def test_lars_leaves_a_weight_alone_that_has_no_gradient_and_moves_one_that_is_zero():
    still, zero = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    common.LARS([still, zero], lr=0.1, momentum=0.9, weight_decay=0.0).step()
    assert (still == 1).all() and torch.allclose(zero, torch.full((2, 2), -0.1))


def test_lars_does_not_wipe_out_a_weight_whose_gradient_is_zero():
    unused = nn.Parameter(torch.ones(3, 3))  # such as the convolution of a pyramid level without a box
    optimizer = common.LARS([unused], lr=1.0, momentum=0.9, weight_decay=1e-5)
    for _ in range(100):
        unused.grad = torch.zeros(3, 3)
        optimizer.step()
    assert 0.98 < unused.min() < 1                                       # plain weight decay; scaled: 0.4


def test_evaluating_gives_every_module_back_the_mode_it_had():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2)))
    with common.evaluating(net[1]):
        with common.evaluating(net):
            assert not any(module.training for module in net.modules())
        assert net.training and net[0].training and not net[1].training and not net[1][0].training
    assert all(module.training for module in net.modules())


# --- photometric augmentation ---

def slow_photometric(x, draw, i, radius):
    """torchvision's functional ops on sample i [3, H, W] in [0, 1] with its drawn parameters."""
    b, c, s = draw["factor"][i].tolist()
    for op in draw["order"][i].tolist():
        x = [lambda: TF.adjust_brightness(x, b), lambda: TF.adjust_contrast(x, c), lambda: TF.adjust_saturation(x, s),
             lambda: TF.adjust_hue(x, draw["hue"][i].item())][op]()
    if draw["grayscale"][i]:
        x = TF.rgb_to_grayscale(x, num_output_channels=3)
    if draw["blur"][i]:
        x = TF.gaussian_blur(x, [2 * radius + 1] * 2, [draw["sigma"][i].item()] * 2)
    return TF.solarize(x, 0.5) if draw["solarize"][i] else x


@pytest.mark.parametrize("strength", [dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4),
                                      dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8)])
def test_photometric_equals_torchvision_sample_by_sample(strength, photograph):
    torch.manual_seed(0)
    photometric = common.Photometric(**strength, grayscale_p=0.2, blur_p=0.5, solarize_p=0.2)
    picture = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
    x = torch.stack([TF.crop(picture, 7 * i % 250, 11 * i % 400, 120, 120) for i in range(48)])
    x[:8] = torch.randint(0, 256, (8, 3, 120, 120), dtype=torch.uint8)  # noise: every hue, hard edges
    draw = photometric.draw(48)
    fast = photometric.apply_draw(x / 255, draw)
    for i in range(48):
        slow = slow_photometric(x[i] / 255, draw, i, radius=6)
        assert (fast[i] - slow)[:, 8:-8, 8:-8].abs().max() < 2 / 255, i
    changed = (fast - x / 255).abs().amax(dim=(1, 2, 3)) > 1e-6
    assert changed.float().mean() > 0.7


def slow_dm_pix(x, op, factor, hue):
    """BYOL's and DetCon's jitter of one picture [H, W, 3] in [0, 1], pixel by pixel and in HSV by colorsys."""
    if op == 0:
        x = x + (factor - 1)
    if op == 1:
        means = [x[..., c].sum() / x[..., c].size for c in range(3)]
        x = np.stack([means[c] + factor * (x[..., c] - means[c]) for c in range(3)], axis=2)
    if op >= 2:
        out = np.empty_like(x)
        for i, j in np.ndindex(*x.shape[:2]):
            h, s, v = colorsys.rgb_to_hsv(*x[i, j].tolist())
            out[i, j] = colorsys.hsv_to_rgb(*((h, min(1, s * factor), v) if op == 2 else ((h + hue) % 1, s, v)))
        x = out
    return x.clip(0, 1)


def noise_and_flat_colors(n, size=9):
    """Pictures [N, 3, S, S] in [0, 1]: noise, then the corners of the color cube, some without hue or saturation."""
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    x[:, :, 0, :8] = corners.T
    x[:, :, 1] = x[:, :1, 1]                                              # a gray row
    return x


@pytest.mark.parametrize("op, factors", [(0, (0.2, 0.7, 1, 1.8)), (1, (0.2, 0.7, 1, 1.8)), (2, (0, 0.5, 1, 1.8)),
                                         (3, (1,))])
def test_each_jitter_of_dm_pix_equals_its_formula_pixel_by_pixel(op, factors):
    photometric = detcon.Colors(0.8, 0.8, 0.8, 0.2)
    for factor, turn in zip(factors, (0.15, -0.2, 0.0, 0.07)):
        x, draw = noise_and_flat_colors(2), photometric.draw(2)
        draw["factor"], draw["hue"] = torch.ones(2, 3), torch.full((2,), turn if op == 3 else 0.0)
        if op < 3:
            draw["factor"][:, op] = factor
        fast = photometric.apply_draw(x, draw)
        for a, b in zip(x.permute(0, 2, 3, 1).double().numpy(), fast.permute(0, 2, 3, 1).numpy()):
            assert np.abs(slow_dm_pix(a, op, factor, turn) - b).max() < 1e-5


def test_dm_pix_applies_its_jitters_one_after_another_in_the_drawn_order():
    torch.manual_seed(0)
    photometric = detcon.Colors(0.8, 0.8, 0.8, 0.2, jitter_p=0.9)
    x, draw = noise_and_flat_colors(24), photometric.draw(24)
    fast, slow = photometric.apply_draw(x, draw), x.permute(0, 2, 3, 1).double().numpy()
    assert len(draw["order"].unique(dim=0)) > 12
    for i in range(24):
        for op in draw["order"][i].tolist():
            slow[i] = slow_dm_pix(slow[i], op, draw["factor"][i, op].item() if op < 3 else 1, draw["hue"][i].item())
        error = np.abs(slow[i] - fast[i].permute(1, 2, 0).numpy()).max(axis=2)
        assert np.quantile(error, 0.98) < 1e-4, i                         # next to gray, hue is rounding


def test_photometric_draws_have_torchvisions_distributions():
    torch.manual_seed(0)
    n = 20000
    draw = common.Photometric(0.4, 0.8, 1.5, 0.1, jitter_p=0.8, grayscale_p=0.2, blur_p=0.5, solarize_p=0.1).draw(n)
    for name, p in [("grayscale", 0.2), ("blur", 0.5), ("solarize", 0.1)]:
        assert draw[name].float().mean().item() == pytest.approx(p, abs=0.02)
    still = (draw["factor"] == 1).all(dim=1)
    assert still.float().mean().item() == pytest.approx(0.2, abs=0.02)        # the whole jitter, or none of it
    assert (draw["hue"][still] == 0).all()
    moved = draw["factor"][~still]
    assert moved.amin(0).tolist() == pytest.approx([0.6, 0.2, 0.0], abs=0.01)
    assert moved.amax(0).tolist() == pytest.approx([1.4, 1.8, 2.5], abs=0.01)
    assert (moved[:, 2] > 1.25).float().mean().item() == pytest.approx(0.5, abs=0.02)  # uniform from 0 where 1.5 > 1
    assert moved[:, 0].std().item() == pytest.approx(0.8 / math.sqrt(12), abs=0.01)  # uniform
    places = torch.stack([(draw["order"] == op).float().mean(dim=0) for op in range(4)])
    assert (places - 0.25).abs().max() < 0.02
    assert draw["sigma"].mean().item() == pytest.approx(1.05, abs=0.02)


def test_photometric_gives_each_sample_its_own_draw_and_normalizes():
    x = torch.full((6, 3, 32, 32), 100, dtype=torch.uint8)
    out = common.Photometric(brightness=0.4)(x)
    assert len({round(v, 5) for v in out.mean(dim=(1, 2, 3)).tolist()}) == 6
    plain = common.Photometric()(x)
    torch.testing.assert_close(plain[0, :, 0, 0], (torch.tensor([100 / 255] * 3) - torch.tensor(common.MEAN))
                               / torch.tensor(common.STD))
    assert plain.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(common.denormalize(plain), x / 255)
    with torch.autocast("cpu", torch.bfloat16):
        assert common.Photometric(blur_p=1.0)(x).dtype == torch.float32


def test_a_step_draws_the_same_whatever_was_drawn_before():
    draws = []
    for before in (0, 7):
        torch.rand(before)
        common.seed_everything(3, 40, 1)
        draws.append(torch.rand(5))
    common.seed_everything(3, 41, 1)
    assert torch.equal(*draws) and not torch.equal(draws[0], torch.rand(5))


def synchronized(x, first):
    """Statistics and gradients of a batch x whose first `first` rows are process 0's."""
    torch.manual_seed(0)
    norm = common.SyncBatchNorm(x.shape[1]).double()
    rows = torch.from_numpy(x)
    mine = rows if common.world_size() == 1 else (rows[:first] if common.rank() == 0 else rows[first:])
    mine = mine.clone().requires_grad_()
    y = norm(mine)
    (y * y.detach().cos() + y ** 3).sum().backward()
    low = common.SyncBatchNorm(x.shape[1])(mine.detach().bfloat16())  # as under autocast
    assert low.dtype == torch.bfloat16 and (low - y.detach()).abs().max() < 0.05
    return y.detach().numpy(), mine.grad.numpy(), norm.running_mean.numpy(), norm.running_var.numpy()


def test_synchronized_bn_of_uneven_batches_is_bn_of_them_all():
    x = np.random.default_rng(0).normal(1, 2, (7, 3, 4, 4))
    one, two = synchronized(x, 5), in_processes(2, synchronized, x, 5)
    for k in (0, 1):
        assert np.allclose(np.concatenate([two[0][k], two[1][k]]), one[k], atol=1e-12)
    for k in (2, 3):
        assert np.allclose(two[0][k], one[k], atol=1e-12) and np.allclose(two[1][k], one[k], atol=1e-12)
    theirs = torch.nn.BatchNorm2d(3).double()
    assert np.allclose(theirs(torch.from_numpy(x)).detach().numpy(), one[0], atol=1e-12)
    assert np.allclose(theirs.running_var.numpy(), one[3], atol=1e-12)


# --- Console ---------------------------------------------------------------------------------------------------------

def test_a_line_on_the_console_says_where_a_run_is_and_how_long_it_will_take():
    run = object.__new__(common.Run)
    run.args, run.steps_per_epoch = SimpleNamespace(epochs=4, batch_size=64), 128
    run.step, run.total, run.last = 320, 512, 512
    row = {"loss": 2.413, "lr": 0.1, "accuracy": 0.1234, "images_per_s": 118.0, "data_wait": 0.02}
    assert run.console_line(row) == "epoch 3/4  step 320/512  loss 2.41  accuracy 12.3 %  118 images/s  1:44 left"
    assert "50% of the time waiting for images" in run.console_line({**row, "data_wait": 0.5})
    run.last = 321                                                           # --max-steps
    assert run.console_line(row).endswith(" 0:01 left")
    assert run.console_line({"knn": 0.25}) == "epoch 3/4  step 320/512  knn 25 %"


def test_long_work_says_every_ten_seconds_how_far_it_is(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    progress = common.Progress("SVMs", 1000)
    for done in range(1, 31):                                                # one a second
        clock[0] += 1
        progress(done)
    assert capsys.readouterr().err.splitlines() == ["SVMs: 1%, 16:29 left", "SVMs: 2%, 16:18 left"]
    assert common.clock(7261.2) == "2:01:01"
