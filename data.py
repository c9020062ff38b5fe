"""Data for all five detectors: images in, padded batches out, COCO numbers at the end."""
import contextlib
import copy
import io

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import Dataset
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(Exception):
    """Something is wrong with the data."""


def load(data=None, *, train_json=None, train_images=None, val_json=None, val_images=None, size=None,
         augment="laptop", seed=0, splits=("train", "val")):
    sets = {"train": Shapes(20000, size or 128, seed, "train"), "val": Shapes(250, size or 128, 0, "val")}
    return {split: sets[split] for split in splits}


SHAPE_NAMES = ["circle", "square", "triangle", "cross", "ring"]
CROSS = np.array([(1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1),
                  (-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)]) / 10 ** 0.5  # [12, 2] in the unit circle


class Shapes(Dataset):
    class_names = SHAPE_NAMES
    category_ids = [1, 2, 3, 4, 5]
    max_boxes = 8

    def __init__(self, num_images, size=128, seed=0, split="train"):
        self.items = range(num_images)
        self.size, self.seed, self.split = size, seed, split
        self.name, self.notes = f"shapes {split}", []
        self._coco = None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        number = self.items[key[1] if isinstance(key, tuple) else key]
        image, labels, boxes_xyxy, _ = self.draw(number)
        height, width = image.shape[:2]
        image = torch.from_numpy(image).permute(2, 0, 1).contiguous()  # [3, H, W]
        return finish(image, torch.from_numpy(boxes_xyxy), torch.from_numpy(labels), number, (height, width))

    def draw(self, number):
        rng = np.random.default_rng([self.seed, self.split == "val", number])
        height, width = (int(side) for side in rng.integers(self.size * 3 // 4, self.size + 1, 2))
        image = draw_background(rng, height, width)
        owner = np.full((height, width), -1)
        labels, areas = [], []
        wanted = 0 if rng.random() < 0.06 else int(rng.integers(1, self.max_boxes + 1))
        for _ in range(4 * wanted):
            if len(labels) == wanted:
                break
            label = int(rng.integers(len(SHAPE_NAMES)))
            diameter = self.size / 128 * float(np.exp(rng.uniform(np.log(11), np.log(64))))
            alpha = draw_shape(SHAPE_NAMES[label], diameter, rng.uniform(0, 2 * np.pi))  # [h, w]
            h, w = alpha.shape
            y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            here = np.s_[y:y + h, x:x + w]
            hidden = np.bincount(owner[here][alpha > 0.5] + 1, minlength=len(labels) + 1)[1:]
            visible = np.bincount(owner.ravel() + 1, minlength=len(labels) + 1)[1:]
            if any(visible[k] - hidden[k] < 0.6 * areas[k] for k in range(len(labels)) if hidden[k]):
                continue
            colour = pick_colour(rng, image[here].mean((0, 1)))
            image[here] += alpha[:, :, None] * (colour * texture(rng, h, w)[:, :, None] - image[here])
            owner[here][alpha > 0.5] = len(labels)
            labels.append(label)
            areas.append((alpha > 0.5).sum())
        boxes = np.zeros((len(labels), 4), np.float32)
        for k in range(len(labels)):
            ys, xs = np.nonzero(owner == k)
            boxes[k] = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        return image.clip(0, 255).astype(np.uint8), np.array(labels, np.int64), boxes, owner

    def num_boxes_of(self, number):
        return len(self.draw(number)[1])

    @property
    def num_boxes(self):
        some = self.items[:200]
        return round(len(self) * sum(self.num_boxes_of(n) for n in some) / max(1, len(some)))

    @property
    def coco(self):
        if self._coco is None:
            images, annotations = [], []
            for number in self.items:
                image, labels, boxes, _ = self.draw(number)
                images.append({"id": number, "height": image.shape[0], "width": image.shape[1]})
                for label, (x0, y0, x1, y1) in zip(labels.tolist(), boxes.tolist()):
                    annotations.append({"id": len(annotations) + 1, "image_id": number,
                                        "category_id": self.category_ids[label], "iscrowd": 0,
                                        "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)})
            self._coco = to_coco(self, images, annotations)
        return self._coco


def draw_background(rng, height, width):
    coarse = rng.integers(50, 206, 3) + rng.normal(0, 22, (5, 5, 3))
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(5)):
        ends = rng.integers(-20, max(height, width) + 20, 4).tolist()
        pen.line(ends, fill=tuple(rng.integers(0, 256, 3).tolist()), width=1)
    return np.asarray(image, np.float32) + rng.normal(0, 6) * rng.standard_normal((height, width, 1), np.float32)


def draw_shape(name, diameter, angle):
    zoom, side = 3, int(diameter) + 3
    corners = {"triangle": 3, "square": 4}.get(name, 40)
    steps = 2 * np.pi * np.arange(corners) / corners
    points = CROSS if name == "cross" else np.stack([np.cos(steps), np.sin(steps)], 1)
    cos, sin = np.cos(angle), np.sin(angle)
    points = points @ np.array([[cos, sin], [-sin, cos]]) * diameter / 2
    canvas = Image.new("L", (side * zoom, side * zoom))
    pen = ImageDraw.Draw(canvas)
    pen.polygon([tuple(p) for p in ((points + side / 2) * zoom).tolist()], fill=255)
    if name == "ring":
        pen.polygon([tuple(p) for p in ((points * 0.55 + side / 2) * zoom).tolist()], fill=0)
    alpha = np.asarray(canvas.reduce(zoom), np.float32) / 255
    rows, columns = np.nonzero((alpha > 0.5).any(1))[0], np.nonzero((alpha > 0.5).any(0))[0]
    return alpha[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


def pick_colour(rng, background):
    for _ in range(20):
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        if np.abs(colour - background).max() > 70:
            break
    return colour


def texture(rng, h, w):
    kind = rng.integers(4)
    angle, y, x = rng.uniform(0, 2 * np.pi), np.arange(h, dtype=np.float32)[:, None], np.arange(w, dtype=np.float32)
    ramp = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    if kind == 0:
        return np.ones((h, w), np.float32)
    if kind == 1:
        return np.where(ramp % 6 < 3, np.float32(1), np.float32(0.65))
    if kind == 2:
        return 0.65 + 0.35 * (ramp - ramp.min()) / np.float32(np.ptp(ramp) + 1e-6)
    return rng.uniform(0.65, 1, (h, w)).astype(np.float32)


def finish(image, boxes_xyxy, labels, image_id, size):
    height, width = image.shape[-2:]
    boxes = (boxes_xyxy / torch.tensor([width, height, width, height])).clamp(0, 1)
    image = F.normalize(F.to_dtype(image, torch.float32, scale=True), IMAGENET_MEAN, IMAGENET_STD)
    return image, {"labels": labels, "boxes": box_convert(boxes, "xyxy", "cxcywh"), "image_id": image_id, "size": size}


def collate(batch):
    images, targets = zip(*batch)
    height, width = (max(image.shape[d] for image in images) for d in (1, 2))
    padded = torch.zeros(len(images), 3, height, width)  # [B, 3, H, W]
    mask = torch.ones(len(images), height, width, dtype=torch.bool)  # [B, H, W]
    for k, image in enumerate(images):
        padded[k, :, :image.shape[1], :image.shape[2]] = image
        mask[k, :image.shape[1], :image.shape[2]] = False
    return padded, mask, list(targets)


def first(dataset, n, augment=False):
    small = copy.copy(dataset)
    small.items, small._coco = [], None
    for item in dataset.items:
        if len(small.items) < n and dataset.num_boxes_of(item):
            small.items.append(item)
        if len(small.items) == n:
            break
    return small


@torch.no_grad()
def postprocess(logits, boxes, sizes, softmax):
    logits, boxes = logits.float(), boxes.float()
    if softmax:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)  # [B, Q]
    else:
        C = logits.shape[-1]
        scores, pairs = logits.sigmoid().flatten(1).topk(min(100, logits[0].numel()))  # [B, 100]
        labels = pairs % C
        boxes = torch.stack([b[p // C] for b, p in zip(boxes, pairs)])
    boxes_xyxy = box_convert(boxes, "cxcywh", "xyxy")
    scale = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=torch.float32, device=boxes.device)  # [B, 4]
    boxes_xyxy = boxes_xyxy * scale[:, None]
    return [{"scores": s, "labels": l, "boxes": b} for s, l, b in zip(scores, labels, boxes_xyxy)]


def to_coco(dataset, images, annotations):
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations,
                    "categories": [{"id": i, "name": n} for i, n in zip(dataset.category_ids, dataset.class_names)]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


METRICS = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
           "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]


def coco_eval(dataset, predictions, image_ids=None):
    found = []
    for image_id, p in predictions.items():
        boxes = box_convert(p["boxes"].cpu(), "xyxy", "xywh").tolist()
        for score, label, box in zip(p["scores"].tolist(), p["labels"].tolist(), boxes):
            found.append({"id": len(found) + 1, "image_id": image_id, "category_id": dataset.category_ids[label],
                          "bbox": box, "area": box[2] * box[3], "iscrowd": 0, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(dataset.coco, to_coco(dataset, dataset.coco.dataset["images"], found), "bbox")
        if image_ids is not None:
            judge.params.imgIds = sorted(image_ids)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return dict(zip(METRICS, judge.stats.tolist()))


def explain(metrics):
    return "\n".join(f"{k:10s} {v:.3f}" for k, v in metrics.items())
