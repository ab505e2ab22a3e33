"""How good are frozen features? Object probe, linear probe, SVMs, nearest neighbors; and fine-tuning.

    python transfer/classify.py --init runs/soco/last.pt --protocol objects --train IMAGES JSON --val IMAGES JSON
    python transfer/classify.py --init runs/soco/last.pt --protocol objects                   the same on drawn shapes
    python transfer/classify.py --init random --arch resnet18 --protocol supervised     its ceiling: trained on labels
    python transfer/classify.py --init runs/moco/last.pt --data /imagenet                 linear probe (MoCo Sec. 4.1)
    python transfer/classify.py --init random --data DIR --protocol knn                       c2 to c5 beside each other
    python transfer/classify.py --init runs/detco/last.pt --data VOC2007 --protocol svm      DetCo Table 2, DUPR Table 6
    python transfer/classify.py --init resnet50.pth --data DIR --protocol finetune            end to end (MoCo A.6, A.7)
    torchrun --nproc_per_node=8 transfer/classify.py ...                                      the same, sooner

The protocol objects asks what a detector asks: which class has the object in a box? Every box of COCO annotations is
pooled from every stage, and with SoCo's weights from pyramid and head too. DIR has train/ and val/ with a folder for
each class; svm also takes VOC2007 as it is. objects, supervised, knn and svm print a table and write it to --out;
linear, finetune and supervised write last.pt and log.jsonl there, and the same command again resumes.
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
from transfer import coco, convert  # noqa: E402

DEFAULTS = dict(  # the linear probe of MoCo Sec. 4.1; lr is for 256 images a step
    protocol="linear", size=224, stage=5, epochs=100, batch_size=256, lr=30.0, weight_decay=0.0, drops=[0.6, 0.8],
    print_every=50, boxes=5000)
FINETUNE = dict(weight_decay=1e-4, drops=[0.7, 0.9])  # lr 0.03 from a checkpoint, 0.1 from nothing (A.7); drops of A.6
OBJECTS = ("objects", "supervised")
SHAPES = dict(size=48, unlabeled=8192, train=1200, val=400)  # drawn pictures, as many as in the demos

POOL = {2: 6, 3: 4, 4: 3, 5: 2}  # svm pools a stage to so many cells a side: about 9000 numbers of a ResNet-50
COSTS = [2.0 ** k for k in range(-19, 8, 2)]   # an SVM's, to choose from


# --- Labeled images --------------------------------------------------------------------------------------------------

class VOC2007(common.ImageFolder):
    """The images of a split of PASCAL VOC. `.truth`: [N, 20], 1 if it shows the class, -1 if not, 0 if unclear."""

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


def open_labeled(args):
    """(training images, test images, (labels of both), number of classes). VOC has no labels, but `.truth`."""
    if Path(args.data, "ImageSets", "Main").is_dir():
        if args.protocol != "svm":
            common.fail(f"{args.data} is VOC's, whose images show several classes: take --protocol svm")
        train, val = (VOC2007(args.data, split) for split in ("trainval", "test"))
        if train.classes != val.classes:
            common.fail(f"{args.data}: class {min(set(train.classes) ^ set(val.classes))} is in trainval or test alone")
        return train, val, None, train.truth.shape[1]
    train, val = (common.ImageFolder(Path(args.data, part)) for part in ("train", "val"))
    labels, classes = train.labels()
    if len(classes) < 2:
        common.fail(f"{train.root} holds one class, {classes[0]}: there is nothing to tell it from")
    return train, val, (labels, val.labels(classes)[0]), len(classes)


def labeled_view(image, rng, size, labels=None, augment=False):
    """view: uint8 [3, size, size], the center, or with `augment` a random resized crop, mirrored half of the time.

    label: its class. shown: which image it is of, since another one stands in for an image that cannot be decoded.
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

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, batch):
        """(cross-entropy, stats). batch: view [N, 3, S, S] uint8, label [N]."""
        scores = self.scores(batch["view"])
        accuracy = (scores.detach().argmax(dim=1) == batch["label"]).float().mean()
        return F.cross_entropy(scores, batch["label"]), {"accuracy": accuracy}

    def scores(self, view):
        """[N, 3, S, S] uint8 -> scores [N, classes], float32."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            c = self.backbone(self.normalize(view), self.stages)[-1]      # [N, C, H, W]
        with torch.autocast(view.device.type, enabled=False):
            return self.fc(c.float().mean(dim=(2, 3)))


@torch.no_grad()
def evaluate(model, source, labels, args, device):
    """{"top1": share of images whose class scores highest, "top5": whose class is among the five highest}."""
    model.eval()
    own_share = range(common.rank(), len(source), common.world_size())
    view = partial(labeled_view, size=args.size, labels=labels)
    counts = torch.zeros(3, dtype=torch.long, device=device)

    def predict(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            return model.scores(batch["view"])

    for batch, scores in common.map_images(predict, source, view, own_share, 256, device, args.workers):
        own = (batch["shown"] == batch["index"])[:, None]  # leave out what stands in for another
        hits = (scores.topk(min(5, scores.shape[1])).indices == batch["label"][:, None]) & own  # [N, 5]
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), own.sum()])
    if common.world_size() > 1:
        dist.all_reduce(counts)
    model.train()
    top1, top5, count = counts.tolist()
    return {"top1": top1 / count, "top5": top5 / count}


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


def classify_images(args, backbone, device):
    """The protocols linear and finetune, evaluated after each epoch."""
    source, val, labels, classes = open_labeled(args)
    model = Classifier(backbone, args.stage, classes, args.protocol == "linear")
    views = partial(labeled_view, size=args.size, labels=labels[0], augment=True)
    run = train(args, source, model, views, device,
                evaluate_epoch=lambda: evaluate(model, val, labels[1], args, device))
    tested = [row for row in run.rows() if "top1" in row] if common.rank() == 0 else []
    if tested:
        best, last = max(row["top1"] for row in tested), tested[-1]
        print(f"{args.protocol}, c{args.stage} of {args.init}, step {run.step} of {run.total}: "
              f"top-1 {last['top1']:.1%}, top-5 {last['top5']:.1%} "
              f"(best epoch's top-1 {best:.1%}; chance is {1 / classes:.1%})")


# --- Support vector machines -----------------------------------------------------------------------------------------

@torch.no_grad()
def pooled(backbone, source, stage, args, device):
    """(features [N, D], which image each row shows [N]), in all processes.

    Features are a stage's output, pooled to a few cells and L2-normalized.
    """
    rows, shown = None, torch.zeros(len(source), dtype=torch.long, device=device)
    normalize, view = common.Photometric().to(device), partial(labeled_view, size=args.size)

    def encode(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            c = backbone(normalize(batch["view"]), stage - 1)[-1]
        return F.normalize(F.adaptive_avg_pool2d(c.float(), POOL[stage]).flatten(1), dim=1)

    share = common.even_share(len(source))
    for batch, x in common.map_images(encode, source, view, share, 256, device, args.workers):
        index = common.all_gather(batch["index"])
        rows = x.new_empty(len(source), x.shape[1]) if rows is None else rows
        rows[index], shown[index] = common.all_gather(x), common.all_gather(batch["shown"])
    return rows, shown


@common.exact_products()
def linear_svm(x, y, cost, start=None, positive=2.0, tol=1e-4):
    """[D, K]: the weights w of support vector machines, one for each column of y.

    Each minimizes |w|^2 / 2 + sum_i C_i max(0, 1 - y_i w.x_i)^2. x: [N, D]; y: [N, K] of 1, -1, or 0 for a row that the
    column leaves out; cost: C, a number or [K]; C_i is `positive` * C if y_i is 1, else C.

    Newton's method on all columns at once, its equations solved by conjugate gradients: the objective is made of
    parabolas. A column is done when its gradient has fallen to `tol` of that at w = 0.
    """
    weight = cost * torch.where(y > 0, positive, 1.0) * (y != 0)                       # [N, K]
    w = x.new_zeros(x.shape[1], y.shape[1]) if start is None else start.clone()
    goal = tol * (2 * x.T @ (weight * y)).norm(dim=0)
    steps = torch.tensor([0, *(2.0 ** -k for k in range(12))], device=x.device)        # of a line search; 0 is to stay
    for _ in range(50):
        slack = 1 - y * (x @ w)                                                        # [N, K]
        active = weight * (slack > 0)
        gradient = w - 2 * x.T @ (active * y * slack)                                  # [D, K]
        if (gradient.norm(dim=0) <= goal).all():
            break
        s, r = torch.zeros_like(w), -gradient
        p, rr = r, (r * r).sum(dim=0)
        enough = torch.maximum(0.01 * rr, (goal / 2) ** 2)
        for _ in range(200):  # (I + 2 x' diag(active) x) s = -gradient
            hp = p + 2 * x.T @ (active * (x @ p))
            alpha = rr / (p * hp).sum(dim=0).clamp(min=1e-30)
            s, r = s + alpha * p, r - alpha * hp
            rr, before = (r * r).sum(dim=0), rr
            if (rr <= enough).all():
                break
            p = r + rr / before.clamp(min=1e-30) * p
        z = y * (x @ s)
        values = torch.stack([((w + t * s) ** 2).sum(dim=0) / 2
                              + (weight * (slack - t * z).clamp(min=0) ** 2).sum(dim=0)
                              for t in steps])                                         # [13, K]
        w = w + steps[values.argmin(dim=0)] * s
    return w


def average_precision(scores, truth):
    """[K]: VOC's average precision of each column, the area below precision over recall; nan for a column without a 1.

    Precision at a recall is the best at that recall or more. scores: [M, K]; truth: [M, K] of 1, -1, or 0 for a row
    that does not count.
    """
    truth = truth.gather(0, scores.argsort(dim=0, descending=True))
    hits, count = (truth > 0).cumsum(dim=0), (truth != 0).cumsum(dim=0)
    precision = (hits / count.clamp(min=1)).flip(0).cummax(dim=0).values.flip(0)
    return (precision * (truth > 0)).sum(dim=0) / hits[-1]


def svm(x, y, x_val, y_val, single):
    """{"mAP", "accuracy" if `single`, "cost"} of one-vs-rest SVMs, learned from x [N, D] and y [N, K].

    Three-fold cross-validation chooses the cost: for each class by its AP, or, if every image has a `single` class, for
    all classes by accuracy.
    """
    x, x_val = (F.pad(rows, (0, 1), value=1.0) for rows in (x, x_val))                 # the last column is the bias's
    y, y_val = y.to(x.dtype), y_val.to(x.dtype)
    fold = torch.arange(len(y), device=x.device) % 3  # a class's images follow each other
    held = F.one_hot(fold, 3)[:, None]                                                 # [N, 1, 3]
    y_fit, y_held = ((y[:, :, None] * part).flatten(1) for part in (1 - held, held))   # [N, K * 3]
    w, quality, progress = None, [], common.Progress("SVMs", len(COSTS))
    for cost in COSTS:
        w = linear_svm(x, y_fit, cost, w)
        scores = x @ w
        if single:
            own = (scores.view(*y.shape, 3) * held).sum(dim=2)  # by the SVMs that have not seen it
            quality.append((own.argmax(dim=1) == y.argmax(dim=1)).float().mean().expand(y.shape[1]))
        else:
            quality.append(average_precision(scores, y_held).view(-1, 3).nanmean(dim=1))
        progress(len(quality))
    cost = torch.tensor(COSTS, device=x.device)[torch.stack(quality).nan_to_num().argmax(dim=0)]   # [K]
    scores = x_val @ linear_svm(x, y, cost)
    figures = {"mAP": average_precision(scores, y_val).nanmean().item()}
    if single:
        figures["accuracy"] = (scores.argmax(dim=1) == y_val.argmax(dim=1)).float().mean().item()
    return {**figures, "cost": cost.median().item()}


# --- Objects ---------------------------------------------------------------------------------------------------------

def open_objects(args):
    """(training images, test images, number of classes): annotated images, or drawn shapes."""
    if not args.train:
        shapes = lambda part, k: common.Shapes(SHAPES[part], SHAPES["size"], args.seed + k).draw_all()
        return shapes("train", 1), shapes("val", 2), len(common.SHAPE_CLASSES)
    train, val = coco.CocoFolder(*args.train, training=True), coco.CocoFolder(*args.val, training=False)
    if train.classes != val.classes:
        common.fail(f"the classes of {args.val[1]} are not those of {args.train[1]}")
    return train, val, len(train.classes)


class Network(nn.Module):
    """The network that --init names: a backbone, and of SoCo with FPN, or if random, also pyramid and box head."""

    def __init__(self, args):
        super().__init__()
        tensors, _ = convert.initial(args, ("backbone", "fpn", "head"))
        self.encoder = soco.ObjectEncoder(args.arch, "fpn", args.size, hidden=1, dim=1)
        self.encoder.backbone = common.resnet(args.arch, common.SyncBatchNorm)  # its last gammas are no zeros
        fits = {name: x for name, x in tensors.items() if name.partition(".")[0] in ("backbone", "fpn", "head")}
        self.encoder.load_state_dict(fits, strict=False)
        detects = args.init in ("random", "random0") or any(name.startswith("head.") for name in tensors)
        self.pool = self.encoder.pool if detects else common.pool_stages
        self.normalize = common.Photometric()

    def forward(self, views, boxes):
        """The features of all boxes, as `pool` gives them. views: [N, 3, S, S] uint8; boxes: [k, 4] of each."""
        return self.pool(self.encoder.backbone(self.normalize(views)), boxes)


class Supervised(nn.Module):
    """The ceiling of `objects`: the same features, trained on labels, with a linear classifier for each stage."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.fc = nn.ModuleList(nn.Linear(9 * channels, classes) for channels in backbone.channels)
        self.photometric = common.Photometric(0.4, 0.4, 0.4, 0.1, jitter_p=0.8, grayscale_p=0.2)

    def forward(self, batch):
        """(mean cross-entropy of the stages, their accuracies). batch: lists of what `common.object_view` gives."""
        stages, label = self.backbone(self.photometric(torch.stack(batch["view"]))), torch.cat(batch["classes"])
        scores = [fc(x) for fc, x in zip(self.fc, common.pool_stages(stages, batch["boxes"]).values())]
        hits = [(x.detach().argmax(dim=1) == label).float().mean() for x in scores]
        return sum(F.cross_entropy(x, label) for x in scores) / 4, {f"c{i}": x for i, x in enumerate(hits, start=2)}


def draw_images(source, boxes, rng):
    """Random images of `source` that have `boxes` boxes together, or all of them."""
    order = rng.permutation(len(source))
    counts = np.cumsum([len(source.objects(i)[1]) for i in order])
    return order[:np.searchsorted(counts, boxes) + 1]


def objects(args, device):
    """The protocols objects, and supervised, which trains first."""
    source, val, classes = open_objects(args)
    network = Network(args)
    if args.protocol == "supervised":
        images = source if args.train else common.Shapes(SHAPES["unlabeled"], SHAPES["size"], args.seed).draw_all()
        views = partial(common.object_view, source=images, size=args.size)
        run = train(args, images, Supervised(network.encoder.backbone, classes), views, device, common.collate_lists)
        network.pool = common.pool_stages
        if run.step < run.total:
            return
    network.to(device, memory_format=torch.channels_last).eval()
    rng, parts = np.random.default_rng(args.seed), {}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        features = lambda images: common.box_features(network, images, draw_images(images, args.boxes, rng), args.size,
                                                      device, args.workers)
        (x, y), (x_val, y_val) = features(source), features(val)
    y, y_val = F.one_hot(y, classes), F.one_hot(y_val, classes)
    for name in x:
        scores = common.ridge(x[name], y, x_val[name])
        parts[name] = {"accuracy": (scores.argmax(dim=1) == y_val.argmax(dim=1)).float().mean().item(),
                       "mAP": average_precision(scores, 2 * y_val - 1).nanmean().item()}
    table(args, f"{args.init}, {len(y)} boxes to learn from, {len(y_val)} to evaluate on, {classes} classes "
                f"({y_val.float().mean(dim=0).max():.1%} are of the most frequent)", parts)


# --- Command line ----------------------------------------------------------------------------------------------------

def table(args, title, parts):
    """Print {part of the network: {name: figure}} with a column for each part, and write it to --out."""
    if common.rank() > 0:
        return
    print(title)
    print(" " * 10 + "".join(f"{part:>9}" for part in parts))
    for name in next(iter(parts.values())):
        cells = (figures[name] for figures in parts.values())
        print(f"{name:10}" + "".join(f"{x:9.2g}" if name == "cost" else f"{x:9.1%}" for x in cells))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with common.atomic_write(Path(args.out, f"{args.protocol}.json")) as file:
        file.write(json.dumps({"title": title, **parts}).encode())


def arguments():
    parser = common.Parser(__doc__, DEFAULTS)
    convert.add_init(parser)
    add = parser.own.add_argument
    add("--data", metavar="DIR", help="train/ and val/ with a folder for each class; svm: or VOC2007")
    add("--train", nargs=2, metavar=("IMAGES", "JSON"),
        help="of objects: folder, and COCO annotations of images below it")
    add("--val", nargs=2, metavar=("IMAGES", "JSON"), help="likewise, to evaluate on (default of both: drawn shapes)")
    add("--protocol", choices=["objects", "supervised", "linear", "svm", "knn", "finetune"],
        help="how the features are evaluated")
    add("--size", type=common.bounded(int, 32),
        help="side of a view in pixels; objects: 800, or 160 for the drawn shapes")
    add("--boxes", type=common.bounded(int, 1), help="of objects: boxes to learn from, and to evaluate on, at most")
    add("--stage", type=int, choices=[2, 3, 4, 5], help="whose output is classified; svm and knn show all")
    add("--weight-decay", type=common.bounded(float, 0), help="1e-4 in finetune and supervised")
    add("--drops", type=common.bounded(float, 0, 1), nargs="+",
        help="when the learning rate falls to a tenth, in shares of the run; 0.7 0.9 in finetune and supervised")

    def variant(args):
        changed = {}
        if args.protocol in OBJECTS:
            changed["size"] = 800 if args.train else common.detector_size(SHAPES["size"])
        if args.protocol in ("finetune", "supervised"):
            changed |= {**FINETUNE, "lr": 0.03 if args.protocol == "finetune" and args.init != "random" else 0.1}
        return changed

    args = parser.parse(variant)
    if args.protocol in OBJECTS and bool(args.train) != bool(args.val):
        common.fail("--train and --val go together: images to learn from, and others to evaluate on")
    if args.protocol not in OBJECTS and args.data is None:
        common.fail(f"--protocol {args.protocol} needs --data DIR")
    return args


def main():
    device = common.init_distributed()
    args = arguments()
    common.seed_everything(args.seed)
    if args.protocol in OBJECTS:
        objects(args, device)
        return common.finish()
    backbone = convert.backbone(args, common.SyncBatchNorm)
    if args.protocol in ("linear", "finetune"):
        classify_images(args, backbone, device)
        return common.finish()
    source, val, labels, classes = open_labeled(args)
    backbone.to(device, memory_format=torch.channels_last).eval()
    title = f"{args.init}, {len(source)} images to learn from, {len(val)} to evaluate on, {classes} classes"
    stages = {}
    for stage in (2, 3, 4, 5):
        if args.protocol == "knn":
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                accuracy = common.knn(backbone, source, val, args.size, device, args.workers, stage=stage)
            stages[f"c{stage}"] = {"kNN": accuracy}
            continue
        truth = (source.truth, val.truth) if labels is None else [2 * F.one_hot(label, classes) - 1 for label in labels]
        x, shown = pooled(backbone, source, stage, args, device)
        x_val, shown_val = pooled(backbone, val, stage, args, device)
        y, y_val = truth[0].to(device)[shown], truth[1].to(device)[shown_val]
        stages[f"c{stage}"] = svm(x, y, x_val, y_val, single=labels is not None)
    table(args, title, stages)
    common.finish()


if __name__ == "__main__":
    main()
