"""What sweeps need of the launchers that Hydra's plugins bring: joblib, Ray, Slurm."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import psutil
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from awq_pycuda.errors import InputError
from awq_pycuda.signals import note_between_jobs
from awq_pycuda.sweeps.sweep import Sweep, reporting_processes

_SWEEP_PID = "AWQ_PYCUDA_SWEEP_PID"  # of the process that joblib's are children of
_PARENT_SECONDS = 1
_CONNECT_SECONDS = 10
_STOP_SECONDS = 40  # more than their workers are given
_STOP_POLL_SECONDS = 0.1
_SUBMITIT = "${hydra.sweep.dir}/.sweep/submitit/%j"  # scripts, logs and pickles of each job

# What sweeps need of the launchers that Hydra's plugins bring (requirements-cluster.txt). A job that dies is told as
# failed by the process that waits for it, so launchers need not try again.
LAUNCHERS: dict[str, dict[str, Any]] = {
    # One process per GPU, each keeping a GPU of its own; without a GPU one.
    "joblib": {"n_jobs": "${gpu_processes:}", "batch_size": 1},
    "ray": {
        "ray": {
            "init": {"include_dashboard": False, "log_to_driver": False, "configure_logging": False},
            # Ray's own count; backend=auto takes the GPU that it is given.
            "remote": {"num_cpus": 1, "num_gpus": "${gpus_unless_cpu:${backend}}", "max_retries": 0},
        }
    },
    # Slurm refuses jobs that ask for what no node has, so only backend=cuda asks for a GPU.
    "submitit_slurm": {
        "gpus_per_node": "${gpus_if_cuda:${backend}}",
        "submitit_folder": _SUBMITIT,
        "max_num_timeout": 0,
        "signal_delay_s": 60,
        # Since Slurm 22.05 srun gives a job one core of those that it was granted.
        "setup": ['[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK'],
    },
    "submitit_local": {"submitit_folder": _SUBMITIT},
}


def prepare_launcher(config: DictConfig) -> None:
    """Checks and prepares the launcher that a sweep's composed config names, in the process that starts the sweep.

    Raises:
        InputError: it can never run the jobs.
    """
    launcher = str(config.hydra.launcher._target_).rpartition(".")[2]
    if launcher == "JoblibLauncher":
        if config.hydra.launcher.n_jobs == 0:
            raise InputError("hydra.launcher.n_jobs=0: allowed: a number of processes; -1: one per core")
        os.environ[_SWEEP_PID] = str(os.getpid())
    elif launcher == "RayLauncher":
        _connect_to_ray(config)
    elif launcher in ("SlurmLauncher", "LocalLauncher"):
        os.environ.setdefault("SUBMITIT_LOG_LEVEL", "CRITICAL")  # it logs every submission, twice
        _await_every_submitit_job()


def end_with_sweep() -> None:
    """Ends this process of joblib's soon after the one that started the sweep, also where that is gone already.

    It would wait for ever for more jobs of a sweep that was killed, and keep its worker and its GPU. Nor may a signal
    end it between two jobs: joblib would at once kill the others, which are storing theirs.
    """
    sweep = int(os.environ[_SWEEP_PID])
    if os.getpid() == sweep:  # n_jobs=1 makes no process
        return

    def watch() -> None:
        while os.getppid() == sweep:
            time.sleep(_PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    note_between_jobs()


def stop_processes(number: signal.Signals, sweep: Sweep) -> None:
    """Passes a signal on to joblib's processes, and waits for what they store: joblib would kill them at once."""
    if _SWEEP_PID not in os.environ:
        return
    told: set[int] = set()
    deadline = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < deadline:
        # Looked at anew each time: a process may just be beginning its first job.
        running = reporting_processes(sweep.folder)
        for pid in running:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if pid not in told and process.ppid() == os.getpid():
                    process.send_signal(number)
                    told.add(pid)
        if not any(running.get(pid) for pid in told):
            return
        time.sleep(_STOP_POLL_SECONDS)


def _connect_to_ray(config: DictConfig) -> None:
    """Ray waits for ever for a GPU that its cluster lacks. Connects as the launcher would, which then does not.

    Raises:
        InputError: no cluster answers at the address given, or it has no GPU.
    """
    gpus = config.hydra.launcher.ray.remote.get("num_gpus") or 0
    settings: Any = OmegaConf.to_container(config.hydra.launcher.ray.init, resolve=True)
    key, address = "hydra.launcher.ray.init.address", settings.get("address")
    if address is None:
        key, address = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS")
    if address is None:
        # A local cluster of its own: it would warn of the token that it has just made itself.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    try:
        host, _, port = str(address).removeprefix("ray://").rpartition(":")
        if host and port.isdecimal():  # Ray tries for many minutes where nothing answers
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        ray.init(**settings)
    except (OSError, OverflowError, ValueError) as error:
        if address is None:
            raise
        raise InputError(
            f"{key}={address}: {' '.join(str(error).split())}; allowed: the address of a Ray cluster that answers"
        ) from None
    if gpus and ray.cluster_resources().get("GPU", 0) < gpus:
        raise InputError(
            f"backend={config.backend.name}: the Ray cluster has no GPU, and jobs ask for {gpus} each; "
            "allowed: backend=cpu, or hydra.launcher.ray.remote.num_gpus=0"
        )


def _await_every_submitit_job() -> None:
    """When a job was killed, submitit gives up on all that come after it, which run on unseen.

    What became of each job is known from its reports.
    """
    from submitit.core.core import Job
    from submitit.core.utils import UncompletedJobError

    results = Job.results

    def results_or_nothing(job: Any) -> Any:
        try:
            return results(job)
        except UncompletedJobError:
            return [JobReturn(status=JobStatus.COMPLETED)]

    Job.results = results_or_nothing
