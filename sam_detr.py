"""Accelerating DETR Convergence via Semantic-Aligned Matching (SAM-DETR).

Gongjie Zhang, Zhipeng Luo, Yingchen Yu, Kaiwen Cui, Shijian Lu.
CVPR 2022, arXiv:2203.06883. Official code: github.com/ZhangGongjie/SAM-DETR (Apache-2.0).

The idea: the numbers in a query and in the features mean different things, so cross-attention takes long to
learn what matches. Here every decoder layer builds new queries from the image: each head takes the feature at
one salient point inside the query's reference box, and the old query only re-weights its channels.

Diff me against: conditional_detr.py. Independent of the idea are the boxes that each layer refines with its
own heads (as in Deformable DETR) and smca (from SMCA-DETR). relatives/sam_detr_multiscale.py has more levels.

Departures from the official code; tests/test_golden.py checks that the numbers are the same:
    Backbone lists those of all files.
    RoIAlign runs once per layer and boxes are computed once; the official code does both twice.
    any number of heads and decoder layers works; the official code stops at 6 layers and has 8 hard-coded.
    salient points start at the centre of their box; the official ones, by mistake, anywhere in it.
    input_norm is an option; the official code normalises the single-scale input if trained for < 25 epochs.
Left out on purpose: segmentation heads.
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
    epochs=50,  # section 4; or 12 with lr_drop=10
    lr_drop=40,
    batch_size=16,
    lr=1e-4,
    lr_backbone=1e-5,
    slow_parameters=(),
    weight_decay=1e-4,
    clip_norm=0.1,
    class_loss="focal",
    w_class=2,
    w_l1=5,
    w_giou=2,
)

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


# ---- Encoder: global self-attention over the feature map ---------------------------------------------------
class EncoderLayer(nn.Module):
    """Every token looks at the others, then the feed-forward block: src, pos [B, T, D] -> [B, T, D]."""

    def __init__(self, hidden_dim, nheads, dim_feedforward, dropout):
        super().__init__()
        self.sa_proj = QKVProjection(hidden_dim)
        self.self_attn = Attention(hidden_dim, nheads, dropout)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.ffn = FeedForward(hidden_dim, dim_feedforward, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, src, pos, mask):
        # Positions go into queries and keys of every layer and never into values: they steer where to look.
        q, k, v = self.sa_proj(src + pos, src + pos, src)  # 3 x [B, T, D]
        src = self.norm1(src + self.dropout(self.self_attn(q, k, v, mask)))
        return self.ffn(src)


class Encoder(nn.Module):
    """Layers in a row: src, pos [B, T, D], mask [B, T] -> memory [B, T, D]."""

    def __init__(self, num_layers, hidden_dim, nheads, dim_feedforward, dropout):
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(hidden_dim, nheads, dim_feedforward, dropout)
            for _ in range(num_layers))

    def forward(self, src, pos, mask):
        for layer in self.layers:
            src = layer(src, pos, mask)
        return src


# ---- Semantics Aligner: queries made of what they are to match (paper, section 3) --------------------------
def sine_xy(xy, dim, temperature=10000):
    """Sine encoding of points [..., 2], (x, y) in [0, 1]: [..., dim], y first as in sine_positions."""
    return sine(xy.flip(-1), dim // 2, temperature).flatten(-2)  # [..., dim]


def valid_size(mask):
    """Width and height, in cells, of the part of a padded map [B, h, w] that is image: [B, 2]."""
    return torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)], dim=-1)  # [B, 2]


def linear_weights(places, cells):
    """Weights of the cells 0, 1, ... in a linear interpolation at `places`: [...] -> [..., cells]."""
    # Not relu(1 - |places - cell|), which has no gradient at the centre of a cell, where all points start
    cell = torch.arange(cells, device=places.device)
    left = places.floor()[..., None]
    share = places[..., None] - left  # of the cell on the right
    return (cell == left) * (1 - share) + (cell == left + 1) * share


def bin_weights(centre, size, cells, bins):
    """RoIAlign along one axis is a matrix: centre and size [B, Q] of boxes, in cells -> [B, Q, bins, cells].

    A bin is the mean of ceil(its size) samples. Samples more than one cell outside of the map are 0, others
    are moved to the centres of its outermost cells. Source: torchvision's roi_align with aligned=True.
    """
    size = size[..., None, None] / bins  # [B, Q, 1, 1], of a bin
    n = size.ceil()  # of its samples; none in an empty box
    i = torch.arange(2 * cells // bins + 2, device=size.device)  # enough for twice the map; export needs > 1
    k = torch.arange(bins, device=size.device)[:, None] - bins / 2  # [bins, 1], from the box's centre
    places = centre[..., None, None] - 0.5 + size * (k + (i + 0.5) / n.clamp(min=1))  # [B, Q, bins, samples]
    counts = (i < n) & (places >= -1) & (places <= cells)
    weights = linear_weights(places.clamp(0, cells - 1), cells) * counts[..., None]  # [.., samples, cells]
    return weights.sum(-2) / n.clamp(min=1)  # [B, Q, bins, cells]


class SemanticsAligner(nn.Module):
    """New content and position for every query and head, sampled from the image inside the reference box.

    tgt [B, Q, D], reference [B, Q, 4], memory [B, h*w, D], mask [B, h, w] -> content, position [B, Q, M, D],
    points [B, Q, M, 2] as (x, y) in [0, 1] of the image; scale [B, Q, M, 2] with smca, else None.
    """

    bins = 7  # of a region, along each axis

    def __init__(self, hidden_dim, nheads, temperature, smca):
        super().__init__()
        self.nheads = nheads
        self.temperature = temperature
        self.smca = smca
        self.point_conv = nn.Conv2d(hidden_dim, hidden_dim // 4, kernel_size=1)
        self.point_mlp = nn.Sequential(
            nn.Linear(hidden_dim // 4 * self.bins ** 2, hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, 2 * hidden_dim), nn.ReLU(),
            nn.Linear(2 * hidden_dim, 2 * hidden_dim), nn.ReLU(),
            nn.Linear(2 * hidden_dim, nheads * (4 if smca else 2)))
        self.reweight_content = nn.Linear(hidden_dim, nheads * hidden_dim)
        self.reweight_position = nn.Linear(hidden_dim, nheads * hidden_dim)

    def centre_points(self):
        """Start every point at the centre of its box; for after Xavier initialisation (official: before)."""
        # Not the scales of smca: they are used squared, so zeros would get no gradient
        nn.init.zeros_(self.point_mlp[-1].weight[:2 * self.nheads])
        nn.init.zeros_(self.point_mlp[-1].bias)

    def forward(self, tgt, reference, memory, mask):
        (B, Q, D), (h, w), bins = tgt.shape, mask.shape[1:], self.bins
        # Boxes are relative to the image, hence the valid size. Where one reaches over the image's edge, it
        # reads what the encoder wrote on padding (as in the official code): so padding changes numbers more.
        boxes = reference.detach() * valid_size(mask).repeat(1, 2)[:, None]  # [B, Q, 4], in cells
        columns = bin_weights(boxes[..., 0], boxes[..., 2], w, bins)  # [B, Q, 7, w]
        rows = bin_weights(boxes[..., 1], boxes[..., 3], h, bins)  # [B, Q, 7, h]
        # F_R = RoIAlign(F, box) = rows F columns^T in every channel. The 1x1 convolution is also linear and
        # goes first, so regions have D/4 channels. Its bias goes last: F is 0 outside of the map.
        narrow = F.linear(memory, self.point_conv.weight.flatten(1)).view(B, h, w, D // 4)
        regions = rows.flatten(1, 2)[:, None] @ narrow.transpose(1, 2)  # [B, w, Q*7, D/4]
        regions = regions.transpose(1, 2).unflatten(1, (Q, bins))  # [B, Q, 7, w, D/4]
        regions = columns[:, :, None] @ regions  # [B, Q, 7, 7, D/4]
        regions = (regions + self.point_conv.bias).relu().movedim(-1, 2)  # [B, Q, D/4, 7, 7]
        # R_SP = MLP(ConvNet(F_R)): one point per head, in [-1, 1] of the box; with smca one scale as well
        xy = self.point_mlp(regions.flatten(2)).view(B, Q, -1, self.nheads, 2)  # [B, Q, 1 or 2, M, 2]
        in_box, scale = xy[:, :, 0].tanh(), xy[:, :, 1] if self.smca else None  # [B, Q, M, 2] twice

        # A head's content is F_R at its point: all D channels, not D/M of them. This is also linear in F: the
        # point's weights of the 7 bins, times the bins' weights of the cells, are a weight for every cell.
        x, y = ((in_box.float() + 1) * bins / 2 - 0.5).unbind(-1)  # [B, Q, M] twice, in bins
        x = linear_weights(x, bins) @ columns  # [B, Q, M, w]
        y = linear_weights(y, bins) @ rows  # [B, Q, M, h]
        weights = y[..., None] * x[..., None, :]  # [B, Q, M, h, w]
        content = (weights.view(B, -1, h * w) @ memory).view(B, Q, self.nheads, D)
        centre, wh = reference[:, :, None].chunk(2, dim=-1)  # [B, Q, 1, 2] twice
        points = centre + in_box * wh / 2  # [B, Q, M, 2], in [0, 1] of the image
        position = sine_xy(points.detach(), D, self.temperature)  # [B, Q, M, D]; points learn by the content
        # The old query decides which channels count: Sigmoid(Linear(Q))
        content = content * self.reweight_content(tgt).sigmoid().view_as(content)
        position = position * self.reweight_position(tgt).sigmoid().view_as(position)
        return content, position, points, scale


def gaussian_bias(points, scale, mask):
    """SMCA's log-Gaussian around points [B, Q, M, 2], scale [B, Q, M, 2], mask [B, h, w]: [B, M, Q, h*w]."""
    h, w = mask.shape[1:]
    points = (points * valid_size(mask)[:, None, None]).transpose(1, 2)  # [B, M, Q, 2], in cells
    scale = scale.transpose(1, 2)  # [B, M, Q, 2]
    x = scale[..., :1] * (torch.arange(w, device=mask.device) + 0.5 - points[..., :1])  # [B, M, Q, w]
    y = scale[..., 1:] * (torch.arange(h, device=mask.device) + 0.5 - points[..., 1:])  # [B, M, Q, h]
    squares = y.square()[..., None] + x.square()[..., None, :]  # [B, M, Q, h, w]
    return -squares.flatten(3) / 8  # [B, M, Q, h*w]; the 8 is SMCA-DETR's


class SharedKeyAttention(Attention):
    """Attention whose M heads, each D wide, share the key: q [B, Q, M*D], k [B, T, D]; else as Attention."""

    def forward(self, q, k, v, mask, bias=None):
        q = q.unflatten(-1, (self.nheads, -1)) / math.sqrt(k.shape[-1])  # [B, Q, M, D]
        scores = torch.einsum("bqmd,btd->bmqt", q, k)  # [B, M, Q, T]
        scores = scores if bias is None else scores + bias
        weights = scores.masked_fill(mask[:, None, None], -math.inf).softmax(-1)
        v = v.unflatten(-1, (self.nheads, -1)).transpose(1, 2)  # [B, M, T, D/M]
        out = F.dropout(weights, self.dropout, self.training) @ v  # [B, M, Q, D/M]
        return self.out_proj(out.transpose(1, 2).flatten(2))  # [B, Q, D]


# ---- Decoder: queries look at each other, then at the image ------------------------------------------------
class DecoderLayer(nn.Module):
    """Queries look at each other, then at the image: tgt [B, Q, D], memory [B, T, D] -> [B, Q, D]."""

    def __init__(self, hidden_dim, nheads, dim_feedforward, dropout, temperature, smca):
        super().__init__()
        # Content and position also have separate maps in self-attention; the paper shows cross-attention.
        self.sa_q_content = nn.Linear(hidden_dim, hidden_dim)
        self.sa_q_pos = nn.Linear(hidden_dim, hidden_dim)
        self.sa_k_content = nn.Linear(hidden_dim, hidden_dim)
        self.sa_k_pos = nn.Linear(hidden_dim, hidden_dim)
        self.sa_v = nn.Linear(hidden_dim, hidden_dim)
        self.self_attn = Attention(hidden_dim, nheads, dropout)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.aligner = SemanticsAligner(hidden_dim, nheads, temperature, smca)
        self.ca_q_content = nn.Linear(hidden_dim, hidden_dim)
        self.ca_q_sine = MLP(hidden_dim, hidden_dim, hidden_dim, depth=2)
        self.ca_k_content = nn.Linear(hidden_dim, hidden_dim)
        self.ca_k_sine = MLP(hidden_dim, hidden_dim, hidden_dim, depth=2)
        self.ca_v = nn.Linear(hidden_dim, hidden_dim)
        self.cross_attn = SharedKeyAttention(hidden_dim, nheads, dropout)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.ffn = FeedForward(hidden_dim, dim_feedforward, dropout)
        self.dropout = nn.Dropout(dropout)
        self.nheads = nheads

    def forward(self, tgt, query_pos, reference, memory, pos, mask):
        # In layer 1 tgt is zero and every query gets the same vector (as in the official code).
        q = self.sa_q_content(tgt) + self.sa_q_pos(query_pos)  # [B, Q, D]
        k = self.sa_k_content(tgt) + self.sa_k_pos(query_pos)  # [B, Q, D]
        v = self.sa_v(tgt)  # [B, Q, D]
        tgt = self.norm1(tgt + self.dropout(self.self_attn(q, k, v)))

        # Every head compares whole features of width D: each has its own query, and all share the key
        content, position, points, scale = self.aligner(tgt, reference, memory, mask)
        q = self.ca_q_content(content) + self.ca_q_sine(position)  # [B, Q, M, D]
        k = self.ca_k_content(memory) + self.ca_k_sine(pos)  # [B, T, D]
        v = self.ca_v(memory)  # [B, T, D]
        bias = None if scale is None else gaussian_bias(points, scale, mask)  # [B, M, Q, T]
        tgt = self.norm2(tgt + self.dropout(self.cross_attn(q.flatten(2), k, v, mask.flatten(1), bias)))
        return self.ffn(tgt)


class Decoder(nn.Module):
    """Layers in a row, each refines its boxes: reference [B, Q, 4] -> hs [S, B, Q, D], boxes [S, B, Q, 4]."""

    def __init__(self, num_layers, hidden_dim, nheads, dim_feedforward, dropout, temperature, smca):
        super().__init__()
        self.temperature = temperature
        self.layers = nn.ModuleList(
            DecoderLayer(hidden_dim, nheads, dim_feedforward, dropout, temperature, smca)
            for _ in range(num_layers))

    def forward(self, reference, box_heads, memory, pos, mask):
        tgt = memory.new_zeros(*reference.shape[:2], memory.shape[-1])  # [B, Q, D]; content starts at zero
        outputs, boxes = [], []
        for layer, box_head in zip(self.layers, box_heads):
            xy = reference[..., :2].detach()  # [B, Q, 2]; width and height are not encoded
            query_pos = sine_xy(xy, tgt.shape[-1], self.temperature)  # [B, Q, D]
            tgt = layer(tgt, query_pos, reference, memory, pos, mask)
            outputs.append(tgt)  # no final norm (DETR has one)
            # Relative to the reference; eps keeps its logit finite on the image's edge, 0 or 1
            boxes.append((box_head(tgt) + reference.logit(eps=1e-5)).sigmoid())
            reference = boxes[-1].detach()  # no gradient from one layer's box to the previous one
        return torch.stack(outputs), torch.stack(boxes)


# ---- The model ---------------------------------------------------------------------------------------------
class SAMDETR(nn.Module):
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
        dropout=0.1,
        num_queries=300,
        temperature=10000,  # of sine positions; lower is better for small maps (DAB-DETR, section 4.5)
        smca=False,
        input_norm=False,
    ):
        super().__init__()
        if hidden_dim % nheads or hidden_dim % 4:  # equal heads; sin and cos of x and y
            raise ValueError(f"hidden_dim {hidden_dim} must be a multiple of nheads ({nheads}) and of 4")
        self.backbone = Backbone(backbone, pretrained_backbone, backbone_norm, dilation, last_stage)
        self.input_proj = nn.Conv2d(self.backbone.channels[-1], hidden_dim, kernel_size=1)
        norm = nn.GroupNorm(32, hidden_dim) if input_norm else nn.Identity()
        self.input_proj = nn.ModuleList([nn.Sequential(self.input_proj, norm)])  # one level
        self.encoder = Encoder(enc_layers, hidden_dim, nheads, dim_feedforward, dropout)
        self.query_embed = nn.Embedding(num_queries, 4)  # boxes, before the sigmoid
        self.temperature = temperature
        self.decoder = Decoder(dec_layers, hidden_dim, nheads, dim_feedforward, dropout, temperature, smca)
        self.class_head = nn.Linear(hidden_dim, num_classes)
        self.box_head = MLP(hidden_dim, hidden_dim, 4, depth=3)
        xavier_uniform(self.encoder)
        xavier_uniform(self.decoder)
        for layer in self.decoder.layers:
            layer.aligner.centre_points()
        nn.init.constant_(self.class_head.bias, -math.log(99))  # every class starts at p = 0.01
        nn.init.zeros_(self.box_head.layers[-1].weight)
        nn.init.zeros_(self.box_head.layers[-1].bias)
        # Layers refine boxes, so each has a pair of heads
        self.class_head = nn.ModuleList(copy.deepcopy(self.class_head) for _ in range(dec_layers))
        self.box_head = nn.ModuleList(copy.deepcopy(self.box_head) for _ in range(dec_layers))

    def forward(self, images, mask):
        """images [B, 3, H, W], mask [B, H, W] -> {"logits": [S, B, Q, C], "boxes": [S, B, Q, 4]}."""
        check_input(images, mask)
        features = self.input_proj[0](self.backbone(images)[-1])  # [B, D, h, w]
        mask = resize_mask(mask, features.shape[-2:])  # [B, h, w]
        pos = sine_positions(mask, features.shape[1], offset=0.5, temperature=self.temperature)  # [B, T, D]

        src = features.flatten(2).transpose(1, 2)  # [B, T, D]
        memory = self.encoder(src, pos, mask.flatten(1))  # [B, T, D]
        reference = self.query_embed.weight.sigmoid().expand(images.shape[0], -1, -1)  # [B, Q, 4]
        hs, boxes = self.decoder(reference, self.box_head, memory, pos, mask)  # [S, B, Q, D], [S, B, Q, 4]
        logits = torch.stack([head(h) for head, h in zip(self.class_head, hs)])  # [S, B, Q, C]
        return {"logits": logits, "boxes": boxes}


def build(num_classes, **options):
    """The model; options are those of the class. Raises ValueError (wrong value), TypeError (unknown)."""
    return SAMDETR(num_classes, **options)


# Official parameter names (regular expressions) and ours.
OFFICIAL_NAMES = (
    (r"^backbone\.0\.body\.", "backbone.body."),
    (r"^transformer\.decoder\.(class|bbox)_embed\.", r"\1_embed."),  # the same heads, listed twice
    (r"^transformer\.", ""),
    (r"^input_proj\.(0\.)?(weight|bias)$", r"input_proj.0.0.\2"),
    (r"self_attn\.in_proj_", "sa_proj.in_proj."),
    (r"\.(sa|ca)_([qk])content_proj\.", r".\1_\2_content."),
    (r"\.(sa|ca)_([qk])pos_proj\.", r".\1_\2_pos."),
    (r"\.(sa|ca)_v_proj\.", r".\1_v."),
    (r"\.ca_([qk])pos_sine_proj\.", r".ca_\1_sine."),
    (r"\.point1\.0\.", ".aligner.point_conv."),
    (r"\.point2\.", ".aligner.point_mlp."),
    (r"\.attn1\.", ".aligner.reweight_content."),
    (r"\.attn2\.", ".aligner.reweight_position."),
    (r"\.(linear[12])\.", r".ffn.\1."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.ffn.norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.ffn.norm."),
    (r"^class_embed\.", "class_head."),
    (r"^bbox_embed\.", "box_head."),
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
