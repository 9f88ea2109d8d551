"""A small self-written corpus, a tokenizer trained on it, and datasets of plain ids."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from potamos.data.manifest import MANIFEST, make_manifest, read_manifest, totals
from potamos.data.remote import CacheSpec, RemoteShards, Retry
from potamos.data.shards import ShardWriter, token_dtype
from potamos.data.tokenizer import Tokenizer, train_bpe
from potamos.files import write_atomically

VOCABULARY = (
    "the river runs past quiet mills and old stone bridges while rain falls on far hills and the water keeps its "
    "count of days it carries silt seeds leaves small boats and news from town to town until the sea takes all"
)
WORDS = VOCABULARY.split()
ODD = (
    "Naïve café, straße; 東京 — ελληνικά.",
    "She typed <|endoftext|> and [MASK], and nothing happened.",
    "Tabs\tand  double  spaces\n\n\nand lines \r\n end.  ",
    "\U0001f30a waves \U0001f30a and\u00a0fixed\u2003spaces, it's 1,234.50 o'clock",
)


def make_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for number in range(count):
        sentences = [
            " ".join(rng.choices(WORDS, k=rng.randint(3, 14))).capitalize() + "." for _ in range(rng.randint(1, 30))
        ]
        texts.append(" ".join(sentences) + ("\n" + ODD[number % len(ODD)] if number % 3 == 0 else ""))
    return texts


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(7, 60)


@pytest.fixture(scope="session")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(texts, 400, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


END = 0
WriteIds = Callable[..., Path]


@pytest.fixture(scope="session")
def write_ids() -> WriteIds:
    """A dataset of given document lengths with random ids 1..vocabulary-1, closed by id 0, in ``parts`` equal parts."""

    def write(
        folder: Path,
        lengths: Sequence[int],
        *,
        chunk_tokens: int,
        shard_chunks: int = 2,
        vocabulary: int = 300,
        seed: int = 0,
        tokenizer_sha256: str = "t" * 64,
        parts: int = 1,
    ) -> Path:
        folder.mkdir(parents=True)
        rng = np.random.default_rng(seed)
        dtype = token_dtype(vocabulary)
        described = []
        for part in range(parts):
            writer = ShardWriter(
                folder, dtype, chunk_tokens=chunk_tokens, shard_chunks=shard_chunks, source="ids", part=part
            )
            mine = slice(part * len(lengths) // parts, (part + 1) * len(lengths) // parts)
            for length in lengths[mine]:
                writer.add(np.append(rng.integers(1, vocabulary, length - 1), END).astype(np.int32))
            writer.finish()
            counts = {"tokens": writer.tokens, "documents": writer.documents, "max_token": writer.max_token}
            nothing = dict.fromkeys(("text_bytes", "blank", "rejected", "mended", "duplicates"), 0)
            described.append({"name": f"ids-{part}", "files": [], "shards": writer.shards, **counts, **nothing})
        manifest = make_manifest(
            {
                "source": {"kind": "ids", "seed": seed},
                "split": "all",
                "tokenizer": {
                    "kind": "json",
                    "sha256": tokenizer_sha256,
                    "vocabulary": vocabulary,
                    "end_of_document": END,
                },
                "dtype": dtype.str,
                "chunk_tokens": chunk_tokens,
                "shard_chunks": shard_chunks,
                "layout": "chunks",
                "deduplicated": False,
                "parts": described,
                **totals(described),
            }
        )
        write_atomically(folder / MANIFEST, manifest.to_bytes())
        return folder

    return write


@pytest.fixture(scope="session")
def plain_stream() -> Callable[..., tuple[list[int], list[int], list[int]]]:
    """The oracle: tokens, document numbers and true positions of the whole stream, as plain lists."""

    def stream(lengths: Sequence[int], vocabulary: int = 300, seed: int = 0) -> tuple[list[int], list[int], list[int]]:
        rng = np.random.default_rng(seed)
        tokens: list[int] = []
        documents: list[int] = []
        positions: list[int] = []
        for number, length in enumerate(lengths):
            tokens += [*rng.integers(1, vocabulary, length - 1).tolist(), END]
            documents += [number] * length
            positions += range(length)
        return tokens, documents, positions

    return stream


# --- shards behind URLs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def remotes(load_module: Callable[[str, Path], ModuleType]) -> ModuleType:
    """tests/data/remotes.py."""
    return load_module("data_remotes", Path(__file__).with_name("remotes.py"))


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("GOPEN_REWRITE", raising=False)
    monkeypatch.delenv("USE_AIS_FOR", raising=False)


@pytest.fixture(scope="module")
def dataset(write_ids: WriteIds, remotes: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen shards in a folder, which `server` serves."""
    path = write_ids(tmp_path_factory.mktemp("remote") / "d", remotes.LENGTHS, chunk_tokens=remotes.CHUNK)
    assert len(read_manifest(path).shards) == remotes.SHARDS
    return path


@pytest.fixture
def server(dataset: Path, remotes: ModuleType) -> Iterator[Any]:
    """A `remotes.Server` of `dataset`, to be told what to do wrong."""
    server = remotes.Server(dataset)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def open_remote(tmp_path: Path, dataset: Path, remotes: ModuleType) -> Iterator[Callable[..., RemoteShards]]:
    """RemoteShards with a cache that holds ``shards`` shards, closed at the end."""
    opened: list[RemoteShards] = []

    def make(
        url: str, shards: float = remotes.SHARDS, retry: Retry | None = None, patience: float = 20.0
    ) -> RemoteShards:
        limit = int(shards * max(remotes.shard_bytes(dataset)))
        cache = CacheSpec(tmp_path / "cache", limit, retry=retry or remotes.quick())
        opened.append(RemoteShards(url, cache, patience=patience))
        return opened[-1]

    yield make
    for files in opened:
        files.close()
