"""SoCo: Aligning Pretraining for Detection via Object-Level Contrastive Learning (Wei et al., NeurIPS 2021).

Every object proposal of an image is an instance of its own: its features in one view, pooled by RoIAlign, must predict
its features in another view, where it lies elsewhere and is larger or smaller. All parts of a detector are pre-trained:
backbone, feature pyramid and box head; for a C4 detector, just the backbone, whose last stage is the box head.

    python soco.py                                              SoCo-C4 on shapes that it draws itself, a minute or two
    python soco.py --data DIR                                   your own images; proposals by selective search
    torchrun --nproc_per_node=8 soco.py --data /imagenet        as in the paper
    python soco.py --data DIR --detector c4                     SoCo-C4, for detectors without FPN
    python soco.py --data DIR --views 4                         SoCo*, with a fourth view

Writes last.pt, log.jsonl, views.png and the proposals that it makes (proposals.npz) to --out; run the same command
again to resume. In last.pt's `model`, `online.backbone.*` has the layout of torchvision's ResNet; with FPN,
`online.fpn.*` and `online.head.*` have those of FeaturePyramidNetwork and FastRCNNConvFCHead.
"""
import copy
import shutil
import sys
import zlib
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageOps
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.utils import draw_bounding_boxes

import common

PAPER = dict(  # on ImageNet; lr is for batch_size: 1.0 per 256
    arch="resnet50", size=224, epochs=100, batch_size=2048, lr=8.0, warmup=10, print_every=50, detector="fpn", views=3,
    num_proposals=4, jitter=0.5, momentum=0.99, hidden=4096, dim=256,
    workers=8)  # about what one H100 needs, estimated

C4 = dict(views=2)  # Sec. 3.3: V3 is discarded
WHOLE = dict(detector="c4", views=2, num_proposals=1, jitter=0)  # Table 4, first row: the image is the one object

DEMO = dict(  # SoCo-C4: with FPN and its box head, learning as much takes several times as long
    arch="resnet18w0.25", size=48, epochs=1, batch_size=16, lr=256.0, warmup=0.5, print_every=64, proposals="truth",
    detector="c4", num_proposals=1, hidden=512)  # lr is 2.0 at 16; the paper's rate is too low for 512 steps


# --- Views (Sec. 3.2) ------------------------------------------------------------------------------------------------

def object_views(image, rng, proposals, sizes, num_proposals, jitter_p):
    """V1: the image resized to a square; V2: a crop of V1; V3: V2 downsampled; V4: another crop of V1 (Sec. 4.3).

    proposals(image, rng): [n, 4] xyxy pixels of the image; sizes: the sides of the 2 to 4 views, in pixels. Returns
    view1, view2, ...: uint8 [3, S, S], and boxes1, boxes2, ...: float32 [K, 4] xyxy in pixels of that view. Row k is
    the same proposal in all views. Each view jitters, clips and mirrors its boxes on its own. Only proposals that are
    inside V2 (and inside V4, if there is one) are taken.
    """
    frame = np.array([0, 0, *image.size], float)  # the whole image
    square = sizes[0], sizes[0]
    boxes = proposals(image, rng)
    for _ in range(10):
        v1_crops = np.array([common.random_crop(square, (0.5, 1.0), rng) for _ in range(2)])  # in pixels of V1
        v2, v4 = v1_crops * np.tile(image.size, 2) / sizes[0]                                 # in pixels of the image
        crops = [frame, v2, v2, v4][:len(sizes)]
        visible = boxes[np.all([inside(boxes, crop) for crop in crops[1:]], axis=0)]
        if len(visible):
            break
    else:
        visible = frame[None]  # no proposal in sight: the whole image is the one object
    chosen = np.resize(rng.permutation(visible), (num_proposals, 4))  # all are taken before any is taken twice
    batch = {}
    for i, (view, crop, size) in enumerate(zip(image.crop(crops, sizes), crops, sizes), start=1):
        jittered = jitter(chosen, jitter_p, rng)
        jittered = np.where(inside(jittered, crop)[:, None], jittered, chosen)  # no jitter if it would leave the view
        flip = rng.random() < 0.5
        view_boxes = common.to_view(jittered, crop, size, flip).clip(0, size)
        batch[f"view{i}"] = common.to_tensor(ImageOps.mirror(view) if flip else view)
        batch[f"boxes{i}"] = torch.from_numpy(view_boxes).float()
    return batch


def inside(boxes, crop):
    """Which boxes show at least 16 x 16 pixels in `crop` resized to 224 x 224: bool [n]. The threshold is ours."""
    x1, y1, x2, y2 = common.to_view(boxes, crop, 224).clip(0, 224).T
    return (x2 - x1 >= 16) & (y2 - y1 >= 16)


def jitter(boxes, p, rng):
    """Boxes [n, 4] after box jitter (Sec. 3.2): with probability p, each is moved and resized by up to a tenth of its
    width and height, with four independent draws.
    """
    center, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    r = rng.uniform(-0.1, 0.1, (len(boxes), 4)) * (rng.random((len(boxes), 1)) < p)
    center, side = center + r[:, :2] * side, side + r[:, 2:] * side
    return np.concatenate([center - side / 2, center + side / 2], axis=1)


def color_augmentation(view, size):
    """BYOL's colors: those of its first view for V1, and those of its second for the others.

    size: of V1, in pixels. At 224, the sigma of blur is 0.1 to 2 pixels. Brightness, contrast and saturation are
    torchvision's; detcon.Colors has those of BYOL's own code.
    """
    blur_p, solarize_p = (1.0, 0.0) if view == 1 else (0.1, 0.2)
    return common.Photometric(0.4, 0.4, 0.2, 0.1, jitter_p=0.8, grayscale_p=0.2, blur_p=blur_p, solarize_p=solarize_p,
                              sigma=(0.1 * size / 224, 2.0 * size / 224))


# --- Model (Sec. 3.3) ------------------------------------------------------------------------------------------------

def assign_levels(boxes, size):
    """Scale-aware assignment: the level of each box [..., 4], 0 to 3 for P2 to P5, by its area in its own view.

    size: of V1, in pixels. At 224, areas up to 48^2, 96^2 and 192^2 pixels belong to P2, P3 and P4, and larger ones to
    P5. At other sizes these bounds scale with V1.
    """
    area = ((boxes[..., 2:] - boxes[..., :2]) * (224 / size)).prod(dim=-1)
    return sum((area > side ** 2).long() for side in (48, 96, 192))


def pyramid_roi_align(pyramid, boxes, levels, output_size):
    """RoIAlign of each box on its assigned level alone: [N*K, C, S, S], image-major.

    pyramid: P2 to P5, [N, C, H/4, W/4], ...; boxes: [N, K, 4] in pixels of the view; levels: [N, K], or None to
    pool each box on every level and add. On a level that is not its own, a box is made empty and pools to zero.
    """
    own = lambda level: boxes if levels is None else boxes * (levels == level)[..., None]
    return sum(common.roi_align(p, own(k), output_size, stride=4 * 2 ** k) for k, p in enumerate(pyramid))


class ObjectEncoder(nn.Module):
    """f^I, RoIAlign, f^H and the projector g: a view [N, 3, H, W] and its boxes [N, K, 4] -> [N*K, dim], image-major.

    detector: "fpn" is the backbone, pyramid and box head of Mask R-CNN, with SyncBatchNorm in all of them; "c4" pools
    from c4, and layer4 is the head. The sizes of RoIs and of the box head (four convolutions and a linear layer) are
    those of Detectron2's Mask R-CNN with BN: the paper gives none. size: of V1, in pixels. For Table 4: without `head`,
    the pooled features are averaged; without `levels`, a box is pooled on every level and the results are added.
    """

    def __init__(self, arch, detector, size, hidden, dim, head=True, levels=True):
        super().__init__()
        norm = common.SyncBatchNorm
        self.detector, self.size, self.levels = detector, size, levels
        self.backbone = common.resnet(arch, norm, zero_init_residual=True)
        features = self.backbone.channels[-1]
        if detector == "fpn":
            channels = round(256 * min(1.0, self.backbone.width))  # a demo's narrow backbone has a narrow detector
            features = 4 * channels if head else channels
            self.fpn = FeaturePyramidNetwork(self.backbone.channels, channels, norm_layer=norm)
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            if head:
                self.head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [features], norm_layer=norm)
        self.projector = common.mlp(features, hidden, dim)

    def forward(self, x, boxes):
        if self.detector == "fpn":
            stages = self.backbone(x)
            pyramid = list(self.fpn(dict(enumerate(stages))).values())                    # P2 to P5
            levels = assign_levels(boxes, self.size) if self.levels else None             # [N, K]
            h = self.head(pyramid_roi_align(pyramid, boxes, levels, 7))                   # Eq. 1: [N*K, 1024]
        else:
            c4 = self.backbone(x, stages=3)[-1]
            rois = common.roi_align(c4, boxes, 14, stride=16)                             # [N*K, C4, 14, 14]
            h = self.backbone.layer4(rois).mean(dim=(2, 3))                               # Eq. 1: [N*K, 2048]
        return self.projector(h)

    def pool(self, stages, boxes):
        """{"c2": [n, D], ..., "c5"} and, with FPN, "pyramid" and "head": the features of each box, to probe each part.

        stages: c2 to c5 of N square images; boxes: a list of [k, 4], one per image, in its pixels, n boxes in all.
        The encoder must be in eval mode.
        """
        rows = common.pool_stages(stages, boxes)
        if self.detector == "fpn":
            padded = nn.utils.rnn.pad_sequence(boxes, batch_first=True, padding_value=-1)  # [N, K, 4]
            real = (padded != -1).any(dim=2).flatten()                                    # [N*K]
            levels = assign_levels(padded, 4 * stages[0].shape[-1]) if self.levels else None
            pyramid = list(self.fpn(dict(enumerate(stages))).values())
            cells_3, cells_7 = (pyramid_roi_align(pyramid, padded, levels, side)[real] for side in (3, 7))
            rows |= {"pyramid": cells_3.flatten(1).float(), "head": self.head(cells_7).float()}
        return rows


class SoCo(nn.Module):
    """The pretext task: the online network and the target network, which follows it by `update(momentum)`.

    views: 2, 3, or 4 for SoCo*; size: of V1, in pixels; head, levels: as in ObjectEncoder.
    """

    def __init__(self, arch, detector="fpn", views=3, size=224, hidden=4096, dim=256, head=True, levels=True):
        super().__init__()
        self.photometric = nn.ModuleList(color_augmentation(view, size) for view in range(1, views + 1))
        self.online = ObjectEncoder(arch, detector, size, hidden, dim, head, levels)
        self.predictor = common.mlp(dim, hidden, dim)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, batch):
        """(L^SoCo, stats). batch: view1, view2, ... [N, 3, S, S] uint8 and boxes1, boxes2, ... [N, K, 4]."""
        views = [(colors(batch[f"view{i}"]), batch[f"boxes{i}"]) for i, colors in enumerate(self.photometric, start=1)]
        normalize = lambda x: F.normalize(*common.to_float32(x), dim=1)                   # float32 under autocast too
        v_online = [normalize(self.predictor(self.online(*view))) for view in views]      # Eq. 2, 4: [N*K, dim] each
        with torch.no_grad():
            v_target = [normalize(self.target(*view)) for view in views]                  # Eq. 3, 4
        similarity = lambda a, b: (a * b).sum(dim=1).mean()                               # Eq. 6, mean over K and N
        loss, stats = 0, {}
        for i in range(1, len(views)):
            forth, back = similarity(v_online[0], v_target[i]), similarity(v_online[i], v_target[0])
            loss = loss - 2 * forth - 2 * back                                            # Eq. 5, and symmetrized
            stats[f"cosine{i + 1}"] = (forth + back).detach() / 2
        return loss, {**stats, "std": v_target[0].std(dim=0, correction=0).mean()}        # near 0: collapsed

    @torch.no_grad()
    def update(self, momentum):
        common.momentum_update(self.target, self.online, momentum)


# --- Proposals (Sec. 3.2, appendix A) --------------------------------------------------------------------------------

def selective_search(image, space="HSV", scale=500, min_size=10):
    """Boxes by selective search, [n, 4] xyxy in pixels of the image. A.1: scale 500, sigma 0.9 and min_size 10.

    The paper does not name the color space or the number of strategies: we use a single strategy, in HSV. The image is
    first shrunk to at most 500 pixels on its longer side, about the size of ImageNet's, since more pixels are not more
    objects.
    """
    import cv2
    from cv2 import ximgproc
    cv2.setNumThreads(1)  # the other cores have images of their own
    pixels = image.shrunk()
    search = ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.addImage(pixels if space == "RGB" else cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV))
    search.addGraphSegmentation(ximgproc.segmentation.createGraphSegmentation(0.9, scale, min_size))
    strategy = lambda name: getattr(ximgproc.segmentation, f"createSelectiveSearchSegmentationStrategy{name}")
    similarities = [strategy(name)() for name in ("Color", "Texture", "Size", "Fill")]
    search.addStrategy(strategy("Multiple")(*similarities))
    x, y, w, h = np.unique(search.process(), axis=0).T
    return np.stack([x, y, x + w, y + h], axis=1) * np.tile(np.divide(image.size, pixels.shape[1::-1]), 2)


def filter_proposals(boxes, size):
    """The boxes [n, 4] that Sec. 3.2 keeps in an image of `size` (W, H), in pixels; at least one.

    It keeps boxes with 1/3 <= w/h <= 3 and 0.3 <= sqrt(wh) / sqrt(WH) <= 0.8. If none is left, we replace the bounds on
    the size by sides of at least 32 pixels. If still none is left, we drop the bounds on w/h too. If even then none is
    left, the whole image is the one box.
    """
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    aspect = (w <= 3 * h) & (h <= 3 * w)
    scale = np.sqrt(w * h / (size[0] * size[1]))
    large = (w >= 32) & (h >= 32)
    for keep in (aspect & (0.3 <= scale) & (scale <= 0.8), large & aspect, large):
        if keep.any():
            return boxes[keep]
    return np.array([[0, 0, *size]])


def random_boxes(size, n, rng):
    """Up to n boxes, each between two random points of an image of `size` (W, H), that pass `filter_proposals`."""
    points = np.sort(rng.uniform(0, size, (20 * n, 2, 2)), axis=1)  # [20n, (low, high), (x, y)]
    return filter_proposals(points.reshape(-1, 4), size)[:n]


PART = 64  # images per temporary file, until all proposals are made


def make_proposals(path, source, device):
    """Make a proposals file by selective search, in all processes. What a killed run has finished is kept."""
    common.need_opencv("selective search", "--proposals random")
    folder = Path(f"{path}.{zlib.crc32(source.names):08x}.parts")
    parts = [folder / f"{k}.npz" for k in range(-(-len(source) // PART))]

    def write(k, file):
        boxes = [find_objects(source, i) for i in range(len(source))[k * PART:(k + 1) * PART]]
        np.savez(file, boxes=np.concatenate(boxes), counts=[len(b) for b in boxes])

    common.make_files(f"proposals of {len(source)} images", len(parts), parts.__getitem__, write, device)
    if common.rank() == 0:
        boxes = []
        for part in parts:
            with np.load(part) as made:
                boxes += np.split(made["boxes"], np.cumsum(made["counts"])[:-1])
        save_proposals(path, source, boxes)
        shutil.rmtree(folder)
    common.barrier()


def find_objects(source, i):
    """The boxes of selective search in image i, filtered: [n, 4] float32; none if the image cannot be decoded."""
    try:
        image = source.image(i)
        return filter_proposals(selective_search(image), image.size).astype(np.float32)
    except common.Unreadable as error:
        print(f"cannot decode {source.name(i)} ({error}): no proposals", file=sys.stderr, flush=True)
        return np.zeros((0, 4), np.float32)


def save_proposals(path, source, boxes):
    """Write a proposals file. boxes: [n, 4] xyxy in pixels of the upright image, for every image of `source`.

    The file is an .npz with `boxes` [M, 4]; `offsets` [N + 1]: rows offsets[i] to offsets[i + 1] are of image i; and
    `names`, uint8: the path of each image below the folder, ended by a zero byte.
    """
    with common.atomic_write(path) as file:
        np.savez(file, boxes=np.concatenate([np.reshape(b, (-1, 4)) for b in boxes]),
                 offsets=np.cumsum([0, *map(len, boxes)]), names=source.names)


def read_proposals(path, source):
    """The Proposals in a file that `save_proposals` wrote. Exits with 2 if it is not one, or is of other images."""
    try:
        with np.load(path) as arrays:
            boxes, offsets, names = (arrays[name] for name in ("boxes", "offsets", "names"))
        sound = (boxes.shape[1:] == (4,) and boxes.dtype.kind in "iuf" and np.isfinite(boxes).all()
                 and (boxes[:, 2:] > boxes[:, :2]).all())
        sound &= (offsets.ndim == 1 and offsets.dtype.kind in "iu" and offsets[0] == 0 and offsets[-1] == len(boxes)
                  and (offsets[1:] >= offsets[:-1]).all())
    except Exception as error:  # a damaged file may raise anything
        common.fail(f"--proposals {path} is not an .npz of boxes, offsets and names ({' '.join(str(error).split())})")
    if not sound:
        common.fail(f"--proposals {path} is not sound: `boxes` must be real numbers, [M, 4], with x1 < x2 and y1 < y2, "
                    "and `offsets` whole numbers that rise from 0 to M")
    if len(offsets) != len(source) + 1:
        common.fail(f"--proposals {path} has boxes of {len(offsets) - 1} images, but --data has {len(source)}")
    if names.tobytes() != source.names.tobytes():
        there, here = (x.tobytes().decode(errors="surrogateescape").split("\0") for x in (names, source.names))
        i, name, ours = next((i, *pair) for i, pair in enumerate(zip_longest(there, here)) if pair[0] != pair[1])
        common.fail(f"--proposals {path} is of other images: number {i} is {name!r} there, {ours!r} in --data")
    return Proposals(boxes, offsets)


class Proposals:
    """proposals(image, rng) gives the boxes of an image, [n, 4] in its pixels. Forked workers share them."""

    def __init__(self, boxes, offsets):
        self.boxes, self.offsets = boxes, offsets

    def __call__(self, image, rng):
        return np.asarray(self.boxes[self.offsets[image.index]:self.offsets[image.index + 1]], float)

    def __str__(self):
        checksum = zlib.crc32(self.offsets.astype(np.int64), zlib.crc32(np.ascontiguousarray(self.boxes)))
        return f"{len(self.boxes)} boxes, checksum {checksum:08x}"


def open_proposals(args, source, device):
    """(proposals(image, rng), a text that identifies them) for --proposals. A file that is missing is made first."""
    if args.proposals == "random":
        return lambda image, rng: random_boxes(image.size, 100, rng), "random"  # 100, so that some are inside V2
    if args.proposals == "whole":
        return lambda image, rng: np.array([[0, 0, *image.size]], float), "whole"
    if args.proposals == "truth":
        proposals = Proposals(np.concatenate(source.boxes), np.cumsum([0, *map(len, source.boxes)]))
    else:
        there = torch.tensor([Path(args.proposals).exists()], device=device)
        if not common.all_gather(there).all():
            make_proposals(args.proposals, source, device)
        proposals = read_proposals(args.proposals, source)
    return proposals, str(proposals)


# --- Pictures --------------------------------------------------------------------------------------------------------

COLORS = ["red", "lime", "yellow", "cyan", "magenta", "orange", "white", "dodgerblue"]


def draw_boxes(picture, boxes, labels, side):
    """A picture [3, S, S] in [0, 1], S <= side, with its boxes [K, 4] in pixels -> [3, side * f, side * f].

    It is enlarged f = 256 // side times, or not at all if `side` is above 128. labels: K texts or None. What a smaller
    picture lacks is left black, so that all results have one size.
    """
    factor = max(1, 256 // side)
    picture = F.interpolate(picture[None], scale_factor=factor)[0]
    picture = draw_bounding_boxes(picture, boxes * factor, labels, [COLORS[k % 8] for k in range(len(boxes))], width=2)
    return F.pad(picture, (0, side * factor - picture.shape[2], 0, side * factor - picture.shape[1]))


def save_views(path, model, batch):
    """Write views.png: the views of a few images side by side.

    A proposal has the same color in all views. With FPN, its level (P2 to P5) is written at each box.
    """
    columns, size = [], model.online.size
    for i, colors in enumerate(model.photometric, start=1):
        views, boxes = common.denormalize(colors(batch[f"view{i}"])[:8]).cpu(), batch[f"boxes{i}"][:8].cpu()
        labels = [None] * len(boxes)
        if model.online.detector == "fpn" and model.online.levels:
            labels = [[f"P{2 + level}" for level in row] for row in assign_levels(boxes, size)]
        columns.append(torch.stack([draw_boxes(*row, size) for row in zip(views, boxes, labels)]))
    common.save_views(path, *columns)


def save_figure_2(path, source, proposals):
    """Write a picture like the paper's Figure 2: eight images, made square, with ten of their proposals each."""
    rng, pictures = np.random.default_rng(0), []
    for i in rng.permutation(len(source))[:8]:
        with suppress(common.Unreadable):
            image = source.image(i)
            frame = 0, 0, *image.size
            boxes = rng.permutation(common.to_view(proposals(image, rng), frame, 256))[:10]
            picture = common.to_tensor(image.crop([frame], [256])[0]) / 255
            pictures.append(draw_boxes(picture, torch.from_numpy(boxes), None, 256)[None])
    if pictures:
        common.save_views(path, *pictures)


# --- Training (Sec. 4.1) ---------------------------------------------------------------------------------------------

def arguments():
    parser = common.Parser(__doc__, PAPER, DEMO)
    add = parser.own.add_argument
    add("--proposals", metavar="FILE.npz|random|whole",
        help="a file of boxes, made if it is missing; boxes drawn at random (Table 5c); or the whole image (Table 4; "
             "then --detector c4 --views 2 --num-proposals 1 --jitter 0 are the defaults) (default: OUT/proposals.npz; "
             "demo: the drawn objects' true boxes)")
    add("--prepare", action="store_true", help="make the proposals and a picture of some, and stop")
    add("--detector", choices=["fpn", "c4"], help="the detector to pre-train")
    add("--views", type=int, choices=[2, 3, 4],
        help="3: V1, V2, V3; 4: SoCo*; 2: no V3 (default: 3; with --detector c4: 2)")
    add("--no-head", action="store_true", help="FPN without the box head (Table 4)")
    add("--no-levels", action="store_true", help="FPN whose boxes are pooled on all levels (Table 4)")
    add("--small-size", type=common.bounded(int, 16), help="side of V3 in pixels (default: half of --size)")
    add("--num-proposals", type=common.bounded(int, 1), help="K, the boxes of an image in a step")
    add("--jitter", type=common.bounded(float, 0, 1), help="probability of box jitter")
    add("--momentum", type=common.bounded(float, 0, 1), help="tau at the start; it rises to 1 along a cosine")
    add("--hidden", type=common.bounded(int, 1), help="width of the hidden layer of projector and predictor")
    add("--dim", type=common.bounded(int, 1), help="length of an embedding")
    add("--warmup", type=common.bounded(float, 0), help="epochs in which the learning rate rises from 0")

    def variant(args):
        return {**(WHOLE if args.proposals == "whole" else {}), **(C4 if args.detector == "c4" else {})}

    args = parser.parse(variant)
    args.proposals = args.proposals or str(Path(args.out, "proposals.npz"))
    if args.detector == "c4" and args.views > 2:
        common.fail("--detector c4 has the views V1 and V2 alone: leave --views out, or take --detector fpn")
    if args.detector == "c4" and (args.no_head or args.no_levels):
        common.fail("--no-head and --no-levels are for --detector fpn")
    if args.views == 2 and args.small_size:
        common.fail("--small-size is the side of V3, and there is no V3 here: leave it out")
    args.small_size = args.small_size or args.size // 2
    if args.small_size > args.size:
        common.fail(f"--small-size {args.small_size} is above --size {args.size}, but V3 is V2 made smaller")
    if args.proposals == "truth" and args.data is not None:
        common.fail("--proposals truth is for the drawn shapes: images of your own have no boxes yet")
    if args.proposals not in ("truth", "random", "whole") and not args.proposals.endswith(".npz"):
        common.fail(f"--proposals {args.proposals}: take random, whole, or a file that ends in .npz")
    if args.prepare and args.proposals in ("truth", "random", "whole"):
        common.fail(f"--prepare has nothing to make: --proposals {args.proposals} needs no file")
    return args


def main():
    device = common.init_distributed()
    args = arguments()
    source, monitor = common.open_data(args, single=False)
    common.seed_everything(args.seed)
    model = SoCo(args.arch, args.detector, args.views, args.size, args.hidden, args.dim, not args.no_head,
                 not args.no_levels)
    model.to(device, memory_format=torch.channels_last)
    optimizer = common.LARS([*model.online.parameters(), *model.predictor.parameters()], lr=0.0, momentum=0.9,
                            weight_decay=1e-5)
    file = Path(args.proposals)
    # From here on, args.proposals identifies the boxes themselves: a resumed run must have the same, wherever they lie.
    proposals, args.proposals = open_proposals(args, source, device)
    if args.prepare:
        if common.rank() == 0:
            save_figure_2(file.with_suffix(".png"), source, proposals)
            print(f"{file}: {args.proposals}, of {len(source)} images; some of them in {file.with_suffix('.png')}")
        return common.finish()
    run = common.Run(args, source, "soco", model, optimizer)
    sizes = [args.size, args.size, args.small_size, args.size * 6 // 7][:args.views]  # V4: 192 of 224
    views = partial(object_views, proposals=proposals, sizes=sizes, num_proposals=args.num_proposals,
                    jitter_p=args.jitter)
    batches = run.batches(views, device)
    ddp = common.wrap_ddp(model, device, args.compile)

    if monitor and run.step == 0:
        run.monitor(model.online, monitor, device, stage=4)  # SoCo-C4 pools boxes from c4; FPN's c5 is weak (Table 11)
    for batch in batches:
        if run.step == 0 and common.rank() == 0:
            common.seed_everything(args.seed, run.step, common.rank())
            save_views(Path(args.out, "views.png"), model, batch)
        common.seed_everything(args.seed, run.step, common.rank())  # after save_views, which draws random numbers too
        lr = common.learning_rate(args.lr * args.batch_size / PAPER["batch_size"], run.step, run.total,
                                  round(args.warmup * run.steps_per_epoch))
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            loss, stats = ddp(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step += 1
        model.update(common.cosine(args.momentum, 1.0, run.step, run.total))
        if run.step % args.print_every == 0:
            run.log(loss, stats, lr)
        if monitor and run.step % run.steps_per_epoch == 0:
            run.monitor(model.online, monitor, device, stage=4)
        if run.step % args.save_every == 0 or run.step == run.last:
            run.save()
    run.summary(loss=f"from 0 down to {4 - 4 * args.views}, which a collapsed network reaches too",
                std=f"0 if collapsed, healthy about {args.dim ** -0.5:.3f}")
    common.finish()


if __name__ == "__main__":
    main()
