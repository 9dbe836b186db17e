"""Hydra's composition: schemas, presets, and from command lines to checked configs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, RangeSweep
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from awq_pycuda.config import (
    ALLOWED,
    MISSING,
    BackendChoice,
    Config,
    FileInputs,
    InputsConfig,
    OutlierInputs,
    SyntheticInputs,
    check,
    settled,
)
from awq_pycuda.config_text import as_yaml
from awq_pycuda.errors import InputError
from awq_pycuda.kernels import table
from awq_pycuda.paths import resource_dir
from awq_pycuda.sweeps.hosts import visible_gpus
from awq_pycuda.sweeps.hydra_errors import explain, groups, no_value, similar
from awq_pycuda.sweeps.launchers import LAUNCHERS
from awq_pycuda.sweeps.overrides import check_overrides, check_referred, referring

MAX_JOBS = 10_000_000  # far beyond what anybody waits for; each is planned in about 1 ms
_PARSED = 1024  # overrides that are kept as Hydra has parsed them


def register_schemas(studies: bool = True) -> None:
    """Makes schemas, kernels, launcher settings and the studies of experiments/ known to Hydra's composition.

    `studies`: False leaves those out, which take 15 ms to read.
    """
    OmegaConf.register_new_resolver("gpu_processes", lambda: max(1, len(visible_gpus())), replace=True)
    cpu, cuda = BackendChoice.cpu, BackendChoice.cuda
    OmegaConf.register_new_resolver("gpus_unless_cpu", lambda backend: int(backend is not cpu), replace=True)
    OmegaConf.register_new_resolver("gpus_if_cuda", lambda backend: 1 if backend is cuda else None, replace=True)
    OmegaConf.register_new_resolver("kernels", table.choices, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config(inputs=InputsConfig()))  # of any kind
    for name, schema in (("synthetic", SyntheticInputs), ("outliers", OutlierInputs), ("file", FileInputs)):
        store.store(group="inputs", name=f"{name}_schema", node=schema)
    for name in table.names("dequantizeTiled"):
        store.store(group="matmul", name=name, node={"kernel": name})
    Plugins.instance()  # registers what the installed launchers bring; our settings go on top
    for name, settings in LAUNCHERS.items():
        with suppress(ConfigLoadError):  # not installed
            plugin = store.load(f"hydra/launcher/{name}.yaml")
            store.store(group="hydra/launcher", name=name, node=OmegaConf.merge(plugin.node, settings))
    for path in sorted(resource_dir("experiments").glob("*.yaml")) if studies else ():
        store.store(group="experiment", name=path.stem, node=OmegaConf.load(path), package="_global_")


@contextmanager
def composing() -> Iterator[Callable[[Sequence[str]], Config]]:
    """Yields what makes a config, checked and settled, of overrides as `run` takes them for one job.

    It raises an `InputError` for whatever is wrong with them, in the line that `run` prints.
    """

    def compose(overrides: Sequence[str]) -> Config:
        try:
            check_overrides(overrides)
            return to_config(hydra.compose("config", list(overrides)))
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(" ".join(explain(error, overrides).splitlines())) from None

    register_schemas(studies=False)
    with hydra.initialize_config_dir(str(resource_dir("conf")), version_base="1.3"):
        yield compose


def to_config(composed: DictConfig) -> Config:
    """The composed config as checked dataclasses.

    Raises:
        InputError: a key without a value, one that the schema does not know (added with +key=value), or a value that
            a rule forbids.
    """
    task = copy.deepcopy(composed)
    with open_dict(task):
        task.pop("hydra", None)
    return settled(_checked(task))


def _checked(task: DictConfig) -> Config:
    """The same of a composed config without Hydra's own settings."""
    config = OmegaConf.to_object(task)
    assert isinstance(config, Config)
    _refuse_missing_and_added_keys(config, "")
    check_referred(task)
    check(config)
    return config


def _refuse_missing_and_added_keys(node: Any, prefix: str) -> None:
    known = {item.name for item in fields(node)}
    for name, value in vars(node).items():
        key = f"{prefix}{name}"
        if name not in known:
            raise InputError(f"{key}={value}: no such key; allowed: {similar(key)}")
        if value == MISSING:
            raise InputError(no_value(key))
        if is_dataclass(value):
            _refuse_missing_and_added_keys(value, f"{prefix}{name}.")


def task_overrides(settings: Any) -> list[str]:
    """The overrides, from Hydra's own settings, as written: what ${...} stands for differs from job to job."""
    overrides = OmegaConf.to_container(settings.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return overrides


@dataclass(frozen=True)
class PlannedJob:
    """A job of a sweep: its config, also as resolved YAML; and its overrides."""

    config: Config
    config_yaml: str
    overrides: list[str]


class _Column(Sequence[str]):
    """What one override of a sweep makes of its key, job by job: a range is not written out."""

    def __init__(self, override: Override) -> None:
        self._key = override.get_key_element()
        self._values: Sequence[str] | range
        self.numbers: range | None = None  # which need not be parsed
        self.varies = override.is_sweep_override()
        if not self.varies:
            self._values = [override.get_value_element_as_str()]
            return
        value: Any = override.value()
        if isinstance(value, RangeSweep) and value.step:
            count = abs((value.stop - value.start) // value.step)  # type: ignore[operator]  # the grammar needs both
            if not count <= MAX_JOBS:  # nor for inf
                raise _too_many(override.input_line or "")
        if isinstance(value, RangeSweep) and not value.shuffle and isinstance(numbers := value.range(), range):
            self._values = self.numbers = numbers
        else:
            self._values = list(override.sweep_string_iterator())
        if not self._values:
            raise InputError(f"{override.input_line}: no values, so no jobs; allowed: at least one value")
        self.varies = len(self._values) > 1 and (isinstance(self._values, range) or len(set(self._values)) > 1)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return f"{self._key}={self._values[index]}"


def _too_many(given: str) -> InputError:
    return InputError(f"{given}: too many jobs for one sweep; allowed: at most {MAX_JOBS:,}")


class Plan:
    """The jobs of a sweep, in the order in which the basic sweeper numbers them; each is composed when asked for.

    Composing takes 0.05 s, so jobs that choose the same groups share one composition; plain values are then set in it
    as Hydra sets them.

    Raises:
        InputError, HydraException: what is wrong with the sweep itself.
    """

    def __init__(self, composed: DictConfig) -> None:
        self._loader = GlobalHydra.instance().config_loader()
        self._parser = OverridesParser.create(self._loader)
        self._config_name: str = composed.hydra.job.config_name
        self.study: str = composed.study  # one name for all, also where it holds the time of day
        tasks = [f"{key}={value}" for key, value in (composed.hydra.sweeper.get("params") or {}).items()]
        check_overrides(tasks)
        columns: dict[str, _Column] = {}
        for override in self._parser.parse_overrides([*tasks, *task_overrides(composed.hydra)]):
            if override.key_or_group == "experiment" and override.is_sweep_override():
                # Its own sweep is in the settings of Hydra, which jobs do not have.
                raise InputError(f"{override.input_line}: each is a sweep of its own; allowed: one of them")
            columns[override.get_key_element()] = _Column(override)
        self._columns = list(columns.values())
        if math.prod(map(len, self._columns)) > MAX_JOBS:
            raise _too_many(" ".join(column[0] for column in self._columns if column.varies))
        self._varying = {key for key, column in columns.items() if column.varies}
        self._is_group = cache(self._has_options)
        self._parsed = lru_cache(_PARSED)(lambda text: self._parser.parse_overrides([text])[0])
        # By the groups that a job chooses; plain values are set in them anew for each job.
        self._bases: dict[tuple[str, ...], DictConfig] = {}
        # A job's config of each, and the keys that stand for others.
        self._models: dict[tuple[str, ...], tuple[Config, list[str]]] = {}
        given = self._parser.parse_overrides(task_overrides(composed.hydra))
        if all(override.is_sweep_override() or self._is_settled(override) for override in given):
            with open_dict(base := copy.copy(composed)):
                del base.hydra
            chosen = (override for override in given if not self._is_plain(override))
            self._bases[tuple(str(override.input_line) for override in chosen)] = self._as_base(base)
        self.labels = _Labels(self)

    def __len__(self) -> int:
        return math.prod(map(len, self._columns))

    def overrides(self, number: int, varying: bool = False) -> list[str]:
        """Those of a job as they are given to Hydra; with `varying` only what tells it from other jobs."""
        return [column[index] for column, index in self._places(number) if column.varies or not varying]

    def _places(self, number: int) -> list[tuple[_Column, int]]:
        """Where a job stands in each column."""
        found = []
        for column in reversed(self._columns):  # the last one changes from job to job
            number, index = divmod(number, len(column))
            found.append((column, index))
        return found[::-1]

    def job(self, number: int) -> PlannedJob:
        """A job with all that is stored of it.

        Raises:
            InputError, HydraException, OmegaConfBaseException: what is wrong with it.
        """
        config = settled(_checked(self._composed(*self._choices_and_values(number))))
        return PlannedJob(config, as_yaml(config), self.overrides(number))

    def config(self, number: int) -> Config:
        """A job's config alone, in a fraction of the time.

        Raises:
            InputError, HydraException, OmegaConfBaseException: what is wrong with it.
        """
        choices, values = self._choices_and_values(number)
        if choices not in self._models or not all(map(_stands_for_itself, values.values())):
            composed = self._composed(choices, values)
            config = _checked(composed)
            following, others = referring(composed)
            if not others:
                self._models[choices] = copy.deepcopy(config), following
            return settled(config)
        # As `_checked` makes it, which takes three times as long: only these keys differ from job to job.
        values = {key: value for key, value in values.items() if key in self._varying}
        composed = self._composed(choices, values)
        model, following = self._models[choices]
        config = copy.deepcopy(model)
        for key in (*values, *following):
            group, _, name = key.rpartition(".")
            setattr(attrgetter(group)(config) if group else config, name, _plain(OmegaConf.select(composed, key)))
        check(config)
        return settled(config)

    def batches(self, size: int) -> Iterator[list[Config]]:
        """The configs of all jobs, planned so many at a time.

        Raises:
            InputError, HydraException, OmegaConfBaseException: what is wrong with one.
        """
        for begin in range(0, len(self), size):
            configs = [self.config(number) for number in range(begin, min(begin + size, len(self)))]
            if {config.study for config in configs} != {self.study}:
                raise InputError("study: one sweep is one study; allowed: one value")
            yield configs

    def _choices_and_values(self, number: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        """A job's overrides: those that choose what is composed, and by key the values that are set in it."""
        choices, values = [], {}
        for column, index in self._places(number):
            override = self._parsed(column[0 if column.numbers else index])
            if not self._is_plain(override):
                choices.append(column[index])
            else:
                values[override.key_or_group] = column.numbers[index] if column.numbers else override.value()
        return tuple(choices), values

    def _composed(self, choices: tuple[str, ...], values: dict[str, Any]) -> DictConfig:
        """What a job is composed to; valid until the next one is."""
        if choices not in self._bases:
            self._bases[choices] = self._as_base(hydra.compose(self._config_name, list(choices)))
        config = self._bases[choices]
        if any(isinstance(value, dict) for value in values.values()):  # of it only a part may be given
            config = copy.deepcopy(config)
        for key, value in values.items():
            OmegaConf.update(config, key, value, merge=True)
        return config

    def _as_base(self, config: DictConfig) -> DictConfig:
        config.study = self.study
        return config

    def _is_plain(self, override: Override) -> bool:
        return override.type is OverrideType.CHANGE and not self._is_group(override.key_or_group)

    def _is_settled(self, override: Override) -> bool:
        """Whether the composition that Hydra began the sweep with holds it, and had told any fault of it."""
        known = groups().get(override.key_or_group, ())
        return self._is_plain(override) or (override.type is OverrideType.CHANGE and override.value() in known)

    def _has_options(self, key: str) -> bool:
        # Hydra takes 10 ms to look for those of a user's own groups.
        return key in groups() or (key not in ALLOWED and bool(self._loader.get_group_options(key)))


def _stands_for_itself(value: Any) -> bool:
    """Whether a value is the key's own and whole: it refers to no other, and is no part of one."""
    if isinstance(value, list):
        return all(map(_stands_for_itself, value))
    return not isinstance(value, dict) and "${" not in str(value) and value != MISSING


def _plain(value: Any) -> Any:
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


class _Labels(Sequence[str]):
    """The overrides that tell the jobs apart, made when shown."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return " ".join(self._plan.overrides(number, varying=True))
