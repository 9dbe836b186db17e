"""Where a model's parameters are: in the layers captured, in layers left out, and in what is no linear layer."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from awq_pycuda.capturing.probing import Plan, find_linears


@dataclass(frozen=True)
class Account:
    """Shares of a model's parameters, from 0 to 1; parameters that two modules share count once."""

    captured: float
    left_out: dict[str, float]
    """By path of the linear layers and stacks of experts left out."""
    others: dict[str, float]
    """By class of the modules that are no linear layers, the largest first."""


def take_account(model: Any, plan: Plan, written: dict[str, int], left_out: dict[str, str]) -> Account:
    """Share of the parameters of a plan's layers that were ``written``, by path, and of all others."""
    total: int = sum(parameter.numel() for parameter in model.parameters())
    counted: set[int] = set()

    def take(parameter: Any) -> float:
        if parameter is None or id(parameter) in counted:
            return 0.0
        counted.add(id(parameter))
        size: int = parameter.numel()
        return size / total

    linears = find_linears(model)
    captured = sum(take(part) for name, module in linears.items() if name in written for part in module.parameters())
    for experts in plan.experts.values():
        for expert in experts:
            if expert.name in written:
                stack = model.get_submodule(expert.stack)
                captured += take(getattr(stack, expert.parameter))
                captured += take(getattr(stack, f"{expert.parameter}_bias", None))
    shares = {}
    for name in left_out:
        module = linears.get(name)
        parts = list(module.parameters()) if module is not None else [model.get_parameter(name)]
        shares[name] = sum(map(take, parts))
    others: dict[str, float] = defaultdict(float)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            others[type(module).__name__] += take(parameter)
    ranked = sorted(((kind, share) for kind, share in others.items() if share > 0), key=lambda item: -item[1])
    return Account(captured, shares, dict(ranked))


def percent(share: float) -> str:
    """A share in words: ``12.3 %``, and ``under 0.1 %`` for what would round to nothing."""
    return "under 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
