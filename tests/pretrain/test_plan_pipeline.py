"""Bubbles: the formulas against the schedules' own action lists, played action by action with unit costs."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules

from potamos.parallel.mesh import LayoutError
from potamos.parallel.pipeline import SCHEDULES, held_stages
from potamos.pretrain.plan_pipeline import EQUAL_COSTS, Action, actions, bubble, simulate

SIZES = [(2, 4), (2, 8), (3, 6), (4, 4), (4, 8), (4, 12), (8, 16)]


def idle_share(order: list[list[Action]], stages: int) -> Fraction:
    """By time steps of one forward: every rank takes its next action as soon as what it needs is finished."""
    finished: dict[tuple[str, int, int], int] = {}
    at, ends, clock = [0] * len(order), [0] * len(order), 0
    while any(i < len(own) for i, own in zip(at, order, strict=True)):
        for rank, own in enumerate(order):
            if at[rank] == len(own) or ends[rank] > clock:
                continue
            kind, stage, micro = own[at[rank]].kind, own[at[rank]].stage, own[at[rank]].micro
            if kind == "forward":
                needs = ("F", stage - 1, micro) if stage else None
            elif kind == "backward_weight":
                needs = ("I", stage, micro)
            else:
                needs = ("F", stage, micro) if stage == stages - 1 else ("I", stage + 1, micro)
            if needs is not None and finished.get(needs, clock + 1) > clock:
                continue
            ends[rank] = clock + (2 if kind == "backward" else 1)
            finished[{"forward": "F", "backward_weight": "W"}.get(kind, "I"), stage, micro] = ends[rank]
            at[rank] += 1
        clock += 1
        assert clock < 10_000, "the lists wait for each other"
    busy = sum(2 if action.kind == "backward" else 1 for own in order for action in own)
    return 1 - Fraction(busy, max(ends) * len(order))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_formulas_are_what_the_lists_give(schedule: str) -> None:
    for ranks, micro in SIZES:
        if schedule == "dualpipe_v" and micro < 2 * ranks:
            continue
        stages = ranks * SCHEDULES[schedule].stages
        order = [list(own) for own in actions(schedule, ranks, micro)]
        expected = idle_share(order, stages)
        assert bubble(schedule, ranks, micro) == pytest.approx(float(expected), abs=1e-12), (ranks, micro)
        played = simulate(order, lambda action: EQUAL_COSTS[action.kind], stages)
        assert played.bubble == pytest.approx(float(expected), abs=1e-12)
        assert 0.0 < played.bubble < 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_rank_does_each_of_its_micro_batches_once_each_way(schedule: str) -> None:
    ranks, micro = 4, 8
    for rank, own in enumerate(actions(schedule, ranks, micro)):
        held = held_stages(SCHEDULES[schedule], rank, ranks)
        every = [(stage, i) for stage in sorted(held) for i in range(micro)]
        assert sorted((a.stage, a.micro) for a in own if a.kind == "forward") == every
        inputs = [a for a in own if a.kind in ("backward", "backward_input")]
        weights = [a for a in own if a.kind in ("backward", "backward_weight")]
        assert sorted((a.stage, a.micro) for a in inputs) == every
        assert sorted((a.stage, a.micro) for a in weights) == every


class RecordedStage(SimpleNamespace):
    """Notes what torch's 1F1B asks of a stage; it sends nothing."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: []

    def forward_one_chunk(self, micro: int, *_, **__):
        self.done.append(Action("forward", self.stage_index, micro))

    def backward_one_chunk(self, micro: int, **_):
        self.done.append(Action("backward", self.stage_index, micro))


@pytest.mark.parametrize(("ranks", "micro"), [(2, 5), (4, 8), (4, 4)])
def test_one_forward_one_backward_is_what_torch_runs(ranks: int, micro: int, monkeypatch) -> None:
    """torch's printed list of this schedule is not what it runs, so what it runs is recorded."""
    monkeypatch.setattr(schedules.Schedule1F1B, "_initialize_stage", lambda *_: None)
    for rank in range(ranks):
        stage = RecordedStage(
            done=[], group_size=ranks, group_rank=rank, num_stages=ranks, stage_index=rank, is_first=rank == 0,
            is_last=False, submod=None, has_backward=True,
        )  # fmt: skip
        made = schedules.Schedule1F1B(stage, micro, loss_fn=None, scale_grads=False)  # pyright: ignore
        made._step_microbatches([()] * micro, [{}] * micro, None, None)
        assert stage.done == actions("1f1b", ranks, micro)[rank]


def test_unequal_stages_wait_longer_than_equal_ones() -> None:
    order = actions("1f1b", 4, 8)
    slow = simulate(order, lambda a: EQUAL_COSTS[a.kind] * (3.0 if a.stage == 3 else 1.0), 4)
    # The slow stage works without a break from its first micro-batch to its last: 3 forwards before it, 3 * 2 after.
    assert slow.length == pytest.approx(3 + 8 * 9 + 3 * 2)
    assert slow.bubble > bubble("1f1b", 4, 8)


def test_a_number_of_micro_batches_that_a_schedule_refuses() -> None:
    for schedule in ("dualpipe_v", "1f1b"):
        with pytest.raises(LayoutError, match=rf"{schedule} with 3 micro-batches on 4 ranks"):
            actions(schedule, 4, 3)
