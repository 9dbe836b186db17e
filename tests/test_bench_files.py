"""The file of a benchmark: it comes back as it was written, damage is told, and two of them are compared."""

from dataclasses import fields, replace

import h5py
import numpy as np
import pytest
from result_files import editing

from awq_pycuda import analyze
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.results import bench_schema, bench_write
from awq_pycuda.results.bench_reader import read_bench
from awq_pycuda.results.bench_record import BenchRecord, BenchRow
from awq_pycuda.results.bench_write import write_bench

ROOT = {
    **dict.fromkeys(("created", "versions", "git_commit", "kernels_sha256", "options", "flush"), ""),
    **{"backend": "cuda", "device": '{"name": "a GPU"}', "git_dirty": False, "flush_effect": 2.5, "absent": "[]"},
}


def row(us, stage="relu", cache="cold", **changed):
    us = np.array(us, float)
    values = {
        **{
            "case": "kernels",
            "stage": stage,
            "variant": "only",
            "by": "awq_pycuda",
            "cache": cache,
            "unit": "fp32",
            "passes": 1,
        },
        **{"tokens": 8, "out_features": 16, "in_features": 32, "candidates": 5, "group_size": 0},
        **{"read": 512.0, "written": 512.0, "operations": 128.0, "error": 0.0, "tolerance": 1e-6},
        **{"state": "timed", "reason": "", "stopped": "noise", "noise": 0.01, "limit_us": 4.0, "floor_us": 2.0},
        **{"us": us, "late": np.zeros(us.size, bool), "conditions": {}},
    }
    return BenchRow(**values | changed)


RNG = np.random.default_rng(8)
FAILED = {"state": "failed", "reason": "y: 1 of 8 elements unwritten", "error": np.nan, "tolerance": np.nan}
CONDITIONS = {"sm_clock": np.full(9, 1980.0), "throttle_reasons": np.array([0, 1, 4, 8, 2, 0, 0x20, 5, 0], float)}


def record(scale=1.0):
    rows = [
        row(scale * (8 + RNG.random(9)), conditions=CONDITIONS),
        row(7 + RNG.random(12), cache="warm"),
        row([], stage="dequantizeTiled", noise=np.nan, stopped="", **FAILED),
    ]
    return BenchRecord(ROOT, rows)


def written(folder, name, made):
    write_bench(folder / name, made)
    return str(folder / name)


def test_a_benchmark_comes_back_as_it_was_written(tmp_path):
    made = record()
    found = read_bench(written(tmp_path, "a.h5", made) and tmp_path / "a.h5")
    assert {name: found.root[name] for name in ROOT} == ROOT
    for one, other in zip(found.rows, made.rows, strict=True):
        for each in fields(BenchRow):
            if each.name != "conditions":
                np.testing.assert_array_equal(getattr(one, each.name), getattr(other, each.name))
        assert one.conditions.keys() == other.conditions.keys()
        for name, values in one.conditions.items():
            np.testing.assert_array_equal(values, other.conditions[name])


def test_samples_of_a_clock_held_down_are_flagged():
    throttled, unknown, _ = record().rows
    assert throttled.throttled.tolist() == [False, False, True, True, False, False, True, True, False]
    assert not unknown.throttled.any()


def test_shares_of_the_limit():
    assert row([8.0, 8.0]).of_limit == 0.5
    assert row([3.0]).of_limit == 1.0  # what was written may still lie in the cache
    assert np.isnan(row([1.0]).of_limit)
    assert row([1.0]).impossible
    assert not row([2.0]).impossible
    assert np.isnan(row([8.0], limit_us=0.0).of_limit)


def test_every_dataset_says_what_it_is(tmp_path):
    with h5py.File(written(tmp_path, "a.h5", record())) as file:
        for each in bench_schema.TABLE:
            if not each.is_attribute and each.type is not None and each.name != "sha256":
                assert file[each.path].attrs["description"] == each.description
                assert file[each.path].attrs["units"] == each.units
                if not each.is_scale:
                    assert [dimension.keys()[0] for dimension in file[each.path].dims] == list(each.dims)


@pytest.mark.parametrize("name", ["stage", "floor_us"])
def test_what_is_missing_is_told(tmp_path, monkeypatch, name):
    columns = bench_write._columns
    monkeypatch.setattr(bench_write, "_columns", lambda *of: {k: v for k, v in columns(*of).items() if k != name})
    bench_write.write_bench(tmp_path / "a.h5", record())
    with pytest.raises(UnreadableError, match=f"/rows/{name} is missing"):
        read_bench(tmp_path / "a.h5")


def test_a_flipped_byte_is_told(tmp_path):
    path = tmp_path / "a.h5"
    write_bench(path, record())
    image = bytearray(path.read_bytes())
    place = image.index(b"dequantizeTiled")
    image[place] ^= 1
    path.write_bytes(image)
    with pytest.raises(UnreadableError, match="its content and its digest /sha256 disagree"):
        read_bench(path)


def test_a_file_of_version_1_is_read(tmp_path):
    path = tmp_path / "a.h5"
    write_bench(path, record())
    with editing(path) as file:
        del file["rows/passes"]
        file.attrs["schema_version"] = 1
    assert [row.passes for row in read_bench(path).rows] == [1, 1, 1]
    with editing(path) as file:
        file.attrs["schema_version"] = 2
    with pytest.raises(UnreadableError, match="/rows/passes is missing"):
        read_bench(path)


def compare(capsys, *arguments):
    code = analyze.main(["compare", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_benchmark_against_itself_is_the_same(tmp_path, capsys):
    path = written(tmp_path, "a.h5", record())
    code, out, _ = compare(capsys, path, path, "fail_on=slower")
    assert code == 0
    assert "times: 2 same\n" in out
    assert "not compared: A dequantizeTiled only awq_pycuda cold at 16 x 32 x 8: failed: y: 1 of 8" in out


def test_what_became_slower_is_told_with_its_interval(tmp_path, capsys):
    a, b = written(tmp_path, "a.h5", record()), written(tmp_path, "b.h5", record(1.5))
    code, out, _ = compare(capsys, a, b, "fail_on=slower", f"out={tmp_path / 'told'}")
    assert code == 1
    (line,) = (line for line in out.splitlines() if "relu only awq_pycuda cold" in line)
    assert line.split()[-1] == "slower"
    assert (tmp_path / "told" / "compare_times.csv").exists()


def test_what_fails_now_counts(tmp_path, capsys):
    made = record()
    rows = [replace(made.rows[0], us=np.empty(0), late=np.empty(0, bool), conditions={}, **FAILED), made.rows[1]]
    a, b = written(tmp_path, "a.h5", made), written(tmp_path, "b.h5", BenchRecord(ROOT, rows))
    code, out, _ = compare(capsys, a, b, "fail_on=slower")
    assert code == 1
    assert "1 failed in B alone" in out


def test_a_benchmark_is_not_compared_with_something_else(tmp_path, capsys):
    path = written(tmp_path, "a.h5", record())
    (tmp_path / "b.h5").write_bytes(b"nothing")
    code, _, err = compare(capsys, path, tmp_path / "b.h5")
    assert code == 2
    assert err == f"error: {tmp_path / 'b.h5'}: not an HDF5 file; allowed: two benchmarks, or results of runs\n"


def test_benchmarks_that_share_nothing_are_refused(tmp_path, capsys):
    a = written(tmp_path, "a.h5", record())
    b = written(tmp_path, "b.h5", BenchRecord(ROOT, [row([1.0, 2.0], stage="init")]))
    code, _, err = compare(capsys, a, b)
    assert code == 2
    assert err.startswith("error: nothing in B is timed that is timed in A; allowed: two benchmarks that share")
