"""Images with COCO annotations: a detector's targets, the boxes of the object probe, and COCO's average precision."""
import contextlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch

import common
from transfer.coco_masks import decode


# --- Annotated images ------------------------------------------------------------------------------------------------

def keep_images(folder, names, what):
    """Reduce `folder` to the images `names`, a list of bytes, in that order. what: the list's name, for the errors."""
    missing = sorted(set(names) - set(folder.names.tobytes().split(b"\0")))
    if missing:
        common.fail(f"{folder.root} lacks {len(missing)} of the {len(names)} images of {what}: "
                    f"{os.fsdecode(missing[0])}")
    if not names:
        common.fail(f"{what} names no image")
    folder.keep(b"\0".join(names) + b"\0")


def need_pycocotools(instead):
    """Exit with 2 if the package that computes AP is not installed. instead: how to do without."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        common.fail(f"AP needs the package pycocotools: pip install pycocotools, or {instead}")


class CocoFolder(common.ImageFolder):
    """The images of a COCO annotation file and their objects, crowds left out.

    training: leave out images without objects. needs: "segmentation" or "keypoints", if every object must have them.
    `.classes`: {category id: name}; `.keypoints`: the names of the keypoints; `.ids`: COCO's image ids. An object
    without a visible keypoint is left out; one without a segmentation ends the program with code 2, as does a file
    without COCO annotations. The annotations lie in one buffer as text, since Python objects would be copied into every
    loader worker.
    """

    def __init__(self, folder, path, training, needs=None):
        super().__init__(folder)
        try:
            dataset = json.loads(Path(path).read_bytes())
            self.classes = {x["id"]: x["name"] for x in sorted(dataset["categories"], key=lambda x: x["id"])}
            self.keypoints = next((x["keypoints"] for x in dataset["categories"] if x.get("keypoints")), [])
            objects = {image["id"]: [] for image in dataset["images"]}
            for annotation in dataset["annotations"]:
                if annotation["category_id"] not in self.classes:
                    common.fail(f"{path}: an object has category {annotation['category_id']}, "
                                "which is not in `categories`")
                if annotation["image_id"] not in objects:
                    common.fail(f"{path}: an object is in image {annotation['image_id']}, which is not in `images`")
                if needs == "segmentation" and not annotation.get(needs):
                    common.fail(f"{path}: an object of image {annotation['image_id']} has no segmentation")
                x, y, w, h = map(float, annotation["bbox"])
                visible = needs != "keypoints" or any((annotation.get(needs) or [])[2::3])
                if not annotation.get("iscrowd") and w > 0 and h > 0 and visible:
                    kept = {"category_id": annotation["category_id"], "bbox": [x, y, w, h]}
                    if needs:
                        kept[needs] = annotation[needs]
                    objects[annotation["image_id"]].append(kept)
            images = [image for image in dataset["images"] if objects[image["id"]] or not training]
            names = [os.fsencode(os.path.normpath(image["file_name"])) for image in images]
            texts = [json.dumps([image.get("width"), image.get("height"), objects[image["id"]]]).encode()
                     for image in images]
            self.ids = [image["id"] for image in images]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            common.fail(f"{path} is not a COCO annotation file ({type(error).__name__}: {error})")
        if not names:
            common.fail(f"{path} annotates nothing" + (f" with {needs}" if needs else ""))
        keep_images(self, names, path)
        self.annotations, self.annotation_ends = b"".join(texts), np.cumsum([0, *map(len, texts)])

    def annotation(self, i):
        """[width, height, objects] of image i. The sizes are None if the file does not give them."""
        return json.loads(self.annotations[self.annotation_ends[i]:self.annotation_ends[i + 1]])

    def image(self, i):
        image, (width, height, _) = super().image(i), self.annotation(i)
        if (width or image.size[0], height or image.size[1]) != image.size:
            raise common.Unreadable(f"it has {image.size[0]} x {image.size[1]} pixels, its annotations {width} x "
                                    f"{height}")
        return image

    def objects(self, i):
        """(boxes [n, 4] xyxy in pixels of image i, classes [n]: 0 for the first of `.classes`, ...)."""
        objects, order = self.annotation(i)[2], list(self.classes)
        boxes = np.array([annotation["bbox"] for annotation in objects], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]                                                      # x, y, w, h -> x1, y1, x2, y2
        return boxes, np.array([order.index(annotation["category_id"]) for annotation in objects], np.int64)

    def fingerprint(self):
        return {**super().fingerprint(), "annotations": zlib.crc32(self.annotations),
                "classes": list(self.classes.values())}


def check_classes(train, val, paths):
    """Exit with 2 if two CocoFolders have different classes. paths: their JSON files."""
    if train.classes != val.classes:
        one = min(train.classes.items() ^ val.classes.items(), key=str)
        common.fail(f"the classes of {paths[1]} are not those of {paths[0]}: {one} is in only one of them")


def image_and_targets(image, rng, source, masks=False, keypoints=False, flip=False):
    """An image and the targets that torchvision's detectors expect, mirrored half of the time if `flip`.

    Returns image: uint8 [3, H, W]; boxes: [n, 4] xyxy in its pixels; labels: [n], from 1, since 0 is the background;
    shown: the number of the image; and, if asked for, masks: uint8 [n, H, W], and keypoints: [n, K, 3] (x, y, visible).
    """
    (boxes, classes), objects = source.objects(image.index), source.annotation(image.index)[2]
    boxes = boxes.clip(0, np.tile(np.float32(image.size), 2))
    kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] > 1e-3).all(axis=1))  # thinner ones vanish when mirrored
    batch = {"image": common.to_tensor(image.decode()), "shown": torch.tensor(image.index),
             "boxes": torch.from_numpy(boxes[kept]), "labels": torch.from_numpy(1 + classes[kept])}
    try:
        if masks:
            drawn = [decode(objects[i]["segmentation"], image.size) for i in kept]
            batch["masks"] = torch.from_numpy(np.array(drawn, np.uint8).reshape(-1, *image.size[::-1]))
        if keypoints:
            points = [objects[i]["keypoints"] for i in kept]
            batch["keypoints"] = torch.tensor(points, dtype=torch.float32).view(-1, len(source.keypoints), 3)
            batch["keypoints"][..., :2] += 0.5  # from COCO's pixel numbers to the centers of the pixels
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise common.Unreadable(f"its annotations cannot be drawn: {error}") from error
    return mirrored(batch, source.keypoints) if flip and rng.random() < 0.5 else batch


def mirrored(batch, names):
    """An image and its targets, mirrored. A keypoint whose name has `left` becomes its `right` twin, and vice versa."""
    width = batch["image"].shape[-1]
    batch |= {name: batch[name].flip(-1) for name in ("image", "masks") if name in batch}
    x1, y1, x2, y2 = batch["boxes"].unbind(dim=1)
    batch["boxes"] = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    if "keypoints" in batch:
        twin = lambda name: name.replace("left", "\0").replace("right", "left").replace("\0", "right")
        order = [names.index(twin(name)) if twin(name) in names else k for k, name in enumerate(names)]
        points = batch["keypoints"][:, order]
        batch["keypoints"] = torch.stack([width - points[..., 0], points[..., 1], points[..., 2]], dim=-1)
    return batch


# --- Average precision -----------------------------------------------------------------------------------------------

def ground_truth(path, source):
    """pycocotools' COCO of the annotations in `path`, with images numbered as in `source`. Fills in missing entries."""
    from pycocotools.coco import COCO
    dataset = json.loads(Path(path).read_bytes())
    number, images, annotations = {image: i for i, image in enumerate(source.ids)}, [], []
    for i in range(len(source)):
        width, height, _ = source.annotation(i)
        if not (width and height):
            with contextlib.suppress(common.Unreadable):
                width, height = source.image(i).size
        images.append({"id": i, "width": width or 1, "height": height or 1})
    for k, annotation in enumerate(dataset["annotations"], start=1):
        points = annotation.get("keypoints") or [0] * 3 * len(source.keypoints)
        annotations.append({
            **annotation, "id": k, "image_id": number[annotation["image_id"]],
            "iscrowd": annotation.get("iscrowd") or 0,
            "area": annotation.get("area") or annotation["bbox"][2] * annotation["bbox"][3],
            "keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])})
    truth = COCO()
    truth.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": dataset["categories"]}
    with contextlib.redirect_stdout(None):
        truth.createIndex()
    return truth


def detections(output, image, classes):
    """The detections in one image as rows of COCO's result format, with boxes x, y, w, h in pixels of the image.

    output: what torchvision's detector returned; image: its number in `ground_truth`; classes: the category ids in the
    order of the detector's labels.
    """
    from pycocotools import mask as rle
    output = {name: x.float().cpu().numpy() for name, x in output.items()}
    output["boxes"][:, 2:] -= output["boxes"][:, :2]
    rows = [{"image_id": image, "category_id": classes[int(label) - 1], "score": float(score), "bbox": box.tolist()}
            for label, score, box in zip(output["labels"], output["scores"], output["boxes"]) if label > 0]
    for row, mask in zip(rows, output.get("masks", ())):
        code = rle.encode(np.asfortranarray(mask[0] > 0.5, np.uint8))
        row["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    for row, points in zip(rows, output.get("keypoints", ())):
        row["keypoints"] = (points - [0.5, 0.5, 0]).flatten().tolist()
    return rows


def average_precision(truth, rows, kinds):
    """{"AP", "AP50", "AP75", "mask_AP", ...} in percent, by pycocotools.

    truth: what `ground_truth` returned; rows: those of `detections`, of all images; kinds: some of "bbox", "segm" and
    "keypoints".
    """
    from pycocotools.cocoeval import COCOeval
    figures = {}
    for kind in kinds:
        values = [0.0] * 3
        if rows:
            with contextlib.redirect_stdout(None):
                evaluation = COCOeval(truth, truth.loadRes([dict(row) for row in rows]), kind)
                points = len(rows[0].get("keypoints", ())) // 3
                # The default is for the 17 keypoints of a person; a moderate tolerance serves any others.
                if kind == "keypoints" and points != len(evaluation.params.kpt_oks_sigmas):
                    evaluation.params.kpt_oks_sigmas = np.full(points, 0.05)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            values = [max(0.0, 100 * float(x)) for x in evaluation.stats[:3]]
        prefix = {"bbox": "", "segm": "mask_", "keypoints": "keypoint_"}[kind]
        figures |= {f"{prefix}{name}": round(x, 2) for name, x in zip(("AP", "AP50", "AP75"), values)}
    return figures
