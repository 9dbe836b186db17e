"""The entries of the search with objective diag; they compute what cuda/search.cuh and cuda/search_diag.cuh say."""

from __future__ import annotations

from collections.abc import Callable

from awq_pycuda.kernels.launches import MEANS, QMAX, arguments, blocks_of
from awq_pycuda.kernels.variant import Kernel, Parameter, Values, Variant

CANDIDATES = Kernel(
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
CHOOSE = Kernel(
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
            CANDIDATES,
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
            CHOOSE,
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
            CANDIDATES,
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
            CHOOSE,
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
            CANDIDATES,
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
            CHOOSE,
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
