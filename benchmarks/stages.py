"""Do later decoder stages make a query better? DETR's and SQR's measurements of it, for a run of any model.

    python benchmarks/stages.py runs/deformable_detr-shapes runs/sqr-shapes
    python benchmarks/stages.py runs/sqr-shapes --loops 8        the last stage alone, again and again (DQRR)
    python benchmarks/stages.py RUN --picture docs/stages.png    where an early stage knew better

Printed for each run: AP of every stage; the same after NMS, which lifts the first stage of DETR and lowers
its last one a little (its paper's section 4.2, figure 4); AP where every query answers from its surest
stage, that of the highest score (SQR's authors propose to try it; it needs no truth); AP of an oracle that
knows which stage to trust; the two rates of SQR's paper (section 3), which compare the last stage's
prediction with what earlier stages made of the same query.

    NMS               of two boxes of one class that overlap by IoU 0.5 or more only the surer one stays
    TP fading         of the last stage's true positives: an earlier stage was a true positive for the same
                      object with both a higher IoU and a higher score
    FP exacerbation   of the last stage's false positives: an earlier stage gave a lower score
    oracle            every query answers from its best stage: where it is a true positive the one of largest
                      score x IoU, and where it never is, the one of lowest score. No strict bound: scores of
                      several stages rank differently from those of one.

A prediction is a true positive if it is matched to an object as COCO does it: same class, IoU 0.5 or more, in
the order of scores, one prediction for each object.
"""
import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torchvision.ops import batched_nms, box_convert, box_iou

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import machine, pictures  # noqa: E402
from support.checkpoints import load_checkpoint, load_weights  # noqa: E402
from support.data import load_datasets  # noqa: E402
from support.evaluation import coco_eval, is_softmax  # noqa: E402
from support.model_files import build_model, load_model_file  # noqa: E402
from support.report import one_line_errors  # noqa: E402


@dataclass
class Stages:
    """What every stage says of one image, and the truth. Boxes are xyxy in pixels of the original image."""
    image_id: int
    scores: torch.Tensor  # [S, Q]
    labels: torch.Tensor  # [S, Q]
    boxes: torch.Tensor  # [S, Q, 4]
    true_labels: torch.Tensor  # [n]
    true_boxes: torch.Tensor  # [n, 4]

    def match(self):
        """Per stage and query the object that it finds, or -1, and the IoU with it: [S, Q] int64, [S, Q]."""
        found, ious = torch.full_like(self.labels, -1), torch.zeros_like(self.scores)
        for s in range(len(self.scores)):
            iou = box_iou(self.boxes[s], self.true_boxes)  # [Q, n]
            iou[self.labels[s][:, None] != self.true_labels] = 0
            for q in self.scores[s].argsort(descending=True, stable=True).tolist():
                best, g = iou[q].max(0) if iou.shape[1] else (torch.tensor(0.0), None)
                if best >= 0.5:
                    found[s, q], ious[s, q] = g, best
                    iou[:, g] = 0  # one prediction an object
        return found, ious


def rates(images):
    """(TP fading rate, FP exacerbation rate) over a list of Stages, as defined above; nan if undefined."""
    fading, exacerbation = [], []
    for image in images:
        found, iou = image.match()
        last, earlier = found[-1], slice(None, -1)
        right = last >= 0  # [Q]
        same = (found[earlier] == last) & right  # [S - 1, Q]
        better = (iou[earlier] > iou[-1]) & (image.scores[earlier] > image.scores[-1])
        fading.append((same & better).any(0)[right])
        exacerbation.append((image.scores[earlier] < image.scores[-1]).any(0)[~right])
    return tuple(torch.cat(shares).float().mean().item() for shares in (fading, exacerbation))


def oracle(image):
    """Predictions of the best stage of every query, as coco_eval wants them."""
    found, iou = image.match()
    right = found >= 0
    worth = torch.where(right, image.scores * iou, -image.scores)  # [S, Q]
    worth = worth.masked_fill(right.any(0) & ~right, -torch.inf)
    best = worth.argmax(0)  # [Q]
    return at_stage(image, best)


def highest_score(image):
    """Predictions of the surest stage of every query."""
    return at_stage(image, image.scores.argmax(0))


def at_stage(image, stage):
    """Predictions {"scores" [Q], "labels" [Q], "boxes" [Q, 4]} at one stage, or at one per query [Q]."""
    queries = torch.arange(image.scores.shape[1])
    return {name: getattr(image, name)[stage, queries] for name in ("scores", "labels", "boxes")}


def after_nms(image, stage):
    """What non-maximum suppression leaves of a stage: the surest of each pile of duplicates."""
    predictions = at_stage(image, stage)
    boxes, scores, labels = (predictions[name] for name in ("boxes", "scores", "labels"))
    kept = batched_nms(boxes, scores, labels, iou_threshold=0.5)
    return {name: values[kept] for name, values in predictions.items()}


# ---- From a checkpoint -------------------------------------------------------------------------------------
@torch.no_grad()
def predict(model, dataset, args):
    """Every stage's best class of every query, over a data set: a list of Stages."""
    model.eval()
    images_seen = []
    for images, mask, targets in machine.make_loader(dataset, args, batch_size=args.eval_batch_size):
        out = model(images.to(args.device), mask.to(args.device))
        logits, boxes = out["logits"].cpu(), box_convert(out["boxes"].cpu(), "cxcywh", "xyxy")
        p = logits.softmax(-1)[..., :-1] if is_softmax(model) else logits.sigmoid()
        scores, labels = p.max(-1)  # [S, B, Q]
        for b, target in enumerate(targets):
            h, w = target["size"]
            size = torch.tensor([w, h, w, h])
            images_seen.append(Stages(
                target["image_id"], scores[:, b], labels[:, b], boxes[:, b] * size,
                target["labels"], box_convert(target["boxes"], "cxcywh", "xyxy") * size))
    return images_seen


def load(path, loops):
    """(model, validation set, args) of a run; with `loops` sqr.py's last stage runs so many times."""
    checkpoint = load_checkpoint(path / "best.pt" if path.is_dir() else path)
    args = argparse.Namespace(**checkpoint["args"])
    args.device, args.workers = machine.choose_device("auto"), 0
    args.eval_batch_size = args.eval_batch_size or args.batch_size
    dataset = load_datasets(args, ("val",))["val"]
    options = {**checkpoint["model_options"], "pretrained_backbone": False}
    if loops:
        options["recurrent"] = True
    model = build_model(load_model_file(args.model), len(dataset.class_names), options)
    load_weights(model, checkpoint)
    if loops:
        model.num_stages = loops
    return model.to(args.device), dataset, args


def average_precision(dataset, images, choose):
    return coco_eval(dataset, {image.image_id: choose(image) for image in images})["AP"]


def of_stages(dataset, images, choose=at_stage):
    """AP of every stage, as text; `choose` makes its predictions of an image and a stage."""
    stages = range(len(images[0].scores))
    values = [average_precision(dataset, images, lambda image: choose(image, s)) for s in stages]
    return ", ".join(f"{value:.3f}" for value in values)


# ---- Picture -----------------------------------------------------------------------------------------------
def lost_objects(images):
    """Objects that some stage found and the last stage misses: (how clearly, image, object, stage, query)."""
    for image in images:
        found, iou = image.match()
        for g in range(len(image.true_labels)):
            early = (found == g) * image.scores * iou  # [S, Q]
            if early.max() > 0 and not (found[-1] == g).any():
                stage, query = divmod(early.argmax().item(), early.shape[1])
                yield early.max().item(), image, g, stage, query


def draw(dataset, images, path, count=6):
    """The clearest cases of an early stage that was right where the last one is wrong, for the same query."""
    cases = sorted(lost_objects(images), key=lambda case: -case[0])[:count]
    if not cases:
        print("no object that an early stage finds is lost by the last: no picture")
        return
    index_of = {dataset[i][1]["image_id"]: i for i in range(len(dataset))}
    figure = Figure(figsize=(12, 4.1 * ((len(cases) + 2) // 3)), layout="constrained")
    panels = list(figure.subplots((len(cases) + 2) // 3, 3, squeeze=False).flat)
    for axes in panels:
        axes.axis("off")
    for axes, (_, image, g, stage, query) in zip(panels, cases):
        index = index_of[image.image_id]
        pictures.show(axes, pictures.small_photo(dataset, index), dataset[index][1]["size"])
        lines = [(image.true_boxes[g], dataset.class_names[image.true_labels[g]], pictures.TRUE, "truth")]
        for s, colour in ((stage, "#2979ff"), (-1, pictures.PREDICTED)):
            label, score = dataset.class_names[image.labels[s, query]], image.scores[s, query]
            overlap = box_iou(image.boxes[s, query][None], image.true_boxes[g][None]).item()
            name = "last stage" if s == -1 else f"stage {s + 1}"
            lines.append((image.boxes[s, query], f"{label} {score:.2f}, IoU {overlap:.2f}", colour, name))
        for k, (box, text, colour, name) in enumerate(lines):
            pictures.draw_box(axes, box, colour)
            y = -0.03 - 0.07 * k
            axes.text(0, y, f"{name}: {text}", color=colour, transform=axes.transAxes, va="top")
    figure.suptitle("One query each: right at an early stage, wrong at the last")
    figure.savefig(path, dpi=100)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, or checkpoints")
    p.add_argument("--loops", type=int, metavar="N", help="of sqr.py: run only the last stage, N times")
    p.add_argument("--picture", metavar="FILE", help="of the last run")
    args = p.parse_args()
    print("| run | AP of stages 1, 2, ... | after NMS | surest stage | oracle | TP fading "
          "| FP exacerbation |\n|---|---|---|---|---|---|---|")
    for path in args.runs:
        model, dataset, settings = load(path, args.loops)
        images = predict(model, dataset, settings)
        fading, exacerbation = rates(images)
        print(
            f"| {path.name} | {of_stages(dataset, images)} | {of_stages(dataset, images, after_nms)} "
            f"| {average_precision(dataset, images, highest_score):.3f} "
            f"| {average_precision(dataset, images, oracle):.3f} | {fading:.0%} | {exacerbation:.0%} |",
            flush=True,
        )
    if args.picture:
        draw(dataset, images, args.picture)


if __name__ == "__main__":
    with one_line_errors():
        main()
