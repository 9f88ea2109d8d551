"""Scores of held-out text against a count by hand: document by document, token by token, in fp64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HuggingFaceTokenizer

from potamos.data.loader import Windows
from potamos.data.prepare import prepare
from potamos.data.sources import TextList
from potamos.data.tokenizer import Tokenizer, train_bpe
from potamos.parallel.launch import Rank
from potamos.pretrain.evaluate import EvaluationError, Score, evaluating, score
from potamos.pretrain.models import registry
from potamos.pretrain.models.build import materialize
from potamos.pretrain.models.interfaces import Seq
from potamos.pretrain.objectives.base import System
from potamos.pretrain.recipe import ModelSection

LENGTH, CHUNK = 16, 50  # a chunk is three windows and a remainder, so every kind of cut occurs

TEXTS = [
    "the river runs to the sea and the sea takes the river",
    "a",
    "water \u00e9\u00e8 \U0001f30a finds its way down to the valley",
    "rain, rain and rain again; then the river runs high and the valley floods, and the sea is brown for a week",
    "the end",
]


class Texts(TextList):
    """A corpus in memory in small shards."""

    shard_chunks = 2


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return train_bpe(TEXTS, 290, tmp_path / "tokenizer.json")


@pytest.fixture
def dataset(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    prepare(Texts(TEXTS), "validation", tokenizer, tmp_path / "held_out", chunk_tokens=CHUNK)
    return tmp_path / "held_out"


def make_system(tokenizer: Tokenizer) -> System:
    section = ModelSection.model_validate(
        {
            "width": 16,
            "layers": 2,
            "frontend": {"kind": "tokens", "vocabulary": tokenizer.vocabulary, "embedding_dropout": 0.5},
            "mixer": {"kind": "h3", "state": 4, "shift_state": 4},
            "channel": {"kind": "mlp"},
            "positions": {"kind": "sinusoidal"},
            "at": {1: {"mixer": {"kind": "attention", "heads": 2, "dropout": 0.3}}},
            "init": {"kind": "gpt2", "std": 0.4},
            "residual_dropout": 0.5,
        }
    )
    objective = registry.lookup("objective", "causal")
    return System(materialize(section, seed=3), objective(objective.Options(kind="causal"))).double()


def by_hand(
    system: System, tokenizer: Tokenizer, tokenizer_file: Path, *, isolate: bool = True, windows: int | None = None
) -> Score:
    """Every window's documents, each alone in a row of its own; every token after a document's first is a target."""
    end, file = tokenizer.end_of_document, HuggingFaceTokenizer.from_file(str(tokenizer_file))
    stream = [i for text in TEXTS for i in [*tokenizer.encode(text).tolist(), end]]
    cuts = [
        stream[a : min(a + LENGTH, first + CHUNK) + 1]
        for first in range(0, len(stream) - 1, CHUNK)
        for a in range(first, min(first + CHUNK, len(stream) - 1), LENGTH)
    ]
    nats, targets, size = 0.0, 0, 0
    for window in cuts[:windows]:
        parts: list[list[int]] = [[]]
        for token in window:
            parts[-1].append(token)
            if token == end and isolate:
                parts.append([])
        for part in (p for p in parts if len(p) > 1):
            ids = torch.tensor([part])
            with torch.no_grad():
                hidden = system.model({"tokens": ids}, Seq(torch.arange(len(part))[None])).hidden
                log = system.model.frontend.logits(hidden)[0].log_softmax(-1)
            for place, token in enumerate(part[1:]):
                nats -= log[place, token].item()
                targets += 1
                size += 0 if token == end else len(file.id_to_token(token) or "")  # one character stands for one byte
    return Score(nats, targets, size)


@pytest.mark.parametrize("rows_per_batch", [1, 4, 100])
@pytest.mark.parametrize("boundaries", ["isolate", "cross"])
@pytest.mark.parametrize("limit", [None, 5])
def test_score_equals_count_by_hand(
    tokenizer: Tokenizer, dataset: Path, rows_per_batch: int, boundaries: str, limit: int | None
) -> None:
    system = make_system(tokenizer).eval()
    expected = by_hand(
        system, tokenizer, dataset.with_name("tokenizer.json"), isolate=boundaries == "isolate", windows=limit
    )
    windows = Windows(dataset, sequence_length=LENGTH, boundaries=boundaries)
    system.train()
    found = score(
        system, windows, tokenizer.token_bytes(), device="cpu", rows_per_batch=rows_per_batch, limit=limit, seed=1
    )
    assert (found.targets, found.bytes) == (expected.targets, expected.bytes)
    assert found.nats == pytest.approx(expected.nats, rel=1e-10)
    assert expected.targets > (60 if limit else 100)
    if limit is None and boundaries == "cross":  # every token but the first, every byte of all texts but that token's
        first = int(tokenizer.token_bytes()[tokenizer.encode(TEXTS[0])[0]])
        assert found.bytes == sum(len(text.encode()) for text in TEXTS) - first


def test_figures() -> None:
    found = Score(nats=200.0, targets=50, bytes=160)
    assert found.loss == 4.0
    assert found.perplexity == pytest.approx(54.598150033)
    assert found.bits_per_byte == pytest.approx(200.0 / 0.69314718056 / 160)
    assert Score(1e6, 10, 10).perplexity == math.inf
    assert math.isnan(Score(math.nan, 10, 10).perplexity)
    assert math.isnan(Score(1.0, 10, 0).bits_per_byte)


def test_same_for_any_number_of_ranks(tokenizer: Tokenizer, dataset: Path, run_ranks: Any) -> None:
    def measure(rank: int, world: int) -> list[float]:
        windows = Windows(dataset, sequence_length=LENGTH)
        sizes = tokenizer.token_bytes()
        place = Rank(rank, world)
        found = score(make_system(tokenizer), windows, sizes, device="cpu", rows_per_batch=2, rank=place)
        return [found.nats, found.targets, found.bytes]

    alone = measure(0, 1)
    assert alone[1] > 100
    for world in (2, 3):
        for nats, *counts in run_ranks(world, measure):
            assert counts == alone[1:]
            assert nats == pytest.approx(alone[0], rel=1e-13)


def test_evaluating_restores_every_mode() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2))
    model[0].eval()

    def fail() -> None:
        with evaluating(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert torch.is_grad_enabled()


def test_nothing_to_score(tmp_path: Path, tokenizer: Tokenizer) -> None:
    system = make_system(tokenizer)
    prepare(Texts(["a", "b", "c"]), "validation", tokenizer, tmp_path / "letters")
    windows = Windows(tmp_path / "letters", sequence_length=1)  # every other window begins with an end of document
    with pytest.raises(EvaluationError, match="at least 1"):
        score(system, windows, tokenizer.token_bytes(), device="cpu", rows_per_batch=0)
    windows.read = lambda start, count: Windows.read(windows, 1, 1)  # type: ignore[method-assign]
    with pytest.raises(EvaluationError, match="no target"):
        score(system, windows, tokenizer.token_bytes(), device="cpu", rows_per_batch=1, limit=1)


def test_token_bytes_are_summed_over_scored_tokens_only(tokenizer: Tokenizer, dataset: Path) -> None:
    """A first token of a document and padding are not scored: doubling their bytes changes nothing."""
    windows = Windows(dataset, sequence_length=LENGTH)
    rows = windows.read(0, len(windows))
    scored = np.zeros(tokenizer.vocabulary, bool)
    inside = (rows.document_ids[:, 1:] == rows.document_ids[:, :-1]) & (rows.document_ids[:, 1:] >= 0)
    scored[rows.tokens[:, 1:][inside]] = True
    sizes = tokenizer.token_bytes()
    other = np.where(scored, sizes, 1000)
    assert (other != sizes).any()
    system = make_system(tokenizer)
    first, second = (score(system, windows, s, device="cpu", rows_per_batch=4) for s in (sizes, other))
    assert first == second
