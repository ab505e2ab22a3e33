"""Images with COCO annotations: targets for a detector, objects for a probe, and COCO's average precision."""
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

class Annotated(common.ImageFolder):
    """The images of a COCO annotation file. With `training` those that show something to learn, crowds aside.

    needs: what each object must have beside its box, "segmentation" or "keypoints" (an object without is not learned).
    `.classes`: {category id: name}; `.keypoints`: names of the keypoints; `.ids`: COCO's image ids. What the file says
    of an image is kept as text in one buffer, which does not grow with each worker. Exits with 2 on a file that is none.
    """

    def __init__(self, folder, path, training, needs=None):
        super().__init__(folder)
        try:
            notes = json.loads(Path(path).read_text())
            self.classes = {x["id"]: x["name"] for x in sorted(notes["categories"], key=lambda x: x["id"])}
            self.keypoints = next((x["keypoints"] for x in notes["categories"] if x.get("keypoints")), [])
            objects = {image["id"]: [] for image in notes["images"]}
            for note in notes["annotations"]:
                if note["category_id"] not in self.classes:
                    common.fail(f"{path}: an object is of category {note['category_id']}, which `categories` lacks")
                if note["image_id"] not in objects:
                    common.fail(f"{path}: an object is in image {note['image_id']}, which `images` lacks")
                if needs == "segmentation" and not note.get(needs):
                    common.fail(f"{path}: an object of image {note['image_id']} has no segmentation")
                x, y, w, h = map(float, note["bbox"])
                seen = needs != "keypoints" or any((note.get(needs) or [])[2::3])
                if not note.get("iscrowd") and w > 0 and h > 0 and seen:
                    objects[note["image_id"]].append({"category_id": note["category_id"], "bbox": [x, y, w, h],
                                                      **({needs: note[needs]} if needs else {})})
            images = [image for image in notes["images"] if objects[image["id"]] or not training]
            names = [os.fsencode(os.path.normpath(image["file_name"])) for image in images]
            texts = [json.dumps([image.get("width"), image.get("height"), objects[image["id"]]]).encode()
                     for image in images]
            self.ids = [image["id"] for image in images]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            common.fail(f"{path} is no file of COCO annotations ({type(error).__name__}: {error})")
        if not names:
            common.fail(f"{path} annotates nothing" + (f" with {needs}" if needs else ""))
        self.only(names, path)
        self.notes, self.note_ends = b"".join(texts), np.cumsum([0, *map(len, texts)])

    def note(self, i):
        """[width, height, objects] of image i, as the file has them."""
        return json.loads(self.notes[self.note_ends[i]:self.note_ends[i + 1]])

    def photo(self, i):
        photo, (width, height, _) = super().photo(i), self.note(i)
        if (width or photo.size[0], height or photo.size[1]) != photo.size:
            raise common.Unreadable(f"it has {photo.size[0]} x {photo.size[1]} pixels, its annotations {width} x "
                                    f"{height}")
        return photo

    def objects(self, i):
        """Boxes [n, 4] xyxy in pixels of image i, and their classes [n], counted in the order of `classes`."""
        notes, order = self.note(i)[2], list(self.classes)
        boxes = np.array([note["bbox"] for note in notes], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]                                                      # x, y, w, h -> x1, y1, x2, y2
        return boxes, np.array([order.index(note["category_id"]) for note in notes], np.int64)

    def identity(self):
        return {**super().identity(), "annotations": zlib.crc32(self.notes), "classes": list(self.classes.values())}


def example(photo, rng, source, masks=False, keypoints=False, flip=False):
    """A picture [3, H, W] uint8 and torchvision's targets: boxes [n, 4] xyxy in its pixels; labels [n], from 1 as 0 is
    the ground; with `masks` [n, H, W], with `keypoints` [n, K, 3] (x, y, visible). `flip`: mirrored half of the time."""
    (boxes, classes), objects = source.objects(photo.index), source.note(photo.index)[2]
    boxes = boxes.clip(0, np.tile(np.float32(photo.size), 2))
    seen = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    batch = {"image": common.to_tensor(photo.decode()), "at": torch.tensor(photo.index),
             "boxes": torch.from_numpy(boxes[seen]), "labels": torch.from_numpy(1 + classes[seen])}
    try:
        if masks:
            drawn = [decode(objects[i]["segmentation"], photo.size) for i in seen]
            batch["masks"] = torch.from_numpy(np.array(drawn, np.uint8).reshape(-1, *photo.size[::-1]))
        if keypoints:
            points = [objects[i]["keypoints"] for i in seen]
            batch["keypoints"] = torch.tensor(points, dtype=torch.float32).view(-1, len(source.keypoints), 3)
            batch["keypoints"][..., :2] += 0.5  # COCO's are numbers of pixels, ours are places: the middles of those
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise common.Unreadable(f"its annotations cannot be drawn: {error}") from error
    return mirrored(batch, source.keypoints) if flip and rng.random() < 0.5 else batch


def mirrored(batch, names):
    """An example mirrored; keypoints called left_... and right_... change places."""
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
    """The annotations at `path` for pycocotools, with what annotators leave out, and images numbered as in `source`."""
    from pycocotools.coco import COCO
    notes, number = json.loads(Path(path).read_text()), {image: i for i, image in enumerate(source.ids)}
    images, annotations = [], []
    for i in range(len(source)):
        width, height, _ = source.note(i)
        if not (width and height):
            with contextlib.suppress(common.Unreadable):
                width, height = source.photo(i).size
        images.append({"id": i, "width": width or 1, "height": height or 1})
    for k, note in enumerate(notes["annotations"], start=1):
        points = note.get("keypoints") or [0] * 3 * len(source.keypoints)
        annotations.append({
            **note, "id": k, "image_id": number[note["image_id"]], "iscrowd": note.get("iscrowd") or 0,
            "area": note.get("area") or note["bbox"][2] * note["bbox"][3],
            "keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])})
    truth = COCO()
    truth.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": notes["categories"]}
    with contextlib.redirect_stdout(None):
        truth.createIndex()
    return truth


def detections(output, image, classes):
    """torchvision's detections in one image as rows of COCO's result format: pixels of the image, boxes x, y, w, h."""
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
    """pycocotools' judgment of `rows`, in COCO's result format, against `ground_truth`: {"AP": in per cent, "AP50",
    "AP75", "mask_AP", ...}. kinds: bbox, segm, keypoints."""
    from pycocotools.cocoeval import COCOeval
    figures = {}
    for kind in kinds:
        values = [0.0] * 3
        if rows:
            with contextlib.redirect_stdout(None):
                judge = COCOeval(truth, truth.loadRes([dict(row) for row in rows]), kind)
                points = len(rows[0].get("keypoints", ())) // 3
                if kind == "keypoints" and points != len(judge.params.kpt_oks_sigmas):
                    judge.params.kpt_oks_sigmas = np.full(points, 0.05)  # COCO's are those of a person's 17 keypoints
                judge.evaluate()
                judge.accumulate()
                judge.summarize()
            values = [max(0.0, 100 * float(x)) for x in judge.stats[:3]]
        prefix = {"bbox": "", "segm": "mask_", "keypoints": "keypoint_"}[kind]
        figures |= {f"{prefix}{name}": round(x, 2) for name, x in zip(("AP", "AP50", "AP75"), values)}
    return figures
