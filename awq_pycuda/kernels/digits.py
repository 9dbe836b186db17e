"""The products by digits in the table of kernels: their sizes, launches and scratch."""

from __future__ import annotations

from collections.abc import Callable

from awq_pycuda.kernels.launches import PRODUCT, WITH_RELU, arguments, blocks_of, without_zeros
from awq_pycuda.kernels.variant import Kernel, Values, Variant

# What stands in the products by digits: sizes of their tiles, of their pipelines and of their blocks.
_SPLITTING = {"TOKENS": 128, "ROWS": 128, "DEPTH": 128, "SPLITTERS": 128, "KEPT": 4}
_DIGITS = {
    **_SPLITTING,
    **{"STAGES": 3, "FEW_TOKENS": 64, "FEW_STAGES": 5, "FEW_TILES": 33, "GROUPED_TOKENS": 96, "GROUPED_STAGES": 4},
    **{"CLUSTER": 2, "THREADS": 384},
}
_DIGITS_MMA = {**_SPLITTING, "STAGES": 2, "THREADS": 256}


def _depth(v: Values) -> int:
    """Bytes of a row of digits or codes: padded with zeros."""
    return blocks_of(v["in_features"], v["DEPTH"]) * v["DEPTH"]


def _padded_tokens(v: Values) -> int:
    """What tiles of either kind are padded to, at most."""
    return blocks_of(v["tokens"], 3 * v["TOKENS"]) * 3 * v["TOKENS"]


def _padded_rows(v: Values) -> int:
    """Rows of the codes: those of a cluster, where there are clusters."""
    together = v.get("CLUSTER", 1) * v["ROWS"]
    return blocks_of(v["out_features"], together) * together


def _tile_tokens(v: Values) -> int:
    """Of a tile, as `Tiling` in matmul_digits.cu has it; digits_mma has tiles of one size."""
    if "CLUSTER" not in v:
        return v["TOKENS"]
    if v["group_size"] < v["in_features"] or v["in_features"] > 1 << 17:
        return v["GROUPED_TOKENS"]
    tiles = blocks_of(v["tokens"], v["TOKENS"]) * blocks_of(v["out_features"], v["CLUSTER"] * v["ROWS"])
    return v["FEW_TOKENS"] if tiles <= v["FEW_TILES"] else v["TOKENS"]


def _split_blocks(v: Values) -> int:
    """A block for each row of digits, and blocks for the codes."""
    rows = blocks_of(v["tokens"], _tile_tokens(v)) * _tile_tokens(v)
    return rows + blocks_of(_padded_rows(v) * _depth(v) // 16, v["SPLITTERS"] * v["KEPT"])


def _clusters(v: Values) -> int:
    """Blocks that stay: whole clusters, at most one block for each multiprocessor."""
    tiles = blocks_of(v["tokens"], _tile_tokens(v)) * _padded_rows(v) // (v["CLUSTER"] * v["ROWS"])
    return max(1, min(tiles, v["multiprocessors"] // v["CLUSTER"])) * v["CLUSTER"]


def _stages(v: Values) -> int:
    """Shared memory of the largest pipeline: codes, three digits, and two barriers, for each stage."""
    return max(
        v[f"{kind}STAGES"] * (v["DEPTH"] * (v["ROWS"] + 3 * v[f"{kind}TOKENS"]) + 16)
        for kind in ("", "FEW_", "GROUPED_")
    )


_SPLIT_ARRAYS = arguments(
    "signed char* digits", "signed char* low", "signed char* codes", "float* unit", "float* low_unit"
)
_BY_DIGITS = (*_SPLIT_ARRAYS, *WITH_RELU[3:])
_SPLIT = Kernel(
    "split_digits",
    (*PRODUCT[:3], *_SPLIT_ARRAYS, *PRODUCT[5:]),
    _split_blocks,
    ("SPLITTERS",),
    early=("x", "inv_s"),
)
_DIGIT_SCRATCH: dict[str, Callable[[Values], int]] = {
    "digits": lambda v: 3 * _padded_tokens(v) * _depth(v),
    "low": lambda v: _padded_tokens(v) * _depth(v),
    "codes": lambda v: _padded_rows(v) * _depth(v),
    "unit": lambda v: 4 * _padded_tokens(v),
    "low_unit": lambda v: 4 * _padded_tokens(v),
}

DIGITS = Variant(
    stage="dequantizeTiled",
    name="digits",
    file="matmul_digits.cu",
    help="activations as three int8 digits on Hopper's tensor cores, with exact sums",
    kernels=(_SPLIT, Kernel("dequantizeTiled", _BY_DIGITS, _clusters, ("THREADS",), _stages)),
    macros=_DIGITS,
    scratch=_DIGIT_SCRATCH,
    tolerance=1e-6,
    capability=(9, 0),
    suffix="a",
    group_multiple=32,
    unit="int8 matrix",
    passes=3,
    refuses_format=without_zeros,
)
DIGITS_MMA = Variant(
    stage="dequantizeTiled",
    name="digits_mma",
    file="matmul_digits_mma.cu",
    help="the same digits by the instructions of Ampere's tensor cores and all later ones",
    kernels=(
        _SPLIT,
        Kernel(
            "dequantizeTiled",
            _BY_DIGITS,
            grid=lambda v: blocks_of(v["tokens"], v["TOKENS"] // 2) * blocks_of(v["out_features"], v["ROWS"]),
            block=("THREADS",),
            shared_bytes=lambda v: v["STAGES"] * v["DEPTH"] * (v["ROWS"] + 3 * v["TOKENS"] // 2),
        ),
    ),
    macros=_DIGITS_MMA,
    scratch=_DIGIT_SCRATCH,
    tolerance=1e-6,
    capability=(8, 0),
    group_multiple=32,
    unit="int8 matrix",
    passes=3,
    refuses_format=without_zeros,
)
