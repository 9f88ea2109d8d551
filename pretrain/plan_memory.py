"""Memory of a rank, played through a step: what stays, what a micro-batch keeps, what a unit needs for a moment.

`plan_trace` says what one layer of each kind does to the memory of a rank of tensor and sequence parallelism; here its
micro-batches and layers are put in the order in which a step runs them (for a pipeline, the schedule's own list of that
rank) and the data axes are added: DDP's buckets (Li et al. 2020), FSDP's gathered and summed blocks (Zhao et al. 2023).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from potamos.parallel.facts import Layout
from potamos.parallel.mesh import Sizes
from potamos.parallel.pipeline import SCHEDULES, balanced, held_stages
from potamos.pretrain import setup
from potamos.pretrain.optim import Optimizer
from potamos.pretrain.plan_pipeline import Action, actions
from potamos.pretrain.plan_trace import INPUT, OUTPUT, Change, Held, LiveBytes, Trace
from potamos.pretrain.recipe import Recipe


@dataclass(frozen=True)
class Memory:
    """The rank that needs most, at the moment when it does.

    peak: bytes; parts: what they are, adding up to them; when: in words. stage_rank: its place in the pipeline.
    """

    peak: int
    parts: Mapping[str, int]
    when: str
    stage_rank: int = 0
    form: str = "torch"
    """Of the kernels that were counted."""


def memory(
    recipe: Recipe,
    traced: Trace,
    sizes: Sizes,
    stage_costs: tuple[Sequence[float], float, float],
    moments: Moments | None = None,
) -> Memory:
    """The memory of the fullest rank under `sizes`. traced: of the same tensor and sequence axes; moments: where
    what is known of the recipe's optimizer is kept."""
    moments = moments or Moments(recipe)
    found = [_Rank(recipe, traced, sizes, rank, stage_costs, moments).play() for rank in range(sizes.pp)]
    return max(found, key=lambda each: each.peak)


class _Rank:
    """One rank of the pipeline; the other axes' ranks need what it needs."""

    def __init__(
        self, recipe: Recipe, traced: Trace, sizes: Sizes, rank: int, stage_costs: Any, moments: Moments
    ) -> None:
        self.recipe, self.traced, self.sizes, self.rank, self.moments = recipe, traced, sizes, rank, moments
        self.layout: Layout = recipe.parallel.layout()
        self.micro = recipe.train.sequences // (sizes.data * recipe.train.micro_sequences)
        self.count = sizes.pp * SCHEDULES[self.layout.schedule].stages if sizes.pp > 1 else 1
        """Stages of the pipeline."""
        self.stages = self._stages(stage_costs)
        self.shards = sizes.dp_shard * sizes.cp if sizes.dp_shard > 1 else 1
        self.replicated = self.shards == 1 and sizes.dp_replicate * sizes.cp > 1 and sizes.pp == 1
        # Weights that are gathered once a step lie there to its end; see `parallel.data.shard`.
        self.once = self.shards > 1 and sizes.pp > 1 and SCHEDULES[self.layout.schedule].splits_backward
        self.compute = setup.DTYPES[recipe.train.precision].itemsize
        self.live: Counter[str] = Counter()
        self.total = 0
        self.best = Memory(0, {}, "", rank, traced.form)
        self.seen: set[str] = set()
        self.kept: dict[tuple[int, int], Counter[str]] = {}

    def _stages(self, stage_costs: Any) -> dict[int, list[tuple[str, str]]]:
        """{stage: [(name, kind) of each unit]}."""
        layers = list(enumerate(self.traced.layers))
        if self.sizes.pp == 1:
            return {0: [(INPUT, INPUT), *((str(i), kind) for i, kind in layers), (OUTPUT, OUTPUT)]}
        schedule = SCHEDULES[self.layout.schedule]
        total = self.count
        ranges = balanced(stage_costs[0], total, *stage_costs[1:])
        held = {}
        for stage in held_stages(schedule, self.rank, self.sizes.pp):
            units = [(str(i), kind) for i, kind in layers if i in ranges[stage]]
            first = [(INPUT, INPUT)] if stage == 0 else []
            held[stage] = first + units + ([(OUTPUT, OUTPUT)] if stage == total - 1 else [])
        return held

    # --- a step ----------------------------------------------------------------------------------------------------

    def play(self) -> Memory:
        """Walk through the second step of a run, when the optimizer has its moments."""
        held = self._held()
        stored = sum(count * sum(self._stored(each) for each in unit) for unit, count in held.items())
        state, moment = self.moments.bytes(held, self.shards)
        self._add("weights", stored)
        self._add("optimizer", state)
        self._add("batches", self.traced.batch * self.micro)
        if self.replicated:
            self._add("communication", stored)  # DDP's buckets, in which gradients lie from the last backward on
        self._receive_buffers()
        if self.shards > 1:
            every = [unit for units in self.stages.values() for unit in units]
            self._add("communication", self._gathered(every if self.once else [(INPUT, INPUT), (OUTPUT, OUTPUT)]))
        self._note("before the first forward")
        order = self._order()
        last = {action.stage: action for action in order if action.kind in ("backward", "backward_weight")}
        for action in order:
            self._act(action, last=last[action.stage] == action)
        self._after_the_backward(stored)
        self._note("optimizer", {"optimizer": moment})
        return self.best

    def _order(self) -> Sequence[Action]:
        if self.sizes.pp > 1:
            return actions(self.layout.schedule, self.sizes.pp, self.micro)[self.rank]
        return [Action(kind, 0, i) for i in range(self.micro) for kind in ("forward", "backward")]

    def _act(self, action: Action, *, last: bool) -> None:
        units = self.stages[action.stage]
        where = f"stage {action.stage}" if self.sizes.pp > 1 else f"micro-batch {action.micro}"
        halves = action.stage > 0  # the first stage has no inputs that need gradients, and waits for its weights' half
        if action.kind == "forward":
            for name, kind in units:
                self._forward(name, kind, f"forward of {kind}, {where}", action)
            for _, kind in units:
                self._keep(kind, -self.traced.units[kind].state, action)
        elif action.kind == "backward_input" and halves:
            for _, kind in reversed(units):
                self._inputs_half(kind, f"backward of {kind}, {where}", action)
        elif action.kind == "backward_weight" and halves:
            for name, kind in units:
                self._weights_half(name, kind, f"gradients of weights of {kind}, {where}", action, last=last)
            for label, count in self.kept.pop((action.stage, action.micro)).items():
                self._add(label, -count)
        elif action.kind in ("backward", "backward_weight"):
            following = [*units[-2::-1], None]
            for (name, kind), after in zip(reversed(units), following, strict=True):
                self._backward(name, kind, after, f"backward of {kind}, {where}", last=last)
            self._at_borders(action.stage)

    def _at_borders(self, stage: int) -> None:
        """A traced unit frees the gradient that it was given, and leaves one. Where another rank gave it, it lies in a
        buffer that stays; and what is left for another rank goes when it is sent."""
        given = stage < self.count - 1
        left = stage > 0
        self._add(_label(self.stages[stage][0][1]), (given - left) * self.traced.hidden)

    def _forward(self, name: str, kind: str, when: str, action: Action) -> None:
        change = self._change(name, kind, 0)
        gathered = self._passing((name, kind))
        self._note(when, {"communication": 2 * gathered})  # as received, and as parameters
        self._note(when, {_label(kind): change.peak, "communication": gathered})
        self._keep(kind, change.left, action)

    def _inputs_half(self, kind: str, when: str, action: Action) -> None:
        """Frees nothing, and leaves the gradients that the weights' half begins with."""
        change = self._halves(kind)[0]
        self._note(when, {_label(kind): change.peak})
        self._keep(kind, change.left, action)

    def _weights_half(self, name: str, kind: str, when: str, action: Action, *, last: bool) -> None:
        """Frees what it walks; what else the micro-batch left in a unit goes with the stage's last weight."""
        fresh = name not in self.seen
        self.seen.add(name)
        change = self._halves(kind)[1 if fresh else 2]
        own = self._gradient(kind) if fresh else 0
        self._note(when, {_label(kind): change.peak})
        self._keep(kind, change.left - own, action)
        self._add("gradients", own)
        if last:
            self._summed(kind, when, 0)

    def _halves(self, kind: str) -> tuple[Change, Change, Change]:
        halves = self.traced.units[kind].halves
        assert halves is not None, "the trace is of a schedule that does not split the backward"
        return halves

    def _keep(self, kind: str, count: int, action: Action) -> None:
        """Add what a micro-batch leaves in a unit."""
        self._add(_label(kind), count)
        self.kept.setdefault((action.stage, action.micro), Counter())[_label(kind)] += count

    def _backward(self, name: str, kind: str, after: tuple[str, str] | None, when: str, *, last: bool) -> None:
        change = self._change(name, kind, 1)
        fresh = name not in self.seen
        self.seen.add(name)
        own = self._gradient(kind) if fresh else 0
        gathered, coming = self._passing((name, kind)), self._passing(after)
        self._note(when, {"communication": gathered + 2 * coming, _label(kind): change.peak})
        self._add(_label(kind), change.left - own)
        self._add("gradients", own)
        if last:
            self._summed(kind, when, gathered + 2 * coming)

    def _summed(self, kind: str, when: str, passing: int) -> None:
        """After a unit's last backward of a step. passing: bytes of gathered parameters."""
        full = self._gradient(kind)
        if self.shards > 1:  # what is sent lies beside the gradients, and what is left of them is a share
            share = math.ceil(full / self.shards)
            self._note(when, {"communication": passing + full + share})
            self._add("gradients", share - full)
        elif self.replicated:
            self._add("gradients", -full)  # moved into the buckets

    def _change(self, name: str, kind: str, way: int) -> Change:
        """What the unit does; where input and output are apart, each has the shared gradient for itself."""
        unit = self.traced.units[kind]
        change = (unit.later if name in self.seen else unit.first)[way]
        apart = self.sizes.pp > 1 and way == 1 and self.traced.tied
        if apart and kind == OUTPUT and name in self.seen:
            return Change(change.peak, change.left - self.traced.tied)
        if apart and kind == INPUT:
            again = 0 if name in self.seen else self.traced.tied
            taken = self.traced.tied if name in self.seen else 0
            return Change(change.peak + again, change.left + again + taken)
        return change

    def _after_the_backward(self, stored: int) -> None:
        """Sums over ranks that no backward has taken are of all gradients, side by side."""
        if self.shards == 1 and not self.replicated and self.sizes.dp_replicate * self.sizes.cp > 1:
            self._note("sum of gradients", {"communication": stored})
        else:
            self._note("after the backward")

    # --- bytes -----------------------------------------------------------------------------------------------------

    def _held(self) -> Counter[tuple[Held, ...]]:
        """The units of this rank, by their parameters: with a pipeline, input and output on their own stages, the
        input's table on both."""
        kinds = Counter(kind for units in self.stages.values() for _, kind in units)
        if OUTPUT in kinds and INPUT not in kinds:
            kinds[INPUT] = 1
        return Counter({self.traced.parameters[kind]: count for kind, count in kinds.items()})

    def _stored(self, held: Held) -> int:
        if self.shards == 1:
            return held.bytes
        rows = held.shape[0] if held.shape else 1
        return held.bytes // max(rows, 1) * math.ceil(rows / self.shards)

    def _gradient(self, kind: str) -> int:
        apart = kind == OUTPUT and self.sizes.pp > 1
        return self.traced.size(kind) + (self.traced.tied if apart else 0)

    def _gathered(self, units: Sequence[tuple[str, str]]) -> int:
        """Bytes of whole parameters of units that FSDP gathers; a layer's linears in the dtype they multiply in."""
        if self.shards == 1:
            return 0
        kinds = [kind for _, kind in units]
        return sum(
            held.bytes if held.wide or kind in (INPUT, OUTPUT) else held.shape.numel() * self.compute
            for kind in kinds
            for held in self.traced.parameters[kind]
        )

    def _passing(self, unit: tuple[str, str] | None) -> int:
        """The same of one unit that is gathered for its own forward or backward only."""
        if unit is None or unit[1] in (INPUT, OUTPUT) or self.once:
            return 0
        return self._gathered([unit])

    def _receive_buffers(self) -> None:
        """torch's stages hold a buffer for each micro-batch that they receive, and for each gradient."""
        if self.sizes.pp == 1:
            return
        for stage in self.stages:
            for other in (stage - 1, stage + 1):
                if 0 <= other < self.count and other not in self.stages:
                    self._add("communication", self.micro * self.traced.hidden)

    def _add(self, label: str, count: int) -> None:
        self.live[label] += count
        self.total += count

    def _note(self, when: str, extra: Mapping[str, int] | None = None) -> None:
        peak = self.total + sum((extra or {}).values())
        if peak > self.best.peak:
            parts = Counter(self.live)
            parts.update(extra or {})
            self.best = replace(self.best, peak=peak, parts={k: v for k, v in parts.items() if v}, when=when)


def _label(kind: str) -> str:
    return "input, output, logits" if kind in (INPUT, OUTPUT) else f"activations of {kind}"


class Moments:
    """What an optimizer needs, from steps of it on fake parameters.

    Units of one kind are alike: each beyond the second of its kind adds what the second added to the first.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._known: dict[Any, tuple[int, int]] = {}

    def bytes(self, held: Mapping[tuple[Held, ...], int], shards: int) -> tuple[int, int]:
        """(bytes of the moments, the most that an update needs beside them) for so many units of each kind."""
        once = dict.fromkeys(held, 1)
        state, update = first = self._stepped(once, shards)
        for unit, count in held.items():
            if count > 1:
                second = self._stepped({**once, unit: 2}, shards)
                state += (count - 1) * (second[0] - first[0])
                update += (count - 1) * (second[1] - first[1])
        return state, update

    def _stepped(self, held: Mapping[tuple[Held, ...], int], shards: int) -> tuple[int, int]:
        key = frozenset(held.items()), shards
        if key not in self._known:
            every = [each for unit, count in held.items() for _ in range(count) for each in unit]
            self._known[key] = optimizer_bytes(self.recipe, every, shards)
        return self._known[key]


def optimizer_bytes(recipe: Recipe, held: Sequence[Held], shards: int) -> tuple[int, int]:
    """(bytes of the moments, the most that an update needs beside them), from steps of it on fake parameters."""
    from torch import nn

    with FakeTensorMode(), LiveBytes() as counted:
        parameters, table = {}, {}
        for index, each in enumerate(held):
            name = f"{index}.{each.name}"
            shape = list(each.shape)
            if shape and shards > 1:
                shape[0] = math.ceil(shape[0] / shards)
            parameters[name] = nn.Parameter(torch.empty(shape, dtype=torch.float32))
            parameters[name].grad = torch.empty(shape, dtype=torch.float32)
            table[name] = each.facts
        optimizer = Optimizer(parameters, table, recipe.optimizer)
        before = counted.live
        optimizer.step(1.0, torch.zeros(()))
        state = counted.live - before
        counted.peak = counted.live
        optimizer.step(1.0, torch.zeros(()))
        return state, counted.peak - before - state
