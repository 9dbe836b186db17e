"""Folders of results that no sweep would make: the page is always written, and what cannot be drawn is named."""

import warnings
from random import Random

import h5py
import pytest
from result_files import H100, editing, make_run, vary
from version_1 import write_version_1

from awq_pycuda.analysis import figure_style, figures, figures_error, figures_time, report, report_data
from awq_pycuda.analysis.collect import collect
from awq_pycuda.analysis.report import write_report
from awq_pycuda.analyze import main
from awq_pycuda.engine.stages import NO_TIMINGS
from awq_pycuda.results.record import RunRecord
from awq_pycuda.results.write import write


def analyzed(capsys, *arguments):
    """What analyze printed."""
    assert main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_a_sweep_of_one_layer_beside_a_run_of_two_with_another_grid(capsys, tmp_path):
    for seed in range(8):
        make_run(tmp_path / f"runs/{seed}", "layers=1", "gamma_grid=awq20", f"seed={seed}")
    make_run(tmp_path / "runs/other", "layers=2")
    capsys.readouterr()
    out = analyzed(capsys, tmp_path / "runs", f"out={tmp_path / 'out'}")
    assert "left out" not in out.replace("0 left out", "")
    assert (tmp_path / "out/figures/error_curves.png").exists()
    assert (tmp_path / "out/report.html").exists()


def test_what_cannot_be_drawn_is_named_and_the_rest_is_written(capsys, monkeypatch, tmp_path):
    def fail(*arguments):
        raise KeyError("planted")

    make_run(tmp_path / "runs/0")
    make_run(tmp_path / "runs/1", "n=24")
    capsys.readouterr()
    monkeypatch.setitem(figures._STEMS, "sqnr", fail)
    monkeypatch.setattr(figures_time, "_time_against", fail)
    monkeypatch.setattr(figures_error, "starts_chain", fail)
    monkeypatch.setattr(report_data, "_curves", fail)
    out = analyzed(capsys, tmp_path / "runs", f"out={tmp_path / 'out'}")
    page = (tmp_path / "out/report.html").read_text()
    for part in ("figure sqnr", "figure propagation", "figure time_against_n", "error curves"):
        assert f"left out {part}: KeyError: 'planted'" in out.splitlines()
        assert part in page
    assert (tmp_path / "out/figures/channel_scales.png").exists()
    assert not (tmp_path / "out/figures/sqnr.png").exists()


@pytest.mark.parametrize("names", [["failed"], ["v1", "nan"], ["nan"], ["nan", "other"]])
def test_odd_runs(capsys, tmp_path, names):
    def odd(name, folder):
        if name == "v1":
            return write_version_1(folder)
        path = make_run(folder, "layers=2", *(["gamma_grid=awq20"] if name == "other" else []))
        if name == "failed":
            return vary(path, folder / "x", status="failed", error="no")
        with editing(path) as file:
            if name == "nan":
                for attribute in file["layers/001/metrics"].attrs:
                    file["layers/001/metrics"].attrs[attribute] = float("nan")
        return path

    for index, name in enumerate(names):
        odd(name, tmp_path / f"runs/{index}")
    capsys.readouterr()
    out = analyzed(capsys, tmp_path / "runs", f"out={tmp_path / 'out'}")
    assert "left out" not in out.replace("0 left out", "")
    assert (tmp_path / "out/report.html").exists()


@pytest.mark.parametrize("part", ["run_labels", "page_data", "_title", "_about", "_tiles", "_common", "_columns"])
def test_a_part_of_the_page_that_fails_is_named_on_it(monkeypatch, tmp_path, part):
    path = make_run(tmp_path / "runs/0", "layers=1")
    make = getattr(report, part)

    def fail(given, *arguments, **options):
        if len(getattr(given, "runs", given)):
            raise ValueError("planted\nhere")
        return make(given, *arguments, **options)

    monkeypatch.setattr(report, part, fail)
    failures = []
    write_report(collect([path]), tmp_path / "report.html", failures)
    assert {failure.reason for failure in failures} == {"ValueError: planted here"}
    page = (tmp_path / "report.html").read_text()
    assert all(f'<td class="path">{failure.part}</td>' in page for failure in failures)
    assert str(path) in page


KINDS = {
    "complete": {},
    "failed": {"status": "failed", "error": "RuntimeError: planted"},
    "gpu": {"backend": "cuda", "device": H100},
    "unnamed device": {"device": "{}"},
}
NAMES = ("", "model.layers.0.mlp", "слой_日本語_🦆", "x" * 300, "$_{", "<b>&", "0")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Runs that differ in layers, grid, groups, chain and passes."""
    folder = tmp_path_factory.mktemp("originals")
    one = ("layers=1", "n=8", "timing=once")
    paths = [
        make_run(folder / "a", "layers=1", "gamma_grid=awq20"),
        make_run(folder / "b", "layers=2", "quant.group_size=8", "timing=once"),
        make_run(folder / "c", "layers=12", "n=8", "gammas=[0]", "inputs=synthetic"),
        make_run(folder / "d", *one, "gammas=[0.5,1]", "save=full"),
        write_version_1(folder / "e"),
    ]
    with h5py.File(paths[0]) as file:
        root = {name: file.attrs[name] for name in file.attrs if name not in ("schema", "schema_version")}
    died = RunRecord(root | {"status": "failed", "error": "died"}, [], NO_TIMINGS)
    return [*paths, write(folder / "f", died)]


def mixture(originals, folder, random):
    """A few runs of any kinds, in any number of each."""
    for index in range(random.choice([1, 2, 3, 9, 30])):
        path = random.choice(originals)
        attributes = dict(KINDS[random.choice(list(KINDS))])
        keys = {
            "seed": random.randrange(3),
            "tile": random.choice([8, 16]),
            "n": random.choice([8, 16, None, "x", 1e9]),
        }
        config = {key: value for key, value in keys.items() if random.random() < 0.5}
        config |= random.choice([{}, {"odd": [1, None, "a"]}, {"seed": ...}, {"study": "π"}])
        copy = vary(path, folder / str(index), config, slower=random.choice([0.0, 1.0, 1e9]), **attributes)
        with editing(copy) as file:
            for layer in file.get("layers", {}).values():
                if random.random() < 0.3:
                    layer.attrs["name"] = random.choice(NAMES)
                for name in layer["metrics"].attrs:
                    if random.random() < 0.1:
                        layer["metrics"].attrs[name] = random.choice([0.0, -1.0, 1e300, float("nan"), float("inf")])
                if random.random() < 0.1:
                    layer["search/error"][...] = random.choice([0.0, float("nan"), 1e-300])
                if random.random() < 0.1:
                    layer["stats/abs_mean"][...] = random.choice([0.0, float("nan"), float("inf")])
            if attributes.get("backend") == "cuda":
                file["timings/gpu_ms"][...] = random.choice([0.0, 1.0, float("nan")])


def lay_out(figure, folder, stem):
    """In place of `save`: painting takes most of the time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.draw_without_rendering()
    return []


@pytest.mark.parametrize("seed", range(12))
def test_any_mixture_is_drawn(originals, monkeypatch, tmp_path, seed):
    random = Random(seed)
    mixture(originals, tmp_path / "runs", random)
    collection = collect([tmp_path / "runs"])
    assert collection.left_out == []
    monkeypatch.setattr(figure_style, "save", lay_out)
    _, failures = figures.write_figures(collection, tmp_path / "figures")
    write_report(collection, tmp_path / "report.html", failures)
    assert failures == []
