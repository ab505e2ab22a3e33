"""Weights to start from: what --init takes is read as torchvision's plain modules hold it, and runs nothing."""
import argparse
import json
import os
import pickle
import re
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

import common
import detco
import detcon
import dupr
import moco
import soco
from conftest import ROOT, rows, run_script, weights, write_checkpoint, write_pictures
from test_convert import close, detectron2_forward
from transfer import classify, convert

TINY = "resnet18w0.25"


def released(name):
    """{name: shape} of what the authors released (../shared/released of the project, which says how they were had)."""
    return json.loads((ROOT / "tests" / "released" / f"{name}.json").read_text())


def drawn(name, shape):
    """A tensor as a trained network might have it."""
    if name.endswith("num_batches_tracked") or name.endswith("queue_ptr"):
        return torch.full(shape, 7)
    if name.endswith("running_var"):
        return 0.5 + torch.rand(shape)
    if len(shape) < 2:
        return (1.0 if name.endswith("weight") else 0.0) + 0.1 * torch.randn(shape)
    return torch.randn(shape) * (2 / torch.Size(shape[1:]).numel()) ** 0.5


@pytest.fixture(scope="session")
def plain():
    """torchvision's ResNet-50 with drawn weights: (its state_dict, pictures, what its four stages make of them)."""
    torch.manual_seed(0)
    network = torchvision.models.resnet50()
    network.load_state_dict({name: drawn(name, x.shape) for name, x in network.state_dict().items()})
    network.eval()
    x, stages = torch.randn(1, 3, 64, 64), []
    with torch.no_grad():
        y = network.maxpool(network.relu(network.bn1(network.conv1(x))))
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            y = layer(y)
            stages.append(y)
    return network.state_dict(), x, stages


def detectron2_style(name):
    """A ResNet's name as the converters of Detectron2, MoCo, DetCo and SoCo spell it, replaced piece by piece."""
    name = name if "layer" in name else f"stem.{name}"
    for k in (1, 2, 3, 4):
        name = name.replace(f"layer{k}", f"res{k + 1}").replace(f"bn{k}", f"conv{k}.norm")
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


@pytest.fixture(scope="session")
def files(plain, tmp_path_factory):
    """The path of a file of the plain network in any format; a target network has twice its weights."""
    folder, made = tmp_path_factory.mktemp("released"), {}
    resnet = {name: x for name, x in plain[0].items() if not name.startswith("fc.")}

    def filled(shapes, online, target):
        state = {}
        for name, shape in shapes.items():
            own = resnet.get(name.removeprefix(online), resnet.get(name.removeprefix(target)))
            assert own is None or list(own.shape) == shape
            state[name] = drawn(name, shape) if own is None else own if name.startswith(online) else own * 2
        assert {online + name for name in resnet} <= set(state)
        return state

    def make(kind):
        path = folder / kind
        if path in made.values():
            return path
        made[kind] = path
        torch.manual_seed(1)
        if kind.startswith("moco"):
            state = filled(released(kind[:7]), "module.encoder_q.", "module.encoder_k.")
            content = {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"param_groups": []}}
            torch.save(content, path, _use_new_zipfile_serialization=kind.startswith("moco_v2"))  # v1 is older
        elif kind.startswith("SoCo"):
            options = argparse.Namespace(model="SoCo_FPN", batch_size=2048, crop=(0.5, 1.0), local_rank=0)
            state = filled(released(kind[:-4]), "module.encoder.", "module.encoder_k.")
            content = {"opt": options, "model": state, "optimizer": {"state": {}}, "scheduler": {"base_lrs": [1.0]}}
            torch.save({**content, "epoch": 400}, path)
        elif kind.startswith("detco"):
            torch.save({"state_dict": resnet}, path)
        elif kind.startswith("resnet50"):
            torch.save(OrderedDict(plain[0]), path)
        else:  # pickled by protocol 2 to 5
            arrays = {detectron2_style(name): x.numpy() for name, x in plain[0].items() if "num_batches" not in name}
            content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
            path.write_bytes(pickle.dumps(content, int(kind[1])))
        return path
    yield make
    shutil.rmtree(folder)


FORMATS = {
    "moco_v1.pth.tar": ("MoCo v1 of the authors, epoch 200, resnet50: backbone", "queue, projector"),
    "moco_v2.pth.tar": ("MoCo v2 of the authors, epoch 200, resnet50: backbone", "queue, projector"),
    "SoCo_FPN.pth": ("SoCo of the authors, FPN, epoch 400, resnet50: backbone",
                     "pyramid, box head, projector, predictor"),
    "SoCo_C4.pth": ("SoCo of the authors, C4, epoch 400, resnet50: backbone", "queue, queue_ptr, projector, predictor"),
    "detco.pth": ("a ResNet without classifier, as DetCo of the authors, resnet50: backbone", ""),
    "resnet50.pth": ("torchvision's ResNet, resnet50: backbone", "classifier"),
    "p2.pkl": ("a Detectron2 file by torchvision, resnet50: backbone", "stem"),
    "p5.pkl": ("a Detectron2 file by torchvision, resnet50: backbone", "stem")}


@torch.no_grad()
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_stages_of_plain_torchvision_and_says_what_it_is(files, plain, kind, capsys):
    _, x, stages = plain
    network = convert.backbone(argparse.Namespace(init=str(files(kind)), part="online", arch=None)).eval()
    assert all(close(y, stage) for y, stage in zip(network(x), stages))
    what, left = FORMATS[kind]
    said = capsys.readouterr().out
    assert what in said and said.count("\n") == 1
    assert said.rstrip().endswith(f"; no place for {left}" if left else "backbone")


def unpickled(path):
    return {name: torch.from_numpy(x) for name, x in pickle.loads(path.read_bytes())["model"].items()}


@torch.no_grad()
def soco_forward(w, stages, n=""):
    """SoCo's pyramid and head, in evaluation, by its authors' names: c2 to c5 -> (P2 to P5, the head)."""
    w = {name.removeprefix("module."): x for name, x in w.items()}

    def norm(name, x):
        return F.batch_norm(x, *(w[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    def neck(kind, k, x, padding):
        name = f"neck{n}.{kind}.{k}"
        return norm(f"{name}.bn", F.conv2d(x, w[f"{name}.conv.weight"], padding=padding))

    inner = [neck("lateral_convs", k, c, 0) for k, c in enumerate(stages)]
    for k in (2, 1, 0):
        inner[k] = inner[k] + F.interpolate(inner[k + 1], scale_factor=2)
    pyramid = [neck("fpn_convs", k, x, 1) for k, x in enumerate(inner)]

    def head(x):
        for k in (1, 2, 3, 4):
            x = norm(f"head{n}.bn{k}", F.conv2d(x, w[f"head{n}.conv{k}.weight"], padding=1)).relu()
        return F.linear(x.flatten(1), w[f"head{n}.fc1.weight"], w[f"head{n}.fc1.bias"]).relu()
    return pyramid, head


@torch.no_grad()
def test_socos_pyramid_and_head_reach_both_detectors(files, plain, tmp_path, monkeypatch, capsys):
    _, x, stages = plain
    path, rois = files("SoCo_FPN.pth"), torch.tensor([[0.0, 3, 5, 40, 52]])
    pyramid, head = soco_forward(torch.load(path, weights_only=False)["model"], stages)
    fc1 = head(torchvision.ops.roi_align(pyramid[1], rois, 7, 1 / 8, aligned=True))

    assert run_script(convert, monkeypatch, path, tmp_path / "out.pkl") == 0
    assert "SoCo of the authors, FPN, epoch 400" in capsys.readouterr().out
    there = detectron2_forward(unpickled(tmp_path / "out.pkl"), x, rois)
    assert all(close(there[f"res{k + 2}"], stages[k]) and close(there[f"p{k + 2}"], pyramid[k]) for k in range(4))
    assert close(there["fc1"], fc1) and fc1.std() > 0

    assert run_script(convert, monkeypatch, tmp_path / "out.pkl", tmp_path / "out.pth") == 0  # back out of Detectron2's
    detector = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).eval()
    report = detector.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=False)
    assert not report.unexpected_keys
    assert all(name.startswith(("rpn.", "roi_heads.box_predictor.")) for name in report.missing_keys)
    after = detector.backbone(x)
    assert all(close(after[str(k)], pyramid[k]) for k in range(4))
    assert close(detector.roi_heads.box_head(torchvision.ops.roi_align(after["1"], rois, 7, 1 / 8, aligned=True)), fc1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["moco_v2.pth.tar", "detco.pth", "SoCo_C4.pth"])
def test_released_files_go_through_convert_to_both_detectors_and_through_classify(
        files, plain, kind, tmp_path, monkeypatch, capsys):
    _, x, stages = plain
    for out in ("out.pkl", "out.pth"):
        assert run_script(convert, monkeypatch, files(kind), tmp_path / out) == 0
    there = detectron2_forward(unpickled(tmp_path / "out.pkl"), x, None)
    assert all(close(there[f"res{k + 2}"], stages[k]) for k in range(4))
    body = torch.load(tmp_path / "out.pth", weights_only=True)
    body = {name.removeprefix("backbone.body."): y for name, y in body.items()}
    assert not torchvision.models.resnet50().load_state_dict(body, strict=False).unexpected_keys
    assert set(body) == {name for name in plain[0] if not name.startswith("fc.")}
    assert all(torch.equal(body[name], plain[0][name]) for name in body)
    for part, count in (("train", 6), ("val", 3)):
        write_pictures(tmp_path / "data" / part, count, size=32)
    flags = ["--data", tmp_path / "data", "--protocol", "knn", "--size", 32, "--batch-size", 3, "--workers", 0]
    assert run_script(classify, monkeypatch, "--init", files(kind), *flags) == 0
    said = capsys.readouterr().out
    assert FORMATS[kind][0] in said and re.search(r"kNN( +\d+\.\d%){4}", said)


def test_the_target_network_of_the_authors_is_the_one_marked_k(files, plain):
    for kind in ("moco_v1.pth.tar", "SoCo_C4.pth"):
        online, target = (convert.read(files(kind), part)[0] for part in ("online", "target"))
        assert torch.equal(online["backbone.layer3.5.conv2.weight"], plain[0]["layer3.5.conv2.weight"])
        assert torch.equal(target["backbone.layer3.5.conv2.weight"], plain[0]["layer3.5.conv2.weight"] * 2)
    assert not any(name.startswith(("predictor", "queue")) for name in target)


# --- Going on from them ----------------------------------------------------------------------------------------------

def to_soco(name):
    """A name in our SoCo -> the one its authors have, by replacing one piece after another."""
    n = "_k" if name.startswith("target.") else ""
    name = re.sub(r"^(online|target)\.", "", name)
    name = name.replace("backbone.", f"encoder{n}.")
    name = name.replace("fpn.inner_blocks", f"neck{n}.lateral_convs").replace("fpn.layer_blocks", f"neck{n}.fpn_convs")
    name = re.sub(r"(?<=_convs\.\d\.)[01]", lambda m: ("conv", "bn")[int(m[0])], name)
    name = re.sub(r"^head\.(\d)\.([01])\.", lambda m: f"head{n}.{('conv', 'bn')[int(m[2])]}{int(m[1]) + 1}.", name)
    name = name.replace("head.5.", f"head{n}.fc1.")
    for ours, theirs in (("0", "linear1"), ("1", "bn1"), ("3", "linear2")):
        name = re.sub(rf"^(projector|predictor)\.{ours}\.", lambda m: f"{m[1]}{n}.{theirs}.", name)
    return f"module.{name}"


def trained(model):
    """The model as if it had been trained, its target network apart from the online one."""
    torch.manual_seed(3)
    state = model.state_dict()
    model.load_state_dict({name: drawn(name, list(x.shape)) for name, x in state.items()})
    return model


def small_soco():
    return trained(soco.SoCo(TINY, "fpn", views=3, size=48, hidden=16, dim=8))


def write_soco(path, model):
    state = {to_soco(name): x for name, x in model.state_dict().items()}
    torch.save({"opt": argparse.Namespace(views=3), "model": state, "optimizer": {}, "epoch": 400}, path)
    return path


def test_the_names_that_a_small_soco_is_given_are_the_authors(files):
    assert {to_soco(name) for name in soco.SoCo("resnet50", hidden=8, dim=8).state_dict()} == set(released("SoCo_FPN"))


SOCO = ["--batch-size", 4, "--hidden", 16, "--dim", 8, "--print-every", 1, "--workers", 0, "--epochs", 1, "--size", 48,
        "--proposals", "random"]


def test_soco_goes_on_from_the_authors_file_and_resumes_without_it_and_its_first_loss_is_the_loaded_networks(
        pictures, tmp_path, monkeypatch, capsys):
    model, train = small_soco(), ["--data", pictures / "val", *SOCO]
    path = write_soco(tmp_path / "ckpt_epoch_400.pth", model)
    whole, parts, by_hand = (["--out", tmp_path / name] for name in ("whole", "parts", "by_hand"))
    assert run_script(soco, monkeypatch, *train, "--init", path, *whole, "--max-steps", 3) == 0
    said = capsys.readouterr().out
    assert f"SoCo of the authors, FPN, epoch 400, {TINY}: backbone, pyramid, box head, projector, predictor\n" in said
    assert run_script(soco, monkeypatch, *train, "--init", path, *parts, "--max-steps", 1) == 0
    path.rename(tmp_path / "moved.pth")
    assert run_script(soco, monkeypatch, *train, "--init", tmp_path / "moved.pth", *parts, "--max-steps", 2) == 0
    (tmp_path / "moved.pth").unlink()
    assert run_script(soco, monkeypatch, *train, "--init", path, *parts, "--max-steps", 3) == 0
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)

    # The same network put by hand into a run that stands at step 0 must give the same first loss.
    assert run_script(soco, monkeypatch, *train, "--arch", TINY, *by_hand, "--max-steps", 1) == 0
    last = torch.load(tmp_path / "by_hand" / "last.pt", weights_only=True)
    last["optimizer"]["state"] = {}
    torch.save({**last, "model": model.state_dict(), "step": 0, "epoch": 0}, tmp_path / "by_hand" / "last.pt")
    unloaded = rows(tmp_path / "by_hand")[0]["loss"]
    assert run_script(soco, monkeypatch, *train, "--arch", TINY, *by_hand, "--max-steps", 1) == 0
    assert rows(tmp_path / "whole")[0]["loss"] == rows(tmp_path / "by_hand")[0]["loss"] != unloaded


def test_a_run_from_other_weights_is_another_run(pictures, tmp_path, monkeypatch, capsys):
    train = ["--data", pictures / "val", *SOCO, "--out", tmp_path / "out", "--max-steps", 1]
    path = write_soco(tmp_path / "a.pth", small_soco())
    assert run_script(soco, monkeypatch, *train, "--init", path) == 0
    torch.save({**common.resnet(TINY).state_dict()}, tmp_path / "b.pth")
    capsys.readouterr()
    for init in (["--init", tmp_path / "b.pth"], ["--arch", TINY]):
        assert run_script(soco, monkeypatch, *train, *init) == 2
        error = capsys.readouterr().err
        assert "init_checksum" in error and error.count("\n") == 1


def build(method, **settings):
    return {"moco": lambda: moco.MoCo(TINY, 8, queue=8, **settings),
            "detco": lambda: detco.DetCo(TINY, queue=8, size=64),
            "dupr": lambda: dupr.DUPR(TINY, queue=8),
            "detcon": lambda: detcon.DetCon(TINY, "b", 64, hidden=8, dim=8),
            "soco": lambda: soco.SoCo(TINY, size=64, hidden=8, dim=8, **settings)}[method]()


def started(method, path, **settings):
    """(the state of a new model of the method that starts from a file, the names of what that changed)."""
    torch.manual_seed(5)
    model = build(method, **settings)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    common.start_from(model, method, common.read_weights(path))
    after = model.state_dict()
    return after, {name for name in after if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize("method", ["moco", "detco", "dupr", "detcon", "soco"])
def test_every_method_takes_all_of_its_own_checkpoint_and_the_backbone_of_anothers(method, tmp_path, capsys):
    own = trained(build(method)).state_dict()
    write_checkpoint(tmp_path / "own.pt", method, trained(build(method)), TINY)
    after, _ = started(method, tmp_path / "own.pt")
    state = torch.load(tmp_path / "own.pt", weights_only=True)["model"]
    assert set(after) == set(own) and all(torch.equal(after[name], state[name]) for name in after)
    assert "no place" not in capsys.readouterr().out
    other = "soco" if method != "soco" else "moco"
    theirs = trained(build(other))
    write_checkpoint(tmp_path / "other.pt", other, theirs, TINY)
    after, changed = started(method, tmp_path / "other.pt")
    assert "no place for" in capsys.readouterr().out
    theirs, networks = theirs.state_dict(), common.NETWORKS[method]
    for network in networks:  # both start from the other's online network
        backbone = [name for name in after if name.startswith(f"{network}.backbone.")]
        source = {name: theirs[name.replace(network, common.NETWORKS[other][0])] for name in backbone}
        assert backbone and all(torch.equal(after[name], x) for name, x in source.items())
    assert all(".backbone." in name for name in changed)


def test_moco_takes_queue_and_head_of_its_authors_when_they_fit_and_else_the_rest(tmp_path, capsys):
    model = trained(build("moco"))
    state = {f"module.{name}".replace("backbone.", "").replace("projector.", "fc."): x
             for name, x in model.state_dict().items() if "queue" not in name}
    keys = F.normalize(torch.randn(128, 8), dim=0)  # a column for each
    state |= {"module.queue": keys, "module.queue_ptr": torch.tensor([3])}
    torch.save({"state_dict": state, "epoch": 200}, tmp_path / "v2.pth")
    after, _ = started("moco", tmp_path / "v2.pth")
    assert "MoCo v2 of the authors" in (said := capsys.readouterr().out) and "no place" not in said
    assert torch.equal(after["queue.keys"], keys.T) and after["queue.position"] == 3
    assert all(torch.equal(after[name], x) for name, x in model.state_dict().items() if "queue" not in name)
    cases = ({"version": 1}, "projector"), ({"dim": 16}, "projector, queue"), ({"mechanism": "batch"}, "queue")
    for settings, left in cases:
        started("moco", tmp_path / "v2.pth", **settings)
        assert capsys.readouterr().out.endswith(f"no place for {left}\n")


def test_socos_pyramid_and_head_come_out_of_detectron2s_file_too(tmp_path, monkeypatch, capsys):
    model = trained(build("soco"))
    path = write_checkpoint(tmp_path / "last.pt", "soco", model, TINY)
    assert run_script(convert, monkeypatch, path, tmp_path / "soco.pkl") == 0
    capsys.readouterr()
    after, changed = started("soco", tmp_path / "soco.pkl")
    assert capsys.readouterr().out.endswith("backbone, pyramid, box head\n")
    for network in ("online", "target"):  # the file has one network, for both
        for name, x in model.online.state_dict().items():
            assert torch.equal(after[f"{network}.{name}"], x) != name.startswith("projector."), name
    assert not any(name.startswith("predictor") for name in changed)


@pytest.mark.parametrize("arch", ["resnet34", "resnet101", "resnet50w2", "resnet18w0.25", "resnext50_32x8d"])
def test_the_arch_is_told_by_the_shapes(arch):
    with torch.device("meta"):
        tensors = {f"backbone.{name}": x for name, x in common.resnet(arch).state_dict().items()}
    assert common.backbone_arch("file", None, tensors) == arch


# --- Files that are none, and files that mean harm -------------------------------------------------------------------

class Hostile:
    """Whoever unpickles this runs a command."""

    def __init__(self, sentinel, call=os.system):
        self.sentinel, self.call = str(sentinel), call

    def __reduce__(self):
        return self.call, (f"touch {self.sentinel}" if self.call is os.system else f"open({self.sentinel!r}, 'w')",)


class Other:
    """Something of the writer's own, as many checkpoints hold."""


@pytest.mark.parametrize("call", [os.system, eval])
@pytest.mark.parametrize("kind", ["last.pt", "moco.pth", "soco.pth", "old.pth", "model.pkl", "array.pkl", "state.pkl"])
def test_a_hostile_file_is_refused_with_one_line_and_runs_nothing(kind, call, tmp_path, monkeypatch, capsys):
    path, harm = tmp_path / kind, Hostile(tmp_path / "harm", call)
    resnet = common.resnet(TINY).state_dict()
    if kind == "last.pt":
        torch.save({"model": {}, "method": "moco", "settings": {"arch": harm}}, path)
    elif kind == "soco.pth":
        torch.save({"opt": argparse.Namespace(crop=harm), "model": resnet}, path)
    elif kind.endswith(".pkl"):
        arrays = {detectron2_style(name): x.numpy() for name, x in resnet.items()}
        if kind == "array.pkl":  # hidden in an array of objects
            arrays["stem.conv1.weight"] = np.array([harm], dtype=object)
        elif kind == "model.pkl":
            arrays["stem.conv1.weight"] = harm
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": harm if kind == "state.pkl" else "me"}, 4))
    else:
        torch.save({"state_dict": resnet, "optimizer": harm}, path, _use_new_zipfile_serialization=kind != "old.pth")
    assert run_script(convert, monkeypatch, path, tmp_path / "out.pkl") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(r"it holds (posix\.system|((__builtin__|builtins)\.)?eval)", error)
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out.pkl").exists()


def no_arrays(folder):
    model = {"stem.conv1.weight": np.array(["a", "b"], dtype=object)}
    (folder / "x.pkl").write_bytes(pickle.dumps({"model": model, "__author__": "x"}))
    return folder / "x.pkl", "cannot be read"


def own_class(folder):
    torch.save({"state_dict": {}, "config": Other()}, folder / "x.pth")
    return folder / "x.pth", "it holds test_weights.Other, and only tensors, arrays and plain values are read"


def caffe2(folder):
    blobs = {"conv1_w": np.zeros((64, 3, 7, 7), np.float32), "res_conv1_bn_s": np.zeros(64, np.float32)}
    (folder / "x.pkl").write_bytes(pickle.dumps({"blobs": blobs}, 2))
    return folder / "x.pkl", "has no ResNet by names that are known here"


def a_list(folder):
    torch.save([torch.zeros(1)], folder / "x.pth")
    return folder / "x.pth", "cannot be read"


def half(folder):
    state = common.resnet(TINY).state_dict()
    torch.save({name: x for name, x in state.items() if not name.startswith("layer4.1.bn2")}, folder / "x.pth")
    return folder / "x.pth", "layer4.1.bn2.weight is missing there, [128] in a resnet18w0.25"


def wide(folder):
    with torch.device("meta"):
        state = torchvision.models.wide_resnet50_2().state_dict()
    state = {name: torch.empty_like(x, device="cpu") for name, x in state.items() if "layer4" not in name}
    torch.save(state, folder / "x.pth")
    return folder / "x.pth", "layer1.0.conv1.weight is [128, 64, 1, 1] there, [64, 64, 1, 1] in a resnet"


def torn(folder):
    torch.save(common.resnet(TINY).state_dict(), folder / "whole.pth")
    (folder / "x.pth").write_bytes((folder / "whole.pth").read_bytes()[:20000])
    return folder / "x.pth", "cannot be read"


def a_folder(folder):
    return folder, "cannot be read"


def other_arch(folder):
    torch.save(common.resnet(TINY).state_dict(), folder / "x.pth")
    return folder / "x.pth", "not --arch resnet18: leave --arch out"


@pytest.mark.parametrize("make", [no_arrays, own_class, caffe2, a_list, half, wide, torn, a_folder, other_arch])
@pytest.mark.parametrize("script", [moco, classify])
def test_what_is_no_file_of_weights_ends_with_one_line(script, make, pictures, tmp_path, monkeypatch, capsys):
    path, says = make(tmp_path)
    arch = ["--arch", "resnet18"] if make is other_arch else []
    assert run_script(script, monkeypatch, "--init", path, "--data", pictures, "--out", tmp_path / "out", *arch) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error
