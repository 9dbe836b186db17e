"""The search for scales as kernel launches: no value of it comes to the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.backends.base import Layer
from awq_pycuda.backends.cuda.memory import ManagedArray
from awq_pycuda.choices import Normalization, Objective
from awq_pycuda.kernels import table
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.tools import FINITE


class DeviceSearch:
    """`compute_s` on the device.

    Args:
        launch: a stage of the table of kernels, with its arrays and numbers by name.
        written: a new array with these values.
        of_format: arrays and numbers of a format, by name, for rows of so many channels.
    """

    def __init__(
        self,
        launch: Callable[..., object],
        written: Callable[[NDArray[Any]], ManagedArray],
        of_format: Callable[[Format, int], Mapping[str, ManagedArray | int]],
    ) -> None:
        self._launch = launch
        self._written = written
        self._of_format = of_format
        self._rules: dict[bytes, dict[str, ManagedArray]] = {}
        self._weight_means: dict[int, ManagedArray] = {}

    def forget(self) -> None:
        """Lets go of its arrays, which are about to be freed."""
        self._rules.clear()
        self._weight_means.clear()

    def compute_s(self, layer: Layer[ManagedArray], convention: Convention) -> None:
        """See `Backend.compute_s`."""
        w = layer.searched
        of_format = self._of_format(layer.quantized.format, w.shape[1])
        weight_mean = self._weight_mean(w, of_format) if convention.asks_weights else None
        self._launch(
            table.SEARCHES[convention.objective.name],
            **({"x": layer.x} if convention.objective is Objective.output else {}),
            w=w,
            statistics=layer.statistic(convention.statistic),
            sq_mean=layer.sq_mean,
            weight_mean=weight_mean,
            error=layer.error,
            s=layer.s,
            inv_s=layer.inv_s,
            by_mean=int(convention.normalization is Normalization.mean),
            **of_format,
            **self._of_convention(convention),
        )

    def _weight_mean(self, w: ManagedArray, of_format: Mapping[str, ManagedArray | int]) -> ManagedArray:
        """What the weights are counted as, in an array that layers of as many channels share."""
        in_features = w.shape[1]
        if in_features not in self._weight_means:
            self._weight_means[in_features] = self._written(np.zeros(in_features))
        self._launch(
            "weight_means", w=w, weight_mean=self._weight_means[in_features], group_size=of_format["group_size"]
        )
        return self._weight_means[in_features]

    def _of_convention(self, convention: Convention) -> dict[str, ManagedArray]:
        """What every candidate of every layer is made of: a layer's statistics under these rules."""
        least, grid = np.log(convention.least_power), convention.grid
        made_of: dict[str, NDArray[Any]] = {
            "gamma": grid.gamma,
            "beta": grid.beta,
            "duo": grid.duo.astype(np.int8),
            "rule": np.array([convention.floor, *convention.clamp, least, *FINITE], np.float64),
            "rank": convention.ranks,
        }
        key = b"".join(values.tobytes() for values in made_of.values())
        if key not in self._rules:
            self._rules[key] = {name: self._written(values) for name, values in made_of.items()}
        return self._rules[key]
