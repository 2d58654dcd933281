"""The page that tests/bench.py makes from its lines: ratios first, bare times beside them."""
import contextlib
import json

import torch

MAIN = {  # paper -> the training that stands for it
    "gidaris_rotation": "rotnet4", "doersch_context": "context", "noroozi_jigsaw": "jigsaw",
    "zhang_colorization": "full", "swav": "swav", "dann": "mnist-mnistm/dann"}
INTRODUCTION = """# Speed

Made by `./run_all.sh bench SCALE --results results` from `bench.jsonl`.  Each figure is a median,
with the quartiles behind it; a ratio is that of two neighbours in one run.

- *full / prepared*: a step that draws and augments its batch over one that finds it ready.
- *idiomatic / ours*: the same network, batch and loss with a torchvision transform for each sample,
  a DataLoader with a worker a core and float32 (`tests/idiomatic.py`), over a full step.
- *arithmetic*: multiplications and additions a second in the network's products and convolutions,
  over those of a large matrix product in the same precision.
"""


def spread(values):
    """[median, lower quartile, upper quartile] to four digits."""
    values, shares = (torch.tensor(each, dtype=torch.float64) for each in (values, (.5, .25, .75)))
    return [float(f"{value:.4g}") for value in values.quantile(shares).tolist()]


def cell(values):
    """[median, quartiles] -> text; nothing for nothing."""
    if not values:
        return ""
    median, low, high = (f"{value:.3g}" if value < 100 else f"{value:,.0f}" for value in values)
    return f"{median} ({low} to {high})"


def table(columns, rows):
    """Lines of Markdown; none where there are no rows."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (columns, *rows)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:], ""] if rows else []


def latest(lines):
    """{(device, threads, scale): of each measure and paper what was written in the last session}"""
    groups, newest = {}, {}
    for line in lines:
        group = line["device"], line["threads"], line["scale"]
        newest[group, line["measure"], line["paper"]] = line["session"]
        groups.setdefault(group, []).append(line)
    return {group: [line for line in each if line["session"] == newest[
        group, line["measure"], line["paper"]]] for group, each in groups.items()}


def papers_table(lines):
    rows = []
    for line in lines:
        if line["training"] == MAIN[line["paper"]]:
            rows.append([line["paper"], cell(line["overhead"]), cell(line.get("idiomatic")),
                         cell(line["arithmetic"]), cell(line["full_ms"]), f"{line['peak_mb']:,}"])
    return table(["paper", "full / prepared", "idiomatic / ours", "arithmetic", "step, ms",
                  "peak memory, MB"], rows)


def start_table(lines):
    rows = []
    for paper in dict.fromkeys(line["paper"] for line in lines):
        plain, asked, first = ([line["seconds"] for line in lines if line["paper"] == paper
                                and line["what"] == what]
                               for what in ("import torch", "--help", "first step"))
        ratios = [a / b for a, b in zip(asked, plain)]
        rows.append([paper, *(cell(each and spread(each)) for each in (ratios, asked, first))])
    return table(["start", "--help / import torch", "--help, s", "first step, s"], rows)


def growth_table(lines):
    columns = list(dict.fromkeys(line["what"] for line in lines))
    rows = [[paper, *(cell(next((line["ratio"] for line in lines if line["paper"] == paper
                                 and line["what"] == what), None)) for what in columns)]
            for paper in dict.fromkeys(line["paper"] for line in lines)]
    says = ("The time of a step for each image (each pixel, where the side grows) over that at the "
            "scale's own size:")
    return rows and [says, "", *table(["growth", *columns], rows)]


def read(path):
    """The lines of bench.jsonl; what is none, such as one that a full disk has cut, is skipped."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "measure" in line]


def render(path):
    """bench.jsonl -> BENCH.md"""
    page, lines = [INTRODUCTION], read(path)
    for (device, threads, scale), found in latest(lines).items():
        steps, start, growth, protocols = (
            [line for line in found if line["measure"] == measure]
            for measure in ("step", "start", "growth", "protocol"))
        commits = sorted({f"{line['commit']}"[:10] + " with edits" * bool(line["dirty"])
                          for line in found})
        page += [f"## Scale {scale}: {device}" + f", {threads} threads" * bool(threads), "",
                 f"torch {found[-1]['torch']}, {found[-1]['started'][:10]}, commit "
                 f"{', '.join(commits)}", "", *papers_table(steps), *start_table(start)]
        page += table(["protocol", "ratio", "seconds"], [
            [line["what"], f"{cell(line['ratio'])} times {line['over']}", cell(line["seconds"])]
            for line in protocols])
        page += growth_table(growth)
        page += table(["paper", "training", "full / prepared", "arithmetic", "full, ms",
                       "prepared, ms", "idiomatic, ms", "batch"], [
            [line["paper"], line["training"], cell(line["overhead"]), cell(line["arithmetic"]),
             cell(line["full_ms"]), cell(line["prepared_ms"]), cell(line.get("idiomatic_ms")),
             f"{line['batch']}, {line['precision']}"] for line in steps])
    return "\n".join(page)
