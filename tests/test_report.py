"""The report on a tiny made-up paper: statistics, tables, curves, marks."""
import json
import shutil
import subprocess
import sys
import xml.dom.minidom

import pytest

from replicate import neutral, records
from replicate.charts import round_ticks
from replicate.records import ROOT, InputError
from replicate.report import (BLOCK, check_tables, compare, judge, main, names_in, render,
                              seconds_of, student_t_quantile, summarize_row, write_tables)

DECLARED = """
title: "Demo 2020: a paper that never was."
scales: {small: }
rows:
  ours/deep: {paper: 90.5, where: Table 1}
  ours/flat: {paper: 80, where: Table 1, unconfirmed: true}
  random: {where: Sec. 4}
claims:
  deeper: {test: "ours/deep > ours/flat + 2", text: Depth helps., where: Sec. 4.1}
  worse: {test: "random < ours/flat + 5", text: Random is | not far above., where: Sec. 4.2}
curves:
  depth: {title: Depth & accuracy, x: depth, y: accuracy (%),
          lines: {ours: [[10, ours/deep], [2, ours/flat]]}}
"""


@pytest.fixture
def project(tmp_path):
    """A folder with papers/demo.py, its YAML and an empty results/small/."""
    for folder in ("papers", "results/small"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "papers/demo.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "papers/demo.yaml").write_text(DECLARED)
    return tmp_path


def make_record(project, row, seed, value, **changes):
    config = {"dataset": "cifar10", "seed": seed, **changes.pop("config", {})}
    return {"paper": "demo", "row": row, "metric": "accuracy", "value": value, "seed": seed,
            "steps": 10, "selection": "last",
            "scale": "small", "config": config, "config_hash": f"{row}-{sorted(config.items())}",
            "code": records.code_hash(project / "papers/demo.py"), "commit": None, "dirty": False,
            "data": {"cifar10": "abcdef" * 10},
            "torch": "2.3", "torchvision": "0.18", "device": "cpu", "threads": 2, "ranks": 1,
            "deterministic": True,
            "seconds": 12.6, "peak_memory_mb": 100.0, "started": "2024-01-01T00:00:00Z",
            "status": "ok", **changes}


def add(project, *arguments, suite="small", **changes):
    (project / f"results/{suite}").mkdir(exist_ok=True)
    records.append(project / f"results/{suite}/demo.jsonl",
                   make_record(project, *arguments, **{"scale": suite.split("-")[0], **changes}))


def page(project, suite="small"):
    return render(project / "results", project / "papers")[project / f"results/{suite}/demo.md"]


def cells(text, row):
    """The cells of the first table line that begins with `row`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def notes(text, row):
    """What the last column says of a row after where the paper has it."""
    return cells(text, row)[-1].partition("; ")[2]


@pytest.mark.parametrize("degrees, quantile", [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764),
                                               (30, 2.0423), (1000, 1.9623)])
def test_student_t_quantiles_are_those_of_the_tables(degrees, quantile):
    assert student_t_quantile(degrees) == pytest.approx(quantile, abs=6e-5)


@pytest.mark.parametrize("effects, margin, verdict", [
    ([10, 10, 10], 5, "reproduced"), ([10, 10, 10], 15, "contradicted"),
    ([10, 10, 10], 10, "open"),  # zero width, exactly on the margin: passes neither way
    ([10, -11, 13], 0, "open"), ([-10, -10, -10], 0, "contradicted"),
    ([-2, -2, -2], -5, "reproduced"),  # within 5 points
    ([-10, -10, -10], -5, "contradicted"), ([10, 10], 5, "open"), ([10], 5, "open"),
    ([], 5, "open"),
])
def test_verdicts(effects, margin, verdict):
    assert judge(effects, margin)["verdict"] == verdict


def test_the_interval_of_a_claim():
    claim = judge([1.0, 2.0, 3.0], 0)
    assert (claim["n"], claim["mean"]) == (3, 2.0)
    # sd 1, n 3
    assert claim["high"] - claim["mean"] == pytest.approx(4.302653 / 3 ** 0.5, abs=1e-4)
    assert claim["low"] == pytest.approx(2 * claim["mean"] - claim["high"])


def test_a_page_says_what_was_found_then_the_numbers_then_how_they_were_made(project):
    add(project, "ours/deep", 0, 88.25)
    add(project, "ours/flat", 0, 79.0)
    text = page(project)
    assert text.startswith("# Demo 2020: a paper that never was.\n")
    order = ["## Claims", "## Figures", "## Numbers", "## Every seed", "## How it was made"]
    assert [line for line in text.splitlines() if line.startswith("## ")] == order
    assert cells(text, "ours/deep") == ["ours/deep", "90.5", "88.25 (1)", "Table 1"]
    assert cells(text, "ours/flat")[1:] == ["80?", "79.00 (1)", "Table 1"]
    assert cells(text, "random")[1:] == ["–", "not run", "Sec. 4"]
    for words in ("1 seed (0), always the last iterate", "cifar10 `abcdefabcdef`", "cpu, 2 threads",
                  "`./run_all.sh small demo`", "not checked against the paper"):
        assert words in text
    assert "not comparable" not in text and "†" not in text


def test_a_page_has_the_rows_of_its_scale_and_what_is_recorded_beside(project):
    path = project / "papers/demo.yaml"
    path.write_text(path.read_text().replace("scales: {small: }",
                                             "scales: {small: {rows: [ours/*]}, full: }"))
    add(project, "ours/deep", 0, 88.25)
    assert "| ours/flat |" in page(project) and "| random |" not in page(project)
    assert "of the paper's 1 claim judged here" in page(project).lower()
    assert "1 more needs another scale" in page(project)
    add(project, "random", 0, 9.0)
    assert cells(page(project), "random")[2] == "9.00 (1)"


def test_a_gpu_has_no_threads_to_tell(project):
    add(project, "ours/deep", 0, 88.25, threads=None, device="GPU X")
    assert "- Hardware: GPU X\n" in page(project)


def test_failures_of_an_older_configuration_are_forgotten(project):
    add(project, "ours/deep", 1, None, status="failed", error="out of memory",
        config={"dataset": "cifar10", "width": 9},
        config_hash="f" * 16)
    add(project, "ours/deep", 0, 88.25)
    assert "failed" not in notes(page(project), "ours/deep")


def test_orphans_in_a_folder_without_records_are_found(project):
    write_tables(project / "results", project / "papers")
    (project / "results/full").mkdir(exist_ok=True)
    (project / "results/full/demo.md").write_text("typed by hand")
    assert any("full/demo.md" in line for line in check_tables(project / "results",
                                                               project / "papers"))


def test_the_difference_from_the_paper_stands_where_values_are_comparable_and_only_there(project):
    for suite in ("full", "full-embedded"):
        (project / f"results/{suite}").mkdir()
        add(project, "ours/deep", 0, 90.5, suite=suite)
    assert cells(page(project, "full"), "ours/deep")[3] == "+0.00"
    assert "difference |" in page(project, "full")
    assert "difference |" not in page(project, "full-embedded")


def test_reruns_and_failures_are_counted(project):
    add(project, "ours/deep", 0, 10.0)
    add(project, "ours/deep", 0, 20.0)  # run again: the last counts
    add(project, "ours/deep", 1, None, status="failed", error="loss is not finite\nat step 3")
    add(project, "ours/deep", 2, None, status="failed", error="out of memory")
    add(project, "ours/deep", 2, 22.0)  # the failure was overcome
    add(project, "random", 0, None, status="failed", error="out of memory")
    text = page(project)
    assert cells(text, "ours/deep")[2] == "21.00 ± 1.41 (2)"
    assert notes(text, "ours/deep") == "1 re-run; 1 failed (loss is not finite)"
    assert cells(text, "random")[2] == "failed"
    assert "| ours/deep | 20.00 | failed | 22.00 |" in text


def test_a_failure_after_a_success_is_shown(project):
    add(project, "random", 0, 10.0)
    add(project, "random", 0, None, status="failed", error="out of memory")
    assert cells(page(project), "random")[2:] == ["10.00 (1)", "Sec. 4; 1 failed (out of memory)"]


def test_only_one_configuration_is_pooled(project):
    add(project, "random", 0, 10.0, config={"rate": 0.1})
    add(project, "random", 1, 11.0, config={"rate": 0.2})
    add(project, "random", 2, 12.0, config={"rate": 0.2})
    assert cells(page(project), "random")[2] == "11.50 ± 0.71 (2)"
    assert notes(page(project), "random") == "configs differ: 1 record of another config left out"


def test_notes_on_data_code_and_kernels(project):
    add(project, "random", 0, 10.0, dirty=True)
    add(project, "random", 1, 11.0, data={"cifar10": "other"}, deterministic=False)
    assert notes(page(project), "random") == "1 record of other data left out; not deterministic"
    for seed in range(3):  # and a claim compares rows of the same data
        add(project, "ours/deep", seed, 90.0 + seed)
        add(project, "ours/flat", seed, 80.0 + seed, data={"cifar10": "other"})
    assert "| reproduced |" not in page(project)


def test_claims_in_the_page_and_for_programs(project):
    for seed in range(3):
        add(project, "ours/deep", seed, 90.0 + seed)
        add(project, "ours/flat", seed, 80.0 + seed)
        add(project, "random", seed, 82.0 + seed)
    text = page(project)
    for line in ("| Depth helps. | reproduced | +10.00 [+10.00, +10.00] (3) | Sec. 4.1 |",
                 "| Random is \\| not far above. | reproduced | -2.00 [-2.00, -2.00] (3) | Sec.",
                 "| Depth helps. | `ours/deep > ours/flat + 2`", "**2 reproduced, 0 contradicted"):
        assert line in text
    files = render(project / "results", project / "papers")
    summary = json.loads(files[project / "results/small/summary.json"])["demo"]
    assert summary["rows"]["ours/deep"] == {"paper": 90.5, "where": "Table 1", "confirmed": True,
                                            "mean": 91.0, "sd": 1.0, "n": 3,
                                            "stale": False,
                                            "values": {"0": 90.0, "1": 91.0, "2": 92.0}}
    assert {"id": "deeper", "verdict": "reproduced", "mean": 10.0, "low": 10.0, "high": 10.0,
            "n": 3, "margin": 2,
            "statement": "Depth helps."}.items() <= summary["claims"][0].items()
    assert ("| [Demo 2020](small/demo.md) | 2 / 0 / 0 | – | ours/deep 91.0 ± 1.0; ours/flat "
            "81.0 ± 1.0; random 83.0 ± 1.0 |") in files[project / "results/README.md"]


def test_a_claim_may_compare_differences_wait_for_a_scale_or_be_ours(project):
    path = project / "papers/demo.yaml"
    path.write_text(path.read_text().replace("curves:", """  more:
    {test: "ours/deep - random > ours/flat - random + 2", text: Falls more., where: ours}
  late: {test: ours/deep > random, text: After full training., where: x, scales: [full]}
headline: [ours/deep, random]
curves:""").replace("{small: }", "{small: , full: }"))
    for seed in range(3):
        add(project, "ours/deep", seed, 90.0 + seed)
        add(project, "ours/flat", seed, 80.0 + seed)
        add(project, "random", seed, 82.0 - seed)
    text = page(project)
    papers, ours = text.split("Ours, which the paper does not make:")
    assert "| Falls more. | reproduced | +10.00 [+10.00, +10.00] (3) | ours |" in ours
    assert "Falls more." not in papers and "After full training. (another scale)" in ours
    assert "2 reproduced, 0 contradicted, 0 open**; of 1 of ours 1, 0, 0; 1 more needs" in text
    index = render(project / "results", project / "papers")[project / "results/README.md"]
    assert "| 2 / 0 / 0 | 1 / 0 / 0 | ours/deep 91.0 ± 1.0; random 81.0 ± 1.0 |" in index


def test_yours_stand_beside_the_reference_and_say_whether_they_lie_in_its_spread(project):
    for seed in range(3):
        add(project, "ours/deep", seed, 90.0 + seed)
        add(project, "ours/flat", seed, 80.0 + seed)
        add(project, "random", seed, 82.0 + seed)
    for row, value, changes in (("ours/deep", 93.0, {}), ("ours/flat", 99.0, {}),
                                ("random", 83.0, {"data": {"cifar10": "others"}})):
        records.append(project / "out/small/demo.jsonl",
                       make_record(project, row, 0, value, **changes))
    files = render(project / "out", project / "papers")
    text = files[project / "out/small/demo.md"]
    assert "| row | paper | reference | yours | in its spread? | remarks |" in text
    assert cells(text, "ours/deep")[2:5] == ["91.00 ± 1.00 (3)", "93.00 (1)", "yes"]
    assert cells(text, "ours/flat")[4] == "no" and cells(text, "random")[4] == "other data"
    assert "| Depth helps. | open | reproduced | -6.00 (1) | Sec. 4.1 |" in text
    assert "| reference |" not in page(project)  # nor does the reference have one


def test_a_mean_over_more_seeds_has_to_lie_closer():
    def row(*values):
        pooled = [{"row": "a", "seed": seed, "value": value, "status": "ok"}
                  for seed, value in enumerate(values)]
        return summarize_row(pooled, lambda record: False)
    reference = row(90.0, 91.0, 92.0)  # t(2) = 4.303 times sqrt(1/3 + 1/n)
    assert compare(row(95.9), reference) == "inside" and compare(row(96.1), reference) == "outside"
    assert compare(row(94.4, 94.4, 94.4), reference) == "inside"
    assert compare(row(94.6, 94.6, 94.6), reference) == "outside"
    assert compare(row(91.0), row(90.0)) == "" and compare(row(), reference) == ""
    assert compare(row(90.0), reference) == compare(reference, reference) == "equal"
    assert compare(row(90.0, 91.0, 92.1), reference) == "inside"


def test_the_papers_own_names_come_first_and_parts_that_mean_the_same_stand_together():
    declared = {"names": {"random*": "drawn", "deep": "many layers"}}
    assert names_in(["deep/linear", "random", "random2/linear", "x"], declared) == [
        (["deep"], "many layers"), (["linear"], "logistic regression on the frozen features"),
        (["random", "random2"], "drawn")]


def test_records_of_another_scale_are_left_out(project, capsys):
    add(project, "random", 0, 10.0)
    add(project, "random", 1, 99.0, scale="full")  # copied from another folder
    assert "| random | – | 10.00 (1) |" in page(project)
    warning = "warning: small/demo.jsonl: left out are 1 record of scale full\n"
    assert warning in capsys.readouterr().err


def test_a_training_that_rows_share_counts_once():
    def record(row, seconds, **more):
        return {"row": row, "seconds": seconds, **more}
    trunk, head = {"trunk": 100.0}, {"trunk": 100.0, "head": 20.0}
    assert seconds_of([record("a/x", 103.0, trainings=trunk), record("a/y", 103.0, trainings=trunk),
                       record("a/z", 121.0, trainings=head)]) == pytest.approx(124)
    assert seconds_of([record("a/x", 100), record("a/y", 103), record("a/z", 103),
                       record("b", 7)]) == 110  # as older records are taken


def test_the_table_in_the_readme_follows_from_the_records(project):
    readme = project / "README.md"
    readme.write_text(f"before\n{BLOCK[0]}\nold\n{BLOCK[1]}\nafter\n")
    add(project, "ours/deep", 0, 88.25)
    assert "wrote README.md" in write_tables(project / "results", project / "papers")
    text = readme.read_text()
    assert ("| [Demo 2020](papers/demo.py) | [small](results/small/demo.md) | 0 / 0 / 2 | "
            "ours/deep 88.2 |") in text
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    readme.write_text(text.replace("88.2", "98.2"))
    (difference,) = check_tables(project / "results", project / "papers")
    assert difference.startswith("README.md: line ")
    (project / "out/small").mkdir(parents=True)  # results of a user do not touch it
    assert not check_tables(project / "out", project / "papers")[1:]


def test_captions_of_pictures_and_curves(project):
    path = project / "papers/demo.yaml"
    path.write_text(path.read_text().replace("x: depth,", "x: depth, caption: Look at the slope.,")
                    + "figures: {filters: See the edges.}\n")
    add(project, "ours/deep", 0, 88.25)
    add(project, "ours/flat", 0, 88.25)
    (project / "results/small/demo_filters.png").write_bytes(b"")
    (project / "results/small/demo_more.png").write_bytes(b"")
    figures = page(project).partition("## Figures")[2].partition("##")[0].split("\n\n")
    assert [line for line in figures if line.strip()] == [
        "![filters](demo_filters.png)", "*See the edges.*",
        "![Depth & accuracy](demo_depth.svg)", "*Look at the slope.*", "![more](demo_more.png)"]


def test_the_bytes_do_not_depend_on_the_order_of_rows_and_seeds(project):
    records = [make_record(project, row, seed, 50.0 + 10 * index + seed / 3)
               for index, row in enumerate(("ours/deep", "ours/flat", "random"))
               for seed in range(3)]
    path = project / "results/small/demo.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    first = render(project / "results", project / "papers")
    assert first == render(project / "results", project / "papers")
    path.write_text("".join(json.dumps(record) + "\n" for record in reversed(records)))
    assert first == render(project / "results", project / "papers")
    assert {file.name for file in first} == {"demo.md", "summary.json", "demo_depth.svg",
                                             "README.md"}


def test_the_curve_is_valid_xml_with_the_paper_beside_it_and_left_out_without_records(project):
    add(project, "random", 0, 10.0)
    drawing = project / "results/small/demo_depth.svg"
    assert drawing not in render(project / "results", project / "papers")
    for seed in range(2):
        add(project, "ours/deep", seed, 88.0 + seed)
        add(project, "ours/flat", seed, 70.0 + seed)
    text = render(project / "results", project / "papers")[drawing]
    document = xml.dom.minidom.parseString(text)
    lines = document.getElementsByTagName("polyline")
    assert [len(line.getAttribute("points").split()) for line in lines] == [2, 2]
    assert [bool(line.getAttribute("stroke-dasharray")) for line in lines] == [False, True]
    heights = [float(point.split(",")[1]) for point in lines[0].getAttribute("points").split()]
    assert heights[1] < heights[0]  # 2 stands left of 10, and the better row higher
    assert "Depth &amp; accuracy" in text and "some values not confirmed" in text
    assert "![Depth & accuracy](demo_depth.svg)" in page(project)


@pytest.mark.parametrize("low, high", [(54.3, 91.7), (0.0, 100.0), (3.0, 3.0), (0.011, 0.019),
                                       (-4.0, 2.5)])
def test_ticks_are_few_and_enclose_the_values(low, high):
    ticks = round_ticks(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9 and 2 <= len(ticks) <= 8


def test_pictures_go_to_the_page_of_their_own_paper(project):
    add(project, "random", 0, 10.0)
    for suffix in (".py", ".yaml"):
        shutil.copy(project / f"papers/demo{suffix}", project / f"papers/demo_mine{suffix}")
    (project / "results/small/demo_mine.jsonl").write_text("")
    for name in ("demo_filters.png", "demo_mine_filters.png"):
        (project / "results/small" / name).write_bytes(b"")
    assert "demo_filters.png" in page(project) and "demo_mine_filters.png" not in page(project)


def test_check_finds_hand_edits_missing_and_extra_files(project):
    results, papers = project / "results", project / "papers"
    add(project, "ours/deep", 0, 88.25)
    add(project, "ours/flat", 0, 87.25)
    (results / "NOTES.md").write_text("by hand\n")
    assert any("missing" in line for line in check_tables(results, papers))
    assert len(write_tables(results, papers)) == 4
    assert check_tables(results, papers) == [] and write_tables(results, papers) == []
    table = results / "small/demo.md"
    table.write_text(table.read_text().replace("88.25 (1)", "89.25 (1)"))
    (difference,) = check_tables(results, papers)
    assert difference.startswith("results/small/demo.md: line ")
    write_tables(results, papers)
    (results / "small/summary.json").unlink()
    (results / "small/gone.md").write_text("old\n")
    assert check_tables(results, papers) == [
        "results/small/summary.json: missing",
        "results/small/gone.md: follows from no record; delete it"]
    assert (results / "NOTES.md").read_text() == "by hand\n"
    assert not list(results.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["README.md", "small/demo.md", "small/summary.json",
                                  "small/demo_depth.svg"])
def test_files_of_somebody_else_are_not_overwritten(project, name):
    add(project, "ours/deep", 0, 88.25)
    add(project, "ours/flat", 0, 87.25)
    write_tables(project / "results", project / "papers")
    path = project / "results" / name
    path.write_text("mine")
    with pytest.raises(records.InputError, match=f"{name} was not made by this program"):
        write_tables(project / "results", project / "papers")
    assert path.read_text() == "mine"
    path.unlink()
    write_tables(project / "results", project / "papers")
    assert "mine" not in path.read_text()


def test_many_damaged_lines_and_files_of_others_get_a_line_each(project, capsys):
    add(project, "ours/deep", 0, 88.25)
    for name in ("demo", "else"):
        with (project / f"results/small/{name}.jsonl").open("a") as file:
            file.write("nothing\n" * 2000)
    render(project / "results", project / "papers")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[2].endswith("so are 1997 more lines")
    assert lines[3] == "warning: small/else.jsonl: there is no script else.py, skipped"


@pytest.mark.parametrize("history", [[[-5, 1.0], [-1, 2.0]], [[1, 1e20], [2, 1e20]],
                                     [[1, 5e-324], [2, 0]]])
def test_odd_learning_curves_stop_no_page(project, history):
    path = project / "papers/demo.yaml"
    path.write_text(path.read_text() + "  loss: {title: Loss, x: step, y: nats, lines: {ours: "
                    "{row: ours/deep, scalar: loss}}}\n")
    add(project, "ours/deep", 0, 88.25, history={"loss": history})
    drawing = render(project / "results", project / "papers")[
        project / "results/small/demo_loss.svg"]
    assert "polyline" in drawing and "nan" not in drawing


def test_smoke_is_rendered_but_neither_checked_nor_in_the_index(project):
    results, papers = project / "results", project / "papers"
    (results / "smoke").mkdir()
    add(project, "ours/deep", 0, 88.25, suite="smoke")
    add(project, "ours/deep", 0, 88.25)
    write_tables(results, papers)
    assert (results / "smoke/demo.md").exists()
    assert "smoke/demo.md" not in (results / "README.md").read_text()
    (results / "smoke/demo.md").unlink()
    assert check_tables(results, papers) == []


def test_records_without_script_or_row_are_a_warning(project, capsys):
    add(project, "ours/deep", 0, 88.25)
    add(project, "retired", 0, 88.25)
    (project / "results/small/lost.jsonl").write_text("{}\n")
    files = render(project / "results", project / "papers")
    warned = capsys.readouterr().err
    for words in ("lost.py", "does not have: retired"):
        assert words in warned
    assert "lost.md" not in {path.name for path in files}


def test_the_readme_of_somebody_else_is_left_alone(project):
    add(project, "ours/deep", 0, 88.25)
    (project / "results/README.md").write_text("# Results of my thesis\n")
    with pytest.raises(InputError, match="README.md"):
        write_tables(project / "results", project / "papers")
    assert (project / "results/README.md").read_text() == "# Results of my thesis\n"
    assert not (project / "results/small/demo.md").exists()


def test_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--results", str(tmp_path / "none")])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "none" in message
    assert main(["--check", "--results", str(tmp_path)]) == 1
    assert "run ./run_all.sh tables and commit" in capsys.readouterr().out
    assert main(["--results", str(tmp_path)]) == 0 and (tmp_path / "README.md").exists()
    assert main(["--check", "--results", str(tmp_path)]) == 0


def test_a_mark_stays_until_lines_say_that_the_code_behaves_alike(project):
    """records.code_hash of another script makes the record old; neutral's lines lead from there to
    today."""
    script, lines = project / "papers/demo.py", project / "results/neutral.jsonl"
    for seed in range(2):
        add(project, "ours/deep", seed, 85.0 + seed)
        add(project, "random", seed, 85.0)
    old = records.code_hash(script)
    assert cells(page(project), "ours/deep")[2] == "85.50 ± 0.71 (2)"
    script.write_text("changed\n")
    assert cells(page(project), "ours/deep")[2] == "85.50† ± 0.71 (2)"
    assert "† the code has changed since" in page(project)
    chain = [old, "between", records.code_hash(script)]
    for before, after, changed in zip(chain, chain[1:], (["random"], [])):
        records.append(lines, {"paper": "demo", "old": before, "new": after,
                               "changed": {"small": changed}})
    assert cells(page(project), "ours/deep")[2] == "85.50 ± 0.71 (2)"
    assert cells(page(project), "random")[2] == "85.00† ± 0.00 (2)"


def test_records_of_the_time_of_a_hash_for_each_file_are_followed_too(project):
    code = {"demo.py": "1" * 12, "trainer.py": "2" * 12}
    add(project, "random", 0, 85.0, code=code)
    assert "†" in cells(page(project), "random")[2]
    records.append(project / "results/neutral.jsonl", {
        "paper": "demo", "old": neutral.one_hash(code),
        "new": records.code_hash(project / "papers/demo.py"), "changed": {"small": []}})
    assert "†" not in cells(page(project), "random")[2]


def test_other_data_in_the_command(project):
    add(project, "ours/deep", 0, 85.0, suite="small-pets", config={"dataset": "folder:/my pets"})
    assert ("`./run_all.sh small demo --set 'dataset=folder:/my pets'`"
            in page(project, "small-pets"))


def test_report_needs_no_torch():
    program = "import sys; sys.modules.update(torch=None, numpy=None); import replicate.report"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=30).returncode == 0
