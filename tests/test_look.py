"""transfer/look.py: what the pictures show is where and what it was in the images."""
import argparse
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.ops import box_iou

import common
import detcon
import dupr
import moco
import soco
from conftest import run_script, write_pictures
from transfer import look, page

SMALL = ("--arch", "resnet18w0.25", "--size", 32, "--batch-size", 8, "--max-steps", 2, "--print-every", 1, "--workers",
         0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pictures):
    """Two steps of three methods: {method: its folder}."""
    root, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    more = {moco: ("--queue", 32), dupr: ("--queue", 32), soco: ("--proposals", "random", "--hidden", 16)}
    for module, flags in more.items():
        assert run_script(module, patch, "--data", pictures, "--out", root / module.__name__, *SMALL, *flags) == 0
    patch.undo()
    return {module.__name__: root / module.__name__ for module in more}


def drawn(tmp_path, monkeypatch, *argv):
    """The picture of a command line, which must succeed."""
    path = tmp_path / "picture.png"
    assert run_script(look, monkeypatch, *argv, "--out", path) == 0
    return Image.open(path).convert("RGB")


def spots(image, color, tolerance=40):
    """Rows and columns of the pixels of a color."""
    return np.nonzero((abs(np.asarray(image).astype(int) - color) <= tolerance).all(axis=2))


# --- Attention -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [96, 112])
@pytest.mark.parametrize("row, column", [(0, 2), (1, 1), (2, 0)])
def test_attention_is_highest_on_the_pixels_of_the_active_cell(size, row, column):
    cells = -(-size // 32)
    c = torch.zeros(1, 5, cells, cells)
    c[0, 3, row, column] = 7.0
    maps = look.attention_maps(c, 32, size)
    assert maps.shape == (1, size, size) and maps.min() == 0 and 0.9 < maps.max() <= 1
    y, x = np.unravel_index(int(maps[0].argmax()), (size, size))
    assert abs(y + 0.5 - (32 * row + 16)) <= 16 and abs(x + 0.5 - (32 * column + 16)) <= 16
    if (row, column) == (1, 1):                                          # not at the border, where interpolation clamps
        y, x = (maps[0].sum(dim=k) @ (torch.arange(size) + 0.5) / maps[0].sum() for k in (1, 0))
        assert abs(y - 48) < 0.01 and abs(x - 48) < 0.01


class Brightness(torch.nn.Module):
    """A backbone whose every stage is the mean brightness of each cell."""

    def forward(self, x, stages=4):
        gray = common.denormalize(x).mean(dim=1, keepdim=True)
        return [F.avg_pool2d(gray, 4 * 2 ** k) for k in range(stages)]


def test_attention_of_a_bright_spot_is_drawn_over_it(tmp_path, monkeypatch):
    image = np.zeros((256, 256, 3), np.uint8)
    image[70:110, 150:190] = 255
    Image.fromarray(image).save(tmp_path / "spot.png")
    monkeypatch.setattr(look, "networks", lambda args, device: setattr(args, "size", 224)
                        or {"grayscale": Brightness()})
    sheet = drawn(tmp_path, monkeypatch, "attention", "--init", "random", "--data", tmp_path, "--stage", 3)
    right = np.asarray(sheet).astype(float)[26:, 256 + 8:]
    y, x = np.nonzero(right[..., 0] > right[..., 2] + 60)                # red, not blue
    expected = (np.array([70 + 110, 150 + 190]) / 2 - 16) * 256 / 224    # the middle 224 of 256, drawn at 256
    assert np.allclose([y.mean() + 0.5, x.mean() + 0.5], expected, atol=4)


# --- Neighbors ------------------------------------------------------------------------------------------------------

def test_the_nearest_neighbor_of_a_duplicate_is_its_duplicate(tmp_path, monkeypatch, runs, pictures):
    folder = write_pictures(tmp_path / "images", 24, size=64)
    for k, path in enumerate(sorted(folder.rglob("*.png"))):
        (folder / "twins").mkdir(exist_ok=True)
        (folder / "twins" / f"{k}.png").write_bytes(path.read_bytes())
    found = {}
    monkeypatch.setattr(look, "nearest",
                        lambda rows, queries, k, nearest=look.nearest: found.setdefault(0, nearest(rows, queries, k)))
    drawn(tmp_path, monkeypatch, "neighbors", "--init", runs["moco"] / "last.pt", "--data", folder, "--images", 48,
          "-k", 2)
    source = common.ImageFolder(folder)
    content = [(folder / source.name(i)).read_bytes() for i in range(48)]
    queries = np.random.default_rng((5, 0)).permutation(48)
    assert all(content[q] == content[near[0]] and q not in near for q, near in zip(queries, found[0].tolist()))


def test_neighbors_of_the_same_folder_have_a_green_frame_and_others_a_red_one(tmp_path, monkeypatch):
    for i, (name, gray) in enumerate([("a", 20), ("a", 30), ("b", 220), ("b", 200), ("b", 90)]):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (gray,) * 3).save(tmp_path / name / f"{i}.png")
    monkeypatch.setattr(look, "networks", lambda args, device: setattr(args, "size", 64) or {"grayscale": Brightness()})
    monkeypatch.setattr(look, "nearest", lambda rows, queries, k: torch.tensor([[1, 2]]))
    monkeypatch.setattr(look, "pick", lambda args, source: np.array([0]))
    sheet = drawn(tmp_path, monkeypatch, "neighbors", "--init", "random", "--data", tmp_path)
    side = look.SIDE // 2 + 8                                            # a picture and its frame
    assert {x // side for x in spots(sheet, (0, 160, 0))[1]} == {1}
    assert {x // side for x in spots(sheet, (208, 0, 0))[1]} == {2}


# --- Patches ---------------------------------------------------------------------------------------------------------

def test_a_patch_of_a_mirrored_view_is_found_at_the_mirrored_place():
    torch.manual_seed(0)
    c = torch.randn(2, 16, 5, 7)
    places = look.matches(c, c.flip(3)).view(2, 5, 7)
    for row in range(5):
        for column in range(7):
            assert (places[:, row, column] == 7 * row + 6 - column).all()


def test_counterparts_are_the_same_spots_of_the_image():
    """An image whose red and green tell the place, and two_views's views of it."""
    y, x = np.mgrid[0:256, 0:256]
    image = lambda: common.LazyImage(Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8)), 0)
    points = torch.cartesian_prod(torch.arange(6), torch.arange(6)) * 16.0 + 8
    met = set()
    for seed in range(12):
        batch = {k: v[None] for k, v in dupr.two_views(image(), np.random.default_rng(seed), 96, 0.3).items()}
        turned = batch["flip_q"] ^ batch["flip_k"]
        ends, seen = look.counterparts(points, batch["box_q"], batch["box_k"], turned)
        color = lambda view, p: F.grid_sample(view[:, :2].float(), (p / 48 - 1)[:, None],
                                              align_corners=False)[0, :, 0].T
        inner = seen[0] & ((ends[0] > 2) & (ends[0] < 94)).all(dim=1)
        assert torch.allclose(color(batch["x_q"], points[None])[inner], color(batch["x_k"], ends)[inner], atol=2.5)
        met.add((turned.item(), bool(inner.any())))
    assert {(True, True), (False, True)} <= met


def test_lines_join_a_patch_with_its_match_green_where_it_is_right():
    views = [Image.new("RGB", (64, 64), "black")] * 2
    sheet = page.linked(*views, torch.tensor([[10.0, 10.0], [10.0, 50.0]]), torch.tensor([[20.0, 30.0], [20.0, 50.0]]),
                        torch.tensor([True, False]))
    assert sheet.getpixel((10, 10)) == sheet.getpixel((64 + 8 + 20, 30)) == (0, 224, 0)
    assert sheet.getpixel((10, 50)) == sheet.getpixel((40, 50)) == (255, 48, 48)


# --- IoU and similarity ----------------------------------------------------------------------------------------------

def test_rois_have_the_ious_told_from_0_to_1():
    rng = np.random.default_rng(0)
    for box in ([60.0, 40, 130, 100], [0, 0, 30, 30], [150, 20, 224, 200]):
        boxes, iou = look.rois_near(np.array(box), 224, 20, rng)
        assert np.allclose(iou, box_iou(torch.tensor([box]).double(), torch.from_numpy(boxes))[0])
        assert np.allclose(iou, np.linspace(0, 1, 20), atol=0.03) and boxes.min() >= 0 and boxes.max() <= 224


def test_similarity_is_1_of_the_object_itself_and_the_mean_cosine_over_places_of_others():
    torch.manual_seed(0)
    c, boxes = torch.randn(2, 6, 8, 8), torch.tensor([[[16.0, 16, 80, 96], [16, 16, 80, 96], [40, 8, 120, 60]]] * 2)
    values = look.similarity(c, boxes, 16)
    assert values.shape == (2, 2) and torch.allclose(values[:, 0], torch.ones(2))
    q, k = (common.roi_align(c, boxes[:, [n]], 14, 16) for n in (0, 2))
    slow = [[F.cosine_similarity(q[i, :, y, x], k[i, :, y, x], dim=0) for y in range(14) for x in range(14)]
            for i in range(2)]
    assert torch.allclose(values[:, 1], torch.tensor(slow).mean(dim=1), atol=1e-6)


def test_a_proposal_outside_the_image_is_no_object():
    image = common.LazyImage(Image.new("RGB", (100, 80)), 0)
    proposals = np.array([[120.0, 10, 150, 40], [90, 70, 120, 100]])       # the first shows nothing, the other a corner
    for seed in range(8):
        batch = look.object_and_rois(image, np.random.default_rng(seed), lambda image, rng: proposals, 50)
        assert torch.equal(batch["boxes"][0], torch.tensor([45.0, 43.75, 50, 50])) and batch["iou"].isfinite().all()
        batch = look.object_and_rois(image, np.random.default_rng(seed), lambda image, rng: proposals[:1], 50)
        assert torch.equal(batch["boxes"][0], torch.tensor([0.0, 0, 50, 50]))


# --- Proposals, masks ------------------------------------------------------------------------------------------------

def test_every_box_of_the_views_lies_on_the_object_it_was_drawn_around(tmp_path, monkeypatch):
    """One dark object on bright ground and its box: in each view the frame is as far off as jitter allows."""
    image = np.full((200, 300, 3), 255, np.uint8)
    image[50:150, 30:120] = 0
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(image).save(folder / "a.png")
    source = common.ImageFolder(folder)
    soco.save_proposals(tmp_path / "boxes.npz", source, [np.array([[30, 50, 120, 150]])])
    monkeypatch.setattr(soco, "color_augmentation", lambda view, size: common.Photometric())
    for seed in range(4):
        sheet = drawn(tmp_path, monkeypatch, "proposals", "--data", folder, "--proposals", tmp_path / "boxes.npz",
                      "--num-proposals", 1, "--seed", seed)
        starts = [0, 264, 528, 792]  # of the proposals, V1, V2 and V3, each after a gap
        for start, side in zip(starts, [256, 256, 256, 128]):
            part = sheet.crop((start, 26, start + side, 26 + side))
            dark, red = spots(part, (0, 0, 0)), spots(part, (255, 0, 0), 20)
            for k in (0, 1):
                extent = dark[k].max() - dark[k].min()
                assert abs(dark[k].min() - red[k].min()) <= 0.2 * extent + 4
                assert abs(dark[k].max() - red[k].max()) <= 0.2 * extent + 4
    assert spots(sheet.crop((0, 290, *sheet.size)), (0, 114, 178))[0].size        # number and sizes, below


def test_masks_lie_on_what_they_are_masks_of(tmp_path, monkeypatch):
    image, labels = np.full((90, 120, 3), 200, np.uint8), np.zeros((90, 120), np.uint8)
    labels[30:60, 80:110] = 9
    for folder, array in (("images", image), ("masks", labels)):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / "a.png")
    sheet = np.asarray(drawn(tmp_path, monkeypatch, "masks", "--data", tmp_path / "images", "--masks",
                             tmp_path / "masks", "grid3"))[26:]
    truth = np.asarray(Image.fromarray(labels).resize((256, 256), Image.Resampling.NEAREST)) > 0
    own, grid = sheet[:, 264:520], sheet[:, 528:784]
    assert len(np.unique(own[truth], axis=0)) == len(np.unique(own[~truth], axis=0)) == 1
    assert (own[truth][0] != own[~truth][0]).any()
    assert len(np.unique(grid[~truth], axis=0)) == 9 and (grid[:84, :84] == grid[0, 0]).all()
    assert (grid[0, 0] != grid[0, 90]).any()


def test_segments_and_proposals_are_those_of_training_although_the_image_is_drawn_too(tmp_path):
    """A JPEG keeps the scale at which it was first decoded, here too small for the one and too large for the other."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(256, size=(20, 20, 3), dtype=np.uint8)).resize((800, 800))
    small.save(tmp_path / "a.jpg")
    source = common.ImageFolder(tmp_path)
    image = source.image(0)
    look.square_view(image, rng, 256)
    segments = look.open_masks("fh", source)(image)
    assert np.array_equal(segments, detcon.felzenszwalb(source.image(0), detcon.PAPER["fh_scale"]))
    args = argparse.Namespace(proposals="search", data=tmp_path)
    image, expected = source.image(0), look.square_view(source.image(0), rng, 448)["view"]
    boxes = look.open_proposals(args, source, "cpu")(image, rng)
    assert len(boxes) and np.array_equal(boxes, soco.find_objects(source, 0))
    assert torch.equal(look.square_view(image, rng, 448)["view"], expected)


def test_a_file_without_a_box_has_no_histogram(tmp_path, monkeypatch, pictures):
    source = common.open_folder(pictures)
    soco.save_proposals(tmp_path / "boxes.npz", source, [np.zeros((0, 4))] * len(source))
    sheet = drawn(tmp_path, monkeypatch, "proposals", "--data", pictures, "--proposals", tmp_path / "boxes.npz")
    assert sheet.height == 26 + 4 * 256 + 3 * 8


# --- Curves ----------------------------------------------------------------------------------------------------------

def test_ticks_are_round_and_enclose_the_values():
    assert np.allclose(page.ticks([0, 1]), [0, 0.2, 0.4, 0.6, 0.8, 1])
    assert np.allclose(page.ticks([3, 512]), [0, 200, 400, 600])
    assert np.allclose(page.ticks([-7.9, -0.1]), [-8, -6, -4, -2, 0])
    assert page.ticks([4, 4])[0] < 4 < page.ticks([4, 4])[-1] and page.ticks([0.0])[0] < 0 < page.ticks([0.0])[-1]


def test_curves_draw_the_values_of_the_logs_where_the_axes_say(tmp_path, monkeypatch):
    for name, values in (("a", [0.0, 1.0]), ("b", [0.25, 0.25])):        # axes from 0 to 1 and from 0 to 100
        (tmp_path / name).mkdir()
        rows = [{"epoch": 0, "step": 100 * k, "loss": v}
                for k, v in enumerate(values)] + [{"epoch": 1, "step": 50, "loss": float("nan")}]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')
    sheet = drawn(tmp_path, monkeypatch, "curves", tmp_path / "a", tmp_path / "b" / "log.jsonl")
    left, top, right, bottom = page.FRAME
    assert sheet.size == page.CHART
    y, x = spots(sheet, (0, 114, 178))                                   # a: rises from corner to corner
    y, x = y[(y > top - 5)], x[(y > top - 5)]
    assert np.abs((x + 0.5 - left) / (right - left) - (bottom - y - 0.5) / (bottom - top)).max() < 0.03
    y, x = spots(sheet, (213, 94, 0))                                    # b: level
    y = y[(x > left + 150) & (x < right - 20) & (y > top + 5)]
    assert abs(y.mean() + 0.5 - (bottom - 0.25 * (bottom - top))) < 1


def test_views_are_as_large_as_in_training_or_twice_that_whatever_they_are_compared_with(runs, monkeypatch):
    for times, inits, size in ((1, ["moco", "random"], 32), (2, ["random", "moco"], 64), (2, ["random0"], 448)):
        paths = [str(runs[init] / "last.pt") if init in runs else init for init in inits]
        args = argparse.Namespace(init=paths, part="online", arch="resnet18w0.25", seed=0, size=None, times=times)
        assert list(look.networks(args, "cpu")) == inits and args.size == size


# --- Command line ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", ["attention", "neighbors -k 3", "patches", "iou --images 5",
                                     "proposals --proposals random", "proposals --proposals whole --images 2",
                                     "masks --masks grid4", "curves"])
@pytest.mark.parametrize("data", ["folder", "shapes"])
def test_every_picture_can_be_drawn_and_is_the_same_again(command, data, tmp_path, monkeypatch, runs, pictures):
    argv = command.split()
    if argv[0] == "curves":
        argv += list(runs.values())
    if argv[0] in ("attention", "neighbors", "patches", "iou"):
        argv += ["--init", *[out / "last.pt" for out in runs.values()]]
    argv += ["--data", pictures] if data == "folder" and argv[0] != "curves" else []
    monkeypatch.setattr(common, "cores", lambda: 1)
    made = common.Shapes.__init__
    monkeypatch.setattr(common.Shapes, "__init__", lambda self, count, *args: made(self, min(count, 24), *args))
    first, again = (np.asarray(drawn(tmp_path, monkeypatch, *argv)) for _ in range(2))
    assert min(first.shape[:2]) > 100 and first.std() > 10 and np.array_equal(first, again)


@pytest.mark.parametrize("argv, words", [
    ("attention --init {moco} --data nowhere", "no such folder"),
    ("attention --init nothing.pt", "cannot be read"),
    ("attention --init {log}", "cannot be read"),
    ("attention --init {moco} --stage 6", "invalid choice"),
    ("attention --init random --arch resnet7", "unknown --arch"),
    ("neighbors --init {soco} --part nobody", "invalid choice"),
    ("attention --init {moco} --arch resnet18", "leave --arch out"),
    ("proposals --data {data} --proposals nothing.npz", "is not an .npz"),
    ("proposals --data {data} --proposals truth", "drawn shapes"),
    ("masks --masks grid17", "nor a folder"),
    ("masks --data {data} --masks truth", "drawn shapes"),
    ("curves nowhere", "not a log.jsonl"),
    ("curves {moco}", "not a log.jsonl"),
    ("curves {log} --stats speed", "not in the logs"),
    ("curves {log} --out nowhere/a.png", "in a folder that exists"),
    ("curves {log} --out a.xyz", "it must be a picture"),
    ("curves {log} --out a.psd", "it must be a picture"),
    ("curves bare.jsonl", "is empty"),
    ("", "required"),
])
def test_what_cannot_be_drawn_ends_with_one_line_and_2(argv, words, monkeypatch, capsys, runs, pictures, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.jsonl").write_text('{"epoch": 0, "step": 1}\n')
    paths = {"moco": runs["moco"] / "last.pt", "soco": runs["soco"] / "last.pt", "log": runs["moco"] / "log.jsonl",
             "data": pictures}
    assert run_script(look, monkeypatch, *[word.format(**paths) for word in argv.split()]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "Traceback" not in error
