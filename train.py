"""Train, evaluate and resume any of the detectors in this folder, or your own file that keeps their contract.

    python train.py --model detr                   embedded data set, small model, ends by itself
    python train.py --model detr --data DIR        your folder, COCO or VOC format
    python train.py --model detr --overfit 2       two images: AP must come close to 1, or something is broken
    python train.py --resume runs/detr-shapes      go on after Ctrl-C or a crash, exactly where it stopped
    python train.py --data DIR --init runs/detr-shapes    a new run that starts from the weights of another
    python train.py --eval --weights runs/detr-shapes/best.pt
    python train.py --model detr --preset paper --data COCO --batch-size 16 --accumulate 4
    torchrun --nproc-per-node 8 train.py ...       the same on 8 GPUs: same total batch, same gradients

Reading order: SetCriterion (matching and losses), then train(). What is about data is in support/, about
pictures in support/pictures.py. A model file gives RECIPE (how the paper trains it), LAPTOP (what the small preset
changes for it), build() and load_official(); nothing here asks for a model's name.
"""
import argparse
import contextlib
import copy
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss
from tqdm import tqdm

from support import data, pictures
from support.evaluation import coco_eval, explain, postprocess
from support.images import DataError, one_line

HERE = Path(__file__).parent
MODELS = ("detr", "conditional_detr", "deformable_detr", "sam_detr", "sqr")

# --preset laptop: learns from random weights on two CPU cores. LAPTOP of a model file goes on top.
LAPTOP = dict(
    steps=3600,
    batch_size=16,
    lr=3e-4,
    lr_backbone=3e-4,  # from scratch the backbone learns like the rest
    warmup=100,
    schedule="cosine",
    clip_norm=1.0,
    backbone="resnet18",
    backbone_norm="batch",
    pretrained_backbone=False,
    hidden_dim=128,
    enc_layers=2,
    dec_layers=3,
    dim_feedforward=512,
    dropout=0.0,
)
TRAINING = ("steps", "epochs", "lr_drop", "batch_size", "lr", "lr_backbone", "warmup", "schedule",
            "clip_norm", "weight_decay")  # the rest of a preset are options of the model
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


# ---- Matching and losses -----------------------------------------------------------------------------------
class Diverged(Exception):
    """The model returns or causes numbers that are not finite."""


class SetCriterion:
    """Hungarian matching and set losses of all five papers, for all supervised stages at once.

    The model says which classification it wants: model.recipe["class_loss"] is "softmax" (DETR; the last
    logit is "no object") or "focal" (the others; C independent sigmoids). w_class, w_l1 and w_giou weigh both
    cost and loss.
    Source: DETR section 3.1 and appendix A.2; official models/matcher.py and SetCriterion.
    """

    no_object_weight = 0.1  # softmax: most queries match nothing and would drown the rest
    alpha, gamma = 0.25, 2.0  # focal

    def __init__(self, model):
        recipe = model.recipe
        self.softmax = recipe["class_loss"] == "softmax"
        self.weights = {name: recipe[f"w_{name}"] for name in ("class", "l1", "giou")}

    def cost(self, logits, boxes, target):
        """Matching cost of one image: logits [S, Q, C], boxes [S, Q, 4], target with G boxes -> [S, Q, G]."""
        labels, target_boxes = target["labels"], target["boxes"]
        if self.softmax:
            # A probability, not its logarithm as in the loss: then it is of the size of the box costs (A.2).
            cost_class = -logits.softmax(-1)[..., labels]  # [S, Q, G]
        else:
            p = logits.sigmoid()[..., labels]  # [S, Q, G]
            positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
            negative = (1 - self.alpha) * p ** self.gamma * -(1 - p + 1e-8).log()
            cost_class = positive - negative
        cost_l1 = torch.cdist(boxes, target_boxes.expand(len(boxes), -1, -1), p=1)  # [S, Q, G]
        xyxy, target_xyxy = (box_convert(b, "cxcywh", "xyxy") for b in (boxes.flatten(0, 1), target_boxes))
        cost_giou = -generalized_box_iou(xyxy, target_xyxy).view_as(cost_l1)  # [S, Q, G]
        w = self.weights
        return w["class"] * cost_class + w["l1"] * cost_l1 + w["giou"] * cost_giou

    @torch.no_grad()
    def match_stages(self, logits, boxes, targets):
        """One-to-one assignment of least cost: for every stage, per image (query index, target index), int64.

        logits [S, B, Q, C], boxes [S, B, Q, 4]. Every stage is matched by itself. With more targets than
        queries the most expensive ones stay unmatched. Raises Diverged when a prediction is not finite.
        """
        logits, boxes = logits.float(), boxes.float()
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            raise Diverged("predictions are not finite")
        costs = [self.cost(logits[:, b], boxes[:, b], target).cpu() for b, target in enumerate(targets)]
        matches = []
        for stage in range(len(logits)):
            pairs = [linear_sum_assignment(cost[stage]) for cost in costs]
            matches.append([(torch.from_numpy(q), torch.from_numpy(g)) for q, g in pairs])
        return matches

    def match(self, logits, boxes, targets):
        """One stage: logits [B, Q, C], boxes [B, Q, 4] -> per image (query index, target index), int64."""
        return self.match_stages(logits[None], boxes[None], targets)[0]

    def stage_losses(self, logits, boxes, targets, box_counts):
        """Un-weighted losses {"class": [S], "l1": [S], "giou": [S]} of predictions [S, B, Q, .]."""
        logits, boxes = logits.float(), boxes.float()
        S, B, Q, C = logits.shape
        matches = self.match_stages(logits, boxes, targets)
        rows = [(s, b, q, g) for s, stage in enumerate(matches) for b, pair in enumerate(stage)
                for q, g in zip(*(index.tolist() for index in pair))]
        index = torch.tensor(rows, dtype=torch.int64, device=logits.device).reshape(-1, 4)
        stage, image, query, target = index.unbind(1)  # each [P], P matched pairs in all stages together
        first = torch.tensor([0] + [len(t["labels"]) for t in targets], device=logits.device).cumsum(0)
        labels = torch.cat([t["labels"] for t in targets])[first[image] + target]  # [P]
        target_boxes = torch.cat([t["boxes"] for t in targets])[first[image] + target]  # [P, 4]
        num_boxes = max(sum(box_counts), 1)

        if self.softmax:
            wanted = torch.full((S, B, Q), C - 1, device=logits.device)
            wanted[stage, image, query] = labels
            weight = torch.ones(C, device=logits.device)
            weight[C - 1] = self.no_object_weight
            loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none")  # [SBQ]
            # Normalised by the sum of weights, not by boxes; of the whole batch it follows from box_counts
            matched = sum(min(n, Q) for n in box_counts)
            total_weight = matched + self.no_object_weight * (len(box_counts) * Q - matched)
            loss_class = loss.view(S, -1).sum(1) / total_weight  # [S]
        else:
            wanted = torch.zeros_like(logits)
            wanted[stage, image, query, labels] = 1
            loss = sigmoid_focal_loss(logits, wanted, self.alpha, self.gamma)  # [S, B, Q, C]
            loss_class = loss.flatten(1).sum(1) / num_boxes  # [S]

        matched_boxes = boxes[stage, image, query]  # [P, 4]
        l1 = (matched_boxes - target_boxes).abs().sum(1)  # [P]
        xyxy, target_xyxy = (box_convert(b, "cxcywh", "xyxy") for b in (matched_boxes, target_boxes))
        giou = generalized_box_iou_loss(xyxy, target_xyxy, eps=0)  # [P], 1 - GIoU; targets are never empty
        zeros = logits.new_zeros(S)
        return {
            "class": loss_class,
            "l1": zeros.index_add(0, stage, l1) / num_boxes,
            "giou": zeros.index_add(0, stage, giou) / num_boxes,
        }

    def __call__(self, out, targets, box_counts=None):
        """{"total": weighted sum, "class": [S], "l1": [S], "giou": [S]} of a batch, the parts un-weighted.

        targets: one dict per image, labels [n] int64 and boxes [n, 4] cxcywh in [0, 1]; n = 0 is fine.
        box_counts: boxes per image of the whole batch, where this is only a part of it (accumulation, several
        GPUs): then the parts add up to what the whole would give. Two-stage models add "proposal_class" etc.
        """
        if box_counts is None:
            box_counts = [len(t["labels"]) for t in targets]
        losses = self.stage_losses(out["logits"], out["boxes"], targets, box_counts)
        total = sum(self.weights[name] * loss.sum() for name, loss in losses.items())
        if "proposals" in out:
            # Proposals only say "some object", so every label is class 0 (Deformable DETR, appendix A.4).
            objects = [{"labels": torch.zeros_like(t["labels"]), "boxes": t["boxes"]} for t in targets]
            logits, boxes = out["proposals"]["logits"][None], out["proposals"]["boxes"][None]  # one stage
            proposal = self.stage_losses(logits, boxes, objects, box_counts)
            total = total + sum(self.weights[name] * loss.sum() for name, loss in proposal.items())
            losses.update({f"proposal_{name}": loss for name, loss in proposal.items()})
        return {"total": total, **losses}


# ---- The model file, optimiser and schedule ----------------------------------------------------------------
def load_model_file(name):
    """The module behind --model: one of our names or the path of any .py file that keeps the contract."""
    path = HERE / f"{name}.py" if name in MODELS else Path(name)
    if not path.is_file():
        raise SystemExit(f"--model {name}: no such file. Give one of {', '.join(MODELS)} or a .py file.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    missing = [key for key in ("RECIPE", "build") if not hasattr(module, key)]
    if missing:
        raise SystemExit(f"--model {path}: the file has no {' and no '.join(missing)}; see detr.py for them.")
    return module


def build_model(module, num_classes, options):
    try:
        return module.build(num_classes, **options)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--option: {error}")
    except OSError as error:  # urllib's errors are OSErrors
        raise SystemExit(f"The backbone's ImageNet weights could not be downloaded ({error}). Connect once, "
                         "or train it too: --option pretrained_backbone=false --option backbone_norm=batch")


def make_optimizer(model, module, lr, lr_backbone, weight_decay):
    """AdamW with the papers' groups: backbone, slow_parameters at a tenth (Deformable DETR), and the rest."""
    slow = module.RECIPE.get("slow_parameters", ())
    groups = {lr: [], lr_backbone: [], lr * 0.1: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            backbone, is_slow = name.startswith("backbone."), any(part in name for part in slow)
            groups[lr_backbone if backbone else lr * 0.1 if is_slow else lr].append(parameter)
    groups = [{"params": params, "lr": rate, "peak_lr": rate} for rate, params in groups.items() if params]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def lr_factor(step, args, steps_per_epoch):
    """Learning rate at a step, as a share of its peak: linear warm-up, then cosine to 0 or a drop to 0.1."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    if args.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))
    return 0.1 if step >= args.lr_drop * steps_per_epoch else 1.0


class Batches(torch.utils.data.Sampler):
    """This process' parts of all batches of a run in order, each a list of (epoch, index).

    A function of the seed and the step alone, so a run resumed at any step sees what it would have seen, and
    several processes share the batch of one. What is left of an epoch and fills no batch is dropped.
    """

    def __init__(self, size, args, start):
        self.size, self.args, self.start = size, args, start
        self.steps_per_epoch = size // args.batch_size

    def __iter__(self):
        batch, part = self.args.batch_size, self.args.batch_size // (self.args.accumulate * WORLD)
        for step in range(self.start, self.args.steps):
            epoch, i = divmod(step, self.steps_per_epoch)
            generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
            for first in range(i * batch + RANK * part, (i + 1) * batch, WORLD * part):
                yield [(epoch, index) for index in order[first:first + part]]


def ignore_ctrl_c(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers it, workers only get in the way


def make_loader(dataset, args, **how):
    # A generator of its own: else every loader draws a number from the global one, which dropout uses, and a
    # resumed run, having made one loader more, would not repeat the straight one.
    return torch.utils.data.DataLoader(
        dataset, num_workers=args.workers, collate_fn=data.collate, pin_memory=args.device == "cuda",
        worker_init_fn=ignore_ctrl_c, generator=torch.Generator(), **how)


def gather(value):
    """The values of all processes, in order of their ranks; [value] if there is only this one."""
    values = [value] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(values, value)
    return values


# ---- Evaluation --------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, criterion, dataset, args):
    """(COCO's 12 numbers and three signs of collapse, {image id: boxes in pixels, scores, labels}).

    Every process does its share of the images, each image once; all of them get the whole result.
    """
    model.eval()
    predictions, all_boxes = {}, []
    share = torch.utils.data.Subset(dataset, range(RANK, len(dataset), WORLD))
    for images, mask, targets in make_loader(share, args, batch_size=args.eval_batch_size):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            out = model(images.to(args.device), mask.to(args.device))
        logits, boxes = out["logits"][-1].float().cpu(), out["boxes"][-1].float().cpu()
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            raise Diverged("predictions are not finite")
        found = postprocess(logits, boxes, [t["size"] for t in targets], criterion.softmax)
        predictions.update((t["image_id"], p) for t, p in zip(targets, found))
        all_boxes.append(boxes)
    model.train()
    predictions = {image_id: found for part in gather(predictions) for image_id, found in part.items()}
    boxes = torch.cat(sum(gather(all_boxes), []))  # [N, Q, 4]
    metrics = coco_eval(dataset, predictions)
    metrics["spread_images"] = boxes.std(0, unbiased=False).mean().item()  # one query over all images
    metrics["spread_queries"] = boxes.std(1, unbiased=False).mean().item()  # one image over all queries
    seen = torch.cat([p["labels"][p["scores"] > 0.3] for p in predictions.values()]).unique()
    metrics["classes_predicted"] = len(seen)
    return metrics, predictions


def collapse_line(metrics, num_classes):
    """The most alarming symptom in one line: the same boxes for every image or every query."""
    images, queries, classes = (metrics[k] for k in ("spread_images", "spread_queries", "classes_predicted"))
    line = (f"boxes vary by {images:.3f} between images and {queries:.3f} between queries; {classes} of "
            f"{num_classes} classes reach a score of 0.3")
    if min(images, queries) < 0.005:
        line += ("\n  COLLAPSED: the same boxes everywhere. Usual early on; if it stays, the model is "
                 "undertrained (see README) or its features do not depend on the image.")
    return line


# ---- Checkpoints -------------------------------------------------------------------------------------------
def save(path, content, keep=None):
    """Atomic: a crash at any moment leaves a whole file, the old one or the new one; `keep` names a copy of the old."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(content, file)
        os.fsync(file.fileno())
    if keep and path.exists():
        shutil.copyfile(path, f"{keep}.tmp")
        os.replace(f"{keep}.tmp", keep)
    os.replace(f"{path}.tmp", path)


def read_file(path):
    """What torch.save wrote: tensors and plain values, and the Namespace of the official checkpoints; no code."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such checkpoint.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SystemExit(f"{path}: not a readable checkpoint ({type(error).__name__}); cut off, or not ours?")


def load_checkpoint(path):
    """A checkpoint of ours, from a file or a run's folder: there the last one, or if it is damaged the one before."""
    path = Path(path)
    if path.is_dir():
        path, previous = path / "last.pt", path / "previous.pt"
        try:
            return load_checkpoint(path)
        except SystemExit as error:
            if not previous.exists():
                raise
            print(f"{error} Taking {previous}, the one before it.", file=sys.stderr)
            return load_checkpoint(previous)
    checkpoint = read_file(path)
    missing = {"model", "args", "model_options", "class_names", "category_ids"} - set(checkpoint)
    if missing:
        raise SystemExit(f"{path}: not a checkpoint of train.py (no {', '.join(sorted(missing))}). To start a new run "
                         "from official weights use --init.")
    return checkpoint


def read_init(path):
    """The file behind --init, ours or official; of a run's folder best.pt."""
    path = Path(path)
    checkpoint = read_file(path / "best.pt" if path.is_dir() else path)
    if not isinstance(checkpoint, dict):
        raise SystemExit(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint.")
    return checkpoint


def in_our_names(module, checkpoint):
    """The tensors of a checkpoint, ours or official, under our names and of any shape: {name: tensor}."""
    class Recorder:
        def load_state_dict(self, state):
            self.state = state

    if "model_options" in checkpoint:
        return dict(checkpoint["model"])
    module.load_official(recorder := Recorder(), checkpoint)  # renames; that shapes may differ is what we are here for
    return {name: tensor for name, tensor in recorder.state.items() if isinstance(tensor, torch.Tensor)}


def initialise(model, module, checkpoint, class_names):
    """Copy all that fits into the model; say what does not. Of queries as many are copied as both have.

    A class head is copied only if it is known to be for the same classes. Source of the habit: the many who
    fine-tune DETR on their own data delete the class head and keep everything else.
    """
    given, left = in_our_names(module, checkpoint), []
    queries = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    state, copied = model.state_dict(), 0
    for name, tensor in state.items():
        source = given.pop(name, None)
        if source is None:
            if not name.endswith("num_batches_tracked"):  # frozen BatchNorm has none
                left.append(f"{name}: not in the file, keeps its random start")
        elif name.startswith("class_head.") and checkpoint.get("class_names") != class_names:
            left.append(f"{name}: for other classes, made anew")
        elif source.shape == tensor.shape:
            tensor.copy_(source)
            copied += 1
        elif name in queries and source.shape[1:] == tensor.shape[1:]:
            n = min(len(source), len(tensor))
            tensor[:n] = source[:n]
            copied += 1
            left.append(f"{name}: the first {n} of the file's {len(source)} queries, the model has {len(tensor)}")
        else:
            left.append(f"{name}: {list(source.shape)} in the file, {list(tensor.shape)} here, keeps its random start")
    left += [f"{name}: only in the file, not used" for name in given if not name.endswith("num_batches_tracked")]
    print(f"init     {copied} of {len(state)} tensors copied" + (", except:" if left else ""))
    for line in left[:12] + [f"and {len(left) - 12} more"] * (len(left) > 12):
        print(f"         {line}")
    if copied < len(state) / 2:
        raise SystemExit("--init: most of it does not fit. Is it the same --model, with the same --preset and options?")


# ---- The loop ----------------------------------------------------------------------------------------------
def train_step(forward, criterion, optimizer, parts, args):
    """One optimiser step on one batch, given in parts. Returns what is logged; raises Diverged."""
    # Every loss is normalised by the boxes of the whole batch, so that the parts add up to the gradient of
    # one large batch (exactly, as long as BatchNorm is frozen).
    box_counts = sum(gather([len(t["labels"]) for _, _, targets in parts for t in targets]), [])
    logged = {}
    optimizer.zero_grad()
    for images, mask, targets in parts:
        targets = [{k: t[k].to(args.device) for k in ("labels", "boxes")} for t in targets]
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            out = forward(images.to(args.device), mask.to(args.device))
        losses = criterion(out, targets, box_counts)  # outside of autocast: in float32
        (losses["total"] * WORLD).backward()  # DDP takes the mean over processes, this makes it a sum
        for name, loss in losses.items():
            logged[name] = logged.get(name, 0) + loss.detach().flatten()[-1].item()  # of the last stage
    logged = {name: sum(part[name] for part in gather(logged)) for name in logged}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    logged["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, args.clip_norm).item()
    if not math.isfinite(logged["grad_norm"]):
        raise Diverged("the gradient is not finite")
    optimizer.step()
    return logged


@torch.no_grad()
def where_it_went_bad(model, images, mask):
    """The first layer, in order of execution, that returns numbers that are not finite; else where gradients are not."""
    bad = []

    def check(name):
        def hook(module, inputs, output):
            outputs = output if isinstance(output, (tuple, list)) else [output]
            if any(isinstance(x, torch.Tensor) and not x.isfinite().all() for x in outputs):
                bad.append(name)
        return hook

    hooks = [module.register_forward_hook(check(name)) for name, module in model.named_modules() if name]
    model(images, mask)
    for hook in hooks:
        hook.remove()
    if bad:
        return f"first bad layer {bad[0]}"
    # Backward runs from the end, so the last of them went bad first
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"first bad gradient {bad[-1]}" if bad else "all layers are finite again"


def open_log(path, step):
    """log.jsonl, without what a killed run wrote after the checkpoint it now goes on from."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # cut off
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    Path(f"{path}.tmp").write_text("".join(kept))
    os.replace(f"{path}.tmp", path)
    return open(path, "a", buffering=1)


def train(model, criterion, datasets, args, module, model_options, run, resumed):
    """From step 0, or from where the checkpoint `resumed` stopped, to args.steps; `run` keeps everything."""
    train_set, val_set = datasets["train"], datasets["val"]
    optimizer = make_optimizer(model, module, args.lr, args.lr_backbone, args.weight_decay)
    step, best, seconds, window = 0, -1.0, 0.0, []  # window: what is logged of the steps since the last line
    if resumed:
        step, best, seconds, window = (resumed[name] for name in ("step", "best", "seconds", "window"))
        optimizer.load_state_dict(resumed["optimizer"])
    if step >= args.steps:
        raise SystemExit(f"{run}: already finished, step {step} of {args.steps}. Give more --steps to go on.")
    announce(model, criterion, datasets, args, step)
    forward = torch.nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    forward = torch.compile(forward) if args.compile else forward
    batches = Batches(len(train_set), args, step)
    loader = iter(make_loader(train_set, args, batch_sampler=batches))
    bar = tqdm(total=args.steps, initial=step, unit="step", dynamic_ncols=True, disable=True if RANK else None)
    started, stop = time.time() - seconds, []
    main_process = RANK == 0  # the only one that writes
    log = open_log(run / "log.jsonl", step) if main_process else None

    def on_signal(number, frame):
        """Ctrl-C (or a cluster's SIGTERM) lets the step finish and saves; a second Ctrl-C kills."""
        stop.append(number)
        if WORLD == 1:  # torchrun passes on a signal that processes may have got already
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    def write_log(**line):
        if main_process:
            log.write(json.dumps({"step": step, "seconds": time.time() - started, **line}) + "\n")

    def save_as(name, keep=None):
        if main_process:
            save(run / name, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "best": best,
                "seconds": time.time() - started, "window": window, "args": vars(args),
                "model_options": model_options, "class_names": train_set.class_names,
                "category_ids": train_set.category_ids,
            }, keep)

    model.train()
    if not resumed:
        save_as("last.pt")  # so that there is always something to go on from
    while step < args.steps and not any(gather(bool(stop))):
        factor = lr_factor(step, args, batches.steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        # Dropout, like the data order, is a function of seed and step: nothing else needs to be restored
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)
        try:
            parts = list(islice(loader, args.accumulate))
            window.append(train_step(forward, criterion, optimizer, parts, args))
            step += 1
            last = step == args.steps
            if step % args.eval_every == 0 or last:
                metrics, predictions = evaluate(model, criterion, val_set, args)
        except Diverged as error:
            where = where_it_went_bad(model, *(x.to(args.device) for x in parts[-1][:2]))
            raise SystemExit(f"\nThe model diverged at step {step} (lr {args.lr * factor:.2g}): {error}; {where}. "
                             f"Lower --lr{' or leave out --amp' if args.amp else ''}; {run} is from before.")
        bar.update()
        if step % args.log_every == 0 or last:
            mean = {name: sum(w[name] for w in window) / len(window) for name in window[0]}
            write_log(epoch=step / batches.steps_per_epoch, lr=args.lr * factor, **mean)
            loss, norm = mean["total"], mean["grad_norm"]
            bar.set_postfix_str(f"loss {loss:.2f}, gradient {norm:.1f}, AP {max(best, 0):.3f}")
            window = []
        if step % args.eval_every == 0 or last:
            write_log(eval=metrics)
            improved, best = metrics["AP"] >= best, max(best, metrics["AP"])
            if improved:
                save_as("best.pt")
            save_as("last.pt", keep=run / "previous.pt")
            if main_process:
                bar.write(f"step {step}: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}; "
                          + collapse_line(metrics, len(val_set.class_names)))
                pictures.draw_predictions(val_set, predictions, run / "predictions.png")
                pictures.draw_curves(run / "log.jsonl", run / "curves.png")
    bar.close()
    if step < args.steps:
        save_as("last.pt", keep=run / "previous.pt")
        raise SystemExit(f"\nStopped at step {step} of {args.steps}, nothing is lost. Go on with:\n"
                         f"    python train.py --resume {run}" if main_process else 1)
    print(explain(metrics))
    print(f"{(time.time() - started) / 60:.1f} minutes, peak memory {peak_memory(args)}. Best AP {best:.3f}. In {run}: "
          f"best.pt, last.pt, log.jsonl, curves.png, predictions.png")


def announce(model, criterion, datasets, args, step):
    """Say what is about to happen, how long it will take, and what to expect of it."""
    train_set = datasets["train"]
    print(f"model    {args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
          f"on {args.device}")
    for split, d in datasets.items():
        print(f"{split:8} {d.name}: {len(d)} images, {d.num_boxes} boxes, at most {d.max_boxes} in an image")
        for note in d.notes:
            print(f"         note: {note}")
    print(f"classes  {len(train_set.class_names)}: {', '.join(train_set.class_names)}")
    print(f"run      {args.steps} steps of {args.batch_size} images = "
          f"{args.steps * args.batch_size / len(train_set):.1f} epochs, lr {args.lr:g} ({args.schedule}), "
          f"seed {args.seed}")
    seconds, queries = time_one_step(model, criterion, train_set, args)
    print(f"time     about {math.ceil(seconds * (args.steps - step) / 60)} minutes, and the evaluations; "
          f"memory {peak_memory(args)} for the largest possible batch")
    if queries < train_set.max_boxes:
        print(f"WARNING  {queries} queries, but an image has {train_set.max_boxes} boxes: the rest can never "
              f"be found. Raise --option num_queries=N.")
    published = model.recipe["batch_size"]
    if args.preset == "paper" and args.lr == model.recipe["lr"] and args.batch_size < published:
        print(f"WARNING  lr {args.lr:g} was published for batches of {published} images, yours have "
              f"{args.batch_size}: lower --lr.")
    if args.init:
        return
    if args.preset == "paper" and args.steps < 100_000:
        print(f"WARNING  the transformer starts from random weights and gets {args.steps} steps. DETR needs "
              f"more than 100,000 of them: expect AP near 0.")
    elif args.preset == "laptop" and len(train_set) < 1000 and not args.overfit:
        print(f"WARNING  from scratch on {len(train_set)} images: AP stays near 0 for long and ends modest.")


def time_one_step(model, criterion, train_set, args):
    """(seconds, queries) of one training step, measured on a copy so that nothing of it remains.

    Before that one step on the largest batch there can be: if memory runs out, then now and not in an hour.
    """
    batch = data.collate([train_set[i] for i in range(args.batch_size // (args.accumulate * WORLD))])
    model = copy.deepcopy(model).train()
    try:
        with torch.random.fork_rng(devices=[]):
            for images, mask, targets in (largest(batch, train_set, args), batch):
                targets = [{k: t[k].to(args.device) for k in ("labels", "boxes")} for t in targets]
                start = time.time()
                with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
                    out = model(images.to(args.device), mask.to(args.device))
                criterion(out, targets)["total"].backward()
                if args.device != "cpu":
                    torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        raise SystemExit(f"Out of memory for parts of {len(images)} images of up to {images.shape[2]} x "
                         f"{images.shape[3]} pixels. Raise --accumulate {args.accumulate}, or lower --batch-size or "
                         "--size; --amp needs less, too.")
    return (time.time() - start) * args.accumulate, out["logits"].shape[2]


def largest(batch, train_set, args):
    """A batch padded to the largest canvas that augmentation can produce, a wide and a tall image together."""
    images, mask, targets = batch
    side, _ = data.largest_canvas(train_set.size, args.preset)
    images = images.new_zeros(len(images), 3, side, side)
    return images, torch.zeros_like(images[:, 0], dtype=torch.bool), targets


def peak_memory(args):
    """The most that this process has needed so far, on the device, as text."""
    if args.device == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


# ---- Command line ------------------------------------------------------------------------------------------
def make_parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help=f"one of {', '.join(MODELS)} (default: detr), or a path to a .py file")
    p.add_argument("--preset", choices=("laptop", "paper"), default="laptop",
                   help="small and from scratch, or as in the paper")
    p.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                   help="an option of the model, as in its build(); may be given several times")
    p.add_argument("--data", metavar="DIR", help="folder in COCO or VOC format; default: the embedded shapes")
    for name in ("train-json", "train-images", "val-json", "val-images"):
        p.add_argument(f"--{name}", metavar="PATH", help="instead of --data: the four paths one by one")
    p.add_argument("--size", type=int, help="pixels; laptop: longest side (96 for shapes, 256 for folders), "
                   "paper: shortest side (800)")
    p.add_argument("--out", help="folder for results; default runs/MODEL-DATA")
    p.add_argument("--resume", metavar="RUN", help="continue a run exactly: its folder or a checkpoint")
    p.add_argument("--init", metavar="FILE", help="start a new run from the weights of another (file or folder), or "
                   "from an official checkpoint; other classes and number of queries are fine")
    p.add_argument("--eval", action="store_true", help="only evaluate --weights")
    p.add_argument("--weights", metavar="FILE", help="checkpoint for --eval")
    p.add_argument("--overfit", type=int, metavar="N", help="train and evaluate on the same N images")
    p.add_argument("--steps", type=int, help="length of the run in optimiser steps")
    p.add_argument("--epochs", type=int, help="or in passes over the training images")
    p.add_argument("--batch-size", type=int, help="images per optimiser step, all parts together")
    p.add_argument("--accumulate", type=int, default=1, help="parts a batch is split into, to save memory")
    p.add_argument("--eval-batch-size", type=int, help="default 1 in paper: padding changes numbers a little")
    p.add_argument("--lr", type=float, help="peak learning rate, for exactly this batch size: not scaled")
    p.add_argument("--lr-backbone", type=float, help="the same for the backbone")
    p.add_argument("--weight-decay", type=float)
    p.add_argument("--clip-norm", type=float, help="gradients are scaled down to this norm")
    p.add_argument("--schedule", choices=("step", "cosine"), help="one drop to a tenth, or cosine to zero")
    p.add_argument("--lr-drop", type=int, help="epoch of the drop (--schedule step)")
    p.add_argument("--warmup", type=int, help="steps over which the learning rate grows from zero")
    p.add_argument("--eval-every", type=int, help="steps between evaluations and checkpoints; default a tenth "
                   "of the run, in paper an epoch")
    p.add_argument("--log-every", type=int, default=20, help="steps between lines in log.jsonl")
    p.add_argument("--amp", action="store_true", help="bfloat16 autocast; matching and losses in float32")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    cuda = torch.cuda.is_available()
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    p.add_argument("--workers", type=int, default=1 if (os.cpu_count() or 1) < 4 else 4,
                   help="processes that load images")
    p.add_argument("--seed", type=int, default=0)
    return p


def parse(argv=None):
    """(args, model module, options of the model, checkpoint to go on from or None, --init's checkpoint or {})."""
    p = make_parser()
    typed = p.parse_args(argv)
    if typed.eval and not typed.weights:
        p.error("--eval needs --weights FILE")
    if typed.init and (typed.resume or typed.eval):
        p.error("--init starts a new run from weights, --resume goes on with an old one, --eval trains nothing: "
                "give only one of them")
    source = typed.weights if typed.eval else typed.resume
    checkpoint = load_checkpoint(source) if source else None
    init = read_init(typed.init) if typed.init else {}
    ours = checkpoint or (init if "model_options" in init else None)  # a run of ours says what its model was
    p.set_defaults(model=ours["args"]["model"] if ours else "detr")
    module = load_model_file(ours["args"]["model"] if checkpoint else p.parse_args(argv).model)
    preset = preset_values(typed.preset, module)
    defaults = checkpoint["args"] if checkpoint else {k: preset.pop(k) for k in TRAINING if k in preset}
    if typed.epochs and not typed.steps:
        defaults["steps"] = None
    # Parse again over better defaults: what was typed wins over the checkpoint, and that over the preset.
    p.set_defaults(**defaults)
    args = p.parse_args(argv)
    check_values(p, args)
    if checkpoint:
        return args, module, checkpoint["model_options"], checkpoint, init
    inherited = {k: v for k, v in init.get("model_options", {}).items() if k != "num_queries"}
    return args, module, {**preset, **inherited, **parse_options(p, args.option)}, None, init


def preset_values(preset, module):
    """All that a preset decides: how to train (the names in TRAINING) and options of the model (the rest)."""
    recipe = {name: value for name, value in module.RECIPE.items() if name in TRAINING}
    if preset == "laptop":
        return {**recipe, "epochs": None, **LAPTOP, **getattr(module, "LAPTOP", {})}
    return {**recipe, "steps": None, "warmup": 0, "schedule": "step"}


def parse_options(p, pairs):
    """["num_queries=50", "smca=true"] -> {"num_queries": 50, "smca": True}; what is no JSON is a string."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            p.error(f"--option {pair}: write NAME=VALUE, for example --option num_queries=50")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def check_values(p, args):
    for name in ("steps", "epochs", "batch_size", "accumulate", "size", "overfit", "lr", "clip_norm",
                 "eval_every", "log_every"):
        value = getattr(args, name)
        if value is not None and not value > 0:  # also catches nan
            p.error(f"--{name.replace('_', '-')} {value}: it must be greater than 0")
    parts = args.accumulate * WORLD
    if args.batch_size % parts:
        p.error(f"--batch-size {args.batch_size} is the total: a multiple of {parts}, --accumulate {args.accumulate} "
                f"times {WORLD} processes")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: this torch sees no CUDA device; leave the flag out")


def load_data(args, splits):
    paths = {name: getattr(args, name) for name in ("train_json", "train_images", "val_json", "val_images")}
    splits = ("train",) if args.overfit else splits  # evaluated on what it is trained on
    datasets = data.load(
        args.data, **paths, size=args.size, augment=args.preset, seed=args.seed, splits=splits)
    if args.overfit:
        datasets["train"] = datasets["val"] = data.first_with_boxes(datasets["train"], args.overfit)
    return datasets


def fill_in(args, train_set):
    """What depends on the data: the batch cannot exceed the images; steps from epochs; when to evaluate."""
    parts = args.accumulate * WORLD
    if len(train_set) < args.batch_size:
        args.batch_size = max(1, len(train_set) // parts) * parts
    if len(train_set) < args.batch_size:
        raise SystemExit(f"a batch of {parts} parts, but there are only {len(train_set)} training images")
    epoch = len(train_set) // args.batch_size
    args.steps = args.steps or args.epochs * epoch
    args.eval_every = args.eval_every or (epoch if args.preset == "paper" else max(args.steps // 10, 1))
    args.eval_batch_size = args.eval_batch_size or (1 if args.preset == "paper" else args.batch_size)


def new_run_folder(args):
    """A folder that holds no other run: nothing already saved is overwritten."""
    source = args.data or args.train_images or "shapes"
    name = f"{Path(args.model).stem}-{Path(source).resolve().name}"
    names = [name] + [f"{name}-{i}" for i in range(2, 1000)]
    for folder in [Path(args.out)] if args.out else [Path("runs") / name for name in names]:
        if not list(folder.glob("*.pt")):
            folder.mkdir(parents=True, exist_ok=True)
            return folder
    raise SystemExit(f"--out {args.out}: holds a run already. Go on with --resume, or give another folder.")


def describe_run(run, args, module, model_options):
    """What somebody needs to repeat the run: the source that ran, every setting, the versions."""
    (run / Path(module.__file__).name).write_text(Path(module.__file__).read_text())
    versions = {m.__name__: m.__version__ for m in (torch, torchvision)} | {"python": sys.version.split()[0]}
    content = {"train": vars(args), "model": model_options, "versions": versions}
    (run / "args.json").write_text(json.dumps(content, indent=1))


def join_processes(args):
    """torchrun started several processes of this program: each gets a GPU of its own, or a share of the CPU."""
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")  # one process talks


def main(argv=None):
    args, module, model_options, resumed, init = parse(argv)
    if WORLD > 1:
        join_processes(args)
    torch.manual_seed(args.seed)
    datasets = load_data(args, ("val",) if args.eval else ("train", "val"))
    val_set = datasets["val"]
    if resumed and resumed["class_names"] != val_set.class_names:
        raise SystemExit(f"the checkpoint knows the classes {', '.join(resumed['class_names'])}, but the "
                         f"data has {', '.join(val_set.class_names)}")
    if resumed or init:
        model_options["pretrained_backbone"] = False  # its weights come with the checkpoint
    if not resumed and args.preset == "laptop":
        # Room for every object and some more: with too few queries boxes are lost, many make learning slow.
        room = max(20, 2 * datasets["train"].max_boxes, init.get("model_options", {}).get("num_queries", 0))
        model_options.setdefault("num_queries", room)
    model = build_model(module, len(val_set.class_names), model_options).to(args.device)
    if resumed:
        model.load_state_dict(resumed["model"])
    if init:
        initialise(model, module, init, val_set.class_names)
    criterion = SetCriterion(model)
    if args.eval:
        metrics, _ = evaluate(model, criterion, val_set, args)
        print(f"{explain(metrics)}\n{collapse_line(metrics, len(val_set.class_names))}")
        return
    fill_in(args, datasets["train"])
    if args.resume:
        run = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
    elif RANK == 0:
        run = new_run_folder(args)
        describe_run(run, args, module, model_options)
    run = gather(run if RANK == 0 else None)[0]
    train(model, criterion, datasets, args, module, model_options, run, resumed)


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        raise SystemExit(f"data: {one_line(error)}")
    except Diverged as error:
        raise SystemExit(f"The model is broken: {error}.")
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted before the first step; nothing was started.")
    except RuntimeError as error:
        if WORLD == 1:
            raise
        raise SystemExit(f"Process {RANK} of {WORLD} lost the others ({one_line(error)}). The first message above "
                         "says why; then go on with --resume.")
