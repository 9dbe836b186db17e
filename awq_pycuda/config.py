"""What a run is made of: the structured config and every check on it.

Hydra's composition checks types and names against these dataclasses; `check` holds the rules that types cannot say.
Every fault becomes an `InputError` whose one line names the key, the value and what is allowed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from enum import Enum
from operator import attrgetter
from types import UnionType
from typing import Any, get_args, get_origin

from awq_pycuda.choices import (
    Baselines,
    ConventionChoice,
    Divisor,
    Element,
    Formula,
    Normalization,
    Objective,
    Save,
    Share,
    Statistic,
    StepDtype,
    Ties,
    WeightScale,
    ZeroOrder,
    ZeroPoint,
    ZeroStep,
)
from awq_pycuda.config_types import fits, hints
from awq_pycuda.errors import InputError
from awq_pycuda.kernels import table
from awq_pycuda.quant.tools import FINITE, MAX_GAMMA, TOOLS, is_clamp, is_floor, is_grid, is_least_power

MISSING = "???"  # in OmegaConf's words; a run itself needs nothing of it, and importing it takes 40 ms
MAX_SIZE = 2**31 - 1  # CUDA's grids and our kernels count in 32 bits
MAX_LAYERS = 1000  # result and layer files name them 000 to 999
MAX_PASSES = 100_000  # every sample is kept in memory
_STUDY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
MAX_SEED = 2**64 - 1  # the Philox key has 64 bits


class BackendChoice(Enum):
    """Where the pipeline runs."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class StatsKernel(Enum):
    """How `accum_stats` adds up on the GPU: its variants in the table of kernels."""

    vars().update(table.names("accum_stats"))


class SearchPlace(Enum):
    """Where the scales are searched; `auto`: where the pipeline runs."""

    auto = "auto"
    device = "device"
    host = "host"


class MatmulKernel(Enum):
    """Which variant of `dequantizeTiled` in the table of kernels multiplies on the GPU; `auto` is the best there is."""

    vars().update(table.names("dequantizeTiled"))


class Export(Enum):
    """The kind of checkpoint that a run leaves beside its results; see `checkpoints`."""

    none = "none"
    awq = "awq"
    compressed_tensors = "compressed_tensors"


@dataclass
class InputsConfig:
    """Common base of the input kinds, so that group files can be typed; `holdout` is a share of the tokens."""

    kind: str = MISSING
    holdout: float = 0.0


@dataclass
class SyntheticInputs(InputsConfig):
    """Uniform activations and weights from the seed."""

    kind: str = "synthetic"
    weight_scale: WeightScale = WeightScale.unit


@dataclass
class OutlierInputs(SyntheticInputs):
    """Uniform inputs in which a share of each layer's input channels is larger by a random factor."""

    kind: str = "outliers"
    channels: float = 0.01
    factor_min: float = 10.0
    factor_max: float = 100.0


@dataclass
class FileInputs(InputsConfig):
    """Layers from a file (HDF5, safetensors or npz); `chunk_tokens` None: activations whole where they fit."""

    kind: str = "file"
    path: str = MISSING
    first_token: int = 0
    chunk_tokens: int | None = None


@dataclass
class QuantConfig:
    """What a weight becomes, see `quant.format.Format`; None, but for `group_size`, is as the convention has it."""

    group_size: int | None = None
    bits: int = 8
    element: Element = Element.int
    symmetric: bool | None = None
    divisor: Divisor | None = None
    zero_point: ZeroPoint | None = None
    include_zero: bool | None = None
    zero_order: ZeroOrder | None = None
    step_dtype: StepDtype | None = None
    least_range: float | None = None
    least_step: float | None = None
    zero_step: ZeroStep | None = None


@dataclass
class SearchConfig:
    """Scale search, see `quant.conventions.Convention`; None, but for `where`, is as the convention has it."""

    objective: Objective | None = None
    statistic: Statistic | None = None
    formula: Formula | None = None
    betas: list[float] | None = None
    normalization: Normalization | None = None
    clamp: list[float] | None = None
    floor: float | None = None
    least_power: float | None = None
    identity: bool | None = None
    ties: Ties | None = None
    where: SearchPlace = SearchPlace.auto


@dataclass
class ClipConfig:
    """Clipping of scaled weights, see `quant.clipping.Clipping`; `enabled` None is as the convention has it."""

    enabled: bool | None = None
    grid: int = 20
    least: float = 0.5
    tokens: int = 512
    skip: list[str] = field(default_factory=lambda: ["q_", "k_", "query", "key", "Wqkv"])
    joint: bool = False


@dataclass
class MatmulConfig:
    """The multiplication with on-the-fly dequantization."""

    kernel: MatmulKernel = MatmulKernel[table.AUTO]


@dataclass
class TimingConfig:
    """Passes over all layers: the cold one, then `warmup` unmeasured ones, then `repeats` measured ones, or none."""

    warmup: int = 1
    repeats: int = 3


@dataclass
class Config:
    """A whole run. The defaults are those of `conf/config.yaml`, which gives the meaning of each key.

    `tokens` None: all that a file holds; `library.run_pipeline` takes it as n without one. `gammas` and `share` None:
    the convention's, see `settled`.
    """

    study: str = "run"
    n: int = 1024
    tokens: int | None = None
    tile: int = 16
    layers: int | None = 3
    gammas: list[float] | None = None
    seed: int = 0
    backend: BackendChoice = BackendChoice.auto
    convention: ConventionChoice = ConventionChoice.day58
    share: Share | None = None
    stats: StatsKernel = StatsKernel["deterministic"]
    threads: int | None = None
    baselines: Baselines = Baselines.all
    save: Save = Save.summary
    export: Export = Export.none
    verify: bool = False
    inputs: InputsConfig = field(default_factory=SyntheticInputs)
    quant: QuantConfig = field(default_factory=QuantConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    matmul: MatmulConfig = field(default_factory=MatmulConfig)
    timing: TimingConfig = field(default_factory=TimingConfig)


def _choices(kind: type[Enum]) -> str:
    return ", ".join(member.name for member in kind)


_AS_CONVENTION = ", null (as the convention has it)"
_EXPONENTS = f"a list of at least one number from 0 to {MAX_GAMMA:g}"

# What each key allows, in words: for the checks below, and for values that Hydra itself refuses for their type.
ALLOWED: dict[str, str] = {
    "study": "a name of letters, digits, '.', '_' and '-', no part of it starting with '.'; '/' makes folders",
    "n": f"a whole number from 1 to {MAX_SIZE}",
    "tokens": f"a whole number from 1 to {MAX_SIZE} (with inputs=file also null: all that the file holds)",
    "tile": f"a whole number {table.allowed_words('dequantizeTiled', 'TILE')}",
    "layers": f"a whole number from 1 to {MAX_LAYERS} (with inputs=file also null: all that the file holds)",
    "gammas": f"{_EXPONENTS}, such as [0,0.5,1]{_AS_CONVENTION}",
    "seed": f"a whole number from 0 to {MAX_SEED}",
    "backend": _choices(BackendChoice),
    "convention": _choices(ConventionChoice),
    "share": _choices(Share) + _AS_CONVENTION,
    "stats": _choices(StatsKernel),
    "threads": f"null (all cores that the process may use) or a whole number from 1 to {MAX_SIZE}",
    "baselines": _choices(Baselines),
    "save": _choices(Save),
    "export": _choices(Export),
    "verify": "true, false",
    "inputs.kind": "what inputs=... sets: synthetic, outliers, file",
    "inputs.holdout": "a share of the tokens, from 0 to below 1",
    "inputs.weight_scale": _choices(WeightScale),
    "inputs.channels": "a share of the input channels, above 0 and at most 1",
    "inputs.factor_min": "a number above 0, at most inputs.factor_max",
    "inputs.factor_max": "a number above 0, at most 1e6, at least inputs.factor_min",
    "inputs.path": "a layer file: .h5, .hdf5, .safetensors or .npz",
    "inputs.first_token": f"a whole number from 0 to {MAX_SIZE}",
    "inputs.chunk_tokens": f"null (whole where they fit, else in chunks) or a whole number from 1 to {MAX_SIZE}",
    "quant.group_size": f"null (one step per row) or a whole number from 1 to {MAX_SIZE}",
    "quant.bits": "a whole number from 2 to 8",
    "quant.element": _choices(Element),
    "quant.symmetric": f"true, false{_AS_CONVENTION}",
    "quant.divisor": _choices(Divisor) + _AS_CONVENTION,
    "quant.zero_point": _choices(ZeroPoint) + _AS_CONVENTION,
    "quant.include_zero": f"true, false{_AS_CONVENTION}",
    "quant.zero_order": _choices(ZeroOrder) + _AS_CONVENTION,
    "quant.step_dtype": _choices(StepDtype) + _AS_CONVENTION,
    "quant.least_range": f"a finite number from 0{_AS_CONVENTION}",
    "quant.least_step": f"a finite number from 0{_AS_CONVENTION}",
    "quant.zero_step": _choices(ZeroStep) + _AS_CONVENTION,
    "search.objective": _choices(Objective) + _AS_CONVENTION,
    "search.statistic": _choices(Statistic) + _AS_CONVENTION,
    "search.formula": _choices(Formula) + _AS_CONVENTION,
    "search.betas": _EXPONENTS + _AS_CONVENTION,
    "search.normalization": _choices(Normalization) + _AS_CONVENTION,
    "search.clamp": f"[low,high], low from {FINITE[0]:g} to 1, high from 1 to {FINITE[1]:g}{_AS_CONVENTION}",
    "search.floor": f"a number above 0{_AS_CONVENTION}",
    "search.least_power": f"a number above 0, at most 1{_AS_CONVENTION}",
    "search.identity": f"true, false{_AS_CONVENTION}",
    "search.ties": _choices(Ties) + _AS_CONVENTION,
    "search.where": _choices(SearchPlace),
    "clip.enabled": f"true, false{_AS_CONVENTION}",
    "clip.grid": "a whole number from 1 to 1000",
    "clip.least": "a number from 0 to below 1",
    "clip.tokens": f"a whole number from 1 to {MAX_SIZE}",
    "clip.skip": "a list of parts of layers' names, such as [q_proj,k_proj]",
    "clip.joint": "true where weights are clipped, false",
    "matmul.kernel": _choices(MatmulKernel),
    "timing.warmup": f"a whole number from 0 to {MAX_PASSES}",
    "timing.repeats": f"a whole number from 0 to {MAX_PASSES}",
}


def _types(node: type, prefix: str = "") -> dict[str, Any]:
    """The type of each key of a config class, by its dotted name."""
    found: dict[str, Any] = {}
    for name, kind in hints(node).items():
        for part in (SyntheticInputs, OutlierInputs, FileInputs) if kind is InputsConfig else (kind,):
            found |= _types(part, f"{prefix}{name}.") if is_dataclass(part) else {f"{prefix}{name}": kind}
    return found


TYPES = _types(Config)


def refuse(key: str, value: object, why: str = "") -> InputError:
    """The error for a value that `ALLOWED` rules out, as one line; `why` says more where the rule does not."""
    return InputError(f"{key}={value}: {why + '; ' if why else ''}allowed: {ALLOWED[key]}")


def check(config: Config) -> None:
    """Checks every rule that concerns the config alone (files and devices are checked by what uses them).

    A choice given by its name, as in Python, becomes the member that it names.

    Raises:
        InputError: the first rule broken, as one line with key, value and what is allowed.
    """
    _name_members(config, "")
    from_file = isinstance(config.inputs, FileInputs)

    def need(key: str, value: Any, rule: Callable[[Any], bool]) -> None:
        if not fits(TYPES[key], value) or not rule(value):
            shown = str(value).replace(" ", "") if isinstance(value, list) else value
            raise refuse(key, "null" if shown is None else shown)

    def count_or_all(value: int | None, most: int = MAX_SIZE) -> bool:
        return from_file if value is None else 1 <= value <= most

    need("study", config.study, lambda study: bool(_STUDY.fullmatch(study)))
    need("n", config.n, lambda n: 1 <= n <= MAX_SIZE)
    need("tokens", config.tokens, count_or_all)
    tiles = table.allowed("dequantizeTiled", "TILE")
    need("tile", config.tile, lambda tile: tile in tiles.get(config.matmul.kernel.name, range(1, MAX_SIZE + 1)))
    need("layers", config.layers, lambda layers: count_or_all(layers, MAX_LAYERS))
    need("gammas", config.gammas, lambda gammas: gammas is None or is_grid(gammas))
    need("share", config.share, lambda _: True)
    need("seed", config.seed, lambda seed: 0 <= seed <= MAX_SEED)
    need("threads", config.threads, lambda threads: threads is None or 1 <= threads <= MAX_SIZE)
    need("quant.group_size", config.quant.group_size, lambda size: size is None or 1 <= size <= MAX_SIZE)
    need("quant.bits", config.quant.bits, lambda bits: 2 <= bits <= 8)
    for name in ("least_range", "least_step"):
        need(f"quant.{name}", getattr(config.quant, name), lambda least: least is None or 0 <= least < math.inf)
    need("search.betas", config.search.betas, lambda betas: betas is None or is_grid(betas))
    need("search.clamp", config.search.clamp, lambda clamp: clamp is None or is_clamp(clamp))
    need("search.floor", config.search.floor, lambda floor: floor is None or is_floor(floor))
    need("search.least_power", config.search.least_power, lambda least: least is None or is_least_power(least))
    for key in (key for key in ALLOWED if key.startswith(("quant.", "search."))):
        need(key, attrgetter(key)(config), lambda _: True)
    need("clip.enabled", config.clip.enabled, lambda _: True)
    need("clip.grid", config.clip.grid, lambda grid: 1 <= grid <= 1000)
    need("clip.least", config.clip.least, lambda least: 0 <= least < 1)
    need("clip.tokens", config.clip.tokens, lambda tokens: 1 <= tokens <= MAX_SIZE)
    need("clip.skip", config.clip.skip, all)
    need("clip.joint", config.clip.joint, lambda _: True)
    if config.clip.joint and not _clips(config):
        raise refuse("clip.joint", "true", "clip.enabled=false")
    need("timing.warmup", config.timing.warmup, lambda warmup: 0 <= warmup <= MAX_PASSES)
    need("timing.repeats", config.timing.repeats, lambda repeats: 0 <= repeats <= MAX_PASSES)
    if isinstance(config.inputs, FileInputs):
        if config.inputs.path == MISSING:
            raise InputError(f"inputs.path: has no value; allowed: {ALLOWED['inputs.path']}")
        need("inputs.first_token", config.inputs.first_token, lambda first: 0 <= first <= MAX_SIZE)
        need("inputs.chunk_tokens", config.inputs.chunk_tokens, count_or_all)
    need("inputs.kind", config.inputs.kind, lambda kind: kind == type(config.inputs).kind)
    need("inputs.holdout", config.inputs.holdout, lambda share: 0 <= share < 1)
    if isinstance(config.inputs, OutlierInputs):
        inputs = config.inputs
        need("inputs.channels", inputs.channels, lambda share: 0 < share <= 1)
        need("inputs.factor_max", inputs.factor_max, lambda high: 0 < high <= 1e6)
        need("inputs.factor_min", inputs.factor_min, lambda low: 0 < low <= inputs.factor_max)


def _clips(config: Config) -> bool:
    """Whether weights are clipped: as asked, else as the convention has it."""
    return TOOLS[config.convention].clips if config.clip.enabled is None else config.clip.enabled


def settled(config: Config) -> Config:
    """The same checked config, with what its convention searches where that was left open: results tell it by value."""
    asked, tool = config.search, TOOLS[config.convention]
    formula = asked.formula or tool.formula
    search = replace(
        asked,
        objective=asked.objective or tool.objective,
        statistic=asked.statistic or tool.statistic,
        formula=formula,
        normalization=asked.normalization or tool.normalization,
    )
    gammas = config.gammas or list(tool.gammas_for(formula))
    clip = replace(config.clip, enabled=_clips(config))
    return replace(config, search=search, gammas=gammas, share=config.share or tool.share, clip=clip)


def _name_members(node: Any, prefix: str) -> None:
    schema: Any = type(node)
    for name, kind in hints(schema).items():
        value = getattr(node, name)
        if is_dataclass(value):
            _name_members(value, f"{prefix}{name}.")
            continue
        for choice in get_args(kind) if get_origin(kind) is UnionType else (kind,):
            if isinstance(value, str) and isinstance(choice, type) and issubclass(choice, Enum):
                if value not in choice.__members__:
                    raise refuse(f"{prefix}{name}", value)
                setattr(node, name, choice[value])
