"""What an entry of the table of kernels says: what to compile, how to launch it, and what it cannot take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from awq_pycuda.kernels.work import Unit

Capability = tuple[int, int]
Values = Mapping[str, int]  # sizes and macros by their names

MAX_INT = 2**31 - 256  # of a size that a kernel counts with int, a tile beyond the end
MAX_BLOCKS = 2**31 - 1  # CUDA's limit along x
IN_TURN: Capability = (9, 0)  # the least with which kernels wait for the one before by themselves, see cuda/common.cuh
WALK_THREADS = 256  # of the kernels that walk an index space


@dataclass(frozen=True)
class Device:
    """What decides whether a kernel can run, and how.

    Attributes:
        capability: compute capability.
        shared_bytes: of shared memory that a block may have.
        memory_bytes: of memory in all, whatever else lies there.
    """

    capability: Capability
    shared_bytes: int
    memory_bytes: int


_DTYPES = {"float*": "float32", "double*": "float64", "signed char*": "int8", "int*": "int32"}
_CODES = {"Size": "Q", "int": "i"}


@dataclass(frozen=True)
class Argument:
    """An argument of a kernel: its type as the source writes it, its name, and an array's shape by names of sizes."""

    type: str
    name: str
    shape: tuple[str, ...] = ()

    @property
    def dtype(self) -> str | None:
        """NumPy's name of an array's elements; None for a number."""
        return _DTYPES.get(self.type)

    @property
    def code(self) -> str:
        """The struct module's code: P for an array's address."""
        return _CODES.get(self.type, "P")


@dataclass(frozen=True)
class Kernel:
    """An entry point and its launch.

    Attributes:
        entry: its name in the source.
        arguments: in the source's order.
        grid: the number of blocks, from sizes, macros and `multiprocessors`; with 0 it is not launched.
        block: threads along x and y: numbers, or names of macros.
        shared_bytes: dynamic shared memory, from the macros.
        each_round: whether it is launched once in every round of its variant, with the number `round`.
        early: arrays that it reads before it waits for the kernel before it, which must not write them.
    """

    entry: str
    arguments: tuple[Argument, ...]
    grid: Callable[[Values], int]
    block: tuple[int | str, ...] = (WALK_THREADS,)
    shared_bytes: Callable[[Values], int] = lambda values: 0
    each_round: bool = False
    early: tuple[str, ...] = ()

    def threads(self, values: Values) -> tuple[int, int, int]:
        """Threads of a block along x, y and z."""
        sides = [values[side] if isinstance(side, str) else side for side in self.block]
        x, y = (*sides, 1)[:2]
        return x, y, 1


@dataclass(frozen=True)
class Parameter:
    """A macro whose value each call chooses.

    Attributes:
        allowed: its values.
        compiled: those that `make kernels` compiles.
    """

    allowed: range
    compiled: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """What nvcc is given: a file under cuda/, its macros, and the suffix of the architecture (`a` gives sm_90a)."""

    file: str
    macros: tuple[tuple[str, int], ...] = ()
    suffix: str = ""

    def arch(self, capability: Capability) -> str:
        """Nvcc's name of the architecture to compile for on such a device."""
        return f"sm_{capability[0]}{capability[1]}{self.suffix}"

    def flags(self) -> list[str]:
        """The macros as options of nvcc."""
        return [f"-D{name}={value}" for name, value in self.macros]


@dataclass(frozen=True)
class Variant:
    """One way to compute a stage.

    Attributes:
        stage: which one.
        name: as the config gives it.
        file: the source under cuda/.
        help: what sets it apart, in a few words.
        kernels: what is launched, in order.
        macros: the source's constants.
        parameters: its macros that a call chooses.
        derived: sizes, and macros among the parameters, that follow from others: in order, each from those before it.
        scratch: bytes of each array that only these kernels see, from sizes and macros.
        zeroed: arrays that must be 0 before the first kernel.
        tolerance: the relative error that the tests allow; 0 for what is exact.
        capability: the least that it runs on; None for any that nvcc compiles for. With a suffix, the only one.
        suffix: of the architecture; such code runs on one capability alone.
        group_multiple: what the size of a group must be a multiple of, where a row has several.
        unit: what does most of its arithmetic; a benchmark holds it against the rate of that.
        passes: operations of that unit for each one that the stage asks for.
        rounds: how often those kernels are launched, one after another, that each round has.
        refuses: why it does not take these sizes, in a few words; None where it does.
        refuses_format: the same of what is known of the format.
    """

    stage: str
    name: str
    file: str
    help: str
    kernels: tuple[Kernel, ...]
    macros: Values = field(default_factory=dict)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    derived: Mapping[str, Callable[[Values], int]] = field(default_factory=dict)
    scratch: Mapping[str, Callable[[Values], int]] = field(default_factory=dict)
    zeroed: tuple[str, ...] = ()
    tolerance: float = 0.0
    capability: Capability | None = None
    suffix: str = ""
    group_multiple: int = 1
    unit: Unit = "fp32"
    passes: int = 1
    rounds: Callable[[Values], int] = lambda values: 1
    refuses: Callable[[Values], str | None] = lambda values: None
    refuses_format: Callable[[Values], str | None] = lambda values: None

    def chosen(self, values: Values) -> dict[str, int]:
        """All macros: the constants, and those of `values` that are parameters."""
        return {**self.macros, **{name: values[name] for name in self.parameters}}

    def source(self, values: Values) -> Source:
        """What to compile, given the values of the parameters."""
        return Source(self.file, tuple(sorted(self.chosen(values).items())), self.suffix)

    def compiled(self, every: str = "") -> list[Source]:
        """What `make kernels` compiles: each parameter takes its values, the others staying at their first.

        Args:
            every: a parameter that takes all that are allowed.
        """
        varied = [
            {name: value}
            for name, parameter in self.parameters.items()
            for value in (parameter.allowed if name == every else parameter.compiled)
        ]
        return list(dict.fromkeys(self.source(self.defaults() | change) for change in varied or [{}]))

    def defaults(self) -> dict[str, int]:
        """The first value of each parameter that `make kernels` compiles."""
        return {name: parameter.compiled[0] for name, parameter in self.parameters.items()}

    def arrays(self) -> list[Argument]:
        """What the caller gives: the arrays of the kernels but for scratch, each once, in order."""
        declared = (argument for kernel in self.kernels for argument in kernel.arguments if argument.dtype is not None)
        return list(dict.fromkeys(argument for argument in declared if argument.name not in self.scratch))

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The sizes that the shapes of these arrays mean; where two arrays disagree the first one counts.

        Raises:
            ValueError: an array has too many or too few dimensions.
        """
        sizes: dict[str, int] = {}
        for argument in self.arrays():
            shape = shapes.get(argument.name)
            if shape is None:
                continue
            if len(shape) != len(argument.shape):
                raise ValueError(f"{argument.name} is of shape {shape}; the kernel needs [{', '.join(argument.shape)}]")
            sizes = dict(zip(argument.shape, shape, strict=True)) | sizes
        return sizes

    def launches(self, values: Values) -> Iterator[tuple[Kernel, dict[str, int]]]:
        """Every kernel as often as it is launched, in order, with the values of that launch."""
        for in_rounds, group in groupby(self.kernels, key=lambda kernel: kernel.each_round):
            kernels = tuple(group)
            for index in range(self.rounds(values) if in_rounds else 1):
                for kernel in kernels:
                    yield kernel, {**values, "round": index}

    def complete(self, values: Values) -> dict[str, int]:
        """Sizes and parameters together with the constants and what follows from them."""
        found = {**values, **self.macros}  # a constant may have the name of another stage's parameter
        for name, value in self.derived.items():
            found[name] = value(found)
        return found

    def obstacle(self, values: Values, device: Device | None = None) -> str | None:
        """Why this variant cannot run, in a few words; None where it can.

        Args:
            values: the parameters, and such sizes as are known; what is not given is not checked. A `group_size`
                without `groups` is one of several.
            device: to run on; None for any.
        """
        if device is not None and not self.runs_on(device.capability):
            least, given = (
                "{}.{}".format(*capability) for capability in (self.capability or (0, 0), device.capability)
            )
            return f"needs a GPU of compute capability {least}{'' if self.suffix else ' or later'}, not {given}"
        for name, parameter in self.parameters.items():
            if values[name] not in parameter.allowed:
                return f"takes {name} {words(parameter.allowed)}, not {values[name]}"
        if "groups" in values and values["groups"] != -(-values["in_features"] // values["group_size"]):
            groups = f"{values['groups']} groups of {values['group_size']}"
            return f"takes groups of one size, only the last smaller, not {groups} for {values['in_features']} channels"
        if values.get("groups", 2) > 1 and values.get("group_size", 0) % self.group_multiple:
            return f"takes groups of a multiple of {self.group_multiple} input channels, not {values['group_size']}"
        if reason := self.refuses_format(values) or self.refuses(values):
            return reason
        for kernel in self.kernels:
            needed = kernel.shared_bytes(self.chosen(values))
            if device is not None and needed > device.shared_bytes:
                return f"needs {needed} bytes of shared memory in a block, the GPU gives {device.shared_bytes}"
            for argument in kernel.arguments:
                if argument.type == "int" and values.get(argument.name, 0) > MAX_INT:
                    return f"takes {argument.name} up to {MAX_INT}, not {values[argument.name]}"
        return None

    @property
    def with_relu(self) -> bool:
        """Whether it is a product that can do on the way what the stage relu does."""
        return any(argument.name == "relu" for kernel in self.kernels for argument in kernel.arguments)

    def runs_on(self, capability: Capability) -> bool:
        """Whether a device of this compute capability can run it."""
        if self.suffix:
            return capability == self.capability
        return self.capability is None or capability >= self.capability


def words(allowed: range) -> str:
    """The values of a parameter, in words."""
    step = "" if allowed.step == 1 else f" in steps of {allowed.step}"
    return f"from {allowed[0]} to {allowed[-1]}{step}"
