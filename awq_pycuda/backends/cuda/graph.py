"""A CUDA graph: what is launched on a stream, captured once, then launched as a whole, with events in it.

PyCUDA has no graphs; cuda-bindings works on its context and streams. The context must be current throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pycuda.driver as cuda
from cuda.bindings import driver

from awq_pycuda.backends.base import Unrecordable

T = TypeVar("T")

_KERNEL = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL


class Event:
    """A moment of the stream, told anew by every launch of the graph that it was recorded into."""

    def __init__(self, stream: cuda.Stream) -> None:
        self._handle = _checked(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DEFAULT))
        # An event that is recorded as usual would only order the graph's work; external it becomes a node of its own.
        external = driver.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL
        _checked(driver.cuEventRecordWithFlags(self._handle, stream.handle, external))

    def time_till(self, end: Event) -> float:
        """Milliseconds from this moment to another, both passed."""
        return float(_checked(driver.cuEventElapsedTime(self._handle, end._handle)))

    def free(self) -> None:
        """Gives it back; no graph that records it may be launched again."""
        _checked(driver.cuEventDestroy(self._handle))


class Graph:
    """An executable graph; from `capture`."""

    def __init__(self, stream: cuda.Stream, captured: Any) -> None:
        self._executable = _checked(driver.cuGraphInstantiate(captured, 0))
        _checked(driver.cuGraphUpload(self._executable, stream.handle))  # or the first launch would do it

    def launch(self, stream: cuda.Stream) -> None:
        """Orders all of it; returns before it is done."""
        _checked(driver.cuGraphLaunch(self._executable, stream.handle))

    def free(self) -> None:
        """Gives it back, once the device is done with it."""
        _checked(driver.cuGraphExecDestroy(self._executable))


def capture(stream: cuda.Stream, work: Callable[[], T], overlapping: bool = False) -> tuple[Graph, T]:
    """The graph of what `work` launches on the stream, none of which runs, and what `work` returned.

    Args:
        stream: on which it is launched.
        work: launches it.
        overlapping: whether each kernel that comes straight after another waits for it by itself (`in_turn` in
            cuda/common.cuh), so that the device may place it before.

    Raises:
        Unrecordable: the driver refuses something; the stream is as it was before.
    """
    # Other threads of the process may go on with what a capture forbids to this one.
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    try:
        _checked(driver.cuStreamBeginCapture(stream.handle, mode))
        try:
            returned = work()
        finally:  # whatever happened: until then the stream takes no other work
            ended, captured = driver.cuStreamEndCapture(stream.handle)
        _checked((ended,))
        try:
            if overlapping:
                _overlap(captured)
            return Graph(stream, captured), returned
        finally:
            _checked(driver.cuGraphDestroy(captured))
    except (cuda.Error, GraphError) as error:
        raise Unrecordable(f"no CUDA graph could be made of a pass ({error})") from error


def _overlap(captured: Any) -> None:
    """Puts a programmatic edge, over which the kernel behind may be placed early, in place of each between kernels."""
    *_, count = _checked_all(driver.cuGraphGetEdges(captured))
    before, behind, data, _ = _checked_all(driver.cuGraphGetEdges(captured, count))
    kernels = [
        edge
        for edge in zip(before, behind, data, strict=True)
        if all(_checked(driver.cuGraphNodeGetType(node)) == _KERNEL for node in edge[:2])
    ]
    if not kernels:
        return
    before, behind, data = (list(nodes) for nodes in zip(*kernels, strict=True))
    early = driver.CUgraphEdgeData()
    early.type = driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
    early.from_port = driver.CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
    _checked(driver.cuGraphRemoveDependencies(captured, before, behind, data, len(kernels)))
    _checked(driver.cuGraphAddDependencies(captured, before, behind, [early] * len(kernels), len(kernels)))


class GraphError(RuntimeError):
    """The driver refuses a call."""


def _checked(result: tuple[Any, ...]) -> Any:
    found = _checked_all(result)
    return found[0] if found else None


def _checked_all(result: tuple[Any, ...]) -> tuple[Any, ...]:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise GraphError(result[0].name)
    return result[1:]
