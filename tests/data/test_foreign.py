"""Tars that other tools wrote: read as the concatenation of their members, or refused, never quietly cut short."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.archive import samples, scan
from potamos.data.dataset import TokenDataset, read_rows
from potamos.data.errors import CorruptShardError, DataError, DatasetError
from potamos.data.foreign import MemberIndex, MemberShard, TokenizerFacts, find_tars, index_tars
from potamos.data.loader import SourceSpec, StageSpec, TokenStream
from potamos.data.manifest import read_manifest, verify
from potamos.data.tokenizer import Tokenizer

END = 0
VOCABULARY = 300
FACTS = TokenizerFacts(sha256="f" * 64, vocabulary=VOCABULARY, end_of_document=END)
File = tuple[str, bytes]
LONG = "folder-" * 12 + "/" + "k" * 120  # beyond the 100 bytes of a tar header, and beyond USTAR's prefix too


def npy(ids: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, ids)
    return file.getvalue()


def write_tar(
    path: Path, files: Iterable[File], format: int = tarfile.PAX_FORMAT, mtime: float = 1.7e9 + 0.25, **attributes: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid, info.gid, info.uname = len(content), mtime, 12345, 54321, "someone"
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return path


def documents(seed: int, count: int, longest: int = 400) -> list[np.ndarray]:
    """Every third one closed by its own end-of-document id, some with such an id inside."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        ids = rng.integers(1, VOCABULARY, rng.integers(1, longest))
        if number % 3 == 0:
            ids[-1] = END
        if number % 7 == 3:
            ids[len(ids) // 2] = END
        made.append(ids)
    return made


def token_files(members: Sequence[np.ndarray], field: str = "tok.npy", key: str = "{:06d}") -> list[File]:
    return [(f"{key.format(number)}.{field}", npy(ids)) for number, ids in enumerate(members)]


def closed(members: Iterable[np.ndarray]) -> np.ndarray:
    """The oracle: all members joined, an end put after each that lacks one."""
    return np.concatenate([ids if ids[-1] == END else np.append(ids, END) for ids in members]).astype(np.int32)


def facts_of(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: document numbers and places, id by id."""
    number = place = 0
    numbers, places = [], []
    for token in stream.tolist():
        numbers.append(number)
        places.append(place)
        number, place = (number + 1, 0) if token == END else (number, place + 1)
    return np.array(numbers), np.array(places)


def dataset_of(folder: Path, tars: Sequence[Sequence[np.ndarray]], dtype: str = "<u2", **options: Any) -> Path:
    for number, members in enumerate(tars):
        write_tar(folder / f"{number:03d}.tar", token_files([ids.astype(dtype) for ids in members]))
    index_tars(folder, tokenizer=FACTS, **options)
    return folder


def check_rows(path: Path, streams: Sequence[np.ndarray], length: int) -> None:
    """All rows of a dataset against its shards' streams."""
    dataset = TokenDataset(path)
    cut = dataset.cut(length)
    assert cut.per_shard.tolist() == [(len(stream) - 1) // length for stream in streams]
    chunk, start = cut.place(np.arange(cut.total))
    zero = np.zeros(cut.total, np.int64)
    tokens, ids, positions = read_rows([dataset], zero, chunk, start, length + 1, true_positions=True)
    row, first = 0, 0
    for stream in streams:
        numbers, places = facts_of(stream)
        for begin in range(0, len(stream) - length, length):
            here = slice(begin, begin + length + 1)
            np.testing.assert_array_equal(tokens[row], stream[here])
            np.testing.assert_array_equal(ids[row], numbers[here] + first)
            np.testing.assert_array_equal(positions[row], places[here])
            row += 1
        first += numbers[-1] + 1
    assert row == cut.total > 0
    assert dataset.manifest.documents == first
    assert dataset.manifest.tokens == sum(map(len, streams))


@pytest.mark.parametrize("dtype", ["u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", ">i2", ">i8"])
def test_rows_are_cut_from_all_members_joined(tmp_path: Path, dtype: str) -> None:
    tars = [documents(seed, count) for seed, count in ((1, 25), (2, 3), (3, 40))]
    if dtype == "u1":
        tars = [[ids % 250 for ids in members] for members in tars]
    path = dataset_of(tmp_path / "d", tars, dtype)
    check_rows(path, [closed(members) for members in tars], 64)
    assert verify(path, deep=True).ok


def test_fixed_rows_are_a_stream_that_only_its_own_ids_divide(tmp_path: Path) -> None:
    stream = np.concatenate(documents(4, 60))
    rows = [stream[begin : begin + 128] for begin in range(0, len(stream) - 127, 128)]
    path = dataset_of(tmp_path / "d", [rows[:20], rows[20:]], documents="rows")
    check_rows(path, [np.concatenate(rows[:20]), np.concatenate(rows[20:])], 100)


def test_any_span_of_a_shard(tmp_path: Path) -> None:
    members = documents(5, 50, 60)
    path = dataset_of(tmp_path / "d", [members])
    stream = closed(members)
    numbers, places = facts_of(stream)
    manifest = read_manifest(path)
    shard = MemberShard(path / "000.tar", manifest.shards[0], manifest)
    assert shard.tokens == len(stream)
    rng = random.Random(0)
    spans = [sorted(rng.sample(range(len(stream) + 1), 2)) for _ in range(300)]
    for begin, end in [*spans, (0, len(stream)), (0, 1), (len(stream) - 1, len(stream))]:
        out = np.full(end - begin, -9, np.int32)
        document, position, ends = shard.read_row(begin, end, out)
        np.testing.assert_array_equal(out, stream[begin:end])
        assert (document, position) == (numbers[begin], places[begin])
        np.testing.assert_array_equal(ends, np.flatnonzero(np.diff(numbers[begin:end])) + 1)


def test_training_streams_read_it_like_any_dataset(tmp_path: Path) -> None:
    tars = [documents(6, 30), documents(7, 30)]
    path = dataset_of(tmp_path / "d", tars)
    streams = [closed(members) for members in tars]
    wanted = sorted(
        tuple(stream[begin : begin + 33].tolist()) for stream in streams for begin in range(0, len(stream) - 32, 32)
    )
    for order in ({}, {"order": "window", "window": 1}):
        stream = TokenStream([StageSpec(0, (SourceSpec(path),))], sequence_length=32, seed=1, **order)
        assert sorted(map(tuple, stream.read(0, len(wanted)).tokens.tolist())) == wanted
        assert list(map(tuple, stream.read(0, len(wanted)).tokens.tolist())) != wanted


STOCK = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("format", STOCK, ids=["ustar", "gnu", "pax"])
def test_scanner_agrees_with_tarfile(tmp_path: Path, format: int) -> None:
    long = "a" * 90 + "/" + "b" * 60 if format == tarfile.USTAR_FORMAT else LONG
    files = [(f"{long}{number}.bin", bytes(number)) for number in (0, 1, 511, 512, 513, 5000)]
    path = write_tar(tmp_path / "x.tar", [*files, ("straße/東京.bin", b"x")], format, mtime=7)
    with tarfile.open(path, "a", format=format) as tar:
        folder = tarfile.TarInfo("some/folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("last.bin"))
    with tarfile.open(path) as tar:
        stock = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    assert list(scan(path.read_bytes(), "x")) == stock
    assert len(stock) == 8


def test_gnu_tar_itself(tmp_path: Path) -> None:
    import subprocess

    if shutil.which("tar") is None:
        pytest.skip("no tar command")
    members = documents(8, 5)
    folder = tmp_path / "in" / ("deep-" * 30)
    folder.mkdir(parents=True)
    for name, content in token_files(members):
        (folder / name).write_bytes(content)
    for format in ("gnu", "pax", "oldgnu"):
        out = tmp_path / format / "x.tar"
        out.parent.mkdir()
        command = ["tar", f"--format={format}", "--sort=name", "-cf", str(out), "-C", str(tmp_path), "in"]
        subprocess.run(command, check=True)
        index_tars(out, tokenizer=FACTS)
        check_rows(out.parent, [closed(members)], 50)


def test_sizes_from_8_gib_on_are_big_endian_numbers(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x.bin")
    info.size = 2**33 + 5
    header = info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(CorruptShardError, match=f"ends at byte {2**33 + 5 + 512} of {512 + 1024}"):
        list(scan(header + bytes(1024), "x"))
    pax = info.tobuf(tarfile.PAX_FORMAT)  # a record of its own, as the header's field is too small
    with pytest.raises(CorruptShardError, match=f"ends at byte {2**33 + 5 + 1536} of {1536 + 1024}"):
        list(scan(pax + bytes(1024), "x"))


def test_stock_writer(tmp_path: Path) -> None:
    """`webdataset.TarWriter` as it comes: float times, hence a PAX header per member, and uncounted fields."""
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    members = documents(9, 30)
    with wds.TarWriter(str(tmp_path / "000.tar")) as writer:
        for number, ids in enumerate(members):
            writer.write({"__key__": f"a/{number}", "cls": 3, "tokens.npy": ids, "json": {"n": number}})
    assert b"mtime=" in (tmp_path / "000.tar").read_bytes()
    manifest = index_tars(tmp_path, tokenizer=FACTS)
    assert manifest.fields["source"]["field"] == "tokens.npy"
    check_rows(tmp_path, [closed(members)], 64)
    stock = [s["tokens.npy"] for s in wds.WebDataset(str(tmp_path / "000.tar"), shardshuffle=False).decode()]
    np.testing.assert_array_equal(np.concatenate(stock), np.concatenate(members))


@pytest.mark.parametrize("force", [False, True])
def test_indexing_again(tmp_path: Path, force: bool) -> None:
    path = dataset_of(tmp_path / "d", [documents(1, 9)])
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    index_tars(path, tokenizer=FACTS, force=force)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    write_tar(path / "001.tar", token_files(documents(2, 5)))
    if not force:
        with pytest.raises(DatasetError, match="another index; replace it with --force"):
            index_tars(path, tokenizer=FACTS)
        return
    assert len(index_tars(path, tokenizer=FACTS, force=True).shards) == 2
    write_tar(path / "001.tar", token_files(documents(3, 6)))
    with pytest.raises(DatasetError, match=r"001\.tar, bytes .* changed on disk.*--force"):
        index_tars(path, tokenizer=FACTS)


def test_a_run_killed_between_indexes_is_taken_up(tmp_path: Path) -> None:
    path = dataset_of(tmp_path / "d", [documents(1, 9), documents(2, 9)])
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    (path / "dataset.json").unlink()
    (path / "001.tar.idx").unlink()
    index_tars(path, tokenizer=FACTS)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_another_folder_gets_links_that_move_along(tmp_path: Path) -> None:
    tars = [documents(1, 20), documents(2, 20)]
    for number, members in enumerate(tars):
        write_tar(tmp_path / "tree" / f"in{number}" / f"{number}.tar", token_files(members))
    out = tmp_path / "tree" / "out"
    index_tars([tmp_path / "tree/in0", tmp_path / "tree/in1/1.tar"], out, tokenizer=FACTS)
    assert sorted(p.name for p in out.iterdir()) == ["0.tar", "0.tar.idx", "1.tar", "1.tar.idx", "dataset.json"]
    assert sorted(p.name for p in (tmp_path / "tree/in0").iterdir()) == ["0.tar"]
    (tmp_path / "tree").rename(tmp_path / "moved")
    check_rows(tmp_path / "moved/out", [closed(members) for members in tars], 64)
    assert verify(tmp_path / "moved/out", deep=True).ok
    (tmp_path / "moved/in1/1.tar").unlink()
    assert "1.tar is missing" in verify(tmp_path / "moved/out").problems[0]


def test_ways_to_name_tars(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"part-{n:02d}.tar", token_files(documents(n, 3))) for n in range(12)]
    assert find_tars(tmp_path) == paths
    assert find_tars(str(tmp_path / "part-*.tar")) == paths
    assert find_tars(str(tmp_path / "part-{03..05}.tar")) == paths[3:6]
    assert find_tars([paths[4], str(paths[1])]) == [paths[4], paths[1]]
    for wrong, said in [
        (tmp_path / "nothing", "no tar there"),
        (str(tmp_path / "part-{10..13}.tar"), r"2 of 4 tars are missing, the first is .*part-12\.tar"),
        ("http://host/a.tar", "fetch them first"),
        ("pipe:cat a.tar", "fetch them first"),
        ([paths[0], paths[0]], "one name"),
    ]:
        with pytest.raises(DatasetError, match=said):
            find_tars(wrong)


def test_files_of_others_stay(tmp_path: Path, write_ids: Any) -> None:
    path = write_tar(tmp_path / "a" / "000.tar", token_files(documents(1, 3)))
    (tmp_path / "a" / "000.tar.idx").write_bytes(b"v1.2 1\n")
    with pytest.raises(DatasetError, match="belongs to another tool"):
        index_tars(path, tokenizer=FACTS)
    assert (tmp_path / "a" / "000.tar.idx").read_bytes() == b"v1.2 1\n"
    prepared = write_ids(tmp_path / "p", [50, 60], chunk_tokens=64)
    with pytest.raises(DatasetError, match="shard of a prepared dataset"):
        index_tars(prepared, tokenizer=FACTS)
    for force in (False, True):
        with pytest.raises(DatasetError, match="holds a prepared dataset"):
            index_tars(path, prepared, tokenizer=FACTS, force=force)
    assert verify(prepared, deep=True).ok
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "000.tar").write_bytes(b"mine")
    with pytest.raises(DatasetError, match="another file"):
        index_tars(path, tmp_path / "b", tokenizer=FACTS)


def test_tars_beside_that_are_not_of_the_dataset_are_no_problem(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", token_files(documents(number, 4)))
    index_tars(str(tmp_path / "{0..1}.tar"), tokenizer=FACTS)
    assert verify(tmp_path, deep=True).ok


def test_an_end_of_document_that_is_added_counts_among_the_ids(tmp_path: Path) -> None:
    facts = TokenizerFacts(sha256="f" * 64, vocabulary=60, end_of_document=50)
    write_tar(tmp_path / "0.tar", [("a.npy", npy([3, 4]))])
    manifest = index_tars(tmp_path, tokenizer=facts)
    assert manifest.parts[0]["max_token"] == 50


def test_text_behind_ids_is_counted_where_the_tokenizer_is_known(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str]
) -> None:
    write_tar(tmp_path / "0.tar", token_files(tokenizer.encode_batch(texts)))
    manifest = index_tars(tmp_path, tokenizer=tokenizer)
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.tokenizer["sha256"] == tokenizer.sha256
    assert manifest.documents == len(texts)


def tar_with(*files: File) -> Callable[[Path], object]:
    return lambda path: write_tar(path, files)


ONE = npy(np.arange(1, 9))


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (tar_with(("a.tok.npy", npy(np.array([4, -2, 5])))), {}, r"a\.tok\.npy: id -2 at place 1 is outside"),
        (tar_with(("a.tok.npy", npy(np.array([4, 5, 300])))), {}, r"id 300 at place 2 is outside .* 0\.\.299"),
        (tar_with(("a.tok.npy", npy(np.array([4.0])))), {"field": "tok.npy"}, "type float64, not one row"),
        (tar_with(("a.tok.npy", npy(np.ones((2, 3), int)))), {"field": "tok.npy"}, r"shape \(2, 3\)"),
        (tar_with(("a.tok.npy", npy(np.array([{}], object)))), {"field": "tok.npy"}, "type object"),
        (tar_with(("a.tok.npy", npy(np.array([4.0])))), {}, "neither ids nor text"),
        (tar_with(("a.jpg", b"x")), {}, "neither ids nor text in its fields jpg"),
        (tar_with(("a.x.npy", ONE), ("a.y.npy", ONE)), {}, r"fields x\.npy, y\.npy all hold ids; choose"),
        (tar_with(("a.x.npy", ONE)), {"field": "y.npy"}, r"has no field 'y\.npy' but x\.npy"),
        (tar_with(("a.x.npy", ONE), ("b.json", b"{}")), {}, r"sample 'b' has no field 'x\.npy' but json"),
        (tar_with(("a.x.npy", ONE)), {"tokenizer": None}, "name the tokenizer"),
        (tar_with(("a.x.npy", ONE)), {"documents": "lines"}, "'lines' is unknown"),
        (tar_with(("a.x.npy", npy(np.array([], int)))), {}, "holds nothing to read"),
        (tar_with(("README", b"x")), {}, "holds no sample"),
        (tar_with(("a.x.npy", ONE[:-3])), {}, "do not fill"),
        (tar_with(("a.x.npy", ONE.replace(b"'descr'", b"'desc('"))), {}, r"no \.npy header"),
    ],
)
def test_members_that_are_no_ids_are_named(
    tmp_path: Path, make: Callable[[Path], object], options: dict[str, Any], said: str
) -> None:
    make(tmp_path / "0.tar")
    with pytest.raises(DatasetError, match=said) as caught:
        index_tars(tmp_path, **{"tokenizer": FACTS, **options})
    if "documents" not in options and "tokenizer" not in options:
        assert "0.tar" in str(caught.value)
    assert not (tmp_path / "dataset.json").exists()


def test_an_empty_member_counts_as_blank(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", token_files([np.arange(1, 70), np.empty(0, int), np.arange(2, 70)]))
    assert index_tars(tmp_path, tokenizer=FACTS).fields["blank"] == 1
    check_rows(tmp_path, [closed([np.arange(1, 70), np.arange(2, 70)])], 32)


def sound(tmp_path: Path) -> tuple[Path, bytes]:
    path = write_tar(tmp_path / "0.tar", token_files(documents(1, 12, 300)))
    return path, path.read_bytes()


def test_truncated_tar(tmp_path: Path) -> None:
    """Wherever it is cut; only the zeros that fill its last record may be missing."""
    path, content = sound(tmp_path)
    last = max(member.offset + member.size for member in scan(content, "x"))
    end = last + -last % 512 + 1024
    for size in [*range(0, end, 301), end - 1, end - 512, end - 513]:
        path.write_bytes(content[:size])
        with pytest.raises(CorruptShardError, match=r"0\.tar (is truncated|is empty)"):
            index_tars(path, tokenizer=FACTS)
    path.write_bytes(content[:end])
    index_tars(path, tokenizer=FACTS)


def test_corrupt_mid_header(tmp_path: Path) -> None:
    """Stock readers stop there without a word; every byte of the header is covered by its checksum."""
    path, content = sound(tmp_path)
    middle = [member.offset for member in scan(content, "x")][6] - 512
    for byte in [*range(0, 512, 13), 148, 156, 257]:
        damaged = bytearray(content)
        damaged[middle + byte] ^= 0x41
        path.write_bytes(damaged)
        with pytest.raises(CorruptShardError, match=f"byte {middle}: (no tar header|the tar header's checksum)"):
            index_tars(path, tokenizer=FACTS)


def test_missing_end_of_archive_blocks(tmp_path: Path) -> None:
    path, content = sound(tmp_path)
    last = max(member.offset + member.size for member in scan(content, "x"))
    last += -last % 512
    for size, said in ((last, "no end-of-archive mark"), (last + 512, "inside its end-of-archive mark")):
        path.write_bytes(content[:size])
        with pytest.raises(CorruptShardError, match=said):
            index_tars(path, tokenizer=FACTS)
    path.write_bytes(content + content)
    with pytest.raises(CorruptShardError, match="goes on after its end-of-archive mark"):
        index_tars(path, tokenizer=FACTS)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.x.npy", "a.x.npy"], r"key 'a' has field 'x\.npy' twice"),
        (["a.x.npy", "a.X.npy"], r"key 'a' has field 'x\.npy' twice"),
        (["a.x.npy", "b.x.npy", "a.x.npy"], "key 'a' comes again"),
        (["a.x.npy", "b.x.npy", "a.json"], "key 'a' comes again"),
    ],
    ids=["adjacent", "adjacent in case only", "apart", "apart with another field"],
)
def test_duplicate_keys_in_tar(tmp_path: Path, names: list[str], said: str) -> None:
    write_tar(tmp_path / "0.tar", [(name, ONE if name.endswith("npy") else b"{}") for name in names])
    with pytest.raises(CorruptShardError, match=said):
        index_tars(tmp_path, tokenizer=FACTS)


def test_keys_are_those_of_webdataset(tmp_path: Path) -> None:
    names = ["a.b/c.x.npy", "c.X.npy", "__meta__", "__x__/y.txt", "noextension", ".hidden", "d/.e.txt", "f/g.h.i.j"]
    path = write_tar(tmp_path / "0.tar", [(name, ONE) for name in names])
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    stock = [
        (sample["__key__"], sorted(set(sample) - {"__key__", "__url__", "__local_path__"}))
        for sample in wds.WebDataset(str(path), shardshuffle=False)
    ]
    assert [(key, sorted(fields)) for key, fields in samples(path.read_bytes(), "x")] == stock
    assert len(stock) == 4


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
        (b"Z", "Z"),
    ],
)
def test_members_that_are_no_plain_files(tmp_path: Path, kind: bytes, said: str) -> None:
    write_tar(tmp_path / "0.tar", [("b.x.npy", b"")], tarfile.GNU_FORMAT, 0, type=kind, linkname="a.x.npy")
    with pytest.raises(CorruptShardError, match=f"b.x.npy is .*{said}"):
        index_tars(tmp_path, tokenizer=FACTS)


def test_sparse_files_of_pax_tars_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("GNUSparseFile.0/a.npy")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.npy"}
        tar.addfile(info)
    with pytest.raises(CorruptShardError, match="sparse file"):
        index_tars(tmp_path, tokenizer=FACTS)


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    import gzip

    path, content = sound(tmp_path)
    path.write_bytes(gzip.compress(content))
    with pytest.raises(DatasetError, match=r"compressed \(gzip\).*unpack"):
        index_tars(path, tokenizer=FACTS)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """In tar, index and dataset.json: by the deep check always, in training before a wrong id is handed out."""
    tars = [documents(1, 12, 200), documents(2, 12, 200)]
    path = dataset_of(tmp_path / "d", tars)
    wanted = all_rows(path)
    rng = random.Random(5)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for place in [rng.randrange(len(content)) for _ in range(120)]:
            damaged = bytearray(content)
            damaged[place] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            report = verify(path, deep=True)
            assert not report.ok, (file.name, place)
            assert str(path) in report.problems[0]
            try:
                got = all_rows(path)
            except DataError:
                continue
            np.testing.assert_array_equal(got, wanted, err_msg=f"{file.name} {place}")
        file.write_bytes(content)
    assert verify(path, deep=True).ok


def all_rows(path: Path) -> np.ndarray:
    dataset = TokenDataset(path)
    cut = dataset.cut(32)
    chunk, start = cut.place(np.arange(cut.total))
    return np.stack(read_rows([dataset], np.zeros(cut.total, np.int64), chunk, start, 33))


def test_a_flipped_payload_byte_names_shard_member_and_bytes(tmp_path: Path) -> None:
    path = dataset_of(tmp_path / "d", [documents(1, 12, 200)])
    tar = path / "000.tar"
    content = bytearray(tar.read_bytes())
    content[next(scan(bytes(content), "x")).offset + 130] ^= 1
    tar.write_bytes(content)
    with pytest.raises(CorruptShardError, match=r"000\.tar, member 0 of the shard, bytes 0 to 8192: crc32"):
        all_rows(path)


def test_an_index_of_another_tar_is_stale(tmp_path: Path) -> None:
    one, two = dataset_of(tmp_path / "1", [documents(1, 9)]), dataset_of(tmp_path / "2", [documents(2, 9)])
    shutil.copy(two / "000.tar.idx", one / "000.tar.idx")
    with pytest.raises(CorruptShardError, match=r"000\.tar\.idx"):
        all_rows(one)
    with pytest.raises(CorruptShardError, match="not an index of a foreign tar"):
        MemberIndex.from_bytes(b"", "x")


def test_progress_is_told(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", token_files(documents(number, 3)))
    told: list[tuple[int, int]] = []
    index_tars(tmp_path, tokenizer=FACTS, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert os.listdir(tmp_path)
