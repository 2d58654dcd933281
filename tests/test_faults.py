"""Faults that real use brings, drawn at random with a fixed seed: kills, full disks, damaged files,
settings of every wrong kind, pictures of every kind.

Whatever happens, nothing may be lost, and the user gets one line that begins with "error:" and an
exit status of 0, 2, 3 or 130: no traceback, no endless wait, no number other than that of an
undisturbed run.  A few of each are tried here; `./run_all.sh test --long` tries hundreds, and
prints a table of what was tried and what each got.
"""
import builtins
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TALLY
from PIL import Image

from replicate import data, launch, records, report, trainer
from replicate.records import ROOT

PAPERS = sorted(path.stem for path in (ROOT / "papers").glob("*.yaml"))
SHORT = ("gidaris_rotation", "swav")  # each kind of run is tried with some only, in the short form
ENDS = {0: "as undisturbed", 2: "one line, exit 2", 3: "one line, exit 3", 130: "exit 130"}
HANGS = 120  # seconds after which a run counts as hanging
# Rows that train a little and take a second or two with 600 drawn images
ROWS = {"gidaris_rotation": "rotnet4/rotation-accuracy,random/block2/knn",
        "doersch_context": "context/position-accuracy,random/conv4/linear",
        "noroozi_jigsaw": "jigsaw/puzzle-accuracy,random/conv4/linear",
        "zhang_colorization": "full/auc-raw,grey/auc-raw",
        "swav": "swav/knn20,random/knn20", "dann": "mnist-mnistm/dann,mnist-mnistm/source-only"}

# ---- How a script is run here ----

class Hung(BaseException):
    """A run did not end when it was interrupted."""


@contextlib.contextmanager
def small_sets():
    """Drawn sets of 600 and 160 images in place of 10,000 and 2,000, drawn once; no network."""
    drawn, draw, torchvision = {}, data._draw, data._torchvision

    def cached(name, size):
        if (name, size) not in drawn:
            if name not in data.DRAWN or size and not 16 <= size <= 128:
                return draw(name, size)  # which says what is wrong
            drawn[name, size] = []
            for count, seed in ((600, 0), (160, 1)):
                images, labels = data.DRAWN[name](count, seed, size)
                arrays = images.permute(0, 2, 3, 1).numpy(), labels.numpy().astype(np.uint8)
                drawn[name, size] += arrays
        return drawn[name, size]

    def offline(name, root, download):
        if download:
            raise OSError("no network")
        return torchvision(name, root, download)

    data._draw, data._torchvision = cached, offline
    try:
        yield
    finally:
        data._draw, data._torchvision = draw, torchvision


@pytest.fixture(scope="module", autouse=True)
def offline_and_small():
    with small_sets():
        yield


def budget(paper):
    """Options of a paper's smallest run: a few steps of everything that smoke has."""
    block = records.read_declared(ROOT / "papers" / f"{paper}.yaml")["scales"]["smoke"]
    factor = 3 if paper == "gidaris_rotation" else 8  # there are fewer images to an epoch
    changes = {name: factor * value for name, value in block.items() if name.endswith("_epochs")}
    changes |= {"swav": {"label_passes": "[20, 4]"},
                "dann": {"steps": 6},
                "dann_shallow": {"moons_epochs": 3, "epochs": 1}}.get(paper, {})
    return ["--scale", "smoke", "--device", "cpu",
            *(f"--set={name}={value}" for name, value in changes.items())]


def call(paper, *arguments, seconds=HANGS):
    """A script's main in this process -> (exit status, stdout, stderr).

    The status is "hangs" or "traceback" where it should be a number; stderr holds the traceback.
    After so many seconds it is interrupted, as by Ctrl-C, and then has to end."""
    def ring(number, frame):
        if interrupted:
            raise Hung
        interrupted.append(True)
        signal.alarm(HANGS)
        os.kill(os.getpid(), signal.SIGINT)  # as a user would who has waited enough

    script, out, err = importlib.import_module(f"papers.{paper}"), io.StringIO(), io.StringIO()
    before, interrupted = signal.signal(signal.SIGALRM, ring), []
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        signal.alarm(seconds)
        try:
            status = script.main([str(argument) for argument in arguments])
        except SystemExit as end:  # --help
            status = end.code or 0
        except Hung:
            status = "hangs"
            traceback.print_exc()
        except BaseException:
            status = "traceback"
            traceback.print_exc()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    return status, out.getvalue(), err.getvalue()


def proper(status, err):
    """Why an end is not one that a user may meet, or nothing."""
    lines = err.splitlines()
    if status not in ENDS or "Traceback" in err:
        return f"status {status}: {err[-3000:]}"
    if status in (2, 3) and not any(line.startswith("error: ") for line in lines):
        return f"status {status} without a line: {err}"
    odd = [line for line in lines if not line.startswith(("error: ", "warning: ", "interrupted: "))]
    return f"status {status}, odd lines on stderr: {odd[:5]}" if odd else ""


def in_folder(folder):
    return ["--results", folder / "results", "--runs", folder / "runs"]


def finals(folder, figures=True):
    """What a run leaves that has to be equal byte for byte: its records without times, the weights
    in its checkpoints, its curves and pictures.  Fails on what is half-written."""
    timed = ("seconds", "trainings", "peak_memory_mb", "started", "commit", "dirty")
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            kept, warnings = records.read(path)
            assert not warnings, warnings
            for record in kept:
                if record["status"] == "ok":
                    line = {key: record[key] for key in sorted(record) if key not in timed}
                    key = f"{name} {record['row']} {record['seed']}"
                    assert key not in found, f"{key} is recorded twice"
                    found[key] = json.dumps(line)
        elif path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            buffer = io.BytesIO()
            torch.save({**state, "seconds": 0.0}, buffer)
            found[name] = buffer.getvalue()
        elif path.suffix in (".svg", ".png") and figures:
            found[name] = path.read_bytes()
            if path.suffix == ".png":
                Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix != ".partial", f"{path} is left half-written"
    return found


def differ(found, wanted):
    """The names in which two results of `finals` differ."""
    return [name for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(paper, rows): folder of results/ and runs/ of a run that nothing disturbs."""
    made = {}

    def run(paper, rows="*"):
        if (paper, rows) not in made:
            folder = tmp_path_factory.mktemp(paper)
            status, _, err = call(paper, *budget(paper), "--rows", rows, *in_folder(folder))
            assert status == 0 and not proper(status, err), err
            made[paper, rows] = folder
        return made[paper, rows]
    return run


@pytest.fixture
def share(request):
    """share(few, many): how often to try, in the short form and in the long one."""
    def choose(few, many):
        count = many if request.config.getoption("--long") else few
        return count or pytest.skip("only with --long")
    return choose


@pytest.fixture
def tally(request):
    """tally(kind, outcome): count one fault and what it got, for the table at the end."""
    def count(kind, outcome):
        outcomes = request.config.stash[TALLY].setdefault(kind, {})
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    request.config.stash.setdefault(TALLY, {})
    return count


# ---- Kills ----

def child(paper, arguments, log, every):
    """What runs in a process of its own: the script, its output in a file."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the script listens
    torch.set_num_threads(1)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    trainer.CHECKPOINT_SECONDS = every
    with small_sets():
        status = importlib.import_module(f"papers.{paper}").main(arguments)
    sys.stdout.flush()
    os._exit(status)


@pytest.fixture(scope="module")
def start():
    """start(paper, folder, log, checkpoint seconds) -> a process with the whole of a paper's smoke;
    a server that has loaded the scripts makes it, since loading them takes longer than a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(f"papers.{paper}" for paper in PAPERS)])

    def begin(paper, folder, log, every):
        arguments = [str(word) for word in (*budget(paper), *in_folder(folder))]
        process = context.Process(target=child, args=(paper, arguments, str(log), every))
        process.start()
        return process
    return begin


@pytest.mark.parametrize("paper", PAPERS)
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(paper, tmp_path, start, share,
                                                                tally, undisturbed):
    """Killed or terminated at random moments and started again until it is done."""
    chance, kills, attempt = random.Random(f"kills {paper}"), share(paper in SHORT, 15), 0
    begun = time.perf_counter()
    whole = finals(undisturbed(paper))
    length, folder = time.perf_counter() - begun, tmp_path / "0"
    while kills or folder.exists():
        attempt, log, sent = attempt + 1, tmp_path / f"{attempt}.log", None
        process = start(paper, folder, log, chance.choice([0, 0.3, 60]))
        process.join(chance.uniform(0, length) if kills else HANGS)
        if process.exitcode is None and kills:
            sent = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, sent)
                if chance.random() < 0.3:  # an impatient user
                    time.sleep(chance.uniform(0, 0.1))
                    os.kill(process.pid, sent)
            process.join(HANGS)
            kills -= 1
        said = log.read_text() if log.exists() else ""
        early = sent and not said  # Python itself ends with 1 while it starts
        assert early or process.exitcode in (0, 130, -(sent or 0)), f"{process.exitcode}: {said}"
        assert "Traceback" not in said, said
        if sent:
            tally(f"{sent.name} at a random moment", "goes on, ends as undisturbed")
        if process.exitcode == 0:
            assert not differ(finals(folder), whole)
            shutil.rmtree(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_run_ends_is_no_traceback(number, tmp_path, monkeypatch, tally):
    """Somebody who presses Ctrl-C again and again, at the worst moments."""
    script, attempt, said = importlib.import_module("papers.gidaris_rotation"), launch.attempt, []
    arguments = [*map(str, (*budget("gidaris_rotation"), *in_folder(tmp_path))), "--rows"]

    def press(*_):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(launch, "tell", lambda line, run=None: (said.append(line), press()))
    assert script.main([*arguments, "none"]) == 2  # while the error is said
    monkeypatch.setattr(launch, "attempt", lambda *given: (press(), attempt(*given)))
    assert script.main([*arguments, "random/block2/knn"]) == 130  # and again while that is said
    assert [line.split(":")[0] for line in said] == ["error", "interrupted"]
    tally("a signal while a run ends", "goes on, ends as undisturbed")


@pytest.mark.parametrize("output", ["stdout", "stderr"])
def test_output_that_nobody_takes_costs_nothing(output, tmp_path, monkeypatch, tally):
    """Closed, as under some schedulers, or on a full disk: the run ends with its exit status."""
    script = importlib.import_module("papers.gidaris_rotation")
    rows = ["--rows", "random/block2/knn", "--force"]
    arguments = [*map(str, (*budget("gidaris_rotation"), *rows, *in_folder(tmp_path)))]
    for full in (False, True):
        for given, expected in ((arguments, 0), (["--scale", "none"], 2)):
            monkeypatch.setattr(sys, output, open("/dev/full", "w") if full else None)
            assert script.main(given) == expected
            with contextlib.suppress(OSError):
                getattr(sys, output).close()
            tally("output closed or full", ENDS[expected] if expected else "runs")


# ---- Disks that are full or read-only ----

class Full(io.FileIO):
    """A file on a disk that takes half of what is written to it."""

    def write(self, content):
        super().write(bytes(content)[:len(content) // 2])
        raise OSError(28, "No space left on device")


class Disk:
    """Within this block, writing below a folder fails: at the `first` write, and at later ones too
    where the fault stays.  kind: full at opening, full half-way, read-only, broken at syncing or at
    renaming.  Counts the writes there were."""

    KINDS = {"full": 28, "half": 28, "read-only": 30, "sync": 5, "rename": 28}

    def __init__(self, folder, kind="full", first=1 << 30, stays=True):
        self.folder, self.kind, self.first, self.stays = str(folder), kind, first, stays
        self.writes, self.hit = 0, False

    def fails(self, path, kinds):
        if not os.path.abspath(os.fsdecode(path)).startswith(self.folder):
            return False
        self.writes += kinds[0] == "full"
        here = self.kind in kinds and (self.writes >= self.first if self.stays
                                       else self.writes == self.first)
        self.hit |= here
        return here

    def error(self):
        number = self.KINDS[self.kind]
        return OSError(number, os.strerror(number))

    def __enter__(self):
        self.real = io.open, os.open, os.write, os.fsync, os.replace, os.rename, os.mkdir
        open_, os_open, write, fsync, replace, rename, mkdir = self.real
        names = {}  # descriptor -> path

        def opened(file, mode="r", *more, **settings):
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return open_(file, mode, *more, **settings)
            if self.fails(file, ("full", "read-only")):
                raise self.error()
            if self.fails(file, ("half",)):
                return Full(file, mode.replace("b", ""))
            made = open_(file, mode, *more, **settings)
            names[made.fileno()] = file
            return made

        def os_opened(path, flags, *more, **settings):
            if flags & (os.O_WRONLY | os.O_RDWR) and self.fails(path, ("full", "read-only")):
                raise self.error()
            made = os_open(path, flags, *more, **settings)
            names[made] = path
            return made

        def written(descriptor, content):
            if self.fails(names.get(descriptor, "/"), ("half",)):
                return write(descriptor, content[:len(content) // 2])
            return write(descriptor, content)

        def synced(descriptor):
            if self.fails(names.get(descriptor, "/"), ("sync",)):
                raise self.error()
            return fsync(descriptor)

        def renamed(source, target, *, real=replace, **settings):
            if self.fails(target, ("rename",)):
                raise self.error()
            return real(source, target, **settings)

        def made_folder(path, *more, **settings):
            if not os.path.isdir(path) and self.fails(path, ("full", "read-only")):
                raise self.error()
            return mkdir(path, *more, **settings)

        io.open = builtins.open = opened
        os.open, os.write, os.fsync, os.mkdir = os_opened, written, synced, made_folder
        os.replace = os.rename = renamed
        return self

    def __exit__(self, *_):
        io.open, os.open, os.write, os.fsync, os.replace, os.rename, os.mkdir = self.real
        builtins.open = io.open


@pytest.mark.parametrize("paper", PAPERS)
def test_a_disk_that_fails_at_any_write_costs_nothing(paper, tmp_path, undisturbed, share, tally):
    """Records, checkpoints, tables, figures: the same command, on a sound disk, ends as ever."""
    chance, tries = random.Random(f"disk {paper}"), share(paper in SHORT, 8)
    whole = finals(undisturbed(paper))
    arguments = [*budget(paper), *in_folder(tmp_path / "run")]
    with Disk(tmp_path) as sound:
        assert call(paper, *arguments)[0] == 0
    for attempt in range(tries):
        shutil.rmtree(tmp_path / "run")
        kind, first = chance.choice([*Disk.KINDS]), chance.randrange(1, sound.writes + 1)
        where = f"{kind} from write {first} of {sound.writes}"
        with Disk(tmp_path, kind, first, stays := chance.random() < 0.7) as disk:
            status, _, err = call(paper, *arguments)
        assert not proper(status, err), f"{where}: {proper(status, err)}"
        assert not disk.hit or status == 2 or "warning: " in err, f"{where}, {stays}: {err}"
        outcome = "one line, exit 2" if status else "a warning" if disk.hit else "not met"
        again, _, err = call(paper, *arguments)
        assert again == 0 and not err, f"{where}, then {err}"
        assert not differ(finals(tmp_path / "run"), whole), where
        tally(f"disk {kind}", f"{outcome}; then as undisturbed")


@pytest.fixture
def mounted(tmp_path):
    """remount(options): a small file system at tmp_path/disk with other options; skips where this
    process may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*words):
        return subprocess.run(["mount", *words, str(place)], capture_output=True).returncode

    if not shutil.which("mount") or mount("-t", "tmpfs", "-o", "size=64m", "tmpfs"):
        pytest.skip("no file system can be mounted here")
    yield lambda options: mount("-o", f"remount,{options}")
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("paper", PAPERS)
def test_a_disk_that_is_full_costs_nothing(paper, tmp_path, mounted, undisturbed, share, tally):
    """The same with a file system that is really full, or really read-only, from some point on."""
    chance, tries = random.Random(f"full {paper}"), share(paper == "gidaris_rotation", 4)
    source, run = undisturbed(paper), tmp_path / "disk"
    whole = finals(source)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    for attempt in range(tries):
        if before := chance.random() < 0.3:
            mounted("ro")
        else:
            mounted(f"rw,size={chance.randrange(4096, size + 8192)}")
        status, _, err = call(paper, *budget(paper), *in_folder(run))
        assert not proper(status, err), proper(status, err)
        assert not before or status == 2, err
        mounted("rw,size=64m")
        assert call(paper, *budget(paper), *in_folder(run))[::2] == (0, "")
        assert not differ(finals(run), whole)
        shutil.rmtree(run / "results", ignore_errors=True)
        shutil.rmtree(run / "runs", ignore_errors=True)
        tally("a read-only file system" if before else "a full file system",
              f"{'one line, exit 2' if status else 'a warning'}; then as undisturbed")


def test_a_disk_that_fails_leaves_no_half_picture(tmp_path, undisturbed, share, tally):
    """--colorize: what was made before is whole, the others are made when there is room again."""
    chance, paper = random.Random("colorize"), "zhang_colorization"
    runs = undisturbed(paper) / "runs"
    for number in range(6):
        name = f"{number} \U0001f408" + [".png", ".jpg", ".webp"][number % 3]
        put(tmp_path / "in" / f"{number % 2}" / name, saved(["png", "jpeg", "webp"][number % 3]))
    made, arguments = tmp_path / "made", ["--colorize", tmp_path / "in", tmp_path / "made",
                                          "--runs", runs, "--device", "cpu"]
    with Disk(made) as sound:
        assert call(paper, *arguments)[0] == 0
    whole = {path: path.read_bytes() for path in made.rglob("*.*")}
    assert len(whole) == 6
    for attempt in range(share(2, 30)):
        shutil.rmtree(made)
        kind, first = chance.choice([*Disk.KINDS]), chance.randrange(1, sound.writes + 1)
        with Disk(made, kind, first, chance.random() < 0.7) as disk:
            status, _, err = call(paper, *arguments)
        assert not proper(status, err) and (status == 2 or not disk.hit), f"{kind} {first}: {err}"
        for path in made.rglob("*.*"):
            assert path.read_bytes() == whole[path], f"{kind} {first}: {path.name} is half-written"
        assert call(paper, *arguments)[0] in (0, 2)
        assert {path: path.read_bytes() for path in made.rglob("*.*")} == whole
        tally("disk while --colorize writes", "one line, exit 2; then as undisturbed"
              if status else "not met; then as undisturbed")


def test_a_disk_that_fails_leaves_no_half_export(tmp_path, share, tally):
    chance, file = random.Random("export"), tmp_path / "made" / "network.pt"
    arguments = [*budget("swav"), *in_folder(tmp_path), "--export", file, "--set=width=1",
                 "--set=network=resnet18", "--set=pretext_epochs=0.06", "--set=batch_size=16"]
    with Disk(file.parent) as sound:
        assert call("swav", *arguments)[0] == 0
    whole = file.read_bytes()
    for attempt in range(share(1, 10)):
        file.unlink()
        kind = chance.choice([*Disk.KINDS])
        with Disk(file.parent, kind, chance.randrange(1, sound.writes + 1)) as disk:
            status, _, err = call("swav", *arguments)
        assert not proper(status, err) and (status == 2 or not disk.hit), f"{kind}: {err}"
        if status:
            assert not [*file.parent.iterdir()], kind
        assert call("swav", *arguments)[0] == (0 if status else 2)  # 2: it is there, and stays
        assert file.read_bytes() == whole
        tally("disk while --export writes", "one line, exit 2; then as undisturbed"
              if status else "not met")


def test_a_disk_that_fails_leaves_no_half_packed_file(tmp_path, share, tally, monkeypatch):
    """A set that cannot be packed is decoded again next time; the run goes on with a warning."""
    chance, noise = random.Random("packing"), np.random.default_rng(0)
    arrays = [noise.integers(0, 256, (60, 16, 16, 1), dtype=np.uint8), np.arange(60) % 10,
              noise.integers(0, 256, (20, 16, 16, 1), dtype=np.uint8), np.arange(20) % 10]
    monkeypatch.setattr(data, "_torchvision", lambda name, root, download: arrays)
    monkeypatch.setitem(data.COUNTS, "usps", (60, 20))
    root, packed = tmp_path / "data", tmp_path / "data" / "packed"
    with Disk(root) as sound, contextlib.redirect_stdout(io.StringIO()):
        sha256 = data.load("usps", root, "cpu").sha256
    for attempt in range(share(5, 30)):
        shutil.rmtree(root)
        kind, said = chance.choice([*Disk.KINDS]), io.StringIO()
        first, stays = chance.randrange(1, sound.writes + 1), chance.random() < 0.7
        with Disk(root, kind, first, stays), contextlib.redirect_stdout(said):
            assert data.load("usps", root, "cpu").sha256 == sha256
        there = sorted(path.name for path in packed.glob("*") if path.suffix != ".lock")
        assert there in ([], ["usps.npz"]), there
        assert there or "could not be written" in said.getvalue(), said.getvalue()
        with contextlib.redirect_stdout(io.StringIO()):
            assert data.load("usps", root, "cpu").sha256 == sha256
        assert [*packed.glob("*.npz")]
        tally("disk while a set is packed", "packed" if there else
              "a warning, goes on; then as undisturbed")


@pytest.mark.parametrize("fault", ["records", "tables"])
def test_tables_on_a_disk_that_fails(fault, tmp_path, undisturbed, share, tally):
    """python -m replicate.report, on a failing disk or with damaged records: no half page."""
    chance, run = random.Random(f"tables {fault}"), tmp_path / "run"
    shutil.copytree(undisturbed("swav") / "results", run)
    lines = [path for path in run.rglob("*.jsonl")]

    def render():
        for path in run.rglob("*.md"):
            path.unlink()
        return report_call(run)
    before = {path: path.read_bytes() for path in lines}
    with Disk(run) as sound:
        assert render()[0] == 0
    pages = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    for attempt in range(share(4, 40)):
        if fault == "records":
            path = chance.choice(lines)
            what, content = damage(before[path], chance, b"\x80PK\3\4")
            if chance.random() < 0.5:  # a record with a field of another type
                chosen, *others = chance.sample(texts := before[path].splitlines(), len(texts))
                record = json.loads(chosen)
                record[chance.choice(["history", *record])] = chance.choice([
                    None, -1, 1.5, 1e308, 10 ** 30, True, "", "\udcff|\n`<b>", [], [1], {},
                    {"a": ""}, {"loss": [[1]]}, {"loss": [[1, "a"]]}, {"loss": [[1, 1e308]]}])
                content = b"\n".join([json.dumps(record).encode(), *others]) + b"\n"
            path.write_bytes(content)
            status, err = render()
            assert path.read_bytes() == content, "a page changed the records"
            path.write_bytes(before[path])
        else:
            what = chance.choice([*Disk.KINDS])
            with Disk(run, what, chance.randrange(1, sound.writes + 1), chance.random() < 0.7):
                status, err = render()
            for path in run.rglob("*.*"):
                assert path.is_dir() or path.read_bytes() == pages[path], f"{what}: {path}"
        assert status in (0, 2) and not proper(status, err), proper(status, err)
        assert render() == (0, "")
        assert {path: path.read_bytes() for path in pages} == pages
        tally(f"pages, {'records damaged' if fault == 'records' else 'disk ' + what}",
              "one line, exit 2; then as undisturbed" if status else "rendered")


def report_call(folder):
    """(status, stderr) of python -m replicate.report --results FOLDER."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = report.main(["--results", str(folder)])
        except SystemExit as end:
            status = end.code
        except BaseException:
            status = "traceback"
            traceback.print_exc()
    return status, err.getvalue()


# ---- Files that are damaged ----

def damage(content, chance, other):
    """(what was done, the bytes of a file after it)."""
    size, content = len(content), bytearray(content)
    first, second = sorted(chance.sample(range(size + 1), 2)) if size else (0, 0)
    kind = chance.choice(["bit flipped", "cut short", "zeroed", "swapped", "rubbish", "doubled"])
    if kind == "bit flipped" and size:
        content[min(first, size - 1)] ^= 1 << chance.randrange(8)
    elif kind == "cut short":
        del content[first:]
    elif kind == "zeroed":
        content[first:second] = bytes(second - first)
    elif kind == "swapped":
        content = bytearray(other)
    elif kind == "rubbish":
        content[first:second] = chance.randbytes(second - first)
    else:
        content += bytes(content)
    return kind, bytes(content)


@pytest.mark.parametrize("paper", PAPERS)
def test_damaged_checkpoints_and_records_are_never_trusted(paper, tmp_path, undisturbed, share,
                                                           tally):
    """A checkpoint is made anew; of damaged records the others stay, and rows that lack are run."""
    chance, tries = random.Random(f"damage {paper}"), share(2 * (paper in SHORT), 20)
    source, run = undisturbed(paper), tmp_path / "run"
    whole = finals(source)
    for attempt in range(tries):
        shutil.copytree(source, run)
        files = {kind: sorted(run.rglob(f"*.{kind}")) for kind in ("pt", "jsonl")}
        kind = chance.choice(["pt", "pt", "jsonl"] if files["pt"] else ["jsonl"])
        victim = chance.choice(files[kind])
        other = chance.choice(files["pt"] or [*run.rglob("*.json")])
        what, content = damage(victim.read_bytes(), chance, other.read_bytes())
        before = victim.read_bytes()
        victim.write_bytes(content)
        if kind == "pt":  # else nothing would read it
            for path in files["jsonl"]:
                path.unlink()
        status, _, err = call(paper, *budget(paper), *in_folder(run))
        where = f"{victim.name} {what}"
        assert status == 0 and not proper(status, err), f"{where}: {proper(status, err)}"
        for path in run.rglob("*.damaged"):
            path.unlink()
        if kind == "jsonl":
            now = victim.read_bytes()
            assert now.startswith(content.rstrip(b"\n")), f"{where}: a line was lost"
            kept = {line for line in before.splitlines() if line in content.splitlines()}
            assert kept <= set(now.splitlines())
            found, _ = records.read(victim)
            rows = {(record["row"], record["seed"]) for record in found}
            assert {(json.loads(line)["row"], 0) for line in before.splitlines()} <= rows, where
        else:
            assert not differ(finals(run), whole), f"{where}: {differ(finals(run), whole)}"
        tally(f"{'checkpoint' if kind == 'pt' else 'records'} {what}", "as undisturbed"
              if kind == "pt" else "other lines kept, missing rows run again")
        shutil.rmtree(run)


def test_a_checkpoint_that_does_not_fit_is_made_anew(tmp_path, undisturbed, share, tally):
    """Sound files of this very run, but of a network or an optimizer that was edited since, or
    with values that none of ours has."""
    paper, run, nan = "gidaris_rotation", tmp_path / "run", float("nan")
    rows = ["--rows", "rotnet4/rotation-accuracy"]
    source = undisturbed(paper, rows[1])
    whole, path = finals(source), next(source.rglob("rotnet4.pt"))
    state = torch.load(path, weights_only=True)
    name, weight = next(iter(state["model"].items()))
    model, group = state["model"], {"lr": 1, "params": [0]}
    changes = [{"model": {**model, name: weight[:1]}}, {"model": {**model, name: weight * nan}},
               {"model": {**model, "more": weight}}, {"model": [1]}, {"model": {}},
               {"step": 1}, {"step": -1}, {"step": 10 ** 9}, {"step": 1.5}, {"step": "1"},
               {"step": 1, "optimizer": {"state": {}, "param_groups": []}},
               {"step": 1, "optimizer": {"state": {}, "param_groups": [group]}},
               {"seconds": "1"}, {"seconds": nan}, {"codes": None}, {"codes": [1]}, {"trace": 3},
               {"trace": {"loss": torch.zeros(1)}}, {"identity": None}, {"identity": [{}]}]
    for change in random.Random(0).sample(changes, share(3, len(changes))):
        shutil.copytree(source / "runs", run / "runs")
        torch.save({**state, **change}, run / path.relative_to(source))
        status, out, err = call(paper, *budget(paper), *rows, *in_folder(run))
        assert status == 0 and not err and "set aside as rotnet4.pt.damaged" in out, (change, err)
        next(run.rglob("*.damaged")).unlink()
        assert not differ(finals(run), whole), change
        shutil.rmtree(run)
        tally("checkpoint of other code", "set aside; as undisturbed")


def test_damaged_packed_files_are_set_aside(tmp_path, share, tally, write_packed):
    """They are never taken: decoded again, or, where nothing is there to decode, one line."""
    chance = random.Random("packed")
    shapes = {"cifar10": (32, 32, 3), "svhn": (32, 32, 3), "mnist": (28, 28, 1),
              "stl10": (96, 96, 3), "usps": (16, 16, 1)}
    for name, shape in shapes.items():
        write_packed(tmp_path, name, shape=shape)
    hashes = {name: data.load(name, tmp_path, "cpu").sha256 for name in shapes}
    kept = {path: path.read_bytes() for path in (tmp_path / "packed").glob("*.npz")}
    for attempt in range(share(10, 60)):
        path, other = chance.choice(list(kept)), chance.choice(list(kept))
        what, content = damage(kept[path], chance, kept[other])
        path.write_bytes(content)
        said, outcome = io.StringIO(), "one line, set aside"
        with contextlib.redirect_stdout(said):
            try:
                got = data.load(path.stem, tmp_path, "cpu").sha256
                if what == "swapped" and path.stem in ("cifar10", "svhn"):
                    outcome = "the other set's hash in the record"  # of the same shape
                    assert got in hashes.values()
                else:
                    outcome = "harmless"
                    assert got == hashes[path.stem], f"{path.name} {what}: other images"
            except records.InputError as error:
                aside = path.with_suffix(".npz.damaged")
                assert aside.read_bytes() == content and "is damaged" in said.getvalue()
                assert len(str(error).splitlines()) == 1
                aside.unlink()
        tally(f"packed file {what}", outcome)
        path.write_bytes(kept[path])


# ---- Settings and command lines ----

ODD = ["", " ", "nan", "inf", "-inf", "-1", "0", "1", "2", "3", "7", "1e-12", "1e400", "1e9",
       "-0.0", "999999999999", "9223372036854775808", "0.5", "-0.5", "true", "false", "null", "~",
       "[]",
       "[1]", "[1, 2, 3]", "[-1, 0]", "[nan]", "[[1]]", "[true]", "{a: 1}",
       "!!python/name:os.system", "2024-99-99",
       "'", '"', "\\", "é", "\U0001f408", "\u202e", "x" * 5000, "../../etc/passwd", "/dev/null",
       "folder:", "folder:/", "folder:/nonexistent/\U0001f408", "folder:.", "embedded", "mnist",
       "embedded-digits", "cifar10", "imagenette", "float32", "&a [*a]", "[" * 3000, "2024-01-01",
       "0x10", "1_000", "1:30", "NO", "3.", ".5", "+7", "1e", "=", "a=b", "*", "[a-", "\udcff"]


def odd_setting(config, chance):
    """key=value with a key that may be unknown and a value that may be of any kind, or near to a
    good one."""
    name = chance.choice([*vars(config)])
    value = getattr(config, name)
    if chance.random() < 0.5:
        value = chance.choice(ODD)
    elif isinstance(value, bool) or isinstance(value, str) or not value:
        value = chance.choice([not value, value * 2, 1, value])
    elif isinstance(value, tuple):
        value = list(chance.choice([value[1:], value * 2, value[::-1], [2 * part for part in value],
                                    [-part for part in value], [part / 3 for part in value]]))
    else:
        value = chance.choice([value * 2, value / 2, value * 10, value // 4, -value, value + 1,
                               value - 1, value * 1000, float(value)])
    if chance.random() < 0.05:
        name = chance.choice([*ODD, name.upper(), name[:-1]])
    return f"{name}={value}"


def odd_command(paper, config, chance, folder, large):
    """A command line with one to three things wrong with it, or nothing."""
    words = [*budget(paper), "--rows", ROWS.get(paper, "*"), *in_folder(folder)]
    words += ["--plan"] * (chance.random() < 0.8)
    if large and chance.random() < 0.2:  # the networks of the larger scales, on drawn images
        declared = records.read_declared(ROOT / "papers" / f"{paper}.yaml")
        words = ["--scale", chance.choice(["small", "full", "paper"]), "--set", "dataset=embedded",
                 "--rows", chance.choice([*declared["rows"]]), "--plan", *in_folder(folder)]
        words += ["--device", "cpu", "--set", f"batch_size={chance.choice([2, 4, 8])}"]
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        odd = chance.choice(ODD)
        words += chance.choice([
            *[["--set", odd_setting(config, chance)]] * 12, ["--scale", odd], ["--seeds", odd],
            ["--seeds", chance.choice(["0,0", "0,,1", "1,-1", "1.0", "9" * 30, "0x1", "٣"])],
            ["--rows", odd], ["--device", odd], ["--data", odd], ["--data", str(folder)],
            ["--results", odd], ["--runs", "/dev/null"], ["--results", "/proc/x"], ["--set"],
            ["--set", odd], [f"--{odd}"], [odd], ["--plan", "--force"], ["--help"],
            ["--colorize", odd, odd], ["--colorize", str(folder), odd], ["--checkpoint", odd],
            ["--export", odd], ["--evaluate", odd], ["--evaluate", __file__], ["--rows", "*,*"]])
    return words


@contextlib.contextmanager
def memory_limit(more=3 << 30):
    """At most so many bytes more than now, so that a huge setting fails and no machine swaps."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited by Linux's")
@pytest.mark.parametrize("paper", PAPERS)
def test_no_setting_or_command_line_ends_in_a_traceback(paper, tmp_path, monkeypatch, share, tally):
    chance, tries = random.Random(f"settings {paper}"), share(4, 43)
    script = importlib.import_module(f"papers.{paper}")
    config, _ = trainer.read_settings(script.Config, ROOT / "papers" / f"{paper}.yaml", "smoke")
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path / "data"))
    faults = []
    for attempt in range(tries):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        monkeypatch.chdir(folder)
        words = odd_command(paper, config, chance, folder, tries > 9)
        with memory_limit():
            status, _, err = call(paper, *words, seconds=30)
        short = [word[:60] for word in words if str(folder) not in str(word)]
        if why := proper(status, err):
            faults.append(f"{paper} {short}: {why}")
        tally("settings and command lines", "runs" if status == 0 else
              "long, ended by Ctrl-C" if status == 130 else ENDS.get(status, status))
        shutil.rmtree(folder)
    assert not faults, f"{len(faults)} faults\n" + "\n\n".join(faults)


def test_a_mistake_in_a_yaml_gets_one_line(tmp_path, share, tally):
    """Of a paper that a user adds: the settings, the rows and the pages take it, or say what is
    wrong."""
    chance, papers = random.Random("yaml"), tmp_path / "papers"
    results = tmp_path / "results" / "small"
    results.mkdir(parents=True)
    papers.mkdir()

    def places(node, path=()):
        nodes = enumerate(node) if isinstance(node, list) else getattr(node, "items", tuple)()
        for key, child in nodes:
            yield from [(*path, key), *places(child, (*path, key))]

    for attempt in range(share(15, 300)):
        paper = chance.choice(PAPERS)
        declared = yaml.safe_load((ROOT / "papers" / f"{paper}.yaml").read_text())
        few = [place for place in places(declared) if place[0] != "rows"]
        *way, last = chance.choice(chance.choice([[*places(declared)], few]))
        node = declared
        for key in way:
            node = node[key]
        if chance.random() < 0.2:
            del node[last]
        else:
            node[last] = chance.choice([None, 3, -1, 1.5, "x", "", "a > b", [], [1], [[]], {},
                                        {"a": 1}, {"x": None}, True, float("nan"), 10 ** 30])
        (papers / f"{paper}.yaml").write_text(yaml.safe_dump(declared, sort_keys=False))
        (papers / f"{paper}.py").write_text("")
        records_file = ROOT / "results" / "small" / f"{paper}.jsonl"
        if records_file.exists():
            shutil.copy(records_file, results)
        outcome, script = "taken", importlib.import_module(f"papers.{paper}")
        try:
            for scale in ("smoke", "small"):
                trainer.read_settings(script.Config, papers / f"{paper}.yaml", scale)
            with contextlib.redirect_stderr(io.StringIO()):
                report.render(results.parent, papers)
        except records.InputError as error:
            outcome = "one line"
            assert len(str(error).splitlines()) == 1
        tally("mistakes in a YAML", outcome)
        for path in (papers / f"{paper}.yaml", papers / f"{paper}.py", *results.iterdir()):
            path.unlink()


# ---- Pictures of every kind ----

def sheet(colors=True):
    """(36,40,3) uint8: a picture whose four quarters differ, to be found again after decoding."""
    quarters = np.array([[[200, 40, 40], [40, 180, 60]], [[30, 60, 210], [230, 220, 60]]])
    picture = quarters.repeat(18, 0).repeat(20, 1)
    return (picture if colors else picture.mean(2, keepdims=True).repeat(3, 2)).astype(np.uint8)


def chunk(kind, content):
    """A chunk of a PNG file."""
    return (len(content).to_bytes(4) + kind + content
            + zlib.crc32(kind + content).to_bytes(4))


def png(width, height, rows, bits=8, kind=2):
    """The bytes of a PNG file, of any size and depth, whatever stands in it."""
    head = width.to_bytes(4) + height.to_bytes(4) + bytes([bits, kind, 0, 0, 0])
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def saved(kind, picture=None, mode=None, **settings):
    """The bytes of a picture file, by Pillow."""
    picture, buffer = Image.fromarray(sheet()) if picture is None else picture, io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, kind, **settings)
    return buffer.getvalue()


def pictures():
    """{file name: (content, what is expected)}: "color" and "grey" are decoded to the sheet in
    those colours, "taken" is some picture, "refused" gets one line, "left out" is passed over.
    The content is bytes, or a function that makes what is at a path."""
    grey = Image.fromarray(sheet(colors=False)[..., 0])
    levels = np.asarray(grey).astype(np.float64)
    turned, odd_exif = Image.Exif(), Image.Exif()
    turned[0x0112], odd_exif[0x0112] = 6, 77
    sideways = Image.fromarray(np.ascontiguousarray(np.rot90(sheet())))
    clear = Image.fromarray(sheet()).convert("RGBA")
    deep = b"".join(b"\0" + row.astype(">u2").tobytes() for row in sheet().astype(int) * 257)
    frames = {"save_all": True, "append_images": [Image.new("RGB", (40, 36), "red")]}
    whole, jpeg = saved("png"), saved("jpeg", quality=95)
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 4
    holed = jpeg[:700] + bytes(60) + jpeg[760:]
    made = {
        "rgb.png": (whole, "color"), "grey.png": (saved("png", grey), "grey"),
        "rgba.png": (saved("png", clear), "color"), "la.png": (saved("png", grey, "LA"), "grey"),
        "palette.png": (saved("png", mode="P"), "color"),
        "palette clear.png": (saved("png", mode="P", transparency=255), "taken"),
        "one bit.png": (saved("png", mode="1"), "taken"),
        "deep grey.png": (saved("png", Image.fromarray((levels * 257).astype(np.uint16))), "grey"),
        "deep rgb.png": (png(40, 36, deep, bits=16), "color"),
        "cut.png": (whole[:-60], "refused"), "half.png": (whole[:len(whole) // 2], "refused"),
        "broken.png": (bytes(broken), "refused"), "no bytes.png": (b"", "refused"),
        "huge.png": (png(60000, 60000, b""), "refused"), "none.png": (png(0, 0, b""), "refused"),
        "no rows.png": (png(40, 36, b""), "refused"), "dot.png": (png(1, 1, b"\0" * 4), "refused"),
        "flat.png": (png(300, 7, b"\0" * 7 * 901), "refused"),
        "long.png": (png(4000, 8, b"\0" * 8 * 12001), "taken"),
        "UPPER.PNG": (whole, "color"), "trailing.png": (whole + b"rubbish" * 9, "color"),
        "a jpeg really.png": (jpeg, "color"),
        "rgb.jpg": (jpeg, "color"), "grey.jpeg": (saved("jpeg", grey), "grey"),
        "cmyk.jpg": (saved("jpeg", mode="CMYK", quality=95), "color"),
        "progressive.jpe": (saved("jpeg", progressive=True, quality=95), "color"),
        "turned.jpg": (saved("jpeg", sideways, exif=turned, quality=95), "color"),
        "odd exif.jpg": (saved("jpeg", exif=odd_exif, quality=95), "color"),
        "rubbish exif.jpg": (saved("jpeg", exif=b"Exif\0\0" + b"\xff" * 40, quality=95), "color"),
        "worst.jfif": (saved("jpeg", quality=1), "taken"), "cut.jpg": (jpeg[:-300], "refused"),
        "holed.jpg": (holed, "any"), "text.jpg": (b"not a picture\n", "refused"),
        "page.jpg": (b"<!DOCTYPE html><html></html>", "refused"),
        "still.gif": (saved("gif"), "color"), "moving.gif": (saved("gif", **frames), "color"),
        "clear.gif": (saved("gif", clear), "color"), "cut.gif": (saved("gif")[:90], "any"),
        "rgb.bmp": (saved("bmp"), "color"), "one bit.bmp": (saved("bmp", mode="1"), "taken"),
        "cut.bmp": (saved("bmp")[:2000], "refused"),
        "rgb.tif": (saved("tiff"), "color"), "lzw.tiff": (saved("tiff", compression="tiff_lzw"),
                                                          "color"),
        "pages.tif": (saved("tiff", **frames), "color"),
        "deep.tif": (saved("tiff", Image.fromarray((levels * 257).astype(np.uint16))), "grey"),
        "float.tif": (saved("tiff", Image.fromarray((levels / 255).astype(np.float32))), "grey"),
        "nan.tif": (saved("tiff", Image.fromarray(np.full((36, 40), np.nan, np.float32))), "taken"),
        "inf.tif": (saved("tiff", Image.fromarray(np.full((36, 40), np.inf, np.float32))), "taken"),
        "cut.tif": (saved("tiff")[:900], "refused"),
        "rgb.webp": (saved("webp", lossless=True), "color"),
        "moving.webp": (saved("webp", lossless=True, **frames), "color"),
        "cut.webp": (saved("webp", lossless=True)[:60], "refused"),
        "rgb.ppm": (saved("ppm"), "color"), "grey.pgm": (saved("ppm", grey), "grey"),
        "cut.ppm": (saved("ppm")[:500], "refused"), "negative.ppm": (b"P6 -4 4 255\n", "refused"),
        "rgb.ico": (saved("ico"), "left out"), "notes.txt": (b"hello", "left out"),
        "photo.heic": (b"\0\0\0\x18ftypheic", "left out"), "no suffix": (whole, "left out"),
        ".hidden.png": (whole, "left out"), "._rgb.png": (b"\0\5\x16\7", "left out"),
        "Thumbs.db": (b"", "left out"), "@eaDir.jpg": (b"", "left out"),
        "dangling.png": (lambda path: path.symlink_to("/nonexistent/x.png"), "left out"),
        "itself.png": (lambda path: path.symlink_to(path.name), "left out"),
        "a folder.png": (lambda path: path.mkdir(), "any"),
        "a pipe.png": (lambda path: os.mkfifo(path), "left out"),
        "\U0001f408 \u202e\u00e9.png": (whole, "color"),
        " spaces  and 'quotes\".png": (whole, "color"),
        "two\nlines.png": (whole, "color"), "two\nlines, cut.png": (whole[:90], "refused"),
        "\U0001f408.jpg": (b"", "refused"), "-rf.png": (whole, "color"),
        "%s{0}.png": (whole, "color"),
        "n" * 240 + ".png": (whole, "color"), "bytes \udcff.png": (whole, "color"),
        "bytes \udcff.jpg": (b"", "refused"), "a:b|c*?.png": (whole, "color")}
    for kind, name in (("jpeg2000", "rgb.jp2"), ("avif", "rgb.avif")):
        with contextlib.suppress(KeyError, OSError):  # not in every Pillow
            made[name] = saved(kind), "color"
    return made


def put(path, content):
    """Make the file at a path; nothing where this file system takes no such name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError, UnicodeError):
        content(path) if callable(content) else path.write_bytes(content)
    return os.path.lexists(path)


PICTURE_ROWS = {"gidaris_rotation": "random/block2/knn", "doersch_context": "random/conv4/linear",
                "noroozi_jigsaw": "random/conv4/linear", "zhang_colorization": "grey/auc-raw",
                "swav": "random/knn20"}


def album(folder, count=20):
    """A folder of sound pictures of two classes."""
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog \U0001f408"):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                noise = random.integers(0, 40, (36, 40, 3), dtype=np.uint8)
                Image.fromarray(sheet()[::1 - 2 * (name == "cat")] + noise // 2).save(
                    folder / part / name / f"{number}.png")
    return folder


def test_pictures_are_decoded_as_seen_or_get_one_line(tmp_path, tally):
    for name, (content, expected) in pictures().items():
        if not put(tmp_path / name, content):
            continue
        if expected != "left out":
            try:
                got, status = data.decode(str(tmp_path / name), 32), "decoded"
                if expected in ("color", "grey"):
                    wanted = sheet(colors=expected == "color")
                    corners = [(a, b) for a in (4, 28) for b in (4, 28)]
                    for y, x in corners:
                        pixel = wanted[4 if y < 16 else -4, 4 if x < 16 else -4].astype(int)
                        distance = np.abs(got[:, y, x].numpy() - pixel).max()
                        assert distance < 25, f"{name}: {got[:, y, x]} where {pixel} is seen"
                    status = "decoded as seen"
                assert expected != "refused", f"{name} was taken"
            except records.InputError as error:
                assert expected in ("refused", "any"), f"{name}: {error}"
                status = "one line"
            tally("picture files", status)


@pytest.mark.parametrize("paper", PICTURE_ROWS)
def test_one_odd_picture_in_an_album_costs_nothing(paper, tmp_path, share, tally, monkeypatch):
    """The paper runs, or names the picture in one line, and runs when that is gone."""
    chance = random.Random(f"pictures {paper}")
    folder, everything = album(tmp_path / "my photos \U0001f408 #2: all"), pictures()
    options = [*budget(paper), "--rows", PICTURE_ROWS[paper], *in_folder(tmp_path / "\U0001f408"),
               "--set", f"dataset=folder:{folder}"]
    names = chance.sample([*everything], share(4, len(everything)))
    for name in names:
        content, expected = everything[name]
        part = folder / chance.choice(["train", "test"]) / "cat"
        if not put(part / name, content):
            continue
        streamed = ["--set", "streamed=true"] * (chance.random() < 0.3)
        status, out, err = call(paper, *options, *streamed, "--force")
        where = f"{name!r} {streamed}"
        assert not proper(status, err), f"{where}: {proper(status, err)}"
        if expected != "any":
            assert status == (2 if expected == "refused" else 0), f"{where}: {err} {out}"
        if status == 2:
            assert err.count("\n") == 1 and "mend or remove it" in err, f"{where}: {err}"
        assert ("left out: " in out) == (expected == "left out"), f"{where}: {out}"
        (part / name).rmdir() if name == "a folder.png" else (part / name).unlink()
        tally("album with an odd picture", ENDS[status] if status else
              "left out, said so" if expected == "left out" else "runs")
    status, _, err = call(paper, *options, "--force")
    assert status == 0 and not err, err
