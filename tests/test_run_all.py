"""run_all.sh as a user calls it: from elsewhere, with spaces in the path, without a network."""
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from conftest import write_folder
from PIL import Image

from replicate import records, report, terminal

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
    table = (clone / "out" / "smoke" / "gidaris_rotation.md").read_text()
    assert "random/block2/knn" in table and "not run" in table and not (clone / "results").exists()
    check = ("tables", "--check", "--results", str(clone / "out"))
    assert run_all(*check, folder=clone, cwd=tmp_path).returncode == 0
    again = run_all("smoke", *QUICK, folder=clone)
    assert "nothing to do" in again.stdout
    *_, page, _, everything, following = again.stdout.splitlines()
    assert page.strip() == "out/smoke/gidaris_rotation.md"
    assert everything == "All pages: out/README.md" and following.startswith("Next: ./run_all.sh ")


def test_a_link_to_it_works_in_any_shell_and_folder(clone, tmp_path):
    for name in ("types.py", "tokenize.py", "pip.py"):  # which Python would take for its own
        (tmp_path / name).write_text("raise SystemExit(9)")
    (tmp_path / "ra").symlink_to(clone / "run_all.sh")
    for prefix in ((), ("sh",)):
        command = [*prefix, str(tmp_path / "ra"), "smoke", "dann", "--rows", "nope"]
        done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300,
                              env={**ENVIRONMENT, "CDPATH": f".:{clone.parent}"})
        assert done.returncode == 2 and "no row matches 'nope'" in done.stderr.splitlines()[0]
    assert not (tmp_path / ".venv").exists() and not (clone / ".venv").exists()


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A made-up project with two papers, of which one has a scale demo and records."""
    monkeypatch.setattr(terminal, "ROOT", tmp_path)
    (tmp_path / "papers").mkdir()
    for name, scales in (("one", "{smoke: , demo: , small: , full: }"),
                         ("two", "{smoke: , full: }")):
        (tmp_path / f"papers/{name}.py").write_text("")
        (tmp_path / f"papers/{name}.yaml").write_text(f"""
title: "Somebody (2020): {name}."
scales: {scales}
headline: [a, b]
rows: {{a: {{paper: 80, where: x}}, b: {{where: y}}}}
claims: {{c: {{test: a > b, where: x, text: A beats b}}}}
""")
    for suite, part, shift in (("demo", "results", 0), ("demo", "out", 1), ("small", "results", 0)):
        for seed in range(3):
            for row, value in (("a", 70), ("b", 60)):
                seconds = {"demo": 10.0, "small": 3600.0}[suite] * (3 if part == "out" else 1)
                seconds += 0.2 * (row == "b")
                records.append(tmp_path / part / suite / "one.jsonl", {
                    "row": row, "seed": seed, "value": value + seed + shift, "status": "ok",
                    "code": records.code_hash(tmp_path / "papers/one.py"),
                    "config_hash": "h", "config": {}, "seconds": seconds, "trainings": {},
                    "data": {"cifar10": "1"} if suite == "small" else {}})
    return tmp_path


def test_without_a_scale_it_is_demo_or_full_with_a_gpu_and_the_data(demo, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    root = str(tmp_path)
    scale, reason = terminal.choose_scale(["one", "two"], root)
    assert scale == "demo" and "no CUDA GPU" in reason and "two, which has no such" in reason
    assert terminal.choose_scale(["two"], root)[0] == "smoke"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    scale, reason = terminal.choose_scale(["one"], root)
    assert scale == "demo" and f"cifar10 not in {root}" in reason  # nothing is downloaded unasked
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/cifar10.npz").write_bytes(b"")  # there, as far as choosing goes
    scale, reason = terminal.choose_scale(["one"], root)
    assert scale == "full" and "the data are there: cifar10" in reason
    assert terminal.choose_scale(["one"], root, "cpu")[0] == "demo"
    assert terminal.choose_scale(["one"], "", "auto", "embedded")[0] == "demo"
    assert terminal.choose_scale(["one"], "", "auto", "folder:x")[0] == "full"
    with pytest.raises(SystemExit) as stopped:
        terminal.main(["scale", "one", "--data", str(tmp_path / "none")])
    assert stopped.value.code == 2


def test_the_summary_says_how_yours_lie_and_what_comes_next(demo, monkeypatch, capsys):
    monkeypatch.setenv("REPLICATE_DATA", str(demo))
    monkeypatch.chdir(demo)
    ledger = demo / "ledger"
    for _ in range(2):  # seed by seed
        records.append(ledger, {"paper": "one", "scale": "demo", "rows": 0, "seconds": 0.0,
                                "suite": str(demo / "out" / "demo")})
    assert terminal.main(["end", str(ledger)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "", "Somebody (2020)",
        "a 72.00 ± 1.00 (3) paper 80 reference 71.00 ± 1.00 (3), yours inside its spread",
        "b 62.00 ± 1.00 (3) paper – reference 61.00 ± 1.00 (3), yours inside its spread",
        "the paper's claims: 1 reproduced, 0 contradicted, 0 open (reference: 1 / 0 / 0)",
        "out/demo/one.md", "", "All pages: out/README.md",
        # two hours where the reference was made, on a machine that is three times as slow
        "Next: ./run_all.sh small one: about 6.0 hours a seed on this machine, 170 MB to download"]


def test_one_seed_is_no_verdict_and_the_same_code_gives_the_same_digits(demo):
    path = demo / "out/demo/one.jsonl"
    lines = (demo / "results/demo/one.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))  # seed 0's
    view, _ = report.look(path.parent, "one", demo / "papers",
                          report.reference_of(path.parent, demo / "papers"))
    _, row, _, claims, _ = terminal.paper_lines(view)
    assert row.endswith(", yours equal to it, seed by seed")
    assert claims.endswith("; no verdict yet, 1 of 3 seeds are in")


def test_a_run_says_how_long_the_reference_took(demo):
    run = types.SimpleNamespace(suite=demo / "out/demo", paper="one")
    def said(*rows):
        return terminal.time_of_reference(run, rows, demo / "papers")
    assert said("a", "b") == ", 0.3 min for the reference"
    run.suite = demo / "out/full"
    assert said("a") == ""


def test_a_plan_sums_up_trainings_once_and_stays_short():
    class Run:
        paper, sha256 = "one", {"cifar10": "abc"}
        costs = [(["rotnet/x", "rotnet/y"], 30.0, {"rotnet": 600.0}, 800.0),
                 (["rotnet/z"], 60.0, {"rotnet": 600.0, "head": 60.0}, 900.0),
                 *[([f"other{number}"], 6.0, {}, 100.0) for number in range(9)]]
    first, *lines = terminal.plan_lines(Run, 7)
    assert first == "one on cifar10: 12 rows to do, 7 recorded already, 13.4 min a seed"
    assert [line.split() for line in lines[:2]] == [
        ["rotnet", "3", "rows", "12.5", "min", "900", "MB"],
        ["other0", "1", "row", "0.1", "min", "100", "MB"]]
    assert lines[-1].split() == ["6", "other", "groups", "6", "rows", "0.6", "min", "100", "MB"]
    assert len(lines) == terminal.GROUPS
    notes = [{"paper": name, "seconds": 804.0, "rows": 12} for name in ("one", "two")]
    assert terminal.sum_up_plan(notes, ["one"] * 3 + ["two"] * 2)[0].startswith(
        "in all: 24 rows, 26.8 min for one seed each, 67.0 min for all 5 seeds,")
    assert terminal.sum_up_plan(notes, ["one", "two"])[0].startswith(
        "in all: 24 rows, 26.8 min for one seed each, one after")


def test_a_terminal_that_knows_only_ascii_shows_everything(demo, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(records, "ROOT", demo)
    records.append(demo / "ledger", {"paper": "one", "scale": "demo", "rows": 0, "seconds": 0.0,
                                     "suite": str(demo / "out" / "demo")})
    assert terminal.main(["end", str(demo / "ledger")]) == 0
    shutil.copytree(demo / "out", demo / "d\u00e9mo")
    assert report.main(["--results", str(demo / "d\u00e9mo")]) == 0
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue()
    assert b"72.00 \\xb1 1.00" in printed and b"wrote d\\xe9mo/README.md" in printed


def test_papers_take_turns_through_the_seeds_that_they_declare(tmp_path, monkeypatch):
    (tmp_path / "papers").mkdir()
    for name, small in (("one", "{seeds: [0, 1, 2, 3]}"), ("two", "{}"), ("three", "{seeds: [7]}")):
        (tmp_path / "papers" / f"{name}.yaml").write_text(
            f"scales: {{small: {small}}}\nrows: {{}}\n")
    monkeypatch.setattr(terminal, "ROOT", tmp_path)
    assert terminal.turns(["one", "two", "three"], "small") == [
        "one 0", "two 0", "three 7", "one 1", "two 1", "one 2", "two 2", "one 3"]


@pytest.mark.parametrize("arguments,message", [
    (["tiny"], "unknown scale or paper 'tiny'"), (["smoke", "gidaris_rotation", "--colour"],
                                                  "unrecognized arguments: --colour"),
    (["smoke", "gidaris_rotation", "--rows"], "--rows takes a value"),
    (["smoke", "--colour"], "unknown option '--colour'"),
    (["smoke", "--colour=3"], "unknown option '--colour'"),
    (["smoke", "gidaris_rotation", "--seeds", "x"], "--seeds takes whole numbers"),
    (["--data", "/does/not/exist"], "no data folder /does/not/exist"),
    *((["smoke", "--jobs", jobs], "--jobs takes a whole number from 1")
      for jobs in ("0", "00", "08", "9" * 20)),
    *((["smoke", "--seeds", seeds], f"such as 0,1,2, not '{seeds}'")
      for seeds in ("*", ",", "", "0,")),
    (["smoke", "../papers/swav"], "unknown scale or paper '../papers/swav'"),
    (["--scale", "foo"], "unknown scale 'foo'"), (["smoke", "--data", "/none"], "no data folder"),
    (["smoke", "--device", "tpu"], "--device: invalid choice: 'tpu'"),
    (["tables", "--results", ""], "--results"),
    (["smoke", "--results", "/proc/x"], "cannot write to /proc/x"),
    (["smoke", "zhang_colorization", "--colorize", "a.png", "b.png"], "no picture or folder a.png"),
])
def test_wrong_words_are_named_once(clone, arguments, message):
    result = run_all(*arguments, folder=clone)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_paper_or_seed_named_twice_runs_once(clone, tmp_path):
    result = run_all("smoke", "gidaris_rotation", *QUICK, "--seeds=0,0", "--jobs=2",
                     "--results", str(tmp_path / "o"), "--runs", str(tmp_path / "r"), folder=clone)
    assert result.returncode == 0 and "going on in another" not in result.stderr
    assert result.stdout.count("seed 0: 1 row to do") == 1


def test_a_plan_that_fails_has_no_sum(clone):
    result = run_all("plan", "smoke", "dann", "--rows", "nothing", folder=clone)
    assert result.returncode == 2 and "in all" not in result.stdout


def test_a_temporary_folder_that_is_not_there_is_named(clone):
    result = run_all("smoke", *QUICK, folder=clone, TMPDIR="/nonexistent")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "no file can be made in /nonexistent: make room, or set TMPDIR" in result.stderr


@pytest.mark.parametrize("torch_there", [None, "2.10.0", "1000.0"])
def test_a_python_without_pip_will_do_and_what_it_lacks_is_said(clone, tmp_path, torch_there):
    """A virtual environment that sees this Python's packages, or another version of torch."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "own"], check=True)
    (site,) = (tmp_path / "own").glob("lib/*/site-packages")
    if torch_there:
        (site / f"torch-{torch_there}.dist-info").mkdir()
        (site / f"torch-{torch_there}.dist-info/METADATA").write_text(
            f"Metadata-Version: 2.1\nName: torch\nVersion: {torch_there}+cpu\n")
    (site / "others.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    result = run_all("demo", "dann", "--rows=nothing", "--seeds=0", folder=clone,
                     PATH=f"{tmp_path / 'own/bin'}{os.pathsep}/usr/bin{os.pathsep}/bin",
                     PIP_INDEX_URL="http://127.0.0.1:1", PIP_RETRIES="0", PYTHON="")
    assert result.returncode == 2
    if torch_there:
        wanted = f"python3 lacks torch=={torch.__version__.split('+')[0]} (there: {torch_there})"
        assert wanted in result.stdout and "could not be installed" in result.stderr
        shutil.rmtree(clone / ".venv")
    else:
        assert "no row matches" in result.stderr and "lacks" not in result.stdout


def test_help_lists_the_commands():
    result = run_all("--help")
    assert result.returncode == 0
    for word in ("plan", "tables", "test", "bench", "--rows", "--force"):
        assert word in result.stdout
    assert run_all("--results", "x", "--help").stdout == result.stdout
    own = run_all("swav", "--help", "smoke")  # a script's own options
    assert own.returncode == 0 and "--evaluate FILE" in own.stdout


def test_files_that_make_no_paper_are_none_and_a_wrong_one_stops_no_other(clone):
    papers, dann = clone / "papers", (ROOT / "papers/dann.yaml").read_text()
    added = [papers / name for name in ("dann_old.yaml", "my dann.yaml", "alone.py", "wrong.py",
                                        "wrong.yaml")]
    for path in added:
        path.write_text(dann if path.suffix == ".yaml" else "from papers.dann import *\n")
    (papers / "wrong.yaml").write_text("rows: {a: {where: 4.1}}\nscales: {smoke: }\n")
    (papers / "wrong.py").write_text(
        (papers / "dann.py").read_text().replace('"dann"', '"wrong"'))
    try:
        help = run_all("--help", folder=clone).stdout
        result = run_all("smoke", "wrong", *QUICK, folder=clone)
    finally:
        for path in added:
            path.unlink()
    assert "dann_old" not in help and "my" not in help.partition("Scripts:")[2].split()
    assert result.returncode == 2 and "wrong.yaml is not of the right shape" in result.stderr
    assert "of gidaris_rotation are in" in result.stdout or "gidaris_rotation, sc" in result.stdout


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
        "print(os.environ['REPLICATE_TURN'])\n"
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
    assert all(f"run {number} of 6: " in result.stdout for number in (1, 2, 3, 4))
    assert result.returncode != 0
    assert "zz_eighth (seed 1)" in result.stderr and "zz_eighth (seed 3)" in result.stderr


def test_options_with_equal_signs_and_the_device_reach_the_choice(clone, tmp_path):
    result = run_all(f"--data={tmp_path}", "--device=cpu", "--rows=nothing", "gidaris_rotation",
                     folder=clone)
    assert "no CUDA GPU in use" in result.stderr and result.returncode == 2
    assert "no row matches 'nothing'" in result.stderr
    result = run_all("--set=dataset=embedded", "--rows=nothing", "gidaris_rotation", folder=clone)
    assert "drawn images were asked for" in result.stderr


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


@pytest.mark.parametrize("seconds", [0.3, 1, 2])
def test_ctrl_c_while_a_script_loads_its_packages(tmp_path, seconds):
    process = subprocess.Popen([sys.executable, "-m", "papers.swav", "--scale", "smoke", "--rows",
                                "random/linear", "--results", str(tmp_path)], cwd=ROOT,
                               env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)  # Python itself was not ready
    assert "Traceback" not in error and len(error.splitlines()) <= 1


@pytest.mark.parametrize("words", [["-m", "papers.dann", "--scale", "smoke"],
                                   ["-m", "replicate.terminal", "turns", "demo", "dann"]])
def test_a_torch_that_does_not_load_gets_one_line(tmp_path, words):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so: cannot open')\n")
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, capture_output=True,
                          env={**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
                               "PYTHONSAFEPATH": "1"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "cannot be loaded (libcudart.so: cannot open): mend it" in done.stderr


@pytest.mark.parametrize("seconds", [0.5, 5])  # while Python is looked at; while torch is loaded
def test_ctrl_c_is_heard_from_the_beginning(clone, tmp_path, seconds):
    command = [str(clone / "run_all.sh"), "smoke", "doersch_context", "--results", str(tmp_path)]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True,  # the tests may run where it is ignored
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    try:
        output, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in error
    assert not list(tmp_path.rglob("*.jsonl"))


# Every command of README, on tiny copies of the scales
KEPT = {"gidaris_rotation": ["random/conv", "rotnet4/conv"], "swav": ["swav/knn20"],
        "zhang_colorization": ["full/auc-raw"],
        "dann": ["mnist-mnistm/source-only", "own/source-only"], "mirrored": ["*"]}
ELSEWHERE = {"./run_all.sh bench": "test_bench.py"}


def commands_of(readme):
    """The lines of its blocks of commands: those that name no language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.M | re.S)
    return [line for language, block in fences if not language for line in block.splitlines()]


def test_every_command_of_the_readme_runs(clone, tmp_path, seventh):
    folder = tmp_path / "clone"
    shutil.copytree(clone, folder, ignore=shutil.ignore_patterns("out", "runs"))
    shutil.copy(ROOT / "README.md", folder)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_x.py").write_text("def test_x():\n    pass\n" * 4)
    (folder / "results").mkdir()
    for suffix in (".py", ".yaml"):
        shutil.copy(Path(seventh.__file__).with_suffix(suffix), folder / "papers")
    for path in (folder / "papers").glob("*.yaml"):
        if path.stem not in KEPT:
            path.unlink()
            continue
        declared = yaml.safe_load(path.read_text())
        tiny = {**declared["scales"]["smoke"], "rows": KEPT[path.stem], "seeds": [0],
                "shards": 2}  # README's torchrun has two ranks here
        declared["scales"] = dict.fromkeys(("smoke", "demo", "small", "full", "paper"), tiny)
        path.write_text(yaml.safe_dump(declared, sort_keys=False))
    for name, level in (("pictures", 0), ("photos", 0), ("sketches", 60)):
        write_folder(folder / name, counts=(400, 20), size=(20, 24), level=level)
    Image.new("RGB", (40, 30), "gray").save(folder / "old_photo.jpg")
    torch.save(torchvision.models.resnet18().state_dict(), folder / "resnet18.pth")
    python = shlex.quote(sys.executable)
    tiny = {"torchrun": "python -m torch.distributed.run --standalone", "node=8": "node=2",
            "python -m": f"{python} -m", " DIR": " .", "epochs=3": "epochs=0.2",
            "width=0.25": "width=0.11",
            "--export": "--set network=resnet18 --set width=1 --set pretext_epochs=0.03 --export"}
    found = commands_of((ROOT / "README.md").read_text())
    assert len(found) > 15
    for command in found:
        if command in ELSEWHERE:
            assert (ROOT / "tests" / ELSEWHERE[command]).exists()
            continue
        short = command
        for long, brief in tiny.items():
            short = short.replace(long, brief)
        if command != found[0] and re.fullmatch(r"./run_all.sh (plan )?small( --jobs 2)?", short):
            short += " mirrored"  # the first command has run all of them
        if re.match(r"./run_all.sh(?! test| tables| plan)", short) and "--seeds" not in short:
            short += " --seeds 0"
        start = time.time()
        done = subprocess.run(short, shell=True, cwd=folder, text=True, capture_output=True,
                              timeout=400, env={**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""})
        print(f"{time.time() - start:6.1f} s  {short}", flush=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (folder / "colored.png").exists() and (folder / "swav.pt").exists()
    suites = {path.parent.name for path in (folder / "out").glob("*/*.jsonl")}
    assert {"demo", "small", "small-custom", "paper"} <= suites
