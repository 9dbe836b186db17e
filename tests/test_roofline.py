"""Ceilings and counts of the roofline, against data sheets and counts by hand."""

import re

import pandas as pd
import pytest
from result_files import H100

from awq_pycuda.analysis import roofline


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
