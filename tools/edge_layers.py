"""Writes a layer file of what real layers seldom have: `edge_layers.py FILE.npz`, for `compare_tools.py`.

Dead channels, groups of zeros, of one value and of one sign, columns of zeros, magnitudes far from 1, weights at
rounding ties: 64 × 256 each with 600 tokens, which every tool takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def _of_one_sign(sign: float) -> Callable[[Array, Array], None]:
    def change(w: Array, _: Array) -> None:
        w[:, :128] = sign * (np.abs(w[:, :128]) + 0.5)

    return change


def _times(of_w: float, of_x: float) -> Callable[[Array, Array], None]:
    def change(w: Array, x: Array) -> None:
        w *= of_w
        x *= of_x

    return change


def _dead(w: Array, x: Array) -> None:
    x[:, :8] = 0


def _dead_and_large(w: Array, x: Array) -> None:
    _dead(w, x)
    w[:, :8] *= 100


def _groups_of_zeros(w: Array, _: Array) -> None:
    w[3, :128] = 0
    w[5] = 0


def _groups_of_one_value(w: Array, _: Array) -> None:
    w[:4, :128], w[4:8, 128:] = 0.25, -0.25


def _columns_of_zeros(w: Array, _: Array) -> None:
    w[:, [7, 200, 201]] = 0


def _outliers(w: Array, x: Array) -> None:
    x[:, :3] *= 1000
    w[:, :3] /= 1000


def _nearly_dead(_: Array, x: Array) -> None:
    x[:, 5] *= 1e-12


def _ties(w: Array, x: Array) -> None:
    w[...] = np.round(w * 40) / 40
    x[...] = np.sign(x)  # every scale is 1


EDGES = (
    _dead,
    _dead_and_large,
    _of_one_sign(1),
    _of_one_sign(-1),
    _groups_of_zeros,
    _groups_of_one_value,
    _columns_of_zeros,
    _times(1e-6, 1),
    _times(1e4, 1),
    _times(1, 1e-5),
    _times(1, 1e4),
    _outliers,
    _nearly_dead,
    _ties,
)


def write(path: Path) -> None:
    """Writes the file."""
    draw = np.random.default_rng(5)
    arrays: dict[str, Any] = {}
    for index, change in enumerate(EDGES):
        w = 0.05 * draw.standard_normal((64, 256))
        x = draw.standard_normal((600, 256)) * draw.lognormal(size=256)
        change(w, x)
        arrays[f"{index:03d}.weight"], arrays[f"{index:03d}.activations"] = w.astype(np.float32), x.astype(np.float32)
    np.savez(path, **arrays)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
