"""How long commands over data tell where they are: a bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from potamos.pretrain import show
from potamos.pretrain.console import duration

if TYPE_CHECKING:
    from potamos.data.commands import Progress

BAR_SECONDS = 0.1  # between two drawings
LINE_SECONDS = 10.0  # between two lines


@contextmanager
def preparing() -> Iterator[Callable[[Progress], None]]:
    """What `prepare` reports to."""
    with _meter() as meter:
        began = time.monotonic()

        def report(at: Progress) -> None:
            seconds = max(time.monotonic() - began, 1e-9)
            share = at.bytes_read / at.bytes_total if at.bytes_total else 0.0
            left = duration(seconds / share - seconds if 0 < share <= 1 else None)
            meter(
                at.bytes_read,
                at.bytes_total,
                f"{at.stage}  input {min(at.part + 1, at.parts)} of {at.parts}  {at.documents:,} documents  "
                f"{at.tokens:,} tokens  {at.text_bytes / seconds / 1e6:.1f} MB/s of text  ETA {left}",
            )

        yield report


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """What reports how many of how many things are done."""
    with _meter() as meter:
        yield lambda done, total: meter(done, total, f"{done:,} of {total:,} {what}")


@contextmanager
def _meter() -> Iterator[Callable[[float, float, str], None]]:
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("{task.fields[shown]}"))
    with Bars(*columns, console=show.err, auto_refresh=False, transient=True) as bars:
        task, drawn = bars.add_task("", shown=""), 0.0

        def draw(done: float, total: float, text: str) -> None:
            nonlocal drawn
            now = time.monotonic()
            bars.update(task, completed=done, total=total or None, shown=text)
            if now - drawn >= BAR_SECONDS or done == total:
                drawn = now
                bars.refresh()

        yield draw


class _Lines:
    """Prints a line when the last one is old enough; what takes less time tells nothing on the way."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, done: float, total: float, text: str) -> None:
        now = time.monotonic()
        if now - self._told >= LINE_SECONDS:
            self._told = now
            show.note(f"{100 * done / total if total else 0:.0f} %  {text}")
