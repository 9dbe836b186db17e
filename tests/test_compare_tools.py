"""The script that holds ours against a tool tells what differs, and what is a near tie: with a tool made for it."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "tools"))
import compare_tools
import edge_layers
from compare_tools import compare, convention_of, main, read_format, summary
from tool_adapters import Codes
from tool_watch import Searched, returned, watched

from awq_pycuda.choices import ConventionChoice, Formula
from awq_pycuda.errors import InputError
from awq_pycuda.layers.files import load_layers
from awq_pycuda.quant.conventions import CONVENTIONS, Candidate

RNG = np.random.default_rng(7)
FORM = read_format("int4_g8", CONVENTIONS[ConventionChoice.llm_awq].quantizer)
X = (RNG.standard_normal((60, 64)) * RNG.lognormal(size=64)).astype(np.float32)
W = RNG.standard_normal((48, 64)).astype(np.float32)  # so many that the roundings of float32 even out


class Tensor(np.ndarray):
    """What of a tensor is asked for."""

    def detach(self):
        return self

    def cpu(self):
        return self

    def numpy(self):
        return np.asarray(self)


class Fake:
    """llm-awq's search and quantizer in NumPy; `rounded` and `gain` are what may be wrong with them."""

    rounding = 1e-6
    rounded = staticmethod(np.rint)
    gain = 1.0

    def __init__(self, duo=False):
        self.duo = duo

    def quantize(self, scaled):
        groups = scaled.reshape(len(scaled), -1, 8)
        low, high = groups.min(axis=2), groups.max(axis=2)
        steps = np.maximum(high - low, np.float32(1e-5)) / np.float32(15)
        zeros = np.clip(-np.rint(low / steps), 0, 15)
        codes = np.clip(self.rounded(groups / steps[..., None]) + zeros[..., None], 0, 15)
        return Codes(codes.reshape(scaled.shape) - 8, steps, zeros - 8)

    def clip(self, scaled, x):
        groups, tokens = scaled.reshape(len(scaled), -1, 8), x.reshape(len(x), -1, 8)
        peaks = np.abs(groups).max(axis=2)
        shares = 1 - np.arange(10, dtype=np.float32) / 20
        errors = []
        for share in shares:
            limits = (peaks * share)[..., None]
            codes, steps, zeros = self.quantize(np.clip(groups, -limits, limits).reshape(scaled.shape))
            made = (codes.reshape(groups.shape) - zeros[..., None]) * steps[..., None]
            errors.append(np.square(np.einsum("tgk,ngk->tng", tokens, made - groups)).mean(axis=0))
        return peaks * shares[np.argmin(errors, axis=0)]

    def product(self, x, w):
        return x.astype(np.float64) @ w.T

    def trial(self, ratio, w, x):
        s = np.maximum(np.abs(x).mean(axis=0) ** np.float32(ratio), np.float32(1e-4))
        if self.duo:
            groups = np.abs(w).reshape(len(w), -1, 8)
            means = (groups / (groups.max(axis=2, keepdims=True) + np.float32(1e-6))).reshape(w.shape).mean(axis=0)
            s = np.maximum(s / (means ** np.float32(1 - ratio) + np.float32(1e-4)), np.float32(1e-4))
        return s / np.sqrt(s.max() * s.min())

    def loss(self, s, w, x):
        codes, steps, zeros = self.quantize(w * s)
        groups = (codes.reshape(*steps.shape, 8) - zeros[..., None]) * steps[..., None]
        return self.gain * np.mean((self.product(x, w) - self.product(x, groups.reshape(w.shape) / s)) ** 2)

    def search(self, w, x):
        ratios = [index / 20 for index in range(20)]
        scales = np.array([self.trial(ratio, w, x) for ratio in ratios])
        errors = np.array([self.loss(s, w, x) for s in scales], np.float64)
        grid = tuple(Candidate(ratio, duo=self.duo) for ratio in ratios)
        return Searched(grid, scales, errors, int(np.argmin(errors)))


def compared(tool, w=W, x=X, name="llm_awq", formula=Formula.plain):
    return compare("layer", tool, convention_of(name, FORM, formula), w, x)


def test_a_tool_that_does_the_same_is_the_same():
    seen = compared(Fake())
    assert seen.verdict == "same"
    assert seen.theirs == seen.ours
    assert (seen.margin, seen.different) == (0, 0)
    assert max(seen.same_s, seen.scales) < 1e-6
    assert seen.runner_up > 0
    assert summary([seen]).startswith("1 of 1 layers choose the same candidate, 0 another at a near tie, 0 differ")


def last(self, w, x):
    return Fake.search(self, w, x)._replace(chosen=19)


def changed(**attributes):
    return type("Changed", (Fake,), attributes)()


@pytest.mark.parametrize(
    ("tool", "told"),
    [
        (changed(rounded=staticmethod(lambda levels: np.floor(levels + np.float32(0.51)))), "zero points differ"),
        (changed(gain=1 + 2e-6), "errors differ at the same scales"),
        (changed(trial=lambda self, *of: Fake.trial(self, *of) * np.float32(1 + 1e-5)), "scales differ"),
        (changed(search=last), "another candidate at the same scales"),
    ],
)
def test_what_differs_is_told(tool, told):
    seen = compared(tool)
    assert told in seen.verdict
    assert ", 1 differ; " in summary([seen, compared(Fake())])


def test_what_only_the_last_bits_of_scales_decide_is_a_near_tie():
    def nearly(self, ratio, w, x):
        noise = np.random.default_rng(50 - round(20 * ratio)).uniform(-3e-7, 3e-7, w.shape[1])
        return (Fake.trial(self, ratio, w, x) * (1 + noise)).astype(np.float32)

    signs = np.where(RNG.random(X.shape) < 0.5, np.float32(1), np.float32(-1))  # every scale of every candidate is 1
    halves = RNG.integers(-15, 15, W.shape).astype(np.float32) / 2  # of steps: at a rounding tie, every second weight
    halves[:, ::8], halves[:, 1::8] = -7.5, 7.5
    seen = compared(changed(trial=nearly), w=halves, x=signs)
    assert seen.ours.gamma == 0 < seen.theirs.gamma
    assert seen.verdict == "near tie"
    assert seen.margin > 0


def test_rtn_that_a_tool_does_not_try_is_told_and_not_compared():
    codes = RNG.integers(-7, 8, W.shape).astype(np.float32)
    codes[:, ::8], codes[:, 1::8] = -7, 8  # of each group, so that 16 codes are just what RTN has
    seen = compared(Fake(duo=True), w=codes, name="autoawq", formula=Formula.duo)
    assert seen.rtn
    assert seen.verdict.endswith("; RTN is better")


def test_clipping_is_compared_group_by_group():
    convention = convention_of("llm_awq", FORM, Formula.plain)
    seen = compare("layer", Fake(), convention, W, X, clip=True)
    assert seen.verdict == "same; of 384 groups 0 clipped otherwise, by 0.0e+00"
    assert summary([seen, compared(Fake())]).endswith("; of 384 groups 0 clipped otherwise, by 0.0e+00")
    tighter = changed(clip=lambda self, *of: np.float32(0.9) * Fake.clip(self, *of))
    seen = compare("layer", tighter, convention, W, X, clip=True)
    assert seen.fault == "clipped otherwise"
    assert seen.clips == (384, 384)
    assert seen.clip_margin > 0.1
    assert compare("layer", changed(clip=lambda *_: None), convention, W, X, clip=True).verdict == "same"


def test_edge_layers_are_read_and_compared(tmp_path):
    edge_layers.write(tmp_path / "edges.npz")
    layers = load_layers(tmp_path / "edges.npz")
    assert {(layer.weight.shape, layer.activations.shape) for layer in layers} == {((64, 256), (600, 256))}
    assert len(layers) == len(edge_layers.EDGES)
    zeros = [layer for layer in layers if not layer.weight[5].any()]
    assert len(zeros) == 1
    convention = convention_of("llm_awq", FORM, Formula.plain)
    seen = compare("zeros", Fake(), convention, zeros[0].weight, np.array(zeros[0].activations), clip=True)
    assert seen.verdict == "same; of 2048 groups 0 clipped otherwise, by 0.0e+00"


def test_another_grid_is_refused():
    with pytest.raises(InputError, match=r"layer: the tool tries 0, .*; allowed: 0, 0.05$"):
        compare("layer", Fake(), replace(convention_of("llm_awq", FORM, Formula.plain), gammas=(0.0, 0.05)), W, X)


def test_a_search_is_watched_by_its_local_variables():
    def quantizer(scaled):
        return scaled

    def search():
        best_scales, best = None, float("inf")
        for index in range(3):
            ratio = index / 2
            scales = np.array([1.0 + ratio, 2.0]).view(Tensor)
            quantizer(scales)
            quantizer(scales)  # of a second layer
            loss = abs(ratio - 0.5)
            if loss < best:
                best, best_scales = loss, scales
        return best_scales

    with watched("search", "quantizer") as searches, returned("quantizer") as held:
        pass
    assert (searches, held) == ([], {})
    with watched("search", "quantizer") as searches:
        search()
        quantizer(1)
        search()
    assert len(searches) == 2
    first = searches[0]
    assert [each.gamma for each in first.candidates] == [0, 0.5, 1]
    assert (first.errors.tolist(), first.chosen) == ([0.5, 0, 0.5], 1)
    assert first.scales.tolist() == [[1, 2], [1.5, 2], [2, 2]]
    with returned("quantizer") as held:
        quantizer(5)
    assert held == {"scaled": 5}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--format", "int4"], "--format=int4: allowed: int and 2 to 8 bits"),
        (["--format", "int9_g8"], "bits=9: allowed:"),
        (["--format", "int4_g128_sym"], "--format=int4_g128_sym: its symmetric branch ends in an UnboundLocalError"),
        (["--formula", "duo"], "--formula=duo: allowed: plain"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, capsys, arguments, told):
    assert main(["--tool", "llm_awq", "--layers", str(tmp_path / "none.h5"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {told}")


def test_a_tool_that_is_not_installed_is_told():
    assert set(compare_tools.ADAPTERS) == {each.name for each in ConventionChoice} - {"day58"}
    with pytest.raises(InputError, match="not installed; allowed: its package, or --source"):
        type("None", (compare_tools.ADAPTERS["autoawq"],), {"package": "no-such-package"}).find(None)
