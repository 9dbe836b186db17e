"""Two sets of results, matched by config: what became faster or slower, better or worse, and what cannot be told."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from awq_pycuda.analysis.collect import Collection
from awq_pycuda.analysis.derived import COMPARED
from awq_pycuda.analysis.intervals import Ratio, ratio_of_medians
from awq_pycuda.analysis.selection import stage_passes
from awq_pycuda.errors import InputError

PIPELINE = "pipeline"
TIME_COLUMNS = (
    *("config", "runs_a", "runs_b", "what", "samples_a", "samples_b", "median_a_ms", "median_b_ms"),
    *("ratio", "low", "high", "verdict"),
)
METRIC_COLUMNS = ("config", "runs_a", "runs_b", "layer", "name", "metric", "a", "b", "difference", "verdict")

Array = NDArray[np.float64]
Samples = dict[Any, Array]


@dataclass(frozen=True)
class Comparison:
    """Set B against set A, the reference.

    `times` has a row per config and stage, or the whole pipeline; `metrics` one per config, layer and metric;
    `not_compared` the runs and files that are in neither, as set, run, reason. `broken` are the runs that failed in B
    while their config is complete in A. `apart` are the config keys in which the unmatched runs of A and B share no
    value: with these ignored they may match.
    """

    times: pd.DataFrame
    metrics: pd.DataFrame
    not_compared: pd.DataFrame
    broken: list[str]
    apart: list[str]


@dataclass
class _Set:
    """One side: which runs have which config, and what they measured. Configs go by a key of their content."""

    name: str
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, collection: Collection, ignore: Sequence[str]) -> _Set:
        made = cls(name)
        table = collection.runs[["run", "status", "config", "config_hash"]]
        for run, status, text, config_hash in table.itertuples(index=False):
            config = {key: value for key, value in json.loads(text).items() if key not in ("study", *ignore)}
            # A run that was given no config is known by its hash alone.
            key = json.dumps(config, sort_keys=True) if config else config_hash
            made.configs[key] = config
            if status == "complete":
                made.complete.setdefault(key, []).append(run)
            else:
                made.failed[run] = key
        return made


def compare(
    a: Collection, b: Collection, tolerance: float = 0.05, metric_tolerance: float = 0.0, ignore: Sequence[str] = ()
) -> Comparison:
    """Compares the complete runs of `b` with those of the same config in `a`; runs of one config in a set are pooled.

    A stage's sample is its time in one pass, summed over the layers, on the clock of its run: the stream, or the host
    without a GPU. The verdict comes from the ratio of the medians b/a and its interval (`ratio_of_medians`):

    - `same`: the samples are equal, or the interval lies within 1 ± tolerance;
    - `slower`: the interval lies above 1 + tolerance; `faster`: below 1 - tolerance;
    - `unclear`: anything else, so always with less than 3 samples on a side.

    A metric is deterministic, so equal values are `same` and others `better` or `worse` (`differs` where neither end is
    the good one); beyond one run a side, ranges that overlap are `unclear`.

    Args:
        a: the reference.
        b: what is compared with it.
        tolerance: relative difference of times that does not matter.
        metric_tolerance: relative difference of metrics that does not matter, of those in dB the same share of power.
        ignore: config keys that may differ between matched runs; `study` always may.

    Raises:
        InputError: no complete run of `b` has the config of one of `a`, or an ignored key is in no config.
    """
    known = {key for each in (a, b) for text in each.runs["config"] for key in json.loads(text)}
    for key in ignore:
        if key not in known:
            raise InputError(f"ignore={key}: no such config key; allowed: {', '.join(sorted(known))}")
    own, other = _Set.of("A", a, ignore), _Set.of("B", b, ignore)
    matched = [key for key in own.complete if key in other.complete]
    apart = _keys_apart(own, other)
    if not matched:
        raise InputError(_nothing_matched(own, other, apart))
    samples_a, samples_b, metrics_a, metrics_b = _samples(a), _samples(b), _metrics(a), _metrics(b)
    times: list[tuple[Any, ...]] = []
    metrics: list[tuple[Any, ...]] = []
    for key, label in _labels({key: own.configs[key] for key in matched}).items():
        runs_a, runs_b = own.complete[key], other.complete[key]
        head = (label, ", ".join(runs_a), ", ".join(runs_b))
        rows = _time_rows(_pool(samples_a, runs_a), _pool(samples_b, runs_b), tolerance)
        times += [(*head, *row) for row in rows]
        rows = _metric_rows(_pool(metrics_a, runs_a), _pool(metrics_b, runs_b), metric_tolerance)
        metrics += [(*head, *row) for row in rows]
    left = [*_not_compared(own, a, other), *_not_compared(other, b, own)]
    return Comparison(
        times=pd.DataFrame(times, columns=list(TIME_COLUMNS)),
        metrics=pd.DataFrame(metrics, columns=list(METRIC_COLUMNS)),
        not_compared=pd.DataFrame(left, columns=["set", "run", "reason"]),
        broken=[run for run, key in other.failed.items() if key in own.complete and key not in other.complete],
        apart=apart,
    )


def _keys_apart(own: _Set, other: _Set) -> list[str]:
    ours = [own.configs[key] for key in own.complete if key not in other.complete]
    theirs = [other.configs[key] for key in other.complete if key not in own.complete]

    def values(configs: Sequence[Mapping[str, Any]], key: str) -> set[str]:
        return {json.dumps(config.get(key)) for config in configs}

    keys = sorted({key for config in (*ours, *theirs) for key in config})
    return [key for key in keys if values(ours, key).isdisjoint(values(theirs, key))] if ours and theirs else []


def _nothing_matched(own: _Set, other: _Set, apart: Sequence[str]) -> str:
    for each in (own, other):
        if not each.complete:
            return f"{each.name} has no complete run; allowed: two sets that share a config"
    hint = f" (none agree in {', '.join(apart)}: ignore={','.join(apart)} sets that aside)" if apart else ""
    return f"no complete run of B has the config of one of A{hint}; allowed: two sets that share a config"


def _labels(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Each config by the values that tell it from the others; a single one is `all`."""
    if len(configs) == 1:
        return dict.fromkeys(configs, "all")
    columns: dict[tuple[str, ...], str] = {}
    for name in sorted({name for config in configs.values() for name in config}):
        values = tuple(json.dumps(config.get(name)) for config in configs.values())
        if len(set(values)) > 1:
            columns.setdefault(values, name)  # a key that repeats another's values tells nothing: tokens with n
    shown = [[f"{name}={value.strip(chr(34))}" for value in values] for values, name in columns.items()]
    return {key: " ".join(parts[index] for parts in shown) or key[:8] for index, key in enumerate(configs)}


def _samples(collection: Collection) -> dict[str, Samples]:
    """By run: the time of each pass, of the pipeline and of each stage summed over the layers, (repeats,) in ms.

    A run without measured passes has none.
    """
    found: dict[str, Samples] = {str(run): {} for run in collection.runs["run"]}
    for run, values in collection.passes.groupby("run", sort=False)["pipeline_ms"]:
        found[str(run)][PIPELINE] = values.to_numpy()
    for (run, stage), values in stage_passes(collection).groupby(level=["run", "stage"], sort=False):
        found[run][stage] = values.to_numpy()
    return found


def _metrics(collection: Collection) -> dict[str, Samples]:
    """By run: each metric of each layer, (1,), by layer, name and metric; but those that no file of the set has."""
    found: dict[str, Samples] = {str(run): {} for run in collection.runs["run"]}
    present = [name for name in COMPARED if collection.layers[name].notna().any()]
    table = collection.layers[["run", "layer", "name", *present]]
    for run, layer, name, *values in table.itertuples(index=False):
        for metric, value in zip(present, values, strict=True):
            found[run][layer, name, metric] = np.array([value])
    return found


def _pool(by_run: Mapping[str, Samples], runs: Sequence[str]) -> Samples:
    """The samples of several runs of one config as those of one."""
    names = dict.fromkeys(name for run in runs for name in by_run[run])
    return {name: np.concatenate([by_run[run][name] for run in runs if name in by_run[run]]) for name in names}


def _median(samples: Array) -> float:
    return float(samples[0] if samples.size == 1 else np.median(samples))  # metrics come one by one, by the thousand


def _time_rows(a: Samples, b: Samples, tolerance: float) -> Iterator[tuple[Any, ...]]:
    nothing = np.empty(0)
    for what in dict.fromkeys((*a, *b)):
        own, other = a.get(what, nothing), b.get(what, nothing)
        medians = [_median(samples) if samples.size else math.nan for samples in (own, other)]
        ratio = ratio_of_medians(own, other)
        verdict = time_verdict(own, other, ratio, tolerance)
        yield (what, own.size, other.size, *medians, ratio.ratio, ratio.low, ratio.high, verdict)


def time_verdict(a: Array, b: Array, ratio: Ratio, tolerance: float) -> str:
    """`same`, `slower`, `faster` or `unclear`, as `compare` says."""
    if np.array_equal(np.sort(a), np.sort(b)):
        return "same"
    if ratio.low > 1 + tolerance:
        return "slower"
    if ratio.high < 1 - tolerance:
        return "faster"
    return "same" if ratio.low >= 1 - tolerance and ratio.high <= 1 + tolerance else "unclear"


def _metric_rows(a: Samples, b: Samples, tolerance: float) -> Iterator[tuple[Any, ...]]:
    missing = np.array([math.nan])
    for key in dict.fromkeys((*a, *b)):
        layer, name, metric = key
        own, other = a.get(key, missing), b.get(key, missing)
        with np.errstate(all="ignore"):  # an SQNR may be infinite, and inf - inf is no number
            medians = _median(own), _median(other)
            difference = medians[1] - medians[0]
        yield (layer, name, metric, *medians, difference, metric_verdict(metric, own, other, tolerance))


def metric_verdict(metric: str, a: Array, b: Array, tolerance: float) -> str:
    """`same`, `better`, `worse`, `differs` or `unclear`, as `compare` says."""
    figure = COMPARED[metric]
    if np.array_equal(np.sort(a), np.sort(b), equal_nan=True):
        return "same"
    if np.isnan([*a, *b]).any():
        return "unclear"
    low, high = _median(a), _median(b)
    allowed = 10 * math.log10(1 + tolerance) if figure.units == "dB" else tolerance * abs(low)
    if low == high or abs(high - low) <= allowed:
        return "same"
    if a.max() >= b.min() and b.max() >= a.min():
        return "unclear"
    if figure.better == "neither":
        return "differs"
    return "better" if (high > low) == (figure.better == "higher") else "worse"


def _not_compared(own: _Set, collection: Collection, other: _Set) -> Iterator[tuple[str, str, str]]:
    errors = collection.runs.set_index("run")["error"]
    for run in own.failed:
        yield own.name, run, f"failed: {errors[run]}"
    for key, runs in own.complete.items():
        if key not in other.complete:
            for run in runs:
                yield own.name, run, f"no complete run of {other.name} has its config"
    for left_out in collection.left_out:
        # The tables are UTF-8; a file name may be any bytes.
        yield own.name, str(left_out.path).encode(errors="backslashreplace").decode(), left_out.reason
