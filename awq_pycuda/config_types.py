"""The types of the config's keys, and whether a value is of one."""

from __future__ import annotations

import sys
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


@cache
def hints(schema: Any) -> dict[str, Any]:
    """The type of each field of a dataclass, by name, looked up once."""
    return get_type_hints(schema)


def fits(kind: Any, value: object) -> bool:
    """Whether a value is of the type of a key: no text is a number, no number is a truth value, none is rounded.

    Args:
        kind: as `config.TYPES` has it.
        value: an enum's member may also be given by its name.
    """
    if get_origin(kind) is UnionType:
        return any(fits(part, value) for part in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(get_args(kind)[0], item) for item in value)
    if issubclass(kind, Enum):
        return isinstance(value, kind) or (isinstance(value, str) and value in kind.__members__)
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)
    return type(value) is kind
