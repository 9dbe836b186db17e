"""Weights put in the place of a model's own: modules, transposed ones, slices of experts, shared parameters."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_capture_experts import SIZES
from tiny_models import bert_config

from awq_pycuda.capturing.experts import Interception, find_stacks
from awq_pycuda.capturing.probing import make_plan
from awq_pycuda.capturing.text import Around
from awq_pycuda.evaluating.places import Place, places_of, replaced

IDS = list(range(4, 50))
GPT2 = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=16, n_inner=40)
MIXTRAL = transformers.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)
GPT_OSS = transformers.GptOssConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, experts_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def found(model: Any) -> dict[str, Place]:
    return places_of(model, make_plan(model, IDS, Around([], []), 16))


def others(places: dict[str, Place]) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {path: random.standard_normal(place.shape).astype(np.float32) * 0.05 for path, place in places.items()}


def outputs(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS[:14]])).last_hidden_state


@pytest.mark.parametrize("config", [bert_config(), GPT2], ids=["linear", "transposed"])
def test_a_module_runs_with_the_weight_given_and_has_its_own_again(config):
    model = model_of(config)
    before = outputs(model)
    places = found(model)
    own = {path: place.parameter for path, place in places.items()}
    given = others(places)
    with replaced(places, given.get):
        there = outputs(model)
        for path, place in places.items():
            np.testing.assert_array_equal(place.read(), given[path])
    assert all(place.parameter is own[path] for path, place in places.items())
    assert torch.equal(outputs(model), before)
    by_hand = model_of(config)
    for path, weight in given.items():
        module = by_hand.get_submodule(path)
        tensor = torch.from_numpy(weight)
        module.weight.data = tensor if hasattr(module, "in_features") else tensor.T.contiguous()
    assert not torch.equal(there, before)
    torch.testing.assert_close(there, outputs(by_hand), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [MIXTRAL, GPT_OSS], ids=["rows", "columns"])
def test_an_expert_s_product_is_with_the_weight_given(config):
    model = model_of(config)
    places = found(model)
    names = [path for path in places if ".experts." in path]
    assert len(names) == 6
    given = {path: weight for path, weight in others(places).items() if path != names[0]}
    own = places[names[0]].read()
    seen = {}

    def see(expert: Any, weight: Any, _rows: Any) -> None:
        seen[expert.name] = weight.clone().numpy()

    parameters = {path: place.parameter for path, place in places.items()}
    with replaced(places, given.get), Interception(find_stacks(model), see):
        outputs(model)
    assert len(seen) >= 4
    for path, weight in seen.items():
        np.testing.assert_array_equal(weight, own if path == names[0] else given[path])
    assert all(place.parameter is parameters[path] for path, place in places.items())


def test_what_shares_a_parameter_with_a_layer_stays_as_it_is():
    model = model_of(bert_config())
    blocks = model.encoder.layer
    blocks[1].output.dense.weight = blocks[0].output.dense.weight
    blocks[0].attention.self.query.weight = torch.nn.Parameter(model.embeddings.position_embeddings.weight.detach())
    model.embeddings.position_embeddings.weight = blocks[0].attention.self.query.weight
    places = found(model)
    shared = "encoder.layer.0.output.dense", "encoder.layer.1.output.dense"
    given = {path: weight for path, weight in others(places).items() if "query" in path or path in shared}
    table = model.embeddings.position_embeddings.weight.clone()
    with replaced(places, given.get):
        for path in shared:
            np.testing.assert_array_equal(places[path].read(), given[path])
        assert torch.equal(model.embeddings.position_embeddings.weight, table)
    assert blocks[1].output.dense.weight is blocks[0].output.dense.weight
    assert model.embeddings.position_embeddings.weight is blocks[0].attention.self.query.weight


def test_a_model_has_its_weights_again_where_something_fails():
    model = model_of(GPT2)
    places = found(model)
    own = {path: place.parameter for path, place in places.items()}
    given = others(places)

    def weight(path: str) -> Any:
        if path == list(places)[3]:
            raise ValueError("no such weight")
        return given[path]

    with pytest.raises(ValueError, match="no such weight"), replaced(places, weight):
        raise AssertionError("is not reached")
    assert all(place.parameter is own[path] for path, place in places.items())
