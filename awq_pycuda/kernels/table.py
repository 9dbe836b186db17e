"""The table of kernels: every stage's variants, by file, launch and limits. Data: needs neither PyCUDA nor NumPy.

A stage is computed by one of its variants: a file under cuda/ and those of its kernels that are launched, in order. All
variants of a stage have one signature, and the config chooses by name. What chooses, compiles, launches, tests and
documents kernels reads this table, so that a new variant is a file and an entry.
"""

from __future__ import annotations

from collections.abc import Callable

from awq_pycuda.kernels.variant import (
    WALK_THREADS,
    Argument,
    Capability,
    Kernel,
    Parameter,
    Values,
    Variant,
    words,
)

# What `make kernels` compiles for: A100; H100 and H200; B200.
ARCHITECTURES: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0))
ONLY = "only"  # the variant of a stage that has no other
KEYS = {"accum_stats": "stats", "dequantizeTiled": "matmul.kernel"}  # the config key that chooses a stage's variant

_WALK_BLOCKS = 32  # for each multiprocessor: enough to fill the card; such kernels stride over the rest
_ERROR_BLOCKS = 1024  # fixed, so that error_sums adds up in the same order on every device


def _blocks(items: int, each: int) -> int:
    return -(-items // each)


def _walk(items: Callable[[Values], int]) -> Callable[[Values], int]:
    """The grid of a kernel that strides over an index space."""
    return lambda v: min(_blocks(items(v), WALK_THREADS), _WALK_BLOCKS * v["multiprocessors"])


def _tiles(side: Callable[[Values], int]) -> Callable[[Values], int]:
    """The grid of a product whose blocks make side x side outputs; one dimension, which may be large."""
    return lambda v: _blocks(v["tokens"], side(v)) * _blocks(v["out_features"], side(v))


def _arguments(*declared: str) -> tuple[Argument, ...]:
    """Arguments from texts such as "float* x[tokens, in_features]" and "Size tokens"."""
    found = []
    for text in declared:
        before, _, shape = text.removesuffix("]").partition("[")
        kind, _, name = before.rpartition(" ")
        found.append(Argument(kind, name, tuple(shape.split(", ")) if shape else ()))
    return tuple(found)


_PRODUCT = _arguments(
    "float* x[tokens, in_features]",
    "signed char* wq[out_features, in_features]",
    "float* inv_s[in_features]",
    "float* scale_b[out_features, groups]",
    "float* y[tokens, out_features]",
    "int tokens",
    "int out_features",
    "int in_features",
    "int group_size",
)
_MEANS = ("float* abs_mean[in_features]", "float* sq_mean[in_features]")
_PARTIALS = ("double* partial_abs", "double* partial_sq")
_STATS = {"CHANNELS": 32, "WARPS": 8, "ROWS_PER_BLOCK": 64}
_REFERENCE = {"TILE": 16, "MICRO": 4, "THREADS": 256}
# A block has TILE x TILE threads, at most 1,024; 7 takes the paths of a tile that 4 does not divide.
_TILE = {"TILE": Parameter(range(1, 33), compiled=(4, 7, 16, 32))}


def _chunks(v: Values) -> int:
    return _blocks(v["tokens"], v["ROWS_PER_BLOCK"])


def _partial(v: Values) -> int:
    return 8 * _chunks(v) * v["in_features"]


# The first variant of a stage is the default.
VARIANTS = (
    Variant(
        stage="init",
        name=ONLY,
        file="init.cu",
        help="a matrix of `2u − 1` from cuRAND's Philox, with an optional gain per row and column",
        kernels=(
            Kernel(
                "init",
                _arguments(
                    "float* out[rows, cols]",
                    "Size rows",
                    "Size cols",
                    "Size seed",
                    "Size subsequence",
                    "float* row_gain[rows]",
                    "float* col_gain[cols]",
                ),
                grid=_walk(lambda v: _blocks(v["rows"] * v["cols"], 4)),
            ),
        ),
    ),
    Variant(
        stage="accum_stats",
        name="deterministic",
        file="stats.cu",
        help="sums in double, in an order that only the shape decides",
        kernels=(
            Kernel(
                "accum_stats",
                _arguments("float* x[tokens, in_features]", *_PARTIALS, "Size tokens", "Size in_features"),
                grid=lambda v: _chunks(v) * _blocks(v["in_features"], v["CHANNELS"]),
                block=("CHANNELS", "WARPS"),
            ),
            Kernel(
                "finish_stats",
                _arguments(*_PARTIALS, *_MEANS, "Size tokens", "Size in_features"),
                grid=_walk(lambda v: v["in_features"]),
            ),
        ),
        macros=_STATS,
        scratch={"partial_abs": _partial, "partial_sq": _partial},
        tolerance=2**-24,  # nothing but the rounding of the mean to float32
        unit="fp64",
    ),
    Variant(
        stage="accum_stats",
        name="atomic",
        file="stats.cu",
        help="two float atomics per element; the last bits change from run to run",
        kernels=(
            Kernel(
                "accum_stats_atomic",
                _arguments("float* x[tokens, in_features]", *_MEANS, "Size tokens", "Size in_features"),
                grid=_walk(lambda v: v["tokens"] * v["in_features"]),
            ),
            Kernel(
                "finish_stats_atomic",
                _arguments(*_MEANS, "Size tokens", "Size in_features"),
                grid=_walk(lambda v: v["in_features"]),
            ),
        ),
        macros=_STATS,
        zeroed=("abs_mean", "sq_mean"),
        tolerance=1e-5,
    ),
    Variant(
        stage="quantize_awq",
        name=ONLY,
        file="quantize.cu",
        help="true division and `rintf`, so that the codes are NumPy's bit for bit; four at a time where sizes allow",
        kernels=(
            Kernel(
                "quantize_awq",
                _arguments(
                    "float* w[out_features, in_features]",
                    "float* s[in_features]",
                    "float* scale_b[out_features, groups]",
                    "signed char* wq[out_features, in_features]",
                    "Size out_features",
                    "Size in_features",
                    "Size group_size",
                ),
                grid=_walk(lambda v: _blocks(v["out_features"] * v["in_features"], 4)),
            ),
        ),
        parameters={"QMAX": Parameter(range(1, 128), compiled=(127,))},
    ),
    Variant(
        stage="dequantizeTiled",
        name="tiled",
        file="matmul_tiled.cu",
        help="one output per thread",
        kernels=(Kernel("dequantizeTiled", _PRODUCT, grid=_tiles(lambda v: v["TILE"]), block=("TILE", "TILE")),),
        parameters=_TILE,
        tolerance=1e-5,
    ),
    Variant(
        stage="dequantizeTiled",
        name="blocked",
        file="matmul_blocked.cu",
        help="4 x 4 outputs per thread",
        kernels=(
            Kernel("dequantizeTiled", _PRODUCT, grid=_tiles(lambda v: v["TILE"] * v["MICRO"]), block=("TILE", "TILE")),
        ),
        macros={"MICRO": 4},
        parameters=_TILE,
        tolerance=1e-5,
    ),
    Variant(
        stage="relu",
        name=ONLY,
        file="relu.cu",
        help="`max(y + bias, 0)`; NaN stays NaN",
        kernels=(
            Kernel(
                "relu",
                _arguments(
                    "float* y[tokens, out_features]",
                    "float* bias[out_features]",
                    "float* out[tokens, out_features]",
                    "Size tokens",
                    "Size out_features",
                ),
                grid=_walk(lambda v: _blocks(v["tokens"] * v["out_features"], 4)),
            ),
        ),
    ),
    Variant(
        stage="matmul_reference",
        name=ONLY,
        file="reference.cu",
        help="`X·Wᵀ` with sums in double; only for metrics and `search=output`",
        kernels=(
            Kernel(
                "matmul_reference",
                _arguments(
                    "float* x[tokens, in_features]",
                    "float* w[out_features, in_features]",
                    "float* y[tokens, out_features]",
                    "int tokens",
                    "int out_features",
                    "int in_features",
                ),
                grid=_tiles(lambda v: v["TILE"] * v["MICRO"]),
                block=("TILE", "TILE"),
            ),
        ),
        macros=_REFERENCE,
        tolerance=1e-6,
        unit="fp64",
    ),
    Variant(
        stage="error_sums",
        name=ONLY,
        file="reference.cu",
        help="sums of squares and of squared errors in double; only for metrics and `search=output`",
        kernels=(
            Kernel(
                "error_sums",
                _arguments(
                    "float* reference[tokens, out_features]",
                    "float* value[tokens, out_features]",
                    "double* partial",
                    "Size count",
                ),
                grid=lambda v: _ERROR_BLOCKS,
                block=("THREADS",),
            ),
        ),
        macros=_REFERENCE,
        derived={"count": lambda v: v["tokens"] * v["out_features"]},
        scratch={"partial": lambda v: 16 * _ERROR_BLOCKS},
        tolerance=1e-12,
        unit="fp64",
    ),
)


def stages() -> list[str]:
    """Every stage once, in the order of the table."""
    return list(dict.fromkeys(variant.stage for variant in VARIANTS))


def variants(stage: str) -> dict[str, Variant]:
    """The variants of a stage by their names; the first is the default."""
    return {variant.name: variant for variant in VARIANTS if variant.stage == stage}


def find(stage: str, name: str | None = None) -> Variant:
    """A stage's variant of this name; its first one where there is no name."""
    named = variants(stage)
    return named[next(iter(named)) if name is None else name]


def names(stage: str) -> dict[str, str]:
    """The names of a stage's variants, as the members of an enum."""
    return {name: name for name in variants(stage)}


def choices(stage: str) -> str:
    """What the help says of a stage's variants: each with what sets it apart."""
    return ", ".join(f"{variant.name} ({variant.help})" for variant in variants(stage).values())


def allowed(stage: str, parameter: str) -> dict[str, range]:
    """The values of a parameter, by those of a stage's variants that have it."""
    found = variants(stage).values()
    return {variant.name: variant.parameters[parameter].allowed for variant in found if parameter in variant.parameters}


def allowed_words(stage: str, parameter: str) -> str:
    """The same for a reader."""
    by_range: dict[range, list[str]] = {}
    for name, values in allowed(stage, parameter).items():
        by_range.setdefault(values, []).append(name)
    if len(by_range) == 1:
        return "".join(map(words, by_range))
    return ", ".join(f"{words(values)} with {KEYS[stage]}={' or '.join(found)}" for values, found in by_range.items())


def constants() -> list[str]:
    """What the sources alone do not say of the machine code: each file's constant macros and suffix, a line each."""
    return sorted({f"{each.file}{each.suffix} {dict(sorted(each.macros.items()))}" for each in VARIANTS})
