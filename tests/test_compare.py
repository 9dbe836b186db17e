"""Two sets of results: matching, intervals, verdicts, and that nothing is dropped silently."""

import math

import numpy as np
import pytest
from result_files import editing, make_run, vary

from awq_pycuda.analysis.collect import collect
from awq_pycuda.analysis.compare import compare, metric_verdict, time_verdict
from awq_pycuda.analysis.derived import COMPARED
from awq_pycuda.analysis.intervals import Ratio, ratio_of_medians
from awq_pycuda.errors import InputError


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("real"))


def timed(real, folder, factors, config=None, **stages):
    """A run whose passes take 10 ms, and each stage of each layer 1 ms, times a factor per pass (and per stage)."""
    path = vary(real, folder, config)
    with editing(path) as file:
        timings = file["timings"]
        names = timings["stage"].asstr()[:].tolist()
        host = np.ones((3, len(names), 1)) * np.array(factors, float)
        for stage, factor in stages.items():
            host[:, names.index(stage)] *= factor
        for name, values in (("host_ms", host), ("gpu_ms", np.full(host.shape, np.nan))):
            del timings[name]
            timings[name] = values
        del timings["pipeline_ms"]
        timings["pipeline_ms"] = 10 * np.array(factors, float)
    return path


def compared(*folders, **options):
    return compare(*(collect([folder]) for folder in folders), **options)


def verdicts(comparison):
    return dict(zip(comparison.times["what"], comparison.times["verdict"], strict=True))


@pytest.mark.parametrize("repeats", [1, 2, 3, 20])
def test_a_set_against_itself_is_the_same(tmp_path, repeats):
    path = make_run(tmp_path / "0", f"timing.repeats={repeats}", "inputs.holdout=0.5", "clip=groups")
    vary(path, tmp_path / "1", {"seed": 1}, slower=1.7)
    vary(path, tmp_path / "again", slower=3)
    result = compared(tmp_path, tmp_path)
    assert set(result.times["verdict"]) == set(result.metrics["verdict"]) == {"same"}
    assert len(result.times) == 2 * 8
    assert len(result.metrics) == 2 * 3 * len(COMPARED)
    assert result.not_compared.empty
    assert (result.broken, result.apart) == ([], [])


def test_runs_without_measured_passes_have_no_times(tmp_path):
    make_run(tmp_path / "a" / "0", "timing=none")
    make_run(tmp_path / "b" / "0", "timing=none")
    result = compared(tmp_path / "a", tmp_path / "b")
    assert result.times.empty
    assert set(result.metrics["verdict"]) == {"same"}


def test_each_stage_has_its_own_verdict(real, tmp_path):
    timed(real, tmp_path / "a", [1, 1.01, 0.99])
    timed(real, tmp_path / "b", [1.02, 1.0, 0.98], relu=1.2, compute_s=0.8, dequantizeTiled=1.05)
    result = compared(tmp_path / "a", tmp_path / "b")
    assert verdicts(result) == {
        "pipeline": "same",
        "accum_stats": "same",
        "compute_s": "faster",
        "compute_scale_b": "same",
        "quantize_awq": "same",
        "dequantizeTiled": "unclear",
        "relu": "slower",
    }
    relu = result.times.set_index("what").loc["relu"]
    assert (relu["median_a_ms"], relu["median_b_ms"]) == pytest.approx((3.0, 3.6))
    assert relu["ratio"] == pytest.approx(1.2)
    assert (relu["low"], relu["high"]) == pytest.approx((1.2 * 0.98 / 1.01, 1.2 * 1.02 / 0.99))
    assert (relu["samples_a"], relu["samples_b"]) == (3, 3)


@pytest.mark.parametrize("repeats", [1, 2])
def test_one_or_two_passes_decide_nothing(real, tmp_path, repeats):
    timed(real, tmp_path / "a", [1.0] * 20)
    timed(real, tmp_path / "b", [9.0] * repeats)
    for pair in ("ab", "ba"):
        assert set(compared(*(tmp_path / name for name in pair)).times["verdict"]) == {"unclear"}


def test_runs_of_one_config_are_pooled(real, tmp_path):
    for index in range(2):
        timed(real, tmp_path / f"a/{index}", [1 + index / 100, 1.005])
        timed(real, tmp_path / f"b/{index}", [2 + index / 100, 2.005])
    result = compared(tmp_path / "a", tmp_path / "b")
    assert set(result.times["verdict"]) == {"slower"}
    assert set(result.times["samples_a"]) == {4}
    assert result.times["runs_b"][0] == "0, 1"


def test_a_gpu_s_stages_are_compared_on_the_stream(real, tmp_path):
    timed(real, tmp_path / "a", [1, 1.01, 1.02])
    path = timed(real, tmp_path / "b", [1, 1.01, 1.02])
    with editing(path) as file:
        file["timings/gpu_ms"][...] = file["timings/host_ms"][()] * 5
    found = verdicts(compared(tmp_path / "a", tmp_path / "b"))
    assert found.pop("pipeline") == "same"
    assert set(found.values()) == {"slower"}


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.06, 2.0, "slower"),
        (1.05, 2.0, "unclear"),
        (0.95, 1.05, "same"),
        (0.94, 1.05, "unclear"),
        (0.5, 0.94, "faster"),
        (0.5, 0.95, "unclear"),
        (0.5, 2.0, "unclear"),
        (math.nan, math.nan, "unclear"),
    ],
)
def test_verdict_of_an_interval(low, high, verdict):
    assert time_verdict(np.array([1.0]), np.array([2.0]), Ratio(1.0, low, high), 0.05) == verdict


def test_tolerance_is_how_much_does_not_matter(real, tmp_path):
    timed(real, tmp_path / "a", [1, 1.01, 0.99])
    timed(real, tmp_path / "b", [1.2, 1.21, 1.19])
    for tolerance, verdict in ((0.05, "slower"), (0.2, "unclear"), (0.3, "same")):
        assert set(compared(tmp_path / "a", tmp_path / "b", tolerance=tolerance).times["verdict"]) == {verdict}


@pytest.mark.parametrize(
    ("size_a", "size_b", "critical"),
    # The largest U that is significant at 5 % one-sided, of the table of the Mann-Whitney test.
    [(3, 3, 0), (3, 5, 1), (4, 4, 1), (5, 5, 4), (5, 10, 11), (8, 8, 15), (10, 10, 27), (12, 17, 64), (20, 20, 138)],
)
def test_the_interval_is_the_exact_one_of_the_ranks(size_a, size_b, critical):
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1, 2, size_a), rng.uniform(1, 2, size_b)
    ratios = np.sort(np.divide.outer(b, a).ravel())
    found = ratio_of_medians(a, b)
    assert (found.low, found.high) == (ratios[critical], ratios[-1 - critical])
    assert found.ratio == np.median(b) / np.median(a)


@pytest.mark.parametrize(("size_a", "size_b"), [(3, 3), (4, 20), (50, 60)])
@pytest.mark.parametrize("distribution", ["lognormal", "pareto"])
def test_the_interval_holds_what_it_promises(size_a, size_b, distribution):
    """90 % of the intervals hold the true ratio, with 5 % on either side, whatever the distribution."""
    rng = np.random.default_rng(1)
    draw = {"lognormal": lambda n: rng.lognormal(0, 0.2, n), "pareto": lambda n: 1 + rng.pareto(2, n)}[distribution]
    found = [ratio_of_medians(draw(size_a), 1.3 * draw(size_b)) for _ in range(1000)]
    # The standard error of a share of 5 % among 1,000 is 0.7 %.
    assert np.mean([each.low > 1.3 for each in found]) < 0.075
    assert np.mean([each.high < 1.3 for each in found]) < 0.075
    assert np.mean([each.low <= 1.3 <= each.high for each in found]) < 0.94


def test_a_ratio_of_medians_beyond_the_interval_widens_it():
    mostly_short, mostly_long = np.r_[[1.0] * 11, [100.0] * 10], np.r_[[1.0] * 10, [100.0] * 11]
    found = ratio_of_medians(mostly_short, mostly_long)
    assert found.ratio == 100 == found.high
    assert found.low <= 1
    found = ratio_of_medians(mostly_long, mostly_short)
    assert found.ratio == 0.01 == found.low
    assert found.high >= 1


@pytest.mark.parametrize("samples", [[], [0.0, 1, 2], [-1.0, 1, 2]])
def test_times_that_are_not_above_zero_have_no_ratio(samples):
    found = ratio_of_medians(np.array(samples), np.array([1.0, 2, 3]))
    assert all(math.isnan(value) for value in (found.ratio, found.low, found.high))


@pytest.mark.parametrize(
    ("metric", "a", "b", "tolerance", "verdict"),
    [
        ("output_mse", [1.0], [1.0 + 2**-52], 0, "worse"),
        ("output_mse", [1.0], [0.5], 0, "better"),
        ("output_mse", [1.0], [1.009], 0.01, "same"),
        ("output_mse", [1.0], [1.011], 0.01, "worse"),
        ("output_sqnr_db", [40.0], [41.0], 0, "better"),
        ("output_sqnr_db", [40.0], [39.0], 0, "worse"),
        ("output_sqnr_db", [40.0], [40.04], 0.01, "same"),
        ("output_sqnr_db", [40.0], [39.95], 0.01, "worse"),
        ("output_sqnr_db", [math.inf], [math.inf], 0, "same"),
        ("output_sqnr_db", [math.inf], [40.0], 0, "worse"),
        ("output_sqnr_db", [math.inf], [math.inf, math.inf], 0, "same"),
        ("propagated_sqnr_db", [math.nan], [math.nan], 0, "same"),
        ("propagated_sqnr_db", [math.nan], [1.0], 0, "unclear"),
        ("gamma_chosen", [0.5], [0.25], 0, "differs"),
        ("weight_mse", [0.5], [0.25], 0, "differs"),
        ("output_mse", [1.0, 2.0], [2.0, 1.0], 0, "same"),
        ("output_mse", [1.0, 2.0], [1.5, 2.5], 0, "unclear"),
        ("output_mse", [1.0, 2.0], [2.0, 3.0], 0, "unclear"),
        ("output_mse", [1.0, 2.0], [2.5, 3.5], 0, "worse"),
        ("output_mse", [2.0], [1.0], 0.5, "same"),  # half of A
        ("output_mse", [1.0], [2.0], 0.5, "worse"),
    ],
)
def test_verdict_of_a_metric(metric, a, b, tolerance, verdict):
    assert metric_verdict(metric, np.array(a), np.array(b), tolerance) == verdict


def test_which_end_of_a_metric_is_the_good_one():
    one, two = np.array([1.0]), np.array([2.0])
    assert {metric: metric_verdict(metric, one, two, 0) for metric in COMPARED} == {
        "output_sqnr_db": "better",
        "rtn_output_sqnr_db": "better",
        "max_output_sqnr_db": "better",
        "held_out_max_output_sqnr_db": "better",
        "held_out_output_sqnr_db": "better",
        "unclipped_output_sqnr_db": "better",
        "held_out_rtn_output_sqnr_db": "better",
        "propagated_sqnr_db": "better",
        "output_mse": "worse",
        "rtn_output_mse": "worse",
        "max_output_mse": "worse",
        "held_out_max_output_mse": "worse",
        "held_out_output_mse": "worse",
        "unclipped_output_mse": "worse",
        "held_out_rtn_output_mse": "worse",
        "propagated_output_mse": "worse",
        "weight_mse": "differs",
        "saturated_fraction": "differs",
        "gamma_chosen": "differs",
    }


def test_metrics_are_compared_by_layer(real, tmp_path):
    vary(real, tmp_path / "a")
    path = vary(real, tmp_path / "b")
    with editing(path) as file:
        file["layers/001/metrics"].attrs["rtn_output_mse"] *= 2
    changed = compared(tmp_path / "a", tmp_path / "b").metrics.query("verdict != 'same'")
    assert changed[["layer", "metric", "verdict"]].values.tolist() == [[1, "rtn_output_mse", "worse"]]
    assert changed["difference"].iloc[0] == changed["a"].iloc[0]


def test_runs_without_a_counterpart_are_listed(real, tmp_path):
    vary(real, tmp_path / "a/common")
    vary(real, tmp_path / "a/tiled", {"matmul.kernel": "tiled", "tile": 8})
    vary(real, tmp_path / "b/common", {"study": "another name for the same"})
    vary(real, tmp_path / "b/blocked", {"matmul.kernel": "blocked", "tile": 8})
    vary(real, tmp_path / "b/failed", {"tile": 4}, status="failed", error="RuntimeError: no")
    (tmp_path / "b/damaged.h5").write_bytes(b"")
    result = compared(tmp_path / "a", tmp_path / "b")
    assert set(result.times["runs_a"]) == set(result.times["runs_b"]) == {"common"}
    assert result.not_compared.values.tolist() == [
        ["A", "tiled", "no complete run of B has its config"],
        ["B", "failed", "failed: RuntimeError: no"],
        ["B", "blocked", "no complete run of A has its config"],
        ["B", str(tmp_path / "b/damaged.h5"), "empty file"],
    ]
    assert result.apart == ["matmul.kernel"]
    assert result.broken == []


def test_ignored_keys_may_differ(real, tmp_path):
    for tile in (8, 16):
        timed(real, tmp_path / f"a/{tile}", [1, 1.01, 1.02], {"tile": tile, "matmul.kernel": "tiled"})
        timed(real, tmp_path / f"b/{tile}", [0.5, 0.51, 0.52], {"tile": tile, "matmul.kernel": "blocked"})
    with pytest.raises(InputError, match=r"none agree in matmul\.kernel: ignore=matmul\.kernel sets that aside"):
        compared(tmp_path / "a", tmp_path / "b")
    result = compared(tmp_path / "a", tmp_path / "b", ignore=["matmul.kernel"])
    assert result.times["config"].unique().tolist() == ["tile=8", "tile=16"]
    assert set(result.times["verdict"]) == {"faster"}
    with pytest.raises(InputError, match=r"ignore=kernel: no such config key; allowed: .*matmul\.kernel"):
        compared(tmp_path / "a", tmp_path / "b", ignore=["kernel"])


def test_configs_are_labelled_by_what_tells_them_apart(real, tmp_path):
    for index, values in enumerate(({"n": 8, "tokens": 8}, {"n": 16, "tokens": 16, "inputs.kind": "[b]"})):
        vary(real, tmp_path / str(index), values)
    labels = compared(tmp_path, tmp_path).times["config"].unique().tolist()
    assert labels == ["inputs.kind=outliers n=8", "inputs.kind=[b] n=16"]


def test_a_run_that_fails_in_b_alone_is_broken(real, tmp_path):
    for name in ("a/0", "b/0"):
        vary(real, tmp_path / name)
        vary(real, tmp_path / name.replace("0", "1"), {"tile": 8})
    vary(real, tmp_path / "b/1", {"tile": 8}, status="failed", error="RuntimeError: no")
    assert compared(tmp_path / "a", tmp_path / "b").broken == ["1"]
    assert compared(tmp_path / "b", tmp_path / "a").broken == []
    vary(real, tmp_path / "b/2", {"tile": 8})  # a run of the same config that did not fail
    assert compared(tmp_path / "a", tmp_path / "b").broken == []


def test_sets_without_a_complete_run(real, tmp_path):
    vary(real, tmp_path / "a")
    vary(real, tmp_path / "b", status="failed", error="RuntimeError: no")
    with pytest.raises(InputError, match=r"^B has no complete run"):
        compared(tmp_path / "a", tmp_path / "b")


def test_runs_that_were_given_no_config_match_by_its_hash(real, tmp_path):
    for name in ("a", "b"):
        for digit in "12":
            path = vary(real, tmp_path / name / digit, slower=int(digit), config_hash=digit * 64)
            with editing(path) as file:
                file.attrs["config"] = ""
    result = compared(tmp_path / "a", tmp_path / "b")
    assert result.times["config"].unique().tolist() == ["11111111", "22222222"]
    assert set(result.times["verdict"]) == {"same"}
