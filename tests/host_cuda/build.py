"""Compiles kernels for the host, with g++: the text of `cuda/*.cu` as it is, behind `host_cuda.h`.

Every module is built twice. `address` has the address and undefined-behaviour sanitizers; `races` calls the race
detector at every access to memory. Floats round as IEEE 754 says, and nothing is contracted but what the kernel writes
as fma: a GPU, where nvcc contracts a * b + c, may differ in the last bit there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
RUNNER = ("runner.cpp", "blocks.cpp", "races.cpp")
CHECKERS = {
    "address": (
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fsanitize-sections=host_shared",
        "-fno-omit-frame-pointer",
    ),
    "races": ("-DHOST_CUDA_RACES",),
}
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fsigned-char")
SEPARATE = ("-fdata-sections", "-fno-gnu-unique")  # a section for each array, and each module has its own
# Inside its own library this would be the thread sanitizer; linked without it, its calls are the race detector's.
INSTRUMENTED = {"address": (), "races": ("-fsanitize=thread",)}

# `extern __shared__ float tile[];` is the one thing of a kernel that C++ has no word for.
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:(?:__align__|alignas)\(\d+\)\s+)?([\w ]+?)\s+(\w+)\[\]\s*;")
_ENTRY = re.compile(r'extern "C" __global__ void\s+(?:__\w+__\((?:[^()]|\([^()]*\))*\)\s*)*(\w+)\s*\(')
_INCLUDED = re.compile(r'^#include "([\w.]+)"', re.MULTILINE)
_ASSEMBLY = re.compile(r"\basm\b")


@dataclass(frozen=True)
class Source:
    """A kernel file and its macros."""

    path: Path
    macros: tuple[tuple[str, int], ...] = ()


def entries(text: str) -> list[str]:
    """The kernels of a source, in its order."""
    return _ENTRY.findall(text)


def with_headers(path: Path) -> str:
    """The text of a source behind those of the headers of its folder that it includes, each once."""
    seen: list[Path] = []

    def read(each: Path) -> str:
        if each in seen or not each.is_file():
            return ""
        seen.append(each)
        text = each.read_text(encoding="utf-8")
        return "".join(read(each.parent / name) for name in _INCLUDED.findall(text)) + text

    return read(path)


def not_run(folder: Path) -> dict[str, str]:
    """The sources of a folder that cannot run here, by name, and why."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cu"))}
    return {name: "it holds PTX (asm)" for name, text in texts.items() if _ASSEMBLY.search(text)}


def for_host(path: Path) -> str:
    """The source with what calls its kernels behind it; every line keeps its number."""
    text = path.read_text(encoding="utf-8")
    body = _DYNAMIC.sub(r"\1* const \2 = static_cast<\1*>(host_cuda::dynamic_shared());", text)
    calls = "".join(f"HOST_CUDA_ENTRY({name})\n" for name in entries(with_headers(path)))
    return f"{body}\n{calls}HOST_CUDA_MODULE\n"


class Builder:
    """What is compiled so far, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._modules: dict[tuple[Source, str], Path] = {}

    def runner(self, checker: str) -> Path:
        """The program that launches the modules of a checker."""
        path = self.folder / f"runner-{checker}"
        if not path.exists():
            sources = [str(HERE / name) for name in RUNNER]
            # Where the kernel spreads addresses far, a program that can lie anywhere may lie in the sanitizer's heap.
            _compile(*CHECKERS[checker], "-no-pie", "-rdynamic", "-o", str(path), *sources, "-ldl")
        return path

    def module(self, source: Source, checker: str) -> Path:
        """The loadable module of a source."""
        key = source, checker
        if key not in self._modules:
            # A name of its own for the file, too, which reports name.
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            text, made = folder / source.path.name, folder / "module.so"
            text.write_text(for_host(source.path), encoding="utf-8")
            macros = [f"-D{name}={value}" for name, value in source.macros]
            include = ["-I", str(HERE), "-I", str(source.path.parent), "-include", "host_cuda.h"]
            flags = [*CHECKERS[checker], *INSTRUMENTED[checker], *SEPARATE]
            _compile(*flags, *macros, *include, "-x", "c++", "-c", "-o", f"{made}.o", str(text))
            _gather_shared_arrays(f"{made}.o")
            _compile("-shared", "-o", str(made), f"{made}.o")
            self._modules[key] = made
        return self._modules[key]


def _compile(*arguments: str) -> None:
    _run("g++", *FLAGS, *arguments)


def _gather_shared_arrays(compiled: str) -> None:
    """Puts those of templates where the others lie: there g++ overlooks the section that `__shared__` asks for."""
    symbols = (line.split()[-2:] for line in _run("nm", compiled).splitlines())
    arrays = [name for kind, name in symbols if kind in "bV" and name.startswith("_ZZ")]  # of functions
    renamed = (f"--rename-section=.bss.{name}=host_shared,alloc,load,data,contents" for name in arrays)
    _run("objcopy", *renamed, compiled)


def _run(program: str, *arguments: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise RuntimeError("the tests of the kernels need g++ on PATH (`make test` installs it; Debian: g++)")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout
