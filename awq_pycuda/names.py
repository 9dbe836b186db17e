"""Names of layers and runs where room is short: they tell most at their ends, and what all share tells nothing."""

from __future__ import annotations

from collections.abc import Sequence


def shorten(text: str, most: int = 40, mark: str = "…") -> str:
    """The text with its middle left out where it is too long."""
    if len(text) <= most:
        return text
    head = (most - len(mark)) // 2
    return f"{text[:head]}{mark}{text[len(text) - (most - len(mark) - head) :]}"


def without_shared(names: Sequence[str], separator: str = ".") -> list[str]:
    """Names without the leading parts that all of them have; at least the last part of each stays."""
    parts = [name.split(separator) for name in names]
    shared = 0
    if len(parts) > 1:
        while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
            shared += 1
    return [separator.join(part[shared:]) for part in parts]


def fitting(names: Sequence[str], room: int) -> tuple[list[str], str]:
    """Names of at most `room` characters: without the leading parts that all share, then without their middle.

    They stay as long as they are where shortening would make two of them the same.

    Returns:
        The names, and what was taken from the front of each.
    """
    if all(len(name) <= room for name in names):
        return list(names), ""
    own = without_shared(names)
    short = [shorten(name, room, "..") for name in own]
    return short if len(set(short)) == len(set(names)) else own, names[0][: len(names[0]) - len(own[0])]


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names with commas between; of very many the first ones, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
