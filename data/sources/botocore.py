"""The documentation of the package ``botocore`` (Apache-2.0): descriptions of web services, in HTML."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potamos.data.errors import SourceError
from potamos.data.sources.base import Document, Input, Record, check_split, held_out, wanted
from potamos.data.sources.files import file_size
from potamos.data.sources.lines import unpacked
from potamos.data.sources.packages import find_package

INSTALL = "install it with: pip install --no-deps botocore==1.44.5"

# Elements that begin and end a line of text, those that only mark words within one, and those that part words.
_BLOCKS = {
    "p", "ul", "ol", "li", "dl", "dt", "dd", "note", "important", "tip", "warning", "pre", "br", "table", "tr", "h1",
    "h2", "h3", "h4", "text", "value", "para",
}  # fmt: skip
_WORDS = {
    "a", "b", "i", "u", "em", "strong", "code", "span", "tt", "sub", "sup", "thead", "tbody", "div", "fullname",
    "zonbook", "xhtml", "replaceable", "link", "ulink", "filename", "emphasis", "param", "function",
}  # fmt: skip
_CELLS = {"td", "th"}
_ELEMENT = re.compile(r"</?([A-Za-z][A-Za-z0-9]*)\b[^<>]*>")
_SPACES = re.compile(" {2,}")


class Botocore:
    """Every ``documentation`` string of every service's description, one document each, its markup removed.

    Documents come in order of service, version and place in the file; ``service`` and ``version`` are in their meta.
    Many strings stand in several services: exact duplicates are a quarter of the text. Split by service: about one in
    twenty, chosen by a hash of its name, is validation. The package is found, not imported.
    """

    shard_chunks = 2

    def __init__(self, split: str = "all"):
        self.split = check_split(split)
        folder, self._version = find_package("botocore", "data", INSTALL)
        paths = sorted(folder.glob("*/*/service-2.json.gz"))
        if not paths:
            raise SourceError(f"source 'botocore': {folder} holds no */*/service-2.json.gz; {INSTALL}")
        self._paths = tuple(path for path in paths if wanted(split, held_out(path.parts[-3])))

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "botocore", "version": self._version, "split": self.split}

    def inputs(self) -> list[Input]:
        return [Input("botocore", self._paths, sum(map(file_size, self._paths)))]

    def read(self, input: Input, record: Record) -> Iterator[Document]:
        record.start(input, "strings")
        for path in input.files:
            service, version, _ = path.parts[-3:]
            content = b"".join(unpacked(record.blocks(path, "/".join(path.parts[-3:])), str(path)))
            meta = {"service": service, "version": version}
            found: list[tuple[str, str]] = []
            _collect(_description(content, path), f"{service}/{version}", found)
            for place, string in found:
                record.lines += 1
                if document := record.admit(plain_text(string), place, meta):
                    yield document
        record.finish()


def plain_text(markup: str) -> str:
    """The words of an HTML fragment: blocks become lines, white space between words one space.

    What looks like an element but is none that HTML or these descriptions use, like ``<bucket>`` in a name's pattern,
    stays as it is written; so does a string without any markup.
    """
    if "<" not in markup:
        return html.unescape(markup)
    # Not html.parser: what it makes of odd markup differs between Python's releases, and it takes three times as long.
    spread = _ELEMENT.sub(_line_or_word, " ".join(markup.split()))
    lines = (_SPACES.sub(" ", line).strip() for line in spread.split("\n"))
    return html.unescape("\n".join(line for line in lines if line))


def _line_or_word(element: re.Match[str]) -> str:
    name = element[1].lower()
    return "\n" if name in _BLOCKS else "" if name in _WORDS else " " if name in _CELLS else element[0]


def _description(content: bytes, path: Path) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise SourceError(f"source 'botocore': {path} is not JSON ({error}); re{INSTALL}") from None


def _collect(value: Any, place: str, found: list[tuple[str, str]]) -> None:
    """Append the place and the string of every ``documentation`` below a value, in the order of the file."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, (dict, list)):
                _collect(inner, f"{place}/{key}", found)
            elif key == "documentation" and isinstance(inner, str):
                found.append((place, inner))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            if isinstance(inner, (dict, list)):
                _collect(inner, f"{place}/{number}", found)
