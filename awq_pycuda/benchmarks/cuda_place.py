"""The GPU as a place to benchmark: every variant of the table of kernels, on one stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Self

import numpy as np
import pycuda.driver as cuda

from awq_pycuda.backends.base import Backend, Layer
from awq_pycuda.backends.cuda.backend import CudaBackend
from awq_pycuda.backends.cuda.device import Gpu, open_gpu
from awq_pycuda.backends.cuda.memory import ManagedArray
from awq_pycuda.backends.cuda.meter import Meter
from awq_pycuda.benchmarks.cases import CASES, OUTPUT_SEARCH, SEARCHES, case_of
from awq_pycuda.benchmarks.ceilings import LINK, MOVES, CeilingSubject
from awq_pycuda.benchmarks.machine import Machine, Sample
from awq_pycuda.benchmarks.models import RESIDENT, STREAMED, Layers, ModelSubject, layers_of
from awq_pycuda.benchmarks.oracle import Exact
from awq_pycuda.benchmarks.places import KERNELS
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.benchmarks.subjects import OURS, Key, StageSubject, Subject, layer_of
from awq_pycuda.kernels import bench_table, table
from awq_pycuda.kernels.variant import Variant
from awq_pycuda.kernels.work import Unit, Work
from awq_pycuda.parallel import use_threads
from awq_pycuda.quant.conventions import Convention

DEVICE, HOST = "device", "host"  # the variants of a search, as search.where names them
HOST_STAGES = (*SEARCHES, "compute_scale_b")  # those that search.where=host runs on the host
_LINK_BYTES = 128 << 20
_NAN = 0x7FC00000  # of float32, as bits
_MOST_BYTES = 2 << 30  # of each array that a ceiling moves; what stays in the L2 at the end is then little of it


class CudaMachine:
    """The meter with the device's conditions beside each sample."""

    certainty = 0.95

    def __init__(self, gpu: Gpu, meter: Meter) -> None:
        self._gpu, self._meter = gpu, meter
        self.cache_bytes, self.flush = meter.cache_bytes, meter.flush
        self.probe_bytes = meter.cache_bytes // 3

    def sample(self, launch: Callable[[], object], cold: bool) -> Sample:
        """See `Machine.sample`."""
        us, late = self._meter.time(launch, cold)
        return Sample(us, late, self._gpu.conditions())


class CudaPlace:
    """The first device.

    Args:
        tile: the macro TILE of those kernels that have it.
    """

    torch_device = "cuda"

    def __init__(self, tile: int) -> None:
        self._gpu = open_gpu()
        self._tile = tile
        self.backend: Backend[Any] = self._made({})
        self._meter = Meter(self._gpu)
        self.machine: Machine = CudaMachine(self._gpu, self._meter)
        self.absent: list[str] = []
        self._kept: list[Any] = []

    def __enter__(self) -> Self:
        """See `Place`."""
        with ExitStack() as stack:
            stack.enter_context(use_threads(None))
            stack.enter_context(self._meter)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        """See `Place`."""
        self._kept.clear()
        self._stack.close()

    @property
    def stream(self) -> int | None:
        """See `Place`."""
        return int(self._meter.stream.handle)

    def free_bytes(self) -> int | None:
        """See `Place.free_bytes`."""
        free, _ = cuda.mem_get_info()
        return int(free)

    def reader(self, nbytes: int) -> Callable[[], object]:
        """See `Place.reader`."""
        return self._meter.reader(nbytes)

    def ceilings(self) -> list[Subject]:
        """See `Place.ceilings`."""
        free, _ = cuda.mem_get_info()
        count = min(_MOST_BYTES, free // 8) // 16 * 4
        data, out = self._meter.ones(count), cuda.mem_alloc(4 * count)
        self._kept = [data, out]  # launches know their addresses alone
        found: list[Subject] = []
        for variant in self._meter.variants:
            if variant.stage in MOVES:
                found.append(self._move(variant, data, out, count))
            elif variant.stage != "spin":
                found.append(self._rate(variant, out))
        return [*found, self._link(out, count)]

    def _link(self, out: Any, count: int) -> Subject:
        source = cuda.pagelocked_empty(min(count, _LINK_BYTES // 4), np.float32)
        source[:] = 1.5

        def launch() -> None:
            cuda.memcpy_htod_async(out, source, self._meter.stream)

        def check() -> str | None:
            cuda.memset_d32(out, 0, source.size)
            launch()
            self._meter.stream.synchronize()
            found = np.empty_like(source)
            cuda.memcpy_dtoh(found, out)
            return None if (found == 1.5).all() else "leaves a wrong result"

        return CeilingSubject(LINK, "from pinned memory", Work(source.nbytes, 0, 0), "fp32", launch, check)

    def _move(self, variant: Variant, data: Any, out: Any, count: int) -> Subject:
        nbytes = 4 * count
        arguments, work, wanted = {
            "read": ((int(data), int(out), count), Work(nbytes, 0, 0), None),
            "write": ((int(out), count), Work(0, nbytes, 0), 2.5),
            "copy": ((int(data), int(out), count), Work(nbytes, nbytes, 0), 1.0),
        }[variant.stage]
        launch = self._meter.call(variant, *arguments)
        ends = (0, count - 1024)

        def check() -> str | None:
            cuda.memset_d32(out, 0, count)
            launch()
            self._meter.stream.synchronize()
            found = np.empty((len(ends), 1024), np.float32)
            for row, begin in zip(found, ends, strict=True):
                cuda.memcpy_dtoh(row, int(out) + 4 * begin)
            return None if wanted is None or (found == wanted).all() else "leaves a wrong result"

        return CeilingSubject(variant.stage, variant.name, work, "fp32", launch, check)

    def _rate(self, variant: Variant, out: Any) -> Subject:
        (kernel,) = variant.kernels
        blocks = kernel.grid({"multiprocessors": self._gpu.multiprocessors})
        threads, _, _ = kernel.threads({})
        adds = variant.name == "multiply-add"
        launch = self._meter.call(variant, int(out), bench_table.STEPS)

        def check() -> str | None:
            cuda.memset_d32(out, 0, blocks * threads)
            launch()
            self._meter.stream.synchronize()
            found = np.empty((blocks, threads), np.float32)
            cuda.memcpy_dtoh(found, int(out))
            if adds:
                return None if (found == 2 * bench_table.CHAINS).all() else "leaves a wrong result"
            right = np.isfinite(found).all() and (found != 0).mean() > 0.5
            return None if right else "leaves no products"

        work = Work(0, 0, bench_table.operations(variant, self._gpu.multiprocessors))
        return CeilingSubject(variant.stage, variant.name, work, variant.unit, launch, check)

    @contextmanager
    def kernels(
        self, shape: Shape, convention: Convention, stages: Sequence[str]
    ) -> Iterator[dict[str, list[Subject]]]:
        """See `Place.kernels`: the i-th backend has the i-th variant of every stage; the last searches on the host."""
        variants = {case.name: list(table.variants(case.name).values()) for case in CASES if case.name in stages}
        found: dict[str, list[Subject]] = {stage: [] for stage in variants}
        with ExitStack() as stack:
            for index in range(max((1, *map(len, variants.values())))):
                own = {stage: each[index] for stage, each in variants.items() if index < len(each)}
                backend = self._entered(stack, {stage: each.name for stage, each in own.items()})
                layer = layer_of(backend, shape, convention)
                for stage, variant in own.items():
                    if obstacle := self._obstacle(variant, shape):
                        self.absent.append(f"{stage} {variant.name} at {shape}: {obstacle}")
                        continue
                    key = Key(KERNELS, stage, variant.name, OURS, shape)
                    unit, passes = variant.unit, variant.passes
                    found[stage].append(StageSubject(backend, layer, convention, case_of(stage), key, unit, passes))
                for stage in SEARCHES:
                    if not index and stage in found:
                        found[stage].append(_searching(backend, layer, convention, stage, DEVICE, shape))
            if on_host := [stage for stage in HOST_STAGES if stage in found]:
                backend = self._entered(stack, {}, search_on_host=True)
                layer = layer_of(backend, shape, convention)
                for stage in on_host:
                    found[stage].append(_searching(backend, layer, convention, stage, HOST, shape))
            yield found

    @contextmanager
    def backends(self) -> Iterator[dict[str, Backend[Any]]]:
        """See `Place.backends`: one for each variant of the product, and one that searches on the host."""
        with ExitStack() as stack:
            made = {
                name: self._entered(stack, {"dequantizeTiled": name})
                for name, variant in table.variants("dequantizeTiled").items()
                if variant.runs_on(self._gpu.limits.capability)
            }
            yield {**made, "search on the host": self._entered(stack, {}, search_on_host=True)}

    def product_unit(self, name: str) -> tuple[Unit, int]:
        """See `Place.product_unit`; beside the search on the host runs the first variant of the table."""
        found = table.variants("dequantizeTiled")
        variant = found.get(name) or next(iter(found.values()))
        return variant.unit, variant.passes

    def preferred(self, stage: str) -> Sequence[str]:
        """See `Place.preferred`."""
        return (DEVICE,) if stage in SEARCHES else table.BEST.get(stage) or list(table.variants(stage))

    @contextmanager
    def models(
        self, name: str, shape: Shape, convention: Convention, stages: Sequence[str]
    ) -> Iterator[dict[str, list[Subject]]]:
        """See `Place.models`: with the weights on the device, and streamed to it from pinned memory of the host."""
        with ExitStack() as stack:
            backend = self._entered(stack, {})
            layers = layers_of(backend, name, shape, convention)
            hosted = [_streamed(layer.w.shape) for layer in layers]
            streamed = [replace(layer, w=w, searched=w) for layer, w in zip(layers, hosted, strict=True)]
            yield {
                stage: [
                    ModelSubject(backend, layers, name, RESIDENT, stage, convention, shape, _unit(stage, DEVICE)),
                    StreamedModelSubject(backend, streamed, name, stage, convention, shape),
                ]
                for stage in SEARCHES
                if stage in stages
            }

    def _obstacle(self, variant: Variant, shape: Shape) -> str | None:
        size = shape.group_size or shape.in_features
        sizes = {
            "tokens": shape.tokens,
            "out_features": shape.out_features,
            "in_features": shape.in_features,
            "groups": -(-shape.in_features // size),
            "group_size": size,
        }
        return variant.obstacle({**variant.defaults(), "TILE": self._tile, **sizes}, self._gpu.limits)

    def _made(self, choices: Mapping[str, str], search_on_host: bool = False) -> CudaBackend:
        return CudaBackend({"TILE": self._tile}, choices, search_on_host)

    def _entered(self, stack: ExitStack, choices: Mapping[str, str], search_on_host: bool = False) -> CudaBackend:
        backend = stack.enter_context(self._made(choices, search_on_host))
        backend.stream = self._meter.stream  # where events are recorded, all of it runs
        return backend


def _searching(
    backend: Backend[Any], layer: Layer[Any], convention: Convention, stage: str, where: str, shape: Shape
) -> Subject:
    key = Key(KERNELS, stage, where, OURS, shape)
    return StageSubject(backend, layer, convention, case_of(stage), key, *_unit(stage, where))


def _unit(stage: str, where: str) -> tuple[Unit, int]:
    """What does the operations of a search, and how many for each that it asks for."""
    if (stage, where) != (OUTPUT_SEARCH, DEVICE):
        return "fp32", 1
    variant = table.find("search_output")
    return variant.unit, variant.passes


class _Streamed:
    """See `Allocation`: pinned on the host, plain memory on the device, and nothing moves by itself.

    Beside copies to managed memory nothing was searched; why that is so was not established.
    """

    def __init__(self, nbytes: int) -> None:
        self.memory = cuda.pagelocked_empty(nbytes, np.uint8)
        self._device = cuda.mem_alloc(nbytes)
        self.pointer = int(self._device)

    def to_device(self, stream: cuda.Stream) -> None:
        """Leaves it to who streams it."""

    def to_host(self, stream: cuda.Stream) -> None:
        """Waits until nothing copies from it any more."""
        stream.synchronize()

    def freeze(self) -> None:
        """Nothing: there is a copy on either side."""


def _streamed(shape: tuple[int, ...]) -> ManagedArray:
    return ManagedArray(_Streamed(4 * math.prod(shape)), 0, shape, np.float32)


class StreamedModelSubject(ModelSubject):
    """The scales of every layer of a model whose weights come over the link while the layers before are searched.

    Args are those of `ModelSubject`; the weights of the layers are `_streamed`.
    """

    def __init__(
        self,
        backend: CudaBackend,
        layers: Layers,
        name: str,
        stage: str,
        convention: Convention,
        shape: Shape,
    ) -> None:
        super().__init__(backend, layers, name, STREAMED, stage, convention, shape, _unit(stage, DEVICE))
        self._stream, self._copying = backend.stream, cuda.Stream()

    def fill(self, exact: Exact) -> None:
        """See `Subject.fill`: on the device there are no weights before they are copied."""
        super().fill(exact)
        for layer in self._layers:
            cuda.memset_d32(layer.w.pointer, _NAN, math.prod(layer.w.shape))

    def launch(self) -> None:
        """See `Subject.launch`: a copy waits until what lies there has been searched."""
        free = [cuda.Event().record(self._stream)] * len(self._layers)
        for _ in range(self._blocks):
            for index, layer in enumerate(self._layers):
                self._copying.wait_for_event(free[index])
                cuda.memcpy_htod_async(layer.w.pointer, layer.w.array, self._copying)
                self._stream.wait_for_event(cuda.Event().record(self._copying))
                self._search(layer)
                free[index] = cuda.Event().record(self._stream)
