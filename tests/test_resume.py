"""Runs that are stopped, killed, damaged and continued: nothing is lost, and nothing changes unasked."""
import json
import multiprocessing.synchronize
import os
import random
import shutil
import signal
import time

import pytest
import torch

import train
from support import UserError, checkpoints
from tests.command import QUICK, check_refused, run, start, train_py
from tests.folders import small_coco
from tests.tiny_models import tiny


def weights_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def assert_same_weights(a, b, why):
    assert a["step"] == b["step"]
    for name, value in a["model"].items():
        assert value.equal(b["model"][name]), f"{name} differs {why}"


# ---- Stopped and killed ------------------------------------------------------------------------------------
FLAGS = ["--model", "detr", "--steps", "12", "--eval-every", "12", "--overfit", "4", *QUICK, "--workers", "1",
         "--option", "dropout=0.1"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The last checkpoint of a run that nobody stops."""
    folder = tmp_path_factory.mktemp("straight")
    process = start(*FLAGS, "--out", "run", cwd=folder)
    process.join(100)
    assert process.exitcode == 0
    return weights_of(folder / "run")


def train_py_with_locks_held(*args):
    """As train_py, but the processes that load images keep the lock that they share for most of the time."""
    def is_set(event):
        with event._cond:
            time.sleep(0.05)
            return event._flag.acquire(False) and event._flag.release() is None

    multiprocessing.synchronize.Event.is_set = is_set
    train_py(*args)


@pytest.mark.parametrize("kill, number", [(os.kill, signal.SIGINT), (os.killpg, signal.SIGTERM)])
def test_a_stopped_run_saves_and_resume_gives_the_very_same_weights(kill, number, straight, tmp_path):
    """To the last bit (CPU): Ctrl-C, and a scheduler's signal, which reaches loading processes as well."""
    log = tmp_path / "stopped/log.jsonl"

    def stop_after_three_steps(process):
        while not (log.exists() and log.read_text().count("\n") >= 3) and process.is_alive():
            time.sleep(0.02)
        kill(process.pid, number)

    flags = [*FLAGS, "--out", "stopped", "--log-every", "1"]
    done = run(*flags, cwd=tmp_path, meanwhile=stop_after_three_steps, program=train_py_with_locks_held)
    assert done.returncode == 1 and "--resume stopped" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert weights_of(tmp_path / "stopped")["step"] >= 3
    resumed = start("--resume", "stopped", cwd=tmp_path)
    resumed.join(100)
    assert_same_weights(straight, weights_of(tmp_path / "stopped"), "after resuming")


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
        words = ["--resume", "killed"] if last.exists() else [*flags, "--out", "killed"]
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
    child = start("--resume", "killed", cwd=tmp_path)
    child.join(150)
    assert_same_weights(weights_of(tmp_path / "straight"), weights_of(killed), f"after {kills} kills")
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (tmp_path / "straight", killed)]
    for line in logs[0] + logs[1]:
        del line["seconds"]
    assert logs[0] == logs[1]


# ---- Resumed runs ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a run of four steps on a small data set, "run". Tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    small_coco(folder / "set", images=4)
    flags = ["--data", "set", "--steps", 4, "--eval-every", 2, *QUICK, "--batch-size", 2]
    process = start(*flags, "--out", "run", cwd=folder)
    process.join(100)
    assert process.exitcode == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("draw_predictions", "draw_curves"):
        monkeypatch.setattr(f"support.pictures.{name}", lambda *_: None)
    return tmp_path


def resume(*flags):
    train.main(["--resume", "run", *map(str, flags)])


def test_a_run_that_was_killed_after_its_last_checkpoint_prints_its_table(folder, capsys):
    resume()
    assert f"AP         {weights_of(folder / 'run')['metrics']['AP']:6.3f}" in capsys.readouterr().out


def killed_worker(*_):
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")


def terminated(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    killed_worker()


@pytest.mark.parametrize("happens, error, words", [
    (terminated, UserError, "Stopped at step 6 of 6.* --resume run"),
    (killed_worker, RuntimeError, "is killed by signal"),
])
def test_a_run_whose_evaluation_is_interrupted_is_saved(happens, error, words, folder, monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (*train.machine.STOP_SIGNALS, signal.SIGCHLD)}
    with monkeypatch.context() as patch, pytest.raises(error, match=words):
        patch.setattr(train, "evaluate", happens)
        resume("--steps", 6)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert weights_of(folder / "run")["step"] == 6
    resume()
    steps = [json.loads(line)["step"] for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert steps[-1] == 6 and steps.count(6) == 2, "a line of the training, and one of the evaluation"


def test_an_image_that_cannot_be_read_ends_the_run_but_loses_nothing(folder, capsys):
    """The message names the image; what was trained is saved, and the run resumes once the image is back."""
    image = sorted((folder / "set/train").iterdir())[0]
    content = image.read_bytes()

    def step(self, *_, original=train.Run.log):
        original(self, *_)
        image.write_bytes(content[:50])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=image.name):
        patch.setattr(train.Run, "log", step)
        resume("--steps", 40, "--eval-every", 40, "--workers", 0)
    assert "--resume run" in capsys.readouterr().err
    reached = weights_of(folder / "run")["step"]
    assert 4 < reached < 40
    image.write_bytes(content)
    resume("--steps", reached + 1, "--eval-every", 40)


def test_rates_given_on_resume_take_effect_and_losses_may_have_changed(folder):
    torch.save({**weights_of(folder / "run"), "window": [{"total": 1.0}, {"new": 3}]}, "run/last.pt")
    resume("--steps", 5, "--lr", 1e-5, "--lr-backbone", 2e-6, "--weight-decay", 0.5, "--warmup", 0)
    last = weights_of(folder / "run")
    groups = {group["part"]: group for group in last["optimizer"]["param_groups"]}
    assert groups["rest"]["peak_lr"] == last["args"]["lr"] == 1e-5 and groups["backbone"]["peak_lr"] == 2e-6
    assert groups["rest"]["weight_decay"] == groups["backbone"]["weight_decay"] == 0.5
    assert 0 < groups["rest"]["lr"] < 1e-5


def test_what_makes_the_run_what_it_is_cannot_change(folder, capsys):
    flags = ["--model", "sqr", "--option", "dropout=0.5", "--out", "other", "--size", "64", "--seed", "3",
             "--preset", "paper", "--batch-size", "1", "--overfit", "1", "--no-flip"]
    words = ("--model, --preset, --option, --out, --size, --seed, --batch-size, --overfit, --no-flip: "
             "this differs")
    check_refused(["--resume", "run", "--steps", "9", *flags], words, capsys)
    resume("--steps", "5", "--size", "48")  # as it is


def test_the_same_images_may_have_moved_but_other_images_are_refused(folder):
    shutil.move("set", "moved")
    resume("--steps", 5, "--data", "moved")
    assert weights_of(folder / "run")["args"]["data"] == "moved"
    small_coco(folder / "more", images=5)
    with pytest.raises(UserError, match="trained on 4 images, but here are 5"):
        resume("--steps", 6, "--data", "more")
    small_coco(folder / "other", images=4, categories=[{"id": 7, "name": "something"}])
    with pytest.raises(UserError, match="has the classes thing"):
        resume("--steps", 6, "--data", "other")


def test_a_run_is_evaluated_on_other_images_however_they_are_given(folder, capsys):
    small_coco(folder / "other", images=2)
    places = ["--val-json", "other/annotations/instances_val.json", "--val-images", "other/val"]
    for flags in (["--data", "other"], places, []):
        train.main(["--eval", "--weights", "run", *flags])
        assert "AP50" in capsys.readouterr().out, flags


# ---- Damaged, and of others --------------------------------------------------------------------------------
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
        except UserError:
            continue
        for name, value in read["model"].items():
            assert value.equal(clean["model"][name]), f"byte {place}"


def test_a_checkpoint_that_is_cut_off_or_not_ours_gets_one_line(folder, capsys):
    last = folder / "run/last.pt"
    content = weights_of(folder / "run")
    del content["format"]
    for damage, words in [
        (lambda: last.write_bytes(last.read_bytes()[:5000]), "last.pt: not a readable checkpoint.*best.pt"),
        (lambda: torch.save({"model": {}}, last), "last.pt: not a checkpoint of this version of.*--init"),
        (lambda: torch.save(content, last), "last.pt: not a checkpoint of this version of train.py"),
        (last.unlink, "last.pt: no such checkpoint"),
    ]:
        damage()
        check_refused(["--resume", "run"], words, capsys)


def test_weights_and_optimisers_of_another_model_are_refused(folder):
    content = weights_of(folder / "run")
    torch.save({**content, "model": tiny("conditional_detr").state_dict()}, "run/last.pt")
    with pytest.raises(UserError, match="its weights are not those of this model"):
        resume("--steps", 9)
    content["optimizer"]["param_groups"][0]["params"].reverse()
    torch.save(content, "run/last.pt")
    with pytest.raises(UserError, match="its optimiser is for other groups of parameters"):
        resume("--steps", 9)


def test_a_save_that_fails_leaves_the_old_file_and_no_half_one(folder, monkeypatch):
    before = (folder / "run/last.pt").read_bytes()

    def fills_up(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", fills_up)
    with pytest.raises(UserError, match="run/.*: cannot be written, is the disk full.*--resume"):
        resume("--steps", 5)
    assert (folder / "run/last.pt").read_bytes() == before
    assert not list((folder / "run").glob("*.tmp"))
