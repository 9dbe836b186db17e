"""What a result file has of each layer beside its figures: all that makes codes of weights again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.results import schema
from awq_pycuda.results.opened import File, Scalar, opened, place


@dataclass(frozen=True)
class LayerScales:
    """Of one layer of a run, float32: `s` (K,), `steps` and what else its format has, (N, groups) each.

    `tensor_scale` is (1,); `ratio` is there where weights were clipped.
    """

    s: NDArray[np.float32]
    steps: NDArray[np.float32]
    zero_points: NDArray[np.float32] | None
    tensor_scale: NDArray[np.float32] | None
    ratio: NDArray[np.float32] | None


def read_scales(path: Path, layers: int) -> list[LayerScales]:
    """Those of the first so many layers of a result file.

    Raises:
        UnreadableError: whatever is wrong with it, in one line.
    """

    def read_layers(file: File, _root: Mapping[str, Scalar]) -> list[LayerScales]:
        return [_read_layer(file, layer) for layer in range(layers)]

    return opened(path, schema, read_layers)


def _read_layer(file: File, layer: int) -> LayerScales:
    where = place(schema.LAYER, layer)
    of_row = f"{where}/group" not in file.found

    def of_groups(name: str) -> NDArray[np.float32] | None:
        """(N, groups), which of steps per row is stored as (N,)."""
        if f"{where}/{name}" not in file.found:
            return None
        values = file.numbers(f"{schema.LAYER}/{name}", layer, 1 if of_row else 2).astype(np.float32)
        return values[:, None] if of_row else values

    steps, zero_points = of_groups("scales/scale_b"), of_groups("scales/zero_point")
    ratio = of_groups("clip/ratio")
    if steps is None:
        raise UnreadableError(f"{where}/scales/scale_b is missing")
    for name, values in {"scales/zero_point": zero_points, "clip/ratio": ratio}.items():
        if values is not None and values.shape != steps.shape:
            raise UnreadableError(f"{where}/{name} has shape {values.shape}, the steps {steps.shape}")
    tensor_scale = None
    if f"{where}/scales/tensor_scale" in file.found:
        tensor_scale = file.numbers(f"{schema.LAYER}/scales/tensor_scale", layer).astype(np.float32).reshape(1)
    s = file.numbers(f"{schema.LAYER}/scales/s", layer).astype(np.float32)
    return LayerScales(s, steps, zero_points, tensor_scale, ratio)
