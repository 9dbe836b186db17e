"""Command lines as people and scripts write them: a wrong one is one line with the cure, and nothing is written."""

import random

import pytest
from conftest import files_under

from awq_pycuda.config import ALLOWED
from awq_pycuda.engine import execution
from awq_pycuda.sweeps import isolation
from awq_pycuda.sweeps.hydra_errors import groups
from awq_pycuda.sweeps.messages import Checked, Outcome
from awq_pycuda.sweeps.overrides import check_overrides

REFUSED = {
    # Hydra casts, or crashes.
    "gamma_grid=[0,0.5,1]": "no such option; allowed: awq20, day58, default, fine, inclusive10, inclusive20, rtn",
    "timing=[true]": "no such option; allowed: default, none, once, precise",
    "quant=[1]": "no such option; allowed: group128, int3_g128, int4_g128, int4_row, mxfp4, nvfp4, per_row",
    "quant=[per_row,group128]": "no such option",
    "inputs={kind:file}": "no such option",
    "verify=2": "allowed: true, false",
    "verify=yes": "allowed: true, false",
    "n=1_6": "allowed: a whole number from 1 to 2147483647",
    "gammas=[0,1_0]": "allowed: a list",
    "inputs.channels=0.0_1": "allowed: a share",
    "n='16'": "allowed: a whole number",
    "seed=0x10": "allowed: a whole number",
    "tile=int(3.7)": "int(...) is not taken; allowed: the value itself",
    "gammas=[float(1)]": "float(...) is not taken",
    "tile=true": "allowed: a whole number",
    "gammas=[true]": "allowed: a list",
    "gammas=${tokens}": "allowed: a list",
    "n=${gammas}": "allowed: a whole number",
    # What is referred to is held to the same.
    "verify=${n}": "verify=${n}: stands for 1024; allowed: true, false",
    "verify=${oc.env:NOPE,yes}": "stands for yes; allowed: true, false",
    "gammas=[${n},${oc.env:NOPE,0_5}]": "gammas=[${n},${oc.env:NOPE,0_5}]: stands for [1024,0_5]; allowed: a list",
    "timing.repeats=${oc.env:NOPE,[}": "allowed: a whole number",
    f"n={'1' * 400}": "allowed: a whole number",
    "study=1_6": "is read as 16; allowed: quotes",
    "backend=1": "allowed: auto, cuda, cpu",
    "~n": "cannot be taken away",
    "+n=8": "is there already; allowed: n=8",
    "quant@x=per_row": "has a package",
    "=8": "has no key",
    "hydra=1": "allowed: what --cfg hydra shows",
    "hydra/launcher=[1]": "allowed: what --cfg hydra shows",
    "hydra.verbose=5.": "allowed: what --cfg hydra shows",
    f"gammas={'[' * 200}{']' * 200}": "allowed: a list",
    f"gammas={'[' * 2000}{']' * 2000}": "nested too deep",
    f"gammas=[{'9' * 400}]": "allowed: a list",
    "experiment=${oc.env:NOPE,null}": "no such option; allowed: depth",
    "timing=${gpu_processes:}": "no such option; allowed: default, none, once, precise",
    "~gammas.0": "a part of gammas; allowed: gammas=..., a list",
    "gammas.0=1_0": "a part of gammas; allowed: gammas=..., a list",
    "n.x=1": "a part of n; allowed: n=..., a whole number",
    "--experiment=depth": "--experiment=depth: no such option; allowed: what --hydra-help shows",
    "hydra.run.dir=": "names no folder",
    "hydra.run.dir=' '": "names no folder",
    # The cure is named.
    "N=512": "no such key; allowed: n",
    "Tiles=8": "no such key; allowed: tile",
    "warmup=1": "no such key; allowed: timing.warmup",
    "Inputs=file": "no such key; allowed: inputs",
    "timing.seed=1": "no such key; allowed: seed",
    "hydra.rum.dir=x": "no such key; allowed: what --cfg hydra shows",
    "inputs.path=x": "not a key of the chosen options; allowed: with inputs=file",
    "inputs.channels=0.1": "not a key of the chosen options; allowed: with inputs=outliers",
    "inputs=file": "inputs.path: has no value; allowed: inputs.path=..., a layer file",
}


@pytest.mark.parametrize(("override", "told"), REFUSED.items(), ids=lambda text: text[:40])
def test_a_wrong_override_is_one_line_that_names_the_cure(cli, tmp_path, override, told):
    code, out, err = cli(override)
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert told in line
    assert "allowed" in line
    assert "???" not in line
    assert files_under(tmp_path / "work") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("quant=per_row", "quant=group128"),
        ("inputs=outliers", "inputs=outliers"),
        ("-m", "timing=once,default", "timing=precise"),
        ("-m", "experiment=depth", "experiment=minilm"),
    ],
)
def test_two_options_of_one_group_are_refused(cli, arguments):
    code, _, err = cli(*arguments)
    assert code == 2
    assert f"{arguments[-1]}: a second option of its group, beside {arguments[-2]}" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("tile=4", "tile=8"),
        ("n=8", "++n=16"),
        ("-m", "n=1,2", "n=3"),
        ("-m", "n=3", "n=1,2"),
        ("hydra.run.dir=a", "hydra.run.dir=b"),
    ],
)
def test_two_values_of_one_key_are_refused(cli, tmp_path, arguments):
    code, _, err = cli(*arguments)
    assert code == 2
    assert f"{arguments[-1]}: a second value of its key, beside {arguments[-2]}; allowed: one of them" in err
    assert files_under(tmp_path / "work") == []


def test_a_name_may_have_a_digit_before_its_underscore():
    check_overrides(["quant.step_dtype=e8m0_up"])


@pytest.mark.parametrize(
    ("key", "text"), [("n", "1_6"), ("n", "'16'"), ("verify", "1"), ("threads", ""), ("tile", "[")]
)
def test_a_value_of_the_environment_is_held_to_what_may_be_given(cli, monkeypatch, key, text):
    monkeypatch.setenv("GIVEN", text)
    code, out, err = cli(f"{key}=${{oc.env:GIVEN}}")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {key}=${{oc.env:GIVEN}}: ")
    assert f"allowed: {ALLOWED[key]}" in line


def test_a_study_s_own_values_give_way(cli, monkeypatch):
    seen = []

    def refuse(batches):
        for configs in batches:
            seen.extend(configs)
            yield configs, [Checked("stop")]

    monkeypatch.setattr(isolation, "checked", refuse)
    assert cli("-m", "experiment=depth", "layers=2")[0] == 2
    assert {config.layers for config in seen} == {2}


@pytest.mark.parametrize(
    "sweep",
    [
        ("seed=range(0,3)", "gammas=${tokens}"),
        ("gammas=[0],[true]"),
        ("n=8,1_6"),
        ("n=range(8,1_6)"),
        ("seed=range(0,1,0.5)"),
        ("tile=interval(1,8)"),
        ("tile=glob(*)"),
        ("seed=range(0,1e12)",),
        ("seed=range(0,1000000000000)",),
        ("seed=range(0,100000)", "tile=range(1,33)", "n=range(1,1000)"),
        ("hydra.sweeper.params.n='1_6,8'",),
        ("hydra.sweep.dir=",),
        ("verify=${n},true",),
        ("seed=1,2", "verify=${seed}"),
        ("hydra.launcher=x",),
        ("hydra/sweeper=[]",),
        ("inputs=outliers", f"inputs.factor_min={'9' * 400}"),
    ],
)
def test_a_wrong_sweep_is_one_line(cli, tmp_path, sweep):
    code, out, err = cli("-m", *([sweep] if isinstance(sweep, str) else sweep))
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert "allowed" in line
    assert files_under(tmp_path / "work") == []


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (("++n=8",), "n", 8),
        (("n=8", "++n=8"), "n", 8),
        (("n=${oc.env:NOPE,16}",), "n", 16),
        (("verify=${oc.env:NOPE,true}",), "verify", True),
        (("backend=${oc.env:NOPE,cpu}",), "backend", "cpu"),
        (("gammas=[${oc.env:NOPE,0},${seed}]", "seed=1"), "gammas", [0, 1]),
        (("tokens=${layers}",), "tokens", 3),
        (("gammas=[1,${tile}]", "tile=2"), "gammas", [1, 2]),
        (("threads=null",), "threads", None),
        (("seed=18446744073709551615",), "seed", 2**64 - 1),
        (("backend='cpu'",), "backend", "cpu"),
        (("gamma_grid=${oc.env:NOPE,rtn}",), "gammas", [0]),
    ],
)
def test_what_is_meant_is_taken(cli, monkeypatch, overrides, key, value):
    seen = []
    monkeypatch.setattr(execution, "execute", lambda config, *_: seen.append(config))
    monkeypatch.setattr(execution, "validate", lambda config: None)
    code, _, err = cli(*overrides)
    assert code == 0, err
    (config,) = seen
    assert getattr(getattr(config, key), "name", getattr(config, key)) == value


WORDS = """0 1 -1 16 1.5 1e3 1e400 -0.0 nan inf true null abc 1_6 0x10 007 '1' "16" [] [1] [0,0.5] [true] [null] [[1]]
{} {a:1} {a:[1]} ${n} ${nope} ${gammas} ${hydra.job.num} ${oc.env:NOPE} ${n ${quant} ${inputs.path} int(3.7) json_str(1)
choice(1,2) choice(a,b) choice() range(3) range(3,0) range(0,3,0) range(0,1,0.25) range(0,inf) interval(0,1) glob(*)
glob(a*) sort(3,1) shuffle(1,2) tag(t,1) 1,2 a,b [0],[1] true,false , 1, é ü ' " \\ a\\,b ??? per_row file outliers cpu
cuda once depth ~ $ % a=b = == a:b @ ! * ( ) () .. ../x /proc/x a/b .a Cpu None yes 1e-3 .5 5. +1 --1 ١٢"""
ATOMS = [
    *WORDS.split(),
    "",
    " ",
    "a b",
    "\n",
    "a\nb",
    "\t",
    "\x1b[31m",
    "\x00",
    "\udcff",
    "x" * 3000,
    "9" * 5000,
    "[" * 300,
]
KEYS = [*ALLOWED, *groups(), "hydra.run.dir", "hydra.sweep.dir", "hydra.job.chdir", "hydra.launcher", "hydra/launcher"]
KEYS += [
    "hydra",
    "hydra.verbose",
    "hydra.sweeper.params",
    "hydra.mode",
    "N",
    "foo",
    "timing.foo",
    "",
    "gammas[0]",
    "n.x",
]


def random_value(draw):
    kind = draw.random()
    if kind < 0.75:
        return draw.choice(ATOMS)
    if kind < 0.9:
        joined = ",".join(draw.choices(ATOMS, k=draw.randint(1, 3)))
        return draw.choice(["{}", "[{}]"]).replace("{}", joined)
    return "".join(chr(draw.randint(1, 0x2FF)) for _ in range(draw.randint(1, 12)))


def random_override(draw):
    prefix = draw.choices(["", "+", "++", "~"], [12, 1, 1, 1])[0]
    package = draw.choices(["", "@x", "@_global_"], [20, 1, 1])[0]
    return prefix + draw.choice(KEYS) + package + draw.choices(["=", ""], [12, 1])[0] + random_value(draw)


def complete(jobs, on_started, on_ended):
    for number, _ in enumerate(jobs):
        on_ended(number, Outcome("complete"))


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_given_is_taken_or_refused_in_one_line(cli, monkeypatch, seed):
    monkeypatch.setattr(execution, "execute", lambda *_: None)
    monkeypatch.setattr(execution, "validate", lambda config: None)
    monkeypatch.setattr(isolation, "run_all", complete)
    monkeypatch.setattr(isolation, "checked", lambda batches: ((each, [Checked(None)] * len(each)) for each in batches))
    draw = random.Random(seed)
    for _ in range(12):
        arguments = [random_override(draw) for _ in range(draw.choice([1, 1, 2]))]
        mode = draw.choice([[], ["-m"]])
        code, out, err = cli(*mode, *arguments)
        if code == 2:
            assert len(err.splitlines()) == 1, (arguments, err)
            assert "allowed" in err, (arguments, err)
            assert out == "", arguments
        else:
            assert (code, err) == (0, ""), (arguments, err)
