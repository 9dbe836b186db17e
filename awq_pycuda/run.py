"""`python -m awq_pycuda.run`: compose, validate, run, store, summarise; one run, or with -m a sweep.

Beside this module only some of `sweeps` use Hydra.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Before the imports below, which take a moment. Through the module's own name: launchers send the job function to
    # other processes by name, not by value.
    from awq_pycuda import ahead

    ahead.begin(sys.argv[1:])
    from awq_pycuda.run import main as command

    ahead.imported()
    sys.exit(command())

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins import basic_sweeper
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from awq_pycuda import __version__, streams
from awq_pycuda.config import BackendChoice, SearchPlace
from awq_pycuda.config_text import as_yaml
from awq_pycuda.console import make_console, print_line, progress
from awq_pycuda.errors import InputError, RunFailed
from awq_pycuda.paths import resource_dir
from awq_pycuda.signals import came_between_jobs, importing, stoppable
from awq_pycuda.sweeps import hosts, isolation
from awq_pycuda.sweeps.composition import Plan, register_schemas, task_overrides, to_config
from awq_pycuda.sweeps.hydra_errors import explain, hydra_overrides
from awq_pycuda.sweeps.launchers import end_with_sweep, prepare_launcher, stop_processes
from awq_pycuda.sweeps.messages import Job
from awq_pycuda.sweeps.overrides import check_overrides, split
from awq_pycuda.sweeps.sweep import Reporter, Sweep, clock

_CHECKED_AT_ONCE = 64  # jobs sent to the workers together, while the next are planned
_QUIET_JOBS = 1000  # planning more than these takes long enough to be told
_TELL_SECONDS = 30  # between two lines about the planning where there is no terminal


class _RunHere(BaseException):
    """Leaves Hydra when every job is planned: its own launcher would compose each of them again, at 0.1 s a job."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan


class Preflight(Callback):
    """Runs before Hydra makes any folder: bad input ends here, with nothing written. `sweep`: the one that began."""

    sweep: Sweep | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks the one job."""
        with _exit_on_error():
            for override in config.hydra.overrides.task:
                if override.startswith(("study=", "experiment=")):
                    raise InputError(f"{override}: a study is a sweep; allowed: with -m")
            with importing():
                from awq_pycuda.engine.execution import validate  # see `job`
            validate(to_config(config))
            _check_writable("hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks every job of a sweep, and begins its display."""
        with _exit_on_error():
            plan = Plan(config)
            console = make_console()
            complete = _check_sweep(config, plan, console)
            folder = _check_writable("hydra.sweep.dir", config.hydra.sweep.dir)
            reports = Path.cwd() / folder / config.hydra.sweep.subdir
            Preflight.sweep = Sweep(folder, reports, plan.labels, console)
            Preflight.sweep.start(complete)
            # Every job is checked: the sweeper would compose each of them again for that, at 0.1 s a job.
            # Hydra's plugin scan has made the class anew since the module was first imported.
            setattr(basic_sweeper.BasicSweeper, "validate_batch_is_legal", lambda self, batch: None)  # noqa: B010
        if str(config.hydra.launcher._target_).endswith(".BasicLauncher"):
            raise _RunHere(plan)


def _check_sweep(config: DictConfig, plan: Plan, console: Console) -> int:
    """Checks every job of a sweep; how many of them are complete already."""
    for override in config.hydra.overrides.hydra:
        if override.startswith("hydra.sweep.subdir="):
            raise InputError(f"{override}: a job's folder is named after its config; allowed: study=NAME for the sweep")
    launcher = str(config.hydra.launcher._target_)
    here = launcher.rpartition(".")[2] in ("BasicLauncher", "JoblibLauncher")
    if launcher.endswith(".BasicLauncher") and config.backend is not BackendChoice.cpu:
        hosts.use_every_gpu()
    study = Path(config.hydra.sweep.dir)
    finished = _finished(study)
    seen = set(finished.values())
    complete, one_at_a_time = 0, False
    batches = plan.batches(_CHECKED_AT_ONCE)
    with (
        _planning(console, len(plan)) as advance,
        closing(isolation.checked(batches) if here else isolation.described(batches)) as answered,
    ):
        for configs, answers in answered:
            for answer in answers:
                if answer.refusal is not None:
                    raise InputError(answer.refusal)
            # Jobs at work on the host would disturb each other's times.
            one_at_a_time |= any(answer.backend != "cuda" for answer in answers)
            one_at_a_time |= any(each.search.where is SearchPlace.host for each in configs)
            # On which devices the jobs of other launchers will run is not known yet: any that this study has run on
            # may be theirs.
            devices = [{(answer.backend, answer.device)} if here else seen for answer in answers]
            for each, its_devices in zip(configs, devices, strict=True):
                if places := its_devices & seen:
                    complete += _is_among(finished, study, each, places)
            advance(len(configs))
    if one_at_a_time:
        hosts.use_one_worker()
    prepare_launcher(config)
    if not launcher.endswith(".BasicLauncher"):
        hosts.leave()
    return complete


# What reads result files is imported where there are any.
def _finished(study: Path) -> dict[str, tuple[str, str]]:
    if not study.exists():
        return {}
    with importing():
        from awq_pycuda.sweeps.study import complete_jobs
    return complete_jobs(study)


def _is_among(finished: Collection[str], study: Path, config: Any, devices: Iterable[tuple[str, str]]) -> bool:
    """Whether a job has finished in its study on one of these devices."""
    with importing():
        from awq_pycuda.sweeps.study import job_folder
    return any(job_folder(study, config, *device).name in finished for device in devices)


@contextmanager
def _planning(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """Says how many jobs are about to be planned; yields what is told of those that are."""
    if total <= _QUIET_JOBS:
        yield lambda count: None
        return
    print_line(console, f"planning {total:,} jobs")
    begin = told = time.monotonic()
    done = 0
    with progress(console) as show:

        def advance(count: int) -> None:
            nonlocal done, told
            done += count
            show("planning", done, total)
            now = time.monotonic()
            if not console.is_terminal and now - told > _TELL_SECONDS:
                told = now
                left = clock((now - begin) / done * (total - done))
                print_line(console, f"planned {done:,} of {total:,} jobs, {left} left")

        yield advance


@contextmanager
def _exit_on_error() -> Iterator[None]:
    """Ends the process on any exception.

    Hydra would turn one in a callback into a warning and go on, and add lines of its own to one in the job.
    """
    try:
        yield
    except (InputError, HydraException, OmegaConfBaseException) as error:
        raise SystemExit(_report(error)) from None
    except hosts.WorkerDied as error:
        print(f"failed: checking the jobs: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception as error:
        raise SystemExit(_unexpected(error)) from None


def _check_writable(key: str, given: object) -> Path:
    """Makes the run's folder and tries to write there; root passes every permission check, so only trying tells."""
    if not isinstance(given, str) or not given.strip():
        raise InputError(f"{key}={given}: names no folder; allowed: a folder that can be written to")
    folder = Path(given)
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise InputError(
            f"{key}={folder}: {error.strerror or error}; allowed: a folder that can be written to"
        ) from None
    return folder


def _report(error: Exception) -> int:
    line = " ".join(explain(error, sys.argv[1:]).splitlines())
    # A value given may hold line breaks and what moves a terminal's cursor.
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in line)
    print(f"error: {shown}", file=sys.stderr)
    return 2


def _unexpected(error: Exception) -> int:
    """Tells of a fault of ours, or of a setting of Hydra's that Hydra itself does not check."""
    given = hydra_overrides(sys.argv[1:])
    if not given:
        traceback.print_exception(error)
        return 1
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    return _report(InputError(f"{given}: {what}; allowed: what --cfg hydra shows"))


def job(composed: DictConfig) -> None:
    """One job of Hydra's, in whichever process its launcher has chosen.

    Undecorated, so that launchers can send it by its name.
    """
    settings = HydraConfig.get()
    config = to_config(composed)
    config_yaml = as_yaml(config)
    overrides = task_overrides(settings)
    cwd = Path(settings.runtime.cwd)
    if settings.mode is RunMode.RUN:
        os.chdir(cwd)  # with hydra.job.chdir it is the run's folder by now, and no relative path starts from there
        # A sweep's jobs run in other processes, and begin the sooner without all that a run needs being imported here.
        with importing():
            from awq_pycuda.engine.execution import execute
        with _exit_on_error():
            execute(config, Path(settings.runtime.output_dir), overrides, config_yaml)
        return
    folder = Path(settings.sweep.dir)
    reporter = _reporter(cwd / folder / settings.sweep.subdir, str(settings.launcher._target_))
    if reporter.stopped or came_between_jobs():
        return
    # A signal is not raised on: in a launcher's process it would count as a crash.
    its_job = Job(config, cwd, folder, overrides, config_yaml)
    reporter.started(settings.job.num)
    outcome = isolation.run_isolated(its_job)
    reporter.ended(settings.job.num, outcome)
    reporter.stopped = outcome.stop


def _run_here(plan: Plan, sweep: Sweep) -> None:
    """Runs a sweep's jobs until a signal comes."""
    reporter = Reporter(sweep.folder)
    cwd = Path.cwd()

    def made(number: int) -> Job:
        planned = plan.job(number)
        return Job(planned.config, cwd, sweep.study, planned.overrides, planned.config_yaml)

    isolation.run_all(map(made, range(len(plan))), reporter.started, reporter.ended)


@lru_cache(maxsize=1)
def _reporter(folder: Path, launcher: str) -> Reporter:
    if launcher.endswith(".JoblibLauncher"):
        end_with_sweep()
    return Reporter(folder)


_hydra_main = hydra.main(version_base="1.3", config_path=str(resource_dir("conf")), config_name="config")(job)


_composed_mode = Hydra.get_mode


def _mode(hydra_itself: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """What `hydra.mode` is set to. Hydra composes everything to know it, 60 ms, and few arguments can set it."""
    flags = {each for each in sys.argv[1:] if each.startswith("-")}
    keys = {each.lstrip("+").partition("=")[0] for each in overrides}
    if flags <= {"-m", "--multirun"} and not keys & {"experiment", "hydra", "hydra.mode", "hydra.searchpath"}:
        return None
    return _composed_mode(hydra_itself, config_name, overrides)


setattr(Hydra, "get_mode", _mode)  # noqa: B010


def _run_hydra() -> int:
    """The exit code of all that Hydra runs, signals aside."""
    try:
        try:
            flags, overrides = split(sys.argv[1:])
            check_overrides(overrides)
            sys.argv[1:] = [*flags, *overrides]
            _hydra_main()
        except _RunHere as planned:
            assert Preflight.sweep is not None
            _run_here(planned.plan, Preflight.sweep)
    except SystemExit as ended:  # of this module's, and of Hydra's flags
        return ended.code if isinstance(ended.code, int) else 0
    except KeyboardInterrupt:
        if Preflight.sweep is None:
            print("interrupted before any work", file=sys.stderr)
        elif Preflight.sweep.abandoned:
            print("failed: the launcher went on waiting after the last job's process had ended", file=sys.stderr)
        return 1
    except (InputError, HydraException, OmegaConfBaseException, ValueError) as error:
        return _report(error)
    except RecursionError:
        return _report(InputError("an override is nested too deep; allowed: key=value as --help shows"))
    except OSError as error:
        # Hydra makes the folders of a sweep's jobs one by one, after every check.
        if error.filename is None:
            if Preflight.sweep is None:
                raise
            print(f"failed: {error}", file=sys.stderr)  # such as a disk too full for the reports
            return 1
        return _report(InputError(f"{error.filename}: {error.strerror}; allowed: a folder that can be written to"))
    except Exception as error:
        if Preflight.sweep is None:
            return _unexpected(error)
        # A launcher's own trouble, such as a process of its that was killed; what ran is still told.
        print(f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    return 0


def _pass_on(number: signal.Signals) -> None:
    """What a signal does first in the process that was asked to stop."""
    if Preflight.sweep is not None:
        stop_processes(number, Preflight.sweep)


def main() -> int:
    """The command. Returns the exit code: 0, 1 when a run failed, 2 for bad input, 128 + number after a signal."""
    # Hydra would print its errors over several lines and exit with 1; raised, they become our one line and 2.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    streams.prepare()
    try:
        return _command()
    finally:
        streams.drop_unwritten()  # a full or closed stdout costs no run


def _command() -> int:
    if "--version" in sys.argv[1:]:
        print(f"awq_pycuda {__version__}")
        return 0
    try:
        os.getcwd()
    except OSError as error:
        return _report(InputError(f"the working folder: {error.strerror}; allowed: a folder that exists"))
    others = {each for each in sys.argv[1:] if each.startswith("-")} - {"-m", "--multirun"}  # such as --help
    register_schemas(studies=bool(others) or any("experiment" in each for each in sys.argv[1:]))
    Preflight.sweep = None
    with stoppable(_pass_on) as stop:
        code = _run_hydra()
        sweep = Preflight.sweep
        if sweep is None:
            return stop.exit_code(code)
        jobs = sweep.finish(wait=stop.number is None)
        if sweep.abandoned:
            return 1
        if code == 0 and any(job.state not in ("complete", "skipped") for job in jobs):
            code = 1
        return stop.exit_code(code)
