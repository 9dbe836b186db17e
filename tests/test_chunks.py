"""Activations that stay in their file: what a run in chunks finds, what it takes of memory, and what is refused."""

import itertools
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import COMPILED, ROOT, make_backend, same_bits

from awq_pycuda import parallel
from awq_pycuda.backends.base import Mark
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.engine.execution import FreeMemory, validate
from awq_pycuda.engine.memory import required_bytes
from awq_pycuda.engine.pipeline import Pipeline
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.errors import InputError
from awq_pycuda.layers.files import load_layers
from awq_pycuda.layers.rows import StoredRows

TOKENS = 3000


def layer_file(path, **options):
    """Two layers of one input, and a wide one of fewer tokens than outputs; `options` are those of the activations."""
    random = np.random.default_rng(1)
    with h5py.File(path, "w") as file:
        for name, (n, k), tokens in (("0.q", (24, 40), TOKENS), ("1.v", (17, 40), None), ("2", (90, 33), 80)):
            layer = file.create_group(f"layers/{name}")
            layer["weight"] = random.normal(size=(n, k)).astype("f4")
            layer["bias"] = random.normal(size=n).astype("f4")
            if tokens is None:
                layer.attrs["activations_of"] = "0.q"
            else:
                x = random.normal(size=(tokens, k)) * random.lognormal(0, 1, k)
                layer.create_dataset("activations", data=x.astype("f2"), **options)
    return path


def finished(compose, backend, path, *asked):
    spec = spec_of(compose("inputs=file", f"inputs.path={path}", "timing=once", "save=full", *asked))
    pipeline = Pipeline(make_backend(backend), spec)
    with parallel.use_threads(2):
        pipeline.run()
    return pipeline


def same(whole, chunked):
    """Whether all that two runs have found of their layers is the same, bit for bit."""
    assert len(whole) == len(chunked) == 3
    for one, other in zip(whole, chunked, strict=True):
        assert one.metrics == other.metrics
        assert same_bits(one.abs_mean, other.abs_mean)
        assert same_bits(one.sq_mean, other.sq_mean)
        assert same_bits(one.search.error, other.search.error)
        assert same_bits(one.search.s, other.search.s)
        assert same_bits(one.quantized.codes, other.quantized.codes)
        assert same_bits(one.lost.by_channel, other.lost.by_channel)
        if one.abs_max is not None:
            assert same_bits(one.abs_max, other.abs_max)
        if one.clipped is not None:
            assert same_bits(one.clipped.ratio, other.clipped.ratio)
            assert same_bits(one.clipped.error, other.clipped.error)


DIAG = ("inputs.holdout=0.3", "timing.repeats=2")
OUTPUT = (
    "tokens=2345",
    "share=inputs",
    "clip=groups",
    "clip.skip=[]",
    "search=output",
    "quant.bits=4",
    "inputs.holdout=0.1",
)
CLIP = (
    "clip=joint", "search.statistic=abs_max", "quant.group_size=16", "quant.bits=3", "clip.skip=[]", "clip.tokens=100",
)  # fmt: skip
ASKED = [("cpu", DIAG), ("cpu", OUTPUT), *((name, asked) for name in COMPILED for asked in (OUTPUT, CLIP))]


@pytest.mark.parametrize(("backend", "asked"), ASKED, ids=str)
def test_chunks_of_any_size_give_the_bits_of_one_pass(compose, monkeypatch, tmp_path, backend, asked):
    # Blocks of sums so small that chunks begin and end within them.
    monkeypatch.setattr(parallel, "SMALLEST_BLOCK", 1000)
    monkeypatch.setattr("awq_pycuda.backends.cpu.SEARCH_TOKENS", 500)
    options = {} if asked is DIAG else {"chunks": (77, 11), "compression": "gzip"}
    path = layer_file(tmp_path / "a.h5", **options)
    whole = finished(compose, backend, path, *asked)
    assert whole.handles.layers[0].parts is None
    for chunk in (7, 640, 10_000):
        chunked = finished(compose, backend, path, *asked, f"inputs.chunk_tokens={chunk}")
        layer = chunked.handles.layers[0]
        assert isinstance(layer.x, StoredRows)
        assert (len(layer.parts) == 1) == (chunk == 10_000)
        assert len(layer.y) == layer.parts[0].stop >= min(chunk, len(layer.x))
        if chunk < len(layer.x):
            assert layer.parts[0].stop % parallel.product_rows(len(layer.x)) == 0
        same(whole.layers, chunked.layers)


def test_a_stage_s_time_is_that_of_all_its_parts(compose, monkeypatch, tmp_path):
    path = layer_file(tmp_path / "a.h5")
    moments = itertools.count()
    monkeypatch.setattr(CpuBackend, "mark", lambda self: Mark(float(next(moments))))
    pipeline = finished(compose, "cpu", path, "inputs.chunk_tokens=1000")
    parts = [len(layer.parts) for layer in pipeline.handles.layers]
    assert parts == [3, 3, 1]
    once = [1, 1, 1, 1]  # statistics, search, steps, codes
    assert (pipeline.timings.host_ms[:, :, 0] / 1e3).tolist() == [[*once, count, count] for count in parts]


@pytest.mark.parametrize("rows", [(10, 10, 10), (1, 2, 3, 24), (30,), (7, 16, 7), (29, 1)], ids=str)
@pytest.mark.parametrize("block", [1, 4, 8, 30, 100])
def test_parts_have_the_blocks_of_the_whole(monkeypatch, rows, block):
    monkeypatch.setattr(parallel, "_block_rows", lambda shape: block)
    whole = np.arange(60).reshape(30, 2)
    ends = np.cumsum(rows)
    parts = [(whole[end - size : end], -whole[end - size : end]) for size, end in zip(rows, ends, strict=True)]
    found = parallel.map_part_blocks(lambda one, other: (one.tolist(), other.tolist()), parts, whole.size)
    expected = [whole[start : start + block] for start in range(0, 30, block)]
    assert found == [(each.tolist(), (-each).tolist()) for each in expected]


def test_a_part_of_a_product_has_the_blocks_of_the_whole(monkeypatch):
    random = np.random.default_rng(2)
    x, w = random.normal(size=(3000, 40)), random.normal(size=(24, 40))
    sizes = []
    monkeypatch.setattr(parallel, "_map_blocks", lambda work, rows, size: sizes.append((rows, size)))
    parallel.product(x, w, np.empty((3000, 24)))
    parallel.product(x[:374], w, np.empty((374, 24)), 3000)
    assert sizes == [(3000, 187), (374, 187)]
    assert parallel.product_part(3000, 24) == 187
    assert parallel.product_part(3000, 3000) == 3000


MEASURED = r"""
import re, sys
from pathlib import Path
from awq_pycuda import Config, run_pipeline
from awq_pycuda.config import ClipConfig, FileInputs, TimingConfig

def peak():
    # That of getrusage begins with what the process had that started this one.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

inputs = FileInputs(path=sys.argv[1], chunk_tokens=4096, holdout=0.25)
config = Config(
    layers=None,
    inputs=inputs,
    backend="cpu",
    threads=1,
    gammas=[0.0, 0.5],
    clip=ClipConfig(enabled=True),
    timing=TimingConfig(0, 1),
)
before = peak()
record = run_pipeline(config)
print(peak() - before, len(record.layers))
"""


# HDF5 itself takes more for a dataset in chunks.
@pytest.mark.parametrize(("chunks", "allowance"), [(None, 24 << 20), ((256, 128), 40 << 20)])
def test_a_file_larger_than_the_memory_goes_through(tmp_path, chunks, allowance):
    whole = 96 << 20
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["layers/0/weight"] = np.eye(32, 128, dtype="f4")
        x = np.broadcast_to(np.linspace(-1, 1, 128, dtype="f4"), (whole // 512, 128))
        file.create_dataset("layers/0/activations", data=x, chunks=chunks)
    out = subprocess.run([sys.executable, "-c", MEASURED, path], check=True, capture_output=True, text=True, cwd=ROOT)
    taken, layers = map(int, out.stdout.split())
    assert layers == 1
    assert taken < allowance


def test_without_room_for_it_whole_a_file_goes_in_chunks(compose, monkeypatch, tmp_path):
    path = layer_file(tmp_path / "a.h5")
    config = compose("inputs=file", f"inputs.path={path}", "backend=cpu", "threads=1")
    free = FreeMemory()
    free.host = 100 << 20
    assert not validate(config, free).spec.in_chunks
    with parallel.use_threads(1):
        whole, chunked = (required_bytes(spec_of(config, in_chunks), None)[1] for in_chunks in (False, True))
    free.host = int(chunked / 0.8) + 1
    assert chunked < whole
    run = validate(config, free)
    assert run.spec.in_chunks
    assert re.search(
        r"; activations in chunks: whole, inputs\.path=.* of the host's memory; allowed: up to", run.reason
    )
    free.host //= 2
    with pytest.raises(InputError, match=r"^inputs\.path=[^\n]*; in chunks: inputs\.path=[^\n]* of the host's memory"):
        validate(config, free)


def chain(path):
    with h5py.File(path, "r+") as file:
        file["layers/3/weight"] = np.ones((4, 90), "f4")
    return path


REFUSED = {
    "0": (["inputs.chunk_tokens=0"], r"inputs\.chunk_tokens=0: allowed: null"),
    "verify": (
        ["inputs.chunk_tokens=64", "verify=true"],
        r"verify=true: the oracle takes activations whole; allowed in chunks",
    ),
    "joint": (
        ["inputs.chunk_tokens=64", "clip=joint", "search=output"],
        r"clip\.joint=true: with search\.objective=output it takes activations whole; allowed in chunks .*: false",
    ),
    "cuda": (["inputs.chunk_tokens=64", "backend=cuda"], r"backend=cuda: .*; allowed here: auto, cpu"),
    "device": (
        ["inputs.chunk_tokens=64", "search.where=device"],
        r"search\.where=device: the backend is cpu \(auto: cuda takes no activations in",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_in_chunks_is_refused(cli, monkeypatch, tmp_path, case):
    asked, message = REFUSED[case]
    monkeypatch.setattr("awq_pycuda.backends.choose.why_no_cuda", lambda: None)
    path = layer_file(tmp_path / "a.h5")
    code, out, err = cli("inputs=file", f"inputs.path={path}", *asked)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err)


def test_a_layer_without_activations_and_a_file_that_is_not_hdf5_are_refused(compose, tmp_path):
    path = chain(layer_file(tmp_path / "a.h5"))
    with pytest.raises(
        InputError, match=r"layer 3 \(3\) has no activations of its own, .*; allowed in chunks .* is HDF5"
    ):
        load_layers(path, stored=True)
    np.savez(tmp_path / "a.npz", **{"0.weight": np.ones((2, 3), "f4"), "0.activations": np.ones((4, 3), "f4")})
    with pytest.raises(InputError, match=r"a\.npz: \.npz is read as a whole; allowed in chunks"):
        load_layers(tmp_path / "a.npz", stored=True)


def test_values_are_looked_at_before_a_run(monkeypatch, tmp_path):
    path = layer_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["layers/0.q/activations"][2718, 5] = np.nan
    monkeypatch.setattr("awq_pycuda.layers.files._LOOKED_THROUGH", 4000)
    with pytest.raises(InputError, match=r"layer 0 \(0\.q\) activations\[2718, 5\] is nan; allowed are finite values"):
        load_layers(path, stored=True)
    assert len(load_layers(path, tokens=2718, stored=True)[0].activations) == 2718


def test_a_file_that_changes_is_not_read_any_further(tmp_path):
    path = layer_file(tmp_path / "a.h5")
    rows = load_layers(path, stored=True)[0].activations
    first = rows[:3]
    with h5py.File(path, "r+") as file:
        assert same_bits(first, file["layers/0.q/activations"][:3].astype("f4"))
        file["layers/0.q/activations"][0] = 1
    with pytest.raises(InputError, match=r"a\.h5: it changed while a run was reading it"):
        rows[:3]
