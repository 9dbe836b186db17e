"""The entries that take every format: what stands in cuda/format.cuh decides, given a format as numbers."""

from __future__ import annotations

from collections.abc import Callable

from awq_pycuda.kernels.launches import FORM, PEAK_THREADS, arguments, blocks_of, rows_of_blocks, walk
from awq_pycuda.kernels.variant import Kernel, Values, Variant

_W, _S = "float* w[out_features, in_features]", "float* s[in_features]"
_SHAPE = ("int out_features", "int in_features", "int group_size")
_OF_GROUPS = ("float* scale_b[out_features, groups]", "float* zero_points[out_features, groups]")

# Where the steps of a matrix are scaled together: by its largest magnitude.
_WEIGHT_PEAKS = Kernel(
    "weight_peaks",
    arguments(_W, "float* peaks", "int out_features", "int in_features"),
    grid=lambda v: v["tensor_scaled"] * blocks_of(v["in_features"], 32),
    block=(PEAK_THREADS,),
)
_PEAKS: dict[str, Callable[[Values], int]] = {"peaks": lambda v: 4 * v["in_features"] if v["tensor_scaled"] else 4}
# The same of every candidate of a search.
OF_TENSORS = (
    _WEIGHT_PEAKS,
    Kernel(
        "scales_of_tensor",
        arguments("float* peaks", "float* candidate_s", FORM, "float* tensor_scales", "int in_features"),
        grid=lambda v: v["tensor_scaled"] * v["candidates"],
        block=(PEAK_THREADS,),
    ),
)
OF_TENSORS_SCRATCH = {**_PEAKS, "tensor_scales": lambda v: 4 * v["candidates"]}

STEPS_ANY = Variant(
    stage="compute_scale_b",
    name="any",
    file="formats.cu",
    help="every format: steps and zero points by a warp for each group",
    kernels=(
        _WEIGHT_PEAKS,
        Kernel(
            "scale_of_tensor",
            arguments("float* peaks", _S, FORM, "float* tensor_scale[matrices]", "int in_features"),
            grid=lambda v: v["tensor_scaled"],
            block=(PEAK_THREADS,),
        ),
        Kernel(
            "compute_scale_b",
            arguments(_W, _S, FORM, "float* tensor_scale[matrices]", *_OF_GROUPS, *_SHAPE),
            grid=walk(lambda v: 32 * v["out_features"] * blocks_of(v["in_features"], v["group_size"])),
        ),
    ),
    scratch=_PEAKS,
)
QUANTIZE_ANY = Variant(
    stage="quantize_awq",
    name="any",
    file="formats.cu",
    help="every format: true divisions, a thread for each weight",
    kernels=(
        Kernel(
            "quantize_awq",
            arguments(_W, _S, FORM, *_OF_GROUPS, "signed char* wq[out_features, in_features]", *_SHAPE),
            grid=rows_of_blocks("out_features"),
        ),
    ),
)
