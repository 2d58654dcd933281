"""Run records -> claims -> tables and figures: everything in results/ but the records, the PNGs and NOTES.md is made here.

    python -m replicate.report [--check] [--results DIR]

Standard library only, and the papers' scripts are read with `ast`, never imported, so it starts at once. The same records
and the same scripts give the same bytes.
"""
import argparse
import ast
import glob
import hashlib
import json
import math
import os
import shlex
import statistics
import sys
from html import escape
from pathlib import Path

LITERALS = {"PAPER", "CLAIMS", "CURVES", "COMPARABLE"}
SHARED_FILES = ("trainer.py", "data.py", "evaluate.py", "embedded.py")
INDEX_TITLE = "# Results"
COMPARABLE_SUITES = ("full", "paper")
SCALES = {
    "smoke": "a test that everything runs; its numbers mean nothing",
    "small": "a reduced protocol for two CPU cores: claims get verdicts, absolute values are not comparable with the paper",
    "full": "whole data sets on one GPU: the paper's own protocol where one GPU allows it, else the one its script declares",
    "paper": "the paper's data and settings, field by field",
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, safe for colour-blind readers


def outline(node) -> str:
    """A syntax tree as text. Docstrings are left out, and so are empty fields, in which Python versions differ."""
    if isinstance(node, list):
        return "[" + ",".join(map(outline, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if ast.get_docstring(node, clean=False) is not None:
            fields["body"] = node.body[1:]
    filled = [f"{name}={outline(value)}" for name, value in fields.items() if value is not None and value != []]
    return f"{type(node).__name__}({','.join(filled)})"


def defined_names(node: ast.stmt) -> set[str]:
    """The names that a statement of a module defines: a function's, a class's, a constant's; of any other statement none."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}


def used_names(node: ast.AST) -> set[str]:
    return {part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else part.name
            for part in ast.walk(node) if isinstance(part, (ast.Name, ast.Attribute, ast.alias))}


def code_hashes(script: Path) -> dict[str, str]:
    """File name -> 12 hex digits of the SHA-256 of what its code does: the script, and the shared files beside papers/.

    Of the shared files counts what the script may reach: the definitions it names, those that these name, and so on (by name
    alone, so rather too many). So what is added for another paper marks no number of this one. Comments, formatting,
    docstrings and the LITERALS do not count, nor does report.py, which only renders.
    Raises SyntaxError for a file that does not parse.
    """
    script = script.resolve()
    shared = [script.parent.parent / "replicate" / name for name in SHARED_FILES]
    bodies = {path: [node for node in ast.parse(path.read_bytes(), filename=str(path)).body
                     if not defined_names(node) & LITERALS and not isinstance(node, ast.If)]  # if __name__ == "__main__"
              for path in [script, *filter(Path.exists, shared)]}
    names, reached = set(), list(bodies[script])
    reached += [node for body in bodies.values() for node in body if not defined_names(node)]  # imports
    waiting = [node for path, body in bodies.items() if path != script for node in body if defined_names(node)]
    while reached:
        names.update(*map(used_names, reached))
        reached = [node for node in waiting if defined_names(node) & names]
        waiting = [node for node in waiting if node not in reached]
    return {path.name: hashlib.sha256(outline(ast.Module([node for node in body if node not in waiting], [])).encode(
        "utf-8", "surrogatepass")).hexdigest()[:12] for path, body in bodies.items()}


def read_literals(script: Path) -> dict:
    """PAPER, CLAIMS and CURVES of a script (empty where it has none), COMPARABLE (the suites whose values may be compared with
    the paper's; by default full and paper), "title" (docstring's first line) and "command".

    Raises SyntaxError, or ValueError where one of them is no literal of the right shape or names a row that PAPER lacks.
    """
    tree = ast.parse(script.read_bytes(), filename=str(script))
    found = {"PAPER": {}, "CLAIMS": [], "CURVES": [], "COMPARABLE": COMPARABLE_SUITES, "command": f"python -m papers.{script.stem}",
             "title": (ast.get_docstring(tree) or script.stem).split("\n")[0]}
    try:
        found.update({name: ast.literal_eval(node.value) for node in tree.body for name in defined_names(node) & LITERALS})
        named = {row for _, first, sign, second, margin, _, _ in found["CLAIMS"] for row in (first, second)}
        named |= {row for curve in found["CURVES"] for row in rows_of(curve)}
        signs = {claim[2] for claim in found["CLAIMS"]}
        missing = sorted(named - {row for row, (value, where, confirmed) in found["PAPER"].items()})
    except (ValueError, TypeError, AttributeError) as problem:
        raise ValueError(f"{script.name}: PAPER, CLAIMS or CURVES is not a literal of the right shape ({problem})") from None
    if missing or not signs <= {">", "<"}:
        raise ValueError(f"{script.name}: " + (f"CLAIMS or CURVES names rows that PAPER lacks: {', '.join(missing)}" if missing
                                               else f"a claim must compare with > or <, not with {sorted(signs)}"))
    return found


def rows_of(curve: tuple) -> list[str]:
    """The rows that a CURVES entry draws: of lines [(x, row), ...] and of learning curves (row, scalar)."""
    return [row for line in curve[4].values() for row in ([line[0]] if isinstance(line, tuple) else [row for _, row in line])]


def append_record(path: Path, record: dict) -> None:
    """Add one JSON line in one write, so that processes appending at once lose nothing; on the disk when it returns.

    A line torn by a crash is closed first, in the same write. Raises OSError where the folder cannot be written or the disk
    is full, and ValueError for NaN or infinity; the file then is as it was.
    """
    line = (json.dumps(record, sort_keys=True, allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        written = os.write(descriptor, line)
        if written < len(line):
            end = os.lseek(descriptor, 0, os.SEEK_CUR)
            if os.fstat(descriptor).st_size == end:
                os.ftruncate(descriptor, end - written)
            raise OSError(f"{path}: the disk is full, the record was not written")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_record(record) -> bool:
    """Whether a parsed line has the fields, of the right types, that the tables are made from. May raise OverflowError."""
    return (isinstance(record, dict) and isinstance(record.get("row"), str) and isinstance(record.get("config_hash"), str)
            and type(record.get("seed")) is int and record.get("status") in ("ok", "failed")
            and (record["status"] == "failed"
                 or type(record.get("value")) in (int, float) and math.isfinite(record["value"])
                 and all(isinstance(record.get(name, {}), dict) for name in ("config", "code", "data"))))


def read_records(path: Path) -> tuple[list[dict], list[str]]:
    """(records in the order they were written, one warning for each damaged line). No file: no records."""
    records, warnings = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            valid = is_record(record)
        except (ValueError, OverflowError, RecursionError):
            valid = False
        if valid:
            records.append(record)
        else:
            warnings.append(f"{'/'.join(path.parts[-3:])} line {number}: not a record, skipped")
    return records, warnings


def find_done(records: list[dict], row: str, seed: int, config_hash: str) -> dict | None:
    """The last finished record of this row, seed and configuration, else None."""
    wanted = (row, seed, config_hash, "ok")
    return next((record for record in reversed(records)
                 if (record["row"], record["seed"], record["config_hash"], record["status"]) == wanted), None)


def student_t_quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t with `degrees` >= 1 of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4, bisected)."""
    def central_probability(angle: float) -> float:  # P(|T| < t), angle = atan(t / sqrt(degrees))
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


def judge_claim(first: dict[int, float], sign: str, second: dict[int, float], margin: float) -> dict:
    """Verdict on `first > second + margin` (sign ">") or `first < second - margin` ("<"); both map a seed to a value.

    Over the seeds both have: the mean of the paired differences, counted in the claimed direction, and its Student-t 95 %
    interval. Reproduced when its lower end passes the margin, contradicted when its upper end falls short of it, else open;
    open, too, with fewer than 3 seeds. Returns n, mean, low, high (None where not defined), verdict.
    """
    direction = 1 if sign == ">" else -1
    differences = [direction * (first[seed] - second[seed]) for seed in sorted(first.keys() & second.keys())]
    n, mean, low, high, verdict = len(differences), None, None, None, "open"
    if n:
        mean = statistics.fmean(differences)
    if n >= 2:
        half = student_t_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n)
        low, high = mean - half, mean + half
    if n >= 3:
        verdict = "reproduced" if low > margin else "contradicted" if high < margin else "open"
    return {"n": n, "mean": mean, "low": low, "high": high, "verdict": verdict}


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def summarize_row(records: list[dict], hashes: dict[str, str]) -> dict:
    """One row's records (in the order written) -> values per seed, mean, sd, seconds, changed files, failed seeds and notes.

    Records are pooled over seeds; of several with one seed the last counts. Where configurations differ, seed apart, only
    records that share the most recent one's are pooled. `hashes` are those of the code as it is now.
    """
    finished = [record for record in records if record["status"] == "ok"]
    setup = [{**record.get("config", {}), "seed": None} for record in finished]
    same = [record for record, each in zip(finished, setup) if each == setup[-1]]
    by_seed = {record["seed"]: record for record in same}
    pooled = [by_seed[seed] for seed in sorted(by_seed)]
    current = [record for record in records if not finished or {**record.get("config", {}), "seed": None} == setup[-1]]
    last = {record["seed"]: record for record in current}
    failed = {seed: str(record.get("error", "no reason given")).strip().split("\n")[0][:100]
              for seed, record in sorted(last.items()) if record["status"] == "failed"}
    changed = {name for record in pooled for name, digest in record.get("code", {}).items() if hashes.get(name) != digest
               and (name != "embedded.py" or any(source.startswith("embedded") for source in record.get("data", {})))}
    notes = []
    if changed:
        notes.append("changed since: " + ", ".join(sorted(changed)))
    if len(same) > len(pooled):
        notes.append(count(len(same) - len(pooled), "re-run"))
    if failed:
        notes.append(f"{len(failed)} failed ({'; '.join(sorted(set(failed.values())))})")
    if any(record.get("data") != pooled[0].get("data") for record in pooled):
        notes.append("data differ between seeds")
    if len(finished) > len(same):
        notes.append(f"configs differ: {count(len(finished) - len(same), 'record')} of another config left out")
    if any(record.get("dirty") for record in pooled):
        notes.append("uncommitted code")
    if any(record.get("deterministic") is False for record in pooled):
        notes.append("not deterministic")
    values = {record["seed"]: record["value"] for record in pooled}
    seconds = [record["seconds"] for record in pooled if isinstance(record.get("seconds"), (int, float))]
    return {"pooled": pooled, "values": values, "failed": failed, "changed": changed, "notes": notes,
            "mean": statistics.fmean(values.values()) if values else None,
            "sd": statistics.stdev(values.values()) if len(values) > 1 else None,
            "seconds": statistics.fmean(seconds) if seconds else None}


def make_table(header: list[str], rows: list[list]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    return ["| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(header), *lines[1:]]]


def distinct(values) -> str:
    return ", ".join(sorted({str(value) for value in values if value})) or "not recorded"


def render_paper(suite: str, literals: dict, rows: dict[str, dict], claims: list[dict], figures: list[str], stem: str) -> str:
    """The Markdown page of one paper in one suite."""
    scale, embedded = suite.split("-")[0], suite.endswith("-embedded")
    datasets = distinct(record.get("config", {}).get("dataset") for ours in rows.values() for record in ours["pooled"])
    where_from = " --data embedded" if embedded else f" --set {shlex.quote(f'dataset={datasets}')}" if suite != scale else ""
    table = []
    for row, (published, where, confirmed) in literals["PAPER"].items():
        ours = rows[row]
        if not (where or ours["values"] or ours["failed"]):
            continue  # a row for users' own images, say: of no interest until it is run
        paper = "–" if published is None else f"{published}{'' if confirmed else '?'}"
        cell = "failed" if ours["failed"] else "not run"
        if ours["values"]:
            spread = "" if ours["sd"] is None else f" ± {ours['sd']:.2f}"
            cell = f"{ours['mean']:z.2f}{'†' if ours['changed'] else ''}{spread} ({len(ours['values'])})"
        compared = bool(ours["values"]) and published is not None
        metrics = sorted({record.get("metric", "accuracy") for record in ours["pooled"]} - {"accuracy"})
        notes = metrics + ["not comparable"] * (compared and suite not in literals["COMPARABLE"]) + ours["notes"]
        command = f"{literals['command']} --scale {scale} --rows '{glob.escape(row)}'{where_from}"
        table.append([row, paper + (f" ({where})" if where else ""), cell,
                      f"{ours['mean'] - published:+z.2f}" if compared else "", "; ".join(notes),
                      "" if ours["seconds"] is None else f"{ours['seconds']:.0f}",
                      f"`{command}`" if ours["values"] or ours["failed"] else ""])
    pooled = [record for ours in rows.values() for record in ours["pooled"]]
    seeds = sorted({seed for ours in rows.values() for seed in (*ours["values"], *ours["failed"])})
    hardware = (str(record.get("device")) + (f", {count(record['threads'], 'thread')}" if record.get("threads") else "")
                + (f", {record['ranks']} ranks" if record.get("ranks", 1) != 1 else "") for record in pooled)
    lines = [f"# {literals['title']}", "", f"Suite `{suite}`: {SCALES.get(scale, 'a scale of its own')}"
             f"{', on the image sets drawn by the code itself' if embedded else ''}. Made from [{stem}.jsonl]({stem}.jsonl) by "
             "`./run_all.sh tables`; no number is typed by hand.", ""]
    if pooled:
        lines += ["- Values: accuracy in percent unless a note names another measure; "
                  f"{distinct(record.get('selection') for record in pooled)} iterate, seeds {', '.join(map(str, seeds))}",
                  f"- Hardware: {distinct(hardware)}",
                  f"- Software: torch {distinct(record.get('torch') for record in pooled)}; "
                  f"torchvision {distinct(record.get('torchvision') for record in pooled)}",
                  "- Data (SHA-256): " + distinct(f"{name} `{str(digest)[:12]}`" for record in pooled
                                                  for name, digest in record.get("data", {}).items()), ""]
    lines += make_table(["row", "paper", "ours: mean ± sd (n)", "difference", "note", "seconds", "command"], table)
    lines += ["", "? the paper's value is from memory, not confirmed; † the code has changed since the run; sd: sample standard "
              "deviation over n seeds; seconds: mean over the seeds, shared pre-training included."]
    if claims:
        lines += ["", "## Claims", ""]
        lines += make_table(["claim", "where", "test", "mean difference [95 % interval] (n)", "verdict"],
                            [[claim["statement"], claim["where"], f"`{claim['test']}`", show_interval(claim),
                              claim["verdict"] + " †" * claim["stale"]] for claim in claims])
        lines += ["", "Paired differences over the seeds both rows have, Student-t interval. Reproduced: its lower end passes "
                  "the margin; contradicted: its upper end falls short of it; else, or with fewer than 3 seeds, open."]
    if seeds:
        lines += ["", "## Every seed", ""]
        lines += make_table(["row", *(f"seed {seed}" for seed in seeds)], [
            [row, *(f"{ours['values'][seed]:z.2f}" if seed in ours["values"] else "failed" if seed in ours["failed"] else "–"
                    for seed in seeds)] for row, ours in rows.items() if ours["values"] or ours["failed"]])
    if figures:
        lines += ["", "## Figures", ""] + [f"![{name}]({name})" for name in figures]
    return "\n".join(lines) + "\n"


def show_interval(claim: dict) -> str:
    if not claim["n"]:
        return "–"
    interval = "" if claim["low"] is None else f" [{claim['low']:+z.2f}, {claim['high']:+z.2f}]"
    return f"{claim['mean']:+z.2f}{interval} ({claim['n']})"


def round_ticks(low: float, high: float) -> list[float]:
    """Five or so multiples of 1, 2 or 5 times a power of ten that enclose low..high."""
    rough = (high - low or 1.0) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def learning_curve(row: dict, scalar: str) -> list[tuple]:
    """[(step, mean over the row's records, 0)] of a scalar in the records' histories, at the steps that all have."""
    histories = [dict(map(tuple, record["history"][scalar])) for record in row["pooled"] if scalar in record.get("history", {})]
    steps = sorted(set.intersection(*map(set, histories))) if histories else []
    return [(step, statistics.fmean(history[step] for history in histories), 0.0) for step in steps]


def chart_lines(curve: tuple, rows: dict[str, dict], published: dict[str, tuple]) -> list[tuple]:
    """(name, colour, dashed, [(x, value, sd)]) of what there is to draw of a CURVES entry."""
    lines = []
    for index, (name, line) in enumerate(curve[4].items()):
        color = COLORS[index % len(COLORS)]
        if isinstance(line, tuple):
            lines.append((name, color, False, learning_curve(rows[line[0]], line[1])))
            continue
        lines.append((name, color, False, [(x, rows[row]["mean"], rows[row]["sd"] or 0.0)
                                           for x, row in line if rows[row]["values"]]))
        known = [(x, published[row]) for x, row in line if published[row][0] is not None]
        doubt = "" if all(confirmed for _, (_, _, confirmed) in known) else ", some values not confirmed"
        if lines[-1][3]:
            lines.append((f"{name}, published{doubt}", color, True, [(x, value, 0.0) for x, (value, _, _) in known]))
    return [line for line in lines if line[3]]


def draw_curve(curve: tuple, rows: dict[str, dict], published: dict[str, tuple]) -> str:
    """An SVG line chart of one CURVES entry: our means with sd whiskers, and the paper's values dashed and hollow; or
    learning curves, on a linear axis of steps."""
    _, title, x_label, y_label, series = curve
    lines = chart_lines(curve, rows, published)
    ticks = round_ticks(min(value - sd for *_, points in lines for _, value, sd in points),
                        max(value + sd for *_, points in lines for _, value, sd in points))
    left, right, top, bottom = 64, 620, 44, 320
    positions = list(dict.fromkeys(x for *_, points in lines for x, _, _ in points))
    if all(isinstance(x, (int, float)) for x in positions):
        positions.sort()
    linear = any(isinstance(line, tuple) for line in series.values())
    if linear:
        marks = round_ticks(0, positions[-1])
        across = {x: left + (right - left) * x / marks[-1] for x in [*positions, *marks]}
    else:
        marks = positions
        across = {x: left + (right - left) * (index + 0.5) / len(positions) for index, x in enumerate(positions)}

    def up(value: float) -> float:
        return bottom - (bottom - top) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    stale = any(rows[row]["changed"] for row in rows_of(curve))
    middle, height = (left + right) / 2, bottom + 56 + 20 * len(lines)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" width="640" height="{height}" '
           'font-family="sans-serif" font-size="13" fill="#222">', f'<rect width="640" height="{height}" fill="white"/>',
           f'<text x="{middle}" y="24" text-anchor="middle" font-size="15">{escape(title)}{" †" if stale else ""}</text>',
           f'<text x="{middle}" y="{bottom + 40}" text-anchor="middle">{escape(x_label)}</text>',
           f'<text transform="translate(18 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>']
    for tick in ticks:
        svg += [f'<path d="M{left} {up(tick):.1f}H{right}" stroke="#ddd"/>',
                f'<text x="{left - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.6g}</text>']
    svg += [f'<text x="{across[x]:.1f}" y="{bottom + 20}" text-anchor="middle">{escape(f"{x:.6g}" if linear else str(x))}</text>'
            for x in marks]
    for index, (name, color, dashed, points) in enumerate(lines):
        style = f'stroke="{color}" stroke-width="2"' + ' stroke-dasharray="6 4" opacity="0.55"' * dashed
        places = [(across[x], up(value)) for x, value, _ in sorted(points, key=lambda point: positions.index(point[0]))]
        svg += [f'<polyline fill="none" {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>']
        svg += [f'<path d="M{across[x]:.1f} {up(value - sd):.1f}V{up(value + sd):.1f}" stroke="{color}"/>'
                for x, value, sd in points if sd]
        legend = bottom + 64 + 20 * index
        svg += [f'<path d="M{left} {legend - 4}h36" {style}/>', f'<text x="{left + 46}" y="{legend}">{escape(name)}</text>']
        svg += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" stroke="{color}" fill="{"white" if dashed else color}"/>'
                for x, y in [*places, (left + 18, legend - 4)] if not linear]
    return "\n".join([*svg, "</svg>"]) + "\n"


def round_numbers(value):
    """Floats to 4 digits, throughout dicts and lists."""
    return json.loads(json.dumps(value), parse_float=lambda digits: round(float(digits), 4) + 0.0)


def is_published(suite: str) -> bool:
    """Whether a suite belongs into the index and under the check: trials (smoke) and experiments (-custom) do not."""
    return not suite.startswith("smoke") and not suite.endswith("-custom")


def suite_folders(results: Path) -> list[Path]:
    return sorted({path.parent for path in results.glob("*/*.jsonl")})


def render_suite(folder: Path, papers: Path) -> tuple[dict[Path, str], dict[str, dict]]:
    """(path -> content, summary per paper) of one suite folder."""
    files, summary = {}, {}
    stems = sorted(path.stem for path in folder.glob("*.jsonl"))
    for stem in stems:
        records, warnings = read_records(folder / f"{stem}.jsonl")
        script = papers / f"{stem}.py"
        if not script.exists():
            warnings.append(f"{folder.name}/{stem}.jsonl: there is no script {script.name}, skipped")
        literals = read_literals(script) if script.exists() else None
        unknown = sorted({record["row"] for record in records} - literals["PAPER"].keys()) if literals else []
        warnings += [f"{folder.name}/{stem}.jsonl: PAPER has no row {row!r}, its records are left out" for row in unknown]
        print(*warnings, sep="\n", end="\n" * bool(warnings), file=sys.stderr)
        if literals is None:
            continue
        hashes, published = code_hashes(script), literals["PAPER"]
        rows = {row: summarize_row([record for record in records if record["row"] == row], hashes) for row in published}
        claims = []
        for identifier, first, sign, second, margin, statement, where in literals["CLAIMS"]:
            shift = margin if sign == ">" else -margin
            test = f"{first} {sign} {second}" + (f" {'+' if shift > 0 else '-'} {abs(shift)}" if shift else "")
            claims.append({"id": identifier, "statement": statement, "where": where, "test": test, "margin": margin,
                           "stale": bool(rows[first]["changed"] or rows[second]["changed"]),
                           **judge_claim(rows[first]["values"], sign, rows[second]["values"], margin)})
        for curve in literals["CURVES"]:
            if any(points for *_, points in chart_lines(curve, rows, published)):
                files[folder / f"{stem}_{curve[0]}.svg"] = draw_curve(curve, rows, published)
        longer = tuple(f"{other}_" for other in stems if other.startswith(f"{stem}_"))
        pictures = [path.name for path in folder.glob(f"{stem}_*.png") if not path.name.startswith(longer)]
        figures = sorted(pictures + [path.name for path in files if path.name.startswith(f"{stem}_") and path.suffix == ".svg"])
        files[folder / f"{stem}.md"] = render_paper(folder.name, literals, rows, claims, figures, stem)
        summary[stem] = round_numbers({"claims": claims, "rows": {
            row: {"paper": value, "where": where, "confirmed": confirmed, "mean": rows[row]["mean"], "sd": rows[row]["sd"],
                  "n": len(rows[row]["values"]), "stale": bool(rows[row]["changed"]),
                  "values": rows[row]["values"]}
            for row, (value, where, confirmed) in published.items()}})
    if summary:
        files[folder / "summary.json"] = json.dumps(summary, sort_keys=True, indent=1, allow_nan=False) + "\n"
    return files, summary


def render(results: Path, papers: Path) -> dict[Path, str]:
    """Path -> content of every file that follows from the records in `results` and the scripts in `papers`.

    Warnings go to stderr. Raises OSError where `results` cannot be read, SyntaxError or ValueError for a damaged script.
    """
    files, index = {}, []
    for folder in suite_folders(results):
        suite_files, summary = render_suite(folder, papers)
        files.update(suite_files)
        if is_published(folder.name):
            table = []
            for stem, parts in summary.items():
                verdicts = [claim["verdict"] for claim in parts["claims"]]
                measured = sum(row["n"] > 0 for row in parts["rows"].values())
                table.append([f"[{stem}]({folder.name}/{stem}.md)", f"{measured} of {len(parts['rows'])}",
                              *(verdicts.count(verdict) for verdict in ("reproduced", "contradicted", "open"))])
            index += ["", f"## {folder.name}", ""]
            index += make_table(["paper", "rows measured", "claims reproduced", "contradicted", "open"], table)
    lines = [INDEX_TITLE, "", "Made from the records by `./run_all.sh tables`; no number is typed by hand. A suite is a scale, "
             "and `-embedded` in its name means the image sets drawn by the code itself.", ""]
    lines += [f"- `{scale}`: {meaning}" for scale, meaning in SCALES.items()]
    lines += ["", "Remarks written by hand: [NOTES.md](NOTES.md)"] if (results / "NOTES.md").exists() else []
    files[results / "README.md"] = "\n".join(lines + (index or ["", "No runs yet."])) + "\n"
    return files


def write_tables(results: Path, papers: Path) -> list[str]:
    """Bring the rendered files up to date, each whole or not at all; one line for each file written.

    Raises what `render` raises, and ValueError where `results` holds a README.md of somebody else's.
    """
    files, lines, index = render(results, papers), [], results / "README.md"
    if index.exists() and not index.read_bytes().startswith(INDEX_TITLE.encode()):
        raise ValueError(f"{index} was not made by this program: name another folder with --results DIR")
    for path, content in files.items():
        if path.exists() and path.read_bytes() == content.encode():
            continue
        temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            temporary.write_bytes(content.encode())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        lines.append(f"wrote {path.relative_to(results.parent)}")
    return lines


def check_tables(results: Path, papers: Path) -> list[str]:
    """Where the files in `results` do not follow from its records, one line each; smoke and custom suites are not looked at."""
    files, differences = render(results, papers), []
    extra = [path for path in sorted(results.glob("*/*"))
             if (path.suffix in (".md", ".svg") or path.name == "summary.json") and path not in files]
    for path in [*files, *extra]:
        name = path.relative_to(results)
        if not is_published(name.parts[0]) and len(name.parts) > 1:
            continue
        if path not in files:
            differences.append(f"{results.name}/{name}: follows from no record; delete it")
        elif not path.exists():
            differences.append(f"{results.name}/{name}: missing")
        elif path.read_bytes() != files[path].encode():
            pairs = zip(path.read_bytes().decode(errors="replace").split("\n"), files[path].split("\n"))
            place = next((f"line {number}" for number, (there, wanted) in enumerate(pairs, 1) if there != wanted), "its end")
            differences.append(f"{results.name}/{name}: {place} does not follow from the records")
    return differences


def main(arguments: list[str] | None = None) -> int:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(prog="python -m replicate.report", description="Render results/ from its run records.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file does not follow from the records")
    parser.add_argument("--results", type=Path, default=root / "results", metavar="DIR")
    options = parser.parse_args(arguments)
    results = options.results.resolve()
    if not results.is_dir():
        parser.error(f"no results folder {options.results}; run something first or name one with --results DIR")
    try:
        lines = (check_tables if options.check else write_tables)(results, root / "papers")
    except (OSError, SyntaxError, ValueError) as problem:
        parser.error(" ".join(str(problem).split()))
    print(*lines, sep="\n", end="\n" * bool(lines))
    if options.check and lines:
        print("the tables do not follow from the records: run ./run_all.sh tables and commit")
    return 1 if options.check and lines else 0


if __name__ == "__main__":
    sys.exit(main())
