"""Joining attention over parts of the keys: exact, from each part's output and log-sum-exp."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) over all keys from those over disjoint parts of them; differentiable.

    outs: (batch, head, queries, dim) each, lses: (batch, head, queries) each, fp32 or fp64 as `attention` gives them
    with return_lse. lse = ln sum_p exp(lse_p), out = sum_p exp(lse_p - lse) out_p; a part in which a query saw nothing
    (lse_p = -inf) adds nothing, and a query that saw nothing anywhere gives 0, -inf and zero gradients.
    Dropout does not disturb it: the lse is that of all probabilities, kept or not.
    Raises ValueError for no parts, unequal counts or half precision.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge: as many outputs as log-sum-exps, and at least one; got {len(outs)} and {len(lses)}")
    for x in (*outs, *lses):
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"merge: parts must be fp32 or fp64, got {x.dtype}; ask attention for return_lse=True")
    parts = torch.stack(tuple(lses))
    top = parts.detach().amax(0)
    empty = top == float("-inf")
    top = torch.where(empty, 0, top)
    weights = (parts - top).exp()
    total = torch.where(empty, 1, weights.sum(0))
    lse = torch.where(empty, float("-inf"), top + total.log())
    out = sum(w[..., None] * o for w, o in zip(weights / total, outs, strict=True))
    assert isinstance(out, Tensor)
    return out, lse
