"""Where a benchmark runs: a backend with its variants, what times it, its ceilings, and the peers that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, Self

import numpy as np

from awq_pycuda.backends.base import Backend
from awq_pycuda.backends.choose import why_not_compiled
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.benchmarks.cases import CASES, SEARCHES, Case
from awq_pycuda.benchmarks.ceilings import host_ceilings
from awq_pycuda.benchmarks.machine import CpuMachine, Machine
from awq_pycuda.benchmarks.models import ModelSubject, layers_of
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.benchmarks.subjects import OURS, Key, StageSubject, Subject, layer_of
from awq_pycuda.kernels.work import Unit
from awq_pycuda.parallel import use_threads
from awq_pycuda.quant.conventions import Convention

KERNELS = "kernels"
_NUMPY_ALONE = ("init", "matmul_reference")  # the stages that have no other variant on the host


class Place(Protocol):
    """A machine to measure, entered.

    Attributes:
        backend: one that tells device and versions, and allocates.
        machine: times launches.
        torch_device: where PyTorch finds the same machine.
        absent: what cannot be measured there, a line each.
    """

    backend: Backend[Any]
    machine: Machine
    torch_device: str
    absent: list[str]

    @property
    def stream(self) -> int | None:
        """Address of the stream that all which is timed must run on; None where there is none."""

    def __enter__(self) -> Self:
        """Takes the machine."""

    def __exit__(self, *exc: object) -> None:
        """Gives it back."""

    def free_bytes(self) -> int | None:
        """Free memory of the device; None where that is the host's own."""

    def reader(self, nbytes: int) -> Callable[[], object]:
        """What reads an array of so many bytes, and nothing else."""

    def ceilings(self) -> list[Subject]:
        """What it can do at most."""

    def kernels(
        self, shape: Shape, convention: Convention, stages: Sequence[str]
    ) -> AbstractContextManager[dict[str, list[Subject]]]:
        """By stage: its variants on one shape; their arrays live within the `with` block."""

    def product_unit(self, name: str) -> tuple[Unit, int]:
        """What does the operations of the product of one of `backends`, and how many for each that it asks for."""

    def preferred(self, stage: str) -> Sequence[str]:
        """Variants of a stage, beginning with the one that a run takes if it can."""

    def models(
        self, name: str, shape: Shape, convention: Convention, stages: Sequence[str]
    ) -> AbstractContextManager[dict[str, list[Subject]]]:
        """By stage: its searches of a model, with the candidates and groups of a shape."""

    def backends(self) -> AbstractContextManager[dict[str, Backend[Any]]]:
        """By the words that tell them apart: backends that a whole pass is run by."""


class CpuPlace:
    """The host, by NumPy and, where Numba is installed, by compiled loops."""

    torch_device = "cpu"

    def __init__(self, backend: Backend[Any] | None = None, machine: Machine | None = None) -> None:
        self._variants: dict[str, Backend[Any]] = {"numpy": backend or CpuBackend()}
        self.machine: Machine = machine or CpuMachine()
        self.absent: list[str] = []
        self.stream = None
        if backend is None:
            if (obstacle := why_not_compiled()) is None:
                from awq_pycuda.backends.compiled import CompiledCpuBackend

                self._variants["numba"] = CompiledCpuBackend()
            else:
                self.absent.append(f"variant numba: {obstacle}")
        self.backend = [*self._variants.values()][-1]

    def __enter__(self) -> Self:
        """See `Place`."""
        with ExitStack() as stack:
            stack.enter_context(use_threads(None))
            for backend in self._variants.values():
                stack.enter_context(backend)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        """See `Place`."""
        self._stack.close()

    def free_bytes(self) -> None:
        """None: the arrays live in the host's memory."""

    def reader(self, nbytes: int) -> Callable[[], object]:
        """See `Place.reader`."""
        values = np.ones(nbytes // 8)
        return values.max

    def ceilings(self) -> list[Subject]:
        """See `Place.ceilings`."""
        return host_ceilings()

    @contextmanager
    def kernels(
        self, shape: Shape, convention: Convention, stages: Sequence[str]
    ) -> Iterator[dict[str, list[Subject]]]:
        """See `Place.kernels`."""
        layers = {name: layer_of(backend, shape, convention) for name, backend in self._variants.items()}
        yield {
            case.name: [
                StageSubject(
                    self._variants[name],
                    layer,
                    convention,
                    case,
                    Key(KERNELS, case.name, name, OURS, shape),
                    host_unit(case),
                )
                for name, layer in layers.items()
                if name == "numpy" or case.name not in _NUMPY_ALONE
            ]
            for case in CASES
            if case.name in stages
        }

    def product_unit(self, name: str) -> tuple[Unit, int]:
        """See `Place.product_unit`."""
        return "fp32", 1

    def preferred(self, stage: str) -> Sequence[str]:
        """See `Place.preferred`."""
        return [*self._variants][::-1]

    @contextmanager
    def models(
        self, name: str, shape: Shape, convention: Convention, stages: Sequence[str]
    ) -> Iterator[dict[str, list[Subject]]]:
        """See `Place.models`: one block, since all of them take minutes, and the same one for every variant."""
        layers = layers_of(self.backend, name, shape, convention)
        yield {
            stage: [
                ModelSubject(backend, layers, name, variant, stage, convention, shape, ("fp32", 1), 1)
                for variant, backend in self._variants.items()
            ]
            for stage in SEARCHES
            if stage in stages
        }

    @contextmanager
    def backends(self) -> Iterator[dict[str, Backend[Any]]]:
        """See `Place.backends`."""
        yield dict(self._variants)


def host_unit(case: Case) -> Unit:
    """What does the operations of a stage on the host."""
    return "fp64" if case.name in ("accum_stats", "error_sums") else "fp32"
