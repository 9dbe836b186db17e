"""Checksums of result files: a flipped bit is told, and files of version 1, which have none, are read as before."""

import random
import shutil

import h5py
import numpy as np
import pytest
from result_files import editing, make_run, vary
from version_1 import write_version_1

from awq_pycuda import hdf5, results
from awq_pycuda.analysis.reader import UnreadableError, read, read_channels


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("real"), "layers=2", "save=full", "verify=true", "quant.group_size=8")


def everything(path):
    """All that the analysis takes from a file, as text in which NaN equals NaN."""
    result = read(path)
    arrays = [result.gpu_ms, result.host_ms, result.pipeline_ms]
    for layer in result.layers:
        arrays += [layer.gamma, layer.error, *read_channels(path, [layer.index])[0].values()]
    return repr(result), [array.tobytes() for array in arrays]


def test_every_dataset_that_can_have_a_checksum_has_one(real):
    without = {}

    def visit(name, node):
        if isinstance(node, h5py.Dataset) and not node.fletcher32:
            without[name] = node

    with h5py.File(real) as file:
        file.visititems(visit)
        assert set(without) == {"sha256", "timings/stage", "timings/cold_ms"}
        assert without["timings/stage"].dtype == object  # HDF5 has filters neither for such strings
        assert without["sha256"].shape == without["timings/cold_ms"].shape == ()  # nor for scalars


def test_large_datasets_are_in_chunks_that_hdf5_can_hold(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "_CHUNK_BYTES", 100)
    path = make_run(tmp_path, "layers=1", "save=full")
    with h5py.File(path) as file:
        assert file["layers/000/weights/Wq"].chunks == (6, 16)
        assert file["layers/000/stats/abs_mean"].chunks == (16,)
    assert results.read_status(tmp_path) == ("complete", "")
    read_channels(path, [0])


def test_a_flipped_bit_is_told_or_changes_nothing(real, tmp_path):
    draw = random.Random(0).randrange
    whole = real.read_bytes()
    path = tmp_path / "results.h5"
    expected = everything(shutil.copy(real, path))
    told = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw(len(whole))] ^= 1 << draw(8)
        path.write_bytes(damaged)
        try:
            assert everything(path) == expected
        except UnreadableError:
            told += 1
        assert results.read_status(tmp_path) is None
    assert told > 200  # the rest hit what the analysis does not read


@pytest.mark.parametrize(
    "edit",
    [
        lambda file: file["layers/001/metrics"].attrs.modify("output_mse", 1.0),
        lambda file: file["layers/000/stats/abs_mean"].attrs.modify("units", "V"),
        lambda file: file["layers/000/search"].attrs.__setitem__("note", "added"),
        lambda file: file["layers/000"].move("verify", "checked"),
        lambda file: file["timings/cold_ms"].__setitem__((), 1.0),
        lambda file: file["timings/stage"].__setitem__(0, "another"),
        lambda file: file["layers/000/stats/abs_mean"].dims[0].detach_scale(file["layers/000/in_features"]),
    ],
)
def test_a_changed_part_without_a_checksum_of_its_own_is_told(real, tmp_path, edit):
    path = vary(real, tmp_path)
    with h5py.File(path, "r+") as file:
        edit(file)
    with pytest.raises(UnreadableError, match="its content and its digest /sha256 disagree"):
        read(path)
    assert results.read_status(tmp_path) is None


def test_a_file_without_its_digest_is_told(real, tmp_path):
    path = vary(real, tmp_path)
    with h5py.File(path, "r+") as file:
        del file["sha256"]
    with pytest.raises(UnreadableError, match="/sha256 is missing"):
        read(path)
    assert results.read_status(tmp_path) is None


def test_a_digest_of_another_kind_is_told(real, tmp_path):
    path = vary(real, tmp_path)
    with h5py.File(path, "r+") as file:
        del file["sha256"]
        file["sha256"] = np.zeros(64, "i1")
        del file["timings/cold_ms"]
    with pytest.raises(UnreadableError, match="disagree"):
        read(path)
    with h5py.File(path, "r+") as file:
        del file["sha256"]
        file.create_group("sha256")
    with pytest.raises(UnreadableError, match="/sha256 is not a digest"):
        read(path)


def test_files_of_version_1_are_read(tmp_path):
    path = write_version_1(tmp_path)
    result = read(path)
    assert result.root["schema_version"] == 1
    assert [layer.gamma.tolist() for layer in result.layers] == [[0.0, 0.5]]
    assert read_channels(path, [0])[0]["s"].shape == (4,)
    assert results.read_status(tmp_path) == ("complete", "")
    assert results.load(path)["layers/000/weights"]["Wq"].shape == (4, 4)


def test_a_study_of_version_1_goes_on(cli, tmp_path):
    sweep = ("-m", "n=16", "layers=1", "backend=cpu", "seed=0,1", "study=old")
    assert cli(*sweep)[0] == 0
    for path in tmp_path.rglob("results.h5"):
        with editing(path) as file:
            file.attrs["schema_version"] = 1
        with h5py.File(path, "r+") as file:
            del file["sha256"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("results.h5")}
    code, out, _ = cli(*sweep)
    assert code == 0
    assert "2 skipped" in out
    assert {path: path.read_bytes() for path in tmp_path.rglob("results.h5")} == before


def test_the_digest_can_be_made_anew(real, tmp_path):
    path = vary(real, tmp_path)
    with h5py.File(path, "r+", driver="core", backing_store=False) as file:
        file.attrs["backend"] = "other"
        image = b"".join(hdf5.sealed_image(file))
    path.write_bytes(image)
    assert read(path).root["backend"] == "other"
