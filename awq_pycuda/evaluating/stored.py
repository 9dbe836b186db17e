"""Result files as recipes: complete runs that are there already, such as those of a study."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from awq_pycuda.config import Config
from awq_pycuda.config_text import from_yaml
from awq_pycuda.errors import InputError
from awq_pycuda.results.files import read_files
from awq_pycuda.results.reader import LayerRecord, ResultFile
from awq_pycuda.results.schema import FILE_NAME

_OF_STUDY = re.compile(r"[0-9a-f]{16}")  # how a sweep calls the folders of its jobs


@dataclass(frozen=True)
class Stored:
    """A complete run's file.

    Attributes:
        path: of the file.
        name: what it may be called.
        config: of the run, `config_yaml` as it stands in the file, `config_hash` its hash there.
        inputs_sha256: of the layer file, "" where the file does not say.
        layers: its layers, all finished.
    """

    path: Path
    name: str
    config: Config
    config_yaml: str
    config_hash: str
    inputs_sha256: str
    layers: Sequence[LayerRecord]


def find_stored(path: Path) -> list[Stored]:
    """The complete runs of a result file or below a folder, by their paths; those that failed are passed over.

    Raises:
        InputError: a file that cannot be read, in one line.
    """
    paths = sorted(path.rglob(FILE_NAME)) if path.is_dir() else [path]
    complete: list[ResultFile] = []
    for each, answer in zip(paths, read_files(paths), strict=True):
        if not isinstance(answer, ResultFile):
            why = answer if isinstance(answer, str) else "is an evaluation"
            raise InputError(f"recipes={each}: {why}; allowed: result files of awq_pycuda")
        if answer.root["status"] == "complete":
            complete.append(answer)
    overrides = [_overrides(file) for file in complete]
    counts = Counter(text for texts in overrides for text in texts)
    found = []
    for file, texts in zip(complete, overrides, strict=True):
        own = [text for text in texts if counts[text] < len(complete)]
        folder = file.path.resolve().parent.name
        found.append(stored(file, " ".join(own) if own and _OF_STUDY.fullmatch(folder) else folder))
    return found


def _overrides(file: ResultFile) -> list[str]:
    """Those that a run was given; none where the file does not tell them."""
    try:
        given = json.loads(str(file.root["overrides"]))
    except ValueError:
        given = []
    return [str(text) for text in given] if isinstance(given, list) else []


def stored(file: ResultFile, name: str) -> Stored:
    """A complete run's file as a recipe of this name.

    Raises:
        InputError: its config is none of this version's.
    """
    text = str(file.root["config"])
    try:
        config = from_yaml(text)
    except InputError as error:
        raise InputError(f"recipes={file.path}: its config: {error}") from None
    given = str(file.root.get("inputs_sha256", ""))
    return Stored(file.path, name, config, text, str(file.root["config_hash"]), given, file.layers)
