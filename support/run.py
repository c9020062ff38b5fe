"""One run of train.py: its folder, how far it is, its log, checkpoints, pictures, and how it is stopped."""
import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torchvision
from tqdm import tqdm

from support import devices, pictures, processes
from support.checkpoints import save
from support.evaluation import explain
from support.report import collapse_line, peak_memory

TALK_EVERY = 60  # seconds between two lines, as long as there has been no evaluation
LEARNED = 0.995, 3  # --overfit has done what it is for when AP has been this high for so many evaluations
FILES = ("args.json", "last.pt", "previous.pt", "best.pt", "log.jsonl", "curves.png", "predictions.png")


class Run:
    """Owns everything about a run that is neither model nor data. Only the process of rank 0 writes.

    step    optimiser steps done
    best    the highest AP so far, -1 before the first evaluation
    window  what was logged of each step since the last line of log.jsonl
    learned evaluations in a row, since the start or --resume, in which AP was as good as 1
    """

    def __init__(self, request):
        self.args, self.module, self.model_options = request.args, request.module, request.model_options
        self.step, self.best, self.seconds, self.window = 0, -1.0, 0.0, []
        self.folder, self.resumed, self.signals = None, request.checkpoint, []
        self.metrics, self.learned = None, 0
        if self.resumed:
            self.step, self.best, self.seconds, self.window = (
                self.resumed[name] for name in ("step", "best", "seconds", "window"))
            self.folder = Path(self.resumed["path"]).parent
        if self.step >= self.args.steps:
            raise SystemExit(f"{self.folder}: already finished, step {self.step} of {self.args.steps}. "
                             "Give more --steps to go on.")

    # ---- Start and end ----
    def start(self, model, optimizer, datasets):
        """Claims the folder, opens the log, listens to Ctrl-C."""
        self.model, self.optimizer, self.val_set = model, optimizer, datasets["val"]
        self.scaler = devices.Scaler(self.args)
        self.scaler.load(self.resumed or {})
        train_set = datasets["train"]
        self.identity = {"class_names": train_set.class_names, "category_ids": train_set.category_ids,
                         "num_images": len(train_set), "held_out": datasets["val"].held_out}
        self.started = time.time() - self.seconds
        self.talked = time.time()
        self.begun = self.talked, self.step
        self.bar = tqdm(total=self.args.steps, initial=self.step, unit="step", dynamic_ncols=True,
                        disable=True if processes.RANK else None)
        if processes.RANK == 0 and not self.resumed:
            self.folder = claim_folder(self.args, self.module)
            self.describe()
        self.lock = lock(self.folder / "args.json") if processes.RANK == 0 else None
        if processes.RANK == 0 and self.resumed:
            self.set_damaged_file_aside()
        self.folder = processes.gather(self.folder)[0]
        self.log = open_log(self.folder / "log.jsonl", self.step) if processes.RANK == 0 else None
        for number in processes.STOP_SIGNALS:
            signal.signal(number, self.on_signal)
        if not self.resumed:
            try:
                self.save("last.pt")  # so that there is always something to go on from
            except OSError:
                self.give_folder_back()
                raise

    def on_signal(self, number, frame):
        """Ctrl-C, SIGTERM and a closed terminal let the step finish and save; a second Ctrl-C kills."""
        self.signals.append(number)
        if processes.WORLD == 1:  # torchrun passes on a signal that processes may have got already
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def goes_on(self):
        """False at the last step, if --overfit has been learned, or if any process was asked to stop."""
        return (self.step < self.args.steps and not self.is_learned()
                and not any(processes.gather(bool(self.signals))))

    def is_learned(self):
        return self.args.overfit is not None and self.learned >= LEARNED[1]

    def finish(self):
        """Says how it ended. Raises SystemExit with the command to go on if the run was stopped."""
        self.bar.close()
        if self.step < self.args.steps and not self.is_learned():
            self.save("last.pt", keep="previous.pt")
            message = (f"\nStopped at step {self.step} of {self.args.steps}, nothing is lost. Go on with:\n"
                       f"    python train.py --resume {shlex.quote(str(self.folder))}")
            raise SystemExit(message if processes.RANK == 0 else 1)
        print(explain(self.metrics))
        if self.is_learned():
            print(f"Stopped at step {self.step} of {self.args.steps}: AP was 1 in {self.learned} evaluations "
                  "in a row, which is all that --overfit can show. Model and data are fine.")
        minutes = (time.time() - self.started) / 60
        print(f"{minutes:.1f} minutes, peak memory {peak_memory(self.args)}. Best AP {self.best:.3f}. "
              f"In {self.folder}: best.pt, last.pt, log.jsonl, curves.png, predictions.png")

    # ---- What happened ----
    def is_last(self):
        return self.step == self.args.steps

    def evaluation_is_due(self):
        return self.step % self.args.eval_every == 0 or self.is_last()

    def log_step(self, losses, epoch, lr):
        """Counts one optimiser step; every `log_every` of them writes their mean."""
        self.step += 1
        self.window.append(losses)
        self.bar.update()
        self.talk()
        if self.step % self.args.log_every == 0 or self.is_last():
            mean = means(self.window)
            self.write(epoch=epoch, lr=lr, **mean)
            loss, gradient = (mean.get(name, math.inf) for name in ("total", "grad_norm"))
            self.bar.set_postfix_str(f"loss {loss:.2f}, gradient {gradient:.1f}, AP {max(self.best, 0):.3f}")
            self.window = []

    def talk(self):
        """Says once a minute how far it is, until the first evaluation says more."""
        now, (begun, first) = time.time(), self.begun
        if processes.RANK or self.metrics or now < self.talked + TALK_EVERY:
            return
        self.talked = now
        left = (now - begun) / (self.step - first) * (self.args.steps - self.step)
        loss = means(self.window).get("total", math.inf)
        self.bar.write(f"step {self.step} of {self.args.steps}: loss {loss:.2f}, {duration(left)} and the "
                       "evaluations to go")

    def log_evaluation(self, metrics, predictions):
        """Writes the numbers, keeps the best weights and the last, draws predictions and curves."""
        self.metrics = metrics
        self.learned = self.learned + 1 if metrics["AP"] >= LEARNED[0] else 0
        self.write(eval=metrics)
        improved, self.best = metrics["AP"] >= self.best, max(self.best, metrics["AP"])
        if improved:
            self.save("best.pt")
        self.save("last.pt", keep="previous.pt")
        if processes.RANK == 0:
            self.bar.write(f"step {self.step}: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}; "
                           + collapse_line(metrics, len(self.val_set.class_names)))
            pictures.draw_predictions(self.val_set, predictions, self.folder / "predictions.png")
            pictures.draw_curves(self.folder / "log.jsonl", self.folder / "curves.png")

    # ---- Files ----
    def write(self, **line):
        if processes.RANK == 0:
            seconds = time.time() - self.started
            self.log.write(json.dumps({"step": self.step, "seconds": seconds, **line}) + "\n")

    def save(self, name, keep=None):
        if processes.RANK == 0:
            save(self.folder / name, {
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "step": self.step, "best": self.best,
                "seconds": time.time() - self.started, "window": self.window,
                "args": vars(self.args), "model_options": self.model_options, **self.identity,
            }, keep and self.folder / keep)

    def describe(self):
        """What somebody needs to repeat the run: the source that ran, every setting, the versions."""
        source = Path(self.module.__file__)
        (self.folder / source.name).write_bytes(source.read_bytes())
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__,
                    "python": sys.version.split()[0]}
        content = {"train": vars(self.args), "model": self.model_options, "versions": versions}
        (self.folder / "args.json").write_text(json.dumps(content, indent=1))

    def give_folder_back(self):
        """A run that could not even save its start must not keep its place from the next one."""
        for name in (*FILES, Path(self.module.__file__).name):
            (self.folder / name).unlink(missing_ok=True)

    def set_damaged_file_aside(self):
        """If previous.pt was read because last.pt could not be, do not let a save copy last.pt over it."""
        last = self.folder / "last.pt"
        if Path(self.resumed["path"]).name == "previous.pt" and last.exists():
            os.replace(last, self.folder / "last.damaged.pt")


def means(window):
    """{name: mean} of what steps logged; "skipped" is the share of them that --amp skipped in float16.

    Not every step has all: a skipped one has no gradient norm, and a model file may have been changed, and
    have other losses, since the run was stopped.
    """
    def finite(name):
        return [step[name] for step in window if math.isfinite(step.get(name, math.inf))]

    means = {name: sum(finite(name)) / len(finite(name)) for name in window[-1] if finite(name)}
    if skipped := sum(not math.isfinite(step.get("grad_norm", 0)) for step in window):
        means["skipped"] = skipped / len(window)
    return means


def duration(seconds):
    if seconds < 90:
        return "about a minute"
    return f"about {seconds / 60:.0f} minutes" if seconds < 2 * 3600 else f"about {seconds / 3600:.1f} hours"


def claim_folder(args, module):
    """A folder that holds no other run. Two runs that start at once get two. Raises SystemExit."""
    source = args.data or args.train_images or "shapes"
    name = f"{Path(args.model).stem}-{Path(source).resolve().name}"
    names = [name] + [f"{name}-{i}" for i in range(2, 1000)]
    ours = {*FILES, Path(module.__file__).name}
    for folder in [Path(args.out)] if args.out else [Path("runs") / name for name in names]:
        if folder.exists() and not folder.is_dir():
            raise SystemExit(f"{folder}: is a file; a run needs a folder of its own, give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        taken = sorted(ours.intersection(os.listdir(folder)))
        with contextlib.suppress(FileExistsError):
            if not taken:
                open(folder / "args.json", "x").close()  # only one process can make this file
                return folder
    raise SystemExit(f"--out {args.out}: holds {', '.join(taken or ['another run'])} already. "
                     "Go on with --resume, or give another folder.")


def lock(path):
    """Keeps other processes from going on with the same run while this one lives. Raises SystemExit."""
    file = open(path, "a")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not passed on to loading processes
    except (BlockingIOError, PermissionError):
        raise SystemExit(f"{path.parent}: another process is training this run; stop it first.")
    except (ImportError, OSError):  # Windows, and file systems without locks
        pass
    return file


def open_log(path, step):
    """log.jsonl to write on, without what a killed run wrote after the checkpoint it now goes on from."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # cut off, or not ours
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    Path(f"{path}.tmp").write_text("".join(kept))
    os.replace(f"{path}.tmp", path)
    return open(path, "a", buffering=1)
