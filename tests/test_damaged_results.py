"""Damaged, partial and foreign files: each is named with its reason, and none stops the analysis."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from result_files import TABLES, edited, real

from awq_pycuda.analysis.collect import collect


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


def claim_a_terabyte(name, **options):
    def edit(file):
        group = file["timings"]
        if name in group:
            del group[name]
        group.create_dataset(name, (2**40,), "f8", **options)

    return edit


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
        (put("/", "schema_version", 3), "schema_version 3 is newer than 2, which this version reads"),
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
        (replace("layers/000/search", 1.0), "damaged HDF5 file: "),
        (replace("timings/host_ms", np.ones((3, 6, 2))), "/timings/host_ms has shape (3, 6, 2), not (3, 6, 3)"),
        (replace("timings/stage", np.arange(6)), "/timings/stage holds no text"),
        (replace("timings/stage", ["a"] * 6), "/timings/stage names one twice"),
        (replace("timings/layer", [0, 0, 1]), "/timings/layer names one twice"),
        (claim_a_terabyte("pipeline_ms"), "/timings/pipeline_ms claims the shape (1099511627776,)"),
        (claim_a_terabyte("pipeline_ms", chunks=(1024,)), "/timings/pipeline_ms claims the shape (1099511627776,)"),
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


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_no_damage_is_fatal(real, tmp_path_factory, data):
    """Bytes overwritten anywhere, mostly in runs: a file is read or named, and the tables can be written."""
    damaged = bytearray(real.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(damaged) - 1))
        replaced = data.draw(st.binary(min_size=1, max_size=24))
        damaged[start : start + len(replaced)] = replaced
    path = tmp_path_factory.getbasetemp() / "damaged.h5"
    path.write_bytes(damaged)
    found = collect([path])
    assert len(found.runs) + len(found.left_out) == 1
    for table in TABLES:
        getattr(found, table).to_parquet(path.with_suffix(".parquet"))
