"""The shapes that are measured."""

from __future__ import annotations

from dataclasses import dataclass

from awq_pycuda.kernels.work import WORK, Sizes, Work
from awq_pycuda.quant.format import Format


@dataclass(frozen=True)
class Shape:
    """A layer's shape, how many candidates are searched, and how its rows are quantized (None: in one group)."""

    tokens: int
    out_features: int
    in_features: int
    candidates: int = 5
    group_size: int | None = None

    def __str__(self) -> str:
        return f"{self.out_features} x {self.in_features}, {self.tokens} tokens"

    def work(self, stage: str) -> Work:
        """What a stage must do at the least on such a layer."""
        groups = Format(self.group_size).groups(self.in_features)
        return WORK[stage](Sizes(self.tokens, self.out_features, self.in_features, groups, self.candidates))
