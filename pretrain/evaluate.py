"""Likelihood of held-out text: nats per target, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from potamos.data.loader import Windows
from potamos.parallel.apply import Spread
from potamos.parallel.launch import Rank, all_sum, any_rank, fail_together
from potamos.pretrain.agreement import blank_rows
from potamos.pretrain.objectives.base import System

SINGLE = Rank()


class EvaluationError(ValueError):
    """A data set or an objective of which no likelihood can be had."""


@dataclass(frozen=True)
class Score:
    """What a model makes of a text.

    nats: summed negative log-likelihood of the scored tokens. targets: how many they are. bytes: UTF-8 bytes that they
    stand for. The end of a document is a target that stands for 0 bytes.
    """

    nats: float
    targets: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per target: what training minimizes."""
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that has no float."""
        return math.exp(self.loss) if not self.loss > 700.0 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, comparable between tokenizers; NaN where no scored token stands for text."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def score(
    system: System,
    windows: Windows,
    token_bytes: np.ndarray,
    *,
    device: torch.device | str,
    rows_per_batch: int,
    limit: int | None = None,
    rank: Rank = SINGLE,
    seed: int = 0,
    spread: Spread | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Score:
    """Score the first ``limit`` windows (None: all) without dropout and without gradients.

    Batches are cut from the whole list and then dealt to ranks, so each batch's sum is the same bits for every number
    of ranks; only the order in which the fp64 sums are added differs. Every rank calls this, and gets the same score.

    Args:
        token_bytes: (vocabulary,) bytes of each id, as `Tokenizer.token_bytes` gives them.
        device: where the system's parameters are.
        rank: which share of the batches is this one's, of ranks that have the whole system each.
        seed: keys what an objective draws at random, such as masks; the same at every step of a run.
        spread: the system as a layout has spread it, instead of `rank`.
        progress: called before each batch.

    Raises:
        EvaluationError: nothing to score, or the objective has no likelihood.
        DatasetError: a window cannot be read.
        PeerError: on ranks that did not meet either, where another one has.
    """
    device = torch.device(device)
    count = len(windows) if limit is None else min(limit, len(windows))
    nats = torch.zeros((), dtype=torch.float64, device=device)
    targets = scored_bytes = 0
    failure: Exception | None = None
    index, shares = (rank.rank, rank.world) if spread is None else (spread.data_index, spread.sizes.data)
    with evaluating(system):
        for begin, size, counted in _shares(count, rows_per_batch, index, shares):
            progress()
            try:
                rows = windows.read(begin, size) if failure is None else blank_rows(size, windows.sequence_length)
            except Exception as error:  # kept until all ranks can be told; until then this one goes on beside them
                failure, rows = error, blank_rows(size, windows.sequence_length)
            batch = system.objective.prepare(rows, seed=seed, step=0).to(device)
            out = system(batch) if spread is None else spread.score(batch)
            term = None if out is None else out.terms.get(system.objective.options.kind)
            if out is not None and term is None:  # seen by the last stage alone
                kind = system.objective.options.kind
                failure = failure or EvaluationError(f"objective {kind!r} has no term of its name to measure")
            if term is not None and counted and failure is None:
                nats += term.sum.double()  # added on the device: no wait for each batch
                targets += batch.counts[term.count]
                scored_bytes += int(token_bytes[batch.scored[batch.scored >= 0]].sum())
    if any_rank(failure is not None):
        fail_together(failure)
    if spread is not None and not spread.first_slices:
        targets = scored_bytes = 0  # of the whole row, which the rank with its first slices counts
    own = torch.stack([nats, *(_scalar(value, nats) for value in (targets, scored_bytes))])
    total = (all_sum(own) if spread is None else spread.total(own)).tolist()
    if not total[1]:
        raise EvaluationError(
            f"{windows.dataset.path}: the first {count} windows of {windows.sequence_length} tokens hold no target: "
            "score more windows, or a data set with longer documents"
        )
    return Score(total[0], int(total[1]), int(total[2]))


def _shares(count: int, rows_per_batch: int, index: int, shares: int) -> Iterator[tuple[int, int, bool]]:
    """(first window, windows, whether they count) of each of this rank's batches.

    A rank that has run out reads the first window once more without counting it: where parameters are sharded, every
    rank has to enter the model equally often.
    """
    if rows_per_batch < 1 or count < 1:
        raise EvaluationError(f"{rows_per_batch} rows a batch, {count} windows: both must be at least 1")
    for first in range(0, count, rows_per_batch * shares):
        begin = first + index * rows_per_batch
        if begin < count:
            yield begin, min(rows_per_batch, count - begin), True
        else:
            yield 0, 1, False


def _scalar(value: int, like: Tensor) -> Tensor:
    return torch.tensor(float(value), dtype=like.dtype, device=like.device)  # exact below 2^53


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; afterwards every submodule is in the mode it was in."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
