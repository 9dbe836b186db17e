"""A text as token ids: from its beginning, in order, as far as the tokens asked for need it."""

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from awq_pycuda.capturing.fault import Fault

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Around:
    """The special tokens that a tokenizer puts before and behind every text."""

    before: list[int]
    behind: list[int]

    def __len__(self) -> int:
        return len(self.before) + len(self.behind)


def hash_text(path: Path) -> str:
    """SHA-256 of the bytes of a UTF-8 text, 64 hex digits, read block by block.

    Raises `Fault` for a file that cannot be read, is not UTF-8 somewhere, or holds white space alone.
    """
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    blank = True
    done = 0
    try:
        with path.open("rb") as file:
            while True:
                block = file.read(_BLOCK)
                digest.update(block)
                held = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    where = done - held + error.start
                    raise Fault("text", f"is no UTF-8 (byte {where}: {error.reason})") from error
                blank = blank and not text.strip()
                done += len(block)
                if not block:
                    break
    except OSError as error:
        raise Fault("text", f"cannot be read ({error.strerror})") from error
    if blank:
        raise Fault("text", "is empty")
    return digest.hexdigest()


def read_windows(path: Path, tokenizer: Any, around: Around, tokens: int, length: int) -> list[list[int]]:
    """Cut the text's ids into windows of ``length`` with the special tokens ``around`` each, for ``tokens`` in all.

    The last window may be shorter, where the text ends. Raises `Fault` where the text has too few tokens.
    """
    step = length - len(around)
    ids = read_ids(path, tokenizer, ceil(tokens / length) * step)
    windows = [[*around.before, *ids[start : start + step], *around.behind] for start in range(0, len(ids), step)]
    found = sum(map(len, windows))
    if found < tokens:
        raise Fault("tokens", f"text={path} holds {found} tokens of this model", f"1 to {found}")
    return windows


def find_around(path: Path, tokenizer: Any) -> Around:
    """The special tokens of a tokenizer, told by what it makes of the text's beginning with them and without.

    Raises `Fault` where it does more than to put tokens around a text.
    """
    for text, whole in _prefixes(path, 256):
        plain = _encode(tokenizer, text)
        if plain or whole:
            break
    if not plain:
        raise Fault("text", "holds no tokens of this model")
    encoded = tokenizer(text, padding=False, truncation=False, return_special_tokens_mask=True, verbose=False)
    full, added = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    start = added.index(0) if 0 in added else 0
    end = start + len(plain)
    if full[start:end] != plain:
        raise Fault("model", "its tokenizer changes a text otherwise than by special tokens around it")
    return Around(full[:start], full[end:])


def read_ids(path: Path, tokenizer: Any, count: int) -> list[int]:
    """The first ``count`` ids of a text, without special tokens, or all where it has fewer.

    Only prefixes are tokenized. What follows a prefix changes ids near its end: a word or a merge goes on, a
    segmentation ends elsewhere. All usual models (BPE, WordPiece, Unigram) split the text before a place where both
    segmentations have a boundary alike, so that the first ids stand as soon as the longer of two prefixes, over twice
    as long, has the same: the text would have to put off a boundary for as long as all of the shorter one.
    """
    shorter: list[int] = []
    for text, whole in _prefixes(path, 8 * count + 4096):
        ids = _encode(tokenizer, text)
        if whole or (len(shorter) > count and shorter[:count] == ids[:count]):
            break
        shorter = ids
    return ids[:count]


def _prefixes(path: Path, characters: int) -> Iterator[tuple[str, bool]]:
    """Longer and longer beginnings of the text, each with whether it is all of it.

    A byte order mark is no part of a text, and a line ends with one newline, however the file writes it.
    """
    while True:
        try:
            with path.open(encoding="utf-8-sig") as file:
                text = file.read(characters)
                whole = not file.read(1)
        except OSError as error:
            raise Fault("text", f"cannot be read ({error.strerror})") from error
        yield text, whole
        if whole:
            return
        # Odd lengths: a text that repeats itself is not cut at the same place of its period again.
        characters = 2 * characters + 1


def _encode(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=False, padding=False, truncation=False, verbose=False)
    return list(encoded["input_ids"])
