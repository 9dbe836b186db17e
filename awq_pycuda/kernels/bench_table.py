"""The kernels that a benchmark measures the device by; as the table of the stages' kernels is, data alone.

They are no stages: no run launches them, and none compiles them.
"""

from __future__ import annotations

from awq_pycuda.kernels.variant import Argument, Kernel, Values, Variant
from awq_pycuda.kernels.work import Unit

STEPS = 2048  # of the arithmetic; each does CHAINS operations of a unit
CHAINS = 8
WGMMA = "wgmma"
_READ_BLOCKS = 8  # for each multiprocessor
_RATE_BLOCKS = 8
_WGMMA_SHARED = 49152

_DATA = Argument("float*", "data", ("count",))
_OUT = Argument("float*", "out", ("count",))
_COUNT = Argument("Size", "count")
_STEPS = Argument("int", "steps")


def _kernel(entry: str, *arguments: Argument, blocks: int, shared: int = 0) -> tuple[Kernel, ...]:
    def grid(values: Values) -> int:
        return blocks * values["multiprocessors"]

    return (Kernel(entry, arguments, grid=grid, shared_bytes=lambda _: shared),)


def _moves(stage: str, *arguments: Argument) -> Variant:
    kernels = _kernel(f"bench_{stage}", *arguments, blocks=_READ_BLOCKS)
    return Variant(stage, "float4", "bench_memory.cu", f"{stage}s and does nothing else", kernels)


def _matrix(stage: Unit, kind: str) -> tuple[Variant, Variant]:
    return (
        Variant(
            stage,
            "mma.sync",
            "bench_rates.cu",
            "products of operands in registers",
            _kernel(f"bench_mma_{kind}", _OUT, _STEPS, blocks=_RATE_BLOCKS),
            capability=(8, 0),
            unit=stage,
        ),
        Variant(
            stage,
            WGMMA,
            "bench_wgmma.cu",
            "products of operands in shared memory",
            _kernel(f"bench_wgmma_{kind}", _OUT, _STEPS, blocks=1, shared=_WGMMA_SHARED),
            capability=(9, 0),
            suffix="a",
            unit=stage,
        ),
    )


_ADDED: tuple[Unit, ...] = ("fp32", "fp64")
VARIANTS: tuple[Variant, ...] = (
    _moves("read", _DATA, _OUT, _COUNT),
    _moves("write", _OUT, _COUNT),
    _moves("copy", _DATA, _OUT, _COUNT),
    *(
        Variant(
            unit,
            "multiply-add",
            "bench_rates.cu",
            "chains of multiply-adds in registers",
            _kernel(f"bench_{unit}", _OUT, _STEPS, blocks=_RATE_BLOCKS),
            unit=unit,
        )
        for unit in _ADDED
    ),
    *_matrix("fp16 matrix", "fp16"),
    *_matrix("int8 matrix", "int8"),
    Variant(
        "spin",
        "globaltimer",
        "bench_rates.cu",
        "keeps the GPU busy for a time",
        (Kernel("bench_spin", (Argument("Size", "nanoseconds"),), grid=lambda _: 1, block=(32,)),),
    ),
)


def operations(variant: Variant, multiprocessors: int) -> int:
    """What one launch of a kernel of arithmetic does; a multiplication and an addition are two."""
    (kernel,) = variant.kernels
    blocks = kernel.grid({"multiprocessors": multiprocessors})
    threads, _, _ = kernel.threads({})
    if variant.name == "multiply-add":
        return 2 * CHAINS * STEPS * blocks * threads
    depth = 16 if variant.stage == "fp16 matrix" else 32
    if variant.name == WGMMA:
        return 2 * 64 * 256 * depth * 4 * STEPS * blocks * threads // 128
    return 2 * 16 * 8 * depth * CHAINS * STEPS * blocks * threads // 32
