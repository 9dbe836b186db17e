"""The benchmark as a command, and the ways in which a kernel could cheat it: each is seen."""

import json
import signal
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from bench_fakes import FakeMachine, plan, small
from conftest import COMPILED

from awq_pycuda import bench
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.benchmarks import models, places, printing, session
from awq_pycuda.benchmarks.cases import CASES, WITHIN
from awq_pycuda.benchmarks.peers import Peers
from awq_pycuda.benchmarks.places import CpuPlace
from awq_pycuda.benchmarks.shapes import Shape
from awq_pycuda.kernels import table
from awq_pycuda.kernels.work import WORK
from awq_pycuda.results.bench_reader import read_bench


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small(monkeypatch)


def measured(backend=None, timer=None, place=CpuPlace, **wanted):
    """The record of a benchmark on this backend, by a machine whose times are made up."""
    with place(backend or CpuBackend(), timer or FakeMachine()) as entered:
        return session.measure(entered, Peers([], "cpu"), plan(**wanted))


def of_stage(record, stage):
    return [row for row in record.rows if row.stage == stage]


def test_every_stage_is_a_case_and_has_its_work():
    assert {case.name for case in CASES} == set(WORK)
    assert set(table.stages()) - set(WITHIN) <= set(WORK)
    assert set(WITHIN.values()) <= set(WORK)


def test_a_benchmark_of_all_stages_and_a_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    keys = ["shapes=24,32x24x16", "seconds=0.001", "peers=none", "case=kernels", "points=3", "group_size=10"]
    assert bench.main([*keys, "out=one.h5"]) == 0
    said = capsys.readouterr().out
    record = read_bench(tmp_path / "one.h5")
    own = [row for row in record.rows if row.case == "kernels"]
    assert {row.stage for row in own} == set(WORK)
    assert {(row.out_features, row.in_features, row.tokens) for row in own} == {(24, 24, 24), (32, 24, 16)}
    for row in own:
        assert row.state == "timed"
        assert row.error <= row.tolerance
        assert row.us.size >= 9
        assert f"{row.stage} " in said
    assert all(f"ceiling {name}: " in said for name in ("read", "write", "copy", "fp32", "fp64"))
    assert {path.name for path in tmp_path.iterdir()} == {"one.h5", "one.png", "one.svg"}


def test_a_model_s_layers_are_searched_block_by_block(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "llama7b", models.Model(32, ((2, 24, 16), (1, 16, 24)), 16, 8))
    out = tmp_path / "a.h5"
    keys = ["case=llama7b", "points=3", "group_size=6", "seconds=0.001", "peers=none", "backend=cpu", f"out={out}"]
    assert bench.main(keys) == 0
    rows = [row for row in read_bench(out).rows if row.case == "llama7b"]
    variants = ("numpy", "numba") if COMPILED else ("numpy",)
    assert {row.variant for row in rows} == {f"{variant}, 1 of 32 blocks" for variant in variants}
    assert {row.stage for row in rows} == {"compute_s", "compute_s_output"}
    assert all(row.state == "timed" and 0 < row.error <= row.tolerance for row in rows)
    assert rows[-1].operations == 2 * 8 * 3 * (2 * 24 * 16 + 16 * 24)
    title = "llama7b: blocks of 2 of 24 x 16 and 1 of 16 x 24, 8 tokens, 3 candidates, groups of 6"
    assert title in " ".join(capsys.readouterr().out.split())


def test_a_model_of_which_a_layer_is_left_out_has_no_times(monkeypatch):
    class LeavesALayer(CpuBackend):
        def compute_s(self, layer, convention):
            if layer.w.shape != (24, 16):
                super().compute_s(layer, convention)

    monkeypatch.setitem(models.MODELS, "llama7b", models.Model(2, ((1, 24, 16), (1, 16, 24)), 16, 8))
    (row,) = of_stage(measured(LeavesALayer(), cases=("llama7b",), stages=("compute_s",)), "compute_s")
    assert row.reason == "layer 0 of a block: error: 3 of 3 elements unwritten or not finite, the first at (0,)"


def test_the_models_are_cases():
    assert set(bench.CASES) - {"kernels", "pass", "goals"} == set(models.MODELS)


@pytest.mark.parametrize(
    ("wanted", "left"), [((), {"numpy", "other"}), (("other",), {"other"}), (("host",), {"numpy", "other"})]
)
def test_variants_alone(wanted, left):
    class Two(CpuPlace):
        @contextmanager
        def kernels(self, *given):
            with super().kernels(*given) as found, super().kernels(*given) as again:
                for (subject,) in again.values():
                    subject.key = replace(subject.key, variant="other")
                yield {stage: [*subjects, *again[stage]] for stage, subjects in found.items()}

    record = measured(place=Two, stages=("relu",), variants=wanted)
    assert {row.variant for row in of_stage(record, "relu")} == left


def test_a_pass_is_verified_and_timed():
    record = measured(cases=("pass",), layers=2)
    rows = of_stage(record, "pass")
    assert [row.state for row in rows] == ["timed", "timed"]
    assert rows[0].variant == "numpy, 2 layers"
    assert 0 < rows[0].error <= rows[0].tolerance


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        (["shapes=0"], "shapes=0: '0' is none; allowed: sizes such as 1024,4096x4096x512"),
        (["shapes=4x4"], "shapes=4x4: '4x4' is none; allowed: sizes such as 1024,4096x4096x512"),
        (["seconds=0"], "seconds=0: is out of range; allowed: a number above 0"),
        (["seconds=inf"], "seconds=inf: is no number; allowed: a number above 0"),
        (["peers=jax"], "peers=jax: 'jax' is none; allowed: auto, none, eager, compiled"),
        (["case=pass", "shapes=4x8x4"], "shapes=4x8x4: layers=3 of a chain must be square; allowed: sizes such as"),
        (["variants=fast"], "variants=fast: 'fast' is none; allowed: deterministic, atomic, "),
        (["kernels=softmax"], "kernels=softmax: 'softmax' is none; allowed: init, accum_stats"),
    ],
)
def test_bad_input_is_one_line(keys, error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.main(keys) == 2
    assert capsys.readouterr().err.startswith(f"error: {error}")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_told_before_any_work(tmp_path, capsys):
    assert bench.main([f"out={tmp_path / 'none' / 'a.h5'}"]) == 2
    assert capsys.readouterr().err == (
        f"error: out={tmp_path / 'none' / 'a.h5'}: No such file or directory; allowed: a path in a folder that can be "
        "written to, where no file is\n"
    )


def test_shapes_beyond_the_memory_are_told_before_any_work(tmp_path, capsys):
    assert bench.main(["shapes=999999", f"out={tmp_path / 'a.h5'}"]) == 2
    assert capsys.readouterr().err.startswith("error: shapes=999999: needs ")


def test_a_file_that_is_there_is_not_replaced(tmp_path, capsys):
    (tmp_path / "a.h5").write_text("mine")
    assert bench.main([f"out={tmp_path / 'a.h5'}"]) == 2
    assert "is there already; allowed: a path in a folder that can be written to" in capsys.readouterr().err
    assert (tmp_path / "a.h5").read_text() == "mine"


# --- exploits -----------------------------------------------------------------------------------------------------


class LeavesARow(CpuBackend):
    def relu(self, y, bias, out):
        super().relu(y[:-1], bias, out[:-1])


class LeavesACode(CpuBackend):
    def quantize_awq(self, w, s, quantized):
        kept = quantized.codes[-1, -1]
        super().quantize_awq(w, s, quantized)
        quantized.codes[-1, -1] = kept


class LeavesNaN(CpuBackend):
    def accum_stats(self, x, abs_mean, sq_mean):
        super().accum_stats(x, abs_mean, sq_mean)
        sq_mean[3] = np.nan


class Remembers(CpuBackend):
    """Gives its first answer again, to whatever lies in the same arrays."""

    def __init__(self):
        super().__init__()
        self.answers = {}

    def relu(self, y, bias, out):
        key = y.ctypes.data
        if key not in self.answers:
            super().relu(y, bias, out)
            self.answers[key] = out.copy()
        out[...] = self.answers[key]


class NothingNew(CpuBackend):
    """Does nothing where it has been called with the same values before."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def relu(self, y, bias, out):
        if self.seen != y.tobytes():
            super().relu(y, bias, out)
        self.seen = y.tobytes()


class Raises(CpuBackend):
    def relu(self, y, bias, out):
        raise RuntimeError("no such kernel image")


@pytest.mark.parametrize(
    ("backend", "stage", "reason"),
    [
        (LeavesARow, "relu", "out: 40 of 1280 elements unwritten or not finite, the first at (31, 0)"),
        (LeavesACode, "quantize_awq", "codes: 1 of 960 elements unwritten or not finite, the first at (39, 23)"),
        (LeavesNaN, "accum_stats", "sq_mean: 1 of 24 elements unwritten or not finite, the first at (3,)"),
        (Remembers, "relu", "relu is off by 1"),
        (NothingNew, "relu", "launched again on the same inputs: out: 1280 of 1280 elements unwritten"),
        (Raises, "relu", "RuntimeError: no such kernel image"),
    ],
)
def test_a_wrong_kernel_is_a_row_with_its_reason_and_has_no_times(backend, stage, reason):
    record = measured(backend(), stages=(stage,))
    (row,) = of_stage(record, stage)
    assert row.state == "failed"
    assert row.reason.startswith(reason)
    assert row.us.size == 0
    assert printing.ours_failed(record)
    assert any(line.startswith(f"FAILED {stage} numpy at 40 x 24 x 32: {reason}") for line in printing.remarks(record))


def test_a_kernel_that_fails_while_it_is_timed_has_no_times():
    class Breaks(CpuBackend):
        calls = 0

        def relu(self, y, bias, out):
            self.calls += 1
            if self.calls > 8:
                raise RuntimeError("an illegal memory access was encountered")
            super().relu(y, bias, out)

    (row,) = of_stage(measured(Breaks(), stages=("relu",)), "relu")
    assert row.state == "failed"
    assert row.reason == "while timed: RuntimeError: an illegal memory access was encountered"
    assert row.us.size == 0


def test_what_keeps_it_from_going_on_leaves_what_was_measured():
    class Gone(CpuBackend):
        def empty(self, shape, dtype=None):
            if shape == (30, 30):
                raise MemoryError("no room")
            return super().empty(shape, dtype)

    record = measured(Gone(), stages=("relu",), shapes=(Shape(32, 40, 24), Shape(30, 30, 30), Shape(8, 8, 8)))
    assert [(row.tokens, row.state) for row in of_stage(record, "relu")] == [(32, "timed"), (32, "timed")]
    assert record.root["error"] == "MemoryError: no room"
    assert printing.remarks(record)[0] == "STOPPED: MemoryError: no room"
    assert printing.ours_failed(record)


def test_a_signal_leaves_what_was_measured(tmp_path, monkeypatch, capsys):
    class Pressed(CpuBackend):
        def quantize_awq(self, w, s, quantized):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(places, "CpuBackend", Pressed)
    keys = ["shapes=24", "seconds=0.001", "peers=none", "kernels=relu,quantize_awq,init", "backend=cpu"]
    assert bench.main([*keys, f"out={tmp_path / 'a.h5'}"]) == 130
    record = read_bench(tmp_path / "a.h5")
    assert {row.stage for row in record.rows if row.case == "kernels"} == {"init"}
    assert record.root["error"] == "Stopped: interrupted by SIGINT"
    assert capsys.readouterr().err == "interrupted by SIGINT\n"


def test_a_cache_that_is_not_emptied_gives_no_cold_times():
    record = measured(timer=FakeMachine(flushes=False), stages=("relu",))
    assert [row.cache for row in of_stage(record, "relu")] == ["warm"]
    assert json.loads(record.root["absent"]) == [
        "cold times: the flush has no effect (an array is read in 1.00 of its time without)"
    ]


def test_data_that_outlive_the_flush_are_seen_by_the_time():
    """As those of a kernel that has asked the cache to keep them do."""
    honest = of_stage(measured(stages=("relu",)), "relu")
    assert not any(row.impossible for row in honest)
    record = measured(timer=FakeMachine(persisting="relu"), stages=("relu",))
    cold, _ = of_stage(record, "relu")
    assert cold.impossible
    assert np.isnan(cold.of_limit)
    assert any(line.startswith("IMPOSSIBLE relu numpy at 40 x 24 x 32, cold: ") for line in printing.remarks(record))
    assert printing.ours_failed(record)


def test_a_time_below_what_its_operations_take_is_impossible_in_a_warm_cache_too():
    record = measured(timer=FakeMachine(faster={"matmul_reference": 1e-6}), stages=("matmul_reference",))
    assert [row.impossible for row in of_stage(record, "matmul_reference")] == [True, True]
    assert all(not row.of_limit > 1 for row in record.rows)


def test_what_takes_several_operations_of_its_unit_has_as_much_higher_a_limit():
    class Thrice(CpuPlace):
        @contextmanager
        def kernels(self, *given):
            with super().kernels(*given) as found:
                for (subject,) in found.values():
                    subject.passes = 3
                yield found

    (once, _), (thrice, _) = (
        of_stage(measured(place=place, stages=("matmul_reference",)), "matmul_reference")
        for place in (CpuPlace, Thrice)
    )
    assert once.operations == thrice.operations == 2 * 32 * 40 * 24
    assert thrice.limit_us == pytest.approx(3 * once.limit_us)
