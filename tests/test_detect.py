"""transfer/detect.py: targets, filling from a checkpoint, AP, and runs of torchvision's detectors."""
import argparse
import json
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
import moco
import soco
from conftest import (in_processes, in_two_processes, rows, run_script, weights, without_speed, write_checkpoint,
                      write_scenes)
from transfer import coco, convert, detect

ARCH = "resnet18w0.25"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    return write_scenes(root / "train", 12), write_scenes(root / "val", 5, seed=1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    models = {"soco": soco.SoCo(ARCH, "fpn", hidden=8, dim=8), "moco": moco.MoCo(ARCH, 8, queue=8)}
    return {method: (write_checkpoint(folder / f"{method}.pt", method, model, ARCH), model)
            for method, model in models.items()}


def arguments(scenes, out, *more, init="random"):
    part = lambda name, folder: [f"--{name}", folder / "images", folder / "annotations.json"]
    arch = ["--arch", ARCH] if init == "random" else []
    return ["--init", init, *arch, *part("train", scenes[0]), *part("val", scenes[1]), "--out", out, "--size", 64, 64,
            "--rois", 16,
            "--batch-size", 4, "--epochs", 2, "--print-every", 1, *more]


def run(monkeypatch, *argv):
    return run_script(detect, monkeypatch, *argv)


def annotated(folder, needs=None):
    return coco.CocoFolder(folder / "images", folder / "annotations.json", training=True, needs=needs)



@pytest.mark.parametrize("size, bounds", [(800, (112, 224, 448)), (160, (22.4, 44.8, 89.6))])
def test_a_box_belongs_to_the_level_that_it_has_in_an_image_of_800_pixels(size, bounds):
    pool = detect.build("fasterrcnn", ARCH, 3, size=(size, size)).roi_heads.box_roi_pool
    pyramid = {str(level): torch.full((1, 1, size // stride, size // stride), float(level))
               for level, stride in enumerate((4, 8, 16, 32))}
    sides = [side * factor for side in bounds for factor in (0.99, 1.01)]                # just below a bound, and above
    boxes = torch.tensor([[0, 0, side, side] for side in sides])
    pooled = pool(pyramid, [boxes], [(size, size)])                                      # cells hold their level
    assert pooled[:, 0, 3, 3].tolist() == [0, 1, 1, 2, 2, 3]

def test_targets_are_those_of_the_scene_with_labels_from_one(scenes):
    source, pointed = annotated(scenes[0], "segmentation"), annotated(scenes[0], "keypoints")
    shapes = common.Shapes(12, 64)
    for i in range(12):
        batch = coco.image_and_targets(source.image(i), None, source, masks=True)
        points = coco.image_and_targets(pointed.image(i), None, pointed, keypoints=True)["keypoints"]
        n = int(source.name(i).partition(".")[0])
        image, boxes, masks, classes = shapes.scene(n)
        assert source.ids[i] == 100 + n and np.array_equal(batch["image"].permute(1, 2, 0), image)
        assert np.array_equal(batch["boxes"], boxes) and np.array_equal(batch["masks"], masks)
        assert (batch["labels"] - 1).tolist() == classes.tolist()
        assert np.array_equal(points[:, 0, :2], boxes[:, :2] + 0.5)  # the middle of the first pixel


def test_a_mirrored_example_is_mirrored_whole(scenes):
    def look():
        masked, pointed = annotated(scenes[0], "segmentation"), annotated(scenes[0], "keypoints")
        return (coco.image_and_targets(masked.image(3), None, masked, masks=True)
                | {"keypoints": coco.image_and_targets(pointed.image(3), None, pointed, keypoints=True)["keypoints"]})

    names, plain = ["left_top", "right_top"], look()
    other = coco.mirrored(look(), names)
    assert torch.equal(other["image"], plain["image"].flip(2)) and not torch.equal(other["image"], plain["image"])
    inner = torchvision.ops.masks_to_boxes(other["masks"])  # its right and lower edge are pixels
    assert torch.equal(inner + torch.tensor([0, 0, 1, 1]), other["boxes"])
    corner = torch.tensor([0.5, 0.5])
    assert torch.equal(other["keypoints"][:, 0, :2], other["boxes"][:, :2] + corner)  # left_top is on the left again
    assert torch.equal(other["keypoints"][:, 1, :2], other["boxes"][:, [2, 1]] + corner * torch.tensor([-1, 1]))
    again = coco.mirrored(other, names)
    assert all(torch.equal(again[name], plain[name]) for name in ("image", "boxes", "masks", "keypoints"))


def test_a_mirrored_box_has_a_width(tmp_path):
    """float32 has 4e-9 beside 0.05 and 4e-6 beside 64: a box thin enough would vanish, and torchvision refuse it."""
    folder = write_scenes(tmp_path / "a", 1)
    dataset = json.loads((folder / "annotations.json").read_text())
    dataset["annotations"] = [{**dataset["annotations"][0], "bbox": [0.05, 3, width, 9]} for width in (1e-6, 0.5)]
    (folder / "annotations.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(dataset).encode())  # as on Windows
    source = annotated(folder)
    batch = coco.mirrored(coco.image_and_targets(source.image(0), None, source), [])
    assert len(batch["boxes"]) == len(batch["labels"]) == 1
    assert torch.allclose(batch["boxes"], torch.tensor([[63.45, 3, 63.95, 12]]))


def test_crowds_and_images_without_objects_are_not_trained_on(tmp_path):
    folder = write_scenes(tmp_path / "a", 4)
    dataset = json.loads((folder / "annotations.json").read_text())
    first = [annotation for annotation in dataset["annotations"] if annotation["image_id"] == 100]
    second = [annotation for annotation in dataset["annotations"] if annotation["image_id"] == 101]
    for annotation in first:
        annotation["iscrowd"] = 1
    second[0]["bbox"][2] = 0                                                              # no width
    (folder / "annotations.json").write_text(json.dumps(dataset))
    source = annotated(folder)
    assert [source.name(i) for i in range(len(source))] == ["1.png", "2.png", "3.png"]
    assert len(source.annotation(0)[2]) == len(second) - 1
    assert len(coco.CocoFolder(folder / "images", folder / "annotations.json", training=False)) == 4


@pytest.mark.parametrize("model", list(detect.LOWEST))
@pytest.mark.parametrize("method", ["soco", "moco"])
def test_every_tensor_of_a_checkpoint_lands_and_gives_the_same_features(checkpoints, model, method):
    path, pretrained = checkpoints[method]
    online = (pretrained.online if method == "soco" else pretrained.encoder_q).eval()
    tensors, _ = convert.read(path)
    detector = detect.build(model, ARCH, 3, keypoints=2, size=(64, 64)).eval()
    before = {name: x.clone() for name, x in detector.state_dict().items()}
    detect.fill(detector, tensors, model)
    x = torch.randn(1, 3, 128, 128)
    stages = online.backbone(x)
    lowest = detect.LOWEST[model]
    body = detector.backbone.body(x)
    assert all(torch.allclose(body[str(k - lowest)], stages[k - 2], atol=1e-5) for k in range(lowest, 6))
    changed = {name for name, y in detector.state_dict().items() if not torch.equal(y, before[name])}
    kept = [name for name in before if name.startswith("backbone.") and name not in changed and before[name].ndim > 1]
    if method == "soco":
        pyramid = online.fpn(dict(enumerate(stages)))
        ours = detector.backbone.fpn({str(k - lowest): stages[k - 2] for k in range(lowest, 6)})
        if lowest == 2:
            assert all(torch.allclose(ours[str(k)], pyramid[k], atol=1e-5) for k in range(4)) and not kept
            rois = torch.randn(3, 64, 7, 7)
            assert torch.allclose(detector.roi_heads.box_head(rois), online.head(rois), atol=1e-5)
        else:
            assert all(torch.allclose(ours[str(k)], pyramid[k + 1], atol=1e-5) for k in range(3))
            assert all("extra_blocks" in name for name in kept)  # P6 and P7 are the detector's own
    else:
        assert kept and all(".fpn." in name for name in kept)


@pytest.mark.parametrize("model", list(detect.LOWEST))
def test_every_detector_trains_and_is_evaluated(scenes, checkpoints, tmp_path, monkeypatch, capsys, model):
    more = ["--head", "2fc"] if model == "keypointrcnn" else []
    init = checkpoints["soco"][0]
    assert run(monkeypatch, *arguments(scenes, tmp_path, "--model", model, "--epochs", 1, *more, init=init)) == 0
    log = rows(tmp_path)
    assert [row["step"] for row in log] == [1, 2, 3, 3] and all(np.isfinite(row["loss"]) for row in log[:3])
    assert {"maskrcnn": "mask_AP", "keypointrcnn": "keypoint_AP"}.get(model, "AP") in log[3]
    assert 0 <= log[3]["AP"] <= 100
    said = capsys.readouterr().out
    assert ("roi_heads.box_head; new" in said) == (model in ("fasterrcnn", "maskrcnn"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """(scenes, the folder of an FCOS that has seen these 4 for 60 steps, and is evaluated on them)."""
    out = tmp_path_factory.mktemp("learned")
    few = write_scenes(out / "scenes", 4)
    with pytest.MonkeyPatch.context() as monkeypatch:
        plan = arguments((few, few), out, "--model", "fcos", "--epochs", 60, "--lr", 0.2, "--print-every", 30)
        assert run(monkeypatch, *plan) == 0
    return few, out


def test_a_detector_learns_a_few_scenes_by_heart(learned):
    assert rows(learned[1])[-1]["AP50"] > 20


def test_a_killed_run_goes_on_as_if_it_had_not_been(scenes, tmp_path, monkeypatch):
    assert run(monkeypatch, *arguments(scenes, tmp_path / "whole")) == 0
    for steps in (2, 4, 6):
        assert run(monkeypatch, *arguments(scenes, tmp_path / "parts", "--max-steps", steps)) == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(x, parts[name]) for name, x in whole.items())
    assert without_speed(rows(tmp_path / "whole")) == without_speed(rows(tmp_path / "parts"))


def test_two_processes_train_and_one_goes_on(scenes, tmp_path, monkeypatch):
    plan = arguments(scenes, tmp_path, "--eval-every", 1)
    assert in_two_processes(detect, *plan, "--max-steps", 4) == [0, 0]
    assert run(monkeypatch, *plan) == 0
    log = rows(tmp_path)
    assert [row["step"] for row in log] == [1, 2, 3, 3, 4, 5, 6, 6] and "AP" in log[3] and "AP" in log[-1]


def evaluated(folder, out):
    detector = detect.build("fcos", ARCH, 12, size=(64, 64))
    detector.load_state_dict(weights(out))
    source = coco.CocoFolder(folder / "images", folder / "annotations.json", training=False)
    args = argparse.Namespace(workers=0, amp="off", model="fcos")
    return detect.evaluate(detector, source, coco.ground_truth(folder / "annotations.json", source), args,
                           torch.device("cpu"))


def test_two_processes_find_the_same_ap_as_one(learned):
    one, (first, second) = evaluated(*learned), in_processes(2, evaluated, *learned)
    assert one == first and second == {} and one["AP50"] > 20


def sparse(dataset):
    """Annotations as loose as annotators make them."""
    for image in dataset["images"]:
        del image["width"], image["height"]
    ids = {image["id"]: f"number {image['id']}" for image in dataset["images"]}
    for image in dataset["images"]:
        image.update(id=ids[image["id"]], file_name=f"./{image['file_name']}")
    for annotation in dataset["annotations"]:
        annotation.update(image_id=ids[annotation["image_id"]], iscrowd=None, area=None)
        del annotation["id"], annotation["num_keypoints"]
    return dataset


@pytest.mark.parametrize("model", ["maskrcnn", "keypointrcnn"])
def test_what_annotators_leave_out_does_not_end_a_run(tmp_path, monkeypatch, model):
    parts = write_scenes(tmp_path / "train", 4), write_scenes(tmp_path / "val", 2, seed=1)
    for folder in parts:
        path = folder / "annotations.json"
        path.write_text(json.dumps(sparse(json.loads(path.read_text()))))
    assert run(monkeypatch, *arguments(parts, tmp_path / "out", "--model", model, "--epochs", 1)) == 0
    assert "AP" in rows(tmp_path / "out")[-1]


def test_without_a_single_object_to_find_ap_is_0(scenes, tmp_path, monkeypatch):
    folder = write_scenes(tmp_path / "val", 2)
    dataset = json.loads((folder / "annotations.json").read_text())
    (folder / "annotations.json").write_text(json.dumps({**dataset, "annotations": []}))
    assert run(monkeypatch, *arguments((scenes[0], folder), tmp_path / "out", "--max-steps", 3, "--epochs", 1)) == 0
    assert rows(tmp_path / "out")[-1]["AP"] == 0


def test_a_finished_run_is_evaluated_when_val_is_named_at_last(scenes, tmp_path, monkeypatch):
    plan = arguments(scenes, tmp_path, "--epochs", 1)
    at = plan.index("--val")
    assert run(monkeypatch, *plan[:at], *plan[at + 3:]) == 0 and "AP" not in rows(tmp_path)[-1]
    for _ in range(2):
        assert run(monkeypatch, *plan) == 0
        assert ["AP" in row for row in rows(tmp_path)] == [False, False, False, True]


@pytest.mark.parametrize("model, rois, train, test", [("fasterrcnn", 512, 2000, 1000), ("maskrcnn", 32, 125, 62)])
def test_proposals_of_training_and_tests_are_torchvisions_and_fall_with_rois(model, rois, train, test):
    rpn = detect.build(model, ARCH, 3, size=(64, 64), rois=rois).eval().rpn
    corner = 15.0 * torch.cartesian_prod(torch.arange(64), torch.arange(64))
    apart = torch.cat([corner, corner + 10], dim=1)[None]  # non-maximum suppression leaves all
    for training, most in ((True, train), (False, test)):
        kept, _ = rpn.train(training).filter_proposals(apart, torch.randn(1, 4096), [(1000, 1000)], [4096])
        assert len(kept[0]) == most


@pytest.mark.parametrize("model", list(detect.LOWEST))
def test_bf16_leaves_anchors_and_boxes_in_float32(model):
    torch.manual_seed(0)
    detector = detect.build(model, ARCH, 3, keypoints=2, size=(64, 64), rois=8)
    trainee, seen = detect.DetectorWithLosses(detector), []
    anchors = detector.rpn.anchor_generator if hasattr(detector, "rpn") else detector.anchor_generator
    anchors.register_forward_hook(lambda module, x, output: seen.extend(output))
    with torch.autocast("cpu", torch.bfloat16):
        batch = {"image": [torch.randint(0, 256, (3, 64, 1100), dtype=torch.uint8)],
                 "boxes": [torch.tensor([[3.0, 4, 40, 50]])],
                 "labels": [torch.tensor([1])], "masks": [torch.ones(1, 64, 1100, dtype=torch.uint8)],
                 "keypoints": [torch.ones(1, 2, 3)]}
        detector.transform.max_size = 2000
        loss, _ = trainee.train()(batch)
    assert loss.isfinite() and seen[0].dtype == torch.float32 and len(seen[0].unique(dim=0)) == len(seen[0])


def test_a_frozen_backbone_stays_bit_for_bit_and_the_rest_learns(scenes, checkpoints, tmp_path, monkeypatch):
    path, model = checkpoints["soco"]
    before = {f"backbone.body.{name}": x for name, x in model.online.backbone.state_dict().items()}
    assert run(monkeypatch, *arguments(scenes, tmp_path, "--freeze", "--eval-every", 1, init=path)) == 0
    after = weights(tmp_path)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert not torch.equal(after["backbone.fpn.inner_blocks.0.0.weight"], model.online.fpn.inner_blocks[0][0].weight)


def test_fill_takes_some_of_the_parts_that_a_checkpoint_has(scenes, checkpoints, tmp_path, monkeypatch, capsys):
    path, _ = checkpoints["soco"]
    assert run(monkeypatch, *arguments(scenes, tmp_path, "--fill", "backbone", "fpn", "--max-steps", 1, init=path)) == 0
    assert "filled: backbone.body, backbone.fpn; new: roi_heads.box_head" in capsys.readouterr().out


def test_torchvisions_weights_of_a_resnet_are_an_init(scenes, tmp_path, monkeypatch):
    network = common.resnet(ARCH)
    torch.save({**network.state_dict(), "fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth")
    plan = arguments(scenes, tmp_path / "out", "--max-steps", 1, "--lr", 0, "--arch", ARCH,
                     init=tmp_path / "resnet.pth")
    assert run(monkeypatch, *plan) == 0
    assert torch.equal(weights(tmp_path / "out")["backbone.body.conv1.weight"], network.conv1.weight)


def test_ap_is_what_it_is_by_hand(tmp_path):
    box = lambda n, image, k, x: {"id": n, "image_id": image, "category_id": k, "bbox": [x, 10, 40, 40], "area": 1600,
                                  "iscrowd": 0}
    dataset = {"images": [{"id": 1, "width": 200, "height": 100, "file_name": "1.png"}],
               "categories": [{"id": 5, "name": "a"}, {"id": 6, "name": "b"}],
             "annotations": [box(1, 1, 5, 10), box(2, 1, 5, 110), box(3, 1, 6, 60)]}
    (tmp_path / "annotations.json").write_text(json.dumps(dataset))
    Image.new("RGB", (200, 100)).save(tmp_path / "1.png")
    truth = coco.ground_truth(tmp_path / "annotations.json",
                              coco.CocoFolder(tmp_path, tmp_path / "annotations.json", training=False))
    found = lambda k, x, score: {"image_id": 0, "category_id": k, "bbox": [x, 10, 40, 40], "score": score}
    ap = lambda *rows: coco.average_precision(truth, list(rows), ["bbox"])
    assert ap(found(5, 10, 0.9), found(5, 110, 0.8), found(6, 60, 0.7)) == {"AP": 100, "AP50": 100, "AP75": 100}
    assert ap() == {"AP": 0, "AP50": 0, "AP75": 0}
    half = 51 / 101  # class a: precision 1 up to recall 0.5
    assert ap(found(5, 10, 0.9))["AP"] == pytest.approx(100 * half / 2, abs=0.01)
    shifted = ap(found(5, 20, 0.9), found(5, 120, 0.8), found(6, 70, 0.7))                # IoU 30 / 50 = 0.6
    assert shifted["AP50"] == 100 and shifted["AP75"] == 0 and shifted["AP"] == pytest.approx(30, abs=0.01)


def test_detections_become_cocos_rows():
    mask = np.zeros((6, 8), bool)
    mask[1:3, 2:7] = True
    output = {"boxes": torch.tensor([[2.0, 1, 7, 3]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.5]),
              "masks": torch.from_numpy(mask)[None, None].float()}
    row, = coco.detections(output, 17, [10, 30])
    assert row["image_id"] == 17 and row["category_id"] == 30 and row["bbox"] == [2, 1, 5, 2]
    assert np.array_equal(coco.decode(row["segmentation"], (8, 6)), mask)


def change(dataset, kind):
    if kind == "unknown category":
        dataset["annotations"][0]["category_id"] = 7
    elif kind == "no categories":
        del dataset["categories"]
    elif kind == "another class":
        dataset["categories"][3]["name"] = "horse"
    elif kind == "ids as text":
        dataset["categories"] = [{**category, "id": str(category["id"])} for category in dataset["categories"]]
        for annotation in dataset["annotations"]:
            annotation["category_id"] = str(annotation["category_id"])
    elif kind == "missing image":
        dataset["images"][2]["file_name"] = "gone.png"
    elif kind == "wrong size":
        for image in dataset["images"]:
            image["width"] = 65
    elif kind == "no keypoints":
        for annotation in dataset["annotations"]:
            del annotation["keypoints"]
    elif kind == "unbounded":
        dataset["annotations"][0]["bbox"] = [1, 2, 3]
    elif kind == "no number":
        dataset["annotations"][0]["bbox"][0] = "a"
    elif kind == "no such image":
        dataset["annotations"][0]["image_id"] = 999
    elif kind == "no masks":
        dataset["annotations"][0]["segmentation"] = []
    return dataset


@pytest.mark.parametrize("kind, says, more", [
    ("unknown category", "category 7", []), ("no categories", "not a COCO annotation file", []),
    ("another class", "horse", []), ("ids as text", "is in only one of them", []),
    ("missing image", "lacks 1 of the 12 images", []), ("wrong size", "its annotations 65 x 64", []),
    ("no keypoints", "annotates nothing with keypoints", ["--model", "keypointrcnn"]),
    ("unbounded", "not a COCO annotation file", []),
    ("no number", "not a COCO annotation file", []), ("no such image", "image 999", []),
    ("no masks", "image 100 has no segmentation", ["--model", "maskrcnn"])])
def test_wrong_annotations_end_with_one_line(scenes, tmp_path, monkeypatch, capsys, kind, says, more):
    folder = write_scenes(tmp_path / "train", 12)
    path = folder / "annotations.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()), kind)))
    assert run(monkeypatch, *arguments((folder, scenes[1]), tmp_path / "out", *more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and says in errors[0]


@pytest.mark.parametrize("more, says", [
    (["--size", 96, 64], "the smaller comes first"), (["--batch-size", 64], "do not fill a batch of 64"),
    (["--arch", "resnet17"], "unknown --arch"),
    (["--init", "nothing.pt"], "cannot be read"),
    (["--arch", "resnet18w0.3", "--model", "fcos"], "a width of a quarter")])
def test_wrong_flags_end_with_one_line(scenes, tmp_path, monkeypatch, capsys, more, says):
    assert run(monkeypatch, *arguments(scenes, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_checkpoint_of_another_arch_is_refused(scenes, checkpoints, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *arguments(scenes, tmp_path, "--arch", "resnet34", init=checkpoints["moco"][0])) == 2
    assert "is a resnet18w0.25, not --arch resnet34" in capsys.readouterr().err
    state = common.resnet(ARCH).state_dict()
    del state["layer4.1.conv2.weight"]
    torch.save(state, tmp_path / "resnet.pth")
    assert run(monkeypatch, *arguments(scenes, tmp_path, init=tmp_path / "resnet.pth")) == 2
    assert f"is not a {ARCH}: layer4.1.conv2.weight is missing there" in capsys.readouterr().err


def test_without_pycocotools_it_says_what_to_install(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    assert run(monkeypatch, *arguments(scenes, tmp_path)) == 2
    assert "pip install pycocotools" in capsys.readouterr().err


class Blind(torch.nn.Module):
    def forward(self, images):
        return [{} for _ in images]


def test_an_image_that_cannot_be_decoded_is_named_and_no_other_counts_twice(tmp_path, monkeypatch, capsys):
    folder, seen = write_scenes(tmp_path / "val", 101, size=16), []
    (folder / "images" / "2.png").write_bytes(b"torn")
    monkeypatch.setattr(coco, "average_precision", lambda truth, rows, kinds: seen.extend(rows) or {})
    monkeypatch.setattr(coco, "detections", lambda output, image, classes: [image])
    source = coco.CocoFolder(folder / "images", folder / "annotations.json", training=False)
    args = argparse.Namespace(workers=0, amp="off", model="fasterrcnn")
    detect.evaluate(Blind(), source, None, args, torch.device("cpu"))
    assert sorted(seen) == [i for i in range(101) if i != 2] and "2.png" in capsys.readouterr().err


def test_pictures_are_decoded_upright_as_annotated(tmp_path):
    folder = write_scenes(tmp_path / "a", 2)
    picture = Image.open(folder / "images" / "0.png")
    picture.getexif()[0x0112] = 2                                                         # stored mirrored
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "images" / "0.png", exif=picture.getexif())
    source = annotated(folder)
    batch = coco.image_and_targets(source.image(0), None, source)
    assert np.array_equal(batch["image"].permute(1, 2, 0), common.Shapes(2, 64).scene(0)[0])
