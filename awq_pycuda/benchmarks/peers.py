"""The same in PyTorch, eager and compiled, and by the libraries behind it: what our kernels are compared with.

PyTorch is imported late and only here: a benchmark without it has no peers, and says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from awq_pycuda.benchmarks.cases import case_of
from awq_pycuda.benchmarks.oracle import Exact
from awq_pycuda.benchmarks.passes import PASS, chain_weights, pass_work
from awq_pycuda.benchmarks.places import KERNELS
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.benchmarks.streams import on_stream
from awq_pycuda.benchmarks.subjects import Key, Subject, Verdict, unwritten, verdict
from awq_pycuda.kernels.work import Unit, Work
from awq_pycuda.quant.conventions import Convention

EAGER, COMPILED = "eager", "compiled"
LIBRARIES = "libraries"
CHOICES = (EAGER, COMPILED, LIBRARIES)
# A peer is a yardstick, not under test: it adds up as it likes. What is further off computes something else.
_SLACK = 100

Tensors = dict[str, Any]


class TorchSubject:
    """A function of tensors that leaves tensors by the names of a case's arrays."""

    passes = 1

    def __init__(
        self,
        key: Key,
        work: Work,
        unit: Unit,
        given: Callable[[Exact], dict[str, Any]],
        function: Callable[..., Tensors],
        judge: Callable[[Exact, dict[str, Any]], Verdict],
        device: str,
        stream: int | None,
    ) -> None:
        self.key, self.work, self.unit = key, work, unit
        self._given, self._function, self._judge, self._device = given, function, judge, device
        self._stream = stream
        self._exact: Exact | None = None
        self._tensors: Tensors = {}
        self._left: Tensors | None = None

    def fill(self, exact: Exact) -> None:
        """See `Subject.fill`; in place where there are tensors already."""
        import torch

        for name, values in self._given(exact).items():
            fresh = torch.from_numpy(np.ascontiguousarray(values))
            if name in self._tensors:
                self._tensors[name].copy_(fresh)
            else:
                self._tensors[name] = fresh.to(self._device, copy=True)
        self._exact = exact

    def poison(self) -> None:
        """See `Subject.poison`: PyTorch makes new tensors for what it leaves."""
        self._left = None

    def launch(self) -> None:
        """See `Subject.launch`."""
        import torch

        with torch.inference_mode(), on_stream(self._stream):
            self._left = self._function(**self._tensors)

    def judge(self) -> Verdict:
        """See `Subject.judge`."""
        assert self._exact is not None
        assert self._left is not None
        if self._stream is not None:
            import torch

            torch.cuda.synchronize()
        return self._judge(self._exact, {name: value.cpu().numpy() for name, value in self._left.items()})


class Peers:
    """The peers that are there and wanted.

    Args:
        wanted: of `CHOICES`.
        device: as PyTorch names it.
    """

    def __init__(self, wanted: Sequence[str], device: str) -> None:
        self.absent: list[str] = []
        self._wanted, self._device = wanted, device
        self._there = bool(wanted) and self._find(device)
        self._stream: int | None = None

    def use_stream(self, stream: int | None) -> None:
        """Launches on this stream from now on; None: on PyTorch's own."""
        self._stream = stream

    def versions(self) -> dict[str, str]:
        """Of the library that the peers are made with."""
        if not self._there:
            return {}
        import torch

        return {"torch": str(torch.__version__)}

    def ceilings(self) -> list[Subject]:
        """The rates of the library behind PyTorch: what a peer reaches is no more than possible."""
        if not self._there:
            return []
        from awq_pycuda.benchmarks import torch_stages

        return torch_stages.ceilings(self._device, self._stream)

    def _find(self, device: str) -> bool:
        try:
            import torch
        except ImportError as error:
            self.absent.append(f"PyTorch and what is behind it: {error}")
            return False
        if device == "cuda" and not torch.cuda.is_available():
            self.absent.append("PyTorch and what is behind it: this build of PyTorch finds no GPU")
            return False
        torch.backends.cuda.matmul.allow_tf32 = False
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # they are left out on purpose
        return True

    def kernels(self, stage: str, shape: Shape, convention: Convention) -> list[Subject]:
        """What does a stage."""
        if not self._there:
            return []
        from awq_pycuda.benchmarks import torch_stages

        function = torch_stages.stage_function(stage, convention)
        if function is None:
            return []
        case = case_of(stage)

        def judged(exact: Exact, left: dict[str, Any]) -> Verdict:
            if reason := unwritten({name: left[name] for name in case.left}):
                return Verdict(reason=reason)
            return verdict(case.judge(exact, left, left.get("sums")), _SLACK)

        def given(exact: Exact) -> dict[str, Any]:
            return {name: exact.given(name) for name in case.given}

        found = self._ways(Key(KERNELS, stage, "", "", shape), shape.work(stage), given, function, judged)
        if stage == "dequantizeTiled" and LIBRARIES in self._wanted and self._device == "cuda":
            found += self._products(shape)
        return found

    def passes(self, shape: Shape, convention: Convention, layers: int) -> list[Subject]:
        """What does a whole pass."""
        if not self._there:
            return []
        from awq_pycuda.benchmarks import torch_stages

        def given(exact: Exact) -> dict[str, Any]:
            return {"x": exact.x} | {f"w{index}": w for index, w in enumerate(chain_weights(exact, layers))}

        def judged(_: Exact, left: dict[str, Any]) -> Verdict:
            return Verdict(reason=unwritten(left))

        key = Key(PASS, PASS, f"{layers} layers", "", shape)
        return self._ways(key, pass_work(shape, layers), given, torch_stages.pass_function(convention), judged)

    def _ways(
        self,
        key: Key,
        work: Work,
        given: Callable[[Exact], dict[str, Any]],
        function: Callable[..., Tensors],
        judged: Callable[[Exact, dict[str, Any]], Verdict],
    ) -> list[Subject]:
        """A function of tensors, eager and compiled."""
        import torch

        ways = [(EAGER, function)] if EAGER in self._wanted else []
        if COMPILED in self._wanted:
            ways.append((COMPILED, torch.compile(function, dynamic=False)))
        return [
            TorchSubject(replace(key, by=f"torch {how}"), work, "fp32", given, made, judged, self._device, self._stream)
            for how, made in ways
        ]

    def _products(self, shape: Shape) -> list[Subject]:
        """The product alone, by cuBLAS: of dequantized weights in fp32 and fp16, and of int8 codes."""
        from awq_pycuda.benchmarks import torch_stages

        m, n, k = shape.tokens, shape.out_features, shape.in_features
        return [
            TorchSubject(
                Key(KERNELS, "dequantizeTiled", "", f"cuBLAS {name}", shape),
                Work(each.bytes * (m * k + n * k), each.bytes_out * m * n, 2 * m * n * k),
                each.unit,
                each.given,
                each.function,
                each.judge,
                self._device,
                self._stream,
            )
            for name, each in torch_stages.PRODUCTS.items()
            if name != "int8" or (m > 16 and k % 8 == 0 and n % 8 == 0)
        ]
