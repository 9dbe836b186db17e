"""What a config asks of a run, derived once: what runs, counts and checks is given this or parts of it, no config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter

from awq_pycuda.config import BackendChoice, Config, Save, SearchPlace, TimingConfig, config_hash
from awq_pycuda.kernels import table
from awq_pycuda.layers.inputs import LayerSpec, plan_layers
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
        save: whether the codes are kept.
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
    save: Save
    verify: bool
    config_hash: str


def spec_of(config: Config) -> RunSpec:
    """The run that a checked config asks for; reads its layer file where there is one.

    Raises:
        InputError: a file that cannot be used, or shapes that do not fit together.
    """
    return RunSpec(
        layers=plan_layers(config),
        convention=replace(
            CONVENTIONS[config.convention],
            gammas=tuple(config.gammas),
            normalization=config.search.normalization,
            objective=config.search.objective,
            quantizer=Format(**vars(config.quant)),
        ),
        backend=config.backend,
        search=config.search.where,
        variants={stage: attrgetter(key)(config).name for stage, key in table.KEYS.items()},
        tile=config.tile,
        threads=config.threads,
        timing=config.timing,
        save=config.save,
        verify=config.verify,
        config_hash=config_hash(config),
    )
