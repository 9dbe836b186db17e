"""What the analysis prints of evaluations: a table of their recipes, and two of them compared."""

from __future__ import annotations

import json
import math
from typing import Any

from rich.console import Console
from rich.markup import escape

from awq_pycuda.analysis.compare_evaluations import EvaluationComparison
from awq_pycuda.analysis.evaluations import Evaluation, cost_ranks
from awq_pycuda.analysis.printing import print_line, printable, small_table
from awq_pycuda.analysis.selection import plural
from awq_pycuda.names import listed, without_shared
from awq_pycuda.spread import percent

_MOST_ROWS = 40
_MOST_LAYERS = 5
_NAMED = {"kl_reverse": "reverse KL", "top1": "top-1", "nll": "perplexity"}


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """The recipes by size and then KL, with KL as the figure that counts and perplexity as a footnote."""
    root, recipes = evaluation.record.root, evaluation.recipes
    print_line(console, f"evaluation {evaluation.name}: {summary(evaluation)}")
    if root["status"] != "complete":
        print_line(console, f"failed {evaluation.name}: {root.get('error', 'no reason stored')}")
    numbers = ("bits", "KL", "95 % interval", "over RTN", "reverse", "top-1", "layers\ndB", "perplexity")
    table = small_table(console, None, ("recipe",), numbers)
    table.collapse_padding = True
    for row in recipes.head(_MOST_ROWS).itertuples():
        decibels = "-" if math.isnan(row.output_sqnr_db_median) else f"{row.output_sqnr_db_median:.2f}"
        cost = (nats(row.kl), interval(row.kl_low, row.kl_high), over_rtn(row), nats(row.kl_reverse))
        rest = (percent(row.top1), decibels, f"{row.perplexity:#.4g}")
        table.add_row(escape(printable(row.recipe)), f"{row.bits:.2f}", *cost, *rest)
    console.print(table)
    if len(recipes) > _MOST_ROWS:
        print_line(console, f"{len(recipes) - _MOST_ROWS} more recipes are in the table evaluation_recipes")
    print_line(console, "KL(P||Q) in nats, P the original; over RTN: its difference to RTN in the same format, * not 0")
    print_line(console, "perplexity is a footnote: it can fall while the model moves away from the original")
    _print_alone(console, evaluation)


def summary(evaluation: Evaluation) -> str:
    """The model, how many recipes, and on what they were evaluated, in one line."""
    root, record = evaluation.record.root, evaluation.record
    recipes, windows = plural(len(record.recipes) - 1, "recipe"), plural(len(record.windows.tokens), "window")
    searched = plural(int(root["calibration_tokens"]), "token")
    tokens = f"searched on {searched} and evaluated on {root['predicted_tokens']:,} in {windows} of {root['window']:,}"
    return f"{root['model']} ({root['model_type']}), {recipes} {tokens}, {plural(len(record.layers.name), 'layer')}"


def nats(value: float) -> str:
    """A KL divergence: three digits that count; `-` where there is none."""
    if math.isnan(value):
        return "-"
    if not 1e-4 <= abs(value) < 1e4:
        return f"{value:.3g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def interval(low: float, high: float) -> str:
    """Both ends; `-` where there are none."""
    return "-" if math.isnan(low) else f"{nats(low)} to {nats(high)}"


def over_rtn(row: Any) -> str:
    """The paired difference to RTN as a share of RTN's KL, with a star where its interval leaves 0 out."""
    if math.isnan(row.kl_over_rtn) or not row.kl - row.kl_over_rtn > 0:
        return "-"
    mark = "*" if row.kl_over_rtn_low > 0 or row.kl_over_rtn_high < 0 else " "
    return f"{100 * row.kl_over_rtn / (row.kl - row.kl_over_rtn):+.0f} %{mark}"


def _print_alone(console: Console, evaluation: Evaluation) -> None:
    """The layers that cost most alone, and how well their own SQNR says so."""
    layers = evaluation.layers[evaluation.layers["kl_alone"].notna()].sort_values("rank_alone")
    if layers.empty:
        return
    rho = cost_ranks(layers)
    names = without_shared(list(layers["name"]))
    named = [f"{name} {nats(kl)}" for name, kl in zip(names, layers["kl_alone"], strict=True)]
    print_line(
        console, f"{plural(len(layers), 'layer')} alone in {evaluation.alone}, KL: {listed(named, _MOST_LAYERS)}"
    )
    stream = (
        "" if math.isnan(rho["stream"]) else f", the error of the stream behind their block with {rho['stream']:.2f}"
    )
    print_line(console, f"their own noise (-SQNR) ranks them as the model does with rho {rho['own']:.2f}{stream}")


def print_evaluation_side(console: Console, name: str, evaluation: Evaluation) -> None:
    """What one side of a comparison of evaluations is."""
    root = evaluation.record.root
    commit = str(root["git_commit"])[:7] + (" (changed)" if root["git_dirty"] else "")
    device = json.loads(str(root["device"])).get("name", "")
    of_commit = f", commit {commit}" if root["git_commit"] else ""
    print_line(console, f"{name} {evaluation.path}: {summary(evaluation)}, {root['backend']} on {device}{of_commit}")


def print_evaluations_compared(console: Console, result: EvaluationComparison) -> None:
    """KL of every recipe, the verdicts on the other figures, and what has no counterpart."""
    rows = result.figures[result.figures["figure"] == "kl"]
    table = small_table(console, "KL(P||Q) in nats", ("recipe",), ("A", "B", "B - A", "95 % interval", ""))
    for row in rows.head(_MOST_ROWS).itertuples():
        difference = (f"{row.difference:+.3g}", interval(row.low, row.high), row.verdict)
        table.add_row(escape(printable(row.recipe)), nats(row.a), nats(row.b), *difference)
    console.print(table)
    if len(rows) > _MOST_ROWS:
        print_line(console, f"{len(rows) - _MOST_ROWS} more recipes are not shown (out=FOLDER writes all)")
    for figure, mine in result.figures.groupby("figure", sort=False):
        counts = ", ".join(f"{count} {verdict}" for verdict, count in mine["verdict"].value_counts().items())
        print_line(console, f"{_NAMED.get(str(figure), 'KL')}: {counts}")
    for what in result.apart:
        print_line(console, f"{what} of A and B differ")
    for name in result.changed:
        print_line(console, f"{name} has another config in B")
    for side, recipe, reason in result.not_compared.itertuples(index=False):
        print_line(console, f"not compared: {side} {recipe}: {reason}")
