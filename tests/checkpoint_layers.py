"""Quantized layers of every format that a checkpoint holds, each with every code."""

import numpy as np

from awq_pycuda.checkpoints.folders import CheckpointLayer
from awq_pycuda.choices import Divisor, Element, StepDtype, ZeroOrder
from awq_pycuda.quant.format import BITS, Format
from awq_pycuda.quant.quantized import Quantized, quantize, steps_of

FP4 = {"bits": 4, "element": Element.e2m1}
FP16 = {"step_dtype": StepDtype.fp16}
NVFP4 = Format(16, step_dtype=StepDtype.e4m3, **FP4)
MXFP4 = Format(32, step_dtype=StepDtype.e8m0, **FP4)
AUTOAWQ = {
    "symmetric": Format(32, 4, **FP16),
    "full range": Format(16, 4, divisor=Divisor.half_range, **FP16),
    "zero points": Format(32, 4, symmetric=False, **FP16),
    "llm_awq": Format(48, 4, symmetric=False, include_zero=False, least_range=1e-5, **FP16),
}
COMPRESSED_TENSORS = {
    **{f"int{bits} rows": Format(None, bits) for bits in BITS},
    **{f"int{bits} groups": Format(32, bits, symmetric=False) for bits in BITS},
    "half range": Format(16, 4, divisor=Divisor.half_range, **FP16),
    "rows with zero points": Format(None, 3, symmetric=False, zero_order=ZeroOrder.shift_first),
    "bf16": Format(32, 4, symmetric=False, step_dtype=StepDtype.bf16),
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
    "mxfp4 up": Format(32, step_dtype=StepDtype.e8m0_up, **FP4),
}


def layer(form, out_features=40, in_features=96, seed=0):
    """A layer with outlier channels, a group of zeros and one of one sign, AWQ's scales and a bias.

    Its codes do not follow from its steps: every code that the format has stands in every place of a word.
    """
    random = np.random.default_rng(seed)
    w = random.normal(size=(out_features, in_features)).astype(np.float32)
    w *= np.where(np.arange(in_features) < 3, 20, 1)
    w[1, : form.size(in_features)] = 0
    w[2] = np.abs(w[2]) + 5
    s = random.uniform(0.2, 3, in_features).astype(np.float32)
    found = Quantized(format=form, **steps_of(w, s, form).arrays, codes=np.empty(w.shape, np.int8))
    quantize(w, s, found)
    if not form.is_e2m1:
        found.codes[3:] = np.resize(np.arange(form.least, form.largest + 1), (out_features - 3, in_features))
    return CheckpointLayer.scaled(found, s, random.normal(size=out_features).astype(np.float32))
