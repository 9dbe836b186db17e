"""The pipeline's stages as CUDA kernels through PyCUDA, on managed memory, by the table of kernels."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import lru_cache, partial
from importlib import metadata
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import pycuda.driver as cuda
from numpy.typing import DTypeLike, NDArray
from pycuda.compiler import SourceModule

from awq_pycuda.backends.base import Layer, Mark, Recorded, Unrecordable
from awq_pycuda.backends.cuda.device import open_gpu
from awq_pycuda.backends.cuda.early import toolchain
from awq_pycuda.backends.cuda.graph import GraphError, capture
from awq_pycuda.backends.cuda.jit import load
from awq_pycuda.backends.cuda.memory import ManagedArray, allocate
from awq_pycuda.backends.cuda.recording import Recording, launched_by
from awq_pycuda.backends.cuda.search import DeviceSearch
from awq_pycuda.backends.host_stages import HostStages
from awq_pycuda.kernels import table
from awq_pycuda.kernels.variant import IN_TURN, MAX_BLOCKS, Argument, Device, Kernel, Variant
from awq_pycuda.quant import for_kernels
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized

T = TypeVar("T")

_version = lru_cache(metadata.version)  # reads files, and a process keeps the libraries that it has loaded
_ALIGNMENT = 256  # of scratch arrays: as the driver aligns allocations


class _Bound(NamedTuple):
    """The launches of a stage on certain arrays, ready to be repeated.

    Attributes:
        arrays: what must lie on the device.
        zeroed: address and bytes of what must be 0 before.
        launches: PyCUDA's calls and their arguments.
        scratch: address and bytes of each scratch array.
    """

    arrays: list[ManagedArray]
    zeroed: list[tuple[int, int]]
    launches: list[tuple[Callable[..., None], tuple[Any, ...]]]
    scratch: dict[str, tuple[int, int]]


class CudaBackend(HostStages[ManagedArray]):
    """Kernels in one stream over managed arrays.

    Args:
        parameters: macros that the table of kernels leaves to the config, such as TILE.
        choices: the variant of each stage that has several, by name; the first one where a stage is missing.
        search_on_host: whether scales are searched, and steps made, on the host.
    """

    name = "cuda"

    def __init__(self, parameters: Mapping[str, int], choices: Mapping[str, str], search_on_host: bool = False) -> None:
        self._search = None if search_on_host else DeviceSearch(self._run, self._written, self._format)
        self._parameters = parameters
        if unknown := choices.keys() - set(table.stages()):
            raise ValueError(f"no stage is called {', '.join(sorted(unknown))}; there are {', '.join(table.stages())}")
        self._variants = {stage: table.candidates(stage, choices.get(stage)) for stage in table.stages()}
        self._gpu = open_gpu()
        toolchain()  # a missing nvcc is bad set-up: said before any work, not at the first launch
        self._bound: dict[tuple[object, ...], _Bound] = {}
        self._formats: dict[tuple[Format, int], dict[str, ManagedArray | int]] = {}
        self._arrays: list[ManagedArray] = []
        self._workspace: cuda.DeviceAllocation | None = None
        self._workspace_bytes = 0
        self._recordings: list[Recording] = []
        self._recording: Recording | None = None  # under way
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Makes the context current and opens a stream; kernels compile at the first launch."""
        with ExitStack() as stack:
            stack.enter_context(self._gpu.current())
            # Fails on a device that an earlier fault has made unusable: the context must be popped again then.
            self.stream = cuda.Stream()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        """Frees everything while the context is still current, then gives it back."""
        for recording in self._recordings:
            with suppress(GraphError):  # after a fault nothing can be given back, and the fault is what must be told
                recording.free()
        self._recordings.clear()
        for array in self._arrays:
            array.free()
        self._arrays.clear()
        self._bound.clear()
        self._formats.clear()
        if self._search is not None:
            self._search.forget()
        self._workspace, self._workspace_bytes = None, 0
        del self.stream
        self._stack.close()

    def device(self) -> dict[str, Any]:
        """See `Backend.device`; with the variants of the stages that have several."""
        return {**self._gpu.describe(), "kernels": {stage: self._variants[stage][0].name for stage in table.KEYS}}

    @property
    def limits(self) -> Device:
        """What decides which kernels can run."""
        return self._gpu.limits

    def versions(self) -> dict[str, str]:
        """PyCUDA, cuda-bindings and nvcc."""
        return {
            "pycuda": _version("pycuda"),
            "cuda-bindings": _version("cuda-bindings"),
            "nvcc": toolchain().version,
        }

    def conditions(self) -> dict[str, float]:
        """See `Backend.conditions`."""
        return self._gpu.conditions()

    def available_bytes(self) -> int:
        """See `Backend.available_bytes`."""
        free, _ = cuda.mem_get_info()
        return int(free)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> ManagedArray:
        """See `Backend.empty`."""
        return self._allocate([shape], np.float32 if dtype is None else dtype)[0]

    def empty_together(self, *shapes: tuple[int, ...]) -> list[ManagedArray]:
        """See `Backend.empty_together`: one managed allocation."""
        return self._allocate(shapes, np.float32)

    def _allocate(self, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> list[ManagedArray]:
        arrays = allocate(self._gpu, shapes, dtype)
        self._arrays += arrays
        return arrays

    def rows(self, handle: ManagedArray, rows: slice) -> ManagedArray:
        """See `Backend.rows`."""
        found = handle.rows(rows)
        self._arrays.append(found)
        return found

    def write(self, handle: ManagedArray, values: NDArray[Any]) -> None:
        """See `Backend.write`."""
        handle.to_host(self.stream)
        np.copyto(handle.array, values, casting="same_kind")

    def read(self, handle: ManagedArray) -> NDArray[Any]:
        """See `Backend.read`."""
        handle.to_host(self.stream)
        view = handle.array.view()
        view.flags.writeable = False
        return view

    def freeze(self, handle: ManagedArray) -> None:
        """See `Backend.freeze`."""
        handle.freeze()

    def init(
        self,
        out: ManagedArray,
        seed: int,
        subsequence: int,
        row_gain: NDArray[np.float32] | None,
        col_gain: NDArray[np.float32] | None,
    ) -> None:
        """See `Backend.init`."""
        gains = [None if gain is None else self._written(gain) for gain in (row_gain, col_gain)]
        self._run("init", out=out, seed=seed, subsequence=subsequence, row_gain=gains[0], col_gain=gains[1])

    def accum_stats(self, x: ManagedArray, abs_mean: ManagedArray, sq_mean: ManagedArray) -> None:
        """See `Backend.accum_stats`; with `stats=atomic` the last bits change from run to run."""
        self._run("accum_stats", x=x, abs_mean=abs_mean, sq_mean=sq_mean)

    def find_abs_max(self, x: ManagedArray, abs_max: ManagedArray) -> None:
        """See `Backend.find_abs_max`."""
        self._run("find_abs_max", x=x, abs_max=abs_max)

    def compute_s(self, layer: Layer[ManagedArray], convention: Convention) -> None:
        """See `Backend.compute_s`.

        Raises:
            ValueError: the search is on the device, which clips no candidate's weights, and a joint one is asked for.
        """
        if self._search is None:
            super().compute_s(layer, convention)
            return
        if layer.unclipped is not None:  # or how it is clipped would be whatever its memory holds
            raise ValueError("no kernel searches scales jointly with clipping: search on the host")
        self._search.compute_s(layer, convention)

    def clip_weights(self, layer: Layer[ManagedArray], convention: Convention) -> None:
        """See `Backend.clip_weights`: on the host."""
        if layer.held is not None and self._recording is not None:
            raise Unrecordable("weights are clipped on the host")
        super().clip_weights(layer, convention)

    def compute_scale_b(self, w: ManagedArray, s: ManagedArray, quantized: Quantized[ManagedArray]) -> None:
        """See `Backend.compute_scale_b`; where the search is, steps are made, too."""
        if self._search is None:
            super().compute_scale_b(w, s, quantized)
            return
        self._run("compute_scale_b", w=w, s=s, **self._steps(quantized, w))

    def quantize_awq(self, w: ManagedArray, s: ManagedArray, quantized: Quantized[ManagedArray]) -> None:
        """See `Backend.quantize_awq`."""
        self._run("quantize_awq", w=w, s=s, wq=quantized.codes, **self._steps(quantized, w))

    def dequantize_tiled(
        self, x: ManagedArray, quantized: Quantized[ManagedArray], inv_s: ManagedArray, y: ManagedArray
    ) -> None:
        """See `Backend.dequantize_tiled`."""
        self._product(x, quantized, inv_s, y)

    @property
    def within(self) -> frozenset[str]:
        """See `Backend.within`: relu, where the product chosen can do it."""
        return frozenset({"relu"} if self._variants["dequantizeTiled"][0].with_relu else ())

    def multiply(self, layer: Layer[ManagedArray]) -> None:
        """See `Backend.multiply`."""
        if "relu" not in self.within:
            super().multiply(layer)
            return
        self._product(layer.x, layer.quantized, layer.inv_s, layer.out, bias=layer.bias, relu=1)

    def _product(
        self,
        x: ManagedArray,
        quantized: Quantized[ManagedArray],
        inv_s: ManagedArray,
        y: ManagedArray,
        **ending: ManagedArray | int | None,
    ) -> None:
        if self._variants["dequantizeTiled"][0].with_relu:
            ending = {"bias": None, "relu": 0, **ending}
        steps = self._steps(quantized, x)
        self._run("dequantizeTiled", x=x, wq=quantized.codes, inv_s=inv_s, y=y, **steps, **ending)

    def _steps(self, quantized: Quantized[ManagedArray], like: ManagedArray) -> dict[str, ManagedArray | int | None]:
        """What kernels are given of a quantized matrix but its codes; its rows are as long as those of `like`."""
        return {
            "scale_b": quantized.steps,
            "zero_points": quantized.zero_points,
            "tensor_scale": quantized.tensor_scale,
            **self._format(quantized.format, like.shape[-1]),
        }

    def _format(self, form: Format, in_features: int) -> dict[str, ManagedArray | int]:
        """What kernels are given of a format, for rows of so many channels."""
        found = self._formats.get((form, in_features))
        if found is None:
            found = {"form": self._written(for_kernels.numbers(form)), **for_kernels.values(form, in_features)}
            self._formats[form, in_features] = found
        return found

    def on_host(self, handle: ManagedArray) -> NDArray[Any]:
        """See `HostStages.on_host`."""
        return self.read(handle)

    def from_host(self, handle: ManagedArray, values: NDArray[Any]) -> None:
        """See `HostStages.from_host`."""
        self.write(handle, values)

    def relu(self, y: ManagedArray, bias: ManagedArray | None, out: ManagedArray) -> None:
        """See `Backend.relu`."""
        self._run("relu", y=y, bias=bias, out=out)

    def matmul_reference(self, x: ManagedArray, w: ManagedArray, y: ManagedArray) -> None:
        """See `Backend.matmul_reference`: sums in float64."""
        self._run("matmul_reference", x=x, w=w, y=y)

    def error_sums(self, reference: ManagedArray, value: ManagedArray) -> tuple[float, float]:
        """See `Backend.error_sums`."""
        pointer, nbytes = self._run("error_sums", reference=reference, value=value)["partial"]
        sums = np.empty((nbytes // 16, 2), np.float64)
        cuda.memcpy_dtoh_async(sums, pointer, self.stream)
        self.stream.synchronize()
        signal, noise = sums.sum(axis=0)
        return float(signal), float(noise)

    def record(self, work: Callable[[], T]) -> Recorded[T]:
        """See `Backend.record`: as one CUDA graph."""
        if self._search is None:
            raise Unrecordable("the search runs on the host")
        recording = Recording()
        self._recordings.append(recording)
        self._recording = recording
        try:
            work()  # a capture takes no compilation, no allocation and no move of managed memory
            recording.placing = False
            recording.graph, returned = capture(self.stream, work, overlapping=self.limits.capability >= IN_TURN)
        finally:
            self._recording = None
        recording.workspace = self._workspace  # which the graph goes on using, should another take its place
        return Recorded(returned, lambda: recording.launch(self.stream), launched_by(self.limits.capability))

    def mark(self) -> Mark:
        """See `Backend.mark`."""
        if self._recording is not None:
            return self._recording.mark(self.stream)
        event = cuda.Event()
        event.record(self.stream)
        return Mark(time.perf_counter(), event)

    def synchronize(self) -> None:
        """See `Backend.synchronize`."""
        self.stream.synchronize()

    def gpu_ms(self, start: Mark, end: Mark) -> float:
        """See `Backend.gpu_ms`."""
        return float(start.event.time_till(end.event))

    def _written(self, values: NDArray[Any]) -> ManagedArray:
        handle = self.empty(values.shape, values.dtype)
        self.write(handle, values)
        return handle

    def _run(self, stage: str, **values: ManagedArray | int | None) -> dict[str, tuple[int, int]]:
        """Launches the chosen variant of a stage.

        Args:
            stage: as the table of kernels names it.
            values: its arrays, numbers and macros by the names of the table; None for an array that is left out.

        Returns:
            Address and bytes of each scratch array; valid until the next call.

        Raises:
            ValueError: the kernel would misread an array, or does not take these sizes.
        """
        # A pass repeats the same calls: what follows from the arrays is worked out and checked once.
        key = (stage, *values.values())
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._bind(self._variants[stage], values)
        for array in bound.arrays:
            array.to_device(self.stream)
        if self._recording is not None:
            self._recording.arrays.update(dict.fromkeys(bound.arrays))
            if self._recording.placing:
                return bound.scratch
        for pointer, nbytes in bound.zeroed:
            cuda.memset_d32_async(pointer, 0, nbytes // 4, self.stream)
        for call, arguments in bound.launches:
            call(*arguments)
        return bound.scratch

    def _bind(self, variants: Sequence[Variant], given: Mapping[str, ManagedArray | int | None]) -> _Bound:
        """The first of these variants that can do these sizes; of one alone it is told why it cannot."""
        arrays = {name: value for name, value in given.items() if isinstance(value, ManagedArray)}
        numbers = {name: value or 0 for name, value in given.items() if not isinstance(value, ManagedArray)}
        numbers |= {"multiprocessors": self._gpu.multiprocessors, "memory_bytes": self.limits.memory_bytes}
        shapes = {name: array.shape for name, array in arrays.items()}
        for variant in variants:
            values = variant.complete({**self._parameters, **variant.sizes(shapes), **numbers})
            obstacle = variant.obstacle(values, self.limits)
            if obstacle is None:
                break
        else:
            raise ValueError(f"{variant.stage} ({variant.name}): {obstacle}")
        for argument in variant.arrays():
            if argument.name in arrays:
                _expect(arrays[argument.name], argument, values)
        sources = [variant.source(values)]
        if sources[0] not in self._gpu.modules:  # the other stages' will be asked for: they compile in parallel
            # How is searched, sizes and convention decide.
            firsts = [each for stage, (each, *_) in self._variants.items() if stage not in table.OF_SEARCHES]
            sources += [each.source({**each.defaults(), **self._parameters}) for each in firsts]
        module, *_ = load(self._gpu, sources)
        scratch = self._scratch({name: nbytes(values) for name, nbytes in variant.scratch.items()})
        values |= {name: array.pointer for name, array in arrays.items()}
        values |= {name: pointer for name, (pointer, _) in scratch.items()}
        launches = [
            self._launch(module, kernel, each) for kernel, each in variant.launches(values) if kernel.grid(each)
        ]
        zeroed = [(values[name], arrays[name].array.nbytes) for name in variant.zeroed]
        own = [arrays[argument.name] for argument in variant.arrays() if argument.name in arrays]
        return _Bound(own, zeroed, launches, scratch)

    def _launch(
        self, module: SourceModule, kernel: Kernel, values: Mapping[str, int]
    ) -> tuple[Callable[..., None], tuple[Any, ...]]:
        blocks, shared_bytes = kernel.grid(values), kernel.shared_bytes(values)
        if blocks > MAX_BLOCKS:
            raise ValueError(f"{kernel.entry}: {blocks} blocks are too many; allowed: up to {MAX_BLOCKS}")
        function = module.get_function(kernel.entry)
        call = function.prepare("".join(argument.code for argument in kernel.arguments)).prepared_async_call
        if shared_bytes:  # beyond 48 KB it must be asked for
            function.set_attribute(cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
            call = partial(call, shared_size=shared_bytes)
        arguments = (values[argument.name] for argument in kernel.arguments)
        return call, ((blocks, 1), kernel.threads(values), self.stream, *arguments)

    def _scratch(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Device memory that only kernels see, by address and bytes; valid until the next call."""
        offsets = [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values())]
        if self._workspace_bytes < offsets[-1]:
            self._bound.clear()  # their scratch lies in what goes now
            self._workspace = None  # before another one is there beside it
            self._workspace, self._workspace_bytes = cuda.mem_alloc(offsets[-1]), offsets[-1]
        base = int(self._workspace or 0)
        return {name: (base + offset, size) for offset, (name, size) in zip(offsets, sizes.items(), strict=False)}


def _expect(array: ManagedArray, argument: Argument, sizes: Mapping[str, int]) -> None:
    """Refuses an array that a kernel would misread."""
    shape = tuple(sizes[size] for size in argument.shape)
    if array.dtype != np.dtype(argument.dtype) or array.shape != shape:
        raise ValueError(f"{argument.name} is {array.dtype}{array.shape}; the kernel needs {argument.dtype}{shape}")
