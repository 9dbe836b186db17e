"""Recipes: what becomes of a model's layers, as a file of recipes tells it or as result files hold it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from awq_pycuda.config import Config, FileInputs
from awq_pycuda.errors import InputError
from awq_pycuda.evaluating.stored import Stored, find_stored
from awq_pycuda.paths import resource_dir
from awq_pycuda.results.evaluation_record import ORIGINAL
from awq_pycuda.results.evaluation_schema import CALIBRATION_NAME
from awq_pycuda.results.schema import FILE_NAME
from awq_pycuda.sweeps.composition import composing
from awq_pycuda.sweeps.hydra_errors import RECIPES

# What every recipe's run has where the recipe does not say otherwise: nothing is timed, little is compared.
_DEFAULTS = ("timing=none", "baselines=rtn")
# What an evaluation itself decides.
_OURS = {"inputs", "inputs.kind", "inputs.path", "study", "experiment", "n", "export"}
_LAYERS = "layers"
_NAME = re.compile(r"\w[\w.+-]*", re.ASCII)
_NAMES = "letters, digits, '.', '_', '+' and '-', beginning with a letter or digit"


@dataclass(frozen=True)
class Recipe:
    """One recipe: a run's overrides, a mixture of such, or a result file that is there.

    Attributes:
        name: unlike all others'.
        overrides: of a run, as the recipe gives them; `composed` are all that its run has.
        config: of that run, but for where its layer file lies.
        mixture: patterns of layers' paths in their order, each with the name of the recipe that its layers get.
        parts: the recipes that a mixture names, by name.
        stored: a complete run's file.
    """

    name: str
    overrides: tuple[str, ...] = ()
    composed: tuple[str, ...] = ()
    config: Config | None = None
    mixture: tuple[tuple[str, str], ...] = ()
    parts: Mapping[str, Recipe] = field(default_factory=dict)
    stored: Stored | None = None

    @property
    def rows(self) -> int:
        """Rows of the calibration that it takes, counted from the first one; 0 where it takes all that there are."""
        if self.config is None:
            return max((part.rows for part in self.parts.values()), default=0)
        assert isinstance(self.config.inputs, FileInputs)
        first: int = self.config.inputs.first_token
        return first + (self.config.tokens or 0)


def parse(given: str, calibration: int, shared: Sequence[str] = ()) -> list[Recipe]:
    """The recipes that a command is given, in their order, every override checked.

    Args:
        given: a YAML file of recipes or the name of one that comes with the package; a result file, or a folder in
            which some lie, at any depth.
        calibration: tokens that a recipe takes if it does not say how many.
        shared: overrides of all that run, such as backend=cpu, but for those that give the key themselves.

    Raises:
        InputError: the first thing wrong, in one line that names the recipe.
    """
    path = _path(given)
    if path.is_dir() or path.name == FILE_NAME:
        return _from_results(given, path)
    entries = _entries(given, path)
    found: dict[str, Recipe] = {}
    with composing() as compose:
        for name, node in entries.items():
            if isinstance(node, yaml.SequenceNode):
                own, others = _overrides(given, name, node, [*_DEFAULTS, f"tokens={calibration}", *shared])
                try:
                    config = compose([*others, *own])
                except InputError as error:
                    raise _refuse(given, f"{name}: {error}") from None
                found[name] = Recipe(name, tuple(own), (*others, *own), config)
    plain = dict(found)
    for name, node in entries.items():
        if name not in plain:
            found[name] = _mixture(given, name, node, plain)
    return [found[name] for name in entries]


def tokens_needed(recipes: Sequence[Recipe], calibration: int) -> int:
    """Tokens that the one calibration of all recipes must have, at least those asked for."""
    return max(calibration, *(recipe.rows for recipe in recipes))


def fitting(recipes: Sequence[Recipe], layers: Mapping[str, tuple[int, int]]) -> tuple[list[Recipe], list[str]]:
    """Those of the recipes that fit a model's layers, and what is to be said of result files, line by line.

    Result files that do not fit are left out, as long as one is left.

    Args:
        recipes: as parsed.
        layers: (out_features, in_features) by path.

    Raises:
        InputError: no result file fits, or a mixture does not.
    """
    found, said, faults = [], [], []
    for recipe in recipes:
        if recipe.mixture:
            _check_patterns(recipe, layers)
        if recipe.stored and (fault := _misfit(recipe.stored, layers)):
            faults.append(f"recipes={recipe.stored.path}: {fault}; allowed: results of this model's layers")
            said.append(f"left out: {recipe.stored.path}: {fault}")
            continue
        if recipe.stored and (others := len(layers) - len(recipe.stored.layers)):
            has = f"has {len(recipe.stored.layers)} of {len(layers)} layers"
            said.append(f"{recipe.name}: {has}; {others} stay as they are")
        found.append(recipe)
    if not found:
        raise InputError(faults[0])
    return found, said


def _misfit(file: Stored, layers: Mapping[str, tuple[int, int]]) -> str:
    """Why a run's layers are not among the model's; "" where they are."""
    for layer in file.layers:
        shape = f"{layer.out_features}x{layer.in_features}"
        if layer.name not in layers:
            return f"the model has no layer {layer.name} ({shape})"
        own = "x".join(map(str, layers[layer.name]))
        if shape != own:
            return f"layer {layer.name} is {shape}, the model's {own}"
    twice = [name for name, count in Counter(layer.name for layer in file.layers).items() if count > 1]
    return f"{twice[0]} is there twice" if twice else ""


def _check_patterns(mixture: Recipe, layers: Collection[str]) -> None:
    """Refuses a pattern that fits no layer, and a layer that no pattern fits."""
    where = f"recipes: {mixture.name}"
    for pattern, _ in mixture.mixture:
        if not any(_fits(pattern, layer, layers) for layer in layers):
            allowed = f"the paths of layers, such as {next(iter(layers))}, or regular expressions found in some"
            raise InputError(f"{where}: {pattern}: fits no layer; allowed: {allowed}")
    without = [layer for layer in layers if not any(_fits(pattern, layer, layers) for pattern, _ in mixture.mixture)]
    if without:
        allowed = f"a last pattern such as '.*', also with {ORIGINAL}"
        raise InputError(f"{where}: no pattern fits the layer {without[0]}; allowed: {allowed}")


def _fits(pattern: str, layer: str, layers: Collection[str]) -> bool:
    """Whether a pattern names a layer: as its path where it is that of any, else as an expression found in it."""
    return pattern == layer if pattern in layers else re.search(pattern, layer) is not None


def recipes_of(mixture: Recipe, layers: Collection[str]) -> dict[str, str]:
    """The name of the recipe that each layer gets, by path: that of the first pattern that fits it, or `original`."""
    return {
        layer: next((name for pattern, name in mixture.mixture if _fits(pattern, layer, layers)), ORIGINAL)
        for layer in layers
    }


def _path(given: str) -> Path:
    packaged = {path.stem: path for path in sorted((resource_dir("conf") / RECIPES).glob("*.yaml"))}
    path = packaged.get(given) or Path(given)
    if not path.exists():
        names = f", or one of the package's: {', '.join(packaged)}" if packaged else ""
        what = "no such file or folder" if "/" in given or path.suffix else "no such file, folder or name"
        raise InputError(f"recipes={given}: {what}; allowed: a YAML file, result files{names}")
    return path


def _refuse(given: str, fault: str) -> InputError:
    return InputError(f"recipes={given}: {fault}")


def _entries(given: str, path: Path) -> dict[str, yaml.Node]:
    """The recipes of a file, by name, not looked at yet. Nodes, not values: a mapping would hide a second key."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    except OSError as error:
        raise _refuse(given, f"cannot be read ({error.strerror}); allowed: a YAML file") from None
    except UnicodeDecodeError as error:
        raise _refuse(given, f"is no UTF-8 (byte {error.start}); allowed: a YAML file") from None
    except (yaml.YAMLError, RecursionError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise _refuse(given, f"is no YAML ({why}); allowed: NAME: [override, ...], with quotes around [ ]") from None
    pairs = _pairs(given, "", root, "a mapping from names to overrides or to layers")
    if not pairs:
        raise _refuse(given, "holds no recipe; allowed: at least one")
    for name in pairs:
        if name == ORIGINAL:
            raise _refuse(given, f"{name}: is the name of the model as it is; allowed: another name")
        if not _NAME.fullmatch(name):
            raise _refuse(given, f"{name!r}: is no name; allowed: {_NAMES}")
    for name, node in pairs.items():
        if not isinstance(node, yaml.SequenceNode | yaml.MappingNode):
            raise _refuse(given, f"{name}: is no list; allowed: [override, ...] or {{layers: {{pattern: recipe}}}}")
    return pairs


def _pairs(given: str, name: str, node: yaml.Node | None, allowed: str) -> dict[str, yaml.Node]:
    """A mapping's values by their keys, which are texts, each there once."""
    where = f"{name}: " if name else ""
    if not isinstance(node, yaml.MappingNode):
        raise _refuse(given, f"{where}is no mapping; allowed: {allowed}")
    found: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refuse(given, f"{where}line {key.start_mark.line + 1} has no plain key; allowed: {allowed}")
        if key.value in found:
            raise _refuse(given, f"{where}{key.value}: is there twice; allowed: once")
        found[key.value] = value
    return found


def _overrides(
    given: str, name: str, node: yaml.SequenceNode, others: Sequence[str]
) -> tuple[list[str], tuple[str, ...]]:
    """A recipe's own overrides, and those that its run has beside them: others of keys that it does not give."""
    own = []
    for item in node.value:
        if not isinstance(item, yaml.ScalarNode):
            line = item.start_mark.line + 1
            raise _refuse(given, f"{name}: line {line} has no text; allowed: overrides such as quant=int4_g128")
        own.append(item.value)
    keys = [text.lstrip("+~").partition("=")[0] for text in own]
    for key, text in zip(keys, own, strict=True):
        if key in _OURS or key.startswith("hydra"):
            raise _refuse(given, f"{name}: {text}: is set by the evaluation; allowed: keys of the quantization")
    beside = [text for text in others if text.partition("=")[0] not in keys]
    return own, ("study=evaluation", "inputs=file", f"inputs.path={CALIBRATION_NAME}", *beside)


def _mixture(given: str, name: str, node: yaml.Node, plain: Mapping[str, Recipe]) -> Recipe:
    """A recipe that gives layers to others of its file."""
    pairs = _pairs(given, name, node, "{layers: {pattern: recipe}}")
    if set(pairs) != {_LAYERS}:
        keys = ", ".join(pairs) or "nothing"
        raise _refuse(given, f"{name}: has the keys {keys}; allowed: {_LAYERS} alone, or a list of overrides")
    patterns = _pairs(given, f"{name}: {_LAYERS}", pairs[_LAYERS], "patterns of layers' paths, each with a recipe")
    names = f"{ORIGINAL}, {', '.join(plain)}" if plain else ORIGINAL
    mixture = []
    for pattern, value in patterns.items():
        chosen = str(value.value) if isinstance(value, yaml.ScalarNode) else "a list or mapping"
        if chosen != ORIGINAL and chosen not in plain:
            raise _refuse(given, f"{name}: {pattern}: {chosen} is no recipe with overrides; allowed: {names}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise _refuse(given, f"{name}: {pattern}: is no regular expression ({error}); allowed: one") from None
        mixture.append((pattern, chosen))
    if not mixture:
        raise _refuse(given, f"{name}: {_LAYERS}: holds no pattern; allowed: at least one")
    parts = {chosen: plain[chosen] for _, chosen in mixture if chosen != ORIGINAL}
    return Recipe(name, mixture=tuple(mixture), parts=parts)


def _from_results(given: str, path: Path) -> list[Recipe]:
    """A recipe of each complete result file, named by its folder or, in a study, by what it was run with."""
    stored = find_stored(path)
    if not stored:
        raise _refuse(given, f"holds no complete {FILE_NAME}; allowed: one at least, at any depth")
    twice = {name for name, count in Counter(each.name for each in stored).items() if count > 1}
    names = [f"{each.name} {each.path.parent.name}" if each.name in twice else each.name for each in stored]
    for name in names:
        if name == ORIGINAL:
            raise _refuse(given, f"{name}: is the name of the model as it is; allowed: a folder of another name")
    return [Recipe(name, stored=each) for name, each in zip(names, stored, strict=True)]
