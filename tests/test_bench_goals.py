"""The figures that were to be reached: what is measured for them, how they are told, and that a file keeps them."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from bench_fakes import FakeMachine, small
from result_files import editing
from rich.console import Console
from test_bench_files import record, row, written

from awq_pycuda import bench
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.benchmarks import goals, models, session
from awq_pycuda.benchmarks.goal_table import ceilings, cells, conditions
from awq_pycuda.benchmarks.goals import GOALS, Goal, parts_for, reached
from awq_pycuda.benchmarks.peers import Peers
from awq_pycuda.benchmarks.places import CpuPlace
from awq_pycuda.benchmarks.plan import Part, Plan
from awq_pycuda.benchmarks.printing import print_record
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.hdf5 import UnreadableError
from awq_pycuda.results.bench_reader import read_bench
from awq_pycuda.results.bench_record import BenchGoal, BenchRecord
from awq_pycuda.results.bench_write import write_bench

SHAPE = Shape(8, 24, 16, 3)


def test_every_goal_is_measured_once():
    parts = parts_for(GOALS)
    assert len({(part.case, part.shape) for part in parts}) == len(parts)
    for goal in GOALS:
        (part,) = (part for part in parts if (part.case, part.shape) == (goal.case, goal.shape))
        assert goal.case == "pass" or goal.stage in part.stages
        assert not goal.beside or goal.beside in part.peers
    assert len({(str(goal), goal.quantity) for goal in GOALS}) == len(GOALS)
    assert all(math.isnan(goal.bound) == (goal.variant == models.STREAMED) for goal in GOALS)


def measured(monkeypatch, *wanted):
    small(monkeypatch)
    plan = Plan(parts_for(wanted), 2, seed=3, noise=0.5, seconds=1e-3)
    with CpuPlace(CpuBackend(), FakeMachine()) as place:
        found = session.measure(place, Peers([], "cpu"), plan)
    return replace(found, goals=reached(wanted, found.rows))


def test_goals_are_held_against_the_rows_of_their_own_shape(monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "llama7b", models.Model(1, ((1, 24, 16),), 16, 8))
    found = measured(
        monkeypatch,
        Goal("kernels", "init", SHAPE, "limit", 0.1),
        Goal("kernels", "init", SHAPE, "limit", 1.1),
        Goal("kernels", "compute_s", SHAPE, "time", 1e-3),
        Goal("kernels", "compute_s", replace(SHAPE, group_size=8), "time", 1e3),
        Goal("kernels", "dequantizeTiled", SHAPE, "speedup", 5, "cuBLAS fp32"),
        Goal("pass", "pass", Shape(8, 16, 16, 3), "time", math.nan),
        Goal("llama7b", "compute_s", Shape(8, 16, 16, 3), "time", 1e3, variant="numpy, 1 of 1 blocks"),
    )
    assert [found.reached(goal) for goal in found.goals] == [True, False, False, True, None, None, True]
    rows = [found.rows[goal.row] for goal in found.goals]
    assert [(each.case, each.group_size, each.cache) for each in rows[2:4]] == [
        ("kernels", 0, "cold"),
        ("kernels", 8, "cold"),
    ]
    assert rows[5].variant == "numpy, 2 layers"
    print_record(Console(file=sys.stdout, width=200), found)
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "search by diag, 24 x 16, 3 candidates at most 0.001 us" in " ".join(said)
    (line,) = (line for line in said if "product" in line)
    assert line.endswith("at least 5 times as fast as cuBLAS fp32 not measured -")


def test_of_several_variants_the_one_that_a_run_takes_counts():
    class Several(CpuPlace):
        def preferred(self, stage):
            return ("none", "b", "a")

    def subject(name):
        return type("", (), {"key": type("", (), {"variant": name})})

    own = [subject(f"{name}, 3 layers") for name in "abc"]
    part = Part("kernels", SHAPE, ("relu",), default=True)
    (found,) = session._own(own, part, Several(CpuBackend(), FakeMachine()).preferred("relu"))
    assert found is own[1]
    assert session._own(own, part, ("none",)) == own


def with_goals():
    made = record()
    rows = [
        replace(made.rows[0], read=4e3, us=np.full(9, 8.0), error=2e-7),
        row([4.0] * 9, by="torch", error=1e-7),
        row([2.0] * 9, stage="link", case="ceiling", read=2e3, operations=0.0),
        made.rows[2],
    ]
    return BenchRecord(
        made.root,
        rows,
        [
            BenchGoal("time", "time", 8.0, "", 0, -1),
            BenchGoal("limit", "limit", 0.5, "", 0, -1),
            BenchGoal("speedup", "speedup", 1.0, "torch", 0, 1),
            BenchGoal("error", "error", 2.0, "torch", 0, 1),
            BenchGoal("link", "link", math.nan, "link", 0, 2),
            BenchGoal("failed", "time", 8.0, "", 3, -1),
            BenchGoal("alone", "speedup", 1.0, "torch", 0, -1),
        ],
    )


def test_goals_come_back_as_they_were_written(tmp_path):
    made = with_goals()
    found = read_bench(written(tmp_path, "a.h5", made) and tmp_path / "a.h5")
    assert [*cells(found)] == [
        ("time", "at most 8 us", "8 us", "yes"),
        ("limit", "at least 50% of its limit", "50.0 % (8 us)", "yes"),
        ("speedup", "at least 1 times as fast as torch", "0.5 times (8 us, 4 us)", "no"),
        ("error", "error at most 2 times that of torch", "2 times (2e-07, 1e-07)", "yes"),
        ("link", "-", "50.0 % of the link", "-"),
        ("failed", "at most 8 us", "not measured: y: 1 of 8 elements unwritten", "-"),
        ("alone", "at least 1 times as fast as torch", "not measured", "-"),
    ]


def test_a_line_tells_where_and_under_which_ceilings():
    made = with_goals()
    faster = replace(made.rows[2], us=np.full(9, 1e-3), operations=4e6, stage="int8 matrix")
    slower = replace(made.rows[2], us=np.full(9, 4.0))
    root = {**made.root, "versions": '{"nvcc": "13.0"}', "git_commit": "0123456789"}
    found = replace(made, root=root, rows=[*made.rows, slower, faster])
    assert conditions(found) == "a GPU, 1,980 MHz, nvcc 13.0, commit 01234567"
    assert ceilings(found) == "link 1.26 GB/s, int8 matrix 4,000 TOP/s"


def test_a_file_of_version_2_has_no_goals(tmp_path):
    path = tmp_path / "a.h5"
    write_bench(path, with_goals())
    with editing(path) as file:
        del file["goals"]
        file.attrs["schema_version"] = 2
    assert not read_bench(path).goals
    with editing(path) as file:
        file.attrs["schema_version"] = 3
    with pytest.raises(UnreadableError, match="/goals is missing"):
        read_bench(path)


@pytest.mark.parametrize(("name", "value"), [("row", 4), ("peer_row", 9), ("quantity", b"luck")])
def test_a_goal_of_nothing_that_is_there_is_told(tmp_path, name, value):
    path = tmp_path / "a.h5"
    write_bench(path, with_goals())
    with editing(path) as file:
        file[f"goals/{name}"][0] = value
    with pytest.raises(UnreadableError, match="/goals: 'time' is of nothing that is there"):
        read_bench(path)


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        (["case=goals,pass"], "case=goals,pass: goals stands by itself; allowed: kernels or pass or llama7b or goals"),
        (
            ["case=goals", "shapes=2048"],
            "shapes=2048: case=goals has its own; allowed: with case=kernels, pass, llama7b",
        ),
        (["case=goals", "kernels=relu"], "kernels=relu: case=goals has its own; allowed: with case=kernels, "),
        (["case=goals", "points=20"], "points=20: case=goals has its own; allowed: with case=kernels, pass, llama7b"),
        (["case=goals", "backend=cpu"], "case=goals: is of a GPU (backend=cpu); allowed here: kernels, pass, llama7b"),
        (["case=goal"], "case=goal: 'goal' is none; allowed: kernels or pass or llama7b or goals"),
    ],
)
def test_bad_input_is_one_line(keys, error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(goals, "GOALS", GOALS[:1])
    assert bench.main(keys) == 2
    assert capsys.readouterr().err.startswith(f"error: {error}")
    assert not list(tmp_path.iterdir())
