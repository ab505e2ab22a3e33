"""DetCon: Efficient Visual Pretraining with Contrastive Detection (Hénaff et al., ICCV 2021), variants S and B.

Each image is divided into segments by a simple heuristic. The features of a segment, pooled from the last stage of
one view, must find the features of the same segment in another view, among all segments of that image and of the other
images in the batch. DetCon-S builds on SimCLR (one network), DetCon-B on BYOL (an online and a target network).

    python detcon.py                                                shapes that it draws itself, a minute or two
    python detcon.py --data DIR                                     your own images; masks by Felzenszwalb-Huttenlocher
    torchrun --nproc_per_node=8 detcon.py --data /imagenet          DetCon-S as in the paper; --variant b for DetCon-B
    python detcon.py --data DIR --masks gridN|MASKS                 squares, or label maps of your own
    python detcon.py --data COCO --fh-scale 500 1000 1500 --schedule steps --epochs 324     as the paper does on COCO

On 8 GPUs with 80 GB each, add --batch-size 2048, half the paper's.

Writes last.pt, log.jsonl, views.png and, with --masks fh, fh-1000/ to --out; run the same command again to resume. In
last.pt's `model`, `online.backbone.*` has the layout of torchvision's ResNet.
"""
import copy
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.utils import draw_segmentation_masks

import common

PAPER = dict(  # S on ImageNet; lr: 0.3 per 256 images; 300 epochs are B's in Table 1, where S has 200 and 1000
    arch="resnet50", size=224, epochs=300, batch_size=4096, lr=4.8, warmup=10, print_every=50, variant="s", masks="fh",
    fh_scale=[1000], num_masks=16, mask_pooling="soft", views=2, temperature=0.1, weight_decay=1e-6,
    schedule="cosine", hidden=2048, dim=128,
    workers=24)  # about what one H100 needs, estimated

B = dict(hidden=4096, dim=256, momentum=0.99)
# A single global mask turns DetCon into SimCLR (S) or a contrastive BYOL (B). Drawing it M times would only scale the
# gradient by 1/M, since `detcon_loss` counts a region once and divides by M. LARS undoes that for weights, but not for
# BN and biases. Table 4 (a) has 16 draws: --num-masks 16.
GRID1 = dict(num_masks=1)
B_1000 = dict(lr=3.2, weight_decay=1.5e-6, momentum=0.996)  # A.2, A.3: when training for 1000 epochs

DEMO = dict(
    arch="resnet18w0.25", size=48, epochs=2, batch_size=64, lr=64.0, warmup=0.5, print_every=32, masks="truth")


# --- Views (Sec. 3.1, A.1) -------------------------------------------------------------------------------------------

def views(image, rng, masks, size, num_masks, pooling="soft", count=2, keep=False):
    """Two random crops of one image, each mirrored half of the time, and M = `num_masks` masks of each.

    masks(image): the image's masks as `shares` takes them, at any resolution. Returns x1 and x2, uint8 [3, size, size];
    ids1 and ids2 [M], the region of the image that each mask shows; masks1 and masks2 [M, h, w], the weight of each
    cell of c5 in each mask (h = w = ceil(size / 32)). With a count of 1 there is no x2, and both sets of masks are
    drawn from x1. With `keep` also members1 and members2, bool [M, size, size], the pixels of each mask, to look at.
    """
    crops = [common.random_crop(image.size, (0.08, 1.0), rng) for _ in range(count)]
    pictures = image.crop(crops, [size] * count, Image.Resampling.BICUBIC)
    labels, batch = masks(image), {}
    for i in (1, 2):
        if i <= count:  # else the masks are drawn from view 1 again
            x, flip = pictures[i - 1], rng.random() < 0.5
            batch[f"x{i}"] = common.to_tensor(ImageOps.mirror(x) if flip else x)
            view_labels = crop_labels(labels, crops[i - 1], image.size, size, flip)
            share = shares(view_labels, -(-size // 32), hard=pooling == "hard")
        ids, weights = draw(share, num_masks, rng, one_cell=pooling == "sample")
        batch[f"ids{i}"], batch[f"masks{i}"] = torch.from_numpy(ids), torch.from_numpy(weights)
        if keep:
            batch[f"members{i}"] = torch.from_numpy(np.stack([member(view_labels, k) for k in ids]))
    return batch


def crop_labels(labels, crop, image_size, size, flip=False):
    """The label of each pixel of the view that shows `crop`: [size, size, ...], from labels [H, W, ...] of the image.

    crop: xyxy, in pixels of the image. The labels may have another resolution than the image; the nearest one is taken.
    """
    def places(axis):  # 0: columns of `labels` for the columns of the view, 1: rows
        pixels = crop[axis] + (np.arange(size) + 0.5) * (crop[axis + 2] - crop[axis]) / size
        return (pixels * labels.shape[1 - axis] / image_size[axis]).astype(int)
    return labels[places(1)[:, None], places(0)[::-1 if flip else 1]]


def shares(labels, cells, hard=False):
    """The share of each cell that each region covers (Sec. 3.1), [regions, cells, cells], in a grid of cells x cells.

    labels: uint8 [S, S], a label map; or uint8 [S, S, channels], one label map per channel, with region number
    256 * channel + label; or uint16 [S, S], 16 regions that may overlap, one per bit. hard, as in the released code:
    within each label map, a cell belongs entirely to the region with the largest share of it.
    """
    size = len(labels)
    maps = np.ascontiguousarray(labels).view(np.uint8).reshape(size, size, -1)            # 16 bits are two channels
    channels = maps.shape[2]
    band = np.arange(size) * cells // size                                                # the cell of a row or column
    cell = (cells * band[:, None] + band)[..., None]                                      # [S, S, 1]
    place = 256 * (cell + cells ** 2 * np.arange(channels)) + maps                        # by channel, cell and label
    counts = np.bincount(place.ravel(), minlength=256 * channels * cells ** 2).reshape(channels, cells ** 2, 256)
    if labels.dtype == np.uint16:                                                         # pixels by byte -> by bit
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # [256, 8], of a byte
        counts = (counts @ bits).swapaxes(0, 1).reshape(1, cells ** 2, 16)
    side = np.bincount(band)                                                              # pixels, about 32
    share = counts / np.outer(side, side).reshape(-1, 1)                                  # [maps, cells^2, regions]
    if hard:
        share = (np.arange(share.shape[2]) == share.argmax(axis=2, keepdims=True)) & (share > 0)
    return share.swapaxes(1, 2).reshape(-1, cells, cells)


def draw(share, n, rng, one_cell=False):
    """Draws n of the regions that are present, with replacement: (ids [n], weights of the cells float32 [n, h, w]).

    share: as `shares` returns it. If no region is present, the whole view is one, with id -1. one_cell: all weight lies
    on one cell, drawn with the shares as probabilities (Sec. 4.4).
    """
    present = np.flatnonzero(share.any(axis=(1, 2)))
    if not len(present):
        present, share = [-1], np.ones((1, *share.shape[1:]))
    ids = rng.choice(present, n)
    weights = share[ids].astype(float)
    if one_cell:
        chance = weights.reshape(n, -1)
        weights = rng.multinomial(1, chance / chance.sum(axis=1, keepdims=True)).reshape(weights.shape)
    return ids, weights.astype(np.float32)


def member(labels, k):
    """The pixels of region k, bool [S, S]. labels: as in `shares`; k: an id from `draw`."""
    if labels.dtype == np.uint16:
        return ((labels >> k) & 1) > 0 if k >= 0 else labels == 0
    return labels.reshape(*labels.shape[:2], -1)[..., k // 256] == k % 256


class Colors(common.Photometric):
    """Photometric with the color jitter of BYOL's and DetCon's own code.

    Brightness: an offset u is added; torchvision multiplies by 1 + u. Contrast: about the mean of each channel.
    Saturation: HSV's, (max - min) / max over a pixel's channels, which cannot exceed 1.
    """

    @staticmethod
    def blend(x, op, factor):
        op, factor = op.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1)
        brightness, saturation = op == 0, op == 2                                         # else contrast
        value, smallest = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)        # [N, 1, H, W]
        bounded = torch.minimum(factor, value / (value - smallest).clamp(min=1e-8))       # saturation 1 at most
        anchor = torch.where(saturation, value, x.mean(dim=(2, 3), keepdim=True))         # [N, 3, H, W]
        scale = torch.where(saturation, bounded, torch.where(brightness, 1.0, factor))
        return (torch.lerp(anchor, x, scale) + (factor - 1) * brightness).clamp_(0, 1)


def color_augmentation(variant, view, size):
    """The colors of view 1 or 2 (table of A.1). Blur's sigma is 0.1 to 2 pixels at 224."""
    same = dict(jitter_p=0.8, grayscale_p=0.2, sigma=(0.1 * size / 224, 2.0 * size / 224))
    if variant == "s":
        return Colors(0.8, 0.8, 0.8, 0.2, blur_p=[1.0, 0.0][view - 1], **same)
    return Colors(0.4, 0.4, 0.2, 0.1, blur_p=[1.0, 0.1][view - 1], solarize_p=[0.0, 0.2][view - 1], **same)


# --- Model (Sec. 3.1, A.2) -------------------------------------------------------------------------------------------

def mask_pool(h, masks):
    """h_m [N, M, C]: the means of c5 [N, C, h, w] over the cells, weighted by each mask [N, M, h, w]."""
    weight = masks / masks.sum(dim=(2, 3), keepdim=True)
    return torch.einsum("nmij,ncij->nmc", weight.to(h.dtype), h)


class Encoder(nn.Module):
    """f, mask pooling and the projector g: [N, 3, H, W] and masks [N, M, h, w] -> [N, M, dim]."""

    def __init__(self, arch, hidden, dim):
        super().__init__()
        self.backbone = common.resnet(arch, common.SyncBatchNorm, zero_init_residual=True)
        self.projector = common.mlp(self.backbone.channels[-1], hidden, dim, bias=False)

    def forward(self, x, masks):
        h = mask_pool(self.backbone(x)[-1], masks)                                        # [N, M, C5]
        return self.projector(h.flatten(0, 1)).unflatten(0, h.shape[:2])                  # z_m: [N, M, dim]


def detcon_loss(pred1, pred2, target1, target2, ids1, ids2, temperature, gather=True):
    """The loss of contrastive detection (Eq. 1 to 3) in nats, both directions added.

    Eq. 3 sums over pairs of draws. Here, as in the released code, all draws of one region together weigh 1, and the
    total is divided by M and averaged over the images.

    pred1, pred2, target1, target2: [N, M, D] of this process's N images, not normalized; S passes its projections as
    predictions and as targets, and trains through both. ids1, ids2: [N, M], equal if two draws are of one region.
    gather: contrast with the targets of all processes, [N*M, 2 * world*N*M] similarities; if not, only with those of
    these N images.
    """
    with torch.autocast(pred1.device.type, enabled=False):
        pred1, pred2, target1, target2 = (F.normalize(x, dim=2)
                                          for x in common.to_float32(pred1, pred2, target1, target2))
        mine = torch.arange(len(ids1), device=ids1.device)                                # its rows of the targets
        if gather:
            mine = mine + common.rank() * len(ids1)
            target1, target2 = common.all_gather(target1), common.all_gather(target2)     # [world*N, M, D]
        return (one_way(pred1 / temperature, target2, target1, ids1, ids2, mine)
                + one_way(pred2 / temperature, target1, target2, ids2, ids1, mine))


def one_way(pred, other, own, ids, other_ids, mine):
    """Eq. 3 from one view's predictions [N, M, D] to the targets of the `other` and of its `own` view [world*N, M, D].

    mine: [N], which rows of the targets belong to these images. The denominator of Eq. 1 has every target of the other
    view (as in the released code; the paper has one positive), and every target of the same view except those of the
    same region.
    """
    n, m, _ = pred.shape
    image = torch.arange(n, device=pred.device)
    similarity = lambda targets: (pred.flatten(0, 1) @ targets.flatten(0, 1).T).view(n, m, -1, m)
    across, within = similarity(other), similarity(own)                                   # [N, M, world*N, M] each
    same = ids[:, :, None] == ids[:, None]                                                # [N, M, M]
    within[image, :, mine] = within[image, :, mine].masked_fill(same, -1e9)               # same region: no negative
    all_targets = torch.logaddexp(across.flatten(2).logsumexp(2), within.flatten(2).logsumexp(2))
    paired = (ids[:, :, None] == other_ids[:, None]).float()                              # the indicator of Eq. 3
    count = paired.sum(dim=2)
    positive = (across[image, :, mine] * paired).sum(dim=2) / count.clamp(min=1)
    loss = all_targets - positive                                                         # Eq. 1, averaged by Eq. 2
    return (loss * (count > 0) / same.sum(dim=2)).mean()                                  # Eq. 3, each region once, / M


class DetCon(nn.Module):
    """The pretext task.

    variant: "s" has one network for both views; "b" has a target network too, which follows the online one by
    `update(momentum)`. size: of the views, in pixels. negatives: contrast groups of this many images separately.
    """

    def __init__(self, arch, variant="s", size=224, temperature=0.1, hidden=2048, dim=128, negatives=None):
        super().__init__()
        self.variant, self.temperature, self.negatives = variant, temperature, negatives
        self.photometric = nn.ModuleList(color_augmentation(variant, view, size) for view in (1, 2))
        self.online = Encoder(arch, hidden, dim)
        if variant == "b":
            self.predictor = common.mlp(dim, hidden, dim, bias=False)
            self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, batch):
        """(loss, stats). batch: x1, x2 [N, 3, S, S] uint8, ids1, ids2 [N, M], masks1, masks2 [N, M, h, w].

        Without x2 both sets of masks are of x1 (Table 5 b).
        """
        ids1, ids2, masks = batch["ids1"], batch["ids2"], [batch["masks1"], batch["masks2"]]
        if "x2" not in batch:
            masks = [torch.cat(masks, dim=1)]                                             # [N, 2M, h, w]
        views = [(self.photometric[i](batch[f"x{i + 1}"]), mask) for i, mask in enumerate(masks)]

        def encode(network):
            """The latents [N, M, dim] of masks1 and of masks2."""
            return [z for view in views for z in network(*view).split(ids1.shape[1], dim=1)]

        pred = target = encode(self.online)                                               # S: v_m and v'_m
        if self.variant == "b":
            pred = [self.predictor(z.flatten(0, 1)).view_as(z) for z in pred]             # B: v_m
            with torch.no_grad():
                target = encode(self.target)                                              # B: v'_m
        inputs = *pred, *target, ids1, ids2
        if self.negatives:                                                                # Table 5 a
            groups = zip(*(x.split(self.negatives) for x in inputs))                      # of that many images
            loss = torch.stack([detcon_loss(*group, self.temperature, gather=False) for group in groups]).mean()
        else:
            loss = detcon_loss(*inputs, self.temperature)
        return loss, self.stats(pred[0], target[1], ids1, ids2)

    @torch.no_grad()
    def stats(self, pred, target, ids, other_ids):
        """{"accuracy", "positive", "paired"}: how well view 1's predictions find view 2's targets, in this process.

        paired: share of the masks that have a pair, a target of their own region; accuracy: share of these whose
        nearest target is a pair; positive: mean similarity of pairs.
        """
        image = torch.arange(len(pred), device=pred.device)
        with torch.autocast(pred.device.type, enabled=False):
            pred, target = (F.normalize(x.float(), dim=2).flatten(0, 1) for x in (pred, target))
            similarity = (pred @ target.T).view(*ids.shape, *ids.shape)                   # [N, M, N, M]
        paired = ids[:, :, None] == other_ids[:, None]                                    # [N, M, M]
        own = similarity[image, :, image]                                                 # [N, M, M]
        similarity[image, :, image] = own.masked_fill(paired, -2)
        hit = own.masked_fill(~paired, -2).amax(dim=2) > similarity.flatten(2).amax(dim=2)
        has = paired.any(dim=2)
        return {"accuracy": (hit & has).sum() / has.sum().clamp(min=1),
                "positive": (own * paired).sum() / paired.sum().clamp(min=1), "paired": has.float().mean()}

    @torch.no_grad()
    def update(self, momentum):
        if self.variant == "b":
            common.momentum_update(self.target, self.online, momentum)


# --- Masks (Sec. 3.2) ------------------------------------------------------------------------------------------------

def felzenszwalb(image, scales):
    """Felzenszwalb-Huttenlocher segments, with the scale as minimum size: uint8 [H, W], or [H, W, 3] for three scales.

    H x W is the image's `shrunk_size`: the scales are meant for images as large as ImageNet's.
    """
    import cv2
    cv2.setNumThreads(1)  # every core has an image of its own
    pixels, labels = image.shrunk(), []
    for scale in scales:
        min_size, segments = scale, None
        while segments is None or segments.max() > 255:  # a label must fit in a byte: merge more of the small segments
            segments = cv2.ximgproc.segmentation.createGraphSegmentation(0.8, scale, min_size).processImage(pixels)
            min_size *= 2
        labels.append(segments.astype(np.uint8))
    return labels[0] if len(scales) == 1 else np.stack(labels, axis=2)


def make_masks(folder, source, scales, device):
    """Write a PNG of segments for each image, in subfolders like the data's, in all processes; keeps existing ones."""
    common.need_opencv("--masks fh", "--masks grid5")

    def write(k, file):
        Image.fromarray(felzenszwalb(source.image(k), scales)).save(file, "png")

    path = partial(mask_path, folder, source)
    common.make_files(f"masks of {len(source)} images", len(source), path, write, device)


def mask_path(folder, source, i):
    return Path(folder, source.name(i)).with_suffix(".png")


def read_mask(image, folder, source):
    """The masks of an image, from its PNG.

    8-bit gray or palette: a label map; RGB: three label maps; 16-bit gray: up to 16 masks that may overlap, one per
    bit. The PNG has the size of the image, or its `shrunk_size`.
    """
    path = mask_path(folder, source, image.index)
    if not path.exists():
        raise common.Unreadable(f"no mask {path}")
    with common.decoding():
        mask = np.asarray(common.open_image(path))
    if mask.dtype == np.int32 and mask.max() < 65536:
        mask = mask.astype(np.uint16)  # how some versions of Pillow read 16-bit gray
    if (mask.dtype, mask.shape[2:]) not in ((np.uint8, ()), (np.uint8, (3,)), (np.uint16, ()), (bool, ())):
        raise common.Unreadable(f"mask {path} is neither 8-bit (labels) nor 16-bit gray (one mask per bit)")
    if mask.shape[1::-1] not in (image.size, image.shrunk_size):
        width, height = image.size
        raise common.Unreadable(f"mask {path} is {mask.shape[1]} x {mask.shape[0]}, its image {width} x {height}")
    return mask.astype(np.uint8) if mask.dtype == bool else mask


GRIDS = {f"grid{n}": n for n in range(1, 17)}  # n x n squares (Figure 3); a label is a byte, and 16 x 16 is 256


def open_masks(args, source, device):
    """(masks(image), a text that identifies them) for --masks. Segments that are missing are made first."""
    if args.masks in GRIDS:
        n = GRIDS[args.masks]
        squares = np.arange(n * n).astype(np.uint8).reshape(n, n)
        return lambda image: squares, args.masks
    if args.masks == "truth":
        return lambda image: source.segments[image.index], args.masks
    common.check_stems(source)
    folder = args.masks
    if args.masks == "fh":
        folder = Path(args.out, "fh-" + "-".join(map(str, args.fh_scale)))
        make_masks(folder, source, args.fh_scale, device)
    elif not Path(folder).is_dir():
        common.fail(f"--masks {folder}: no such folder; take fh, grid1 to grid16, or a folder of masks")
    # Identify the masks by the content of 16 of them, wherever the folder lies.
    some = [mask_path(folder, source, len(source) * k // 16) for k in range(16)]
    content = zlib.crc32(b"".join(path.read_bytes() for path in some if path.is_file()))
    return partial(read_mask, folder=folder, source=source), f"masks {content:08x}"


# --- Training (A.3) --------------------------------------------------------------------------------------------------

COLORS = "red lime yellow cyan magenta orange white dodgerblue green purple brown pink".split()


def save_views(path, model, batch, source, make_views, seed):
    """Write views.png: the views of a few images, each beside its drawn masks; a region has one color in both views."""
    again = common.Views(source, partial(make_views, keep=True), seed)  # the same draws, with the pixels of each mask
    items, columns = [again[0, index] for index in batch["index"][:8].tolist()], []
    for i in (1, 2) if "x2" in batch else (1,):
        x = common.denormalize(model.photometric[i - 1](batch[f"x{i}"])[:8]).cpu()
        drawn = [draw_masks(picture, item[f"ids{i}"].tolist(), item[f"members{i}"]) for picture, item in zip(x, items)]
        columns += [x, torch.stack(drawn)]
    common.save_views(path, *columns)


def draw_masks(picture, ids, members):
    """A picture [3, S, S] in [0, 1] with its masks: ids [M], members bool [M, S, S]. A color stands for an id."""
    mask_of = dict(zip(ids, members))  # each region once, however often it was drawn
    colors = [COLORS[k % len(COLORS)] for k in mask_of]
    return draw_segmentation_masks(picture, torch.stack([*mask_of.values()]), 0.6, colors)


def arguments():
    parser = common.Parser(__doc__, PAPER, DEMO)
    add = parser.own.add_argument
    add("--variant", choices=["s", "b"], help="s: SimCLR's framework; b: BYOL's")
    add("--masks", metavar="fh|gridN|DIR", help="Felzenszwalb-Huttenlocher segments, made in OUT/fh-1000 if missing; "
        "N x N squares; a PNG for each image, in the same subfolders; or, in the demo, truth: the drawn objects' own")
    add("--fh-scale", type=common.bounded(int, 1), nargs="+", help="scale and minimum size; on COCO 500 1000 1500")
    add("--prepare", action="store_true", help="make the masks and stop")
    add("--num-masks", type=common.bounded(int, 1), help="M, the masks of a view in a step")
    add("--mask-pooling", choices=["soft", "hard", "sample"],
        help="soft: weight each cell by the share of it that the mask covers; hard: use only the cells of which the "
             "mask has the largest share, as in the released code; sample: use one random cell (Sec. 4.4)")
    add("--views", type=int, choices=[1, 2],
        help="1: pairs of masks within one view (Table 5 b, with --negatives 32 --mask-pooling sample)")
    add("--negatives", type=common.bounded(int, 1), metavar="N",
        help="contrast N images at a time (Table 5 a: 32; default: the whole batch)")
    add("--temperature", type=common.bounded(float, 1e-3), help="tau")
    add("--momentum", type=common.bounded(float, 0, 1), help="of b's target at the start (.99; .996 at 1000 epochs)")
    add("--weight-decay", type=common.bounded(float, 0), help="of weights; 1.5e-6 with b at 1000 epochs")
    add("--schedule", choices=["cosine", "steps"],
        help="steps: divide the rate by 10 at 96 %% and 98 %% of the run, as on COCO")
    add("--hidden", type=common.bounded(int, 1), help="width of the hidden layer of the heads; 4096 with b")
    add("--dim", type=common.bounded(int, 1), help="length of a latent; 256 with b")
    add("--warmup", type=common.bounded(float, 0), help="epochs in which the learning rate rises from 0")

    def variant(args):
        b = {**B, **(B_1000 if args.epochs >= 1000 else {})} if args.variant == "b" else {}
        return {**(GRID1 if args.masks == "grid1" else {}), **b}

    args = parser.parse(variant)
    if args.masks == "truth" and args.data is not None:
        common.fail("--masks truth is for the drawn shapes: take fh, gridN or a folder of masks")
    if args.variant == "s" and args.momentum is not None:
        common.fail("--momentum is for --variant b: DetCon-S has no target network")
    images = args.batch_size // common.world_size()
    if args.negatives and images % args.negatives:
        common.fail(f"--negatives {args.negatives} does not divide the {images} images of a process")
    if args.prepare and args.masks != "fh":
        common.fail(f"--prepare has nothing to make: --masks {args.masks} needs no preparation")
    if len(args.fh_scale) not in (1, 3):
        common.fail("--fh-scale takes one scale or three, the channels of an RGB PNG")
    return args


def main():
    device = common.init_distributed()
    args = arguments()
    source, monitor = common.open_data(args, single=False)
    if args.prepare:
        open_masks(args, source, device)
        return common.finish()
    common.seed_everything(args.seed)
    model = DetCon(args.arch, args.variant, args.size, args.temperature, args.hidden, args.dim, args.negatives)
    model.to(device, memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = common.LARS(trained, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    masks, args.masks = open_masks(args, source, device)  # now args.masks identifies them, wherever they lie
    run = common.Run(args, source, "detcon", model, optimizer)
    make_views = partial(views, masks=masks, size=args.size, num_masks=args.num_masks, pooling=args.mask_pooling,
                         count=args.views)
    batches = run.batches(make_views, device)
    ddp = common.wrap_ddp(model, device, args.compile)

    if monitor and run.step == 0:
        run.monitor(model.online, monitor, device)
    for batch in batches:
        if run.step == 0 and common.rank() == 0:
            common.seed_everything(args.seed, run.step, common.rank())
            save_views(Path(args.out, "views.png"), model, batch, source, make_views, args.seed)
        common.seed_everything(args.seed, run.step, common.rank())  # after save_views, which draws random numbers too
        lr = common.learning_rate(args.lr * args.batch_size / PAPER["batch_size"], run.step, run.total,
                                  round(args.warmup * run.steps_per_epoch),
                                  drops=(0.96, 0.98) if args.schedule == "steps" else None)
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            loss, stats = ddp(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step += 1
        if args.variant == "b":
            model.update(common.cosine(args.momentum, 1.0, run.step, run.total))
        if run.step % args.print_every == 0:
            run.log(loss, stats, lr)
        if monitor and run.step % run.steps_per_epoch == 0:
            run.monitor(model.online, monitor, device)
        if run.step % args.save_every == 0 or run.step == run.last:
            run.save()
    drawn = args.batch_size // common.world_size() * args.num_masks
    run.summary(accuracy=f"share of regions found again among {drawn} masks", positive="their similarity")
    common.finish()


if __name__ == "__main__":
    main()
