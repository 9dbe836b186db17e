"""Figures of recipes against RTN: whether what layers gain reaches the model, and how many tokens that takes."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from awq_pycuda.analysis import figure_style as look
from awq_pycuda.analysis.collect import Collection
from awq_pycuda.analysis.evaluations import Evaluation, without_original
from awq_pycuda.analysis.figures_evaluation import Drawn, about, each
from awq_pycuda.results.reader import config_by_key

_FEWEST = 3  # numbers of tokens that are a curve


def gains(collection: Collection) -> Drawn:
    """For each evaluation: what recipes remove of their layers' error against what they remove of RTN's KL."""
    return each(collection, _gains)


def draws(collection: Collection) -> Drawn:
    """For each evaluation whose recipes were searched on unlike numbers of tokens: KL against these."""
    return each(collection, _draws)


def against_rtn(evaluation: Evaluation) -> pd.DataFrame:
    """The recipes that have an RTN of their format beside them, with shares of RTN's: 1 is all, below 0 is worse.

    `removed`, `removed_low` and `removed_high` are of its KL on the same tokens, `own` is the median over the layers of
    what the recipe's run removes of their output errors.
    """
    found = without_original(evaluation.recipes).sort_values("index")
    over = ["kl_over_rtn", "kl_over_rtn_low", "kl_over_rtn_high"]
    found = found[found["kl_over_rtn"].notna()].astype(dict.fromkeys(over, float))
    found = found[found["kl"] > found["kl_over_rtn"]].copy()
    rtn = found["kl"] - found["kl_over_rtn"]
    for column, of in (
        ("removed", "kl_over_rtn"),
        ("removed_low", "kl_over_rtn_high"),
        ("removed_high", "kl_over_rtn_low"),
    ):
        found[column] = -found[of] / rtn
    layers = evaluation.layers
    own = 1 - 10 ** ((layers["rtn_output_sqnr_db"] - layers["output_sqnr_db"]) / 10)
    found["own"] = found["recipe"].map(own.groupby(layers["recipe"]).median())
    return found


def tokens_of(evaluation: Evaluation, recipes: pd.DataFrame) -> list[float]:
    """How many tokens each of these recipes was searched on; NaN where its config does not say."""
    found = []
    for index in recipes["index"]:
        config = evaluation.record.recipes[index].config
        tokens = config_by_key(config).get("tokens") if config else None
        found.append(float("nan" if tokens is None else tokens))
    return found


def _gains(evaluation: Evaluation) -> Figure | None:
    table = against_rtn(evaluation)
    table = table[table["own"].notna()]
    if table.empty:
        return None
    note = (
        f"{about(evaluation)} A layer's share is of RTN's output error on the tokens searched on, the median layer's; "
    )
    note += "the model's is of RTN's KL(P||Q) in the same format, with its 95 % interval, by windows drawn again."
    figure = look.new_figure(7.2, 4.6, "Does what layers gain reach the model?", note)
    panel = figure.subplots()
    formats = list(dict.fromkeys(table["format"]))
    methods = list(dict.fromkeys(table["method"]))
    for row in table.itertuples():
        colour = look.SERIES[formats.index(row.format) % look.MOST_SERIES]
        marker = look.MARKERS[methods.index(row.method) % look.MOST_SERIES]
        panel.plot([row.own] * 2, [row.removed_low, row.removed_high], color=colour, linewidth=1.4, zorder=2)
        panel.plot(row.own, row.removed, marker=marker, color=colour, markersize=6, linestyle="none", zorder=3)
    ends = [*table["own"], *table["removed_low"], *table["removed_high"], 0.0]
    low, high = np.nanmin(ends), np.nanmax(ends)
    panel.axhline(0, color=look.GREY, linewidth=0.9)
    panel.axline((0, 0), slope=1, color=look.BLACK, linewidth=0.9, linestyle=":")
    panel.set_xlim(min(0.0, table["own"].min()) - 0.02, table["own"].max() + 0.04)
    panel.set_ylim(low - 0.05, high + 0.05)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.set_xlabel("of RTN's error removed in the median layer")
    panel.set_ylabel("of RTN's KL removed in the model")
    signs = [
        look.handle(0, name, look.SERIES[at % look.MOST_SERIES], marker="_", markeredgewidth=3)
        for at, name in enumerate(formats)
    ]
    signs += [look.handle(at % look.MOST_SERIES, name, "#555555", linestyle="none") for at, name in enumerate(methods)]
    signs.append(look.handle(0, "as much as the layers", look.BLACK, marker="", linewidth=0.9, linestyle=":"))
    look.legend_below(figure, signs)
    return figure


def _draws(evaluation: Evaluation) -> Figure | None:
    table = without_original(evaluation.recipes).sort_values("index")
    table = table.assign(tokens=tokens_of(evaluation, table))
    searched = table[(table["method"] != "RTN") & table["tokens"].notna() & (table["kl"] > 0)]
    curves = [
        (key, mine)
        for key, mine in searched.groupby(["format", "method"], sort=False)
        if mine["tokens"].nunique() >= _FEWEST
    ]
    if not curves:
        return None
    note = f"{about(evaluation)} A point is a recipe searched on one draw of calibration tokens, the line goes through "
    note += "the medians; intervals 95 %, by windows drawn again. Dashed: RTN, which looks at no token."
    figure = look.new_figure(7.2, 4.2, "How few calibration tokens suffice?", note)
    panel = figure.subplots()
    shown = [mine for _, mine in curves]
    for series, ((form, _), mine) in enumerate(curves):
        _curve(panel, mine, series % look.MOST_SERIES)
        for kl in table.loc[(table["method"] == "RTN") & (table["format"] == form), "kl"].head(1):
            panel.axhline(kl, color=look.SERIES[series % look.MOST_SERIES], linewidth=1.1, linestyle="--")
            shown.append(pd.DataFrame({"kl": [kl], "kl_low": [kl], "kl_high": [kl]}))
    everything = pd.concat(shown)
    look.log_axis(panel, "x", everything["tokens"].dropna())
    look.log_axis(panel, "y", [*everything["kl_low"], *everything["kl_high"], *everything["kl"]])
    look.value_ticks(panel, sorted(everything["tokens"].dropna().unique()))
    panel.set_xlabel("calibration tokens")
    panel.set_ylabel("KL(P||Q) in nats")
    look.legend_below(figure, [look.handle(at % look.MOST_SERIES, " ".join(key)) for at, (key, _) in enumerate(curves)])
    return figure


def _curve(panel: Axes, mine: pd.DataFrame, series: int) -> None:
    colour = look.SERIES[series]
    middle = mine.groupby("tokens")["kl"].median()
    panel.plot(middle.index, middle, color=colour, linewidth=1.3)
    for row in mine.itertuples():
        panel.plot([row.tokens] * 2, [row.kl_low, row.kl_high], color=colour, linewidth=1.2, alpha=0.35)
    panel.plot(mine["tokens"], mine["kl"], look.MARKERS[series], color=colour, markersize=5)
