"""A model in one GGUF file: what the file holds, and what transformers' loader leaves unsaid about it."""

import copy
import importlib
import mmap
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from awq_pycuda.capturing.checkpoint import Stored, outside_base
from awq_pycuda.capturing.fault import Fault

# What transformers' loader needs beside itself.
LIBRARIES = ("gguf", "accelerate")
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_WHOLE = "GGUF files of a whole language model with its tokenizer"
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {"F64", "F32", "F16", "BF16"}


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever its name; False for one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


class GgufFile:
    """A GGUF file, its header read and judged, as a source of tokenizer and model.

    Raises `Fault` for a file that is cut short or damaged, is one part of several, or holds no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(data)
        self._settings = header.settings
        self._types = header.types
        parts = self._settings.get("split.count", 1)
        if parts > 1:
            what = f"is part {self._settings.get('split.no', 0) + 1} of {parts}"
            raise Fault("model", what, "whole GGUF files, as llama-gguf-split --merge makes of parts")
        kind = self._settings.get("general.type", "model")
        if kind != "model":
            raise Fault("model", f"its general.type is {kind}", _WHOLE)
        for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.tokens"):
            if key not in self._settings:
                raise Fault("model", f"holds no {key}", _WHOLE)
        self._architecture = str(self._settings["general.architecture"])
        loader = _loader()
        self._find_places = loader.get_gguf_hf_weights_map
        self._processor = loader.TENSOR_PROCESSORS.get(self._architecture, loader.TensorProcessor)()

    @contextmanager
    def arguments(self) -> Iterator[dict[str, Any]]:
        """How transformers is told of the file, in a context in which its loader finds the places of all tensors.

        It looks into a folder, too, where a tokenizer.json or an adapter would count: it is shown an empty one. Its
        progress is not shown, for it would stand among what is to be said.
        """

        def find(model: Any, processor: Any, *within: Any, **named: Any) -> dict[str, str]:
            # It asks of a whole model, and then itself of each part, by more arguments.
            if within or named:
                return dict(self._find_places(model, processor, *within, **named))
            return self._places(model)

        with (
            TemporaryDirectory() as empty,
            mock.patch.object(_loader(), "tqdm", lambda tensors, **_: tensors),
            mock.patch.object(_loader(), "get_gguf_hf_weights_map", find),
        ):
            yield {"pretrained_model_name_or_path": empty, "gguf_file": str(self._path)}

    def model_arguments(self) -> dict[str, Any]:
        """What the loader is told of the model beside: that weights become numbers."""
        return {"quantization_config": importlib.import_module("transformers").GgufConfig(dequantize=True)}

    def read_stored(self, files: Iterable[str]) -> dict[str, Stored]:
        """No tensors whose type would have to be judged: GGUF's types bring their scales along."""
        return {}

    def find_dropped(self, model: Any) -> set[str]:
        """The file's tensors that the loader passed over without a word, since the model has no place for them."""
        if self._is_reported():
            return set()
        places = self._places(model)
        # The loader looks for stacks of experts without the suffix.
        return {name for name in self._types if name not in places and name.removesuffix(".weight") not in places}

    def of_head(self, head: Any) -> set[str]:
        """The names of tensors in the file that a model with a head takes up outside of its base model."""
        places = {name: name for name in head.state_dict()}
        if not self._is_reported():
            places |= self._find_places(head, self._processor)
        return outside_base(head, places)

    def _is_reported(self) -> bool:
        """Whether this architecture's loader hands over all tensors, and so reports those that find no place."""
        reader = importlib.import_module("transformers.integrations.gguf")
        return bool(reader.is_gguf_arch_supported(self._architecture))

    def _places(self, model: Any) -> dict[str, str]:
        """Where tensors of the file go in a model, by their names in the file.

        The loader knows the layers of some models, such as those with experts, only by their paths in a model with a
        head: that is what it is asked of.
        """
        head = _with_head(model)
        places: dict[str, str] = self._find_places(head, self._processor)
        if head is model:
            return places
        base = f"{head.base_model_prefix}."
        return {name: place.removeprefix(base) for name, place in places.items() if place.startswith(base)}

    def describe(self, model: Any) -> list[str]:
        """Lines on what the loader made of the file: weights of numbers, settings and words left aside.

        Raises `Fault` where it leaves aside what changes all that the model computes: the scaling of rotary positions.
        """
        return [*self._describe_weights(), *self._describe_settings(model), *self._describe_words()]

    def _describe_weights(self) -> list[str]:
        coded = {name: count for name, count in self._count_types().items() if name not in _PLAIN}
        if not coded:
            return []
        kinds = ", ".join(f"{name} ({count} tensor{'s' if count > 1 else ''})" for name, count in coded.items())
        return [f"weights: dequantized from GGUF's {kinds}"]

    def _describe_settings(self, model: Any) -> list[str]:
        settings = importlib.import_module("transformers.integrations").GGUF_CONFIG_MAPPING
        read = settings.get(self._architecture) or settings.get(model.config.model_type)
        prefix = f"{self._architecture}."
        if read is None or self._is_reported():
            return []
        unread = {
            key: value
            for key, value in self._settings.items()
            if key.startswith(prefix) and key.removeprefix(prefix) not in read
        }
        scaling = unread.get(f"{prefix}rope.scaling.type", "none")
        rope = getattr(model.config, "rope_parameters", None) or {}
        if scaling != "none" and rope.get("rope_type", "default") == "default":
            what = f"its {prefix}rope.scaling.type is {scaling}, which transformers does not read from GGUF"
            raise Fault("model", what, f"{_WHOLE}, of positions that are not scaled")
        found = ", ".join(f"{key}={value}" for key, value in unread.items())
        return [f"settings of the file that transformers does not read: {found}"] if unread else []

    def _describe_words(self) -> list[str]:
        rules = importlib.import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
        rule = self._settings.get("tokenizer.ggml.pre", "default")
        known = {*rules.GGUF_PRE_TOKENIZER_SPLITS, "default", "gpt-2"}
        if self._settings["tokenizer.ggml.model"] != "gpt2" or rule in known:
            return []
        return [f"words: transformers knows no rule {rule} to split a text by, and splits as GPT-2 does"]

    def attributes(self) -> dict[str, str]:
        """What a layer file notes: the types of all tensors with their numbers, the reader's version."""
        types = ", ".join(f"{name} {count}" for name, count in self._count_types().items())
        return {"gguf_types": types, "gguf_version": version("gguf")}

    def _count_types(self) -> dict[str, int]:
        return dict(Counter(self._types.values()).most_common())


def _loader() -> Any:
    return importlib.import_module("transformers.modeling_gguf_pytorch_utils")


def _with_head(model: Any) -> Any:
    """The language model around a base model, without memory for its weights; the model itself where there is none."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    try:
        with torch.device("meta"):
            head = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    except ValueError:
        return model  # of an architecture that is no language model
    return head if type(getattr(head, head.base_model_prefix, None)) is type(model) else model


class _Header:
    """What stands before the tensors: settings, of arrays only how many values they have, and each tensor's type.

    Raises `Fault` for one that is damaged, and where the file ends before its last tensor does.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._position = len(_MAGIC)
        number = self._number("I")
        if number not in _VERSIONS:
            what = f"is of GGUF version {number}, or of another byte order"
            raise Fault("model", what, f"little-endian GGUF files of version {' or '.join(map(str, _VERSIONS))}")
        tensors, settings = self._number("Q"), self._number("Q")
        self.settings: dict[str, Any] = {}
        for _ in range(settings):
            key = self._string()
            self.settings[key] = self._value(self._number("I"))
        self.types: dict[str, str] = {}
        ends = [self._tensor() for _ in range(tensors)]
        if not ends:
            raise Fault("model", "holds no tensors", _WHOLE)
        alignment = self.settings.get("general.alignment", 32)
        start = -(-self._position // alignment) * alignment
        if len(data) < start + max(ends):
            raise self._damage(f"{len(data):,} of {start + max(ends):,} bytes")

    def _damage(self, what: str) -> Fault:
        return Fault("model", f"is a GGUF file cut short or damaged ({what})", _WHOLE)

    def _take(self, count: int) -> bytes:
        part = self._data[self._position : self._position + count]
        if len(part) < count:
            raise self._damage(f"it ends within its header, at byte {len(self._data):,}")
        self._position += count
        return part

    def _number(self, form: str) -> Any:
        (number,) = struct.unpack(f"<{form}", self._take(struct.calcsize(form)))
        return number

    def _string(self) -> str:
        try:
            return self._take(self._number("Q")).decode()
        except UnicodeDecodeError as error:
            raise self._damage(f"a name before byte {self._position:,} is no UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _FORMS:
            return self._number(_FORMS[kind])
        if kind != _ARRAY:
            raise self._damage(f"a setting before byte {self._position:,} is of type {kind}")
        member, count = self._number("I"), self._number("Q")
        if member == _STRING:
            for _ in range(count):
                self._take(self._number("Q"))
        elif member in _FORMS:
            self._take(count * struct.calcsize(_FORMS[member]))
        else:
            raise self._damage(f"an array before byte {self._position:,} has members of type {member}")
        return f"{count} values"

    def _tensor(self) -> int:
        """Note a tensor's type; where it ends is returned, counted from the first one's start."""
        constants = importlib.import_module("gguf.constants")
        name = self._string()
        elements = 1
        for _ in range(self._number("I")):
            elements *= self._number("Q")
        kind, offset = self._number("I"), self._number("Q")
        if name in self.types:
            raise self._damage(f"it holds {name} twice")
        try:
            of = constants.GGMLQuantizationType(kind)
        except ValueError as error:
            raise Fault("model", f"holds {name} in GGUF's type {kind}, which gguf does not know", _WHOLE) from error
        self.types[name] = of.name
        block, size = constants.GGML_QUANT_SIZES[of]
        return int(offset + elements * size // block)
