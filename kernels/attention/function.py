"""One differentiable function over any form of attention: what a form must offer, and what is kept for backward."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dropout import DropoutKey
from .biases import BiasTerms
from .masks import Mask

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Drop(NamedTuple):
    """Dropout on the probabilities: kept ones are scaled by 1 / (1 - p).

    The bits are those of `kernels.dropout.attention_keep_mask` at global places: the columns of the mask, and heads
    from head_offset on.
    """

    p: float
    key: DropoutKey
    head_offset: int = 0


class Form(Protocol):
    """An implementation: a module with these two functions.

    Shapes: q (batch, head, queries, dim); k (batch, kv head, keys, dim), v with its own dim, kv heads dividing heads.
    Both functions are deterministic.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        terms: BiasTerms,
        mask: Mask,
        scale: float,
        drop: Drop | None,
        *,
        wide: bool,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse): out in q's dtype, or with `wide` in fp32 (fp64 for fp64); lse (batch, head, queries) fp32 or
        fp64, the natural log of the sum of exponentials, -inf (and out 0) for a query that sees nothing."""
        ...

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        terms: BiasTerms,
        mask: Mask,
        scale: float,
        drop: Drop | None,
        needs: tuple[bool, ...],
    ) -> Gradients:
        """Gradients of (q, k, v, table, content, position), each in its dtype, None where `needs` says so.

        out and lse may be those of more keys than k holds (a merge of partial results): the gradients are then this
        part's share of the whole.
        """
        ...


def attend(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Mask,
    scale: float,
    drop: Drop | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by `form`, differentiable with respect to q, k, v and the terms' table, content and position.

    Kept for backward: the inputs, out and lse; nothing of length x length.
    """
    return _Attend.apply(
        q, k, v, terms.table, terms.content, terms.position, terms.slopes, terms.rows, terms.least, form, mask, scale,
        drop, wide,
    )  # fmt: skip


def row_delta(grad_out: Tensor, out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """(batch, head, queries) fp32 or fp64: what is subtracted from the gradient of each probability of a row."""
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    delta = (out.to(dtype) * grad_out.to(dtype)).sum(-1)
    return delta if grad_lse is None else delta - grad_lse.to(dtype)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, table, content, position, slopes, rows, least, form, mask, scale, drop, wide):
        terms = BiasTerms(slopes, table, content, position, rows, least)
        out, lse = form.forward(q, k, v, terms, mask, scale, drop, wide=wide)
        ctx.save_for_backward(q, k, v, out, lse, *terms[:5])
        ctx.least, ctx.form, ctx.mask, ctx.scale, ctx.drop = least, form, mask, scale, drop
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None):
        q, k, v, out, lse, slopes, table, content, position, rows = ctx.saved_tensors
        terms = BiasTerms(slopes, table, content, position, rows, ctx.least)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        gradients = ctx.form.backward(
            grad_out, grad_lse, q, k, v, out, lse, terms, ctx.mask, ctx.scale, ctx.drop,
            tuple(ctx.needs_input_grad[:6]),
        )  # fmt: skip
        return *gradients, *(None,) * 8
