"""`load`: one file as a tree, several as a dataset, and clear words for what is neither."""

import h5py
import numpy as np
import pytest
import xarray as xr
from result_files import make_run, vary

from awq_pycuda.analysis.collect import collect
from awq_pycuda.analysis.load import load
from awq_pycuda.errors import InputError


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("real"), "save=full", "quant.group_size=8")


def test_one_file_is_the_tree_that_it_is(real):
    for path in (real, str(real)):
        tree = load(path)
        assert isinstance(tree, xr.DataTree)
        assert tree.attrs["status"] == "complete"
        assert tree["timings/host_ms"].dims == ("layer", "stage", "repeat")
        assert tree["timings/host_ms"].attrs["units"] == "ms"
        assert tree["layers/001/scales/scale_b"].dims == ("out_features", "group")
        assert tree["layers/002/stats/abs_mean"].attrs["description"] == "mean of |x| over the tokens"
        with h5py.File(real, "r+") as file:  # nothing holds the file any more
            assert np.array_equal(tree["layers/000/weights/Wq"], file["layers/000/weights/Wq"][()])


@pytest.mark.parametrize("asked", [["quant.bits=3", "quant.group_size=5"], ["quant=nvfp4"], ["quant.symmetric=false"]])
def test_codes_are_unpacked_as_their_format_says(asked, tmp_path):
    path = make_run(tmp_path, "save=full", *asked, "layers=1", "backend=cpu")
    tree = load(path)
    layer = tree["layers/000"]
    assert "Wq_packed" not in layer["weights"]
    codes = layer["weights/Wq"]
    assert (codes.dtype, codes.dims, codes.attrs["units"]) == (np.int8, ("out_features", "in_features"), "1")
    largest = {"quant.bits=3": 3, "quant=nvfp4": 12, "quant.symmetric=false": 127}[asked[0]]
    assert codes.values.max() == largest
    assert ("zero_point" in layer["scales"]) == ("quant.symmetric=false" in asked)
    # What the codes stand for is close to the weights that the run's seed gives.
    assert float(layer["metrics"].attrs["output_sqnr_db"]) > 10


def test_several_are_a_dataset_with_a_dimension_run(real, tmp_path):
    vary(real, tmp_path / "0", {"tile": 8, "threads": None})
    make_run(tmp_path / "1", "layers=2", "gammas=[0,0.3]", "timing.repeats=2", "tile=16", "threads=1")
    vary(real, tmp_path / "2", status="failed", error="RuntimeError: no")
    runs = load(tmp_path)
    assert dict(runs.sizes) == {"run": 3, "layer": 3, "gamma": 6, "repeat": 3, "stage": 6}
    assert runs["run"].values.tolist() == ["0", "1", "2"]
    assert runs["stage"].values.tolist()[:2] == ["accum_stats", "compute_s"]
    assert runs["tile"].values.tolist() == [8, 16, 16]
    assert np.array_equal(runs["threads"], [np.nan, 1, np.nan], equal_nan=True)
    assert runs["status"].values.tolist() == ["complete", "complete", "failed"]
    with h5py.File(tmp_path / "1/results.h5") as file:
        own = runs.sel(run="1")
        assert np.array_equal(own["host_ms"][:2, :, :2], file["timings/host_ms"])
        assert np.array_equal(own["pipeline_ms"][:2], file["timings/pipeline_ms"])
        assert own["cold_ms"] == file["timings/cold_ms"][()]
        assert own["output_mse"][1] == file["layers/001/metrics"].attrs["output_mse"]
        assert own["search_error"].sel(layer=1, gamma=0.3) == file["layers/001/search/error"][1]
    assert own["output_mse"].isnull().values.tolist() == [False, False, True]
    assert own["search_error"].sel(gamma=0.25).isnull().all()
    assert own["host_ms"][:, :, 2].isnull().all()
    assert runs["gpu_ms"].isnull().all()
    missing = [name for name, array in runs.items() if array.dtype != object and "units" not in array.attrs]
    assert missing == ["tokens", "in_features", "out_features"]


def test_files_and_folders_can_be_mixed(real, tmp_path):
    vary(real, tmp_path / "a/0")
    vary(real, tmp_path / "b")
    assert load([tmp_path / "a", str(tmp_path / "b/results.h5")]).sizes["run"] == 2
    assert load([tmp_path / "b/results.h5"]).sizes["run"] == 1


def test_what_is_left_out_is_named_in_a_warning(real, tmp_path):
    vary(real, tmp_path / "0")
    (tmp_path / "damaged.h5").write_bytes(real.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"left out: .*damaged\.h5: damaged HDF5 file: ") as caught:
        assert load(tmp_path).sizes["run"] == 1
    assert caught[0].filename == __file__


def test_what_is_no_result_is_an_input_error(real, tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("text")
    for path, why in (
        (text, "not an HDF5 file"),
        (tmp_path / "gone", "No such file or directory"),
        ([text], "no result that can be read; left out: .*text.h5: not an HDF5 file"),
        ([], "nothing given"),
    ):
        with pytest.raises(InputError, match=rf"{why}.*; allowed: a result file of awq_pycuda, or a folder"):
            load(path)


def test_damage_that_only_the_tree_meets(real, tmp_path):
    """The weights are in no table, so collect takes the file; the tree cannot."""
    path = vary(real, tmp_path)
    with h5py.File(path) as file:
        start = file["layers/000/weights/Wq"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[start] ^= 1
    path.write_bytes(content)
    assert len(collect([path]).runs) == 1
    with pytest.raises(InputError, match="damaged HDF5 file: "):
        load(path)
