"""Baselines against their definitions in plain Python."""

from __future__ import annotations

import itertools
import json
import lzma
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from potamos.data.baselines import _Bigram, bits_per_byte, scored_pairs, table_baselines, xz_bits_per_byte
from potamos.data.errors import TokenizerMismatchError
from potamos.data.loader import Windows
from potamos.data.prepare import prepare
from potamos.data.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def pair(texts: list[str], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("baselines")
    paths = []
    for name, part in (("train", texts[:45]), ("held", texts[45:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        prepare(folder / f"{name}.jsonl", "all", tokenizer, folder / name, chunk_tokens=777)
        paths.append(folder / name)
    return paths[0], paths[1]


def plain_pairs(texts: list[str], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    documents = [[*tokenizer.encode(text).tolist(), tokenizer.end_of_document] for text in texts]
    return [p for ids in documents for p in itertools.pairwise(ids)]


def test_scored_pairs_are_those_of_the_windows(pair: tuple[Path, Path], texts: list[str], tokenizer: Tokenizer) -> None:
    v, w = scored_pairs(pair[0], tokenizer)
    assert list(zip(v.tolist(), w.tolist(), strict=True)) == plain_pairs(texts[:45], tokenizer)
    windows = Windows(pair[0], sequence_length=31)
    rows = windows.read(0, len(windows))
    scored = (rows.document_ids[:, 1:] == rows.document_ids[:, :-1]) & (rows.document_ids[:, 1:] >= 0)
    assert np.array_equal(rows.tokens[:, 1:][scored], w)
    assert len(scored_pairs(pair[0], tokenizer, 1000)[0]) <= 1000


def test_tables_equal_their_definition(pair: tuple[Path, Path], texts: list[str], tokenizer: Tokenizer) -> None:
    """Counts, leave-one-out expectation maximisation and score, all with dictionaries."""
    train, held = plain_pairs(texts[:45], tokenizer), plain_pairs(texts[45:], tokenizer)
    pairs, contexts, words = Counter(train), Counter(v for v, _ in train), Counter(w for _, w in train)
    size, total = tokenizer.vocabulary, len(train)
    bucket = {v: contexts[v].bit_length() for v in range(size)}
    weight = {b: 0.5 for b in set(bucket.values()) if b}
    weight[0] = 0.0
    for _ in range(50):
        gain: Counter[int] = Counter()
        mass: Counter[int] = Counter()
        for (v, w), count in pairs.items():
            near = weight[bucket[v]] * (count - 1) / max(contexts[v] - 1, 1)
            far = (1 - weight[bucket[v]]) * words[w] / (total - 1 + size)
            gain[bucket[v]] += count * near / (near + far)  # type: ignore[assignment]
            mass[bucket[v]] += count
        weight = {b: gain[b] / mass[b] if mass[b] else 0.0 for b in weight}

    def unigram(w: int) -> float:
        return (words[w] + 1) / (total + size)

    def bigram(v: int, w: int) -> float:
        share = weight[bucket[v]]
        return share * pairs[v, w] / max(contexts[v], 1) + (1 - share) * unigram(w)

    text_bytes = sum(int(tokenizer.token_bytes()[w]) for _, w in held)
    result = table_baselines(*pair, tokenizer)
    assert (result.targets, result.text_bytes) == (len(held), text_bytes)
    assert result.unigram == pytest.approx(-sum(math.log2(unigram(w)) for _, w in held) / text_bytes, rel=1e-9)
    assert result.bigram == pytest.approx(-sum(math.log2(bigram(v, w)) for v, w in held) / text_bytes, rel=1e-9)
    assert result.bigram < result.unigram


def test_tables_are_distributions() -> None:
    rng = np.random.default_rng(0)
    v, w = rng.integers(0, 20, 500), rng.integers(0, 20, 500) ** 2 // 20
    table = _Bigram(v, w, 23)  # 20, 21 and 22 never occur
    assert table.unigram.sum() == pytest.approx(1)
    for context in range(23):
        probability = table.probability(np.full(23, context), np.arange(23))
        assert probability.sum() == pytest.approx(1)
        assert (probability > 0).all()


def test_another_tokenizer_is_refused(pair: tuple[Path, Path], texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(TokenizerMismatchError):
        table_baselines(*pair, train_bpe(texts, 333, tmp_path / "t.json"))


def test_xz_and_units() -> None:
    texts = ["the river " * 40, "runs " * 30]
    content = "\n".join(texts).encode()
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    assert xz_bits_per_byte(texts) == 8 * len(packed) / len(content)
    assert bits_per_byte(math.log(2) * 24, 3) == pytest.approx(8)
    with pytest.raises(ValueError, match="no text"):
        xz_bits_per_byte([])
