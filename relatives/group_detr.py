"""Group DETR: Fast DETR Training with Group-Wise One-to-Many Assignment.

Qiang Chen, Xiaokang Chen, Jian Wang, Shan Zhang, Kun Yao, Haocheng Feng, Junyu Han, Errui Ding, Gang Zeng,
Jingdong Wang. ICCV 2023, arXiv:2207.13085. Code: Atten4Vis/ConditionalDETR, branch GroupDETR (Apache-2.0).

The idea: one query for each object is little to learn from. G groups of queries (the paper's K) train one
decoder; each group is matched independently, so every object has G queries. In self-attention groups do
not see each other, so inference needs only the first group and costs the same as without groups.

Diff me against: conditional_detr.py. The 12 epochs are a matter of training, not of the idea.

Departures from the official code; tests/test_golden.py checks that the numbers are the same:
    Backbone lists those of all files.
    a batch without any object has the mean of the groups' losses as well; officially G times that.
Left out on purpose: segmentation heads; pre-norm layers, which the official code refuses to run.
"""
import math
import re

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

# How the paper trains it; train.py reads this.
RECIPE = dict(
    epochs=12,  # section 4.1
    lr_drop=11,
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

# For train.py --preset laptop: few groups.
LAPTOP = dict(num_groups=3)

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


# ---- Conditional cross-attention: the spatial query (paper, sections 3.3 to 3.5) ---------------------------
def sine_xy(xy, dim, temperature=10000):
    """Sine encoding of points [..., 2], (x, y) in [0, 1]: [..., dim], y first as in sine_positions."""
    return sine(xy.flip(-1), dim // 2, temperature).flatten(-2)  # [..., dim]


def concat_heads(content, position, nheads):
    """Concatenate inside every head, [B, T, D] twice -> [B, T, 2D]: c_q^T c_k + p_q^T p_k, Eq. (2)."""
    pair = [x.unflatten(-1, (nheads, -1)) for x in (content, position)]  # 2 x [B, T, M, D/M]
    return torch.cat(pair, dim=-1).flatten(-2)  # [B, T, 2D]


# ---- Decoder: queries look at each other, then at the image ------------------------------------------------
class DecoderLayer(nn.Module):
    """Queries look at each other, then at the image: tgt [B, Q, D], memory [B, T, D] -> [B, Q, D]."""

    def __init__(self, hidden_dim, nheads, dim_feedforward, dropout, first):
        super().__init__()
        # Content and position also have separate maps in self-attention; the paper shows cross-attention.
        self.sa_q_content = nn.Linear(hidden_dim, hidden_dim)
        self.sa_q_pos = nn.Linear(hidden_dim, hidden_dim)
        self.sa_k_content = nn.Linear(hidden_dim, hidden_dim)
        self.sa_k_pos = nn.Linear(hidden_dim, hidden_dim)
        self.sa_v = nn.Linear(hidden_dim, hidden_dim)
        self.self_attn = Attention(hidden_dim, nheads, dropout)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.ca_q_content = nn.Linear(hidden_dim, hidden_dim)
        # The 43.5 M parameters of the published log count five more of these, unused, in layers 2 to 6
        self.ca_q_pos = nn.Linear(hidden_dim, hidden_dim) if first else None
        self.ca_q_sine = nn.Linear(hidden_dim, hidden_dim)
        self.ca_k_content = nn.Linear(hidden_dim, hidden_dim)
        self.ca_k_pos = nn.Linear(hidden_dim, hidden_dim)
        self.ca_v = nn.Linear(hidden_dim, hidden_dim)
        self.cross_attn = Attention(hidden_dim, nheads, dropout)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.ffn = FeedForward(hidden_dim, dim_feedforward, dropout)
        self.dropout = nn.Dropout(dropout)
        self.nheads = nheads
        self.first = first

    def forward(self, tgt, query_pos, p_q, memory, pos, mask, groups):
        # In layer 1 tgt is zero and every query gets the same vector (as in the official code).
        q = self.sa_q_content(tgt) + self.sa_q_pos(query_pos)  # [B, Q, D]
        k = self.sa_k_content(tgt) + self.sa_k_pos(query_pos)  # [B, Q, D]
        v = self.sa_v(tgt)  # [B, Q, D]
        # Groups do not see each other: folded into the batch, [B, G*Q, D] -> [B, G, Q, D] -> [B*G, Q, D]
        q, k, v = (x.unflatten(1, (groups, -1)).flatten(0, 1) for x in (q, k, v))
        attended = self.self_attn(q, k, v).unflatten(0, (-1, groups)).flatten(1, 2)  # [B, G*Q, D]
        tgt = self.norm1(tgt + self.dropout(attended))

        # c_q^T c_k + p_q^T p_k: content and position have a dot product each, Eq. (2)
        c_q, c_k, v = self.ca_q_content(tgt), self.ca_k_content(memory), self.ca_v(memory)
        p_k = self.ca_k_pos(pos)  # [B, T, D]
        if self.first:
            # Section 3.5, official `is_first`: layer 1 has no content yet; positions are added as in DETR.
            c_q = c_q + self.ca_q_pos(query_pos)
            c_k = c_k + p_k
        q = concat_heads(c_q, self.ca_q_sine(p_q), self.nheads)  # [B, Q, 2D]
        k = concat_heads(c_k, p_k, self.nheads)  # [B, T, 2D]
        tgt = self.norm2(tgt + self.dropout(self.cross_attn(q, k, v, mask)))
        return self.ffn(tgt)


class Decoder(nn.Module):
    """Layers in a row, each supervised: query_pos [B, Q, D], memory [B, T, D] -> [S, B, Q, D]."""

    def __init__(self, num_layers, hidden_dim, nheads, dim_feedforward, dropout):
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(hidden_dim, nheads, dim_feedforward, dropout, first=(i == 0))
            for i in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        # One for all layers but the first, in which content is still zero and p_q is p_s
        self.query_scale = MLP(hidden_dim, hidden_dim, hidden_dim, depth=2) if num_layers > 1 else None

    def forward(self, query_pos, p_s, memory, pos, mask, groups):
        tgt = torch.zeros_like(query_pos)  # "object queries" are positions; their content starts at zero
        outputs = []
        for i, layer in enumerate(self.layers):
            # Eqs. (3), (4): p_q = lambda_q * p_s; lambda_q from the previous layer, before the norm
            p_q = p_s if i == 0 else self.query_scale(tgt) * p_s
            tgt = layer(tgt, query_pos, p_q, memory, pos, mask, groups)
            outputs.append(self.norm(tgt))  # one norm for all layers, before the shared heads
        return torch.stack(outputs)  # [S, B, Q, D]


# ---- The model ---------------------------------------------------------------------------------------------
class GroupDETR(nn.Module):
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
        num_groups=11,
    ):
        super().__init__()
        if hidden_dim % nheads or hidden_dim % 4:  # equal heads; sin and cos of x and y
            raise ValueError(f"hidden_dim {hidden_dim} must be a multiple of nheads ({nheads}) and of 4")
        self.backbone = Backbone(backbone, pretrained_backbone, backbone_norm, dilation, last_stage)
        self.input_proj = nn.Conv2d(self.backbone.channels[-1], hidden_dim, kernel_size=1)
        self.encoder = Encoder(enc_layers, hidden_dim, nheads, dim_feedforward, dropout)
        self.num_queries = num_queries
        self.num_groups = num_groups
        # Group g has rows g*Q to (g+1)*Q - 1; inference takes the first Q and ignores the others
        self.query_embed = nn.Embedding(num_groups * num_queries, hidden_dim)
        self.temperature = temperature
        self.reference_head = MLP(hidden_dim, hidden_dim, 2, depth=2)
        self.decoder = Decoder(dec_layers, hidden_dim, nheads, dim_feedforward, dropout)
        self.class_head = nn.Linear(hidden_dim, num_classes)
        self.box_head = MLP(hidden_dim, hidden_dim, 4, depth=3)
        xavier_uniform(self.encoder)
        xavier_uniform(self.reference_head)
        xavier_uniform(self.decoder)
        nn.init.constant_(self.class_head.bias, -math.log(99))  # every class starts at p = 0.01
        nn.init.zeros_(self.box_head.layers[-1].weight)
        nn.init.zeros_(self.box_head.layers[-1].bias)

    def forward(self, images, mask):
        """images [B, 3, H, W], mask [B, H, W] -> {"logits": [S, B, Q, C], "boxes": [S, B, Q, 4]}.

        In training also "groups": G, and S is G times the layers: stage l * G + g is group g of layer l.
        """
        check_input(images, mask)
        features = self.input_proj(self.backbone(images)[-1])  # [B, D, h, w]
        mask = resize_mask(mask, features.shape[-2:])  # [B, h, w]
        pos = sine_positions(mask, features.shape[1], offset=0, temperature=self.temperature)  # [B, T, D]
        mask = mask.flatten(1)  # [B, T]

        src = features.flatten(2).transpose(1, 2)  # [B, T, D]
        memory = self.encoder(src, pos, mask)  # [B, T, D]
        groups = self.num_groups if self.training else 1
        query_pos = self.query_embed.weight[:groups * self.num_queries]  # [G*Q, D]
        query_pos = query_pos.expand(images.shape[0], -1, -1)  # [B, G*Q, D]
        s = self.reference_head(query_pos)  # [B, G*Q, 2], before the sigmoid; not detached, for all layers
        p_s = sine_xy(s.sigmoid(), query_pos.shape[-1], self.temperature)  # [B, G*Q, D]
        hs = self.decoder(query_pos, p_s, memory, pos, mask, groups)  # [layers, B, G*Q, D]
        boxes = self.box_head(hs) + F.pad(s, (0, 2))  # Eq. (1): only the centre is relative to s
        out = {"logits": self.class_head(hs), "boxes": boxes.sigmoid()}
        # Every group is matched independently: [layers, B, G*Q, .] -> [layers, G, B, Q, .] -> [S, B, Q, .]
        out = {key: x.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1) for key, x in out.items()}
        return {**out, "groups": groups} if self.training else out


def build(num_classes, **options):
    """The model; options are those of the class. Raises ValueError (wrong value), TypeError (unknown)."""
    return GroupDETR(num_classes, **options)


# Official parameter names (regular expressions) and ours.
OFFICIAL_NAMES = (
    (r"^backbone\.0\.body\.", "backbone.body."),
    (r"^transformer\.", ""),
    (r"self_attn\.in_proj_", "sa_proj.in_proj."),
    (r"\.(sa|ca)_([qk])content_proj\.", r".\1_\2_content."),
    (r"\.(sa|ca)_([qk])pos_proj\.", r".\1_\2_pos."),
    (r"\.(sa|ca)_v_proj\.", r".\1_v."),
    (r"\.ca_qpos_sine_proj\.", ".ca_q_sine."),
    (r"^decoder\.ref_point_head\.", "reference_head."),
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
