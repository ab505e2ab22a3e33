"""Evaluates a frozen network's features (object probe, linear probe, SVMs, nearest neighbors), or fine-tunes it.

    python transfer/classify.py --init runs/soco/last.pt --protocol objects --train IMAGES JSON --val IMAGES JSON
    python transfer/classify.py --init runs/soco/last.pt --protocol objects                   the same on drawn shapes
    python transfer/classify.py --init random --arch resnet18 --protocol supervised     the ceiling: trained on labels
    python transfer/classify.py --init runs/moco/last.pt --data /imagenet                 linear probe (MoCo Sec. 4.1)
    python transfer/classify.py --init random --data DIR --protocol knn                    nearest neighbors on c2 to c5
    python transfer/classify.py --init runs/detco/last.pt --data VOC2007 --protocol svm      DetCo Table 2, DUPR Table 6
    python transfer/classify.py --init resnet50.pth --data DIR --protocol finetune            end to end (MoCo A.6, A.7)
    torchrun --nproc_per_node=8 transfer/classify.py ...                                      the same, sooner

The object probe asks what a detector asks: which class is the object in a box? It classifies about --boxes annotated
boxes by the features of each stage; for SoCo with FPN, also by those of the pyramid and the box head.

DIR has train/ and val/ with a folder for each class; svm also reads VOC2007 as it is. objects, supervised, knn and svm
print a table and write it to --out. linear, finetune and supervised write last.pt and log.jsonl there; the same command
again resumes.
"""
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import soco  # noqa: E402
from transfer import coco, convert, svm  # noqa: E402

DEFAULTS = dict(  # the linear probe of MoCo Sec. 4.1; lr is for 256 images a step
    protocol="linear", size=224, stage=5, epochs=100, batch_size=256, lr=30.0, weight_decay=0.0, drops=[0.6, 0.8],
    print_every=50, boxes=5000)
FINETUNE = dict(weight_decay=1e-4, drops=[0.7, 0.9])  # drops: MoCo A.6; the weight decay is the usual one
BOX_PROTOCOLS = ("objects", "supervised")
SHAPES = dict(size=48, unlabeled=8192, train=1200, val=400)  # the drawn pictures of the demos

CELLS = {2: 6, 3: 4, 4: 3, 5: 2}  # svm pools a stage to 6 x 6, ... cells: about 9000 numbers of a ResNet-50


# --- Labeled images --------------------------------------------------------------------------------------------------

class VOC2007(common.ImageFolder):
    """The images of a split of PASCAL VOC. An image may show several classes."""

    def __init__(self, root, split):
        super().__init__(Path(root, "JPEGImages"))
        try:
            files = sorted(Path(root, "ImageSets", "Main").glob(f"*_{split}.txt"))
            columns = [dict(line.split() for line in file.read_text().splitlines()) for file in files]
            names = sorted(columns[0])
            self.truth = torch.tensor([[int(column[name]) for column in columns] for name in names])
        except (OSError, ValueError, LookupError) as error:
            common.fail(f"{root}/ImageSets/Main/*_{split}.txt cannot be read as VOC's "
                        f"({type(error).__name__}: {error})")
        self.classes = [file.name.removesuffix(f"_{split}.txt") for file in files]
        coco.keep_images(self, [f"{name}.jpg".encode() for name in names], split)

    def labels(self, classes=None):
        """([N, K] of 1 if an image shows a class, -1 if not, 0 if that is unclear; the names of the K classes)."""
        other = set(classes or self.classes) ^ set(self.classes)
        if other:
            common.fail(f"{self.root.parent}: class {min(other)} is in trainval or test alone")
        return self.truth, self.classes


def open_labeled(args):
    """(training images, test images, (labels of both), number of classes). Labels are [N], or [N, K] of VOC."""
    voc = Path(args.data, "ImageSets", "Main").is_dir()
    if voc and args.protocol != "svm":
        common.fail(f"{args.data} is PASCAL VOC, whose images may show several classes: take --protocol svm")
    if voc:
        train, val = (VOC2007(args.data, split) for split in ("trainval", "test"))
    else:
        train, val = (common.ImageFolder(Path(args.data, split)) for split in ("train", "val"))
    labels, classes = train.labels()
    if len(classes) < 2 and not voc:
        common.fail(f"{train.root} holds one class, {classes[0]}: there is nothing to tell it from")
    return train, val, (labels, val.labels(classes)[0]), len(classes)


def labeled_view(image, rng, size, labels=None, augment=False):
    """view: uint8 [3, size, size], the center of an image, or with `augment` a random crop, mirrored half of the time.

    label: its class, if there are `labels`; shown: the number of the image in the view, which is another's if this one
    cannot be decoded.
    """
    crop = common.random_crop(image.size, (0.08, 1.0), rng) if augment else common.center_crop(image.size)
    view, = image.crop([crop], [size])
    if augment and rng.random() < 0.5:
        view = ImageOps.mirror(view)
    batch = {"view": common.to_tensor(view), "shown": torch.tensor(image.index)}
    return batch if labels is None else {**batch, "label": labels[image.index]}


# --- Linear probe and fine-tuning ------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """A linear layer on one stage of the backbone, averaged over the image.

    frozen: the backbone's weights and BN statistics stay as they are.
    """

    def __init__(self, backbone, stage, classes, frozen):
        super().__init__()
        self.backbone, self.stages, self.frozen = backbone, stage - 1, frozen
        self.normalize = common.Photometric()
        self.fc = nn.Linear(backbone.channels[stage - 2], classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        if frozen:
            backbone.requires_grad_(False)
        backbone.train_first(self.stages)

    def forward(self, batch):
        """(cross-entropy, stats). batch: view [N, 3, S, S] uint8, label [N]."""
        scores = self.scores(batch["view"])
        accuracy = (scores.detach().argmax(dim=1) == batch["label"]).float().mean()
        return F.cross_entropy(scores, batch["label"]), {"accuracy": accuracy}

    def scores(self, view):
        """[N, 3, S, S] uint8 -> scores [N, classes], float32."""
        if self.frozen:
            self.backbone.eval()
        c = self.backbone(self.normalize(view), self.stages)[-1]          # [N, C, H, W]
        with torch.autocast(view.device.type, enabled=False):
            return self.fc(c.float().mean(dim=(2, 3)))


@torch.no_grad()
def evaluate(model, source, labels, args, device):
    """{"top1": share of images whose class has the highest score, "top5": one of the five highest scores}."""
    own_share = range(common.rank(), len(source), common.world_size())
    view = partial(labeled_view, size=args.size, labels=labels)
    counts = torch.zeros(3, dtype=torch.long, device=device)
    with common.evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        scores_of = lambda batch: model.scores(batch["view"])
        for batch, scores in common.map_images(scores_of, source, view, own_share, 256, device, args.workers):
            decoded = (batch["shown"] == batch["index"])[:, None]  # no other image stands in for it
            best = scores.topk(min(5, scores.shape[1])).indices  # [N, 5]
            hits = (best == batch["label"][:, None]) & decoded
            counts += torch.stack([hits[:, 0].sum(), hits.sum(), decoded.sum()])
    if common.world_size() > 1:
        dist.all_reduce(counts)
    top1, top5, images = counts.tolist()
    return {"top1": top1 / images, "top5": top5 / images}


def train(args, source, model, views, device, collate=None, evaluate_epoch=None):
    """Train `model` and return the run. evaluate_epoch() gives a row for the log after each epoch."""
    model.to(device, memory_format=torch.channels_last).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run = common.Run(args, source, "classify", model, optimizer)
    batches = run.batches(views, device, collate)
    ddp = common.wrap_ddp(model, device)

    for batch in batches:
        common.seed_everything(args.seed, run.step, common.rank())
        lr = common.learning_rate(args.lr * args.batch_size / DEFAULTS["batch_size"], run.step, run.total,
                                  drops=args.drops)
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            loss, stats = ddp(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step += 1
        if run.step % args.print_every == 0:
            run.log(loss, stats, lr)
        if evaluate_epoch and run.step % run.steps_per_epoch == 0:
            run.write(evaluate_epoch())
            run.restart_clock()
        if run.step % args.save_every == 0 or run.step == run.last:
            run.save()
    return run


def train_classifier(args, device):
    """Run --protocol linear or finetune: train, evaluate after each epoch, and print the last and best accuracy."""
    source, val, labels, classes = open_labeled(args)
    backbone = convert.backbone(args, common.SyncBatchNorm)
    model = Classifier(backbone, args.stage, classes, frozen=args.protocol == "linear")
    views = partial(labeled_view, size=args.size, labels=labels[0], augment=True)
    run = train(args, source, model, views, device,
                evaluate_epoch=lambda: evaluate(model, val, labels[1], args, device))
    tested = [row for row in run.rows() if "top1" in row] if common.rank() == 0 else []
    if tested:
        best, last = max(row["top1"] for row in tested), tested[-1]
        print(f"{args.protocol}, c{args.stage} of {args.init}, step {run.step} of {run.total}: "
              f"top-1 {last['top1']:.1%}, top-5 {last['top5']:.1%} "
              f"(best epoch's top-1 {best:.1%}; chance is {1 / classes:.1%})")


# --- Nearest neighbors and SVMs --------------------------------------------------------------------------------------

@torch.no_grad()
def pooled_features(backbone, source, stage, args, device):
    """(features [N, D], the number of the image that each row shows [N]), in all processes.

    Features are a stage's output, pooled to a few cells and L2-normalized.
    """
    rows, shown = None, torch.zeros(len(source), dtype=torch.long, device=device)
    normalize, view = common.Photometric().to(device), partial(labeled_view, size=args.size)

    def encode(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            c = backbone(normalize(batch["view"]), stage - 1)[-1]
        return F.normalize(F.adaptive_avg_pool2d(c.float(), CELLS[stage]).flatten(1), dim=1)

    share = common.even_share(len(source))
    for batch, x in common.map_images(encode, source, view, share, 256, device, args.workers):
        index = common.all_gather(batch["index"])
        rows = x.new_empty(len(source), x.shape[1]) if rows is None else rows
        rows[index], shown[index] = common.all_gather(x), common.all_gather(batch["shown"])
    return rows, shown


def compare_stages(args, device):
    """Run --protocol knn or svm on c2 to c5, and print the table."""
    source, val, labels, classes = open_labeled(args)
    backbone = convert.backbone(args).to(device, memory_format=torch.channels_last).eval()
    single, stages = labels[0].ndim == 1, {}
    for stage in (2, 3, 4, 5):
        if args.protocol == "knn":
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                accuracy = common.knn(backbone, source, val, args.size, device, args.workers, stage=stage)
            stages[f"c{stage}"] = {"kNN": accuracy}
            continue
        rows = []  # x, y, x_val, y_val
        for images, label in zip((source, val), labels):
            x, shown = pooled_features(backbone, images, stage, args, device)
            y = 2 * F.one_hot(label, classes) - 1 if single else label                 # [N, K]
            rows += [x, y.to(device)[shown]]
        stages[f"c{stage}"] = svm.evaluate(*rows, single)
    print_table(args, f"{args.init}, {len(source)} images to learn from, {len(val)} to evaluate on, {classes} classes",
                stages)


# --- Objects ---------------------------------------------------------------------------------------------------------

def open_objects(args):
    """(training images, test images, number of classes): annotated images, or drawn shapes."""
    if not args.train:
        shapes = lambda part, k: common.Shapes(SHAPES[part], SHAPES["size"], args.seed + k).draw_all()
        return shapes("train", 1), shapes("val", 2), len(common.SHAPE_CLASSES)
    train, val = (coco.CocoFolder(*source, training=True) for source in (args.train, args.val))
    coco.check_classes(train, val, (args.train[1], args.val[1]))
    if len(train.classes) < 2:
        common.fail(f"{args.train[1]} has one class: there is nothing to tell it from")
    return train, val, len(train.classes)


class BoxEncoder(nn.Module):
    """The network that --init names. It encodes boxes by c2 to c5, and by pyramid and box head if it has both.

    SoCo with FPN has them, and so do random and random0.
    """

    def __init__(self, args):
        super().__init__()
        detector = ("backbone", "fpn", "head")
        tensors, settings = convert.initial(args, detector)
        parts, levels = common.parts(tensors), not settings.get("no_levels")
        backbone = common.resnet(args.arch, common.SyncBatchNorm)  # drawn first: `random` is then knn's and detect.py's
        # Its projector is not used.
        self.encoder = soco.ObjectEncoder(args.arch, "fpn", args.size, hidden=1, dim=1, levels=levels)
        self.encoder.backbone = backbone  # no gamma at zero, unlike SoCo's
        for part in detector:
            self.encoder.load_state_dict(parts[part], strict=False)
        has_head = args.init in convert.UNTRAINED or parts["head"]
        self.pool = self.encoder.pool if has_head else common.pool_stages
        self.normalize = common.Photometric()

    def forward(self, views, boxes):
        """{"c2": [n, D], ..., "c5"}, and "pyramid" and "head" if it has both: the features of all n boxes.

        views: [N, 3, S, S] uint8; boxes: N tensors [k, 4], xyxy in pixels of the views.
        """
        return self.pool(self.encoder.backbone(self.normalize(views)), boxes)


class Supervised(nn.Module):
    """The ceiling of the object probe: the same features of c2 to c5, trained through a linear classifier for each."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.fc = nn.ModuleList(nn.Linear(9 * channels, classes) for channels in backbone.channels)  # 3 x 3 cells
        self.photometric = common.Photometric(0.4, 0.4, 0.4, 0.1, jitter_p=0.8, grayscale_p=0.2)

    def forward(self, batch):
        """(mean cross-entropy of the stages, their accuracies). batch: lists of what `common.object_view` gives."""
        stages, label = self.backbone(self.photometric(torch.stack(batch["view"]))), torch.cat(batch["classes"])
        pooled = common.pool_stages(stages, batch["boxes"])
        scores = {name: fc(x) for fc, (name, x) in zip(self.fc, pooled.items())}  # [n, classes] each
        loss = sum(F.cross_entropy(x, label) for x in scores.values()) / len(scores)
        return loss, {name: (x.detach().argmax(dim=1) == label).float().mean() for name, x in scores.items()}


def draw_images(source, boxes, rng):
    """Random images of `source`, [n]: as many as it takes to have `boxes` boxes, or all."""
    order = rng.permutation(len(source))
    counts = np.cumsum([len(source.objects(i)[1]) for i in order])
    return order[:np.searchsorted(counts, boxes) + 1]


def effective_rank(x):
    """The number of directions over which features x [N, D] spread, from 1 to min(N, D): RankMe (Garrido et al. 2023).

    It is low if a network has collapsed onto a few directions. The features are centered first. It grows with N, so
    compare ranks of the same number of boxes.
    """
    singular = torch.linalg.svdvals(x - x.mean(dim=0))
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def probe_objects(args, device):
    """Run --protocol objects, or supervised, which trains the network first; print the table of all parts."""
    source, val, classes = open_objects(args)
    network = BoxEncoder(args)
    if args.protocol == "supervised":
        learn = source if args.train else common.Shapes(SHAPES["unlabeled"], SHAPES["size"], args.seed).draw_all()
        views = partial(common.object_view, source=learn, size=args.size)
        run = train(args, learn, Supervised(network.encoder.backbone, classes), views, device, common.collate_lists)
        network.pool = common.pool_stages
        if run.step < run.total:
            return
    network.to(device, memory_format=torch.channels_last).eval()
    rng, parts = np.random.default_rng(args.seed), {}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        (x, label), (x_val, label_val) = (
            common.box_features(network, images, draw_images(images, args.boxes, rng), args.size, device, args.workers)
            for images in (source, val))
    y, y_val = F.one_hot(label, classes), F.one_hot(label_val, classes)
    for name in x:
        scores = common.ridge(x[name], y, x_val[name])
        parts[name] = {"accuracy": (scores.argmax(dim=1) == label_val).float().mean().item(),
                       "mAP": svm.average_precision(scores, 2 * y_val - 1).nanmean().item(),
                       "rank": effective_rank(x_val[name][:1000])}  # of 1000; which ones depends on the processes
    print_table(args, f"{args.init}, {len(y)} boxes to learn from, {len(y_val)} to evaluate on, {classes} classes "
                      f"({y_val.float().mean(dim=0).max():.1%} are of the most frequent)", parts)


# --- Command line ----------------------------------------------------------------------------------------------------

def print_table(args, title, parts):
    """Print {part of the network: {name: figure}} with a column for each part, and write it to --out as JSON."""
    if common.rank() > 0:
        return
    print(title)
    print(" " * 10 + "".join(f"{part:>9}" for part in parts))
    for name in next(iter(parts.values())):
        cells = (figures[name] for figures in parts.values())
        form = {"cost": "9.2g", "rank": "9.0f"}.get(name, "9.1%")
        print(f"{name:10}" + "".join(f"{x:{form}}" for x in cells))
    with common.atomic_write(Path(args.out, f"{args.protocol}.json")) as file:
        file.write(json.dumps({"title": title, **parts}).encode())


def protocol_defaults(args):
    """What differs from DEFAULTS in a protocol."""
    changed = {}
    if args.protocol in BOX_PROTOCOLS:
        changed["size"] = 800 if args.train else common.detector_size(SHAPES["size"])
    if args.protocol == "finetune":
        changed |= {**FINETUNE, "lr": 0.1 if args.init in convert.UNTRAINED else 0.03}  # MoCo A.7
    if args.protocol == "supervised":
        changed |= {**FINETUNE, "lr": 0.1}
        if args.train:
            changed["batch_size"] = 16  # images of 800 pixels, as many as in detect.py: they fit on one GPU
    return changed


def arguments():
    parser = common.Parser(__doc__, DEFAULTS)
    add = parser.own.add_argument
    convert.add_init(add)
    add("--data", metavar="DIR", help="train/ and val/ with a folder for each class; svm: or VOC2007")
    add("--train", nargs=2, metavar=("IMAGES", "JSON"),
        help="objects, supervised: a folder, and COCO annotations of images below it")
    add("--val", nargs=2, metavar=("IMAGES", "JSON"), help="likewise, to evaluate on (default of both: drawn shapes)")
    add("--protocol", choices=["objects", "supervised", "linear", "svm", "knn", "finetune"],
        help="how features are evaluated; finetune has --lr 0.03, or 0.1 from random weights; supervised has --lr 0.1 "
             "and with --train a --batch-size of 16")
    add("--size", type=common.bounded(int, 32),
        help="side of a view in pixels; objects, supervised: 800, or 160 for the drawn shapes")
    add("--boxes", type=common.bounded(int, 1),
        help="objects, supervised: boxes to learn from, and to evaluate on; images are taken whole, so a few more")
    add("--stage", type=int, choices=[2, 3, 4, 5], help="linear, finetune: which stage's output is classified")
    add("--weight-decay", type=common.bounded(float, 0), help="finetune, supervised: 1e-4")
    add("--drops", type=common.bounded(float, 0, 1), nargs="+",
        help="when the learning rate falls to a tenth, as fractions of the run; finetune, supervised: 0.7 0.9")
    args = parser.parse(protocol_defaults)
    if args.protocol in BOX_PROTOCOLS and args.data is not None:
        common.fail(f"--protocol {args.protocol} takes --train and --val, not --data")
    if args.protocol not in BOX_PROTOCOLS and (args.train or args.val):
        common.fail(f"--protocol {args.protocol} takes --data, not --train and --val")
    if bool(args.train) != bool(args.val):
        common.fail("--train and --val go together: images to learn from, and others to evaluate on")
    if args.protocol not in BOX_PROTOCOLS and args.data is None:
        common.fail(f"--protocol {args.protocol} needs --data DIR")
    return args


def main():
    device = common.init_distributed()
    args = arguments()
    common.lock(args.out, "--out ")
    common.seed_everything(args.seed)
    if args.protocol in BOX_PROTOCOLS:
        probe_objects(args, device)
    elif args.protocol in ("linear", "finetune"):
        train_classifier(args, device)
    else:
        compare_stages(args, device)
    common.finish()


if __name__ == "__main__":
    main()
