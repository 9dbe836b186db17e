"""Rows and columns as tables whose columns have one type each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd


def frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Rows as a table whose columns have one type each; `columns` come first and are there even without rows."""
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    return pd.DataFrame({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> Any:
    """One type for a column: whole numbers and truth values keep theirs beside missing values; a mixture is text."""
    present = [value for value in values if value is not None]
    kinds = {type(value) for value in present}
    if kinds == {bool}:
        dtype, plain = "boolean", "bool"
    elif kinds == {int} and all(-(2**63) <= value < 2**63 for value in present):
        dtype, plain = "Int64", "int64"
    elif kinds == {int} and all(0 <= value < 2**64 for value in present):
        dtype, plain = "UInt64", "uint64"
    elif kinds in ({float}, {int, float}):
        return np.array([math.nan if value is None else float(value) for value in values])
    else:
        return pd.array([None if value is None else str(value) for value in values], dtype="str")
    # By NumPy where nothing is missing: pandas.array turns numbers from 2^63 on into 0 when asked for uint64.
    return pd.array(values, dtype=dtype) if len(present) < len(values) else np.array(values, plain)


def joined(parts: Sequence[Any]) -> Any:
    """The parts one after another; without any an empty array."""
    return np.concatenate(parts) if parts else np.empty(0)


def labels(names: Sequence[str], sizes: Sequence[int]) -> Any:
    """Each name as often as its size says, as a column of text."""
    return pd.array(np.repeat(np.array(names, object), sizes), dtype="str")
