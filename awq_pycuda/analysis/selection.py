"""What figures show of many runs: which rows, under which labels, and which runs tell the same story."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from awq_pycuda.analysis.collect import Collection, natural
from awq_pycuda.analysis.reader import METRICS

# What a run measures of a layer's quality; times are left out, because no two runs share them.
_QUALITY = ("gamma_chosen", "output_mse", "rtn_output_mse", "output_sqnr_db", "propagated_output_mse")
_DERIVED = ("gamma_chosen", "error_removed", "propagated_sqnr_db")
_MOST_LABEL = 40


@dataclass(frozen=True)
class Variant:
    """Runs whose layers came out the same; `label` names the swept values that they share."""

    label: str
    runs: list[str]


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN or NA."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def format_value(value: Any) -> str:
    """A config value as on the command line: `null`, `true`, `1024`, `0.25`."""
    if is_missing(value):
        return "null"
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, float | np.floating):
        return f"{float(value):.15g}"
    return str(value)


def shorten(text: str, most: int = _MOST_LABEL) -> str:
    """The text with its middle left out where it is too long: names tell most at their ends."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def without_folders(labels: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share."""
    folders = [label.split("/")[:-1] for label in labels]
    shared = 0
    while len({tuple(own[: shared + 1]) for own in folders}) == 1 and len(labels) > 1 and len(folders[0]) > shared:
        shared += 1
    return ["/".join(label.split("/")[shared:]) for label in labels]


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def complete_runs(collection: Collection) -> pd.DataFrame:
    """The rows of the runs that finished; figures show no others, because a failed run's layers are a part."""
    return collection.runs[collection.runs["status"] == "complete"]


def complete_layers(collection: Collection) -> pd.DataFrame:
    """The layers of the runs that finished."""
    layers = collection.layers[collection.layers["run"].isin(complete_runs(collection)["run"])]
    return layers.astype(dict.fromkeys(METRICS + _DERIVED, "float64"))  # without any run the columns have no type


def stages_of(layers: pd.DataFrame) -> list[str]:
    """The timed stages, in the order run."""
    return [column.removeprefix("ms.") for column in layers.columns if column.startswith("ms.")]


def run_stages(collection: Collection) -> pd.DataFrame:
    """Time of each stage in ms, summed over the layers: a row per complete run, in the order of the table of runs."""
    layers = complete_layers(collection)
    columns = {f"ms.{stage}": stage for stage in stages_of(layers)}
    sums = layers.groupby("run", sort=False)[list(columns)].sum(min_count=1).rename(columns=columns)
    return sums.dropna(how="all").fillna(0.0)


def layer_labels(layers: pd.DataFrame) -> dict[int, str]:
    """A label for each layer index.

    It is the layer's name where all runs agree on it, less the leading parts that all names share, else `layer 3`.
    """
    names: dict[int, str] = {}
    for index, group in layers.groupby("layer", sort=True)["name"]:
        unique = group.unique()
        own = len(unique) == 1 and not str(unique[0]).isdigit()
        names[int(index)] = str(unique[0]) if own else f"layer {index}"
    parts = [name.split(".") for name in names.values()]
    shared = 0
    if len(parts) > 1:
        while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
            shared += 1
    return {index: shorten(".".join(name.split(".")[shared:])) for index, name in names.items()}


def families(labels: dict[int, str]) -> dict[str, list[int]]:
    """Layers whose labels differ in numbers alone, such as the same projection of every block, by pattern."""
    found: dict[str, list[int]] = {}
    for index, label in labels.items():
        found.setdefault(re.sub(r"\d+", "*", label).removeprefix("*.").removeprefix("layer.*."), []).append(index)
    return found


def swept_keys(collection: Collection) -> dict[str, list[str]]:
    """The swept columns, each with those that change along with it and so tell nothing more, such as `tokens` with `n`.

    Lists of gammas give way to their number where that tells them apart.
    """
    table = complete_runs(collection)
    counted = "gammas" in collection.swept and table["gamma_grid_size"].nunique() == table["gammas"].nunique()
    keys = ["gamma_grid_size" if key == "gammas" and counted else key for key in collection.swept]
    return without_copies(table, keys)


def without_copies(table: pd.DataFrame, columns: Sequence[str]) -> dict[str, list[str]]:
    """The columns, each with the later ones that tell the same rows apart."""
    found: dict[tuple[int, ...], list[str]] = {}
    for column in columns:
        found.setdefault(tuple(pd.factorize(table[column].map(format_value))[0]), []).append(column)
    return {same[0]: same[1:] for same in found.values()}


def key_name(column: str) -> str:
    """A column's config key."""
    return column.removeprefix("config.")


def run_labels(collection: Collection, runs: Sequence[str]) -> dict[str, str]:
    """A label for each of these complete runs: its values of the keys that are swept among them, or its id."""
    table = collection.runs.set_index("run").loc[list(runs)]
    texts = {key: table[key].map(format_value) for key in swept_keys(collection)}
    keys = [key for key, column in texts.items() if column.nunique() > 1]
    labels = {run: _assignments({key: texts[key][run] for key in keys}) for run in runs}
    shown = list(labels.values())
    return {
        run: label if label and shown.count(label) == 1 else f"{label} ({run})" if label else run
        for run, label in labels.items()
    }


def _assignments(values: dict[str, str]) -> str:
    return ", ".join(f"{key_name(key)}={shorten(value, 24)}" for key, value in values.items())


def variants(collection: Collection, most: int) -> list[Variant]:
    """Complete runs grouped by what came out of their layers, to six digits; none where there are more than `most`.

    A sweep over `tile` and `n` on a CPU gives one variant per `n`: the tile changes no result.
    """
    layers = complete_layers(collection)
    quality = layers.reindex(columns=_QUALITY).to_numpy(dtype=float)
    rows = np.column_stack([layers["layer"].to_numpy(dtype=float), significant(quality, 6)])
    groups: dict[bytes, list[str]] = {}
    for run, indices in layers.groupby("run", sort=False).indices.items():
        groups.setdefault(rows[indices].tobytes(), []).append(str(run))
    if len(groups) > most:
        return []
    table = complete_runs(collection).set_index("run")
    texts = {key: table[key].map(format_value) for key in swept_keys(collection)}
    labels = []
    for runs in groups.values():
        shared = {key: text[runs[0]] for key, text in texts.items() if text[runs].nunique() == 1}
        labels.append(_assignments(shared))
    return [
        Variant(label if label and labels.count(label) == 1 else f"run {runs[0]}", runs)
        for label, runs in zip(labels, groups.values(), strict=True)
    ]


def who(collection: Collection, groups: list[Variant], few: str = "One colour for", spread: str = "") -> str:
    """The sentence that says which runs a figure shows.

    One; or a few groups, in a sentence that opens with `few`; or, without groups, medians and their `spread`.
    """
    if not groups:
        return f"Medians over {plural(len(complete_runs(collection)), 'run')}, {spread} between the quartiles."
    if len(groups) > 1:
        return f"{few} the runs with the same results."
    runs = groups[0].runs
    return f"Run {runs[0]}." if len(runs) == 1 else f"{len(runs)} runs with the same results."


def starts_chain(layers: pd.DataFrame) -> NDArray[np.bool_]:
    """Which layers start a chain: the first, and those with activations of their own: their whole error is theirs."""
    own, whole = (layers[name].to_numpy(dtype=float) for name in ("output_mse", "propagated_output_mse"))
    return np.asarray(np.isclose(own, whole, rtol=1e-9, atol=0))


def significant(values: NDArray[Any], digits: int) -> NDArray[Any]:
    """Values rounded to so many significant digits; zeros and non-finite values stay as they are."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        power = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(values))))
        rounded = np.round(values * power) / power
    return np.where(np.isfinite(rounded), rounded, values)


def best_run(collection: Collection) -> str:
    """The complete run in which AWQ removes the most of RTN's error, as the mean over its layers."""
    removed = complete_layers(collection).groupby("run", sort=False)["error_removed"].mean()
    return str(removed.fillna(-np.inf).idxmax())


def numeric(values: pd.Series) -> bool:
    """Whether a key's values are all finite numbers and no truth values, so that an axis can be to scale."""
    return all(
        isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )


def in_order(values: pd.Series) -> list[str]:
    """The distinct values as text, in their own order: numbers by size, `null` first."""
    unique = {format_value(value): value for value in values}
    present = {text: value for text, value in unique.items() if text != "null"}
    by_size = numeric(pd.Series(list(present.values()), dtype=object))
    order = sorted(present, key=(lambda text: present[text]) if by_size else natural)
    return (["null"] if "null" in unique else []) + order


def spans_decades(values: Sequence[float] | NDArray[Any], factor: float = 8.0) -> bool:
    """Whether a logarithmic axis serves these values: all above 0, the largest well above the smallest."""
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    return bool(array.size and array.min() > 0 and array.max() >= factor * array.min())
