"""Context parallelism: who holds which slice of a sequence, and the exchange of what lies at the slices' borders.

Kernels offer the mathematics of slices without a collective (``kernels/diag_ssm/sequence.py``); this module alone
communicates. Every exchange is an all-gather of O(state) numbers, differentiable and the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor


def held_slices(order: Literal["contiguous", "zigzag"], rank: int, ranks: int) -> list[int]:
    """The slices that a rank holds, by their place in the sequence, in that order.

    Contiguous: ``ranks`` slices, one each. Zigzag: ``2 ranks`` slices, rank r the r-th from both ends, so that causal
    attention costs every rank the same. Raises ValueError for another order.
    """
    if order == "contiguous":
        return [rank]
    if order == "zigzag":
        return [rank, 2 * ranks - 1 - rank]
    raise ValueError(f"unknown order of slices {order!r}; choose 'contiguous' or 'zigzag'")


class _AllGather(torch.autograd.Function):
    """(n,) on each rank -> (ranks n,) on all. Backward: the sum over ranks of what they want of this rank's part."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        parts = x.new_empty(dist.get_world_size(group) * x.numel())
        dist.all_gather_into_tensor(parts, x.contiguous(), group=group)
        return parts

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (gradient,) = gradients
        own = gradient.new_empty(gradient.numel() // dist.get_world_size(ctx.group))
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own, None


def gather_states(*states: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, ...]:
    """Each of ``states`` (...) from every rank: (ranks, ...), in one all-gather for those of one dtype.

    Shapes and dtypes must agree on all ranks. The backward is one reduce-scatter, so every rank must reach it: use
    the result on every rank, even where its value does not matter (one entry of a stacked tensor is enough).
    """
    ranks = dist.get_world_size(group)
    gathered: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(state.dtype for state in states):
        which = [i for i, state in enumerate(states) if state.dtype == dtype]
        parts = _AllGather.apply(torch.cat([states[i].flatten() for i in which]), group)
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

    def gather(self, *states: Tensor) -> tuple[Tensor, ...]:
        """States of this rank's slices, (held, ...) each -> those of all slices in the sequence's order, (S, ...)."""
        ranks = dist.get_world_size(self.group)
        places = torch.tensor([held_slices(self.order, rank, ranks) for rank in range(ranks)])
        source = places.flatten().argsort().to(states[0].device)
        return tuple(parts.flatten(0, 1)[source] for parts in gather_states(*states, group=self.group))


def connect_context(system, group, order):
    raise NotImplementedError
