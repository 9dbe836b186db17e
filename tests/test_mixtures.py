"""Folders of results that no sweep would make: the page is always written, and what cannot be drawn is named."""

import pytest
from result_files import editing, make_run, vary
from version_1 import write_version_1

from awq_pycuda.analysis import figures, figures_error, figures_time, report_data
from awq_pycuda.analyze import main


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
