"""What a table of all that a kind of file holds is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

Type = Literal["f8", "f4", "i8", "i1", "u1", "bool", "str", "S64"]
Presence = Literal["always", "complete", "optional"]
Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Entry:
    """A group, a dataset or an attribute of a result file."""

    path: str
    """From the file's root; `/@name` at its end is an attribute. What is below a layer is there for each."""
    description: str
    """What it holds; stored beside a dataset."""
    type: Type | None = None
    """As NumPy writes it, `str` for text of any length; None for a group."""
    dims: tuple[str, ...] = ()
    """Names of the dimension scales, in the same group or above. A dataset along itself is such a scale. A dimension
    whose scale is optional is there where its scale is."""
    units: str = "1"
    presence: Presence = "always"
    """Whether it is in every file, in those of complete runs, or only where there is something to say; of files that
    have its group."""
    since: int = 1
    """The schema version from which it exists."""
    better: Better | None = None
    """Which end of a figure is the good one; None for what is no figure of merit."""
    note: str = ""
    """What the page adds to the description."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2].removeprefix("@")

    @property
    def parent(self) -> str:
        """The path of the group that it is in."""
        return self.path.rpartition("/")[0] or "/"

    @property
    def is_attribute(self) -> bool:
        """Whether it is an attribute of its group."""
        return "@" in self.path

    @property
    def is_scale(self) -> bool:
        """Whether it is a dimension scale: a coordinate that others attach to."""
        return self.dims == (self.name,)

    def needed(self, version: int, complete: bool) -> bool:
        """Whether a file of this schema version that has its group must have it."""
        return version >= self.since and (self.presence == "always" or (complete and self.presence == "complete"))


class Layout(Protocol):
    """A table of all that a kind of file holds, such as `results.schema`."""

    NAME: str
    VERSION: int

    def entry(self, path: str) -> Entry:
        """The entry of this path."""


def entry_of(table: Iterable[Entry], path: str, file: str) -> Entry:
    """The entry of this path in the table of a kind of file.

    Raises:
        KeyError: there is none.
    """
    for each in table:
        if each.path == path:
            return each
    raise KeyError(f"{path} is not in the schema of {file}")
