"""Trees of plain text files: one file, one document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from potamos.data.sources.base import START_BYTES, Document, Input, Record
from potamos.data.sources.files import file_size, relative

GROUP_BYTES = 256 * 2**20
SUFFIXES = (".txt", ".md", ".rst")


class TextFiles:
    """UTF-8 text in the order of the sorted paths, in inputs of about 256 MiB of consecutive files.

    A file that is not UTF-8, or larger than ``max_file_bytes``, is a bad record: counted, listed and skipped. A byte
    order mark is no part of the text.
    """

    shard_chunks = 512

    def __init__(self, paths: Sequence[Path], root: Path, name: str, *, max_file_bytes: int = GROUP_BYTES):
        self._paths, self._root, self._name, self._max_file_bytes = list(paths), root, name, max_file_bytes

    @property
    def description(self) -> dict[str, Any]:
        return {
            "kind": "text",
            "name": self._name,
            "files": len(self._paths),
            "max_file_bytes": self._max_file_bytes,
        }

    def inputs(self) -> list[Input]:
        """Groups named by their first file."""
        groups: list[Input] = []
        files: list[Path] = []
        size = 0
        for path in self._paths:
            files.append(path)
            size += file_size(path)
            if size >= GROUP_BYTES:
                groups.append(Input(relative(files[0], self._root), tuple(files), size))
                files, size = [], 0
        if files:
            groups.append(Input(relative(files[0], self._root), tuple(files), size))
        return groups

    def read(self, input: Input, record: Record) -> Iterator[Document]:
        record.start(input, "files")
        for path in input.files:
            name = relative(path, self._root)
            record.lines += 1
            parts, size = [], 0
            for block in record.blocks(path, name):
                size += len(block)
                if size <= self._max_file_bytes or not parts:
                    parts.append(block)
            if size > self._max_file_bytes:
                record.reject(name, f"larger than {self._max_file_bytes} bytes", parts[0][:START_BYTES])
                continue
            content = b"".join(parts)
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                around = content[max(0, error.start - START_BYTES // 2) :]
                record.reject(name, f"byte {error.start} is not UTF-8", around)
                continue
            if document := record.admit(text, name):
                yield document
        record.finish()
