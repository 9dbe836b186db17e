"""What stands for the GPU where there is none: a kernel launched by itself, and every kernel beside the oracle."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from conftest import same_bits
from host_cuda.backend import host_backend
from host_cuda.build import Source, not_run
from host_cuda.device import Launch
from host_cuda.driver import host_device
from test_device_formats import KINDS, on_device, special_rows
from test_device_search import convention, layer_of, searched
from test_formats import NVFP4

from awq_pycuda import philox
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.choices import Objective
from awq_pycuda.engine.arrays import allocate
from awq_pycuda.engine.exact_scales import exact_weight_means
from awq_pycuda.kernels import table
from awq_pycuda.paths import resource_dir
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized

SELFTEST = Path(__file__).with_name("host_cuda") / "selftest.cu"
RNG = np.random.default_rng(5)
FIRST = RNG.bit_generator.state


def call(entry, *arguments, blocks=1, threads=64, shared=0, source=SELFTEST):
    """Launches a kernel; a number is a 64-bit size."""
    typed = [("Q" if isinstance(argument, int) else "P", argument) for argument in arguments]
    host_device().launch(Source(source), entry, Launch((blocks, 1, 1), (threads, 1, 1), shared), typed)


def poisoned(*shapes, dtype=np.float32):
    return [np.full(shape, 99 if dtype is np.int8 else np.nan, dtype) for shape in shapes]


def on(backend, stage, inputs, outputs):
    """What a stage leaves in its outputs, given NumPy's arrays; `(codes, steps, size)` are one."""

    def put(values):
        if isinstance(values, tuple):
            return Quantized(put(values[1]), Format(values[2]), codes=put(values[0]))
        if values is None:
            return None
        handle = backend.empty(values.shape, values.dtype if values.dtype == np.int8 else None)
        backend.write(handle, values)
        return handle

    handles = [put(values) for values in (*inputs, *outputs)]
    getattr(backend, stage)(*handles)
    return [backend.read(getattr(handle, "codes", handle)) for handle in handles[len(inputs) :]]


def agree(backend, stage, inputs, outputs, tolerance):
    exact = on(CpuBackend(np.float64), stage, inputs, outputs)
    for value, wanted in zip(on(backend, stage, inputs, outputs), exact, strict=True):
        np.testing.assert_allclose(value.astype(float), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def init_agrees(backend):
    out = backend.empty((7, 9))
    backend.write(out, *poisoned((7, 9)))
    backend.init(out, 3, 1, None, np.arange(9, dtype=np.float32))
    exact = (np.float32(2) * philox.uniform(3, 1, 63).reshape(7, 9) - np.float32(1)) * np.arange(9, dtype=np.float32)
    assert same_bits(backend.read(out), exact)


def stats_agree(backend, tolerance=2**-23):
    agree(backend, "accum_stats", [RNG.normal(size=(127, 37)).astype("f4")], poisoned((37,), (37,)), tolerance)


def atomic_stats_agree(backend):
    stats_agree(backend, table.find("accum_stats", "atomic").tolerance)


def codes_agree(backend):
    for channels, size in ((12, None), (12, 4), (12, 3), (10, None), (10, 5)):  # the first two by vectors
        levels = RNG.integers(-260, 261, (6, channels)).astype("f4") / 2
        steps = RNG.integers(1, 4, (6, Format(size).groups(channels))).astype("f4")
        codes = (*poisoned((6, channels), dtype=np.int8), steps, size)
        agree(backend, "quantize_awq", [levels, np.ones(channels, "f4")], [codes], 0)


def products_agree(backend, multiple):
    codes = RNG.integers(-127, 128, (30, 40), np.int8)
    for size in (None, *(size for size in (5, 8, 32) if size % multiple == 0)):
        inv_s, steps = (RNG.uniform(0.2, 4, shape).astype("f4") for shape in ((40,), (30, Format(size).groups(40))))
        inputs = [RNG.normal(size=(33, 40)).astype("f4"), (codes, steps, size), inv_s]
        agree(backend, "dequantize_tiled", inputs, poisoned((33, 30)), 1e-6)


def relu_agrees(backend):
    for shape, bias in (((5, 7), np.ones(7, "f4")), ((5, 7), None), ((5, 8), None)):  # the last by vectors
        agree(backend, "relu", [RNG.normal(size=shape).astype("f4"), bias], poisoned(shape), 1e-7)


def references_agree(backend):
    inputs = [RNG.normal(size=shape).astype("f4") for shape in ((67, 19), (70, 19))]
    agree(backend, "matmul_reference", inputs, poisoned((67, 70)), 1e-7)


def sums_agree(backend):
    values = [RNG.normal(size=(31, 33)).astype("f4") for _ in range(2)]
    handles = [backend.empty((31, 33)) for _ in values]
    for handle, value in zip(handles, values, strict=True):
        backend.write(handle, value)
    np.testing.assert_allclose(backend.error_sums(*handles), CpuBackend(np.float64).error_sums(*values), rtol=1e-12)


def steps_agree(backend):
    for size in (None, 4, 3, 8):
        codes = (np.zeros((9, 12), np.int8), *poisoned((9, Format(size).groups(12))), size)
        inputs = [RNG.normal(size=(9, 12)).astype("f4"), RNG.uniform(0.2, 4, 12).astype("f4")]
        agree_on_steps(backend, inputs, codes)


def agree_on_steps(backend, inputs, codes):
    form = Format(codes[2])
    found = []
    for each in (backend, CpuBackend()):
        handles = [each.empty(values.shape) for values in (*inputs, codes[1])]
        for handle, values in zip(handles, (*inputs, codes[1]), strict=True):
            each.write(handle, values)
        each.compute_scale_b(*handles[:2], Quantized(handles[2], form, codes=None))
        found.append(each.read(handles[2]))
    assert same_bits(*found)


def formats_agree(backend):
    for form in (NVFP4, KINDS["zero points"], KINDS["float zero points"]):
        exact, found = on_device(backend, *special_rows(9, 37), form)
        for part, values in exact.items():
            assert same_bits(found[part], values), part


def weight_means_agree(backend):
    # Groups within a strip, of single channels and of four, and others; one chunk of rows, and two.
    for shape, size in (((9, 37), 10), ((9, 37), 8), ((9, 132), 8), ((150, 136), 136)):
        w = RNG.normal(size=shape).astype("f4")
        (found,) = poisoned(shape[1:], dtype=np.float64)
        handles = [backend.empty(values.shape, values.dtype) for values in (w, found)]
        for handle, values in zip(handles, (w, found), strict=True):
            backend.write(handle, values)
        backend._run("weight_means", w=handles[0], weight_mean=handles[1], group_size=size)
        np.testing.assert_allclose(backend.read(handles[1]), exact_weight_means([w], Format(size)), rtol=1e-12)


def search_agrees(size, points, objective=Objective.diag, out_features=21, tokens=13):
    def agrees(backend):
        spec = layer_of(out_features, 132, tokens=tokens)
        chosen = convention(points, size, objective=objective)
        expected = searched(CpuBackend(np.float64), spec, chosen)
        variants = backend._variants["search_diag"]
        (layer,) = allocate(backend, [spec], chosen).layers
        backend.accum_stats(layer.x, layer.abs_mean, layer.sq_mean)
        for shares in ({}, {"rows_of_block": 512, "channels_of_part": 512}):  # few rows a block and tile, and all
            backend._variants["search_diag"] = [shared(each, shares) for each in variants]
            backend._bound.clear()
            backend.compute_s(layer, chosen)
            np.testing.assert_allclose(backend.read(layer.error), expected[0], rtol=1e-5)
            np.testing.assert_allclose(backend.read(layer.s), expected[1], rtol=2**-23)

    return agrees


def shared(variant, shares):
    """The variant with these of its sizes as given."""
    given = {name: lambda v, value=shares[name]: value for name in shares if name in variant.derived}
    return replace(variant, derived={**variant.derived, **given})


def moves_agree(_backend):
    """Counts that the four accesses in flight divide, and that they do not; what is beyond stays as it was."""
    folder = resource_dir("cuda")
    for count in (4, 64 * 16, 64 * 20 + 4):
        data, out = RNG.normal(size=count).astype("f4"), np.full(count + 4, 9, np.float32)
        for entry, given, wanted in (
            ("bench_read", (data, out), np.full(count, 9)),
            ("bench_copy", (data, out), data),
            ("bench_write", (out,), np.full(count, 2.5)),
        ):
            call(entry, *given, count, blocks=2, threads=32, source=folder / "bench_memory.cu")
            assert np.array_equal(out, [*wanted, 9, 9, 9, 9]), (entry, count)


PRODUCTS = {variant.file: variant for variant in table.variants("dequantizeTiled").values()}
for file in not_run(resource_dir("cuda")):
    PRODUCTS.pop(file, None)
CHECKS = {
    "init.cu": init_agrees,
    "stats.cu": stats_agree,
    "stats.cu atomic": atomic_stats_agree,
    "quantize.cu": codes_agree,
    **{file: partial(products_agree, multiple=variant.group_multiple) for file, variant in PRODUCTS.items()},
    "scale_b.cu": steps_agree,
    "formats.cu": formats_agree,
    "weight_means.cu": weight_means_agree,
    "search_narrow.cu": search_agrees(None, 11),
    "search_rows.cu": search_agrees(None, 11),
    "search_groups.cu": search_agrees(128, 5),
    "search_any.cu": search_agrees(10, 7),
    "search_output.cu": search_agrees(None, 2, Objective.output),
    "search_output_digits.cu": search_agrees(None, 2, Objective.output, 130, 128),
    "search_output_digits_mma.cu": search_agrees(None, 2, Objective.output, 130, 128),
    "relu.cu": relu_agrees,
    "reference.cu references": references_agree,
    "reference.cu sums": sums_agree,
    "bench_memory.cu": moves_agree,
}


def check(kernel, sources=None):
    product = PRODUCTS.get(kernel, table.find("dequantizeTiled"))
    searches = {each.file: each for stage in table.SEARCHES.values() for each in table.variants(stage).values()}
    choices = {searches[kernel].stage: searches[kernel].name} if kernel in searches else {}
    choices |= {"dequantizeTiled": product.name, "accum_stats": "atomic" if "atomic" in kernel else "deterministic"}
    tiles = table.allowed("dequantizeTiled", "TILE").get(product.name, [7])
    RNG.bit_generator.state = FIRST  # the same inputs, whichever tests ran before
    with host_backend({"TILE": 7 if 7 in tiles else tiles[0]}, choices, sources) as backend:
        CHECKS[kernel](backend)
