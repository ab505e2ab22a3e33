"""transfer/convert.py: every tensor finds its place in Detectron2's and torchvision's models, and gives the same
features there.
"""
import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.detection import fcos_resnet50_fpn, fasterrcnn_resnet50_fpn_v2, retinanet_resnet50_fpn_v2

import common
import detco
import detcon
import dupr
import moco
import soco
from conftest import ROOT, run_script, write_checkpoint
from transfer import convert

METHODS = {
    "moco": ("moco", lambda arch: moco.MoCo(arch, 8, queue=8)),
    "detco": ("detco", lambda arch: detco.DetCo(arch, queue=8, size=64)),
    "dupr": ("dupr", lambda arch: dupr.DUPR(arch, queue=8)),
    "detcon": ("detcon", lambda arch: detcon.DetCon(arch, "b", 64, hidden=8, dim=8)),
    "soco": ("soco", lambda arch: soco.SoCo(arch, "fpn", hidden=8, dim=8)),
    "soco-c4": ("soco", lambda arch: soco.SoCo(arch, "c4", hidden=8, dim=8))}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{method: (path, its online network)}, made when first asked for, of ResNet-50."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(name):
        if name not in made:
            torch.manual_seed(len(made))
            method, build = METHODS[name]
            model = build("resnet50")
            made[name] = write_checkpoint(folder / f"{name}.pt", method, model, "resnet50"), model
        return made[name]
    yield make
    shutil.rmtree(folder)  # a gigabyte


def run(monkeypatch, *argv):
    return run_script(convert, monkeypatch, *argv)


def detectron2_list(name):
    return json.loads((ROOT / "tests" / "detectron2" / f"{name}.json").read_text())


HEADS = (r"proposal_generator\.|roi_heads\.(box_predictor|mask_head|keypoint_head)\.|head\.(cls|bbox)_|"
         r"backbone\.top_block\.")
PYRAMID = r"|backbone\.fpn_|roi_heads\.box_head\."


@pytest.mark.parametrize("method, model, new", [
    ("soco", "mask_rcnn_R50_FPN_4conv1fc", HEADS), ("soco-c4", "mask_rcnn_R50_C4", HEADS),
    ("soco-c4", "faster_rcnn_R50_C4", HEADS),
    ("moco", "faster_rcnn_R50_C4", HEADS), ("detco", "mask_rcnn_R50_FPN", HEADS + PYRAMID),
    ("dupr", "retinanet_R50_FPN", HEADS + PYRAMID),
    ("detcon", "keypoint_rcnn_R50_FPN", HEADS + PYRAMID)])
def test_all_tensors_have_one_place_of_their_shape_in_detectron2_and_only_new_layers_stay_empty(
        checkpoints, method, model, new, tmp_path, monkeypatch):
    places = detectron2_list(model)
    assert run(monkeypatch, checkpoints(method)[0], tmp_path / "out.pkl") == 0
    with open(tmp_path / "out.pkl", "rb") as file:
        content = pickle.load(file)
    assert content["matching_heuristics"] is True and content["__author__"] != "Caffe2"
    filled = set()
    for name, x in content["model"].items():
        there = [place for place in places if place == name or place.endswith("." + name)]  # Detectron2's rule
        assert isinstance(x, np.ndarray) and len(there) == 1 and list(x.shape) == places[there[0]], name
        filled.add(there[0])
    assert len(filled) == len(content["model"])
    assert not [place for place in set(places) - filled if not re.match(new, place)]


def test_the_pkl_names_numpy_as_older_detectron2s_know_it(checkpoints, tmp_path, monkeypatch):
    run(monkeypatch, checkpoints("moco")[0], tmp_path / "out.pkl")
    assert b"numpy._core" not in (tmp_path / "out.pkl").read_bytes()


def detectron2_forward(w, x, boxes):
    """Detectron2's R50-FPN with a 4conv1fc box head, in evaluation, written out with its names: x [N, 3, H, W] ->
    {stage or level: features}, and, of boxes [n, 5] (image, xyxy) pooled at P3, what fc1 gives.
    """
    conv = lambda name, x, **kw: norm(f"{name}.norm", F.conv2d(x, w[f"{name}.weight"], **kw))
    norm = lambda name, x: F.batch_norm(x, *(w[f"{name}.{part}"]
                                             for part in ("running_mean", "running_var", "weight", "bias")))
    out = {}
    x = F.max_pool2d(conv("stem.conv1", x, stride=2, padding=3).relu(), 3, 2, 1)
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3)):
        for b in range(blocks):
            name, stride = f"res{stage}.{b}", 2 if b == 0 and stage > 2 else 1
            y = conv(f"{name}.conv1", x).relu()
            y = conv(f"{name}.conv2", y, stride=stride, padding=1).relu()                 # STRIDE_IN_1X1: False
            x = (conv(f"{name}.conv3", y) + (conv(f"{name}.shortcut", x, stride=stride) if b == 0 else x)).relu()
        out[f"res{stage}"] = x
    if "fpn_lateral5.weight" in w:
        top = None
        for level in (5, 4, 3, 2):
            lateral = conv(f"fpn_lateral{level}", out[f"res{level}"])
            top = lateral if top is None else lateral + F.interpolate(top, scale_factor=2)
            out[f"p{level}"] = conv(f"fpn_output{level}", top, padding=1)
        y = torchvision.ops.roi_align(out["p3"], boxes, 7, 1 / 8, aligned=True)
        for k in (1, 2, 3, 4):
            y = conv(f"roi_heads.box_head.conv{k}", y, padding=1).relu()
        out["fc1"] = F.linear(y.flatten(1), w["roi_heads.box_head.fc1.weight"], w["roi_heads.box_head.fc1.bias"]).relu()
    return out


def close(a, b):
    return (a - b).abs().max() <= 1e-5 * b.abs().max()


@torch.no_grad()
def test_a_picture_and_a_box_give_the_same_feature_through_fc1_before_and_after(checkpoints, tmp_path, monkeypatch):
    path, model = checkpoints("soco")
    online, x = model.online.eval(), torch.randn(2, 3, 128, 128)
    boxes = torch.tensor([[20.0, 30, 81, 88], [40, 10, 103, 71]])                         # about 60 pixels a side
    stages = online.backbone(x)
    pyramid = online.fpn(dict(enumerate(stages)))
    before = online.head(common.roi_align(pyramid[1], boxes[:, None], 7, stride=8))       # [2, 1024]
    rois = torch.cat([torch.tensor([[0.0], [1.0]]), boxes], dim=1)

    run(monkeypatch, path, tmp_path / "out.pkl")
    with open(tmp_path / "out.pkl", "rb") as file:
        there = detectron2_forward({k: torch.from_numpy(v) for k, v in pickle.load(file)["model"].items()}, x, rois)
    assert all(close(there[f"res{k + 2}"], stages[k]) and close(there[f"p{k + 2}"], pyramid[k]) for k in range(4))
    assert close(there["fc1"], before) and before.std() > 0

    run(monkeypatch, path, tmp_path / "out.pth")
    detector = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).eval()
    report = detector.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=False)
    assert not report.unexpected_keys
    assert {name.split(".")[0] + "." + name.split(".")[1]
            for name in report.missing_keys} == {"rpn.head", "roi_heads.box_predictor"}
    after = detector.backbone(x)
    assert all(close(after[str(k)], pyramid[k]) for k in range(4))
    pooled = torchvision.ops.roi_align(after["1"], rois, 7, 1 / 8, aligned=True)
    assert close(detector.roi_heads.box_head(pooled), before)


@torch.no_grad()
@pytest.mark.parametrize("method", ["moco", "detco", "dupr", "detcon", "soco-c4"])
def test_stage_features_are_the_same_in_torchvision_and_detectron2(checkpoints, method, tmp_path, monkeypatch):
    path, model = checkpoints(method)
    online = (model.online if hasattr(model, "online") else model.encoder_q).eval()
    x = torch.randn(1, 3, 64, 64)
    stages = online.backbone(x)
    assert run(monkeypatch, path, tmp_path / "out.pth", "--to",
               "resnet") == run(monkeypatch, path, tmp_path / "out.pkl") == 0
    resnet = torchvision.models.resnet50().eval()
    report = resnet.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=False)
    assert report.missing_keys == ["fc.weight", "fc.bias"] and not report.unexpected_keys
    with open(tmp_path / "out.pkl", "rb") as file:
        there = detectron2_forward({k: torch.from_numpy(v) for k, v in pickle.load(file)["model"].items()}, x, None)
    y = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    for k, layer in enumerate((resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)):
        y = layer(y)
        assert close(y, stages[k]) and close(there[f"res{k + 2}"], stages[k])


@pytest.mark.parametrize("detector", [retinanet_resnet50_fpn_v2, fcos_resnet50_fpn])
def test_a_pyramid_lands_level_by_level_where_torchvision_begins_at_p3(checkpoints, detector, tmp_path, monkeypatch):
    path, model = checkpoints("soco")
    run(monkeypatch, path, tmp_path / "out.pth", "--to", "torchvision-p3")
    tensors = torch.load(tmp_path / "out.pth", weights_only=True)
    norms = {name for name in tensors if re.search(r"blocks\.\d\.1\.", name)}  # theirs has no norms in the pyramid
    network = detector(weights=None, weights_backbone=None, trainable_backbone_layers=5)
    report = network.load_state_dict({k: v for k, v in tensors.items() if k not in norms}, strict=False)
    assert not report.unexpected_keys
    assert torch.equal(network.backbone.fpn.inner_blocks[0][0].weight, model.online.fpn.inner_blocks[1][0].weight)
    assert torch.equal(network.backbone.fpn.layer_blocks[2][0].weight, model.online.fpn.layer_blocks[3][0].weight)


def test_the_part_asked_for_is_converted(tmp_path, monkeypatch, capsys):
    model = moco.MoCo("resnet18w0.25", 8, queue=8)
    with torch.no_grad():
        model.encoder_k.backbone.conv1.weight.add_(1)
    path = write_checkpoint(tmp_path / "last.pt", "moco", model, "resnet18w0.25")
    weight = {}
    for part in convert.PARTS:
        assert run(monkeypatch, path, tmp_path / "out.pth", "--part", part) == 0
        weight[part] = torch.load(tmp_path / "out.pth", weights_only=True)["backbone.body.conv1.weight"]
    assert torch.equal(weight["online"], weight["query"]) and torch.equal(weight["target"], weight["key"])
    assert torch.equal(weight["key"], weight["query"] + 1)
    said = capsys.readouterr().out
    assert "backbone -> backbone.body: 120 tensors" in said and "projector: 4 tensors left out" in said


def test_detectron2s_settings_of_a_wide_network_give_its_shapes():
    settings = dict(zip(*[iter(convert.detectron2_settings("resnet50w2").split())] * 2))
    network = common.resnet("resnet50w2")
    assert int(settings["MODEL.RESNETS.STEM_OUT_CHANNELS"]) == network.conv1.out_channels
    assert int(settings["MODEL.RESNETS.WIDTH_PER_GROUP"]) == network.layer1[0].conv1.out_channels
    assert int(settings["MODEL.RESNETS.RES2_OUT_CHANNELS"]) == network.channels[0]


def test_detectron2s_settings_of_a_resnext_give_its_groups():
    settings = dict(zip(*[iter(convert.detectron2_settings("resnext50_32x8d").split())] * 2))
    assert settings["MODEL.RESNETS.NUM_GROUPS"] == "32" and settings["MODEL.RESNETS.WIDTH_PER_GROUP"] == "8"
    assert settings["MODEL.RESNETS.DEPTH"] == "50" and settings["MODEL.RESNETS.RES2_OUT_CHANNELS"] == "256"


def test_bf16_and_parameters_become_float32_arrays(tmp_path, monkeypatch):
    network = common.resnet("resnet18")
    tensors = {name: x.bfloat16() if x.is_floating_point() else x
               for name, x in network.state_dict(keep_vars=True).items()}
    torch.save(tensors, tmp_path / "resnet.pth")
    assert run(monkeypatch, tmp_path / "resnet.pth", tmp_path / "resnet.pkl") == 0
    model = pickle.loads((tmp_path / "resnet.pkl").read_bytes())["model"]
    assert len(model) == len(tensors) and model["stem.conv1.weight"].dtype == np.float32
    assert np.array_equal(model["stem.conv1.weight"], tensors["conv1.weight"].detach().float())


def test_a_file_is_not_written_over_by_itself(tmp_path, monkeypatch, capsys):
    torch.save(common.resnet("resnet18w0.25").state_dict(), tmp_path / "last.pt")
    content = (tmp_path / "last.pt").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "last.pt", tmp_path / "last.pt") == 2
    assert "would be written over" in capsys.readouterr().err and (tmp_path / "last.pt").read_bytes() == content


def bad(tmp_path, kind):
    if kind == "text":
        (tmp_path / "last.pt").write_text("no weights")
    elif kind == "tensors":
        torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "last.pt")
    elif kind == "no target":
        write_checkpoint(tmp_path / "last.pt", "detcon", detcon.DetCon("resnet18w0.25", "s", 64, hidden=8, dim=8),
                         "resnet18w0.25")
    elif kind == "detector":
        write_checkpoint(tmp_path / "last.pt", "detect", nn.Linear(2, 2), "resnet18w0.25")
    return tmp_path / "last.pt"


@pytest.mark.parametrize("to, file", [("detectron2", "out.pth"), ("torchvision", "out.pkl"), ("resnet", "out.pkl")])
def test_names_that_do_not_fit_the_files_extension_are_refused(tmp_path, monkeypatch, capsys, to, file):
    assert run(monkeypatch, tmp_path / "last.pt", tmp_path / file, "--to", to) == 2
    error = capsys.readouterr().err
    assert f"--to {to} does not fit" in error and error.count("\n") == 1


@pytest.mark.parametrize("kind, says", [("missing", "cannot be read"), ("text", "cannot be read"),
                                        ("tensors", "conv1.weight is [1] there"),
                                        ("no target", "--part online"), ("detector", "is of detect")])
def test_what_is_no_checkpoint_of_ours_is_refused_with_one_line(tmp_path, monkeypatch, capsys, kind, says):
    path = bad(tmp_path, kind)
    assert run(monkeypatch, path, tmp_path / "out.pkl", "--part", "target") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "out.pkl").exists()
