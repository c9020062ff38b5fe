"""The marks: each is a function (student, ours, seed) that raises where its concept is not right.

tests/grading/grader.py runs them, tests/grading/judge.py decides which of those that fail are lost. A mark
compares the two models in views: weights and images for which little but its concept matters. If a view has
no other part in it, its failure is Sure.
"""
import math

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.golden import Case, assert_close, options_of
from tests.grading import criterion_marks, pairs
from tests.grading import weights as w
from tests.grading.files import ours_named
from tests.grading.judge import Failure
from tests.grading.pairs import BOTH, FULL, PADDED, Pair, batch, file_of, finite, origin, same


class Sure(AssertionError):
    """Not met, and no other part can be the reason, except for the heads."""


def failure_of(mark, student, ours, seed, sentence=str):
    """The Failure of one mark, or None. sentence: what is said about an error."""
    try:
        (globals().get(mark) or getattr(criterion_marks, mark))(student, ours, seed)
        return None
    except BaseException as error:
        if isinstance(error, pairs.NotLoaded):
            cause = error.__cause__ if mark == "loading" else error
            return Failure(sentence(cause), "loading")
        if isinstance(error, pairs.NotFinite):
            return Failure(sentence(error), "not finite", error.mark)
        known = isinstance(error, AssertionError)
        return Failure(sentence(error), "sure" if isinstance(error, Sure) else "" if known else "stops")


# ---- The contract ------------------------------------------------------------------------------------------
def shapes(student, ours, seed):
    """Output shapes and ranges, for any size, batch, number of queries and heads; number of parameters."""
    for options, sizes in [({}, PADDED), ({"num_queries": 9, "nheads": 2}, [(75, 101)])]:
        pair, plain = Pair(student, ours, seed, calm=False, **options), None  # plain: shape in evaluation
        for mode in ("evaluation", "training"):
            theirs, expected = pair.run(sizes, train=mode == "training")
            plain = plain or expected["logits"].shape  # files that differ in training have a mark for that
            for key in BOTH if expected["logits"].shape == plain else ():
                found, wanted = list(theirs[key].shape), list(expected[key].shape)
                assert found == wanted, f"{key} in {mode} have the shape {found}, not {wanted}"
        low, high = theirs["boxes"].min().item(), theirs["boxes"].max().item()
        inside = ((expected["boxes"] >= 0) & (expected["boxes"] <= 1)).all()
        assert 0 <= low and high <= 1 or not inside, f"boxes reach from {low:.2g} to {high:.2g}, not 0 to 1"
        a, b = (sum(p.numel() for p in counted(model)) for model in (pair.student, pair.ours))
        assert a == b, f"the model has {a:,} parameters, not {b:,}"


def counted(model):
    """All parameters except those of a frozen batch norm, which may be buffers as well."""
    frozen = {id(p) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
              for p in module.parameters() if not p.requires_grad}
    return [p for p in model.parameters() if id(p) not in frozen]


def loading(student, ours, seed):
    """load_official takes all of a checkpoint, with or without {"model": ...}, and refuses a wrong one."""
    pair = Pair(student, ours, seed, calm=False)
    pair.load()
    state = [x.double().norm().item() for x in pair.student.state_dict().values() if x.numel() > 1]
    for name, x in pair.checkpoint.items():
        norm = x.double().norm().item()
        there = not name.startswith("backbone") or any(abs(norm - y) <= 1e-4 * norm for y in state)
        assert there, f"load_official loses the entry {name} of the checkpoint"
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
    """Predictions depend neither on other images nor on earlier calls; images and mask stay as they are."""
    pair = Pair(student, ours, seed, calm=False)
    pair.loads()
    used = pair.student.eval()
    new = pairs.build_both(getattr(student, "again", lambda: student)(), 0, pair.options)[0].eval()
    new.load_state_dict(used.state_dict())

    def predict(model, images, mask):
        torch.manual_seed(seed)
        given = images.clone(), mask.clone()
        with torch.no_grad():
            out = finite(model, *given)
        assert given[0].equal(images) and given[1].equal(mask), "forward changes its images or mask in place"
        return out

    images, mask = batch(seed, PADDED[::-1])  # `shapes` has seen maps of this size, with other masks
    other = images.clone()
    other[1] = batch(seed + 1, PADDED[::-1])[0][1]
    first = predict(new, images, mask)
    predict(used, *batch(seed, FULL))
    later, changed = predict(used, images, mask), predict(used, other, mask)
    for key in BOTH:
        off = (first[key] - later[key]).abs().max().item()
        assert off < 1e-4, f"{key} change by {off:.2g} after another mask: the model keeps something"
        off = (later[key] - changed[key])[:, 0].abs().max().item()
        assert off < 1e-4, f"{key} of the first image change by {off:.2g} if the second image changes"


def start(student, ours, seed):
    """Initial values: constants, and the spread and the kind of the random ones."""
    pair = Pair(student, ours, seed, calm=False)
    first, second = (pairs.built(ours, n, pair.options)[1] for n in (0, 1))
    pair.load()
    places = origin(pair)
    number = [id(p) for p in pair.ours.parameters()]
    for i, (name, p) in enumerate(pairs.named(pair.ours)):
        values = torch.cat([pair.student_start[k].flatten()[where] for k, numbers in places
                            for where in [numbers == i] if where.any()])
        expected, again = (values[number.index(id(p))] for values in (first, second))
        what = f"the parameter that is {name} in our file starts"
        if expected.equal(again):
            off = (values.sort().values - expected.flatten().sort().values).abs().max()
            assert off < 1e-5, f"{what} near {values.mean():.3g}, not at {expected.mean():.3g}"
        elif len(values) < 30:
            a, b = values.abs().mean(), expected.abs().mean()
            assert 0.1 < a / b < 10 and any(values != values[0]), f"{what} near {a:.2g}, not at random"
        else:
            a, b, allowed = values.std(), expected.std(), 1.05 + 6 / math.sqrt(len(values))
            assert 1 / allowed < a / b < allowed, f"{what} with standard deviation {a:.3f}, not {b:.3f}"
            # Uniform numbers reach 1.7 standard deviations, 100 normal ones 2.5
            reach, wanted = (x.abs().max() / x.std() > 2.2 for x in (values, expected))
            kind = "normal" if reach else "uniform"
            assert len(values) < 100 or reach == wanted, f"{what} from a {kind} distribution"


# ---- One concept after the other ---------------------------------------------------------------------------
FAINT = 0.05
FIXED_POINTS = [w.zero(r"(sampling_offsets|attention_weights)\.weight", "reference_points"),
                w.scaled(10, r"attention_weights\.bias")]
BY_CONTENT = [w.loud, w.still, w.zero(r"ca_k_pos|ca_q_sine")]


def deformable(ours):
    return file_of(ours) in ("deformable_detr", "sqr")


def only(ours):
    """Changes that leave out the kinds of attention which have a mark of their own."""
    own = {"sam_detr": [w.zero("ca_q_content")], "conditional_detr": [w.zero("ca_[qk]_")]}
    return own.get(file_of(ours), [w.mute_deformable] * deformable(ours))


def among(ours):
    """As only(), but queries must get different contents from somewhere."""
    return [] if file_of(ours) == "conditional_detr" else only(ours)


def backbone(student, ours, seed):
    """Features, projection and levels: attention that averages everything gives the same answer."""
    proposed = features_by_proposals(student, ours, seed) if deformable(ours) else None
    try:
        if not proposed:
            Pair(student, ours, seed, nheads=1).compare(
                "image features, averaged over the image (order of colours, ResNet, projection, its norm)",
                w.loud, w.flat, w.alike, w.still, w.mute_encoder, w.whatever_content)
    except AssertionError as error:
        raise Sure(*error.args) if proposed is False else error


def features_by_proposals(student, ours, seed):
    """Whether two-stage proposals, which look at one token each, are right; None if there are none."""
    try:
        pair = Pair(student, ours, seed, "two_stage")
        pair.load(w.mute_encoder)
        theirs, expected = pair.run(FULL)
        same("", theirs["proposals"]["logits"], expected["proposals"]["logits"])
        return True
    except AssertionError:
        return False
    except Exception:
        return None


def padding(student, ours, seed):
    """Padding: nobody looks at it, and positions and references do not count it."""
    Pair(student, ours, seed, nheads=1).compare(  # the encoder of Deformable DETR cannot look everywhere
        "attention that looks at all but padding", w.loud, w.flat, w.alike, w.still, w.whatever_content,
        *[w.mute_encoder] * deformable(ours), sizes=PADDED)
    pair = Pair(student, ours, seed)
    if pair.agree(keys=BOTH):  # then only padding can be wrong
        pair.compare("images of different size (those of one size are right)", sizes=PADDED, keys=BOTH)


def positions(student, ours, seed):
    """Positions: what attention sees of them; they belong to queries and keys, not to values."""
    pair = Pair(student, ours, seed, nheads=1)
    one_query = [w.zero(r"ca_q_content|ca_q_pos|ca_q_sine\.(weight|layers\.1\.weight)"),
                 w.scaled(10 / FAINT, r"ca_q_sine\.bias|ca_q_sine\.layers\.1\.bias")]
    base = [w.louder(0.1), w.alike, w.still, w.zero("sampling_offsets"), *one_query]
    pair.load(*base, w.faint(0))
    without = pair.run(FULL)
    pair.load(*base, w.faint(FAINT))
    theirs, expected = ((out["logits"] - before["logits"]).double().flatten()
                        for out, before in zip(pair.run(FULL), without))
    likeness = torch.cosine_similarity(theirs, expected, 0).item() if expected.any() or theirs.any() else 1
    assert likeness > 0.9995, (f"attention sees other positions than it should (likeness {likeness:.3f}): is "
                               f"it the encoding, or where it is added?")
    if pair.agree(w.loud, w.flat, w.alike, w.still):
        pair.compare("do values have positions?", w.flat, w.alike, w.still)
        if pair.agree(w.flat, w.still, w.mute):
            pair.compare("do contents of queries have their positions?", w.flat, w.still, w.mute_encoder)
    if deformable(ours) and pair.agree(*FIXED_POINTS, w.mute_encoder):
        pair.compare("do the decoder's points depend on positions?", w.mute_encoder, w.mute_among, w.still)
    pair = Pair(student, ours, seed)
    rest = [w.mute_deformable if deformable(ours) else w.mute_encoder, w.still]
    if pair.agree(*BY_CONTENT, *among(ours), w.among_by_content) and pair.agree(*rest, w.mute_among):
        pair.compare("attention among queries (without positions in queries and keys it is right)", *rest)


def attention(student, ours, seed):
    """Attention: the scores' scale, the softmax and the heads, and where its result is added."""
    pair = Pair(student, ours, seed)
    try:
        pair.compare("attention that answers a constant (first self-attention, then cross-attention; each is "
                     "added to its input, then comes the norm)", w.mute, w.alike, w.still, w.whatever_content)
        pair.compare("attention over tokens that are all the same (weights sum to 1 over keys; heads are "
                     "merged as they were split)", *BY_CONTENT, *only(ours), w.alike, w.whatever_content,
                     w.zero("^(backbone|input_proj)"))
    except AssertionError as error:
        raise Sure(*error.args) from None
    pair.compare("attention by content (scale, softmax, heads)", *BY_CONTENT, *only(ours), w.alike,
                 w.whatever_content)
    if pair.agree(*BY_CONTENT, *among(ours), w.mute_among):
        pair.compare("attention among queries, by content (scale, softmax, heads)", *BY_CONTENT, *among(ours),
                     w.among_by_content)


def spatial_query(student, ours, seed):
    """Conditional cross-attention: p_q = lambda p_s, next to the content in every head; the first layer."""
    pair = Pair(student, ours, seed)
    try:
        pair.compare("cross-attention by content (in the first layer with query positions)", *BY_CONTENT,
                     w.mute_among)
    except AssertionError as error:
        raise Sure(*error.args) if pair.agree(*BY_CONTENT, *only(ours), w.alike) else error
    pair.compare("cross-attention by position (p_s, lambda, their place in each head)", w.mute_encoder,
                 w.mute_among, w.zero(r"ca_[qk]_content"))
    pair.compare("cross-attention by content and position", w.mute_encoder, w.mute_among)
    pair = Pair(student, ours, seed, calm=False)
    if pair.agree(w.mute) and pair.agree(*BY_CONTENT, w.mute_among):
        pair.compare("cross-attention, with lambda from a layer's output (not normalised)", w.mute_encoder,
                     w.mute_among)


def sampling(student, ours, seed):
    """Deformable attention: where the points lie on every level, and that their weights sum to 1."""
    pair = Pair(student, ours, seed)
    for part, other in [("encoder", "decoder"), ("decoder", "encoder")]:
        pair.compare(f"fixed points of the {part} (offsets, weights; order of heads, levels, points)",
                     *FIXED_POINTS, w.zero(rf"^{other}.*(sampling_offsets|attention_weights)"), w.mute_among)
    if pair.agree(w.mute_encoder, w.mute_among, w.zero(r"attention_weights\.weight"), w.still):
        pair.compare("weights that depend on the query", w.mute_encoder, w.mute_among, w.still)


def aligner(student, ours, seed):
    """Semantics Aligner: what every head takes, from where in the box, and how the old query weighs it."""
    pair = Pair(student, ours, seed)
    by_content = [w.mute_encoder, w.mute_among, w.still, w.zero(r"ca_k_sine\.layers\.1")]
    pair.compare("all points at the centre of the box (RoIAlign, sigmoid(Linear(query)), D channels a head)",
                 *by_content, w.zero(r"aligner\.point_mlp\.6"))
    pair.compare("points anywhere in the box (tanh, (x, y), from the box to the image)", *by_content)
    pair.compare("keys that have only positions (the sine of each point)", w.mute_encoder, w.mute_among,
                 w.still, w.zero(r"ca_k_content"))


def smca(student, ours, seed):
    """SMCA: a Gaussian around every head's point."""
    pair = Pair(student, ours, seed, "smca")
    for sizes in (FULL, PADDED):
        pair.compare("attention that sees only the Gaussian (centre, scale, square, / 8, in cells)",
                     w.mute_encoder, w.still, w.faint(0), sizes=sizes)


def references(student, ours, seed):
    """Reference points or boxes: boxes are relative to them, before the sigmoid, layer by layer."""
    pair = Pair(student, ours, seed)
    pair.compare("without attention", w.mute, keys=BOTH)
    for factor in (3, 8):
        pair.compare("references close to 0 and 1 (is one clamped?)", w.mute, w.far(factor), keys=BOTH)


def queries(student, ours, seed):
    """Object queries are positions: their values start at zero."""
    pair = Pair(student, ours, seed, calm=False)
    pair.compare("without attention", w.mute)
    pair.compare("without attention to the image", w.flat, w.still, w.mute_cross, w.mute_encoder)
    pair = Pair(student, ours, seed)
    if pair.agree(*BY_CONTENT, w.alike, w.whatever_content):
        pair.compare("query positions in the queries of cross-attention", *BY_CONTENT, w.mute_among)


def heads(student, ours, seed):
    """Class and box heads, norms and feed-forward: cxcywh after a sigmoid, from every layer."""
    pair = Pair(student, ours, seed, calm=False)
    pair.compare("feed-forward block, last norm, class head of each layer", w.same_answer, w.alike, w.still)
    own_heads(pair, w.same_answer)
    if pair.agree(w.mute, w.alike, w.still, w.plain_norms):
        pair.compare("norms of each layer", w.mute, w.alike, w.still, w.scaled(5, r"ffn\.linear2\.weight"))
        own_heads(pair, w.mute)


def own_heads(pair, *changes):
    """Boxes of one layer at a time: with the other heads at zero its reference is (0.5, 0.5, 0.5, 0.5)."""
    found = pair.ours.box_head
    own = hasattr(found, "__len__") and len(found) > 1 and found[0] is not found[1]
    for stage in range(len(pair.ours.decoder.layers)) if own else [None]:
        pair.load(*changes, w.alike, *[w.zero(rf"^box_head\.(?!{stage}\.)\d+\.layers\.2")] * own)
        theirs, ours = (out["boxes"] for out in pair.run(FULL))
        if own:
            theirs, ours = theirs[None, stage], ours[None, stage]
        same(f"boxes of layer {stage + 1}, by its own head," if own else "boxes", theirs, ours)


def refinement(student, ours, seed):
    """box_refine: own heads, each layer starts at the box before it, detached, and samples relative to it."""
    pair = Pair(student, ours, seed, "refinement")
    own_heads(pair, w.mute)
    pair.compare("without attention", w.mute, keys=BOTH)
    pair.compare("references close to 0 and 1 (is one clamped?)", w.mute, w.far(8), keys=BOTH)
    gradients_of_variant(student, ours, seed, pair)
    if Pair(student, ours, seed).agree(*FIXED_POINTS, w.mute_encoder):
        pair.compare("points relative to a box", *FIXED_POINTS, w.mute_encoder)
    if file_of(ours) == "sqr":
        plain = Pair(student, ours, seed, recollect="selective")
        if not plain.agree(w.mute, w.alike, sizes=PADDED, train=True):
            return  # the mark `recollection` explains it
        pair = Pair(student, ours, seed, "refinement", recollect="selective")
        pair.compare("groups of queries in training, without attention", w.mute, sizes=PADDED, keys=BOTH,
                     train=True)


def ranked(model):
    """Two-stage: tokens that count as zero are not among the best, and class 0 is not the best class."""
    w.zero(r"enc_output(_norm)?\.bias")(model)
    model.class_head[-1].weight.data[0] *= 0.3


def two_stage(student, ours, seed):
    """two_stage: anchors and proposals of all tokens, the choice of queries, and what they learn."""
    pair = Pair(student, ours, seed, "two_stage")
    pair.load(w.mute, ranked)
    for sizes in (PADDED, pairs.WIDE):
        theirs, expected = pair.run(sizes)
        assert "proposals" in theirs, "forward returns no 'proposals'"
        for key in BOTH:
            found, wanted = theirs["proposals"][key], expected["proposals"][key]
            same(f"{key} of the proposals", found, wanted, rows="image")
        for key in BOTH:
            same(f"queries made of the best proposals, without attention: {key}", theirs[key], expected[key])
    gradients_of_variant(student, ours, seed, pair, ranked)


def gradients_of_variant(student, ours, seed, pair, *changes):
    """Which output trains which parameter; but if that is wrong without the variant, see `gradients`."""
    pair.load(w.mute, *changes)
    try:
        pairs.gradient_pattern(pair, origin(pair))
    except AssertionError:
        plain = Pair(student, ours, seed)
        plain.load(w.mute)
        try:
            pairs.gradient_pattern(plain, origin(plain))
        except AssertionError:
            return
        raise


def groups(student, ours, seed):
    """Who may attend to whom: in training queries see only their own group; inference has one group."""
    pair = Pair(student, ours, seed, calm=False)
    pair.load()
    if ours.RECIPE.get("denoising"):
        theirs, expected = denoised(pair)
        for key in BOTH:
            same(f"in training with noise {key}", theirs[key], expected[key])
    for mode in ("training", "inference"):
        theirs, expected = pair.run(PADDED, mode == "training")
        for key in BOTH:
            same(f"in {mode} {key}", theirs[key], expected[key])
        for name in ("groups", "one2many"):
            assert (name in theirs) == (name in expected) or name == "groups" and theirs[name] == 1, (
                f"in {mode} forward {'lacks' if name in expected else 'returns'} {name!r}")
        for key, wanted in expected.get("one2many", {}).items():
            found = theirs["one2many"].get(key)
            if isinstance(wanted, torch.Tensor):
                same(f"one2many: {key}", found, wanted)
            else:
                assert found == wanted, f"one2many: {key} is {found}, not {wanted}"


def noise(student, ours, seed):
    """Noisy queries: what they start from, and what they must give back. One layer and one group show it."""
    options = {name: 1 for name in ("dn_groups", "dn_number") if name in dict(Pair(ours, ours, seed).options)}
    pair = Pair(student, ours, seed, calm=False, dec_layers=1, **options)
    pair.load()
    denoised(pair)


def denoised(pair):
    """(the student's output, ours) in training with objects, if the noisy queries agree."""
    theirs, expected = pair.denoise()
    assert "denoising" in theirs, 'forward returns no "denoising" in training with targets'
    found, wanted = theirs["denoising"], expected["denoising"]
    assert found["groups"] == wanted["groups"], f"there are {found['groups']} groups, not {wanted['groups']}"
    assert found["target"].equal(wanted["target"]), "a noisy query must give back another object, or none"
    real = wanted["target"] > -2
    for key in BOTH:
        same(f"{key} of noisy queries", found[key][:, real], wanted[key][:, real])
    return theirs, expected


def recollection(student, ours, seed):
    """Recollection: which groups every stage is fed, in training only, and in which order they come out."""
    for recollect in ("selective", "dense", "none"):
        pair = Pair(student, ours, seed, recollect=recollect)
        pair.load(w.mute, w.alike)
        for mode in ("training", "inference"):
            theirs, expected = (out["logits"] for out in pair.run(PADDED, mode == "training"))
            same(f"{recollect}, {mode}: logits", theirs, expected, rows="group")


def recurrent(student, ours, seed):
    """DQRR: in training the last stage is fed its own output, at inference it is the only one."""
    pair = Pair(student, ours, seed, recurrent=True)
    for mode in ("training", "inference"):
        pair.compare(mode, w.mute, w.alike, sizes=PADDED, train=mode == "training")


# ---- Training and gradients -------------------------------------------------------------------------------
def gradients(student, ours, seed):
    """Gradients: which output trains which parameter (detach), and how large they are."""
    pair = Pair(student, ours, seed, calm=False)
    pair.load()
    theirs = origin(pair)
    pairs.gradient_pattern(pair, theirs)
    if pair.agree(sizes=PADDED, train=True, keys=BOTH):
        pairs.gradient_sizes(pair, theirs)


def reaches_backbone(model, images):
    """Whether the convolutions of the backbone get a gradient, not just a projection."""
    y = pairs.upstream(model(*images)["logits"])
    try:
        found = torch.autograd.grad(y, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    except RuntimeError:  # something is changed in place, or there is no graph: see the mark `gradients`
        return True
    return sum(g is not None and g.dim() == 4 and bool(g.any()) for g in found) > 3


class Kept(TorchDispatchMode):
    """Dropout drops nothing, but still divides by 1 - p; torch.rand, for those who use it, gives `value`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func.__name__.partition(".")[0], func(*args, **(kwargs or {}))
        if name == "native_dropout":
            return args[0] / (1 - args[1]), torch.ones_like(out[1])
        if name in ("bernoulli", "bernoulli_", "rand", "rand_like", "uniform_"):
            out.fill_(1 if "bernoulli" in name else self.value)
        return out


def training(student, ours, seed):
    """Training: the recipe's loss and weights, trained parameters, and dropout: its places, rate and mode."""
    pair, images = Pair(student, ours, seed, calm=False, dropout=0.5, dim_feedforward=40), batch(seed, PADDED)
    model, plain = pair.student, Pair(student, ours, seed, calm=False)
    for mode in (False, True):
        torch.manual_seed(seed)
        with torch.no_grad():
            first, second = (finite(model.train(mode), *batch(seed, PADDED))["logits"] for _ in range(2))
        varies = (first - second).abs().max() > 1e-5
        if varies and not mode:
            raise Sure("predictions in evaluation differ from call to call: dropout must be off")
        assert varies == mode, "dropout=0.5 changes nothing in training"
    loads, off = plain.loads(), []
    for m in (plain.student, plain.ours):
        a, b = (m.train(mode)(*batch(seed, PADDED))["logits"].detach() for mode in (False, True))
        off.append((a - b).abs().max() if a.shape == b.shape else 1)
    if off[0] > 1e-3 and off[1] < 1e-4:
        raise Sure("with dropout=0.0 predictions in training differ from those in evaluation: is a BatchNorm "
                   "live, or the rate of a dropout fixed?")
    recipes = getattr(model, "recipe", None) or getattr(student, "RECIPE", None), ours.RECIPE
    for name in ("class_loss", "w_class", "w_l1", "w_giou", "cost_class", "corner_l1") if recipes[0] else ():
        default = "w_class" if name == "cost_class" else None
        theirs, expected = (recipe.get(name, recipe.get(default)) for recipe in recipes)
        assert theirs == expected, f"RECIPE has {name}={theirs!r}, the paper's is {expected!r}"
    a, b = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, pair.ours))
    assert a == b, f"{a:,} parameters are trained, not {b:,}"
    assert reaches_backbone(model.train(), images), "no gradient reaches the backbone"
    if loads and plain.agree(sizes=PADDED, train=True):
        pair.load()
        assert right_factors(pair, 0.0) or right_factors(pair, 1 - 1e-6), (
            "dropout=0.5 belongs to attention's weights, the hidden layer of feed-forward blocks and what is "
            "added to a residual: one is missing, at another place, or has another rate")


def right_factors(pair, value):
    mode = Kept()
    mode.value = value
    with torch.no_grad(), mode:
        theirs, expected = pair.run(PADDED, train=True)
    return torch.allclose(theirs["logits"], expected["logits"], rtol=1e-3, atol=2e-3)


# ---- All together ------------------------------------------------------------------------------------------
def everything(student, ours, seed):
    """All weights at once, images of odd sizes: every stage in inference and in training."""
    recollect = {"recollect": "selective"} if file_of(ours) == "sqr" else {}
    pair = Pair(student, ours, seed, calm=False, **recollect)
    for mode in ("inference", "training"):
        pair.compare(f"in {mode} (the command first_difference shows where)", sizes=((100, 150), (131, 97)),
                     keys=BOTH, train=mode == "training")


def official(student, ours, seed):
    """The numbers of the official code, at width 256 with a ResNet-50: predictions, loss and gradient."""
    name, extra = pairs.case_name(file_of(ours))
    case = Case(name)
    options = options_of(case.json["case"]["args"], extra)
    model = student.build(case.json["case"]["num_classes"], pretrained_backbone=False, **options)
    if not hasattr(student, "load_official"):
        raise pairs.NotWritten("not written yet: load_official")
    student.load_official(model, {"model": case.state_dict()})
    inputs = case.batch()
    with torch.no_grad():
        out = pairs.checked(model.eval()(*inputs))
    for key in BOTH:
        assert_close(key, out[key], case.arrays[key], key)
    with torch.device("meta"):  # our losses, with our recipe
        criterion = ours_named("train").SetCriterion(ours.build(3, pretrained_backbone=False))
    out = pairs.checked(model.train()(*inputs))
    for key in BOTH:
        stored = case.arrays.get(f"train_{key}", case.arrays[key])
        assert_close(f"{key} in training", out[key].detach(), stored, key)
    criterion(out, case.targets())["total"].backward()
    squares = [p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None]
    norm, expected = math.sqrt(sum(squares)), case.json["grad_l2_total"]
    assert abs(norm - expected) < 0.002 * expected, f"the gradient has norm {norm:.6g}, not {expected:.6g}"
