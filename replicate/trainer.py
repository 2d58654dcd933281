"""One run: its settings, its random numbers, its training loop.  Nothing here is about any paper.

Randomness is a function, not a state: stream(seed, purpose, step) makes the generator for one
purpose at one step.  So nothing random has to be saved, and a run resumed at step s ends with the
same bytes.
"""
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import resource
import sys
import time
import typing
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import yaml
from torch import nn

from replicate import data as image_data
from replicate import records, terminal
from replicate.records import InputError, matching, write_atomically

CHECKPOINT_SECONDS = 0 if os.environ.get("REPLICATE_CHECKPOINT_SECONDS") == "0" else 60  # in tests
LOG_SECONDS, LIVE_SECONDS, PLAN_STEPS, PLAN_IMAGES = 10, 1, 5, 2000


class TrainingFailed(Exception):
    """Training cannot go on: one line with the setting to change."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; the state is saved."""


# Random streams
def derive(seed, purpose, step=0):
    """A 63-bit number that depends on all three arguments and nothing else."""
    text = f"{seed}|{purpose}|{step}".encode(errors="surrogateescape")  # a path may be no text
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def stream(seed, purpose, step=0, device="cpu"):
    """The torch.Generator for one purpose ("init", "shuffle", "augment", ...) at one step."""
    return torch.Generator(device).manual_seed(derive(seed, purpose, step))


# Settings
def convert(name, value, kind):
    """A YAML value, or a text, as the type of its field; AssertionError where it cannot be one.

    The path of folder:DIR is made absolute, so that it names the same pictures from everywhere.
    """
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        assert type(value) in (list, tuple), f"{name} must be a list such as [1, 2], not {value!r}"
        return tuple(convert(name, item, choices[0]) for item in value)
    if typing.get_origin(kind) is typing.Literal:
        known = ", ".join(map(str, choices))
        assert value in choices, f"{name} must be one of {known}, not {value!r}"
        return value
    with contextlib.suppress(ValueError):
        plain = type(value) in (int, str) and "_" not in str(value)  # Python takes 1_0 as 10
        if plain and (kind is float or kind is int and type(value) is str):
            value = kind(value)
    if type(value) is str and kind is bool:
        value = {"true": True, "false": False}.get(value.lower(), value)
    assert type(value) is kind, f"{name} must be of type {kind.__name__}, not {value!r}"
    assert kind is not float or math.isfinite(value), f"{name} must be finite, not {value}"
    assert kind not in (int, float) or value >= 0, f"{name} must not be negative: {value}"
    assert kind not in (int, float) or value < 2 ** 40, f"{name} must be below {2 ** 40}: {value}"
    if kind is str and value.startswith("folder:"):
        value = "folder:" + os.path.abspath(os.path.expanduser(value.removeprefix("folder:")))
    return value


def is_text(kind):
    """Whether values of a type are taken as typed: a path may hold any character."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    return kind is str or any(isinstance(choice, str) for choice in choices)


def parse_yaml(text):
    """A text, or a list of texts: what YAML makes of numbers (010 is 8) is not what people mean."""
    try:
        return yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def check(values):
    """What holds for the settings of every paper; AssertionError where it does not."""
    for name, value in values.items():
        if name in ("batch_size", "shards") or name.endswith(("_epochs", "_steps")):
            assert value > 0, f"{name} must be above 0, not {value}"
        if name.endswith("_drops"):
            assert all(0 < drop < 1 for drop in value) and list(value) == sorted(value), \
                f"{name} must be rising fractions of the run between 0 and 1, not {list(value)}"
        assert name != "momentum" or value < 1, f"momentum must be below 1, not {value}"


def read_settings(Config, declared, scale, seed=0, overrides=()):
    """-> (config, the scale's block): defaults, then the block, then key=value overrides.

    declared: records.read_declared(script), or the YAML's path.  InputError for what no run can
    have.
    """
    scales = (declared if isinstance(declared, dict) else records.read_declared(declared))["scales"]
    kinds, given = typing.get_type_hints(Config), {}
    try:
        assert scale in scales, f"unknown scale '{scale}'; known: {', '.join(scales)}"
        for override in overrides:
            key, equals, value = override.partition("=")
            assert equals, f"--set takes key=value, not '{override}'"
            given[key] = value if is_text(kinds.get(key)) else parse_yaml(value)
        block = scales[scale]
        values = {key: block[key] for key in block if key not in ("rows", "seeds")} | given
        for key in values:
            fields = ", ".join(kinds)
            assert key in kinds and key != "seed", f"unknown setting '{key}'; known: {fields}"
        values = {key: convert(key, value, kinds[key]) for key, value in values.items()}
        check(values)
        return Config(seed, **values), block
    except AssertionError as error:
        raise InputError(str(error)) from None


def config_hash(paper, config):
    """16 hex digits that identify a run: the paper and every resolved setting, seed included."""
    content = json.dumps([paper, dataclasses.asdict(config)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def steps_in(config, epochs, split, batch_size=None):
    """The steps in so many epochs, a setting of config, of a split; a broken last batch is cut.

    InputError where that leaves none: it names the setting and the least that makes a step.
    """
    batch_size, count = batch_size or config.batch_size, max(1, len(split))
    steps = int(epochs * len(split) / batch_size)
    if steps < 1:
        least, advice = math.ceil(10 * batch_size / count) / 10, {}
        for key, value in vars(config).items():
            if key.endswith("_epochs") and value == epochs:
                advice[key] = f"{least:g}"
            elif key.endswith("_passes") and epochs in value:  # a list: the others stay
                parts = [least if part == epochs else part for part in value]
                advice[key] = f"[{','.join(f'{part:g}' for part in parts)}]"
        raise InputError(f"{' or '.join(advice)}: {epochs:g} epochs of {count} pictures in batches "
                         f"of {batch_size} make no step; a longer budget is needed: "
                         + " ".join(f"--set {key}={value}" for key, value in advice.items()))
    return steps


@dataclass
class Trained:
    """A module that `fit` has trained, and what that took."""
    model: nn.Module
    steps: int = 0
    seconds: float = 0.0
    curves: dict | None = None      # {scalar: [[step, mean since the last point], ...]}
    codes: tuple[str, ...] = ()     # hashes of all code that had a hand in it
    name: str = ""                  # the purpose that `fit` was given
    kept: dict | None = None        # {step: state dict} of the steps that were to be kept


class Run:
    """One seed of one paper at one scale.

    A script calls load, build, augment, shuffled, stream, seed_global, autocast, fit, wants,
    record, value and say; it reads config, seed, device, rank, ranks, plan, paper and suite.
    """

    def __init__(self, script, config, scale, rows, device="cpu", *, suite="smoke",
                 results="results", runs="runs", data="", only=("*",), scale_rows=("*",),
                 force=False, plan=False, quiet=False):
        self.config, self.scale, self.seed, self.rows = config, scale, config.seed, rows
        self.paper, self.device, self.data_folder = Path(script).stem, torch.device(device), data
        self.plan, self.force, self.only, self.scale_rows = plan, force, only, scale_rows
        self.rank, self.ranks = rank_and_ranks()
        self.hash = config_hash(self.paper, config)
        self.suite, self.folder = Path(results) / suite, Path(runs) / self.paper / self.hash
        self.records, faults = records.read(self.suite / f"{self.paper}.jsonl")
        self.provenance = records.provenance(script)
        self.sha256, self.asked, self.settled, self.planned, self.differ = {}, [], set(), {}, None
        self.quiet, self.line = quiet, terminal.Line()
        self.label = f"{self.paper}  " * self.line.shared + f"seed {self.seed}"
        self.costs = []  # of a plan: (rows measured together, seconds, {training: seconds}, MB)
        self.fitting, self.stop = None, False  # the training under way; whether it has to stop
        self.left_out = {}  # {glob of rows: why}, of all seeds
        for fault in faults:
            self.say(f"warning: {fault}", important=True)

    def say(self, text, important=False):
        """A line on the terminal; when the run is quiet, only if it is important."""
        if self.rank == 0 and (important or not self.quiet):
            self.line.clear()
            print(text, flush=True)

    # What the run works on
    def load(self, name, size=None, streamed=None, called=None, channels=None):
        """The ImageSet of that name on the device; every record has its SHA-256 as `called`.

        channels=3: grey images stand three times, for networks that take colours.
        """
        if self.rank > 0:
            dist.barrier()  # the first rank downloads and packs, the others read
        root = image_data.data_root(self.data_folder)
        try:
            with contextlib.redirect_stdout(io.StringIO() if self.quiet else sys.stdout):
                loaded = image_data.load(name, root, self.device, size, streamed)
        finally:  # where it cannot be had, the others find that out, too
            if self.rank == 0 and self.ranks > 1:
                dist.barrier()
        self.sha256[called or name.split(":")[0]] = loaded.sha256
        for split in (loaded.train, loaded.test, loaded.unlabeled):
            if channels == 3 and getattr(split, "images", torch.zeros(1, 3)).shape[1] == 1:
                split.images = split.images.expand(-1, 3, -1, -1)  # takes no memory
        return loaded

    def stream(self, purpose, step=0, device="cpu"):
        return stream(self.seed, purpose, step, device)

    def seed_global(self, purpose, step=0):
        """Seed what takes no generator: initialisation, dropout."""
        number = derive(self.seed, purpose, step)
        torch.default_generator.manual_seed(number)  # torch.manual_seed is slow
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def build(self, module, *arguments, purpose="init"):
        """module(*arguments) with weights that depend on seed and purpose alone, on the device."""
        self.seed_global(purpose)
        return module(*arguments).to(self.device, memory_format=torch.channels_last)

    def augment(self, function, images, purpose, step, **settings):
        """function(images, generator, **settings) -> a tensor or several, image by image.

        It is drawn in config.shards parts of the global batch, each with a stream of its own, so
        that any number of ranks that divides the shards sees the same.
        """
        count = self.config.shards // self.ranks
        first = step * self.config.shards + self.rank * count
        with torch.autocast(self.device.type, enabled=False):  # bfloat16 would be half a pixel off
            made = [function(part, self.stream(purpose, first + number, images.device), **settings)
                    for number, part in enumerate(images.tensor_split(count)) if len(part)]
        return torch.cat(made) if torch.is_tensor(made[0]) else [torch.cat(p) for p in zip(*made)]

    def shuffled(self, split, batch_size, purpose):
        """batches(first_step): this rank's part of an endless stream of shuffled (images, labels).

        Step s holds positions s*B to (s+1)*B - 1 of one epoch's permutation after the other, so
        every image is drawn equally often, even when the split is smaller than the batch.
        """
        length, share, shards = len(split), batch_size // self.ranks, self.config.shards
        if batch_size < 1:
            raise InputError(f"batch size {batch_size}: at least 1 is needed")
        if self.ranks > 1 and (shards % self.ranks or batch_size % shards):
            raise InputError(f"{self.ranks} ranks need shards={shards} to be a multiple of them "
                             f"and batch size {batch_size} a multiple of shards: "
                             f"--set shards={self.ranks} or another batch size")
        device = split.images.device if hasattr(split, "images") else "cpu"

        @functools.lru_cache(maxsize=2)
        def permutation(epoch):  # sent to the device once, so that no step waits for it
            order = torch.randperm(length, generator=self.stream(f"{purpose}/shuffle", epoch))
            return order.to(device)

        def order(step):
            while True:
                position = step * batch_size + self.rank * share
                parts, end = [], position + share
                while position < end:
                    start = position % length
                    parts.append(permutation(position // length)[start:start + end - position])
                    position += len(parts[-1])
                yield parts[0] if len(parts) == 1 else torch.cat(parts)
                step += 1
        return lambda first_step: split.batches(order(first_step))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, self.config.precision == "bfloat16")

    # Rows
    def wants(self, *rows):
        """Those of the rows (or globs) that are in this scale, asked for, and not yet recorded."""
        here = matching(matching(matching(self.rows, self.scale_rows), self.only), rows)
        self.asked = [row for row in here
                      if row not in self.settled and (self.force or not self.recorded(row))]
        return list(self.asked)

    def leave_out(self, rows, reason, optional=False):
        """Go on without rows (a glob) whose data are missing; unless they are optional the exit
        status will be 2."""
        self.settled.update(self.wants(rows))
        if optional:
            return self.say(f"{rows}: left out, {reason}")
        if self.rank == 0 and self.left_out.get(rows) != str(reason):
            print(f"error: {rows} left out: {reason}", file=sys.stderr, flush=True)
        self.left_out[rows] = str(reason)

    def value(self, row):
        """This run's record of a row, or None; always None in a plan."""
        return None if self.plan else self.recorded(row)

    def recorded(self, row):
        """The record of a row with these settings, this seed and these data, or None."""
        found = records.find(self.records, row, self.seed, self.hash, self.sha256)
        if not found and (other := records.find(self.records, row, self.seed, self.hash)):
            differ = [f"{name} {other['data'][name][:8]}, here {digest[:8]}"
                      for name, digest in self.sha256.items()
                      if other["data"].get(name, digest) != digest]
            if differ != self.differ:
                self.say(f"{row} and perhaps others are recorded with other data "
                         f"({', '.join(differ)}): measured anew", important=True)
                self.differ = differ
        return found

    def record(self, rows, measure, *splits, after=()):
        """Write measure(*splits), a number or {row: number}, for the rows that `wants` named last.

        Accuracies are in percent.  A row that gets None is left out: its labels are too few.
        after: the Trained that the value rests on; the last one's steps and curves go along, and
        the seconds of all.  In a plan the splits are cut short, and the time is scaled up.
        """
        wanted = [row for row in ([rows] if isinstance(rows, str) else rows) if row in self.asked]
        start, factor = time.perf_counter(), 1.0
        if self.plan:
            images = sum(map(len, splits))
            splits = [split.take(range(min(PLAN_IMAGES, len(split)))) for split in splits]
            factor = images / max(1, sum(map(len, splits)))
        with warnings.catch_warnings(record=True) as noticed:
            warnings.simplefilter("always", UserWarning)
            values = measure and measure(*splits)
        for text in {} if self.plan else dict.fromkeys(str(each.message) for each in noticed):
            self.say(f"note: {', '.join(wanted)}: {text}")
        own = (time.perf_counter() - start) * factor
        trainings = {part.name: round(part.seconds, 1) for part in after if part.name}
        seconds, more = own + sum(part.seconds for part in after), {"trainings": trainings}
        if self.plan and wanted:
            self.costs.append((wanted, own, trainings, peak_memory(self.device)))
        if after and after[-1].curves:
            more["history"] = after[-1].curves
        if (codes := {code for part in after for code in part.codes}) - {self.provenance["code"]}:
            more["codes"] = sorted(codes)
        for row in wanted:
            value = values[row] if isinstance(values, dict) else values
            if self.plan:
                self.settled.add(row)
            elif value is None:
                self.settled.add(row)
                self.say(f"seed {self.seed}  {row}: left out, a class has too few training images")
            else:
                self.write(row, value, seconds, after[-1].steps if after else 0, **more)

    def write(self, row, value, seconds=0.0, steps=0, status="ok", **more):
        """Append the record of a row."""
        metric = self.rows[row].get("unit", "accuracy")
        record = {
            "paper": self.paper, "scale": self.scale, "row": row, "seed": self.seed,
            "metric": metric, "value": None if value is None else round(value, 4),
            "status": status, "steps": steps, "selection": "last", "config_hash": self.hash,
            "config": dataclasses.asdict(self.config), "data": dict(self.sha256),
            "deterministic": self.config.deterministic, "ranks": self.ranks,
            "seconds": round(seconds, 1), **self.provenance, **surroundings(self.device), **more}
        self.asked = [other for other in self.asked if other != row]
        self.settled.add(row)
        self.records.append(record)
        if self.rank > 0:
            return
        try:
            records.append(self.suite / f"{self.paper}.jsonl", record)
        except OSError as error:
            raise InputError(f"cannot write {self.suite} ({error.strerror}): make room or give "
                             "another folder with --results DIR") from None
        if status == "ok":
            unit = "%" if metric == "accuracy" else metric
            self.say(f"{self.label}  {row:<44} {value:7.2f} {unit}", True)

    def give_up(self, reason):
        """Record as failed the row whose training is under way, or all that were asked for last."""
        for row in [self.fitting] if self.fitting in self.asked else self.asked:
            self.write(row, None, status="failed", error=reason)
        self.fitting = None

    # Training
    def fit(self, purpose, model, loss, batches, *, steps, optimizer, rate, chance=None,
            keep=()):
        """Train to the last step, from the checkpoint if there is one -> Trained.

        purpose: names this training, its checkpoint and its progress line.
        loss(batch, step): dict of scalar tensors, "loss" first; under autocast.
        batches(first_step): iterator, e.g. of `shuffled`.
        rate(progress): learning rate at 0 to 1; a parameter group may carry a factor "scale".
        chance: the loss at chance (ln 4, ln K, ...), printed beside the loss.
        keep: steps after which the weights are kept as well, as they were then.
        Raises TrainingFailed when the loss is not finite.  In a plan, a few steps are timed.
        """
        if steps < 1:
            raise InputError(f"{purpose}: {steps} steps; a longer budget is needed")
        if purpose in self.planned:
            return dataclasses.replace(self.planned[purpose], model=model)
        path = self.folder / f"{purpose.replace('/', '_')}.pt"
        identity = {"run": self.hash, "data": dict(self.sha256), "purpose": purpose}
        step, seconds, trace, codes, kept = 0, 0.0, {}, {self.provenance["code"]}, {}
        needed = model, optimizer, steps, keep
        if state := None if self.plan else self.read_checkpoint(path, identity, *needed):
            kept = state["kept"]
            model.load_state_dict(state["model"])
            step, seconds, trace = state["step"], state["seconds"], state["trace"]
            codes = set(state["codes"]) | (codes if step < steps else set())
            if step < steps:
                optimizer.load_state_dict(state["optimizer"])
                self.say(f"{purpose}: resumed at step {step}/{steps}")
        if self.ranks > 1 and step < steps:
            synchronize_batch_norm(model, self.device)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        end = min(steps, PLAN_STEPS) if self.plan else steps
        first = shown = step
        start = logged = saved = time.perf_counter()
        self.fitting = purpose
        for batch in batches(step) if step < end else ():
            if self.plan and step == 1:
                start = time.perf_counter()  # the first step pays for set-up
            self.seed_global(f"{purpose}/global", step * self.ranks + self.rank)
            for group in optimizer.param_groups:
                group["lr"] = rate(step / steps) * group.get("scale", 1.0)
            with self.autocast():
                scalars = loss(batch, step)
            optimizer.zero_grad()
            scalars["loss"].backward()
            if self.ranks > 1:
                average_gradients(parameters)
            optimizer.step()
            for name, value in scalars.items():
                if name not in trace:
                    trace[name] = torch.zeros(steps, device=self.device)
                trace[name][step] = value.detach()
            step += 1
            if step in keep:
                kept[step] = {name: each.clone() for name, each in model.state_dict().items()}
            now, stop = time.perf_counter(), self.stop_agreed(step, step == end)
            save = stop or step == end or now - saved > CHECKPOINT_SECONDS
            if save or now - logged > (LIVE_SECONDS if self.line.live else LOG_SECONDS):
                means = {name: float(values[shown:step].mean()) for name, values in trace.items()}
                if not math.isfinite(means["loss"]):
                    raise TrainingFailed(f"{purpose}: the loss is not finite at step {step}/"
                                         f"{steps}; lower the learning rate with --set, or --set "
                                         "precision=float32")
                texts = [f"{name} {value:.4g}" for name, value in means.items()]
                texts[0] += f" (chance {chance:.3f})" if chance else ""
                if not self.plan:
                    self.show(purpose, step, steps, texts, count_images(batch),
                              (now - start) / (step - first))
                shown, logged = step, now
            if save and self.rank == 0 and not self.plan:
                state = {"identity": identity, "codes": sorted(codes), "step": step, "trace": trace,
                         "seconds": seconds + now - start, "model": model.state_dict(),
                         "kept": kept}
                if step < steps:
                    state["optimizer"] = optimizer.state_dict()
                write_checkpoint(path, state)
            saved = now if save else saved
            if self.ranks > 1 and step == end:
                dist.barrier()  # the others may read this checkpoint next
            if stop:
                raise Interrupted
            if step == end:
                seconds += time.perf_counter() - start
                break
        self.fitting = None
        if self.stop and self.ranks == 1:  # asked for since the last step
            raise Interrupted
        if self.plan:
            seconds *= steps / max(1, end - 1)
            self.planned[purpose] = Trained(None, steps, seconds, learning_curves(trace),
                                            name=purpose)
        return Trained(model, steps, seconds, learning_curves(trace), tuple(sorted(codes)), purpose,
                       kept)

    def show(self, purpose, step, steps, losses, images, step_seconds):
        """How far a training is: rewritten in place on a terminal, else a line every ten seconds.

        losses: texts, the loss first; images: how many this rank sees in a step; step_seconds:
        what a step takes.  The line in place may be cut on the right, so what matters comes first.
        """
        if self.rank > 0 or self.quiet:
            return
        place = f"{self.label}  {purpose}  {step}/{steps}"
        left = f"{step_seconds * (steps - step) / 60:.1f} min left"
        speed = f"{images * self.ranks / step_seconds:.0f} images/s"
        if self.line.live and step < steps:
            here = matching(matching(self.rows, self.scale_rows), self.only)
            done = sum(bool(records.find(self.records, row, self.seed, self.hash)) for row in here)
            self.line.show("  ".join((place, left, f"{done} of {len(here)} rows done", losses[0],
                                      speed, self.paper)))
        else:
            self.say("  ".join((place, *losses, speed, left)))

    def stop_agreed(self, step, last):
        """Whether a rank was asked to stop; several ranks ask one another every ten steps."""
        if self.ranks == 1:
            return self.stop
        if step % 10 and not last:
            return False
        asked = torch.tensor(float(self.stop), device=self.device)
        return bool(over_ranks(asked, dist.ReduceOp.MAX))

    def read_checkpoint(self, path, identity, *needed):
        """The state saved for this very training, or None; one that is damaged, or does not fit
        what is needed (see `fits`), is set aside."""
        if not path.exists():
            return None
        try:
            if part := records.damaged_part(path):  # torch.load does not ask for checksums
                reason = f"damaged ({part})"
            else:
                state = torch.load(path, map_location=self.device, weights_only=True)
                if state["identity"] == identity and fits(state, *needed):
                    return state
                reason = "made by another run or by other code"
        except Exception as error:  # rubbish can make torch.load raise nearly anything
            unknown = isinstance(error, (MemoryError, PermissionError))
            if unknown or "allocate memory" in str(error):
                raise  # which says nothing about what the file holds
            reason = f"damaged ({type(error).__name__})"
        aside = path.with_name(path.name + ".damaged")
        self.say(f"warning: checkpoint {path} is {reason}; set aside as {aside.name} and made anew",
                 important=True)
        try:
            if self.rank == 0:
                path.replace(aside)
        except OSError:
            raise InputError(f"checkpoint {path} is {reason} and cannot be moved away: "
                             "delete it") from None


def fits(state, model, optimizer, steps, keep):
    """Whether training can go on from a state; not after an edit of the network, for example.

    It is asked before anything is loaded, since a failed load leaves half of the weights changed.
    May raise anything for rubbish."""
    def shapes(weights):
        return {name: getattr(value, "shape", None) for name, value in weights.items()}

    def groups(saved):
        return [({*group}, group["params"]) for group in saved["param_groups"]]

    step, weights, kept = state["step"], state["model"], state["kept"]
    return (step in range(1, steps + 1) and math.isfinite(state["seconds"])
            and all(len(values) == steps for values in state["trace"].values())
            and all(isinstance(code, str) for code in state["codes"])
            and all(shapes(each) == shapes(model.state_dict())
                    for each in (weights, *kept.values()))
            and {at for at in keep if at <= step} <= kept.keys()
            and all(value.isfinite().all() for value in weights.values() if torch.is_tensor(value))
            and (step == steps or groups(state["optimizer"]) == groups(optimizer.state_dict())))


def write_checkpoint(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        write_atomically(path, buffer.getbuffer())
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): make room or give another "
                         "folder with --runs DIR") from None


def count_images(batch):
    """How many images a batch (nested tuples of tensors, images first) holds."""
    while not torch.is_tensor(batch):
        batch = batch[0]
    return len(batch)


def learning_curves(trace, points=50):
    """{scalar: [[step, mean since the last point], ...]} from {scalar: (steps,)}."""
    curves = {}
    for name, values in trace.items():
        ends = sorted({round(len(values) * point / points) for point in range(1, points + 1)} - {0})
        parts = values.cpu().double().split([end - start for start, end in zip([0, *ends], ends)])
        curves[name] = [[end, float(f"{part.mean():.5g}")] for end, part in zip(ends, parts)]
    return curves


# Schedules: functions of progress, from 0 to 1
def stepped(rate, drops, factor):
    """Multiplied by factor at each of the drops, fractions of the run."""
    return lambda progress: rate * factor ** sum(progress >= drop for drop in drops)


def cosine(rate, warmup=0.0):
    """Up to `rate` over the share `warmup`, then to 0 along a cosine (Loshchilov, Hutter 2017)."""
    def at(progress):
        if progress < warmup:
            return rate * (progress + 1e-3) / (warmup + 1e-3)
        return rate * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-3)))
    return at


# Device and ranks
def prepare(config, device):
    """Deterministic kernels unless switched off, and the process group under torchrun."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not config.deterministic
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def rank_and_ranks():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_ranks(tensor, operation=dist.ReduceOp.SUM):
    """The tensor, in place, summed over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def rows_of_all_ranks(rows):
    """The rows of all ranks; gradients flow back to each rank's own."""
    return torch.cat(dist_nn.all_gather(rows.contiguous())) if dist.is_initialized() else rows


def average_gradients(parameters):
    """Replace every gradient by its mean over the ranks, in one all-reduce."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = over_ranks(torch.cat([g.flatten() for g in gradients])) / dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


class RankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch-norm of the rows of all ranks, for the CPU; torch's SyncBatchNorm is for GPUs only."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        first = dist.get_rank() * len(x)
        return super().forward(rows_of_all_ranks(x))[first:first + len(x)]

    def _check_input_dim(self, x):
        pass


def synchronize_batch_norm(model, device):
    """Make every batch-norm layer use the statistics of all ranks; names and states stay."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules() if device.type == "cpu" else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = RankBatchNorm


# What a record says of the machine
def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")


def peak_memory(device):
    """MB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    kilobytes = 1e-3 if sys.platform == "darwin" else 1.024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes / 1e3


def surroundings(device):
    return {"torch": torch.__version__, "torchvision": version("torchvision"),
            "device": device_name(device), "peak_memory_mb": round(peak_memory(device)),
            "threads": torch.get_num_threads() if device.type == "cpu" else None}
