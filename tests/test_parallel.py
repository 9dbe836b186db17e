"""Blocks over threads: what they compute, that the number of threads changes no bit, and how many there are."""

import gc
import math
import os
import threading
import time
import weakref

import h5py
import numpy as np
import pytest
from conftest import same_bits
from threadpoolctl import threadpool_info, threadpool_limits

from awq_pycuda import parallel
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.engine.execution import execute
from awq_pycuda.parallel import LARGEST_BLOCK, cpu_quota, host_threads, map_row_blocks, product


@pytest.mark.parametrize("threads", [1, 2])
def test_the_caller_s_error_state_holds_in_every_thread(threads):
    huge = np.full((4, LARGEST_BLOCK), 3e38, np.float32)

    def doubled(block):
        return np.isinf(huge[block] * np.float32(2)).all()

    with np.errstate(over="ignore"):
        assert map_row_blocks(doubled, huge.shape, threads) == [True] * 4
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        map_row_blocks(doubled, huge.shape, threads)


def test_after_an_error_no_thread_works_on_or_holds_an_array():
    running, begun, over = threading.Event(), [], []
    held = np.ones((8, LARGEST_BLOCK), np.uint8)
    alive = weakref.ref(held)

    def work(block, array=held):
        if block.start == 0:
            running.wait(10)
            raise ValueError("planted")
        begun.append(block)
        running.set()
        time.sleep(0.2)
        over.append(int(array[block].size))

    with pytest.raises(ValueError, match="planted"):
        map_row_blocks(work, held.shape, threads=2)
    assert len(over) == len(begun) < 7  # those at work had ended, and the others never began
    del work, held
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 300, 7), (300, 1, 7), (65, 129, 33), (700, 90, 11), (90, 700, 11), (5000, 3, 2)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_product_in_blocks_is_the_product(m, n, k, dtype):
    x, w = (np.arange(rows * k, dtype=dtype).reshape(rows, k) % 7 - 3 for rows in (m, n))
    out = np.full((m, n), np.nan, dtype)
    product(x, w, out, threads=3)
    assert np.array_equal(out, x @ w.T)  # small whole numbers: exact in any order


@pytest.mark.parametrize(("m", "n", "k"), [(512, 512, 300), (70, 1000, 129), (1000, 70, 129)])
def test_threads_do_not_change_a_bit_of_a_product(m, n, k):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((rows, k), np.float32) for rows in (m, n))
    with threadpool_limits(1, "blas"):
        outs = [np.empty((m, n), np.float32) for _ in range(4)]
        for out, threads in zip(outs, (1, 2, 5, None), strict=True):
            product(x, w, out, threads)
    assert all(same_bits(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("overrides", [(), ("search=output", "inputs=outliers", "gamma_grid=awq20")])
def test_threads_do_not_change_a_bit_of_a_run(compose, tmp_path, overrides):
    found = []
    for threads in ("1", "3", "null"):
        config = compose(
            "backend=cpu", "n=300", "layers=2", "timing=once", "save=full", f"threads={threads}", *overrides
        )
        found.append({})
        with h5py.File(execute(config, tmp_path / threads)) as file:

            def keep(name, node, kept=found[-1]):
                kept[name] = {key: str(value) for key, value in node.attrs.items() if "checksum" not in key}
                if isinstance(node, h5py.Dataset) and "DIMENSION_LIST" not in name:
                    kept[name] = node[()].tobytes()

            file["layers"].visititems(keep)
    assert len(found[0]) > 20
    assert found[0] == found[1] == found[2]


def test_the_blas_has_one_thread_during_a_run(compose, tmp_path, monkeypatch):
    seen = []
    matmul = CpuBackend.matmul_reference

    def spy(self, *arguments):
        seen.extend(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
        matmul(self, *arguments)

    monkeypatch.setattr(CpuBackend, "matmul_reference", spy)
    execute(compose("backend=cpu", "n=16", "layers=1", "timing=once", "threads=4"), tmp_path)
    assert set(seen) == {1}


GROUPS = [
    ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n", "cpu.max": "400000 100000"}, 0.5),
    ("0::/not/mounted/here\n", {"cpu.max": "300000 100000\n"}, 3.0),
    ("0::/\n", {}, None),
    ("0::/\n", {"cpu.max": "damaged"}, None),
    (
        "1:name=systemd:/x\n4:cpu,cpuacct:/x\n",
        {"cpu/x/cpu.cfs_quota_us": "200000", "cpu/x/cpu.cfs_period_us": "1"},
        2e5,
    ),
    ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ("1:cpuset:/x\n", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, None),
]


@pytest.mark.parametrize(("membership", "files", "quota"), GROUPS)
def test_the_quota_is_the_smallest_of_the_groups(tmp_path, membership, files, quota):
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "cgroup").write_text(membership)
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "mount") == quota


def test_a_machine_without_control_groups_has_no_quota(tmp_path):
    assert cpu_quota(tmp_path / "cgroup", tmp_path) is None


@pytest.mark.parametrize("quota", [None, 0.2, 1.0, 1.5, 1e6])
def test_threads_are_the_cores_that_are_to_be_had(monkeypatch, quota):
    monkeypatch.setattr(parallel, "cpu_quota", lambda membership, mount: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(3), raising=False)
    assert host_threads() == (3 if quota is None else min(3, math.ceil(quota)))
    assert host_threads(7) == 7
