"""Finds nvcc and the cuRAND headers. Imports no PyCUDA, so that kernels can be compiled where there is no driver."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from awq_pycuda.errors import InputError

_PYPI_TOOLKIT = Path("nvidia", "cu13")  # where PyPI's CUDA 13 packages unpack, under site-packages
_REMEDY = "install a CUDA toolkit, or run `make setup-cuda` (it installs requirements-cuda-toolkit.txt)"


@dataclass(frozen=True)
class Toolchain:
    """An nvcc that can compile the kernels.

    Attributes:
        nvcc: its path.
        version: its version, such as ``13.0.88``.
        flags: what every call of it needs so that all headers are found; empty for a complete toolkit.
    """

    nvcc: str
    version: str
    flags: tuple[str, ...]


def find_toolchain() -> Toolchain:
    """The nvcc that the environment names (NVCC, CUDA_HOME, CUDA_PATH, PATH), else the one from PyPI's packages.

    Raises:
        InputError: there is none, it does not run, or the cuRAND headers are nowhere; the line says what to install.
    """
    nvcc = _find_nvcc()
    version = re.search(r"\bV(\d+\.\d+\.\d+)", _output(nvcc, "--version"))
    if version is None:
        raise InputError(f"nvcc={nvcc}: prints no version, so it is not nvcc; {_REMEDY}")
    return Toolchain(nvcc, version[1], _curand_flags(nvcc))


def _find_nvcc() -> str:
    named = os.environ.get("NVCC")
    if named:
        found = shutil.which(named)
        if found is None:
            raise InputError(f"NVCC={named}: no such program; allowed: the path of nvcc, or unset to search for it")
        return found
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    for places in (*(str(Path(home, "bin")) for home in homes), None, *(str(kit / "bin") for kit in _pypi_toolkits())):
        found = shutil.which("nvcc", path=places)
        if found is not None:
            return found
    raise InputError(f"nvcc: not in NVCC, CUDA_HOME, CUDA_PATH, PATH or Python's packages; {_REMEDY}")


def _pypi_toolkits() -> list[Path]:
    return [Path(entry, _PYPI_TOOLKIT) for entry in sys.path]


def _curand_flags(nvcc: str) -> tuple[str, ...]:
    """The flags that let this nvcc find ``curand_kernel.h``.

    A toolkit may come without cuRAND. Then PyPI's headers help out, as `-isystem`: the compiler looks there only after
    nvcc's own folders, so only cuRAND comes from there, even if PyPI's toolkit is of another version.
    """
    # Asked of the compiler itself, because a distribution's nvcc, CPATH or nvcc.profile may add folders.
    question = "#if __has_include(<curand_kernel.h>)\ncurand_found\n#endif\n"
    if "curand_found" in _output(nvcc, "-x", "c++", "-E", "-", stdin=question):
        return ()
    for toolkit in _pypi_toolkits():
        include = toolkit / "include"
        if (include / "curand_kernel.h").is_file():
            return ("-isystem", str(include))
    raise InputError(f"nvcc={nvcc}: its toolkit has no cuRAND headers (curand_kernel.h), nor has Python; {_REMEDY}")


def _output(nvcc: str, *arguments: str, stdin: str = "") -> str:
    try:
        done = subprocess.run([nvcc, *arguments], input=stdin, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"nvcc={nvcc}: cannot be run ({error.strerror}); {_REMEDY}") from error
    if done.returncode != 0:
        # Most often nvcc finds no host compiler; its first line says so.
        said = next(iter((done.stderr or done.stdout).strip().splitlines()), f"exit code {done.returncode}")
        raise InputError(f"nvcc={nvcc}: does not work ({said}); needs a CUDA toolkit and a C++ compiler such as g++")
    return done.stdout
