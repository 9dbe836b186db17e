"""Hydra's composition: schemas, presets, and from command lines to checked configs."""

from __future__ import annotations

import argparse
import copy
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict

from awq_pycuda.config import BackendChoice, Config, FileInputs, OutlierInputs, SyntheticInputs, check, refuse
from awq_pycuda.errors import InputError
from awq_pycuda.isolation import visible_gpus
from awq_pycuda.launchers import LAUNCHERS
from awq_pycuda.paths import resource_dir


def register_schemas() -> None:
    """Makes schemas, launcher settings and the studies of experiments/ known to Hydra's composition."""
    OmegaConf.register_new_resolver("gpu_processes", lambda: max(1, len(visible_gpus())), replace=True)
    cpu, cuda = BackendChoice.cpu, BackendChoice.cuda
    OmegaConf.register_new_resolver("gpus_unless_cpu", lambda backend: int(backend is not cpu), replace=True)
    OmegaConf.register_new_resolver("gpus_if_cuda", lambda backend: 1 if backend is cuda else None, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, schema in (("synthetic", SyntheticInputs), ("outliers", OutlierInputs), ("file", FileInputs)):
        store.store(group="inputs", name=f"{name}_schema", node=schema)
    Plugins.instance()  # registers what the installed launchers bring; our settings go on top
    for name, settings in LAUNCHERS.items():
        with suppress(ConfigLoadError):  # not installed
            plugin = store.load(f"hydra/launcher/{name}.yaml")
            store.store(group="hydra/launcher", name=name, node=OmegaConf.merge(plugin.node, settings))
    for path in sorted(resource_dir("experiments").glob("*.yaml")):
        store.store(group="experiment", name=path.stem, node=OmegaConf.load(path), package="_global_")


def ordered(arguments: list[str]) -> list[str]:
    """A command line with its overrides at the end: Hydra's parser takes only those before or those after a flag.

    Raises:
        InputError: an option that Hydra does not have.
    """
    parser = get_args_parser()
    parser.exit_on_error = False  # it would print its usage
    try:
        known, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; allowed: what --hydra-help shows") from None
    for argument in others:
        if argument.startswith("-"):
            raise InputError(f"{argument}: no such option; allowed: what --hydra-help shows")
    overrides = {*known.overrides, *others}
    flags = [argument for argument in arguments if argument not in overrides]
    return flags + [argument for argument in arguments if argument in overrides]


def to_config(composed: DictConfig) -> Config:
    """The composed config as checked dataclasses.

    Raises:
        InputError: a key without a value, one that the schema does not know (added with +key=value), or a value that
            a rule forbids.
    """
    task = copy.deepcopy(composed)
    with open_dict(task):
        task.pop("hydra", None)
    config = OmegaConf.to_object(task)
    assert isinstance(config, Config)
    _refuse_missing_and_added_keys(config, "")
    check(config)
    return config


def _refuse_missing_and_added_keys(node: Any, prefix: str) -> None:
    known = {item.name for item in fields(node)}
    for name, value in vars(node).items():
        if value == MISSING:
            raise refuse(f"{prefix}{name}", MISSING, "no value")
        if name not in known:
            raise InputError(
                f"{prefix}{name}={value}: no such key; allowed: {', '.join(prefix + k for k in sorted(known))}"
            )
        if is_dataclass(value):
            _refuse_missing_and_added_keys(value, f"{prefix}{name}.")


def task_overrides(settings: Any) -> list[str]:
    """The overrides, from Hydra's own settings, as written: what ${...} stands for differs from job to job."""
    overrides = OmegaConf.to_container(settings.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return overrides


@dataclass(frozen=True)
class PlannedJob:
    """A job of a sweep: its config, also as resolved YAML; its overrides, and in `label` those that vary."""

    config: Config
    config_yaml: str
    overrides: list[str]
    label: str


def plan_jobs(composed: DictConfig) -> list[PlannedJob]:
    """Every job of a sweep, in the order in which the basic sweeper will number them.

    Composing takes 0.05 s, so jobs that choose the same groups share one composition; plain values are then set in it
    as Hydra sets them.

    Raises:
        InputError, HydraException, OmegaConfBaseException: what is wrong with the first bad job.
    """
    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(loader)
    tasks = [f"{key}={value}" for key, value in (composed.hydra.sweeper.get("params") or {}).items()]
    tasks += task_overrides(composed.hydra)
    asked = parser.parse_overrides(tasks)
    (batch,) = BasicSweeper.split_arguments(asked, max_batch_size=None)
    for override in filter(Override.is_sweep_override, asked):
        if override.key_or_group == "experiment":
            # Its own sweep is in the settings of Hydra, which jobs do not have.
            raise InputError(f"{override.input_line}: each is a sweep of its own; allowed: one of them")
        if not batch and not list(override.sweep_string_iterator()):
            raise InputError(f"{override.input_line}: no values, so no jobs; allowed: at least one value")
    varying = [index for index, column in enumerate(zip(*batch, strict=True)) if len(set(column)) > 1]
    bases: dict[tuple[str, ...], DictConfig] = {}

    is_group = cache(lambda key: bool(loader.get_group_options(key)))

    def is_plain(override: Override) -> bool:
        return override.type is OverrideType.CHANGE and not is_group(override.key_or_group)

    jobs = []
    for overrides in batch:
        parsed = parser.parse_overrides(list(overrides))
        choices = tuple(str(override.input_line) for override in parsed if not is_plain(override))
        if choices not in bases:
            bases[choices] = hydra.compose(composed.hydra.job.config_name, list(choices))
            bases[choices].study = composed.study  # one name for all, also where it holds the time of day
        config = copy.deepcopy(bases[choices])
        for override in filter(is_plain, parsed):
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        label = " ".join(overrides[index] for index in varying)
        jobs.append(PlannedJob(to_config(config), OmegaConf.to_yaml(config, resolve=True), list(overrides), label))
    return jobs
