"""transfer/segment.py: geometry, mIoU, the script as a user runs it."""
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from PIL import Image

import common
from conftest import in_processes, rows, run_script, weights, without_speed
from transfer import segment

run = partial(run_script, segment)
TINY = ["--init", "random", "--arch", "resnet18w0.25", "--size", 33, "--batch-size", 4, "--lr", 0.03, "--classes", 4,
        "--workers", 0]


def write_labeled(folder, count=8, sizes=((48, 40), (56, 64))):
    """Pictures of drawn shapes with maps of their objects, 1 to 3, on 0, in the plain layout; some pixels ignored."""
    for split, seed in (("train", 0), ("val", 1)):
        shapes = common.Shapes(count, 64, seed)
        for part in ("images", "labels"):
            Path(folder, split, part, "a").mkdir(parents=True)
        for i in range(count):
            image, _, masks, _ = shapes.scene(i)
            label = np.zeros((64, 64), np.uint8)
            for k, mask in enumerate(masks):
                label[mask] = 1 + k % 3
            label[:2] = 255
            width, height = sizes[i % 2]
            Image.fromarray(image[:height, :width]).save(Path(folder, split, "images", "a", f"{i}.png"))
            Image.fromarray(label[:height, :width]).save(Path(folder, split, "labels", "a", f"{i}.png"))
    return Path(folder)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    return write_labeled(tmp_path_factory.mktemp("labeled"))


def tiny_fcn(classes=4, arch="resnet18w0.25"):
    common.seed_everything(0)
    return segment.FCN(common.resnet(arch, common.SyncBatchNorm), classes).eval()


# --- model ---

def busy(network):
    """With BN that does something, and running statistics that fit."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("arch", ["resnet18w0.25", "resnet50w0.25"])
def test_dilated_blocks_give_at_every_other_place_what_undilated_ones_give_of_every_other_place(arch):
    common.seed_everything(0)
    backbone = busy(common.resnet(arch))
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    rest, x = backbone.layer4[1:], torch.randn(1, backbone.channels[-1], 11, 14)
    with torch.no_grad():
        undilated = rest(x[..., ::2, ::2])
        segment.dilate(backbone)
        torch.testing.assert_close(rest(x)[..., ::2, ::2], undilated)
        assert backbone(torch.randn(1, 3, 161, 193))[-1].shape[2:] == (11, 13)  # stride 16
    assert all(torch.equal(x, before[name]) for name, x in backbone.state_dict().items())


def test_dilated_stage_5_is_torchvisions_with_dilation_2_in_the_first_block_too():
    common.seed_everything(0)
    backbone = busy(common.resnet("resnet50"))
    theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, False, True]).eval()
    theirs.load_state_dict(backbone.state_dict(), strict=False)
    # "the 3x3 convolutions in conv5 blocks have dilation 2"
    theirs.layer4[0].conv2.dilation = theirs.layer4[0].conv2.padding = (2, 2)
    segment.dilate(backbone)
    with torch.no_grad():
        x = torch.randn(1, 1024, 9, 7)
        torch.testing.assert_close(backbone.layer4(x), theirs.layer4(x))


def test_head_is_that_of_the_paper():
    model = segment.FCN(common.resnet("resnet50"), 21)
    convs = [m for m in model.head.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size, m.dilation) for m in convs] == [
        (2048, 256, (3, 3), (6, 6)), (256, 256, (3, 3), (6, 6)), (256, 21, (1, 1), (1, 1))]
    assert [type(m).__name__ for m in model.head.modules() if not list(m.children())] == [
        "Conv2d", "SyncBatchNorm", "ReLU"] * 2 + ["Conv2d"]
    with torch.no_grad():
        assert model.backbone(torch.zeros(1, 3, 65, 97))[-1].shape == (1, 2048, 5, 7)


@pytest.mark.parametrize("size", [(33, 65), (40, 50), (64, 48), (47, 34)])
def test_scores_stand_where_their_features_are_centerd(size):
    model = tiny_fcn(2)
    class Places(nn.Module):  # gives each feature the coordinates of the pixel that it is centered on
        def forward(self, x):
            n = [-(-side // 16) for side in x.shape[2:]]
            y, x = torch.meshgrid(*(16.0 * torch.arange(k) for k in n), indexing="ij")
            return [torch.stack([y, x])[None]]
    model.backbone, model.head = Places(), nn.Identity()
    y, x = torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij")
    torch.testing.assert_close(model(torch.zeros(1, 3, *size, dtype=torch.uint8)), torch.stack([y, x])[None])


def test_a_feature_of_the_dilated_backbone_is_centerd_on_pixel_16_of_its_number():
    """By the gradient: the pixels that a feature of a network of constant weights depends on lie around its center."""
    backbone = common.resnet("resnet18w0.25").eval()
    backbone.maxpool = nn.AvgPool2d(3, 2, 1)  # at the same place; of equal pixels a maximum is the first one's
    segment.dilate(backbone)
    for p in backbone.parameters():
        nn.init.constant_(p, 0.01) if p.ndim > 1 else nn.init.ones_(p)
    image = torch.ones(1, 3, 1601, 65, dtype=torch.double, requires_grad=True)
    backbone.double()(image)[-1][0, 0, 50, 2].backward()
    weight = image.grad.sum(dim=(0, 1, 3))
    center = (weight * torch.arange(1601)).sum() / weight.sum()
    assert abs(center - 800) < 1


# --- data ---

def test_image_and_label_map_are_cut_scaled_and_mirrored_together():
    picture = np.zeros((90, 120, 3), np.uint8)
    label = np.zeros((90, 120), np.uint8)
    for k, (y, x) in enumerate([(0, 0), (0, 60), (45, 0), (45, 60)]):  # four quarters, told apart by gray as by label
        picture[y:y + 45, x:x + 60] = 60 * k
        label[y:y + 45, x:x + 60] = k
    label[:, :7] = 255

    class Source:
        def label(self, image):
            return label
    flipped, seen, inside = 0, set(), []
    for seed in range(60):
        image = common.LazyImage(Image.fromarray(picture), 0)
        out = segment.training_view(image, np.random.default_rng(seed), 97, Source())
        assert out["image"].shape == (3, 97, 97) and out["label"].shape == (97, 97)
        assert out["label"].dtype == torch.uint8
        known = out["label"] != 255
        drawn = out["image"][0].float() / 60
        agree = (drawn.round() == out["label"]) & ((drawn - drawn.round()).abs() < 0.02)
        assert agree[known].float().mean() > 0.9  # all but the blurred edges
        gray = (out["image"] == torch.tensor(segment.GRAY).view(3, 1, 1)).all(dim=0)
        assert not (gray & known).any()
        seen |= set(out["label"][known].tolist())
        inside.append((~gray).any(dim=1).sum().item())  # rows of the scaled image that fit
        order = [int(out["label"][row][out["label"][row] < 4].float().diff().sign().sum()) for row in (0, 20)]
        flipped += any(step < 0 for step in order)
    assert seen == {0, 1, 2, 3} and 5 < flipped < 40 and min(inside) < 60 and max(inside) == 97


def test_cityscapes_ids_become_the_19_training_ids(tmp_path):
    for split in ("train", "val"):
        for part, name in (("leftImg8bit", "ulm_000_leftImg8bit"), ("gtFine", "ulm_000_gtFine_labelIds")):
            Path(tmp_path, part, split, "ulm").mkdir(parents=True)
            pixels = np.arange(36, dtype=np.uint8).reshape(6, 6)
            Image.fromarray(np.stack([pixels] * 3, -1) if part == "leftImg8bit"
                            else pixels).save(tmp_path / part / split / "ulm" / f"{name}.png")
    assert segment.data_layout(tmp_path) == ("cityscapes", 19)
    source = segment.LabelMapFolder(tmp_path, "train", 19)
    label = source.label(source.image(0)).flatten().tolist()
    # road, sidewalk, building, person, car and bicycle; pole's group, caravan and trailer do not count
    assert [label[k] for k in (7, 8, 11, 24, 26, 33)] == [0, 1, 2, 11, 13, 18]
    assert {label[k] for k in (0, 6, 18, 29, 30)} == {255}
    assert sorted(set(label)) == [*range(19), 255]
    Image.fromarray(np.full((6, 6), 3, np.uint8)).save(tmp_path / "gtFine" / "train" / "ulm"
                                                       / "ulm_000_gtFine_labelTrainIds.png")
    source = segment.LabelMapFolder(tmp_path, "train", 19)  # these files win, as they are
    assert (source.label(source.image(0)) == 3).all()


def test_voc_trains_on_the_augmented_list_and_reads_palettes(tmp_path):
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for k, name in enumerate(("a", "b", "c", "other")):
        Image.new("RGB", (20, 10)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        label = Image.new("P", (20, 10), k + 5)
        label.putpalette([*range(30)])
        label.save(tmp_path / ("SegmentationClass" if name == "c" else "SegmentationClassAug") / f"{name}.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\n")
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").write_text("a\nb\n")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("c\n")
    train, val = (segment.LabelMapFolder(tmp_path, split, 21) for split in ("train", "val"))
    assert [train.name(i) for i in range(len(train))] == ["a.jpg", "b.jpg"] and len(val) == 1
    assert (train.label(train.image(1)) == 6).all() and (val.label(val.image(0)) == 7).all()


# --- mIoU ---

def test_miou_of_a_tiny_picture_by_hand():
    truth = torch.tensor([[[0, 0, 1, 1], [0, 2, 1, 255]]], dtype=torch.uint8)
    guess = torch.tensor([[[0, 1, 1, 1], [0, 2, 2, 3]]])
    counts = segment.confusion(guess, truth, 5)
    # class 0: 2 hits of 3 pixels in either; 1: 2 of 4; 2: 1 of 2; classes 3 (only where ignored) and 4 do not occur
    np.testing.assert_allclose(segment.iou(counts)[:3], [2 / 3, 2 / 4, 1 / 2])
    assert segment.iou(counts)[3:].isnan().all() and counts.sum() == 7
    assert segment.iou(counts).nanmean().item() == pytest.approx((2 / 3 + 1 / 2 + 1 / 2) / 3)


def test_evaluation_is_at_the_original_size_of_every_image(labeled, tmp_path):
    args = type("", (), dict(classes=4, workers=0, amp="off", out=str(tmp_path)))
    source, model = segment.LabelMapFolder(labeled, "val", 4), tiny_fcn()
    figures = segment.evaluate(model, source, args, torch.device("cpu"))
    model.eval()
    hits, union = np.zeros(4), np.zeros(4)
    for i in range(len(source)):
        image = np.asarray(Image.open(labeled / "val" / "images" / source.name(i)))
        label = np.asarray(Image.open(labeled / "val" / "labels" / source.name(i)))
        with torch.no_grad():
            guess = model(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])[0].argmax(dim=0).numpy()
        assert guess.shape == label.shape
        for k in range(4):
            hits[k] += ((guess == k) & (label == k)).sum()
            union[k] += (((guess == k) | (label == k)) & (label != 255)).sum()
    assert figures["mIoU"] == pytest.approx(np.mean(hits[union > 0] / union[union > 0]))
    assert (tmp_path / "predictions.png").exists()


# --- processes ---

def step_and_evaluation(folder, out):
    """Loss and gradient of a batch of four, this process's share of it; figures of a split."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 3, 33, 33), generator=generator, dtype=torch.uint8)
    label = torch.randint(0, 4, (4, 33, 33), generator=generator, dtype=torch.uint8)
    label[0, 3:] = 255  # so that the processes have different numbers of pixels
    model = tiny_fcn().train()
    share = 4 // common.world_size()
    mine = slice(common.rank() * share, (common.rank() + 1) * share)
    ddp = common.wrap_ddp(model, torch.device("cpu"))
    loss = segment.pixel_loss(ddp(image[mine]), label[mine])
    loss.backward()
    args = type("", (), dict(classes=4, workers=0, amp="off", out=out))
    figures = segment.evaluate(tiny_fcn(), segment.LabelMapFolder(folder, "val", 4), args, torch.device("cpu"))
    return loss.item(), np.concatenate([p.grad.flatten().numpy() for p in model.parameters()]), figures


def test_two_processes_equal_one(labeled, tmp_path):
    loss, gradient, figures = step_and_evaluation(str(labeled), str(tmp_path))
    two = in_processes(2, step_and_evaluation, str(labeled), str(tmp_path))
    assert np.mean([x for x, *_ in two]) == pytest.approx(loss, rel=1e-4)
    np.testing.assert_allclose(two[0][1], gradient, atol=1e-4 * np.abs(gradient).max())
    assert [x for *_, x in two] == [pytest.approx(figures)] * 2


# --- the script ---

def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(labeled, tmp_path, monkeypatch):
    common_flags = [*TINY, "--data", labeled, "--iterations", 5, "--eval-every", 1, "--print-every", 1]
    assert run(monkeypatch, *common_flags, "--out", tmp_path / "whole") == 0
    assert run(monkeypatch, *common_flags, "--out", tmp_path / "parts", "--max-steps", 3) == 0
    assert run(monkeypatch, *common_flags, "--out", tmp_path / "parts") == 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    assert without_speed(rows(tmp_path / "whole")) == without_speed(rows(tmp_path / "parts"))
    assert [row["step"] for row in rows(tmp_path / "whole") if "mIoU" in row] == [2, 4, 5]
    assert (tmp_path / "whole" / "views.png").exists()


def test_it_learns_to_tell_object_from_ground(tmp_path, monkeypatch):
    for split, seed in (("train", 0), ("val", 1)):  # bright discs on dark ground: what color alone tells
        for part in ("images", "labels"):
            (tmp_path / "d" / split / part).mkdir(parents=True)
        rng = np.random.default_rng(seed)
        for i in range(16):
            y, x = np.mgrid[:64, :64]
            disc = (y - rng.integers(16, 48)) ** 2 + (x - rng.integers(16, 48)) ** 2 < 200
            image = np.where(disc[..., None], 220, 40) + rng.integers(-20, 20, (64, 64, 3))
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / "d" / split / "images" / f"{i}.png")
            Image.fromarray(disc.astype(np.uint8)).save(tmp_path / "d" / split / "labels" / f"{i}.png")
    flags = ["--init", "random", "--arch", "resnet18w0.25", "--size", 65, "--batch-size", 8, "--lr", 0.1, "--classes",
             2]
    assert run(monkeypatch, *flags, "--data", tmp_path / "d", "--iterations", 60, "--out", tmp_path / "out") == 0
    assert rows(tmp_path / "out")[-1]["mIoU"] > 0.75  # all ground is 0.42


def bad_size(data):
    Image.new("L", (5, 5)).save(next((data / "train" / "labels").rglob("3.png")))


def bad_value(data):
    path = next((data / "train" / "labels").rglob("3.png"))
    Image.fromarray(np.full_like(np.asarray(Image.open(path)), 9)).save(path)


def colors(data):
    path = next((data / "train" / "labels").rglob("3.png"))
    Image.open(path).convert("RGB").save(path)


def torn(data):
    path = next((data / "train" / "labels").rglob("3.png"))
    path.write_bytes(path.read_bytes()[:60])


def shared(data):
    Image.new("RGB", (8, 8)).save(next((data / "val" / "images").rglob("3.*")).with_suffix(".bmp"))


def missing(data):
    next((data / "val" / "labels").rglob("3.png")).unlink()


@pytest.mark.parametrize("harm, message, workers", [
    (shared, "3 with different extensions and would share", 0),
    (bad_size, "rows by columns", 0), (bad_value, "holds the label 9", 0), (colors, "one gray or palette", 0),
    (torn, "cannot be decoded", 0), (missing, "no label map", 0), (bad_size, "rows by columns", 1)])
def test_a_bad_label_map_ends_with_one_line_and_exit_code_2(tmp_path, monkeypatch, capfd, harm, message, workers):
    data = write_labeled(tmp_path / "data", count=4)
    harm(data)
    assert run(monkeypatch, *TINY[:-1], workers, "--data", data, "--iterations", 3, "--out", tmp_path / "out") == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert "3.png" in error or harm is shared


def test_a_cityscapes_map_of_16_bits_is_a_bad_label_map(tmp_path):
    for folder, name, image in (("leftImg8bit", "leftImg8bit", np.zeros((8, 8, 3), np.uint8)),
                                ("gtFine", "gtFine_labelIds", np.full((8, 8), 700, np.uint16))):
        (tmp_path / folder / "train" / "ulm").mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / folder / "train" / "ulm" / f"ulm_0_{name}.png")
    source = segment.LabelMapFolder(tmp_path, "train", 19)
    with pytest.raises(segment.BadLabel, match="holds the label 700"):
        source.label(source.image(0))


@pytest.mark.parametrize("content, message", [(b"\xff\xfe", "cannot be read"), (None, "train.txt")])
def test_a_list_of_vocs_that_is_no_text_is_one_line(tmp_path, capsys, content, message):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "JPEGImages" / "a.jpg")
    if content:
        (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        segment.LabelMapFolder(tmp_path, "train", 21)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("flags, message", [
    (["--data", "/nowhere", "--classes", 3], "no such folder"), (["--data", "LABELED"], "--classes"),
    (["--data", "LABELED", "--classes", 4, "--batch-size", 99], "do not fill a batch"),
    (["--data", "LABELED", "--classes", 4, "--batch-size", 4, "--init", "/nowhere.pt"], "cannot be read"),
    (["--classes", 4], "--data")])
def test_wrong_use_ends_with_one_line_and_exit_code_2(labeled, tmp_path, monkeypatch, capfd, flags, message):
    flags = [labeled if flag == "LABELED" else flag for flag in flags]
    assert run(monkeypatch, "--init", "random", *flags, "--out", tmp_path / "out") == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_log_holds_what_the_readme_says(labeled, tmp_path, monkeypatch):
    assert run(monkeypatch, *TINY, "--data", labeled, "--epochs", 1, "--print-every", 2, "--out", tmp_path) == 0
    first, last = [json.loads(line) for line in Path(tmp_path, "log.jsonl").read_text().splitlines()]
    assert first["loss"] > 0 and first["lr"] == pytest.approx(0.03 * 4 / 16)
    assert set(last) == {"epoch", "step", "mIoU", "pixel_accuracy"} and 0 <= last["mIoU"] <= 1
