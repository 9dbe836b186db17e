"""What stands for the GPU where there is none: what it gives to kernels, and that it sees what is wrong with one."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import same_bits
from host_cuda.backend import host_backend
from host_cuda.build import Builder, Source, not_run
from host_cuda.device import KernelFault, Launch
from host_cuda.driver import host_device
from test_device_search import convention, layer_of, searched
from test_pipeline import Kept

from awq_pycuda import philox
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.config import Objective
from awq_pycuda.engine.arrays import allocate
from awq_pycuda.kernels import bench_table, table
from awq_pycuda.paths import resource_dir
from awq_pycuda.quant.format import Format, Quantized

SELFTEST = Path(__file__).with_name("host_cuda") / "selftest.cu"
RNG = np.random.default_rng(5)


def call(entry, *arguments, blocks=1, threads=64, shared=0, source=SELFTEST):
    """Launches a kernel; a number is a 64-bit size."""
    typed = [("Q" if isinstance(argument, int) else "P", argument) for argument in arguments]
    host_device().launch(Source(source), entry, Launch((blocks, 1, 1), (threads, 1, 1), shared), typed)


# --- what a kernel is given ---------------------------------------------------------------------------------------


def test_lanes_exchange_values():
    values, found = RNG.integers(-9, 9, 64, np.int32), np.full((12, 64), -99, np.int32)
    call("lanes", values, found)
    warps, lane = values.reshape(2, 32), np.arange(32)
    sums, halves = warps.sum(axis=1), np.repeat(warps.reshape(2, 2, 16).sum(axis=2), 16, axis=1)
    ballots = ((warps > 0) << lane).sum(axis=1).astype(np.uint32).view(np.int32)
    expected = [
        np.repeat(warps[:, 5], 32),
        warps[:, lane // 8 * 8 + (lane + 3) % 8],
        warps[:, np.where(lane < 3, lane, lane - 3)],
        warps[:, np.where(lane % 16 > 12, lane, (lane + 3) % 32)],
        warps[:, lane ^ 7],
        *(np.repeat(each, 32) for each in (sums, warps.max(axis=1), warps.min(axis=1), ballots)),
        np.repeat((warps > 9).any(axis=1), 32),
        np.repeat((warps > -9).all(axis=1), 32),
        halves,
    ]
    for exchange, (row, exact) in enumerate(zip(found, expected, strict=True)):
        assert np.array_equal(row, exact.reshape(64)), exchange


def test_a_warp_that_is_not_full_and_lanes_that_have_ended():
    values, found = RNG.integers(-9, 9, 13, np.int32), np.full(13, -99, np.int32)
    call("partial_warp", values, found, threads=13)
    assert np.array_equal(found, np.where(np.arange(13) % 2, values[1::2].sum(), -99))


def test_a_tree_within_warps():
    values, sums = RNG.integers(-9, 9, 64).astype(np.float32), np.full(2, np.nan, np.float32)
    call("warp_tree", values, sums)
    assert np.array_equal(sums, values.reshape(2, 32).sum(axis=1))


def test_dynamic_shared_memory():
    values, found = RNG.normal(size=(3, 70)), np.full((3, 70), np.nan)
    call("reverse", values, found, blocks=3, threads=70, shared=8 * 70)
    assert np.array_equal(found, values[:, ::-1])


def test_atomics():
    values, histogram, extremes = RNG.integers(2, 8, 300, np.int32), np.zeros(9, np.int32), np.full(4, 5, np.int32)
    extremes[2] = 0
    call("count", values, histogram, extremes, blocks=3, threads=100)
    assert np.array_equal(histogram, np.bincount(values, minlength=9))
    assert extremes.tolist() == [max(5, values.max()), min(5, values.min()), 1, 7]


def test_the_block_that_comes_last_sees_the_others():
    values, total = np.arange(10, dtype=np.int32), np.zeros(1, np.int32)
    call("last_block", values, np.zeros(10, np.int32), np.zeros(1, np.int32), total, blocks=5)
    assert total == values.sum()


def test_arithmetic_rounds_as_on_the_device():
    values = np.array([0.5, 1.5, -2.5, 1 + 2**-12, 3e9, -3e9, np.nan, 3e-39], np.float32)
    rounded, found = np.zeros(8, np.int32), np.zeros((8, 4), np.float32)
    call("arithmetic", values, rounded, found, threads=8)
    assert rounded.tolist() == [0, 2, -2, 1, 2**31 - 1, -(2**31), 0, 0]
    exact = values.astype(np.float64)
    # 1 + 2^-12 squared has one bit too many for float32: fma keeps it, the product alone does not.
    assert same_bits(found[:, 0], (exact**2 - 1).astype(np.float32))
    assert same_bits(found[:, 1], values * values - np.float32(1))
    assert found[3, 0] != found[3, 1]
    assert same_bits(found[:, 2], np.float32(1) / values)
    assert same_bits(found[:, 3], np.maximum(values.view(np.int32), 3).view(np.float32))


def test_bytes_of_two_words():
    words, found = RNG.integers(-(2**31), 2**31, 6, np.int32), np.zeros(6, np.int32)
    call("bytes", words, found, threads=3)
    of_pair = words.view(np.uint8).reshape(3, 8)
    chosen = np.stack([of_pair[:, [0, 1, 4, 5]], of_pair[:, [2, 6, 3, 7]]], axis=1)
    assert np.array_equal(found.view(np.uint8), chosen.reshape(-1))


@pytest.mark.parametrize("block", [0, 7, 2**32 - 1, 2**61])
def test_philox_goes_on_where_it_stands(block):
    found = np.full(8, np.nan, np.float32)
    call("random_numbers", found, 2**64 - 3, 2**40 + 1, 4 * block, threads=1)
    words = philox.random_words(2**64 - 3, 2**40 + 1, block, 2)
    assert same_bits(found, words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33))


# --- every kernel, small and ragged, against the oracle -----------------------------------------------------------


def poisoned(*shapes, dtype=np.float32):
    return [np.full(shape, 99 if dtype is np.int8 else np.nan, dtype) for shape in shapes]


def on(backend, stage, inputs, outputs):
    """What a stage leaves in its outputs, given NumPy's arrays; `(codes, steps, size)` are one."""

    def put(values):
        if isinstance(values, tuple):
            return Quantized(put(values[1]), Format(values[2]), codes=put(values[0]))
        if values is None:
            return None
        handle = backend.empty(values.shape, values.dtype if values.dtype == np.int8 else None)
        backend.write(handle, values)
        return handle

    handles = [put(values) for values in (*inputs, *outputs)]
    getattr(backend, stage)(*handles)
    return [backend.read(getattr(handle, "codes", handle)) for handle in handles[len(inputs) :]]


def agree(backend, stage, inputs, outputs, tolerance):
    exact = on(CpuBackend(np.float64), stage, inputs, outputs)
    for value, wanted in zip(on(backend, stage, inputs, outputs), exact, strict=True):
        np.testing.assert_allclose(value.astype(float), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def init_agrees(backend):
    out = backend.empty((7, 9))
    backend.write(out, *poisoned((7, 9)))
    backend.init(out, 3, 1, None, np.arange(9, dtype=np.float32))
    exact = (np.float32(2) * philox.uniform(3, 1, 63).reshape(7, 9) - np.float32(1)) * np.arange(9, dtype=np.float32)
    assert same_bits(backend.read(out), exact)


def stats_agree(backend, tolerance=2**-23):
    agree(backend, "accum_stats", [RNG.normal(size=(127, 37)).astype("f4")], poisoned((37,), (37,)), tolerance)


def atomic_stats_agree(backend):
    stats_agree(backend, table.find("accum_stats", "atomic").tolerance)


def codes_agree(backend):
    for channels, size in ((12, None), (12, 4), (12, 3), (10, None), (10, 5)):  # the first two by vectors
        levels = RNG.integers(-260, 261, (6, channels)).astype("f4") / 2
        steps = RNG.integers(1, 4, (6, Format(size).groups(channels))).astype("f4")
        codes = (*poisoned((6, channels), dtype=np.int8), steps, size)
        agree(backend, "quantize_awq", [levels, np.ones(channels, "f4")], [codes], 0)


def products_agree(backend, multiple):
    codes = RNG.integers(-127, 128, (30, 40), np.int8)
    for size in (None, *(size for size in (5, 8, 32) if size % multiple == 0)):
        inv_s, steps = (RNG.uniform(0.2, 4, shape).astype("f4") for shape in ((40,), (30, Format(size).groups(40))))
        inputs = [RNG.normal(size=(33, 40)).astype("f4"), (codes, steps, size), inv_s]
        agree(backend, "dequantize_tiled", inputs, poisoned((33, 30)), 1e-6)


def relu_agrees(backend):
    for shape, bias in (((5, 7), np.ones(7, "f4")), ((5, 7), None), ((5, 8), None)):  # the last by vectors
        agree(backend, "relu", [RNG.normal(size=shape).astype("f4"), bias], poisoned(shape), 1e-7)


def references_agree(backend):
    inputs = [RNG.normal(size=shape).astype("f4") for shape in ((67, 19), (70, 19))]
    agree(backend, "matmul_reference", inputs, poisoned((67, 70)), 1e-7)


def sums_agree(backend):
    values = [RNG.normal(size=(31, 33)).astype("f4") for _ in range(2)]
    handles = [backend.empty((31, 33)) for _ in values]
    for handle, value in zip(handles, values, strict=True):
        backend.write(handle, value)
    np.testing.assert_allclose(backend.error_sums(*handles), CpuBackend(np.float64).error_sums(*values), rtol=1e-12)


def steps_agree(backend):
    for size in (None, 4, 3, 8):
        codes = (np.zeros((9, 12), np.int8), *poisoned((9, Format(size).groups(12))), size)
        inputs = [RNG.normal(size=(9, 12)).astype("f4"), RNG.uniform(0.2, 4, 12).astype("f4")]
        agree_on_steps(backend, inputs, codes)


def agree_on_steps(backend, inputs, codes):
    form = Format(codes[2])
    found = []
    for each in (backend, CpuBackend()):
        handles = [each.empty(values.shape) for values in (*inputs, codes[1])]
        for handle, values in zip(handles, (*inputs, codes[1]), strict=True):
            each.write(handle, values)
        each.compute_scale_b(*handles[:2], Quantized(handles[2], form, codes=None))
        found.append(each.read(handles[2]))
    assert same_bits(*found)


def search_agrees(size, points, objective=Objective.diag, out_features=21, tokens=13):
    def agrees(backend):
        spec = layer_of(out_features, 132, tokens=tokens)
        chosen = convention(points, size, objective=objective)
        expected = searched(CpuBackend(np.float64), spec, chosen)
        (layer,) = allocate(backend, [spec], chosen).layers
        backend.accum_stats(layer.x, layer.abs_mean, layer.sq_mean)
        for shares in ({}, {"rows_of_block": 512, "channels_of_part": 512}):  # few rows a block and tile, and all
            backend._variants["search_diag"] = [shared(each, shares) for each in table.candidates("search_diag")]
            backend._bound.clear()
            backend.compute_s(layer, chosen)
            np.testing.assert_allclose(backend.read(layer.error), expected[0], rtol=1e-5)
            np.testing.assert_allclose(backend.read(layer.s), expected[1], rtol=2**-23)

    return agrees


def shared(variant, shares):
    """The variant with these of its sizes as given."""
    given = {name: lambda v, value=shares[name]: value for name in shares if name in variant.derived}
    return replace(variant, derived={**variant.derived, **given})


def moves_agree(_backend):
    """Counts that the four accesses in flight divide, and that they do not; what is beyond stays as it was."""
    folder = resource_dir("cuda")
    for count in (4, 64 * 16, 64 * 20 + 4):
        data, out = RNG.normal(size=count).astype("f4"), np.full(count + 4, 9, np.float32)
        for entry, given, wanted in (
            ("bench_read", (data, out), np.full(count, 9)),
            ("bench_copy", (data, out), data),
            ("bench_write", (out,), np.full(count, 2.5)),
        ):
            call(entry, *given, count, blocks=2, threads=32, source=folder / "bench_memory.cu")
            assert np.array_equal(out, [*wanted, 9, 9, 9, 9]), (entry, count)


PRODUCTS = {variant.file: variant for variant in table.variants("dequantizeTiled").values()}
for file in not_run(resource_dir("cuda")):
    PRODUCTS.pop(file, None)
CHECKS = {
    "init.cu": init_agrees,
    "stats.cu": stats_agree,
    "stats.cu atomic": atomic_stats_agree,
    "quantize.cu": codes_agree,
    **{file: partial(products_agree, multiple=variant.group_multiple) for file, variant in PRODUCTS.items()},
    "scale_b.cu": steps_agree,
    "search_rows.cu": search_agrees(None, 11),
    "search_groups.cu": search_agrees(128, 5),
    "search_any.cu": search_agrees(10, 7),
    "search_output.cu": search_agrees(None, 2, Objective.output),
    "search_output_digits.cu": search_agrees(None, 2, Objective.output, 130, 128),
    "search_output_digits_mma.cu": search_agrees(None, 2, Objective.output, 130, 128),
    "relu.cu": relu_agrees,
    "reference.cu references": references_agree,
    "reference.cu sums": sums_agree,
    "bench_memory.cu": moves_agree,
}


def check(kernel, sources=None):
    product = PRODUCTS.get(kernel, table.find("dequantizeTiled"))
    searches = {variant.file: variant.name for variant in table.variants("search_output").values()}
    choices = {"search_output": searches[kernel]} if kernel in searches else {}
    choices |= {"dequantizeTiled": product.name, "accum_stats": "atomic" if "atomic" in kernel else "deterministic"}
    tiles = table.allowed("dequantizeTiled", "TILE").get(product.name, [7])
    with host_backend({"TILE": 7 if 7 in tiles else tiles[0]}, choices, sources) as backend:
        CHECKS[kernel](backend)


@pytest.mark.parametrize("kernel", CHECKS)
def test_kernels_as_they_are_pass(kernel):
    check(kernel)


def test_a_whole_run_agrees_with_the_oracle(compose):
    config = compose("n=35", "tokens=19", "layers=2", "tile=4", "inputs=outliers", "verify=true", "timing=once")
    assert all(np.isfinite(y).all() for y in Kept("host", config).y)


def test_no_kernel_is_left_out():
    checked = {kernel.split()[0] for kernel in CHECKS}
    assert checked | not_run(resource_dir("cuda")).keys() == {
        variant.file for variant in (*table.VARIANTS, *bench_table.VARIANTS)
    }


def test_what_cannot_run_is_told(tmp_path):
    (tmp_path / "tensor.cu").write_text('asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 ...");')
    (tmp_path / "plain.cu").write_text("// no assembly here\n")
    assert not_run(tmp_path) == {"tensor.cu": "it holds PTX (asm)"}


# --- planted faults are seen --------------------------------------------------------------------------------------


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
        "        }\n        " + BARRIER + "    }\n#pragma",
        "        }\n    }\n#pragma",
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


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told(tmp_path, fault):
    kernel, old, new, message = FAULTS[fault]
    planted = plant(resource_dir("cuda") / kernel.split()[0], tmp_path / "cuda", old, new)
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
