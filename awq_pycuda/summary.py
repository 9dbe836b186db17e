"""What a run prints: one table of what AWQ did, one of where the time went, and progress on a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from awq_pycuda.pipeline import STAGES, LayerResult, Timings

_PLAIN_WIDTH = 160  # lines of a log or a pipe are not folded to a terminal's width


def make_console(stderr: bool = False) -> Console:
    """A console that styles on a terminal and writes plain aligned text elsewhere."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_PLAIN_WIDTH)


def table_style(console: Console) -> box.Box | None:
    """Lines under the headings on a terminal, none elsewhere."""
    return box.SIMPLE_HEAD if console.is_terminal else None


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yields what `Pipeline.run` reports to: a bar on a terminal that goes when done, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def print_summary(console: Console, layers: Sequence[LayerResult], timings: Timings, path: Path) -> None:
    """Per layer: gamma, SQNR of RTN and AWQ, error removed, stage times; then the pipeline's time and the file's path.

    Times are medians over the measured passes: on the stream, or on the host's clock without a GPU.
    """
    style = table_style(console)
    quality = Table(Column("layer", overflow="fold"), "out x in", box=style, title="Error", title_justify="left")
    for heading in ("gamma", "RTN dB", "AWQ dB", "error removed"):
        quality.add_column(heading, justify="right", no_wrap=True)
    for layer in layers:
        shape = f"{layer.scale_b.shape[0]} x {layer.abs_mean.shape[0]}"
        figures = layer.metrics
        row = [f"{figures[key]:.2f}" if figures else "-" for key in ("rtn_output_sqnr_db", "output_sqnr_db")]
        quality.add_row(escape(layer.name), shape, f"{layer.search.gamma_chosen:g}", *row, error_removed(figures))
    console.print(quality)
    if timings.pipeline_ms.size:
        _print_times(console, layers, timings, style)
    console.print(f"results {path}", soft_wrap=True, markup=False)


def error_removed(figures: dict[str, float]) -> str:
    """Share of RTN's output error that AWQ removed, in percent; "-" where there is none to remove."""
    if not figures or not figures["rtn_output_mse"] > 0:
        return "-"
    return f"{100 * (1 - figures['output_mse'] / figures['rtn_output_mse']):.1f} %"


def _print_times(console: Console, layers: Sequence[LayerResult], timings: Timings, style: box.Box | None) -> None:
    on_gpu = bool(np.isfinite(timings.gpu_ms).all())
    clock = "GPU events" if on_gpu else "host clock"
    samples = timings.gpu_ms if on_gpu else timings.host_ms
    title = f"Stage times in ms (median, {clock})"
    times = Table(Column("layer", overflow="fold"), box=style, title=title, title_justify="left")
    for stage in STAGES:
        # On a terminal in two lines, so that the table fits 80 columns.
        heading = stage if style is None else re.sub("_|(?=Tiled)", "\n", stage, count=1)
        times.add_column(heading, justify="right", no_wrap=True)
    medians = np.median(samples, axis=2)
    for layer, row in zip(layers, medians, strict=True):
        times.add_row(escape(layer.name), *(f"{value:.3f}" for value in row))
    if len(layers) > 1:
        times.add_row("all", *(f"{value:.3f}" for value in medians.sum(axis=0)))
    console.print(times)
    repeats = timings.pipeline_ms.size
    cold = "" if math.isnan(timings.cold_ms) else f", cold pass {timings.cold_ms:.0f} ms"
    console.print(f"pipeline {np.median(timings.pipeline_ms):.2f} ms (median of {repeats}){cold}")
