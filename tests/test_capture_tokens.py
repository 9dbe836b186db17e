"""Only rows that are tokens count as activations, whatever their number."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import SPECIAL, WORDS, captured, out, save_model, text
from transformers.modeling_outputs import BaseModelOutput

WIDTH = 16  # as many channels, queries and table rows as a window has tokens


class RowsConfig(transformers.PreTrainedConfig):
    model_type = "rows"

    def __init__(self, vocab_size: int = len(SPECIAL + WORDS), **more: Any) -> None:
        super().__init__(**more)
        self.vocab_size = vocab_size


class RowsModel(transformers.PreTrainedModel):
    """Linear layers that see one row per token, and layers that see as many rows of another kind."""

    config_class = RowsConfig

    def __init__(self, config: RowsConfig) -> None:
        super().__init__(config)
        linear = torch.nn.Linear
        self.embed = torch.nn.Embedding(config.vocab_size, WIDTH)
        self.positions = torch.nn.Embedding(64, WIDTH)
        self.table = torch.nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.queries = torch.nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.first, self.last = linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.on_positions, self.on_table, self.on_queries = (linear(WIDTH, WIDTH) for _ in range(3))
        self.on_pooled, self.on_copies, self.on_channels = (linear(WIDTH, WIDTH) for _ in range(3))
        self.on_heads = linear(1, 1)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.embed

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:
        length = input_ids.shape[1]
        hidden = self.embed(input_ids)
        places = self.positions(torch.arange(length))[None]
        hidden = self.first(hidden) + self.on_positions(places)
        self.on_table(self.table[None])
        attention = (self.queries @ hidden[0].T).softmax(-1)
        self.on_queries(attention @ hidden[0])
        pooled = hidden.mean(1, keepdim=True)
        self.on_pooled(pooled)
        self.on_copies(pooled.expand(1, length, WIDTH))
        channels = torch.nn.functional.pad(hidden, (0, 0, 0, max(0, WIDTH - length))).transpose(1, 2)[..., :WIDTH]
        self.on_channels(channels)
        self.on_heads(hidden.mean(1).reshape(1, WIDTH, 1))
        return BaseModelOutput(last_hidden_state=self.last(hidden))


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    transformers.AutoConfig.register("rows", RowsConfig, exist_ok=True)
    transformers.AutoModel.register(RowsConfig, RowsModel, exist_ok=True)
    return save_model(tmp_path / "rows", RowsConfig(), special=False)


def test_rows_that_are_no_tokens_are_left_out(
    model: Path, text: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [layer.name for layer in captured(model, text, out, f"tokens={WIDTH}")] == ["first", "last"]
    left_out = {
        line.split()[2]: line.partition("(")[2].partition(";")[0]
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("left out: ")
    }
    assert left_out == {
        "on_positions": "its rows do not come from the tokens",
        "on_table": "16 rows whatever the number of tokens",
        "on_queries": "16 rows whatever the number of tokens",
        "on_pooled": "1 row whatever the number of tokens",
        "on_copies": "its rows are copies of one",
        "on_channels": "16 rows whatever the number of tokens",
        "on_heads": "16 rows whatever the number of tokens",
    }


def test_relative_positions_as_many_as_tokens_are_no_tokens(text: Path, tmp_path: Path, out: Path) -> None:
    config = transformers.DebertaV2Config(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=False,
    )
    names = [layer.name for layer in captured(save_model(tmp_path / "m", config, special=True), text, out, "tokens=16")]
    assert "encoder.layer.0.attention.self.query_proj" in names
    assert not [name for name in names if ".pos_" in name]


def test_rows_that_a_model_pads_with_are_no_tokens(text: Path, tmp_path: Path, out: Path) -> None:
    config = transformers.LongformerConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        attention_window=8,
        pad_token_id=0,
    )
    layers = captured(save_model(tmp_path / "m", config, special=True), text, out, "tokens=39")
    names = [layer.name for layer in layers]
    assert names[:3] == [f"encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")]
    for layer in layers:
        assert layer.activations is not None
        assert len(layer.activations) == 39


def test_the_decoder_of_a_model_that_shifts_its_tokens_counts(text: Path, tmp_path: Path, out: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=len(SPECIAL + WORDS),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=32,
    )
    names = [
        layer.name for layer in captured(save_model(tmp_path / "m", config, special=False), text, out, "tokens=20")
    ]
    assert "decoder.layers.0.self_attn.q_proj" in names
    assert "decoder.layers.0.encoder_attn.k_proj" in names
