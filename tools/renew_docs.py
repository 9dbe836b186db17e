"""Runs the commands of the documents, in order, and renews what they show.

    python tools/renew_docs.py                     run everything, rewrite outputs and tables in place
    python tools/renew_docs.py --check [DOCUMENT]  run everything, tell what is not as the documents say; exit code 1
    python tools/renew_docs.py --check --quick     the same without what is marked slow: what the tests run

Each document has a scratch folder in which all its blocks run, from the first to the last, on the CPU:

    ```console    commands after `$ `, each with its output, stdout and stderr
    ```sh         commands that must succeed; what they print is not shown
    ```python     scripts; those that follow each other without another command between them run as one
    <!-- renewed by: COMMAND --> ... <!-- end -->     what COMMAND prints stands between the two lines

Pictures that a command writes under docs/ or experiments/pictures/ are renewed and checked, too.

A line `<!-- slow: WHY -->` or `<!-- not run: WHY -->` above a block says that it takes minutes, or cannot run here.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("console", "sh", "python")
LINKED = ("Makefile", "tools")  # what documents name by paths that start at the checkout
COPIED = ("docs", "experiments")  # the same, but commands also write there
PICTURES = ("docs/*.svg", "experiments/pictures/*.svg")
_MARK = re.compile(r"<!-- (slow|not run): .+ -->")
_TABLE = re.compile(r"<!-- renewed by: (.+) -->")
_TABLE_END = "<!-- end -->"

# What differs from run to run or from machine to machine, and must not count as a difference. Everything else must be
# the same to the last character.
VOLATILE = (
    (re.compile(r"\S*outputs/(sweeps/)?\d{4}-\d\d-\d\d/[\d-]+"), "outputs/<date>"),
    (re.compile(r"(?<![\w.])(?=\w*[a-f])(?=\w*\d)[0-9a-f]{8,64}\b"), "<hash>"),
    (re.compile(r"(?<![\w.])\d[\d,.]*(?: to \d[\d,.]*)? (?:ms|s|min|h)(?!\w)"), "<time>"),
    (re.compile(r"(IQR) [\d.,]+ to [\d.,]+"), r"\1 <time>"),
    (re.compile(r"( to [\d.]+ %) +[\d.,]+ +(?:\d+ %|-)$"), r"\1 <time>"),  # of a table of runs
    (re.compile(r"^backend cpu \(.*"), "backend cpu"),
    (re.compile(r"cpu on .*"), "cpu on <device>"),
    (re.compile(r"^(times|fail_on=\w+): .*"), r"\1: <verdicts>"),
    (re.compile(r"[ ─━]{2,}"), " "),  # columns are as wide as their widest number
    (re.compile(r"% [\d.]+ (\d+ %|-)$"), "% <time>"),  # the table of runs ends with the pipeline's time and its noise
    (re.compile(r"file://\S+(?=/report/report\.html)"), "file://<folder>"),
)
# Lines below such a heading, as far as they are indented, hold times only.
_TIMES = re.compile(r"^(Stage times|Times)\b")
_VERDICT = re.compile(r"\b(slower|faster|same|unclear)\b")
_NUMBER = re.compile(r"\d[\d,.]*")
# The last bits of a product follow the machine's BLAS: a figure with decimals may differ by one in its last place, or
# by this share of it where it is longer.
_SHARE = 1e-4
_DECIMAL = re.compile(r"(\d*\.\d+(?:e[+-]?\d+)?)")
# In a picture a mark follows its figure, and a label is the figure without decimals.
_POSITION = re.compile(r'(?<= )((?:x|y|width|height)="-?[\d.]+")')
_PIXEL = 0.5
_LABEL = re.compile(r"(?<=>)(-?\d+)(?=<)")


@dataclass
class Block:
    """A fenced block or a table: its lines, and the marks around them."""

    kind: str  # one of LANGUAGES, or "table"
    opening: str
    lines: list[str]
    closing: str
    line: int
    mark: str | None = None


@dataclass
class Scratch:
    """A folder that looks like a fresh checkout to relative paths, where `python` is the interpreter in use."""

    folder: Path
    status: int = 0
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = self.folder / ".bin"
        programs.mkdir()
        python = programs / "python"
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
        python.chmod(0o755)
        for name in LINKED:
            (self.folder / name).symlink_to(ROOT / name)
        for name in COPIED:
            shutil.copytree(ROOT / name, self.folder / name)
        self.environment = os.environ | {
            "PATH": os.pathsep.join((str(programs), os.environ["PATH"])),
            "PYTHONPATH": str(ROOT),
            "MAKEFLAGS": "PYTHON=python",
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "80",
        }
        for name in ("FORCE_COLOR", "MAKELEVEL"):  # a make within a make says which folder it enters
            self.environment.pop(name, None)

    def run(self, command: Sequence[str]) -> str:
        """What a command prints, with the scratch folder's path as `…`; `status` is its exit code."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            check=False,
        )
        self.status = done.returncode
        return done.stdout.replace(str(self.folder.resolve()), "…").replace(str(self.folder), "…")


def parse(text: str) -> list[str | Block]:
    """A document as its lines and blocks, in order; joined by `unparse` it is the text again.

    Raises:
        ValueError: a block of another language, a mark that marks nothing, or a block without an end.
    """
    parts: list[str | Block] = []
    lines = iter(enumerate(text.splitlines(), 1))
    mark: tuple[int, str] | None = None
    for number, line in lines:
        table = _TABLE.fullmatch(line)
        if not line.startswith("```") and table is None:
            if mark is not None:
                raise ValueError(f"line {mark[0]}: a mark with no block below it")
            if found := _MARK.fullmatch(line):
                mark = number, found[1]
            parts.append(line)
            continue
        kind = "table" if table else line.removeprefix("```")
        if kind not in (*LANGUAGES, "table"):
            raise ValueError(f"line {number}: a block of {kind or 'no language'}; known are {', '.join(LANGUAGES)}")
        body: list[str] = []
        end = _TABLE_END if table else "```"
        for _, inner in lines:
            if inner == end:
                break
            body.append(inner)
        else:
            raise ValueError(f"line {number}: a block without its end, {end}")
        parts.append(Block(kind, line, body, end, number, mark and mark[1]))
        mark = None
    return parts


def unparse(parts: Sequence[str | Block]) -> str:
    """The text of a document."""
    lines: list[str] = []
    for part in parts:
        lines += [part] if isinstance(part, str) else [part.opening, *part.lines, part.closing]
    return "\n".join(lines) + "\n"


def commands(lines: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
    """The commands of a console block, each with the lines of its output."""
    command: list[str] = []
    output: list[str] = []
    for line in lines:
        if line.startswith("$ "):
            if command:
                yield command, output
            command, output = [line], []
        elif command and not output and command[-1].endswith("\\"):
            command.append(line)
        else:
            output.append(line)
    if command:
        yield command, output


def renewed(parts: Sequence[str | Block], scratch: Scratch, quick: bool = False) -> list[str | Block]:
    """The document with every output as it is today.

    Raises:
        RuntimeError: a script failed.
    """
    result: list[str | Block] = []
    scripts: list[str] = []
    for index, part in enumerate(parts):
        if isinstance(part, str) or part.mark == "not run" or (quick and part.mark == "slow"):
            result.append(part)
            continue
        lines = part.lines
        if part.kind == "python":
            scripts += [*lines, ""]
            later = next((p for p in parts[index + 1 :] if isinstance(p, Block) and p.mark != "not run"), None)
            if later is None or later.kind != "python":
                _must_succeed(part, scratch, [sys.executable, "-c", "\n".join(scripts)])
                scripts = []
        elif part.kind == "sh":
            _must_succeed(part, scratch, ["bash", "-euo", "pipefail", "-c", "\n".join(lines)])
        elif part.kind == "table":
            found = _TABLE.fullmatch(part.opening)
            assert found is not None
            lines = _must_succeed(part, scratch, ["bash", "-c", found[1]]).splitlines()
        else:
            lines = []
            for command, _ in commands(part.lines):
                typed = "\n".join(command).removeprefix("$ ")
                printed = scratch.run(["bash", "-c", f"(exit {scratch.status})\n{typed}"])
                lines += [*command, *(line.rstrip() for line in printed.splitlines())]
        result.append(Block(part.kind, part.opening, lines, part.closing, part.line, part.mark))
    return result


def _must_succeed(block: Block, scratch: Scratch, command: Sequence[str]) -> str:
    printed = scratch.run(command)
    if scratch.status:
        raise RuntimeError(f"line {block.line}: exit code {scratch.status}\n{printed}")
    return printed


def comparable(lines: Sequence[str]) -> list[str]:
    """Lines with what may differ masked."""
    result = []
    times = False
    for line in lines:
        times = bool(_TIMES.match(line)) or (times and line.startswith(" "))
        masked = _VERDICT.sub("<verdict>", _NUMBER.sub("#", line)) if times else line
        for pattern, mask in VOLATILE:
            masked = pattern.sub(mask, masked)
        result.append(masked.rstrip())
    return result


def alike(said: str, seen: str) -> bool:
    """Whether two lines are the same, but for the last place of figures with decimals."""
    if said == seen:
        return True
    # Figures stand at the odd places.
    old, new = _DECIMAL.split(said), _DECIMAL.split(seen)
    return len(old) == len(new) and all(
        _close(a, b) if index % 2 else re.sub(r" +", " ", a) == re.sub(r" +", " ", b)
        for index, (a, b) in enumerate(zip(old, new, strict=True))
    )


def _close(said: str, seen: str) -> bool:
    places = len(said.partition("e")[0].partition(".")[2])
    last = 10.0**-places if "e" not in said else 0.0
    return abs(float(said) - float(seen)) <= 1.01 * max(last, _SHARE * abs(float(said)))


def picture_alike(said: str, seen: str) -> bool:
    """Whether two lines of a picture are the same, but for the last place of figures and what is drawn by it."""
    for pattern, bound in ((_POSITION, _PIXEL), (_LABEL, 1.0)):
        old, new = pattern.findall(said), pattern.findall(seen)
        if len(old) != len(new) or any(abs(_value(a) - _value(b)) > bound for a, b in zip(old, new, strict=True)):
            return False
        said, seen = pattern.sub("#", said), pattern.sub("#", seen)
    return alike(said, seen)


def _value(text: str) -> float:
    return float(text.rpartition("=")[2].strip('"'))


def all_alike(said: Sequence[str], seen: Sequence[str]) -> bool:
    """Whether two texts are alike, line by line."""
    return len(said) == len(seen) and all(map(alike, said, seen))


def differences(before: Sequence[str | Block], after: Sequence[str | Block]) -> list[str]:
    """What is not as the document says, beyond what may differ: one text per block."""
    found = []
    for old, new in zip(before, after, strict=True):
        if isinstance(old, str) or isinstance(new, str):
            continue
        said, seen = comparable(old.lines), comparable(new.lines)
        if not all_alike(said, seen):
            found.append(f"line {old.line}:\n" + "\n".join(difflib.unified_diff(said, seen, "said", "seen", "", "", 1)))
    return found


def documents() -> list[Path]:
    """Every document whose commands are run."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *studies()]


def studies() -> list[Path]:
    """The pages of the studies."""
    return sorted(ROOT.glob("experiments/*.md"))


def check(document: Path, quick: bool = False, write: bool = False) -> list[str]:
    """Runs a document's commands; what is not as it says. With `write` the document is renewed."""
    before = parse(document.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="docs-") as folder:
        try:
            after = renewed(before, Scratch(Path(folder)), quick)
        except RuntimeError as error:
            return [str(error)]
        found = differences(before, after)
        for drawn in (path for pattern in PICTURES for path in Path(folder).glob(pattern)):
            kept = ROOT / drawn.relative_to(folder)
            said, seen = (
                path.read_text(encoding="utf-8").splitlines() if path.exists() else [] for path in (kept, drawn)
            )
            if len(said) != len(seen) or not all(map(picture_alike, said, seen)):
                found.append(f"{kept.relative_to(ROOT)} is drawn otherwise today")
                if write:
                    shutil.copyfile(drawn, kept)
    if write:
        document.write_text(unparse(after), encoding="utf-8")
    return found


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="*", type=Path, metavar="DOCUMENT", help="default: all")
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--quick", action="store_true", help="leave out what is marked slow")
    asked = parser.parse_args()
    failed = 0
    for document in asked.documents or documents():
        begin = time.monotonic()
        found = check(document.resolve(), asked.quick, write=not asked.check)
        name = document.resolve().relative_to(ROOT)
        print(f"{name}: {len(found)} differ, {time.monotonic() - begin:.0f} s", flush=True)
        for text in found:
            print(f"{name}, {text}", flush=True)
        failed += len(found)
    return int(asked.check and failed > 0)


if __name__ == "__main__":
    sys.exit(main())
