"""Figures of the error that quantization leaves: SQNR by layer, and its propagation by depth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from awq_pycuda.analysis import figure_style as look
from awq_pycuda.analysis.collect import Collection
from awq_pycuda.analysis.selection import complete_layers, layer_labels, starts_chain, variants, who
from awq_pycuda.spread import QUARTILES

_MOST_ROWS = 60


def _finite_layers(collection: Collection, columns: list[str]) -> pd.DataFrame:
    """The layers whose every one of these is a number: a layer without any error has an infinite SQNR."""
    layers = complete_layers(collection)
    return layers[np.isfinite(layers[columns]).all(axis=1)]


def sqnr(collection: Collection) -> Figure | None:
    """SQNR of each layer's output, RTN against AWQ, and the gain between them."""
    layers = _finite_layers(collection, ["output_sqnr_db", "rtn_output_sqnr_db"])
    if layers.empty:
        return None
    labels = layer_labels(layers)
    groups = variants(collection, look.MOST_SERIES)
    if len(groups) > 1 and len(groups) * len(labels) > _MOST_ROWS:
        groups = []
    note = who(collection, groups, spread="bars") + ("" if groups else " Right, every run.")
    height = len(labels) * (0.15 * max(1, len(groups)) + 0.13)
    figure = look.new_figure(
        7.6, min(14.0, max(1.3, height) + 1.1), "SQNR of each layer's output: RTN against AWQ", note
    )
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    place = {layer: row for row, layer in enumerate(labels)}
    for series, group in enumerate(groups):
        mine = layers[layers["run"] == group.runs[0]]
        beside = 0.7 * ((series + 0.5) / len(groups) - 0.5)
        _dumbbells(left, right, mine, mine["layer"].map(place).to_numpy(float) + beside, look.SERIES[series])
    if not groups:
        _quartiles_and_points(left, right, layers, layers["layer"].map(place).to_numpy(float))
    look.category_ticks(left, "y", list(labels.values()), _MOST_ROWS)
    left.set_ylim(len(labels) - 0.4, -0.6)
    left.set_xlabel("SQNR of the output (dB)")
    right.set_xlabel("gain of AWQ over RTN (dB)")
    right.axvline(0, color=look.BLACK, linewidth=0.9, linestyle=":")
    kinds = [
        look.handle(0, name, "#555555", face, linestyle="none") for name, face in (("RTN", "white"), ("AWQ", None))
    ]
    look.legend_below(figure, kinds + (look.variant_handles(groups, "o") if len(groups) > 1 else []))
    return figure


def _dumbbells(left: Axes, right: Axes, rows: pd.DataFrame, y: Any, colour: str) -> None:
    rtn, awq = rows["rtn_output_sqnr_db"].to_numpy(float), rows["output_sqnr_db"].to_numpy(float)
    left.hlines(y, rtn, awq, color=colour, linewidth=2.2, alpha=0.45)
    left.plot(rtn, y, "o", markersize=5.5, markerfacecolor="white", markeredgecolor=colour, markeredgewidth=1.3)
    left.plot(awq, y, "o", markersize=5.5, color=colour)
    right.hlines(y, 0, awq - rtn, color=colour, linewidth=2.2, alpha=0.45)
    right.plot(awq - rtn, y, "o", markersize=4.5, color=colour)


def _quartiles_and_points(left: Axes, right: Axes, layers: pd.DataFrame, y: Any) -> None:
    spread = layers.groupby(y)[["rtn_output_sqnr_db", "output_sqnr_db"]].quantile(list(QUARTILES)).unstack()
    for name, beside, face in (("rtn_output_sqnr_db", -0.14, "white"), ("output_sqnr_db", 0.14, look.BLUE)):
        rows = spread.index.to_numpy() + beside
        left.hlines(rows, spread[name, 0.25], spread[name, 0.75], color=look.BLUE, linewidth=2.2, alpha=0.45)
        left.plot(spread[name, 0.5], rows, "o", markersize=5.5, markerfacecolor=face, markeredgecolor=look.BLUE)
    gain = (layers["output_sqnr_db"] - layers["rtn_output_sqnr_db"]).to_numpy(float)
    jitter = 0.3 * (np.random.default_rng(0).random(y.size) * 2 - 1)
    image = y.size > look.MOST_POINTS_AS_PATHS
    dot: dict[str, Any] = {"markersize": 2.2 if image else 4, "markeredgewidth": 0, "alpha": 0.4, "rasterized": image}
    right.plot(gain, y + jitter, "o", color=look.BLUE, **dot)
    medians = pd.Series(gain).groupby(y).median()
    right.plot(medians, medians.index, "|", markersize=13, markeredgewidth=2, color=look.BLACK)


def propagation(collection: Collection) -> Figure | None:
    """SQNR by depth: of each layer alone, and against the chain that is unquantized from its first layer on.

    None where no layer takes over an error of those before it.
    """
    kinds = {
        "output_sqnr_db": "error of this layer alone",
        "propagated_sqnr_db": "with the error of the layers before it",
    }
    layers = _finite_layers(collection, list(kinds))
    if layers.empty:
        return None
    fresh = starts_chain(layers)
    if fresh.all():  # every layer is the first or has activations of its own: no error is carried over
        return None
    groups = variants(collection, look.MOST_SERIES)
    note = who(collection, groups, spread="bands")
    if groups and fresh[layers["layer"] > 0].any():
        note += " A line ends where a layer has activations of its own."
    figure = look.new_figure(6.8, 3.7, "Error propagation by depth (AWQ)", note)
    axes = figure.subplots()
    styles: list[dict[str, Any]] = [{"linestyle": "--", "markerfacecolor": "white"}, {}]
    handles = []
    for series, group in enumerate(groups):
        mine = layers[layers["run"] == group.runs[0]].sort_values("layer")
        mine = _with_breaks(mine[["layer", *kinds]], starts_chain(mine))
        for column, options in zip(kinds, styles, strict=True):
            look.marked_line(axes, mine["layer"], mine[column], series, **options)
    if groups:
        handles = [look.handle(0, name, look.GREY, **style) for name, style in zip(kinds.values(), styles, strict=True)]
        handles += look.variant_handles(groups) if len(groups) > 1 else []
    else:
        for series, (column, name), options in zip((1, 0), kinds.items(), styles, strict=True):
            band = layers.groupby("layer")[column].quantile(list(QUARTILES)).unstack()
            axes.fill_between(band.index, band[0.25], band[0.75], color=look.SERIES[series], alpha=0.15, linewidth=0)
            middle = _with_breaks(band.reset_index(), pd.Series(fresh).groupby(layers["layer"].to_numpy()).all())
            look.marked_line(axes, middle["layer"], middle[0.5], series, **options)
            handles.append(look.handle(series, name, **options))
    axes.set_xlabel("layer")
    axes.set_ylabel("SQNR of the output (dB)")
    look.layer_ticks(axes, sorted(layers["layer"].unique()))
    look.legend_below(figure, handles)
    return figure


def _with_breaks(rows: pd.DataFrame, fresh: Any) -> pd.DataFrame:
    """The rows with an empty one before each that starts a chain (`fresh`), where a line must end."""
    rows = rows.astype(float).reset_index(drop=True)
    gaps = pd.DataFrame(np.nan, index=rows.index[np.asarray(fresh)] - 0.5, columns=rows.columns)
    return pd.concat([rows, gaps]).sort_index()
