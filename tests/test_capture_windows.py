"""How long a window may be is the model's to say, and a reason given for a failure is the reason."""

from pathlib import Path
from typing import Any

import h5py
import pytest
import transformers
from tiny_models import (
    SPECIAL,
    WORDS,
    Refused,
    bert,
    bert_config,
    captured,
    gpt2,
    out,
    reason,
    refused,
    save_model,
    text,
)

from awq_pycuda.capturing import windows

V = len(SPECIAL + WORDS)
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def roberta() -> Any:
    return transformers.RobertaConfig(**SIZES, max_position_embeddings=18, pad_token_id=1)


def xlnet() -> Any:
    return transformers.XLNetConfig(vocab_size=V, d_model=32, n_layer=1, n_head=2, d_inner=48)


def mpt() -> Any:
    return transformers.MptConfig(vocab_size=V, d_model=32, n_heads=2, n_layers=1, max_seq_len=12)


def opt() -> Any:
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    return transformers.OPTConfig(**sizes, ffn_dim=48, max_position_embeddings=14, word_embed_proj_dim=32)


def llava() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 16}
    words = SIZES | {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 10}
    return transformers.LlavaConfig(text_config=words, vision_config=vision, image_token_index=3)


def fnet() -> Any:
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    return transformers.FNetConfig(**sizes, max_position_embeddings=11, tpu_short_seq_length=11)


@pytest.mark.parametrize(
    ("config", "length", "why"),
    [
        (roberta, 16, "windows of 16 tokens: "),  # 18 positions, the first two of which no token has
        (xlnet, 30, ""),  # its configuration says -1: no limit
        (mpt, 12, "windows of 12 tokens: max_seq_len of its configuration is 12"),
        (opt, 14, "windows of 14 tokens: max_position_embeddings of its configuration is 14"),
        (llava, 10, "windows of 10 tokens: max_position_embeddings of its configuration is 10"),
        (fnet, 11, "windows of 11 tokens: max_position_embeddings of its configuration is 11"),
    ],
)
def test_the_windows_limit_is_the_models(
    config: Any, length: int, why: str, text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", config(), special=False, longest=None)
    capsys.readouterr()
    captured(model, text, out, "tokens=30")
    assert capsys.readouterr().err.startswith(why or "captured: ")
    with h5py.File(out) as file:
        assert file.attrs["window"] == length


class Model:
    """Stands for a model and its tokenizer where nothing but the length matters."""

    def __init__(self, table: int | None = None, fails_from: int | None = None) -> None:
        self.table, self.fails_from = table, fails_from


def find(monkeypatch: pytest.MonkeyPatch, model: Model, wanted: int) -> windows.Window:
    from awq_pycuda.capturing.tracking import BeyondTable

    def attempt(_model: Any, _ids: Any, length: int) -> Exception | None:
        if model.table is not None and length + 2 > model.table:
            return BeyondTable(length + 1, model.table, "positions.weight")
        if model.fails_from is not None and length >= model.fails_from:
            return RuntimeError("too long")
        return None

    monkeypatch.setattr(windows, "_try", attempt)
    monkeypatch.setattr(windows, "plain_ids", lambda *_: [1, 2])
    monkeypatch.setattr(windows, "_told_limits", lambda *_: iter(()))
    return windows.find_window(model, None, wanted, 2)


def test_a_table_says_itself_how_long_a_window_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find(monkeypatch, Model(table=514), 4000)
    assert found == windows.Window(512, "positions.weight has 514 rows")


@pytest.mark.parametrize("fails_from", [4, 5, 100, 511])
def test_any_other_limit_is_found_by_halving(fails_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find(monkeypatch, Model(fails_from=fails_from), 511)
    assert found == windows.Window(fails_from - 1, "longer ones fail (RuntimeError: too long)")


def test_a_token_beyond_the_vocabulary_is_named(tmp_path: Path, reason: Refused) -> None:
    config = bert_config()
    config.vocab_size = 20
    found = reason(save_model(tmp_path / "model", config, special=True), "tokens=20")
    assert found.startswith("its tokenizer gives the token id 53 ('w49'), and its token table has 20 rows; allowed: ")


def test_the_missing_input_is_named(tmp_path: Path, reason: Refused) -> None:
    config = transformers.BrosConfig(**SIZES)
    found = reason(save_model(tmp_path / "model", config, special=True), "tokens=20")
    assert found.startswith("asks for bbox beside the text (ValueError: You have to specify bbox)")
    assert found.endswith("; allowed: models that need only token ids")


def test_any_other_failure_is_told_as_what_it_is(bert: Path, monkeypatch: pytest.MonkeyPatch, reason: Refused) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ArithmeticError("no such luck")

    monkeypatch.setattr(transformers.models.bert.modeling_bert.BertOutput, "forward", fail)
    found = reason(bert, "tokens=20")
    assert found.startswith("fails on a window of 16 tokens (ArithmeticError: no such luck)")
    assert "only token ids" not in found


def test_too_little_memory_is_told_as_such(gpt2: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(transformers.models.gpt2.modeling_gpt2.GPT2MLP, "forward", fail)
    line = refused(gpt2, "tokens=20")
    assert "tokens=20: a window of 16 tokens does not fit into memory; allowed: fewer" in line
