"""H3's mixing over ordered slices of one sequence, without a collective; see `diag_ssm/sequence.py` for the scheme.

The shift convolution needs the N - 1 raw k before the slice, so a holder does, with g the slice's place in the order:

    tails = halo_tail(k, N)                                     exchanged first: O(N) a channel
    before_k = halos(all tails, zeros)[g]                       likewise the document ids
    y, end, transition = h3_mix_local(q, k, v, ..., before_k=before_k, before_ids=...)
    states = combine(all ends, all transitions)                 after the second exchange, O(state)
    y = h3_mix_correct(y, q, diag, states[g], before_ids=...)
"""

import torch
from torch import Tensor

from ..backend import Backend, own_precision
from ..diag_ssm import Diagonal
from ..diag_ssm.parameters import compute_dtype
from ..diag_ssm.sequence import (
    Exchange,
    by_row,
    by_slice,
    combine,
    fold,
    halos,
    reached,
    transition,
    unfold,
    zero_input_response,
)
from . import H3State, h3_mix

__all__ = [
    "by_row",
    "by_slice",
    "combine",
    "fold",
    "h3_mix_correct",
    "h3_mix_local",
    "h3_mix_over",
    "halo_tail",
    "halos",
    "unfold",
]


def halo_tail(x: Tensor, taps: int) -> Tensor:
    """What later slices may need of x (..., L): its last min(L, taps - 1) tokens, but at least one (of document ids,
    which also say whether a document goes on)."""
    reach = max(1, taps - 1)
    return x[..., max(0, x.shape[-1] - reach) :]


def h3_mix_local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    diag: Diagonal,
    *,
    d_k: Tensor,
    d: Tensor,
    head_dim: int = 1,
    before_k: Tensor,
    document_ids: Tensor | None = None,
    before_ids: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """One slice with its halo, from a zero SSM state. Arguments as `h3_mix`, and what lies before the slice:

    before_k (batch, channel, >= N - 1) raw k, zero before the sequence; before_ids (batch, >= max(N - 1, 1)) their
    documents, the last entry that of the token before the slice (any value before the sequence).

    Returns y, the end state (batch, H, head_dim^2, M, 2) and the transition (batch, H, 1, M, 2) for `combine`.
    Raises ValueError for document_ids without before_ids, for a halo that is too short, and what `h3_mix` raises.
    """
    batch, reach, dtype = q.shape[0], shift.shape[1] - 1, compute_dtype(q)
    if before_k.shape[-1] < reach:
        got = before_k.shape[-1]
        raise ValueError(f"h3_mix_local: before_k has {got} tokens, but {reach + 1} taps need {reach}")
    history = before_k[..., before_k.shape[-1] - reach :].to(dtype)
    before = None if before_ids is None else before_ids[:, -1]
    if document_ids is not None:
        if before_ids is None or before_ids.shape[-1] < max(1, reach):
            raise ValueError(f"h3_mix_local: document_ids need before_ids of at least {max(1, reach)} tokens")
        same = (before_ids == before_ids[:, -1:]).flip(1).cummin(1).values.flip(1)
        history = torch.where(same[:, None, same.shape[1] - reach :], history, 0)
    document = q.new_zeros(batch, dtype=torch.int32) if before is None else before
    zero = q.new_zeros(batch, diag.channels, head_dim**2, diag.modes, 2, dtype=dtype)
    y, after = h3_mix(
        q,
        k,
        v,
        shift,
        diag,
        d_k=d_k,
        d=d,
        head_dim=head_dim,
        document_ids=document_ids,
        state=H3State(history, zero, document),
        backend=backend,
    )
    with own_precision(q):
        passed = transition(diag, q.shape[2], document_ids, before, batch, dtype)
    return y, after.diag, passed[:, :, None]


def h3_mix_correct(
    y: Tensor,
    q: Tensor,
    diag: Diagonal,
    incoming: Tensor,
    *,
    head_dim: int = 1,
    document_ids: Tensor | None = None,
    before_ids: Tensor | None = None,
) -> Tensor:
    """y of `h3_mix_local` plus what the SSM state `incoming` (batch, H, head_dim^2, M, 2) adds to it.

    Half precision is rounded a second time here.
    """
    with own_precision(q):
        added = _response(q, diag, incoming, head_dim)
        added = reached(added, document_ids, None if before_ids is None else before_ids[:, -1])
        return (y.transpose(0, 1).to(added.dtype) + added).to(y.dtype).transpose(0, 1)


def _response(q: Tensor, diag: Diagonal, incoming: Tensor, head_dim: int) -> Tensor:
    """The output (channel, batch, L) that `incoming` alone would give."""
    batch, _, length = q.shape
    dtype = compute_dtype(q)
    modes = incoming.to(dtype).transpose(0, 1).flatten(1, 2)  # (H, batch x head_dim^2, M, 2)
    response = zero_input_response(diag, modes, length).unflatten(1, (batch, -1))  # (H, batch, head_dim^2, L)
    query = q.transpose(0, 1).to(dtype)
    if head_dim == 1:
        return query * response[:, :, 0]
    query = query.unflatten(0, (-1, head_dim)).transpose(1, 2)  # (H, batch, d1, L)
    response = response.unflatten(2, (head_dim, head_dim))  # (H, batch, d1, d2, L)
    return (query[:, :, :, None] * response).sum(2).transpose(1, 2).flatten(0, 1)


def h3_mix_over(
    slices: Exchange,
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
) -> Tensor:
    """`h3_mix` of a row that is cut over several holders: q, k, v (batch, channel, own length) are this holder's slices
    side by side, in order; so are the document_ids, and the output. Two exchanges: the halo's and the states'."""
    held, count = slices.held, len(slices.held)
    q, k, v = (fold(x, count) for x in (q, k, v))
    reach = max(1, shift.shape[1] - 1)
    (tails,) = slices.gather(by_slice(halo_tail(k, shift.shape[1]), count))
    before_k = by_row(halos(tails, k.new_zeros(len(k) // count, k.shape[1], reach))[held])
    ids = before_ids = None
    if document_ids is not None:
        ids = fold(document_ids, count)
        (tails,) = slices.gather(by_slice(halo_tail(ids, shift.shape[1]), count))
        before_ids = by_row(halos(tails, ids.new_full((len(document_ids), reach), -1))[held])
    y, end, passed = h3_mix_local(
        q, k, v, shift, diag, d_k=d_k, d=d, head_dim=head_dim, before_k=before_k, document_ids=ids,
        before_ids=before_ids,
    )  # fmt: skip
    states = combine(*slices.gather(by_slice(end, count), by_slice(passed, count)))
    y = h3_mix_correct(
        y, q, diag, by_row(states[held]), head_dim=head_dim, document_ids=ids, before_ids=before_ids
    )  # fmt: skip
    return unfold(y, count)
