"""Runs that are stopped, killed, damaged and continued: nothing is lost, and nothing changes unasked."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

import detr
import train
from support import checkpoints, report
from support.model_files import model_of_run
from tests.command import QUICK, ROOT, check_refused, run, start
from tests.folders import small_coco
from tests.tiny_models import tiny


def weights_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def assert_same_weights(a, b, why):
    assert a["step"] == b["step"]
    for name, value in a["model"].items():
        assert value.equal(b["model"][name]), f"{name} differs {why}"


# ---- Stopped -----------------------------------------------------------------------------------------------
def stop_after_three_steps(process, log, group):
    """Sends it SIGINT, as Ctrl-C does, or SIGTERM to its whole process group."""
    while not (log.exists() and log.read_text().count("\n") >= 3) and process.is_alive():
        time.sleep(0.02)
    if group:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(process.pid, signal.SIGINT)


@pytest.mark.parametrize("group", [False, True])
def test_a_stopped_run_saves_and_resume_gives_the_very_same_weights(group, tmp_path):
    """As if it had never been stopped, to the last bit (CPU). A scheduler signals the workers, too."""
    flags = ["--model", "detr", "--steps", "12", "--eval-every", "12", "--overfit", "4", *QUICK,
             "--workers", "1", "--option", "dropout=0.1"]
    straight = start(*flags, "--out", "straight", cwd=tmp_path)
    done = run(*flags, "--out", "stopped", "--log-every", "1", cwd=tmp_path, meanwhile=partial(
        stop_after_three_steps, log=tmp_path / "stopped/log.jsonl", group=group))
    assert done.returncode == 1 and "--resume stopped" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    resumed = start("--resume", "stopped", "--workers", 0, cwd=tmp_path)
    for child in (straight, resumed):
        child.join(100)
        assert child.exitcode == 0
    assert_same_weights(*(weights_of(tmp_path / name) for name in ("straight", "stopped")), "after resuming")


def test_python_ends_although_something_still_holds_a_loader(tmp_path):
    """A picture may hold one, or a debugger: loading processes ignore SIGTERM, by which Python ends them."""
    (tmp_path / "holds.py").write_text("""
from types import SimpleNamespace
from support import processes
loader = iter(processes.make_loader([1, 2, 3], SimpleNamespace(workers=1, device="cpu")))
""".lstrip())
    done = subprocess.run([sys.executable, tmp_path / "holds.py"], cwd=ROOT, timeout=60, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_ten_kills_lose_nothing(tmp_path):
    """kill -9 at random moments, loading, training and saving: the same weights and log at the end."""
    small_coco(tmp_path / "set", images=6)
    flags = ["--data", "set", *QUICK, "--batch-size", "2", "--steps", "24", "--eval-every", "1",
             "--log-every", "3", "--option", "dropout=0.1"]
    straight = start(*flags, "--out", "straight", cwd=tmp_path)
    straight.join(150)
    assert straight.exitcode == 0
    killed, last, moments, kills = tmp_path / "killed", tmp_path / "killed/last.pt", random.Random(0), 0
    while kills < 10:
        if killed.exists() and not last.exists():
            shutil.rmtree(killed)  # killed between the claim of the folder and the first checkpoint
        words = ["--resume", "killed", "--workers", "0"] if last.exists() else [*flags, "--out", "killed"]
        before = last.stat().st_mtime_ns if last.exists() else 0
        child = start(*words, cwd=tmp_path)
        # Somewhere between the start of the process and a few saved steps later
        if moments.random() < 0.8:
            while child.is_alive() and (not last.exists() or last.stat().st_mtime_ns == before):
                time.sleep(0.002)
        time.sleep(moments.random() * 0.3)
        if not child.is_alive():
            break  # finished before all kills were spent
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
    assert kills >= 5, "the run is too short for this test"
    child = start("--resume", "killed", "--workers", "0", cwd=tmp_path)
    child.join(150)
    assert_same_weights(weights_of(tmp_path / "straight"), weights_of(killed), f"after {kills} kills")
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (tmp_path / "straight", killed)]
    for line in logs[0] + logs[1]:
        del line["seconds"]
    assert logs[0] == logs[1]


# ---- Damaged -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a run of four steps on a small data set, "run". Tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    small_coco(folder / "set", images=4)
    done = run("--data", "set", "--steps", 4, "--eval-every", 2, *QUICK, "--batch-size", 2, "--out", "run",
               cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resume(*flags):
    train.main(["--resume", "run", "--workers", "0", *map(str, flags)])


def test_a_damaged_checkpoint_is_recognised_and_the_one_before_is_taken(folder, capsys):
    last, previous = folder / "run/last.pt", folder / "run/previous.pt"
    good = previous.read_bytes()
    last.write_bytes(last.read_bytes()[:5000])
    resume("--steps", 5, "--eval-every", 100)
    assert "Taking run/previous.pt" in capsys.readouterr().err
    assert weights_of(folder / "run")["step"] == 5
    assert previous.read_bytes() == good and (folder / "run/last.damaged.pt").exists(), "damage spreads"
    steps = [json.loads(line)["step"] for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 5 and steps.count(4) <= 2


def test_a_flipped_bit_does_not_pass(folder):
    """Anywhere in the weights; elsewhere the archive cannot be read or the bit means nothing."""
    content = bytearray((folder / "run/last.pt").read_bytes())
    clean = checkpoints.read_file(folder / "run/last.pt")
    for seed in range(16):
        place = random.Random(seed).randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << seed % 8
        (folder / "flipped.pt").write_bytes(damaged)
        try:
            read = checkpoints.read_file(folder / "flipped.pt")
        except SystemExit:
            continue
        for name, value in read["model"].items():
            assert value.equal(clean["model"][name]), f"byte {place}"
        assert read["step"] == clean["step"]


EMPTY = {"model": {}, "args": {}, "model_options": {}, "class_names": [], "category_ids": []}


@pytest.mark.parametrize("content, words", [
    (3, "holds a int"),
    ([], "holds a list"),
    ({"weights": 1}, "not a checkpoint of train.py"),
    (EMPTY, "look at its args"),
    ({**EMPTY, "args": dict(model="detr", preset="laptop", size=48, data=None)}, "go on from its optimizer"),
])
def test_what_is_no_checkpoint_is_refused(content, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "other.pt")
    check_refused(["--resume", "other.pt"], words, capsys)


@pytest.mark.parametrize("entry, value", [
    ("step", -1), ("step", "x"), ("step", None), ("best", "x"), ("window", [1]), ("window", [{"total": "x"}]),
    ("window", {"a": 1}), ("optimizer", 3), ("model", {3: torch.zeros(1)}), ("model_options", {3: 4}),
    ("class_names", ["a", 3]), ("args", {3: 4})])
def test_an_entry_of_the_wrong_kind_is_named(entry, value, folder, capsys):
    content = torch.load("run/last.pt", weights_only=True)
    torch.save({**content, entry: value}, "run/last.pt")
    (folder / "run/previous.pt").unlink()
    check_refused(["--resume", "run", "--steps", "9"], rf"\b{entry}\b", capsys)


@pytest.mark.parametrize("name, value", [
    ("lr", "x"), ("lr", None), ("batch_size", None), ("batch_size", 2.5), ("data", 3), ("schedule", "x"),
    ("amp", "x"), ("seed", None), ("preset", []), ("steps", torch.zeros(2))])
def test_a_flag_of_the_wrong_kind_in_a_checkpoint_is_named(name, value, folder, capsys):
    content = torch.load("run/last.pt", weights_only=True)
    torch.save({**content, "args": {**content["args"], name: value}}, "run/last.pt")
    check_refused(["--resume", "run"], f"--{name.replace('_', '-')}", capsys)


@pytest.mark.parametrize("change", ["shapes", "groups", "amsgrad"])
def test_the_optimiser_of_another_model_is_refused_and_settings_are_those_of_this_start(change, folder):
    content = torch.load("run/last.pt", weights_only=True)
    saved = content["optimizer"]
    if change == "shapes":
        saved["state"][0]["exp_avg"] = torch.zeros(1)
    if change == "groups":
        saved["param_groups"][0]["params"].reverse()
    if change == "amsgrad":
        saved["param_groups"][0].update(amsgrad=True, eps="x", betas=7)
    torch.save(content, "run/last.pt")
    if change == "amsgrad":
        resume("--steps", 5)
        return
    with pytest.raises(SystemExit, match="its optimiser does not fit this model"):
        resume("--steps", 5)


def test_losses_may_change_between_two_logged_lines(folder):
    """The model file was edited after the run was stopped."""
    content = torch.load("run/last.pt", weights_only=True)
    torch.save({**content, "window": [{"total": 1.0}, {"new": 3}]}, "run/last.pt")
    resume("--steps", 5)


HOLD = """
import fcntl, sys
file = open("run/args.json", "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_only_one_process_goes_on_with_a_run(folder):
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(SystemExit, match="another process is training this run"):
        resume("--steps", 5)
    holder.communicate()
    resume("--steps", 5)
    resume("--steps", 6)


def test_a_save_that_fails_leaves_the_old_file_and_no_half_one(folder):
    before = (folder / "run/last.pt").read_bytes()
    with pytest.raises(AttributeError):
        checkpoints.save(folder / "run/last.pt", {"cannot be pickled": lambda: 3}, folder / "run/previous.pt")
    assert (folder / "run/last.pt").read_bytes() == before
    assert not list((folder / "run").glob("*.tmp"))


def test_a_disk_that_is_full_in_the_middle_of_a_save_gets_one_line(folder, monkeypatch):
    def fills_up(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", fills_up)
    with pytest.raises(SystemExit, match="cannot be written, is the disk full.*--resume"):
        with report.one_line_errors():
            resume("--steps", 5)


def test_a_bool_that_was_a_word_in_an_old_run_is_what_it_meant():
    checkpoint = {"args": {"model": "deformable_detr"}, "path": "run/last.pt",
                  "model_options": {"box_refine": "False", "two_stage": "True"}}
    assert model_of_run(checkpoint)[2] == {"box_refine": True, "two_stage": True}


def test_weights_of_another_model_are_refused(folder):
    content = torch.load("run/last.pt", weights_only=True)
    torch.save({**content, "model": tiny("conditional_detr").state_dict()}, "run/last.pt")
    with pytest.raises(SystemExit, match="its weights are not those of this model"):
        resume("--steps", 9)


def test_foreign_lines_in_the_log_are_no_reason_to_stop(folder):
    with open("run/log.jsonl", "ab") as log:
        log.write(b'not json\n3\n{"step": "x"}\n[]\n\xff\xfe\n{"cut": ')
    resume("--steps", 5)
    lines = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 5


# ---- What may change ---------------------------------------------------------------------------------------
def test_rates_given_on_resume_take_effect(folder):
    resume("--steps", 5, "--lr", 1e-5, "--lr-backbone", 2e-6, "--weight-decay", 0.5, "--warmup", 0)
    groups = {group["part"]: group for group in weights_of(folder / "run")["optimizer"]["param_groups"]}
    assert groups["rest"]["peak_lr"] == 1e-5 and groups["backbone"]["peak_lr"] == 2e-6
    assert groups["rest"]["weight_decay"] == groups["backbone"]["weight_decay"] == 0.5
    assert 0 < groups["rest"]["lr"] < 1e-5
    assert weights_of(folder / "run")["args"]["lr"] == 1e-5


@pytest.mark.parametrize("flags", [
    ["--model", "sqr"], ["--option", "dropout=0.5"], ["--out", "other"], ["--size", "64"], ["--seed", "3"],
    ["--preset", "paper"], ["--batch-size", "1"], ["--overfit", "1"]])
def test_what_makes_the_run_what_it_is_cannot_change(flags, folder, capsys):
    before = (folder / "run/last.pt").read_bytes()
    words = f"{flags[0]}: that is decided by the run"
    check_refused(["--resume", "run", "--steps", "9", *flags], words, capsys)
    assert (folder / "run/last.pt").read_bytes() == before


def test_the_same_images_may_have_moved_but_other_images_are_refused(folder):
    shutil.move("set", "moved")
    resume("--steps", 5, "--data", "moved")
    assert weights_of(folder / "run")["args"]["data"] == "moved"
    small_coco(folder / "more", images=5)
    with pytest.raises(SystemExit, match="trained on 4 images, but there are 5"):
        resume("--steps", 6, "--data", "more")
    small_coco(folder / "other", images=4, categories=[{"id": 7, "name": "something"}])
    with pytest.raises(SystemExit, match="knows the classes thing"):
        resume("--steps", 6, "--data", "other")


def test_a_run_is_evaluated_on_other_images_however_they_are_given(folder, capsys):
    small_coco(folder / "other", images=2)
    places = ["--val-json", "other/annotations/instances_val.json", "--val-images", "other/val"]
    train_places = ["--train-json", "other/annotations/instances_train.json", "--train-images", "other/train"]
    for flags in (["--data", "other"], places, places + train_places, []):
        train.main(["--eval", "--weights", "run", "--workers", "0", *flags])
        assert "AP50" in capsys.readouterr().out, flags


# ---- Runs from before --------------------------------------------------------------------------------------
def test_a_run_whose_optimiser_has_groups_without_names_goes_on(folder):
    """One group for each rate, as it was: the memory of every parameter must come to the same parameter."""
    content = torch.load("run/last.pt", weights_only=True)
    model = detr.build(1, **content["model_options"])
    new = train.make_optimizer(model, 3e-4, 3e-4, 1e-4)
    checkpoints.load_optimizer(new, model, {**content, "path": "run/last.pt"})
    rates = {"args": {"lr": 3e-4, "lr_backbone": 3e-4}}
    old = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.requires_grad]}])
    old.state.update(new.state)
    again = train.make_optimizer(model, 3e-4, 3e-4, 1e-4)
    checkpoints.load_optimizer(again, model, {"optimizer": old.state_dict(), **rates, "path": "old.pt"})
    for p in model.parameters():
        if p.requires_grad:
            assert again.state[p]["exp_avg"].equal(new.state[p]["exp_avg"])


def test_an_option_that_moved_to_another_file_takes_the_run_there(folder, capsys):
    content = torch.load("run/last.pt", weights_only=True)
    content["args"]["model"], content["model_options"]["spatial_query"] = "conditional_detr", "csq-p"
    torch.save(content, "run/last.pt")
    with pytest.raises(SystemExit, match="not those of this model"):  # they are DETR's
        resume("--steps", 9)
    said = capsys.readouterr().out
    assert "spatial_query of conditional_detr is in the file conditional_detr_ablations now" in said
