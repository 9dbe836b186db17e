"""The tool that compares two commits tells every number that differs, and nothing else."""

import sys

import h5py
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "tools"))
import compare_commits


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    work = tmp_path_factory.mktemp("commits")
    compare_commits.write_layers(work / "layers.npz")
    folders = [work / "one", work / "two"]
    for folder in folders:
        assert compare_commits.run(ROOT, ("inputs=file", "inputs.path=layers.npz"), folder, "cpu") == ""
    return [folder / "results.h5" for folder in folders]


def test_two_runs_of_one_state_are_the_same(results):
    assert list(compare_commits.differences(*results)) == []


def test_a_changed_bit_and_a_missing_metric_are_told(results):
    with h5py.File(results[1], "r+") as file:
        file["layers/001/scales/s"][3] *= 1.001
        del file["layers/002/metrics"].attrs["weight_mse"]
    told = ["layers/001/scales/s", "layers/002/metrics@weight_mse (only before)"]
    assert list(compare_commits.differences(*results)) == told


def test_a_run_that_fails_says_why(tmp_path):
    assert compare_commits.run(ROOT, ("n=x",), tmp_path / "bad", "cpu").startswith("error: n=x: allowed: ")
