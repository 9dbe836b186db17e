"""Which backend a run gets, and why."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from awq_pycuda.backends.base import Backend
from awq_pycuda.backends.cpu import CpuBackend
from awq_pycuda.config import BackendChoice, SearchPlace
from awq_pycuda.errors import InputError
from awq_pycuda.kernels import table
from awq_pycuda.kernels.variant import Device
from awq_pycuda.quant import for_kernels
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.signals import importing

# Runs of fewer weights are over before Numba is imported and has its loops from disk: 0.6 s, and 3 s the first time.
COMPILED_FROM = 1 << 20


def why_not_compiled() -> str | None:
    """Why the CPU's loops cannot be compiled here, in a few words; None where they are, ready to be called."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    try:
        with importing():
            import awq_pycuda.backends.compiled  # noqa: F401
    except Exception as error:  # not installed, of another NumPy; no folder to keep them in, or damaged files there
        return f"Numba cannot be used ({type(error).__name__}: {' '.join(str(error).split())})"
    return None


def cpu_backend(weights: int) -> tuple[CpuBackend, str]:
    """The CPU backend for a run of so many weights, and what to say of it, if anything."""
    if weights < COMPILED_FROM:
        return CpuBackend(), ""
    obstacle = why_not_compiled()
    if obstacle is not None:
        return CpuBackend(), f"; loops in NumPy: {obstacle}"
    from awq_pycuda.backends.compiled import CompiledCpuBackend

    return CompiledCpuBackend(), "; loops compiled by Numba"


@cache
def why_no_cuda() -> str | None:
    """Why CUDA cannot be used in this process, in a few words; None where it can. Creates no context."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver (libcuda.so.1)"
    try:
        with importing():
            import cuda.bindings.driver  # noqa: F401  # prefetches managed memory
            import pycuda.driver as driver
    except ImportError as error:
        return f"PyCUDA or cuda-bindings cannot be imported ({error}); 'make setup-cuda' installs them"
    try:
        driver.init()
    except driver.Error as error:
        return f"the NVIDIA driver does not start ({error})"
    return None if driver.Device.count() else "the NVIDIA driver sees no device"


def open_cuda() -> None:
    """Has CUDA ready for this process's first run, where it can be used; `choose_backend` says why it cannot."""
    if why_no_cuda() is not None:
        return
    import awq_pycuda.backends.cuda.backend  # noqa: F401
    from awq_pycuda.backends.cuda.device import open_gpu

    with suppress(Exception):  # a GPU out of memory, say: told when a run asks for it
        open_gpu()


def settle_variants(
    choices: Mapping[str, str], tile: int, form: Format, device: Device
) -> tuple[dict[str, str], list[str]]:
    """The variants that run on this device, with this tile and this format: `auto` becomes the first that can.

    Returns:
        The variants by stage, and of each that was left to `auto` a few words: which it is, why no better one, and
        whether the config's tile counts.

    Raises:
        InputError: the first chosen kernel that cannot, and which ones can.
    """
    asked = {"TILE": tile, **for_kernels.values(form)}
    settled, told = {}, []
    for stage, name in choices.items():
        found = table.variants(stage).values()
        obstacles = {each.name: each.obstacle(each.defaults() | asked, device) for each in found}
        wanted = table.BEST[stage] if name == table.AUTO else (name,)
        able = [each for each in wanted if obstacles[each] is None]
        if not able:
            allowed = ", ".join(each for each, obstacle in obstacles.items() if obstacle is None) or "backend=cpu"
            raise InputError(f"{table.KEYS[stage]}={name}: {obstacles[wanted[-1]]}; allowed here: {allowed}")
        settled[stage] = able[0]
        if name == table.AUTO:
            better = [f"{each} {obstacles[each]}" for each in wanted[: wanted.index(able[0])]]
            why = f": {'; '.join(better)}" if better else ""
            unused = "" if "TILE" in table.find(stage, able[0]).parameters else ", which has no tile"
            told.append(f"{table.KEYS[stage]} {able[0]} ({table.AUTO}{why}){unused}")
    return settled, told


def settle_search(stage: str, layers: Sequence[Mapping[str, int]], device: Device) -> list[str]:
    """What searches the scales of these layers where the best cannot, in a few words, and why.

    Args:
        stage: of the table of kernels.
        layers: the sizes of each, by that table's names.
        device: to run on.
    """
    told = []
    for sizes in layers:
        better = []
        for variant in table.candidates(stage):
            obstacle = variant.obstacle(variant.complete({**sizes, "memory_bytes": device.memory_bytes}), device)
            if obstacle is None:
                break
            better.append(f"{variant.name} {obstacle}")
        if better:
            told.append(f"{stage} {variant.name} ({'; '.join(better)})")
    return list(dict.fromkeys(told))


def no_device_search(convention: Convention, shares: bool) -> str | None:
    """Why the kernels cannot search for a convention, in a few words; `shares`: whether layers share their scales."""
    form = convention.quantizer
    if convention.clip is not None and convention.clip.joint:
        return "its kernels clip no weights, as clip.joint=true asks of each candidate"
    if shares and form.has_tensor_scale:
        return f"to its kernels layers that share s are one matrix, with one factor for {form.step_dtype.name} steps"
    return None


def choose_backend(
    wanted: BackendChoice,
    variants: Mapping[str, str],
    tile: int,
    convention: Convention,
    search: SearchPlace,
    weights: int,
    shares: bool = False,
    in_chunks: bool = False,
) -> tuple[Backend[Any], dict[str, str], SearchPlace, str]:
    """The backend asked for, not yet entered; what runs there, and one line that says what that is and why.

    Args:
        wanted: by the user.
        variants: the kernel of each stage that has several, by the stage's name.
        tile: of the kernels that leave theirs to the config.
        convention: of the run, whose format and candidates not every kernel takes.
        search: where scales are to be searched.
        weights: of all layers.
        shares: whether layers share their scales.
        in_chunks: whether activations stay in their file.

    Returns:
        The backend, the variants, where scales are searched, and the line.

    Raises:
        InputError: backend=cuda where CUDA cannot be used, search.where=device without it, or a kernel that cannot do
            what it is chosen for.
    """
    form = convention.quantizer
    obstacle = None if wanted is BackendChoice.cpu else why_no_cuda()
    if in_chunks and obstacle is None and wanted is not BackendChoice.cpu:
        obstacle = "cuda takes no activations in chunks (inputs.chunk_tokens)"
    if wanted is BackendChoice.cuda and obstacle is not None:
        raise InputError(f"backend=cuda: {obstacle}; allowed here: auto, cpu")
    if wanted is BackendChoice.cpu or obstacle is not None:
        reason = "as asked" if obstacle is None else f"auto: {obstacle}"
        if search is SearchPlace.device:
            raise InputError(f"search.where=device: the backend is cpu ({reason}); allowed here: auto, host")
        cpu, loops = cpu_backend(weights)
        return cpu, dict(variants), search, f"backend cpu ({reason}){loops}"
    from awq_pycuda.backends.cuda.backend import CudaBackend
    from awq_pycuda.backends.cuda.device import open_gpu

    settled, told = settle_variants(variants, tile, form, open_gpu().limits)
    if search is not SearchPlace.host and (without := no_device_search(convention, shares)):
        if search is SearchPlace.device:
            raise InputError(f"search.where=device: {without}; allowed here: auto, host")
        search = SearchPlace.host
        told.append(f"search on the host (auto: {without})")
    backend = CudaBackend({"TILE": tile}, settled, search is SearchPlace.host)
    reason = "as asked" if wanted is BackendChoice.cuda else "auto: a driver and a device are there"
    return backend, settled, search, "; ".join([f"backend cuda ({reason}): {backend.device()['name']}", *told])
