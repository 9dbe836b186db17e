"""What commands print on: a console for terminals and logs alike, a bar of progress, lines that are not folded."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_PLAIN_WIDTH = 160  # lines of a log or a pipe are not folded to a terminal's width


def make_console(stderr: bool = False) -> Console:
    """A console that styles on a terminal and writes plain aligned text elsewhere."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_PLAIN_WIDTH)


def table_style(console: Console) -> box.Box | None:
    """Lines under the headings on a terminal, none elsewhere."""
    return box.SIMPLE_HEAD if console.is_terminal else None


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yields what `Pipeline.run` reports to: a bar on a terminal that goes when done, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def print_line(console: Console, line: str) -> None:
    """One line, not folded, whatever it looks like."""
    console.print(line, soft_wrap=True, markup=False)


def next_command(folder: Path) -> str:
    """The command that analyses the results below a folder, as a shell takes it."""
    return f"python -m awq_pycuda.analyze {shlex.quote(str(folder))}"
