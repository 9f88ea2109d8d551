"""What a run tells: TensorBoard, records, `state.json`, and a progress line or plain lines on the console.

    telemetry = Telemetry(run, attempt, total_steps=2000, step=start_step, tokens=start_tokens)
    telemetry.log(step, {"loss": 3.2, "lr": 1e-3}, next_sample=..., tokens=...)
    with telemetry.paused():
        ...  # validation, waiting for a save: does not count as training speed
    telemetry.close("done")

Only the main rank writes and prints; on the others every method does nothing. Values arrive as floats: whoever logs
has already read them from the device, once an interval.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from potamos.data.files import write_atomically
from potamos.pretrain.console import Console, make_console
from potamos.pretrain.environment import write_environment
from potamos.pretrain.plot import plot_loss
from potamos.pretrain.records import RecordWriter, attempt_number, read_metrics
from potamos.pretrain.run_folder import RunFolder

__all__ = ["Rate", "Telemetry", "attempt_number", "plot_loss", "read_metrics", "write_environment"]

_STATE_SECONDS = 1.0  # between two writes of state.json, each of which waits for the disk


class Rate:
    """Training speed and time left, from the last intervals between logs."""

    def __init__(self, *, step: int, tokens: int, clock: Callable[[], float], intervals: int = 20) -> None:
        self._clock = clock
        self._step, self._tokens, self._since, self._begin = step, tokens, clock(), clock()
        self._paused_here = self._paused = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=intervals)
        self._logs = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is no training: it slows the time left, but not the tokens per second."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused_here += self._clock() - begin

    def update(self, step: int, tokens: int) -> float:
        """Tokens per second since the last update."""
        now = self._clock()
        seconds = max(now - self._since - self._paused_here, 1e-9)
        speed = (tokens - self._tokens) / seconds
        if step > self._step:
            if self._logs == 1:
                self._recent.clear()  # the first interval held compilation and every first touch
            self._recent.append((seconds, step - self._step))
            self._logs += 1
        self._paused += self._paused_here
        self._step, self._tokens, self._since, self._paused_here = step, tokens, now, 0.0
        return speed

    def left(self, total_steps: int) -> float | None:
        """Seconds to the last step, from the median interval, so that one that stalled does not count; None at first.

        Stretched by the share of time that was spent paused.
        """
        if not self._recent:
            return None
        elapsed = max(self._since - self._begin, 1e-9)
        training = max(1.0 - self._paused / elapsed, 0.05)
        return max(total_steps - self._step, 0) * statistics.median(s / n for s, n in self._recent) / training


class Telemetry:
    """Writes what a run tells. Make one after it is known from which step the run goes on.

    Args:
        run: the run folder.
        attempt: this attempt's number, see `attempt_number`.
        total_steps: the last step of the recipe.
        step, next_sample, tokens: where this attempt begins. What earlier attempts recorded beyond `step` is
            superseded, in TensorBoard too.
        main: whether this rank writes and prints.
        stream: where the console goes; standard output by default. A terminal gets a live line, a file plain lines.
    """

    def __init__(
        self,
        run: Path,
        attempt: int,
        *,
        total_steps: int,
        step: int = 0,
        next_sample: int = 0,
        tokens: int = 0,
        main: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._main, self._attempt, self._total = main, attempt, total_steps
        self._folder, self._clock = RunFolder(run), clock
        self._rate = Rate(step=step, tokens=tokens, clock=clock)
        self._state: dict[str, Any] = {"attempt": attempt, "step": step, "next_sample": next_sample}
        self._state |= {"total_steps": total_steps, "loss": None, "tokens_per_second": None, "eta": None}
        self._state_written = -float("inf")
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter  # a second of imports that only this rank needs

        self._records = RecordWriter(run, attempt)
        self._records.write("start", step, next_sample, tokens, {})
        # TensorBoard drops events of earlier files from purge_step on: replayed steps do not show twice.
        self._board = SummaryWriter(str(self._folder.tensorboard), purge_step=step + 1 if step else 0)
        self._console: Console = make_console(stream or sys.stdout, step=step, total_steps=total_steps)
        self._write_state("running", now=True)

    def log(self, step: int, metrics: Mapping[str, float], *, next_sample: int, tokens: int) -> None:
        """Tell of training up to `step`. Names without a slash become `train/<name>` in TensorBoard.

        Args:
            step: finished optimizer steps.
            metrics: `loss` (nats per token) is shown and kept in `state.json`; `bits_per_byte` and `lr` are shown.
            next_sample: global index of the first sample not trained on yet.
            tokens: tokens trained on since the run began.
        """
        if not self._main:
            return
        speed = self._rate.update(step, tokens)
        left = self._rate.left(self._total)
        metrics = {**metrics, "tokens_per_second": speed}
        self._records.write("train", step, next_sample, tokens, metrics)
        self._scalars("train", step, {**metrics, "tokens": tokens})
        self._state |= {"step": step, "next_sample": next_sample, "loss": metrics.get("loss")}
        self._state |= {"tokens_per_second": speed, "eta": left}
        self._write_state("running")
        self._console.progress(step, metrics, left)

    def validation(self, step: int, metrics: Mapping[str, float], *, next_sample: int, tokens: int) -> None:
        """Tell of a validation after `step`. Names become `validation/<name>` in TensorBoard."""
        if not self._main:
            return
        self._records.write("validation", step, next_sample, tokens, metrics)
        self._scalars("validation", step, metrics)
        values = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
        self._console.line(f"step {step}  validation  {values}")

    def text(self, tag: str, step: int, text: str) -> None:
        """Put a text (a generated sample, the recipe) into TensorBoard, as it is."""
        if self._main:
            indented = "".join(f"    {line}\n" for line in text.splitlines())  # Markdown's form of "as it is"
            self._board.add_text(tag, indented, step)
            self._board.flush()

    def say(self, message: str) -> None:
        """Print a line without disturbing the progress line."""
        if self._main:
            self._console.line(message)

    def paused(self) -> AbstractContextManager[None]:
        """Context manager: the time spent inside does not count as training speed."""
        return self._rate.paused()

    def close(self, reason: str) -> None:
        """Write the last `state.json` with why the run ended, and close all files. Further calls do nothing."""
        if self._main:
            self._main = False
            self._write_state(reason, now=True)
            self._console.close()
            self._records.close()
            self._board.close()

    def _scalars(self, group: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            tag = name if group == "train" and "/" in name else f"{group}/{name}"
            self._board.add_scalar(tag, float(value), step)
        self._board.flush()  # a killed run keeps what was logged; steps before the checkpoint are not trained again

    def _write_state(self, reason: str, *, now: bool = False) -> None:
        if not now and self._clock() - self._state_written < _STATE_SECONDS:
            return
        self._state_written = self._clock()
        state = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has neither
            for name, value in self._state.items()
        }
        state |= {"reason": reason, "updated": datetime.now(UTC).isoformat(timespec="seconds")}
        write_atomically(self._folder.state, json.dumps(state).encode() + b"\n")
