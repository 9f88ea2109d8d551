"""The definition of the diagonal state-space model, token by token. Slow; every other form is compared with it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked import _complex, _toeplitz
from .documents import Chunks
from .parameters import Diagonal, DiagState, compute_dtype, discretise
from .segments import CHUNK


def kernel(diag: Diagonal, length: int) -> Tensor:
    """K[h, l] = 2 Re sum_n C_n Bbar_n Abar_n^l, (H, length), fp64."""
    a_bar, b_bar, c = discretise(diag)
    powers = a_bar[..., None] ** torch.arange(length, device=a_bar.device)
    return 2 * torch.einsum("hm,hml->hl", c * b_bar, powers).real


def diag_ssm_convolution(u: Tensor, diag: Diagonal, *, d: Tensor | None) -> Tensor:
    """y[t] = sum_{j <= t} K[t - j] u[j] + d u[t] by its defining sum, for one document and no carried state."""
    channels, length = u.shape[1:]
    group = channels // diag.channels
    taps = kernel(diag, length).to(compute_dtype(u)).repeat_interleave(group, 0)
    at = torch.arange(length, device=u.device)
    lag = at[:, None] - at[None, :]
    toeplitz = torch.where(lag >= 0, taps[:, lag.clamp(min=0)], 0)
    y = torch.einsum("cij,bcj->bci", toeplitz, u.to(taps.dtype))
    if d is not None:
        y = y + d.to(y.dtype).repeat_interleave(group)[:, None] * u
    return y.to(u.dtype)


def diag_ssm_reference(
    u: Tensor,
    diag: Diagonal,
    *,
    d: Tensor | None,
    document_ids: Tensor | None = None,
    state: DiagState | None = None,
) -> tuple[Tensor, DiagState]:
    """The recurrence s_t = Abar s_{t-1} + Bbar u_t, y_t = 2 Re(C s_t) + d u_t; same arguments as `diag_ssm`."""
    batch, channels, length = u.shape
    group, dtype = channels // diag.channels, compute_dtype(u)
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    a_bar, b_bar, c = (x.to(complex_dtype).repeat_interleave(group, 0) for x in discretise(diag))
    skip = u.new_zeros(channels, dtype=dtype) if d is None else d.to(dtype).repeat_interleave(group)
    if state is None:
        modes = u.new_zeros(batch, channels, diag.modes, dtype=complex_dtype)
        document = u.new_zeros(batch, dtype=torch.int32) if document_ids is None else document_ids[:, 0]
    else:
        modes, document = torch.view_as_complex(state.modes.to(dtype).contiguous()), state.document
    outputs = []
    for t in range(length):
        if document_ids is not None:
            same = document_ids[:, t] == document
            modes = torch.where(same[:, None, None], modes, 0)
            document = document_ids[:, t]
        u_t = u[:, :, t].to(dtype)
        modes = a_bar * modes + b_bar * u_t[..., None]
        outputs.append(2 * (c * modes).sum(-1).real + skip * u_t)
    y = torch.stack(outputs, dim=-1).to(u.dtype)
    return y, DiagState(torch.view_as_real(modes), document)


def scan_in_torch(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    shift_taps: Tensor | None,
    taps: Tensor,
    read: Tensor,
    write: Tensor,
    decay: Tensor,
    initial: Tensor | None,
    history: Tensor | None,
    documents: Chunks | None = None,
) -> tuple[Tensor, Tensor]:
    """What the fused kernel computes, from the same operators, in differentiable torch and the operators' dtype: y like
    v, and the state after the last whole chunk (C, B, N)."""
    channels, batch, length = v.shape
    group, chunks, dtype = channels // decay.shape[0], -(-length // CHUNK), taps.dtype
    spare = chunks * CHUNK - length

    def cut(x: Tensor) -> Tensor:
        return F.pad(x.to(dtype), (0, spare)).unflatten(2, (chunks, CHUNK))

    def each(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, 0)

    number = torch.zeros(batch, chunks, CHUNK, dtype=torch.int8, device=v.device)
    continues = torch.ones(batch, chunks, dtype=torch.bool, device=v.device)
    if documents is not None:
        number = F.pad(documents.relative, (0, spare)).unflatten(1, (chunks, CHUNK))
        continues = documents.continues.bool()
    end = number[:, :, -1:]
    if spare:
        end = torch.cat([end[:, :-1], number[:, -1:, CHUNK - spare - 1, None]], 1)
    documents_here = [number == r for r in range(int(number.max()) + 1)]
    from_before = continues[:, :, None] & (number == 0)

    z = cut(v)
    if k is not None:
        assert shift_taps is not None
        padded = F.pad(shift_taps.to(dtype), (0, CHUNK - shift_taps.shape[1]))
        whole = _toeplitz(F.pad(padded, (0, CHUNK)))[:, CHUNK:]
        upper, lower = whole[:, :, :CHUNK], whole[:, :, CHUNK:]
        key = cut(k)
        first = torch.zeros_like(key[:, :, :1])
        if history is not None:
            first = F.pad(history.to(dtype), (CHUNK - history.shape[2], 0))[:, :, None]
        before = torch.cat([first, torch.where((number == end)[:, :-1], key[:, :, :-1], 0)], 2)
        shifted = torch.where(from_before, torch.einsum("cij,cbnj->cbni", upper, before), 0)
        for here in documents_here:
            own = torch.einsum("cij,cbnj->cbni", lower, torch.where(here, key, 0))
            shifted = shifted + torch.where(here, own, 0)
        z = shifted * z
    updates = torch.einsum("cjm,cbnj->cbnm", each(write), torch.where(number == end, z, 0))
    rate, state = _complex(each(decay))[:, None], _complex(updates[:, :, 0] * 0 if initial is None else initial)
    passes = continues & (end[:, :, 0] == 0)
    states = [state]
    for c in range(chunks):
        state = torch.where(passes[:, c, None], rate * state, 0) + _complex(updates[:, :, c])
        states.append(state)
    read_by = torch.view_as_real(torch.stack(states[:-1], 2)).flatten(-2)
    y = torch.where(from_before, torch.einsum("cim,cbnm->cbni", each(read), read_by), 0)
    for here in documents_here:
        y = y + torch.where(here, torch.einsum("cij,cbnj->cbni", _toeplitz(each(taps)), torch.where(here, z, 0)), 0)
    y = y.flatten(2)[:, :, :length]
    if q is not None:
        y = q.to(dtype) * y
    return y.to(v.dtype), torch.view_as_real(states[length // CHUNK]).flatten(-2)
