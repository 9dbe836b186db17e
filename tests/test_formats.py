"""Every kind of format: ranges, rounding, zero points and packing, against plain definitions of each."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_pycuda.choices import Divisor, Element, StepDtype, ZeroOrder, ZeroPoint, ZeroStep
from awq_pycuda.errors import InputError
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized, dequantize, quantize, steps_of
from awq_pycuda.quant.step_types import power_of_two, round_e2m1, rounded

FP4 = {"bits": 4, "element": Element.e2m1}
NVFP4 = Format(16, step_dtype=StepDtype.e4m3, **FP4)
MXFP4 = Format(32, step_dtype=StepDtype.e8m0, **FP4)
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
FORMATS = [
    *(Format(size, bits) for bits in range(2, 9) for size in (None, 5)),
    *(Format(7, bits, divisor=Divisor.half_range) for bits in (2, 4, 8)),
    *(Format(7, bits, symmetric=False, zero_order=order) for bits in (3, 4, 8) for order in ZeroOrder),
    Format(7, 4, symmetric=False, include_zero=False, least_range=1e-5),
    Format(7, 4, symmetric=False, include_zero=False, zero_point=ZeroPoint.float, least_step=1e-6),
    *(Format(7, 4, step_dtype=dtype) for dtype in (StepDtype.fp16, StepDtype.bf16)),
    NVFP4,
    MXFP4,
    Format(32, step_dtype=StepDtype.e8m0_up, **FP4),
    Format(None, **FP4),
]


def quantized(w, s, form):
    steps = steps_of(w, s, form)
    found = Quantized(format=form, **steps.arrays, codes=np.full(w.shape, -128, np.int8))
    quantize(w, s, found)
    return found


@pytest.fixture(scope="module")
def matrix():
    random = np.random.default_rng(8)
    w = random.normal(size=(6, 40)).astype(np.float32)
    w[1], w[2, :20] = 0, np.abs(w[2, :20])
    w[3] *= 1e-3
    return w, random.uniform(0.3, 3, 40).astype(np.float32)


def wide(of_groups, form, channels):
    return np.repeat(of_groups, form.size(channels), axis=1)[:, :channels]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_what_is_in_range_comes_back_within_half_a_step(form, matrix):
    w, s = matrix
    found = quantized(w, s, form)
    assert form.least <= found.codes.min() <= found.codes.max() <= form.largest
    step = wide(found.steps.astype(np.float64), form, w.shape[1])
    off = np.abs(dequantize(found, None, np.float64) - w.astype(np.float64) * s)
    bound = step / 2
    if form.is_e2m1:  # a step is that of 0.5; numbers from 2 on are further apart
        bound = step * np.where(np.abs(found.codes) < 4, 0.5, np.where(np.abs(found.codes) < 8, 1, 2))
    inside = (found.codes > form.least) & (found.codes < form.largest)
    assert (off <= bound * (1 + 1e-5))[inside].all()
    if not form.symmetric and not form.include_zero and form.zero_point is ZeroPoint.integer:
        return  # groups of one sign saturate, as llm-awq's do
    # At an end there may be more: half of the range's divisor takes half a step off, MXFP4 up to two of 6, a rounded
    # step or zero point its own rounding.
    beyond = 4 if form.is_e2m1 else 1.1
    assert (off <= beyond * step).all()
    assert (dequantize(found)[1] == 0).all()  # a row of zeros


@pytest.mark.parametrize("form", [each for each in FORMATS if each.symmetric or each.include_zero], ids=str)
def test_zero_stays_zero_where_it_is_in_range(form, matrix):
    w, s = matrix
    w = w.copy()
    w[:, ::3] = 0
    assert (dequantize(quantized(w, s, form))[:, ::3] == 0).all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_packed_codes_come_back(form, matrix):
    found = quantized(*matrix, form)
    packed = form.pack(found.codes)
    assert packed.nbytes == len(packed) * -(-matrix[0].shape[1] * form.bits // 8)
    assert np.array_equal(form.unpack(packed, matrix[0].shape[1]), found.codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_of_every_width_is_packed_exactly(bits):
    form = Format(bits=bits, symmetric=False)
    codes = np.arange(form.least, form.largest + 1).astype(np.int8)
    for channels in (1, 3, len(codes)):
        rows = np.resize(codes, (len(codes), channels))
        assert np.array_equal(form.unpack(form.pack(rows), channels), rows)
    if bits < 8:  # number k begins at bit k·bits, the least code as 0
        as_one = int.from_bytes(form.pack(codes[None, :])[0].tobytes(), "little")
        assert [as_one >> bits * k & (2**bits - 1) for k in range(len(codes))] == list(range(2**bits))


def test_every_number_of_fp4_is_packed_as_sign_exponent_and_mantissa():
    codes = np.array([[2 * number * sign for sign in (1, -1) for number in E2M1]]).astype(np.int8)
    packed = MXFP4.pack(codes)
    nibbles = [nibble for byte in packed[0] for nibble in (byte & 15, byte >> 4)]
    assert nibbles == [*range(8), 0, *range(9, 16)]  # 0 has no sign
    assert np.array_equal(MXFP4.unpack(packed, 16), codes)


def nearest(value, numbers):
    """By distance; of two as near that with the even mantissa, which in these lists is at an even place."""
    return min(range(len(numbers)), key=lambda index: (abs(numbers[index] - value), index % 2))


def test_rounding_to_fp4_is_to_the_nearest_and_ties_to_even():
    values = np.array([*np.arange(0, 8, 1 / 64), 1e9, np.inf])
    levels = np.concatenate([values, -values]) * 2
    round_e2m1(levels)
    exact = [2 * E2M1[nearest(min(value, 8), E2M1)] for value in values]
    assert np.array_equal(levels, np.concatenate([exact, np.negative(exact)]))


E4M3 = sorted({(m + (8 if e else 0)) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)} - {480.0})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_steps_are_rounded_to_their_type(dtype):
    random = np.random.default_rng(3)
    values = np.abs(np.concatenate([random.lognormal(0, 9, 4000), [0, 1, 2.0**-9, 2.0**-10, 500, 65519, 1e9]])).astype(
        dtype
    )
    half = np.minimum(values, 65504).astype(np.float16).astype(dtype)
    assert np.array_equal(rounded(values, StepDtype.fp16), half)
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    if dtype is np.float32:  # the upper half of its bits, rounded to even
        brain = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
        assert np.array_equal(rounded(values, StepDtype.bf16), brain)
    eighth = [E4M3[nearest(min(value, 448), E4M3)] for value in values.tolist()]
    assert np.array_equal(rounded(values, StepDtype.e4m3), np.array(eighth, dtype))
    assert rounded(values, StepDtype.fp32) is values


def test_powers_of_two_bring_the_largest_to_four_and_up():
    peaks = np.array([1e-30, 0.3, 4, 6, 6.9, 7, 7.99, 8, 1e20], np.float32)
    down, up = (power_of_two(peaks, dtype) for dtype in (StepDtype.e8m0, StepDtype.e8m0_up))
    assert ((peaks / down >= 4) & (peaks / down < 8)).all()
    assert np.array_equal(up, np.where(peaks / down >= 7, 2 * down, down))
    assert power_of_two(np.array([0.0, 1e-45], np.float32), StepDtype.e8m0).tolist() == [2.0**-127] * 2


def test_the_steps_of_each_kind_of_integer_format():
    group = np.array([[-3.0, 1.0, 2.0]], np.float32)

    def fitted(**fields):
        form = Format(bits=4, **fields)
        steps, zeros = form.fit(form.parts(np.abs(group) if form.is_odd else group))
        return float(steps[0, 0]), None if zeros is None else float(zeros[0, 0])

    f = np.float32
    assert fitted() == (f(3) / f(7), None)
    assert fitted(divisor=Divisor.half_range) == (f(3) / f(7.5), None)
    assert fitted(symmetric=False) == (f(5) / f(15), 1)  # -(-3 / (1/3)) = 9 of 0 to 15, less 8
    assert fitted(symmetric=False, zero_point=ZeroPoint.float) == (f(1) / f(3), f(-3) + f(8) * (f(1) / f(3)))
    group = np.array([[5.0, 5.5, 6.0]], np.float32)
    assert fitted(symmetric=False) == (f(6) / f(15), -8)
    assert fitted(symmetric=False, include_zero=False) == (f(1) / f(15), -8)  # so that all codes saturate
    form = Format(bits=4, symmetric=False, include_zero=False)
    assert np.allclose(dequantize(quantized(group, np.ones(3, f), form)), 1)
    form = Format(bits=4, symmetric=False, include_zero=False, zero_point=ZeroPoint.float)
    assert np.abs(dequantize(quantized(group, np.ones(3, f), form)) - group).max() <= 0.51 / 15


def test_an_odd_zero_point_decides_ties():
    group = np.array([[-0.5, 0.25, 7.0]], np.float32)  # 7.5 wide, 15 steps of 0.5
    codes = {}
    for order in ZeroOrder:
        form = Format(bits=4, symmetric=False, zero_order=order)
        found = quantized(group, np.ones(3, np.float32), form)
        assert (found.steps[0, 0], found.zero_points[0, 0]) == (0.5, -7)
        codes[order] = found.codes[0].tolist()
    assert codes[ZeroOrder.round_first] == [-8, -7, 7]  # 0.5 goes to 0, then -7
    assert codes[ZeroOrder.shift_first] == [-8, -6, 7]  # -6.5 goes to -6


@pytest.mark.parametrize(
    ("fields", "step"),
    [
        ({}, 1),
        ({"zero_step": ZeroStep.epsilon}, 2.0**-23),
        ({"zero_step": ZeroStep.epsilon, "step_dtype": StepDtype.fp16}, 2.0**-10),
        ({"least_range": 7e-5}, np.float32(7e-5) / np.float32(7)),
        ({"least_step": 0.25}, 1),
        ({"least_step": 0.25, "zero_step": ZeroStep.epsilon}, 0.25),
    ],
)
def test_the_step_of_a_group_of_zeros(fields, step):
    found = quantized(np.zeros((1, 3), np.float32), np.ones(3, np.float32), Format(bits=4, **fields))
    assert found.steps.tolist() == [[step]]
    assert (dequantize(found) == 0).all()


def test_the_steps_of_nvfp4_use_the_range_of_their_type():
    random = np.random.default_rng(2)
    w = (random.normal(size=(8, 64)) * 2.0 ** random.integers(-20, 20, (8, 1))).astype(np.float32)
    w[5, 16:32] = 0
    found = quantized(w, np.ones(64, np.float32), NVFP4)
    scale = found.tensor_scale[0]
    assert scale == np.float32(448 * 6) / np.abs(w).max()
    stored = (2 * found.steps.astype(np.float64)) * scale
    near = np.array([E4M3[nearest(value, E4M3)] for value in stored.ravel()]).reshape(stored.shape)
    assert np.abs(stored - near).max() <= 1e-6 * 448
    assert near.max() == 448
    assert near.min() == 2.0**-9  # of rows too small for the type, never 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_value_of_its_own_in_every_group_comes_back_from_that_group(data):
    form = data.draw(st.sampled_from(FORMATS))
    channels = data.draw(st.integers(1, 70))
    groups, size = form.groups(channels), form.size(channels)
    values = np.repeat(2.0 ** np.arange(3 * groups).reshape(3, groups), size, axis=1)[:, :channels].astype(np.float32)
    back = dequantize(quantized(values / np.float32(2.0**10), np.ones(channels, np.float32), form)) * 2.0**10
    if not form.symmetric and not form.include_zero and form.zero_point is ZeroPoint.integer:
        return  # see above
    if form.has_tensor_scale:
        return  # values so far apart leave the range that the steps of a matrix have together
    assert np.abs(back / values - 1).max() <= 0.34  # of FP4, from 8 to 6 of MXFP4


def test_what_does_not_go_together_is_refused_in_one_line():
    for fields, line in (
        ({"bits": 1}, "bits=1: allowed: a whole number from 2 to 8"),
        ({"bits": 9}, "bits=9: allowed: a whole number from 2 to 8"),
        ({"group_size": 0}, "group_size=0: allowed: None (one step per row) or a whole number from 1"),
        ({"element": Element.e2m1}, "bits=8: allowed: 4 (element=e2m1)"),
        ({**FP4, "symmetric": False}, "symmetric=False: allowed: True (element=e2m1 has no zero points)"),
        ({"step_dtype": StepDtype.e4m3}, "step_dtype=e4m3: allowed: fp32, fp16, bf16 (element=int)"),
        ({"least_range": np.nan}, "least_range=nan: allowed: a finite number from 0"),
    ):
        with pytest.raises(InputError) as refused:
            Format(**fields)
        assert str(refused.value) == line


def test_steps_have_what_their_format_says():
    steps = np.ones((2, 1))
    for form, name, array in itertools.chain(
        [(Format(), "zero_points", steps), (Format(symmetric=False), "zero_points", None)],
        [(Format(), "tensor_scale", steps), (NVFP4, "tensor_scale", None)],
    ):
        with pytest.raises(InputError, match=f"^{name}: "):
            Quantized(steps, form, **{name: array}, codes=np.zeros((2, 3)))
