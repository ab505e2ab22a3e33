"""DUPR: Deeply Unsupervised Patch Re-Identification for Pre-training Object Detectors (Ding et al., TPAMI 2024).

MoCo v2 at every stage of the backbone, plus a second contrast, between patches: the region that two views of an image
share is divided into an S x S grid in both, and the feature of a patch must find, among those of patches of other
images, the feature of the same patch in the other view. The features then tell places apart, as detection needs.

    python dupr.py                                              shapes that it draws itself, a minute or two
    python dupr.py --data DIR                                   your own images
    torchrun --nproc_per_node=8 dupr.py --data /imagenet        as in the paper's main experiments
    python dupr.py --data DIR --augment rand-moves              as the paper's text literally says: patches move
    python dupr.py --data DIR --augment moco                    as in its ablations: no RandAugment, temperature 0.2

Writes last.pt, log.jsonl and views.png to --out; run the same command again to resume. In last.pt, the backbone is
in `model`, under torchvision's ResNet names with the prefix `encoder_q.backbone.`. No code for pre-training was
released: comments say what was decided where the paper leaves something open.
"""
import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageOps
from torchvision.transforms import RandAugment
from torchvision.utils import draw_bounding_boxes

import common

PAPER = dict(  # the main experiments on ImageNet; lr is for batch_size
    arch="resnet50", size=224, epochs=200, batch_size=256, lr=0.06, warmup=0, print_every=50,
    alpha=[0.1, 0.4, 0.7, 1.0], beta=[0.0, 0.0, 1.0, 1.0], queue=65536, patch_keys=32, momentum=0.999,
    temperature=0.15, dim=128, min_area=0.2, augment="rand", augment_magnitude=28,
    workers=32)  # about what one H100 needs, estimated

ABLATION = dict(temperature=0.2)  # with --augment moco

DEMO = dict(
    arch="resnet18w0.25", size=48, epochs=5, warmup=1, print_every=32, min_area=0.4, queue=512, momentum=0.95,
    augment="moco")


# --- Views (Sec. 3.2.1) ----------------------------------------------------------------------------------------------

def two_views(image, rng, size, min_area, augment="moco", magnitude=28):
    """Two random crops, each mirrored half of the time, and the box that they share. q and k are the paper's 1 and 2.

    x_q and x_k: views, uint8 [3, size, size]; flip_q and flip_k: whether each is mirrored; overlap: whether the crops
    intersect; box_q and box_k: [1, 4], the intersection in xyxy pixels of each view (the whole view if they do not).
    """
    r1, r2 = (common.random_crop(image.size, (min_area, 1.0), rng) for _ in range(2))                # Eq. 3
    b = max(r1[0], r2[0]), max(r1[1], r2[1]), min(r1[2], r2[2]), min(r1[3], r2[3])                   # Eq. 4
    overlap = b[0] < b[2] and b[1] < b[3]
    batch = {"overlap": torch.tensor(overlap)}
    for name, r, view in zip("qk", (r1, r2), image.crop([r1, r2], [size, size])):
        flip = bool(rng.random() < 0.5)
        if flip:
            view = ImageOps.mirror(view)
        if augment != "moco":
            operations = RandAugment if augment == "rand-moves" else ColorRandAugment
            view = common.rand_augment(view, rng, magnitude, operations)
        box = common.to_view(np.array([b if overlap else r]), r, size, flip)                         # B_1, B_2
        batch[f"x_{name}"] = common.to_tensor(view)
        batch[f"box_{name}"] = torch.from_numpy(box).float()
        batch[f"flip_{name}"] = torch.tensor(flip)
    return batch


class ColorRandAugment(RandAugment):
    """torchvision's RandAugment without the operations that move pixels, since they would move patches too.

    The paper does not leave them out (Sec. 3.2.3); --augment rand-moves keeps them.
    """

    def _augmentation_space(self, *args):
        space = super()._augmentation_space(*args)
        return {name: x for name, x in space.items() if not name.startswith(("Shear", "Translate", "Rotate"))}


def color_augmentation():
    """MoCo v2's colors."""
    return common.Photometric(0.4, 0.4, 0.4, 0.1, jitter_p=0.8, grayscale_p=0.2, blur_p=0.5)


# --- Model (Sec. 3.2) ------------------------------------------------------------------------------------------------

class Encoder(nn.Module):
    """The backbone and two kinds of heads: h, an MLP for the pooled features of each level with alpha > 0; g, an MLP of
    1x1 convolutions for the patches of each level with beta > 0.

    The hidden layers are as wide as c5 (2048) at every level: the paper gives no width, and this is MoCo v2's. We
    take its "pixel-wise MLP [...] implemented by a 1x1 convolution" (Sec. 3.2.1) to be two of them, like h.
    """

    def __init__(self, arch, alpha, beta, dim, bn_splits, roi_size=None):
        super().__init__()
        self.roi_size = roi_size
        self.backbone = common.resnet(arch, partial(common.GroupBatchNorm2d, groups=bn_splits))
        self.image_levels, self.patch_levels = ([m for m in range(4) if weights[m]] for weights in (alpha, beta))
        self.depth = 1 + max(self.image_levels + self.patch_levels)
        self.backbone.train_first(self.depth)
        channels, hidden = self.backbone.channels, self.backbone.channels[-1]
        mlp = lambda layer, width: nn.Sequential(layer(width, hidden), nn.ReLU(inplace=True), layer(hidden, dim))
        self.h = nn.ModuleList(mlp(nn.Linear, channels[m]) for m in self.image_levels)
        self.g = nn.ModuleList(mlp(partial(nn.Conv2d, kernel_size=1), channels[m]) for m in self.patch_levels)

    def forward(self, x, box, flip):
        """Normalized features of a view: v, [N, dim] of each image level, and r, [N, S*S, dim] of each patch level.

        x: [N, 3, H, W]; box: [N, 1, 4], the region that both views share, xyxy in pixels of x; flip: [N], whether x is
        mirrored. Patch p is the same place in both views. S is roi_size, or else the side of the level's feature map:
        at 224 pixels 14 on conv4_x and 7 on conv5_x (Sec. 4.5.3; one sentence of Sec. 3.2.3 swaps the two).
        """
        f = self.backbone(x, self.depth)
        v = [h(f[m].mean(dim=(2, 3))) for m, h in zip(self.image_levels, self.h)]
        r = []
        for m, g in zip(self.patch_levels, self.g):
            side = self.roi_size or f[m].shape[-1]
            region = g(common.roi_align(f[m], box, side, stride=4 * 2 ** m))              # Eq. 5, 6: [N, dim, S, S]
            region = torch.where(flip.view(-1, 1, 1, 1), region.flip(3), region)          # mirrored back
            r.append(region.flatten(2).mT)                                                # [N, S*S, dim]
        normalize = lambda features: [F.normalize(f.float(), dim=-1) for f in features]
        return normalize(v), normalize(r)


class DUPR(nn.Module):
    """The pretext task.

    alpha, beta: weights of the image and patch losses of conv2_x to conv5_x (Eq. 2); a loss of weight 0 costs nothing.
    patch_keys: how many patches of the global batch enter a level's queue in a step ("we sample 32 patch features per
    batch", Sec. 3.2.3), however many processes there are. roi_size: S of every level (None: the side of its feature
    map). bn_splits: BN groups of a process.
    """

    def __init__(self, arch, alpha=(0.1, 0.4, 0.7, 1.0), beta=(0.0, 0.0, 1.0, 1.0), queue=65536, patch_keys=32,
                 momentum=0.999, temperature=0.15, dim=128, bn_splits=1, roi_size=None):
        super().__init__()
        self.alpha, self.beta = ([weight for weight in weights if weight] for weights in (alpha, beta))
        self.patch_keys, self.momentum, self.temperature = min(patch_keys, queue), momentum, temperature
        self.photometric = color_augmentation()
        self.encoder_q = Encoder(arch, alpha, beta, dim, bn_splits, roi_size)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.image_queues = nn.ModuleList(common.Queue(dim, queue) for _ in self.alpha)   # one for each loss
        self.patch_queues = nn.ModuleList(common.Queue(dim, queue) for _ in self.beta)

    def forward(self, batch):
        """(loss of Eq. 2, stats). batch: what `two_views` gives, N of each."""
        v_q, r_q = self.encoder_q(self.photometric(batch["x_q"]), batch["box_q"], batch["flip_q"])
        shuffle = common.Shuffle(len(batch["x_k"]), batch["x_k"].device)                  # for every input of encoder_k
        with torch.no_grad():
            x, box, flip = (shuffle(batch[name]) for name in ("x_k", "box_k", "flip_k"))
            v_k, r_k = self.encoder_k(self.photometric(x), box, flip)
            v_k, r_k = ([shuffle.undo(k) for k in keys] for keys in (v_k, r_k))
        self.new = v_k, r_k, batch["overlap"]                                             # for `update`
        loss, stats = 0, {}
        for weight, q, k, queue in zip(self.alpha, v_q, v_k, self.image_queues):
            loss = loss + weight * common.info_nce(q, k, queue.keys, self.temperature)    # Eq. 8
        if v_q:
            stats["accuracy"] = common.pretext_accuracy(v_q[-1], v_k[-1], self.image_queues[-1].keys)
        for weight, q, k, queue in zip(self.beta, r_q, r_k, self.patch_queues):
            patch_loss, accuracy = patch_nce(q, k, batch["overlap"], queue.keys, self.temperature)  # Eq. 7
            loss = loss + weight * patch_loss                                             # Eq. 2
            stats["accuracy_patch"] = accuracy                                            # of the last level
        stats["overlap"] = batch["overlap"].float().mean()
        return loss, stats

    @torch.no_grad()
    def update(self):
        """Let encoder_k follow encoder_q and put the new keys into the queues, after the optimizer's step (Sec. 3.2.3).

        Each image queue takes the keys of all images, each patch queue takes `patch_keys` patches.
        """
        common.momentum_update(self.encoder_k, self.encoder_q, self.momentum)
        v_k, r_k, overlap = self.new
        for k, queue in zip(v_k, self.image_queues):
            queue.enqueue(k)
        for k, queue in zip(r_k, self.patch_queues):
            keys, count = sample_patches(k, overlap, self.patch_keys)
            queue.put(keys, count)


def sample_patches(k, overlap, count):
    """Draws `count` patches from the overlapping pairs of the global batch: (keys [count, D], how many are valid).

    k: [N, P, D] of this process; overlap: [N] bool. All processes get the same rows. If the pairs have fewer patches
    than `count`, only the first rows are valid; the others, from pairs that do not overlap, keep the shape fixed.
    """
    score = torch.rand(k.shape[:2], device=k.device) + overlap[:, None]  # 1 or more for those to draw from
    score, mine = score.flatten().topk(min(count, score.numel()))
    score, keys = common.all_gather(score), common.all_gather(k.flatten(0, 1)[mine])
    score, drawn = score.topk(min(count, len(score)))
    return keys[drawn], (score >= 1).sum()


def patch_nce(q, k, overlap, negatives, temperature):
    """(loss of Eq. 7 in nats, share of patches that are nearer to their own key than to every negative).

    q, k: [N, P, D], the same P places in two views; overlap: [N] bool; negatives: [K, D]. Both results are scaled so
    that their mean over processes is the mean over the patches of all overlapping pairs; 0 if there is no such pair.
    Eq. 7 sums over the patches; we average, or the patch loss would weigh 49 (conv5_x) or 196 (conv4_x) times as much.
    """
    rows = common.to_float32(q.flatten(0, 1), k.flatten(0, 1), negatives)
    losses, hits = InfoNCEInParts.apply(*rows, temperature)
    weight = overlap.float()[:, None] / q.shape[1]                                        # [N, 1]
    pairs = common.all_gather(overlap.float()).sum().clamp(min=1) / common.world_size()   # that overlap, per process
    mean = lambda x: (x.view(q.shape[:2]) * weight).sum() / pairs
    return mean(losses), mean(hits.float())


PART = 2 ** 26  # similarities at a time: 0.27 GB


class InfoNCEInParts(torch.autograd.Function):
    """For each row of q [R, D], its term of Eq. 7, and whether its key in k [R, D] is nearer than every negative.

    Only q gets a gradient. For 256 images R is 50176 on conv4_x, and the R x K similarities alone would take 13 GB, so
    we take a few rows at a time and compute their loss and gradient from one softmax.
    """

    @staticmethod
    def forward(ctx, q, k, negatives, temperature):
        def rows_at_once(q, k):  # [n, D] each
            positive = (q * k).sum(dim=1) / temperature
            logits = (q / temperature) @ negatives.T                                      # [n, K]
            nearest = logits.amax(dim=1)
            top = torch.maximum(positive, nearest)
            own, others = (positive - top).exp(), logits.sub_(top[:, None]).exp_()
            total = own + others.sum(dim=1)
            mean_key = (own[:, None] * k + others @ negatives) / total[:, None]           # weighted by the softmax
            gradient = (mean_key - k) / temperature                                       # of the loss, for q
            return total.log() + top - positive, positive > nearest, gradient

        n = max(1, PART // len(negatives))
        with torch.autocast(q.device.type, enabled=False):                                # see common.info_nce
            parts = [rows_at_once(*rows) for rows in zip(q.split(n), k.split(n))]
        losses, hits, gradient = (torch.cat(part) for part in zip(*parts))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx, grad, _):
        gradient, = ctx.saved_tensors
        return grad[:, None] * gradient, None, None, None


# --- Training --------------------------------------------------------------------------------------------------------

def save_views(path, model, batch):
    """Write views.png: both views of a few images with the S x S grid in their intersection.

    The same number marks the same place in both. S is --roi-size or conv5's own, 7 at 224 pixels.
    """
    columns = []
    for name in "qk":
        views = common.denormalize(model.photometric(batch[f"x_{name}"])[:8])
        side = model.encoder_q.roi_size or -(-views.shape[-1] // 32)
        factor = 448 // views.shape[-1] + 1                                               # for legible numbers
        views = F.interpolate(views, scale_factor=factor).cpu()
        boxes = batch[f"box_{name}"].cpu() * factor
        rows = zip(views, boxes, batch[f"flip_{name}"], batch["overlap"])
        columns.append(torch.stack([draw_grid(view, box, side, flip) if overlap else view
                                    for view, box, flip, overlap in rows]))
    common.save_views(path, *columns)


def draw_grid(view, box, side, flip):
    """A view [3, H, H] in [0, 1] with side x side cells in its box [1, 4], numbered from the right if `flip`."""
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)          # (column, row) of each cell
    if flip:
        place[:, 0] = side - 1 - place[:, 0]
    cell = (box[:, 2:] - box[:, :2]) / side                                               # width, height
    corner = box[:, :2] + place * cell
    numbers = [str(p) for p in range(side ** 2)]
    cells = torch.cat([corner, corner + cell], dim=1)
    return draw_bounding_boxes(view, cells, numbers, "orange", label_colors="yellow")


def arguments():
    parser = common.Parser(__doc__, PAPER, DEMO)
    add = parser.own.add_argument
    add("--alpha", type=common.bounded(float, 0), nargs=4,
        help="weights of the image losses of conv2_x to conv5_x (Eq. 2)")
    add("--beta", type=common.bounded(float, 0), nargs=4, help="weights of the patch losses")
    add("--augment", choices=["rand", "rand-moves", "moco"],
        help="rand: RandAugment's color operations before MoCo v2's colors; rand-moves: all of RandAugment's "
             "operations, some of which move patches; moco: MoCo v2's colors alone")
    add("--augment-magnitude", type=common.bounded(int, 0, 30), help="magnitude of RandAugment, from 0 to 30")
    add("--roi-size", type=common.bounded(int, 1),
        help="S of every level (Table 7a; default: the side of its feature map, at 224 pixels 14 on conv4_x and 7 on "
             "conv5_x)")
    add("--queue", type=common.bounded(int, 1), help="K, the keys in each queue")
    add("--patch-keys", type=common.bounded(int, 1),
        help="patches of the global batch that a level's queue takes in a step")
    add("--momentum", type=common.bounded(float, 0, 1), help="of the key network")
    add("--temperature", type=common.bounded(float, 1e-3), help="tau; 0.2 with --augment moco")
    add("--dim", type=common.bounded(int, 1), help="length of a query or key")
    add("--min-area", type=common.bounded(float, 1e-3, 1), help="smallest share of the image that a crop shows")
    add("--warmup", type=common.bounded(float, 0), help="epochs in which the learning rate rises from 0")
    add("--bn-splits", type=common.bounded(int, 1),
        help="BN groups in a single process (default: 8; fewer for a small batch); under torchrun: one per process")

    def variant(args):
        return ABLATION if args.augment == "moco" else {}

    args = parser.parse(variant)
    if not any(args.alpha + args.beta):
        common.fail("--alpha and --beta: at least one of the eight must be above 0")
    common.choose_bn_splits(args)
    return args


def main():
    device = common.init_distributed()
    args = arguments()
    source, monitor = common.open_data(args)
    common.warn_if_queue_is_long(args, source)
    common.seed_everything(args.seed)
    model = DUPR(args.arch, args.alpha, args.beta, args.queue, args.patch_keys, args.momentum, args.temperature,
                 args.dim, args.bn_splits if common.world_size() == 1 else 1, args.roi_size)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    run = common.Run(args, source, "dupr", model, optimizer)
    views = partial(two_views, size=args.size, min_area=args.min_area, augment=args.augment,
                    magnitude=args.augment_magnitude)
    batches = run.batches(views, device)
    ddp = common.wrap_ddp(model, device, args.compile)

    if monitor and run.step == 0:
        run.monitor(model.encoder_q, monitor, device)
    for batch in batches:
        if run.step == 0:
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
        model.update()
        run.step += 1
        if run.step % args.print_every == 0:
            run.log(loss, stats, lr)
        if monitor and run.step % run.steps_per_epoch == 0:
            run.monitor(model.encoder_q, monitor, device)
        if run.step % args.save_every == 0 or run.step == run.last:
            run.save()
    run.summary(accuracy=f"chance is {1 / (args.queue + 1):.2g}", accuracy_patch="chance is the same")
    common.finish()


if __name__ == "__main__":
    main()
