"""Converts weights to the names of Detectron2 or torchvision: last.pt of any method, or what others released.

    python transfer/convert.py runs/soco/last.pt soco.pkl                    Detectron2: MODEL.WEIGHTS soco.pkl
    python transfer/convert.py runs/soco/last.pt soco.pth                 torchvision's Faster, Mask and Keypoint R-CNN
    python transfer/convert.py runs/soco/last.pt soco.pth --to torchvision-p3    its RetinaNet and FCOS
    python transfer/convert.py runs/moco/last.pt moco.pth --to resnet        torchvision.models.resnet50 and the like
    python transfer/convert.py ckpt_epoch_400.pth soco.pkl                   a file of SoCo's, MoCo's or DetCo's authors
    python transfer/convert.py soco.pkl soco.pth                             from Detectron2's names to torchvision's

Every file gives its backbone. SoCo with FPN also gives the pyramid and the box head, which has four convolutions and
one linear layer: use configs/soco-fpn-*.yaml, detect.py, or torchvision's fasterrcnn_resnet50_fpn_v2 and
maskrcnn_resnet50_fpn_v2. Load a file with torchvision's names by `load_state_dict(torch.load(FILE), strict=False)`:
only the detector's new layers are missing. torchvision's other detectors have no norms in the pyramid, so SoCo's would
fit only in part: remove the tensors named backbone.fpn.* first, or build the detector with detect.py.
"""
import argparse
import pickle
import re
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

UNTRAINED = ("random", "random0")  # what --init takes beside files: networks that --seed draws
PARTS = ("online", "query", "target", "key")


def read(path, part="online"):
    """(the tensors of one network, by our names; the common.Weights). Exits with 2 if the file has no such network."""
    weights = common.read_weights(path)
    tensors = weights.target if part in ("target", "key") else weights.online
    if not tensors:
        common.fail(f"{path} has no {part} network, only the trained one: take --part online")
    return tensors, weights


# --- Names -----------------------------------------------------------------------------------------------------------

def resnet_name(name):
    """The tensor's name in torchvision's ResNet, or None if that has no place for it."""
    return name.removeprefix("backbone.") if name.startswith("backbone.") else None


def torchvision_name(name, lowest=2):
    """The tensor's name in torchvision's detectors, or None if they have no place for it.

    lowest: the pyramid's first level, 3 in RetinaNet and FCOS, else 2. torchvision counts the FPN's blocks from there.
    """
    part, _, rest = name.partition(".")
    if part == "backbone":
        return f"backbone.body.{rest}"
    if part == "fpn":
        block, i, rest = rest.split(".", 2)                                 # inner_blocks.0.0.weight, for example
        place = int(i) + 2 - lowest
        return f"backbone.fpn.{block}.{place}.{rest}" if place >= 0 else None
    if part == "head" and lowest == 2:                                      # the others have no box head
        return f"roi_heads.box_head.{rest}"
    return None


def detectron2_name(name, modules=common.module_names(common.DETECTRON2)):
    """The end of the tensor's name in Detectron2's models, or None if they have no place for it.

    Detectron2's checkpointer matches names by their ends, since beginnings differ: a backbone's is `backbone.` or
    `backbone.bottom_up.`, and in a C4 detector res5 is in `roi_heads.`.
    """
    module = common.longest_prefix(name, modules)
    if not module:
        return None
    return ("roi_heads." if module.startswith("head.") else "") + modules[module] + name[len(module):]


NAMES = {"detectron2": detectron2_name, "torchvision": torchvision_name,
         "torchvision-p3": lambda name: torchvision_name(name, lowest=3), "resnet": resnet_name}


def write(path, tensors, to):
    """Write the tensors as a dict for torch.load, or as the .pkl that Detectron2's checkpointer expects."""
    with common.atomic_write(path) as file:
        if to == "detectron2":
            tensors = {name: x.detach() for name, x in tensors.items()}
            arrays = {name: (x.float() if x.is_floating_point() else x).numpy()  # NumPy has no bf16
                      for name, x in tensors.items()}
            content = {"model": arrays,
                       "__author__": "pre-training for detection",
                       "matching_heuristics": True}
            # Detectron2 often runs with NumPy 1, which knows arrays by this name only. NumPy 2 knows both names.
            file.write(pickle.dumps(content, 3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
        else:
            torch.save(tensors, file)


# --- What the other scripts start from -------------------------------------------------------------------------------

def add_init(add, nargs=None):
    """Add the flags --init, --part and --arch. add: a parser's add_argument; nargs: of --init."""
    add("--init", required=True, metavar="WHAT", nargs=nargs,
        help="last.pt of one of the five methods or of classify.py; what the authors of MoCo, DetCo or SoCo released; "
        "torchvision's weights of a ResNet; Detectron2's .pkl; random; or random0, where "
        "the last BN gamma of each residual block is 0, as SoCo and DetCon begin")
    add("--part", choices=PARTS, default="online", help="online or query, target or key (default: online)")
    add("--arch",
        help="resnet18 34 50 101 152 200, with wX for X times the channels; resnext50_32x8d (default: --init's, "
        "or resnet50)")


def initial(args, taken=("backbone",)):
    """(the tensors of --init, by our names; the settings of the run that made them). For random, both are empty.

    Prints what the file is, which of its parts are `taken`, and which have no place. Fills in --arch; exits with 2 if
    --arch is given and the file has another. Sets args.init_checksum, so that a run remembers the file by its content
    and not by its path.
    """
    if args.init in UNTRAINED:
        args.arch, args.init_checksum = args.arch or "resnet50", args.init
        if args.init == "random":
            return {}, {}
        common.seed_everything(args.seed)
        network = common.resnet(args.arch, zero_init_residual=True)
        return {f"backbone.{name}": x for name, x in network.state_dict().items()}, {}
    tensors, weights = read(args.init, args.part)
    weights.choose_arch(args)
    if common.rank() == 0:
        print(weights.sentence([part for part in taken if part in common.parts(tensors)]))
    return tensors, weights.settings


def build(arch, tensors, norm_layer=None):
    """A common.Backbone with the tensors of `initial`, on the CPU. Its weights are random if there are no tensors."""
    network = common.resnet(arch, norm_layer)
    tensors = {resnet_name(name): x for name, x in tensors.items() if resnet_name(name)}
    network.load_state_dict(tensors, strict=bool(tensors))
    return network


def backbone(args, norm_layer=None):
    """The common.Backbone of --init and --arch, on the CPU."""
    tensors, _ = initial(args)
    return build(args.arch, tensors, norm_layer)


def detectron2_settings(arch):
    """How a Detectron2 configuration describes an --arch, as text."""
    with torch.device("meta"):
        network = common.resnet(arch)
    depth, stem = int(re.match(r"resnex?t(\d+)", arch)[1]), network.conv1.out_channels
    if depth == 200 or depth < 50 and stem != 64:
        return f"none; Detectron2 has no {arch}"
    groups, width = (network.groups, network.base_width) if network.groups > 1 else (1, stem)
    return (f"MODEL.RESNETS.DEPTH {depth} MODEL.RESNETS.STEM_OUT_CHANNELS {stem} MODEL.RESNETS.NUM_GROUPS {groups} "
            f"MODEL.RESNETS.WIDTH_PER_GROUP {width} MODEL.RESNETS.RES2_OUT_CHANNELS {network.channels[0]}"
            f"{' (not for C4)' if depth < 50 else ''}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: common.fail(f"{message} (see --help)")
    parser.add_argument("weights", help="last.pt, or another file that the list above names")
    parser.add_argument("file", help="the file to write: .pkl for Detectron2, anything else for torchvision")
    parser.add_argument("--to", choices=list(NAMES), help="whose names (default: as the file's extension says)")
    parser.add_argument("--part", choices=PARTS, default="online",
                        help="which network (default: online, the one that was trained)")
    args = parser.parse_args()
    to = args.to or ("detectron2" if args.file.endswith(".pkl") else "torchvision")
    if (to == "detectron2") != args.file.endswith(".pkl"):
        common.fail(f"--to {to} does not fit {args.file}: Detectron2's names, and no others, go into a .pkl")
    if Path(args.file).resolve() == Path(args.weights).resolve():
        common.fail(f"{args.file} would be written over: take another name")
    tensors, weights = read(args.weights, args.part)
    names = {name: NAMES[to](name) for name in tensors}
    try:
        write(args.file, {new: tensors[name] for name, new in names.items() if new}, to)
    except OSError as error:
        common.fail(f"cannot write {args.file}: {error.strerror}")
    print(f"{weights.what}, {args.part} network -> {args.file}, for {to}")
    placed, left = Counter(), Counter()
    for name, new in names.items():
        part = name.partition(".")[0]
        if new:
            placed[part, re.match(r"(roi_heads\.|backbone\.)?[^.]+", new)[0]] += 1  # backbone.fpn, for example
        else:
            left[part] += 1
    for (part, place), count in placed.items():
        print(f"  {part} -> {place}: {count} tensors")
    for part, count in left.items():
        print(f"  {part}: {count} tensors left out, for which {to} has no place")
    if to == "detectron2" and weights.settings["arch"] != "resnet50":
        print(f"  its configuration: {detectron2_settings(weights.settings['arch'])}")


if __name__ == "__main__":
    main()
