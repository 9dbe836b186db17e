"""The one calibration of all recipes: the file that capture would write, kept while it fits, every token told of."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from test_capture_experts import mixtral
from tiny_models import LAYERS, bert, captured, gpt2, out, text

from awq_pycuda.capturing.fault import Fault
from awq_pycuda.capturing.loading import Loaded, load
from awq_pycuda.capturing.text import Around
from awq_pycuda.capturing.windows import Window
from awq_pycuda.evaluating.calibration import Calibration, calibrate, plan_of
from awq_pycuda.layers.files import load_layers, unreached_layers

ORIGIN = {"model": "bert", "model_type": "bert", "model_sha256": "a", "text_sha256": "b", "calibration_sha256": "c"}
SPECIAL = Around([2], [3])
PLAIN = Around([], [])
WHOLE = Window(16, "the tokenizer's model_max_length is 16")


def calibrated(
    loaded: Loaded, windows: list[list[int]], path: Path, around: Around = SPECIAL, **origin: str
) -> Calibration:
    plan = plan_of(loaded, around, WHOLE.length)
    return calibrate(loaded, plan, windows, around, WHOLE, path, ORIGIN | origin)


def of_text(text: Path, tokens: int) -> list[list[int]]:
    """Windows of 16 tokens with [CLS] and [SEP], the last one cut to so many tokens in all."""
    ids = [4 + int(word[1:]) for word in text.read_text().split()]
    windows = [[2, *ids[start : start + 14], 3] for start in range(0, tokens, 14)]
    found = []
    for window in windows:
        found.append(window[: tokens - sum(map(len, found))])
    return [window for window in found if window]


def test_the_file_is_the_one_that_capture_writes(bert, text, out, tmp_path):
    given = calibrated(load(bert), of_text(text, 20), tmp_path / "calibration.h5")
    expected = captured(bert, text, out, "tokens=20")
    found = load_layers(given.path)
    assert [layer.name for layer in found] == [layer.name for layer in expected] == LAYERS == list(given.weights)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)
        # The second window ends with the tokens asked for, and a layer of BERT sees what is behind a token, too.
        np.testing.assert_array_equal(one.activations[:16], other.activations[:16])
        assert one.activations.shape == other.activations.shape
        np.testing.assert_array_equal(given.weights[one.name][:], other.weight)


def test_every_token_is_accounted_for(bert, text, tmp_path):
    given = calibrated(load(bert), of_text(text, 20), tmp_path / "calibration.h5")
    first = (
        "calibration: 20 tokens (17 of the text's first and 3 special ones) in 1 window of 16 tokens and 1 window of "
        "4 tokens; 12 layers saw all of them"
    )
    assert given.said[0] == first
    assert given.tokens == 20
    assert any(line.startswith("captured: ") for line in given.said)
    whole = calibrated(load(bert), of_text(text, 32), tmp_path / "whole.h5")
    assert whole.said[0].startswith(
        "calibration: 32 tokens (28 of the text's first and 4 special ones) in 2 windows of"
    )


def test_experts_see_the_tokens_routed_to_them(text, tmp_path):
    loaded = load(mixtral(tmp_path / "model", 6))
    windows = [[4 + 7 * index % 50 for index in range(length)] for length in (16, 4)]
    given = calibrated(loaded, windows, tmp_path / "calibration.h5", PLAIN)
    rows = {layer.name: len(layer.activations) for layer in load_layers(given.path)}
    of_experts = {name: count for name, count in rows.items() if ".experts." in name}
    products = [name for name in of_experts if name.endswith("gate_up_proj")]
    assert sum(of_experts[name] for name in products) == 2 * 20  # two experts a token
    routed = len([name for name in of_experts if of_experts[name] < 20])
    assert given.said[0].endswith(
        f"; {len(rows) - routed} layers saw all of them, {routed} experts those routed to them"
    )
    idle = unreached_layers(given.path)
    assert set(given.weights) == set(rows)
    assert not set(given.weights) & set(idle)


def test_a_file_is_kept_while_model_tokens_and_versions_agree(bert, text, tmp_path):
    loaded, path = load(bert), tmp_path / "calibration.h5"
    windows = of_text(text, 32)
    first = calibrated(loaded, windows, path)
    stamp = path.stat().st_mtime_ns
    again = calibrated(loaded, windows, path, model="another name", text_sha256="of a longer text")
    assert (first.reused, again.reused) == (False, True)
    assert path.stat().st_mtime_ns == stamp
    assert (again.said, again.sha256, again.tokens) == (first.said, first.sha256, first.tokens)
    assert not calibrated(loaded, windows, path, model_sha256="of others").reused
    assert not calibrated(loaded, windows[::-1], path, model_sha256="of others").reused
    # The same ids cut otherwise.
    joined = [windows[0][:8], windows[0][8:], windows[1]]
    assert not calibrated(loaded, joined, path).reused
    with h5py.File(path, "a") as file:
        file.attrs["torch_version"] = "1.0"
    assert not calibrated(loaded, joined, path).reused
    path.write_bytes(path.read_bytes()[:5000])
    last = calibrated(loaded, windows, path)
    assert not last.reused
    assert last.sha256 == first.sha256


def test_progress_is_told_by_windows(bert, text, tmp_path):
    loaded, told = load(bert), []
    plan = plan_of(loaded, SPECIAL, WHOLE.length)

    def note(*given: Any) -> None:
        told.append(given)

    calibrate(loaded, plan, of_text(text, 32), SPECIAL, WHOLE, tmp_path / "calibration.h5", ORIGIN, note)
    assert told == [("calibration", 0, 2), ("calibration", 1, 2)]


def test_a_model_without_layers_that_see_tokens_is_refused(gpt2):
    loaded = load(gpt2)
    loaded.model.h = loaded.model.h[:0]
    with pytest.raises(Fault, match="has no linear layer that sees its tokens"):
        plan_of(loaded, PLAIN, 16)
