"""Prints the goals of a benchmark as the documents show them: `goal_table.py FILE`, or the first COUNT of them.

The file comes from `python -m awq_pycuda.bench case=goals out=FILE` on a machine with a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a bare checkout

from awq_pycuda.benchmarks.goal_table import HEADINGS, ceilings, cells, conditions
from awq_pycuda.results.bench_reader import read_bench


def main() -> None:
    """Prints Markdown."""
    record = read_bench(Path(sys.argv[1]))
    print(f"{conditions(record)}. Ceilings: {ceilings(record)}.\n")
    rows = [HEADINGS, ("---",) * len(HEADINGS), *cells(record)]
    for row in rows[: 2 + int(sys.argv[2])] if len(sys.argv) > 2 else rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
