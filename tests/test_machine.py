"""Devices, --amp and loaders. Most devices are not here: torch's answers are made up, their use is not."""
import contextlib
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from support import UserError, machine, report
from tests.tiny_models import TARGETS, batch, shaken


@pytest.fixture
def two_cards(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def test_auto_takes_what_there_is_and_a_device_that_is_not_there_gets_a_sentence(two_cards):
    assert machine.choose_device("auto") == "cuda"
    assert [machine.choose_device(name) for name in ("cuda:1", "cpu")] == ["cuda:1", "cpu"]
    for name, words in [("cuda:2", "sees 2 cuda devices here"), ("mps", "sees no mps device here"),
                        ("gpu", "has no such device; give auto, cpu, cuda")]:
        with pytest.raises(UserError, match=f"--device {name}: torch {words}"):
            machine.choose_device(name)


def test_each_process_takes_a_card_of_its_own(two_cards, monkeypatch):
    monkeypatch.setattr(machine, "WORLD", 3)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="its own device, and torch sees 2; lower --nproc-per-node"):
        machine.join("cuda")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match="LOCAL_RANK is not: start with torchrun, or unset WORLD_SIZE"):
        machine.join("cuda")


def test_images_are_loaded_by_copies_of_this_process_or_by_itself(monkeypatch):
    """A new Python (default on a Mac, Windows, Python 3.14) would import torch for every evaluation."""
    args = SimpleNamespace(workers=1, device="cpu")
    assert machine.make_loader([1], args).multiprocessing_context.get_start_method() == "fork"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.default_workers() == 0 and machine.make_loader([1], args).multiprocessing_context is None


@pytest.mark.parametrize("error, words", [
    (NotImplementedError("The operator 'aten::roll' is not there"), "lacks the operator aten::roll.*cpu"),
    (torch.OutOfMemoryError("CUDA out of memory"), "Out of memory. Raise --accumulate"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "loads images.* --workers 0"),
    (FileNotFoundError(2, "No such file", "x.png"), "x.png"), (UserError("a: b"), "^a: b$"),
    (FloatingPointError("logits are not finite"), "^logits are"), (KeyboardInterrupt(), "Interrupted"),
])
def test_errors_that_people_meet_end_in_one_line(error, words):
    with pytest.raises(SystemExit, match=words) as end, report.one_line_errors():
        raise error
    assert "\n" not in str(end.value).strip()


# ---- --amp -------------------------------------------------------------------------------------------------
def test_amp_computes_in_what_the_hardware_has(monkeypatch):
    for has, dtype in [({"avx512_f": True}, None), ({"avx512_bf16": True}, torch.bfloat16)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert machine.amp_dtype("cpu") == dtype
    for native, dtype in [(True, torch.bfloat16), (False, torch.float16)]:  # a T4 emulates bfloat16
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        assert machine.amp_dtype("cuda:1") == dtype


@pytest.mark.parametrize("scale, moves", [(2.0**12, True), (2.0**126, False), (1.0, None)])
def test_float16_skips_a_step_that_overflows_but_not_for_ever(scale, moves, monkeypatch):
    """In float32, which is a hundred times as fast on a CPU, but with the scaler of float16."""
    model, args = shaken("detr").train(), SimpleNamespace(device="cpu", amp=False, clip_norm=0.1)
    criterion, optimizer = train.SetCriterion(model), train.make_optimizer(model, 1e-3, 1e-3, 0)
    before = [p.clone() for p in model.parameters()]
    if moves is None:
        monkeypatch.setattr(train.SetCriterion, "weighted", lambda _, losses: losses["l1"].sum() * math.inf)
    diverges = pytest.raises(train.Diverged, match="gradient") if moves is None else contextlib.nullcontext()
    with diverges:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        logged = train.train_step(model, criterion, optimizer, [(*batch(), TARGETS)], args, scaler)
        assert math.isfinite(logged["grad_norm"]) == moves and math.isfinite(logged["total"])
        assert any(not p.equal(old) for p, old in zip(model.parameters(), before)) == moves
        assert scaler.get_scale() == (scale if moves else scale / 2)
