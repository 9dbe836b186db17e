"""Memory that a run takes: counted before it begins, and held to what is free."""

import itertools
import tracemalloc
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.errors import InputError
from awq_pycuda.inputs import LayerSpec, Uniform, plan_layers
from awq_pycuda.layer_files import load_layers
from awq_pycuda.limits import refuse_beyond_memory
from awq_pycuda.parallel import map_row_blocks, working_elements
from awq_pycuda.pipeline import Pipeline, required_bytes


class Counting(CpuBackend):
    """Counts what it is asked to allocate, and the largest of the inputs: while that is made it is there twice."""

    allocated = largest_input = 0

    def empty(self, shape, dtype=None):
        array = super().empty(shape, dtype)
        self.allocated += array.nbytes
        return array

    def freeze(self, handle):
        self.largest_input = max(self.largest_input, handle.nbytes)
        super().freeze(handle)


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
    "own activations": ([LayerSpec(str(k), 900, uniform(5, k), uniform(900, k)) for k in (200, 300)], ()),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_is_what_a_run_allocates(compose, shape):
    specs, overrides = SHAPES[shape]
    config = compose("timing=once", "threads=1", *overrides)
    backend = Counting(threads=1)
    Pipeline(backend, specs, config).run()
    estimate, _ = required_bytes(specs, config)
    counted = backend.allocated + backend.largest_input
    # The sum counts a bias and the buffers of a chain for every layer.
    assert counted <= estimate <= 1.05 * counted


@pytest.mark.parametrize("overrides", [(), ("verify=true",), ("save=full",), ("search=output",)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_run_takes_more_of_the_host_than_estimated(compose, shape, overrides):
    specs, others = SHAPES[shape]
    config = compose("timing=once", "threads=1", *overrides, *others)
    tracemalloc.start()
    try:
        Pipeline(CpuBackend(threads=1), specs, config).run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= sum(required_bytes(specs, config)) + 500_000  # Python's own objects


@pytest.mark.parametrize("threads", [1, 3, 100])
@pytest.mark.parametrize("shape", [(1, 1), (1000, 700), (40, 100_000), (3, 5_000_000), (9000, 3000)])
def test_working_elements_are_those_of_the_blocks_at_work(shape, threads):
    rows = map_row_blocks(lambda block: block.stop - block.start, shape)
    assert working_elements(shape, threads) == sum(rows[:threads]) * shape[1]


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
        patch.setattr("awq_pycuda.inputs.load_layers", load)
        with pytest.raises(
            InputError, match=r"inputs\.path=.*layers\.h5: needs 0\.0 GiB of the host's memory; allowed:"
        ):
            plan_layers(config)
    free.available = int(needed / 0.8) + 1
    assert len(plan_layers(config)) == len(loaded)
