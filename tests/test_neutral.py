"""Old code against new: each change is seen, and only the rows that it touches are named."""
import json
import shutil

import pytest
from conftest import ROOT

from replicate import neutral, records

PAPER = "gidaris_rotation"
SCRIPT, EVALUATE, TRAINER = f"papers/{PAPER}.py", "replicate/evaluate.py", "replicate/trainer.py"
TRAINED, KNN, LINEAR = "random-official/conv", "random/block2/knn", "random/block2/linear"
ALEXNET = "alexnet-random/conv1/linear"
CHANGES = {  # name -> (file, old text, new text, the rows that it touches)
    "a comment": (EVALUATE, "def knn_accuracy(", "# Wu et al.\ndef knn_accuracy(", []),
    "weight decay": (SCRIPT, "decay: float = 5e-4", "decay: float = 4.9e-4", [TRAINED]),
    "schedule": (TRAINER, "progress >= drop", "progress > drop", [TRAINED]),
    "neighbours": (EVALUATE, "k=20", "k=21", [KNN]),
    "temperature": (EVALUATE, "temperature=0.07", "temperature=0.08", [KNN]),
    "penalty not chosen": (EVALUATE, "(1.0, 0.3, 0.1,", "(1.01, 0.3, 0.1,", [LINEAR]),
    "calibration": (EVALUATE, "count=500", "count=400", [KNN, LINEAR]),
    "AlexNet's stride": (SCRIPT, "c64, 11, stride=4", "c64, 11, stride=3", []),  # not at smoke
}


def mutated(folder, file, old, new):
    tree = neutral.copy_tree(folder)
    text = (tree / file).read_text()
    assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
    (tree / file).write_text(text.replace(old, new))
    return tree


def test_changes_are_seen_in_the_rows_that_they_touch(tmp_path):
    trees = [neutral.copy_tree(tmp_path / "today")]
    trees += [mutated(tmp_path / name, *change[:3]) for name, change in CHANGES.items()]
    base, *others = [seen["scales"]["smoke"] for seen in
                     neutral.observe(trees, PAPER, ["smoke"], f"{TRAINED},{KNN},{LINEAR}")]
    assert base["rows"].keys() == {TRAINED, KNN, LINEAR} and base["trainings"].keys() == {TRAINED}
    found = {name: sorted(neutral.differences(base, other)[1])
             for name, other in zip(CHANGES, others)}
    assert found == {name: sorted(change[3]) for name, change in CHANGES.items()}
    unchosen = others[list(CHANGES).index("penalty not chosen")]
    assert unchosen["rows"][LINEAR]["value"] == base["rows"][LINEAR]["value"]
    assert neutral.differences(base, others[list(CHANGES).index("schedule")])[0] == [TRAINED]


def test_a_network_that_only_scale_paper_has(tmp_path, capsys):
    trees = [neutral.copy_tree(tmp_path / "today"),
             mutated(tmp_path / "stride", *CHANGES["AlexNet's stride"][:3])]
    line = neutral.compare(trees, PAPER, ["paper"], ALEXNET)
    assert line["changed"] == {"paper": [ALEXNET]} and line["old"] != line["new"]
    assert f"{ALEXNET}: differs in its value" in capsys.readouterr().out


def test_other_words_need_no_run_and_other_numbers_do(tmp_path, monkeypatch):
    def observe(*arguments):
        raise LookupError("the versions were run")
    monkeypatch.setattr(neutral, "observe", observe)
    today = neutral.copy_tree(tmp_path / "today")
    file, old, new, _ = CHANGES["a comment"]
    words = mutated(tmp_path / "words", file, old, new)
    script = words / SCRIPT
    text = script.read_text().replace('"""(N,C,H,W)', '"""So many images (N,C,H,W)')
    script.write_text("# A comment.\n" + text)
    line = neutral.compare([today, words], PAPER, ["smoke", "small"])
    assert line["changed"] == {"smoke": [], "small": []} and line["words_only"]
    assert line["old"] != line["new"] == records.code_hash(script, words)
    for number, change in enumerate([*list(CHANGES.values())[1:],
                                     ("replicate/records.py", '"evaluate.py"', '"eval.py"', [])]):
        with pytest.raises(LookupError):
            neutral.compare([today, mutated(tmp_path / str(number), *change[:3])], PAPER, ["smoke"])


def test_rows_that_are_computed_from_others_follow_them():
    def seen(value, weights="w"):
        row = {"value": value, "scores": [], "trainings": ["a"], "uses": [], "error": ""}
        rows = {"first": row, "other": {**row, "value": "o", "trainings": ["b"]},
                "gap": {**row, "value": "g", "trainings": [], "uses": ["first"]},
                "failed": {**row, "value": None, "trainings": [], "error": "too small"}}
        return {"trainings": {"a": weights, "b": "w"}, "rows": rows, "met": []}
    assert neutral.differences(seen("v"), seen("v"))[1] == {"failed": "not compared (too small)"}
    for new in (seen("w"), seen("v", "x")):
        assert neutral.differences(seen("v"), new)[1].keys() == {"first", "gap", "failed"}
    more, scored = seen("v"), seen("v")
    more["rows"]["first"]["scores"] = ["s"]
    assert "first" in neutral.differences(seen("v"), more)[1]
    for each in (more, scored):
        each["met"] = ["s"]
    assert "first" not in neutral.differences(scored, more)[1]  # it looked at another row's scores
    without = seen("v")
    del without["rows"]["other"]
    assert "other" in neutral.differences(seen("v"), without)[1]


def line(old, new, **changed):
    return {"paper": "demo", "old": old, "new": new, "changed": {"small": [], **changed}}


@pytest.mark.parametrize("lines, expected", [
    ([], False),
    ([line("a", "d")], True),
    ([line("d", "a")], True),  # equality has no direction
    ([line("a", "b"), line("c", "d")], False),
    ([line("c", "d"), line("b", "c"), line("a", "b")], True),
    ([line("a", "d", small=["knn"])], False),
    ([line("a", "d", small=["linear"], full=["knn"])], True),
    ([line("a", "d", small=["knn"]), line("a", "b"), line("b", "d")], True),
    ([{**line("a", "d"), "changed": {"smoke": []}}], False),  # did not compare the record's scale
])
def test_a_record_is_unmarked_where_a_chain_leads_to_today(lines, expected):
    record = {"row": "knn", "scale": "small", "code": "a"}
    assert neutral.unmarked(record, "d", lines) is expected
    assert neutral.unmarked({**record, "code": "d"}, "d", lines)
    assert neutral.unmarked({**record, "code": "d", "codes": ["a", "d"]}, "d", lines) is expected
    assert not neutral.unmarked({**record, "code": "x"}, "d", lines)


def test_records_with_a_hash_for_each_file_are_found(tmp_path):
    code = {"demo.py": "1", "trainer.py": "2"}
    lines = tmp_path / "neutral.jsonl"
    records.append(lines, line(neutral.one_hash(code), "d"))
    lines.write_text(lines.read_text() + 'rubbish\n[]\n{"paper": "demo"}\n')
    records.append(lines, {**line("a", "d"), "paper": "other"})
    found = neutral.read_lines("demo", lines)
    assert len(found) == 1 and neutral.read_lines("demo", tmp_path / "none") == []
    record = {"row": "knn", "scale": "small", "code": dict(reversed(code.items()))}
    assert neutral.unmarked(record, "d", found)
    assert not neutral.unmarked({**record, "code": {**code, "trainer.py": "3"}}, "d", found)


def test_code_that_no_line_tells_of_does_not_pass(tmp_path):
    shutil.copytree(ROOT / "replicate", tmp_path / "replicate")
    script = tmp_path / "papers/demo.py"
    script.parent.mkdir()
    script.write_text("first = 1\n")
    assert neutral.unexplained(tmp_path) == []  # no records, nothing to mark
    today = records.code_hash(script, tmp_path)
    records.append(tmp_path / "results/small/demo.jsonl", {
        "row": "knn", "seed": 0, "config_hash": "0", "status": "ok", "value": 1.0, "code": today})
    assert neutral.unexplained(tmp_path) == []
    script.write_text("first = 2\n")
    messages = neutral.unexplained(tmp_path)
    assert len(messages) == 1 and "demo" in messages[0]
    records.append(tmp_path / "results/neutral.jsonl",
                   line(today, records.code_hash(script, tmp_path), small=["knn"]))
    assert neutral.unexplained(tmp_path) == []


def test_committed_lines_name_rows_that_there_are():
    for text in neutral.LINES.read_text().splitlines():
        each, script = json.loads(text), ROOT / f"papers/{json.loads(text)['paper']}.py"
        assert each in neutral.read_lines(each["paper"]) and each["old"] != each["new"], text
        named = {row for names in each["changed"].values() for row in names}
        if each["new"] == records.code_hash(script):  # an older one may name rows that are no more
            assert named <= set(records.read_declared(script)["rows"]), text
