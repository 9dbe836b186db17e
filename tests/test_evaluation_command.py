"""The evaluate command on tiny causal models: what it tells is what plain transformers tells, whatever the threads."""

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_causal import SIZES, llama_config, save_causal
from tiny_gguf import llama, llama_tensors, write_gguf
from tiny_models import WORDS, bert

from awq_pycuda import evaluate, library
from awq_pycuda.evaluating import recipes, session
from awq_pycuda.evaluating.estimate import Estimate
from awq_pycuda.layers.files import load_layers
from awq_pycuda.quant.format import Format
from awq_pycuda.results.evaluation_reader import read_evaluation
from awq_pycuda.results.evaluation_record import EvaluationRecord
from awq_pycuda.signals import Stopped

RECIPES = """\
rtn: [quant=int4_row, gamma_grid=rtn]
awq: [quant=int4_row]
mix: {layers: {mlp: awq, layers.0.self_attn.q_proj: rtn, ".*": original}}
"""
KEYS = ("calibration=40", "tokens=60", "window=16", "backend=cpu", "device=cpu")


@pytest.fixture(scope="module", autouse=True)
def recipes_parsed_once() -> Iterator[None]:
    """Hydra takes longer to compose a recipe than all else here takes, and the same file is given again and again."""
    parse = lru_cache(recipes.parse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "parse", lambda given, calibration, shared: parse(given, calibration, tuple(shared)))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, recipes and a model of tied heads."""
    folder = tmp_path_factory.mktemp("evaluate")
    transformers.utils.logging.disable_progress_bar()
    save_causal(folder / "model", llama_config(tie_word_embeddings=True))
    (folder / "text.txt").write_text(" ".join(WORDS[index * index % 50] for index in range(140)))
    (folder / "recipes.yaml").write_text(RECIPES)
    (folder / "one.yaml").write_text("rtn: [quant=int4_row, gamma_grid=rtn]\n")
    return folder


def run(place: Path, out: Path, *more: str, model: Path | None = None) -> int:
    given = (f"model={model or place / 'model'}", f"text={place / 'text.txt'}", f"out={out}")
    keys = {key.partition("=")[0] for key in more}
    recipes = () if "recipes" in keys else (f"recipes={place / 'recipes.yaml'}",)
    return evaluate.main([*given, *recipes, *(key for key in KEYS if key.partition("=")[0] not in keys), *more])


@pytest.fixture(scope="module")
def done(place: Path) -> EvaluationRecord:
    """With one thread, and each layer alone."""
    assert run(place, place / "out", "threads=1", "alone=awq") == 0
    return read_evaluation(place / "out" / "evaluation.h5")


def test_the_original_is_itself(done: EvaluationRecord) -> None:
    original = done.recipes[0]
    assert original.name == "original"
    assert not original.of_tokens.kl.any()
    assert not original.of_tokens.kl_reverse.any()
    assert original.of_tokens.top1.all()
    assert np.array_equal(original.of_tokens.nll, done.tokens.nll)
    assert (original.kl.value, original.kl.low, original.kl.high) == (0, 0, 0)
    assert original.bits == 32


def test_the_file_says_what_it_is_of(done: EvaluationRecord, place: Path) -> None:
    root = done.root
    assert root["status"] == "complete"
    assert (root["calibration_tokens"], root["evaluation_tokens"], root["predicted_tokens"]) == (40, 60, 56)
    assert (root["model"], root["model_type"], root["vocabulary"], root["window"]) == ("model", "llama", 54, 16)
    assert root["calibration_sha256"] != root["evaluation_sha256"]
    assert any(line.startswith("calibration: 40 tokens") for line in json.loads(str(root["said"])))
    assert done.windows.first_token.tolist() == [40, 56, 72, 88]
    assert [recipe.name for recipe in done.recipes] == ["original", "rtn", "awq", "mix"]
    assert done.recipes[1].results == "recipes/rtn/results.h5"
    assert json.loads(done.recipes[1].overrides) == ["quant=int4_row", "gamma_grid=rtn"]
    mixture = json.loads(done.recipes[3].mixture)
    assert mixture["layers.1.mlp.up_proj"] == "awq"
    assert mixture["layers.1.self_attn.q_proj"] == "original"
    bits = dict(zip(done.layers.name, done.recipes[3].of_layers.bits, strict=True))
    assert bits["layers.1.self_attn.q_proj"] == 32
    assert bits["layers.0.self_attn.q_proj"] == 4 + 32 / 32
    assert sum(done.layers.in_features * done.layers.out_features) == root["linear_parameters"]


def by_hand(original: Any, quantized: Any, windows: list[list[int]]) -> tuple[list[float], list[float]]:
    """KL(P||Q) and -log Q(token) of each token but the first of each window, in float64."""
    kl, nll = [], []
    for ids in windows:
        with torch.no_grad():
            p, q = (model(input_ids=torch.tensor([ids])).logits[0, :-1].double() for model in (original, quantized))
        log_p, log_q = (each - each.exp().sum(1, keepdim=True).log() for each in (p, q))
        kl += (log_p.exp() * (log_p - log_q)).sum(1).tolist()
        nll += [-float(row[token]) for row, token in zip(log_q, ids[1:], strict=True)]
    return kl, nll


def ids_of(place: Path, start: int, stop: int) -> list[int]:
    return [4 + WORDS.index(word) for word in (place / "text.txt").read_text().split()[start:stop]]


def test_plain_transformers_with_our_weights_says_the_same(done: EvaluationRecord, place: Path) -> None:
    original, quantized = (transformers.AutoModelForCausalLM.from_pretrained(place / "model") for _ in range(2))
    form = Format(bits=4, group_size=None)
    for layer in load_layers(place / "out" / "calibration.h5"):
        found = library.quantize(layer.weight, layer.activations, format=form, backend="cpu").dequantize()
        module = quantized.get_submodule(f"model.{layer.name}")
        assert module.weight.shape == found.shape
        module.weight.data = torch.from_numpy(found)
    kl, nll = by_hand(original, quantized, [ids_of(place, start, min(start + 16, 100)) for start in range(40, 100, 16)])
    of_tokens = done.recipes[2].of_tokens
    assert np.mean(kl) > 0.01
    np.testing.assert_allclose(of_tokens.kl, kl, rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(of_tokens.nll, nll, rtol=1e-6)
    assert math.isclose(done.recipes[2].kl.value, np.mean(of_tokens.kl), rel_tol=1e-12)
    assert math.isclose(done.recipes[2].perplexity.value, math.exp(np.mean(of_tokens.nll)), rel_tol=1e-12)
    assert done.recipes[2].kl.low < done.recipes[2].kl.value < done.recipes[2].kl.high


def digits(record: EvaluationRecord) -> list[Any]:
    found = [values for recipe in record.recipes for values in vars(recipe.of_tokens).values()]
    return found + ([] if record.alone is None else list(vars(record.alone).values()))


def test_neither_threads_nor_order_change_a_digit(
    done: EvaluationRecord, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(place, tmp_path / "three", "threads=3", "alone=awq") == 0
    found = read_evaluation(tmp_path / "three" / "evaluation.h5")
    assert all(map(np.array_equal, digits(found), digits(done)))
    whole = session.cut

    def backwards(*arguments: Any) -> Any:
        made = whole(*arguments)
        made.evaluation.reverse()
        return made

    monkeypatch.setattr(session, "cut", backwards)
    shutil.copytree(place / "out", tmp_path / "again")
    assert run(place, tmp_path / "again", "threads=2") == 0
    found = read_evaluation(tmp_path / "again" / "evaluation.h5")
    assert found.windows.first_token.tolist() == [88, 72, 56, 40]
    for one, other in zip(found.recipes, done.recipes, strict=True):
        assert one.search_s == 0  # its run was there
        assert one.kl.value == other.kl.value
        for window in range(4):
            own, others = found.tokens.of_window == window, done.tokens.of_window == 3 - window
            assert np.array_equal(one.of_tokens.kl[own], other.of_tokens.kl[others])


def test_each_layer_alone(done: EvaluationRecord) -> None:
    assert done.alone is not None
    assert done.alone.recipe == 2
    assert done.alone.kl.shape == (len(done.layers.name), 4)
    assert (done.alone.kl > 0).all()
    assert done.alone.kl.mean(1).max() < done.recipes[2].kl.value * 2


def test_each_layer_alone_until_the_end_of_its_block(place: Path, done: EvaluationRecord, tmp_path: Path) -> None:
    assert run(place, tmp_path / "out", "alone=awq", "alone_until=block") == 0
    found = read_evaluation(tmp_path / "out" / "evaluation.h5").alone
    assert found is not None
    assert done.alone is not None
    assert np.array_equal(found.stream, done.alone.stream)
    assert np.isnan(found.kl).all()


@pytest.mark.parametrize("kind", ["mixtral", "gguf"])
def test_other_models(kind: str, place: Path, tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**SIZES, initializer_range=0.3, num_local_experts=4, num_experts_per_tok=2)
    if kind == "mixtral":
        model = save_causal(tmp_path / "model", config)
        half = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        half.save_pretrained(model)
    else:
        model = write_gguf(tmp_path / "tiny.gguf", llama_tensors(llama()))
    assert run(place, tmp_path / "out", f"recipes={place / 'one.yaml'}", model=model) == 0
    found = read_evaluation(tmp_path / "out" / "evaluation.h5")
    assert not found.recipes[0].of_tokens.kl.any()
    assert found.recipes[0].bits == (16 if kind == "mixtral" else 32)
    assert found.recipes[1].kl.value > 0
    experts = [name for name in found.layers.name if "experts.3" in name]
    assert len(experts) == (4 if kind == "mixtral" else 0)


@pytest.fixture
def refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line with which the command refuses these keys, with nothing written."""

    def call(*more: str, model: Path | None = None) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert run(place, tmp_path / "out", *more, model=model) == 2
        assert sorted(tmp_path.rglob("*")) == before
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told.removeprefix("error: ").rstrip()

    return call


def test_refuses_what_no_evaluation_can_be_made_of(
    refused: Callable[..., str], place: Path, tmp_path: Path, bert: Path
) -> None:
    text, one = place / "text.txt", f"recipes={place / 'one.yaml'}"
    assert refused(one, "tokens=101") == (
        f"text={text}: holds 140 tokens of this model, fewer than calibration, skip and tokens together; "
        "allowed: texts of at least 141"
    )
    assert refused(one, "tokens=16").startswith("tokens=16: make 1 window of up to 16 tokens")
    assert refused(one, "skip=41").startswith(f"text={text}: holds 140 tokens")
    assert refused("alone=none") == "alone=none: is none of the recipes; allowed: rtn, awq, mix"
    assert refused(one, "window=1").startswith("window=1: is too small")
    assert refused("recipes=unheard-of").startswith("recipes=unheard-of: no such file, folder or name")
    assert refused(one, model=bert).startswith(f"model={bert}: is no causal language model: its weights lack cls.")
    (tmp_path / "recipes.yaml").write_text("a: [quant=int4_row]\nb: {layers: {no_such_layer: a, '.*': a}}\n")
    line = refused(f"recipes={tmp_path / 'recipes.yaml'}")
    assert line.startswith("recipes: b: no_such_layer: fits no layer")


def test_refuses_a_gpu_that_is_not_there(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused("device=cuda")
    assert line.startswith("device=cuda: ")
    assert line.endswith("; allowed here: auto, cpu")


def test_what_does_not_fit_into_memory_is_refused(
    refused: Callable[..., str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "estimate", lambda *_: Estimate({}, 1 << 60))
    assert refused(f"recipes={place / 'one.yaml'}").startswith(
        f"model={place / 'model'}: needs 1,073,741,824.0 GiB of the host's memory; allowed: up to 80% of the"
    )


def test_refuses_a_folder_that_cannot_be_written(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for out, why in (
        ("file", "is no folder"),
        ("file/out", "Not a directory"),
        ("none/out", "No such file or directory"),
    ):
        assert run(place, tmp_path / out) == 2
        assert capsys.readouterr().err.startswith(f"error: out={tmp_path / out}: {why}; allowed: a folder")


def test_nan_in_the_originals_logits_is_refused_with_where_it_began(
    refused: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
    shutil.copytree(place / "model", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    assert refused(f"recipes={place / 'one.yaml'}", model=tmp_path / "model") == (
        f"model={tmp_path / 'model'}: has NaN or infinite logits, from model.layers.1.post_attention_layernorm on, "
        "in the window at token 40; allowed: models whose logits are finite"
    )


def test_nan_in_a_recipes_logits_ends_it_and_keeps_what_is_done(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = session.made

    def spoilt(recipe: Any, *more: Any) -> Any:
        model = made(recipe, *more)
        if recipe.name == "awq":
            model._weights["layers.1.mlp.up_proj"] = lambda: np.full((48, 32), np.nan, np.float32)
        return model

    monkeypatch.setattr(session, "made", spoilt)
    shutil.copytree(place / "out", tmp_path / "out")
    assert run(place, tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        "error: recipes: awq: has NaN or infinite logits, from model.layers.1.mlp.up_proj on, in the window at token "
        "40; allowed: recipes with finite logits\n"
    )
    found = read_evaluation(tmp_path / "out" / "evaluation.h5")
    assert [recipe.name for recipe in found.recipes] == ["original", "rtn"]
    assert found.root["status"] == "failed"


def test_a_signal_leaves_what_is_done(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = session.made

    def stopped(recipe: Any, *more: Any) -> Any:
        if recipe.name == "mix":
            raise Stopped(signal.SIGTERM)
        return made(recipe, *more)

    monkeypatch.setattr(session, "made", stopped)
    shutil.copytree(place / "out", tmp_path / "out")
    assert run(place, tmp_path / "out") == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "interrupted by SIGTERM\n"
    found = read_evaluation(tmp_path / "out" / "evaluation.h5")
    assert [recipe.name for recipe in found.recipes] == ["original", "rtn", "awq"]
    assert found.root["error"] == "interrupted by SIGTERM"
