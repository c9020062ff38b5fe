"""The loss, the optimiser and the padding, pasted into an empty notebook, train a model: docs/contract.md."""
import inspect
import re
from pathlib import Path

import train
from support import data, evaluation
from tests.tiny_models import shaken

CONTRACT = (Path(__file__).parents[1] / "docs/contract.md").read_text(encoding="utf-8")
PARTS = [train.Diverged, train.SetCriterion, train.make_optimizer, data.collate, evaluation.boxes_to_pixels,
         evaluation.postprocess]


def notebook():
    """A name space with the imports of the page and the source text of these parts, and no other file."""
    found = re.search(r"### In an empty notebook\n(.*?)```python\n(.*?)```", CONTRACT, re.S)
    sentence, imports = found.groups()
    assert [part.__name__ for part in PARTS if f"`{part.__name__}`" not in sentence] == []
    cells = [imports, *(inspect.getsource(part) for part in PARTS)]
    assert not re.search(r"^\s*(from|import) (?!math|torch|scipy)", "\n".join(cells), re.M), "it imports ours"
    scope = {}
    exec("\n\n".join(cells), scope)
    return scope


def test_what_is_pasted_into_an_empty_notebook_trains():
    copied, model = notebook(), shaken("detr").train()
    shapes = data.load(size=48)["val"]  # of four classes; the model has three
    images, mask, targets = copied["collate"]([shapes[index] for index in range(4)])
    for target in targets:
        target["labels"] %= 3
    criterion, optimizer = copied["SetCriterion"](model), copied["make_optimizer"](model, 1e-3, 1e-3, 1e-4)
    losses = []
    for _ in range(8):
        loss = criterion(model(images, mask), targets)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    out, sizes = model.eval()(images, mask), [target["size"] for target in targets]
    found = copied["postprocess"](out["logits"][-1], out["boxes"][-1], sizes, criterion.softmax)
    assert len(found) == 4 and found[0]["boxes"].shape == (5, 4) and found[0]["boxes"].max() > 2
