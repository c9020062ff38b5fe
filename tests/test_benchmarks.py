"""benchmarks/: each file runs in a tiny setting, records or prints what it promises, and counts correctly."""
import json
import sys
import time
from functools import partial
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
    monkeypatch.setattr(stages, "RESULTS", tmp_path / "stages.json")
    stages.main(["runs/tiny-40-seed0", "--record"])
    row, = rows(capsys.readouterr().out)
    assert row[0] == "tiny-40-seed0" and row[1] == row[2] == f"{entry['evals'][-1]['AP']:.3f}"
    recorded = json.loads(stages.RESULTS.read_text())["tiny-40-seed0"]
    assert list(recorded.values())[:8] == row and recorded["date"]
    race.main(["--compare", "runs/tiny-40-seed0"])
    assert Path("compare.png").stat().st_size > 10_000


def test_draw_writes_tables_numbers_and_figures(monkeypatch, tmp_path, capsys):
    def entry(name, AP, minutes):
        evals = [{"step": 100 * k, "AP": AP * k / 10, "AP50": k / 10, "AP_small": 0.2} for k in range(1, 11)]
        return {"name": name, "flags": "", "batch": 8, "cpu_minutes": minutes, "evals": evals,
                "options": {"last_stage": 2, "num_feature_levels": 3}}

    entries = [entry("sqr", 0.5, 10), entry("sqr", 0.7, 10), entry("deformable_detr", 0.6, 5)]
    rows_of_stages = {run: {"run": run, "last layer": "0.5", "after NMS": "0.4", "oracle": "0.3"}
                      for run in ("sqr-1000-seed0", "sqr-dense-1000-seed0", "sqr-6-layers-1000-seed0")}
    for name, value in dict(read=lambda: dict(enumerate(entries)), DOCS=tmp_path,
                            STAGES=tmp_path / "stages.json").items():
        monkeypatch.setattr(race, name, value)
    race.STAGES.write_text(json.dumps(rows_of_stages))
    page = tmp_path / "results.md"
    page.write_text("`sqr` ?, `sqr`\n0.1, `detr` 0.3, `detr` 1 images. `sqr` >8 images, `file` 3\n" + "".join(
        f"<!-- race.py: {name} -->\nold\n<!-- end -->\n"
        for name in ("race_all", "denoising", "nms", "fading")))
    race.main(["--draw"])
    full, *_ = capsys.readouterr().out.strip().split("\n\n")
    one, two = rows(full.partition("\n")[2])
    assert one == ["deformable_detr", "1", "C3+2", "1000", "0.30", "4,000", "0.600", "1.000", "0.600"]
    assert two[:2] == ["sqr", "2"] and two[6] == "0.600±0.141" and two[8] == "0.300±0.071"
    assert (tmp_path / "race.png").stat().st_size > 10_000
    numbers, *tables = page.read_text().split("<!-- race.py: ")
    assert numbers == "`sqr` 0.600, `sqr`\n0.600, `detr` ?, `detr` ? images. `sqr` 4,000 images, `file` 3\n"
    assert rows(tables[0])[1] == ["sqr", "C3+2", "0.60", "4,000", "0.600±0.141", "0.300±0.071"]
    assert tables[1] == "denoising -->\nNot measured yet.\n<!-- end -->\n"
    assert rows(tables[2]) == [["sqr-1000-seed0", "0.5", "0.4"]]
    assert rows(tables[3]) == [[f"sqr-{run}-seed0", "0.5", "0.3"] for run in ("1000", "6-layers-1000")]
    assert race.updated(page.read_text()) == page.read_text()
    race.read = dict
    assert "0.6" not in race.updated(page.read_text()), "an empty race.json leaves no number"


def test_the_map_of_a_runner_follows_from_its_options():
    for options, text in [(dict(last_stage=2), "C3"), (dict(last_stage=3), "C4"), ({}, ""),
                          (dict(last_stage=2, num_feature_levels=3), "C3+2"),
                          (dict(last_stage=4, num_feature_levels=4), "C3,C4,C5+1"),
                          (dict(last_stage=4, num_feature_levels=1), "C5"),
                          (dict(last_stage=2, in_points=16), "C2,C3")]:
        assert race.map_of(options) == text


def test_every_name_of_a_group_is_a_runner_whose_options_its_model_has():
    assert {name for names in race.GROUPS.values() for name in names} <= set(race.RUNNERS)
    for name, control in race.CONTROLS.items():
        known = default_options(load_model_file(control["model"]))
        assert {option.split("=")[0] for option in control["options"]} <= set(known), name
    for name, (old, _) in race.EDITS.items():
        assert race.FILES[race.CONTROLS[name]["model"]].read_text().count(old) == 1, name
    steps = load_model_file("deformable_detr").LAPTOP["steps"]
    assert race.OTHERS["default run"] == f"--steps {steps}", "the default run has another length"


def test_both_ways_of_sampling_agree_and_a_wrong_one_is_found(monkeypatch):
    sizes = {"tiny": ([(5, 4), (2, 3)], 2, 3)}
    found = sampling.compare([1, 2], sizes, 1)
    assert list(found) == ["tiny, 1 image", "tiny, 2 images"]
    assert all(len(pair) == 2 and min(pair) > 0 for row in found.values() for pair in row.values())
    monkeypatch.setitem(sampling.FORMS, "ours, point by point", lambda *x: 1.01 * sampling.official(*x))
    with pytest.raises(AssertionError):
        sampling.compare([1], sizes, 1)


def test_speed_has_a_row_for_each_model_also_for_one_that_fails(monkeypatch, capsys):
    def fail(model, images):
        if model.training:
            raise torch.OutOfMemoryError("no memory\nleft")

    models = {"detr": tiny("detr"), "hdetr": tiny("hdetr")}
    models["hdetr"].register_forward_pre_hook(fail)
    monkeypatch.setattr(speed, "build", lambda name, size: models[name])
    speed.main(["--size", "64", "96", "--only", "detr", "hdetr", "--repeats", "1"])
    good, bad = rows(capsys.readouterr().out)
    assert good[0] == "detr" and all(float(cell.replace(",", "")) > 0 for cell in good[1:])
    assert bad[0] == "hdetr" and bad[3:] == ["no memory left", ""]


def test_memory_of_a_training_step_contains_the_gradients():
    model = tiny("detr")
    step = partial(speed.training_step, model, speed.SetCriterion(model), *speed.batch(1, 64, 96))
    memory = [speed.peak_memory(step) for _ in range(2)]
    assert memory[1] > sum(p.nbytes for p in model.parameters() if p.requires_grad) / 2**20
    assert memory[0] == pytest.approx(memory[1], rel=0.05)


def test_a_part_replaces_only_itself_in_speed_json_and_the_page_shows_ratios(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "speed.json")
    monkeypatch.setattr(speed, "PAGE", tmp_path / "speed.md")
    old, parts = "<!-- speed.py: {} -->\n\nold\n\n<!-- end -->", ("paper", "sampling", "machine", "data")
    speed.PAGE.write_text("\n\ntext\n\n".join(map(old.format, parts)))
    speed.report("paper", {"detr": {"inference, s": 9.0}}, True)
    speed.report("sampling", {"1 image": {"forward, s": [0.4, 0.50004]}}, True)
    speed.report("paper", {"detr": {"inference, s": 0.5, "memory, MiB": 1234.4},
                           "sqr": {"inference, s": 0.6, "memory, MiB": 9}}, True)
    speed.report("paper", {"sqr": {"inference, s": 9.0}}, False)
    assert speed.read()["sampling"]["rows"] == {"1 image": {"forward, s": [0.4, 0.5]}}
    assert speed.read()["paper"].keys() == {"command", "machine", "torch", "date", "commit", "rows"}
    page = speed.PAGE.read_text()
    assert rows(page)[:2] == [["detr", "1.00", "1,234"], ["sqr", "1.20", "9"]] and "(1 = 0.5 s)" in page
    assert "| 1 image | 1.25 |" in page and f"torch {torch.__version__.partition('+')[0]}" in page
    assert page.count("text") == 3 and page.count("old") == 0 and "Not measured yet." in page
    speed.main(["--draw"])
    assert speed.PAGE.read_text() == page


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
