"""The file of an evaluation: it comes back as it was written, damage is told, and other tools read it."""

from dataclasses import fields, is_dataclass

import h5py
import numpy as np
import pytest
import xarray
from evaluation_records import ROOT, evaluation
from result_files import editing

from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.results import evaluation_schema as schema
from awq_pycuda.results.evaluation_reader import read_evaluation
from awq_pycuda.results.evaluation_write import write_evaluation


def same(one, other):
    """Whether two records hold the same, field by field, NaN beside NaN."""
    assert type(one) is type(other)
    for each in fields(one):
        if each.name in ("root", "recipes"):
            continue
        left, right = getattr(one, each.name), getattr(other, each.name)
        if is_dataclass(left):
            same(left, right)
        else:
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("alone", [False, True])
def test_an_evaluation_comes_back_as_it_was_written(tmp_path, alone):
    made = evaluation(alone=alone)
    write_evaluation(tmp_path / "evaluation.h5", made)
    found = read_evaluation(tmp_path / "evaluation.h5")
    assert {name: found.root[name] for name in ROOT} == ROOT
    assert (found.alone is not None) == alone
    same(found, made)
    for one, other in zip(found.recipes, made.recipes, strict=True):
        same(one, other)


def test_every_dataset_says_what_it_is(tmp_path):
    write_evaluation(tmp_path / "evaluation.h5", evaluation(alone=True))
    with h5py.File(tmp_path / "evaluation.h5") as file:
        for each in schema.TABLE:
            if not each.is_attribute and each.type is not None and each.name != "sha256":
                assert file[each.path].attrs["description"] == each.description
                assert file[each.path].attrs["units"] == each.units
                if not each.is_scale:
                    assert [dimension.keys()[0] for dimension in file[each.path].dims] == list(each.dims)


def test_xarray_reads_it_without_this_package(tmp_path):
    write_evaluation(tmp_path / "evaluation.h5", evaluation())
    with xarray.open_dataset(tmp_path / "evaluation.h5", engine="h5netcdf", group="tokens") as tokens:
        assert dict(tokens.sizes) == {"recipe": 3, "token": 9}
        assert tokens.kl.dims == ("recipe", "token")
        assert float(tokens.kl[0].max()) == 0.0 < float(tokens.kl[1].min())


def test_damage_is_told(tmp_path):
    path = tmp_path / "evaluation.h5"
    write_evaluation(path, evaluation())
    image = bytearray(path.read_bytes())
    image[image.index(b"layers.0.q_proj")] ^= 1
    (tmp_path / "flipped.h5").write_bytes(image)
    with pytest.raises(UnreadableError, match="its content and its digest /sha256 disagree"):
        read_evaluation(tmp_path / "flipped.h5")
    with editing(path) as file:
        del file["recipes/kl"]
    with pytest.raises(UnreadableError, match="/recipes/kl is missing"):
        read_evaluation(path)


def test_what_does_not_fit_together_is_told(tmp_path):
    path = tmp_path / "evaluation.h5"
    write_evaluation(path, evaluation(alone=True))
    with editing(path) as file:
        file["alone"].attrs["recipe"] = 3
    with pytest.raises(UnreadableError, match="/alone: its recipe 3 is none of 3"):
        read_evaluation(path)
    with editing(path) as file:
        file["alone"].attrs["recipe"] = 1
        file["windows/tokens"][...] = [2, 4, 3]
    with pytest.raises(UnreadableError, match="/tokens/of_window and /windows/tokens disagree"):
        read_evaluation(path)
    with editing(path) as file:
        del file["layers/gamma"]
        file["layers/gamma"] = np.zeros((2, 2))
    with pytest.raises(UnreadableError, match=r"/layers/gamma has the shape \(2, 2\), and not that of recipe, layer"):
        read_evaluation(path)
