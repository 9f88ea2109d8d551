"""The fast form: Toeplitz products inside chunks, state passing between them, all real batched GEMMs.

Legend: H kernels, S sequences sharing a kernel (batch x group), C chunks, Q tokens a chunk, M conjugate pairs of
modes, N = 2 M their real and imaginary parts interleaved. With z the chunk's input and s the state before it:

    y = T z + R s            T (Q, Q) lower Toeplitz of K[0..Q-1] with d on its diagonal
    s <- Abar^Q s + W z      R[i, n] = 2 C_n Abar_n^(i+1),  W[n, j] = Bbar_n Abar_n^(Q-1-j)

No kernel of the sequence's length, spectrum or length-L power table exists at any time. Sources: the state-passing
algorithm of H3 (Fu et al. 2022, section 4) with the intra-chunk FFT replaced by a matrix product, as in Mamba-2's
SSD (Dao and Gu 2024, section 6).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .parameters import Diagonal, discretise
from .segments import Segments


class _ChunkOperators(torch.autograd.Function):
    """(Abar, Bbar, C) -> R (H, Q, N), W (H, Q, N) as W^T, decay (H, N); backward by two weighted sums over powers.

    With P_l = Abar^l the gradient needs only sum_l conj(P_l) g_l and sum_l l conj(P_(l-1)) g_l: one elementwise
    product and one small GEMM per operator, where autograd would walk back through every power.
    """

    @staticmethod
    def forward(ctx, a_bar: Tensor, b_bar: Tensor, c: Tensor, chunk: int, dtype: torch.dtype):
        powers = power_table(a_bar, chunk + 1, dtype)
        b_bar, c = b_bar.to(powers.dtype), c.to(powers.dtype)
        ctx.save_for_backward(powers, b_bar, c)
        read = (powers[:, 1:] * (2 * c)[:, None]).conj_physical_()
        write = powers[:, :-1].flip(1) * b_bar[:, None]
        return _real(read), _real(write), _real(powers[:, -1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_read: Tensor, grad_write: Tensor, grad_decay: Tensor):
        powers, b_bar, c = ctx.saved_tensors
        chunk = powers.shape[1] - 1
        a_bar = powers[:, 1]
        level = torch.arange(chunk, device=powers.device, dtype=powers.real.dtype)
        # R = conj(2 C P_(i+1)): gradients with respect to the unconjugated product.
        sums = _weighted_sums(
            powers[:, :-1].conj() * _complex(grad_read).conj(), torch.stack([level * 0 + 1, level + 1])
        )
        grad_c = 2 * a_bar.conj() * sums[:, 0]
        grad_a = (2 * c).conj() * sums[:, 1]
        # W_l = Bbar P_l, stored from l = Q-1 down to 0.
        grad_powers = _complex(grad_write).flip(1)
        if chunk > 1:
            product = powers[:, : chunk - 1].conj() * grad_powers[:, 1:]
            sums = _weighted_sums(product, torch.stack([level[1:] * 0 + 1, level[1:]]))
            grad_b = grad_powers[:, 0] + a_bar.conj() * sums[:, 0]
            grad_a = grad_a + b_bar.conj() * sums[:, 1]
        else:
            grad_b = grad_powers[:, 0]
        grad_a = grad_a + chunk * powers[:, chunk - 1].conj() * _complex(grad_decay)
        return grad_a.to(torch.complex128), grad_b.to(torch.complex128), grad_c.to(torch.complex128), None, None


def power_table(a_bar: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """a_bar^0 .. a_bar^(count-1), (H, count, M) complex, by doubling.

    The multipliers a_bar^(2^k) are squared in fp64 and rounded once, so an entry's relative error is a few units of
    rounding, not a multiple of its power.
    """
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    table = torch.empty(a_bar.shape[0], count, a_bar.shape[1], dtype=complex_dtype, device=a_bar.device)
    table[:, 0] = 1
    have, multiplier = 1, a_bar.to(torch.complex128)
    while have < count:
        new = min(have, count - have)
        torch.mul(table[:, :new], multiplier.to(complex_dtype)[:, None], out=table[:, have : have + new])
        have, multiplier = have + new, multiplier * multiplier
    return table


def _weighted_sums(x: Tensor, weights: Tensor) -> Tensor:
    """(H, L, M) complex, (2, L) -> (H, 2, M) complex."""
    return _complex(torch.matmul(weights, _real(x)))


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()).flatten(-2)


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


class _Toeplitz(torch.autograd.Function):
    """taps (H, n) -> (H, Q, X) with entry [i, x] = taps[offset + i - x], zero outside: causal convolution as a matrix."""

    @staticmethod
    def forward(ctx, taps: Tensor, rows: int, columns: int, offset: int) -> Tensor:
        ctx.shape = taps.shape
        ctx.geometry = rows, columns, offset
        channels, n = taps.shape
        # line[m] = taps[offset + rows - 1 - m]; entry [i, x] = line[rows - 1 - i + x].
        line = taps.new_zeros(channels, rows + columns - 1)
        top = offset + rows - 1
        first = max(0, top - n + 1)
        last = min(line.shape[1], top + 1)
        line[:, first:last] = taps[:, top - last + 1 : top - first + 1].flip(1)
        return line.unfold(1, columns, 1).flip(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, columns, offset = ctx.geometry
        channels, n = ctx.shape
        width = rows + columns - 1
        # Rows written `width` apart and read `width + 1` apart: row i slides i places left, diagonals become columns.
        flat = grad.new_zeros(channels, rows * (width + 1))
        flat[:, : rows * width].unflatten(1, (rows, width))[:, :, rows - 1 :] = grad
        total = flat.unflatten(1, (rows, width + 1))[:, :, :width].sum(1)
        top = offset + rows - 1
        first, last = max(0, top - n + 1), min(width, top + 1)
        out = grad.new_zeros(channels, n)
        out[:, top - last + 1 : top - first + 1] = total[:, first:last].flip(1)
        return out, None, None, None


def toeplitz(taps: Tensor, rows: int, columns: int, offset: int) -> Tensor:
    """(H, rows, columns) with entry [i, x] = taps[h, offset + i - x], zero outside the taps; differentiable."""
    result = _Toeplitz.apply(taps, rows, columns, offset)
    assert isinstance(result, Tensor)
    return result


class _ChunkedScan(torch.autograd.Function):
    """z (H, S, C, Q) -> y of the same shape and the state before each chunk (H, S, C + 1, N) (last: after all)."""

    @staticmethod
    def forward(ctx, z: Tensor, t: Tensor, r: Tensor, w: Tensor, decay: Tensor, initial, continues):
        ctx.set_materialize_grads(False)
        z_columns = z.flatten(1, 2)
        states = _scan(torch.bmm(z_columns, w).unflatten(1, z.shape[1:3]), decay, initial, continues)
        before = states[:, :, :-1].flatten(1, 2)
        y = torch.bmm(z_columns, t.transpose(1, 2)).baddbmm_(before, r.transpose(1, 2)).view(z.shape)
        ctx.save_for_backward(z, t, r, w, decay, states, continues)
        ctx.has_initial = initial is not None
        return y, states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_states):
        z, t, r, w, decay, states, continues = ctx.saved_tensors
        z_columns, before = z.flatten(1, 2), states[:, :, :-1].flatten(1, 2)
        if grad_y is None:
            grad_y = torch.zeros_like(z)
        dy = grad_y.flatten(1, 2)
        from_output = torch.bmm(dy, r).unflatten(1, z.shape[1:3])
        grad_after, grad_decay, grad_initial = _scan_backward(from_output, grad_states, states, decay, continues)
        after = grad_after.flatten(1, 2)
        grad_z = torch.bmm(dy, t).baddbmm_(after, w.transpose(1, 2)).view(z.shape)
        dy_rows = dy.transpose(1, 2)
        grad_t, grad_r = torch.bmm(dy_rows, z_columns), torch.bmm(dy_rows, before)
        grad_w = torch.bmm(z_columns.transpose(1, 2), after)
        return grad_z, grad_t, grad_r, grad_w, grad_decay, grad_initial if ctx.has_initial else None, None


def _mask(continues: Tensor | None, chunk: int, sequences: int) -> Tensor | None:
    """continues (batch, C) -> (1, sequences, 1) bool of one chunk, sequences = batch x group, batch slowest."""
    if continues is None:
        return None
    column = continues[:, chunk]
    return column.repeat_interleave(sequences // column.shape[0])[None, :, None]


def _scan(updates: Tensor, decay: Tensor, initial: Tensor | None, continues: Tensor | None) -> Tensor:
    """states[0] = initial (where continued), states[c + 1] = decay * states[c] (where continued) + updates[c].

    updates (H, S, C, N); returns (H, S, C + 1, N), where index c is the state *before* chunk c, already reset where
    chunk c opens a document, and index C the state after the last chunk.
    """
    heads, sequences, chunks, n = updates.shape
    states = updates.new_zeros(heads, sequences, chunks + 1, n)
    state_c, update_c = _pairs(states), _pairs(updates)
    rate = _pairs(decay)[:, None]
    if initial is not None:
        states[:, :, 0] = initial
    for c in range(chunks):
        keep = _mask(continues, c, sequences)
        if keep is not None:
            state_c[:, :, c] = torch.where(keep, state_c[:, :, c], 0)
        torch.addcmul(update_c[:, :, c], state_c[:, :, c], rate, out=state_c[:, :, c + 1])
    return states


def _scan_backward(from_output: Tensor, grad_states, states: Tensor, decay: Tensor, continues: Tensor | None):
    """Gradients of `_scan` with respect to its updates (H, S, C, N), decay (H, N) and initial state (H, S, N)."""
    heads, sequences, chunks, n = from_output.shape
    grad_updates = torch.empty_like(from_output)
    output_c, update_c, state_c = _pairs(from_output), _pairs(grad_updates), _pairs(states)
    rate = _pairs(decay)[:, None].conj().resolve_conj()
    extra = None if grad_states is None else _pairs(grad_states.contiguous())
    running = torch.zeros_like(output_c[:, :, 0]) if extra is None else extra[:, :, chunks].clone()
    for c in reversed(range(chunks)):
        update_c[:, :, c] = running
        running = torch.addcmul(output_c[:, :, c], running, rate)
        if extra is not None:
            running = running + extra[:, :, c]
        keep = _mask(continues, c, sequences)
        if keep is not None:
            running = torch.where(keep, running, 0)
    grad_decay = (update_c * state_c[:, :, :-1].conj()).sum((1, 2))
    return grad_updates, torch.view_as_real(grad_decay).flatten(-2), torch.view_as_real(running).flatten(-2)


def _pairs(x: Tensor) -> Tensor:
    """Interleaved pairs (..., N) seen as (..., M) complex, sharing memory."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def chunked_ssm(
    z: Tensor, diag: Diagonal, d: Tensor | None, segments: Segments, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Diagonal SSM over chunked inputs.

    z (H, S, C, Q) in fp32 or fp64, S = batch x group with batch slowest, cut by `segments`; initial (H, S, M, 2) or
    None. Returns y like z and the state (H, S, M, 2) after each sequence's last token.
    """
    chunk, sequences = segments.chunk, z.shape[1]
    a_bar, b_bar, c = discretise(diag)
    operators = _ChunkOperators.apply(a_bar, b_bar, c, chunk, z.dtype)
    assert operators is not None
    r, w, decay = operators
    first = 2 * (c * b_bar).real.sum(-1, keepdim=True).to(z.dtype)
    if d is not None:
        first = first + d.to(z.dtype)[:, None]
    b_flat = torch.view_as_real(b_bar).flatten(-2).to(z.dtype)
    taps = torch.cat([first, torch.bmm(r[:, : chunk - 1], b_flat[..., None])[..., 0]], 1)
    t = toeplitz(taps, chunk, chunk, 0)
    flat = None if initial is None else initial.flatten(-2)
    result = _ChunkedScan.apply(z, t, r, w, decay, flat, segments.continues)
    assert result is not None
    y, states = result
    full = segments.slot is None and segments.length % chunk == 0
    if full:
        final = states[:, :, -1]
    else:
        final = _final_state(z, states, a_bar, w, segments)
    return y, final.unflatten(-1, (-1, 2)).reshape(z.shape[0], sequences, diag.modes, 2)


def _final_state(z: Tensor, states: Tensor, a_bar: Tensor, w: Tensor, segments: Segments) -> Tensor:
    """State after the last token when the last chunk is not full: Abar^f s + sum_l Abar^l Bbar z[f - 1 - l].

    The chunk's tokens are moved to its right end, where W expects them.
    """
    heads, sequences, chunks, chunk = z.shape
    if segments.last is None or segments.filled is None:
        last = torch.full((sequences,), chunks - 1, device=z.device)
        filled = torch.full((sequences,), segments.length - (chunks - 1) * chunk, device=z.device)
    else:
        group = sequences // segments.last.shape[0]
        last, filled = segments.last.repeat_interleave(group), segments.filled.repeat_interleave(group)
    which = torch.arange(sequences, device=z.device)
    source = torch.arange(chunk, device=z.device) - (chunk - filled)[:, None]
    shifted = z[:, which, last].gather(2, source.clamp(min=0).expand(heads, -1, -1))
    shifted = torch.where(source >= 0, shifted, 0)
    decays = (a_bar[:, None, :] ** filled[None, :, None]).to(
        torch.complex64 if z.dtype == torch.float32 else a_bar.dtype
    )
    carried = torch.view_as_real(decays * _complex(states[:, which, last])).flatten(-2)
    return torch.baddbmm(carried, shifted, w)
