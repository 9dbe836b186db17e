"""The report: one HTML file that holds all it needs, so that it opens anywhere, offline, for good."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from awq_pycuda.analysis.collect import Collection, collect
from awq_pycuda.analysis.guard import Failure, attempt
from awq_pycuda.analysis.report_data import page_data
from awq_pycuda.analysis.report_evaluations import (
    HEADS,
    EvaluationPart,
    better_than_rtn,
    evaluation_data,
    evaluation_part,
    evaluation_title,
)
from awq_pycuda.analysis.selection import (
    complete_layers,
    complete_runs,
    format_value,
    is_missing,
    key_name,
    named_study,
    no_signal_line,
    pass_spreads,
    plural,
    removed_spreads,
    run_labels,
    without_copies,
)
from awq_pycuda.spread import milliseconds, milliseconds_range, percent, percent_range

_MOST_NAMED = 3  # studies, commits or devices at the head of the page


@dataclass(frozen=True)
class Column:
    """A column of the table of runs: its head, what the head's tooltip says, a text and a sort key per run."""

    head: str
    hint: str
    texts: list[str]
    order: list[Any]
    number: bool


@dataclass(frozen=True)
class Tile:
    """A figure at the top: its value, its name, and what it is of."""

    value: str
    name: str
    of: str


@dataclass(frozen=True)
class Row:
    """A run in the table: its name, its file, how it ended, and its place among the complete runs of the figures."""

    label: str
    path: str
    status: str
    place: int | str


def write_report(collection: Collection, path: Path, failures: list[Failure]) -> None:
    """Writes the report as one HTML file; parts of it that fail join `failures`, which it names.

    Every text in it comes from result files and is escaped: by the template, and as JSON for the scripts.

    Args:
        collection: what to report.
        failures: the figures that could not be drawn.
        path: the file; its folder is made if missing.

    Raises:
        OSError: the file cannot be written.
    """
    # Imported here, because reading and comparing results needs none of them.
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("awq_pycuda.analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = _parts(collection, failures)
    bundle = _table_bundle()
    html = environment.get_template("report.html.j2").render(
        **parts | {"data": Markup(parts["data"])},
        left_out=[
            *((str(item.path), item.reason) for item in collection.left_out),
            *((failure.part, failure.reason) for failure in failures),
        ],
        table_script=Markup(_json_script(bundle.read_text(encoding="utf-8"))),
        table_style=Markup(bundle.with_suffix(".css").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8", errors="backslashreplace")  # paths may hold bytes that are no text


def _parts(collection: Collection, failures: list[Failure]) -> dict[str, Any]:
    """What the page is made of; a part that fails joins `failures` and is empty."""
    runs, names = collection.runs, list(collection.runs["run"])
    nothing = page_data(collect([]), [])

    def of_evaluations() -> tuple[list[EvaluationPart], list[dict[str, Any]]]:
        return list(map(evaluation_part, shown)), list(map(evaluation_data, shown))

    shown = collection.evaluations
    parts, figures = attempt("evaluations", failures, of_evaluations, (list[EvaluationPart](), list[dict[str, Any]]()))

    def data() -> tuple[str, bool]:
        found = page_data(collection, failures)
        return _json_script(found | {"evaluations": figures}), bool(found["roofs"])

    labels = attempt(
        "names of the runs", failures, lambda: run_labels(collection), dict(zip(names, names, strict=True))
    )
    without = (_json_script(nothing | {"evaluations": figures}), True)
    script, has_roofline = attempt("interactive figures", failures, data, without)
    return {
        "data": script,
        "has_roofline": has_roofline,
        "evaluations": parts,
        "heads": HEADS,
        "title": attempt("title", failures, lambda: _title(collection), plural(len(runs), "run")),
        "about": attempt("head", failures, lambda: _about(collection), list[tuple[str, str]]()),
        "tiles": attempt("tiles", failures, lambda: _tiles(collection), list[Tile]()),
        "no_signal": attempt("layers without signal", failures, lambda: no_signal_line(collection), ""),
        "common": attempt("settings", failures, lambda: _common(runs), list[tuple[str, str]]()),
        "columns": attempt("columns of the table", failures, lambda: _columns(collection), list[Column]()),
        "runs": _rows(collection, labels),
        "failed": _failed(runs, labels),
    }


def _table_bundle() -> Path:
    """DataTables as one ES module, the style sheet beside it.

    It is taken from itables without importing that: itables would follow a config file of the folder one stands in.
    """
    package = find_spec("itables")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).with_name("html") / "dt_bundle.js"


def _json_script(value: Any) -> str:
    """JSON that may stand in a script element: no text in it can close the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _title(collection: Collection) -> str:
    """What the page is about: what was evaluated, else the study, the one run, or how many runs."""
    runs = collection.runs
    if of_evaluations := evaluation_title(collection):
        return of_evaluations
    studies = [study for study in dict.fromkeys(map(named_study, runs["study"])) if study]
    if studies and len(studies) <= _MOST_NAMED:
        return f"{'Study' if len(studies) == 1 else 'Studies'} {', '.join(studies)}"
    if len(runs) == 1:
        return f"Run {run_labels(collection, most=200)[runs['run'].iloc[0]]}"
    return plural(len(runs), "run")


def _about(collection: Collection) -> list[tuple[str, str]]:
    """When, on which state of the code and on what the results were made."""
    roots = [each.record.root for each in collection.evaluations]
    columns = ("created", "git_commit", "git_dirty", "backend")
    evaluated = pd.DataFrame([{name: root[name] for name in columns} for root in roots], columns=list(columns))
    evaluated["device_name"] = [str(json.loads(str(root["device"])).get("name", "")) for root in roots]
    runs = pd.concat([evaluated, collection.runs[list(evaluated)]], ignore_index=True)
    days = sorted({str(created)[:16].replace("T", " ") for created in runs["created"]})
    commits = [
        f"{str(commit)[:7]}{' (changed)' if dirty is True or dirty is np.True_ else ''}"
        for commit, dirty in zip(runs["git_commit"], runs["git_dirty"], strict=True)
        if not is_missing(commit) and commit
    ]
    devices = [
        f"{name or 'unknown device'} ({backend})"
        for name, backend in zip(runs["device_name"], runs["backend"], strict=True)
    ]
    found = [("date", " to ".join(dict.fromkeys((days[0], days[-1]))) + " UTC")] if days else []
    for name, values in (("commit", commits), ("device", devices)):
        unique = list(dict.fromkeys(values))
        many = f"{len(unique)} {name}s"
        if unique:
            found.append((name, ", ".join(unique) if len(unique) <= _MOST_NAMED else many))
    return found


def _tiles(collection: Collection) -> list[Tile]:
    """The figures at the top. Of several runs the median of their figures, with the range from lowest to highest."""
    runs = list(complete_runs(collection)["run"])
    found = _evaluation_tiles(collection)
    removed = [spread for run, spread in removed_spreads(collection).items() if run in runs and spread.count]
    if len(removed) == 1:
        of = f"median of {plural(removed[0].count, 'layer')}, quartiles {percent_range(removed[0])}"
        found.append(Tile(percent(removed[0].median), "error removed", of))
    elif removed:
        medians = np.array([spread.median for spread in removed])
        of = f"median of {len(removed)} runs, {100 * medians.min():.1f} to {percent(medians.max())}"
        found.append(Tile(percent(np.median(medians)), "error removed", f"{of}; of a run the median of its layers"))
    every = complete_layers(collection)["error_removed"].dropna()
    if len(every):
        worse = f"{int((every < 0).sum()):,}"
        found.append(Tile(worse, "layers worse than RTN", f"of {len(every):,} in complete runs, by output error"))
    timed = [spread for run, spread in pass_spreads(collection).items() if run in runs and spread.count]
    noises = np.array([spread.noise for spread in timed])
    if len(timed) == 1:
        of = f"median of {plural(timed[0].count, 'pass', 'passes')}"
        of += f", IQR {milliseconds_range(timed[0])}" if timed[0].count > 1 else ""
        found.append(Tile(f"{milliseconds(timed[0].median)} ms", "pipeline", of))
    elif np.isfinite(noises).any():
        of = f"IQR / median of a run's passes: the median run, highest {percent(np.nanmax(noises), 0)}"
        found.append(Tile(percent(float(np.nanmedian(noises)), 0), "noise of the times", of))
    of = f"{len(collection.runs) - len(runs):,} failed, {len(collection.left_out):,} left out"
    if len(collection.runs) or not found:
        found.append(Tile(f"{len(runs):,}", f"complete run{'' if len(runs) == 1 else 's'}", of))
    return found


def _evaluation_tiles(collection: Collection) -> list[Tile]:
    """How many recipes were evaluated, and how many of them are surely better than RTN."""
    recipes = sum(len(each.record.recipes) - 1 for each in collection.evaluations)
    if not collection.evaluations:
        return []
    tokens = sorted({int(each.record.root["predicted_tokens"]) for each in collection.evaluations})
    on = " to ".join(f"{count:,}" for count in dict.fromkeys((tokens[0], tokens[-1])))
    found = [Tile(f"{recipes:,}", f"recipe{'' if recipes == 1 else 's'} evaluated", f"on {on} tokens")]
    better, total = better_than_rtn(collection)
    if total:
        of = f"of {total} beside RTN in the same format, by 95 % intervals of the difference"
        found.append(Tile(f"{better}", "of a lower KL than RTN", of))
    return found


def _rows(collection: Collection, labels: Mapping[str, str]) -> list[Row]:
    complete = {run: place for place, run in enumerate(complete_runs(collection)["run"])}
    return [
        Row(labels[run], path, status, complete.get(run, ""))
        for run, path, status in collection.runs[["run", "path", "status"]].itertuples(index=False)
    ]


def _config_columns(runs: pd.DataFrame) -> list[str]:
    fixed = collect([]).runs.columns  # those that are there without any run
    return [column for column in runs.columns if column not in fixed]


def _common(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """What all runs have in common: device and config keys with one value."""
    columns = ["device_name", "backend", "study", *_config_columns(runs)]
    texts = {column: runs[column].map(format_value).unique() for column in columns}
    return [(key_name(column), values[0]) for column, values in texts.items() if len(values) == 1 and values[0]]


def _columns(collection: Collection) -> list[Column]:
    """The table's columns: what came out, then the keys that differ between runs."""
    runs = collection.runs
    differing = [
        column
        for column in ("study", "backend", "device_name", *_config_columns(runs))
        if runs[column].map(format_value).nunique() > 1
    ]
    keys = [_config_column(runs[column]) for column in without_copies(runs, differing)]
    passes = list(pass_spreads(collection).values())
    removed = list(removed_spreads(collection).values())
    decibels = "{:.2f}".format
    found = [
        _number_column(
            "error removed",
            "1 − AWQ's output MSE / RTN's, median over the layers",
            [spread.median for spread in removed],
            percent,
        ),
        Column(
            "quartiles",
            "of the error removed, over the layers",
            [percent_range(spread) for spread in removed],
            [_order(spread.low) for spread in removed],
            True,
        ),
        _number_column(
            "RTN dB", "SQNR of round-to-nearest, median over the layers", runs["rtn_output_sqnr_db_median"], decibels
        ),
        _number_column(
            "max dB",
            "SQNR with scales of max|x|, the other baseline, median over the layers",
            runs["max_output_sqnr_db_median"],
            decibels,
        ),
        _number_column("AWQ dB", "SQNR of AWQ, median over the layers", runs["output_sqnr_db_median"], decibels),
        _number_column(
            "pipeline ms",
            "a measured pass over all layers, median over the passes",
            [spread.median for spread in passes],
            milliseconds,
        ),
        _number_column(
            "noise",
            "interquartile range of the passes / their median",
            [spread.noise for spread in passes],
            lambda value: percent(value, 0),
        ),
        _number_column(
            "cold ms", "the first pass with all before it: inputs, compiling", runs["cold_ms"], milliseconds
        ),
    ]
    if (runs["held_down"] > 0).any():
        hint = "share of the passes measured while the device held its clock down: heat, or its power's limit"
        found.append(_number_column("held down", hint, runs["held_down"], lambda value: percent(value, 0)))
    if runs["layers_finished"].nunique() > 1:
        found.append(
            _number_column("layers", "layers that the run finished", runs["layers_finished"], "{:,.0f}".format)
        )
    return [*found, *keys]


def _config_column(values: pd.Series) -> Column:
    texts = [format_value(value) for value in values]
    number = all(
        isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in values if not is_missing(v)
    )
    order = [
        ("" if is_missing(value) else float(value)) if number else text
        for value, text in zip(values, texts, strict=True)
    ]
    name = key_name(str(values.name))
    return Column(name, f"config key {name}", texts, order, number)


def _number_column(head: str, hint: str, values: Iterable[Any], show: Callable[[float], str]) -> Column:
    """Numbers; a dash where there is none, which sorts behind all."""
    floats = [math.nan if is_missing(value) else float(value) for value in values]
    texts = ["-" if math.isnan(value) else show(value) for value in floats]
    return Column(head, hint, texts, [_order(value) for value in floats], True)


def _order(value: float) -> float | str:
    """What a column is sorted by; JavaScript reads no `inf`."""
    return "" if math.isnan(value) else min(max(value, -1e300), 1e300)


def _failed(runs: pd.DataFrame, labels: Mapping[str, str]) -> list[dict[str, str]]:
    mine = runs[runs["status"] != "complete"]
    return [
        {"run": labels[row.run], "reason": row.error or "no reason stored", "path": row.path,
         "finished": plural(row.layers_finished, "layer")}
        for row in mine[["run", "error", "path", "layers_finished"]].itertuples()
    ]  # fmt: skip
