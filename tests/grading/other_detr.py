"""DETR as somebody else would write it: torch's attention, tokens first, names and parts that are not ours.

Not a sixth model, but a file to be graded: the marks must not depend on how our own files are built.
"""
import math

import torch
import torchvision
from torch import nn


class Layer(nn.Module):
    def __init__(self, width, heads, hidden, dropout, cross):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout=dropout) if cross else None
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for i in range(3 if cross else 2):
            setattr(self, f"norm{i + 1}", nn.LayerNorm(width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, x_pos, ignore=None, memory=None, pos=None):
        cross = self.multihead_attn is not None
        q = x + x_pos
        x = self.norm1(x + self.drop(self.self_attn(q, q, x, None if cross else ignore)[0]))
        if cross:
            x = self.norm2(x + self.drop(self.multihead_attn(x + x_pos, memory + pos, memory, ignore)[0]))
        y = self.linear2(self.drop(self.linear1(x).relu()))
        return (self.norm3 if cross else self.norm2)(x + self.drop(y))


class Detector(nn.Module):
    def __init__(self, classes, backbone, width, heads, enc, dec, hidden, dropout, queries):
        super().__init__()
        frozen = torchvision.ops.FrozenBatchNorm2d
        body = torchvision.models.get_model(backbone, weights=None, norm_layer=frozen)
        channels = body.fc.in_features
        del body.fc, body.avgpool
        body.conv1.requires_grad_(False)
        body.layer1.requires_grad_(False)
        self.backbone = nn.ModuleList([nn.ModuleDict({"body": body})])
        self.input_proj = nn.Conv2d(channels, width, 1)
        self.query_embed = nn.Embedding(queries, width)
        self.transformer = nn.ModuleDict({"encoder": nn.Module(), "decoder": nn.Module()})
        for (name, part), count in zip(self.transformer.items(), (enc, dec)):
            layers = [Layer(width, heads, hidden, dropout, cross=name == "decoder") for _ in range(count)]
            part.layers = nn.ModuleList(layers)
        self.transformer["decoder"].norm = nn.LayerNorm(width)
        for p in self.transformer.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        self.class_embed = nn.Linear(width, classes + 1)
        self.bbox_embed = nn.Module()
        self.bbox_embed.layers = nn.ModuleList([nn.Linear(width, size) for size in (width, width, 4)])

    def position(self, valid, width):
        halves = []
        for axis in (1, 2):
            n = valid.cumsum(axis).float()
            n = n / (n.amax(axis, keepdim=True) + 1e-6) * 2 * math.pi
            channel = torch.arange(width // 2)
            angle = n[..., None] / 10000 ** (2 * (channel // 2) / (width // 2))
            halves.append(torch.where(channel % 2 == 0, angle.sin(), angle.cos()))
        return torch.cat(halves, -1)

    def forward(self, images, mask):
        x, body = images, self.backbone[0]["body"]
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            x = getattr(body, name)(x)
        rows, columns = (torch.arange(n) * whole // n for n, whole in zip(x.shape[-2:], mask.shape[-2:]))
        small = mask[:, rows][:, :, columns]
        pos = self.position(~small, self.input_proj.out_channels).flatten(1, 2).transpose(0, 1)
        ignore = small.flatten(1)
        memory = self.input_proj(x).flatten(2).permute(2, 0, 1)  # tokens, images, width
        for layer in self.transformer["encoder"].layers:
            memory = layer(memory, pos, ignore)
        query = self.query_embed.weight[:, None].repeat(1, len(images), 1)
        x, logits, boxes = torch.zeros_like(query), [], []
        for layer in self.transformer["decoder"].layers:
            x = layer(x, query, ignore, memory, pos)
            out = self.transformer["decoder"].norm(x).transpose(0, 1)
            logits.append(self.class_embed(out))
            for linear in self.bbox_embed.layers[:-1]:
                out = linear(out).relu()
            boxes.append(self.bbox_embed.layers[-1](out).sigmoid())
        return {"logits": torch.stack(logits), "boxes": torch.stack(boxes)}


def build(num_classes, backbone="resnet50", pretrained_backbone=False, hidden_dim=256, nheads=8, enc_layers=6,
          dec_layers=6, dim_feedforward=2048, dropout=0.1, num_queries=100):
    layers = enc_layers, dec_layers, dim_feedforward, dropout
    return Detector(num_classes, backbone, hidden_dim, nheads, *layers, num_queries)


def load_official(model, checkpoint):
    model.load_state_dict(checkpoint.get("model", checkpoint))
