"""benchmarks/speed.py, growth.py, sampling.py and gpu.py: they run, with tiny models, and what they count."""
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.folders import coco_folder
from tests.tiny_models import tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import growth
import sampling
import speed

import train


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiny models of three classes, wherever a benchmark builds one."""
    monkeypatch.setattr(speed, "build", lambda name, size: tiny(name))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_all_forms_of_sampling_agree_also_in_their_gradients():
    size = [(5, 4), (2, 3)], 2, 3
    sampling.check(sampling.FORMS.values(), size)
    wrong = [sampling.all_levels_at_once, lambda *x: 1.01 * sampling.level_by_level(*x)]
    with pytest.raises(AssertionError):
        sampling.check(wrong, size)


def test_the_table_of_sampling_has_a_row_for_each_batch_and_form(capsys):
    sampling.compare([1, 2], ([(5, 4), (2, 3)], 2, 3), 1)
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1", "| 2"))]
    assert [(row[0], row[1]) for row in rows] == [(str(B), form) for B in (1, 2) for form in sampling.FORMS]
    assert rows[0][2:] == [cell for cell in rows[0][2:] if cell.endswith("(1.00)")], "not relative to row one"


@pytest.mark.parametrize("megapixels", [0.25, 0.5, 1, 2, 4])
def test_images_have_about_the_megapixels_asked_for(megapixels):
    height, width = growth.sides(megapixels)
    assert height % 32 == width % 32 == 0 and height * width / 1e6 == pytest.approx(megapixels, rel=0.05)


def test_an_exponent_is_that_of_the_last_three_sizes():
    points = [(0.25, 9.0, 9.0), *((x, 3 * x, 5 * x**2) for x in (1, 2, 4))]
    assert growth.exponent(points, 1) == pytest.approx(1) and growth.exponent(points, 2) == pytest.approx(2)
    assert math.isnan(growth.exponent(points[:1], 1))


def test_sizes_that_would_take_too_long_or_too_much_memory_are_left_out():
    assert growth.fits([(1, 7.0, 100.0)], 2, longest=15, memory=500)
    assert not growth.fits([(1, 8.0, 100.0)], 2, longest=15, memory=500)
    assert not growth.fits([(1, 7.0, 130.0)], 2, longest=15, memory=500), "attention grows with the square"
    assert len(growth.measure("detr", [0.01, 0.02], longest=1e-9, memory=1e9)) == 1


def test_growth_measures_every_method_and_draws(tmp_path, monkeypatch, capsys):
    assert {"detr", "hdetr"} <= set(speed.METHODS) and "conditional_detr_ablations" not in speed.METHODS
    path = tmp_path / "growth.png"
    monkeypatch.setattr(sys, "argv", ["growth.py", "--only", "detr", "hdetr", "--megapixels", "0.02", "0.01",
                                      "--figure", str(path)])
    growth.main()
    head, _, *rows = map(cells, capsys.readouterr().out.strip().splitlines()[2:])
    assert head[1:3] == ["96 x 128", "128 x 160"] and [row[0] for row in rows] == ["detr", "hdetr"]
    memory = [int(cell.split()[2]) for cell in rows[0][1:3]]
    assert 0 < memory[0] < memory[1] and path.stat().st_size > 10_000


def test_a_ratio_is_the_median_of_runs_with_its_spread(monkeypatch):
    times = iter([{"ours": 1, "theirs": 2}, {"ours": 1, "theirs": 1}, {"ours": 2, "theirs": 3}])
    monkeypatch.setattr(speed, "take_turns", lambda *_: next(times))
    assert speed.ratio(None, None, 5, runs=3) == "1.50 (1.00 to 2.00)"


def test_the_gpu_script_runs_in_tiny_sizes(tmp_path, monkeypatch, capsys):
    def run(command, **_):
        options = [f"--option={name}=1" for name in ("enc_layers", "dec_layers")]
        train.main([*command[2:], "--workers", "0", "--option=hidden_dim=32", *options])
        return SimpleNamespace(returncode=0)

    compiled = []  # the real thing takes ten seconds
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    monkeypatch.setattr(gpu.subprocess, "run", run)
    gpu.main(["--tiny", "--only", "detr", "--parts", "models", "data", "compiled",
              "--data", str(coco_folder(tmp_path / "data"))])
    lines = capsys.readouterr().out.splitlines()
    rows = [cells(line) for line in lines if line.startswith("| detr")]
    assert [row[2] for row in rows] == ["float32", "bfloat16", "float32, compiled", "bfloat16, compiled"]
    assert len(compiled) == 2 and all(row[3].endswith(" ms") and row[7].endswith(" MiB") for row in rows)
    assert [cells(line)[1:3] for line in lines if line.startswith("| --no-amp")] == [["never", "1"]]


def test_without_a_card_the_gpu_script_says_what_to_do(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    with pytest.raises(SystemExit, match="No CUDA card here. Give --tiny"):
        gpu.main([])


def test_what_fails_on_a_card_says_so_in_its_row(monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(gpu, "row", fail)
    gpu.models(["detr"], (1,), (64, 64), 1, {"float32": 1.0}, "paper", compiled=False)
    assert cells(capsys.readouterr().out.splitlines()[-1])[3] == "CUDA out of memory. Tried to allocate"
