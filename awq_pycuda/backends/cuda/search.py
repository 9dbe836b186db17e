"""The search for scales as kernel launches: no value of it comes to the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
        written: Callable[[NDArray[np.float64]], ManagedArray],
        of_format: Callable[[Format, int], Mapping[str, ManagedArray | int]],
    ) -> None:
        self._launch = launch
        self._written = written
        self._of_format = of_format
        self._rules: dict[bytes, dict[str, ManagedArray]] = {}

    def forget(self) -> None:
        """Lets go of its arrays, which are about to be freed."""
        self._rules.clear()

    def compute_s(self, layer: Layer[ManagedArray], convention: Convention) -> None:
        """See `Backend.compute_s`."""
        # What every candidate of every layer is made of: the layer's statistic under the convention's rules.
        least = np.log(convention.least_power)
        rule = np.array([convention.floor, *convention.clamp, least, *FINITE], np.float64)
        key = convention.grid.gamma.tobytes() + rule.tobytes()
        if key not in self._rules:
            self._rules[key] = {"gamma": self._written(convention.grid.gamma), "rule": self._written(rule)}
        # To the kernels whatever scales are made of is the mean.
        made_of = self._rules[key] | {"abs_mean": layer.statistic(convention.statistic), "sq_mean": layer.sq_mean}
        w = layer.searched
        self._launch(
            table.SEARCHES[convention.objective.name],
            **({"x": layer.x} if convention.objective is Objective.output else {}),
            w=w,
            error=layer.error,
            s=layer.s,
            inv_s=layer.inv_s,
            by_mean=int(convention.normalization is Normalization.mean),
            **self._of_format(layer.quantized.format, w.shape[1]),
            **made_of,
        )
