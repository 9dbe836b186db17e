"""Prints a table of an evaluation's file as Markdown, for documents: `evaluation_tables.py TABLE FILE`.

recipes    what each recipe costs the model, and what it removes of RTN's cost and of its layers' error
draws      the same by the number of tokens that recipes were searched on, over several draws of them
kinds      what layers cost that were tried alone, by kind of layer
costliest  the ten of them that cost the most
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from study_tables import number, spread, table

from awq_pycuda.analysis.collect import collect
from awq_pycuda.analysis.evaluations import Evaluation, without_original
from awq_pycuda.analysis.figures_recipes import against_rtn, tokens_of
from awq_pycuda.analysis.printing_evaluation import nats

# Values in a group of 32 weights, of types in GGUF files as coarse as what recipes make of them.
GRIDS = {"Q4_0": 16, "Q4_1": 16, "Q5_0": 32, "Q5_1": 32}


def percent(share: float, digits: int = 0) -> str:
    """`45 %`; nothing for NaN, which stands for none."""
    return "" if np.isnan(share) else f"{number(100 * share, digits)} %"


def recipes(evaluation: Evaluation) -> str:
    """A line for each recipe, by size and then KL; beneath them on what, and of what kind the model's weights are."""
    gained = against_rtn(evaluation).set_index("recipe")
    rows = []
    for row in without_original(evaluation.recipes).itertuples():
        removed = own = ""
        if row.recipe in gained.index:
            mine = gained.loc[row.recipe]
            ends = f"{number(100 * mine['removed_low'], 0)} to {number(100 * mine['removed_high'], 0)}"
            removed, own = f"{percent(mine['removed'])} ({ends})", percent(mine["own"])
        kl = f"{nats(row.kl)} ({nats(row.kl_low)} to {nats(row.kl_high)})"
        rest = (percent(row.top1, 1), f"{row.perplexity:.2f}")
        rows.append([f"`{row.recipe}`", f"{row.bits:.2f}", kl, removed, own, *rest])
    header = [
        "recipe",
        "bits",
        "KL in nats",
        "of RTN's KL removed",
        "of its layers' error",
        "same top token",
        "perplexity",
    ]
    root, original = evaluation.record.root, evaluation.record.recipes[0]
    notes = [
        f"{root['model']}, {root['predicted_tokens']:,} tokens predicted in {len(evaluation.record.windows.tokens)} "
        f"windows; the original's perplexity is {original.perplexity.value:.2f}. In brackets 95 % intervals.",
        *(_of_grid(line) for line in dict.fromkeys(json.loads(str(root["said"]))) if line.startswith("weights: ")),
    ]
    return "\n".join([table(header, rows), "", *notes])


def _of_grid(said: str) -> str:
    """What an evaluation says of quantized weights that the model came with, and how coarse that is."""
    grids = [
        f"{kind} has at most {values} values in each group of 32" for kind, values in GRIDS.items() if kind in said
    ]
    return ". ".join([f"Its {said}", *grids]) + "."


def draws(evaluation: Evaluation) -> str:
    """A line for each number of tokens that recipes were searched on; medians over the draws, lowest and highest."""
    found = against_rtn(evaluation)
    found = found.assign(tokens=tokens_of(evaluation, found))
    rows = [
        [
            f"{tokens:,.0f}",
            str(method),
            str(len(mine)),
            _spread(mine["kl"]),
            f"{spread(100 * mine['removed'], 0)} %",
            f"{spread(100 * mine['own'], 0)} %",
        ]
        for (tokens, method), mine in found.groupby(["tokens", "method"])
    ]
    return table(
        ["tokens", "recipe", "draws", "KL in nats", "of RTN's KL removed", "of its layers' error, on the draw"], rows
    )


def kinds(evaluation: Evaluation) -> str:
    """A line for each kind of layer, the last part of its path, by what all of its layers cost together."""
    alone = _alone(evaluation)
    shares = alone["kl_alone"] / alone["kl_alone"].sum()
    kind_of = alone["name"].str.rsplit(".", n=1).str[-1]
    rows = []
    for kind, share in shares.groupby(kind_of).sum().sort_values(ascending=False).items():
        mine = alone[kind_of == kind]
        rows.append(
            [f"`{kind}`", str(len(mine)), percent(share), _spread(mine["kl_alone"]), spread(mine["output_sqnr_db"])]
        )
    return table(["layer", "of them", "of all KL alone", "KL in nats, each", "its own SQNR, dB"], rows)


def costliest(evaluation: Evaluation) -> str:
    """A line for each of the ten layers that cost the most, with the rank of its own SQNR among all."""
    alone = _alone(evaluation)
    alone = alone.assign(rank=alone["output_sqnr_db"].rank(method="min"))
    rows = [
        [
            f"`{row.name}`",
            f"{nats(row.kl_alone)} ({nats(row.kl_alone_low)} to {nats(row.kl_alone_high)})",
            percent(row.kl_alone / alone["kl_alone"].sum()),
            f"{row.output_sqnr_db:.1f}",
            f"{row.rank:.0f} of {len(alone)}",
        ]
        for row in alone.nlargest(10, "kl_alone").itertuples(index=False)
    ]
    return table(["layer", "KL alone in nats", "of all", "its own SQNR, dB", "from the lowest"], rows)


def _alone(evaluation: Evaluation) -> pd.DataFrame:
    """The layers of the recipe that was tried on each alone."""
    return evaluation.layers[evaluation.layers["recipe"] == evaluation.alone]


def _spread(values: Iterable[float]) -> str:
    middle, low, high = (nats(float(each)) for each in np.quantile(list(values), (0.5, 0, 1)))
    return middle if low == high else f"{middle} ({low} to {high})"


TABLES: dict[str, Callable[[Evaluation], str]] = {make.__name__: make for make in (recipes, draws, kinds, costliest)}


def main(arguments: list[str]) -> None:
    """The command."""
    if len(arguments) != 2 or arguments[0] not in TABLES:
        raise SystemExit(f"usage: evaluation_tables.py TABLE FILE; tables: {', '.join(TABLES)}")
    found = collect([Path(arguments[1])]).evaluations
    if len(found) != 1:
        raise SystemExit(f"{arguments[1]}: {len(found)} evaluations, not one")
    print(TABLES[arguments[0]](found[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
