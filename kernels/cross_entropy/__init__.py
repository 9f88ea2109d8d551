"""Cross-entropy of a linear layer's scores, without ever holding all of them.

The scores of N tokens over V words are the largest tensor of a small model: at N = 4096, V = 50,264 in fp32, 823 MB,
three times over by the end of the backward. Here rows go through in chunks, and each chunk's gradients are taken while
its scores are at hand, which costs the same three matrix products and keeps only d hidden and d weight.
"""

from typing import Protocol

import torch
from torch import Tensor

from ..backend import Backend, resolve_backend
from ..once import differentiable_once
from .reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]

# Tokens whose scores are in flight. Each chunk reads and writes d weight once: fewer tokens would make that traffic,
# V x D x 8 bytes, weigh against the products; more would push small vocabularies out of a CPU's cache for nothing.
_CHUNK_ROWS = {"cpu": 512, "cuda": 4096}


class Vocabulary(Protocol):
    """Ranks that hold equal slices of the vocabulary, in order; `sum` and `max` are over them."""

    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor: ...
    def max(self, x: Tensor) -> Tensor: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocabulary: Vocabulary | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T)[target], in nats, 0-dimensional, fp32 (fp64 for fp64 inputs).

    hidden: (N, D) and weight: (V, D), of one floating dtype, in which the products are taken; the softmax and the sums
    are fp32 or better. targets: (N,) int64, negative = no target, which adds exactly nothing.
    vocabulary: where each of several ranks holds a slice of the weight's rows; hidden and targets are equal on all of
    them, so is the result, and hidden's gradient is this rank's part of a sum over them.

    The gradient is computed in the forward pass and scaled in the backward, so it can be asked for once, and only by
    first-order differentiation. Raises ValueError for shapes that do not fit.
    """
    resolve_backend(backend, "linear_cross_entropy")
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} must be (N, D), (V, D) and (N,)"
        )
    if vocabulary is not None and vocabulary.size == 1:
        vocabulary = None
    return _Fused.apply(hidden, weight, targets, vocabulary)  # pyright: ignore[reportReturnType]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary | None) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = None
        rows = _CHUNK_ROWS.get(hidden.device.type, 4096)
        for begin in range(0, len(hidden), rows):
            part, target = hidden[begin : begin + rows], targets[begin : begin + rows]
            scores = (part @ weight.mT).to(wide)
            valid = target >= 0
            place, here = _places(target, len(weight), vocabulary)
            lse, score = scores.logsumexp(1), scores.gather(1, place).squeeze(1)
            if vocabulary is not None:
                top = vocabulary.max(lse)
                lse = top + vocabulary.sum((lse - top).exp()).log()
                score = vocabulary.sum(torch.where(here, score, 0))
            total += torch.where(valid, lse - score, 0).sum()
            if not any(ctx.needs_input_grad[:2]):
                continue
            slope = scores.sub_(lse[:, None]).exp_()  # softmax - one-hot, in place
            slope.scatter_add_(1, place, -here.to(wide)[:, None])
            slope = slope.mul_(valid[:, None]).to(part.dtype)
            if d_hidden is not None:
                d_hidden[begin : begin + rows] = slope @ weight
            if not ctx.needs_input_grad[1]:
                continue
            if d_weight is None:  # the first product makes it: zeros to add to would be one more pass over it
                d_weight = (slope.mT @ part).to(wide)
            elif slope.dtype == wide:
                d_weight.addmm_(slope.mT, part)
            else:
                d_weight += slope.mT @ part
        if d_weight is None and ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=wide)  # no token at all
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grad).to(ctx.dtype),
            None,
            None,
        )


def _places(target: Tensor, rows: int, vocabulary: Vocabulary | None) -> tuple[Tensor, Tensor]:
    """The row of each target in this rank's slice, (N, 1), 0 where it has none, and whether it is here, (N,)."""
    local = target if vocabulary is None else target - vocabulary.rank * rows
    here = (target >= 0) & (local >= 0) & (local < rows)
    return torch.where(here, local, 0)[:, None], here
