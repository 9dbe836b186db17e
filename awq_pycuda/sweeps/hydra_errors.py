"""Hydra's and OmegaConf's errors as one line that names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import cache

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from awq_pycuda.config import ALLOWED, FileInputs, OutlierInputs, SyntheticInputs
from awq_pycuda.errors import InputError
from awq_pycuda.kernels import table
from awq_pycuda.paths import resource_dir
from awq_pycuda.sweeps.launchers import LAUNCHERS

RECIPES = "recipes"  # beside the groups: lists of overrides that an evaluation takes


def explain(error: BaseException, overrides: Sequence[str]) -> str:
    """The line to print for an error of composing the config.

    Args:
        error: as raised by Hydra, OmegaConf or a check of ours.
        overrides: the command line, to find the value that was given.
    """
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group == "hydra/launcher" and option in LAUNCHERS:
            return f"{group}={option}: not installed; allowed after pip install -r requirements-cluster.txt"
        options = [name for name in error.options if not name.endswith("_schema")]
        return f"{group}={option}: no such option; allowed: {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read; allowed: key=value as --help shows, special characters in quotes"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = re.sub(r"\[.*", "", str(getattr(cause, "full_key", None) or ""))
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        if key in ALLOWED:
            return f"{_given(key, overrides)}: not a key of the chosen options; allowed: with {_bringing(key)}"
        return f"{_given(key, overrides)}: no such key; allowed: {similar(key)}"
    if isinstance(cause, MissingMandatoryValue) and key in ALLOWED:
        return no_value(key)
    if key in ALLOWED:
        return f"{_given(key, overrides)}: allowed: {ALLOWED[key]}"
    message = " ".join(str(error).split("\n", 1)[0].split())
    if message.startswith("Ambiguous value"):
        return f"{message}; allowed: one value, or several with -m"
    if isinstance(error, InterpolationResolutionError):
        message = ": ".join([*(override for override in overrides if "${" in override), message])
    if given := hydra_overrides(overrides):
        return f"{given}: {message}; allowed: what --cfg hydra shows"
    return f"{message}; allowed: key=value as --help shows"


def hydra_overrides(overrides: Sequence[str]) -> str:
    """Those of a command line that are settings of Hydra's own."""
    return " ".join(override for override in overrides if override.lstrip("+~").startswith("hydra"))


def no_value(key: str) -> str:
    """The line for a key that must be given, and is not."""
    return f"{key}: has no value; allowed: {key}=..., {ALLOWED[key]}"


@cache
def groups() -> dict[str, list[str]]:
    """The options of each group."""
    folders = {path.name: path for path in resource_dir("conf").iterdir() if path.is_dir() and path.name != RECIPES}
    folders["experiment"] = resource_dir("experiments")
    options = {group: sorted(path.stem for path in folder.glob("*.yaml")) for group, folder in folders.items()}
    return options | {"matmul": sorted(table.names("dequantizeTiled"))}


def similar(key: str) -> str:
    """The keys that may have been meant: the same in other letters or at another place, then those spelt alike."""
    if key.startswith("hydra"):
        return "what --cfg hydra shows"
    known = sorted({*ALLOWED, *groups()})
    names = {each.rpartition(".")[2]: each for each in known} | {each: each for each in known}
    asked = key.lower()
    for name in (asked, asked.rpartition(".")[2]):
        if name in names:
            return names[name]
    near = difflib.get_close_matches(asked, names, n=3, cutoff=0.7)
    return ", ".join(dict.fromkeys(names[name] for name in near) or known)


def _bringing(key: str) -> str:
    """The options of its group that have this key."""
    group, _, name = key.partition(".")
    schemas = (SyntheticInputs, OutlierInputs, FileInputs)
    found = [schema.kind for schema in schemas if name in (each.name for each in fields(schema))]
    return " or ".join(f"{group}={option}" for option in found)


def _given(key: str, overrides: Sequence[str]) -> str:
    """The override of this key as the user wrote it; the last one counts."""
    for override in reversed(overrides):
        if override.lstrip("+~").partition("=")[0] == key:
            return override
    return key
