"""`python -m awq_pycuda.analyze`: results to tables, figures and a report; or two sets of them compared.

Needs no GPU, no CUDA and none of the configs; reads result files only.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awq_pycuda.console import make_console
from awq_pycuda.errors import InputError
from awq_pycuda.options import REQUIRED, SYNTAX, describe, nonempty, option, parse, refusal, serve, share, whole, words

if TYPE_CHECKING:  # pandas takes a second to import; --help and bad input do without
    import pandas as pd

    from awq_pycuda.analysis.collect import Collection
    from awq_pycuda.analysis.compare import Comparison
    from awq_pycuda.analysis.evaluations import Evaluation

PATHS = "result files and folders"
FOLDER = "a folder that can be written to"
YAML = "a file name that ends in .yaml, in an existing folder that can be written"
EVALUATIONS = "evaluation.h5 of awq_pycuda.evaluate, or folders that hold one"
KEYS = "a column of the table of layers, such as format, recipe, name, or a config key"


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """What the command line of the analysis sets."""

    out: str = option("FOLDER", "folder to write to; made if missing", FOLDER, nonempty, "report")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What the command line of a comparison sets."""

    fail_on: tuple[str, ...] = option(
        "WORDS",
        "exit with code 1 if anything is slower; worse: if a metric is; slower,worse: either. A run that is complete "
        "in A and failed in B counts as both",
        "slower, worse, or both with a comma between",
        words("slower", "worse"),
        (),
    )
    tolerance: float = option(
        "SHARE", "relative difference of times that does not matter", "a number from 0 to below 1", share, 0.05
    )
    metric_tolerance: float = option(
        "SHARE",
        "relative difference of metrics that does not matter (in dB: the same share of power)",
        "a number from 0 to below 1",
        share,
        0.0,
    )
    ignore: tuple[str, ...] = option(
        "KEYS",
        "config keys that may differ between the runs that are compared, such as matmul.kernel",
        "config keys with commas between",
        words(),
        (),
    )
    out: str = option("FOLDER", "also write the comparison there, as Parquet and CSV", FOLDER, nonempty, "")


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """What the command line of an explanation sets."""

    top: int = option("COUNT", "how many channels and groups are named", "a whole number from 1", whole(1), 4)


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """What the command line of a table sets."""

    rows: str = option("KEY", "what has a row for each value", KEYS, nonempty, "format")
    columns: str = option("KEY", "what has a column for each value", KEYS, nonempty, "recipe")
    figure: str = option(
        "NAME", "what the cells hold", "a figure of a layer, such as output_sqnr_db", nonempty, "error_removed"
    )
    over: str = option(
        "WORD",
        "which one of the layers' figures; below_0 counts those that are",
        "median, mean, lowest, highest, below_0",
        nonempty,
        "median",
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the command line of a plan sets."""

    size: tuple[str, ...] = option(
        "SIZES",
        "mean bits of a weight that the plan may take, or the recipe whose size it is; a plan for each",
        "numbers of bits, or recipes of the evaluations, with commas between",
        words(),
        REQUIRED,
    )
    out: str = option("FILE.yaml", "file of recipes to write; an existing one is replaced", YAML, nonempty, "plan.yaml")
    name: str = option(
        "NAME",
        "what the plan is called; of several, each with its size behind",
        "a name that no recipe has",
        nonempty,
        "plan",
    )
    among: tuple[str, ...] = option(
        "NAMES",
        "recipes that layers may get; none: all",
        "recipes of the evaluations, with commas between",
        words(),
        (),
    )


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What the command line of a prediction sets."""

    top: int = option("COUNT", "how many of the costliest layers are named", "a whole number from 1", whole(1), 10)


USAGE = f"""\
Usage: python -m awq_pycuda.analyze PATH... [out=report]
       python -m awq_pycuda.analyze compare A B [key=value ...]
       python -m awq_pycuda.analyze explain FILE LAYER [top=4]
       python -m awq_pycuda.analyze table PATH... [rows=format] [columns=recipe] [figure=error_removed] [over=median]
       python -m awq_pycuda.analyze plan EVALUATION... size=SIZES [out=plan.yaml] [name=plan] [among=NAMES]
       python -m awq_pycuda.analyze predict LAYERS PATH... [top=10]

Reads result files, and folders that are searched for files named *.h5 or *.hdf5 (hidden ones are not). What cannot be
read is named and left out. Needs no GPU, and nothing but the files.

The first form writes to the folder `out`: of runs the tables runs, layers, curves, timings and passes, of evaluations
evaluation_recipes, evaluation_layers and evaluation_windows, as Parquet and CSV; figures as PNG and SVG; report.html.
Files of these names that are there already are replaced, others are kept.

{describe(AnalyzeOptions)}
The second says what B changed against A. Two files of awq_pycuda.bench it compares row by row, two evaluations on the
same tokens recipe by recipe: better, worse, same or unclear, with the difference and its 95 % interval. Else it matches
the runs of two files or folders by config: per stage and for the whole pipeline faster, slower, same or unclear, with
the ratio of the medians and its 90 % interval; per layer and metric better, worse or same. What has no counterpart is
listed.

{describe(CompareOptions)}
The third says on one screen where the error of a layer, given by name or number, comes from: which input channels,
output channels and groups hold how much of it, with input channels taken as uncorrelated.

{describe(ExplainOptions)}
The fourth prints a table in Markdown: one figure over the layers of all complete runs, by two keys, in brackets on
held-out tokens.

{describe(TableOptions)}
The fifth makes a mixture of recipes: those of the layers that cost the model the least at a size given. It reads
evaluations of one model, one of them at least with alone=RECIPE, and writes recipes for `awq_pycuda.evaluate`.

{describe(PlanOptions)}
The sixth predicts what recipes cost the model, in KL divergence, from the file of layers that they were searched on and
the errors in their result files or evaluations; and holds it against what evaluations have measured.

{describe(PredictOptions)}
{SYNTAX}
Exit codes: 0 done, 1 fail_on has found something or writing failed, 2 bad input, 128 + number stopped by a signal.
"""
TABLES = ("runs", "layers", "curves", "timings", "passes")
EVALUATION_TABLES = ("recipes", "layers", "windows")
COMPARED = ("times", "metrics", "not_compared")
EVALUATIONS_COMPARED = ("figures", "not_compared")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with its arguments (default: the process's); returns the exit code, one of USAGE."""
    return serve(sys.argv[1:] if arguments is None else arguments, USAGE, _work)


def _work(arguments: Sequence[str]) -> int:
    commands = {"compare": _compare, "explain": _explain, "table": _table, "plan": _plan, "predict": _predict}
    command = commands.get(arguments[0]) if arguments else None
    return command(arguments[1:]) if command else _analyze(arguments)


def _analyze(arguments: Sequence[str]) -> int:
    options, paths = parse(AnalyzeOptions, arguments, PATHS)
    if not paths:
        raise InputError(f"PATH: no value; allowed: {PATHS}")
    out = _folder(options.out)
    from awq_pycuda.analysis import evaluations, figures, printing, printing_evaluation, report

    console = make_console()
    with console.status("reading"):
        collection = _collect(paths)
        tables = {name: getattr(collection, name) for name in TABLES if len(collection.runs)}
        if collection.evaluations:
            named = {f"evaluation_{name}": name for name in EVALUATION_TABLES}
            tables |= {name: evaluations.together(collection.evaluations, table) for name, table in named.items()}
    _make(out)
    with console.status("writing tables"):
        for name, table in tables.items():
            _write_table(table, out / name)
    with console.status("drawing figures"):
        drawn, failures = figures.write_figures(collection, out / "figures")
    with console.status("writing the report"):
        report.write_report(collection, out / "report.html", failures)
    printing.print_runs(console, collection)
    for evaluation in collection.evaluations:
        printing_evaluation.print_evaluation(console, evaluation)
    for failure in failures:
        printing.print_line(console, f"left out {failure.part}: {failure.reason}")
    printing.print_line(console, f"tables {out}: {', '.join(tables)} as Parquet and CSV")
    printing.print_line(console, f"figures {out / 'figures'}: {len(drawn)} files, PNG and SVG")
    page = out / "report.html"
    printing.print_line(console, f"report {page}")
    printing.print_line(console, f"next: python -m webbrowser {shlex.quote(page.resolve().as_uri())}")
    return 0


def _compare(arguments: Sequence[str]) -> int:
    options, paths = parse(CompareOptions, arguments, PATHS)
    if len(paths) != 2:
        raise InputError(f"compare: {len(paths)} paths; allowed: two, A and B")
    out = _folder(options.out) if options.out else None
    from awq_pycuda.analysis import printing
    from awq_pycuda.analysis.compare import compare
    from awq_pycuda.analysis.compare_bench import compare_benches, read_benches
    from awq_pycuda.analysis.compare_evaluations import read_evaluations

    evaluations = read_evaluations(*paths)
    if evaluations is not None:
        return _compare_evaluations(options, out, evaluations)
    sides: Any = read_benches(*paths)
    print_side: Any = printing.print_bench
    if sides is not None:
        a, b = sides
        result = compare_benches(a, b, options.tolerance)
    else:
        sides, print_side = [_collect_runs([path]) for path in paths], printing.print_set
        a, b = sides
        result = compare(a, b, options.tolerance, options.metric_tolerance, options.ignore)
    if out is not None:
        _make(out)
        for name in COMPARED:
            _write_table(getattr(result, name), out / f"compare_{name}")
    console = make_console()
    for name, path, side in zip("AB", paths, sides, strict=True):
        print_side(console, name, path, side)
    printing.print_comparison(console, result)
    if out is not None:
        printing.print_line(console, f"tables {out}: {', '.join(f'compare_{name}' for name in COMPARED)}")
    found = _faults(result, options.fail_on)
    if found:
        printing.print_line(console, f"fail_on={','.join(options.fail_on)}: {found}")
    return 1 if found else 0


def _compare_evaluations(options: CompareOptions, out: Path | None, sides: Sequence[Evaluation]) -> int:
    from awq_pycuda.analysis import printing, printing_evaluation
    from awq_pycuda.analysis.compare_evaluations import compare_evaluations

    a, b = sides
    result = compare_evaluations(a, b, options.metric_tolerance)
    console = make_console()
    for name, side in zip("AB", sides, strict=True):
        printing_evaluation.print_evaluation_side(console, name, side)
    printing_evaluation.print_evaluations_compared(console, result)
    if out is not None:
        _make(out)
        for name in EVALUATIONS_COMPARED:
            _write_table(getattr(result, name), out / f"compare_{name}")
        tables = ", ".join(f"compare_{name}" for name in EVALUATIONS_COMPARED)
        printing.print_line(console, f"tables {out}: {tables}")
    worse = int((result.figures["verdict"] == "worse").sum()) if "worse" in options.fail_on else 0
    if worse:
        printing.print_line(console, f"fail_on={','.join(options.fail_on)}: {worse} worse")
    return 1 if worse else 0


def _explain(arguments: Sequence[str]) -> int:
    if len(arguments) < 2:
        raise InputError("explain: FILE or LAYER is missing; allowed: explain FILE LAYER")
    file, layer, *rest = arguments  # a layer's name is no path
    options, paths = parse(ExplainOptions, [file, *rest], "FILE")
    if len(paths) != 1:
        raise InputError(f"explain: {len(paths)} files; allowed: one, then the layer")
    from awq_pycuda.analysis.explain import explain

    console = make_console()
    for line in explain(paths[0], layer, options.top):
        console.print(line, soft_wrap=True, markup=False)
    return 0


def _table(arguments: Sequence[str]) -> int:
    options, paths = parse(TableOptions, arguments, PATHS)
    if not paths:
        raise InputError(f"PATH: no value; allowed: {PATHS}")
    from awq_pycuda.analysis.tables import table

    return _print(list(table(_collect_runs(paths), options.rows, options.columns, options.figure, options.over)))


def _plan(arguments: Sequence[str]) -> int:
    options, paths = parse(PlanOptions, arguments, EVALUATIONS)
    if not paths:
        raise InputError(f"PATH: no value; allowed: {EVALUATIONS}")
    out = Path(options.out)
    if out.suffix != ".yaml" or not out.parent.is_dir() or out.is_dir():
        raise refusal(PlanOptions, "out", options.out, "cannot be written")
    from awq_pycuda.analysis import plan

    made = plan.make_plans(plan.read_evaluations(paths), options.size, options.name, options.among)
    text = plan.as_yaml(made)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise refusal(PlanOptions, "out", options.out, error.strerror or str(error)) from None
    return _print([*plan.describe(made), f"recipes {out}"])


def _predict(arguments: Sequence[str]) -> int:
    options, paths = parse(PredictOptions, arguments, PATHS)
    if len(paths) < 2:
        raise InputError(f"predict: {len(paths)} paths; allowed: a file of layers, then {PATHS}")
    from awq_pycuda.analysis import prediction

    return _print(list(prediction.describe(prediction.predict(paths[0], paths[1:]), options.top)))


def _print(lines: Sequence[str]) -> int:
    console = make_console()
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return 0


def _faults(result: Comparison, fail_on: Sequence[str]) -> str:
    """What `fail_on` has found, in words; empty if nothing."""
    verdicts = {"slower": result.times["verdict"], "worse": result.metrics["verdict"]}
    counts = {word: int((verdicts[word] == word).sum()) for word in fail_on}
    if fail_on:
        counts["failed in B alone"] = len(result.broken)
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def _folder(given: str) -> Path:
    out = Path(given)
    if os.path.lexists(out) and not out.is_dir():
        raise refusal(AnalyzeOptions, "out", given, "is no folder")
    return out


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # root passes every permission check, so only trying tells
            pass
    except OSError as error:
        raise refusal(AnalyzeOptions, "out", out, error.strerror or str(error)) from None


def _collect(paths: Sequence[Path]) -> Collection:
    """The collection, or an error where nothing can be read."""
    from awq_pycuda.analysis.collect import collect

    collection = collect(paths)
    if collection.runs.empty and not collection.evaluations:
        named = [f"{left_out.path} ({left_out.reason})" for left_out in collection.left_out]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        given = " ".join(str(path) for path in paths[:3]) + (" ..." if len(paths) > 3 else "")
        raise InputError(f"{given}: no result that can be read; left out: {', '.join(named[:5])}{more}")
    return collection


def _collect_runs(paths: Sequence[Path]) -> Collection:
    """The same for what needs runs, not evaluations of models."""
    collection = _collect(paths)
    if collection.runs.empty:
        raise InputError(f"{paths[0]}: an evaluation of a model, not a run; allowed: results of runs")
    return collection


def _write_table(table: pd.DataFrame, path: Path) -> None:
    table.to_parquet(path.with_name(f"{path.name}.parquet"), index=False)
    table.to_csv(path.with_name(f"{path.name}.csv"), index=False)


if __name__ == "__main__":
    sys.exit(main())
