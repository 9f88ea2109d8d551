"""Preparing datasets: what is stored, the same bytes every time, nothing half done under a final name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.commands import prepare_dataset, sample, summarize, train
from potamos.data.errors import DatasetError, SourceError, TokenizerError, TokenizerMismatchError
from potamos.data.loader import Windows
from potamos.data.manifest import verify
from potamos.data.prepare import Progress, prepare
from potamos.data.sources import MAX_BAD_RATIO, Sotu, TextList
from potamos.data.tokenizer import Tokenizer, train_bpe
from potamos.files import write_atomically


@pytest.fixture(scope="module")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "river.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "  "]))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_dataset_is_the_corpus(corpus: Path, texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen: list[Progress] = []
    manifest = prepare(
        corpus, "all", tokenizer, tmp_path / "d", chunk_tokens=1000, shard_chunks=3, progress=seen.append
    )  # fmt: skip
    report = verify(tmp_path / "d", deep=True)
    assert report.ok, report.problems
    assert len(manifest.shards) > 3
    assert manifest.documents == len(texts) == seen[-1].documents
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts) == seen[-1].text_bytes
    assert manifest.fields["blank"] == 1
    windows = Windows(tmp_path / "d", sequence_length=50, tokenizer_sha256=tokenizer.sha256, vocabulary=400)
    rows = windows.read(0, len(windows))
    real = rows.document_ids[:, 1:] >= 0
    stream = np.concatenate([rows.tokens[0, :1], rows.tokens[:, 1:][real]])
    decoded = [tokenizer.decode(part) for part in np.split(stream, np.flatnonzero(stream == 0) + 1)]
    assert decoded == [*texts, ""]
    assert manifest.tokens == len(stream)
    assert manifest.max_token == stream.max()


def test_the_same_bytes_every_time(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare(corpus, "all", tokenizer, tmp_path / name, chunk_tokens=2000)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    moment = (tmp_path / "one" / "shard-00000-00000.tar").stat().st_mtime_ns
    prepare(corpus, "all", tokenizer, tmp_path / "one", chunk_tokens=2000)
    assert (tmp_path / "one" / "shard-00000-00000.tar").stat().st_mtime_ns == moment, "an equal dataset is left alone"
    (tmp_path / "one" / "shard-00000-00000.tar").write_bytes(b"damaged")
    prepare(corpus, "all", tokenizer, tmp_path / "one", chunk_tokens=2000)
    assert content(tmp_path / "one") == content(tmp_path / "two"), "a damaged one is mended"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_texts_in_memory(texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whether they are still the same is known only when they have been prepared again."""
    out = tmp_path / "d"
    prepare(TextList(texts), "all", tokenizer, out)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()}
    prepare(TextList(texts), "all", tokenizer, out)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()} == before
    with pytest.raises(DatasetError, match="dataset of other texts"):
        prepare(TextList([*texts[1:], texts[0]]), "all", tokenizer, out)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()} == before
    prepare(TextList([*texts[1:], texts[0]]), "all", tokenizer, out, force=True)
    assert sample(out, tokenizer, tokens=2000)[0].text == texts[1]
    assert os.listdir(tmp_path) == ["d"]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What is asked of the disk from here on, in order: ("fsync", path), ("replace", from, to), ("rmtree", path)."""
    calls: list[tuple[str, ...]] = []
    fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

    def recorded_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append(("replace", str(source), str(target)))
        replace(source, target)

    def recorded_rmtree(path: Path, **options: Any) -> None:
        calls.append(("rmtree", str(path)))
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.setattr(shutil, "rmtree", recorded_rmtree)
    return calls


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_return(
    tmp_path: Path, disk: list[tuple[str, ...]]
) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, b"content")
    temporary = disk[0][1]
    assert disk == [("fsync", temporary), ("replace", temporary, str(path)), ("fsync", str(path.parent))]
    assert (path.read_bytes(), os.listdir(path.parent)) == (b"content", ["file.json"])
    assert Path(temporary).parent == path.parent


def test_a_dataset_is_on_the_disk_before_its_name(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, disk: list[tuple[str, ...]]
) -> None:
    out, work = tmp_path / "d", tmp_path / "d.prepare"
    part, dataset = work / "parts" / "00000", work / "dataset"
    new, old = str(part.with_name(".00000.tmp")), ("replace", str(out), str(work / "replaced"))

    def check(*replaced: tuple[str, ...]) -> None:
        began = disk.index(("replace", new, str(part)))
        assert disk[began - 1] == ("fsync", new)
        assert disk[began + 1] == ("fsync", str(work / "parts"))
        flushed = {Path(call[1]).name for call in disk[:began] if call[0] == "fsync"}
        assert {f"shard-00000-{n:05d}.tar" for n in range(len(list(out.glob("*.tar"))))} <= flushed
        given = {call[2] for call in disk[:began] if call[0] == "replace"}  # by `write_atomically`, tested above
        assert {f"{new}/{name}" for name in os.listdir(out) if name.endswith(".idx")} < given
        assert f"{new}/part.json" in given
        named = disk.index(("replace", str(dataset), str(out)))
        assert disk[named - 1 - len(replaced) : named] == [*replaced, ("fsync", str(dataset))]
        assert disk[named + 1] == ("fsync", str(tmp_path))
        assert ("replace", str(dataset / ".dataset.json"), str(dataset / "dataset.json")) in [
            (call[0], call[1].removesuffix(f".{os.getpid()}.tmp"), *call[2:]) for call in disk[began:named]
        ]
        removed = [number for number, call in enumerate(disk) if call[:2] == ("rmtree", str(work / "parts"))]
        assert removed
        assert min(removed) > named, "nothing is removed before the dataset has its name"

    prepare(corpus, "all", tokenizer, out, chunk_tokens=2000)
    check()
    disk.clear()
    prepare(corpus, "all", tokenizer, out, chunk_tokens=1000, force=True)
    check(old)


def test_another_dataset_is_not_overwritten(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "d"
    prepare(corpus, "all", tokenizer, out, chunk_tokens=2000)
    before = content(out)
    with pytest.raises(DatasetError, match="chunk_tokens 2000 there, 1000 here"):
        prepare(corpus, "all", tokenizer, out, chunk_tokens=1000)
    other = tmp_path / corpus.name
    other.write_text('{"text": "other words"}\n')
    with pytest.raises(DatasetError, match=r"dataset of other texts: river\.jsonl has changed"):
        prepare(other, "all", tokenizer, out, chunk_tokens=2000)
    assert content(out) == before
    prepare(other, "all", tokenizer, out, chunk_tokens=2000, force=True)
    assert verify(out, deep=True).ok
    assert content(out) != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="is no dataset"):
        prepare(other, "all", tokenizer, tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_failures_leave_nothing_but_the_rejects(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text('{"text": "good"}\n{"text": 5}\n')
    rejects = tmp_path / "d.prepare" / "parts" / "00000.rejects.jsonl"
    with pytest.raises(SourceError, match=rf"1 of 2 lines are bad.*{rejects}"):
        prepare(corpus, "all", tokenizer, tmp_path / "d")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "d.prepare"]
    assert "'text' is int" in rejects.read_text()
    corpus.write_text('{"text": " "}\n')
    with pytest.raises(SourceError, match=r"'bad\.jsonl' gave no document with text \(1 blank, 0 bad\)"):
        prepare(corpus, "all", tokenizer, tmp_path / "d")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl"]
    corpus.write_text('{"text": "good"}\n{"text": 5}\n')
    prepare(corpus, "all", tokenizer, tmp_path / "d", max_bad_ratio=0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "d", "d.rejects.jsonl"]
    assert json.loads((tmp_path / "d.rejects.jsonl").read_text())["place"] == "bad.jsonl:2"
    corpus.write_text('{"text": "better"}\n')
    prepare(corpus, "all", tokenizer, tmp_path / "d", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "d"], "the rejects go with their dataset"


def test_a_place_that_cannot_be_made_is_said_at_once(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a working folder that was removed every path is missing, and no retry will find it."""
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n')
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(DatasetError, match=r"d\.prepare: No such file or directory"):
        prepare(tmp_path / "a.jsonl", "all", tokenizer, "d", wait=0.0)


class Misbehaving(Tokenizer):
    """A tokenizer whose ids for the second text of a batch are changed."""

    def __init__(self, sound: Tokenizer, change: Callable[[np.ndarray], np.ndarray]):
        vars(self).update(vars(sound))
        self._change = change

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = super().encode_batch(texts)
        ids[1] = self._change(ids[1])
        return ids


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda ids: ids[:-1], r"document x\.jsonl:2: 9 bytes of text, but its ids stand for others"),
        (lambda ids: np.append(ids, ids[-1]), r"document x\.jsonl:2: 9 bytes of text, but its ids stand for others"),
        (lambda ids: np.insert(ids, 1, 0), r"document x\.jsonl:2: the tokenizer put an end of document into its text"),
        (lambda ids: np.append(ids, 0), r"document x\.jsonl:2: the tokenizer put an end of document into its text"),
    ],
)
def test_a_tokenizer_that_loses_text_is_found(
    tokenizer: Tokenizer, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], says: str
) -> None:
    corpus = tmp_path / "x.jsonl"
    corpus.write_text('{"text": "the hills"}\n{"text": "the river"}\n')
    assert tokenizer.end_of_document == 0
    with pytest.raises(TokenizerError, match=says):
        prepare(corpus, "all", Misbehaving(tokenizer, change), tmp_path / "d")
    assert os.listdir(tmp_path) == [corpus.name]
    prepare(corpus, "all", Misbehaving(tokenizer, lambda ids: ids), tmp_path / "d")


def test_a_text_of_which_the_tokenizer_makes_nothing_counts_as_blank(tokenizer: Tokenizer, tmp_path: Path) -> None:
    normalizing = Misbehaving(tokenizer, lambda ids: ids[:0])
    normalizing.exact_bytes = False  # as where a tokenizer.json removes characters first
    manifest = prepare(TextList(["the hills", "the river", " ", "stone"]), "all", normalizing, tmp_path / "d")
    counts = {key: manifest.fields[key] for key in ("documents", "blank", "text_bytes")}
    assert counts == {"documents": 2, "blank": 2, "text_bytes": len("the hillsstone")}


KILLED = """
import sys
from potamos.data.prepare import prepare
from potamos.data.sources import Document, TextList
from potamos.data.tokenizer import load_tokenizer

class Endless(TextList):
    def read(self, input, record):
        number = 0
        while True:
            number += 1
            yield Document("the river runs past quiet mills " * 2000, str(number))

prepare(Endless([], "endless"), "all", load_tokenizer("json", sys.argv[1]), sys.argv[2], chunk_tokens=2000,
        progress=lambda p: print(p.documents, flush=True))
"""


def test_a_killed_run_leaves_no_final_name(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    saved = tokenizer.save(tmp_path / "tokenizer.json")
    out = tmp_path / "d"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(saved), str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline(), "it has written shards"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    assert not out.exists()
    left = list((tmp_path / "d.prepare" / "parts").iterdir())
    assert sorted(path.name for path in left) == [".00000.tmp", "00000.lock"]
    assert list(left[0].parent.glob(".00000.tmp/*.tar")), "the kill came too early to prove anything"
    prepare(corpus, "all", tokenizer, out, chunk_tokens=2000)  # other settings: nothing of theirs was finished
    assert verify(out, deep=True).ok
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "tokenizer.json"], "the next run cleans up"


def test_an_interrupted_run_cleans_up(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, "all", tokenizer, tmp_path / "d", progress=interrupt)
    assert os.listdir(tmp_path) == []


def test_commands(corpus: Path, texts: list[str], tmp_path: Path) -> None:
    tokenizer, trained = train(str(corpus), 300, tmp_path / "tokenizer.json")
    assert (trained.vocabulary, trained.documents) == (300, len(texts))
    assert trained.text_bytes == sum(len(text.encode()) for text in texts)
    made = prepare_dataset(str(corpus), tmp_path / "d", tokenizer_path=tmp_path / "tokenizer.json", chunk_tokens=900)
    assert made == summarize(tmp_path / "d")
    assert made.bytes_per_token == made.text_bytes / made.tokens
    excerpts = sample(tmp_path / "d", tokenizer, tokens=901)
    assert excerpts[0].text == texts[0][: len(excerpts[0].text)]
    assert [e.document for e in excerpts] == list(range(len(excerpts)))
    assert all(e.begins for e in excerpts)
    assert all(e.ends for e in excerpts[:-1])
    assert "".join(tokenizer.decode(e.tokens) for e in excerpts) == "".join(e.text for e in excerpts)
    middle = sample(tmp_path / "d", tokenizer, chunk=1, start=5, tokens=3)[0]
    assert len(middle.tokens) <= 3
    assert middle.text in texts[middle.document]
    with pytest.raises(DatasetError, match="there is no chunk 1000"):
        sample(tmp_path / "d", tokenizer, chunk=1000)
    other = train_bpe(texts, 310, tmp_path / "other.json")
    with pytest.raises(TokenizerMismatchError, match="prepare the dataset again"):
        sample(tmp_path / "d", other)


@pytest.mark.parametrize(("name", "content"), [("x.txt", ""), ("x.jsonl", '{"text": " "}\n')])
def test_no_tokenizer_is_made_of_nothing(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=rf"source '.*{name}': no document with text \(1 blank\)"):
        train(str(tmp_path / name), 300, tmp_path / "tokenizer.json")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("command", ["tokenizer", "prepare"])
def test_the_commands_take_the_allowed_share_of_bad_lines(tokenizer: Tokenizer, tmp_path: Path, command: str) -> None:
    """The option that the message names exists, does what it says, and has the library's default."""
    saved = tokenizer.save(tmp_path / "saved.json")
    corpus = tmp_path / "x.jsonl"
    corpus.write_text('{"text": "the river"}\n' * 3 + '{"text": 5}\n')
    program = [sys.executable, "-c", "from potamos.pretrain.cli import main; main()"]
    program += ["data", command, str(corpus), str(tmp_path / "out")]
    program += ["--tokenizer", str(saved)] if command == "prepare" else ["--vocabulary", "300"]
    refused = subprocess.run(program, check=False, timeout=60, capture_output=True, text=True)
    error = "".join(refused.stderr.split())  # lines are broken to the terminal's width
    assert (refused.returncode, (tmp_path / "out").exists()) == (2, False)
    assert f"1of4linesarebad,morethantheallowedratio{MAX_BAD_RATIO:g}" in error
    assert "raise--max-bad-ratio" in error
    subprocess.run([*program, "--max-bad-ratio", "0.25"], check=True, timeout=60)
    assert (tmp_path / "out").exists()


def test_the_demo_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        Sotu()
    except SourceError as error:
        pytest.skip(f"the sotu package is not installed: {error}")
    begin = time.perf_counter()
    tokenizer, _ = train("sotu", 1024, tmp_path / "tokenizer.json", split="validation")
    manifest = prepare("sotu", "validation", tokenizer, tmp_path / "validation", chunk_tokens=32_768)
    with capsys.disabled():
        print(
            f"\n  sotu validation, tokenizer of 1,024 and {manifest.tokens} tokens: {time.perf_counter() - begin:.1f} s"
        )
    assert manifest.documents == 11
    assert manifest.text_bytes == 604_168
    assert len(manifest.shards) == -(-(manifest.tokens - 1) // 32_768)
    assert verify(tmp_path / "validation", deep=True).ok
