"""Tars that other tools wrote, indexed where they lie: then checked and read like prepared shards.

`index_tars` leaves the tars as they are and writes a ``.idx`` for each and one ``dataset.json``, beside them or into
another folder that links to them. Layout "members" holds token ids and is trained on as it is; layout "text" proves the
bytes of text that `prepare` then reads.
"""

from __future__ import annotations

import glob
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potamos.data.archive import map_tar, samples
from potamos.data.errors import CorruptShardError, DatasetError
from potamos.data.manifest import MANIFEST, Manifest, check_sizes, make_manifest, read_manifest, totals
from potamos.data.members import (
    CRC_BLOCK,
    DOCUMENTS,
    MAGIC,
    Facts,
    MemberIndex,
    MemberShard,
    TokenRules,
    build_text_index,
    build_token_index,
    holds_ids,
    open_member_index,
)
from potamos.data.shards import index_path, token_dtype
from potamos.files import flush, write_atomically

if TYPE_CHECKING:
    from potamos.data.tokenizer import Tokenizer

__all__ = ["MemberIndex", "MemberShard", "TokenizerFacts", "choose_field", "find_tars", "index_tars", "verify_shard"]

TEXT_FIELDS = ("txt", "text", "json", "jsonl")  # by their last extension, in order of preference
_OWN = {"tok.npy", "doc.npy", "json"}


@dataclass(frozen=True)
class TokenizerFacts:
    """What has to be known of the tokenizer behind ids, where the tokenizer itself is not at hand."""

    sha256: str
    vocabulary: int
    end_of_document: int
    kind: str = "foreign"


def index_tars(
    tars: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Tokenizer | TokenizerFacts | None = None,
    field: str | None = None,
    documents: str = "members",
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Make a dataset of foreign WebDataset tars without copying them.

    Args:
        tars: a folder (its ``*.tar``), a file, a glob, WebDataset's brace notation (``{000..123}.tar``), or a list of
            these. A shard is a tar, in this order.
        out: folder for indexes and dataset.json; by default the tars' own. Another one gets links to the tars.
        tokenizer: what the ids came from. With a `Tokenizer` the text behind the ids is also counted, in bytes.
            Tars of text need none.
        field: the samples' field with ids (one-dimensional .npy of whole numbers) or text (.txt, .json, .jsonl); by
            default the only field with ids of the first sample, else its field with text.
        documents: ``members``: each member is a document, or several, and is closed by an end-of-document id even
            where it does not hold one. ``rows``: members are pieces of a stream, which only its own ids divide.
        force: replace another index that lies there.
        progress: called with the number of tars done and of all.

    Raises:
        CorruptShardError: a tar is damaged or cut short, or repeats a key.
        DatasetError: no tars, no such field, ids that are none of the vocabulary, files of others in the way.
    """
    if documents not in DOCUMENTS:
        raise DatasetError(f"documents {documents!r} is unknown; known: {', '.join(DOCUMENTS)}")
    paths = find_tars(tars)
    folder = Path(out) if out is not None else _common_folder(paths)
    chosen, ids = choose_field(paths[0], field)
    rules = _rules(paths[0], chosen, tokenizer, documents) if ids else None
    facts = _settings(paths, chosen, tokenizer, documents if ids else None)
    known = _known(folder, facts, paths, force)
    if known is not None:
        return known
    _prepare_folder(folder, paths, force)
    counted = getattr(tokenizer, "token_bytes", None) if ids else None
    token_bytes = counted() if counted is not None else None
    parts: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        built = build_token_index(path, chosen, rules, token_bytes) if rules else build_text_index(path, chosen)
        parts.append(_write_index(folder / path.name, *built))
        if progress is not None:
            progress(number + 1, len(paths))
    if rules is not None:
        facts |= {"chunk_tokens": max(part["tokens"] for part in parts), **totals(parts)}
    manifest = make_manifest({**facts, "parts": parts})
    write_atomically(folder / MANIFEST, manifest.to_bytes())
    return manifest


def find_tars(tars: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The local tars that a folder, file, glob, brace notation or a list of these stands for.

    Raises:
        DatasetError: nothing found, a URL, or two tars of one name.
    """
    if not isinstance(tars, str | os.PathLike):
        paths = [path for one in tars for path in find_tars(one)]
    else:
        name = os.fspath(tars)
        if "://" in name or name.startswith("pipe:"):
            raise DatasetError(f"{name}: tars are indexed where they lie; fetch them first, or index them there")
        path = Path(name)
        if path.is_dir():
            paths = sorted(path.glob("*.tar"))
        elif path.is_file():
            paths = [path]
        else:
            paths = _expand(name)
        if not paths:
            raise DatasetError(
                f"{name}: no tar there; give a folder with .tar files, a file, a glob or {{000..123}}.tar"
            )
    names: dict[str, Path] = {}
    for path in paths:
        if names.setdefault(path.name, path) is not path:
            raise DatasetError(f"{names[path.name]} and {path} have one name; index their folders apart")
    return paths


def verify_shard(shard: Path, entry: dict[str, Any], end_of_document: int | None, *, deep: bool) -> None:
    """Compare a foreign tar's size, and with ``deep`` every byte of it, with what was indexed; text has no end id.

    Raises:
        CorruptShardError: naming the first damaged block, or the file that is missing, cut short or stale.
    """
    index = open_member_index(shard, entry, end_of_document)
    if not deep:
        return
    content = map_tar(shard)
    digest = hashlib.sha256()
    with memoryview(content) as view:
        for block, crc in enumerate(index.crcs.tolist()):
            start = block * CRC_BLOCK
            piece = view[start : start + CRC_BLOCK]
            digest.update(piece)
            if zlib.crc32(piece) != crc:
                raise CorruptShardError(
                    f"shard {shard}, bytes {start} to {start + len(piece)}: crc32 does not match the index: the data "
                    f"changed on disk; fetch the tar again, or index it again if it is meant to be so"
                )
    if digest.hexdigest() != entry["sha256"]:
        raise CorruptShardError(f"shard {shard}: its sha256 is not the one that {MANIFEST} lists; fetch the tar again")


def _expand(name: str) -> list[Path]:
    if "{" not in name:
        return sorted(path for path in map(Path, glob.glob(name, recursive=True)) if path.is_file())
    import braceexpand  # what WebDataset expands its URLs with

    try:
        expanded = [Path(one) for one in braceexpand.braceexpand(name)]
    except ValueError as error:
        raise DatasetError(f"{name}: {error}; write {{000..123}}") from None
    missing = [path for path in expanded if not path.is_file()]
    if missing:
        raise DatasetError(f"{name}: {len(missing)} of {len(expanded)} tars are missing, the first is {missing[0]}")
    return expanded


def _common_folder(paths: Sequence[Path]) -> Path:
    folders = sorted({path.parent for path in paths})
    if len(folders) > 1:
        raise DatasetError(f"tars of {len(folders)} folders ({folders[0]}, {folders[1]}): name a folder with --out")
    return folders[0]


def choose_field(tar: Path, wanted: str | None = None, *, text_only: bool = False) -> tuple[str, bool]:
    """The field to read and whether it holds ids, from the first sample of a tar.

    Raises:
        CorruptShardError: the tar is damaged.
        DatasetError: no such field, none that holds ids or text, or several that hold ids.
    """
    content = map_tar(tar)
    first = next(samples(content, str(tar)), None)
    if first is None:
        raise DatasetError(f"{tar} holds no sample: no file with an extension; leave it out")
    key, fields = first
    if fields.keys() == _OWN:
        raise DatasetError(f"{tar} is a shard of a prepared dataset, which has an index; use it as it is")
    if wanted is not None:
        wanted = wanted.lower().removeprefix(".")
        if wanted not in fields:
            raise DatasetError(f"{tar}: sample {key!r} has no field {wanted!r} but {', '.join(sorted(fields))}")
        if not _is_text(wanted):
            holds_ids(content, fields[wanted], f"{tar}: {key}.{wanted}", explain=True)
        return wanted, not _is_text(wanted)
    arrays = () if text_only else sorted(field for field in fields if field.endswith("npy"))
    ids = [field for field in arrays if holds_ids(content, fields[field], f"{tar}: {key}.{field}")]
    text = sorted((f for f in fields if _is_text(f)), key=lambda f: TEXT_FIELDS.index(f.rpartition(".")[2]))
    if len(ids) > 1:
        raise DatasetError(f"{tar}: fields {', '.join(ids)} all hold ids; choose one with --field")
    if not ids and not text:
        raise DatasetError(f"{tar}: sample {key!r} has neither ids nor text in its fields {', '.join(sorted(fields))}")
    return (ids or text)[0], bool(ids)


def _is_text(field: str) -> bool:
    return field.rpartition(".")[2] in TEXT_FIELDS


def _rules(tar: Path, field: str, tokenizer: Tokenizer | TokenizerFacts | None, documents: str) -> TokenRules:
    if tokenizer is None:
        raise DatasetError(f"{tar} holds token ids ({field}): name the tokenizer that they came from with --tokenizer")
    if not 0 <= tokenizer.end_of_document < tokenizer.vocabulary:
        raise DatasetError(
            f"end of document {tokenizer.end_of_document} is outside the vocabulary 0..{tokenizer.vocabulary - 1}"
        )
    return TokenRules(tokenizer.vocabulary, tokenizer.end_of_document, documents)


def _settings(
    paths: Sequence[Path], field: str, tokenizer: Tokenizer | TokenizerFacts | None, documents: str | None
) -> dict[str, Any]:
    """What dataset.json says whatever the tars hold."""
    source = {"kind": "webdataset", "name": paths[0].parent.resolve().name, "field": field}
    if documents is None:
        return {"layout": "text", "source": source}
    assert tokenizer is not None
    return {
        "layout": "members",
        "source": source | {"documents": documents},
        "split": "all",
        "tokenizer": {
            "kind": tokenizer.kind,
            "sha256": tokenizer.sha256,
            "vocabulary": tokenizer.vocabulary,
            "end_of_document": tokenizer.end_of_document,
        },
        "dtype": token_dtype(tokenizer.vocabulary).str,
        "shard_chunks": 1,
        "deduplicated": False,
    }


def _known(folder: Path, settings: dict[str, Any], paths: Sequence[Path], force: bool) -> Manifest | None:
    """The manifest that lies in the folder if it says the same of the same tars."""
    if not (folder / MANIFEST).exists() or force:
        return None
    manifest = read_manifest(folder)
    if manifest.layout == "chunks":
        raise DatasetError(f"{folder} holds a prepared dataset; index into another folder with --out")
    same = all(manifest.fields.get(key) == value for key, value in settings.items())
    if not same or [shard["name"] for shard in manifest.shards] != [path.name for path in paths]:
        raise DatasetError(f"{folder} holds another index; replace it with --force, or name another with --out")
    end_of_document = settings["tokenizer"]["end_of_document"] if "tokenizer" in settings else None
    for path, shard in zip(paths, manifest.shards, strict=True):
        here = folder / path.name
        try:
            check_sizes(here, shard)
            newer = os.stat(here).st_mtime_ns >= os.stat(index_path(here)).st_mtime_ns
            verify_shard(here, shard, end_of_document, deep=newer)
        except CorruptShardError as error:
            raise DatasetError(f"{folder} was indexed before, but {error}; index again with --force") from None
    return manifest


def _prepare_folder(folder: Path, paths: Sequence[Path], force: bool) -> None:
    """Make room for the indexes, and links where the tars lie elsewhere; nothing of another tool is overwritten."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            if force and _layout(folder) == "chunks":
                raise DatasetError(f"{folder} holds a prepared dataset; index into another folder with --out")
            (folder / MANIFEST).unlink()  # while indexes are replaced there is no dataset
        for path in paths:
            here = folder / path.name
            if not (here.exists() and here.samefile(path)):
                _link(here, path)
            index = index_path(here)
            if index.exists() and not index.read_bytes().startswith(MAGIC):
                raise DatasetError(f"{index} belongs to another tool; index into another folder with --out")
        flush(folder)
    except OSError as error:
        raise DatasetError(f"{folder} cannot be written: {error.strerror}; name another folder with --out") from None


def _layout(folder: Path) -> str | None:
    try:
        return read_manifest(folder).layout
    except DatasetError:
        return None


def _link(here: Path, path: Path) -> None:
    """A relative link, so that a tree that holds both can be moved."""
    if os.path.lexists(here) and not here.is_symlink():
        raise DatasetError(f"{here} is another file than {path}; index into an empty folder with --out")
    temporary = here.with_name(f".{here.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(path.resolve(), here.parent.resolve()))
    os.replace(temporary, here)


def _write_index(shard: Path, index: MemberIndex, facts: Facts) -> dict[str, Any]:
    """Write the index of a tar; returns its part of dataset.json."""
    if not len(index.members):
        raise DatasetError(f"{shard} holds nothing to read; leave it out")
    content = index.to_bytes()
    write_atomically(index_path(shard), content)
    file = {"name": shard.name, "bytes": index.tar_bytes, "sha256": index.tar_sha256}
    entry = {**file, "index_bytes": len(content), "index_sha256": hashlib.sha256(content).hexdigest()}
    if index.end_of_document < 0:
        return {"name": shard.name, "files": [file], "shards": [entry]}
    return {
        "name": shard.name,
        "files": [file],
        "shards": [{**entry, "chunks": 1, "tokens": index.tokens}],
        "tokens": index.tokens,
        "documents": index.documents,
        "text_bytes": facts.text_bytes,
        "max_token": facts.max_token,
        "blank": facts.blank,
        "rejected": 0,
        "mended": 0,
        "duplicates": 0,
    }
