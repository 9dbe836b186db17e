"""Figures of time: stages stacked, time against each swept key, roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from awq_pycuda.analysis import figure_style as look
from awq_pycuda.analysis.collect import Collection
from awq_pycuda.analysis.find import natural
from awq_pycuda.analysis.roofline import Ceilings, ceilings, device_of, points
from awq_pycuda.analysis.selection import (
    complete_layers,
    complete_runs,
    format_value,
    in_order,
    key_name,
    layer_labels,
    numeric,
    plural,
    run_labels,
    run_stages,
    stage_passes,
    stages_of,
    swept_keys,
    without_folders,
)
from awq_pycuda.names import shorten
from awq_pycuda.spread import QUARTILES

_MOST_BARS = 40
_MOST_RUNS_AS_BARS = 24
_MOST_DEVICES = 4
_WHOLE: dict[str, Any] = {"fmt": "|", "color": look.BLACK, "markersize": 7, "markeredgewidth": 1.4, "elinewidth": 1.1}


def _stage_style(stages: list[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each stage, the same in every figure."""
    colours, markers = look.STAGE_COLOURS, look.MARKERS
    return {
        stage: {"color": colours[index % len(colours)], "marker": markers[index % len(markers)]}
        for index, stage in enumerate(stages)
    }


def _clock(runs: pd.DataFrame) -> str:
    clocks = set(runs["clock"])
    if clocks == {"gpu"}:
        return "on the GPU's stream"
    return "by the host's clock" if "gpu" not in clocks else "on the stream for runs on a GPU, else by the host's clock"


def stage_times(collection: Collection) -> Figure | None:
    """Stage times stacked, and their shares: by layer for one run, by run for a few, by a swept key for many."""
    sums = run_stages(collection)
    if sums.empty:
        return None
    runs = complete_runs(collection).set_index("run").loc[sums.index]
    clock = _clock(runs)
    layers = complete_layers(collection)
    layers = layers[layers["run"].isin(sums.index)]
    if len(sums) == 1 and len(layers) > 1:
        columns = {f"ms.{stage}": stage for stage in sums}
        rows = layers.set_index("layer").rename(columns=columns)[list(sums)].fillna(0.0)
        labels = list(layer_labels(layers).values())
        whole = _layer_quartiles(collection, runs)
        note = f"Run {sums.index[0]}, by layer: medians over its passes, {clock}. Black: a layer's whole time"
    elif len(sums) <= _MOST_RUNS_AS_BARS:
        rows, labels = sums, list(map(run_labels(collection).__getitem__, sums.index))
        whole = runs[["pipeline_ms_q25", "pipeline_ms", "pipeline_ms_q75"]]
        note = f"By run: medians over its passes, summed over its layers, {clock}. Black: a whole pass"
    else:
        rows, labels, by, whole = _grouped(collection, sums, runs["pipeline_ms"])
        note = f"Medians over {plural(len(sums), 'run')}{by}, summed over the layers, {clock}. Black: a whole pass"
    note += ", with its interquartile range."
    if len(rows) > _MOST_BARS:
        height, thick = 9.0, 1.0
    else:
        height, thick = 0.24 * len(rows) + 1.5, 0.72
    figure = look.new_figure(7.8, height, "Time of the stages", note)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    _stack(left, rows, thick)
    low, middle, high = whole.to_numpy(dtype=float).T
    spread = [middle - low, high - middle]
    left.errorbar(middle, np.arange(len(rows)), xerr=spread, **_WHOLE)
    _stack(right, rows.div(rows.sum(axis=1).replace(0, np.nan), axis=0).fillna(0.0), thick)
    shown = [shorten(label, 44) for label in labels]
    if len(set(shown)) < len(shown):  # what tells the runs apart fell to the shortening
        shown = [shorten(str(run), 44) for run in rows.index]
    look.category_ticks(left, "y", shown, _MOST_BARS)
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlabel("time (ms)")
    right.set_xlabel("share")
    right.set_xlim(0, 1)
    right.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for panel in (left, right):
        panel.grid(axis="y", visible=False)
    look.legend_below(figure, left.get_legend_handles_labels()[0])
    return figure


def _stack(panel: Axes, rows: pd.DataFrame, thick: float) -> None:
    places = np.arange(len(rows))
    start = np.zeros(len(rows))
    for stage, style in _stage_style(list(rows)).items():
        width = rows[stage].to_numpy(dtype=float)
        edge: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.4}
        panel.barh(places, width, thick, left=start, color=style["color"], label=stage, **edge)
        start = start + width


def _layer_quartiles(collection: Collection, runs: pd.DataFrame) -> pd.DataFrame:
    """Of the one run in this table: quartiles over its passes of each layer's time, a row per layer."""
    own = collection.timings[collection.timings["clock"] == runs["clock"].iloc[0]]
    passes = own[own["run"].isin(runs.index)].groupby(["layer", "repeat"])["ms"].sum()
    return passes.groupby(level="layer").quantile(list(QUARTILES)).unstack()


def _grouped(
    collection: Collection, sums: pd.DataFrame, pipeline: pd.Series
) -> tuple[pd.DataFrame, list[str], str, pd.DataFrame]:
    """Medians by the swept key whose values set the times furthest apart, if one has few enough values.

    Returns:
        Stage times, a row per value; its label; what the note says of the key; quartiles of the passes over the runs.
    """
    table = complete_runs(collection).set_index("run").loc[sums.index]
    best, spread = None, 1.0
    for key in swept_keys(collection):
        medians = pipeline.groupby(table[key].map(format_value)).median()
        if 1 < len(medians) <= _MOST_RUNS_AS_BARS and medians.max() > spread * medians.min():
            best, spread = key, medians.max() / medians.min()
    if best is None:
        whole = pipeline.quantile(list(QUARTILES)).to_frame().T
        return sums.median().to_frame().T, ["all runs"], "", whole
    name, order = key_name(best), in_order(table[best])
    rows = sums.groupby(table[best].map(format_value)).median().loc[order]
    whole = pipeline.groupby(table[best].map(format_value)).quantile(list(QUARTILES)).unstack().loc[order]
    return rows, [f"{name}={value}" for value in order], f" by {name}, the key that sets times furthest apart", whole


def times_against(collection: Collection) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """One figure per swept key (columns, and what draws them): time of a pass and of its stages, against its values."""
    runs = complete_runs(collection)
    runs = runs[runs["pipeline_ms"].notna()]
    if runs.empty:
        return
    for key, along in swept_keys(collection).items():
        yield key, partial(_time_against, collection, runs.set_index("run"), key, along)


def _time_against(collection: Collection, runs: pd.DataFrame, key: str, along: list[str]) -> Figure:
    swept = swept_keys(collection)
    others = [other for other in swept if other not in (key, "seed")]
    combos = runs[others].map(format_value).agg("\n".join, axis=1) if others else pd.Series("", runs.index)
    to_scale = key != "seed" and numeric(runs[key])
    order = in_order(runs[key])
    x = runs[key].astype(float) if to_scale else runs[key].map(format_value).map({v: i for i, v in enumerate(order)})
    few = combos.nunique() <= look.MOST_SERIES
    note = "Left, a whole pass: " + (
        "medians over the passes, bars between their quartiles"
        if few
        else "median and quartiles over all runs; a thin line joins runs that differ in this key alone"
        + (", or their medians over the seeds" if "seed" in swept and key != "seed" else "")
    )
    note += f". Right, its stages: medians and quartiles over the passes of {plural(len(runs), 'run')}."
    note += f" Times {_clock(runs)}."
    if along:
        note += f" Swept along with {key_name(key)}: {', '.join(key_name(other) for other in along)}."
    names = _combo_names(runs, others, combos) if few else {}
    legend_columns = 2 if max(map(len, names.values()), default=0) < 26 else 1
    height = 4.4 + 0.17 * max(0, len(names) / legend_columns - 3)  # the panels keep their size above a long legend
    figure = look.new_figure(8.2, height, f"Time against {key_name(key)}", note)
    left, right = figure.subplots(1, 2)
    if few:
        passes = collection.passes[collection.passes["run"].isin(runs.index)].set_index("run")["pipeline_ms"]
        for series, (combo, label) in enumerate(names.items()):
            mine = passes[passes.index.map(combos) == combo]
            shift = 0.0 if to_scale else 0.6 * ((series + 0.5) / len(names) - 0.5)
            _quartile_line(left, mine.groupby(mine.index.map(x)), series, label, to_scale, shift)
        if len(names) > 1:
            _legend(left, "outside lower left", legend_columns)
    else:
        _thin_lines(left, runs["pipeline_ms"], x, combos)
        _quartile_line(left, runs["pipeline_ms"].groupby(x), 0, "", to_scale, 0.0)
    _stage_lines(right, collection, x, to_scale)
    look.scale_to(left, "y", runs["pipeline_ms"])
    for panel, name in ((left, "time of a pass (ms)"), (right, "time of a stage, all layers (ms)")):
        panel.set_xlabel(key_name(key))
        panel.set_ylabel(name)
        if to_scale:
            look.scale_to(panel, "x", x)
            look.value_ticks(panel, sorted(set(x)))
            panel.margins(x=0.08)
        else:
            look.category_ticks(panel, "x", [shorten(text, 24) for text in without_folders(order)], 12)
            panel.set_xlim(-0.5, len(order) - 0.5)
            if min(24, max(map(len, order))) * min(12, len(order)) > 44:
                panel.tick_params(axis="x", rotation=30)
                for text in panel.get_xticklabels():
                    text.set_horizontalalignment("right")
    return figure


def _thin_lines(panel: Axes, pipeline: pd.Series, x: pd.Series, combos: pd.Series) -> None:
    medians = pipeline.groupby([combos, x]).median()
    lines = [np.column_stack([part.index.get_level_values(1), part]) for _, part in medians.groupby(level=0)]
    panel.add_collection(
        LineCollection(lines, colors=look.GREY, linewidths=0.7, alpha=min(0.6, 20 / len(lines) + 0.15))
    )
    lone = np.array([line[0] for line in lines if len(line) == 1])
    if lone.size:
        panel.plot(*lone.T, "o", markersize=2.5, markeredgewidth=0, color=look.GREY, alpha=0.5)


def _combo_names(runs: pd.DataFrame, others: list[str], combos: pd.Series) -> dict[str, str]:
    shown = [other for other in others if runs[other].map(format_value).nunique() > 1]
    first = runs[~combos.duplicated()]
    names = {}
    for run in first.index:
        texts = [f"{key_name(other)}={shorten(format_value(first.loc[run, other]), 20)}" for other in shown]
        names[combos[run]] = shorten(", ".join(texts), 60)
    return dict(sorted(names.items(), key=lambda item: natural(item[1])))


def _quartile_line(panel: Axes, groups: Any, series: int, label: str, joined: bool, shift: float) -> None:
    spread = groups.quantile(list(QUARTILES)).unstack()
    panel.errorbar(
        spread.index + shift,
        spread[0.5],
        [spread[0.5] - spread[0.25], spread[0.75] - spread[0.5]],
        color=look.SERIES[series],
        marker=look.MARKERS[series],
        markersize=5,
        linewidth=1.3,
        capsize=2.5,
        linestyle="-" if joined else "none",
        label=label,
    )


def _stage_lines(panel: Axes, collection: Collection, x: pd.Series, joined: bool) -> None:
    passes = stage_passes(collection)
    places = passes.index.get_level_values("run").map(x)
    spread = passes.groupby([passes.index.get_level_values("stage"), places]).quantile(list(QUARTILES)).unstack()
    low, middle, high = (spread[share] for share in QUARTILES)
    bars: dict[str, Any] = {"markersize": 4.5, "linestyle": "-" if joined else "none", "elinewidth": 1.0}
    for stage, style in _stage_style(stages_of(complete_layers(collection))).items():
        mine = middle[stage]
        panel.errorbar(mine.index, mine, [mine - low[stage], high[stage] - mine], label=stage, **bars, **style)
    look.scale_to(panel, "y", middle)
    _legend(panel, "outside lower right", 2)


def _legend(panel: Axes, loc: Literal["outside lower left", "outside lower right"], columns: int) -> None:
    panel.figure.legend(handles=panel.get_legend_handles_labels()[0], loc=loc, ncols=columns)


def roofline(collection: Collection) -> Figure | None:
    """Each kernel's arithmetic rate over its intensity, under the ceilings of its GPU; None without GPU times."""
    table = points(collection)
    if table.empty:
        return None
    devices = table["device_name"].value_counts().index[:_MOST_DEVICES]
    limits = {device: ceilings(device_of(collection, device)) for device in devices}
    columns = 1 if len(devices) == 1 else 2
    rows = -(-len(devices) // columns)
    note = (
        "A point per kernel, its variant and layer shape: medians over runs, layers and passes, bars between their "
        "quartiles. Work from the shapes, each array moved once. A stage's time on the stream includes launching. "
        "Layers that fit the L2 cache may lie above the memory roof."
    )
    figure = look.new_figure(7.0 if columns == 1 else 10.0, 4.2 * rows, "Roofline of the kernels", note)
    axes = figure.subplots(rows, columns, squeeze=False)
    look.hide(axes.flat[len(devices) :])
    styles = _stage_style(stages_of(complete_layers(collection)))
    for panel, device in zip(axes.flat, devices, strict=False):
        _roof(panel, table[table["device_name"] == device], limits[device], styles)
        panel.set_title(device)
    look.legend_below(figure, axes.flat[0].get_legend_handles_labels()[0])
    return figure


def _roof(panel: Axes, table: pd.DataFrame, limit: Ceilings, styles: dict[str, dict[str, Any]]) -> None:
    dot: dict[str, Any] = {"linestyle": "none", "markersize": 6.5, "markeredgecolor": "white", "markeredgewidth": 0.5}
    bar: dict[str, Any] = {"linewidth": 2.4, "alpha": 0.4}
    for stage, style in styles.items():
        mine = table[table["stage"] == stage]
        if len(mine):
            panel.vlines(mine["intensity"], mine["gflops_low"], mine["gflops_high"], color=style["color"], **bar)
            panel.plot(mine["intensity"], mine["gflops"], label=stage, **style, **dot)
    low, high = table["intensity"].min() / 2, table["intensity"].max() * 2
    top = table["gflops_high"].max()
    if limit.gflops and limit.gbytes:
        high = max(high, 4 * limit.gflops / limit.gbytes)
    small: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": "#444444"}
    if limit.gbytes:
        x = np.geomspace(low, high, 200)
        roof = np.minimum(x * limit.gbytes, limit.gflops or np.inf)
        panel.plot(x, roof, color=look.BLACK, linewidth=1.3)
        panel.annotate(f"{limit.gbytes:,.0f} GB/s", (x[20], roof[20]), xytext=(8, -6), va="top", **small)
        top = max(top, roof.max())
    if limit.gflops:
        if not limit.gbytes:
            panel.axhline(limit.gflops, color=look.BLACK, linewidth=1.3)
        speed = f"{limit.gflops / 1e3:,.1f} TFLOP/s fp32"
        panel.annotate(speed, (high, limit.gflops), xytext=(0, 4), ha="right", **small)
        top = max(top, limit.gflops)
    missing = [name for name, value in (("arithmetic", limit.gflops), ("memory", limit.gbytes)) if value is None]
    if missing:
        text = f"no ceiling for {' and '.join(missing)}: not in the result files"
        panel.annotate(text, (0, 1), xytext=(4, -4), xycoords="axes fraction", va="top", **small)
    bottom = table["gflops_low"].min() / 3
    look.log_axis(panel, "x", [low, high])
    look.log_axis(panel, "y", [bottom, 4 * top])
    panel.set_xlim(low, high)
    panel.set_ylim(bottom, 4 * top)
    panel.set_xlabel("arithmetic intensity (flop per byte)")
    panel.set_ylabel("GFLOP/s")
