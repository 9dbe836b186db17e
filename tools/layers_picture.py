"""Draws what AWQ removes of RTN's error in each layer of a result file: `layers_picture.py RESULTS.h5 OUT.svg "MODEL"`.

Layers of one kind, such as every block's query, stand together. The picture brings its own background, light or dark as
the reader's system is, so that it can be read on any page.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import defaultdict
from html import escape
from pathlib import Path

import h5py

from awq_pycuda.names import without_shared
from awq_pycuda.spread import error_removed

WIDTH, HEIGHT = 900, 340
LEFT, RIGHT, TOP, BOTTOM = 54, 20, 62, 62  # around the bars
GAP = 18  # between two kinds
STYLE = """
    .card { fill: #ffffff; stroke: #d1d5db; } text { fill: #1f2937; } .quiet { fill: #4b5563; }
    .grid { stroke: #e5e7eb; } .zero { stroke: #6b7280; } .better { fill: #2563eb; } .worse { fill: #c2410c; }
    @media (prefers-color-scheme: dark) {
      .card { fill: #161b22; stroke: #30363d; } text { fill: #e6edf3; } .quiet { fill: #9da7b3; }
      .grid { stroke: #30363d; } .zero { stroke: #8b949e; } .better { fill: #58a6ff; } .worse { fill: #f0883e; }
    }
"""


def read(path: Path) -> dict[str, list[tuple[str, float]]]:
    """Of each kind of layer its members in order: what tells them apart, and the error removed in percent."""
    with h5py.File(path) as file:
        layers = [(str(layer.attrs["name"]), dict(layer["metrics"].attrs)) for layer in file["layers"].values()]
    kinds: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for name, (_, metrics) in zip(without_shared([name for name, _ in layers]), layers, strict=True):
        parts = name.split(".")
        number = ".".join(part for part in parts if part.isdigit())
        removed = 100 * error_removed(metrics["output_mse"], metrics["rtn_output_mse"])
        kinds[".".join(part for part in parts if not part.isdigit())].append((number, removed))
    return kinds


def draw(kinds: dict[str, list[tuple[str, float]]], model: str) -> str:
    """The picture as SVG."""
    values = [value for members in kinds.values() for _, value in members]
    low, high = min(0, 10 * math.floor(min(values) / 10)), 10 * math.ceil(max(values) / 10)
    height = HEIGHT - TOP - BOTTOM
    bar = (WIDTH - LEFT - RIGHT - GAP * len(kinds)) / len(values)

    def y(value: float) -> float:
        return TOP + height * (high - value) / (high - low)

    summary = f"median {statistics.median(values):.1f} %, {min(values):.1f} to {max(values):.1f} %"
    title = f"What AWQ removes of int8 rounding's output error: {model}, {len(values)} layers"
    body = [
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
        f'<text x="16" y="27" font-size="16" font-weight="bold">{escape(title)}</text>',
        f'<text class="quiet" x="16" y="46">in % of plain round-to-nearest\'s error; a bar per block of the model; '
        f"{summary}</text>",
    ]
    for tick in range(low + (-low) % 20 if low else 0, high + 1, 20):
        body.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f} H{WIDTH - RIGHT}"/>')
        body.append(f'<text class="quiet" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick} %</text>')
    x = LEFT + GAP / 2
    for kind, members in kinds.items():
        middle = x + bar * len(members) / 2
        body.append(f'<text x="{middle:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{escape(kind)}</text>')
        best = max(value for _, value in members)
        for number, value in members:
            top, bottom = min(y(value), y(0)), max(y(value), y(0))
            colour = "better" if value >= 0 else "worse"
            body.append(
                f'<rect class="{colour}" x="{x + 1:.1f}" y="{top:.1f}" width="{bar - 2:.1f}" '
                f'height="{max(bottom - top, 0.5):.1f}"><title>{escape(kind)} {number}: {value:.1f} %</title></rect>'
            )
            place = f'x="{x + bar / 2:.1f}" text-anchor="middle"'
            body.append(f'<text class="quiet" {place} y="{HEIGHT - 36}" font-size="10">{escape(number)}</text>')
            if value in (best, min(value, 0)) and round(value) != 0:
                above = top - 4 if value > 0 else bottom + 11
                body.append(f'<text {place} y="{above:.1f}" font-size="10">{value:.0f}</text>')
            x += bar
        x += GAP
    body.append(f'<path class="zero" d="M{LEFT} {y(0):.1f} H{WIDTH - RIGHT}"/>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-labelledby="title" font-family="Helvetica, Arial, sans-serif" font-size="11">\n'
        f'  <title id="title">{escape(title)}; {summary}</title>\n  <style>{STYLE}  </style>\n'
    )
    return head + "".join(f"  {line}\n" for line in body) + "</svg>\n"


if __name__ == "__main__":
    results, out, name = sys.argv[1:]
    Path(out).write_text(draw(read(Path(results)), name), encoding="utf-8")
