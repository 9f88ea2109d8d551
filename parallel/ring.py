"""Ring attention: every rank's queries meet the keys of every slice of the row, and no rank ever holds them all.

Keys and values travel round the ranks; each stop's result joins what is there by its log-sum-exp, in fp32 or better
(Liu, Zaharia, Abbeel 2023). In the backward their gradients travel with them and come home complete. With zigzag slices
every stop of a causal row costs every rank the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from potamos.kernels.attention import (
    Bias,
    BiasTerms,
    Disentangled,
    Drop,
    DropoutKey,
    Form,
    Mask,
    attention,
    decide,
    form_of,
    merge,
    resolve_bias,
)
from potamos.parallel.facts import Axis
from potamos.parallel.slices import held_slices


class Ring:
    """The ranks that share a row, as neighbors: what one sends, the next one receives."""

    def __init__(self, group: dist.ProcessGroup, order: Any) -> None:
        self.group, self.order = group, order
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._ranks = dist.get_process_group_ranks(group)

    def held(self, rank: int) -> list[int]:
        """Places in the row of a rank's slices."""
        return held_slices(self.order, rank % self.size, self.size)

    def pass_on(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Send to the next rank and receive from the one before."""
        received = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
        to, source = self._ranks[(self.rank + 1) % self.size], self._ranks[(self.rank - 1) % self.size]
        calls = [dist.P2POp(dist.isend, x.contiguous(), to, self.group) for x in tensors]
        calls += [dist.P2POp(dist.irecv, x, source, self.group) for x in received]
        for work in dist.batch_isend_irecv(calls):
            work.wait()
        return received


def split_attention(
    axis: Axis,
    ring: Ring,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Bias | None,
    scale: float,
    dropout: float,
    dropout_key: DropoutKey | None,
    head_offset: int,
) -> Tensor:
    """`attention` of a row whose slices lie on several ranks; q, k, v are this rank's, mask and bias those of the row.

    By `ring_attention`, but where the bias is made of the keys themselves: then every rank gathers all keys.
    """
    if isinstance(bias, Disentangled):
        k, v = axis.whole(k, 2), axis.whole(v, 2)
        step = q.shape[2] // len(axis.held)
        parts = [
            attention(
                part, k, v, mask=mask.part(range(place * step, (place + 1) * step), range(k.shape[2])), bias=bias,
                scale=scale, dropout=dropout, dropout_key=dropout_key, head_offset=head_offset,
            )
            for part, place in zip(q.split(step, 2), axis.held, strict=True)
        ]  # fmt: skip
        return torch.cat(parts, 2)
    part = mask.part(range(q.shape[2]), range(k.shape[2]))
    form = form_of(decide(q, k, v, part, bias, dropout, True, "auto"))
    drop = None if dropout_key is None else Drop(dropout, dropout_key, head_offset)
    return ring_attention(ring, form, q, k, v, resolve_bias(bias, q, k, scale), mask, scale, drop)


def ring_attention(
    ring: Ring,
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Mask,
    scale: float,
    drop: Drop | None,
) -> Tensor:
    """Attention of this rank's queries over the whole row: q (batch, head, own length, dim), k and v likewise, are the
    rank's slices side by side; mask is that of the whole row's queries and keys; terms by distance only.

    Returns the output in q's dtype. Differentiable with respect to q, k, v and the terms' table (this rank's part of
    its gradient).
    """
    assert terms.rows is None, "a bias made of keys would have to travel too"
    out = _Ring.apply(q, k, v, terms.table, ring, form, terms, mask, scale, drop)
    assert isinstance(out, Tensor)
    return out.to(q.dtype)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, table, ring: Ring, form: Form, terms: BiasTerms, mask: Mask, scale, drop):
        del table  # it is in the terms
        pairs = _Pairs(ring, mask, q)
        outs: list[Tensor | None] = [None] * len(pairs.own)
        lses: list[Tensor | None] = [None] * len(pairs.own)
        keys, values = k, v
        for stop in range(ring.size):
            for i, queries, j, part in pairs.visible(stop):
                found, lse = form.forward(
                    queries, pairs.slice(keys, j), pairs.slice(values, j), terms, part, scale, drop, wide=True
                )
                before, known = outs[i], lses[i]
                if before is not None and known is not None:
                    found, lse = merge((before, found), (known, lse))
                outs[i], lses[i] = found, lse
            if stop < ring.size - 1:
                keys, values = ring.pass_on(keys, values)
        out, lse = pairs.join(outs, 2), pairs.join(lses, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = ring, form, terms, mask, scale, drop
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        ring, form, terms, mask, scale, drop = ctx.rest
        pairs = _Pairs(ring, mask, q)
        needs = (True, True, True, ctx.needs_input_grad[3], False, False)
        wide = out.dtype
        d_q = torch.zeros_like(q, dtype=wide)
        d_table = torch.zeros_like(terms.table) if needs[3] else None
        travelling = [k, v, torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)]
        for stop in range(ring.size):
            keys, values, d_k, d_v = travelling
            for i, queries, j, part in pairs.visible(stop):
                found = form.backward(
                    pairs.slice(grad, i).to(wide), None, queries, pairs.slice(keys, j), pairs.slice(values, j),
                    pairs.slice(out, i), pairs.slice(lse, i), terms, part, scale, drop, needs,
                )  # fmt: skip
                for total, place, gradient in ((d_q, i, found[0]), (d_k, j, found[1]), (d_v, j, found[2])):
                    assert gradient is not None
                    pairs.slice(total, place).add_(gradient)
                if d_table is not None:
                    assert found[3] is not None
                    d_table += found[3]
            if ring.size > 1:  # once more than the keys need: then the gradients are at home
                travelling = list(ring.pass_on(*travelling))
        return d_q.to(q.dtype), travelling[2].to(k.dtype), travelling[3].to(v.dtype), d_table, *(None,) * 6


class _Pairs:
    """Which of the rank's own slices of queries sees which slices of keys, stop by stop."""

    def __init__(self, ring: Ring, mask: Mask, q: Tensor) -> None:
        self.ring, self.mask, self.q = ring, mask, q
        self.own = ring.held(ring.rank)
        self.step = q.shape[2] // len(self.own)

    def visible(self, stop: int) -> list[tuple[int, Tensor, int, Mask]]:
        """(own slice, its queries, slice of the keys that are here, their part of the mask) at this stop."""
        found = []
        for j, there in enumerate(self.ring.held(self.ring.rank - stop)):
            for i, here in enumerate(self.own):
                if there <= here or not self.mask.causal or self.mask.prefix is not None:
                    part = self.mask.part(self._columns(here), self._columns(there))
                    found.append((i, self.slice(self.q, i), j, part))
        return found

    def slice(self, x: Tensor, place: int) -> Tensor:
        """One of the slices that lie side by side in x (batch, head, own length, ...)."""
        return x.narrow(2, place * self.step, self.step)

    def join(self, parts: Sequence[Tensor | None], dim: int) -> Tensor:
        return torch.cat([part for part in parts if part is not None], dim)

    def _columns(self, place: int) -> range:
        return range(place * self.step, (place + 1) * self.step)
