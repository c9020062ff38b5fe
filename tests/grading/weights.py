"""Changes of our model that leave one concept: a change is a function of the model.

They know the names of our parameters; the student gets the changed weights as an official checkpoint.
"""
import re

import torch
from torch import nn


def scaled(factor, *patterns):
    def change(model):
        for name, p in model.named_parameters():
            if re.search("|".join(patterns), name):
                p.data *= factor

    return change


def zero(*patterns):
    return scaled(0, *patterns)


mute = zero(r"(out|output)_proj\.weight")  # attention adds a constant, wherever it looks
mute_encoder = zero(r"^encoder.*(out|output)_proj\.weight")
mute_cross = zero(r"cross_attn\.(out|output)_proj\.weight")
mute_among = zero(r"^decoder.*self_attn\.out_proj\.weight")  # attention among queries adds a constant
mute_deformable = zero(r"output_proj\.weight")
alike = zero(r"^reference\w*\.|reference_points|query_embed")  # equal queries at (0.5, 0.5)
still = zero(r"^box_head.*layers\.2")  # reference boxes stay where they are


def far(factor):
    """References come close to 0 and 1."""
    def change(model):
        sam = getattr(getattr(model, "query_embed", None), "embedding_dim", 0) == 4
        scaled(factor, "^query_embed" if sam else r"^reference\w*\.layers\.1\.|reference_points\.")(model)

    return change


def plain_norms(model, pattern=""):
    """Norms of these names neither scale nor shift: then one too many changes nothing."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine and re.search(pattern, name):
            module.weight.data.fill_(1)
            module.bias.data.fill_(0)


def same_answer(model):
    """In each layer of the decoder both attentions give one large constant: what comes in does not matter."""
    mute(model)
    plain_norms(model, r"decoder\.layers\.\d+\.norm[12]")
    for i, layer in enumerate(model.decoder.layers):
        noise = torch.randn(layer.norm1.bias.shape, generator=torch.Generator().manual_seed(i))
        for name, p in layer.named_parameters():
            if re.search(r"attn\.(out|output)_proj\.bias", name):
                p.data.copy_(1e4 * noise)


HIGH = 30.0  # above everything that hidden layers see with golden weights


def lifted(layers):
    """Hidden layers see large numbers, which ReLU and GELU do not change; the next bias takes them off."""
    for first, second in zip(layers, layers[1:]):
        first.bias.data += HIGH
        second.bias.data -= second.weight.data.sum(1) * HIGH


def lift_feed_forward(model):
    for module in model.modules():
        if hasattr(module, "linear1") and hasattr(module, "linear2"):
            lifted([module.linear1, module.linear2])


def lift_mlps(model):
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            lifted([layer for layer in module.layers if isinstance(layer, nn.Linear)])


def packed(model, part):
    """The maps that make q, k, v in one matrix, as (weight [3, D, D], bias [3, D]) that can be written to."""
    for name, module in model.named_modules():
        if name.endswith("in_proj") and part in name:
            yield module.weight.data.unflatten(0, (3, -1)), module.bias.data.unflatten(0, (3, -1))


def faint(factor):
    """Queries and keys are scaled: attention becomes faint, and with 0 looks everywhere alike."""
    def change(model):
        for weight, bias in packed(model, ""):
            weight[:2] *= factor
            bias[:2] *= factor
        scaled(factor, r"[sc]a_[qk]_(content|pos)\.|ca_[qk]_sine\.(weight|bias|layers\.1)|attention_weights\."
               )(model)

    return change


def flat(model):
    """Nothing is looked for: dot products average over all tokens, points stay at their reference."""
    faint(0)(model)
    zero("sampling_offsets")(model)


def whatever_content(model):
    """The first values of queries do not matter: the first attention gives one large constant."""
    scaled(1e10, r"decoder\.layers\.0\.self_attn\.out_proj\.bias")(model)


def among_by_content(model):
    """Positions do not matter for attention among queries, but queries enter cross-attention as they are."""
    zero(r"sa_[qk]_pos")(model)
    embed = dict(model.named_parameters()).get("queries.query_embed.weight")
    if embed is not None:  # deformable: position and content, side by side
        embed.data.chunk(2, -1)[0].mul_(1e-4)
    elif any("ca_proj" in name for name, _ in model.named_parameters()):  # DETR: one map for both
        scaled(1e-4, "query_embed")(model)
        zero(r"decoder\.layers\.0\.self_attn\.out_proj\.bias")(model)
        weight, _ = next(packed(model, "decoder.layers.0.ca_proj"))
        weight[0] *= 1e4


def louder(factor):
    """Contents are scaled, positions are not. Whatever depends only on contents stays the same.

    With a large factor positions that are added to contents vanish, in the values as well.
    """
    def change(model):
        norm = any(re.match(r"input_proj\.\d\.1\.", name) for name, _ in model.named_parameters())
        scaled(factor, r"^input_proj\.\d\.1\." if norm else r"^input_proj\.",
               r"^encoder.*((norm1|ffn\.norm)\.|((out|output|value)_proj|linear[12])\.bias)")(model)
        scaled(1 / factor, r"^encoder.*(sampling_offsets|attention_weights)\.weight",
               r"^decoder.*(ca_k_content|ca_v|value_proj|point_conv(\.0)?)\.weight", r"enc_output\.weight"
               )(model)
        for weight, bias in packed(model, "encoder"):
            weight[:2] /= factor
            bias[2] *= factor
        for weight, _ in packed(model, "ca_proj"):
            weight[1:] /= factor
        if any("aligner" in name for name, _ in model.named_modules()):  # SAM-DETR makes queries of contents
            scaled(1 / factor, r"ca_q_content\.weight")(model)

    return change


loud = louder(1e4)
