"""benchmarks/: each file runs in a tiny setting, records or prints what it promises, and counts correctly."""
import sys
import time
from pathlib import Path

import pytest
import torch

from support.checkpoints import default_options, load_model_file
from tests import command
from tests.tiny_models import tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import race
import sampling
import speed
import stages


def rows(text):
    """The cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_stopped_run_is_resumed_then_recorded_and_trained_no_more(tmp_path, monkeypatch, capsys):
    launched = []

    def launch(flags, output):
        new = [] if "--resume" in flags else [*command.QUICK, "--overfit", "2", "--batch-size", "2"]

        def stop_a_new_run(process):
            while new and process.is_alive():
                time.sleep(0.05)
                if list(tmp_path.glob("runs/*/last.pt")):
                    process.terminate()

        launched.append(flags[0])
        done = command.run(*flags, *new, "--device", "cpu", cwd=tmp_path, meanwhile=stop_a_new_run)
        return None if done.returncode else 6.0

    monkeypatch.chdir(tmp_path)
    tiny = {"tiny": race.runner("detr", "nheads=4", times=2)}
    for name, value in dict(RUNNERS=tiny, RUNS=tmp_path / "runs", RESULTS=tmp_path / "race.json",
                            EVALUATIONS=2, launch=launch).items():
        monkeypatch.setattr(race, name, value)
    for _ in range(3):
        race.race(["tiny"], [0], 20, 1)
    assert launched == ["--model", "--resume"]
    entry, = race.read().values()
    assert entry["flags"] == "--model detr --batch-size 8 --schedule cosine --steps 40 --option nheads=4"
    assert [line["step"] for line in entry["evals"]] == [20, 40] and entry["cpu_minutes"] >= 0.1
    stages.main(["runs/tiny-40-seed0"])
    row, = rows(capsys.readouterr().out)
    assert row[0] == "tiny-40-seed0" and len(row[1].split(", ")) == len(row[2].split(", ")) == 1
    race.main(["--compare", "runs/tiny-40-seed0"])
    assert Path("compare.png").stat().st_size > 10_000


def test_table_and_figure_of_a_group(monkeypatch, tmp_path, capsys):
    def entry(name, AP, minutes):
        evals = [{"step": 100 * k, "AP": AP * k / 10, "AP50": k / 10, "AP_small": 0.2} for k in range(1, 11)]
        return {"name": name, "flags": "", "batch": 8, "cpu_minutes": minutes, "evals": evals}

    entries = [entry("sqr", 0.5, 10), entry("sqr", 0.7, 10), entry("deformable_detr", 0.6, 5)]
    monkeypatch.setattr(race, "read", lambda: dict(enumerate(entries)))
    monkeypatch.setattr(race, "DOCS", tmp_path)
    race.main(["--draw", "--groups", "race"])
    one, two = rows(capsys.readouterr().out)
    assert one[2:] == ["1000", "0.300", "5.0", "0.600", "1.000", "0.200", "4000", "0.600"]
    assert two[:2] == ["sqr", "2"] and two[5] == "0.600 ± 0.141" and two[9] == "0.300 ± 0.071"
    assert (tmp_path / "race.png").stat().st_size > 10_000


def test_every_name_of_a_group_is_a_runner_whose_options_its_model_has():
    assert {name for names in race.GROUPS.values() for name in names} <= set(race.RUNNERS)
    for name, control in race.CONTROLS.items():
        known = default_options(load_model_file(control["model"]))
        assert {option.split("=")[0] for option in control["options"]} <= set(known), name


def test_both_ways_of_sampling_agree_and_a_wrong_one_is_found(monkeypatch, capsys):
    size = [(5, 4), (2, 3)], 2, 3
    sampling.compare([1, 2], size, 1)
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["1", "1", "2", "2"]
    monkeypatch.setitem(sampling.FORMS, "ours, point by point", lambda *x: 1.01 * sampling.official(*x))
    with pytest.raises(AssertionError):
        sampling.compare([1], size, 1)


def test_speed_has_a_row_for_each_model_also_for_one_that_fails(monkeypatch, tmp_path, capsys):
    def fail(model, images):
        if model.training:
            raise torch.OutOfMemoryError("no memory\nleft")

    models = {"detr": tiny("detr"), "hdetr": tiny("hdetr")}
    models["hdetr"].register_forward_pre_hook(fail)
    monkeypatch.setattr(speed, "build", lambda name, size: models[name])
    speed.main(["--size", "64", "96", "--only", "detr", "hdetr", "--repeats", "1"])
    good, bad = rows(capsys.readouterr().out)
    assert good[:2] == ["detr", "float32"] and good[4].endswith(" s") and float(good[6].split()[0]) > 0
    assert bad[0] == "hdetr" and bad[5:] == ["no memory left", ""]
    speed.growth(["detr"], [0.02, 0.01], tmp_path / "growth.png")
    assert rows(capsys.readouterr().out)[0][:2] == ["detr", "0.02 M"] and (tmp_path / "growth.png").exists()


def test_stages_counts_fading_exacerbation_duplicates_and_what_an_oracle_knows():
    def image(scores, ious):
        """Predictions from tables [S][Q] of scores, and of IoUs with the one object."""
        boxes = {0.0: [200, 200, 210, 210], 0.6: [20, 10, 60, 50], 1.0: [10, 10, 50, 50]}
        xyxy = torch.tensor([[boxes[iou] for iou in row] for row in ious]).float()
        labels, truth = torch.zeros(xyxy.shape[:2], dtype=torch.int64), torch.tensor([[10.0, 10, 50, 50]])
        return stages.Stages(1, torch.tensor(scores), labels, xyxy, labels[0, :1], truth)

    faded = image([[0.9, 0.1], [0.5, 0.4]], [[1.0, 0.0], [0.6, 0.0]])  # TP fades, FP gets worse
    fine = image([[0.2, 0.6], [0.5, 0.3]], [[0.6, 0.0], [1.0, 0.0]])  # both get better
    other_query = image([[0.9, 0.1], [0.1, 0.5]], [[1.0, 0.0], [0.0, 0.6]])
    assert stages.rates([faded, fine]) == (0.5, 0.5) and stages.rates([other_query])[0] == 0
    assert stages.oracle(faded)["scores"].tolist() == pytest.approx([0.9, 0.1])
    twice = image([[0.5, 0.9]], [[1.0, 1.0]])
    assert twice.match()[0].tolist() == [[-1, 0]], "two predictions share an object"
    assert stages.after_nms(twice, 0)["scores"].tolist() == pytest.approx([0.9])
