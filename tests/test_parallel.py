"""Blocks over threads: what they compute, that the number of threads changes no bit, and how many there are."""

import gc
import json
import math
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from conftest import same_bits

from awq_pycuda import parallel
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.engine import execution
from awq_pycuda.engine.execution import execute
from awq_pycuda.parallel import LARGEST_BLOCK, cpu_quota, host_threads, map_row_blocks, product, use_threads


@pytest.mark.parametrize("threads", [1, 2])
def test_the_caller_s_error_state_holds_in_every_thread(threads):
    huge = np.full((4, LARGEST_BLOCK), 3e38, np.float32)

    def doubled(block):
        return np.isinf(huge[block] * np.float32(2)).all()

    with use_threads(threads):
        with np.errstate(over="ignore"):
            assert map_row_blocks(doubled, huge.shape) == [True] * 4
        with np.errstate(over="raise"), pytest.raises(FloatingPointError):
            map_row_blocks(doubled, huge.shape)


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

    with use_threads(2), pytest.raises(ValueError, match="planted"):
        map_row_blocks(work, held.shape)
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
    with use_threads(3):
        product(x, w, out)
    assert np.array_equal(out, x @ w.T)  # small whole numbers: exact in any order


@pytest.mark.parametrize(("m", "n", "k"), [(512, 512, 300), (70, 1000, 129), (1000, 70, 129)])
def test_threads_do_not_change_a_bit_of_a_product(m, n, k):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((rows, k), np.float32) for rows in (m, n))
    outs = [np.empty((m, n), np.float32) for _ in range(4)]
    for out, threads in zip(outs, (1, 2, 5, None), strict=True):
        with use_threads(threads):
            product(x, w, out)
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


def blas_threads():
    """Of NumPy's own: other libraries may bring theirs."""
    return {library["num_threads"] for library in parallel._blas().info()}


@pytest.fixture
def blas_of_3():
    """A BLAS that has 3 threads by itself, whatever the machine."""
    with parallel._blas().limit(limits=3):
        assert blas_threads() == {3}
        yield


def test_the_blas_has_one_thread_during_a_run(compose, tmp_path, monkeypatch, blas_of_3):
    seen = set()
    matmul = CpuBackend.matmul_reference

    def spy(self, *arguments):
        seen.update(blas_threads())
        matmul(self, *arguments)

    monkeypatch.setattr(CpuBackend, "matmul_reference", spy)
    execute(compose("backend=cpu", "n=16", "layers=1", "timing=once", "threads=4"), tmp_path)
    assert seen == {1}
    assert blas_threads() == {3}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_run_works_on_as_many_threads_as_it_is_given(compose, tmp_path, monkeypatch, threads):
    """One after another in one process, as the jobs of a sweep are; the estimate of memory counts the same number."""
    told, at_work, most = set(), set(), []
    all_at_once, met = threading.Barrier(threads), set()
    map_blocks, required = parallel._map_blocks, execution.required_bytes

    def spy(work, rows, size):
        def seen(block):
            thread = threading.get_ident()
            at_work.add(thread)
            most.append(len(at_work))
            told.add(host_threads())
            if rows >= threads and len(met) < threads and thread not in met:
                all_at_once.wait(10)
                met.add(thread)
            result = work(block)
            at_work.remove(thread)
            return result

        return map_blocks(seen, rows, max(1, rows // 12))

    def estimating(*of_run):
        told.add(host_threads())
        return required(*of_run)

    monkeypatch.setattr(parallel, "_map_blocks", spy)
    monkeypatch.setattr(execution, "required_bytes", estimating)
    before = host_threads()
    execute(compose("backend=cpu", "n=600", "timing=once", "inputs=outliers", f"threads={threads}"), tmp_path)
    assert told == {threads}
    assert max(most) == len(met) == threads
    assert (met == {threading.get_ident()}) == (threads == 1)
    assert host_threads() == before
    with h5py.File(tmp_path / "results.h5") as file:
        assert json.loads(file.attrs["device"])["threads"] == threads


def test_a_setting_ends_with_its_block_and_reaches_no_other_thread(blas_of_3):
    free = host_threads()

    def elsewhere():
        with ThreadPoolExecutor(1) as other:
            return other.submit(host_threads).result()

    with use_threads(free + 2):
        with use_threads(free + 5):
            assert map_row_blocks(lambda block: host_threads(), (64, LARGEST_BLOCK)) == [free + 5] * 64
            assert elsewhere() == free
        with use_threads(None):
            assert host_threads() == free
        with pytest.raises(ValueError, match="planted"), use_threads(free + 5):
            raise ValueError("planted")
        assert host_threads() == free + 2
        assert blas_threads() == {1}
    assert host_threads() == free
    assert blas_threads() == {3}


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
    with use_threads(7):
        assert host_threads() == 7
