"""Fine-tunes a Detectron2 detector as the papers do.

    python transfer/train_net.py --config-file transfer/configs/soco-fpn-1x.yaml --num-gpus 8 MODEL.WEIGHTS soco.pkl

The weights come from transfer/convert.py. configs/README.md says which configuration belongs to which table.
The configurations hold what Detectron2's own keys can say. This file adds what they cannot: BN after stage 5 in a C4
detector, FCOS from a YAML file, DetCon's crops, a share of COCO (`coco_2017_train_5percent` in DATASETS.TRAIN), and an
evaluator for each data set.

Writes to OUTPUT_DIR. The same command with --resume continues the run; with --eval-only it evaluates MODEL.WEIGHTS.
"""
import hashlib
import re
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

try:
    import detectron2.data.transforms as T
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_train_loader
    from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
    from detectron2.evaluation import (CityscapesInstanceEvaluator, COCOEvaluator, LVISEvaluator,
                                       PascalVOCDetectionEvaluator)
    from detectron2.layers import ShapeSpec, get_norm
    from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, build_backbone
    from detectron2.modeling.backbone import FPN, build_resnet_backbone
    from detectron2.modeling.backbone.fpn import LastLevelP6P7
    from detectron2.modeling.roi_heads import Res5ROIHeads
except ImportError as error:
    if __name__ == "__main__":
        common.fail(f"Detectron2 cannot be imported ({error}): see its INSTALL.md")
    DefaultTrainer = Res5ROIHeads = object  # the tests import this file without Detectron2


# --- A share of COCO -------------------------------------------------------------------------------------------------

def parse_subset(name):
    """(name of the whole data set, percentage, seed): ("coco_2017_train", 5, 3) for `coco_2017_train_5percent_seed3`.

    The seed is 0 if the name gives none. Returns None if it is the name of a whole data set.
    """
    match = re.fullmatch(r"(.+)_(\d+)percent(?:_seed(\d+))?", name)
    return match and (match[1], int(match[2]), int(match[3] or 0))


def sample(records, percent, seed):
    """The given percentage of the records, in their order: those with the lowest hash of (seed, image_id).

    records: dicts with an `image_id`, one for each image. Every machine samples the same images, because a hash depends
    neither on their order nor on a library's version. A sample of 2 % contains that of 1 %.
    """
    digest = lambda record: hashlib.sha256(f"{seed} {record['image_id']}".encode()).digest()
    count = round(len(records) * percent / 100)
    sampled = {record["image_id"] for record in sorted(records, key=digest)[:count]}
    return [record for record in records if record["image_id"] in sampled]


def register_subset(name):
    """Register the data set with Detectron2, if its name is that of a share that Detectron2 does not know yet."""
    whole, percent, seed = parse_subset(name) or (None, 0, 0)
    if name in DatasetCatalog.list() or whole not in DatasetCatalog.list():
        return
    DatasetCatalog.register(name, lambda: sample(DatasetCatalog.get(whole), percent, seed))
    metadata = MetadataCatalog.get(whole).as_dict()
    MetadataCatalog.get(name).set(**{key: value for key, value in metadata.items() if key != "name"})


def check_data(cfg):
    """Exit with 2 if Detectron2 does not know a data set, or its files are missing."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name not in DatasetCatalog.list():
            common.fail(f"Detectron2 does not know the data set {name}")
        metadata = MetadataCatalog.get(name)
        for kind in ("json_file", "image_root", "dirname", "image_dir", "gt_dir"):
            path = metadata.get(kind, None)
            if path and not Path(path).exists():
                common.fail(f"{name}: {path} is missing; DETECTRON2_DATASETS names the folder of all data sets")


def restore_dropped_names():
    """Restore what newer libraries have dropped and the evaluation packages of some data sets still use."""
    # lvis 0.5.3 uses np.float, which NumPy 1.24 dropped; cityscapesscripts 2.3.0 uses np.in1d, which NumPy 2.4 dropped.
    for name, instead in {"float": float, "in1d": np.isin}.items():
        if name not in np.__dict__:
            setattr(np, name, instead)
    # cityscapesscripts writes counts as JSON, which knows no NumPy integers. Since NumPy 2.4, counts are such integers.
    if isinstance(np.count_nonzero(np.ones(1)), np.integer):
        count = np.count_nonzero

        def count_nonzero(x, axis=None, **options):
            counts = count(x, axis, **options)
            return int(counts) if axis is None else counts
        np.count_nonzero = count_nonzero
    # Detectron2 of 2025 and 2026 imports cityscapesscripts by the name that it has inside Meta.
    try:
        import cityscapesscripts
    except ImportError:
        return
    folders = ["deeplearning", "deeplearning.projects", "deeplearning.projects.cityscapesApi"]
    for name in folders:
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules.setdefault(f"{folders[-1]}.cityscapesscripts", cityscapesscripts)


# --- Weights ---------------------------------------------------------------------------------------------------------

def check_weights(cfg):
    """Exit with 2 if MODEL.WEIGHTS has SoCo's box head and the configuration has a head of two linear layers.

    SoCo's linear layer would fit into that head, but without the convolutions before it.
    """
    path = Path(cfg.MODEL.WEIGHTS)
    plain_head = cfg.MODEL.ROI_HEADS.NAME == "StandardROIHeads" and cfg.MODEL.ROI_BOX_HEAD.NUM_CONV == 0
    if plain_head and path.is_file() and b"box_head.conv1.weight" in path.read_bytes():
        common.fail(f"{path} has SoCo's box head: take configs/soco-fpn-*, or MODEL.ROI_BOX_HEAD.NUM_CONV 4 "
                    "MODEL.ROI_BOX_HEAD.NUM_FC 1 MODEL.ROI_BOX_HEAD.NORM SyncBN")


@contextmanager
def filling(model, weights):
    """Context in which `weights` are loaded into the model. Exits with 2 if that does not change the backbone.

    Detectron2 itself only warns about names that it does not know.
    """
    tensors = {name: x for name, x in model.state_dict().items() if "backbone" in name and x.ndim == 4}
    before = {name: x.clone() for name, x in tensors.items()}
    yield
    if weights and all(torch.equal(before[name], x) for name, x in tensors.items()):
        common.fail(f"{weights} has nothing for the backbone: convert it to a .pkl with transfer/convert.py")


# --- Models ----------------------------------------------------------------------------------------------------------

class Res5NormROIHeads(Res5ROIHeads):
    """The C4 detector's head with a BN after stage 5 (MoCo A.1). It is new: no checkpoint has it.

    The paper has the BN after the pooling. MoCo's released code has it before the pooling, and so has this.
    """

    @classmethod
    def _build_res5_block(cls, cfg):
        res5, channels = super()._build_res5_block(cfg)
        res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return res5, channels


def build_fcos_resnet_fpn_backbone(cfg, input_shape):
    """FCOS's pyramid. It differs from RetinaNet's in that P6 is made from P5, not from c5."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(build_resnet_backbone(cfg, input_shape), cfg.MODEL.FPN.IN_FEATURES, channels, norm=cfg.MODEL.FPN.NORM,
               top_block=LastLevelP6P7(channels, channels, in_feature="p5"), fuse_type=cfg.MODEL.FPN.FUSE_TYPE)


def FCOSFromConfig(cfg):
    """Detectron2's FCOS, with the settings in MODEL.RETINANET: it has no YAML keys of its own."""
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead  # since Detectron2 0.6
    settings, channels = cfg.MODEL.RETINANET, cfg.MODEL.FPN.OUT_CHANNELS
    head = FCOSHead(input_shape=[ShapeSpec(channels=channels)] * len(settings.IN_FEATURES),
                    num_classes=settings.NUM_CLASSES, conv_dims=[channels] * settings.NUM_CONVS, norm=settings.NORM,
                    prior_prob=settings.PRIOR_PROB)
    return FCOS(backbone=build_backbone(cfg), head=head, head_in_features=settings.IN_FEATURES,
                num_classes=settings.NUM_CLASSES, focal_loss_alpha=settings.FOCAL_LOSS_ALPHA,
                focal_loss_gamma=settings.FOCAL_LOSS_GAMMA, test_score_thresh=settings.SCORE_THRESH_TEST,
                test_topk_candidates=settings.TOPK_CANDIDATES_TEST, test_nms_thresh=settings.NMS_THRESH_TEST,
                max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
                pixel_mean=cfg.MODEL.PIXEL_MEAN, pixel_std=cfg.MODEL.PIXEL_STD)


# --- Training --------------------------------------------------------------------------------------------------------

class Trainer(DefaultTrainer):
    """Detectron2's trainer with DetCon's crops, if the configuration asks for them, and every data set's evaluator."""

    @classmethod
    def build_train_loader(cls, cfg):
        if not cfg.INPUT.SCALE_JITTER:
            return build_detection_train_loader(cfg)
        side, scale = cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.SCALE_JITTER
        square = [T.ResizeScale(*scale, side, side), T.FixedSizeCrop((side, side)), T.RandomFlip()]  # DetCon A.1
        return build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True, augmentations=square))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        folder = output_folder or str(Path(cfg.OUTPUT_DIR, "inference"))
        evaluators = {"coco": lambda: COCOEvaluator(dataset_name, output_dir=folder),             # keypoints too
                      "lvis": lambda: LVISEvaluator(dataset_name, output_dir=folder),
                      "pascal_voc": lambda: PascalVOCDetectionEvaluator(dataset_name),
                      "cityscapes_instance": lambda: CityscapesInstanceEvaluator(dataset_name)}
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        if kind not in evaluators:
            common.fail(f"no evaluator for {dataset_name} ({kind})")
        return evaluators[kind]()


def trainer_for(config_file, cfg):
    """The class that trains a configuration. Adds to cfg the keys that Detectron2 does not have."""
    cfg.INPUT.SCALE_JITTER = []  # the range of the longer side, relative to INPUT.MAX_SIZE_TRAIN
    if not Path(config_file).name.startswith("densepose"):
        return Trainer
    try:
        import densepose
        from densepose.engine import Trainer as DensePoseTrainer
    except ImportError as error:
        common.fail(f"DensePose cannot be imported ({error}): it is projects/DensePose in Detectron2's repository")
    densepose.add_densepose_config(cfg)
    return DensePoseTrainer  # with its own loader and evaluator


def configure(args):
    """(cfg, the class that trains it). Exits with 2 if data, weights or a package that it needs are missing."""
    for registry, part in ((ROI_HEADS_REGISTRY, Res5NormROIHeads), (META_ARCH_REGISTRY, FCOSFromConfig),
                           (BACKBONE_REGISTRY, build_fcos_resnet_fpn_backbone)):
        if part.__name__ not in registry:
            registry.register(part)
    cfg = get_cfg()
    trainer_class = trainer_for(args.config_file, cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    for name in cfg.DATASETS.TRAIN:
        register_subset(name)
    cfg.freeze()
    check_data(cfg)
    check_weights(cfg)
    return cfg, trainer_class


def main(args):
    cfg, trainer_class = configure(args)
    restore_dropped_names()
    default_setup(cfg, args)
    if args.eval_only:
        model = trainer_class.build_model(cfg)
        with filling(model, cfg.MODEL.WEIGHTS):
            DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return trainer_class.test(cfg, model)
    trainer = trainer_class(cfg)
    with filling(trainer.checkpointer.model, cfg.MODEL.WEIGHTS):
        trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    if not Path(arguments.config_file).is_file():
        common.fail(f"--config-file {arguments.config_file or '(none given)'} is not a file; "
                    "take one of transfer/configs")
    configure(arguments)  # what is missing is reported once, not by every process
    launch(main, arguments.num_gpus, num_machines=arguments.num_machines, machine_rank=arguments.machine_rank,
           dist_url=arguments.dist_url, args=(arguments,))
