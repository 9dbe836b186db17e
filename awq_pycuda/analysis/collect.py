"""Result files to tables: what every figure, report, comparison and notebook starts from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from awq_pycuda.analysis.derived import DERIVED, derived
from awq_pycuda.analysis.evaluations import Evaluation, evaluations_of
from awq_pycuda.analysis.find import LeftOut, find_files, natural, run_names
from awq_pycuda.analysis.frames import frame, joined, labels
from awq_pycuda.analysis.recipes import format_name, recipe_name
from awq_pycuda.errors import InputError
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.hdf5_worker import ask
from awq_pycuda.results import evaluation_schema, schema
from awq_pycuda.results.conditions import held_down
from awq_pycuda.results.evaluation_record import EvaluationRecord
from awq_pycuda.results.files import read_files
from awq_pycuda.results.reader import LayerRecord, ResultFile, read_channels
from awq_pycuda.spread import Spread

SALIENT_SHARE = 0.01  # the share of salient channels in the AWQ paper's 1 % experiments (Lin et al., 2023, section 3.1)
_LONG_LIST = 8

_ORIGIN = ("overrides", "device", "versions", "git_commit", "git_dirty", "kernels_sha256")
CONDITIONS = tuple(name for name, *_ in schema.TOLD)  # of a pass, on a GPU that tells them
_QUARTILES = ("pipeline_ms_q25", "pipeline_ms_q75")
_OVER_LAYERS = ("error_removed", "output_sqnr_db", "rtn_output_sqnr_db", "max_output_sqnr_db")
_SPREADS = (*_QUARTILES, *(f"{name}_{part}" for name in _OVER_LAYERS for part in ("median", "q25", "q75")))
_ONLY_IN_RUNS = ("config", *_ORIGIN, *_SPREADS)
_RUN_COLUMNS = (
    *("run", "path", "status", "error", "created", "backend", "device_name", "config_hash", "study"),
    *("pipeline_ms", "cold_ms", "held_down", "layers_finished", "clock", "launched"),
    *("gamma_grid_size", "format", "recipe", *_ONLY_IN_RUNS),
)
_OF_LAYER = (
    *("name", "tokens", "in_features", "out_features"),
    *("chosen", "gamma_chosen", "error_chosen", "error_rtn", "objective", "chosen_by_max"),
)
_OF_CANDIDATES = ("gamma", "beta", "duo", "error", "error_by_max")
_METRICS = tuple(each.name for each in schema.metrics())
_LAYER_COLUMNS = ("run", "layer", *_OF_LAYER, *_METRICS, *(each.name for each in DERIVED))
_SAMPLE_COLUMNS = ("gamma", "beta", "duo", "error_relative", "chosen", "stage", "repeat", "ms")
_TAKEN = {*_RUN_COLUMNS, *_LAYER_COLUMNS, *_SAMPLE_COLUMNS}


@dataclass(frozen=True, eq=False)  # by identity, so that what is made of one can be kept
class Collection:
    """Every readable result as tables; docs/analysis.md has their columns.

    `runs` has a row per file of a run, `layers` one per run and layer (with the columns of the run), `curves` one per
    run, layer and candidate, `timings` one per run, layer, stage, repeat and clock, `passes` one per run and repeat.
    `swept` are the columns of config keys whose value differs among the complete runs that have them, `seed` last.
    `evaluations` have tables of their own.
    """

    runs: pd.DataFrame
    layers: pd.DataFrame
    curves: pd.DataFrame
    timings: pd.DataFrame
    passes: pd.DataFrame
    left_out: list[LeftOut]
    swept: list[str]
    evaluations: list[Evaluation]


@np.errstate(all="ignore")  # RTN may have no error to divide by, and damage can leave any number
def collect(paths: Sequence[Path]) -> Collection:
    """Reads every result file among `paths` and below the folders among them.

    Nothing that lies there stops it: what cannot be read is in `left_out`. A file reached twice counts once. In
    folders only names that end in .h5 or .hdf5 and do not begin with a dot are looked at. Runs are in the order of the
    swept keys' values, those that are equal in these in the natural order of their paths.

    Raises:
        OSError: the process that reads the files cannot be started.
    """
    left_out: list[LeftOut] = []
    results: list[ResultFile] = []
    evaluations: list[tuple[Path, EvaluationRecord]] = []
    files = find_files(paths, left_out)
    for path, outcome in zip(files, read_files(files), strict=True):
        if isinstance(outcome, str):
            left_out.append(LeftOut(path, outcome))
        elif isinstance(outcome, EvaluationRecord):
            evaluations.append((path, outcome))
        else:
            results.append(replace(outcome, path=path))
    own = {path.with_name(evaluation_schema.CALIBRATION_NAME) for path, _ in evaluations}
    left_out = [each for each in left_out if each.path not in own]  # it holds layers, and no result
    swept = _swept_keys(results)
    # The folders of a study are hashes: their order says nothing.
    results.sort(key=lambda result: [_rank(result.config.get(key)) for key in swept])
    names = run_names([result.path for result in results])
    runs = frame([_run_row(name, result) for name, result in zip(names, results, strict=True)], _RUN_COLUMNS)
    per_layer = [(name, result, layer) for name, result in zip(names, results, strict=True) for layer in result.layers]
    taken = {*_TAKEN, *runs.columns}
    layers = frame([_layer_row(*item, taken) for item in per_layer], _LAYER_COLUMNS)
    layers = layers.merge(runs.drop(columns=list(_ONLY_IN_RUNS)), on="run", how="left", validate="many_to_one")
    return Collection(
        runs=runs,
        layers=layers,
        curves=_curves(per_layer),
        timings=_timings(names, results),
        passes=_passes(names, results),
        left_out=left_out,
        swept=[column_of(key) for key in swept],
        evaluations=evaluations_of(evaluations),
    )


def channels(path: Path, layer: int) -> pd.DataFrame:
    """Statistics and scales of one layer by input channel, read from the file.

    Returns:
        channel, abs_mean, sq_mean, s, rms (√sq_mean), salient: whether the channel is of the top 1 % (at least one) by
        abs_mean.

    Raises:
        InputError: the file is no result, or has no such layer.
    """
    (table,) = channels_of([(path, layer)])
    return table


def channels_of(wanted: Sequence[tuple[Path, int]]) -> list[pd.DataFrame]:
    """`channels` of each of these files and layers; layers of one file that stand together are read at once."""
    calls = []
    for path, of_path in groupby(wanted, key=lambda item: item[0]):
        calls.append((read_channels, path, [layer for _, layer in of_path]))
    tables: list[pd.DataFrame] = []
    for (_, path, layers), answer in zip(calls, ask(calls), strict=True):
        if isinstance(answer, UnreadableError):
            named = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
            raise InputError(f"{path}: {answer}; allowed: a result file that has {named}")
        tables += map(_channel_table, answer)
    return tables


def _channel_table(vectors: Mapping[str, Any]) -> pd.DataFrame:
    abs_mean = vectors["abs_mean"]
    salient = np.zeros(abs_mean.size, bool)
    salient[np.argsort(-abs_mean, kind="stable")[: max(1, round(SALIENT_SHARE * abs_mean.size))]] = True
    rms = np.sqrt(vectors["sq_mean"])
    return pd.DataFrame({"channel": np.arange(abs_mean.size), **vectors, "rms": rms, "salient": salient})


def column_of(key: str) -> str:
    """The column of a config key: the key itself; with `config.` in front where another column has that name.

    The key `backend`, what was asked for, is `backend_asked`: the column `backend` holds what ran.
    """
    if key == "backend":
        return "backend_asked"
    return f"config.{key}" if key in _TAKEN or key.startswith("ms.") else key


def _run_row(run: str, result: ResultFile) -> dict[str, Any]:
    root, config = result.root, result.config
    gammas = config.get("gammas")
    passes = Spread.of(result.pipeline_ms)
    return {
        "run": run,
        "path": str(result.path),
        "status": root["status"],
        "error": root.get("error", ""),
        **{name: root[name] for name in ("created", "backend")},
        "device_name": str(result.device.get("name", "")),
        "config_hash": root["config_hash"],
        "study": str(config.get("study") or ""),
        "pipeline_ms": passes.median,
        **dict(zip(_QUARTILES, (passes.low, passes.high), strict=True)),
        **_over_layers(result.layers),
        "cold_ms": result.cold_ms,
        "held_down": _held_down(result),
        "layers_finished": len(result.layers),
        "clock": _clock(result),
        "launched": result.launched,
        "gamma_grid_size": len({0, *gammas}) if gammas and _is_grid(gammas) else None,  # 0 is always searched
        "format": format_name(config),
        "recipe": recipe_name(config),
        "config": json.dumps(config, sort_keys=True),
        **{name: root.get(name) for name in _ORIGIN},
        **{column_of(key): _shown(value) for key, value in config.items() if key != "study"},
    }


def _held_down(result: ResultFile) -> float:
    """The share of the measured passes in which the clock was held down; NaN where nothing told it."""
    reasons = result.conditions.get("throttle_reasons", np.empty(0))
    if not np.isfinite(reasons).any():
        return math.nan
    return float(held_down(result.conditions, reasons.size)[np.isfinite(reasons)].mean())


def _over_layers(layers: Sequence[LayerRecord]) -> dict[str, float]:
    """Median and quartiles over a run's layers."""
    figures = [{**layer.metrics, **derived(layer.metrics)} for layer in layers]
    found: dict[str, float] = {}
    for name in _OVER_LAYERS:
        spread = Spread.of([of_layer.get(name, math.nan) for of_layer in figures])
        found |= {f"{name}_median": spread.median, f"{name}_q25": spread.low, f"{name}_q75": spread.high}
    return found


def _clock(result: ResultFile) -> str:
    if not result.pipeline_ms.size:
        return ""
    return "gpu" if np.isfinite(result.gpu_ms).any() else "host"


def _is_grid(gammas: Any) -> bool:
    return isinstance(gammas, list) and all(isinstance(gamma, int | float) for gamma in gammas)


def _shown(value: Any) -> Any:
    """A config value as a cell: a list as short text."""
    if not isinstance(value, list):
        return value
    texts = [f"{item:g}" if isinstance(item, float) else str(item) for item in value]
    return ",".join(texts if len(texts) <= _LONG_LIST else [*texts[:3], "…", texts[-1]])


def _layer_row(run: str, result: ResultFile, layer: LayerRecord, taken: Set[str]) -> dict[str, Any]:
    figures = layer.metrics
    row = {name: getattr(layer, name) for name in _OF_LAYER} | dict.fromkeys(_METRICS, math.nan)
    row |= {name if name in _METRICS or name not in taken else f"metrics.{name}": v for name, v in figures.items()}
    samples = result.gpu_ms if _clock(result) == "gpu" else result.host_ms
    if layer.index in result.timed_layers and result.pipeline_ms.size:
        medians = np.median(samples[result.timed_layers.index(layer.index)], axis=1)
        row |= {f"ms.{stage}": float(value) for stage, value in zip(result.stages, medians, strict=True)}
    return {"run": run, "layer": layer.index, **row, **derived(figures)}


def _curves(per_layer: Sequence[tuple[str, ResultFile, LayerRecord]]) -> pd.DataFrame:
    sizes = [layer.gamma.size for _, _, layer in per_layer]
    columns = {name: joined([getattr(layer, name) for _, _, layer in per_layer]) for name in _OF_CANDIDATES}
    relative = columns["error"] / np.repeat([layer.error_rtn for _, _, layer in per_layer], sizes)
    return pd.DataFrame(
        {
            "run": labels([run for run, _, _ in per_layer], sizes),
            "layer": np.repeat(np.array([layer.index for _, _, layer in per_layer], np.int64), sizes),
            **columns,
            "duo": columns["duo"] != 0,
            "error_relative": relative,
            "chosen": joined([np.arange(layer.gamma.size) == layer.chosen for _, _, layer in per_layer]) != 0,
        }
    )


def by_gamma(curves: pd.DataFrame) -> pd.DataFrame:
    """Of curves one candidate for each run, layer and gamma, in the order searched: the best, or the chosen one.

    There are several where more than gamma was searched.
    """
    keys = ["run", "layer", "gamma"]
    if not curves.duplicated(keys).any():
        return curves
    ranked = curves.sort_values(["chosen", "error"], ascending=[False, True], kind="stable")
    return ranked.drop_duplicates(keys).sort_index()


def _timings(names: Sequence[str], results: Sequence[ResultFile]) -> pd.DataFrame:
    """One row per sample of either clock; the rows of a stream without a GPU are all NaN and left out."""
    columns: dict[str, list[Any]] = {name: [] for name in ("run", "layer", "stage", "repeat", "clock", "ms")}
    for run, result in zip(names, results, strict=True):
        for clock, samples in (("gpu", result.gpu_ms), ("host", result.host_ms)):
            layer, stage, repeat = np.nonzero(np.isfinite(samples))
            columns["run"].append(np.full(layer.size, run, object))
            columns["layer"].append(np.asarray(result.timed_layers, np.int64)[layer])
            columns["stage"].append(np.asarray(result.stages, object)[stage])
            columns["repeat"].append(repeat)
            columns["clock"].append(np.full(layer.size, clock, object))
            columns["ms"].append(samples[layer, stage, repeat])
    types = {"run": "str", "layer": "int64", "stage": "str", "repeat": "int64", "clock": "str", "ms": "float64"}
    return pd.DataFrame({name: joined(parts) for name, parts in columns.items()}).astype(types)


def _passes(names: Sequence[str], results: Sequence[ResultFile]) -> pd.DataFrame:
    sizes = [result.pipeline_ms.size for result in results]
    told = {
        name: joined([result.conditions.get(name, np.full(result.pipeline_ms.size, np.nan)) for result in results])
        for name in CONDITIONS
    }
    return pd.DataFrame(
        {
            "run": labels(names, sizes),
            "repeat": joined([np.arange(size) for size in sizes]).astype(np.int64),
            "pipeline_ms": joined([result.pipeline_ms for result in results]),
            **told,
            "held_down": held_down(told, sum(sizes)),
        }
    )


def _rank(value: Any) -> tuple[int, float, list[tuple[int, str]]]:
    """Sorts the values of a config key: null and missing ones, numbers, lists by length, text."""
    if value is None:
        return 0, 0, []
    if isinstance(value, (bool, int, float)):
        return 1, value, []
    return (2, len(value), natural(repr(value))) if isinstance(value, list) else (3, 0, natural(str(value)))


def _swept_keys(results: Sequence[ResultFile]) -> list[str]:
    values: dict[str, set[str]] = {}
    for result in results:
        if result.root["status"] == "complete":
            for key, value in result.config.items():
                values.setdefault(key, set()).add(repr(value))
    keys = [key for key, seen in values.items() if len(seen) > 1 and key != "study"]
    return sorted(keys, key=lambda key: key == "seed")
