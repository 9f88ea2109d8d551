"""Raw blocks to lines: gzip and zstd unpacked frame by frame, so that a file cut short is never half a success.

Memory is bounded by the zstd window and the longest line, whatever the compression ratio. A stream cannot tell that
whole frames (zstd) or members (gzip) are missing at its end: a file cut exactly there is a shorter sound file, and only
its size or sha256, which datasets record, says otherwise.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

from potamos.data.errors import SourceError
from potamos.data.sources.base import BLOCK_BYTES, START_BYTES

MAX_WINDOW = 2**31  # what `zstd --long=31` writes, the most that the library takes
# A zstd block holds at most 128 KiB of content (RFC 8878, section 3.1.1.2.4), however few bytes it takes.
ZSTD_BLOCKS = 8
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_HEADER = 18  # the longest frame header


class LongLine(NamedTuple):
    """In place of a line above the limit, which was passed over without being held: its first bytes."""

    start: bytes


def unpacked(blocks: Iterator[bytes], place: str) -> Iterator[bytes]:
    """Decompressed blocks of a file named ``.gz``, ``.tgz`` or ``.zst``; the blocks as they are for any other name.

    Args:
        blocks: the raw bytes in order, in blocks of any size.
        place: the file's path, for its ending and for messages.

    Raises:
        SourceError: damaged, cut short, followed by other bytes, or compressed in a way that cannot be read.
    """
    if place.endswith((".gz", ".tgz")):
        return _gunzip(blocks, place)
    if place.endswith(".zst"):
        return _unzstd(blocks, place)
    return blocks


def lines(blocks: Iterator[bytes], limit: int) -> Iterator[bytes | LongLine]:
    """The lines of a byte stream without their line feeds, the last one also if none follows it."""
    tail = _Tail(limit)
    for block in blocks:
        first, *rest = block.split(b"\n")
        tail.add(first)
        if not rest:
            continue
        yield tail.end()
        last = rest.pop()
        for line in rest:
            yield line if len(line) <= limit else LongLine(line[:START_BYTES])
        tail.add(last)
    if tail.size:
        yield tail.end()


class _Tail:
    """The line that no block has ended yet; past the limit only its first bytes are kept."""

    def __init__(self, limit: int):
        self._limit = limit
        self._parts: list[bytes] = []
        self.size = 0

    def add(self, part: bytes) -> None:
        self.size += len(part)
        self._parts.append(part)
        if self.size > self._limit:
            self._parts = [b"".join(part[:START_BYTES] for part in self._parts)[:START_BYTES]]

    def end(self) -> bytes | LongLine:
        content = b"".join(self._parts)
        line = content if self.size <= self._limit else LongLine(content)
        self._parts, self.size = [], 0
        return line


def _gunzip(blocks: Iterator[bytes], place: str) -> Iterator[bytes]:
    member, start, read = None, 0, 0
    for data in blocks:
        read += len(data)
        while data:
            if member is None:
                # gzip itself lets zero bytes follow a member, as tapes leave them
                data = data.lstrip(b"\0") if read > len(data) else data
                if not data:
                    break
                member, start = zlib.decompressobj(wbits=31), read - len(data)
            try:
                content = member.decompress(data, BLOCK_BYTES)
            except zlib.error as error:
                raise SourceError(
                    f"{place}: the gzip member that begins at byte {start} is damaged, or no gzip ({error}); fetch the "
                    f"file again"
                ) from None
            if content:
                yield content
            data = member.unused_data if member.eof else member.unconsumed_tail
            member = None if member.eof else member
    if read == 0:
        raise SourceError(_empty(place, "gzip"))
    if member is not None:
        raise SourceError(_cut_short(place, f"gzip member that begins at byte {start}", read))


def _unzstd(blocks: Iterator[bytes], place: str) -> Iterator[bytes]:
    raw = _Raw(blocks)
    while magic := raw.peek(0, 4):
        start = raw.offset
        what = f"zstd frame that begins at byte {start}"
        if magic == _ZSTD_MAGIC:
            yield from _unzstd_frame(raw, place, what)
        elif len(magic) < 4 and (_ZSTD_MAGIC.startswith(magic) or _skippable(magic)):
            raise SourceError(_cut_short(place, what, start + len(magic)))
        elif _skippable(magic):
            size = 8 + int.from_bytes(raw.peek(4, 4), "little")
            while raw.offset < start + size:
                if not raw.take(min(BLOCK_BYTES, start + size - raw.offset)):
                    raise SourceError(_cut_short(place, what, raw.offset))
        else:
            raise SourceError(f"{place}: the bytes from {start} on are no zstd frame; fetch the file again")
    if raw.offset == 0:
        raise SourceError(_empty(place, "zstd"))


def _skippable(magic: bytes) -> bool:
    """Whether these first bytes, four or fewer, begin a frame of other people's data."""
    return 0x50 <= magic[0] <= 0x5F and b"\x2a\x4d\x18".startswith(magic[1:])


def _unzstd_frame(raw: _Raw, place: str, what: str) -> Iterator[bytes]:
    """Decompress one frame, a few of its blocks at a time.

    The blocks are walked here (each says its size and whether it is the last) for two reasons: the library's readers
    end a frame that was cut short without a word, and a call is bounded in what it returns only by what it is given.
    """
    import zstandard

    head = raw.peek(0, _ZSTD_HEADER)
    if len(head) < 5 or len(head) < zstandard.frame_header_size(head):
        raise SourceError(_cut_short(place, what, raw.offset + len(head)))
    size = zstandard.frame_header_size(head)
    remedy = "fetch the file again, or compress it with zstd --long=31 or less"
    try:
        parameters = zstandard.get_frame_parameters(head)
    except zstandard.ZstdError as error:
        raise SourceError(f"{place}: the header of the {what} cannot be read ({error}); {remedy}") from None
    if parameters.window_size > MAX_WINDOW:
        window = f"a window of {parameters.window_size} bytes, more than {MAX_WINDOW}"
        raise SourceError(f"{place}: the {what} needs {window}; {remedy}")
    if parameters.dict_id:
        raise SourceError(
            f"{place}: the {what} was compressed with dictionary {parameters.dict_id}; compress the file again without"
        )
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj(write_size=BLOCK_BYTES)
    last = count = 0
    while not last:
        header = int.from_bytes(raw.peek(size, 3), "little")
        last = header & 1
        run_length = header >> 1 & 3 == 1
        size += 3 + (1 if run_length else header >> 3) + 4 * (last and parameters.has_checksum)
        count += 1
        if not last and count < ZSTD_BLOCKS:
            continue
        piece = raw.take(size)
        if len(piece) < size:
            raise SourceError(_cut_short(place, what, raw.offset))
        try:
            content = decompressor.decompress(piece)
        except zstandard.ZstdError as error:
            raise SourceError(
                f"{place}: the {what} is damaged before byte {raw.offset} ({error}); fetch the file again"
            ) from None
        if decompressor.eof != bool(last) or decompressor.unused_data:
            raise SourceError(f"{place}: the {what} is damaged before byte {raw.offset}; fetch the file again")
        if content:
            yield content
        size = count = 0


class _Raw:
    """A byte stream that can be looked into ahead of its place."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks = blocks
        self._data, self._at = b"", 0
        self.offset = 0  # bytes taken so far

    def peek(self, begin: int, size: int) -> bytes:
        """Bytes ``begin`` to ``begin + size`` from here, fewer at the end of the file."""
        if len(self._data) - self._at < begin + size:
            parts = [self._data[self._at :]]
            held = len(parts[0])
            while held < begin + size and (block := next(self._blocks, None)) is not None:
                parts.append(block)
                held += len(block)
            self._data, self._at = b"".join(parts), 0
        return self._data[self._at + begin : self._at + begin + size]

    def take(self, size: int) -> bytes:
        data = self.peek(0, size)
        self._at += len(data)
        self.offset += len(data)
        return data


def _cut_short(place: str, what: str, end: int) -> str:
    return f"{place}: cut short: the file ends at byte {end}, inside the {what}; fetch it again"


def _empty(place: str, kind: str) -> str:
    return f"{place}: is empty, though {kind} files of no text are not; fetch it again, or leave it out"
