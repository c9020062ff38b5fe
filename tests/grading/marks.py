"""The marks: each is a function (student, ours, seed) that raises where its concept is not right.

tests/grading/grader.py runs them, tests/grading/judge.py decides which of those that fail are lost. A mark
compares the two models in views: weights and images for which little but its concept matters. If a view has no
other part in it, its failure is Sure.
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
    pairing,
    proposals,
    stages,
    total,
)
from tests.grading.files import ours_named, path_of
from tests.grading.judge import Failure
from tests.grading.pairs import (
    BOTH,
    FULL,
    PADDED,
    REFERENCES,
    WIDE,
    NotFinite,
    NotLoaded,
    NotWritten,
    Pair,
    alike,
    among_by_content,
    batch,
    build_both,
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
    mute_among,
    mute_cross,
    mute_deformable,
    mute_encoder,
    named,
    origin,
    plain_norms,
    same,
    same_answer,
    scaled,
    still,
    upstream,
    zero,
)


class Sure(AssertionError):
    """Not met, and no other part can be the reason, except for the heads."""


def failure_of(mark, student, ours, seed, sentence=str):
    """The Failure of one mark, or None. sentence: what is said about an error."""
    try:
        globals()[mark](student, ours, seed)
        return None
    except BaseException as error:
        if isinstance(error, NotLoaded):
            cause = error.__cause__ if mark == "loading" else error
            return Failure(sentence(cause), "loading")
        if isinstance(error, NotFinite):
            return Failure(sentence(error), "not finite", error.mark)
        known = isinstance(error, AssertionError)
        return Failure(sentence(error), "sure" if isinstance(error, Sure) else "" if known else "stops")


def deformable(ours):
    return file_of(ours) in ("deformable_detr", "sqr")


# ---- The contract ------------------------------------------------------------------------------------------
def shapes(student, ours, seed):
    """Output shapes and ranges in evaluation and training, for any image size, batch, number of queries and heads;
    number of parameters.
    """
    for options, sizes in [({}, PADDED), ({"num_queries": 9, "nheads": 2}, [(75, 101)])]:
        pair = Pair(student, ours, seed, calm=False, **options)
        for train in (False, True):
            theirs, expected = pair.run(sizes, train)
            plain = plain if train else expected["logits"].shape  # noqa: F821
            for key in BOTH if expected["logits"].shape == plain else ():  # others have marks of their own
                found, wanted = list(theirs[key].shape), list(expected[key].shape)
                assert found == wanted, (f"{key} of {len(sizes)} images in {'training' if train else 'evaluation'} "
                                         f"have the shape {found}, not {wanted}")
        low, high = theirs["boxes"].min().item(), theirs["boxes"].max().item()
        inside = ((expected["boxes"] >= 0) & (expected["boxes"] <= 1)).all()
        assert 0 <= low and high <= 1 or not inside, f"boxes reach from {low:.2g} to {high:.2g}, not in [0, 1]"
        a, b = (sum(p.numel() for p in counted(model)) for model in (pair.student, pair.ours))
        assert a == b, f"the model has {a:,} parameters, not {b:,}{parts_of_size(pair.ours, abs(a - b))}"


def counted(model):
    """All parameters except those of a frozen batch norm, which may be buffers as well."""
    frozen = {id(p) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
              for p in module.parameters() if not p.requires_grad}
    return [p for p in model.parameters() if id(p) not in frozen]


def parts_of_size(model, size):
    """A hint for a message: our parts with as many parameters."""
    found = [name for name, part in model.named_modules() if sum(p.numel() for p in part.parameters()) == size]
    return f"; the difference is as large as what our file calls {', '.join(found[:2])}" if found else ""


def loading(student, ours, seed):
    """load_official takes every entry of a checkpoint, with or without {"model": ...}, and refuses a wrong one."""
    pair = Pair(student, ours, seed, calm=False)
    pair.load()
    state = [x.double().norm().item() for x in pair.student.state_dict().values() if x.numel() > 1]
    for name, x in pair.checkpoint.items():
        norm = x.double().norm().item()
        assert not name.startswith("backbone") or any(abs(norm - y) <= 1e-4 * norm for y in state), (
            f"load_official loses the entry {name} of the checkpoint")
    origin(pair)
    pair.load_official(pair.student, pair.checkpoint)
    some = next(iter(pair.checkpoint))
    unknown = {**pair.checkpoint, "mystery.weight": torch.zeros(1)}
    without = {name: x for name, x in pair.checkpoint.items() if name != some}
    for what, checkpoint in [("an unknown entry", unknown), ("a missing entry", without)]:
        try:
            pair.load_official(pair.student, {"model": checkpoint})
        except Exception:
            continue
        raise AssertionError(f"load_official accepts a checkpoint with {what}")


def independence(student, ours, seed):
    """Predictions of an image depend neither on other images nor on earlier calls, and images and mask stay as they
    are.
    """
    pair = Pair(student, ours, seed, calm=False)
    used = pair.student.eval()
    new = build_both(getattr(student, "again", lambda: student)(), 0, pair.options)[0].eval()
    new.load_state_dict(used.state_dict())

    def predict(model, images, mask):
        torch.manual_seed(seed)
        given = images.clone(), mask.clone()
        with torch.no_grad():
            out = finite(model, *given)
        assert given[0].equal(images) and given[1].equal(mask), "forward changes its images or its mask in place"
        return out

    images, mask = batch(seed, PADDED)
    other = images.clone()
    other[1] = batch(seed + 1, PADDED)[0][1]
    first, later = predict(new, images, mask), None
    for name, x, m in [("full", *batch(seed, FULL)), ("first", images, mask), ("second", other, mask)]:
        later = later if name == "second" else predict(used, x, m)
    changed = predict(used, other, mask)
    for key in BOTH:
        off = (first[key] - later[key]).abs().max().item()
        assert off < 1e-4, (f"{key} change by {off:.2g} if the model has seen images with another mask: it keeps "
                            f"something between calls")
        off = (later[key] - changed[key])[:, 0].abs().max().item()
        assert off < 1e-4, f"{key} of the first image change by {off:.2g} if the second image changes"


def start(student, ours, seed):
    """Initial values: constants, and the spread and the kind of the random ones."""
    pair = Pair(student, ours, seed, calm=False)
    first, second = (built(ours, n, pair.options)[1] for n in (0, 1))
    pair.load()
    places = origin(pair)
    for i, (name, p) in enumerate(named(pair.ours)):
        values = torch.cat([pair.student_start[k].flatten()[where] for k, numbers in places
                            for where in [numbers == i] if where.any()])
        expected, again = first[index(pair.ours, p)], second[index(pair.ours, p)]
        what = f"the parameter that is {name} in our file starts"
        if expected.equal(again):
            off = (values.sort().values - expected.flatten().sort().values).abs().max()
            assert off < 1e-5, f"{what} at {few(values)}, not at {few(expected)}"
        elif len(values) >= 30:
            ratio = (values.std() / expected.std()).item()
            allowed = 1.05 + 6 / math.sqrt(len(values))
            assert 1 / allowed < ratio < allowed, (
                f"{what} with standard deviation {values.std():.3f}, not {expected.std():.3f}")
            theirs_reach, reach = (x.abs().max() / x.std() for x in (values, expected))
            kind = "normal" if theirs_reach > 2.2 else "uniform"  # uniform: 1.7, normal: 2.5 of 100 numbers
            assert len(values) < 100 or (theirs_reach > 2.2) == (reach > 2.2), f"{what} from a {kind} distribution"


# ---- One concept after the other ---------------------------------------------------------------------------
FAINT = 0.05
FIXED_POINTS = [zero(r"(sampling_offsets|attention_weights)\.weight", "reference_points"),
                scaled(10, r"attention_weights\.bias")]
BY_CONTENT = [loud, still, among_by_content, zero(r"ca_k_pos|ca_q_sine")]


def backbone(student, ours, seed):
    """Features, projection and levels: attention that averages everything gives the same answer."""
    proposed = features_by_proposals(student, ours, seed) if deformable(ours) else None
    try:
        if not proposed:
            Pair(student, ours, seed, nheads=1, hidden_dim=64).compare(
                "image features (order of colours, stages of the ResNet, projection, its norm), averaged over the "
                "image", FULL, loud, flat, alike, still, mute_encoder)
    except AssertionError as error:
        raise Sure(*error.args) if proposed is False else error


def features_by_proposals(student, ours, seed):
    """Whether two-stage proposals, which look at one token each, are right; None if there are none."""
    try:
        pair = Pair(student, ours, seed, "two_stage", hidden_dim=64)
        pair.load(mute_encoder)
        theirs, expected = pair.run(FULL)
        same("", theirs["proposals"]["logits"], expected["proposals"]["logits"])
        return True
    except AssertionError:
        return False
    except Exception:
        return None


def padding(student, ours, seed):
    """Padding: nobody looks at it, and positions and references do not count it."""
    pair = Pair(student, ours, seed, nheads=1)
    # The encoder of Deformable DETR cannot look everywhere
    pair.compare("attention that looks everywhere but at padding", PADDED, loud, flat, alike, still,
                 *[mute_encoder] * deformable(ours))
    pair = Pair(student, ours, seed)
    if pair.agree(FULL, keys=BOTH):  # then only padding can be wrong
        pair.compare("images of one size are right, but for images of different size the", PADDED, keys=BOTH)


def positions(student, ours, seed):
    """Positions: what attention sees of them; they belong to queries and keys, not to values."""
    pair = Pair(student, ours, seed, nheads=1)
    by_points = any(name.endswith("sampling_offsets.weight") for name, _ in pair.ours.decoder.named_parameters())
    one_query = [zero(r"ca_q_content|ca_q_pos|ca_q_sine\.(weight|layers\.1\.weight)"),
                 scaled(10 / FAINT, r"ca_q_sine\.bias|ca_q_sine\.layers\.1\.bias")]
    base = [louder(0.1), alike, still, zero("sampling_offsets"), *one_query]
    pair.load(*base, faint(0))
    without = pair.run(FULL)
    pair.load(*base, faint(FAINT))
    theirs, expected = ((out["logits"] - before["logits"]).double().flatten()
                        for out, before in zip(pair.run(FULL), without))
    assert theirs.isfinite().all(), "some numbers are not finite"
    likeness = torch.cosine_similarity(theirs, expected, 0).item() if expected.any() or theirs.any() else 1
    assert likeness > 0.9995, (f"attention sees other positions than it should (likeness {likeness:.3f} of 1): look "
                               f"at the encoding, and at the queries and keys it is added to")
    if pair.agree(FULL, loud, flat, alike, still):
        pair.compare("values seem to contain positions: with attention that averages everything the", FULL, flat,
                     alike, still)
        if pair.agree(FULL, flat, still, mute):
            pair.compare("contents of queries seem to contain their positions: the", FULL, flat, still, mute_encoder)
    if by_points and pair.agree(FULL, *FIXED_POINTS, mute_encoder):
        pair.compare("the decoder's points do not depend on positions as they should: the", FULL, mute_encoder,
                     mute_among, still)
    rest = [mute_deformable if deformable(ours) else mute_encoder, still]
    pair = Pair(student, ours, seed)
    if pair.agree(FULL, *BY_CONTENT, *only(ours)) and pair.agree(FULL, *rest, mute_among):
        pair.compare("attention among queries is right without positions; with positions in queries and keys the",
                     FULL, *rest)


def only(ours):
    """SAM-DETR's cross-attention has a mark of its own, the aligner, and deformable attention has sampling."""
    return [zero("ca_q_content")] if file_of(ours) == "sam_detr" else [mute_deformable] * deformable(ours)


def attention(student, ours, seed):
    """Attention: the scores' scale, the softmax and the heads, and where its result is added."""
    pair = Pair(student, ours, seed)
    try:
        pair.compare("with attention that answers a constant (self-attention first, then cross-attention; each is added "
                     "to its input, then comes the norm) the", FULL, mute, alike, still)
        pair.compare("with attention over tokens that are all the same (its weights must sum to 1 over the keys, and "
                     "heads be merged as they were split) the", FULL, zero("^backbone"), alike, *BY_CONTENT,
                     *only(ours))
    except AssertionError as error:
        raise Sure(*error.args) from None
    pair.compare("with attention by content (scale, softmax, heads) the", FULL, alike, *BY_CONTENT, *only(ours))
    if pair.agree(FULL, *BY_CONTENT, *only(ours), mute_among):
        pair.compare("with attention among queries by content (scale, softmax, heads) the", FULL, *BY_CONTENT,
                     *only(ours))


def spatial_query(student, ours, seed):
    """Conditional cross-attention: p_q = lambda p_s, beside the content inside every head; the first layer as it is."""
    pair = Pair(student, ours, seed)
    pair.compare("attention of the first layer, where query positions are added to the content: the", FULL,
                 *BY_CONTENT, mute_among)
    pair.compare("attention by position only (p_s, lambda, their order inside each head): the", FULL, mute_encoder,
                 mute_among, zero(r"ca_[qk]_content"))
    if pair.agree(FULL, *BY_CONTENT):
        pair.compare("attention by content and position, side by side in each head: the", FULL, mute_encoder,
                     mute_among)
        pair = Pair(student, ours, seed, calm=False)  # where it matters which side of a norm lambda comes from
        if pair.agree(FULL, mute) and pair.agree(FULL, *BY_CONTENT):
            pair.compare("attention by content and position; lambda comes from the layer's output, not from what the "
                         "norm makes of it: the", FULL, mute_encoder, mute_among)


def sampling(student, ours, seed):
    """Deformable attention: where the points lie on every level, and that their weights sum to 1."""
    pair = Pair(student, ours, seed)
    for part, other in [("encoder", "decoder"), ("decoder", "encoder")]:
        here = zero(rf"^{other}.*(sampling_offsets|attention_weights)")
        pair.compare(f"with fixed points in the {part} (offsets, their unit, weights, order of heads, levels and "
                     f"points) the", FULL, *FIXED_POINTS, here)
    if pair.agree(FULL, mute_encoder, mute_among, zero("attention_weights.weight"), still):
        pair.compare("with fixed offsets and weights that depend on the query the", FULL, mute_encoder, mute_among, still)


def aligner(student, ours, seed):
    """Semantics Aligner: what every head takes, from where inside the box, and how the old query weighs it."""
    pair = Pair(student, ours, seed)
    by_content = [mute_encoder, mute_among, still, zero(r"ca_k_sine\.layers\.1")]
    if not pair.agree(FULL, *by_content, zero(r"aligner\.point_mlp\.6")):
        pair.compare("with all points at the centre of the box (regions by RoIAlign, re-weighted by "
                     "sigmoid(Linear(query)), each head with its own D channels) the", FULL, *by_content,
                     zero(r"aligner\.point_mlp\.6"))
    pair.compare("with points anywhere in the box (tanh, their order, from the box to the image) the", FULL, *by_content)
    if pair.agree(FULL, mute_encoder, mute_among, still, zero(r"ca_k_content")):
        return
    pair.compare("with keys that have positions only (each point's sine, in coordinates of the image) the", FULL,
                 mute_encoder, mute_among, still, zero(r"ca_k_content"))


def smca(student, ours, seed):
    """SMCA: a Gaussian around every head's point."""
    pair = Pair(student, ours, seed, "smca")
    pair.compare("with attention that sees the Gaussian only (its centre, its scale, squared, over 8) the", FULL,
                 mute_encoder, still, faint(0))


def references(student, ours, seed):
    """Reference points or boxes: boxes are relative to them, before the sigmoid, layer by layer."""
    pair = Pair(student, ours, seed)
    pair.compare("without attention the", FULL, mute, keys=BOTH)
    for factor in (3, 8):
        pair.compare("with references close to 0 and 1 (is one clamped?) the", FULL, mute,
                     scaled(factor, REFERENCES[file_of(ours) == "sam_detr"]), keys=BOTH)


def queries(student, ours, seed):
    """Object queries are positions: what they hold starts at zero."""
    pair = Pair(student, ours, seed, calm=False)
    pair.compare("without attention the", FULL, mute)
    pair.compare("without attention to the image the", FULL, flat, still, mute_cross, mute_encoder)
    pair = Pair(student, ours, seed)
    if pair.agree(FULL, alike, *BY_CONTENT):
        pair.compare("with query positions in the queries of cross-attention the", FULL, *BY_CONTENT, mute_among)


def heads(student, ours, seed):
    """Class and box heads, norms and feed-forward: cxcywh after a sigmoid, from every layer."""
    pair = Pair(student, ours, seed, calm=False)
    pair.compare("feed-forward block, last norm and class head of each layer: the", FULL, same_answer, alike, still)
    own_heads(pair, same_answer)
    if pair.agree(FULL, mute, alike, still, plain_norms):
        pair.compare("without attention, norms with weights: the", FULL, mute, alike, still,
                     scaled(5, r"ffn\.linear2\.weight"))
        own_heads(pair, mute)


def own_heads(pair, *changes):
    """The boxes of one layer at a time: with the other heads at zero its reference is (0.5, 0.5, 0.5, 0.5)."""
    found = pair.ours.box_head
    own = hasattr(found, "__len__") and len(found) > 1 and found[0] is not found[1]
    for stage in range(len(pair.ours.decoder.layers)) if own else [None]:
        pair.load(*changes, alike, *[zero(rf"^box_head\.(?!{stage}\.)\d+\.layers\.2")] * own)
        theirs, ours = (out["boxes"] for out in pair.run(FULL))
        assert len(theirs) == len(ours), f"boxes of {len(theirs)} stages, not {len(ours)}"
        if own:
            same(f"boxes of layer {stage + 1}, by its own head,", theirs[stage, None], ours[stage, None], rows="")
        else:
            same("boxes", theirs, ours)


def refinement(student, ours, seed):
    """box_refine: own heads, each layer starts at the box before it, without gradient, and samples relative to it."""
    pair = Pair(student, ours, seed, "refinement")
    own_heads(pair, mute)
    pair.compare("without attention the", FULL, mute, keys=BOTH)
    pair.compare("with references close to 0 and 1 the", FULL, mute, scaled(8, REFERENCES[0]), keys=BOTH)
    pair.load(mute)
    gradient_pattern(pair, origin(pair))
    if Pair(student, ours, seed).agree(FULL, *FIXED_POINTS, mute_encoder):
        pair.compare("with points relative to a box the", FULL, *FIXED_POINTS, mute_encoder)
    if file_of(ours) == "sqr":
        if not Pair(student, ours, seed, recollect="selective").agree(PADDED, mute, alike, train=True):
            return  # the mark `recollection` says why
        pair = Pair(student, ours, seed, "refinement", recollect="selective")
        pair.compare("groups of queries in training, without attention: the", PADDED, mute, keys=BOTH, train=True)


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
            same(f"{key} of the proposals", theirs["proposals"][key], expected["proposals"][key], rows="image")
        for key in BOTH:
            same(f"queries made of the best proposals, without attention: {key}", theirs[key], expected[key])
    gradient_pattern(pair, origin(pair))


def groups(student, ours, seed):
    """Who may attend to whom: in training queries of one group see only their own; inference has one group."""
    option = next(name for name in ("num_groups", "num_one2many")
                  if name in path_of(file_of(ours)).read_text("utf-8"))
    pair = Pair(student, ours, seed, calm=False, **{option: 3 if option == "num_groups" else 5})
    pair.load()
    for train in (True, False):
        theirs, expected = pair.run(PADDED, train)
        mode = "training" if train else "inference"
        for key in BOTH:
            same(f"in {mode} {key}", theirs[key], expected[key])
        extra = set(theirs) ^ set(expected) - {"groups"}
        assert not extra - {"groups"}, f"in {mode} forward returns {', '.join(theirs)}, not {', '.join(expected)}"
        for name in {"groups", "one2many"} & set(expected):
            assert name in theirs, f"in {mode} forward returns no {name!r}"
        for key, wanted in expected.get("one2many", {}).items():
            found = theirs["one2many"].get(key)
            if isinstance(wanted, torch.Tensor):
                same(f"one2many: {key}", found, wanted)
            else:
                assert found == wanted, f"one2many: {key} is {found}, not {wanted}"


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
            same(f"{what}: logits of the groups", theirs["logits"], expected["logits"], rows="group")


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
    found = torch.autograd.grad(upstream(out["logits"]) + upstream(out["boxes"]), parameters, allow_unused=True)
    return sum(g is not None and g.dim() == 4 and bool(g.any()) for g in found) > 3


class Dropout(TorchDispatchMode):
    """Counts by size the tensors that dropout is applied to. With `value` it drops nothing, but still divides by
    1 - p: `value` is what torch.rand gives to those who write dropout themselves.
    """
    DRAWS = ("native_dropout", "bernoulli_", "bernoulli", "rand", "rand_like", "uniform_")

    def __init__(self, value=None):
        super().__init__()
        self.sizes, self.value = Counter(), value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func.__name__.partition(".")[0], func(*args, **(kwargs or {}))
        if name in self.DRAWS:
            self.sizes[(out[0] if isinstance(out, tuple) else out).numel()] += 1
            if name == "native_dropout" and self.value is not None:
                return args[0] / (1 - args[1]), torch.ones_like(out[1])
            if self.value is not None:
                out.fill_(1 if "bernoulli" in name else self.value)
        return out


def training(student, ours, seed):
    """Training: the recipe's loss and weights, the parameters that are trained, and dropout: its places and its rate,
    in training only.
    """
    pair = Pair(student, ours, seed, calm=False, dropout=0.5, dim_feedforward=40)
    model, images = pair.student, batch(seed, PADDED)
    for mode in (False, True):
        torch.manual_seed(seed)
        with torch.no_grad():
            first, second = (finite(model.train(mode), *batch(seed, PADDED))["logits"] for _ in range(2))
        if not mode and (first - second).abs().max() > 1e-5:
            raise Sure("predictions in evaluation differ from call to call: dropout must be off")
        assert not mode or (first - second).abs().max() > 1e-5, "dropout=0.5 changes nothing in training"
    without = Pair(student, ours, seed, calm=False)
    modes = [[m.train(mode)(*batch(seed, PADDED))["logits"].detach() for mode in (False, True)]
             for m in (without.student, without.ours)]
    (theirs, trained), (expected, ours_trained) = modes
    if expected.shape == ours_trained.shape and torch.allclose(expected, ours_trained, atol=1e-4):
        if theirs.shape != trained.shape or not torch.allclose(theirs, trained, atol=1e-3):
            raise Sure("with dropout=0.0 predictions in training and in evaluation differ: is a BatchNorm live, or "
                       "the rate of a dropout fixed?")
    wrong_recipe(student, model, ours)
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, pair.ours)]
    assert trained[0] == trained[1], f"{trained[0]:,} parameters are trained, not {trained[1]:,}"
    theirs, expected = (reaches_backbone(m.train(), images) for m in (model, pair.ours))
    assert theirs or not expected, "no gradient reaches the backbone"
    dropped = []
    for m in (model, pair.ours):
        with torch.no_grad(), Dropout() as mode:
            m.train()(*images)
        dropped.append(mode.sizes)
    theirs, expected = dropped
    for size, count in expected.items():
        assert theirs[size] >= count, (
            f"dropout on tensors of {size:,} numbers, {place_of(size, images, pair.options)}: {theirs[size]} times "
            f"in a forward pass, not {count}")
    sums = [sum(size * count for size, count in sizes.items()) for sizes in dropped]
    assert sums[0] == sums[1], f"dropout looks at {sums[0]:,} numbers in a forward pass, not at {sums[1]:,}"
    if without.agree(PADDED, train=True):
        pair.load()
        if not any(right_factors(pair, value) for value in (0.0, 1 - 1e-6)):
            raise AssertionError("dropout=0.5 is applied as often as it should be, but at another place or with "
                                 "another rate: where nothing is dropped, division by 1 - p gives other predictions")


def right_factors(pair, value):
    with torch.no_grad(), Dropout(value):
        theirs, expected = pair.run(PADDED, train=True)
    return torch.allclose(theirs["logits"], expected["logits"], rtol=1e-3, atol=2e-3)


def wrong_recipe(student, model, ours):
    """A RECIPE is not needed for grading; if there is one, its loss and its weights must be the paper's."""
    found = getattr(model, "recipe", None) or getattr(student, "RECIPE", None)
    for name in ("class_loss", "w_class", "w_l1", "w_giou", "cost_class", "corner_l1") if found else ():
        theirs, expected = (recipe.get(name, recipe.get("w_class") if name == "cost_class" else None)
                            for recipe in (found, ours.RECIPE))
        assert theirs == expected, f"RECIPE has {name}={theirs!r}, the paper's is {expected!r}"


def place_of(size, images, options):
    """A tensor of so many numbers is likely to be this."""
    options, B = dict(options), len(images[0])
    M, D, F, Q = (options[name] for name in ("nheads", "hidden_dim", "dim_feedforward", "num_queries"))
    rest = size // B
    if size % (B * F) == 0 and (size % (B * D) or rest == F * Q):
        return "the hidden layer of a feed-forward block"
    if rest == M * Q * Q:
        return "weights of attention among queries"
    return "in front of a residual" if rest == Q * D or rest % (M * Q) else "weights of attention"


# ---- All together ------------------------------------------------------------------------------------------
def everything(student, ours, seed):
    """All weights at once, images of odd sizes: every stage in inference and in training."""
    recollect = {"recollect": "selective"} if file_of(ours) == "sqr" else {}
    pair = Pair(student, ours, seed, calm=False, **recollect)
    for train in (False, True):
        pair.compare(f"in {'training' if train else 'inference'} (the command first_difference says where they begin "
                     f"to differ)", ((100, 150), (131, 97)), keys=BOTH, train=train)


def official(student, ours, seed):
    """The numbers of the official code, at width 256 with a ResNet-50: predictions, loss and gradient."""
    name, extra = case_name(file_of(ours))
    case = Case(name)
    options = options_of(case.json["case"]["args"], extra)
    model = student.build(case.json["case"]["num_classes"], pretrained_backbone=False, **options)
    if not hasattr(student, "load_official"):
        raise NotWritten("not written yet: load_official")
    student.load_official(model, {"model": case.state_dict()})
    inputs = case.batch()
    with torch.no_grad():
        out = checked(model.eval()(*inputs))
    for key in BOTH:
        assert_close(key, out[key], case.arrays[key], key)
    with torch.device("meta"):
        criterion = ours_named("train").SetCriterion(ours.build(3, pretrained_backbone=False))  # our losses and recipe
    out = checked(model.train()(*inputs))
    for key in BOTH:
        assert_close(f"{key} in training", out[key].detach(), case.arrays.get(f"train_{key}", case.arrays[key]), key)
    criterion(out, case.targets())["total"].backward()
    squares = [p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None]
    norm, expected = math.sqrt(sum(squares)), case.json["grad_l2_total"]
    assert abs(norm - expected) < 0.002 * expected, f"the gradient has norm {norm:.6g}, not {expected:.6g}"
