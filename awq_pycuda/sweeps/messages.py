"""What a sweep and its workers tell each other: plain data, quick to import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from awq_pycuda.config import Config
from awq_pycuda.spread import Spread

State = Literal["not run", "running", "elsewhere", "complete", "skipped", "failed", "interrupted"]


@dataclass(frozen=True)
class Job:
    """One run of a sweep, with what is stored about it; `cwd` is the folder that its relative paths start from."""

    config: Config
    cwd: Path
    study: Path
    overrides: list[str]
    config_yaml: str


@dataclass(frozen=True)
class Started:
    """A job that is about to run: its folder, and its file's attributes in case it does not live to write them."""

    folder: Path
    origin: dict[str, str | int | bool]


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `seconds`: its own work; `elsewhere`: another sweep is running it; `skipped`: it is complete.

    `pipeline_ms` over the measured passes and `error_removed` over the layers, of a job that is complete.
    `stop`: a signal asked this process to stop meanwhile, whether or not the job could still finish.
    """

    state: State
    reason: str = ""
    folder: Path | None = None
    seconds: float = 0.0
    pipeline_ms: Spread | None = None
    error_removed: Spread | None = None
    stop: bool = False


@dataclass(frozen=True)
class Finished:
    """The answer to a `Job`. `usable`: whether this process can run another one."""

    outcome: Outcome
    usable: bool


@dataclass(frozen=True)
class Question:
    """Asks what speaks against some configs; `cwd` is the folder that their relative paths start from."""

    configs: Sequence[Config]
    cwd: Path


@dataclass(frozen=True)
class Checked:
    """The answer to one config of a `Question`: what speaks against it, None if nothing; where it would run."""

    refusal: str | None
    backend: str = ""
    device: str = ""
