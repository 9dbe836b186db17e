"""What stands for the GPU where there is none: that it sees what is wrong with a kernel."""

import shutil

import numpy as np
import pytest
from host_cuda.build import Builder
from host_cuda.device import KernelFault
from kernel_checks import SELFTEST, call, check

from awq_pycuda.paths import resource_dir


def plant(source, folder, old, new):
    """A copy of a source's folder with one piece of its text replaced."""
    shutil.copytree(source.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = source.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{source.name} holds the text to replace {text.count(old)} times"
    (folder / source.name).write_text(text.replace(old, new), encoding="utf-8")
    return folder / source.name


BARRIER = "__syncthreads();\n"
RACE = (
    r"thread \(\d+, \d+, 0\): (reads|writes) shared memory at {file}:\d+, "
    r"which .* ((wrote|read) at {file}:\d+, with no barrier between|has written)"
)

FAULTS = {
    "global read off by one": (
        "matmul_tiled.cu",
        "return row_there && k < in_features",
        "return row_there && k <= in_features",
        r"(?s)heap-buffer-overflow.*READ of size 4.*{file}:\d+.*kernel dequantizeTiled, block \(\d+, 0, 0\), thread",
    ),
    "global write off by one": (
        "init.cu",
        "first + 4 <= count",
        "first + 3 <= count",
        "(?s)heap-buffer-overflow.*WRITE of",
    ),
    "shared index off by one": (
        "matmul_tiled.cu",
        "float inv_s_tile[2][TILE];",
        "float inv_s_tile[2][TILE - 1];",
        r"{file}:\d+:\d+: runtime error: index 6 out of bounds",
    ),
    "shared vector off by one": (
        "matmul_blocked.cu",
        "&w_tile[i][MICRO * tx]",
        "&w_tile[i][MICRO * tx + 8]",
        "(?s)global-buffer-overflow.*READ of size",
    ),
    "vector that is not aligned": (
        "matmul_blocked.cu",
        "constexpr int STRIDE = SIDE + 4;",
        "constexpr int STRIDE = SIDE + 5;",
        "misaligned address",
    ),
    "no first barrier": ("matmul_tiled.cu", "float sum = 0.0f;\n    " + BARRIER, "float sum = 0.0f;\n", RACE),
    "no barrier in the loop": (
        "matmul_tiled.cu",
        "load_inv_s(k + TILE);\n        " + BARRIER,
        "load_inv_s(k + TILE);\n",
        RACE,
    ),
    "no barrier before the next tile": (
        "matmul_blocked.cu",
        "        }\n        " + BARRIER + "    }",
        "        }\n    }",
        RACE,
    ),
    "no barrier before the next tile of the reference": (
        "reference.cu references",
        "        }\n        " + BARRIER + "    }\n}",
        "        }\n    }\n}",
        RACE,
    ),
    "no barrier in the tree": (
        "reference.cu sums",
        "        }\n        " + BARRIER + "    }\n    if",
        "        }\n    }\n    if",
        RACE,
    ),
    "no barrier of the sums": ("stats.cu", BARRIER, "\n", RACE),
    "no barrier before the next tile of the maxima": (
        "search_rows.cu",
        "__pipeline_wait_prior(STAGES - 2);\n        " + BARRIER,
        "__pipeline_wait_prior(STAGES - 2);\n",
        RACE.replace("{file}", r"search_\w+.cuh?"),
    ),
    "no barrier before the maxima of warps": (
        "search_rows.cu",
        "__pipeline_wait_prior(0);\n    " + BARRIER,
        "__pipeline_wait_prior(0);\n",
        RACE.replace("{file}", r"search_\w+.cuh?"),
    ),
    "no barrier before the steps are read": (
        "search_rows.cu",
        "        " + BARRIER + "    };\n",
        "    };\n",
        RACE,
    ),
    "no barrier of the groups' sums": ("search_any.cu", BARRIER, "\n", RACE),
    "no barrier between two rows' maxima": (
        "scale_b.cu",
        BARRIER + "    if (threadIdx.x != 0) return;",
        "\n    if (threadIdx.x != 0) return;",
        RACE,
    ),
    "scales of one channel too many": (
        "search_groups.cu",
        "const bool inside = k < in_features;",
        "const bool inside = k <= in_features;",
        "heap-buffer-overflow",
    ),
    "barrier in divergent code": (
        "matmul_tiled.cu",
        "if (ty == 0) inv_s_tile[1 - buffer][tx] = load_inv_s(k + TILE);",
        "if (ty == 0) { inv_s_tile[1 - buffer][tx] = load_inv_s(k + TILE); __syncthreads(); }",
        r"a barrier that not all threads reach\n"
        r"  7 of 49 threads, the first \(0, 0, 0\), wait in __syncthreads at {file}:(\d+)\n"
        r"  42 of 49 threads, the first \(0, 1, 0\), wait in __syncthreads at {file}:(?!\1)\d+",
    ),
    "threads that have ended": (
        "stats.cu",
        "    " + BARRIER,
        "    if (channel >= in_features) return;\n    " + BARRIER,
        r"kernel accum_stats, block \(1, 0, 0\): a barrier that not all threads reach\n(?s:.*)768 of 1024 .*have ended",
    ),
    "two threads, one element": (
        "quantize.cu",
        "wq[first + k] = code_of(",
        "wq[first + k / 2] = code_of(",
        r"writes byte \d+ of an array at {file}:\d+, which thread \(\d+, 0, 0\) wrote at {file}:\d+",
    ),
    "two blocks, one element": (
        "stats.cu",
        "(which ? sq_mean : abs_mean)[first_channel + place] =",
        "(which ? sq_mean : abs_mean)[place] =",
        r"writes byte \d+ of an array at {file}:\d+, which another block wrote at {file}:\d+",
    ),
}


# Where the text to replace is a header's.
HEADERS = {"reference.cu references": "double_product.cuh"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told(tmp_path, fault):
    kernel, old, new, message = FAULTS[fault]
    source = HEADERS.get(kernel, kernel.split()[0])
    planted = plant(resource_dir("cuda") / source, tmp_path / "cuda", old, new)
    with pytest.raises(KernelFault, match=message.replace("{file}", planted.name)):
        check(kernel, planted.parent)


WRONG = {
    "unwritten tile": (
        "matmul_tiled.cu",
        "if (row_there && column < out_features)",
        "if (row_there && column < out_features && blockIdx.x != 1)",
    ),
    "unwritten last column": ("matmul_blocked.cu", "&& column < out_features)", "&& column + 1 < out_features)"),
    "roundf for rintf": ("quantize.cu", "rintf(scaled / step)", "roundf(scaled / step)"),
    "no division where it decides": (
        "quantize.cu",
        "if (division)",
        "if (division && step < 0.0f)",
    ),
    "a step of the wrong group": ("matmul_tiled.cu", "steps_row[k / group_size]", "steps_row[0]"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_planted_wrong_result_is_seen(tmp_path, fault):
    kernel, old, new = WRONG[fault]
    planted = plant(resource_dir("cuda") / kernel, tmp_path / "cuda", old, new)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(kernel, planted.parent)


def test_faults_of_warps_atomics_and_dynamic_memory(tmp_path):
    integers, sums = np.arange(64, dtype=np.int32), np.zeros((12, 64), np.int32)
    source = plant(SELFTEST, tmp_path / "mask", "0x0000FFFFu : 0xFFFF0000u", "0xFFFF0000u : 0x0000FFFFu")
    with pytest.raises(KernelFault, match=r"__reduce_add_sync at selftest.cu:\d+ its mask lacks the lane that calls"):
        call("lanes", integers, sums, source=source)
    source = plant(SELFTEST, tmp_path / "lane", "__reduce_add_sync(~0u, in[threadIdx.x])", "__shfl_sync(~0u, 1, 0)")
    with pytest.raises(KernelFault, match=r"__shfl_sync at selftest.cu:\d+ reads a lane that takes no part"):
        call("partial_warp", integers, sums, source=source)
    floats = np.zeros(64, np.float32)
    source = plant(SELFTEST, tmp_path / "tree", "half];\n        __syncwarp();", "half];\n")
    with pytest.raises(KernelFault, match=RACE.replace("{file}", "selftest.cu")):
        call("warp_tree", floats, floats.copy(), source=source)
    source = plant(SELFTEST, tmp_path / "add", "atomicAdd(&histogram[value], 1);", "histogram[value] += 1;")
    with pytest.raises(KernelFault, match=r"of an array at selftest.cu:\d+, which thread .* wrote at"):
        call("count", integers // 32, integers.copy(), integers.copy(), source=source)
    source = plant(SELFTEST, tmp_path / "order", "atomicExch(&extremes[3], 7)", "atomicExch(&extremes[3], value)")
    with pytest.raises(KernelFault, match="its result depends on the order of the threads"):
        call("count", integers // 32, integers.copy(), integers.copy(), source=source)
    with pytest.raises(KernelFault, match=r"(?s)heap-buffer-overflow.*reverse"):
        call("reverse", np.zeros(64), np.zeros(64), shared=8 * 63)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("__threadfence();\n        last", "last"),
        ("gridDim.x - 1;\n        __threadfence();", "gridDim.x - 1;"),
        ("__syncthreads();\n    if (threadIdx.x == 0) {", "if (threadIdx.x == 0) {"),
        ("atomicAdd(came, 1)", "atomicAdd(came + blockIdx.x, 1) + blockIdx.x"),
    ],
)
def test_a_block_that_comes_last_and_may_not_see_the_others(tmp_path, old, new):
    source = plant(SELFTEST, tmp_path / "planted", old, new)
    ones = np.ones(10, np.int32)
    with pytest.raises(KernelFault, match=r"of an array at selftest.cu:\d+, which another block (wrote|read) at"):
        call("last_block", ones, 0 * ones, 0 * ones, 0 * ones[:1], blocks=5, source=source)


def test_a_launch_that_no_device_takes_is_told():
    with pytest.raises(KernelFault, match="kernel count: 1025 threads in a block"):
        call("count", *(np.zeros(4, np.int32) for _ in range(3)), threads=1025)
    with pytest.raises(KernelFault, match="kernel count takes arguments of types PPP, launched with PQP"):
        call("count", np.zeros(4, np.int32), 4, np.zeros(4, np.int32))


def test_without_a_compiler_the_tests_fail(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"need g\+\+ on PATH"):
        Builder(tmp_path).runner("address")
