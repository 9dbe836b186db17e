"""The entries of the search with objective output; what they compute stands in cuda/search_output.cuh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from awq_pycuda.kernels.candidates import CANDIDATES, MAKERS
from awq_pycuda.kernels.formats import OF_TENSORS, OF_TENSORS_SCRATCH
from awq_pycuda.kernels.launches import FORM, QMAX, RANK, arguments, blocks_of, plain_only, walk
from awq_pycuda.kernels.variant import Kernel, Values, Variant

Scratch: TypeAlias = dict[str, Callable[[Values], int]]  # bytes of arrays, by name

# As in search_output.cuh and search_output_digits.cuh.
_WARPS, _STEP_ROWS, _STEP_CANDIDATES, _AT_ONCE = 8, 8, 4, 4
_PIECE_ROWS, _PIECE_CANDIDATES = 8, 7
_WIDE_THREADS = 1024  # of a block that has all tokens of its channels
_ROUND_SHARE = 16  # a round's candidates take a sixteenth of the device's memory, unless one alone takes more
# For digits: over so many their roundings average out.
_FEWEST_ROWS, _FEWEST_CHANNELS, _FEWEST_NUMBERS = 128, 64, 16384
_MOST_CHANNELS = (1 << 16) - 1  # whose sums do not overflow

_OF_ROUND = ("int candidates", "int chunk", "int round")
_SHAPE = ("int out_features", "int in_features", "int group_size")
_W, _X = "float* w[out_features, in_features]", "float* x[tokens, in_features]"


def _parts(v: Values) -> int:
    """How many times a round's weights are read: once for so many candidates."""
    return blocks_of(v["chunk"], _AT_ONCE)


def _groups(v: Values) -> int:
    return blocks_of(v["in_features"], v["group_size"])


def _joined(v: Values) -> int:
    """Tiles of channels to a group, where groups are whole ones; else 0."""
    if v["in_features"] % 4 == 0 and (v["group_size"] % v["DEPTH"] == 0 or v["group_size"] >= v["in_features"]):
        return blocks_of(v["group_size"], v["DEPTH"])
    return 0


_CHOOSE = Kernel(
    "choose",
    arguments(
        "double* partial",
        RANK,
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
_STEPS = Kernel(
    "row_steps",
    arguments(_W, "float* candidate_s", "float* steps", *_SHAPE, *_OF_ROUND),
    grid=lambda v: (
        not v.get("joined")
        and blocks_of(v["chunk"], _STEP_CANDIDATES) * blocks_of(v["out_features"], _WARPS * _STEP_ROWS)
    ),
    each_round=True,
)


def _chunk(of_one: Scratch) -> Callable[[Values], int]:
    """Candidates of a round: rounds of one size, as far as they go, and as few as the device's memory allows.

    Args:
        of_one: bytes of each array that one candidate of a round takes.
    """

    def chunk(v: Values) -> int:
        most = max(1, v["memory_bytes"] // _ROUND_SHARE // sum(nbytes(v) for nbytes in of_one.values()))
        fair = blocks_of(v["candidates"], blocks_of(v["candidates"], most))
        full = blocks_of(fair, _AT_ONCE) * _AT_ONCE  # so that no warp goes without
        return full if full <= min(most, v["candidates"]) else fair

    return chunk


def _rounds(v: Values) -> int:
    return blocks_of(v["candidates"], v["chunk"])


def _steps_of_one(v: Values) -> int:
    return 4 * v["out_features"] * _groups(v)


def _of_round(of_one: Scratch) -> Scratch:
    """The same arrays for all candidates of a round."""

    def of_all(nbytes: Callable[[Values], int]) -> Callable[[Values], int]:
        return lambda v: v["chunk"] * nbytes(v)

    return {name: of_all(nbytes) for name, nbytes in of_one.items()}


_SCRATCH: Scratch = {
    "candidate_s": lambda v: 4 * v["candidates"] * v["in_features"],
    "importance": lambda v: 8 * v["candidates"] * v["in_features"],
    "partial": lambda v: 8 * v["candidates"] * v["blocks"],
}
_STEPS_OF_ONE: Scratch = {"steps": _steps_of_one}
_GROUPS_OF_ONE: Scratch = {**_STEPS_OF_ONE, "zeros": lambda v: _steps_of_one(v) if v["ZEROS"] else 4}


def _depths(v: Values) -> int:
    return blocks_of(v["in_features"], v["DEPTH"])


def _token_tiles(v: Values) -> int:
    return blocks_of(v["tokens"], v["TOKENS"])


def _digits_of_one(v: Values) -> int:
    """Bytes of a candidate's digits: two for each weight, padded."""
    return v["row_tiles"] * _depths(v) * 2 * v["ROWS"] * v["DEPTH"]


_DIGITS_OF_ONE: Scratch = {
    **_STEPS_OF_ONE,
    "pieces": lambda v: 4 * v["out_features"] * _depths(v) if v["joined"] else 4,
    "base": lambda v: 8 * v["out_features"],
    "over_base": lambda v: 4 * v["out_features"],
    "d_digits": _digits_of_one,
}


def _together(v: Values) -> int:
    """Rows that blocks take together: those of a cluster, where there are clusters."""
    return v.get("CLUSTER", 1) * v["ROWS"]


def _clusters(v: Values) -> int:
    """Blocks that stay: whole clusters, at most one block for each multiprocessor."""
    tiles = _token_tiles(v) * v["chunk"] * v["row_tiles"] // v["CLUSTER"]
    return max(1, min(tiles, v["multiprocessors"] // v["CLUSTER"])) * v["CLUSTER"]


def _few(v: Values) -> str | None:
    if "tokens" not in v:  # asked before there are sizes
        return None
    if v["out_features"] < _FEWEST_ROWS or not _FEWEST_CHANNELS <= v["in_features"] <= _MOST_CHANNELS:
        return (
            f"takes at least {_FEWEST_ROWS} rows of {_FEWEST_CHANNELS} to {_MOST_CHANNELS} input channels, not "
            f"{v['out_features']} of {v['in_features']}"
        )
    if v["group_size"] < 2:  # every code is exact then: what is left is the rounding of float
        return "takes groups of at least 2 input channels, not 1"
    if v["tokens"] * min(v["in_features"], v["out_features"]) < _FEWEST_NUMBERS:
        return (
            f"takes at least {_FEWEST_NUMBERS} activations and as many outputs, not those of {v['tokens']} tokens with "
            f"{v['in_features']} and {v['out_features']} channels"
        )
    return None


# Before the product of a round: the digits of both sides.
_SPLIT = (
    CANDIDATES,
    Kernel(
        "column_peaks",
        arguments(_X, "float* peak", "int tokens", "int in_features"),
        grid=lambda v: blocks_of(v["in_features"], 32),
        block=(_WIDE_THREADS,),
    ),
    Kernel(
        "split_activations",
        arguments(
            *(_X, "float* sq_mean[in_features]", "float* peak", "float* candidate_s"),
            *("signed char* x_digits", "float* unit", "float* factor", "int tokens", "int in_features"),
            "int candidates",
        ),
        grid=_depths,
        block=(_WIDE_THREADS,),
    ),
    Kernel(
        "top_factors",
        arguments("float* factor", "float* tops", "int in_features", "int group_size", "int candidates"),
        grid=lambda v: blocks_of(v["candidates"] * _groups(v), _WARPS),
    ),
    Kernel(
        "row_reaches",
        arguments(_W, "float* unit", "float* reaches", *_SHAPE),
        grid=lambda v: not v["joined"] and blocks_of(v["out_features"], _WARPS),
    ),
    Kernel(
        "piece_maxima",
        arguments(
            *(_W, "float* candidate_s", "float* unit", "int* pieces", "float* reaches"),
            *("int out_features", "int in_features", *_OF_ROUND),
        ),
        grid=lambda v: (
            bool(v["joined"])
            * blocks_of(v["chunk"] + 1, _PIECE_CANDIDATES)
            * _depths(v)
            * blocks_of(v["out_features"], _WARPS * _PIECE_ROWS)
        ),
        each_round=True,
    ),
    _STEPS,
    Kernel(
        "row_bases",
        arguments(
            *(_W, "float* candidate_s", "int* pieces", "float* steps", "float* tops", "float* reaches"),
            *("double* base", "float* over_base", *_SHAPE, "int candidates", "int chunk", "int joined", "int round"),
        ),
        grid=lambda v: v["chunk"] * blocks_of(v["out_features"], 32 * _WARPS),
        each_round=True,
    ),
    Kernel(
        "split_differences",
        arguments(
            *(_W, "float* candidate_s", "float* factor", "float* steps", "double* base", "float* over_base"),
            *("signed char* d_digits", *_SHAPE, "int candidates", "int chunk", "int row_tiles", "int round"),
        ),
        grid=lambda v: _parts(v) * v["row_tiles"] * _depths(v),
        each_round=True,
    ),
)
_PRODUCT = arguments(
    *("signed char* x_digits", "signed char* d_digits", "double* base", "double* partial"),
    *("int tokens", "int out_features", "int in_features", "int candidates", "int chunk", "int row_tiles", "int round"),
)


def _by_digits(name: str, help_: str, product: Kernel, width: int, **more: Any) -> Variant:
    """A variant whose products have blocks of so many tokens."""
    return Variant(
        stage="search_output",
        name=name,
        file=f"search_output_{name}.cu",
        help=help_,
        kernels=(*_SPLIT, product, _CHOOSE),
        parameters={"QMAX": QMAX},
        derived={
            "row_tiles": lambda v: blocks_of(v["out_features"], _together(v)) * _together(v) // v["ROWS"],
            **MAKERS,
            "joined": _joined,
            "chunk": _chunk(_DIGITS_OF_ONE),
            "blocks": lambda v: v["row_tiles"] * blocks_of(v["tokens"], width) * _WARPS,
        },
        scratch={
            **_SCRATCH,
            **_of_round(_DIGITS_OF_ONE),
            "peak": lambda v: 4 * v["in_features"],
            "x_digits": lambda v: _token_tiles(v) * _depths(v) * 2 * v["TOKENS"] * v["DEPTH"],
            "unit": lambda v: 4 * v["in_features"],
            "reaches": lambda v: 4 * v["out_features"] * (_depths(v) if v["joined"] else _groups(v)),
            "factor": lambda v: 4 * v["candidates"] * v["in_features"],
            "tops": lambda v: 12 * v["candidates"] * _groups(v),
        },
        tolerance=1e-5,
        unit="int8 matrix",
        passes=4,
        rounds=_rounds,
        refuses=_few,
        refuses_format=plain_only,
        **more,
    )


_TILES = {"THREADS": 1024, "TOKENS": 128, "ROWS": 128, "DEPTH": 128}
_DIGITS = _by_digits(
    "digits",
    "the difference of the weights, and the activations, as two int8 digits each, on Hopper's tensor cores",
    Kernel(
        "square_products",
        _PRODUCT,
        grid=_clusters,
        block=("BLOCK",),
        shared_bytes=lambda v: v["STAGES"] * (2 * v["DEPTH"] * (v["ROWS"] + v["TOKENS"]) + 16),
        each_round=True,
    ),
    width=_TILES["TOKENS"],
    macros={**_TILES, "STAGES": 3, "CLUSTER": 2, "BLOCK": 384},
    capability=(9, 0),
    suffix="a",
)
_DIGITS_MMA = _by_digits(
    "digits_mma",
    "the same digits by the instructions of Ampere's tensor cores and all later ones",
    Kernel(
        "square_products",
        _PRODUCT,
        grid=lambda v: v["chunk"] * v["row_tiles"] * blocks_of(v["tokens"], v["TOKENS"] // 2),
        block=("BLOCK",),
        shared_bytes=lambda v: v["STAGES"] * 2 * v["DEPTH"] * (v["ROWS"] + v["TOKENS"] // 2),
        each_round=True,
    ),
    width=_TILES["TOKENS"] // 2,
    macros={**_TILES, "STAGES": 2, "BLOCK": 256},
    capability=(8, 0),
)
_PLAIN = Variant(
    stage="search_output",
    name="plain",
    file="search_output.cu",
    help="any sizes, every format, any GPU: products with sums in double",
    kernels=(
        CANDIDATES,
        *OF_TENSORS,
        Kernel(
            "candidate_groups",
            arguments(
                *(_W, "float* candidate_s", FORM, "float* tensor_scales", "float* steps", "float* zeros"),
                *(*_SHAPE, *_OF_ROUND),
            ),
            grid=walk(lambda v: 32 * v["chunk"] * v["out_features"] * _groups(v)),
            each_round=True,
        ),
        Kernel(
            "output_errors",
            arguments(
                *(_X, _W, "float* candidate_s", FORM, "float* steps", "float* zeros", "double* partial"),
                *("int tokens", *_SHAPE, *_OF_ROUND),
            ),
            grid=lambda v: v["chunk"] * v["blocks"],
            block=("TILE", "TILE"),
            each_round=True,
        ),
        _CHOOSE,
    ),
    macros={"THREADS": 1024, "TILE": 16, "MICRO": 4},
    derived={
        **MAKERS,
        "chunk": _chunk(_GROUPS_OF_ONE),
        "blocks": lambda v: (
            blocks_of(v["tokens"], v["TILE"] * v["MICRO"]) * blocks_of(v["out_features"], v["TILE"] * v["MICRO"])
        ),
    },
    scratch={**_SCRATCH, **OF_TENSORS_SCRATCH, **_of_round(_GROUPS_OF_ONE)},
    tolerance=1e-5,
    unit="fp64",
    rounds=_rounds,
)

OUTPUT_SEARCH = (_DIGITS, _DIGITS_MMA, _PLAIN)
