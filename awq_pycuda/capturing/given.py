"""The keys of a model and a text, which several commands are given, and what can be told of both without PyTorch."""

from __future__ import annotations

import re
from pathlib import Path

from awq_pycuda.capturing.fault import Fault
from awq_pycuda.capturing.gguf_file import is_gguf
from awq_pycuda.options import REQUIRED, nonempty, option


def model_option() -> str:
    """The key `model`."""
    made: str = option(
        "FOLDER",
        "folder of the model: config.json, weights and tokenizer.json; or a GGUF file",
        "a folder with config.json, weights and tokenizer.json, or a GGUF file",
        nonempty,
        REQUIRED,
    )
    return made


def text_option() -> str:
    """The key `text`."""
    made: str = option("FILE", "UTF-8 text to run through it", "a file of UTF-8 text", nonempty, REQUIRED)
    return made


def check_given(model: str, text: str) -> None:
    """Refuses paths of a model and a text that cannot be such. Raises `Fault`."""
    if Path(model).is_file():
        if not is_gguf(Path(model)):
            raise Fault("model", "is neither a folder nor a GGUF file")
    elif not (Path(model) / "config.json").is_file():
        raise Fault("model", "holds no config.json" if Path(model).is_dir() else _no_folder(model))
    if not Path(text).is_file():
        raise Fault("text", "is no file")


def _no_folder(model: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", model):
        return (
            f"is no folder; of the model by that name on Hugging Face, hf download {model} --local-dir FOLDER makes one"
        )
    return "is no folder"
