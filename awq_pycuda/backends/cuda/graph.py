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


def capture(stream: cuda.Stream, work: Callable[[], T]) -> tuple[Graph, T]:
    """The graph of what `work` launches on the stream, none of which runs, and what `work` returned.

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
            return Graph(stream, captured), returned
        finally:
            _checked(driver.cuGraphDestroy(captured))
    except (cuda.Error, GraphError) as error:
        raise Unrecordable(f"no CUDA graph could be made of a pass ({error})") from error


class GraphError(RuntimeError):
    """The driver refuses a call."""


def _checked(result: tuple[Any, ...]) -> Any:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise GraphError(result[0].name)
    return result[1] if len(result) > 1 else None
