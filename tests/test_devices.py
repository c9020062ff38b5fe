"""Devices, most of which are not here: torch's answers are made up, what we make of them is not."""
import contextlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from support import UserError, check_device, data, devices, options, pictures, processes, report
from support.predict import Detector
from support.run import Run
from tests.test_readme import OWN_FILE
from tests.tiny_models import TARGETS, batch, shaken

MPS = ("The operator 'aten::grid_sampler_2d_backward' is not currently implemented for the MPS device. If "
       "you want this op to be added, ... set the environment variable `PYTORCH_ENABLE_MPS_FALLBACK=1`")


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=2) has two CUDA devices and a CPU."""
    def has(**found):
        monkeypatch.setattr(devices, "count", lambda kind: {"cpu": 1, **found}.get(kind, 0))
    return has


@pytest.fixture
def modules(monkeypatch):
    """modules(cuda=...) is what torch has for a kind of device."""
    def are(**found):
        monkeypatch.setattr(torch, "get_device_module", lambda kind: found[str(kind)])
    return are


# ---- Which device ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("found, wanted", [
    ({}, "cpu"), ({"xpu": 1}, "xpu"), ({"mps": 1, "xpu": 1}, "mps"), ({"cuda": 8, "mps": 1}, "cuda"),
    ({"hpu": 1}, "cpu")])
def test_auto_takes_the_first_that_is_there(found, wanted, machine):
    machine(**found)
    assert devices.choose("auto") == wanted


@pytest.mark.parametrize("name, sentence", [
    ("cuda:2", "sees 2 cuda devices; auto takes"), ("mps", "sees no mps device"), ("xpu:0", "sees no xpu"),
    ("meta", "sees no meta device"), ("tpu", "knows no such device; give auto, cpu, cuda"), ("", "no such"),
    ("cuda:x", "no such"), (0, "no such"), (None, "no such")])
def test_a_device_that_is_not_there_gets_a_sentence(name, sentence, machine):
    machine(cuda=2)
    assert devices.choose("cuda:1") == "cuda:1" and devices.choose("cuda") == "cuda"
    with pytest.raises(ValueError, match=sentence):
        devices.choose(name)


def test_torch_says_how_many_there_are(modules):
    assert devices.count("cpu") == 1
    assert devices.count("meta") == devices.count("fpga") == 0, "they hold no numbers"
    modules(cuda=SimpleNamespace(is_available=lambda: True, device_count=lambda: 3),
            mps=SimpleNamespace(is_available=lambda: False, device_count=lambda: 1))
    assert devices.count("cuda") == 3 and devices.count("mps") == 0


def test_processes_share_devices_and_use_what_connects_them(machine, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    machine(cuda=2, xpu=2, mps=1)
    found = [devices.share(name, 1) for name in ("cuda", "xpu", "cpu")]
    assert found == ["nccl", "xccl", "gloo"] and taken == [1, 1]
    for name, number, sentence in [("cuda:1", 1, "number out"), ("mps", 0, "without torchrun"),
                                   ("cuda", 2, "more processes than cuda devices, 2")]:
        with pytest.raises(ValueError, match=sentence):
            devices.share(name, number)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setattr(processes, "WORLD", 8)
    with pytest.raises(SystemExit, match="--device cuda: there are more processes"):
        processes.join("cuda")


def test_a_detector_goes_to_any_device_and_refuses_one_that_is_not_there(machine):
    detector = Detector(torch.nn.Linear(1, 1), [], {})
    machine()
    assert detector.to("auto").device == detector.to(torch.device("cpu")).device == "cpu"
    with pytest.raises(UserError, match="cuda:1: this torch sees no cuda device"):
        detector.to("cuda:1")


def test_images_are_loaded_by_copies_of_this_process_or_by_itself(monkeypatch):
    """A new Python (default on a Mac, Windows, Python 3.14) would import torch for every evaluation."""
    def context(workers):
        args = SimpleNamespace(workers=workers, device="cpu")
        return processes.make_loader([1], args).multiprocessing_context

    for elsewhere in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", elsewhere)
        assert processes.default_workers() == 0 and context(1) is None
    monkeypatch.setattr(sys, "platform", "linux")
    assert processes.default_workers() > 0 and context(0) is None
    assert context(1).get_start_method() == "fork"


def test_time_memory_and_transfers_ask_the_device(modules, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.append(str(device)))
    for name in ("cpu", "mps", "cuda:1"):
        devices.synchronize(name)
    assert waited == ["mps", "cuda:1"]
    assert devices.peak_memory("cpu") > 1e7
    modules(cuda=SimpleNamespace(max_memory_allocated=lambda device: 100 + device.index),
            mps=SimpleNamespace(driver_allocated_memory=lambda: 50))
    assert devices.peak_memory("cuda:1") == 101 and devices.peak_memory("mps") == 50
    assert all(devices.pins_memory(name) for name in ("cuda:1", "xpu"))
    assert not any(devices.pins_memory(name) for name in ("mps", "cpu"))


# ---- A run that goes on elsewhere --------------------------------------------------------------------------
def checkpoint_of(flags, path, **changes):
    """Enough of a checkpoint for a command line that goes on with it."""
    args = {**vars(options.parse("", flags).args), **changes}
    torch.save({"args": args, "model": {}, "model_options": {}, "class_names": [], "category_ids": [],
                "optimizer": {}, "step": 1, "best": 0, "seconds": 1, "window": []}, path)
    return args


def test_a_run_goes_on_where_it_is_now_unless_its_device_was_typed(machine, tmp_path, capsys):
    path = str(tmp_path / "last.pt")

    def device(*flags):
        return options.parse("", ["--resume", path, *flags]).args.device

    machine(cuda=1)
    assert checkpoint_of([], path)["device"] == "cuda"
    assert device() == "cuda"
    machine()
    assert device() == "cpu", "auto is what there is now"
    checkpoint_of(["--device", "cpu"], path)
    machine(mps=1)
    assert device() == "cpu" and device("--device", "mps") == "mps"
    args = checkpoint_of([], path)
    del args["asked_device"]  # a run from before
    content = torch.load(path, weights_only=True)
    torch.save({**content, "args": {**args, "device": "cuda"}}, path)
    assert device("--device", "auto") == "mps"
    with pytest.raises(SystemExit):
        device()
    assert "--device cuda: this torch sees no cuda device; auto takes" in capsys.readouterr().err


def test_amp_of_a_run_can_be_switched_off(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    path = str(tmp_path / "last.pt")
    checkpoint_of(["--device", "cpu", "--amp"], path)
    assert options.parse("", ["--resume", path]).args.amp is True
    assert options.parse("", ["--resume", path, "--no-amp"]).args.amp is False
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert options.parse("", ["--resume", path, "--no-amp"]).args.amp is False
    with pytest.raises(SystemExit):
        options.parse("", ["--resume", path])
    text = capsys.readouterr().err.splitlines()[-1]
    assert "--amp: in bfloat16 cpu would be slower than in float32 (it needs AVX512_BF16 or AMX)" in text
    assert "--no-amp" in text


# ---- An operator that is missing ---------------------------------------------------------------------------
def test_the_missing_operator_is_named():
    torchvision = "Could not run 'torchvision::roi_align' with arguments from the 'MPS' backend."
    assert devices.missing_operator(NotImplementedError(MPS)) == "aten::grid_sampler_2d_backward"
    assert devices.missing_operator(NotImplementedError(torchvision)) == "torchvision::roi_align"
    for error in (NotImplementedError(), NotImplementedError('Module [Mine] is missing "forward"'),
                  RuntimeError(MPS)):
        assert devices.missing_operator(error) is None


def trial(capsys, error, **how):
    """What a run says before it begins, if a training step fails with this error except on "cpu"."""
    args = SimpleNamespace(**{**dict(device="cpu:0", amp=False, accumulate=1, batch_size=2, preset="laptop",
                                     model="detr"), **how})
    model, where, moved = shaken("detr"), [], []
    model.to = lambda device: moved.append((model, device))

    def step(copy, parts):
        where.append(args.device)
        if args.device != "cpu":  # cpu:0 stands for a device that lacks something
            raise error
    images = data.load(size=48)["train"].subset(range(2))
    images.class_names = images.class_names[:3]  # as many as the model has
    _, queries = report.try_out(model, images, args, step, "detr.py")
    assert queries == 5 and where[0] == "cpu:0" and set(where[1:]) == {"cpu"} == {args.device}
    assert moved == [(model, "cpu")], "the trial was made with a copy; the model itself must move"
    return capsys.readouterr().out


def test_a_run_on_a_device_that_lacks_an_operator_moves_to_the_cpu(capsys, monkeypatch):
    said = trial(capsys, NotImplementedError(MPS))
    assert said.count("\n") == 1 and "PYTORCH_ENABLE_MPS_FALLBACK=1" in said
    assert "cpu:0 lacks the operator aten::grid_sampler_2d_backward, so detr runs on the CPU" in said
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(SystemExit, match="--amp: in bfloat16 cpu would be slower"):
        trial(capsys, NotImplementedError(MPS), amp=True)
    monkeypatch.setattr(processes, "WORLD", 2)  # the others would wait for it
    with pytest.raises(SystemExit, match="A training step fails; .*grid_sampler_2d_backward"):
        trial(capsys, NotImplementedError(MPS))


def test_the_optimiser_is_made_when_the_device_is_certain(monkeypatch, tmp_path):
    """Otherwise its memory would stay behind when the model moves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "announce", lambda *_: sys.exit("the trial is over"))
    monkeypatch.setattr(train, "make_optimizer", lambda *_: pytest.fail("too early"))
    (tmp_path / "mine.py").write_text(OWN_FILE)
    with pytest.raises(SystemExit, match="the trial is over"):
        train.main(["--model", "mine.py", "--size", "32", "--overfit", "1", "--device", "cpu"])


def test_errors_of_a_model_file_do_not_move_the_run(capsys):
    with pytest.raises(SystemExit, match="A training step fails; detr.py.*: NotImplementedError"):
        trial(capsys, NotImplementedError())
    with pytest.raises(SystemExit, match="Out of memory for parts of 2 images"):
        trial(capsys, RuntimeError("MPS backend out of memory (MPS allocated: 9 GB, max allowed: 9 GB)"))


def test_a_missing_operator_anywhere_else_gets_one_line():
    with pytest.raises(SystemExit, match="lacks the operator aten::grid_sampler_2d_backward. Give"):
        with report.one_line_errors():
            raise NotImplementedError(MPS)


# ---- --amp -------------------------------------------------------------------------------------------------
def card(native):
    return SimpleNamespace(device=lambda name: contextlib.nullcontext(),
                           is_bf16_supported=lambda including_emulation: native or including_emulation)


def test_amp_computes_in_what_the_hardware_has(modules, monkeypatch):
    found = []
    for has in ({"avx512_f": True}, {"avx512_bf16": True}, {"amx_bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        found.append(devices.amp_dtype("cpu"))
    assert found == [None, torch.bfloat16, torch.bfloat16]
    modules(cuda=card(native=True), xpu=card(native=False), hpu=SimpleNamespace())
    assert devices.amp_dtype("cuda:1") == torch.bfloat16
    assert devices.amp_dtype("xpu") is None and devices.amp_dtype("hpu") is None
    modules(cuda=card(native=False))
    assert devices.amp_dtype("cuda") == torch.float16, "a T4 emulates bfloat16"
    assert devices.why_no_amp("cuda") == ""
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major <= 13)
    assert devices.amp_dtype("mps") is None and "macOS 14" in devices.why_no_amp("mps")


def test_amp_on_a_cpu_uses_the_plain_attention():
    before = torch.backends.cuda.flash_sdp_enabled()
    with devices.autocast(SimpleNamespace(device="cpu", amp=True)):
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()
    with devices.autocast(SimpleNamespace(device="cpu", amp=False)):
        assert not torch.is_autocast_enabled("cpu")
        assert torch.backends.cuda.flash_sdp_enabled() == before
    assert torch.backends.cuda.flash_sdp_enabled() == before


@pytest.mark.parametrize("seconds, words", [((0.3, 0.2), "a step takes 0.3 s, 0.2 s without it"),
                                            ((0.2, 0.3), None), ((0.2, 0.199), None)])
def test_amp_that_is_slower_is_said(seconds, words, capsys):
    args = SimpleNamespace(amp=True)
    report.check_amp(lambda: seconds[0] if args.amp else seconds[1], args)
    wanted = f"WARNING  --amp is slower here: {words}\n" if words else ""
    assert args.amp is True and capsys.readouterr().out == wanted


# ---- float16, as on older CUDA cards -----------------------------------------------------------------------
@pytest.fixture
def halves(monkeypatch):
    """The CPU has float16 and no bfloat16, like an older card; halves(2.0) is a Scaler that begins at 2."""
    monkeypatch.setattr(devices, "amp_dtype", lambda name: torch.float16)

    def start_at(scale):
        class Scaler(devices.Scaler):
            def __init__(self, args=None):
                super().__init__(args)
                self._init_scale = scale
        return Scaler
    return start_at


def one_step(scaler, amp=True):
    """(what a step logs, the model after it, its weights before)"""
    model = shaken("detr").train()  # without convolutions, which are slow in float16 on a CPU
    before = {name: p.clone() for name, p in model.named_parameters()}
    args = SimpleNamespace(device="cpu", amp=amp, clip_norm=0.1)
    optimizer = train.make_optimizer(model, 1e-3, 1e-3, 0)
    parts = [(*batch(), TARGETS)]
    logged = train.train_step(model, train.SetCriterion(model), optimizer, parts, args, scaler(args))
    return logged, model, before


def test_a_step_in_float16_has_the_gradient_of_one_in_float32(halves):
    wanted, plain, _ = one_step(devices.Scaler, amp=False)
    found, model, before = one_step(halves(2.0**12))
    for name in ("total", "grad_norm"):
        assert found[name] == pytest.approx(wanted[name], rel=0.02), name
    assert found["total"] != wanted["total"], "autocast did nothing"
    used = [name for name, p in plain.named_parameters() if p.grad is not None]
    both = [torch.cat([m.get_parameter(name).grad.flatten() for name in used]) for m in (plain, model)]
    assert both[1].norm() == pytest.approx(0.1, rel=1e-3), "clipped before the scale is divided out"
    assert (both[0] - both[1]).norm() < 0.05 * both[0].norm()
    assert not [name for name in used if model.get_parameter(name).equal(before[name])], "no step was made"


def test_a_step_whose_gradient_overflows_is_skipped(halves):
    logged, model, before = one_step(halves(2.0**60))
    assert math.isfinite(logged["total"]) and not math.isfinite(logged["grad_norm"])
    assert all(p.equal(before[name]) for name, p in model.named_parameters()), "a step was made"


def test_a_gradient_that_is_not_finite_whatever_the_scale_is_divergence(halves, monkeypatch):
    monkeypatch.setattr(train.SetCriterion, "weighted", lambda self, losses: losses["l1"].sum() * math.inf)
    logged, _, _ = one_step(halves(2.0))
    assert not math.isfinite(logged["grad_norm"])
    with pytest.raises(train.Diverged, match="the gradient is not finite"):
        one_step(halves(1.0))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """runs(flags) trains a small model in an empty folder and returns the last checkpoint.

    In float32, which takes a hundredth of the time, but with the scaler of float16.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "autocast", lambda args: contextlib.nullcontext())
    for name in ("draw_predictions", "draw_curves"):
        monkeypatch.setattr(pictures, name, lambda *_: None)
    (tmp_path / "mine.py").write_text(OWN_FILE)
    new = ["--model", "mine.py", "--size", "32", "--overfit", "4", "--log-every", "2", "--eval-every", "99",
           "--device", "cpu"]

    def go(*flags, out):
        which = ["--resume", out] if Path(out).exists() else [*new, "--out", out]
        train.main([*which, "--workers", "0", *flags])
        return torch.load(f"{out}/last.pt", weights_only=True)
    return go


def test_a_run_with_a_scaler_resumes_exactly_and_skipped_steps_leave_a_clean_log(halves, runs, monkeypatch):
    """Steps are skipped before and after the interruption."""
    monkeypatch.setattr(devices, "Scaler", halves(2.0**126))
    monkeypatch.setattr(torch.amp.GradScaler, "get_growth_interval", lambda self: 3)  # the scale grows, too
    flags = ["--amp", "--steps", "12", "--schedule", "step", "--lr-drop", "9"]
    straight = runs(*flags, out="straight")
    with monkeypatch.context() as stopped_early, pytest.raises(SystemExit, match="Stopped at step 5 of 12"):
        stopped_early.setattr(Run, "goes_on", lambda run: run.step < 5)
        runs(*flags, out="stopped")
    middle = torch.load("stopped/last.pt", weights_only=True)["scaler"]
    stopped = runs(out="stopped")
    assert middle["scale"] < 2.0**126 and middle != straight["scaler"] == stopped["scaler"]
    for name, value in straight["model"].items():
        assert value.equal(stopped["model"][name]), f"{name} differs after resuming"
    log = [json.loads(line, parse_constant=pytest.fail) for line in open("straight/log.jsonl")]
    lines = [line for line in log if "total" in line]
    assert lines[0]["skipped"] == 1 and "grad_norm" not in lines[0] and lines[0]["total"] > 0
    assert math.isfinite(lines[-1]["grad_norm"])


def test_a_run_from_before_the_scaler_goes_on_with_amp(halves, runs, capsys):
    content = runs("--steps", "2", out="run")
    assert content.pop("scaler") == {}
    torch.save(content, "run/last.pt")
    content = runs("--steps", "3", "--amp", out="run")
    assert content["scaler"]["scale"] in (2.0**15, 2.0**16)
    assert "parameters, on cpu in float16\n" in capsys.readouterr().out
    for wrong in (3, {"scale": 4}, {**content["scaler"], "scale": "x"}):
        torch.save({**content, "scaler": wrong}, "run/last.pt")
        with pytest.raises(SystemExit, match="run/last.pt: cannot go on from its scaler; --no-amp goes on"):
            runs("--steps", "4", out="run")
    assert runs("--steps", "4", "--no-amp", out="run")["scaler"] == {}


# ---- The command for reports -------------------------------------------------------------------------------
def test_the_report_of_a_machine(tmp_path, capsys, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(OWN_FILE)
    check_device.main(["cpu", str(file)])
    head, line = capsys.readouterr().out.splitlines()
    assert head.startswith("cpu, --amp in ") and torch.__version__ in head
    assert "trains; boxes within 0e+00 of the CPU's, gradient within 0.0e+00" in line
    line = "features = self.backbone(images)"
    file.write_text(OWN_FILE.replace(line, f"raise NotImplementedError({MPS!r})\n        {line}"))
    check_device.main(["cpu", str(file)])
    assert "needs aten::grid_sampler_2d_backward" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="abacus: torch knows no such device"):
        check_device.main(["abacus"])
