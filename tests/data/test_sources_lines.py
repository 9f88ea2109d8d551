"""Decompression and line splitting against the naive way, all at once; and files that are not what they were."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import random
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data.errors import SourceError
from potamos.data.sources import Document, Record, documents, open_source
from potamos.data.sources import lines as module
from potamos.data.sources.lines import LongLine, lines, unpacked


def blocks(content: bytes, size: int) -> Iterator[bytes]:
    return (content[i : i + size] for i in range(0, len(content), size))


def unpack(content: bytes, name: str, size: int = 2**20) -> bytes:
    return b"".join(unpacked(blocks(content, size), name))


def zstd(content: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)  # type: ignore[arg-type]


def zstd_in_blocks(parts: list[bytes], **options: object) -> bytes:
    """One frame without its size in the header, with a block for each part: what a streaming writer leaves."""
    out = io.BytesIO()
    with zstandard.ZstdCompressor(**options).stream_writer(out, closefd=False) as writer:  # type: ignore[arg-type]
        for part in parts:
            writer.write(part)
            writer.flush()
    return out.getvalue()


def skippable(content: bytes, kind: int = 3) -> bytes:
    return bytes([0x50 + kind]) + b"\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content


TEXT = "".join(f"{i} river 東京 {'x' * (i % 50)}\n" for i in range(3000)).encode()

# --- whole files ------------------------------------------------------------------------------------------------------

part = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=100).map(str.encode),
    st.tuples(st.binary(min_size=1, max_size=3), st.integers(1, 400_000)).map(lambda p: p[0] * p[1]),
)
frames = st.lists(
    st.tuples(
        st.sampled_from(["sized", "streamed", "checked", "skippable", "empty", "best"]), st.lists(part, max_size=3)
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(frames, st.sampled_from([1, 2, 3, 17, 4096, 2**20]))
def test_zstd_equals_the_one_shot_decompressor(plan: list[tuple[str, list[bytes]]], size: int) -> None:
    packed, expected = b"", b""
    for kind, parts in plan:
        content = b"" if kind == "empty" else b"".join(parts)
        match kind:
            case "skippable":
                packed += skippable(content)
                continue
            case "streamed":
                packed += zstd_in_blocks(parts)
            case "checked":
                packed += zstd(content, write_checksum=True)
            case _:
                packed += zstd(content, level=19 if kind == "best" else 1)
        expected += content
    size = size if len(packed) / size < 3000 else 4096
    assert unpack(packed, "x.zst", size) == expected
    if not any(kind == "skippable" for kind, _ in plan):
        reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
        assert reader.read() == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(part, min_size=1, max_size=3), st.sampled_from([1, 2, 3, 17, 4096, 2**20]), st.integers(0, 9))
def test_gzip_equals_the_standard_library(parts: list[bytes], size: int, zeros: int) -> None:
    packed = (b"\0" * zeros).join(gzip.compress(content) for content in parts) + b"\0" * zeros
    size = size if len(packed) / size < 3000 else 4096
    assert unpack(packed, "x.gz", size) == gzip.decompress(packed) == b"".join(parts)


def naive(content: bytes, limit: int) -> list[bytes | None]:
    found = content.split(b"\n")
    if not found[-1]:
        found.pop()
    return [line if len(line) <= limit else None for line in found]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([b"\n", b"\r\n", b"\n\n", "é東🌊".encode(), b"a" * 7, b"b" * 30, b" "]), max_size=30),
    st.integers(1, 40),
    st.integers(1, 50),
)
def test_lines_equal_a_split_of_the_whole(parts: list[bytes], size: int, limit: int) -> None:
    content = b"".join(parts)
    found = list(lines(blocks(content, size), limit))
    assert [None if isinstance(line, LongLine) else line for line in found] == naive(content, limit)
    whole = content.split(b"\n")
    for line, expected in zip(found, whole, strict=False):
        assert not isinstance(line, LongLine) or line.start == expected[:200]


@pytest.mark.parametrize("size", [1, 7, 2000])
def test_a_line_of_just_the_limit_is_whole(size: int) -> None:
    """Wherever blocks end, and as the last line that nothing ends; the limit is above what is kept of a long one."""
    content = b"x\n" + b"a" * 300 + b"\n" + b"b" * 301 + b"\ny\n" + b"c" * 300
    found = list(lines(blocks(content, size), 300))
    assert found == [b"x", b"a" * 300, LongLine(b"b" * 200), b"y", b"c" * 300]
    assert list(map(type, found)) == [bytes, bytes, LongLine, bytes, bytes]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(max_size=60), max_size=40),
    st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz"]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_json_lines_equal_the_naive_reader(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], suffix: str, escaped: bool, seed: int
) -> None:
    """Read all, split all, parse all: the same texts, in any packing, with multi-byte characters on every border."""
    rng = random.Random(seed)
    packed, content = b"", b""
    for text in texts:
        content += json.dumps({"text": text, "n": rng.random()}, ensure_ascii=escaped).encode() + b"\n"
    cuts = sorted(rng.randint(0, len(content)) for _ in range(3))
    for piece in (content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)):
        packed += {"gz": gzip.compress, "zst": zstd}.get(suffix.rpartition(".")[2], bytes)(piece)
    path = tmp_path_factory.mktemp("x") / f"x{suffix}"
    path.write_bytes(packed)
    expected = [json.loads(line) for line in content.decode().split("\n")[:-1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record.blocks, "__defaults__", (rng.choice([1, 2, 3, 7, 64, 2**20]),))
        found = list(documents(open_source(path)))
    assert found == [
        Document(line["text"], f"x{suffix}:{number}", {"n": line["n"]})
        for number, line in enumerate(expected, start=1)
        if line["text"].strip()
    ]


# --- files cut short, damaged, or something else ----------------------------------------------------------------------

SMALL = "".join(f'{{"text": "the river {i} 東京"}}\n' for i in range(40)).encode()
SMALL_TEXTS = [json.loads(line)["text"] for line in SMALL.splitlines()]
PACKED: dict[str, Callable[[], bytes]] = {
    "one.zst": lambda: zstd(SMALL),
    "checked.zst": lambda: zstd(SMALL, write_checksum=True),
    "streamed.zst": lambda: zstd_in_blocks([SMALL[:100], SMALL[100:600], SMALL[600:]]),
    "run.zst": lambda: zstd(b"a" * 3_000_000),
    "skippable.zst": lambda: skippable(b"about the file") + zstd(SMALL),
    "one.gz": lambda: gzip.compress(SMALL, mtime=0),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_file_cut_at_any_byte_fails(name: str) -> None:
    packed = PACKED[name]()
    assert len(packed) > 20
    borders = {len(skippable(b"about the file"))} if name == "skippable.zst" else set()
    for end in range(len(packed)):
        for size in (5, 2**20):
            if end in borders:
                assert unpack(packed[:end], name, size) == b""
                continue
            with pytest.raises(SourceError, match=f"^{name}: (cut short: the file ends at byte {end},|is empty)"):
                unpack(packed[:end], name, size)


@pytest.mark.parametrize("name", ["x.zst", "x.gz"])
def test_a_cut_between_frames_is_a_shorter_file(name: str) -> None:
    """No stream can say that whole frames are missing: size and sha256, which are recorded, can."""
    pack = zstd if name == "x.zst" else gzip.compress
    first, second = pack(SMALL), pack(TEXT)
    both = first + second
    assert unpack(both, name) == SMALL + TEXT
    for end in range(1, len(both)):
        if end == len(first):
            assert unpack(both[:end], name) == SMALL
        elif end < 300 or end > len(both) - 300 or abs(end - len(first)) < 40:
            with pytest.raises(SourceError, match="cut short"):
                unpack(both[:end], name)


def test_what_the_library_does_with_a_truncated_file() -> None:
    """Why frames are walked here: the stock reader gives a part of the text, without a word."""
    packed = zstd(TEXT, level=1)
    part = zstandard.ZstdDecompressor().stream_reader(packed[: len(packed) // 2]).read()
    assert len(part) < len(TEXT)
    with pytest.raises(SourceError, match="cut short"):
        unpack(packed[: len(packed) // 2], "x.zst")


@pytest.mark.parametrize("name", ["checked.zst", "one.gz"])
def test_a_flipped_byte_of_a_checked_file_never_gives_other_text(name: str) -> None:
    packed = PACKED[name]()
    for at in range(len(packed)):
        damaged = bytearray(packed)
        damaged[at] ^= 0x20
        with contextlib.suppress(SourceError):
            assert unpack(bytes(damaged), name) == SMALL, "only bytes that no reader uses may change without an error"


def test_a_flip_that_zstd_cannot_see_shows_in_the_recorded_sha256(tmp_path: Path) -> None:
    """Without a checksum in its frames zstd gives other text of the right length; the manifest's sha256 tells."""
    packed, path = zstd(SMALL), tmp_path / "x.jsonl.zst"
    unseen = 0
    for at in range(9, len(packed)):
        damaged = bytearray(packed)
        damaged[at] ^= 0x01
        path.write_bytes(damaged)
        record = Record()
        source = open_source(path)
        with contextlib.suppress(SourceError):
            unseen += [d.text for d in source.read(source.inputs()[0], record)] != SMALL_TEXTS
            assert record.files[0]["sha256"] == hashlib.sha256(damaged).hexdigest()
    assert unseen > 10, "nothing was shown"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.zst", b"", "x.zst: is empty"),
        ("x.gz", b"", "x.gz: is empty"),
        ("x.zst", zstd(SMALL) + b"garbage", f"x.zst: the bytes from {len(zstd(SMALL))} on are no zstd frame"),
        ("x.zst", zstd(SMALL) + b"\0" * 8, f"x.zst: the bytes from {len(zstd(SMALL))} on are no zstd frame"),
        ("x.zst", SMALL, "x.zst: the bytes from 0 on are no zstd frame"),
        ("x.gz", SMALL, "x.gz: the gzip member that begins at byte 0 is damaged, or no gzip"),
        ("x.gz", gzip.compress(SMALL) + b"\0\0garbage", r"x.gz: the gzip member that begins at byte \d+ is damaged"),
        ("x.gz", b"\0" + gzip.compress(SMALL), "x.gz: the gzip member that begins at byte 0 is damaged"),
        ("x.zst", b"\x28\xb5\x2f\xfd\x08" + b"\0" * 20, "x.zst: the header of the zstd frame that begins at byte 0 "),
    ],
    ids=["empty zst", "empty gz", "bytes after zst", "zeros after zst", "no zst", "no gz", "bytes after gz",
         "zeros before gz", "header"],
)  # fmt: skip
def test_what_is_no_sound_file_is_named(name: str, content: bytes, says: str) -> None:
    with pytest.raises(SourceError, match=f"^{says}"):
        unpack(content, name)


def window(log: int) -> bytes:
    """A frame header that asks for a window of 2**log bytes, and one empty last block."""
    return b"\x28\xb5\x2f\xfd" + bytes([0, (log - 10) << 3]) + b"\x01\x00\x00"


def test_long_windows_are_read_and_longer_ones_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=27, enable_ldm=True)
    assert unpack(zstd_in_blocks([TEXT], compression_params=parameters), "x.zst") == TEXT
    assert unpack(window(31), "x.zst") == b""
    with pytest.raises(
        SourceError, match=r"x\.zst: .*requires too much memory.*compress it with zstd --long=31 or less"
    ):
        unpack(window(32), "x.zst")
    # the same asked for by a frame in one segment, whose window is its content
    with pytest.raises(SourceError, match=f"needs a window of {2**33} bytes, more than {2**31}; .*--long=31"):
        unpack(b"\x28\xb5\x2f\xfd\xe0" + (2**33).to_bytes(8, "little") + b"\x01\x00\x00", "x.zst")


def test_a_dictionary_is_asked_for() -> None:
    dictionary = zstandard.ZstdCompressionDict(b"the river runs past quiet mills", dict_type=zstandard.DICT_TYPE_AUTO)
    trained = zstandard.train_dictionary(2000, [f"the river {i} runs past {i % 7} mills".encode() for i in range(900)])
    assert trained.dict_id()
    with pytest.raises(SourceError, match=r"x\.zst: .* compressed with dictionary \d+; compress the file again"):
        unpack(zstd(SMALL, dict_data=trained), "x.zst")
    with pytest.raises(SourceError, match=r"x\.zst: .* damaged"):
        unpack(zstd(b"the river runs past quiet mills" * 20, dict_data=dictionary), "x.zst")


def test_a_dictionary_free_checksum_error_names_the_frame() -> None:
    first, packed = zstd(SMALL), bytearray(zstd(SMALL, write_checksum=True))
    packed[-1] ^= 1
    with pytest.raises(SourceError, match=f"the zstd frame that begins at byte {len(first)} is damaged before byte"):
        unpack(first + bytes(packed), "x.zst")


@pytest.mark.parametrize("left", [b"", b"more"])
def test_a_frame_whose_end_the_library_does_not_see_fails(monkeypatch: pytest.MonkeyPatch, left: bytes) -> None:
    """The walk over the blocks and the library must agree where a frame ends; neither is trusted alone."""

    class Odd:
        eof, unused_data = bool(left), left

        def decompressobj(self, **options: object) -> Odd:
            return self

        def decompress(self, piece: bytes) -> bytes:
            return b"text"

    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda **options: Odd())
    with pytest.raises(SourceError, match=r"x\.zst: the zstd frame that begins at byte 0 is damaged before byte"):
        unpack(zstd(SMALL), "x.zst")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.zst", "x.gz"])
def test_memory_is_bounded_whatever_the_ratio(name: str) -> None:
    """A line of 60 MB in a few kB of file is passed over in a few blocks' memory."""
    line = b"a" * 10_000_000
    if name == "x.zst":
        packed = zstd_in_blocks([line] * 6, level=1)
    else:
        packer = zlib.compressobj(9, wbits=31)
        packed = b"".join(packer.compress(line) for _ in range(6)) + packer.flush()
    assert len(packed) < 2**18, "one read block holds it all"
    tracemalloc.start()
    (found,) = lines(unpacked(iter([packed]), name), 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == LongLine(b"a" * 200)
    assert peak < 12 * 2**20, f"{peak} bytes"


def test_blocks_stay_small() -> None:
    packed = zstd(b"a" * 30_000_000)
    sizes = [len(block) for block in unpacked(iter([packed]), "x.zst")]
    assert max(sizes) <= module.ZSTD_BLOCKS * 2**17
    assert sum(sizes) == 30_000_000


# --- what a record keeps ----------------------------------------------------------------------------------------------


def test_raw_bytes_are_hashed_and_counted_while_reading(tmp_path: Path) -> None:
    packed = gzip.compress(SMALL)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(packed)
    source = open_source(path)
    (one,) = source.inputs()
    assert one.bytes == len(packed)
    record = Record()
    reading = source.read(one, record)
    next(reading)
    assert record.files == []
    list(reading)
    assert record.files == [{"name": "x.jsonl.gz", "bytes": len(packed), "sha256": hashlib.sha256(packed).hexdigest()}]
    assert record.bytes_read == len(packed)


def test_a_file_that_is_still_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(SMALL)
    reading = Record().blocks(path, "x.jsonl", 100)
    next(reading)
    with open(path, "ab") as file:
        file.write(b"more\n")
    with pytest.raises(SourceError, match=rf"x\.jsonl: had {len(SMALL)} bytes when opened and {len(SMALL) + 5}"):
        list(reading)


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".json.gz"])
def test_a_truncated_input_fails_and_names_its_file(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(5)
    content = b"".join(json.dumps({"text": rng.randbytes(40).hex()}).encode() + b"\n" for _ in range(20_000))
    packed = zstd(content) if suffix.endswith("zst") else gzip.compress(content)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(packed[:-1])
    record = Record()
    source = open_source(path)
    with pytest.raises(SourceError, match=rf"x{suffix}: cut short: the file ends at byte {len(packed) - 1}"):
        for _ in source.read(source.inputs()[0], record):
            pass
    assert record.counts.documents > 1000, "the error comes after text that would otherwise have passed"
    assert record.files == [] or record.files[0]["bytes"] == len(packed) - 1
