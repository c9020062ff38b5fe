"""What a file can earn points for: every mark is a function (student, ours, seed) that raises where it is not
met.

tests/grading/grader.py runs the marks, tests/grading/test_planted.py shows that each finds the mistakes it
is for.
"""

import math
from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.golden import Case, assert_close, options_of
from tests.grading.criterion_marks import (  # noqa: F401, found by name
    box_counts,
    class_loss,
    criterion,
    empty,
    giou_loss,
    l1_loss,
    matcher,
    proposals,
    stages,
    total,
)
from tests.grading.files import ours_named, path_of
from tests.grading.pairs import (
    BOTH,
    FULL,
    PADDED,
    WIDE,
    NotLoaded,
    NotWritten,
    Pair,
    alike,
    batch,
    built,
    case_name,
    checked,
    faint,
    few,
    file_of,
    finite,
    flat,
    gradient_pattern,
    gradient_sizes,
    index,
    loud,
    louder,
    mute,
    mute_cross,
    mute_deformable,
    mute_encoder,
    named,
    origin,
    same,
    scaled,
    still,
    upstream,
    zero,
)


class Apart(AssertionError):
    """Not met, and that does not depend on the parts a mark usually stands on."""


# ---- The contract ------------------------------------------------------------------------------------------
def shapes(student, ours, seed):
    """Output shapes and ranges, for any image size, batch, number of queries and heads; number of
    parameters.
    """
    for options, sizes in [({}, PADDED), ({"num_queries": 9, "nheads": 2}, [(75, 101)])]:
        pair = Pair(student, ours, seed, calm=False, **options)
        theirs, expected = pair.run(sizes)
        for key in ("logits", "boxes"):
            assert theirs[key].shape == expected[key].shape, (
                f"{key} of {len(sizes)} images: {list(theirs[key].shape)}, not {list(expected[key].shape)}"
            )
        low, high = theirs["boxes"].min().item(), theirs["boxes"].max().item()
        inside = ((expected["boxes"] >= 0) & (expected["boxes"] <= 1)).all()
        assert 0 <= low and high <= 1 or not inside, (
            f"boxes reach from {low:.2g} to {high:.2g}, not in [0, 1]"
        )
    count = [sum(p.numel() for p in counted(model)) for model in (pair.student, pair.ours)]
    assert count[0] == count[1], f"the model has {count[0]:,} parameters, not {count[1]:,}"


def counted(model):
    """All parameters but those of a frozen batch norm, which may be buffers as well."""
    frozen = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for p in module.parameters()
        if not p.requires_grad
    }
    return [p for p in model.parameters() if id(p) not in frozen]


def independence(student, ours, seed):
    """One image does not see the other."""
    pair = Pair(student, ours, seed, calm=False)
    images, mask = batch(seed, PADDED)
    other = images.clone()
    other[1] = batch(seed + 1, PADDED)[0][1]
    with torch.no_grad():
        before, after = (finite(pair.student.eval(), x, mask) for x in (images, other))
    for key in ("logits", "boxes"):
        off = (before[key] - after[key])[:, 0].abs().max().item()
        assert off < 1e-4, f"{key} of the first image change by {off:.2g} when the second one does"


def loading(student, ours, seed):
    """load_official takes every entry of a checkpoint, with or without {"model": ...}, and refuses a wrong
    one.
    """
    pair = Pair(student, ours, seed, calm=False)
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
    pair = Pair(student, ours, seed, calm=False)
    first, second = (built(ours, n, pair.options)[1] for n in (0, 1))
    pair.load()
    places = origin(pair)
    for i, (name, p) in enumerate(named(pair.ours)):
        values = torch.cat(
            [
                pair.student_start[k].flatten()[where]
                for k, numbers in places
                for where in [numbers == i]
                if where.any()
            ]
        )
        expected, again = first[index(pair.ours, p)], second[index(pair.ours, p)]
        if expected.equal(again):
            off = (values.sort().values - expected.flatten().sort().values).abs().max()
            assert off < 1e-5, f"{name} starts at {few(values)}, not at {few(expected)}"
        elif len(values) >= 100:
            ratio = (values.std() / expected.std()).item()
            allowed = 1.05 + 6 / math.sqrt(len(values))
            assert 1 / allowed < ratio < allowed, (
                f"{name} starts with standard deviation {values.std():.3f}, not {expected.std():.3f}"
            )
            theirs_reach, reach = (x.abs().max() / x.std() for x in (values, expected))
            assert (theirs_reach > 2.2) == (
                reach > 2.2
            ), (  # uniform: 1.7, normal: 2.5 of 100 numbers, more of more
                f"{name} starts from a {'normal' if theirs_reach > 2.2 else 'uniform'} distribution"
            )


# ---- One concept after the other ---------------------------------------------------------------------------
def backbone(student, ours, seed):
    """Features, projection and levels: attention that averages everything gives the same answer."""
    pair = Pair(student, ours, seed, nheads=1)
    pair.compare("attention looks nowhere", FULL, loud, flat, alike, still, mute_encoder)


def padding(student, ours, seed):
    """Padding: nobody looks at it, and positions and references do not count it."""
    pair = Pair(student, ours, seed, nheads=1)
    deformable = file_of(ours) in ("deformable_detr", "sqr")  # whose encoder cannot look everywhere
    pair.compare(
        "attention looks everywhere but at padding",
        PADDED,
        loud,
        flat,
        alike,
        still,
        *[mute_encoder] * deformable,
    )
    pair = Pair(student, ours, seed)
    if pair.agree(FULL, keys=BOTH):  # then padding is all that is left to be wrong
        pair.compare("right for images of one size, wrong for images of different size", PADDED, keys=BOTH)


FAINT = 0.05
FIXED_POINTS = [
    zero(r"(sampling_offsets|attention_weights)\.weight", "reference_points"),
    scaled(10, r"attention_weights\.bias"),
]


def positions(student, ours, seed):
    """Positions: what faint attention sees of them, up to its strength; they are not in the values."""
    pair = Pair(student, ours, seed, nheads=1)
    by_points = any(
        name.endswith("sampling_offsets.weight") for name, _ in pair.ours.decoder.named_parameters()
    )
    one_query = [
        zero(r"ca_q_content|ca_q_pos|ca_q_sine\.(weight|layers\.1\.weight)"),
        scaled(10 / FAINT, r"ca_q_sine\.bias|ca_q_sine\.layers\.1\.bias"),
    ]
    base = [louder(0.1), alike, still, zero("sampling_offsets"), *one_query]
    pair.load(*base, faint(0))
    without = pair.run(FULL)
    pair.load(*base, faint(FAINT))
    outs = zip(pair.run(FULL), without)
    theirs, expected = ((out["logits"] - before["logits"]).double().flatten() for out, before in outs)
    assert theirs.isfinite().all(), "some numbers are not finite"
    likeness = torch.cosine_similarity(theirs, expected, 0).item() if expected.any() or theirs.any() else 1
    assert likeness > 0.9995, f"attention sees other positions than it should (likeness {likeness:.3f} of 1)"

    if pair.agree(FULL, loud, flat, alike, still):
        pair.compare("positions seem to be part of the values", FULL, flat, alike, still)
        if pair.agree(FULL, flat, still, mute):
            pair.compare(
                "positions of queries seem to be part of the values", FULL, flat, still, mute_encoder
            )
    if by_points and pair.agree(FULL, *FIXED_POINTS, mute_encoder):
        pair.compare(
            "the decoder's points do not depend on positions as they should", FULL, mute_encoder, still
        )


BY_CONTENT = [loud, still, zero(r"ca_k_pos|ca_q_sine|sa_[qk]_pos")]


def attention(student, ours, seed):
    """Attention: the scores' scale, the softmax and the heads, on contents alone."""
    pair = Pair(student, ours, seed)
    # SAM-DETR's cross-attention has a mark of its own, the aligner, and deformable attention another one
    only = {
        "sam_detr": [zero("ca_q_content")],
        "deformable_detr": [mute_deformable],
        "sqr": [mute_deformable],
    }
    only = only.get(file_of(ours), [])
    try:
        pair.compare(
            "attention over tokens that are all the same", FULL, zero("^backbone"), *BY_CONTENT, *only
        )
    except AssertionError as error:
        raise Apart(*error.args) from None
    pair.compare("attention by content", FULL, *BY_CONTENT, *only)


def spatial_query(student, ours, seed):
    """Conditional cross-attention: p_q = lambda p_s, beside the content inside every head, the first layer
    as it is.
    """
    pair = Pair(student, ours, seed)
    pair.compare("attention by position", FULL, mute_encoder, zero(r"ca_[qk]_content"))
    if pair.agree(FULL, *BY_CONTENT):
        pair.compare("attention by content and position", FULL, mute_encoder)
        pair = Pair(student, ours, seed, calm=False)  # where lambda may come from what a norm hands on
        if pair.agree(FULL, mute) and pair.agree(FULL, *BY_CONTENT):
            pair.compare("attention by content and position, norms with weights", FULL, mute_encoder)


def sampling(student, ours, seed):
    """Deformable attention: where the points lie on every level, and that their weights sum to 1."""
    pair = Pair(student, ours, seed)
    for part, other in [("encoder", "decoder"), ("decoder", "encoder")]:
        here = zero(rf"^{other}.*(sampling_offsets|attention_weights)")
        pair.compare(f"the {part}'s points", FULL, *FIXED_POINTS, here)


def aligner(student, ours, seed):
    """Semantics Aligner: what every head takes, from where inside the box, and how the old query weighs it.
    """
    by_content = zero(r"ca_k_sine\.layers\.1")
    Pair(student, ours, seed).compare(
        "attention of the aligned queries", FULL, mute_encoder, still, by_content
    )


def smca(student, ours, seed):
    """SMCA: a Gaussian around every head's point."""
    pair = Pair(student, ours, seed, "smca")
    pair.compare("attention looks nowhere but near the point", FULL, mute_encoder, still, faint(0))


def references(student, ours, seed):
    """Reference points or boxes: boxes are relative to them, before the sigmoid, layer by layer."""
    Pair(student, ours, seed).compare("without attention", FULL, mute, keys=BOTH)


def queries(student, ours, seed):
    """Object queries are positions: what they hold starts at zero."""
    pair = Pair(student, ours, seed, calm=False)
    pair.compare("without attention", FULL, mute)
    pair.compare("without attention to the image", FULL, flat, still, mute_cross, mute_encoder)


def heads(student, ours, seed):
    """Class and box heads, norms and feed-forward: cxcywh after a sigmoid, from every layer."""
    pair = Pair(student, ours, seed, calm=False)
    pair.compare("without attention", FULL, mute, alike, still, scaled(5, r"ffn\.linear2\.weight"))
    own_heads(pair)


def own_heads(pair):
    """The boxes of one layer at a time: with the other heads at zero its reference is (0.5, 0.5, 0.5, 0.5).
    """
    heads = pair.ours.box_head
    own = hasattr(heads, "__len__") and len(heads) > 1 and heads[0] is not heads[1]
    for stage in range(len(pair.ours.decoder.layers)) if own else [None]:
        pair.load(mute, alike, *[zero(rf"^box_head\.(?!{stage}\.)\d+\.layers\.2")] * own)
        theirs, ours = (out["boxes"] for out in pair.run(FULL))
        assert len(theirs) == len(ours), f"boxes of {len(theirs)} stages, not {len(ours)}"
        if own:
            same(f"boxes of layer {stage + 1}, by its own head,", theirs[stage, None], ours[stage, None])
        else:
            same("boxes", theirs, ours)


def refinement(student, ours, seed):
    """box_refine: own heads, each layer starts at the box before it, without gradient, and samples relative
    to it.
    """
    pair = Pair(student, ours, seed, "refinement")
    own_heads(pair)
    pair.compare("without attention", FULL, mute, keys=BOTH)
    pair.load(mute)
    gradient_pattern(pair, origin(pair))
    if Pair(student, ours, seed).agree(FULL, *FIXED_POINTS, mute_encoder):
        pair.compare("points relative to a box", FULL, *FIXED_POINTS, mute_encoder)
    if file_of(ours) == "sqr":
        if not Pair(student, ours, seed, recollect="selective").agree(PADDED, mute, alike, train=True):
            return  # the mark `recollection` says why
        pair = Pair(student, ours, seed, "refinement", recollect="selective")
        pair.compare("groups of queries in training, without attention", PADDED, mute, keys=BOTH, train=True)


def ranked(model):
    """Two-stage: tokens that count as zero are not among the best, and class 0 is not the best of all
    classes.
    """
    zero(r"enc_output(_norm)?\.bias")(model)
    model.class_head[-1].weight.data[0] *= 0.3


def two_stage(student, ours, seed):
    """two_stage: anchors and proposals of all tokens, which of them become queries, and what is learned from
    them.
    """
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


def groups(student, ours, seed):
    """Who may attend to whom: in training queries of one group see their own alone, in inference one group
    is left.
    """
    option = next(
        name for name in ("num_groups", "num_one2many") if name in path_of(file_of(ours)).read_text("utf-8")
    )
    pair = Pair(student, ours, seed, calm=False, **{option: 3 if option == "num_groups" else 5})
    pair.load()
    for train in (True, False):
        theirs, expected = pair.run(PADDED, train)
        for key in BOTH:
            what = f"{key} in {'training' if train else 'inference'}"
            found, wanted = len(theirs[key]), len(expected[key])
            assert found == wanted, f"{what}: {found} stages and groups, not {wanted}"
            same(what, theirs[key], expected[key])
        if "one2many" in expected:
            assert "one2many" in theirs, "forward returns no 'one2many' in training"
            for key in BOTH:
                same(f"one2many: {key}", theirs["one2many"][key], expected["one2many"][key])


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


# ---- Training and gradients -------------------------------------------------------------------------------
def gradients(student, ours, seed):
    """Gradients: which output trains which parameter (detach), and how large they are."""
    pair = Pair(student, ours, seed, calm=False)
    pair.load()
    theirs = origin(pair)
    gradient_pattern(pair, theirs)
    if pair.agree(PADDED, train=True, keys=BOTH):
        gradient_sizes(pair, theirs)


def reaches_backbone(model, images):
    """Whether the convolutions of the backbone get a gradient, not just a projection."""
    out, parameters = checked(model(*images)), [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(
        upstream(out["logits"]) + upstream(out["boxes"]), parameters, allow_unused=True
    )
    return sum(g is not None and g.dim() == 4 and bool(g.any()) for g in found) > 3


class Dropped(TorchDispatchMode):
    """Counts how many numbers dropout looks at, by the number of elements of every tensor that it is applied
    to.
    """

    def __init__(self):
        super().__init__()
        self.sizes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.__name__.partition(".")[0] in (
            "native_dropout",
            "bernoulli_",
            "bernoulli",
            "rand",
            "rand_like",
        ):
            size = (out[0] if isinstance(out, tuple) else out).numel()
            self.sizes[size] += 1
        return out


def training(student, ours, seed):
    """Training: what is frozen, that the backbone is not, and dropout, everywhere and in training only."""
    pair = Pair(student, ours, seed, dropout=0.5, dim_feedforward=40)
    model = pair.student
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, pair.ours)]
    assert trained[0] == trained[1], f"{trained[0]:,} parameters are trained, not {trained[1]:,}"
    images = batch(seed, PADDED)
    for mode in (True, False):
        torch.manual_seed(seed)
        with torch.no_grad():
            first, second = (finite(model.train(mode), *images)["logits"] for _ in range(2))
        varies = (first - second).abs().max().item() > 1e-5
        assert varies == mode, (
            "dropout=0.5 changes nothing in training" if mode else "dropout is not off in eval mode"
        )
    theirs, expected = (reaches_backbone(m.train(), images) for m in (model, pair.ours))
    assert theirs or not expected, "no gradient reaches the backbone"
    dropped = []
    for m in (model, pair.ours):
        with torch.no_grad(), Dropped() as mode:
            m.train()(*images)
        dropped.append(mode.sizes)
    theirs, expected = dropped
    for size, count in expected.items():
        assert theirs[size] >= count, (
            f"dropout on tensors of {size:,} numbers, {place_of(size, images, pair.options)}: "
            f"{theirs[size]} times "
            f"in a forward pass, not {count}"
        )
    sums = [sum(size * count for size, count in sizes.items()) for sizes in dropped]
    assert sums[0] == sums[1], f"dropout looks at {sums[0]:,} numbers in a forward pass, not at {sums[1]:,}"


def place_of(size, images, options):
    """What a tensor of so many numbers is likely to be."""
    options, B = dict(options), len(images[0])
    M, D, F, Q = (options[name] for name in ("nheads", "hidden_dim", "dim_feedforward", "num_queries"))
    rest = size // B
    if size % (B * F) == 0 and (size % (B * D) or rest == F * Q):
        return "the hidden layer of a feed-forward block"
    if rest == M * Q * Q:
        return "weights of attention among queries"
    if rest == Q * D or rest % (M * Q):
        return "in front of a residual"
    return "weights of attention"


# ---- All together ------------------------------------------------------------------------------------------
def everything(student, ours, seed):
    """All weights at once, images of odd sizes: every stage in inference and in training."""
    pair = Pair(
        student, ours, seed, calm=False, **{"recollect": "selective"} if file_of(ours) == "sqr" else {}
    )
    for train in (False, True):
        pair.compare("training" if train else "inference", [(100, 150), (131, 97)], keys=BOTH, train=train)


def official(student, ours, seed):
    """The numbers of the official code, at width 256 with a ResNet-50: predictions, loss and gradient."""
    name, extra = case_name(file_of(ours))
    case = Case(name)
    options = options_of(case.json["case"]["args"], extra)
    model = student.build(case.json["case"]["num_classes"], pretrained_backbone=False, **options)
    if not hasattr(student, "load_official"):
        raise NotWritten("load_official")
    student.load_official(model, {"model": case.state_dict()})
    inputs = case.batch()
    with torch.no_grad():
        out = checked(model.eval()(*inputs))
    for key in ("logits", "boxes"):
        assert_close(key, out[key], case.arrays[key], key)
    with torch.device("meta"):
        criterion = ours_named("train").SetCriterion(
            ours.build(3, pretrained_backbone=False)
        )  # our losses, and our recipe
    out = checked(model.train()(*inputs))
    for key in ("logits", "boxes"):
        assert_close(
            f"{key} in training", out[key].detach(), case.arrays.get(f"train_{key}", case.arrays[key]), key
        )
    criterion(out, case.targets())["total"].backward()
    squares = [p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None]
    norm, expected = math.sqrt(sum(squares)), case.json["grad_l2_total"]
    assert abs(norm - expected) < 0.002 * expected, f"the gradient has norm {norm:.6g}, not {expected:.6g}"
