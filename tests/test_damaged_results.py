"""Damaged, partial and foreign files: each is named with its reason, and none stops the analysis."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from result_files import TABLES, edited, real
from version_1 import write_version_1

from awq_pycuda.analysis.collect import collect
from awq_pycuda.results import schema


def reason(path):
    """The one reason for which this path is left out."""
    found = collect([path])
    assert found.runs.empty
    (left_out,) = found.left_out
    assert left_out.path == path
    assert len(left_out.reason.splitlines()) == 1
    return left_out.reason


def drop(name):
    return lambda file: file.__delitem__(name)


def claim(name, size, **options):
    """A dataset that says its size, and holds nothing."""

    def edit(file):
        del file[name]
        file.create_dataset(name, (size,), "f8", **options)

    return edit


def group_for(file, name):
    del file[name]
    file.create_group(name)


def put(location, name, value):
    def edit(file):
        del file[location].attrs[name]
        file[location].attrs[name] = value

    return edit


def replace(name, values):
    def edit(file):
        del file[name]
        file[name] = values

    return edit


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (put("/", "schema_version", 99), f"schema_version 99 is newer than {schema.VERSION}, which this version reads"),
        (put("/", "schema_version", 0), "schema_version 0 is unknown"),
        (put("/", "schema_version", "one"), "/: attribute schema_version is 'one', not a whole number"),
        (put("/", "schema", "other"), "an HDF5 file, but no result of awq_pycuda"),
        (lambda file: file.attrs.clear(), "an HDF5 file, but no result of awq_pycuda"),
        (put("/", "status", "running"), "status is 'running'"),
        (put("/", "status", 1), "/: attribute status is 1, not text"),
        (put("/", "config", "a: ["), "/: attribute config cannot be parsed"),
        (put("/", "config", "&a {b: *a}"), "damaged HDF5 file: maximum recursion depth"),
        (put("/", "device", "cpu"), "/: attribute device cannot be parsed"),
        (put("/", "created", [1.0, 2.0]), "/: attribute created is missing"),
        (put("/", "backend", b"\xff"), "damaged HDF5 file: 'utf-8' codec"),
        (drop("timings"), "/timings is missing"),
        (drop("layers"), "complete, but it holds 0 of 3 layers"),
        (drop("layers/001"), "complete, but it holds 2 of 3 layers"),
        (drop("layers/001/search"), "/layers/001/search is missing"),
        (drop("layers/001/search/gamma"), "/layers/001/search/gamma is missing"),
        (drop("layers/001/metrics"), "/layers/001/metrics is missing"),
        (lambda file: file["layers/000/metrics"].attrs.clear(), "attribute output_mse is missing"),
        (put("layers/000", "tokens", 1.5), "/layers/000: attribute tokens is 1.5, not a whole number"),
        (put("layers/000", "name", 3), "/layers/000: attribute name is 3, not text"),
        (put("layers/000/search", "error_rtn", "low"), "attribute error_rtn is 'low', not a number"),
        (replace("layers/000/search/error", [1.0]), "3 gammas, but 1 errors"),
        (replace("layers/000/search/error", "text"), "/layers/000/search/error has 0 dimensions, not 1"),
        (replace("layers/000/search/error", ["a", "b", "c"]), "/layers/000/search/error holds no numbers"),
        (replace("layers/000/search", 1.0), "/layers/000/search is no group"),
        (lambda file: group_for(file, "layers/000/search/gamma"), "/layers/000/search/gamma is no dataset"),
        (drop("layers/001/stats/abs_mean"), "/layers/001/stats/abs_mean is missing"),
        (drop("layers/001/scales"), "/layers/001/scales is missing"),
        (drop("layers/001/scales/scale_b"), "/layers/001/scales/scale_b is missing"),
        (lambda file: file["layers/002/metrics"].attrs.__delitem__("weight_mse"), "attribute weight_mse is missing"),
        (put("/", "git_dirty", 1), "/: attribute git_dirty is 1, not a truth value"),
        (replace("layers/001/scales/s", np.ones(31)), "/layers/001: abs_mean, sq_mean, s, abs_max differ in length"),
        (put("layers/002", "in_features", 31), "/layers/002: 31 in_features, but 32 scales"),
        (
            claim("layers/000/stats/abs_mean", 2**27),
            "/layers/000/stats/abs_mean has the shape (134217728,), but no data",
        ),
        (
            claim("layers/000/scales/s", 2**27, chunks=(2**20,)),
            "/layers/000/scales/s has the shape (134217728,), but 0 of 128 chunks are stored",
        ),
        (claim("timings/pipeline_ms", 3, fillvalue=1.0), "/timings/pipeline_ms has the shape (3,), but no data"),
        (replace("timings/host_ms", np.ones((3, 6, 2))), "/timings/host_ms has shape (3, 6, 2), not (3, 6, 3)"),
        (replace("timings/stage", np.arange(6)), "/timings/stage holds no text"),
        (replace("timings/stage", ["a"] * 6), "/timings/stage names one twice"),
        (replace("timings/layer", [0, 0, 1]), "/timings/layer names one twice"),
        (claim("timings/pipeline_ms", 2**40), "/timings/pipeline_ms claims the shape (1099511627776,)"),
        (claim("timings/pipeline_ms", 2**40, chunks=(1024,)), "/timings/pipeline_ms claims the shape (1099511627776,)"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_what_is_wrong(real, tmp_path, edit, expected):
    assert expected in reason(edited(real, tmp_path, edit))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty file"),
        (b"\0" * 5000, "not an HDF5 file"),
        (b"plain text\n", "not an HDF5 file"),
        (b"\x89HDF", "not"),
    ],
)
def test_files_of_another_kind(tmp_path, content, expected):
    (tmp_path / "results.h5").write_bytes(content)
    assert expected in reason(tmp_path / "results.h5")


def test_a_truncated_file_is_named_wherever_it_ends(real, tmp_path):
    whole = real.read_bytes()
    paths = []
    for size in [*range(0, len(whole), 311), len(whole) - 1]:
        paths.append(tmp_path / f"{size}.h5")
        paths[-1].write_bytes(whole[:size])
    found = collect([tmp_path])
    assert found.runs.empty
    assert {left_out.path for left_out in found.left_out} == set(paths)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.parametrize("version", [1, 2])
def test_no_damage_is_fatal(real, tmp_path_factory, version, data):
    """Bytes overwritten anywhere, mostly in runs: a file is read or named, and the tables can be written."""
    folder = tmp_path_factory.getbasetemp()
    damaged = bytearray((real if version == 2 else write_version_1(folder / "whole")).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(damaged) - 1))
        replaced = data.draw(st.binary(min_size=1, max_size=24))
        damaged[start : start + len(replaced)] = replaced
    path = folder / "damaged.h5"
    path.write_bytes(damaged)
    found = collect([path])
    assert len(found.runs) + len(found.left_out) == 1
    for table in TABLES:
        getattr(found, table).to_parquet(path.with_suffix(".parquet"))
