"""The ceilings of a machine as subjects: each moves bytes or does arithmetic, nothing else, on more than the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_pycuda.benchmarks.limits import Ceilings
from awq_pycuda.benchmarks.oracle import Exact
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.benchmarks.subjects import OURS, Key, Subject, Verdict
from awq_pycuda.kernels.work import Unit, Work
from awq_pycuda.parallel import map_row_blocks, product

CASE = "ceiling"
NO_SHAPE = Shape(0, 0, 0, 0)
MOVES = ("read", "write", "copy")
LINK = "link"  # from the host's memory to a device's
_BYTES = 128 << 20  # of each array on the host
_SIDE: dict[Unit, int] = {"fp32": 1024, "fp64": 512}  # of the products on the host

Array = NDArray[Any]


class CeilingSubject:
    """One ceiling by one means. `check` says what is wrong with what a launch left, None if nothing is."""

    passes = 1

    def __init__(
        self,
        name: str,
        variant: str,
        work: Work,
        unit: Unit,
        launch: Callable[[], object],
        check: Callable[[], str | None],
        by: str = OURS,
    ) -> None:
        self.key = Key(CASE, name, variant, by, NO_SHAPE)
        self.work, self.unit, self._launch, self._check = work, unit, launch, check

    def launch(self) -> None:
        """See `Subject.launch`."""
        self._launch()

    def fill(self, exact: Exact) -> None:
        """Nothing: its arrays hold what they need."""

    def poison(self) -> None:
        """Nothing: `check` knows what only its own launch leaves."""

    def judge(self) -> Verdict:
        """See `Subject.judge`; it is exact or wrong."""
        return Verdict(reason=self._check())


def measured(rates: Sequence[tuple[str, Work, Unit, float]]) -> Ceilings:
    """The ceilings of subjects by name, work, unit and shortest time in microseconds; the highest of several.

    The shortest and not the median, since it is a limit that is asked for.
    """
    found: dict[str, float] = {}
    for name, work, _, us in rates:
        amount = work.operations or work.read + work.written
        found[name] = max(found.get(name, 0.0), 1e6 * amount / us)
    units: dict[Unit, float] = {unit: found[name] for name, work, unit, _ in rates if work.operations}
    return Ceilings(**{name: found[name] for name in MOVES if name in found}, units=units)


def host_ceilings() -> list[Subject]:
    """Those of the host: NumPy over the same threads as the stages, products by its BLAS."""
    source = np.random.default_rng(1).random((_BYTES >> 14, 1 << 11))
    copied, filled = np.full_like(source, np.nan), np.full_like(source, np.nan)
    sums: list[float] = []

    def read() -> None:
        sums[:] = map_row_blocks(lambda block: float(source[block].max()), source.shape)

    def write() -> None:
        map_row_blocks(lambda block: filled[block].fill(2.5), filled.shape)

    def copy() -> None:
        map_row_blocks(lambda block: np.copyto(copied[block], source[block]), source.shape)

    numpy = f"NumPy {np.__version__}"
    highest = float(source.max())
    return [
        CeilingSubject("read", numpy, Work(source.nbytes, 0, 0), "fp32", read, _told(lambda: max(sums) == highest)),
        CeilingSubject("write", numpy, Work(0, filled.nbytes, 0), "fp32", write, _told(lambda: (filled == 2.5).all())),
        CeilingSubject(
            "copy",
            numpy,
            Work(source.nbytes, source.nbytes, 0),
            "fp32",
            copy,
            _told(lambda: np.array_equal(copied, source)),
        ),
        *(_host_product(unit, side, numpy) for unit, side in _SIDE.items()),
    ]


def _told(right: Callable[[], object]) -> Callable[[], str | None]:
    return lambda: None if right() else "leaves a wrong result"


def _host_product(unit: Unit, side: int, variant: str) -> CeilingSubject:
    dtype = np.float32 if unit == "fp32" else np.float64
    x, w = np.random.default_rng(2).random((2, side, side)).astype(dtype)
    out = np.full((side, side), np.nan, dtype)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    right = _told(lambda: np.allclose(out, exact, rtol=1e-4))
    return CeilingSubject(unit, variant, Work(0, 0, 2 * side**3), unit, lambda: product(x, w, out), right)
