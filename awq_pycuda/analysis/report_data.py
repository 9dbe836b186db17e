"""What the report's interactive figures draw, as plain lists for JSON, kept small: numbers have few digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from awq_pycuda.analysis import roofline
from awq_pycuda.analysis.collect import SALIENT_SHARE, Collection, by_gamma, channels_of
from awq_pycuda.analysis.guard import Failure, attempt
from awq_pycuda.analysis.selection import (
    complete_layers,
    complete_runs,
    format_value,
    in_order,
    key_name,
    layer_labels,
    numeric,
    removed_medians,
    run_labels,
    run_stages,
    significant,
    stages_of,
    starts_chain,
    swept_keys,
)
from awq_pycuda.spread import QUARTILES

MOST_CHANNEL_RUNS = 24
MOST_CHANNELS = 150_000  # 3 numbers each: about 3 MB of the page
MOST_CURVE_POINTS = 300_000  # about 2 MB
_DIGITS = 5
_NO_CURVES: dict[str, Any] = {"grids": [], "curves": []}
_NOTHING: list[dict[str, Any]] = []


def page_data(collection: Collection, failures: list[Failure]) -> dict[str, Any]:
    """Everything that the page's figures need; runs are referred to by their place in `runs`.

    What a figure cannot be given is named in `failures`, and empty.
    """
    runs = complete_runs(collection)
    ids = list(runs["run"])
    place = {run: index for index, run in enumerate(ids)}
    labels = run_labels(collection)
    layers = complete_layers(collection).reset_index(drop=True)
    return {
        "runs": ids,
        "labels": [labels[run] for run in ids],
        "keys": [_key(runs[key], key, also) for key, also in swept_keys(collection).items()],
        "stages": stages_of(layers),
        "clock": list(runs["clock"]),
        "figures": {
            "removed": _spread(runs, "error_removed_median", "error_removed"),
            "awq": _spread(runs, "output_sqnr_db_median", "output_sqnr_db"),
            "rtn": _spread(runs, "rtn_output_sqnr_db_median", "rtn_output_sqnr_db"),
            "pipeline": _spread(runs, "pipeline_ms", "pipeline_ms"),
        },
        "sums": _sums(collection, ids),
        "layerNames": layer_labels(layers),
        "layers": _layers(layers, place),
        **attempt("error curves", failures, lambda: _curves(collection, layers, place), _NO_CURVES),
        "channels": attempt("channels", failures, lambda: _channels(collection, layers, place), _NOTHING),
        "salientShare": SALIENT_SHARE,
        "roofs": attempt("roofline", failures, lambda: _roofs(collection), _NOTHING),
    }


def _spread(runs: pd.DataFrame, median: str, name: str) -> dict[str, list[float | None]]:
    """Lower quartile, median and upper quartile of a figure of the runs, from the table of runs."""
    columns = {"low": f"{name}_q25", "median": median, "high": f"{name}_q75"}
    return {part: numbers(runs[column]) for part, column in columns.items()}


def _sums(collection: Collection, ids: Sequence[str]) -> dict[str, dict[str, list[float | None]]]:
    """By stage: quartiles over the passes of its time, summed over the layers in each."""
    parts = {
        part: run_stages(collection, share).reindex(ids)
        for part, share in zip(("low", "median", "high"), QUARTILES, strict=True)
    }
    return {stage: {part: numbers(table[stage]) for part, table in parts.items()} for stage in parts["median"]}


def numbers(values: Any, digits: int = _DIGITS) -> list[float | None]:
    """Rounded to a few digits; what JSON has no number for is None."""
    rounded = significant(np.asarray(values, dtype=float), digits)
    return [value if np.isfinite(value) else None for value in rounded.tolist()]


def _key(values: pd.Series, key: str, also: Sequence[str]) -> dict[str, Any]:
    to_scale = key != "seed" and numeric(values)
    return {
        "name": key_name(key),
        "also": [key_name(other) for other in also],
        "values": [float(value) for value in values] if to_scale else [format_value(value) for value in values],
        "order": None if to_scale else in_order(values),
    }


def _layers(layers: pd.DataFrame, place: dict[str, int]) -> dict[str, Any]:
    codes, names = pd.factorize(layers["name"])
    sizes = [layers[name].astype(str) for name in ("out_features", "in_features", "tokens")]
    shape, shapes = pd.factorize(sizes[0] + " × " + sizes[1] + ", " + sizes[2] + " tokens")
    columns = {
        "rtn": "rtn_output_sqnr_db",
        "awq": "output_sqnr_db",
        "propagated": "propagated_sqnr_db",
        "removed": "error_removed",
        "gamma": "gamma_chosen",
    }
    return {
        "run": [place[run] for run in layers["run"]],
        "layer": layers["layer"].tolist(),
        "name": codes.tolist(),
        "names": list(names),
        "shape": shape.tolist(),
        "shapes": list(shapes),
        "fresh": starts_chain(layers).tolist(),
        "silent": layers["output_sqnr_db"].isna().tolist(),
        **{name: numbers(layers[column]) for name, column in columns.items()},
        "ms": {stage: numbers(layers[f"ms.{stage}"]) for stage in stages_of(layers)},
    }


def _held(layers: pd.DataFrame, medians: pd.Series, sizes: pd.Series, most: int) -> pd.DataFrame:
    """The layers whose vectors (of these sizes) the page holds: whole runs, those with the most error removed first.

    Of a run that is too large alone, the layers with the most error removed.
    """
    ranked = layers.assign(median=layers["run"].map(medians), size=sizes).sort_values(
        ["median", "run", "error_removed"], ascending=[False, True, False], kind="stable"
    )
    fits = ranked["size"].cumsum() <= most
    whole = fits.groupby(ranked["run"]).transform("all") | (fits & ranked["run"].isin(ranked["run"].head(1)))
    return ranked[whole].sort_index()


def _curves(collection: Collection, layers: pd.DataFrame, place: dict[str, int]) -> dict[str, Any]:
    """One curve per run and layer; grids of gammas are few and stand once."""
    curves = by_gamma(collection.curves).reset_index(drop=True)
    groups = curves.groupby(["run", "layer"], sort=False).indices
    sizes = pd.Series([len(groups[key]) for key in zip(layers["run"], layers["layer"], strict=True)], layers.index)
    held = _held(layers, removed_medians(collection), sizes, MOST_CURVE_POINTS)
    gamma, relative, chosen = (curves[name].to_numpy() for name in ("gamma", "error_relative", "chosen"))
    grids: dict[tuple[float, ...], int] = {}
    found = []
    for run, layer in zip(held["run"], held["layer"], strict=True):
        rows = groups[run, layer]
        rows = rows[np.argsort(gamma[rows], kind="stable")]
        found.append(
            {
                "run": place[run],
                "layer": int(layer),
                "grid": grids.setdefault(tuple(gamma[rows].tolist()), len(grids)),
                "ratio": numbers(relative[rows], 4),
                "chosen": int(np.argmax(chosen[rows])),
            }
        )
    return {"grids": [numbers(grid, 15) for grid in grids], "curves": found}


def _channels(collection: Collection, layers: pd.DataFrame, place: dict[str, int]) -> list[dict[str, Any]]:
    paths = complete_runs(collection).set_index("run")["path"]
    # Each layer is a read of its file besides: no more than so many runs.
    medians = removed_medians(collection)
    medians = medians[medians.index.isin(layers["run"])]
    best = medians.sort_values(ascending=False, kind="stable")
    some = layers[layers["run"].isin(best.index[:MOST_CHANNEL_RUNS])]
    held = _held(some, medians, some["in_features"], MOST_CHANNELS)
    tables = channels_of(
        [(Path(paths[run]), int(layer)) for run, layer in held[["run", "layer"]].itertuples(index=False)]
    )
    found = []
    for run, layer, table in zip(held["run"], held["layer"], tables, strict=True):
        found.append(
            {
                "run": place[run],
                "layer": int(layer),
                "absMean": numbers(table["abs_mean"], 4),
                "rms": numbers(table["rms"], 4),
                "s": numbers(table["s"], 4),
                "salient": np.flatnonzero(table["salient"]).tolist(),
            }
        )
    return found


def _roofs(collection: Collection) -> list[dict[str, Any]]:
    table = roofline.points(collection)
    found = []
    for device, mine in table.groupby("device_name", sort=False):
        limits = roofline.ceilings(roofline.device_of(collection, str(device)))
        shape = ["device_name", "stage", "tokens", "out_features", "in_features"]
        variant = mine.drop(columns=[*shape, "ms", "intensity", "gflops", "gflops_low", "gflops_high"])
        found.append(
            {
                "device": device,
                "gflops": limits.gflops,
                "gbytes": limits.gbytes,
                "stage": list(mine["stage"]),
                "intensity": numbers(mine["intensity"]),
                "rate": numbers(mine["gflops"]),
                "low": numbers(mine["gflops_low"]),
                "high": numbers(mine["gflops_high"]),
                "text": [
                    f"{row.out_features} × {row.in_features}, {row.tokens} tokens; {row.ms:.4g} ms; {settings}"
                    for row, settings in zip(mine.itertuples(), _settings(variant), strict=True)
                ],
            }
        )
    return found


def _settings(table: pd.DataFrame) -> list[str]:
    rows = table.to_dict("records")
    return [", ".join(f"{key_name(str(key))}={format_value(value)}" for key, value in row.items()) for row in rows]
