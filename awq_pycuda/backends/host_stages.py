"""The stages that run on the host, whatever runs the others: the search and the steps."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.backends.base import Backend, H, Held, Layer
from awq_pycuda.choices import Objective
from awq_pycuda.quant.clipping import Clipped, clipped, find_ratios
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.joint import search_jointly
from awq_pycuda.quant.quantized import Quantized, steps_of
from awq_pycuda.quant.search import best, candidates, diag_errors, refuse_overflow, weight_means


class HostStages(Backend[H]):
    """A backend whose `compute_s` and `compute_scale_b` are NumPy over the host's threads."""

    @abstractmethod
    def on_host(self, handle: H) -> NDArray[Any]:
        """The array for a stage on the host to read."""

    @abstractmethod
    def from_host(self, handle: H, values: NDArray[Any]) -> None:
        """Stores what a stage on the host has made."""

    def compute_s(self, layer: Layer[H], convention: Convention) -> None:
        """See `Backend.compute_s`."""
        abs_mean, sq_mean = self.on_host(layer.abs_mean), self.on_host(layer.sq_mean)
        refuse_overflow(abs_mean, sq_mean)
        statistic = self.on_host(layer.statistic(convention.statistic))
        members = (layer, *layer.followers)
        of_weights = None
        if convention.asks_weights:
            of_weights = weight_means([self.on_host(each.w) for each in members], convention.quantizer)
        scales = candidates(convention, statistic, of_weights)
        # One layer after another, not their weights as one matrix: FP4 may have a factor for each matrix.
        if layer.unclipped is not None:
            errors = self._search_jointly(layer, layer.unclipped, convention, scales)
        elif convention.objective is Objective.diag:
            errors = np.sum([self._diag_errors(each, scales, sq_mean) for each in members], axis=0)
        else:
            errors = np.sum([self._output_sums(each, scales) for each in members], axis=0)
            errors /= sum(each.outputs for each in members)
            errors[~np.isfinite(errors)] = np.inf
        s = scales[best(convention, errors)]
        self.from_host(layer.error, errors)
        self.from_host(layer.s, s)
        self.from_host(layer.inv_s, 1 / s)

    def _search_jointly(
        self, layer: Layer[H], unclipped: H, convention: Convention, scales: NDArray[Any]
    ) -> NDArray[np.float64]:
        """The error of each candidate with its clipping; stores what it is without, and how the best one clips."""
        members = (layer, *layer.followers)
        of_members = [(self.on_host(each.w), each.held is not None) for each in members]
        found = search_jointly(convention, of_members, scales, self.on_host(layer.x), self.on_host(layer.sq_mean))
        self.from_host(unclipped, found.unclipped)
        for each, how in zip(members, found.clipped, strict=True):
            if each.held is not None:
                self._keep(each.held, how)
        return found.error

    def clip_weights(self, layer: Layer[H], convention: Convention) -> None:
        """See `Backend.clip_weights`."""
        if layer.held is None:
            return
        assert convention.clip is not None
        w, s, form = self.on_host(layer.w), self.on_host(layer.s), layer.quantized.format
        if layer.unclipped is None:
            x = convention.clip.of(self.on_host(layer.x))
            self._keep(layer.held, find_ratios(w, s, x, form, convention.clip.ratios).everywhere)
        self.from_host(layer.held.weights, clipped(w, s, self.on_host(layer.held.ratio), form))

    def _keep(self, held: Held[H], found: Clipped) -> None:
        """Stores how the weights are clipped."""
        self.from_host(held.ratio, found.ratio)
        self.from_host(held.error, found.error)
        self.from_host(held.error_chosen, np.array([found.error_chosen]))

    def compute_scale_b(self, w: H, s: H, quantized: Quantized[H]) -> None:
        """See `Backend.compute_scale_b`."""
        found = steps_of(self.on_host(w), self.on_host(s), quantized.format).arrays
        for name, handle in quantized.without_codes.arrays.items():
            self.from_host(handle, found[name])

    def _diag_errors(self, layer: Layer[H], scales: NDArray[Any], sq_mean: NDArray[Any]) -> NDArray[np.float64]:
        """See `diag_errors`."""
        return diag_errors(self.on_host(layer.w), scales, sq_mean, layer.quantized.format)

    def _output_sums(self, layer: Layer[H], scales: NDArray[Any]) -> NDArray[np.float64]:
        """Σ of `(X·Wᵀ − Y)²` for each candidate's Y; not finite for one that overflows."""
        trial = layer.trial
        self.matmul_reference(layer.x, layer.w, trial.reference)
        errors = np.empty(len(scales))
        with np.errstate(over="ignore", invalid="ignore"):
            for index, s in enumerate(scales):
                self.from_host(trial.s, s)
                self.from_host(trial.inv_s, 1 / s)
                _, errors[index] = self.trial_sums(layer)
        return errors
