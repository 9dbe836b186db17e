"""The schema's table: files, page and analysis follow it; a metric of a later version is absent from earlier files."""

import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
from conftest import ROOT
from result_files import editing, make_run, vary

sys.path.insert(0, str(ROOT / "tools"))
import schema_tables
from renew_docs import Block, parse

from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.engine import verify
from awq_pycuda.engine.stages import NO_TIMINGS
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.results import schema
from awq_pycuda.results.entries import Entry
from awq_pycuda.results.reader import read
from awq_pycuda.results.record import RunRecord
from awq_pycuda.results.status import read_status
from awq_pycuda.results.write import write

LATER = Entry(
    f"{schema.METRICS}/@divergence",
    "a hypothetical one",
    "f8",
    units="nats",
    presence="complete",
    since=schema.VERSION + 1,
    better="lower",
)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("real"), "layers=2")


def test_every_entry_stands_below_its_group_and_along_scales_that_are_there():
    seen = {"/"}
    scales = {entry.name: entry for entry in schema.TABLE if entry.is_scale}
    for entry in schema.TABLE:
        assert entry.path not in seen
        assert entry.parent in seen | {"/"}
        assert 1 <= entry.since <= schema.VERSION
        assert (entry.type is None) <= (entry.units == "1" and not entry.dims)
        for name in entry.dims:
            assert entry.parent.startswith(scales[name].parent), entry
        seen.add(entry.path)
    assert all(entry.better in ("higher", "lower", "neither") for entry in schema.metrics())


def template(name):
    """The schema's path of what a file has under a path."""
    parts = f"/{name}".split("/")
    if parts[1:2] == ["layers"] and len(parts) > 2:
        parts[2] = "000"
    return "/".join(parts)


def stored_type(attribute):
    names = {"|O": "str", "|b1": "bool"}  # HDF5 knows neither as NumPy does
    return names.get(attribute.dtype.str, attribute.dtype.str.lstrip("<|"))


def contents(path):
    """By the schema's path, what a file has there: type, dimensions, units and description."""
    found = {}

    def visit(name, node):
        where = template(name) if name else ""
        if isinstance(node, h5py.Dataset):
            dims = [node.name.split("/")[-1]] if node.is_scale else [dim[0].name.split("/")[-1] for dim in node.dims]
            found[where] = (stored_type(node), tuple(dims), node.attrs["units"], node.attrs["description"])
            return
        found[where or "/"] = (None, (), "1", "")
        for attribute in node.attrs:
            found[f"{where}/@{attribute}"] = (stored_type(node.attrs.get_id(attribute)), (), "1", "")

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
    return found


RUNS = {
    "plain": [],
    "all of it": ["save=full", "verify=true", "quant.group_size=8"],
    "by output": ["search=output", "search.statistic=abs_max", "verify=true"],
    "few bits": ["save=full", "verify=true", "quant=int4_g128", "quant.symmetric=false", "inputs.holdout=0.3"],
    "FP4": ["save=full", "quant=nvfp4", "verify=true"],
    "clipped": ["clip=groups", "quant=int4_g128", "verify=true"],
    "clipped jointly": ["clip=joint", "quant=int4_g128", "verify=true"],
    "duo": ["search.formula=both", "verify=true"],
    "two exponents": ["search.formula=gamma_beta", "verify=true"],
}


@pytest.mark.parametrize("given", RUNS.values(), ids=RUNS)
def test_a_file_has_what_the_table_says_and_nothing_else(tmp_path, given):
    found = contents(make_run(tmp_path, "layers=2", *given))
    by_path = {entry.path: entry for entry in schema.TABLE}
    assert set(found) - {"/"} <= set(by_path)
    optional = {scale.name for scale in schema.TABLE if scale.is_scale and scale.path not in found}
    for path, (kind, dims, units, description) in found.items():
        if path == "/":
            continue
        entry = by_path[path]
        assert kind == entry.type, path
        assert dims == tuple(name for name in entry.dims if name not in optional), path
        if entry.type is not None and not entry.is_attribute:
            assert (units, description) == (entry.units, entry.description), path
    for entry in schema.TABLE:
        assert entry.path in found or entry.parent not in found or not entry.needed(schema.VERSION, True), entry


def test_the_full_file_leaves_nothing_of_the_table_out(tmp_path):
    """Only what a failed run says of itself, what a GPU tells, who shares, and what an evaluation's run reads."""
    made = [make_run(tmp_path / name, "layers=1", *RUNS[name]) for name in RUNS]
    found = {path for file in made for path in contents(file)}
    of_gpu = {entry.path for entry in schema.under(schema.CONDITIONS)}
    assert {entry.path for entry in schema.TABLE} - found == {
        "/@error",
        "/@inputs_sha256",
        f"{schema.LAYER}/search/@shares_s_with",
    } | of_gpu


def test_what_a_gpu_tells_is_stored_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(CpuBackend, "conditions", lambda self: {"power": 300.0, "throttle_reasons": 4.0})
    path = make_run(tmp_path, "layers=1", "timing.repeats=2")
    found = read(path)
    assert {name: values.tolist() for name, values in found.conditions.items()} == {
        "power": [300, 300],
        "throttle_reasons": [4, 4],
    }
    with editing(path) as file:
        values = file["timings/conditions/power"][:1]
        del file["timings/conditions/power"]
        file["timings/conditions/power"] = values
    with pytest.raises(UnreadableError, match=r"/timings/conditions/power has shape \(1,\), not that of pipeline_ms"):
        read(path)


def test_what_is_verified_has_its_entries():
    names = {entry.name for entry in schema.TABLE if entry.parent == schema.VERIFY}
    assert names == {f"{stage}{part}" for stage in verify.TOLERANCES for part in ("", "_tolerance")}


def test_nothing_is_written_that_the_table_does_not_know(tmp_path):
    record = RunRecord({"status": "complete", "mood": "good"}, [], NO_TIMINGS)
    with pytest.raises(KeyError, match=r"/@mood is not in the schema of results\.h5"):
        write(tmp_path / "a", record)
    assert not (tmp_path / "a").exists()


def test_the_pages_are_made_from_the_tables():
    texts = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("results.md", "bench.md", "evaluation.md")]
    blocks = [part for text in texts for part in parse(text) if isinstance(part, Block)]
    shown = {part.opening.split()[-2]: part.lines for part in blocks if part.kind == "table"}
    assert shown == {name: make() for name, make in schema_tables.TABLES.items()}
    text = "\n".join(line for lines in shown.values() for line in lines)
    for entry in schema.TABLE:
        assert f"`{entry.name}`" in text or f"`{entry.path}`" in text, entry


def of_the_next_version(real, folder, **metrics):
    """A file as a later version would write it, with further metrics in every layer."""
    path = vary(real, folder, schema_version=LATER.since)
    with editing(path) as file:
        for layer in file["layers"].values():
            layer["metrics"].attrs.update(metrics)
    return path


def test_a_metric_of_a_later_version_is_needed_from_that_version_on(real, tmp_path, monkeypatch):
    files = [
        vary(real, tmp_path / "today"),
        of_the_next_version(real, tmp_path / "next", divergence=0.5),
        of_the_next_version(real, tmp_path),
    ]
    monkeypatch.setattr(schema, "TABLE", (*schema.TABLE, LATER))
    monkeypatch.setattr(schema, "VERSION", LATER.since)
    assert [LATER.name in layer.metrics for layer in read(files[0]).layers] == [False, False]
    assert [layer.metrics[LATER.name] for layer in read(files[1]).layers] == [0.5, 0.5]
    with pytest.raises(UnreadableError, match="/layers/000/metrics: attribute divergence is missing"):
        read(files[2])
    assert [read_status(path.parent) for path in files] == [("complete", "")] * 3
    monkeypatch.setattr(schema, "TABLE", (*schema.TABLE[:-1], replace(LATER, presence="optional")))
    assert LATER.name not in read(files[2]).layers[0].metrics


def test_tables_comparisons_and_datasets_have_a_later_metric_where_a_file_has_it(real, tmp_path):
    """In a process of its own, in which the table has one more metric before the analysis is imported."""
    old, new = vary(real, tmp_path / "old"), of_the_next_version(real, tmp_path / "new", divergence=0.5)
    script = f"""
from pathlib import Path
from awq_pycuda.results import schema
schema.TABLE += (schema.{LATER!r},)
schema.VERSION = {LATER.since}
from awq_pycuda.analysis import collect as tables
from awq_pycuda.analysis.compare import compare
from awq_pycuda.analysis.load import load
from awq_pycuda.results.reader import read
tables.read_files = lambda paths: [read(path) for path in paths]  # the worker's table is today's
old, new = (tables.collect([Path(path)]) for path in {[str(old), str(new)]!r})
assert old.layers["divergence"].isna().all() and (new.layers["divergence"] == 0.5).all()
assert "divergence" not in set(compare(old, old).metrics["metric"])
own = compare(old, new).metrics.query("metric == 'divergence'")
assert own["verdict"].tolist() == ["unclear"] * 2 and own["a"].isna().all() and (own["b"] == 0.5).all()
both = load({[str(old), str(new)]!r})
assert both["divergence"].isnull().sum() == 2
assert both["divergence"].attrs == {{"units": "nats", "description": "a hypothetical one"}}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_metrics_of_a_run_are_those_of_the_table(real):
    for layer in read(real).layers:
        always = {entry.name for entry in schema.metrics() if entry.presence == "complete"}
        assert set(layer.metrics) == always | {"max_output_mse", "max_output_sqnr_db"}
        assert np.isfinite(list(layer.metrics.values())).all()
