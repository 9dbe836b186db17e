"""The entries of the search for scales; what they compute stands in cuda/search.cuh and cuda/search_diag.cuh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from awq_pycuda.kernels.launches import MEANS, ONLY, QMAX, arguments, blocks_of
from awq_pycuda.kernels.variant import Kernel, Parameter, Values, Variant

_CANDIDATES = Kernel(
    "candidates",
    arguments(
        *MEANS,
        "double* gamma[candidates]",
        "double* rule[rules]",
        "float* candidate_s",
        "double* importance",
        "int in_features",
        "int by_mean",
    ),
    grid=lambda v: v["candidates"],
    block=("THREADS",),
)
_CHOOSE = Kernel(
    "choose",
    arguments(
        "double* partial",
        "double* gamma[candidates]",
        "float* candidate_s",
        "double* error[candidates]",
        "float* s[in_features]",
        "float* inv_s[in_features]",
        "int candidates",
        "int in_features",
        "int blocks",
    ),
    grid=lambda v: 1,
    block=("THREADS",),
)
_SEARCHED = ("float* w[out_features, in_features]", "float* candidate_s", "double* importance")
_SEARCH_SCRATCH: dict[str, Callable[[Values], int]] = {
    "candidate_s": lambda v: 4 * v["candidates"] * v["in_features"],
    "importance": lambda v: 8 * v["candidates"] * v["in_features"],
    "partial": lambda v: 8 * v["candidates"] * v["blocks"],
}
_COLUMN_THREADS = 256  # of a block whose threads own channels
# Of threads that own channels: for every multiprocessor of the cards so far to have as many as it holds of those with
# 4 channels and many candidates, or with fewer. Fixed, as the order of sums is.
_ENOUGH_BLOCKS = {True: 120, False: 200}
_TILE_ROWS, _TILE_CHANNELS, _PADDING = 64, 128, 4  # of row_maxima


def _chunk(largest: Callable[[Values], int], step: int = 1) -> Callable[[Values], int]:
    """How many candidates a thread takes at a time: the number that leaves the fewest places empty."""

    def chunk(v: Values) -> int:
        sizes = range(largest(v), 0, -step)
        return min(sizes, key=lambda size: (blocks_of(v["candidates"], size) * size, -size))

    return chunk


def _rows_of_block(v: Values) -> int:
    """As many rows as leave enough blocks: what a block does before and after its rows is the same for few."""
    across = blocks_of(v["candidates"], v["CHUNK"]) * _column_blocks(v)
    rows = 128
    enough = _ENOUGH_BLOCKS[v["COLUMNS"] == 4 and v["CHUNK"] > 10]
    while rows > 8 and across * blocks_of(v["out_features"], rows) < enough:
        rows //= 2
    return rows


def _column_blocks(v: Values) -> int:
    return blocks_of(v["in_features"], _COLUMN_THREADS * v["COLUMNS"])


def _of_rows_and_columns(v: Values) -> int:
    return _column_blocks(v) * blocks_of(v["out_features"], v["rows_of_block"])


def _by_chunks(blocks: Callable[[Values], int]) -> Callable[[Values], int]:
    return lambda v: blocks_of(v["candidates"], v["CHUNK"]) * blocks(v)


def _maxima_blocks(v: Values) -> int:
    return blocks_of(v["candidates"], v["CHUNK"]) * blocks_of(v["out_features"], _TILE_ROWS)


def _channels_of_part(v: Values) -> int:
    """The channels are split where there are too few blocks of rows: 8 blocks for each multiprocessor, if possible."""
    tiles = blocks_of(v["in_features"], _TILE_CHANNELS)
    return _TILE_CHANNELS * blocks_of(tiles, min(tiles, blocks_of(8 * 132, _maxima_blocks(v))))


def _maxima_shared(v: Values) -> int:
    """Two stages of tiles; behind them, in the same place, the maxima of the 8 warps."""
    stages = 2 * 4 * (_TILE_ROWS + v["CHUNK"]) * (_TILE_CHANNELS + _PADDING)
    return max(stages, 4 * 8 * _TILE_ROWS * v["CHUNK"])


DIAG_SEARCH = (
    Variant(
        stage="search_diag",
        name="rows",
        file="search_rows.cu",
        help="one step per row, input channels a multiple of 4: a tiled maximum, then threads that own channels",
        kernels=(
            _CANDIDATES,
            Kernel(
                "row_maxima",
                arguments(
                    "float* w[out_features, in_features]",
                    "float* candidate_s",
                    "float* maxima",
                    "int out_features",
                    "int in_features",
                    "int candidates",
                    "int parts",
                    "int channels_of_part",
                ),
                grid=lambda v: _maxima_blocks(v) * v["parts"],
                shared_bytes=_maxima_shared,
            ),
            Kernel(
                "column_errors",
                arguments(
                    *_SEARCHED,
                    "float* maxima",
                    "double* partial",
                    "int out_features",
                    "int in_features",
                    "int candidates",
                    "int parts",
                    "int rows_of_block",
                ),
                grid=_by_chunks(_of_rows_and_columns),
            ),
            _CHOOSE,
        ),
        macros={"THREADS": 1024, "ROWS": 128, "AHEAD": 2},
        parameters={
            "QMAX": QMAX,
            "CHUNK": Parameter(range(4, 21, 4), compiled=(16, 20, 8)),
            "COLUMNS": Parameter(range(2, 5, 2), compiled=(4, 2)),
        },
        derived={
            # Few weights would leave most of the card idle with four channels a thread.
            "COLUMNS": lambda v: 4 if v["out_features"] * v["in_features"] >= 1 << 22 else 2,
            # With two channels there are two blocks on a multiprocessor, and registers for 16.
            "CHUNK": _chunk(lambda v: 20 if v["COLUMNS"] == 4 else 16, step=4),
            "rows_of_block": _rows_of_block,
            "blocks": _of_rows_and_columns,
            "channels_of_part": _channels_of_part,
            "parts": lambda v: blocks_of(v["in_features"], v["channels_of_part"]),
        },
        scratch={**_SEARCH_SCRATCH, "maxima": lambda v: 4 * v["parts"] * v["out_features"] * v["candidates"]},
        tolerance=1e-5,
        refuses=lambda v: (
            f"takes one group of a multiple of 4 input channels, not {v['in_features']} in groups of {v['group_size']}"
            if v["in_features"] % 4 or v["group_size"] < v["in_features"]
            else None
        ),
    ),
    Variant(
        stage="search_diag",
        name="groups",
        file="search_groups.cu",
        help="steps per group of 32, 64 or 128: a warp holds a group of a row",
        kernels=(
            _CANDIDATES,
            Kernel(
                "group_errors",
                arguments(
                    *_SEARCHED,
                    "double* partial",
                    "int out_features",
                    "int in_features",
                    "int candidates",
                    "int rows_of_block",
                ),
                grid=_by_chunks(_of_rows_and_columns),
            ),
            _CHOOSE,
        ),
        macros={"THREADS": 1024, "BLOCKS": 2, "AHEAD": 1},
        parameters={
            "QMAX": QMAX,
            "COLUMNS": Parameter(range(1, 5), compiled=(4, 2, 1)),
            "CHUNK": Parameter(range(1, 21), compiled=(5, 4)),
        },
        derived={
            "COLUMNS": lambda v: max(1, v["group_size"] // 32),
            "CHUNK": _chunk(lambda v: max(1, 20 // v["COLUMNS"])),
            "rows_of_block": _rows_of_block,
            "blocks": _of_rows_and_columns,
        },
        scratch=_SEARCH_SCRATCH,
        tolerance=1e-5,
        refuses=lambda v: (
            f"takes groups of 32, 64 or 128 in rows of a multiple of 4, not {v['group_size']} in {v['in_features']}"
            if v["in_features"] % 4 or v["group_size"] not in (32, 64, 128)
            else None
        ),
    ),
    Variant(
        stage="search_diag",
        name="any",
        file="search_any.cu",
        help="any sizes: a warp for each group, errors in double",
        kernels=(
            _CANDIDATES,
            Kernel(
                "diag_errors",
                arguments(
                    *_SEARCHED,
                    "double* partial",
                    "int out_features",
                    "int in_features",
                    "int group_size",
                    "int candidates",
                ),
                grid=_by_chunks(lambda v: v["blocks"]),
            ),
            _CHOOSE,
        ),
        macros={"THREADS": 1024, "WARPS": 8},
        parameters={"QMAX": QMAX, "CHUNK": Parameter(range(1, 9), compiled=(8, 5))},
        derived={
            "CHUNK": _chunk(lambda v: 8),
            "blocks": lambda v: min(
                blocks_of(v["out_features"] * blocks_of(v["in_features"], v["group_size"]), v["WARPS"]), 1056
            ),
        },
        scratch=_SEARCH_SCRATCH,
        tolerance=1e-5,
    ),
)

_MADE = (
    *MEANS,
    "double* gamma[candidates]",
    "double* rule[rules]",
)
_ERROR_BLOCKS = 264  # at most; they follow from the sizes alone, so that sums are in the same order on every device


def _output(stage: str, help_: str, kernels: tuple[Kernel, ...], **more: Any) -> Variant:
    return Variant(stage, ONLY, "search_output.cu", help_, kernels, macros={"THREADS": 1024}, tolerance=1e-5, **more)


# The search with objective output goes through the stages of a layer, candidate by candidate; these come beside them.
OUTPUT_SEARCH = (
    _output(
        "candidate",
        "the scales of one candidate",
        (
            Kernel(
                "candidate",
                arguments(
                    *_MADE,
                    "float* s[in_features]",
                    "float* inv_s[in_features]",
                    "double* work",
                    "int in_features",
                    "int by_mean",
                    "int index",
                ),
                grid=lambda v: 1,
                block=("THREADS",),
            ),
        ),
        scratch={"work": lambda v: 8 * v["in_features"]},
    ),
    _output(
        "output_error",
        "the mean squared error of one candidate's output",
        (
            Kernel(
                "squared_errors",
                arguments(
                    "float* reference[tokens, out_features]",
                    "float* value[tokens, out_features]",
                    "double* partial",
                    "Size count",
                ),
                grid=lambda v: v["blocks"],
                block=("THREADS",),
            ),
            Kernel(
                "mean_error",
                arguments("double* partial", "double* error[candidates]", "Size count", "int blocks", "int index"),
                grid=lambda v: 1,
                block=("THREADS",),
            ),
        ),
        derived={
            "count": lambda v: v["tokens"] * v["out_features"],
            "blocks": lambda v: min(blocks_of(v["count"], v["THREADS"]), _ERROR_BLOCKS),
        },
        scratch={"partial": lambda v: 8 * v["blocks"]},
    ),
    _output(
        "choose_output",
        "the scales of the best candidate",
        (
            Kernel(
                "choose_output",
                arguments(
                    *_MADE,
                    "double* error[candidates]",
                    "float* s[in_features]",
                    "float* inv_s[in_features]",
                    "double* work",
                    "int in_features",
                    "int by_mean",
                    "int candidates",
                ),
                grid=lambda v: 1,
                block=("THREADS",),
            ),
        ),
        scratch={"work": lambda v: 8 * v["in_features"]},
    ),
)
