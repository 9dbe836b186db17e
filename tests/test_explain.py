"""`analyze explain`: where a layer's error comes from, against the figures of the file."""

import re
import shutil

import h5py
import numpy as np
import pytest
from result_files import editing, make_run

from awq_pycuda import analyze
from awq_pycuda.analysis.explain import explain


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    asked = ("inputs=outliers", "layers=2", "n=64", "quant=int4_g128", "quant.group_size=16", "inputs.holdout=0.25")
    return make_run(tmp_path_factory.mktemp("explained"), *asked)


def table(lines, what):
    """Rows of the table below the line that begins with these words."""
    start = next(index for index, line in enumerate(lines) if line.startswith(f"by {what} ("))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("  "):
            break
        label, share, *rest = line.replace(" others", "_others").replace(" %", "").split()
        rows.append((label, float(share), *rest))
    return rows


def test_shares_are_of_the_file_and_sum_to_all(path):
    lines = list(explain(path, "1", 3))
    with h5py.File(path) as file:
        layer = file["layers/001"]
        by_channel, by_row = (layer[f"lost/by_{name}"][()] for name in ("channel", "row"))
        s, abs_mean, sq_mean, abs_max = (
            layer[name][()] for name in ("scales/s", "stats/abs_mean", "stats/sq_mean", "stats/abs_max")
        )
        metrics = dict(layer["metrics"].attrs)
    assert by_channel.sum() == pytest.approx(by_row.sum(), rel=1e-12)
    for what, values, count in (
        ("input channel", by_channel, 64),
        ("output channel", by_row, 64),
        ("group of 16 input channels", by_channel.reshape(4, 16).sum(axis=1), 4),
    ):
        rows = table(lines, what)
        largest = np.argsort(-values)[:3]
        assert [row[0] for row in rows] == [*map(str, largest), f"{count - 3}_others", "all"]
        shares = [*values[largest], np.delete(values, largest).sum(), values.sum()]
        assert [row[1] for row in rows] == pytest.approx(100 * np.array(shares) / values.sum(), abs=0.051)
        assert sum(row[1] for row in rows[:-1]) == pytest.approx(100, abs=0.3)
    first = table(lines, "input channel")[0]
    channel = int(first[0])
    told = [abs_mean[channel], abs_max[channel], np.sqrt(sq_mean[channel]), s[channel]]
    assert [float(text) for text in first[2:]] == pytest.approx(told, rel=1e-3)
    assert lines[0] == "layer 001 001: 64 x 64, 48 tokens; int4, groups of 16; convention day58"
    for words, of in (("error", ""), ("held out", "held_out_")):
        (line,) = [line for line in lines if line.startswith(f"{words}: RTN")]
        for label, by in (("RTN", "rtn_"), ("max|x|", "max_"), ("AWQ", "")):
            assert f"{label} {metrics[f'{of}{by}output_sqnr_db']:.2f} dB" in line
    # The power of the layer's own output, by its own error, over what has come through the layers before.
    power = metrics["output_mse"] * 10 ** (metrics["output_sqnr_db"] / 10)
    propagated = 10 * np.log10(power / metrics["propagated_output_mse"])
    assert f"propagated: {propagated:.2f} dB, the errors of the layers before included" in lines


def test_it_fits_one_screen_and_takes_names(path, capsys):
    assert analyze.main(["explain", str(path), "000", "top=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert lines == list(explain(path, "000", 2))


def test_what_clipping_takes_is_a_share_of_its_own(tmp_path):
    path = make_run(tmp_path, "n=64", "layers=1", "quant=int4_g128", "clip=groups")
    lines = list(explain(path, "0", 1))
    assert max(map(len, lines)) <= 100
    assert not any(line.startswith("propagated") for line in lines)  # nothing is before it
    with h5py.File(path) as file:
        layer = file["layers/000"]
        clipped, total = layer["lost"].attrs["clipped"], layer["lost/by_row"][()].sum()
        share, without = layer["clip"].attrs["clipped_fraction"], layer["metrics"].attrs["unclipped_output_sqnr_db"]
    at = lines.index(f"clipping: {100 * share:.1f} % of the groups are clipped; without it {without:.2f} dB")
    shares = [float(text) for text in re.findall(r"([\d.]+) %", lines[at + 1])]
    assert shares == pytest.approx([100 * clipped / total, 100 * (1 - clipped / total)], abs=0.051)
    assert 0 < clipped < total


def test_files_from_before_the_baseline_tell_the_rest(path, tmp_path):
    copy = shutil.copy(path, tmp_path / "results.h5")
    with editing(copy) as file:
        file.attrs["schema_version"] = 5
        del file["layers/000/stats/abs_max"], file["layers/000/search/error_by_max"]
        del file["layers/000/search"].attrs["chosen_by_max"]
        metrics = file["layers/000/metrics"].attrs
        for name in [name for name in metrics if "max_" in name]:
            del metrics[name]
    lines, with_it = list(explain(copy, "0", 2)), list(explain(path, "0", 2))
    assert [re.sub(r"max\|x\| \S+ dB, ", "", line) for line in with_it[:5]] == lines[:5]
    assert "max |x|" not in "".join(lines)
    assert [row[:3] for row in table(lines, "input channel")] == [row[:3] for row in table(with_it, "input channel")]


def test_a_curve_is_drawn_from_the_first_candidate_to_the_last(path, tmp_path):
    copy = shutil.copy(path, tmp_path / "results.h5")
    with editing(copy) as file:
        file["layers/000/search/error"][...] = [8, 1, 4.5, 1, 1]
    (line,) = [line for line in explain(copy, "0", 1) if "from gamma" in line]
    assert line.endswith(": █▁▅▁▁")  # halfway is rounded to even


def test_a_layer_that_loses_nothing_says_so(path, tmp_path):
    copy = shutil.copy(path, tmp_path / "results.h5")
    with editing(copy) as file:
        for name in ("by_channel", "by_row"):
            file[f"layers/000/lost/{name}"][...] = 0
    assert list(explain(copy, "0", 1))[-1].startswith("nothing is lost")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["explain", "FILE", "7"], "FILE: no layer is called 7; there are 000, 001; allowed: "),
        (["explain", "FILE", "no such"], "FILE: no layer is called no such; there are 000, 001; allowed: "),
        (["explain", "FILE"], "explain: FILE or LAYER is missing; allowed: explain FILE LAYER"),
        (["explain", "FILE", "0", "FILE"], "explain: 2 files; allowed: one, then the layer"),
        (["explain", "FILE", "0", "top=0"], "top=0: is too small; allowed: a whole number from 1"),
    ],
)
def test_what_cannot_be_explained_is_one_line(path, capsys, arguments, told):
    assert analyze.main([str(path) if each == "FILE" else each for each in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"error: {told.replace('FILE:', f'{path}:')}")


def test_a_file_of_an_earlier_version_is_told(path, tmp_path, capsys):
    copy = shutil.copy(path, tmp_path / "results.h5")
    with editing(copy) as file:
        file.attrs["schema_version"] = 4
    assert analyze.main(["explain", str(copy), "0"]) == 2
    assert "schema_version 4 has nothing of where errors come from; run it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("formula", "told"), [("duo", r"gamma \S+ with duo of 6 "), ("gamma_beta", r"gamma \S+ and beta \S+ of 4 ")]
)
def test_the_chosen_candidate_is_told_by_all_that_was_searched(tmp_path, formula, told):
    grids = ("search.betas=[0,1]", "gammas=[0,1]") if formula == "gamma_beta" else ()
    path = make_run(tmp_path, "n=32", "layers=1", "inputs=outliers", f"search.formula={formula}", *grids)
    assert [line for line in explain(path, "0", 1) if re.search(told, line)]
