"""When a run hangs: which rank is behind, in which collective, and where in the code, in one text file.

Ranks wait for each other in collectives, so one that never comes stops all, and without a word. Every rank runs a
watchdog: a thread that is told of progress and, when there has been none for too long, writes down where its rank is.
One of them joins the reports, names who is behind, and each ends its process, so that a scheduler can start again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

STARTING = 1.5
"""How many times the limit a start may be silent, since digesting a checkpoint tells of no progress; with the default
limit still less than a collective waits."""
EXIT_CODE = 75
"""EX_TEMPFAIL: the run may go on from its last checkpoint."""
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor",
    "reduce_scatter_single", "all_to_all_single", "broadcast", "barrier", "send", "recv", "batch_isend_irecv",
    "all_gather_object", "broadcast_object_list",
)  # fmt: skip


@dataclass
class Collectives:
    """How many collectives this process has entered through torch.distributed, and the last one."""

    count: int = 0
    last: str = "none"

    def watch(self) -> Callable[[], None]:
        """Count from now on; returns what ends it."""
        originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
        for name, original in originals.items():
            setattr(dist, name, self._counted(name, original))

        def end() -> None:
            for name, original in originals.items():
                setattr(dist, name, original)

        return end

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            tensors = [x for x in (*arguments, *named.values()) if hasattr(x, "shape")]
            self.last = f"{name} of {', '.join(str(tuple(x.shape)) for x in tensors) or 'objects'}"
            return original(*arguments, **named)

        return call


class Watchdog:
    """Ends a rank that makes no progress for `seconds`, with a report in `folder/hang.txt`.

        with Watchdog(folder, rank, world, seconds=1800) as watchdog:
            for step in ...:
                watchdog.beat(f"step {step}")

    What may take longer than `seconds` beats along the way; all ranks beat equally often, or those that do less would
    be said to be behind. Without `seconds` it does nothing, nor before it is entered, which it may be again and again.
    `exit` is what ends the process, for tests.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        *,
        seconds: float | None,
        gather: float = 5.0,
        exit: Callable[[int], Any] = os._exit,
    ) -> None:
        self.folder, self.rank, self.world, self.seconds, self.gather = folder, rank, world, seconds, gather
        self._exit = exit
        self._thread: threading.Thread | None = None
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._beat, self._doing, self._beats = time.monotonic(), "starting", 0
        self._limit = seconds
        self.collectives = Collectives()
        self._unwatch: Callable[[], None] = lambda: None

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            self._unwatch = self.collectives.watch()
            self._main, self._beat = threading.get_ident(), time.monotonic()
            self._ended.clear()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._unwatch()

    @contextlib.contextmanager
    def starting(self, doing: str) -> Iterator[None]:
        """Watch over what comes before the first step, with `STARTING` times the limit. doing: what comes first."""
        self._limit = None if self.seconds is None else STARTING * self.seconds
        try:
            with self:
                self.beat(doing)
                yield
        finally:
            self._limit = self.seconds

    def beat(self, doing: str) -> None:
        """Progress: what the rank turns to now."""
        self._beat, self._doing, self._beats = time.monotonic(), doing, self._beats + 1

    def _watch(self) -> None:
        assert self.seconds is not None
        assert self._limit is not None
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            waited = time.monotonic() - self._beat
            if waited > self._limit:
                try:
                    self._report(waited)
                except Exception as error:  # a report that cannot be written keeps nobody
                    why = f"{type(error).__name__}: {error}"
                    print(f"no progress for {waited:.0f} s, and no report of it: {why}", file=sys.stderr, flush=True)
                self._exit(EXIT_CODE)
                return

    def _report(self, waited: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self._part(self.rank)
        half = own.with_suffix(".half")
        half.write_text(self._words(waited), encoding="utf-8")
        os.replace(half, own)
        # Ranks notice within a second or so of each other; the lowest that is still there joins the parts. The others
        # stay until it has: a launcher that sees one leave kills the rest. If it never does, whoever waited joins them.
        self._ended.wait(self.gather)
        deadline = time.monotonic() + self.gather
        while own.exists():
            present = [rank for rank in range(self.world) if self._part(rank).exists()]
            if present[:1] == [self.rank] or time.monotonic() > deadline:
                self._join(waited)
                return
            self._ended.wait(min(0.05, self.gather))

    def _join(self, waited: float) -> None:
        parts: dict[int, str] = {}
        for rank in range(self.world):
            with contextlib.suppress(FileNotFoundError):  # no report, or another rank joins at this moment
                parts[rank] = self._part(rank).read_text(encoding="utf-8")
        if self.rank not in parts:
            return
        half = self._part(self.rank).with_suffix(".half")
        half.write_text(join(list(parts.values()), list(parts), self.world), encoding="utf-8")
        os.replace(half, self.folder / "hang.txt")
        print(f"no progress for {waited:.0f} s: see {self.folder / 'hang.txt'}", file=sys.stderr, flush=True)
        # The lowest last, or the one after it would take itself for the lowest.
        for rank in sorted(parts, reverse=True):
            self._part(rank).unlink(missing_ok=True)

    def _part(self, rank: int) -> Path:
        return self.folder / f".hang-{rank}.txt"

    def _words(self, waited: float) -> str:
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "(the main thread has ended)\n"
        return (
            f"{self.collectives.count} {self._beats}\n"
            f"rank {self.rank} on {os.uname().nodename}, process {os.getpid()}: no progress for {waited:.0f} s in "
            f"{self._doing!r}\n"
            f"collectives entered: {self.collectives.count}, the last: {self.collectives.last}\n{stack}"
        )


def join(parts: list[str], ranks: list[int], world: int) -> str:
    """One report of several ranks' parts: first what they have in common, then who is behind, then each in full."""
    places = {}
    for rank, part in zip(ranks, parts, strict=True):
        collectives, beats = part.split("\n", 1)[0].split()
        places[rank] = (int(beats), int(collectives))
    furthest = max(places.values())
    behind = [rank for rank, place in places.items() if place != furthest]
    silent = sorted(set(range(world)) - set(ranks))
    lines = [f"{len(ranks)} of {world} ranks report that nothing moves."]
    if silent:
        lines.append(
            f"No report from rank {', '.join(map(str, silent))}: look there first (killed, or its node is gone)."
        )
    if behind:
        lines.append(f"Behind the others: rank {', '.join(map(str, behind))}.")
    if not silent and not behind:
        lines.append("All ranks have entered the same number of collectives: look at the network.")
    bodies = [part.split("\n", 1)[1] for part in parts]
    order = sorted(range(len(ranks)), key=lambda i: (places[ranks[i]], ranks[i]))
    return "\n".join(lines) + "\n\n" + "\n".join(bodies[i] for i in order)
