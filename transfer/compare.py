"""Which method for my images? Pre-trains all five alike on a folder, then probes and fine-tunes each the same way.

    python transfer/compare.py                                         drawn shapes, about an hour on two cores
    python transfer/compare.py --data DIR --train IMAGES JSON --val IMAGES JSON --arch resnet18 --size 128
    python transfer/compare.py --methods moco soco --seeds 1 ...       only a part of it
    python transfer/compare.py --add soco "--proposals boxes.npz" ...  flags for one of the scripts
    python transfer/compare.py --init ckpt_epoch_400.pth ...           beside weights that exist, ours or the authors'

Every network sees the same images equally often in views of the same size, with the settings that the method's demo
takes for a short run, except for those in SHORT. `random` is an untrained network, `random0` one whose
residual blocks begin as the identity, as SoCo's and DetCon's do. `supervised`, a ceiling, is trained on the labels of
--train and sees as many images. Each is evaluated by classify.py's objects (and by knn, with --knn), and by the AP of
detectors that detect.py trains on --shares of the labels, with a backbone that is tuned and with one that is frozen.
Images for the probe and the detectors are about 800 / 224 times as large as the views, as in the papers. `gain` is
the AP minus that of detectors with untrained networks and the same labels.

Writes table.md, chart.png and the scripts' own files to --out; the same command again resumes. GPUs work together on
one network; a CPU's cores work on a network each.
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from importlib import import_module
from itertools import product
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import soco  # noqa: E402
from transfer import classify, coco, convert, page  # noqa: E402

METHODS = ("moco", "detco", "dupr", "detcon", "soco")
UNUSED = ("arch", "size", "epochs", "batch_size", "print_every", "proposals", "masks")  # of DEMO
SHORT = {**dict.fromkeys(("moco", "detco", "dupr"), dict(lr=1.0, bn_splits=2)),  # tuned on seed 0 of the drawn shapes
         "soco": dict(lr=64.0)}  # SoCo-C4 at the demo's rate, 2.0 in a step
SHAPES = dict(unlabeled=4096, train=800, val=400, knn_train=1536, knn_val=768)       # drawn pictures


# --- Data ------------------------------------------------------------------------------------------------------------

def draw_shapes(folder, size):
    """Write drawn shapes as if they were a user's data.

    unlabeled/, with the proposals in boxes.npz and the masks in masks/; train/ and val/, with COCO's annotations in
    train.json and val.json; knn/train/ and knn/val/, with a folder for each class.
    """
    shapes = common.Shapes(SHAPES["unlabeled"], size, 0).draw_all()
    for part in ("unlabeled", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i in range(len(shapes)):
        Image.fromarray(shapes.pictures[i]).save(folder / "unlabeled" / f"{i:05d}.png")
        Image.fromarray(shapes.segments[i]).save(folder / "masks" / f"{i:05d}.png")
    soco.save_proposals(folder / "boxes.npz", common.ImageFolder(folder / "unlabeled"), shapes.boxes)
    categories = [{"id": k, "name": name} for k, name in enumerate(common.SHAPE_CLASSES)]
    for part, seed in (("train", 1), ("val", 2)):
        shapes = common.Shapes(SHAPES[part], size, seed).draw_all()
        dataset = {"images": [], "annotations": [], "categories": categories}
        (folder / part).mkdir(exist_ok=True)
        for i in range(len(shapes)):
            name = f"{i:05d}.png"
            Image.fromarray(shapes.pictures[i]).save(folder / part / name)
            dataset["images"].append({"id": i, "file_name": name, "width": size, "height": size})
            for (x1, y1, x2, y2), k in zip(shapes.boxes[i].tolist(), shapes.classes[i].tolist()):
                dataset["annotations"].append({
                    "id": len(dataset["annotations"]) + 1, "image_id": i, "category_id": k, "iscrowd": 0,
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        (folder / f"{part}.json").write_text(json.dumps(dataset))
    for part, seed in (("train", 3), ("val", 4)):
        single = common.Shapes(SHAPES[f"knn_{part}"], size, seed, single=True)
        for i in range(len(single)):
            path = folder / "knn" / part / list(common.SHAPE_CLASSES)[i % len(common.SHAPE_CLASSES)] / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(single.scene(i)[0]).save(path)


def fewest_images():
    """The least number of images that a detector can learn from: two, and one for each GPU."""
    return max(2, torch.cuda.device_count())


def open_annotated(args):
    """The annotated training images. Exits with 2 if these or those of --val are of no use."""
    train, val = (coco.CocoFolder(*source, training=True) for source in (args.train, args.val))
    coco.check_classes(train, val, (args.train[1], args.val[1]))
    if len(train) < fewest_images():
        common.fail(f"{args.train[1]} has objects in {len(train)} images: take {fewest_images()} or more")
    return train


def share_labels(path, shown, shares, draws, folder):
    """{(share, draw): (JSON file, number of images)} of `draws` draws of each share of the images with annotations.

    path: the JSON file of all annotations, which is share 1; shown: the ids of its images that show objects.
    """
    dataset = json.loads(Path(path).read_text())
    labels = {(1, draw): (path, len(shown)) for draw in range(draws)}
    for share, draw in product(set(shares) - {1}, range(draws)):
        count = max(fewest_images(), round(share * len(shown)))
        kept = set(np.random.default_rng(draw).permutation(sorted(shown))[:count].tolist())
        part = {**dataset, "images": [image for image in dataset["images"] if image["id"] in kept],
                "annotations": [annotation for annotation in dataset["annotations"] if annotation["image_id"] in kept]}
        file = folder / f"labels-{share:g}-{draw}.json"
        file.write_text(json.dumps(part))
        labels[share, draw] = file, len(kept)
    return labels


# --- What there is to do ---------------------------------------------------------------------------------------------

def command_of(name, flags):
    """The command of a script of ours, on all GPUs."""
    gpus = torch.cuda.device_count()
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    return [sys.executable, *start, str(Path(__file__).resolve().parents[1] / name), *flags]


def even_batch(size, images):
    """The largest batch size up to `size`, and up to the number of images, that divides over the GPUs."""
    gpus = max(1, torch.cuda.device_count())
    return max(1, min(size, images) // gpus) * gpus


def label_draws(args, seed, share):
    """Which draws of a share of the labels a network's detectors learn from: --draws of them, or all labels once."""
    return [(seed + k) % max(args.seeds, args.draws) for k in range(args.draws if share < 1 else 1)]


def tasks(args, method, seed):
    """[(kind, script, flags, the file that it leaves)] for one network, in order."""
    out, large, todo = args.out / f"{method}-{seed}", common.detector_size(args.size), []
    amp = ["--amp", args.amp] if args.amp else []
    network = [*amp, "--arch", args.arch, "--save-every", 100, "--seed", seed, "--out", out]
    annotated = ["--train", *args.train, "--val", *args.val, "--size", large]
    start = ["--init", out / "last.pt"]
    if method == "supervised":
        images = args.labels[1, seed][1]
        epochs = max(1, round(args.epochs * args.images / images))
        flags = ["--init", "random", "--protocol", "supervised", "--epochs", epochs,
                 "--batch-size", even_batch(16, images)]
        todo.append(("supervised", "transfer/classify.py", [*flags, *annotated, *network], out / "supervised.json"))
    elif method in convert.UNTRAINED:
        start = ["--init", method, "--arch", args.arch]
    elif method in args.files:
        start = ["--init", args.files[method]]
    else:
        demo = {name: x for name, x in import_module(method).DEMO.items() if name not in UNUSED} | SHORT.get(method, {})
        words = [word for name, x in demo.items() for word in (f"--{name.replace('_', '-')}", x)]
        added = [word for name, flags in args.add if name == method for word in shlex.split(flags)]
        flags = ["--data", args.data, "--epochs", args.epochs, "--size", args.size, "--batch-size", args.batch_size]
        todo.append(("pre-training", f"{method}.py", [*flags, *words, *network, *added], out / "last.pt"))
    probe = [*start, *amp, "--seed", seed, "--out", out]
    if args.several_classes and method != "supervised":
        flags = [*probe, "--protocol", "objects", *annotated]
        todo.append(("objects", "transfer/classify.py", flags, out / "objects.json"))
    if args.knn:
        flags = [*probe, "--protocol", "knn", "--data", args.knn, "--size", args.size]
        todo.append(("kNN", "transfer/classify.py", flags, out / "knn.json"))
    for backbone, share in product(args.backbones, args.shares) if args.steps else ():
        for draw in label_draws(args, seed, share):
            labels, images = args.labels[share, draw]
            folder, batch = out / f"{backbone}-{share:g}-{draw}", even_batch(8, images)
            in_epoch = images // batch
            own = seed if method in convert.UNTRAINED else draw                       # --seed draws the network too
            flags = [*start, *amp, "--train", args.train[0], labels, "--val", *args.val, "--size", large, large,
                     "--rois", 32,                                                    # few: the images are small
                     "--batch-size", batch, "--lr", 0.08, "--warmup", 20 / in_epoch,  # 0.04 at 8 images, after 20 steps
                     "--epochs", max(1, round(args.steps / in_epoch)), "--seed", own, "--save-every", 100,
                     *["--freeze"] * (backbone == "frozen"), "--out", folder]
            todo.append((f"{backbone}, {100 * share:g}% of labels", "transfer/detect.py", flags, folder / "log.jsonl"))
    return [(kind, script, list(map(str, flags)), result) for kind, script, flags, result in todo]


class TimeLeft:
    """Prints what is done, and the time left by how long tasks of the same kind have taken."""

    def __init__(self, kinds, jobs):
        self.left, self.total, self.jobs, self.took, self.lock = list(kinds), len(kinds), jobs, {}, Lock()

    def done(self, name, kind, seconds=None):
        with self.lock:
            self.left.remove(kind)
            if seconds is None:  # in an earlier run
                return
            self.took.setdefault(kind, []).append(seconds)
            every = [x for times in self.took.values() for x in times]
            rest = sum(np.mean(self.took.get(other, every)) for other in self.left) / self.jobs
            print(f"{self.total - len(self.left)} of {self.total}: {name}, {kind}: {seconds:.0f} s; "
                  f"{common.clock(rest)} left", flush=True)


def work(args, method, seed, time_left, running):
    """Do all tasks of one network that have not been done. Returns an error message if one fails, else None.

    running: the set of running processes of all networks; this adds each of its own, and removes it when it ends.
    """
    out = args.out / f"{method}-{seed}"
    out.mkdir(exist_ok=True)
    environment = os.environ if torch.cuda.is_available() else {**os.environ, "OMP_NUM_THREADS": "1"}
    for kind, script, flags, result in tasks(args, method, seed):
        mark, command, start = result.with_suffix(".done"), shlex.join([script, *flags]), time.perf_counter()
        if mark.exists() and mark.read_text() == command:
            time_left.done(out.name, kind)
            continue
        with open(out / "output.txt", "a") as file:
            print(f"\n$ {command}", file=file, flush=True)
            process = subprocess.Popen(command_of(script, flags), stdout=file, stderr=file, env=environment)
            running.add(process)
            code = process.wait()
            running.remove(process)
        if code:
            lines = (out / "output.txt").read_text().strip().splitlines()
            last = next((line for line in reversed(lines) if "error: " in line), lines[-1])  # torchrun adds lines
            return f"{out.name}, {kind} ended with exit code {code}: {last[:200]} (more of it in {out}/output.txt)"
        mark.write_text(command)
        time_left.done(out.name, kind, time.perf_counter() - start)
    return None


def work_on(args, networks):
    """Do all tasks of the networks, several at a time. If one fails or a signal comes, stops the others and exits."""
    kinds = [kind for network in networks for kind, *_ in tasks(args, *network)]
    time_left, running, terminated, error = TimeLeft(kinds, args.jobs), set(), set(), None
    common.stop.holding = True  # a signal is noted, and passed on below
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = pending = {pool.submit(work, args, *network, time_left, running) for network in networks}
        while pending and not error and not common.stop.signal:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            failures = [future.exception() or future.result() for future in done]
            error = next(filter(None, failures), None)
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):
            for process in running - terminated:
                process.terminate()  # it saves what it has
                terminated.add(process)
            time.sleep(0.1)
    common.stop.holding = False
    if common.stop.signal:
        print(f"stopped by {signal.Signals(common.stop.signal).name}: run the same command again to resume")
        sys.exit(128 + common.stop.signal)
    if error:
        common.fail(error)


# --- What came of it -------------------------------------------------------------------------------------------------

def figures(args, method, seed):
    """{column: figure} of one network: what the scripts left in its folder."""
    out = args.out / f"{method}-{seed}"
    found = {}
    for file in ("objects", "supervised"):
        if (out / f"{file}.json").exists():
            parts = json.loads((out / f"{file}.json").read_text())
            found |= {part: 100 * x["accuracy"] for part, x in parts.items() if part != "title"}
    if (out / "knn.json").exists():
        stages = json.loads((out / "knn.json").read_text())
        found["kNN"] = 100 * max(x["kNN"] for stage, x in stages.items() if stage != "title")
    if (out / "log.jsonl").exists():
        speeds = [row["images_per_s"] for row in common.read_log(out / "log.jsonl") if "images_per_s" in row]
        if speeds:
            found["minutes"] = args.epochs * args.images * np.mean(1 / np.array(speeds)) / 60
    return found


def average_precisions(args, method, backbone, share):
    """[(draw, AP)] of a method's detectors, with tuned or frozen backbones, that learned from a share of the labels."""
    found = []
    for seed in range(args.seeds):
        for draw in label_draws(args, seed, share):
            path = args.out / f"{method}-{seed}" / f"{backbone}-{share:g}-{draw}" / "log.jsonl"
            aps = [row["AP"] for row in common.read_log(path) if "AP" in row] if path.exists() else []
            found += [(draw, aps[-1])] if aps else []
    return found


def gains(found):
    """{method: (mean, standard error)}: how much higher its APs are than those of the untrained networks.

    found: {method: [(draw, AP)]}. APs are compared on the same draw of the labels, since draws differ as much as
    methods do. The error is approximate: it takes all detectors for independent, though some share a network.
    """
    untrained = defaultdict(list)
    for draw, ap in (pair for method in convert.UNTRAINED for pair in found[method]):
        untrained[draw].append(ap)
    above = {method: [ap - np.mean(untrained[draw]) for draw, ap in pairs] for method, pairs in found.items()}
    variance = lambda values: np.var(values, ddof=1) / len(values)
    base = variance([x for method in convert.UNTRAINED for x in above[method]])
    return {method: (np.mean(x), (variance(x) + base) ** 0.5 if len(x) > 1 else None)
            for method, x in above.items() if method not in convert.UNTRAINED}


def summarize(values):
    """(mean, standard deviation) of a list; the latter is None for one value."""
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else None


def tabulate(args, methods):
    """{method: {column: (mean, spread or None)}}, and the names of the columns in order."""
    rows = {}
    for method in methods:
        seeds = [figures(args, method, seed) for seed in range(args.seeds)]
        names = dict.fromkeys(name for row in seeds for name in row)
        rows[method] = {name: summarize([row[name] for row in seeds if name in row]) for name in names}
    columns = ["c2", "c3", "c4", "c5", "pyramid", "head", "kNN"]
    for backbone, share in product(args.backbones, args.shares) if args.steps else ():
        ap, gain = (f"{backbone} {what} {100 * share:g}%" for what in ("AP", "gain"))
        columns += [ap, gain]
        found = {method: average_precisions(args, method, backbone, share) for method in methods}
        for method, pairs in found.items():
            rows[method][ap] = summarize([x for _, x in pairs])
        for method, x in gains(found).items():
            rows[method][gain] = x
    return rows, [name for name in (*columns, "minutes") if any(name in row for row in rows.values())]


def report(args, methods):
    """Write table.md and chart.png, and return the table."""
    rows, columns = tabulate(args, methods)
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for method, row in rows.items():
        cells = [" ± ".join(f"{x:.1f}" for x in row.get(name, ()) if x is not None) for name in columns]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    titles = {f"c{k}": f"objects recognized from c{k}, in %" for k in (3, 4, 5)}  # random filters do well in c2
    titles["kNN"] = "nearest neighbors' accuracy, in %"
    titles |= {f"{backbone} AP {100 * x:g}%": f"AP, {backbone} backbone, {100 * x:g}% of the labels"
               for backbone, x in product(args.backbones, args.shares)}
    panels = []
    for name, title in titles.items():
        bars = {method: (row[name][0], row[name][1] or 0.0) for method, row in rows.items() if name in row}
        if bars:
            panels.append(page.bars(title, bars, list(rows)))
    if panels:
        page.arrange([page.arrange(panels[k:k + 3]) for k in range(0, len(panels), 3)],
                     down=True).save(args.out / "chart.png")
    return "\n".join(lines)


# --- Command line ----------------------------------------------------------------------------------------------------

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: common.fail(f"{message} (see --help)")
    add, count = parser.add_argument, common.bounded(int, 1)
    add("--data", metavar="DIR", help="images to pre-train on (default: drawn shapes)")
    add("--train", nargs=2, metavar=("IMAGES", "JSON"),
        help="folder, and COCO annotations of images below it, to learn from")
    add("--val", nargs=2, metavar=("IMAGES", "JSON"), help="likewise, to evaluate on")
    add("--knn", metavar="DIR", help="labeled train/, val/ for nearest neighbors (default: no; drawn shapes: yes)")
    add("--out", type=Path, default=Path("runs/compare"), help="where all of it goes (default: runs/compare)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which of the five (default: all)")
    add("--init", nargs="+", type=Path, default=[], metavar="FILE",
        help="weights to evaluate beside them, ours or the authors' (as classify.py's --init)")
    add("--seeds", type=count, default=2, help="networks of each method (default: 2)")
    add("--draws", type=count, default=1,
        help="how many random draws of each share of the labels a network's detectors learn from (default: 1, a "
             "different one for each seed)")
    add("--arch", default="resnet18w0.25", help="backbone of every network (default: resnet18w0.25)")
    add("--size", type=common.bounded(int, 32), default=48,
        help="side of a view in pixels (default: 48); probes and detectors get images about 800 / 224 times as large")
    add("--epochs", type=count, default=8, help="passes over --data (default: 8)")
    add("--batch-size", type=common.bounded(int, 8), default=64, help="images a step of pre-training (default: 64)")
    add("--steps", type=common.bounded(int, 0), default=300,
        help="steps of a detector's training, 8 images each, rounded to whole epochs (default: 300; 0: no detectors)")
    add("--backbones", nargs="+", choices=["tuned", "frozen"], default=["tuned", "frozen"],
        help="whether a detector trains the backbone too, or takes it as it is, as in DetCon Sec. 4.3 (default: both)")
    add("--shares", type=common.bounded(float, 1e-6, 1), nargs="+", default=[0.1],
        help="shares of the labels for a detector to learn from (default: 0.1; for example 0.1 1)")
    add("--amp", choices=["bf16", "off"],
        help="mixed precision (default: the scripts' own); bf16 is faster on a CPU with AMX")
    add("--jobs", type=count, help="networks at a time (default: 1 with GPUs, else the number of cores)")
    add("--add", nargs=2, action="append", default=[], metavar=("METHOD", "FLAGS"),
        help="more flags for a method's script")
    args = parser.parse_args()
    if len({x is None for x in (args.data, args.train, args.val)}) > 1 or args.knn and args.data is None:
        common.fail("--data, --train and --val go together, and --knn with them: images to pre-train on, labeled ones "
                    "to learn from and to evaluate on")
    for name in ("methods", "shares", "backbones"):  # each once
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    args.files = {"-".join(path.absolute().with_suffix("").parts[1:][-2:]): path for path in args.init}
    if {*args.files} & {*METHODS, *convert.UNTRAINED, "supervised"}:
        common.fail(f"--init {' '.join(map(str, args.init))}: rename the file that is named like a method")
    if len(args.files) < len(args.init):
        common.fail("two files of --init have the same name in folders of the same name: rename one")
    for path in args.init:
        if not path.is_file():
            common.fail(f"--init {path}: no such file")
    for name, flags in args.add:
        if name not in args.methods:
            common.fail(f"--add {name}: take one of {', '.join(args.methods)}")
        try:
            shlex.split(flags)
        except ValueError as error:
            common.fail(f"--add {name} {flags}: {error}")
    if args.batch_size % max(1, torch.cuda.device_count()):
        common.fail(f"--batch-size {args.batch_size} does not divide over {torch.cuda.device_count()} GPUs")
    if args.steps:
        coco.need_pycocotools("take --steps 0")
    args.jobs = args.jobs or (1 if torch.cuda.is_available() else common.cores())
    return args


def main():
    common.stop.listen()
    args = arguments()
    common.lock(args.out, "--out ")
    if args.data is None:
        folder = args.out / f"shapes-{args.size}"
        if not (folder / "drawn").exists():
            draw_shapes(folder, args.size)
            (folder / "drawn").touch()
        args.data, args.knn = str(folder / "unlabeled"), str(folder / "knn")
        args.train, args.val = ([str(folder / part), str(folder / f"{part}.json")] for part in ("train", "val"))
        known = {"soco": ["--proposals", str(folder / "boxes.npz")], "detcon": ["--masks", str(folder / "masks")]}
        args.add = [*((name, shlex.join(flags)) for name, flags in known.items()), *args.add]
    if args.knn:  # a wrong folder is an error now, not after pre-training
        classify.open_labeled(argparse.Namespace(data=args.knn, protocol="knn"))
    annotated = open_annotated(args)
    args.several_classes, args.images = len(annotated.classes) > 1, len(common.open_folder(args.data))
    args.labels = share_labels(args.train[1], annotated.ids, args.shares, max(args.seeds, args.draws), args.out)
    methods = [*convert.UNTRAINED, *args.methods, *args.files, *["supervised"] * args.several_classes]
    networks = [(method, seed) for seed in range(args.seeds) for method in reversed(methods)]  # the longest first
    work_on(args, [(method, seed) for method, seed in networks if method != "supervised" or not seed])  # one is enough
    print(report(args, methods))
    print(f"each method saw {args.epochs * args.images} images with each of {args.seeds} seeds (mean ± standard "
          f"deviation; gain: ± standard error); {args.out}/chart.png")


if __name__ == "__main__":
    main()
