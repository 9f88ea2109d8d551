"""Preparing by several processes: the same bytes for any number of them, failures that cost only their own input."""

from __future__ import annotations

import errno
import fcntl
import gzip
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data import parts as parts_module
from potamos.data.commands import finalize_datasets, left_out
from potamos.data.errors import DatasetError, SourceError
from potamos.data.finalize import GROUPS, finalize
from potamos.data.manifest import read_manifest, verify
from potamos.data.prepare import Progress, Share, prepare, prepare_parts
from potamos.data.tokenizer import Tokenizer
from potamos.data.workfolder import Lock, WorkFolder

SIZES: dict[str, Any] = {"chunk_tokens": 300, "shard_chunks": 2, "wait": 0.0}


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


@pytest.fixture
def corpus(texts: list[str], tmp_path: Path) -> Path:
    """Five inputs; the third has no document, the fourth a bad line and a blank text among 10."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    cuts = [0, 13, 31, 31, 41, 60]
    for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
        records: list[dict[str, Any]] = [{"text": text, "meta": {"set": "AB C"[i % 4]}} for i, text in
                                         enumerate(texts[begin:end])]  # fmt: skip
        if number == 3:
            records.insert(4, {"text": 5})
            records.insert(7, {"text": " \n"})
        write_lines(folder / f"{number:02d}.jsonl.gz", records)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def documents(folder: Path, tokenizer: Tokenizer) -> list[list[str]]:
    """The oracle of what a dataset holds: the texts of each part, read by tarfile from its stock tars."""
    found = []
    for part in read_manifest(folder).parts:
        stream = [np.empty(0, np.int64)]
        for shard in part["shards"]:
            with tarfile.open(folder / shard["name"]) as tar:
                for member in tar.getmembers():
                    if member.name.endswith(".tok.npy"):
                        file = tar.extractfile(member)
                        assert file is not None
                        ids = np.frombuffer(file.read()[128:], "<u2")
                        stream.append(ids[1:] if len(stream) > 1 else ids)  # the first repeats the chunk before
        ids = np.concatenate(stream)
        ends = np.flatnonzero(ids == tokenizer.end_of_document) + 1
        assert not len(ids) or ends[-1] == len(ids)
        found.append([tokenizer.decode(document) for document in np.split(ids, ends)[:-1]])
    return found


def never(progress: Progress) -> None:
    raise AssertionError(f"nothing was to be read, but {progress}")


def test_any_number_of_processes_gives_the_same_bytes(
    corpus: Path, texts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    expected: dict[str, bytes] = {}
    for world in (1, 2, 3, 5, 7):
        out = tmp_path / f"of-{world}" / "d"
        for rank in reversed(range(world)):
            share = prepare_parts(corpus, "all", tokenizer, out, rank=rank, world=world, max_bad_ratio=0.2, **SIZES)
            assert share == Share(out, rank, world, len(range(rank, 5, world)), 5, kept=False)
            assert not out.exists()
        (manifest,) = finalize(out).values()
        made = content(out.parent)
        expected = expected or made
        assert made == expected
        assert verify(out, deep=True).ok
        assert manifest == read_manifest(out)
        assert sorted(os.listdir(out.parent)) == ["d", "d.rejects.jsonl"]
    assert documents(tmp_path / "of-1" / "d", tokenizer) == [texts[:13], texts[13:31], [], texts[31:41], texts[41:]]
    parts = read_manifest(tmp_path / "of-1" / "d").parts
    assert [(part["name"], part["rejected"], part["blank"]) for part in parts] == [
        (f"{n:02d}.jsonl.gz", int(n == 3), int(n == 3)) for n in range(5)
    ]
    assert [len(part["shards"]) > 1 for part in parts] == [True, True, False, True, True]
    assert json.loads((tmp_path / "of-1" / "d.rejects.jsonl").read_text())["place"] == "03.jsonl.gz:5"
    again = tmp_path / "again"
    prepare(corpus, "all", tokenizer, again, max_bad_ratio=0.2, **SIZES)
    assert content(again) == content(tmp_path / "of-1" / "d")


def test_a_finished_dataset_is_kept_and_finalized_only_once(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "d"
    first = prepare(corpus, "all", tokenizer, out, max_bad_ratio=0.2, **SIZES)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    for rank in range(2):
        share = prepare_parts(
            corpus, "all", tokenizer, out, rank=rank, world=2, max_bad_ratio=0.2, progress=never, **SIZES
        )
        assert share.kept
    assert finalize(out) == {out: first}
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(DatasetError, match=r"nothing was prepared for .*none: there is no .*none\.prepare"):
        finalize(tmp_path / "none")


def test_an_input_that_fails_costs_no_other(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sound = prepare(corpus, "all", tokenizer, tmp_path / "sound", max_bad_ratio=0.2, **SIZES)
    saved = {name: (corpus / name).read_bytes() for name in ("01.jsonl.gz", "04.jsonl.gz")}
    for name, whole in saved.items():
        (corpus / name).write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "d"
    with pytest.raises(SourceError, match="2 of 5 inputs failed") as caught:
        prepare(corpus, "all", tokenizer, out, max_bad_ratio=0.2, **SIZES)
    for name in saved:
        assert f"{corpus / name}: cut short" in str(caught.value)
    parts = out.with_name("d.prepare") / "parts"
    assert sorted(path.name for path in parts.iterdir() if path.is_dir()) == ["00000", "00002", "00003"]
    with pytest.raises(DatasetError, match=r"2 of 5 parts are missing: 1 \(01\.jsonl\.gz\), 4 \(04\.jsonl\.gz\);"):
        finalize(out)
    assert not out.exists()
    for name, whole in saved.items():
        (corpus / name).write_bytes(whole)
    read: list[int] = []
    manifest = prepare(
        corpus, "all", tokenizer, out, max_bad_ratio=0.2, progress=lambda p: read.append(p.documents), **SIZES
    )
    assert read[-1] == 37, "only the two are read again"
    assert manifest == sound
    assert content(out) == content(tmp_path / "sound")


@pytest.mark.parametrize("damage", ["truncated shard", "missing index", "no part.json"])
def test_a_part_that_is_not_whole_is_written_again(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, damage: str
) -> None:
    sound = prepare(corpus, "all", tokenizer, tmp_path / "sound", max_bad_ratio=0.2, **SIZES)
    out = tmp_path / "d"
    prepare_parts(corpus, "all", tokenizer, out, max_bad_ratio=0.2, **SIZES)
    part = tmp_path / "d.prepare" / "parts" / "00001"
    if damage == "truncated shard":
        os.truncate(part / "shard-00001-00001.tar", 700)
    elif damage == "missing index":
        (part / "shard-00001-00000.tar.idx").unlink()
    else:
        (part / "part.json").unlink()
    with pytest.raises(DatasetError, match=r"1 of 5 parts are missing: 1 \(01\.jsonl\.gz"):
        finalize(out)
    assert prepare(corpus, "all", tokenizer, out, max_bad_ratio=0.2, **SIZES) == sound
    assert content(out) == content(tmp_path / "sound")


def test_an_input_that_changed_is_read_again(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "d"
    prepare_parts(corpus, "all", tokenizer, out, max_bad_ratio=0.2, **SIZES)
    changed, same = corpus / "00.jsonl.gz", corpus / "01.jsonl.gz"
    write_lines(changed, [{"text": "a new first river"}])
    os.utime(same, ns=(1, 1))  # touched, not changed
    counted: list[Progress] = []
    prepare(corpus, "all", tokenizer, out, max_bad_ratio=0.2, progress=counted.append, **SIZES)
    assert counted[-1].documents == 1
    assert documents(out, tokenizer)[0] == ["a new first river"]
    prepare(corpus, "all", tokenizer, tmp_path / "fresh", max_bad_ratio=0.2, **SIZES)
    assert content(out) == content(tmp_path / "fresh")


def test_other_settings_do_not_mix(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "d"
    other = {**SIZES, "chunk_tokens": 200}
    prepare_parts(corpus, "all", tokenizer, out, rank=1, world=2, max_bad_ratio=0.2, **SIZES)
    with pytest.raises(DatasetError, match=r"d\.prepare holds unfinished work .*chunk_tokens 300 there, 200 here"):
        prepare(corpus, "all", tokenizer, out, max_bad_ratio=0.2, **other)
    (corpus / "00.jsonl.gz").rename(corpus / "05.jsonl.gz")
    with pytest.raises(DatasetError, match=r"inputs \['00.jsonl.gz'.* there, \['01.jsonl.gz'.* here"):
        prepare(corpus, "all", tokenizer, out, max_bad_ratio=0.2, **SIZES)
    (corpus / "05.jsonl.gz").rename(corpus / "00.jsonl.gz")
    work = WorkFolder(out)
    held = Lock(work.path / "folder.lock")
    assert held.acquire(shared=True)
    with pytest.raises(DatasetError, match=r"other processes are preparing .*chunk_tokens 300 there, 200 here"):
        prepare(corpus, "all", tokenizer, out, max_bad_ratio=0.2, force=True, **other)
    held.release()
    prepare(corpus, "all", tokenizer, out, max_bad_ratio=0.2, force=True, **other)
    prepare(corpus, "all", tokenizer, tmp_path / "fresh", max_bad_ratio=0.2, **other)
    assert content(out) == content(tmp_path / "fresh")


def test_two_processes_never_write_one_part(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "d")
    work.parts.mkdir(parents=True)
    work.hashes.mkdir()
    (work.path / "settings.json").write_text("{}")
    held = work.part_lock(1)
    begun: list[Progress] = []

    def hold(progress: Progress) -> None:
        if not begun:
            assert held.acquire()
        begun.append(progress)

    with pytest.raises(DatasetError, match=r"another process is still at work on 01\.jsonl\.gz after 0 s"):
        prepare(corpus, "all", tokenizer, work.out, max_bad_ratio=0.2, progress=hold, **SIZES)
    done = sorted(path.name for path in work.parts.iterdir() if path.is_dir())
    assert done == ["00000", "00002", "00003", "00004"], "the others are done first"
    with pytest.raises(DatasetError, match="1 of 5 parts are missing"):
        finalize(work.out, wait=0.0)
    held.release()
    shared = Lock(work.path / "folder.lock")
    assert shared.acquire(shared=True)
    with pytest.raises(DatasetError, match="still being prepared after 0 s"):
        finalize(work.out, wait=0.0)
    shared.release()
    prepare(corpus, "all", tokenizer, work.out, max_bad_ratio=0.2, **SIZES)


@pytest.mark.parametrize("anew", [False, True])
def test_a_lock_on_a_file_that_is_taken_away_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    """Another process may remove the folder between opening the file and locking it, and a third one begin anew."""
    path, flock, calls = tmp_path / "x.lock", fcntl.flock, []

    def removed_meanwhile(descriptor: int, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            path.unlink()
            if anew:
                path.touch()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    lock, other = Lock(path), Lock(path)
    assert not lock.acquire()
    assert lock.acquire(wait=1.0)
    assert not other.acquire()
    lock.release()
    assert other.acquire()
    other.release()


def test_a_full_disk_leaves_nothing_half_done(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fsync = tmp_path / "d", os.fsync
    left = 0

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for allowed in range(0, 70, 7):
        left = allowed
        with pytest.raises(DatasetError, match="No space left on device; nothing half written has a final name"):
            prepare_parts(corpus, "all", tokenizer, out, max_bad_ratio=0.2, **SIZES)
        assert not list(tmp_path.glob("d.prepare/parts/.*"))
        for part in tmp_path.glob("d.prepare/parts/*/"):
            described = json.loads((part / "part.json").read_text())
            assert parts_module.missing_shard(WorkFolder(out), int(part.name), described) is None
        shutil.rmtree(tmp_path / "d.prepare", ignore_errors=True)
    monkeypatch.undo()
    prepare(corpus, "all", tokenizer, out, max_bad_ratio=0.2, **SIZES)
    assert verify(out, deep=True).ok


def test_progress(corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "BATCH_CHARACTERS", 1000)
    size = sum(path.stat().st_size for path in corpus.iterdir())
    for deduplicate in (False, True):
        seen: list[Progress] = []
        manifest = prepare(corpus, "all", tokenizer, tmp_path / f"d{deduplicate}", max_bad_ratio=0.2,
                           deduplicate=deduplicate, progress=seen.append, **SIZES)  # fmt: skip
        assert len(seen) > 10
        assert [p.bytes_read for p in seen] == sorted(p.bytes_read for p in seen)
        assert {(p.bytes_total, p.parts) for p in seen} == {(size * (1 + deduplicate), 5)}
        assert [p.stage for p in seen] == sorted(p.stage for p in seen)
        last = seen[-1]
        assert (last.bytes_read, last.part, last.stage) == (last.bytes_total, 5, "tokenizing")
        assert (last.documents, last.tokens, last.text_bytes) == (
            manifest.documents, manifest.tokens, manifest.text_bytes,
        )  # fmt: skip


@pytest.mark.parametrize(("rank", "world"), [(1, 1), (-1, 2), (0, 0)])
def test_ranks_beyond_the_world(corpus: Path, tokenizer: Tokenizer, tmp_path: Path, rank: int, world: int) -> None:
    with pytest.raises(DatasetError, match=f"rank {rank} of world {world}"):
        prepare_parts(corpus, "all", tokenizer, tmp_path / "d", rank=rank, world=world)
    assert not (tmp_path / "d.prepare").exists()


def test_a_file_name_that_is_no_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "c") + b"/r\xffver.jsonl")).write_text('{"text": "a"}')
    with pytest.raises(SourceError, match=r"the file name 'r\\udcffver\.jsonl' cannot be written down as text"):
        prepare(tmp_path / "c", "all", tokenizer, tmp_path / "d")
    assert os.listdir(tmp_path) == ["c"]


# --- groups ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(texts: list[str], tmp_path: Path) -> Path:
    """Three inputs of four subsets, in the Pile's layout."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    names = ["Pile-CC", "Wikipedia (en)", "ArXiv", "DM Mathematics"]
    for number in range(3):
        records = [
            {"text": text, "meta": {"pile_set_name": names[(7 * number + i * i) % 4]}}
            for i, text in enumerate(texts[20 * number : 20 * number + 20])
        ]
        write_lines(folder / f"{number:02d}.jsonl", records)
    return folder


def subsets(folder: Path) -> dict[str, list[list[str]]]:
    """The oracle: the texts of each value and input."""
    found: dict[str, list[list[str]]] = {}
    files = sorted(folder.iterdir())
    for number, path in enumerate(files):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            lists = found.setdefault(record["meta"]["pile_set_name"], [[] for _ in files])
            lists[number].append(record["text"])
    return found


def test_one_dataset_a_value(mixed: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    expected = subsets(mixed)
    slugs = dict(zip(sorted(expected), ["arxiv", "dm-mathematics", "pile-cc", "wikipedia-en"], strict=True))
    options: dict[str, Any] = {"by": "meta.pile_set_name", **SIZES}
    for world in (1, 2):
        out = tmp_path / f"of-{world}"
        for rank in range(world):
            prepare_parts(mixed, "all", tokenizer, out, rank=rank, world=world, **options)
        made = finalize_datasets(out)
        assert [summary.path for summary in made] == [out / slug for slug in sorted(slugs.values())]
        assert sorted(os.listdir(out)) == sorted([*slugs.values(), GROUPS])
        for value, slug in slugs.items():
            assert documents(out / slug, tokenizer) == expected[value]
            assert verify(out / slug, deep=True).ok
            manifest = read_manifest(out / slug)
            assert (manifest.fields["source"]["by"], manifest.fields["source"]["value"]) == (options["by"], value)
            assert manifest.documents == sum(map(len, expected[value]))
    assert content(tmp_path / "of-1") == content(tmp_path / "of-2")


def test_groups_are_kept_replaced_and_counted(mixed: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out, expected = tmp_path / "d", subsets(mixed)
    options: dict[str, Any] = {"by": "meta.pile_set_name", **SIZES}
    prepare_parts(mixed, "all", tokenizer, out, **options)
    made = finalize(out)
    groups = json.loads((out / GROUPS).read_text())["groups"]
    assert {group["value"]: group["documents"] for group in groups.values()} == {
        value: sum(map(len, lists)) for value, lists in expected.items()
    }
    assert {slug: group["fingerprint"] for slug, group in groups.items()} == {
        path.name: manifest.fingerprint for path, manifest in made.items()
    }
    assert prepare_parts(mixed, "all", tokenizer, out, progress=never, **options).kept
    assert finalize(out) == made
    with pytest.raises(DatasetError, match=r"by 'meta\.pile_set_name' there, None here"):
        prepare(mixed, "all", tokenizer, out, **SIZES)
    with open(mixed / "01.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DatasetError, match=r"of other texts: 01\.jsonl has changed"):
        prepare_parts(mixed, "all", tokenizer, out, **options)
    with pytest.raises(SourceError, match=r"the last is 01\.jsonl:21: no value for 'meta\.pile_set_name' to group by"):
        prepare_parts(mixed, "all", tokenizer, out, force=True, **options)
    prepare_parts(mixed, "all", tokenizer, out, force=True, max_bad_ratio=0.1, **options)
    with pytest.raises(DatasetError, match="already holds a dataset of other texts"):
        finalize(out)
    made = finalize(out, force=True)
    assert sum(manifest.documents for manifest in made.values()) == 60
    assert {manifest.fields["rejected"] for manifest in made.values()} == {0}, "a line without a value is in no group"
    assert [part["rejected"] for part in json.loads((out / GROUPS).read_text())["inputs"]] == [0, 1, 0]
    (out / GROUPS).write_text((out / GROUPS).read_text().replace('"by"', '"By"'))
    with pytest.raises(DatasetError, match=r"groups\.json was changed after it was written"):
        finalize(out)


def test_a_group_of_nothing_but_duplicates_has_no_dataset(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"text": text, "g": g} for text, g in (("a river", "A"), ("stone", "A"), ("a river", "B"))]
    write_lines(tmp_path / "x.jsonl", records)
    out, options = tmp_path / "d", {"by": "g", "deduplicate": True, **SIZES}
    prepare_parts(tmp_path / "x.jsonl", "all", tokenizer, out, **options)
    (summary,) = finalize_datasets(out)
    assert (summary.path, summary.documents, summary.duplicates) == (out / "a", 2, 0)
    assert sorted(os.listdir(out)) == ["a", GROUPS]
    assert json.loads((out / GROUPS).read_text())["empty"] == [{"input": "x.jsonl", "value": "B", "duplicates": 1}]
    assert left_out(out).duplicates == 1
    assert prepare_parts(tmp_path / "x.jsonl", "all", tokenizer, out, progress=never, **options).kept


@pytest.mark.parametrize("kind", ["empty folder", "link to an empty folder", "link to nothing"])
def test_places_that_hold_nothing_yet(tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    write_lines(tmp_path / "x.jsonl", [{"text": "a river"}])
    out = place = tmp_path / "d"
    if kind.startswith("link"):
        place = tmp_path / "disk" / "there"
        place.parent.mkdir()
        out.symlink_to(place)
    if "empty" in kind:
        place.mkdir()
    prepare(tmp_path / "x.jsonl", "all", tokenizer, out, **SIZES)
    prepare(tmp_path / "x.jsonl", "all", tokenizer, out, force=True, **{**SIZES, "chunk_tokens": 200})
    assert documents(out, tokenizer) == [["a river"]]
    assert out.is_symlink() == kind.startswith("link")
    assert os.listdir(place.parent) == [place.name] if out.is_symlink() else not Path(f"{out}.prepare").exists()
    assert sorted(os.listdir(tmp_path)) == sorted({"x.jsonl", "d", *(["disk"] if out.is_symlink() else [])})


def test_the_present_folder(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "x.jsonl", [{"text": "a river"}])
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path / "d")
    prepare(tmp_path / "x.jsonl", "all", tokenizer, ".", **SIZES)
    assert documents(tmp_path / "d", tokenizer) == [["a river"]]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["A b", "a-B"], r"the value 'a-B' of 'meta.set' has the same folder name 'a-b' as 'A b'"),
        (["A", "東京"], r"the value '東京' of 'meta.set' has no letter for a folder name"),
        ([str(n) for n in range(600)], r"'meta.set' has more than 500 values"),
    ],
)
def test_values_that_name_no_group(
    tokenizer: Tokenizer, tmp_path: Path, values: list[str], says: str, write: Callable[..., Path]
) -> None:
    corpus = write(tmp_path / "x.jsonl", values)
    with pytest.raises(SourceError, match=says):
        prepare_parts(corpus, "all", tokenizer, tmp_path / "d", by="meta.set", **SIZES)


@pytest.mark.parametrize("value", [True, None, "", [], {}])
def test_values_that_are_none(tokenizer: Tokenizer, tmp_path: Path, value: Any, write: Callable[..., Path]) -> None:
    corpus = write(tmp_path / "x.jsonl", ["a", value, 0, 2.5])
    prepare_parts(corpus, "all", tokenizer, tmp_path / "d", by="meta.set", max_bad_ratio=0.25, **SIZES)
    made = finalize(tmp_path / "d")
    assert [manifest.fields["source"]["value"] for manifest in made.values()] == ["0", "2.5", "a"]


def test_two_inputs_may_not_mean_two_groups_by_one_name(
    tokenizer: Tokenizer, tmp_path: Path, write: Callable[..., Path]
) -> None:
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "0.jsonl", ["A b"])
    write(tmp_path / "c" / "1.jsonl", ["a-B"])
    prepare_parts(tmp_path / "c", "all", tokenizer, tmp_path / "d", by="meta.set", **SIZES)
    with pytest.raises(SourceError, match=r"'A b' and 'a-B' of 'meta.set' have the same folder name 'a-b'"):
        finalize(tmp_path / "d")


@pytest.fixture
def write() -> Callable[..., Path]:
    def lines(path: Path, values: Sequence[str]) -> Path:
        write_lines(path, [{"text": f"river {value}", "meta": {"set": value}} for value in values])
        return path

    return lines
