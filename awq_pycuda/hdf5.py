"""HDF5 files that others wrote: all of their data within the file itself, and damage told by a digest.

HDF5 follows external links, external storage and virtual datasets on its own, into any file of the machine. A digest of
the outer file then says nothing of what was read, and some of them crash or hang the library. So every link is looked
at before anything is opened through it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5z

DIGEST = "sha256"  # dataset of the root
_DIGITS = 64
_CHECKSUM = 4  # bytes of fletcher32
_MOST_LINKS = 100_000
_MOST_DEPTH = 32
_BLOCK = 1 << 20


class UnreadableError(Exception):
    """A file that cannot be used as what it was read for; the message is the reason, in one line."""


@dataclass(frozen=True)
class Dataset:
    """A dataset of an open file: h5py's low-level object, and how it is stored."""

    id: Any
    chunks: tuple[int, ...] | None
    """Shape of its chunks; None where it has none."""
    has_checksum: bool


Objects = Mapping[str, Any]
"""By path, each once: groups and named types as h5py's low-level objects, datasets as `Dataset`."""


class RefusedError(Exception):
    """The file is not to be read any further; the message says where and why, in one line."""


def objects(file: Any) -> Objects:
    """Every group, dataset and named type of an open file.

    Args:
        file: h5py's low-level file.

    Raises:
        RefusedError: data outside the file (external links, external storage, virtual datasets, links of a
            user-defined type), or more links or levels than any file of this project has.
    """
    root = h5g.open(file, b"/")
    found: dict[str, Any] = {"/": root}
    entered = {h5o.get_info(root).addr}
    left = [("", root)]
    count = 0
    while left:
        path, group = left.pop()
        links: list[tuple[bytes, int, int]] = []

        def take(name: bytes, info: Any, links: list[tuple[bytes, int, int]] = links) -> bool | None:
            links.append((name, info.type, info.u))
            return len(links) > _MOST_LINKS or None  # anything but None ends the iteration

        group.links.iterate(take, info=True)
        count += len(links)
        if count > _MOST_LINKS:
            raise RefusedError(f"more than {_MOST_LINKS:,} links")
        for name, kind, address in links:
            where = f"{path}/{_text(name)}"
            # A soft link names a path of this file, whose links are all looked at.
            if kind == h5l.TYPE_SOFT:
                continue
            if kind != h5l.TYPE_HARD:
                what = "an external link" if kind == h5l.TYPE_EXTERNAL else "a link of a user-defined type"
                raise RefusedError(f"{where} is {what}")
            if address in entered:  # a second link to the same object, such as one to a group above
                continue
            entered.add(address)
            child = h5o.open(group, name)
            found[where] = dataset(child, where) if isinstance(child, h5d.DatasetID) else child
            if isinstance(child, h5g.GroupID):
                if where.count("/") > _MOST_DEPTH:
                    raise RefusedError(f"groups within groups, more than {_MOST_DEPTH} deep")
                left.append((where, child))
    return found


def dataset(opened: Any, where: str) -> Dataset:
    """How a dataset is stored, of h5py's low-level object.

    Raises:
        RefusedError: its data are in other files, or in other datasets.
    """
    stored = opened.get_create_plist()
    layout = stored.get_layout()
    if layout == h5d.VIRTUAL:
        raise RefusedError(f"{where} is a virtual dataset")
    if stored.get_external_count():
        raise RefusedError(f"{where} has its data in external storage")
    if layout != h5d.CHUNKED:
        return Dataset(opened, None, False)
    return Dataset(opened, stored.get_chunk(), stored.get_filter_by_id(h5z.FILTER_FLETCHER32) is not None)


def check_stored(dataset: Dataset, shape: tuple[int, ...], where: str) -> None:
    """Refuses a dataset with less data than its shape says: HDF5 would make up the rest.

    Raises:
        RefusedError: it has no data, or chunks are missing.
    """
    if not shape or 0 in shape:
        return
    if dataset.chunks is not None:
        expected = math.prod(-(-size // chunk) for size, chunk in zip(shape, dataset.chunks, strict=True))
        stored = dataset.id.get_num_chunks()
        if stored < expected:
            raise RefusedError(f"{where} has the shape {shape}, but {stored:,} of {expected:,} chunks are stored")
    elif dataset.id.get_storage_size() == 0:
        raise RefusedError(f"{where} has the shape {shape}, but no data are stored")


def sealed_image(file: h5py.File) -> list[bytes | memoryview]:
    """The bytes of a file that is open with the core driver, in pieces, with the digest of what no checksum covers.

    It becomes the dataset `/sha256` (64 hexadecimal digits): SHA-256 over all bytes but its own and the data of
    datasets with fletcher32. So it covers all attributes, names, types and shapes, the checksums, and the values of
    datasets that cannot have one: scalars, and strings of variable length. It can be compared without reading these.
    """
    if DIGEST not in file:
        # Contiguous, so that its bytes stand alone: neither HDF5's checksums over metadata nor a heap hold them.
        own = file.create_dataset(DIGEST, data=np.bytes_(b"0" * _DIGITS))
        own.attrs["units"] = "1"
        own.attrs["description"] = "SHA-256 of all bytes but these and what datasets with fletcher32 hold"
    file.flush()
    found = objects(file.id)
    image = file.id.get_file_image()
    place = _own_place(found)
    digest = hashlib.sha256()
    for begin, end in _uncovered(found, place, len(image)):
        digest.update(memoryview(image)[begin:end])
    return [memoryview(image)[: place[0]], digest.hexdigest().encode(), memoryview(image)[place[1] :]]


def checked_objects(file: Any, stream: BinaryIO) -> Objects:
    """`objects` of a file, which is held to its digest if it has one: `/sha256` is then among them.

    Args:
        file: h5py's low-level file.
        stream: its bytes.

    Raises:
        RefusedError: as `objects` does, or the file and its digest disagree.
    """
    found = objects(file)
    if f"/{DIGEST}" in found:
        _check_digest(stream, found)
    return found


def _text(name: bytes) -> str:
    """A link's name for messages of one line."""
    text = name.decode(errors="backslashreplace")
    return text if text.isprintable() else ascii(text)[1:-1]


def _check_digest(stream: BinaryIO, found: Objects) -> None:
    own = _own_place(found)
    stream.seek(own[0])
    told = stream.read(_DIGITS)
    digest = hashlib.sha256()
    for begin, end in _uncovered(found, own, stream.seek(0, os.SEEK_END)):
        stream.seek(begin)
        while begin < end:
            digest.update(stream.read(min(end - begin, _BLOCK)))
            begin += _BLOCK
    if digest.hexdigest().encode() != told:
        raise RefusedError(f"its content and its digest /{DIGEST} disagree")


def _own_place(found: Objects) -> tuple[int, int]:
    """Begin and end of the digest's own bytes."""
    own = found[f"/{DIGEST}"]
    begin = own.id.get_offset() if isinstance(own, Dataset) else None
    if begin is None or own.id.get_storage_size() != _DIGITS:
        raise RefusedError(f"/{DIGEST} is not a digest")
    return begin, begin + _DIGITS


def _uncovered(found: Objects, own: tuple[int, int], size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each stretch of the file that neither is the digest nor has a checksum."""
    position = 0
    for begin, end in sorted([own, *_checked(found.values())]):
        if begin > position:
            yield position, min(begin, size)
        position = max(position, end)
    if position < size:
        yield position, size


def _checked(found: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """Begin and end of the data of every chunk that has a checksum.

    The checksum itself, its last 4 bytes, is not among them: that of zeros is 0, so zeros over both would agree.
    """
    for each in found:
        if isinstance(each, Dataset) and each.has_checksum:
            for index in range(each.id.get_num_chunks()):
                chunk = each.id.get_chunk_info(index)
                if chunk.filter_mask == 0:
                    yield chunk.byte_offset, chunk.byte_offset + chunk.size - _CHECKSUM
