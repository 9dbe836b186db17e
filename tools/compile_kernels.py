"""Compiles every cuda/*.cu for each supported architecture, warnings as errors, and prints registers and spills.

A line `// compile: -DTILE=16` in a kernel's file asks for one compilation with those flags; a file may have several
such lines, one a variant. A file without one is compiled once, without macros.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a bare checkout, without the package installed

from awq_pycuda.backends.cuda.toolchain import Toolchain, find_toolchain  # noqa: E402
from awq_pycuda.errors import InputError  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # A100, H100 and H200, B200

_VARIANT = re.compile(r"^// compile:(.*)$", re.MULTILINE)
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Job:
    """One compilation."""

    source: Path
    macros: tuple[str, ...]
    arch: str

    def __str__(self) -> str:
        return " ".join((self.source.name, *self.macros, self.arch))


def jobs_for(folder: Path) -> list[Job]:
    """Every compilation that the files of `folder` ask for, in a fixed order."""
    return [
        Job(source, macros, arch)
        for source in sorted(folder.glob("*.cu"))
        for macros in [tuple(shlex.split(line)) for line in _VARIANT.findall(source.read_text())] or [()]
        for arch in ARCHITECTURES
    ]


def compile_job(job: Job, toolchain: Toolchain) -> tuple[bool, str]:
    """Whether it compiled, and what to print: a line for each of its kernels, or nvcc's complaint."""
    with tempfile.TemporaryDirectory() as folder:
        command = [toolchain.nvcc, *toolchain.flags, "-cubin", f"-arch={job.arch}", "-Werror", "all-warnings"]
        command += ["-Xptxas", "-v", *job.macros, "-o", str(Path(folder, "kernel.cubin")), str(job.source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode != 0:
        return False, f"FAILED {job}\n{said.rstrip()}"
    kernels = list(_ENTRY.finditer(said))
    if not kernels:
        return False, f'FAILED {job}: holds no kernel (extern "C" __global__)'
    return True, "\n".join(f"{job}: {_summary(kernel)}" for kernel in kernels)


def _summary(kernel: re.Match[str]) -> str:
    shared = _SHARED.search(kernel["rest"])
    text = f"{kernel['name']}: {kernel['registers']} registers, {shared[1] if shared else 0} B shared"
    spilled = int(kernel["stores"]) + int(kernel["loads"])
    return text + (f", SPILLS {kernel['stores']} B stores, {kernel['loads']} B loads" if spilled else ", no spills")


def main() -> int:
    """The exit code: 0 if all compiled, 1 if any did not or there is nothing to compile, 2 without a toolchain."""
    try:
        toolchain = find_toolchain()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    jobs = jobs_for(ROOT / "cuda")
    if not jobs:
        print("no kernels: cuda/ holds no .cu file", file=sys.stderr)
        return 1
    print(f"nvcc {toolchain.version} ({toolchain.nvcc})")
    failed = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for compiled, text in pool.map(lambda job: compile_job(job, toolchain), jobs):
            print(text, flush=True)
            failed += not compiled
    print(f"{len(jobs) - failed} of {len(jobs)} compilations passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
