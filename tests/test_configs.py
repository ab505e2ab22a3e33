"""transfer/configs with its README.md, and transfer/train_net.py, without Detectron2: keys, values, names, the draw."""
import hashlib
import json
import random
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import soco
from conftest import ROOT, fork, script
from transfer import convert, train_net

FOLDER = ROOT / "transfer" / "configs"
FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}
CONFIGS = [name for name in FILES if not name.startswith("Base-")]
# config_keys.json: every key of Detectron2's get_cfg(), with its default.
DEFAULTS = json.loads((ROOT / "tests" / "detectron2" / "config_keys.json").read_text())
# Not Detectron2's: train_net.py's own, and those of its DensePose project.
OURS = {"INPUT.SCALE_JITTER": []}
DENSEPOSE = {f"MODEL.ROI_DENSEPOSE_HEAD.{key}": value for key, value in dict(
    NAME="", POOLER_TYPE="ROIAlignV2", POOLER_RESOLUTION=28, NUM_COARSE_SEGM_CHANNELS=2, HEATMAP_SIZE=112,
    INDEX_WEIGHTS=5.0, PART_WEIGHTS=1.0, POINT_REGRESSION_WEIGHTS=0.01, DECODER_ON=True).items()}


def flat(tree, prefix=""):
    """{"MODEL": {"MASK_ON": True}} -> {"MODEL.MASK_ON": True}, without _BASE_."""
    keys = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            keys.update(flat(value, f"{prefix}{key}."))
        elif key != "_BASE_":
            keys[prefix + key] = value
    return keys


def base(name):
    """The name of a file's _BASE_, or None."""
    return FILES[name].get("_BASE_", "").removesuffix(".yaml") or None


def chain(name):
    while name:
        yield name
        name = base(name)


def known(name):
    return {**DEFAULTS, **OURS, **(DENSEPOSE if "Base-DensePose" in chain(name) else {})}


def resolved(name):
    """All keys as Detectron2 reads them: the defaults, then the base's, then the file's own."""
    return {**(resolved(base(name)) if base(name) else known(name)), **flat(FILES[name])}


def same_type(value, default):
    """As Detectron2 checks it; in a list, whose items it does not check, a number for a number and so on."""
    if isinstance(default, list) and isinstance(value, list):
        plain = lambda x: float(x) if type(x) is int else x
        return not default or all(same_type(plain(item), plain(default[0])) for item in value)
    return type(value) is type(default)


def table():
    """The rows of the table in configs/README.md: the cells of each line that begins with a configuration's name."""
    text = (ROOT / "transfer" / "configs" / "README.md").read_text()
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if re.match(r"\| `", line)]


# --- The files -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FILES)
def test_every_key_is_one_of_detectron2s_and_has_its_type(name):
    keys = known(name)
    for key, value in flat(FILES[name]).items():
        assert key in keys, f"{name}: {key}"
        assert same_type(value, keys[key]), f"{name}: {key} is {value!r}, by default {keys[key]!r}"


@pytest.mark.parametrize("name", FILES)
def test_no_file_repeats_what_its_base_or_detectron2_says(name):
    above = {**known(name), **(resolved(base(name)) if base(name) else {"VERSION": 1})}  # not said, it is guessed
    assert [key for key, value in flat(FILES[name]).items() if above.get(key, "missing") == value] == []


@pytest.mark.parametrize("name", FILES)
def test_a_base_exists_and_every_chain_ends_in_base_all(name):
    assert list(chain(name))[-1] == "Base-All"


@pytest.mark.parametrize("name", CONFIGS)
def test_images_are_rgb_and_every_layer_is_trained_with_synchronized_bn(name):
    keys = resolved(name)
    assert keys["INPUT.FORMAT"] == "RGB" and keys["MODEL.BACKBONE.FREEZE_AT"] == 0
    assert keys["MODEL.RESNETS.NORM"] == "SyncBN" and keys["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    assert keys["MODEL.WEIGHTS"] == ""                                      # from the command line
    pyramid = "fpn" in keys["MODEL.BACKBONE.NAME"]
    assert keys["MODEL.FPN.NORM"] == ("SyncBN" if pyramid else "")
    assert pyramid or keys["MODEL.ROI_HEADS.NAME"] == train_net.Res5NormROIHeads.__name__


def test_images_are_normalized_as_in_pre_training():
    from common import Photometric
    keys = resolved("coco-fpn-1x")
    seen = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    ours = Photometric()(seen)[0, :, 0, 0]  # no augmentation asked for: it only normalizes
    theirs = [(x - mean) / std for x, mean, std in zip((0, 128, 255), keys["MODEL.PIXEL_MEAN"],
                                                       keys["MODEL.PIXEL_STD"])]
    assert torch.allclose(ours, torch.tensor(theirs), atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_schedule_is_the_one_in_the_name(name):
    keys = resolved(name)
    steps, total, batch = keys["SOLVER.STEPS"], keys["SOLVER.MAX_ITER"], keys["SOLVER.IMS_PER_BATCH"]
    assert all(a < b for a, b in zip([0, *steps], [*steps, total])) and steps
    assert keys["SOLVER.WARMUP_ITERS"] < steps[0]
    if match := re.search(r"-(\d+)k$", name):
        assert total == 1000 * int(match[1])
    elif match := re.search(r"-(\d+)x$", name):                             # 1x: 90k batches of 16
        assert total * batch == int(match[1]) * 90000 * 16
    elif name == "densepose-s1x":
        assert total == 130000
    else:
        assert total == (90000 if name.startswith("soco") else 12000) and re.search(r"-\d+percent$", name)
    assert steps[0] > 0.6 * total


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.endswith("percent")])
def test_a_share_of_coco_is_the_one_in_the_name(name):
    percent = int(re.search(r"(\d+)percent$", name)[1])
    (train,) = resolved(name)["DATASETS.TRAIN"]
    assert train_net.parse_subset(train) == ("coco_2017_train", percent, 0)
    assert resolved(name)["DATASETS.TEST"] == ["coco_2017_val"]


@pytest.mark.parametrize("name, classes", [
    ("voc-c4-24k", 20), ("coco-fpn-2x", 80), ("soco-fpn-1x", 80), ("lvis05-fpn-2x", 1230), ("lvis1-fpn-180k", 1203),
    ("soco-lvis1-fpn-1x", 1203), ("cityscapes-fpn-90k", 8), ("coco-keypoints-2x", 1), ("densepose-s1x", 1)])
def test_a_data_set_has_its_number_of_classes(name, classes):
    assert resolved(name)["MODEL.ROI_HEADS.NUM_CLASSES"] == classes


def test_settings_that_a_paper_gives_are_those_of_the_paper():
    def check(name, **settings):
        keys = resolved(name)
        for key, value in settings.items():
            assert keys[f"SOLVER.{key}"] == value, (name, key)
    for name in CONFIGS:
        total = resolved(name)["SOLVER.MAX_ITER"]
        steps = [total * 2 // 3, total * 8 // 9]
        if name.startswith("soco"):                                         # SoCo Sec. 4.2, of COCO
            check(name, BASE_LR=0.02, WEIGHT_DECAY=2.5e-5, WARMUP_ITERS=1000, IMS_PER_BATCH=16, STEPS=steps)
        elif name.startswith("detcon"):                                     # DetCon A.1, A.3
            lr = 0.2 if "r101" in name else 0.3
            check(name, BASE_LR=lr, WEIGHT_DECAY=4e-5, WARMUP_ITERS=500, IMS_PER_BATCH=64, STEPS=steps)
            assert resolved(name)["INPUT.SCALE_JITTER"] == [0.8, 1.25]
            assert resolved(name)["INPUT.MAX_SIZE_TRAIN"] == 1024
    check("voc-c4-24k", BASE_LR=0.02, WEIGHT_DECAY=1e-4, STEPS=[24000 * 3 // 4, 24000 * 11 // 12])  # SoCo Sec. 4.2
    sizes = resolved("voc-c4-24k")["INPUT.MIN_SIZE_TRAIN"]
    assert (min(sizes), max(sizes), resolved("voc-c4-24k")["INPUT.MIN_SIZE_TEST"]) == (480, 800, 800)  # MoCo Sec. 4.2.1
    sizes = resolved("coco-c4-1x")["INPUT.MIN_SIZE_TRAIN"]
    assert (min(sizes), max(sizes)) == (640, 800)                           # MoCo Sec. 4.2.2


def test_lvis_of_soco_has_the_head_of_its_coco():
    keys = ["BOX_HEAD.NUM_CONV", "BOX_HEAD.NUM_FC", "BOX_HEAD.NORM", "MASK_HEAD.NORM"]
    for name in ("soco-fpn-1x", "soco-lvis1-fpn-2x"):
        assert [resolved(name)[f"MODEL.ROI_{key}"] for key in keys] == [4, 1, "SyncBN", "SyncBN"]


def test_retinanets_anchors_are_three_a_level_a_third_of_an_octave_apart():
    sizes = resolved("coco-retinanet-1x")["MODEL.ANCHOR_GENERATOR.SIZES"]
    for level, sides in enumerate(sizes):
        assert sides == pytest.approx([32 * 2 ** (level + third / 3) for third in range(3)], abs=1e-3)
    assert len(sizes) == len(resolved("coco-retinanet-1x")["MODEL.RETINANET.IN_FEATURES"])


@pytest.mark.parametrize("name", [name for name in CONFIGS if "fpn" in name and name.startswith("soco")])
def test_socos_pyramid_and_head_all_have_a_place_in_its_detector(name):
    keys, norm = resolved(name), [".weight", ".norm.weight", ".norm.bias", ".norm.running_mean", ".norm.running_var"]
    levels = [int(feature.removeprefix("res")) for feature in keys["MODEL.FPN.IN_FEATURES"]]
    with_norm = [f"fpn_{kind}{level}" for kind in ("lateral", "output") for level in levels if keys["MODEL.FPN.NORM"]]
    convolutions = range(1, keys["MODEL.ROI_BOX_HEAD.NUM_CONV"] + 1)
    with_norm += [f"roi_heads.box_head.conv{k}" for k in convolutions if keys["MODEL.ROI_BOX_HEAD.NORM"]]
    places = {name + end for name in with_norm for end in norm}
    for k in range(1, keys["MODEL.ROI_BOX_HEAD.NUM_FC"] + 1):
        places |= {f"roi_heads.box_head.fc{k}.weight", f"roi_heads.box_head.fc{k}.bias"}
    assert {"fpn_lateral2.weight", "fpn_output2.norm.weight", "roi_heads.box_head.conv1.weight",
            "roi_heads.box_head.conv1.norm.weight", "roi_heads.box_head.fc1.weight"} <= places
    with torch.device("meta"):
        online = soco.SoCo("resnet50").online
    trained = [key for part in (online.fpn, online.head) for key in part.state_dict()]
    trained = [key for key in trained if not key.endswith("num_batches_tracked")]
    assert len(trained) == len(places)                                      # none is left out, none starts anew
    channels = {online.fpn.layer_blocks[0][0].out_channels, online.head[0][0].out_channels}
    assert channels == {keys["MODEL.FPN.OUT_CHANNELS"]} == {keys["MODEL.ROI_BOX_HEAD.CONV_DIM"]}
    linear = [module for module in online.head.modules() if isinstance(module, torch.nn.Linear)]
    side = keys["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION"]
    assert [(x.out_features, x.in_features) for x in linear] == [(keys["MODEL.ROI_BOX_HEAD.FC_DIM"], 256 * side * side)]


# --- README ----------------------------------------------------------------------------------------------------------

def test_every_configuration_is_in_readmes_table_and_every_row_names_one():
    rows = table()
    assert {row[0].strip("`") for row in rows} == set(CONFIGS)
    for row in rows:
        assert len(row) == 4 and re.search(r"\d", row[3]), row
        paper, _ = re.fullmatch(r"(MoCo|DetCo|DUPR|SoCo|DetCon), (Tables? |Fig\. |A\.)\S.*", row[1]).groups()
        family = row[0].strip("`").split("-")[0]
        assert family not in ("soco", "detcon") or paper.lower() == family, row


def test_an_ap_lies_between_its_ap75_and_ap50():
    for row in table():
        for ap, ap50, *ap75 in re.findall(r"([\d.]+) / ([\d.]+)(?: / ([\d.]+))?", row[3]):
            assert float(ap) < float(ap50), row
            assert not ap75[0] or float(ap75[0]) < float(ap50), row


# --- train_net.py ----------------------------------------------------------------------------------------------------

def records(count):
    return [{"image_id": 7 * i + 3, "annotations": [{"of": 7 * i + 3}] * (i % 3)} for i in range(count)]


@pytest.mark.parametrize("percent, count", [(1, 10), (2, 20), (5, 50), (10, 100), (100, 1000)])
def test_a_draw_has_the_right_number_of_images_each_with_its_annotations(percent, count):
    images = records(1000)
    drawn = train_net.sample(images, percent, seed=0)
    assert len(drawn) == count == len({image["image_id"] for image in drawn})
    assert all(image in images for image in drawn)
    assert all(annotation["of"] == image["image_id"] for image in drawn for annotation in image["annotations"])


def test_the_share_is_rounded():
    assert [len(train_net.sample(records(n), 1, 0)) for n in (149, 151)] == [1, 2]


def test_a_draw_is_the_same_again_and_in_whatever_order_the_images_come():
    images = records(1000)
    first, shuffled = train_net.sample(images, 5, 0), random.Random(1).sample(images, len(images))
    assert train_net.sample(images, 5, 0) == first
    ids = lambda drawn: {image["image_id"] for image in drawn}
    assert ids(train_net.sample(shuffled, 5, 0)) == ids(first)
    by_hash = sorted((image["image_id"] for image in images),
                     key=lambda i: hashlib.sha256(f"0 {i}".encode()).hexdigest())
    assert ids(first) == set(by_hash[:50])                                  # so on every machine


def test_another_seed_draws_other_images_and_a_smaller_share_lies_in_a_larger_one():
    ids = lambda percent, seed: {image["image_id"] for image in train_net.sample(records(1000), percent, seed)}
    assert len(ids(10, 0) & ids(10, 1)) < 30                                # 10 by chance
    assert ids(1, 0) < ids(2, 0) < ids(5, 0) < ids(10, 0)


def test_a_draw_favors_no_part_of_the_data():
    places = [(image["image_id"] - 3) // 7 for image in train_net.sample(records(4000), 25, 0)]
    quarters = [sum(1000 * k <= place < 1000 * (k + 1) for place in places) for k in range(4)]
    assert all(190 < count < 310 for count in quarters)                     # 250 each, sd 14


def test_the_name_of_a_share_says_its_percentage_and_seed():
    assert train_net.parse_subset("coco_2017_train_10percent") == ("coco_2017_train", 10, 0)
    assert train_net.parse_subset("coco_2017_train_1percent_seed3") == ("coco_2017_train", 1, 3)
    for whole in ("coco_2017_train", "voc_2007_trainval", "coco_2017_train_percent", "coco_2017_train_5percents"):
        assert train_net.parse_subset(whole) is None


def test_without_detectron2_train_net_says_so_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "detectron2").mkdir()
    # where one is installed as well
    (tmp_path / "detectron2" / "__init__.py").write_text("raise ImportError('not today')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    said = tmp_path / "said.txt"
    process = fork(said, script, "transfer/train_net.py", "--config-file", FOLDER / "coco-fpn-1x.yaml")
    process.join()
    assert process.exitcode == 2 and said.read_text().count("\n") == 1
    assert "error: Detectron2 cannot be imported (not today)" in said.read_text()


# --- train_net.py with stand-ins for Detectron2 ----------------------------------------------------------------------

def config(weights="", head="StandardROIHeads", convolutions=0, train=("photos",)):
    """As much of a Detectron2 configuration as the checks look at."""
    model = SimpleNamespace(WEIGHTS=str(weights), ROI_HEADS=SimpleNamespace(NAME=head),
                            ROI_BOX_HEAD=SimpleNamespace(NUM_CONV=convolutions))
    return SimpleNamespace(MODEL=model, DATASETS=SimpleNamespace(TRAIN=train, TEST=()))


def refused(capsys, function, *args):
    """The one line with which function(*args) ends the program."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    return line


def test_a_data_set_that_is_not_there_is_named_before_anything_is_built(tmp_path, capsys, monkeypatch):
    metadata = {"json_file": str(tmp_path / "annotations.json"), "image_root": str(tmp_path)}
    monkeypatch.setattr(train_net, "MetadataCatalog", {"photos": metadata}, raising=False)
    monkeypatch.setattr(train_net, "DatasetCatalog", SimpleNamespace(list=lambda: ["photos"]), raising=False)
    assert "does not know the data set films" in refused(capsys, train_net.check_data, config(train=("films",)))
    train_net.register_subset("fotos_5percent")                             # of a data set that there is not
    line = refused(capsys, train_net.check_data, config(train=("fotos_5percent",)))
    assert "does not know the data set fotos_5percent" in line
    line = refused(capsys, train_net.check_data, config())
    assert "annotations.json is missing" in line and "DETECTRON2_DATASETS" in line
    (tmp_path / "annotations.json").touch()
    train_net.check_data(config())


def test_socos_box_head_is_refused_where_its_convolutions_have_no_place(tmp_path, capsys):
    soco_pkl, moco_pkl = tmp_path / "soco.pkl", tmp_path / "moco.pkl"
    names = ["roi_heads.box_head.conv1.weight", "roi_heads.box_head.fc1.weight"]
    convert.write(soco_pkl, dict.fromkeys(names, torch.ones(2)), "detectron2")
    convert.write(moco_pkl, {"stem.conv1.weight": torch.ones(2)}, "detectron2")
    assert "soco-fpn-*" in refused(capsys, train_net.check_weights, config(soco_pkl))
    for fits in (config(soco_pkl, convolutions=4), config(soco_pkl, "Res5NormROIHeads"), config(moco_pkl), config()):
        train_net.check_weights(fits)


def test_weights_that_fill_nothing_of_the_backbone_are_refused(capsys):
    model = torch.nn.ModuleDict({"backbone": torch.nn.Conv2d(3, 4, 1), "head": torch.nn.Conv2d(4, 4, 1)})

    def fill(part):
        with train_net.filling(model, "runs/moco/last.pt"):
            torch.nn.init.zeros_(model[part].weight)
    assert "convert.py" in refused(capsys, fill, "head")
    fill("backbone")
    with train_net.filling(model, ""):
        pass                                                                # from nothing, if that is asked for


def evaluate_as_lvis_and_cityscapes_do():
    sys.modules["cityscapesscripts"] = ModuleType("cityscapesscripts")
    train_net.restore_dropped_names()
    from deeplearning.projects.cityscapesApi import cityscapesscripts  # noqa: F401
    assert np.ones(2).astype(np.float).dtype == np.float64
    assert np.in1d([[1, 2], [3, 4]], [2, 3], invert=True).reshape(2, 2).tolist() == [[True, False], [False, True]]
    assert json.dumps(np.count_nonzero(np.eye(3))) == "3"
    assert np.count_nonzero(np.eye(3), axis=0).tolist() == [1, 1, 1]


def test_lvis_and_cityscapes_find_the_names_that_they_want(tmp_path):
    process = fork(tmp_path / "said.txt", evaluate_as_lvis_and_cityscapes_do)  # it changes NumPy
    process.join()
    assert process.exitcode == 0, (tmp_path / "said.txt").read_text()
