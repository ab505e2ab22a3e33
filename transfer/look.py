"""Draws the papers' figures for any checkpoints and any folder of images, or for drawn shapes if no --data is given.

    python transfer/look.py attention --init runs/detco/last.pt runs/moco/last.pt   where c5 is active: DetCo, Fig. 5, 6
    python transfer/look.py neighbors --init runs/detco/last.pt --data DIR          the nearest images: DetCo, Figure 7
    python transfer/look.py patches --init runs/dupr/last.pt runs/moco/last.pt      patches found again: DUPR, Figure 7
    python transfer/look.py iou --init runs/dupr/last.pt runs/moco/last.pt          similarity by IoU: DUPR, Figure 6
    python transfer/look.py proposals --data DIR --proposals boxes.npz              SoCo, Figures 2, 3, and its views
    python transfer/look.py masks --data DIR --masks grid5 fh                       DetCon, Figure 3
    python transfer/look.py curves runs/moco runs/dupr --stats loss knn             what log.jsonl holds

Each command writes one picture, --out. The same --seed gives the same picture. --init takes one or more networks to
compare: last.pt of a method, torchvision's weights of a ResNet, or the word random.
"""
import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageOps
from torchvision.ops import box_iou
from torchvision.utils import draw_segmentation_masks

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import detcon  # noqa: E402
import dupr  # noqa: E402
import soco  # noqa: E402
from transfer import convert  # noqa: E402
from transfer.page import SIDE, arrange, boxed, chart, heated, histogram, linked, picture, table, titled  # noqa: E402

MASK_COLORS = [ImageColor.getrgb(f"hsv({210 + 137.5 * k}, {70 - k % 3 * 15}%, {95 - k % 2 * 15}%)") for k in range(256)]


# --- Networks and images ---------------------------------------------------------------------------------------------

def networks(args, device):
    """{name: backbone}, one for each --init.

    Fills in --size: `args.times` times the largest view that any --init was trained on, or 224 if none is known.
    """
    found, sizes = {}, []
    for init in args.init:
        torch.manual_seed(args.seed)
        choice = argparse.Namespace(init=init, part=args.part, arch=args.arch, seed=args.seed)
        tensors, settings = convert.initial(choice)
        network = convert.build(choice.arch, tensors)
        name = Path(init).parent.name if Path(init).name == "last.pt" else Path(init).stem
        found[init if name in ("", *found) else name] = network.eval().to(device)
        if "size" in settings:
            sizes.append(settings["size"])
    args.size = args.size or args.times * max(sizes, default=224)
    return found


def stage_output(network, views, stage):
    """c2, c3, c4 or c5 of uint8 views [N, 3, S, S], whose colors stay as they are: [N, C, S/stride, S/stride]."""
    return network(common.Photometric().to(views.device)(views), stage - 1)[-1]


def open_images(args, single=False):
    """The images of --data, or drawn shapes, one in each image if `single`."""
    if args.data is None:
        return common.Shapes(args.shapes, args.size, args.seed, single).draw_all()
    if "truth" in (getattr(args, "proposals", None), *(getattr(args, "masks", None) or ())):
        common.fail("truth is for the drawn shapes: images of your own have none")
    return common.open_folder(args.data)


def pick(args, source):
    """[n]: the indices of --images random images."""
    return np.random.default_rng((5, args.seed)).permutation(len(source))[:args.images]


def load(args, source, view, images, device, collate=None):
    """One batch on the device: `view` of all `images`, which are indices."""
    batch = [(0, int(i)) for i in images]
    return next(iter(common.Loader(source, view, [batch], 0, device, args.seed, collate)))


def square_view(image, rng, size, center=False):
    """The whole image made square, as SoCo's V1 is, or its center crop, as kNN takes it."""
    crop = common.center_crop(image.size) if center else (0, 0, *image.size)
    return {"view": common.to_tensor(image.crop([crop], [size])[0])}


def recolored(views, colors):
    """uint8 views [N, 3, S, S] after a method's color augmentation."""
    return (common.denormalize(colors.to(views.device)(views)) * 255).byte()


def open_proposals(args, source, device):
    """A function proposals(image, rng), which returns boxes [n, 4] in xyxy pixels of the image."""
    kind = args.proposals or ("truth" if args.data is None else args.default_proposals)
    if kind == "search":
        common.need_opencv("--proposals search", "--proposals random")
        return lambda image, rng: soco.find_objects(source, image.index)
    if kind in ("random", "truth", "whole"):
        return soco.open_proposals(argparse.Namespace(proposals=kind), source, device)[0]
    return soco.read_proposals(kind, source)


# --- Attention (DetCo, Sec. 6.3.1) -----------------------------------------------------------------------------------

def attention_maps(c, stride, size):
    """[N, size, size] in [0, 1]: the mean of c [N, C, h, w] over its channels, enlarged to the size of the view.

    A cell covers stride x stride pixels. The last one may reach beyond the view.
    """
    mean = c.float().mean(dim=1, keepdim=True)
    mean = mean - mean.amin(dim=(2, 3), keepdim=True)
    maps = mean / mean.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    return F.interpolate(maps, scale_factor=stride, mode="bilinear")[:, 0, :size, :size]


def attention(args, device):
    """Where a stage is active: the mean of its channels as a heat map."""
    nets = networks(args, device)
    source = open_images(args)
    views = load(args, source, partial(square_view, size=args.size, center=True), pick(args, source), device)["view"]
    columns = {"image": [picture(x) for x in views]}
    for name, network in nets.items():
        maps = attention_maps(stage_output(network, views, args.stage), 2 ** args.stage, args.size)
        columns[f"{name}, c{args.stage}"] = [heated(image, heat) for image, heat in zip(columns["image"], maps)]
    return table(columns)


# --- Nearest neighbors (DetCo, Sec. 6.3.2) ---------------------------------------------------------------------------

@common.exact_products()
def nearest(rows, queries, k):
    """[Q, k]: the indices of the rows that are most similar to each query, without the query itself, the best first.

    rows: [N, C], L2-normalized; queries: [Q], indices of rows.
    """
    similarity = rows[queries] @ rows.T
    similarity[torch.arange(len(queries)), queries] = -2
    return similarity.topk(min(k, len(rows) - 1)).indices


def neighbors(args, device):
    """The images with the most similar features.

    A frame is green if the image is of the query's folder or kind of shape, and red if not.
    """
    nets = networks(args, device)
    source = open_images(args, single=True)
    if len(source) < 2:
        common.fail("one image has no neighbors")
    queries = pick(args, source)
    found = {}
    for name, network in nets.items():
        batches = common.extract_features(network, source, range(len(source)), args.size, device, args.workers,
                                          args.stage)
        rows = torch.cat([rows for _, rows in batches])                                   # [N, C]
        found[name] = nearest(rows, torch.from_numpy(queries).to(device), args.k).tolist()
    if args.data:
        classes = [os.path.dirname(source.name(i)) for i in range(len(source))]
    else:
        classes = source.labels()[0].tolist()
    one_class, view = len(set(classes)) == 1, partial(square_view, size=SIDE // 2, center=True)
    lines = []
    for n, query in enumerate(queries):
        for name in nets:
            near = found[name][n]
            views = load(args, source, view, [query, *near], device)["view"]
            colors = ["#00a000" if classes[i] == classes[query] else "#d00000" for i in near]
            colors = ["white"] + (["white"] * len(near) if one_class else colors)
            line = [ImageOps.expand(picture(x, SIDE // 2), 4, color) for x, color in zip(views, colors)]
            lines.append(titled(arrange(line, gap=0), f"{name}, c{args.stage}"))
    return arrange(lines, down=True, gap=2)


# --- Correspondence (DUPR, Sec. 4.6.2) -------------------------------------------------------------------------------

@common.exact_products()
def matches(q, k):
    """[N, h*w]: the index of the patch of view k that is most similar to each patch of view q.

    q, k: features [N, C, h, w]. Patches are counted row by row.
    """
    q, k = (F.normalize(x.float().flatten(2), dim=1) for x in (q, k))                     # [N, C, h*w]
    return (q.mT @ k).argmax(dim=2)


def counterparts(points, box_q, box_k, turned):
    """(where points of view q are in view k [N, P, 2]; which of them view k shows, bool [N, P]).

    points: [P, 2], x and y in pixels; box_q, box_k: [N, 1, 4], the intersection in pixels of each view; turned: bool
    [N], true if only one of the two views is mirrored.
    """
    place = (points - box_q[..., :2]) / (box_q[..., 2:] - box_q[..., :2])  # 0 to 1 across the intersection
    visible = ((place >= 0) & (place <= 1)).all(dim=2)
    mirrored = torch.stack([1 - place[..., 0], place[..., 1]], dim=2)
    place = torch.where(turned[:, None, None], mirrored, place)
    return torch.lerp(box_k[..., :2], box_k[..., 2:], place), visible


def overlapping_views(image, rng, size, min_area):
    """Two views of `dupr.two_views`: of eight pairs, the first that shares a quarter of each view, or else the one
    that shares most.
    """
    def overlap(batch):
        areas = [(batch[box][0, 2:] - batch[box][0, :2]).prod() / size ** 2 for box in ("box_q", "box_k")]
        return batch["overlap"] * min(0.25, *areas)

    return max((dupr.two_views(image, rng, size, min_area) for _ in range(8)), key=overlap)


def patches(args, device):
    """The most similar patch of another view for each patch of a view. Green lines join patches of the same place."""
    nets = networks(args, device)
    source, stride, scale = open_images(args), 2 ** args.stage, SIDE / args.size
    view = partial(overlapping_views, size=args.size, min_area=args.min_area)
    batch = load(args, source, view, pick(args, source), device)
    common.seed_everything(args.seed)
    views = [recolored(batch[x], dupr.color_augmentation()) for x in ("x_q", "x_k")]
    grid = torch.arange(-(-args.size // stride), device=device)                           # patches along a side
    points = (torch.cartesian_prod(grid, grid).flip(1) + 0.5) * stride                    # centers, x and y: [P, 2]
    truth, shared = counterparts(points, batch["box_q"], batch["box_k"], batch["flip_q"] ^ batch["flip_k"])
    shared &= batch["overlap"][:, None]                                                   # [N, P]
    step = -(-len(grid) // 8)                                                             # at most 8 x 8 lines a pair
    chosen = grid % step == step // 2
    drawn = shared & (chosen[:, None] & chosen).flatten()
    columns = {}
    for name, network in nets.items():
        matched = points[matches(*(stage_output(network, x, args.stage) for x in views))]  # [N, P, 2]
        found = ((matched - truth).abs().amax(dim=2) <= stride) & shared                  # at most one patch off
        column = []
        for left, right, ends, right_place, lines in zip(*views, matched, found, drawn):
            starts, ends = points[lines] * scale, ends[lines] * scale
            column.append(linked(picture(left), picture(right), starts, ends, right_place[lines]))
        share = found.sum() / shared.sum().clamp(min=1)
        columns[f"{name}, c{args.stage}: {share:.0%} of shared patches found"] = column
    return table(columns)


# --- IoU and similarity (DUPR, Sec. 4.6.1) ---------------------------------------------------------------------------

def rois_near(box, size, n, rng):
    """(boxes [n, 4] xyxy in a view of `size`; their IoUs with `box` [n], at about equal distances from 0 to 1)."""
    reach = rng.uniform(0, 1, (4000, 1))
    center, side = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    center = center + reach * rng.normal(0, 0.7, (4000, 2)) * side
    side = side * np.exp(reach * rng.normal(0, 0.5, (4000, 2)))
    boxes = np.concatenate([center - side / 2, center + side / 2], axis=1).clip(0, size)
    large = (boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= size / 28  # 8 pixels of 224
    boxes = np.concatenate([boxes[large], box[None]])
    iou = box_iou(torch.from_numpy(box[None]), torch.from_numpy(boxes))[0].numpy()
    closest = abs(iou - np.linspace(0, 1, n)[:, None]).argmin(axis=1)
    return boxes[closest], iou[closest]


def object_and_rois(image, rng, proposals, size, n=20):
    """view: the image made square; boxes: [1 + n, 4] in its pixels, an object and n RoIs near it; iou: [n], how much
    they overlap it. The object is a random proposal, or the whole image if there is none.
    """
    boxes = common.to_view(proposals(image, rng), np.array([0.0, 0, *image.size]), size).clip(0, size)
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
    box = boxes[rng.integers(len(boxes))] if len(boxes) else np.array([0.0, 0, size, size])
    rois, iou = rois_near(box, size, n, rng)
    return {**square_view(image, rng, size), "boxes": torch.from_numpy(np.stack([box, *rois])).float(),
            "iou": torch.from_numpy(iou).float()}


def similarity(c, boxes, stride):
    """[N, n]: how similar n RoIs are to an object (Eq. 9), with an S of 14, as in the paper for c4.

    c: features [N, C, h, w]; boxes: [N, 1 + n, 4], of which the first is the object's.
    """
    pooled = common.roi_align(c, boxes, 14, stride).unflatten(0, boxes.shape[:2])         # [N, 1 + n, C, S, S]
    return F.cosine_similarity(pooled[:, :1], pooled[:, 1:], dim=2).mean(dim=(2, 3))


def iou(args, device):
    """How similar an object and the RoIs near it are, at each IoU."""
    nets = networks(args, device)
    source = open_images(args)
    view = partial(object_and_rois, proposals=open_proposals(args, source, device), size=args.size)
    images, rows, first = pick(args, source), [], None

    def compare(batch):
        """[N, 20, 1 + networks]: the IoUs of the RoIs, and how similar each network finds them to their objects."""
        stages = [stage_output(network, batch["view"], args.stage) for network in nets.values()]
        return torch.stack([batch["iou"], *(similarity(c, batch["boxes"], 2 ** args.stage) for c in stages)], dim=2)

    for batch, values in common.map_images(compare, source, view, images, 16, device, args.workers, seed=args.seed):
        rows.append(values)
        first = first or batch
    points = torch.cat(rows).flatten(0, 1).cpu()                                          # [images * 20, 1 + networks]
    group = (points[:, 0] * 19).round()
    ious, *similarities = torch.stack([points[group == k].mean(dim=0) for k in group.unique()]).T.tolist()
    title = f"Similarity of an object and an RoI near it, c{args.stage}, {len(images)} images"
    charts = [chart(title, {name: (ious, values) for name, values in zip(nets, similarities)}, "IoU")]
    for k in (6, 11, 16):                                                                 # RoIs of the first image
        boxes = first["boxes"][0, [k + 1, 0]] * (SIDE / args.size)
        example = boxed(picture(first["view"][0]), boxes, ["#60b0ff", "red"])
        charts.append(titled(example, f"IoU {rows[0][0, k, 0]:.2f}, similarity {rows[0][0, k, 1]:.2f}"))
    return arrange(charts)


# --- Proposals and views (SoCo, Figures 2, 3) ------------------------------------------------------------------------

def proposals_and_views(image, rng, proposals, sizes, num_proposals):
    """view: the image made square; sample: up to ten of its proposals, [n, 4] in pixels of `view`; and SoCo's views."""
    boxes, frame = np.asarray(proposals(image, rng), float), np.array([0.0, 0, *image.size])
    sample = common.to_view(rng.permutation(boxes)[:10], frame, sizes[0]).clip(0, sizes[0])
    views = soco.object_views(image, rng, lambda *_: boxes, sizes, num_proposals, jitter_p=soco.PAPER["jitter"])
    return {**square_view(image, rng, sizes[0]), "sample": torch.from_numpy(sample), **views}


def proposals(args, device):
    """Proposals, and SoCo's views with the same boxes and their levels."""
    source, size = open_images(args), args.size
    scale, sizes = SIDE / size, [size, size, size // 2, size * 6 // 7][:args.views]  # SoCo's 224, 224, 112, 192
    boxes_of = open_proposals(args, source, device)
    view = partial(proposals_and_views, proposals=boxes_of, sizes=sizes, num_proposals=args.num_proposals)
    batch = load(args, source, view, pick(args, source), device, common.collate_lists)
    colors = soco.COLORS * max(2, args.num_proposals)
    columns = {"proposals": [boxed(picture(x), boxes * scale, colors)
                             for x, boxes in zip(batch["view"], batch["sample"])]}
    common.seed_everything(args.seed)
    for i, side in enumerate(sizes, start=1):
        views, column = recolored(torch.stack(batch[f"view{i}"]), soco.color_augmentation(i, size)), []
        for x, boxes in zip(views, batch[f"boxes{i}"]):
            labels = [f"P{2 + level}" for level in soco.assign_levels(boxes, size)]
            column.append(boxed(picture(x, SIDE * side // size), boxes * scale, colors, labels))
        columns[f"V{i}"] = column
    all_boxes = getattr(boxes_of, "boxes", ())  # of a file, or of drawn shapes
    if args.data is None or not len(all_boxes):
        return table(columns)
    sides = (all_boxes[:, 2:] - all_boxes[:, :2]).astype(float)
    figure_3 = [histogram(np.diff(boxes_of.offsets), "proposals per image"),
                histogram(np.sqrt(sides.prod(axis=1)), "sqrt(wh) of a proposal")]
    return arrange([table(columns), arrange(figure_3)], down=True)


# --- Masks (DetCon, Figure 3) ----------------------------------------------------------------------------------------

def open_masks(kind, source):
    """A function masks(image), as in detcon.py. With fh, it segments the image at once and makes no file."""
    if kind == "fh":
        common.need_opencv("--masks fh", "--masks grid5")
        return lambda image: detcon.felzenszwalb(image, detcon.PAPER["fh_scale"])
    if kind not in (*detcon.GRIDS, "truth") and not Path(kind).is_dir():
        common.fail(f"--masks {kind}: neither fh, nor grid1 to grid16, nor a folder")
    return detcon.open_masks(argparse.Namespace(masks=kind), source, None)[0]


def masks(args, device):
    """DetCon's masks, a column for each way to make them."""
    source = open_images(args)
    kinds = args.masks or ["grid5", "fh"] + ["truth"] * (args.data is None)
    masks_of = {kind: open_masks(kind, source) for kind in kinds}

    def view(image, rng):
        batch = square_view(image, rng, SIDE)
        for kind in kinds:
            labels = detcon.crop_labels(masks_of[kind](image), (0, 0, *image.size), image.size, SIDE)
            first = labels if labels.ndim == 2 else labels[..., 0]                        # of several scales
            ids = range(16) if labels.dtype == np.uint16 else np.unique(first).tolist()
            batch[kind] = torch.from_numpy(np.stack([detcon.member(first, k) for k in ids]))  # [masks, S, S]
        return batch

    batch = load(args, source, view, pick(args, source), torch.device("cpu"), common.collate_lists)
    columns = {"image": [picture(x) for x in batch["view"]]}
    for kind in kinds:
        columns[kind] = [picture(draw_segmentation_masks(x, members, 0.6, MASK_COLORS[:len(members)]))
                         for x, members in zip(batch["view"], batch[kind])]
    return table(columns)


# --- Training curves -------------------------------------------------------------------------------------------------

def curves(args, device):
    """What log.jsonl holds, a chart for each stat."""
    paths = [Path(path, "log.jsonl") if Path(path).is_dir() else Path(path) for path in args.logs]
    names = [path.resolve().parent.name for path in paths]
    logs = dict(zip(names if len(set(names)) == len(names) else args.logs, map(common.read_log, paths)))
    available = sorted({stat for rows in logs.values() for row in rows for stat in row} - {"epoch", "step"})
    if not all(logs.values()) or not available:
        common.fail("a log.jsonl is empty")
    charts = []
    for stat in args.stats or [stat for stat in ("loss", "accuracy", "knn") if stat in available] or available:
        lines = {}
        for name, rows in logs.items():
            points = [(row["step"], row[stat]) for row in rows
                      if isinstance(row.get(stat), (int, float)) and math.isfinite(row[stat])]
            if points:
                lines[name] = tuple(zip(*points))
        if not lines:
            common.fail(f"--stats {stat}: not in the logs, which have {', '.join(available)}")
        charts.append(chart(stat, lines, "step"))
    return arrange([arrange(charts[k:k + 3]) for k in range(0, len(charts), 3)], down=True)


# --- Command line ----------------------------------------------------------------------------------------------------

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: common.fail(f"{message} (see --help)")
    commands, count = parser.add_subparsers(required=True, metavar="PICTURE"), common.bounded(int, 1)

    def command(draw, images=4, stage=None, aliases=(), **settings):
        """Add the command `draw` and return its add_argument. stage: the default of --stage, if it needs networks.

        settings: shapes, how many are drawn without --data; times, the size of a view over that in training;
        default_proposals, the default of --proposals with --data.
        """
        own = commands.add_parser(draw.__name__, aliases=aliases, help=draw.__doc__, description=draw.__doc__)
        own.error = parser.error
        own.set_defaults(draw=draw, **settings)
        add = own.add_argument
        add("--out", default=f"{draw.__name__}.png", help="the picture, .png or .jpg (default: %(default)s)")
        if images:
            add("--data", metavar="DIR", help="images; DIR/train if there (default: drawn shapes)")
            add("--images", type=count, default=images, help="how many, drawn at random (default: %(default)s)")
            add("--seed", type=common.bounded(int, 0), default=0, help="of every random draw (default: 0)")
        if stage:
            convert.add_init(add, nargs="+")
            add("--stage", type=int, choices=[2, 3, 4, 5], default=stage, help="c2 to c5 (default: %(default)s)")
            add("--size", type=common.bounded(int, 32),
                help=f"side of a view in pixels (default: {settings['times']} x that in training)")
        return add

    command(attention, stage=5, times=2, shapes=64)
    add = command(neighbors, stage=5, times=1, shapes=1200, aliases=["neighbours"])
    add("-k", type=count, default=9, help="neighbors of each (default: 9)")
    add = command(patches, stage=4, times=2, shapes=64)
    add("--min-area", type=common.bounded(float, 1e-3, 1), default=0.2,
        help="least share of the image in a view (default: 0.2)")
    add = command(iou, images=1000, stage=4, times=1, shapes=1000, default_proposals="random")
    add("--proposals", metavar="FILE.npz|search|random|whole",
        help="the objects (default: random; shapes: their own boxes)")
    add = command(proposals, shapes=64, default_proposals="search")
    add("--proposals", metavar="FILE.npz|search|random|whole",
        help="as soco.py's; a file's number and sizes are drawn too (default: search; shapes: their own boxes)")
    add("--views", type=int, choices=[2, 3, 4], default=3, help="how many (default: 3)")
    add("--num-proposals", type=count, default=4, help="boxes of a view (default: 4)")
    add("--size", type=common.bounded(int, 32), default=SIDE, help="side of V1 in pixels (default: %(default)s)")
    add = command(masks, shapes=64, size=SIDE)
    add("--masks", nargs="+", metavar="gridN|fh|DIR",
        help="as detcon.py's, a column each (default: grid5 fh; shapes: their own masks too)")
    add = command(curves, images=0)
    add("logs", nargs="+", metavar="LOG", help="log.jsonl, or the folder of a run")
    add("--stats", nargs="+", help="which (default: loss, accuracy and knn)")
    return parser.parse_args()


@torch.no_grad()
def main():
    device, args = common.init_distributed(), arguments()
    kind = Image.registered_extensions().get(Path(args.out).suffix.lower())
    if not Path(args.out).parent.is_dir() or kind not in Image.SAVE:
        common.fail(f"--out {args.out}: it must be a picture, such as .png or .jpg, in a folder that exists")
    args.workers = common.cores() if device.type == "cuda" and getattr(args, "data", None) else 0
    sheet = args.draw(args, device)
    try:
        with common.atomic_write(args.out) as file:
            sheet.save(file, kind, optimize=True, quality=90)
    except (OSError, ValueError) as error:
        common.fail(f"cannot write {args.out}: {' '.join(str(error).split())}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
