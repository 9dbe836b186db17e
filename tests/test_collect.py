"""Files to tables: what is in them, how runs are named, and that no file can stop it."""

import pytest
from result_files import make_many

from awq_pycuda.analysis.collect import collect


def test_a_sweep_gives_a_row_per_run_and_per_layer(tmp_path):
    make_many(tmp_path, 6)
    found = collect([tmp_path])
    assert found.left_out == []
    assert list(found.runs["run"]) == [f"{index:03d}" for index in range(6)]
    assert len(found.layers) == 6 * 3
    assert found.swept == ["n", "tile"]
    assert found.layers["error_removed"].notna().all()


@pytest.mark.parametrize("table", ["runs", "layers", "curves", "timings", "passes"])
def test_without_results_the_tables_have_their_columns(table):
    assert {"run"} <= set(getattr(collect([]), table).columns)
