"""What figures show of many runs: which rows, under which labels, and which runs tell the same story."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from awq_pycuda.analysis.collect import Collection
from awq_pycuda.analysis.derived import DERIVED
from awq_pycuda.analysis.find import natural
from awq_pycuda.analysis.recipes import PARTS
from awq_pycuda.names import shorten, without_shared
from awq_pycuda.results import schema
from awq_pycuda.spread import Spread, no_signal

# What a run measures of a layer's quality; times are left out, because no two runs share them.
_QUALITY = ("gamma_chosen", "output_mse", "rtn_output_mse", "output_sqnr_db", "propagated_output_mse")
_NUMBERS = ("gamma_chosen", *(each.name for each in (*schema.metrics(), *DERIVED)))
_DATED = re.compile(r"sweeps/\d{4}-\d\d-\d\d/[\d-]+")  # a sweep without a name, or a single run
_NO_NAME = re.compile(r"[0-9a-f]{8,}|\d\d-\d\d-\d\d(-\d+)?")  # a job's hash, a single run's time of day


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


def without_folders(labels: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share."""
    folders = [label.split("/")[:-1] for label in labels]
    shared = 0
    while len({tuple(own[: shared + 1]) for own in folders}) == 1 and len(labels) > 1 and len(folders[0]) > shared:
        shared += 1
    return ["/".join(label.split("/")[shared:]) for label in labels]


def plural(count: int, noun: str, many: str = "") -> str:
    """`1 run`, `2 runs`; `many` where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def complete_runs(collection: Collection) -> pd.DataFrame:
    """The rows of the runs that finished; figures show no others, because a failed run's layers are a part."""
    return collection.runs[collection.runs["status"] == "complete"]


def complete_layers(collection: Collection) -> pd.DataFrame:
    """The layers of the runs that finished."""
    layers = collection.layers[collection.layers["run"].isin(complete_runs(collection)["run"])]
    return layers.astype(dict.fromkeys(_NUMBERS, "float64"))  # without any run the columns have no type


def stages_of(layers: pd.DataFrame) -> list[str]:
    """The timed stages, in the order run."""
    return [column.removeprefix("ms.") for column in layers.columns if column.startswith("ms.")]


def stage_passes(collection: Collection) -> pd.Series:
    """Time of each stage in each pass in ms, summed over the layers, on the run's own clock: by run, stage, repeat."""
    clock = collection.timings["run"].map(collection.runs.set_index("run")["clock"])
    own = collection.timings[collection.timings["clock"] == clock]
    return own.groupby(["run", "stage", "repeat"], sort=False)["ms"].sum()


def run_stages(collection: Collection, share: float = 0.5) -> pd.DataFrame:
    """A quantile over the passes (the median) of each stage's time, summed over the layers in each pass, in ms.

    A row per complete run with times, in the order of the table of runs; a column per stage, in the order run.
    """
    quantiles = stage_passes(collection).groupby(level=["run", "stage"], sort=False).quantile(share).unstack()
    runs = [run for run in complete_runs(collection)["run"] if run in quantiles.index]
    return quantiles.reindex(index=runs, columns=stages_of(collection.layers)).fillna(0.0)


def pass_spreads(collection: Collection) -> dict[str, Spread]:
    """By run: the time of a measured pass in ms."""
    found = {str(run): Spread.of(values) for run, values in collection.passes.groupby("run")["pipeline_ms"]}
    return {run: found.get(run, Spread.of([])) for run in collection.runs["run"]}


def removed_spreads(collection: Collection) -> dict[str, Spread]:
    """By run: the error removed, over its layers."""
    found = {str(run): Spread.of(values) for run, values in collection.layers.groupby("run")["error_removed"]}
    return {run: found.get(run, Spread.of([])) for run in collection.runs["run"]}


def no_signal_line(collection: Collection) -> str:
    """The line about the layers of complete runs whose output is all 0; empty where there are none."""
    layers = complete_layers(collection)
    silent = layers[layers["output_sqnr_db"].isna() & layers["output_mse"].notna()]
    if silent.empty:
        return ""
    runs, total = silent["run"].nunique(), layers["run"].nunique()
    return no_signal(list(dict.fromkeys(silent["name"]))) + (f" (in {runs} of {total} runs)" if runs < total else "")


def layer_labels(layers: pd.DataFrame) -> dict[int, str]:
    """A label for each layer index.

    It is the layer's name where all runs agree on it, less the leading parts that all names share, else `layer 3`.
    """
    names: dict[int, str] = {}
    for index, group in layers.groupby("layer", sort=True)["name"]:
        unique = group.unique()
        own = len(unique) == 1 and not str(unique[0]).isdigit()
        names[int(index)] = str(unique[0]) if own else f"layer {index}"
    return {index: shorten(own) for index, own in zip(names, without_shared(list(names.values())), strict=True)}


def families(labels: dict[int, str]) -> dict[str, list[int]]:
    """Layers whose labels differ in numbers alone, such as the same projection of every block, by pattern."""
    found: dict[str, list[int]] = {}
    for index, label in labels.items():
        found.setdefault(re.sub(r"\d+", "*", label).removeprefix("*.").removeprefix("layer.*."), []).append(index)
    return found


def layer_kinds(names: Sequence[str]) -> list[str]:
    """What each layer is, such as `self_attn.q_proj`: its name less numbers and the leading parts that all share."""
    own = dict(enumerate(without_shared(names)))
    kind = {place: name for name, members in families(own).items() for place in members}
    return [kind[place] for place in own]


def swept_keys(collection: Collection) -> dict[str, list[str]]:
    """The swept columns, each with those that change along with it and so tell nothing more, such as `tokens` with `n`.

    Lists of gammas give way to their number where that tells them apart, several keys of a format or of a recipe to its
    name. The format comes first.
    """
    table = complete_runs(collection)
    counted = "gammas" in collection.swept and table["gamma_grid_size"].nunique() == table["gammas"].nunique()
    keys = ["gamma_grid_size" if key == "gammas" and counted else key for key in collection.swept]
    for name, starts in PARTS.items():
        parts = [key for key in keys if key.startswith(starts)]
        if len(parts) > 1 and _as_many(table, [name]) == _as_many(table, parts) == _as_many(table, [name, *parts]):
            keys = list(dict.fromkeys(name if key in parts else key for key in keys))
    keys.sort(key=lambda key: key != "format")
    return without_copies(table, keys)


def _as_many(table: pd.DataFrame, columns: Sequence[str]) -> int:
    """How many combinations of these columns' values there are."""
    return len(table[list(columns)].map(format_value).drop_duplicates())


def without_copies(table: pd.DataFrame, columns: Sequence[str]) -> dict[str, list[str]]:
    """The columns, each with the later ones that tell the same rows apart."""
    found: dict[tuple[int, ...], list[str]] = {}
    for column in columns:
        found.setdefault(tuple(pd.factorize(table[column].map(format_value))[0]), []).append(column)
    return {same[0]: same[1:] for same in found.values()}


def key_name(column: str) -> str:
    """A column's config key."""
    return column.removeprefix("config.")


def named_study(study: str) -> str:
    """The name that a study was given; empty for those that have their date for one."""
    return "" if _DATED.fullmatch(study) else study


@lru_cache(maxsize=2)  # the table, the page and each picture of the runs ask for them
def run_labels(collection: Collection, most: int = 60) -> dict[str, str]:
    """A name of `most` characters for each run: what was swept in its study, which is named where it is one of several.

    Where nothing is swept, or too much, it is the folder's name, or what was given on the command line if that is a
    hash or a time.
    """
    table = collection.runs.set_index("run")
    texts = {key: table[key].map(format_value) for key in swept_keys(collection)}
    studies = table["study"].map(named_study)
    labels = {}
    for study, members in studies.groupby(studies, sort=False):
        differing = [key for key, text in texts.items() if text[members.index].nunique() > 1]
        keys = list(without_copies(table.loc[members.index], differing))
        for run, overrides in table.loc[members.index, "overrides"].items():
            own = _own_name(str(run), overrides)
            label = _assignments({key: texts[key][run] for key in keys}) or own
            prefix = f"{study}: " if study and studies.nunique() > 1 else ""
            labels[str(run)] = shorten(prefix + (own if len(label) > most else label), most)
    count = Counter(labels.values())
    return {run: labels[run] if count[labels[run]] == 1 else f"{labels[run]} ({run})" for run in table.index}


def _own_name(run: str, overrides: Any) -> str:
    if not _NO_NAME.fullmatch(run.rpartition("/")[2]):
        return run
    try:
        given = [str(override) for override in json.loads(overrides)]
    except (TypeError, ValueError):
        return run
    return " ".join(override for override in given if not override.startswith("hydra.")) or "defaults"


def _assignments(values: dict[str, str]) -> str:
    return " ".join(f"{key_name(key)}={shorten(value, 24)}" for key, value in values.items())


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


def removed_medians(collection: Collection) -> pd.Series:
    """By complete run: the error removed, as the median over its layers; minus infinity where there is none."""
    return complete_runs(collection).set_index("run")["error_removed_median"].astype(float).fillna(-np.inf)


def best_run(collection: Collection) -> str:
    """The complete run in which AWQ removes the most of RTN's error, as the median over its layers."""
    return str(removed_medians(collection).idxmax())


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
