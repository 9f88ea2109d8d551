"""Where a dataset's shards lie, and writing files so that a final name only ever holds a finished file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol


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


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """A hidden neighbor to write to, then flushed to the disk and renamed over ``path``, the name flushed too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_names(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """`written_atomically` for what is in memory; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as file:
        file.write(content)


def flush_names(folder: Path) -> None:
    """Ask the disk to hold a folder's names; flushing a file keeps its bytes, not the name that it was given."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
