"""Windows through tiny causal models: neither threads nor order change a digit, and the head is the model's own."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny_causal import SIZES, VOCABULARY, llama_config, save_causal

from awq_pycuda.capturing.fault import Fault
from awq_pycuda.capturing.loading import load
from awq_pycuda.evaluating.divergence import Original
from awq_pycuda.evaluating.forward import Runner
from awq_pycuda.evaluating.origin import find_origin
from awq_pycuda.evaluating.windows import Window

MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": lambda: llama_config(tie_word_embeddings=False),
    "tied": lambda: llama_config(tie_word_embeddings=True),
    "softcap": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=16, final_logit_softcapping=0.5, query_pre_attn_scalar=16
    ),
    "scaled": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=7.0),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, **MIXTURE),
    "opt": lambda: transformers.OPTConfig(  # whose head takes what a part of its base model gives
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=16),
}


def windows(count: int = 5, length: int = 12) -> list[Window]:
    generator = torch.Generator().manual_seed(5)
    lengths = [length] * (count - 1) + [7]
    drawn = [torch.randint(4, VOCABULARY, (each,), generator=generator).tolist() for each in lengths]
    return [Window(ids, index * length, 1, len(ids)) for index, ids in enumerate(drawn)]


def logits_by(causal: Any, window: Window) -> Any:
    """By plain transformers."""
    with torch.no_grad():
        return causal(input_ids=torch.tensor([window.ids])).logits[0, window.start - 1 : window.stop - 1]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loaded models by the name of their config."""
    made: dict[str, Any] = {}

    def find(kind: str) -> Any:
        if kind not in made:
            made[kind] = load(save_causal(tmp_path_factory.mktemp(kind) / "model", CONFIGS[kind]()), causal=True)
        return made[kind]

    return find


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_made_again_of_hidden_states_bit_for_bit(kind: str, loaded: Any) -> None:
    model = loaded(kind)
    with Runner(model.causal, model.model, workers=2) as runner:
        runner.try_on(windows()[0])
        hidden = runner.keep(windows())
        assert runner.said == []
        for window, kept in zip(windows(), hidden, strict=True):
            again, own = runner.logits_of(window, kept), runner.logits(window)
            assert torch.equal(again, own)
            assert own.shape == (len(window.ids) - 1, VOCABULARY)
            assert (own - logits_by(model.causal, window)).abs().max() <= 1e-6 * own.abs().max()
    assert not any("forward" in vars(module) for module in model.causal.modules())


def test_neither_threads_nor_order_change_a_digit(loaded: Any) -> None:
    model = loaded("mixtral")
    found = []
    for workers in (1, 2, 3):
        with Runner(model.causal, model.model, workers) as runner:
            found.append(runner.each(runner.logits, windows()))
            found.append(runner.each(runner.logits, windows()[::-1])[::-1])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_threads_are_given_back(loaded: Any) -> None:
    model, before = loaded("llama"), torch.get_num_threads()
    with Runner(model.causal, model.model, workers=2) as runner:
        assert runner.each(lambda _: torch.get_num_threads(), range(4)) == [1, 1, 1, 1]
    assert torch.get_num_threads() == before


def own_llama(tmp_path: Path) -> Any:
    """One that a test may change."""
    return load(save_causal(tmp_path / "model", CONFIGS["llama"]()), causal=True)


def test_a_head_that_takes_more_than_hidden_states_has_its_logits_kept(tmp_path: Path) -> None:
    model = own_llama(tmp_path)
    seen: list[Any] = []

    def add(_module: Any, _args: Any, output: Any) -> None:
        output.logits = output.logits + seen.pop()

    model.model.embed_tokens.register_forward_hook(lambda _module, _args, output: seen.append(output[0, 0].sum()))
    model.causal.register_forward_pre_hook(lambda *_: seen.clear())
    model.causal.register_forward_hook(add)
    with Runner(model.causal, model.model, workers=1) as runner:
        runner.try_on(windows()[0])
        hidden = runner.keep(windows())
        assert runner.said == [
            "the original's logits are kept: its head makes them of more than the last hidden states"
        ]
        for window, kept in zip(windows(), hidden, strict=True):
            assert torch.equal(runner.logits_of(window, kept), runner.logits(window))


def test_a_model_that_draws_at_random_runs_one_window_after_the_other(tmp_path: Path) -> None:
    model = own_llama(tmp_path)
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, torch.nn.Dropout(0.5))
    found = []
    for workers in (3, 1):
        with Runner(model.causal, model.model, workers) as runner:
            runner.try_on(windows()[0])
            assert runner.workers == 1
            assert runner.said == ["windows run one after the other: the model draws at random"]
            found.append(runner.each(runner.logits, windows()))
    assert all(map(torch.equal, *found))
    assert torch.equal(runner.logits_of(windows()[0], runner.hidden(windows()[0])), found[0][0])


def test_a_model_that_changes_its_buffers_runs_one_window_after_the_other(tmp_path: Path) -> None:
    model = own_llama(tmp_path)
    model.model.register_buffer("runs", torch.zeros(()))
    model.model.register_forward_pre_hook(lambda module, _args: module.runs.add_(1) and None)
    with Runner(model.causal, model.model, 3) as runner:
        runner.try_on(windows()[0])
        assert runner.workers == 1
        assert runner.said == ["windows run one after the other: the model changes its buffers as it runs"]


def test_a_model_that_sees_what_follows_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = load(save_causal(tmp_path / "bert", config), causal=True)
    with Runner(model.causal, model.model, 1) as runner, pytest.raises(Fault) as fault:
        runner.try_on(windows()[0])
    assert fault.value.what == "is no causal language model: it predicts tokens from those behind them"


def test_a_base_model_that_runs_in_parts_is_refused(tmp_path: Path) -> None:
    model = own_llama(tmp_path)
    embed, (first, second) = model.model.embed_tokens, model.model.layers
    model.causal.forward = lambda input_ids: SimpleNamespace(logits=second.mlp(first.mlp(embed(input_ids))))
    with Runner(model.causal, model.model, 1) as runner, pytest.raises(Fault) as fault:
        runner.try_on(windows()[0])
    assert fault.value.what == "runs its base model in parts"


def test_a_forward_that_fails_is_told(loaded: Any) -> None:
    model = loaded("gpt2")
    with Runner(model.causal, model.model, 2) as runner, pytest.raises(Fault, match="fails on a window of 17 tokens"):
        runner.keep([Window([5] * 17, 0, 1, 17)] * 3)


@pytest.mark.parametrize(
    ("spoilt", "origin"),
    [
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("model.layers.0.input_layernorm", "model.layers.0.input_layernorm"),
        ("lm_head", "lm_head"),
    ],
)
def test_where_numbers_stop_being_finite(spoilt: str, origin: str, tmp_path: Path) -> None:
    model = own_llama(tmp_path)
    model.causal.get_submodule(spoilt).weight.data.view(-1)[3] = float("nan")
    with Runner(model.causal, model.model, 1) as runner:
        assert find_origin(runner, windows()[0]) == origin


def test_where_a_module_itself_makes_them(tmp_path: Path) -> None:
    model = own_llama(tmp_path)
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda hidden_states, **more: forward(hidden_states=hidden_states / 0, **more)
    with Runner(model.causal, model.model, 1) as runner:
        assert find_origin(runner, windows()[0]) == "model.layers.1.self_attn"


def distribution(logits: Any) -> list[float]:
    numbers = [math.exp(value) for value in logits.tolist()]
    total = math.fsum(numbers)
    return [number / total for number in numbers]


@pytest.mark.parametrize("change", [1e-3, 0.1, 10.0])
def test_divergence_by_hand(change: float) -> None:
    """By the definitions, term by term."""
    generator = torch.Generator().manual_seed(9)
    logits = 8 * torch.randn(6, 500, generator=generator)
    others = logits + change * torch.randn(6, 500, generator=generator)
    ids = torch.randint(0, 500, (6,), generator=generator)
    found = Original(logits, ids).against(others)
    for row in range(6):
        p, q = distribution(logits[row]), distribution(others[row])
        kl = math.fsum(one * math.log(one / other) for one, other in zip(p, q, strict=True))
        reverse = math.fsum(other * math.log(other / one) for one, other in zip(p, q, strict=True))
        assert abs(found.kl[row] - kl) < 1e-9 * max(1, kl)
        assert abs(found.kl_reverse[row] - reverse) < 1e-9 * max(1, reverse)
        assert abs(found.nll[row] + math.log(q[ids[row]])) < 1e-9
        assert found.top1[row] == (p.index(max(p)) == q.index(max(q)))
    assert found.kl.dtype == "f8"


def test_a_distribution_against_itself_differs_by_nothing() -> None:
    logits = 30 * torch.randn(300, 2000, generator=torch.Generator().manual_seed(1))  # several blocks of rows
    found = Original(logits, torch.arange(300)).against(logits.clone())
    assert not found.kl.any()
    assert not found.kl_reverse.any()
    assert found.top1.all()
