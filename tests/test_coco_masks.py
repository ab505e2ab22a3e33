"""transfer/coco_masks.py: COCO's annotations as masks."""
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

import common
import detcon
from conftest import run_script, runs
from transfer import coco_masks


def packed(counts):
    """COCO's packed run lengths by their rule: 5 bits a character, lowest first; from the fourth on, differences."""
    text = ""
    for k, count in enumerate(counts):
        value, more = count - (counts[k - 2] if k > 2 else 0), True
        while more:
            low, value = value & 31, value >> 5
            more = not (value == 0 and not low & 16 or value == -1 and low & 16)
            text += chr(48 + (low | 32 if more else low))
    return text


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_plain_and_packed_give_the_mask_back(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((37, 53)) < [0.5, 0.02, 0.98, 0.9, 0.1][seed]
    counts = runs(mask)
    for written in (counts, packed(counts)):
        assert np.array_equal(coco_masks.decode({"size": [37, 53], "counts": written}, (53, 37)), mask)


def test_packed_run_lengths_are_read_as_pycocotools_writes_them():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    # its mask.encode of this
    assert np.array_equal(coco_masks.decode({"size": [4, 5], "counts": "5220003"}, (5, 4)), mask)


def test_run_lengths_of_another_size_are_refused():
    """4 x 6 pixels are as many as 6 x 4: they would make a mask, but of something else."""
    with pytest.raises(ValueError, match=r"\[6, 4\]"):
        coco_masks.decode({"size": [6, 4], "counts": [9, 1, 3, 1, 3, 1, 6]}, (6, 4))


def test_polygons_are_filled():
    mask = coco_masks.decode([[10, 10, 30, 10, 30, 20, 10, 20], [2.4, 1, 2.6, 1, 2.6, 5, 2.4, 5]], (50, 40))
    truth = np.zeros((40, 50), bool)
    truth[10:20, 10:30], truth[1:5, 2] = True, True
    assert np.array_equal(mask, truth)


@pytest.mark.parametrize("radius", [5, 12, 40])
def test_polygons_are_filled_as_pycocotools_does(radius):
    rng, overlap = np.random.default_rng(radius), []
    for _ in range(50):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 12))
        points = 50 + (radius * rng.uniform(0.6, 1, 12) * np.stack([np.cos(angle), np.sin(angle)])).T
        ours = coco_masks.decode([points.flatten().tolist()], (100, 100))
        theirs = rle.decode(rle.merge(rle.frPyObjects([points.flatten().tolist()], 100, 100))) > 0
        overlap.append((ours & theirs).sum() / (ours | theirs).sum())
        assert abs(ours.sum() - theirs.sum()) < 0.12 * theirs.sum() + 3
    assert np.mean(overlap) > {5: 0.85, 12: 0.93, 40: 0.98}[radius], np.mean(overlap)


def test_objects_become_bits_of_a_png_that_detcon_reads_largest_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for name in ("a/1.jpg", "2.jpg"):
        Image.new("RGB", (30, 20)).save(tmp_path / "images" / name)
    one, two = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    one[2:5, 3:9], two[4:18, 5:25] = True, True
    annotation = lambda mask, crowd=0: {"image_id": 7, "iscrowd": crowd, "bbox": [0, 0, 1, int(mask.sum())],
                                        "segmentation": {"size": [20, 30], "counts": runs(mask)}}
    dataset = {"images": [{"id": 7, "file_name": "a/1.jpg", "width": 30, "height": 20},
                          {"id": 8, "file_name": "2.jpg", "width": 30, "height": 20}],
             "annotations": [annotation(one), annotation(two), annotation(~two, crowd=1)]}
    (tmp_path / "annotations.json").write_text(json.dumps(dataset))
    places = [tmp_path / name for name in ("annotations.json", "images", "masks")]
    assert run_script(coco_masks, monkeypatch, *places) == 0
    assert "1 images have no object" in capsys.readouterr().out
    source = common.ImageFolder(tmp_path / "images")
    i = [source.name(k) for k in range(2)].index("a/1.jpg")
    mask = detcon.read_mask(source.image(i), tmp_path / "masks", source)
    assert mask.dtype == np.uint16 and np.array_equal(mask & 1 > 0, two) and np.array_equal(mask >> 1 & 1 > 0, one)
    assert mask.max() < 4
    dataset["categories"] = [{"id": 9}, {"id": 4}]
    for annotation, category in zip(dataset["annotations"], (9, 4, 9)):
        annotation["category_id"] = category
    dataset["annotations"].append({**dataset["annotations"][1],
                                   "segmentation": {"size": [20, 30], "counts": runs(np.ones((20, 30), bool))},
                                   "area": 600})                                           # the others have no area
    (tmp_path / "annotations.json").write_text(json.dumps(dataset))
    assert run_script(coco_masks, monkeypatch, "--labels", *places[:2], tmp_path / "labels") == 0
    label = np.asarray(Image.open(tmp_path / "labels" / "a" / "1.png"))
    assert label.dtype == np.uint8 and np.array_equal(label, np.where(one, 2, 1))         # the small one lies on top
    assert not np.asarray(Image.open(tmp_path / "labels" / "2.png")).any()
    before = [path.read_bytes() for path in sorted((tmp_path / "images").rglob("*.*"))]
    assert run_script(coco_masks, monkeypatch, *places[:2], tmp_path / "labels" / ".." / "images") == 2
    assert "holds the images" in capsys.readouterr().err
    assert before == [path.read_bytes() for path in sorted((tmp_path / "images").rglob("*.*"))]
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "2.png")
    assert run_script(coco_masks, monkeypatch, *places) == 2
    assert "2 images are named 2 with different extensions" in capsys.readouterr().err
    (tmp_path / "annotations.json").write_text("{}")
    assert run_script(coco_masks, monkeypatch, *places) == 2
    error = capsys.readouterr().err
    assert "not a COCO instances file" in error and error.count("\n") == 1
