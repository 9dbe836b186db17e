"""Figures of a layer that follow from its metrics: in the tables, but in no file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from awq_pycuda.results import schema
from awq_pycuda.results.entries import Entry
from awq_pycuda.spread import removed_by

ERROR_REMOVED = Entry("@error_removed", "1 - output_mse / rtn_output_mse", "f8")
HELD_OUT_REMOVED = Entry("@held_out_error_removed", "1 - held_out_output_mse / held_out_rtn_output_mse", "f8")
PROPAGATED_SQNR = Entry(
    "@propagated_sqnr_db", "the signal's power over propagated_output_mse", "f8", (), "dB", better="higher"
)
DERIVED = (ERROR_REMOVED, HELD_OUT_REMOVED, PROPAGATED_SQNR)

_ORDER = ("higher", "lower", "neither")
_FIGURES = (*schema.metrics(), *DERIVED, schema.entry(f"{schema.LAYER}/search/@gamma_chosen"))
COMPARED = {
    each.name: each
    for each in sorted((each for each in _FIGURES if each.better), key=lambda each: _ORDER.index(str(each.better)))
}
"""By name, every figure of a layer in which two runs can be compared; those with a good end come first."""


def derived(metrics: Mapping[str, float]) -> dict[str, float]:
    """The shares of RTN's output error that AWQ removed, and the SQNR against the unquantized chain in dB, by name.

    The signal's power is not stored: it is `output_mse · 10^(output_sqnr_db / 10)`, or the same of RTN where AWQ's
    error is 0. A layer without signal has no SQNR, and so none against the chain.
    """

    def figure(name: str) -> np.float64:
        return np.float64(metrics.get(name, math.nan))

    awq, rtn, propagated = (figure(f"{kind}output_mse") for kind in ("", "rtn_", "propagated_"))
    signal = awq * 10 ** (figure("output_sqnr_db") / 10) if awq > 0 else rtn * 10 ** (figure("rtn_output_sqnr_db") / 10)
    exact = propagated == 0 and not math.isnan(figure("output_sqnr_db"))
    return {
        ERROR_REMOVED.name: float(removed_by(metrics)),
        HELD_OUT_REMOVED.name: float(removed_by(metrics, "held_out_")),
        PROPAGATED_SQNR.name: math.inf if exact else float(10 * np.log10(signal / propagated)),
    }
