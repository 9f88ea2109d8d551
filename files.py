"""Writing files so that a final name only ever holds a finished file. The one module that every room may import."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
    flush(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """`written_atomically` for what is in memory; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as file:
        file.write(content)


def flush(path: Path) -> None:
    """Ask the disk to hold a file's bytes, or a folder's names: a flushed file keeps its bytes, not its new name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
