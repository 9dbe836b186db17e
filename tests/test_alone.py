"""Layers replaced alone: forwards that begin at a block give the digits of whole ones, whatever runs them."""

import math
import threading
import zlib

import numpy as np
import pytest
import torch
import transformers

from awq_pycuda.capturing.probing import make_plan
from awq_pycuda.capturing.text import Around
from awq_pycuda.evaluating.alone import costs, undone
from awq_pycuda.evaluating.divergence import Original
from awq_pycuda.evaluating.forward import Runner
from awq_pycuda.evaluating.judging import NotFinite
from awq_pycuda.evaluating.places import places_of, replaced
from awq_pycuda.evaluating.windows import Window

VOCABULARY = 40
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def llama():
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=16, n_inner=24)
    return transformers.GPT2LMHeadModel(config)


def with_skip():
    """A model whose last block takes what the first one gave, too, as in a U-net."""
    model = llama()
    first, last = model.model.layers[0], model.model.layers[2]
    of_thread = threading.local()
    first.register_forward_hook(lambda _module, _args, output: setattr(of_thread, "given", output))
    last.register_forward_pre_hook(lambda _module, args: (args[0] + of_thread.given, *args[1:]))
    return model


def with_one_block_twice():
    model = llama()
    model.model.layers[2] = model.model.layers[0]
    return model


def without_list():
    model = llama()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    return model


RNG = np.random.default_rng(1)
WINDOWS = [
    Window(RNG.integers(0, VOCABULARY, length).tolist(), 20 * i, 1, length) for i, length in enumerate((9, 12, 5))
]


def places(model):
    return places_of(model.base_model, make_plan(model.base_model, list(range(VOCABULARY)), Around([], []), 12))


def changed(name, place):
    """Other weights for a layer, drawn by its name."""
    weight = place.read()
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(weight.shape, dtype=np.float32)
    return weight + np.float32(0.1) * noise


def made(make, workers=2, on_done=lambda done, total: None, to_logits=True, compared=True):
    """The costs of a random model, those of whole forwards if compared, which come last, and what was said."""
    torch.manual_seed(0)
    model = make().eval()
    found = places(model)
    weights = {name: changed(name, place) for name, place in found.items()}
    into, whole = (undone(1, len(found), len(WINDOWS)) for _ in range(2))
    with Runner(model, model.base_model, workers) as runner:
        runner.try_on(WINDOWS[0])
        hidden = runner.keep(WINDOWS)
        try:
            said = costs(runner, found, WINDOWS, hidden, weights.get, into, on_done, to_logits)
        except KeyboardInterrupt:
            said = ["interrupted"]
        for index, window in enumerate(WINDOWS * compared):
            original = Original(runner.logits(window), window.targets)
            for layer, name in enumerate(found):
                with replaced({name: found[name]}, weights.get):
                    of_tokens = original.against(runner.logits(window))
                for figure in ("kl", "kl_reverse", "nll"):
                    values = getattr(of_tokens, figure)
                    getattr(whole, figure)[layer, index] = math.fsum(values) / len(values)
    return into, whole, said


@pytest.fixture(scope="module")
def of_llama():
    return made(llama)


def equal(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("kl", "kl_reverse", "nll"))


def test_forwards_that_begin_at_a_layers_block_give_the_digits_of_whole_ones(of_llama):
    for (into, whole, said), layers, path in ((of_llama, 21, "layers"), (made(gpt2), 12, "h")):
        assert said == [f"alone: forwards begin at the layer's own of the 3 blocks in {path}"]
        assert into.kl.shape == (layers, 3)
        assert (into.kl > 1e-9).all()
        assert equal(into, whole)


def test_the_error_of_the_stream_is_that_of_what_the_layers_block_gives(of_llama):
    torch.manual_seed(0)
    model = llama().eval()
    found = places(model)
    for layer, name in list(enumerate(found))[::4]:
        block = model.model.layers[int(name.split(".")[1])]
        weights = {name: changed(name, found[name])}
        for index, window in enumerate(WINDOWS):
            given = []
            hook = block.register_forward_hook(lambda _module, _args, output, given=given: given.append(output[0]))
            with torch.inference_mode():
                for each in (None, weights[name]):
                    with replaced({name: found[name]}, {name: each}.get):
                        model(input_ids=torch.tensor([window.ids]), use_cache=False)
            hook.remove()
            original, other = (one.numpy().astype(np.float64) for one in given)
            shares = ((other - original) ** 2).sum(axis=1) / (original**2).sum(axis=1)
            assert of_llama[0].stream[layer, index] == pytest.approx(shares.mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (with_skip, "since it takes more from the blocks before layers.2 than the last one gives"),
        (with_one_block_twice, "since it takes more from the blocks before layers.1 than the last one gives"),
        (without_list, "since it has no list of modules that run in order"),
    ],
)
def test_a_model_that_cannot_begin_at_a_block_runs_whole_and_says_why(make, why):
    into, whole, said = made(make)
    assert said == [f"alone: every forward is one of the whole model, {why}"]
    assert equal(into, whole)
    assert np.isnan(into.stream).all()


def test_forwards_that_end_behind_the_block_leave_the_streams_error_alone(of_llama):
    short, _, _ = made(llama, to_logits=False, compared=False)
    assert np.array_equal(short.stream, of_llama[0].stream)
    assert np.isnan([short.kl, short.kl_reverse, short.nll]).all()
    without, expected, _ = made(without_list, to_logits=False)
    assert equal(without, expected)  # no block, no stream: what is left are the logits


def test_a_layer_that_makes_logits_infinite_is_named():
    torch.manual_seed(0)
    model = llama().eval()
    found = places(model)
    name = "layers.1.mlp.down_proj"
    weights = {name: np.full_like(found[name].read(), np.inf)}
    into = undone(1, len(found), len(WINDOWS))
    with Runner(model, model.base_model, 1) as runner:
        runner.try_on(WINDOWS[0])
        hidden = runner.keep(WINDOWS)
        with pytest.raises(NotFinite, match=f"NaN or infinite logits with {name} alone replaced"):
            costs(runner, found, WINDOWS, hidden, weights.get, into, lambda done, total: None)


def test_workers_do_not_change_a_digit(of_llama):
    for workers in (1, 3):
        found, _, _ = made(llama, workers, compared=False)
        assert equal(found, of_llama[0])
        assert np.array_equal(found.stream, of_llama[0].stream)


def test_an_interruption_leaves_all_layers_of_the_first_windows_and_the_model_as_it_was():
    def stop(done, total):
        assert total == 63
        if done == 2 * 21 + 1:
            raise KeyboardInterrupt

    into, whole, said = made(llama, 2, stop)
    assert said == ["interrupted"]
    assert np.array_equal(into.kl[:, :2], whole.kl[:, :2])  # the model of `whole` is the one after the interruption
    assert np.isnan(into.kl[:, 2]).sum() == 20


def test_a_layer_that_stays_as_it_is_costs_nothing():
    torch.manual_seed(0)
    model = llama().eval()
    found = places(model)
    into = undone(1, len(found), len(WINDOWS))
    with Runner(model, model.base_model, 2) as runner:
        runner.try_on(WINDOWS[0])
        costs(runner, found, WINDOWS, runner.keep(WINDOWS), lambda name: None, into, lambda done, total: None)
    assert not into.kl.any()
    assert not into.kl_reverse.any()
