"""Files whose data lie elsewhere, or nowhere: refused by name, as layer files and as results, before they are read."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from result_files import make_run
from version_1 import write_version_1

from awq_pycuda import hdf5
from awq_pycuda.analysis.collect import collect
from awq_pycuda.analysis.load import load
from awq_pycuda.errors import InputError
from awq_pycuda.layers.files import describe_layers, load_layers
from awq_pycuda.results.status import read_status


def external_link(file, name):
    file[name] = h5py.ExternalLink("other.h5", "/layers/000/weight")


def external_group(file, name):
    file[name] = h5py.ExternalLink("other.h5", "/layers")


def external_storage(file, name):
    file.create_dataset(name, (4, 4), "f4", external=[("weights.bin", 0, 64)])


def pipe_as_storage(file, name):
    os.mkfifo(Path(file.filename).with_name("pipe"))
    file.create_dataset(name, (4, 4), "f4", external=[("pipe", 0, 64)])


def virtual(file, name):
    layout = h5py.VirtualLayout((4, 4), "f4")
    layout[...] = h5py.VirtualSource("other.h5", "/layers/000/weight", (4, 4))
    file.create_virtual_dataset(name, layout)


def virtual_of_itself(file, name):
    layout = h5py.VirtualLayout((4, 4), "f4", maxshape=(None, 4))
    layout[...] = h5py.VirtualSource(".", name, (4, 4), maxshape=(None, 4))
    file.create_virtual_dataset(name, layout)


KINDS = {
    external_link: "is an external link",
    external_group: "is an external link",
    external_storage: "has its data in external storage",
    pipe_as_storage: "has its data in external storage",
    virtual: "is a virtual dataset",
    virtual_of_itself: "is a virtual dataset",
}
PLACES = ("layers/000/weight", "layers/000/bias", "layers", "other", "far/below/other")


@pytest.fixture
def folder(tmp_path):
    """A folder with a whole layer file, and one more that others may point to."""
    for name in ("layers.h5", "other.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            file["layers/000/weight"] = np.full((4, 4), 2, "f4")
    (tmp_path / "weights.bin").write_bytes(bytes(64))
    return tmp_path


def refusal(path):
    with pytest.raises(InputError) as caught:
        load_layers(path)
    with pytest.raises(InputError) as described:
        describe_layers(path)
    assert str(described.value) == str(caught.value)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_file_with_data_elsewhere(folder, kind, place):
    with h5py.File(folder / "layers.h5", "r+") as file:
        if place in file:
            del file[place]
        kind(file, place)
    expected = f"/{place} {KINDS[kind]}; allowed is a file that holds all of its data itself"
    assert refusal(folder / "layers.h5") == f"inputs.path={folder / 'layers.h5'}: {expected}"


@pytest.mark.parametrize("place", ["layers/000/stats/abs_mean", "layers/000/stats", "timings/stage", "other"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [1, 2])
def test_a_result_with_data_elsewhere(folder, real, version, kind, place):
    path = folder / "results.h5"
    path.write_bytes(real[version])
    with h5py.File(path, "r+") as file:
        if place in file:
            del file[place]
        kind(file, place)
    found = collect([path])
    assert [each.reason for each in found.left_out] == [f"damaged HDF5 file: /{place} {KINDS[kind]}"]
    assert read_status(folder) is None
    with pytest.raises(InputError, match=KINDS[kind]):
        load(path)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    return {1: write_version_1(folder / "1").read_bytes(), 2: make_run(folder / "2", "layers=1").read_bytes()}


def test_a_soft_link_through_an_external_one(folder):
    with h5py.File(folder / "layers.h5", "r+") as file:
        del file["layers/000/weight"]
        file["elsewhere"] = h5py.ExternalLink("other.h5", "/")
        file["layers/000/weight"] = h5py.SoftLink("/elsewhere/layers/000/weight")
        assert file["layers/000/weight"].shape == (4, 4)
    assert "/elsewhere is an external link" in refusal(folder / "layers.h5")


def test_a_link_of_a_user_defined_type(folder):
    with h5py.File(folder / "layers.h5", "r+") as file:
        external_link(file, "layers/000/bias")
    content = bytearray((folder / "layers.h5").read_bytes())
    name = content.index(b"\x04bias")
    assert content[name - 1] == 64  # the type of an external link; those from 65 on are for programs to define
    content[name - 1] = 65
    (folder / "layers.h5").write_bytes(content)
    assert "/layers/000/bias is a link of a user-defined type" in refusal(folder / "layers.h5")


def test_links_within_the_file_are_fine(folder):
    with h5py.File(folder / "layers.h5", "r+") as file:
        file["layers/001/weight"] = h5py.SoftLink("/layers/000/weight")
        file["layers/002/weight"] = file["layers/000/weight"]
        file["stored"] = h5py.SoftLink("/layers")
        file["circle/root"] = file["/"]
        file["circle/self"] = file["circle"]
        file["type"] = np.dtype("f4")
    assert [layer.weight[0, 0] for layer in load_layers(folder / "layers.h5")] == [2, 2, 2]


def test_a_linked_file_is_fine(folder):
    (folder / "link.h5").symlink_to("layers.h5")
    assert len(load_layers(folder / "link.h5")) == 1


def test_more_links_than_any_file_has(folder, monkeypatch):
    monkeypatch.setattr(hdf5, "_MOST_LINKS", 50)
    with h5py.File(folder / "layers.h5", "r+") as file:
        for index in range(48):
            file.create_group(f"many/{index}")
    assert "more than 50 links" in refusal(folder / "layers.h5")


def test_groups_within_groups_without_end(folder):
    with h5py.File(folder / "layers.h5", "r+") as file:
        file.create_group("/".join("a" * 5000))
    assert "groups within groups, more than 32 deep" in refusal(folder / "layers.h5")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "has the shape (4, 4), but no data are stored"),
        ({"fillvalue": 1.0}, "has the shape (4, 4), but no data are stored"),
        ({"chunks": (2, 4), "fletcher32": True}, "has the shape (4, 4), but 0 of 2 chunks are stored"),
    ],
)
def test_a_dataset_that_was_never_written(folder, options, why):
    with h5py.File(folder / "layers.h5", "r+") as file:
        file.create_dataset("layers/001/weight", (4, 4), "f4", **options)
    assert len(describe_layers(folder / "layers.h5")) == 2
    assert len(load_layers(folder / "layers.h5", layers=1)) == 1
    with pytest.raises(InputError, match="allowed is a file that holds") as caught:
        load_layers(folder / "layers.h5")
    assert f"/layers/001/weight {why}" in str(caught.value)


def test_a_dataset_that_was_written_in_part(folder):
    with h5py.File(folder / "layers.h5", "r+") as file:
        file.create_dataset("layers/001/weight", (5, 4), "f4", chunks=(2, 4), compression="gzip")[:4] = 1
    with pytest.raises(InputError, match=r"has the shape \(5, 4\), but 2 of 3 chunks are stored"):
        load_layers(folder / "layers.h5")


def test_a_weight_that_claims_exabytes_takes_none(folder):
    with h5py.File(folder / "layers.h5", "r+") as file:
        file.create_dataset("layers/001/weight", (2**60, 4), "f4", chunks=(2**20, 4))
    with pytest.raises(InputError, match="but 0 of 1,099,511,627,776 chunks are stored"):
        load_layers(folder / "layers.h5")
