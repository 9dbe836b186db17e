"""The tools' own search and quantizer, each run on one layer: PyTorch on the CPU, in float32.

Nothing of a tool is written again here: its functions are imported and called on a `Linear` that has the layer's
weights, and watched for what they hold at each trial. What only a GPU can do is left out, and said where it is.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tool_watch import Array, Searched, numbers, returned, watched

from awq_pycuda.choices import Formula
from awq_pycuda.errors import InputError
from awq_pycuda.quant.format import Format


class Codes(NamedTuple):
    """(N, K) codes, (N, groups) steps and zero points, stored as `Format` says: integers less half of their codes."""

    codes: Array
    steps: Array
    zeros: Array | None


class Tool(ABC):
    """A tool in one format, with one formula.

    Attributes:
        package: its name in the package index.
        module: that holds the search.
        formulas: that it has, its default first.
        rounding: what float32 may leave of the errors that it computes, relative.
    """

    package: str
    module: str
    rounding: float = 1e-6
    formulas: tuple[Formula, ...] = (Formula.plain,)

    def __init__(self, form: Format, formula: Formula) -> None:
        import torch

        self.torch, self.form, self.formula = torch, form, formula
        self.at = importlib.import_module(self.module)

    @classmethod
    def find(cls, source: Path | None) -> str:
        """Makes the tool's modules those of a folder, or else the installed package's; says which they are.

        Raises an InputError where there is no package.
        """
        if source is None:
            try:
                return f"{cls.package} {version(cls.package)}"
            except PackageNotFoundError:
                raise InputError(f"{cls.package}: not installed; allowed: its package, or --source") from None
        sys.path.insert(0, str(source.resolve()))
        return f"{cls.package} from {source.resolve().name}"

    @classmethod
    def refusal(cls, form: Format) -> str | None:
        """Why the tool does not have a format, as far as it is not its own word."""
        return None

    @abstractmethod
    def search(self, w: Array, x: Array) -> Searched:
        """Searches the scales of one layer: (N, K) weights, (M, K) activations."""

    @abstractmethod
    def quantize(self, scaled: Array) -> Codes:
        """Quantizes (N, K) scaled weights."""

    def clip(self, scaled: Array, x: Array) -> Array | None:
        """The largest magnitudes that clipping leaves to groups: (N, groups); None where the tool has none.

        Args:
            scaled: (N, K) scaled weights.
            x: (M, K) activations, divided by the scales.
        """
        return None

    def product(self, x: Array, w: Array) -> Array:
        """`X·Wᵀ` as the tool makes it: (M, N) from (M, K) activations and (N, K) weights."""
        torch = self.torch
        return numbers(torch.nn.functional.linear(torch.from_numpy(x), torch.from_numpy(w)))

    def linear(self, w: Array) -> Any:
        """The layer, with weights of its own."""
        made = self.torch.nn.Linear(w.shape[1], w.shape[0], bias=False).requires_grad_(False)
        made.weight.copy_(self.torch.from_numpy(w))
        return made

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Within it `.cpu()` copies, as it does of a tensor on a GPU.

        On a CPU AutoAWQ and GPTQModel 7.3.4 else scale the weights that they are to restore after each trial.
        """
        tensor = self.torch.Tensor
        plain = tensor.cpu
        tensor.cpu = lambda of: plain(of).clone()
        try:
            yield
        finally:
            tensor.cpu = plain

    def codes(self, dequantized: Any, steps: Any, zeros: Any | None) -> Codes:
        """Codes of what a pseudo-quantizer returns: (N, K) dequantized weights, (N, groups) steps and zero points."""
        by_group = numbers(dequantized).reshape(*steps.shape, -1)
        codes = np.rint(by_group / numbers(steps)[..., None])
        if zeros is None or self.form.symmetric:
            return Codes(codes.reshape(dequantized.shape), numbers(steps), None)
        offsets = numbers(zeros) - self.form.middle
        return Codes((codes + offsets[..., None]).reshape(dequantized.shape), numbers(steps), offsets)


class LlmAwq(Tool):
    """llm-awq, from a source folder: its search is within `auto_scale_block`, which knows blocks by their classes."""

    package, module = "llm-awq", "awq.quantize.auto_scale"

    @classmethod
    def find(cls, source: Path | None) -> str:
        sys.modules["awq_inference_engine"] = types.ModuleType("awq_inference_engine")  # CUDA kernels
        return super().find(source)

    @classmethod
    def refusal(cls, form: Format) -> str | None:
        return "its symmetric branch ends in an UnboundLocalError" if form.symmetric else None

    def _size(self) -> int:
        return self.form.group_size or -1

    def search(self, w: Array, x: Array) -> Searched:
        torch = self.torch
        opt = importlib.import_module("transformers.models.opt.modeling_opt").OPTDecoderLayer
        small = self.form.group_size or 8
        # An OPT block, the layer as its fc1: that is searched alone, on its own output. All else is as small as can be.
        block = opt.__new__(opt)
        torch.nn.Module.__init__(block)
        block.self_attn = torch.nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(block.self_attn, name, self.linear(np.eye(2, small, dtype=np.float32)))
        block.self_attn.forward = block.self_attn.q_proj.forward
        block.self_attn_layer_norm, block.final_layer_norm = torch.nn.Identity(), torch.nn.Identity()
        block.fc1, block.fc2 = self.linear(w), self.linear(np.eye(2, small, dtype=np.float32))
        inputs = {name: torch.ones(1, small) for name in ("self_attn.q_proj", "self_attn.out_proj", "fc2")}
        inputs["fc1"] = torch.from_numpy(x)
        config = {"zero_point": not self.form.symmetric, "q_group_size": self._size()}
        with watched("_search_module_scale", "w_quantize_func") as searches:
            self.at.auto_scale_block(block, {}, self.form.bits, config, inputs)
        return searches[2]

    def quantize(self, scaled: Array) -> Codes:
        quantizer = importlib.import_module("awq.quantize.quantizer")
        found = quantizer.pseudo_quantize_tensor(
            self.torch.from_numpy(scaled), self.form.bits, not self.form.symmetric, self._size(), get_scale_zp=True
        )
        return self.codes(*found)

    def clip(self, scaled: Array, x: Array) -> Array:
        found = importlib.import_module("awq.quantize.auto_clip").auto_clip_layer(
            self.torch.from_numpy(scaled),
            self.torch.from_numpy(x),
            self.form.bits,
            {"zero_point": not self.form.symmetric, "q_group_size": self.form.size(scaled.shape[1])},
        )
        return numbers(found)[..., 0]


class AutoAwq(Tool):
    """AutoAWQ: a quantizer without a model, with what its constructor sets."""

    package, module = "autoawq", "awq.quantize.quantizer"
    formulas = (Formula.duo, Formula.plain)

    def _quantizer(self, channels: int) -> Any:
        made = object.__new__(self.at.AwqQuantizer)
        made.w_bit, made.zero_point = self.form.bits, not self.form.symmetric
        made.group_size = self.form.size(channels)  # its -1 fails with duo; all channels say the same
        made.duo_scaling, made.n_parallel_calib_samples = self.formula is Formula.duo, None
        made.max_chunk_memory = 1024**3
        return made

    def search(self, w: Array, x: Array) -> Searched:
        layer = self.linear(w)
        with watched("_compute_best_scale", "pseudo_quantize_tensor") as searches, self.copying():
            self._quantizer(w.shape[1])._search_best_scale(layer, layer, [layer], self.torch.from_numpy(x))
        return searches[0]

    def quantize(self, scaled: Array) -> Codes:
        quantizer = self._quantizer(scaled.shape[1])
        return self.codes(*quantizer.pseudo_quantize_tensor(self.torch.from_numpy(scaled)))

    def clip(self, scaled: Array, x: Array) -> Array:
        quantizer = self._quantizer(scaled.shape[1])
        return numbers(quantizer._compute_best_clip(self.torch.from_numpy(scaled), self.torch.from_numpy(x)))[..., 0]


class GptqModel(Tool):
    """GPTQModel: a processor without a model, with what its constructor sets."""

    package, module = "gptqmodel", "gptqmodel.looper.awq_processor"
    formulas = (Formula.duo, Formula.plain)

    def _processor(self) -> Any:
        made = object.__new__(self.at.AWQProcessor)
        made.qcfg = types.SimpleNamespace(
            bits=self.form.bits, group_size=self.form.group_size or -1, sym=self.form.symmetric
        )
        made.duo_scaling, made.max_chunk_memory = self.formula is Formula.duo, 1024**3
        made.gptq_model = types.SimpleNamespace(rotary_embedding=None)
        made.model, made._scale_context = None, threading.local()
        made._quant_batch_size, made._module_forward_kwargs = None, {}
        return made

    def search(self, w: Array, x: Array) -> Searched:
        layer = self.linear(w)
        with watched("_compute_best_scale", "_pseudo_quantize_tensor_into") as searches, self.copying():
            self._processor()._search_best_scale(layer, layer, [layer], self.torch.from_numpy(x))
        return searches[0]

    def quantize(self, scaled: Array) -> Codes:
        return self.codes(*self._processor().pseudo_quantize_tensor(self.torch.from_numpy(scaled)))

    def clip(self, scaled: Array, x: Array) -> Array:
        found = self._processor()._compute_best_clip(self.torch.from_numpy(scaled), self.torch.from_numpy(x))
        return numbers(found)[..., 0]


class TorchAo(Tool):
    """torchao: its observer with the int4 weights that run on a CPU."""

    package, module = "torchao", "torchao.prototype.awq.core"
    rounding = 5e-6  # its int4 kernel sums in an order of its own: 3e-6 off an error in float64, PyTorch's product 1e-6

    @classmethod
    def refusal(cls, form: Format) -> str | None:
        if form.bits == 4 and not form.symmetric and form.group_size in (32, 64, 128):
            return None
        return "on a CPU its AWQ has int4 with zero points in groups of 32, 64 or 128"

    def _config(self) -> Any:
        int4 = importlib.import_module("torchao.prototype.quantization.int4")
        return int4.PrototypeInt4WeightOnlyConfig(group_size=self.form.group_size, set_inductor_config=False)

    def search(self, w: Array, x: Array) -> Searched:
        torch = self.torch
        observer = self.at.AWQObserver(torch.from_numpy(w.copy()), None, self._config())
        observer(torch.from_numpy(x), None)
        with watched("calculate_qparams", "from_hp") as searches, torch.no_grad():
            observer.calculate_qparams()
        return searches[0]

    def quantize(self, scaled: Array) -> Codes:
        module = self.torch.nn.Module()
        module.weight = self.torch.from_numpy(scaled)
        transform = importlib.import_module("torchao.quantization.transform_module")._QUANTIZE_CONFIG_HANDLER
        with returned("from_hp") as held:
            transform[type(self._config())](module, self._config())
        steps, zeros = (numbers(held[name]) for name in ("scale", "zero_point"))
        return Codes(numbers(held["int_data"]) - self.form.middle, steps, zeros)


class LlmCompressor(Tool):
    """llm-compressor: its modifier on a model of a gain of 1 and the layer, calibrated by one batch."""

    package, module = "llmcompressor", "llmcompressor.modifiers.transform.awq"
    formulas = (Formula.duo, Formula.plain, Formula.both)

    @classmethod
    def find(cls, source: Path | None) -> str:
        os.environ |= {"TQDM_DISABLE": "1", "LLM_COMPRESSOR_LOG_DISABLED": "true"}
        return f"{super().find(source)} with compressed-tensors {version('compressed-tensors')}"

    def _model(self, w: Array) -> Any:
        torch = self.torch
        quantization = importlib.import_module("compressed_tensors.quantization")

        class Gain(torch.nn.Module):  # type: ignore[misc, name-defined]
            """What the tool would divide by the scales; its output is its input."""

            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(w.shape[1]), requires_grad=False)

            def forward(self, x: Any) -> Any:
                return x * self.weight

        model = torch.nn.Sequential()
        model.add_module("gain", Gain())
        model.add_module("layer", self.linear(w))
        grouped = {"strategy": "group", "group_size": self.form.group_size}
        arguments = quantization.QuantizationArgs(
            num_bits=self.form.bits,
            symmetric=self.form.symmetric,
            **(grouped if self.form.group_size else {"strategy": "channel"}),
        )
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
        quantization.initialize_module_for_quantization(model.layer, scheme)
        return model.apply(quantization.disable_quantization)  # of its forward, as the tool does until it calibrates

    def search(self, w: Array, x: Array) -> Searched:
        torch = self.torch
        core = importlib.import_module("llmcompressor.core")
        cache = importlib.import_module("llmcompressor.pipelines.cache").IntermediatesCache
        cache.pin_memory = lambda *_: None  # fails where there is no GPU
        model = self._model(w)
        duo = {Formula.duo: True, Formula.plain: False, Formula.both: "both"}[self.formula]
        mapping = self.at.AWQMapping("re:.*gain", ["re:.*layer"])
        modifier = self.at.AWQModifier(mappings=[mapping], duo_scaling=duo)
        with core.create_session() as session, torch.no_grad():
            session.state.model = model
            modifier.on_initialize(session.state)
            modifier.on_calibration_start(session.state, None)
            model(torch.from_numpy(x))
            with watched("_compute_best_scale", "_compute_loss") as searches:
                modifier._apply_smoothing(model)
            modifier.remove_hooks()
        return searches[0]

    def quantize(self, scaled: Array) -> Codes:
        quantization = importlib.import_module("compressed_tensors.quantization")
        calibration = importlib.import_module("llmcompressor.modifiers.quantization.calibration")
        layer = self._model(scaled).layer
        calibration.initialize_observer(layer, "weight")
        calibration.observe(layer, "weight")
        calibration.update_qparams(layer, "weight")
        steps, zeros = layer.weight_scale, layer.weight_zero_point
        codes = quantization.quantize(layer.weight, steps, zeros, layer.quantization_scheme.weights)
        return Codes(numbers(codes), numbers(steps), None if self.form.symmetric else numbers(zeros))
