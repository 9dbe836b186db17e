"""A GPU's place taken by two processes of the host: one under the sanitizers, one under the race detector.

Both run every launch, with threads and blocks in opposite orders, and must leave the same bits.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from host_cuda.build import CHECKERS, Builder, Source

# Redzones as wide as the sanitizer has them: an access that is off by a whole row must not land in another array.
SETTINGS = {
    "ASAN_OPTIONS": "abort_on_error=1:detect_leaks=0:detect_odr_violation=0:redzone=2048:max_redzone=2048",
    "UBSAN_OPTIONS": "abort_on_error=1",
}


class KernelFault(Exception):
    """What a checker says of a kernel; the device that it ran on is gone."""


@dataclass(frozen=True)
class Launch:
    """Blocks of the grid and threads of a block along x, y and z; dynamic shared memory."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0


# The struct module's code of its type, and its value: an array or None where that is P.
Argument = tuple[str, np.ndarray | int | float | None]


class Process:
    """One runner; see `runner.cpp` for what it is told."""

    def __init__(self, builder: Builder, checker: str) -> None:
        self._builder, self._checker = builder, checker
        self._said = tempfile.TemporaryFile("w+b")  # noqa: SIM115  # as long as the process
        order = {"HOST_CUDA_BACKWARD": "1"} if checker == "races" else {}
        self._process = subprocess.Popen(
            [builder.runner(checker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=os.environ | SETTINGS | order,
        )
        self._loaded: set[Path] = set()
        self._module: Path | None = None  # of the launch under way

    def ask(self, request: str, data: bytes = b"") -> str:
        """The answer to a request.

        Raises:
            KernelFault: the process has ended; the text is all that it said.
        """
        try:
            self._process.stdin.write(request.encode() + b"\n" + data)
            self._process.stdin.flush()
            answer = self._process.stdout.readline().decode()
        except BrokenPipeError:
            answer = ""
        if not answer.startswith("ok"):
            self._process.wait()
            self._said.seek(0)
            raise KernelFault(self._with_lines(self._said.read().decode(errors="replace")))
        return answer.removeprefix("ok").strip()

    def launch(self, source: Source, kernel: str, launch: Launch, arguments: Sequence[Argument]) -> list[np.ndarray]:
        """The arrays among the arguments as the kernel leaves them.

        Every one lies in an allocation of exactly its size.
        """
        self._module = self._load(source)
        types = self.ask(f"types {self._module} {kernel}")
        given = "".join(code for code, _ in arguments)
        if types != given:
            raise KernelFault(f"kernel {kernel} takes arguments of types {types}, launched with {given}")
        addresses = [self._upload(value) if isinstance(value, np.ndarray) else value for _, value in arguments]
        words = b"".join(_word(code, value or 0) for (code, _), value in zip(arguments, addresses, strict=True))
        sides = " ".join(map(str, (launch.shared_bytes, *launch.grid, *launch.block)))
        self.ask(f"launch {self._module} {kernel} {sides} {len(arguments)}", words)
        left = []
        for (_, value), address in zip(arguments, addresses, strict=True):
            if isinstance(value, np.ndarray):
                left.append(self._download(address, value))
                self.ask(f"free {address}")
        return left

    def _load(self, source: Source) -> Path:
        module = self._builder.module(source, self._checker)
        if module not in self._loaded:
            self.ask(f"load {module}")
            self._loaded.add(module)
        return module

    def _upload(self, values: np.ndarray) -> int:
        """The address of a new array of exactly this size, with these values."""
        address = int(self.ask(f"alloc {values.nbytes}"))
        self.ask(f"write {address} {values.nbytes}", values.tobytes())
        return address

    def _download(self, address: int, like: np.ndarray) -> np.ndarray:
        """A copy of the array at an address, shaped and typed as `like`."""
        self.ask(f"read {address} {like.nbytes}")
        data = self._process.stdout.read(like.nbytes)
        return np.frombuffer(data, like.dtype).reshape(like.shape)

    def close(self) -> None:
        """Ends the process."""
        with suppress(BrokenPipeError):  # of what a process that has ended no longer takes
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._said.close()

    def _with_lines(self, text: str) -> str:
        """The text with plain names of files, and with {0x...}, an address in the module, as file and line."""

        text = text.replace(f"{self._module.parent}/", "")
        return re.sub(r"\{(0x[0-9a-f]+)\}", lambda found: _line(self._module, found[1]), text).strip()


def _line(module: Path, address: str) -> str:
    """The innermost place of an address in a kernel's file: what is inlined stands there as where it comes from."""
    done = subprocess.run(["addr2line", "-e", str(module), address], capture_output=True, text=True, check=True)
    return Path(done.stdout.split(" ", 1)[0].strip()).name


def _word(code: str, value: int | float) -> bytes:
    """An argument in the low bytes of eight."""
    return struct.pack("<" + ("Q" if code == "P" else code), value).ljust(8, b"\0")


class HostDevice:
    """Launches kernels under both checkers; after a fault the next launch starts anew.

    Args:
        builder: compiles what is launched.
        checkers: the names of those to run under, in this order.
    """

    def __init__(self, builder: Builder, checkers: Sequence[str] = tuple(CHECKERS)) -> None:
        self._builder, self._checkers = builder, checkers
        self._processes: dict[str, Process] = {}

    def launch(self, source: Source, kernel: str, launch: Launch, arguments: Sequence[Argument]) -> None:
        """Runs a kernel; arrays among the arguments hold what it leaves in them.

        Raises:
            KernelFault: a checker complains, or the order of threads and blocks makes a difference.
        """
        left = []
        for checker in self._checkers:
            if checker not in self._processes:
                self._processes[checker] = Process(self._builder, checker)
            try:
                left.append(self._processes[checker].launch(source, kernel, launch, arguments))
            except KernelFault:
                self.close()
                raise
        arrays = [value for _, value in arguments if isinstance(value, np.ndarray)]
        for array, *values in zip(arrays, *left, strict=True):
            if not kernel.endswith("_atomic") and len({value.tobytes() for value in values}) > 1:
                raise KernelFault(f"kernel {kernel}: its result depends on the order of the threads")
            array[...] = values[0]

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes.values():
            process.close()
        self._processes.clear()
