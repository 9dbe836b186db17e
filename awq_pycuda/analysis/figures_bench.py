"""The roofline of a benchmark: how fast each kernel computes for what it must move, under the ceilings measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from awq_pycuda.analysis import figure_style as look
from awq_pycuda.results.bench_record import BenchRecord, BenchRow

_OURS, _CEILING, _COLD = "awq_pycuda", "ceiling", "cold"


def write_roofline(record: BenchRecord, out: Path) -> list[Path]:
    """Draws our kernels and writes PNG and SVG beside the file `out`; nothing where none was timed."""
    with look.style():
        figure = roofline(record)
        return [] if figure is None else look.save(figure, out.parent, out.stem)


def roofline(record: BenchRecord) -> Figure | None:
    """GFLOP/s against operations per byte; a marker per stage, larger for larger layers, and a line per ceiling."""
    rows = [row for row in record.rows if row.by == _OURS and row.case != _CEILING]
    rows = [row for row in rows if row.us.size and row.operations and not row.impossible]
    if not rows:
        return None
    cache = _COLD if any(row.cache == _COLD for row in rows) else rows[0].cache
    rows = [row for row in rows if row.cache == cache]
    bandwidth, rates = _ceilings(record.rows)
    note = f"Medians with a {cache} cache. Lines: the highest bandwidth and arithmetic rates measured in the same run."
    figure = look.new_figure(6.8, 4.4, "Kernels under the machine's ceilings", note)
    panel = figure.subplots()
    intensity = np.array([row.operations / (row.read + row.written) for row in rows])
    rate = np.array([row.operations / row.median_us / 1e3 for row in rows])
    names = list(dict.fromkeys(f"{row.stage} {row.variant}".removesuffix(" only") for row in rows))
    for index, row in enumerate(rows):
        again, series = divmod(names.index(f"{row.stage} {row.variant}".removesuffix(" only")), look.MOST_SERIES)
        size = 3 + np.log2(row.out_features * row.in_features) / 6
        hollow = {"markerfacecolor": "white"} if again else {}
        look.marked_line(panel, [intensity[index]], [rate[index]], series, markersize=size, **hollow)
    look.log_axis(panel, "x", [*intensity, intensity.min() / 4, intensity.max() * 4])
    low, high = intensity.min() / 2, intensity.max() * 2
    for unit, limit in rates.items():
        at = np.geomspace(low, high, 64)
        panel.plot(at, np.minimum(limit, bandwidth * at), color=look.GREY, linewidth=1.1)
        panel.annotate(unit, (high, limit), fontsize=8, color="#444444", ha="right", va="bottom")
    look.log_axis(panel, "y", [*rate, *rates.values()])
    panel.set_xlabel("operations per byte that must move")
    panel.set_ylabel("GFLOP/s")
    handles = [
        look.handle(index % look.MOST_SERIES, name, markerfacecolor="white" if index >= look.MOST_SERIES else None)
        for index, name in enumerate(names)
    ]
    look.legend_below(figure, handles)
    return figure


def _ceilings(rows: Sequence[BenchRow]) -> tuple[float, dict[str, float]]:
    """GB/s, and GFLOP/s by unit."""
    bandwidth = 0.0
    rates: dict[str, float] = {}
    for row in rows:
        if row.case != _CEILING or not row.us.size:
            continue
        if row.operations:
            rates[row.stage] = max(rates.get(row.stage, 0.0), row.operations / float(row.us.min()) / 1e3)
        else:
            bandwidth = max(bandwidth, (row.read + row.written) / float(row.us.min()) / 1e3)
    return bandwidth, rates
