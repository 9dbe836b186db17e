"""Writes the lock files that `make` installs from: `tools/lock.py UV` renews locks/ from the requirement files.

One resolution over all sets, for every Python and platform, so that the sets fit together in one environment. The first
line of each lock says how much it brings beside those that every environment has.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"
# By lock: its requirement file. Every environment has the first two.
SETS = {
    "build": "requirements-build.txt",
    "run": "requirements-cpu.txt",
    "dev": "requirements-dev.txt",
    "capture": "requirements-capture.txt",
    "checkpoints": "requirements-checkpoints.txt",
    "truth": "requirements-truth.txt",
    "cluster": "requirements-cluster.txt",
    "cuda": "requirements.txt",
    "cuda-toolkit": "requirements-cuda-toolkit.txt",
}
# Those that stand on PyTorch, which has locks of its own.
WITH_TORCH = ("capture", "checkpoints")
# Those of which nothing but the packages named is installed.
ALONE = ("truth",)
# PyPI's PyTorch for Linux brings CUDA, which nothing here uses: gigabytes. PyTorch's own index has one without.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_WHEELS = r"(cp311-cp311|cp312-cp312|cp313-cp313)-manylinux_2_28_(x86_64|aarch64)\.whl#sha256=([0-9a-f]{64})"
TORCH = """\
# {head}
# Without CUDA. From the index of PyTorch itself, or any that pip is told of; what is installed is what was hashed.
--extra-index-url {index}
{requirement} ; sys_platform == 'linux' \\
{hashes}
"""

Package = dict[str, Any]


def compile_with(uv: str, *arguments: str | Path) -> None:
    """Runs uv's resolver for every Python from 3.11 on and every platform."""
    fixed = ("pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--no-header", "--no-annotate")
    subprocess.run([uv, *fixed, *arguments], cwd=ROOT, check=True)


def packages(uv: str, options: list[str | Path], folder: Path) -> dict[str, Package]:
    """The packages of a set that this machine would install, by name, with the sizes of their files."""
    path = folder / "pylock.toml"
    path.unlink(missing_ok=True)
    compile_with(uv, *options, "--format", "pylock.toml", "--output-file", path)
    found = tomllib.loads(path.read_text(encoding="utf-8"))["packages"]
    return {each["name"]: each for each in found if "marker" not in each or Marker(each["marker"]).evaluate()}


def size(package: Package) -> int:
    """Bytes of the file that pip would take here: the best wheel, or the source."""
    wheels = {tag: each for each in package.get("wheels", ()) for tag in parse_wheel_filename(file_name(each))[3]}
    chosen = next((wheels[tag] for tag in sys_tags() if tag in wheels), None) or package["sdist"]
    return int(chosen["size"])


def file_name(file: Package) -> str:
    """The name of a package's file, from its address."""
    return str(file["url"]).rpartition("/")[2].replace("%2B", "+")


def in_words(count: int, size: float) -> str:
    """How much a lock brings."""
    return f"{count} package{'s' if count > 1 else ''}, about {max(size / 1e6, 1):.0f} MB"


def lock_cpu_torch(version: str) -> str:
    """Renews locks/torch.txt; the line that says so.

    Raises:
        OSError: the index cannot be reached.
        ValueError: it has no such release, or in another form.
    """
    with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=20) as answer:
        page = answer.read().decode()
    found = re.findall(rf'href="([^"]*torch-{re.escape(version)}(?:%2B|\+)cpu-{CPU_WHEELS})"', page)
    if len(found) != 6:
        raise ValueError(f"{CPU_INDEX} has {len(found)} files of PyTorch {version} for Linux, not 6")
    with urllib.request.urlopen(
        urllib.request.Request(f"{CPU_INDEX}/{found[0][0].rpartition('/')[2]}", method="HEAD"), timeout=20
    ) as answer:
        head = in_words(1, int(answer.headers["Content-Length"]))
    hashes = " \\\n".join(f"    --hash=sha256:{digest}" for digest in sorted(match[-1] for match in found))
    text = TORCH.format(head=head, index=CPU_INDEX, requirement=f"torch=={version}+cpu", hashes=hashes)
    (LOCKS / "torch.txt").write_text(text, encoding="utf-8")
    return f"locks/torch.txt: {head}"


def main(uv: str) -> None:
    """Renews every lock."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        together = folder / "all.txt"
        compile_with(uv, *(source for name, source in SETS.items() if name not in ALONE), "--output-file", together)
        torch = folder / "torch.txt"
        (pin,) = re.findall(r"^torch==.*$", together.read_text(encoding="utf-8"), re.MULTILINE)
        torch.write_text(f"{pin}\n", encoding="utf-8")
        of_torch = packages(uv, [torch, "--constraint", together], folder)
        apart = ["torch", "triton", *(name for name in of_torch if name.startswith(("nvidia-", "cuda-")))]
        common: set[str] = set()
        sources: dict[str, str | Path] = {**SETS, "torch-pypi": torch}
        for name, source in sources.items():
            options: list[str | Path] = [source, "--constraint", together]
            if name in WITH_TORCH:
                options += [f"--no-emit-package={each}" for each in apart]
            if name in ALONE:
                options.append("--no-deps")
            path = LOCKS / f"{name}.txt"
            path.unlink(missing_ok=True)
            compile_with(uv, *options, "--generate-hashes", "--output-file", path)
            brings = {key: size(each) for key, each in packages(uv, options, folder).items() if key not in common}
            common |= set(brings) if name in ("build", "run") else set()
            head = in_words(len(brings), sum(brings.values()))
            path.write_text(f"# {head}\n{path.read_text(encoding='utf-8')}", encoding="utf-8")
            print(f"locks/{name}.txt: {head}")
    version = pin.removeprefix("torch==").split()[0]
    try:
        print(lock_cpu_torch(version))
    except (OSError, ValueError) as error:
        kept = f"torch=={version}+cpu " in (LOCKS / "torch.txt").read_text(encoding="utf-8")
        print(f"locks/torch.txt: kept, of {'this' if kept else 'ANOTHER'} release: {error}", file=sys.stderr)
        sys.exit(not kept)


if __name__ == "__main__":
    main(sys.argv[1])
