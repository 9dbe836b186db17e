"""Where the weights of a model's layers lie, and the model with others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from awq_pycuda.capturing.experts import Expert, weight_of
from awq_pycuda.capturing.probing import Plan

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Place:
    """A layer's weight within a model.

    `holder` has it as the parameter of that `name`: alone, with rows and columns exchanged where `transposed`, as
    transformers' Conv1D keeps them; or, of an expert in a stack, beside those of the others, laid out as `like`.
    """

    holder: Any
    name: str
    transposed: bool = False
    expert: Expert | None = None
    like: Any = None

    @property
    def parameter(self) -> Any:
        """The whole parameter, as the model has it now."""
        return getattr(self.holder, self.name)

    @property
    def view(self) -> Any:
        """(out_features, in_features), the memory of the model."""
        if self.expert is not None:
            return weight_of(self.holder, self.expert, self.like)
        found = self.parameter.detach()
        return found.T if self.transposed else found

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = self.view.shape
        return int(rows), int(columns)

    def read(self) -> Array:
        """The weight as the model has it now, (out_features, in_features), a copy."""
        return np.array(self.view.cpu().numpy(), np.float32, order="C")


def places_of(model: Any, plan: Plan) -> dict[str, Place]:
    """Where the weights of a plan's layers lie, by path, in the order in which the layers run."""
    found = {}
    for name in plan.order:
        if name in plan.layers:
            module = plan.layers[name]
            found[name] = Place(module, "weight", transposed=not hasattr(module, "in_features"))
            continue
        for expert in plan.experts[name]:
            like = plan.examples[expert.stack, expert.parameter]
            found[expert.name] = Place(model.get_submodule(expert.stack), expert.parameter, False, expert, like)
    return found


@contextmanager
def replaced(places: Mapping[str, Place], weight: Callable[[str], Array | None]) -> Iterator[None]:
    """Within it a model has other weights in these places.

    Every parameter that holds one is replaced by one of its own, so that what else shares it, such as an embedding,
    stays as it is, and afterwards the model has its own parameters again, not copies of them.

    Args:
        places: by path.
        weight: gives the (out_features, in_features) weight of a path, or None: as it is.
    """
    before: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    try:
        for path, place in places.items():
            found = weight(path)
            if found is None:
                continue
            key = (id(place.holder), place.name)
            if key not in before:
                own = place.parameter
                before[key] = place.holder, place.name, own
                setattr(place.holder, place.name, torch.nn.Parameter(own.detach().clone(), requires_grad=False))
            place.view.copy_(torch.from_numpy(found))
        yield
    finally:
        for holder, name, own in before.values():
            setattr(holder, name, own)
