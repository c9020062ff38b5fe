"""Several processes: those of torchrun, which train one model together, and those that load images."""
import atexit
import multiprocessing
import os
import signal
import sys

import torch

from support import data, devices


def from_environment(name, default):
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


WORLD = max(1, from_environment("WORLD_SIZE", 1))  # set by torchrun, like RANK
RANK = from_environment("RANK", 0) if WORLD > 1 else 0
# Ctrl-C, a scheduler's request, and a terminal that is closed (Windows has no SIGHUP)
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def join(device):
    """Take this process's place among those of torchrun: a GPU of its own, or a share of the CPU.

    Raises SystemExit if torchrun's variables are there in part only, or if there are too few GPUs.
    """
    if WORLD == 1:
        return
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise SystemExit(f"WORLD_SIZE is set in the environment, but {', '.join(missing)} is not: "
                         "start with torchrun, or unset WORLD_SIZE.")
    try:
        backend = devices.share(device, from_environment("LOCAL_RANK", 0))
    except ValueError as error:
        raise SystemExit(f"--device {device}: {error}")
    torch.distributed.init_process_group(backend)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # one process talks


def gather(value):
    """The values of all processes, in order of their ranks; [value] if there is only this one."""
    values = [value] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def default_workers():
    """Processes that load images. None but on Linux: elsewhere each would start a Python of its own."""
    if sys.platform != "linux":
        return 0
    return 1 if (os.cpu_count() or 1) < 4 else 4


def make_loader(dataset, args, **how):
    """Loads batches in args.workers processes, or in this one if there are none."""
    # Since Python 3.14 the default is a new Python for each loader, which imports torch first, for seconds
    context = "fork" if args.workers and sys.platform == "linux" else None
    # A generator of its own: otherwise every loader draws a number from the global one, which dropout uses,
    # and a resumed run, having made one loader more, would not repeat the straight one.
    return torch.utils.data.DataLoader(
        dataset, num_workers=args.workers, collate_fn=data.collate, generator=torch.Generator(),
        pin_memory=devices.pins_memory(args.device), worker_init_fn=leave_signals_to_the_main_process,
        multiprocessing_context=context, **how)


def leave_signals_to_the_main_process(worker):
    for number in STOP_SIGNALS:  # they come to every process of the group
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Before Python ends them: it sends SIGTERM, which they ignore, and would wait for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler calls it an error
    for worker in multiprocessing.active_children():
        worker.kill()
