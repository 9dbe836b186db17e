"""Experiment harness for Activation-aware Weight Quantization (AWQ) on GPUs and CPUs.

From Python, without Hydra: `quantize` a layer's weights, `run_pipeline` what the command runs, `write_checkpoint`
stores layers in the layouts of other tools; see `library`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded when asked for: a command that reads result files must not wait for what runs layers.
_LIBRARY = (
    "CheckpointLayer",
    "Config",
    "Convention",
    "Format",
    "QuantizedLayer",
    "quantize",
    "read_checkpoint",
    "run_pipeline",
    "write_checkpoint",
)


def __getattr__(name: str) -> Any:
    if name in _LIBRARY:
        return getattr(import_module("awq_pycuda.library"), name)
    raise AttributeError(f"module 'awq_pycuda' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_LIBRARY]
