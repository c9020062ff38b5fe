"""benchmarks/race.py: steps of equal time, what is run again, table and figure; nothing trains here."""
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import race


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Empty result files; the time of a step of deformable_detr is known, and of sqr."""
    for name in ("STEPS", "RESULTS"):
        monkeypatch.setattr(race, name, tmp_path / f"{name}.json")
    monkeypatch.setattr(race, "RUNS", tmp_path / "runs")
    race.write(race.STEPS, "deformable_detr", [0.25, 3.0])
    race.write(race.STEPS, "sqr", [0.5, 3.0])


def result(name, seed, minutes=10, top=0.6, batch=8):
    flags = race.flags_of(name, minutes)
    steps = int(flags[flags.index("--steps") + 1])
    evals = [{"step": steps * k // 10, "AP": top * k / 10, "AP50": k / 10, "AP75": 0.1, "AP_small": 0.2}
             for k in range(1, 11)]
    return {"name": name, "seed": seed, "flags": shlex.join(flags), "batch": batch, "cpu_minutes": minutes,
            "evals": evals}


def test_steps_and_evaluations_fill_the_minutes(results):
    for name, step in (("deformable_detr", 0.25), ("sqr", 0.5)):
        steps = int(race.flags_of(name, 10)[-1])
        assert steps % race.EVALUATIONS == 0
        assert abs(race.EVALUATIONS * 3 + steps * step - 600) <= race.EVALUATIONS * step
    assert race.flags_of("detr 3600 steps", 10)[-1] == "3600", "a length that is given stays"


def test_runners_take_turns_and_the_least_of_all_rounds_counts(monkeypatch, results):
    clock, order = iter([0.9, 0.8, *range(99)]), []

    class Trained(SimpleNamespace):
        def step(self):
            order.append(self.flags[1])

        def evaluate(self):
            pass

    monkeypatch.setattr(race, "Trained", lambda flags: Trained(flags=flags))
    monkeypatch.setattr(race, "cpu_seconds", lambda function: function() or next(clock))
    race.measure(["detr", "conditional_detr"], rounds=2)
    assert order == ["detr", "conditional_detr"] * 4
    # the first two rounds are 0.9, 0.8 and 0, 1; then 2, 3 and 4, 5; evaluations 6, 7 and 8, 9
    assert race.read(race.STEPS)["detr"] == [2, 6] and race.read(race.STEPS)["conditional_detr"] == [3, 8]


def test_a_runner_is_measured_by_its_own_steps():
    trained = race.Trained([*race.RUNNERS["detr"], "--batch-size", "2", "--size", "64"])
    before = trained.model.class_head.weight.detach().clone()
    assert race.cpu_seconds(trained.step) > 0
    assert (trained.model.class_head.weight != before).any()


def test_what_is_there_in_the_same_length_is_not_run_again(monkeypatch, results):
    ran = []
    monkeypatch.setattr(race, "run", lambda *job: ran.append(job) or result(*job))
    monkeypatch.setattr(race, "measure", lambda names: [race.write(race.STEPS, n, [0.1, 3.0]) for n in names])
    for _ in range(2):
        race.race(["sqr", "detr"], [0, 1], 2, 10)
    assert sorted(ran) == [("detr", 0, 10), ("detr", 1, 10), ("sqr", 0, 10), ("sqr", 1, 10)]
    race.race(["sqr"], [1], 1, 5)
    assert ran[4:] == [("sqr", 1, 5)], "another number of minutes is another race"


def test_table_and_figure_of_a_group(monkeypatch, results, tmp_path, capsys):
    for seed, top in ((0, 0.5), (1, 0.7)):
        race.write(race.RESULTS, f"sqr, seed {seed}", result("sqr", seed, top=top))
    race.write(race.RESULTS, "deformable_detr, seed 0", result("deformable_detr", 0))
    monkeypatch.setattr(sys, "argv", ["race.py", "--table", "--group", "supervision", "--figure",
                                      str(tmp_path / "figure.png")])
    race.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["deformable_detr", "sqr"]
    steps = race.flags_of("sqr", 10)[-1]
    assert f"| sqr | 2 | 8 | {steps} | 10.0 | 0.600 ± 0.141 | 1.000 ± 0.000 |" in rows[1]
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_every_runner_of_a_group_exists_and_looks_like_no_other_one():
    for names in race.GROUPS.values():
        assert len(names) > 2 and set(names) <= set(race.RUNNERS)
        looks = [repr(race.style(name)) for name in names]
        assert len(set(looks)) == len(looks), list(zip(names, looks))


def test_the_pages_show_the_numbers_in_race_json(capsys):
    readme, results = (Path(race.ROOT, page).read_text(encoding="utf-8")
                       for page in ("README.md", "docs/results.md"))
    for name in race.MAIN:
        ap = race.spread([entry["evals"][-1]["AP"] for entry in race.entries_of(name)])
        assert re.search(rf"^\| \[{name}\].* \| {ap} \|$", readme, re.M), f"README: {name} should have {ap}"
    race.table(race.GROUPS["race_all"])
    rows = [row.rpartition("| ")[0] for row in capsys.readouterr().out.splitlines()[2:]]  # no last cell
    assert rows and [row for row in rows if row not in results] == []


def test_labels_do_not_overlap_and_stay_inside():
    assert race.spaced([0.1, 0.5, 0.5], 0.1) == pytest.approx([0.1, 0.5, 0.6])
    assert race.spaced([0.9, 0.95, 0.97], 0.1) == pytest.approx([0.79, 0.89, 0.99])
