"""Pictures of a run: predictions next to the truth, and curves. train.py draws both at every evaluation."""
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure  # not pyplot: no window system, no global state
from matplotlib.patches import Rectangle
from torchvision.ops import box_convert

import data

TRUE, PREDICTED = "#00c853", "#ff1744"  # green, red


def to_picture(image):
    """Undo the normalisation: [3, H, W] float -> [H, W, 3] in 0..1, for imshow."""
    mean, std = torch.tensor(data.IMAGENET_MEAN), torch.tensor(data.IMAGENET_STD)
    return (image.permute(1, 2, 0) * std + mean).clamp(0, 1).numpy()  # [H, W, 3]


def draw_boxes(axes, boxes_xyxy, names, colour, above):
    """Boxes [n, 4] in pixels of the shown image, each with its name over (or under) it."""
    for (x1, y1, x2, y2), name in zip(boxes_xyxy.tolist(), names):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
        axes.text(x1, y1 if above else y2, name, fontsize=6, color="white", va="bottom" if above else "top",
                  clip_on=True, bbox=dict(facecolor=colour, edgecolor="none", pad=0.6, alpha=0.8))


def draw_predictions(dataset, predictions, path, count=8, threshold=0.3):
    """The first `count` images with objects: true boxes green, predictions scored over the threshold red.

    predictions: {image id: {"boxes" [n, 4] xyxy in pixels of the original, "labels" [n], "scores" [n]}}.
    """
    names = dataset.class_names
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = list(figure.subplots(2, count // 2).flat)
    chosen = (item for item in map(dataset.__getitem__, range(len(dataset))) if len(item[1]["labels"]))
    for axes in panels:
        axes.axis("off")
    for axes, (image, target) in zip(panels, chosen):
        height, width = image.shape[1:]
        axes.imshow(to_picture(image))
        truth = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
        draw_boxes(axes, truth, [names[i] for i in target["labels"]], TRUE, above=True)
        found = predictions[target["image_id"]]
        keep = found["scores"] > threshold
        zoom = [width / target["size"][1], height / target["size"][0]] * 2
        shown = found["boxes"][keep] * torch.tensor(zoom)
        labels = [f"{names[i]} {score:.2f}" for i, score in zip(found["labels"][keep], found["scores"][keep])]
        draw_boxes(axes, shown, labels, PREDICTED, above=False)
    figure.suptitle(f"held-out images: truth green, predictions scored over {threshold} red", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_curves(log, path):
    """Losses of the last stage and AP against steps, from a run's log.jsonl."""
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    losses, evals = [line for line in lines if "total" in line], [line for line in lines if "eval" in line]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("class", "l1", "giou"):
        left.plot([line["step"] for line in losses], [line[name] for line in losses], label=name)
    left.set(title="losses of the last stage, un-weighted", xlabel="step", ylabel="loss", yscale="log")
    for name in ("AP", "AP50", "AP75"):
        values = [line["eval"][name] for line in evals]
        right.plot([line["step"] for line in evals], values, "o-", ms=3, label=name)
    right.set(title="held-out images", xlabel="step", ylabel="average precision", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
