"""The search with objective output by kernels, against the host's and against float64."""

import dataclasses

import numpy as np
import pytest
from conftest import make_backend, same_bits
from test_device_search import DEVICES, convention, layer_of, on_each, same_but_for_a_last_bit, searched

from awq_pycuda.backends.choose import settle_search
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.choices import Objective
from awq_pycuda.engine.memory import kernel_sizes
from awq_pycuda.engine.verify import relative_error
from awq_pycuda.kernels import table
from awq_pycuda.kernels.variant import Device
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.for_kernels import values
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized, dequantize, quantize, steps_of
from awq_pycuda.quant.search import candidates

STAGE = "search_output"
GIB = 1 << 30
H100 = Device((9, 0), 227 * 1024, 80 * GIB)
OLDER, OLDEST = Device((8, 6), 99 * 1024, 24 * GIB), Device((7, 5), 64 * 1024, 8 * GIB)


def exact_curve(spec, scales, form):
    """The mean square of `X · (Ŵ/s − W)ᵀ` for each of these scales, with their codes as they are, in float64."""
    errors = []
    for s in scales:
        codes = np.empty(spec.weight.shape, np.int8)
        given = Quantized(steps_of(spec.weight, s, form).steps, form, codes=codes)
        quantize(spec.weight, s, given)
        wrong = dequantize(given, 1 / s.astype(np.float64), np.float64) - spec.weight
        errors.append(np.mean((spec.activations @ wrong.T) ** 2))
    return np.array(errors)


def curves(name, variant, spec, size, points, **more):
    """The device's curve and the exact one of the same scales, one gamma at a time.

    A last bit of a scale may move a code, and with it the error by more than is allowed.
    """
    found, exact = [], []
    for gamma in np.linspace(0, 1, points):
        alone = Convention(gammas=(gamma,), identity=False, objective=Objective.output, quantizer=Format(size), **more)
        error, s, inv_s, steps = searched(make_backend(name, **{STAGE: variant}), spec, alone)
        assert same_bits(inv_s, 1 / s)
        assert same_bits(steps, steps_of(spec.weight, s, alone.quantizer).steps)
        found.append(error[0])
        exact.append(exact_curve(spec, [s], alone.quantizer)[0])
    return np.array(found), np.array(exact)


SIZES = [
    ("plain", 3, 37, 10, 1),
    ("digits", 130, 132, None, 128),
    ("digits", 129, 101, 10, 170),
    *(
        pytest.param(*sizes, marks=pytest.mark.gpu)
        for sizes in (
            ("plain", 1, 1, None, 1),
            ("plain", 70, 96, None, 13),
            ("plain", 300, 1024, 128, 512),
            ("digits", 128, 64, None, 256),
            ("digits", 128, 4096, 30, 128),
            ("digits", 1000, 1028, 128, 512),
            ("digits", 1000, 1027, None, 700),
            ("digits", 260, 4100, 7, 130),
            ("digits_mma", 130, 132, 32, 130),
            ("digits_mma", 1000, 1028, 128, 512),
            ("plain", 130, 65, 1, 255),
            ("digits_mma", 128, 65, 3, 255),
        )
    ),
]


@pytest.mark.parametrize(("name", "variant", "out_features", "in_features", "size", "tokens"), [*on_each(*SIZES)])
def test_the_error_is_that_of_the_output(name, variant, out_features, in_features, size, tokens, worst):
    spec = layer_of(out_features, in_features, dead=range(3, in_features, 50), tokens=tokens)
    found, exact = curves(name, variant, spec, size, 2)
    worst(f"{name} {STAGE} ({variant})", relative_error(found, exact), table.find(STAGE, variant).tolerance)


def outliers(spec):
    spec.activations[:, 40] *= 1000


def one_element(spec):
    spec.activations[0, 40] = 3000
    spec.activations[:, 70] *= 50


def dead_and_large(spec):
    spec.activations[:, :33] = 0
    spec.weight[:, :33] *= 10000


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("change", [outliers, one_element, dead_and_large])
def test_few_channels_that_outweigh_all_others(name, change, worst):
    spec = layer_of(130, 132, tokens=130)
    change(spec)
    found, exact = curves(name, "digits", spec, None, 2)
    worst(f"{name} {STAGE} (digits), outliers", relative_error(found, exact), 1e-5)


# Small ones that the variant takes.
LAYERS = {"plain": (9, 40, 5), "digits": (130, 70, 240)}


def small(variant, scale=1.0):
    out_features, in_features, tokens = LAYERS[variant]
    return layer_of(out_features, in_features, scale=scale, tokens=tokens)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("variant", LAYERS)
@pytest.mark.parametrize("scale", [1e-41, 1e-25, 1e22, 1e37])
def test_weights_that_float_can_hardly_hold(name, variant, scale):
    spec = small(variant, scale)
    found, exact = curves(name, variant, spec, None, 1)
    np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("variant", LAYERS)
def test_a_candidate_that_overflows_loses_quietly(name, variant):
    spec = small(variant)
    spec.weight[1, :32] = 3e38
    spec.activations[:, :2] *= 1000
    chosen = convention(3, objective=Objective.output)
    error, s, *_ = searched(make_backend(name, **{STAGE: variant}), spec, chosen)
    assert np.isfinite(error).tolist() == [True, False, False]
    assert (s == 1).all()


def of_one_candidate(variant, sizes):
    """Bytes of scratch that one more candidate of a round takes."""
    values = variant.complete({**sizes, "memory_bytes": 0})
    one, two = (sum(size({**values, "chunk": chunk}) for size in variant.scratch.values()) for chunk in (1, 2))
    return two - one


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(
    ("variant", "sizes", "group_size"),
    [*((variant, sizes, 32) for variant, sizes in LAYERS.items()), ("digits", (130, 132, 130), None)],
)
def test_the_curve_does_not_depend_on_the_memory_of_the_device(name, variant, sizes, group_size, monkeypatch):
    out_features, in_features, tokens = sizes
    spec = layer_of(out_features, in_features, tokens=tokens)
    chosen = convention(6, group_size, objective=Objective.output)
    expected = searched(make_backend(name, **{STAGE: variant}), spec, chosen)
    found, sizes = table.find(STAGE, variant), kernel_sizes(spec, chosen)
    for chunk, rounds in ((4, 2), (1, 6)):
        backend = make_backend(name, **{STAGE: variant})
        device = dataclasses.replace(backend.limits, memory_bytes=16 * chunk * of_one_candidate(found, sizes))
        values = found.complete({**sizes, "memory_bytes": device.memory_bytes})
        assert (values["chunk"], found.rounds(values)) == (chunk, rounds)
        monkeypatch.setattr(type(backend), "limits", property(lambda _, device=device: device))
        for one, other in zip(searched(backend, spec, chosen), expected, strict=True):
            assert same_bits(one, other)


@pytest.mark.parametrize("name", DEVICES)
def test_device_and_host_choose_alike(name, worst):
    spec, chosen = layer_of(140, 96, dead=[5], tokens=180), convention(5, 128, objective=Objective.output)
    device = searched(make_backend(name), spec, chosen)
    host = searched(CpuBackend(), spec, chosen)
    assert np.argmin(device[0]) == np.argmin(host[0])
    assert same_but_for_a_last_bit(device[1], host[1])
    scales = candidates(chosen, np.abs(spec.activations).mean(axis=0, dtype=np.float64).astype(np.float32))
    worst("the host's search by the output", relative_error(host[0], exact_curve(spec, scales, chosen.quantizer)), 1e-4)


def test_what_cannot_take_the_digits_falls_back_and_says_why():
    large = {"tokens": 512, "out_features": 256, "in_features": 256, "candidates": 20, **values(Format(), 256)}
    small = large | {"out_features": 100}
    few = "takes at least 128 rows of 64 to 65535 input channels, not 100 of 256"
    assert settle_search(STAGE, [large], H100) == []
    assert settle_search(STAGE, [large | {"tokens": 3}], H100)[0].startswith(
        f"{STAGE} plain (digits takes at least 16384 "
    )
    assert settle_search(STAGE, [large, small, small], H100) == [f"{STAGE} plain (digits {few}; digits_mma {few})"]
    (told,) = settle_search(STAGE, [large | {"group_size": 1}], H100)
    assert told.startswith(f"{STAGE} plain (digits takes groups of at least 2 input channels, not 1; ")
    (told,) = settle_search(STAGE, [large | values(Format(16, symmetric=False), 256)], H100)
    assert told.startswith(f"{STAGE} plain (digits takes symmetric integers with fp32 steps alone; ")
    old = "digits needs a GPU of compute capability 9.0, not {}"
    assert settle_search(STAGE, [large], OLDER) == [f"{STAGE} digits_mma ({old.format('8.6')})"]
    older = "digits_mma needs a GPU of compute capability 8.0 or later, not 7.5"
    assert settle_search(STAGE, [large], OLDEST) == [f"{STAGE} plain ({old.format('7.5')}; {older})"]


def test_a_round_takes_as_many_candidates_as_its_memory_allows():
    variant = table.find(STAGE, "digits")
    for memory, side, points, chunk, rounds in (
        (80, 1024, 20, 20, 1),
        (80, 8192, 20, 20, 1),
        (80, 8192, 64, 32, 2),
        (24, 4096, 20, 20, 1),
        (24, 8192, 20, 10, 2),
        (24, 32768, 3, 1, 3),
        (24, 4096, 22, 22, 1),
        (24, 8192, 13, 8, 2),
        (8, 8192, 20, 3, 7),
    ):
        sizes = {"tokens": 512, "out_features": side, "in_features": side, "group_size": side, "candidates": points}
        values = variant.complete({**sizes, "memory_bytes": memory * GIB})
        assert (values["chunk"], variant.rounds(values)) == (chunk, rounds)
