"""The config as plain data and text: what result files hold of it, and the hash that names its folder in a study."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

import yaml

from awq_pycuda.config import Config, FileInputs, InputsConfig, OutlierInputs, SyntheticInputs, check
from awq_pycuda.errors import InputError


def plain(node: Any) -> Any:
    """The config as plain dicts, lists and strings (enums by name), ready for JSON."""
    if is_dataclass(node):
        return {item.name: plain(getattr(node, item.name)) for item in fields(node)}
    if isinstance(node, Enum):
        return node.name
    if isinstance(node, list):
        return [plain(item) for item in node]
    return node


def as_yaml(config: Config) -> str:
    """The config as result files hold it."""
    text: str = yaml.safe_dump(plain(config), sort_keys=False)
    return text


def from_yaml(text: str) -> Config:
    """The checked config that a result file holds; a key that it lacks, of a later version, has its default.

    Raises:
        InputError: it is no config of this version or an earlier one.
    """
    try:
        tree = yaml.load(text, yaml.CSafeLoader)
    except (yaml.YAMLError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise InputError("config: is no mapping of keys; allowed: what a run has stored")
    config: Config = _filled(Config(), tree, "")
    check(config)
    return config


def _filled(node: Any, tree: Mapping[Any, Any], prefix: str) -> Any:
    """A copy of a part of the config with the values of a tree."""
    if isinstance(node, InputsConfig):
        kinds = {kind.kind: kind for kind in (SyntheticInputs, OutlierInputs, FileInputs)}
        kind = tree.get("kind")
        node = kinds[kind]() if isinstance(kind, str) and kind in kinds else node
    values: dict[str, Any] = {}
    known = {item.name for item in fields(node)}
    for name, value in tree.items():
        if name not in known:
            raise InputError(f"{prefix}{name}={value}: no such key; allowed: those of this version")
        own = getattr(node, name)
        if is_dataclass(own) and not isinstance(value, dict):
            raise InputError(f"{prefix}{name}={value}: is no group of keys; allowed: what a run has stored")
        values[name] = _filled(own, value, f"{prefix}{name}.") if is_dataclass(own) else value
    return replace(node, **values)


def config_hash(config: Config) -> str:
    """SHA-256 of the resolved config, independent of key order and of how it was overridden; 64 hex digits.

    `study` is left out: it says where results go, not what they are.
    """
    asked = plain(config)
    del asked["study"]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
