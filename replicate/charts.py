"""Line charts as SVG of what the report has made of the records; the same input, the same bytes."""
import math
import statistics
from html import escape

from replicate.records import rows_of

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
LEFT, RIGHT, TOP, BOTTOM = 64, 620, 44, 320


def round_ticks(low, high):
    """Five or so multiples of 1, 2 or 5 times a power of ten that enclose low..high."""
    rough = max(high - low or 1.0, 1e-6 * max(abs(low), abs(high)), 1e-12) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def learning_curve(row, scalar):
    """[(step, mean over the row's records, 0)] of a scalar, at the steps that all have."""
    histories = [dict(map(tuple, record["history"][scalar])) for record in row["pooled"]
                 if scalar in record.get("history", {})]
    steps = sorted(set.intersection(*map(set, histories))) if histories else []
    return [(step, statistics.fmean(history[step] for history in histories), 0.0) for step in steps]


def lines_of(curve, rows, published):
    """(name, colour, dashed, [(x, value, sd)]) of what there is to draw of a curve."""
    lines = []
    for index, (name, line) in enumerate(curve["lines"].items()):
        color = COLORS[index % len(COLORS)]
        if isinstance(line, dict):
            lines.append((name, color, False, learning_curve(rows[line["row"]], line["scalar"])))
            continue
        points = [(x, rows[row]["mean"], rows[row]["sd"] or 0.0)
                  for x, row in line if rows[row]["values"]]
        if len(points) < 2:  # a point is no curve
            continue
        lines.append((name, color, False, points))
        known = [(x, published[row]) for x, row in line if "paper" in published[row]]
        doubt = ", some values not confirmed" * any(e.get("unconfirmed") for _, e in known)
        lines.append((f"{name}, published{doubt}", color, True,
                      [(x, entry["paper"], 0.0) for x, entry in known]))
    return [line for line in lines if line[3]]


def draw(curve, rows, published):
    """A curve of the YAML as SVG: our means with whiskers of one sd, the paper's values dashed and
    hollow; or learning curves, on a linear axis of steps."""
    lines = lines_of(curve, rows, published)
    ticks = round_ticks(min(value - sd for *_, points in lines for _, value, sd in points),
                        max(value + sd for *_, points in lines for _, value, sd in points))
    positions = list(dict.fromkeys(x for *_, points in lines for x, _, _ in points))
    if all(isinstance(x, (int, float)) for x in positions):
        positions.sort()
    linear = any(isinstance(line, dict) for line in curve["lines"].values())
    if linear:
        marks = round_ticks(0, positions[-1])
        across = {x: LEFT + (RIGHT - LEFT) * x / marks[-1] for x in [*positions, *marks]}
    else:
        marks = positions
        across = {x: LEFT + (RIGHT - LEFT) * (index + 0.5) / len(positions)
                  for index, x in enumerate(positions)}

    def up(value):
        return BOTTOM - (BOTTOM - TOP) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    def text(words, place, more='text-anchor="middle"'):
        return f"<text {place} {more}>{escape(words)}</text>"

    stale = " †" * any(rows[row]["stale"] for row in rows_of(curve))
    middle, height = (LEFT + RIGHT) / 2, BOTTOM + 56 + 20 * len(lines)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" width="640" '
           f'height="{height}" font-family="sans-serif" font-size="13" fill="#222">',
           f'<rect width="640" height="{height}" fill="white"/>',
           text(curve["title"] + stale, f'x="{middle}" y="24"',
                'text-anchor="middle" font-size="15"'),
           text(curve["x"], f'x="{middle}" y="{BOTTOM + 40}"'),
           text(curve["y"], f'transform="translate(18 {(TOP + BOTTOM) / 2}) rotate(-90)"')]
    for tick in ticks:
        svg += [f'<path d="M{LEFT} {up(tick):.1f}H{RIGHT}" stroke="#ddd"/>',
                text(f"{tick:.6g}", f'x="{LEFT - 8}" y="{up(tick) + 4:.1f}"', 'text-anchor="end"')]
    svg += [text(f"{x:.6g}" if linear else str(x), f'x="{across[x]:.1f}" y="{BOTTOM + 20}"')
            for x in marks]
    for index, (name, color, dashed, points) in enumerate(lines):
        faint = ' stroke-dasharray="6 4" opacity="0.55"' * dashed
        style = f'stroke="{color}" stroke-width="2"{faint}'
        ordered = sorted(points, key=lambda point: positions.index(point[0]))
        places = [(across[x], up(value)) for x, value, _ in ordered]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        svg.append(f'<polyline fill="none" {style} points="{corners}"/>')
        svg += [f'<path d="M{across[x]:.1f} {up(value - sd):.1f}V{up(value + sd):.1f}" '
                f'stroke="{color}"/>' for x, value, sd in points if sd]
        legend = BOTTOM + 64 + 20 * index
        svg += [f'<path d="M{LEFT} {legend - 4}h36" {style}/>',
                f'<text x="{LEFT + 46}" y="{legend}">{escape(name)}</text>']
        fill = "white" if dashed else color
        svg += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" stroke="{color}" fill="{fill}"/>'
                for x, y in [*places, (LEFT + 18, legend - 4)] if not linear]
    return "\n".join([*svg, "</svg>"]) + "\n"
