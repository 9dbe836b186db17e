"""Which files an analysis reads, and by what short names they go."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from awq_pycuda.results import evaluation_schema, schema

SUFFIXES = (".h5", ".hdf5")  # what is read of a folder
_FILE_NAMES = (schema.FILE_NAME, evaluation_schema.FILE_NAME)  # what each folder's file is called tells nothing


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that was not read, and why, in one line."""

    path: Path
    reason: str


def find_files(paths: Sequence[Path], left_out: list[LeftOut]) -> list[Path]:
    """Every file to read, each once, in natural order; what cannot be looked at is added to `left_out`."""
    candidates: list[Path] = []
    for given in paths:
        if not os.path.isdir(given):
            candidates.append(given)
            continue
        before = len(left_out)
        below = list(_walk(given, left_out))
        candidates += below
        if not below and len(left_out) == before:
            left_out.append(LeftOut(given, f"no file that ends in {' or '.join(SUFFIXES)} in this folder"))
    found: dict[str, Path] = {}
    for path in sorted(candidates, key=lambda path: natural(str(path))):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            left_out.append(LeftOut(path, "its path is not UTF-8, so that no table can name it"))
        else:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _walk(folder: Path, left_out: list[LeftOut]) -> Iterator[Path]:
    """Files below a folder that may be results. Linked folders are followed, but none is entered twice."""
    entered: set[str] = set()

    def refused(error: OSError) -> None:
        left_out.append(LeftOut(Path(error.filename), error.strerror or str(error)))

    for here, folders, files in os.walk(folder, followlinks=True, onerror=refused):
        real = os.path.realpath(here)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if name.endswith(SUFFIXES):
                left_out.append(LeftOut(Path(here, name), "a folder, not a file"))
        yield from (Path(here, name) for name in files if name.endswith(SUFFIXES) and not name.startswith("."))


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key that puts 2.h5 before 10.h5."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def run_names(paths: Sequence[Path]) -> list[str]:
    """A short unique name for each file: the fewest last parts of its folder that no other has, hashes cut to 8 digits.

    results.h5 and evaluation.h5 are no part of it; any other file name is. The names depend on the set of files alone.
    """
    parts = []
    for path in paths:
        whole = Path(os.path.abspath(path))
        stem = whole.with_suffix("") if whole.suffix in SUFFIXES else whole
        named = whole.parent if whole.name in _FILE_NAMES else stem
        parts.append([re.sub(r"^([0-9a-f]{8})[0-9a-f]{4,}$", r"\1", part) for part in named.parts[1:]])
    suffixes = [["/".join(own[-count:]) for count in range(1, len(own) + 1)] for own in parts]
    taken = Counter(suffix for own in suffixes for suffix in own)
    return [
        next((suffix for suffix in own if taken[suffix] == 1), str(path))
        for own, path in zip(suffixes, paths, strict=True)
    ]
