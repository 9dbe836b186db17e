"""Checksums of result files: a flipped bit is told, and files of version 1, which have none, are read as before."""

import random
import shutil

import h5py
import numpy as np
import pytest
from result_files import editing, make_run, vary
from version_1 import write_version_1
from version_2 import write_version_2

from awq_pycuda import hdf5
from awq_pycuda.analysis.load import load
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.results import filled, schema
from awq_pycuda.results.files import read_files
from awq_pycuda.results.reader import read, read_channels
from awq_pycuda.results.status import read_status


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
        assert set(without) == {"sha256", "timings/stage", "timings/cold_ms", "timings/launched"}
        assert without.pop("timings/stage").dtype == object  # HDF5 has filters neither for such strings
        assert {node.shape for node in without.values()} == {()}  # nor for scalars


def test_large_datasets_are_in_chunks_that_hdf5_can_hold(monkeypatch, tmp_path):
    monkeypatch.setattr(filled, "_CHUNK_BYTES", 100)
    path = make_run(tmp_path, "layers=1", "save=full")
    with h5py.File(path) as file:
        assert file["layers/000/weights/Wq"].chunks == (6, 16)
        assert file["layers/000/stats/abs_mean"].chunks == (16,)
    assert read_status(tmp_path) == ("complete", "")
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
        assert read_status(tmp_path) is None
    assert told > 200  # the rest hit what the analysis does not read


def damage(whole, path, random):
    """Truncated, overwritten, or with a part that another program has removed, resized or changed."""
    content = bytearray(whole)
    place, size = random.randrange(len(content)), random.choice([1, 8, 512, 4096])
    kind = random.choice(["truncated", "zeros", "noise", "removed", "resized", "attribute"])
    if kind == "truncated":
        del content[place:]
    elif kind in ("zeros", "noise"):
        content[place : place + size] = bytes(size) if kind == "zeros" else random.randbytes(size)
    path.write_bytes(content)
    if kind in ("truncated", "zeros", "noise"):
        return
    with h5py.File(path, "r+") as file:
        names = []
        file.visit(names.append)
        if kind == "removed":
            del file[random.choice(names)]
        elif kind == "resized":
            name = random.choice([name for name in names if isinstance(file[name], h5py.Dataset)])
            dtype = file[name].dtype
            del file[name]
            file.create_dataset(name, random.choice([(), (0,), (3,), (2**27,), (2**40,)]), dtype)
        else:
            attributes = file[random.choice([name for name in names if file[name].attrs])].attrs
            name = random.choice(list(attributes))
            del attributes[name]
            if random.random() < 0.7:
                attributes[name] = random.choice([-1, 0.5, "text", float("nan"), np.zeros(3)])


def test_zeros_over_a_dataset_and_its_checksum_are_told(real, tmp_path):
    """The checksum of zeros is 0."""
    path = vary(real, tmp_path)
    with h5py.File(path) as file:
        chunk = file["layers/000/stats/abs_mean"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    with h5py.File(path) as file:
        assert not file["layers/000/stats/abs_mean"][()].any()
    with pytest.raises(UnreadableError, match="disagree"):
        read(path)
    assert read_status(tmp_path) is None


def test_no_damage_is_read_as_other_numbers(real, tmp_path):
    whole = real.read_bytes()
    draw = random.Random(0)
    paths = [tmp_path / f"{index}.h5" for index in range(300)]
    for path in paths:
        damage(whole, path, draw)
    outcomes = dict(zip(paths, read_files(paths), strict=True))
    readable = [path for path, outcome in outcomes.items() if not isinstance(outcome, str)]
    assert len(readable) < 30
    expected = everything(real)
    for path in readable:
        assert everything(path)[1] == expected[1]
        assert everything(path)[0].replace(str(path), str(real)) == expected[0]


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
    assert read_status(tmp_path) is None


def test_a_file_without_its_digest_is_told(real, tmp_path):
    path = vary(real, tmp_path)
    with h5py.File(path, "r+") as file:
        del file["sha256"]
    with pytest.raises(UnreadableError, match="/sha256 is missing"):
        read(path)
    assert read_status(tmp_path) is None


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
    assert read_status(tmp_path) == ("complete", "")
    assert load(path)["layers/000/weights"]["Wq"].shape == (4, 4)


def test_files_of_version_2_from_before_its_table_are_read(tmp_path):
    path = write_version_2(tmp_path / "complete", "complete")
    (layer,) = read(path).layers
    assert (layer.gamma.tolist(), layer.gamma_chosen, layer.objective) == ([0.0, 0.5], 0.5, "diag")
    assert layer.error.tolist() == pytest.approx([5.78692092e-04, 6.80283418e-05], rel=1e-8)
    assert set(layer.metrics) == {entry.name for entry in schema.metrics() if entry.since <= 2}
    assert read(path).pipeline_ms.tolist() == pytest.approx([0.282209])
    assert read_status(path.parent) == ("complete", "")
    tree = load(path)["layers/000"]
    assert (tree["scales"]["scale_b"].dims, tree["weights"]["Wq"].shape) == (("out_features", "group"), (4, 4))
    assert tree["verify"].attrs["codes_off_tie_tolerance"] == 0
    path = write_version_2(tmp_path / "failed", "failed")
    result = read(path)
    assert [(layer.name, len(layer.metrics)) for layer in result.layers] == [("block.0", 7)]
    assert (result.timed_layers, result.gpu_ms.shape) == ([0, 1], (2, 6, 0))
    assert read_status(path.parent) == ("failed", result.root["error"])
    assert str(result.root["error"]).startswith("FloatingPointError: layer 1 (block.1): the activations of")


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
