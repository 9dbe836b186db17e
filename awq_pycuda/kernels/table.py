"""The table of kernels: every stage's variants, by file, launch and limits. Data: needs neither PyCUDA nor NumPy.

A stage is computed by one of its variants: a file under cuda/ and those of its kernels that are launched, in order. All
variants of a stage have one signature, and the config chooses by name. What chooses, compiles, launches, tests and
documents kernels reads this table, so that a new variant is a file and an entry.
"""

from __future__ import annotations

from collections.abc import Callable

from awq_pycuda.kernels.candidates import WEIGHT_MEANS
from awq_pycuda.kernels.digits import DIGITS, DIGITS_MMA
from awq_pycuda.kernels.formats import QUANTIZE_ANY, STEPS_ANY
from awq_pycuda.kernels.launches import (
    MEANS,
    ONLY,
    PEAK_THREADS,
    PRODUCT,
    QMAX,
    WITH_ZEROS,
    arguments,
    blocks_of,
    plain_only,
    rows_of_blocks,
    walk,
    without_zeros,
)
from awq_pycuda.kernels.output_search import OUTPUT_SEARCH
from awq_pycuda.kernels.searches import DIAG_SEARCH
from awq_pycuda.kernels.variant import (
    WALK_THREADS,
    Capability,
    Kernel,
    Parameter,
    Values,
    Variant,
    words,
)

# What `make kernels` compiles for: A100; H100 and H200; B200.
ARCHITECTURES: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0))
KEYS = {"accum_stats": "stats", "dequantizeTiled": "matmul.kernel"}  # the config key that chooses a stage's variant
SEARCHES = {"diag": "search_diag", "output": "search_output"}  # the stage that searches, by the objective
# What only some runs search by.
OF_SEARCHES = (*SEARCHES.values(), "weight_means")
# Stages of which the first variant is taken that can do the sizes and the format.
BY_SIZES = (*SEARCHES.values(), "compute_scale_b", "quantize_awq")
AUTO = "auto"  # in place of a variant: the first of these that can
BEST = {"dequantizeTiled": ("digits", "digits_mma", "blocked")}

_ERROR_BLOCKS = 1024  # fixed, so that error_sums adds up in the same order on every device


def _tiles(side: Callable[[Values], int]) -> Callable[[Values], int]:
    """The grid of a product whose blocks make side x side outputs; one dimension, which may be large."""
    return lambda v: blocks_of(v["tokens"], side(v)) * blocks_of(v["out_features"], side(v))


_LANES = 8  # of statistics, side by side: they read a line of 128 bytes
_REFERENCE = {"TILE": 16, "MICRO": 4, "THREADS": 256}
# A block has TILE x TILE threads, at most 1,024; 7 takes the paths of a tile that 4 does not divide. With all
# 32 `make kernels` takes five times as long (207 compilations for 39, 86 s of CPU for 16), and only a change of the
# products or of nvcc can make another tile spill: then `make kernels ARGS="--every TILE"` tells.
_TILE = {"TILE": Parameter(range(1, 33), compiled=(4, 7, 16, 32))}


def _strips(v: Values) -> int:
    """Of 4 channels a lane: blocks of statistics side by side."""
    return blocks_of(v["in_features"], 4 * _LANES)


def _stats_threads(v: Values) -> int:
    """Fewer the more blocks there are: those of a multiprocessor keep about as much on the way together."""
    return 1024 if _strips(v) <= 132 else 512 if _strips(v) <= 264 else 256


def _rows_of_block(v: Values) -> int:
    """All tokens, but where the strips are few: then so many that finishing what is split costs less than it gains."""
    return blocks_of(v["tokens"], max(1, min(128 // _strips(v), v["tokens"] // 2048)))


def _chunks(v: Values) -> int:
    return blocks_of(v["tokens"], v["rows_of_block"])


_STATS_THREADS = {"THREADS": Parameter(range(256, 1025, 256), compiled=(1024, 512, 256))}

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
                arguments(
                    "float* out[rows, cols]",
                    "Size rows",
                    "Size cols",
                    "Size seed",
                    "Size subsequence",
                    "float* row_gain[rows]",
                    "float* col_gain[cols]",
                ),
                grid=lambda v: min(
                    blocks_of(v["rows"] * v["cols"], 4 * v["QUADS"] * v["THREADS"]), 16 * v["multiprocessors"]
                ),
                block=("THREADS",),
            ),
        ),
        macros={"THREADS": 256, "QUADS": 4},
    ),
    Variant(
        stage="accum_stats",
        name="deterministic",
        file="stats.cu",
        help="sums in double, in an order that only the shape decides",
        kernels=(
            Kernel(
                "accum_stats",
                arguments(
                    "float* x[tokens, in_features]",
                    "double* partial",
                    *MEANS,
                    "int tokens",
                    "int in_features",
                    "int rows_of_block",
                ),
                grid=lambda v: _strips(v) * v["chunks"],
                block=("THREADS",),
            ),
            Kernel(
                "finish_stats",
                arguments("double* partial", *MEANS, "int tokens", "int in_features", "int chunks"),
                grid=lambda v: walk(lambda v: 2 * v["in_features"])(v) if v["chunks"] > 1 else 0,
            ),
        ),
        macros={"LANES": _LANES},
        parameters=_STATS_THREADS,
        derived={"THREADS": _stats_threads, "rows_of_block": _rows_of_block, "chunks": _chunks},
        scratch={"partial": lambda v: 16 * v["chunks"] * v["in_features"]},
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
                arguments("float* x[tokens, in_features]", *MEANS, "Size tokens", "Size in_features"),
                grid=walk(lambda v: v["tokens"] * v["in_features"]),
            ),
            Kernel(
                "finish_stats_atomic",
                arguments(*MEANS, "Size tokens", "Size in_features"),
                grid=walk(lambda v: v["in_features"]),
            ),
        ),
        macros={"LANES": _LANES, "THREADS": WALK_THREADS},
        zeroed=("abs_mean", "sq_mean"),
        tolerance=1e-5,
    ),
    Variant(
        stage="find_abs_max",
        name=ONLY,
        file="stats.cu",
        help="a block to every 32 channels; of the bits of magnitudes, whose order is theirs",
        kernels=(
            Kernel(
                "find_abs_max",
                arguments(
                    "float* x[tokens, in_features]",
                    "float* abs_max[in_features]",
                    "int tokens",
                    "int in_features",
                ),
                grid=lambda v: blocks_of(v["in_features"], 32),
                block=(PEAK_THREADS,),
            ),
        ),
        macros={"LANES": _LANES},
        parameters=_STATS_THREADS,
        derived={"THREADS": _stats_threads},
    ),
    WEIGHT_MEANS,
    *DIAG_SEARCH,
    *OUTPUT_SEARCH,
    Variant(
        stage="compute_scale_b",
        name="integers",
        file="scale_b.cu",
        help="symmetric integers with fp32 steps: largest magnitudes by shuffles, then a true division",
        kernels=(
            Kernel(
                "compute_scale_b",
                arguments(
                    "float* w[out_features, in_features]",
                    "float* s[in_features]",
                    "float* scale_b[out_features, groups]",
                    "int out_features",
                    "int in_features",
                    "int group_size",
                    "int lanes",
                ),
                grid=rows_of_blocks("out_features"),
                block=("THREADS",),
            ),
        ),
        macros={"THREADS": 256, "AHEAD": 4},
        parameters={"QMAX": QMAX},
        # Of a warp, for a group of channels by fours.
        derived={"lanes": lambda v: min(32, 1 << max(0, blocks_of(v["group_size"], 4) - 1).bit_length())},
        refuses_format=plain_only,
    ),
    STEPS_ANY,
    Variant(
        stage="quantize_awq",
        name="integers",
        file="quantize.cu",
        help="symmetric integers with fp32 steps: a true division and `rintf`, four codes at a time where sizes allow",
        kernels=(
            Kernel(
                "quantize_awq",
                arguments(
                    "float* w[out_features, in_features]",
                    "float* s[in_features]",
                    "float* scale_b[out_features, groups]",
                    "signed char* wq[out_features, in_features]",
                    "int out_features",
                    "int in_features",
                    "int group_size",
                ),
                grid=lambda v: min(v["out_features"], v["BLOCKS"] * v["multiprocessors"]),
                block=("THREADS",),
            ),
        ),
        macros={"THREADS": 256, "AHEAD": 4, "BLOCKS": 4},
        parameters={"QMAX": QMAX},
        refuses_format=plain_only,
    ),
    QUANTIZE_ANY,
    Variant(
        stage="dequantizeTiled",
        name="tiled",
        file="matmul_tiled.cu",
        help="one output per thread",
        kernels=(Kernel("dequantizeTiled", PRODUCT, grid=_tiles(lambda v: v["TILE"]), block=("TILE", "TILE")),),
        parameters=_TILE,
        tolerance=1e-5,
        refuses_format=without_zeros,
    ),
    Variant(
        stage="dequantizeTiled",
        name="blocked",
        file="matmul_blocked.cu",
        help="4 x 4 outputs per thread, with zero points or without",
        kernels=(
            Kernel(
                "dequantizeTiled", WITH_ZEROS, grid=_tiles(lambda v: v["TILE"] * v["MICRO"]), block=("TILE", "TILE")
            ),
        ),
        macros={"MICRO": 4},
        parameters={**_TILE, "ZEROS": Parameter(range(2), compiled=(0, 1))},
        tolerance=1e-5,
    ),
    DIGITS,
    DIGITS_MMA,
    Variant(
        stage="relu",
        name=ONLY,
        file="relu.cu",
        help="`max(y + bias, 0)`; NaN stays NaN; in a pass with `tiled` alone: the other products do it on the way",
        kernels=(
            Kernel(
                "relu",
                arguments(
                    "float* y[tokens, out_features]",
                    "float* bias[out_features]",
                    "float* out[tokens, out_features]",
                    "Size tokens",
                    "Size out_features",
                ),
                grid=walk(lambda v: blocks_of(v["tokens"] * v["out_features"], 4)),
            ),
        ),
    ),
    Variant(
        stage="matmul_reference",
        name=ONLY,
        file="reference.cu",
        help="`X·Wᵀ` with sums in double; only for metrics and the search on the host",
        kernels=(
            Kernel(
                "matmul_reference",
                arguments(
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
        help="sums of squares and of squared errors in double; only for metrics and the search on the host",
        kernels=(
            Kernel(
                "error_sums",
                arguments(
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


def candidates(stage: str, name: str | None = None) -> list[Variant]:
    """The variants that a call takes the first able one of: that of this name; without one all where sizes decide."""
    return list(variants(stage).values()) if stage in BY_SIZES and name is None else [find(stage, name)]


def names(stage: str) -> dict[str, str]:
    """What the config may say of a stage, as the members of an enum: its variants, and `auto` where there is a best."""
    return {name: name for name in (*([AUTO] if stage in BEST else []), *variants(stage))}


def choices(stage: str) -> str:
    """What the help says of a stage's variants: each with what sets it apart."""
    best = {AUTO: f"the first that the GPU can of {', '.join(BEST[stage])}"} if stage in BEST else {}
    helps = best | {variant.name: variant.help for variant in variants(stage).values()}
    return ", ".join(f"{name} ({text})" for name, text in helps.items())


def allowed(stage: str, parameter: str) -> dict[str, range]:
    """The values of a parameter, by those of a stage's variants that have it; `auto` may come to any of its own."""
    found = variants(stage)
    ranges = {name: each.parameters[parameter].allowed for name, each in found.items() if parameter in each.parameters}
    best = [ranges[name] for name in BEST.get(stage, ()) if name in ranges]
    return {AUTO: min(best, key=len), **ranges} if best else ranges


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
