"""Where a run computes: CUDA, Apple's mps, Intel's xpu, the CPU. Elsewhere nothing asks for a device's name.

mps and xpu are not at hand here. They are reached through the same functions as CUDA, which tests drive with
devices that do not exist.
"""
import contextlib
import re
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HINT = "on a Mac PYTORCH_ENABLE_MPS_FALLBACK=1 in the environment leaves only this operator to the CPU"
AUTO = ("cuda", "mps", "xpu")  # --device auto takes the first that is there, otherwise the CPU


# ---- Which device ------------------------------------------------------------------------------------------
def kind_of(name):
    """cuda, if the name is cuda:1."""
    return torch.device(name).type


def count(kind):
    """How many devices of a kind this torch can use; 0 for a kind that holds no numbers, such as meta."""
    try:
        module = torch.get_device_module(kind)
    except RuntimeError:
        return 0
    return module.device_count() if module.is_available() else 0


def choose(name):
    """The device behind --device: "auto" or any device string of torch. Raises ValueError with a sentence."""
    if name == "auto":
        return next((kind for kind in AUTO if count(kind)), "cpu")
    try:
        if not isinstance(name, str):
            raise TypeError
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError("torch knows no such device; give auto, cpu, cuda, cuda:1, mps or xpu")
    found = count(device.type)
    if (device.index or 0) >= found:
        raise ValueError(f"this torch sees {found or 'no'} {device.type} device{'s' * (found > 1)}; "
                         "auto takes what there is")
    return name


def share(name, number):
    """Takes one of several devices of a kind, and returns what torch.distributed uses between them.

    number: of this process among those of the machine. Raises ValueError with a sentence.
    """
    kind, found = kind_of(name), count(kind_of(name))
    if torch.device(name).index is not None:
        raise ValueError(f"each process takes a {kind} device of its own; leave the number out")
    if kind == "mps":
        raise ValueError("only one process can use it; start without torchrun, or give --device cpu")
    if kind != "cpu":
        if number >= found:
            raise ValueError(f"there are more processes than {kind} devices, {found}; "
                             "lower --nproc-per-node")
        torch.accelerator.set_device_index(number)
    return torch.distributed.get_default_backend_for_device(name)


def missing_operator(error):
    """What a device lacks, such as "aten::cdist", if that is what the error says; otherwise None."""
    found = isinstance(error, NotImplementedError) and re.search(r"'(\w+::[\w.]+)'", str(error))
    return found[1] if found else None


# ---- Time, memory, transfers -------------------------------------------------------------------------------
def synchronize(name):
    """Waits until the device has done all that it was given, so that a clock may be read."""
    if kind_of(name) != "cpu":
        torch.accelerator.synchronize(torch.device(name))


def peak_memory(name):
    """The most bytes that this process has needed so far, on the device; None if nobody knows."""
    module = torch.get_device_module(kind_of(name))
    if hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated(torch.device(name))
    if hasattr(module, "driver_allocated_memory"):  # mps counts no peak; this is what it holds now
        return module.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def pins_memory(name):
    """Whether batches should wait in pinned memory. mps shares the memory of the CPU and cannot."""
    return kind_of(name) in ("cuda", "xpu")


# ---- --amp -------------------------------------------------------------------------------------------------
def has_bfloat16(name):
    """Whether the hardware itself computes in bfloat16, rather than by way of float32."""
    if kind_of(name) == "cpu":
        has = torch.cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    if kind_of(name) == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    module = torch.get_device_module(kind_of(name))
    if not hasattr(module, "is_bf16_supported"):
        return False
    with module.device(name):
        return module.is_bf16_supported(including_emulation=False)


def amp_dtype(name):
    """bfloat16 where the device has it, float16 on older CUDA cards, None where both would only be slower."""
    if has_bfloat16(name):
        return torch.bfloat16
    return torch.float16 if kind_of(name) == "cuda" else None


def why_no_amp(name):
    """A sentence if --amp would only be slower on this device, otherwise ""."""
    if kind_of(name) == "cuda" or amp_dtype(name):
        return ""
    needs = {"cpu": "AVX512_BF16 or AMX", "mps": "macOS 14"}.get(kind_of(name), "hardware for bfloat16")
    return (f"in bfloat16 {name} would be slower than in float32 (it needs {needs}); leave it out, "
            "or give --no-amp")


@contextlib.contextmanager
def autocast(args):
    """The context of a forward pass: float32, or with --amp the short type of the device."""
    if not args.amp:
        yield
        return
    with torch.autocast(kind_of(args.device), amp_dtype(args.device) or torch.bfloat16):
        # The fused attention of a CPU has a backward pass that is several times slower in bfloat16
        math = sdpa_kernel(SDPBackend.MATH) if kind_of(args.device) == "cpu" else contextlib.nullcontext()
        with math:
            yield


class Scaler(torch.amp.GradScaler):
    """Keeps small gradients in float16 from becoming 0: the loss is multiplied, the gradient divided again.

    A step whose gradient overflows is skipped, and the next one is multiplied with half as much. Does nothing
    in float32 and in bfloat16.
    """

    def __init__(self, args=None):
        halves = args is not None and args.amp and amp_dtype(args.device) == torch.float16
        super().__init__(kind_of(args.device) if args else "cpu", enabled=halves)

    def unscaled(self, optimizer):
        """The parameters of an optimiser, with their true gradients."""
        self.unscale_(optimizer)
        return [p for group in optimizer.param_groups for p in group["params"]]

    def skips(self):
        """Whether a gradient that is not finite may be due to the scale: then step() does nothing."""
        return self.is_enabled() and self.get_scale() > 1

    def step(self, optimizer):
        super().step(optimizer)
        self.update()

    def load(self, checkpoint):
        """As it was when the run was stopped. Runs from before have none. Raises SystemExit."""
        state, own = checkpoint.get("scaler"), self.state_dict()
        if not (state and own):
            return
        numbers = isinstance(state, dict) and all(isinstance(v, (int, float)) for v in state.values())
        if not numbers or state.keys() != own.keys():
            raise SystemExit(f"{checkpoint['path']}: cannot go on from its scaler; --no-amp goes on without")
        self.load_state_dict(state)
