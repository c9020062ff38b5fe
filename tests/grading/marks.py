"""What a file can earn points for: every mark is a function (student, ours, seed) that raises where it is not met.

A student's file is seen through the contract alone: build, forward, load_official; for train.py SetCriterion. To
tell one concept from another, weights are chosen so that little else matters. We may change our own model, whose
names we know, and hand its weights over as an official checkpoint: no private and no official name of a parameter
is needed. tests/grading/grader.py runs the marks, tests/grading/test_planted.py shows that each finds the mistakes it is for.
"""
import math
import re
from functools import lru_cache

import torch

from tests.golden import Case, assert_close, fill, our_name

# A golden case of the same structure, for the official names of parameters, and options that belong to it
CASES = {
    "detr": ("detr", {}),
    "conditional_detr": ("conditional_detr", {}),
    "deformable_detr": ("deformable_detr", {}),
    "sam_detr": ("sam_detr", {"input_norm": True}),
    "sqr": ("sqr", {}),
    "refinement": ("deformable_detr_refine", {"box_refine": True}),
    "two_stage": ("deformable_detr_two_stage", {"two_stage": True}),
    "smca": ("sam_detr_smca", {"input_norm": True, "smca": True}),
    "multiscale": ("sam_detr_multiscale", {"multiscale": True}),
}
TINY = dict(backbone="resnet18", pretrained_backbone=False, hidden_dim=32, nheads=4, dim_feedforward=32, dropout=0.0,
            num_queries=6)
FULL = [(96, 128), (96, 128)]  # (height, width) of the images: no padding
PADDED = [(70, 128), (96, 90)]
WIDE = [(64, 432)]  # so wide that two-stage anchors leave the image
BOTH = ("logits", "boxes")


class NotWritten(Exception):
    """A part of the contract is missing."""


class NotLoaded(Exception):
    """load_official does not take a checkpoint."""


# ---- Two models with the same weights --------------------------------------------------------------------------------
@lru_cache(maxsize=12)
def case_of(name):
    return Case(name)


@lru_cache(maxsize=4096)
def name_of(file, official):
    return our_name(file, official)


@lru_cache(maxsize=4096)
def fresh(shape, kind, name, seed):
    return fill(shape, kind, name, seed)


@lru_cache(maxsize=12)
def built(module, start, options):
    """(model, a copy of what its parameters start from); `options` are pairs, `start` seeds the weights."""
    if not hasattr(module, "build"):
        raise NotWritten("build")
    torch.manual_seed(start)
    model = module.build(3, **dict(options))
    return model, [p.detach().clone() for p in model.parameters()]


class Pair:
    """Our model and the student's, built alike; `variant` is a key of CASES, the file itself by default."""

    def __init__(self, student, ours, seed, variant=None, **options):
        case, extra = CASES[variant or ours.__name__]
        self.case, self.file, self.seed = case_of(case), ours, seed
        layers = {k: self.case.json["case"]["args"][k] for k in ("enc_layers", "dec_layers")}
        plain = {"recollect": "none"} if ours.__name__ == "sqr" else {}  # recollection has a mark of its own
        self.options = tuple(sorted({**TINY, **layers, **extra, **plain, **options}.items()))
        self.ours, _ = built(ours, 0, self.options)
        self.student, self.student_start = built(student, 0, self.options)
        self.load_official = getattr(student, "load_official", None)

    def load(self, *changes):
        """Fill both models by the golden set's rule, with this seed, after `changes` of ours."""
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
            theirs = self.student.train(train)(*inputs)
            return checked(theirs), self.ours.train(train)(*inputs)

    def compare(self, what, sizes, *changes, keys=("logits",), train=False):
        """Raises a sentence that begins with `what` unless the two models agree."""
        self.load(*changes)
        theirs, ours = self.run(sizes, train)
        for key in keys:
            same(f"{what}: {key}", theirs[key], ours[key])

    def agree(self, sizes, *changes, **options):
        try:
            self.compare("", sizes, *changes, **options)
        except AssertionError:
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
        assert isinstance(out[key], torch.Tensor), f"{key} is {type(out[key]).__name__}, not one tensor of all stages"
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


# ---- Changes of our model that leave one concept ---------------------------------------------------------------------
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
alike = zero(r"^reference\.|reference_points|query_embed")  # every query starts at (0.5, 0.5), without content
still = zero(r"^box_head.*layers\.2")  # reference boxes stay where they are


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
        scaled(factor, r"[sc]a_[qk]_(content|pos)\.|ca_[qk]_sine\.(weight|bias|layers\.1)|attention_weights\.")(model)
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
        scaled(factor, r"^input_proj\.\d\.1\." if norm else r"^input_proj\.",
               r"^encoder.*(norm1|ffn\.norm)\.", r"^encoder.*((out|output|value)_proj|linear[12])\.bias")(model)
        scaled(1 / factor, r"^encoder.*(sampling_offsets|attention_weights)\.weight",
               r"^decoder.*(ca_k_content|ca_v|value_proj|point_conv\.0)\.weight", r"enc_output\.weight")(model)
        for weight, bias in packed(model, "encoder"):
            weight[:2] /= factor
            bias[2] *= factor
        for weight, _ in packed(model, "ca_proj"):
            weight[1:] /= factor
        if any("aligner" in name for name, _ in model.named_modules()):  # SAM-DETR makes queries of contents
            scaled(1 / factor, r"ca_q_content\.weight")(model)
    return change


loud = louder(1e4)


# ---- The contract ----------------------------------------------------------------------------------------------------
def shapes(student, ours, seed):
    """Output shapes and ranges, for any image size, batch, number of queries and heads; number of parameters."""
    for options, sizes in [({}, PADDED), ({"num_queries": 9, "nheads": 2}, [(75, 101)])]:
        pair = Pair(student, ours, seed, **options)
        theirs, expected = pair.run(sizes)
        for key in ("logits", "boxes"):
            assert theirs[key].shape == expected[key].shape, (
                f"{key} of {len(sizes)} images: {list(theirs[key].shape)}, not {list(expected[key].shape)}")
        low, high = theirs["boxes"].min().item(), theirs["boxes"].max().item()
        assert 0 <= low and high <= 1, f"boxes reach from {low:.2g} to {high:.2g}, not in [0, 1]"
    count = [sum(p.numel() for p in model.parameters()) for model in (pair.student, pair.ours)]
    assert count[0] == count[1], f"the model has {count[0]:,} parameters, not {count[1]:,}"


def independence(student, ours, seed):
    """One image does not see the other."""
    pair = Pair(student, ours, seed)
    images, mask = batch(seed, PADDED)
    other = images.clone()
    other[1] = batch(seed + 1, PADDED)[0][1]
    with torch.no_grad():
        before, after = (checked(pair.student.eval()(x, mask)) for x in (images, other))
    for key in ("logits", "boxes"):
        off = (before[key] - after[key])[:, 0].abs().max().item()
        assert off < 1e-4, f"{key} of the first image change by {off:.2g} when the second one does"


def loading(student, ours, seed):
    """load_official takes every entry of a checkpoint, with or without {"model": ...}, and refuses a wrong one."""
    pair = Pair(student, ours, seed)
    try:
        pair.load()
    except NotLoaded as error:
        raise error.__cause__
    origin(pair)
    pair.load_official(pair.student, pair.checkpoint)
    some = next(iter(pair.checkpoint))
    unknown = {**pair.checkpoint, "mystery.weight": torch.zeros(1)}
    missing = {name: x for name, x in pair.checkpoint.items() if name != some}
    for what, checkpoint in [("an unknown entry", unknown), ("a missing entry", missing)]:
        try:
            pair.load_official(pair.student, {"model": checkpoint})
        except Exception:
            continue
        raise AssertionError(f"load_official accepts a checkpoint with {what}")


def start(student, ours, seed):
    """Initial values: those that are always the same, and the spread of the random ones."""
    pair = Pair(student, ours, seed)
    first, second = (built(ours, n, pair.options)[1] for n in (0, 1))
    pair.load()
    theirs = origin(pair)
    for i, (name, p) in enumerate(named(pair.ours)):
        values = torch.cat([pair.student_start[k].flatten()[where] for k, numbers in theirs
                            for where in [numbers == i] if where.any()])
        expected, again = first[index(pair.ours, p)], second[index(pair.ours, p)]
        if expected.equal(again):
            off = (values.sort().values - expected.flatten().sort().values).abs().max()
            assert off < 1e-5, f"{name} starts at {few(values)}, not at {few(expected)}"
        elif len(values) >= 100:
            ratio = (values.std() / expected.std()).item()
            allowed = 1.05 + 6 / math.sqrt(len(values))
            assert 1 / allowed < ratio < allowed, (
                f"{name} starts with standard deviation {values.std():.3f}, not {expected.std():.3f}")


def few(values):
    """Some numbers of a tensor for a message."""
    values = values.flatten().unique().tolist()
    return ", ".join(f"{v:.3g}" for v in values[:4]) + (" ..." if len(values) > 4 else "")


# ---- One concept after the other -------------------------------------------------------------------------------------
def backbone(student, ours, seed):
    """Features, projection and levels: attention that averages everything gives the same answer."""
    pair = Pair(student, ours, seed, nheads=1)
    pair.compare("attention looks nowhere", FULL, loud, flat, alike, still, mute_encoder)


def padding(student, ours, seed):
    """Padding: nobody looks at it, and positions and references do not count it."""
    pair = Pair(student, ours, seed, nheads=1)
    deformable = ours.__name__ in ("deformable_detr", "sqr")  # whose encoder cannot look everywhere
    pair.compare("attention looks everywhere but at padding", PADDED, loud, flat, alike, still,
                 *[mute_encoder] * deformable)
    pair = Pair(student, ours, seed)
    if pair.agree(FULL):  # then padding is all that is left to be wrong
        pair.compare("right for images of one size, wrong for images of different size", PADDED)


FAINT = 0.05


def positions(student, ours, seed):
    """Positions: what faint attention sees of them, up to its strength; they are not in the values."""
    pair = Pair(student, ours, seed, nheads=1)
    one_query = [zero(r"ca_q_content|ca_q_pos|ca_q_sine\.(weight|layers\.1\.weight)"),
                 scaled(10 / FAINT, r"ca_q_sine\.bias|ca_q_sine\.layers\.1\.bias")]
    base = [louder(0.1), alike, still, zero("sampling_offsets"), *one_query]
    pair.load(*base, faint(0))
    without = pair.run(FULL)
    pair.load(*base, faint(FAINT))
    outs = zip(pair.run(FULL), without)
    theirs, expected = ((out["logits"] - before["logits"]).double().flatten() for out, before in outs)
    assert theirs.isfinite().all(), "some numbers are not finite"
    likeness = torch.cosine_similarity(theirs, expected, 0).item()
    assert likeness > 0.9995, f"attention sees other positions than it should (likeness {likeness:.3f} of 1)"

    if pair.agree(FULL, loud, flat, alike, still):
        pair.compare("positions seem to be part of the values", FULL, flat, alike, still)


BY_CONTENT = [loud, still, zero(r"ca_k_pos|ca_q_sine|sa_[qk]_pos")]


def attention(student, ours, seed):
    """Attention: the scores' scale, the softmax and the heads, on contents alone."""
    # SAM-DETR's cross-attention has a mark of its own, the aligner
    aligned = [zero("ca_q_content")] if ours.__name__ == "sam_detr" else []
    Pair(student, ours, seed).compare("attention by content", FULL, *BY_CONTENT, *aligned)


def spatial_query(student, ours, seed):
    """Conditional cross-attention: p_q = lambda p_s, beside the content inside every head, the first layer as it is."""
    pair = Pair(student, ours, seed)
    pair.compare("attention by position", FULL, mute_encoder, zero(r"ca_[qk]_content"))
    if pair.agree(FULL, *BY_CONTENT):
        pair.compare("attention by content and position", FULL, mute_encoder)


FIXED_POINTS = [zero(r"(sampling_offsets|attention_weights)\.weight", "reference_points"),
                scaled(10, r"attention_weights\.bias")]


def sampling(student, ours, seed):
    """Deformable attention: where the points lie on every level, and that their weights sum to 1."""
    pair = Pair(student, ours, seed)
    for part, other in [("encoder", "decoder"), ("decoder", "encoder")]:
        here = zero(rf"^{other}.*(sampling_offsets|attention_weights)")
        pair.compare(f"the {part}'s points", FULL, *FIXED_POINTS, here)


def aligner(student, ours, seed):
    """Semantics Aligner: what every head takes, from where inside the box, and how the old query weighs it."""
    by_content = zero(r"ca_k_sine\.layers\.1")
    Pair(student, ours, seed).compare("attention of the aligned queries", FULL, mute_encoder, still, by_content)


def smca(student, ours, seed):
    """SMCA: a Gaussian around every head's point."""
    pair = Pair(student, ours, seed, "smca")
    pair.compare("attention looks nowhere but near the point", FULL, mute_encoder, still, faint(0))


def multiscale(student, ours, seed):
    """Three levels: the deformable encoder, and which decoder layer looks at which level."""
    pair = Pair(student, ours, seed, "multiscale")
    pair.compare("decoder layers, each with its level", FULL, mute_encoder, still)
    pair.compare("all weights", PADDED)


def references(student, ours, seed):
    """Reference points or boxes: boxes are relative to them, before the sigmoid, layer by layer."""
    Pair(student, ours, seed).compare("without attention", PADDED, mute, keys=BOTH)


def queries(student, ours, seed):
    """Object queries are positions: what they hold starts at zero."""
    Pair(student, ours, seed).compare("without attention", PADDED, mute)


def heads(student, ours, seed):
    """Class and box heads, norms and feed-forward: cxcywh after a sigmoid, from every layer."""
    pair = Pair(student, ours, seed)
    pair.compare("without attention", PADDED, mute, alike, still)
    own_heads(pair)


def own_heads(pair):
    """The boxes of one layer at a time: with the other heads at zero its reference is (0.5, 0.5, 0.5, 0.5)."""
    heads = pair.ours.box_head
    own = hasattr(heads, "__len__") and len(heads) > 1 and heads[0] is not heads[1]
    for stage in range(len(pair.ours.decoder.layers)) if own else [None]:
        pair.load(mute, alike, *[zero(rf"^box_head\.(?!{stage}\.)\d+\.layers\.2")] * own)
        theirs, ours = (out["boxes"] for out in pair.run(PADDED))
        assert len(theirs) == len(ours), f"boxes of {len(theirs)} stages, not {len(ours)}"
        if own:
            same(f"boxes of layer {stage + 1}, by its own head,", theirs[stage, None], ours[stage, None])
        else:
            same("boxes", theirs, ours)


def refinement(student, ours, seed):
    """box_refine: own heads, each layer starts at the box before it, without gradient, and samples relative to it."""
    pair = Pair(student, ours, seed, "refinement")
    own_heads(pair)
    pair.compare("without attention", PADDED, mute, keys=BOTH)
    pair.load(mute)
    gradient_pattern(pair, origin(pair))
    if Pair(student, ours, seed).agree(FULL, *FIXED_POINTS, mute_encoder):
        pair.compare("points relative to a box", FULL, *FIXED_POINTS, mute_encoder)
    if ours.__name__ == "sqr":
        if not Pair(student, ours, seed, recollect="selective").agree(PADDED, mute, alike, train=True):
            return  # the mark `recollection` says why
        pair = Pair(student, ours, seed, "refinement", recollect="selective")
        pair.compare("groups of queries in training, without attention", PADDED, mute, keys=BOTH, train=True)


def ranked(model):
    """Two-stage: tokens that count as zero are not among the best, and class 0 is not the best of all classes."""
    zero(r"enc_output(_norm)?\.bias")(model)
    model.class_head[-1].weight.data[0] *= 0.3


def two_stage(student, ours, seed):
    """two_stage: anchors and proposals of all tokens, which of them become queries, and what is learned from them."""
    pair = Pair(student, ours, seed, "two_stage")
    pair.load(mute, ranked)
    for sizes in (PADDED, WIDE):
        theirs, expected = pair.run(sizes)
        assert "proposals" in theirs, "forward returns no 'proposals'"
        for key in BOTH:
            same(f"proposals: {key}", theirs["proposals"][key], expected["proposals"][key])
        for key in BOTH:
            same(f"the decoder, without attention: {key}", theirs[key], expected[key])
    gradient_pattern(pair, origin(pair))


def recollection(student, ours, seed):
    """Recollection: which groups every stage is fed, in training only, and in which order they come out."""
    for recollect in ("selective", "dense", "none"):
        pair = Pair(student, ours, seed, recollect=recollect)
        pair.load(mute, alike)
        for train in (True, False):
            theirs, expected = pair.run(PADDED, train)
            what = f"{recollect}, {'training' if train else 'inference'}"
            found, wanted = len(theirs["logits"]), len(expected["logits"])
            assert found == wanted, f"{what}: {found} groups, not {wanted}"
            same(f"{what}: logits of the groups", theirs["logits"], expected["logits"])


def recurrent(student, ours, seed):
    """DQRR: in training the last stage is fed its own output, at inference it runs alone."""
    pair = Pair(student, ours, seed, recurrent=True)
    for train in (True, False):
        pair.compare("training" if train else "inference", PADDED, mute, alike, train=train)


# ---- Gradients -------------------------------------------------------------------------------------------------------
def named(model):
    """Parameters outside of the backbone, by name."""
    return [(name, p) for name, p in model.named_parameters() if not name.startswith("backbone.")]


def index(model, parameter):
    return next(i for i, p in enumerate(model.parameters()) if p is parameter)


def origin(pair):
    """Where the student keeps our parameters: [(which of its parameters, for each number the index into named)].

    Every number of a checkpoint gets a value of its own, and load_official shows where it went. So it does not
    matter how the student names, splits or packs parameters.
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
    pair.load(tag)
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
    parts = [(f"{key} of stage {s + 1}", out[key][s]) for key in ("logits", "boxes") for s in range(len(out[key]))]
    return parts + [(f"proposals: {key}", x) for key, x in out.get("proposals", {}).items()]


def upstream(x, generator=1):
    return (x.nan_to_num(0) * torch.randn(x.shape, generator=torch.Generator().manual_seed(generator))).sum()


def gradient_pattern(pair, theirs):
    """Which output's gradient reaches which parameter: a missing or an extra detach shows here and nowhere else."""
    parameters, mine = list(pair.student.parameters()), [p for _, p in named(pair.ours)]
    parameters = [parameters[k] for k, _ in theirs]
    assert all(p.requires_grad for p in parameters), "some parameters outside of the backbone have requires_grad False"
    for (what, x), (_, y) in zip(*map(outputs, pair.run(FULL, train=True, gradients=True))):
        assert x.requires_grad, f"no gradient comes back from {what}"
        expected = lengths(torch.autograd.grad(upstream(y), mine, retain_graph=True, allow_unused=True))
        found = torch.autograd.grad(upstream(x), parameters, retain_graph=True, allow_unused=True)
        found = norms(pair, theirs, found)
        found, expected = (found / found.max()).tolist(), (expected / expected.max()).tolist()
        for (name, _), a, b in zip(named(pair.ours), found, expected):
            assert a < 1e-6 or b > 0, f"{what}: its gradient reaches {name}, and must not (a missing detach?)"
            assert a > 1e-7 or b < 1e-4, f"{what}: its gradient does not reach {name} (a detach too much?)"


def gradient_sizes(pair, theirs):
    """Norms of the gradient, parameter by parameter."""
    parameters = list(pair.student.parameters())
    x, y = (upstream(out["logits"]) + upstream(out["boxes"]) for out in pair.run(PADDED, train=True, gradients=True))
    expected = lengths(torch.autograd.grad(y, [p for _, p in named(pair.ours)], allow_unused=True))
    found = norms(pair, theirs, torch.autograd.grad(x, [parameters[k] for k, _ in theirs], allow_unused=True))
    for (name, _), a, b in zip(named(pair.ours), found.tolist(), expected.tolist()):
        assert abs(a - b) < 0.02 * b + 1e-4 * expected.norm(), f"the gradient of {name} has norm {a:.3g}, not {b:.3g}"


def lengths(gradients):
    return torch.tensor([0 if g is None else g.double().norm() for g in gradients], dtype=torch.float64)


def gradients(student, ours, seed):
    """Gradients: which output trains which parameter (detach), and how large they are."""
    pair = Pair(student, ours, seed)
    pair.load()
    theirs = origin(pair)
    gradient_pattern(pair, theirs)
    if pair.agree(PADDED, train=True, keys=BOTH):
        gradient_sizes(pair, theirs)


def training(student, ours, seed):
    """Training: what is frozen, that the backbone is not, and dropout in training only. Needs no weights of ours."""
    pair = Pair(student, ours, seed, dropout=0.5)
    model = pair.student
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, pair.ours)]
    assert trained[0] == trained[1], f"{trained[0]:,} parameters are trained, not {trained[1]:,}"
    images = batch(seed, PADDED)
    for mode in (True, False):
        torch.manual_seed(seed)
        with torch.no_grad():
            first, second = (checked(model.train(mode)(*images))["logits"] for _ in range(2))
        varies = (first - second).abs().max().item() > 1e-5
        assert varies == mode, "dropout=0.5 changes nothing in training" if mode else "dropout is not off in eval mode"
    out = checked(model.train()(*images))
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(upstream(out["logits"]) + upstream(out["boxes"]), parameters, allow_unused=True)
    trained = sum(g is not None and g.dim() == 4 and bool(g.any()) for g in found)
    assert trained > 3, "no gradient reaches the backbone"


# ---- All together ----------------------------------------------------------------------------------------------------
def everything(student, ours, seed):
    """All weights at once, images of odd sizes: every stage in inference and in training."""
    pair = Pair(student, ours, seed, **{"recollect": "selective"} if ours.__name__ == "sqr" else {})
    for train in (False, True):
        pair.compare("training" if train else "inference", [(100, 150), (131, 97)], keys=BOTH, train=train)


def official(student, ours, seed):
    """The numbers of the official code, at width 256 with a ResNet-50: predictions, loss and gradient."""
    import train

    name, extra = CASES[ours.__name__]
    case = Case(name)
    options = {k: v for k, v in case.json["case"]["args"].items() if k != "epochs"}
    model = student.build(case.json["case"]["num_classes"], pretrained_backbone=False, **options, **extra)
    if not hasattr(student, "load_official"):
        raise NotWritten("load_official")
    student.load_official(model, {"model": case.state_dict()})
    inputs = case.batch()
    with torch.no_grad():
        out = checked(model.eval()(*inputs))
    for key in ("logits", "boxes"):
        assert_close(key, out[key], case.arrays[key], key)
    with torch.device("meta"):
        criterion = train.SetCriterion(ours.build(3, pretrained_backbone=False))  # our losses, and our recipe
    out = checked(model.train()(*inputs))
    for key in ("logits", "boxes"):
        assert_close(f"{key} in training", out[key].detach(), case.arrays.get(f"train_{key}", case.arrays[key]), key)
    criterion(out, case.targets())["total"].backward()
    squares = [p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None]
    total, expected = math.sqrt(sum(squares)), case.json["grad_l2_total"]
    assert abs(total - expected) < 0.002 * expected, f"the gradient has norm {total:.6g}, not {expected:.6g}"


# ---- train.py: matching and losses -----------------------------------------------------------------------------------
class Softmax:
    recipe = dict(class_loss="softmax", w_class=1, w_l1=5, w_giou=2)


class Focal:
    recipe = dict(class_loss="focal", w_class=2, w_l1=5, w_giou=2)


def criteria(student, ours):
    """(name, the student's criterion, ours) for both kinds of classification."""
    if not hasattr(student, "SetCriterion"):
        raise NotWritten("SetCriterion")
    for model in (Softmax(), Focal()):
        yield model.recipe["class_loss"], student.SetCriterion(model), ours.SetCriterion(model)


def some_boxes(generator, *shape):
    xy, wh = torch.rand(2, *shape, 2, generator=generator)
    return torch.cat([0.2 + 0.6 * xy, 0.05 + 0.3 * wh], -1)


def some_targets(generator, *counts):
    return [{"labels": torch.randint(0, 3, (n,), generator=generator), "boxes": some_boxes(generator, n)}
            for n in counts]


def plain_predictions(generator, targets, S=3, Q=6, off=0.02):
    """Predictions that nobody can match in a wrong way: every stage has each object at another query."""
    logits = torch.randn(S, len(targets), Q, 4, generator=generator) - 2
    boxes = torch.full((S, len(targets), Q, 4), 0.02)
    for s in range(S):
        for b, target in enumerate(targets):
            n = len(target["labels"])
            query = torch.randperm(Q, generator=generator)[:n]
            boxes[s, b, query] = target["boxes"] + off * torch.rand(n, 4, generator=generator)
            logits[s, b, query, target["labels"]] += 4
    return {"logits": logits, "boxes": boxes}


def far_targets(generator, *counts):
    """Objects that lie far from each other, and none of them twice."""
    corners = torch.tensor([[0.2, 0.2], [0.8, 0.25], [0.3, 0.8], [0.75, 0.7]])
    targets = some_targets(generator, *counts)
    for target in targets:
        n = len(target["labels"])
        target["boxes"][:, :2] = corners[torch.randperm(4, generator=generator)[:n]]
    return targets


def matcher(student, ours, seed):
    """Matching: the assignment of least cost, with a probability in the cost; also for more objects than queries."""
    generator = torch.Generator().manual_seed(seed)
    logits, boxes = torch.randn(40, 6, 3, generator=generator) * 2, some_boxes(generator, 40, 6)
    targets = some_targets(generator, *[n % 9 for n in range(40)])
    for name, theirs, mine in criteria(student, ours):
        stored = case_of(f"matcher_{name}")
        cases = [("of the official code", stored.arrays["logits"], stored.arrays["boxes"], stored.targets()),
                 ("drawn at random", logits, boxes, targets)]
        for what, *inputs in cases:
            found, expected = ([{g: q for q, g in zip(*(i.tolist() for i in pair))} for pair in c.match(*inputs)]
                               for c in (theirs, mine))
            wrong = sum(a != b for a, b in zip(found, expected))
            assert not wrong, f"{name}: {wrong} of {len(expected)} images {what} are matched differently"


def losses_of(student, ours, seed, counts=(2, 3), **how):
    generator = torch.Generator().manual_seed(seed)
    targets = far_targets(generator, *counts)
    for name, theirs, mine in criteria(student, ours):
        out = plain_predictions(generator, targets, **how)
        yield name, theirs(out, targets), mine(out, targets)


def one_loss(student, ours, seed, loss):
    for name, theirs, expected in losses_of(student, ours, seed, S=1):
        assert loss in theirs, f"the criterion returns no {loss!r}"
        same(f"{name}: loss {loss!r}", theirs[loss][None], expected[loss][None], 1e-4)


def class_loss(student, ours, seed):
    """Class loss: cross-entropy with 0.1 for "no object", or focal, and what each is divided by."""
    one_loss(student, ours, seed, "class")


def l1_loss(student, ours, seed):
    """L1 loss: summed over coordinates, divided by the number of objects."""
    one_loss(student, ours, seed, "l1")


def giou_loss(student, ours, seed):
    """GIoU loss, divided by the number of objects."""
    one_loss(student, ours, seed, "giou")


def stages(student, ours, seed):
    """Every stage is matched by itself, and has a loss of its own."""
    for name, theirs, _ in losses_of(student, ours, seed, S=3, off=0):
        assert theirs["l1"].shape == (3,), f"loss 'l1' has shape {list(theirs['l1'].shape)}, not [3] for three stages"
        assert (theirs["l1"] < 1e-4).all(), f"{name}: perfect boxes have L1 losses {few(theirs['l1'])}"


def total(student, ours, seed):
    """The total is the sum of all losses of all stages, with the recipe's weights."""
    for name, theirs, _ in losses_of(student, ours, seed, S=3):
        weights = (Softmax if name == "softmax" else Focal).recipe
        expected = sum(weights[f"w_{loss}"] * theirs[loss].sum() for loss in ("class", "l1", "giou"))
        same(f"{name}: total of the losses it returns", theirs["total"].reshape(1, 1), expected.reshape(1, 1), 1e-4)


def empty(student, ours, seed):
    """Images without objects, in a batch with others and alone."""
    for counts in [(0, 2), (0, 0)]:
        for name, theirs, expected in losses_of(student, ours, seed, counts):
            for loss in ("class", "l1", "giou"):
                assert theirs[loss].isfinite().all(), f"{name}, {counts} objects: {loss!r} is not finite"
            if counts == (0, 0):
                cost = theirs["l1"].any() or theirs["giou"].any()
                assert not cost, f"{name}: boxes cost something without objects"


def proposals(student, ours, seed):
    """Two-stage models: proposals are trained with every label set to class 0."""
    generator = torch.Generator().manual_seed(seed)
    targets = far_targets(generator, 2, 3)
    objects = [{**t, "labels": t["labels"] * 0} for t in targets]
    _, (_, theirs, _) = criteria(student, ours)
    out, enc = plain_predictions(generator, targets), plain_predictions(generator, objects, S=1, Q=20)
    with_proposals = {**out, "proposals": {key: x[0] for key, x in enc.items()}}
    more = theirs(with_proposals, targets)["total"] - theirs(out, targets)["total"]
    wanted = theirs(enc, objects)["total"]  # as much as if they were a stage
    same("what proposals add to the total", more.reshape(1, 1), wanted.reshape(1, 1))


def criterion(student, ours, seed):
    """The numbers of the official criterion: all losses of all stages, and their gradient."""
    if not hasattr(student, "SetCriterion"):
        raise NotWritten("SetCriterion")
    for name, model in [("criterion_detr", Softmax()), ("criterion_conditional", Focal())]:
        case = case_of(name)
        out = {key: case.arrays[key].clone().requires_grad_() for key in ("logits", "boxes")}
        losses = student.SetCriterion(model)(out, case.targets())
        last = len(out["logits"]) - 1
        for loss, stored in [("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")]:
            for s in range(last + 1):
                expected = case.json["given"]["loss_raw"][stored if s == last else f"{stored}_{s}"]
                assert_close(f"{name}: {loss} of stage {s + 1}", losses[loss][s].detach(), expected, "loss")
        losses["total"].backward()
        for key, x in out.items():
            assert_close(f"{name}: gradient of {key}", x.grad, case.arrays[f"given_grad_{key}"], "criterion_grad")
