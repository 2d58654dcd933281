"""The benchmark runs through, and its page follows from its lines."""
import json
import os
import subprocess
import sys

import pytest

import bench
import bench_page
from conftest import ROOT


@pytest.mark.parametrize("words,message", [
    (["nope"], "unknown scale nope"), (["smoke", "nope"], "unknown paper nope"),
    (["smoke", "--nope"], "unrecognized arguments"),
    (["smoke", "--results", "/proc/x"], "another place with --results DIR")])
def test_wrong_words_are_named(capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        bench.main(words)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


def test_the_smallest_benchmark_measures_everything(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, bench.__file__, "smoke", "--quick", "--results",
                           str(tmp_path)], env=environment, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    steps = {(line["paper"], line["training"]): line for line in lines if line["measure"] == "step"}
    assert set(bench_page.MAIN.items()) <= steps.keys()
    for line in steps.values():
        assert 0.2 < line["overhead"][0] < 20 and 0 < line["arithmetic"][0] < 2
    assert {paper for (paper, _), line in steps.items() if "idiomatic" in line} == {
        "gidaris_rotation", "swav", "zhang_colorization"}
    assert {line["paper"] for line in lines if line["measure"] == "growth"} == set(bench_page.MAIN)
    assert {line["what"] for line in lines if line["measure"] == "start"} == {
        "import torch", "--help", "first step"}
    assert sum(line["measure"] == "protocol" for line in lines) == 2
    page = (tmp_path / "BENCH.md").read_text()
    with (tmp_path / "bench.jsonl").open("a") as file:
        file.write('{"measure": "st\n[]\n')  # cut by a full disk, or another's
    assert page == bench_page.render(tmp_path / "bench.jsonl") and page in done.stdout
    for paper in bench_page.MAIN:
        assert f"| {paper} |" in page


def test_the_committed_page_follows_from_its_lines():
    lines = ROOT / "results" / "bench.jsonl"
    if lines.exists():
        assert (ROOT / "results" / "BENCH.md").read_text() == bench_page.render(lines)


@pytest.mark.parametrize("words,message", [
    (["smoke", "colors"], "unknown paper colors"), (["tiny"], "unknown scale tiny")])
def test_wrong_words_are_named(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
