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
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TALLY
from PIL import Image

from replicate import data, records, trainer
from replicate.records import ROOT

PAPERS = sorted(path.stem for path in (ROOT / "papers").glob("*.yaml"))
TAKE_PICTURES = [paper for paper in PAPERS if paper != "dann"]  # DANN takes two sets of digits
ENDS = {0: "as undisturbed", 2: "one line, exit 2", 3: "one line, exit 3", 130: "exit 130"}
HANGS = 120  # seconds after which a run counts as hanging
# Rows that train a little and take a second or two with 600 drawn images
ROWS = {"gidaris_rotation": "rotnet4/rotation-accuracy,random/block2/knn",
        "doersch_context": "context/position-accuracy,random/conv4/linear",
        "noroozi_jigsaw": "jigsaw/puzzle-accuracy,random/conv4/linear",
        "zhang_colorization": "full/auc-raw,grey/auc-raw",
        "swav": "swav/knn20,random/knn20", "dann": "moons/*,mnist-mnistm/source-only"}


# ---- How a script is run here ----

class Hung(BaseException):
    """A run took longer than HANGS seconds."""


@contextlib.contextmanager
def small_sets():
    """Drawn sets of 600 and 160 images in place of 10,000 and 2,000, drawn once; no network."""
    drawn, draw, torchvision = {}, data._draw, data._torchvision

    def cached(name, size):
        if (name, size) not in drawn:
            if name not in data.DRAWN:
                return draw(name, size)
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
                "dann": {"steps": 6, "moons_epochs": 3}}.get(paper, {})
    return ["--scale", "smoke", "--device", "cpu",
            *(f"--set={name}={value}" for name, value in changes.items())]


def call(paper, *arguments, seconds=HANGS):
    """A script's main in this process -> (exit status, stdout, stderr).

    The status is "hangs" or "traceback" where it should be a number; stderr holds the traceback."""
    def ring(number, frame):
        raise Hung

    script, out, err = importlib.import_module(f"papers.{paper}"), io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, ring)
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
    timed = ("seconds", "peak_memory_mb", "started", "commit", "dirty")
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
    return lambda few, many: many if request.config.getoption("--long") else few


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
    chance, kills, attempt = random.Random(f"kills {paper}"), share(1, 17), 0
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
        assert process.exitcode in (0, 130, -(sent or 0)), f"{process.exitcode}: {said}"
        assert "Traceback" not in said, said
        if sent:
            tally(f"{sent.name} at a random moment", "goes on, ends as undisturbed")
        if process.exitcode == 0:
            assert not differ(finals(folder), whole)
            shutil.rmtree(folder)


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
    chance, whole = random.Random(f"disk {paper}"), finals(undisturbed(paper))
    arguments = [*budget(paper), *in_folder(tmp_path / "run")]
    with Disk(tmp_path) as sound:
        assert call(paper, *arguments)[0] == 0
    for attempt in range(share(1, 12)):
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
