"""The shapes that are measured."""

from __future__ import annotations

from dataclasses import dataclass

from awq_pycuda.kernels.work import WORK, Sizes, Work


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
        size = self.in_features if self.group_size is None else min(self.group_size, self.in_features)
        groups = -(-self.in_features // size)
        return WORK[stage](Sizes(self.tokens, self.out_features, self.in_features, groups, self.candidates))
