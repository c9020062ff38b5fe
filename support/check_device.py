"""What a device can do, for a bug report: which models it trains, and how close to the CPU.

    python -m support.check_device              the device that --device auto takes
    python -m support.check_device mps detr     one device, some models
"""
import platform
import sys

import torch

from support import devices
from support.model_files import describe, known_files, load_model_file
from support.options import TRAINING, preset_values


def try_model(name, file):
    """What becomes of the model of a file on a device: it trains, that close to the CPU, or why not."""
    module, found = load_model_file(file), []
    options = {k: v for k, v in preset_values("laptop", module).items() if k not in TRAINING}
    torch.manual_seed(0)
    model = module.build(4, **options).eval()
    images, mask = torch.randn(2, 3, 96, 96), torch.zeros(2, 96, 96, dtype=torch.bool)
    try:
        for device in ("cpu", name):
            model.to(device).zero_grad()
            out = model(images.to(device), mask.to(device))
            (out["logits"].sum() + out["boxes"].sum()).backward()
            gradients = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
            found.append((out["boxes"].detach().cpu(), torch.cat(gradients)))
    except Exception as error:
        operator = devices.missing_operator(error)
        return f"needs {operator}" if operator else describe(error, file)
    (boxes, gradient), (boxes_there, gradient_there) = found
    return (f"trains; boxes within {(boxes_there - boxes).abs().max():.0e} of the CPU's, "
            f"gradient within {(gradient_there - gradient).norm() / gradient.norm():.1e} of it")


def main(words):
    try:
        name = devices.choose(words[0] if words else "auto")
    except ValueError as error:
        raise SystemExit(f"{words[0]}: {error}")
    print(f"{name}, --amp in {devices.amp_dtype(name)}; torch {torch.__version__}, "
          f"Python {platform.python_version()}, {platform.platform()}")
    for file in words[1:] or known_files():
        print(f"{file:28} {try_model(name, file)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
