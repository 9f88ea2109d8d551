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

from ..once import differentiable_once
from .parameters import Diagonal, discretise
from .segments import Segments


class _ChunkOperators(torch.autograd.Function):
    """(Abar, Bbar, C) -> R (H, Q, N), W^T (H, Q, N), taps K (H, Q), decay (H, N), powers 0..Q (H, Q + 1, N).

    With P_l = Abar^l every gradient is some sum_l g_l conj(P_l) and sum_l l g_l conj(P_(l-1)): one elementwise product
    and one small GEMM per operator, where autograd would walk back through every power.
    """

    @staticmethod
    def forward(ctx, a_bar: Tensor, b_bar: Tensor, c: Tensor, chunk: int, dtype: torch.dtype):
        powers = power_table(a_bar, chunk + 1, dtype)
        b_bar, c = b_bar.to(powers.dtype), c.to(powers.dtype)
        ctx.save_for_backward(powers, b_bar, c)
        ctx.set_materialize_grads(False)
        read = (powers[:, 1:] * (2 * c)[:, None]).conj_physical_()
        write = powers[:, :-1].flip(1) * b_bar[:, None]
        table = _real(powers)
        # Re(x y) is the dot product of (Re x, Im x) with those of conj(y).
        taps = torch.bmm(table[:, :-1], _real(2 * (c * b_bar).conj())[:, :, None])[:, :, 0]
        return _real(read), _real(write), taps, _real(powers[:, -1]), table

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_read, grad_write, grad_taps, grad_decay, grad_table):
        powers, b_bar, c = ctx.saved_tensors
        chunk, a_bar = powers.shape[1] - 1, powers[:, 1]
        level = torch.arange(chunk, device=powers.device, dtype=powers.real.dtype)
        both = torch.stack([torch.ones_like(level), level])
        grad_a, grad_b, grad_c = torch.zeros_like(b_bar), torch.zeros_like(b_bar), torch.zeros_like(b_bar)
        if grad_read is not None:
            # R = conj(2 C P_(i+1)), so the gradient of 2 C P_(i+1) is the conjugate of R's.
            flat, risen = _weighted_sums(powers[:, :-1] * _complex(grad_read), torch.stack([both[0], level + 1]))
            grad_c = grad_c + (2 * a_bar * flat).conj()
            grad_a = grad_a + (2 * c * risen).conj()
        if grad_write is not None:
            # W_l = Bbar P_l, stored from l = Q-1 down to 0: row r of `lowered` is P_(Q-2-r).
            grad_powers = _complex(grad_write)
            lowered = powers[:, : chunk - 1].flip(1).conj_physical_()
            flat, risen = _weighted_sums(lowered * grad_powers[:, :-1], both[:, 1:].flip(1))
            grad_b = grad_b + grad_powers[:, -1] + a_bar.conj() * flat
            grad_a = grad_a + b_bar.conj() * risen
        if grad_taps is not None:
            # K_l = 2 Re(C Bbar P_l).
            weights = torch.stack([grad_taps[:, 1:], grad_taps[:, 1:] * level[1:]], 1)
            flat, risen = _complex(torch.bmm(weights, _real(powers)[:, : chunk - 1])).unbind(1)
            grad_product = 2 * (grad_taps[:, :1] + a_bar * flat).conj()
            grad_b = grad_b + grad_product * c.conj()
            grad_c = grad_c + grad_product * b_bar.conj()
            grad_a = grad_a + 2 * (c * b_bar * risen).conj()
        if grad_decay is not None:
            grad_a = grad_a + chunk * powers[:, chunk - 1].conj() * _complex(grad_decay)
        if grad_table is not None:
            (risen,) = _weighted_sums(powers[:, :-1].conj() * _complex(grad_table)[:, 1:], (level + 1)[None])
            grad_a = grad_a + risen
        return *(g.to(torch.complex128) for g in (grad_a, grad_b, grad_c)), None, None


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


def _weighted_sums(x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """(H, L, M) complex, weights (k, L) -> k sums over L, each (H, M) complex."""
    return _complex(torch.matmul(weights, _real(x))).unbind(1)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()).flatten(-2)


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def _toeplitz(taps: Tensor) -> Tensor:
    """taps (H, Q) -> (H, Q, Q) with entry [i, j] = taps[i - j], zero above the diagonal."""
    chunk = taps.shape[1]
    line = torch.cat([taps.flip(1), taps.new_zeros(taps.shape[0], chunk - 1)], 1)
    return line.unfold(1, chunk, 1).flip(1)


def _diagonal_sums(matrix: Tensor) -> Tensor:
    """(H, Q, Q) contiguous -> (H, Q), the sums over each lower diagonal: the transpose of `_toeplitz`.

    Overwrites the upper triangle. Read Q + 1 apart instead of Q, row i begins i places further right, so that the
    lower diagonals become columns; the part that wraps over from the row before is the zeroed upper triangle.
    """
    heads, chunk, _ = matrix.shape
    main = matrix.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True)
    if chunk == 1:
        return main
    matrix.tril_()
    shape, strides = (heads, chunk - 1, chunk - 1), (chunk * chunk, chunk + 1, 1)
    slanted = matrix.as_strided(shape, strides, matrix.storage_offset() + 2)
    return torch.cat([main, slanted.sum(1).flip(1)], 1)


class _ChunkedScan(torch.autograd.Function):
    """z (H, S, C, Q), taps (H, Q), operators -> y like z, the states before each chunk (H, S, C, N) and after all."""

    @staticmethod
    def forward(ctx, z: Tensor, taps: Tensor, r: Tensor, w: Tensor, decay: Tensor, initial, continues):
        ctx.set_materialize_grads(False)
        t = _toeplitz(taps)
        columns = z.flatten(1, 2)
        before, final = _scan(torch.bmm(columns, w).unflatten(1, z.shape[1:3]), decay, initial, continues)
        y = torch.bmm(columns, t.transpose(1, 2)).baddbmm_(before.flatten(1, 2), r.transpose(1, 2)).view(z.shape)
        ctx.save_for_backward(z, t, r, w, decay, before, continues)
        ctx.has_initial = initial is not None
        return y, before, final

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_y, grad_before, grad_final):
        z, t, r, w, decay, before, continues = ctx.saved_tensors
        columns = z.flatten(1, 2)
        if grad_y is None:
            grad_y = torch.zeros_like(z)
        dy = grad_y.flatten(1, 2)
        from_output = torch.bmm(dy, r).unflatten(1, z.shape[1:3])
        if grad_before is not None:
            from_output += grad_before
        grad_after, grad_initial = _scan_backward(from_output, grad_final, decay, continues)
        after = grad_after.flatten(1, 2)
        grad_z = torch.bmm(dy, t).baddbmm_(after, w.transpose(1, 2)).view(z.shape)
        dy_rows = dy.transpose(1, 2)
        grad_taps = _diagonal_sums(torch.bmm(dy_rows, columns))
        grad_r = torch.bmm(dy_rows, before.flatten(1, 2))
        grad_w = torch.bmm(columns.transpose(1, 2), after)
        grad_decay = _conjugate_product_sum(before.flatten(1, 2), after)
        return grad_z, grad_taps, grad_r, grad_w, grad_decay, grad_initial if ctx.has_initial else None, None


def _conjugate_product_sum(x: Tensor, g: Tensor) -> Tensor:
    """sum_k conj(x[h, k]) g[h, k] of interleaved pairs (H, K, N) -> (H, N), in real products: torch would first write
    out the conjugate."""
    real = (x * g).sum(1).unflatten(-1, (-1, 2)).sum(-1)
    turned = torch.view_as_real(_pairs(x) * 1j).flatten(-2)
    imaginary = (turned * g).sum(1).unflatten(-1, (-1, 2)).sum(-1)
    return torch.stack([real, imaginary], -1).flatten(-2)


def _mask(continues: Tensor | None, chunk: int, sequences: int) -> Tensor | None:
    """continues (batch, C) -> (1, sequences, 1) bool of one chunk, sequences = batch x group, batch slowest."""
    if continues is None:
        return None
    column = continues[:, chunk]
    return column.repeat_interleave(sequences // column.shape[0])[None, :, None]


def _scan(updates: Tensor, decay: Tensor, initial: Tensor | None, continues: Tensor | None) -> tuple[Tensor, Tensor]:
    """s[0] = initial, s[c + 1] = decay * s[c] + updates[c], with s[c] set to zero where chunk c opens a document.

    updates (H, S, C, N), initial (H, S, N) -> s[0..C-1] as (H, S, C, N) and s[C] as (H, S, N).
    """
    before = torch.empty_like(updates)
    before_c, update_c, rate = _pairs(before), _pairs(updates), _pairs(decay)[:, None]
    state = torch.zeros_like(update_c[:, :, 0]) if initial is None else _complex(initial)
    for c in range(updates.shape[2]):
        keep = _mask(continues, c, updates.shape[1])
        if keep is not None:
            state = torch.where(keep, state, 0)
        before_c[:, :, c] = state
        state = torch.addcmul(update_c[:, :, c], state, rate)
    return before, torch.view_as_real(state).flatten(-2)


def _scan_backward(from_output: Tensor, grad_final, decay: Tensor, continues: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of `_scan` with respect to its updates (H, S, C, N) and initial state (H, S, N)."""
    grad_updates = torch.empty_like(from_output)
    output_c, update_c = _pairs(from_output), _pairs(grad_updates)
    rate = _pairs(decay)[:, None].conj().resolve_conj()
    running = torch.zeros_like(output_c[:, :, 0]) if grad_final is None else _complex(grad_final)
    for c in reversed(range(from_output.shape[2])):
        update_c[:, :, c] = running
        running = torch.addcmul(output_c[:, :, c], running, rate)
        keep = _mask(continues, c, from_output.shape[1])
        if keep is not None:
            running = torch.where(keep, running, 0)
    return grad_updates, torch.view_as_real(running).flatten(-2)


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
    r, w, taps, decay, powers = operators
    if d is not None:
        taps = torch.cat([taps[:, :1] + d.to(z.dtype)[:, None], taps[:, 1:]], 1)
    flat = None if initial is None else initial.flatten(-2)
    result = _ChunkedScan.apply(z, taps, r, w, decay, flat, segments.continues)
    assert result is not None
    y, before, final = result
    if segments.slot is not None or segments.length % chunk:
        final = _final_state(z, before, powers, w, segments)
    return y, final.unflatten(-1, (-1, 2)).reshape(z.shape[0], sequences, diag.modes, 2)


def _final_state(z: Tensor, before: Tensor, powers: Tensor, w: Tensor, segments: Segments) -> Tensor:
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
    carried = torch.view_as_real(_complex(powers[:, filled]) * _complex(before[:, which, last])).flatten(-2)
    return torch.baddbmm(carried, shifted, w)
