"""How far are our numbers from the official code's? The largest difference in every case of tests/golden.

    python benchmarks/agreement.py

tests/test_golden.py and tests/test_sqr.py hold these and more to their tolerances; this prints what they are.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import train  # noqa: E402
from golden import CASES, Case, options_of, our_name  # noqa: E402
from support.model_files import load_model_file  # noqa: E402

SQR_CASES = {"sqr": ("sqr", {"recollect": "selective"}), "dqr": ("sqr", {"recollect": "dense"})}


def agreement(name, file, extra):
    """Largest difference of logits and boxes over all stages; relative ones of loss and of gradient norms."""
    case, module = Case(name), load_model_file(file)
    options = options_of(case.json["case"]["args"], extra)
    model = module.build(case.json["case"]["num_classes"], pretrained_backbone=False, **options)
    module.load_official(model, {"model": case.state_dict()})
    images, mask = case.batch()
    with torch.no_grad():
        out = model.eval()(images, mask)
    loss = train.SetCriterion(model)(model.train()(images, mask), case.targets())["total"]
    loss.backward()
    stored, parameters = case.json, dict(model.named_parameters())
    large = {key: norm for key, norm in stored["grad_l2"].items() if norm > 1e-4 * stored["grad_l2_total"]}
    gradients = [(parameters[our_name(module, key)].grad.double().norm().item(), norm)
                 for key, norm in large.items()]  # 0/0 says nothing
    return [(out["logits"] - case.arrays["logits"]).abs().max().item(),
            (out["boxes"] - case.arrays["boxes"]).abs().max().item(),
            abs(loss.item() / stored["loss_total"] - 1),
            max(abs(ours / theirs - 1) for ours, theirs in gradients)]


def main():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n\n"
          "| case | logits | boxes | loss, relative | gradient norms, relative |\n|---|---|---|---|---|")
    for name, (file, extra) in {**CASES, **SQR_CASES}.items():
        cells = [f"{x:.0e}" for x in agreement(name, file, extra)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
