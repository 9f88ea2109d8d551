"""WebDataset tars of text: read sample by sample for `prepare`, proven by an index where there is one."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.dataset import TokenDataset
from potamos.data.errors import DatasetError, SourceError
from potamos.data.foreign import index_tars
from potamos.data.manifest import verify
from potamos.data.prepare import prepare
from potamos.data.sources import open_source
from potamos.data.sources.base import Document, Record
from potamos.data.sources.tars import TextTars
from potamos.data.tokenizer import Tokenizer

File = tuple[str, bytes]


def write_tar(path: Path, files: Iterable[File], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def npy_of_ids() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(1, 9))
    return file.getvalue()


def read_all(source: TextTars, **options: Any) -> tuple[list[Document], Record]:
    found: list[Document] = []
    record = Record(**options)
    (input,) = source.inputs()
    found += source.read(input, record)
    return found, record


def open_tars(path: Path, **options: Any) -> TextTars:
    source = open_source(str(path), **options)
    assert isinstance(source, TextTars)
    return source


TEXTS = ["one river", "straße; 東京", "  \n", "the last <|endoftext|> one\n"]


def text_files(field: str) -> list[File]:
    if field == "txt":
        files = [
            ((f"{n}.txt", text.encode()), (f"{n}.json", json.dumps({"n": n}).encode())) for n, text in enumerate(TEXTS)
        ]
        return [file for pair in files for file in pair]
    if field == "json":
        return [(f"{n}.json", json.dumps({"text": text, "n": n}).encode()) for n, text in enumerate(TEXTS)]
    lines = [json.dumps({"text": text, "n": n}) for n, text in enumerate(TEXTS)]
    return [("a.jsonl", "\n".join(lines[:3]).encode()), ("b.jsonl", (lines[3] + "\n\n").encode())]


@pytest.mark.parametrize("field", ["txt", "json", "jsonl"])
@pytest.mark.parametrize("indexed", [False, True])
def test_text_tars_are_read(tmp_path: Path, field: str, indexed: bool) -> None:
    path = write_tar(tmp_path / "0.tar", text_files(field))
    if indexed:
        manifest = index_tars(path)
        assert (manifest.layout, manifest.fields["source"]["field"]) == ("text", field)
        assert verify(tmp_path, deep=True).ok
    found, record = read_all(open_tars(tmp_path))
    assert [document.text for document in found] == [TEXTS[n] for n in (0, 1, 3)]
    assert [document.meta for document in found] == [{"n": n} for n in (0, 1, 3)]
    assert (record.counts.documents, record.counts.blank, record.counts.rejected) == (3, 1, 0)
    content = path.read_bytes()
    assert record.files == [{"name": "0.tar", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}]
    assert record.bytes_read == len(content)
    assert record.lines == 4


def test_the_whole_tar_is_hashed_and_compared(tmp_path: Path) -> None:
    """Also what lies behind the last sample, here at the beginning of another block of what is hashed at once."""
    text = (b"river " * 200_000)[: 2**20 - 512]
    path = write_tar(tmp_path / "0.tar", [("a.txt", text)], tarfile.USTAR_FORMAT)
    content = path.read_bytes()
    index_tars(path)
    _, record = read_all(open_tars(path))
    assert record.files[0]["sha256"] == hashlib.sha256(content).hexdigest()
    assert record.bytes_read == len(content)
    assert not any(content[2**20 :])
    path.write_bytes(content[:-1] + b"!")
    with pytest.raises(SourceError, match="goes on after its end-of-archive mark"):
        read_all(open_tars(path))


def test_bad_text_is_rejected_with_its_place(tmp_path: Path) -> None:
    files = [("a.json", b'{"text": "fine"}'), ("b.json", b'{"text": null}'), ("c.json", b'{"x": 1}')]
    files += [("d.json", b"[1]"), ("e.json", b"{"), ("f.json", b'{"text": "\xff"}'), ("g.other", b"")]
    write_tar(tmp_path / "0.tar", files)
    found, record = read_all(open_tars(tmp_path), rejects=tmp_path / "out/r.jsonl", max_bad_ratio=1)
    assert [document.text for document in found] == ["fine"]
    rejects = [json.loads(line) for line in (tmp_path / "out/r.jsonl").read_text().splitlines()]
    assert [(one["place"], one["reason"]) for one in rejects] == [
        ("0.tar:b", "'text' is NoneType, not a string"),
        ("0.tar:c", "no key 'text'"),
        ("0.tar:d", "a list, not an object"),
        ("0.tar:e", rejects[3]["reason"]),
        ("0.tar:f", "not UTF-8 (byte 10)"),
        ("0.tar:g", "no field 'json' but other"),
    ]
    assert rejects[3]["reason"].startswith("not JSON")
    assert record.lines == 7
    with pytest.raises(SourceError, match="6 of 7 samples are bad"):
        read_all(open_tars(tmp_path / "0.tar"))


def test_a_text_of_just_the_limit_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.txt", b"x" * 50), ("b.txt", b"y" * 51)])
    found, record = read_all(open_tars(tmp_path, max_line_bytes=50), max_bad_ratio=0.5)
    assert [document.text for document in found] == ["x" * 50]
    assert record.counts.rejected == 1


def test_a_damaged_text_tar_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", text_files("txt"))
    content = path.read_bytes()
    path.write_bytes(content[:2000])
    with pytest.raises(SourceError, match=r"0\.tar is truncated"):
        read_all(open_tars(tmp_path))
    path.write_bytes(content)
    index_tars(path)
    flipped = content.replace(b"river", b"liver")
    assert len(flipped) == len(content) != flipped
    path.write_bytes(flipped)
    with pytest.raises(SourceError, match=r"0\.tar, bytes 0 to 8192: crc32 does not match the index"):
        read_all(open_tars(tmp_path))
    report = verify(tmp_path, deep=True)
    assert "crc32 does not match" in report.problems[0]
    assert verify(tmp_path).ok  # sizes and index are as they were
    path.write_bytes(content + bytes(512))
    with pytest.raises(SourceError, match=r"bytes, .* when it was indexed"):
        read_all(open_tars(tmp_path))


def test_text_is_not_trained_on_before_it_is_prepared(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    for number in range(2):
        write_tar(tmp_path / "in" / f"{number}.tar", [(f"{n}.txt", t.encode()) for n, t in enumerate(texts[number::2])])
    index_tars(tmp_path / "in")
    with pytest.raises(DatasetError, match="potamos data prepare"):
        TokenDataset(tmp_path / "in")
    manifest = prepare(str(tmp_path / "in"), "all", tokenizer, tmp_path / "out", chunk_tokens=1024)
    assert [part["name"] for part in manifest.parts] == ["0.tar", "1.tar"]
    assert manifest.documents == len(texts)
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert verify(tmp_path / "out", deep=True).ok


def test_token_tars_are_not_prepared(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.npy", npy_of_ids())])
    with pytest.raises(SourceError, match="potamos data index"):
        open_source(str(tmp_path))
