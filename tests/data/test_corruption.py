"""Thousands of random flips and truncations of every file of a dataset: each is found and named, or changes nothing.

What is asked of each damage, exactly:
- `verify(deep=True)` reports every changed byte of a shard or index, and of dataset.json every change of its content;
  bytes of dataset.json that only lay it out (blanks between its tokens) are harmless: the parsed content is equal.
- Opening and reading all rows, as a run does, raises a DataError that names the file, or returns every token, document
  id and position as it was. It must raise where ids or document ends were changed, and where an index was.
"""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest

from potamos.data import dataset as dataset_module
from potamos.data import manifest as manifest_module
from potamos.data.dataset import TokenDataset, read_rows
from potamos.data.errors import DataError
from potamos.data.manifest import MANIFEST, read_manifest, verify
from potamos.data.shards import ShardIndex, index_path

FLIPS, TRUNCATIONS = 700, 120  # of each dataset
SHAPES = {  # documents, and how they are stored
    "three parts of 16-bit ids": {
        "lengths": [900, 60, 2500, 1, 3, 4700, 350, 1, 800, 2200],
        "stored": {"chunk_tokens": 4200, "shard_chunks": 1, "parts": 3, "vocabulary": 300},
    },
    "one part of 32-bit ids": {
        "lengths": [700, 5, 2600, 40, 1, 1900],
        "stored": {"chunk_tokens": 3000, "shard_chunks": 1, "parts": 1, "vocabulary": 70_000},
    },
    "two parts of short documents": {
        "lengths": [3, 1, 2, 5, 4] * 30,
        "stored": {"chunk_tokens": 64, "shard_chunks": 2, "parts": 2, "vocabulary": 300},
    },
}


@dataclass(frozen=True)
class Damage:
    """One file's content after an accident."""

    file: str
    kind: str  # payload: ids or document ends; other: the rest of a tar; index; manifest
    content: bytes
    what: str


def rows(path: Path) -> list[np.ndarray]:
    dataset = TokenDataset(path)
    cut = dataset.cut(50, rest=True)
    place = cut.place(np.arange(cut.total))
    return list(read_rows([dataset], np.zeros(cut.total, int), *place, 51, true_positions=True))


def payloads(path: Path) -> dict[str, np.ndarray]:
    """For each shard, which of its bytes hold ids or document ends."""
    marks = {}
    for entry in read_manifest(path).shards:
        shard = path / entry["name"]
        index = ShardIndex.from_bytes(index_path(shard).read_bytes(), "")
        mark = marks[entry["name"]] = np.zeros(entry["bytes"], bool)
        for chunk in index.chunks:
            mark[chunk["token_offset"] :][: chunk["tokens"] * index.dtype.itemsize] = True
            mark[chunk["end_offset"] :][: chunk["documents"] * 4] = True
    return marks


def accidents(path: Path, seed: int) -> Iterator[Damage]:
    """Flips, as many of each kind of place, and truncations, as many of each kind of file."""
    rng = np.random.default_rng(seed)
    sound = {file.name: file.read_bytes() for file in sorted(path.iterdir())}
    marks = payloads(path)
    shards, indexes = sorted(marks), sorted(f"{name}.idx" for name in marks)
    for number in range(FLIPS):
        kind = ("payload", "other", "index", "manifest")[number % 4]
        file = {"index": indexes, "manifest": [MANIFEST]}.get(kind, shards)
        name = file[rng.integers(len(file))]
        content = bytearray(sound[name])
        places = np.flatnonzero(marks[name] == (kind == "payload")) if name in marks else np.arange(len(content))
        # single bits of dataset.json: what is no longer text or JSON at all is found too easily
        at, flip = int(rng.choice(places)), int(1 << rng.integers(8) if kind == "manifest" else rng.integers(1, 256))
        content[at] ^= flip
        yield Damage(name, kind, bytes(content), f"byte {at} of {name} xor {flip:#x}")
    for number in range(TRUNCATIONS):
        names = (shards, indexes, [MANIFEST])[number % 3]
        name = names[rng.integers(len(names))]
        # the very ends too: an archive's end mark, an index's checksum, a last line's end
        keep = len(sound[name]) - 1 - number // 3 if number < 30 else int(rng.integers(len(sound[name])))
        kind = "manifest" if name == MANIFEST else "cut"
        yield Damage(name, kind, sound[name][:keep], f"{name} cut to {keep} bytes")


def examine(path: Path, damage: Damage, expected: list[np.ndarray], content: Any) -> tuple[str, str | None]:
    """How a damage of the dataset ``path`` was met, and what is wrong with that, if anything."""
    report = verify(path, deep=True)
    if not report.ok and not any(damage.file in problem for problem in report.problems):
        return "misnamed", f"a deep check does not name the file: {report.problems}"
    try:
        got = rows(path)
    except DataError as error:
        if damage.file not in str(error):
            return "misnamed", f"the error does not name the file: {error}"
        return "found by a run", "a run finds what a deep check does not" if report.ok else None
    except Exception as error:
        return "crashed", repr(error)
    if not all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True)):
        return "missed", "rows changed without a word"
    if damage.kind == "manifest":
        harmless = report.ok and json.loads((path / MANIFEST).read_bytes()) == content
        return "only laid out otherwise", None if harmless else "a changed dataset.json is read as if it were sound"
    if report.ok:
        return "missed", "a deep check finds nothing"
    return "found by a deep check", None if damage.kind == "other" else "a run reads a damaged payload or index"


def overwrite(file: Path, content: bytes) -> None:
    """In place, which some systems do ten times faster than emptying a file and filling it again."""
    with open(file, "r+b") as opened:
        opened.write(content)
        opened.truncate()


def campaign(path: Path, seed: int, every: int = 1) -> tuple[collections.Counter[tuple[str, str]], list[str]]:
    """Counts of (kind of damage, how it was met), and every damage that was not met as it must be."""
    met: collections.Counter[tuple[str, str]] = collections.Counter()
    wrong = []
    expected, content = rows(path), json.loads((path / MANIFEST).read_bytes())
    for damage in itertools.islice(accidents(path, seed), 0, None, every):
        sound = (path / damage.file).read_bytes()
        overwrite(path / damage.file, damage.content)
        how, problem = examine(path, damage, expected, content)
        overwrite(path / damage.file, sound)
        met[damage.kind, how] += 1
        if problem is not None:
            wrong.append(f"{damage.what}: {problem}")
    return met, wrong


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # NumPy takes a damaged header for one of Python 2
def test_every_flip_and_truncation_is_found_or_harmless(
    write_ids: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    met: collections.Counter[tuple[str, str]] = collections.Counter()
    for seed, shape in enumerate(SHAPES.values()):
        path = write_ids(tmp_path / str(seed), shape["lengths"], **shape["stored"])
        counts, wrong = campaign(path, seed)
        assert wrong == []
        assert verify(path, deep=True).ok
        met += counts
    with capsys.disabled():
        print(f"\n  {met.total()} flips and truncations:")
        for (kind, how), count in sorted(met.items()):
            print(f"    {kind:9} {how:24} {count:5}")
    assert met.total() >= 2000
    flips = len(SHAPES) * FLIPS // 4
    assert met["payload", "found by a run"] == met["index", "found by a run"] == flips
    assert met["other", "found by a deep check"] == flips
    assert met["cut", "found by a run"] == len(SHAPES) * TRUNCATIONS * 2 // 3
    assert 0 < met["manifest", "only laid out otherwise"] < met["manifest", "found by a run"]


PLANTS: dict[str, tuple[Any, str, Any, str]] = {
    "blocks are not checked": (dataset_module._Shard, "check", lambda *_: None, "rows changed without a word"),
    "a shard counts as sound from the start": (
        dataset_module._Known,
        "__init__",
        lambda self, identity, index: self.__dict__.update(identity=identity, index=index, checked=b"", sound=True),
        "rows changed without a word",
    ),
    "only the first block is checked": (
        dataset_module._Shard,
        "check",
        lambda self, chunk, offset, begin, *rest: begin or CHECK(self, chunk, offset, begin, *rest),
        "rows changed without a word",
    ),
    "the fingerprint is not compared": (manifest_module, "_fingerprint", lambda _: ANY, "read as if it were sound"),
    "a deep check trusts the index": (
        manifest_module,
        "build_index",
        lambda shard: ShardIndex.from_bytes(index_path(shard).read_bytes(), ""),
        "a deep check finds nothing",
    ),
}
CHECK = dataset_module._Shard.check


@pytest.mark.filterwarnings("ignore:Reading `.npy`")
@pytest.mark.parametrize("plant", PLANTS)
def test_a_reader_that_checks_less_is_noticed(
    write_ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: str
) -> None:
    """The examination above can fail: without one of the checks, some damage is not met as it must be."""
    shape = SHAPES["one part of 32-bit ids"]
    path = write_ids(tmp_path / "d", shape["lengths"], **shape["stored"])
    place, name, replacement, says = PLANTS[plant]
    monkeypatch.setattr(place, name, replacement)
    _, wrong = campaign(path, 1, every=5)
    assert any(says in problem for problem in wrong), wrong
