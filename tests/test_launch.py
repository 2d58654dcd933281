"""The command line as a user meets it: refusals, failures, folders that are full, plans."""
import dataclasses
import errno
import fcntl
import math
import os
import subprocess
import sys
import types

import pytest
import torch

from conftest import write_folder
from PIL import Image

from replicate import launch, records, trainer
from replicate.records import ROOT, InputError


@pytest.mark.parametrize("arguments,message", [
    (["--scale", "tiny"], "unknown scale 'tiny'; known: smoke, demo, small, full, paper"),
    (["--rows", "nothing"], "no row matches 'nothing'"),
    (["--seeds", "-1"], "seed -1: seeds start at 0"), (["--seeds", "9" * 30], "and end before"),
    (["--seeds", "a"], "--seeds takes whole numbers"),
    (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
    (["--set", "batch_size=0"], "batch_size must be above 0"),
    (["--set", "width=1"], "at least 4 channels"),
    (["--data", "/does/not/exist"], "no data folder /does/not/exist"),
    (["--colour"], "unrecognized arguments: --colour"),
    (["--set", "dataset=nothing"], "unknown data set 'nothing'"),
    (["--set", "pretext_epochs=1e13"], "pretext_epochs must be below"),
    (["--set", "batch_size=1_0"], "batch_size must be of type int, not '1_0'"),
    (["--set", "pretext_epochs=1_0.5"], "pretext_epochs must be of type float"),
    (["--set", "pretext_epochs=0.00001", "--rows", "mirrored/*"], "a longer budget is needed"),
    (["--set", "pretext_drops=[30, 60]"], "rising fractions"),
    (["--rows"], "--rows: expected one argument"), (["--scale", ""], "--scale is empty"),
    (["--data="], "--data is empty"), (["--seeds", ""], "--seeds is empty"),
])
def test_wrong_input_gets_one_line_and_leaves_nothing(tmp_path, seventh, capsys, folders,
                                                      arguments, message):
    assert seventh.main(["--scale", "smoke", *arguments, *folders]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert not [path for kind in ("jsonl", "pt", "partial") for path in tmp_path.rglob(f"*.{kind}")]


@pytest.mark.parametrize("failure", [errno.EWOULDBLOCK, errno.ENOSYS])
def test_only_a_lock_that_is_held_means_another_process(tmp_path, seventh, capsys, folders,
                                                        monkeypatch, failure):
    def flock(*arguments):
        raise OSError(failure, "no")
    monkeypatch.setattr("fcntl.flock", flock)
    held = failure == errno.EWOULDBLOCK
    assert seventh.main(["--scale", "smoke", "--rows", "random/*", *folders]) == 2 * held
    captured = capsys.readouterr()
    assert ("is going on in another" in captured.err) == held
    assert ("note: no lock" in captured.out) != held


def test_a_records_file_that_cannot_be_written_is_known_before_the_training(
        tmp_path, seventh, capsys, folders):
    (tmp_path / "results/smoke/mirrored.jsonl").mkdir(parents=True)  # as good as another user's
    assert seventh.main(["--scale", "smoke", *folders]) == 2
    error = capsys.readouterr().err
    assert "mirrored.jsonl" in error and len(error.splitlines()) == 1
    assert not list(tmp_path.rglob("*.pt"))


def test_a_ledger_that_cannot_be_written_fails_no_run(tmp_path, seventh, folders, monkeypatch):
    monkeypatch.setenv("REPLICATE_LEDGER", "/dev/full")
    assert seventh.main(["--scale", "smoke", "--rows", "random/*", *folders]) == 0
    assert (tmp_path / "results/smoke/mirrored.md").exists()


def test_a_user_without_a_name_or_temporary_folder_can_run(tmp_path):
    code = ("import getpass, tempfile\n"
            "def fail(*_): raise KeyError('getpwuid(): uid not found: 12345')\n"
            "getpass.getuser = fail\n"
            "def none(): raise FileNotFoundError(2, 'No usable temporary directory found')\n"
            "tempfile.gettempdir = none\n"
            "from papers import gidaris_rotation\n"
            "raise SystemExit(gidaris_rotation.main())")
    environment = {name: value for name, value in os.environ.items()
                   if name != "TORCHINDUCTOR_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code, "--scale", "smoke", "--rows", "random/block2/knn",
         "--results", str(tmp_path), "--runs", str(tmp_path)], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_no_cuda_is_said(monkeypatch, seventh, capsys, folders):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert seventh.main(["--scale", "smoke", "--device", "cuda", *folders]) == 2
    assert "no CUDA GPU is visible" in capsys.readouterr().err


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "many"}, {"WORLD_SIZE": "2", "RANK": "0"},
    {"WORLD_SIZE": "2", "RANK": "a", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}])
def test_ranks_that_cannot_meet_are_said(monkeypatch, seventh, capsys, folders, environment):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert seventh.main(["--scale", "smoke", *folders]) == 2
    error = capsys.readouterr().err
    if environment.get("RANK") != "a":  # another rank says it
        assert "the ranks cannot be set up" in error and len(error.splitlines()) == 1
    assert not torch.distributed.is_initialized()


def test_a_rank_that_is_alone_says_what_is_wrong(monkeypatch, seventh, capsys, folders):
    monkeypatch.setenv("RANK", "1")  # left over in the environment
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert seventh.main(["--scale", "smoke", "--rows", "nope", *folders]) == 2
    assert "no row matches 'nope'" in capsys.readouterr().err


def test_more_ranks_than_gpus_are_said(monkeypatch, seventh, capsys, folders):
    def too_many(device):
        raise RuntimeError("CUDA error: invalid device ordinal\nmore")

    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", too_many)
    assert seventh.main(["--scale", "smoke", *folders]) == 2
    error = capsys.readouterr().err
    assert "invalid device ordinal" in error and len(error.splitlines()) == 1


def test_a_finished_row_is_not_run_again_unless_forced(tmp_path, seventh, capsys, folders, tiny,
                                                       records_of):
    for arguments, count in (([], 2), ([], 2), (["--force"], 4)):
        assert seventh.main([*tiny, *folders, *arguments]) == 0
        assert len(records_of(tmp_path / "results")) == count
        assert ("nothing to do" in capsys.readouterr().out) == (
            count == 2 and (tmp_path / "seen").exists())
        (tmp_path / "seen").touch()
    first, second = records_of(tmp_path / "results")[:2], records_of(tmp_path / "results")[2:]
    assert first == second  # trained anew, the same to the last digit


def diverge(monkeypatch, script):
    """Make the loss of a script infinite."""
    own = script.F.cross_entropy
    monkeypatch.setattr(script, "F", types.SimpleNamespace(
        cross_entropy=lambda *arguments: own(*arguments) * math.inf))


def test_a_training_that_fails_is_recorded_and_the_other_rows_go_on(
        tmp_path, seventh, tiny, folders, records_of, capsys, monkeypatch):
    diverge(monkeypatch, seventh)
    for force in ([], ["--force"]):
        assert seventh.main([*tiny, *folders, *force]) == 3
        error = capsys.readouterr().err
        assert (error.startswith("error: mirrored: the loss is not finite")
                and len(error.splitlines()) == 1)
    found = [(record["row"], record["status"]) for record in records_of(tmp_path / "results")]
    assert found == [("random/linear", "ok"), ("mirrored/linear", "failed")] * 2
    assert not list((tmp_path / "runs").rglob("*.pt"))  # nothing broken is kept
    # A failed row counts as not done.
    assert seventh.main([*tiny, *folders]) == 3


def test_running_out_of_memory_is_a_failed_row_and_one_line(
        tmp_path, seventh, capsys, monkeypatch, folders, tiny, records_of):
    def greedy(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(seventh, "probe", greedy)
    assert seventh.main([*tiny, "--rows", "random/*", *folders]) == 3
    error = capsys.readouterr().err.strip()
    assert "lower batch_size or width" in error and len(error.splitlines()) == 1
    assert [record["status"] for record in records_of(tmp_path / "results")] == ["failed"]


def test_a_config_that_reproduce_makes_is_checked_and_faults_of_ours_are_not_hidden(
        seventh, monkeypatch, capsys, folders, tiny):
    monkeypatch.setattr(seventh, "pretrain",
                        lambda run, *rest: dataclasses.replace(run.config, width=1))
    assert (seventh.main([*tiny, *folders]) == 2
            and "error: width 1: at least 4" in capsys.readouterr().err)

    def faulty(*arguments):
        assert False, "ours"
    monkeypatch.setattr(seventh, "pretrain", faulty)
    with pytest.raises(AssertionError, match="ours"):
        seventh.main([*tiny, *folders])


def test_folders_that_cannot_be_written_are_said_before_training(tmp_path, seventh, capsys):
    (tmp_path / "file").write_text("in the way")
    for results, runs, option in (("file/results", "runs", "--results"),
                                  ("results", "file/runs", "--runs")):
        assert seventh.main(["--scale", "smoke", "--results", f"{tmp_path}/{results}",
                             "--runs", f"{tmp_path}/{runs}"]) == 2
        assert f"give another place with {option} DIR" in capsys.readouterr().err


@pytest.mark.parametrize("module,function,option", [(records, "append", "--results DIR"),
                                                    (trainer, "write_atomically", "--runs DIR")])
def test_a_disk_that_fills_up_is_said_and_costs_nothing(
        tmp_path, seventh, capsys, monkeypatch, folders, tiny, records_of, module, function,
        option):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, function, full)
        assert seventh.main([*tiny, "--rows", "mirrored/*", *folders]) == 2
    error = capsys.readouterr().err.strip()
    assert "No space left" in error and option in error and len(error.splitlines()) == 1
    assert (seventh.main([*tiny, "--rows", "mirrored/*", *folders]) == 0
            and len(records_of(tmp_path / "results")) == 1)


def test_a_damaged_record_line_is_named_and_its_row_run_again(tmp_path, seventh, capsys, folders,
                                                              tiny):
    assert seventh.main([*tiny, *folders]) == 0
    (path,) = (tmp_path / "results").rglob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0][:40] + "\n" + lines[1])
    capsys.readouterr()
    assert seventh.main([*tiny, *folders]) == 0
    out = capsys.readouterr().out
    assert "line 1: not a record, skipped" in out and "seed 0: 1 row to do" in out
    assert (path.read_text().splitlines(keepends=True)[1] == lines[1]
            and len(path.read_text().splitlines()) == 3)


def test_two_processes_do_not_share_a_run(tmp_path, seventh, capsys, folders):
    config, _ = trainer.read_settings(seventh.Config, seventh.__file__, "smoke")
    folder = tmp_path / "runs" / "mirrored" / trainer.config_hash("mirrored", config)
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert seventh.main(["--scale", "smoke", *folders]) == 2
    error = capsys.readouterr().err
    assert "is going on in another process" in error and len(error.splitlines()) == 1


def test_a_plan_writes_nothing_and_prints_minutes_and_memory(tmp_path, seventh, capsys, folders,
                                                             tiny):
    assert seventh.main([*tiny, "--plan", *folders]) == 0
    out = capsys.readouterr().out
    _, first, *lines = out.splitlines()  # a note says that the set is not whole
    assert first.startswith("mirrored on cifar10: 2 rows to do, ") and first.endswith("min a seed")
    groups = sorted(line.split()[:3] for line in lines)  # those that take longest come first
    assert groups == [["mirrored", "1", "row"], ["random", "1", "row"]]
    assert all(" min " in line and line.endswith(" MB") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert seventh.main([*tiny, "--rows", "random/*", *folders]) == 0
    capsys.readouterr()
    assert seventh.main([*tiny, "--plan", *folders]) == 0  # what is recorded is not timed
    assert "mirrored on cifar10: 1 row to do, 1 recorded already, " in capsys.readouterr().out
    assert seventh.main([*tiny, "--plan", "--force", *folders]) == 0
    assert "mirrored on cifar10: 2 rows to do, " in capsys.readouterr().out


def test_a_quiet_run_prints_results_and_errors(seventh, capsys, folders, tiny, monkeypatch):
    assert seventh.main([*tiny, "--quiet", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(
        line.startswith("seed 0  ") and line.endswith(" %") for line in lines)
    diverge(monkeypatch, seventh)
    assert seventh.main([*tiny, "--quiet", *folders, "--force"]) == 3
    assert "the loss is not finite" in capsys.readouterr().err


def test_progress_is_one_line_in_place_on_a_terminal_and_lines_elsewhere(
        tmp_path, seventh, monkeypatch, capsys, folders, tiny):
    monkeypatch.setattr(trainer, "LIVE_SECONDS", 0)
    monkeypatch.setattr(trainer, "LOG_SECONDS", 0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("REPLICATE_PLAIN", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert seventh.main([*tiny, *folders]) == 0
    plain = capsys.readouterr().out
    assert "\r" not in plain and "mirrored  5/10  loss " in plain and "images/s" in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert seventh.main([*tiny, *folders, "--force"]) == 0
    live = [part for part in capsys.readouterr().out.split("\r") if "rows done" in part]
    assert len(live) == 9 and "\n" not in "".join(live[:-1])
    for words in ("seed 0  mirrored  5/10  0.0 min left  2 of 2 rows done  loss ",  # done again
                  "(chance 0.693)", " images/s  mirrored"):
        assert words in live[4]
    monkeypatch.setenv("REPLICATE_PLAIN", "1")
    assert seventh.main([*tiny, *folders, "--force"]) == 0
    assert "\r" not in capsys.readouterr().out


def test_a_record_says_what_each_training_took(tmp_path, seventh, folders, tiny):
    assert seventh.main([*tiny, *folders]) == 0
    (path,) = (tmp_path / "results").rglob("*.jsonl")
    found = {record["row"]: record["trainings"] for record in records.read(path)[0]}
    assert found["random/linear"] == {} and list(found["mirrored/linear"]) == ["mirrored"]


def test_an_experiment_does_not_mix_with_the_declared_protocol(monkeypatch, seventh, folders):
    suites = []
    monkeypatch.setattr(seventh, "reproduce", lambda run: suites.append(run.suite.name))
    width, data = ["--set", "width=8"], ["--set", "dataset=embedded"]
    for arguments in ([], data, [*data, *width], width, ["--set", "dataset=folder:/a/pets"],
                      ["--set", "dataset=folder:/b/pets"]):
        assert seventh.main(["--scale", "small", "--seeds", "0", *arguments, *folders]) == 0
    assert suites[:4] == ["small", "small-embedded", "small-embedded-custom", "small-custom"]
    assert (suites[4].startswith("small-pets-") and suites[5].startswith("small-pets-")
            and suites[4] != suites[5])


def test_rows_options_and_uses_of_a_script(seventh, folders, tiny, capsys):
    seen, calls = [], []

    def options(parser):
        parser.add_argument("--export", metavar="FILE", help="of this script alone")

    def use(given):
        calls.append(given.export)
        if given.export == "wrong":
            raise InputError("no such thing")
        return {"done": 7, "run": lambda run: seen.append(run.seed)}.get(given.export)

    def go(*arguments):
        return launch.launch(seventh.__file__, seventh.Config, seventh.reproduce,
                             [*tiny, *folders, *arguments], rows=lambda config: ["random/*"],
                             options=options, use=use)

    assert (go("--export=done") == 7 and go("--export", "wrong") == 2
            and "error: no such thing" in capsys.readouterr().err)
    assert (go() == 0 and go("--export", "run") == 0 and seen == [0]
            and calls == ["done", "wrong", None, "run"])
    assert (go("--rows", "mirrored/*") == 2 and "no row matches 'mirrored/*'; rows: random/linear"
            in capsys.readouterr().err)
    with pytest.raises(SystemExit):
        go("--help")
    assert "of this script alone" in capsys.readouterr().out


def test_importing_a_script_has_no_side_effect(tmp_path):
    code = ("import torch; before = torch.get_rng_state(); import papers.gidaris_rotation; "
            "assert torch.equal(before, torch.get_rng_state()); "
            "assert not torch.are_deterministic_algorithms_enabled()")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                            text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0 and not list(tmp_path.iterdir()), result.stderr


def test_own_folders_are_known_by_their_place_and_content(
        tmp_path, seventh, capsys, folders, tiny, records_of, monkeypatch):
    """Names as typed, from whatever folder; a record counts only with the same pictures."""
    own = write_folder(tmp_path / "my photos: summer #2 \U0001f408", size=(32, 32), counts=(20, 8))

    def run(dataset):
        assert seventh.main([*tiny, *folders, "--set", f"dataset=folder:{dataset}",
                             "--set", "pretext_epochs=8"]) == 0
        return capsys.readouterr().out

    run(own)
    monkeypatch.chdir(tmp_path)
    assert "are the pictures still the same?" in run(own.name)
    assert len(records_of(tmp_path / "results")) == 2  # they were
    Image.new("RGB", (32, 32), "red").save(own / "test" / "cat" / "0.png")
    assert "recorded with other data (folder " in run(own)
    assert len(records_of(tmp_path / "results")) == 4
    (tmp_path / "elsewhere" / own.name).mkdir(parents=True)
    write_folder(tmp_path / "elsewhere" / own.name, size=(32, 32), counts=(20, 8), level=50)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "2 rows to do" in run(own.name)


def test_a_folder_with_a_long_name_gets_a_suite(tmp_path, seventh, folders, tiny, records_of):
    own = write_folder(tmp_path / ("n" * 250), size=(32, 32), counts=(20, 8))
    assert seventh.main([*tiny, *folders, "--set", f"dataset=folder:{own}",
                         "--set", "pretext_epochs=8"]) == 0
    assert len(records_of(tmp_path / "results")) == 2


def test_a_tilde_that_the_shell_has_left_is_the_home_folder(tmp_path, seventh, tiny, monkeypatch,
                                                            records_of):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert seventh.main([*tiny, "--runs=~/own", "--results=~/own", "--rows", "random/linear"]) == 0
    assert len(records_of(tmp_path / "own")) == 1 and not (tmp_path / "~").exists()


def test_only_rows_that_were_asked_for_are_said_to_be_there(tmp_path, seventh, folders, tiny,
                                                            capsys):
    options = [*tiny, *folders, "--rows", "random/linear"]
    assert seventh.main(options) == seventh.main(options) == 0
    assert "nothing to do, 1 rows of" in capsys.readouterr().out


@pytest.mark.parametrize("environment,message", [
    ({"PYTHONOPTIMIZE": "1"}, "Python's option -O"),  # whose asserts check nothing
    ({"REPLICATE_DATA": "~nobody-of-this-name/x"},
     "/~nobody-of-this-name/x: give it with --data DIR")])
def test_an_odd_environment_gets_one_line(tmp_path, folders, environment, message):
    result = subprocess.run(
        [sys.executable, "-m", "papers.gidaris_rotation", "--scale", "smoke",
         "--set", "dataset=imagenet", *folders], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    assert (result.returncode == 2 and len(result.stderr.splitlines()) == 1
            and message in result.stderr)
