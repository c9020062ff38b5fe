"""AdaMixer: A Fast-Converging Query-Based Object Detector.

Ziteng Gao, Limin Wang, Bing Han, Sheng Guo.
CVPR 2022, arXiv:2203.16507. Official code: github.com/MCG-NJU/AdaMixer (MIT).

The idea: a query has a place (x, y) and a scale z in the feature pyramid, and samples features at points
around it in all three. It mixes them with weights that it predicts, first the channels, then the points.
So the decoder adapts to every object, and needs neither an encoder nor a feature pyramid network.

Diff me against: detr.py. There is no encoder, and in the decoder only self-attention stays.

Departures from the official code; tests/test_golden.py checks that the numbers are the same:
    Backbone lists those of all files.
    losses are normalised by the number of objects, at least 1; officially a batch without any gives NaN.
    backbone_norm="frozen" keeps all of batch norm; officially its scale and shift are trained in C3 to C5.
    one drop of the learning rate after epoch 8; officially a second one after epoch 11.
As in the official code: padding is read like image (there are no masks), and boxes may leave [0, 1].
"""
import math
import re

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

# How the paper trains it; train.py reads this.
RECIPE = dict(
    epochs=12,  # section 4.1, 1x schedule
    lr_drop=8,
    batch_size=16,
    lr=2.5e-5,
    lr_backbone=2.5e-5,
    slow_parameters=(),
    weight_decay=1e-4,
    clip_norm=1.0,
    class_loss="focal",
    w_class=2,
    w_l1=5,
    w_giou=2,
    corner_l1=True,
    free_boxes=True,
)

# For train.py --preset paper.
PAPER = dict(warmup=500)

# For train.py --preset laptop: no encoder, fewer points, maps of strides 4 and 8.
LAPTOP = dict(steps=1300, enc_layers=0, in_points=16, out_points=32)

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


def sine(x, dim, temperature=10000):
    """Encoding of coordinates x [...] in [0, 1]: [..., dim], sin and cos interleaved."""
    i = torch.arange(dim // 2, device=x.device, dtype=torch.float32)
    angle = x.float()[..., None] * 2 * math.pi / temperature ** (2 * i / dim)  # [..., dim/2]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)  # [..., dim]


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


# ---- Maps and places (paper, section 3.1) ------------------------------------------------------------------
def image_size(mask):
    """Size of every image without its padding, in pixels: mask [B, H, W] -> (width, height) [B, 2]."""
    return torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)], dim=-1)


class PyramidBackbone(Backbone):
    """Backbone that returns C2 (stride 4) as well: 3 or 4 maps."""

    def __init__(self, name, pretrained, norm, dilation, last_stage):
        super().__init__(name, pretrained, norm, dilation, last_stage)
        self.channels = [self.channels[0] // 2] + self.channels
        self.strides = [4, 8, 16, 16 if dilation else 32][:last_stage]

    def forward(self, images):
        x = images.contiguous(memory_format=torch.channels_last)
        x = self.body.maxpool(self.body.relu(self.body.bn1(self.body.conv1(x))))  # [B, 64, H/4, W/4]
        features = []
        for stage in ["layer1", *self.stages]:
            x = getattr(self.body, stage)(x)  # [B, ., H/4, W/4], then H/8, H/16, H/32
            features.append(x)
        return features


def box_size(xyzr):
    """[..., 4] -> (w, h) [..., 2] in pixels: z is log2 of the geometric mean, r log2 of h / w."""
    z, r = xyzr[..., 2:].split(1, dim=-1)
    return 2 ** torch.cat([z - r / 2, z + r / 2], dim=-1)


def overlap_bias(xyzr, tau):
    """tau log(share of box i that lies in box j), for self-attention: [B, Q, 4], tau [M] -> [B, M, Q, Q]."""
    centre, half = xyzr[..., :2], box_size(xyzr) / 2  # [B, Q, 2] each
    low = torch.maximum((centre - half)[:, :, None], (centre - half)[:, None])  # [B, Q, Q, 2]
    high = torch.minimum((centre + half)[:, :, None], (centre + half)[:, None])  # [B, Q, Q, 2]
    area = (2 * half).prod(-1)[..., None].clamp(min=1e-6)  # [B, Q, 1]
    share = (high - low).clamp(min=0).prod(-1) / area  # [B, Q, Q]
    return tau[:, None, None] * (share + 1e-7).log()[:, None]


# ---- Adaptive 3-D sampling (paper, section 3.2) ------------------------------------------------------------
class Sampler(nn.Module):
    """Features at K points of G groups in x, y and scale: tgt [B, Q, D], xyzr [B, Q, 4] -> [B, Q, G, K, D/G].

    maps are L x [G*B, D/G, h, w], so every group has its own channels, with L strides.
    """

    def __init__(self, hidden_dim, groups, points):
        super().__init__()
        self.groups = groups
        self.offsets = nn.Linear(hidden_dim, groups * points * 3)

    def reset_parameters(self):
        """Points start all over the box and at half its size, whatever the query is."""
        nn.init.zeros_(self.offsets.weight)
        with torch.no_grad():
            bias = self.offsets.bias.view(-1, 3)
            bias[:, :2].uniform_(-0.5, 0.5)
            bias[:, 2] = -1.0

    def samples(self, tgt, xyzr):
        """Where to look: x, y in pixels and the level, log2 of a stride: [B, Q, G, K, 3]."""
        offsets = self.offsets(tgt).unflatten(-1, (self.groups, -1, 3))  # [B, Q, G, K, 3]
        xyzr = xyzr[:, :, None, None]  # [B, Q, 1, 1, 4]
        xy = xyzr[..., :2] + offsets[..., :2] * box_size(xyzr)  # offsets are in units of the box
        return torch.cat([xy, xyzr[..., 2:3] + offsets[..., 2:]], dim=-1)

    def forward(self, tgt, xyzr, maps, strides):
        samples = self.samples(tgt, xyzr).permute(2, 0, 1, 3, 4).flatten(0, 1)  # [G*B, Q, K, 3]
        x, y, level = samples.unbind(-1)  # [G*B, Q, K] each
        levels = torch.tensor(strides, device=tgt.device).log2()  # [L]
        # How much a level counts: a Gaussian around the level of the point, and they sum to 1 over levels
        weights = (-(level[..., None] - levels).square() / 2).softmax(-1)  # [G*B, Q, K, L]
        total = 0
        for i, (feature_map, stride) in enumerate(zip(maps, strides)):
            h, w = feature_map.shape[-2:]
            grid = torch.stack([x / (w * stride), y / (h * stride)], dim=-1) * 2 - 1  # [G*B, Q, K, 2]
            sampled = F.grid_sample(feature_map.to(grid.dtype), grid, align_corners=False)  # [G*B, D/G, Q, K]
            total = total + sampled * weights[:, None, :, :, i]
        total = total.unflatten(0, (self.groups, -1))  # [G, B, D/G, Q, K]
        return total.permute(1, 3, 0, 4, 2)  # [B, Q, G, K, D/G]


# ---- Adaptive mixing (paper, section 3.3) ------------------------------------------------------------------
class Mixer(nn.Module):
    """Samples, mixed with weights made from the query: tgt [B, Q, D], x [B, Q, G, K, D/G] -> [B, Q, D]."""

    def __init__(self, hidden_dim, groups, in_points, out_points):
        super().__init__()
        width = hidden_dim // groups
        self.shapes = (width, width), (out_points, in_points)
        self.weights = nn.Linear(hidden_dim, groups * (width * width + out_points * in_points))
        self.out_proj = nn.Linear(groups * out_points * width, hidden_dim)
        self.groups = groups

    def forward(self, tgt, x):
        channels, points = self.shapes
        weights = self.weights(tgt).unflatten(-1, (self.groups, -1))  # [B, Q, G, .]
        M, S = weights.split([channels[0] * channels[1], points[0] * points[1]], dim=-1)
        # Channels: relu(norm(x M)); the norm runs over points and channels of a group, without parameters
        x = x @ M.unflatten(-1, channels)  # [B, Q, G, K, D/G]
        x = F.layer_norm(x, x.shape[-2:]).relu()
        # Points: relu(norm(S x))
        x = S.unflatten(-1, points) @ x  # [B, Q, G, out, D/G]
        x = F.layer_norm(x, x.shape[-2:]).relu()
        return self.out_proj(x.flatten(2))  # [B, Q, D]


# ---- Decoder: queries look at each other, then at the image ------------------------------------------------
class Head(nn.Module):
    """Linear, norm, ReLU, linear: [..., D] -> [..., out_dim]."""

    def __init__(self, hidden_dim, out_dim):
        super().__init__()
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.out = nn.Linear(hidden_dim, out_dim)

    def forward(self, x):
        return self.out(self.norm(self.hidden(x)).relu())


class DecoderLayer(nn.Module):
    """Queries look at each other, then at the image: tgt [B, Q, D], xyzr [B, Q, 4] -> both, and logits."""

    def __init__(self, num_classes, hidden_dim, nheads, dim_feedforward, dropout, groups, points, out_points):
        super().__init__()
        self.tau = nn.Parameter(torch.empty(nheads).uniform_(0, 4))
        self.sa_proj = QKVProjection(hidden_dim)
        self.self_attn = Attention(hidden_dim, nheads, dropout)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.sampler = Sampler(hidden_dim, groups, points)
        self.mixer = Mixer(hidden_dim, groups, points, out_points)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.ffn = FeedForward(hidden_dim, dim_feedforward, dropout)
        self.dropout = nn.Dropout(dropout)
        self.class_head = Head(hidden_dim, num_classes)
        self.box_head = Head(hidden_dim, 4)

    def forward(self, tgt, xyzr, maps, strides):
        # x and y in thousands of pixels; values and the residual also get the position (as official)
        place = xyzr / xyzr.new_tensor([1000, 1000, 1, 1])  # [B, Q, 4]
        tgt = tgt + sine(place / (2 * math.pi), tgt.shape[-1] // 4).flatten(-2)  # [B, Q, D]
        q, k, v = self.sa_proj(tgt, tgt, tgt)  # 3 x [B, Q, D]
        bias = overlap_bias(xyzr, self.tau)  # [B, M, Q, Q]
        tgt = self.norm1(tgt + self.dropout(self.self_attn(q, k, v, bias=bias)))

        # No keys: where to look, and how to mix the samples, depend only on the query
        sampled = self.sampler(tgt, xyzr, maps, strides)  # [B, Q, G, K, D/G]
        tgt = self.norm2(tgt + self.dropout(self.mixer(tgt, sampled)))
        tgt = self.ffn(tgt)
        move, zoom = self.box_head(tgt).chunk(2, dim=-1)  # [B, Q, 2] each
        xy = xyzr[..., :2] + move * 2 ** xyzr[..., 2:3]  # in units of 2^z, not of w and h (as official)
        return tgt, torch.cat([xy, xyzr[..., 2:] + zoom], dim=-1), self.class_head(tgt)


class Decoder(nn.Module):
    """Layers in a row, each supervised: tgt [B, Q, D], xyzr [B, Q, 4] -> logits [S, B, Q, C] and xyzr."""

    def __init__(self, num_layers, *sizes):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(*sizes) for _ in range(num_layers))

    def forward(self, tgt, xyzr, maps, strides):
        logits, places = [], []
        for layer in self.layers:
            tgt, xyzr, scores = layer(tgt, xyzr.detach(), maps, strides)  # content keeps its gradient
            logits.append(scores)
            places.append(xyzr)
        return torch.stack(logits), torch.stack(places)


# ---- The model ---------------------------------------------------------------------------------------------
class AdaMixer(nn.Module):
    """Backbone, decoder with heads: images [B, 3, H, W] -> S times Q classes and boxes for each."""

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
        enc_layers=0,
        dec_layers=6,
        dim_feedforward=2048,
        dropout=0.0,
        num_queries=100,
        in_points=32,
        out_points=128,
        n_groups=4,
    ):
        super().__init__()
        if hidden_dim % nheads or hidden_dim % 4:  # equal heads; sin and cos of x and y
            raise ValueError(f"hidden_dim {hidden_dim} must be a multiple of nheads ({nheads}) and of 4")
        if enc_layers:
            raise ValueError(f"enc_layers is {enc_layers}, it must be 0: AdaMixer has no encoder")
        if hidden_dim % n_groups or hidden_dim % 32:
            raise ValueError(f"hidden_dim is {hidden_dim}, it must be a multiple of n_groups and of 32")
        self.backbone = PyramidBackbone(backbone, pretrained_backbone, backbone_norm, dilation, last_stage)
        convs = [nn.Conv2d(c, hidden_dim, kernel_size=1) for c in self.backbone.channels]
        self.input_proj = nn.ModuleList(convs)
        self.input_norm = nn.GroupNorm(32, hidden_dim)  # one for all maps
        self.n_groups = n_groups
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.init_boxes = nn.Embedding(num_queries, 4)  # the whole image, never trained (as official)
        self.decoder = Decoder(
            dec_layers, num_classes, hidden_dim, nheads, dim_feedforward, dropout,
            n_groups, in_points, out_points)
        for module in (self.input_proj, self.decoder):
            xavier_uniform(module)
        for conv in self.input_proj:
            nn.init.zeros_(conv.bias)
        with torch.no_grad():
            self.init_boxes.weight.copy_(torch.tensor([0.5, 0.5, 1.0, 1.0]))
        self.init_boxes.weight.requires_grad_(False)
        for layer in self.decoder.layers:
            layer.sampler.reset_parameters()
            nn.init.zeros_(layer.mixer.weights.weight)  # all queries mix alike at first
            nn.init.constant_(layer.class_head.out.bias, -math.log(99))  # every class starts at p = 0.01
            nn.init.zeros_(layer.box_head.out.weight)
            nn.init.zeros_(layer.box_head.out.bias)

    def forward(self, images, mask):
        """images [B, 3, H, W], mask [B, H, W] -> {"logits": [S, B, Q, C], "boxes": [S, B, Q, 4]}."""
        check_input(images, mask)
        size = image_size(mask)[:, None].to(images.dtype)  # [B, 1, 2]
        maps = [self.input_norm(conv(x)) for conv, x in zip(self.input_proj, self.backbone(images))]
        maps = [torch.cat(m.chunk(self.n_groups, dim=1)) for m in maps]  # L x [G*B, D/G, h, w]

        # (x, y, z, r): the centre in pixels, log2 of the geometric mean of w and h, and log2 of h / w
        box = self.init_boxes.weight * size.repeat(1, 1, 2)  # [B, Q, 4]
        w, h = box[..., 2:].log2().split(1, dim=-1)  # [B, Q, 1] each
        xyzr = torch.cat([box[..., :2], (w + h) / 2, h - w], dim=-1)  # [B, Q, 4]
        tgt = F.layer_norm(self.query_embed.weight, self.query_embed.weight.shape[1:])  # [Q, D]
        tgt = tgt.expand(images.shape[0], -1, -1)  # [B, Q, D]
        logits, xyzr = self.decoder(tgt, xyzr, maps, self.backbone.strides)
        boxes = torch.cat([xyzr[..., :2] / size, box_size(xyzr) / size], dim=-1)  # [S, B, Q, 4]
        return {"logits": logits, "boxes": boxes}


def build(num_classes, **options):
    """The model; options are those of the class. Raises ValueError (wrong value), TypeError (unknown)."""
    return AdaMixer(num_classes, **options)


# Official parameter names (regular expressions) and ours.
OFFICIAL_NAMES = (
    (r"^backbone\.", "backbone.body."),
    (r"^neck\.lateral_convs\.(\d+)\.conv\.", r"input_proj.\1."),
    (r"^neck\.gn_out\.", "input_norm."),
    (r"^rpn_head\.init_content_features\.", "query_embed."),
    (r"^rpn_head\.init_proposal_bboxes\.", "init_boxes."),
    (r"^roi_head\.bbox_head\.", "decoder.layers."),
    (r"\.iof_tau$", ".tau"),
    (r"\.attention\.attn\.in_proj_", ".sa_proj.in_proj."),
    (r"\.attention\.attn\.", ".self_attn."),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.sampling_n_mixing\.sampling_offset_generator\.0\.", ".sampler.offsets."),
    (r"\.sampling_n_mixing\.adaptive_mixing\.parameter_generator\.0\.", ".mixer.weights."),
    (r"\.sampling_n_mixing\.adaptive_mixing\.out_proj\.", ".mixer.out_proj."),
    (r"\.sampling_n_mixing\.norm\.", ".norm2."),
    (r"\.ffn\.layers\.0\.0\.", ".ffn.linear1."),
    (r"\.ffn\.layers\.1\.", ".ffn.linear2."),
    (r"\.ffn_norm\.", ".ffn.norm."),
    (r"\.cls_fcs\.0\.", ".class_head.hidden."),
    (r"\.cls_fcs\.1\.", ".class_head.norm."),
    (r"\.fc_cls\.", ".class_head.out."),
    (r"\.reg_fcs\.0\.", ".box_head.hidden."),
    (r"\.reg_fcs\.1\.", ".box_head.norm."),
    (r"\.fc_reg\.", ".box_head.out."),
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
