"""Two models with the same weights, our own and somebody's: the tool of all marks.

A student's file is seen only through the contract: build, forward, load_official. We may change our own
model, whose names we know (weights.py), and hand its weights over as an official checkpoint. So no mark needs
a name of the student's.
"""
from functools import lru_cache
from unittest import mock

import torch

from tests.golden import FOLDER, Case, fill, options_of, our_name
from tests.grading import weights
from tests.grading.files import parent_of, path_of

# Variants of our files: a golden case with the official names of their parameters, and options
VARIANTS = {
    "sam_detr": ("sam_detr", {"input_norm": True}),
    "refinement": ("deformable_detr_refine", {"box_refine": True}),
    "two_stage": ("deformable_detr_two_stage", {"two_stage": True}),
    "smca": ("sam_detr_smca", {"input_norm": True, "smca": True}),
}
# 64 is the least width for which each of the 32 groups of a GroupNorm has two channels
TINY = dict(backbone="resnet18", pretrained_backbone=False, hidden_dim=64, nheads=4, dim_feedforward=32,
            dropout=0.0, num_queries=6)
# Options of relatives
SMALL = dict(num_groups=3, num_one2many=5, in_points=4, out_points=4, dn_groups=3, dn_number=6)
OBJECTS = [{"labels": torch.tensor(labels), "boxes": torch.tensor(boxes)} for labels, boxes in [
    ([0, 2], [[0.3, 0.4, 0.2, 0.3], [0.6, 0.6, 0.5, 0.9]]), ([1], [[0.5, 0.5, 0.4, 0.6]])]]
FULL = ((96, 128), (96, 128))  # (height, width) of the images: no padding
PADDED = ((70, 128), (96, 90))
WIDE = ((64, 432),)  # so wide that two-stage anchors leave the image
BOTH = ("logits", "boxes")


class NotWritten(Exception):
    """A part of the contract is missing."""


class NotLoaded(Exception):
    """load_official does not take our checkpoint."""


class NotFinite(Exception):
    """A number is NaN; `mark` is the one that this belongs to."""

    def __init__(self, message, mark):
        super().__init__(message)
        self.mark = mark


def file_of(ours):
    """The name of our file that a module is, or is a copy of: "detr", also for relatives."""
    return ours.__name__.rpartition(".")[2]


def case_name(file):
    """(golden case, options) of a file or a variant: its own, or that of the file it is made from."""
    while file not in VARIANTS and not (FOLDER / f"{file}.json").exists():
        file = parent_of(file)
    return VARIANTS.get(file, (file, {}))


case_of = lru_cache(maxsize=12)(Case)
name_of = lru_cache(maxsize=4096)(our_name)
fresh = lru_cache(maxsize=4096)(fill)


def build_both(module, start, options):
    """(model, a copy of its first parameters); `options` are pairs, `start` is the seed."""
    if not hasattr(module, "build"):
        raise NotWritten("not written yet: build")
    torch.manual_seed(start)
    model = module.build(3, **dict(options))
    return model, [p.detach().clone() for p in model.parameters()]


built = lru_cache(maxsize=24)(build_both)


class Pair:
    """Our model and the student's, built alike; `variant` is a key of VARIANTS, the file itself by default.

    With `calm` an error in norms and feed-forward blocks changes nothing: only the mark `heads` sees it.
    """

    def __init__(self, student, ours, seed, variant=None, calm=True, **options):
        case, extra = case_name(variant or file_of(ours))
        self.case, self.file, self.seed, self.calm = case_of(case), ours, seed, calm
        self.student_file = student
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
            changes = (weights.plain_norms, weights.lift_feed_forward, *changes, weights.lift_mlps)
        state, ours = {}, self.ours.state_dict()
        for official, _, kind, used, _ in self.case.json["state"]:
            name = name_of(self.file, official)
            if name in ours:  # a ResNet-50 has more than our ResNet-18
                state[official] = ours[name]
                ours[name].copy_(fresh(tuple(ours[name].shape), kind, used, self.seed))
        for change in changes:
            change(self.ours)
        # Nothing but zeros is ever written into the backbone, and its weights are most of a small model
        self.checkpoint = {name: x if name.startswith("backbone") else x.clone() for name, x in state.items()}
        if self.load_official is None:
            raise NotWritten("not written yet: load_official, and this mark must give the model our weights")
        try:
            self.load_official(self.student, {"model": self.checkpoint})
        except NotImplementedError:
            raise
        except Exception as error:
            raise NotLoaded("load_official does not take our checkpoint, see the mark `loading`") from error

    def loads(self):
        """Load our weights, if that is possible; without them the model's first ones must do."""
        try:
            self.load()
            return True
        except (NotLoaded, NotWritten):
            return False

    def run(self, sizes, train=False, gradients=False):
        """(the student's output, ours) on random images of these sizes."""
        with torch.set_grad_enabled(gradients):
            theirs = finite(self.student.train(train), *batch(self.seed, sizes))
            return theirs, self.ours.train(train)(*batch(self.seed, sizes))

    def denoise(self):
        """(the student's output, ours) in training with OBJECTS, which get the same noise."""
        found, plain = [], self.file.draw_noise
        for module, model in [(self.student_file, self.student), (self.file, self.ours)]:
            if not hasattr(module, "draw_noise"):
                raise NotWritten("not written yet: draw_noise")
            torch.manual_seed(self.seed)
            with mock.patch.object(module, "draw_noise", plain), torch.no_grad():
                found.append(checked(model.train()(*batch(self.seed, PADDED), OBJECTS)))
        return found

    def compare(self, what, *changes, sizes=FULL, keys=("logits",), train=False):
        """Raises a sentence that begins with `what` unless the two models agree."""
        self.load(*changes)
        theirs, ours = self.run(sizes, train)
        for key in keys:
            same(f"{what}: {key}", theirs[key], ours[key])

    def agree(self, *changes, **options):
        try:
            self.compare("", *changes, **options)
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
    """The output, if it keeps the contract."""
    assert isinstance(out, dict), f"forward returns {type(out).__name__}, not a dict of logits and boxes"
    for key in BOTH:
        assert isinstance(out.get(key), torch.Tensor), f"forward returns no {key!r}, one tensor of all stages"
    return out


def finite(model, images, mask):
    """The output, if it has only numbers; raises NotFinite, which tells whether padding is the reason."""
    inputs = images.clone(), mask.clone()
    out = checked(model(images, mask))
    if any(out[key].isnan().any() for key in BOTH):
        raise first_not_finite(model, *inputs)
    return out


def same(what, theirs, ours, tolerance=1e-3, rows="stage"):
    """Equal up to `tolerance` of the largest number; the message names the rows where the numbers differ."""
    theirs, ours = theirs.detach().float(), ours.detach().float()
    assert theirs.shape == ours.shape, f"{what}: shape is {list(theirs.shape)}, not {list(ours.shape)}"
    assert theirs.isfinite().all(), f"{what}: some numbers are not finite"
    allowed = tolerance * max(1, ours[ours.isfinite()].abs().max().item())
    off = (theirs - ours).abs().nan_to_num(0).reshape(len(ours) if ours.dim() else 1, -1).amax(1)
    wrong = [str(row + 1) for row in (off > allowed).nonzero().flatten().tolist()]
    where = f" in {rows}{'s' * (len(wrong) > 1)} {', '.join(wrong)}" if rows else ""
    assert not wrong, f"{what} differ by up to {off.max():.2g}{where} (allowed {allowed:.1g})"


def first_not_finite(model, images, mask):
    """An exception that names what the NaN depends on, and which mark that costs."""
    for name, p in model.named_parameters():
        if p.isnan().any():
            return NotFinite(f"load_official leaves NaN in {name}", "loading")
    with torch.no_grad():
        for other, when in [(mask & False, "as soon as an image is padded"),
                            (~mask, "where the mask is False")]:
            if not other.equal(mask) and not model(images, other)["logits"].isnan().any():
                return NotFinite(f"some numbers are not finite {when}", "padding")
    return NotFinite("some numbers are not finite", "shapes")


# ---- Parameters and gradients ------------------------------------------------------------------------------
def named(model):
    """Parameters outside of the backbone, by name."""
    return [(name, p) for name, p in model.named_parameters() if not name.startswith("backbone.")]


def origin(pair):
    """Where the student keeps our parameters: [(which of its own, for each number the index into named)].

    Every number of a checkpoint gets a value of its own: names, splitting and packing do not matter.
    """
    first, bounds = 1000, []
    checkpoint = pair.checkpoint  # goes back into both when the origins are known

    def tag(model):
        nonlocal first
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
    pair.checkpoint = checkpoint
    for load, model in [(pair.load_official, pair.student), (pair.file.load_official, pair.ours)]:
        load(model, {"model": checkpoint})
    for (name, p), count in zip(named(pair.ours), seen.tolist()):
        assert count >= p.numel(), f"load_official loses an entry of the checkpoint: it is {name} in our file"
        assert count == p.numel(), (
            f"load_official fills {count // p.numel()} parameters with one entry of the checkpoint: our file "
            f"has it once, as {name}")
    return found


def lengths(gradients):
    return torch.tensor([0 if g is None else g.double().norm() for g in gradients], dtype=torch.float64)


def norms(pair, theirs, gradients):
    """The gradient's norm of each of our parameters, in the student's model."""
    squares = torch.zeros(len(named(pair.ours)), dtype=torch.float64)
    for (_, numbers), gradient in zip(theirs, gradients):
        if gradient is not None:
            squares.index_add_(0, numbers, gradient.double().flatten().square())
    return squares.sqrt()


def outputs(out):
    """The parts of an output whose gradients are looked at one by one."""
    parts = [(f"{key} of stage {s + 1}", out[key][s]) for key in BOTH for s in range(len(out[key]))]
    return parts + [(f"{key} of the proposals", out["proposals"][key]) for key in BOTH if "proposals" in out]


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
        least = expected.max().item()
        for (name, _), a, b in zip(named(pair.ours), found.tolist(), expected.tolist()):
            assert a < 1e-5 * least or b > 0, (
                f"the gradient of {what} must not reach the parameter that is {name} in our file (detach)")
            assert a > 1e-7 * least or b < 1e-4 * least, (
                f"the gradient of {what} must reach the parameter that is {name} in our file (detached?)")


def gradient_sizes(pair, theirs):
    """Norms of the gradient, parameter by parameter."""
    parameters = list(pair.student.parameters())
    x, y = (upstream(out["logits"]) + upstream(out["boxes"])
            for out in pair.run(PADDED, train=True, gradients=True))
    expected = lengths(pulled(y, [p for _, p in named(pair.ours)]))
    found = norms(pair, theirs, pulled(x, [parameters[k] for k, _ in theirs]))
    for (name, _), a, b in zip(named(pair.ours), found.tolist(), expected.tolist()):
        assert abs(a - b) < 0.02 * b + 1e-4 * expected.norm(), (
            f"the gradient of the parameter that is {name} in our file has norm {a:.3g}, not {b:.3g}: "
            f"something is detached, or is not")
