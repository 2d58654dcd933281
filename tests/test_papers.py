"""What every script must hold, whichever its paper."""
import fnmatch
import importlib
import inspect
import itertools
import json
import re

import pytest

from replicate import records, report, trainer
from replicate.records import ROOT

PAPERS = sorted(path.stem for path in (ROOT / "papers").glob("*.yaml"))
SCALES = {"smoke", "demo", "small", "full", "paper"}
# the toy, and ImageNet only: as cheap at every scale, or never run
ALWAYS = {"moons_epochs", "linear_epochs"}
LENGTHS = {"gidaris_rotation": 575, "zhang_colorization": 775, "swav": 803, "dann_shallow": 540}
NOT_TWINS = {  # parts of every script, which each paper fills in its own way
    "Config", "pretrain", "reproduce", "figures", "options", "use", "rows", "main",
    "normalize", "initialize", "make_optimizer", "network", "classify"}


def load(paper):
    return importlib.import_module(f"papers.{paper}"), ROOT / "papers" / f"{paper}.yaml"


@pytest.mark.parametrize("paper", PAPERS)
def test_every_scale_resolves_to_a_config_and_known_rows(paper):
    script, path = load(paper)
    declared = records.read_declared(path)
    assert SCALES == set(declared["scales"])
    for scale in SCALES:
        config, block = trainer.read_settings(script.Config, declared, scale)
        assert config.seed == 0
        if scale in ("smoke", "small"):  # a default meant for a GPU would take hours
            assert {name for name in vars(config)
                    if name.endswith("_epochs")} <= set(block) | ALWAYS
        assert all(records.matching(declared["rows"], [glob]) for glob in block["rows"])


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("override,message", [
    ("batch_size=0", "batch_size must be above 0"), ("shards=0", "shards must be above 0"),
    ("precision=half", "bfloat16, float32"), ("momentum=1.5", "momentum must be below 1"),
    ("no_such_setting=1", "unknown setting"), ("seed=3", "unknown setting"),
])
def test_settings_that_no_run_can_have_are_named(paper, override, message):
    script, path = load(paper)
    if override.partition("=")[0] not in {*vars(script.Config(0)), "no_such_setting"}:
        pytest.skip("this paper has no such setting")
    with pytest.raises(records.InputError, match=message):
        trainer.read_settings(script.Config, path, "smoke", 0, [override])


@pytest.mark.parametrize("paper", PAPERS)
def test_every_part_of_a_rows_name_is_explained(paper):
    declared = records.read_declared(load(paper)[1])
    explained = {part for parts, _ in report.names_in(declared["rows"], declared) for part in parts}
    parts = {part for row in declared["rows"] for part in row.split("/")}
    assert parts == explained
    assert [glob for glob in declared["names"] if not fnmatch.filter(parts, glob)] == []


@pytest.mark.parametrize("paper", PAPERS)
def test_a_script_is_short_and_its_method_comes_first(paper):
    lines = (ROOT / "papers" / f"{paper}.py").read_text().splitlines()
    assert len(lines) <= LENGTHS.get(paper, 500)
    headings = {line: number for number, line in enumerate(lines, 1) if line.startswith("# ---- ")}
    assert headings["# ---- Evaluation ----"] <= 330
    order = [line[7:-5] for line in headings]
    assert order[0].startswith("The idea")
    assert order.index("Pre-training") == order.index("Evaluation") - 1
    for file in (ROOT / "papers" / f"{paper}.py", ROOT / "papers" / f"{paper}.yaml"):
        assert not [number for number, line in enumerate(file.read_text().splitlines(), 1)
                    if len(line) > 100]


RESULT = re.compile(r"Result, (\w+): (\S+) (\S+) \+- (\S+) against (\S+) (\S+) \(n = (\d+)\)"
                    r"(?:; paper[^:]*: (\S+?))?\.?$", re.M)


@pytest.mark.parametrize("paper", PAPERS)
def test_the_result_line_follows_from_the_records(paper):
    script, _ = load(paper)
    found = RESULT.search(re.sub(r"\n +", " ", script.__doc__))
    if not list((ROOT / "results").glob(f"*/{paper}.jsonl")):
        pytest.skip("nothing is recorded yet")
    scale, row, mean, sd, other, control, n, published = found.groups()
    rows = json.loads((ROOT / "results" / scale / "summary.json").read_text())[paper]["rows"]
    for shown, value in ((mean, rows[row]["mean"]), (sd, rows[row]["sd"]),
                         (control, rows[other]["mean"])):
        digits = len(shown.partition(".")[2])
        assert float(shown) == pytest.approx(value, abs=0.5001 * 10 ** -digits), shown
    assert (int(n), published and float(published)) == (rows[row]["n"], rows[row]["paper"])


def definitions(paper):
    """{name: its source} of the functions and classes at the top of a script."""
    script, _ = load(paper)
    own = {name: thing for name, thing in vars(script).items()
           if getattr(thing, "__module__", "") == script.__name__}
    return {name: inspect.getsource(thing) for name, thing in own.items()
            if inspect.isfunction(thing) or inspect.isclass(thing)}


def test_twins_have_one_body():
    """What two scripts call by one name is one thing, to the last character."""
    found = {paper: definitions(paper) for paper in PAPERS}
    differ = {(name, one, other) for one, other in itertools.combinations(PAPERS, 2)
              for name in (found[one].keys() & found[other].keys()) - NOT_TWINS
              if found[one][name] != found[other][name]}
    assert not differ


def test_a_seventh_script_needs_no_edit(seventh, tmp_path, folders, capsys):
    """README's recipe runs, is planned, rendered and resumed as it stands."""
    assert seventh.main(["--scale", "smoke", *folders]) == 0
    page = (tmp_path / "results" / "smoke" / "mirrored.md").read_text()
    for words in ("# Nobody (never): Is this picture mirrored?", "| 61.5? |", "| Table 1 |",
                  "| random/linear |", "`mirrored/linear > random/linear`",
                  "](mirrored_loss.svg)"):
        assert words in page
    assert seventh.main(["--scale", "smoke",
                         *folders]) == 0 and "nothing to do" in capsys.readouterr().out
