"""What is to be said about a capture, line by line."""

import re
from collections import defaultdict

from awq_pycuda.capturing.account import Account, percent
from awq_pycuda.capturing.probing import Plan
from awq_pycuda.capturing.windows import Window


def report(
    window: Window, plan: Plan, rows: dict[str, int], left_out: dict[str, str], account: Account, heads: list[str]
) -> list[str]:
    """The window's limit, the experts' tokens, and what was left out, with its share of the model's parameters.

    Layers that differ by a number in their paths alone share a line, with ``*`` for the number.
    """
    lines = [] if window.why is None else [f"windows of {window.length} tokens: {window.why}"]
    for stack, experts in plan.experts.items():
        # Whatever passes through an expert's first product passes through all.
        members = [expert for expert in experts if expert.parameter == experts[0].parameter]
        counts = [rows[expert.name] for expert in members]
        lines.append(
            f"experts: {stack}, {len(members)} of {members[0].count}: {min(counts)} to {max(counts)} tokens each"
        )
        for parameter in dict.fromkeys(expert.parameter for expert in experts):
            idle = [one for one in experts if one.parameter == parameter and not rows[one.name]]
            if idle:
                numbers = ",".join(str(one.index) for one in idle)
                path = idle[0].name.replace(f"{stack}.{idle[0].index}", f"{stack}.{{{numbers}}}", 1)
                lines.append(f"no token reached {path}: written without activations")
    alike = defaultdict(list)
    for name, reason in left_out.items():
        alike[re.sub(r"\d+", "*", name), reason].append(name)
    for (pattern, reason), names in alike.items():
        what = names[0] if len(names) == 1 else f"{len(names)} of {pattern}"
        share = sum(account.left_out[name] for name in names)
        lines.append(f"left out: {what} ({reason}; {percent(share)} of the parameters)")
    if heads:
        lines.append(f"left out: {', '.join(heads)} (a head's; no part of the model that is run)")
    others = ", ".join(f"{kind} {percent(share)}" for kind, share in account.others.items())
    rest = f"; no linear layers: {others}" if others else ""
    lines.append(f"captured: {percent(account.captured)} of the model's parameters{rest}")
    return lines
