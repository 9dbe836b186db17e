"""Random models of a few thousand weights with their tokenizers, and the capture command on them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from awq_pycuda import capture
from awq_pycuda.layers.files import FileLayer, load_layers

Refused = Callable[..., str]
WORDS = [f"w{index}" for index in range(50)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WINDOW = 16
LAYERS = [
    f"encoder.layer.{index}.{part}"
    for index in range(2)
    for part in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]


def save_model(
    folder: Path, config: transformers.PreTrainedConfig, special: bool, longest: int | None = WINDOW
) -> Path:
    """Save a random model and a tokenizer of whole words, with [CLS] and [SEP] around a text where special.

    ``longest`` is the window that the tokenizer names, None for none.
    """
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=longest, **names if special else {"unk_token": "[UNK]"}
    ).save_pretrained(folder)
    return folder


def bert_config() -> transformers.PreTrainedConfig:
    return transformers.BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert"), bert_config(), special=True)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.GPT2Config(
        vocab_size=len(SPECIAL + WORDS), n_embd=32, n_layer=2, n_head=2, n_positions=WINDOW, n_inner=40
    )
    return save_model(tmp_path_factory.mktemp("gpt2"), config, special=False)


@pytest.fixture(scope="session")
def albert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.AlbertConfig(
        vocab_size=len(SPECIAL + WORDS),
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=WINDOW,
    )
    return save_model(tmp_path_factory.mktemp("albert"), config, special=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Thirty-three words: two whole windows and one of seven tokens with [CLS] and [SEP]."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[index * 7 % 50] for index in range(33)))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "layers.h5"


def run(*arguments: str) -> int:
    return capture.main(list(arguments))


def captured(folder: Path, text: Path, out: Path, *more: str) -> list[FileLayer]:
    assert run(f"model={folder}", f"text={text}", f"out={out}", *more) == 0
    return load_layers(out)


def windows_of(text: Path, special: bool, longest: int = WINDOW) -> list[list[int]]:
    """Cut a text into windows of token ids, counted out by hand."""
    ids = [len(SPECIAL) + WORDS.index(word) for word in text.read_text().split()]
    step = longest - 2 * special
    parts = [ids[start : start + step] for start in range(0, len(ids), step)]
    return [[2, *part, 3] for part in parts] if special else parts


def refusal(capsys: pytest.CaptureFixture[str], out: Path, arguments: list[str]) -> str:
    """Run the command, which has to refuse its arguments and to leave the folder of ``out`` as it was."""
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    assert run(*arguments) == 2
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("error: ")
    return printed.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], text: Path, out: Path) -> Refused:
    """`refused(model, "tokens=20")`: the line with which the capture of a text by this model is refused."""
    return lambda model, *more: refusal(capsys, out, [f"model={model}", f"text={text}", f"out={out}", *more])


@pytest.fixture
def reason(refused: Refused) -> Refused:
    """The same, for what is wrong with the model: the line behind the model's name."""

    def behind(model: Path, *more: str) -> str:
        line = refused(model, *more)
        assert line.startswith(f"model={model}: ")
        return line.removeprefix(f"model={model}: ")

    return behind


def with_weights(bert: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(bert, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder
