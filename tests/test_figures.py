"""Figures: they show the numbers of the files, and stay readable from one layer to hundreds of runs."""

import itertools
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from matplotlib.text import Text
from result_files import H100, editing, make_run, vary

from awq_pycuda.analysis import figure_style, figures_error, figures_search, figures_time
from awq_pycuda.analysis.collect import channels, collect
from awq_pycuda.analysis.figures import write_figures
from awq_pycuda.analysis.selection import (
    format_value,
    layer_labels,
    run_labels,
    swept_keys,
    variants,
    without_folders,
)
from awq_pycuda.names import shorten

BLOCKS = [
    f"model.encoder.layer.{block}.{part}"
    for block in range(6)
    for part in ("attention.self.query", "attention.self.key", "intermediate.dense", "output.dense")
]


def edit(path, change):
    with editing(path) as file:
        change(file)
    return path


def other_results(factor):
    """An edit that makes the results of a run differ from those of the run that it is a copy of."""

    def change(file):
        for layer in file["layers"].values():
            layer["metrics"].attrs["output_mse"] *= factor
            layer["metrics"].attrs["output_sqnr_db"] -= 10 * np.log10(factor)
            layer["search/error"][1:] *= factor

    return change


def fail(file):
    file.attrs["status"], file.attrs["error"] = "failed", "RuntimeError: boom"
    del file["layers"], file["timings"]


def on_gpu(file):
    file.attrs["device"], file.attrs["backend"] = H100, "cuda"
    layers, stages, repeats = file["timings/gpu_ms"].shape
    file["timings/gpu_ms"][...] = 1e-3 * (1 + np.arange(layers * stages * repeats).reshape(layers, stages, repeats))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Result files of every kind of collection that a figure must stay readable for, by name."""
    base = tmp_path_factory.mktemp("figures")
    one = make_run(base / "one", "layers=1")
    three = make_run(base / "three")
    for n, tile in itertools.product((16, 32, 64), (8, 16)):
        edit(vary(three, base / "sweep" / f"{n}-{tile}", {"n": n, "tokens": n, "tile": tile}, n / 8), other_results(n))
    for index in range(60):
        config = {"n": 16 * 2 ** (index % 6), "inputs.path": f"/data/layers/{index // 6}.h5", "seed": index}
        edit(vary(three, base / "many" / str(index), config, 1 + index % 6), other_results(1 + index / 10))
    deep = make_run(base / "deep", "layers=24", "inputs=synthetic", "inputs.weight_scale=he")

    def named(file):
        for layer, name in zip(file["layers"].values(), BLOCKS, strict=True):
            layer.attrs["name"] = name

    edit(vary(deep, base / "named"), named)
    for index in range(12):
        edit(edit(vary(deep, base / "named_many" / str(index), {"n": index}), named), other_results(1 + index))
    edit(vary(three, base / "gpu"), on_gpu)
    edit(vary(one, base / "failed"), fail)
    odd = r"_odd $x^{$ <b>&amp;\name"

    def oddly_named(file):
        for layer in file["layers"].values():
            layer.attrs["name"] = odd + layer.attrs["name"]

    for index in range(2):
        edit(
            edit(vary(three, base / "odd" / f"{odd}{index}", {"inputs.path": odd * (1 + index)}), oddly_named),
            fail if index else other_results(2),
        )
        edit(
            edit(vary(three, base / "odd" / f"{odd}{index + 2}", {"inputs.path": odd * (3 + index)}), oddly_named),
            other_results(3 + index),
        )
    return base


CASES = ("one", "three", "sweep", "many", "deep", "named", "named_many", "gpu", "odd")
QUALITY = ["error_curves", "channel_scales", "sqnr", "propagation"]
DRAWN = {
    "one": [*QUALITY[:-1], "stage_times"],  # one layer: nothing is carried over
    "sweep": [*QUALITY, "stage_times", "time_against_n", "time_against_tile", "error_removed_against_n"],
    "many": [*QUALITY, "stage_times", "time_against_n", "time_against_inputs_path", "time_against_seed"],
    "named_many": [*QUALITY, "stage_times", "time_against_n", "error_removed_against_n"],
    "gpu": [*QUALITY, "stage_times", "roofline"],
    "odd": [*QUALITY, "stage_times", "time_against_inputs_path", "error_removed_against_inputs_path"],
    "failed": [],
}


@pytest.fixture
def figure(folders):
    """`figure(draw, case)`: the figure that a function draws of a case, laid out, and the collection."""
    with figure_style.style():

        def drawn(draw, case):
            collection = collect([folders / case])
            found = draw(collection)
            if found is not None:
                found.draw_without_rendering()
            return found, collection

        yield drawn


def against(key):
    return lambda collection: dict(figures_time.times_against(collection))[key]()


def dots(panel, marker="o"):
    """Every (x, y) that is marked so in a panel."""
    lines = [line for line in panel.lines if line.get_marker() == marker]
    return sorted(
        zip(*(np.concatenate([np.asarray(line.get_data()[i], float) for line in lines]) for i in (0, 1)), strict=True)
    )


@pytest.mark.parametrize("case", [*CASES, "failed"])
def test_every_figure_is_two_whole_small_files_without_overlapping_text(folders, tmp_path, monkeypatch, case):
    texts = {}

    def save_and_look(figure, folder, stem, save=figure_style.save):
        paths = save(figure, folder, stem)
        figure.draw_without_rendering()  # saving leaves labels where its own resolution had them
        texts[stem] = shown_texts(figure), figure.bbox
        return paths

    monkeypatch.setattr(figure_style, "save", save_and_look)
    paths, failures = write_figures(collect([folders / case]), tmp_path / "out")
    assert failures == []
    assert list(texts) == DRAWN.get(case, [*QUALITY, "stage_times"])
    assert [path.name for path in paths] == [f"{stem}.{kind}" for stem in texts for kind in ("png", "svg")]
    assert sorted((tmp_path / "out").glob("*")) == sorted(paths)
    for png, svg in zip(paths[::2], paths[1::2], strict=True):
        pixels = imread(png)
        assert pixels.shape[1] > 900
        assert pixels[:, :, :3].std() > 0.03
        written = {node.text for node in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")}
        assert len(written) > 5  # text is text
        assert svg.stat().st_size < 300_000
    for stem, (shown, page) in texts.items():
        assert len(shown) > 5
        for text, box, _ in shown:
            inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 + 1
            assert inside, f"{stem}: {text!r} leaves the figure"
        for (one, a, turned), (other, b, _) in itertools.combinations(shown, 2):
            apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
            # Labels that are turned side by side: their lines are apart where their right ends are.
            apart = apart or (turned and abs(a.x1 - b.x1) * np.sin(np.radians(turned)) > 10)
            assert apart, f"{stem}: {one!r} overlaps {other!r}"


def shown_texts(figure):
    """Every text that can be seen, its box in pixels, and by how many degrees it is turned (0 where upright)."""
    ticks = set()
    seen = []
    for panel in figure.axes:
        for axis in (panel.xaxis, panel.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-6 * (high - low)
            for tick in (*axis.majorTicks, *axis.minorTicks):
                ticks |= {tick.label1, tick.label2}
            inside = [tick for tick in axis.get_major_ticks() if low - slack <= tick.get_loc() <= high + slack]
            seen += [tick.label1 for tick in inside if panel.get_visible()]
    seen += [
        text for text in figure.findobj(Text) if text not in ticks and (text.axes is None or text.axes.get_visible())
    ]
    texts = [text for text in seen if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent(), text.get_rotation() % 90) for text in texts]


def test_error_curves_are_those_of_the_search_with_the_chosen_gamma_marked(figure):
    found, collection = figure(figures_search.error_curves, "three")
    (panel,) = found.axes
    for layer, marker in zip(range(3), figure_style.MARKERS, strict=False):
        mine = collection.curves[collection.curves["layer"] == layer].sort_values("gamma")
        lines = [line for line in panel.lines if np.array_equal(line.get_xdata(), mine["gamma"])]
        assert any(np.array_equal(line.get_ydata(), mine["error_relative"]) for line in lines)
        chosen = mine[mine["chosen"]]
        assert dots(panel, marker) == [(chosen["gamma"].item(), chosen["error_relative"].item())]


def test_curves_of_more_than_gamma_say_where_rtn_is(tmp_path):
    make_run(tmp_path, "n=32", "layers=2", "inputs=outliers", "search.formula=both")
    figure = figures_search.error_curves(collect([tmp_path]))
    told = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "1 is RTN; of candidates with one γ the best" in told


def test_error_curves_of_many_layers_come_in_families_and_of_many_runs_as_medians(figure):
    found, _ = figure(figures_search.error_curves, "named")
    assert [panel.get_title() for panel in found.axes[:4]] == [
        "attention.self.query",
        "attention.self.key",
        "intermediate.dense",
        "output.dense",
    ]
    found, collection = figure(figures_search.error_curves, "many")
    first = collection.curves[collection.curves["layer"] == 0]
    medians = first.groupby("gamma")["error_relative"].median()
    panel = found.axes[3]
    assert any(np.allclose(line.get_ydata(), medians) for line in panel.lines if len(line.get_ydata()) == len(medians))
    assert len(panel.lines) < 5
    shares = first[first["chosen"]]["gamma"].value_counts(normalize=True)
    assert {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in found.axes[0].patches} == pytest.approx(
        dict(shares)
    )


def test_channels_show_statistics_scales_and_the_salient_ones(figure, folders):
    found, _ = figure(figures_search.channel_scales, "three")
    upper, lower = found.axes[:3], found.axes[3:]
    for layer in range(3):
        table = channels(folders / "three" / "results.h5", layer)
        assert table["salient"].sum() == 1
        for panel, column in ((upper[layer], "abs_mean"), (lower[layer], "s")):
            (salient,) = dots(panel, "^")
            assert salient == (table[column][table["salient"]].index[0], table[column][table["salient"]].item())
            rest = table[~table["salient"] & (table["abs_mean"] > 0)]
            assert set(zip(rest.index, rest[column], strict=True)) <= set(dots(panel))
    assert "γ = " in upper[0].get_title()
    assert upper[0].get_yscale() == "log"


def test_sqnr_stands_at_both_values_and_their_difference(figure):
    found, collection = figure(figures_error.sqnr, "three")
    left, right = found.axes
    rows = collection.layers
    both = np.concatenate([rows["rtn_output_sqnr_db"], rows["output_sqnr_db"]])
    assert dots(left) == sorted(zip(both, [0, 1, 2, 0, 1, 2], strict=True))
    assert dots(right) == sorted(zip(rows["output_sqnr_db"] - rows["rtn_output_sqnr_db"], range(3), strict=True))


def test_sqnr_of_many_runs_shows_medians_and_every_gain(figure):
    found, collection = figure(figures_error.sqnr, "many")
    left, right = found.axes
    medians = collection.layers.groupby("layer")[["rtn_output_sqnr_db", "output_sqnr_db"]].median()
    assert sorted(x for x, _ in dots(left)) == pytest.approx(sorted(medians.to_numpy().ravel()))
    assert len(dots(right)) == 60 * 3
    assert len(found.legends[0].get_texts()) == 2


def test_propagation_breaks_where_a_layer_has_its_own_activations(figure, folders):
    found, collection = figure(figures_error.propagation, "three")
    (panel,) = found.axes
    solid = next(line for line in panel.lines if line.get_linestyle() == "-")
    rows = collection.layers
    kept = np.isfinite(solid.get_ydata())
    assert solid.get_ydata()[kept].tolist() == rows["propagated_sqnr_db"].tolist()
    assert kept.tolist() == [False, True, True, True]  # a chain starts at layer 0 and goes on

    def own(file):
        metrics = file["layers/002/metrics"].attrs
        metrics["propagated_output_mse"] = metrics["output_mse"]

    edit(vary(folders / "three" / "results.h5", folders / "own"), own)
    found, _ = figure(figures_error.propagation, "own")
    solid = next(line for line in found.axes[0].lines if line.get_linestyle() == "-")
    assert np.isfinite(solid.get_ydata()).tolist() == [False, True, True, False, True]
    assert "activations of its own" in found.texts[1].get_text()


def test_stage_times_stack_up_to_the_times_of_layers_or_runs(figure):
    found, collection = figure(figures_time.stage_times, "three")
    stages = [column for column in collection.layers if column.startswith("ms.")]
    left, right = found.axes
    ends = [bar.get_x() + bar.get_width() for bar in left.patches[-3:]]
    assert ends == pytest.approx(collection.layers[stages].sum(axis=1).tolist())
    assert [bar.get_x() + bar.get_width() for bar in right.patches[-3:]] == pytest.approx([1, 1, 1])
    found, collection = figure(figures_time.stage_times, "sweep")
    passes = collection.timings.groupby(["run", "stage", "repeat"], sort=False)["ms"].sum()
    sums = passes.groupby(["run", "stage"], sort=False).median().groupby("run", sort=False).sum()
    bars = found.axes[0].patches[-6:]
    assert [bar.get_x() + bar.get_width() for bar in bars] == pytest.approx(sums.tolist())
    labels = [label.get_text() for label in found.axes[0].get_yticklabels()]
    assert labels == [f"n={n} tile={tile}" for n in (16, 32, 64) for tile in (8, 16)]
    found, _ = figure(figures_time.stage_times, "many")
    assert len(found.axes[0].get_yticklabels()) == 6  # by n, which alone changes the times


def test_runs_without_measured_passes_stand_in_no_picture_of_times(tmp_path):
    make_run(tmp_path / "0", "layers=2")
    make_run(tmp_path / "1", "layers=2", "timing=none")
    found = figures_time.stage_times(collect([tmp_path]))
    assert [label.get_text() for label in found.axes[0].get_yticklabels()] == ["layer 0", "layer 1"]
    shutil.rmtree(tmp_path / "0")
    assert figures_time.stage_times(collect([tmp_path])) is None


def test_time_against_a_number_joins_medians_on_axes_to_scale(figure):
    found, collection = figure(against("n"), "sweep")
    left, right = found.axes
    assert (left.get_xscale(), left.get_yscale(), right.get_yscale()) == ("linear", "linear", "log")
    for tile, marker in ((8, "o"), (16, "s")):
        mine = collection.runs[collection.runs["tile"] == tile].sort_values("n")
        assert dots(left, marker) == list(zip(mine["n"], mine["pipeline_ms"], strict=True))
    assert [text.get_text() for text in found.legends[0].get_texts()] == ["tile=8", "tile=16"]
    assert "tokens" in found.texts[1].get_text()
    found, _ = figure(against("n"), "many")
    assert found.axes[0].get_xscale() == "log"
    assert [label.get_text() for label in found.axes[0].get_xticklabels()] == ["16", "32", "64", "128", "256", "512"]


def test_time_against_a_category_has_a_place_for_each_value(figure):
    found, _ = figure(against("inputs.path"), "many")
    panel = found.axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == [f"{index}.h5" for index in range(10)]
    assert {round(x) for x, _ in dots(panel)} == set(range(10))


def test_roofline_has_points_under_the_ceilings_of_the_gpu_and_none_on_a_cpu(figure):
    assert figure(figures_time.roofline, "three")[0] is None
    found, collection = figure(figures_time.roofline, "gpu")
    (panel,) = found.axes
    size = 16
    own = collection.timings[
        (collection.timings["clock"] == "gpu") & (collection.timings["stage"] == "dequantizeTiled")
    ]
    slow, ms, fast = own["ms"].quantile([0.75, 0.5, 0.25])
    assert fast < ms < slow
    flop, moved = 2 * size**3, 4 * size**2 + size**2 + 4 * size + 4 * size + 4 * size**2
    assert dots(panel, "v") == [pytest.approx((flop / moved, flop / ms / 1e6))]
    bars = [segment[:, 1].tolist() for bars in panel.collections for segment in bars.get_segments()]
    assert pytest.approx([flop / slow / 1e6, flop / fast / 1e6]) in bars
    roof = next(line for line in panel.lines if line.get_marker() == "None")
    assert roof.get_ydata()[0] == pytest.approx(3352.3 * roof.get_xdata()[0], rel=1e-4)
    assert roof.get_ydata()[-1] == pytest.approx(66_908, rel=1e-4)


def test_figures_that_an_earlier_call_left_are_removed_and_other_files_kept(folders, tmp_path):
    (tmp_path / "time_against_n.svg").write_text("of an earlier call")
    (tmp_path / "roofline.png").write_text("of an earlier call")
    (tmp_path / "mine.png").write_text("kept")
    paths, _ = write_figures(collect([folders / "one"]), tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*paths, tmp_path / "mine.png"])


def test_the_same_results_give_the_same_bytes_whatever_the_user_s_settings(folders, tmp_path, monkeypatch):
    import matplotlib as mpl

    collection = collect([folders / "one"])
    first = [path.read_bytes() for path in write_figures(collection, tmp_path / "a")[0]]
    monkeypatch.setitem(mpl.rcParams, "axes.grid", False)
    monkeypatch.setitem(mpl.rcParams, "font.size", 20.0)
    assert [path.read_bytes() for path in write_figures(collection, tmp_path / "b")[0]] == first
    assert mpl.rcParams["font.size"] == 20.0


def test_runs_with_the_same_results_are_one_variant_named_by_what_they_share(folders):
    collection = collect([folders / "sweep"])
    assert swept_keys(collection) == {"n": ["config.tokens"], "tile": []}
    groups = variants(collection, 8)
    assert [(group.label, len(group.runs)) for group in groups] == [("n=16", 2), ("n=32", 2), ("n=64", 2)]
    assert variants(collection, 2) == []
    labels = run_labels(collection)
    assert labels["16-8"] == "n=16 tile=8"


def test_labels():
    layers = pd.DataFrame({"layer": range(24), "name": BLOCKS})
    assert layer_labels(layers)[5] == "1.attention.self.key"
    assert layer_labels(pd.DataFrame({"layer": [0, 0, 1], "name": ["a", "b", "c.d"]})) == {0: "layer 0", 1: "c.d"}
    assert layer_labels(pd.DataFrame({"layer": [0], "name": ["000"]})) == {0: "layer 0"}
    assert shorten("abcdefghij", 7) == "abc…hij"
    assert without_folders(["/a/b/c.h5", "/a/b/d/c.h5"]) == ["c.h5", "d/c.h5"]
    assert without_folders(["/a/b/c.h5"]) == ["/a/b/c.h5"]
    assert [format_value(value) for value in (None, float("nan"), True, 3.0, 0.1, "x")] == [
        "null",
        "null",
        "true",
        "3",
        "0.1",
        "x",
    ]
