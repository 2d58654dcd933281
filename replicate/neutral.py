"""Does the code still behave as it did at another commit?

    python -m replicate.neutral BASE [paper ...]   compares; appends a line to results/neutral.jsonl
    python -m replicate.neutral --check            is there a line about today's code?  (.ci/run)

Both versions run side by side on this machine, with one thread each: all rows at the scale smoke,
on the images that the code draws; then every scale that has records, and `paper`, cut short:
networks at most a quarter as wide, batches of 8, made-up images under the name of every data set,
and five steps from the beginning, middle and end of every training.  Each row is asked for alone,
so that the trainings it rests on are known.  Compared bit for bit are the losses, learning rates
and final weights of every training, and for every row its value before rounding and the scores on
which it decides.  What turns files into images is not compared: records hold a hash of their data.

Where only comments and docstrings differ, nothing has to run.

Equality has no direction and adds up.  So a record is still what today's code would give if a
chain of lines leads from its code to today's, and none of them names its row as changed.
"""
import argparse
import ast
import contextlib
import fnmatch
import hashlib
import importlib
import inspect
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES = ROOT / "results" / "neutral.jsonl"
IMAGES = (520, 1400, 10400)  # of a split; more where a row needs more of each class
BATCH, WIDTH, ITERATIONS = 8, 0.25, 10
DECISIONS = {"argmax", "argmin", "topk", "sort", "argsort", "lt", "le", "gt", "ge"}


# Lines, as the report reads them
def one_hash(code):
    """A record's code as one string; older records have {file: hash}, which is hashed."""
    text = json.dumps(code, sort_keys=True).encode()
    return code if isinstance(code, str) else hashlib.sha256(text).hexdigest()[:12]


def read_lines(paper, path=LINES):
    """The lines about a paper; whatever else the file holds is skipped."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            line = json.loads(text)
            if line["paper"] == paper and line["old"] and line["new"] and line["changed"].keys():
                lines.append(line)
    return lines


def unmarked(record, today, lines):
    """Whether none of the code that made a record differs in its row from today's, a code hash."""
    row, scale = record["row"], record.get("scale")
    pairs = [{line["old"], line["new"]} for line in lines
             if row not in line["changed"].get(scale, [row])]
    same, before = {today}, set()
    while same != before:
        before, same = same, same.union(*(pair for pair in pairs if pair & same))
    return {one_hash(code) for code in (record.get("code"), *record.get("codes", []))} <= same


def unexplained(root=ROOT):
    """A message for each paper that has records, but none, and no line, of its code today."""
    from replicate import records
    messages = []
    for script in sorted((root / "papers").glob("*.py")):
        found = [record for file in (root / "results").glob(f"*/{script.stem}.jsonl")
                 for record in records.read(file)[0]]
        lines = read_lines(script.stem, root / "results" / LINES.name)
        known = {one_hash(record["code"]) for record in found if "code" in record}
        known |= {code for line in lines for code in (line["old"], line["new"])}
        if found and records.code_hash(script, root) not in known:
            messages.append(f"{script.stem}: its code has changed and no line in neutral.jsonl "
                            f"says what that did: python -m replicate.neutral BASE {script.stem}")
    return messages


# In the process of one version: its own replicate/ is imported here, and nothing of the other's
def drive(paper, scales, glob, out):
    """Run every row of the scales that matches the glob; write what was seen to the file `out`."""
    import torch
    script = importlib.import_module(f"papers.{paper}")
    from replicate import data, report, trainer
    Run, seen, drawn = trainer.Run, {}, {}
    now = {"scale": None, "name": None, "row": None, "trainings": {}, "images": IMAGES[0],
           "fitting": False, "measuring": False, "met": set()}

    class Asked(BaseException):
        """The rows that a scale asks for first of all."""

    def digest(*parts):
        made = hashlib.sha256()
        for part in parts:
            made.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                        if torch.is_tensor(part) else repr(part).encode())
        return made.hexdigest()[:16]

    def replaces(owner, name):
        """Decorator of f(original, arguments): stands in for owner.name, where there is one."""
        original = getattr(owner, name, None)

        def decorate(function):
            def stand_in(*arguments, **named):
                bound = inspect.signature(original).bind(*arguments, **named)
                bound.apply_defaults()
                return function(lambda: original(*bound.args, **bound.kwargs), bound.arguments)
            if original:
                setattr(owner, name, stand_in)
        return decorate

    class Decisions(torch.overrides.TorchFunctionMode):
        """Notes the floats that are turned into decisions, which a rounded value does not show.

        Those of a training are left to its losses and weights.
        """

        def __torch_function__(self, function, types, arguments=(), named=None):
            if getattr(function, "__name__", "") in DECISIONS and now["row"] and not now["fitting"]:
                scores = {digest(each) for each in arguments
                          if torch.is_tensor(each) and each.is_floating_point()}
                now["met"] |= scores
                now["row"]["scores"] |= scores if now["measuring"] else set()
            return function(*arguments, **(named or {}))

    def watch(given, measure):
        """Make a measure note its decisions and its value."""
        def watched(*splits):
            now["measuring"] = True
            try:
                note(value := function(*splits))
            finally:
                now["measuring"] = False
            return value
        function, given[measure] = given[measure], watched

    def note(value):
        value = value.get(now["name"]) if isinstance(value, dict) else value
        with contextlib.suppress(TypeError):  # None, or what an older measure gives several rows
            now["row"]["value"] = float(value).hex()

    @replaces(Run, "fit")
    def fit(original, given):
        loss, rate = ("loss", "rate") if "rate" in given else ("objective", "learning_rate")
        steps, objective, schedule, losses = given["steps"], given[loss], given[rate], []
        now["row"]["trainings"].add(given["purpose"])
        real = range(steps)
        if now["scale"] != "smoke":
            real = sorted({0, 1, steps // 2, 3 * steps // 4, steps - 1} & set(real))

        def noted(batch, step):
            scalars = objective(batch, real[step])
            losses.append({name: digest(value.float()) for name, value in scalars.items()})
            return scalars
        given.update({"steps": len(real), loss: noted,
                      rate: lambda progress: schedule(real[round(progress * len(real))] / steps)})
        now["fitting"] = True
        try:
            result = original()
        finally:
            now["fitting"] = False
        if losses:  # else it was read from its checkpoint
            shares = [step / steps for step in range(0, steps, 1 + steps // 10000)]
            shares += [percent / 100 for percent in range(100)]
            now["trainings"][given["purpose"]] = {
                "losses": losses, "steps": steps, "rates": digest(*map(schedule, shares)),
                "weights": sorted(map(digest, given["model"].state_dict().values()))}
        return result

    @replaces(torch.optim.LBFGS, "__init__")  # most of the time goes there
    def lbfgs(original, given):
        now["row"]["scores"].add(digest(given["max_iter"]))
        given["max_iter"] = min(given["max_iter"], ITERATIONS)
        original()

    @replaces(Run, "shuffled")
    def shuffled(original, given):
        if now["scale"] != "smoke":
            given["batch_size"] = min(given["batch_size"], BATCH)
        return original()

    @replaces(Run, "measure")  # older form: measure gives a value to the script, record takes it
    def measure(original, given):
        watch(given, "function")
        return original()

    @replaces(Run, "record")
    def record(original, given):
        if "value" in given:
            note(given["value"])
        elif given["measure"]:
            watch(given, "measure")
        return original()

    @replaces(Run, "value")
    def value(original, given):
        found = original()
        if found is None or Path(sys._getframe(2).f_code.co_filename).parent.name == "replicate":
            return found
        now["row"]["uses"].add(given["row"])
        own = int(digest(given["row"]), 16) / 16 ** 16  # keeps rows apart whose short runs agree
        return {**found, "value": found["value"] + own} if isinstance(found, dict) else found + own

    @replaces(Run, "wants" if hasattr(Run, "wants") else "wanted")
    def wants(original, given):
        rows = original()
        if now["row"] is None:
            wanted = {row for each in glob.split(",") for row in fnmatch.filter(rows, each)}
            raise Asked([row for row in rows if row in wanted], given["self"])
        return rows

    @replaces(data, "load")
    def load(original, given):
        name, size, smoke = given["name"], given["size"], now["scale"] == "smoke"
        key = (name, size, smoke or now["images"])
        if key not in drawn:
            drawn[key] = original() if smoke else made_up(name, size or 128)
        return drawn[key]

    @replaces(data, "on_disk")
    def on_disk(original, given):
        return [*data.PACKED, "imagenette", "imagenet", "mnist-m"]

    def made_up(name, side):
        classes, (side, _, channels) = data.PACKED.get(name, (10, (side, side, 3)))[:2]
        generator, splits = torch.Generator().manual_seed(int(digest(name), 16) >> 1), []
        for count in (now["images"], 200):
            count = min(count, 2 * 10 ** 7 // side ** 2)
            coarse, fine = (torch.randint(128, (count, channels, size, size), generator=generator,
                                          dtype=torch.uint8) for size in (4, side))
            coarse = coarse.repeat_interleave(side // 4 + 1, 2).repeat_interleave(side // 4 + 1, 3)
            images = coarse[:, :, :side, :side] + fine
            splits.append(data.Resident(images, torch.arange(count) % classes))
        return data.ImageSet(name, *splits, classes, name)

    def run(*arguments):
        """The script's main, silent -> its last message."""
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), \
                Decisions():
            status = script.main(["--scale", now["scale"], "--seeds", "1", "--device", "cpu",
                                  "--results", f"{out}.results", "--runs", f"{out}.runs",
                                  *arguments])
        if status == 130:  # interrupted
            raise SystemExit(status)
        return said.getvalue().strip().split("\n")[-1]

    replaces(report, "write_tables")(lambda original, given: [])
    path = Path(script.__file__)
    if hasattr(report, "code_hashes"):  # older form
        code, provenance = one_hash(report.code_hashes(path)), trainer.read_provenance(path)
        trainer.read_provenance = lambda script: provenance
    else:
        code = importlib.import_module("replicate.records").code_hash(path)
    for now["scale"] in scales:
        now.update(row=None, trainings={}, met=set())
        try:
            run()
            continue  # the scale is unknown or has no rows
        except Asked as asked:
            names, first = asked.args
        rows, narrow = {}, []
        if now["scale"] != "smoke" and hasattr(first.config, "width"):
            narrow = ["--set", f"width={min(first.config.width, WIDTH)}"]
        for now["images"] in IMAGES[:1] if now["scale"] == "smoke" else IMAGES:
            for now["name"] in [row for row in names if row not in rows or not rows[row]["value"]]:
                now["row"] = {"value": None, "scores": set(), "trainings": set(), "uses": set()}
                try:
                    error = run("--rows", now["name"], *narrow)
                except Exception as problem:  # such as images too small for a network
                    error = f"{type(problem).__name__}: {problem}"
                rows[now["name"]] = {**now["row"], "error": error}
        for row in rows.values():
            row.update({key: sorted(row[key]) for key in ("scores", "trainings", "uses")})
        seen[now["scale"]] = {"settings": first.hash, "trainings": now["trainings"], "rows": rows,
                              "met": sorted(now["met"])}
    Path(out).write_text(json.dumps({"code": code, "torch": torch.__version__, "scales": seen}))


# Both versions
def copy_tree(folder, commit=None):
    """The scripts and the shared layer of a commit, or as they lie here; smoke has all rows."""
    import yaml
    folder.mkdir()
    if commit:
        command = ["git", "archive", commit, "papers", "replicate"]
        archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=folder, check=True, input=archive)
    else:
        for name in ("papers", "replicate"):
            shutil.copytree(ROOT / name, folder / name)
    for path in (folder / "papers").glob("*.yaml"):
        blocks = yaml.safe_load(path.read_text(encoding="utf-8"))
        blocks.get("scales", blocks)["smoke"]["rows"] = ["*"]
        path.write_text(yaml.safe_dump(blocks, sort_keys=False), encoding="utf-8")
    return folder


def observe(trees, paper, scales, glob="*"):
    """What each version of a paper does, all of them at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "REPLICATE_DATA": f"{folder}/data"}
        outs = [Path(folder) / str(number) for number in range(len(trees))]
        command = [sys.executable, "-P", __file__, "--drive", paper, json.dumps(scales), glob]
        processes = [subprocess.Popen([*command, str(out)], cwd=tree,
                                      env={**environment, "PYTHONPATH": str(tree)})
                     for tree, out in zip(trees, outs)]
        try:
            if any([process.wait() for process in processes]):
                raise SystemExit(f"error: {paper} does not run; see above")
        finally:
            for process in processes:
                process.kill()
        return [json.loads(out.read_text()) for out in outs]


def differences(old, new):
    """(trainings that differ, {row that differs or could not be compared: how}) at one scale."""
    def differing(key):
        names = sorted(old[key].keys() | new[key].keys())
        return [(name, old[key].get(name), new[key].get(name)) for name in names]
    trainings = [name for name, first, second in differing("trainings") if first != second]
    both_met = set(old["met"]) & set(new["met"])

    def same(part, first, second):
        """What one version does in a measure, another may have done before or for another row."""
        first, second = ({*row[part]} if part == "scores" else row[part] for row in (first, second))
        nested = part == "scores" and (first <= second or second <= first)
        return first == second or nested and first ^ second <= both_met
    changed, parts = {}, ("value", "scores", "trainings", "uses")
    for row, *both in differing("rows"):
        if None in both:
            changed[row] = "one version has no such row"
        elif failed := [each["error"] or "no value" for each in both if each["value"] is None]:
            changed[row] = f"not compared ({failed[0]})"
        elif unequal := [part for part in parts if not same(part, *both)]:
            changed[row] = f"differs in its {', '.join(unequal)}"
        elif moved := sorted(set(both[0]["trainings"]) & set(trainings)):
            changed[row] = f"rests on {', '.join(moved)}"
    while more := {row: "is computed from rows that differ" for row, each in new["rows"].items()
                   if row not in changed and changed.keys() & each["uses"]}:
        changed |= more
    return trainings, changed


def instructions(tree, paper):
    """The syntax trees, without docstrings, of all files that can change a paper's numbers."""
    from replicate.records import SHARED
    made = []
    for name in (f"papers/{paper}.py", *(f"replicate/{file}" for file in (*SHARED, "records.py"))):
        path = tree / name
        code = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else None
        for node in ast.walk(code) if code else ():
            named = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            if named and ast.get_docstring(node, clean=False) is not None:
                node.body[0] = ast.Pass()
        made.append(code and ast.dump(code))
    return made


def compare(trees, paper, scales, glob="*"):
    """Print what differs between two versions of a paper, old and new -> the line about them."""
    from replicate.records import code_hash
    if glob == "*" and instructions(trees[0], paper) == instructions(trees[1], paper):
        print(f"{paper}: only comments and docstrings differ, if anything", flush=True)
        old, new = (code_hash(tree / "papers" / f"{paper}.py", tree) for tree in trees)
        return {"paper": paper, "old": old, "new": new, "changed": {name: [] for name in scales},
                "trainings": 0, "rows": 0, "words_only": True}
    old, new = observe(trees, paper, scales, glob)
    line = {"paper": paper, "old": old["code"], "new": new["code"], "changed": {}, "trainings": 0,
            "rows": 0, "torch": new["torch"]}
    for scale in [scale for scale in scales if scale in old["scales"] and scale in new["scales"]]:
        first, second = old["scales"][scale], new["scales"][scale]
        trainings, rows = differences(first, second)
        line["changed"][scale] = sorted(rows)
        line["trainings"] += len(second["trainings"])
        line["rows"] += len(second["rows"])
        print(f"{paper}, {scale}: {len(second['trainings'])} trainings and {len(second['rows'])} "
              f"rows; trainings that differ: {', '.join(trainings) or 'none'}",
              *["  the settings' hash differs"] * (first["settings"] != second["settings"]),
              *(f"  {row}: {how}" for row, how in sorted(rows.items())), sep="\n", flush=True)
    return line


def main(arguments=None):
    from replicate import records
    parser = argparse.ArgumentParser("replicate.neutral", description=__doc__.split("\n")[0])
    parser.add_argument("base", nargs="?", metavar="BASE", help="a commit")
    parser.add_argument("papers", nargs="*", metavar="paper", help="default: all")
    parser.add_argument("--scales", help="such as smoke,small; no line is written")
    parser.add_argument("--rows", metavar="GLOB", help="several with commas; no line is written")
    parser.add_argument("--check", action="store_true", help="exit 1 without a line about today")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no child is left behind
    if options.check:
        messages = unexplained()
        print(*messages, sep="\n", end="\n" * bool(messages))
        return 1 if messages else 0
    command = ["git", "rev-parse", "--verify", "--quiet", f"{options.base}^{{commit}}"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if not commit:
        parser.error(f"no commit '{options.base}'")
    with tempfile.TemporaryDirectory() as folder:
        trees = copy_tree(Path(folder) / "old", commit), copy_tree(Path(folder) / "new")
        every = sorted(path.stem for path in (ROOT / "papers").glob("*.yaml"))
        for paper in options.papers or every:
            files = (ROOT / "results").glob(f"*/{paper}.jsonl")
            scales = {record["scale"] for file in files for record in records.read(file)[0]}
            scales = list(dict.fromkeys(["smoke", *sorted(scales), "paper"]))
            if options.scales or options.rows:
                asked = options.scales.split(",") if options.scales else scales
                compare(trees, paper, asked, options.rows or "*")
                continue
            line = compare(trees, paper, scales)
            if line["old"] != line["new"]:
                records.append(LINES, {**line, "base": commit})
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        drive(sys.argv[2], json.loads(sys.argv[3]), *sys.argv[4:])
    else:
        sys.exit(main())
