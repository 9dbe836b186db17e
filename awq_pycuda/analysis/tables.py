"""One figure of the layers as a table in Markdown: a row and a column for each value of two keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd

from awq_pycuda.analysis.collect import Collection, column_of
from awq_pycuda.analysis.derived import COMPARED, DERIVED, ERROR_REMOVED
from awq_pycuda.analysis.selection import complete_layers, format_value, in_order, key_name, plural
from awq_pycuda.errors import InputError
from awq_pycuda.spread import percent

OVER: dict[str, Callable[[pd.Series], float]] = {
    "median": pd.Series.median,
    "mean": pd.Series.mean,
    "lowest": pd.Series.min,
    "highest": pd.Series.max,
    "below_0": lambda values: int((values < 0).sum()),
}
_HELD_OUT, _RTN = "held_out_", "rtn_"
FIGURES = tuple(
    dict.fromkeys(
        each for each in (*(one.name for one in DERIVED), *COMPARED) if not each.startswith((_HELD_OUT, _RTN))
    )
)


def table(collection: Collection, rows: str, columns: str, figure: str, over: str) -> Iterator[str]:
    """The lines of the table, below one that says what it holds.

    A cell has the figure over all layers of the complete runs with its row's and column's values, and in brackets the
    same on held-out tokens, where there is such a figure. Where RTN has the figure, too, it has the first column.

    Args:
        collection: what to make it of.
        rows: a column of the table of layers, such as `format`, `recipe` or `name`, or a config key.
        columns: another one.
        figure: one of FIGURES.
        over: one of OVER.

    Raises:
        InputError: another word for one of these, a key that the layers have not, or a figure that none of them has.
    """
    for option, given, known in (("figure", figure, FIGURES), ("over", over, OVER)):
        if given not in known:
            raise InputError(f"{option}={given}: allowed: {', '.join(known)}")
    layers = complete_layers(collection)
    row_of, named = (_values(layers, *given) for given in (("rows", rows), ("columns", columns)))
    if not _is_there(layers, figure):
        raise InputError(f"figure={figure}: no layer has it; allowed: a figure of the results given")
    held_out = _is_there(layers, _HELD_OUT + figure)
    sizes = layers.groupby([row_of.to_numpy(), named.to_numpy()]).size()
    layer_count = plural(sizes.max(), "layer") if sizes.nunique() == 1 else f"{sizes.min()} to {sizes.max()} layers"
    yield f"`{figure}`, {over} of {layer_count}{', in brackets on held-out tokens' if held_out else ''}"
    yield ""
    names = in_order(named)
    shown = [(name, figure, named == name) for name in names]
    if _is_there(layers, _RTN + figure):
        shown.insert(0, ("RTN", _RTN + figure, row_of.notna()))
    yield _line([key_name(rows), *(name for name, *_ in shown)])
    yield "|" + "---|" * (1 + len(shown))
    for row in in_order(row_of):
        cells = []
        for _, name, mine in shown:
            of_cell = layers[mine & (row_of == row)]
            text = _number(of_cell[name], figure, over)
            cells.append(f"{text} ({_number(of_cell[_HELD_OUT + name], figure, over)})" if held_out else text)
        yield _line([row, *cells])


def _values(layers: pd.DataFrame, option: str, key: str) -> pd.Series:
    """A key's value of each layer, as text."""
    column = key if key in layers else column_of(key)
    if column not in layers:
        raise InputError(
            f"{option}={key}: no column of the layers; allowed: such as format, recipe, name, a config key"
        )
    return layers[column].map(format_value)


def _is_there(layers: pd.DataFrame, name: str) -> bool:
    return name in layers and bool(layers[name].notna().any())


def _number(values: pd.Series, figure: str, over: str) -> str:
    """In the figure's own unit: shares in percent, SQNR to 0.01 dB; `-` where nothing has it."""
    if values.isna().all():
        return "-"
    value = OVER[over](values)
    if over == "below_0":
        return str(value)
    if figure == ERROR_REMOVED.name:
        return percent(value)
    return f"{value:.2f}" if figure.endswith("_db") else f"{value:.4g}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
