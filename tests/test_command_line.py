"""Flags and options as somebody types them: a mistake gets one clear line and leaves no folder behind."""
import threading

import pytest

import train
from support import UserError, options
from support.run import claim_folder
from tests.command import QUICK, check_refused, run
from tests.folders import small_coco

WRONG = {
    "unknown model": (["--model", "yolo"], "yolo.*detr"),
    "model that is no Python file": (["--model", "{tmp}/x.txt"], "no such .py file"),
    "unknown option": (["--option", "num_querys=3"], "num_querys.*num_queries"),
    "option without a value": (["--option", "smca"], "NAME=VALUE"),
    "bad option value": (["--option", "backbone=vgg16"], "resnet50"),
    "a word for a bool": (["--option", "dilation=maybe"], "dilation=maybe: it must be bool"),
    "a float for an int": (["--option", "num_queries=2.5"], "num_queries=2.5: it must be int"),
    "a word for a float": (["--option", "dropout=none"], "it must be float"),
    "missing folder": (["--data", "nowhere"], "nowhere"),
    "missing checkpoint": (["--resume", "nowhere"], "nowhere: no such checkpoint"),
    "an empty name": (["--resume", ""], "--resume: it is empty"),
    "eval without weights": (["--eval"], "--eval and --weights FILE go together"),
    "weights without eval": (["--weights", "x.pt"], "--eval and --weights FILE go together"),
    "two ways to start": (["--init", "x", "--resume", "y"], "--resume: not allowed with argument --init"),
    "negative steps": (["--steps", "-1"], "--steps: -1: it must be a whole number"),
    "rate that is no number": (["--lr", "nan"], "--lr: nan: it must be"),
    "negative rate": (["--lr-backbone", "-1"], "--lr-backbone: -1"),
    "a size of 23 digits": (["--size", "9" * 23], "--size: 9+: it must be 32 to 8192"),
    "batch not a multiple": (["--batch-size", "5", "--accumulate", "2"], "multiple of 2"),
    "a device that is not there": (["--device", "cuda:99"], "sees (no|\\d+) cuda device"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_flags_get_one_clear_line(what, tmp_path, monkeypatch, capsys):
    flags, message = WRONG[what]
    (tmp_path / "x.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    check_refused([flag.format(tmp=tmp_path) for flag in flags], message, capsys)


def test_what_was_typed_wins_over_the_preset():
    laptop, paper = (options.parse("", ["--preset", preset]).args for preset in ("laptop", "paper"))
    assert (laptop.steps, laptop.lr, laptop.schedule) == (6000, 3e-4, "cosine")
    assert (paper.epochs, paper.lr, paper.schedule, paper.clip_norm) == (500, 1e-4, "step", 0.1)
    typed = options.parse("", ["--epochs", "3", "--lr", "0.5", "--option", "dropout=0.5"])
    assert typed.args.steps is None and typed.args.lr == 0.5 and typed.model_options["dropout"] == 0.5


def test_options_are_read_as_json_and_bools_in_any_case():
    read = options.parse_model_options(["a=False", "b=TRUE", "c=true", "d=3", "e=0.5", "f=resnet18", "g=1e3"])
    assert read == {"a": False, "b": True, "c": True, "d": 3, "e": 0.5, "f": "resnet18", "g": 1000.0}


# ---- Folders -----------------------------------------------------------------------------------------------
def claim(*flags):
    return claim_folder(options.parse("", ["--model", "detr", *map(str, flags)]))


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    claimed, gate = [], threading.Barrier(8)

    def at_once():
        gate.wait()
        claimed.append(claim())
    threads = [threading.Thread(target=at_once) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(claimed)) == 8, claimed


@pytest.mark.parametrize("name", ["detr.py", "args.json", "last.pt", "notes.txt"])
def test_out_overwrites_nothing_of_the_users(name, tmp_path):
    (tmp_path / name).write_text("mine")
    if name == "notes.txt":
        assert claim("--out", tmp_path) == tmp_path
        with pytest.raises(FileExistsError):  # which one_line_errors turns into one line
            claim("--out", tmp_path / name)
    else:
        with pytest.raises(UserError, match=f"already has {name}"):
            claim("--out", tmp_path)
    assert (tmp_path / name).read_text() == "mine"


# ---- Whole commands ----------------------------------------------------------------------------------------
def test_the_four_paths_can_be_given_one_by_one(tmp_path, monkeypatch):
    folder = small_coco(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    flags = []
    for split in ("train", "val"):
        flags += [f"--{split}-json", str(folder / f"annotations/instances_{split}.json"),
                  f"--{split}-images", str(folder / split)]
    train.main([*flags, "--steps", "1", *QUICK, "--batch-size", "2"])
    assert (tmp_path / "runs/detr-train/last.pt").exists()


def test_bad_data_ends_in_one_line_even_from_a_worker(tmp_path):
    folder = small_coco(tmp_path / "set", images=9)
    (folder / "train/8.png").write_bytes((folder / "train/8.png").read_bytes()[:200])  # cut off
    done = run("--data", folder, "--steps", 9, *QUICK, "--workers", 1, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "8.png (image id 8)" in done.stderr.strip().splitlines()[-1]


def test_names_that_a_terminal_cannot_show_and_folders_with_spaces(tmp_path):
    folder = small_coco(tmp_path / "my set", categories=[{"id": 7, "name": "\ud800 $x{$ \u4e2d"}])
    done = run("--data", folder, "--steps", 1, *QUICK, "--batch-size", 2, "--out", "my run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my run/predictions.png").exists()
