"""SAM-DETR's decoder after Deformable DETR's encoder: what the paper calls multi-scale.

Not a file to diff: it imports its parents, sam_detr.py and deformable_detr.py, and replaces three parts of
the first: a projection for each of C3, C4, C5, the encoder, and a decoder whose layers see one level each.
The option smca is the parent's; input_norm is always on. The official code stops at 6 decoder layers.
"""
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the parents' folder

import deformable_detr  # noqa: E402
import sam_detr  # noqa: E402
from sam_detr import (  # noqa: E402, F401
    OFFICIAL_NAMES,
    RECIPE,
    check_input,
    load_official,
    rename_official,
    resize_mask,
    sine_positions,
    sine_xy,
    xavier_uniform,
)

LAPTOP = dict(last_stage=3)  # two levels, C3 and C4


class Decoder(sam_detr.Decoder):
    """The parent's layers, from coarse to fine: L levels of (memory, pos, mask) instead of one of each."""

    def forward(self, reference, box_heads, levels):
        B, Q, D = *reference.shape[:2], levels[0][0].shape[-1]
        tgt = reference.new_zeros(B, Q, D)
        outputs, boxes = [], []
        for i, (layer, box_head) in enumerate(zip(self.layers, box_heads)):
            # Two layers on the coarsest level, two on the next, the rest on the finest
            memory, pos, mask = levels[max(len(levels) - 1 - i // 2, 0)]
            query_pos = sine_xy(reference[..., :2].detach(), D, self.temperature)  # [B, Q, D]
            tgt = layer(tgt, query_pos, reference, memory, pos, mask)
            outputs.append(tgt)
            boxes.append((box_head(tgt) + reference.logit(eps=1e-5)).sigmoid())
            reference = boxes[-1].detach()
        return torch.stack(outputs), torch.stack(boxes)


class SAMDETRMultiscale(sam_detr.SAMDETR):
    """SAM-DETR on strides 8, 16, 32: images [B, 3, H, W] -> S times Q classes and boxes for each."""

    def __init__(self, num_classes, smca=False, **options):
        super().__init__(num_classes, smca=smca, **options)
        channels, hidden_dim = self.backbone.channels, self.class_head[0].in_features
        layer = self.decoder.layers[0]
        nheads, dim_feedforward, dropout = layer.nheads, layer.ffn.linear1.out_features, layer.dropout.p
        convs = [nn.Conv2d(c, hidden_dim, kernel_size=1) for c in channels]
        self.input_proj = nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, hidden_dim)) for conv in convs)
        self.level_embed = nn.Parameter(torch.randn(len(channels), hidden_dim))
        self.encoder = deformable_detr.Encoder(
            len(self.encoder.layers), hidden_dim, nheads, dim_feedforward // 2, dropout, len(channels), 4)
        self.decoder = Decoder(
            len(self.decoder.layers), hidden_dim, nheads, dim_feedforward, dropout, self.temperature, smca)
        xavier_uniform(self.encoder)
        xavier_uniform(self.decoder)
        for layer in self.encoder.layers:
            layer.self_attn.reset_parameters()
        for layer in self.decoder.layers:
            layer.aligner.centre_points()

    def forward(self, images, mask):
        """images [B, 3, H, W], mask [B, H, W] -> {"logits": [S, B, Q, C], "boxes": [S, B, Q, 4]}."""
        check_input(images, mask)
        features = self.backbone(images)
        maps = [proj(feature) for proj, feature in zip(self.input_proj, features)]  # L x [B, D, h, w]
        spatial_shapes = [m.shape[-2:] for m in maps]
        masks = [resize_mask(mask, shape) for shape in spatial_shapes]  # L x [B, h, w]
        pos = [sine_positions(m, maps[0].shape[1], offset=0.5, temperature=self.temperature) + embed
               for m, embed in zip(masks, self.level_embed)]  # L x [B, h*w, D]
        valid_ratios = torch.stack([deformable_detr.valid_ratio(m) for m in masks], dim=1)  # [B, L, 2]
        src = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)  # [B, T, D]
        mask = torch.cat([m.flatten(1) for m in masks], dim=1)  # [B, T]

        memory = self.encoder(src, torch.cat(pos, dim=1), spatial_shapes, valid_ratios, mask)  # [B, T, D]
        memory = memory.split([h * w for h, w in spatial_shapes], dim=1)  # L x [B, h*w, D]
        reference = self.query_embed.weight.sigmoid().expand(images.shape[0], -1, -1)  # [B, Q, 4]
        hs, boxes = self.decoder(reference, self.box_head, list(zip(memory, pos, masks)))
        logits = torch.stack([head(h) for head, h in zip(self.class_head, hs)])  # [S, B, Q, C]
        return {"logits": logits, "boxes": boxes}


def build(num_classes, **options):
    """The model; options are smca and those of sam_detr.build."""
    return SAMDETRMultiscale(num_classes, **options)


if __name__ == "__main__":
    model = build(num_classes=91, pretrained_backbone=False)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
