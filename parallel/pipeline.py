"""Pipeline parallelism: which layers a stage holds, and torch's schedules over them.

Only floating tensors cross a boundary: the hidden states and the streams that travel with them. Ids, positions and
documents come from each stage's own copy of the micro-batches. Losses are already divided by global counts, so the
schedules must not scale gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from potamos.parallel.mesh import LayoutError
from potamos.parallel.split_backward import joined_groups


@dataclass(frozen=True)
class Schedule:
    """One way to order the micro-batches. stages: per rank; v: the second half of the stages runs back over the ranks;
    splits_backward: the gradients of weights are taken apart from those of inputs, and later."""

    kind: Any
    stages: int = 1
    v: bool = False
    splits_backward: bool = False


SCHEDULES = {
    "gpipe": Schedule(schedules.ScheduleGPipe),
    "1f1b": Schedule(schedules.Schedule1F1B),
    "interleaved_1f1b": Schedule(schedules.ScheduleInterleaved1F1B, 2),
    "looped_bfs": Schedule(schedules.ScheduleLoopedBFS, 2),
    "zero_bubble": Schedule(schedules.ScheduleInterleavedZeroBubble, 2, splits_backward=True),
    "zbv": Schedule(schedules.ScheduleZBVZeroBubble, 2, v=True, splits_backward=True),
    "dualpipe_v": Schedule(schedules.ScheduleDualPipeV, 2, v=True, splits_backward=True),
}


def balanced(costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Consecutive layers for each stage so that the dearest stage is as cheap as can be; every stage has at least one.

    costs: of each layer; first and last: what embedding and scoring add to the first and to the last stage.
    """
    count = len(costs)
    if count < stages:
        raise LayoutError(f"parallel.pp: {stages} stages need as many layers, the model has {count}; use fewer")
    best: list[list[tuple[float, int]]] = [[(float("inf"), 0)] * (count + 1) for _ in range(stages + 1)]
    best[0][0] = (0.0, 0)
    for stage in range(1, stages + 1):
        for end in range(stage, count + 1):
            for begin in range(stage - 1, end):
                cost = sum(costs[begin:end]) + (first if stage == 1 else 0.0) + (last if stage == stages else 0.0)
                worst = max(best[stage - 1][begin][0], cost)
                if worst < best[stage][end][0]:
                    best[stage][end] = (worst, begin)
    cuts, end = [], count
    for stage in range(stages, 0, -1):
        begin = best[stage][end][1]
        cuts.append(range(begin, end))
        end = begin
    return cuts[::-1]


def held_stages(schedule: Schedule, rank: int, ranks: int) -> list[int]:
    """The stages of a rank, in order."""
    if schedule.v:
        return [rank, 2 * ranks - 1 - rank]
    return [rank + ranks * k for k in range(schedule.stages)]


class Part(nn.Module):
    """A stage's module as torch's schedules call it: the micro-batch comes by its number."""

    def __init__(self, module: nn.Module, *, last: bool) -> None:
        super().__init__()
        self.module, self.last = module, last
        self.batches: Sequence[Any] = ()
        self.states: list[Any] = []
        self.results: dict[int, Any] = {}
        self.loss: Callable[[Any], Tensor] = lambda terms: terms
        self.carry = False

    def forward(self, *received: Tensor, micro: Tensor) -> Tensor | tuple[Tensor, ...]:
        index = int(micro)
        received = tuple(_received(x) for x in received)
        out = self.module(self.batches[index], received, self.states[index])
        if not self.carry:
            out.state = None
        # Who holds a graph holds all that a split backward has not walked, to the step's end: results are cut off it.
        # Torch's schedules do the same with the loss, but could not if it were a view.
        self.results[index] = out.detached() if torch.is_grad_enabled() else out
        if self.last:
            return torch.stack([self.loss(out)])
        return tuple(_sent(x) for x in out.sent)


class _StraightGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous: it is received into memory of the same strides, and no backend
    receives into other than contiguous memory."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        del ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return gradient.contiguous()


def _received(x: Tensor) -> Tensor:
    result = _StraightGradient.apply(x)
    assert isinstance(result, Tensor)
    return result


def _sent(x: Tensor) -> Tensor:
    """Contiguous, as its gradient; and no view, which schedules cannot detach."""
    return x.contiguous() if not x.is_contiguous() else x.clone() if x._is_view() else x


class Pipeline:
    """The stages of this rank under a schedule. `run` is forward and backward of a step's micro-batches."""

    def __init__(
        self,
        parts: dict[int, Part],
        schedule: str,
        stages: int,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self.parts, self.name, self.stages, self.group, self.device = parts, schedule, stages, group, device
        self._made: dict[int, Any] = {}

    def run(
        self,
        batches: Sequence[Any],
        states: Sequence[Any],
        loss: Callable[[Any], Tensor],
        *,
        carry: bool = False,
    ) -> None:
        """Every micro-batch through every stage; what each part returned is in its `results`, states with `carry`."""
        for part in self.parts.values():
            part.carry = carry
            part.batches, part.states, part.results, part.loss = batches, list(states), {}, loss
        schedule = self._schedule(len(batches))
        micro = torch.arange(len(batches))
        with joined_groups():
            schedule.step(micro=micro, target=micro if self.stages - 1 in self.parts else None)

    @torch.no_grad()
    def score(self, batch: Any) -> Any:
        """One micro-batch forward through all stages: the terms where the last stage is, None elsewhere."""
        ranks = dist.get_process_group_ranks(self.group)
        me, schedule = dist.get_rank(self.group), SCHEDULES[self.name]
        holder = {stage: r for r in range(len(ranks)) for stage in held_stages(schedule, r, len(ranks))}
        sent: tuple[Tensor, ...] = ()
        found = None
        for stage in range(self.stages):
            if holder[stage] != me:
                continue
            if stage and holder[stage - 1] != me:
                sent = _receive(ranks[holder[stage - 1]], self.group, self.device)
            part = self.parts[stage]
            part.batches, part.states, part.results, part.carry = [batch], [None], {}, False
            part.loss = lambda _: torch.zeros(1, device=self.device)
            part(*sent, micro=torch.zeros(1, dtype=torch.int64))  # as a module: its shards are gathered for the call
            out = part.results[0]
            if stage == self.stages - 1:
                found = out
            else:
                sent = out.sent
                if holder[stage + 1] != me:
                    _send(sent, ranks[holder[stage + 1]], self.group)
        return found

    def _schedule(self, count: int) -> Any:
        if count not in self._made:
            made = [
                PipelineStage(part, index, self.stages, self.device, group=self.group)
                for index, part in self.parts.items()
            ]
            kind = SCHEDULES[self.name].kind
            single = SCHEDULES[self.name].stages == 1
            self._made[count] = kind(
                made[0] if single else made, count, loss_fn=lambda output, _: output.sum(), scale_grads=False
            )
        return self._made[count]


def _send(tensors: tuple[Tensor, ...], to: int, group: dist.ProcessGroup) -> None:
    dist.send_object_list([[(tuple(x.shape), x.dtype) for x in tensors]], to, group=group)
    for x in tensors:
        dist.send(x.contiguous(), to, group=group)


def _receive(source: int, group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, ...]:
    about: list[Any] = [None]
    dist.recv_object_list(about, source, group=group)
    received = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in about[0])
    for x in received:
        dist.recv(x, source, group=group)
    return received
