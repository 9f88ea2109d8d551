"""Prepared shards in plain WebDataset pipelines: the code that data/README.md shows, run as it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.dataset import TokenDataset, read_rows

wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
LENGTHS = [90, 700, 33, 1500, 8, 1100, 256, 900, 40, 2500]
CHUNK, LENGTH = 512, 64
README = Path(__file__).parents[2] / "data" / "README.md"


@pytest.fixture(scope="module")
def dataset(write_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ids(tmp_path_factory.mktemp("stock") / "d", LENGTHS, chunk_tokens=CHUNK, parts=2)


@pytest.fixture(scope="module")
def example() -> str:
    """The section's code block."""
    section = README.read_text(encoding="utf-8").partition("## Stock WebDataset")[2]
    (code,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    return code


def ours(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and document ids of all rows, in order."""
    dataset = TokenDataset(path)
    cut = dataset.cut(LENGTH)
    chunk, start = cut.place(np.arange(cut.total))
    return read_rows([dataset], np.zeros(cut.total, np.int64), chunk, start, LENGTH + 1)[:2]


def test_the_documented_pipeline_gives_our_rows(dataset: Path, example: str) -> None:
    rows = run(example, dataset)
    tokens, ids = ours(dataset)
    streamed = list(rows(shuffle=False))
    np.testing.assert_array_equal(np.stack([row["tokens"] for row in streamed]), tokens)
    # Within a row the numbers of documents rise by one at the same places, wherever they begin.
    stock = np.stack([row["document"] for row in streamed])
    np.testing.assert_array_equal(stock - stock[:, :1], ids - ids[:, :1])
    assert len(streamed) == len(tokens) > 50


def test_the_documented_pipeline_shuffles_all_rows(dataset: Path, example: str) -> None:
    rows = run(example, dataset)
    tokens, _ = ours(dataset)
    shuffled = [tuple(row["tokens"].tolist()) for row in rows(shuffle=True)]
    assert shuffled != list(map(tuple, tokens.tolist()))
    assert sorted(shuffled) == sorted(map(tuple, tokens.tolist()))


def test_batches_for_torch(dataset: Path, example: str) -> None:
    rows = run(example, dataset)
    tokens, _ = ours(dataset)
    batches = list(rows(shuffle=False).batched(4))
    np.testing.assert_array_equal(np.concatenate([batch["tokens"] for batch in batches]), tokens)


def run(example: str, dataset: Path) -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(compile(example.replace("data/sotu", str(dataset)).replace("2048", str(LENGTH)), str(README), "exec"), names)
    return names["rows"]


def test_members_are_what_the_format_says(dataset: Path, plain_stream: Callable[..., Any]) -> None:
    """Tokens, document ends and description of every chunk against the ids that were written."""
    tokens, documents, positions = plain_stream(LENGTHS)
    per_part = [sum(LENGTHS[:5]), sum(LENGTHS[5:])]
    chunks = iter(wds.WebDataset(sorted(str(p) for p in dataset.glob("*.tar")), shardshuffle=False).decode())
    for number, (first, size) in enumerate(zip([0, per_part[0]], per_part, strict=True)):
        for begin in range(first, first + size - 1, CHUNK):
            sample = next(chunks)
            here = slice(begin, min(begin + CHUNK + 1, first + size))
            assert sample["tok.npy"].tolist() == tokens[here]
            assert sample["doc.npy"].tolist() == [i + 1 for i, token in enumerate(tokens[here]) if token == 0]
            about = sample["json"]
            assert about["tokens"] == len(tokens[here])
            assert about["first_document"] == documents[begin] - number * 5  # numbers are those of the part
            assert about["first_position"] == positions[begin]
    assert next(chunks, None) is None


def test_keys_are_distinct_within_a_part(dataset: Path) -> None:
    for part in range(2):
        shards = sorted(str(p) for p in dataset.glob(f"shard-{part:05d}-*.tar"))
        keys = [sample["__key__"] for sample in wds.WebDataset(shards, shardshuffle=False)]
        assert len(set(keys)) == len(keys) > 4
