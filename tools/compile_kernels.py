"""Compiles what the table of kernels lists, for each architecture, warnings as errors; a kernel that spills fails, too.

    python tools/compile_kernels.py                what CI compiles
    python tools/compile_kernels.py --every TILE   all that a parameter of a kernel allows, not the table's choice of it

Prints the registers and the shared memory of each kernel. A file under cuda/ that is in no entry of the table fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from a bare checkout, without the package installed

from awq_pycuda.backends.cuda.toolchain import Toolchain, find_toolchain  # noqa: E402
from awq_pycuda.errors import InputError  # noqa: E402
from awq_pycuda.kernels import bench_table  # noqa: E402
from awq_pycuda.kernels.table import ARCHITECTURES, VARIANTS  # noqa: E402
from awq_pycuda.kernels.variant import Source, Variant  # noqa: E402

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

    source: Source
    arch: str

    def __str__(self) -> str:
        return " ".join((self.source.file, *self.source.flags(), self.arch))


def jobs_for(variants: Sequence[Variant], every: str = "") -> list[Job]:
    """Every compilation that these entries ask for, each once, in their order; `every` as `Variant.compiled` has it."""
    return list(
        dict.fromkeys(
            Job(source, source.arch(capability))
            for variant in variants
            for source in variant.compiled(every)
            for capability in ARCHITECTURES
            if variant.runs_on(capability)
        )
    )


def compile_job(job: Job, folder: Path, toolchain: Toolchain) -> tuple[bool, str]:
    """Whether it compiled without spills, and what to print: a line for each of its kernels, or nvcc's complaint.

    Args:
        job: what to compile.
        folder: where its source lies.
        toolchain: the nvcc to use.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [toolchain.nvcc, *toolchain.flags, "-cubin", f"-arch={job.arch}", "-Werror", "all-warnings"]
        command += ["-Xptxas", "-v", *job.source.flags(), "-o", str(Path(scratch, "kernel.cubin"))]
        done = subprocess.run([*command, str(folder / job.source.file)], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode != 0:
        return False, f"FAILED {job}\n{said.rstrip()}"
    kernels = list(_ENTRY.finditer(said))
    if not kernels:
        return False, f'FAILED {job}: holds no kernel (extern "C" __global__)'
    fine = not any(map(_spilled, kernels))
    return fine, "\n".join(f"{'' if fine else 'FAILED '}{job}: {_summary(kernel)}" for kernel in kernels)


def _spilled(kernel: re.Match[str]) -> int:
    return int(kernel["stores"]) + int(kernel["loads"])


def _summary(kernel: re.Match[str]) -> str:
    shared = _SHARED.search(kernel["rest"])
    text = f"{kernel['name']}: {kernel['registers']} registers, {shared[1] if shared else 0} B shared"
    if _spilled(kernel):
        return f"{text}, spills: {kernel['stores']} B stores, {kernel['loads']} B loads"
    return f"{text}, no spills"


def compile_all(variants: Sequence[Variant], folder: Path, every: str = "") -> int:
    """The exit code: 0 if all compiled and none spills, 1 if any did or a file has no entry, 2 without a toolchain."""
    try:
        toolchain = find_toolchain()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"nvcc {toolchain.version} ({toolchain.nvcc})")
    failed = 0
    for file in sorted({path.name for path in folder.glob("*.cu")} - {variant.file for variant in variants}):
        print(f"FAILED {file}: in no entry of the table of kernels (awq_pycuda/kernels/table.py)")
        failed += 1
    jobs = jobs_for(variants, every)
    passed = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for fine, text in pool.map(lambda job: compile_job(job, folder, toolchain), jobs):
            print(text, flush=True)
            passed += fine
    print(f"{passed} of {len(jobs)} compilations passed")
    return 0 if passed == len(jobs) and not failed else 1


def main() -> int:
    """See `compile_all`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", default="", choices=sorted({name for each in VARIANTS for name in each.parameters}))
    return compile_all((*VARIANTS, *bench_table.VARIANTS), ROOT / "cuda", parser.parse_args().every)


if __name__ == "__main__":
    sys.exit(main())
