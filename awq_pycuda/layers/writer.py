"""Writes layer files in HDF5, the form that `awq_pycuda.layers.files` reads."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from awq_pycuda.layers.sources import SHARED, UNREACHED
from awq_pycuda.temporary import replacing


class LayerWriter:
    """Writes a layer file in HDF5, tensor by tensor, so that a model is never held twice.

    A context manager. The file stands under a temporary name in its own folder until the block ends; then it is
    flushed, fsynced and renamed, with its layers numbered from 000 in the order in which they were added. An exception
    in the block leaves nothing. Raises OSError where the folder cannot be written or has no room.
    """

    def __init__(self, path: Path, dtype: type[np.floating[Any]] = np.float32) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self._next_id = 0
        # Insertion order is file order; the value counts the rows of activations written so far.
        self._rows: dict[str, int] = {}
        self._shares: dict[str, str] = {}  # whose activations a layer sees, too

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(self._path))
            # HDF5's own lock would meet the one by which others see that this process is alive.
            self._file = stack.enter_context(h5py.File(temporary, "w", locking=False))
            self._file.create_group("layers")
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with self._open:
                for layer_id, other in list(self._shares.items()):
                    if self._rows[layer_id] != self._rows[other]:
                        self._own(layer_id)
                self._number_layers()
        else:
            self._open.__exit__(kind, error, trace)

    def add(self, name: str, weight: NDArray[Any], bias: NDArray[Any] | None = None, tokens: int | None = 0) -> str:
        """Add a layer and make room for its activations; its id is returned.

        ``weight`` is (out_features, in_features), ``bias`` (out_features,), of any floating dtype; ``tokens`` rows of
        activations have to follow by `append`, none where it is 0. None: as many as follow; a layer that gets none at
        all is marked as one that no token reached, by the attribute ``unreached``.
        """
        layer_id = f"new-{self._next_id}"
        self._next_id += 1
        group = self._file["layers"].create_group(layer_id)
        group.attrs["name"] = name
        self._dataset(group, "weight", weight.shape, ("out_features", "in_features"), "weights")[...] = weight
        if bias is not None:
            self._dataset(group, "bias", bias.shape, ("out_features",), "bias of the outputs")[...] = bias
        if tokens is None:
            group.attrs[UNREACHED] = True
        elif tokens:
            self._activations(group, (tokens, weight.shape[1]))
        self._rows[layer_id] = 0
        return layer_id

    def append(self, layer_id: str, rows: NDArray[Any], same_as: str | None = None) -> None:
        """Write the next rows, (rows, in_features), of a layer's activations.

        ``same_as`` is the layer, if any, whose last rows were the very same. Layers of which that holds from the first
        row to the last have one copy in the file, and the attribute ``activations_of`` says whose it is.
        """
        start = self._rows[layer_id]
        self._rows[layer_id] = start + len(rows)
        group = self._file["layers"][layer_id]
        if same_as is not None and self._may_share(layer_id, same_as, start):
            if layer_id not in self._shares:
                self._shares[layer_id] = same_as
                group.attrs.pop(UNREACHED, None)
                group.pop("activations", None)
            return
        if layer_id in self._shares:
            self._own(layer_id, start)
        if UNREACHED in group.attrs:
            del group.attrs[UNREACHED]
            self._activations(group, (0, rows.shape[1]), maxshape=(None, rows.shape[1]))
        if group["activations"].maxshape[0] is None:
            group["activations"].resize(start + len(rows), axis=0)
        group["activations"][start : start + len(rows)] = rows

    def _may_share(self, layer_id: str, other: str, start: int) -> bool:
        """Whether a layer that saw another's last rows has seen all of that one's, and nothing else."""
        known = self._shares.get(layer_id, other if start == 0 else None)
        return known == other and other not in self._shares and self._rows[layer_id] == self._rows[other]

    def _own(self, layer_id: str, rows: int | None = None) -> None:
        """Gives a layer that shares its activations a copy of its own, of those that it has seen."""
        seen = self._rows[layer_id] if rows is None else rows
        layers = self._file["layers"]
        given = layers[self._shares.pop(layer_id)]["activations"]
        size = given.shape[1]
        self._activations(layers[layer_id], (seen, size), maxshape=(None, size))
        layers[layer_id]["activations"][...] = given[:seen]

    def rows(self, layer_id: str) -> int:
        """Rows of activations written so far."""
        return self._rows[layer_id]

    def remove(self, layer_id: str) -> None:
        """Take a layer back."""
        for follower, other in list(self._shares.items()):
            if other == layer_id:
                self._own(follower)
        self._shares.pop(layer_id, None)
        del self._file["layers"][layer_id]
        del self._rows[layer_id]

    def set_attributes(self, attributes: Mapping[str, str | int]) -> None:
        """Note where the layers come from, as attributes of the file."""
        self._file.attrs.update(attributes)

    def set_text(self, name: str, text: str, description: str) -> None:
        """Keep a text of any length as a dataset of the file, in the bytes of UTF-8: attributes have 64 KB at most."""
        dataset = self._file.create_dataset(name, data=np.frombuffer(text.encode(), np.uint8))
        dataset.attrs["description"] = description

    def _activations(self, group: Any, shape: tuple[int, int], maxshape: tuple[int | None, int] | None = None) -> None:
        self._dataset(group, "activations", shape, ("tokens", "in_features"), "inputs of the layer", maxshape=maxshape)

    def _dataset(
        self, group: Any, name: str, shape: tuple[int, ...], dims: tuple[str, ...], description: str, **options: Any
    ) -> Any:
        dataset = group.create_dataset(name, shape, self._dtype, **options)
        dataset.attrs["description"] = description
        dataset.attrs["units"] = "1"
        for dimension, label in zip(dataset.dims, dims, strict=True):
            dimension.label = label
        return dataset

    def _number_layers(self) -> None:
        # Names sort as strings, so they are padded; how wide is known only now.
        width = max(3, len(str(len(self._rows) - 1)))
        names = {layer_id: f"{index:0{width}}" for index, layer_id in enumerate(self._rows)}
        for layer_id, name in names.items():
            self._file["layers"].move(layer_id, name)
            if layer_id in self._shares:
                self._file["layers"][name].attrs[SHARED] = names[self._shares[layer_id]]
