"""Figures of what a sweep is for: how much of RTN's error AWQ removes by each swept key, and what each grid finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from awq_pycuda.analysis import figure_style as look
from awq_pycuda.analysis.collect import Collection, by_gamma
from awq_pycuda.analysis.selection import (
    complete_layers,
    complete_runs,
    format_value,
    in_order,
    key_name,
    numeric,
    plural,
    removed_medians,
    starts_chain,
    swept_keys,
)
from awq_pycuda.names import shorten
from awq_pycuda.spread import QUARTILES

_MOST_PANELS = 9
_SAME = 5e-5  # a share of RTN's error below which a key is taken to change nothing: kernels sum in different orders


def error_removed_against(collection: Collection) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """One figure per swept key (columns, and what draws them) but the seed: the error removed against its values.

    The share of RTN's output MSE that AWQ removes, of a run as the median over its layers: a sum would show the last
    ones alone where the activations grow from layer to layer. A line for each combination of the other swept keys
    where they are few, with a band from the lowest seed to the highest, or of the layers' quartiles where no seed is
    swept; medians and quartiles over all runs where they are many. A second panel has the same on held-out tokens,
    where there are any. Keys that change nothing are left out.
    """
    layers = complete_layers(collection)
    layers = layers[np.isfinite(layers["error_removed"].astype(float))]
    if layers.empty:
        return
    keys = swept_keys(collection)
    removed = removed_medians(collection)
    by_run = complete_runs(collection).set_index("run").assign(removed=removed)[np.isfinite(removed)]
    by_run["held_out"] = layers.groupby("run")["held_out_error_removed"].median()
    layers = layers[layers["run"].isin(by_run.index)]
    # A row per layer, and not per run, where the layers are all that spreads.
    by_layer = by_run.loc[layers["run"]].assign(
        removed=layers["error_removed"].to_numpy(), held_out=layers["held_out_error_removed"].to_numpy()
    )
    for key, along in keys.items():
        others = [other for other in keys if other not in (key, "seed")]
        if key != "seed" and _matters(by_run, key, [other for other in keys if other != key]):
            rows = by_run if "seed" in keys else by_layer
            few = _combinations(by_run, others).nunique() <= look.MOST_SERIES
            yield key, partial(_figure, rows if few else by_run, key, along, others, few, "seed" in keys)


class _Share(PercentFormatter):
    """Per cent; in powers of ten where so many digits would leave no room for the plot."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return super().__call__(x, pos) if abs(x) < 1e6 else f"{100 * x:.0e}%"


def _matters(runs: pd.DataFrame, key: str, others: Sequence[str]) -> bool:
    """Whether runs that differ in this key alone differ in what they remove."""
    groups = runs.groupby(_combinations(runs, others))["removed"]
    return runs[key].map(format_value).nunique() > 1 and bool((groups.max() - groups.min()).max() > _SAME)


def _combinations(runs: pd.DataFrame, keys: Sequence[str]) -> pd.Series:
    """A label for each run: its values of these keys."""
    parts = [key_name(key) + "=" + runs[key].map(format_value).map(lambda text: shorten(text, 20)) for key in keys]
    return parts[0].str.cat(parts[1:], sep=", ") if parts else pd.Series("", runs.index)


def _figure(
    rows: pd.DataFrame, key: str, along: Sequence[str], others: Sequence[str], few: bool, seeds: bool
) -> Figure:
    others = [other for other in others if rows[other].map(format_value).nunique() > 1]
    combinations = _combinations(rows, others)
    if not few:
        note = f"Median over {plural(len(rows), 'run')}, band between the quartiles. A run counts with the median over "
        note += "its layers."
    elif seeds:
        note = "Medians over the seeds, bands from the lowest seed to the highest. A run counts with the median over "
        note += "its layers."
    else:
        note = "Medians over the layers, bands between their quartiles."
    if along and not _equal(rows, [key, *along]):
        note += f" Along with {key_name(key)} changes {', '.join(map(key_name, along))}."
    shown = {"removed": "the tokens searched on", "held_out": "held-out tokens"}
    if not np.isfinite(rows["held_out"]).any():
        del shown["held_out"]
    title = f"Output error that AWQ removes, against {key_name(key)}"
    figure = look.new_figure(6.8 if len(shown) == 1 else 9.6, 4.0, title, note)
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    labels = _sorted(rows, others, combinations) if few else []
    for panel, (column, tokens) in zip(axes, shown.items(), strict=True):
        panel.set_title(tokens if len(shown) > 1 else "")
        _against(panel, rows, column, key, [combinations == label for label in labels], seeds)
        panel.set_xlabel(" = ".join(map(key_name, [key, *along])) if _equal(rows, [key, *along]) else key_name(key))
    axes[0].set_ylabel("error removed against RTN")
    axes[0].yaxis.set_major_formatter(_Share(1))
    if len(labels) > 1:
        handles = [look.handle(series, label, **_series_style(series)) for series, label in enumerate(labels)]
        look.legend_below(figure, handles)
    return figure


def _against(panel: Axes, rows: pd.DataFrame, column: str, key: str, groups: Sequence[pd.Series], seeds: bool) -> None:
    """One panel: a line for each of the groups of rows; without any, quartiles over all of them."""
    to_scale = numeric(rows[key])
    order = in_order(rows[key])
    x = rows[key].astype(float) if to_scale else rows[key].map(format_value).map(order.index).astype(float)
    shares = (0.0, 0.5, 1.0) if groups and seeds else QUARTILES
    for series, mine in enumerate(groups or [pd.Series(True, rows.index)]):
        beside = 0.6 * ((series + 0.5) / len(groups) - 0.5) if groups and not to_scale else 0.0
        spread = rows.loc[mine, column].groupby(x[mine]).quantile(list(shares)).unstack()
        _line(panel, spread, series, to_scale, beside)
    panel.axhline(0, color=look.BLACK, linewidth=0.9, linestyle=":")
    if to_scale:
        look.scale_to(panel, "x", x)
        look.value_ticks(panel, sorted(set(x)))
    else:
        look.category_ticks(panel, "x", [shorten(text, 28) for text in order], 12)
        panel.set_xlim(-0.5, len(order) - 0.5)


def _equal(runs: pd.DataFrame, keys: Sequence[str]) -> bool:
    return all((runs[key].map(format_value) == runs[keys[0]].map(format_value)).all() for key in keys)


def _sorted(runs: pd.DataFrame, keys: Sequence[str], combinations: pd.Series) -> list[str]:
    """The combinations, ordered by their first key's values, then the next one's."""
    places = pd.DataFrame({key: runs[key].map(format_value).map(in_order(runs[key]).index) for key in keys})
    return list(combinations[places.sort_values(list(keys)).index].unique()) if keys else list(combinations.unique())


def _series_style(series: int) -> dict[str, Any]:
    """Every other line is dashed, with hollow markers: of two that coincide both show."""
    return {"linestyle": "--", "markerfacecolor": "white"} if series % 2 else {}


def _line(panel: Axes, spread: pd.DataFrame, series: int, joined: bool, beside: float) -> None:
    """A line with a band where x is to scale; else a marker with a bar, `beside` its category's place."""
    low, middle, high = (spread[column] for column in spread.columns)
    if joined:
        panel.fill_between(spread.index, low, high, color=look.SERIES[series], alpha=0.13, linewidth=0)
        look.marked_line(panel, spread.index, middle, series, **_series_style(series))
    else:
        panel.vlines(spread.index + beside, low, high, color=look.SERIES[series], linewidth=2.4, alpha=0.4)
        look.marked_line(panel, spread.index + beside, middle, series, **_series_style(series) | {"linestyle": "none"})


def curves_by_grid(collection: Collection) -> Figure | None:
    """What each gamma grid chooses, beside the error curves of the finest grid; None where no grid is swept.

    A panel per combination of the other swept keys but the seed, of which the lowest is shown: curves of many seeds
    would hide one another. None too where the panels are too many.
    """
    runs = complete_runs(collection).set_index("run")
    seeds = "seed" in collection.swept
    if seeds:
        runs = runs[runs["seed"] == runs["seed"].min()]
    curves = by_gamma(collection.curves[collection.curves["run"].isin(runs.index)])
    curves = curves[np.isfinite(curves["error_relative"]) & (curves["error_relative"] > 0)]
    sizes = sorted(set(runs.loc[curves["run"].unique(), "gamma_grid_size"]))
    names = [key for key in swept_keys(collection) if key not in ("gammas", "gamma_grid_size", "seed")]
    panels = _sorted(runs, names, _combinations(runs, names))
    searched = [size for size in sizes if size > 1]  # one gamma is RTN: nothing is chosen
    if not 2 <= len(searched) <= look.MOST_SERIES or len(panels) > _MOST_PANELS:
        return None
    note = f"Grey: a line for each layer, searched with {searched[-1]} γ. Markers: the choice in each layer."
    note += f" Runs with seed={format_value(runs['seed'].iloc[0])}." if seeds else ""
    columns = 1 if len(panels) == 1 else 2 if len(panels) in (2, 4) else 3
    lines = -(-len(panels) // columns)
    title = "Choices of each γ grid on the error curve"
    figure = look.new_figure(max(6.8, 3.4 * columns), 2.6 * lines + 0.5, title, note)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    look.hide(axes.flat[len(panels) :])
    curves = curves.assign(
        size=curves["run"].map(runs["gamma_grid_size"]), panel=curves["run"].map(_combinations(runs, names))
    )
    for panel, name in zip(axes.flat, panels, strict=False):
        mine = curves[curves["panel"] == name]
        for _, curve in mine[mine["size"] == searched[-1]].sort_values("gamma").groupby(["run", "layer"]):
            panel.plot(curve["gamma"], curve["error_relative"], color=look.GREY, linewidth=0.8, alpha=0.6)
        chosen = mine[mine["chosen"]]
        for series, size in enumerate(searched):
            points = chosen[chosen["size"] == size]
            panel.plot(points["gamma"], points["error_relative"], **_choice(series))
        panel.axhline(1, color=look.BLACK, linewidth=0.9, linestyle=":")
        panel.set_title(name.replace(", ", "\n"))
        panel.margins(0.05)
    look.scale_to(axes[0, 0], "y", curves["error_relative"])
    for panel in axes[:, 0]:
        panel.set_ylabel("search error / RTN's")
    look.label_lowest(axes, "γ")
    look.legend_below(
        figure, [look.handle(series, f"{size} γ", **_choice(series)) for series, size in enumerate(searched)]
    )
    return figure


def propagation_by_sweep(collection: Collection) -> Figure | None:
    """SQNR by depth against the unquantized chain, a line per combination of the swept keys but the seed.

    For sweeps over seeds in which every run came out differently; None where no error is carried from layer to layer,
    or the combinations are too many.
    """
    runs = complete_runs(collection).set_index("run")
    keys = swept_keys(collection)
    layers = complete_layers(collection)
    layers = layers[np.isfinite(layers["propagated_sqnr_db"].astype(float))]
    combinations = _combinations(runs, [key for key in keys if key != "seed"])
    drawn = set(layers["run"].map(combinations))  # those without any finite figure are not
    labels = [label for label in _sorted(runs, [key for key in keys if key != "seed"], combinations) if label in drawn]
    if "seed" not in keys or len(labels) > look.MOST_SERIES or starts_chain(layers).all():
        return None
    note = "Error of the layer and of all before it. Medians over the seeds, bands from the lowest seed to the "
    note += "highest. Dotted: the median run's first layer less 10·log₁₀(layers): errors that are independent "
    note += "and of one size."
    figure = look.new_figure(6.8, 4.0, "Error propagation by depth", note)
    panel = figure.subplots()
    for series, label in enumerate(labels):
        mine = layers[layers["run"].map(combinations) == label]
        spread = mine.groupby("layer")["propagated_sqnr_db"].quantile([0.0, 0.5, 1.0]).unstack()
        _line(panel, spread, series, joined=True, beside=0.0)
    depth = np.sort(layers["layer"].unique())
    first = layers.loc[layers["layer"] == depth[0], "propagated_sqnr_db"].median()
    panel.plot(depth, first - 10 * np.log10(1 + depth - depth[0]), color=look.BLACK, linewidth=1.2, linestyle=":")
    panel.set_xlabel("layer")
    panel.set_ylabel("SQNR of the output (dB)")
    look.layer_ticks(panel, list(depth))
    if len(labels) > 1:
        look.legend_below(
            figure, [look.handle(series, label, **_series_style(series)) for series, label in enumerate(labels)]
        )
    return figure


def _choice(series: int) -> dict[str, Any]:
    face: dict[str, Any] = {"markeredgecolor": look.SERIES[series], "markerfacecolor": "white", "markeredgewidth": 1.4}
    return {"linestyle": "none", "marker": look.MARKERS[series], "markersize": 5.5} | face
