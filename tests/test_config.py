"""The configs as they compose: every preset, the defaults, and the rules."""

import pytest

from awq_pycuda.config import ALLOWED, config_hash, plain
from awq_pycuda.paths import resource_dir

CONF = resource_dir("conf")
PRESETS = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))


def flat(node, prefix=""):
    """Leaf keys of nested dicts, dotted."""
    for key, value in node.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_and_obeys_the_rules(compose, preset):
    extra = ["inputs.path=layers.h5"] if preset == "inputs=file" else []
    config = compose(preset, *extra)
    assert set(flat(plain(config))) <= set(ALLOWED)


def test_defaults_are_the_contract_s(compose):
    config = compose()
    assert (config.n, config.tokens, config.tile, config.layers, config.seed) == (1024, 1024, 16, 3, 0)
    assert config.gammas == [0, 0.25, 0.5, 0.75, 1]
    assert config.backend.name == "auto"


def test_grids_are_what_they_say(compose):
    assert compose("gamma_grid=awq20").gammas == [i / 20 for i in range(20)]
    assert compose("gamma_grid=fine").gammas == [i / 100 for i in range(101)]
    assert compose("gamma_grid=rtn").gammas == [0]


def test_a_literal_list_beats_the_group(compose):
    assert compose("gammas=[0,0.5,1]", "gamma_grid=awq20").gammas == [0, 0.5, 1]


def test_tokens_follow_n_unless_given(compose):
    assert compose("n=8").tokens == 8
    assert compose("n=8", "tokens=3").tokens == 3


def test_a_file_s_layers_and_tokens_are_all_unless_given(compose):
    source = ("inputs=file", "inputs.path=layers.h5")
    assert (compose(*source).layers, compose(*source).tokens) == (None, None)
    assert (compose(*source, "layers=2", "tokens=7").layers, compose(*source, "layers=2", "tokens=7").tokens) == (2, 7)


def test_every_key_has_its_rule_and_every_rule_its_key(compose):
    keys = {key for inputs in ("synthetic", "outliers") for key in flat(plain(compose(f"inputs={inputs}")))}
    keys |= set(flat(plain(compose("inputs=file", "inputs.path=layers.h5"))))
    assert keys == set(ALLOWED)


def test_the_hash_tells_every_key_apart(compose):
    others = [
        "n=8",
        "tokens=5",
        "tile=8",
        "layers=1",
        "gammas=[0]",
        "seed=1",
        "backend=cpu",
        "stats=atomic",
        "threads=1",
    ]
    others += ["save=full", "verify=true", "inputs=outliers", "quant=group128", "search=output", "matmul=blocked"]
    others += ["timing.warmup=0", "timing.repeats=1", "search.normalization=sqrt_max_min"]
    hashes = {config_hash(compose(*override)) for override in ([], *([other] for other in others))}
    assert len(hashes) == len(others) + 1
