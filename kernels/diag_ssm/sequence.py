"""One sequence over many holders: the diagonal SSM cut into ordered slices, without a collective in sight.

A linear recurrence from any state is the sum of two responses: that of its inputs from a zero state, and that of the
state with zero inputs. So every slice runs by itself (`diag_ssm_local`), the states at all borders follow from one
number per mode and slice (`combine`), and what the incoming state adds to the outputs comes last (`diag_ssm_correct`):

    y, end, transition = diag_ssm_local(u, diag, ...)        each slice, at once
    states = combine(all ends, all transitions)              after one exchange of O(state) numbers
    y = diag_ssm_correct(y, diag, states[g], ...)            slice g

Every piece is differentiable: the gradient of a state goes back through `combine` to the ends of all earlier slices.
A holder of several slices of one length (zigzag order) turns them into rows of the batch with `fold`.

Source: the state-passing algorithm of H3 (Fu et al. 2022, section 4), between devices instead of chunks.
"""

from typing import Protocol

import torch
from torch import Tensor

from ..backend import Backend, own_precision
from . import diag_ssm
from .parameters import Diagonal, compute_dtype, discretise
from .segments import CHUNK


class Exchange(Protocol):
    """Who holds which slices of a row, and the one exchange that its holders need."""

    @property
    def held(self) -> list[int]:
        """Places in the row of this holder's slices, in order."""
        ...

    def gather(self, *states: Tensor) -> tuple[Tensor, ...]:
        """States of this holder's slices, (held, ...) each -> those of all slices in the row's order; differentiable,
        and the same on every holder."""
        ...


def fold(x: Tensor, count: int) -> Tensor:
    """`count` equal slices side by side in the last dimension become rows: (batch, ..., count L) ->
    (batch count, ..., L), slices of one row together. A view when the memory order is (..., batch, length)."""
    if count == 1:
        return x
    if x.shape[-1] % count:
        raise ValueError(f"fold: a length of {x.shape[-1]} is not a multiple of {count} slices")
    x = x.unflatten(-1, (count, -1))
    return x.movedim(-2, 1).flatten(0, 1) if x.dim() == 3 else x.permute(1, 0, 2, 3).flatten(1, 2).transpose(0, 1)


def unfold(x: Tensor, count: int) -> Tensor:
    """The inverse of `fold`."""
    if count == 1:
        return x
    return x.unflatten(0, (-1, count)).movedim(1, -2).flatten(-2)


def by_slice(x: Tensor, count: int) -> Tensor:
    """What `fold`ed rows gave (batch count, ...), by slices: (count, batch, ...)."""
    return x.unflatten(0, (-1, count)).transpose(0, 1)


def by_row(x: Tensor) -> Tensor:
    """The inverse of `by_slice`."""
    return x.transpose(0, 1).flatten(0, 1)


def halos(tails: Tensor, first: Tensor) -> Tensor:
    """What lies before each slice: tails (S, ..., n), the last n = min(reach, L) entries of every slice in order;
    first (..., reach), what lies before the first slice. Returns (S + 1, ..., reach): entry g for slice g, the last
    one for whatever follows the last slice. A halo longer than a slice reaches over several.

    As with `combine`, every entry's graph contains all tails. Raises ValueError for tails longer than the reach.
    """
    reach, n = first.shape[-1], tails.shape[-1]
    if not 1 <= n <= reach:
        raise ValueError(f"halos: tails of {n} tokens for a reach of {reach}; they must be 1 to {reach} long")
    line = torch.cat([first, tails.movedim(0, -2).flatten(-2)], -1)
    return line.unfold(-1, reach, n).movedim(-2, 0)


def combine(ends: Tensor, transitions: Tensor, initial: Tensor | None = None) -> Tensor:
    """The state before each slice: s[0] = initial (or zero), s[g + 1] = transitions[g] * s[g] + ends[g].

    ends (S, ..., M, 2) and transitions, broadcast against them: complex numbers as pairs, slices in the order of the
    sequence. Returns (S + 1, ..., M, 2); the last entry is the state after the whole sequence.

    The entries are one tensor on purpose: whichever of them a holder uses, its graph contains all slices' ends, so
    that all holders take part in the exchange's backward.
    """
    rate, end = torch.view_as_complex(transitions.contiguous()), torch.view_as_complex(ends.contiguous())
    state = torch.zeros_like(end[0]) if initial is None else torch.view_as_complex(initial.to(ends.dtype).contiguous())
    states = [state]
    for g in range(end.shape[0]):
        state = rate[g] * state + end[g]
        states.append(state)
    return torch.view_as_real(torch.stack(states))


def diag_ssm_local(
    u: Tensor,
    diag: Diagonal,
    *,
    d: Tensor | None,
    document_ids: Tensor | None = None,
    before: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """One slice from a zero state. Arguments as `diag_ssm`; before (batch,): the document of the token before the
    slice, needed with document_ids (any value for the sequence's first token).

    Returns y, the end state (batch, channel, M, 2) and the transition (batch, channel, M, 2) for `combine`.
    Raises ValueError for document_ids without `before`, and what `diag_ssm` raises.
    """
    y, state = diag_ssm(u, diag, d=d, document_ids=document_ids, backend=backend)
    with own_precision(u):
        passed = transition(diag, u.shape[2], document_ids, before, u.shape[0], compute_dtype(u))
    return y, state.modes, passed.repeat_interleave(u.shape[1] // diag.channels, 1)


def diag_ssm_correct(
    y: Tensor,
    diag: Diagonal,
    incoming: Tensor,
    *,
    document_ids: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """y of `diag_ssm_local` plus what the state `incoming` (batch, channel, M, 2) adds to it; y's shape and dtype.

    Half precision is rounded a second time here.
    """
    length, dtype = y.shape[2], compute_dtype(y)
    with own_precision(y):
        modes = incoming.to(dtype).transpose(0, 1).unflatten(0, (diag.channels, -1)).flatten(1, 2)
        response = zero_input_response(diag, modes, length).unflatten(1, (-1, y.shape[0])).flatten(0, 1)
        response = reached(response, document_ids, before)
        return (y.transpose(0, 1).to(dtype) + response).to(y.dtype).transpose(0, 1)


def transition(
    diag: Diagonal,
    length: int,
    document_ids: Tensor | None,
    before: Tensor | None,
    batch: int,
    dtype: torch.dtype,
) -> Tensor:
    """Abar^length, or zero in the rows where a document starts inside the slice: (batch, H, M, 2)."""
    a_bar, _, _ = discretise(diag)
    power = torch.view_as_real(_power(a_bar, length)).to(dtype).expand(batch, -1, -1, -1)
    if document_ids is None:
        return power
    whole = _continues(document_ids, before)[:, -1]
    return torch.where(whole[:, None, None, None], power, 0)


def reached(response: Tensor, document_ids: Tensor | None, before: Tensor | None) -> Tensor:
    """response (channel, batch, L), zero from the first token on that begins a document."""
    if document_ids is None:
        return response
    return torch.where(_continues(document_ids, before), response, 0)


def _continues(document_ids: Tensor, before: Tensor | None) -> Tensor:
    """(batch, L) bool: no document has begun between the slice's start and this token, both included."""
    if before is None:
        raise ValueError("a slice with document_ids needs the document of the token before it: before=(batch,)")
    previous = torch.cat([before[:, None], document_ids[:, :-1]], 1)  # in the wider of their dtypes
    return (document_ids == previous).cummin(1).values


def zero_input_response(diag: Diagonal, modes: Tensor, length: int) -> Tensor:
    """2 Re sum_n C_n Abar_n^(t + 1) s_n for t < length: modes (H, S, M, 2) -> (H, S, length).

    In two levels, t = c Q + i: the decayed states at every Q-th token, read by one matrix product.
    """
    a_bar, _, c = discretise(diag)
    chunk = min(CHUNK, length)
    count = -(-length // chunk)
    complex_dtype = torch.complex128 if modes.dtype == torch.float64 else torch.complex64
    decays = _powers(_power(a_bar, chunk), count).to(complex_dtype)
    starts = decays[:, None] * torch.view_as_complex(modes.contiguous())[:, :, None]
    read = (_powers(a_bar, chunk) * (2 * c * a_bar)[:, None]).conj().to(complex_dtype)
    # Re(x y) is the dot product of (Re x, Im x) with those of conj(y).
    table = torch.view_as_real(read.resolve_conj()).flatten(-2)
    states = torch.view_as_real(starts).flatten(-2).flatten(1, 2)
    response = torch.bmm(states, table.transpose(1, 2))
    return response.view(modes.shape[0], modes.shape[1], count * chunk)[..., :length]


def _powers(base: Tensor, count: int) -> Tensor:
    """base^0 .. base^(count - 1) by doubling, differentiable: (H, M) complex -> (H, count, M)."""
    table, multiplier = torch.ones_like(base)[:, None], base
    while table.shape[1] < count:
        table = torch.cat([table, table * multiplier[:, None]], 1)
        multiplier = multiplier * multiplier
    return table[:, :count]


def _power(base: Tensor, exponent: int) -> Tensor:
    """base^exponent by squaring: torch's complex power and its gradient are not defined at zero."""
    result = torch.ones_like(base)
    while exponent:
        if exponent & 1:
            result = result * base
        base, exponent = base * base, exponent >> 1
    return result


def diag_ssm_over(
    slices: Exchange, u: Tensor, diag: Diagonal, *, d: Tensor | None, document_ids: Tensor | None = None
) -> Tensor:
    """`diag_ssm` of a row that is cut over several holders: u (batch, channel, own length) is this holder's slices side
    by side, in order; so are the document_ids, and the output."""
    held, count = slices.held, len(slices.held)
    u = fold(u, count)
    ids = before = None
    if document_ids is not None:
        ids = fold(document_ids, count)
        (tails,) = slices.gather(by_slice(ids[:, -1:], count))
        before = by_row(halos(tails, ids.new_full((len(document_ids), 1), -1))[held])[:, -1]
    y, end, passed = diag_ssm_local(u, diag, d=d, document_ids=ids, before=before)
    states = combine(*slices.gather(by_slice(end, count), by_slice(passed, count)))
    return unfold(diag_ssm_correct(y, diag, by_row(states[held]), document_ids=ids, before=before), count)
