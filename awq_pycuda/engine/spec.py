"""What a config asks of a run, derived once: what runs, counts and checks is given this or parts of it, no config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from awq_pycuda.choices import Baselines, Save, Statistic
from awq_pycuda.config import BackendChoice, Config, Export, QuantConfig, SearchPlace, TimingConfig
from awq_pycuda.config_text import config_hash
from awq_pycuda.errors import InputError
from awq_pycuda.kernels import table
from awq_pycuda.layers.inputs import LayerSpec, plan_layers
from awq_pycuda.quant.clipping import Clipping
from awq_pycuda.quant.conventions import CONVENTIONS, Convention
from awq_pycuda.quant.format import Format


@dataclass(frozen=True)
class RunSpec:
    """A run, as its config asks for it.

    Attributes:
        layers: where their weights and activations come from, in order.
        convention: how scales are chosen, and in which format.
        backend: where it is to run.
        search: where its scales are to be searched.
        variants: the kernel of each stage that has several, by the stage's name; `auto` until the device is known.
        tile: the tile of the kernels that leave theirs to the config.
        threads: host threads; None for all cores that the process may use.
        timing: how many passes.
        baselines: what its scales are measured against.
        save: whether the result file has the codes.
        export: the kind of checkpoint that is to stand beside it.
        verify: whether every stage is checked against the oracle.
        config_hash: of the whole config.
    """

    layers: list[LayerSpec]
    convention: Convention
    backend: BackendChoice
    search: SearchPlace
    variants: Mapping[str, str]
    tile: int
    threads: int | None
    timing: TimingConfig
    baselines: Baselines
    save: Save
    export: Export
    verify: bool
    config_hash: str

    @property
    def in_chunks(self) -> bool:
        """Whether activations stay in their file."""
        return any(layer.chunk is not None for layer in self.layers)

    @property
    def keeps_codes(self) -> bool:
        """Whether the host gets the codes."""
        return self.save is Save.full or self.export is not Export.none

    @property
    def by_max(self) -> Convention | None:
        """How the baseline of max|x| chooses scales: as the run does, but clips nothing; None where there is none."""
        if self.baselines is Baselines.rtn:
            return None
        return replace(self.convention, statistic=Statistic.abs_max, clip=None)


def spec_of(config: Config, in_chunks: bool = False) -> RunSpec:
    """The run that a checked and settled config asks for; reads its layer file where there is one.

    Args:
        config: of the run.
        in_chunks: see `plan_layers`.

    Raises:
        InputError: a file that cannot be used, or shapes or parts of the format that do not fit together.
    """
    return RunSpec(
        layers=plan_layers(config, in_chunks),
        convention=convention_of(config),
        backend=config.backend,
        search=config.search.where,
        variants={stage: attrgetter(key)(config).name for stage, key in table.KEYS.items()},
        tile=config.tile,
        threads=config.threads,
        timing=config.timing,
        baselines=config.baselines,
        save=config.save,
        export=config.export,
        verify=config.verify,
        config_hash=config_hash(config),
    )


def convention_of(config: Config) -> Convention:
    """The convention that the config names, with what it asks to be otherwise."""
    of_tool = CONVENTIONS[config.convention]
    given: dict[str, Any] = {"gammas": config.gammas, "share": config.share, **vars(config.search)}
    del given["where"]
    asked = {name: value for name, value in given.items() if value is not None}
    asked |= {name: tuple(value) for name, value in asked.items() if isinstance(value, list)}
    clip = {**vars(config.clip), "skip": tuple(config.clip.skip)}
    asked["clip"] = Clipping(**clip) if clip.pop("enabled") else None
    return replace(of_tool, quantizer=_format_of(config.quant, of_tool.quantizer), **asked)


def _format_of(quant: QuantConfig, of_convention: Format) -> Format:
    """The format that the config asks for; what it leaves open is the convention's, but for size and element."""
    asked = {name: value for name, value in vars(quant).items() if value is not None or name == "group_size"}
    try:
        return replace(of_convention, **asked)
    except InputError as error:
        raise InputError(f"quant.{error}") from None
