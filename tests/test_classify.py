"""transfer/classify.py: against scikit-learn, by hand, and the script as a user runs it."""
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

import common
import moco
import soco
from conftest import (in_processes, rows, run_script, weights, without_speed, write_checkpoint, write_pictures,
                      write_scenes)
from transfer import classify, convert, svm

run = partial(run_script, classify)
TINY = ["--init", "random", "--arch", "resnet18w0.25", "--size", 32, "--batch-size", 16, "--workers", 0]
CPU = torch.device("cpu")


def settings(**values):
    return type("", (), {**dict(size=32, workers=0, amp="off", batch_size=16), **values})


def tiny_backbone():
    common.seed_everything(0)
    return common.resnet("resnet18w0.25", common.SyncBatchNorm).eval()


@pytest.fixture
def blobs():
    """Rows of four classes that overlap: (x, class) to learn from and to evaluate on."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(4, 20, generator=generator)
    label = torch.arange(900) % 4
    x = torch.nn.functional.normalize(centers[label] + 2.5 * torch.randn(900, 20, generator=generator), dim=1)
    return (x[:600], label[:600]), (x[600:], label[600:])


# --- linear probe ---

def test_linear_probe_agrees_with_scikit_learns_logistic_regression_to_a_point(tmp_path, monkeypatch):
    """Pictures told apart by colors that overlap, so that neither 0 nor 1 is right. Training sees the middle of an
    image, as the other does, and has some weight decay, so that both have one optimum to reach.
    """
    rng = np.random.default_rng(0)
    for part, count in (("train", 240), ("val", 300)):
        for i in range(count):
            color = np.array([[150, 90, 90], [90, 150, 90], [90, 90, 150]])[i % 3] + rng.normal(0, 45, 3)
            path = tmp_path / part / "abc"[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(color + rng.normal(0, 3, (32, 32, 3)), 0, 255).astype(np.uint8)).save(path)
    monkeypatch.setattr(common, "random_crop", lambda size, area, rng: common.center_crop(size))
    flags = [*TINY, "--data", tmp_path, "--stage", 2, "--epochs", 40, "--lr", 4, "--weight-decay", 0.01,
             "--batch-size", 40, "--out", tmp_path / "out"]
    assert run(monkeypatch, *flags) == 0
    backbone, features = tiny_backbone(), []
    for part in ("train", "val"):
        source = common.ImageFolder(tmp_path / part)
        labels = source.labels()[0]
        views = [classify.labeled_view(source.image(i), None, 32)["view"] for i in range(len(source))]
        with torch.no_grad():
            c2 = backbone(common.Photometric()(torch.stack(views)))[0]
        features.append((c2.mean(dim=(2, 3)).numpy(), labels.numpy()))
    (x, y), (x_val, y_val) = features
    # of the sum, not the mean
    theirs = LogisticRegression(C=1 / (0.01 * 240), max_iter=5000).fit(x, y).score(x_val, y_val)
    assert 0.6 < theirs < 0.95 and rows(tmp_path / "out")[-1]["top1"] == pytest.approx(theirs, abs=0.01)


@pytest.mark.parametrize("stage", [2, 5])
def test_linear_probe_leaves_the_backbone_as_it_is_bit_for_bit(pictures, tmp_path, monkeypatch, stage):
    assert run(monkeypatch, *TINY, "--data", pictures, "--epochs", 1, "--stage", stage, "--out", tmp_path) == 0
    after, before = weights(tmp_path), tiny_backbone().state_dict()
    assert all(torch.equal(after[f"backbone.{name}"], x) for name, x in before.items())
    assert after["fc.weight"].shape == (len(common.SHAPE_CLASSES), tiny_backbone().channels[stage - 2])


def test_finetuning_changes_weights_and_statistics_and_a_detector_can_start_from_them(pictures, tmp_path, monkeypatch):
    assert run(monkeypatch, *TINY, "--data", pictures, "--epochs", 1, "--protocol", "finetune", "--out", tmp_path) == 0
    after, before = weights(tmp_path), tiny_backbone().state_dict()
    assert not any(torch.equal(after[f"backbone.{name}"], before[name])
                   for name in ("conv1.weight", "bn1.running_mean", "bn1.weight"))
    assert run_script(convert, monkeypatch, tmp_path / "last.pt", tmp_path / "detector.pth") == 0
    detector = torch.load(tmp_path / "detector.pth", weights_only=True)
    assert len(detector) == len(before)                                    # the backbone, without the classifier
    assert all(torch.equal(detector[f"backbone.body.{name}"], after[f"backbone.{name}"]) for name in before)


def test_settings_are_the_papers(monkeypatch):
    chosen = {}
    for name, flags in (("linear", []), ("finetune", ["--protocol", "finetune"])):
        for init in ("x.pt", "random"):
            monkeypatch.setattr("sys.argv", ["classify.py", "--init", init, "--data", ".", *flags])
            args = classify.arguments()
            chosen[name, init] = args.lr, args.weight_decay, args.drops, args.epochs, args.batch_size
    assert chosen["linear", "x.pt"] == chosen["linear", "random"] == (30, 0, [0.6, 0.8], 100, 256)     # Sec. 4.1
    assert chosen["finetune", "x.pt"] == (0.03, 1e-4, [0.7, 0.9], 100, 256)                            # A.6, A.7
    assert chosen["finetune", "random"] == (0.1, 1e-4, [0.7, 0.9], 100, 256)


def test_the_ceiling_takes_a_detectors_batches_of_annotated_images(monkeypatch, capsys):
    images = ["--train", "images", "a.json", "--val", "images", "b.json"]
    for flags, expected in ((images, (800, 16)), ([*images, "--batch-size", 64, "--size", 96], (96, 64)),
                            ([], (160, 256))):
        argv = ["classify.py", "--init", "random", "--protocol", "supervised", *map(str, flags)]
        monkeypatch.setattr("sys.argv", argv)
        args = classify.arguments()
        assert (args.size, args.batch_size, args.lr) == (*expected, 0.1)
    assert run(monkeypatch, "--help") == 0
    assert "with --train a --batch-size of 16" in " ".join(capsys.readouterr().out.split())


def test_top1_and_top5_are_those_counted_by_hand(pictures):
    source = common.ImageFolder(pictures / "val")
    labels, classes = source.labels()
    model = classify.Classifier(tiny_backbone(), 5, len(classes), frozen=True)
    torch.nn.init.normal_(model.fc.weight)
    figures = classify.evaluate(model, source, labels, settings(), CPU)
    hits = []
    for i in range(len(source)):
        with torch.no_grad():
            scores = model.scores(classify.labeled_view(source.image(i), None, 32)["view"][None])[0]
        hits.append([(scores > scores[labels[i]]).sum().item() < k for k in (1, 5)])
    assert [figures["top1"], figures["top5"]] == pytest.approx(np.mean(hits, axis=0).tolist())
    assert figures["top5"] > figures["top1"] > 0


# --- support vector machines ---

@pytest.mark.parametrize("cost", [2.0 ** -9, 0.1, 8.0])
def test_svm_finds_the_weights_of_scikit_learns_linear_svc(blobs, cost):
    (x, label), _ = blobs
    y = torch.where(label[:, None] == torch.arange(4), 1.0, -1.0)
    y[:50, 1] = 0  # left out by the second alone
    w = svm.linear_svm(torch.nn.functional.pad(x, (0, 1), value=1.0), y, cost)
    for k in range(4):
        used = y[:, k] != 0
        theirs = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=False, tol=1e-9, max_iter=10000)
        theirs.fit(x[used], y[used, k])
        np.testing.assert_allclose(w[:, k], np.append(theirs.coef_[0], theirs.intercept_),
                                   atol=2e-3 * np.abs(theirs.coef_).max())


def test_svm_starts_where_another_cost_ended_and_ends_where_it_would_anyway(blobs):
    (x, label), _ = blobs
    y = torch.where(label[:, None] == torch.arange(4), 1.0, -1.0)
    start = svm.linear_svm(x, y, 0.01)
    torch.testing.assert_close(svm.linear_svm(x, y, 1.0, start),
                               svm.linear_svm(x, y, 1.0), rtol=1e-3, atol=1e-3)


def test_svm_of_few_rows_and_many_columns(blobs):
    (x, label), _ = blobs
    wide = torch.nn.functional.normalize(torch.randn(40, 900, generator=torch.Generator().manual_seed(0)), dim=1)
    y = torch.where(label[:40, None] == torch.arange(4), 1.0, -1.0)
    w = svm.linear_svm(wide, y, 128.0)
    assert ((wide @ w) * y > 0.9).all()  # all can be told apart, so at such a cost all are


def test_accuracy_is_scikit_learns_and_cost_the_best_of_its_cross_validation(blobs):
    (x, label), (x_val, label_val) = blobs
    truth = [2 * torch.nn.functional.one_hot(t, 4) - 1 for t in (label, label_val)]
    figures = svm.evaluate(x, truth[0], x_val, truth[1], single=True)
    svc = lambda cost: [LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=False, tol=1e-7, max_iter=10000)
                        for _ in range(4)]
    def accuracy(cost, fit, held, x_held, label_held):
        scores = [m.fit(x[fit], (label[fit] == k) * 2 - 1).decision_function(x_held[held])
                  for k, m in enumerate(svc(cost))]
        return (np.argmax(scores, axis=0) == label_held[held].numpy()).mean()
    fold = np.arange(600) % 3
    crossed = {cost: np.mean([accuracy(cost, fold != f, fold == f, x, label) for f in range(3)])
               for cost in svm.COSTS}
    assert crossed[figures["cost"]] >= max(crossed.values()) - 0.004
    everything = np.ones(600, bool), np.ones(300, bool)
    assert figures["accuracy"] == pytest.approx(accuracy(figures["cost"], *everything, x_val, label_val), abs=0.007)
    assert 0.4 < figures["accuracy"] < 0.95


def test_average_precision_is_the_area_below_the_best_precision_at_a_recall_or_more():
    rng = np.random.default_rng(0)
    scores, truth = rng.permutation(60)[:, None] / 60.0, rng.choice([1, -1, 0], (60, 1), p=[0.3, 0.5, 0.2])
    area, points = 0.0, []
    counted = [i for i in np.argsort(-scores[:, 0]) if truth[i, 0] != 0]
    for n in range(1, len(counted) + 1):
        hits = sum(truth[i, 0] == 1 for i in counted[:n])
        points.append((hits / (truth == 1).sum(), hits / n))
    for recall in sorted({r for r, _ in points if r > 0}):
        area += max(p for r, p in points if r >= recall) / (truth == 1).sum()
    ours = svm.average_precision(torch.from_numpy(scores), torch.from_numpy(truth))
    assert ours.item() == pytest.approx(area)
    assert svm.average_precision(torch.rand(5, 1), -torch.ones(5, 1)).isnan().all()


def write_voc(folder):
    pictures = write_pictures(folder / "all", 24)
    (folder / "JPEGImages").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for i, path in enumerate(sorted(pictures.rglob("*.png"))):
        Image.open(path).convert("RGB").save(folder / "JPEGImages" / f"{i:06}.jpg")
    for split, first in (("trainval", 0), ("test", 12)):
        for k, name in enumerate(("boat", "cat")):
            lines = [f"{i:06} {[' 1', '-1', ' 0'][(i + k) % 3]}\n" for i in range(first, first + 12)]
            (folder / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text("".join(lines))
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("not read")
    return folder


def test_voc_is_read_with_several_classes_an_image_and_what_is_hard_to_say_left_out(tmp_path, monkeypatch, capsys):
    voc = classify.VOC2007(write_voc(tmp_path), "test")
    assert len(voc) == 12 and voc.name(0) == "000012.jpg" and voc.truth[:3].tolist() == [[1, -1], [-1, 0], [0, 1]]
    assert voc.image(0).size == (40, 40)
    assert run(monkeypatch, *TINY, "--data", tmp_path, "--protocol", "svm") == 0
    assert "mAP" in (out := capsys.readouterr().out) and "accuracy" not in out


# --- objects ---

def slow_ridge(x, y, x_val, strength):
    """The normal equations, with a column for the prior that is not held back."""
    x, x_val = (np.hstack([np.ones((len(rows), 1)), rows]) for rows in (x, x_val))
    held = strength * np.eye(x.shape[1])
    held[0, 0] = 0
    return x_val @ np.linalg.solve(x.T @ x + held, x.T @ y)


@pytest.mark.parametrize("columns", [6, 80])
def test_ridge_takes_the_strength_that_leaving_each_row_out_in_turn_finds(blobs, columns):
    (x, label), (x_val, _) = blobs
    noise = torch.randn(110, columns, generator=torch.Generator().manual_seed(1))
    noise[:, :6] += 8 * torch.cat([x[:60, :6], x_val[:50, :6]])
    x, y, x_val = noise[:60], torch.nn.functional.one_hot(label[:60]), noise[60:]
    scores = common.ridge(x, y, x_val)
    mean, std = x.mean(dim=0), x.std(dim=0)
    x, x_val, y = ((x - mean) / std).numpy(), ((x_val - mean) / std).numpy(), y.numpy()
    hits, strengths = [], [60 * 10.0 ** k for k in range(-4, 4)]
    for strength in strengths:
        others = [np.arange(60) != i for i in range(60)]
        hits.append(sum(slow_ridge(x[rest], y[rest], x[~rest], strength).argmax() == y[~rest].argmax()
                        for rest in others))
    assert 0 < np.argmax(hits) < 7                                # there was a choice, and no end of it is best
    np.testing.assert_allclose(scores, slow_ridge(x, y, x_val, strengths[np.argmax(hits)]), rtol=1e-3, atol=1e-4)


def features_of_scenes(folder):
    source = classify.coco.CocoFolder(Path(folder, "images"), Path(folder, "annotations.json"), training=True)
    backbone = tiny_backbone()
    encode = lambda views, boxes: common.pool_stages(backbone(common.Photometric()(views)), boxes)
    with torch.no_grad():
        rows, classes = common.box_features(encode, source, range(len(source)), 64, CPU)
    order = np.lexsort(rows["c2"].numpy().round(3).T)
    return [rows[f"c{i}"].numpy()[order] for i in (2, 3, 4, 5)], classes.numpy()[order]


def test_boxes_are_pooled_at_every_stage_where_they_are_and_in_two_processes_too(tmp_path):
    """Pictures twice as wide as high, whose directions scale apart, against each stage pooled by `roi_align`."""
    folder = write_scenes(tmp_path / "scenes", 5)
    shapes, backbone, expected = common.Shapes(5, 64), tiny_backbone(), {i: [] for i in range(4)}
    dataset = (folder / "annotations.json").read_text().replace('"width": 64', '"width": 128')
    dataset = json.loads(dataset)
    for annotation in dataset["annotations"]:
        annotation["bbox"] = [2 * annotation["bbox"][0], annotation["bbox"][1], 2 * annotation["bbox"][2],
                              annotation["bbox"][3]]
    (folder / "annotations.json").write_text(json.dumps(dataset))
    truth = []
    for i in range(5):
        image, boxes, _, classes = shapes.scene(i)
        Image.fromarray(image).resize((128, 64), Image.Resampling.NEAREST).save(folder / "images" / f"{i}.png")
        view, = common.LazyImage(Image.open(folder / "images" / f"{i}.png"), 0).crop([(0, 0, 128, 64)], [64])
        with torch.no_grad():
            for k, c in enumerate(backbone(common.Photometric()(common.to_tensor(view)[None]))):
                expected[k] += common.roi_align(c, torch.from_numpy(boxes)[None], 3, 4 * 2 ** k).flatten(1).tolist()
        truth += classes.tolist()
    for features, classes in [features_of_scenes(folder), *in_processes(2, features_of_scenes, str(folder))]:
        order = np.lexsort(np.array(expected[0]).round(3).T)
        assert classes.tolist() == np.array(truth)[order].tolist()
        for k in range(4):
            np.testing.assert_allclose(features[k], np.array(expected[k])[order], atol=1e-4)


def test_effective_rank_counts_the_directions_that_features_spread_over():
    axes = torch.linalg.qr(torch.randn(64, 64))[0]
    spread = torch.cat([axes[:8], -axes[:8]])                                   # alike in 8 directions, with mean 0
    assert classify.effective_rank(spread) == pytest.approx(8, abs=1e-3)
    assert classify.effective_rank(spread + 100) == pytest.approx(8, abs=1e-2)  # the mean is no direction
    assert classify.effective_rank(torch.randn(50, 1) * axes[:1]) == pytest.approx(1, abs=1e-2)


def write_soco(path):
    torch.manual_seed(0)
    model = soco.SoCo("resnet18w0.25", "fpn", size=48, hidden=8, dim=8)
    return write_checkpoint(path, "soco", model, "resnet18w0.25"), model.online.eval()


def test_socos_pyramid_and_head_are_those_of_its_pre_training(tmp_path):
    path, online = write_soco(tmp_path / "last.pt")
    network = classify.BoxEncoder(settings(init=str(path), part="online", arch=None, size=48)).eval()
    view = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    boxes = [torch.tensor([[3., 4, 15, 14], [0, 0, 48, 40]]), torch.tensor([[5., 5, 44, 30]])]
    seen = {}
    online.head.register_forward_hook(lambda module, x, output: seen.setdefault("head", output))
    with torch.no_grad():
        rows = network(view, boxes)
        for k in range(2):
            seen.clear()
            online(common.Photometric()(view[k:k + 1]), boxes[k][None])
            mine = slice(0, 2) if k == 0 else slice(2, 3)
            torch.testing.assert_close(rows["head"][mine], seen["head"], atol=1e-5, rtol=1e-4)
    assert list(rows) == ["c2", "c3", "c4", "c5", "pyramid", "head"] and len({len(x) for x in rows.values()}) == 1


def test_a_checkpoint_without_levels_is_probed_without_them(tmp_path):
    write_soco(tmp_path / "last.pt")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    for none in (False, True):
        torch.save({**state, "settings": {**state["settings"], "no_levels": none}}, tmp_path / "last.pt")
        network = classify.BoxEncoder(settings(init=str(tmp_path / "last.pt"), part="online", arch=None, size=48))
        assert network.encoder.levels is not none


def test_the_object_probes_random_network_is_that_of_the_other_protocols():
    args = settings(init="random", part="online", arch="resnet18w0.25", seed=3)
    common.seed_everything(3)
    other = convert.backbone(args).state_dict()
    common.seed_everything(3)
    ours = classify.BoxEncoder(args).encoder.backbone.state_dict()
    assert all(torch.equal(ours[name], other[name]) for name in other)


def test_random0_is_a_network_whose_residual_blocks_begin_as_the_identity():
    args = settings(init="random0", part="online", arch="resnet18w0.25", seed=3)
    first, again = (convert.backbone(args).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)              # a function of the seed
    assert not any(first[f"layer{k}.{b}.bn2.weight"].any() for k in (1, 2, 3, 4) for b in (0, 1))
    assert first["layer1.0.bn1.weight"].all() and first["layer1.0.conv2.weight"].std() > 0


@pytest.mark.parametrize("size, larger", [(224, 800), (48, 160), (96, 352), (32, 128)])
def test_a_detector_sees_images_as_much_larger_as_800_is_than_224(size, larger):
    assert common.detector_size(size) == larger and larger % 32 == 0


def test_objects_of_annotated_images_and_of_drawn_shapes_fill_a_table(tmp_path, monkeypatch, capsys):
    path, _ = write_soco(tmp_path / "last.pt")
    for part, count in (("train", 60), ("val", 40)):
        write_scenes(tmp_path / part, count, seed=len(part))
    flags = ["--train", *[tmp_path / "train" / x for x in ("images", "annotations.json")],
             "--val", *[tmp_path / "val" / x for x in ("images", "annotations.json")], "--size", 96]
    monkeypatch.setattr(classify, "SHAPES", dict(size=48, unlabeled=64, train=150, val=100))
    for protocol in (flags, []):
        assert run(monkeypatch, "--init", path, "--protocol", "objects", *protocol, "--boxes", 300, "--out",
                   tmp_path / "out") == 0
        title, header, accuracy, precision, rank = capsys.readouterr().out.splitlines()[-5:]
        assert rank.split()[0] == "rank" and all(1 <= int(x) <= 300 for x in rank.split()[1:])
        assert header.split() == ["c2", "c3", "c4", "c5", "pyramid", "head"] and "12 classes" in title
        assert accuracy.split()[0] == "accuracy" and precision.split()[0] == "mAP"
    assert json.loads((tmp_path / "out" / "objects.json").read_text())["c2"]["accuracy"] == pytest.approx(
        float(accuracy.split()[1][:-1]) / 100, abs=1e-3)


# --- tables ---

def test_knn_shows_what_the_monitor_says_of_each_stage(pictures, monkeypatch, capsys):
    assert run(monkeypatch, *TINY, "--data", pictures, "--protocol", "knn") == 0
    header, figures = capsys.readouterr().out.splitlines()[1:]
    pair = [common.ImageFolder(pictures / part) for part in ("train", "val")]
    expected = [f"{common.knn(tiny_backbone(), *pair, 32, CPU, stage=stage):.1%}" for stage in (2, 3, 4, 5)]
    assert header.split() == ["c2", "c3", "c4", "c5"] and figures.split() == ["kNN", *expected]


def test_a_checkpoint_fills_the_backbone(pictures, tmp_path, monkeypatch):
    flags = ["--data", pictures, "--arch", "resnet18w0.25", "--size", 32, "--epochs", 1, "--batch-size", 16, "--queue",
             32]
    assert run_script(moco, monkeypatch, *flags, "--out", tmp_path / "moco") == 0
    init = ["--init", tmp_path / "moco" / "last.pt", "--size", 32, "--batch-size", 16, "--data", pictures]
    assert run(monkeypatch, *init, "--epochs", 1, "--out", tmp_path / "out") == 0
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "moco")
    assert all(torch.equal(x, ours[name.removeprefix("encoder_q.")])
               for name, x in theirs.items() if name.startswith("encoder_q.backbone"))


# --- processes and resuming ---

def everything(folder, out):
    """Features, kNN-free figures and a few steps of both training protocols, in as many processes as there are."""
    import sys
    backbone, args = tiny_backbone(), settings()
    source = common.ImageFolder(Path(folder, "val"))
    x, at = classify.pooled_features(backbone, source, 4, args, CPU)
    logs = []
    for protocol in ("linear", "finetune"):
        sys.argv = [str(v) for v in ("classify.py", *TINY, "--data", folder, "--protocol", protocol, "--epochs", 1,
                                     "--lr", 0.01,
                                     "--print-every", 1, "--out", f"{out}/{protocol}{common.world_size()}")]
        args = classify.arguments()
        common.seed_everything(args.seed)
        classify.train_classifier(args, CPU)
        common.barrier()
        logs.append([(row["step"], row.get("loss", row.get("top1")))
                     for row in rows(f"{out}/{protocol}{common.world_size()}")])
    return x.numpy(), at.tolist(), logs


def test_two_processes_equal_one(pictures, tmp_path):
    x, at, logs = everything(str(pictures), str(tmp_path))
    assert at == list(range(24))
    for other, other_at, other_logs in in_processes(2, everything, str(pictures), str(tmp_path)):
        np.testing.assert_allclose(other, x, atol=1e-5)
        assert other_at == at
        for ours, theirs in zip(logs, other_logs):
            np.testing.assert_allclose([loss for _, loss in theirs], [loss for _, loss in ours], rtol=2e-3, atol=0.03)
    for protocol in ("linear", "finetune"):
        one, two = (weights(tmp_path / f"{protocol}{world}") for world in (1, 2))
        for name, value in one.items():
            if value.is_floating_point():
                torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(pictures, tmp_path, monkeypatch, protocol):
    flags = [*TINY, "--data", pictures, "--protocol", protocol, "--epochs", 2, "--print-every", 1]
    assert run(monkeypatch, *flags, "--out", tmp_path / "whole") == 0
    assert run(monkeypatch, *flags, "--out", tmp_path / "parts", "--max-steps", 4) == 0
    assert run(monkeypatch, *flags, "--out", tmp_path / "parts") == 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    assert without_speed(rows(tmp_path / "whole")) == without_speed(rows(tmp_path / "parts"))
    assert [row["step"] for row in rows(tmp_path / "whole") if "top1" in row] == [3, 6]


# --- bad input ---

def one_class(data):
    write_pictures(data / "train", 1)
    write_pictures(data / "val", 1)
    return []


def strange_class(data):
    write_pictures(data / "train", 3)
    write_pictures(data / "val", 4)
    return []


def no_val(data):
    write_pictures(data / "train", 3)
    return []


def no_train(data):
    write_pictures(data / "val", 3)
    return []


def unsorted(data):
    for part in ("train", "val"):
        (data / part).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(data / part / "1.png")
    return []


def other_arch(data):
    write_pictures(data / "train", 3)
    write_pictures(data / "val", 3)
    torch.save(common.resnet("resnet18").state_dict(), data / "r18.pth")
    return ["--init", data / "r18.pth", "--arch", "resnet50"]


def small(data):
    write_pictures(data / "train", 3)
    write_pictures(data / "val", 3)
    return []


def voc_linear(data):
    write_voc(data)
    return []


def voc_torn(data):
    write_voc(data)
    (data / "ImageSets" / "Main" / "cat_test.txt").write_text("000012 1\n")
    return ["--protocol", "svm"]


def voc_lacks(data):
    write_voc(data)
    (data / "JPEGImages" / "000003.jpg").unlink()
    return ["--protocol", "svm"]


@pytest.mark.parametrize("make, message", [
    (one_class, "one class"), (strange_class, "not among the training classes"), (no_val, "no such folder"),
    (no_train, "no such folder"),
    (unsorted, "folders named by class"), (other_arch, "leave --arch out"), (small, "do not fill a batch"),
    (voc_linear, "take --protocol svm"),
    (voc_torn, "cannot be read as VOC's"), (voc_lacks, "000003.jpg")])
def test_bad_input_ends_with_one_line_and_exit_code_2(tmp_path, monkeypatch, capfd, make, message):
    data = tmp_path / "data"
    data.mkdir()
    flags = make(data)
    assert run(monkeypatch, *TINY, "--data", data, "--out", tmp_path / "out", *flags) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_the_object_probe_refuses_data_that_it_cannot_use(tmp_path, monkeypatch, capfd):
    scenes = write_scenes(tmp_path / "scenes", 4)
    images, path = scenes / "images", scenes / "annotations.json"
    dataset = json.loads(path.read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**dataset, "annotations": []}))
    one = [{**annotation, "category_id": 10} for annotation in dataset["annotations"]]
    (tmp_path / "one.json").write_text(json.dumps({**dataset, "annotations": one,
                                                   "categories": dataset["categories"][:1]}))
    both = ["--train", images, path, "--val", images, path]
    for flags, says in ((["--train", images, path], "go together"),
                        (["--data", images], "takes --train and --val, not --data"),
                        ([*both, "--protocol", "knn", "--data", images], "takes --data, not --train"),
                        (["--train", images, path, "--val", images, tmp_path / "empty.json"], "annotates nothing"),
                        (["--train", images, tmp_path / "one.json", "--val", images, tmp_path / "one.json"],
                         "one class"),
                        ([*both, "--out", path], "cannot write --out")):
        assert run(monkeypatch, "--init", "random", "--arch", "resnet18w0.25", "--protocol", "objects",
                   "--out", tmp_path / "out", *flags) == 2
        error = capfd.readouterr().err
        assert says in error and error.count("\n") == 1
