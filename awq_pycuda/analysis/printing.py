"""What the analysis prints: plain lines and small tables; the whole is in the files that it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from awq_pycuda.analysis.collect import Collection
from awq_pycuda.analysis.compare import Comparison
from awq_pycuda.analysis.intervals import CONFIDENCE
from awq_pycuda.analysis.selection import (
    complete_runs,
    no_signal_line,
    pass_spreads,
    plural,
    removed_spreads,
    run_labels,
)
from awq_pycuda.names import listed
from awq_pycuda.results.bench_record import BenchRecord
from awq_pycuda.spread import milliseconds, percent, percent_range

_MOST_ROWS = 40  # of a table
_WIDTH = 100  # of the table of runs where the console is wider: its names are folded


def printable(text: object) -> str:
    """The text in one line, with escapes for what UTF-8 cannot hold: a file name may be any bytes."""
    return " ".join(str(text).encode(errors="backslashreplace").decode().split())


def print_line(console: Console, text: str) -> None:
    """One line, not folded, whatever it looks like."""
    console.print(printable(text), soft_wrap=True, markup=False)


def print_runs(console: Console, collection: Collection) -> None:
    """How many runs and evaluations there are, why runs failed, and which files are left out for what reason."""
    failed = collection.runs[collection.runs["status"] == "failed"]
    total, complete, evaluations = len(collection.runs), len(collection.runs) - len(failed), len(collection.evaluations)
    found = [f"{plural(total, 'run')}: {complete} complete, {len(failed)} failed"] if total or not evaluations else []
    found += [plural(evaluations, "evaluation")] if evaluations else []
    print_line(console, "; ".join([*found, f"{len(collection.left_out)} left out"]))
    for run, error in failed[["run", "error"]].itertuples(index=False):
        print_line(console, f"failed {run}: {error}")
    for left_out in collection.left_out:
        print_line(console, f"left out {left_out.path}: {left_out.reason}")
    if complete:
        _print_figures(console, collection)


def _print_figures(console: Console, collection: Collection) -> None:
    """Each complete run's figures with their spread, as `spread` defines them."""
    runs = complete_runs(collection)
    labels = run_labels(collection)
    columns = {"RTN\ndB": "rtn_output_sqnr_db_median", "max\ndB": "max_output_sqnr_db_median"}
    columns = {heading: column for heading, column in columns.items() if runs[column].notna().any()}
    columns["AWQ\ndB"] = "output_sqnr_db_median"
    table = small_table(console, None, ("run",), ("layers", *columns, "error\nremoved", "quartiles"))
    for heading in ("pipeline\nms", "noise"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.collapse_padding = True
    passes, removed = pass_spreads(collection), removed_spreads(collection)
    of_runs = runs[["run", "layers_finished", *columns.values()]]
    for run, layers, *decibels in of_runs.head(_MOST_ROWS).itertuples(index=False):
        quality = (*(_number(value, ".2f") for value in decibels), percent(removed[run].median))
        times = (milliseconds(passes[run].median), percent(passes[run].noise, 0))
        table.add_row(escape(printable(labels[run])), str(layers), *quality, percent_range(removed[run]), *times)
    print_line(console, "Runs (pipeline: median of passes, noise IQR / median; others: median of layers)")
    console.print(table, width=min(console.width, _WIDTH))
    if len(runs) > _MOST_ROWS:
        print_line(console, f"{len(runs) - _MOST_ROWS} more runs are in the table runs and in the report")
    if line := no_signal_line(collection):
        print_line(console, line)
    slowed = runs[runs["held_down"] > 0]
    if len(slowed):
        shares = [f"{labels[run]} ({percent(share, 0)})" for run, share in slowed[["run", "held_down"]].to_numpy()]
        print_line(console, f"passes with the clock held down, so slower than the device: {listed(shares, 6)}")


def print_set(console: Console, name: str, path: Path, collection: Collection) -> None:
    """What one side of a comparison is: where it ran, and on which state of the code."""
    runs = collection.runs[collection.runs["status"] == "complete"]
    devices = (runs["backend"] + " on " + runs["device_name"]).unique()
    commits = runs["git_commit"].str[:7] + runs["git_dirty"].map({True: " (changed)", False: ""})
    known = [commit for commit in commits.dropna().unique() if commit]
    of_commit = f", commit {', '.join(known)}" if known else ""
    print_line(console, f"{name} {path}: {len(runs)} complete, {', '.join(devices)}{of_commit}")


def print_bench(console: Console, name: str, path: Path, record: BenchRecord) -> None:
    """What one side of a comparison of benchmarks is."""
    root = record.root
    commit = str(root["git_commit"])[:7] + (" (changed)" if root["git_dirty"] else "")
    of_commit = f", commit {commit}" if commit else ""
    device = json.loads(str(root["device"])).get("name", "")
    print_line(console, f"{name} {path}: {len(record.rows)} rows, {root['backend']} on {device}{of_commit}")


def print_comparison(console: Console, result: Comparison) -> None:
    """The verdicts counted, the rows behind them, and every run and file that has no counterpart.

    Of many rows those that are not the same are shown, the slowest first.
    """
    times, metrics = result.times, result.metrics
    rows = times
    if len(rows) > _MOST_ROWS:
        rows = times[times["verdict"] != "same"].sort_values("ratio", ascending=False, kind="stable")
    if len(rows):
        title = "Times: median over the passes, stages summed over the layers"
        headings = ("A ms", "B ms", "B/A", f"{100 * CONFIDENCE:.0f} % interval", "passes", "")
        table = small_table(console, title, ("config", "what"), headings)
        for row in rows.head(_MOST_ROWS).itertuples():
            interval = "-" if pd.isna(row.low) else f"{row.low:.3f} to {row.high:.3f}"
            numbers = (f"{row.median_a_ms:.3f}", f"{row.median_b_ms:.3f}", f"{row.ratio:.3f}", interval)
            passes = f"{row.samples_a}, {row.samples_b}"
            table.add_row(escape(row.config), escape(row.what), *numbers, passes, row.verdict)
        console.print(table)
    _count(console, "times", times, rows)
    changed = metrics[metrics["verdict"] != "same"]
    if len(changed):
        table = small_table(
            console, "Metrics that are not the same", ("config", "layer", "metric"), ("A", "B", "B - A", "")
        )
        for row in changed.head(_MOST_ROWS).itertuples():
            values = (_number(row.a, ".6g"), _number(row.b, ".6g"), _number(row.difference, "+.3g"))
            table.add_row(escape(row.config), escape(printable(row.name)), row.metric, *values, row.verdict)
        console.print(table)
    _count(console, "metrics", metrics, changed)
    for side, run, reason in result.not_compared.itertuples(index=False):
        print_line(console, f"not compared: {side} {run}: {reason}")
    if result.apart:
        keys = ",".join(result.apart)
        print_line(console, f"The runs without a counterpart never agree in {keys}; ignore={keys} sets that aside.")


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def small_table(console: Console, title: str | None, texts: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    """An empty table with columns of text, which fold, and of numbers, which do not."""
    style = box.SIMPLE_HEAD if console.is_terminal else None
    table = Table(box=style, title=title, title_justify="left")
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _count(console: Console, what: str, table: pd.DataFrame, shown: pd.DataFrame) -> None:
    counts = ", ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items())
    hidden = len(shown) - _MOST_ROWS
    more = f"; {hidden} more rows are not shown (out=FOLDER writes all)" if hidden > 0 else ""
    print_line(console, f"{what}: {counts or 'none'}{more}")
