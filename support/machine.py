"""The device of a run, --amp, the processes of torchrun, and those that load images."""
import atexit
import contextlib
import os
import signal
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from support import UserError
from support.data import collate

WORLD = max(1, int(os.environ.get("WORLD_SIZE") or 1))  # set by torchrun, like RANK
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0
# Ctrl-C, a scheduler's request, and a terminal that is closed (Windows has no SIGHUP)
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


# ---- Device and --amp --------------------------------------------------------------------------------------
def choose_device(name):
    """The device behind --device: "auto", or any name of torch. Raises UserError."""
    here = torch.accelerator.current_accelerator(check_available=True)  # None if there is only the CPU
    if name == "auto":
        return here.type if here else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: torch has no such device; give auto, cpu, cuda, cuda:1 or mps")
    count = torch.accelerator.device_count() if here and here.type == device.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise UserError(f"--device {name}: torch sees {count or 'no'} {device.type} device{'s' * (count > 1)}"
                        " here. --device auto takes an available one")
    return name


def amp_dtype(device):
    """bfloat16 if the hardware computes in it, float16 on older CUDA cards, None on most CPUs."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if kind == "cpu":
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else None
    return torch.bfloat16


def autocast(args):
    """The context of a forward pass: float32, or with --amp the short type of the device."""
    kind, stack = torch.device(args.device).type, contextlib.ExitStack()
    if args.amp:
        stack.enter_context(torch.autocast(kind, amp_dtype(args.device) or torch.bfloat16))
    if args.amp and kind == "cpu":  # the backward pass of a CPU's fused attention is slow in bfloat16
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


def make_scaler(args):
    """A GradScaler: it keeps small gradients in float16 from becoming 0, and does nothing otherwise."""
    halves = args.amp and amp_dtype(args.device) == torch.float16
    return torch.amp.GradScaler(torch.device(args.device).type, enabled=halves)


def synchronize(device):
    """Waits until the device has done all its work, so that a clock may be read."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def peak_memory(device):
    """The most memory that this process needed on the device so far, as text."""
    module = torch.get_device_module(torch.device(device).type)
    if hasattr(module, "max_memory_allocated"):
        return f"{module.max_memory_allocated(torch.device(device)) / 2**30:.1f} GiB"
    if sys.platform == "win32":
        return "unknown"
    import resource
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


# ---- Processes ---------------------------------------------------------------------------------------------
def join(device):
    """Joins this process to those of torchrun: each has its own GPU, or a share of the CPU."""
    if WORLD == 1:
        return
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is set in the environment, but {', '.join(missing)} is not: start with "
                        "torchrun, or unset WORLD_SIZE")
    if torch.device(device).type != "cpu":
        local, count = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        if local >= count or torch.device(device).index is not None:
            raise UserError(f"--device {device}: each process needs its own device, and torch sees {count}; "
                            "lower --nproc-per-node")
        torch.accelerator.set_device_index(local)
    torch.distributed.init_process_group(torch.distributed.get_default_backend_for_device(device))
    atexit.register(torch.distributed.destroy_process_group)  # otherwise its threads may abort the end
    if RANK:
        sys.stdout = open(os.devnull, "w")  # only one process prints


def gather(value):
    """The values of all processes in order of their ranks; [value] if there is only this one."""
    values = [value] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def default_workers():
    """Processes that load images: 0 except on Linux, because elsewhere each would start a new Python."""
    if sys.platform != "linux":
        return 0
    return 1 if (os.cpu_count() or 1) < 4 else 4


def make_loader(dataset, args, **how):
    """A DataLoader with args.workers processes; `how`: batch_size or batch_sampler."""
    # The loader needs its own generator, because it would draw from the global one, which dropout uses, and a
    # resumed run makes one loader more. fork: Python 3.14 would start a new Python, which imports torch.
    return torch.utils.data.DataLoader(
        dataset, num_workers=args.workers, collate_fn=collate, generator=torch.Generator(),
        pin_memory=torch.device(args.device).type in ("cuda", "xpu"), worker_init_fn=leave_the_terminal,
        multiprocessing_context="fork" if args.workers and sys.platform == "linux" else None, **how)


def leave_the_terminal(worker):
    """Ctrl-C and other signals to a process group are for the run, which then ends its workers.

    A worker that a signal ends may hold a lock for which the run would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()
