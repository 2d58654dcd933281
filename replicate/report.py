"""Run records -> claims -> pages: makes all of results/ but the records, the PNGs and NOTES.md.

    python -m replicate.report [--check] [--results DIR]

A folder other than results/ gets pages on which your values stand beside those of results/.
It needs no torch and imports no paper.  The same records and YAML files give the same bytes.
"""
import argparse
import fnmatch
import itertools
import json
import math
import os
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from replicate import charts, records
from replicate.neutral import read_lines, unmarked
from replicate.records import InputError, write_atomically

INDEX_LINE = "Made from the records; no number is typed by hand."
SCALES = {  # the largest first, as the index lists them
    "paper": "the paper's data and settings, field by field",
    "full": "whole data sets on one GPU: the paper's own protocol where one GPU allows it, else "
            "the one its script declares",
    "small": "real images, small networks and little training, for two CPU cores: compare rows "
             "with one another, not with the paper's values",
    "demo": "images drawn by the code and a few minutes of training: compare rows with one "
            "another, not with the paper's values",
    "smoke": "a test that everything runs; its numbers mean nothing",
}
MARKS = {".md": "typed by hand", ".json": '"claims": ', ".svg": "<svg"}  # of what is made here
VERDICTS = ("reproduced", "contradicted", "open")
NAMES = {  # parts of rows' names that mean the same in all papers; a paper's YAML has its own
    "random": "a network that was never trained",
    "supervised": "the same network, trained on all labels from scratch",
    "linear": "logistic regression on the frozen features",
    "knn*": "the nearest training images vote: 20, or as many as it says",
    "conv[1-9]": "features after that layer",
    "block[1-9]": "features after that block of layers",
    "finetuned": "pre-trained, then trained on with labels",
    "labels*": "with so many labels a class",
    "audit": "shorter trainings, each with one setting changed",
    "as-is": "no setting changed",
}
BLOCK = "<!-- made by ./run_all.sh tables -->", "<!-- end -->"  # around the table in README.md


# Statistics
def student_t_quantile(degrees):
    """The 0.975 quantile of Student's t with `degrees` >= 1 of freedom (Abramowitz and Stegun
    26.7.3 and 26.7.4, bisected)."""
    def central_probability(angle):  # P(|T| < t), angle = atan(t / sqrt(degrees))
        odd = degrees % 2
        term, total = (math.cos(angle) if odd else 1.0), 0.0
        for power in range(1 + odd, degrees, 2):
            total += term
            term *= power / (power + 1) * math.cos(angle) ** 2
        return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if central_probability(middle) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def judge(effects, margin):
    """Verdict on the claim that an effect is above a margin; effects: its value with each seed.

    With the mean and its Student-t 95 % interval.  Reproduced when the lower end passes the margin,
    contradicted when the upper end falls short of it, else, or with fewer than 3 seeds, open.
    """
    n, mean, low, high, verdict = len(effects), None, None, None, "open"
    if n:
        mean = statistics.fmean(effects)
    if n >= 2:
        half = student_t_quantile(n - 1) * statistics.stdev(effects) / math.sqrt(n)
        low, high = mean - half, mean + half
    if n >= 3:
        verdict = "reproduced" if low > margin else "contradicted" if high < margin else "open"
    return {"n": n, "mean": mean, "low": low, "high": high, "verdict": verdict}


def setup(record):
    return {**record.get("config", {}), "seed": None}


def alike(first, second):
    """Whether two records were made with the same settings, seed apart, and the same data."""
    return (setup(first) == setup(second)
            and records.same_data(first.get("data", {}), second.get("data", {})))


def effects_of(claim, rows):
    """A claim's effect with each seed that all its rows have, with the same data and settings."""
    by_seed = [{record["seed"]: record for record in rows[row]["pooled"]}
               for row in claim["weights"]]
    found = []
    for seed in sorted(set.intersection(*map(set, by_seed))):
        several = [records_of_row[seed] for records_of_row in by_seed]
        if all(alike(*pair) for pair in itertools.combinations(several, 2)):
            found.append(sum(weight * record["value"] for weight, record
                             in zip(claim["weights"].values(), several)))
    return found


def compare(ours, reference):
    """How a row's mean lies to the reference's: "equal" where no seed's value differs; "inside" or
    "outside" the interval in which 95 % of means over as many seeds fall (Student t, the
    reference's sd); or why that is not said."""
    if not ours["values"] or not reference["values"]:
        return ""
    if not alike(ours["pooled"][0], reference["pooled"][0]):
        same = setup(ours["pooled"][0]) == setup(reference["pooled"][0])
        return "other data" if same else "other settings"
    if ours["values"].items() <= reference["values"].items():
        return "equal"
    n, own = len(reference["values"]), len(ours["values"])
    if n < 2:
        return ""
    reach = student_t_quantile(n - 1) * reference["sd"] * math.sqrt(1 / n + 1 / own)
    return "inside" if abs(ours["mean"] - reference["mean"]) <= reach + 1e-9 else "outside"


def count(number, noun):
    return f"{number} {noun}" + ("" if number == 1 else "s")


def show_time(seconds):
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"


def summarize_row(found, is_stale):
    """One row's records, in the order written -> values per seed, mean, sd, notes, ...

    Records are pooled over seeds; of several with one seed the last counts.  Where configurations
    or data differ, seed apart, only records that share the most recent one's are pooled.
    """
    finished = [record for record in found if record["status"] == "ok"]
    settings = [record for record in finished if setup(record) == setup(finished[-1])]
    same = [record for record in settings if alike(record, finished[-1])]
    by_seed = {record["seed"]: record for record in same}
    pooled = [by_seed[seed] for seed in sorted(by_seed)]
    last = {r["seed"]: r for r in found if not finished or setup(r) == setup(finished[-1])}
    failed = {seed: str(record.get("error", "no reason given")).strip().split("\n")[0][:100]
              for seed, record in sorted(last.items()) if record["status"] == "failed"}
    notes = []
    if len(same) > len(pooled):
        notes.append(count(len(same) - len(pooled), "re-run"))
    if failed:
        notes.append(f"{len(failed)} failed ({'; '.join(sorted(set(failed.values())))})")
    if len(settings) > len(same):
        notes.append(f"{count(len(settings) - len(same), 'record')} of other data left out")
    if len(finished) > len(settings):
        others = count(len(finished) - len(settings), "record")
        notes.append(f"configs differ: {others} of another config left out")
    if any(record.get("dirty") for record in pooled):
        notes.append("uncommitted code")
    if any(record.get("deterministic") is False for record in pooled):
        notes.append("not deterministic")
    values = {record["seed"]: record["value"] for record in pooled}
    return {"pooled": pooled, "values": values, "failed": failed, "notes": notes,
            "stale": any(is_stale(record) for record in pooled),
            "mean": statistics.fmean(values.values()) if values else None,
            "sd": statistics.stdev(values.values()) if len(values) > 1 else None}


def seconds_of(pooled):
    """Seconds that a seed's records took; a training that several rows rest on counts once.

    Records from before their trainings were noted are taken by the first part of their rows' names:
    the least seconds are the training's that they share, and equal ones a measure in common.
    """
    trainings, own, older = {}, set(), {}
    for record in pooled:
        seconds = record.get("seconds") or 0.0
        if "trainings" in record:
            trainings.update(record["trainings"])
            left = seconds - sum(record["trainings"].values())
            own.add((round(left, 1), *sorted(record["trainings"])))
        else:
            older.setdefault(record["row"].split("/")[0], set()).add(seconds)
    return (sum(trainings.values()) + sum(max(0.0, seconds) for seconds, *_ in own)
            + sum(min(several) + sum(each - min(several) for each in several)
                  for several in older.values()))


# What one suite has of one paper
@dataclass
class View:
    """Records and verdicts of a paper in a suite; reference: the View of results/, or None."""
    folder: Path
    stem: str
    declared: dict
    rows: dict = field(default_factory=dict)     # {row: what summarize_row makes}
    shown: list = field(default_factory=list)    # rows that the scale has, or that are recorded
    claims: list = field(default_factory=list)   # judged, as dicts
    waiting: list = field(default_factory=list)  # claims that are not for this scale
    reference: "View | None" = None

    @property
    def suite(self):
        return self.folder.name

    @property
    def scale(self):
        return self.suite.split("-")[0]

    @property
    def title(self):
        return self.declared["title"]

    @property
    def pooled(self):
        return [record for ours in self.rows.values() for record in ours["pooled"]]

    @property
    def headline(self):
        """The rows that sum the paper up: the YAML's, else the first four."""
        there = [row for row in self.declared["headline"] if row in self.shown]
        return there or [row for row in self.shown if self.rows[row]["values"]][:4]

    def hours(self, per_seed=False, rows=None):
        """Hours that the records, or those of some rows, took: in all, or a seed on the mean."""
        there = [each for each in self.pooled if not rows or each["row"] in rows]
        seeds = {record["seed"] for record in there}
        total = sum(seconds_of([each for each in there if each["seed"] == seed])
                    for seed in seeds) / 3600
        return total / max(1, len(seeds)) if per_seed else total

    def verdicts(self, ours=False):
        """How many claims, the paper's or ours, are reproduced, contradicted and open."""
        found = [claim["verdict"] for claim in self.claims if claim["ours"] == ours]
        return [found.count(verdict) for verdict in VERDICTS]

    def value(self, row):
        """A row's mean with its spread and number of seeds, or what became of it."""
        ours = self.rows[row]
        if not ours["values"]:
            return "failed" if ours["failed"] else "not run"
        spread = "" if ours["sd"] is None else f" ± {ours['sd']:.2f}"
        return f"{ours['mean']:z.2f}{'†' * ours['stale']}{spread} ({len(ours['values'])})"

    def published(self, row):
        """The paper's value, with a question mark where it is not confirmed; or a dash."""
        entry = self.declared["rows"][row]
        return f"{entry.get('paper', '–')}{'?' * bool(entry.get('unconfirmed'))}"


def look(folder, stem, papers, reference=None):
    """(View of a suite's paper, warnings); reference: the suite's folder in results/, or None."""
    script = papers / f"{stem}.py"
    found, warnings = records.read(folder / f"{stem}.jsonl")
    declared = records.read_declared(script)
    view, published = View(folder, stem, declared), declared["rows"]
    unknown = sorted({record["row"] for record in found} - published.keys())
    foreign = [record for record in found if record.get("scale", view.scale) != view.scale]
    if foreign:
        found = [record for record in found if record not in foreign]
        warnings.append(f"{folder.name}/{stem}.jsonl: left out are {count(len(foreign), 'record')} "
                        f"of scale {distinct(record['scale'] for record in foreign)}")
    if published and unknown:
        warnings.append(f"{folder.name}/{stem}.jsonl: left out are records of rows that "
                        f"{stem}.yaml does not have: {', '.join(unknown)}")
    today = records.code_hash(script)
    changes = read_lines(stem, papers.parent / "results" / "neutral.jsonl")
    view.rows = {row: summarize_row([record for record in found if record["row"] == row],
                                    lambda record: not unmarked(record, today, changes))
                 for row in published}
    block = declared["scales"].get(view.scale, {})
    here = records.matching(published, block.get("rows", ["*"]))
    view.shown = [row for row, entry in published.items()
                  if row in here and entry.get("where")  # one for users' own files, once it is run
                  or view.rows[row]["values"] or view.rows[row]["failed"]]
    for name, claim in declared["claims"].items():
        rows = [view.rows[row] for row in claim["weights"]]
        missing = not all(row in here or view.rows[row]["values"] for row in claim["weights"])
        judged = {"id": name, "statement": claim["text"], "where": claim["where"],
                  "test": claim["test"], "margin": claim["margin"], "ours": claim["ours"],
                  "stale": any(row["stale"] for row in rows)}
        if missing or claim["scales"] and view.scale not in claim["scales"]:
            view.waiting.append(judged)
        else:
            view.claims.append({**judged, **judge(effects_of(claim, view.rows), claim["margin"])})
    if reference and (reference / f"{stem}.jsonl").exists():
        view.reference, _ = look(reference, stem, papers)
    return view, warnings


def reference_of(folder, papers):
    """The same suite in results/, unless that is the suite itself."""
    reference = papers.parent / "results" / folder.name
    return None if reference.resolve() == folder.resolve() else reference


# Pages
def make_table(header, rows):
    """Lines of a Markdown table."""
    def line(cells):
        texts = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
        return "| " + " | ".join(texts) + " |"
    return [line(header), line(["---"] * len(header)), *map(line, rows)]


def distinct(values, separator=", "):
    return separator.join(sorted({str(value) for value in values if value})) or "not recorded"


def hardware_of(pooled):
    return distinct((str(record.get("device"))
                     + (f", {count(record['threads'], 'thread')}" if record.get("threads") else "")
                     + (f", {record['ranks']} ranks" if record.get("ranks", 1) != 1 else "")
                     for record in pooled), "; ")


def show_interval(claim):
    if not claim["n"]:
        return "–"
    interval = "" if claim["low"] is None else f" [{claim['low']:+z.2f}, {claim['high']:+z.2f}]"
    return f"{claim['mean']:+z.2f}{interval} ({claim['n']})"


def sentence_on_claims(view):
    """What became of a paper's claims, and of ours, in one line."""
    counts = view.verdicts()
    text = (f"Of the paper's {count(sum(counts), 'claim')} judged here: **{counts[0]} reproduced, "
            f"{counts[1]} contradicted, {counts[2]} open**")
    if sum(ours := view.verdicts(ours=True)):
        text += f"; of {sum(ours)} of ours {ours[0]}, {ours[1]}, {ours[2]}"
    waiting = len(view.waiting)
    if waiting:
        text += f"; {waiting} more {'needs another scale' if waiting == 1 else 'need other scales'}"
        if (view.folder.parent / "NOTES.md").exists():
            text += " ([why](../NOTES.md))"
    return text + "."


def render_claims(view):
    lines, reference = ["## Claims", "", sentence_on_claims(view)], {}
    if view.reference:
        reference = {claim["id"]: claim["verdict"] for claim in view.reference.claims}
    header = ["claim", "verdict", *["reference"] * bool(view.reference),
              "effect [95 % interval] (n)", "where"]  # the last columns are off a phone's screen
    for ours, above in ((False, []), (True, ["", "Ours, which the paper does not make:"])):
        table = [[claim["statement"], claim["verdict"] + " †" * claim["stale"],
                  *([reference.get(claim["id"], "–")] if view.reference else []),
                  show_interval(claim), claim["where"]]
                 for claim in view.claims if claim["ours"] == ours]
        if table:
            lines += [*above, "", *make_table(header, table)]
    lines += ["", "Effect: the claimed difference, paired by seed, its mean over n seeds and "
              "Student-t interval. Reproduced: the whole interval is on the claimed side; "
              "contradicted: none of it; else, or with fewer than 3 seeds, open."]
    return lines


def render_figures(view, curves, pictures):
    """Pictures with a caption, curves, then other pictures; curves: {file: (title, caption)}."""
    captions = {f"{view.stem}_{suffix}.png": (suffix.replace("_", " "), caption)
                for suffix, caption in view.declared["figures"].items()}
    figures = {name: captions[name] for name in captions if name in pictures} | curves
    for name in pictures:
        suffix = name.removeprefix(f"{view.stem}_").removesuffix(".png")
        figures.setdefault(name, (suffix.replace("_", " "), ""))
    lines = []
    for name, (title, caption) in figures.items():
        text = " ".join(caption.split())
        lines += ["", f"![{title}]({name})", *(["", f"*{text}*"] if text else [])]
    return ["", "## Figures", *lines] if lines else []


def row_remarks(view, row):
    """A row's unit unless it is an accuracy, where the paper has it, and notes of its records."""
    metrics = {record.get("metric", "accuracy") for record in view.rows[row]["pooled"]}
    metrics = metrics or {view.declared["rows"][row].get("unit", "accuracy")}
    where = view.declared["rows"][row].get("where")
    return "; ".join(sorted(metrics - {"accuracy"}) + [where] * bool(where)
                     + view.rows[row]["notes"])


def render_numbers(view):
    """The table of rows: the paper's value, the reference's, and this suite's."""
    comparable = view.suite in view.declared["comparable"]
    header = ["row", "paper", *(["reference", "yours", "in its spread?"] if view.reference
                                else ["mean ± sd (n)"]),
              *["difference"] * comparable, "remarks"]
    table, words = [], {"equal": "equal", "inside": "yes", "outside": "no"}
    for row in view.shown:
        entry, ours = view.declared["rows"][row], view.rows[row]
        cells = [row, view.published(row)]
        if view.reference:
            state = compare(ours, view.reference.rows[row])
            cells += [view.reference.value(row), view.value(row), words.get(state, state)]
        else:
            cells.append(view.value(row))
        if comparable:
            apart = "paper" in entry and ours["values"]
            cells.append(f"{ours['mean'] - entry['paper']:+z.2f}" if apart else "")
        table.append([*cells, row_remarks(view, row)])
    lines = ["", "## Numbers", "", "Accuracy in percent on test images after the last step, unless "
             "a remark names another measure.", "", *make_table(header, table)]
    remarks = ["sd: sample standard deviation over n seeds"]
    if any("?" in view.published(row) for row in view.shown):
        remarks.insert(0, "? the paper's value is not checked against the paper")
    if any(view.rows[row]["stale"] for row in view.shown):
        remarks.insert(0, "† the code has changed since in a way that may change this number")
    if view.reference:
        remarks.append("in its spread: within the interval that holds 95 % of such means, by the "
                       "reference's sd and both n; equal: each seed's value is the reference's, to "
                       "the last digit")
    lines += ["", "; ".join(remarks) + "."]
    named = names_in(view.shown, view.declared)
    return lines + ["", "Names in the rows:", ""] * bool(named) + [
        f"- {', '.join(parts)}: {' '.join(text.split())}" for parts, text in named]


def names_in(rows, declared):
    """[([part, ...], what they mean)] of the parts of rows' names, in the order in which they come.

    A glob stands for several parts.  The first that fits counts, of the paper's `names` and then
    of NAMES.
    """
    known, found = [*declared["names"].items(), *NAMES.items()], {}
    for part in dict.fromkeys(part for row in rows for part in row.split("/")):
        name = next((name for name in known if fnmatch.fnmatchcase(part, name[0])), None)
        if name:
            found.setdefault(name, []).append(part)
    return [(parts, meaning) for (_, meaning), parts in found.items()]


def render_seeds(view):
    def cell(ours, seed):
        if seed in ours["values"]:
            return f"{ours['values'][seed]:z.2f}"
        return "failed" if seed in ours["failed"] else "–"
    rows = {row: view.rows[row] for row in view.shown
            if view.rows[row]["values"] or view.rows[row]["failed"]}
    seeds = sorted({seed for ours in rows.values() for seed in (*ours["values"], *ours["failed"])})
    table = [[row, *(cell(ours, seed) for seed in seeds)] for row, ours in rows.items()]
    header = ["row", *(f"seed {seed}" for seed in seeds)]
    return ["", "## Every seed", "", *make_table(header, table)] if seeds else []


def render_making(view):
    """How the numbers were made, and the command that makes them."""
    pooled, stem = view.pooled, view.stem
    command = f"./run_all.sh {view.scale} {stem}"
    lines = ["", "## How it was made", ""]
    if pooled:
        datasets = distinct(record.get("config", {}).get("dataset") for record in pooled)
        if view.suite.endswith("-custom"):
            command += " --set ..."
        elif view.suite != view.scale:
            command += f" --set 'dataset={datasets}'"
        data = (f"{name} `{str(digest)[:12]}`" for record in pooled
                for name, digest in record.get("data", {}).items())
        seeds = sorted({record["seed"] for record in pooled})
        lines += [f"- {count(len(seeds), 'seed')} ({', '.join(map(str, seeds))}), always the "
                  f"{distinct(record.get('selection') for record in pooled)} iterate; about "
                  f"{show_time(3600 * view.hours())} in all",
                  f"- Hardware: {hardware_of(pooled)}",
                  f"- Software: torch {distinct(record.get('torch') for record in pooled)}, "
                  f"torchvision {distinct(record.get('torchvision') for record in pooled)}",
                  f"- Data (SHA-256): {distinct(data)}"]
    lines += [f"- Again: `{command}`; one row alone: `--rows 'ROW'`",
              f"- Records: [{stem}.jsonl]({stem}.jsonl); no number on this page is typed by hand"]
    if view.claims or view.waiting:
        lines += ["", "The tests behind the claims:", ""]
        lines += make_table(["claim", "test"], [
            [claim["statement"] + remark, f"`{claim['test']}`"]
            for several, remark in ((view.claims, ""), (view.waiting, " (another scale)"))
            for claim in several])
    return lines


def render_page(view, curves, pictures):
    """The Markdown page of one paper in one suite."""
    meaning = SCALES.get(view.scale, "a scale of its own")
    meaning += ", on the image sets drawn by the code" * view.suite.endswith("-embedded")
    lines = [f"# {view.title}", "", f"Scale `{view.suite}`: {meaning}. [All results](../README.md)",
             ""]
    if view.claims or view.waiting:
        lines += render_claims(view)
    lines += render_figures(view, curves, pictures)
    lines += render_numbers(view) + render_seeds(view) + render_making(view)
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


# The index
def short_name(view):
    """The YAML's name, else the title up to its first colon."""
    return view.declared.get("name") or view.title.split(":")[0].strip()


def headline_text(view):
    """The rows that sum a paper up, in one table cell."""
    parts = []
    for row in view.headline:
        ours = view.rows[row]
        if ours["values"]:
            spread = "" if ours["sd"] is None else f" ± {ours['sd']:.1f}"
            unit = view.declared["rows"][row].get("unit")
            parts.append(f"{row} {ours['mean']:z.1f}{spread}{'†' * ours['stale']}"
                         + f" ({unit})" * bool(unit))
    return "; ".join(parts) or "–"


def verdict_text(view, ours=False):
    return " / ".join(map(str, view.verdicts(ours)))


def sentence_on_suite(name, views):
    """What became of the papers' claims in a suite, as an item of a list."""
    found = [sum(counts) for counts in zip(*(view.verdicts() for view in views))]
    hours = sum(view.hours() for view in views)
    return (f"- `{name}`, {count(len(views), 'paper')}: of their {count(sum(found), 'claim')} "
            f"judged there **{found[0]} reproduced, {found[1]} contradicted, {found[2]} open**, "
            f"after {show_time(3600 * hours)} in all")


def render_index(results, suites):
    """What was found, suite by suite; suites: {name: [View, ...]}."""
    order = list(SCALES)
    def place(name):
        scale = name.split("-")[0]
        return order.index(scale) if scale in order else len(order), name
    suites = {name: suites[name] for name in sorted(suites, key=place)}
    lines = ["# Results", "", *(sentence_on_suite(*item) for item in suites.items()), "",
             INDEX_LINE + " Remarks: [NOTES.md](NOTES.md)." * (results / "NOTES.md").exists(),
             "", "Claims below: reproduced / contradicted / open, the paper's and those of ours."]
    for name, views in suites.items():
        scale = SCALES.get(name.split("-")[0], "a scale of its own")
        drawn = ", on the image sets drawn by the code" * name.endswith("-embedded")
        lines += ["", f"## {name}", "", f"{scale[0].upper()}{scale[1:]}{drawn}.", ""]
        table = [[f"[{short_name(view)}]({name}/{view.stem}.md)", verdict_text(view),
                  verdict_text(view, True) if any(view.verdicts(True)) else "–",
                  headline_text(view), show_time(3600 * view.hours())] for view in views]
        lines += make_table(["paper", "its claims", "ours", "mean ± sd, accuracy in percent "
                             "unless named otherwise", "time"], table)
        pooled = [record for view in views for record in view.pooled]
        seeds = sorted({record["seed"] for record in pooled})
        lines += ["", f"Seeds {', '.join(map(str, seeds)) or 'none'}; {hardware_of(pooled)}; torch "
                  f"{distinct(record.get('torch') for record in pooled)}."]
    if not suites:
        lines += ["", "No runs yet."]
    return "\n".join(lines) + "\n"


def render_block(suites):
    """The table in README.md: of every paper its largest suite."""
    table = {}
    for scale in list(SCALES)[::-1]:
        for view in suites.get(scale, []):
            if any(view.rows[row]["values"] for row in view.headline):
                table[view.stem] = [f"[{short_name(view)}](papers/{view.stem}.py)",
                                    f"[{scale}](results/{scale}/{view.stem}.md)",
                                    verdict_text(view), headline_text(view)]
    lines = make_table(["paper", "scale", "claims", "mean ± sd over seeds"],
                       [table[stem] for stem in sorted(table)])
    return "\n".join([BLOCK[0], "", *lines, "", BLOCK[1]])


def round_numbers(value):
    """Floats to 4 digits, throughout dicts and lists."""
    return json.loads(json.dumps(value), parse_float=lambda digits: round(float(digits), 4) + 0.0)


def summary_of(view):
    """What summary.json says of a paper, for programs."""
    return round_numbers({"claims": view.claims, "rows": {
        row: {"paper": entry.get("paper"), "where": entry.get("where", ""),
              "confirmed": not entry.get("unconfirmed", False), "n": len(view.rows[row]["values"]),
              **{key: view.rows[row][key] for key in ("mean", "sd", "stale", "values")}}
        for row, entry in view.declared["rows"].items()}})


def is_published(suite):
    """Whether a suite belongs into the index and under the check: trials and experiments do not."""
    return not suite.startswith("smoke") and not suite.endswith("-custom")


def warn(lines):
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def render_suite(folder, papers):
    """({path: content}, [View, ...]) of one suite folder."""
    files, views = {}, []
    stems = sorted(path.stem for path in folder.glob("*.jsonl"))
    for stem in stems:
        if not (papers / f"{stem}.py").exists():
            warn([f"{folder.name}/{stem}.jsonl: there is no script {stem}.py, skipped"])
            continue
        view, warnings = look(folder, stem, papers, reference_of(folder, papers))
        warn(warnings)
        views.append(view)
        curves, published = {}, view.declared["rows"]
        for name, curve in view.declared["curves"].items():
            if charts.lines_of(curve, view.rows, published):
                curves[f"{stem}_{name}.svg"] = curve["title"], curve.get("caption", "")
                files[folder / f"{stem}_{name}.svg"] = charts.draw(curve, view.rows, published)
        longer = tuple(f"{other}_" for other in stems if other.startswith(f"{stem}_"))
        pictures = [path.name for path in sorted(folder.glob(f"{stem}_*.png"))]
        files[folder / f"{stem}.md"] = render_page(
            view, curves, [name for name in pictures if not name.startswith(longer)])
    if views:
        text = json.dumps({view.stem: summary_of(view) for view in views}, sort_keys=True, indent=1,
                          allow_nan=False)
        files[folder / "summary.json"] = text + "\n"
    return files, views


def render(results, papers):
    """{path: content} of every file that follows from the records in `results` and from `papers`.

    README.md beside papers/ is among them where `results` is the reference and it has the marks.
    Warnings go to stderr.  Raises OSError for what cannot be read, InputError for a damaged YAML.
    """
    files, suites = {}, {}
    for folder in sorted({path.parent for path in results.glob("*/*.jsonl")}):
        if folder.name == "bench":  # the benchmark's own records
            continue
        suite_files, views = render_suite(folder, papers)
        files.update(suite_files)
        if views and is_published(folder.name):
            suites[folder.name] = views
    reference = papers.parent / "results"
    files[results / "README.md"] = render_index(results, suites)
    readme = papers.parent / "README.md"
    if results.resolve() == reference.resolve() and readme.exists():
        before, mark, rest = readme.read_text(encoding="utf-8").partition(BLOCK[0])
        _, end, after = rest.partition(BLOCK[1])
        if mark and end:
            files[readme] = before + render_block(suites) + after
    # A path in a record may hold bytes that are no text: they are written as escapes
    return {path: text.encode(errors="backslashreplace").decode() for path, text in files.items()}


def write_tables(results, papers):
    """Bring the rendered files up to date, each whole or not at all; a line for each that changes.

    Raises what `render` raises, and InputError where a file of that name is another's.
    """
    files, lines = render(results, papers), []
    there = {path: path.read_bytes() for path in files if path.exists()}
    for path, content in there.items():
        own = path.is_relative_to(results) and content
        if own and MARKS[path.suffix].encode() not in content:
            raise InputError(f"{path} was not made by this program: name another folder with "
                             "--results DIR")
    for path, content in files.items():
        if there.get(path) != content.encode():
            write_atomically(path, content.encode())
            lines.append(f"wrote {name_of(path, results)}")
    return lines


def name_of(path, results):
    return path.relative_to(results.parent) if path.is_relative_to(results.parent) else path


def check_tables(results, papers):
    """Where the published files in `results` do not follow from its records, one line each."""
    files, differences = render(results, papers), []
    extra = [path for path in sorted(results.glob("*/*")) if path not in files
             and (path.suffix in (".md", ".svg") or path.name == "summary.json")]
    for path in [*files, *extra]:
        if path.parent.parent == results and not is_published(path.parent.name):
            continue
        name = name_of(path, results)
        if path not in files:
            differences.append(f"{name}: follows from no record; delete it")
        elif not path.exists():
            differences.append(f"{name}: missing")
        elif path.read_bytes() != files[path].encode():
            there, wanted = path.read_text(errors="replace").split("\n"), files[path].split("\n")
            place = next((f"line {number}" for number, pair in enumerate(zip(there, wanted), 1)
                          if pair[0] != pair[1]), "its end")
            differences.append(f"{name}: {place} does not follow from the records")
    return differences


def main(arguments=None):
    records.show_all_text()
    parser = argparse.ArgumentParser(prog="python -m replicate.report",
                                     description="Render the pages of a folder of run records.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("--check", action="store_true",
                        help="write nothing; exit 1 if a file does not follow from the records")
    parser.add_argument("--results", type=records.folder, metavar="DIR",
                        help="default: results/, and out/ where there is one and no --check")
    options = parser.parse_args(arguments)
    folders, out = [options.results or records.ROOT / "results"], records.ROOT / "out"
    if not options.results and not options.check and out.is_dir():
        folders.append(out)
    if not folders[0].is_dir():
        parser.error(f"no results folder {folders[0]}; run something first or name one with "
                     "--results DIR")
    work, lines = check_tables if options.check else write_tables, []
    try:
        for folder in folders:
            lines += work(folder.resolve(), records.ROOT / "papers")
    except (OSError, InputError) as problem:
        parser.error(" ".join(str(problem).split()))
    print(*lines, sep="\n", end="\n" * bool(lines))
    if options.check and lines:
        print("the tables do not follow from the records: run ./run_all.sh tables and commit")
    return 1 if options.check and lines else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
