"""Figures of the layers by swept key: what a recipe is worth on held-out tokens, and which γ is best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from awq_pycuda.analysis import figure_style as look
from awq_pycuda.analysis.collect import Collection, by_gamma
from awq_pycuda.analysis.figures_search import same_grid, where_rtn_is
from awq_pycuda.analysis.selection import (
    complete_layers,
    complete_runs,
    format_value,
    in_order,
    key_name,
    layer_labels,
    swept_keys,
)
from awq_pycuda.names import shorten
from awq_pycuda.spread import QUARTILES

_MOST_PANELS = 9
_MOST_BESIDE = 6  # series of a panel
_HIGHEST = 1.6  # of RTN's error: what lies above is of no use, and hides how flat the rest is
_MOST_CURVES = 3  # the same of bands, which lie on each other
_FEWEST_LAYERS = 6  # of which quartiles, and shares, tell something
_NAMED = -0.05  # a share of RTN's error: the layers that lose more are named
_AT = {"error_removed": -0.2, "held_out_error_removed": 0.2}  # where a figure stands beside its series' place


def _side_by_side(collection: Collection) -> tuple[str, pd.DataFrame] | None:
    """The key that panels are for, and by complete run its `panel` and its `series`: the values of the other keys.

    It is the first one that is swept, but the seed. None where there is none, or too many panels or series.
    """
    keys = [key for key in swept_keys(collection) if key != "seed"]
    if not keys:
        return None
    runs = complete_runs(collection).set_index("run")
    first, *others = keys
    texts = [runs[key].map(format_value).map(lambda text: shorten(text, 20)) for key in others]
    if len(others) > 1:
        texts = [key_name(key) + "=" + text for key, text in zip(others, texts, strict=True)]
    series = texts[0].str.cat(texts[1:], sep="\n") if texts else pd.Series("", runs.index)
    found = pd.DataFrame({"panel": runs[first].map(format_value), "series": series})
    few = found["panel"].nunique() <= _MOST_PANELS and found["series"].nunique() <= _MOST_BESIDE
    return (key_name(first), found) if few else None


def _grid(panels: Sequence[str], title: str, note: str, width: float, ratios: Sequence[float]) -> tuple[Figure, Any]:
    """A figure with a named place for each panel; comes with the axes of its parts: (parts, panels)."""
    count = len(panels)
    columns = count if count < 4 else 2 if count == 4 else 3
    lines = -(-count // columns)
    figure = look.new_figure(max(6.8, width * columns), 2.9 * lines + 0.4, title, note)
    rows = lines * len(ratios)
    axes = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False, height_ratios=[*ratios] * lines)
    parts = np.stack([axes[part :: len(ratios)].ravel() for part in range(len(ratios))])
    look.hide(parts[:, count:].flat)
    for panel, name in zip(parts[0], panels, strict=False):
        panel.set_title(shorten(name))
    return figure, parts


def held_out(collection: Collection) -> Figure | None:
    """The share of RTN's error that is removed from each layer, on the tokens searched on and on those held out.

    A panel per value of the first swept key; None where no tokens were held out, or what is swept is too much.
    """
    layers = complete_layers(collection)
    layers = layers[np.isfinite(layers[list(_AT)]).all(axis=1)]
    asked = _side_by_side(collection)
    if layers.empty or asked is None:
        return None
    key, runs = asked
    layers = layers.join(runs, on="run")
    panels, series = in_order(layers["panel"]), in_order(layers["series"])
    note = f"By {key}; a line per layer, from the tokens searched on to those held out, and the medians of both. "
    note += f"Named: layers that lose more than {-100 * _NAMED:g} % on held-out tokens."
    figure, (axes,) = _grid(panels, "Error removed, layer by layer", note, 0.72 * max(4, len(series)), (1.0,))
    labels = layer_labels(layers)
    low, high = (edge(layers[list(_AT)].to_numpy(float)) for edge in (np.min, np.max))
    for panel, name in zip(axes, panels, strict=False):
        mine = layers[layers["panel"] == name]
        for place, one in enumerate(series):
            _strip(panel, mine[mine["series"] == one], place, image=len(layers) > look.MOST_POINTS_AS_PATHS)
        panel.set_ylim(low - 0.1 * (high - low), high + 0.05 * (high - low))
        _name_losers(panel, mine, series, labels)
        panel.axhline(0, color=look.BLACK, linewidth=0.9, linestyle=":")
        panel.set_xlim(-0.6, len(series) - 0.4)
        look.category_ticks(panel, "x", [one.replace(" + ", "\n+ ") for one in series])
        panel.tick_params(labelbottom=True, labelleft=True)
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.supylabel("error removed against RTN", fontsize=9)
    named = ("tokens searched on", "held-out tokens")
    look.legend_below(figure, [look.handle(series, name, linestyle="none") for series, name in enumerate(named)])
    return figure


def _strip(panel: Axes, layers: pd.DataFrame, place: int, image: bool) -> None:
    """One series of a panel: a line for each layer from the one figure to the other, and the medians."""
    places = [place + beside for beside in _AT.values()]
    values = layers[list(_AT)].to_numpy(float).T
    panel.plot(places, values, color=look.GREY, linewidth=0.6, alpha=0.5, zorder=1, rasterized=image)
    for series, (at, these) in enumerate(zip(places, values, strict=True)):
        colour = look.SERIES[series]
        dots: dict[str, Any] = {"linestyle": "none", "markersize": 3, "markeredgewidth": 0, "alpha": 0.75}
        dots |= {"color": colour, "marker": look.MARKERS[series], "rasterized": image}
        panel.plot(np.full(these.size, at), these, **dots)
        if these.size:
            panel.hlines(np.median(these), at - 0.17, at + 0.17, color=colour, linewidth=2.6, zorder=3)


def _name_losers(panel: Axes, layers: pd.DataFrame, series: Sequence[str], labels: dict[int, str]) -> None:
    """The name of each layer that loses much in a panel, beside and below its lowest point on held-out tokens."""
    layers = layers.assign(lowest=layers.groupby("layer")[list(_AT)].transform("min").min(axis=1))
    worst = layers.sort_values("held_out_error_removed", kind="stable").drop_duplicates("layer")
    worst = worst.loc[worst["held_out_error_removed"] < _NAMED, ["layer", "series", "lowest"]]
    line = 0.06 * np.ptp(panel.get_ylim())  # of text
    height = np.inf
    for layer, one, lowest in worst[::-1].itertuples(index=False):
        height = min(lowest - line / 4, height - line)
        left = series.index(one) >= (len(series) - 1) / 2  # of the point, where the panel has more room
        place = series.index(one) + (_AT["error_removed"] - 0.1 if left else _AT["held_out_error_removed"] + 0.1)
        label = shorten(labels[int(layer)], 24)
        panel.text(place, height, label, ha="right" if left else "left", va="top", fontsize=7, color="#444444")


def curves_by_sweep(collection: Collection) -> Figure | None:
    """The error of the scale search over γ, over the layers, with how often each γ was chosen.

    A panel per value of the first swept key; in it, of runs that searched the same, one series. None where the runs
    searched different grids of gammas, the layers are few, or what is swept is too much.
    """
    curves = by_gamma(collection.curves[collection.curves["run"].isin(complete_runs(collection)["run"])])
    curves = curves[np.isfinite(curves["error_relative"]) & (curves["error_relative"] > 0)]
    curves = curves[curves.groupby("run")["gamma"].transform("nunique") > 1]
    asked = _side_by_side(collection)
    if asked is None or curves.empty or curves["layer"].nunique() < _FEWEST_LAYERS:
        return None
    curves, shown = same_grid(curves)
    key, runs = asked
    curves = _searched_alike(curves.join(runs, on="run"))
    panels, names = in_order(curves["panel"]), in_order(curves["series"])
    if len(panels) < 2 or len(names) > _MOST_CURVES:
        return None
    bands = curves.groupby(["panel", "series", "gamma"])["error_relative"].quantile(list(QUARTILES))
    note = f"By {key}, over the layers of {shown}: medians, bands between the quartiles, above them the share of the "
    note += f"layers that chose each γ. {where_rtn_is(curves)}."
    if bands.max() > _HIGHEST:
        note += f" Above {_HIGHEST:g} nothing is shown."
    figure, (above, below) = _grid(panels, "Error of the scale search over γ", note, 3.1, (1.0, 2.6))
    gammas = np.unique(curves["gamma"])
    width = 0.8 * np.diff(gammas).min() / len(names)
    for share, panel, name in zip(above, below, panels, strict=False):
        for place, one in enumerate(names):
            mine = curves[(curves["panel"] == name) & (curves["series"] == one)]
            if mine.empty:
                continue
            chosen = mine.loc[mine["chosen"], "gamma"].value_counts(normalize=True)
            beside = (place - (len(names) - 1) / 2) * width
            share.bar(chosen.index + beside, chosen.to_numpy(), width=width, color=look.SERIES[place])
            band = bands[name, one].unstack()
            panel.fill_between(band.index, band[0.25], band[0.75], color=look.SERIES[place], alpha=0.16, linewidth=0)
            panel.plot(band.index, band[0.5], color=look.SERIES[place], linestyle="-" if place == 0 else "--")
        panel.axhline(1, color=look.BLACK, linewidth=0.9, linestyle=":")
        panel.tick_params(labelbottom=True, labelleft=True)
        panel.set_xlabel("γ")
        panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        share.yaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
        share.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        share.tick_params(labelleft=True)
        panel.set_ylim(0.98 * bands.min(), min(1.02 * bands.max(), _HIGHEST))
    below[0].set_ylabel("search error / RTN's")
    above[0].set_ylabel("layers")
    handles = [Patch(color=look.SERIES[place], label=name) for place, name in enumerate(names)]
    look.legend_below(figure, handles)
    return figure


def _searched_alike(curves: pd.DataFrame) -> pd.DataFrame:
    """The curves with one run for each panel and curve; its `series` names those of all runs that it stands for."""
    whole = curves.groupby(["panel", "run"], sort=False)["error"].agg(lambda error: error.to_numpy().tobytes())
    alike = whole.reset_index().groupby(["panel", "error"], sort=False)["run"].agg(list)
    series = curves.drop_duplicates("run").set_index("run")["series"]
    named = {runs[0]: " / ".join(dict.fromkeys(series[runs])) for runs in alike}
    return curves[curves["run"].isin(named)].assign(series=curves["run"].map(named))
