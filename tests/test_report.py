"""The report on a tiny made-up paper: hashes, records, statistics, tables."""
import json
import os
import subprocess
import sys
import xml.dom.minidom
from pathlib import Path

import pytest

from replicate.report import (append_record, check_tables, code_hashes, find_done, judge_claim, main, outline, read_literals,
                              read_records, render, round_ticks, student_t_quantile, write_tables)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = '''"""Demo 2020: a paper that never was.

More words.
"""
PAPER = {
    "ours/deep": (90.5, "Table 1", True),
    "ours/flat": (80, "Table 1", False),
    "random": (None, "Sec. 4", True),
}
CLAIMS: list = [
    ("deeper", "ours/deep", ">", "ours/flat", 2, "Depth helps.", "Sec. 4.1"),
    ("worse", "random", "<", "ours/flat", -5, "Random is | not far above.", "Sec. 4.2"),
]
CURVES = [("depth", "Depth & accuracy", "depth", "accuracy (%)", {"ours": [(10, "ours/deep"), (2, "ours/flat")]})]


def train(images):
    """Train."""
    return images + 1


def start():
    return trainer.fit(embedded.draw())
'''


@pytest.fixture
def project(tmp_path):
    """A folder with papers/demo.py, replicate/trainer.py, replicate/embedded.py and an empty results/small/."""
    for folder in ("papers", "replicate", "results/small"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "papers/demo.py").write_text(SCRIPT)
    (tmp_path / "replicate/trainer.py").write_text("def fit():\n    return 1\n")
    (tmp_path / "replicate/embedded.py").write_text("def draw():\n    return 1\n")
    return tmp_path


def make_record(project, row, seed, value, **changes):
    config = {"dataset": "cifar10", "seed": seed, **changes.pop("config", {})}
    return {"paper": "demo", "row": row, "metric": "accuracy", "value": value, "seed": seed, "steps": 10, "selection": "last",
            "scale": "small", "config": config, "config_hash": f"{row}-{sorted(config.items())}",
            "code": code_hashes(project / "papers/demo.py"), "commit": None, "dirty": False, "data": {"cifar10": "abcdef" * 10},
            "torch": "2.3", "torchvision": "0.18", "device": "cpu", "threads": 2, "ranks": 1, "deterministic": True,
            "seconds": 12.6, "peak_memory_mb": 100.0, "started": "2024-01-01T00:00:00Z", "status": "ok", **changes}


def add(project, *arguments, suite="small", **changes):
    append_record(project / f"results/{suite}/demo.jsonl", make_record(project, *arguments, **changes))


def page(project, suite="small"):
    return render(project / "results", project / "papers")[project / f"results/{suite}/demo.md"]


def cells(text, row):
    """The cells of the first table line that begins with `row`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


@pytest.mark.parametrize("degrees, quantile", [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (30, 2.0423), (1000, 1.9623)])
def test_student_t_quantiles_are_those_of_the_tables(degrees, quantile):
    assert student_t_quantile(degrees) == pytest.approx(quantile, abs=6e-5)


@pytest.mark.parametrize("first, sign, second, margin, verdict", [
    ([80, 81, 82], ">", [70, 71, 72], 5, "reproduced"),
    ([80, 81, 82], ">", [70, 71, 72], 15, "contradicted"),
    ([80, 81, 82], ">", [70, 71, 72], 10, "open"),  # zero width, exactly on the margin: passes neither way
    ([80, 60, 85], ">", [70, 71, 72], 0, "open"),
    ([70, 71, 72], "<", [80, 81, 82], 5, "reproduced"),
    ([80, 81, 82], "<", [70, 71, 72], 0, "contradicted"),
    ([68, 69, 70], ">", [70, 71, 72], -5, "reproduced"),  # within 5 points
    ([60, 61, 62], ">", [70, 71, 72], -5, "contradicted"),
    ([72, 73, 74], "<", [70, 71, 72], -5, "reproduced"),
    ([80, 81], ">", [70, 71], 5, "open"),
    ([80], ">", [70], 5, "open"),
    ([], ">", [70], 5, "open"),
])
def test_verdicts(first, sign, second, margin, verdict):
    assert judge_claim(dict(enumerate(first)), sign, dict(enumerate(second)), margin)["verdict"] == verdict


def test_the_interval_is_over_the_seeds_both_rows_have():
    claim = judge_claim({0: 11.0, 1: 12.0, 2: 13.0, 7: 99.0}, ">", {0: 10.0, 1: 10.0, 2: 10.0, 8: -99.0}, 0)
    assert (claim["n"], claim["mean"]) == (3, 2.0)
    assert claim["high"] - claim["mean"] == pytest.approx(4.302653 / 3 ** 0.5, abs=1e-4)  # sd 1, n 3
    assert claim["low"] == pytest.approx(2 * claim["mean"] - claim["high"])


def test_a_torn_line_is_closed_before_the_next_and_costs_one_warning(tmp_path):
    path = tmp_path / "results" / "small" / "x.jsonl"
    record = {"row": "a", "seed": 0, "status": "ok", "config_hash": "h", "value": 1.0}
    append_record(path, record)
    with path.open("a") as file:
        file.write('{"row": "a", "se')
    append_record(path, {**record, "seed": 1})
    records, warnings = read_records(path)
    assert [record["seed"] for record in records] == [0, 1]
    assert warnings == ["results/small/x.jsonl line 2: not a record, skipped"]


@pytest.mark.parametrize("damage", [
    b"\xff\xfe", b"[1, 2]", b"[" * 100_000, b"null", b'{"row": "a"}', b"9" * 5000,
    b'{"row": "a", "seed": 0, "status": "ok", "config_hash": "h", "value": NaN}',
    b'{"row": "a", "seed": 0, "status": "ok", "config_hash": "h", "value": 1' + b"0" * 400 + b"}",
    b'{"row": "a", "seed": 0, "status": "ok", "config_hash": "h", "value": 1.0, "config": 3}',
    b'{"row": "a", "seed": true, "status": "ok", "config_hash": "h", "value": 1.0}'])
def test_no_damage_stops_the_reader(tmp_path, damage):
    path = tmp_path / "x.jsonl"
    good = b'{"row": "a", "seed": 0, "status": "ok", "config_hash": "h", "value": 1.0}'
    path.write_bytes(good + b"\n\n" + damage + b"\n" + good)
    records, warnings = read_records(path)
    assert len(records) == 2 and len(warnings) == 1 and warnings[0].endswith("x.jsonl line 3: not a record, skipped")


def test_no_file_means_no_records(tmp_path):
    assert read_records(tmp_path / "none.jsonl") == ([], [])


def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError):
        append_record(tmp_path / "x.jsonl", {"value": float("nan")})
    assert not (tmp_path / "x.jsonl").exists()


def test_two_processes_appending_at_once_lose_nothing(tmp_path):
    program = ("import sys; from pathlib import Path; from replicate.report import append_record\n"
               "for seed in range(200): append_record(Path(sys.argv[1]), {'row': sys.argv[2], 'seed': seed, 'status': 'ok', "
               "'config_hash': 'h' * 3000, 'value': 1.0})")
    path = tmp_path / "x.jsonl"
    processes = [subprocess.Popen([sys.executable, "-c", program, str(path), row], cwd=ROOT) for row in ("a", "b")]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    records, warnings = read_records(path)
    assert not warnings
    assert {(record["row"], record["seed"]) for record in records} == {(row, seed) for row in "ab" for seed in range(200)}
    assert len(records) == 400


def test_find_done_takes_the_last_finished_record_of_that_very_run(project):
    first, second = make_record(project, "random", 0, 1.0), make_record(project, "random", 0, 2.0)
    failed = make_record(project, "random", 0, None, status="failed", error="out of memory")
    assert find_done([first, second, failed], "random", 0, first["config_hash"]) is second
    assert find_done([failed], "random", 0, first["config_hash"]) is None
    assert find_done([first], "random", 1, first["config_hash"]) is None
    assert find_done([first], "random", 0, "other") is None


def test_literals_are_read_without_importing(project):
    script = project / "papers/demo.py"
    script.write_text(SCRIPT + "\nraise SystemExit('imported')\n")
    literals = read_literals(script)
    assert literals["title"] == "Demo 2020: a paper that never was."
    assert literals["command"] == "python -m papers.demo"
    assert literals["CLAIMS"][1][4] == -5 and literals["PAPER"]["random"][0] is None


@pytest.mark.parametrize("old, new", [('"random": (None', '"other": (None'), ('">"', '">="'), ('90.5', 'compute()'),
                                      ('(80, "Table 1", False)', "80")])
def test_literals_that_make_no_sense_name_the_script(project, old, new):
    script = project / "papers/demo.py"
    script.write_text(SCRIPT.replace(old, new))
    with pytest.raises(ValueError, match="demo.py"):
        read_literals(script)


def test_only_what_the_code_does_enters_its_hash(project):
    script = project / "papers/demo.py"
    before = code_hashes(script)
    assert sorted(before) == ["demo.py", "embedded.py", "trainer.py"] and all(len(digest) == 12 for digest in before.values())
    for old, new in [("    return", "    # why\n\n    return"), ('"""Train."""', '"""Train more."""'), ("90.5", "91.5"),
                     ("Depth helps", "Depth hurts"), ("Depth & accuracy", "Depth"), ("images + 1", "(images  +  1)"),
                     ('    """Train."""\n', "")]:
        assert old in SCRIPT
        script.write_text(SCRIPT.replace(old, new))
        assert code_hashes(script) == before, new
    script.write_text(SCRIPT.replace("images + 1", "images + 2"))
    assert code_hashes(script)["demo.py"] != before["demo.py"]
    assert code_hashes(script)["trainer.py"] == before["trainer.py"]


def test_of_the_shared_files_only_what_the_script_reaches_counts(project):
    script, shared = project / "papers/demo.py", project / "replicate/trainer.py"
    shared.write_text("STEPS = 3\n\ndef fit():\n    return helper()\n\ndef helper():\n    return STEPS\n")
    before = code_hashes(script)
    text = shared.read_text()
    for addition in ("def unused():\n    return 1\n", "OTHER = 5\n", 'if __name__ == "__main__":\n    fit()\n'):
        shared.write_text(text + "\n" + addition)
        assert code_hashes(script) == before, addition
    for old, new in (("STEPS = 3", "STEPS = 4"), ("return STEPS", "return STEPS + 1"), ("helper()", "helper() + 1")):
        shared.write_text(text.replace(old, new, 1))
        assert code_hashes(script)["trainer.py"] != before["trainer.py"], new
    shared.write_text(text + "\ndef unused():\n    return 1\n")
    (project / "replicate/embedded.py").write_text("def more():\n    unused()\n")
    assert code_hashes(script)["trainer.py"] == before["trainer.py"]  # reached from nowhere that is reached
    script.write_text(script.read_text() + "\n\ndef late():\n    trainer.unused()\n")
    assert code_hashes(script)["trainer.py"] != before["trainer.py"]


def test_a_literal_inside_a_function_does_enter_the_hash(project):
    script = project / "papers/demo.py"
    script.write_text(SCRIPT.replace("    return", "    PAPER = 1\n    return"))
    before = code_hashes(script)
    script.write_text(SCRIPT.replace("    return", "    PAPER = 2\n    return"))
    assert code_hashes(script) != before


def test_the_hash_does_not_see_fields_that_only_some_python_versions_have():
    import ast
    old, new = ast.parse("def f(): pass").body[0], ast.parse("def f(): pass").body[0]
    new._fields, new.type_params = (*new._fields, "type_params"), []
    assert outline(old) == outline(new)


def test_stale_mark_follows_the_code_and_names_the_file(project):
    for seed in range(2):
        add(project, "ours/deep", seed, 85.0 + seed)
    script = project / "papers/demo.py"
    script.write_text(SCRIPT.replace('"""Train."""', '"""Other."""').replace("80, ", "81, ") + "# remark\n")
    assert cells(page(project), "ours/deep")[2] == "85.50 ± 0.71 (2)"
    (project / "replicate/embedded.py").write_text("changed = True\n")
    assert "85.50 ±" in page(project)  # the run did not use the embedded set
    (project / "replicate/trainer.py").write_text("def fit():\n    return 2\n")
    assert cells(page(project), "ours/deep")[2] == "85.50† ± 0.71 (2)"
    assert "changed since: trainer.py" in cells(page(project), "ours/deep")[4]


def test_embedded_code_counts_for_runs_on_the_embedded_set(project):
    (project / "results/small-embedded").mkdir()
    add(project, "ours/deep", 0, 85.0, suite="small-embedded", config={"dataset": "embedded"},
        data={"embedded": "e" * 64})
    (project / "replicate/embedded.py").write_text("changed = True\n")
    row = cells(page(project, "small-embedded"), "ours/deep")
    assert row[2] == "85.00† (1)" and "embedded.py" in row[4]
    assert row[6] == "`python -m papers.demo --scale small --rows 'ours/deep' --data embedded`"


def test_cells_of_the_table(project):
    add(project, "ours/deep", 0, 88.25)
    add(project, "ours/flat", 0, 79.0)
    text = page(project)
    assert text.startswith("# Demo 2020: a paper that never was.\n")
    assert cells(text, "ours/deep") == ["ours/deep", "90.5 (Table 1)", "88.25 (1)", "-2.25", "not comparable", "13",
                                        "`python -m papers.demo --scale small --rows 'ours/deep'`"]
    assert cells(text, "ours/flat")[1:4] == ["80? (Table 1)", "79.00 (1)", "-1.00"]
    assert cells(text, "random")[1:4] == ["– (Sec. 4)", "not run", ""]
    assert "last iterate, seeds 0" in text and "cifar10 `abcdefabcdef`" in text and "cpu, 2 threads" in text


def test_a_gpu_has_no_threads_to_tell(project):
    add(project, "ours/deep", 0, 88.25, threads=None, device="GPU X")
    assert "- Hardware: GPU X\n" in page(project)


def test_failures_of_an_older_configuration_are_forgotten(project):
    add(project, "ours/deep", 1, None, status="failed", error="out of memory", config={"dataset": "cifar10", "width": 9},
        config_hash="f" * 16)
    add(project, "ours/deep", 0, 88.25)
    assert "failed" not in cells(page(project), "ours/deep")[4]


def test_orphans_in_a_folder_without_records_are_found(project):
    write_tables(project / "results", project / "papers")
    (project / "results/full").mkdir(exist_ok=True)
    (project / "results/full/demo.md").write_text("typed by hand")
    assert any("full/demo.md" in line for line in check_tables(project / "results", project / "papers"))


def test_a_disk_that_fills_up_leaves_the_file_as_it_was(project, monkeypatch):
    add(project, "ours/deep", 0, 88.25)
    path = project / "results/small/demo.jsonl"
    before, write = path.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:20]))
    with pytest.raises(OSError, match="disk is full"):
        add(project, "ours/deep", 1, 88.25)
    assert path.read_bytes() == before


def test_values_are_comparable_at_full_scale_only(project):
    for suite in ("full", "full-embedded"):
        (project / f"results/{suite}").mkdir()
        add(project, "ours/deep", 0, 90.5, suite=suite)
    assert cells(page(project, "full"), "ours/deep")[3:5] == ["+0.00", ""]
    assert cells(page(project, "full-embedded"), "ours/deep")[4] == "not comparable"


def test_reruns_and_failures_are_counted(project):
    add(project, "ours/deep", 0, 10.0)
    add(project, "ours/deep", 0, 20.0)  # run again: the last counts
    add(project, "ours/deep", 1, None, status="failed", error="loss is not finite\nat step 3")
    add(project, "ours/deep", 2, None, status="failed", error="out of memory")
    add(project, "ours/deep", 2, 22.0)  # the failure was overcome
    add(project, "random", 0, None, status="failed", error="out of memory")
    text = page(project)
    assert cells(text, "ours/deep")[2] == "21.00 ± 1.41 (2)"
    assert cells(text, "ours/deep")[4] == "not comparable; 1 re-run; 1 failed (loss is not finite)"
    assert cells(text, "random")[2] == "failed"
    assert "| ours/deep | 20.00 | failed | 22.00 |" in text


def test_a_failure_after_a_success_is_shown(project):
    add(project, "random", 0, 10.0)
    add(project, "random", 0, None, status="failed", error="out of memory")
    assert cells(page(project), "random")[2:5] == ["10.00 (1)", "", "1 failed (out of memory)"]


def test_only_one_configuration_is_pooled(project):
    add(project, "random", 0, 10.0, config={"rate": 0.1})
    add(project, "random", 1, 11.0, config={"rate": 0.2})
    add(project, "random", 2, 12.0, config={"rate": 0.2})
    assert cells(page(project), "random")[2] == "11.50 ± 0.71 (2)"
    assert cells(page(project), "random")[4] == "configs differ: 1 record of another config left out"


def test_notes_on_data_code_and_kernels(project):
    add(project, "random", 0, 10.0, dirty=True)
    add(project, "random", 1, 11.0, data={"cifar10": "other"}, deterministic=False)
    assert cells(page(project), "random")[4] == "data differ between seeds; uncommitted code; not deterministic"


def test_claims_in_the_page_and_for_programs(project):
    for seed in range(3):
        add(project, "ours/deep", seed, 90.0 + seed)
        add(project, "ours/flat", seed, 80.0 + seed)
        add(project, "random", seed, 82.0 + seed)
    text = page(project)
    assert ("| Depth helps. | Sec. 4.1 | `ours/deep > ours/flat + 2` | +10.00 [+10.00, +10.00] (3) | reproduced |") in text
    assert "| Random is \\| not far above. | Sec. 4.2 | `random < ours/flat + 5` | -2.00 [-2.00, -2.00] (3) | reproduced |" in text
    files = render(project / "results", project / "papers")
    summary = json.loads(files[project / "results/small/summary.json"])["demo"]
    assert summary["rows"]["ours/deep"] == {"paper": 90.5, "where": "Table 1", "confirmed": True, "mean": 91.0, "sd": 1.0, "n": 3,
                                            "stale": False, "values": {"0": 90.0, "1": 91.0, "2": 92.0}}
    assert {"id": "deeper", "verdict": "reproduced", "mean": 10.0, "low": 10.0, "high": 10.0, "n": 3, "margin": 2,
            "statement": "Depth helps."}.items() <= summary["claims"][0].items()
    assert "| [demo](small/demo.md) | 3 of 3 | 2 | 0 | 0 |" in files[project / "results/README.md"]


def test_the_bytes_do_not_depend_on_the_order_of_rows_and_seeds(project):
    records = [make_record(project, row, seed, 50.0 + 10 * index + seed / 3)
               for index, row in enumerate(("ours/deep", "ours/flat", "random")) for seed in range(3)]
    path = project / "results/small/demo.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    first = render(project / "results", project / "papers")
    assert first == render(project / "results", project / "papers")
    path.write_text("".join(json.dumps(record) + "\n" for record in reversed(records)))
    assert first == render(project / "results", project / "papers")
    assert {file.name for file in first} == {"demo.md", "summary.json", "demo_depth.svg", "README.md"}


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
    assert "![demo_depth.svg](demo_depth.svg)" in page(project)


@pytest.mark.parametrize("low, high", [(54.3, 91.7), (0.0, 100.0), (3.0, 3.0), (0.011, 0.019), (-4.0, 2.5)])
def test_ticks_are_few_and_enclose_the_values(low, high):
    ticks = round_ticks(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9 and 2 <= len(ticks) <= 8


def test_pictures_go_to_the_page_of_their_own_paper(project):
    add(project, "random", 0, 10.0)
    (project / "papers/demo_mine.py").write_text(SCRIPT)
    (project / "results/small/demo_mine.jsonl").write_text("")
    for name in ("demo_filters.png", "demo_mine_filters.png"):
        (project / "results/small" / name).write_bytes(b"")
    assert "demo_filters.png" in page(project) and "demo_mine_filters.png" not in page(project)


def test_check_finds_hand_edits_missing_and_extra_files(project):
    results, papers = project / "results", project / "papers"
    add(project, "ours/deep", 0, 88.25)
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
    assert check_tables(results, papers) == ["results/small/summary.json: missing",
                                             "results/small/gone.md: follows from no record; delete it"]
    assert (results / "NOTES.md").read_text() == "by hand\n"
    assert not list(results.rglob("*.tmp"))


def test_smoke_is_rendered_but_neither_checked_nor_in_the_index(project):
    results, papers = project / "results", project / "papers"
    (results / "smoke").mkdir()
    add(project, "ours/deep", 0, 88.25, suite="smoke")
    add(project, "ours/deep", 0, 88.25)
    write_tables(results, papers)
    assert (results / "smoke/demo.md").exists() and "smoke/demo.md" not in (results / "README.md").read_text()
    (results / "smoke/demo.md").unlink()
    assert check_tables(results, papers) == []


def test_records_without_script_or_row_are_a_warning(project, capsys):
    add(project, "ours/deep", 0, 88.25)
    add(project, "retired", 0, 88.25)
    (project / "results/small/lost.jsonl").write_text("{}\n")
    files = render(project / "results", project / "papers")
    warned = capsys.readouterr().err
    assert "lost.py" in warned and "'retired'" in warned and "lost.jsonl line 1: not a record, skipped" in warned
    assert "lost.md" not in {path.name for path in files}


def test_the_readme_of_somebody_else_is_left_alone(project):
    add(project, "ours/deep", 0, 88.25)
    (project / "results/README.md").write_text("# My project\n")
    with pytest.raises(ValueError, match="README.md"):
        write_tables(project / "results", project / "papers")
    assert (project / "results/README.md").read_text() == "# My project\n"
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


def test_report_needs_nothing_but_the_standard_library():
    program = "import sys; sys.modules.update(torch=None, numpy=None, yaml=None); import replicate.report"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
