"""The command line of every paper: `launch` runs a script's reproduce(run) for each seed.

Exit status: 0 done, 2 wrong input, 3 training failed, 130 interrupted.
"""
import argparse
import contextlib
import dataclasses
import fcntl
import math
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from replicate import records, report, terminal, trainer
from replicate.records import ROOT, InputError
from replicate.trainer import Interrupted, Run, TrainingFailed, read_settings


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def parse(paper, arguments, options=None):
    parser = Parser(prog=f"python -m papers.{paper}", allow_abbrev=False)
    add = parser.add_argument
    add("--scale", default="small", help="smoke, demo, small, full or paper")
    add("--seeds", help="such as 0,1,2; default: those that the scale declares")
    add("--rows", default="*", metavar="GLOB", help="such as 'rotnet4/*'; several with commas")
    add("--data", metavar="DIR", help="data root")
    add("--device", default="auto", choices=terminal.DEVICES)
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a setting; its results go to a suite of their own")
    add("--results", default=str(ROOT / "out"), metavar="DIR",
        help="default: out/; results/ holds the reference")
    add("--runs", default=str(ROOT / "runs"), metavar="DIR", help="checkpoints")
    add("--plan", action="store_true", help="time a few steps of what is not recorded, and stop")
    add("--quiet", action="store_true", help="print results and errors only")
    add("--force", action="store_true", help="run again what is recorded already")
    if options:
        options(parser)
    given = parser.parse_args(arguments)
    for name, value in vars(given).items():
        texts = value if isinstance(value, list) else [value]
        if name != "overrides" and "" in texts:  # such as a shell's variable that is not set
            raise InputError(f"--{name} is empty: give it a value, or leave it out")
        texts = [os.path.expanduser(text) if isinstance(text, str) else text for text in texts]
        setattr(given, name, texts if isinstance(value, list) else texts[0])  # as in --runs=~/runs
    return given


def tell(line, run=None):
    """One line on stderr, from the first rank only; the live line of a run makes room."""
    if records.is_first_rank():
        if run:
            run.line.clear()
        with contextlib.suppress(OSError):  # the exit status says it, too
            print(line.replace("\n", "\\n"), file=sys.stderr, flush=True)


def pick_device(name):
    """auto, cpu or cuda -> torch.device; this rank's GPU under torchrun."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' asked for but no CUDA GPU is visible: --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def set_up(config, name):
    """The device of this rank, once all ranks have met; InputError where they cannot."""
    try:
        device = pick_device(name)
        trainer.prepare(config, device)
        return device
    except (ValueError, RuntimeError) as error:  # what torch makes of LOCAL_RANK and the like
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"the ranks cannot be set up ({reason}): start them with torchrun, on a "
                         "machine with GPUs at most one for each; for a single process, unset "
                         "WORLD_SIZE, RANK and LOCAL_RANK") from None


def require_finite(path, tensors):
    """InputError where one of {name: tensor}, read from a file, holds NaN or infinity."""
    for name, tensor in tensors.items():
        if torch.is_tensor(tensor) and not tensor.float().isfinite().all():
            raise InputError(f"{path}: {name} holds NaN or infinity, and no network computes "
                             "with that; give another file")


def suite_name(scale, config, own, overrides):
    """Other data or settings get another suite, so that no experiment mixes with the protocol."""
    suite = scale
    if config.dataset != own.dataset:
        name = config.dataset.rstrip("/").split("/")[-1][:40]  # which may be long for a suite's
        suite += "-" + "".join(letter if letter.isalnum() else "-" for letter in name)
        if config.dataset.startswith("folder:"):  # two folders may have the same last name
            suite += f"-{trainer.derive(0, config.dataset) % 16 ** 6:06x}"
    return suite + "-custom" * any(not each.startswith("dataset=") for each in overrides)


def runs(script, Config, options, rows, always):
    """Check everything that can be checked, then yield the Run of each seed, holding its lock."""
    declared = records.read_declared(script)
    own, _ = read_settings(Config, declared, options.scale)
    config, block = read_settings(Config, declared, options.scale, 0, options.overrides)
    names = records.matching(declared["rows"], rows(config) if rows else ["*"])
    only = options.rows.split(",")
    for glob in only:
        if not records.matching(names, [glob]):
            raise InputError(f"no row matches '{glob}'; rows: {', '.join(names)}")
    seeds = terminal.read_seeds(options.seeds, block["seeds"])
    terminal.check_options(options)
    device = set_up(config, options.device)
    left_out = {}  # one for all seeds, so that a line is said once
    for seed in seeds[:1] if options.plan else seeds:
        run = Run(script, dataclasses.replace(config, seed=seed), options.scale,
                  {name: declared["rows"][name] for name in names}, device, only=only,
                  suite=suite_name(options.scale, config, own, options.overrides),
                  results=options.results, runs=options.runs, data=options.data,
                  force=options.force, scale_rows=block.get("rows", ["*"]), plan=options.plan,
                  quiet=options.quiet)
        run.left_out = left_out
        here = records.matching(records.matching(names, run.scale_rows), only)
        todo, have = run.wants("*"), len(here)
        pictures = any(str(value).startswith("folder:") for value in vars(config).values())
        if not todo and have and pictures:
            run.say(f"seed {seed}: {have} rows are recorded; are the pictures still the same?")
        if options.plan:
            yield run
        elif todo or always or have and pictures:
            run.say(f"{os.environ.get('REPLICATE_TURN', '')}{run.paper}, scale {options.scale}, "
                    f"seed {seed}: {report.count(len(todo), 'row')} to do on "
                    f"{trainer.device_name(device)}, {report.count(run.ranks, 'rank')}, "
                    f"{report.count(torch.get_num_threads(), 'thread')}, run {run.hash}"
                    f"{terminal.time_of_reference(run, todo, Path(script).parent)}")
            with locked(run):
                yield run
        elif have:
            file = run.suite / f"{run.paper}.jsonl"
            run.say(f"seed {seed}: nothing to do, {have} rows of {run.paper} are in {file}")
            terminal.note(run)
            if run.rank == 0:  # a run that was killed after its last record left none
                render_tables(run.suite.parent, Path(script).parent)
        else:
            run.say(f"seed {seed}: scale {options.scale} has none of these rows")


def require_whole(path):
    """InputError where there is no file, or where one that torch.save wrote does not agree with
    its checksums."""
    if not Path(path).is_file():  # a pipe could not be read twice
        raise InputError(f"no file {path}")
    if records.damaged_part(path):
        raise InputError(f"{path} is damaged (its checksum does not fit): copy or download it "
                         "again")


@contextlib.contextmanager
def locked(run):
    """Hold the lock of a run's checkpoints: the first rank does, and a plan needs none."""
    with contextlib.ExitStack() as stack:
        if run.rank == 0 and not run.plan:
            file = run.suite / f"{run.paper}.jsonl"
            terminal.require_writable(run.suite, "--results DIR", file)
            terminal.require_writable(run.folder, "--runs DIR", run.folder / "lock")
            lock = stack.enter_context(open(run.folder / "lock", "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"run {run.hash} (seed {run.seed}) is going on in another "
                                 "process: wait for it, or give another folder with --runs "
                                 "DIR") from None
            except OSError:  # a file system without locks
                run.say(f"note: no lock in {run.folder}: do not run the same twice at once")
            for checkpoint in run.folder.glob("*.pt") if run.force else ():
                checkpoint.unlink()
        if run.ranks > 1:
            dist.barrier()
        yield


def failure(error, run):
    """The line for an error that a training may die of, or None for a fault of ours."""
    text = str(error)
    if isinstance(error, TrainingFailed):
        return text
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return (f"out of memory on {run.device}: lower batch_size or width with --set, or a budget "
                "of very many steps")
    if "more than 1 value per channel" in text:
        return (f"{run.fitting or run.paper}: a batch of one image cannot be normalised (its "
                "variance is 0): --set batch_size=2 or more")
    if re.search("size is too small|shapes cannot be multiplied|[Kk]ernel size", text):
        return (f"{run.fitting or run.paper}: the network takes no images or crops of this size "
                f"({text.splitlines()[0]}): change image_size or crop_size with --set")
    if "start new thread" in text:
        return "no more threads can be started here: raise the limit of processes (ulimit -u)"
    if isinstance(error, (torch.linalg.LinAlgError, OverflowError)):
        return (f"{run.fitting or run.paper}: a setting or weight is too large or too small, "
                f"numbers run out of their range ({text.splitlines()[0]})")
    lost = isinstance(error, dist.DistError) or re.search("by peer|Broken pipe|Timed out", text)
    if run.ranks > 1 and lost:
        return "another rank is gone: the same command goes on from the state saved last"


def attempt(run, reproduce):
    """reproduce(run), again without the rows whose training has failed -> exit status."""
    status = 0
    while True:
        try:
            reproduce(run)
            return 2 if run.left_out else status
        except (TrainingFailed, RuntimeError, MemoryError, ValueError, OverflowError) as error:
            line, alone = failure(error, run), run.plan or run.ranks > 1 or not run.asked
            if not line:
                raise
            tell(f"error: {line}", run)
            status = 3
            if not run.plan:
                run.give_up(line)
            if alone:  # nothing to leave out, or other ranks may be waiting for this one
                return status


def launch(script, Config, reproduce, arguments=None, *, rows=None, options=None, use=None):
    """A paper script's main -> exit status.  A row whose training fails is recorded as failed, and
    reproduce is called again for the others.

    script: the paper's file; the YAML of the same name lies beside it.
    rows(config): globs of the rows that make sense for a config; default: all of the YAML's.
    options(parser): adds the script's own arguments.
    use(options): called with the parsed arguments before anything else.  None: go on.  A number:
    exit status.  A function: called with each seed's Run in place of reproduce, recorded or not.
    """
    run, status, heard, ending = None, 0, -math.inf, False

    def on_signal(number, frame):
        nonlocal heard
        before, heard = heard, time.monotonic()
        if ending or heard - before < 1:  # pressed twice in impatience: it means the same
            return
        if not (run and run.fitting and not run.stop):
            raise Interrupted
        run.stop = True  # fit saves at the end of the step

    sys.stdout, sys.stderr = (output or open(os.devnull, "w")  # None where they are closed
                              for output in (sys.stdout, sys.stderr))
    records.show_all_text()
    handlers = {each: signal.signal(each, on_signal) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        if not __debug__:
            raise InputError("Python's option -O (PYTHONOPTIMIZE) would leave out the checks of "
                             "settings: run without it")
        given = parse(Path(script).stem, arguments, options)
        other = use(given) if use else None
        if isinstance(other, int):
            return other
        for run in runs(script, Config, given, rows, always=bool(other)):
            if not run.plan or run.wants("*"):
                status = attempt(run, other or reproduce) or status
            terminal.note(run)
            if run.plan:
                here = records.matching(records.matching(run.rows, run.scale_rows), run.only)
                recorded = 0 if run.force else sum(bool(run.recorded(row)) for row in here)
                run.say("\n".join(terminal.plan_lines(run, recorded)))
            elif run.rank == 0:
                render_tables(run.suite.parent, Path(script).parent)
            if status == 3 and run.ranks > 1:
                break
        ending = True
        return status
    except (InputError, OSError) as error:
        ending = True
        tell(f"error: {error}", run)
        return 2
    except AssertionError as error:
        ending = True
        frames = traceback.extract_tb(error.__traceback__)
        if not any(frame.name == "__post_init__" for frame in frames):  # no check of a Config's
            raise
        tell(f"error: {error}")
        return 2
    except Interrupted:
        ending, status = True, 130
        place = f" ({run.paper}, seed {run.seed})" if run else ""
        tell(f"interrupted: the same command goes on from the state saved last{place}", run)
        return 130
    finally:
        for number, handler in handlers.items():
            own = status == 130 and arguments is None  # a process that has only to end now
            signal.signal(number, signal.SIG_IGN if own else handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def render_tables(results, papers):
    """A table that cannot be made is no reason to lose a run that is recorded."""
    try:
        report.write_tables(results, papers)
    except (OSError, ValueError, InputError) as error:
        tell(f"warning: tables not rendered ({error}); ./run_all.sh tables does it again")
