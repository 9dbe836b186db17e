"""Result files for notebooks: one as the tree that it is, several as one dataset with a dimension `run`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from awq_pycuda.analysis.collect import Collection, by_gamma, collect
from awq_pycuda.analysis.derived import DERIVED
from awq_pycuda.choices import Element
from awq_pycuda.errors import InputError
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.hdf5_worker import ask
from awq_pycuda.quant.format import Format
from awq_pycuda.results import schema
from awq_pycuda.results.files import read_any
from awq_pycuda.results.reader import ResultFile

_ALLOWED = "allowed: a result file of awq_pycuda, or a folder that holds some"
# What the variables of a Dataset hold, by their names there.
_DESCRIBED = {
    **{each.name: each for each in (*schema.metrics(), *DERIVED)},
    **{
        name: schema.entry(f"{schema.LAYER}/search/@{name}")
        for name in ("chosen", "gamma_chosen", "error_chosen", "error_rtn", "chosen_by_max")
    },
    "search_error": schema.entry(f"{schema.LAYER}/search/error"),
    **{name: schema.entry(f"{schema.TIMINGS}/{name}") for name in ("gpu_ms", "host_ms", "pipeline_ms", "cold_ms")},
}


def load(paths: Path | str | Sequence[Path | str]) -> xr.DataTree | xr.Dataset:
    """Results for a notebook, wholly in memory.

    Args:
        paths: a result file, or an evaluation's; or a folder, or several files and folders, as
            `python -m awq_pycuda.analyze` takes them.

    Returns:
        Of one file a DataTree, laid out as the file (docs/results.md, docs/evaluation.md), Wq unpacked. Of a folder or
        several paths a Dataset with the dimension `run`: metrics (run, layer), `search_error` (run, layer, gamma),
        `gpu_ms` and `host_ms` (run, layer, stage, repeat), `pipeline_ms` (run, repeat), with status, device and every
        config key as coordinates of `run`. NaN where a run has no such layer, gamma or repeat. Both keep units and
        descriptions.

    Raises:
        InputError: the one file is no result, or there is no result among several. Others that cannot be read are
            left out with a warning that names them.
    """
    if isinstance(paths, str | os.PathLike) and not os.path.isdir(paths):
        return _load_file(Path(paths))
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    collection = collect([Path(path) for path in several])
    left_out = [f"{each.path}: {each.reason}" for each in collection.left_out]
    left_out += [f"{each.path}: an evaluation, to be given alone" for each in collection.evaluations]
    if collection.runs.empty:
        raise InputError(f"no result that can be read; left out: {'; '.join(left_out) or 'nothing given'}; {_ALLOWED}")
    if left_out:
        warnings.warn(f"left out: {'; '.join(left_out)}", stacklevel=2)
    return _combine(collection)


def _load_file(path: Path) -> xr.DataTree:
    (answer,) = ask([(_read_tree, path)])
    if isinstance(answer, UnreadableError):
        raise InputError(f"{path}: {answer}; {_ALLOWED}")
    assert isinstance(answer, xr.DataTree)
    return answer


def _read_tree(path: Path) -> xr.DataTree:
    """The whole file, in a worker.

    Raises:
        UnreadableError: it is no result, or damaged, be it in a part that the tables do not need.
    """
    found = read_any(path)
    try:
        form = _stored_format(found.config if isinstance(found, ResultFile) else {})  # an evaluation has no codes
        with xr.open_datatree(path, engine="h5netcdf") as tree:
            tree.load()
        for layer in tree["layers"].children.values() if "layers" in tree.children else ():
            if "weights" in layer.children and "Wq_packed" in layer["weights"]:
                packed = layer["weights"].variables["Wq_packed"]
                codes = form.unpack(packed.values, layer.sizes["in_features"])
                layer["weights"]["Wq"] = xr.DataArray(codes, dims=("out_features", "in_features"), attrs=packed.attrs)
                del layer["weights"]["Wq_packed"]
        return tree
    except Exception as error:  # HDF5 may raise anything
        raise UnreadableError(f"damaged HDF5 file: {' '.join(str(error).split())}") from None


def _stored_format(config: Mapping[str, Any]) -> Format:
    """As much of the run's format as tells how its codes are stored; files before version 5 have int8 alone."""
    return Format(bits=config.get("quant.bits", 8), element=Element[config.get("quant.element", Element.int.name)])


def _combine(collection: Collection) -> xr.Dataset:
    runs = collection.runs.set_index("run")
    own = [name for name in collection.layers.columns if name not in runs.columns and not name.startswith("ms.")]
    layers = collection.layers[own].set_index(["run", "layer"])
    parts = {name: _array(layers[name]) for name in layers.columns}
    parts["search_error"] = _array(_by(by_gamma(collection.curves), "run", "layer", "gamma")["error"])
    parts["pipeline_ms"] = _array(_by(collection.passes, "run", "repeat")["pipeline_ms"])
    for clock in ("gpu", "host"):
        samples = collection.timings[collection.timings["clock"] == clock].drop(columns="clock")
        parts[f"{clock}_ms"] = _array(_by(samples, "run", "layer", "stage", "repeat")["ms"])
    dataset = xr.Dataset(parts)
    names = runs.index.to_numpy(dtype=object)
    dataset = dataset.reindex(run=names, stage=list(dict.fromkeys(collection.timings["stage"])))
    dataset["cold_ms"] = ("run", runs["cold_ms"].to_numpy())
    of_run = runs.drop(columns=["pipeline_ms", "cold_ms", "config"])
    dataset = dataset.assign_coords({name: ("run", _plain(of_run[name])) for name in of_run.columns})
    for name, entry in _DESCRIBED.items():
        dataset[name].attrs = {"units": entry.units, "description": entry.description}
    return dataset


def _by(table: pd.DataFrame, *dimensions: str) -> pd.DataFrame:
    return table.set_index(list(dimensions))


def _array(column: pd.Series) -> xr.DataArray:
    plain = pd.Series(_plain(column), index=column.index)
    return xr.DataArray.from_series(plain)


def _plain(column: pd.Series) -> NDArray[Any]:
    """A column as NumPy knows it: numbers with NaN for what is missing, anything else as objects."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return np.asarray(column.to_numpy(dtype=np.float64, na_value=np.nan) if column.hasnans else column)
    return np.asarray(column.to_numpy(dtype=object, na_value=None))
