"""What every search starts with: the weights' statistic, and the scales of the candidates."""

from __future__ import annotations

from collections.abc import Callable

from awq_pycuda.kernels.launches import MULTIPROCESSORS, ONLY, arguments, blocks_of, walk
from awq_pycuda.kernels.variant import Kernel, Values, Variant

CANDIDATES = Kernel(
    "candidates",
    arguments(
        "float* statistics[in_features]",
        "float* sq_mean[in_features]",
        "double* weight_mean[in_features]",
        "double* gamma[candidates]",
        "double* beta[candidates]",
        "signed char* duo[candidates]",
        "double* rule[rules]",
        "float* candidate_s",
        "double* importance",
        "int in_features",
        "int by_mean",
        "int makers",
    ),
    grid=lambda v: v["candidates"] * v["makers"],
    block=("THREADS",),
)
# Of each candidate: a block for every 1,024 channels, if one multiprocessor each has room for all.
MAKERS: dict[str, Callable[[Values], int]] = {
    "makers": lambda v: max(1, min(blocks_of(v["in_features"], 1024), MULTIPROCESSORS // v["candidates"]))
}


def _lanes(v: Values) -> int:
    """Of a warp that have a group of the weights' statistic; 0 where groups do not lie so."""
    lanes = v["group_size"] // (4 if v["fours"] else 1)
    return lanes if lanes <= 32 and lanes & (lanes - 1) == 0 else 0


def _group_threads(v: Values) -> int:
    """A warp for each group."""
    return 32 * v["out_features"] * blocks_of(v["in_features"], v["group_size"])


def _strips(v: Values) -> int:
    """Blocks of the weights' statistic side by side: a lane has a channel, or four."""
    return blocks_of(v["in_features"], 128 if v["fours"] else 32)


WEIGHT_MEANS = Variant(
    stage="weight_means",
    name=ONLY,
    file="weight_means.cu",
    help="where scales follow from weights: the mean over the rows of magnitudes as shares of their group's largest",
    kernels=(
        Kernel(
            "group_factors",
            arguments(
                "float* w[out_features, in_features]",
                "double* factors",
                "int out_features",
                "int in_features",
                "int group_size",
            ),
            grid=lambda v: 0 if v["lanes"] else walk(_group_threads)(v),
        ),
        Kernel(
            "weight_sums",
            arguments(
                "float* w[out_features, in_features]",
                "double* factors",
                "double* partial",
                "int out_features",
                "int in_features",
                "int group_size",
                "int rows_of_block",
                "int fours",
                "int lanes",
            ),
            grid=lambda v: _strips(v) * v["chunks"],
            block=("THREADS",),
        ),
        Kernel(
            "finish_weight_means",
            arguments(
                "double* partial",
                "double* weight_mean[in_features]",
                "int out_features",
                "int in_features",
                "int chunks",
            ),
            grid=walk(lambda v: v["in_features"]),
        ),
    ),
    macros={"THREADS": 256},
    derived={
        "fours": lambda v: int(v["in_features"] % 4 == 0 and v["group_size"] % 4 == 0),
        "lanes": _lanes,
        # As many blocks as there is room for, unless their rows get few.
        "rows_of_block": lambda v: blocks_of(
            v["out_features"], max(1, min(4 * MULTIPROCESSORS // _strips(v), v["out_features"] // 64))
        ),
        "chunks": lambda v: blocks_of(v["out_features"], v["rows_of_block"]),
    },
    scratch={
        "factors": lambda v: 8 if v["lanes"] else _group_threads(v) // 4,
        "partial": lambda v: 8 * v["chunks"] * v["in_features"],
    },
    tolerance=1e-12,
    unit="fp64",
)
