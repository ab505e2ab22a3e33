"""Fine-tunes a checkpoint for semantic segmentation: MoCo's FCN-16s (A.5) on VOC, Cityscapes or your own label maps.

    python transfer/segment.py --init runs/moco/last.pt --data VOCdevkit/VOC2012             21 classes, 30k iterations
    python transfer/segment.py --init runs/moco/last.pt --data cityscapes                    19 classes, 90k iterations
    python transfer/segment.py --init random --data DIR --classes 20 --epochs 50             your own
    torchrun --nproc_per_node=8 transfer/segment.py ...                               as the paper: 16 images a step

Your own images are in DIR/train/images and DIR/val/images. For each there is a PNG of the same name in train/labels or
val/labels. Its values are the classes, counted from 0, and 255 for pixels to ignore.

Writes last.pt, log.jsonl with mIoU, views.png (the first batch) and predictions.png (images, truths and predictions) to
--out. The same command again resumes.
"""
import contextlib
import math
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.ops.misc import Conv2dNormActivation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from transfer import coco, convert  # noqa: E402

DEFAULTS = dict(batch_size=16, lr=0.003, size=513, weight_decay=1e-4, drops=[0.7, 0.9], iterations=30_000,
                print_every=50)
CITYSCAPES = dict(lr=0.01, size=769, iterations=90_000)
IGNORE = 255  # the label of pixels that are neither learned nor evaluated
# From Cityscapes' 34 labels to the 19 that are evaluated. Its files *_labelTrainIds.png have these already.
TRAIN_IDS = np.full(256, IGNORE, np.uint8)
TRAIN_IDS[[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]] = np.arange(19)
GRAY = tuple(round(255 * x) for x in common.MEAN)  # which is 0 when normalized


# --- Images and their label maps -------------------------------------------------------------------------------------

class BadLabel(Exception):
    """A label map that does not fit its image or the number of classes."""


def data_layout(root):
    """(the layout of --data: "voc", "cityscapes" or "plain"; its number of classes, or None if that is not fixed)."""
    if Path(root, "SegmentationClass").is_dir():
        return "voc", 21
    return ("cityscapes", 19) if Path(root, "leftImg8bit").is_dir() else ("plain", None)


class LabelMapFolder(common.ImageFolder):
    """The images of a split, "train" or "val", and their label maps. Exits with 2 if a label map is missing."""

    def __init__(self, root, split, classes):
        self.layout, self.classes = data_layout(root)[0], classes
        if self.layout == "voc":
            lists = Path(root, "ImageSets", "Segmentation")
            augmented = split == "train" and Path(lists, "train_aug.txt").exists()  # the paper's 10582 images
            chosen = Path(lists, "train_aug.txt" if augmented else f"{split}.txt")
            super().__init__(Path(root, "JPEGImages"))
            try:
                names = [f"{name}.jpg".encode() for name in sorted({*chosen.read_text().split()})]
            except (OSError, ValueError) as error:
                common.fail(f"{chosen} cannot be read ({error})")
            coco.keep_images(self, names, chosen)
            self.maps = Path(root, "SegmentationClassAug")  # where the label maps of train_aug usually lie
            if not (augmented and self.maps.is_dir()):
                self.maps = Path(root, "SegmentationClass")
        elif self.layout == "cityscapes":
            super().__init__(Path(root, "leftImg8bit", split))
            self.maps = Path(root, "gtFine", split)
        else:
            super().__init__(Path(root, split, "images"))
            self.maps = Path(root, split, "labels")
        self.suffix = "TrainIds"
        if self.layout == "cityscapes" and not self.path(0).exists():
            self.suffix = "Ids"
        common.check_stems(self)
        existing = {os.path.join(folder, name) for folder, _, files in os.walk(self.maps, followlinks=True)
                    for name in files}
        missing = [str(self.path(i)) for i in range(len(self)) if str(self.path(i)) not in existing]
        if missing:
            common.fail(f"{len(missing)} of {len(self)} images have no label map: {missing[0]} is missing")

    def path(self, i):
        """The file of image i's label map."""
        stem = os.path.splitext(self.name(i))[0]
        if self.layout == "cityscapes":
            stem = f"{stem.removesuffix('_leftImg8bit')}_gtFine_label{self.suffix}"
        return self.maps / f"{stem}.png"

    def label(self, image):
        """The label map of an image, uint8 [H, W]. Raises BadLabel."""
        path = self.path(image.index)
        try:
            with common.decoding():
                label = np.asarray(common.open_image(path))
        except common.Unreadable as error:
            raise BadLabel(f"{path} cannot be decoded ({error})") from error
        if label.shape != image.size[::-1]:
            raise BadLabel(f"{path} is {' x '.join(map(str, label.shape))}, rows by columns, and must be one gray or "
                           f"palette channel of {image.size[1]} x {image.size[0]} like its image")
        if self.suffix == "Ids" and label.max() < len(TRAIN_IDS):
            label = TRAIN_IDS[label]
        wrong = label[(label >= self.classes) & (label != IGNORE)]
        if wrong.size:
            raise BadLabel(f"{path} holds the label {wrong.min()}: with {self.classes} classes "
                           f"take 0 to {self.classes - 1}, and {IGNORE} for pixels to ignore")
        return label.astype(np.uint8)

    def fingerprint(self):
        return {**super().fingerprint(), "layout": self.layout}


def training_view(image, rng, size, source):
    """A training view (A.5): a random crop of the image scaled by 0.5 to 2, mirrored half of the time.

    Returns image: uint8 [3, size, size], and label: uint8 [size, size]. Outside the image, the view is gray and the
    label is IGNORE.
    """
    label = Image.fromarray(source.label(image))
    scale = rng.uniform(0.5, 2.0)
    start, end, extent = [], [], []                                           # of the crop, along x and y
    for full in image.size:
        scaled = max(1, round(full * scale))
        part = min(scaled, size)
        corner = int(rng.integers(scaled - part + 1))
        ratio = full / scaled                                                 # back to pixels of the image
        start.append(corner * ratio)
        end.append(min((corner + part) * ratio, full))
        extent.append(part)
    view, view_label = Image.new("RGB", (size, size), GRAY), Image.new("L", (size, size), IGNORE)
    view.paste(image.decode().resize(extent, Image.Resampling.BILINEAR, start + end))
    view_label.paste(label.resize(extent, Image.Resampling.NEAREST, start + end))
    views = {"image": common.to_tensor(view), "label": torch.from_numpy(np.array(view_label))}
    return {name: x.flip(-1) for name, x in views.items()} if rng.random() < 0.5 else views


def test_view(image, rng, source):
    """image: a test image as it is, uint8 [3, H, W]; label: its label map, uint8 [H, W]; shown: its number."""
    return {"image": common.to_tensor(image.decode()), "label": torch.from_numpy(source.label(image)),
            "shown": image.index}


# --- Model -----------------------------------------------------------------------------------------------------------

def dilate(backbone):
    """Give c5 stride 16 instead of 32 (A.5): the 3x3 convolutions of its stage get dilation 2 and stride 1."""
    for module in backbone.layer4.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (2, 2)


class FCN(nn.Module):
    """FCN-16s (A.5): a dilated backbone, two 3x3 convolutions of 256 channels and dilation 6, and a 1x1 convolution."""

    def __init__(self, backbone, classes):
        super().__init__()
        dilate(backbone)
        self.backbone, self.normalize = backbone, common.Photometric()
        layer = partial(Conv2dNormActivation, out_channels=256, kernel_size=3, dilation=6,
                        norm_layer=common.SyncBatchNorm)
        self.head = nn.Sequential(layer(backbone.channels[-1]), layer(256), nn.Conv2d(256, classes, 1))

    def forward(self, image):
        """[N, 3, H, W] uint8 -> scores of every pixel [N, classes, H, W], float32."""
        height, width = image.shape[2:]
        # Feature (i, j) is centered on pixel (16 i, 16 j). In an image of 16 n + 1 pixels, such as 513 or 769, n + 1
        # features reach from the first pixel to the last. With aligned corners every score lies where it belongs.
        x = F.pad(self.normalize(image), (0, (1 - width) % 16, 0, (1 - height) % 16))
        scores = self.head(self.backbone(x)[-1])                                  # [N, classes, 1 + H/16, 1 + W/16]
        scores = F.interpolate(scores.float(), x.shape[2:], mode="bilinear", align_corners=True)
        return scores[..., :height, :width]


def pixel_loss(scores, label):
    """The cross-entropy of this process's pixels, scaled so that DDP's average over the processes is the mean over all
    pixels that are not ignored.

    scores: [N, classes, H, W]; label: [N, H, W] uint8.
    """
    count = (label != IGNORE).sum()
    if common.world_size() > 1:
        dist.all_reduce(count)
    total = F.cross_entropy(scores, label.long(), ignore_index=IGNORE, reduction="sum")
    return total * common.world_size() / count.clamp(min=1)


# --- Intersection over union -----------------------------------------------------------------------------------------

def confusion(prediction, label, classes):
    """[classes, classes]: how many pixels of class i (row) were predicted as class j (column). Skips ignored pixels."""
    cell = torch.where(label == IGNORE, classes ** 2, label.long() * classes + prediction).flatten()
    return torch.bincount(cell, minlength=classes ** 2 + 1)[:-1].view(classes, classes)


def iou(counts):
    """[classes]: each class's IoU, from a confusion matrix; nan for a class that is neither there nor predicted."""
    hits = counts.diagonal().double()
    return hits / (counts.sum(dim=0) + counts.sum(dim=1) - hits)


@torch.no_grad()
def evaluate(model, source, args, device):
    """{"mIoU", "pixel_accuracy"} in [0, 1] of whole images at their own size. Also writes predictions.png.

    mIoU is over the classes that occur or are predicted.
    """
    torch.backends.cudnn.benchmark = False  # images have many sizes
    counts, examples = torch.zeros(args.classes, args.classes, dtype=torch.long, device=device), []
    own_share, view = range(common.rank(), len(source), common.world_size()), partial(test_view, source=source)

    def predict(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            return model(batch["image"]).argmax(dim=1)

    with common.evaluating(model):
        for batch, prediction in common.map_images(predict, source, view, own_share, 1, device, args.workers):
            if batch["shown"] == batch["index"]:  # else another image stands in for one that cannot be decoded
                counts += confusion(prediction, batch["label"], args.classes)
            if len(examples) < 8 and common.rank() == 0:
                pictures = batch["image"] / 255, paint(batch["label"]), paint(prediction)
                examples.append([F.interpolate(x, (256, 256)) for x in pictures])
    common.save_views(Path(args.out, "predictions.png"), *map(torch.cat, zip(*examples)))
    if common.world_size() > 1:
        dist.all_reduce(counts)
    torch.backends.cudnn.benchmark = True
    return {"mIoU": iou(counts).nanmean().item(), "pixel_accuracy": (counts.trace() / counts.sum()).item()}


def paint(label):
    """[N, 3, H, W] in [0, 1]: label maps [N, H, W] with a color for each class; 0 is black, ignored pixels white."""
    phase = label[:, None].float() * 0.618 + torch.tensor([0, 1 / 3, 2 / 3], device=label.device).view(3, 1, 1)
    colors = (0.55 + 0.45 * torch.cos(2 * math.pi * phase)) * (label != 0)[:, None]
    return torch.where((label == IGNORE)[:, None], 1.0, colors)


# --- Training --------------------------------------------------------------------------------------------------------

def arguments():
    parser = common.Parser(__doc__, DEFAULTS)
    add = parser.own.add_argument
    convert.add_init(add)
    count = common.bounded(int, 1)
    add("--data", metavar="DIR", required=True,
        help="VOC2012, cityscapes, or train/ and val/ with images/ and labels/ in each")
    add("--classes", type=common.bounded(int, 2, 255),
        help="the number of classes in the label maps (default: 21 for VOC, 19 for Cityscapes)")
    add("--size", type=common.bounded(int, 33),
        help="side of a training crop in pixels, best 16 n + 1; 769 on Cityscapes")
    add("--iterations", type=count, help="steps of the whole run, unless --epochs is given; 90000 on Cityscapes")
    add("--weight-decay", type=common.bounded(float, 0), help="of all parameters")
    add("--drops", type=common.bounded(float, 0, 1), nargs="+",
        help="when the learning rate falls to a tenth, as fractions of the run")
    add("--eval-every", type=count, help="epochs between evaluations (default: one at the end)")
    args = parser.parse(lambda args: CITYSCAPES if data_layout(args.data)[0] == "cityscapes" else {})
    args.classes = args.classes or data_layout(args.data)[1]
    if args.classes is None:
        common.fail(f"give --classes, the number of classes in the label maps of {args.data}")
    return args


def train():
    device = common.init_distributed()
    args = arguments()
    source, val = (LabelMapFolder(args.data, split, args.classes) for split in ("train", "val"))
    for i in range(common.rank(), len(val), common.world_size()):  # a bad label map is an error now, not after training
        with contextlib.suppress(common.Unreadable):
            val.label(val.image(i))
    steps = max(1, len(source) // args.batch_size)
    args.iterations = args.epochs * steps if args.epochs else args.iterations
    args.epochs = math.ceil(args.iterations / steps)
    common.seed_everything(args.seed)
    model = FCN(convert.backbone(args, common.SyncBatchNorm), args.classes)
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run = common.Run(args, source, "segment", model, optimizer)
    run.total, run.last = args.iterations, min(args.iterations, args.max_steps or args.iterations)
    batches = run.batches(partial(training_view, size=args.size, source=source), device)
    ddp = common.wrap_ddp(model, device)

    for batch in batches:
        if run.step == 0:
            common.save_views(Path(args.out, "views.png"), batch["image"][:8] / 255, paint(batch["label"][:8]))
        common.seed_everything(args.seed, run.step, common.rank())
        lr = common.learning_rate(args.lr * args.batch_size / DEFAULTS["batch_size"], run.step, run.total,
                                  drops=args.drops)
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            scores = ddp(batch["image"])
        loss = pixel_loss(scores, batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step += 1
        if run.step % args.print_every == 0:
            run.log(loss, {}, lr)
        if run.step == run.total or args.eval_every and run.step % (args.eval_every * steps) == 0:
            run.write(evaluate(model, val, args, device))
            run.restart_clock()
        if run.step % args.save_every == 0 or run.step == run.last:
            run.save()
    run.summary(loss="per pixel, in nats", mIoU=f"on {len(val)} whole images; mean of the last evaluations, up to five")
    common.finish()


def main():
    try:
        train()
    except BadLabel as error:  # a loader worker puts its traceback before the message
        common.fail(str(error).splitlines()[-1].rpartition("BadLabel: ")[2], everywhere=True)


if __name__ == "__main__":
    main()
