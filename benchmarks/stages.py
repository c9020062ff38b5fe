"""Do later decoder layers make a query better? DETR's and SQR's measurements of it, for a run of any model.

    python benchmarks/stages.py runs/deformable_detr-shapes runs/sqr-shapes
    python benchmarks/stages.py runs/sqr-shapes --loops 8     runs only the last layer, 8 times (DQRR)
    python benchmarks/stages.py benchmarks/runs/*-seed0 --record    records them in results/stages.json

It prints AP of every layer; AP of the last layer after NMS; AP if every query answers from its most confident
layer; AP of an oracle that chooses the best layer; and the two rates of SQR's paper (section 3):

    NMS               of two boxes of one class with IoU 0.5 or more, only the more confident one stays
    oracle            every query answers from its best layer: where it is a true positive the one of largest
                      score x IoU, otherwise the one of lowest score. It is not a strict bound, because scores
                      of several layers rank differently from those of one.
    TP fading         of the last layer's true positives: an earlier layer was a true positive for the same
                      object and query with both a higher IoU and a higher score
    FP exacerbation   of the last layer's false positives: an earlier layer gave a lower score

A prediction is a true positive if it is matched to an object as in COCO: same class, IoU 0.5 or more, in the
order of scores, one prediction for each object.
"""
import argparse
import json
import os
import platform
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torchvision.ops import batched_nms, box_iou

sys.path.insert(0, str(Path(__file__).parents[1]))
RESULTS = Path(__file__).parent / "results/stages.json"
from support import machine  # noqa: E402
from support.checkpoints import build_model, load_checkpoint, load_model_of, load_weights  # noqa: E402
from support.data import load_datasets  # noqa: E402
from support.evaluation import boxes_to_pixels, coco_eval  # noqa: E402
from support.report import one_line_errors  # noqa: E402


@dataclass
class Stages:
    """Predictions of every decoder layer for one image, and the truth. Boxes are xyxy in pixels."""
    image_id: int
    scores: torch.Tensor  # [S, Q]
    labels: torch.Tensor  # [S, Q]
    boxes: torch.Tensor  # [S, Q, 4]
    true_labels: torch.Tensor  # [G]
    true_boxes: torch.Tensor  # [G, 4]

    def match(self):
        """Per layer and query the object that it finds, or -1, and the IoU with it: [S, Q] int64, [S, Q]."""
        found, ious = torch.full_like(self.labels, -1), torch.zeros_like(self.scores)
        for s in range(len(self.scores)):
            iou = box_iou(self.boxes[s], self.true_boxes)  # [Q, G]
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


def at_stage(image, stage):
    """Predictions {"scores" [Q], "labels" [Q], "boxes" [Q, 4]} of one layer, or of one per query [Q]."""
    queries = torch.arange(image.scores.shape[1])
    return {name: getattr(image, name)[stage, queries] for name in ("scores", "labels", "boxes")}


def oracle(image):
    """Predictions of the best layer of every query."""
    found, iou = image.match()
    right = found >= 0
    worth = torch.where(right, image.scores * iou, -image.scores)  # [S, Q]
    worth = worth.masked_fill(right.any(0) & ~right, -torch.inf)
    return at_stage(image, worth.argmax(0))


def after_nms(image, stage):
    """Predictions of a layer after non-maximum suppression: the most confident of each pile of duplicates."""
    predictions = at_stage(image, stage)
    boxes, scores, labels = (predictions[name] for name in ("boxes", "scores", "labels"))
    kept = batched_nms(boxes, scores, labels, iou_threshold=0.5)
    return {name: values[kept] for name, values in predictions.items()}


# ---- From a checkpoint -------------------------------------------------------------------------------------
@torch.no_grad()
def predict(model, dataset, args):
    """Every layer's best class of every query, over a data set: a list of Stages."""
    model.eval()
    images_seen = []
    for images, mask, targets in machine.make_loader(dataset, args, batch_size=args.eval_batch_size):
        out = model(images.to(args.device), mask.to(args.device))
        logits, boxes = out["logits"].cpu(), out["boxes"].cpu()
        softmax = model.recipe["class_loss"] == "softmax"
        scores, labels = (logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()).max(-1)  # [S, B, Q]
        for b, target in enumerate(targets):
            found, true = (boxes_to_pixels(one, target["size"]) for one in (boxes[:, b], target["boxes"]))
            images_seen.append(Stages(target["image_id"], scores[:, b], labels[:, b], found,
                                      target["labels"], true))
    return images_seen


def load(path, name, loops):
    """(model, validation set, args) of a run; with `loops` sqr.py's last layer runs so many times."""
    checkpoint = load_checkpoint(path / "last.pt" if path.is_dir() else path)
    args = argparse.Namespace(**checkpoint["args"])
    args.device, args.workers = machine.choose_device("auto"), 0
    dataset = load_datasets(args, ("val",))["val"]
    options = {**checkpoint["model_options"], "pretrained_backbone": False}
    if loops:
        options["recurrent"] = True
    model = build_model(load_model_of(checkpoint, name), len(dataset.class_names), options)
    load_weights(model, checkpoint)
    if loops:
        model.num_stages = loops
    return model.to(args.device), dataset, args


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, or checkpoints")
    p.add_argument("--model", metavar="FILE", help="your model file, if the runs were made with one")
    p.add_argument("--loops", type=int, metavar="N", help="of sqr.py: run only the last layer, N times")
    p.add_argument("--record", action="store_true", help="also write the rows into results/stages.json")
    args = p.parse_args(argv)
    rows = json.loads(RESULTS.read_text()) if args.record and RESULTS.exists() else {}
    flag = f" --model {args.model!r}" if args.model else ""
    for path in args.runs:
        model, dataset, settings = load(path, args.model, args.loops)
        images = predict(model, dataset, settings)

        def AP(choose, *stage):
            return f"{coco_eval(dataset, {one.image_id: choose(one, *stage) for one in images})['AP']:.3f}"

        def confident(image):
            return at_stage(image, image.scores.argmax(0))

        layers = [AP(at_stage, s) for s in range(len(images[0].scores))]
        fading, exacerbation = rates(images)
        row = {"run": path.name, "AP of layers 1, 2, ...": ", ".join(layers), "last layer": layers[-1],
               "after NMS": AP(after_nms, -1), "most confident layer": AP(confident), "oracle": AP(oracle),
               "TP fading": f"{fading:.2f}", "FP exacerbation": f"{exacerbation:.2f}"}
        if path == args.runs[0]:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        print(f"| {' | '.join(row.values())} |", flush=True)
        rows[path.name] = row | {"command": f"python benchmarks/stages.py {path.name}{flag} --record",
                                 "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                                 "date": str(date.today())}
    if args.record:
        RESULTS.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
