"""Which method for my images? Pre-trains all five alike on a folder, then probes and fine-tunes each the same way.

    python transfer/compare.py                                         drawn shapes, about an hour on two cores
    python transfer/compare.py --data DIR --train IMAGES JSON --val IMAGES JSON --arch resnet18 --size 128
    python transfer/compare.py --methods moco soco --seeds 1 ...       some of it
    python transfer/compare.py --add soco "--proposals boxes.npz" ...  flags for one of the scripts
    python transfer/compare.py --init ckpt_epoch_400.pth ...           beside weights that exist, ours or the authors'

Every network sees the same images equally often in views of the same size, with the settings that the method's demo
takes for a short run, over several seeds. `random` is the untrained network, `random0` one whose residual blocks begin
as the identity, as SoCo's and DetCon's do; `supervised`, a ceiling, has learned from as many labeled images of --train.
Each is evaluated by classify.py's objects (and by knn, with --knn), and by the AP of detect.py after fine-tuning on
--shares of the labels, in images 800 / 224 as large as pre-training's views, as detectors see them. `gain` is how much
higher the AP is than that of the untrained networks that learned from the same labels.
Writes table.md, chart.png and what the scripts write to --out; the same command again resumes. GPUs work together on
one network, a CPU's cores on a network each.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
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
from transfer import page  # noqa: E402

METHODS = ("moco", "detco", "dupr", "detcon", "soco")
UNTRAINED = ("random", "random0")  # what --seed draws is the network itself
OWN = ("arch", "size", "epochs", "batch_size", "print_every", "proposals", "masks")  # no demo decides these
SHORT = {**dict.fromkeys(("moco", "detco", "dupr"), dict(lr=1.0, bn_splits=2)),      # some hundred steps of 64 images
         "soco": dict(lr=8.0, warmup=1, num_proposals=3)}
SHAPES = dict(unlabeled=4096, train=800, val=400, knn_train=1536, knn_val=768)       # drawn pictures


# --- Data ------------------------------------------------------------------------------------------------------------

def draw_shapes(folder, size):
    """Write drawn shapes as if they were a user's data: unlabeled/ with boxes.npz and masks/, train/ and val/ with
    COCO's annotations, and knn/train/ and knn/val/ with a folder for each class."""
    for part, seed in (("unlabeled", 0), ("train", 1), ("val", 2)):
        shapes = common.Shapes(SHAPES[part], size, seed).draw_all()
        categories = [{"id": k, "name": name} for k, name in enumerate(common.SHAPE_CLASSES)]
        dataset = {"images": [], "annotations": [], "categories": categories}
        for kind in (part, "masks") if part == "unlabeled" else (part,):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for i in range(len(shapes)):
            name = f"{i:05d}.png"
            Image.fromarray(shapes.pictures[i]).save(folder / part / name)
            if part == "unlabeled":
                Image.fromarray(shapes.segments[i]).save(folder / "masks" / name)
            dataset["images"].append({"id": i, "file_name": name, "width": size, "height": size})
            for (x1, y1, x2, y2), k in zip(shapes.boxes[i].tolist(), shapes.classes[i].tolist()):
                dataset["annotations"].append({
                    "id": len(dataset["annotations"]) + 1, "image_id": i, "category_id": k, "iscrowd": 0,
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        if part == "unlabeled":
            soco.save_proposals(folder / "boxes.npz", common.ImageFolder(folder / part), shapes.boxes)
        (folder / f"{part}.json").write_text(json.dumps(dataset))
    for part, seed in (("train", 3), ("val", 4)):
        single = common.Shapes(SHAPES[f"knn_{part}"], size, seed, single=True)
        for i in range(len(single)):
            path = folder / "knn" / part / list(common.SHAPE_CLASSES)[i % len(common.SHAPE_CLASSES)] / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(single.scene(i)[0]).save(path)


def share_labels(path, shares, draws, folder):
    """{(share, draw): (COCO's annotations of that share of the annotated images, how many those are)}, and of all."""
    dataset = json.loads(Path(path).read_text())
    shown = sorted({annotation["image_id"] for annotation in dataset["annotations"]})
    labels = {(1, draw): (path, len(shown)) for draw in range(draws)}
    for share, draw in product(set(shares) - {1}, range(draws)):
        kept = set(np.random.default_rng(draw).permutation(shown)[:max(1, round(share * len(shown)))].tolist())
        part = {**dataset, "images": [image for image in dataset["images"] if image["id"] in kept],
                "annotations": [annotation for annotation in dataset["annotations"] if annotation["image_id"] in kept]}
        file = folder / f"labels-{share:g}-{draw}.json"
        file.write_text(json.dumps(part))
        labels[share, draw] = file, len(kept)
    return labels


# --- What there is to do ---------------------------------------------------------------------------------------------

def script(name, *flags, several=True):
    """The command of a script of ours, on all GPUs if it can use them."""
    gpus = torch.cuda.device_count() if several else 1
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    return [sys.executable, *start, str(Path(__file__).resolve().parents[1] / name), *map(str, flags)]


def draws(args, seed, share):
    """Which draws of a share of the labels a network's detectors learn from: --draws of them, or all labels once."""
    return [(seed + k) % max(args.seeds, args.draws) for k in range(args.draws if share < 1 else 1)]


def tasks(args, method, seed):
    """[(kind, command, the file that it leaves)] for one network, in order."""
    out, size = args.out / f"{method}-{seed}", args.size
    large = common.detector_size(size)
    source, checkpoint = ["--train", *args.train, "--val", *args.val], ["--init", out / "last.pt"]
    amp = ["--amp", args.amp] if args.amp else []
    shared = [*amp, "--arch", args.arch, "--save-every", 100, "--seed", seed, "--out", out, "--batch-size"]
    todo = []
    if method == "supervised":
        images = args.labels[1, seed][1]
        epochs, shared = max(1, round(args.epochs * args.images / images)), [*shared, min(args.batch_size, images)]
        ceiling = ["--init", "random", "--protocol", "supervised", "--epochs", epochs, "--size", large, *source]
        todo.append(("supervised", script("transfer/classify.py", *ceiling, *shared), out / "supervised.json"))
    elif method in UNTRAINED:
        checkpoint = ["--init", method, "--arch", args.arch]
    elif method in args.files:
        checkpoint = ["--init", args.files[method]]
    else:
        demo = {name: x for name, x in import_module(method).DEMO.items() if name not in OWN} | SHORT.get(method, {})
        demo = [word for name, x in demo.items() for word in (f"--{name.replace('_', '-')}", x)]
        added = [word for name, words in args.add if name == method for word in shlex.split(words)]
        command = script(f"{method}.py", "--data", args.data, "--epochs", args.epochs, "--size", size, *demo, *shared,
                         args.batch_size, *added)
        todo.append(("pre-training", command, out / "last.pt"))
    probe = [*checkpoint, *amp, "--seed", seed, "--out", out, "--protocol"]
    if method != "supervised":
        command = script("transfer/classify.py", *probe, "objects", "--size", large, *source, several=False)
        todo.append(("objects", command, out / "objects.json"))
    if args.knn:
        command = script("transfer/classify.py", *probe, "knn", "--size", size, "--data", args.knn)
        todo.append(("kNN", command, out / "knn.json"))
    for share in args.shares if args.steps else ():
        for draw in draws(args, seed, share):
            labels, images = args.labels[share, draw]
            batch = min(8, images)
            in_epoch, folder = images // batch, out / f"AP-{share:g}-{draw}"
            command = script("transfer/detect.py", *checkpoint, *amp, "--train", args.train[0], labels,
                             "--val", *args.val, "--seed", seed if method in UNTRAINED else draw,
                             "--size", large, large, "--rois", 32, "--batch-size", batch, "--lr", 0.08,
                             "--warmup", 20 / in_epoch, "--epochs", max(1, round(args.steps / in_epoch)),
                             "--save-every", 100, "--out", folder)
            todo.append((f"AP, {100 * share:g}% of labels", command, folder / "log.jsonl"))
    return todo


class Progress:
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
            rest = sum(np.mean(self.took.get(kind, every)) for kind in self.left) / self.jobs
            print(f"{self.total - len(self.left)} of {self.total}: {name}, {kind}: {seconds:.0f} s; "
                  f"{common.clock(rest)} left", flush=True)


def work(args, method, seed, progress):
    """Do all tasks of one network. If one fails, returns a message with the last line that it printed, else None."""
    out = args.out / f"{method}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    alone = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    for kind, command, result in tasks(args, method, seed):
        mark, start = result.with_suffix(".done"), time.perf_counter()
        if mark.exists():
            progress.done(out.name, kind)
            continue
        with open(out / "output.txt", "a") as file:
            print(f"\n$ {shlex.join(command)}", file=file, flush=True)
            code = subprocess.run(command, stdout=file, stderr=file, env={**os.environ, **alone}).returncode
        if code:
            said = (out / "output.txt").read_text().strip().splitlines()[-1]
            return f"{out.name}, {kind} ended with exit code {code}: {said[:200]} (more of it in {out}/output.txt)"
        mark.touch()
        progress.done(out.name, kind, time.perf_counter() - start)
    return None


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
            found["minutes"] = args.epochs * args.images / np.mean(speeds) / 60
    return found


def average_precisions(args, method, share):
    """[(draw, AP)] of the detectors that began with a method's networks and learned from a draw of the labels."""
    found = []
    for seed in range(args.seeds):
        for draw in draws(args, seed, share):
            path = args.out / f"{method}-{seed}" / f"AP-{share:g}-{draw}" / "log.jsonl"
            aps = [row["AP"] for row in common.read_log(path) if "AP" in row] if path.exists() else []
            found += [(draw, aps[-1])] if aps else []
    return found


def gains(found):
    """{method: (mean, standard error)}: how much higher its APs are than those of the untrained networks.

    found: {method: [(draw, AP)]}. APs are compared on the same draw of the labels, since draws differ as methods do.
    """
    untrained = defaultdict(list)
    for draw, ap in (pair for method in UNTRAINED for pair in found[method]):
        untrained[draw].append(ap)
    above = {method: [ap - np.mean(untrained[draw]) for draw, ap in pairs] for method, pairs in found.items()}
    variance = lambda values: spread(values)[1] ** 2 / len(values)
    base = variance([x for method in UNTRAINED for x in above[method]])
    return {method: (np.mean(x), (variance(x) + base) ** 0.5 if len(x) > 1 else 0.0)
            for method, x in above.items() if method not in UNTRAINED}


def spread(values):
    """(mean, standard deviation) of a list."""
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0


def report(args, methods):
    """Write table.md and chart.png, and return the table."""
    rows = {}
    for method in methods:
        seeds = [figures(args, method, seed) for seed in range(args.seeds)]
        columns = dict.fromkeys(name for row in seeds for name in row)
        rows[method] = {name: spread([row[name] for row in seeds if name in row]) for name in columns}
    columns = ["c2", "c3", "c4", "c5", "pyramid", "head", "kNN"]
    for share in args.shares if args.steps else ():
        ap, gain = f"AP {100 * share:g}%", f"gain {100 * share:g}%"
        columns += [ap, gain]
        found = {method: average_precisions(args, method, share) for method in methods}
        for method, pairs in found.items():
            rows[method][ap] = spread([x for _, x in pairs])
        for method, x in gains(found).items():
            rows[method][gain] = x
    columns = [name for name in (*columns, "minutes") if any(name in row for row in rows.values())]
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for method, row in rows.items():
        cells = [" ± ".join(f"{x:.1f}" for x in row[name] if x) if name in row else "" for name in columns]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    (args.out / "table.md").write_text(table + "\n")
    titles = {f"c{k}": f"objects recognized from c{k}, in %" for k in (2, 3, 4, 5)}
    titles |= {"kNN": "nearest neighbors' accuracy, in %",
               **{f"AP {100 * x:g}%": f"AP with {100 * x:g}% of the labels" for x in args.shares}}
    panels = []
    for name, title in titles.items():
        bars = {method: row[name] for method, row in rows.items() if name in row}
        if bars:
            panels.append(page.bars(title, bars, list(rows)))
    if panels:
        lines = [page.arrange(panels[k:k + 3]) for k in range(0, len(panels), 3)]
        page.arrange(lines, down=True).save(args.out / "chart.png")
    return table


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
    add("--arch", default="resnet18w0.25", help="of all (default: resnet18w0.25)")
    add("--size", type=common.bounded(int, 32), default=48,
        help="side of a view in pixels (default: 48); probes and detectors get images 800 / 224 times as large")
    add("--epochs", type=count, default=8, help="passes over --data (default: 8)")
    add("--batch-size", type=common.bounded(int, 8), default=64, help="images a step of pre-training (default: 64)")
    add("--steps", type=common.bounded(int, 0), default=400,
        help="of fine-tuning a detector, 8 images each (default: 400; 0: no detectors)")
    add("--shares", type=common.bounded(float, 0, 1), nargs="+", default=[0.1, 1],
        help="of the labels, to fine-tune a detector on (default: 0.1 1)")
    add("--amp", choices=["bf16", "off"], help="mixed precision (default: as the scripts'; a CPU with AMX is faster)")
    add("--jobs", type=count, help="networks at a time (default: 1 with GPUs, else the number of cores)")
    add("--add", nargs=2, action="append", default=[], metavar=("METHOD", "FLAGS"),
        help="more flags for a method's script")
    args = parser.parse_args()
    given = [bool(x) for x in (args.data, args.train, args.val)]
    if any(given) and not all(given):
        common.fail("--data, --train and --val go together: images to pre-train on, labeled ones to learn from and to "
                    "evaluate on")
    for path in args.init:
        if not path.is_file():
            common.fail(f"--init {path}: no such file")
    args.files = {"-".join(path.absolute().with_suffix("").parts[-2:]): path for path in args.init}
    args.jobs = args.jobs or (1 if torch.cuda.is_available() else common.cores())
    return args


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.data:
        folder = args.out / "shapes"
        if not (folder / "drawn").exists():
            draw_shapes(folder, args.size)
            (folder / "drawn").touch()
        args.data, args.knn = str(folder / "unlabeled"), str(folder / "knn")
        args.train, args.val = ([str(folder / part), str(folder / f"{part}.json")] for part in ("train", "val"))
        args.add += [("soco", f"--proposals {folder}/boxes.npz"), ("detcon", f"--masks {folder}/masks")]
    args.images = len(common.ImageFolder(args.data))
    args.labels = share_labels(args.train[1], args.shares, max(args.seeds, args.draws), args.out)
    methods = ["random", "random0", *args.methods, *args.files, "supervised"]
    networks = [(method, seed) for seed in range(args.seeds) for method in methods]
    networks = [(method, seed) for method, seed in networks if method != "supervised" or not seed]  # one is enough
    progress = Progress([kind for network in networks for kind, _, _ in tasks(args, *network)], args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        for error in pool.map(lambda network: work(args, *network, progress), networks):
            if error:
                pool.shutdown(cancel_futures=True)
                common.fail(error)
    print(report(args, methods))
    print(f"{args.epochs * args.images} images seen by each, {args.seeds} seeds (mean ± standard deviation; gain "
          f"over untrained networks on the same labels ± standard error); {args.out}/chart.png")


if __name__ == "__main__":
    main()
