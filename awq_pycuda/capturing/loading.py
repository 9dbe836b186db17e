"""Loads a model with its tokenizer, and judges all that the loader has to report about its weights."""

import copy
import importlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from awq_pycuda.capturing.checkpoint import Folder, Stored, check_dtypes, describe_foreign, looks_coded
from awq_pycuda.capturing.fault import Fault, one_line
from awq_pycuda.capturing.gguf_file import LIBRARIES as GGUF_LIBRARIES
from awq_pycuda.capturing.gguf_file import GgufFile

LIBRARIES = ("torch", "transformers")
_CAUSAL = "causal language models, which predict each token from those before it"


@dataclass(frozen=True)
class Loaded:
    """A model in float32 on the CPU, set to evaluation, with what its files say about it."""

    model: Any
    """The base model: without a head, where its class has one."""
    causal: Any | None
    """The causal language model around it, where that was asked for."""
    tokenizer: Any
    absent: dict[str, str]
    """Parameters and buffers that the files do not give, by name, each with what the files do instead."""
    heads: list[str]
    """Tensors of the files that only a head would take up, such as a language model's."""
    said: list[str]
    """What is to be said of the files, line by line."""
    attributes: dict[str, str]
    """What a layer file notes of the files."""


@dataclass(frozen=True)
class _Report:
    """What became of the tensors of the files, before the loader ties, makes up and leaves unsaid."""

    stored: dict[str, Stored]
    missing: set[str]
    unexpected: set[str]
    mismatched: dict[str, tuple[Any, Any]]


def load(path: Path, causal: bool = False) -> Loaded:
    """Load model and tokenizer from a folder or a GGUF file alone, where ``causal`` with a language model's head.

    Raises `Fault` for one that cannot be loaded, and for weights that are not all of the model's: adapters, quantized
    weights other than GGUF's, tensors that the model does not take up though they stand where they would change it;
    where ``causal`` also for one that is no causal language model, or lacks any of its weights.
    """
    find_libraries()
    torch, transformers = map(importlib.import_module, LIBRARIES)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        source = _open(path)
        with source.arguments() as arguments:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                **arguments, local_files_only=True, trust_remote_code=False
            )
            model, report = _load_model(source, arguments, None, causal)
            heads = list(_heads(model)) if report.unexpected else []
            tied = _tied_to_heads(model, heads, report)
            if tied:
                model, report = _load_model(source, arguments, tied, causal)
        unused = _judge_unexpected(model, set().union(*map(source.of_head, heads)), report)
        absent = _find_absent(model, report)
        said = source.describe(model)
    except Fault:
        raise
    except MemoryError as error:
        raise Fault("model", "does not fit into memory", "a model that does, in float32") from error
    except Exception as error:
        # Its loaders raise whatever a damaged or foreign file makes them stumble over.
        raise Fault("model", f"cannot be loaded ({type(error).__name__}: {one_line(error)})") from error
    if not tokenizer.is_fast:
        raise Fault("model", "its tokenizer has no tokenizer.json")
    for name, tensor in model.named_parameters():
        if tensor.dtype != torch.float32 and tensor.is_floating_point():
            raise Fault("model", f"keeps {name} in {tensor.dtype}, where float32 was asked for")
    if not causal:
        return Loaded(model.eval(), None, tokenizer, absent, unused, said, source.attributes())
    base = model.base_model
    if base is model:  # a few classes name a prefix that their base model does not have
        base = next((part for part in model.children() if isinstance(part, transformers.PreTrainedModel)), None)
    if base is None:
        raise Fault("model", "its class keeps its head and its layers in one", _CAUSAL)
    within = next(f"{name}." for name, module in model.named_modules() if module is base)
    # What the base model lacks goes first: files without a head are those of another kind of model.
    for name, what in sorted(absent.items(), key=lambda each: not each[0].startswith(within)):
        if name.startswith(within):
            raise Fault("model", f"its weights {what}, which was made up")
        raise Fault(
            "model", f"is no causal language model: its weights {what}, of the head, which was made up", _CAUSAL
        )
    return Loaded(base, model.eval(), tokenizer, absent, unused, said, source.attributes())


def _open(path: Path) -> Folder | GgufFile:
    if path.is_dir():
        return Folder(path)
    for library in GGUF_LIBRARIES:
        _import(library)
    return GgufFile(path)


def find_libraries() -> None:
    """Refuse a model where what loads it is missing. Raises `Fault`."""
    # Read by transformers at import: nothing may be looked for elsewhere.
    os.environ["HF_HUB_OFFLINE"] = "1"
    for library in LIBRARIES:
        _import(library)


def _import(library: str) -> Any:
    # Found by name and at need: bad arguments are told at once, and nothing else here depends on these libraries.
    try:
        return importlib.import_module(library)
    except ImportError as error:
        what = f"to load it, {library} is missing ({one_line(error)})"
        raise Fault("model", what, "after pip install -r requirements-capture.txt") from error


def _load_model(
    source: Folder | GgufFile, arguments: dict[str, Any], key_mapping: dict[str, str] | None, causal: bool
) -> tuple[Any, _Report]:
    """Load the model as transformers does, with the loader's report as it stood before it was tidied."""
    torch, transformers = map(importlib.import_module, LIBRARIES)
    base = transformers.PreTrainedModel
    load_files = base._load_pretrained_model
    reports = []
    kind, config = _find_causal(transformers, arguments) if causal else (transformers.AutoModel, {})

    def load_and_note(model: Any, state: Any, files: Any, *args: Any, **kwargs: Any) -> Any:
        stored = source.read_stored(files)
        info, offload = load_files(model, state, files, *args, **kwargs)
        for name, error in info.conversion_errors.items():
            raise Fault("model", f"{name} cannot be made of its weights ({error.splitlines()[-1]})")
        mismatched = {name: (tuple(found), tuple(needed)) for name, found, needed in info.mismatched_keys}
        unexpected = set(info.unexpected_keys) | source.find_dropped(model)
        reports.append(_Report(stored, set(info.missing_keys), unexpected, mismatched))
        return info, offload

    with mock.patch.object(base, "_load_pretrained_model", load_and_note):
        model = kind.from_pretrained(
            **arguments,
            **config,
            **source.model_arguments(),
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            key_mapping=key_mapping,
            ignore_mismatched_sizes=True,
            # The experts' own forward, one after the other: it shows what goes into each.
            experts_implementation="eager",
        )
    (report,) = reports
    return model, report


def _find_causal(transformers: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class that loads causal language models, with the configuration, read to tell whether the model is one.

    Raises `Fault` where it is none.
    """
    kind = transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.from_pretrained(**arguments, local_files_only=True, trust_remote_code=False)
    if type(config) not in kind._model_mapping:
        raise Fault("model", f"is no causal language model ({config.model_type})", _CAUSAL)
    return kind, {"config": config}


def _heads(model: Any) -> Iterator[Any]:
    """The models with heads that can be built on a model of this kind, without memory for their weights.

    The class that the configuration names as the one that was saved comes first.
    """
    torch, transformers = map(importlib.import_module, LIBRARIES)
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    classes: list[Any] = [getattr(transformers, name, None) for name in model.config.architectures or ()]
    for name, mapping in vars(auto).items():
        if name.startswith("MODEL_") and type(model.config) in getattr(mapping, "keys", tuple)():
            found = mapping[type(model.config)]
            classes.extend(found if isinstance(found, tuple) else (found,))
    seen: set[Any] = {type(model), None}
    for kind in classes:
        if kind in seen or not issubclass(kind, transformers.PreTrainedModel):
            continue
        seen.add(kind)
        try:
            with torch.device("meta"):
                yield kind(copy.deepcopy(model.config))
        except Exception:
            continue  # a head that this configuration has no settings for explains nothing


def _without_prefix(name: str, model: Any) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else name


def _tied_to_heads(model: Any, heads: list[Any], report: _Report) -> dict[str, str]:
    """The renamings by which a head's tensor in the files gives the one that the configuration ties to it."""
    for head in heads:
        for target, source in getattr(head, "all_tied_weights_keys", {}).items():
            needed = _without_prefix(source, head)
            if target in report.unexpected and needed in report.missing:
                return {f"^{re.escape(target)}$": needed}
    return {}


def _judge_unexpected(model: Any, of_heads: set[str], report: _Report) -> list[str]:
    """The tensors that only heads take up; raises `Fault` for any other that the model leaves aside.

    Harmless are also the tensors that the model's own class names as superseded, such as masks and positions that
    former versions stored.
    """
    superseded = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    superseded += [re.compile(r"(^|\.)position_ids$"), re.compile(r"rotary_emb\.inv_freq$")]
    unused = []
    harmless = set()
    for name in sorted(report.unexpected):
        if name in of_heads:
            unused.append(name)
        elif looks_coded(name) or not any(pattern.search(name) for pattern in superseded):
            raise Fault("model", f"its weights hold {describe_foreign(name)}, which the model does not take up")
        harmless.add(_without_prefix(name, model))
    harmless |= {name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    check_dtypes(report.stored, {name for name in report.stored if _without_prefix(name, model) in harmless})
    return unused


def _find_absent(model: Any, report: _Report) -> dict[str, str]:
    """The model's tensors that are neither in the files nor the same memory as one that is."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    absent = {name: f"lack {name}" for name in report.missing}
    for name, (found, needed) in report.mismatched.items():
        absent[name] = f"hold {name} as {found} where the model needs {needed}"
    given = {tensors[name].data_ptr() for name in model.state_dict() if name in tensors and name not in absent}
    return {name: what for name, what in absent.items() if name in tensors and tensors[name].data_ptr() not in given}
