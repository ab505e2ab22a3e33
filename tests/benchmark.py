"""What the project costs, each figure beside what it is compared with, in one run.

    python tests/benchmark.py                      everything that this machine can do
    python tests/benchmark.py loader scan          some of it, by the names that --help lists
    python tests/benchmark.py loader --images DIR  on your own JPEGs instead of drawn ones
    python tests/benchmark.py proposals --scenes DIR      on DIR/images with COCO boxes in DIR/annotations.json
    python tests/benchmark.py before --against CHECKOUT   steps of another checkout, such as an older one, beside these

Machines are noisy: quote the ratios, with the command.
"""
import argparse
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torch.utils.checkpoint import checkpoint
from torchvision.ops import box_iou, roi_align

sys.path.insert(0, os.environ.get("CHECKOUT") or str(Path(__file__).resolve().parents[1]))  # see `before`
import common  # noqa: E402
import detco  # noqa: E402
import detcon  # noqa: E402
import dupr  # noqa: E402
import fake_gpu  # noqa: E402
import moco  # noqa: E402
import soco  # noqa: E402
from transfer import coco_masks  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work, repeats=5):
    """Median time of work(), after one run that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def jpegs(folder, count, size):
    """JPEGs of drawn scenes, `size` = (width, height), smooth and noisy as photographs are."""
    for i in range(count):
        picture = Image.fromarray(common.Shapes(count, 256).scene(i)[0])
        picture.resize(size, Image.Resampling.BICUBIC).save(Path(folder, f"{i}.jpg"), quality=90)
    return folder


def loader(args, folder):
    """Images/s of one core: two uint8 views cut by a worker, and all of MoCo v2's augmentation there, on PIL."""
    source = common.ImageFolder(args.images or jpegs(folder, 48, (500, 375)))
    count = min(len(source), 96)
    blur = lambda image: image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))  # PIL's is the fastest
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    augment = T.Compose([T.RandomResizedCrop(224, (0.2, 1.0)), jitter, T.RandomGrayscale(0.2),
                         T.RandomApply([T.Lambda(blur)], p=0.5), T.RandomHorizontalFlip(), T.ToTensor(),
                         T.Normalize(common.MEAN, common.STD)])

    def theirs():
        for i in range(count):
            image = Image.open(source.root / source.name(i)).convert("RGB")
            augment(image), augment(image)

    ours = common.Views(source, partial(moco.two_views, size=224, min_area=0.2), seed=0)
    torch.set_num_threads(1)
    a, b = seconds(lambda: [ours[0, i] for i in range(count)]), seconds(theirs)
    print(f"loader: two 224-pixel views, images/s a core: {count / a:.0f} here, {count / b:.0f} with torchvision's "
          f"transforms on PIL in the worker, {b / a:.1f} times")


def photo(args, folder):
    """A 12-megapixel JPEG against one of ImageNet's size, decoded whole and at the scale the views allow."""
    sides = {"ImageNet's": (500, 375), "12-megapixel": (4000, 3000)}
    for name, size in sides.items():
        path = Path(jpegs(tempfile.mkdtemp(dir=folder), 1, size)) / "0.jpg"
        crops = [common.random_crop(size, (0.2, 1.0), np.random.default_rng(k)) for k in range(2)]
        cut = seconds(lambda: common.LazyImage(Image.open(path), 0).crop(crops, [224, 224]))
        whole = seconds(lambda: common.LazyImage(Image.open(path).convert("RGB"), 0).crop(crops, [224, 224]))
        print(f"photo: two views of a {name} JPEG {cut * 1000:.1f} ms, decoded whole {whole * 1000:.1f} ms")


def scan(args, folder):
    """A million paths: time and memory of the list, and what two workers that read it all add."""
    for a in range(1000):
        os.makedirs(f"{folder}/n{a:08d}")
        for b in range(1000):
            os.close(os.open(f"{folder}/n{a:08d}/n{a:08d}_{b}.JPEG", os.O_CREAT))

    def private(pid="self"):
        """Megabytes that a process does not share with another."""
        fields = Path(f"/proc/{pid}/smaps_rollup").read_text().split("\n")
        return sum(int(line.split()[1]) for line in fields if line.startswith("Private")) / 1024

    def growth(read):
        """Megabytes that a forked process gains by reading every path."""
        out, into = os.pipe()
        if os.fork() == 0:
            before = private()
            read()
            os.write(into, str(private() - before).encode())
            os._exit(0)
        os.wait()
        return float(os.read(out, 99))

    def peak():
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    before, start = peak(), time.perf_counter()
    source = common.ImageFolder(folder)
    took, grown = time.perf_counter() - start, peak() - before
    print(f"scan: {len(source)} paths in {took:.1f} s, {grown:.0f} MB more at the peak, "
          f"{(source.names.nbytes + source.ends.nbytes) / 2**20:.0f} MB kept")
    ours = growth(lambda: [0 for i in range(len(source)) if not source.name(i)])
    strings = [source.name(i) for i in range(len(source))]
    theirs = growth(lambda: [0 for name in strings if not name])
    print(f"scan: a worker that reads them all grows by {ours:.0f} MB; with a list of strings by {theirs:.0f} MB")


def photometric(args, folder):
    """The batch at once against torchvision's functions sample by sample, on this device."""
    n = 256 if DEVICE.type == "cuda" else 32
    batch = torch.randint(0, 256, (n, 3, 224, 224), dtype=torch.uint8, device=DEVICE)
    ours = moco.color_augmentation(2).to(DEVICE)
    theirs = T.Compose([T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), T.RandomGrayscale(0.2),
                        T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], p=0.5), T.Normalize(common.MEAN, common.STD)])
    a, b = seconds(lambda: ours(batch)), seconds(lambda: torch.stack([theirs(x / 255) for x in batch]), 2)
    print(f"photometric: {n} views of 224 pixels on {DEVICE.type}, {b / a:.1f} times as fast as sample by sample")


def bn(args, folder):
    """Eight BN groups: as modules that split, against the whole network eight times, against one group."""
    n, size, arch = (256, 224, "resnet50") if DEVICE.type == "cuda" else (128, 32, "resnet18w0.5")
    x = torch.randn(n, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def step(groups, parts):
        net = common.resnet(arch, partial(common.GroupBatchNorm2d, groups=groups))
        net.to(DEVICE, memory_format=torch.channels_last)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            return seconds(lambda: sum(net(part)[-1].square().mean() for part in x.chunk(parts)).backward())

    one, modules, passes = step(1, 1), step(8, 1), step(1, 8)
    print(f"bn: a step of {arch} with 8 BN groups takes {modules / one:.2f} of its time with one group, "
          f"as 8 passes of the network {passes / one:.2f}")


def by_level(pyramid, boxes, levels, size):
    """What most detectors do: the boxes of each level are looked up, which waits for the device, and pooled there."""
    rois = torch.cat([torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])[:, None],
                      boxes.flatten(0, 1)], dim=1)
    out = pyramid[0].new_zeros(len(rois), pyramid[0].shape[1], size, size)
    for level, p in enumerate(pyramid):
        mine = (levels.flatten() == level).nonzero()[:, 0]
        out[mine] = roi_align(p.float(), rois[mine], size, 1 / (4 * 2 ** level), aligned=True).to(out.dtype)
    return out


def one_sheet(pyramid, boxes, levels, size):
    """The levels below each other on one sheet, with borders that keep them apart, pooled in one call."""
    width = pyramid[0].shape[3]
    framed = [F.pad(p.float(), (1, 1, 1, 1), mode="replicate") for p in pyramid]
    sheet = torch.cat([F.pad(p, (0, width + 2 - p.shape[3])) for p in framed], dim=2)
    top = 1 + sum((levels > level) * p.shape[2] for level, p in enumerate(framed[:-1]))
    offset = torch.stack([torch.ones_like(top), top], dim=-1).repeat(1, 1, 2)
    return common.roi_align(sheet, boxes / (4 * 2 ** levels[..., None]) + offset, size, 1).to(pyramid[0].dtype)


def all_levels(pyramid, boxes, levels, size):
    """What SoCo's authors released: every level pools every box, and three of the four are masked away."""
    pooled = [common.roi_align(p, boxes, size, 4 * 2 ** level) for level, p in enumerate(pyramid)]
    return sum(x * (levels.flatten() == level).view(-1, 1, 1, 1) for level, x in enumerate(pooled))


def pool_once(how):
    """Seconds and peak memory, in MB over the pyramid, of pooling 4 boxes an image and back, as a view of SoCo does."""
    n = 256 if DEVICE.type == "cuda" else 32
    common.seed_everything(0)
    pyramid = [torch.randn(n, 256, side, side, device=DEVICE, requires_grad=True) for side in (56, 28, 14, 7)]
    low = torch.rand(n, 4, 2, device=DEVICE) * 112
    boxes = torch.cat([low, low + 24 + 88 * torch.rand_like(low)], dim=2)
    levels = soco.assign_levels(boxes, 224)

    def work():
        (how or soco.pyramid_roi_align)(pyramid, boxes, levels, 7).sum().backward()
        for p in pyramid:
            p.grad = None

    return measured(work)


def pyramid(args, folder):
    """SoCo's RoIAlign: boxes without area on other levels, one sheet, level by level, all boxes on all levels."""
    run = lambda how: multiprocessing.get_context("spawn").Pool(1).apply(pool_once, (how,))
    figures = {how.__name__ if how else "no area": run(how) for how in (None, one_sheet, by_level, all_levels)}
    for how, (took, memory) in figures.items():
        print(f"pyramid: pooling with {how}: {took * 1000:.0f} ms, {took / figures['no area'][0]:.2f} of no area's; "
              f"peak {memory:.0f} MB, {memory / figures['no area'][1]:.2f} of no area's", flush=True)


def family_step(name):
    """Seconds and peak memory, in MB over what the model takes, of a step of MoCo v2, DetCo or DUPR."""
    arch, n, size = ("resnet50", 64, 224) if DEVICE.type == "cuda" else ("resnet18w0.5", 16, 224)
    common.seed_everything(0)
    settings = dict(arch=arch, queue=65536)
    model = {"moco": lambda: moco.MoCo(images=10**6, **settings), "detco": lambda: detco.DetCo(**settings),
             "dupr": lambda: dupr.DUPR(**settings)}[name]().to(DEVICE, memory_format=torch.channels_last)
    image, rng = common.LazyImage(Image.fromarray(common.Shapes(1, 256).scene(0)[0]), 0), np.random.default_rng(0)
    views = {"moco": partial(moco.two_views, size=size, min_area=0.2),
             "detco": partial(detco.views, size=size, min_area=0.2),
             "dupr": partial(dupr.two_views, size=size, min_area=0.2)}[name]
    batch = {key: x.to(DEVICE)
             for key, x in torch.utils.data.default_collate([views(image, rng) for _ in range(n)]).items()}

    def work():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss, _ = model(batch)
        loss.backward()
        model.zero_grad()
        model.update()

    return measured(work)


def measured(work, repeats=None):
    """Seconds and peak memory in MB over what is taken before, of work()."""
    status = lambda name: int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        before = status("VmRSS:")
    took = seconds(work, repeats or (10 if DEVICE.type == "cuda" else 5))
    return took, (torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else status("VmHWM:")) - before


def overlap(args, folder):
    """Share of pairs of DUPR's crops that do not overlap, in images of ImageNet's usual size."""
    for smallest in (0.2, 0.08):
        rng, missed = np.random.default_rng(0), 0
        for _ in range(20000):
            a, b = (common.random_crop((500, 375), (smallest, 1.0), rng) for _ in range(2))
            missed += max(a[0], b[0]) >= min(a[2], b[2]) or max(a[1], b[1]) >= min(a[3], b[3])
        print(f"overlap: of 20000 pairs of crops of {smallest} or more {missed / 20000:.2%} do not overlap")


def checkpointed(q, k, overlap, negatives, temperature):
    """DUPR's patch loss: similarities of some rows kept as autograd does, or made again in the backward pass."""
    def rows(q, k):
        positive, others = (q * k).sum(dim=1) / temperature, q @ negatives.T / temperature
        return torch.logaddexp(positive, others.logsumexp(dim=1)) - positive, positive > others.amax(dim=1)

    parts = zip(q.flatten(0, 1).split(8192), k.flatten(0, 1).split(8192))
    losses, hits = (torch.cat(x) for x in zip(*(checkpoint(rows, *part, use_reentrant=False) for part in parts)))
    return losses.mean(), hits.float().mean()


def patch_loss(how, images):
    """Seconds and peak memory in MB of a patch loss on conv4_x, forward and backward, in the paper's queue."""
    common.seed_everything(0)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, 128, device=DEVICE), dim=-1)
    q, k, negatives = unit(images, 196).requires_grad_(), unit(images, 196), unit(65536)
    overlap = torch.ones(images, dtype=torch.bool, device=DEVICE)
    return measured(lambda: torch.autograd.grad(how(q, k, overlap, negatives, 0.15)[0], q))


def patches(args, folder):
    """DUPR's patch loss, in parts with its gradient against a checkpointed formula, at the paper's queue."""
    images = 256 if DEVICE.type == "cuda" else 20
    run = lambda how: multiprocessing.get_context("spawn").Pool(1).apply(patch_loss, (how, images))
    (new, memory), (old, more) = run(dupr.patch_nce), run(checkpointed)
    print(f"patches: {images * 196} rows, queue 65536: {new:.2f} s and {memory:.0f} MB; "
          f"checkpointed {old:.2f} s and {more:.0f} MB")


def family(args, folder):
    """Steps of DetCo and DUPR beside MoCo v2's."""
    run = lambda name: multiprocessing.get_context("spawn").Pool(1).apply(family_step, (name,))
    figures = {name: run(name) for name in ("moco", "detco", "dupr")}
    for name, (took, memory) in figures.items():
        print(f"family: a step of {name}: {took / figures['moco'][0]:.2f} of moco's time; peak {memory:.0f} MB, "
              f"{memory / figures['moco'][1]:.2f} of moco's")


def search(image, segments, histograms, scale, min_size):
    """Selective search whose segments and histograms may be in two color spaces -> [n, 4] xyxy pixels of the image.

    OpenCV has one space for both, so two are grouped by hand; of one space both ways find nearly the same boxes.
    """
    if segments == histograms:
        return soco.selective_search(image, segments, scale, min_size)
    import cv2
    from cv2.ximgproc import segmentation as cv
    pixels = image.shrunk()
    in_space = lambda space: pixels if space == "RGB" else cv2.cvtColor(pixels, getattr(cv2, f"COLOR_RGB2{space}"))
    labels = cv.createGraphSegmentation(0.9, scale, min_size).processImage(in_space(segments))
    size = np.bincount(labels.ravel()).tolist()
    strategy = cv.createSelectiveSearchSegmentationStrategyMultiple(
        cv.createSelectiveSearchSegmentationStrategyColor(), cv.createSelectiveSearchSegmentationStrategyTexture(),
        cv.createSelectiveSearchSegmentationStrategySize(), cv.createSelectiveSearchSegmentationStrategyFill())
    strategy.setImage(in_space(histograms), labels, np.array(size, np.int32)[:, None])
    y, x = np.indices(labels.shape)
    low, high = np.full((len(size), 2), max(labels.shape)), np.zeros((len(size), 2), int)
    np.minimum.at(low, labels, np.stack([x, y], axis=-1))
    np.maximum.at(high, labels, np.stack([x + 1, y + 1], axis=-1))
    boxes = [tuple(box) for box in np.concatenate([low, high], axis=1).tolist()]
    pairs = np.concatenate([np.stack([labels[:, :-1], labels[:, 1:]], axis=-1).reshape(-1, 2),
                            np.stack([labels[:-1], labels[1:]], axis=-1).reshape(-1, 2)])
    alike = {(a, b): strategy.get(a, b) for a, b in np.unique(np.sort(pairs), axis=0).tolist() if a != b}
    found = set(boxes)
    while alike:
        a, b = max(alike, key=alike.get)
        strategy.merge(a, b)                                             # b is now part of a
        boxes[a] = (*map(min, boxes[a][:2], boxes[b][:2]), *map(max, boxes[a][2:], boxes[b][2:]))
        found.add(boxes[a])
        near = {c for pair in alike if a in pair or b in pair for c in pair} - {a, b}
        alike = {pair: x for pair, x in alike.items() if a not in pair and b not in pair}
        alike |= {(a, c): strategy.get(a, c) for c in near}
    return np.array(sorted(found)) * np.tile(np.divide(image.size, labels.shape[::-1]), 2)


def true_boxes(scenes):
    """(images, {i: boxes [n, 4] xyxy}) of a folder with images/ and annotations.json, or else of drawn scenes."""
    if not scenes:
        source = common.Shapes(300, size=320)
        return source, {i: source.scene(i)[1] for i in range(len(source))}
    dataset = json.loads(Path(scenes, "annotations.json").read_text())
    source, truth = common.ImageFolder(Path(scenes, "images")), {}
    index = {source.name(i): i for i in range(len(source))}
    index = {image["id"]: index[image["file_name"]] for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        x, y, w, h = annotation["bbox"]
        truth.setdefault(index[annotation["image_id"]], []).append([x, y, x + w, y + h])
    return source, truth


PAPERS, RELEASED = ("HSV", "HSV", 500, 10), ("RGB", "HSV", 300, 100)     # segments, histograms, scale, min_size
MIXTURES = [PAPERS, ("RGB", "RGB", 500, 10), ("RGB", "HSV", 500, 10), ("HSV", "HSV", 300, 100), RELEASED]


def proposals(args, folder):
    """Selective search: seconds an image and core, proposals that pass the paper's filter, images without any.

    Where boxes are known (not with --images): of the objects of 0.3 to 0.8 of the image's side the share that a
    proposal meets with IoU 0.5, and of the proposals the share that meets one, beside as many random boxes.
    """
    source, truth = (common.ImageFolder(args.images), {}) if args.images else true_boxes(args.scenes)
    count = min(len(source), args.count)
    for setting in MIXTURES:
        rng, took, found, met, none, total = np.random.default_rng(0), 0.0, np.zeros(2), np.zeros(2), 0, 0
        objects, kept = 0, 0
        for i in range(count):
            image = source.image(i)
            start = time.perf_counter()
            boxes = search(image, *setting)
            took += time.perf_counter() - start
            w, h = (boxes[:, 2:] - boxes[:, :2]).T
            scale = np.sqrt(w * h / np.prod(image.size))
            boxes = boxes[(1 / 3 <= w / h) & (w / h <= 3) & (0.3 <= scale) & (scale <= 0.8)]
            kept, none = kept + len(boxes), none + (len(boxes) == 0)
            here = np.array(truth.get(i, []), float).reshape(-1, 4)
            side = np.sqrt((here[:, 2:] - here[:, :2]).prod(axis=1) / np.prod(image.size))
            here = here[(side >= 0.3) & (side <= 0.8)]
            objects += len(here)
            if len(here) and len(boxes):
                for k, others in enumerate((boxes, soco.random_boxes(image.size, len(boxes), rng))):
                    hits = box_iou(torch.from_numpy(here), torch.from_numpy(others)) >= 0.5
                    found[k] += hits.any(dim=1).sum().item()
                    met[k] += hits.any(dim=0).sum().item()
                total += len(boxes)
        name = "segments in {}, histograms in {}, scale {}, min_size {}".format(*setting)
        line = (f"proposals: {name}: {count} images, {took / count:.2f} s each; {kept / count:.1f} proposals each, "
                f"{none} images without any")
        if objects:
            line += (f"; of {objects} objects {found[0] / objects:.1%} found (as many random boxes: "
                     f"{found[1] / objects:.1%}), of the proposals {met[0] / total:.1%} meet one (random: "
                     f"{met[1] / total:.1%})")
        print(line, flush=True)


def loss_memory(dim):
    """Peak memory in MB of DetCon's loss, forward and backward, in one of the paper's 128 processes with 32 images."""
    common.seed_everything(0)
    gathered = cycle(torch.randn(2, 4096, 16, dim, device=DEVICE, requires_grad=True))
    latents = [torch.randn(32, 16, dim, device=DEVICE, requires_grad=True) for _ in range(2)]
    ids = torch.randint(0, 12, (2, 32, 16), device=DEVICE)
    common.all_gather = lambda x: next(gathered)
    return measured(lambda: detcon.detcon_loss(*latents, *latents, *ids, 0.1).backward())[1]


def contrast(args, folder):
    """Memory of DetCon's loss in the paper's setting, where the square of the global batch would take 69 GB."""
    for variant, dim in (("S", 128), ("B", 256)):
        memory = multiprocessing.get_context("spawn").Pool(1).apply(loss_memory, (dim,))
        print(f"contrast: the loss of DetCon-{variant}, 32 of 4096 images, 16 masks: {memory:.0f} MB, "
              "forward and backward")


def masks(args, folder):
    """Felzenszwalb-Huttenlocher masks: images/s of a core, and average best overlap (Fig. 7) of them and of a grid."""
    if args.scenes:
        dataset = json.loads(Path(args.scenes, "annotations.json").read_text())
        source = common.ImageFolder(Path(args.scenes, "images"))
        number = {source.name(i): i for i in range(len(source))}
        number = {image["id"]: number[image["file_name"]] for image in dataset["images"]}
        truth = {}
        for annotation in dataset["annotations"]:
            mask = coco_masks.decode(annotation["segmentation"], tuple(annotation["segmentation"]["size"][::-1]))
            truth.setdefault(number[annotation["image_id"]], []).append(mask)
    else:
        source = common.Shapes(300, size=320)
        truth = {i: source.scene(i)[2] for i in range(len(source))}
    took, overlaps = 0.0, {"fh": [], "grid5": []}
    for i in range(min(len(source), 300)):
        image, start = source.image(i), time.perf_counter()
        segments = detcon.felzenszwalb(image, [args.fh_scale])
        took += time.perf_counter() - start
        height, width = segments.shape
        grid = np.arange(25).reshape(5, 5)[np.arange(height)[:, None] * 5 // height, np.arange(width) * 5 // width]
        for mask in truth.get(i, []):
            mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
            for name, labels in (("fh", segments), ("grid5", grid)):
                inside, sizes = np.bincount(labels[mask], minlength=256), np.bincount(labels.ravel(), minlength=256)
                overlaps[name].append((inside / (sizes + mask.sum() - inside)).max())
    print(f"masks: {i + 1} images of about {width} x {height}, {(i + 1) / took:.1f} a second and core; "
          f"average best overlap with {len(overlaps['fh'])} "
          f"objects: fh {np.mean(overlaps['fh']):.1%}, grid5 {np.mean(overlaps['grid5']):.1%}")


def pooled_one_by_one(mask, cells, n, rng):
    """The masks of a view as most codes make them: each drawn one in full, then average-pooled."""
    ids = rng.choice(np.flatnonzero(np.bincount(mask.ravel())), n)
    members = torch.from_numpy(np.stack([mask == k for k in ids]))
    return ids, torch.nn.functional.adaptive_avg_pool2d(members.float(), cells).numpy()


def pooling(args, folder):
    """CPU-ms for the masks of a pair of views: all regions counted at once, against 16 full-size masks."""
    torch.set_num_threads(1)
    source, rng = common.Shapes(16, size=500), np.random.default_rng(0)
    labels = [source.labeled_scene(i)[3] for i in range(16)]
    mask = lambda i: detcon.crop_labels(labels[i], common.random_crop((500, 500), (0.08, 1.0), rng), (500, 500), 224)
    pairs = [(mask(i), mask(i)) for i in range(16)]
    counted = lambda mask, cells, n, rng: detcon.draw(detcon.shares(mask, cells), n, rng)
    took, results = {}, {}
    for how in (counted, pooled_one_by_one):
        rng, start = np.random.default_rng(0), time.process_time()
        for _ in range(10):
            results[how] = [how(mask, 7, 16, rng) for pair in pairs for mask in pair]
        took[how] = 1000 * (time.process_time() - start) / 160
    assert all(np.array_equal(x, y) for a, b in zip(*results.values()) for x, y in zip(a, b))
    print(f"pooling: the masks of a pair of views take {took[counted]:.2f} CPU-ms, as 16 full-size masks each "
          f"{took[pooled_one_by_one]:.2f} CPU-ms; the same numbers")


PER_GPU = {"moco": 256, "detco": 128, "dupr": 128, "soco": 128, "detcon_s": 128, "detcon_b": 128}  # images a step


def count(args, folder):
    """What a step asks of a GPU, without one: waits of the host, launches, memory traffic, memory at the peak.

    Alone with the images of PER_GPU, and as one of 8 processes that share the paper's batch.
    """
    for name in PER_GPU:
        paper = importlib.import_module(name.split("_")[0]).PAPER["batch_size"]
        for world, images in ((1, PER_GPU[name]), (8, paper // 8)):
            ledger = fake_gpu.counted(name, world, "resnet50", 224, images)
            print(f"count: {name}, {images} images, one of {world} processes: {len(ledger.waits)} waits, "
                  f"{ledger.launches} launches, {ledger.bytes / 2**30:.1f} GB moved, "
                  f"{ledger.peak / 2**30:.1f} GB at the peak", flush=True)


def a_batch(name, size, images):
    """A batch of a method on DEVICE: noise, with boxes that hold some of it."""
    batch = {}
    for key, (shape, kind) in fake_gpu.shapes(name, size).items():
        x = torch.zeros(images, *shape, dtype=kind, device=DEVICE)
        if kind == torch.uint8:
            x.random_(256)
        elif "box" in key:
            x[..., 2:] = size / 2.24
        elif "mask" in key or key == "overlap":
            x.fill_(1)
        batch[key] = x
    return batch


def cpu_step(name):
    """CPU-seconds and peak memory in MB of a step of a method: 16 images of 224 pixels, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, optimizer = fake_gpu.build(name, "resnet18w0.5", 224, splits=1)
    model.to(memory_format=torch.channels_last)
    optimizer, batch = optimizer([p for p in model.parameters() if p.requires_grad]), a_batch(name, 224, 16)
    took = []

    def work():
        start = time.process_time()
        fake_gpu.step(name, model, optimizer, batch)
        took.append(time.process_time() - start)

    memory = measured(work, repeats=3)[1]
    return float(np.median(took[1:])), memory


def before(args, folder):
    """Steps of all methods on the CPU, here and in the checkout --against, in turns."""
    if not args.against:
        print("before: needs --against CHECKOUT")
        return
    for name in PER_GPU:
        figures = {"": [], args.against: []}
        for checkout in [*figures] * 2:
            os.environ["CHECKOUT"] = checkout
            figures[checkout].append(multiprocessing.get_context("spawn").Pool(1).apply(cpu_step, (name,)))
        (here, memory), (there, more) = (np.mean(pairs, axis=0) for pairs in figures.values())
        print(f"before: a step of {name}: {here:.2f} CPU-s and {memory:.0f} MB here, "
              f"{there:.2f} CPU-s and {more:.0f} MB there: "
              f"{there / here:.2f} times the time, {more / memory:.2f} times the memory", flush=True)


def step(args, folder):
    """Images/s of each script and of its bare step on data on the GPU, their ratio, memory, and time by part."""
    if DEVICE.type != "cuda":
        print("step: needs CUDA; `count` says what can be known without")
        return
    jpegs(folder, 2048, (500, 375))
    for name, images in PER_GPU.items():
        model, optimizer = fake_gpu.build(name, "resnet50", 224, splits=8)
        model.to(DEVICE, memory_format=torch.channels_last)
        optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
        batch = a_batch(name, 224, images)
        torch.cuda.reset_peak_memory_stats()
        work = partial(fake_gpu.step, name, model, optimizer, batch)
        bare, memory = images / seconds(work, 20), torch.cuda.max_memory_allocated() / 2**30
        with torch.profiler.profile() as profile:
            work()
        table = profile.key_averages().table(sort_by="self_device_time_total", row_limit=12)
        del model, optimizer, batch
        script, *variant = name.split("_")
        file, out = Path(common.__file__).with_name(f"{script}.py"), Path(folder, f"{name}-run")
        command = [sys.executable, file, "--data", folder, "--out", out, "--batch-size", images, "--epochs", 20,
                   "--max-steps", 80, "--print-every", 10]
        command += ["--variant", *variant, "--masks", "grid5"] if variant else []
        command += ["--proposals", "random"] if script == "soco" else []
        command += ["--queue", 1024] if script in ("moco", "detco", "dupr") else []
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
        whole = float(np.median([row["images_per_s"] for row in rows[2:]]))
        print(f"step: {name}, ResNet-50, 224 pixels, {images} images, bf16: {bare:.0f} images/s on resident data, "
              f"{whole:.0f} the whole script, {whole / bare:.2f} of it, "
              f"{rows[-1]['data_wait']:.0%} of the time waiting for data; {memory:.1f} GB")
        print(table, flush=True)


PARTS = ("loader photo scan photometric bn pyramid proposals contrast masks pooling family patches overlap count "
         "before step").split()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*",
                        help=f"{' '.join(PARTS)} (default: all)")
    parser.add_argument("--images", help="folder of images for `loader`, `proposals`")
    parser.add_argument("--count", type=int, default=300, help="images for `proposals`, at most")
    parser.add_argument("--scenes",
                        help="folder with images/ and annotations.json in COCO's format for `proposals`, `masks`")
    parser.add_argument("--against", metavar="CHECKOUT", help="another checkout of the project, for `before`")
    parser.add_argument("--fh-scale", type=int, default=1000, help="for `masks`")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}, {os.cpu_count()} cores")
    for name in args.what or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            globals()[name](args, folder)
