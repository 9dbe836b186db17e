"""The entries of the search with objective diag; they compute what cuda/search.cuh and cuda/search_diag.cuh say."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from awq_pycuda.kernels.candidates import CANDIDATES, MAKERS
from awq_pycuda.kernels.formats import OF_TENSORS, OF_TENSORS_SCRATCH
from awq_pycuda.kernels.launches import FORM, MULTIPROCESSORS, QMAX, RANK, arguments, blocks_of, plain_only
from awq_pycuda.kernels.variant import Kernel, Parameter, Values, Variant

_SEARCHED = (
    "float* w[out_features, in_features]",
    "float* candidate_s",
    "double* importance",
    RANK,
)
_FOUND = ("double* partial", "double* error[candidates]", "float* s[in_features]", "float* inv_s[in_features]")
_SIZES = ("int out_features", "int in_features", "int group_size", "int candidates")
_SEARCH_SCRATCH: dict[str, Callable[[Values], int]] = {
    "candidate_s": lambda v: 4 * v["candidates"] * v["in_features"],
    "importance": lambda v: 8 * v["candidates"] * v["in_features"],
    "partial": lambda v: 8 * v["candidates"] * v["blocks"],
}
_COLUMN_THREADS = 256  # of a block whose threads own channels
_TILE_ROWS, _TILE_CHANNELS, _PADDING = 64, 128, 4  # of row_maxima
_MOST_ROWS = 512  # that a thread sums up in float
_WHOLE = 4 * _COLUMN_THREADS  # channels of a row that a block of `narrow` holds whole
_MOST_WHOLE = 110  # rows and candidates to each of these channels: with more of them `rows` is faster


@cache  # of a sweep's jobs most ask the same
def _even(items: int, across: int, at_once: int, largest: int, more: int, least: int = 1) -> int:
    """How many items a block takes, so that the last of the blocks is done soonest.

    Args:
        items: to be split.
        across: blocks for each part of them.
        at_once: blocks that run at a time.
        largest: that a block can take.
        more: items that take as long as what a block does beside them.
        least: that a block takes, if there are as many.
    """
    fewest = blocks_of(items, largest)
    most = max(fewest, min(items // least, fewest + 4 * at_once))
    sizes = (blocks_of(items, parts) for parts in range(fewest, most + 1))
    return min(sizes, key=lambda each: blocks_of(across * blocks_of(items, each), at_once) * (each + more))


def _chunk(largest: Callable[[Values], int], least: int = 1, step: int = 1) -> Callable[[Values], int]:
    """How many candidates a thread takes at a time: what takes least, as beside them a row takes as long as 2 do."""

    def chunk(v: Values) -> int:
        sizes = range(largest(v), least - 1, -step)
        return min(sizes, key=lambda size: blocks_of(v["candidates"], size) * (size + 2))

    return chunk


def _rows_of_block(most: Callable[[Values], int], least: int) -> Callable[[Values], int]:
    def rows(v: Values) -> int:
        across = blocks_of(v["candidates"], v["CHUNK"]) * _column_blocks(v)
        return _even(v["out_features"], across, v["BLOCKS"] * MULTIPROCESSORS, most(v), 16, least)

    return rows


def _most_rows(v: Values) -> int:
    """An even number, whose steps fit into 64 KB: with the rows to come they are what sm_86 has for a block."""
    return min(_MOST_ROWS, (1 << 16) // (16 * v["CHUNK"]) * 2)


def _of_whole_rows(v: Values) -> int:
    return blocks_of(v["out_features"], v["rows_of_block"])


def _whole_rows(v: Values) -> int:
    """Of a block: as many turns as make the last of the blocks done soonest."""
    turns, largest = blocks_of(v["out_features"], v["ROWS"]), v["MOST_ROWS"] // v["ROWS"]
    return v["ROWS"] * _even(turns, blocks_of(v["candidates"], v["CHUNK"]), 2 * MULTIPROCESSORS, largest, 4)


def _column_blocks(v: Values) -> int:
    return blocks_of(v["in_features"], _COLUMN_THREADS * v["COLUMNS"])


def _of_rows_and_columns(v: Values) -> int:
    return _column_blocks(v) * blocks_of(v["out_features"], v["rows_of_block"])


def _by_chunks(blocks: Callable[[Values], int]) -> Callable[[Values], int]:
    return lambda v: blocks_of(v["candidates"], v["CHUNK"]) * blocks(v)


def _maxima_blocks(v: Values) -> int:
    return blocks_of(v["candidates"], v["TILE_G"]) * blocks_of(v["out_features"], _TILE_ROWS)


def _channels_of_part(v: Values) -> int:
    tiles = blocks_of(v["in_features"], _TILE_CHANNELS)
    return _TILE_CHANNELS * _even(tiles, _maxima_blocks(v), 2 * MULTIPROCESSORS, tiles, 1)


def _maxima_shared(v: Values) -> int:
    """Two stages of tiles; behind them, in the same place, the maxima of the 8 warps."""
    stages = 2 * 4 * (_TILE_ROWS + v["TILE_G"]) * (_TILE_CHANNELS + _PADDING)
    return max(stages, 4 * 8 * _TILE_ROWS * v["TILE_G"])


def _errors_shared(v: Values) -> int:
    """The rows to come, and of each row of the block and each candidate the step and its reciprocal."""
    return 4 * v["AHEAD"] * _COLUMN_THREADS * v["COLUMNS"] + 8 * v["CHUNK"] * _most_rows(v)


def _unless(able: Callable[[Values], bool], takes: str) -> Callable[[Values], str | None]:
    """Why a variant refuses sizes of which this is not so; nothing before there are any."""

    def refuses(v: Values) -> str | None:
        if "in_features" not in v or able(v):
            return None
        return f"takes {takes}, not {v['in_features']} in groups of {v['group_size']}"

    return refuses


DIAG_SEARCH = (
    Variant(
        stage="search_diag",
        name="narrow",
        file="search_narrow.cu",
        help="one step per row of at most 1,024 input channels, a multiple of 4: a block holds whole rows",
        kernels=(
            CANDIDATES,
            Kernel(
                "row_errors",
                arguments(
                    *_SEARCHED,
                    *_FOUND,
                    "int out_features",
                    "int in_features",
                    "int candidates",
                    "int rows_of_block",
                ),
                grid=_by_chunks(_of_whole_rows),
                early=("w",),
            ),
        ),
        macros={"THREADS": 1024, "ROWS": 4, "MOST_ROWS": 256},
        parameters={"QMAX": QMAX, "CHUNK": Parameter(range(1, 11), compiled=(5, 10, 7))},
        derived={
            "CHUNK": _chunk(lambda v: 10),
            "rows_of_block": _whole_rows,
            "blocks": _of_whole_rows,
            **MAKERS,
        },
        scratch=_SEARCH_SCRATCH,
        tolerance=1e-5,
        refuses=_unless(
            lambda v: (
                v["in_features"] % 4 == 0
                and v["group_size"] >= v["in_features"] <= _WHOLE
                and v["out_features"] * v.get("candidates", 1) <= _MOST_WHOLE * v["in_features"]
            ),
            f"few rows and candidates, with one group of a multiple of 4 input channels, at most {_WHOLE}",
        ),
        refuses_format=plain_only,
    ),
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
                early=("w",),
            ),
            Kernel(
                "column_errors",
                arguments(
                    *_SEARCHED,
                    "float* maxima",
                    *_FOUND,
                    "int out_features",
                    "int in_features",
                    "int candidates",
                    "int parts",
                    "int rows_of_block",
                ),
                grid=_by_chunks(_of_rows_and_columns),
                shared_bytes=_errors_shared,
                early=("w",),
            ),
        ),
        macros={"THREADS": 1024, "AHEAD": 8, "TURN": 2},
        parameters={
            "QMAX": QMAX,
            "CHUNK": Parameter(range(6, 21, 2), compiled=(12, 20, 16, 6)),
            "COLUMNS": Parameter(range(2, 5, 2), compiled=(4, 2)),
            "TILE_G": Parameter(range(4, 21, 4), compiled=(20, 16, 8)),
        },
        derived={
            # Few weights would leave most of the card idle with four channels a thread.
            "COLUMNS": lambda v: 4 if v["out_features"] * v["in_features"] >= 1 << 22 else 2,
            # With two channels there are two blocks on a multiprocessor, and registers for 12.
            "CHUNK": _chunk(lambda v: 20 if v["COLUMNS"] == 4 else 12, least=6, step=2),
            "TILE_G": _chunk(lambda v: 20, least=4, step=4),
            "BLOCKS": lambda v: 1 if v["COLUMNS"] * v["CHUNK"] > 40 else 2,
            "rows_of_block": _rows_of_block(_most_rows, 16),
            "blocks": _of_rows_and_columns,
            **MAKERS,
            "channels_of_part": _channels_of_part,
            "parts": lambda v: blocks_of(v["in_features"], v["channels_of_part"]),
        },
        scratch={**_SEARCH_SCRATCH, "maxima": lambda v: 4 * v["parts"] * v["out_features"] * v["candidates"]},
        tolerance=1e-5,
        refuses=_unless(
            lambda v: v["in_features"] % 4 == 0 and v["group_size"] >= v["in_features"],
            "one group of a multiple of 4 input channels",
        ),
        refuses_format=plain_only,
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
                    *_FOUND,
                    "int out_features",
                    "int in_features",
                    "int candidates",
                    "int rows_of_block",
                ),
                grid=_by_chunks(_of_rows_and_columns),
                early=("w",),
            ),
        ),
        macros={"THREADS": 1024, "AHEAD": 8, "TURN": 2},
        parameters={
            "QMAX": QMAX,
            "COLUMNS": Parameter(range(1, 5), compiled=(4, 2, 1)),
            "CHUNK": Parameter(range(1, 21), compiled=(10, 5, 20)),
        },
        derived={
            "COLUMNS": lambda v: max(1, v["group_size"] // 32),
            "CHUNK": _chunk(lambda v: max(1, min(20, 40 // v["COLUMNS"]))),
            "BLOCKS": lambda v: 1 if v["COLUMNS"] * v["CHUNK"] > 24 else 2,
            "rows_of_block": _rows_of_block(lambda v: _MOST_ROWS, 8),
            "blocks": _of_rows_and_columns,
            **MAKERS,
        },
        scratch=_SEARCH_SCRATCH,
        tolerance=1e-5,
        refuses=_unless(
            lambda v: v["in_features"] % 4 == 0 and v["group_size"] in (32, 64, 128),
            "a multiple of 4 input channels in groups of 32, 64 or 128",
        ),
        refuses_format=plain_only,
    ),
    Variant(
        stage="search_diag",
        name="any",
        file="search_any.cu",
        help="any sizes, every format: a warp for each group, errors in double",
        kernels=(
            CANDIDATES,
            *OF_TENSORS,
            Kernel(
                "diag_errors",
                arguments(*_SEARCHED, FORM, *_FOUND, *_SIZES),
                grid=lambda v: v["is_plain"] * _by_chunks(lambda v: v["blocks"])(v),
            ),
            Kernel(
                "format_errors",
                arguments(*_SEARCHED, FORM, "float* tensor_scales", *_FOUND, *_SIZES),
                grid=lambda v: (1 - v["is_plain"]) * _by_chunks(lambda v: v["blocks"])(v),
            ),
        ),
        macros={"THREADS": 1024, "WARPS": 8},
        parameters={"CHUNK": Parameter(range(1, 9), compiled=(8, 5))},
        derived={
            "CHUNK": _chunk(lambda v: 8),
            **MAKERS,
            "blocks": lambda v: min(
                blocks_of(v["out_features"] * blocks_of(v["in_features"], v["group_size"]), v["WARPS"]), 1056
            ),
        },
        scratch={**_SEARCH_SCRATCH, **OF_TENSORS_SCRATCH},
        tolerance=1e-5,
    ),
)
