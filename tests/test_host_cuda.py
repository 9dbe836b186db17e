"""What stands for the GPU where there is none: what it gives to kernels, and that every kernel is right on it."""

import numpy as np
import pytest
from conftest import same_bits
from host_cuda.build import not_run
from kernel_checks import CHECKS, RNG, call, check
from test_pipeline import Kept

from awq_pycuda import philox
from awq_pycuda.kernels import bench_table, table
from awq_pycuda.paths import resource_dir

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
