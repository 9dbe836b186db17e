"""The options of the commands that do without Hydra: one dataclass a command gives parsing, refusals and `--help`.

Not argparse: it knows no `key=value`, words errors in its own way and takes no path for one that looks like an option.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from awq_pycuda import __version__, streams
from awq_pycuda.errors import InputError
from awq_pycuda.signals import Stopped, stoppable

T = TypeVar("T")
E = TypeVar("E", bound=Enum)

REQUIRED: Any = MISSING
SYNTAX = """\
  --help, -h   print this
  --version    print the version

A key may also be given as --key value or --key=value. After -- nothing is taken for a key.
"""
_WIDTH = 100


def option(placeholder: str, meaning: str, allowed: str, convert: Callable[[str], T], default: T) -> T:
    """A dataclass field that the command line sets by its name.

    Args:
        placeholder: what stands for the value in `--help`, such as FOLDER.
        meaning: what the key is for.
        allowed: the values that it may take, in words.
        convert: makes the value of the text given; a `ValueError` refuses it, and its message says why.
        default: the value if the key is not given; `REQUIRED` if it must be.
    """
    words = {"placeholder": placeholder, "meaning": meaning, "allowed": allowed, "convert": convert}
    made: T = field(default=default, metadata=words)
    return made


def nonempty(given: str) -> str:
    """For `option`: any text but none."""
    if not given:
        raise ValueError("is missing")
    return given


def whole(minimum: int) -> Callable[[str], int]:
    """For `option`: a whole number in plain digits, of at least `minimum`."""

    def convert(given: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", given):
            raise ValueError("is no whole number" if given else "is missing")
        if int(given) < minimum:
            raise ValueError("is too small")
        return int(given)

    return convert


def share(given: str) -> float:
    """For `option`: a number from 0 to below 1."""
    value = _number(given)
    if not 0 <= value < 1:
        raise ValueError("is out of range")
    return value


def positive(given: str) -> float:
    """For `option`: a number above 0."""
    value = _number(given)
    if not 0 < value < math.inf:
        raise ValueError("is out of range")
    return value


def one_of(*choices: str) -> Callable[[str], str]:
    """For `option`: one of these words."""

    def convert(given: str) -> str:
        if given not in choices:
            raise ValueError("is none of these" if given else "is missing")
        return given

    return convert


def _number(given: str) -> float:
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", given, re.IGNORECASE):
        raise ValueError("is no number" if given else "is missing")
    return float(given)


def words(*choices: str) -> Callable[[str], tuple[str, ...]]:
    """For `option`: words with commas between; of `choices` where there are any."""

    def convert(given: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(given.split(",")))
        for word in found:
            if not word or (choices and word not in choices):
                raise ValueError(f"{word!r} is none" if given else "is missing")
        return found

    return convert


def member(of: type[E]) -> Callable[[str], E]:
    """For `option`: a member of an enum, by its name."""

    def convert(given: str) -> E:
        try:
            return of[given]
        except KeyError:
            raise ValueError("is none of these" if given else "is missing") from None

    return convert


def refusal(options: type, key: str, value: object, why: str) -> InputError:
    """The error for a value of a command's key; the key's field says what is allowed."""
    return InputError(f"{key}={value}: {why}; allowed: {_keys(options)[key].metadata['allowed']}")


def parse(options: type[T], arguments: Sequence[str], paths: str = "") -> tuple[T, list[Path]]:
    """The options that the arguments set, and the paths among them, in their order.

    `out=x`, `--out x` and `--out=x` are the same. Whatever else exists is a path, whatever its name: sweeps make
    folders such as `n=64`.

    Args:
        options: a dataclass with keyword fields alone, each made by `option`.
        arguments: the command line.
        paths: which paths the command takes beside its keys, in words; empty if none.

    Raises:
        InputError: a key that is unknown, given twice or missing; a value that its key does not allow; a path that is
            not there, or any where none are taken.
    """
    keys = _keys(options)
    given: dict[str, str] = {}
    found: list[Path] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            found += [_path(each, paths, keys) for each in rest]
            break
        dashed = argument.startswith("--")
        name, equals, value = argument.removeprefix("--").partition("=")
        key = name.replace("-", "_") if dashed else name
        if key in keys and (dashed or equals):
            if not equals and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif not equals:
                raise InputError(f"{argument}: has no value; allowed: {keys[key].metadata['allowed']}")
            if key in given:
                raise InputError(f"{key}={value}: is given twice, before as {key}={given[key]}; allowed: once")
            given[key] = value
        elif argument.startswith("-") or (
            equals and re.fullmatch(r"[\w.-]*", key) and not (paths and os.path.lexists(argument))
        ):
            near = difflib.get_close_matches(key.lower(), keys, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            nor = ", file or folder" if paths and not dashed else ""
            raise InputError(f"{argument}: no such key{nor}{hint}; allowed: {', '.join(keys)}")
        else:
            found.append(_path(argument, paths, keys))
    return options(**{key: _value(options, key, given.get(key)) for key in keys}), found


def describe(options: type) -> str:
    """What `--help` says of a command's keys: meaning, default and what is allowed."""
    keys = _keys(options)
    names = {key: f"  {key}={each.metadata['placeholder']}" for key, each in keys.items()}
    margin = " " * (max(map(len, names.values())) + 3)
    lines: list[str] = []
    for key, each in keys.items():
        default = "required" if each.default is MISSING else f"default: {shown(each.default)}"
        for words_, first in (
            (each.metadata["meaning"], names[key].ljust(len(margin))),
            (f"{default}; allowed: {each.metadata['allowed']}", margin),
        ):
            lines += textwrap.wrap(words_, _WIDTH, initial_indent=first, subsequent_indent=margin)
    return "\n".join(lines) + "\n"


def serve(arguments: Sequence[str], usage: str, work: Callable[[Sequence[str]], int]) -> int:
    """Runs a command and words whatever ends it; returns the exit code.

    `--help` and `--version` are answered wherever they stand before a `--`. Else the code is that of `work`; 2 for bad
    input, 1 where the system fails it, 128 + its number after a signal.
    """
    keys = list(arguments)[: arguments.index("--")] if "--" in arguments else list(arguments)
    streams.prepare()
    try:
        code = 0
        if {"--help", "-h"} & set(keys):
            print(usage, end="")
        elif "--version" in keys:
            print(f"awq_pycuda {__version__}")
        else:
            with stoppable():
                code = work(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk is told here, not by Python's own exit code when it ends
        return code
    except InputError as error:
        line = " ".join(str(error).splitlines())  # a value given may hold line breaks
        print(f"error: {line}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"failed: {error}", file=sys.stderr)
        streams.drop_unwritten()
        return 1
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.number


def _keys(options: type) -> dict[str, Field[Any]]:
    return {each.name: each for each in fields(options)}


def _path(argument: str, paths: str, keys: dict[str, Field[Any]]) -> Path:
    shown = argument or repr(argument)
    if not paths:
        raise InputError(f"{shown}: is no key=value; allowed: {', '.join(keys)}")
    if not os.path.lexists(argument):
        raise InputError(f"{shown}: no such file or folder; allowed: {paths}")
    return Path(argument)


def _value(options: type, key: str, given: str | None) -> object:
    each = _keys(options)[key]
    if given is None and each.default is not MISSING:
        return each.default
    try:
        return each.metadata["convert"](given or "")
    except ValueError as error:
        raise refusal(options, key, given or "", str(error)) from None


def shown(default: object) -> str:
    """A default as `--help` shows it."""
    if isinstance(default, Enum):
        return default.name
    if isinstance(default, tuple):
        default = ",".join(default)
    return "none" if default in (None, "") else str(default)
