"""What a command line overrides, checked before Hydra composes: it casts what it can, and takes some values for others.

What `${...}` stands for is known when the config is composed, and is checked then in the same way.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import EnumType
from typing import Any, get_args

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    QuotedString,
    RangeSweep,
    ValueType,
)
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from awq_pycuda.config import ALLOWED, TYPES
from awq_pycuda.config_types import fits
from awq_pycuda.errors import InputError
from awq_pycuda.sweeps.hydra_errors import groups

_CASTS = ("int", "float", "bool", "str")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags and overrides of a command line: Hydra's parser takes only the overrides before or those after a flag.

    Raises:
        InputError: an option that Hydra does not have.
    """
    parser = get_args_parser()
    parser.exit_on_error = False  # it would print its usage
    parser.allow_abbrev = False  # --experiment=depth would be --experimental-rerun
    try:
        known, others = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; allowed: what --hydra-help shows") from None
    for argument in others:
        if argument.startswith("-"):
            raise InputError(f"{argument}: no such option; allowed: what --hydra-help shows")
    given = {*known.overrides, *others}
    flags = [argument for argument in arguments if argument not in given]
    return flags, [argument for argument in arguments if argument in given]


def check_overrides(texts: Sequence[str]) -> None:
    """Refuses overrides that Hydra would take for something else than they say.

    Raises:
        InputError: the first one that is wrong.
    """
    functions = create_functions()
    for cast in _CASTS:
        del functions.functions[cast], functions.definitions[cast]
    parser = OverridesParser(functions)
    given: dict[str, str] = {}
    for text in texts:
        try:
            (override,) = parser.parse_overrides([text])
        except OverrideParseException as error:
            for cast in _CASTS:
                if f"Unknown function '{cast}'" in str(error):
                    raise InputError(f"{text}: {cast}(...) is not taken; allowed: the value itself") from None
            raise
        except RecursionError:
            raise InputError(f"{_short(text)}: nested too deep; allowed: key=value as --help shows") from None
        key = override.key_or_group
        if not key:
            raise InputError(f"{text}: has no key; allowed: key=value as --help shows")
        if key in given and (key in groups() or _value(given[key]) != _value(text)):
            what = "a second option of its group" if key in groups() else "a second value of its key"
            raise InputError(f"{text}: {what}, beside {given[key]}; allowed: one of them")
        given[key] = text
        for whole in ALLOWED:
            if key.startswith(f"{whole}."):  # Hydra sets an element of a list, unchecked
                raise InputError(f"{text}: a part of {whole}; allowed: {whole}=..., {ALLOWED[whole]}")
        if key not in groups() and key not in ALLOWED:  # Hydra's own, a user's group in a folder given, or unknown
            continue
        _check_form(override, text)
        if key in groups():
            _check_option(override, text)
        else:
            _check_value(override, text)


def check_referred(config: DictConfig) -> None:
    """Refuses what stands behind `${...}` where the schema would cast it: it is held to what may be given itself.

    Args:
        config: composed, without Hydra's own settings.

    Raises:
        InputError: the first key whose value is of another type.
        OmegaConfBaseException: what is referred to is not there.
    """
    _, others = referring(config)
    if not others:
        return
    untyped = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    for key in others:
        value = OmegaConf.select(untyped, key)
        value = OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value
        if not _may_be_given(key, value):
            raise InputError(f"{key}={_text(config, key)}: stands for {_plain(value)}; allowed: {ALLOWED[key]}")


def referring(config: DictConfig) -> tuple[list[str], list[str]]:
    """The keys that stand for a key of their own type, such as tokens=${n}, and those that hold any other `${...}`.

    Args:
        config: composed, without Hydra's own settings.
    """
    following: list[str] = []
    others: list[str] = []
    for key, kind in TYPES.items():
        text = _text(config, key)
        if "${" in text:
            # Any value has a text.
            same = kind is str or TYPES.get(text[2:-1]) in (kind, *get_args(kind))
            (following if same else others).append(key)
    return following, others


def _text(config: DictConfig, key: str) -> str:
    group, _, name = key.rpartition(".")
    parent = OmegaConf.select(config, group) if group else config
    return _written(parent._get_node(name, validate_access=False))


def _written(node: Any) -> str:
    """A key's value before `${...}` is replaced; "" where its options have no such key."""
    value = node if node is None else node._value()
    return _plain([item._value() for item in value]) if isinstance(value, list) else str(value)


def _may_be_given(key: str, value: object) -> bool:
    items = value if isinstance(value, list) else [value]
    if not any(isinstance(item, str) for item in items):
        return fits(TYPES[key], value)
    try:  # such as from the environment, where everything is text
        check_overrides([f"{key}={_plain(value)}"])
    except (InputError, OverrideParseException):
        return False
    return True


def _plain(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _check_form(override: Override, text: str) -> None:
    key = override.key_or_group
    if override.package is not None:
        raise InputError(f"{text}: has a package; allowed: {key}=...")
    if override.is_delete():
        raise InputError(f"{text}: cannot be taken away; allowed: {key}=...")
    if override.is_add():
        raise InputError(f"{text}: is there already; allowed: {text.removeprefix('+')}")


def _check_option(override: Override, text: str) -> None:
    for value in _elements(override):
        name = _unquoted(value)
        with suppress(OmegaConfBaseException):  # it refers to what only Hydra knows
            name = OmegaConf.create({"name": name})["name"] if _refers(value) else name
        none_is_meant = value is None and override.key_or_group == "experiment"
        if not isinstance(name, str) and not none_is_meant:
            raise InputError(f"{text}: no such option; allowed: {', '.join(groups()[override.key_or_group])}")


def _check_value(override: Override, text: str) -> None:
    key = override.key_or_group
    kind = TYPES[key]
    refusal = InputError(f"{text}: allowed: {ALLOWED[key]}")
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        raise refusal
    # Hydra's grammar takes 1_6 for 16. Names in ${...} may be of any form.
    if kind is not str and re.search(r"\d_\d", re.sub(r"\$\{.*\}", "", text.partition("=")[2])):
        raise refusal
    for value in _elements(override):
        if _refers(value):
            continue
        if kind is str and isinstance(value, (int, float)):
            if not re.search(rf"(?<![\w.]){re.escape(str(value))}(?![\w.])", text):
                raise InputError(f"{text}: is read as {value}; allowed: quotes that the shell leaves, \"{key}='...'\"")
        elif not fits(kind, _unquoted(value) if kind is str or isinstance(kind, EnumType) else value):
            raise refusal


def _elements(override: Override) -> Iterator[Any]:
    """Every value of an override, or those that stand for all of its range."""
    value = override._value
    if isinstance(value, RangeSweep):
        yield from (value.start, value.stop, value.step)
    elif isinstance(value, ChoiceSweep):
        yield from value.list
    elif isinstance(value, IntervalSweep):
        raise InputError(f"{override.input_line}: has no end; allowed: values with commas between, or range(...)")
    elif override.value_type is not ValueType.GLOB_CHOICE_SWEEP:
        yield value


def _refers(value: Any) -> bool:
    """Whether a value, or one in a list, is `${...}`: what it stands for is not known yet."""
    if isinstance(value, list):
        return any(map(_refers, value))
    return "${" in str(_unquoted(value))


def _unquoted(value: Any) -> Any:
    return value.text if isinstance(value, QuotedString) else value


def _value(text: str) -> str:
    return text.partition("=")[2]


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
