"""Captures the linear layers of a Hugging Face model, with the activations that a text sends into them.

``python -m awq_pycuda.capture model=FOLDER text=FILE out=layers.h5 tokens=512`` writes a file for ``inputs=file``.
Works on the CPU and from local files alone. Needs what ``requirements-capture.txt`` names.
"""

import enum
import hashlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from awq_pycuda.errors import InputError
from awq_pycuda.layer_files import MAX_MAGNITUDE, describe_layers, find_fault
from awq_pycuda.layer_writer import LayerWriter
from awq_pycuda.options import REQUIRED, SYNTAX, describe, member, nonempty, option, parse, refusal, serve, whole


class Dtype(enum.Enum):
    """Dtypes that a layer file may have."""

    float32 = np.float32
    float16 = np.float16


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line sets."""

    model: str = option(
        "FOLDER",
        "folder of the model: config.json, weights and tokenizer.json",
        "a folder with config.json, weights and tokenizer.json",
        nonempty,
        REQUIRED,
    )
    text: str = option("FILE", "UTF-8 text to run through it", "a file of UTF-8 text", nonempty, REQUIRED)
    out: str = option(
        "FILE.h5",
        "file to write; an existing one is replaced, once the new one is whole",
        "a file name that ends in .h5 or .hdf5, in an existing folder that can be written",
        nonempty,
        REQUIRED,
    )
    tokens: int = option(
        "NUMBER",
        "rows of activations per layer; the model's own special tokens count, padding never occurs",
        "whole numbers of at least 1",
        whole(minimum=1),
        512,
    )
    dtype: Dtype = option(
        "NAME", "dtype of the file", ", ".join(dtype.name for dtype in Dtype), member(Dtype), Dtype.float32
    )
    include: str = option(
        "REGEX",
        "only the layers in whose module path this is found, such as include='attention|layer.0'",
        "a regular expression that finds the path of at least one linear layer",
        str,
        "",
    )


USAGE = f"""\
Usage: python -m awq_pycuda.capture model=FOLDER text=FILE out=FILE.h5 [key=value ...]

Runs a text through a local Hugging Face model on the CPU and writes the weight, the bias and the input activations
of every linear layer, in the order in which they run, to an HDF5 file for `awq_pycuda.run inputs=file`.

{describe(Options)}
{SYNTAX}
Needs torch and transformers: pip install -r requirements-capture.txt
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with its arguments (default: the process's); the exit code is returned.

    Bad input ends in one line on stderr and exit code 2, with nothing written.
    """
    return serve(sys.argv[1:] if arguments is None else arguments, USAGE, _work)


def _work(arguments: Sequence[str]) -> int:
    options, _ = parse(Options, arguments)
    _check_options(options)
    for name, reason in capture(options).items():
        print(f"left out: {name} ({reason})", file=sys.stderr)
    _print_summary(Path(options.out))
    return 0


def capture(options: Options) -> dict[str, str]:
    """Write the layer file; the linear layers left out are returned, each with the reason.

    A layer is left out where its input is not one row per token of each window: one that never runs, that sees a
    pooled or a routed selection of the tokens, or that runs in some windows only. Of a layer that runs more than once
    a window, the first run counts. Raises `InputError` where model and text do not yield what the options ask for.
    """
    text = _read_text(options.text)
    model, tokenizer, unset = _load_model(options.model)
    linears = _find_linears(model)
    chosen = {name: module for name, module in linears.items() if re.search(options.include, name)}
    if not chosen:
        what = "finds no linear layer" if linears else f"finds nothing, for {options.model} has no linear layers"
        raise _refuse("include", options.include, what)
    windows = _split_windows(options, model, tokenizer, text)
    try:
        with LayerWriter(Path(options.out), options.dtype.value) as writer:
            recorder = _Recorder(writer, options, chosen)
            recorder.run(model, windows)
            skipped = recorder.finish(unset)
            writer.set_attributes(
                {
                    "model": Path(options.model).resolve().name,
                    "model_type": model.config.model_type,
                    "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
                    "tokens": options.tokens,
                    **{f"{library}_version": str(sys.modules[library].__version__) for library in _LIBRARIES},
                },
            )
    except OSError as error:
        raise _refuse("out", options.out, f"cannot be written ({_one_line(error)})") from error
    return skipped


_LIBRARIES = ("torch", "transformers")
_NOT_ALWAYS = "does not run in every window"


class _Recorder:
    """Streams the inputs of the layers chosen into a writer while the model runs."""

    def __init__(self, writer: LayerWriter, options: Options, chosen: dict[str, Any]) -> None:
        self._writer = writer
        self._options = options
        self._chosen = chosen
        self._ids: dict[str, str] = {}
        self._skipped = dict.fromkeys(chosen, "never runs")
        self._window = 0
        self._length = 0
        self._seen: set[str] = set()

    def run(self, model: Any, windows: list[list[int]]) -> None:
        """Run the windows, (tokens,) ids each, one after the other as batches of one: no padding is needed."""
        torch = importlib.import_module("torch")
        hooks = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, module in self._chosen.items()
        ]
        try:
            for self._window, window in enumerate(windows):
                self._length = len(window)
                self._seen = set()
                ids = torch.tensor([window])
                with torch.no_grad():
                    model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (InputError, OSError):
            raise
        except Exception as error:
            # Whatever a model's code raises when it is not run as it should be, such as a decoder without its encoder.
            what = f"fails on the text alone ({type(error).__name__}: {_one_line(error)})"
            raise InputError(
                f"model={self._options.model}: {what}; allowed are models that need only token ids"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self, unset: set[str]) -> dict[str, str]:
        """Take the layers back that missed a token, and check that weights of the others came from the folder."""
        for name, layer_id in list(self._ids.items()):
            if self._writer.rows(layer_id) < self._options.tokens:
                self._writer.remove(layer_id)
                del self._ids[name]
                self._skipped.setdefault(name, _NOT_ALWAYS)
        for name in self._ids:
            if f"{name}.weight" in unset:
                raise _refuse("model", self._options.model, f"its weights lack {name}.weight, which was made up")
        if not self._ids:
            reasons = "; ".join(sorted(set(self._skipped.values())))
            raise _refuse("include", self._options.include, f"finds only layers that cannot be captured ({reasons})")
        return self._skipped

    def _hook(self, name: str) -> Any:
        def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in self._seen:
                return
            self._seen.add(name)
            (inputs,) = (*args, *kwargs.values())
            inputs = inputs.reshape(-1, inputs.shape[-1])
            if len(inputs) != self._length:
                self._skipped[name] = f"row count {len(inputs)} in a window of {self._length} tokens"
            elif name in self._ids or self._window == 0:
                self._record(name, module, inputs.detach().numpy())
            else:
                self._skipped[name] = _NOT_ALWAYS

        return record

    def _record(self, name: str, module: Any, inputs: NDArray[np.float32]) -> None:
        if name not in self._ids:
            weight = module.weight.detach().numpy()
            # transformers' Conv1D, a linear layer under another name, keeps (in_features, out_features).
            weight = weight if hasattr(module, "in_features") else weight.T
            bias = None if module.bias is None else module.bias.detach().numpy()
            self._check(name, "weight", weight)
            if bias is not None:
                self._check(name, "bias", bias)
            self._ids[name] = self._writer.add(name, weight, bias, self._options.tokens)
            self._skipped.pop(name, None)
        first = self._writer.rows(self._ids[name])
        rows = inputs[: self._options.tokens - first]
        self._check(name, "activations", rows, first)
        self._writer.append(self._ids[name], rows)

    def _check(self, name: str, tensor_name: str, array: NDArray[np.float32], first_row: int = 0) -> None:
        """Refuse what `awq_pycuda.layer_files.load_layers` would not read back."""
        dtype = self._options.dtype
        fault = find_fault(array, MAX_MAGNITUDE[tensor_name], first_row)
        if fault is not None:
            raise InputError(f"model={self._options.model}: {name} {tensor_name}{fault}")
        fault = find_fault(array, float(np.finfo(dtype.value).max), first_row)
        if fault is not None:
            raise InputError(f"dtype={dtype.name}: {name} {tensor_name}{fault}, or dtype=float32")


def _refuse(key: str, value: str, fault: str) -> InputError:
    return refusal(Options, key, value, fault)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _check_options(options: Options) -> None:
    model, text, out = Path(options.model), Path(options.text), Path(options.out)
    if not (model / "config.json").is_file():
        fault = "holds no config.json" if model.is_dir() else "is no folder"
        raise _refuse("model", options.model, fault)
    if not text.is_file():
        raise _refuse("text", options.text, "is no file")
    if out.suffix.lower() not in (".h5", ".hdf5"):
        raise _refuse("out", options.out, f"has the suffix {out.suffix!r}")
    if out.is_dir():
        raise _refuse("out", options.out, "is a folder")
    if not out.parent.is_dir():
        raise _refuse("out", options.out, f"the folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise _refuse("out", options.out, f"the folder {out.parent} cannot be written")
    try:
        re.compile(options.include)
    except re.error as error:
        raise _refuse("include", options.include, f"is no regular expression ({error})") from error


def _read_text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _refuse("text", path, f"cannot be read ({_one_line(error)})") from error
    if not text.strip():
        raise _refuse("text", path, "is empty")
    return text


def _import(library: str, model: str) -> Any:
    # Found by name and at need: bad arguments are told at once, and nothing else here depends on these libraries.
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise InputError(
            f"model={model}: to load it, {library} is missing ({_one_line(error)}); "
            "pip install -r requirements-capture.txt brings it"
        ) from error


def _load_model(folder: str) -> tuple[Any, Any, set[str]]:
    """Load model and tokenizer from a folder; the third is the names of parameters that its weights do not set."""
    # Read by transformers at import: nothing may be looked for elsewhere.
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch, transformers = (_import(library, folder) for library in _LIBRARIES)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # An absolute path is never taken for the name of a model on the hub.
    path = str(Path(folder).resolve())
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        model, report = transformers.AutoModel.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        # Its loaders raise whatever a damaged or foreign file makes them stumble over.
        raise _refuse("model", folder, f"cannot be loaded ({type(error).__name__}: {_one_line(error)})") from error
    if not tokenizer.is_fast:
        raise _refuse("model", folder, "its tokenizer has no tokenizer.json")
    return model.eval(), tokenizer, set(report["missing_keys"])


def _find_linears(model: Any) -> dict[str, Any]:
    torch = importlib.import_module("torch")
    conv1d = importlib.import_module("transformers.pytorch_utils").Conv1D
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | conv1d)}


def _split_windows(options: Options, model: Any, tokenizer: Any, text: str) -> list[list[int]]:
    """Cut the text into the windows, as token ids with the model's special ones, that give the tokens asked for."""
    # A window need not be longer than what is asked for, but holds at least one token of the text.
    longest = max(options.tokens, tokenizer.num_special_tokens_to_add() + 1)
    longest = min(longest, *_maximum_lengths(model, tokenizer))
    encoded = tokenizer(
        text, truncation=True, max_length=longest, return_overflowing_tokens=True, return_attention_mask=False
    )
    return list(_take_windows(options, encoded["input_ids"]))


def _maximum_lengths(model: Any, tokenizer: Any) -> Iterator[int]:
    yield tokenizer.model_max_length
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        yield positions


def _take_windows(options: Options, encoded: list[list[int]]) -> Iterator[list[int]]:
    tokens = 0
    for window in encoded:
        if tokens >= options.tokens:
            return
        tokens += len(window)
        yield window
    if tokens < options.tokens:
        raise InputError(
            f"tokens={options.tokens}: text={options.text} holds {tokens} tokens of this model; "
            f"allowed are 1 to {tokens}"
        )


def _print_summary(out: Path) -> None:
    layers = describe_layers(out)
    tail = f"{len(layers)} layers, {layers[0].tokens} tokens, {out.stat().st_size / 1e6:.1f} MB: {out}"
    if not sys.stdout.isatty():
        for layer in layers:
            print(f"{layer.name} {layer.out_features}x{layer.in_features}")
        print(tail)
        return
    table = Table("layer", "out_features", "in_features")
    for layer in layers:
        table.add_row(layer.name, str(layer.out_features), str(layer.in_features))
    console = Console()
    console.print(table)
    console.print(tail, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
