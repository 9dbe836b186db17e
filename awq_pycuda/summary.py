"""What a run prints at its end: one table of what AWQ did, and one of where the time went."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from awq_pycuda.console import next_command, print_line
from awq_pycuda.names import fitting
from awq_pycuda.results.conditions import held_down
from awq_pycuda.results.record import LayerResult, Timings
from awq_pycuda.spread import (
    Spread,
    milliseconds,
    milliseconds_range,
    no_signal,
    percent,
    percent_range,
    removed_by,
)

_SCALED_BY = {"rtn_": "RTN", "max_": "max", "": "AWQ"}  # by whose scales there is a metric, by its prefix
_TABLE_WIDTH = 80  # tables are, so that they are the same in a log
_SHOWCASE = "python -m awq_pycuda.run inputs=outliers layers=2 n=256"


def print_summary(
    console: Console,
    layers: Sequence[LayerResult],
    timings: Timings,
    path: Path,
    uniform: bool,
    checkpoint: Path | None = None,
) -> None:
    """What AWQ did by layer and in all, stage times, the pipeline's time, the file's path and the next command.

    Figures and their spreads are those of `spread`. Times are on the stream, or on the host's clock without a GPU.
    `uniform`: the inputs are uniform random numbers, of which no channel is larger than another. `checkpoint`: the
    folder of the one that the run has left.
    """
    _print_quality(console, layers)
    for line in _remarks(layers, uniform):
        print_line(console, line)
    if timings.pipeline_ms.size:
        _print_times(console, [layer.name for layer in layers], timings)
    if checkpoint is not None:
        print_line(console, f"checkpoint {checkpoint}")
    print_line(console, f"results {path}")
    print_line(console, f"next: {next_command(path.parent)}")


def figure(layer: LayerResult, name: str) -> float:
    """A metric of a layer; NaN where it has none."""
    return layer.metrics.get(name, math.nan)


def _print_quality(console: Console, layers: Sequence[LayerResult]) -> None:
    removed = [removed_by(layer.metrics) for layer in layers]
    held_out = [removed_by(layer.metrics, "held_out_") for layer in layers]
    has_held_out = not all(map(math.isnan, held_out))
    ratios = {of: [figure(layer, f"{of}output_sqnr_db") for layer in layers] for of in ("rtn_", "max_", "")}
    if all(layer.by_max is None for layer in layers):
        del ratios["max_"]
    rows = [
        [
            f"{layer.quantized.steps.shape[0]} x {layer.abs_mean.shape[0]}",
            str(layer.search.candidate),
            *(_decibels(values[index]) for values in ratios.values()),
            percent(removed[index]),
            *([percent(held_out[index])] if has_held_out else []),
        ]
        for index, layer in enumerate(layers)
    ]
    overall = Spread.of(removed)
    totals = {}
    if len(layers) > 1:
        medians = (_decibels(Spread.of(values).median) for values in ratios.values())
        totals["all (median)"] = ["", "", *medians, percent(overall.median)]
        totals["all (median)"] += [percent(Spread.of(held_out).median)] if has_held_out else []
    decibels = [f"{_SCALED_BY[of]} dB" for of in ratios]
    headings = ["out x in", "gamma", *decibels, "error removed", *(["held out"] if has_held_out else [])]
    _print_table(console, "Error", headings, [layer.name for layer in layers], rows, totals)
    if overall.count > 1:
        spread = f"median of {overall.count} layers, quartiles {percent_range(overall)}"
        print_line(console, f"error removed {percent(overall.median)} ({spread})")


def _decibels(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _remarks(layers: Sequence[LayerResult], uniform: bool) -> Iterator[str]:
    """What the figures do not say by themselves."""
    alive = [layer for layer in layers if not math.isnan(figure(layer, "output_sqnr_db"))]
    if silent := [layer.name for layer in layers if math.isnan(figure(layer, "output_sqnr_db"))]:
        yield no_signal(silent)
    searched = [layer for layer in alive if layer.search.gamma.size > 1]
    if searched and all(layer.search.candidate.is_rtn for layer in alive):
        if uniform:
            yield (
                "gamma = 0 (plain RTN) wins: of uniform inputs no channel is larger than another, so there is nothing "
                f"to protect. AWQ at work: {_SHOWCASE}"
            )
        else:
            yield "gamma = 0 (plain RTN) has the lowest error in every layer: AWQ changes nothing here"


def _print_times(console: Console, names: Sequence[str], timings: Timings) -> None:
    on_gpu = bool(np.isfinite(timings.gpu_ms).all())
    samples = timings.gpu_ms if on_gpu else timings.host_ms
    medians = np.median(samples, axis=2)
    spreads = [Spread.of(passes) for passes in samples.sum(axis=0)]
    # As many decimals in a column as its largest number has room for.
    totals = np.array([spread.median for spread in spreads])
    cells = _cells(np.vstack([medians, totals]))
    passes = timings.pipeline_ms.size
    footer = {"all (sum)": cells[-1]} if len(names) > 1 else {}
    if passes > 1:
        footer["noise"] = [percent(spread.noise, 0) for spread in spreads]
    title = f"Stage times in ms (median of {passes}, {'GPU events' if on_gpu else 'host clock'}"
    title += "; noise: IQR / median)" if passes > 1 else ")"
    headings = [re.sub("_|(?=Tiled)", "\n", stage, count=1) for stage in timings.stages]
    _print_table(console, title, headings, names, cells[:-1], footer)
    whole = Spread.of(timings.pipeline_ms)
    spread = f", IQR {milliseconds_range(whole)}" if passes > 1 else ""
    cold = "" if math.isnan(timings.cold_ms) else f", cold pass {timings.cold_ms:.0f} ms"
    launched = f", launched {timings.launched}" if on_gpu else ""
    print_line(console, f"pipeline {milliseconds(whole.median)} ms (median of {passes}{spread}){launched}{cold}")
    if count := np.count_nonzero(held_down(timings.conditions, passes)):
        print_line(console, f"in {count} of {passes} passes the GPU held its clock down, by heat or its power's limit")


def _cells(times: NDArray[np.float64]) -> list[list[str]]:
    """Texts of a table of times (rows, columns): as many decimals in a column as its largest number has room for."""
    digits = [max(0, 3 - max(0, math.floor(math.log10(max(column.max(), 1e-9))))) for column in times.T]
    return [[f"{value:.{count}f}" for value, count in zip(row, digits, strict=True)] for row in times]


def _print_table(
    console: Console,
    title: str,
    headings: Sequence[str],
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    totals: dict[str, list[str]],
) -> None:
    """A row per layer and one for each of `totals`, within 80 columns: where names are long, closer, then shortened."""
    width = console.width if console.is_terminal else _TABLE_WIDTH
    texts = [
        [*heading.split("\n"), *(row[column] for row in (*rows, *totals.values()))]
        for column, heading in enumerate(headings)
    ]
    taken = sum(max(map(len, column)) for column in texts) + 2
    longest = max(map(len, (*names, *totals)))
    gap = 2 if taken + longest + 2 * len(headings) <= width else 1
    shown, prefix = fitting(names, width - taken - gap * len(headings))
    without = f"{title} (names without {prefix})" if prefix else title
    title = without if len(without) <= width else title
    table = Table(
        box=None,
        padding=(0, 1),
        collapse_padding=gap == 1,
    )
    table.add_column("layer", overflow="fold", vertical="bottom")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in [*zip(shown, rows, strict=True), *totals.items()]:
        table.add_row(escape(name), *row)
    print_line(console, title)  # a table would fold its title to its own width
    console.print(table, width=width)
