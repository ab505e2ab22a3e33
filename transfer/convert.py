"""From a checkpoint to a detector: last.pt of any of the five methods in Detectron2's or torchvision's names.

    python transfer/convert.py runs/soco/last.pt soco.pkl                    Detectron2: MODEL.WEIGHTS soco.pkl
    python transfer/convert.py runs/soco/last.pt soco.pth                    torchvision's Faster, Mask and Keypoint R-CNN
    python transfer/convert.py runs/soco/last.pt soco.pth --to torchvision-p3    its RetinaNet and FCOS
    python transfer/convert.py runs/moco/last.pt moco.pth --to resnet        torchvision.models.resnet50 and the like

Every method gives its backbone; SoCo with FPN also the pyramid and the box head (four convolutions, one linear layer: use
configs/soco-*.yaml, or torchvision's fasterrcnn_resnet50_fpn_v2). Load the files of torchvision's names with
`load_state_dict(torch.load(FILE), strict=False)`: only the detector's new layers are missing.
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

NETWORKS = {"moco": ("encoder_q", "encoder_k"), "detco": ("encoder_q", "encoder_k"), "dupr": ("encoder_q", "encoder_k"),
            "soco": ("online", "target"), "detcon": ("online", "target")}
PARTS = ("online", "query", "target", "key")


def read(path, part="online"):
    """One network of a last.pt -> (its tensors, method, settings): `backbone.*` with torchvision's ResNet names, of SoCo with
    FPN also `fpn.*` and `head.*`, and what belongs to the pretext task. Exits with 2 where there is none."""
    state = common.load(path)
    if state["method"] not in NETWORKS:
        common.fail(f"{path} is of {state['method']}: take a checkpoint of {', '.join(NETWORKS)}")
    prefix = NETWORKS[state["method"]][PARTS.index(part) // 2] + "."
    tensors = {name.removeprefix(prefix): x for name, x in state["model"].items() if name.startswith(prefix)}
    if not tensors:
        common.fail(f"{path} has no {part} network, only the one that was trained: take --part online")
    return tensors, state["method"], state["settings"]


# --- Names -----------------------------------------------------------------------------------------------------------

def resnet_name(name):
    return name.removeprefix("backbone.") if name.startswith("backbone.") else None


def torchvision_name(name, lowest=2):
    """In torchvision's detectors; None for what they have no place for. lowest: the pyramid's first level, 3 in RetinaNet and
    FCOS, whose blocks count from there."""
    part, _, rest = name.partition(".")
    if part == "fpn":
        block, i, rest = rest.split(".", 2)                                 # inner_blocks or layer_blocks
        return f"backbone.fpn.{block}.{int(i) + 2 - lowest}.{rest}" if int(i) + 2 >= lowest else None
    if part == "head" and lowest > 2:
        return None
    return {"backbone": "backbone.body.", "head": "roi_heads.box_head."}[part] + rest if part in ("backbone", "head") else None


def detectron2_name(name):
    """In Detectron2's models, less the prefix in which they differ: `backbone.` or `backbone.bottom_up.`, and `roi_heads.` of
    res5 in a C4 detector. Its checkpointer matches by the end of a name."""
    rules = [(r"backbone\.conv1", lambda m: "stem.conv1"), (r"backbone\.bn1", lambda m: "stem.conv1.norm"),
             (r"backbone\.layer(\d)\.(\d+)\.conv(\d)", lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[3]}"),
             (r"backbone\.layer(\d)\.(\d+)\.bn(\d)", lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.norm"),
             (r"backbone\.layer(\d)\.(\d+)\.downsample\.0", lambda m: f"res{int(m[1]) + 1}.{m[2]}.shortcut"),
             (r"backbone\.layer(\d)\.(\d+)\.downsample\.1", lambda m: f"res{int(m[1]) + 1}.{m[2]}.shortcut.norm"),
             (r"fpn\.inner_blocks\.(\d)\.0", lambda m: f"fpn_lateral{int(m[1]) + 2}"),
             (r"fpn\.inner_blocks\.(\d)\.1", lambda m: f"fpn_lateral{int(m[1]) + 2}.norm"),
             (r"fpn\.layer_blocks\.(\d)\.0", lambda m: f"fpn_output{int(m[1]) + 2}"),
             (r"fpn\.layer_blocks\.(\d)\.1", lambda m: f"fpn_output{int(m[1]) + 2}.norm"),
             (r"head\.(\d)\.0", lambda m: f"roi_heads.box_head.conv{int(m[1]) + 1}"),
             (r"head\.(\d)\.1", lambda m: f"roi_heads.box_head.conv{int(m[1]) + 1}.norm"),
             (r"head\.5", lambda m: "roi_heads.box_head.fc1")]              # both flatten a RoI as channel, row, column
    for pattern, new in rules:
        if match := re.match(pattern + r"(?=\.[a-z_]+$)", name):
            return new(match) + name[match.end():]
    return None


NAMES = {"detectron2": detectron2_name, "torchvision": torchvision_name,
         "torchvision-p3": lambda name: torchvision_name(name, lowest=3), "resnet": resnet_name}


def convert(tensors, to):
    """{name: tensor} as `read` gives it -> (the same in the names of `to`, {a part of the network: how many of its tensors have
    no place there})."""
    named = {name: NAMES[to](name) for name in tensors}
    return ({new: tensors[name] for name, new in named.items() if new},
            Counter(name.partition(".")[0] for name, new in named.items() if not new))


def write(path, tensors, to):
    """The tensors as a file: a dict for torch.load, or what Detectron2's checkpointer expects of a .pkl."""
    with common.whole(path) as file:
        if to == "detectron2":
            content = {"model": {name: x.numpy() for name, x in tensors.items()}, "__author__": "pre-training for detection",
                       "matching_heuristics": True}
            # The many Detectron2s with NumPy 1 know arrays by their old address, where NumPy 2 still finds them.
            file.write(pickle.dumps(content, 3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
        else:
            torch.save(tensors, file)


# --- What the other scripts start from -------------------------------------------------------------------------------

def add_init(parser):
    """The flags --init, --part and --arch."""
    add = parser.own.add_argument
    add("--init", required=True, metavar="WHAT",
        help="last.pt of one of the five methods, torchvision's weights of a ResNet (.pth), or: random")
    add("--part", choices=PARTS, default="online", help="of last.pt: online or query, target or key (default: online)")
    add("--arch", help="resnet18 34 50 101 152 200, with wX for X times the channels; resnext50_32x8d (default: last.pt's, "
                       "or resnet50)")


def initial(args):
    """What --init names: {`backbone.*`, and of SoCo with FPN `fpn.*` and `head.*`: tensor}, empty for random. Fills in --arch; exits
    with 2 where the file is of another."""
    tensors = {}
    if args.init == "random":
        args.arch = args.arch or "resnet50"
        return tensors
    try:
        state = torch.load(args.init, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may make anything of the unpickler
        common.fail(f"--init {args.init} cannot be read ({' '.join(str(error).split())[:60]})")
    if isinstance(state, dict) and "conv1.weight" in state:
        args.arch = args.arch or "resnet50"
        tensors = {f"backbone.{name}": x for name, x in state.items() if not name.startswith("fc.")}
    else:
        tensors, _, settings = read(args.init, args.part)
        if args.arch not in (None, settings["arch"]):
            common.fail(f"--init {args.init} is a {settings['arch']}, not --arch {args.arch}: leave --arch out")
        args.arch = settings["arch"]
    with torch.device("meta"):
        shapes = {f"backbone.{name}": x.shape for name, x in common.resnet(args.arch).state_dict().items()}
    theirs = {name: getattr(x, "shape", None) for name, x in tensors.items() if name.startswith("backbone.")}
    other = [name for name in shapes | theirs if shapes.get(name) != theirs.get(name)]
    if other:
        common.fail(f"--init {args.init} is no {args.arch}: {other[0]} is in one alone, or of another shape; mend --arch")
    return tensors


def backbone(args, norm_layer=None):
    """The common.Backbone that --init names, of --arch, on the CPU."""
    tensors = initial(args)
    network = common.resnet(args.arch, norm_layer)
    network.load_state_dict({resnet_name(name): x for name, x in tensors.items() if resnet_name(name)}, strict=bool(tensors))
    return network


def detectron2_settings(arch):
    """What a Detectron2 configuration says of an --arch."""
    with torch.device("meta"):
        network = common.resnet(arch)
    depth, stem = int(re.match(r"resnex?t(\d+)", arch)[1]), network.conv1.out_channels
    if depth == 200 or depth < 50 and stem != 64:
        return f"none, Detectron2 has no {arch}"
    groups, width = (network.groups, network.base_width) if network.groups > 1 else (1, stem)
    return (f"MODEL.RESNETS.DEPTH {depth} MODEL.RESNETS.STEM_OUT_CHANNELS {stem} MODEL.RESNETS.NUM_GROUPS {groups} "
            f"MODEL.RESNETS.WIDTH_PER_GROUP {width} MODEL.RESNETS.RES2_OUT_CHANNELS {network.channels[0]}"
            f"{' (not for C4)' if depth < 50 else ''}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: common.fail(f"{message} (see --help)")
    parser.add_argument("checkpoint", help="last.pt of one of the five methods")
    parser.add_argument("file", help="to write: .pkl for Detectron2, anything else for torchvision")
    parser.add_argument("--to", choices=list(NAMES), help="whose names (default: by the file's)")
    parser.add_argument("--part", choices=PARTS, default="online", help="which network (default: online, the one that is trained)")
    args = parser.parse_args()
    to = args.to or ("detectron2" if args.file.endswith(".pkl") else "torchvision")
    tensors, method, settings = read(args.checkpoint, args.part)
    converted, left = convert(tensors, to)
    try:
        write(args.file, converted, to)
    except OSError as error:
        common.fail(f"cannot write {args.file}: {error.strerror}")
    print(f"{method}, {settings['arch']}, {args.part} network -> {args.file}, for {to}")
    places = Counter((name.partition(".")[0], re.match(r"(roi_heads\.|backbone\.)?[^.]+", NAMES[to](name))[0])
                     for name in tensors if NAMES[to](name))
    for (part, place), count in places.items():
        print(f"  {part} -> {place}: {count} tensors")
    for part, count in left.items():
        print(f"  {part}: {count} tensors left out, " + (f"{to} has no place for it" if part in ("fpn", "head")
                                                         else "which are the pretext task's"))
    if to == "detectron2" and settings["arch"] != "resnet50":
        print(f"  its configuration: {detectron2_settings(settings['arch'])}")


if __name__ == "__main__":
    main()
