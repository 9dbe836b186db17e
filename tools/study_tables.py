"""Prints the tables of the studies' pages from their result files: `study_tables.py TABLE`, beside `outputs/`.

`renew_docs.py` puts them into the pages, so that no figure there is typed.
"""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from awq_pycuda import Format, quantize
from awq_pycuda.analysis.collect import Collection, collect
from awq_pycuda.choices import Element, StepDtype

FORMATS = {
    "int8 row": Format(symmetric=False),
    "int4 g128": Format(128, bits=4, symmetric=False),
    "nvfp4": Format(16, bits=4, element=Element.e2m1, step_dtype=StepDtype.e4m3),
    "mxfp4": Format(32, bits=4, element=Element.e2m1, step_dtype=StepDtype.e8m0),
}


def read(study: str) -> Collection:
    """The results of a study; error removed in percent."""
    found = collect([Path("outputs") / study])
    if found.left_out or (found.runs["status"] != "complete").any():
        raise SystemExit(f"outputs/{study}: not every run is complete and readable")
    found.layers["removed"] = 100 * found.layers["error_removed"]
    return found


def number(value: float, digits: int = 1) -> str:
    """`6.1`, `0` for what rounds to it, a minus sign for what is below."""
    text = f"{value:.{digits}f}"
    return "0" if float(text) == 0 else text.replace("-", "−")


def spread(values: Iterable[float], digits: int = 1) -> str:
    """`9.2 (7.8–9.4)`: median, lowest and highest; one number where all round to the same."""
    array = np.asarray(list(values), dtype=np.float64)
    middle, low, high = (number(value, digits) for value in (np.median(array), array.min(), array.max()))
    return middle if low == middle == high else f"{middle} ({low}–{high})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"|{'|'.join(line)}|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)


def outliers() -> str:
    """Error removed by factor and share of salient channels, `diag`."""
    layers = read("outliers").layers.query("objective == 'diag'")
    factors = sorted(layers["inputs.factor_max"].unique())
    rows = []
    for share, group in layers.groupby("inputs.channels"):
        cells = [spread(group.loc[group["inputs.factor_max"] == factor, "removed"]) for factor in factors]
        rows.append([f"{max(1, round(float(share) * 1024))} ({100 * float(share):g} %)", *cells])
    return table(["salient channels", f"factor {factors[0]:g}", *(f"{factor:g}" for factor in factors[1:])], rows)


def outliers_normal() -> str:
    """The same with normal weights; the layers' names say share and factor."""
    layers = read("outliers_normal").layers.query("objective == 'diag'").copy()
    layers[["channels", "factor"]] = layers["name"].str.split(".", expand=True)[[1, 2]].astype(int)
    factors = sorted(layers["factor"].unique())
    rows = [
        [str(channels), *(spread(group.loc[group["factor"] == factor, "removed"]) for factor in factors)]
        for channels, group in layers.groupby("channels")
    ]
    return table(["salient channels", f"factor {factors[0]}", *map(str, factors[1:])], rows)


def gamma_grid() -> str:
    """Error removed and search time by inputs, objective and points of the grid."""
    found = read("gamma_grid")
    found.layers["points"] = found.layers["gamma_grid_size"]
    search = found.timings.query("stage == 'compute_s' and clock == 'host'").groupby("run")["ms"].sum()
    rows = []
    for (kind, objective), group in found.layers.groupby(["inputs.kind", "objective"]):
        cells, times = [], []
        for points in (5, 20, 101):
            mine = group[group["points"] == points]
            cells.append(spread(mine["removed"]))
            times.append(span(search[mine["run"].unique()]))
        rows.append([f"{kind}, `{objective}`", *cells, " / ".join(times)])
    header = [
        "inputs, objective",
        "5 points: median (lowest–highest)",
        "20 points",
        "101 points",
        "`compute_s`, ms: 5 / 20 / 101",
    ]
    return table(header, rows)


def span(values: pd.Series) -> str:
    """`20–23`: lowest to highest, in whole numbers."""
    low, high = f"{values.min():,.0f}", f"{values.max():,.0f}"
    return low if low == high else f"{low}–{high}"


def minilm_grids() -> str:
    """Error removed by objective and points, on the tokens searched on and on the 512 that follow them."""
    with h5py.File("minilm1024.h5") as model:
        held_out = [(layer["weight"][:], layer["activations"][512:]) for layer in model["layers"].values()]
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for path in glob.glob("outputs/minilm_grids/*/results.h5"):
        with h5py.File(path) as run:
            layers = list(run["layers"].values())
            first = layers[0]["search"]
            objective, points = str(first.attrs["objective"]), int(first["error"].size)
            output = [
                (layer["metrics"].attrs["output_mse"], layer["metrics"].attrs["rtn_output_mse"]) for layer in layers
            ]
            searched = [(layer["search"].attrs["error_chosen"], layer["search"].attrs["error_rtn"]) for layer in layers]
            others = [
                (_error(w, layer["scales/s"][:], x), _error(w, np.ones(w.shape[1], np.float32), x))
                for layer, (w, x) in zip(layers, held_out, strict=True)
            ]
        what = {"the output error": output, "the output error, tokens not searched on": others}
        if objective == "diag":
            what = {"the error searched": searched} | what
        for name, pairs in what.items():
            removed = [100 * (1 - awq / rtn) for awq, rtn in pairs]
            lowest = "" if name == "the error searched" else f" ({number(min(removed))})"
            cells.setdefault((objective, name), {})[points] = f"{number(float(np.mean(removed)))} %{lowest}"
    order = sorted(cells, key=lambda key: (key[0], key[1] != "the error searched", "tokens" in key[1]))
    rows = [[f"`{key[0]}`: of {key[1]}", *(cells[key][points] for points in (5, 20, 101))] for key in order]
    return table(["error removed, mean over 36 layers (lowest layer)", "5 points", "20 points", "101 points"], rows)


def _error(w: NDArray[np.float32], s: NDArray[np.float32], x: NDArray[np.float32]) -> float:
    scaled = w * s
    step = np.abs(scaled).max(1, keepdims=True) / 127
    return float(np.mean((x @ (np.rint(scaled / step) * step / s - w).T) ** 2))


def depth() -> str:
    """SQNR against the unquantized chain, after 1 to 32 layers."""
    layers = read("depth").layers
    after = (1, 2, 4, 8, 16, 32)
    rows = []
    for (kind, points), group in sorted(
        layers.groupby(["inputs.kind", "gamma_grid_size"]), key=lambda item: (item[0][0] != "synthetic", item[0][1])
    ):
        cells = [spread(group.loc[group["layer"] == count - 1, "propagated_sqnr_db"]) for count in after]
        rows.append([str(kind), "RTN" if points == 1 else "AWQ", *cells])
    alone = layers.query("`inputs.kind` == 'synthetic' and gamma_grid_size == 1 and layer == 0")[
        "output_sqnr_db"
    ].median()
    rows.append(["errors add up as independent ones", "", *(number(alone - 10 * np.log10(count)) for count in after)])
    return table(["inputs", "method", "after 1 layer", *map(str, after[1:])], rows)


def _minilm() -> pd.DataFrame:
    layers = read("minilm").layers.copy()
    layers["step per"] = [
        "row" if pd.isna(size) else f"{float(size):g} channels" for size in layers["quant.group_size"]
    ]
    return layers


def minilm() -> str:
    """Error removed and SQNR over the 36 layers, by objective and step."""
    layers = _minilm()
    rows = []
    for step in ("row", "128 channels"):
        for objective in ("diag", "output"):
            mine = layers[(layers["step per"] == step) & (layers["objective"] == objective)]
            removed = mine["removed"]
            low, middle, high = removed.quantile([0.25, 0.5, 0.75])
            rows.append(
                [
                    f"`{objective}`, {step}",
                    f"{number(middle)} %",
                    f"{number(low)}–{number(high)}",
                    f"{number(removed.min())} to {number(removed.max())}",
                    str((removed < 0).sum()),
                    number(mine["rtn_output_sqnr_db"].median()),
                    number(mine["output_sqnr_db"].median()),
                ]
            )
    header = ["objective, step per", "median", "quartiles", "lowest to highest", "layers below RTN", "RTN dB", "AWQ dB"]
    return table(header, rows)


def minilm_kinds() -> str:
    """By kind of layer, `output`, one step per row."""
    layers = _minilm().query("`step per` == 'row' and objective == 'output'").copy()
    layers["kind"] = [re.sub(r"^.*?\d+\.", "", name) for name in layers["name"]]
    groups = sorted(layers.groupby("kind"), key=lambda item: -item[1]["removed"].median())
    rows = [
        [
            f"`{kind}`",
            spread(group["removed"]),
            f"{number(group['gamma_chosen'].min(), 2)}–{number(group['gamma_chosen'].max(), 2)}",
            number(group["rtn_output_sqnr_db"].median()),
        ]
        for kind, group in groups
    ]
    return table(["layer", "error removed, %", "γ chosen", "RTN dB"], rows)


def formats_gamma() -> str:
    """What the γ chosen at one format costs at another: AWQ, on the tokens searched on."""
    found = read("formats")
    runs = found.runs[found.runs["recipe"] == "AWQ"].set_index("format")["run"]
    errors = {
        form: found.curves[found.curves["run"] == run].pivot(index="layer", columns="gamma", values="error").to_numpy()
        for form, run in runs.items()
    }
    rows = []
    for searched, of_search in errors.items():
        chosen = of_search.argmin(1)
        cells = []
        for used, error in errors.items():
            own, taken = error.argmin(1), np.take_along_axis(error, chosen[:, None], 1)[:, 0]
            more = 100 * (taken / error.min(1) - 1)
            cell = f"{(chosen != own).sum()}: {spread(more, 0)} %, {(taken > error[:, 0]).sum()}"
            cells.append("" if used == searched else cell)
        median = np.median(found.layers.loc[found.layers["run"] == runs[searched], "gamma_chosen"])
        rows.append([searched, number(median, 2), *cells])
    return table(["γ searched at", "its median", *(f"used at {form}" for form in errors)], rows)


def formats_first_token() -> str:
    """What the first of the 384 tokens searched on holds of RTN's output error in the MLP's second layers."""
    with h5py.File("minilm.h5") as file:
        named = {str(layer.attrs["name"]): layer for layer in file["layers"].values()}
        layers = [
            (layer["weight"][:], layer["activations"][:384])
            for name, layer in named.items()
            if name.endswith(".output.dense") and "attention" not in name
        ]
    rows = []
    for name, form in FORMATS.items():
        shares = []
        for w, x in layers:
            squared = np.square(x @ (quantize(w, format=form).dequantize() - w).T).sum(1)
            shares.append(100 * float(squared[0] / squared.sum()))
        rows.append([name, *(f"{number(share)} %" for share in shares)])
    largest = [f"{np.abs(x[0]).max():.1f}, {np.abs(x[1:]).max():.1f}" for _, x in layers]
    rows.append(["largest \\|x\\| of the first token, of all others", *largest])
    return table(["RTN", *(f"block {block}" for block in range(len(layers)))], rows)


def formats_steps() -> str:
    """AWQ by element, group and the type of the steps: γ, error removed and SQNR, medians over the layers."""
    layers = read("formats_steps").layers
    layers["steps"] = [
        "int4, float32 and zero points" if element == "int" else f"fp4, {dtype}"
        for element, dtype in zip(layers["quant.element"], layers["quant.step_dtype"], strict=True)
    ]
    sizes = sorted(layers["quant.group_size"].unique())
    rows = []
    for steps, mine in layers.groupby("steps", sort=False):
        cells = []
        for size in sizes:
            of_size = mine[mine["quant.group_size"] == size]
            removed, others = (100 * of_size[name].median() for name in ("error_removed", "held_out_error_removed"))
            decibels = of_size["held_out_output_sqnr_db"].median()
            gamma = number(of_size["gamma_chosen"].median(), 2)
            cells.append(f"{gamma}; {number(removed)} ({number(others)}) %; {number(decibels)} dB")
        rows.append([str(steps), *cells])
    return table(["element, steps", *(f"groups of {size}" for size in sizes)], rows)


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (
        outliers,
        outliers_normal,
        gamma_grid,
        minilm_grids,
        depth,
        minilm,
        minilm_kinds,
        formats_gamma,
        formats_steps,
        formats_first_token,
    )
}


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in TABLES:
        raise SystemExit(f"usage: study_tables.py TABLE; tables: {', '.join(TABLES)}")
    print(TABLES[sys.argv[1]]())
