"""Skipping steps whose gradient is not finite or far beyond the recent ones, decided on the device.

The decision is a tensor that the optimizer's update is multiplied by or selected with; the host learns of it when it
logs. Asking for it at every step would make the host wait for the device at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Norms that hardly vary (a small standard deviation by chance, or none at all) must not make rounding a spike.
_LEAST_RELATIVE_STD = 0.01


@dataclass(frozen=True)
class SkippedStep:
    """A step whose update was not applied, and the global indices of its first and last sample."""

    step: int
    first: int
    last: int


class SpikeGuard:
    """Accepts a step when its loss and gradient norm are finite and the norm is no spike.

    With at least half a window of history, a spike is a norm above mean + `threshold` standard deviations of the last
    `window` accepted norms. Skipped norms do not enter the history: one giant would widen the rule for a whole window.
    A lasting change of level is no spike, though: after `patience` spikes in a row the history is forgotten, so that a
    run cannot go on skipping for ever. `threshold=None` skips only what is not finite.

    All state is on `device`, and only `report` waits for it. Every rank must give the same norm and loss, that is,
    those of the whole batch; each then decides the same.
    """

    def __init__(
        self, window: int, threshold: float | None, device: torch.device | str = "cpu", *, patience: int = 16
    ) -> None:
        if window < 2 or patience < 1:
            raise ValueError(f"a window of {window} and patience of {patience}: give at least 2 norms and 1 step")
        if threshold is not None and not threshold > 0:
            raise ValueError(f"the spike threshold is {threshold}: give standard deviations above 0, or none")
        self.window, self.threshold, self.patience = window, threshold, patience
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self._norms = torch.zeros(window, dtype=torch.float64, device=device)  # a ring; fp64: squares must not overflow
        self._entered = zero.clone()  # norms that entered the ring since it was last forgotten
        self._spikes = zero.clone()  # spikes in a row
        self._skipped = zero.clone()
        self._in_a_row = zero.clone()
        self._slots = torch.arange(window, device=device)
        self._recorded: list[tuple[SkippedStep, Tensor]] = []

    @property
    def skipped(self) -> Tensor:
        """Steps skipped in the whole run: int64, 0-dimensional, on the device."""
        return self._skipped

    @property
    def in_a_row(self) -> Tensor:
        """Steps skipped since the last accepted one: int64, 0-dimensional, on the device."""
        return self._in_a_row

    @torch.no_grad()
    def accept(self, norm: Tensor, loss: Tensor) -> Tensor:
        """Whether to apply this step: bool, 0-dimensional, on the device. Call it once a step.

        Args:
            norm: gradient norm before clipping, 0-dimensional.
            loss: training loss, 0-dimensional.
        """
        norm = norm.detach().to(torch.float64)
        finite = torch.isfinite(norm) & torch.isfinite(loss.detach())
        spike = finite & (norm > self._limit())
        accepted = finite & ~spike
        self._enter(norm, accepted)
        self._spikes = (self._spikes + spike) * ~accepted
        forget = self._spikes >= self.patience
        self._entered = self._entered * ~forget
        self._spikes = self._spikes * ~forget
        self._skipped = self._skipped + ~accepted
        self._in_a_row = (self._in_a_row + 1) * ~accepted
        return accepted

    def _limit(self) -> Tensor:
        """The largest norm that is no spike; infinite while there is too little history."""
        infinite = torch.full_like(self._norms[0], float("inf"))
        if self.threshold is None:
            return infinite
        known = self._slots < self._entered
        count = known.sum().clamp(min=2)
        mean = (self._norms * known).sum() / count
        variance = ((self._norms - mean).square() * known).sum() / (count - 1)
        spread = torch.maximum(variance.sqrt(), _LEAST_RELATIVE_STD * mean)
        enough = self._entered >= max(2, self.window // 2)
        return torch.where(enough, mean + self.threshold * spread, infinite)

    def _enter(self, norm: Tensor, accepted: Tensor) -> None:
        """Put an accepted norm into the ring, over the oldest."""
        here = accepted & (self._slots == self._entered % self.window)
        self._norms = torch.where(here, norm, self._norms)
        self._entered = self._entered + accepted

    def record(self, step: int, first: int, last: int, refused: Tensor) -> None:
        """Remember whether `step`, which trained samples `first` to `last` inclusive, was refused; for `report`.

        `refused` (0-dimensional, on the device, 0 or 1 of any dtype) is not read here.
        """
        self._recorded.append((SkippedStep(step, first, last), refused))

    def report(self) -> list[SkippedStep]:
        """The refused ones among the steps recorded since the last report. One transfer, which waits for the device."""
        if not self._recorded:
            return []
        flags = torch.stack([refused for _, refused in self._recorded]).tolist()
        skipped = [step for (step, _), refused in zip(self._recorded, flags, strict=True) if refused]
        self._recorded = []
        return skipped

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that `accept` depends on, for a checkpoint. Copy before the next step."""
        return {
            "norms": self._norms,
            "entered": self._entered,
            "spikes": self._spikes,
            "skipped": self._skipped,
            "in_a_row": self._in_a_row,
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state_tensors`.

        Raises:
            ValueError: a tensor is missing, unknown or has another shape (the window differs).
        """
        own = self.state_tensors()
        if tensors.keys() != own.keys():
            raise ValueError(f"the spike guard's state holds {sorted(tensors)}; expected {sorted(own)}")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
                raise ValueError(
                    f"the spike guard's {name!r} is {tensor.dtype} {tuple(tensor.shape)}, not {own[name].dtype} "
                    f"{tuple(own[name].shape)}: the window changed. Resume with the window the run began with."
                )
            setattr(self, f"_{name}", tensor.detach().to(own[name].device))
