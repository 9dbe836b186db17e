"""Prints a table of docs/results.md from the schema, `schema_tables.py layout|run|layer|metrics`, or of another page.

Those of docs/bench.md are `bench_layout` and `bench_run`, those of docs/evaluation.md `evaluation_layout` and
`evaluation_run`. `renew_docs.py` puts them into the pages, so that nothing there is typed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

from awq_pycuda.results import bench_schema, evaluation_schema, schema
from awq_pycuda.results.entries import Entry

SIZES = {
    "in_features": "K",
    "out_features": "N",
    "gamma": "G",
    "group": "groups",
    "byte": "bytes",
    "tried": "tried",
    "layer": "L",
    "stage": "S",
    "repeat": "R",
    "row": "rows",
    "sample": "samples",
    "figure": "figures",
    "recipe": "R",
    "window": "W",
    "token": "T",
}
TOLERANCE = "_tolerance"


def shape(entry: Entry) -> str:
    """`(N, K)`; `(N,) or (N, groups)` where a dimension is there only in some files."""
    optional = {"group"} - {entry.name}
    shapes = [[name for name in entry.dims if name not in optional], list(entry.dims)]
    texts = [", ".join(SIZES[name] for name in dims) + ("," if len(dims) == 1 else "") for dims in shapes]
    return " or ".join(dict.fromkeys(f"({text})" for text in texts))


def holds(entry: Entry) -> str:
    """What an entry holds, with all that has no column of its own."""
    text = entry.description + entry.note
    text += "; a dimension scale" if entry.is_scale else ""
    return text + (f"; since version {entry.since}" if entry.since > 1 else "")


def units(entry: Entry) -> str:
    """The unit; nothing for what has none."""
    return "" if entry.units == "1" else entry.units


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in cells]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def layout(entries: Sequence[Entry] = schema.TABLE) -> list[str]:
    """Groups and datasets."""
    rows = []
    for entry in (each for each in entries if not each.is_attribute):
        kind = "group" if entry.type is None else f"{shape(entry)} {entry.type}"
        rows.append([f"`{entry.path}`", kind, units(entry), holds(entry)])
    return table(["path", "type", "unit", "holds"], rows)


def run(entries: Sequence[Entry] = schema.TABLE) -> list[str]:
    """Attributes of the file itself."""
    attributes = [each for each in entries if each.is_attribute and each.parent == "/"]
    return table(["name", "type", "holds"], [[f"`{each.name}`", str(each.type), holds(each)] for each in attributes])


def layer() -> list[str]:
    """Attributes of a layer's groups but its metrics; what was allowed of an error stands beside it."""
    found = [each for each in schema.under(schema.LAYER) if each.is_attribute and each.parent != schema.METRICS]
    names = {each.path for each in found}
    rows = []
    for entry in (each for each in found if not each.name.endswith(TOLERANCE)):
        allowed = f", `{entry.name}{TOLERANCE}`" if f"{entry.path}{TOLERANCE}" in names else ""
        rows.append([f"`{entry.parent}`", f"`{entry.name}`{allowed}", str(entry.type), units(entry), holds(entry)])
    return table(["of", "name", "type", "unit", "holds"], rows)


def metrics() -> list[str]:
    """The figures of merit."""
    rows = [[f"`{each.name}`", units(each), str(each.better), holds(each)] for each in schema.metrics()]
    return table(["name", "unit", "better", "holds"], rows)


TABLES: dict[str, Callable[[], list[str]]] = {
    "layout": layout,
    "run": run,
    "layer": layer,
    "metrics": metrics,
    "bench_layout": lambda: layout(bench_schema.TABLE),
    "bench_run": lambda: run(bench_schema.TABLE),
    "evaluation_layout": lambda: layout(evaluation_schema.TABLE),
    "evaluation_run": lambda: run(evaluation_schema.TABLE),
}

if __name__ == "__main__":
    print("\n".join(TABLES[sys.argv[1]]()))
