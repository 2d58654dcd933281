"""What training needs and no paper is about: command line, config, random streams, the fit loop with exact resume,
ranks of a distributed run, and the writing of records.

Randomness is a function, not a state: `stream(seed, purpose, step)` makes the generator for one purpose at one step.
Nothing random is saved, one more random call shifts nothing else, and a run resumed at step s goes on as if it had
never stopped.
"""
import argparse
import ast
import dataclasses
import fcntl
import fnmatch
import functools
import hashlib
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import typing
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional
import torchvision
import yaml
from torch import nn

from replicate import data as image_data
from replicate import report
from replicate.data import ROOT, InputError, write_atomically

SCALES = ("smoke", "small", "full", "paper")
CHECKPOINT_SECONDS = float(os.environ.get("REPLICATE_CHECKPOINT_SECONDS", 60))
LOG_SECONDS = 10
PLAN_STEPS = 4


class TrainingFailed(Exception):
    """Training cannot go on (loss not finite, out of memory): one line with the setting to change, exit status 3."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM: the state is saved, exit status 130."""


# Random streams
def derive(seed, purpose, step=0):
    """A 63-bit number that depends on all three arguments and nothing else (a CPU generator keeps 32 bits of it)."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{purpose}|{step}".encode()).digest()[:8], "big") >> 1


def stream(seed, purpose, step=0, device="cpu"):
    """The torch.Generator for one purpose ("init", "shuffle", "augment", ...) at one step."""
    return torch.Generator(device).manual_seed(derive(seed, purpose, step))


# Config
def require(condition, message):
    """Raise InputError(message) unless condition holds."""
    if not condition:
        raise InputError(message)


def _convert(name, value, kind):
    """A YAML or command-line value as the config field's type; InputError where it cannot be one."""
    if typing.get_origin(kind) is tuple:
        require(isinstance(value, (list, tuple)), f"{name} must be a list such as [1, 2], not {value!r}")
        return tuple(_convert(name, item, typing.get_args(kind)[0]) for item in value)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML reads 5e-4 as a string
        except ValueError:
            pass
    require(type(value) is kind, f"{name} must be of type {kind.__name__}, not {value!r}")
    require(kind is not float or math.isfinite(value), f"{name} must be finite, not {value}")
    require(kind not in (int, float) or value >= 0, f"{name} must not be negative: {value}")
    return value


def check_settings(config, *, positive=(), shares=(), **choices):
    """Raise InputError for a setting that no run can have.

    Above 0 must be batch_size, shards, whatever ends in _epochs or _steps, and the names in `positive`; at most 1 the names in
    `shares`; below 1 momentum; rising fractions of a run whatever ends in _drops; one of the given values precision and the
    names in `choices`.
    """
    for name, value in vars(config).items():
        if name in ("batch_size", "shards", *positive) or name.endswith(("_epochs", "_steps")):
            require(value > 0, f"{name} must be above 0, not {value}")
        if name.endswith("_drops"):
            require(all(0 < drop < 1 for drop in value) and list(value) == sorted(value),
                    f"{name} must be rising fractions of the run between 0 and 1, not {list(value)}")
    for name in shares:
        require(getattr(config, name) <= 1, f"{name} is a share, at most 1, not {getattr(config, name)}")
    for name, known in {"precision": ("bfloat16", "float32"), **choices}.items():
        require(getattr(config, name) in known, f"{name} must be one of {', '.join(known)}, not '{getattr(config, name)}'")
    momentum = getattr(config, "momentum", 0.0)
    require(momentum < 1, f"momentum must be below 1, not {momentum}")


def resolve_config(Config, settings, scale, seed=0, overrides=()):
    """Defaults, then the scale's block of the YAML file, then key=value overrides.  Returns a Config.

    With dataset=embedded the block <scale>-embedded, if there is one, goes over the scale's: the drawn set is smaller.
    Raises InputError for an unknown scale or key, and for a value of the wrong type or out of range.
    """
    with open(settings, encoding="utf-8") as file:
        blocks = yaml.safe_load(file)
    require(scale in SCALES and scale in blocks, f"unknown scale '{scale}'; known: {', '.join(SCALES)}")
    given = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        require(equals, f"--set takes key=value, not '{override}'")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            given[key] = value
    drawn = blocks.get(f"{scale}-embedded") if given.get("dataset") == "embedded" else None
    values = {key: value for key, value in {**(blocks[scale] or {}), **(drawn or {}), **given}.items()
              if key in given or key not in ("rows", "seeds")}
    kinds = typing.get_type_hints(Config)
    for key in values:
        require(key in kinds and key != "seed", f"unknown setting '{key}'; known: {', '.join(kinds)}")
    return Config(seed=seed, **{key: _convert(key, value, kinds[key]) for key, value in values.items()})


def config_hash(paper, config):
    """16 hex digits that identify a run: the paper and every resolved setting, seed included."""
    content = json.dumps([paper, dataclasses.asdict(config)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


class Run:
    """One seed of one paper at one scale: its config, device, ranks, checkpoints and records."""

    def __init__(self, script, config, scale, device, *, suite, results, runs, data="", rows="*", scale_rows=("*",),
                 force=False, plan=False, provenance=None):
        self.script, self.config, self.scale, self.seed = Path(script), config, scale, config.seed
        self.paper = self.script.stem
        self.device, self.plan, self.force = torch.device(device), plan, force
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.data_argument = data
        self.row_globs, self.scale_rows = rows.split(","), scale_rows
        self.hash = config_hash(self.paper, config)
        self.suite = Path(results) / suite
        self.record_file = self.suite / f"{self.paper}.jsonl"
        self.folder = Path(runs) / self.paper / self.hash
        self.provenance = provenance or read_provenance(self.script)
        self.code = dict(self.provenance["code"])
        self.sha256, self.asked, self.failed, self.plan_phases, self.history = {}, [], set(), {}, {}
        self.started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.stop = False
        self.fitting = False
        self.records, warnings = report.read_records(self.record_file)
        if self.rank == 0:
            for warning in warnings:
                print(f"warning: {warning}", flush=True)

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    # Randomness
    def stream(self, purpose, step=0, device="cpu"):
        return stream(self.seed, purpose, step, device)

    def seed_global(self, purpose, step=0):
        """Seed torch's global state for what has no generator argument: initialisation, dropout."""
        number = derive(self.seed, purpose, step)
        torch.default_generator.manual_seed(number)  # torch.manual_seed would format a stack trace at every step
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def augment(self, function, images, purpose, step):
        """function(images, generator), drawn in config.shards parts of the global batch, each with its own stream.

        function returns a tensor or several, with the images in the first dimension.  The parts, not the ranks, own the
        randomness: any number of ranks that divides config.shards sees the same.
        """
        count = self.config.shards // self.ranks
        first = step * self.config.shards + self.rank * count
        with torch.autocast(self.device.type, enabled=False):  # geometry in bfloat16 would be off by half a pixel
            made = [function(part, self.stream(purpose, first + number, images.device))
                    for number, part in enumerate(images.tensor_split(count)) if len(part)]
        return torch.cat(made) if torch.is_tensor(made[0]) else [torch.cat(parts) for parts in zip(*made)]

    def shuffled(self, split, batch_size, purpose):
        """batches(first_step): this rank's share of an endless stream of shuffled (images, labels) of the split.

        Step s holds positions s*B .. (s+1)*B - 1 of one epoch's permutation after the other, so that every image
        is drawn equally often even when the split is smaller than the batch.
        """
        length, share = len(split), batch_size // self.ranks
        require(batch_size >= 1, f"batch size {batch_size}: at least 1 is needed")
        require(self.ranks == 1 or (self.config.shards % self.ranks == 0 and batch_size % self.config.shards == 0),
                f"{self.ranks} ranks need shards={self.config.shards} to be a multiple of them and batch size "
                f"{batch_size} a multiple of shards: --set shards={self.ranks} or another batch size")

        device = split.images.device if hasattr(split, "images") else "cpu"

        @functools.lru_cache(maxsize=2)
        def permutation(epoch):  # sent to the device once, so that no step waits for it
            return torch.randperm(length, generator=self.stream(f"{purpose}/shuffle", epoch)).to(device)

        def order(step):
            while True:
                first = step * batch_size + self.rank * share
                parts, position = [], first
                while position < first + share:
                    start = position % length
                    parts.append(permutation(position // length)[start:start + first + share - position])
                    position += len(parts[-1])
                yield parts[0] if len(parts) == 1 else torch.cat(parts)
                step += 1

        return lambda first_step: split.batches(order(first_step))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def load(self, name, size=None, streamed=None, called=None):
        """An image set on the device; its SHA-256 goes into every record, as that of `called` where folder:DIR says too little."""
        if self.ranks > 1 and self.rank > 0:
            dist.barrier()  # the first rank downloads and packs, the others read
        loaded = image_data.load(name, image_data.data_root(self.data_argument), self.device, size, streamed)
        if self.ranks > 1 and self.rank == 0:
            dist.barrier()
        self.sha256[called or name.split(":")[0]] = loaded.sha256
        return loaded

    # Rows and records
    def wanted(self, *rows):
        """Those of the rows that this scale has, that --rows asks for and that no record holds yet."""
        self.asked = [row for row in rows if self.has(row) and any(fnmatch.fnmatch(row, g) for g in self.row_globs)
                      and row not in self.failed
                      and (self.force or self.plan or not report.find_done(self.records, row, self.seed, self.hash))]
        return self.asked

    def has(self, row):
        return any(fnmatch.fnmatch(row, glob) for glob in self.scale_rows)

    def value(self, row):
        """What this run has recorded for the row, or None."""
        done = report.find_done(self.records, row, self.seed, self.hash)
        return done and done["value"]

    def record(self, row, value, *, steps, seconds, metric="accuracy", history=None, status="ok", error=None):
        """Append one line to results/<suite>/<paper>.jsonl.

        value: in percent if metric is "accuracy".  seconds: shared pre-training included.  history: the learning
        curves of a phase, run.history[purpose], for CURVES.
        """
        if self.plan:
            self.say(f"  {row:<40} {seconds / 60:8.1f} min with its pre-training   {peak_memory(self.device):6.0f} MB")
            return
        threads = torch.get_num_threads() if self.device.type == "cpu" else None
        record = {
            "paper": self.paper, "row": row, "metric": metric, "value": None if value is None else round(value, 4),
            "seed": self.seed, "steps": steps, "selection": "last", "scale": self.scale,
            "config": dataclasses.asdict(self.config), "config_hash": self.hash, **self.provenance, "code": self.code,
            "data": self.sha256, "torch": torch.__version__, "torchvision": torchvision.__version__,
            "device": device_name(self.device), "threads": threads, "ranks": self.ranks,
            "deterministic": self.config.deterministic, "seconds": round(seconds, 1),
            "peak_memory_mb": round(peak_memory(self.device)), "started": self.started, "status": status}
        if error:
            record["error"] = error
        if history:
            record["history"] = history
        self.asked = [other for other in self.asked if other != row]
        self.records.append(record)
        if self.rank > 0:
            return
        try:
            report.append_record(self.record_file, record)
        except OSError as failure:
            raise InputError(f"cannot write {self.record_file} ({failure.strerror or failure}): make room or give another "
                             "folder with --results DIR") from None
        if status == "ok":
            self.say(f"seed {self.seed}  {row:<44} {value:7.2f} {'%' if metric == 'accuracy' else metric}")

    def give_up(self, reason):
        """Record the rows asked for last as failed; they are not wanted any more."""
        for row in self.asked:
            self.failed.add(row)
            self.record(row, None, steps=0, seconds=0, status="failed", error=reason)

    def measure(self, function, *splits):
        """(function(*splits), seconds).  While planning: on 2000 images each, the time scaled up to all of them."""
        start = time.perf_counter()
        if not self.plan:
            return function(*splits), time.perf_counter() - start
        trimmed = [split.take(range(min(2000, len(split)))) for split in splits]
        value = function(*trimmed)
        factor = sum(map(len, splits)) / sum(map(len, trimmed)) if splits else 1
        seconds = (time.perf_counter() - start) * factor
        self.plan_phases[f"evaluation {len(self.plan_phases)}"] = seconds
        return value, seconds

    # Training
    def fit(self, purpose, model, objective, batches, *, steps, optimizer, learning_rate, images_per_step, chance=None):
        """Train to the last step, from the last checkpoint if there is one.  Returns the seconds it took in all.

        purpose: names this phase within the run, its checkpoint and its progress line.
        model: the module whose state is saved and restored; every trained parameter is in it.
        objective(batch, step): dict of scalar tensors, "loss" first; run under autocast.
        batches(first_step): iterator of batches, e.g. from `shuffled`.
        learning_rate(progress): rate at progress in [0, 1); each parameter group may carry a factor "scale".
        chance: the loss of a guess (ln 4, ln 10, ...), printed beside the loss.
        Leaves the learning curves in run.history[purpose]: {scalar: [[step, mean since the last point], ...]}.
        Raises TrainingFailed when the loss is not finite.
        """
        require(steps >= 1, f"{purpose}: {steps} steps; a longer budget is needed")
        path = self.folder / f"{purpose.replace('/', '_')}.pt"
        state = None if self.plan else self._load_checkpoint(path, purpose)
        step, seconds, names, trace = 0, 0.0, [], torch.zeros(0, steps, device=self.device)
        if state:
            model.load_state_dict(state["model"])
            step, seconds, names, trace = state["step"], state["seconds"], state["names"], state["trace"]
            # A record carries the hash of any other code that had a hand in it, so no stale mark is lost by resuming
            older = {name: code for name, code in state["code"].items() if code != self.provenance["code"].get(name)}
            if older:
                self.say(f"warning: {purpose} was trained by other code ({', '.join(older)}); its rows will be marked. "
                         "--force trains it anew")
            self.code |= older
            if step < steps:
                optimizer.load_state_dict(state["optimizer"])
                self.say(f"{purpose}: resumed at step {step}/{steps}")
        if step >= steps:
            self.history[purpose] = learning_curves(names, trace)
            return seconds
        if self.ranks > 1:
            synchronize_batch_norm(model, self.device)

        def save():
            if self.rank > 0 or self.plan:
                return
            state = {"identity": self._identity(purpose), "code": self.code, "step": step,
                     "seconds": seconds + time.perf_counter() - start, "model": model.state_dict(),
                     "names": names, "trace": trace}
            if step < steps:
                state["optimizer"] = optimizer.state_dict()
            buffer = io.BytesIO()
            torch.save(state, buffer)
            try:
                write_atomically(path, buffer.getbuffer())
            except OSError as error:
                raise InputError(f"cannot write {path} ({error.strerror}): make room or give another folder with "
                                 "--runs DIR") from None

        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        first = shown = step
        start = logged = saved = time.perf_counter()
        self.fitting = True
        try:
            for batch in batches(step):
                if self.plan and step == 1:
                    start = time.perf_counter()  # the first step pays for set-up
                self.seed_global(f"{purpose}/global", step * self.ranks + self.rank)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step / steps) * group.get("scale", 1.0)
                with self.autocast():
                    scalars = objective(batch, step)
                optimizer.zero_grad()
                scalars["loss"].backward()
                if self.ranks > 1:
                    average_gradients(parameters)
                optimizer.step()
                if not names:
                    names, trace = list(scalars), torch.zeros(len(scalars), steps, device=self.device)
                trace[:, step] = torch.stack([value.detach().float() for value in scalars.values()])
                step += 1
                if self.plan:
                    trace[0, 0].item()  # wait for the device
                now = time.perf_counter()
                stop = self._agree_to_stop(step, steps)
                if step == steps or stop or now - logged > LOG_SECONDS or now - saved > CHECKPOINT_SECONDS:
                    means = dict(zip(names, trace[:, shown:step].mean(1).tolist()))
                    if not math.isfinite(means["loss"]):
                        raise TrainingFailed(f"{purpose}: the loss is not finite at step {step}/{steps}; lower the "
                                             "learning rate with --set, or --set precision=float32")
                    rate = images_per_step * (step - first) / max(now - start, 1e-9)
                    left = (now - start) / (step - first) * (steps - step)
                    others = " ".join(f"{name} {value:.4g}" for name, value in means.items() if name != "loss")
                    guess = f" (chance {chance:.3f})" if chance else ""
                    if not self.plan:
                        self.say(f"seed {self.seed}  {purpose}  {step}/{steps}  loss {means['loss']:.3f}{guess}  "
                                 f"{others}  {rate:,.0f} images/s  {left / 60:.1f} min left")
                    shown, logged = step, now
                if stop or step == steps or now - saved > CHECKPOINT_SECONDS:
                    save()
                    saved = now
                if stop:
                    raise Interrupted
                if step == steps or (self.plan and step == 1 + PLAN_STEPS):
                    break
        finally:
            self.fitting = False
        if self.stop and self.ranks == 1:  # asked for since the last step
            raise Interrupted
        self.history[purpose] = learning_curves(names, trace)
        seconds += time.perf_counter() - start
        if self.plan:
            timed = max(step - 1, 1)
            seconds = seconds / timed * steps
            self.plan_phases[purpose] = seconds
            self.say(f"  {purpose:<40} {seconds / 60:8.1f} min: {steps} steps of {seconds / steps:.3f} s, "
                     f"{images_per_step * steps / seconds:,.0f} images/s")
        return seconds

    def _agree_to_stop(self, step, steps):
        if self.ranks == 1:
            return self.stop
        if step % 10 and step != steps:
            return False
        flag = torch.tensor(float(self.stop), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _identity(self, purpose):
        return {"config_hash": self.hash, "data": self.sha256, "purpose": purpose}

    def _load_checkpoint(self, path, purpose):
        """The state saved for this phase; damaged or foreign ones are reported, set aside and made anew."""
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            if state["identity"] == self._identity(purpose):
                [state[key] for key in ("step", "seconds", "model", "code", "names", "trace")]  # all there
                return state
            reason = "made by another run"
        except Exception as error:  # rubbish can make torch.load raise nearly anything
            reason = f"damaged ({type(error).__name__})"
        aside = path.with_suffix(".pt.damaged")
        self.say(f"warning: checkpoint {path} is {reason}; set aside as {aside.name} and made anew")
        if self.rank == 0:
            try:
                path.replace(aside)
            except OSError:
                raise InputError(f"checkpoint {path} is {reason} and cannot be moved away: delete it") from None
        return None


# Learning rates as functions of progress, for `fit`
def stepped(rate, drops, factor):
    """Multiplied by factor at each of the drops, fractions of the run."""
    return lambda progress: rate * factor ** sum(progress >= drop for drop in drops)


def cosine(rate, warmup=0.0):
    """Up to `rate` over the share `warmup`, then down to 0 along a cosine (Loshchilov and Hutter 2017)."""
    def at(progress):
        if progress < warmup:
            return rate * (progress + 1e-3) / (warmup + 1e-3)
        return rate * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-3)))
    return at


def updates(epochs, split, batch_size):
    """Number of steps in so many epochs of a split; a broken batch at the end is cut."""
    return int(epochs * len(split) / batch_size)


class LocalResponseNorm(nn.Module):
    """AlexNet's, x / (1 + 1e-4 / 5 sum of squares over 5 channels)^0.75; torch's own has no deterministic backward on a GPU."""

    def forward(self, x):
        squares = nn.functional.pad(x.float().square(), (0, 0, 0, 0, 2, 2))
        near = sum(squares[:, shift:shift + x.shape[1]] for shift in range(5))
        return x / (1 + 1e-4 / 5 * near).pow(0.75).to(x.dtype)


def learning_curves(names, trace, points=50):
    """{name: [[step, mean since the last point], ...]}, at most `points` each, from trace (names, steps)."""
    steps = trace.shape[1]
    ends = sorted({round(steps * point / points) for point in range(1, points + 1)} - {0})
    parts = trace.cpu().double().split([end - start for start, end in zip([0, *ends], ends)], 1)
    means = [part.mean(1).tolist() for part in parts]
    return {name: [[end, float(f"{mean[row]:.5g}")] for end, mean in zip(ends, means)] for row, name in enumerate(names)}


# Ranks of a distributed run
def average_gradients(parameters):
    """Replace every gradient by its mean over the ranks, in one all-reduce."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


def rank_and_ranks():
    """(this rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_ranks(tensor, operation=dist.ReduceOp.SUM):
    """The tensor, in place, summed over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def rows_of_all_ranks(rows):
    """The rows of all ranks; gradients flow back to each rank's own."""
    return torch.cat(dist_functional.all_gather(rows.contiguous())) if dist.is_initialized() else rows


class RankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Training statistics over the batches of all ranks, for the CPU: torch's SyncBatchNorm takes GPU tensors only."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims, shape = [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)
        values, ranks = x.double(), dist.get_world_size()  # a mean of squares less a squared mean cancels digits
        moments = torch.cat([values.mean(dims), values.square().mean(dims)])
        mean, square = (dist_functional.all_reduce(moments) / ranks).chunk(2)
        variance = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * ranks
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).float(), self.momentum)
            self.num_batches_tracked += 1
        out = (values - mean.view(shape)) * (variance.view(shape) + self.eps).rsqrt()
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    def _check_input_dim(self, x):
        pass


def synchronize_batch_norm(model, device):
    """Make every batch-norm layer of the module use the statistics of all ranks; parameters and state names stay."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.__class__ = RankBatchNorm


# What a record says of its surroundings
def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


def peak_memory(device):
    """MB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def read_provenance(script):
    """{"code", "commit", "dirty"} as the process starts: hashes of the files that matter, the commit, and whether any of
    them, the settings or the requirements were changed since; commit and dirty are null outside git."""
    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
    script = Path(script)
    code = report.code_hashes(script)
    try:
        return {"code": code, "commit": git("rev-parse", "HEAD"),
                "dirty": bool(git("status", "--porcelain", "--", str(script.resolve()), str(script.with_suffix(".yaml").resolve()),
                                  "replicate", "requirements.txt", ":!replicate/report.py"))}
    except (OSError, subprocess.CalledProcessError):
        return {"code": code, "commit": None, "dirty": None}


# Command line
class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def _parse(paper, arguments):
    parser = _Parser(prog=f"python -m papers.{paper}", allow_abbrev=False)
    parser.add_argument("--scale", default="small", help="smoke, small, full or paper")
    parser.add_argument("--seeds", help="such as 0,1,2; default: those that the scale declares")
    parser.add_argument("--rows", default="*", metavar="GLOB", help="such as 'rotnet4/*'; several with commas")
    parser.add_argument("--data", default="", metavar="DIR", help="data root, or 'embedded' for drawn images")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="change a setting; its results go to a suite of their own")
    parser.add_argument("--results", default=str(ROOT / "results"), metavar="DIR")
    parser.add_argument("--runs", default=str(ROOT / "runs"), metavar="DIR", help="checkpoints")
    parser.add_argument("--plan", action="store_true", help="time a few real steps, print minutes and memory, stop")
    parser.add_argument("--force", action="store_true", help="run again what is recorded already")
    return parser.parse_args(arguments)


def pick_device(name):
    """auto, cpu or cuda -> torch.device; this rank's GPU under torchrun."""
    require(name in ("auto", "cpu", "cuda"), f"unknown device '{name}'; known: auto, cpu, cuda")
    require(name != "cuda" or torch.cuda.is_available(), "device 'cuda' asked for but no CUDA GPU is visible: "
            "--device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def launch(script, Config, rows, reproduce, arguments=None):
    """A paper script's main.  Calls reproduce(run) for every seed and returns the exit status: 0 done, 2 wrong input,
    3 training failed, 130 interrupted.  Where the training of a row fails, reproduce is called again without it.

    script: the paper's file; the YAML of the same name lies beside it.
    rows: every row the script knows, in the table's order; or a function that names them for a config.
    """
    run, status = None, 0

    def on_signal(number, frame):
        if run is not None and run.fitting and not run.stop:
            run.stop = True  # fit saves at the end of the step
        else:
            raise Interrupted

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        options = _parse(Path(script).stem, arguments)
        for run in _runs(Path(script), Config, rows, options):
            while True:
                try:
                    reproduce(run)
                    break
                except TrainingFailed as error:
                    if run.plan or run.ranks > 1 or not run.asked:  # other ranks may be waiting for this one
                        raise
                    status = 3
                    tell(f"error: {error}")
                    run.give_up(str(error))
            if run.plan:
                total = sum(run.plan_phases.values())
                run.say(f"plan: {total / 60:.0f} minutes a seed, peak memory so far {peak_memory(run.device):.0f} MB")
            elif run.rank == 0:
                render_tables(run)
        return status
    except InputError as error:
        tell(f"error: {error}")
        return 2
    except (TrainingFailed, torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
        lost = isinstance(error, dist.DistError) or re.search("by peer|Broken pipe|Timed out", str(error))
        if run is not None and run.ranks > 1 and lost:
            tell("error: another rank is gone: the same command goes on from the state saved last")
            return 3
        if not memory and not isinstance(error, TrainingFailed):
            raise
        line = f"out of memory on {run.device}: lower batch_size or width with --set" if memory else str(error)
        tell(f"error: {line}")
        try:
            if not run.plan:
                run.give_up(line)
        except InputError as unwritten:
            tell(f"error: {unwritten}")
        return 3
    except Interrupted:
        tell("interrupted: the same command goes on from the state saved last")
        return 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def tell(line):
    """One line on stderr, from the first rank only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, file=sys.stderr, flush=True)


def render_tables(run):
    """Render the results folder; a table that cannot be made is no reason to lose a run that is recorded."""
    try:
        report.write_tables(run.suite.parent, run.script.parent)
    except (OSError, SyntaxError, ValueError) as error:
        tell(f"warning: tables not rendered ({error}); ./run_all.sh tables does it again")


def _runs(script, Config, rows, options):
    """Check everything that can be checked, then yield the Run of each seed, holding its lock."""
    settings = script.with_suffix(".yaml")
    overrides = list(options.overrides)
    own = resolve_config(Config, settings, options.scale)
    if options.data == "embedded":
        overrides.append("dataset=embedded")
    config = resolve_config(Config, settings, options.scale, 0, overrides)
    rows = rows(config) if callable(rows) else rows
    block = yaml.safe_load(settings.read_text(encoding="utf-8"))[options.scale] or {}
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else block.get("seeds", [0, 1, 2])
    except ValueError:
        raise InputError(f"--seeds takes whole numbers such as 0,1,2, not '{options.seeds}'") from None
    require(all(seed >= 0 for seed in seeds), f"seed {min(seeds)}: seeds start at 0")
    for glob in options.rows.split(","):
        require(fnmatch.filter(rows, glob), f"no row matches '{glob}'; rows: {', '.join(rows)}")
    suite = options.scale
    if config.dataset != own.dataset:
        suite += "-" + "".join(c if c.isalnum() else "-" for c in config.dataset.rstrip("/").split("/")[-1])
        if config.dataset.startswith("folder:"):  # two folders may have the same last name
            suite += f"-{derive(0, config.dataset) % 16 ** 6:06x}"
    if any(not override.startswith("dataset=") for override in overrides):
        suite += "-custom"  # an experiment never mixes with the declared protocol
    if options.data and options.data != "embedded":
        require(Path(options.data).is_dir(), f"no data folder {options.data}: give --data DIR or --data embedded")
    device = pick_device(options.device)
    provenance = read_provenance(script)
    _prepare(config, device)
    for folder, flag in ((options.results, "--results"), (options.runs, "--runs")):
        if not options.plan:
            _require_writable(Path(folder), flag)
    for seed in seeds[:1] if options.plan else seeds:
        run = Run(script, dataclasses.replace(config, seed=seed), options.scale, device, suite=suite,
                  results=options.results, runs=options.runs, data="" if options.data == "embedded" else options.data,
                  rows=options.rows, scale_rows=block.get("rows", ["*"]), force=options.force, plan=options.plan,
                  provenance=provenance)
        todo = run.wanted(*rows)
        if not todo:
            have = [row for row in rows if run.has(row)]
            run.say(f"seed {seed}: nothing to do, {len(have)} rows of {run.paper} are in {run.record_file}" if have else
                    f"seed {seed}: scale {options.scale} has none of these rows")
            continue
        run.say(f"{run.paper}, scale {options.scale}, seed {seed}: {len(todo)} rows to do on {device_name(device)}, "
                f"{run.ranks} rank(s), {torch.get_num_threads()} threads, run {run.hash}")
        if run.plan or run.rank > 0:
            if run.ranks > 1:
                dist.barrier()  # the first rank has its lock, and has removed what --force removes
            yield run
            continue
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            lock = open(run.folder / "lock", "w")
        except OSError as error:
            raise InputError(f"cannot write {run.folder} ({error.strerror}): give another folder with --runs DIR") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"run {run.hash} (seed {seed}) is going on in another process: wait for it, or "
                                 "give another folder with --runs DIR") from None
            if run.force:
                for checkpoint in run.folder.glob("*.pt"):
                    checkpoint.unlink()
            if run.ranks > 1:
                dist.barrier()
            yield run


def _prepare(config, device):
    """Deterministic kernels unless switched off, and the process group under torchrun."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False
    else:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def _require_writable(folder, flag):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.partial"
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): give another folder with {flag} DIR") from None


def pick_scale(papers, data="", device="auto", dataset=""):
    """(scale, reason): the largest honest one that this machine and these data allow."""
    require(data in ("", "embedded") or Path(data).is_dir(), f"no data folder {data}: give --data DIR or --data embedded")
    if data == "embedded" or dataset:
        wanted = ["embedded" if data == "embedded" else dataset]
    else:
        settings = [yaml.safe_load((ROOT / "papers" / f"{paper}.yaml").read_text(encoding="utf-8")) for paper in papers]
        wanted = [_default_dataset(paper, blocks["small"] or {}) for paper, blocks in zip(papers, settings)]
    root = image_data.data_root(data if data != "embedded" else None)
    sources = {name: image_data.available(name, root) for name in dict.fromkeys(wanted)}
    missing = [name for name, source in sources.items() if source is None]
    if len(missing) == len(sources):
        return "smoke", (f"{', '.join(missing)} not in {root} and not to be downloaded, so drawn images stand in and the "
                         "numbers mean nothing; for real ones put the data there or give --data DIR")
    where = ", ".join(f"{name} ({'to be downloaded' if source == 'download' else 'on disk' if source else 'missing'})"
                      for name, source in sources.items())
    if torch.cuda.is_available() and device != "cpu":
        return "full", f"a CUDA GPU is visible; data: {where}"
    return "small", f"no CUDA GPU in use, so the reduced protocol; data: {where}"


def _default_dataset(paper, block):
    """The data set of a scale: its YAML block's, else the default in the script's Config, read without importing it."""
    if "dataset" in block:
        return block["dataset"]
    tree = ast.parse((ROOT / "papers" / f"{paper}.py").read_text(encoding="utf-8"))
    return next(ast.literal_eval(node.value) for node in ast.walk(tree)
                if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "dataset")


if __name__ == "__main__":  # for run_all.sh: the scale on stdout, the reason on stderr
    parser = _Parser(prog="python -m replicate.trainer", allow_abbrev=False)
    for option in ("--data", "--device", "--dataset"):
        parser.add_argument(option, default="")
    parser.add_argument("papers", nargs="+")
    try:
        given = parser.parse_args()
        chosen, why = pick_scale(given.papers, given.data, given.device, given.dataset)
    except InputError as error:
        tell(f"error: {error}")
        raise SystemExit(2)
    tell(f"scale {chosen}: {why}")
    print(chosen)
