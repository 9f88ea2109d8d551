"""The lock that a training process holds on its run folder: who holds it, and the mark of an attempt that was refused.

Ranks may outlive the job that started them: on a node that lost its network, Slurm declares it dead and starts the run
elsewhere. The lock keeps the two from training in one folder; `busy.<attempt>` tells the batch script that the attempt
was refused for that, which is neither a crash nor progress. Exit codes could not say so: of several ranks, srun kills
the others and reports one of them.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from potamos.files import write_atomically
from potamos.slurm.run_folder import RunFolder

POLL = 1.0  # seconds between two looks


def lock_holder(path: Path) -> str | None:
    """Who holds a run's lock, in its own words; None where nobody does. Looks without taking it, which a starting run
    would trip over."""
    linux = sys.platform.startswith("linux")
    layout = "hhqqi4x" if linux else "qqihh4x"  # struct flock: type, whence, start, length, process
    asked = (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0) if linux else (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
    try:
        with open(path, "rb") as file:
            answer = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, *asked)))
            held = answer[0 if linux else 3] != fcntl.F_UNLCK
            return (file.read(200).decode(errors="replace").strip() or "a process") if held else None
    except OSError:
        return None


def await_lock(run: str | os.PathLike[str], seconds: float, tell: Callable[[str], object]) -> str | None:
    """Wait until nobody holds a run's lock, or the run is cancelled; who holds it still after so many seconds."""
    folder, end, told = RunFolder.of(run), time.monotonic() + seconds, ""
    while (holder := lock_holder(folder.lock)) is not None:
        left = end - time.monotonic()
        if left <= 0 or folder.cancelled.exists():
            return holder
        if holder != told:
            tell(f"{holder} holds the run's lock, and trains here still; waiting {left / 60:.0f} min for it to end")
            told = holder
        time.sleep(min(POLL, left))
    return None


def mark_busy(run: str | os.PathLike[str], attempt: int, holder: str) -> None:
    """Leave word that ``attempt`` did not train, because ``holder`` does."""
    facts = {"attempt": attempt, "holder": holder, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    write_atomically(RunFolder.of(run).busy(attempt), (json.dumps(facts) + "\n").encode())
