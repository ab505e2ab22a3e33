"""transfer/compare.py: what it would run, what it makes of what was found, and stopping and going on."""
import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
from conftest import fork, run_script, write_scenes
from transfer import coco, compare, page

run = partial(run_script, compare)
DETECTORS = [f"{backbone}, {share}% of labels" for backbone in ("tuned", "frozen") for share in (10, 100)]


@pytest.fixture
def data(tmp_path):
    """Flags that name drawn scenes as a user's data."""
    for part, count in (("train", 20), ("val", 4)):
        write_scenes(tmp_path / part, count, seed=count)
    source = lambda part: [tmp_path / part / "images", tmp_path / part / "annotations.json"]
    return ["--data", tmp_path / "train" / "images", "--train", *source("train"), "--val", *source("val"),
            "--shares", 0.1, 1, "--out", tmp_path / "out"]


def planned(monkeypatch, flags, method, seed=0):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, flags)])
    args = compare.arguments()
    args.out.mkdir(exist_ok=True)
    args.images, args.several_classes = 20, True
    args.labels = compare.share_labels(args.train[1], compare.open_annotated(args).ids, args.shares, 3, args.out)
    return compare.tasks(args, method, seed)


def value(flags, name, k=1):
    """The word that follows the flag."""
    return flags[flags.index(name) + k]


@pytest.mark.parametrize("method", ["random", "random0", *compare.METHODS, "supervised"])
def test_every_script_takes_the_flags_it_is_given(data, monkeypatch, method):
    shared = {}
    for kind, script, flags, _ in planned(monkeypatch, [*data, "--knn", "somewhere"], method, seed=1):
        monkeypatch.setattr(sys, "argv", [script, *flags])
        args = import_module(script.removesuffix(".py").replace("/", ".")).arguments()
        assert args.seed == 1
        if script == "transfer/detect.py":                       # the second network's draw of the labels
            assert args.train[1].endswith("labels-0.1-1.json" if "10%" in kind else "annotations.json")
        shared[kind] = args
    if method == "supervised":
        assert shared["supervised"].batch_size == 16             # images of a detector's size, as in classify.py
    first = ["pre-training", "objects"] if method in compare.METHODS else ["objects"]
    first = ["supervised"] if method == "supervised" else first
    assert list(shared) == [*first, "kNN", *DETECTORS]
    assert [shared[kind].freeze for kind in DETECTORS] == [False, False, True, True]
    if method in compare.METHODS:
        args = shared["pre-training"]
        assert (args.arch, args.size, args.epochs, args.batch_size) == ("resnet18w0.25", 48, 8, 64)
    # Detectors and probes see 800 pixels where pre-training sees 224.
    assert shared[first[-1]].size == 160 and shared["tuned, 10% of labels"].size == [160, 160]
    assert shared["kNN"].size == 48


def test_detectors_of_two_networks_share_draws_of_few_labels_and_none_is_trained_twice(data, monkeypatch):
    flags, seen = [*data, "--seeds", 2, "--draws", 3], []
    for method, seed in (("moco", 0), ("moco", 1), ("random", 0), ("random", 1)):
        todo = planned(monkeypatch, flags, method, seed)
        detectors = [flags for kind, _, flags, _ in todo if kind.startswith("tuned")]
        labels = [value(flags, "--train", 2) for flags in detectors]
        assert sorted(path[-6] for path in labels if "labels-0.1" in path) == ["0", "1", "2"]
        assert len(labels) == 4                                  # three draws of a tenth, and all labels
        network = seed if method == "moco" else "untrained"      # the network of which is drawn by --seed
        seen += [(method, network, value(flags, "--seed"), value(flags, "--train", 2)) for flags in detectors]
    assert len(set(seen)) == len(seen) == 16


def test_flags_of_the_user_come_last_and_may_hold_spaces(data, tmp_path, monkeypatch):
    flags = [*data[:-1], tmp_path / "a b", "--add", "soco", "--proposals 'my boxes.npz' --lr 2"]
    _, _, words, _ = planned(monkeypatch, flags, "soco")[0]
    assert words[-4:] == ["--proposals", "my boxes.npz", "--lr", "2"] and str(tmp_path / "a b" / "soco-0") in words


def test_no_detector_is_trained_in_no_steps(data, monkeypatch):
    assert [kind for kind, *_ in planned(monkeypatch, [*data, "--steps", 0], "random")] == ["objects"]


def test_weights_that_exist_are_evaluated_without_pre_training(data, tmp_path, monkeypatch, capsys):
    path = tmp_path / "runs" / "last.pt"
    path.parent.mkdir()
    path.touch()
    todo = planned(monkeypatch, [*data, "--init", path], "runs-last")
    assert [kind for kind, *_ in todo] == ["objects", *DETECTORS]
    assert all(value(flags, "--init") == str(path) for _, _, flags, _ in todo)
    assert run(monkeypatch, *data, "--init", tmp_path / "nothing.pth") == 2
    assert "no such file" in capsys.readouterr().err


def test_a_share_of_the_labels_is_of_whole_images_and_another_draw_has_others(tmp_path):
    folder = write_scenes(tmp_path / "train", 20)
    every, drawn = json.loads((folder / "annotations.json").read_text()), []
    shown = coco.CocoFolder(folder / "images", folder / "annotations.json", training=True).ids
    for _ in range(2):
        shares = compare.share_labels(folder / "annotations.json", shown, [0.1, 1], 2, tmp_path)
        assert shares[1, 0] == shares[1, 1] == (folder / "annotations.json", 20)
        for seed in range(2):
            few = json.loads(shares[0.1, seed][0].read_text())
            drawn.append({image["id"] for image in few["images"]})
            assert few["annotations"] == [annotation for annotation in every["annotations"]
                                          if annotation["image_id"] in drawn[-1]]
            assert len(drawn[-1]) == shares[0.1, seed][1] == 2
            assert len(coco.CocoFolder(folder / "images", shares[0.1, seed][0], training=True)) == 2
    assert drawn[0] == drawn[2] != drawn[1] == drawn[3]


def test_drawn_shapes_are_data_that_the_scripts_can_read(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "SHAPES", dict(unlabeled=6, train=5, val=3, knn_train=12, knn_val=12))
    compare.draw_shapes(tmp_path, 48)
    train, shapes = coco.CocoFolder(tmp_path / "train", tmp_path / "train.json", training=True), common.Shapes(5, 48, 1)
    for i in range(len(train)):
        image, boxes, _, classes = shapes.scene(int(Path(train.name(i)).stem))
        assert np.array_equal(np.asarray(train.image(i).decode()), image)
        assert np.array_equal(train.objects(i)[0], boxes) and np.array_equal(train.objects(i)[1], classes)
    scene = common.Shapes(6, 48, 0).scene(2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "masks" / "00002.png")) > 0, scene[2].any(axis=0))
    with np.load(tmp_path / "boxes.npz") as made:
        assert np.array_equal(made["boxes"][made["offsets"][2]:made["offsets"][3]], scene[1])
    assert len(common.ImageFolder(tmp_path / "knn" / "val").labels()[1]) == 12


FAKE = """
import json, pathlib, sys, time
if SLOW in sys.argv[1]: time.sleep(60)
if BROKEN in sys.argv[1]: print("out of luck"); sys.exit(2)
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]); out.mkdir(parents=True, exist_ok=True)
seed = int(sys.argv[sys.argv.index("--seed") + 1])
folder = out.parents[1 if "tuned" in out.name or "frozen" in out.name else 0]
with open(folder / "runs.txt", "a") as file: print(sys.argv[1], *sys.argv[2:], file=file)
if "detect" in sys.argv[1]: (out / "log.jsonl").write_text(json.dumps(
    {"step": 1, "AP": 2.0 * seed + 3 * ("random" not in str(out))}))
elif "classify" in sys.argv[1]: (out / (sys.argv[sys.argv.index("--protocol") + 1] + ".json")).write_text(
    json.dumps({"title": "", **{f"c{k}": {"accuracy": k / 10 + seed / 100} for k in (2, 3, 4, 5)}}))
"""


def stand_in(monkeypatch, broken="nothing", slow="nothing"):
    code = FAKE.replace("BROKEN", repr(broken)).replace("SLOW", repr(slow))
    monkeypatch.setattr(compare, "command_of", lambda name, flags: [sys.executable, "-c", code, name, *flags])


def test_the_table_has_mean_and_deviation_over_seeds_and_nothing_is_done_twice(data, tmp_path, monkeypatch, capsys):
    flags = [*data, "--methods", "moco", "--seeds", 2, "--jobs", 2, "--backbones", "tuned"]
    stand_in(monkeypatch)
    assert run(monkeypatch, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"\d:\d\d left", lines[0])
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == ("| | c2 | c3 | c4 | c5 | tuned AP 10% | tuned gain 10% | tuned AP 100% | "
                        "tuned gain 100% |")
    scores = "20.5 ± 0.7 | 30.5 ± 0.7 | 40.5 ± 0.7 | 50.5 ± 0.7"                          # of 20, 21; 30, 31; ...
    # The APs are 0 and 2 on the two draws, and a method's 3 more: its gain is that on either draw, without spread.
    untrained, trained = "1.0 ± 1.4 |  | 1.0 ± 1.4 | ", "4.0 ± 1.4 | 3.0 ± 0.0 | 4.0 ± 1.4 | 3.0 ± 0.0"
    assert table[2:] == [f"| random | {scores} | {untrained} |", f"| random0 | {scores} | {untrained} |",
                         f"| moco | {scores} | {trained} |",
                         "| supervised | 20.0 | 30.0 | 40.0 | 50.0 | 3.0 | 3.0 | 3.0 | 3.0 |"]  # the first seed alone
    done = (tmp_path / "out" / "runs.txt").read_text()
    assert run(monkeypatch, *flags) == 0 and (tmp_path / "out" / "runs.txt").read_text() == done
    assert done.count("moco.py") == 2 and done.count("detect.py") == 14
    assert Image.open(tmp_path / "out" / "chart.png").size[0] > 1000
    assert run(monkeypatch, *flags, "--epochs", 9) == 0                                   # another pre-training
    assert (tmp_path / "out" / "runs.txt").read_text().count("--epochs 9 --size 48") == 2


def test_a_script_that_fails_ends_the_others_at_once_and_what_is_done_stays_done(data, tmp_path, monkeypatch, capsys):
    flags, start = [*data, "--methods", "moco", "detco", "--seeds", 1, "--jobs", 4], time.time()
    stand_in(monkeypatch, broken="moco", slow="detco")
    assert run(monkeypatch, *flags) == 2 and time.time() < start + 30
    error = capsys.readouterr().err
    assert "moco-0, pre-training ended with exit code 2: out of luck" in error and error.count("\n") == 1
    marks = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.done")}
    stand_in(monkeypatch)
    assert run(monkeypatch, *flags) == 0
    assert all(path.stat().st_mtime_ns == made for path, made in marks.items())
    assert len(list((tmp_path / "out").rglob("*.done"))) > len(marks)


def test_a_signal_ends_the_scripts_too(data, tmp_path):
    def comparison():
        from pytest import MonkeyPatch
        stand_in(MonkeyPatch(), slow="moco")
        sys.argv = ["compare.py", *map(str, [*data, "--methods", "moco", "--seeds", 1, "--jobs", 4])]
        compare.main()

    def at_work():
        """The scripts of this test that run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if f"{tmp_path}/out/moco-0".encode() in path.read_bytes():
                    found.append(path)
        return found

    process = fork(tmp_path / "said.txt", comparison)
    while not at_work():
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM and not at_work()
    assert "stopped by SIGTERM: run the same command again to resume" in (tmp_path / "said.txt").read_text()


def test_a_gain_is_over_the_untrained_networks_on_the_same_labels_and_has_both_errors():
    found = {"random": [(0, 4.0), (1, 8.0)], "random0": [(0, 6.0), (1, 8.0)], "moco": [(0, 6.0), (1, 12.0)]}
    mean, error = compare.gains(found)["moco"]                   # 5 and 8 untrained, so 1 and 4 above
    assert mean == 2.5
    assert error == pytest.approx(((3 / 2 ** 0.5) ** 2 / 2 + (2 / 3) / 4) ** 0.5)  # -1, 1, 0, 0 have variance 2/3


def test_a_bar_is_as_high_as_its_figure():
    sheet = np.asarray(page.bars("", {"a": (10, 0), "b": (20, 0)}, ["a", "b"]))
    height = [(sheet == np.array([int(ink[k:k + 2], 16) for k in (1, 3, 5)])).all(axis=2).any(axis=1).sum()
              for ink in page.INK[:2]]
    assert height[1] == pytest.approx(2 * height[0], abs=3) and height[0] > 50


def test_wrong_flags_and_data_end_with_one_line_before_anything_runs(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "file").touch()
    other = (tmp_path / "val" / "annotations.json").read_text().replace('"ball"', '"bowl"')
    (tmp_path / "other.json").write_text(other)
    stand_in(monkeypatch, broken="")
    images = tmp_path / "train" / "images"
    for flags, says in ((["--data", tmp_path], "go together"), (["--knn", tmp_path], "go together"),
                        (["--seeds", 0], "at least 1"), (["--methods", "byol"], "invalid choice"),
                        (["--shares", 0], "at least"), (["--add", "sooc", "--lr 3"], "--add sooc"),
                        (["--add", "soco", "--lr '3"], "No closing quotation"),
                        ([*data, "--knn", tmp_path / "typo"], "no such folder"),
                        ([*data, "--out", tmp_path / "file"], "cannot write --out"),
                        ([*data, "--train", images, tmp_path / "broken.json"], "not a COCO annotation file"),
                        ([*data, "--train", images, tmp_path / "nothing.json"], "not a COCO annotation file"),
                        ([*data, "--val", tmp_path / "val" / "images", tmp_path / "other.json"], "the classes of")):
        assert run(monkeypatch, *flags) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, flags
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    assert run(monkeypatch, *data) == 2 and "pip install pycocotools, or take --steps 0" in capsys.readouterr().err
