"""What a result was made by: versions, commit, kernels, time."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from awq_pycuda import __version__
from awq_pycuda.backends.base import Backend
from awq_pycuda.kernels import table
from awq_pycuda.paths import resource_dir

_LIBRARIES = ("numpy", "h5py", "hydra-core", "omegaconf")

version = lru_cache(metadata.version)  # reads files, and a process keeps the libraries that it has loaded


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that every run uses."""
    return {
        "awq_pycuda": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def made_by(backend: Backend[Any]) -> dict[str, str | bool]:
    """The attributes of a file of results that say what made them: backend, device, libraries and state of the code."""
    commit, dirty = git_state()
    return {
        "backend": backend.name,
        "device": json.dumps(backend.device()),
        "versions": json.dumps(versions() | backend.versions()),
        "git_commit": commit,
        "git_dirty": dirty,
        "kernels_sha256": kernels_sha256(),
    }


def created() -> str:
    """Now, in UTC, ISO 8601 with seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def kernels_sha256() -> str:
    """SHA-256 over names and contents of all kernel sources, and over their constants; 64 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(resource_dir("cuda").glob("*.cu*")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    digest.update("\n".join(table.constants()).encode())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def git_state() -> tuple[str, bool]:
    """Commit of the checkout that this package runs from, and whether it has changes; ("", False) outside one.

    As it is when it is first asked for: the process goes on with the code that it has loaded.
    """
    checkout = Path(__file__).resolve().parent.parent
    # An installed package may lie inside somebody else's repository: only its own checkout counts.
    if not (checkout / ".git").exists():
        return "", False

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "", False
