"""Run records -> claims -> tables: makes all of results/ but the records, the PNGs and NOTES.md.

    python -m replicate.report [--check] [--results DIR]

It needs no torch and imports no paper.  The same records and YAML files give the same bytes.
"""
import argparse
import glob
import json
import math
import shlex
import statistics
import sys
from pathlib import Path

from replicate import charts, records
from replicate.neutral import read_lines, unmarked
from replicate.records import InputError, write_atomically

INDEX_TITLE = "# Results"
SCALES = {
    "smoke": "a test that everything runs; its numbers mean nothing",
    "small": "a reduced protocol for two CPU cores: claims get verdicts, absolute values are not "
             "comparable with the paper",
    "full": "whole data sets on one GPU: the paper's own protocol where one GPU allows it, else "
            "the one its script declares",
    "paper": "the paper's data and settings, field by field",
}


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


def judge_claim(first, sign, second, margin):
    """Verdict on `first > second + margin` or `first < second - margin`; both: {seed: value}.

    Over the seeds both have: the mean of the paired differences, counted in the claimed direction,
    and its Student-t 95 % interval.  Reproduced when its lower end passes the margin, contradicted
    when its upper end falls short of it, else, or with fewer than 3 seeds, open.
    """
    direction, shared = 1 if sign == ">" else -1, sorted(first.keys() & second.keys())
    differences = [direction * (first[seed] - second[seed]) for seed in shared]
    n, mean, low, high, verdict = len(differences), None, None, None, "open"
    if n:
        mean = statistics.fmean(differences)
    if n >= 2:
        half = student_t_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n)
        low, high = mean - half, mean + half
    if n >= 3:
        verdict = "reproduced" if low > margin else "contradicted" if high < margin else "open"
    return {"n": n, "mean": mean, "low": low, "high": high, "verdict": verdict}


def count(number, noun):
    return f"{number} {noun}" + ("" if number == 1 else "s")


def summarize_row(found, is_stale):
    """One row's records, in the order written -> values per seed, mean, sd, seconds, notes, ...

    Records are pooled over seeds; of several with one seed the last counts.  Where configurations
    or data differ, seed apart, only records that share the most recent one's are pooled.
    """
    def setup(record):
        return {**record.get("config", {}), "seed": None}
    finished = [record for record in found if record["status"] == "ok"]
    alike = [record for record in finished if setup(record) == setup(finished[-1])]
    same = [record for record in alike
            if records.same_data(record.get("data", {}), finished[-1].get("data", {}))]
    by_seed = {record["seed"]: record for record in same}
    pooled = [by_seed[seed] for seed in sorted(by_seed)]
    last = {r["seed"]: r for r in found if not finished or setup(r) == setup(finished[-1])}
    failed = {seed: str(record.get("error", "no reason given")).strip().split("\n")[0][:100]
              for seed, record in sorted(last.items()) if record["status"] == "failed"}
    stale = any(is_stale(record) for record in pooled)
    notes = ["changed since"] if stale else []
    if len(same) > len(pooled):
        notes.append(count(len(same) - len(pooled), "re-run"))
    if failed:
        notes.append(f"{len(failed)} failed ({'; '.join(sorted(set(failed.values())))})")
    if len(alike) > len(same):
        notes.append(f"{count(len(alike) - len(same), 'record')} of other data left out")
    if len(finished) > len(alike):
        others = count(len(finished) - len(alike), "record")
        notes.append(f"configs differ: {others} of another config left out")
    if any(record.get("dirty") for record in pooled):
        notes.append("uncommitted code")
    if any(record.get("deterministic") is False for record in pooled):
        notes.append("not deterministic")
    values = {record["seed"]: record["value"] for record in pooled}
    seconds = [r["seconds"] for r in pooled if isinstance(r.get("seconds"), (int, float))]
    return {"pooled": pooled, "values": values, "failed": failed, "stale": stale, "notes": notes,
            "mean": statistics.fmean(values.values()) if values else None,
            "sd": statistics.stdev(values.values()) if len(values) > 1 else None,
            "seconds": statistics.fmean(seconds) if seconds else None}


# Pages
def make_table(header, rows):
    """Lines of a Markdown table."""
    def line(cells):
        texts = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
        return "| " + " | ".join(texts) + " |"
    return [line(header), line(["---"] * len(header)), *map(line, rows)]


def distinct(values):
    return ", ".join(sorted({str(value) for value in values if value})) or "not recorded"


def show_interval(claim):
    if not claim["n"]:
        return "–"
    interval = "" if claim["low"] is None else f" [{claim['low']:+z.2f}, {claim['high']:+z.2f}]"
    return f"{claim['mean']:+z.2f}{interval} ({claim['n']})"


def table_line(row, entry, ours, suite, declared, command):
    """The cells of a row's line; command: a format with a place for the row."""
    published, where = entry.get("paper"), entry.get("where", "")
    paper = "–" if published is None else f"{published}{'?' if entry.get('unconfirmed') else ''}"
    cell = "failed" if ours["failed"] else "not run"
    if ours["values"]:
        spread = "" if ours["sd"] is None else f" ± {ours['sd']:.2f}"
        cell = f"{ours['mean']:z.2f}{'†' if ours['stale'] else ''}{spread} ({len(ours['values'])})"
    compared = bool(ours["values"]) and published is not None
    metrics = sorted({record.get("metric", "accuracy") for record in ours["pooled"]} - {"accuracy"})
    apart = compared and suite not in declared["comparable"]
    notes = metrics + ["not comparable"] * apart + ours["notes"]
    return [row, paper + (f" ({where})" if where else ""), cell,
            f"{ours['mean'] - published:+z.2f}" if compared else "", "; ".join(notes),
            "" if ours["seconds"] is None else f"{ours['seconds']:.0f}",
            f"`{command.format(glob.escape(row))}`" if ours["values"] or ours["failed"] else ""]


def render_paper(suite, declared, rows, claims, figures, stem):
    """The Markdown page of one paper in one suite."""
    scale, drawn = suite.split("-")[0], suite.endswith("-embedded")
    pooled = [record for ours in rows.values() for record in ours["pooled"]]
    datasets = distinct(record.get("config", {}).get("dataset") for record in pooled)
    command = f"python -m papers.{stem} --scale {scale} --rows '{{}}'"
    if suite != scale:
        command += " --data embedded" if drawn else f" --set {shlex.quote(f'dataset={datasets}')}"
    seeds = sorted({seed for ours in rows.values() for seed in (*ours["values"], *ours["failed"])})
    hardware = (str(record.get("device"))
                + (f", {count(record['threads'], 'thread')}" if record.get("threads") else "")
                + (f", {record['ranks']} ranks" if record.get("ranks", 1) != 1 else "")
                for record in pooled)
    data = (f"{name} `{str(digest)[:12]}`" for record in pooled
            for name, digest in record.get("data", {}).items())
    meaning = SCALES.get(scale, "a scale of its own")
    meaning += ", on the image sets drawn by the code itself" * drawn
    lines = [f"# {declared['title']}", "",
             f"Suite `{suite}`: {meaning}. Made from [{stem}.jsonl]({stem}.jsonl) by "
             "`./run_all.sh tables`; no number is typed by hand.", ""]
    if pooled:
        lines += ["- Values: accuracy in percent unless a note names another measure; "
                  f"{distinct(record.get('selection') for record in pooled)} iterate, "
                  f"seeds {', '.join(map(str, seeds))}",
                  f"- Hardware: {distinct(hardware)}",
                  f"- Software: torch {distinct(record.get('torch') for record in pooled)}; "
                  f"torchvision {distinct(record.get('torchvision') for record in pooled)}",
                  f"- Data (SHA-256): {distinct(data)}", ""]
    table = [table_line(row, entry, rows[row], suite, declared, command)
             for row, entry in declared["rows"].items()  # one for users' own images, once it is run
             if entry.get("where") or rows[row]["values"] or rows[row]["failed"]]
    lines += make_table(["row", "paper", "ours: mean ± sd (n)", "difference", "note", "seconds",
                         "command"], table)
    lines += ["", "? the paper's value is from memory, not confirmed; † the code has changed since "
              "the run; sd: sample standard deviation over n seeds; seconds: mean over the seeds, "
              "shared pre-training included."]
    if claims:
        lines += ["", "## Claims", ""]
        table = [[claim["statement"], claim["where"], f"`{claim['test']}`", show_interval(claim),
                  claim["verdict"] + " †" * claim["stale"]] for claim in claims]
        lines += make_table(["claim", "where", "test", "mean difference [95 % interval] (n)",
                             "verdict"], table)
        lines += ["", "Paired differences over the seeds both rows have, Student-t interval. "
                  "Reproduced: its lower end passes the margin; contradicted: its upper end falls "
                  "short of it; else, or with fewer than 3 seeds, open."]
    if seeds:
        def cell(ours, seed):
            if seed in ours["values"]:
                return f"{ours['values'][seed]:z.2f}"
            return "failed" if seed in ours["failed"] else "–"
        table = [[row, *(cell(ours, seed) for seed in seeds)] for row, ours in rows.items()
                 if ours["values"] or ours["failed"]]
        lines += ["", "## Every seed", ""]
        lines += make_table(["row", *(f"seed {seed}" for seed in seeds)], table)
    if figures:
        lines += ["", "## Figures", ""] + [f"![{name}]({name})" for name in figures]
    return "\n".join(lines) + "\n"


def round_numbers(value):
    """Floats to 4 digits, throughout dicts and lists."""
    return json.loads(json.dumps(value), parse_float=lambda digits: round(float(digits), 4) + 0.0)


def is_published(suite):
    """Whether a suite belongs into the index and under the check: trials and experiments do not."""
    return not suite.startswith("smoke") and not suite.endswith("-custom")


def judge_all(declared, rows):
    claims = []
    for name, claim in declared["claims"].items():
        first, second = rows[claim["first"]], rows[claim["second"]]
        pairs = [(a, b) for a in first["pooled"] for b in second["pooled"] if a["seed"] == b["seed"]
                 and records.same_data(a.get("data", {}), b.get("data", {}))]
        left = {one["seed"]: one["value"] for one, _ in pairs}
        right = {other["seed"]: other["value"] for _, other in pairs}
        verdict = judge_claim(left, claim["sign"], right, claim["margin"])
        claims.append({"id": name, "statement": claim["text"], "where": claim["where"],
                       "test": claim["test"], "margin": claim["margin"],
                       "stale": first["stale"] or second["stale"], **verdict})
    return claims


def render_suite(folder, papers):
    """({path: content}, {paper: summary}) of one suite folder."""
    files, summary = {}, {}
    stems = sorted(path.stem for path in folder.glob("*.jsonl"))
    for stem in stems:
        file, script = folder / f"{stem}.jsonl", papers / f"{stem}.py"
        found, warnings = records.read(file)
        name = f"{folder.name}/{file.name}"
        if not script.exists():
            warnings.append(f"{name}: there is no script {script.name}, skipped")
        declared = records.read_declared(script) if script.exists() else {"rows": {}}
        published = declared["rows"]
        unknown = sorted({record["row"] for record in found} - published.keys())
        warnings += [f"{name}: {stem}.yaml has no row {row!r}, its records are left out"
                     for row in unknown if published]
        print(*warnings, sep="\n", end="\n" * bool(warnings), file=sys.stderr)
        if not script.exists():
            continue
        today = records.code_hash(script)
        changes = read_lines(stem, papers.parent / "results" / "neutral.jsonl")
        rows = {row: summarize_row([record for record in found if record["row"] == row],
                                   lambda record: not unmarked(record, today, changes))
                for row in published}
        claims, figures = judge_all(declared, rows), []
        for name, curve in declared["curves"].items():
            if charts.lines_of(curve, rows, published):
                figures.append(f"{stem}_{name}.svg")
                files[folder / figures[-1]] = charts.draw(curve, rows, published)
        longer = tuple(f"{other}_" for other in stems if other.startswith(f"{stem}_"))
        pictures = [path.name for path in folder.glob(f"{stem}_*.png")]
        figures += [name for name in pictures if not name.startswith(longer)]
        files[folder / f"{stem}.md"] = render_paper(folder.name, declared, rows, claims,
                                                    sorted(figures), stem)
        summary[stem] = round_numbers({"claims": claims, "rows": {
            row: {"paper": entry.get("paper"), "where": entry.get("where", ""),
                  "confirmed": not entry.get("unconfirmed", False), "n": len(rows[row]["values"]),
                  **{key: rows[row][key] for key in ("mean", "sd", "stale", "values")}}
            for row, entry in published.items()}})
    if summary:
        text = json.dumps(summary, sort_keys=True, indent=1, allow_nan=False)
        files[folder / "summary.json"] = text + "\n"
    return files, summary


def render(results, papers):
    """{path: content} of every file that follows from the records in `results` and from `papers`.

    Warnings go to stderr.  Raises OSError for what cannot be read, InputError for a damaged YAML.
    """
    files, index = {}, []
    for folder in sorted({path.parent for path in results.glob("*/*.jsonl")}):
        suite_files, summary = render_suite(folder, papers)
        files.update(suite_files)
        if is_published(folder.name):
            table = []
            for stem, parts in summary.items():
                verdicts = [claim["verdict"] for claim in parts["claims"]]
                measured = sum(row["n"] > 0 for row in parts["rows"].values())
                table.append([f"[{stem}]({folder.name}/{stem}.md)",
                              f"{measured} of {len(parts['rows'])}",
                              *map(verdicts.count, ("reproduced", "contradicted", "open"))])
            index += ["", f"## {folder.name}", ""]
            index += make_table(["paper", "rows measured", "claims reproduced", "contradicted",
                                 "open"], table)
    lines = [INDEX_TITLE, "", "Made from the records by `./run_all.sh tables`; no number is typed "
             "by hand. A suite is a scale, and `-embedded` in its name means the image sets drawn "
             "by the code itself.", ""]
    lines += [f"- `{scale}`: {meaning}" for scale, meaning in SCALES.items()]
    if (results / "NOTES.md").exists():
        lines += ["", "Remarks written by hand: [NOTES.md](NOTES.md)"]
    files[results / "README.md"] = "\n".join(lines + (index or ["", "No runs yet."])) + "\n"
    return files


def write_tables(results, papers):
    """Bring the rendered files up to date, each whole or not at all; a line for each that changes.

    Raises what `render` raises, and InputError where the README.md in `results` is another's.
    """
    files, lines, index = render(results, papers), [], results / "README.md"
    if index.exists() and not index.read_bytes().startswith(INDEX_TITLE.encode()):
        raise InputError(f"{index} was not made by this program: name another folder with "
                         "--results DIR")
    for path, content in files.items():
        if not path.exists() or path.read_bytes() != content.encode():
            write_atomically(path, content.encode())
            lines.append(f"wrote {path.relative_to(results.parent)}")
    return lines


def check_tables(results, papers):
    """Where the published files in `results` do not follow from its records, one line each."""
    files, differences = render(results, papers), []
    extra = [path for path in sorted(results.glob("*/*")) if path not in files
             and (path.suffix in (".md", ".svg") or path.name == "summary.json")]
    for path in [*files, *extra]:
        name = path.relative_to(results)
        if not is_published(name.parts[0]) and len(name.parts) > 1:
            continue
        if path not in files:
            differences.append(f"{results.name}/{name}: follows from no record; delete it")
        elif not path.exists():
            differences.append(f"{results.name}/{name}: missing")
        elif path.read_bytes() != files[path].encode():
            there, wanted = path.read_text(errors="replace").split("\n"), files[path].split("\n")
            place = next((f"line {number}" for number, pair in enumerate(zip(there, wanted), 1)
                          if pair[0] != pair[1]), "its end")
            differences.append(f"{results.name}/{name}: {place} does not follow from the records")
    return differences


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m replicate.report",
                                     description="Render results/ from its run records.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("--check", action="store_true",
                        help="write nothing; exit 1 if a file does not follow from the records")
    parser.add_argument("--results", type=Path, default=records.ROOT / "results", metavar="DIR")
    options = parser.parse_args(arguments)
    results = options.results.resolve()
    if not results.is_dir():
        parser.error(f"no results folder {options.results}; run something first or name one with "
                     "--results DIR")
    try:
        lines = (check_tables if options.check else write_tables)(results, records.ROOT / "papers")
    except (OSError, InputError) as problem:
        parser.error(" ".join(str(problem).split()))
    print(*lines, sep="\n", end="\n" * bool(lines))
    if options.check and lines:
        print("the tables do not follow from the records: run ./run_all.sh tables and commit")
    return 1 if options.check and lines else 0


if __name__ == "__main__":
    sys.exit(main())
