"""Train, evaluate and resume any of the detectors here, or your own file with the same contract.

    python train.py --model detr                   the default run: embedded shapes, laptop preset
    python train.py --model detr --data DIR        your folder: COCO, VOC or YOLO
    python train.py --model detr --overfit 2       two images: AP must come close to 1, or something is broken
    python train.py --resume runs/detr-shapes      continues exactly after Ctrl-C or a crash
    python train.py --data DIR --init runs/detr-shapes    a new run that starts from the weights of another
    python train.py --eval --weights runs/detr-shapes/best.pt
    python train.py --model detr --preset paper --data COCO --batch-size 16 --accumulate 4
    torchrun --nproc-per-node 8 train.py ...       the same on 8 GPUs: same total batch, same gradients

Reading order: SetCriterion (matching and losses), train_step, train. support/ has everything that no paper
describes. A model file gives RECIPE (the paper's training), LAPTOP (changes of the laptop preset), build();
train.py depends on no model's name.
"""
import math
from contextlib import closing
from itertools import islice

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from support import checkpoints, data, machine, report
from support.evaluation import coco_eval, metrics_table, postprocess, signs_of_collapse
from support.options import parse, resolve
from support.run import Run


# ---- Matching and losses -----------------------------------------------------------------------------------
class Diverged(FloatingPointError):
    """The model returns or causes numbers that are not finite."""


class SetCriterion:
    """Hungarian matching and set losses of all papers here, for all supervised stages at once.

    The model's recipe decides: class_loss is "softmax" (DETR; the last logit is "no object") or "focal" (C
    independent sigmoids); w_class, w_l1 and w_giou weigh both cost and loss, unless cost_class weighs classes
    differently in the cost. Source: DETR section 3.1, appendix A.2; official models/matcher.py, SetCriterion.
    """

    no_object_weight = 0.1  # softmax: most queries match nothing and would dominate the loss
    alpha, gamma = 0.25, 2.0  # focal

    def __init__(self, model):
        recipe = model.recipe
        self.softmax = recipe["class_loss"] == "softmax"
        self.weights = {name: recipe[f"w_{name}"] for name in ("class", "l1", "giou")}
        self.cost_weights = {**self.weights, "class": recipe.get("cost_class", recipe["w_class"])}
        self.corner_l1 = recipe.get("corner_l1", False)  # AdaMixer: L1 between corners
        self.denoising = recipe.get("denoising", False)  # the model gets the targets in training

    def cost(self, logits, boxes, target):
        """Matching cost of one image: logits [S, Q, C], boxes [S, Q, 4], target with G boxes -> [S, Q, G]."""
        labels, target_boxes = target["labels"], target["boxes"]
        if self.softmax:
            # A probability, not its logarithm as in the loss, so that it has the size of the box costs (A.2).
            cost_class = -logits.softmax(-1)[..., labels]  # [S, Q, G]
        else:
            p = logits.sigmoid()[..., labels]  # [S, Q, G]
            positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
            negative = (1 - self.alpha) * p ** self.gamma * -(1 - p + 1e-8).log()
            cost_class = positive - negative
        xyxy, target_xyxy = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, target_boxes))
        if self.corner_l1:
            boxes, target_boxes = xyxy, target_xyxy
        cost_l1 = torch.cdist(boxes, target_boxes.expand(len(boxes), -1, -1), p=1)  # [S, Q, G]
        cost_giou = -generalized_box_iou(xyxy.flatten(0, 1), target_xyxy).view_as(cost_l1)  # [S, Q, G]
        w = self.cost_weights
        return w["class"] * cost_class + w["l1"] * cost_l1 + w["giou"] * cost_giou

    @torch.no_grad()
    def match(self, logits, boxes, targets):
        """One-to-one assignment of least cost: for every image (query index, target index), int64.

        logits [B, Q, C], boxes [B, Q, 4] of one stage; for [S, B, Q, .] every stage is matched independently,
        and the result is a list of S such lists. With more targets than queries the most expensive ones stay
        unmatched. Raises Diverged when a prediction is not finite.
        """
        if logits.ndim == 3:
            return self.match(logits[None], boxes[None], targets)[0]
        logits, boxes = logits.float(), boxes.float()
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            raise Diverged("predictions are not finite")
        costs = [self.cost(logits[:, b], boxes[:, b], target).cpu() for b, target in enumerate(targets)]
        return [[tuple(map(torch.from_numpy, linear_sum_assignment(cost[s]))) for cost in costs]
                for s in range(len(logits))]

    def stage_losses(self, logits, boxes, targets, box_counts, known=None):
        """Un-weighted losses {"class": [S], "l1": [S], "giou": [S]} of predictions [S, B, Q, .]."""
        logits, boxes = logits.float(), boxes.float()
        if known is None:
            stages = self.match(logits, boxes, targets)
        else:  # known [B, Q] is the target of every query: -1 is "no object", -2 counts in no loss
            stages = [[((row >= 0).nonzero()[:, 0], row[row >= 0]) for row in known]] * len(logits)
            logits = logits.masked_fill(known[..., None] == -2, -100)  # focal loss 0, and no gradient
        rows = [(s, b, q, g) for s, matches in enumerate(stages)
                for b, match in enumerate(matches) for q, g in zip(*(index.tolist() for index in match))]
        rows = torch.tensor(rows, dtype=torch.int64, device=logits.device).view(-1, 4)  # [P, 4], P matches
        stage, image, query, target = rows.unbind(1)  # each [P]
        counts = torch.tensor([0] + [len(t["labels"]) for t in targets], device=logits.device)
        row = counts.cumsum(0)[image] + target  # [P], among the objects of all images together
        labels = torch.cat([t["labels"] for t in targets])[row]  # [P]
        target_boxes = torch.cat([t["boxes"] for t in targets])[row]  # [P, 4]
        matched, num_boxes = (stage, image, query), max(sum(box_counts), 1)
        matched_boxes = boxes[matched]  # [P, 4]
        xyxy, target_xyxy = (box_convert(b, "cxcywh", "xyxy") for b in (matched_boxes, target_boxes))
        giou = generalized_box_iou_loss(xyxy, target_xyxy, eps=0)  # [P], 1 - GIoU; targets are never empty
        if self.corner_l1:
            matched_boxes, target_boxes = xyxy, target_xyxy
        l1 = (matched_boxes - target_boxes).abs().sum(1)  # [P]
        zeros = logits.new_zeros(len(logits))
        return {
            "class": self.class_losses(logits, matched, labels, box_counts),
            "l1": zeros.index_add(0, stage, l1) / num_boxes,
            "giou": zeros.index_add(0, stage, giou) / num_boxes,
        }

    def class_losses(self, logits, matched, labels, box_counts):
        """[S] from logits [S, B, Q, C]; `matched`: (stage, image, query), labels: each [P]"""
        S, B, Q, C = logits.shape
        if self.softmax:
            wanted = torch.full((S, B, Q), C - 1, device=logits.device)
            wanted[matched] = labels
            weight = torch.ones(C, device=logits.device)
            weight[C - 1] = self.no_object_weight
            loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none")  # [SBQ]
            # Divided by the sum of class weights, not of boxes; box_counts gives that of the whole batch
            objects = sum(min(n, Q) for n in box_counts)
            others = len(box_counts) * Q - objects
            return loss.view(S, -1).sum(1) / (objects + self.no_object_weight * others)
        wanted = torch.zeros_like(logits)
        wanted[(*matched, labels)] = 1
        loss = sigmoid_focal_loss(logits, wanted, self.alpha, self.gamma)  # [S, B, Q, C]
        return loss.flatten(1).sum(1) / max(sum(box_counts), 1)

    def __call__(self, out, targets, box_counts=None):
        """{"total": weighted sum, "class": [S], "l1": [S], "giou": [S]} of a batch, the parts un-weighted.

        targets: one dict per image, labels [n] int64 and boxes [n, 4] cxcywh in [0, 1]; n = 0 is fine.
        box_counts: boxes per image of the whole batch, if this is only a part of it (accumulation, several
        GPUs), so that the parts add up to the loss of the batch. Two-stage models add "proposal_class" etc.
        """
        if box_counts is None:
            box_counts = [len(t["labels"]) for t in targets]
        losses = self.stage_losses(out["logits"], out["boxes"], targets, box_counts)
        # Group DETR: G independently matched groups of queries; stage l * G + g is group g of layer l
        losses = {name: loss.view(-1, out.get("groups", 1)).mean(1) for name, loss in losses.items()}
        total = self.weighted(losses)
        if "proposals" in out:
            # Proposals predict only "an object", so every label is 0 (Deformable DETR, A.4); not in DINO.
            objects = [{"labels": torch.zeros_like(t["labels"]), "boxes": t["boxes"]} for t in targets]
            objects = targets if out["proposals"].get("class_aware") else objects
            logits, boxes = out["proposals"]["logits"][None], out["proposals"]["boxes"][None]  # one stage
            proposal = self.stage_losses(logits, boxes, objects, box_counts)
            total = total + self.weighted(proposal)
            losses.update({f"proposal_{name}": loss for name, loss in proposal.items()})
        if "one2many" in out:
            # H-DETR: additional queries, for which every object is repeated K times
            extra = out["one2many"]
            K = extra["repeat"]
            copies = [{"labels": t["labels"].repeat(K), "boxes": t["boxes"].repeat(K, 1)} for t in targets]
            many = self.stage_losses(extra["logits"], extra["boxes"], copies, [n * K for n in box_counts])
            total = total + extra["weight"] * self.weighted(many)
            losses.update({f"one2many_{name}": loss for name, loss in many.items()})
        if "denoising" in out:
            # DN-DETR and DINO: G groups of objects with noise; their targets are known, so nothing is matched
            noisy = out["denoising"]
            counts = [n * noisy["groups"] for n in box_counts]
            known = self.stage_losses(noisy["logits"], noisy["boxes"], targets, counts, noisy["target"])
            total = total + self.weighted(known)
            losses.update({f"denoising_{name}": loss for name, loss in known.items()})
        return {"total": total, **losses}

    def weighted(self, losses):
        return sum(self.weights[name] * loss.sum() for name, loss in losses.items())


# ---- Optimiser, schedule, data order -----------------------------------------------------------------------
def make_optimizer(model, lr, lr_backbone, weight_decay):
    """AdamW with the papers' groups: backbone, slow_parameters at a tenth (Deformable DETR), and the rest."""
    slow = model.recipe.get("slow_parameters") or ()
    parts = {"rest": [], "backbone": [], "slow": []}
    for name, parameter in model.named_parameters():
        part = "slow" if any(word in name for word in slow) else "rest"
        part = "backbone" if name.startswith("backbone.") else part
        if parameter.requires_grad:
            parts[part].append(parameter)
    rate = {"rest": lr, "backbone": lr_backbone, "slow": lr * 0.1}
    groups = [{"params": parts[part], "part": part, "lr": rate[part], "peak_lr": rate[part]}
              for part in parts if parts[part]]
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


def lr_factor(step, args, steps_per_epoch):
    """Learning rate at a step, as a share of its peak: linear warm-up, then cosine to 0 or a drop to 0.1."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    if args.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))
    return 0.1 if step >= args.lr_drop * steps_per_epoch else 1.0


def set_rates(optimizer, factor):
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def seed_of(run_seed, count):
    """A seed for each epoch or step; a large prime, so that runs with the seeds 0, 1, 2 share none."""
    return run_seed * 1_000_003 + count


class Batches(torch.utils.data.Sampler):
    """This process' parts of all batches of a run in order, each a list of (epoch, index).

    They depend only on seed and step, so a resumed run sees the same images as an unbroken one, and
    several processes share the batch of one. Images at the end of an epoch that fill no batch are left out.
    """

    def __init__(self, size, args, start):
        self.size, self.args, self.start = size, args, start
        self.steps_per_epoch = size // args.batch_size

    def __iter__(self):
        batch, part = self.args.batch_size, self.args.batch_size // (self.args.accumulate * machine.WORLD)
        for step in range(self.start, self.args.steps):
            epoch, i = divmod(step, self.steps_per_epoch)
            generator = torch.Generator().manual_seed(seed_of(self.args.seed, epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
            for first in range(i * batch + machine.RANK * part, (i + 1) * batch, machine.WORLD * part):
                yield [(epoch, index) for index in order[first:first + part]]


# ---- Evaluation --------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, criterion, dataset, args):
    """(COCO's 12 numbers and three signs of collapse, {image id: boxes in pixels, scores, labels}).

    Every process evaluates its share of the images, each image once; all processes get the whole result.
    """
    model.eval()
    predictions, all_boxes = {}, []
    share = torch.utils.data.Subset(dataset, range(machine.RANK, len(dataset), machine.WORLD))
    for images, mask, targets in machine.make_loader(share, args, batch_size=args.eval_batch_size):
        with machine.autocast(args):
            out = model(images.to(args.device), mask.to(args.device))
        logits, boxes = out["logits"][-1].float().cpu(), out["boxes"][-1].float().cpu()
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            raise Diverged("predictions are not finite")
        sizes = [t["size"] for t in targets]
        found = postprocess(logits, boxes, sizes, criterion.softmax, len(dataset.class_names))
        predictions.update((t["image_id"], p) for t, p in zip(targets, found))
        all_boxes += boxes  # each [Q, 4]
    model.train()
    predictions = dict(pair for part in machine.gather(predictions) for pair in part.items())
    all_boxes = sum(machine.gather(all_boxes), [])
    return {**coco_eval(dataset, predictions), **signs_of_collapse(all_boxes, predictions)}, predictions


# ---- The loop ----------------------------------------------------------------------------------------------
def train_step(forward, criterion, optimizer, parts, args, scaler=torch.amp.GradScaler("cpu", enabled=False)):
    """One optimiser step on one batch, given in parts. Returns what is logged; raises Diverged."""
    # Every loss is normalised by the boxes of the whole batch and every part padded to its largest image, so
    # that the parts add up to the gradient of one large batch (exactly, as long as BatchNorm is frozen).
    box_counts = sum(machine.gather([len(t["labels"]) for _, _, targets in parts for t in targets]), [])
    sizes = sum(machine.gather([tuple(mask.shape[1:]) for _, mask, _ in parts]), [])
    height, width = (max(side) for side in zip(*sizes))
    logged = {}
    optimizer.zero_grad()
    for images, mask, targets in parts:
        more = (0, width - images.shape[3], 0, height - images.shape[2])  # on the right, and below
        images, mask = F.pad(images, more), F.pad(mask, more, value=True)
        targets = [{k: t[k].to(args.device) for k in ("labels", "boxes")} for t in targets]
        inputs = images.to(args.device), mask.to(args.device)
        with machine.autocast(args):
            out = forward(*inputs, targets) if criterion.denoising else forward(*inputs)
        losses = criterion(out, targets, box_counts)  # outside of autocast: in float32
        scaler.scale(losses["total"] * machine.WORLD).backward()  # DDP takes the mean, we need the sum
        for name, loss in losses.items():
            logged[name] = logged.get(name, 0) + loss.detach().flatten()[-1].item()  # of the last stage
    logged = {name: sum(part[name] for part in machine.gather(logged)) for name in logged}
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    logged["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, args.clip_norm).item()
    skips = scaler.is_enabled() and scaler.get_scale() > 1  # float16: the scaler skips this step
    if not (math.isfinite(logged["grad_norm"]) or skips):
        raise Diverged("the gradient is not finite")
    scaler.step(optimizer)
    scaler.update()
    return logged


def train(model, criterion, optimizer, datasets, args, run):
    """From run.step to args.steps; the Run logs, saves and stops."""
    forward = torch.nn.parallel.DistributedDataParallel(model) if machine.WORLD > 1 else model
    forward = torch.compile(forward) if args.compile else forward
    batches = Batches(len(datasets["train"]), args, run.step)
    loader = machine.make_loader(datasets["train"], args, batch_sampler=batches)
    model.train()
    with closing(part for part in loader) as parts, run.underway():  # closing ends the loader's processes
        if run.evaluation_is_due():  # the run was stopped before it
            run.evaluated(*evaluate(model, criterion, datasets["val"], args))
        for step in range(run.step, args.steps):
            set_rates(optimizer, lr_factor(step, args, batches.steps_per_epoch))
            # Dropout and data order depend only on seed and step, so nothing else needs to be restored
            torch.manual_seed(seed_of(args.seed, step) * machine.WORLD + machine.RANK)
            run.parts = list(islice(parts, args.accumulate))
            losses = train_step(forward, criterion, optimizer, run.parts, args, run.scaler)
            run.log(step + 1, losses)
            if run.evaluation_is_due():
                run.evaluated(*evaluate(model, criterion, datasets["val"], args))
            if run.stopped():
                break


def main(argv=None):
    request = parse(__doc__, argv)
    args, resumed = request.args, request.checkpoint
    machine.join(args.device)
    torch.manual_seed(args.seed)
    datasets = data.load_datasets(args, ("val",) if args.eval else ("train", "val"))
    class_names = datasets["val"].class_names
    if resumed:
        checkpoints.check_data(resumed, datasets)
    if not args.eval:
        resolve(request, datasets["train"])
    model = request.build_model(len(class_names)).to(args.device)
    criterion = SetCriterion(model)
    if resumed:
        checkpoints.load_weights(model, resumed)
    if request.init:
        checkpoints.initialise(model, request.module, request.init, class_names)
    if args.eval:
        metrics, _ = evaluate(model, criterion, datasets["val"], args)
        print(f"{metrics_table(metrics)}\n{report.collapse_line(metrics, len(class_names))}")
        return
    report.announce(model, datasets, request, lambda copy, parts: train_step(
        copy, criterion, make_optimizer(copy, 0, 0, 0), parts, args, machine.make_scaler(args)))
    optimizer = make_optimizer(model, args.lr, args.lr_backbone, args.weight_decay)
    if resumed:
        checkpoints.load_optimizer(optimizer, resumed)
    train(model, criterion, optimizer, datasets, args, Run(request, model, optimizer, datasets))


if __name__ == "__main__":
    with report.one_line_errors():
        main()
