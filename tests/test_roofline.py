"""Ceilings and counts of the roofline, against data sheets and counts by hand."""

import re

import pandas as pd
import pytest
from result_files import H100, editing, make_run

from awq_pycuda.analysis import roofline
from awq_pycuda.analysis.collect import collect
from awq_pycuda.analysis.report_data import page_data


def test_ceilings_are_those_of_the_data_sheets():
    limits = roofline.ceilings(H100)
    assert (limits.gflops, limits.gbytes) == pytest.approx((66_900, 3352), rel=1e-3)
    a100 = H100.replace("9.0", "8.0").replace("132", "108").replace("1980000", "1410000").replace("2619000", "1215000")
    limits = roofline.ceilings(a100)
    assert (limits.gflops, limits.gbytes) == pytest.approx((19_490, 1555), rel=1e-3)
    old_file = re.sub(r', "memory_bus_bits.*', "}", H100)
    assert roofline.ceilings(old_file) == roofline.Ceilings(pytest.approx(66_900, rel=1e-3), None)
    assert roofline.ceilings('{"name": "EPYC", "threads": 2}') == roofline.Ceilings(None, None)


def test_groups_of_a_row_add_to_the_least_bytes():
    shapes = pd.DataFrame(
        {"tokens": [2, 2], "out_features": [3, 3], "in_features": [8, 8], "quant.group_size": [None, 4]}
    )
    flop, moved = roofline.work("dequantizeTiled", shapes)
    assert flop.tolist() == [96, 96]
    assert moved.tolist() == [64 + 24 + 32 + 12 + 24, 64 + 24 + 32 + 24 + 24]


def test_the_page_gets_the_medians_of_all_passes_and_layers_and_their_quartiles(tmp_path):
    path = make_run(tmp_path, "n=16", "layers=2", "timing.repeats=3")
    with editing(path) as file:
        file.attrs.update(backend="cuda", device=H100, device_name="H100")
        for stage, factor in enumerate(range(1, 7)):
            file["timings/gpu_ms"][:, stage] = [[factor * 1, factor * 2, factor * 3], [factor * 4, factor * 5, 0]]
    failures = []
    (roof,) = page_data(collect([path]), failures)["roofs"]
    assert failures == []
    assert roof["stage"] == list(roofline.KERNELS)
    product = roof["stage"].index("dequantizeTiled")
    factor = 5  # the fifth stage; a time of 0 is none
    rates = [2 * 16**3 / (factor * ms) / 1e6 for ms in (4, 3, 2)]
    assert [roof[name][product] for name in ("low", "rate", "high")] == pytest.approx(rates, rel=1e-4)
