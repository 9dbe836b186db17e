"""Figures of error removed, of grids, of depth and of the product's rate: what they draw of which runs."""

import numpy as np
import pandas as pd
import pytest
from result_files import editing, make_run, vary

from awq_pycuda.analysis import figure_style, figures_search
from awq_pycuda.analysis.collect import collect
from awq_pycuda.analysis.figures import write_figures
from awq_pycuda.analysis.figures_product import product_rate
from awq_pycuda.analysis.figures_quality import curves_by_grid, error_removed_against, propagation_by_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Twelve runs: two grids, two kinds of input, three seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    for grid in ("day58", "awq20"):
        for kind in ("synthetic", "outliers"):
            for seed in range(3):
                name = f"{grid}-{kind}-{seed}"
                make_run(folder / name, f"gamma_grid={grid}", f"inputs={kind}", f"seed={seed}", "tile=8", "n=64")
    return collect([folder])


def points(panel, series):
    """x and y of the line of a series."""
    for line in panel.lines:
        if line.get_color() == figure_style.SERIES[series]:
            return line.get_xdata(), line.get_ydata()
    return None


def removed(collection, grid, kind):
    layers = collection.layers
    mine = layers[(layers["gamma_grid_size"] == grid) & (layers["inputs.kind"] == kind)]
    return mine.groupby("run")["error_removed"].median()


def test_a_line_is_the_median_over_seeds_and_its_band_their_range(sweep):
    drawn = {key: draw() for key, draw in error_removed_against(sweep)}
    assert list(drawn) == ["gamma_grid_size", "inputs.kind"]
    (panel,) = drawn["gamma_grid_size"].axes
    texts = [text.get_text() for text in drawn["gamma_grid_size"].legends[0].get_texts()]
    assert texts == ["inputs.kind=outliers", "inputs.kind=synthetic"]
    for series, kind in enumerate(("outliers", "synthetic")):
        x, y = points(panel, series)
        assert list(x) == [5, 20]
        assert y == pytest.approx([removed(sweep, grid, kind).median() for grid in (5, 20)])
    ends = panel.collections[0].get_paths()[0].vertices[:, 1]
    every = [removed(sweep, grid, "outliers") for grid in (5, 20)]
    assert ends.min() == pytest.approx(min(values.min() for values in every))
    assert ends.max() == pytest.approx(max(values.max() for values in every))


def test_categories_stand_side_by_side_unjoined(sweep):
    (panel,) = dict(error_removed_against(sweep))["inputs.kind"]().axes
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert labels == ["outliers", "synthetic"]
    assert points(panel, 0)[0] == pytest.approx([-0.15, 0.85])
    assert {line.get_linestyle() for line in panel.lines[:2]} == {"None"}


def test_a_key_that_changes_nothing_has_no_figure(sweep, tmp_path):
    first = sweep.runs["path"].iloc[0]
    for tile in (8, 16):
        vary(first, tmp_path / str(tile), {"tile": tile})
    found = collect([tmp_path])
    assert found.swept == ["tile"]
    assert list(error_removed_against(found)) == []
    assert curves_by_grid(found) is None
    assert propagation_by_sweep(found) is None


def test_without_seeds_the_layers_spread(tmp_path):
    for grid in ("rtn", "awq20"):
        make_run(tmp_path / grid, f"gamma_grid={grid}", "n=64")
    found = collect([tmp_path])
    ((_, draw),) = error_removed_against(found)
    figure = draw()
    layers = found.layers[found.layers["gamma_grid_size"] == 20]["error_removed"]
    assert points(figure.axes[0], 0)[1] == pytest.approx([0, layers.median()])
    ends = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert ends.max() == pytest.approx(layers.quantile(0.75))


def test_many_combinations_give_one_line_of_quartiles(sweep, tmp_path):
    path = sweep.runs["path"].iloc[0]
    for index in range(9):
        for tile in (8, 16):
            copy = vary(path, tmp_path / f"{index}-{tile}", {"inputs.channels": 0.1 * (1 + index), "tile": tile})
            with editing(copy) as file:
                for layer in file["layers"].values():
                    layer["metrics"].attrs["output_mse"] *= tile / 16 * (1 + index)
    drawn = {key: draw() for key, draw in error_removed_against(collect([tmp_path]))}
    (panel,) = drawn["tile"].axes
    assert not drawn["tile"].legends
    assert points(panel, 0)[0].tolist() == [8, 16]
    assert points(panel, 1) is None


def test_grids_are_marked_where_they_chose_on_the_finest_curve(sweep):
    figure = curves_by_grid(sweep)
    assert [panel.get_title() for panel in figure.axes] == ["inputs.kind=outliers", "inputs.kind=synthetic"]
    grey, *others = [line for line in figure.axes[0].lines if line.get_color() == figure_style.GREY]
    assert len(others) == 2  # a line per layer of seed 0
    assert len(grey.get_xdata()) == 20
    marked = [line.get_xdata() for line in figure.axes[0].lines if line.get_marker() == figure_style.MARKERS[0]]
    layers = sweep.layers
    mine = (layers["gamma_grid_size"] == 5) & (layers["inputs.kind"] == "outliers") & (layers["seed"] == 0)
    assert sorted(marked[0]) == sorted(layers[mine]["gamma_chosen"])


def test_propagation_has_a_line_per_combination_over_its_seeds(sweep):
    (panel,) = propagation_by_sweep(sweep).axes
    layers = sweep.layers
    mine = layers[(layers["gamma_grid_size"] == 5) & (layers["inputs.kind"] == "outliers")]
    assert points(panel, 0)[1] == pytest.approx(mine.groupby("layer")["propagated_sqnr_db"].median())
    law = panel.lines[-1].get_ydata()
    assert law[0] - law[2] == pytest.approx(10 * np.log10(3))


def test_the_rate_of_the_product_is_work_over_time_with_its_quartiles_over_layers_and_passes(sweep, tmp_path):
    assert product_rate(sweep) is None  # no GPU times
    for n in (16, 32):
        for tile in (8, 16):
            path = make_run(tmp_path / f"{n}-{tile}", f"n={n}", f"tile={tile}")
            with editing(path) as file:
                file.attrs.update(backend="cuda", device_name="GPU")
                layers, stages, repeats = file["timings/gpu_ms"].shape
                slower = np.linspace(1, 3, layers * repeats).reshape(layers, 1, repeats)
                file["timings/gpu_ms"][...] = np.broadcast_to(slower * n / tile, (layers, stages, repeats))
    found = collect([tmp_path])
    (panel,) = product_rate(found).axes
    for series, tile in enumerate((8, 16)):
        x, y = points(panel, series)
        assert list(x) == [16, 32]
        rates = np.array([2 * n**3 / (n / tile * 1e-3) / 1e12 for n in (16, 32)])
        assert y == pytest.approx(rates / 2)
        bars = np.array(panel.collections[series].get_segments())
        assert bars[:, :, 0].tolist() == [[16, 16], [32, 32]]
        assert np.sort(bars[:, :, 1]) == pytest.approx(np.stack([rates / 2.5, rates / 1.5], axis=1))


def test_they_are_among_the_files(sweep, tmp_path):
    names = {path.name for path in write_figures(sweep, tmp_path)[0]}
    assert {"error_removed_against_inputs_kind.svg", "curves_by_grid.png", "propagation_by_sweep.svg"} <= names


def test_of_equally_frequent_grids_the_finest_is_drawn():
    curves = pd.DataFrame({"run": list("abbbcc"), "gamma": [0, 0, 0.5, 1, 0, 1]})
    kept, note = figures_search.same_grid(curves)
    assert set(kept["run"]) == {"b"}
    assert note.startswith("1 of 3 runs")
