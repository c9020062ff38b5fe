"""Train, evaluate and resume any of the detectors here, or your own file that keeps their contract.

    python train.py --model detr                   embedded data set, small model, ends by itself
    python train.py --model detr --data DIR        your folder: COCO, VOC or YOLO
    python train.py --model detr --overfit 2       two images: AP must come close to 1, or something is broken
    python train.py --resume runs/detr-shapes      go on after Ctrl-C or a crash, exactly where it stopped
    python train.py --data DIR --init runs/detr-shapes    a new run that starts from the weights of another
    python train.py --eval --weights runs/detr-shapes/best.pt
    python train.py --model detr --preset paper --data COCO --batch-size 16 --accumulate 4
    torchrun --nproc-per-node 8 train.py ...       the same on 8 GPUs: same total batch, same gradients

Reading order: SetCriterion (matching and losses), train_step, train. What no paper describes is in support/.
A model file gives RECIPE (how the paper trains it), LAPTOP (what the small preset changes) and build();
nothing here asks for a model's name.
"""
import math
from itertools import islice

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from support import checkpoints, data, devices, processes, report
from support.evaluation import coco_eval, explain, is_softmax, postprocess, signs_of_collapse
from support.model_files import build_model
from support.options import choose_num_queries, fill_in, load_datasets, parse
from support.run import Run


# ---- Matching and losses -----------------------------------------------------------------------------------
class Diverged(FloatingPointError):
    """The model returns or causes numbers that are not finite."""


class SetCriterion:
    """Hungarian matching and set losses of all papers here, for all supervised stages at once.

    The model's recipe says which: class_loss is "softmax" (DETR; the last logit is "no object") or "focal" (C
    independent sigmoids); w_class, w_l1 and w_giou weigh both cost and loss, unless cost_class weighs classes
    differently in the cost. Source: DETR section 3.1, appendix A.2; official models/matcher.py, SetCriterion.
    """

    no_object_weight = 0.1  # softmax: most queries match nothing and would drown the rest
    alpha, gamma = 0.25, 2.0  # focal

    def __init__(self, model):
        recipe = model.recipe
        self.softmax = is_softmax(model)
        self.weights = {name: recipe[f"w_{name}"] for name in ("class", "l1", "giou")}
        self.cost_weights = {**self.weights, "class": recipe.get("cost_class", recipe["w_class"])}
        self.corner_l1 = recipe.get("corner_l1", False)  # AdaMixer: L1 between corners
        self.denoising = recipe.get("denoising", False)  # the model is given the targets in training

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
        xyxy, target_xyxy = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, target_boxes))
        if self.corner_l1:
            boxes, target_boxes = xyxy, target_xyxy
        cost_l1 = torch.cdist(boxes, target_boxes.expand(len(boxes), -1, -1), p=1)  # [S, Q, G]
        cost_giou = -generalized_box_iou(xyxy.flatten(0, 1), target_xyxy).view_as(cost_l1)  # [S, Q, G]
        w = self.cost_weights
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

    def stage_losses(self, logits, boxes, targets, box_counts, known=None):
        """Un-weighted losses {"class": [S], "l1": [S], "giou": [S]} of predictions [S, B, Q, .].

        known [B, Q]: the target of every query in place of a matching; -1 is "no object", -2 is in no loss.
        """
        logits, boxes = logits.float(), boxes.float()
        S, pairs = len(logits), []  # of all stages and images: [4, number of matches] each
        if known is None:
            matches = self.match_stages(logits, boxes, targets)
        else:
            matches = [[(row.ge(0).nonzero()[:, 0], row[row >= 0]) for row in known]] * S
            logits = logits.masked_fill(known[..., None] == -2, -100)  # no loss, no gradient
        for s, stage in enumerate(matches):
            for b, (query, target) in enumerate(stage):
                s_index, b_index = torch.full_like(query, s), torch.full_like(query, b)
                pairs.append(torch.stack([s_index, b_index, query, target]))
        stage, image, query, target = torch.cat(pairs, dim=1).to(logits.device)  # each [P], P matches in all
        counts = torch.tensor([0] + [len(t["labels"]) for t in targets], device=logits.device)
        row = counts.cumsum(0)[image] + target  # [P], among the objects of all images together
        labels = torch.cat([t["labels"] for t in targets])[row]  # [P]
        target_boxes = torch.cat([t["boxes"] for t in targets])[row]  # [P, 4]
        num_boxes = max(sum(box_counts), 1)

        matched = stage, image, query
        matched_boxes = boxes[matched]  # [P, 4]
        xyxy, target_xyxy = (box_convert(b, "cxcywh", "xyxy") for b in (matched_boxes, target_boxes))
        giou = generalized_box_iou_loss(xyxy, target_xyxy, eps=0)  # [P], 1 - GIoU; targets are never empty
        if self.corner_l1:
            matched_boxes, target_boxes = xyxy, target_xyxy
        l1 = (matched_boxes - target_boxes).abs().sum(1)  # [P]
        zeros = logits.new_zeros(S)
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
            # Normalised by the sum of weights, not by boxes; of the whole batch it follows from box_counts
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
        box_counts: boxes per image of the whole batch, where this is only a part of it (accumulation, several
        GPUs): then the parts add up to what the whole would give. Two-stage models add "proposal_class" etc.
        """
        if box_counts is None:
            box_counts = [len(t["labels"]) for t in targets]
        losses = self.stage_losses(out["logits"], out["boxes"], targets, box_counts)
        # Group DETR: K groups of queries, each matched by itself; stage l * K + k is group k of layer l
        losses = {name: loss.view(-1, out.get("groups", 1)).mean(1) for name, loss in losses.items()}
        total = self.weighted(losses)
        if "proposals" in out:
            # Proposals only say "some object", so every label is class 0 (Deformable DETR, appendix A.4).
            objects = [{"labels": torch.zeros_like(t["labels"]), "boxes": t["boxes"]} for t in targets]
            objects = targets if out["proposals"].get("class_aware") else objects  # but not in DINO
            logits, boxes = out["proposals"]["logits"][None], out["proposals"]["boxes"][None]  # one stage
            proposal = self.stage_losses(logits, boxes, objects, box_counts)
            total = total + self.weighted(proposal)
            losses.update({f"proposal_{name}": loss for name, loss in proposal.items()})
        if "one2many" in out:
            # H-DETR: further queries, for which every object is there several times
            extra = out["one2many"]
            K = extra["repeat"]
            copies = [{"labels": t["labels"].repeat(K), "boxes": t["boxes"].repeat(K, 1)} for t in targets]
            many = self.stage_losses(extra["logits"], extra["boxes"], copies, [n * K for n in box_counts])
            total = total + extra["weight"] * self.weighted(many)
            losses.update({f"one2many_{name}": loss for name, loss in many.items()})
        if "denoising" in out:
            # DN-DETR, DINO: G groups of noisy objects; it is known what must come back, so nothing is matched
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
        if name.startswith("backbone."):
            part = "backbone"
        else:
            part = "slow" if any(word in name for word in slow) else "rest"
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


def seed_of(run_seed, count):
    """A seed for each epoch or step; a large prime, so that runs with the seeds 0, 1, 2 share none."""
    return run_seed * 1_000_003 + count


class Batches(torch.utils.data.Sampler):
    """This process' parts of all batches of a run in order, each a list of (epoch, index).

    A function of the seed and the step alone, so a run resumed at any step sees what it would have seen, and
    several processes share the batch of one. What is left of an epoch and fills no batch is dropped.
    """

    def __init__(self, size, args, start):
        self.size, self.args, self.start = size, args, start
        self.steps_per_epoch = size // args.batch_size

    def __iter__(self):
        batch, part = self.args.batch_size, self.args.batch_size // (self.args.accumulate * processes.WORLD)
        for step in range(self.start, self.args.steps):
            epoch, i = divmod(step, self.steps_per_epoch)
            generator = torch.Generator().manual_seed(seed_of(self.args.seed, epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
            for first in range(i * batch + processes.RANK * part, (i + 1) * batch, processes.WORLD * part):
                yield [(epoch, index) for index in order[first:first + part]]


# ---- Evaluation --------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, criterion, dataset, args):
    """(COCO's 12 numbers and three signs of collapse, {image id: boxes in pixels, scores, labels}).

    Every process does its share of the images, each image once; all of them get the whole result.
    """
    model.eval()
    predictions, all_boxes = {}, []
    share = torch.utils.data.Subset(dataset, range(processes.RANK, len(dataset), processes.WORLD))
    for images, mask, targets in processes.make_loader(share, args, batch_size=args.eval_batch_size):
        with devices.autocast(args):
            out = model(images.to(args.device), mask.to(args.device))
        logits, boxes = out["logits"][-1].float().cpu(), out["boxes"][-1].float().cpu()
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            raise Diverged("predictions are not finite")
        sizes = [t["size"] for t in targets]
        found = postprocess(logits, boxes, sizes, criterion.softmax, len(dataset.class_names))
        predictions.update((t["image_id"], p) for t, p in zip(targets, found))
        all_boxes += boxes  # each [Q, 4]
    model.train()
    predictions = dict(pair for part in processes.gather(predictions) for pair in part.items())
    all_boxes = sum(processes.gather(all_boxes), [])
    return {**coco_eval(dataset, predictions), **signs_of_collapse(all_boxes, predictions)}, predictions


# ---- The loop ----------------------------------------------------------------------------------------------
def train_step(forward, criterion, optimizer, parts, args, scaler=devices.Scaler()):
    """One optimiser step on one batch, given in parts. Returns what is logged; raises Diverged."""
    # Every loss is normalised by the boxes of the whole batch and every part padded to its largest image, so
    # that the parts add up to the gradient of one large batch (exactly, as long as BatchNorm is frozen).
    box_counts = sum(processes.gather([len(t["labels"]) for _, _, targets in parts for t in targets]), [])
    sizes = sum(processes.gather([tuple(mask.shape[1:]) for _, mask, _ in parts]), [])
    height, width = (max(side) for side in zip(*sizes))
    logged = {}
    optimizer.zero_grad()
    for images, mask, targets in parts:
        images, mask = data.pad_batch(images, mask, height, width)
        targets = [{k: t[k].to(args.device) for k in ("labels", "boxes")} for t in targets]
        with devices.autocast(args):
            inputs = images.to(args.device), mask.to(args.device)
            out = forward(*inputs, targets) if criterion.denoising else forward(*inputs)
        losses = criterion(out, targets, box_counts)  # outside of autocast: in float32
        scaler.scale(losses["total"] * processes.WORLD).backward()  # DDP takes the mean: make it a sum
        for name, loss in losses.items():
            logged[name] = logged.get(name, 0) + loss.detach().flatten()[-1].item()  # of the last stage
    logged = {name: sum(part[name] for part in processes.gather(logged)) for name in logged}
    parameters = scaler.unscaled(optimizer)
    logged["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, args.clip_norm).item()
    if not (math.isfinite(logged["grad_norm"]) or scaler.skips()):
        raise Diverged("the gradient is not finite")
    scaler.step(optimizer)
    return logged


def train(model, criterion, optimizer, datasets, args, run):
    """From run.step to args.steps; the Run counts, logs, saves and stops."""
    forward = torch.nn.parallel.DistributedDataParallel(model) if processes.WORLD > 1 else model
    forward = torch.compile(forward) if args.compile else forward
    batches = Batches(len(datasets["train"]), args, run.step)
    loader = iter(processes.make_loader(datasets["train"], args, batch_sampler=batches))
    run.start(model, optimizer, datasets)
    model.train()
    while run.goes_on():
        factor = lr_factor(run.step, args, batches.steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        # Dropout, like the data order, is a function of seed and step: nothing else needs to be restored
        torch.manual_seed(seed_of(args.seed, run.step) * processes.WORLD + processes.RANK)
        parts = list(islice(loader, args.accumulate))
        try:
            losses = train_step(forward, criterion, optimizer, parts, args, run.scaler)
            run.log_step(losses, epoch=(run.step + 1) / batches.steps_per_epoch, lr=args.lr * factor)
            if run.evaluation_is_due():
                run.log_evaluation(*evaluate(model, criterion, datasets["val"], args))
        except Diverged as error:
            raise SystemExit(report.divergence(error, model, parts, args, run, args.lr * factor))
    run.finish()


def main(argv=None):
    request = parse(__doc__, argv)
    args, resumed = request.args, request.checkpoint
    processes.join(args.device)
    torch.manual_seed(args.seed)
    datasets = load_datasets(args, ("val",) if args.eval else ("train", "val"))
    class_names = datasets["val"].class_names
    if resumed:
        checkpoints.check_data(resumed, datasets)
    else:
        choose_num_queries(request, datasets["train"])
    model = build_model(request.module, len(class_names), request.model_options).to(args.device)
    criterion = SetCriterion(model)
    if resumed:
        checkpoints.load_weights(model, resumed)
    if request.init:
        checkpoints.initialise(model, request.module, request.init, class_names)
    if args.eval:
        metrics, _ = evaluate(model, criterion, datasets["val"], args)
        print(f"{explain(metrics)}\n{report.collapse_line(metrics, len(class_names))}")
        return
    fill_in(args, datasets["train"])
    run = Run(request)
    report.announce(model, datasets, args, run, lambda copy, parts: train_step(
        copy, criterion, make_optimizer(copy, 0, 0, 0), parts, args, devices.Scaler(args)))
    optimizer = make_optimizer(model, args.lr, args.lr_backbone, args.weight_decay)
    if resumed:
        checkpoints.load_optimizer(optimizer, model, resumed)
    train(model, criterion, optimizer, datasets, args, run)


if __name__ == "__main__":
    with report.one_line_errors():
        main()
