"""When the ranks of a pipeline work and when they wait: the schedules' own action lists, played with given costs.

A bubble's share is the time in which a rank is idle between a step's first and last action, over that time, averaged
over ranks. Formulas: Huang et al. 2019 (GPipe), Narayanan et al. 2021 (interleaved 1F1B), Lamy-Poirier 2022
(breadth-first), Qi et al. 2023 and 2024 (zero bubble, ZBV), DeepSeek-AI 2024 (DualPipe, here in its V form).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal

from potamos.parallel.mesh import LayoutError
from potamos.parallel.pipeline import SCHEDULES, held_stages

Kind = Literal["forward", "backward", "backward_input", "backward_weight"]

KINDS: dict[str, Kind] = {
    "FORWARD": "forward",
    "FULL_BACKWARD": "backward",
    "BACKWARD_INPUT": "backward_input",
    "BACKWARD_WEIGHT": "backward_weight",
}
EQUAL_COSTS: dict[Kind, float] = {"forward": 1.0, "backward": 2.0, "backward_input": 1.0, "backward_weight": 1.0}
"""A stage's forward, its gradient by inputs and that by weights cost the same."""


@dataclass(frozen=True)
class Action:
    """One micro-batch through one stage, one way."""

    kind: Kind
    stage: int
    micro: int


@dataclass(frozen=True)
class Timeline:
    """length: from a step's begin to its last action. busy: of each rank."""

    length: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.length)


@lru_cache(maxsize=32)
def actions(schedule: str, ranks: int, micro: int) -> Sequence[Sequence[Action]]:
    """What each rank does in a step, in order.

    Raises LayoutError where the schedule does not take that many micro-batches.
    """
    known = SCHEDULES[schedule]
    total = ranks * known.stages
    stages: Any = [_stage(index, ranks, total) for index in held_stages(known, 0, ranks)]
    try:
        made = known.kind(stages if known.stages > 1 else stages[0], micro, loss_fn=lambda *_: None)
    except ValueError as error:
        raise LayoutError(
            f"parallel.schedule: {schedule} with {micro} micro-batches on {ranks} ranks: {error}"
        ) from None
    if schedule == "1f1b":
        return [_one_forward_one_backward(rank, ranks, micro) for rank in range(ranks)]
    order = made.pipeline_order if known.stages > 1 else made._get_pipeline_order()
    return [[action for entry in order[rank] for action in _actions_of(entry)] for rank in range(ranks)]


def simulate(order: Sequence[Sequence[Action]], cost: Callable[[Action], float], stages: int) -> Timeline:
    """Play the lists: an action begins when its rank is free and what it needs from other stages is there."""
    done: dict[Action, float] = {}
    free, at = [0.0] * len(order), [0] * len(order)
    waiting = True
    while waiting:
        waiting = False
        for rank, own in enumerate(order):
            while at[rank] < len(own):
                action = own[at[rank]]
                ready = _ready(done, action, stages)
                if ready is None:
                    break
                free[rank] = done[action] = max(free[rank], ready) + cost(action)
                at[rank] += 1
                waiting = True
    assert all(i == len(own) for i, own in zip(at, order, strict=True)), "a schedule's actions wait for each other"
    busy = tuple(sum(cost(action) for action in own) for own in order)
    return Timeline(max(free), busy)


def _ready(done: Mapping[Action, float], action: Action, stages: int) -> float | None:
    """When what an action needs from other actions is there; None while it is not."""
    stage, micro = action.stage, action.micro
    if action.kind == "forward":
        return done.get(Action("forward", stage - 1, micro)) if stage else 0.0
    if action.kind == "backward_weight":
        return done.get(Action("backward_input", stage, micro))
    if stage == stages - 1:
        return done.get(Action("forward", stage, micro))
    found = (done.get(Action(kind, stage + 1, micro)) for kind in ("backward", "backward_input"))
    return next((time for time in found if time is not None), None)


def bubble(schedule: str, ranks: int, micro: int) -> float:
    """Share of idle time by the schedule's formula, with equal stages (`EQUAL_COSTS`).

    With P ranks, n micro-batches and v stages a rank: GPipe and 1F1B (P-1) / (n + P-1); interleaved and breadth-first,
    for n >= P, (P-1) / (v n + P-1). Schedules that split the backward fill all of the wait but P-1 forwards of a stage:
    (P-1) / (3 v n + P-1), for n >= P, and n >= 2P on a V. Elsewhere the lists are played.
    """
    known = SCHEDULES[schedule]
    wait = ranks - 1
    if known.stages == 1:
        return wait / (micro + wait)
    if schedule in ("interleaved_1f1b", "looped_bfs") and micro >= ranks:
        return wait / (known.stages * micro + wait)
    if schedule not in ("interleaved_1f1b", "looped_bfs") and micro >= ranks * (2 if known.v else 1):
        return wait / (3 * known.stages * micro + wait)
    order = actions(schedule, ranks, micro)
    return simulate(order, lambda action: EQUAL_COSTS[action.kind], ranks * known.stages).bubble


def _one_forward_one_backward(rank: int, ranks: int, micro: int) -> list[Action]:
    """Forwards until a gradient can be there, then in turns (torch lists this schedule wrongly, but runs it so)."""
    warm = min(micro, ranks - rank)
    order = [Action("forward", rank, i) for i in range(warm)]
    for i in range(micro):
        order.append(Action("backward", rank, i))
        if warm + i < micro:
            order.append(Action("forward", rank, warm + i))
    return order


def _stage(index: int, ranks: int, total: int) -> Any:
    """As much of a stage as torch's schedules look at to make their lists."""
    return SimpleNamespace(
        group_size=ranks, group_rank=0, num_stages=total, stage_index=index, is_first=index == 0,
        is_last=index == total - 1, submod=None, has_backward=True,
    )  # fmt: skip


def _actions_of(entry: Any) -> Iterator[Action]:
    if entry is None:
        return
    if entry.sub_actions:
        for part in entry.sub_actions:
            yield from _actions_of(part)
    elif entry.computation_type.name in KINDS:
        yield Action(KINDS[entry.computation_type.name], entry.stage_index, entry.microbatch_index)
