"""What a run prints: within 80 columns, with a row for all, spreads, remarks where they are true, the next command."""

import io
import re

import h5py
import numpy as np
import pytest
from rich.console import Console

from awq_pycuda import summary
from awq_pycuda.console import next_command
from awq_pycuda.names import fitting, shorten, without_shared
from awq_pycuda.spread import Spread, error_removed, percent

MINILM = [
    f"encoder.layer.{block}.{name}"
    for block in range(6)
    for name in (
        *(f"attention.self.{part}" for part in ("query", "key", "value")),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
    )
]
EXPERTS = [
    f"model.language_model.layers.{block}.block_sparse_moe.experts.{expert}.w{part}"
    for block in (3, 11)
    for expert in range(2)
    for part in (1, 2)
]
UNLIKE = [f"model.{'x' * 30}.{letter}.{'y' * 50}" for letter in "ab"]  # alike at both ends


def layer_file(path, names, inputs=None, weights=None, n=16, m=12):
    """Layers by these names; `inputs` and `weights` give those of a layer by its index."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for index, name in enumerate(names):
            group = file.create_group(f"layers/{index:03d}")
            group.attrs["name"] = name
            group["weight"] = (weights or {}).get(index, rng.standard_normal((n, m))).astype("f4")
            group["activations"] = (inputs or {}).get(index, rng.standard_normal((8, m))).astype("f4")
    return path


def run_file(cli, path, *overrides):
    code, out, err = cli(
        "backend=cpu", "inputs=file", f"inputs.path={path}", "layers=null", "tokens=null", "timing=once", *overrides
    )
    assert (code, err) == (0, "")
    return out


def tables(out):
    """The lines of the summary's two tables."""
    lines = out.splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("Error"))
    end = next(index for index, line in enumerate(lines) if line.startswith("pipeline"))
    return [line.rstrip() for line in lines[begin:end]]


@pytest.mark.parametrize("names", [MINILM, EXPERTS, UNLIKE], ids=["minilm", "experts", "unlike"])
def test_tables_of_many_layers_fit_80_columns_and_name_each(cli, tmp_path, names):
    lines = tables(run_file(cli, layer_file(tmp_path / "layers.h5", names)))
    assert max(map(len, lines)) <= 80
    error = lines[: next(index for index, line in enumerate(lines) if line.startswith("Stage times"))]
    begun = [line.split()[0] for line in error if re.match(r" \S+ +\d+ x \d+ ", line)]
    assert len(begun) == len(names)
    if names is not UNLIKE:
        assert len(set(begun)) == len(names)
    shared = {"minilm": "encoder.layer.", "experts": "model.language_model.layers."}
    for name, prefix in shared.items():
        if names is globals()[name.upper()] and name not in begun[0]:
            assert prefix in error[0] or begun[0].startswith(prefix)


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_has_the_same_tables(width, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    rows = [["1536 x 384", "0.25", "44.74", "44.93", "45.04", "6.8 %"]] * len(MINILM)
    headings = ["out x in", "gamma", "RTN dB", "max dB", "AWQ dB", "error removed"]
    summary._print_table(console, "Error", headings, MINILM, rows, {"all (median)": [""] * 6})
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert ("encoder.layer.0.attention.self.query" in shown) == (width == 120)


def test_the_row_for_all_is_the_median_and_the_line_has_its_quartiles(cli):
    code, out, _ = cli("backend=cpu", "inputs=outliers", "n=32", "layers=5", "timing.repeats=4")
    assert code == 0
    with h5py.File(out.partition("results ")[2].splitlines()[0]) as file:
        layers = [layer["metrics"].attrs for layer in file["layers"].values()]
        removed = [error_removed(layer["output_mse"], layer["rtn_output_mse"]) for layer in layers]
        decibels = [np.median([layer[f"{kind}output_sqnr_db"] for layer in layers]) for kind in ("rtn_", "max_", "")]
        stages, passes = file["timings/host_ms"][...].sum(axis=0), file["timings/pipeline_ms"][...]
    row = next(line for line in out.splitlines() if line.startswith(" all (median)")).split()
    assert row[2:] == [*(f"{value:.2f}" for value in decibels), *percent(np.median(removed)).split()]
    low, high = np.quantile(removed, [0.25, 0.75])
    assert f"error removed {percent(np.median(removed))} (median of 5 layers, quartiles {100 * low:.1f} to " in out
    assert f" to {percent(high)})" in out
    sums = next(line for line in out.splitlines() if line.startswith(" all (sum)")).split()[2:]
    assert [float(text) for text in sums] == pytest.approx(np.median(stages, axis=1), rel=2e-3, abs=2e-3)
    noise = next(line for line in out.splitlines() if line.startswith(" noise")).split()[1::2]
    assert [float(text) for text in noise] == [round(100 * Spread.of(stage).noise) for stage in stages]
    whole = np.quantile(passes, [0.5, 0.25, 0.75])
    found = re.search(r"pipeline (\S+) ms \(median of 4, IQR (\S+) to (\S+)\), cold pass \d+ ms", out)
    assert [float(text) for text in found.groups()] == pytest.approx(whole, rel=3e-3, abs=1e-3)


def test_one_pass_of_one_layer_has_no_spread(cli):
    _, out, _ = cli("backend=cpu", "inputs=outliers", "n=32", "layers=1", "timing=once")
    assert "all (" not in out
    assert "noise" not in out
    assert re.search(r"pipeline \S+ ms \(median of 1\), cold", out)


SILENT = {
    "inputs": {"inputs": {1: np.zeros((8, 12))}},
    "weights": {"weights": {1: np.zeros((16, 12))}},
    "disjoint": {"inputs": {1: np.eye(8, 12)}, "weights": {1: np.pad(np.ones((16, 4)), ((0, 0), (8, 0)))}},
}


@pytest.mark.parametrize("why", SILENT)
def test_a_layer_that_no_signal_reaches_has_no_sqnr_and_is_named(cli, tmp_path, why):
    path = layer_file(tmp_path / "layers.h5", ["a", "dead.one", "c"], **SILENT[why])
    out = run_file(cli, path)
    (line,) = [line for line in out.splitlines() if line.startswith(" dead.one")][:1]
    assert line.split() == ["dead.one", "16", "x", "12", "0", "-", "-", "-", "-"]
    assert "no signal reaches layer dead.one: " in out
    with h5py.File(out.partition("results ")[2].splitlines()[0]) as file:
        metrics = file["layers/001/metrics"].attrs
        assert np.isnan([metrics["output_sqnr_db"], metrics["rtn_output_sqnr_db"]]).all()
        others = [file[f"layers/{index:03d}/metrics"].attrs["output_sqnr_db"] for index in (0, 2)]
    (row,) = [line for line in out.splitlines() if line.startswith(" all (median)")]
    assert row.split()[4] == f"{np.median(others):.2f}"


def test_a_layer_without_noise_is_no_layer_without_signal(cli, tmp_path):
    whole = np.tile([127.0, -127.0, 3.0], (16, 4))
    out = run_file(cli, layer_file(tmp_path / "layers.h5", ["exact", "b"], weights={0: whole}))
    (line,) = [line for line in out.splitlines() if line.startswith(" exact")][:1]
    assert line.split()[5:] == ["inf", "inf", "inf", "-"]
    assert "no signal" not in out


def test_why_gamma_0_wins_is_said_where_it_is_true(cli, tmp_path):
    uniform, showcase = "of uniform inputs no channel is larger", "python -m awq_pycuda.run inputs=outliers layers=2"
    _, out, _ = cli("backend=cpu", "n=512", "layers=1", "timing=once")
    assert uniform in out
    assert showcase in out
    even = layer_file(tmp_path / "even.h5", ["a"], inputs={0: np.ones((8, 12))})
    out = run_file(cli, even)
    assert "gamma = 0 (plain RTN) has the lowest error in every layer" in out
    for silent in (
        cli("backend=cpu", "n=256", "layers=1", "timing=once", "inputs=outliers")[1],
        cli("backend=cpu", "n=512", "layers=1", "timing=once", "gamma_grid=rtn")[1],  # nothing was searched
        run_file(cli, layer_file(tmp_path / "dead.h5", ["a"], inputs={0: np.zeros((8, 12))})),
    ):
        assert "plain RTN" not in silent


@pytest.mark.parametrize(
    ("folder", "shown"), [("out", "out"), ("out puts/it's", "'out puts/it'\"'\"'s'"), ("a$b", "'a$b'")]
)
def test_the_next_command_is_one_for_a_shell(tmp_path, folder, shown):
    assert next_command(folder) == f"python -m awq_pycuda.analyze {shown}"


def test_a_run_ends_with_the_next_command(cli, tmp_path):
    _, out, _ = cli("backend=cpu", "n=8", "layers=1", "hydra.run.dir='my results'")
    assert out.splitlines()[-1] == f"next: python -m awq_pycuda.analyze '{tmp_path}/work/my results'"


def test_names_where_room_is_short():
    assert without_shared(["a.b.c", "a.b.d"]) == ["c", "d"]
    assert without_shared(["a.b", "a.b"]) == ["b", "b"]
    assert without_shared(["a.b"]) == ["a.b"]
    assert shorten("abcdefghij", 7) == "abc…hij"
    assert fitting(["abc.d", "abc.e"], 5) == (["abc.d", "abc.e"], "")
    assert fitting(["abc.d", "abc.e"], 4) == (["d", "e"], "abc.")
    assert fitting(["x123456789", "y123456789"], 6) == (["x1..89", "y1..89"], "")
    assert fitting(["xx1yyyyyy", "xx2yyyyyy"], 6) == (["xx1yyyyyy", "xx2yyyyyy"], "")  # shortened they would be equal
