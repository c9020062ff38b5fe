"""Flags and options as somebody types them: a mistake gets one clear line and leaves no folder behind."""
import threading
from pathlib import Path

import pytest

import train
from support import UserError, options
from support.model_files import load_model_file
from support.run import claim_folder
from tests.command import QUICK, check_refused, run
from tests.folders import small_coco

WRONG = {
    "unknown model": (["--model", "yolo"], "yolo.*detr"),
    "model that is no Python file": (["--model", "{tmp}/x.txt"], "not a .py file"),
    "unknown preset": (["--preset", "huge"], "laptop"),
    "unknown option": (["--option", "num_querys=3"], "num_querys.*num_queries"),
    "option without a value": (["--option", "smca"], "NAME=VALUE"),
    "bad option value": (["--option", "backbone=vgg16"], "resnet50"),
    "a word for a bool": (["--option", "dilation=maybe"], "dilation=maybe: it must be bool"),
    "a number for a bool": (["--option", "dilation=1"], "dilation=1: it must be bool"),
    "a float for an int": (["--option", "num_queries=2.5"], "num_queries=2.5: it must be int"),
    "a bool for an int": (["--option", "num_queries=true"], "it must be int"),
    "a word for a float": (["--option", "dropout=none"], "it must be float"),
    "an option of another file": (["--model", "conditional_detr", "--option", "spatial_query=csq-p"],
                                  "it belongs to conditional_detr_ablations"),
    "missing folder": (["--data", "nowhere"], "nowhere"),
    "missing checkpoint": (["--resume", "nowhere"], "nowhere"),
    "an empty name": (["--resume", ""], "--resume is empty"),
    "two dashes": (["--steps=--"], "--steps (is empty|--:)|invalid int"),
    "eval without weights": (["--eval"], "--weights"),
    "weights without eval": (["--weights", "x.pt"], "--weights goes with --eval"),
    "negative steps": (["--steps", "-1"], "--steps"),
    "rate that is no number": (["--lr", "nan"], "--lr nan"),
    "negative rate": (["--lr-backbone", "-1"], "--lr-backbone -1"),
    "weight decay that is no number": (["--weight-decay", "nan"], "--weight-decay nan"),
    "no images in an evaluation": (["--eval-batch-size", "0"], "--eval-batch-size 0"),
    "negative workers": (["--workers", "-1"], "--workers -1"),
    "a seed of 23 digits": (["--seed", "9" * 23], "--seed 9+: it must be"),
    "a size of 23 digits": (["--size", "9" * 23], "--size 9+: it must be"),
    "a size of nothing": (["--size", "31"], "--size 31"),
    "batch not a multiple": (["--batch-size", "5", "--accumulate", "2"], "multiple"),
    "a device that is not there": (["--device", "cuda:99"], "sees (no|\\d+) cuda device"),
    "a device that nobody knows": (["--device", "gpu"], "--device gpu: torch knows no such device"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_flags_get_one_clear_line(what, tmp_path, monkeypatch, capsys):
    flags, message = WRONG[what]
    (tmp_path / "x.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    check_refused([flag.format(tmp=tmp_path) for flag in flags], message, capsys)


def test_bools_are_read_in_any_case():
    read = options.parse_model_options(["a=False", "b=TRUE", "c=true", "d=3", "e=0.5", "f=resnet18", "g=1e3"])
    assert read == {"a": False, "b": True, "c": True, "d": 3, "e": 0.5, "f": "resnet18", "g": 1000.0}
    request = options.parse("", ["--model", "deformable_detr", "--option", "box_refine=False"])
    assert request.model_options["box_refine"] is False


def test_every_model_file_is_found_by_its_name():
    for name in ("detr", "sqr", "conditional_detr_ablations", "sam_detr_multiscale"):
        assert load_model_file(name).build, name


# ---- Folders -----------------------------------------------------------------------------------------------
def claim(tmp_path, out=None):
    request = options.parse("", ["--model", "detr"] + (["--out", str(out)] if out else []))
    return claim_folder(request.args, request.module)


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    claimed, gate = [], threading.Barrier(8)

    def at_once():
        gate.wait()
        claimed.append(claim(tmp_path))
    threads = [threading.Thread(target=at_once) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(claimed)) == 8, claimed


@pytest.mark.parametrize("name", ["detr.py", "args.json", "last.pt", "log.jsonl"])
def test_out_overwrites_nothing_of_the_users(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit, match=f"holds {name} already"):
        claim(tmp_path, tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_out_may_be_an_existing_folder_with_other_files_but_not_a_file(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert claim(tmp_path, tmp_path) == tmp_path
    with pytest.raises(SystemExit, match="is a file"):
        claim(tmp_path, tmp_path / "notes.txt")


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
    folder = small_coco(tmp_path / "set")
    (folder / "train/1.png").write_bytes((folder / "train/1.png").read_bytes()[:200])  # cut off
    done = run("--data", folder, "--steps", 5, *QUICK, "--workers", 1, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "1.png (image id 1)" in done.stderr.strip().splitlines()[-1]


def test_names_that_a_terminal_cannot_show_and_folders_with_spaces(tmp_path):
    folder = small_coco(tmp_path / "my set", categories=[{"id": 7, "name": "\ud800 $x{$ \u4e2d"}])
    done = run("--data", folder, "--steps", 1, *QUICK, "--batch-size", 2, "--out", "my run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my run/predictions.png").exists()


@pytest.mark.parametrize("flags", [["--out", "x" * 300], ["--data", "x" * 300], ["--resume", "x" * 300],
                                   ["--init", "x" * 300], ["--model", "x" * 300]])
def test_names_of_300_letters_get_one_line(flags, tmp_path):
    done = run(*flags, "--steps", 1, "--overfit", 2, *QUICK, cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_gets_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.pt.tmp").symlink_to("/dev/full")
    done = run("--steps", 2, "--overfit", 2, *QUICK, "--out", "run", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "space" in done.stderr, done.stderr
    assert not (tmp_path / "run/args.json").exists(), "the folder is taken for nothing"


def test_data_errors_are_raised_not_printed(tmp_path):
    with pytest.raises(UserError):
        train.main(["--data", str(tmp_path), *QUICK])
