"""Context parallelism: who holds which slice of a sequence, and the exchange of what lies at the slices' borders.

Kernels offer the mathematics of slices without a collective (``kernels/diag_ssm/sequence.py``); this module alone
communicates. Every exchange is an all-gather of O(state) numbers, differentiable and the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from potamos.parallel.axes import Gather
from potamos.parallel.facts import Axis, Traits
from potamos.parallel.mesh import LayoutError
from potamos.parallel.ring import Ring, split_attention
from potamos.parallel.slices import held_slices


def gather_states(*states: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, ...]:
    """Each of ``states`` (...) from every rank: (ranks, ...), in one all-gather for those of one dtype.

    Shapes and dtypes must agree on all ranks. The backward is one reduce-scatter, so every rank must reach it: use
    the result on every rank, even where its value does not matter (one entry of a stacked tensor is enough).
    """
    ranks = dist.get_world_size(group)
    gathered: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(state.dtype for state in states):
        which = [i for i, state in enumerate(states) if state.dtype == dtype]
        parts = Gather.apply(torch.cat([states[i].flatten() for i in which]), group, 0)
        assert isinstance(parts, Tensor)
        sizes = [states[i].numel() for i in which]
        for i, part in zip(which, parts.view(ranks, -1).split(sizes, 1), strict=True):
            gathered[i] = part.reshape(ranks, *states[i].shape)
    return tuple(gathered[i] for i in range(len(states)))


@dataclass(frozen=True)
class Slices:
    """A sequence cut over the ranks of ``group`` in ``order``."""

    order: Literal["contiguous", "zigzag"] = "contiguous"
    group: dist.ProcessGroup | None = None

    @property
    def held(self) -> list[int]:
        """Places in the sequence of this rank's slices."""
        return held_slices(self.order, dist.get_rank(self.group), dist.get_world_size(self.group))

    @property
    def count(self) -> int:
        """Slices of the whole row."""
        return len(self.held) * dist.get_world_size(self.group)

    def gather(self, *states: Tensor) -> tuple[Tensor, ...]:
        """States of this rank's slices, (held, ...) each -> those of all slices in the sequence's order, (S, ...)."""
        ranks = dist.get_world_size(self.group)
        places = torch.tensor([held_slices(self.order, rank, ranks) for rank in range(ranks)])
        source = places.flatten().argsort().to(states[0].device)
        return tuple(parts.flatten(0, 1)[source] for parts in gather_states(*states, group=self.group))


class _AllToAll(torch.autograd.Function):
    """(ranks, ...) -> (ranks, ...): part r goes to rank r. Its own adjoint."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _AllToAll.apply(gradient, ctx.group), None


class SequenceAxis(Axis):
    """Context parallelism: a row's slices over the ranks of a group, and how a region joins them (`kind`)."""

    def __init__(self, slices: Slices, kind: str) -> None:
        assert slices.group is not None
        self.slices, self.kind = slices, kind
        self.rank, self.size = dist.get_rank(slices.group), dist.get_world_size(slices.group)
        places = [held_slices(slices.order, rank, self.size) for rank in range(self.size)]
        self._source = torch.tensor(places).flatten().argsort()
        self._ring = Ring(slices.group, slices.order)

    @property
    def held(self) -> list[int]:
        return self.slices.held

    def gather(self, *states: Tensor) -> tuple[Tensor, ...]:
        return self.slices.gather(*states)

    def whole(self, x: Tensor, dim: int) -> Tensor:
        held = len(self.held)
        parts = x.unflatten(dim, (held, -1)).movedim(dim, 0)
        return torch.cat(list(self.gather(parts)[0]), dim)

    def ring(self, *arguments: Any) -> Tensor:
        return split_attention(self, self._ring, *arguments)

    def to_units(self, x: Tensor, unit_dim: int, length_dim: int) -> Tensor:
        if x.shape[unit_dim] % self.size:
            raise ValueError(f"parallel.cp: {self.size} does not divide the {x.shape[unit_dim]} units of a layer")
        sent = torch.stack(x.chunk(self.size, unit_dim))
        received = _AllToAll.apply(sent, self.slices.group)
        assert isinstance(received, Tensor)  # (rank, ..., own length, ...)
        held = len(self.held)
        parts = [part for got in received for part in got.chunk(held, length_dim)]
        return torch.cat([parts[i] for i in self._source.tolist()], length_dim)

    def to_slices(self, x: Tensor, unit_dim: int, length_dim: int) -> Tensor:
        parts = x.chunk(self.size * len(self.held), length_dim)
        mine = [
            torch.cat([parts[g] for g in held_slices(self.slices.order, rank, self.size)], length_dim)
            for rank in range(self.size)
        ]
        received = _AllToAll.apply(torch.stack(mine), self.slices.group)
        assert isinstance(received, Tensor)
        return torch.cat(list(received), unit_dim)


def connect_context(system: nn.Module, group: dist.ProcessGroup, order: Any, kinds: Sequence[str] = ()) -> Slices:
    """Give every region the axis of the first way of joining slices that it allows, of `kinds` where there are any."""
    slices, ranks = Slices(order, group), dist.get_world_size(group)
    for region in system.modules():
        if getattr(region, "room", None) in ("mixer", "channel"):
            kind = choose_kind(region.traits, region.tp.size, ranks, kinds)  # pyright: ignore
            region.cp = SequenceAxis(slices, kind)  # pyright: ignore[reportArgumentType]
    return slices


def choose_kind(traits: Traits, tp: int, cp: int, kinds: Sequence[str] = ()) -> str:
    """How a region joins the slices of `cp` ranks: the first way that it allows, of `kinds` where any of them is; "a2a"
    only where the ranks divide its heads or channels. Raises LayoutError where none is left."""

    def possible(kind: str) -> bool:
        return kind != "a2a" or traits.units is None or traits.units // tp % cp == 0

    allowed = [kind for kind in traits.cp if possible(kind)]
    if not allowed:
        raise LayoutError(
            f"parallel.cp: {cp} ranks cannot split a sequence whose layer has {traits.units} heads or channels over tp "
            f"{tp} and allows only {', '.join(traits.cp) or 'whole rows'}; use a divisor of {(traits.units or 1) // tp}"
        )
    return next((kind for kind in allowed if kind in kinds), allowed[0])
