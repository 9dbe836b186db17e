"""What is to be said about a capture, line by line."""

from collections import defaultdict

from awq_pycuda.capturing.account import Account, percent
from awq_pycuda.capturing.probing import Plan
from awq_pycuda.capturing.windows import Window


def report(
    window: Window, plan: Plan, rows: dict[str, int], left_out: dict[str, str], account: Account, heads: list[str]
) -> list[str]:
    """The window's limit, the experts' tokens, and what was left out, with its share of the model's parameters."""
    lines = [] if window.why is None else [f"windows of {window.length} tokens: {window.why}"]
    for stack, experts in plan.experts.items():
        by_parameter = defaultdict(list)
        for expert in experts:
            by_parameter[expert.parameter].append(expert)
        # Whatever passes through an expert's first product passes through all.
        members = next(iter(by_parameter.values()))
        counts = [rows[expert.name] for expert in members]
        lines.append(
            f"experts: {stack}, {len(members)} of {members[0].count}: {min(counts)} to {max(counts)} tokens each"
        )
        idle = [expert.name for group in by_parameter.values() for expert in group if not rows[expert.name]]
        lines += [f"no token reached {name}: written without activations" for name in idle]
    for name, reason in left_out.items():
        lines.append(f"left out: {name} ({reason}; {percent(account.left_out[name])} of the parameters)")
    lines += [f"left out: {name} (a head; no part of the model that is run)" for name in heads]
    others = ", ".join(f"{kind} {percent(share)}" for kind, share in account.others.items())
    lines.append(
        f"captured: {percent(account.captured)} of the model's parameters"
        + (f"; no linear layers: {others}" if others else "")
    )
    return lines
