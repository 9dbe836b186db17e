"""Hydra's and OmegaConf's errors as one line that names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from awq_pycuda.config import ALLOWED
from awq_pycuda.errors import InputError
from awq_pycuda.launchers import LAUNCHERS
from awq_pycuda.paths import resource_dir


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
            return f"{_given(key, overrides)}: not a key of the chosen options; allowed: with others (see --help)"
        return f"{_given(key, overrides)}: no such key; allowed: {_similar(key)}"
    if key in ALLOWED:
        return f"{_given(key, overrides)}: allowed: {ALLOWED[key]}"
    message = " ".join(str(error).split("\n", 1)[0].split())
    if message.startswith("Ambiguous value"):
        return f"{message}; allowed: one value, or several with -m"
    if message.startswith("Config group override must be"):
        # Hydra does not say of which group: the value is a number, true or null.
        for override in overrides:
            group, _, option = override.lstrip("+~").partition("=")
            if group in _groups() and option not in _options(group):
                return f"{group}={option}: no such option; allowed: {', '.join(_options(group))}"
    if isinstance(error, InterpolationResolutionError):
        message = ": ".join([*(override for override in overrides if "${" in override), message])
    return f"{message}; allowed: key=value as --help shows"


def _groups() -> list[str]:
    return [path.name for path in resource_dir("conf").iterdir() if path.is_dir()]


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (resource_dir("conf") / group).glob("*.yaml"))


def _given(key: str, overrides: Sequence[str]) -> str:
    """The override of this key as the user wrote it; the last one counts."""
    for override in reversed(overrides):
        if override.lstrip("+~").partition("=")[0] == key:
            return override
    return f"{key}=???"


def _similar(key: str) -> str:
    known = sorted({*ALLOWED, *_groups()})
    return ", ".join(difflib.get_close_matches(key, known, n=3) or known)
