"""Messages: one line for an error, a summary before a run, and signs that a run goes wrong."""
import contextlib
import copy
import math
import re
import sys
import time

import torch

from support import UserError, data, machine, one_line
from support.checkpoints import describe
from support.images import largest_canvas


# ---- Errors ------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def one_line_errors():
    """Around a program: an error that the user can fix ends it with one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name may have characters that the terminal cannot show
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        yield
    except (UserError, OSError, FloatingPointError) as error:
        raise SystemExit(one_line(error))
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted.")
    except (RuntimeError, MemoryError) as error:
        if advice := advice_for(error):
            raise SystemExit(advice)
        raise


def advice_for(error):
    """Advice for an error of torch, for those that people meet; None for others."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "Out of memory. Raise --accumulate, or lower --batch-size or --size; --amp also helps."
    if "compiler" in text:
        return "--compile needs a C++ compiler such as g++. Install one, or leave --compile out."
    if "DataLoader worker" in text:
        return ("A process that loads images was killed, by hand or for lack of memory. "
                "Continue with --resume, perhaps with --workers 0.")
    if isinstance(error, NotImplementedError) and (found := re.search(r"'(\w+::[\w.]+)'", text)):
        return (f"The device lacks the operator {found[1]}. Give --device cpu; on a Mac "
                "PYTORCH_ENABLE_MPS_FALLBACK=1 in the environment leaves only this operator to the CPU.")
    if machine.WORLD > 1:
        return (f"Process {machine.RANK} of {machine.WORLD} lost the others ({one_line(error)}). Fix the "
                "error in the first message, then continue with --resume.")


@torch.no_grad()
def first_bad_layer(model, images, mask):
    """The name of the first layer to return numbers that are not finite, or "none"."""
    names, bad = {module: name for name, module in model.named_modules()}, []

    def check(module, inputs, output):
        if module in names and isinstance(output, torch.Tensor) and not output.isfinite().all():
            bad.append(names[module])

    with torch.nn.modules.module.register_module_forward_hook(check):
        model(images, mask)
    return next(iter(bad), "none")


# ---- Before a run ------------------------------------------------------------------------------------------
def announce(model, datasets, request, train_step):
    """Prints settings of a run, its expected time, and warnings of a low AP. train_step: see try_out."""
    args, train_set, done = request.args, datasets["train"], (request.checkpoint or {}).get("step", 0)
    amp = f" in {str(machine.amp_dtype(args.device))[6:]}" if args.amp else ""
    print(f"model    {args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
          f"on {args.device}{amp}")
    for split, d in datasets.items():
        print(f"{split:8} {d.name}: {len(d)} images, {d.num_boxes} boxes, at most {d.max_boxes} in an image")
        print("".join(f"         note: {note}\n" for note in d.notes), end="")
    print(f"classes  {len(train_set.class_names)}: {', '.join(train_set.class_names)}")
    epochs = args.steps * args.batch_size / len(train_set)
    print(f"run      {args.steps} steps of {args.batch_size} images = {epochs:.1f} epochs, lr {args.lr:g} "
          f"({args.schedule}), seed {args.seed}")
    seconds, queries = try_out(model, train_set, args, train_step, request.module.__file__)
    minutes = max(1, math.ceil(seconds * (args.steps - done) / 60))
    print(f"time     about {minutes} minute{'s' * (minutes > 1)} plus evaluations; memory "
          f"{machine.peak_memory(args.device)} for the largest possible batch")
    if queries < train_set.max_boxes:
        print(f"WARNING  {queries} queries, but an image has {train_set.max_boxes} boxes: the rest can never "
              "be found. Raise --option num_queries=N.")
    if args.preset == "paper" and args.steps < 100_000 and not args.init:
        print(f"WARNING  the transformer starts from random weights and gets {args.steps} steps. DETR needs "
              "more than 100,000: expect AP near 0, or give --init.")
    if args.preset == "laptop" and len(train_set) < 1000 and not (args.init or args.overfit):
        print(f"WARNING  from scratch on {len(train_set)} images: AP rises late and stays low. --init helps.")


def try_out(model, train_set, args, train_step, file):
    """(seconds, queries) of one step, train_step(model, parts), on a copy of the model. Raises UserError."""
    part = args.batch_size // (args.accumulate * machine.WORLD)
    images, mask, targets = data.collate([train_set[i] for i in range(part)])
    canvas = largest_canvas(train_set.size, args.preset)
    largest = images.new_zeros(part, 3, *canvas), mask.new_zeros(part, *canvas), targets
    model = copy.deepcopy(model)
    try:
        with torch.random.fork_rng(devices=[]):
            for n, training in ((1, False), (part, True)):  # an evaluation may end with a single image
                model.train(training)
                with torch.no_grad():
                    out = model(images[:n].to(args.device), mask[:n].to(args.device))
                check_output(out, model, n, len(train_set.class_names))
            for batch in (largest, (images, mask, targets)):  # a lack of memory shows now, not in an hour
                start = time.time()
                train_step(model, [batch] * args.accumulate)
                machine.synchronize(args.device)
                seconds = time.time() - start
            if args.compile:
                torch.compile(lambda x: x + 1)(torch.zeros(2, device=args.device))
    except (UserError, FloatingPointError):
        raise
    except Exception as error:
        raise UserError(f"A training step on {part} images of up to {canvas[0]} x {canvas[1]} pixels fails: "
                        f"{advice_for(error) or describe(error, file)}")
    return seconds, out["logits"].shape[2]


def check_output(out, model, num_images, num_classes):
    """Raises UserError unless `out` keeps the contract for so many images and classes."""
    def check(right, what):
        if not right:
            raise UserError(f"{type(model).__name__} breaks the contract: {what}")

    logits, boxes = (out.get(name) if isinstance(out, dict) else None for name in ("logits", "boxes"))
    check(isinstance(logits, torch.Tensor) and isinstance(boxes, torch.Tensor),
          'forward must return a dict with the tensors "logits" and "boxes"')
    recipe, columns = model.recipe, num_classes + (model.recipe["class_loss"] == "softmax")
    check(logits.ndim == 4 and boxes.shape == (*logits.shape[:3], 4) and logits.shape[1] == num_images
          and 0 not in logits.shape, f"logits {list(logits.shape)} and boxes {list(boxes.shape)} must be "
          f"[S, B, Q, C] and [S, B, Q, 4] with B = {num_images}, and not empty")
    check(logits.shape[3] in (columns, columns + bool(recipe.get("extra_logit"))),
          f'{logits.shape[3]} logits for {num_classes} classes; class_loss "{recipe["class_loss"]}" needs '
          f'{columns}{" (the last one is no-object)" if columns > num_classes else ""}')
    check(recipe.get("free_boxes") or -1e-4 <= boxes.min() and boxes.max() <= 1 + 1e-4,
          f"boxes reach from {boxes.min():.3g} to {boxes.max():.3g}, but (cx, cy, w, h) must be in [0, 1]")


def collapse_line(metrics, num_classes):
    """The most alarming symptom in one line: the same boxes for every image or every query."""
    images, queries, classes = (metrics[k] for k in ("spread_images", "spread_queries", "classes_predicted"))
    line = (f"boxes vary by {images:.3f} between images and {queries:.3f} between queries; {classes} of "
            f"{num_classes} classes reach a score of 0.3")
    advice = "\n  COLLAPSED: the same boxes everywhere. That is usual early; if it stays, see docs/numbers.md"
    return line + advice * (min(images, queries) < 0.005)
