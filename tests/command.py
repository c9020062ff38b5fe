"""train.py as somebody types it: each call is a process of its own, but all share one start of torch."""
import multiprocessing
import os
import re
import runpy
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from support import UserError

ROOT = Path(__file__).parents[1]
# A checkpoint of 10 MB instead of 50: the tests write hundreds of them
QUICK = ["--workers", "0", "--size", "48", "--batch-size", "4", "--option", "enc_layers=1", "--option",
         "dec_layers=1", "--option", "last_stage=2", "--option", "hidden_dim=32"]


def server():
    """Where processes come from: they start with torch and train.py already imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "train"])
    return context


def train_py(flags, cwd, out, err):
    os.chdir(cwd)
    os.setsid()  # a process group of its own, as in a terminal
    sys.stdout, sys.stderr = open(out, "w"), open(err, "w")
    sys.argv = ["train.py", *flags]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def run(*flags, cwd, meanwhile=lambda process: None, program=train_py):
    """The answer of train.py to these flags: returncode, stdout, stderr. `meanwhile` may send it signals."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = server().Process(target=program, args=(list(map(str, flags)), cwd, out, err))
        process.start()
        meanwhile(process)
        process.join(170)
        assert process.exitcode is not None, "train.py does not end"
        return SimpleNamespace(returncode=process.exitcode, stdout=out.read_text(), stderr=err.read_text())


def without_pictures():
    from support import pictures
    pictures.draw_predictions = pictures.draw_curves = lambda *_: None


def train_in_child(cwd, flags):
    os.chdir(cwd)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    without_pictures()
    train.main(flags)


def start(*flags, cwd):
    """For tests that kill or compare runs: main() without pictures, which take most of the time."""
    process = server().Process(target=train_in_child, args=(str(cwd), list(map(str, flags))))
    process.start()
    return process


def check_refused(flags, message, capsys):
    """main() ends with a single line about the mistake, and no run is left behind."""
    with pytest.raises((SystemExit, UserError)) as stopped:
        train.main(list(map(str, flags)))
    from_argparse = stopped.value.args == (2,)
    text = capsys.readouterr().err.strip().splitlines()[-1] if from_argparse else str(stopped.value)
    assert re.search(message, text, re.S), text
    assert not Path("runs").exists(), "a run folder was made for nothing"
