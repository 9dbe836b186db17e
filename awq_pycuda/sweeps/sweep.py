"""A sweep as its user sees it: what the jobs report, wherever they run, the live display, and the table at the end.

Jobs append to files in one folder of the study, so that any launcher will do, on one machine or over a shared file
system; the process that started the sweep reads them.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Column, Table

from awq_pycuda.console import next_command, table_style
from awq_pycuda.locks import Lock, locked
from awq_pycuda.signals import importing
from awq_pycuda.spread import Spread, milliseconds, percent, percent_range
from awq_pycuda.sweeps.messages import Outcome, State

_POLL_SECONDS = 0.2
_ABANDONED_SECONDS = 30
_TITLE = "Jobs (pipeline: median of passes, noise IQR / median; error removed: median of layers)"
_SPREADS = ("pipeline_ms", "error_removed")  # of a job that is complete
_FINAL: tuple[State, ...] = ("complete", "failed", "skipped", "interrupted")


@dataclass(frozen=True)
class JobStatus:
    """The last that is known of a job."""

    state: State = "not run"
    reason: str = ""
    folder: str = ""
    seconds: float = 0.0
    pipeline_ms: Spread | None = None
    error_removed: Spread | None = None

    @classmethod
    def from_report(cls, event: Mapping[str, Any]) -> JobStatus:
        """What a `Reporter` wrote."""
        return cls(**{**event, **{key: Spread(**event[key]) for key in _SPREADS if key in event}})


class Reporter:
    """Tells the sweep of one process's jobs, and by a lock that the process lives.

    `folder`: the sweep's, the same for all of its processes.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{platform.node()}-{os.getpid()}.jsonl"
        self._alive = _life_lock(self._path)
        self.stopped = False  # a signal came: this process begins no further job

    def started(self, number: int) -> None:
        """Job `number` begins."""
        self._append({"job": number, "state": "running"})

    def ended(self, number: int, outcome: Outcome) -> None:
        """Job `number` is over."""
        self._append(
            {
                "job": number,
                "state": outcome.state,
                "reason": outcome.reason,
                "folder": "" if outcome.folder is None else str(outcome.folder),
                "seconds": outcome.seconds,
                **{key: asdict(spread) for key in _SPREADS if (spread := getattr(outcome, key)) is not None},
            }
        )

    def _append(self, event: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed the study meanwhile
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def _life_lock(report: Path) -> Lock | None:
    """None where the process that writes this report holds it."""
    return locked(report.with_suffix(".lock"))


def reporting_processes(folder: Path) -> dict[int, bool]:
    """The processes of this machine that report in `folder` and live: whether each is at work on a job now."""
    found: dict[int, bool] = {}
    for report in folder.glob(f"{glob.escape(platform.node())}-*.jsonl"):
        with suppress(OSError):  # the study's folder may go meanwhile
            *_, last, unfinished = b"", *report.read_bytes().split(b"\n")
            if _is_alive(report):
                at_work = bool(unfinished) or json.loads(last)["state"] == "running"
                found[int(report.stem.rpartition("-")[2])] = at_work
    return found


def _is_alive(report: Path) -> bool:
    """Whether the process that writes a report lives."""
    try:
        lock = _life_lock(report)
    except OSError:  # the study's folder is gone
        return False
    if lock is None:
        return True
    lock.release()
    return False


@dataclass
class Sweep:
    """The jobs of a sweep, by number.

    `folder` is where they report; `labels` are the overrides that tell them apart; `study` is what the user sees.
    `abandoned`: the launcher waited for a job whose process is gone, so this process's main thread was interrupted.
    """

    study: Path
    folder: Path
    labels: Sequence[str]
    console: Console
    jobs: list[JobStatus] = field(init=False)
    abandoned: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.jobs = [JobStatus()] * len(self.labels)
        self._read: dict[Path, int] = {}
        self._reports: dict[int, Path] = {}
        self._begin = self._last_wait = time.perf_counter()
        self._stopped = False
        self._wake, self._looked = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self, complete: int = 0) -> None:
        """Says what is about to run, and how much of it is complete already; begins the live display."""
        already = f", {complete} complete already" if complete else ""
        self._print(f"study {self.study}: {len(self.labels)} jobs{already}")
        self._thread.start()

    def finish(self, wait: bool = True) -> list[JobStatus]:
        """Waits for jobs still running, ends the display, waits for those of other sweeps, prints the tables.

        Returns the jobs. With `wait` False, and after a signal, it waits for none.
        """
        with suppress(KeyboardInterrupt):
            # A launcher that gave up on one job may have left others running.
            self._looked.clear()
            self._wake.set()
            self._looked.wait(_POLL_SECONDS)
            while wait and any(map(self._runs, range(len(self.jobs)))):
                time.sleep(_POLL_SECONDS)
        with suppress(KeyboardInterrupt):
            self._stopped = True
            self._wake.set()
            self._thread.join()
        with suppress(KeyboardInterrupt):
            if wait:
                self._settle_elsewhere()
        self.jobs = [
            replace(job, state="failed", reason="the process that ran it ended") if job.state == "running" else job
            for job in self.jobs
        ]
        with suppress(KeyboardInterrupt):
            self._print_tables()
        return self.jobs

    def _runs(self, number: int) -> bool:
        """Whether a process is at work on the job, by what is known of it so far."""
        return self.jobs[number].state == "running" and _is_alive(self._reports[number])

    def _watch(self) -> None:
        on_terminal = self.console.is_terminal
        live = Live(console=self.console, auto_refresh=False, transient=True)
        with live if on_terminal else nullcontext():
            stopped = False
            took = 0.0
            while not stopped:
                # A cluster's jobs have a file each: thousands of them are looked at less often.
                self._wake.wait(max(_POLL_SECONDS, 10 * took))
                self._wake.clear()
                stopped = self._stopped
                begin = time.perf_counter()
                for number in self._poll():
                    if not on_terminal:
                        self._print_job(number)
                if on_terminal:
                    live.update(self._display(), refresh=True)
                if not stopped:
                    self._interrupt_if_abandoned()
                self._looked.set()
                took = time.perf_counter() - begin

    def _poll(self) -> list[int]:
        """Takes in what the jobs have reported since; the jobs that a run of theirs has ended."""
        ended: list[int] = []
        try:
            entries = list(os.scandir(self.folder))
        except OSError:  # not made yet, or gone
            return ended
        for entry in entries:
            path = Path(entry.path)
            if path.suffix != ".jsonl":
                continue
            for line in self._new_lines(path):
                event = json.loads(line)
                number = event.pop("job")
                self._reports[number] = path
                self.jobs[number] = JobStatus.from_report(event)
                if event["state"] in ("complete", "failed", "interrupted"):
                    ended.append(number)
        return ended

    def _new_lines(self, path: Path) -> list[bytes]:
        """The lines that a report has got since; none where it is gone."""
        begin = self._read.get(path, 0)
        try:
            if path.stat().st_size == begin:
                return []
            with open(path, "rb") as file:
                file.seek(max(0, begin - 1))
                if begin and file.read(1) != b"\n":  # removed and made anew
                    begin = file.seek(0)
                # A line may be half there yet: it is left for the next time.
                whole, end, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._read[path] = begin + len(whole + end)
        return whole.split(b"\n") if whole else []

    def _interrupt_if_abandoned(self) -> None:
        """Slurm without accounting never tells that a job was killed, and its launcher then waits for ever."""
        waiting = any(job.state == "not run" or self._runs(number) for number, job in enumerate(self.jobs))
        now = time.perf_counter()
        if waiting:
            self._last_wait = now
        if now - self._last_wait > _ABANDONED_SECONDS and not self.abandoned:
            self.abandoned = True
            # Unlike _thread.interrupt_main, a signal also ends the sleep that the launcher may be in.
            # SIGINT is ignored in a background job of a shell.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _settle_elsewhere(self) -> None:
        """Jobs that another sweep was running when their turn came: what became of them."""
        elsewhere = [number for number, job in enumerate(self.jobs) if job.state == "elsewhere"]
        if elsewhere:
            self._print(f"waiting for {len(elsewhere)} jobs that another sweep of this study runs")
        for number in elsewhere:
            while (settled := _settled(self.jobs[number])) is None:
                time.sleep(_POLL_SECONDS)
            self.jobs[number] = settled

    def _display(self) -> Table:
        count = Counter(job.state for job in self.jobs)
        over = sum(count[state] for state in _FINAL)
        ran = count["complete"] + count["failed"]
        elapsed = time.perf_counter() - self._begin
        parts = [f"{over}/{len(self.jobs)}", f"{count['complete']} done", f"{count['failed']} failed"]
        parts += [f"{count['skipped']} skipped", f"{count['running']} running"]
        if count["elsewhere"]:
            parts.append(f"{count['elsewhere']} in another sweep")
        # Jobs already complete take no time, so only those that ran tell how long the rest will take.
        if ran and over < len(self.jobs):
            parts.append(f"{clock(elapsed / ran * (len(self.jobs) - over))} left")
        line = Table.grid(padding=(0, 1))
        line.add_row(ProgressBar(total=len(self.jobs), completed=over, width=20), ", ".join(parts))
        return line

    def _print(self, line: str) -> None:
        # A full or closed stdout must not cost the sweep; rich ends the process when its reader is gone.
        with suppress(OSError, SystemExit):
            self.console.print(line, soft_wrap=True, markup=False)

    def _print_job(self, number: int) -> None:
        job = self.jobs[number]
        over = sum(other.state in _FINAL for other in self.jobs)
        reason = f": {_first_line(job.reason)}" if job.reason else ""
        self._print(f"[{over}/{len(self.jobs)}] {job.state}  {self.labels[number]}  {job.seconds:.2f} s{reason}")

    def _print_tables(self) -> None:
        style = table_style(self.console)
        table = Table("job", Column("overrides", overflow="fold"), box=style, collapse_padding=True)
        table.add_column("state", no_wrap=True)
        for heading in ("seconds", "pipeline\nms", "noise", "error\nremoved", "quartiles"):
            table.add_column(heading, justify="right", no_wrap=True)
        for number, (label, job) in enumerate(zip(self.labels, self.jobs, strict=True)):
            time_ms, removed = (getattr(job, key) or Spread.of([]) for key in _SPREADS)
            figures = (milliseconds(time_ms.median), percent(time_ms.noise, 0), percent(removed.median))
            seconds = f"{job.seconds:.2f}" if job.seconds else "-"
            table.add_row(str(number), escape(label), job.state, seconds, *figures, percent_range(removed))
        failed = Table("job", Column("reason", overflow="fold"), box=style, title="Failed", title_justify="left")
        for number, job in enumerate(self.jobs):
            if job.state in ("failed", "interrupted"):
                failed.add_row(str(number), escape(_first_line(job.reason)))
        count = Counter(job.state for job in self.jobs)
        self._print(_TITLE)
        with suppress(OSError, SystemExit):
            self.console.print(table)
            if failed.row_count:
                self.console.print(failed)
        states = (f"{count[state]} {state}" for state in get_args(State) if count[state])
        self._print(f"{len(self.jobs)} jobs: {', '.join(states)}; results in {self.study}")
        if count["complete"] or count["skipped"]:
            self._print(f"next: {next_command(self.study)}")


def _settled(job: JobStatus) -> JobStatus | None:
    """What became of a job that another sweep runs; None while it still does."""
    with importing():
        from awq_pycuda.results.status import read_status
        from awq_pycuda.sweeps.study import claim
    folder = Path(job.folder)
    try:
        with claim(folder) as free:
            if not free:
                return None
            status, error = read_status(folder) or ("failed", "another sweep left it unfinished")
    except OSError as trouble:  # the study's folder cannot be used any more
        status, error = "failed", str(trouble)
    return replace(job, state="skipped" if status == "complete" else "failed", reason=error)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def clock(seconds: float) -> str:
    """A time as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
