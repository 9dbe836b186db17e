"""What the pipeline asks of a machine: memory behind handles, the stages, and marks in time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from awq_pycuda.choices import Statistic
from awq_pycuda.kernels.variant import Device
from awq_pycuda.layers.rows import StoredRows
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.quantized import Quantized

H = TypeVar("H")
T = TypeVar("T")


class Unrecordable(RuntimeError):
    """Work that cannot be recorded; the message says why, in a few words."""


@dataclass(frozen=True)
class Mark:
    """A moment: on the host's clock (seconds), and on the device's stream where there is one.

    In recorded work it has no time of the host's (NaN), and on the stream that of the last repetition.
    """

    host: float
    event: Any = None


@dataclass(frozen=True)
class Recorded(Generic[T]):
    """Work that the device repeats without the host.

    Attributes:
        returned: what the work returned when it was recorded, such as its marks.
        repeat: orders all of it once more; it may return before it is done.
        words: how the device goes through it, in a few words.
    """

    returned: T
    repeat: Callable[[], None]
    words: str = "as a whole"


@dataclass(frozen=True)
class Trial(Generic[H]):
    """Arrays to quantize a layer in with scales that are not its own; shapes as in `Layer`.

    `reference` (M, N) is the layer's product from unquantized weights.
    """

    error: H
    s: H
    inv_s: H
    quantized: Quantized[H]
    y: H
    reference: H


@dataclass(frozen=True)
class Held(Generic[H]):
    """What clipping leaves of a layer: scaled weights held to the limits of their groups.

    `weights` (N, K) are those of `W·s`; `ones` (K,) their scales from there on, 1 from the start; `ratio` (N, groups)
    and `error` (R,) float64 are `Clipped`'s, and `error_chosen` (1,) float64.
    """

    weights: H
    ones: H
    ratio: H
    error: H
    error_chosen: H


@dataclass(frozen=True)
class Layer(Generic[H]):
    """A layer's arrays, allocated once and written by every pass: the stages know a layer by this alone.

    Shapes: `x` (M, K), the activations; `w` (N, K); `bias` (N,); `abs_mean`, `sq_mean`, `abs_max`, which is made
    where it is asked for, `s` and `inv_s` (K,); `error` (G,) float64, the curve of the search; `out` (M, N); `outputs`
    = M·N. `y` (M, N), what is before relu, is work space that layers share. `held` is there where weights are clipped.

    A layer may lead others that have its input: then `searched` (rows of all, K) are its weights and theirs one below
    the other, and its `s`, `inv_s` and `error` are the `followers`' as well; these do not lead. Else `searched` is `w`.
    So is `unclipped` (G,) float64, the curve without clipping, where that is searched jointly and clips any of them.

    Of activations that stay in their file, `y`, `out` and those of `trial` have room for some tokens at a time: for
    those of any of the `parts`, of which `Backend.part` makes a layer of its own.
    """

    x: H
    w: H
    bias: H | None
    abs_mean: H
    sq_mean: H
    abs_max: H
    error: H
    s: H
    inv_s: H
    quantized: Quantized[H]
    y: H
    out: H
    trial: Trial[H]
    outputs: int
    searched: H
    unclipped: H | None = None
    held: Held[H] | None = None
    followers: tuple[Layer[H], ...] = ()
    leads: bool = True
    parts: tuple[slice, ...] | None = None

    @property
    def tried(self) -> Layer[H]:
        """The layer as its trial has it."""
        return replace(self, quantized=self.trial.quantized, inv_s=self.trial.inv_s, y=self.trial.y)

    def statistic(self, of: Statistic) -> H:
        """What scales are made of, (K,)."""
        return {Statistic.abs_mean: self.abs_mean, Statistic.abs_max: self.abs_max}[of]

    @property
    def fitted(self) -> tuple[H, H]:
        """The weights that are quantized, (N, K), and their scales, (K,)."""
        return (self.w, self.s) if self.held is None else (self.held.weights, self.held.ones)


class Backend(ABC, Generic[H]):
    """A machine that runs the stages. `H` is its handle to an array; only the backend knows where the data lives.

    Arrays are C-contiguous: activations (tokens M, in_features K), weights (out_features N, in_features K), float
    arrays in the backend's float type, codes in that of their format. Stages may run asynchronously; `read` and
    `error_sums` wait.
    A backend is a context manager and can be entered again.
    """

    name: str

    @property
    def within(self) -> frozenset[str]:
        """Stages that are done on the way by the one before: a pass does not call them."""
        return frozenset()

    @abstractmethod
    def device(self) -> dict[str, Any]:
        """What the results are measured on: name, capability, memory, driver, clocks; JSON-ready."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that only this backend uses."""

    @property
    def limits(self) -> Device | None:
        """What decides which kernels can run; None where there are none."""
        return None

    def conditions(self) -> dict[str, float]:
        """What clock, power and temperature are now, by the names of the result file; empty where nothing tells."""
        return {}

    @abstractmethod
    def available_bytes(self) -> int | None:
        """Free memory of the device that the arrays live on; None where that is the host's own."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> H:
        """A new array with undefined contents; `dtype` None is the backend's float type."""

    @abstractmethod
    def empty_together(self, *shapes: tuple[int, ...]) -> list[H]:
        """New float arrays that the same side always needs at the same time, so that they can move as one."""

    @abstractmethod
    def rows(self, handle: H, rows: slice) -> H:
        """These rows of a matrix, from one to another, as an array of its own in the same memory."""

    @abstractmethod
    def write(self, handle: H, values: NDArray[Any]) -> None:
        """Copies host values into the array."""

    @abstractmethod
    def read(self, handle: H) -> NDArray[Any]:
        """The array for the host to read, once all work on it is done; not to be written to."""

    @abstractmethod
    def freeze(self, handle: H) -> None:
        """Says that the array is complete: nobody writes it any more, and it may be kept on both sides at once."""

    def stored(self, rows: StoredRows) -> H:
        """Activations that stay in their file, for the stages to read there: a layer with them has `parts`."""
        raise NotImplementedError(f"the backend {self.name} takes activations whole")

    def part(self, layer: Layer[H], rows: slice) -> Layer[H]:
        """A layer on one of its `parts`: what has room for some tokens holds these."""
        raise NotImplementedError(f"the backend {self.name} takes activations whole")

    @abstractmethod
    def __enter__(self) -> Self:
        """Takes the device. Arrays live only inside the `with` block."""

    @abstractmethod
    def __exit__(self, *exc: object) -> None:
        """Frees every array made since `__enter__` and gives the device back."""

    @abstractmethod
    def init(
        self,
        out: H,
        seed: int,
        subsequence: int,
        row_gain: NDArray[np.float32] | None,
        col_gain: NDArray[np.float32] | None,
    ) -> None:
        """Fills a (rows, cols) matrix with `(2u − 1) · row_gain · col_gain`, u from Philox (see `philox.uniform`)."""

    @abstractmethod
    def accum_stats(self, x: H, abs_mean: H, sq_mean: H) -> None:
        """Mean of |x| and of x² over the tokens: (M, K) to (K,) and (K,)."""

    @abstractmethod
    def find_abs_max(self, x: H, abs_max: H) -> None:
        """The largest |x| over the tokens: (M, K) to (K,); NaN where there is one."""

    @abstractmethod
    def compute_s(self, layer: Layer[H], convention: Convention) -> None:
        """Searches the scales as the convention says: from the statistics and the weights to `error`, `s` and `inv_s`.

        Of a layer that leads others, for the error of all of their outputs. Nothing else of the layers changes but
        their `trial` and, where clipping is searched jointly, `unclipped` and all of their `held` but the weights.

        Raises:
            FloatingPointError: the activations overflow, so that no error can be told.
        """

    @abstractmethod
    def clip_weights(self, layer: Layer[H], convention: Convention) -> None:
        """Clips the scaled weights of a layer that has `held`, which it fills; of another it does nothing.

        After a joint search the ratios are there, and only the weights are left to make.
        """

    @abstractmethod
    def compute_scale_b(self, w: H, s: H, quantized: Quantized[H]) -> None:
        """The steps of `W·s` in the format of `quantized`: (N, K) and (K,) to (N, groups)."""

    @abstractmethod
    def quantize_awq(self, w: H, s: H, quantized: Quantized[H]) -> None:
        """The codes of `W·s` for the steps of `quantized`: (N, K) and (K,) to (N, K)."""

    @abstractmethod
    def dequantize_tiled(self, x: H, quantized: Quantized[H], inv_s: H, y: H) -> None:
        """`Y = X · (Ŵ · inv_s)ᵀ`, Ŵ dequantized on the fly: (M, K) times (N, K) to (M, N)."""

    def multiply(self, layer: Layer[H]) -> None:
        """The product of a layer in a pass: into its `y`, or with relu into its `out` where that is `within`."""
        self.dequantize_tiled(layer.x, layer.quantized, layer.inv_s, layer.y)

    @abstractmethod
    def relu(self, y: H, bias: H | None, out: H) -> None:
        """`max(y + bias, 0)`: (M, N) and (N,) to (M, N); NaN stays NaN."""

    @abstractmethod
    def matmul_reference(self, x: H, w: H, y: H) -> None:
        """`Y = X · Wᵀ` from the unquantized weights, at least as precise as float32 sums allow."""

    @abstractmethod
    def error_sums(self, reference: H, value: H) -> tuple[float, float]:
        """`(Σ reference², Σ (reference − value)²)` in float64 over two arrays of one shape."""

    def error_sums_of_parts(self, parts: Iterable[tuple[H, H]], outputs: int) -> tuple[float, float]:
        """`error_sums` over arrays of so many outputs that come in parts of consecutive rows, one after another."""
        (whole,) = parts
        return self.error_sums(*whole)

    def product_sums(self, layer: Layer[H], known: bool = False) -> tuple[float, float]:
        """`error_sums` of the layer's product, which its `y` then holds, against that of its unquantized weights.

        Args:
            layer: its trial's `reference` holds the latter, too.
            known: whether it does already.
        """

        def compared() -> Iterator[tuple[H, H]]:
            for part in (layer,) if layer.parts is None else (self.part(layer, rows) for rows in layer.parts):
                if not known or part is not layer:
                    self.matmul_reference(part.x, part.w, part.trial.reference)
                self.dequantize_tiled(part.x, part.quantized, part.inv_s, part.y)
                yield part.trial.reference, part.y

        return self.error_sums_of_parts(compared(), layer.outputs)

    def trial_sums(self, layer: Layer[H]) -> tuple[float, float]:
        """`product_sums` of the layer quantized with its trial's `s`; its trial's `reference` is known."""
        trial = layer.trial
        self.compute_scale_b(layer.w, trial.s, trial.quantized)
        self.quantize_awq(layer.w, trial.s, trial.quantized)
        return self.product_sums(layer.tried, known=True)

    def record(self, work: Callable[[], T]) -> Recorded[T]:
        """Records stages, so that the device can repeat them as one; what they leave is undefined until it has.

        Args:
            work: calls stages in the order of a pass and sets marks, the same ones each time; it is called more than
                once.

        Raises:
            Unrecordable: the work needs the host, or the device cannot do it.
        """
        raise Unrecordable("stages run on the host")

    @abstractmethod
    def mark(self) -> Mark:
        """Now, here and in the stream."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits for all work."""

    @abstractmethod
    def gpu_ms(self, start: Mark, end: Mark) -> float:
        """Milliseconds on the stream between two marks, both passed; NaN where there is no stream."""
