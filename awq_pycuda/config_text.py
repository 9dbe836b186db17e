"""The config as plain data and text: what result files hold of it, and the hash that names its folder in a study."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import yaml

from awq_pycuda.config import Config


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


def config_hash(config: Config) -> str:
    """SHA-256 of the resolved config, independent of key order and of how it was overridden; 64 hex digits.

    `study` is left out: it says where results go, not what they are.
    """
    asked = plain(config)
    del asked["study"]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
