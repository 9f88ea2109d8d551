"""What a run tells: TensorBoard, records, `state.json`, and a progress line or plain lines on the console.

    telemetry = Telemetry(run, attempt, total_steps=2000, tokens_before=tokens_before, step=step, next_sample=sample)
    telemetry.log(step, {"loss": 3.2, "learning_rate": 1e-3}, next_sample=next_sample)
    telemetry.validation(step, {"heldout/loss": 3.3}, next_sample=next_sample)
    telemetry.close("finished")

Only the main rank writes and prints; on the others every method does nothing. Values arrive as floats: whoever logs
has already read them from the device, once an interval.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

from potamos.files import write_atomically
from potamos.pretrain.console import Console, make_console
from potamos.pretrain.environment import write_environment
from potamos.pretrain.plot import plot_loss
from potamos.pretrain.records import RecordWriter, attempt_number, read_metrics
from potamos.slurm.run_folder import RunFolder

__all__ = ["Progress", "Telemetry", "attempt_number", "plot_loss", "read_metrics", "write_environment"]

logger = logging.getLogger(__name__)

# What TensorBoard's page of custom scalars draws in one chart.
_CHARTS = {
    "speed": {
        "tokens per second, reached and planned": [
            "Multiline",
            ["train/tokens_per_second", "plan/predicted_tokens_per_second"],
        ]
    }
}

_STATE_SECONDS = 1.0  # between two writes of state.json, each of which waits for the disk


class Progress:
    """The time left, from the wall clock between logs: validations and saves are part of what is still to come."""

    def __init__(self, step: int, clock: Callable[[], float], *, intervals: int = 50) -> None:
        self._clock, self._step, self._since = clock, step, clock()
        self._recent: deque[tuple[float, int]] = deque(maxlen=intervals)  # seconds, steps
        self._first = True

    def update(self, step: int) -> float:
        """Seconds since the last update; remembers them."""
        now = self._clock()
        seconds = now - self._since
        if step > self._step:
            if self._first and self._recent:
                self._recent.clear()  # the first interval held compilation and every first touch
                self._first = False
            self._recent.append((seconds, step - self._step))
        self._step, self._since = step, now
        return seconds

    def left(self, total_steps: int) -> float | None:
        """Seconds to the last step; None before the first log. An interval counts for at most ten usual ones."""
        if not self._recent:
            return None
        usual = statistics.median(seconds / steps for seconds, steps in self._recent)
        seconds = sum(min(seconds, 10 * usual * steps) for seconds, steps in self._recent)
        return max(total_steps - self._step, 0) * seconds / sum(steps for _, steps in self._recent)


class Telemetry:
    """Writes what a run tells. Make one after it is known from which step the run goes on.

    Args:
        run: the run folder.
        attempt: this attempt's number, see `attempt_number`.
        total_steps: the last step of the recipe.
        tokens_before: tokens that are trained on when the run comes to a sample; not in proportion to it where samples
            are left out.
        step, next_sample: where this attempt begins. What earlier attempts recorded beyond `step` is superseded, in
            TensorBoard too.
        save_every: how many steps apart checkpoints are to be, for whoever watches the run.
        main: whether this rank writes and prints.
        stream: where the console goes; standard output by default. A terminal gets a live line, a file plain lines.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        attempt: int,
        *,
        total_steps: int,
        tokens_before: Callable[[int], int],
        step: int = 0,
        next_sample: int = 0,
        save_every: int | None = None,
        main: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.attempt = attempt
        self._main, self._total, self._tokens_before = main, total_steps, tokens_before
        self._folder, self._clock = RunFolder.of(run), clock
        self._progress, self._tokens = Progress(step, clock), tokens_before(next_sample)
        self._state: dict[str, Any] = {"attempt": attempt, "step": step, "next_sample": next_sample}
        self._state |= {"total_steps": total_steps, "loss": None, "tokens_per_second": None, "eta": None}
        self._state |= {"save_every": save_every, "save_failed": None}
        self._state_written = -float("inf")
        self._complained: set[int | None] = set()
        if not main:
            return
        self._records = RecordWriter(run, attempt)
        self._records.write("start", step, next_sample, self._tokens, {})
        # TensorBoard drops events of earlier files from purge_step on: replayed steps do not show twice.
        self._board = self._open_board(purge_step=step + 1 if step else 0)
        self._to_board(lambda board: board.add_custom_scalars(_CHARTS))
        self._console: Console = make_console(stream or sys.stdout, step=step, total_steps=total_steps)
        self._write_state("running", now=True)

    def log(
        self,
        step: int,
        metrics: Mapping[str, float],
        *,
        next_sample: int,
        save_failed: tuple[int, str] | None = None,
    ) -> None:
        """Tell of training up to `step`. Names without a slash become `train/<name>` in TensorBoard.

        Args:
            step: finished optimizer steps.
            metrics: any names; `loss` (nats per token) also goes into `state.json`. `tokens_per_second` is taken from
                the wall clock since the last log unless given.
            next_sample: global index of the first sample not trained on yet.
            save_failed: the step of the last checkpoint, and why it could not be written; None where it could.
        """
        if not self._main:
            return
        tokens = self._tokens_before(next_sample)
        seconds = self._progress.update(step)
        left = self._progress.left(self._total)
        metrics = {"tokens_per_second": (tokens - self._tokens) / max(seconds, 1e-9), **metrics}
        self._tokens = tokens
        tags = {name if "/" in name else f"train/{name}": value for name, value in metrics.items()}
        with self._tolerating():
            self._records.write("train", step, next_sample, tokens, metrics)
        self._scalars(tags | {"train/tokens": tokens}, step)
        self._state |= {"step": step, "next_sample": next_sample, "loss": metrics.get("loss")}
        self._state |= {"tokens_per_second": metrics["tokens_per_second"], "eta": left}
        self._state["save_failed"] = save_failed and {"step": save_failed[0], "why": save_failed[1]}
        self._write_state("running")
        self._console.progress(step, metrics, left)

    def validation(self, step: int, metrics: Mapping[str, float], *, next_sample: int) -> None:
        """Tell of a validation after `step`, `<dataset>/<name>` in each name where there are several datasets.

        Names become `validation/<name>` in TensorBoard.
        """
        if not self._main:
            return
        with self._tolerating():
            self._records.write("validation", step, next_sample, self._tokens_before(next_sample), metrics)
        self._scalars({f"validation/{name}": value for name, value in metrics.items()}, step)
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._console.line(f"step {step}  validation  {values}")

    def text(self, tag: str, step: int, text: str) -> None:
        """Put a text (a generated sample, the recipe) into TensorBoard, as it is."""
        if self._main:
            indented = "".join(f"    {line}\n" for line in text.splitlines())  # Markdown's form of "as it is"
            self._to_board(lambda board: board.add_text(tag, indented, step))

    def note(self, message: str) -> None:
        """Print a line without disturbing the progress line, and keep it in `logs/notes.log`."""
        if self._main:
            self._console.line(message)
            stamp = datetime.now(UTC).isoformat(timespec="seconds")
            with self._tolerating(), open(self._folder.notes, "a", encoding="utf-8") as file:
                file.write(f"{stamp}  attempt {self.attempt}  {message}\n")

    def close(self, reason: str) -> None:
        """Write the last `state.json` with why the run ended, and close all files. Further calls do nothing."""
        if self._main:
            self._main = False
            self._write_state(reason, now=True)
            self._console.close()
            self._records.close()
            self._to_board(lambda board: board.close())

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        def write(board: Any) -> None:
            for tag, value in values.items():
                board.add_scalar(tag, float(value), step)

        self._to_board(write)

    def _open_board(self, purge_step: int | None = None) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # a second of imports that only this rank needs

        return SummaryWriter(str(self._folder.tensorboard), purge_step=purge_step)

    def _to_board(self, write: Callable[[Any], None]) -> None:
        with self._tolerating():
            try:
                self._board = self._board or self._open_board()
                write(self._board)
                self._board.flush()  # what a killed run had logged before its checkpoint is never logged again
            except OSError:
                self._board = None  # its thread has ended: the next call tries another file
                raise

    def _write_state(self, reason: str, *, now: bool = False) -> None:
        if not now and self._clock() - self._state_written < _STATE_SECONDS:
            return
        self._state_written = self._clock()
        state = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has neither
            for name, value in self._state.items()
        }
        state |= {"reason": reason, "updated": datetime.now(UTC).isoformat(timespec="seconds")}
        with self._tolerating():
            write_atomically(self._folder.state, json.dumps(state).encode() + b"\n")

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        """A disk that is full must not end training for the sake of a record: one warning for each reason."""
        try:
            yield
        except OSError as error:
            if error.errno not in self._complained:
                self._complained.add(error.errno)
                logger.warning("something could not be recorded in %s: %s. Training goes on.", self._folder.path, error)
