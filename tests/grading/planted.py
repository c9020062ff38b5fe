"""Mistakes that people make, as patches of our files: each turns one of them into a wrong one.

tests/grading/test_planted.py shows that every mistake is found by the mark it belongs to; tests/grading/first_difference.py compares
a student's numbers with those of our file with each mistake in it, and so can call many of them by name.
"""
import types
from collections import namedtuple

from tests.grading.files import path_of

# what: completes "the numbers are those of our file, but ..."; mark: the one that is lost, whatever else is
Mistake = namedtuple("Mistake", "file mark what old new")

SDPA = "out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)  # [B, M, Q, D/M]"
SCORES = """scores = q @ k.mT / q.shape[-1] ** 0.5
        if bias is not None:
            scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
        out = """

ATTENTION = [
    ("padding", "the mask is inverted: attention sees padding only",
     "attend = ~mask[:, None, None]", "attend = mask[:, None, None]"),
    ("padding", "attention does not use the padding mask", "if mask is not None:", "if False:"),
    ("attention", "the softmax is taken over queries instead of keys",
     SDPA, SCORES + "scores.softmax(2).nan_to_num() @ v"),
    ("attention", "scores are not divided by the square root of the head's width",
     "attn_mask=bias, dropout_p", "attn_mask=bias, scale=1.0, dropout_p"),
    ("attention", "scores are divided by the square root of the whole width, not of a head's",
     "attn_mask=bias, dropout_p", "attn_mask=bias, scale=(self.nheads * q.shape[-1]) ** -0.5, dropout_p"),
    ("attention", "heads take every M-th channel instead of neighbouring ones",
     "x.unflatten(-1, (self.nheads, -1)).transpose(1, 2)", "x.unflatten(-1, (-1, self.nheads)).movedim(-1, 1)"),
    ("training", "dropout of the attention weights stays on in eval mode",
     "self.dropout if self.training else 0.0", "self.dropout"),
]
POSITIONS = [
    ("positions", "positions encode x in the first half and y in the second",
     "torch.cat([sine(y, dim // 2), sine(x, dim // 2)], dim=-1).flatten(1, 2)",
     "torch.cat([sine(x, dim // 2), sine(y, dim // 2)], dim=-1).flatten(1, 2)"),
    ("positions", "the temperature of the sines is 20", "/ 10000 ** (2 * i / dim)", "/ 20 ** (2 * i / dim)"),
    ("positions", "coordinates are not multiplied by 2 pi", "[..., None] * 2 * math.pi / 10000", "[..., None] / 10000"),
    ("positions", "all sines come first, then all cosines, instead of in turn",
     "torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)", "torch.cat([angle.sin(), angle.cos()], dim=-1)"),
    ("padding", "positions are relative to the padded map, not to the image",
     "last = n.narrow(axis, -1, 1)", "last = torch.full_like(n.narrow(axis, -1, 1), n.shape[axis])"),
]
SELF_ATTENTION_V = "q, k, v = self.sa_proj(src + pos, src + pos, src)"


def planted(file, rows):
    return [Mistake(file, *row) for row in rows]


MISTAKES = planted("detr", ATTENTION + POSITIONS + [
    ("padding", "the decoder looks at padding", "self.cross_attn(q, k, v, mask)", "self.cross_attn(q, k, v)"),
    ("padding", "the padding mask is taken at the centres of cells", "F.interpolate(mask[:, None].float(), size=size)",
     'F.interpolate(mask[:, None].float(), size=size, mode="nearest-exact")'),
    ("positions", "positions are added to the values as well",
     SELF_ATTENTION_V, SELF_ATTENTION_V.replace("pos, src)", "pos, src + pos)")),
    ("positions", "keys of cross-attention have no positions", "memory + pos, memory)", "memory, memory)"),
    ("positions", "queries of the encoder's attention have no positions",
     "sa_proj(src + pos, src + pos", "sa_proj(src, src + pos"),
    ("backbone", "the feature map is viewed as tokens without being transposed",
     ".flatten(2).transpose(1, 2)  # [B, T, D]", ".flatten(2).reshape(len(images), -1, self.input_proj.out_channels)"),
    ("independence", "decoder self-attention is along the batch",
     "self.self_attn(q, k, v)))", "self.self_attn(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)))"),
    ("queries", "the queries' content starts as their position",
     "tgt = torch.zeros_like(query_pos)", "tgt = query_pos"),
    ("heads", "boxes are corners, not centre and size",
     "self.box_head(hs).sigmoid()}", "torchvision.ops.box_convert(self.box_head(hs).sigmoid(), 'cxcywh', 'xyxy')}"),
    ("heads", "boxes have no sigmoid", "self.box_head(hs).sigmoid()}", "self.box_head(hs)}"),
    ("heads", "the norm behind the last layer is missing", "self.norm(tgt)", "tgt"),
    ("heads", "only the last layer's output goes through the final norm",
     "self.norm(tgt))", "tgt if layer is not self.layers[-1] else self.norm(tgt))"),
    ("heads", "the feed-forward block has no residual", "self.norm(x + self.dropout(y))", "self.norm(self.dropout(y))"),
    ("heads", "the norm is taken before the residual is added",
     "self.norm(x + self.dropout(y))", "x + self.norm(self.dropout(y))"),
    ("attention", "queries do not look at each other",
     "self.norm1(tgt + self.dropout(self.self_attn(q, k, v)))", "self.norm1(tgt)"),
    ("gradients", "only the last layer's output carries a gradient",
     "outputs.append(self.norm(tgt))", "outputs.append(self.norm(tgt if layer is self.layers[-1] else tgt.detach()))"),
    ("start", "Xavier initialisation is missing in the decoder", "xavier_uniform(self.decoder)", "pass"),
]) + planted("conditional_detr", [
    ("spatial_query", "lambda is left out", "return t * p_s", "return p_s"),
    ("spatial_query", "the first layer has a lambda, too", "if first or self.scale is None:", "if self.scale is None:"),
    ("spatial_query", "lambda is added, not multiplied", "return t * p_s", "return t + p_s"),
    ("spatial_query", "lambda comes from this layer's self-attention, not from the layer before",
     "self.scale(after_self_attn if self.form", "self.scale(after_self_attn if True or self.form"),
    ("spatial_query", "content and position are concatenated across heads, not inside each",
     "torch.cat(pair, dim=-1).flatten(-2)", "torch.cat(pair, dim=-2).flatten(-2)"),
    ("spatial_query", "reference points are encoded with x first",
     "sine(xy[..., 1], dim // 2), sine(xy[..., 0], dim // 2)",
     "sine(xy[..., 0], dim // 2), sine(xy[..., 1], dim // 2)"),
    ("spatial_query", "reference points are encoded before the sigmoid", "sine_xy(s.sigmoid(), ", "sine_xy(s, "),
    ("spatial_query", "the first layer does not add positions to queries and keys",
     "c_q, c_k = c_q + self.ca_q_pos(query_pos), c_k + p_k", "pass"),
    ("spatial_query", "every layer adds the positions of keys to their content",
     "if self.first:", "c_k = c_k if self.first else c_k + p_k\n        if self.first:"),
    ("attention", "content and position are added instead of concatenated",
     "k = concat_heads(c_k, p_k, self.nheads)", "q, k = c_q + self.ca_q_sine(p_q), c_k + p_k"),
    ("references", "the reference point is added after the sigmoid",
     "boxes = self.box_head(hs) + F.pad(s, (0, 2))",
     "boxes = (self.box_head(hs).sigmoid() + F.pad(s.sigmoid() - 0.5, (0, 2))).clamp(0, 1).logit()"),
    ("references", "boxes are not relative to the reference point",
     "self.box_head(hs) + F.pad(s, (0, 2))", "self.box_head(hs)"),
    ("references", "width and height are relative to the reference point, too",
     "F.pad(s, (0, 2))", "s.repeat(1, 1, 2)"),
    ("references", "the sigmoid of the reference point is added in logit space",
     "F.pad(s, (0, 2))", "F.pad(s.sigmoid(), (0, 2))"),
    ("gradients", "the reference point is detached where it is encoded",
     "sine_xy(s.sigmoid(), ", "sine_xy(s.detach().sigmoid(), "),
    ("gradients", "the reference point is detached where boxes start at it",
     "F.pad(s, (0, 2))", "F.pad(s.detach(), (0, 2))"),
    ("gradients", "the reference point is detached",
     "s = self.reference(query_pos)", "s = self.reference(query_pos).detach()"),
    ("start", "the class head does not start at probability 0.01",
     "nn.init.constant_(self.class_head.bias, -math.log(99))", "pass"),
    ("start", "the last layer of the box head does not start at zero",
     "nn.init.zeros_(self.box_head.layers[-1].weight)", "pass"),
]) + planted("deformable_detr", [
    ("sampling", "offsets are divided by (H, W), not (W, H)",
     "[(w, h) for h, w in spatial_shapes]", "[(h, w) for h, w in spatial_shapes]"),
    ("sampling", "weights sum to 1 over the points of a level, not over all levels",
     "weights.softmax(-1).unflatten(-1, (L, K))", "weights.unflatten(-1, (L, K)).softmax(-1)"),
    ("sampling", "the softmax is taken over heads", "weights.softmax(-1).unflatten", "weights.softmax(-2).unflatten"),
    ("sampling", "levels are swapped: the offsets of the finest go to the coarsest",
     "weights = self.attention_weights(query).unflatten(-1, (M, L * K))",
     "offsets = offsets.flip(3)\n        weights = self.attention_weights(query).unflatten(-1, (M, L * K))"),
    ("sampling", "grid_sample has align_corners=True", "align_corners=False", "align_corners=True"),
    ("sampling", "locations reach grid_sample in [0, 1], not [-1, 1]", "grid = 2 * locations - 1", "grid = locations"),
    ("sampling", "offsets are (y, x), not (x, y)",
     "offsets = self.sampling_offsets(query).unflatten(-1, (M, L, K, 2))",
     "offsets = self.sampling_offsets(query).unflatten(-1, (M, L, K, 2)).flip(-1)"),
    ("sampling", "pixel centres lack the half pixel",
     "y = (torch.arange(h, device=valid_ratios.device) + 0.5) / h",
     "y = torch.arange(h, device=valid_ratios.device) / h"),
    ("padding", "values at padding are not set to zero", ".masked_fill(mask[..., None], 0)  # padding", "  # padding"),
    ("padding", "valid ratios are (y, x), not (x, y)",
     "valid[:, 0].mean(1), valid[:, :, 0].mean(1)", "valid[:, :, 0].mean(1), valid[:, 0].mean(1)"),
    ("padding", "the decoder's references are not scaled by the valid ratios",
     "reference[:, :, None] * ratios[:, None]", "reference[:, :, None].expand(-1, -1, ratios.shape[1], -1)"),
    ("positions", "positions have no half-pixel offset", "offset=0.5)", "offset=0)"),
    ("positions", "the level embedding is missing", "offset=0.5) + embed", "offset=0.5)"),
    ("sampling", "levels run from coarse to fine",
     "maps = self.feature_maps(images)", "maps = self.feature_maps(images)[::-1]"),
    ("references", "the reference is added before it is a logit",
     "F.pad(logit, (0, 4 - logit.shape[-1]))", "F.pad(reference, (0, 4 - logit.shape[-1]))"),
    ("references", "position and content of the queries are swapped",
     "query_pos, tgt = self.query_embed", "tgt, query_pos = self.query_embed"),
    ("refinement", "the reference is not detached between layers",
     "reference = boxes[-1].detach()", "reference = boxes[-1]"),
    ("refinement", "every layer starts at the first layer's box",
     "reference = boxes[-1].detach()", "reference = boxes[0].detach()"),
    ("refinement", "box_refine shares one head instead of one for each layer",
     "copies = copy.deepcopy if box_refine else", "copies = copy.deepcopy if two_stage else"),
    ("refinement", "offsets are relative to the whole width of the box, not the half",
     "reference[..., 2:] * 0.5, weights", "reference[..., 2:], weights"),
    ("refinement", "offsets are not divided by the number of points", "offsets / K * reference", "offsets * reference"),
    ("two_stage", "proposals are ranked by their best class, not by class 0",
     "logits[..., 0].topk(", "logits.amax(-1).topk("),
    ("two_stage", "anchors have one size on all levels", "0.05 * 2 ** level", "0.05"),
    ("two_stage", "anchors that leave the image count as valid",
     "invalid = mask | ~((anchor > 0.01) & (anchor < 0.99)).all(-1)", "invalid = mask"),
    ("two_stage", "the chosen boxes are not detached", ".detach().sigmoid()  # [B, Q, 4]", ".sigmoid()  # [B, Q, 4]"),
    ("start", "boxes start at half the image, not at sigmoid(-2)",
     "nn.init.constant_(self.box_head[0].layers[-1].bias[2:], -2.0)", "pass"),
    ("start", "points do not start as a star", "module.reset_parameters()", "pass"),
]) + planted("sam_detr", [
    ("aligner", "points are not kept inside the box", "xy[:, :, 0].tanh()", "xy[:, :, 0]"),
    ("aligner", "the old query does not re-weigh the content",
     "content = content * self.reweight_content(tgt).sigmoid().view_as(content)", "pass"),
    ("aligner", "re-weighting has no sigmoid", "self.reweight_content(tgt).sigmoid()", "self.reweight_content(tgt)"),
    ("aligner", "RoIAlign is shifted by half a cell", "aligned=True", "aligned=False"),
    ("aligner", "points reach over the whole width from the centre, not the half",
     "centre + points * wh / 2", "centre + points * wh"),
    ("aligner", "width and height of the map are swapped for the boxes",
     "valid_size(mask).repeat(1, 2)[:, None]", "valid_size(mask).flip(1).repeat(1, 2)[:, None]"),
    ("aligner", "all heads take the first head's point",
     "points, scale = xy[:, :, 0].tanh()", "points, scale = xy[:, :, 0, :1].expand_as(xy[:, :, 0]).tanh()"),
    ("aligner", "boxes go to RoIAlign as centre and size",
     'box_convert(reference, "cxcywh", "xyxy") * size', "reference * size"),
    ("padding", "boxes are relative to the padded map",
     "size = valid_size(mask).repeat(1, 2)[:, None]", "size = valid_size(mask & False).repeat(1, 2)[:, None]"),
    ("heads", "all layers share the first layer's heads",
     "enumerate(zip(self.layers, box_heads))", "enumerate(zip(self.layers, [box_heads[0]] * len(box_heads)))"),
    ("references", "every layer starts at the learned boxes again", "reference = boxes[-1].detach()", "pass"),
    ("references", "the reference is added without the logit", "reference.logit(eps=1e-5)", "reference"),
    ("gradients", "references are not detached", "reference = boxes[-1].detach()", "reference = boxes[-1]"),
    ("gradients", "sines of the points carry a gradient", "sine_xy(points.detach(), D)", "sine_xy(points, D)"),
    ("smca", "the Gaussian lacks the 1/8", "-squares.flatten(3) / 8", "-squares.flatten(3)"),
    ("smca", "the Gaussian is around corners of cells, not centres",
     "torch.arange(w, device=mask.device) + 0.5 -", "torch.arange(w, device=mask.device) -"),
    ("smca", "the scale of the Gaussian is not squared",
     "squares = y.square()[..., None] + x.square()[..., None, :]",
     "squares = (y.square() / scale[..., 1:])[..., None] + (x.square() / scale[..., :1])[..., None, :]"),
    ("multiscale", "decoder layers go from fine to coarse",
     "levels[max(len(levels) - 1 - i // 2, 0)]", "levels[min(i // 2, len(levels) - 1)]"),
]) + planted("sqr", [
    ("recollection", "a stage is fed three stages before it, not two",
     '"selective": slice(-2, None)', '"selective": slice(-3, None)'),
    ("recollection", "a stage is fed the stage before the last one only",
     '"selective": slice(-2, None)', '"selective": slice(-2, -1)'),
    ("recollection", "groups come out newest first",
     "for outputs in produced[SOURCES[source]] for group in outputs]",
     "for outputs in reversed(produced[SOURCES[source]]) for group in outputs]"),
    ("recollection", "recollection happens at inference, too", "if self.training:", "if True:"),
    ("recollection", "dense recollection forgets the initial query",
     '"dense": slice(None)', '"dense": slice(-3, None)'),
    ("recurrent", "the last stage is not fed its own output", '[(stages[-1], "none")] * self.recurrent', "[]"),
    ("refinement", "all groups are scored by the last stage's heads", "heads[stage]", "heads[-1]"),
    ("independence", "groups are taken from the batch in the wrong order",
     "x.expand(G, *x.shape).flatten(0, 1)", "x.expand(G, *x.shape).flatten(0, 1).flip(0)"),
]) + planted("train", [
    ("class_loss", "the weight 0.1 of \"no object\" is missing", "no_object_weight = 0.1", "no_object_weight = 1.0"),
    ("class_loss", "the class loss is a probability, as in the cost",
     'F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none")',
     "-weight[wanted.flatten()] * logits.flatten(0, 2).softmax(-1).gather(1, wanted.flatten()[:, None])[:, 0]"),
    ("class_loss", "the class loss is divided by the number of objects",
     "loss.view(S, -1).sum(1) / total_weight", "loss.view(S, -1).sum(1) / num_boxes"),
    ("class_loss", "alpha of the focal loss is 0.75",
     "sigmoid_focal_loss(logits, wanted, self.alpha", "sigmoid_focal_loss(logits, wanted, 1 - self.alpha"),
    ("matcher", "the class cost is a logarithm, as in the loss",
     "cost_class = -logits.softmax(-1)", "cost_class = -logits.log_softmax(-1)"),
    ("matcher", "the focal cost lacks its negative part", "cost_class = positive - negative", "cost_class = positive"),
    ("matcher", "the GIoU cost has the wrong sign", "cost_giou = -generalized", "cost_giou = generalized"),
    ("matcher", "the cost is computed on centre and size as if they were corners",
     '(box_convert(b, "cxcywh", "xyxy") for b in (boxes.flatten(0, 1), target_boxes))',
     "(b for b in (boxes.flatten(0, 1), target_boxes))"),
    ("matcher", "the weights of the cost are missing",
     'w["class"] * cost_class + w["l1"] * cost_l1 + w["giou"] * cost_giou', "cost_class + cost_l1 + cost_giou"),
    ("l1_loss", "the L1 loss is averaged over coordinates",
     "(matched_boxes - target_boxes).abs().sum(1)", "(matched_boxes - target_boxes).abs().mean(1)"),
    ("giou_loss", "the GIoU loss is computed on centre and size as if they were corners",
     '(box_convert(b, "cxcywh", "xyxy") for b in (matched_boxes, target_boxes))',
     "(b for b in (matched_boxes, target_boxes))"),
    ("stages", "all stages use the last stage's matching",
     "pairs = [linear_sum_assignment(cost[stage]) for cost in costs]",
     "pairs = [linear_sum_assignment(cost[-1]) for cost in costs]"),
    ("total", "losses of all stages are averaged",
     "self.weights[name] * loss.sum() for name, loss in losses.items())",
     "self.weights[name] * loss.mean() for name, loss in losses.items())"),
    ("empty", "the number of objects may be zero",
     "num_boxes = max(sum(box_counts), 1)", "num_boxes = sum(box_counts)"),
    ("proposals", "proposals keep the labels of their objects",
     '"labels": torch.zeros_like(t["labels"])', '"labels": t["labels"]'),
])


def module_of(mistake, file=None):
    """Our file with the mistake in it, as a module. `file` may be another one; None if it has no such text."""
    name = file or mistake.file
    path = path_of(name)
    text = path.read_text(encoding="utf-8")
    if text.count(mistake.old) != 1:
        assert file, (f"{path.name} has {text.count(mistake.old)} times what is to be changed so that {mistake.what}:\n"
                      f"{mistake.old}")
        return None
    module = types.ModuleType(name)
    module.__file__ = str(path)
    exec(compile(text.replace(mistake.old, mistake.new), f"{name}, {mistake.what}", "exec"), module.__dict__)
    return module
