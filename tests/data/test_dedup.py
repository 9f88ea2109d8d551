"""Exact duplicates: the first of equal texts is kept, found by a set of all texts as the oracle."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data.dedup import DocumentHashes, bits_of, find_duplicates
from potamos.data.errors import DatasetError, SourceError
from potamos.data.finalize import finalize
from potamos.data.loader import Windows
from potamos.data.manifest import read_manifest
from potamos.data.prepare import prepare, prepare_parts
from potamos.data.tokenizer import Tokenizer


def repeated(inputs: Sequence[Sequence[Any]]) -> list[list[bool]]:
    """The oracle: whether each item was seen before, in the order of inputs and items."""
    seen: set[Any] = set()
    return [[item in seen or bool(seen.add(item)) for item in items] for items in inputs]


def found(tables: Sequence[np.ndarray], folder: Path, at_a_time: int) -> list[list[bool]]:
    paths = [folder / f"{number}.npy" for number in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        np.save(path, table)
    counts = [table.shape[1] for table in tables]
    bits = find_duplicates(paths, counts, at_a_time)
    assert bits.nbytes == sum(-(-count // 8) for count in counts)
    return [bits_of(bits, counts, number).tolist() for number in range(len(counts))]


TEXTS = st.lists(
    st.lists(st.sampled_from([f"text {n}" for n in range(12)] + ["", "é"]), max_size=30), min_size=1, max_size=7
)


@settings(max_examples=80, deadline=None)
@given(TEXTS, st.integers(1, 40))
def test_the_first_of_equal_texts_is_kept(
    tmp_path_factory: pytest.TempPathFactory, inputs: list[list[str]], at_a_time: int
) -> None:
    tables = []
    for texts in inputs:
        hashes = DocumentHashes()
        for text in texts:
            hashes.add(text)
        assert len(hashes) == len(texts)
        tables.append(hashes.table())
    assert found(tables, tmp_path_factory.getbasetemp(), at_a_time) == repeated(inputs)


HASHES = st.tuples(
    st.sampled_from([0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]), st.sampled_from([0, 5, 2**63, 2**64 - 1])
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(HASHES, max_size=12), min_size=1, max_size=5), st.integers(1, 30))
def test_both_halves_of_a_hash_count(
    tmp_path_factory: pytest.TempPathFactory, inputs: list[list[tuple[int, int]]], at_a_time: int
) -> None:
    """Hashes that differ in one half alone, at the ends of ranges, which texts would not give in a lifetime."""
    tables = []
    for hashes in inputs:
        rows = sorted((high, low, number) for number, (high, low) in enumerate(hashes))
        tables.append(np.array(rows, "<u8").reshape(-1, 3).T.copy())
    assert found(tables, tmp_path_factory.getbasetemp(), at_a_time) == repeated(inputs)


def test_memory_is_bounded_by_a_range(tmp_path: Path) -> None:
    """Two million documents of 300 inputs, in ranges of 100,000: a fraction of the memory that all hashes take."""
    import tracemalloc

    rng = np.random.default_rng(1)
    paths, counts = [], []
    for number in range(300):
        table = np.empty((3, 6_700), "<u8")
        table[0] = np.sort(rng.integers(0, 2**64, 6_700, np.uint64))
        table[0, 10] = table[0, 9]  # not equal in the other half
        table[1], table[2] = np.arange(6_700), rng.permutation(6_700)
        paths.append(tmp_path / f"{number}.npy")
        np.save(paths[-1], table)
        counts.append(6_700)
    again = np.load(paths[3])
    again[0, ::2], again[1, ::2] = (np.load(paths[200])[half, ::2] for half in (0, 1))
    np.save(paths[3], np.ascontiguousarray(again[:, np.lexsort((again[1], again[0]))]))
    tracemalloc.start()
    begin = time.perf_counter()
    bits = find_duplicates(paths, counts, at_a_time=100_000)
    seconds = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6 < 24 * sum(counts), f"{peak} bytes"
    assert seconds < 20
    lost = [int(bits_of(bits, counts, number).sum()) for number in range(300)]
    assert lost[200] == 3_350
    assert sum(lost) == 3_350


@pytest.fixture
def corpus(texts: list[str], tmp_path: Path) -> Path:
    """Five inputs of 120 documents, half of them repeats: within an input, across, of the first and of the last."""
    rng = random.Random(3)
    folder = tmp_path / "corpus"
    folder.mkdir()
    some = [rng.choice(texts) for _ in range(119)] + [texts[0]]
    for number in range(5):
        lines = [json.dumps({"text": text, "set": rng.choice("ab")}) for text in some[24 * number : 24 * number + 24]]
        lines.insert(3, '{"text": " "}')
        lines.insert(9, '{"text": 1}')
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


def read(folder: Path) -> list[list[tuple[str, str]]]:
    """Set and text of each sound line of each input."""
    files = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.iterdir())]
    return [[(r["set"], r["text"]) for r in records if "set" in r] for records in files]


def decoded(folder: Path, tokenizer: Tokenizer) -> list[str]:
    windows = Windows(folder, sequence_length=1, tokenizer_sha256=tokenizer.sha256, vocabulary=tokenizer.vocabulary)
    rows = windows.read(0, len(windows))
    ids = rows.tokens[:, 0].tolist()
    lists: dict[int, list[int]] = {}
    for document, token in zip(rows.document_ids[:, 0].tolist(), ids, strict=True):
        lists.setdefault(document, []).append(token)
    assert list(lists) == list(range(len(lists)))
    return [tokenizer.decode(part) for part in lists.values()]


OPTIONS: dict[str, Any] = {"chunk_tokens": 200, "shard_chunks": 3, "max_bad_ratio": 0.1, "deduplicate": True}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_dataset_without_repeats(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = prepare(corpus, "all", tokenizer, tmp_path / "d", **OPTIONS)
    inputs = [[text for _, text in lines] for lines in read(corpus)]
    again = repeated(inputs)
    kept = [text for texts, drop in zip(inputs, again, strict=True) for text, out in zip(texts, drop, strict=True)
            if not out]  # fmt: skip
    assert decoded(tmp_path / "d", tokenizer) == kept == list(dict.fromkeys(text for texts in inputs for text in texts))
    assert manifest.fields["deduplicated"]
    assert [part["duplicates"] for part in manifest.parts] == [sum(drop) for drop in again]
    assert manifest.fields["duplicates"] + manifest.documents == 120
    assert (manifest.fields["rejected"], manifest.fields["blank"]) == (5, 5)
    assert len((tmp_path / "d.rejects.jsonl").read_text().splitlines()) == 5, "each once, though read twice"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "d", "d.rejects.jsonl"]
    with pytest.raises(DatasetError, match="deduplicated True there, False here"):
        prepare(corpus, "all", tokenizer, tmp_path / "d", **{**OPTIONS, "deduplicate": False})


@pytest.mark.parametrize("by", [None, "set"])
def test_no_order_of_processes_changes_what_is_kept(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, by: str | None
) -> None:
    prepare_parts(corpus, "all", tokenizer, tmp_path / "one", by=by, **OPTIONS)
    made = finalize(tmp_path / "one")
    for world, order in [(2, (1, 0)), (3, (2, 0, 1)), (5, (4, 2, 0, 1, 3))]:
        out = tmp_path / f"of-{world}"
        for number, rank in enumerate(order[:-1]):
            unhashed = len([n for n in range(5) if n % world not in order[: number + 1]])
            names = ", ".join(f"{n}.jsonl" for n in range(5) if n % world not in order[: number + 1])
            with pytest.raises(DatasetError, match=rf"there is still nothing of {names}\. .*run the same command"):
                prepare_parts(
                    corpus, "all", tokenizer, out, by=by, rank=rank, world=world, wait=0.0 if unhashed else 9, **OPTIONS
                )
        for rank in reversed(order):
            prepare_parts(corpus, "all", tokenizer, out, by=by, rank=rank, world=world, wait=0.0, **OPTIONS)
        finalize(out)
        assert content(out) == content(tmp_path / "one")
    if by is not None:
        lines = [line for lines in read(corpus) for line in lines]
        first = [line for line, again in zip(lines, repeated([[t for _, t in lines]])[0], strict=True) if not again]
        expected = Counter(name for name, _ in first)
        assert {path.name: manifest.documents for path, manifest in made.items()} == expected
        for name in "ab":
            assert decoded(tmp_path / "one" / name, tokenizer) == [text for group, text in first if group == name]


@pytest.mark.parametrize("kind", ["one more", "as many"])
def test_an_input_that_changes_between_the_two_readings(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    out, path = tmp_path / "d", corpus / "3.jsonl"
    whole = path.read_text()
    other = whole + '\n{"text": "one more"}' if kind == "one more" else whole.replace('"text": "', '"text": "x', 1)
    assert other != whole

    def change(progress: Any) -> None:
        if progress.stage == "tokenizing" and path.read_text() == whole:
            path.write_text(other)

    with pytest.raises(DatasetError, match=r"input 3\.jsonl changed after its documents were compared"):
        prepare(corpus, "all", tokenizer, out, progress=change, **OPTIONS)
    with pytest.raises(DatasetError, match=r"input 3\.jsonl changed after its documents were compared.*remove"):
        prepare(corpus, "all", tokenizer, out, **OPTIONS)
    path.write_text(whole)
    prepare(corpus, "all", tokenizer, out, **OPTIONS)
    assert read_manifest(out).documents == len({text for lines in read(corpus) for _, text in lines})


def test_an_input_that_cannot_be_hashed(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out, path = tmp_path / "d", corpus / "3.jsonl"
    whole = path.read_text()
    path.write_text(whole + "\nno json" * 50)
    with pytest.raises(SourceError, match=r"1 of 5 inputs failed.*\n.*3\.jsonl: 51 of 76 lines are bad"):
        prepare(corpus, "all", tokenizer, out, **OPTIONS)
    hashed = sorted(path.name for path in (tmp_path / "d.prepare" / "hashes").glob("*.npy"))
    assert hashed == ["00000.npy", "00001.npy", "00002.npy", "00004.npy"]
    path.write_text(whole)
    prepare(corpus, "all", tokenizer, out, **OPTIONS)
