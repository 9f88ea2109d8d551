"""Time of a step, from floating-point operations, bytes between ranks and what machines were seen to reach.

An estimate for choosing layouts, not a measurement: shares of the peak are those of plain decoders on one node
(`ceilings`). Tensor, sequence and pipeline communication is not hidden here; that of data ranks is, behind the backward
(DDP, what FSDP sums) or the whole step (what FSDP gathers).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from potamos.parallel.context import choose_kind
from potamos.parallel.facts import Layout
from potamos.parallel.mesh import Sizes, sizes
from potamos.parallel.pipeline import SCHEDULES, balanced
from potamos.parallel.slices import held_slices
from potamos.parallel.tensor import is_region
from potamos.pretrain import setup
from potamos.pretrain.ceilings import CEILINGS, LINK_SHARE, Ceiling
from potamos.pretrain.models.linear import Linear
from potamos.pretrain.objectives.base import System
from potamos.pretrain.plan_pipeline import Action, Timeline, actions, bubble, simulate
from potamos.pretrain.recipe import Recipe

SPLIT_BACKWARD = 1.4
"""A schedule that splits the backward calls a mixer's own backward about this often for each micro-batch."""
SPLITTING = ("zero_bubble", "zbv", "dualpipe_v")

ORDER = ("tp", "cp", "dp_shard", "dp_replicate", "pp")
"""Axes from the one whose ranks lie closest together."""


@dataclass(frozen=True)
class Time:
    """A step's seconds and what they are made of.

    compute: a rank's own work; length: with the bubble. bubble: idle share of the pipeline with the model's own stages;
    formula: with equal ones. sent: bytes that a rank sends, by axis; links: seconds of them; exposed: those that
    nothing hides. update: the optimizer's.
    """

    seconds: float
    tokens_per_second: float
    compute: float
    length: float
    update: float
    bubble: float
    formula: float
    sent: Mapping[str, float]
    links: Mapping[str, float]
    exposed: Mapping[str, float] = field(default_factory=dict)


class Costs:
    """What a recipe's model costs, whatever the layout: read once from a draft of it."""

    def __init__(self, recipe: Recipe, system: System | None = None) -> None:
        self.recipe = recipe
        self.system = setup.draft_system(recipe) if system is None else system
        self.length = recipe.data.sequence_length
        self.itemsize = setup.DTYPES[recipe.train.precision].itemsize
        self._timelines: dict[tuple[str, str, int, int], Timeline] = {}

    @cached_property
    def layers(self) -> list[tuple[float, float]]:
        """(forward operations per token of linear layers, of mixing) of each layer."""
        found = []
        for block in self.system.model.stack.blocks.values():
            linear = sum(2.0 * m.weight.numel() for m in block.modules() if isinstance(m, Linear))
            found.append((linear, sum(m.mixing_flops(self.length) for m in block.modules() if is_region(m))))  # pyright: ignore
        return found

    @cached_property
    def regions(self) -> list[Any]:
        """The mixers and channel mixers."""
        return [m for m in self.system.modules() if is_region(m)]

    @cached_property
    def output(self) -> float:
        """Forward operations per token beside the layers."""
        return self.system.model.flops_per_token(self.length) - sum(map(sum, self.layers))

    @cached_property
    def parameters(self) -> int:
        """Of the whole system."""
        return sum(p.numel() for p in self.system.parameters())

    @cached_property
    def inside(self) -> int:
        """Parameters of the layers."""
        return sum(p.numel() for p in self.system.model.stack.blocks.parameters())

    @cached_property
    def stage_costs(self) -> tuple[list[float], float, float]:
        """What stages are balanced by."""
        return self.system.stage_costs()

    def timeline(self, layout: Layout, pp: int, micro: int) -> Timeline:
        """A step of `micro` micro-batches in a pipeline of `pp` ranks, where one operation of a token takes 1."""
        key = layout.schedule, layout.checkpointing, pp, micro
        if key not in self._timelines:
            self._timelines[key] = _pipeline(self, layout, pp, micro)
        return self._timelines[key]

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, without what is computed again."""
        return 3.0 * self.system.model.flops_per_token(self.length)

    def forward(self, index: int) -> float:
        """Operations per token of layer `index`, forward."""
        return sum(self.layers[index])

    def backward(self, index: int, layout: Layout, *, split: bool) -> float:
        """The same of its backward, with what the layout computes again."""
        linear, mixing = self.layers[index]
        again = {"none": 0.0, "full": linear + mixing, "selective": mixing}[layout.checkpointing]
        return 2.0 * linear + 2.0 * mixing * (SPLIT_BACKWARD if split else 1.0) + again


def step_time(
    costs: Costs, size: Sizes, ceiling: Ceiling, layout: Layout, rate: float | None = None, *, idle: bool = True
) -> Time:
    """The time of a step under `size`. rate: FLOP/s of a rank, if not the ceiling's. idle: with the pipeline's waits,
    which take a while to play; without them, no layout's step takes less.

    Raises LayoutError where the schedule does not take the number of micro-batches.
    """
    recipe = costs.recipe
    micro = recipe.train.sequences // (size.data * recipe.train.micro_sequences)
    tokens = recipe.train.micro_sequences * costs.length
    if rate is None:
        rate = ceiling.flops[recipe.train.precision] * ceiling.share(recipe.model.width)
    second = tokens / (rate * size.tp * size.cp)  # per operation of a token, on the ranks that share a row
    split = size.pp > 1 and layout.schedule in SPLITTING
    layers = range(len(costs.layers))
    compute = micro * second * (
        3.0 * costs.output + sum(costs.forward(i) + costs.backward(i, layout, split=split) for i in layers)
    )  # fmt: skip
    length, waits, formula = compute / size.pp, 0.0, 0.0
    if size.pp > 1 and idle:
        timeline = costs.timeline(layout, size.pp, micro)
        length, waits, formula = second * timeline.length, timeline.bubble, bubble(layout.schedule, size.pp, micro)
    sent = bytes_sent(costs, size, layout, micro)
    links = {axis: count / _link(axis, size, ceiling) for axis, count in sent.items()}
    exposed = {axis: links.get(axis, 0.0) for axis in ("tp", "cp", "pp") if axis in links}
    hidden = compute / size.pp / micro * 2 / 3  # the last backward
    if size.pp > 1 and size.dp_shard == 1:
        hidden = 0.0  # gradients are summed when the pipeline is empty
    exposed["data"] = max(0.0, links.get("data", 0.0) - hidden)
    exposed["gather"] = max(0.0, links.get("gather", 0.0) - compute / size.pp)
    update = _update(costs, size, ceiling, rate)
    seconds = length + sum(exposed.values()) + update
    per_second = recipe.train.sequences * costs.length / seconds
    return Time(seconds, per_second, compute / size.pp, length, update, waits, formula, sent, links, exposed)


def _pipeline(costs: Costs, layout: Layout, pp: int, micro: int) -> Timeline:
    total = pp * SCHEDULES[layout.schedule].stages
    weights, first, last = costs.stage_costs
    ranges = balanced(weights, total, first, last)
    split = layout.schedule in SPLITTING
    forward = [sum(costs.forward(i) for i in own) for own in ranges]
    backward = [sum(costs.backward(i, layout, split=split) for i in own) for own in ranges]
    forward[-1] += costs.output
    backward[-1] += 2.0 * costs.output

    def cost(action: Action) -> float:
        if action.kind == "forward":
            return forward[action.stage]
        return backward[action.stage] * (1.0 if action.kind == "backward" else 0.5)

    return simulate(actions(layout.schedule, pp, micro), cost, total)


def bytes_sent(costs: Costs, size: Sizes, layout: Layout, micro: int) -> dict[str, float]:
    """Bytes that a rank sends in a step, by axis: "tp", "cp", "pp", "data" (sums of gradients), "gather" (FSDP).

    Rings: a gather or a scattered sum of n bytes over r ranks sends n (r-1)/r from each, a sum twice that.
    """
    recipe = costs.recipe
    rows = recipe.train.micro_sequences * costs.length * recipe.model.width / size.cp
    share, wide = 1.0 / size.pp, 4
    sent: dict[str, float] = {}
    if size.tp > 1:  # into and out of every region and the frontend; gathers of normed fp32, sums of products
        each = (size.tp - 1) / size.tp * rows
        inside = len(costs.regions) * share * 2 * (wide + costs.itemsize)
        sent["tp"] = micro * each * (inside + 4 * wide / size.pp)
    if size.cp > 1:
        sent["cp"] = micro * share * sum(_split_row(region, costs, size, layout) for region in costs.regions)
    if size.pp > 1:
        stages = SCHEDULES[layout.schedule].stages
        hidden = rows * wide / (size.tp if layout.sequence_parallel else 1)
        sent["pp"] = 2.0 * micro * stages * hidden * (size.pp - 1) / size.pp
    parameters = costs.parameters / (size.tp * size.pp)
    replicas, shards = size.dp_replicate, size.dp_shard * size.cp
    if size.dp_shard > 1:
        outside = (costs.parameters - costs.inside) * wide
        whole = (costs.inside * costs.itemsize + outside) / (size.tp * size.pp)
        sent["gather"] = 2.0 * micro * (shards - 1) / shards * whole
        sent["data"] = (shards - 1) / shards * parameters * wide + 2.0 * _ring(replicas) * parameters * wide / shards
    elif replicas * size.cp > 1:
        sent["data"] = 2.0 * _ring(replicas * size.cp) * parameters * wide
    return sent


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _split_row(region: Any, costs: Costs, size: Sizes, layout: Layout) -> float:
    """Bytes of a micro-batch that a rank sends for a region to join its slices, forward and backward."""
    tp, cp, item = size.tp if region.traits.shard != "none" else 1, size.cp, costs.itemsize
    kind = choose_kind(region.traits, tp, cp, layout.cp_kinds)
    rows = costs.recipe.train.micro_sequences
    if kind == "state":  # gathered from all, and the gradients summed back
        held = len(held_slices(layout.cp_order, 0, cp))
        return 2.0 * (cp - 1) * rows * held * region.handed_on(costs.length // (cp * held), item) / tp
    if kind not in ("a2a", "ring"):
        return 0.0
    into = sum(m.weight.shape[0] for m in region.children() if isinstance(m, Linear) and m.role == "column")
    out, tokens = region.out.weight.shape[1], rows * costs.length / cp
    if kind == "a2a":
        return 2.0 * tokens * (into + out) / tp * item * _ring(cp)
    # Keys and values are what goes in beside the queries, which are as wide as what comes out. In the backward they
    # go all the way round, with their gradients in fp32.
    return tokens * (into - out) / tp * ((cp - 1) * item + cp * (item + 4))


def _link(axis: str, size: Sizes, ceiling: Ceiling) -> float:
    """Bytes per second along an axis: inside a node where all its ranks lie in one."""
    last = {"data": "dp_replicate" if size.dp_replicate > 1 else "dp_shard", "gather": "dp_shard"}.get(axis, axis)
    reach = 1
    for each in ORDER[: ORDER.index(last) + 1]:
        reach *= getattr(size, each)
    return LINK_SHARE * (ceiling.inside if reach <= ceiling.per_node else ceiling.between)


def _update(costs: Costs, size: Sizes, ceiling: Ceiling, rate: float) -> float:
    """The optimizer: 7 fp32 numbers per parameter read or written; for Muon also five iterations of three products."""
    own = costs.parameters / (size.tp * size.pp * (size.dp_shard * size.cp if size.dp_shard > 1 else 1))
    seconds = 28.0 * own / ceiling.bandwidth
    if costs.recipe.optimizer.kind == "muon":
        shapes = [m.weight.shape for m in costs.system.modules() if isinstance(m, Linear)]
        seconds += sum(5 * (4.0 * min(s) ** 2 * max(s) + 2.0 * min(s) ** 3) for s in shapes) / (size.pp * rate)
    return seconds


def predict(recipe: Recipe, world: int, device: torch.device) -> float | None:
    """Tokens per second that `recipe` should reach on `world` ranks of such devices; None for an unknown device.

    Takes milliseconds and no collective, so that a trainer can ask on its main rank before the first step.
    """
    ceiling = known_device(device)
    if ceiling is None:
        return None
    layout, rate = recipe.parallel.layout(), None
    if device.type == "cpu":
        cores = max(1, (os.cpu_count() or 1) // world)
        rate = ceiling.flops[recipe.train.precision] * min(recipe.train.threads or torch.get_num_threads(), cores)
    return step_time(Costs(recipe), sizes(layout, world), ceiling, layout, rate).tokens_per_second


def known_device(device: torch.device) -> Ceiling | None:
    """What is known of a device, by its name."""
    if device.type == "cpu":
        return CEILINGS["cpu"]
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((CEILINGS[key] for key in ("h100", "h200", "a100") if key.upper() in name and "PCIe" not in name), None)
