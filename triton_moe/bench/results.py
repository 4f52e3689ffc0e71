"""The README's tables and its plot, from what `--json` wrote."""

import itertools
import json
import math
import re
import sys
from pathlib import Path

from ..demo import write_atomically
from .row import BOTH, FORWARD, Target
from .shared import PUBLIC_HEAD
from .timing import shortened

BEGIN, END = "<!-- results: written by `python -m triton_moe bench --render` -->\n", "<!-- end of results -->\n"
PLOTTED = r"SwitchHead H 4 E 4 TOP_K 2 P 100, T (\d+)"

# The tables


def tables(report: dict) -> str:
    """Every result that has a bound to meet, and every model; the whole before its parts."""
    lines = [f"{report['device']}, torch {report['torch']}, Triton {report['triton']}, medians of {report['repeats']}."]
    shown = [row for row in report["rows"] if row["target"] or row["milliseconds"] or row["memory"] or row["tokens"]]
    groups = [(name, list(rows)) for name, rows in itertools.groupby(shown, lambda row: row["group"])]
    for name, rows in reversed(groups):
        lines += ["", f"| {name} | ours | rival | time, must | memory in MiB, must |", "| --- | --- | --- | --- | --- |"]
        lines += [table_line(row) for row in rows]
    missing = [row for row in report["rows"] if row["problem"]]
    lines += [f"\nNot timed: {row['row']}, {row['rival'] or 'ours'}: {shortened(row['problem'])}" for row in missing]
    return "\n".join(lines) + "\n"


def table_line(r: dict) -> str:
    ours, rival = f"{r['ours_ms']:.3f} ms", f"{r['rival']}: {r['rival_ms']:.3f} ms"
    if r["tokens"]:
        ours += f", {r['tokens'] / r['ours_ms'] * 1e3:,.0f} tokens/s"
    time = bounded(r["ratio"], r["target"])
    if r["milliseconds"]:
        time = bounded(r["ours_ms"], r["milliseconds"], " ms")
    memory = ""
    if r["work"] != FORWARD and r["rival_mib"]:
        memory = f"{r['ours_mib']:,.0f} / {r['rival_mib']:,.0f} = {bounded(r['ours_mib'] / r['rival_mib'], r['memory'])}"
    return f"| {r['row']}: {r['work']} | {ours} | {rival} | {time} | {memory} |"


def bounded(value: float, bounds: dict | None, unit: str = "") -> str:
    """The value, its bound, and what it has reached."""
    if not bounds:
        return f"{value:.3f}{unit}"
    target = Target(**bounds)
    reached = "well reached" if value <= target.aim else "reached" if value <= target.must else "**missed**"
    return f"{value:.3f}{unit}, {target.must:.3g}{unit} {reached}"


# The plot


def plot(report: dict) -> str:
    """An SVG of SwitchHead's time and memory, forward and backward, against the length of its sequences."""
    ours, dense, public = "this library", "dense attention 16 x 64, torch.compile", f"{PUBLIC_HEAD}, eager"
    times: dict[str, dict[int, float]] = {ours: {}, dense: {}, public: {}}
    memory: dict[str, dict[int, float]] = {ours: {}, dense: {}, public: {}}
    for row in report["rows"]:
        length = re.fullmatch(PLOTTED, row["row"])
        if length and row["work"] == BOTH and row["ours_ms"]:
            T = int(length[1])
            if row["rival"].startswith(dense):
                times[ours][T], memory[ours][T] = row["ours_ms"], row["ours_mib"]
                times[dense][T], memory[dense][T] = row["rival_ms"], row["rival_mib"]
            elif row["rival"] == PUBLIC_HEAD:
                times[public][T], memory[public][T] = row["rival_ms"], row["rival_mib"]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 350" font-family="sans-serif" font-size="12">',
        '<rect width="900" height="350" fill="white"/>',
        *panel(60, "milliseconds, forward and backward", times),
        *panel(510, "peak memory, MiB", memory),
    ]
    for i, (name, color) in enumerate(zip(times, COLORS, strict=True)):
        parts.append(f'<text x="{60 + 290 * i}" y="340" fill="{color}">&#9679; {name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


COLORS = ("#d62728", "#1f77b4", "#7f7f7f")


def panel(left: int, title: str, series: dict[str, dict[int, float]]) -> list[str]:
    """Both axes are logarithmic."""
    width, top, height = 360, 40, 240
    lengths = sorted({T for points in series.values() for T in points})
    values = [value for points in series.values() for value in points.values()]
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))

    def x(T):
        return left + width * (math.log(T / lengths[0]) / math.log(lengths[-1] / lengths[0]) if len(lengths) > 1 else 0.5)

    def y(value):
        return top + height * (1 - math.log(value / low) / math.log(high / low))

    parts = [f'<text x="{left}" y="{top - 15}" font-weight="bold">{title}</text>']
    for power in range(round(math.log10(high / low)) + 1):
        at = low * 10**power
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y(at):.1f}" y2="{y(at):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(at) + 4:.1f}" text-anchor="end">{at:g}</text>')
    for T in lengths:
        parts.append(f'<text x="{x(T):.1f}" y="{top + height + 18}" text-anchor="middle">T {T}</text>')
    for points, color in zip(series.values(), COLORS, strict=True):
        places = [(x(T), y(points[T])) for T in sorted(points)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{color}"/>' for a, b in places]
    return parts


# The command


def render(path: Path, readme: Path) -> int:
    """Write the plot beside the JSON, and the tables between the marks of the README. 2 when it cannot."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        drawn, text = plot(report), with_tables(readme.read_text(encoding="utf-8"), report)
    except (OSError, ValueError, KeyError) as problem:
        print(f"triton_moe bench: cannot render {path}: {type(problem).__name__}: {problem}", file=sys.stderr)
        return 2
    write_atomically(path.with_suffix(".svg"), drawn.encode())
    write_atomically(readme, text.encode())
    print(f"wrote {path.with_suffix('.svg')} and the tables in {readme}")
    return 0


def with_tables(text: str, report: dict) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README has no lines {BEGIN.strip()!r} and {END.strip()!r}")
    return "".join([before, begin, "\n", tables(report), "\n", end, after])
