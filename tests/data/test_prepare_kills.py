"""Killed at any moment: whatever a SIGKILL leaves, the same command goes on to the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from potamos.data import dedup
from potamos.data.finalize import finalize
from potamos.data.prepare import prepare_parts
from potamos.data.tokenizer import Tokenizer

# What a process tells the disk to do; between any two of these it may die. fsync is counted but not waited for.
EVENTS = ("replace", "unlink", "rmdir", "mkdir", "fsync", "open")


class Letters:
    """A tokenizer of single bytes, in plain Python, so that forked processes may use it."""

    kind, sha256, vocabulary, end_of_document, exact_bytes = "json", "b" * 64, 257, 0, True

    def token_bytes(self) -> np.ndarray:
        return np.array([0] + [1] * 256, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 1 for text in texts]


class Disk:
    """Counts what is asked of the disk and dies before number ``last``."""

    def __init__(self, last: int):
        self.count, self._last = 0, last
        for name in EVENTS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            return None if name == "fsync" else original(*arguments, **options)

        return call


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four inputs of short texts, a third of them twice, with a bad line."""
    rng = random.Random(5)
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = ["".join(rng.choices("rivers and mills ", k=rng.randint(5, 40))) for _ in range(24)]
    for number in range(4):
        lines = [json.dumps({"text": rng.choice(texts), "meta": {"set": rng.choice("ab")}}) for _ in range(9)]
        lines.insert(number, "no json")
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of the dataset and beside it; nothing else may be left."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def prepared(corpus: Path, out: Path, world: int = 1, **options: Any) -> None:
    """A whole preparation by ``world`` processes one after the other; none of them waits for the next."""
    settings: dict[str, Any] = {"chunk_tokens": 100, "shard_chunks": 1, "max_bad_ratio": 0.2, "wait": 0.0, **options}
    for stage in range(2 if settings.get("deduplicate") and world > 1 else 1):
        for rank in range(world):
            try:
                prepare_parts(corpus, "all", cast(Tokenizer, Letters()), out, rank=rank, world=world, **settings)
            except ValueError as error:
                if stage or "run the same command again" not in str(error):
                    raise
    finalize(out, force=settings.get("force", False), wait=settings["wait"])


def killed(work: Callable[[], None], last: int) -> bool:
    """Whether ``work``, in a process of its own, was killed before event ``last`` rather than ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Disk(last)
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "an error, neither a kill nor an end"
    return os.WIFSIGNALED(status)


def events(work: Callable[[], None]) -> int:
    """How many events an undisturbed run has."""
    read, write = os.pipe()

    def count() -> None:
        disk = Disk(-1)
        work()
        os.write(write, str(disk.count).encode())

    assert not killed(count, -1)
    return int(os.read(read, 20))


MODES: list[dict[str, Any]] = [{}, {"deduplicate": True}, {"deduplicate": True, "by": "meta.set"}]


@pytest.mark.parametrize("options", MODES, ids=["plain", "deduplicated", "groups"])
def test_killed_once_anywhere(corpus: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    prepared(corpus, tmp_path / "sound" / "d", **options)
    sound = content(tmp_path / "sound")
    total = events(lambda: prepared(corpus, tmp_path / "counted" / "d", **options))
    rng = random.Random(len(options))
    for number in sorted(rng.sample(range(total), 32)):
        out = tmp_path / f"at-{number}" / "d"
        world = rng.choice([1, 1, 2])
        assert killed(partial(prepared, corpus, out, world, **options), number)
        prepared(corpus, out, rng.choice([1, 2, 3]), **options)
        assert content(out.parent) == sound, f"killed by event {number} of {total}"
        assert not out.with_name("d.prepare").exists()


@pytest.mark.parametrize("options", MODES, ids=["plain", "deduplicated", "groups"])
def test_killed_again_and_again(corpus: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Every new process is killed too, until one comes to the end: work is taken up, not begun anew each time."""
    prepared(corpus, tmp_path / "sound" / "d", **options)
    total = events(lambda: prepared(corpus, tmp_path / "counted" / "d", **options))
    rng = random.Random(total)
    for attempt in range(2):
        out = tmp_path / f"run-{attempt}" / "d"
        kills = 0
        while killed(partial(prepared, corpus, out, rng.choice([1, 2]), **options), rng.randrange(20, total // 2)):
            kills += 1
            assert kills < 100
        assert kills >= 2
        assert content(out.parent) == content(tmp_path / "sound")


def test_a_dataset_is_there_whole_or_not_at_all(corpus: Path, tmp_path: Path) -> None:
    """Replacing one dataset by another, killed at every event from the first shard's move on."""
    old, new = {"chunk_tokens": 90}, {"force": True}
    prepared(corpus, tmp_path / "old" / "d", **old)
    prepared(corpus, tmp_path / "new" / "d")
    whole = [content(tmp_path / "old" / "d"), content(tmp_path / "new" / "d")]
    total = events(lambda: prepared(corpus, tmp_path / "new" / "d", **new))
    begin = total // 2
    seen = set()
    for number in range(begin, total, 4):
        out = tmp_path / f"at-{number}" / "d"
        shutil.copytree(tmp_path / "old", out.parent)
        if not killed(partial(prepared, corpus, out, **new), number):
            break
        if out.exists():
            assert content(out) in whole
            seen.add(whole.index(content(out)))
        else:  # between two renames
            assert content(out.with_name("d.prepare") / "replaced") == whole[0]
            assert content(out.with_name("d.prepare") / "dataset") == whole[1]
        prepared(corpus, out, **new)
        assert content(out) == whole[1]
        assert not out.with_name("d.prepare").exists()
    assert seen == {0, 1}


def test_finalize_killed_anywhere(corpus: Path, tmp_path: Path) -> None:
    """It goes on by itself, and what it leaves is in the way of nothing that is prepared later."""
    letters = cast(Tokenizer, Letters())
    options: dict[str, Any] = {"chunk_tokens": 100, "shard_chunks": 1, "max_bad_ratio": 0.2}
    for name in ("parts", "counted"):
        prepare_parts(corpus, "all", letters, tmp_path / name / "d", **options)
    total = events(lambda: cast(None, finalize(tmp_path / "counted" / "d")))
    sound = content(tmp_path / "counted")
    other = tmp_path / "other"
    shutil.copytree(corpus, other / corpus.name)
    (other / corpus.name / "1.jsonl").write_text('{"text": "another river"}')
    prepared(other / corpus.name, other / "out" / "d")
    published = 0
    for number in range(0, total, 3):
        out = tmp_path / f"at-{number}" / "d"
        shutil.copytree(tmp_path / "parts", out.parent)
        assert killed(partial(cast(Any, finalize), out), number)
        published += out.exists()
        shutil.copytree(out.parent, tmp_path / f"copy-{number}")
        finalize(out)
        assert content(out.parent) == sound
        out = tmp_path / f"copy-{number}" / "d"
        prepared(other / corpus.name, out, force=True)
        assert content(out.parent) == content(other / "out")
    assert published > 5


def together(works: Sequence[Callable[[], None]]) -> list[int]:
    """The exit statuses of processes that run at the same time."""
    children = []
    for work in works:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_processes_at_the_same_time(corpus: Path, tmp_path: Path) -> None:
    """Ranks that wait for each other's hashes; and whole runs that do not know of each other."""
    options: dict[str, Any] = {"deduplicate": True, "chunk_tokens": 100, "shard_chunks": 1, "max_bad_ratio": 0.2}
    prepared(corpus, tmp_path / "sound" / "d", **options)
    sound = content(tmp_path / "sound")
    for attempt in range(3):
        out, letters = tmp_path / f"ranks-{attempt}" / "d", cast(Tokenizer, Letters())
        ranks = [
            partial(prepare_parts, corpus, "all", letters, out, rank=rank, world=5, wait=30.0, **options)
            for rank in range(5)
        ]
        assert together(cast(Any, ranks)) == [0] * 5
        finalize(out)
        assert content(out.parent) == sound
        out = tmp_path / f"runs-{attempt}" / "d"
        assert together([partial(prepared, corpus, out, wait=30.0, **options)] * 3) == [0] * 3
        assert content(out.parent) == sound


def test_killed_while_comparing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparison found is there whole or not at all, and equal texts in several ranges are each found."""
    prepared(corpus, tmp_path / "sound" / "d", deduplicate=True)
    out, save = tmp_path / "killed" / "d", dedup.save_array

    def die(path: Path, array: np.ndarray) -> None:
        if path.name == "duplicates.npy":
            path.with_name(".duplicates.npy.1.tmp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save(path, array)

    monkeypatch.setattr("potamos.data.prepare.save_array", die)
    assert killed(lambda: prepared(corpus, out, deduplicate=True), -1)
    assert not (out.with_name("d.prepare") / "duplicates.npy").exists()
    monkeypatch.undo()
    prepared(corpus, out, 3, deduplicate=True)
    assert content(out.parent) == content(tmp_path / "sound")
