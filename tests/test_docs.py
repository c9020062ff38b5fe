"""docs/: links, commands, flags and options that the pages name exist; numbers are those of the records."""
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from support.checkpoints import default_options, known_files, load_model_file
from support.options import LAPTOP, make_parser
from support.run import FILES
from visualize import make_parser as visualize_parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def load(name, folder=DOCS):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


relink = load("relink")
TEXT = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
METHODS = [name for name in known_files() if f"{name}.md" in TEXT]
PAGES = TEXT | {f"../{name}.md": (ROOT / f"{name}.md").read_text(encoding="utf-8")
                for name in ("README", "CONTRIBUTING")}
each_page = pytest.mark.parametrize("name", PAGES)


@each_page
def test_no_page_has_marks_of_a_merge(name):
    assert re.findall(r"^(?:<{7}|={7}$|>{7}).*", PAGES[name], re.M) == []


# ---- Links and commands ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TEXT)
def test_every_link_to_a_line_meets_the_code_that_it_names(name):
    new, problems = relink.relink(TEXT[name])
    assert not problems, f"docs/{name}: {problems[0]}"
    assert new == TEXT[name], f"docs/{name}: lines have moved; run python docs/relink.py"
    assert TEXT[name].count("#L") == len(relink.LINK.findall(TEXT[name])), "a link to a line lacks its piece"


def test_relink_follows_a_line_and_refuses_to_guess(tmp_path):
    (tmp_path / "a.py").write_text("import x\n\ny = 1\ny += 2\n")
    assert relink.relink("[a.py:1](a.py#L1) `y = 1`", tmp_path) == ("[a.py:3](a.py#L3) `y = 1`", [])
    for rest, words in [("a.py#L1) `y`", "lines [3, 4]"), ("a.py#L1) `z`", "lines []"),
                        ("a.py#L1)", "no `piece"), ("b.py#L1) `y`", "no such file")]:
        new, problems = relink.relink(f"[a.py:1]({rest}", tmp_path)
        assert new == f"[a.py:1]({rest}" and words in problems[0]


@each_page
def test_every_link_and_picture_leads_somewhere(name):
    for target in re.findall(r"\[[^\]]*\]\((?!https://)([^)]+)\)", re.sub("``.*?``", "", PAGES[name])):
        path, _, anchor = target.partition("#")
        file = (DOCS / name).parent / path if path else DOCS / name
        assert file.exists(), f"docs/{name} links {target}, which does not exist"
        if anchor and file.suffix == ".md":  # GitHub makes them of the headings
            headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"docs/{name} links {target}, but there is no such heading"


@each_page
def test_every_command_names_a_file_and_flags_that_exist(name):
    for script, rest in re.findall(r"python (?:-m )?(?!pytest|my_)([\w./]+)([^`\n|]*)", PAGES[name]):
        file = ROOT / (script if script.endswith(".py") else f"{script.replace('.', '/')}.py")
        assert file.exists(), f"docs/{name}: there is no {script}"
        known = file.read_text() + (ROOT / "support/options.py").read_text() * (script == "train.py")
        flags = [flag.replace("--no-amp", "--amp") for flag in re.findall(r"--[a-z][a-z-]+", rest)]
        unknown = [flag for flag in flags if f'"{flag}"' not in known and flag != "--help"]
        assert not unknown, f"docs/{name}: {script} has no {', '.join(unknown)}"


def test_every_picture_in_docs_is_shown_on_a_page():
    pages = "".join(TEXT.values()) + (ROOT / "README.md").read_text()
    assert [p.name for p in DOCS.iterdir() if p.suffix in (".png", ".jpg") and p.name not in pages] == []


def test_contributing_names_tests_that_exist():
    named = re.findall(r"`(test_\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert named and [name for name in named if not (ROOT / f"tests/{name}.py").exists()] == []


# ---- Options and numbers -----------------------------------------------------------------------------------
PROGRAMS = {"options.md": make_parser(""), "predict.md": visualize_parser()}


@pytest.mark.parametrize("page", PROGRAMS)
def test_a_page_explains_every_flag_of_its_program_and_no_other_one(page):
    flags = {flag for action in PROGRAMS[page]._actions for flag in action.option_strings}
    of_others = {"--nproc-per-node", "--help", "--no-images"}  # torchrun's and check_data's
    named = set(re.findall(r"--[a-z][a-z-]*", TEXT[page])) - of_others
    assert named == {flag for flag in flags if flag.startswith("--")} - {"--help"}


def test_options_md_explains_every_file_of_a_run():
    assert [file for file in FILES if f"`{file}`" not in TEXT["options.md"]] == []


def test_options_md_has_the_files_and_the_defaults_of_every_option():
    defaults = {name: default_options(load_model_file(name)) for name in known_files()}
    tables = TEXT["options.md"].partition("## Options of the models")[2]
    everywhere, _, some = tables.partition("| option | file |")
    claimed, rows = {}, re.findall(r"^\| (`.*?`) \| ()(.*) \|$", everywhere, re.M)
    for options, files, values in rows + re.findall(r"^\| (`.*?`) \| ([\w, ]+) \| (.*) \|$", some, re.M):
        names = set(re.findall(r"\w+", files)) & defaults.keys()
        names = names if files and not files.startswith("all except") else defaults.keys() - names
        for option in re.findall(r"`(\w+)`", options):
            claimed[option] = claimed.get(option, set()) | names
            for name in names - {"conditional_detr_ablations"}:  # a table of its own on its page
                value = defaults[name][option]
                default = f"{value:g}" if isinstance(value, float) else str(value).lower()
                found = re.search(rf"(?<![\w.]){default}(?!\w|\.\d)", values)
                assert found, f"docs/options.md: {option} of {name} is {default}"
    assert len(claimed) > 30
    for option, names in claimed.items():
        have = {name for name in defaults if option in defaults[name]}
        assert have == names, f"docs/options.md: {option} is in {', '.join(sorted(have))}"


@pytest.mark.parametrize("name", known_files())
def test_every_option_of_a_model_is_explained(name):
    pages = TEXT["options.md"] + TEXT.get(f"{name}.md", "")
    options = default_options(load_model_file(name))
    assert options and [option for option in options if f"`{option}" not in pages] == []


def test_the_tables_of_speed_md_are_those_in_speed_json():
    speed, page = load("speed", ROOT / "benchmarks"), TEXT["speed.md"]
    assert speed.drawn(page) == page, "run python benchmarks/speed.py --draw"
    shown = re.findall(r"<!-- speed.py: (.*) -->", page)
    assert sorted(shown) == sorted([*speed.read(), "machine"]) and "Not measured" not in page
    assert len({(entry["machine"], entry["torch"]) for entry in speed.read().values()}) == 1
    rest = re.sub(r"<!-- speed.py.*?<!-- end -->", "", page, flags=re.S)
    assert not re.findall(r"\d\.\d", rest), "a measured number outside of the tables"
    assert len(page.split()) <= 900


@pytest.mark.parametrize("name", METHODS)
def test_parameter_counts_are_those_of_the_official_code(name):
    counts = {value for path in (ROOT / "tests/golden").glob("params_*.json")
              for model in json.loads(path.read_text())["counts"].values()
              for key, value in model.items() if key.startswith("n_params")}
    ours = TEXT[f"{name}.md"].partition("## Parameters")[2].partition("\n## ")[0]
    ours = {int(number.replace(",", "")) for number in re.findall(r"\d+(?:,\d{3})+", ours)}
    assert ours and ours <= counts, f"docs/{name}.md: {ours - counts} are no official counts"


# ---- docs/results.md ---------------------------------------------------------------------------------------
RESULTS, race = TEXT["results.md"], load("race", ROOT / "benchmarks")


def test_the_results_are_those_of_the_records():
    assert RESULTS == race.updated(RESULTS), "run python benchmarks/race.py --draw"


def test_every_number_behind_the_name_of_a_runner_is_its_mean_ap():
    runs = json.loads((ROOT / "benchmarks/results/race.json").read_text()).values()
    pairs = re.findall(r"`([^`]+)`\s(\?|0\.\d+)(?! images)", RESULTS)
    assert len(pairs) > 20
    for name, AP in pairs:
        assert name in race.RUNNERS, name
        own = [run["evals"] for run in runs if run["name"] == name]
        longest = [evals[-1]["AP"] for evals in own if evals[-1]["step"] == max(e[-1]["step"] for e in own)]
        close = bool(longest) and AP != "?" and abs(float(AP) - sum(longest) / len(longest)) < 0.000501
        assert close or (AP == "?" and not longest), name


def test_a_claim_has_a_verdict_if_both_its_numbers_are_there():
    rows = re.findall(r"^\| (.* images|.*`.* [\d.?]+) \| (.*) \|$", RESULTS, re.M)
    assert len(rows) > 10
    for claim, verdict in rows:
        known = ["not measured yet"] if "?" in claim else ["yes", "partly", "no"]
        assert verdict.partition(", see")[0] in known, claim


def test_the_results_fit_their_budget_and_need_no_history():
    assert len(RESULTS.split()) <= 1600
    assert [line for line in RESULTS.splitlines() if len(line) > 120 and line[0] != "|"] == []
    runs = json.loads((ROOT / "benchmarks/results/race.json").read_text()).values()
    for key in ("commit", "machine"):
        assert len({run[key] for run in runs if run["name"] not in race.OTHERS}) <= 1, f"runs differ in {key}"
    assert not re.search(r"[§†‡]|\b(?=\w*\d)(?=\w*[a-f])[0-9a-f]{7}\b", RESULTS), "a mark or a commit"


def test_options_md_has_the_laptop_preset():
    rows = re.findall(r"^\| ([^|]+) \| (`.*) \|$", TEXT["options.md"].partition("### The laptop preset")[2]
                      .partition("\n#")[0], re.M)
    files = {name: getattr(load_model_file(name), "LAPTOP", {}) for name in known_files()}
    written = [dict(re.findall(r"`(\w+)=([^`]*)`", values)) for _, values in rows]
    assert written[0] == {name: str(value) for name, value in LAPTOP.items()}
    for name, own in files.items():
        found = [values for (names, _), values in zip(rows[1:], written[1:]) if name in names.split(", ")]
        assert {k: v for part in found for k, v in part.items()} == {k: str(v) for k, v in own.items()}, name
