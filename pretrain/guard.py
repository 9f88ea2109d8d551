"""Requests to stop, and the marker files that say how a run ended.

This module imports no torch: the command line installs the handlers first, so that a signal that arrives during the
seconds of `import torch` already ends in a saved checkpoint. What guards the optimizer's steps is in `spikes.py`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from potamos.files import write_atomically
from potamos.slurm.run_folder import RunFolder

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell reports it: 128 + SIGINT."""

# torchrun hands the Ctrl-C that its workers have received from the terminal on to them: one keystroke, two signals.
_ECHO_SECONDS = 1.0

_stop: Stop | None = None
_last_interrupt: float | None = None
_leaving = False


@dataclass(frozen=True)
class Stop:
    """A request to finish the step, save and leave with `exit_code`."""

    reason: str
    exit_code: int = 0


def install_signal_handlers() -> None:
    """Make SIGTERM, SIGUSR1 and SIGINT request a stop. Call it once, in the main thread, before `import torch`.

    SIGTERM (a cluster's preemption, `kill`) and SIGUSR1 (Slurm's warning before the time limit) end with exit code 0,
    because the run is whole and resumes by itself; SIGINT (Ctrl-C) ends with 130. A second SIGINT raises
    KeyboardInterrupt at once, for whoever does not want to wait for the step.
    """
    signal.signal(signal.SIGTERM, _request)
    signal.signal(signal.SIGUSR1, _request)
    signal.signal(signal.SIGINT, _interrupt)
    # A cluster's job starts its ranks with these held back, so that none kills a rank whose handlers are not set yet.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})


def ignore_signals() -> None:
    """At the end of a run: a request that comes now has nothing left to stop, and Python, as it leaves, gives signals
    their default action back, which would kill a rank that has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def stop_requested() -> Stop | None:
    """The first request to stop, or None. It is this process's own: agree with the other ranks before acting on it."""
    return _stop


def request_stop(reason: str, exit_code: int = 0) -> None:
    """Ask for a stop from within, as a signal would. The first request holds."""
    global _stop
    if _stop is None:
        _stop = Stop(reason, exit_code)


def clear_stop() -> None:
    """Forget a request, so that another run can start in this process."""
    global _stop, _last_interrupt
    _stop = _last_interrupt = None


def _request(number: int, frame: FrameType | None) -> None:
    request_stop(signal.Signals(number).name)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _last_interrupt
    now, last = time.monotonic(), _last_interrupt
    _last_interrupt = now
    if last is None:
        request_stop("SIGINT", INTERRUPTED)
        # Not print: the signal may have arrived in the middle of one.
        os.write(2, b"\nstopping after this step and saving; press Ctrl-C again to leave at once\n")
    elif not ("TORCHELASTIC_RUN_ID" in os.environ and now - last < _ECHO_SECONDS):
        global _leaving
        _leaving = True
        raise KeyboardInterrupt


def leaving() -> bool:
    """Whether a second SIGINT came. Libraries that call back into Python may turn its KeyboardInterrupt into an error
    of their own."""
    return _leaving


def write_stop(
    run: str | os.PathLike[str], attempt: int, stop: Stop, *, step: int, next_sample: int | None = None
) -> Path:
    """Write the marker `stop.<attempt>`: this attempt saved at `step` and left on request. Returns its path."""
    facts = {"attempt": attempt, "reason": stop.reason, "step": step, "next_sample": next_sample}
    return _mark(RunFolder.of(run).stop(attempt), facts)


def write_done(run: str | os.PathLike[str], *, step: int, next_sample: int, **facts: Any) -> Path:
    """Write the marker `done.json`: every step is trained. `facts` are further JSON values. Returns its path."""
    return _mark(RunFolder.of(run).done, {"step": step, "next_sample": next_sample, **facts})


def remove_done(run: str | os.PathLike[str]) -> None:
    """Remove `done.json`, for a finished run that goes on because its recipe asks for more steps."""
    RunFolder.of(run).done.unlink(missing_ok=True)


def _mark(path: Path, content: dict[str, Any]) -> Path:
    content["at"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_atomically(path, (json.dumps(content) + "\n").encode())
    return path
