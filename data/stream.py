"""The token stream: rows of a run as a pure function of the global sample index."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from potamos.data import state
from potamos.data.dataset import TokenDataset, read_rows
from potamos.data.errors import DatasetError, MixtureError
from potamos.data.lookahead import Lookahead
from potamos.data.order import derive_key
from potamos.data.remote import CacheSpec, is_url, open_dataset_files
from potamos.data.rows import Rows, crossing, read_tokens
from potamos.data.skips import SkipList
from potamos.data.stages import SourceSpec, Stages, StageSpec
from potamos.data.usage import SourcePlan, SourceSummary, plans, summaries
from potamos.data.walks import Contiguous, Shuffled, Walk, Windowed, check_contiguous, first_ids

PLAN = 4096  # samples whose places are worked out at once when samples are read in order
ORDERS = ("shuffled", "contiguous", "window")


class _Places(NamedTuple):
    """Where samples are: arrays of int64, one value a sample."""

    source: np.ndarray  # dataset
    draw: np.ndarray  # number of the draw from it
    chunk: np.ndarray
    start: np.ndarray  # first token in the chunk
    shift: np.ndarray  # what is added to document numbers

    def part(self, begin: int, end: int) -> _Places:
        return _Places(*(values[begin:end] for values in self))


class TokenStream:
    """Rows of ``sequence_length`` + 1 tokens, numbered by a global sample index from 0 on without end.

    Sample g of stage k is the next draw of one source of that stage's mixture; how often a source was drawn before
    counts over all stages, so a source that two stages share goes on where it was. A draw becomes a row of the source
    by a fresh permutation per epoch (``shuffled``), by one within windows of a few shards at a time, the shards
    permuted per epoch (``window``), or by letting slot = g mod slots walk its own share (``contiguous``). Nothing
    depends on a batch size, a rank or a world size; a later stage changes no earlier sample. Skipped samples keep
    their numbers: the rows of all others are what they would be without the skip.

    In contiguous order a model carries state from a row to the next row of its slot, and only a changed document id
    tells it to begin anew. So an id there is the document's number, plus its dataset's document count on every other
    stretch of the slot (a new one begins where the slot begins its share again, and behind skipped samples), plus twice
    the documents of the datasets that earlier stages brought in. The ids of two rows that follow each other in a slot
    are then equal exactly where the text goes on: not where a slot starts over or skips, even inside one huge document,
    nor at the end of one of the dataset's parts, nor where a stage changes the dataset. Ids repeat after two stretches,
    so what a model looks back on should be shorter than a slot's share.

    In window order the shards of the windows that are being read are kept, and those of the next windows asked for
    ahead, from whatever thread calls `read` (`TokenDataset.keep`, `ShardFiles.prefetch`).

    Args:
        stages: the first begins at sample 0, starts rise.
        sequence_length: L; rows hold L + 1 tokens and never cross a chunk.
        seed: of the permutations.
        order: ``shuffled``, ``window`` or ``contiguous`` (one source a stage, stages begin at multiples of ``slots``).
        slots: number of walks of the contiguous order.
        window: shards a window, in window order.
        skip: ranges [a, b) of samples that are left out; in contiguous order bounds are multiples of ``slots``.
        boundaries: ``isolate`` gives true document ids; ``cross`` gives id 0 and positions 0..L in every row, which
            contiguous order, whose rows go on, does not take.
        on_bad_shard: ``error``, or ``skip`` to leave out shards that are damaged at the start; see `TokenDataset`.
        cache: where shards of datasets behind URLs are kept. These are read in window order only.
        tokenizer_sha256, vocabulary: what the model expects; checked against every dataset.

    Raises:
        MixtureError, DatasetError, CorruptShardError, TokenizerMismatchError: see `TokenDataset`. In contiguous order
            also a DatasetError where document ids would not fit in int32, or shards were left out. Damage inside a
            shard raises where its first row is read, and what cannot be fetched where it is needed.
    """

    def __init__(
        self,
        stages: Sequence[StageSpec],
        *,
        sequence_length: int,
        seed: int,
        order: str = "shuffled",
        slots: int | None = None,
        window: int | None = None,
        skip: Sequence[Sequence[int]] = (),
        boundaries: str = "isolate",
        on_bad_shard: str = "error",
        cache: CacheSpec | None = None,
        tokenizer_sha256: str | None = None,
        vocabulary: int | None = None,
    ):
        _check_options(sequence_length, boundaries, order, slots, window)
        self.sequence_length, self.seed = sequence_length, seed
        self.order, self.slots, self.window, self.boundaries = order, slots, window, boundaries
        self.skip = SkipList(skip)
        if slots is not None and any(bound % slots for bounds in self.skip.ranges for bound in bounds):
            raise MixtureError(
                f"skip ranges {[list(bounds) for bounds in self.skip.ranges]}: contiguous order needs multiples of "
                f"slots {slots}, so that every slot skips the same steps"
            )

        def open_dataset(spec: SourceSpec) -> TokenDataset:
            folder, files = spec.path, None
            if is_url(spec.path):
                self._refuse_elsewhere(spec)
                folder, files = open_dataset_files(spec.path, cache)
            return TokenDataset(
                folder,
                tokenizer_sha256=tokenizer_sha256,
                vocabulary=vocabulary,
                on_bad_shard=on_bad_shard,
                files=files,
            )

        self._stages = Stages(stages, seed, slots, open_dataset)
        self.datasets = self._stages.datasets
        self._cuts = [dataset.cut(sequence_length) for dataset in self.datasets]
        self._walks = self._make_walks()
        windowed = [walk for walk in self._walks if isinstance(walk, Windowed)]
        self._lookahead = Lookahead(self._stages, windowed, window) if window is not None else None
        self._plans: dict[int, _Places] = {}
        self._lock = threading.Lock()

    def _make_walks(self) -> list[Walk]:
        length = self.sequence_length
        for dataset, cut in zip(self.datasets, self._cuts, strict=True):
            if cut.total == 0:
                raise DatasetError(
                    f"dataset {dataset.path} has no row of sequence_length {length}: {dataset.manifest.tokens} tokens "
                    f"in chunks of {dataset.manifest.chunk_tokens}; use a shorter length or more text"
                )
            if self.slots is not None:
                check_contiguous(dataset, cut.total, self.slots, length)
        if self.slots is not None:
            skipped = self._stages.draws_of(self.skip.ranges)
            return [
                Contiguous(cut, self.slots, first, dataset.manifest.documents, skipped[number])
                for number, (dataset, cut, first) in enumerate(
                    zip(self.datasets, self._cuts, first_ids(self.datasets), strict=True)
                )
            ]
        keys = [derive_key("rows", self.seed, dataset.fingerprint) for dataset in self.datasets]
        if self.window is not None:
            return [Windowed(cut, self.window, key) for cut, key in zip(self._cuts, keys, strict=True)]
        return [Shuffled(cut, key) for cut, key in zip(self._cuts, keys, strict=True)]

    def _refuse_elsewhere(self, spec: SourceSpec) -> None:
        if self.order != "window":
            raise DatasetError(
                f"source {spec.label} is behind a URL, and order {self.order} reads all of its shards at once; use "
                f"order: window, which fetches a few at a time, or copy the dataset to a local folder"
            )

    def close(self) -> None:
        """End what fetches shards in the background; see `Lookahead.close`. Rows can no longer be fetched."""
        if self._lookahead is not None:
            self._lookahead.close()

    def after(self, sample: int, count: int) -> int:
        """The place right behind the next ``count`` samples, from place ``sample`` on, that are not skipped."""
        return self.skip.after(sample, count)

    def samples(self, first: int, count: int) -> np.ndarray:
        """The next ``count`` samples from place ``first`` on that are not skipped, (count,) int64."""
        return self.skip.samples(first, count)

    def read(self, first: int, count: int) -> Rows:
        """Rows of the next ``count`` samples, at least one, from place ``first`` on that are not skipped."""
        samples = self.samples(first, count)
        parts = []
        for begin, end in self.skip.runs(first, self.after(first, count)):
            while begin < end:
                block, offset = divmod(begin, PLAN)
                stop = min(PLAN, offset + end - begin)
                parts.append(self._plan(block).part(offset, stop))
                begin += stop - offset
        if len(parts) == 1:
            return self._cut(samples, parts[0])
        return self._cut(samples, _Places(*(np.concatenate(part) for part in zip(*parts, strict=True))))

    def rows(self, samples: np.ndarray) -> Rows:
        """Rows of any global samples, shape (n,), in the order given, skipped or not."""
        samples = np.asarray(samples, np.int64)
        return self._cut(samples, self._places(samples), in_order=False)

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
        places = _Places(*(np.empty(samples.shape, np.int64) for _ in _Places._fields))
        for source, here, draw in self._stages.locate(samples):
            places.source[here], places.draw[here] = source, draw
            walk = self._walks[source]
            places.chunk[here], places.start[here] = self._cuts[source].place(walk.rows(draw))
            places.shift[here] = walk.shift(draw)
        return places

    def _cut(self, samples: np.ndarray, places: _Places, *, in_order: bool = True) -> Rows:
        if self._lookahead is not None and in_order:
            self._lookahead.have(samples, places.source, places.draw)
        width = self.sequence_length + 1
        where = (self.datasets, places.source, places.chunk, places.start, width)
        if self.boundaries == "cross":
            tokens = read_tokens(*where)
            document_ids, positions = crossing(len(tokens), width)
        else:
            tokens, document_ids, positions = read_rows(*where, true_positions=self.slots is not None)
        if self.slots is not None:
            document_ids += places.shift.astype(np.int32)[:, None]  # rows of a stream are whole: no id is padding's -1
        return Rows(tokens, document_ids, positions, samples, places.source.astype(np.int32))

    def describe(self) -> list[SourceSummary]:
        """One entry per stage and source: its share of the stage, rows per epoch, tokens, and tokens no row reads."""
        return list(summaries(self._stages, self._walks, self.sequence_length))

    def plan(self, samples: int, start: int = 0) -> list[SourcePlan]:
        """What the next ``samples`` samples from place ``start`` on read of each source of each stage, exactly.

        Skipped samples do not count; stages that these samples do not reach are listed with none.
        """
        if samples < 0 or start < 0:
            raise ValueError(f"plan of {samples} samples from sample {start}: both must be at least 0")
        end = self.after(start, samples)
        return list(plans(self._stages, self._walks, self.sequence_length, self.skip, start, end))

    def fingerprint(self, next_sample: int) -> str:
        """What the samples before ``next_sample`` were read from: a hash, then a short hash of each part of it.

        Covers tokenizer, seed, sequence length, boundaries, order with slots and window; of the stages that begin
        before ``next_sample`` the starts, dataset fingerprints and shares; and the skipped samples before it. Not
        batch size, world size, names or paths.
        """
        begun = [stage for stage in self._stages.stages if stage.start < next_sample]
        return state.fingerprint(
            {
                "tokenizer": self.datasets[0].manifest.tokenizer["sha256"],
                "seed": self.seed,
                "sequence_length": self.sequence_length,
                "boundaries": self.boundaries,
                "order": [self.order, self.slots, self.window],
                "stages": [
                    [
                        s.start,
                        [
                            [self.datasets[d].fingerprint, str(w)]
                            for d, w in zip(s.sources, s.mixture.shares, strict=True)
                        ],
                    ]
                    for s in begun
                ],
                "skip": self.skip.before(next_sample),
            }
        )

    def state_dict(self, next_sample: int) -> dict[str, Any]:
        """What a checkpoint keeps: equal on every rank, free of the world size."""
        return {
            "version": state.STATE_VERSION,
            "fingerprint": self.fingerprint(next_sample),
            "next_sample": next_sample,
        }

    def check_state(self, saved: dict[str, Any]) -> int:
        """Make sure that a saved state continues this stream; returns its next sample.

        Raises:
            StateMismatchError: naming both fingerprints and the parts that differ.
        """
        return state.check_state(saved, self.fingerprint)


def _check_options(length: int, boundaries: str, order: str, slots: int | None, window: int | None) -> None:
    if length < 1:
        raise MixtureError(f"sequence_length {length} must be at least 1")
    if order not in ORDERS:
        raise MixtureError(f"order {order!r} is unknown; known orders: {', '.join(ORDERS)}")
    if boundaries not in ("isolate", "cross"):
        raise MixtureError(f"boundaries {boundaries!r} is unknown; known: isolate, cross")
    if order == "contiguous" and boundaries == "cross":
        raise MixtureError(
            "order contiguous with boundaries cross: rows go on where the last ended, but positions without "
            "documents begin anew in every row; use boundaries isolate, or order shuffled"
        )
    for name, value, taken in (("slots", slots, order == "contiguous"), ("window", window, order == "window")):
        if taken != (value is not None) or (value is not None and value < 1):
            rule = f"it needs {name} >= 1" if taken else f"it takes no {name}"
            raise MixtureError(f"{name} {value} with order {order}: {rule}")
