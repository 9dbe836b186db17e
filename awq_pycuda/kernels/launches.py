"""What entries of the table of kernels are written with: their arguments as texts, and the grids that several have."""

from __future__ import annotations

from collections.abc import Callable

from awq_pycuda.kernels.variant import WALK_THREADS, Argument, Parameter, Values

ONLY = "only"  # the variant of a stage that has no other
_WALK_BLOCKS = 32  # for each multiprocessor: enough to fill the card; such kernels stride over the rest
# The multiprocessors that grids are made for. Fixed, as the order of sums is.
MULTIPROCESSORS = 132
PEAK_THREADS = 1024  # as in column_peaks.cuh
MEANS = ("float* abs_mean[in_features]", "float* sq_mean[in_features]")
RANK = "int* rank[candidates]"  # of candidates whose errors are the same: the lower one is chosen
QMAX = Parameter(range(1, 128), compiled=(127,))  # the largest code


def plain_only(v: Values) -> str | None:
    """The refusal of kernels that take symmetric integers with float32 steps alone."""
    return None if v.get("is_plain", 1) else "takes symmetric integers with fp32 steps alone"


def without_zeros(v: Values) -> str | None:
    """The refusal of products that know no zero points."""
    return "takes no zero points" if v.get("ZEROS") else None


def blocks_of(items: int, each: int) -> int:
    """How many blocks of so many items each there are, the last one full or not."""
    return -(-items // each)


def walk(items: Callable[[Values], int]) -> Callable[[Values], int]:
    """The grid of a kernel that strides over an index space."""
    return lambda v: min(blocks_of(items(v), WALK_THREADS), _WALK_BLOCKS * v["multiprocessors"])


def rows_of_blocks(rows: str) -> Callable[[Values], int]:
    """The grid of a kernel whose blocks take a row at a time and stride over the rest."""
    return lambda v: min(v[rows], _WALK_BLOCKS * v["multiprocessors"])


def arguments(*declared: str) -> tuple[Argument, ...]:
    """Arguments from texts such as "float* x[tokens, in_features]" and "Size tokens"."""
    found = []
    for text in declared:
        before, _, shape = text.removesuffix("]").partition("[")
        kind, _, name = before.rpartition(" ")
        found.append(Argument(kind, name, tuple(shape.split(", ")) if shape else ()))
    return tuple(found)


PRODUCT = arguments(
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
# Of a product that does what the stage relu does, too, where a call asks for it.
WITH_RELU = (*PRODUCT[:4], *arguments("float* bias[out_features]"), *PRODUCT[4:], *arguments("int relu"))
# Of one that knows zero points, too.
WITH_ZEROS = (
    *WITH_RELU[:4],
    *arguments("float* zero_points[out_features, groups]"),
    *WITH_RELU[4:-1],
    *arguments("int float_zeros"),
    *WITH_RELU[-1:],
)
FORM = "float* form[numbers]"  # of a format; see quant/for_kernels.py
