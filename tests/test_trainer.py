"""Random streams, settings, exact resume, ranks: seen from the script of README's recipe."""
import dataclasses
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from replicate import records, trainer
from replicate.data import Resident
from replicate.records import ROOT, InputError

ROWS = {"mirrored/linear": {}, "random/linear": {}}


@pytest.fixture
def settings(seventh):
    """settings(*overrides, scale="smoke", seed=0): a config of the script."""
    def make(*overrides, scale="smoke", seed=0):
        return trainer.read_settings(seventh.Config, seventh.__file__, scale, seed, overrides)[0]
    return make


@pytest.fixture
def make_run(seventh, settings, tmp_path):
    """make_run(folder="", **settings): a Run with folders of its own."""
    def make(folder="", **changes):
        config = dataclasses.replace(settings(), **changes)
        return trainer.Run(seventh.__file__, config, "smoke", ROWS,
                           results=tmp_path / folder / "results", runs=tmp_path / folder / "runs")
    return make


def tiny_fit(run, steps, rate=0.1, purpose="tiny", keep=()):
    """A linear model on drawn numbers through run.fit."""
    run.seed_global("init")
    model = nn.Linear(8, 2)
    split = Resident(torch.randn(64, 8, generator=run.stream("data")), torch.arange(64) % 2)
    return run.fit(purpose, model, lambda batch, step: {
        "loss": nn.functional.cross_entropy(model(batch[0]).float(), batch[1])},
        run.shuffled(split, 16, purpose), steps=steps, rate=lambda progress: rate, keep=keep,
        optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))


def weights_of(folder):
    """{file: state dict} of the trainings in a runs folder."""
    return {path.name: torch.load(path, weights_only=True)["model"]
            for path in sorted(folder.rglob("*.pt"))}


# Random streams
def test_streams_depend_on_seed_purpose_and_step_only():
    def numbers(*key):
        return tuple(torch.rand(4, generator=trainer.stream(*key)).tolist())

    torch.manual_seed(0)
    before = torch.get_rng_state()
    keys = [(0, "augment", 3), (1, "augment", 3), (0, "init", 3), (0, "augment", 4)]
    assert (numbers(*keys[0]) == numbers(*keys[0])
            and len(set(itertools.starmap(numbers, keys))) == 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_shuffling_visits_every_image_once_an_epoch_and_can_start_anywhere(make_run):
    batches = make_run().shuffled(Resident(torch.arange(10).view(10, 1, 1, 1), torch.arange(10)),
                                  4, "x")

    def take(first, count):
        return [labels.tolist() for _, labels in itertools.islice(batches(first), count)]

    first_five = take(0, 5)  # two epochs of ten in batches of four
    flat = sum(first_five, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert take(3, 2) == first_five[3:]
    few = make_run().shuffled(Resident(torch.zeros(5, 1, 1, 1), torch.arange(5)), 20, "x")
    assert next(few(0))[1].bincount().tolist() == [4] * 5  # a batch larger than the split


def test_augmentation_may_return_several_tensors_and_does_not_depend_on_ranks(make_run):
    def crops(images, generator, high):
        return images[:, :, :high], torch.rand(len(images), generator=generator)

    images = torch.arange(8.0 * 16).view(8, 1, 4, 4)
    views, numbers = make_run(shards=4).augment(crops, images, "x", 3, high=2)
    assert torch.equal(views, images[:, :, :2]) and numbers.unique().numel() == 8
    halves = []
    for rank in range(2):
        half = make_run(shards=4)
        half.rank, half.ranks = rank, 2
        halves.append(half.augment(crops, images[4 * rank:4 * rank + 4], "x", 3, high=2)[1])
    assert torch.equal(torch.cat(halves), numbers)


# Settings
@pytest.mark.parametrize("override,message", [
    ("nonsense=1", "unknown setting 'nonsense'"), ("batch_size=0", "batch_size must be above 0"),
    ("batch_size=many", "batch_size must be of type int"),
    ("batch_size=1.5", "batch_size must be of type int"), ("rate=-1", "rate must not be negative"),
    ("rate=nan", "must be finite"), ("batch_size=1:30", "of type int"),
    ("rate=1:30", "of type float"), ("pretext_drops=3", "must be a list"),
    ("deterministic=maybe", "deterministic must be of type bool"),
    ("precision=float16", "bfloat16, float32"), ("width", "key=value"),
    ("seed=3", "unknown setting 'seed'"), ("width=2", "at least 4 channels"),
    ("batch_size=true", "of type int"), ("pretext_epochs=0", "must be above 0"),
    ("momentum=1", "below 1"),
])
def test_wrong_settings_are_named(settings, override, message):
    with pytest.raises(InputError, match=message):
        settings(override)


def test_settings_are_read_as_their_field_wants_them(seventh):
    declared = {"scales": {"small": {"width": 8}}}

    def read(*overrides, scale="small"):
        return trainer.read_settings(seventh.Config, declared, scale, 7, overrides)[0]

    config = read("rate=5e-4", "pretext_epochs=3")
    assert (config.rate, config.pretext_epochs, config.seed, config.width) == (5e-4, 3.0, 7, 8)
    assert type(config.pretext_epochs) is float and read().pretext_drops == (0.5,)
    config = read("batch_size=010", "rate=010", "pretext_drops=[0.1, 2e-1]", "deterministic=False")
    assert (config.batch_size, config.rate, config.pretext_drops) == (10, 10.0, (0.1, 0.2))
    assert config.deterministic is False
    with pytest.raises(InputError, match="unknown scale 'large'; known: small$"):
        read(scale="large")
    with pytest.raises(AssertionError, match="pretext_drops must be rising fractions"):
        trainer.check({"pretext_drops": (30, 60)})


def test_the_hash_changes_with_every_setting_and_the_seed(settings):
    config = settings()
    seen = {trainer.config_hash("p", config), trainer.config_hash("q", config)}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        other = not value if isinstance(value, bool) else value + type(value)(
            [1] if isinstance(value, tuple) else "x" if isinstance(value, str) else 1)
        seen.add(trainer.config_hash("p", dataclasses.replace(config, **{field.name: other})))
    assert len(seen) == 2 + len(dataclasses.fields(config))


# Exact resume
DYING = """
import importlib.util, os, signal, sys
from replicate import trainer
spec = importlib.util.spec_from_file_location("mirrored", sys.argv[1])
sys.modules["mirrored"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
write, left, moment = trainer.write_atomically, int(sys.argv[2]), sys.argv[3]

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
sys.exit(module.main(sys.argv[4:]))
"""


def test_killed_at_random_steps_ends_in_the_same_bytes(tmp_path, seventh, tiny, script, records_of):
    """kill -9 before, while and after a checkpoint is written; weights, records and tables agree
    bit for bit."""
    tiny = [*tiny, "--set", "pretext_epochs=3", "--rows", "mirrored/*"]  # 30 steps
    # A checkpoint is written at every step.
    environment = {"OMP_NUM_THREADS": "2", "REPLICATE_CHECKPOINT_SECONDS": "0"}
    whole = script(*tiny, "--results", f"{tmp_path}/a", "--runs", f"{tmp_path}/ra",
                   OMP_NUM_THREADS="2")
    assert whole.returncode == 0, whole.stderr
    seed = time.time_ns()
    chance, steps, out = random.Random(seed), 0, ""
    rest = [*tiny, "--results", f"{tmp_path}/b", "--runs", f"{tmp_path}/rb"]
    for number, moment in enumerate(("before", "during", "after")):
        target = 4 + 9 * number + chance.randint(0, 6)
        result = subprocess.run([sys.executable, "-c", DYING, seventh.__file__,
                                 str(target - steps), moment, *rest], cwd=ROOT,
                                env={**os.environ, **environment}, capture_output=True, text=True,
                                timeout=120)
        assert result.returncode == -signal.SIGKILL, f"seed {seed}: {result.stdout}{result.stderr}"
        steps = target - (moment != "after")
        out += result.stdout
    last = script(*rest, **environment)
    assert (last.returncode == 0
            and (out + last.stdout).count("resumed at step") == 3), f"seed {seed}: {out}{last}"
    (expected,), (actual,) = (weights_of(tmp_path / runs).values() for runs in ("ra", "rb"))
    assert all(torch.equal(tensor, actual[name])
               for name, tensor in expected.items()), f"seed {seed}"
    assert records_of(tmp_path / "a") == records_of(tmp_path / "b")
    tables = [next((tmp_path / part).rglob("mirrored.md")).read_text() for part in "ab"]
    assert [line for line in tables[0].splitlines() if " in all" not in line] == \
        [line for line in tables[1].splitlines() if " in all" not in line]


def test_interrupts_save_and_say_how_to_go_on(tmp_path, seventh, tiny):
    command = [sys.executable, seventh.__file__, *tiny, "--rows", "mirrored/*",
               "--set", "pretext_epochs=5000", "--results", f"{tmp_path}/a",
               "--runs", f"{tmp_path}/ra"]
    environment = {**os.environ, "REPLICATE_CHECKPOINT_SECONDS": "0", "PYTHONPATH": str(ROOT)}
    for number in (signal.SIGINT, signal.SIGTERM):
        before = [path.stat().st_mtime_ns for path in (tmp_path / "ra").rglob("mirrored.pt")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, env=environment)
        deadline = time.time() + 120
        while [path.stat().st_mtime_ns
               for path in (tmp_path / "ra").rglob("mirrored.pt")] == before:
            assert process.poll() is None and time.time() < deadline, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err, err
        assert err.strip().splitlines()[-1].startswith("interrupted: the same command goes on")
    assert "resumed at step" in out and len(list((tmp_path / "ra").rglob("mirrored.pt"))) == 1


def test_learning_curves_cover_every_step_and_survive_a_stop(make_run, monkeypatch):
    curve = trainer.learning_curves({"loss": torch.arange(120.0)})["loss"]
    assert len(curve) == 50 and curve[-1][0] == 120
    starts = [0] + [step for step, _ in curve]
    assert all(mean == pytest.approx((first + last - 1) / 2)
               for first, (last, mean) in zip(starts, curve))
    whole = tiny_fit(make_run("a"), 30)
    assert [step for step, _ in whole.curves["loss"]] == list(range(1, 31)) and whole.steps == 30
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "stop_agreed", lambda run, step, last: step == 17)
        with pytest.raises(trainer.Interrupted):
            tiny_fit(make_run("b"), 30)
    for _ in range(2):  # resumed; then read from its checkpoint, which is the memo
        run = make_run("b")
        again = tiny_fit(run, 30)
        assert again.curves == whole.curves and torch.equal(again.model.weight, whole.model.weight)
    run.wants("*")
    run.record("mirrored/linear", lambda: 50.0, after=[again])
    assert run.value("mirrored/linear")["value"] == 50.0 and run.value("random/linear") is None
    assert run.records[-1]["history"] == whole.curves and run.records[-1]["steps"] == 30


def test_weights_on_the_way_are_kept_through_a_stop_and_belong_to_their_steps(make_run,
                                                                              monkeypatch):
    short = tiny_fit(make_run("short"), 4).model.weight.clone()
    whole = tiny_fit(make_run("a"), 30, keep=[4, 20])
    assert [*whole.kept] == [4, 20] and torch.equal(whole.kept[4]["weight"], short)
    assert not torch.equal(whole.kept[20]["weight"], whole.model.weight)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "stop_agreed", lambda run, step, last: step == 17)
        with pytest.raises(trainer.Interrupted):
            tiny_fit(make_run("b"), 30, keep=[4, 20])
    for _ in range(2):  # resumed; then read from its checkpoint
        again = tiny_fit(make_run("b"), 30, keep=[4, 20])
        assert [*again.kept] == [4, 20] and torch.equal(again.model.weight, whole.model.weight)
        assert all(torch.equal(again.kept[step]["weight"], whole.kept[step]["weight"])
                   for step in (4, 20))
    more = tiny_fit(make_run("b"), 30, keep=[4, 10, 20])  # the file lacks a step: all over again
    assert [*more.kept] == [4, 10, 20] and torch.equal(more.model.weight, whole.model.weight)


class Evil:
    """A pickle that would make a folder."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("damage", ["cut", "rubbish", "empty", "foreign", "evil"])
def test_a_bad_checkpoint_is_set_aside_and_made_anew(tmp_path, make_run, capsys, damage):
    expected = tiny_fit(make_run(), 5).model.weight.clone()
    path = next((tmp_path / "runs").rglob("tiny.pt"))
    content = path.read_bytes()
    if damage == "foreign":
        state = torch.load(path, weights_only=True)
        state["identity"]["run"] = "another"
        torch.save(state, path)
    else:
        path.write_bytes({"cut": content[:len(content) // 2], "rubbish": b"x" * 500, "empty": b"",
                          "evil": pickle.dumps(Evil(str(tmp_path / "evil")))}[damage])
    again = tiny_fit(make_run(), 5)
    out = capsys.readouterr().out
    assert ("set aside as tiny.pt.damaged" in out and str(path) in out
            and not (tmp_path / "evil").exists())
    assert torch.equal(again.model.weight, expected) and path.with_suffix(".pt.damaged").exists()
    assert torch.load(path, weights_only=True)["step"] == 5


def test_all_code_that_had_a_hand_in_a_row_is_recorded(make_run, capsys):
    run = make_run()
    run.provenance["code"] = "older"
    tiny_fit(run, 3)
    fresh = make_run()
    trained = tiny_fit(fresh, 3)
    fresh.wants("*")
    fresh.record("mirrored/linear", lambda: 1.0, after=[trained])
    assert (fresh.records[-1]["codes"] == ["older"]
            and fresh.records[-1]["code"] == fresh.provenance["code"] != "older")


# Rows
def test_rows_that_are_wanted_recorded_left_out_and_failed(make_run, capsys):
    run = make_run()
    assert run.wants("*") == list(ROWS) and run.wants("random/*", "nothing") == ["random/linear"]
    run.wants("*")
    run.record(list(ROWS), lambda: {"mirrored/linear": 12.34567, "random/linear": None})
    assert "random/linear: left out, a class has too few training images" in capsys.readouterr().out
    assert [record["value"] for record in run.records] == [12.3457] and run.wants("*") == []
    assert make_run().wants("*") == ["random/linear"]
    with pytest.raises(trainer.TrainingFailed, match="learning rate"):
        run = make_run("b")
        run.wants("*")
        tiny_fit(run, 50, rate=1e38, purpose="random/linear")
    run.give_up("why")  # the row that has the training's name, not the other that was asked for
    assert [(record["row"], record["error"])
            for record in run.records] == [("random/linear", "why")]
    assert run.wants("*") == ["mirrored/linear"]


def test_test_labels_do_not_reach_training_or_choice(tmp_path, seventh, tiny, records_of,
                                                     monkeypatch):
    """With test labels shifted by one class, all weights are the same; only counted hits change."""
    def go(name):
        assert seventh.main([*tiny, "--results", f"{tmp_path}/{name}",
                             "--runs", f"{tmp_path}/r-{name}"]) == 0
        return weights_of(tmp_path / f"r-{name}"), [
            record["value"] for record in records_of(tmp_path / name)]

    clean_weights, clean = go("clean")
    load = trainer.Run.load

    def poisoned(run, *arguments):
        data = load(run, *arguments)
        data.test.labels = (data.test.labels + 1) % 10
        return data

    monkeypatch.setattr(trainer.Run, "load", poisoned)
    weights, other = go("poisoned")
    assert clean_weights.keys() == weights.keys() == {"mirrored.pt"} and clean != other
    assert all(torch.equal(tensor, weights["mirrored.pt"][name])
               for name, tensor in clean_weights["mirrored.pt"].items())


# Ranks
def test_two_ranks_equal_one(tmp_path, seventh, tiny, two_ranks, script, records_of):
    """torchrun with two processes: the same rows of data, the same weights to rounding, one writer
    of records."""
    tiny = [*tiny, "--rows", "mirrored/*", "--device", "cpu"]
    one = script(*tiny, "--results", f"{tmp_path}/one", "--runs", f"{tmp_path}/r1",
                 OMP_NUM_THREADS="1")
    assert one.returncode == 0, one.stderr
    two_ranks(seventh.__file__, *tiny, "--results", f"{tmp_path}/two", "--runs", f"{tmp_path}/r2")
    (first,), (second,) = (weights_of(tmp_path / runs).values() for runs in ("r1", "r2"))
    torch.testing.assert_close(dict(first), dict(second), atol=1e-5, rtol=1e-4)
    (a,), (b,) = records_of(tmp_path / "one"), records_of(tmp_path / "two")
    assert (b["ranks"] == 2 and a["config_hash"] == b["config_hash"]
            and abs(a["value"] - b["value"]) <= 1)


def test_ranks_that_do_not_divide_the_shards_are_refused(make_run):
    run, split = make_run(shards=8), Resident(torch.zeros(4, 1, 1, 1), torch.zeros(4))
    run.ranks = 3
    with pytest.raises(InputError, match="3 ranks need shards=8"):
        run.shuffled(split, 12, "x")
    run.ranks = 8  # more than there are samples in a batch
    with pytest.raises(InputError, match="8 ranks need .* batch size 4"):
        run.shuffled(split, 4, "x")


# Rates
def test_learning_rates():
    rate = trainer.stepped(0.1, (0.3, 0.6, 0.8), 0.2)
    assert [round(rate(p), 6) for p in (0, 0.299, 0.3, 0.6, 0.8, 0.99)] == [
        0.1, 0.1, 0.02, 0.004, 0.0008, 0.0008]
    rate = trainer.cosine(0.1, 0.2)
    assert (0 < rate(0) < 0.001 and rate(0.1) == pytest.approx(0.05, rel=0.01)
            and rate(0.2) == pytest.approx(0.1))
    assert (rate(0.6) == pytest.approx(0.05) and rate(0.9999) < 1e-6
            and trainer.cosine(0.1)(0) == pytest.approx(0.1))
