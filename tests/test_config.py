"""The configs as they compose: every preset, the defaults, and the rules."""

import dataclasses
import hashlib
import json
import math
import sys
from enum import Enum

import pytest

from awq_pycuda.config import ALLOWED, check
from awq_pycuda.config_text import as_yaml, config_hash, from_yaml, plain
from awq_pycuda.errors import InputError
from awq_pycuda.quant.tools import inclusive
from awq_pycuda.sweeps.hydra_errors import groups

PRESETS = sorted(
    f"{group}={option}" for group, options in groups().items() for option in options if group != "experiment"
)


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
    assert compose("gamma_grid=day58").gammas == [0, 0.25, 0.5, 0.75, 1]
    assert compose("gamma_grid=inclusive20").gammas == list(inclusive(20)) == [i / 19 for i in range(20)]
    assert compose("gamma_grid=inclusive10").gammas == list(inclusive(10)) == [i / 9 for i in range(10)]


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
    others += [
        "save=full",
        "export=awq",
        "verify=true",
        "inputs=outliers",
        "quant=group128",
        "search=output",
        "matmul=blocked",
    ]
    others += ["timing.warmup=0", "timing.repeats=1", "search.normalization=sqrt_max_min", "search.formula=duo"]
    others += ["search.betas=[1]", "search.clamp=[0.5,2]", "search.floor=1", "search.least_power=1"]
    others += ["search.identity=false", "search.ties=first", "convention=llm_awq", "convention=torchao"]
    hashes = {config_hash(compose(*override)) for override in ([], *([other] for other in others))}
    assert len(hashes) == len(others) + 1


# The least and the most of each key, None where there is no most; both are allowed, what is next to them is not.
LIMITS = {
    "n": (1, 2**31 - 1),
    "tokens": (1, 2**31 - 1),
    "tile": (1, 32),
    "layers": (1, 1000),
    "seed": (0, 2**64 - 1),
    "threads": (1, 2**31 - 1),
    "quant.group_size": (1, 2**31 - 1),
    "timing.warmup": (0, 100_000),
    "timing.repeats": (0, 100_000),
    "gammas": (0.0, 10.0),
    "search.betas": (0.0, 10.0),
    "search.least_power": (sys.float_info.min, 1.0),
    "inputs.channels": (5e-324, 1.0),
    "inputs.factor_min": (5e-324, 100.0),
    "inputs.factor_max": (10.0, 1e6),
}


def with_value(config, key, value):
    """A copy of a config with another value at a dotted key; nothing is checked."""
    group, _, name = key.rpartition(".")
    if not group:
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})


@pytest.mark.parametrize("key", LIMITS)
def test_a_key_s_limits_are_allowed_and_what_is_beyond_them_is_refused(compose, key):
    base = compose("inputs=outliers")
    least, most = LIMITS[key]
    whole = isinstance(least, int)
    below, above = (least - 1, (most or 0) + 1) if whole else (math.nextafter(least, -1), math.nextafter(most, 1e9))

    def listed(value):
        return [1.0, value] if key in ("gammas", "search.betas") else value

    for value in (least, 10**30 if most is None else most):
        check(with_value(base, key, listed(value)))
    for value in (below, above) if most is not None else (below,):
        with pytest.raises(InputError) as refused:
            check(with_value(base, key, listed(value)))
        named = "inputs.factor_min" if (key, value) == ("inputs.factor_max", below) else key
        assert str(refused.value).startswith(f"{named}=")
        assert str(refused.value).endswith(f"allowed: {ALLOWED[named]}")
    assert whole is False or most is None or str(most) in ALLOWED[key]


@pytest.mark.parametrize("key", ["inputs.factor_min", "inputs.factor_max", "inputs.channels"])
def test_0_is_no_factor_and_no_share(compose, key):
    with pytest.raises(InputError, match=f"^{key}=0"):
        check(with_value(compose("inputs=outliers"), key, 0.0))


def test_what_needs_no_value_may_be_null(compose):
    for key in ("threads", "quant.group_size"):
        check(with_value(compose(), key, None))
    for key in ("tokens", "layers"):
        check(with_value(compose("inputs=file", "inputs.path=layers.h5"), key, None))
        with pytest.raises(InputError, match=f"^{key}=null: allowed: "):
            check(with_value(compose(), key, None))


@pytest.mark.parametrize("study", ["a", "a/b", "a.b-c_d/E9"])
def test_names_of_studies(compose, study):
    check(with_value(compose(), "study", study))


@pytest.mark.parametrize("study", ["", ".", "..", "a/..", "/a", "a/", "a//b", "a b", "ä", "-a", "a\n"])
def test_what_is_no_name_of_a_study(compose, study):
    with pytest.raises(InputError, match=r"^study="):
        check(with_value(compose(), "study", study))


def keys_of(node, prefix=""):
    """Every dotted key of a config with its value."""
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        yield from (
            keys_of(value, f"{prefix}{item.name}.")
            if dataclasses.is_dataclass(value)
            else [(prefix + item.name, value)]
        )


@pytest.mark.parametrize("inputs", [("inputs=outliers",), ("inputs=file", "inputs.path=layers.h5")], ids=str)
def test_the_hash_tells_every_value_of_every_key_apart(compose, inputs):
    base = compose(*inputs)
    hashes, count = {config_hash(base)}, 1
    for key, value in keys_of(base):
        if isinstance(value, Enum):
            others = [member for member in type(value) if member is not value]
        else:
            others = [[0.0, 1.0]] if isinstance(value, list) else [f"{value}x"]
        for other in others:
            changed = config_hash(with_value(base, key, other))
            assert (changed == config_hash(base)) == (key == "study"), key
            hashes.add(changed)
            count += key != "study"
    assert len(hashes) == count


def test_the_hash_is_of_the_config_as_the_user_writes_it(compose):
    """Enums by their names and nothing of how Python holds them: a study outlives the version that began it."""
    written = {
        "n": 8,
        "tokens": 8,
        "tile": 16,
        "layers": 3,
        "gammas": [0.0, 0.5],
        "seed": 0,
        "backend": "cpu",
        "convention": "day58",
        "stats": "atomic",
        "threads": None,
        "baselines": "all",
        "save": "full",
        "export": "none",
        "verify": True,
        "inputs": {"kind": "synthetic", "holdout": 0.0, "weight_scale": "he"},
        "quant": {
            "group_size": 4,
            "bits": 8,
            "element": "int",
            **dict.fromkeys(("symmetric", "divisor", "zero_point", "include_zero", "zero_order", "step_dtype")),
            **dict.fromkeys(("least_range", "least_step", "zero_step")),
        },
        "search": {
            "objective": "output",
            "statistic": "abs_mean",
            "formula": "plain",
            "normalization": "sqrt_max_min",
            **dict.fromkeys(("betas", "clamp", "floor", "least_power", "identity", "ties")),
            "where": "auto",
        },
        "clip": {
            "enabled": False,
            "grid": 20,
            "least": 0.5,
            "tokens": 512,
            "skip": ["q_", "k_", "query", "key", "Wqkv"],
            "joint": False,
        },
        "share": "layers",
        "matmul": {"kernel": "blocked"},
        "timing": {"warmup": 1, "repeats": 3},
    }
    config = compose(
        "n=8",
        "gammas=[0,0.5]",
        "backend=cpu",
        "stats=atomic",
        "save=full",
        "verify=true",
        "inputs.weight_scale=he",
        "quant.group_size=4",
        "search.objective=output",
        "search.normalization=sqrt_max_min",
        "matmul=blocked",
    )
    assert config_hash(config) == hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("inputs", ["synthetic", "outliers", "file"])
def test_a_stored_config_is_read_back(compose, inputs):
    more = ["inputs.path=a.h5", "inputs.first_token=5"] if inputs == "file" else ["inputs.weight_scale=he"]
    config = compose(f"inputs={inputs}", "quant=nvfp4", "clip=joint", "search.formula=duo", "gammas=[0,0.5]", *more)
    assert from_yaml(as_yaml(config)) == config
    assert config_hash(from_yaml(as_yaml(config))) == config_hash(config)


def test_a_stored_config_of_before_has_the_defaults_of_what_it_lacks():
    found = from_yaml("n: 8\ntokens: 8\ninputs: {kind: outliers, channels: 0.5}\nquant: {bits: 4}\n")
    assert (found.n, found.inputs.channels, found.inputs.factor_max, found.quant.bits) == (8, 0.5, 100, 4)
    assert (found.layers, found.quant.group_size, found.clip.enabled) == (3, None, None)


@pytest.mark.parametrize(
    ("text", "line"),
    {
        "n: [": "config: is no mapping of keys; allowed: what a run has stored",
        "- n": "config: is no mapping of keys; allowed: what a run has stored",
        "later: 1": "later=1: no such key; allowed: those of this version",
        "quant: {later: 1}": "quant.later=1: no such key; allowed: those of this version",
        "quant: 4": "quant=4: is no group of keys; allowed: what a run has stored",
        "n: 0": f"n=0: allowed: {ALLOWED['n']}",
        "backend: tpu": f"backend=tpu: allowed: {ALLOWED['backend']}",
    }.items(),
)
def test_a_stored_config_that_is_none_is_refused(text, line):
    with pytest.raises(InputError) as refused:
        from_yaml(text)
    assert str(refused.value) == line
