"""Two models with the same weights, our own and somebody's: what the marks are made of.

A student's file is seen through the contract alone: build, forward, load_official. We may change our own
model, whose names we know, and hand its weights over as an official checkpoint: no private and no official
name of a parameter is needed. To tell one concept from another, weights are chosen so that little else
matters.
"""

import re
import traceback
from functools import lru_cache

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.golden import FOLDER, Case, fill, options_of, our_name
from tests.grading.files import parent_of, path_of

# Variants of our files: a golden case with the official names of their parameters, and options
VARIANTS = {
    "sam_detr": ("sam_detr", {"input_norm": True}),
    "refinement": ("deformable_detr_refine", {"box_refine": True}),
    "two_stage": ("deformable_detr_two_stage", {"two_stage": True}),
    "smca": ("sam_detr_smca", {"input_norm": True, "smca": True}),
}
TINY = dict(
    backbone="resnet18",
    pretrained_backbone=False,
    hidden_dim=32,
    nheads=4,
    dim_feedforward=32,
    dropout=0.0,
    num_queries=6,
)
SMALL = dict(num_groups=3, num_one2many=5, in_points=4, out_points=4)  # options of relatives
FULL = [(96, 128), (96, 128)]  # (height, width) of the images: no padding
PADDED = [(70, 128), (96, 90)]
WIDE = [(64, 432)]  # so wide that two-stage anchors leave the image
BOTH = ("logits", "boxes")


class NotWritten(Exception):
    """A part of the contract is missing."""


class NotLoaded(Exception):
    """load_official does not take a checkpoint."""


class NotFinite(Exception):
    """A number is NaN; `mark` is the one that this belongs to."""

    def __init__(self, message, mark):
        super().__init__(message)
        self.mark = mark


def file_of(ours):
    """The name of our file that a module is, or is a copy of: "detr", also for relatives."""
    return ours.__name__.rpartition(".")[2]


def case_name(file):
    """The golden case of a file, or of a variant of one: its own, or the one of the file it is made from."""
    while file not in VARIANTS and not (FOLDER / f"{file}.json").exists():
        file = parent_of(file)
    return VARIANTS.get(file, (file, {}))


# ---- Two models with the same weights ----------------------------------------------------------------------
@lru_cache(maxsize=12)
def case_of(name):
    return Case(name)


@lru_cache(maxsize=4096)
def name_of(file, official):
    return our_name(file, official)


@lru_cache(maxsize=4096)
def fresh(shape, kind, name, seed):
    return fill(shape, kind, name, seed)


def build_both(module, start, options):
    """(model, a copy of what its parameters start from); `options` are pairs, `start` seeds the weights."""
    if not hasattr(module, "build"):
        raise NotWritten("build")
    torch.manual_seed(start)
    model = module.build(3, **dict(options))
    return model, [p.detach().clone() for p in model.parameters()]


built = lru_cache(maxsize=12)(build_both)


class Pair:
    """Our model and the student's, built alike; `variant` is a key of VARIANTS, the file itself by default.

    With `calm` the weights are such that an error in norms and feed-forward blocks shows in the mark `heads`
    alone.
    """

    def __init__(self, student, ours, seed, variant=None, calm=True, **options):
        case, extra = case_name(variant or file_of(ours))
        self.case, self.file, self.seed, self.calm = case_of(case), ours, seed, calm
        args = options_of(self.case.json["case"]["args"], {})
        layers = {name: args[name] for name in ("enc_layers", "dec_layers") if name in args}
        text = path_of(file_of(ours)).read_text(encoding="utf-8")
        layers.update({name: value for name, value in SMALL.items() if f"        {name}=" in text})
        if "enc_layers=0" in text:  # AdaMixer has no encoder
            layers["enc_layers"] = 0
        plain = {"recollect": "none"} if file_of(ours) == "sqr" else {}  # recollection has a mark of its own
        self.options = tuple(sorted({**TINY, **layers, **extra, **plain, **options}.items()))
        self.ours, _ = built(ours, 0, self.options)
        self.student, self.student_start = built(student, 0, self.options)
        self.load_official = getattr(student, "load_official", None)

    def load(self, *changes):
        """Fill both models by the golden set's rule, with this seed, after `changes` of ours."""
        if self.calm:
            changes = (plain_norms, lift_feed_forward, *changes, lift_mlps)
        state, ours = {}, self.ours.state_dict()
        for official, _, kind, used, _ in self.case.json["state"]:
            name = name_of(self.file, official)
            if name in ours:  # a ResNet-50 has more than our ResNet-18
                state[official] = ours[name]
                ours[name].copy_(fresh(tuple(ours[name].shape), kind, used, self.seed))
        for change in changes:
            change(self.ours)
        self.checkpoint = {official: x.clone() for official, x in state.items()}
        if self.load_official is None:
            raise NotWritten("load_official, and this mark has to give the model our weights")
        try:
            self.load_official(self.student, {"model": self.checkpoint})
        except NotImplementedError:
            raise
        except Exception as error:
            raise NotLoaded("load_official does not take our checkpoint, see the mark `loading`") from error

    def run(self, sizes, train=False, gradients=False):
        """(the student's output, ours) on random images of these sizes."""
        inputs = batch(self.seed, sizes)
        with torch.set_grad_enabled(gradients):
            return finite(self.student.train(train), *inputs), self.ours.train(train)(*inputs)

    def compare(self, what, sizes, *changes, keys=("logits",), train=False):
        """Raises a sentence that begins with `what` unless the two models agree."""
        self.load(*changes)
        theirs, ours = self.run(sizes, train)
        for key in keys:
            same(f"{what}: {key}", theirs[key], ours[key])

    def agree(self, sizes, *changes, **options):
        try:
            self.compare("", sizes, *changes, **options)
        except (AssertionError, NotFinite):
            return False
        return True


@lru_cache(maxsize=16)
def random_images(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    H, W = (max(side) for side in zip(*sizes))
    images, mask = torch.zeros(len(sizes), 3, H, W), torch.ones(len(sizes), H, W, dtype=torch.bool)
    for b, (h, w) in enumerate(sizes):
        images[b, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[b, :h, :w] = False
    return images, mask


def batch(seed, sizes):
    return tuple(x.clone() for x in random_images(seed, tuple(sizes)))


def checked(out):
    """The output, if it is what the contract says it is."""
    assert isinstance(out, dict), f"forward returns {type(out).__name__}, not a dict of logits and boxes"
    for key in ("logits", "boxes"):
        assert key in out, f"forward returns no {key!r}"
        assert isinstance(out[key], torch.Tensor), (
            f"{key} is {type(out[key]).__name__}, not one tensor of all stages"
        )
    return out


def finite(model, images, mask):
    """The output, if it has numbers only; raises NotFinite that says where the first NaN comes from."""
    out = checked(model(images, mask))
    if any(out[key].isnan().any() for key in BOTH):
        raise first_not_finite(model, (images, mask))
    return out


def same(what, theirs, ours, tolerance=1e-3):
    """Equal up to `tolerance` of the largest number; a sentence that says in which stages not."""
    theirs, ours = theirs.detach().float(), ours.detach().float()
    assert theirs.shape == ours.shape, f"{what}: shape is {list(theirs.shape)}, not {list(ours.shape)}"
    assert theirs.isfinite().all(), f"{what}: some numbers are not finite"
    finite = ours[ours.isfinite()]
    allowed = tolerance * max(1, finite.abs().max().item())
    off = (theirs - ours).abs().nan_to_num(0).flatten(1).amax(1)  # of each stage
    wrong = (off > allowed).nonzero().flatten().tolist()
    stages = ", ".join(str(s + 1) for s in wrong)
    assert not wrong, f"{what} off by {off.max():.2g} (allowed {allowed:.1g}), stages {stages}"


class FirstNaN(TorchFunctionMode):
    """Stops at the first operation whose result has a NaN in it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.detach().isnan().any():
            # Positions and masks are made from neither image nor parameters
            raise NotFinite("", "shapes" if out.requires_grad else "positions")
        return out


def first_not_finite(model, inputs):
    """The exception that says where in the student's file the first NaN is made, and which mark that costs.
    """
    broken = [name for name, p in model.named_parameters() if p.isnan().any()]
    if broken:
        return NotFinite(f"load_official leaves NaN in {broken[0]}", "loading")
    images, mask = inputs
    with torch.no_grad():
        for other, when in [
            (mask & False, "as soon as an image is padded"),
            (~mask, "where the mask is False"),
        ]:
            if not other.equal(mask) and not model(images, other)["logits"].isnan().any():
                return NotFinite(f"some numbers are not finite {when}", "padding")
    try:
        with torch.enable_grad(), FirstNaN():
            model(images.clone().requires_grad_(), mask)
    except NotFinite as error:
        frames = traceback.extract_tb(error.__traceback__)
        source = type(model).forward.__code__.co_filename
        theirs = [frame for frame in frames if frame.filename == source] or frames[:1]
        where = f"{theirs[-1].name}, line {theirs[-1].lineno}"
        return NotFinite(f"some numbers are not finite; the first NaN is made in {where}", error.mark)
    return NotFinite("some numbers are not finite", "shapes")


def few(values):
    """Some numbers of a tensor for a message."""
    values = values.flatten().unique().tolist()
    return ", ".join(f"{v:.3g}" for v in values[:4]) + (" ..." if len(values) > 4 else "")


# ---- Changes of our model that leave one concept -----------------------------------------------------------
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
mute_deformable = zero(r"output_proj\.weight")
alike = zero(
    r"^reference\.|reference_points|query_embed"
)  # every query starts at (0.5, 0.5), without content
still = zero(r"^box_head.*layers\.2")  # reference boxes stay where they are


def plain_norms(model):
    """Norms neither scale nor shift: then one too many, or the last one missing, changes nothing."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            module.weight.data.fill_(1)
            module.bias.data.fill_(0)


HIGH = 30.0  # above everything that hidden layers see with golden weights


def lifted(layers):
    """Hidden layers see large numbers, which ReLU, GELU and their like hand on alike; the next bias takes
    them off.
    """
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
        scaled(
            factor, r"[sc]a_[qk]_(content|pos)\.|ca_[qk]_sine\.(weight|bias|layers\.1)|attention_weights\."
        )(model)

    return change


def flat(model):
    """Nothing is looked for: dot products average over all tokens, points stay at their reference."""
    faint(0)(model)
    zero("sampling_offsets")(model)


def louder(factor):
    """Contents are scaled, positions are not. What is computed from contents alone stays the same.

    With a large factor positions that are added to contents vanish, in the values as well.
    """

    def change(model):
        norm = any(re.match(r"input_proj\.\d\.1\.", name) for name, _ in model.named_parameters())
        scaled(
            factor,
            r"^input_proj\.\d\.1\." if norm else r"^input_proj\.",
            r"^encoder.*(norm1|ffn\.norm)\.",
            r"^encoder.*((out|output|value)_proj|linear[12])\.bias",
        )(model)
        scaled(
            1 / factor,
            r"^encoder.*(sampling_offsets|attention_weights)\.weight",
            r"^decoder.*(ca_k_content|ca_v|value_proj|point_conv)\.weight",
            r"enc_output\.weight",
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


# ---- Parameters and gradients ------------------------------------------------------------------------------
def named(model):
    """Parameters outside of the backbone, by name."""
    return [(name, p) for name, p in model.named_parameters() if not name.startswith("backbone.")]


def index(model, parameter):
    return next(i for i, p in enumerate(model.parameters()) if p is parameter)


def origin(pair):
    """Where the student keeps our parameters: [(which of its parameters, for each number the index into
    named)].

    Every number of a checkpoint gets a value of its own, and load_official shows where it went. So it does
    not matter how the student names, splits or packs parameters.
    """
    first, bounds = 1000, []
    checkpoint = pair.checkpoint  # goes back into both when the origins are known

    def tag(model):
        nonlocal first
        zero("^backbone")(model)
        for _, p in named(model):
            p.data.copy_(torch.arange(first, first + p.numel(), dtype=torch.float32).view_as(p))
            first += p.numel()
            bounds.append(first)

    calm, pair.calm = pair.calm, False
    pair.load(tag)
    pair.calm = calm
    found, seen = [], torch.zeros(len(bounds), dtype=torch.int64)
    for k, p in enumerate(pair.student.parameters()):
        values = p.detach().flatten()
        if (values >= 1000).all() and values.equal(values.round()):
            numbers = torch.bucketize(values, torch.tensor(bounds, dtype=torch.float32), right=True)
            seen += torch.bincount(numbers, minlength=len(bounds))
            found.append((k, numbers))
    lost = [name for (name, p), count in zip(named(pair.ours), seen.tolist()) if count != p.numel()]
    pair.load_official(pair.student, {"model": checkpoint})
    pair.file.load_official(pair.ours, {"model": checkpoint})
    assert not lost, f"load_official does not fill what we call {', '.join(lost[:3])}"
    return found


def norms(pair, theirs, gradients):
    """The gradient's norm of each of our parameters, in the student's model."""
    squares = torch.zeros(len(named(pair.ours)), dtype=torch.float64)
    for (_, numbers), gradient in zip(theirs, gradients):
        if gradient is not None:
            squares.index_add_(0, numbers, gradient.double().flatten().square())
    return squares.sqrt()


def outputs(out):
    """The parts of an output whose gradients are looked at one by one."""
    parts = [
        (f"{key} of stage {s + 1}", out[key][s]) for key in ("logits", "boxes") for s in range(len(out[key]))
    ]
    return parts + [(f"proposals: {key}", x) for key, x in out.get("proposals", {}).items()]


def upstream(x, generator=1):
    return (x.nan_to_num(0) * torch.randn(x.shape, generator=torch.Generator().manual_seed(generator))).sum()


def pulled(y, parameters):
    """The gradient of y for every parameter, None where it has none or is not trained."""
    trained = [p for p in parameters if p.requires_grad]
    found = iter(torch.autograd.grad(y, trained, retain_graph=True, allow_unused=True))
    return [next(found) if p.requires_grad else None for p in parameters]


def gradient_pattern(pair, theirs):
    """Which output's gradient reaches which parameter: a wrong or missing detach shows nowhere else."""
    parameters, mine = list(pair.student.parameters()), [p for _, p in named(pair.ours)]
    parameters = [parameters[k] for k, _ in theirs]
    fixed = {i for i, p in enumerate(mine) if not p.requires_grad}
    for p, (_, numbers) in zip(parameters, theirs):
        trained = p.requires_grad or set(numbers.tolist()) <= fixed
        assert trained, "some parameters outside of the backbone have requires_grad False"
    for (what, x), (_, y) in zip(*map(outputs, pair.run(FULL, train=True, gradients=True))):
        assert x.requires_grad, f"no gradient comes back from {what}"
        expected = lengths(pulled(upstream(y), mine))
        found = norms(pair, theirs, pulled(upstream(x), parameters))
        found, expected = (found / found.max()).tolist(), (expected / expected.max()).tolist()
        for (name, _), a, b in zip(named(pair.ours), found, expected):
            assert a < 1e-6 or b > 0, f"{what}: its gradient reaches {name}, and must not (a missing detach?)"
            assert a > 1e-7 or b < 1e-4, f"{what}: its gradient does not reach {name} (a detach too much?)"


def gradient_sizes(pair, theirs):
    """Norms of the gradient, parameter by parameter."""
    parameters = list(pair.student.parameters())
    x, y = (
        upstream(out["logits"]) + upstream(out["boxes"])
        for out in pair.run(PADDED, train=True, gradients=True)
    )
    expected = lengths(pulled(y, [p for _, p in named(pair.ours)]))
    found = norms(pair, theirs, pulled(x, [parameters[k] for k, _ in theirs]))
    for (name, _), a, b in zip(named(pair.ours), found.tolist(), expected.tolist()):
        assert abs(a - b) < 0.02 * b + 1e-4 * expected.norm(), (
            f"the gradient of {name} has norm {a:.3g}, not {b:.3g}"
        )


def lengths(gradients):
    return torch.tensor([0 if g is None else g.double().norm() for g in gradients], dtype=torch.float64)
