"""Causal targets against a loop over tokens, and sums with counts: how a batch is cut changes no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from potamos.data.loader import Rows
from potamos.data.prepare import prepare
from potamos.data.sources import TextList
from potamos.data.tokenizer import train_bpe
from potamos.parallel.facts import parameter_table
from potamos.parallel.gradients import Gradients
from potamos.parallel.launch import Rank
from potamos.pretrain.config import parse_recipe
from potamos.pretrain.models import registry
from potamos.pretrain.models.interfaces import Seq
from potamos.pretrain.objectives.base import Batch, Objective, Term, Terms, with_auxiliary
from potamos.pretrain.objectives.causal import Causal
from potamos.pretrain.optim import GradientNorm, schedule_factor
from potamos.pretrain.trainer import Trainer

LENGTH = 10
WORDS = ["the", "river", "runs", "to", "sea", "and", "old", "mills", "turn", "while", "rain", "falls", "on", "hills"]


# --- causal targets --------------------------------------------------------------------------------------------------


def make_rows(ends: list[list[int]], padded: dict[int, int] | None = None) -> Rows:
    """Rows of LENGTH + 1 random tokens. ``ends``: columns of each row that close a document; ``padded``: the first
    column of padding of some rows. A row goes on in a document of its own number."""
    draw = np.random.default_rng(len(ends))
    shape = (len(ends), LENGTH + 1)
    tokens = draw.integers(1, 50, shape).astype(np.int32)
    ids, positions = np.empty(shape, np.int32), np.empty(shape, np.int32)
    document = 20
    for row, columns in enumerate(ends):
        position = 0
        for column in range(LENGTH + 1):
            ids[row, column], positions[row, column] = document, position
            position += 1
            if column in columns:
                tokens[row, column] = 0
                document, position = document + 1, 0
        document += 1
    for row, column in (padded or {}).items():
        ids[row, column:], positions[row, column:], tokens[row, column:] = -1, 0, 0
    return Rows(tokens, ids, positions, np.arange(len(ends)) + 90, np.zeros(len(ends), np.int32))


CASES = {
    "plain": make_rows([[], []]),
    "boundaries": make_rows([[3], [0, 1, 7], []]),
    "edges": make_rows([[0], [LENGTH - 1], [LENGTH], [LENGTH - 1, LENGTH]]),
    "padding": make_rows([[4], [], []], {0: 5, 1: LENGTH, 2: 0}),
}


def by_hand(rows: Rows) -> list[list[int]]:
    """The target of every input column, token by token."""
    targets = []
    for row in range(len(rows)):
        line = []
        for column in range(LENGTH):
            here, there = int(rows.document_ids[row, column]), int(rows.document_ids[row, column + 1])
            line.append(int(rows.tokens[row, column + 1]) if here == there and here != -1 else -1)
        targets.append(line)
    return targets


def objective() -> Causal:
    return registry.lookup("objective", "causal")(Causal.Options())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("carried", [False, True])
def test_targets_are_the_next_tokens_of_the_document(name: str, carried: bool) -> None:
    rows = CASES[name]
    batch = objective().prepare(rows, seed=5, step=6, carried=carried)
    expected = by_hand(rows)
    assert batch.targets["tokens"].tolist() == expected
    assert batch.targets["tokens"].dtype == torch.int64
    assert batch.counts == {"tokens": sum(t >= 0 for line in expected for t in line)}
    assert batch.scored.tolist() == expected
    assert torch.equal(batch.inputs["tokens"], torch.from_numpy(rows.tokens[:, :-1].astype(np.int64)))
    seq = batch.seq
    assert (seq.seed, seq.step) == (5, 6)
    assert torch.equal(seq.positions, torch.from_numpy(rows.positions[:, :-1].astype(np.int64)))
    assert seq.samples is not None
    assert seq.samples.tolist() == rows.samples.tolist()
    if seq.document_ids is None:
        assert not carried, "rows that go on need their ids even where each has but one document"
        assert (rows.document_ids[:, :1] == rows.document_ids[:, :-1]).all()
    else:
        assert torch.equal(seq.document_ids, torch.from_numpy(rows.document_ids[:, :-1].copy()))


def test_an_end_predicts_nothing_and_is_predicted() -> None:
    rows = make_rows([[3]])
    (targets,) = objective().prepare(rows, seed=0, step=0).targets["tokens"].tolist()
    assert targets[2] == 0  # the end-of-document token, after the last word
    assert targets[3] == -1  # nothing after it
    assert targets[4] == rows.tokens[0, 5]


def test_ids_are_left_out_where_every_row_is_one_document() -> None:
    """The kernels' fast path, decided without asking the device. A last token of another document is no input."""
    assert objective().prepare(CASES["plain"], seed=0, step=0).seq.document_ids is None
    assert objective().prepare(make_rows([[LENGTH - 1]]), seed=0, step=0).seq.document_ids is None
    assert objective().prepare(make_rows([[LENGTH - 2]]), seed=0, step=0).seq.document_ids is not None
    assert objective().prepare(make_rows([[]], {0: LENGTH - 1}), seed=0, step=0).seq.document_ids is not None


def test_a_row_that_ends_as_it_begins_is_not_one_document_for_that() -> None:
    rows = make_rows([[3, 6]])
    rows.document_ids[:, 7:] = rows.document_ids[:, :1]
    seq = objective().prepare(rows, seed=0, step=0).seq
    assert seq.document_ids is not None
    assert torch.equal(seq.document_ids, torch.from_numpy(rows.document_ids[:, :-1].copy()))


def test_padding_first_rows_are_not_taken_for_a_document() -> None:
    """A row of padding alone has one id throughout, -1, and must not train."""
    batch = objective().prepare(make_rows([[]], {0: 0}), seed=0, step=0)
    assert batch.counts["tokens"] == 0
    assert (batch.targets["tokens"] == -1).all()


def test_auxiliary_terms_keep_their_counts_and_weights() -> None:
    one = torch.ones(())
    terms = with_auxiliary(Terms({"causal": Term(one, "tokens")}), {"balance": (2 * one, "routed")}, {"balance": 0.01})
    assert terms.terms["balance"] == Term(2 * one, "routed", 0.01)
    assert with_auxiliary(Terms(), {"z": (one, "tokens")}, {}).terms["z"].weight == 1.0


def test_a_batch_moves_with_everything_in_it() -> None:
    whole = Seq(torch.zeros(1, 4, dtype=torch.int64), streams={"edges": torch.zeros(2)})
    seq = Seq(torch.zeros(1, 2, dtype=torch.int64), whole=whole, columns=torch.arange(2), seed=3)
    batch = Batch({"tokens": torch.zeros(1, 2)}, seq, {"tokens": torch.zeros(1, 2)}, {"tokens": 2}, np.zeros((1, 2)))
    moved = batch.to(torch.device("meta"))
    assert moved.seq.whole is not None
    assert moved.seq.columns is not None
    tensors = [moved.inputs["tokens"], moved.targets["tokens"], moved.seq.positions, moved.seq.columns]
    tensors += [moved.seq.whole.positions, moved.seq.whole.streams["edges"]]
    assert all(tensor.is_meta for tensor in tensors)
    assert (moved.seq.seed, moved.counts) == (3, {"tokens": 2})


def test_batches_are_pinned_for_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor on its way to a GPU lies in page-locked memory, or its copy would not be asynchronous."""
    whole = Seq(torch.zeros(1, 4, dtype=torch.int64), streams={"edges": torch.zeros(2)})
    seq = Seq(torch.zeros(1, 2, dtype=torch.int64), whole=whole, columns=torch.arange(2), seed=3)
    batch = Batch({"tokens": torch.zeros(1, 2)}, seq, {"tokens": torch.zeros(1, 2)}, {"tokens": 2}, np.zeros((1, 2)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert batch.pin() is batch
    assert batch.to(torch.device("cpu")) is batch

    pinned: list[torch.Tensor] = []  # what pin_memory gave, which on this machine is but another tensor

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    copied: list[tuple[torch.Tensor, bool]] = []
    to = torch.Tensor.to

    def noting(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool = False) -> torch.Tensor:
        copied.append((tensor, non_blocking))
        return to(tensor, device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", noting)
    moved = batch.to(torch.device("meta"))
    assert len(pinned) == len(copied) == 6
    assert all(tensor is source and asynchronous for (tensor, asynchronous), source in zip(copied, pinned, strict=True))
    assert moved.inputs["tokens"].is_meta
    assert isinstance(moved.scored, np.ndarray)


# --- accumulation ----------------------------------------------------------------------------------------------------


class Texts(TextList):
    """A corpus in memory: documents from one word to many, so that rows differ much in their targets."""

    shard_chunks = 4

    def __init__(self) -> None:
        draw = np.random.default_rng(1)
        super().__init__([" ".join(draw.choice(WORDS, draw.choice([1, 2, 40]))) + "." for _ in range(200)])


RECIPE = """
name: accumulation
family: h3
model:
  width: 16
  layers: 2
  frontend: {{kind: tokens, vocabulary: 304}}
  mixer: {{kind: h3, state: 4, shift_state: 4}}
  channel: {{kind: mlp, ratio: 2}}
  at: {{1: {{mixer: {{kind: attention, heads: 4, dropout: 0.1}}}}}}
  residual_dropout: 0.1
  init: {{kind: gpt2, std: 0.2}}
objective: {{kind: causal}}
tokenizer: {{kind: json, path: {corpus}/tokenizer.json}}
data:
  sequence_length: 24
  stages: [{{from: 0, mixture: [{{path: {corpus}/train}}]}}]
optimizer: {{kind: adamw, lr: 1.0e-2, clip: null}}
schedule: {{kind: constant}}
train: {{steps: 4, sequences: 8, micro_sequences: {micro}, seed: 3, device: cpu}}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = train_bpe(Texts().texts, 300, folder / "tokenizer.json")
    prepare(Texts(), "train", tokenizer, folder / "train", chunk_tokens=480)
    return folder


Make = Callable[[int], Trainer]


@pytest.fixture
def make(corpus: Path, tmp_path: Path) -> Iterator[Make]:
    """make(micro_sequences): a trainer in fp64, at the same weights whatever the argument."""
    made = []

    def trainer(micro: int) -> Trainer:
        recipe = parse_recipe(RECIPE.format(corpus=corpus, micro=micro))
        made.append(Trainer(recipe, tmp_path / str(len(made)), Rank()))
        made[-1].system.double().train()
        made[-1].norm = GradientNorm(Gradients(made[-1].parameters), parameter_table(made[-1].system))
        return made[-1]

    yield trainer
    for trainer_ in made:
        trainer_.telemetry.close("finished")


def gradients(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The loss and every gradient of the trainer's own first step."""
    kept: dict[str, Tensor] = {}

    def keep(factor: float, refused: Tensor) -> None:
        assert (factor, refused.item()) == (schedule_factor(trainer.recipe.schedule, 0, 4), 0.0)
        for name, parameter in trainer.parameters.items():
            assert parameter.grad is not None
            kept[name] = parameter.grad.clone()

    monkeypatch.setattr(trainer.optimizer, "step", keep)
    result = trainer.train_step(trainer.stream.read(0, 8))
    return {"loss": result.loss, "norm": result.norm, **kept}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference relative to the largest element of its tensor (at least 1e-3)."""
    assert found.keys() == expected.keys()
    return max(
        ((found[name] - want).abs().max() / want.abs().max().clamp(min=1e-3)).item() for name, want in expected.items()
    )


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_equals_one_batch(make: Make, micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """k x micro = one batch of 8 in fp64, to 1e-10, with dropout on and rows of very different numbers of targets."""
    whole, parts = make(8), make(micro)
    counts = [batch.counts["tokens"] for batch in parts.prepare(parts.stream.read(0, 8))]
    assert len(counts) == 8 // micro
    assert len(set(counts)) > 1
    assert worst(gradients(parts, monkeypatch), gradients(whole, monkeypatch)) < 1e-10


def test_one_batch_is_the_mean_over_all_targets(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole step against -log p summed token by token."""
    trainer = make(8)
    trainer.system.eval()
    found = gradients(trainer, monkeypatch)["loss"]
    rows = trainer.stream.read(0, 8)
    batch = trainer.objective.prepare(rows, seed=3, step=0)
    logp = trainer.model.frontend.logits(trainer.model(batch.inputs, batch.seq).hidden).log_softmax(-1)
    total, count = 0.0, 0
    for row, column in np.argwhere(batch.scored >= 0).tolist():
        total -= logp[row, column, int(rows.tokens[row, column + 1])].item()
        count += 1
    assert found.item() == pytest.approx(total / count, rel=1e-12)


def test_a_mean_of_means_would_be_seen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: each micro-batch divided by its own count, the means averaged. Far outside the tolerance."""
    expected = gradients(make(8), monkeypatch)
    trainer = make(2)

    class MeanOfMeans(Objective):
        def prepare(self, rows: Rows, *, seed: int, step: int, carried: bool = False) -> Batch:
            return trainer.objective.prepare(rows, seed=seed, step=step, carried=carried)

        def forward(self, model: Any, batch: Batch, state: Any = None) -> Terms:
            terms = trainer.objective(model, batch, state)
            share = total[0] / (4 * batch.counts["tokens"])
            return Terms({n: Term(t.sum * share, t.count, t.weight) for n, t in terms.terms.items()})

    total = [sum(batch.counts["tokens"] for batch in trainer.prepare(trainer.stream.read(0, 8)))]
    wrong = MeanOfMeans(None)
    monkeypatch.setattr(trainer.system, "forward", lambda batch, state=None: wrong(trainer.model, batch, state))
    assert worst(gradients(trainer, monkeypatch), expected) > 1e-3


def test_a_batch_without_targets_is_a_step_of_zero(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of padding alone: no division by zero, no NaN, no gradient."""
    trainer = make(4)
    padding = Rows(
        np.zeros((8, 25), np.int32),
        np.full((8, 25), -1, np.int32),
        np.zeros((8, 25), np.int32),
        np.arange(8),
        np.zeros(8, np.int32),
    )
    monkeypatch.setattr(trainer.stream, "read", lambda first, count: padding)
    found = gradients(trainer, monkeypatch)
    assert all(torch.count_nonzero(value) == 0 for value in found.values())
