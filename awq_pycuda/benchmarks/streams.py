"""PyTorch on the stream that a benchmark times."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


def on_stream(stream: int | None) -> AbstractContextManager[Any]:
    """Makes a stream of another library, by its address, PyTorch's own for the moment; None: leaves it as it is."""
    import torch

    return nullcontext() if stream is None else torch.cuda.stream(torch.cuda.ExternalStream(stream))
