"""SMCA-DETR: Fast Convergence of DETR with Spatially Modulated Co-Attention.

Peng Gao, Minghang Zheng, Xiaogang Wang, Jifeng Dai, Hongsheng Li.
ICCV 2021, arXiv:2101.07448. Official code: github.com/gaopengcuhk/SMCA-DETR (no licence; nothing is copied).

The idea: a DETR query has to learn where its object can be, and that takes long. Here every query predicts a
centre first, and every head an offset and a scale; a Gaussian around that point multiplies cross-attention.
Attention is near the object from the start, and the box is predicted relative to the same centre.

Diff me against: detr.py. Independent of the idea are 300 queries and the focal loss, which came with it.

Departures from the official code; tests/test_golden.py checks that the numbers are the same:
    Backbone lists those of all files.
    centres are divided by the real stride; officially by 32, so DC5 reaches a quarter of its map.
As in the official code, unlike the paper: a large scale makes a narrow Gaussian (the paper divides by it);
there is one sigmoid more than there are classes, trained towards 0.
Left out on purpose: multi-scale encoder features with scale selection, which are another code base.
"""
import math
import re

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

# How the paper trains it; train.py reads this.
RECIPE = dict(
    epochs=50,  # section 4.1
    lr_drop=40,
    batch_size=16,
    lr=1e-4,
    lr_backbone=1e-5,
    slow_parameters=(),
    weight_decay=1e-4,
    clip_norm=0.1,
    class_loss="focal",
    extra_logit=True,
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


# ---- Spatially modulated co-attention: a Gaussian for every query and head (paper, section 3.2) ------------
def image_size(mask):
    """Size of every image without its padding, in pixels: mask [B, H, W] -> (width, height) [B, 2]."""
    return torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)], dim=-1)


class Gaussian(nn.Module):
    """Log of a Gaussian weight for every head, query and cell: [B, M, Q, T], added to the attention scores.

    scale_type: "none" the width is fixed, "isotropic" one scale k for each head, "xy" kx and ky, "xy_product"
    also one for the product (what the official code calls covariance). Raises ValueError for anything else.
    """

    def __init__(self, hidden_dim, nheads, scale_type):
        super().__init__()
        sizes = {"none": 0, "isotropic": 1, "xy": 2, "xy_product": 3}
        if scale_type not in sizes:
            raise ValueError(f"scale_type is {scale_type!r}, it must be one of {', '.join(sizes)}")
        self.nheads = nheads
        self.norm = nn.LayerNorm(hidden_dim)
        self.offset = nn.Linear(hidden_dim, nheads * 2)
        self.scale = nn.Linear(hidden_dim, nheads * sizes[scale_type]) if sizes[scale_type] else None

    def reset_parameters(self):
        """All scales start at 1."""
        if self.scale is not None:
            nn.init.zeros_(self.scale.weight)
            nn.init.ones_(self.scale.bias)

    def forward(self, query, centre, shape):
        """query [B, Q, D], centre [B, Q, 2] as (x, y) in cells, shape (h, w) of the map -> [B, M, Q, T]."""
        h, w = shape
        u = self.norm(query)  # [B, Q, D]
        offset = self.offset(u).unflatten(-1, (self.nheads, 2)).transpose(1, 2)  # [B, M, Q, 2]
        x, y = (centre[:, None] + offset).split(1, dim=-1)  # [B, M, Q, 1] each; every head has its own point
        dx2 = (x - torch.arange(w, device=x.device)).square()  # [B, M, Q, w]; the first cell is at 0
        dy2 = (y - torch.arange(h, device=x.device)).square()  # [B, M, Q, h]
        k2 = torch.ones_like(x)
        if self.scale is not None:
            k2 = self.scale(u).unflatten(-1, (self.nheads, -1)).transpose(1, 2).square()  # [B, M, Q, 1 to 3]
        kx2, ky2 = k2[..., :1], k2[..., :2][..., -1:]  # [B, M, Q, 1] each; one scale serves both
        g = (kx2 * dx2)[..., None, :] + (ky2 * dy2)[..., None]  # [B, M, Q, h, w]
        if k2.shape[-1] == 3:
            g = g + (k2[..., 2:] * dx2)[..., None, :] * dy2[..., None]
        return -g.flatten(-2) / 8  # log G, with beta = 8


# ---- Decoder: queries look at each other, then at the image ------------------------------------------------
class DecoderLayer(nn.Module):
    """Queries look at each other, then at the image: tgt [B, Q, D], memory [B, T, D] -> [B, Q, D]."""

    def __init__(self, hidden_dim, nheads, dim_feedforward, dropout, scale_type):
        super().__init__()
        self.gaussian = Gaussian(hidden_dim, nheads, scale_type)
        self.sa_proj = QKVProjection(hidden_dim)
        self.self_attn = Attention(hidden_dim, nheads, dropout)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.ca_proj = QKVProjection(hidden_dim)
        self.cross_attn = Attention(hidden_dim, nheads, dropout)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.ffn = FeedForward(hidden_dim, dim_feedforward, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tgt, query_pos, centre, memory, shape, pos, mask):
        bias = self.gaussian(tgt + query_pos, centre, shape)  # [B, M, Q, T]; from tgt before self-attention
        # In layer 1 tgt is zero and every query gets the same vector (as in the official code).
        q, k, v = self.sa_proj(tgt + query_pos, tgt + query_pos, tgt)  # 3 x [B, Q, D]
        tgt = self.norm1(tgt + self.dropout(self.self_attn(q, k, v)))

        # (c_q + p_q)^T (c_k + p_k) + log of the Gaussian: the product of two attention maps, each a softmax
        q, k, v = self.ca_proj(tgt + query_pos, memory + pos, memory)  # [B, Q, D], [B, T, D], [B, T, D]
        tgt = self.norm2(tgt + self.dropout(self.cross_attn(q, k, v, mask, bias)))
        return self.ffn(tgt)


class Decoder(nn.Module):
    """Layers in a row, each supervised: query_pos [B, Q, D], memory [B, T, D] -> [S, B, Q, D], s."""

    def __init__(self, num_layers, hidden_dim, nheads, dim_feedforward, dropout, scale_type):
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(hidden_dim, nheads, dim_feedforward, dropout, scale_type)
            for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.reference_head = MLP(hidden_dim, hidden_dim, 2, depth=3)

    def forward(self, query_pos, memory, shape, size, pos, mask):
        # One centre for all layers, predicted from what layer 1 starts with; never detached
        s = self.reference_head(self.layers[0].gaussian.norm(query_pos))  # [B, Q, 2], before the sigmoid
        centre = s.sigmoid() * size[:, None]  # [B, Q, 2], in cells
        tgt = torch.zeros_like(query_pos)  # "object queries" are positions; their content starts at zero
        outputs = []
        for layer in self.layers:
            tgt = layer(tgt, query_pos, centre, memory, shape, pos, mask)
            outputs.append(self.norm(tgt))  # one norm for all layers, before the shared heads
        return torch.stack(outputs), s  # [S, B, Q, D], [B, Q, 2]


# ---- The model ---------------------------------------------------------------------------------------------
class SMCADETR(nn.Module):
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
        scale_type="xy",
    ):
        super().__init__()
        if hidden_dim % nheads or hidden_dim % 4:  # equal heads; sin and cos of x and y
            raise ValueError(f"hidden_dim {hidden_dim} must be a multiple of nheads ({nheads}) and of 4")
        self.backbone = Backbone(backbone, pretrained_backbone, backbone_norm, dilation, last_stage)
        self.stride = [8, 16, 16 if dilation else 32][last_stage - 2]
        self.input_proj = nn.Conv2d(self.backbone.channels[-1], hidden_dim, kernel_size=1)
        self.encoder = Encoder(enc_layers, hidden_dim, nheads, dim_feedforward, dropout)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.temperature = temperature
        self.decoder = Decoder(dec_layers, hidden_dim, nheads, dim_feedforward, dropout, scale_type)
        self.class_head = nn.Linear(hidden_dim, num_classes + 1)  # one sigmoid too many (as official)
        self.box_head = MLP(hidden_dim, hidden_dim, 4, depth=3)
        xavier_uniform(self.encoder)
        xavier_uniform(self.decoder)
        for layer in self.decoder.layers:
            layer.gaussian.reset_parameters()
        nn.init.constant_(self.class_head.bias, -math.log(99))  # every class starts at p = 0.01

    def forward(self, images, mask):
        """images [B, 3, H, W], mask [B, H, W] -> {"logits": [S, B, Q, C+1], "boxes": [S, B, Q, 4]}."""
        check_input(images, mask)
        size = image_size(mask) / self.stride  # [B, 2], in cells
        features = self.input_proj(self.backbone(images)[-1])  # [B, D, h, w]
        shape = features.shape[-2:]
        mask = resize_mask(mask, shape)  # [B, h, w]
        pos = sine_positions(mask, features.shape[1], offset=0, temperature=self.temperature)  # [B, T, D]
        mask = mask.flatten(1)  # [B, T]

        src = features.flatten(2).transpose(1, 2)  # [B, T, D]
        memory = self.encoder(src, pos, mask)  # [B, T, D]
        query_pos = self.query_embed.weight.expand(images.shape[0], -1, -1)  # [B, Q, D]
        hs, s = self.decoder(query_pos, memory, shape, size, pos, mask)  # [S, B, Q, D], [B, Q, 2]
        boxes = self.box_head(hs) + F.pad(s, (0, 2))  # the box is relative to the centre
        return {"logits": self.class_head(hs), "boxes": boxes.sigmoid()}


def build(num_classes, **options):
    """The model; options are those of the class. Raises ValueError (wrong value), TypeError (unknown)."""
    return SMCADETR(num_classes, **options)


# Official parameter names (regular expressions) and ours.
OFFICIAL_NAMES = (
    (r"^backbone\.0\.body\.", "backbone.body."),
    (r"^transformer\.", ""),
    (r"self_attn\.in_proj_", "sa_proj.in_proj."),
    (r"multihead_attn\.in_proj_", "ca_proj.in_proj."),
    (r"multihead_attn\.", "cross_attn."),
    (r"layers\.0\.point1\.", "reference_head."),
    (r"\.point2\.", ".gaussian.offset."),
    (r"\.point3\.", ".gaussian.scale."),
    (r"\.norm4\.", ".gaussian.norm."),
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
