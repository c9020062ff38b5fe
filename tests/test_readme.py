"""README, contract and tables of files: numbers are counted again, commands parsed, code run."""
import json
import math
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import train
import visualize
from support import UserError
from support.checkpoints import known_files, load_model_file
from support.options import make_parser
from tests.folders import write_noise
from tests.test_visualize import save
from tests.tiny_models import TINY, tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RELATIVES, CONTRACT, AGREEMENT = ((ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
                                  for name in ("relatives", "contract", "agreement"))
FILES = known_files()
ROWS = dict(re.findall(r"^\| \[(\w+)\]\([\w./]+\.py\).*?\| (.*) \|$", README + RELATIVES, re.M))


# ---- The tables of files -----------------------------------------------------------------------------------
def parent_of(name):
    """The name behind "Diff me against:" in the docstring of a file; None for the root."""
    found = re.search(r"Diff me against: (\w+)\.py", FILES[name].read_text())
    return found and found[1]


def diff_size(a, b):
    """Lines out + in, as git counts them."""
    command = ["git", "diff", "--no-index", "--shortstat", FILES[a], FILES[b]]
    out = subprocess.run(command, capture_output=True, text=True)
    return " + ".join(re.findall(r"(\d+) (?:deletion|insertion)", out.stdout)[::-1])


def parameters(name):
    with torch.device("meta"):
        model = load_model_file(name).build(91, pretrained_backbone=False)
    return sum(p.numel() for p in model.parameters())


def test_every_file_has_a_row():
    assert [name for name in FILES if name not in ROWS] == []


@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_the_numbers_of_its_file(name):
    _, lines, diff, *more = ROWS[name].split(" | ")
    right = [str(len(FILES[name].read_text().splitlines())),
             diff_size(parent_of(name), name) if parent_of(name) else ""]
    assert [lines, diff.strip()] == right, f"the row of {name} should have | {' | '.join(right)} |"
    if name not in README:  # only the table of relatives has a column of parameters
        assert more[0] == f"{parameters(name) / 1e6:.1f} M", f"{name} has {parameters(name):,} parameters"


def test_the_sizes_are_those_of_the_models():
    sizes = re.findall(r"^\| (\w+) \| ([\d.]+ M) \|", AGREEMENT, re.M)
    assert len(sizes) == 5
    assert sizes == [(name, f"{parameters(name) / 1e6:.1f} M") for name, _ in sizes]


def test_the_family_tree_has_the_diff_of_every_file_with_a_parent():
    tree = dict(re.findall(r"── (\w+) +(\d+ \+ \d+)$", RELATIVES, re.M))
    assert tree == {name: diff_size(parent_of(name), name) for name in FILES if parent_of(name)}


def test_the_diff_commands_are_those_of_the_parents():
    commands = re.findall(r"^git diff --no-index (\w+)\.py (\w+)\.py$", README, re.M)
    assert sorted(commands) == sorted((parent_of(name), name) for name in FILES
                                      if FILES[name].parent == ROOT and parent_of(name))


# ---- Text --------------------------------------------------------------------------------------------------
def test_it_fits_its_budget():
    assert len(README.split()) <= 900
    assert [line for line in README.splitlines() if len(line) > 120 and line[0] != "|"] == []


def test_two_commands_do_the_whole_set_up_and_each_is_a_block_of_its_own():
    """.ci/run runs both blocks as they are."""
    blocks = [block.replace("\\\n", "") for block in re.findall(r"```bash\n(.*?)```", README, re.S)]
    commands = [re.split(r"\s+&&\s+", block.strip()) for block in blocks if "-m venv" in block]
    set_up = ["python3 -m venv .venv", ".venv/bin/pip install -q -r requirements.txt"]
    assert commands == [[*set_up, ".venv/bin/python train.py --model deformable_detr"],
                        [*set_up, ".venv/bin/python -m pytest -q"]]


@pytest.mark.parametrize("script", ["train", "visualize"])
def test_its_commands_have_flags_that_exist(script):
    parser = {"train": make_parser(""), "visualize": visualize.make_parser()}[script]
    commands = re.findall(rf"(?:python|torchrun --\S+ \d) {script}\.py ([^#\n]*)", README)
    assert commands
    for command in commands:
        parser.parse_args(shlex.split(command))


def test_the_contract_names_every_key_that_we_ask_for():
    source = "\n".join(path.read_text() for path in [ROOT / "train.py", *(ROOT / "support").glob("*.py")])
    pattern = (r'recipe(?:\["(\w+)"\]|\.get\("(\w+)")|"(\w+)" in out\b|out\.get\("(\w+)"'
               r'|out\["\w+"\]\.get\("(\w+)"|(?:extra|noisy)\["(\w+)"\]')
    asked = {key for found in re.findall(pattern, source) for key in found if key}
    assert {"class_loss", "slow_parameters", "groups", "proposals", "class_aware", "target"} <= asked
    assert {key for key in asked if not re.search(rf"\b{key}\b", CONTRACT)} == set()


# ---- Code --------------------------------------------------------------------------------------------------
def test_your_own_loop_trains():
    code = re.search(r"## Your own loop\n\n```python\n(.*?)```", CONTRACT, re.S)[1]
    assert len(code.splitlines()) <= 15 and "range(1000)" in code
    scope, printed = {}, []
    scope["print"] = lambda step, loss: printed.append(loss)
    exec(code.replace("range(1000)", "range(2)").replace("data.load()", "data.load(size=32)"), scope)
    assert len(printed) == 2 and all(map(math.isfinite, printed)) and printed[0] != printed[1]


def test_the_five_lines_print_what_is_on_a_photo(tmp_path, monkeypatch):
    code = re.search(r"```python\n(from support.predict.*?)```", README, re.S)[1]
    assert len(code.splitlines()) <= 5 and "threshold=0.5" in code
    monkeypatch.chdir(tmp_path)
    Path("runs/deformable_detr-shapes").mkdir(parents=True)
    names, state = ["cat", "dog", "cow"], tiny("deformable_detr").state_dict()
    save("runs/deformable_detr-shapes/last.pt", "deformable_detr", state, TINY, names, size=128)
    write_noise(tmp_path / "photo.jpg", 90, 60)
    printed = []
    exec(code.replace("threshold=0.5", "threshold=0"), {"print": lambda *values: printed.append(values)})
    assert len(printed) == 15 and {name for name, _, _ in printed} == set(names)
    assert all(0 < score < 1 and len(box) == 4 for _, score, box in printed)


OWN_FILE = '''
"""Written from docs/contract.md: a few convolutions, and queries that look at all cells."""
import torch
from torch import nn

RECIPE = dict(epochs=50, lr_drop=40, batch_size=16, lr=1e-4, lr_backbone=1e-5, weight_decay=1e-4,
              clip_norm=0.1, slow_parameters=("queries",), class_loss="focal", w_class=2, w_l1=5, w_giou=2)
LAPTOP = dict(steps=40, batch_size=8, lr=2e-3, lr_backbone=2e-3, warmup=5)


class Mine(nn.Module):
    recipe = RECIPE

    def __init__(self, num_classes, hidden_dim=32, dec_layers=2, num_queries=20):
        super().__init__()
        sizes = [3, 16, 32, hidden_dim]
        self.backbone = nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())
                                        for a, b in zip(sizes, sizes[1:])))
        self.queries = nn.Embedding(num_queries, hidden_dim)
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(hidden_dim, 4, batch_first=True) for _ in range(dec_layers))
        self.classes, self.boxes = nn.Linear(hidden_dim, num_classes), nn.Linear(hidden_dim, 4)
        nn.init.constant_(self.classes.bias, -4.0)

    def forward(self, images, mask):
        features = self.backbone(images).flatten(2).transpose(1, 2)
        x, stages = self.queries.weight.expand(len(images), -1, -1), []
        for layer in self.layers:
            x = x + layer(x, features, features)[0]
            stages.append(x)
        hs = torch.stack(stages)
        return {"logits": self.classes(hs), "boxes": self.boxes(hs).sigmoid()}


def build(num_classes, **options):
    return Mine(num_classes, **options)
'''


def test_a_file_written_from_the_contract_alone_trains_resumes_and_is_evaluated(tmp_path, capsys):
    assert len(OWN_FILE.strip().splitlines()) <= 40
    file, run = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(OWN_FILE)
    flags = ["--size", "48", "--workers", "0", "--device", "cpu", "--overfit", "4", "--log-every", "10"]
    train.main(["--model", str(file), "--out", str(run), *flags, "--eval-every", "40"])
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    total = [line["total"] for line in lines if "total" in line]
    assert total[-1] < 0.7 * total[0], "it does not learn"
    train.main(["--resume", str(run), "--steps", "42", "--model", str(file)])
    train.main(["--eval", "--weights", str(run), "--model", str(file)])
    assert "average precision" in capsys.readouterr().out
    torch.save({"model": {}}, tmp_path / "official.pth")
    with pytest.raises(UserError, match="mine has no rename_official"):
        train.main(["--model", str(file), "--init", str(tmp_path / "official.pth"), *flags])
