"""Activations that stay in their HDF5 file: their rows are read when they are asked for, and not kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any
from weakref import ref

import h5py
import numpy as np
from h5py import h5d, h5p
from numpy.typing import NDArray

from awq_pycuda.errors import InputError

Array = NDArray[np.float32]

_SLOTS = 100_003  # chunks that a cache can find: a prime, of which a row has far fewer


def file_stamp(path: Path) -> tuple[int, ...]:
    """What changes with a file's content; empty where there is none.

    Size and time of change alone would not do: a program can set the time back. It cannot set that of the inode.
    """
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_rows(dataset: Any, rows: range) -> Array:
    """Rows of an open dataset as a new float32 array."""
    array = np.empty((len(rows), *dataset.shape[1:]), np.float32)
    dataset.read_direct(array, np.s_[rows.start : rows.stop : rows.step])
    return array


class StoredFile:
    """A layer file that is read now and then, and has to stay as it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = file_stamp(path)
        self._reader: Callable[[], _Reader | None] = lambda: None

    def reader(self) -> _Reader:
        """The same for all who hold it; the file is closed when nobody does any more."""
        reader = self._reader()
        if reader is None:
            reader = _Reader(self)
            self._reader = ref(reader)
        return reader


class _Reader:
    """Reads a file; one dataset of it is open at a time."""

    def __init__(self, file: StoredFile) -> None:
        self._stored = file
        self._file: Any = None
        self._dataset: Any = None
        self._where = ""

    def read(self, where: str, rows: range, cache_bytes: int) -> Array:
        """Rows of one of its datasets, as a new float32 array.

        Args:
            where: the dataset's path in the file.
            rows: increasing.
            cache_bytes: for chunks of it that hold rows of two readings: they are decompressed once.

        Raises:
            InputError: the file has changed.
        """
        path = self._stored.path
        if file_stamp(path) != self._stored.stamp:
            raise InputError(f"inputs.path={path}: it changed while a run was reading it")
        if self._file is None:
            self._file = h5py.File(path, "r")
        if self._where != where:
            access = h5p.create(h5p.DATASET_ACCESS)
            # HDF5's own 0.75: with 1.0 it lets go of no chunk of which only some rows are read.
            access.set_chunk_cache(_SLOTS, cache_bytes, 0.75)
            self._dataset, self._where = h5py.Dataset(h5d.open(self._file.id, where.encode(), access)), where
        return read_rows(self._dataset, rows)


class StoredRows:
    """Rows of a (rows, columns) dataset, for what takes those of an array by slices.

    Attributes:
        shape: of these rows.
        whole: how many rows that has which they are a part of, see `part`.
        cache_bytes: what is kept of the file's chunks while they are read.
    """

    def __init__(self, file: StoredFile, where: str, dataset: Any) -> None:
        rows, columns = dataset.shape
        self._file, self._where, self._rows = file, where, range(rows)
        self.shape = (rows, columns)
        self.whole = rows
        # The chunks that have a row between them. Those of the next rows are often the same.
        of_chunk = dataset.chunks or (0, 1)
        across = math.ceil(columns / of_chunk[1]) * of_chunk[1]
        self.cache_bytes: int = of_chunk[0] * across * dataset.dtype.itemsize
        self._read: Array | None = None
        self._reader: _Reader | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice) -> Array:
        """Reads these rows, as a new array."""
        reader = self._reader or self._file.reader()
        return reader.read(self._where, self._rows[rows], self.cache_bytes)

    def opened(self) -> StoredRows:
        """The same rows; the file stays open for as long as they, or parts of them, are held."""
        found = copy(self)
        found._reader = self._file.reader()
        return found

    def alone(self, rows: slice) -> StoredRows:
        """These rows, as all that there are."""
        found = copy(self)
        found._rows = self._rows[rows]
        found.shape = (len(found._rows), self.shape[1])
        found.whole = len(found._rows)
        found._read = None
        return found

    def part(self, rows: slice) -> StoredRows:
        """These rows, as a part of all of them."""
        found = self.alone(rows)
        found.whole = self.whole
        return found

    def loaded(self) -> Array:
        """All of these rows, read when they are first asked for, and kept from then on."""
        if self._read is None:
            self._read = self[:]
        return self._read
