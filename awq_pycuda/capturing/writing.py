"""Writes the layers of a plan with what windows of a text send into them, and says what became of everything."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from awq_pycuda.capturing.account import take_account
from awq_pycuda.capturing.loading import LIBRARIES, Loaded
from awq_pycuda.capturing.probing import Plan
from awq_pycuda.capturing.recording import Recorder
from awq_pycuda.capturing.report import report
from awq_pycuda.capturing.windows import Window
from awq_pycuda.layers.notes import SAID
from awq_pycuda.layers.writer import LayerWriter


class NothingLeft(Exception):
    """None of the layers saw a token; the message gives the reasons, in one line."""

    def __init__(self, left_out: Mapping[str, str]) -> None:
        super().__init__("; ".join(sorted(set(left_out.values()))))


@dataclass(frozen=True)
class Written:
    """What a layer file holds of a model."""

    rows: dict[str, int]
    """Rows of activations of every layer, by path, in the order of the file."""
    said: list[str]
    """What is to be said of it, line by line."""


def model_name(path: Path) -> str:
    """What a model is called, by its folder or file."""
    # A hub's cache has files under their hashes, and links to them under their names; a folder may be `.`.
    return path.name if path.is_file() else path.resolve().name


def write_layers(
    path: Path,
    loaded: Loaded,
    plan: Plan,
    windows: Iterable[list[int]],
    tokens: int,
    window: Window,
    attributes: Mapping[str, str | int],
    dtype: type[np.floating[Any]] = np.float32,
) -> Written:
    """Run windows of token ids through a model and write the layers of a plan with their inputs to a layer file.

    ``tokens`` rows are kept of each layer, ``window`` is the longest window with the reason for its length,
    ``attributes`` note where the layers come from, beside the versions of the libraries. Raises `Fault` for what no
    layer file may hold and where the model fails, `NothingLeft`, and OSError where the file cannot be written; none of
    them leaves a file.
    """
    with LayerWriter(path, dtype) as writer:
        recorder = Recorder(writer, loaded.model, plan, tokens, np.dtype(dtype), loaded.absent)
        recorder.add_layers()
        recorder.run(windows)
        left_out = {**plan.left_out, **recorder.left_out}
        rows = recorder.rows()
        if not any(rows.values()):
            raise NothingLeft(left_out)
        account = take_account(loaded.model, plan, rows, left_out)
        said = [*loaded.said, *report(window, plan, rows, left_out, account, loaded.heads)]
        versions = {f"{library}_version": str(sys.modules[library].__version__) for library in LIBRARIES}
        writer.set_attributes({**attributes, **versions, **loaded.attributes})
        writer.set_text(SAID, json.dumps(said), "what is to be said of the capture: a JSON list of lines")
    return Written(rows, said)
