"""Gradients after the backward: sums that it left open, their norm over all ranks, and clipping.

A gradient may be whole on each rank, a slice (tensor parallelism), a shard (FSDP), on some stages only (pipeline), or a
part of a sum. `finish` makes sums whole; the norm counts every element exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from potamos.parallel.data import REPLICAS, SHARDS
from potamos.parallel.mesh import Mesh, Sizes
from potamos.parallel.tensor import Cut


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this process stores."""
    return x.to_local() if isinstance(x, DTensor) else x


def sum_flat(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over a group in place, one collective per dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for members in by_dtype.values():
        flat = torch.cat([tensor.flatten() for tensor in members])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(members, flat.split([t.numel() for t in members]), strict=True):
            tensor.copy_(part.view_as(tensor))


class Gradients:
    """The gradients of a spread model's parameters."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        cuts: Mapping[str, Cut] | None = None,
        mesh: Mesh | None = None,
        *,
        tied: Sequence[str] = (),
        tied_group: dist.ProcessGroup | None = None,
        counts_tied: bool = True,
        reduced: bool = True,
    ) -> None:
        """cuts, mesh: None where one process holds every parameter whole. tied: names of parameters that the first and
        the last stage both hold, whose gradients add up over tied_group; counts_tied: whether this rank counts them in
        the norm. reduced: whether the backward itself sums over data ranks."""
        self.parameters, self.cuts, self.mesh = parameters, cuts or {}, mesh or Mesh(Sizes(), 0)
        self.tied, self.tied_group, self.counts_tied = set(tied), tied_group, counts_tied
        self.reduced = reduced
        self._places: tuple[Tensor, Tensor] | None = None  # made once: a step must not wait to copy them to a device

    @torch.no_grad()
    def finish(self) -> None:
        """Complete every open sum. A parameter that this rank's rows did not reach has a gradient of zero."""
        mesh = self.mesh
        if mesh.sizes.world == 1:
            return
        for parameter in self.parameters.values():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                # Schedules that split the backward set gradients as autograd made them, of any strides, and a fused
                # optimizer takes the memory of parameter and gradient as it lies.
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        gradients = {n: local(p.grad) for n, p in self.parameters.items() if p.grad is not None}
        if not self.reduced and mesh.size(*REPLICAS, "cp") > 1:
            sum_flat(gradients.values(), mesh.group(*REPLICAS, "cp"))
        elif mesh.size("dp_shard") > 1:
            # What stages share is whole on every rank, and no backward summed it.
            whole = [g for n, g in gradients.items() if not isinstance(self.parameters[n], DTensor)]
            if whole:
                sum_flat(whole, mesh.group(*REPLICAS, *SHARDS))
        if mesh.size("tp") > 1:
            partial = [g for n, g in gradients.items() if self.cuts[n].partial]
            if partial:
                sum_flat(partial, mesh.group("tp"))
        if self.tied and self.tied_group is not None:
            sum_flat([gradients[n] for n in sorted(self.tied)], self.tied_group)

    @torch.no_grad()
    def squares(self, kinds: Mapping[str, int], count: int) -> Tensor:
        """(count,) sums of squared elements by kind, over all ranks, every element once; fp32, or fp64 for fp64."""
        names = [n for n, p in self.parameters.items() if p.requires_grad]
        first = next(iter(self.parameters.values()))
        wide = torch.float64 if any(p.dtype == torch.float64 for p in self.parameters.values()) else torch.float32
        zero = torch.zeros((), device=first.device)
        grads = [self.parameters[n].grad for n in names]
        every = torch._foreach_norm([zero if g is None else local(g) for g in grads])  # pyright: ignore
        norms = torch.stack([norm.to(wide) for norm in every])
        if self._places is None:
            places = [self._counts(n) for n in names], [kinds[n] for n in names]
            self._places = torch.tensor(places[0], device=norms.device), torch.tensor(places[1], device=norms.device)
        counted, kind = self._places
        own = torch.where(counted, norms.square(), 0)
        total = own.new_zeros(count).index_add_(0, kind, own)
        axes = ("pp", *SHARDS, "tp")
        if self.mesh.size(*axes) > 1:
            dist.all_reduce(total, group=self.mesh.group(*axes))
        return total

    def _counts(self, name: str) -> bool:
        """Whether this rank is the one that counts the elements of a gradient that it stores."""
        mesh = self.mesh
        if name in self.tied and not self.counts_tied:
            return False
        if mesh.index("tp") != 0 and self.cuts[name].dim is None:
            return False
        return isinstance(self.parameters[name], DTensor) or mesh.index(*SHARDS) == 0

    @torch.no_grad()
    def clip(self, total: Tensor, limit: float) -> None:
        """Scale gradients by min(1, limit / total), as torch's clip_grad_norm_."""
        grads = [local(p.grad) for p in self.parameters.values() if p.grad is not None]
        torch._foreach_mul_(grads, (limit / (total + 1e-6)).clamp(max=1.0))  # pyright: ignore
