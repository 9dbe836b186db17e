"""Figure of the product alone: its arithmetic rate by size of the layer and variant of the kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from awq_pycuda.analysis import figure_style as look
from awq_pycuda.analysis.collect import Collection
from awq_pycuda.analysis.roofline import ceilings, device_of, samples
from awq_pycuda.analysis.selection import format_value, key_name
from awq_pycuda.spread import QUARTILES

_SHAPE = ["tokens", "out_features", "in_features"]
_VARIANT = ["matmul.kernel", "tile", "quant.group_size"]


def product_rate(collection: Collection) -> Figure | None:
    """GFLOP/s of `dequantizeTiled` against the layer's size, a line per variant; None without GPU times of two sizes.

    The size is the cube root of tokens · out_features · in_features: n where a layer is square. Of several devices the
    one with the most variants and sizes is shown.
    """
    table = samples(collection)
    table = table[table["stage"] == "dequantizeTiled"]
    if table.empty:
        return None
    kinds = [key for key in (*_SHAPE, *_VARIANT) if key in table]
    device = str(table.drop_duplicates(["device_name", *kinds])["device_name"].mode()[0])
    table = table[table["device_name"] == device]
    table = table.assign(side=np.cbrt(table[_SHAPE].astype(float).prod(axis=1)).round(3))
    keys = [key for key in _VARIANT if key in table and table[key].map(format_value).nunique() > 1]
    variants = table.groupby(keys, dropna=False, sort=True) if keys else [((), table)]
    if table["side"].nunique() < 2 or len(variants) > look.MOST_SERIES:
        return None
    note = f"{device}; medians over runs, layers and passes, bars between their quartiles. Times on the GPU's stream. "
    note += "Work: 2·tokens·out·in flop."
    figure = look.new_figure(6.8, 4.0, "Arithmetic rate of the product dequantizeTiled", note)
    panel = figure.subplots()
    handles, shown = [], []
    for series, (values, rows) in enumerate(variants):
        by_side = rows.groupby("side")
        flop = by_side["flop"].median()
        high, middle, low = (flop / by_side["ms"].quantile(share) / 1e9 for share in QUARTILES)
        look.marked_line(panel, middle.index, middle, series)
        panel.vlines(middle.index, low, high, color=look.SERIES[series], linewidth=2.4, alpha=0.4)
        shown += [*low, *high]
        label = ", ".join(
            f"{key_name(key)}={format_value(value)}" for key, value in zip(keys, pd.Series(values), strict=True)
        )
        handles.append(look.handle(series, label))
    limit = ceilings(device_of(collection, device)).gflops
    if limit:
        panel.axhline(limit / 1e3, color=look.BLACK, linewidth=1.3)
        text = f"ceiling {limit / 1e3:,.1f} TFLOP/s fp32"
        at: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (6, 4)}
        panel.annotate(text, (0, limit / 1e3), fontsize=8, color="#444444", **at)
    sides = sorted(set(table["side"]))
    look.scale_to(panel, "x", sides)
    look.scale_to(panel, "y", [*shown, *([limit / 500] if limit else [])])
    if limit:
        panel.set_ylim(top=limit / 500)
    look.value_ticks(panel, sides)
    panel.set_xlabel("∛(tokens · out_features · in_features)")
    panel.set_ylabel("TFLOP/s")
    if keys:
        look.legend_below(figure, handles)
    return figure
