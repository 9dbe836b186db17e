"""Evaluations in the analysis: their tables against the file's own figures, what is printed, and what is refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation_studies import PARTS, RECIPES, RTN, study, write_study
from result_files import editing, make_run

from awq_pycuda import analyze
from awq_pycuda.analysis import figures, report
from awq_pycuda.analysis.collect import collect
from awq_pycuda.analysis.evaluations import rank_correlation, together
from awq_pycuda.analysis.load import load
from awq_pycuda.analysis.printing_evaluation import nats
from awq_pycuda.bootstrap import Bootstrap
from awq_pycuda.errors import InputError

SIZES = ["clip_int4", "awq_int4", "rtn_int4", "plan", "rtn_nvfp4", "awq_nvfp4", "rtn_int8", "original"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One evaluation, with each layer tried alone, in a folder as `evaluate` leaves it, and a damaged one."""
    base = tmp_path_factory.mktemp("evaluations")
    path = write_study(base / "tiny", alone="rtn_int4", calibration_tokens=7)
    (base / "damaged.h5").write_bytes(path.read_bytes()[:3000])
    return base


@pytest.fixture(scope="module")
def found(folder):
    (evaluation,) = collect([folder]).evaluations
    return evaluation


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """`command("PATH", "out=x")`: runs it in a fresh folder, without pictures; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "write_figures", lambda collection, folder: ([], []))
    monkeypatch.setattr(report, "write_report", lambda collection, path, failures: path.write_text("report"))

    def call(*arguments):
        capfd.readouterr()
        code = analyze.main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def test_recipes_come_by_size_and_then_by_kl(found):
    table = found.recipes
    assert set(table["recipe"]) == {*RECIPES, "original"}
    keys = list(zip(table["bits"], table["kl"], strict=True))
    assert keys == sorted(keys)
    assert table["recipe"].iloc[-1] == "original"
    assert table.set_index("recipe")["format"].to_dict() == {
        **dict.fromkeys(("awq_int4", "rtn_int4", "clip_int4"), "int4 g128"),
        **dict.fromkeys(("rtn_nvfp4", "awq_nvfp4"), "nvfp4"),
        **{"rtn_int8": "int8 row", "plan": "mixture", "original": "original"},
    }
    methods = table.set_index("recipe")["method"]
    assert methods[["rtn_int4", "awq_int4", "clip_int4"]].tolist() == ["RTN", "AWQ", "AWQ + clip"]
    assert (table["calibration_tokens"] == 7).all()


def test_a_recipe_is_set_against_rtn_of_its_format_on_the_same_resamples(found):
    recipes = {recipe.name: recipe for recipe in found.record.recipes}
    rows = found.recipes.set_index("recipe")
    bootstrap = Bootstrap(found.record.windows.tokens, 0)
    for name, rtn in (("awq_int4", "rtn_int4"), ("clip_int4", "rtn_int4"), ("awq_nvfp4", "rtn_nvfp4")):
        difference = recipes[name].of_tokens.kl - recipes[rtn].of_tokens.kl
        low, high = bootstrap.interval(difference.reshape(8, -1).mean(axis=1))
        row = rows.loc[name]
        assert row["rtn"] == rtn
        assert row[["kl_over_rtn", "kl_over_rtn_low", "kl_over_rtn_high"]].tolist() == pytest.approx(
            [difference.mean(), low, high]
        )
    assert rows.loc[["plan", "rtn_int4", "rtn_int8", "original"], "rtn"].isna().all()


def test_formats_of_one_name_are_told_apart_by_what_differs(tmp_path):
    with_zero = "quant: {element: int, bits: 4, group_size: 128, symmetric: false}\n"
    plain = "quant: {element: int, bits: 4, group_size: 128, symmetric: true}\n"
    write_study(tmp_path, {"a": (plain + RTN, 4.1, 0.1), "b": (with_zero, 4.2, 0.1), "c": ("{", 4.3, 0.1)})
    table = collect([tmp_path]).evaluations[0].recipes.set_index("recipe")
    assert table["format"].to_dict() == {
        "a": "int4 g128 symmetric=true",
        "b": "int4 g128 symmetric=false",
        "c": "",
        "original": "original",
    }
    assert table["rtn"].isna().all()


@pytest.mark.parametrize(
    ("symmetric", "form", "of_rtn"), [("null", "int8 row torchao", "rtn_torchao"), ("true", "int8 row", "rtn_autoawq")]
)
def test_what_a_format_leaves_open_differs_with_the_convention(symmetric, form, of_rtn, tmp_path):
    quant = f"quant: {{element: int, bits: 8, group_size: null, symmetric: {symmetric}}}\n"
    recipes = {
        f"{method}_{name}": (f"{quant}convention: {name}\n{gammas}", 8.1, 0.1)
        for name in ("autoawq", "torchao")
        for method, gammas in (("rtn", RTN), ("awq", "gammas: [0, 0.5, 1]\n"))
    }
    write_study(tmp_path, recipes)
    row = collect([tmp_path]).evaluations[0].recipes.set_index("recipe").loc["awq_torchao"]
    assert (row["format"], row["rtn"]) == (form, of_rtn)


def test_windows_and_layers_are_those_of_the_file(found):
    windows = found.windows[found.windows["recipe"] == "awq_int4"]
    of_tokens = found.record.recipes[1].of_tokens
    for name in ("kl", "kl_reverse", "nll", "top1"):
        expected = np.asarray(getattr(of_tokens, name), float).reshape(8, 12).mean(axis=1)
        assert windows[name].tolist() == pytest.approx(expected.tolist())
    assert windows["first_token"].tolist() == found.record.windows.first_token.tolist()
    layers = found.layers[found.layers["recipe"] == "awq_int4"]
    assert layers["name"].tolist() == [f"model.layers.{block}.{part}" for block in range(2) for part in PARTS]
    assert layers["output_sqnr_db"].tolist() == found.record.recipes[1].of_layers.output_sqnr_db.tolist()
    assert layers["kl_alone"].isna().all()


def test_layers_are_ranked_by_what_each_costs_alone(found):
    layers = found.layers[found.layers["recipe"] == "rtn_int4"]
    costs = found.record.alone.kl
    assert found.alone == "rtn_int4"
    assert layers["kl_alone"].tolist() == pytest.approx(costs.mean(axis=1).tolist())
    assert layers["stream_alone"].tolist() == pytest.approx(found.record.alone.stream.mean(axis=1).tolist())
    assert layers["rank_alone"].tolist() == (1 + np.argsort(np.argsort(-costs.mean(axis=1)))).tolist()
    low, high = Bootstrap(np.full(8, 12)).interval(costs[3])
    assert layers[["kl_alone_low", "kl_alone_high"]].iloc[3].tolist() == [low, high]


def test_a_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3, 4], [10, 40, 20, 30]) == pytest.approx(0.4)  # 1 - 6·6/(4·15)
    assert rank_correlation([1, 2, 3, 9], [1, 2, 3, np.nan]) == 1
    assert np.isnan(rank_correlation([1, 2], [1, 2]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.56, "0.560"),
        (0.0013049, "0.00130"),
        (12.345, "12.3"),
        (1.23e-7, "1.23e-07"),
        (np.inf, "inf"),
        (np.nan, "-"),
    ],
)
def test_three_digits_count(value, text):
    assert nats(value) == text


def test_the_command_prints_kl_first_and_perplexity_last(folder, command):
    code, out, err = command(folder)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "1 evaluation; 1 left out"
    assert lines[1].startswith(f"left out {folder}/damaged.h5: damaged HDF5 file")
    assert (
        lines[2]
        == "evaluation tiny: tiny (), 7 recipes searched on 7 tokens and evaluated on 96 in 8 windows of 13, 8 layers"
    )
    assert lines[4].split() == ["recipe", "bits", "KL", "95", "%", "interval", "over", "RTN", *lines[4].split()[8:]]
    assert lines[4].split()[-1] == "perplexity"
    rows = [line.split()[0] for line in lines[5:13]]
    assert rows == SIZES
    assert "8 layers alone in rtn_int4, KL: " in out
    assert "perplexity is a footnote" in out
    assert lines[-4] == "tables report: evaluation_recipes, evaluation_layers, evaluation_windows as Parquet and CSV"
    for name in ("recipes", "layers", "windows"):
        expected = together(collect([folder]).evaluations, name)
        pd.testing.assert_frame_equal(pd.read_parquet(f"report/evaluation_{name}.parquet"), expected)
        assert len(pd.read_csv(f"report/evaluation_{name}.csv")) == len(expected)


def test_runs_and_evaluations_lie_side_by_side(folder, command, tmp_path):
    make_run(tmp_path / "recipes" / "rtn_int4")
    (tmp_path / "calibration.h5").write_bytes(write_study(tmp_path).read_bytes()[:2000])  # no result, as its layers are
    code, out, _ = command(tmp_path, folder / "tiny")
    assert code == 0
    assert out.splitlines()[0] == "1 run: 1 complete, 0 failed; 2 evaluations; 0 left out"
    assert set(pd.read_csv("report/evaluation_recipes.csv")["evaluation"]) == {"tiny", tmp_path.name}
    assert Path("report/runs.csv").exists()


def test_one_that_failed_says_why_and_shows_what_it_has(command, tmp_path):
    write_study(tmp_path, {"one": ("", 4.0, 0.1)}, status="failed", error="KeyboardInterrupt: SIGINT")
    code, out, _ = command(tmp_path / "evaluation.h5")
    assert code == 0
    assert f"failed {tmp_path.name}: KeyboardInterrupt: SIGINT" in out.splitlines()
    assert any(line.split()[0] == "one" for line in out.splitlines() if line.startswith(" "))


def test_a_single_window_has_no_intervals(command, tmp_path):
    write_study(tmp_path, windows=1, alone="plan")
    code, out, _ = command(tmp_path)
    assert code == 0
    assert "plan 4.20 " in " ".join(out.split())
    assert collect([tmp_path]).evaluations[0].layers["kl_alone_low"].isna().all()


def test_the_original_alone_has_tables_of_the_same_columns(command, found, tmp_path):
    write_study(tmp_path, {})
    code, out, _ = command(tmp_path)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line.startswith(" ")][-1] == "original"
    (alone,) = collect([tmp_path]).evaluations
    for name in ("recipes", "windows", "layers"):
        assert list(getattr(alone, name)) == list(getattr(found, name))
    assert alone.layers["kl_alone"].dtype == alone.recipes["kl_over_rtn"].dtype == float


def test_what_needs_runs_says_that_it_got_an_evaluation(folder, command):
    line = f"error: {folder}/tiny: an evaluation of a model, not a run; allowed: results of runs\n"
    assert command("table", folder / "tiny") == (2, "", line)


def test_the_documentation_names_every_column(folder, command):
    text = (Path(__file__).parent.parent / "docs" / "analysis.md").read_text(encoding="utf-8")
    command(folder)
    write_study(Path("b"), seed=1)
    assert command("compare", folder / "tiny", "b", "out=report")[0] == 0
    tables = [*Path("report").glob("evaluation_*.csv"), *Path("report").glob("compare_*.csv")]
    assert len(tables) == 5
    for path in tables:
        for column in (path.stem, *pd.read_csv(path).columns):
            ends = [column.removesuffix(end) for end in ("_low", "_high", "")]
            assert any(f"`{name}`" in text for name in ends), column


def test_a_notebook_reads_the_file_as_it_is_laid_out(folder, found):
    tree = load(folder / "tiny" / "evaluation.h5")
    assert tree["tokens/kl"].dims == ("recipe", "token")
    names = tree["recipes/name"].values.tolist()
    assert float(tree["recipes/kl"][names.index("awq_int4")]) == found.recipes.set_index("recipe")["kl"]["awq_int4"]
    assert tree["layers/bits"].attrs["description"].startswith("bits of a weight")
    with pytest.raises(InputError, match=r"tiny/evaluation\.h5: an evaluation, to be given alone"):
        load(folder)


# ---- two of them compared


def verdicts(out):
    """By recipe: its verdict on KL."""
    rows = [line.split() for line in out.splitlines() if line.startswith(" ") and "interval" not in line]
    return {row[0]: row[-1] for row in rows}


def test_one_against_itself_is_the_same(folder, command):
    code, out, err = command("compare", folder / "tiny", folder / "tiny" / "evaluation.h5", "fail_on=worse,slower")
    assert (code, err) == (0, "")
    assert verdicts(out) == dict.fromkeys(RECIPES, "same")
    assert [line for line in out.splitlines() if ": " in line][-4:] == [
        f"{name}: 7 same" for name in ("KL", "reverse KL", "perplexity", "top-1")
    ]


def test_better_worse_and_unclear_by_pairs_of_windows(folder, command, tmp_path):
    changed = {
        name: (config, bits, size * {"awq_int4": 0.8, "rtn_int8": 1.5}.get(name, 1))
        for name, (config, bits, size) in RECIPES.items()
        if name != "plan"
    }
    changed["clip_int4"] = (changed["clip_int4"][0] + "seed: 3\n", *changed["clip_int4"][1:])
    write_study(tmp_path / "b", changed | {"other": ("", 5.0, 0.1)}, seed=5, calibration_sha256="f" * 64)
    code, out, _ = command("compare", folder / "tiny", "b", "fail_on=worse", "out=made")
    found = verdicts(out)
    assert (found["awq_int4"], found["rtn_int8"], found["rtn_nvfp4"]) == ("better", "worse", "unclear")
    assert "calibration tokens of A and B differ" in out.splitlines()
    assert "models of A and B differ" not in out.splitlines()
    assert "clip_int4 has another config in B" in out.splitlines()
    assert "not compared: A plan: B has no such recipe" in out.splitlines()
    assert "not compared: B other: A has no such recipe" in out.splitlines()
    table = pd.read_csv("made/compare_figures.csv")
    worse = int((table["verdict"] == "worse").sum())
    assert (code, out.splitlines()[-1]) == (1, f"fail_on=worse: {worse} worse")
    row = table[(table["recipe"] == "awq_int4") & (table["figure"] == "kl")].iloc[0]
    a, b = study(), study(changed, seed=5)
    pairs = [next(r.of_tokens.kl for r in of.recipes if r.name == "awq_int4") for of in (a, b)]
    assert row["difference"] == pytest.approx((pairs[1] - pairs[0]).mean())
    assert row["low"] < row["difference"] < row["high"] < 0
    loose = command("compare", folder / "tiny", "b", "metric_tolerance=0.9")[1]
    assert set(verdicts(loose).values()) == {"same"}


def test_of_very_many_recipes_some_are_printed_and_all_written(command, tmp_path):
    many = {f"r{index:02d}": ("", 4 + index / 100, 0.1) for index in range(43)}
    write_study(tmp_path, many, windows=2, per_window=2, blocks=1)
    assert "4 more recipes are in the table evaluation_recipes" in command(tmp_path)[1].splitlines()
    out = command("compare", tmp_path, tmp_path, "out=made")[1]
    assert "3 more recipes are not shown (out=FOLDER writes all)" in out.splitlines()
    assert len(pd.read_csv("made/compare_figures.csv")) == 4 * 43


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation_sha256": "b" * 64}, "evaluation tokens differ: eeeeeeeeeeee and bbbbbbbbbbbb"),
        ({"per_window": 6}, "tokens of a window differ: 13 and 7"),
        ({"windows": 7}, "the windows differ"),
        ({"recipes": {"other": ("", 4.0, 0.1)}}, "B has no recipe that A has"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(folder, command, changes, message):
    write_study(Path("b"), **changes)
    code, out, err = command("compare", folder / "tiny", "b")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}; allowed: two evaluations ")
    assert len(err.splitlines()) == 1


def test_an_evaluation_is_not_compared_with_something_else(folder, command):
    run = make_run(Path("run"))
    for other, reason in ((run, "the result of a run"), (folder / "damaged.h5", "damaged HDF5 file")):
        code, out, err = command("compare", folder / "tiny", other)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {other}: {reason}")
        assert len(err.splitlines()) == 1


def test_damage_within_is_told(folder, command, tmp_path):
    path = write_study(tmp_path / "torn")
    with editing(path) as file:
        del file["windows/tokens"]
    code, _, err = command(path)
    assert code == 2
    assert err == f"error: {path}: no result that can be read; left out: {path} (/windows/tokens is missing)\n"
