"""Random streams, config, exact resume, records, ranks, and the command line as a user meets it."""
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from papers import gidaris_rotation as rotation
from replicate import report, trainer
from replicate.data import InputError, Resident

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "papers" / "gidaris_rotation.yaml"
ROW = ["--rows", "rotnet4/conv"]


@pytest.fixture
def tiny(tmp_path, write_packed):
    """Options for a run of seconds, with a pre-training and a probe in it, on 640 images of noise packed as CIFAR-10."""
    write_packed(tmp_path / "data", train=640, test=100)
    return ["--scale", "smoke", "--data", str(tmp_path / "data"), *settings(
        dataset="cifar10", width=0.05, batch_size=32, pretext_epochs=1, conv_epochs=1, supervised_epochs=1)]


def settings(**values):
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def script(*arguments, **environment):
    """Run the paper's script as a user does; returns the finished process."""
    return subprocess.run([sys.executable, "-m", "papers.gidaris_rotation", *arguments], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, **environment}, timeout=300)


def records_of(folder):
    """The records in a results folder, without what may differ between two runs of the same thing."""
    timed = ("seconds", "peak_memory_mb", "started", "commit", "dirty")
    return [{key: value for key, value in json.loads(line).items() if key not in timed}
            for path in sorted(Path(folder).rglob("*.jsonl")) for line in path.read_text().splitlines()]


def weights_of(folder):
    """{phase: state dict} of the finished phases in a runs folder."""
    return {path.name: torch.load(path, weights_only=True)["model"] for path in sorted(Path(folder).rglob("*.pt"))}


# Random streams
def test_streams_depend_on_seed_purpose_and_step_only():
    def numbers(*key):
        return torch.rand(4, generator=trainer.stream(*key)).tolist()

    assert numbers(0, "augment", 3) == numbers(0, "augment", 3)
    different = [numbers(0, "augment", 3), numbers(1, "augment", 3), numbers(0, "init", 3), numbers(0, "augment", 4)]
    assert len({tuple(each) for each in different}) == 4
    torch.manual_seed(0)
    before = torch.get_rng_state()
    numbers(5, "x", 5)
    assert torch.equal(torch.get_rng_state(), before)


def make_run(tmp_path, seed=0, **settings):
    config = dataclasses.replace(trainer.resolve_config(rotation.Config, SETTINGS, "smoke", seed), **settings)
    return trainer.Run(rotation.__file__, config, "smoke", "cpu", suite="smoke", results=tmp_path / "results",
                       runs=tmp_path / "runs")


def test_shuffling_visits_every_image_once_an_epoch_and_can_start_anywhere(tmp_path):
    run = make_run(tmp_path)
    split = Resident(torch.arange(10).view(10, 1, 1, 1), torch.arange(10))
    batches = run.shuffled(split, 4, "x")

    def take(first, count):
        iterator = batches(first)
        return [next(iterator)[1].tolist() for _ in range(count)]

    first_five = take(0, 5)  # two epochs of ten in batches of four
    flat = sum(first_five, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert take(3, 2) == first_five[3:]


def test_a_batch_larger_than_the_split_draws_all_equally_often(tmp_path):
    run = make_run(tmp_path)
    split = Resident(torch.arange(5).view(5, 1, 1, 1), torch.arange(5))
    labels = next(run.shuffled(split, 20, "x")(0))[1]
    assert labels.bincount().tolist() == [4] * 5


# Config
@pytest.mark.parametrize("override,message", [
    ("nonsense=1", "unknown setting 'nonsense'"), ("batch_size=0", "batch_size must be above 0"),
    ("batch_size=many", "batch_size must be of type int"), ("batch_size=1.5", "batch_size must be of type int"),
    ("pretext_rate=-1", "pretext_rate must not be negative"), ("pretext_rate=.nan", "must be finite"),
    ("pretext_drops=3", "must be a list"), ("deterministic=maybe", "deterministic must be of type bool"),
    ("precision=float16", "bfloat16, float32"), ("width", "key=value"), ("seed=3", "unknown setting 'seed'"),
    ("crop_size=8", "at least 16"), ("batch_size=true", "of type int"),
])
def test_wrong_settings_are_named(override, message):
    with pytest.raises(InputError, match=message):
        trainer.resolve_config(rotation.Config, SETTINGS, "small", 0, [override])


def test_numbers_are_read_as_their_field_wants_them():
    config = trainer.resolve_config(rotation.Config, SETTINGS, "small", 7, ["weight_decay=5e-4", "pretext_epochs=3"])
    assert config.weight_decay == 5e-4 and config.pretext_epochs == 3.0 and config.seed == 7
    assert type(config.pretext_epochs) is float


def test_the_drawn_set_has_a_budget_of_its_own():
    plain, drawn = (trainer.resolve_config(rotation.Config, SETTINGS, "small", 0, overrides)
                    for overrides in ([], ["dataset=embedded"]))
    assert drawn.pretext_epochs > plain.pretext_epochs and drawn.width == plain.width
    assert trainer.resolve_config(rotation.Config, SETTINGS, "small", 0, ["pretext_epochs=7", "dataset=embedded"]
                                  ).pretext_epochs == 7
    with pytest.raises(InputError, match="unknown scale 'small-embedded'"):
        trainer.resolve_config(rotation.Config, SETTINGS, "small-embedded")


def test_hash_changes_with_every_setting_and_the_seed():
    config = trainer.resolve_config(rotation.Config, SETTINGS, "small")
    seen = {trainer.config_hash("p", config), trainer.config_hash("q", config)}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        other = not value if isinstance(value, bool) else value + type(value)([1] if isinstance(value, tuple) else
                                                                             "x" if isinstance(value, str) else 1)
        changed = object.__new__(rotation.Config)
        changed.__dict__.update({**config.__dict__, field.name: other})
        seen.add(trainer.config_hash("p", changed))
    assert len(seen) == 2 + len(dataclasses.fields(config))


# Exact resume
def wait_for_step(process, runs, phase, steps=1, seconds=120):
    """Wait until the running process has written this phase's checkpoint `steps` times."""
    seen, deadline = 0, time.time() + seconds
    mark = next((path.stat().st_mtime_ns for path in runs.rglob(phase)), None)
    while seen < steps and process.poll() is None and time.time() < deadline:
        for path in runs.rglob(phase):
            stamp = path.stat().st_mtime_ns
            seen, mark = seen + (mark != stamp), stamp
        time.sleep(0.002)
    assert process.poll() is None, f"the run ended before step {steps}: {process.communicate()}"


DYING = """
import os, signal, sys
from papers import gidaris_rotation
from replicate import trainer
write, left, moment = trainer.write_atomically, int(sys.argv[1]), sys.argv[2]

def dying(path, content):
    global left
    left -= 1
    if left == 0 and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    if left == 0 and moment == "during":
        path.with_name(path.name + ".torn.partial").write_bytes(bytes(content)[:len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

trainer.write_atomically = dying
sys.exit(gidaris_rotation.main(sys.argv[3:]))
"""


def test_killed_at_random_steps_ends_in_the_same_bytes(tmp_path, tiny):
    """kill -9 at three random steps of pre-training and of the probe; weights, records and tables agree bit for bit."""
    whole = script(*tiny, *ROW, "--results", str(tmp_path / "a"), "--runs", str(tmp_path / "ra"), OMP_NUM_THREADS="2")
    assert whole.returncode == 0, whole.stderr
    expected = weights_of(tmp_path / "ra")
    assert set(expected) == {"rotnet4.pt", "rotnet4_conv.pt"}
    seed = time.time_ns()
    chance = random.Random(seed)
    rest = [*tiny, *ROW, "--results", str(tmp_path / "b"), "--runs", str(tmp_path / "rb")]
    environment = {**os.environ, "OMP_NUM_THREADS": "2",
                   "REPLICATE_CHECKPOINT_SECONDS": "0"}  # a checkpoint after every step; 20 steps a phase
    out, steps = "", 0
    # (in which of the coming steps, when): pre-training ends with step 20, the probe follows
    for phase in (0, 20):
        for number, moment in enumerate(("before", "during", "after")):
            target = phase + 1 + 6 * number + chance.randint(0, 4)
            result = subprocess.run([sys.executable, "-c", DYING, str(target - steps), moment, *rest], cwd=ROOT,
                                    env=environment, capture_output=True, text=True, timeout=120)
            assert result.returncode == -signal.SIGKILL, f"seed {seed}: {result.stdout}{result.stderr}"
            steps = target - (moment != "after")
            out += result.stdout
    last = script(*rest, OMP_NUM_THREADS="2")
    assert last.returncode == 0, last.stderr
    out += last.stdout
    assert out.count("rotnet4: resumed at step") >= 2 and out.count("rotnet4/conv: resumed at step") >= 2, f"seed {seed}: {out}"
    actual = weights_of(tmp_path / "rb")
    for phase, state in expected.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, actual[phase][name]), f"seed {seed}: {phase} {name}"
    assert records_of(tmp_path / "a") == records_of(tmp_path / "b")
    tables = [next((tmp_path / part).rglob("gidaris_rotation.md")).read_text().splitlines() for part in "ab"]
    assert [line for line in tables[0] if "| `python" not in line] == [line for line in tables[1] if "| `python" not in line]


def test_interrupt_saves_and_says_how_to_go_on(tmp_path, tiny):
    command = [sys.executable, "-m", "papers.gidaris_rotation", *tiny, *ROW, "--results", str(tmp_path / "a"), "--runs",
               str(tmp_path / "ra"), "--set", "pretext_epochs=500"]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, "REPLICATE_CHECKPOINT_SECONDS": "0"})
        wait_for_step(process, tmp_path / "ra", "rotnet4.pt")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert err.strip().splitlines()[-1].startswith("interrupted: the same command goes on")
        assert "Traceback" not in err
    assert "resumed at step" in out  # the second went on from the first
    assert len(list((tmp_path / "ra").rglob("rotnet4.pt"))) == 1


def test_a_finished_row_is_not_run_again_unless_forced(tmp_path, capsys, folders, tiny):
    assert rotation.main([*tiny, *ROW, *folders]) == 0
    capsys.readouterr()
    assert rotation.main([*tiny, *ROW, *folders]) == 0 and "nothing to do" in capsys.readouterr().out
    assert len(records_of(tmp_path / "results")) == 1
    assert rotation.main([*tiny, *ROW, *folders, "--force"]) == 0
    first, second = records_of(tmp_path / "results")
    assert first == second  # trained anew, the same to the last digit


def tiny_fit(run, steps, learning_rate=0.1, purpose="tiny"):
    """A linear model on drawn numbers through run.fit."""
    run.seed_global("init")
    model = nn.Linear(8, 2)
    split = Resident(torch.randn(64, 8, generator=run.stream("data")), torch.arange(64) % 2)

    def objective(batch, step):
        x, y = batch
        return {"loss": nn.functional.cross_entropy(model(x).float(), y)}

    run.fit(purpose, model, objective, run.shuffled(split, 16, purpose), steps=steps,
            optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), learning_rate=lambda progress: learning_rate,
            images_per_step=16)
    return model


def test_learning_curves_cover_every_step_and_survive_a_stop(tmp_path, monkeypatch):
    trace = torch.arange(120.0)[None]
    curves = trainer.learning_curves(["loss"], trace)["loss"]
    assert len(curves) == 50 and curves[-1][0] == 120 and [step for step, _ in curves] == sorted({s for s, _ in curves})
    starts = [0] + [step for step, _ in curves]
    assert all(mean == pytest.approx((first + last - 1) / 2) for first, (last, mean) in zip(starts, curves))
    whole = make_run(tmp_path / "a")
    tiny_fit(whole, 30)
    assert [step for step, _ in whole.history["tiny"]["loss"]] == list(range(1, 31))
    stopped = make_run(tmp_path / "b")
    agree = trainer.Run._agree_to_stop
    monkeypatch.setattr(trainer.Run, "_agree_to_stop", lambda run, step, steps: step == 17)
    with pytest.raises(trainer.Interrupted):
        tiny_fit(stopped, 30)
    monkeypatch.setattr(trainer.Run, "_agree_to_stop", agree)
    for _ in range(2):  # resumed; then finished already
        again = make_run(tmp_path / "b")
        tiny_fit(again, 30)
        assert again.history == whole.history
    again.record("rotnet4/conv", 50.0, steps=30, seconds=1, history=again.history["tiny"])
    assert again.value("rotnet4/conv") == 50.0 and again.value("random/conv") is None
    assert again.records[-1]["history"]["loss"] == whole.history["tiny"]["loss"]


def test_augmentation_may_return_several_tensors_and_does_not_depend_on_ranks(tmp_path):
    def crops(images, generator):
        return images[:, :, :2], torch.rand(len(images), generator=generator)

    images = torch.arange(8.0 * 16).view(8, 1, 4, 4)
    one = make_run(tmp_path, shards=4)
    views, numbers = one.augment(crops, images, "x", 3)
    assert views.shape == (8, 1, 2, 4) and torch.equal(views, images[:, :, :2]) and numbers.unique().numel() == 8
    halves = []
    for rank in range(2):
        half = make_run(tmp_path, shards=4)
        half.rank, half.ranks = rank, 2
        halves.append(half.augment(crops, images[4 * rank:4 * rank + 4], "x", 3)[1])
    assert torch.equal(torch.cat(halves), numbers)


@pytest.mark.parametrize("damage", ["cut", "rubbish", "empty", "foreign"])
def test_a_bad_checkpoint_is_set_aside_and_made_anew(tmp_path, capsys, damage):
    expected = tiny_fit(make_run(tmp_path), 5).weight.clone()
    path = next((tmp_path / "runs").rglob("tiny.pt"))
    content = path.read_bytes()
    if damage == "foreign":
        state = torch.load(path, weights_only=True)
        state["identity"]["config_hash"] = "another"
        torch.save(state, path)
    else:
        path.write_bytes({"cut": content[:len(content) // 2], "rubbish": b"x" * 500, "empty": b""}[damage])
    again = tiny_fit(make_run(tmp_path), 5)
    out = capsys.readouterr().out
    assert "set aside as tiny.pt.damaged" in out and str(path) in out
    assert torch.equal(again.weight, expected)
    assert path.with_suffix(".pt.damaged").exists() and torch.load(path, weights_only=True)["step"] == 5


def test_a_checkpoint_never_runs_code(tmp_path, capsys):
    """weights_only: a pickle that would run a command is refused."""
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    run = make_run(tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "tiny.pt").write_bytes(pickle.dumps(Evil()))
    tiny_fit(run, 2)
    assert not (tmp_path / "evil").exists() and "set aside" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(tmp_path, folders, tiny):
    with pytest.raises(trainer.TrainingFailed, match="learning rate"):
        tiny_fit(make_run(tmp_path), 50, learning_rate=1e38)
    result = script(*tiny, *ROW, *folders, "--set", "pretext_rate=1e38")
    assert result.returncode == 3
    assert result.stderr.startswith("error: rotnet4: the loss is not finite") and len(result.stderr.splitlines()) == 1
    (record,) = records_of(tmp_path / "results")
    assert record["status"] == "failed" and record["row"] == "rotnet4/conv" and record["value"] is None
    assert not list((tmp_path / "runs").rglob("*.pt"))  # nothing broken is kept
    repeated = script(*tiny, *ROW, *folders, "--set", "pretext_rate=1e38")
    assert repeated.returncode == 3  # a failed row counts as not done


def test_code_of_the_oldest_contributor_is_recorded(tmp_path):
    """A row whose pre-training was done by other code carries that code's hash, so the table marks it as changed."""
    run = make_run(tmp_path)
    run.code = {**run.code, "trainer.py": "older"}
    tiny_fit(run, 3)
    fresh = make_run(tmp_path)
    tiny_fit(fresh, 3)
    assert fresh.code["trainer.py"] == "older" != report.code_hashes(Path(rotation.__file__))["trainer.py"]


# What reaches the graph
def test_training_steps_keep_to_operations_that_are_deterministic_on_a_gpu(monkeypatch, folders, tiny, graphs):
    monkeypatch.setattr(trainer.Run, "has", lambda run, row: True)  # rows of all scales
    rows = "rotnet4/conv,supervised,rotnet4/*finetuned,rotnet4/*/nonlinear,rotations8/*/nonlinear,random/block1/linear"
    assert rotation.main([*tiny, "--rows", rows, *folders]) == 0
    assert len(graphs) > 100 and not graphs.offenders()
    graphs.clear()
    maps = torch.zeros(4, 8, 13, 13, requires_grad=False)
    rotation.AlexNet(4, width=0.05)(torch.zeros(4, 3, 224, 224)).sum().backward()
    rotation.alexnet_linear_head(maps.shape, 10, 6)(maps).sum().backward()
    rotation.alexnet_nonlinear_head(maps.shape, 10, 0.05, True)(torch.zeros(4, 13, 13, 13)).sum().backward()
    assert len(graphs) == 3 and not graphs.offenders()
    torch.nn.functional.adaptive_avg_pool2d(torch.zeros(1, 1, 8, 8, requires_grad=True), 3).sum().backward()
    assert graphs.offenders()  # the guard can see one


# Frozen trunks and poisoned test labels
def test_test_labels_do_not_reach_training_or_choice(tmp_path, monkeypatch, folders, tiny):
    """With the test labels shifted by one class, all weights are the same; only the counted hits change."""
    arguments = [*tiny, "--rows", "rotnet4/conv,supervised/labels20,rotnet4/block2/linear", "--device", "cpu"]

    def go(name):
        assert rotation.main([*arguments, "--results", str(tmp_path / name), "--runs", str(tmp_path / f"runs-{name}")]) == 0
        return weights_of(tmp_path / f"runs-{name}"), records_of(tmp_path / name)

    clean_weights, clean = go("clean")
    original = rotation.load_data

    def poisoned(run):
        data = original(run)
        data.test.labels = (data.test.labels + 1) % 10
        return data

    monkeypatch.setattr(rotation, "load_data", poisoned)
    poisoned_weights, other = go("poisoned")
    assert clean_weights.keys() == poisoned_weights.keys() and len(clean_weights) == 3
    for phase in clean_weights:
        for name, tensor in clean_weights[phase].items():
            assert torch.equal(tensor, poisoned_weights[phase][name]), f"{phase} {name}"
    assert [record["value"] for record in clean] != [record["value"] for record in other]


def test_a_probe_leaves_the_trunk_bit_identical_and_fine_tuning_does_not(tmp_path):
    from replicate import evaluate
    from replicate.data import ImageSet
    run = make_run(tmp_path, conv_epochs=2.0, batch_size=16)
    split = Resident(torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8), torch.arange(64) % 10)
    data = ImageSet("x", split, split, 10)
    encoder = rotation.build(run, "rotnet4").train()
    before = evaluate.fingerprint(encoder)
    budget = dict(epochs=1.0, drops=(0.5,), rate=0.1)
    heads = {"conv": (2, rotation.conv_head((1, 16, 8, 8), 10, 0.1))}
    rotation.classify(run, "frozen", encoder, heads, data, split, **budget)
    assert evaluate.fingerprint(encoder) == before
    state = torch.load(run.folder / "frozen.pt", weights_only=True)["model"]
    assert not any(name.startswith("blocks") for name in state)  # nothing of the trunk was even in the optimiser's reach
    heads = {"conv": (2, rotation.conv_head((1, 16, 8, 8), 10, 0.1))}
    rotation.classify(run, "tuned", encoder, heads, data, split, **budget, finetune=True)
    tuned = torch.load(run.folder / "tuned.pt", weights_only=True)["model"]
    assert evaluate.fingerprint(encoder) == before  # the caller's copy stays
    assert not torch.equal(tuned["blocks.0.0.0.weight"], encoder.blocks[0][0][0].weight)
    assert not torch.equal(tuned["blocks.0.0.1.running_mean"], encoder.blocks[0][0][1].running_mean)


# Ranks
def test_two_ranks_equal_one(tmp_path, tiny, two_ranks):
    """torchrun with two processes: the same rows of data, the same weights to rounding, one writer of records."""
    options = [*tiny, *ROW, *settings(precision="float32", pretext_epochs=0.15, conv_epochs=0.15), "--device", "cpu"]
    one = script(*options, "--results", str(tmp_path / "one"), "--runs", str(tmp_path / "r1"), OMP_NUM_THREADS="1")
    assert one.returncode == 0, one.stderr
    two_ranks("gidaris_rotation", *options, "--results", str(tmp_path / "two"), "--runs", str(tmp_path / "r2"))
    first, second = weights_of(tmp_path / "r1"), weights_of(tmp_path / "r2")
    assert set(first) == set(second) == {"rotnet4.pt", "rotnet4_conv.pt"}
    start = rotation.build(make_run(tmp_path, width=0.05), "rotnet4").state_dict()
    for phase in first:
        for name, tensor in first[phase].items():
            # float32 moments of batch-norm differ by 1e-4; the probe starts from a trunk that differs already
            torch.testing.assert_close(second[phase][name], tensor, atol=5e-4 if phase == "rotnet4.pt" else 5e-3, rtol=1e-2,
                                       msg=lambda m: f"{phase} {name}: {m}")
    moved = (first["rotnet4.pt"]["blocks.0.0.0.weight"] - start["blocks.0.0.0.weight"]).abs().max()
    assert moved > 5e-3  # far more than the tolerance: three steps were taken
    (a,), (b,) = records_of(tmp_path / "one"), records_of(tmp_path / "two")
    assert b["ranks"] == 2 and a["config_hash"] == b["config_hash"] and abs(a["value"] - b["value"]) <= 2


def test_ranks_that_do_not_divide_the_shards_are_refused(tmp_path):
    run = make_run(tmp_path, shards=8)
    run.ranks = 3
    with pytest.raises(InputError, match="3 ranks need shards=8"):
        run.shuffled(Resident(torch.zeros(4, 1, 1, 1), torch.zeros(4)), 12, "x")
    run.ranks = 8  # more than there are samples in a batch
    with pytest.raises(InputError, match="8 ranks need .* batch size 4"):
        run.shuffled(Resident(torch.zeros(4, 1, 1, 1), torch.zeros(4)), 4, "x")


# The command line
@pytest.mark.parametrize("arguments,message", [
    (["--scale", "tiny"], "unknown scale 'tiny'; known: smoke, small, full, paper"),
    (["--scale", "smoke", "--rows", "nothing"], "no row matches 'nothing'"),
    (["--scale", "smoke", "--seeds", "-1"], "seed -1: seeds start at 0"),
    (["--scale", "smoke", "--seeds", "a"], "--seeds takes whole numbers"),
    (["--scale", "smoke", "--device", "tpu"], "unknown device 'tpu'"),
    (["--scale", "smoke", "--set", "batch_size=0"], "batch_size must be above 0"),
    (["--scale", "small", "--data", "/does/not/exist"], "no data folder /does/not/exist"),
    (["--scale", "smoke", "--colour"], "unrecognized arguments: --colour"),
    (["--scale", "smoke", "--set", "dataset=nothing"], "unknown data set 'nothing'"),
    (["--scale", "smoke", "--set", "image_size=16", "--set", "crop_size=40"], "images of 'embedded' have 16 pixels"),
    (["--scale", "smoke", "--set", "pretext_epochs=0.00001", "--rows", "rotnet4/conv"], "a longer budget is needed"),
    (["--scale", "smoke", "--set", "conv_epochs=0"], "conv_epochs must be above 0"),
    (["--scale", "smoke", "--set", "pretext_drops=[30, 60]"], "rising fractions"),
])
def test_wrong_input_gets_one_line_and_leaves_nothing(tmp_path, capsys, folders, arguments, message):
    assert rotation.main([*arguments, *folders]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.rglob("*.jsonl")) and not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.partial"))


def test_no_cuda_is_said(monkeypatch, capsys, folders):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rotation.main(["--scale", "smoke", "--device", "cuda", *folders]) == 2
    assert "no CUDA GPU is visible" in capsys.readouterr().err


def test_a_results_folder_that_cannot_be_written_is_said_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert rotation.main(["--scale", "smoke", "--results", str(tmp_path / "file" / "results"),
                          "--runs", str(tmp_path / "runs")]) == 2
    assert "give another folder with --results DIR" in capsys.readouterr().err
    assert rotation.main(["--scale", "smoke", "--results", str(tmp_path / "results"),
                          "--runs", str(tmp_path / "file" / "runs")]) == 2
    assert "give another folder with --runs DIR" in capsys.readouterr().err


@pytest.mark.parametrize("victim,option", [("records", "--results DIR"), ("checkpoints", "--runs DIR")])
def test_a_disk_that_fills_up_is_said_and_costs_nothing(tmp_path, capsys, monkeypatch, folders, tiny, victim, option):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((report, "append_record") if victim == "records" else (trainer, "write_atomically")), full)
        assert rotation.main([*tiny, *ROW, *folders]) == 2
    error = capsys.readouterr().err.strip()
    assert "No space left" in error and option in error and len(error.splitlines()) == 1
    assert rotation.main([*tiny, *ROW, *folders]) == 0 and len(records_of(tmp_path / "results")) == 1


def test_a_damaged_record_line_is_named_and_its_row_run_again(tmp_path, capsys, folders, tiny):
    assert rotation.main([*tiny, "--rows", "rotnet4/conv,random/conv", *folders]) == 0
    (path,) = (tmp_path / "results").rglob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0][:40] + "\n" + lines[1])
    capsys.readouterr()
    assert rotation.main([*tiny, "--rows", "rotnet4/conv,random/conv", *folders]) == 0
    out = capsys.readouterr().out
    assert "line 1: not a record, skipped" in out and "1 rows to do" in out
    assert path.read_text().splitlines(keepends=True)[1] == lines[1] and len(path.read_text().splitlines()) == 3


def test_running_out_of_memory_is_a_failed_row_and_one_line(tmp_path, capsys, monkeypatch, folders, tiny):
    def greedy(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rotation, "classify", greedy)
    assert rotation.main([*tiny, "--rows", "random/conv", *folders]) == 3
    error = capsys.readouterr().err.strip()
    assert "lower batch_size or width" in error and len(error.splitlines()) == 1
    (record,) = records_of(tmp_path / "results")
    assert (record["row"], record["status"]) == ("random/conv", "failed")


def test_figures_are_drawn_and_the_same_twice(tmp_path, folders, tiny):
    assert rotation.main([*tiny, *ROW, *folders]) == 0
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "results").rglob("*.png")}
    assert set(pictures) == {"gidaris_rotation_filters.png", "gidaris_rotation_attention.png"}
    assert rotation.main([*tiny, *ROW, *folders, "--force"]) == 0
    assert pictures == {path.name: path.read_bytes() for path in (tmp_path / "results").rglob("*.png")}
    assert all(name in next((tmp_path / "results").rglob("gidaris_rotation.md")).read_text() for name in pictures)


def test_two_processes_do_not_share_a_run(tmp_path, capsys, folders):
    import fcntl
    config = trainer.resolve_config(rotation.Config, SETTINGS, "smoke")
    folder = tmp_path / "runs" / "gidaris_rotation" / trainer.config_hash("gidaris_rotation", config)
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert rotation.main(["--scale", "smoke", *folders]) == 2
    error = capsys.readouterr().err
    assert "is going on in another process" in error and len(error.splitlines()) == 1


def test_plan_writes_nothing_and_prints_minutes_and_memory(tmp_path, capsys, folders, tiny):
    assert rotation.main([*tiny, *ROW, "--plan", *folders]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.strip().startswith("rotnet4/conv") and "MB" in line)
    assert "min with its pre-training" in line and float(line.split()[1]) >= 0
    assert "minutes a seed" in out
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_experiment_does_not_mix_with_the_declared_protocol(monkeypatch, folders):
    suites = []
    monkeypatch.setattr(rotation, "reproduce", lambda run: suites.append(run.suite.name))
    for arguments in ([], ["--data", "embedded"], ["--data", "embedded", *settings(width=0.1)], settings(width=0.1),
                      settings(dataset="folder:/a/pets"), settings(dataset="folder:/b/pets")):
        assert rotation.main(["--scale", "small", "--seeds", "0", *arguments, *folders]) == 0
    assert suites[:4] == ["small", "small-embedded", "small-embedded-custom", "small-custom"]
    assert suites[4].startswith("small-pets-") and suites[5].startswith("small-pets-") and suites[4] != suites[5]


def test_importing_a_script_has_no_side_effect(tmp_path):
    code = ("import torch; before = torch.get_rng_state(); import papers.gidaris_rotation; "
            "assert torch.equal(before, torch.get_rng_state()); assert not torch.are_deterministic_algorithms_enabled()")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0 and not list(tmp_path.iterdir()), result.stderr


# Rates and layers
def test_learning_rate_steps():
    rate = trainer.stepped(0.1, (0.3, 0.6, 0.8), 0.2)
    assert [round(rate(p), 6) for p in (0, 0.299, 0.3, 0.6, 0.8, 0.99)] == [0.1, 0.1, 0.02, 0.004, 0.0008, 0.0008]


def test_cosine_warms_up_and_falls_to_nothing():
    rate = trainer.cosine(0.1, 0.2)
    assert 0 < rate(0) < 0.001 and rate(0.1) == pytest.approx(0.05, rel=0.01) and rate(0.2) == pytest.approx(0.1)
    assert rate(0.6) == pytest.approx(0.05) and rate(0.9999) < 1e-6 and trainer.cosine(0.1)(0) == pytest.approx(0.1)


def test_local_response_norm_is_torchs():
    x = torch.randn(2, 12, 5, 5, requires_grad=True)
    reference = torch.nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0)
    torch.testing.assert_close(trainer.LocalResponseNorm()(x), reference(x))
