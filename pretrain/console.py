"""How progress is printed: one live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TextIO


class Console(Protocol):
    def progress(self, step: int, metrics: Mapping[str, float], left: float | None) -> None:
        """Show where training stands; `left` is seconds to the end."""
        ...

    def line(self, text: str) -> None:
        """Print a line that stays."""
        ...

    def close(self) -> None: ...


def make_console(stream: TextIO, *, step: int, total_steps: int) -> Console:
    return (TerminalConsole if stream.isatty() else PlainConsole)(stream, step, total_steps)


class PlainConsole:
    """A line for each log, flushed, for files that are followed with `tail -f`."""

    def __init__(self, stream: TextIO, step: int, total_steps: int) -> None:
        self._stream, self._total = stream, total_steps

    def progress(self, step: int, metrics: Mapping[str, float], left: float | None) -> None:
        width = len(str(self._total))
        self.line("  ".join([f"step {step:{width}d}/{self._total}", *_shown(metrics), f"ETA {duration(left)}"]))

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


class TerminalConsole:
    """A bar that is redrawn in place, with other lines printed above it."""

    def __init__(self, stream: TextIO, step: int, total_steps: int) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[shown]}"),
            console=RichConsole(file=stream, highlight=False),
            auto_refresh=False,  # no thread beside training: redrawn when there is news
        )
        self._task = self._progress.add_task("", total=total_steps, completed=step, shown="starting")
        self._progress.start()
        self._progress.refresh()

    def progress(self, step: int, metrics: Mapping[str, float], left: float | None) -> None:
        shown = "  ".join([*_shown(metrics), f"ETA {duration(left)}"])
        self._progress.update(self._task, completed=step, shown=shown, refresh=True)

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def duration(seconds: float | None) -> str:
    """`1:02:03`, `2:03`, or `?` where it is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _shown(metrics: Mapping[str, float]) -> list[str]:
    """What a line has room for."""
    formats = {
        "loss": "loss {:.4f}",
        "bits_per_byte": "{:.4f} bits/byte",
        "learning_rate": "lr {:.2e}",
        "gradient_norm/total": "norm {:.2f}",
        "tokens_per_second": "{:,.0f} tokens/s",
    }
    return [text.format(metrics[name]) for name, text in formats.items() if name in metrics]
