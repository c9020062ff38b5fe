"""Mistakes that students make, planted into our files: each mark loses its own, and no other (test_planted.py).

A mistake replaces functions and methods by name, or where that is not possible a short piece of text. A row is
(files, mark, what is wrong, {name: wrapper of what has this name} or {old text: new text}).
"""
import copy
import types
from collections import namedtuple

import torch
import torch.nn.functional as F
from torchvision.ops import box_convert

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
    """Something is done to self after the call, which is that of __init__."""
    def wrap(f):
        def wrapped(self, *args, **how):
            f(self, *args, **how)
            with torch.no_grad():
                action(self)

        return wrapped

    return wrap


def option(**values):
    return lambda f: lambda num_classes, **options: f(num_classes, **{**options, **values})


def predictions(**changes):
    """Entries of the output are changed."""
    return out(lambda found: {key: changes.get(key, lambda x: x)(x) for key, x in found.items()})


def attention(weights=lambda s, d: (s / d ** 0.5).softmax(-1), split_q=None):
    """Another Attention.forward."""
    def forward(self, q, k, v, mask=None, bias=None):
        def split(x):
            return x.unflatten(-1, (self.nheads, -1)).transpose(1, 2)

        q, k, v = (split_q or split)(q, *([self.nheads] if split_q else [])), split(k), split(v)
        scores = q @ k.mT
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None], -torch.inf)
        if bias is not None:
            scores = scores + bias
        return self.out_proj((weights(scores, q.shape[-1]).nan_to_num() @ v).transpose(1, 2).flatten(2))

    return lambda f: forward


def cross_attention_first(f):
    def forward(self, tgt, query_pos, memory, pos, mask):
        q, k, v = self.ca_proj(tgt + query_pos, memory + pos, memory)
        tgt = self.norm1(tgt + self.dropout(self.cross_attn(q, k, v, mask)))
        q, k, v = self.sa_proj(tgt + query_pos, tgt + query_pos, tgt)
        return self.ffn(self.norm2(tgt + self.dropout(self.self_attn(q, k, v))))

    return forward


def feed_forward(block):
    return lambda f: lambda self, x: block(self, x, lambda x: self.linear2(self.dropout(self.linear1(x).relu())))


def accepts_unknown(f):
    def load(model, checkpoint):
        try:
            f(model, checkpoint)
        except RuntimeError as error:
            if "Missing" in str(error):
                raise

    return load


def loses(part):
    def wrap(f):
        def load(model, checkpoint):
            kept = copy.deepcopy(model.get_submodule(part).state_dict())
            f(model, checkpoint)
            model.get_submodule(part).load_state_dict(kept)

        return load

    return wrap


def second_scale(f):
    """T twice: each copy is loaded from the same entries."""
    def load(model, checkpoint):
        second = model.__dict__["_modules"].pop("second")
        f(model, checkpoint)
        second.load_state_dict(model.decoder.query_scale.state_dict())
        model.second = second

    return load


def kept(f):
    found = {}
    return lambda mask, *args, **how: found.setdefault(mask.shape, f(mask, *args, **how))


# ---- The mistakes ------------------------------------------------------------------------------------------
DETR, COND, DEFORMABLE, SAM, SQR = "detr", "conditional_detr", "deformable_detr", "sam_detr", "sqr"
TOKENS, POINTS = f"{DETR} {COND} {SAM}", f"{DEFORMABLE} {SQR}"
AMONG = "sa_proj(tgt + query_pos, tgt + query_pos, tgt)"
LOGIT = "reference.logit(eps=1e-5)"
ROWS = [
    # What every file has
    (DETR, "shapes", "evaluation returns the last stage only", {
        "DETR.forward": lambda f: lambda self, *a: {k: x if self.training else x[-1:] for k, x in f(self, *a).items()}}),
    (COND, "shapes", "stages are a list, not a tensor", {"ConditionalDETR.forward": predictions(logits=list)}),
    (SAM, "shapes", "there are always 100 queries", {"build": option(num_queries=100)}),
    (DEFORMABLE, "shapes", "projections have no GroupNorm", {"nn.GroupNorm(32, hidden_dim)": "nn.Identity()"}),
    (COND, "shapes", "T is not shared between layers", {
        "ConditionalDETR.__init__": then(lambda self: setattr(self, "second", copy.deepcopy(self.decoder.query_scale))),
        "load_official": second_scale}),
    (f"{TOKENS} {POINTS}", "independence", "positions are kept by the size of the map", {"sine_positions": kept}),
    (DETR, "independence", "the mask is inverted in place", {
        "DETR.forward": arg(2, lambda mask: (mask.clone(), mask.logical_not_())[0])}),
    (COND, "independence", "features lack their mean over the batch", {
        "Backbone.forward": out(lambda maps: [x - x.mean(0, keepdim=True) for x in maps])}),
    (DETR, "loading", "query embeddings are not loaded", {"load_official": loses("query_embed")}),
    (COND, "loading", "the first convolution is not loaded", {"load_official": loses("backbone.body.conv1")}),
    (f"{SAM} {POINTS}", "loading", "unknown entries are ignored", {"load_official": accepts_unknown}),
    (DETR, "start", "the class head starts at probability 0.01", {
        "DETR.__init__": then(lambda self: self.class_head.bias.fill_(-4.6))}),
    (COND, "start", "queries start at zero", {"ConditionalDETR.__init__": then(lambda self: self.query_embed.weight.zero_())}),
    (DEFORMABLE, "start", "level embeddings start at zero", {
        "DeformableDETR.__init__": then(lambda self: self.level_embed.zero_())}),
    (SQR, "start", "weights of points start at random", {
        "nn.init.zeros_(self.attention_weights.weight)": "nn.init.xavier_uniform_(self.attention_weights.weight)"}),
    (SAM, "start", "biases of attention's output start at 1", {
        "Attention.__init__": then(lambda self: self.out_proj.bias.fill_(1))}),
    (f"{DETR} {SQR}", "backbone", "colours are in the order BGR", {"Backbone.forward": arg(1, lambda x: x.flip(1))}),
    (COND, "backbone", "features are multiplied by the root of the width", {
        "Encoder.forward": arg(1, lambda x: x * x.shape[-1] ** 0.5)}),
    (SAM, "backbone", "images are normalised a second time", {"Backbone.forward": arg(1, lambda x: (x - 0.45) / 0.22)}),
    (DEFORMABLE, "backbone", "each channel is a group of its own", {
        "nn.GroupNorm(32, hidden_dim)": "nn.GroupNorm(hidden_dim, hidden_dim)"}),
    (DEFORMABLE, "backbone", "projected features go through a ReLU", {"maps = [proj(feature)": "maps = [proj(feature).relu()"}),
    (SQR, "backbone", "the last level is made of a blurred C5", {
        "features[-1] if len(maps)": "F.avg_pool2d(features[-1], 3, 1, 1) if len(maps)"}),
    (f"{DETR} {SAM}", "padding", "scores of padding are -1, not minus infinity", {
        "Attention.forward": lambda f: lambda self, q, k, v, mask=None, bias=None: f(
            self, q, k, v, None, bias if mask is None else -mask[:, None, None].float() + (0 if bias is None else bias))}),
    (COND, "padding", "all images have the first one's mask", {
        "Attention.forward": arg(4, lambda mask: mask[:1].expand_as(mask))}),
    (f"{DETR} {DEFORMABLE}", "padding", "a cell is padding as soon as one of its pixels is", {
        "resize_mask": lambda f: lambda mask, size: F.adaptive_max_pool2d(mask.float(), size).bool()}),
    (POINTS, "padding", "both valid ratios are that of the height", {"valid_ratio": out(lambda x: x[:, 1:].expand_as(x))}),
    (DEFORMABLE, "padding", "centres of pixels are relative to the padded map", {"pixel_centres": arg(1, torch.ones_like)}),
    (f"{DETR} {POINTS}", "positions", "keys of attention among queries have no positions", {
        AMONG: "sa_proj(tgt + query_pos, tgt, tgt)"}),
    (f"{COND} {SAM}", "positions", "keys of attention among queries have no positions", {
        "self.sa_k_content(tgt) + self.sa_k_pos(query_pos)": "self.sa_k_content(tgt)"}),
    (f"{DETR} {COND}", "positions", "cells are counted at their centres", {
        "sine_positions": lambda f: lambda mask, dim, offset, **how: f(mask, dim, 0.5, **how)}),
    (f"{DETR} {POINTS}", "positions", "the exponent of the temperature is half as large", {
        "sine": lambda f: lambda x, dim, temperature=10000: f(x, dim, temperature ** 0.5)}),
    (DETR, "positions", "positions are added once, to the encoder's input", {
        "Encoder.forward": lambda f: lambda self, src, pos, mask: f(self, src + pos, pos * 0, mask)}),
    (COND, "positions", "both halves encode y", {"sine_positions": out(lambda x: x.chunk(2, -1)[0].repeat(1, 1, 2))}),
    (DEFORMABLE, "positions", "all levels have the first level's embedding", {
        "zip(masks, self.level_embed)": "zip(masks, self.level_embed[:1].expand_as(self.level_embed))"}),
    (SAM, "positions", "keys of cross-attention have no positions", {"self.ca_k_sine(pos)": "self.ca_k_sine(pos * 0)"}),
    (DETR, "attention", "cross-attention comes before attention among queries", {"DecoderLayer.forward": cross_attention_first}),
    (f"{TOKENS} {POINTS}", "attention", "the softmax is over heads", {
        "Attention.forward": attention(lambda s, d: (s / d ** 0.5).softmax(1))}),
    (f"{TOKENS} {DEFORMABLE}", "attention", "queries are split into heads without being transposed", {
        "Attention.forward": attention(split_q=lambda x, M: x.reshape(len(x), M, x.shape[1], -1))}),
    (f"{DETR} {SQR}", "attention", "scores are divided by the width, not by its root", {
        "Attention.forward": arg(1, lambda q: q / 8 ** 0.5)}),
    (COND, "attention", "tokens see only those before them", {
        "Attention.forward": attention(lambda s, d: (s / d ** 0.5 + torch.full_like(s, -torch.inf).triu(1)).softmax(-1))}),
    (DETR, "attention", "cross-attention is not added to its input", {
        "tgt + self.dropout(self.cross_attn": "self.dropout(self.cross_attn"}),
    (f"{COND} {SAM}", "attention", "attention among queries is not added to its input", {
        "tgt + self.dropout(self.self_attn(q, k, v))": "self.dropout(self.self_attn(q, k, v))"}),
    (COND, "attention", "the scale of cross-attention forgets that heads are twice as wide", {
        "Attention.forward": lambda f: lambda self, q, k, v, *a: f(self, q * (q.shape[-1] / v.shape[-1]) ** 0.5, k, v, *a)}),
    (DETR, "attention", "there are always 8 heads", {"build": option(nheads=8)}),
    (DETR, "queries", "contents start as the mean of the image", {
        "torch.zeros_like(query_pos)": "torch.zeros_like(query_pos) + memory.mean(1, keepdim=True)"}),
    (DETR, "queries", "query embeddings are read column by column", {
        "self.query_embed.weight.expand": "self.query_embed.weight.T.reshape_as(self.query_embed.weight).expand"}),
    (DETR, "queries", "each layer starts from content plus position", {"layer(tgt, query_pos": "layer(tgt + query_pos, query_pos"}),
    (DETR, "heads", "boxes begin at their top left corner", {
        "DETR.forward": predictions(boxes=lambda b: torch.cat([b[..., :2] - b[..., 2:] / 2, b[..., 2:]], -1).clamp(0, 1))}),
    (f"{COND} {DEFORMABLE}", "heads", "the box head has a ReLU too few", {
        "MLP.forward": lambda f: lambda self, x: self.layers[-1](self.layers[-2](x)) if len(self.layers) == 2 else
        self.layers[2](self.layers[1](self.layers[0](x).relu()))}),
    (f"{SAM} {SQR}", "heads", "the feed-forward block is normalised before, not after", {
        "FeedForward.forward": feed_forward(lambda self, x, y: x + self.dropout(y(self.norm(x))))}),
    (DETR, "heads", "logits are divided by the root of the width", {
        "DETR.forward": predictions(logits=lambda x: x / 5.7)}),
    (COND, "heads", "the first two norms of a decoder layer are exchanged", {
        "tgt = self.norm1(tgt": "tgt = self.norm_2(tgt", "tgt = self.norm2(tgt": "tgt = self.norm1(tgt",
        "self.norm_2(tgt": "self.norm2(tgt"}),
    (SAM, "heads", "the box heads are used in reverse order", {"zip(self.layers, box_heads)": "zip(self.layers, box_heads[::-1])"}),
    # Training and gradients
    (DETR, "training", "the rate of dropout is fixed", {"build": option(dropout=0.1)}),
    (f"{COND} {POINTS}", "training", "the rate of dropout in feed-forward blocks is fixed", {
        "FeedForward.__init__": lambda f: lambda self, d, hidden, p: f(self, d, hidden, 0.1)}),
    (DETR, "training", "image features go through a dropout", {
        "Encoder.forward": lambda f: lambda self, src, *a: f(self, self.layers[0].dropout(src), *a)}),
    (f"{SAM} {DEFORMABLE}", "training", "dropout comes after the norm, not before the residual", {
        "FeedForward.forward": feed_forward(lambda self, x, y: self.dropout(self.norm(x + y(x))))}),
    (f"{DETR} {SAM} {SQR}", "training", "the batch norm is live", {
        "FrozenBatchNorm2d.forward": lambda f: lambda self, x: F.batch_norm(
            x, None, None, self.weight, self.bias, True) if self.training else f(self, x)}),
    (COND, "training", "the first stage of the backbone is trained", {
        "Backbone.__init__": then(lambda self: self.body.layer1.requires_grad_(True))}),
    (DETR, "training", "the recipe has the focal loss", {"DETR.recipe": lambda r: {**r, "class_loss": "focal"}}),
    (SAM, "training", "the recipe has another weight for GIoU", {"SAMDETR.recipe": lambda r: {**r, "w_giou": 5}}),
    (DEFORMABLE, "training", "weights of points go through a dropout", {
        "MSDeformAttn.locations_and_weights": lambda f: lambda self, *a: [
            F.dropout(x, 0.1, self.training) if i else x for i, x in enumerate(f(self, *a))]}),
    (DETR, "gradients", "boxes train only their head", {"MLP.forward": arg(1, torch.Tensor.detach)}),
    (COND, "gradients", "each layer trains only itself", {"DecoderLayer.forward": arg(1, torch.Tensor.detach)}),
    (POINTS, "gradients", "reference points are not trained", {
        "self.reference_points(query_pos).sigmoid()": "self.reference_points(query_pos).detach().sigmoid()"}),
    (SAM, "gradients", "regions do not train the encoder", {"roi_align(feature_map,": "roi_align(feature_map.detach(),"}),
    # Conditional DETR
    (COND, "spatial_query", "lambda comes from query positions", {"self.query_scale(tgt)": "self.query_scale(query_pos)"}),
    (COND, "spatial_query", "lambda is squared", {"self.query_scale(tgt) * p_s": "self.query_scale(tgt) ** 2 * p_s"}),
    (COND, "spatial_query", "in queries position comes before content", {
        "concat_heads(c_q, self.ca_q_sine(p_q)": "concat_heads(self.ca_q_sine(p_q), c_q"}),
    (COND, "spatial_query", "the first layer adds no positions to keys", {"            c_k = c_k + p_k\n": ""}),
    (COND, "spatial_query", "reference points are encoded from -1 to 1", {"sine_xy(s.sigmoid()": "sine_xy(2 * s.sigmoid() - 1"}),
    (COND, "references", "reference points stay away from the border", {
        "s = self.reference(query_pos)": "s = self.reference(query_pos).clamp(-2, 2)"}),
    (COND, "references", "boxes are relative to (y, x)", {"F.pad(s, (0, 2))": "F.pad(s.flip(-1), (0, 2))"}),
    (COND, "gradients", "lambda does not train the layer before", {"self.query_scale(tgt)": "self.query_scale(tgt.detach())"}),
    # Deformable DETR and SQR
    (POINTS, "sampling", "weights sum to 1 on each level", {
        "MSDeformAttn.locations_and_weights": out(lambda lw: (lw[0], lw[1] / lw[1].sum(-1, keepdim=True)))}),
    (DEFORMABLE, "sampling", "offsets are in pixels of the first level", {"offsets / size[:, None]": "offsets / size[:1, None]"}),
    (DEFORMABLE, "sampling", "points stay inside of the image", {"deformable_sampling": arg(2, lambda x: x.clamp(0, 1))}),
    (SQR, "sampling", "all heads read the first head's values", {
        "deformable_sampling": arg(0, lambda v: v[:, :, :1].expand_as(v))}),
    (DEFORMABLE, "sampling", "maps are read column by column", {
        "reshape(B * M, -1, h, w)": "reshape(B * M, -1, w, h).transpose(2, 3)"}),
    (POINTS, "sampling", "weights of levels and points are mixed up", {
        "deformable_sampling": arg(3, lambda w: w.transpose(-1, -2).reshape(w.shape))}),
    (DEFORMABLE, "sampling", "offsets go through a tanh", {
        "self.sampling_offsets(query)": "self.sampling_offsets(query).tanh()"}),
    (SQR, "sampling", "heads are merged channel by channel", {
        "deformable_sampling": out(lambda x: x.unflatten(-1, (4, -1)).transpose(2, 3).flatten(2))}),
    (f"{POINTS} {SAM}", "references", "references are clamped to 0.05 from the border", {
        LOGIT: "reference.clamp(0.05, 0.95).logit()"}),
    (DEFORMABLE, "references", "reference points come from the content", {
        "self.reference_points(query_pos)": "self.reference_points(tgt)"}),
    (SQR, "references", "boxes are relative to x only", {"F.pad(logit, (0, 4 - logit.shape[-1]))": "F.pad(logit[..., :1], (0, 3))"}),
    (POINTS, "refinement", "points are relative to (height, width)", {
        "reference[..., 2:] * 0.5": "reference[..., 2:].flip(-1) * 0.5"}),
    (DEFORMABLE, "refinement", "a layer has the box head of the layer before", {
        "zip(self.layers, box_heads)": "zip(self.layers, [box_heads[0], *box_heads])"}),
    (POINTS, "refinement", "refined boxes stay between 0.1 and 0.9", {
        "reference = boxes[-1].detach()": "reference = boxes[-1].detach().clamp(0.1, 0.9)"}),
    (DEFORMABLE, "two_stage", "the worst proposals become queries", {"topk(count, dim=1)": "topk(count, dim=1, largest=False)"}),
    (SQR, "two_stage", "proposed boxes are corners", {
        '"boxes": boxes_logit.sigmoid()': '"boxes": torchvision.ops.box_convert(boxes_logit.sigmoid(), "cxcywh", "xyxy")'}),
    (POINTS, "two_stage", "queries encode (y, x, h, w) of their proposal", {
        "sine(reference,": "sine(reference[..., [1, 0, 3, 2]],"}),
    (DEFORMABLE, "two_stage", "proposing tokens are not normalised", {"self.enc_output_norm(self.enc_output(": "(self.enc_output("}),
    (SQR, "recollection", "dense recollection takes every other stage", {'"dense": slice(None)': '"dense": slice(-1, None, -2)'}),
    (SQR, "recollection", "recollection is in evaluation, not in training", {"if self.training else \"none\"": "if not self.training else \"none\""}),
    (SQR, "recollection", "the initial query is fed to the first stage only", {
        "fed = sum(produced[SOURCES[source]], [])": "fed = [q for q in sum(produced[SOURCES[source]], []) if q or not plan]"}),
    (SQR, "recurrent", "the last stage is fed its own output twice", {
        'stages.append((stages[-1][0], "none"))': 'stages += [(stages[-1][0], "none")] * 2'}),
    (SQR, "recurrent", "the first stage runs at inference", {"[stages[-1]] * self.num_stages": "[stages[0]] * self.num_stages"}),
    # SAM-DETR
    (SAM, "aligner", "regions are sampled with align_corners=True", {
        "points.view(B * Q, 1, -1, 2), align_corners=False": "points.view(B * Q, 1, -1, 2), align_corners=True"}),
    (SAM, "aligner", "points are (y, x)", {"xy[:, :, 0].tanh()": "xy[:, :, 0].tanh().flip(-1)"}),
    (SAM, "aligner", "the weights of content and position are exchanged", {
        "self.reweight_content(tgt)": "self.reweight_(tgt)", "self.reweight_position(tgt)": "self.reweight_content(tgt)",
        "self.reweight_(tgt)": "self.reweight_position(tgt)"}),
    (SAM, "aligner", "regions are twice as large as their boxes", {
        "SemanticsAligner.regions": arg(1, lambda box: box * torch.tensor([1, 1, 2, 2]))}),
    (SAM, "aligner", "positions are those inside the box", {
        "sine_xy(points.detach(), D)": "sine_xy(((points - centre) / wh + 0.5).detach(), D)"}),
    (SAM, "smca", "the Gaussian is upside down", {"gaussian_bias": out(torch.neg)}),
    (SAM, "smca", "scales are (y, x)", {"gaussian_bias": arg(1, lambda x: x.flip(-1))}),
    (SAM, "smca", "points are relative to the padded map", {"gaussian_bias": arg(2, torch.zeros_like)}),
    # train.py
    ("train", "pairing", "objects are taken in their own order", {
        "torch.stack([s_index, b_index, query, target])": "torch.stack([s_index, b_index, query, target.sort().values])"}),
    ("train", "pairing", "all images have the first image's objects", {"counts.cumsum(0)[image]": "counts.cumsum(0)[image * 0]"}),
    ("train", "class_loss", "labels are those of other objects", {
        'torch.cat([t["labels"] for t in targets])[row]': 'torch.cat([t["labels"] for t in targets])[row.flip(0)]'}),
    ("train", "class_loss", "the weight of \"no object\" is not in the divisor", {
        "(objects + self.no_object_weight * others)": "(objects + others)"}),
    ("train", "class_loss", "the focal loss has no exponent", {"self.alpha, self.gamma)": "self.alpha, 0)"}),
    ("train", "empty", "a batch without objects has no class loss", {
        "self.alpha, self.gamma)": "self.alpha, self.gamma) * (len(labels) > 0)"}),
    ("train", "empty", "images without objects have no class loss", {
        "self.alpha, self.gamma)": "self.alpha, self.gamma) * torch.tensor([n > 0 for n in box_counts])[:, None, None]"}),
    ("train", "l1_loss", "the loss is that of corners", {"        if self.corner_l1:\n            matched": "        if True:\n            matched"}),
    ("train", "l1_loss", "the loss is smooth", {
        "(matched_boxes - target_boxes).abs().sum(1)": "F.smooth_l1_loss(matched_boxes, target_boxes, reduction='none').sum(1)"}),
    ("train", "giou_loss", "the loss is 1 - IoU", {
        "generalized_box_iou_loss": out(lambda x: x ** 2)}),
    ("train", "matcher", "the assignment is that of largest cost", {"linear_sum_assignment": arg(0, torch.neg)}),
    ("train", "matcher", "the cost has no GIoU", {' + w["giou"] * cost_giou': ""}),
    ("train", "matcher", "the class cost is that of the first class", {"softmax(-1)[..., labels]": "softmax(-1)[..., labels * 0]"}),
    ("train", "stages", "a stage has the matching of the stage before", {"cost[stage]": "cost[max(stage - 1, 0)]"}),
    ("train", "total", "GIoU is not in the total", {
        "SetCriterion.weighted": arg(1, lambda losses: {k: x for k, x in losses.items() if k != "giou"})}),
    ("train", "box_counts", "the class loss is divided by the objects of this part", {
        "objects = sum(min(n, Q) for n in box_counts)": "objects = len(labels) // S"}),
    ("train", "proposals", "proposals count half", {"total + self.weighted(proposal)": "total + 0.5 * self.weighted(proposal)"}),
    ("train", "proposals", "proposals are trained towards the last class", {
        'torch.zeros_like(t["labels"])': 'torch.full_like(t["labels"], 3)'}),
]
MISTAKES = [Mistake(file, *row) for files, *row in ROWS for file in files.split()]
del box_convert


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
