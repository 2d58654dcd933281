"""What is said on the terminal: the live line of a training, and for run_all.sh the scale that it
takes, the sums of a plan, and the summary at the end.

    python -m replicate.terminal scale PAPER ... [options]   on stdout the scale and those of the
                                                             papers that have it; stderr: why
    python -m replicate.terminal turns SCALE PAPER ...       papers and seeds in the order of work
    python -m replicate.terminal end LEDGER PAPER ...        what the runs noted in LEDGER came to
"""
import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

from replicate import records, report
from replicate.records import ROOT, InputError
from replicate.report import show_time

GROUPS = 5  # lines that a plan has for one paper, so that six papers fit on a page
NEXT = {"smoke": "demo", "demo": "small", "small": "full"}
DEVICES = "auto", "cpu", "cuda"
DOWNLOADS = {  # megabytes of what torchvision fetches
    "cifar10": 170, "mnist": 12, "usps": 3, "imagenette": 1560, "stl10": 2640, "svhn": 247}


# Options that all papers share
def check_options(options):
    """InputError for what is wrong whichever the paper: its data root, and where it writes."""
    if options.data and not Path(options.data).is_dir():
        raise InputError(f"no data folder {options.data}: give another with --data DIR; scale demo "
                         "needs none")
    for folder, option in ((options.results, "--results DIR"), (options.runs, "--runs DIR")):
        if not options.plan:
            require_writable(Path(folder), option)


def require_writable(folder, option, file=None):
    """InputError where nothing can be written to a folder, or to a file that may be there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        records.tidy(folder)
        probe = records.temporary(folder / "probe")
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
        if file and file.exists():
            open(file, "ab").close()
    except OSError as error:
        place = error.filename if file and error.filename == str(file) else folder
        raise InputError(f"cannot write to {place} ({error.strerror}): give another place with "
                         f"{option}") from None


def read_seeds(given, declared):
    try:
        seeds = [int(seed) for seed in given.split(",")] if given is not None else declared
    except ValueError:
        raise InputError(f"--seeds takes whole numbers such as 0,1,2, not '{given}'") from None
    for seed in seeds:
        if not 0 <= seed < 2 ** 40:
            raise InputError(f"seed {seed}: seeds start at 0 and end before {2 ** 40}")
    return list(dict.fromkeys(seeds))  # one named twice counts once


# A line in place
class Line:
    """A line that is written again and again in its place, where stdout is a terminal.

    live: whether it is; shared: whether other runs write there, too, as run_all.sh says by
    REPLICATE_PLAIN in the environment.
    """

    def __init__(self):
        self.shared = bool(os.environ.get("REPLICATE_PLAIN"))
        self.live = (sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
                     and not self.shared)
        self.there = False

    def show(self, text):
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]}\x1b[K", end="", flush=True)
            self.there = True

    def clear(self):
        if self.there:
            print("\r\x1b[K", end="", flush=True)
            self.there = False


# The ledger: what one run tells run_all.sh
def note(run):
    """Append what a run was, or is planned to be, to the file that REPLICATE_LEDGER names."""
    path = os.environ.get("REPLICATE_LEDGER")
    if path and run.rank == 0:
        line = {"paper": run.paper, "scale": run.scale, "suite": str(run.suite.resolve()),
                "data": run.data_folder, "rows": sum(len(rows) for rows, *_ in run.costs),
                "seconds": seconds_of(run.costs)}
        with contextlib.suppress(OSError):  # the run itself is recorded
            records.append(Path(path), line)


# A plan
def seconds_of(costs):
    """Seconds of a plan's [(rows, own seconds, {training: seconds}, MB)], each training once."""
    trainings = {name: seconds for _, _, made, _ in costs for name, seconds in made.items()}
    return sum(own for _, own, _, _ in costs) + sum(trainings.values())


def plan_lines(run, recorded):
    """A few lines on what a run would take, by the first part of its rows' names.

    recorded: how many of the rows it has been asked for are done, which are not timed.
    """
    groups, seen = {}, set()
    for rows, own, trainings, memory in run.costs:
        group = groups.setdefault(rows[0].split("/")[0], [0, 0.0, 0.0])
        group[0] += len(rows)
        group[1] += own + sum(seconds for name, seconds in trainings.items() if name not in seen)
        group[2] = max(group[2], memory)
        seen |= trainings.keys()
    ordered = sorted(groups.items(), key=lambda item: -item[1][1])
    if len(ordered) > GROUPS:
        rest = [each for _, each in ordered[GROUPS - 1:]]
        name = f"{len(rest)} other groups"
        ordered[GROUPS - 1:] = [(name, [sum(each[0] for each in rest),
                                        sum(each[1] for each in rest),
                                        max(each[2] for each in rest)])]
    done = f", {recorded} recorded already" * bool(recorded)
    rows = sum(each[0] for _, each in ordered)
    data = f" on {', '.join(run.sha256)}" if run.sha256 else ""
    lines = [f"{run.paper}{data}: {report.count(rows, 'row')} to do{done}, "
             f"{show_time(seconds_of(run.costs))} a seed"]
    return lines + [f"  {name:<24} {report.count(number, 'row'):>8} {show_time(seconds):>10} "
                    f"{memory:6.0f} MB" for name, (number, seconds, memory) in ordered]


def sum_up_plan(notes, work):
    """notes: a plan of one seed of each paper; work: the paper of each seed that is to be run."""
    if {note["paper"] for note in notes} != set(work):
        return []  # one could not be planned, which has been said
    seconds, total = (sum(note[key] for note in notes) for key in ("seconds", "rows"))
    whole = show_time(sum(note["seconds"] * work.count(note["paper"]) for note in notes))
    seeds = f", {whole} for all {len(work)} seeds" * (len(work) > len(notes))
    return [f"in all: {report.count(total, 'row')}, {show_time(seconds)} for one seed each{seeds}, "
            "one after the other; memory is the peak so far"]


# The scale
def needed(papers, scale):
    """Downloadable data sets that the papers need: by their settings, and by recorded runs."""
    import importlib
    from replicate import trainer
    names = set()
    for paper in papers:
        try:
            declared = records.read_declared(ROOT / "papers" / f"{paper}.yaml")
            config, _ = trainer.read_settings(importlib.import_module(f"papers.{paper}").Config,
                                              declared, scale)
            names |= {value for value in vars(config).values() if isinstance(value, str)}
        except (ImportError, AttributeError, InputError):
            pass
        names |= recorded_data(paper, scale) or recorded_data(paper, "small")
    return sorted(names & DOWNLOADS.keys())


def recorded_data(paper, scale):
    found, _ = records.read(ROOT / "results" / scale / f"{paper}.jsonl")
    return {name for record in found for name in record.get("data", {})}


def scales_of(paper):
    """{scale: settings, rows and seeds} as the paper's YAML declares them; {} where it is not of
    the right shape, which its script says without stopping others."""
    try:
        return records.read_declared(ROOT / "papers" / f"{paper}.yaml")["scales"]
    except InputError:
        return {}


def having(papers, scale):
    """Those of the papers whose YAML declares the scale, or nothing that can be read."""
    return [paper for paper in papers if scale in (scales_of(paper) or [scale])]


def turns(papers, scale, given=None):
    """["paper seed", ...] in the order of work: the first seed of every paper, then the second;
    given: a text such as 0,1,2, or the seeds that the papers declare."""
    known = {name for paper in papers for name in scales_of(paper)}
    if known and scale not in known:
        raise InputError(f"unknown scale '{scale}'; known: {', '.join(sorted(known))}")
    seeds = {paper: read_seeds(given, scales_of(paper).get(scale, {}).get("seeds", [0]))
             for paper in papers}
    return [f"{paper} {seeds[paper][number]}" for number in range(max(map(len, seeds.values())))
            for paper in papers if number < len(seeds[paper])]


def choose_scale(papers, data="", device="auto", dataset=""):
    """(scale, reason): `full` where a CUDA GPU is visible and the data are there, else `demo`."""
    import torch
    from replicate import data as image_data
    root = image_data.data_root(data)
    there = having(papers, "demo")
    lacking = [paper for paper in papers if paper not in there]
    if dataset == "embedded":
        why = "drawn images were asked for"
    elif device == "cpu" or not torch.cuda.is_available():
        why = "no CUDA GPU in use"
    else:
        wanted = [dataset] if dataset else needed(papers, "full")
        missing = sorted(set(wanted) - set(image_data.on_disk(root)) if not dataset else ())
        if not missing:
            return "full", f"a CUDA GPU is visible, and the data are there: {', '.join(wanted)}"
        why = f"a CUDA GPU is visible, but {', '.join(missing)} not in {root}"
    if len(lacking) == len(papers):
        return "smoke", f"{why}, and there is no scale demo; its numbers mean nothing"
    without = f" (not {', '.join(lacking)}, which has no such scale)" * bool(lacking)
    return "demo", f"{why}, so images drawn by the code: no download, minutes a paper{without}"


# The end
def time_of_reference(run, rows, papers):
    """", 2.5 min for the reference" of a run's rows; "" where results/ has not all of them."""
    folder = report.reference_of(run.suite, papers)
    if not folder or not (folder / f"{run.paper}.jsonl").exists():
        return ""
    view, _ = report.look(folder, run.paper, papers)
    seconds = view.hours(per_seed=True, rows=rows) * 3600
    known = all(view.rows[row]["values"] for row in rows)
    return f", {report.show_time(seconds)} for the reference" if known and seconds else ""


def read_notes(path):
    """The ledger's lines, the last one of each paper."""
    notes = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        note = json.loads(line)
        notes[note["paper"]] = note
    return list(notes.values())


def row_line(view, row):
    """A headline row: its value, the paper's, the reference's, and how the two lie."""
    text = f"  {row:<30} {view.value(row):>18}   paper {view.published(row)}"
    if view.reference and view.reference.rows[row]["values"]:
        state = report.compare(view.rows[row], view.reference.rows[row])
        state = {"equal": ", yours equal to it, seed by seed",
                 "inside": ", yours inside its spread", "outside": ", yours OUTSIDE its spread",
                 "": ""}.get(state, f", not compared: {state}")
        text += f"   reference {view.reference.value(row)}{state}"
    return text


def paper_lines(view):
    """The summary of one paper."""
    lines = [report.short_name(view)]
    lines += [row_line(view, row) for row in view.headline]
    words = [f"{number} {verdict}" for number, verdict in zip(view.verdicts(), report.VERDICTS)]
    text = f"  the paper's claims: {', '.join(words)}"
    if view.reference:
        text += f"   (reference: {report.verdict_text(view.reference)})"
    seeds = max((claim["n"] for claim in view.claims), default=3)
    return [*lines, text + f"; no verdict yet, {seeds} of 3 seeds are in" * (seeds < 3),
            f"  {name_from_here(view.folder / f'{view.stem}.md')}"]


def name_from_here(path):
    path, here = Path(path).resolve(), Path.cwd().resolve()
    return path.relative_to(here) if path.is_relative_to(here) else path


def pace(views):
    """How long these runs took in units of the reference's time, on rows that both have; 1 if
    unknown."""
    ratios = []
    for view in views:
        if not view.reference:
            continue
        theirs = {(r["row"], r["seed"]): r.get("seconds") for r in view.reference.pooled}
        ratios += [record["seconds"] / seconds for record in view.pooled
                   if (seconds := theirs.get((record["row"], record["seed"]))) and seconds > 1
                   and record.get("seconds")]
    return statistics.median(ratios) if ratios else 1.0


def next_step(scale, papers, views, data=""):
    """The next larger scale, and what it costs here as far as the reference tells; or None.

    data: the data root that was named, if one was.
    """
    following = NEXT.get(scale)
    while following and not all(following in view.declared["scales"] for view in views):
        following = NEXT.get(following)
    if not following:
        return None
    from replicate import data as image_data
    root, reference = image_data.data_root(data), ROOT / "results" / following
    there = [report.look(reference, paper, ROOT / "papers")[0] for paper in papers
             if (reference / f"{paper}.jsonl").exists()]
    hours = pace(views) * sum(view.hours(per_seed=True) for view in there)
    names = set().union(*(recorded_data(view.stem, following) for view in there))
    sizes = [DOWNLOADS[name] for name in sorted(names & DOWNLOADS.keys())
             if name not in image_data.on_disk(root)]
    parts = [f"about {hours:.1f} hours a seed on this machine"] if hours else []
    size = f"{sum(sizes) / 1000:.1f} GB" if sum(sizes) >= 1000 else f"{sum(sizes)} MB"
    parts += [f"{size} to download"] if sizes else []
    missing = len(papers) - len(there)
    if missing:
        parts.append(f"{report.count(missing, 'paper')} without a reference to tell the time")
    only = ("" if len(papers) > 1 else f" {papers[0]}") + f" --data {data}" * bool(data)
    return f"./run_all.sh {following}{only}" + (f": {', '.join(parts)}" if parts else "")


def summarize(notes):
    """The lines with which run_all.sh ends."""
    views, lines = [], []
    for entry in notes:
        suite = Path(entry["suite"])
        if not (suite / f"{entry['paper']}.jsonl").exists():
            continue
        view, _ = report.look(suite, entry["paper"], ROOT / "papers",
                              report.reference_of(suite, ROOT / "papers"))
        views.append(view)
        lines += ["", *paper_lines(view)]
    if views:
        index = name_from_here(views[0].folder.parent / "README.md")
        lines += ["", f"All pages: {index}"]
        step = next_step(notes[0]["scale"], [entry["paper"] for entry in notes], views,
                         notes[0].get("data", ""))
        lines += [f"Next: {step}"] if step else []
    return lines


def main(arguments=None):
    records.show_all_text()
    parser = argparse.ArgumentParser(prog="python -m replicate.terminal", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    scale, work = commands.add_parser("scale"), commands.add_parser("turns")
    work.add_argument("scale")
    work.add_argument("--seeds")
    for command in (scale, work):
        command.add_argument("papers", nargs="+")
        command.add_argument("--data", default="", type=os.path.expanduser)
        command.add_argument("--device", default="auto", choices=DEVICES)
        command.add_argument("--set", action="append", default=[])
        command.add_argument("--results", default=str(ROOT / "out"), type=os.path.expanduser)
        command.add_argument("--runs", default=str(ROOT / "runs"), type=os.path.expanduser)
        command.add_argument("--plan", action="store_true")
    end = commands.add_parser("end")
    for each in (parser, scale, work, end):
        each.error = lambda message: parser.exit(2, f"error: {message}\n")
    end.add_argument("ledger")
    end.add_argument("--turns", default="", help="paper seed paper seed ...")
    end.add_argument("--plan", action="store_true")
    given, _ = parser.parse_known_args(arguments)
    try:
        if given.command != "end":
            records.require_torch()  # once, before every paper says it
            check_options(given)
        if given.command == "scale":
            sets = [text.partition("=")[2] for text in given.set if text.startswith("dataset=")]
            chosen, reason = choose_scale(given.papers, given.data, given.device, *sets[-1:])
            print(f"scale {chosen}: {reason}", file=sys.stderr, flush=True)
            print(chosen, *having(given.papers, chosen))
        elif given.command == "turns":
            print(*turns(given.papers, given.scale, given.seeds), sep="\n")
        else:
            notes = read_notes(given.ledger)
            lines = sum_up_plan(notes, given.turns.split()[::2]) if given.plan else summarize(notes)
            print(*lines, sep="\n", end="\n" * bool(lines))
    except (InputError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
