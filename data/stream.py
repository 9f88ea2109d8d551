"""The token stream: rows of a run as a pure function of the global sample index."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potamos.data.dataset import TokenDataset, read_rows
from potamos.data.errors import DatasetError, MixtureError, StateMismatchError, TokenizerMismatchError
from potamos.data.order import Mixture, check_weights, contiguous, derive_key, laps, shuffled
from potamos.data.rows import Rows

_Places = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
STATE_VERSION = 1
PLAN = 4096  # samples whose places are worked out at once when samples are read in order
LAPS = 2  # sets of document ids that a dataset has in contiguous order; laps of a slot take them in turn
_PARTS = ("tokenizer", "seed", "sequence_length", "boundaries", "order", "stages")


@dataclass(frozen=True)
class SourceSpec:
    """A prepared dataset and its weight in a mixture; ``name`` defaults to the folder's path."""

    path: str | os.PathLike[str]
    weight: float = 1.0
    name: str | None = None

    @property
    def label(self) -> str:
        return self.name if self.name is not None else os.fspath(self.path)


@dataclass(frozen=True)
class StageSpec:
    """From global sample ``start`` on, rows are drawn from this mixture."""

    start: int
    mixture: tuple[SourceSpec, ...]


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
class _Stage:
    start: int
    sources: tuple[int, ...]  # numbers of datasets
    labels: tuple[str, ...]
    mixture: Mixture
    drawn_before: np.ndarray  # draws from each source in earlier stages


class TokenStream:
    """Rows of ``sequence_length`` + 1 tokens, numbered by a global sample index from 0 on without end.

    Sample g of stage k is the next draw of one source of that stage's mixture; how often a source was drawn before
    counts over all stages, so a source that two stages share goes on where it was. A draw becomes a row of the source
    by a fresh permutation per epoch (``shuffled``), or by letting slot = g mod slots walk its own share
    (``contiguous``). Nothing depends on a batch size, a rank or a world size; a later stage changes no earlier sample.

    In contiguous order a model carries state from a row to the next row of its slot, and only a changed document id
    tells it to begin anew. So an id there is the document's number, plus its dataset's document count on every other
    lap of the slot, plus twice the documents of the datasets that earlier stages brought in. The ids of two rows that
    follow each other in a slot are then equal exactly where the text goes on: not where the slot begins its share
    again, even inside one huge document, nor where a stage changes the dataset. Ids repeat after two laps, so what a
    model looks back on should be shorter than a slot's share.

    Args:
        stages: the first begins at sample 0, starts rise.
        sequence_length: L; rows hold L + 1 tokens and never cross a chunk.
        seed: of the permutations.
        order: ``shuffled`` or ``contiguous`` (one source a stage, stages begin at multiples of ``slots``).
        slots: number of walks of the contiguous order.
        boundaries: ``isolate`` gives true document ids; ``cross`` gives id 0 and positions 0..L in every row, which
            contiguous order, whose rows go on, does not take.
        tokenizer_sha256, vocabulary: what the model expects; checked against every dataset.

    Raises:
        MixtureError, DatasetError, CorruptShardError, TokenizerMismatchError: see `TokenDataset`; all are raised here,
            before the first row. In contiguous order also a DatasetError where document ids would not fit in int32.
    """

    def __init__(
        self,
        stages: Sequence[StageSpec],
        *,
        sequence_length: int,
        seed: int,
        order: str = "shuffled",
        slots: int | None = None,
        boundaries: str = "isolate",
        tokenizer_sha256: str | None = None,
        vocabulary: int | None = None,
    ):
        if sequence_length < 1:
            raise MixtureError(f"sequence_length {sequence_length} must be at least 1")
        if order not in ("shuffled", "contiguous"):
            raise MixtureError(f"order {order!r} is unknown; known orders: shuffled, contiguous")
        if boundaries not in ("isolate", "cross"):
            raise MixtureError(f"boundaries {boundaries!r} is unknown; known: isolate, cross")
        if order == "contiguous" and boundaries == "cross":
            raise MixtureError(
                "order contiguous with boundaries cross: rows go on where the last ended, but positions without "
                "documents begin anew in every row; use boundaries isolate, or order shuffled"
            )
        if (order == "contiguous") != (slots is not None) or (slots is not None and slots < 1):
            raise MixtureError(
                f"slots {slots} with order {order}: contiguous order needs slots >= 1, shuffled takes none"
            )
        self.sequence_length, self.seed = sequence_length, seed
        self.order, self.slots, self.boundaries = order, slots, boundaries
        self.datasets: list[TokenDataset] = []
        self._stages = self._open_stages(stages, tokenizer_sha256, vocabulary)
        self._starts = np.array([stage.start for stage in self._stages])
        self._cuts = [dataset.cut(sequence_length) for dataset in self.datasets]
        self._rows = [cut.total for cut in self._cuts]
        for dataset, rows in zip(self.datasets, self._rows, strict=True):
            self._check_length(dataset, rows)
        self._first_id = self._first_ids()
        self._plans: dict[int, _Places] = {}
        self._lock = threading.Lock()

    def _open_stages(
        self, stages: Sequence[StageSpec], tokenizer_sha256: str | None, vocabulary: int | None
    ) -> list[_Stage]:
        starts = [stage.start for stage in stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise MixtureError(f"stages start at {starts}; the first must start at 0 and each later one after the last")
        if self.slots is not None and any(start % self.slots for start in starts):
            raise MixtureError(f"stages start at {starts}; contiguous order needs multiples of slots {self.slots}")
        opened: list[_Stage] = []
        by_path: dict[str, int] = {}
        drawn: dict[int, int] = {}
        for number, spec in enumerate(stages):
            labels = tuple(source.label for source in spec.mixture)
            shares = check_weights([source.weight for source in spec.mixture], labels)
            if self.order == "contiguous" and len(labels) > 1:
                raise MixtureError(
                    f"stage {number} mixes {len(labels)} sources; contiguous order reads one; prepare one"
                )
            sources = tuple(self._open(s, by_path, tokenizer_sha256, vocabulary) for s in spec.mixture)
            if len(set(sources)) < len(sources):
                raise MixtureError(
                    f"stage {number} names the same dataset twice ({', '.join(labels)}); add the weights"
                )
            mixture = Mixture(shares, derive_key("mixture", self.seed, spec.start))
            before = np.array([drawn.get(source, 0) for source in sources], np.int64)
            opened.append(_Stage(spec.start, sources, labels, mixture, before))
            if number + 1 < len(stages):
                for source, count in zip(sources, mixture.drawn(starts[number + 1] - spec.start), strict=True):
                    drawn[source] = drawn.get(source, 0) + count
        return opened

    def _open(
        self, spec: SourceSpec, by_path: dict[str, int], tokenizer_sha256: str | None, vocabulary: int | None
    ) -> int:
        """Number of the dataset; equal content is one dataset wherever it lies."""
        path = os.path.realpath(spec.path)
        if path not in by_path:
            dataset = TokenDataset(spec.path, tokenizer_sha256=tokenizer_sha256, vocabulary=vocabulary)
            known = next((i for i, d in enumerate(self.datasets) if d.fingerprint == dataset.fingerprint), None)
            if known is None:
                known = len(self.datasets)
                self.datasets.append(dataset)
                mine, first = dataset.manifest.tokenizer["sha256"], self.datasets[0].manifest.tokenizer["sha256"]
                if mine != first:
                    raise TokenizerMismatchError(
                        f"datasets {self.datasets[0].path} (tokenizer {first[:12]}) and {dataset.path} ({mine[:12]}) "
                        f"were prepared with different tokenizers; prepare them with one"
                    )
            by_path[path] = known
        return by_path[path]

    def _check_length(self, dataset: TokenDataset, rows: int) -> None:
        chunk_tokens, length = dataset.manifest.chunk_tokens, self.sequence_length
        if rows == 0:
            raise DatasetError(
                f"dataset {dataset.path} has no row of sequence_length {length}: {dataset.manifest.tokens} tokens in "
                f"chunks of {chunk_tokens}; use a shorter length or more text"
            )
        if self.slots is None:
            return
        if dataset.chunks > 1 and chunk_tokens % length:
            raise DatasetError(
                f"dataset {dataset.path}: sequence_length {length} does not divide its chunk_tokens {chunk_tokens}, so "
                f"contiguous order would skip {chunk_tokens % length} tokens at each chunk's end; choose a divisor"
            )
        if rows < self.slots:
            raise DatasetError(
                f"dataset {dataset.path} has {rows} rows of {length} tokens, fewer than slots {self.slots}"
            )

    def _first_ids(self) -> np.ndarray:
        """Where each dataset's document ids begin. Datasets count in the order in which stages first name them, so that
        a stage added later changes no id before it."""
        if self.slots is None:
            return np.zeros(len(self.datasets), np.int64)
        ends = np.cumsum([LAPS * dataset.manifest.documents for dataset in self.datasets])
        if ends[-1] > 2**31:
            raise DatasetError(
                f"contiguous order gives every document {LAPS} int32 ids, and the {len(ends)} datasets from "
                f"{self.datasets[0].path} on hold {ends[-1] // LAPS} documents, more than {2**31 // LAPS}; "
                f"use fewer or smaller datasets, or shuffled order"
            )
        return np.concatenate([[0], ends[:-1]])

    def read(self, first: int, count: int) -> Rows:
        """Rows of global samples ``first`` to ``first + count - 1``."""
        samples = np.arange(first, first + count)
        parts = []
        while count > 0:
            block, offset = divmod(first, PLAN)
            take = min(count, PLAN - offset)
            parts.append([part[offset : offset + take] for part in self._plan(block)])
            first, count = first + take, count - take
        if len(parts) == 1:
            return self._cut(samples, *parts[0])
        return self._cut(samples, *(np.concatenate(part) for part in zip(*parts, strict=True)))

    def rows(self, samples: np.ndarray) -> Rows:
        """Rows of any global samples, shape (n,), in the order given."""
        samples = np.asarray(samples, np.int64)
        return self._cut(samples, *self._places(samples))

    def _plan(self, block: int) -> _Places:
        plan = self._plans.get(block)
        if plan is None:
            plan = self._places(np.arange(block * PLAN, (block + 1) * PLAN))
            with self._lock:
                while len(self._plans) >= 4:
                    self._plans.pop(next(iter(self._plans)))
                self._plans[block] = plan
        return plan

    def _places(self, samples: np.ndarray) -> _Places:
        """(dataset, chunk, first token in the chunk, what is added to document numbers) of each sample."""
        if samples.size and samples.min() < 0:
            raise ValueError(f"sample {samples.min()} is negative")
        source, chunk, start, shift = (np.empty(samples.shape, np.int64) for _ in range(4))
        stage_of = np.searchsorted(self._starts, samples, side="right") - 1
        for number in np.unique(stage_of):
            stage = self._stages[number]
            in_stage = np.flatnonzero(stage_of == number)
            member, draw = stage.mixture.locate(samples[in_stage] - stage.start)
            draw = draw + stage.drawn_before[member]
            for m in np.unique(member):
                here = in_stage[member == m]
                dataset = stage.sources[m]
                source[here] = dataset
                chunk[here], start[here], shift[here] = self._place(dataset, draw[member == m])
        return source, chunk, start, shift

    def _place(self, number: int, draw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dataset, rows = self.datasets[number], self._rows[number]
        if self.slots is not None:
            row = contiguous(draw, rows, self.slots)
            shift = self._first_id[number] + laps(draw, rows, self.slots) % LAPS * dataset.manifest.documents
        else:
            row = shuffled(draw, rows, derive_key("rows", self.seed, dataset.fingerprint))
            shift = np.zeros_like(row)
        return *self._cuts[number].place(row), shift

    def _cut(
        self, samples: np.ndarray, source: np.ndarray, chunk: np.ndarray, start: np.ndarray, shift: np.ndarray
    ) -> Rows:
        width = self.sequence_length + 1
        tokens, document_ids, positions = read_rows(
            self.datasets, source, chunk, start, width, true_positions=self.slots is not None
        )
        if self.boundaries == "cross":
            document_ids, positions = crossing(len(tokens), width)
        if self.slots is not None:
            document_ids += shift.astype(np.int32)[:, None]  # rows of a stream are whole: no id is the -1 of padding
        return Rows(tokens, document_ids, positions, samples, source.astype(np.int32))

    def describe(self) -> list[SourceSummary]:
        """One entry per stage and source: its share of the stage, rows per epoch, tokens, and tokens no row reads."""
        summaries = []
        for number, stage in enumerate(self._stages):
            for label, source, share in zip(stage.labels, stage.sources, stage.mixture.shares, strict=True):
                dataset, rows = self.datasets[source], self._rows[source]
                if self.slots is not None:
                    rows -= rows % self.slots
                tokens = dataset.manifest.tokens
                unread = dataset.targets - rows * self.sequence_length
                summaries.append(
                    SourceSummary(
                        number, label, dataset.path, float(share), rows, tokens, dataset.manifest.documents, unread
                    )
                )
        return summaries

    @property
    def text_bytes_per_token(self) -> float:
        """Mean UTF-8 bytes of text per token over all datasets."""
        return sum(d.manifest.text_bytes for d in self.datasets) / sum(d.manifest.tokens for d in self.datasets)

    def fingerprint(self, next_sample: int) -> str:
        """What the samples before ``next_sample`` were read from: a hash, then a short hash of each part of it.

        Covers tokenizer, seed, sequence length, boundaries, order with slots, and of the stages that begin before
        ``next_sample`` the starts, dataset fingerprints and shares. Not batch size, world size, names or paths.
        """
        begun = [stage for stage in self._stages if stage.start < next_sample]
        content: dict[str, Any] = {
            "tokenizer": self.datasets[0].manifest.tokenizer["sha256"],
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "boundaries": self.boundaries,
            "order": [self.order, self.slots],
            "stages": [
                [
                    s.start,
                    [[self.datasets[d].fingerprint, str(w)] for d, w in zip(s.sources, s.mixture.shares, strict=True)],
                ]
                for s in begun
            ],
        }
        whole = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
        parts = [hashlib.sha256(json.dumps(content[part]).encode()).hexdigest()[:8] for part in _PARTS]
        return "-".join([whole, *parts])

    def state_dict(self, next_sample: int) -> dict[str, Any]:
        """What a checkpoint keeps: equal on every rank, free of the world size."""
        return {"version": STATE_VERSION, "fingerprint": self.fingerprint(next_sample), "next_sample": next_sample}

    def check_state(self, state: dict[str, Any]) -> int:
        """Make sure that a saved state continues this stream; returns its next sample.

        Raises:
            StateMismatchError: naming both fingerprints and the parts that differ.
        """
        if state.get("version") != STATE_VERSION or not isinstance(state.get("next_sample"), int):
            raise StateMismatchError(f"data state {state} is not of version {STATE_VERSION} with a next_sample")
        theirs, mine = str(state.get("fingerprint")), self.fingerprint(state["next_sample"])
        if theirs != mine:
            pairs = zip(_PARTS, theirs.split("-")[1:], mine.split("-")[1:], strict=False)
            differ = [part for part, a, b in pairs if a != b] or ["everything"]
            raise StateMismatchError(
                f"the checkpoint's data differ from the recipe's in: {', '.join(differ)} (fingerprint {theirs} there, "
                f"{mine} here, at sample {state['next_sample']}); restore the recipe's data section or begin a new run"
            )
        return state["next_sample"]


def crossing(n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Document ids and positions of n rows that ignore document boundaries."""
    return np.zeros((n, width), np.int32), np.tile(np.arange(width, dtype=np.int32), (n, 1))
