"""Passages: nothing lost, nothing too long, cut at sentences, the same bytes every time."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data import passages as module
from potamos.data.errors import SourceError
from potamos.data.passages import (
    Passage,
    PassageError,
    cut,
    passage_id,
    read_passages,
    sentences,
    windows,
    write_passages,
)
from potamos.data.sources import Document, TextList, documents, open_source

ADDRESS = (
    "The mill stood still. Rain fell (it was March)! Did Mr. J. Q. Adams, of the U.S. Senate, see it? He did.\n\n"
    '"We saw it." So said No. 5 and others; e.g. the 3.5 ton barge of St. Paul... and its crew. 12 came.'
)


def joined(parts: list[list[str]]) -> list[str]:
    return [" ".join(part) for part in parts]


def test_sentences_end_where_a_reader_would_end_them() -> None:
    assert joined(list(sentences(ADDRESS))) == [
        "The mill stood still.",
        "Rain fell (it was March)!",
        "Did Mr. J. Q. Adams, of the U.S. Senate, see it?",
        "He did.",
        '"We saw it."',
        "So said No. 5 and others; e.g. the 3.5 ton barge of St. Paul... and its crew.",
        "12 came.",
    ]
    assert joined(list(sentences('He called "Stop!" (and left). Then "Go!" "now" he said.'))) == [
        'He called "Stop!" (and left).',
        'Then "Go!" "now" he said.',
    ]
    assert list(sentences(" \n\t \n")) == []
    assert joined(list(sentences("one\ntwo.\r\nthree"))) == ["one", "two.", "three"]


words = st.text(st.sampled_from("abAB.!?,;'\"( \n\u00e9\u3002"), max_size=400)


@given(words, st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_windows_hold_every_word_once_in_whole_sentences(text: str, limit: int) -> None:
    parts = list(windows(text, limit))
    assert [word for part in parts for word in part] == text.split()
    assert all(1 <= len(part) <= limit for part in parts)
    ends, total = {0}, 0
    for sentence in sentences(text):
        total += len(sentence)
        ends.add(total)
    place = 0
    for part, following in zip(parts, [*parts[1:], None], strict=False):
        begin, place = place, place + len(part)
        inside = [end for end in ends if begin < end <= place]
        if place not in ends:
            # cut inside a sentence: only one that fits in no window, and then nothing of another sentence is before
            # it in this one but its own earlier part's end
            start = max(end for end in ends if end < place)
            stop = min(end for end in ends if end > place)
            assert stop - start > limit
        elif following is not None:
            # the next sentence would not have fitted
            after = min((end for end in ends if end > place), default=place)
            assert after - begin > limit or not inside


def test_long_sentences_are_cut_behind_a_clause() -> None:
    sentence = [f"w{i}" for i in range(40)]
    sentence[6] += ","
    sentence[8] += ';"'
    sentence[25] += ","  # in the first half of what fits from here on: too early
    assert [len(part) for part in windows(" ".join(sentence), 12)] == [9, 12, 12, 7]
    assert [len(part) for part in windows(" ".join(sentence), 10)] == [9, 10, 7, 10, 4]
    assert [len(part) for part in windows("One two. W" + " ".join(sentence[:9]) + " x", 9)] == [2, 9, 1]


def test_ids_are_those_of_title_section_and_place() -> None:
    found = list(cut([Document("aa bb. Cc dd. Ee ff.", "n", {"title": "T", "section": "S"})], words=2))
    assert [p.text for p in found] == ["aa bb.", "Cc dd.", "Ee ff."]
    for place, passage in enumerate(found):
        content = json.dumps(["T", "S", place]).encode()
        assert passage.id == passage_id("T", "S", place) == hashlib.blake2b(content, digest_size=16).hexdigest()
        assert (passage.title, passage.section, passage.heading) == ("T", "S", "T: S")
    # a title that comes again goes on counting, so no two passages share an id
    meta = {"title": "T", "section": "S"}
    twice = [Document("aa bb. Cc dd.", "x", meta), Document("Ee ff.", "y", meta)]
    assert list(cut(twice, words=2)) == found
    assert passage_id("a", "bc", 0) != passage_id("ab", "c", 0)


def test_short_passages_are_left_out_without_moving_ids() -> None:
    texts = [Document("aa bb cc. Dd ee. Ff gg hh. Ii jj.", "n")]
    every = list(cut(texts, words=4))
    long = list(cut(texts, words=4, min_words=3))
    assert [p.text for p in every] == ["aa bb cc.", "Dd ee.", "Ff gg hh.", "Ii jj."]
    assert long == [every[0], every[2]]
    assert every[0].heading == every[0].title == "n"


def test_addresses_are_cut_by_paragraphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARAGRAPHS", 2)
    text = "One.\n\nTwo\nThree. \n\n \nFour.\n\nFive."
    found = list(cut([Document(text, "1790-Washington-1", {"year": 1790, "president": "Washington"})]))
    assert [(p.heading, p.text) for p in found] == [
        ("Washington, 1790: paragraphs 1-2", "One. Two"),
        ("Washington, 1790: paragraphs 3-4", "Three. Four."),
        ("Washington, 1790: paragraphs 5-5", "Five."),
    ]


def test_a_heading_in_the_text_is_not_said_twice(tmp_path: Path) -> None:
    shown = Document("Mills: History\nBuilt in 1790.", "m", {"title": "Mills", "section": "History"})
    assert [p.text for p in cut([shown])] == ["Built in 1790."]
    other = Document("Mills: History was long.", "m", {"title": "Mills", "section": "History"})
    assert [p.text for p in cut([other])] == ["Mills: History was long."]
    # and so passages written once come out the same from a file of them
    out = tmp_path / "a.jsonl"
    write_passages(TextList([ADDRESS, "Two words."]), out, words=9)
    first = list(read_passages(out))
    again = list(cut(documents(open_source(f"passages:{out}")), words=9))
    assert [(p.title, p.section, p.text) for p in again] == [(p.title, p.section, p.text) for p in first]


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.jsonl.zst"])
def test_files_come_back_with_the_same_bytes_every_time(name: str, tmp_path: Path) -> None:
    texts = TextList([ADDRESS, "caf\u00e9 \u6771\u4eac \U0001f30a.\nLast line"], "memory")
    summary = write_passages(texts, tmp_path / "a" / name, words=8, min_words=2)
    again = write_passages(texts, tmp_path / "b" / name, words=8, min_words=2)
    content = (tmp_path / "a" / name).read_bytes()
    assert content == (tmp_path / "b" / name).read_bytes()
    wanted = list(cut(documents(texts), words=8, min_words=2))
    assert list(read_passages(summary.path)) == wanted
    assert (summary.documents, summary.passages, summary.short) == (2, len(wanted), 0)
    assert summary.words == again.words == sum(len(p.text.split()) for p in wanted) == len(ADDRESS.split()) + 5
    if name.endswith(".zst"):
        assert zstandard.get_frame_parameters(content).has_checksum
    if name.endswith(".gz"):
        assert content[3:8] == bytes(5)  # neither a name nor a time
        content = gzip.decompress(content)
    if name == "p.jsonl":
        assert [list(json.loads(line)) for line in content.splitlines()] == [["id", "title", "section", "text"]] * len(
            wanted
        )
        assert "caf\u00e9 \u6771" in content.decode()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [name]  # no temporary file stays


def test_a_failure_leaves_no_file_and_no_half_of_one(tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl.gz"
    write_passages(TextList([ADDRESS]), out)
    before = out.read_bytes()

    class Failing(TextList):
        def read(self, input, record):  # type: ignore[no-untyped-def]
            yield from super().read(input, record)
            raise SourceError("the disk went away")

    with pytest.raises(SourceError, match="went away"):
        write_passages(Failing([ADDRESS, ADDRESS]), out)
    with pytest.raises(PassageError, match=r"1 documents gave no passage of at least 90 words \(2 were shorter\)"):
        write_passages(TextList(["Too short. " + "Word " * 89]), out, words=90, min_words=90)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_bad_requests_and_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PassageError, match=r"\.jsonl, \.jsonl\.gz, \.jsonl\.zst, not 'p\.txt'"):
        write_passages(TextList([ADDRESS]), tmp_path / "p.txt")
    for words, least in ((0, 0), (10, 0), (10, 11)):
        with pytest.raises(PassageError, match=f"{least} to {words} words"):
            write_passages(TextList([ADDRESS]), tmp_path / "p.jsonl", words=words, min_words=least)
    with pytest.raises(SourceError, match="nowhere"):
        write_passages(tmp_path / "nowhere", tmp_path / "p.jsonl")
    with pytest.raises(SourceError, match="cannot be read"):
        list(read_passages(tmp_path / "missing.jsonl"))
    good = {"id": "1", "title": "t", "text": "x", "extra": 3}
    for line, message in (
        (b"{", ":2: not a line of JSON"),
        (b'"\xff"', ":2: not a line of JSON in UTF-8"),
        (b"[]", ":2: the line is a list"),
        (b'{"id": "1", "title": "t"}', ":2: 'text' is NoneType"),
        (b'{"id": 1, "title": "t", "text": "x"}', ":2: 'id' is int"),
    ):
        path = tmp_path / "bad.jsonl"
        path.write_bytes(json.dumps(good).encode() + b"\n" + line + b"\n")
        reader = read_passages(path)
        assert next(reader) == Passage("1", "t", "", "x")
        with pytest.raises(PassageError, match=message):
            next(reader)
    for name in ("c.jsonl.gz", "c.jsonl.zst"):
        write_passages(TextList([ADDRESS] * 50), tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: math.ceil(len(whole) * 0.7)])
        with pytest.raises(SourceError, match="cut short"):
            list(read_passages(tmp_path / name))
