"""DETR, Conditional DETR and Deformable DETR of Hugging Face's transformers behind our contract, as files to
be graded.

Their code is used as it is, but for the ResNet: that is torchvision's, whose names official checkpoints
have. Stages are what their own loss sees in training with auxiliary_loss=True.
"""

import importlib
import re
from types import ModuleType

import torchvision
from torch import nn
from transformers import ResNetConfig

# Official names of parameters and theirs
NAMES = [
    (r"^backbone\.0\.body\.", "model.backbone.model."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"^transformer\.", "model."),
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"(self_attn|cross_attn|multihead_attn)\.out_proj", r"\1.o_proj"),
    (r"(sa|ca)_qcontent_proj", r"\1_q_content_proj"),
    (r"(sa|ca)_kcontent_proj", r"\1_k_content_proj"),
    (r"(sa|ca)_qpos_proj", r"\1_q_pos_proj"),
    (r"(sa|ca)_kpos_proj", r"\1_k_pos_proj"),
    (r"ca_qpos_sine_proj", "ca_q_pos_sine_proj"),
    (r"\.sa_(\w+_proj)", r".self_attn.\1"),
    (r"\.ca_(\w+_proj)", r".encoder_attn.\1"),
    (r"multihead_attn|cross_attn", "encoder_attn"),
    (r"(layers\.\d+)\.linear([12])\.", r"\1.mlp.fc\2."),
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
]
ONE_HEAD = [  # DETR and Conditional DETR
    (r"^input_proj\.", "model.input_projection."),
    (r"^class_embed\.", "class_labels_classifier."),
    (r"^bbox_embed\.", "bbox_predictor."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
]
MANY_HEADS = [  # Deformable DETR, whose decoder's first norm is that of cross-attention
    (r"^input_proj\.", "model.input_proj."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.encoder_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
]


class Body(nn.Module):
    """torchvision's ResNet: the maps of its last stages."""

    def __init__(self, name, count):
        super().__init__()
        body = torchvision.models.get_model(name, weights=None, norm_layer=nn.BatchNorm2d)
        self.count, width = count, body.fc.in_features
        self.stem = ["conv1", "bn1", "relu", "maxpool"]
        for part in [*self.stem, "layer1", "layer2", "layer3", "layer4"]:
            setattr(self, part, getattr(body, part))
        self.channels = [width // 2**i for i in reversed(range(count))]

    def forward(self, x):
        maps = []
        for part in [*self.stem, "layer1", "layer2", "layer3", "layer4"]:
            x = getattr(self, part)(x)
            maps.append(x)
        return maps[-self.count :]


class Wrapped(nn.Module):
    """One of their models with our forward."""

    def __init__(self, kind, backbone, **config):
        super().__init__()
        code = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        make_config = importlib.import_module(f"transformers.models.{kind}.configuration_{kind}")
        name = "".join(part.capitalize() for part in kind.split("_"))
        config = getattr(make_config, f"{name}Config")(backbone_config=ResNetConfig(), **config)
        holder, original = nn.Module(), code.load_backbone
        holder._backbone = Body(backbone, 3 if kind == "deformable_detr" else 1)
        holder.channels = holder._backbone.channels
        code.load_backbone = lambda config: holder
        try:
            self.theirs = getattr(code, f"{name}ForObjectDetection")(config)
        finally:
            code.load_backbone = original
        self.theirs.loss_function = as_stages
        self.many_heads = kind == "deformable_detr"

    def forward(self, images, mask):
        out = self.theirs(images, (~mask).long(), labels=[])
        stages = dict(out.loss_dict)
        if out.get("enc_outputs_class") is not None:
            boxes = out.enc_outputs_coord_logits.sigmoid()
            stages["proposals"] = {"logits": out.enc_outputs_class, "boxes": boxes}
        return stages


def as_stages(logits, labels, device, boxes, config, all_logits, all_boxes):
    """In place of their loss: what it would see of every stage, as their output's `loss_dict`."""
    return None, {"logits": all_logits, "boxes": all_boxes}, None


def load_official(model, checkpoint):
    """Our names would not help here: from official names to theirs, with q, k and v apart."""
    state = {}
    for name, x in checkpoint.get("model", checkpoint).items():
        for pattern, new in NAMES + (MANY_HEADS if model.many_heads else ONE_HEAD):
            name = re.sub(pattern, new, name)
        if "in_proj_" in name:
            for letter, part in zip("qkv", x.chunk(3)):
                state[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            state[name] = x
    model.theirs.load_state_dict(state)


def module(kind):
    """A submission: what a file with `build` and `load_official` would be."""

    def build(
        num_classes,
        backbone="resnet50",
        pretrained_backbone=False,
        hidden_dim=256,
        nheads=8,
        enc_layers=6,
        dec_layers=6,
        dim_feedforward=1024,
        dropout=0.1,
        num_queries=300,
        box_refine=False,
        two_stage=False,
    ):
        config = dict(
            num_labels=num_classes,
            auxiliary_loss=True,
            d_model=hidden_dim,
            encoder_attention_heads=nheads,
            decoder_attention_heads=nheads,
            encoder_layers=enc_layers,
            decoder_layers=dec_layers,
            encoder_ffn_dim=dim_feedforward,
            decoder_ffn_dim=dim_feedforward,
            num_queries=num_queries,
            **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), dropout),
        )
        if kind == "deformable_detr":
            refine = dict(with_box_refine=box_refine or two_stage, two_stage=two_stage)
            config.update(refine, two_stage_num_proposals=num_queries)
        return Wrapped(kind, backbone, **config)

    found = ModuleType(f"transformers_{kind}")
    found.build, found.load_official = build, load_official
    return found
