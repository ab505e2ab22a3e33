"""Turns COCO annotations into masks for detcon.py, as in DetCon's Sec. 4.4, or into label maps for segment.py.

    python transfer/coco_masks.py instances_train2017.json train2017 masks
    python detcon.py --data train2017 --masks masks
    python transfer/coco_masks.py --labels annotations.json DIR/train/images DIR/train/labels

Writes a 16-bit PNG for every image of the folder, with one bit for each of the 16 largest objects. With --labels it is
an 8-bit PNG: 0 is the background, k the k-th category by id, and small objects lie above large ones. Crowds are left
out.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402


def decode(segmentation, size):
    """The mask, bool [H, W], that a COCO segmentation describes by polygons, run lengths, or packed run lengths.

    size: (width, height) of the image.
    """
    if isinstance(segmentation, list):
        empty = np.zeros(size[::-1], bool)
        return np.any([empty, *(inside(polygon, size) for polygon in segmentation)], axis=0)
    if tuple(segmentation["size"]) != size[::-1]:
        raise ValueError(f"run lengths of {segmentation['size']} rows and columns, for {size[1]} x {size[0]}")
    counts = segmentation["counts"]
    counts = unpack(counts) if isinstance(counts, str) else counts
    values = np.arange(len(counts)) % 2 == 1                                # runs of outside, inside, outside, ...
    return np.repeat(values, counts).reshape(size[::-1], order="F")


def inside(polygon, size):
    """bool [H, W]: which pixels have their center in a polygon (x1, y1, x2, y2, ...), by the even-odd rule."""
    x, y = np.reshape(polygon, (-1, 2)).T.astype(float)
    dx, dy = np.roll(x, -1) - x, np.roll(y, -1) - y                         # the edges
    center = np.arange(size[1]) + 0.5                                       # y of each row of pixels
    edge, row = np.nonzero((y[:, None] <= center) != ((y + dy)[:, None] <= center))  # which edge crosses which row
    cross = x[edge] + (center[row] - y[edge]) / dy[edge] * dx[edge]         # x of the crossing
    first = np.ceil(cross - 0.5).clip(0, size[0]).astype(int)               # the first pixel centered to its right
    crossings = np.zeros((size[1], size[0] + 1), int)
    np.add.at(crossings, (row, first), 1)
    return crossings.cumsum(axis=1)[:, :-1] % 2 == 1


def unpack(text):
    """The counts in COCO's packed run lengths.

    A character has 5 bits of a number, the lowest first, and one bit that says whether more follow. From the fourth on,
    a number is the difference from the count two before it.
    """
    counts, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:                                                       # more follow
            continue
        if bits & 16:                                                       # negative
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value, shift = 0, 0
    return counts


def draw_bits(objects, size):
    """uint16 [H, W]: bit k tells which pixels object k has, for the first 16 objects, each a (segmentation, label)."""
    bits = np.zeros(size[::-1], np.uint16)
    for k, (segmentation, _) in enumerate(objects[:16]):
        bits |= decode(segmentation, size).astype(np.uint16) << k
    return bits


def draw_labels(objects, size):
    """uint8 [H, W]: each pixel's label, that of the last object that covers it, or 0. objects: as in `draw_bits`."""
    labels = np.zeros(size[::-1], np.uint8)
    for segmentation, label in objects:
        labels[decode(segmentation, size)] = label
    return labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", action="store_true", help="label maps instead of masks")
    parser.add_argument("annotations", help="JSON file of COCO instances")
    parser.add_argument("images", help="the folder of the images")
    parser.add_argument("masks", help="the folder to write to")
    parser.error = lambda message: common.fail(f"{message} (see --help)")
    args = parser.parse_args()
    if Path(args.masks).resolve() == Path(args.images).resolve():
        common.fail(f"{args.masks} holds the images: write the masks to another folder")
    try:
        dataset = json.loads(Path(args.annotations).read_bytes())
        known = {os.path.normpath(image["file_name"]): (image["id"], (image["width"], image["height"]))
                 for image in dataset["images"]}
        order = sorted(category["id"] for category in dataset["categories"]) if args.labels else []
        objects = {}
        area = lambda annotation: annotation.get("area") or annotation["bbox"][2] * annotation["bbox"][3]
        for annotation in sorted(dataset["annotations"], key=area, reverse=True):
            if not annotation.get("iscrowd"):
                label = 1 + order.index(annotation["category_id"]) if args.labels else None
                objects.setdefault(annotation["image_id"], []).append((annotation["segmentation"], label))
    except (OSError, ValueError, LookupError, TypeError) as error:
        common.fail(f"{args.annotations} is not a COCO instances file ({type(error).__name__}: {error})")
    if len(order) > 254:
        common.fail(f"{args.annotations} has {len(order)} categories: an 8-bit label map has room for 254")
    source, draw, empty = common.ImageFolder(args.images), draw_labels if args.labels else draw_bits, 0
    common.check_stems(source)
    for i in range(len(source)):
        name = source.name(i)
        if name not in known:
            common.fail(f"{args.annotations} has no entry for the image {name}")
        image, size = known[name]
        path = Path(args.masks, name).with_suffix(".png")
        try:
            drawn = draw(objects.get(image, []), size)
            path.parent.mkdir(parents=True, exist_ok=True)
            with common.atomic_write(path) as file:
                Image.fromarray(drawn).save(file, "png")
        except OSError as error:
            common.fail(f"cannot write {path}: {error.strerror}")
        except (ValueError, TypeError, KeyError, IndexError) as error:
            common.fail(f"{args.annotations}: an object of {name} cannot be drawn ({error})")
        empty += image not in objects
    print(f"{len(source)} files in {args.masks}; {empty} images have no object"
          + ("" if args.labels else ": the whole image is then one mask"))


if __name__ == "__main__":
    main()
