"""Gives jobs to worker processes, one for each GPU: kept while healthy, replaced when not, and their death told."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from awq_pycuda.config import BackendChoice, Config
from awq_pycuda.signals import importing, stoppable
from awq_pycuda.sweeps import hosts
from awq_pycuda.sweeps.hosts import Host, Worker, WorkerDied
from awq_pycuda.sweeps.messages import Checked, Finished, Job, Outcome, Question, Started

_ASKED_AHEAD = 8  # batches that may wait for their answers: workers that still start do not hold up the planning

Answered = Generator[tuple[Sequence[Config], list[Checked]], None, None]


def checked(batches: Iterable[Sequence[Config]]) -> Answered:
    """What speaks against each config on this machine, and where it would run: `validate`, shared among the workers.

    Args:
        batches: of configs; each is asked for while the workers check those before.

    Yields:
        Each batch with its answers.

    Raises:
        WorkerDied: it could not be found out.
        KeyboardInterrupt: a signal.
    """
    waiting: deque[tuple[Sequence[Config], list[Worker]]] = deque()
    trouble: Exception | None = None
    upcoming = iter(batches)
    try:
        while True:
            try:
                configs = next(upcoming, None)
            except Exception as error:  # told after what is wrong with a config before it
                configs, trouble = None, error
            if configs is not None:
                waiting.append((configs, _ask(configs)))
            if not waiting:
                break
            if configs is None or len(waiting) > _ASKED_AHEAD:
                answers = _answers(*waiting[0])
                yield waiting.popleft()[0], answers
    finally:
        if waiting:
            hosts.close_workers()  # they may be about to answer
    if trouble is not None:
        raise trouble


def described(batches: Iterable[Sequence[Config]]) -> Answered:
    """As `checked`, of what does not depend on the machine that will run the jobs."""
    with importing():
        from awq_pycuda.layers.inputs import plan_layers
    for configs in batches:
        for config in configs:
            plan_layers(config)
        yield configs, [Checked(None)] * len(configs)


def _ask(configs: Sequence[Config]) -> list[Worker]:
    """Gives each worker a share of the configs."""
    workers = [_worker(host, configs[0]) for host in hosts.every()[: len(configs)]]
    for index, worker in enumerate(workers):
        worker.send(Question(configs[index :: len(workers)], Path.cwd()))
    return workers


def _answers(configs: Sequence[Config], workers: Sequence[Worker]) -> list[Checked]:
    answers: list[list[Checked]] = [worker.receive() for worker in workers]
    return [answers[index % len(workers)][index // len(workers)] for index in range(len(configs))]


def _worker(host: Host, config: Config) -> Worker:
    return host.worker(on_gpu=config.backend is not BackendChoice.cpu)


@dataclass
class _Running:
    """A job that a worker has been given."""

    host: Host
    worker: Worker
    started: list[Started] = field(default_factory=list)

    def outcome(self) -> Outcome | None:
        """Waits for the worker's next message; what became of the job, where that is what it tells."""
        try:
            message: Started | Finished = self.worker.receive()
        except WorkerDied as death:
            return self.ended(_outcome_of_death(str(death), self.started), usable=False)
        if isinstance(message, Started):
            self.started.append(message)
            return None
        return self.ended(message.outcome, message.usable)

    def given_up(self, error: Exception) -> Outcome:
        """Ends the worker in the middle of the job."""
        self.host.close()
        return self.ended(_outcome_of_death(f"{type(error).__name__}: {error}", self.started), usable=False)

    def ended(self, outcome: Outcome, usable: bool) -> Outcome:
        """What became of the job; a worker that is of no more use goes."""
        if not usable or self.worker.interrupted:
            self.host.close()
        return replace(outcome, stop=self.worker.interrupted)


def run_isolated(job: Job) -> Outcome:
    """Runs a job in the worker. Whatever happens there comes back as an outcome, and is in the job's result file."""
    running = _Running(hosts.first(), _worker(hosts.first(), job.config))
    try:
        # Raised here, a signal could fall between two messages and leave the worker alone with the job.
        with stoppable(running.worker.interrupt, held=True):
            running.worker.send(job)
            while (outcome := running.outcome()) is None:
                pass
    except Exception as error:
        # Raised in the middle by a signal handler of a launcher's, such as submitit's when Slurm's time is up.
        return running.given_up(error)
    return outcome


def run_all(jobs: Iterable[Job], on_started: Callable[[int], None], on_ended: Callable[[int, Outcome], None]) -> None:
    """Runs jobs in the workers, in their order, each as soon as a worker is free, until a signal comes.

    While the workers are at work the next jobs are made ready, one for each.

    Args:
        jobs: each is asked for when its turn is near.
        on_started: told the number of a job that a worker is given.
        on_ended: told the number of a job and what became of it, as `run_isolated` returns it.
    """
    at_work: dict[Connection, tuple[int, _Running]] = {}

    def interrupt(number: signal.Signals) -> None:
        for _, running in at_work.values():
            running.worker.interrupt(number)

    upcoming = enumerate(jobs)
    ready: deque[tuple[int, Job]] = deque()
    more = True

    def make_ready() -> None:
        nonlocal more
        following = next(upcoming, None)
        if following is None:
            more = False
        else:
            ready.append(following)

    with stoppable(interrupt, held=True) as stop:
        while at_work or ((ready or more) and stop.number is None):
            if more and not ready and stop.number is None:
                make_ready()
                continue
            busy = [running.host for _, running in at_work.values()]
            idle = [host for host in hosts.every() if host not in busy]
            if idle and ready and stop.number is None:
                number, job = ready.popleft()
                worker = _worker(idle[0], job.config)
                at_work[worker.connection] = number, _Running(idle[0], worker)
                if stop.number is not None:  # it came before `interrupt` knew of this worker, or was its first
                    del at_work[worker.connection]
                    idle[0].close()
                    continue
                on_started(number)
                worker.send(job)
                continue
            if not (ready or more):
                for host in idle:  # a GPU's context takes a moment to go
                    host.dismiss()
            # Several workers may end at about the same time: each finds its next job made already.
            enough = not more or len(ready) >= len(hosts.every()) or stop.number is not None
            ended = wait([*at_work], None if enough else 0)
            if not ended:
                make_ready()
            for connection in ended:
                assert isinstance(connection, Connection)
                number, running = at_work[connection]
                if (outcome := running.outcome()) is not None:
                    del at_work[connection]
                    on_ended(number, outcome)


def _outcome_of_death(reason: str, started: Sequence[Started]) -> Outcome:
    if not started:
        return Outcome("failed", reason)
    # What reads and writes result files takes its time to import, and few sweeps see a death.
    with importing():
        from awq_pycuda.results.status import read_status
        from awq_pycuda.sweeps.study import store_death
    folder, origin = started[0].folder, started[0].origin
    try:
        store_death(folder, origin, reason)
    except OSError as error:
        return Outcome("failed", f"{reason}\n{error}", folder)
    status, _ = read_status(folder) or ("failed", "")
    return Outcome("complete" if status == "complete" else "failed", reason, folder)
