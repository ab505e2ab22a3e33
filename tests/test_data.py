"""Images, shapes, sampler, kNN: from files to batches."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from PIL import Image

import common
from conftest import ROOT, in_processes, write_pictures


def touch(root, *names):
    for name in names:
        Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        Path(root, name).write_bytes(b"")


# --- the list of files ---

def test_folder_lists_every_image_in_an_order_no_file_system_decides(tmp_path):
    names = ["b/2.JPG", "b/10.png", "a/x.jpeg", "top.webp", "a/deep/er/y.bmp", "a/z.tif", "a/z.tiff", "ä/ö.jpg"]
    touch(tmp_path / "one", *names)
    touch(tmp_path / "two", *reversed(names))
    touch(tmp_path / "one", ".hidden.jpg", ".hidden/a.jpg", "notes.txt", "a/jpg")
    one, two = (common.ImageFolder(tmp_path / part) for part in ("one", "two"))
    assert [one.name(i) for i in range(len(one))] == [two.name(i) for i in range(len(two))]
    assert sorted(one.name(i) for i in range(len(one))) == sorted(names)
    assert one.fingerprint() == two.fingerprint() != common.ImageFolder(tmp_path / "one" / "a").fingerprint()


def test_folder_follows_links_and_survives_one_that_leads_back_up(tmp_path):
    touch(tmp_path / "data", "a/1.jpg")
    touch(tmp_path / "elsewhere", "2.jpg")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "3.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data" / "self")
    folder = common.ImageFolder(tmp_path / "data")
    assert [folder.name(i) for i in range(len(folder))] == ["3.jpg", "a/1.jpg", "link/2.jpg"]


def test_labels_are_the_first_folder_and_a_strange_class_is_an_error(tmp_path, capsys):
    touch(tmp_path, "train/b/1.jpg", "train/a/sub/2.jpg", "val/b/3.jpg", "other/c/4.jpg", "flat/5.jpg")
    labels, classes = common.ImageFolder(tmp_path / "train").labels()
    assert classes == ["a", "b"] and labels.tolist() == [0, 1]
    assert common.ImageFolder(tmp_path / "val").labels(classes)[0].tolist() == [1]
    for part, says in [("other", "class c is not among"), ("flat", "named by class")]:
        with pytest.raises(SystemExit) as stop:
            common.ImageFolder(tmp_path / part).labels(classes)
        assert stop.value.code == 2 and says in capsys.readouterr().err


# --- decoding ---

def test_every_kind_of_file_comes_out_as_upright_rgb(tmp_path, photograph):
    color = photograph.resize((90, 60))
    gray16 = Image.fromarray((np.asarray(color.convert("L")).astype(np.uint16) << 8))
    alpha = color.copy()
    alpha.putalpha(255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    turned = color.transpose(Image.Transpose.ROTATE_90)
    color.save(tmp_path / "rgb.png")
    alpha.save(tmp_path / "alpha.png")
    color.save(tmp_path / "rgb.webp", lossless=True)
    color.quantize(256).save(tmp_path / "palette.png", transparency=3)
    color.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    color.convert("L").save(tmp_path / "gray.jpg", quality=98)
    gray16.save(tmp_path / "gray16.png")
    gray16.save(tmp_path / "gray16.tif")
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=98), turned.save(tmp_path / "turned.png", exif=exif)
    turned.save(tmp_path / "turned.tif", exif=exif)
    (tmp_path / "bit.bmp").parent.mkdir(exist_ok=True), color.convert("1").save(tmp_path / "bit.bmp")
    folder = common.ImageFolder(tmp_path)
    assert len(folder) == 12
    for i in range(len(folder)):
        image, name = folder.image(i), folder.name(i)
        assert image.size == (90, 60), name
        view = image.crop([(0, 0, 90, 60)], [60])[0]
        assert view.mode == "RGB" and view.size == (60, 60), name
        expected = color.convert("L").convert("RGB") if "gray" in name else color
        expected = expected.resize((60, 60), Image.Resampling.BILINEAR, box=(0, 0, 90, 60))
        difference = np.abs(np.asarray(view, int) - np.asarray(expected, int)).mean()
        assert difference < (100 if "bit" in name else 8), (name, difference)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_jpeg_decoded_at_a_reduced_scale_gives_the_same_view(tmp_path, photograph, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    big = photograph.resize((2400, 1600), Image.Resampling.BICUBIC)
    big.save(tmp_path / "big.jpg", quality=95, exif=exif), big.save(tmp_path / "big.png", exif=exif)
    jpeg, png = (common.LazyImage(Image.open(tmp_path / f"big.{kind}"), 0) for kind in ("jpg", "png"))
    assert jpeg.size == png.size == ((2400, 1600) if orientation < 5 else (1600, 2400))
    crops = [(100, 50, 1500, 1450), (700, 300, 1300, 1000)]
    for view, whole in zip(jpeg.crop(crops, [96, 64]), png.crop(crops, [96, 64])):
        assert np.abs(np.asarray(view, int) - np.asarray(whole, int)).mean() < 2
    assert max(jpeg.pil.size) == 300 and max(png.pil.size) == 2400  # an eighth: the 600-pixel crop still fills 64


def test_a_jpeg_can_be_decoded_at_one_scale_after_another(tmp_path, photograph):
    photograph.resize((1200, 800), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg")
    source = common.ImageFolder(tmp_path)
    image = source.image(0)
    small, whole, shrunk = image.crop([(0, 0, 800, 800)], [100])[0], image.decode(), image.shrunk()  # 1/8, 1, 1/2
    assert whole.size == image.size == (1200, 800)
    assert np.array_equal(small, source.image(0).crop([(0, 0, 800, 800)], [100])[0])
    assert np.array_equal(shrunk, source.image(0).shrunk()) and np.array_equal(whole, source.image(0).decode())


def test_random_crop_has_the_distribution_of_torchvisions():
    torch.manual_seed(0)
    rng, canvas = np.random.default_rng(0), torch.empty(1, 300, 400)
    ours = np.array([common.random_crop((400, 300), (0.2, 1.0), rng) for _ in range(4000)])
    draws = [T.RandomResizedCrop(8, (0.2, 1.0)).make_params([canvas]) for _ in range(4000)]
    theirs = np.array([[draw[name] for name in ("left", "top", "width", "height")] for draw in draws])
    theirs[:, 2:] += theirs[:, :2]
    assert ours[:, :2].min() >= 0 and (ours[:, 2:] <= (400, 300)).all()
    for column in range(4):
        quantiles = np.linspace(0.05, 0.95, 10)
        assert np.abs(np.quantile(ours[:, column], quantiles) - np.quantile(theirs[:, column], quantiles)).max() < 12
    assert common.random_crop((1000, 10), (0.9, 1.0), rng) == (493, 0, 506, 10)  # no crop fits: the middle, at 4/3


# --- shapes ---

def test_shapes_are_the_same_for_everyone_and_know_what_they_show():
    assert len(common.SHAPE_CLASSES) >= 10
    one, two = common.Shapes(40, 96, seed=5), common.Shapes(1000, 96, seed=5)
    counts = set()
    for i in reversed(range(40)):
        image, boxes, masks, classes = one.scene(i)
        for a, b in zip((image, boxes, masks, classes), two.scene(i)):
            assert (a == b).all()
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8 and len(boxes) == len(masks) == len(classes)
        assert masks.sum(axis=0).max(initial=0) <= 1  # a pixel shows one object
        counts.add(len(classes))
        for (x1, y1, x2, y2), mask in zip(boxes.astype(int), masks):
            ys, xs = np.nonzero(mask)
            assert (x1, y1, x2, y2) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    assert counts >= {1, 2, 3, 4, 5}
    assert (common.Shapes(1, 96, seed=6).scene(0)[0] != one.scene(0)[0]).any()


def test_a_single_shape_has_its_label_and_fills_its_picture():
    shapes = common.Shapes(36, 64, single=True)
    labels, names = shapes.labels()
    drawn = common.Shapes(36, 64, single=True).draw_all()
    for i in range(36):
        image, boxes, masks, classes = shapes.scene(i)
        assert classes.tolist() == [labels[i]] and masks[0].mean() > 0.03
        assert (np.asarray(drawn.image(i).pil) == image).all()


# --- sampler and loader ---

def my_batches(first_step):
    return list(common.global_batches(50, 12, seed=7, first=first_step, last=12))  # three epochs of 4 steps


def test_global_batches_hold_the_same_images_whatever_the_number_of_processes():
    alone = my_batches(0)
    assert len(alone) == 12 and all(len(batch) == 12 for batch in alone)
    shares = in_processes(3, my_batches, 0)
    assert [a + b + c for a, b, c in zip(*shares)] == alone
    for epoch in range(3):
        images = [i for batch in alone[4 * epoch:4 * epoch + 4] for _, i in batch]
        assert len(set(images)) == 48
    assert [i for _, i in alone[0]] != [i for _, i in alone[4]]
    assert my_batches(6) == alone[6:]  # a resumed run goes on in the middle of an epoch


def whole_view(image, rng):
    return {"view": common.to_tensor(image.crop([common.random_crop(image.size, (0.2, 1), rng)], [32])[0])}


def loader(source, workers=0, epochs=1, batch_size=8):
    batches = common.global_batches(len(source), batch_size, 0, 0, epochs * (len(source) // batch_size))
    return common.Loader(source, whole_view, batches, workers, torch.device("cpu"))


def test_the_number_of_workers_changes_nothing(pictures):
    source = common.ImageFolder(pictures / "train")
    alone, two = list(loader(source)), list(loader(source, workers=2))
    assert len(alone) == len(two) == 6
    for a, b in zip(alone, two):
        assert torch.equal(a["view"], b["view"]) and torch.equal(a["index"], b["index"])
    assert alone[0]["view"].dtype == torch.uint8


def test_a_file_that_cannot_be_decoded_is_named_once_and_replaced(tmp_path, capsys):
    write_pictures(tmp_path, 150)
    bad = next(iter(sorted(tmp_path.rglob("*.png"))))
    bad.write_bytes(bad.read_bytes()[:90])
    batches = list(loader(common.ImageFolder(tmp_path), epochs=3, batch_size=50))
    assert len(batches) == 9 and all(len(batch["view"]) == 50 for batch in batches)
    err = capsys.readouterr().err
    assert err.count("cannot decode") == 1 and f"{bad.parent.name}/{bad.name}" in err


@pytest.mark.parametrize("share", [3, 1])
def test_more_than_one_percent_of_bad_files_ends_the_run_with_code_2(tmp_path, capsys, share):
    write_pictures(tmp_path, 60)
    for path in sorted(tmp_path.rglob("*.png"))[::share]:
        path.write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:
        list(loader(common.ImageFolder(tmp_path)))
    assert stop.value.code == 2 and "more than 1 %" in capsys.readouterr().err


# --- kNN ---

def test_shapes_are_drawn_even_after_torch_has_used_its_threads():
    code = ("import torch, common; torch.set_num_threads(4); torch.rand(4_000_000).exp().sum(); "
            "common.Shapes(8, 256).draw_all()")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


class Pixels(nn.Module):
    """A "backbone" whose features are the picture itself, coarsely."""

    def forward(self, x, stages=4):
        return [F.adaptive_avg_pool2d(x, 4).flatten(1)[:, :, None, None]]


def slow_knn(train, val, size, k, temperature):
    def rows(source):
        out = []
        for i in range(len(source)):
            view = source.image(i).crop([common.center_crop(source.image(i).size)], [size])[0]
            x = (torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255
                 - torch.tensor(common.MEAN).view(3, 1, 1)) / torch.tensor(common.STD).view(3, 1, 1)
            out.append(F.normalize(F.adaptive_avg_pool2d(x, 4).flatten(), dim=0))
        return out
    (bank, labels), (queries, truth) = ((rows(source), source.labels()[0].tolist()) for source in (train, val))
    hits = 0
    for query, label in zip(queries, truth):
        near = sorted(((float(query @ row), c) for row, c in zip(bank, labels)), reverse=True)[:k]
        votes = {}
        for similarity, c in near:
            votes[c] = votes.get(c, 0) + np.exp(similarity / temperature)
        hits += max(votes, key=votes.get) == label
    return hits / len(truth)


def knn_of_pixels(k):
    train, val = common.Shapes(101, 40, 0, single=True), common.Shapes(61, 40, 1, single=True)
    return common.knn(Pixels(), train, val, 32, torch.device("cpu"), k=k)


@pytest.mark.parametrize("k", [5, 200])
def test_knn_equals_the_slow_vote_on_one_process_and_three(k):
    train, val = common.Shapes(101, 40, 0, single=True), common.Shapes(61, 40, 1, single=True)
    expected = slow_knn(train, val, 32, min(k, 101), 0.07)
    assert knn_of_pixels(k) == pytest.approx(expected, abs=1e-6)
    assert in_processes(3, knn_of_pixels, k) == [pytest.approx(expected, abs=1e-6)] * 3


def test_knn_finds_the_right_class_of_pictures_it_has_seen():
    shapes = common.Shapes(24, 40, single=True)
    assert common.knn(Pixels(), shapes, shapes, 32, torch.device("cpu"), k=1) == 1.0


class FourStages(nn.Module):
    """Only the last but one stage, c4, has anything to tell."""

    def forward(self, x, stages=4):
        return [torch.zeros_like(x), torch.zeros_like(x), *Pixels()(x), torch.zeros_like(x)][:stages]


def test_knn_looks_at_the_stage_that_it_is_asked_for():
    shapes = common.Shapes(48, 32, single=True)
    figure = lambda stage: common.knn(FourStages(), shapes, shapes, 32, torch.device("cpu"), k=1, stage=stage)
    assert figure(4) == 1.0 and max(figure(3), figure(5)) < 0.5
