"""The CUDA backend's own code, its launches answered by the host."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np

from awq_pycuda.backends.base import Backend
from host_cuda import driver

_CUDA = "awq_pycuda.backends.cuda"
_MODULES = ("device", "early", "graph", "jit", "memory")
_REPLACED = ("pycuda.driver", "pycuda.compiler", *(f"{_CUDA}.{name}" for name in _MODULES))


def host_backend(
    parameters: Mapping[str, int],
    choices: Mapping[str, str],
    sources: Path | None = None,
    search_on_host: bool = False,
) -> Backend:
    """`CudaBackend(parameters, choices)`, with the kernels of a folder, by default of `cuda/`."""
    backend = _backend_class()(parameters, choices, search_on_host)
    if sources is not None:
        backend._gpu.sources = sources
    return backend


@lru_cache(maxsize=1)
def _backend_class() -> type[Backend]:
    class HostBackend(_launchers().CudaBackend):
        name = "host"

        def _scratch(self, sizes):
            """Every array on its own, so that none runs on into the next."""
            arrays = {name: self.empty((size,), np.uint8) for name, size in sizes.items()}
            return {name: (array.pointer, array.array.nbytes) for name, array in arrays.items()}

    return HostBackend


def _launchers() -> ModuleType:
    """The module of the CUDA backend, a copy of its own, with `driver` in place of what needs a GPU."""
    origin = importlib.util.find_spec(f"{_CUDA}.backend").origin
    spec = importlib.util.spec_from_file_location("host_cuda.launchers", origin)
    module = importlib.util.module_from_spec(spec)
    stand_ins = {"pycuda": ModuleType("pycuda")} | dict.fromkeys(_REPLACED, driver)
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        spec.loader.exec_module(module)
    finally:
        for name, found in before.items():
            if found is None:
                del sys.modules[name]
            else:
                sys.modules[name] = found
    return module
