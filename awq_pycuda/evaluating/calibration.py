"""The one calibration of all recipes: a layer file with what the text's first tokens send into every layer."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from awq_pycuda import __version__
from awq_pycuda.capturing.fault import Fault
from awq_pycuda.capturing.loading import LIBRARIES, Loaded
from awq_pycuda.capturing.probing import Plan, make_plan
from awq_pycuda.capturing.text import Around
from awq_pycuda.capturing.windows import Window, plain_ids
from awq_pycuda.capturing.writing import NothingLeft, write_layers
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.hdf5_worker import ask
from awq_pycuda.layers.files import describe_layers, stored_weights
from awq_pycuda.layers.inputs import file_sha256
from awq_pycuda.layers.notes import read_notes
from awq_pycuda.layers.rows import StoredRows

_OF_ORIGIN = ("model_sha256", "windows_sha256", "awq_pycuda_version", *(f"{name}_version" for name in LIBRARIES))


@dataclass(frozen=True)
class Calibration:
    """A layer file that every recipe's run reads.

    Attributes:
        path: of the file.
        sha256: of its bytes.
        tokens: rows of every layer that sees all tokens.
        said: what became of every token, and what of the model is left as it is, line by line.
        reused: whether the file was there already.
        weights: of the layers that some token reached, (out_features, in_features), by path, in the order in which
            they run; they stay in the file until they are asked for.
    """

    path: Path
    sha256: str
    tokens: int
    said: list[str]
    reused: bool
    weights: Mapping[str, StoredRows]


def plan_of(loaded: Loaded, around: Around, window: int) -> Plan:
    """Which layers of a model see one row per token, told by windows of random tokens of at most this length.

    Raises:
        Fault: the model fails, or none of its layers does.
    """
    plan = make_plan(loaded.model, plain_ids(loaded.model, loaded.tokenizer), around, window)
    if not plan.order:
        reasons = "; ".join(sorted(set(plan.left_out.values())))
        raise Fault("model", f"has no linear layer that sees its tokens ({reasons or 'it has none at all'})")
    return plan


def hash_model(model: Any) -> str:
    """SHA-256 over names, shapes, dtypes and values of a model's parameters, 64 hex digits."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.numpy().reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def calibrate(
    loaded: Loaded,
    plan: Plan,
    windows: Sequence[list[int]],
    around: Around,
    window: Window,
    path: Path,
    origin: Mapping[str, str],
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Calibration:
    """The calibration of these windows of token ids, from the file where that has it, else by one pass over them.

    Args:
        loaded: the model.
        plan: of its layers.
        windows: the calibration's tokens, those of the text with the special ones around them, all of which count.
        around: the special tokens of a window.
        window: the longest that a window may be, and why.
        path: of the file, which is replaced where it is of another model, of other tokens or by other versions.
        origin: what the file is to note of itself: `model`, `model_type`, `model_sha256`, `text_sha256` and so on.
        on_progress: told what is going on, how many windows are done, and of how many.

    Raises:
        Fault: the model fails, or sends into layers what no file may hold.
        OSError: the file cannot be written.
    """
    tokens, noted = sum(map(len, windows)), _noted(origin, windows)
    said = _said_by(path, noted)
    reused = said is not None
    if said is None:
        attributes: dict[str, str | int] = {**noted, "tokens": tokens, "window": window.length}
        told = _told(windows, on_progress)
        try:
            said = write_layers(path, loaded, plan, told, tokens, window, attributes).said
        except NothingLeft as nothing:
            raise Fault("model", f"has no layer that saw a token ({nothing})") from nothing
    lines = [_account(windows, around, window.length, path), *said]
    return Calibration(path, file_sha256(path), tokens, lines, reused, stored_weights(path))


def is_kept(path: Path, windows: Sequence[list[int]], origin: Mapping[str, str]) -> bool:
    """Whether `calibrate` would use the file that is there."""
    return _said_by(path, _noted(origin, windows)) is not None


def _noted(origin: Mapping[str, str], windows: Sequence[list[int]]) -> dict[str, str]:
    return {
        **origin,
        "windows_sha256": hashlib.sha256(json.dumps(windows).encode()).hexdigest(),
        "awq_pycuda_version": __version__,
        **{f"{name}_version": str(sys.modules[name].__version__) for name in LIBRARIES},
    }


def _told(windows: Sequence[list[int]], on_progress: Callable[[str, int, int], None]) -> Iterator[list[int]]:
    for done, window in enumerate(windows):
        on_progress("calibration", done, len(windows))
        yield window


def _said_by(path: Path, noted: Mapping[str, str]) -> list[str] | None:
    """The lines of a calibration's file that is of this origin; None where there is none, or of another."""
    if not path.is_file():
        return None
    (answer,) = ask([(read_notes, path, _OF_ORIGIN)])
    if isinstance(answer, UnreadableError):
        return None
    attributes, lines = answer
    same = all(attributes.get(name) == noted.get(name) for name in _OF_ORIGIN)
    return lines if same else None


def _account(windows: Sequence[list[int]], around: Around, length: int, path: Path) -> str:
    """What became of every token of the calibration, whose last window ends with the tokens asked for."""
    lengths = Counter(map(len, windows))
    tokens, before, text = sum(map(len, windows)), len(around.before), length - len(around)
    special = sum(min(each, before) + max(0, each - before - text) for each in map(len, windows))
    shapes = describe_layers(path)
    all_of = sum(shape.tokens == tokens for shape in shapes)
    of_windows = " and ".join(
        f"{count} window{'s' * (count > 1)} of {length} tokens"
        for length, count in sorted(lengths.items(), reverse=True)
    )
    of_text = f"{tokens - special} of the text's first and {special} special ones"
    others = "" if all_of == len(shapes) else f", {len(shapes) - all_of} experts those routed to them"
    return f"calibration: {tokens} tokens ({of_text}) in {of_windows}; {all_of} layers saw all of them{others}"
