"""Tars of any writer: every header checked, nothing stopped at silently, members grouped into WebDataset samples.

Stock readers end without a word at a damaged header or a missing end-of-archive mark, and never notice a key that comes
again later in the tar. Here each of these is an error. Understood are USTAR, PAX (long names, float times), GNU long
names and base-256 sizes, and tars without a magic string from before POSIX.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from potamos.data.errors import CorruptShardError, DatasetError

BLOCK = 512
_AGAIN = "fetch or write the tar again"
_PLAIN = b"0\0" + b"7"  # regular, regular before POSIX, contiguous
_IGNORED = {b"5": "directory"}
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}
# WebDataset's rule: the key is the path up to the first dot of the file name, the field all that follows.
_KEY_AND_FIELD = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__(/|$)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Member(NamedTuple):
    """One plain file of a tar: its payload is ``content[offset : offset + size]``."""

    name: str
    offset: int
    size: int


def map_tar(path: Path) -> mmap.mmap:
    """A tar's bytes.

    Raises:
        CorruptShardError: missing, empty or unreadable.
        DatasetError: compressed, so that nothing in it can be found without reading all before it.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CorruptShardError(f"{path} is empty; {_AGAIN}")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CorruptShardError(f"{path} cannot be read: {error.strerror}") from None
    kind = _COMPRESSED.get(content[:2])
    if kind is not None and content[257:262] != b"ustar":
        raise DatasetError(f"{path} is compressed ({kind}), so it cannot be read at random; unpack it to a plain .tar")
    return content


def scan(content: mmap.mmap | bytes, place: str) -> Iterator[Member]:
    """The plain files of a tar in order; directories are passed over.

    Raises:
        CorruptShardError: a bad checksum, a payload or the end-of-archive mark cut off, bytes after that mark, members
            that are no plain files.
    """
    size = len(content)
    offset = 0
    long_name: bytes | None = None
    pax: dict[str, bytes] = {}
    while True:
        header = content[offset : offset + BLOCK]
        if len(header) < BLOCK:
            raise CorruptShardError(f"{place} is truncated: {size} bytes and no end-of-archive mark; {_AGAIN}")
        if header.count(0) == BLOCK:
            return _check_end(content, offset, place)
        here = f"{place}, byte {offset}"
        kind, length = _check_header(header, here)
        name = _name_of(header, long_name, pax)
        length = _pax_size(pax, length, here)
        payload = offset + BLOCK
        offset = payload + length + -length % BLOCK
        if payload + length > size:
            what = f"member {name} ends at byte {payload + length} of {size}"
            raise CorruptShardError(f"{place} is truncated: {what}; {_AGAIN}")
        if kind in b"xL":
            record = content[payload : payload + length]
            if kind == b"x":
                pax = _parse_pax(record, here)
            else:
                long_name = record.rstrip(b"\0")
            continue
        if kind in b"gK":  # global PAX records hold nothing about one member; long link names only matter to links
            continue
        long_name, pax = None, {}
        if kind in _PLAIN and not name.endswith("/"):  # before POSIX a directory was a file whose name ends in a slash
            yield Member(name, payload, length)
        elif kind not in _IGNORED and kind not in _PLAIN:
            what = _REFUSED.get(kind, f"of the unknown type {kind!r}")
            raise CorruptShardError(f"{here}: member {name} is {what}, not a plain file; write the tar without it")


def samples(content: mmap.mmap | bytes, place: str) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples of a WebDataset tar: members that follow each other with equal keys, by field.

    The rules are WebDataset's: names without an extension and names like ``__meta__`` are no samples, fields are in
    lower case.

    Raises:
        CorruptShardError: what `scan` raises, a field twice in one sample, or a key that comes again later.
    """
    seen: set[str] = set()
    key: str | None = None
    fields: dict[str, Member] = {}
    for member in scan(content, place):
        parts = _KEY_AND_FIELD.fullmatch(member.name)
        if parts is None or _META.match(member.name):
            continue
        if parts[1] != key:
            if key is not None:
                yield key, fields
            key, fields = str(parts[1]), {}
            if key in seen:
                raise CorruptShardError(
                    f"{place}, byte {member.offset - BLOCK}: key {key!r} comes again after other samples; stock "
                    f"readers would give it twice; write the tar with distinct keys"
                )
            seen.add(key)
        field = parts[2].lower()
        if field in fields:
            raise CorruptShardError(
                f"{place}, byte {member.offset - BLOCK}: key {key!r} has field {field!r} twice; write the tar with "
                f"distinct keys"
            )
        fields[field] = member
    if key is not None:
        yield key, fields


def _check_end(content: mmap.mmap | bytes, offset: int, place: str) -> None:
    """Two blocks of zeros end an archive; only zeros, which fill the last record, may follow."""
    if content[offset + BLOCK : offset + 2 * BLOCK] != bytes(BLOCK):
        raise CorruptShardError(f"{place} is truncated inside its end-of-archive mark, byte {offset}; {_AGAIN}")
    for start in range(offset, len(content), 1 << 20):
        rest = content[start : start + (1 << 20)]
        if rest.count(0) != len(rest):
            raise CorruptShardError(
                f"{place} goes on after its end-of-archive mark at byte {offset}: are these several tars joined? Stock "
                f"readers stop there; join them with `tar --concatenate`"
            )


def _check_header(header: bytes, place: str) -> tuple[bytes, int]:
    """Type and payload size of a header whose checksum holds."""
    try:
        stored = int(header[148:156].strip(b" \0"), 8)
        length = _number(header[124:136])
    except ValueError:
        raise CorruptShardError(f"{place}: no tar header; {_AGAIN}") from None
    if stored != sum(header) - sum(header[148:156]) + 8 * 32 or length < 0:
        raise CorruptShardError(f"{place}: the tar header's checksum does not hold; {_AGAIN}")
    if header[257:262] not in (b"ustar", bytes(5)):
        raise CorruptShardError(f"{place}: no tar header ({header[257:262]!r} in place of 'ustar'); {_AGAIN}")
    return header[156:157], length


def _number(field: bytes) -> int:
    """Octal digits, or for sizes from 8 GiB on GNU's big-endian number after a set top bit."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits, 8) if digits else 0


def _name_of(header: bytes, long_name: bytes | None, pax: dict[str, bytes]) -> str:
    name = pax.get("path", long_name)
    if name is None:
        name = header[:100].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0" and header[345]:  # GNU keeps other things in the prefix
            name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "backslashreplace")


def _pax_size(pax: dict[str, bytes], length: int, place: str) -> int:
    if any(key.startswith("GNU.sparse") for key in pax):
        raise CorruptShardError(f"{place}: a member is a sparse file, not a plain file; write the tar without it")
    if "size" not in pax:
        return length
    if not pax["size"].isdigit():
        raise CorruptShardError(f"{place}: PAX size {pax['size']!r} is no number; {_AGAIN}")
    return int(pax["size"])


def _parse_pax(record: bytes, place: str) -> dict[str, bytes]:
    """Records of the form "<length> <key>=<value>\\n", the length counting itself."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(record) and record[at]:
        digits = record[at : at + 20].split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() else 0
        line = record[at : at + length]
        key, equals, value = line[len(digits) + 1 : -1].partition(b"=")
        if len(line) < length or not line.endswith(b"\n") or not equals:
            raise CorruptShardError(f"{place}: a damaged PAX header; {_AGAIN}")
        found[key.decode("utf-8", "backslashreplace")] = value
        at += length
    return found
