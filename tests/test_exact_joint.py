"""The oracle of a joint search: it holds sound curves of every format tightly, and finds faults that are planted."""

import types
from dataclasses import replace

import numpy as np
import pytest

from awq_pycuda.choices import Divisor, Element, Objective, StepDtype, ZeroOrder, ZeroPoint
from awq_pycuda.engine.exact_curve import CURVE_TOLERANCE, curve_error
from awq_pycuda.engine.exact_joint import exact_joint_curve
from awq_pycuda.quant import clipping, format, joint, search
from awq_pycuda.quant.clipping import Clipping
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format

FORMATS = {
    "rows": Format(None, 4),
    "one sign saturates": Format(13, 4, symmetric=False, include_zero=False, least_range=1e-5),
    "zero points": Format(16, 3, symmetric=False),
    "zero points before rounding": Format(16, 4, symmetric=False, zero_order=ZeroOrder.shift_first),
    "float zero points": Format(16, 4, symmetric=False, zero_point=ZeroPoint.float, include_zero=False),
    "half of the range": Format(16, 4, divisor=Divisor.half_range),
    "half precision": Format(16, 4, symmetric=False, step_dtype=StepDtype.fp16),
    "NVFP4": Format(16, 4, Element.e2m1, step_dtype=StepDtype.e4m3),
    "MXFP4": Format(32, 4, Element.e2m1, step_dtype=StepDtype.e8m0),
}


class Searched:
    """A layer whose scales were searched jointly, with a group of zeros and a channel that nothing reaches."""

    def __init__(self, form, objective, count=30, **clip):
        random = np.random.default_rng(3)
        self.w = random.standard_t(3, (14, 50)).astype(np.float32)
        self.w[0, :16] = 0
        self.x = (random.normal(size=(count, 50)) * random.lognormal(0, 1, 50) + 0.2).astype(np.float32)
        self.x[:, 7] = 0
        self.sq_mean = np.square(self.x).mean(axis=0)
        self.convention = Convention(
            gammas=(0.0, 0.5, 1.0), quantizer=form, objective=objective, clip=Clipping(joint=True, **clip)
        )
        self.scales = search.candidates(self.convention, np.abs(self.x).mean(axis=0))

    def found(self):
        return joint.search_jointly(self.convention, [(self.w, True)], self.scales, self.x, self.sq_mean)

    def exact(self):
        scales, sq_mean = self.scales.astype(np.float64), self.sq_mean.astype(np.float64)
        convention = self.convention
        return exact_joint_curve(
            [(self.w, True)], scales, sq_mean, convention.quantizer, self.x, convention.clip, convention.objective
        )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("objective", Objective, ids=lambda objective: objective.name)
def test_a_sound_curve_lies_within_narrow_bounds(form, objective):
    layer = Searched(FORMATS[form], objective)
    error, curve = layer.found().error, layer.exact()
    assert curve_error(error, curve) <= CURVE_TOLERANCE / 10
    assert ((curve.high - curve.low) / error < 0.1).all()
    assert curve_error(error * 1.1, curve) > CURVE_TOLERANCE
    assert curve_error(error / 1.1, curve) > CURVE_TOLERANCE


def test_of_many_tokens_a_few_are_looked_at():
    layer = Searched(Format(16, 4), Objective.output, count=70, tokens=20)
    assert curve_error(layer.found().error, layer.exact()) <= CURVE_TOLERANCE / 10


def all_clipped(*given, sums=joint._of_rows):
    without, with_ratios = sums(*given)
    return np.array([np.full_like(without, np.inf), with_ratios])


def with_less(*given):
    found = clipping.find_ratios(*given)
    return replace(found, ratio=found.ratio - np.float32(0.05))


FAULTS = {
    "a ratio left out": lambda patch: patch.setattr(Clipping, "ratios", np.array([1, 0.9, 0.8])),
    "other tokens": lambda patch: patch.setattr(Clipping, "of", lambda _, x: x[::4]),
    "rows that lose by it are clipped, too": lambda patch: patch.setattr(joint, "_of_rows", all_clipped),
    "the next ratio": lambda patch: patch.setattr(joint, "find_ratios", with_less),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("objective", Objective, ids=lambda objective: objective.name)
def test_a_planted_fault_is_found(fault, objective, monkeypatch):
    layer = Searched(Format(16, 4), objective)
    exact = layer.exact()
    assert curve_error(layer.found().error, exact) <= CURVE_TOLERANCE
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        error = layer.found().error
    assert curve_error(error, exact) > CURVE_TOLERANCE


def test_none_of_the_run_s_formulas_is_called(monkeypatch):
    layer = Searched(FORMATS["zero points"], Objective.output)
    expected = layer.exact()
    for owner in (Format, format, search, clipping, Clipping, joint):
        for name, value in vars(owner).items():
            if isinstance(value, types.FunctionType | property) and name not in ("size", "groups"):
                monkeypatch.setattr(owner, name, None)
    for one, other in zip(layer.exact(), expected, strict=True):
        assert one.tolist() == other.tolist()
