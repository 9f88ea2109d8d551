"""The axes that a layout puts into regions and frontends: what mathematics sends between ranks, with its gradients.

Each call is a collective and its adjoint. Written as autograd functions, because what the adjoint of a sum is depends
on who holds what: the sum of partial results, wanted whole by every rank, has the identity as its adjoint.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from potamos.parallel.facts import Axis

LENGTH = 1
"""Dimension of hidden states (batch, length, width) that is sliced between the regions."""


# Newer versions of torch have other names for the same two, and warn of these. Looked up at each call, so that who
# counts collectives sees them.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def _all_reduce(x: Tensor, group: dist.ProcessGroup, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, operation, group)
    return x


def _gather(x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
    ranks = dist.get_world_size(group)
    whole = x.new_empty(ranks * x.shape[dim], *x.movedim(dim, 0).shape[1:])
    getattr(dist, _ALL_GATHER)(whole, x.movedim(dim, 0).contiguous(), group=group)
    return whole.movedim(0, dim)


def _scatter_sum(x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
    x = x.movedim(dim, 0).contiguous()
    part = x.new_empty(len(x) // dist.get_world_size(group), *x.shape[1:])
    getattr(dist, _REDUCE_SCATTER)(part, x, group=group)
    return part.movedim(0, dim)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_reduce(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        del ctx
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return gradient, None


class Gather(torch.autograd.Function):
    """Slices -> the whole; backward: the sum over ranks of what they want of this rank's slice."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gather(x, group, dim)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _scatter_sum(gradient, ctx.group, ctx.dim), None, None


class _ScatterSum(torch.autograd.Function):
    """Partial wholes -> this rank's slice of their sum; backward: the slices' gradients, gathered."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _scatter_sum(x, group, dim)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gather(gradient, ctx.group, ctx.dim), None, None


class TensorAxis(Axis):
    """Tensor parallelism: a region's columns over the ranks of a group.

    With ``sequence`` hidden states outside the regions are slices of the row, so that norms, dropout and residuals are
    divided too (Korthikanti et al. 2022): `enter` gathers, `leave` scatters the sum, each the other's adjoint.
    """

    def __init__(self, group: dist.ProcessGroup, *, sequence: bool) -> None:
        self.group, self.sequence = group, sequence
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def enter(self, x: Tensor) -> Tensor:
        result = Gather.apply(x, self.group, LENGTH) if self.sequence else _SumGradient.apply(x, self.group)
        assert isinstance(result, Tensor)
        return result

    def leave(self, x: Tensor) -> Tensor:
        result = _ScatterSum.apply(x, self.group, LENGTH) if self.sequence else _Sum.apply(x, self.group)
        assert isinstance(result, Tensor)
        return result

    def sum(self, x: Tensor) -> Tensor:
        result = _Sum.apply(x, self.group)
        assert isinstance(result, Tensor)
        return result

    def max(self, x: Tensor) -> Tensor:
        return _all_reduce(x.detach(), self.group, dist.ReduceOp.MAX)

    def own(self, x: Tensor, dim: int = LENGTH) -> Tensor:
        return x.chunk(self.size, dim)[self.rank] if self.sequence else x
