"""benchmarks/compare.py: curves of several runs in one figure."""
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import compare


def write_run(folder, *aps):
    folder.mkdir(parents=True)
    lines = [{"step": 10, "seconds": 60, "total": 3.0}]
    lines += [{"step": 10 * k, "seconds": 60 * k, "eval": {"AP": ap, "AP50": ap}}
              for k, ap in enumerate(aps, 1)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\nno line of ours\n{"step": 9')
    return str(folder)


def test_a_curve_is_named_after_its_folder(tmp_path, capsys):
    runs = [write_run(tmp_path / name, 0.1, 0.5) for name in ("a/detr", "b/detr", "b/$x{$")]
    compare.main(str(tmp_path / "curves.png"), *runs)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a/detr", "b/detr", "$x{$"]
    assert all("20 steps    2.0 min  AP 0.500  AP50 0.500" in line for line in lines)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_curve_starts_at_zero_and_leaves_foreign_lines_out(tmp_path):
    run = write_run(tmp_path / "detr", 0.25)
    assert [(step, minutes, one["AP"]) for step, minutes, one in compare.evaluations(Path(run))] == [
        (0, 0, 0), (10, 1, 0.25)]


def test_mistakes_end_in_one_line(tmp_path):
    good, empty = write_run(tmp_path / "good", 0.1), write_run(tmp_path / "empty")
    for path, run, message in [("x.png", tmp_path / "gone", "gone: not the folder of a run"),
                               ("x.png", empty, "empty: no evaluation in log.jsonl yet"),
                               (tmp_path / "nowhere/x.png", good, "nowhere/x.png: "),
                               (tmp_path / "x.abc", good, "x.abc: ")]:
        with pytest.raises(SystemExit, match=message) as error:
            compare.main(str(path), str(run))
        assert "\n" not in str(error.value)
