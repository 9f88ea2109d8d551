"""`apply(system, ...)`: the one place where a model is spread over processes.

It reads declared facts and the layout, never a name, and from top to bottom: pipeline, tensor, context, then (once the
parameters have their values) checkpointing and data. A layout that a system cannot run is refused, by the name of the
axis, before anything starts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from potamos.parallel import data, tensor
from potamos.parallel.axes import TensorAxis
from potamos.parallel.check import check_layout
from potamos.parallel.checkpointing import checkpoint_blocks, compile_blocks
from potamos.parallel.context import connect_context
from potamos.parallel.data import REPLICAS, SHARDS
from potamos.parallel.facts import Layout, parameter_table
from potamos.parallel.gradients import Gradients, local
from potamos.parallel.mesh import LayoutError, Mesh, sizes
from potamos.parallel.pipeline import SCHEDULES, Part, Pipeline, balanced, held_stages

__all__ = ["LayoutError", "Spread", "apply", "sizes"]

Fill = Callable[[nn.Module, Callable[[str, Tensor], Tensor], Mapping[str, torch.Size]], None]


class Spread:
    """A system as this rank runs it.

    parameters: what this rank holds, by the names of the one-process system; each a slice, a shard or the whole.
    stored: the same as plain tensors that share the memory, for the optimizer; `run` gives them their gradients.
    shapes, table: of every parameter of the one-process system.
    """

    def __init__(
        self,
        system: Any,
        layout: Layout,
        mesh: Mesh,
        device: torch.device,
        fill: Fill,
        compute: torch.dtype | None = None,
        length: int | None = None,
    ) -> None:
        self.system, self.layout, self.mesh, self.device = system, layout, mesh, device
        self.sizes = mesh.sizes
        self._term_names: list[str] | None = None
        check_layout(system, layout, mesh.sizes, length)
        self.shapes = {name: p.shape for name, p in system.named_parameters()}
        self.table = parameter_table(system)
        self.stage_names = self._cut_pipeline()
        axis = TensorAxis(mesh.group("tp"), sequence=layout.sequence_parallel) if self.sizes.tp > 1 else None
        self.cuts = tensor.split(system, axis)
        if self.sizes.cp > 1:
            self.slices = connect_context(system, mesh.group("cp"), layout.cp_order, layout.cp_kinds)
        fill(system, self._slice, {name: cut.shape for name, cut in self.cuts.items()})
        blocks = list(system.model.stack.blocks.values())
        checkpoint_blocks(blocks, layout.checkpointing)
        compile_blocks(blocks, layout.compile)
        self.pipeline = self._make_pipeline()
        self.runner = self._spread_data(layout, compute)
        self.parameters = self._own_parameters()
        self.gradients = self._gradients()
        self.stored = {name: _stored(p) for name, p in self.parameters.items()}
        self._names = {value: name for name, value in self.stored.items()}

    # --- building --------------------------------------------------------------------------------------------------

    def _cut_pipeline(self) -> dict[int, list[str]]:
        """Drop the layers of other stages; returns the layers of each stage that stays."""
        if self.sizes.pp == 1:
            return {}
        schedule = SCHEDULES[self.layout.schedule]
        blocks = self.system.model.stack.blocks
        self.stages = self.sizes.pp * schedule.stages
        costs, first, last = self.system.stage_costs()
        names = list(blocks)
        ranges = balanced(costs, self.stages, first, last)
        own = held_stages(schedule, self.mesh.index("pp"), self.sizes.pp)
        kept = {stage: [names[i] for i in ranges[stage]] for stage in own}
        for name in names:
            if not any(name in layers for layers in kept.values()):
                del blocks[name]
        if 0 not in kept and self.stages - 1 not in kept:
            self.system.drop_ends()
        return kept

    def _make_pipeline(self) -> Pipeline | None:
        if self.sizes.pp == 1:
            return None
        parts = {}
        for stage, layers in self.stage_names.items():
            last = stage == self.stages - 1
            parts[stage] = Part(self.system.part(layers, first=stage == 0, last=last), last=last)
        return Pipeline(parts, self.layout.schedule, self.stages, self.mesh.group("pp"), self.device)

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """What this rank's stages use. A module that is no layer (a final norm, an objective's head) belongs to some of
        the stages only, and a copy elsewhere would never see a gradient."""
        every = dict(self.system.named_parameters())
        if self.pipeline is None:
            return every
        used = {id(p) for part in self.pipeline.parts.values() for p in part.parameters()}
        return {name: p for name, p in every.items() if id(p) in used}

    def _spread_data(self, layout: Layout, compute: torch.dtype | None) -> nn.Module:
        size, mesh = self.sizes, self.mesh
        if size.dp_shard > 1:
            blocks = list(self.system.model.stack.blocks.values())
            if self.pipeline is None:
                return data.shard(self.system, blocks, mesh, compute)
            parts = list(self.pipeline.parts.values())
            # The first and the last stage on one rank: one table, which cannot be sharded twice.
            shared = set.intersection(*(set(part.parameters()) for part in parts)) if len(parts) > 1 else set()
            mesh.group(*REPLICAS, *SHARDS)  # in which the gradients of it are summed: made by all ranks, as groups are
            later = SCHEDULES[layout.schedule].splits_backward
            for part in parts:
                held: Any = part.module
                blocks = list(held.model.stack.blocks.values())
                data.shard(part, blocks, mesh, compute, gather_once=later, whole=shared)
        elif next(self.system.parameters()).is_meta:
            pass  # a layout that is only looked at: there is nothing to replicate
        elif mesh.size(*REPLICAS, "cp") > 1 and self.pipeline is None:
            return data.replicate(self.system, mesh.group(*REPLICAS, "cp"), self.device)
        return self.system

    def _gradients(self) -> Gradients:
        tied: list[str] = []
        group, counts = None, True
        if self.sizes.pp > 1:
            ends = {0, self.stages - 1} & set(self.stage_names)
            apart = not SCHEDULES[self.layout.schedule].v
            group = self._ends_group() if apart else None
            if ends and apart:
                tied = [n for n in self.parameters if n.startswith("model.frontend.")]
                counts = 0 in ends
        reduced = self.sizes.dp_shard > 1 or self.pipeline is None
        return Gradients(
            self.parameters, self.cuts, self.mesh, tied=tied, tied_group=group if tied else None, counts_tied=counts,
            reduced=reduced,
        )  # fmt: skip

    def _ends_group(self) -> dist.ProcessGroup:
        """The ranks of the first and the last stage that this one shares everything else with."""
        ranks = dist.get_process_group_ranks(self.mesh.group("pp"))
        ends = [ranks[0], ranks[-1]]
        every: list[Any] = [None] * self.sizes.world
        dist.all_gather_object(every, ends)
        own = None
        for pair in sorted({tuple(pair) for pair in every}):
            group = dist.new_group(list(pair))
            if dist.get_rank() in pair:
                own = group
        return own  # pyright: ignore[reportReturnType]

    # --- values ----------------------------------------------------------------------------------------------------

    def _slice(self, name: str, whole: Tensor) -> Tensor:
        """This rank's slice under tensor parallelism."""
        dim = self.cuts[name].dim
        return whole if dim is None else whole.chunk(self.sizes.tp, dim)[self.mesh.index("tp")]

    def local(self, name: str, whole: Tensor) -> Tensor:
        """What this rank stores of a whole tensor that is cut like the parameter of this name: a view of it, so that
        of a tensor on the disk no more is read than this."""
        part, like = self._slice(name, whole), self.parameters[name]
        return _shard(part, like) if isinstance(like, DTensor) else part

    def whole(self, name: str, value: Tensor) -> Tensor:
        """The whole of a tensor that is stored like the parameter of this name (plain, or as FSDP's own type); every
        rank of the same stage must call."""
        like = self.parameters[name]
        if isinstance(like, DTensor) and not isinstance(value, DTensor):
            value = DTensor.from_local(
                value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
            )
        part = value.full_tensor() if isinstance(value, DTensor) else value
        dim = self.cuts[name].dim
        if dim is None:
            return part
        pieces = [torch.empty_like(part) for _ in range(self.sizes.tp)]
        dist.all_gather(pieces, part.contiguous(), group=self.mesh.group("tp"))
        return torch.cat(pieces, dim)

    def gathered(self, tensors: Mapping[str, Tensor], owner: Callable[[str], str]) -> dict[str, Tensor]:
        """Whole tensors of every stage, in host memory, on the main rank; {} elsewhere. Every rank calls.

        tensors: what this rank stores, each cut like the parameter `owner(name)` if it has that parameter's stored
        shape, else (a step counter) the same on all ranks.
        """
        main = self.mesh.rank == 0
        found: dict[str, Tensor] = {}
        for stage, names in enumerate(self._names_by_stage(list(tensors))):
            here = self.mesh.index("pp") == stage
            for name in names:
                value = self._whole_of(name, tensors[name], owner(name)) if here else None
                if self.sizes.pp > 1:
                    value = self._from_stage(stage, value)
                if main and name not in found:
                    assert value is not None
                    found[name] = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        return found

    def _whole_of(self, name: str, value: Tensor, owner: str) -> Tensor:
        like = self.stored[owner]
        return self.whole(owner, value) if value.shape == like.shape and value.dim() else value

    def _names_by_stage(self, own: list[str]) -> list[list[str]]:
        if self.sizes.pp == 1:
            return [own]
        every: list[Any] = [None] * self.sizes.pp
        dist.all_gather_object(every, own, group=self.mesh.group("pp"))
        return every

    def _from_stage(self, stage: int, value: Tensor | None) -> Tensor:
        """A tensor of one stage on all of them."""
        group = self.mesh.group("pp")
        source = dist.get_process_group_ranks(group)[stage]
        about = [None if value is None else (tuple(value.shape), value.dtype)]
        dist.broadcast_object_list(about, source, group=group)
        assert about[0] is not None
        shape, dtype = about[0]
        if value is None:
            value = torch.empty(shape, dtype=dtype, device=self.device)
        value = value.detach().to(self.device).contiguous()
        dist.broadcast(value, source, group=group)
        return value

    @property
    def matrices(self) -> StoredMatrices | None:
        """For optimizers that update whole matrices; None where every rank has them."""
        return StoredMatrices(self) if self.sizes.tp * self.sizes.dp_shard > 1 else None

    def name_of(self, stored: Tensor) -> str:
        """The name of one of `stored`."""
        return self._names[stored]

    @property
    def data_index(self) -> int:
        """Which of `sizes.data` parts of the global batch this rank reads."""
        return self.sizes.data_rank(self.mesh.rank)

    @property
    def first_slices(self) -> bool:
        """Whether this rank holds the beginning of its rows."""
        return self.mesh.index("cp") == 0

    @property
    def scores(self) -> bool:
        """Whether this rank sees losses: it holds the last stage."""
        return self.pipeline is None or self.stages - 1 in self.stage_names

    def total(self, values: Tensor) -> Tensor:
        """Sum of what the ranks that see losses found for their rows and slices, on every rank."""
        axes = ("pp", *REPLICAS, *SHARDS)
        if self.mesh.size(*axes) == 1:
            return values.detach()
        values = values.detach().clone() if self.scores else torch.zeros_like(values)
        dist.all_reduce(values, group=self.mesh.group(*axes))
        return values

    def terms(self, results: Sequence[Any]) -> Sequence[str]:
        """Names of the loss terms, on ranks that do not see them too; the same in every step of a run."""
        if self._term_names is None:
            own = [sorted({name for result in results for name in result.terms})] if self.scores else [None]
            if self.sizes.pp > 1:
                group = self.mesh.group("pp")
                held = held_stages(SCHEDULES[self.layout.schedule], 0, self.sizes.pp)
                last = 0 if self.stages - 1 in held else self.sizes.pp - 1
                dist.broadcast_object_list(own, dist.get_process_group_ranks(group)[last], group=group)
            self._term_names = own[0]
        assert self._term_names is not None
        return self._term_names

    # --- a step ----------------------------------------------------------------------------------------------------

    def run(
        self, batches: Sequence[Any], states: Sequence[Any], loss: Callable[[Any], Tensor], *, carry: bool = False
    ) -> list[Any]:
        """Forward and backward of a step's micro-batches: the terms of each on the last stage, handovers elsewhere.

        Afterwards every parameter's gradient is complete. The states that the micro-batches end in are kept only with
        `carry`: all keys and values of a step are much memory.
        """
        if self.sizes.cp > 1:
            batches = [batch.slices(self.slices.held, self.slices.count) for batch in batches]
        if self.pipeline is not None:
            self.pipeline.run(batches, states, loss, carry=carry)
            last = max(self.pipeline.parts)
            results = [self.pipeline.parts[last].results[i] for i in range(len(batches))]
        else:
            results = []
            for index, batch in enumerate(batches):
                with self._sync(last=index == len(batches) - 1):
                    out = self.runner(batch, states[index])
                    if not carry:
                        out.state = None
                    loss(out).backward()
                results.append(out)
        self.gradients.finish()
        self._hand_gradients()
        return results

    def _hand_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            if self.stored[name] is not parameter:
                self.stored[name].grad = None if parameter.grad is None else local(parameter.grad)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for held in (*self.parameters.values(), *self.stored.values()):
            held.grad = None

    def score(self, batch: Any) -> Any:
        """Forward alone, of one micro-batch: its terms, or None on ranks that do not see losses. Every rank that shares
        the batch calls."""
        if self.sizes.cp > 1:
            batch = batch.slices(self.slices.held, self.slices.count)
        if self.pipeline is None:
            return self.runner(batch)
        return self.pipeline.score(batch)

    @contextmanager
    def _sync(self, *, last: bool) -> Iterator[None]:
        """Communicate gradients only in the last micro-batch of a step."""
        if isinstance(self.runner, FSDPModule):
            self.runner.set_requires_gradient_sync(last)
            self.runner.set_is_last_backward(last)
            yield
        elif isinstance(self.runner, DistributedDataParallel) and not last:
            with self.runner.no_sync():
                yield
        else:
            yield


class StoredMatrices:
    """Stored slices and shards of matrices, made whole and cut again. Every rank of a stage asks in the same order."""

    def __init__(self, spread: Spread) -> None:
        self.spread = spread

    def kind(self, stored: Tensor) -> Hashable:
        """Equal for matrices of one whole shape that are cut alike."""
        cut = self.spread.cuts[self.spread.name_of(stored)]
        return cut.shape, cut.dim

    def whole(self, stored: Tensor, value: Tensor) -> Tensor:
        """The whole of a value like `stored`."""
        return self.spread.whole(self.spread.name_of(stored), value)

    def local(self, stored: Tensor, whole: Tensor) -> Tensor:
        """The inverse of `whole`."""
        return self.spread.local(self.spread.name_of(stored), whole)


def _shard(whole: Tensor, like: DTensor) -> Tensor:
    """What this rank holds of a tensor that is sharded like another: all shards are as long as the first, until nothing
    is left (FSDP2's rule)."""
    for axis, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            size = whole.shape[placement.dim]
            longest = -(-size // like.device_mesh.size(axis))
            begin = min(size, longest * like.device_mesh.get_local_rank(axis))
            whole = whole.narrow(placement.dim, begin, min(longest, size - begin))
    return whole


def _stored(parameter: nn.Parameter) -> Tensor:
    """The plain tensor behind a parameter: itself, or what FSDP keeps of it here."""
    if not isinstance(parameter, DTensor):
        return parameter
    return local(parameter.detach()).requires_grad_(parameter.requires_grad)


def apply(
    system: nn.Module,
    layout: Layout,
    rank: int,
    world: int,
    device: torch.device,
    fill: Fill,
    compute: torch.dtype | None = None,
    length: int | None = None,
) -> Spread:
    """Spread `system`, built on the meta device, over the processes of a run.

    fill (system, slice, shapes) gives the parameters values: `shapes` has each one's whole shape by name, `slice` cuts
    a whole value to what this rank holds. compute: the dtype that blocks multiply in, in which sharded parameters are
    gathered; None for their own. length: of the rows. Raises LayoutError.
    """
    return Spread(system, layout, Mesh(sizes(layout, world), rank, device.type), device, fill, compute, length)
