"""Run records, one JSON line for every finished row and seed, and what a paper's YAML declares."""
import contextlib
import fnmatch
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import zipfile
from datetime import datetime, timezone
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
# The shared files that can change a number
SHARED = ("trainer.py", "data.py", "files.py", "classes.py", "evaluate.py", "embedded.py")
SIDE = r"(\S+)(?: - ([^\s\d]\S*))?"  # of a claim: a row, or the difference of two


class InputError(Exception):
    """Something the user gave is wrong: one line, exit status 2, nothing written."""


# Records
def append(path, record):
    """Add a line in one write, on the disk when this returns; a torn last line is closed first.

    Raises OSError where that fails and ValueError for NaN; the file then is as it was.
    """
    line = (json.dumps(record, sort_keys=True, allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        written = os.write(descriptor, line)
        if written < len(line):
            end = os.lseek(descriptor, 0, os.SEEK_CUR)
            if os.fstat(descriptor).st_size == end:  # nobody else has written since
                os.ftruncate(descriptor, end - written)
            raise OSError(28, "the disk is full, the record was not written")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


NEEDED = ("row", "seed", "config_hash", "status")
TYPES = {"row": str, "seed": int, "config_hash": str, "metric": str, "scale": str, "config": dict,
         "data": dict, "code": (str, dict), "codes": list, "history": dict, "trainings": dict}


def is_number(value):
    return type(value) in (int, float) and abs(value) < 1e100  # so that sums are finite


def are_points(points):
    return isinstance(points, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in points)


def is_record(record):
    """Whether a parsed line has the fields, of the right types, that the tables are made from."""
    return (isinstance(record, dict) and all(name in record for name in NEEDED)
            and all(isinstance(record[name], TYPES[name]) for name in TYPES if name in record)
            and all(map(is_number, (record.get("seconds", 0),
                                    *record.get("trainings", {}).values())))
            and all(map(are_points, record.get("history", {}).values()))
            and all(isinstance(digest, str) for digest in record.get("data", {}).values())
            and type(record["seed"]) is int  # to isinstance, true is a number too
            and record["seed"] >= 0 and record["status"] in ("ok", "failed")
            and (record["status"] == "failed" or is_number(record.get("value"))
                 and (record.get("metric") != "accuracy" or 0 <= record["value"] <= 100)))


def read(path):
    """(records in the order they were written, one warning for every damaged line)."""
    records, warnings = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], start=1):
        try:
            record = json.loads(line) if line.strip() else None
            valid = is_record(record)
        except (ValueError, OverflowError, RecursionError):
            record, valid = line, False
        if valid:
            records.append(record)
        elif record is not None or line.strip():
            warnings.append(f"{'/'.join(path.parts[-3:])} line {number}: not a record, skipped")
    if len(warnings) > 3:
        warnings[2:] = [f"{warnings[2]}; so are {len(warnings) - 3} more lines"]
    return records, warnings


def find(records, row, seed, config_hash, data=None):
    """The last finished record of a row, or None.

    data: {name: SHA-256} of the data at hand; a record made with others does not count.
    """
    wanted = (row, seed, config_hash, "ok")
    keys = ("row", "seed", "config_hash", "status")
    return next((r for r in reversed(records) if tuple(r[key] for key in keys) == wanted
                 and same_data(r.get("data", {}), data or {})), None)


def same_data(first, second):
    """Whether two dicts {name: SHA-256} agree in the names that both have."""
    return all(first[name] == second[name] for name in first.keys() & second.keys())


# What a paper's YAML declares
def expand(rows):
    """{row: what the YAML says of it}, with a/block{1,2}/b written out."""
    made = {}
    for pattern, entry in (rows or {}).items():
        before, brace, rest = pattern.partition("{")
        inside, _, after = rest.partition("}")
        for part in inside.split(",") if brace else [""]:
            if before + part + after in made:
                raise ValueError(f"row '{before + part + after}' comes twice")
            made[before + part + after] = entry or {}
    return made


def rows_of(curve):
    """The rows that a curve draws."""
    return [row for line in curve["lines"].values()
            for row in ([line["row"]] if isinstance(line, dict) else [row for _, row in line])]


def read_claim(test):
    """A claim's test -> ({row: weight}, margin): the weighted sum of the rows' values is claimed to
    be above the margin.

    The test is `side > side` or `side < side`; a side is `row` or `row - row`, and the right one
    may end in a margin, `+ 5` or `- 5`.  ValueError for anything else.
    """
    parts = re.fullmatch(rf"{SIDE} ([<>]) {SIDE}(?: ([+-]) (\d[\d.]*))?", test)
    if not parts:
        raise ValueError(f"'{test}' is not of the form 'row > row + 5' or 'row - row > row - row'")
    *rows, direction, margin = [parts[group] for group in (1, 2, 4, 5, 6, 7)]
    sign, weights = 1 if parts[3] == ">" else -1, {}
    for row, weight in zip(rows, (sign, -sign, -sign, sign)):
        if row:
            weights[row] = weights.get(row, 0) + weight
    weights = {row: weight for row, weight in weights.items() if weight}
    if not weights:
        raise ValueError(f"'{test}' compares rows with themselves")
    return weights, float(margin or 0) * (sign if direction == "+" else -sign) + 0.0


def check_shapes(declared):
    """TypeError where rows, scales, headline or curves of a YAML are not what its readers take."""
    def are(kind, values):
        return isinstance(values, list) and all(isinstance(value, kind) for value in values)

    def need(good, what):
        if not good:
            raise TypeError(f"expected {what}")

    for row, entry in declared["rows"].items():
        need(are(str, [entry[key] for key in ("where", "unit") if key in entry]),
             f"rows: {row}: {{where: a text, unit: a text}}, such as \"Sec. 4.1\"")
        need(isinstance(entry, dict) and is_number(entry.get("paper", 0)),
             f"rows: {row}: {{paper: a number, where: a text}}")
    for key in ("names", "figures"):
        need(are(str, [*declared[key], *declared[key].values()]), f"{key}: name: a text")
    need(are(str, declared["comparable"]) and isinstance(declared["title"], str),
         "comparable: [scale, ...], title: a text")
    for name, block in declared["scales"].items():
        need(isinstance(block, dict | None) and are(str, (block or {}).get("rows", [])),
             f"scales: {name}: settings, and rows: [row, ...]")
        seeds = (block or {}).get("seeds", [0])
        need(are(int, seeds) and seeds, f"scales: {name}: seeds: [0, ...]")
    for name, curve in declared["curves"].items():
        need(are(str, [curve[key] for key in ("title", "x", "y")] + [curve.get("caption", "")]),
             f"curves: {name}: title, x, y and perhaps caption, which are texts")
        for line in curve["lines"].values():
            if isinstance(line, dict):
                good = are(str, [line["row"], line["scalar"]])
            else:
                good = are(list, line) and all(
                    isinstance(x, (str, int, float)) and isinstance(row, str) for x, row in line)
            need(good, f"curves: {name}: lines: name: [[x, row], ...] or {{row: ..., scalar: ...}}")


class Declarations(yaml.SafeLoader):
    """YAML in which no key comes twice; PyYAML would take the last without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"'{min(twice)}' comes twice")
        return super().construct_mapping(node, deep)


def read_declared(path):
    """What <paper>.yaml says, rows and claims spelt out; path: that file's or the script's.

    A claim gets weights and margin (see `read_claim`), scales (None: all) and ours (whether its
    `where` begins with that word).  InputError where the file is of another shape.
    """
    path = Path(path).with_suffix(".yaml")
    if not path.exists():
        raise InputError(f"there is no {path}: each script has such a file beside it, see README")
    try:
        declared = {"claims": {}, "curves": {}, "figures": {}, "names": {}, "headline": [],
                    "title": path.stem, "comparable": ["full", "paper"],
                    **yaml.load(path.read_text(encoding="utf-8"), Declarations)}
        declared["rows"] = expand(declared.get("rows"))
        declared["scales"] = declared.get("scales") or {}
        declared["headline"] = list(expand(dict.fromkeys(declared["headline"] or ())))
        declared["figures"] = dict(declared["figures"] or {})
        declared["names"] = dict(declared["names"] or {})
        check_shapes(declared)
        for scale, block in declared["scales"].items():
            block = declared["scales"][scale] = dict(block or {})
            block.setdefault("seeds", [0] if scale == "smoke" else [0, 1, 2])
        named = set(declared["headline"])
        for name, claim in declared["claims"].items():
            weights, margin = read_claim(claim["test"])
            claim.update(weights=weights, margin=margin, scales=claim.get("scales"),
                         ours=claim["where"].startswith("ours"), text=str(claim["text"]))
            unknown = set(claim["scales"] or ()) - declared["scales"].keys()
            if unknown:
                raise ValueError(f"claim '{name}' names unknown scales: {sorted(unknown)}")
            named |= weights.keys()
        named |= {row for curve in declared["curves"].values() for row in rows_of(curve)}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        kind = type(error).__name__
        raise InputError(f"{path.name} is not of the right shape ({kind}: {text})") from None
    missing = sorted(named - declared["rows"].keys())
    if missing:
        raise InputError(f"{path.name}: claims, curves or headline name rows that it lacks: "
                         f"{', '.join(missing)}")
    return declared


def matching(rows, globs):
    """Those of the rows that match one of the globs, in their order."""
    return [row for row in rows if any(fnmatch.fnmatchcase(row, glob) for glob in globs)]


# Where a record comes from
def code_hash(script, root=ROOT):
    """12 hex digits of the bytes of a script and shared files that can change its numbers."""
    files = [Path(script), *(root / "replicate" / name for name in SHARED)]
    files = [file for file in files if file.exists()]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def provenance(script):
    """{"code", "commit", "dirty", "started"}; commit and dirty are None outside git."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words):  # whatever repository the environment names, as it does within git's hooks
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True,
                              check=True, env=own).stdout.strip()
    files = [str(Path(script).resolve().with_suffix(suffix)) for suffix in (".py", ".yaml")]
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT.resolve():
            raise OSError("a repository of somebody else around this folder")
        commit = git("rev-parse", "HEAD")
        dirty = bool(git("status", "--porcelain", "--", *files, "requirements.txt",
                         *(f"replicate/{name}" for name in SHARED)))
    except (OSError, subprocess.CalledProcessError):
        commit = dirty = None
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"code": code_hash(script), "commit": commit, "dirty": dirty, "started": started}


# Files and terminal
def show_all_text():
    """Let stdout and stderr take any text: a path may hold what the terminal cannot show.  One
    that goes away, such as `| head`, or whose disk is full is no reason to lose a training: what
    would be written there is dropped then."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure") and "write" not in vars(output):
            output.reconfigure(errors="backslashreplace")
            output.write, output.flush = dropping(output, "write"), dropping(output, "flush")


def dropping(output, name):
    """output's method of that name; once it fails, the output goes to the null device."""
    method = getattr(output, name)

    def call(*arguments):
        try:
            return method(*arguments)
        except OSError as error:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), output.fileno())
            if output is sys.stdout:
                print(f"warning: nothing more is shown, since standard output fails ({error})",
                      file=sys.stderr, flush=True)
            return None
    return call


def folder(text):
    """A folder's name on a command line -> its Path, with ~ spelt out; ValueError for an empty one,
    such as a shell's variable that is not set."""
    if not text:
        raise ValueError
    return Path(text).expanduser()


def require_torch():
    """InputError where torch, whose import takes seconds, is there and does not load."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        raise InputError(f"torch of {sys.executable} cannot be loaded "
                         f"({' '.join(str(error).split())}): mend it, or take another "
                         "Python") from None


def is_first_rank():
    """Whether this process is the only one, or the first of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def damaged_part(path):
    """What part of a zip file, such as a checkpoint, does not agree with its checksum, or None;
    None for a file of another format."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError):  # no zip file, or an odd one
        return None


def temporary(path):
    """The name under which a file is written before it is renamed; it tells whose it is."""
    name = os.fsdecode(os.fsencode(path.name)[:120])  # a file's name has at most 255 bytes
    return path.with_name(f"{name}.{platform.node()[:64]}.{os.getpid()}.partial")


def tidy(*folders):
    """Remove what processes of this machine that were killed while they wrote have left under
    temporary names."""
    for path in (path for folder in folders for path in folder.glob("*.partial")):
        with contextlib.suppress(OSError, ValueError):
            name, number, _ = path.name.rsplit(".", 2)
            if name.endswith(f".{platform.node()[:64]}") and not is_alive(int(number)):
                path.unlink()


def is_alive(process):
    """Whether a process of this machine is running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is, as another user's
    return True


def write_atomically(path, content):
    """Write under a temporary name, fsync, rename: the file is whole or not there; else OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
