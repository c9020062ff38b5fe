"""The notebook is what its script says, and every cell of it runs, with fewer steps and a smaller model."""
import contextlib
import io
import json
import re
import shlex
import sys
from types import SimpleNamespace

import torch
from PIL import Image

import train
import visualize
from support import check_data, data, pictures
from support.shapes import Shapes
from tests.test_docs import DOCS, load

notebook = load("notebook")
SCRIPT = (DOCS / "first_steps.py").read_text(encoding="utf-8")
QUICK = shlex.split(
    "--steps 2 --eval-every 2 --size 48 --batch-size 2 --workers 0 --device cpu --option enc_layers=1 "
    "--option dec_layers=1 --option hidden_dim=32 --option num_feature_levels=2")
COMMANDS = {"train.py": train.main, "visualize.py": visualize.main, "-m support.check_data": check_data.main}


def python_of(cell):
    """A code cell for exec(): "!python train.py {RUN}" becomes shell(f'''python train.py {RUN}''')."""
    return re.sub(r"^( *)!(.*)$", r"\1shell(f'''\2''')", "".join(cell["source"]), flags=re.M)


def test_the_notebook_is_what_its_script_says():
    written = (DOCS / "first_steps.ipynb").read_text(encoding="utf-8")
    assert written == notebook.notebook(SCRIPT), "run python docs/notebook.py"
    cells = json.loads(written)["cells"]
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds.count("code") >= 8 and kinds.count("markdown") >= 7
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    assert not any(line.startswith(("# !", "# %%")) for line in lines)
    assert sorted(lines) == sorted(
        line if code else re.sub("^# ?", "", line)
        for code, line in script_lines()), "a line of the script is lost"


def script_lines():
    """(whether it is code, line) of the script's cells, without blank lines between cells."""
    found, code = [], None
    for line in SCRIPT.splitlines():
        if line.startswith("# %%"):
            while found and not found[-1][1]:
                found.pop()
            code = "[markdown]" not in line
        elif code is not None:
            found.append((code, re.sub(r"^( *)# !", r"\1!", line) if code else line))
    return found


def test_every_cell_runs(tmp_path, monkeypatch):
    ran, shown = [], []

    def shell(command):
        ran.append(command)
        program, *words = shlex.split(command)
        if program in ("git", "pip"):
            return
        name = f"-m {words.pop(1)}" if words[0] == "-m" else words[0]
        if name == "train.py":
            words += ["--steps", "3"] if "--resume" in words else QUICK
        words = [word if words[i - 1] != "--count" else "1" for i, word in enumerate(words)]
        assert not COMMANDS[name](words[1:]), command

    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")  # as if it were the folder of the repository
    monkeypatch.setattr(pictures, "draw_curves", lambda log, path: Image.new("RGB", (200, 200)).save(path))
    few = {"train": 40, "val": 10}
    monkeypatch.setattr(data, "Shapes", lambda n, size, seed, split: Shapes(few[split], size, seed, split))
    display = SimpleNamespace(Image=lambda path: Image.open(path).copy(), display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display, version_info=(9, 0)))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    scope, printed = {"shell": shell}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in json.loads((DOCS / "first_steps.ipynb").read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec(python_of(cell).replace("threshold=0.3", "threshold=0"), scope)
    assert len(shown) == 4 and min(min(picture.size) for picture in shown) > 100
    assert [command.split()[1] for command in ran if "python" in command] == [
        "train.py", "visualize.py", "-m", "train.py", "train.py"]
    assert re.search(r"^(circle|square|triangle|cross|ring|\w+) +0\.\d\d \[", printed.getvalue(), re.M)
    assert torch.load(scope["OWN"] / "last.pt", weights_only=True)["step"] == 3
