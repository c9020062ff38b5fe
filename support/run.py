"""One run of train.py: its folder, progress, log, checkpoints and pictures, and the ways to stop it."""
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

from support import UserError, machine, pictures
from support.checkpoints import FORMAT, save
from support.evaluation import metrics_table
from support.report import collapse_line, first_bad_layer

LEARNED = 0.995, 3  # --overfit ends when AP is this high in so many evaluations in a row
FILES = ("args.json", "last.pt", "best.pt", "log.jsonl", "curves.png", "predictions.png")


class Run:
    """Everything about a run that is neither model nor data. Only the process of rank 0 writes."""

    # judged: the step of the last evaluation; window: values of each step since the last line of log.jsonl
    STATE = ("step", "judged", "best", "window", "metrics")

    def __init__(self, request, model, optimizer, datasets):
        """Claims a folder for a new run. Raises UserError if it cannot."""
        self.args, self.model_options = request.args, request.model_options
        self.model, self.optimizer, self.scaler = model, optimizer, machine.make_scaler(self.args)
        self.train_set, self.val_set, resumed = datasets["train"], datasets["val"], request.checkpoint
        self.signals, self.learned, self.parts = [], 0, []
        start = resumed or dict(step=0, judged=0, best=-1.0, seconds=0.0, window=[], metrics={}, scaler={})
        self.step, self.judged, self.best, self.window, self.metrics = (start[name] for name in self.STATE)
        self.started = time.time() - start["seconds"]
        if start["scaler"]:
            self.scaler.load_state_dict(start["scaler"])
        self.folder = Path(resumed["path"]).parent if resumed else None
        if machine.RANK == 0 and not resumed:
            self.folder = claim_folder(request)
            self.save("last.pt")  # so that --resume always finds a checkpoint
        self.folder = machine.gather(self.folder)[0]
        self.command = f"python train.py --resume {shlex.quote(str(self.folder))}"
        if machine.RANK == 0:
            self.log_file = open_log(self.folder / "log.jsonl", self.step, self.judged)

    @contextlib.contextmanager
    def underway(self):
        """Around the loop: a progress bar, Ctrl-C, a summary. A run that an error ends is saved first."""
        self.bar = tqdm(total=self.args.steps, initial=self.step, unit="step", dynamic_ncols=True,
                        disable=True if machine.RANK else None)
        for number in machine.STOP_SIGNALS:
            signal.signal(number, self.on_signal)
        try:
            yield
        except FloatingPointError as error:
            layer = first_bad_layer(self.model, *(x.to(self.args.device) for x in self.parts[-1][:2]))
            amp, lr = " or give --no-amp" * self.args.amp, self.optimizer.param_groups[0]["lr"]
            raise UserError(f"The model diverged at step {self.step} (lr {lr:.2g}): {error}; first bad layer "
                            f"{layer}. Lower --lr{amp}, and continue from the last checkpoint: "
                            f"{self.command} --lr {self.args.lr / 10:g}")
        except (UserError, RuntimeError, EOFError, OSError, MemoryError):
            if not self.signals:  # a scheduler may also end the processes that load images
                self.save("last.pt")
                self.bar.write(f"Saved at step {self.step}. When the error below is fixed, resume with: "
                               f"{self.command}", file=sys.stderr)
                raise
        finally:
            self.bar.close()
        self.finish()

    def on_signal(self, number, frame):
        """Ctrl-C, SIGTERM and a closed terminal let the step finish and save; a second Ctrl-C kills."""
        self.signals.append(number)
        if machine.WORLD == 1:  # torchrun passes on a signal that processes may have got already
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if hasattr(signal, "SIGCHLD"):  # torch's handler would raise if a process that loads images ends now
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def stopped(self):
        """Whether to end before the last step: --overfit has been learned, or a process was told to stop."""
        return self.learned >= LEARNED[1] or any(machine.gather(bool(self.signals)))

    def finish(self):
        """Prints a summary. If the run was stopped, raises UserError with the command that resumes it."""
        learned = self.learned >= LEARNED[1]
        if self.evaluation_is_due() or self.step < self.args.steps and not learned:
            self.save("last.pt")
            message = f"Stopped at step {self.step} of {self.args.steps}; nothing is lost. Resume with: "
            raise UserError(message + self.command) if machine.RANK == 0 else SystemExit(1)
        print(metrics_table(self.metrics))
        if learned:
            print(f"Stopped at step {self.step} of {self.args.steps}: AP was 1 in {self.learned} evaluations "
                  "in a row, which is all that --overfit can show. Model and data are fine.")
        minutes, memory = (time.time() - self.started) / 60, machine.peak_memory(self.args.device)
        print(f"{minutes:.1f} minutes, peak memory {memory}. Best AP {self.best:.3f}. Files: {self.folder}")

    def log(self, step, losses):
        """Counts one optimiser step; every `log_every` of them writes their mean."""
        self.step = step
        self.window.append(losses)
        self.bar.update()
        if step % self.args.log_every == 0 or step == self.args.steps:
            finite = {name: [one[name] for one in self.window if math.isfinite(one.get(name, math.inf))]
                      for name in losses}  # a step that --amp skips in float16 has no finite gradient norm
            mean = {name: sum(numbers) / len(numbers) for name, numbers in finite.items() if numbers}
            epoch = step / (len(self.train_set) // self.args.batch_size)
            self.write(epoch=epoch, lr=self.optimizer.param_groups[0]["lr"], **mean)
            loss, gradient = (mean.get(name, math.inf) for name in ("total", "grad_norm"))
            self.bar.set_postfix_str(f"loss {loss:.2f}, gradient {gradient:.1f}, AP {max(self.best, 0):.3f}")
            self.window = []

    def evaluation_is_due(self):
        """Whether this step ends with an evaluation that has not been made yet."""
        last = self.step % self.args.eval_every == 0 or self.step == self.args.steps
        return last and self.judged != self.step

    def evaluated(self, metrics, predictions):
        """Writes the numbers, keeps the best weights and the last, draws predictions and curves."""
        self.metrics, self.judged = metrics, self.step
        self.learned = self.learned + 1 if self.args.overfit and metrics["AP"] >= LEARNED[0] else 0
        self.write(eval=metrics)
        improved, self.best = metrics["AP"] >= self.best, max(self.best, metrics["AP"])
        if improved:
            self.save("best.pt")
        self.save("last.pt")
        if machine.RANK == 0:
            self.bar.write(f"step {self.step}: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}; "
                           + collapse_line(metrics, len(self.val_set.class_names)))
            pictures.draw_predictions(self.val_set, predictions, self.folder / "predictions.png")
            pictures.draw_curves(self.folder / "log.jsonl", self.folder / "curves.png")

    def write(self, **line):
        if machine.RANK == 0:
            line = {"step": self.step, "seconds": time.time() - self.started, **line}
            self.log_file.write(json.dumps(line) + "\n")

    def save(self, name):
        if machine.RANK == 0:
            save(self.folder / name, {
                "format": FORMAT, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "seconds": time.time() - self.started,
                **{name: getattr(self, name) for name in self.STATE},
                "args": vars(self.args), "model_options": self.model_options,
                "class_names": self.train_set.class_names, "category_ids": self.train_set.category_ids,
                "num_images": len(self.train_set), "held_out": self.val_set.held_out})


def claim_folder(request):
    """A folder for a new run, with what a repetition needs: model file, settings, versions. Or UserError."""
    args, source = request.args, Path(request.module.__file__)
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__,
                "python": sys.version.split()[0]}
    content = {"train": vars(args), "model": request.model_options, "versions": versions}
    name = f"{source.stem}-{Path(args.data or args.train_images or 'shapes').resolve().name}"
    names = [name] + [f"{name}-{i}" for i in range(2, 1000)]
    for folder in [Path(args.out)] if args.out else [Path("runs") / name for name in names]:
        folder.mkdir(parents=True, exist_ok=True)
        taken = sorted({*FILES, source.name}.intersection(os.listdir(folder)))
        with contextlib.suppress(FileExistsError):
            if not taken:
                with open(folder / "args.json", "x") as file:  # of two runs only one can make this file
                    json.dump(content, file, indent=1)
                (folder / source.name).write_bytes(source.read_bytes())
                return folder
    raise UserError(f"--out {args.out}: it already has {', '.join(taken or ['another run'])}. Continue "
                    "that run with --resume, or give another folder")


def open_log(path, step, judged):
    """log.jsonl, opened to append, without the lines that a killed run wrote after its last checkpoint."""
    kept = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # cut off
            line = json.loads(text)
            if line["step"] <= (judged if "eval" in line else step):
                kept.append(text + "\n")
    Path(f"{path}.tmp").write_text("".join(kept))
    os.replace(f"{path}.tmp", path)
    return open(path, "a", buffering=1)
