"""What each stage must do at the least: bytes that it must move and operations, from the shape of its layer.

Data: needs nothing. Counts hold whatever kernel does it: each array is read or written once, and an operation is one of
the arithmetic that the stage is defined by. Numbers or NumPy's arrays, element by element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

# What does the arithmetic; a matrix unit's multiplications and additions count as two operations, too.
Unit = Literal["fp32", "fp64", "fp16 matrix", "int8 matrix"]

# Of the search, per weight and candidate: two for the maximum of a row, five for the error (t = w·s; two that round
# t / step; its difference from t; its square added up). Each is one instruction of a multiply-add's cost, so it counts
# as the two operations of one.
_SEARCH = 2 * 7


@dataclass(frozen=True)
class Sizes:
    """The shape of a layer: `tokens` M, `out_features` N, `in_features` K, `groups` of a row, `candidates` searched."""

    tokens: Any
    out_features: Any
    in_features: Any
    groups: Any = 1
    candidates: Any = 1


@dataclass(frozen=True)
class Work:
    """Bytes read and written, and operations."""

    read: Any
    written: Any
    operations: Any


def _product(z: Sizes) -> Any:
    return 2 * z.tokens * z.out_features * z.in_features


def _weights(z: Sizes) -> Any:
    return z.out_features * z.in_features


def _outputs(z: Sizes) -> Any:
    return z.tokens * z.out_features


def _inputs(z: Sizes) -> Any:
    return z.tokens * z.in_features


def _steps(z: Sizes) -> Any:
    return z.out_features * z.groups


WORK: dict[str, Callable[[Sizes], Work]] = {
    # Its random numbers are integers; what they cost is not counted.
    "init": lambda z: Work(0, 4 * _weights(z), _weights(z)),
    # |x| and its sum, x² and its sum: an addition, and a multiplication and addition.
    "accum_stats": lambda z: Work(4 * _inputs(z), 8 * z.in_features, 3 * _inputs(z)),
    "find_abs_max": lambda z: Work(4 * _inputs(z), 4 * z.in_features, _inputs(z)),
    "compute_s": lambda z: Work(
        4 * _weights(z) + 8 * z.in_features,
        8 * z.in_features + 8 * z.candidates,
        _SEARCH * _weights(z) * z.candidates,
    ),
    # The same by the output: one product of the activations with what each candidate takes from the weights.
    "compute_s_output": lambda z: Work(
        4 * _weights(z) + 4 * _inputs(z) + 4 * z.in_features,
        8 * z.in_features + 8 * z.candidates,
        _product(z) * z.candidates,
    ),
    "compute_scale_b": lambda z: Work(4 * _weights(z) + 4 * z.in_features, 4 * _steps(z), 2 * _weights(z)),
    "quantize_awq": lambda z: Work(4 * _weights(z) + 4 * z.in_features + 4 * _steps(z), _weights(z), 2 * _weights(z)),
    "dequantizeTiled": lambda z: Work(
        4 * _inputs(z) + _weights(z) + 4 * z.in_features + 4 * _steps(z), 4 * _outputs(z), _product(z)
    ),
    "relu": lambda z: Work(4 * _outputs(z), 4 * _outputs(z), _outputs(z)),
    "matmul_reference": lambda z: Work(4 * _inputs(z) + 4 * _weights(z), 4 * _outputs(z), _product(z)),
    # Both squares and their sums, and the difference.
    "error_sums": lambda z: Work(8 * _outputs(z), 16, 5 * _outputs(z)),
}
