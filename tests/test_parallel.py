"""Row blocks over threads."""

import numpy as np
import pytest

from awq_pycuda.parallel import LARGEST_BLOCK, map_row_blocks


@pytest.mark.parametrize("threads", [1, 2])
def test_the_caller_s_error_state_holds_in_every_thread(threads):
    huge = np.full((4, LARGEST_BLOCK), 3e38, np.float32)

    def doubled(block):
        return np.isinf(huge[block] * np.float32(2)).all()

    with np.errstate(over="ignore"):
        assert map_row_blocks(doubled, huge.shape, threads) == [True] * 4
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        map_row_blocks(doubled, huge.shape, threads)
