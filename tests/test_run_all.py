"""run_all.sh as a user calls it: from elsewhere, with spaces in the path, without a network."""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["gidaris_rotation", "--rows", "random/block2/knn"]


# This Python first on the PATH, and no data set in reach
ENVIRONMENT = {**os.environ,
               "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
               "REPLICATE_DATA": "/nonexistent"}


def run_all(*arguments, folder=ROOT, cwd=None, prefix=(), **environment):
    """Run the script to its end; returns the finished process."""
    return subprocess.run([*prefix, str(folder / "run_all.sh"), *arguments], cwd=cwd or folder,
                          text=True, capture_output=True,
                          timeout=300, env={**ENVIRONMENT, **environment})


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the code in a folder with spaces in its name."""
    target = tmp_path_factory.mktemp("a clone with spaces") / "my repository"
    for part in ("replicate", "papers", "run_all.sh", "requirements.txt"):
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / part)
    return target


def test_smoke_from_another_folder_with_spaces_and_no_network(clone, tmp_path):
    (tmp_path / "papers").mkdir()  # of another project
    (tmp_path / "papers" / "gidaris_rotation.py").write_text("raise SystemExit(9)")
    prefix = ("unshare", "-rn")
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"],
                                                     capture_output=True).returncode:
        pytest.skip("no way to switch the network off here")
    result = run_all("smoke", *QUICK, folder=clone, cwd=tmp_path, prefix=prefix)
    assert result.returncode == 0, result.stderr
    # everything lands beside run_all.sh
    assert [path.name for path in tmp_path.rglob("*")] == ["papers", "gidaris_rotation.py"]
    table = (clone / "results" / "smoke" / "gidaris_rotation.md").read_text()
    assert "random/block2/knn" in table and "not run" in table
    assert run_all("tables", "--check", folder=clone, cwd=tmp_path).returncode == 0
    again = run_all("smoke", *QUICK, folder=clone)
    assert "nothing to do" in again.stdout


def test_without_a_scale_it_picks_one_and_says_so(clone, tmp_path):
    (tmp_path / "data" / "packed").mkdir(parents=True)
    # there, as far as choosing goes
    (tmp_path / "data" / "packed" / "cifar10.npz").write_bytes(b"")
    result = run_all("plan", *QUICK, folder=clone, REPLICATE_DATA=str(tmp_path / "data"),
                     CUDA_VISIBLE_DEVICES="")
    assert "scale small: no CUDA GPU in use" in result.stderr
    assert "cifar10 (on disk)" in result.stderr
    result = run_all("--data", "embedded", "--plan", *QUICK, folder=clone, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0 and "scale small" in result.stderr
    assert "minutes a seed" in result.stdout


@pytest.mark.parametrize("arguments,message", [
    (["tiny"], "unknown scale or paper 'tiny'"), (["smoke", "gidaris_rotation", "--colour"],
                                                  "unrecognized arguments: --colour"),
    (["smoke", "gidaris_rotation", "--rows"], "--rows: expected one argument"),
    (["smoke", "gidaris_rotation", "--seeds", "x"], "--seeds takes whole numbers"),
    (["--data", "/does/not/exist"], "no data folder /does/not/exist"),
    (["smoke", "--jobs", "0"], "--jobs takes a whole number from 1"),
])
def test_wrong_words_are_named(clone, arguments, message):
    result = run_all(*arguments, folder=clone)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_help_lists_the_commands():
    result = run_all("--help")
    assert result.returncode == 0
    for word in ("plan", "tables", "test", "bench", "--rows", "--force"):
        assert word in result.stdout


def test_a_script_that_is_added_is_found(clone):
    (clone / "papers" / "zz_seventh.py").write_text("raise SystemExit(3)\n")
    (clone / "papers" / "zz_seventh.yaml").write_text("scales: {smoke: }\n")
    try:
        # no paper named: it takes all that it finds
        result = run_all("smoke", *QUICK[1:], folder=clone)
        assert result.returncode == 3 and result.stderr.strip().endswith("zz_seventh (seed 0)")
        assert "gidaris_rotation" in result.stdout  # a failing paper does not stop the others
    finally:
        (clone / "papers" / "zz_seventh.py").unlink()
        (clone / "papers" / "zz_seventh.yaml").unlink()


def test_jobs_run_side_by_side_with_their_share_of_the_cores(clone, tmp_path):
    """A script that says when it starts and ends; its seed 1 fails, and with wrong input later
    seeds are not tried."""
    log = tmp_path / "log"
    (clone / "papers" / "zz_eighth.py").write_text(
        "import os, sys, time\n"
        "seed = sys.argv[sys.argv.index('--seeds') + 1]\n"
        "def say(word):\n"
        f"    with open({str(log)!r}, 'a') as file:\n"
        "        file.write(f\"{word} {seed} {os.environ['OMP_NUM_THREADS']}\\n\")\n"
        "say('start'), time.sleep(3), say('end')\n"
        "raise SystemExit({'1': 3, '3': 2}.get(seed, 0))\n")
    (clone / "papers" / "zz_eighth.yaml").write_text("scales: {smoke: }\n")
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "OMP_NUM_THREADS"}
    try:
        result = subprocess.run([str(clone / "run_all.sh"), "smoke", "zz_eighth", "--seeds",
                                 "0,1,2,3,4,5", "--jobs=2"], text=True,
                                capture_output=True, timeout=120, env=environment, cwd=tmp_path)
    finally:
        (clone / "papers" / "zz_eighth.py").unlink()
        (clone / "papers" / "zz_eighth.yaml").unlink()
    words = [line.split() for line in log.read_text().splitlines()]
    assert [word for word, *_ in words[:4]] == ["start", "start", "end", "end"]
    assert {threads for *_, threads in words} == {str(max(1, os.cpu_count() // 2))}
    seeds = {seed for _, seed, _ in words}
    assert seeds >= {"0", "1", "2", "3"} and "5" not in seeds
    assert result.returncode != 0
    assert "zz_eighth (seed 1)" in result.stderr and "zz_eighth (seed 3)" in result.stderr


def test_options_with_equal_signs_and_the_device_reach_the_choice(clone, tmp_path):
    (tmp_path / "data" / "packed").mkdir(parents=True)
    (tmp_path / "data" / "packed" / "cifar10.npz").write_bytes(b"")
    result = run_all(f"--data={tmp_path / 'data'}", "--device=cpu", "--rows=nothing",
                     "gidaris_rotation", folder=clone)
    assert "scale small" in result.stderr and result.returncode == 2
    assert "no row matches 'nothing'" in result.stderr
    result = run_all("--set=dataset=embedded", "--rows=nothing", "gidaris_rotation", folder=clone)
    assert "embedded (on disk)" in result.stderr


def test_a_terminated_run_all_takes_its_child_along(clone, tmp_path):
    command = [str(clone / "run_all.sh"), "smoke", "gidaris_rotation", "--set", "conv_epochs=500",
               "--rows", "random/conv", "--runs", str(tmp_path)]
    environment = {**ENVIRONMENT, "REPLICATE_CHECKPOINT_SECONDS": "0"}
    for attempt in range(2):
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=environment)
        try:
            mark, deadline = [path.stat().st_mtime_ns
                              for path in tmp_path.rglob("*.pt")], time.time() + 120
            while [path.stat().st_mtime_ns
                   for path in tmp_path.rglob("*.pt")] == mark and time.time() < deadline:
                time.sleep(0.01)
            process.terminate()
            output, error = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130 and "interrupted: the same command goes on" in error
    assert "resumed at step" in output
