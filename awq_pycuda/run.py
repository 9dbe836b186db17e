"""`python -m awq_pycuda.run`: compose, validate, run, store, summarise; one run, or with -m a sweep.

Beside `composition` and `hydra_errors`, nothing else in the package uses Hydra.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins import basic_sweeper
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from awq_pycuda import isolation, summary
from awq_pycuda.composition import PlannedJob, ordered, plan_jobs, register_schemas, task_overrides, to_config
from awq_pycuda.errors import InputError
from awq_pycuda.execution import RunFailed, execute, validate
from awq_pycuda.hydra_errors import explain
from awq_pycuda.inputs import plan_layers
from awq_pycuda.launchers import end_with_sweep, prepare_launcher
from awq_pycuda.paths import resource_dir
from awq_pycuda.study import Job, Outcome
from awq_pycuda.sweep import Reporter, Sweep

INTERRUPTED = 130  # the exit code that shells give a command stopped by Ctrl-C


class _RunHere(BaseException):
    """Leaves Hydra when every job is planned: its own launcher would compose each of them again, at 0.1 s a job."""

    def __init__(self, jobs: list[PlannedJob]) -> None:
        super().__init__()
        self.jobs = jobs


class Preflight(Callback):
    """Runs before Hydra makes any folder: bad input ends here, with nothing written. `sweep`: the one that began."""

    sweep: Sweep | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks the one job."""
        with _exit_on_error():
            for override in config.hydra.overrides.task:
                if override.startswith(("study=", "experiment=")):
                    raise InputError(f"{override}: a study is a sweep; allowed: with -m")
            validate(to_config(config))
            _check_writable("hydra.run.dir", Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks every job of a sweep, and begins its display."""
        with _exit_on_error():
            jobs = plan_jobs(config)
            _check_sweep(config, jobs)
            folder = Path(config.hydra.sweep.dir)
            _check_writable("hydra.sweep.dir", folder)
            labels = [job.label for job in jobs]
            Preflight.sweep = Sweep(folder, folder / config.hydra.sweep.subdir, labels, summary.make_console())
            Preflight.sweep.start()
            # Every job is checked: the sweeper would compose each of them again for that, at 0.1 s a job.
            # Hydra's plugin scan has made the class anew since the module was first imported.
            setattr(basic_sweeper.BasicSweeper, "validate_batch_is_legal", lambda self, batch: None)  # noqa: B010
        if str(config.hydra.launcher._target_).endswith(".BasicLauncher"):
            raise _RunHere(jobs)


def _check_sweep(config: DictConfig, jobs: list[PlannedJob]) -> None:
    if len({job.config.study for job in jobs}) > 1:
        raise InputError("study: one sweep is one study; allowed: one value")
    for override in config.hydra.overrides.hydra:
        if override.startswith("hydra.sweep.subdir="):
            raise InputError(f"{override}: a job's folder is named after its config; allowed: study=NAME for the sweep")
    launcher = str(config.hydra.launcher._target_)
    configs = [job.config for job in jobs]
    if launcher.rpartition(".")[2] in ("BasicLauncher", "JoblibLauncher"):
        for refusal in isolation.refusals(configs):
            if refusal is not None:
                raise InputError(refusal)
    else:
        for job_config in configs:
            plan_layers(job_config)
    prepare_launcher(config)
    if not launcher.endswith(".BasicLauncher"):
        isolation.close_worker()


@contextmanager
def _exit_on_error() -> Iterator[None]:
    """Ends the process on any exception.

    Hydra would turn one in a callback into a warning and go on, and add lines of its own to one in the job.
    """
    try:
        yield
    except (InputError, HydraException, OmegaConfBaseException) as error:
        raise SystemExit(_report(error)) from None
    except isolation.WorkerDied as error:
        print(f"failed: checking the jobs: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        raise SystemExit(INTERRUPTED if error.interrupted else 1) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def _check_writable(key: str, folder: Path) -> None:
    """Makes the run's folder and tries to write there; root passes every permission check, so only trying tells."""
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


def _report(error: Exception) -> int:
    line = " ".join(explain(error, sys.argv[1:]).splitlines())  # a value given may hold line breaks
    print(f"error: {line}", file=sys.stderr)
    return 2


def job(composed: DictConfig) -> None:
    """One job of Hydra's, in whichever process its launcher has chosen.

    Undecorated, so that launchers can send it by its name.
    """
    settings = HydraConfig.get()
    config, config_yaml = to_config(composed), OmegaConf.to_yaml(composed, resolve=True)
    overrides = task_overrides(settings)
    if settings.mode is RunMode.RUN:
        with _exit_on_error():
            execute(config, Path(settings.runtime.output_dir), overrides, config_yaml)
        return
    cwd, folder = Path(settings.runtime.cwd), Path(settings.sweep.dir)
    reporter = _reporter(cwd / folder / settings.sweep.subdir, str(settings.launcher._target_))
    # Ctrl-C is not raised on: in a launcher's process it would count as a crash.
    _run_in_sweep(settings.job.num, Job(config, cwd, folder, overrides, config_yaml), reporter)


def _run_in_sweep(number: int, its_job: Job, reporter: Reporter) -> Outcome:
    reporter.started(number)
    outcome = isolation.run_isolated(its_job)
    reporter.ended(number, outcome)
    return outcome


def _run_here(jobs: list[PlannedJob], sweep: Sweep) -> int:
    """Runs a sweep's jobs one after the other; the exit code."""
    reporter = Reporter(sweep.folder)
    for number, planned in enumerate(jobs):
        its_job = Job(planned.config, Path.cwd(), sweep.study, planned.overrides, planned.config_yaml)
        if _run_in_sweep(number, its_job, reporter).stop:
            return INTERRUPTED
    return 0


@lru_cache(maxsize=1)
def _reporter(folder: Path, launcher: str) -> Reporter:
    if launcher.endswith(".JoblibLauncher"):
        end_with_sweep()
    return Reporter(folder)


_hydra_main = hydra.main(version_base="1.3", config_path=str(resource_dir("conf")), config_name="config")(job)


def _run_hydra() -> int:
    """The exit code of all that Hydra runs."""
    try:
        try:
            sys.argv[1:] = ordered(sys.argv[1:])
            _hydra_main()
        except _RunHere as planned:
            assert Preflight.sweep is not None
            return _run_here(planned.jobs, Preflight.sweep)
    except KeyboardInterrupt:
        if Preflight.sweep is None:
            print("interrupted before any work", file=sys.stderr)
        elif Preflight.sweep.abandoned:
            print("failed: the launcher went on waiting after the last job's process had ended", file=sys.stderr)
            return 1
        return INTERRUPTED
    except (InputError, HydraException, OmegaConfBaseException, ValueError) as error:
        return _report(error)
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
            raise
        # A launcher's own trouble, such as a process of its that was killed; what ran is still told.
        print(f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """The command. Returns the exit code: 0, 1 when a run failed, 2 for bad input, 130 when interrupted."""
    # Hydra would print its errors over several lines and exit with 1; raised, they become the one line of §3.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Where stdin, stdout or stderr is closed, their numbers must not go to files and sockets of ours.
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(null)
    register_schemas()
    Preflight.sweep = None
    code = _run_hydra()
    if Preflight.sweep is None:
        return code
    jobs = Preflight.sweep.finish()
    if Preflight.sweep.interrupted:
        return INTERRUPTED
    if code == 0 and any(job.state not in ("complete", "skipped") for job in jobs):
        return 1
    return code


if __name__ == "__main__":
    # Through the module's own name: launchers send the job function to other processes by name, not by value.
    from awq_pycuda.run import main as command

    sys.exit(command())
