"""What a run says: what it is about to do, whether memory will do, what the numbers of an evaluation mean."""
import contextlib
import copy
import math
import os
import shlex
import sys
import time
from pathlib import Path

import torch

from support import UserError, data, devices, one_line, processes
from support.model_files import check_output, describe


@contextlib.contextmanager
def one_line_errors():
    """What goes wrong ends in a line that says what to do, not in a traceback."""
    # A stream that was closed (2>&-) is None
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a class or file name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # a log file can be watched
    try:
        yield
    except UserError as error:
        raise SystemExit(f"data: {one_line(error)}")
    except FloatingPointError as error:
        raise SystemExit(f"The model is broken: {error}.")
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted before the first step; nothing was started.")
    except OSError as error:
        raise SystemExit(f"{one_line(error)}. What was saved before is still there: go on with --resume.")
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise SystemExit("A process that loads images was killed, by hand or for lack of memory. "
                             "Go on with --resume, and perhaps --workers 0.")
        if operator := devices.missing_operator(error):
            raise SystemExit(f"The device lacks the operator {operator}. Give --device cpu; {devices.HINT}.")
        if processes.WORLD == 1:
            raise
        who = f"Process {processes.RANK} of {processes.WORLD}"
        raise SystemExit(f"{who} lost the others ({one_line(error)}). The first message above says why; "
                         "then go on with --resume.")


def announce(model, datasets, args, run, train_step):
    """Say what is about to happen, how long it will take, and what to expect of it.

    train_step: a function of (model, parts) that does one step, see try_out.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SystemExit(f"--model {args.model}: no parameter of the model requires a gradient")
    train_set = datasets["train"]
    print(f"model    {args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
          f"on {args.device}" + (f" in {str(devices.amp_dtype(args.device))[6:]}" if args.amp else ""))
    for split, d in datasets.items():
        print(f"{split:8} {d.name}: {len(d)} images, {d.num_boxes} boxes, at most {d.max_boxes} in an image")
        for note in d.notes:
            print(f"         note: {note}")
    print(f"classes  {len(train_set.class_names)}: {', '.join(train_set.class_names)}")
    print(f"run      {args.steps} steps of {args.batch_size} images = "
          f"{args.steps * args.batch_size / len(train_set):.1f} epochs, lr {args.lr:g} ({args.schedule}), "
          f"seed {args.seed}")
    seconds, queries = try_out(model, train_set, args, train_step, run.module.__file__)
    print(f"time     about {math.ceil(seconds * (args.steps - run.step) / 60)} minutes, and the evaluations; "
          f"memory {peak_memory(args)} for the largest possible batch")
    for warning in warnings(model, train_set, args, queries):
        print(f"WARNING  {warning}")


def warnings(model, train_set, args, queries):
    """What makes a run disappoint and can be known before it starts, a sentence each."""
    if queries < train_set.max_boxes:
        yield (f"{queries} queries, but an image has {train_set.max_boxes} boxes: the rest can never "
               "be found. Raise --option num_queries=N.")
    published = model.recipe.get("batch_size", 0)
    if args.preset == "paper" and args.lr == model.recipe.get("lr") and args.batch_size < published:
        yield (f"lr {args.lr:g} was published for batches of {published} images, yours have "
               f"{args.batch_size}: lower --lr.")
    if args.init:
        return
    if args.preset == "paper" and args.steps < 100_000:
        yield (f"the transformer starts from random weights and gets {args.steps} steps. DETR needs "
               "more than 100,000 of them: expect AP near 0.")
    elif args.preset == "laptop" and len(train_set) < 1000 and not args.overfit:
        yield f"from scratch on {len(train_set)} images: AP stays near 0 for long and ends modest."


def try_out(model, train_set, args, train_step, file):
    """(seconds, queries) of one training step, made on a copy of the model so that nothing of it remains.

    Before it one step on the largest batch there can be: if memory runs out, then now and not in an hour.
    Raises SystemExit for that, for an error in the model's file, and for output that breaks the contract.
    If the device lacks an operator, the model moves to the CPU: args.device is "cpu" then.
    """
    part = args.batch_size // (args.accumulate * processes.WORLD)
    images, mask, targets = data.collate([train_set[i] for i in range(part)])
    canvas = data.largest_canvas(train_set.size, args.preset)
    largest = images.new_zeros(part, 3, *canvas), mask.new_zeros(part, *canvas), targets
    model, original = copy.deepcopy(model), model

    def step():
        start = time.time()
        train_step(model, [(images, mask, targets)] * args.accumulate)
        devices.synchronize(args.device)
        return time.time() - start

    try:
        with torch.random.fork_rng(devices=[]):
            for training in (False, True):
                model.train(training)
                with torch.no_grad():
                    out = model(images.to(args.device), mask.to(args.device))
                check_output(out, model, part, len(train_set.class_names))
            train_step(model, [largest] * args.accumulate)
            devices.synchronize(args.device)
            seconds = step()
            if args.amp:
                check_amp(step, args)
    except (UserError, FloatingPointError):
        raise
    except Exception as error:
        operator = devices.missing_operator(error)
        if operator and args.device != "cpu" and processes.WORLD == 1:
            move_to_cpu(original, args, operator)
            return try_out(original, train_set, args, train_step, file)
        words = "out of memory", "can't allocate memory"
        if isinstance(error, MemoryError) or any(text in str(error) for text in words):
            raise SystemExit(
                f"Out of memory for parts of {part} images of up to {canvas[0]} x {canvas[1]} pixels. "
                f"Raise --accumulate {args.accumulate}, or lower --batch-size or --size; --amp helps, too.")
        raise SystemExit(f"A training step fails; {describe(error, file)}")
    return seconds, out["logits"].shape[2]


def check_amp(step, args):
    """Says so if steps with --amp take longer than without: that depends on the device and on the model."""
    with_amp = min(step(), step())
    args.amp = False
    try:
        step()  # the first one makes preparations
        without = min(step(), step())
    finally:
        args.amp = True
    if without < 0.95 * with_amp:
        print(f"WARNING  --amp is slower here: a step takes {with_amp:.2g} s, {without:.2g} s without it")


def move_to_cpu(model, args, operator):
    """Changes the device of a run that has not begun, because the device lacks an operator; says so."""
    name, device = Path(args.model).stem, args.device
    args.device = "cpu"
    model.to("cpu")
    print(f"note     {device} lacks the operator {operator}, so {name} runs on the CPU; {devices.HINT}")
    if args.amp and (why := devices.why_no_amp("cpu")):
        raise SystemExit(f"--amp: {why}")


def peak_memory(args):
    """The most that this process has needed so far, on the device, as text."""
    peak = devices.peak_memory(args.device)
    return "unknown" if peak is None else f"{peak / 2**30:.1f} GiB"


def collapse_line(metrics, num_classes):
    """The most alarming symptom in one line: the same boxes for every image or every query."""
    images, queries, classes = (metrics[k] for k in ("spread_images", "spread_queries", "classes_predicted"))
    line = (f"boxes vary by {images:.3f} between images and {queries:.3f} between queries; {classes} of "
            f"{num_classes} classes reach a score of 0.3")
    if min(images, queries) < 0.005:
        line += ("\n  COLLAPSED: the same boxes everywhere. Usual early on; if it stays, the model is "
                 "undertrained (see README) or its features do not depend on the image.")
    return line


@torch.no_grad()
def where_it_went_bad(model, images, mask):
    """The first layer to return numbers that are not finite; if none does, where gradients are not finite."""
    bad = []

    def check(name):
        def hook(module, inputs, output):
            outputs = output if isinstance(output, (tuple, list)) else [output]
            if any(isinstance(x, torch.Tensor) and not x.isfinite().all() for x in outputs):
                bad.append(name)
        return hook

    hooks = [module.register_forward_hook(check(name)) for name, module in model.named_modules() if name]
    model(images, mask)
    for hook in hooks:
        hook.remove()
    if bad:
        return f"first bad layer {bad[0]}"
    # Backward runs from the end, so the last of them went bad first
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"first bad gradient {bad[-1]}" if bad else "all layers are finite again"


def divergence(error, model, parts, args, run, lr):
    """The message of a run that stops because numbers are no longer finite."""
    where = where_it_went_bad(model, *(x.to(args.device) for x in parts[-1][:2]))
    amp = " or give --no-amp" if args.amp else ""
    return (f"\nThe model diverged at step {run.step} (lr {lr:.2g}): {error}; {where}. Lower --lr{amp}, "
            f"with --resume {shlex.quote(str(run.folder))} too, which goes on from before.")
