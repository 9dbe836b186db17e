"""Files of recipes and result files as recipes: what they say, and what is refused before any model is loaded."""

from pathlib import Path

import pytest
import yaml
from result_files import editing, make_run

from awq_pycuda.errors import InputError
from awq_pycuda.evaluating.recipes import Recipe, fitting, parse, recipes_of, tokens_needed
from awq_pycuda.paths import resource_dir
from awq_pycuda.sweeps.composition import composing

WHOLE = """\
rtn: [gamma_grid=rtn, tokens=48]
awq: [quant=int4_g128, "gammas=[0,0.5,1]", baselines=all]
far: [quant.bits=4, backend=cuda, tokens=16, inputs.first_token=64]
mixed: {layers: {h.1.attn.c_attn: rtn, 'h\\.1': original, mlp: awq, '.*': far}}
"""
LAYERS = {f"h.{block}.{part}": (8, 4) for block in (0, 1, 11) for part in ("attn.c_attn", "mlp.c_fc")}


def written(folder: Path, text: str) -> str:
    path = folder / "recipes.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    path = written(tmp_path_factory.mktemp("recipes"), WHOLE)
    return {recipe.name: recipe for recipe in parse(path, 32, ["backend=cpu", "threads=1"])}


def test_a_recipe_s_run_is_composed_of_its_overrides_and_those_of_all(recipes):
    assert list(recipes) == ["rtn", "awq", "far", "mixed"]
    rtn, awq, far = (recipes[name].config for name in ("rtn", "awq", "far"))
    assert recipes["awq"].overrides == ("quant=int4_g128", "gammas=[0,0.5,1]", "baselines=all")
    assert (rtn.gammas, rtn.tokens, awq.tokens, far.tokens) == ([0], 48, 32, 16)
    assert (awq.quant.bits, awq.quant.group_size, awq.gammas) == (4, 128, [0, 0.5, 1])
    assert [config.baselines.name for config in (rtn, awq, far)] == ["rtn", "all", "rtn"]
    assert [config.backend.name for config in (rtn, awq, far)] == ["cpu", "cpu", "cuda"]
    assert (rtn.threads, rtn.timing.warmup, rtn.timing.repeats, rtn.verify, rtn.layers) == (1, 0, 0, False, None)


def test_one_calibration_has_the_tokens_of_all(recipes):
    assert [recipe.rows for recipe in recipes.values()] == [48, 32, 80, 80]
    assert tokens_needed([recipes["rtn"]], 32) == 48
    assert tokens_needed(list(recipes.values()), 32) == 80
    assert tokens_needed([recipes["awq"]], 512) == 512


def test_a_layer_of_a_mixture_gets_the_first_recipe_that_names_it(recipes):
    assert recipes_of(recipes["mixed"], LAYERS) == {
        "h.0.attn.c_attn": "far",
        "h.0.mlp.c_fc": "awq",
        "h.1.attn.c_attn": "rtn",
        "h.1.mlp.c_fc": "original",
        "h.11.attn.c_attn": "original",  # h.1 is found in its path, which is no layer's
        "h.11.mlp.c_fc": "original",
    }
    assert set(recipes["mixed"].parts) == {"rtn", "awq", "far"}
    assert fitting(list(recipes.values()), LAYERS) == (list(recipes.values()), [])


REFUSED = {
    "": r"is no mapping; allowed: a mapping from names to overrides or to layers",
    "{}": "holds no recipe; allowed: at least one",
    "a: [": r"is no YAML \(.*\); allowed: NAME: \[override, \.\.\.\], with quotes around \[ \]",
    "a: []\nb: []\na: []": "a: is there twice; allowed: once",
    "? [a]\n: []": "line 1 has no plain key; allowed: a mapping from names to overrides or to layers",
    "original: []": "original: is the name of the model as it is; allowed: another name",
    "a/b: []": r"'a/b': is no name; allowed: letters, digits, .* beginning with a letter or digit",
    "a: 3": r"a: is no list; allowed: \[override, \.\.\.\] or {layers: {pattern: recipe}}",
    "a: [quant: nvfp4]": "a: line 1 has no text; allowed: overrides such as quant=int4_g128",
    "a: [quant=int5]": "a: quant=int5: no such option; allowed: group128, int3_g128, .*",
    "a: [bits=4]": r"a: bits=4: no such key; allowed: quant\.bits",
    "a: [quant.bits=9]": r"a: quant\.bits=9: allowed: a whole number from 2 to 8",
    'a: ["tile=8,16"]': r"a: .*tile=8,16.*; allowed: .*",
    "a: [tile=8, tile=16]": "a: tile=16: a second value of its key, beside tile=8; allowed: one of them",
    "a: [inputs.path=x.h5]": r"a: inputs\.path=x\.h5: is set by the evaluation; allowed: keys of the quantization",
    "a: [inputs=synthetic]": "a: inputs=synthetic: is set by the evaluation; allowed: .*",
    "a: [hydra.run.dir=x]": r"a: hydra\.run\.dir=x: is set by the evaluation; allowed: .*",
    "a: [inputs.first_token=-1]": r"a: inputs\.first_token=-1: allowed: a whole number from 0 to .*",
    "a: {layers: {x: b}}": "a: x: b is no recipe with overrides; allowed: original",
    "a: {layers: {x: a}}\nb: []": "a: x: a is no recipe with overrides; allowed: original, b",
    "a: {layers: {x: [b]}}": "a: x: a list or mapping is no recipe with overrides; allowed: original",
    "a: {layers: {'(': original}}": r"a: \(: is no regular expression \(.*\); allowed: one",
    "a: {layers: {x: original, x: original}}": "a: layers: x: is there twice; allowed: once",
    "a: {layers: {}}": "a: layers: holds no pattern; allowed: at least one",
    "a: {layer: {x: original}}": "a: has the keys layer; allowed: layers alone, or a list of overrides",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_file_that_is_wrong_is_refused_in_one_line(text, tmp_path):
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=f"^recipes={path}: {REFUSED[text]}$") as refused:
        parse(path, 32)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: [\xe4]")
    (tmp_path / "empty").mkdir()
    lines = {
        "nothing.yaml": "no such file or folder; allowed: a YAML file, result files",
        "latin.yaml": r"is no UTF-8 \(byte 4\); allowed: a YAML file",
        "empty": "holds no complete results.h5; allowed: one at least, at any depth",
    }
    for name, line in lines.items():
        with pytest.raises(InputError, match=rf"recipes={tmp_path / name}: {line}"):
            parse(str(tmp_path / name), 32)
    with pytest.raises(InputError, match=r"^recipes=nothing: no such file, folder or name; allowed: "):
        parse("nothing", 32)


PACKAGED = sorted((resource_dir("conf") / "recipes").glob("*.yaml"))


def test_recipes_are_found_by_the_name_of_their_file():
    (path,) = (path for path in PACKAGED if path.stem == "default")
    found = parse("default", 512)
    assert found == parse(str(path), 512)
    assert [recipe.name for recipe in found] == list(yaml.safe_load(path.read_text()))


def test_what_packaged_recipes_override_is_there():
    """Each override by itself: a composition takes 50 ms, and most recipes are made of the same ones."""
    files = [yaml.safe_load(path.read_text()) for path in PACKAGED]
    given = {text for file in files for recipe in file.values() if isinstance(recipe, list) for text in recipe}
    assert len(given) > 10
    with composing() as compose:
        for text in sorted(given):
            compose(["inputs=file", "inputs.path=layers.h5", text])


MISFITS = {
    "x: fits no layer; allowed: the paths of layers, such as h.0.attn.c_attn, .*": "{x: rtn, '.*': rtn}",
    r"no pattern fits the layer h\.0\.mlp\.c_fc; allowed: a last pattern such as '\.\*', .*": "{attn: rtn}",
}


@pytest.mark.parametrize("line", MISFITS)
def test_a_mixture_that_does_not_fit_the_model_is_refused(line, tmp_path):
    given = parse(written(tmp_path, f"rtn: []\nmixed: {{layers: {MISFITS[line]}}}"), 32)
    with pytest.raises(InputError, match=f"^recipes: mixed: {line}$"):
        fitting(given, LAYERS)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs as a sweep leaves them, one that a sweep has not, and one that failed."""
    folder = tmp_path_factory.mktemp("study")
    for name, quant in (("0" * 16, "int4_row"), ("1" * 16, "per_row"), ("by hand", "nvfp4")):
        make_run(folder / name, f"quant={quant}", "layers=2", "timing=once")
    with editing(make_run(folder / "failed", "layers=2", "timing=once")) as file:
        file.attrs.update({"status": "failed", "error": "stopped"})
    return folder


def test_complete_runs_are_recipes_named_by_what_tells_them_apart(study):
    found = parse(str(study), 32)
    assert [recipe.name for recipe in found] == ["quant=int4_row", "quant=per_row", "by hand"]
    assert [recipe.stored.config.quant.bits for recipe in found] == [4, 8, 4]
    assert tokens_needed(found, 32) == 32
    (alone,) = parse(str(study / "by hand" / "results.h5"), 32)
    assert alone.name == "by hand"


@pytest.mark.parametrize("overrides", ["no JSON", '{"quant": 4}'])
def test_a_run_whose_overrides_are_not_told_has_the_name_of_its_folder(overrides, study, tmp_path):
    path = tmp_path / ("2" * 16) / "results.h5"
    path.parent.mkdir()
    path.write_bytes((study / "by hand" / "results.h5").read_bytes())
    with editing(path) as file:
        file.attrs["overrides"] = overrides
    assert [recipe.name for recipe in parse(str(tmp_path), 32)] == ["2" * 16]


def test_runs_of_other_layers_are_left_out_as_long_as_one_fits(study):
    found = parse(str(study), 32)
    layers = dict.fromkeys(("000", "001", "002"), (16, 16))
    fit, said = fitting(found, layers)
    assert fit == found
    assert said == [f"{recipe.name}: has 2 of 3 layers; 1 stay as they are" for recipe in found]
    (smaller,) = parse(str(make_run(study.parent / "smaller", "n=8", "layers=1", "timing=once")), 32)
    fit, said = fitting([*found, smaller], {"000": (16, 16), "001": (16, 16)})
    assert fit == found
    assert said == [f"left out: {smaller.stored.path}: layer 000 is 8x8, the model's 16x16"]
    for others, line in {"a": "the model has no layer 000 (8x8)", "000": "layer 000 is 8x8, the model's 16x16"}.items():
        with pytest.raises(InputError) as refused:
            fitting([smaller], {others: (16, 16)})
        assert str(refused.value) == (f"recipes={smaller.stored.path}: {line}; allowed: results of this model's layers")


def test_a_file_that_is_damaged_is_refused(study, tmp_path):
    image = (study / "by hand" / "results.h5").read_bytes()
    (tmp_path / "results.h5").write_bytes(image[:-5000])
    with pytest.raises(InputError, match=rf"^recipes={tmp_path}/results\.h5: .*; allowed: result files of awq_pycuda$"):
        parse(str(tmp_path), 32)
