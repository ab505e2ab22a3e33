"""Fine-tunes torchvision's detectors from a checkpoint, on any images with COCO annotations: the counterpart of
train_net.py for machines without Detectron2.

    python transfer/detect.py --init runs/soco/last.pt --train IMAGES TRAIN.json --val IMAGES VAL.json
    python transfer/detect.py --init random ...                          from nothing; or torchvision's resnet50-*.pth
    python transfer/detect.py --model maskrcnn|keypointrcnn|retinanet|fcos ...
    python transfer/detect.py --freeze ...                               DetCon's frozen features (its Sec. 4.3)
    torchrun --nproc_per_node=8 transfer/detect.py ...                   as the papers: 1x on COCO, 16 images a step

Every method fills the backbone; SoCo fills the FPN and the box head too. BN is synchronized over all processes and
trained, except in a backbone with --freeze. Writes last.pt, whose `model` has torchvision's names, and log.jsonl with
COCO's AP (package pycocotools) to --out. The same command again resumes.
"""
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from transfer import coco, convert  # noqa: E402

DEFAULTS = dict(  # Detectron2's 1x schedule on COCO, which the papers take; lr is for 16 images a step
    model="fasterrcnn", head="4conv1fc", size=[640, 800], rois=512, epochs=12, batch_size=16, lr=0.02, warmup=0.14,
    drops=[2 / 3, 8 / 9], weight_decay=1e-4, fill=["backbone", "fpn", "head"], print_every=50)
# The first level of each model's pyramid.
LOWEST = {"fasterrcnn": 2, "maskrcnn": 2, "keypointrcnn": 2, "retinanet": 3, "fcos": 3}


# --- Detectors -------------------------------------------------------------------------------------------------------

def build(model, arch, classes, keypoints=0, head="4conv1fc", size=(640, 800), rois=512):
    """torchvision's detector `model`. Backbone, FPN and box head have BNs that are trained, over all processes.

    size: (low, high) of an image's shorter side in training, in pixels. Tests take the high one. The bounds between
    pyramid levels scale with it; at 800 they are the papers'. rois: how many RoIs of an image train the box head, drawn
    from about four times as many proposals; tests take about twice as many. If the backbone is narrower than ResNet's,
    so is the rest of the detector.
    """
    norm, lowest = common.SyncBatchNorm, LOWEST[model]
    network = common.resnet(arch, norm)
    channels = round(256 * min(1.0, network.width))
    if lowest == 3 and channels % 32:
        common.fail(f"--arch {arch}: the 32 norm groups of {model}'s head need a width of a quarter, or more in steps "
                    "of an eighth")
    extra = {"retinanet": LastLevelP6P7(network.channels[-1], channels),
             "fcos": LastLevelP6P7(channels, channels)}.get(model)
    backbone = BackboneWithFPN(network, {f"layer{level - 1}": str(level - lowest) for level in range(lowest, 6)},
                               network.channels[lowest - 2:], channels, extra, norm)
    scales = dict(min_size=tuple(range(size[1], size[0] - 1, -32))[::-1], max_size=round(size[1] * 1333 / 800),
                  image_mean=common.MEAN, image_std=common.STD)
    if model == "fcos":
        return FCOS(backbone, classes + 1, **scales)
    if model == "retinanet":
        anchors = AnchorGenerator(tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3)))
                                        for x in (32, 64, 128, 256, 512)),
                                  ((0.5, 1.0, 2.0),) * 5)
        # As in torchvision's "v2": levels differ in their statistics and share the head, so it has GroupNorm.
        head = RetinaNetHead(channels, 9, classes + 1, norm_layer=partial(nn.GroupNorm, 32))
        return RetinaNet(backbone, classes + 1, anchor_generator=anchors, head=head, **scales)
    if head == "4conv1fc":
        box_head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [4 * channels], norm_layer=norm)
    else:
        box_head = TwoMLPHead(channels * 7 * 7, 4 * channels)
    pool = partial(MultiScaleRoIAlign, ["0", "1", "2", "3"], sampling_ratio=2, canonical_scale=224 * size[1] / 800)
    proposals = lambda at_512_rois: round(at_512_rois * rois / 512)
    parts = dict(box_roi_pool=pool(output_size=7), box_head=box_head, box_batch_size_per_image=rois,
                 rpn_pre_nms_top_n_train=proposals(2000), rpn_post_nms_top_n_train=proposals(2000),
                 rpn_post_nms_top_n_test=proposals(1000),  # torchvision's; Detectron2 trains on 1000
                 box_predictor=FastRCNNPredictor(4 * channels, classes + 1), **scales)
    if model == "maskrcnn":
        return MaskRCNN(backbone, mask_roi_pool=pool(output_size=14),
                        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1),
                        mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1), **parts)
    if model == "keypointrcnn":
        return KeypointRCNN(backbone, keypoint_roi_pool=pool(output_size=14),
                            keypoint_head=KeypointRCNNHeads(channels, [2 * channels] * 8),
                            keypoint_predictor=KeypointRCNNPredictor(2 * channels, keypoints), **parts)
    return FasterRCNN(backbone, **parts)


def fill(detector, tensors, model, head="4conv1fc"):
    """Load the tensors of `convert.initial`. Returns (the parts that they fill, those that are new), as text."""
    named = {convert.torchvision_name(name, LOWEST[model]): x for name, x in tensors.items()}
    named = {name: x for name, x in named.items() if name and (head == "4conv1fc" or "box_head" not in name)}
    try:
        report = detector.load_state_dict(named, strict=False)
    except RuntimeError as error:
        common.fail(f"--init does not fit the detector ({' '.join(str(error).split())[:100]})")
    part = lambda names: sorted({".".join(name.split(".")[:2]) for name in names})
    assert not report.unexpected_keys
    return ", ".join(part(named)) or "nothing", ", ".join(part(report.missing_keys))


def output_to_float32(x):
    """A module's output in float32: a tensor, or tensors in dicts, lists or tuples."""
    if isinstance(x, torch.Tensor):
        return x.float()
    if isinstance(x, dict):
        return {name: output_to_float32(y) for name, y in x.items()}
    return type(x)(map(output_to_float32, x))


class DetectorWithLosses(nn.Module):
    """A detector whose forward returns (loss, losses). freeze: the backbone keeps its weights and statistics."""

    def __init__(self, detector, freeze=False):
        super().__init__()
        self.detector, self.freeze = detector, freeze
        detector.backbone.body.requires_grad_(not freeze)
        # Outputs become float32: anchors and boxes take their type, and bf16 has only every 4th number above 512.
        for name, module in detector.named_modules():
            if name in ("backbone", "rpn.head", "roi_heads.box_predictor", "roi_heads.keypoint_predictor", "head"):
                module.register_forward_hook(lambda module, x, output: output_to_float32(output))

    def train(self, mode=True):
        super().train(mode)
        if self.freeze:
            self.detector.backbone.body.eval()
        return self

    def forward(self, batch):
        """(sum of torchvision's losses, each of them). batch: lists of what `coco.image_and_targets` gives."""
        names = [name for name in ("boxes", "labels", "masks", "keypoints") if name in batch]
        targets = [dict(zip(names, row)) for row in zip(*(batch[name] for name in names))]
        losses = self.detector([x.float() / 255 for x in batch["image"]], targets)
        return sum(losses.values()), {name.replace("loss_", ""): x.detach() for name, x in losses.items()}


@torch.no_grad()
def evaluate(detector, source, truth, args, device):
    """{"AP": 37.9, "AP50", "AP75"} in percent, and "mask_AP", ... or "keypoint_AP", ... if the detector has them.

    All processes share the images. Process 0, which has the `truth` of `coco.ground_truth`, returns the figures, the
    others {}.
    """
    found, classes = {}, list(source.classes)
    own_share = range(common.rank(), len(source), common.world_size())
    view = partial(coco.image_and_targets, source=source)

    def predict(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            return detector([x.float() / 255 for x in batch["image"]])

    with common.evaluating(detector):
        for batch, (output,) in common.map_images(predict, source, view, own_share, 1, device, args.workers,
                                                  common.collate_lists):
            image = int(batch["shown"][0])  # an image that also stands in for an undecodable one counts once
            found[image] = coco.detections(output, image, classes)
    shares = [found]
    if common.world_size() > 1:
        shares = [None] * common.world_size() if common.rank() == 0 else None
        dist.gather_object(found, shares)
    if common.rank() > 0:
        return {}
    found = {i: rows for share in shares for i, rows in share.items()}
    kinds = ["bbox"] + {"maskrcnn": ["segm"], "keypointrcnn": ["keypoints"]}.get(args.model, [])
    return coco.average_precision(truth, [row for rows in found.values() for row in rows], kinds)


# --- Training --------------------------------------------------------------------------------------------------------

def arguments():
    parser = common.Parser(__doc__, DEFAULTS)
    add = parser.own.add_argument
    convert.add_init(add)
    count = common.bounded(int, 1)
    add("--train", nargs=2, required=True, metavar=("IMAGES", "JSON"),
        help="folder, and COCO annotations of images below it")
    add("--val", nargs=2, metavar=("IMAGES", "JSON"), help="likewise, for AP (default: no AP)")
    add("--model", choices=list(LOWEST), help="which of torchvision's detectors; --lr is 0.01 for retinanet and fcos")
    add("--head", choices=["4conv1fc", "2fc"],
        help="box head: 4conv1fc with norms, as in SoCo and torchvision's v2 models, or the classic 2fc")
    add("--size", type=common.bounded(int, 32), nargs=2,
        help="range of the image's shorter side in training; tested at the larger")
    add("--rois", type=count, help="proposals of an image that train its heads (R-CNNs); tests take twice as many")
    add("--fill", choices=DEFAULTS["fill"], nargs="+", help="the parts to take from --init, if it has them")
    add("--freeze", action="store_true", help="keep the backbone as it is (DetCon Sec. 4.3)")
    add("--warmup", type=common.bounded(float, 0), help="epochs in which the learning rate rises from 0")
    add("--drops", type=common.bounded(float, 0, 1), nargs="+",
        help="when the learning rate falls to a tenth, as fractions of the run")
    add("--weight-decay", type=common.bounded(float, 0), help="of all but norms and biases")
    add("--eval-every", type=count, help="epochs between APs (default: only at the end)")
    args = parser.parse(lambda args: {"lr": 0.01} if args.model in ("retinanet", "fcos") else {})
    if args.size[0] > args.size[1]:
        common.fail(f"--size {args.size[0]} {args.size[1]}: the smaller comes first")
    if args.val:
        coco.need_pycocotools("leave --val out")
    return args


def main():
    device = common.init_distributed()
    torch.backends.cudnn.benchmark = False  # images have many sizes here
    args = arguments()
    masks, keypoints = args.model == "maskrcnn", args.model == "keypointrcnn"
    needs = {"maskrcnn": "segmentation", "keypointrcnn": "keypoints"}.get(args.model)
    source = coco.CocoFolder(*args.train, training=True, needs=needs)
    val = coco.CocoFolder(*args.val, training=False, needs=needs) if args.val else None
    truth = coco.ground_truth(args.val[1], val) if val and common.rank() == 0 else None
    if val:
        coco.check_classes(source, val, (args.train[1], args.val[1]))
    if keypoints and not source.keypoints:
        common.fail(f"{args.train[1]}: no category has `keypoints`")
    tensors, _ = convert.initial(args, args.fill)
    tensors = {name: x for name, x in tensors.items() if name.partition(".")[0] in args.fill}
    common.seed_everything(args.seed)
    detector = build(args.model, args.arch, len(source.classes), len(source.keypoints), args.head, args.size, args.rois)
    filled, new = fill(detector, tensors, args.model, args.head)
    layout = torch.contiguous_format if keypoints else torch.channels_last  # torchvision's keypoint loss uses .view
    model = DetectorWithLosses(detector, args.freeze).to(device, memory_format=layout).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
                                 {"params": [p for p in trained if p.ndim <= 1]}], lr=0.0, momentum=0.9)
    run = common.Run(args, source, "detect", detector, optimizer)
    if common.rank() == 0 and run.step == 0:
        print(f"filled: {filled}; new: {new}")
    views = partial(coco.image_and_targets, source=source, masks=masks, keypoints=keypoints, flip=True)
    batches = run.batches(views, device, common.collate_lists)
    ddp = common.wrap_ddp(model, device)

    def log_ap():
        run.write(evaluate(detector, val, truth, args, device))
        run.restart_clock()

    for batch in batches:
        common.seed_everything(args.seed, run.step, common.rank())
        lr = common.learning_rate(args.lr * args.batch_size / DEFAULTS["batch_size"], run.step, run.total,
                                  round(args.warmup * run.steps_per_epoch), args.drops)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            loss, losses = ddp(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step += 1
        if run.step % args.print_every == 0:
            run.log(loss, losses, lr)
        if val and args.eval_every and run.step % (args.eval_every * run.steps_per_epoch) == 0 and run.step < run.total:
            log_ap()
        if run.step % args.save_every == 0 or run.step == run.last:
            run.save()
    evaluated = common.rank() > 0 or any("AP" in row and row["step"] == run.step for row in run.rows())
    if val and run.step == run.total and common.all_gather(torch.tensor([not evaluated], device=device)).any():
        log_ap()
    run.summary(loss="the sum of the detector's losses")
    common.finish()


if __name__ == "__main__":
    main()
