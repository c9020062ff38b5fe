"""SQR around AdaMixer, the first result in SQR's paper (42.5 -> 44.5 AP after 12 epochs).

Not a file to diff: it imports its parents. Model and losses are adamixer.py's; in training, sqr.py's
recollection_plan decides which query is fed to which stage. Inference is AdaMixer bit for bit, and so is
training with recollect="none".

Departure from the official code: recollection follows self.training, not requires_grad.
As in the official code every group of queries has its own boxes, and groups do not see each other.
"""
import sys
from pathlib import Path

import torch
from torch import nn

for folder in Path(__file__).resolve().parents[:2]:
    sys.path.append(str(folder))  # adamixer's folder and sqr's

import adamixer  # noqa: E402
from adamixer import LAPTOP, OFFICIAL_NAMES, PAPER, RECIPE, load_official, rename_official  # noqa: E402, F401

from sqr import SOURCES, recollection_plan  # noqa: E402


class Decoder(nn.Module):
    """AdaMixer's layers, in a plan's order: tgt [B, Q, D], xyzr [B, Q, 4] -> logits [S, B, Q, C] and xyzr.

    In training S is the number of all groups: 32 for 6 stages with selective recollection.
    """

    def __init__(self, layers, recollect):
        super().__init__()
        self.layers = layers
        self.recollect = recollect

    def plan(self):
        """The current recollection_plan; self.training decides, not requires_grad."""
        source = self.recollect if self.training else "none"
        return recollection_plan([(stage, source) for stage in range(len(self.layers))])

    def forward(self, tgt, xyzr, maps, strides):
        logits, places = [], []
        queries = [(tgt, xyzr)]
        for stage, query in self.plan():
            tgt, xyzr = queries[query]
            tgt, xyzr, scores = self.layers[stage](tgt, xyzr.detach(), maps, strides)
            logits.append(scores)
            places.append(xyzr)
            queries.append((tgt, xyzr))
        return torch.stack(logits), torch.stack(places)


class SQRAdaMixer(adamixer.AdaMixer):
    """AdaMixer with recollection: images [B, 3, H, W] -> S times Q classes and boxes for each."""

    def __init__(self, num_classes, recollect="selective", **options):
        if recollect not in SOURCES:
            raise ValueError(f'recollect is {recollect!r}, it must be "selective", "dense" or "none"')
        super().__init__(num_classes, **options)
        self.decoder = Decoder(self.decoder.layers, recollect)


def build(num_classes, **options):
    """The model; options are recollect and those of adamixer.build."""
    return SQRAdaMixer(num_classes, **options)


if __name__ == "__main__":
    model = build(num_classes=80, pretrained_backbone=False)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(model.decoder.plan())} groups")
