"""Figures of the scale search: its error curves, and the channels that it scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from awq_pycuda.analysis import figure_style as look
from awq_pycuda.analysis.collect import SALIENT_SHARE, Collection, by_gamma, channels_of
from awq_pycuda.analysis.selection import (
    Variant,
    best_run,
    complete_layers,
    complete_runs,
    families,
    layer_labels,
    plural,
    run_labels,
    variants,
    who,
)
from awq_pycuda.names import shorten
from awq_pycuda.spread import QUARTILES

_MOST_PANELS = 9
_MOST_CHANNEL_LAYERS = 4
_CURVES = "Error of the scale search over γ"
_RING = "a ring marks the chosen γ."


def error_curves(collection: Collection) -> Figure | None:
    """The error of the scale search over γ, relative to RTN's, with the chosen γ marked.

    One result: all layers, by family of names where they are many. A few: a panel per layer. Many: medians.
    """
    curves = by_gamma(collection.curves[collection.curves["run"].isin(complete_runs(collection)["run"])])
    if curves.empty:
        return None
    curves = curves[np.isfinite(curves["error_relative"]) & (curves["error_relative"] > 0)].sort_values("gamma")
    if curves["gamma"].nunique() < 2:
        return None
    rtn = where_rtn_is(curves)
    labels = layer_labels(complete_layers(collection))
    groups = variants(collection, look.MOST_SERIES)
    if len(groups) == 1:
        curves = curves[curves["run"] == groups[0].runs[0]]
        return _curves_of_layers(curves, labels, f"{who(collection, groups)} {rtn}; {_RING}")
    if len(labels) > _MOST_PANELS:
        curves, runs = same_grid(curves)
        medians = curves.groupby(["layer", "gamma"], as_index=False)["error_relative"].median()
        medians["chosen"] = medians["error_relative"] == medians.groupby("layer")["error_relative"].transform("min")
        note = f"Medians over {runs}. {rtn}; a ring marks the lowest point of a layer's medians."
        return _curves_of_layers(medians, labels, note)
    if groups:
        note = f"{who(collection, groups, few='A panel per layer; one line for')} {rtn}; {_RING}"
        return _curves_of_variants(curves, labels, groups, note)
    return _curves_of_many(curves, labels)


def where_rtn_is(curves: pd.DataFrame) -> str:
    """Where plain rounding stands in a figure of these curves."""
    if curves["duo"].any() or (curves["beta"] > 0).any():
        return "1 is RTN; of candidates with one γ the best"
    return "γ = 0 is RTN"


def same_grid(curves: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The curves of the runs that searched the most frequent grid: medians need the same γ in all of them.

    Of grids that are equally frequent the finest says the most.
    """
    gammas = curves["gamma"].to_numpy()
    grids = pd.Series({run: np.unique(gammas[rows]).tobytes() for run, rows in curves.groupby("run").indices.items()})
    common = grids[grids == max(grids.mode(), key=len)].index
    runs = plural(len(grids), "run")
    if len(common) < len(grids):
        runs = f"{len(common)} of {runs}, those with the most frequent γ grid"
    return curves[curves["run"].isin(common)], runs


def _panels(count: int, note: str, shares: bool = False) -> tuple[Figure, Any, Any]:
    """A grid of panels with common axes; with `shares` each has a low panel above it. Both grids come back."""
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    height = 3.6 if count == 1 else (3.1 if shares else 2.5) * rows
    figure = look.new_figure(max(6.8, 3.1 * columns), height + 0.4, _CURVES, note)
    ratios = [1.0, 3.4] * rows if shares else None
    row_count = 2 * rows if shares else rows
    axes = figure.subplots(row_count, columns, sharex=True, sharey="row", squeeze=False, height_ratios=ratios)
    above, below = (axes[::2], axes[1::2]) if shares else (axes[:0], axes)
    look.hide([*above.flat[count:], *below.flat[count:]])
    return figure, above, below


def _ratio_axes(axes: Any, ratios: Any) -> None:
    for panel in axes.flat:
        look.scale_to(panel, "y", ratios)
        panel.axhline(1, color=look.BLACK, linewidth=0.9, linestyle=":")
        panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    limits = np.array([panel.get_ylim() for panel in axes.flat if panel.get_visible()])
    for panel in axes[:, 0]:
        panel.set_ylim(limits.min(), limits.max())
    for panel in axes[:, 0]:
        panel.set_ylabel("search error / RTN's")
    look.label_lowest(axes, "γ")


def _curves_of_layers(curves: pd.DataFrame, labels: dict[int, str], note: str) -> Figure:
    """A line per layer: a few layers in the colours of series, many by depth, in a panel for each family of names."""
    few = len(labels) < look.MOST_SERIES
    groups = families(labels)
    if few or len(groups) > _MOST_PANELS:
        groups = {"": list(labels)}
    figure, _, axes = _panels(len(groups), note)
    colours, depth = look.depth_colours(), Normalize(min(labels), max(labels))
    by_layer = dict(iter(curves.groupby("layer")))
    for panel, (family, layers) in zip(axes.flat, groups.items(), strict=False):
        if len(groups) > 1:
            panel.set_title(shorten(family))
        for layer in filter(by_layer.__contains__, layers):
            series = list(labels).index(layer)
            colour = look.SERIES[series] if few else colours(depth(layer))
            _curve(panel, by_layer[layer], colour, look.MARKERS[series] if few else "o")
    _ratio_axes(axes, curves["error_relative"])
    if few:
        look.legend_below(figure, [look.handle(index, label) for index, label in enumerate(labels.values())])
    else:
        bar = figure.colorbar(ScalarMappable(depth, colours), ax=axes, label="layer", aspect=30, pad=0.01)
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        bar.ax.invert_yaxis()
    return figure


def _curve(panel: Axes, curve: pd.DataFrame, colour: Any, marker: str) -> None:
    panel.plot(curve["gamma"], curve["error_relative"], color=colour)
    chosen = curve[curve["chosen"]]
    ring: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 1.6}
    panel.plot(chosen["gamma"], chosen["error_relative"], linestyle="none", marker=marker, markersize=6, **ring)


def _curves_of_variants(curves: pd.DataFrame, labels: dict[int, str], groups: list[Variant], note: str) -> Figure:
    figure, _, axes = _panels(len(labels), note)
    by_run_and_layer = dict(iter(curves.groupby(["run", "layer"])))
    for panel, (layer, label) in zip(axes.flat, labels.items(), strict=False):
        panel.set_title(label)
        for series, group in enumerate(groups):
            if (group.runs[0], layer) in by_run_and_layer:
                curve = by_run_and_layer[group.runs[0], layer]
                _curve(panel, curve, look.SERIES[series], look.MARKERS[series])
    _ratio_axes(axes, curves["error_relative"])
    look.legend_below(figure, look.variant_handles(groups))
    return figure


def _curves_of_many(curves: pd.DataFrame, labels: dict[int, str]) -> Figure:
    """A panel per layer: median and quartiles over the runs, and above it how often each γ was chosen."""
    curves, runs = same_grid(curves)
    labels = {layer: labels[layer] for layer in labels if layer in set(curves["layer"])}  # others have another grid
    note = f"By layer, over {runs}. {where_rtn_is(curves)}."
    figure, above, below = _panels(len(labels), note, shares=True)
    gammas = np.unique(curves["gamma"])
    width = 0.7 * np.diff(gammas).min() if gammas.size > 1 else 0.2
    limits = []
    for share, panel, (layer, label) in zip(above.flat, below.flat, labels.items(), strict=False):
        mine = curves[curves["layer"] == layer]
        chosen = mine[mine["chosen"]]["gamma"].value_counts(normalize=True)
        share.bar(chosen.index, chosen.to_numpy(), width=width, color=look.ORANGE)
        share.set_title(label)
        band = mine.groupby("gamma")["error_relative"].quantile(list(QUARTILES)).unstack()
        panel.fill_between(band.index, band[0.25], band[0.75], color=look.BLUE, alpha=0.22, linewidth=0)
        panel.plot(band.index, band[0.5], color=look.BLUE)
        limits.append(band.to_numpy().ravel())
    for share in above[:, 0]:
        share.set_ylabel("runs")
        share.set_ylim(bottom=0)
        share.yaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
        share.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _ratio_axes(below, np.concatenate(limits))
    handles = [
        Line2D([], [], color=look.BLUE, label="median over the runs"),
        Patch(color=look.BLUE, alpha=0.22, label="between the quartiles"),
        Patch(color=look.ORANGE, label="share of the runs that chose this γ"),
    ]
    look.legend_below(figure, handles)
    return figure


def channel_scales(collection: Collection) -> Figure | None:
    """Activation statistics and scales by input channel, with the salient channels marked.

    Of many runs the one, and of many layers the four, in which AWQ removes the most of RTN's error.
    """
    runs, layers = complete_runs(collection), complete_layers(collection)
    if layers.empty:
        return None
    run = best_run(collection)
    mine = layers[layers["run"] == run]
    most = mine.sort_values("error_removed", ascending=False, kind="stable").head(_MOST_CHANNEL_LAYERS)
    shown = most.sort_values("layer")
    note = f"Run {run}."
    if len(runs) > 1:
        label = run_labels(collection)[run]
        note = f"Of {len(runs)} runs the one in which AWQ removes the most error: {label}."
    if len(shown) < len(mine):
        note += f" The {len(shown)} of its {len(mine)} layers with the most error removed."
    note += f" Salient: the top {SALIENT_SHARE * 100:g} % of the input channels by mean |x|, at least one."
    title = "Activation statistics and AWQ scales by input channel"
    labels = layer_labels(mine)
    path = Path(runs.set_index("run").loc[run, "path"])
    tables = channels_of([(path, int(layer)) for layer in shown["layer"]])
    note += _lift_zeros(tables)
    figure = look.new_figure(max(6.8, 2.7 * len(shown) + 0.6), 4.6, title, note)
    axes = figure.subplots(2, len(shown), sharex="col", sharey="row", squeeze=False)
    for (upper, lower), table, layer in zip(axes.T, tables, shown.itertuples(), strict=True):
        ends = np.stack([np.column_stack([table["channel"], table[end]]) for end in ("abs_mean", "rms")], axis=1)
        image = len(table) > look.MOST_POINTS_AS_PATHS
        upper.add_collection(LineCollection(list(ends), colors="#BBBBBB", linewidths=0.7, rasterized=image))
        _channel_cloud(upper, table, table["abs_mean"])
        _channel_cloud(lower, table, table["s"])
        lower.axhline(1, color=look.BLACK, linewidth=0.9, linestyle=":")
        salient = f"γ = {layer.gamma_chosen:g}, {int(table['salient'].sum())} of {len(table)} salient"
        upper.set_title(f"{shorten(labels[int(layer.layer)], 30)}\n{salient}")
        lower.set_xlabel("input channel")
        lower.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        lower.set_xlim(-0.5 - 0.02 * len(table), len(table) - 0.5 + 0.02 * len(table))
    every = pd.concat(tables)
    axes[0, 0].set_ylabel("activation (its own unit)")
    axes[1, 0].set_ylabel("AWQ scale s")
    for upper, lower in axes.T:
        look.scale_to(upper, "y", np.concatenate([every["abs_mean"], every["rms"]]))
        look.scale_to(lower, "y", every["s"])
    dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 3}
    handles = [
        Line2D([], [], color=look.BLUE, label="mean |x|, s", **dot),
        Line2D([], [], color="#BBBBBB", label="from mean |x| to √(mean x²)"),
        Line2D([], [], linestyle="none", marker="^", markersize=6, color=look.VERMILLION, label="salient channel"),
        Line2D([], [], linestyle=":", color=look.BLACK, label="s = 1 (RTN)"),
    ]
    look.legend_below(figure, handles)
    return figure


def _lift_zeros(tables: list[pd.DataFrame]) -> str:
    """Moves channels of zeros to where a logarithmic axis can show them.

    Returns:
        The sentence that says so, if there are any.
    """
    positive = np.concatenate([table["abs_mean"] for table in tables])
    lowest = positive[positive > 0].min(initial=np.inf)
    for table in tables:
        if np.isfinite(lowest):
            table[["abs_mean", "rms"]] = table[["abs_mean", "rms"]].replace(0, lowest / 2)
    zeros = positive.size - np.count_nonzero(positive)
    return f" Channels that are always 0 ({zeros}) lie at the lower edge." if zeros and np.isfinite(lowest) else ""


def _channel_cloud(panel: Axes, table: pd.DataFrame, values: pd.Series) -> None:
    image = len(table) > look.MOST_POINTS_AS_PATHS
    salient = table["salient"]
    dot: dict[str, Any] = {"markersize": 2, "markeredgewidth": 0, "rasterized": image}
    panel.plot(table["channel"][~salient], values[~salient], "o", color=look.BLUE, **dot)
    panel.plot(
        table["channel"][salient], values[salient], "^", color=look.VERMILLION, markersize=5.5, markeredgewidth=0
    )
