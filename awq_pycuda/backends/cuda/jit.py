"""Kernel sources to loaded modules: PyCUDA's SourceModule with macros, behind a cache that is safe to share."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs
from pycuda.compiler import SourceModule, compile
from pycuda.driver import module_from_buffer

from awq_pycuda.backends.cuda.device import Gpu
from awq_pycuda.backends.cuda.early import toolchain
from awq_pycuda.backends.cuda.toolchain import Toolchain
from awq_pycuda.kernels.variant import Source
from awq_pycuda.paths import resource_dir


class CachedModule(SourceModule):
    """A SourceModule made from a cubin that is there already.

    SourceModule's own cache runs `nvcc --preprocess` at every hit of a source with an #include, and a second process
    can read a file that the first is still writing. So the compilation is PyCUDA's, the cache is ours.
    """

    def __init__(self, cubin: bytes) -> None:
        self.module = module_from_buffer(cubin)
        self._bind_module()


def load(gpu: Gpu, sources: Sequence[Source]) -> list[SourceModule]:
    """The modules of these sources, in their order; what is missing is compiled in parallel, then loaded.

    Needs the context to be current.

    Raises:
        InputError: there is no nvcc.
        pycuda.driver.CompileError: nvcc refuses a source.
    """
    missing = list(dict.fromkeys(source for source in sources if source not in gpu.modules))
    if missing:
        kit, capability = toolchain(), gpu.limits.capability
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            cubins = list(pool.map(lambda source: _cubin(source, kit, source.arch(capability)), missing))
        for source, cubin in zip(missing, cubins, strict=True):
            gpu.modules[source] = CachedModule(cubin)
    return [gpu.modules[source] for source in sources]


def _cubin(source: Source, kit: Toolchain, arch: str) -> bytes:
    folder = resource_dir("cuda")
    text = (folder / source.file).read_text(encoding="utf-8")
    options = [*kit.flags, *source.flags()]
    headers = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cuh"))}
    path = _cache_folder() / f"{Path(source.file).stem}-{_key(text, headers, options, kit.version, arch)}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    cubin: bytes = compile(
        text, nvcc=kit.nvcc, options=options, no_extern_c=True, arch=arch, cache_dir=False, include_dirs=[str(folder)]
    )
    _publish(path, cubin)
    return cubin


def _key(text: str, headers: Mapping[str, str], options: Sequence[str], nvcc_version: str, arch: str) -> str:
    """Everything that decides the machine code; 64 hex digits."""
    return hashlib.sha256(repr((text, sorted(headers.items()), list(options), nvcc_version, arch)).encode()).hexdigest()


def _cache_folder() -> Path:
    return Path(platformdirs.user_cache_dir("awq_pycuda", appauthor=False))


def _publish(path: Path, cubin: bytes) -> None:
    """Puts the file in place whole: readers in other processes see all of it or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, path.name)
            whole.write_bytes(cubin)
            os.replace(whole, path)
    except OSError:
        # A cache that cannot be written costs time at the next start, nothing else.
        return
