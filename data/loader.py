"""What a trainer reads from: this rank's rows of every global batch."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from potamos.data.errors import DatasetError, MixtureError
from potamos.data.rows import Rows
from potamos.data.stages import SourceSpec, StageSpec
from potamos.data.stream import TokenStream
from potamos.data.usage import SourcePlan, SourceSummary
from potamos.data.windows import Windows

__all__ = ["Loader", "Rows", "SourcePlan", "SourceSpec", "SourceSummary", "StageSpec", "TokenStream", "Windows"]

GROUP = 2**17  # tokens handed from thread to thread at once: a hand-over costs as much as cutting 10^4 of them
CLOSING = 10.0  # seconds that `close` waits for a batch in the making
WATCHING = 5.0  # seconds between looks whether the thread that is waited for is still there

_Batch = tuple[int, Rows]  # place where the global batch begins, this rank's rows


class Loader:
    """Iterator over this rank's slice of each global batch, read ahead by one thread.

    A global batch holds the next ``sequences`` samples that are not skipped; rank r of W gets its r-th of W equal
    slices, so the batches joined over ranks are the same for every W. Ranks that hold parts of one model (tensor,
    pipeline, sequence or expert peers) give the same data rank and get the same rows. Use it as a context manager, or
    call `close`.

    Args:
        stream: where rows come from.
        sequences: rows of a global batch; a multiple of ``world``.
        rank, world: this data-parallel rank and their number.
        next_sample: place where the first batch begins.
        allow_repeat: accept a batch larger than one epoch of a source's share in it.
        ahead: batches kept ready, at least. Small ones are kept ready by the `GROUP`.

    Attributes:
        next_sample: place where the batch that comes next begins; batches only read ahead do not count.
        data_wait: seconds the consumer has waited for rows so far.

    Raises:
        MixtureError: sizes that do not fit together.
        DatasetError: a source smaller than its share of one batch. Later, from the iteration: whatever went wrong in
            reading or fetching, and again at every further call.
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
        if stream.slots is not None and (sequences % stream.slots or next_sample % stream.slots):
            raise MixtureError(
                f"sequences {sequences} from sample {next_sample}: both must be a multiple of slots {stream.slots} in "
                f"contiguous order"
            )
        if not allow_repeat:
            _refuse_small(stream, sequences)
        self.stream, self.sequences, self.rank, self.world = stream, sequences, rank, world
        self.next_sample, self.data_wait = next_sample, 0.0
        self._group = max(1, GROUP // (sequences // world * (stream.sequence_length + 1)))
        self._held: deque[_Batch | BaseException] = deque()  # handed over, not asked for yet
        # Two queues in C cost a fraction of a queue.Queue: groups that are ready, and leave to make another.
        self._ready: queue.SimpleQueue[list[_Batch | BaseException]] = queue.SimpleQueue()
        self._leave: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(max(1, ahead)):
            self._leave.put(None)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

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
        if not self._held:
            begin = time.perf_counter()
            self._held.extend(self._take(self._thread))
            self._leave.put(None)
            self.data_wait += time.perf_counter() - begin
        item = self._held.popleft()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        begins, rows = item
        assert begins == self.next_sample, f"batch from sample {begins} where {self.next_sample} comes next"
        self.next_sample = self.stream.after(begins, self.sequences)
        return rows

    def _take(self, thread: threading.Thread) -> list[_Batch | BaseException]:
        """The next group; never waits for a thread that is gone (as after a fork)."""
        while True:
            try:
                return self._ready.get(timeout=WATCHING)
            except queue.Empty:
                if not thread.is_alive() and self._ready.empty():
                    return [RuntimeError("the loader's thread has ended; make the loader in the process that reads it")]

    def _fill(self, sample: int) -> None:
        """The thread: groups of batches, the first of one batch so that it comes early."""
        group, share = 1, self.sequences // self.world
        while True:
            self._leave.get()
            items: list[_Batch | BaseException] = []
            try:
                for _ in range(group):
                    if self._stop.is_set():
                        return
                    items.append((sample, self.stream.read(self.stream.after(sample, self.rank * share), share)))
                    sample = self.stream.after(sample, self.sequences)
            except BaseException as error:  # handed to the consumer, whatever it is, behind the batches before it
                self._ready.put([*items, error])
                return
            self._ready.put(items)
            group = min(2 * group, self._group)

    def state_dict(self) -> dict[str, Any]:
        """State to continue after the batch handed out last; see `TokenStream.state_dict`."""
        return self.stream.state_dict(self.next_sample)

    def close(self) -> None:
        """Stop reading ahead and end the thread; safe to call twice.

        A thread that waits for a fetch ends when that does, and with the process at the latest.
        """
        self._stop.set()
        self._leave.put(None)
        if self._thread is not None:
            self._thread.join(CLOSING)
            self._thread = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_small(stream: TokenStream, sequences: int) -> None:
    for source in stream.describe():
        if source.samples_per_epoch < sequences * source.share:
            raise DatasetError(
                f"source {source.name} has {source.samples_per_epoch} rows of {stream.sequence_length} tokens, a batch "
                f"of {sequences} needs {sequences * source.share:g} of them; use smaller batches, a shorter sequence "
                f"or more text, or allow repeats within a batch"
            )
