"""Datasets made from nothing, to measure readers on: random tokens, and thousands of shards that take no space."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from potamos.data.manifest import MANIFEST, make_manifest, totals
from potamos.data.shards import CHUNK, CHUNK_TOKENS, CRC_BLOCK, ShardIndex, ShardWriter, index_path, shard_entry
from potamos.files import write_atomically

VOCABULARY = 50_257  # GPT-2's, so that ids fill most of 16 bits
MEAN_DOCUMENT = 900  # tokens, near the Pile's mean of 5.91 KiB at 5 bytes a token and C4's shorter ones
_SEED = 20240229


def write_random(folder: Path, tokens: int, *, chunk_tokens: int = CHUNK_TOKENS, shards: int = 4) -> Path:
    """A dataset of ``tokens`` random ids in documents of `MEAN_DOCUMENT` tokens on average, in about ``shards`` shards.

    The bytes are a function of the arguments.
    """
    rng = np.random.default_rng(_SEED)
    dtype = np.dtype("<u2")
    folder.mkdir(parents=True)
    chunks = -(-tokens // chunk_tokens)
    shard_chunks = max(1, -(-chunks // shards))
    writer = ShardWriter(folder, dtype, chunk_tokens=chunk_tokens, shard_chunks=shard_chunks, source="random")
    while writer.tokens < tokens:
        length = min(1 + int(rng.exponential(MEAN_DOCUMENT)), tokens - writer.tokens - 1)
        ids = rng.integers(0, VOCABULARY - 1, max(0, length), dtype=dtype)
        writer.add(np.append(ids, dtype.type(VOCABULARY - 1)))
    writer.finish()
    counts = {"documents": writer.documents, "tokens": writer.tokens, "max_token": writer.max_token}
    return _describe(folder, writer.shards, counts, chunk_tokens, shard_chunks)


def write_sparse(folder: Path, shards: int, *, chunk_tokens: int = CHUNK_TOKENS, shard_chunks: int = 512) -> Path:
    """A dataset of ``shards`` shards whose tars are holes: every token is 0, and the disk holds next to nothing.

    Readers find everything where an index says, so they read it as any other; a scan of the tars would find no header.
    All shards share one index, of one endless document.
    """
    folder.mkdir(parents=True)
    stored = 2 * (chunk_tokens + 1)
    member = 1024 + stored + -stored % 512  # tar header, .npy header, padded tokens
    blocks = -(-stored // CRC_BLOCK)
    records = np.zeros(shard_chunks, CHUNK)
    numbers = np.arange(shard_chunks)
    records["token_offset"] = records["end_offset"] = 1024 + numbers * member
    records["tokens"] = chunk_tokens + 1
    records["first_position"] = numbers * chunk_tokens
    records["first_block"] = numbers * blocks
    sizes = np.full(blocks, CRC_BLOCK)
    sizes[-1] = stored - (blocks - 1) * CRC_BLOCK
    crcs = np.tile(np.array([zlib.crc32(bytes(size)) for size in sizes.tolist()], "<u4"), shard_chunks)
    size = 1024 + shard_chunks * member
    index = ShardIndex(size, hashlib.sha256(b"holes").hexdigest(), np.dtype("<u2"), records, crcs)
    content = index.to_bytes()
    entries = []
    for number in range(shards):
        shard = folder / f"shard-00000-{number:05d}.tar"
        with open(shard, "wb") as file:
            file.truncate(size)
        if number == 0:
            index_path(shard).write_bytes(content)
        else:
            index_path(shard).hardlink_to(index_path(folder / entries[0]["name"]))
        entries.append(shard_entry(shard.name, index, content))
    tokens = shards * shard_chunks * chunk_tokens + 1
    return _describe(folder, entries, {"documents": 1, "tokens": tokens, "max_token": 0}, chunk_tokens, shard_chunks)


def _describe(
    folder: Path, shards: list[dict[str, Any]], counts: dict[str, int], chunk_tokens: int, shard_chunks: int
) -> Path:
    """Write dataset.json for one part."""
    nothing = dict.fromkeys(("text_bytes", "blank", "rejected", "mended", "duplicates"), 0)
    part = {"name": "random", "files": [], "shards": shards, **counts, **nothing}
    tokenizer = {"kind": "none", "sha256": "0" * 64, "vocabulary": VOCABULARY, "end_of_document": VOCABULARY - 1}
    fields = {
        "layout": "chunks", "source": {"kind": "random", "seed": _SEED}, "split": "all", "tokenizer": tokenizer,
        "dtype": "<u2", "chunk_tokens": chunk_tokens, "shard_chunks": shard_chunks, "deduplicated": False,
        "parts": [part], **totals([part]),
    }  # fmt: skip
    write_atomically(folder / MANIFEST, make_manifest(fields).to_bytes())
    return folder
