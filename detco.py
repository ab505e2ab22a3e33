"""DetCo: Unsupervised Contrastive Learning for Object Detection (Xie et al., ICCV 2021).

MoCo v2 with a contrast at every stage of the backbone, so that shallow features tell images apart too, and with three
contrasts instead of one: whole view to whole view, nine small patches to nine patches, and patches to whole view.

    python detco.py                                             shapes that it draws itself, a minute or two
    python detco.py --data DIR                                  your own images
    torchrun --nproc_per_node=8 detco.py --data /imagenet       as in the paper; --augment rand for DetCo+AA
    python detco.py --data DIR --no-local --epochs 100          without patches, as in Table 1 (b)

Writes last.pt, log.jsonl and views.png to --out; run the same command again to resume. In last.pt, the backbone is
in `model`, under torchvision's ResNet names with the prefix `encoder_q.backbone.`. No code for pre-training was
released: comments say what was decided where the paper leaves something open.
"""
import copy
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageOps

import common

PAPER = dict(  # on ImageNet; lr is for batch_size
    arch="resnet50", size=224, epochs=200, batch_size=256, lr=0.06, warmup=0, print_every=50,
    weights=[0.1, 0.4, 0.7, 1.0],
    queue=65536, momentum=0.999, temperature=0.2, dim=128, min_area=0.2, augment="moco",
    augment_magnitude=28,
    workers=16)  # about what one H100 needs, estimated

DEMO = dict(
    arch="resnet18w0.25", size=32, epochs=4, batch_size=128, lr=0.12, warmup=1, print_every=32, min_area=0.4, queue=512,
    momentum=0.95)


# --- Views (Sec. 3.3) ------------------------------------------------------------------------------------------------

def jigsaw_sizes(size):
    """(side of a region, side of a patch) in pixels, for global views of `size` pixels: 255 and 64 at 224."""
    return 3 * round(85 * size / 224), round(64 * size / 224)


def views(image, rng, size, min_area, augment="moco", magnitude=28, local=True):
    """Two global views, and two regions of nine patches each; each is mirrored half of the time.

    x_q and x_k: global views (I_q and I_k), uint8 [3, size, size]. With `local` also p_q and p_k: regions that become
    the patch sets P_q and P_k, uint8 [3, 255, 255] at 224; and at_q and at_k: [9, 2], the top-left corner (x, y) of
    each patch in pixels of the region, one in each of its 3 x 3 cells.
    """
    region, patch = jigsaw_sizes(size)
    names, areas, sizes = ["x_q", "x_k"], [(min_area, 1.0)] * 2, [size] * 2
    if local:
        names, areas, sizes = names + ["p_q", "p_k"], areas + [(0.6, 1.0)] * 2, sizes + [region] * 2
    crops = [common.random_crop(image.size, area, rng) for area in areas]
    batch = {}
    for name, view in zip(names, image.crop(crops, sizes)):
        view = ImageOps.mirror(view) if rng.random() < 0.5 else view
        view = common.rand_augment(view, rng, magnitude) if augment == "rand" else view
        batch[name] = common.to_tensor(view)
        if name.startswith("p"):
            cells = torch.tensor([[x, y] for y in range(3) for x in range(3)]) * (region // 3)
            offsets = torch.from_numpy(rng.integers(region // 3 - patch + 1, size=(9, 2)))
            batch[name.replace("p", "at")] = cells + offsets
    return batch


def color_augmentation():
    """MoCo v2's colors, for global views and regions alike.

    A region is colored before it is divided (Sec. 3.3), so its patches share a draw. We read "sharing the same
    parameters with global augmentation" as the same distribution, not the same draw.
    """
    return common.Photometric(0.4, 0.4, 0.4, 0.1, jitter_p=0.8, grayscale_p=0.2, blur_p=0.5)


def patches(x, corners, side):
    """[N*9, 3, side, side], image-major: the patches of x [N, 3, H, W] at `corners` [N, 9, 2] (x, y)."""
    step = torch.arange(side, device=x.device)
    columns, rows = (corners[:, :, k, None] + step for k in (0, 1))                       # [N, 9, side]
    image = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
    picked = x.permute(0, 2, 3, 1)[image, rows[..., :, None], columns[..., None, :]]      # [N, 9, side, side, 3]
    return picked.flatten(0, 1).permute(0, 3, 1, 2)


# --- Model (Sec. 3.2) ------------------------------------------------------------------------------------------------

class Encoder(nn.Module):
    """The backbone and, for each stage of weight > 0, an MLP head for the global view and one for the nine patches.

    The hidden layer is as wide as c5 (2048) for every stage: "the same as MoCo v2, except for the input
    channel" (Sec. 6.5).
    """

    def __init__(self, arch, weights, dim, bn_splits, local):
        super().__init__()
        self.backbone = common.resnet(arch, partial(common.GroupBatchNorm2d, groups=bn_splits))
        self.stages = [i for i, weight in enumerate(weights) if weight]
        self.depth = 1 + max(self.stages)
        self.backbone.train_first(self.depth)
        hidden = self.backbone.channels[-1]
        head = lambda width: nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))
        self.mlp_global = nn.ModuleList(head(self.backbone.channels[i]) for i in self.stages)
        self.mlp_local = nn.ModuleList(head(9 * self.backbone.channels[i]) for i in self.stages if local)

    def forward(self, x):
        """A global view [N, 3, H, W] -> normalized [N, dim] of each stage."""
        f = self.backbone(x, self.depth)
        return [normalize(mlp(f[i].mean(dim=(2, 3)))) for i, mlp in zip(self.stages, self.mlp_global)]

    def encode_patches(self, x):
        """Patches [N*9, 3, s, s], all in one pass -> normalized [N, dim] of each stage.

        The nine features are concatenated in reading order: the paper mentions no shuffling.
        """
        with frozen_running_statistics(self.backbone):
            f = self.backbone(x, self.depth)
        pooled = [f[i].mean(dim=(2, 3)).view(len(x) // 9, -1) for i in self.stages]       # [N, 9*C]
        return [normalize(mlp(p)) for p, mlp in zip(pooled, self.mlp_local)]


@contextmanager
def frozen_running_statistics(backbone):
    """Context in which BN normalizes by its batch as usual, but does not update its running statistics.

    These should describe whole images; nine patches per image would dominate them.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def normalize(x):
    return F.normalize(x.float(), dim=1)


class DetCo(nn.Module):
    """The pretext task.

    weights: w of Eq. 1 for Res2 to Res5; a stage of weight 0 costs nothing. local: with patches. size: of the global
    views, in pixels. share_queue: all stages share one global and one local queue (Table 16). bn_splits: BN groups of
    one process.
    """

    def __init__(self, arch, weights=(0.1, 0.4, 0.7, 1.0), queue=65536, momentum=0.999, temperature=0.2, dim=128,
                 size=224, local=True, share_queue=False, bn_splits=1):
        super().__init__()
        self.w = [weight for weight in weights if weight]
        self.momentum, self.temperature, self.patch_side = momentum, temperature, jigsaw_sizes(size)[1]
        self.photometric = color_augmentation()
        self.encoder_q = Encoder(arch, weights, dim, bn_splits, local)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        count = 1 if share_queue else len(self.w)
        self.queue_global = nn.ModuleList(common.Queue(dim, queue) for _ in range(count))
        self.queue_local = nn.ModuleList(common.Queue(dim, queue) for _ in range(count)) if local else None

    def forward(self, batch):
        """(loss of Eq. 1, stats). batch: what `views` gives, N of each."""
        local = self.queue_local is not None
        cut_patches = lambda p, at: patches(self.photometric(p), at, self.patch_side)
        q_g = self.encoder_q(self.photometric(batch["x_q"]))                              # for each stage [N, dim]
        q_l = self.encoder_q.encode_patches(cut_patches(batch["p_q"], batch["at_q"])) if local else []
        shuffle = common.Shuffle(len(batch["x_k"]), batch["x_k"].device)                  # for every input of encoder_k
        with torch.no_grad():
            k_g = self.encoder_k(self.photometric(shuffle(batch["x_k"])))
            k_l = []
            if local:
                k_l = self.encoder_k.encode_patches(cut_patches(shuffle(batch["p_k"]), shuffle(batch["at_k"])))
            k_g, k_l = ([shuffle.undo(k) for k in keys] for keys in (k_g, k_l))
        loss, self.new = 0, (k_g, k_l)
        for i, w in enumerate(self.w):
            queue_g = self.queue_global[i % len(self.queue_global)].keys
            loss_i = common.info_nce(q_g[i], k_g[i], queue_g, self.temperature)           # Eq. 2
            if local:
                queue_l = self.queue_local[i % len(self.queue_local)].keys
                loss_i = loss_i + common.info_nce(q_l[i], k_g[i], queue_g, self.temperature)  # Eq. 4
                loss_i = loss_i + common.info_nce(q_l[i], k_l[i], queue_l, self.temperature)  # Eq. 5
            loss = loss + w * loss_i                                                      # Eq. 1; without patches Eq. 3
        stats = {"accuracy": common.pretext_accuracy(q_g[-1], k_g[-1], queue_g),
                 "positive": (q_g[-1].detach() * k_g[-1]).sum(dim=1).mean()}
        if local:
            stats["accuracy_local"] = common.pretext_accuracy(q_l[-1], k_l[-1], queue_l)
        return loss, stats

    @torch.no_grad()
    def update(self):
        """Let encoder_k follow encoder_q and put the new keys into the queues, after the optimizer's step."""
        common.momentum_update(self.encoder_k, self.encoder_q, self.momentum)
        for queues, keys in zip((self.queue_global, self.queue_local), self.new):
            for i, k in enumerate(keys):
                queues[i % len(queues)].enqueue(k)


# --- Training --------------------------------------------------------------------------------------------------------

def save_views(path, model, batch):
    """Write views.png: both global views of a few images, and both sets of nine patches, each as a 3 x 3 grid."""
    columns = [common.denormalize(model.photometric(batch[name])[:8]) for name in ("x_q", "x_k")]
    for name in ("q", "k") if model.queue_local is not None else ():
        nine = patches(model.photometric(batch[f"p_{name}"]), batch[f"at_{name}"], model.patch_side)[:72]
        nine = F.pad(common.denormalize(nine), (1, 1, 1, 1))                             # [8*9, 3, s+2, s+2], framed
        tiles = nine.unflatten(0, (-1, 3, 3)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        columns.append(F.interpolate(tiles, columns[0].shape[-2:]))
    common.save_views(path, *columns)


def arguments():
    parser = common.Parser(__doc__, PAPER, DEMO)
    add = parser.own.add_argument
    add("--weights", type=common.bounded(float, 0), nargs=4, help="w of Eq. 1 for Res2, Res3, Res4, Res5")
    add("--no-local", action="store_true",
        help="leave the patches out (Table 1 b); together with --weights 0 0 0 1, this is MoCo v2's loss")
    add("--share-queue", action="store_true",
        help="one global and one local queue for all stages (Table 16, with --no-local)")
    add("--augment", choices=["moco", "rand"],
        help="moco: MoCo v2's colors; rand: RandAugment before them, for DetCo+AA (\"Auto Augmentation\", for which "
             "the paper cites RandAugment)")
    add("--augment-magnitude", type=common.bounded(int, 0, 30), help="magnitude of RandAugment, from 0 to 30")
    add("--queue", type=common.bounded(int, 1), help="K, the keys in each queue")
    add("--momentum", type=common.bounded(float, 0, 1), help="m, of the key network")
    add("--temperature", type=common.bounded(float, 1e-3), help="tau")
    add("--dim", type=common.bounded(int, 1), help="length of a query or key")
    add("--min-area", type=common.bounded(float, 1e-3, 1), help="smallest share of the image that a global view shows")
    add("--warmup", type=common.bounded(float, 0), help="epochs in which the learning rate rises from 0")
    add("--bn-splits", type=common.bounded(int, 1),
        help="BN groups in a single process (default: 8; fewer for a small batch); under torchrun: one per process")
    args = parser.parse()
    if not any(args.weights):
        common.fail("--weights: at least one of the four must be above 0")
    common.choose_bn_splits(args)
    return args


def main():
    device = common.init_distributed()
    args = arguments()
    source, monitor = common.open_data(args)
    common.warn_if_queue_is_long(args, source)
    common.seed_everything(args.seed)
    model = DetCo(args.arch, args.weights, args.queue, args.momentum, args.temperature, args.dim, args.size,
                  not args.no_local, args.share_queue, args.bn_splits if common.world_size() == 1 else 1)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    run = common.Run(args, source, "detco", model, optimizer)
    make_views = partial(views, size=args.size, min_area=args.min_area, augment=args.augment,
                         magnitude=args.augment_magnitude, local=not args.no_local)
    batches = run.batches(make_views, device)
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
    run.summary(accuracy=f"chance is {1 / (args.queue + 1):.2g}")
    common.finish()


if __name__ == "__main__":
    main()
