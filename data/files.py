"""Where a dataset's shards lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class ShardFiles(Protocol):
    """Gives the shards of one dataset as local files, each with its index beside it.

    Shards are numbered in the order of dataset.json, dropped ones included. A shard may be given up and fetched again:
    a reader compares the files' identity, so a new file is mapped and checked anew.
    """

    def path(self, shard: int) -> Path:
        """A complete local file; waits for it where it must be fetched. Raises DataError when it cannot be had."""
        ...

    def prefetch(self, shards: Sequence[int]) -> None:
        """A hint that these are read next, in this order; returns at once."""
        ...

    def keep(self, shards: Sequence[int]) -> None:
        """Only these are read from now on, until others are asked for; the rest may be given up."""
        ...


class LocalFiles:
    """Shards that lie in the dataset's own folder."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self._paths = [folder / name for name in names]

    def path(self, shard: int) -> Path:
        return self._paths[shard]

    def prefetch(self, shards: Sequence[int]) -> None:
        """Nothing to fetch."""

    def keep(self, shards: Sequence[int]) -> None:
        """Nothing to give up."""
