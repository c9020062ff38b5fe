"""DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection.

Hao Zhang, Feng Li, Shilong Liu, Lei Zhang, Hang Su, Jun Zhu, Lionel M. Ni, Heung-Yeung Shum.
ICLR 2023, arXiv:2203.03605. Official code: github.com/IDEA-Research/DINO (Apache-2.0), with 4 scales.

The idea: Deformable DETR's decoder gets DAB-DETR's boxes, DN-DETR's noisy objects, and three new ideas. Boxes
with much noise must predict "no object", so that only one of several close queries answers. The encoder gives
the queries their boxes, but their content is learned. A layer's loss also trains the previous layer's box.

Diff me against: hdetr.py, which uses two of the three. Section 4.1 and appendix A.4 are Deformable DETR's.

Departures from the official code; tests/test_golden.py checks that the numbers are the same:
    Backbone lists those of all files.
    in several processes all losses are divided by the boxes of all; officially denoising by those of one.
    dn_number below 50 works like a larger one; officially the number of groups is then twice dn_number.
    sampling is grid_sample, point by point, instead of a CUDA extension; it runs everywhere.
As in the official code, unlike the paper: labels change with half the probability label_noise; places that an
image leaves empty are negatives; image positions have temperature 20.
Left out on purpose: segmentation heads; 5 scales, one stage, moving averages of the weights.
"""
import copy
import math
import re

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

# How the paper trains it; train.py reads this.
RECIPE = dict(
    epochs=12,  # as in the official scripts
    lr_drop=11,
    batch_size=16,
    lr=1e-4,
    lr_backbone=1e-5,
    slow_parameters=(),
    weight_decay=1e-4,
    clip_norm=0.1,
    class_loss="focal",
    w_class=1,
    cost_class=2,  # the class counts twice in the matching cost only
    w_l1=5,
    w_giou=2,
    denoising=True,
)

# For train.py --preset laptop: few noisy queries, and maps of strides 8, 16, 32 made of C3.
LAPTOP = dict(steps=1800, lr=8e-4, lr_backbone=8e-4, num_feature_levels=3, enc_points=2, dn_number=20)

# Shapes in comments: B images of H x W pixels, maps of h x w cells, T tokens (cells of all maps), Q queries,
# C classes, D width, E width of queries and keys, M heads, L levels, K points, G groups, S supervised stages.
# Boxes are (cx, cy, w, h) in [0, 1] of the image without its padding. Masks are True on padding.


# ---- Shared blocks: the same text in all files -------------------------------------------------------------
class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """torchvision's, but it reads x once, not twice (8 % of DETR's inference), and keeps bfloat16."""

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift[:, None, None].to(x), x, scale[:, None, None].to(x))  # shift + x * scale


class Backbone(nn.Module):
    """torchvision ResNet without pooling and classifier.

    In: images [B, 3, H, W], normalised with ImageNet's mean and std. Out: C3, C4, C5 at strides 8, 16, 32 (C5
    at 16 with dilation). Raises ValueError for unknown values. Source: official models/backbone.py; ImageNet
    weights V1, from which all papers start.
    Departures of all files: norm="batch" trains everything with live BatchNorm, which training from scratch
    needs; last_stage 3 or 2 gives finer maps; `temperature` is an option. Faster with the same numbers:
    FrozenBatchNorm2d reads x once, and FeedForward has its dropout before the ReLU.
    """

    def __init__(self, name, pretrained, norm, dilation, last_stage):
        super().__init__()
        if norm not in ("frozen", "batch"):
            raise ValueError(f'backbone_norm is {norm!r}, it must be "frozen" or "batch"')
        if name not in torchvision.models.list_models(include="*resne*t*"):
            raise ValueError(f'backbone is {name!r}, it must be a torchvision ResNet such as "resnet50"')
        if last_stage not in (2, 3, 4):
            raise ValueError(f"last_stage is {last_stage!r}, it must be 4 (C5, as in the papers), 3 or 2")
        norm_layer = FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d
        weights = "IMAGENET1K_V1" if pretrained else None
        # DC5: the last stage keeps C4's resolution; for ResNet-18 and -34 torchvision raises an error
        body = torchvision.models.get_model(name, weights=weights, norm_layer=norm_layer,
                                            replace_stride_with_dilation=[False, False, dilation])
        c5 = body.fc.in_features
        self.channels = [c5 // 4, c5 // 2, c5][:last_stage - 1]
        self.stages = ["layer2", "layer3", "layer4"][:last_stage - 1]
        del body.avgpool, body.fc
        for unused in ["layer3", "layer4"][last_stage - 2:]:
            delattr(body, unused)
        if norm == "frozen":
            # Statistics of one or two images are useless, so ImageNet's stay fixed; so do the first layers
            body.conv1.requires_grad_(False)
            body.layer1.requires_grad_(False)
        self.body = body.to(memory_format=torch.channels_last)  # same numbers, faster convolutions

    def forward(self, images):
        x = images.contiguous(memory_format=torch.channels_last)
        x = self.body.maxpool(self.body.relu(self.body.bn1(self.body.conv1(x))))  # [B, 64, H/4, W/4]
        x = self.body.layer1(x)  # [B, C2, H/4, W/4]
        features = []
        for stage in self.stages:
            x = getattr(self.body, stage)(x)  # [B, ., H/8, W/8], then H/16, then H/32
            features.append(x)
        return features


def check_input(images, mask):
    """Raises ValueError unless images are [B, 3, H, W] and mask [B, H, W] bool. It reads no values."""
    if images.ndim != 4 or images.shape[1] != 3 or mask.shape != (images.shape[0], *images.shape[2:]):
        raise ValueError(f"images {tuple(images.shape)} and mask {tuple(mask.shape)} must be [B, 3, H, W] "
                         f"and [B, H, W]; put a single image into a batch with image[None]")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, it must be bool, True on padding")


def resize_mask(mask, size):
    """Padding mask [B, H, W] at a map's size (h, w), nearest neighbour: cell i reads floor(i * H / h)."""
    return F.interpolate(mask[:, None].float(), size=size)[:, 0].bool()  # [B, h, w]


def sine(x, dim, temperature=10000):
    """Encoding of coordinates x [...] in [0, 1]: [..., dim], sin and cos interleaved."""
    i = torch.arange(dim // 2, device=x.device, dtype=torch.float32)
    angle = x.float()[..., None] * 2 * math.pi / temperature ** (2 * i / dim)  # [..., dim/2]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)  # [..., dim]


def sine_positions(mask, dim, offset, temperature=10000):
    """Position of every cell of a feature map, relative to the part of the map that is not padding.

    mask [B, h, w] bool -> [B, h*w, dim]: the first half encodes y, the second x. With `offset` 0 cells are
    counted from 1 to N, as in DETR; 0.5 moves them to their centres, because some papers sample features at
    points. In padding N may be 0, so the order of sums counts. Source: official position_encoding.py.
    """
    def normalised(n, axis):
        last = n.narrow(axis, -1, 1)
        return (n - offset) / (((last - offset) + 1e-6) + offset)

    y = normalised((~mask).cumsum(1, dtype=torch.float32), 1)  # [B, h, w]
    x = normalised((~mask).cumsum(2, dtype=torch.float32), 2)  # [B, h, w]
    both = [sine(y, dim // 2, temperature), sine(x, dim // 2, temperature)]  # 2 x [B, h, w, dim/2]
    return torch.cat(both, dim=-1).flatten(1, 2)  # [B, h*w, dim]


class MLP(nn.Module):
    """`depth` linear layers with ReLU between them: [..., in_dim] -> [..., out_dim]."""

    def __init__(self, in_dim, hidden_dim, out_dim, depth):
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (depth - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims, dims[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(E/M)) v in M heads, and the output projection; q, k, v come in already projected.

    q [B, Q, E], k [B, T, E], v [B, T, D], mask [B, T] bool, bias [B, M, Q, T] added to scores -> [B, Q, D].
    E may differ from D, because only q and k need equal widths.
    """

    def __init__(self, hidden_dim, nheads, dropout):
        super().__init__()
        self.nheads = nheads
        self.dropout = dropout
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, q, k, v, mask=None, bias=None):
        # [B, T, E] -> [B, T, M, E/M] -> [B, M, T, E/M]
        q, k, v = (x.unflatten(-1, (self.nheads, -1)).transpose(1, 2) for x in (q, k, v))
        attn_mask = bias  # torch adds it if it is float; if it is bool, True means "look here"
        if mask is not None:
            attend = ~mask[:, None, None]  # [B, 1, 1, T]
            attn_mask = attend if bias is None else bias.masked_fill(~attend, -math.inf)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p=dropout)  # [B, M, Q, D/M]
        return self.out_proj(out.transpose(1, 2).flatten(2))  # [B, Q, D]


class QKVProjection(nn.Module):
    """The three input maps of attention, stored as one [3D, D] matrix as in nn.MultiheadAttention."""

    def __init__(self, hidden_dim):
        super().__init__()
        self.in_proj = nn.Linear(hidden_dim, 3 * hidden_dim)  # packed: Xavier initialisation sees 3D x D
        nn.init.zeros_(self.in_proj.bias)

    def forward(self, q, k, v):
        weights, biases = self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases)]


class FeedForward(nn.Module):
    """Two linear layers, residual and post-norm: [..., D] -> [..., D]."""

    def __init__(self, hidden_dim, dim_feedforward, dropout):
        super().__init__()
        self.linear1 = nn.Linear(hidden_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        # Equals dropout(relu(...)), but backward stores 8 % less for Deformable DETR at 480 x 640
        y = self.linear2(self.dropout(self.linear1(x)).relu())
        return self.norm(x + self.dropout(y))


def xavier_uniform(module):
    """Xavier-uniform on every matrix of a module (official Transformer._reset_parameters)."""
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)


# ---- Deformable attention (paper, section 4.1) -------------------------------------------------------------
def deformable_sampling(value, spatial_shapes, locations, weights):
    """Bilinear samples of every level, weighted and summed: the inner sums of Eq. (3).

    value [B, T, M, D/M], spatial_shapes [(h, w), ...] of L levels, locations [B, Q, M, L, K, 2] as (x, y) in
    [0, 1] of the padded map (outside is zero), weights [B, Q, M, L, K] -> [B, Q, D].
    Source: official ms_deform_attn_core_pytorch; point by point it needs less memory and time.
    """
    B, Q, M, L, K, _ = locations.shape
    # grid_sample counts from -1 to 1 and has no heads: they become images. Contiguous, because the numbers of
    # one point are far apart in memory; without it, a single image takes as long as two.
    # [B, Q, M, L, K, 2] -> [L, K, B, M, Q, 2] -> [L, K, B*M, 1, Q, 2]
    grid = (2 * locations - 1).permute(3, 4, 0, 2, 1, 5).reshape(L, K, B * M, 1, Q, 2).contiguous()
    # [B, Q, M, L, K] -> [L, K, B, M, Q] -> [L, K, B*M, 1, 1, Q]
    weights = weights.permute(3, 4, 0, 2, 1).reshape(L, K, B * M, 1, 1, Q).contiguous()
    maps = value.to(grid.dtype).split([h * w for h, w in spatial_shapes], dim=1)  # L x [B, h*w, M, D/M]
    total = grid.new_zeros(B * M, value.shape[-1], 1, Q)  # [B*M, D/M, 1, Q]
    for (h, w), feature_map, level_grid, level_weights in zip(spatial_shapes, maps, grid, weights):
        # [B, h*w, M, D/M] -> [B, M, D/M, h*w] -> [B*M, D/M, h, w]
        feature_map = feature_map.permute(0, 2, 3, 1).reshape(B * M, -1, h, w)
        for point, weight in zip(level_grid, level_weights):  # [B*M, 1, Q, 2], [B*M, 1, 1, Q]
            sampled = F.grid_sample(feature_map, point, align_corners=False)  # [B*M, D/M, 1, Q]
            total.addcmul_(sampled, weight)  # total += weight * sampled
    return total.reshape(B, -1, Q).transpose(1, 2)  # [B*M, D/M, 1, Q] -> [B, D, Q] -> [B, Q, D]


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention, Eq. (3), with M heads, L levels and K points per head and level."""

    def __init__(self, hidden_dim, nheads, levels, points):
        super().__init__()
        self.nheads, self.levels, self.points = nheads, levels, points
        self.sampling_offsets = nn.Linear(hidden_dim, nheads * levels * points * 2)
        self.attention_weights = nn.Linear(hidden_dim, nheads * levels * points)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)

    def reset_parameters(self):
        """Start as a star: head m looks towards angle 2 pi m / M, point k is k steps away; equal weights."""
        M, L, K = self.nheads, self.levels, self.points
        angle = torch.arange(M) * (2 * math.pi / M)
        ray = torch.stack([angle.cos(), angle.sin()], dim=-1)  # [M, 2]
        ray = ray / ray.abs().max(-1, keepdim=True).values  # onto the border of a square
        star = ray[:, None, None] * torch.arange(1, K + 1)[:, None]  # [M, 1, K, 2]
        self.sampling_offsets.bias.data.copy_(star.expand(M, L, K, 2).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)  # after the softmax the paper's 1/(LK)
        nn.init.zeros_(self.value_proj.bias)
        nn.init.zeros_(self.output_proj.bias)

    def locations_and_weights(self, query, reference, spatial_shapes):
        """Where to look, [B, Q, M, L, K, 2] in [0, 1] of the padded maps, and its weight [B, Q, M, L, K]."""
        M, L, K = self.nheads, self.levels, self.points
        offsets = self.sampling_offsets(query).unflatten(-1, (M, L, K, 2))  # [B, Q, M, L, K, 2]
        weights = self.attention_weights(query).unflatten(-1, (M, L * K))  # [B, Q, M, L*K]
        weights = weights.softmax(-1).unflatten(-1, (L, K))  # [B, Q, M, L, K], sum to 1 over L and K together
        reference = reference[:, :, None, :, None]  # [B, Q, 1, L, 1, 2 or 4]
        if reference.shape[-1] == 2:
            # Offsets are in pixels of their level. (w, h) and not (h, w): the first release had that wrong.
            size = torch.tensor([(w, h) for h, w in spatial_shapes], device=query.device)  # [L, 2]
            return reference + offsets / size[:, None], weights
        # Relative to a box: the star's last point starts on its border, hence 1/K and half the width (A.4).
        return reference[..., :2] + offsets / K * reference[..., 2:] * 0.5, weights

    def forward(self, query, reference, value, spatial_shapes, mask):
        """query [B, Q, D], reference [B, Q, L, 2 or 4], value [B, T, D], mask [B, T] -> [B, Q, D]."""
        value = self.value_proj(value).masked_fill(mask[..., None], 0)  # padding contributes nothing
        value = value.unflatten(-1, (self.nheads, -1))  # [B, T, M, D/M]
        locations, weights = self.locations_and_weights(query, reference, spatial_shapes)
        return self.output_proj(deformable_sampling(value, spatial_shapes, locations, weights))


def valid_ratio(mask):
    """Share of a padded map [B, h, w] that is image, as (x, y): [B, 2]."""
    valid = (~mask).float()
    return torch.stack([valid[:, 0].mean(1), valid[:, :, 0].mean(1)], dim=-1)


def pixel_centres(spatial_shapes, valid_ratios):
    """Centre of every token in [0, 1] of the image without padding, as (x, y): [B, T, 2]."""
    centres = []
    for level, (h, w) in enumerate(spatial_shapes):
        y = (torch.arange(h, device=valid_ratios.device) + 0.5) / h  # [h]
        x = (torch.arange(w, device=valid_ratios.device) + 0.5) / w  # [w]
        centre = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1).flatten(0, 1)  # [h*w, 2]
        centres.append(centre / valid_ratios[:, None, level])  # [B, h*w, 2]
    return torch.cat(centres, dim=1)


# ---- Encoder: every pixel of every level is a query (paper, section 4.1) -----------------------------------
class EncoderLayer(nn.Module):
    """Every token looks at K points per level, then the feed-forward block: src [B, T, D] -> [B, T, D]."""

    def __init__(self, hidden_dim, nheads, dim_feedforward, dropout, levels, points):
        super().__init__()
        self.self_attn = MSDeformAttn(hidden_dim, nheads, levels, points)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.ffn = FeedForward(hidden_dim, dim_feedforward, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, src, pos, reference, spatial_shapes, mask):
        src = self.norm1(src + self.dropout(self.self_attn(src + pos, reference, src, spatial_shapes, mask)))
        return self.ffn(src)


class Encoder(nn.Module):
    """Layers in a row: src, pos [B, T, D], mask [B, T] -> memory [B, T, D]."""

    def __init__(self, num_layers, hidden_dim, nheads, dim_feedforward, dropout, levels, points):
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(hidden_dim, nheads, dim_feedforward, dropout, levels, points)
            for _ in range(num_layers))

    def forward(self, src, pos, spatial_shapes, valid_ratios, mask):
        # Divided by its own level's ratio, multiplied by that of the level looked at: they round differently
        centres = pixel_centres(spatial_shapes, valid_ratios)[:, :, None]  # [B, T, 1, 2]
        reference = centres * valid_ratios[:, None]  # [B, T, L, 2]
        for layer in self.layers:
            src = layer(src, pos, reference, spatial_shapes, mask)
        return src


# ---- Where queries come from: boxes of the encoder's best proposals, learned content (DINO 3.4) ------------
def inverse_sigmoid(x, eps=1e-3):
    """log(x / (1 - x)) with both at least eps, as in the official code; Deformable DETR has 1e-5."""
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


class QuerySelection(nn.Module):
    """Two stages: every encoder token proposes a box; the best ones become the queries' boxes."""

    def __init__(self, hidden_dim, num_queries, mixed_selection):
        super().__init__()
        self.num_queries = num_queries
        self.enc_output = nn.Linear(hidden_dim, hidden_dim)
        self.enc_output_norm = nn.LayerNorm(hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim) if mixed_selection else None
        xavier_uniform(self)

    def forward(self, memory, spatial_shapes, valid_ratios, mask, class_head, box_head):
        """-> tgt [B, Q, D], reference [B, Q, 4], {"proposals": ...} of the chosen tokens, best first."""
        centre = pixel_centres(spatial_shapes, valid_ratios)  # [B, T, 2]
        # The anchor of a token is its centre with a side of 0.05 of the image at level 0, 0.1 at level 1, ...
        side = [torch.full((h * w, 2), 0.05 * 2 ** level) for level, (h, w) in enumerate(spatial_shapes)]
        anchor = torch.cat([centre, torch.cat(side).to(centre).expand_as(centre)], dim=-1)  # [B, T, 4]
        invalid = mask | ~((anchor > 0.01) & (anchor < 0.99)).all(-1)  # [B, T]
        # Infinite logits make the box (1, 1, 1, 1). The loss has it; a low score keeps it out of the top Q.
        anchor = anchor.logit().masked_fill(invalid[..., None], math.inf)
        tokens = self.enc_output_norm(self.enc_output(memory.masked_fill(invalid[..., None], 0)))  # [B, T, D]
        logits = class_head(tokens)  # [B, T, C]
        boxes_logit = box_head(tokens) + anchor  # [B, T, 4]

        # Proposals are trained with the classes of the objects, so the largest logit ranks them
        count = torch.sym_min(self.num_queries, logits.shape[1])  # min for torch.export; small maps have few
        best = logits.amax(-1).topk(count, dim=1).indices  # [B, Q]
        tokens, logits, boxes_logit = (
            x.gather(1, best[..., None].expand(-1, -1, x.shape[-1])) for x in (tokens, logits, boxes_logit))
        boxes = boxes_logit.sigmoid()  # [B, Q, 4]
        tgt = tokens.detach()  # [B, Q, D]
        if self.query_embed is not None:
            # Mixed selection: content is a row for each rank, because a token may be about several objects
            tgt = self.query_embed.weight[:count].expand_as(tgt)
        return tgt, boxes.detach(), {"proposals": {"logits": logits, "boxes": boxes, "class_aware": True}}


# ---- Denoising: objects with noise as additional queries, in groups (DINO, section 3.3) --------------------
def draw_noise(shape, num_classes, device):
    """All random numbers of a training step, for copies of shape [G, 2, n]. Tests replace this function."""
    return {
        "flip": torch.rand(shape, device=device),
        "label": torch.randint(num_classes, shape, device=device),
        "box": torch.rand(*shape, 4, device=device),
        "sign": torch.randint(2, (*shape, 4), device=device) * 2.0 - 1,
    }


def object_places(targets, width, copies):
    """Where copies of the n objects of all images go: image [n], row [n] and place [copies, n].

    Copy c of the object in row i takes place c * width + i of its image, so copies are blocks. width is
    the largest number of objects in one image; an image with fewer objects leaves places empty.
    """
    counts, device = [len(t["labels"]) for t in targets], targets[0]["labels"].device
    image = torch.cat([torch.full((n,), b, device=device) for b, n in enumerate(counts)])  # [n]
    row = torch.cat([torch.arange(n, device=device) for n in counts])  # [n]
    return image, row, torch.arange(copies, device=device)[:, None] * width + row


def group_bias(groups, size, num_queries, device):
    """Scores for self-attention, [1, 1, N + Q, N + Q]: -inf where the row's query must not see the column's.

    A noisy query sees its own group and the Q matching queries. These see each other only, because noisy
    queries contain the objects, and the answer would leak. So the mask is not symmetric.
    """
    group = torch.arange(groups, device=device).repeat_interleave(size)  # [N]
    group = F.pad(group, (0, num_queries), value=-1)  # [N + Q], -1 are the matching queries
    apart = (group != group[:, None]) & (group >= 0)  # [N + Q, N + Q]
    return torch.zeros(1, 1, *apart.shape, device=device).masked_fill(apart, -math.inf)


class Denoising(nn.Module):
    """N noisy queries before the Q others. A group has a positive and a negative one for each object."""

    def __init__(self, num_classes, hidden_dim, number, label_noise, box_noise):
        super().__init__()
        self.label_embed = nn.Embedding(num_classes + 1, hidden_dim)  # the last row is unused (as official)
        self.label_embed.weight.requires_grad_(number > 0)  # DDP waits for the gradient of all others
        self.number = number
        self.label_noise = label_noise
        self.box_noise = box_noise

    def noisy_objects(self, targets, noise):
        """The objects [n] of all images -> labels [G, 2, n] and boxes [G, 2, n, 4] with noise."""
        labels, boxes = (torch.cat([t[key] for t in targets]) for key in ("labels", "boxes"))  # [n], [n, 4]
        # The probability is half of label_noise (as in the official code)
        labels = torch.where(noise["flip"] < self.label_noise / 2, noise["label"], labels)  # [G, 2, n]
        # Corners move by up to box_noise of half the box, those of negatives by that and up to as much again
        corners = torchvision.ops.box_convert(boxes, "cxcywh", "xyxy")  # [n, 4]
        half = boxes[:, [2, 3, 2, 3]] / 2  # [n, 4]
        negative = torch.arange(2, device=boxes.device)[:, None, None]  # [2, 1, 1]: 0 and 1
        corners = corners + noise["sign"] * (noise["box"] + negative) * self.box_noise * half
        boxes = torchvision.ops.box_convert(corners.clamp(0, 1), "xyxy", "cxcywh")  # [G, 2, n, 4]
        # Corners may have changed sides: a negative size counts as 0
        return labels, inverse_sigmoid(boxes.clamp(min=0)).sigmoid()  # away from 0 and 1

    def forward(self, tgt, reference, targets):
        """tgt [B, Q, D], reference [B, Q, 4] -> both with N + Q queries, their bias, and the targets.

        target [B, N] is the row of the object to give back, or -1 for "no object".
        """
        B, Q, D = tgt.shape
        width = max(len(t["labels"]) for t in targets)
        G = max(1, self.number // max(1, width))
        image, row, place = object_places(targets, width, 2 * G)  # [n], [n], [2G, n]
        noise = draw_noise((G, 2, len(row)), self.label_embed.num_embeddings - 1, tgt.device)
        labels, boxes = self.noisy_objects(targets, noise)
        content = self.label_embed.weight.new_zeros(B, 2 * G * width, D)
        content[image, place] = self.label_embed(labels).flatten(0, 1)
        noisy = boxes.new_full((B, 2 * G * width, 4), 0.5)
        noisy[image, place] = boxes.flatten(0, 1)
        target = torch.full((B, 2 * G * width), -1, device=tgt.device)
        target[image, place[::2]] = row  # positives; negatives and empty places are "no object"
        tgt, reference = torch.cat([content, tgt], dim=1), torch.cat([noisy, reference], dim=1)
        return tgt, reference, group_bias(G, 2 * width, Q, tgt.device), {"target": target, "groups": G}


# ---- Decoder: queries look at each other, then at the image ------------------------------------------------
class DecoderLayer(nn.Module):
    """Queries look at each other, then at the image: tgt [B, Q, D], memory [B, T, D] -> [B, Q, D]."""

    def __init__(self, hidden_dim, nheads, dim_feedforward, dropout, levels, points):
        super().__init__()
        self.sa_proj = QKVProjection(hidden_dim)
        self.self_attn = Attention(hidden_dim, nheads, dropout)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.cross_attn = MSDeformAttn(hidden_dim, nheads, levels, points)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.ffn = FeedForward(hidden_dim, dim_feedforward, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tgt, query_pos, reference, memory, spatial_shapes, mask, bias):
        # tgt is learned from the start, so the first self-attention is not idle as in DETR
        q, k, v = self.sa_proj(tgt + query_pos, tgt + query_pos, tgt)  # 3 x [B, Q, D]
        tgt = self.norm1(tgt + self.dropout(self.self_attn(q, k, v, bias=bias)))

        # No keys: where to look, and the weight of each point, depend only on the query
        attended = self.cross_attn(tgt + query_pos, reference, memory, spatial_shapes, mask)  # [B, Q, D]
        tgt = self.norm2(tgt + self.dropout(attended))
        return self.ffn(tgt)


class Decoder(nn.Module):
    """Layers in a row, each supervised: tgt [B, Q, D], reference [B, Q, 4] -> [S, B, Q, D] and boxes."""

    def __init__(self, num_layers, hidden_dim, nheads, dim_feedforward, dropout, levels, points):
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(hidden_dim, nheads, dim_feedforward, dropout, levels, points)
            for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.query_pos = MLP(2 * hidden_dim, hidden_dim, hidden_dim, depth=2)

    def forward(self, tgt, reference, box_head, memory, spatial_shapes, valid_ratios, mask, bias):
        outputs, boxes = [], []
        previous = reference  # as the next layer gets it, but with gradient
        ratios = valid_ratios.repeat(1, 1, 2)  # [B, L, 4]
        for layer in self.layers:
            scaled = reference[:, :, None] * ratios[:, None]  # [B, Q, L, 4]
            # DAB-DETR: P_q = MLP(PE(box)), in the order y, x, w, h, of the box in the padded finest map
            query_pos = self.query_pos(sine(scaled[:, :, 0, [1, 0, 2, 3]], tgt.shape[-1] // 2).flatten(-2))
            tgt = layer(tgt, query_pos, scaled, memory, spatial_shapes, mask, bias)
            outputs.append(self.norm(tgt))  # one norm for all layers, before the shared heads
            # Look forward twice: the loss of a layer also trains the previous box head, and no earlier one
            boxes.append((box_head(outputs[-1]) + inverse_sigmoid(previous)).sigmoid())
            # The box of the next layer comes from the output without the norm
            previous = (box_head(tgt) + inverse_sigmoid(reference)).sigmoid()
            reference = previous.detach()  # A.4: no gradient from one layer's box to the previous one
        return torch.stack(outputs), torch.stack(boxes)


# ---- The model ---------------------------------------------------------------------------------------------
class DINO(nn.Module):
    """Backbone, encoder, decoder, heads: images [B, 3, H, W] -> S times Q classes and boxes for each."""

    recipe = RECIPE

    def __init__(
        self,
        num_classes,
        backbone="resnet50",
        pretrained_backbone=True,
        backbone_norm="frozen",
        dilation=False,
        last_stage=4,
        hidden_dim=256,
        nheads=8,
        enc_layers=6,
        dec_layers=6,
        dim_feedforward=2048,
        dropout=0.0,
        num_queries=900,
        temperature=20,  # of image positions; boxes keep 10000 (as in the official code)
        num_feature_levels=4,
        enc_points=4,
        dec_points=4,
        mixed_selection=True,
        dn_number=100,
        label_noise=0.5,
        box_noise=1.0,
    ):
        super().__init__()
        if hidden_dim % nheads or hidden_dim % 4:  # equal heads; sin and cos of x and y
            raise ValueError(f"hidden_dim {hidden_dim} must be a multiple of nheads ({nheads}) and of 4")
        self.backbone = Backbone(backbone, pretrained_backbone, backbone_norm, dilation, last_stage)
        if enc_layers < 1:
            raise ValueError(f"enc_layers is {enc_layers}, it must be at least 1 to use the level embedding")
        levels = num_feature_levels
        self.make_projections(hidden_dim, levels)
        self.encoder = Encoder(enc_layers, hidden_dim, nheads, dim_feedforward, dropout, levels, enc_points)
        self.queries = QuerySelection(hidden_dim, num_queries, mixed_selection)
        self.temperature = temperature
        self.denoising = Denoising(num_classes, hidden_dim, dn_number, label_noise, box_noise)
        self.decoder = Decoder(dec_layers, hidden_dim, nheads, dim_feedforward, dropout, levels, dec_points)
        self.make_heads(hidden_dim, num_classes)
        self.reset_parameters()

    def make_projections(self, hidden_dim, levels):
        """The last of C3, C4, C5 by 1x1 convolutions, further levels (C6) by 3x3 convolutions of stride 2."""
        channels = self.backbone.channels[-levels:]
        convs = [nn.Conv2d(c, hidden_dim, kernel_size=1) for c in channels]
        c = channels[-1]  # C6 comes from raw C5, the next one from C6
        while len(convs) < levels:
            convs.append(nn.Conv2d(c, hidden_dim, kernel_size=3, stride=2, padding=1))
            c = hidden_dim
        groups = min(32, hidden_dim // 2)  # a group of one channel has no spread on a map of one cell
        norms = [nn.GroupNorm(groups, hidden_dim) for _ in convs]
        self.input_proj = nn.ModuleList(nn.Sequential(*pair) for pair in zip(convs, norms))
        self.level_embed = nn.Parameter(torch.randn(levels, hidden_dim))

    def make_heads(self, hidden_dim, num_classes):
        """One pair of heads for all layers, and a pair for the proposals that starts as a copy."""
        class_head = nn.Linear(hidden_dim, num_classes)
        box_head = MLP(hidden_dim, hidden_dim, 4, depth=3)
        nn.init.constant_(class_head.bias, -math.log(99))  # every class starts at p = 0.01
        nn.init.zeros_(box_head.layers[-1].weight)
        nn.init.zeros_(box_head.layers[-1].bias)
        self.class_head, self.proposal_class_head = class_head, copy.deepcopy(class_head)
        self.box_head, self.proposal_box_head = box_head, copy.deepcopy(box_head)

    def reset_parameters(self):
        xavier_uniform(self.encoder)
        xavier_uniform(self.decoder)
        xavier_uniform(self.input_proj)
        for module in [*self.encoder.modules(), *self.decoder.modules()]:
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        for conv, _ in self.input_proj:
            nn.init.zeros_(conv.bias)

    def forward(self, images, mask, targets=None):
        """images [B, 3, H, W], mask [B, H, W] -> {"logits": [S, B, Q, C], "boxes": [S, B, Q, 4]}.

        Also "proposals": logits [B, Q, C] and boxes [B, Q, 4] of the Q best tokens. In training, with targets
        as for the criterion, also "denoising": logits and boxes of the N noisy queries, see Denoising.
        """
        check_input(images, mask)
        features = self.backbone(images)[-len(self.input_proj):]
        maps = [proj(feature) for proj, feature in zip(self.input_proj, features)]  # L x [B, D, h, w]
        for proj in self.input_proj[len(features):]:
            maps.append(proj(features[-1] if len(maps) == len(features) else maps[-1]))  # C6: from raw C5
        spatial_shapes = [m.shape[-2:] for m in maps]
        masks = [resize_mask(mask, shape) for shape in spatial_shapes]  # L x [B, h, w]
        pos = torch.cat([sine_positions(m, len(embed), offset=0, temperature=self.temperature) + embed
                         for m, embed in zip(masks, self.level_embed)], dim=1)  # [B, T, D]
        valid_ratios = torch.stack([valid_ratio(m) for m in masks], dim=1)  # [B, L, 2]
        src = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)  # [B, T, D]
        mask = torch.cat([m.flatten(1) for m in masks], dim=1)  # [B, T]

        memory = self.encoder(src, pos, spatial_shapes, valid_ratios, mask)  # [B, T, D]
        tgt, reference, proposals = self.queries(
            memory, spatial_shapes, valid_ratios, mask, self.proposal_class_head, self.proposal_box_head)
        N, bias = 0, None
        if self.training and targets is not None and self.denoising.number:
            tgt, reference, bias, known = self.denoising(tgt, reference, targets)  # N + Q queries
            N = known["target"].shape[1]
        hs, boxes = self.decoder(
            tgt, reference, self.box_head, memory, spatial_shapes, valid_ratios, mask, bias)
        logits = self.class_head(hs)  # [S, B, N + Q, C]
        out = {"logits": logits[:, :, N:], "boxes": boxes[:, :, N:], **proposals}
        if bias is not None:
            out["denoising"] = {"logits": logits[:, :, :N], "boxes": boxes[:, :, :N], **known}
        return out


def build(num_classes, **options):
    """The model; options are those of the class. Raises ValueError (wrong value), TypeError (unknown)."""
    return DINO(num_classes, **options)


# Official parameter names (regular expressions) and ours.
OFFICIAL_NAMES = (
    (r"^backbone\.0\.body\.", "backbone.body."),
    (r"^transformer\.decoder\.(class|bbox)_embed\.", r"\1_embed."),  # the same heads, listed twice
    (r"^transformer\.enc_out_class_embed\.", "proposal_class_head."),
    (r"^transformer\.enc_out_bbox_embed\.", "proposal_box_head."),
    (r"^transformer\.(enc_output\w*)\.", r"queries.\1."),
    (r"^transformer\.tgt_embed\.", "queries.query_embed."),
    (r"^transformer\.", ""),
    (r"^label_enc\.", "denoising.label_embed."),
    (r"^decoder\.ref_point_head\.", "decoder.query_pos."),
    (r"self_attn\.in_proj_", "sa_proj.in_proj."),
    (r"\.(linear[12])\.", r".ffn.\1."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.ffn.norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.ffn.norm."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.norm_cross."),  # officially norm1 follows cross-attention
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.norm1."),
    (r"\.norm_cross\.", ".norm2."),
    (r"^class_embed\.\d+\.", "class_head."),
    (r"^bbox_embed\.\d+\.", "box_head."),
)


def rename_official(state):
    """The entries of an official state_dict under our names. Raises nothing: load_official is strict."""
    renamed = {}
    for name, tensor in state.items():
        for official, ours in OFFICIAL_NAMES:
            name = re.sub(official, ours, name)
        renamed[name] = tensor
    return renamed


def load_official(model, checkpoint):
    """Copy an official checkpoint, {"model": state_dict} or a bare state_dict. Strict: RuntimeError."""
    model.load_state_dict(rename_official(checkpoint.get("model", checkpoint)))


# ---- python THIS_FILE.py: the size of each part, and the outputs for two random images ---------------------
if __name__ == "__main__":
    model = build(num_classes=91, pretrained_backbone=False).eval()
    for name, part in [*model.named_children(), ("together", model)]:
        print(f"{name:12} {sum(p.numel() for p in part.parameters()):12,} parameters")
    with torch.no_grad():
        out = model(torch.randn(2, 3, 256, 320), torch.zeros(2, 256, 320, dtype=torch.bool))
    print({name: list(out[name].shape) for name in ("logits", "boxes")})
