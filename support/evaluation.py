"""Turns the outputs of a model into scored boxes in pixels, and these into the 12 COCO numbers.

Legend: B images, Q queries, C classes, k scored boxes in one image. Boxes are (cx, cy, w, h) in [0, 1] of the
unpadded image; `boxes_xyxy` are two corners in pixels.
"""
import contextlib
import io

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_convert

from support.images import AnnotatedImage


def boxes_to_pixels(boxes, size):
    """Boxes [..., 4], (cx, cy, w, h) in [0, 1] -> xyxy in pixels of an image of `size`, (height, width)."""
    height, width = size
    scale = torch.tensor([width, height, width, height], dtype=torch.float32, device=boxes.device)
    return box_convert(boxes.float(), "cxcywh", "xyxy") * scale


@torch.no_grad()
def postprocess(logits, boxes, sizes, softmax, num_classes=None, most=100):
    """Outputs of one stage -> scored boxes. Low scores stay, because AP measures the ranking.

    logits [B, Q, C] (with softmax C + 1, the last is no-object), boxes [B, Q, 4]; sizes: B pairs (height,
    width) of the original images. Returns B dicts: scores [k], labels [k], boxes [k, 4] xyxy in original
    pixels. With softmax: the best class of each query, k = Q. Otherwise: the best `most` of all Q * C pairs,
    so a query may give two answers. num_classes: of real classes, without SMCA's additional sigmoid.
    """
    logits = logits.float()
    if softmax:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)  # [B, Q]
    else:
        B, Q, C = logits.shape
        scores, pairs = logits.sigmoid().flatten(1).topk(min(most, Q * C))  # [B, k]
        labels = pairs % C
        boxes = boxes.take_along_dim((pairs // C)[:, :, None], 1)  # [B, k, 4]
    named = labels < (num_classes or logits.shape[-1])  # [B, k]
    return [{"scores": s[n], "labels": l[n], "boxes": boxes_to_pixels(b[n], size)}
            for s, l, b, n, size in zip(scores, labels, boxes, named, sizes)]


def to_coco(dataset, annotated_images, scores=None):
    """pycocotools' form of AnnotatedImages; with `scores`, one list per image, they are detections."""
    images, annotations = [], []
    for k, annotated in enumerate(annotated_images):
        images.append({"id": annotated.id, "height": annotated.height, "width": annotated.width})
        boxes = box_convert(torch.as_tensor(annotated.boxes_xyxy), "xyxy", "xywh").tolist()
        for i, (label, box) in enumerate(zip(annotated.labels.tolist(), boxes)):
            annotations.append({
                "id": len(annotations) + 1,  # not the file's: COCOeval takes a match with id 0 for no match
                "image_id": annotated.id, "category_id": dataset.category_ids[label], "bbox": box,
                "area": float(annotated.areas[i]), "iscrowd": int(annotated.crowd[i]),
                "score": scores[k][i] if scores else 1.0,
            })
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": [
        {"id": i, "name": name} for i, name in zip(dataset.category_ids, dataset.class_names)]}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        coco.createIndex()
    return coco


METRICS = {
    "AP": "average precision, mean over IoU 0.50, 0.55, ... 0.95: the number that papers call AP",
    "AP50": "AP where a box is right from an IoU of 0.50",
    "AP75": "AP where a box is right from an IoU of 0.75: needs tight boxes",
    "AP_small": "AP of objects up to 32 x 32 pixels in area",
    "AP_medium": "AP of objects from 32 x 32 to 96 x 96 pixels",
    "AP_large": "AP of objects of more than 96 x 96 pixels",
    "AR1": "average recall, same IoUs, with only the best box per image and class",
    "AR10": "average recall with the best 10 boxes",
    "AR100": "average recall with the best 100 boxes",
    "AR_small": "AR100 of small objects",
    "AR_medium": "AR100 of medium objects",
    "AR_large": "AR100 of large objects",
}
WARNED = set()  # names of data sets, so that a run prints the warning once


def coco_eval(dataset, predictions):
    """{name of METRICS: number} of {image id: dict from `postprocess`}; nothing was found in other images."""
    if dataset.max_boxes > 100 and dataset.name not in WARNED:
        WARNED.add(dataset.name)
        print(f"WARNING  {dataset.name}: an image has {dataset.max_boxes} objects, but COCO's AP counts at "
              "most 100 answers in an image. Expect a lower AP; support.predict returns all answers.")
    truth, found = dataset.coco, []
    for image_id, one in predictions.items():
        boxes_xyxy, size = one["boxes"].cpu(), truth.imgs[image_id]
        areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)  # [k]
        found.append(AnnotatedImage(image_id, "", size["height"], size["width"], one["labels"], boxes_xyxy,
                                    areas, crowd=torch.zeros_like(areas)))
    scores = [one["scores"].tolist() for one in predictions.values()]
    judge = COCOeval(truth, to_coco(dataset, found, scores), "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return dict(zip(METRICS, judge.stats.tolist()))


def signs_of_collapse(all_boxes, predictions):
    """Whether a model predicts the same boxes everywhere. all_boxes: [Q, 4] of each image, in one unit."""
    fewest = min(len(boxes) for boxes in all_boxes)  # two stages: a small image has fewer
    boxes = torch.stack([boxes[:fewest] for boxes in all_boxes])  # [N, Q, 4]
    seen = torch.cat([one["labels"][one["scores"] > 0.3] for one in predictions.values()]).unique()
    return {
        "spread_images": boxes.std(0, unbiased=False).mean().item(),  # one query over all images
        "spread_queries": boxes.std(1, unbiased=False).mean().item(),  # one image over all queries
        "classes_predicted": len(seen),
    }


def metrics_table(metrics):
    """A table that explains the 12 numbers."""
    rows = [f"{name:<10} {metrics[name]:6.3f}  {meaning}" for name, meaning in METRICS.items()]
    return "\n".join(rows + ["-1: no ground truth of that size. Pixels are those of the original images."])
