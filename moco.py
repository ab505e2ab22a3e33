"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning (He et al., CVPR 2020), versions 1 and 2.

Contrastive learning is dictionary look-up: a query, one view of an image, must find its key, another view of the same
image, among many keys of other images. MoCo makes the dictionary large by keeping the keys of past batches in a queue,
and consistent by encoding them with a network that follows the query network slowly. Version 2, the default (Chen et
al. 2020), adds an MLP head, blur, a cosine schedule and a temperature of 0.2. Section and equation numbers
are those of version 1's paper.

    python moco.py                                                  shapes that it draws itself, a minute or two
    python moco.py --data DIR                                       your own images, version 2
    torchrun --nproc_per_node=8 moco.py --data /imagenet            version 2; --version 1: He et al.
    python moco.py --data DIR --mechanism bank                      a memory bank (Figure 2b); batch: end to end (2a)

Writes last.pt, log.jsonl and views.png to --out; run the same command again to resume. In last.pt, the backbone is
in `model`, under torchvision's ResNet names with the prefix `encoder_q.backbone.`.
"""
import copy
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageOps

import common

PAPER = dict(  # version 2 on ImageNet; lr is for batch_size
    arch="resnet50", size=224, epochs=200, batch_size=256, lr=0.03, warmup=0, print_every=50, min_area=0.2,
    version=2, schedule="cosine", mechanism="queue", queue=65536, momentum=0.999, temperature=0.2, dim=128,
    workers=16)  # about what one H100 needs, estimated

VERSION_1 = dict(temperature=0.07, schedule="steps")  # plus a linear head and version 1's colors

DEMO = dict(
    arch="resnet18w0.25", size=32, epochs=12, lr=0.06, warmup=1, print_every=32, min_area=0.4, queue=512, momentum=0.95)


# --- Views -----------------------------------------------------------------------------------------------------------

def two_views(image, rng, size, min_area, key=True):
    """{"index", "x_q", "x_k"}: two random crops of one image, uint8 [3, size, size], each mirrored half of the time.

    See Sec. 3.3. Without `key` there is no x_k: the memory bank needs no second view. `index` is that of the image
    shown, which is not the one asked for if that one cannot be decoded.
    """
    names = ["x_q", "x_k"] if key else ["x_q"]
    crops = [common.random_crop(image.size, (min_area, 1.0), rng) for _ in names]
    batch = {"index": image.index}
    for name, view in zip(names, image.crop(crops, [size] * len(crops))):
        batch[name] = common.to_tensor(ImageOps.mirror(view) if rng.random() < 0.5 else view)
    return batch


def color_augmentation(version):
    """Version 1's colors (Sec. 3.3, strengths of the released code), or version 2's: with blur and less hue."""
    if version == 1:
        return common.Photometric(0.4, 0.4, 0.4, 0.4, grayscale_p=0.2)
    return common.Photometric(0.4, 0.4, 0.4, 0.1, jitter_p=0.8, grayscale_p=0.2, blur_p=0.5)


# --- Model -----------------------------------------------------------------------------------------------------------

class Encoder(nn.Module):
    """[N, 3, H, W] -> [N, dim]: ResNet, global average pooling, a linear layer (v1) or an MLP (v2), L2 norm."""

    def __init__(self, arch, version, dim, bn_splits):
        super().__init__()
        self.backbone = common.resnet(arch, partial(common.GroupBatchNorm2d, groups=bn_splits))
        width = self.backbone.channels[-1]
        self.projector = nn.Linear(width, dim) if version == 1 else nn.Sequential(
            nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))

    def forward(self, x):
        c5 = self.backbone(x)[-1]                                          # [N, C5, H/32, W/32]
        return F.normalize(self.projector(c5.mean(dim=(2, 3))).float(), dim=1)  # [N, dim]


class MoCo(nn.Module):
    """The pretext task with one of the three dictionaries of Figure 2.

    mechanism: where the negatives come from. "queue" is MoCo (Figure 2c). "batch" takes the other keys of the global
    batch and trains one encoder, for queries and keys, end to end (2a). "bank" draws `queue` keys from a memory bank
    with an entry for each of `images` (2b); there `momentum` mixes old and new features instead of parameters.
    bn_splits: BN groups of one process; shuffle: whether to use Shuffling BN.
    """

    def __init__(self, arch, images, version=2, mechanism="queue", queue=65536, momentum=0.999, temperature=0.2,
                 dim=128, bn_splits=1, shuffle=True):
        super().__init__()
        self.mechanism, self.momentum, self.temperature, self.shuffle = mechanism, momentum, temperature, shuffle
        self.photometric = color_augmentation(version)
        self.encoder_q = Encoder(arch, version, dim, bn_splits)
        if mechanism == "queue":
            self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
            self.queue = common.Queue(dim, queue)
        if mechanism == "bank":
            self.samples = queue
            self.register_buffer("bank", F.normalize(torch.randn(images, dim), dim=1))

    def forward(self, batch):
        """(InfoNCE loss of Eq. 1, stats). batch: x_q and x_k [N, 3, S, S] uint8; for the bank, x_q and index [N]."""
        q = self.encoder_q(self.photometric(batch["x_q"]))                                # [N, dim]
        if self.mechanism == "bank":
            k, negatives = self.look_up(batch["index"])
            self.new = batch["index"], q.detach()
        elif self.mechanism == "queue":
            with torch.no_grad():                                                         # no gradient to keys
                k = self.encode_shuffled(self.encoder_k, batch["x_k"])
            negatives = self.queue.keys                                                   # [K, dim]
            self.new = k
        else:
            k = self.encode_shuffled(self.encoder_q, batch["x_k"])                        # with gradient to keys
            return self.contrast_within_batch(q, common.all_gather(k))
        loss = common.info_nce(q, k, negatives, self.temperature)                         # Eq. 1
        return loss, {"accuracy": common.pretext_accuracy(q, k, negatives),
                      "positive": (q.detach() * k).sum(dim=1).mean()}

    def encode_shuffled(self, encoder, x):
        """The keys [N, dim] of x [N, 3, S, S], encoded with the batch shuffled over BN groups (Sec. 3.3)."""
        if not self.shuffle:
            return encoder(self.photometric(x))
        shuffle = common.Shuffle(len(x), x.device)
        return shuffle.undo(encoder(self.photometric(shuffle(x))))

    def contrast_within_batch(self, q, keys):
        """(loss of Eq. 1, stats): the negatives of a query are the keys of all other images of the global batch.

        q: [N, dim] of this process; keys: [world*N, dim] of all processes, in rank order.
        """
        with torch.autocast(q.device.type, enabled=False):
            similarity = q @ keys.T                                                       # [N, world*N]
            own = common.rank() * len(q) + torch.arange(len(q), device=q.device)          # column of each query's key
            loss = F.cross_entropy(similarity / self.temperature, own)                    # Eq. 1
        positive = similarity.detach().gather(1, own[:, None])
        hit = (similarity >= positive).sum(dim=1) == 1                                    # only the key itself
        return loss, {"accuracy": hit.float().mean(), "positive": positive.mean()}

    def look_up(self, index):
        """(keys [N, dim], negatives [K, dim]): bank entries of the images `index` [N], and of K images drawn at random.

        None of the K is in this process's batch.
        """
        others = torch.randint(len(self.bank) - len(index), (self.samples,), device=index.device)
        # Draw j stands for the j-th image outside the batch: image j plus the number of batch images before it.
        # before[i]: how many images outside the batch precede the batch's i-th smallest index. cummax keeps it sorted
        # if an index comes twice, as it may if its image took the place of an unreadable one.
        before = index.sort().values - torch.arange(len(index), device=index.device)
        others += torch.searchsorted(before.cummax(dim=0).values, others, right=True)
        return self.bank[index], self.bank[others]

    @torch.no_grad()
    def update(self):
        """Let f_k follow f_q and put the new keys into the dictionary, after the optimizer's step (Algorithm 1)."""
        if self.mechanism == "queue":
            common.momentum_update(self.encoder_k, self.encoder_q, self.momentum)         # Eq. 2
            self.queue.enqueue(self.new)
        elif self.mechanism == "bank":
            index, q = (common.all_gather(x) for x in self.new)
            self.bank[index] = F.normalize(torch.lerp(q, self.bank[index], self.momentum), dim=1)


# --- Training --------------------------------------------------------------------------------------------------------

INSTAGRAM_STEPS = 62500  # steps between drops of the rate in the run on Instagram-1B (Sec. 4)


def learning_rate(args, step, total, warmup):
    """The learning rate of a step under --schedule. In the first `warmup` steps it rises from 0."""
    base = args.lr * args.batch_size / PAPER["batch_size"]
    if args.schedule == "instagram":
        base, total = base * 0.9 ** (step // INSTAGRAM_STEPS), math.inf  # an endless cosine stays at base
    return common.learning_rate(base, step, total, warmup, drops=(0.6, 0.8) if args.schedule == "steps" else None)


def save_views(path, model, batch):
    """Write views.png: the views of a few images as the network sees them, query and key side by side."""
    views = [batch[name] for name in ("x_q", "x_k") if name in batch]
    common.save_views(path, *(common.denormalize(model.photometric(x)[:8]) for x in views))


def arguments():
    parser = common.Parser(__doc__, PAPER, DEMO)
    add = parser.own.add_argument
    add("--version", type=int, choices=[1, 2], help="1: linear head, step schedule; 2: MLP head, blur, cosine schedule")
    add("--schedule", choices=["cosine", "steps", "instagram"],
        help="steps: the learning rate falls to a tenth at 0.6 and 0.8 of the run, as in version 1 (epochs 120 and "
             "160 of 200); instagram: it is multiplied by 0.9 every 62500 steps")
    add("--mechanism", choices=["queue", "batch", "bank"], help="the dictionary: Figure 2 c, a, b")
    add("--queue", type=common.bounded(int, 1), help="K, the keys in the queue (or drawn from the bank)")
    add("--momentum", type=common.bounded(float, 0, 1),
        help="m of Eq. 2; with --mechanism bank, the weight of an entry's old features (0.5 there)")
    add("--temperature", type=common.bounded(float, 1e-3), help="tau of Eq. 1; 0.07 in version 1")
    add("--dim", type=common.bounded(int, 1), help="length of a query or key")
    add("--min-area", type=common.bounded(float, 1e-3, 1), help="smallest share of the image that a crop shows")
    add("--warmup", type=common.bounded(float, 0), help="epochs in which the learning rate rises from 0")
    add("--bn-splits", type=common.bounded(int, 1),
        help="BN groups in a single process (default: 8; fewer for a small batch); under torchrun: one per process")
    add("--no-shuffle", action="store_true", help="leave Shuffling BN out, to see the leak of Figure A.1")

    def variant(args):
        changed = VERSION_1 if args.version == 1 else {}
        return {**changed, "momentum": 0.5} if args.mechanism == "bank" else changed

    args = parser.parse(variant)
    common.choose_bn_splits(args)
    return args


def main():
    device = common.init_distributed()
    args = arguments()
    source, monitor = common.open_data(args)
    negatives = args.batch_size - 1 if args.mechanism == "batch" else args.queue
    if args.mechanism == "bank" and args.batch_size // common.world_size() == len(source):
        common.fail(f"a batch of all {len(source)} images leaves none for negatives: take a smaller --batch-size")
    if args.mechanism == "queue":
        common.warn_if_queue_is_long(args, source)

    common.seed_everything(args.seed)
    model = MoCo(args.arch, len(source), args.version, args.mechanism, args.queue, args.momentum, args.temperature,
                 args.dim, bn_splits=args.bn_splits if common.world_size() == 1 else 1, shuffle=not args.no_shuffle)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    run = common.Run(args, source, "moco", model, optimizer)
    views = partial(two_views, size=args.size, min_area=args.min_area, key=args.mechanism != "bank")
    batches = run.batches(views, device)
    ddp = common.wrap_ddp(model, device, args.compile)

    if monitor and run.step == 0:
        run.monitor(model.encoder_q, monitor, device)
    for batch in batches:
        if run.step == 0:
            common.seed_everything(args.seed, run.step, common.rank())
            save_views(Path(args.out, "views.png"), model, batch)
        common.seed_everything(args.seed, run.step, common.rank())  # after save_views, which draws random numbers too
        lr = learning_rate(args, run.step, run.total, round(args.warmup * run.steps_per_epoch))
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
    run.summary(loss=f"log(K+1) is {math.log(negatives + 1):.2f}", accuracy=f"chance is {1 / (negatives + 1):.2g}")
    common.finish()


if __name__ == "__main__":
    main()
