"""Speed: ratios measured in one run on this machine, with bare times beside them.

    ./run_all.sh bench [smoke|demo|small|full] [paper ...] [--results DIR] [--quick]

Every training that a paper's `pretrain` begins at the scale runs through the real `Run.fit`, which
is handed full steps (draw, augment, train), steps on a batch prepared on the device, and where
there is one the idiomatic version's, by turns: A B C A B C ...  Medians and quartiles are of the
ratios of neighbours.  Beside them: the arithmetic of a step against a large matrix product in the
same precision, peak memory, start-up, how a step grows, and the protocols on features.

Images are made up, of the right shapes and numbers: speed does not depend on what they show, so
nothing is downloaded and no data are needed.  Lines go to DIR/bench.jsonl, the page to DIR/BENCH.md
(default: out/bench; the reference is made with --results results).
"""
import argparse
import functools
import importlib
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # where tests/ and replicate/ lie

from replicate import data, evaluate, launch, records, terminal, trainer
from replicate.records import ROOT
from bench_page import MAIN, render, spread
from idiomatic import VERSIONS, WORKERS, clock, idiomatic_step

SETTINGS = {  # no watch on collapse, which random bytes would set off; prototypes learn from step 0
    "swav": ["patience=0", "freeze=0", "queue_start=0"]}
PREPARATION = {"gidaris_rotation": ["rotate", "normalize"]}  # outside run.augment, before training
SIDES = {  # the settings that grow with an image; DANN's networks take images of one size
    "gidaris_rotation": ["image_size", "crop_size"],
    "zhang_colorization": ["image_size", "crop_size"],
    "doersch_context": ["image_size", "patch", "gap", "jitter"],
    "noroozi_jigsaw": ["image_size", "tile", "gap"],
    "swav": ["image_size", "crop_sizes", "test_size"]}
GROWTH = {"batch_size": (2, 5, 10), "side": (2, 3), "images": (2, 10)}


class Measured(BaseException):
    """What was asked for has been timed: the training need not go on."""


def made_up(times, name, root, device, size=None, streamed=None):
    """Stands in for data.load: noise with the shape of the set and `times` as many images, at most
    2 GB of them before they are multiplied."""
    classes, (side, _, channels) = data.PACKED.get(name, (10, (size or 32, size or 32, 3)))[:2]
    if name.startswith("embedded-digits") or name == "mnist-m":
        side, channels = 28, 1 if name == "embedded-digits" else 3
    side = size if size and channels == 3 else side
    known = {**data.COUNTS, "imagenette": data.IMAGENETTE[0], "mnist-m": data.COUNTS["mnist"]}
    counts = known.get(name, (10000, 2000))
    counts = [min(count, 2 * 10 ** 9 // (channels * side * side)) for count in counts]
    if sum(counts) * times * channels * side ** 2 > 4e9 + 1.2e10 * (device.type == "cuda"):
        raise records.InputError(f"{times} times {name} would not fit into memory")
    noise = torch.randint(256, (100, channels, side, side), dtype=torch.uint8, device=device)
    splits = [data.Resident(noise.repeat(-(-count // 100), 1, 1, 1),
                            torch.arange(-(-count // 100) * 100, device=device) % classes)
              for count in (counts[0] * times, counts[1])]
    return data.ImageSet(name, *splits, classes, name, class_names=tuple(map(str, range(classes))))


class Kept:
    """What preparing the last batch has given, for steps that take it from here."""
    prepared, values = False, {}

    @classmethod
    def recall(cls, key, make):
        if not cls.prepared:
            cls.values[key] = make()
        return cls.values[key]


class Timed(trainer.Run):
    """A run whose `fit` times steps of what `pretrain` begins; it measures and records nothing.

    ask: what to time; ask.report(run, training, seconds) is called with {kind: [a step's seconds]}.
    """

    def __init__(self, ask, *arguments, **named):
        super().__init__(*arguments, **named)
        self.ask, self.training, self.settings, self.done, self.loading = ask, None, None, set(), 0
        self.block = 10 if self.device.type == "cuda" else 1  # a GPU is not waited for every step

    def say(self, text):
        pass

    def load(self, *arguments, **named):
        start = clock(self.device)
        loaded = super().load(*arguments, **named)
        self.loading += clock(self.device) - start
        return loaded

    def augment(self, function, images, purpose, step, **settings):
        augment = super().augment
        return Kept.recall(purpose, lambda: augment(function, images, purpose, step, **settings))

    def record(self, rows, measure, *splits, after=()):
        return super().record(rows, None)

    def fit(self, purpose, model, loss, batches, *, steps, optimizer, **rest):
        name, trained = self.training, trainer.Trained(model, curves={"loss": []})
        if name is None or name in self.done or self.ask.only not in (None, name):
            return trained
        self.done.add(name)
        seconds, usual = {kind: [] for kind in self.ask.kinds}, None
        if "idiomatic" in seconds and self.paper in VERSIONS and name == MAIN[self.paper]:
            usual = idiomatic_step(self.paper, self.settings, self.device, model, optimizer,
                                   2 * WORKERS if self.ask.rounds > 2 else 1)
        trainer.PLAN_STEPS = 10 ** 4
        try:
            super().fit(purpose, model, loss,
                        lambda first: self.by_turns(batches(first), seconds, usual),
                        steps=10 ** 4, optimizer=optimizer, **rest)
        except Measured:
            self.ask.report(self, name, seconds)
        if self.ask.only:
            raise Measured
        return trained

    def by_turns(self, batches, seconds, usual):
        """Batches for `fit`: what happens between one and the next is a step, which is timed."""
        Kept.prepared, held = False, next(batches)
        yield held
        clock(self.device)
        self.first_step = time.time() - self.ask.started - self.loading
        if "prepared" in seconds:
            Kept.prepared = True
            with FlopCounterMode(display=False) as counter:
                yield held
            self.flops = counter.get_total_flops()
            self.product()  # the first one takes longer
        for number in range(self.ask.rounds):
            for kind in seconds:
                if kind == "product":
                    seconds[kind].append(self.product())
                elif kind == "idiomatic":
                    if usual and number % 2 == 0:  # starting workers and filling queues takes time
                        seconds[kind].append(usual())
                else:
                    Kept.prepared, start = kind == "prepared", clock(self.device)
                    for _ in range(self.block):
                        held = held if Kept.prepared else next(batches)
                        yield held
                    seconds[kind].append((clock(self.device) - start) / self.block)
            self.peak = trainer.peak_memory(self.device) if number == 0 else self.peak
        raise Measured

    @functools.cached_property
    def factor(self):
        kind = torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32
        side = 8192 if self.device.type == "cuda" else 1024
        return torch.randn(side, side, device=self.device).to(kind)

    def product(self):
        """Seconds of one floating-point operation of a large matrix product."""
        start, count = clock(self.device), self.block
        for _ in range(count):
            self.factor @ self.factor
        return (clock(self.device) - start) / (2 * count * len(self.factor) ** 3)


def measure(script, scale, ask, overrides=(), times=1):
    """Run a script's main with Timed runs on made-up images -> exit status."""
    data.load, launch.Run = functools.partial(made_up, times), functools.partial(Timed, ask)
    with tempfile.TemporaryDirectory() as folder:  # no data are there, and none are looked for
        arguments = ["--scale", scale, "--plan", "--force", "--data", folder]
        for override in (*SETTINGS.get(Path(script.__file__).stem, ()), *overrides):
            arguments += ["--set", override]
        try:
            return script.main(arguments)
        except Measured:
            return 0


def watched(paper):
    """The paper's script, whose pretrain tells the run its name, and whose preparation is kept."""
    script, palettes = importlib.import_module(f"papers.{paper}"), []
    pretrain, make_palette = script.pretrain, getattr(script, "make_palette", None)

    def named(run, data, config, name, *rest):
        run.training, run.settings = name, config
        try:
            return pretrain(run, data, config, name, *rest)
        finally:
            run.training = None

    def kept(name, function):
        return lambda *given: Kept.recall(name, lambda: function(*given))

    def first_palette(*given):  # counting colours takes seconds, and growth does not change them
        if not palettes:
            palettes.append(make_palette(*given))
        return palettes[0]

    script.pretrain, script.make_palette = named, first_palette
    script.make_mnist_m = lambda run, mnist, *variant: run.load("mnist-m")
    for name in PREPARATION.get(paper, ()):
        setattr(script, name, kept(name, getattr(script, name)))
    return script


# What is measured
def write(options, measure, paper="", **what):
    """Add a line to bench.jsonl, and say it."""
    script = ROOT / "papers" / f"{paper}.py" if paper else evaluate.__file__
    line = {"measure": measure, "paper": paper, "scale": options.scale, "session": options.session,
            **what, **records.provenance(script), **trainer.surroundings(options.device)}
    records.append(options.results / "bench.jsonl", line)
    print(paper, f"{measure}:", *(f"{key} {value}" for key, value in what.items()), flush=True)


def time_steps(options, paper, script):
    """Time every training of a paper -> the settings of the one that stands for it, or None."""
    found = {}

    def report(run, name, seconds):
        if not found and paper == options.papers[0]:
            write(options, "start", paper, what="first step", seconds=round(run.first_step, 2))
        found[name], full = run.settings, seconds["full"]
        if not options.first:
            ratios = {"overhead": [a / b for a, b in zip(full, seconds["prepared"])],
                      "idiomatic": [b / a for a, b in zip(full[::2], seconds["idiomatic"])],
                      "arithmetic": [run.flops * b / a for a, b in zip(full, seconds["product"])]}
            times = {f"{kind}_ms": [1000 * each for each in taken]
                     for kind, taken in seconds.items() if kind != "product"}
            write(options, "step", paper, training=name, batch=run.settings.batch_size,
                  precision=run.settings.precision, peak_mb=round(run.peak),
                  **{key: spread(values) for key, values in {**ratios, **times}.items() if values})

    ask = SimpleNamespace(kinds=["full", "prepared", "product", "idiomatic"], only=None,
                          rounds=2 if options.quick else 10, started=options.started, report=report)
    if options.first:
        ask.only, ask.rounds = MAIN[paper], 0
    if status := measure(script, options.scale, ask):
        raise SystemExit(status)
    return found.get(MAIN[paper])


def time_growth(options, paper, script, settings):
    """A step at several times the scale's batch, side of images and number of images, by turns."""
    points = [(what, factor) for what, factors in GROWTH.items() if what != "side" or paper in SIDES
              for factor in (factors[:1] if options.quick else factors)]
    seconds = {point: [] for point in [("", 1), *points]}
    for _ in range(1 if options.quick else 3):
        for (what, factor), taken in seconds.items():
            overrides, named = [], {"side": SIDES.get(paper), "batch_size": ["batch_size"]}
            for name in named.get(what, ()):
                value = getattr(settings, name)
                many = isinstance(value, tuple)
                grown = [factor * each for each in value] if many else factor * value
                overrides.append(f"{name}={grown}")
            ask = SimpleNamespace(
                kinds=["full"], only=MAIN[paper], rounds=1 if options.quick else 2, started=0,
                report=lambda run, name, times: taken.append(spread(times["full"])[0]))
            measure(script, options.scale, ask, overrides, factor if what == "images" else 1)
    for what, factor in points:
        work = {"batch_size": factor, "side": factor ** 2, "images": 1}[what]
        ratios = [a / b / work for a, b in zip(seconds[what, factor], seconds["", 1])]
        if ratios:  # else it did not fit
            write(options, "growth", paper, what=f"{what} x {factor}", ratio=spread(ratios),
                  ms=spread([1000 * each for each in seconds[what, factor]]))


def time_protocols(options):
    """A linear probe and k-NN, each over matrix products that it cannot do without."""
    device, (count, width, known) = options.device, (10000, 4096, 50000)
    if options.quick:
        count, width, known = 500, 64, 2500
    probed, weights, wide, asked = (torch.randn(*shape, device=device) for shape in (
        (count, width), (width, 10), (known, 512), (count, 512)))
    few, many = (torch.arange(number, device=device) % 10 for number in (count, known))
    work = [(f"linear probe of {count:,} x {width:,}", "its loss and gradient once",
             lambda: evaluate.linear_probe(probed, few, probed[:1000], few[:1000]),
             lambda: probed.T @ (probed @ weights)),
            (f"k-NN of {count:,} over {known:,} x 512", "its similarities",
             lambda: evaluate.knn_accuracy(wide, many, asked, few),
             lambda: [part @ wide.T for part in asked.split(500)])]
    seconds = {each[:2]: [] for each in work}
    for _ in range(2 if options.quick else 4):  # the first round warms up
        for *names, function, least in work:
            times = [clock(device)]
            for each in (function, least):
                each()
                times.append(clock(device))
            seconds[tuple(names)].append((times[1] - times[0], times[2] - times[1]))
    for (what, least), taken in seconds.items():
        write(options, "protocol", what=what, over=least, seconds=spread([a for a, _ in taken[1:]]),
              ratio=spread([a / b for a, b in taken[1:]]))


def time_start(options):
    """`--help` and the first step of the papers, each in a process of its own, by turns."""
    for _ in range(1 if options.quick else 3):
        for paper in options.papers[:1] if options.quick else options.papers:
            for what, command in (("import torch", ["-c", "import torch"]),
                                  ("--help", ["-m", f"papers.{paper}", "--help"])):
                start = time.perf_counter()
                done = subprocess.run([sys.executable, *command], cwd=ROOT,
                                      stdout=subprocess.DEVNULL)
                seconds = round(time.perf_counter() - start, 2)
                if done.returncode == 0:
                    write(options, "start", paper, what=what, seconds=seconds)
            run_part(options, paper, "--first")


def run_part(options, names, *more):
    """Measure papers in a process of its own -> its exit status."""
    command = [sys.executable, __file__, options.scale, *names.split(","), *more, "--results",
               str(options.results), "--session", options.session, "--started", str(time.time())]
    return subprocess.run(command + ["--quick"] * options.quick, cwd=ROOT).returncode


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("scale", nargs="?", default="full" if cuda else "small", help="smoke, demo, small or full")
    add("papers", nargs="*", default=list(MAIN), help="default: all six")
    add("--results", default=ROOT / "out" / "bench", type=records.folder,
        metavar="DIR")
    add("--quick", action="store_true", help="two rounds of everything, to see that it runs")
    add("--first", action="store_true", help=argparse.SUPPRESS)  # stop at the first step
    add("--session", default="", help=argparse.SUPPRESS)  # of the process that asks for this part
    add("--started", default=0.0, type=float, help=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    options = parser.parse_args(arguments)
    options.results = options.results.absolute()
    declared = records.read_declared(ROOT / "papers" / f"{next(iter(MAIN))}.yaml")["scales"]
    if options.scale not in declared:
        parser.error(f"unknown scale {options.scale}; known: {', '.join(declared)}")
    if unknown := [paper for paper in options.papers if paper not in MAIN]:
        parser.error(f"unknown paper {unknown[0]}; known: {', '.join(MAIN)}")
    try:
        terminal.require_writable(options.results, "--results DIR")
    except records.InputError as error:
        parser.error(error)
    options.device = launch.pick_device("auto")
    if options.session:
        for paper in options.papers:
            script = watched(paper)
            settings = time_steps(options, paper, script)
            if settings and not options.first:
                time_growth(options, paper, script, settings)
        return 0
    options.session = datetime.now(timezone.utc).isoformat(timespec="seconds")
    print(f"{trainer.device_name(options.device)}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, scale {options.scale}", flush=True)
    parts = [",".join(options.papers)] if options.quick else options.papers
    failed = [names for names in parts if run_part(options, names)]
    time_start(options)
    time_protocols(options)
    page = render(options.results / "bench.jsonl")
    records.write_atomically(options.results / "BENCH.md", page.encode())
    print(f"\n{page}\n{options.results / 'BENCH.md'}", *(f"failed: {names}" for names in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
