"""The files of a model's weights, looked into by themselves: what the loader leaves unsaid about them."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from awq_pycuda.capturing.fault import Fault

# Types whose numbers are the weights themselves; all others are codes, or need a scale.
_PLAIN = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}
_PLAIN_SAVED = "weights saved as float32, float16 or bfloat16, with adapters merged and codes dequantized"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}
_ADAPTER = re.compile("adapter|lora", re.IGNORECASE)
_CODED = re.compile(r"scale|zero|q?weight_packed|qweight|absmax|quant|g_idx|\bSCB\b", re.IGNORECASE)


@dataclass(frozen=True)
class Stored:
    """A tensor of a weight file."""

    file: Path
    dtype: str


class Folder:
    """A folder with config, weights and tokenizer, as a source of tokenizer and model.

    Raises `Fault` for one that holds what would change the weights: an adapter, a config that says they are codes.
    """

    def __init__(self, path: Path) -> None:
        _check_folder(path)
        _check_config(_read_config(path))
        # An absolute path is never taken for the name of a model on the hub.
        self._path = str(path.resolve())

    @contextmanager
    def arguments(self) -> Iterator[dict[str, Any]]:
        """How transformers is told of the folder."""
        yield {"pretrained_model_name_or_path": self._path}

    def model_arguments(self) -> dict[str, Any]:
        """Nothing more for the model."""
        return {}

    def read_stored(self, files: Iterable[str]) -> dict[str, Stored]:
        """The tensors of the weight files by name, without their values.

        Raises `Fault` for a tensor that two files hold, and whatever a damaged file makes the libraries raise.
        """
        stored: dict[str, Stored] = {}
        for file in map(Path, files):
            for name, dtype in _read_dtypes(file).items():
                if name in stored:
                    raise Fault("model", f"both {stored[name].file.name} and {file.name} hold {name}")
                stored[name] = Stored(file, dtype)
        return stored

    def find_dropped(self, model: Any) -> set[str]:
        """No tensors: the loader reports all that find no place."""
        return set()

    def of_head(self, head: Any) -> set[str]:
        """The names of tensors in the files that a model with a head takes up outside of its base model."""
        return outside_base(head, {name: name for name in head.state_dict()})

    def describe(self, model: Any) -> list[str]:
        """No lines: the loader reads all of the config, and the weights are plain numbers."""
        return []

    def attributes(self) -> dict[str, str]:
        """Nothing to be noted beside what is noted of every model."""
        return {}


def outside_base(head: Any, places: dict[str, str]) -> set[str]:
    """Of names with their places in a model with a head, those whose place is not within the base model."""
    base = head.base_model_prefix
    return {name for name, place in places.items() if not base or not place.startswith(f"{base}.")}


def _check_folder(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        adapter = _ADAPTER.search(path.name) is not None and path.suffix.lower() in _WEIGHT_SUFFIXES
        if adapter or path.name == "adapter_config.json":
            raise Fault("model", f"holds an adapter, {path.name}, which changes the weights", _PLAIN_SAVED)


def _check_config(config: dict[str, Any]) -> None:
    """Refuse a configuration, at any depth, that says that the weights are codes. Raises `Fault`."""
    for key, value in config.items():
        if key in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method") if isinstance(value, dict) else None
            what = f"its config.json has {key}" + (f" ({method})" if method else "")
            raise Fault("model", f"{what}: its weights are codes that need scales", _PLAIN_SAVED)
        if isinstance(value, dict):
            _check_config(value)


def _read_dtypes(file: Path) -> dict[str, str]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="np") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    import torch

    state = torch.load(file, map_location="meta", weights_only=True)
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}


def check_dtypes(stored: dict[str, Stored], numbers: set[str]) -> None:
    """Refuse tensors of a type that needs a scale, save those named in ``numbers``, which are no weights.

    Raises `Fault`.
    """
    for name, tensor in stored.items():
        if tensor.dtype not in _PLAIN and name not in numbers:
            raise Fault("model", f"its weights hold {name} as {tensor.dtype}, a type that needs a scale", _PLAIN_SAVED)


def describe_foreign(name: str) -> str:
    """Say what a tensor may be that a model does not take up, as far as its name tells."""
    if _ADAPTER.search(name):
        return f"{name}, an adapter's"
    if _CODED.search(name):
        return f"{name}, a scale or code"
    return name


def looks_coded(name: str) -> bool:
    """Whether a tensor's name speaks of scales, codes or adapters."""
    return _ADAPTER.search(name) is not None or _CODED.search(name) is not None


def _read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises `Fault` where it is no JSON object."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Fault("model", f"cannot be loaded (config.json: {error})") from error
    if not isinstance(config, dict):
        raise Fault("model", "cannot be loaded (config.json is no JSON object)")
    return config
