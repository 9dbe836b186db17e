"""The text is taken as it is: from its beginning, in order, at a cost that the tokens asked for decide."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import transformers
from tiny_models import SPECIAL, WORDS, bert, captured, gpt2, out, text, with_weights
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from awq_pycuda.capturing.text import Around, find_around, hash_text, read_windows

NOVEL = Path(__file__).parents[1] / "experiments" / "data" / "pride-and-prejudice.txt"


def train(model: Any, trainer: Any, pre_tokenizer: Any, normalizer: Any = None) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    # Lines: a trainer takes each for a whole, and without splitting a text is one word.
    tokenizer.train_from_iterator(NOVEL.read_text(encoding="utf-8-sig").splitlines()[:400], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def bpe() -> Any:
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    return train(models.BPE(unk_token="<unk>"), trainer, pre_tokenizers.ByteLevel(add_prefix_space=True))


def unsplit_bpe() -> Any:
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    return train(models.BPE(unk_token="<unk>"), trainer, None, normalizers.Replace(" ", "▁"))


def unigram() -> Any:
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False, max_piece_length=12
    )
    return train(models.Unigram(), trainer, None, normalizers.Replace(" ", "▁"))


def wordpiece() -> Any:
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    return train(models.WordPiece(unk_token="<unk>"), trainer, pre_tokenizers.BertPreTokenizer())


@pytest.mark.parametrize("make", [bpe, unsplit_bpe, unigram, wordpiece])
def test_ids_of_a_prefix_are_those_of_the_whole_text(make: Callable[[], Any]) -> None:
    tokenizer = make()
    whole = tokenizer(NOVEL.read_text(encoding="utf-8-sig"), add_special_tokens=False)["input_ids"]
    for tokens in (1, 7, 500, 3000):
        (window,) = read_windows(NOVEL, tokenizer, Around([], []), tokens, tokens)
        assert window == whole[:tokens]


def test_only_what_the_tokens_need_is_tokenized(tmp_path: Path) -> None:
    tokenizer = wordpiece()
    path = tmp_path / "text.txt"
    path.write_text("It is a truth universally acknowledged. " * 50_000)
    taken: list[int] = []

    class Counting:
        def __call__(self, text: str, **options: Any) -> Any:
            taken.append(len(text))
            return tokenizer(text, **options)

    read_windows(path, Counting(), Around([], []), 100, 50)
    assert sum(taken) < 30_000


def test_windows_are_cut_from_the_ids(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[:7]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words_tokenizer(), unk_token="[UNK]")
    first = len(SPECIAL)
    assert read_windows(path, tokenizer, Around([2], [3]), 11, 5) == [
        [2, first, first + 1, first + 2, 3],
        [2, first + 3, first + 4, first + 5, 3],
        [2, first + 6, 3],
    ]


def words_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize(
    ("template", "around"),
    [("$A", Around([], [])), ("[CLS] $A [SEP]", Around([2], [3])), ("$A [SEP] [CLS]", Around([], [3, 2]))],
)
def test_special_tokens_are_learned_from_the_tokenizer(template: str, around: Around, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("[SEP] w3 [CLS]")
    tokenizer = words_tokenizer()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    assert find_around(path, fast) == around


@pytest.mark.parametrize(
    "change",
    [
        {"truncation": {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 64},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "[PAD]",
            }
        },
    ],
)
def test_a_tokenizers_own_truncation_and_padding_do_not_matter(
    change: dict[str, Any], bert: Path, text: Path, tmp_path: Path, out: Path
) -> None:
    expected = captured(bert, text, out, "tokens=39")
    model = with_weights(bert, tmp_path / "model", lambda state: None)
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    settings = model / "tokenizer_config.json"
    sides = {"truncation_side": "left", "padding_side": "left"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | sides))
    same_activations(expected, captured(model, text, out, "tokens=39"))


def same_activations(left: list[Any], right: list[Any]) -> None:
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one.activations, other.activations)


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_a_byte_order_mark_and_line_ends_are_no_text(newline: str, gpt2: Path, text: Path, out: Path) -> None:
    plain = text.read_text().replace(" ", "\n")
    text.write_text(plain)
    expected = captured(gpt2, text, out, "tokens=20")
    raw = b"\xef\xbb\xbf" + plain.replace("\n", newline).encode()
    text.write_bytes(raw)
    same_activations(expected, captured(gpt2, text, out, "tokens=20"))
    with h5py.File(out) as file:
        assert file.attrs["text_sha256"] == hashlib.sha256(raw).hexdigest()


def test_a_fault_far_behind_is_found_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    # The two bytes of a letter lie in two blocks; the fault comes later.
    path.write_bytes(b"a" * ((1 << 20) - 1) + "é".encode() + b"a" * 10 + b"\xff")
    with pytest.raises(Exception, match=rf"is no UTF-8 \(byte {(1 << 20) + 11}: invalid start byte\)"):
        hash_text(path)
