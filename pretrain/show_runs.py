"""How `potamos status`, `doctor` and the table of a sweep print what they found. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from potamos.pretrain.console import duration
from potamos.pretrain.show import _table as table
from potamos.pretrain.show import line, out
from potamos.slurm.status import printable

if TYPE_CHECKING:
    from potamos.slurm.finding import Finding
    from potamos.slurm.status import Status
    from potamos.slurm.sweep import Row

STYLES = {
    "running": "green", "queued": "cyan", "requeued": "cyan", "finished": "bold", "failed": "red", "stale": "red",
    "cancelled": "yellow", "stopped": "yellow", "unknown": "yellow",
}  # fmt: skip
MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "wrong": ("WRONG", "red")}


def statuses(found: Sequence[Status]) -> None:
    """A line for each run; what is not known is left empty."""
    rows = table("run", "state", right=("step", "loss", "tokens/s", "ETA", "starts"), last="nodes")
    rows.add_column("why", overflow="fold")
    rows.columns[0].no_wrap, rows.columns[0].overflow = False, "fold"  # a name is for copying: never cut short
    for status in found:
        step = "" if status.step is None else f"{status.step:,}"
        step += "" if status.total_steps is None else f"/{status.total_steps:,}"
        behind = f"{status.behind} more in its chain" if status.behind else ""
        why = "; ".join(filter(None, [status.why, behind]))
        rows.add_row(
            Text(shorter(status.folder)),
            Text(status.state, style=STYLES.get(status.state, "")),
            step,
            "" if status.loss is None else f"{status.loss:.4f}",
            "" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}",
            "" if status.eta is None else duration(status.eta),
            (f"{status.attempts}" if status.attempts else "")
            + (f", {status.crashes} crashed" if status.crashes else ""),
            Text(printable(status.nodes)),
            Text(printable(why), style="dim"),
        )
    out.print(rows)


def shorter(folder: Path) -> str:
    """A folder as one would type it here, printable."""
    absolute = folder.absolute()
    here = Path.cwd()
    return printable(os.path.relpath(absolute, here) if absolute.is_relative_to(here) else absolute)


def sweep(rows: Sequence[Row]) -> None:
    """A table of what runs were told differently, and what became of them, best first."""
    from potamos.slurm.sweep import columns

    named = columns(rows)
    figures = ("step", "loss", "tokens/s")
    shown = table()
    for name, _ in named:
        shown.add_column(Text(name), justify="right" if name in figures or name.endswith("bits/byte") else "left")
    for cells in zip(*(cells for _, cells in named), strict=True):
        shown.add_row(*map(Text, cells))
    out.print(shown)


def finding(found: Finding) -> None:
    """One line of the doctor's, and how to mend it where it is not well."""
    word, style = MARKS[found.level]
    text = Text.assemble((f"{word:7}", style), f"  {found.subject}: {found.text}")
    out.print(text, soft_wrap=True)
    if found.remedy and found.level != "ok":
        line(f"         -> {found.remedy}")
