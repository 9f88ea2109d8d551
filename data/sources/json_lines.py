"""JSON lines: one object with a string under ``text`` per line, plain, gzip or zstd.

The Pile's shards (``NN.jsonl.zst``, lines {"text", "meta": {"pile_set_name"}}), C4's (``c4-train.*.json.gz``, lines
{"text", "timestamp", "url"}) and most other corpora have this form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from potamos.data.sources.base import Document, Input, Record
from potamos.data.sources.files import named_inputs
from potamos.data.sources.lines import LongLine, lines, unpacked

MAX_LINE_BYTES = 256 * 2**20
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_decode = json.JSONDecoder().decode


class JsonLines:
    """Every file one input, every line one document, its other fields the document's meta.

    A bad line is counted, listed and skipped: not UTF-8, not JSON, no object, no string under ``text``, or longer than
    ``max_line_bytes``, which is then never held. Empty lines are passed over. NaN is read as Python's json does, and
    of a key given twice the last counts.
    """

    kind = "jsonl"
    shard_chunks = 512

    def __init__(self, paths: Sequence[Path], root: Path, name: str, *, max_line_bytes: int = MAX_LINE_BYTES):
        self._paths, self._root, self._name, self._max_line_bytes = list(paths), root, name, max_line_bytes

    @property
    def description(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self._name,
            "files": len(self._paths),
            "max_line_bytes": self._max_line_bytes,
        }

    def inputs(self) -> list[Input]:
        return named_inputs(self._paths, self._root)

    def read(self, input: Input, record: Record) -> Iterator[Document]:
        record.start(input)
        (path,) = input.files
        blocks = unpacked(record.blocks(path, input.name), str(path))
        for number, line in enumerate(lines(blocks, self._max_line_bytes), start=1):
            place = f"{input.name}:{number}"
            if isinstance(line, LongLine):
                record.lines += 1
                record.reject(place, f"line longer than {self._max_line_bytes} bytes", line.start)
                continue
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not line or line.isspace():
                continue
            record.lines += 1
            fields, reason = _parse(line)
            if fields is not None:
                reason = _fault(fields, "text") or self._render(fields)
            if reason:
                record.reject(place, reason, line)
            elif fields is not None and (document := record.admit(fields.pop("text"), place, fields)):
                yield document
        record.finish()

    def _render(self, fields: dict[str, Any]) -> str:
        """Make of a line's fields what a document shows; the reason why not, or nothing."""
        return ""


class Passages(JsonLines):
    """Passages of articles, as retrieval corpora hold them: lines {"id", "title", "section", "text"}.

    A document shows its title and section in a first line, "title: section" (or the title alone where ``section`` is
    absent or empty), then the text; both stay in its meta. Plain `JsonLines` reads the same files without that line.
    """

    kind = "passages"

    def _render(self, fields: dict[str, Any]) -> str:
        section = fields.setdefault("section", "")
        if reason := _fault(fields, "title") or _fault(fields, "section"):
            return reason
        if fields["text"] and not fields["text"].isspace():
            heading = f"{fields['title']}: {section}" if section else fields["title"]
            fields["text"] = f"{heading}\n{fields['text']}"
        return ""


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object that a line holds, or None and the reason why there is none."""
    try:
        fields = _decode(line.decode())
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start} of the line)"
    except RecursionError:
        return None, "not JSON: nested too deeply"
    except ValueError as error:
        return None, f"not JSON: {error}"
    if not isinstance(fields, dict):
        return None, f"the line is a {type(fields).__name__}, not an object"
    return fields, ""


def _fault(fields: dict[str, Any], key: str) -> str:
    if key not in fields:
        return f"no key {key!r}"
    if not isinstance(fields[key], str):
        return f"{key!r} is {type(fields[key]).__name__}, not a string"
    return ""
