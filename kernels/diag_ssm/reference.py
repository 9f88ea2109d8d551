"""The definition of the diagonal state-space model, token by token. Slow; every other form is compared with it."""

import torch
from torch import Tensor

from .parameters import Diagonal, DiagState, compute_dtype, discretise


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
    lag = torch.arange(length)[:, None] - torch.arange(length)[None, :]
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
    skip = torch.zeros(channels, dtype=dtype) if d is None else d.to(dtype).repeat_interleave(group)
    if state is None:
        modes = torch.zeros(batch, channels, diag.modes, dtype=complex_dtype)
        document = torch.zeros(batch, dtype=torch.int32) if document_ids is None else document_ids[:, 0]
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
    return y, DiagState(torch.view_as_real(modes), document.to(torch.int32))
