"""JSON lines: what is read, and every way in which a line can be bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from potamos.data.errors import SourceError
from potamos.data.sources import Document, Record, Source, documents, meta_value, open_source


def write_lines(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read(source: Source, record: Record | None = None) -> list[Document]:
    (one,) = source.inputs()
    return list(source.read(one, record or Record()))


def test_blank_documents_and_surrogates_are_counted(tmp_path: Path) -> None:
    lines = [{"text": "  \n "}, {"text": ""}, {"text": "half \ud800 pair"}, {"text": "whole \U0001f30a"}]
    path = write_lines(tmp_path / "x.jsonl", [json.dumps(line).encode() for line in lines])
    record = Record()
    assert [d.text for d in read(open_source(path), record)] == ["half \ufffd pair", "whole \U0001f30a"]
    assert (record.counts.documents, record.counts.blank, record.counts.mended) == (2, 2, 1)


BAD = {
    "not UTF-8 (byte 13 of the line)": b'{"text": "caf\xe9"}',
    "not UTF-8 (byte 10 of the line)": b'{"text": "\xed\xa0\x80"}',
    "not JSON: Unterminated string": b'{"text": "cut',
    "not JSON: Extra data": b'{"text": "a"} {"text": "b"}',
    "not JSON: nested too deeply": b'{"text": ' + b"[" * 200_000,
    "'text' is NoneType": b'{"text": null}',
    "'text' is int": b'{"text": 5}',
    "'text' is list": b'{"text": ["a"]}',
    "no key 'text'": b'{"txt": "a"}',
    "the line is a list": b'["text"]',
    "the line is a str": b'"text"',
    "longer than 300000 bytes": b'{"text": "' + b"a" * 300_000 + b'"}',
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_line_is_skipped_counted_and_listed(tmp_path: Path, reason: str) -> None:
    good, bad = b'{"text": "good"}', BAD[reason]
    path = write_lines(tmp_path / "x.jsonl", [good, bad, good, b"", b" \r", bad, good])
    record = Record(tmp_path / "rejects.jsonl", max_bad_ratio=0.9)
    found = read(open_source(path, max_line_bytes=300_000), record)
    assert found == [Document("good", f"x.jsonl:{number}") for number in (1, 3, 7)]
    assert (record.counts.rejected, record.counts.documents, record.lines) == (2, 3, 5)
    entries = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [entry["place"] for entry in entries] == ["x.jsonl:2", "x.jsonl:6"]
    assert all(reason in entry["reason"] for entry in entries)
    assert all(entry["start"] == bad[:200].decode("utf-8", "replace") for entry in entries)


def test_a_line_at_the_limit_is_read(tmp_path: Path) -> None:
    line = json.dumps({"text": "a" * 100}).encode()
    path = write_lines(tmp_path / "x.jsonl", [line])
    assert len(read(open_source(path, max_line_bytes=len(line)))) == 1
    with pytest.raises(SourceError, match=f"x.jsonl:1: line longer than {len(line) - 1} bytes"):
        read(open_source(path, max_line_bytes=len(line) - 1))


def test_too_many_bad_lines_fail_with_place_and_remedy(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [b'{"text": "good"}'] * 9_998 + [b"{"])
    assert len(read(open_source(path), Record(max_bad_ratio=1e-3))) == 9_998
    with pytest.raises(SourceError, match=r"1 of 9999 lines are bad.*x.jsonl:9999: not JSON.*raise --max-bad-ratio"):
        read(open_source(path))
    path = write_lines(tmp_path / "y.jsonl", [b"{"] * 5000)
    with pytest.raises(SourceError, match="1000 of 1000"):
        read(open_source(path))


def test_an_old_list_of_rejects_is_removed(tmp_path: Path) -> None:
    (tmp_path / "rejects.jsonl").write_text("{}\n")
    read(open_source(write_lines(tmp_path / "x.jsonl", [b'{"text": "good"}'])), Record(tmp_path / "rejects.jsonl"))
    assert not (tmp_path / "rejects.jsonl").exists()


def test_marks_line_ends_and_odd_json_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "x": NaN}\r\n\r\n{"text": "b", "text": "c"}\n{"text": "d"}')
    assert [d.text for d in read(open_source(path))] == ["a", "c", "d"]
    path.write_bytes(b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
    record = Record(max_bad_ratio=0.5)  # a mark within a file is what joined files leave: no JSON
    assert [d.text for d in read(open_source(path), record)] == ["a"]
    assert record.counts.rejected == 1
    path.write_bytes(b"")
    assert read(open_source(path)) == []


def test_meta_is_what_else_a_line_holds(tmp_path: Path) -> None:
    pile = {"text": "a", "meta": {"pile_set_name": "Pile-CC"}}
    c4 = {"text": "b", "timestamp": "2019-04-25T12:57:54Z", "url": "https://x.org"}
    path = write_lines(tmp_path / "x.jsonl", [json.dumps(line).encode() for line in (pile, c4)])
    first, second = read(open_source(path))
    assert meta_value(first, "meta.pile_set_name") == "Pile-CC"
    assert second.meta == {"timestamp": "2019-04-25T12:57:54Z", "url": "https://x.org"}


def test_inputs_are_the_files_in_order(tmp_path: Path) -> None:
    for name in ("b/1.jsonl", "a/2.jsonl", "a/1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    for source in (open_source(tmp_path), open_source(f"{tmp_path}/**/*.jsonl"), open_source(f"{tmp_path}/*/*")):
        assert [(i.name, i.bytes) for i in source.inputs()] == [(f"{n}.jsonl", 21) for n in ("a/1", "a/2", "b/1")]
        assert [d.text for d in documents(source)] == ["a/1.jsonl", "a/2.jsonl", "b/1.jsonl"]


def test_passages_show_title_and_section(tmp_path: Path) -> None:
    lines = [
        {"id": "1", "title": "Rhine", "section": "Course", "text": "It flows."},
        {"id": "2", "title": "Rhine", "section": "", "text": "A river."},
        {"id": "3", "title": "Rhine", "text": "Long."},
        {"id": "4", "title": "Rhine", "section": "Course", "text": "  "},
        {"id": "5", "section": "Course", "text": "a"},
        {"id": "6", "title": "Rhine", "section": 5, "text": "a"},
    ]
    path = write_lines(tmp_path / "x.jsonl", [json.dumps(line).encode() for line in lines])
    record = Record(tmp_path / "rejects", max_bad_ratio=0.5)
    found = read(open_source(f"passages:{path}"), record)
    assert [d.text for d in found] == ["Rhine: Course\nIt flows.", "Rhine\nA river.", "Rhine\nLong."]
    assert (record.counts.blank, record.counts.rejected) == (1, 2)
    assert found[0].meta == {"id": "1", "title": "Rhine", "section": "Course"}
    assert [json.loads(line)["reason"] for line in (tmp_path / "rejects").read_text().splitlines()] == [
        "no key 'title'",
        "'section' is int, not a string",
    ]
    assert [d.text for d in read(open_source(path))] == ["It flows.", "A river.", "Long.", "a", "a"]
    with pytest.raises(SourceError, match="no known corpus"):
        open_source(f"passages:{tmp_path}/*.txt")
