"""Figures of an evaluation: recipes by size and cost, layers by what each costs alone, and where the cost lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, PercentFormatter, StrMethodFormatter

from awq_pycuda.analysis import figure_style as look
from awq_pycuda.analysis.collect import Collection
from awq_pycuda.analysis.evaluations import MIXTURE, Evaluation, cost_ranks, without_original
from awq_pycuda.analysis.selection import layer_kinds, plural
from awq_pycuda.names import shorten, without_shared

Drawn = Iterator[tuple[str, Callable[[], Figure | None]]]

_MOST_LAYERS = 30  # of the ranking; the picture beside it has all
_BINS = 12  # of positions in a window
_NAME_GAP = 0.045  # between names of formats, as a share of the panel


def recipes(collection: Collection) -> Drawn:
    """For each evaluation: its recipes as points, bits of a weight against KL."""
    return each(collection, _recipes)


def layers_alone(collection: Collection) -> Drawn:
    """For each evaluation that has it: layers ranked by what each costs alone, beside its own SQNR."""
    return each(collection, _layers_alone)


def tokens(collection: Collection) -> Drawn:
    """For each evaluation: KL by position in the window, and how few tokens hold how much of it."""
    return each(collection, _tokens)


def each(collection: Collection, draw: Callable[[Evaluation], Figure | None]) -> Drawn:
    """The figure of each evaluation, named after it where they are several."""
    one = len(collection.evaluations) == 1
    for evaluation in collection.evaluations:
        yield "" if one else f"_{evaluation.name}", partial(draw, evaluation)


def about(evaluation: Evaluation) -> str:
    """The sentence that says what was evaluated."""
    root = evaluation.record.root
    windows = plural(len(evaluation.record.windows.tokens), "window")
    return f"{root['model']}, {root['predicted_tokens']:,} tokens predicted in {windows} of {root['window']:,}."


def _recipes(evaluation: Evaluation) -> Figure | None:
    """Left, size against KL, a line for each format from RTN on; right, the same recipes by name."""
    table = without_original(evaluation.recipes)
    table = table[(table["kl"] > 0) & np.isfinite(table["kl"])]
    if table.empty:
        return None
    note = f"{about(evaluation)} KL(P||Q) from the original's distribution P to the recipe's Q, mean over the tokens, "
    note += "in nats; intervals 95 %, by windows drawn again. A line joins the recipes of one format."
    figure = look.new_figure(10.2, max(4.8, 0.19 * len(table) + 1.8), "What each recipe costs the model", note)
    left, right = figure.subplots(1, 2, width_ratios=[5, 4])
    methods = sorted({*table["method"]} - {"RTN"}, key=lambda method: (not method, method))
    series = {method: index % look.MOST_SERIES for index, method in enumerate(methods)}
    for row in table.itertuples():
        _point(left, row.bits, row.kl, row, series, "y")
    look.log_axis(left, "y", [*table["kl_low"], *table["kl_high"], *table["kl"]])
    _bits_axis(left, table["bits"])
    _join_formats(left, table)
    left.set_xlabel("bits of a weight, with steps and zero points")
    left.set_ylabel("KL(P||Q) in nats")
    for place, row in enumerate(table.itertuples()):
        _point(right, row.kl, place, row, series, "x")
    look.log_axis(right, "x", [*table["kl_low"], *table["kl_high"], *table["kl"]])
    labels = [f"{shorten(row.recipe, 26)}  {row.bits:.2f}" for row in table.itertuples()]
    look.category_ticks(right, "y", labels, 60)
    right.set_ylim(len(table) - 0.4, -0.6)
    right.set_xlabel("KL(P||Q) in nats; beside the names bits of a weight")
    handles = [look.handle(0, "RTN", "#555555", "white", linestyle="none")] if (table["method"] == "RTN").any() else []
    handles += [look.handle(at, method or "mixture", linestyle="none") for method, at in series.items()]
    look.legend_below(figure, handles)
    return figure


def _bits_axis(panel: Axes, bits: pd.Series) -> None:
    """Sizes in octaves, so that what lies close together at 4 bits is told apart."""
    low, high = bits.min() / 1.1, bits.max() * 1.1
    panel.set_xscale("log", base=2)
    panel.set_xlim(low, high)
    panel.xaxis.set_minor_locator(NullLocator())
    step = 0.5 if high - low < 4 else 1.0
    even = np.arange(np.ceil(low / step), high / step) * step
    panel.xaxis.set_major_locator(FixedLocator(list(even if len(even) < 10 else 2.0 ** np.arange(8))))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _join_formats(panel: Axes, table: pd.DataFrame) -> None:
    """A line through the recipes of each format, up to its name above the panel; names keep apart."""
    named = table[~table["format"].isin(["", MIXTURE])].sort_values("bits", kind="stable")
    low, high = np.log(panel.get_xlim())
    panel.set_ylim(panel.get_ylim())  # lines up to the names change it no more
    line: dict[str, Any] = {"color": look.GREY, "linewidth": 0.7, "linestyle": ":", "zorder": 1, "clip_on": False}
    last = -_NAME_GAP
    for form, mine in named.groupby("format", sort=False):
        x = float(mine["bits"].iloc[0])
        place = (np.log(x) - low) / (high - low)
        last = max(place, last + _NAME_GAP)
        panel.plot(mine["bits"], mine["kl"], color=look.GREY, linewidth=1.6, zorder=1)
        panel.plot([x, x], [mine["kl"].max(), panel.get_ylim()[1]], **line)
        panel.plot([place, last], [1.0, 1.05], transform=panel.transAxes, **line)
        name: dict[str, Any] = {"rotation": 90, "fontsize": 7.5, "ha": "center", "va": "bottom"}
        panel.text(last, 1.06, str(form), transform=panel.transAxes, **name)


def _point(panel: Axes, x: float, y: float, row: Any, series: dict[str, int], along: str) -> None:
    """A recipe with its interval along the axis of KL; RTN hollow and grey."""
    at = series.get(row.method)
    colour = "#555555" if at is None else look.SERIES[at]
    ends = np.array([[row.kl - row.kl_low], [row.kl_high - row.kl]])
    bars = np.maximum(ends, 0) if np.isfinite(ends).all() else None
    panel.errorbar(
        [x],
        [y],
        xerr=bars if along == "x" else None,
        yerr=bars if along == "y" else None,
        fmt=look.MARKERS[at or 0],
        color=colour,
        markersize=4.8,
        markerfacecolor="white" if at is None else colour,
        elinewidth=1.4,
        zorder=3,
    )


def _layers_alone(evaluation: Evaluation) -> Figure | None:
    """Left the costliest layers and their own SQNR; right all of them, against what is known of each."""
    table = evaluation.layers
    table = table[(table["kl_alone"] > 0) & np.isfinite(table["kl_alone"])].sort_values("rank_alone")
    if table.empty:
        return None
    shown = table.head(_MOST_LAYERS)
    note = f"{about(evaluation)} KL of the model with that layer alone replaced by {evaluation.alone}; intervals 95 %, "
    note += "by windows drawn again. Spearman's ρ says how well what is known of layers ranks their cost: 1 is alike."
    if len(shown) < len(table):
        note += f" Left, the {len(shown)} costliest of {len(table)}."
    height = max(4.8, 0.17 * len(shown) + 1.2)
    figure = look.new_figure(10.2, height, "Which layer costs the model most", note)
    grid = figure.add_gridspec(2, 3, width_ratios=[4, 2, 4])
    left, middle = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])
    kinds = _kinds(table)
    series = {name: index % look.MOST_SERIES for index, name in enumerate(sorted(set(kinds)))}
    for place, (row, kind) in enumerate(zip(shown.itertuples(), kinds, strict=False)):
        colour = look.SERIES[series[kind]]
        left.hlines(place, row.kl_alone_low, row.kl_alone_high, color=colour, linewidth=2.2, alpha=0.45)
        for panel, value in ((left, row.kl_alone), (middle, row.output_sqnr_db)):
            panel.plot(value, place, look.MARKERS[series[kind]], color=colour, markersize=5)
    look.log_axis(left, "x", shown[["kl_alone", "kl_alone_low", "kl_alone_high"]])
    look.category_ticks(left, "y", without_shared(list(table["name"]))[: len(shown)], _MOST_LAYERS)
    look.category_ticks(middle, "y", [""] * len(shown), _MOST_LAYERS)
    for panel in (left, middle):
        panel.set_ylim(len(shown) - 0.4, -0.6)
    left.set_xlabel("KL(P||Q) in nats, this layer alone")
    middle.set_xlabel("its own SQNR (dB)")
    rho = cost_ranks(table)
    known = {
        "own": ("output_sqnr_db", "its own SQNR (dB)", "its own noise (−SQNR)"),
        "stream": ("stream_alone", "relative squared error, residual stream", "error of the stream behind its block"),
    }
    known = {name: what for name, what in known.items() if not np.isnan(rho[name])}
    for row, (name, (column, label, what)) in enumerate(known.items()):
        panel = figure.add_subplot(grid[row, 2] if len(known) > 1 else grid[:, 2])
        _costs(panel, table[column], table["kl_alone"], kinds, series)
        panel.set_xlabel(label)
        panel.set_title(f"{what}: ρ {rho[name]:.2f}")
    if len(series) > 1:
        look.legend_below(figure, [look.handle(at, name, linestyle="none") for name, at in series.items()])
    return figure


def _costs(panel: Axes, known: pd.Series, cost: pd.Series, kinds: list[str], series: dict[str, int]) -> None:
    """Every layer's cost against what is known of it, a marker for each kind."""
    for name, at in series.items():
        mine = np.array([kind == name for kind in kinds])
        panel.plot(known[mine], cost[mine], look.MARKERS[at], color=look.SERIES[at], markersize=4, alpha=0.75)
    look.scale_to(panel, "x", known[np.isfinite(known)])
    if panel.get_xscale() == "log":
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=12))
    look.log_axis(panel, "y", cost)
    panel.set_ylabel("KL(P||Q), alone")


def _kinds(table: pd.DataFrame) -> list[str]:
    """What each layer is; all alike where there are too many kinds."""
    found = layer_kinds(list(table["name"]))
    return found if len(set(found)) <= look.MOST_SERIES else ["layers"] * len(found)


def _tokens(evaluation: Evaluation) -> Figure | None:
    """Left, mean KL by position in the window; right, the share of all KL that the tokens with the most of it hold."""
    table = without_original(evaluation.recipes)
    table = table[(table["kl"] > 0) & np.isfinite(table["kl"])]
    if table.empty:
        return None
    shown = _few(table)
    note = f"{about(evaluation)} Left, means over the windows of the tokens at like positions. Right, tokens from the "
    note += "one with the highest KL on; dotted, all alike."
    if len(shown) < len(table):
        note += f" {len(shown)} of {len(table)} recipes: of each format the one of the lowest KL."
    figure = look.new_figure(9.6, 3.8, "Where in the text the cost lies", note)
    left, right = figure.subplots(1, 2)
    right.plot([0, 1], [0, 1], color=look.BLACK, linewidth=0.9, linestyle=":")
    position = _positions(evaluation)
    edges = np.unique(np.geomspace(1, position.max() + 1, _BINS + 1).astype(int))
    everything = []
    for series, row in enumerate(shown.itertuples()):
        kl = evaluation.record.recipes[row.index].of_tokens.kl
        which = np.searchsorted(edges, position, side="right") - 1
        counts = np.bincount(which, minlength=len(edges))
        used = counts > 0
        means = np.bincount(which, kl, len(edges))[used] / counts[used]
        centres = np.bincount(which, position, len(edges))[used] / counts[used]
        look.marked_line(left, centres, means, series)
        everything += list(means)
        held = np.cumsum(np.sort(kl)[::-1]) / kl.sum()
        right.plot(np.arange(1, kl.size + 1) / kl.size, held, color=look.SERIES[series], linewidth=1.4)
    look.log_axis(left, "x", [*position, 1])
    look.log_axis(left, "y", everything)
    left.set_xlabel("position in the window")
    left.set_ylabel("KL(P||Q) in nats")
    right.set_xlabel("share of the tokens")
    right.set_ylabel("share of all KL that they hold")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    look.legend_below(figure, [look.handle(series, row.recipe) for series, row in enumerate(shown.itertuples())])
    return figure


def _few(table: pd.DataFrame) -> pd.DataFrame:
    """The recipes themselves where they are few, else of each format the best one, of formats the smallest."""
    if len(table) <= look.MOST_SERIES:
        return table
    best = table.sort_values("kl", kind="stable").drop_duplicates("format")
    return table[table["recipe"].isin(best["recipe"])].head(look.MOST_SERIES)


def _positions(evaluation: Evaluation) -> Any:
    """(T,): how many tokens of its window stand before each, from 1."""
    counts: Sequence[int] = evaluation.record.windows.tokens.tolist()
    return np.concatenate([np.arange(1, count + 1) for count in counts])
