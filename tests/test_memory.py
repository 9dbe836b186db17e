"""Memory that a run takes: counted before it begins, and held to what is free."""

import itertools
import threading
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from checkpoint_layers import layer

from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.checkpoints.folders import write
from awq_pycuda.engine.arrays import kept_bytes
from awq_pycuda.engine.memory import _exporting, required_bytes
from awq_pycuda.engine.pipeline import Pipeline
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.errors import InputError
from awq_pycuda.kernels.variant import Device
from awq_pycuda.layers.files import load_layers
from awq_pycuda.layers.inputs import LayerSpec, Uniform, plan_layers
from awq_pycuda.limits import refuse_beyond_memory
from awq_pycuda.parallel import _pool, map_row_blocks, use_threads, working_elements

H100 = Device((9, 0), 227 * 1024, 80 << 30)


class Counting(CpuBackend):
    """Counts what it is asked to allocate."""

    allocated = 0

    def empty(self, shape, dtype=None):
        array = super().empty(shape, dtype)
        self.allocated += array.nbytes
        return array


def uniform(rows, cols):
    return Uniform(rows, cols, 0, 0)


def chained(tokens, *features):
    """Layers from one number of features to the next, the first with activations of its own."""
    return [
        LayerSpec(str(index), tokens, uniform(n, k), uniform(tokens, k) if index == 0 else None)
        for index, (k, n) in enumerate(itertools.pairwise(features))
    ]


# Each is ruled by other terms of the sum: weights, activations, outputs, steps, vectors, many layers of one shape.
SHAPES = {
    "weights": (chained(4, 600, 600, 600), ()),
    "activations": (chained(4000, 400, 3, 2), ()),
    "outputs": (chained(4000, 3, 100, 100), ()),
    "steps": (chained(4, 300, 300, 300), ("quant.group_size=1",)),
    "vectors": (chained(2, 30_000, 2, 2), ()),
    "layers": (chained(60, *[60] * 20), ()),
    "shapes": (chained(128, 100, 300, 50, 700, 20), ()),
    "held-out tokens": (
        [
            replace(layer, held_out_tokens=4000, held_out=layer.activations and uniform(4000, 400))
            for layer in chained(100, 400, 400, 60)
        ],
        (),
    ),
    "clipped": (chained(700, 300, 500, 40), ("clip=groups", "quant.group_size=64")),
    "clipped rows": (chained(90, 300, 500, 40), ("clip=groups",)),
    "joint": (chained(400, 200, 300, 40), ("clip=joint", "quant.group_size=64", "gammas=[0.5]")),
    "joint rows": (chained(60, 200, 300, 40), ("clip=joint", "quant.symmetric=false", "gammas=[0.5]")),
    "one input": (
        [
            LayerSpec(str(n), 300, uniform(n, 300), uniform(300, 300), input_of=0 if n < 500 else None)
            for n in (500, 7, 80)
        ],
        ("share=inputs", "search.formula=duo"),
    ),
    "own activations": ([LayerSpec(str(k), 900, uniform(5, k), uniform(900, k)) for k in (200, 300)], ()),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_table_of_arrays_is_what_a_run_allocates(compose, shape):
    layers, overrides = SHAPES[shape]
    spec = replace(spec_of(compose("timing=once", *overrides)), layers=layers)
    backend = Counting()
    with use_threads(1):
        Pipeline(backend, spec).run()
    assert kept_bytes(spec.layers, spec.convention) == backend.allocated


def peak_of(spec):
    """The most that a run has of the host at one time, in bytes. Its threads are new: blocks that they keep count."""
    done = []

    def run():
        tracemalloc.start()
        try:
            with use_threads(spec.threads):
                Pipeline(CpuBackend(), spec).run()
            done.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()

    _pool.cache_clear()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (peak,) = done
    return peak


@pytest.mark.parametrize("overrides", [(), ("verify=true",), ("save=full",), ("search=output",)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_run_takes_more_of_the_host_than_estimated(compose, shape, overrides):
    layers, others = SHAPES[shape]
    spec = replace(spec_of(compose("timing=once", "threads=1", *overrides, *others)), layers=layers)
    with use_threads(spec.threads):
        _, estimate = required_bytes(spec, device=None)
    assert peak_of(spec) <= 1.1 * estimate + 300_000  # Python's own objects


@pytest.mark.parametrize(
    "overrides", [("awq", "quant.step_dtype=fp16"), ("compressed_tensors", "quant.bits=8")], ids=str
)
def test_a_checkpoint_takes_no_more_than_estimated(compose, tmp_path, overrides):
    target, quant = overrides
    spec = spec_of(compose("n=512", "layers=2", "quant=int4_g128", quant, f"export={target}"))
    layers = {each.name: layer(spec.convention.quantizer, *each.weight.shape) for each in spec.layers}
    tracemalloc.start()
    try:
        write(tmp_path, spec.export, layers)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    estimate = _exporting(spec)
    assert 0.5 * estimate <= peak <= 1.1 * estimate


# Large enough that arrays and not Python's own objects are counted.
RUNS = [
    ("n=256",),
    ("n=512",),
    ("n=1024", "layers=1"),
    ("n=512", "layers=6"),
    ("n=512", "search=output"),
    ("n=512", "quant.group_size=16"),
    ("n=512", "quant.group_size=128", "gamma_grid=fine"),
    ("n=512", "tokens=2048"),
    ("n=1024", "tokens=16"),
    ("n=512", "verify=true"),
    ("n=300", "verify=true", "tokens=2000", "search=output"),
    ("n=512", "quant=mxfp4"),
    ("n=512", "quant=nvfp4", "verify=true"),
    ("n=512", "quant.symmetric=false", "quant.group_size=4", "verify=true"),
    ("n=512", "quant=mxfp4", "verify=true", "tokens=64", "search=output", "layers=1"),
    ("n=512", "layers=1", "clip=joint", "quant=int4_g128", "gammas=[0.5]"),
    ("n=1024", "tokens=64", "clip=groups", "layers=1"),
    ("n=512", "tokens=2048", "layers=1", "clip=joint", "quant=nvfp4", "search=output", "gammas=[0]"),
    ("n=512", "save=full"),
    ("n=700", "threads=2"),
    ("n=512", "inputs=outliers", "layers=1"),
    ("n=2048", "layers=1", "tokens=64"),
    ("n=256", "tokens=8192", "layers=1"),
]


@pytest.mark.parametrize("overrides", RUNS, ids=" ".join)
def test_the_estimate_is_within_10_percent_of_the_peak(compose, overrides):
    spec = spec_of(compose("timing=once", "threads=1", *overrides))
    with use_threads(spec.threads):
        _, estimate = required_bytes(spec, device=None)
    assert 0.9 <= peak_of(spec) / estimate <= 1.1


@pytest.mark.parametrize("threads", [1, 3, 100])
@pytest.mark.parametrize("shape", [(1, 1), (1000, 700), (40, 100_000), (3, 5_000_000), (9000, 3000)])
def test_working_elements_are_those_of_the_blocks_at_work(shape, threads):
    rows = map_row_blocks(lambda block: block.stop - block.start, shape)
    with use_threads(threads):
        assert working_elements(shape) == sum(rows[:threads]) * shape[1]


def test_the_limit_is_80_percent_of_what_is_free():
    refuse_beyond_memory("n=8", 80, 100, "host's memory")
    with pytest.raises(InputError) as refused:
        refuse_beyond_memory("n=8", int(1.5 * 2**30), int(1.8 * 2**30), "host's memory")
    assert str(refused.value) == "n=8: needs 1.5 GiB of the host's memory; allowed: up to 80% of the 1.8 GiB free"
    with pytest.raises(InputError):
        refuse_beyond_memory("n=8", 81, 100, "host's memory")


@pytest.mark.parametrize(
    "overrides", [(), ("layers=1",), ("tokens=50",), ("layers=2", "tokens=1"), ("layers=3",)], ids=str
)
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_a_layer_file_s_arrays_are_counted_before_they_are_read(compose, monkeypatch, tmp_path, overrides, dtype):
    path = tmp_path / "layers.h5"
    with h5py.File(path, "w") as file:
        for index, (rows, cols, tokens) in enumerate([(300, 200, 90), (40, 300, None), (500, 7, 400)]):
            file[f"layers/{index:03d}/weight"] = np.ones((rows, cols), dtype)
            if tokens is not None:
                file[f"layers/{index:03d}/activations"] = np.ones((tokens, cols), dtype)
    config = compose("inputs=file", f"inputs.path={path}", *overrides)
    loaded = load_layers(path, config.layers, config.tokens)
    arrays = [array for layer in loaded for array in (layer.weight, layer.activations) if array is not None]
    needed = sum(array.nbytes for array in arrays)

    def load(*_):
        raise AssertionError("read before it was counted")

    free = SimpleNamespace(available=int(needed / 0.8) - 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with monkeypatch.context() as patch:
        patch.setattr("awq_pycuda.layers.inputs.load_layers", load)
        with pytest.raises(
            InputError, match=r"inputs\.path=.*layers\.h5: needs 0\.0 GiB of the host's memory; allowed:"
        ):
            plan_layers(config)
    free.available = int(needed / 0.8) + 1
    assert len(plan_layers(config)) == len(loaded)


def test_a_device_s_part_is_the_arrays_and_the_largest_workspace(compose):
    spec = spec_of(compose("n=64", "tokens=40000", "layers=2", "matmul=blocked"))
    kept = kept_bytes(spec.layers, spec.convention)
    device, _ = required_bytes(spec, device=H100)
    partial_sums = 2 * 8 * 19 * 64  # in float64 over the tokens in 19 parts, of |x| and of x²
    error_sums = 16 * 1024
    assert device - kept == partial_sums > error_sums
    spec = spec_of(
        compose("n=64", "tokens=40000", "layers=2", "matmul=blocked", "stats=atomic")
    )  # which adds up in place
    device, _ = required_bytes(spec, device=H100)
    assert device - kept == error_sums
    spec = spec_of(compose("n=64", "tokens=2000", "layers=2", "matmul=digits"))
    kept = kept_bytes(spec.layers, spec.convention)
    device, _ = required_bytes(spec, device=H100)
    tokens, rows = 2304, 256  # of whole tiles: four digits of 128 bytes and two units, and the codes
    assert device - kept == tokens * (4 * 128 + 8) + rows * 128


def test_the_workspace_of_the_search_by_the_output_follows_the_device_s_memory(compose):
    overrides = ("tokens=512", "layers=1", "matmul=digits", "search=output", f"gammas={[i / 20 for i in range(20)]}")
    spec = spec_of(compose("n=8192", *overrides))
    most, fewer = (required_bytes(spec, replace(H100, memory_bytes=gib << 30))[0] for gib in (80, 8))
    # Two digits of each weight; beside them the maxima of 64 pieces of a row, its step, and 12 bytes.
    of_one = 2 * 8192**2 + 8192 * (4 * 64 + 4 + 12)
    assert 20 * of_one < (80 << 30) // 16
    assert 3 * of_one < (8 << 30) // 16 < 4 * of_one
    assert most - fewer == (20 - 3) * of_one
