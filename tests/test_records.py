"""Records: lines that survive crashes, full disks and each other; what a YAML declares."""
import os
import subprocess
import sys

import pytest

from replicate import records
from replicate.records import ROOT, InputError, append, expand, find, read, read_declared

GOOD = {"row": "a", "seed": 0, "status": "ok", "config_hash": "h", "value": 1.0}


def test_a_torn_line_is_closed_before_the_next_and_costs_one_warning(tmp_path):
    path = tmp_path / "results" / "small" / "x.jsonl"
    append(path, GOOD)
    with path.open("a") as file:
        file.write('{"row": "a", "se')
    append(path, {**GOOD, "seed": 1})
    found, warnings = read(path)
    assert [record["seed"] for record in found] == [0, 1]
    assert warnings == ["results/small/x.jsonl line 2: not a record, skipped"]


@pytest.mark.parametrize("damage", [
    b"\xff\xfe", b"[1, 2]", b"[" * 100_000, b"null", b'{"row": "a"}', b"9" * 5000,
    b'{"row": "a", "seed": 0, "status": "ok", "config_hash": "h", "value": NaN}',
    b'{"row": "a", "seed": 0, "status": "ok", "config_hash": "h", "value": 1' + b"0" * 400 + b"}",
    b'{"row": "a", "seed": 0, "status": "ok", "config_hash": "h", "value": 1.0, "config": 3}',
    b'{"row": "a", "seed": 0, "status": "ok", "config_hash": "h", "value": 1.0, '
    b'"data": {"mnist": null}}',
    b'{"row": "a", "seed": true, "status": "ok", "config_hash": "h", "value": 1.0}'])
def test_no_damage_stops_the_reader(tmp_path, damage):
    path = tmp_path / "x.jsonl"
    good = b'{"row": "a", "seed": 0, "status": "ok", "config_hash": "h", "value": 1.0}'
    path.write_bytes(good + b"\n\n" + damage + b"\n" + good)
    found, warnings = read(path)
    assert len(found) == 2 and len(warnings) == 1 and warnings[0].endswith(
        "x.jsonl line 3: not a record, skipped")
    assert read(tmp_path / "none.jsonl") == ([], [])


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    with pytest.raises(ValueError):
        append(path, {"value": float("nan")})
    assert not path.exists()
    append(path, GOOD)
    before, write = path.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:20]))
    with pytest.raises(OSError, match="disk is full"):
        append(path, GOOD)
    assert path.read_bytes() == before
    monkeypatch.setattr(records.os, "fsync",
                        lambda descriptor: os.open("/nonexistent/x", os.O_RDONLY))
    with pytest.raises(OSError):
        records.write_atomically(path, b"new")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_two_processes_appending_at_once_lose_nothing(tmp_path):
    program = ("import sys; from pathlib import Path; from replicate.records import append\n"
               "for seed in range(200): append(Path(sys.argv[1]), {'row': sys.argv[2], "
               "'seed': seed, 'status': 'ok', 'config_hash': 'h' * 3000, 'value': 1.0})")
    path = tmp_path / "x.jsonl"
    processes = [subprocess.Popen([sys.executable, "-c", program, str(path), row], cwd=ROOT)
                 for row in ("a", "b")]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    found, warnings = read(path)
    assert not warnings and len(found) == 400
    assert {(record["row"], record["seed"]) for record in found} == {
        (row, seed) for row in "ab" for seed in range(200)}


def test_find_takes_the_last_finished_record_of_that_very_run():
    second, failed = {**GOOD, "value": 2.0}, {**GOOD, "status": "failed"}
    assert (find([GOOD, second, failed], "a", 0, "h") is second
            and find([failed], "a", 0, "h") is None)
    assert find([GOOD], "a", 1, "h") is None and find([GOOD], "a", 0, "other") is None


def test_patterns_of_rows_are_spelt_out_in_order():
    rows = {"b": None, "a/block{1,2}/linear": {"where": "x"}, "{c,d}/e": {"paper": 1}}
    assert list(expand(rows)) == ["b", "a/block1/linear", "a/block2/linear", "c/e", "d/e"] and (
        expand(rows)["b"] == {})


@pytest.mark.parametrize("test,weights,margin", [
    ("a > b", {"a": 1, "b": -1}, 0), ("a > b + 5", {"a": 1, "b": -1}, 5),
    ("a > b - 5", {"a": 1, "b": -1}, -5), ("a < b - 5", {"a": -1, "b": 1}, 5),
    ("a < b + 5", {"a": -1, "b": 1}, -5), ("a - b > c - d", {"a": 1, "b": -1, "c": -1, "d": 1}, 0),
    ("a < b - c - 0.5", {"a": -1, "b": 1, "c": -1}, 0.5),
    ("a - b > c", {"a": 1, "b": -1, "c": -1}, 0), ("a > b - c", {"a": 1, "b": -1, "c": 1}, 0),
    ("a - c > b - c", {"a": 1, "b": -1}, 0)])
def test_claims_are_read(tmp_path, test, weights, margin):
    """Weights and margin say: the weighted sum is claimed to be above the margin."""
    (tmp_path / "x.yaml").write_text(
        "scales: {smoke: , full: }\nrows: {a: , b: , c: , d: }\nheadline: ['{a,b}']\n"
        f'claims: {{c: {{test: "{test}", where: ours, text: t, scales: [full]}}}}')
    declared = read_declared(tmp_path / "x.py")
    claim = declared["claims"]["c"]
    assert (claim["weights"], claim["margin"]) == (weights, margin)
    assert isinstance(claim["margin"], float) and claim["ours"] and claim["scales"] == ["full"]
    assert declared["headline"] == ["a", "b"] and declared["figures"] == {}


@pytest.mark.parametrize("text", [
    'claims: {c: {test: "a >= b"}}', 'claims: {c: {test: "a > a", where: w, text: t}}',
    'claims: {c: {test: "a > b + a", where: w, text: t}}', "headline: [z]", "figures: [1]",
    'claims: {c: {test: "a > b", where: w, text: t, scales: [none]}}',
    'claims: {c: {test: "a > z"}}', "claims: {c: 3}", "rows: [a, b]", "rows: {a: [", "- 1", "",
    "curves: {c: {lines: {l: [[1, z]]}}}", "curves: {c: {lines: {l: {row: z}}}}"])
def test_what_makes_no_sense_names_the_file(tmp_path, text):
    (tmp_path / "x.yaml").write_text(
        ("" if "rows" in text else "rows: {a: , b: }\n") * (len(text) > 4) + text)
    with pytest.raises(InputError, match="x.yaml"):
        read_declared(tmp_path / "x.yaml")


def test_the_hash_of_the_code_covers_script_and_shared_files(tmp_path):
    (tmp_path / "replicate").mkdir()
    files = [tmp_path / "x.py", *(tmp_path / "replicate" / name for name in records.SHARED)]
    for file in files:
        file.write_text("one")
    seen = {records.code_hash(files[0], tmp_path)}
    for file in files:
        file.write_text("two")
        seen.add(records.code_hash(files[0], tmp_path))
    assert len(seen) == 1 + len(files) and all(len(digest) == 12 for digest in seen)
    assert set(records.provenance(tmp_path / "x.py")) == {"code", "commit", "dirty", "started"}


def test_the_commit_is_of_this_repository_whatever_lies_around_it(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b",
                        *words], check=True, capture_output=True)
    git("init")
    git("commit", "--allow-empty", "-m", "homework")
    own = records.provenance(tmp_path / "x.py")["commit"]
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert records.provenance(tmp_path / "x.py")["commit"] == own
    monkeypatch.setattr(records, "ROOT", tmp_path / "six papers")
    records.ROOT.mkdir()
    assert records.provenance(tmp_path / "x.py")["commit"] is None
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.provenance(tmp_path / "x.py")["commit"] not in (None, own)


def test_records_may_be_shared_as_the_users_mask_says(tmp_path):
    before = os.umask(0o002)
    try:
        records.append(tmp_path / "a.jsonl", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.jsonl").stat().st_mode & 0o777 == 0o664


@pytest.mark.parametrize("text,message", [
    ("rows: {a: {where: 4.1}}", "where: a text"), ("rows: {a: {unit: [5]}}", "unit: a text"),
    ("figures: {filters: 5}", "figures: name: a text"), ("names: {a: 5}", "names: name: a text"),
    ("rows: {a: }\ncurves: {c: {title: t, x: x, y: y, caption: 5, lines: {l: [[1, a]]}}}",
     "perhaps caption"),
    ("rows: {a: , b: }\nclaims: {c: {test: a > b, where: x, text: y}, c: {}}", "'c' comes twice"),
    ("rows:\n  a:\n  a:\n", "'a' comes twice"),
    ("rows: {'a{1,2}': , a2: }", "row 'a2' comes twice"),
])
def test_what_pages_could_not_show_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=f"x.yaml is not of the right shape .*{message}"):
        read_declared(tmp_path / "x.yaml")
