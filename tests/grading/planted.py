"""Mistakes that students make, planted into our files: each loses its own mark and no other.

A mistake wraps functions and methods by name, or where that is not possible replaces a short piece of text. A
row is (files, mark, the mistake, {name: wrapper} or {old text: new text}).
"""
import types
from collections import namedtuple

import torch
import torch.nn.functional as F

from tests.grading.files import path_of

Mistake = namedtuple("Mistake", "file mark what patches")


# ---- Wrappers ----------------------------------------------------------------------------------------------
def arg(i, change):
    """The i-th argument is changed; self counts as 0."""
    return lambda f: lambda *args, **how: f(*[change(x) if k == i else x for k, x in enumerate(args)], **how)


def out(change):
    """The result is changed."""
    return lambda f: lambda *args, **how: change(f(*args, **how))


def then(action):
    """Something is done to self after the call."""
    return lambda f: lambda self, *a, **how: (f(self, *a, **how), torch.no_grad()(action)(self)) and None


def last_stage(f):
    return lambda self, *inputs: {key: x if self.training else x[-1:] for key, x in f(self, *inputs).items()}


def over_heads(f):
    def forward(self, q, k, v, mask=None, bias=None):
        q, k, v = (x.unflatten(-1, (self.nheads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5 + (0 if bias is None else bias)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None], -torch.inf)
        weights = F.dropout(scores.softmax(1).nan_to_num(), self.dropout, self.training)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))

    return forward


def accepts_unknown(f):
    def load(model, checkpoint):
        try:
            f(model, checkpoint)
        except RuntimeError as error:
            if "Missing" in str(error):
                raise

    return load


def kept(f):
    found = {}
    return lambda mask, dim, *args, **how: found.setdefault((mask.shape, dim), f(mask, dim, *args, **how))


# ---- The mistakes: at least one for each mark of each file -------------------------------------------------
DETR, COND, DEFORMABLE, SAM, SQR = "detr", "conditional_detr", "deformable_detr", "sam_detr", "sqr"
DN, DINO = "dn_detr", "dino"
TOKENS, POINTS = f"{DETR} {COND} {SAM}", f"{DEFORMABLE} {SQR}"
ALL = f"{TOKENS} {POINTS}"
ROWS = [
    (ALL, "shapes", "there are always 100 queries", {
        "build": lambda f: lambda num_classes, **options: f(num_classes, **{**options, "num_queries": 100})}),
    (DETR, "shapes", "evaluation returns the last stage only", {"DETR.forward": last_stage}),
    (ALL, "independence", "positions are kept by the size of the map", {"sine_positions": kept}),
    (DETR, "independence", "the mask is inverted in place", {
        "DETR.forward": arg(2, lambda mask: (mask.clone(), mask.logical_not_())[0])}),
    (ALL, "loading", "unknown entries are ignored", {"load_official": accepts_unknown}),
    (ALL, "start", "biases of attention's output start at 1", {
        "Attention.__init__": then(lambda self: self.out_proj.bias.fill_(1))}),
    (ALL, "backbone", "colours are in the order BGR", {"Backbone.forward": arg(1, lambda x: x.flip(1))}),
    (TOKENS, "padding", "scores of padding are -1, not minus infinity", {
        "Attention.forward": lambda f: lambda self, q, k, v, mask=None, bias=None: f(
            self, q, k, v, None, bias if mask is None else -mask[:, None, None].float() + (bias or 0))}),
    (POINTS, "padding", "both valid ratios are the height's", {
        "valid_ratio": out(lambda x: x[:, 1:].expand_as(x))}),
    (f"{DETR} {POINTS}", "positions", "keys of attention among queries have no positions", {
        "sa_proj(tgt + query_pos, tgt + query_pos, tgt)": "sa_proj(tgt + query_pos, tgt, tgt)"}),
    (f"{COND} {SAM}", "positions", "keys of attention among queries have no positions", {
        "self.sa_k_content(tgt) + self.sa_k_pos(query_pos)": "self.sa_k_content(tgt)"}),
    (ALL, "attention", "the softmax is over heads", {"Attention.forward": over_heads}),
    (DETR, "queries", "query embeddings are read column by column", {
        "self.query_embed.weight": "self.query_embed.weight.T.reshape_as(self.query_embed.weight)"}),
    (DETR, "heads", "boxes begin at their top left corner", {
        "DETR.forward": out(lambda found: {**found, "boxes": (
            found["boxes"] - F.pad(found["boxes"][..., 2:] / 2, (0, 2))).abs()})}),
    (ALL, "heads", "the feed-forward block is normalised before, not after", {
        "FeedForward.forward": lambda f: lambda self, x: x + self.dropout(self.linear2(
            self.dropout(self.linear1(self.norm(x))).relu()))}),
    (ALL, "training", "the batch norm is live", {
        "FrozenBatchNorm2d.forward": lambda f: lambda self, x: F.batch_norm(
            x, None, None, self.weight, self.bias, True) if self.training else f(self, x)}),
    (ALL, "training", "the rate of dropout in feed-forward blocks is fixed", {
        "FeedForward.__init__": lambda f: lambda self, d, hidden, p: f(self, d, hidden, 0.1)}),
    (DETR, "training", "image features go through a dropout", {
        "Encoder.forward": lambda f: lambda self, src, *a: f(self, self.layers[0].dropout(src), *a)}),
    (DETR, "training", "the recipe has the focal loss", {
        "DETR.recipe": lambda r: {**r, "class_loss": "focal"}}),
    (DETR, "gradients", "boxes train only their head", {"MLP.forward": arg(1, torch.Tensor.detach)}),
    (COND, "gradients", "each layer trains only itself", {
        "DecoderLayer.forward": arg(1, torch.Tensor.detach)}),
    (POINTS, "gradients", "reference points are not trained", {
        "self.reference_points(query_pos).sigmoid()": "self.reference_points(query_pos).detach().sigmoid()"}),
    (SAM, "gradients", "regions do not train the encoder", {
        "SemanticsAligner.forward": arg(3, torch.Tensor.detach)}),
    (COND, "spatial_query", "lambda comes from query positions", {
        "self.query_scale(tgt)": "self.query_scale(query_pos)"}),
    (COND, "references", "reference points stay away from the border", {
        "self.reference_head(query_pos)": "self.reference_head(query_pos).clamp(-2, 2)"}),
    (f"{POINTS} {SAM}", "references", "references are clamped to 0.05 from the border", {
        "reference.logit(eps=1e-5)": "reference.clamp(0.05, 0.95).logit()"}),
    (POINTS, "sampling", "weights of levels and points are mixed up", {
        "deformable_sampling": arg(3, lambda w: w.transpose(-1, -2).reshape(w.shape))}),
    (POINTS, "refinement", "points are relative to (height, width)", {
        "reference[..., 2:] * 0.5": "reference[..., 2:].flip(-1) * 0.5"}),
    (POINTS, "two_stage", "queries encode (y, x, h, w) of their proposal", {
        "sine(reference,": "sine(reference[..., [1, 0, 3, 2]],"}),
    (SQR, "recollection", "dense recollection takes every other stage", {
        "slice(None)": "slice(-1, None, -2)"}),
    (SQR, "recurrent", "the first stage runs at inference", {"[stages[-1]] * self": "[stages[0]] * self"}),
    (SAM, "aligner", "points are (y, x)", {"xy[:, :, 0].tanh()": "xy[:, :, 0].tanh().flip(-1)"}),
    (SAM, "smca", "scales are (y, x)", {"gaussian_bias": arg(1, lambda x: x.flip(-1))}),
    (f"{DN} {DINO}", "groups", "matching queries see the noisy ones", {
        "& (group >= 0)": "& (group >= 0) & (group[:, None] >= 0)"}),
    (DN, "noise", "the centre moves as far as the size", {"[0.5, 0.5, 1, 1]": "[1, 1, 1, 1]"}),
    (DINO, "noise", "negatives are as near as positives", {'(noise["box"] + negative)': 'noise["box"]'}),
    ("train", "pairing", "objects are taken in their own order", {
        "for q, g in zip(*(index.tolist() for index in match))": "for g, q in enumerate(match[0].tolist())"}),
    ("train", "class_loss", "the focal loss has no exponent", {
        "sigmoid_focal_loss": arg(3, lambda gamma: 0)}),
    ("train", "empty", "images without objects have no class loss", {
        "sigmoid_focal_loss": lambda f: lambda logits, wanted, *a: (
            f(logits, wanted, *a) * wanted.flatten(2).any(-1)[..., None, None])}),
    ("train", "l1_loss", "the loss is the root of the distance", {
        "(matched_boxes - target_boxes).abs()": "(matched_boxes - target_boxes).abs().sqrt()"}),
    ("train", "giou_loss", "the loss is squared", {"generalized_box_iou_loss": out(torch.square)}),
    ("train", "matcher", "the assignment is that of largest cost", {
        "linear_sum_assignment": arg(0, torch.neg)}),
    ("train", "stages", "a stage has the matching of the stage before", {"cost[s]": "cost[max(s - 1, 0)]"}),
    ("train", "total", "GIoU is not in the total", {
        "SetCriterion.weighted": arg(1, lambda losses: {k: x for k, x in losses.items() if k != "giou"})}),
    ("train", "box_counts", "the class loss is divided by the objects of this part", {
        "objects = sum(min(n, Q) for n in box_counts)": "objects = len(labels) / S"}),
    ("train", "proposals", "proposals are trained towards the last class", {
        'torch.zeros_like(t["labels"])': 'torch.full_like(t["labels"], 3)'}),
]
MISTAKES = [Mistake(file, *row) for files, *row in ROWS for file in files.split()]

def module_of(mistake):
    """Our file with the mistake in it, as a module."""
    path = path_of(mistake.file)
    text, wrappers = path.read_text(encoding="utf-8"), {}
    for name, new in mistake.patches.items():
        if callable(new):
            wrappers[name] = new
        else:
            assert text.count(name) == 1, f"{path.name} has {text.count(name)} times: {name}"
            text = text.replace(name, new)
    return module_from(text, mistake.file, wrappers)


def module_from(text, name, wrappers={}):  # noqa: B006
    """A module that is one of our files with another text, and with some names wrapped."""
    module = types.ModuleType(name)
    module.__file__ = str(path_of(name))
    exec(compile(text, f"another {name}.py", "exec"), module.__dict__)
    for place, wrap in wrappers.items():
        of, _, attribute = place.rpartition(".")
        owner = getattr(module, of) if of else module
        setattr(owner, attribute, wrap(getattr(owner, attribute)))
    module.again = lambda: module_from(text, name, wrappers)
    return module
