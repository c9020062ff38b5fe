"""SQR or Deformable DETR without a loss on the first decoder stage: a guess of SQR's authors, tried.

    python train.py --model benchmarks/no_first_loss.py                                  SQR
    python train.py --model benchmarks/no_first_loss.py --option recollect=none          Deformable DETR

Options are those of sqr.py. In training the predictions of the first stage are left out of the output, so
that its weights learn only from what later stages make of them. Its own heads then learn nothing: its boxes
stay where they start, and what benchmarks/stages.py says of stage 1 means nothing.
"""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the parent's folder

from sqr import LAPTOP, RECIPE, SQR  # noqa: E402, F401


class NoFirstLoss(SQR):
    def forward(self, images, mask):
        out = super().forward(images, mask)
        if self.training:  # whatever is recollected, only the first group comes from stage 1
            out = {**out, "logits": out["logits"][1:], "boxes": out["boxes"][1:]}
        return out


def build(num_classes, **options):
    """The model. Raises ValueError unless it has two stages: one is needed to train the first."""
    model = NoFirstLoss(num_classes, **options)
    if model.num_stages < 2:
        raise ValueError("dec_layers must be 2 or more: the first stage has no loss")
    return model
