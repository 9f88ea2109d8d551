"""What a model must beat: bits per byte of a unigram table, an interpolated bigram table, and xz.

The tables score exactly the targets that a model is scored on: every token whose predecessor belongs to the same
document, whatever the window length. The end of a document is a target that stands for 0 bytes of text.
"""

from __future__ import annotations

import lzma
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from potamos.data.dataset import TokenDataset, read_rows
from potamos.data.errors import DatasetError, TokenizerError
from potamos.data.tokenizer import Tokenizer

MAX_TRAINING_TOKENS = 50_000_000
_STEPS = 50


@dataclass(frozen=True)
class TableBaselines:
    """Bits per byte on the held-out targets, and how many targets and bytes of text those are."""

    unigram: float
    bigram: float
    targets: int
    text_bytes: int


def table_baselines(
    training: str | os.PathLike[str],
    held_out: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    max_training_tokens: int = MAX_TRAINING_TOKENS,
) -> TableBaselines:
    """Fit both tables on one dataset and score another.

    The bigram is p(w | v) = l(v) c(v, w) / c(v) + (1 - l(v)) p(w) with p(w) the add-one unigram. l depends on the size
    of c(v) (one value per power of two) and is fitted on the training data alone by deleted interpolation (Jelinek and
    Mercer 1980): each training pair is predicted from counts without itself.

    Raises:
        TokenizerError: the tokenizer's ids do not stand for exact bytes.
        TokenizerMismatchError: a dataset was prepared with another tokenizer.
        DatasetError: a dataset has no target to count.
    """
    if not tokenizer.exact_bytes:
        raise TokenizerError("bits per byte need a byte-level tokenizer; this one's ids do not stand for exact bytes")
    v, w = scored_pairs(training, tokenizer, max_training_tokens)
    held_v, held_w = scored_pairs(held_out, tokenizer)
    if not len(v) or not len(held_v):
        raise DatasetError(
            f"{training if not len(v) else held_out} has no two tokens in one document; nothing to score"
        )
    text_bytes = int(tokenizer.token_bytes()[held_w].sum())
    table = _Bigram(v, w, tokenizer.vocabulary)
    unigram = -float(np.log(table.unigram[held_w]).sum())
    bigram = -float(np.log(table.probability(held_v, held_w)).sum())
    return TableBaselines(
        bits_per_byte(unigram, text_bytes), bits_per_byte(bigram, text_bytes), len(held_w), text_bytes
    )


def scored_pairs(
    path: str | os.PathLike[str], tokenizer: Tokenizer, max_tokens: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(input, target) ids of every scored target of a dataset, or of its first ``max_tokens`` tokens; int64."""
    dataset = TokenDataset(path, tokenizer_sha256=tokenizer.sha256)
    inputs, targets, zero = [], [], np.zeros(1, np.int64)
    left = dataset.manifest.tokens if max_tokens is None else max_tokens
    for chunk in range(dataset.chunks):
        width = min(dataset.chunk_size(chunk), left)
        if width < 2:
            break
        tokens, documents, _ = read_rows([dataset], zero, np.array([chunk]), zero, width)
        same = documents[0, 1:] == documents[0, :-1]
        inputs.append(tokens[0, :-1][same])
        targets.append(tokens[0, 1:][same])
        left -= width - 1
    empty = np.empty(0, np.int32)
    return tuple(np.concatenate(part or [empty]).astype(np.int64) for part in (inputs, targets))  # type: ignore[return-value]


class _Bigram:
    """Counts of pairs, sorted so that a lookup is a binary search."""

    def __init__(self, v: np.ndarray, w: np.ndarray, vocabulary: int):
        self._vocabulary = vocabulary
        self._pairs, self._count = np.unique(v * vocabulary + w, return_counts=True)
        self._contexts = np.bincount(v, minlength=vocabulary)
        words = np.bincount(w, minlength=vocabulary)
        self.unigram = (words + 1) / (len(w) + vocabulary)
        # c(v) = 0 is bucket 0, and 2^k <= c(v) < 2^(k+1) bucket k + 1
        self._bucket = np.frexp(self._contexts.astype(np.float64))[1]
        self._weight = self._fit(words, len(w))

    def _fit(self, words: np.ndarray, total: int) -> np.ndarray:
        """l of each bucket by expectation maximisation over the training pairs, each left out of its own counts."""
        v, w = self._pairs // self._vocabulary, self._pairs % self._vocabulary
        pair = (self._count - 1) / np.maximum(self._contexts[v] - 1, 1)
        word = words[w] / (total - 1 + self._vocabulary)  # add-one, minus the pair itself
        bucket = self._bucket[v]
        size = int(self._bucket.max()) + 1
        mass = np.maximum(np.bincount(bucket, self._count, size), 1e-300)
        weight = np.full(size, 0.5)
        weight[0] = 0.0
        for _ in range(_STEPS):
            share = weight[bucket] * pair
            share /= share + (1 - weight[bucket]) * word
            weight = np.bincount(bucket, self._count * share, size) / mass
        return weight

    def probability(self, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        """p(w | v), shape of v, float64, above 0 always."""
        wanted = v * self._vocabulary + w
        at = np.minimum(np.searchsorted(self._pairs, wanted), len(self._pairs) - 1)
        count = np.where(self._pairs[at] == wanted, self._count[at], 0)
        # a context never seen has l = 0; one seen once leaves nothing to fit l with, so EM gave it 0 as well
        weight = self._weight[self._bucket[v]]
        return weight * count / np.maximum(self._contexts[v], 1) + (1 - weight) * self.unigram[w]


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per byte of ``xz -9e`` over the texts joined by newlines.

    About a second per megabyte, spent outside Python's lock: run it in a thread beside other work.
    """
    content = "\n".join(texts).encode()
    if not content:
        raise ValueError("no text to compress")
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content)


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Summed negative log likelihood in nats over the bytes of the scored tokens, in bits per byte."""
    return nats / math.log(2) / text_bytes
