"""The notebook is made by its script, and every cell of it runs, with fewer steps and a smaller model."""
import contextlib
import io
import json
import re
import shlex
import sys
from types import SimpleNamespace

from PIL import Image

import train
import visualize
from support import check_data, data, pictures
from support.shapes import Shapes
from tests.test_docs import DOCS, load

notebook = load("notebook")
WRITTEN = (DOCS / "first_steps.ipynb").read_text(encoding="utf-8")
QUICK = shlex.split(
    "--steps 2 --eval-every 2 --size 48 --batch-size 2 --workers 0 --device cpu --option enc_layers=1 "
    "--option dec_layers=1 --option hidden_dim=32 --option num_feature_levels=2")
COMMANDS = {"train.py": train.main, "visualize.py": visualize.main, "-m support.check_data": check_data.main}


def test_the_notebook_is_what_its_script_says():
    assert WRITTEN == notebook.notebook((DOCS / "first_steps.py").read_text(encoding="utf-8")), (
        "run python docs/notebook.py")


def test_every_cell_runs(tmp_path, monkeypatch):
    ran, shown = [], []

    def shell(command):
        program, *words = shlex.split(command)
        if program in ("git", "pip"):
            return
        name = f"-m {words.pop(1)}" if words[0] == "-m" else words[0]
        ran.append(name)
        if name == "train.py":
            words += ["--steps", "3"] if "--resume" in words else QUICK
        assert not COMMANDS[name](words[1:]), command

    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")  # as if it were the folder of the repository
    monkeypatch.setattr(pictures, "draw_curves", lambda log, path: Image.new("RGB", (200, 200)).save(path))
    monkeypatch.setattr(data, "Shapes", lambda n, size, seed, split: Shapes(40, size, seed, split))
    display = SimpleNamespace(Image=lambda path: Image.open(path).copy(), display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display, version_info=(9, 0)))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    scope, printed = {"shell": shell}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in json.loads(WRITTEN)["cells"]:
            if cell["cell_type"] == "code":  # "!python FILE {RUN}" becomes shell(f'''python FILE {RUN}''')
                code = re.sub(r"^( *)!(.*)$", r"\1shell(f'''\2''')", "".join(cell["source"]), flags=re.M)
                exec(code.replace("threshold=0.3", "threshold=0"), scope)
    assert ran == ["train.py", "visualize.py", "-m support.check_data", "train.py", "train.py"]
    assert len(shown) == 5 and min(min(picture.size) for picture in shown) > 100
    assert re.search(r"^\w+ +0\.\d\d \[", printed.getvalue(), re.M), "no prediction was printed"
