"""The report: one HTML file that holds all it needs, so that it opens anywhere, offline, for good."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from awq_pycuda.analysis.collect import Collection, collect
from awq_pycuda.analysis.guard import Failure
from awq_pycuda.analysis.report_data import page_data
from awq_pycuda.analysis.selection import (
    complete_layers,
    complete_runs,
    format_value,
    is_missing,
    key_name,
    plural,
    without_copies,
)


@dataclass(frozen=True)
class Column:
    """A column of the table of runs: its head, what the head's tooltip says, a text and a sort key per run."""

    head: str
    hint: str
    texts: list[str]
    order: list[Any]
    number: bool


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
    data = page_data(collection, failures)
    bundle = _table_bundle()
    html = environment.get_template("report.html.j2").render(
        summary=_summary(collection),
        common=_common(collection.runs),
        columns=_columns(collection),
        runs=list(collection.runs["run"]),
        statuses=list(collection.runs["status"]),
        failed=_failed(collection.runs),
        left_out=[
            *((str(item.path), item.reason) for item in collection.left_out),
            *((failure.part, failure.reason) for failure in failures),
        ],
        has_roofline=bool(data["roofs"]),
        data=Markup(_json_script(data)),
        table_script=Markup(_json_script(bundle.read_text(encoding="utf-8"))),
        table_style=Markup(bundle.with_suffix(".css").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8", errors="backslashreplace")  # paths may hold bytes that are no text


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


def _summary(collection: Collection) -> list[tuple[str, str]]:
    """The figures at the top: their value and what it is of."""
    runs, layers = collection.runs, complete_layers(collection)
    complete = len(complete_runs(collection))
    found = [
        (f"{len(runs) + len(collection.left_out):,}", "files looked at"),
        (f"{complete:,}", "complete"),
        (f"{len(runs) - complete:,}", "failed"),
        (f"{len(collection.left_out):,}", "left out"),
        (f"{len(layers):,}", "layers of complete runs"),
    ]
    removed = layers["error_removed"].dropna()
    if len(removed):
        found.append((f"{100 * removed.median():.1f} %", "of RTN's error removed by AWQ (median layer)"))
        found.append((f"{int((removed < 0).sum()):,}", "layers in which AWQ is worse than RTN"))
    return found


def _config_columns(runs: pd.DataFrame) -> list[str]:
    fixed = collect([]).runs.columns  # those that are there without any run
    return [column for column in runs.columns if column not in fixed]


def _common(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """What all runs have in common: device and config keys with one value."""
    columns = ["device_name", "backend", "study", *_config_columns(runs)]
    texts = {column: runs[column].map(format_value).unique() for column in columns}
    return [(key_name(column), values[0]) for column, values in texts.items() if len(values) == 1 and values[0]]


def _columns(collection: Collection) -> list[Column]:
    """The table's columns: keys that differ between runs, then what came out."""
    runs = collection.runs
    differing = [
        column
        for column in ("study", "backend", "device_name", *_config_columns(runs))
        if runs[column].map(format_value).nunique() > 1
    ]
    found = [_config_column(runs[column]) for column in without_copies(runs, differing)]
    layers = complete_layers(collection)
    gain = layers["output_sqnr_db"] - layers["rtn_output_sqnr_db"]
    # A layer without any error has an infinite SQNR, which no mean can hold.
    finite = layers.assign(gain=gain.where(np.isfinite(gain)))
    means = finite.groupby("run")[["gain", "error_removed"]].mean().reindex(runs["run"])
    if runs["layers_finished"].nunique() > 1:
        found.append(
            _number_column("layers done", "layers that the run finished", runs["layers_finished"], "{:,.0f}".format)
        )
    removed = "1 − AWQ's output MSE / RTN's, mean over the layers"
    return [
        *found,
        _number_column(
            "pass, ms", "median time of a measured pass over all layers", runs["pipeline_ms"], _milliseconds
        ),
        _number_column(
            "cold, ms", "the first pass with all before it: inputs, compiling", runs["cold_ms"], _milliseconds
        ),
        _number_column(
            "gain, dB", "SQNR of AWQ less that of RTN, mean over the layers", means["gain"], "{:.2f}".format
        ),
        _number_column("error removed, %", removed, 100 * means["error_removed"], "{:.1f}".format),
    ]


def _milliseconds(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


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
    """Numbers; an empty cell where there is none."""
    floats = [math.nan if is_missing(value) else float(value) for value in values]
    texts = [show(value) if math.isfinite(value) else "" for value in floats]
    return Column(head, hint, texts, [value if math.isfinite(value) else "" for value in floats], True)


def _failed(runs: pd.DataFrame) -> list[dict[str, str]]:
    mine = runs[runs["status"] != "complete"]
    return [
        {"run": row.run, "reason": row.error or "no reason stored", "path": row.path,
         "finished": plural(row.layers_finished, "layer")}
        for row in mine[["run", "error", "path", "layers_finished"]].itertuples()
    ]  # fmt: skip
