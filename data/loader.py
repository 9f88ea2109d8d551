"""What a trainer reads from: this rank's rows of every global batch, and the windows of a held-out dataset."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from potamos.data.dataset import TokenDataset, read_rows
from potamos.data.errors import DatasetError, MixtureError
from potamos.data.rows import Rows
from potamos.data.stream import SourceSpec, SourceSummary, StageSpec, TokenStream, crossing

__all__ = ["Loader", "Rows", "SourceSpec", "SourceSummary", "StageSpec", "TokenStream", "Windows"]


class Loader:
    """Iterator over this rank's slice of each global batch, read ahead by one thread.

    Global batch b holds samples ``next_sample + b * sequences`` on; rank r of W gets its r-th of W equal slices, so the
    batches joined over ranks are the same for every W. Use it as a context manager, or call `close`.

    Args:
        stream: where rows come from.
        sequences: rows of a global batch; a multiple of ``world``.
        rank, world: this data-parallel rank and their number.
        next_sample: first sample of the first batch.
        allow_repeat: accept a batch larger than one epoch of a source's share in it.
        ahead: batches kept ready.

    Attributes:
        next_sample: first sample of the batch that comes next; batches only read ahead do not count.
        data_wait: seconds the consumer has waited for rows so far.

    Raises:
        MixtureError: sizes that do not fit together.
        DatasetError: a source smaller than its share of one batch.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        sequences: int,
        rank: int = 0,
        world: int = 1,
        next_sample: int = 0,
        allow_repeat: bool = False,
        ahead: int = 2,
    ):
        if sequences < 1 or world < 1 or sequences % world:
            raise MixtureError(f"sequences {sequences} cannot be cut into {world} equal parts, one for each data rank")
        if not 0 <= rank < world or next_sample < 0:
            raise MixtureError(f"rank {rank} of {world} from sample {next_sample}: out of range")
        if stream.slots is not None and sequences % stream.slots:
            raise MixtureError(f"sequences {sequences} must be a multiple of slots {stream.slots} in contiguous order")
        if not allow_repeat:
            self._refuse_small(stream, sequences)
        self.stream, self.sequences, self.rank, self.world = stream, sequences, rank, world
        self.next_sample, self.data_wait = next_sample, 0.0
        self._queue: queue.Queue[Rows | BaseException] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @staticmethod
    def _refuse_small(stream: TokenStream, sequences: int) -> None:
        for source in stream.describe():
            if source.samples_per_epoch < sequences * source.share:
                raise DatasetError(
                    f"source {source.name} has {source.samples_per_epoch} rows of {stream.sequence_length} tokens, "
                    f"a batch of {sequences} needs {sequences * source.share:g} of them; use smaller batches, "
                    f"a shorter sequence or more text, or allow repeats within a batch"
                )

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise StopIteration
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._fill, args=(self.next_sample,), name="potamos-loader", daemon=True
            )
            self._thread.start()
        begin = time.perf_counter()
        item = self._take(self._thread)
        self.data_wait += time.perf_counter() - begin
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        self.next_sample += self.sequences
        return item

    def _take(self, thread: threading.Thread) -> Rows | BaseException:
        """The next item; never waits for a thread that is gone (as after a fork)."""
        while True:
            try:
                return self._queue.get(timeout=5)
            except queue.Empty:
                if not thread.is_alive():
                    return RuntimeError("the loader's thread has ended; make the loader in the process that reads it")

    def _fill(self, sample: int) -> None:
        share = self.sequences // self.world
        try:
            while not self._stop.is_set():
                self._put(self.stream.read(sample + self.rank * share, share))
                sample += self.sequences
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(error)

    def _put(self, item: Rows | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def state_dict(self) -> dict[str, Any]:
        """State to continue after the batch handed out last; see `TokenStream.state_dict`."""
        return self.stream.state_dict(self.next_sample)

    def close(self) -> None:
        """Stop reading ahead and end the thread; safe to call twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Windows:
    """A whole dataset as non-overlapping windows in order, every token but the first a target exactly once.

    Rows have the shape of `TokenStream`'s. A chunk's last window is filled up with padding (document id -1).
    Positions of a document cut by a window's start count from the window's start.

    Args:
        path: a prepared dataset.
        sequence_length: L; each row holds L + 1 tokens.
        boundaries: ``isolate``, or ``cross`` for document id 0 wherever there is no padding.
        tokenizer_sha256, vocabulary: see `TokenDataset`, which also says what is raised.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sequence_length: int,
        boundaries: str = "isolate",
        tokenizer_sha256: str | None = None,
        vocabulary: int | None = None,
    ):
        if sequence_length < 1:
            raise MixtureError(f"sequence_length {sequence_length} must be at least 1")
        if boundaries not in ("isolate", "cross"):
            raise MixtureError(f"boundaries {boundaries!r} is unknown; known: isolate, cross")
        self.dataset = TokenDataset(path, tokenizer_sha256=tokenizer_sha256, vocabulary=vocabulary)
        self.sequence_length, self.boundaries = sequence_length, boundaries
        self._cut = self.dataset.cut(sequence_length, rest=True)

    def __len__(self) -> int:
        return self._cut.total

    def read(self, start: int, count: int) -> Rows:
        """Windows ``start`` to ``start + count - 1``; fewer at the end of the dataset."""
        numbers = np.arange(start, min(start + count, self._cut.total))
        chunk, place = self._cut.place(numbers)
        source = np.zeros(len(numbers), np.int32)
        width = self.sequence_length + 1
        tokens, document_ids, positions = read_rows([self.dataset], source, chunk, place, width)
        if self.boundaries == "cross":
            padding = document_ids < 0
            document_ids, positions = crossing(len(numbers), width)
            document_ids[padding], positions[padding] = -1, 0
        return Rows(tokens, document_ids, positions, numbers, source)
