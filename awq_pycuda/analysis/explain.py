"""Where the error of one layer comes from, in lines for one screen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.analysis.derived import PROPAGATED_SQNR, derived
from awq_pycuda.analysis.printing import printable
from awq_pycuda.errors import InputError
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.hdf5_worker import ask
from awq_pycuda.quant.format import Format
from awq_pycuda.results.explained import Explained, read_explained
from awq_pycuda.results.reader import LayerRecord
from awq_pycuda.spread import percent, removed_by

Array = NDArray[np.float64]
_BARS = "▁▂▃▄▅▆▇█"
_MOST_BARS = 60


def explain(path: Path, layer: str, top: int) -> Iterator[str]:
    """The lines.

    Args:
        path: a result file.
        layer: by its name, or its number.
        top: how many channels and groups are named.

    Raises:
        InputError: the file cannot be read, or has no such layer, or is of a version without such figures.
    """
    (found,) = ask([(read_explained, path, layer)])
    if isinstance(found, UnreadableError):
        raise InputError(f"{printable(path)}: {found}; allowed: a result file of awq_pycuda, and one of its layers")
    assert isinstance(found, Explained)
    yield from _figures(found)
    total = float(found.by_channel.sum())
    if not total > 0:
        yield "nothing is lost: every weight that a signal reaches is what its code stands for"
        return
    if found.clipped is not None:
        unclipped = found.record.metrics.get("unclipped_output_sqnr_db", math.nan)
        kept = f"{percent(found.clipped_fraction)} of the groups are clipped; without it {unclipped:.2f} dB"
        clipped, rounded = (percent(part / total) for part in (found.clipped, total - found.clipped))
        yield f"clipping: {kept}"
        yield f"  clipped weights hold {clipped} of the error, rounded ones {rounded}"
    yield from _shares("input channel", found.by_channel / total, top, _of_channels(found.channels))
    size = Format(found.config.get("quant.group_size")).size(found.record.in_features)
    if size < found.record.in_features:
        starts = np.arange(0, found.record.in_features, size)
        of_groups = np.add.reduceat(found.by_channel, starts) / total
        yield from _shares(f"group of {size} input channels", of_groups, top, {"from channel": starts})
    yield from _shares("output channel", found.by_row / total, top, {})


def _of_channels(channels: Mapping[str, Array]) -> dict[str, Array]:
    """What is told of input channels, by its heading; of files without max |x| the rest."""
    named = {"mean |x|": "abs_mean", "max |x|": "abs_max", "root of mean x²": "sq_mean", "s": "s"}
    found = {heading: channels[name] for heading, name in named.items() if name in channels}
    return found | {"root of mean x²": np.sqrt(channels["sq_mean"])}


def _figures(found: Explained) -> Iterator[str]:
    record, config = found.record, found.config
    bits, size = config.get("quant.bits", 8), config.get("quant.group_size")
    element = "FP4" if config.get("quant.element") == "e2m1" else f"int{bits}"
    kind = f"{element}, {'a step per row' if size is None else f'groups of {size}'}"
    shape = f"{record.out_features} x {record.in_features}, {record.tokens} tokens"
    yield f"layer {record.index:03d} {printable(record.name)}: {shape}; {kind}; convention {config.get('convention')}"
    figures = record.metrics
    for label, on in (("error", ""), ("held out", "held_out_")):
        rtn, by_max, own = (figures.get(f"{on}{of}output_sqnr_db", math.nan) for of in ("rtn_", "max_", ""))
        if not math.isnan(own):
            beside = "" if math.isnan(by_max) else f"max|x| {by_max:.2f} dB, "
            removed = f"{percent(removed_by(figures, on))} of the error"
            yield f"{label}: RTN {rtn:.2f} dB, {beside}AWQ {own:.2f} dB, which removes {removed}"
    propagated = derived(figures)[PROPAGATED_SQNR.name]
    if figures.get("propagated_output_mse") != figures.get("output_mse") and not math.isnan(propagated):
        yield f"propagated: {propagated:.2f} dB, the errors of the layers before included"
    of_others = (
        f", one for the outputs of layers {printable(record.shares_s_with)}, too" if record.shares_s_with else ""
    )
    chosen = _candidate(record, record.chosen)
    yield f"search by {record.objective}: gamma {chosen} of {record.gamma.size} candidates{of_others}"
    if record.gamma.size > 1 and np.isfinite(record.error).all():
        first, last = (f"{record.gamma[index]:g}" for index in (0, -1))
        yield f"  error from gamma {first} to {last}: {_bars(record.error)}"
        if found.unclipped is not None and np.isfinite(found.unclipped).all():
            best = _candidate(record, int(found.unclipped.argmin()))
            yield f"  without clipping gamma {best}: {_bars(found.unclipped)}"


def _candidate(record: LayerRecord, index: int) -> str:
    """The gamma of a candidate, and what else it had; below 0 the one chosen, of which only the gamma is known."""
    if index < 0:
        return f"{record.gamma_chosen:g}"
    beta = record.beta[index]
    of_weights = " with duo" if record.duo[index] else "" if math.isnan(beta) else f" and beta {beta:g}"
    return f"{record.gamma[index]:g}{of_weights}"


def _bars(values: Array) -> str:
    """A line of bars, the least value the lowest; of very many values every so many."""
    shown = values[:: -(-values.size // _MOST_BARS)]
    span = shown.max() - shown.min()
    heights = np.zeros(shown.size, int) if span == 0 else np.rint((shown - shown.min()) / span * (len(_BARS) - 1))
    return "".join(_BARS[int(height)] for height in heights)


def _shares(what: str, shares: Array, top: int, columns: Mapping[str, NDArray[Any]]) -> Iterator[str]:
    """The largest shares and all others; they sum to 100 %."""
    order = np.argsort(-shares, kind="stable")
    kept = order[:top]
    half = int(np.searchsorted(np.cumsum(shares[order]), 0.5)) + 1
    yield f"by {what} ({shares.size}; half of it lies in {half})"
    rows = [
        [str(index), percent(shares[index]), *(f"{value[index]:.4g}" for value in columns.values())] for index in kept
    ]
    if shares.size > len(kept):
        rest = np.delete(np.arange(shares.size), kept)
        rows.append([f"{rest.size} others", percent(float(shares[rest].sum())), *["" for _ in columns]])
    rows.append(["all", percent(float(shares.sum())), *["" for _ in columns]])
    yield from _aligned([["", "share", *columns], *rows])


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
