"""What a stream's sources hold, and what a run will read of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potamos.data.skips import SkipList
from potamos.data.stages import Stage, Stages
from potamos.data.walks import Walk


@dataclass(frozen=True)
class SourceSummary:
    """What one source of one stage holds for rows of the stream's length."""

    stage: int
    name: str
    path: Path
    share: float
    samples_per_epoch: int
    tokens: int
    documents: int
    unread_tokens: int


@dataclass(frozen=True)
class SourcePlan:
    """What a run will read of one source in one stage.

    Attributes:
        stage, name, path, share: which source of which stage, and its share of the stage.
        samples: rows drawn, exactly.
        tokens: targets in these rows.
        epochs: how many times over the source is read.
        samples_per_epoch: rows of the source.
        unread_tokens: targets of the source that no row holds, at the ends of chunks and parts.
        epochs_before: how many times over the source was gone through when the planned samples of the stage begin, by
            earlier stages and by what lies before the plan. Skipped rows count here, though not in ``epochs``: they
            are passed over, not put off.
    """

    stage: int
    name: str
    path: Path
    share: float
    samples: int
    tokens: int
    epochs: float
    samples_per_epoch: int
    unread_tokens: int
    epochs_before: float


def summaries(stages: Stages, walks: Sequence[Walk], length: int) -> Iterator[SourceSummary]:
    """One for each stage and source."""
    for number, stage in enumerate(stages.stages):
        for label, source, share in zip(stage.labels, stage.sources, stage.mixture.shares, strict=True):
            dataset, epoch = stages.datasets[source], walks[source].epoch
            manifest, unread = dataset.manifest, dataset.targets - epoch * length
            yield SourceSummary(
                number, label, dataset.path, float(share), epoch, manifest.tokens, manifest.documents, unread
            )


def plans(
    stages: Stages, walks: Sequence[Walk], length: int, skip: SkipList, begin: int, end: int
) -> Iterator[SourcePlan]:
    """One for each stage and source, of the samples in [begin, end) that are not skipped."""
    sources = summaries(stages, walks, length)
    for number, (stage, low, high) in enumerate(stages.within(begin, end)):
        before = (stage.drawn_before + stage.drawn(stage.start, low)).tolist()
        for count, past in zip(_drawn(stage, skip.runs(low, high)), before, strict=True):
            source = next(sources)
            epoch = source.samples_per_epoch
            yield SourcePlan(
                number, source.name, source.path, source.share, count, count * length, count / epoch, epoch,
                source.unread_tokens, past / epoch,
            )  # fmt: skip


def _drawn(stage: Stage, runs: Sequence[tuple[int, int]]) -> list[int]:
    drawn = np.zeros(len(stage.sources), np.int64)
    for begin, end in runs:
        drawn += stage.drawn(begin, end)
    return drawn.tolist()
