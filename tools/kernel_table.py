"""Prints the table of kernels as the documents show it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a bare checkout

from awq_pycuda.kernels.launches import ONLY
from awq_pycuda.kernels.table import KEYS, VARIANTS
from awq_pycuda.kernels.variant import Variant, words


def row(variant: Variant) -> tuple[str, ...]:
    """Its cells: stage, what chooses it, file, entry points, macros, what it does."""
    if variant.name == ONLY:
        chosen = ""
    else:
        chosen = f"`{KEYS[variant.stage]}={variant.name}`" if variant.stage in KEYS else "sizes, format"
    entries = ", ".join(f"`{kernel.entry}`" for kernel in variant.kernels)
    macros = [f"`{name}` {value}" for name, value in variant.macros.items()]
    macros += [f"`{name}` {words(parameter.allowed)}" for name, parameter in variant.parameters.items()]
    return f"`{variant.stage}`", chosen, f"`{variant.file}`", entries, ", ".join(macros), variant.help


def main() -> None:
    """Prints Markdown."""
    print("| stage | chosen by | file | entry points | macros | what it does |")
    print("|---|---|---|---|---|---|")
    for variant in VARIANTS:
        print(f"| {' | '.join(row(variant))} |")


if __name__ == "__main__":
    main()
