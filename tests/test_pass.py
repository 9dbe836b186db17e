"""The pass itself: it hands handles from stage to stage, and leaves every layer with its own values."""

import numpy as np
import pytest
from conftest import BACKENDS, make_backend, same_bits

from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.engine.pipeline import Pipeline
from awq_pycuda.engine.spec import spec_of
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.quantized import Quantized, quantize, steps_of

QUICK = ("n=40", "tokens=30", "layers=3", "inputs=outliers", "gammas=[0.2,0.5]", "timing.warmup=1", "timing.repeats=2")


class Sealed(CpuBackend):
    """Its arrays are out of reach of the host while a pass runs: from the first mark of a pass to `synchronize`."""

    passes = 0
    in_pass = False

    def mark(self):
        self.in_pass = True
        return super().mark()

    def synchronize(self):
        self.in_pass = False
        self.passes += 1
        super().synchronize()

    def read(self, handle):
        assert not self.in_pass
        return super().read(handle)

    def write(self, handle, values):
        assert not self.in_pass
        super().write(handle, values)

    def empty(self, shape, dtype=None):
        assert not self.in_pass
        return super().empty(shape, dtype)


@pytest.mark.parametrize("search", ["diag", "output"])
def test_a_pass_is_handles_only(compose, search):
    config = compose(*QUICK, f"search={search}", "verify=true")
    backend = Sealed()
    pipeline = Pipeline(backend, spec_of(config))
    pipeline.run()
    assert backend.passes == 4
    assert pipeline.layers[0].search.gamma_chosen > 0


class Telling(Sealed):
    """Its conditions are told once a measured pass, when the pass is over; power only every second time."""

    asked = 0

    def conditions(self):
        assert not self.in_pass
        self.asked += 1
        return {"sm_clock": 1000.0 + self.asked} | ({"power": 7.0} if self.asked % 2 == 0 else {})


def test_conditions_are_told_beside_each_measured_pass_and_outside_of_it(compose):
    backend = Telling()
    pipeline = Pipeline(backend, spec_of(compose(*QUICK)))
    pipeline.run()
    told = pipeline.timings.conditions
    assert backend.asked == 2
    assert told["sm_clock"].tolist() == [1001, 1002]
    assert np.array_equal(told["power"], [np.nan, 7], equal_nan=True)
    assert Pipeline(CpuBackend(), spec_of(compose(*QUICK))).timings.conditions == {}


def test_the_seal_holds():
    backend = Sealed()
    backend.mark()
    for access in (lambda: backend.read(np.ones(1)), lambda: backend.write(np.ones(1), np.ones(1))):
        with pytest.raises(AssertionError):
            access()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("search", ["diag", "output"])
@pytest.mark.parametrize("group", ["null", "8"])
def test_after_a_run_the_handles_hold_the_layer_s_own_values(compose, name, search, group):
    config = compose(*QUICK, f"search={search}", f"quant.group_size={group}", "save=full")
    form = Format(config.quant.group_size)
    with make_backend(name) as backend:
        pipeline = Pipeline(backend, spec_of(config))
        pipeline.run()
        assert pipeline.layers[0].search.gamma_chosen > 0  # or its values would be RTN's anyway
        for layer, result in zip(pipeline.handles.layers, pipeline.layers, strict=True):
            w, s, steps = (backend.read(handle).copy() for handle in (layer.w, layer.s, layer.quantized.steps))
            assert same_bits(s, result.search.s)
            assert same_bits(backend.read(layer.inv_s), 1 / result.search.s)
            assert same_bits(backend.read(layer.error), result.search.error)
            assert same_bits(steps, steps_of(w, s, form).steps)
            own = Quantized(steps, form, codes=np.empty(w.shape, form.code_dtype))
            quantize(w, s, own)
            assert same_bits(backend.read(layer.quantized.codes), own.codes)
            assert same_bits(result.quantized.codes, own.codes)
