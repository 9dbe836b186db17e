"""What an evaluation is told to take: the sizes are those that it has, and what is there already takes nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_evaluation_forward import CONFIGS, windows
from tiny_causal import save_causal

from awq_pycuda.capturing.loading import load
from awq_pycuda.capturing.text import Around
from awq_pycuda.capturing.windows import Window as Longest
from awq_pycuda.engine.execution import validate
from awq_pycuda.engine.memory import required_bytes
from awq_pycuda.evaluating import estimate as module
from awq_pycuda.evaluating.calibration import calibrate, plan_of
from awq_pycuda.evaluating.estimate import Estimate, estimate
from awq_pycuda.evaluating.forward import Runner
from awq_pycuda.evaluating.places import places_of
from awq_pycuda.evaluating.quantized import made
from awq_pycuda.evaluating.recipes import parse
from awq_pycuda.evaluating.windows import Cut
from awq_pycuda.layers.files import describe_layers
from awq_pycuda.parallel import use_threads

NONE = Around([], [])
ORIGIN = dict.fromkeys(("model", "model_type", "model_sha256", "text_sha256", "calibration_sha256"), "")
RECIPES = """\
rtn: [quant=int4_row, gamma_grid=rtn]
awq: [quant=int4_g128, quant.group_size=16, share=inputs, tokens=16]
both: {layers: {mlp: rtn, '.*': awq}}
"""


class Evaluation:
    """Everything that an estimate is made of, and the layer file that an evaluation would begin with."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.loaded = load(save_causal(folder / "model", CONFIGS[kind]()), causal=True)
        self.plan = plan_of(self.loaded, NONE, 16)
        self.places = places_of(self.loaded.model, self.plan)
        found = windows()
        self.texts = Cut([each.ids for each in found[:2]], found[2:], 31)
        self.path, self.folder = folder / "calibration.h5", folder / "recipes"
        (folder / "recipes.yaml").write_text(RECIPES)
        self.recipes = parse(str(folder / "recipes.yaml"), 24, ["backend=cpu", "threads=1"])

    def calibrate(self) -> Any:
        given = self.texts.calibration, NONE, Longest(16, None), self.path, ORIGIN
        return calibrate(self.loaded, self.plan, *given)

    def estimate(self, alone: bool = False) -> Estimate:
        with Runner(self.loaded.causal, self.loaded.model, workers=2) as runner:
            runner.try_on(self.texts.evaluation[0])
            what = self.loaded, self.plan, self.places, self.recipes, self.texts
            return estimate(runner, *what, alone, self.path, ORIGIN, self.folder)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_sizes_are_those_of_the_calibration(kind, tmp_path):
    evaluation = Evaluation(kind, tmp_path)
    # One window says what the others, as long, will be like; experts see as many only by chance.
    evaluation.texts = replace(evaluation.texts, calibration=evaluation.texts.calibration[:1])
    found = module._sizes(evaluation.loaded, evaluation.plan, evaluation.places, evaluation.texts.calibration)
    evaluation.calibrate()
    there = describe_layers(evaluation.path)
    assert [(size.shape, size.rows, size.input_of) for size in found] == [
        ((layer.out_features, layer.in_features), layer.tokens, layer.input_of) for layer in there
    ]
    assert {layer.input_of is None for layer in there} == {True, False}


def test_a_run_s_memory_is_what_it_would_be_refused_for(tmp_path):
    evaluation = Evaluation("llama", tmp_path)
    sizes = module._sizes(evaluation.loaded, evaluation.plan, evaluation.places, evaluation.texts.calibration)
    evaluation.calibrate()
    for recipe in evaluation.recipes[:2]:
        config = replace(recipe.config, inputs=replace(recipe.config.inputs, path=str(evaluation.path)))
        spec = validate(config).spec
        with use_threads(1):
            assert module._bytes_of(recipe, sizes, 24) == required_bytes(spec, None)[1]


def test_times_are_those_of_what_is_still_to_be_done(tmp_path, monkeypatch):
    evaluation = Evaluation("llama", tmp_path)
    monkeypatch.setattr(module, "_of_window", lambda *_: (1.0, 3.0))
    first = evaluation.estimate()
    assert first.seconds["original"] == pytest.approx(31 / 12 * 4)
    assert first.seconds["recipes"] == pytest.approx(31 / 12 * 3 * 3)
    assert first.seconds["layers alone"] == 0
    assert first.seconds["calibration"] > 24 / 12 * 1 * 2
    assert first.seconds["runs"] > 0
    calibration = evaluation.calibrate()
    made(evaluation.recipes[0], calibration, evaluation.folder)
    one = evaluation.estimate(alone=True)
    assert one.seconds["calibration"] == 0
    assert one.seconds["runs"] > 0
    assert one.seconds["layers alone"] == pytest.approx(31 / 12 * 14 * 2.5)
    made(evaluation.recipes[2], calibration, evaluation.folder)
    nothing = evaluation.estimate()
    assert nothing.seconds["runs"] == 0
    assert nothing.bytes < first.bytes
    assert evaluation.calibrate().reused


def test_an_estimate_is_told_in_one_line():
    told = Estimate({"original": 20.0, "calibration": 0.0, "runs": 80.4, "recipes": 230.0}, 3 << 29)
    assert told.line == "about 6 min (original 20 s, runs 80 s, recipes 4 min) and 1.5 GiB more memory"
    assert Estimate({"original": 0.2, "runs": 0.4}, 1 << 27).line == "about 1 s and 0.1 GiB more memory"
