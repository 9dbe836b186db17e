"""A recorded pass: what a graph was made of, and what it needs as long as it is launched."""

from __future__ import annotations

import math

import pycuda.driver as cuda

from awq_pycuda.backends.base import Mark
from awq_pycuda.backends.cuda.graph import Event, Graph
from awq_pycuda.backends.cuda.memory import ManagedArray
from awq_pycuda.kernels.variant import IN_TURN, Capability


def launched_by(capability: Capability) -> str:
    """How a device of this compute capability goes through a recorded pass, in a few words."""
    if capability >= IN_TURN:
        return "as a whole"
    needed, given = ("{}.{}".format(*each) for each in (IN_TURN, capability))
    return f"as a whole, kernel after kernel: to start one early takes compute capability {needed}, not {given}"


class Recording:
    """Work on its way into a graph, and then what the graph needs as long as it is launched.

    Attributes:
        placing: the work only shows what it needs; nothing is launched yet.
        arrays: what must lie on the device before each launch.
    """

    def __init__(self) -> None:
        self.placing = True
        self.arrays: dict[ManagedArray, None] = {}
        self.graph: Graph | None = None
        self.workspace: cuda.DeviceAllocation | None = None
        self._events: list[Event] = []

    def mark(self, stream: cuda.Stream) -> Mark:
        """A moment of the graph."""
        if self.placing:
            return Mark(math.nan)
        self._events.append(Event(stream))
        return Mark(math.nan, self._events[-1])

    def launch(self, stream: cuda.Stream) -> None:
        """The whole work once more."""
        assert self.graph is not None
        for array in self.arrays:
            array.to_device(stream)
        self.graph.launch(stream)

    def free(self) -> None:
        """Gives back what it holds."""
        for event in self._events:
            event.free()
        if self.graph is not None:
            self.graph.free()
        self.arrays.clear()
        self._events.clear()
        self.graph = self.workspace = None
