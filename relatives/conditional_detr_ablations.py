"""Conditional DETR's ablations: its paper's spatial queries and reference points, and the step from DETR.

Not a file to diff: it imports its parent, conditional_detr.py, and replaces parts of it. With the defaults it
is the parent, with the same parameters under the same names. The official code has these defaults only.
With attention="detr", offsets=False and class_loss="softmax" it is detr.py, again with its names.

    attention      paper, table 4: "conditional" is the parent's decoder, "detr" that of detr.py, which adds
                   content and position, also in self-attention before their maps, without a spatial query
    offsets        table 4: True, box centres are relative to the reference point, and the box head's last
                   layer starts at zero; False, boxes and initial values are those of detr.py
    class_loss     table 4: "focal" C sigmoids, weight 2, every class starts at p = 0.01; "softmax" C + 1
                   logits with weight and initial values of detr.py, which changes the model's recipe

    spatial_query  paper, table 3: "csq" T from what the previous layer returned, "csq-i" from this layer's
                   self-attention, "csq-p" only p_s, "csq-t" only the diagonal of T, "csq-c" only f
    transform      paper, figure 5: what T in p_q = T p_s is: "diagonal" (lambda_q), "scalar", "identity",
                   "block" (a matrix for each head) or "full"
    reference      "query" an MLP of the query's position, "learned" a point each, "origin" (0, 0) as in DETR
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the parent's folder

import conditional_detr  # noqa: E402
import detr  # noqa: E402
from conditional_detr import (  # noqa: E402, F401
    MLP,
    OFFICIAL_NAMES,
    RECIPE,
    check_input,
    concat_heads,
    load_official,
    rename_official,
    resize_mask,
    sine_positions,
    sine_xy,
    xavier_uniform,
)


def check_choice(name, value, allowed):
    """Raises ValueError for a value that is not allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, it must be one of {', '.join(allowed)}")


class SpatialQuery(MLP):
    """T p_s, Eq. (4), or what replaces it: p_s and what T is made of, f, both [B, Q, D] -> p_q [B, Q, D]."""

    def __init__(self, hidden_dim, nheads, form, transform):
        block = hidden_dim // nheads  # 32 in the paper
        sizes = {"identity": 0, "scalar": 1, "diagonal": hidden_dim, "block": hidden_dim * block,
                 "full": hidden_dim * hidden_dim}
        size = {"csq-t": hidden_dim, "csq-p": 0, "csq-c": 0}.get(form, sizes[transform])
        super().__init__(hidden_dim, hidden_dim, max(size, 1), depth=2)  # T = FFN(f), Eq. (3)
        if size == 0:
            self.layers = None  # there is no T
        self.form = form
        self.width = hidden_dim if transform == "full" else block

    def forward(self, p_s, f, first):
        if self.form == "csq-c":
            return f
        if self.form == "csq-t":
            return super().forward(f)
        if first or self.layers is None:  # in layer 1 content is still zero
            return p_s
        t = super().forward(f)  # [B, Q, size of T]
        if t.shape[-1] <= p_s.shape[-1]:
            return t * p_s  # lambda_q * p_s
        t = t.unflatten(-1, (-1, self.width, self.width))  # [B, Q, blocks, width, width]
        p_s = p_s.unflatten(-1, (-1, self.width, 1))  # [B, Q, blocks, width, 1]
        return (t @ p_s).flatten(2)  # [B, Q, D]


class ReferencePoints(nn.Module):
    """s without a network: query_pos [B, Q, D] -> [B, Q, 2] before the sigmoid, learned or zero."""

    def __init__(self, num_queries, learned):
        super().__init__()
        if learned:
            self.points = nn.Parameter(torch.randn(num_queries, 2))
        else:
            self.register_buffer("points", torch.zeros(num_queries, 2), persistent=False)

    def forward(self, query_pos):
        return self.points.expand(query_pos.shape[0], -1, -1)  # [B, Q, 2]


class DecoderLayer(conditional_detr.DecoderLayer):
    """The parent's layer, which makes p_q itself: "csq-i" needs what this layer's self-attention returns."""

    def forward(self, tgt, query_pos, p_s, query_scale, memory, pos, mask):
        f = tgt
        q = self.sa_q_content(tgt) + self.sa_q_pos(query_pos)  # [B, Q, D]
        k = self.sa_k_content(tgt) + self.sa_k_pos(query_pos)  # [B, Q, D]
        v = self.sa_v(tgt)  # [B, Q, D]
        tgt = self.norm1(tgt + self.dropout(self.self_attn(q, k, v)))

        if query_scale.form == "csq-i":
            f = tgt
        p_q = query_scale(p_s, f, self.first)  # [B, Q, D]
        c_q, c_k, v = self.ca_q_content(tgt), self.ca_k_content(memory), self.ca_v(memory)
        p_k = self.ca_k_pos(pos)  # [B, T, D]
        if self.first:
            c_q = c_q + self.ca_q_pos(query_pos)
            c_k = c_k + p_k
        q = concat_heads(c_q, self.ca_q_sine(p_q), self.nheads)  # [B, Q, 2D]
        k = concat_heads(c_k, p_k, self.nheads)  # [B, T, 2D]
        tgt = self.norm2(tgt + self.dropout(self.cross_attn(q, k, v, mask)))
        return self.ffn(tgt)


class Decoder(conditional_detr.Decoder):
    """The parent's decoder around these layers: query_pos [B, Q, D], memory [B, T, D] -> [S, B, Q, D]."""

    def __init__(self, num_layers, hidden_dim, nheads, dim_feedforward, dropout, form, transform):
        super().__init__(num_layers, hidden_dim, nheads, dim_feedforward, dropout)
        self.layers = nn.ModuleList(
            DecoderLayer(hidden_dim, nheads, dim_feedforward, dropout, first=(i == 0))
            for i in range(num_layers))
        if num_layers == 1:
            transform = "identity"  # layer 1 has no T
        self.query_scale = SpatialQuery(hidden_dim, nheads, form, transform)

    def forward(self, query_pos, p_s, memory, pos, mask):
        tgt = torch.zeros_like(query_pos)
        outputs = []
        for layer in self.layers:
            tgt = layer(tgt, query_pos, p_s, self.query_scale, memory, pos, mask)
            outputs.append(self.norm(tgt))
        return torch.stack(outputs)  # [S, B, Q, D]


class ConditionalDETRAblations(conditional_detr.ConditionalDETR):
    """Conditional DETR with another decoder, other reference points, boxes or classes."""

    def __init__(self, num_classes, spatial_query="csq", transform="diagonal", reference="query",
                 attention="conditional", offsets=True, class_loss="focal", **options):
        super().__init__(num_classes, **options)
        check_choice("spatial_query", spatial_query, ("csq", "csq-i", "csq-p", "csq-t", "csq-c"))
        check_choice("transform", transform, ("diagonal", "scalar", "identity", "block", "full"))
        check_choice("reference", reference, ("query", "learned", "origin"))
        check_choice("attention", attention, ("conditional", "detr"))
        check_choice("class_loss", class_loss, ("focal", "softmax"))
        self.conditional, self.offsets = attention == "conditional", offsets
        has_points = offsets or self.conditional and spatial_query not in ("csq-t", "csq-c")
        for name, changed, needed in [
                ("spatial_query", spatial_query != "csq", self.conditional),
                ("transform", transform != "diagonal", self.conditional),
                ("reference", reference != "query", has_points)]:
            if changed and not needed:
                raise ValueError(f"{name} is without effect in this model, leave it out")

        num_queries, hidden_dim = self.query_embed.weight.shape
        parent, layer = self.decoder, self.decoder.layers[0]
        sizes = (len(parent.layers), hidden_dim, layer.nheads, layer.ffn.linear1.out_features,
                 layer.dropout.p)
        self.decoder = Decoder(*sizes, spatial_query, transform) if self.conditional else detr.Decoder(*sizes)
        xavier_uniform(self.decoder)
        if not has_points:
            self.reference_head = None
        elif reference != "query":
            self.reference_head = ReferencePoints(num_queries, learned=reference == "learned")
            xavier_uniform(self.reference_head)
        if not offsets:
            self.box_head.layers[-1].reset_parameters()  # no longer zero
        if class_loss == "softmax":
            self.recipe = {**RECIPE, **{key: detr.RECIPE[key] for key in ("class_loss", "w_class")}}
            self.class_head = nn.Linear(hidden_dim, num_classes + 1)  # the last class means "no object"

    def forward(self, images, mask):
        """images [B, 3, H, W], mask [B, H, W] -> {"logits": [S, B, Q, C or C+1], "boxes": [S, B, Q, 4]}."""
        check_input(images, mask)
        features = self.input_proj(self.backbone(images)[-1])  # [B, D, h, w]
        mask = resize_mask(mask, features.shape[-2:])  # [B, h, w]
        pos = sine_positions(mask, features.shape[1], offset=0, temperature=self.temperature)  # [B, T, D]
        mask = mask.flatten(1)  # [B, T]

        src = features.flatten(2).transpose(1, 2)  # [B, T, D]
        memory = self.encoder(src, pos, mask)  # [B, T, D]
        query_pos = self.query_embed.weight.expand(images.shape[0], -1, -1)  # [B, Q, D]
        s = p_s = None
        if self.reference_head is not None:
            s = self.reference_head(query_pos)  # [B, Q, 2], before the sigmoid
            p_s = sine_xy(s.sigmoid(), query_pos.shape[-1], self.temperature)  # [B, Q, D]
        places = (query_pos, p_s) if self.conditional else (query_pos,)
        hs = self.decoder(*places, memory, pos, mask)  # [S, B, Q, D]
        boxes = self.box_head(hs)  # [S, B, Q, 4]
        if self.offsets:
            boxes = boxes + F.pad(s, (0, 2))  # Eq. (1)
        return {"logits": self.class_head(hs), "boxes": boxes.sigmoid()}


def build(num_classes, **options):
    """The model; options are the arguments of the class above and those of conditional_detr.build."""
    return ConditionalDETRAblations(num_classes, **options)


if __name__ == "__main__":
    model = build(num_classes=91, pretrained_backbone=False)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
