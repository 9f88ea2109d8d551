"""How fast tokens are read: the loader beside stock WebDataset and a memory map, taking turns in one process.

    python benchmarks/data_loading.py [DATASET] [--rounds 7] [--batch 8] [--length 2048]

The same as `potamos data bench`, with a table for the record. Without a dataset 24 million random tokens are written to
a temporary folder first. Speeds are per second of processor time, all threads of the process together, so they are per
core; each is the median of the rounds. The table goes to benchmarks/results/data_loading.csv.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import stamp, write_table

from potamos.data.bench import BenchReport, bench


def table(report: BenchReport) -> list[dict[str, Any]]:
    marks = {**stamp(), "numpy": version("numpy"), "webdataset": version("webdataset")}
    return [
        {
            "what": row.name,
            "unit": row.unit,
            "median": f"{row.median:.3f}",
            "lowest": f"{row.lowest:.3f}",
            "highest": f"{row.highest:.3f}",
            "measurements": row.count,
            "dataset": "random" if report.path is None else report.path.name,
            **marks,
        }
        for row in report.rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?", help="a prepared dataset; random tokens when not given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=24_000_000, help="that the loader reads a round, at most")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data_loading.csv")
    chosen = parser.parse_args()
    report = bench(
        chosen.dataset,
        rounds=chosen.rounds,
        batch=chosen.batch,
        length=chosen.length,
        tokens=chosen.tokens,
        progress=lambda what: print(what, flush=True),
    )
    write_table(chosen.out, table(report))


if __name__ == "__main__":
    main()
