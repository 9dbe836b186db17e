"""A text cut into calibration and evaluation: which tokens are where, and that none is in both."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from tiny_models import WORDS, bert, gpt2

from awq_pycuda.capturing.fault import Fault
from awq_pycuda.capturing.loading import load
from awq_pycuda.capturing.text import Around, find_around
from awq_pycuda.evaluating.windows import cut, hash_ids

FIRST = 4  # the id of w0


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[index % 50] for index in range(100)))
    return path


def words(count: int, start: int = 0) -> list[int]:
    return [FIRST + index % 50 for index in range(start, start + count)]


def test_what_lies_where(gpt2: Path, text: Path) -> None:
    tokenizer = load(gpt2).tokenizer
    found = cut(text, tokenizer, Around([], []), 16, calibration=20, skipped=3, evaluation=33)
    assert found.calibration == [words(16), words(4, 16)]
    # The last of 33 tokens would be a window without anything before it.
    assert [window.ids for window in found.evaluation] == [words(16, 23), words(16, 39)]
    assert [(window.first, window.start, window.stop) for window in found.evaluation] == [(23, 1, 16), (39, 1, 16)]
    assert found.tokens == 32
    assert found.evaluation[1].targets.tolist() == words(15, 40)


@pytest.mark.parametrize("calibration", [16, 17, 18, 31, 32])
def test_special_tokens_are_around_each_window_and_never_predicted(calibration: int, bert: Path, text: Path) -> None:
    tokenizer = load(bert).tokenizer
    around = find_around(text, tokenizer)
    found = cut(text, tokenizer, around, 16, calibration, skipped=0, evaluation=20)
    whole = [2, *words(14), 3]
    rest = [2, *words(14, 14), 3][: calibration - 16]
    assert found.calibration == [whole, *([rest] if rest else [])]
    used = sum(index > 3 for window in found.calibration for index in window)
    assert [window.ids for window in found.evaluation] == [[2, *words(14, used), 3], [2, *words(6, used + 14), 3]]
    assert [window.targets.tolist() for window in found.evaluation] == [words(14, used), words(6, used + 14)]
    assert [window.first for window in found.evaluation] == [used, used + 14]
    assert found.tokens == 20


def test_a_text_that_is_too_short_is_refused(gpt2: Path, text: Path) -> None:
    tokenizer = load(gpt2).tokenizer
    cut(text, tokenizer, Around([], []), 16, 40, 20, 40)
    with pytest.raises(Fault) as fault:
        cut(text, tokenizer, Around([], []), 16, 40, 20, 41)
    assert fault.value.key == "text"
    assert fault.value.what == "holds 100 tokens of this model, fewer than calibration, skip and tokens together"
    assert fault.value.allowed == "texts of at least 101"


def test_one_window_is_refused(gpt2: Path, text: Path) -> None:
    with pytest.raises(Fault) as fault:
        cut(text, load(gpt2).tokenizer, Around([], []), 16, 40, 0, 17)
    assert fault.value.key == "tokens"
    assert fault.value.what == "make 1 window of up to 16 tokens, and intervals come from several"


def test_hashes_are_of_the_ids() -> None:
    expected = hashlib.sha256(np.array([1, 2, 300], "<i8").tobytes()).hexdigest()
    assert hash_ids([[1, 2], [300]]) == expected == hash_ids([[1], [2, 300]])
