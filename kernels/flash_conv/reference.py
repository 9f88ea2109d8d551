"""The definition of H3's mixing, from its equations, in the simplest order. Slow."""

import torch
from torch import Tensor

from ..diag_ssm import Diagonal, DiagState, diag_ssm_reference
from . import H3State


def h3_mix_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    diag: Diagonal,
    *,
    d_k: Tensor,
    d: Tensor,
    head_dim: int = 1,
    document_ids: Tensor | None = None,
    state: H3State | None = None,
) -> tuple[Tensor, H3State]:
    """Same arguments and results as `h3_mix`: the filter as a sum over taps, the SSM as a recurrence."""
    batch, channels, length = q.shape
    heads, taps = diag.channels, shift.shape[1]
    if state is None:
        first = q.new_zeros(batch, dtype=torch.int32) if document_ids is None else document_ids[:, 0]
        state = H3State(
            q.new_zeros(batch, channels, taps - 1), q.new_zeros(batch, heads, head_dim**2, diag.modes, 2), first
        )
    ids = state.document[:, None].expand(batch, length) if document_ids is None else document_ids
    past_ids = state.document[:, None].expand(batch, taps - 1)
    all_k, all_ids = torch.cat([state.shift, k], 2), torch.cat([past_ids, ids], 1)
    shifted = d_k[:, None] * k
    for lag in range(taps):
        start = taps - 1 - lag
        # Same document all the way from the earlier token to this one.
        same = torch.ones(batch, length, dtype=torch.bool, device=q.device)
        for j in range(start, taps - 1):
            same &= all_ids[:, j : j + length] == all_ids[:, j + 1 : j + 1 + length]
        shifted = shifted + shift[:, lag, None] * torch.where(same[:, None], all_k[:, :, start : start + length], 0)
    k4, v4, q4 = (x.reshape(batch, heads, head_dim, length) for x in (shifted, v, q))
    kv = (k4[:, :, :, None] * v4[:, :, None]).flatten(1, 3)
    y, final = diag_ssm_reference(
        kv, diag, d=d, document_ids=document_ids, state=DiagState(state.diag.flatten(1, 2), state.document)
    )
    out = (q4[:, :, :, None] * y.view(batch, heads, head_dim, head_dim, length)).sum(2).flatten(1, 2)
    kept = all_ids[:, length:] == all_ids[:, -1:]
    kept = kept.flip(1).cummin(1).values.flip(1)
    history = torch.where(kept[:, None], all_k[:, :, length:], 0)
    return out, H3State(history, final.modes.unflatten(1, (heads, head_dim**2)), final.document)
