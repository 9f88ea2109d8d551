"""What the fused mixer should reach on one H100 or H200, and how a measured table answers.

Published figures of FlashFFTConv (Fu, Kumbong, Nguyen, Re, "FlashFFTConv", 2023; H100-SXM, gated convolution, fp16) in
microseconds per million points: 7.1, 8.9, 15.2 at FFT sizes 4K, 8K, 16K. Its padded points are counted as if they were
tokens, the reading that favors it most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
FORWARD, BOTH = "forward", "forward+backward"
WIDTH, TOKENS = 768, 131_072
PUBLISHED = {4096: 7.1, 8192: 8.9, 16_384: 15.2}


@dataclass(frozen=True)
class Goal:
    """One criterion, for width 768 and 131,072 tokens in bf16 unless it says otherwise; None where a column has no
    figure."""

    criterion: str
    must: float | None
    goal: float | None
    moonshot: float | None
    at_most: bool
    value: Callable[[Sequence[Row]], float | None]

    def reached(self, value: float | None) -> str:
        """The highest of the three columns that `value` reaches; "" where nothing was measured."""
        if value is None:
            return ""
        for name in ("moonshot", "goal", "must"):
            bound = getattr(self, name)
            if bound is not None and (value <= bound if self.at_most else value >= bound):
                return name
        return "none"


def pick(
    rows: Iterable[Row], direction: str, lengths: Iterable[int], column: str, operation: str = "h3_mix"
) -> list[float]:
    """A column's values at width 768; empty if one of them was not measured."""
    which = (operation, WIDTH, direction)
    found = {r["length"]: r[column] for r in rows if (r["operation"], r["width"], r["direction"]) == which}
    values = [found.get(length) for length in lengths]
    return [float(v) for v in values if v is not None and v != ""] if None not in values and "" not in values else []


UP_TO_32K = tuple(1024 * 2**n for n in range(6))


def _milliseconds(length: int) -> Callable[[Sequence[Row]], float | None]:
    return lambda rows: next(iter(pick(rows, FORWARD, [length], "triton_ms")), None)


def _spread(rows: Sequence[Row]) -> float | None:
    values = pick(rows, FORWARD, UP_TO_32K, "triton_ms")
    return max(values) / min(values) if values else None


def _lowest(direction: str, column: str) -> Callable[[Sequence[Row]], float | None]:
    return lambda rows: min(pick(rows, direction, UP_TO_32K, column), default=None)


def _over_published(length: int) -> Callable[[Sequence[Row]], float | None]:
    def value(rows: Sequence[Row]) -> float | None:
        found = pick(rows, FORWARD, [length], "triton_ms")
        return PUBLISHED[length] / (found[0] * 1e3 / (TOKENS * WIDTH / 1e6)) if found else None

    return value


def _backward(rows: Sequence[Row]) -> float | None:
    forward, both = (pick(rows, direction, UP_TO_32K, "triton_ms") for direction in (FORWARD, BOTH))
    return max(b / f for b, f in zip(both, forward, strict=True)) if forward and both else None


def _saved(rows: Sequence[Row]) -> float | None:
    return max(pick(rows, BOTH, UP_TO_32K, "saved_over_inputs"), default=None)


def _long_conv(rows: Sequence[Row]) -> float | None:
    return min(pick(rows, FORWARD, (1024, 2048, 8192), "over_rfft", "long_conv"), default=None)


def _longest(rows: Sequence[Row]) -> float | None:
    return max((float(r["length"]) for r in rows if r.get("triton_ms") not in (None, "")), default=None)


GOALS = (
    Goal("forward ms, L = 2K", 0.60, 0.40, 0.30, True, _milliseconds(2048)),
    Goal("forward ms, L = 8K", 0.60, 0.40, 0.30, True, _milliseconds(8192)),
    Goal("forward, slowest / fastest of L = 1K..32K", None, 1.25, None, True, _spread),
    Goal(
        "forward, times faster than torch rfft, least of L = 1K..32K", 6, 10, 15, False, _lowest(FORWARD, "over_rfft")
    ),
    Goal("forward+backward, times faster than torch rfft, least", 5, 10, 15, False, _lowest(BOTH, "over_rfft")),
    Goal("forward, times FlashFFTConv as published, L = 4K", 1.2, 1.8, 2.4, False, _over_published(4096)),
    Goal("forward, times FlashFFTConv as published, L = 8K", 1.5, 2.2, 3.0, False, _over_published(8192)),
    Goal("forward, times FlashFFTConv as published, L = 16K", 2.5, 3.8, 5.1, False, _over_published(16_384)),
    Goal("forward+backward / forward, most of L = 1K..32K", 4, 3.2, None, True, _backward),
    Goal("saved for the backward / inputs", 1.4, 1.0, None, True, _saved),
    Goal("long_conv forward, times faster than torch rfft, least of L = 1K..8K", 3, None, None, False, _long_conv),
    Goal("tokens of the longest row", 131_072, 1_048_576, None, False, _longest),
)


def answer(rows: Sequence[Row], goals: Sequence[Goal] = GOALS) -> list[dict[str, Any]]:
    """The table of goals with what was measured; without rows, with that column empty."""
    result = []
    for goal in goals:
        value = goal.value(rows)
        bounds = {
            name: "" if (b := getattr(goal, name)) is None else f"{b:.10g}" for name in ("must", "goal", "moonshot")
        }
        side = "at most" if goal.at_most else "at least"
        measured = "" if value is None else f"{value:.4g}"
        result.append(
            {"criterion": goal.criterion, "is": side, **bounds, "measured": measured, "reached": goal.reached(value)}
        )
    return result
