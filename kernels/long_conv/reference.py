"""The definition of the gated causal convolution, by its sum. Slow; memory length x length."""

import torch
from torch import Tensor


def long_conv_reference(
    u: Tensor,
    kernel: Tensor,
    *,
    d: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    """y = post_gate * (sum_{j <= t} kernel[t - j] x[j] + d x[t]) with x = pre_gate * u; arguments as `long_conv`."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    x = u.to(dtype) if pre_gate is None else u.to(dtype) * pre_gate.to(dtype)
    length = u.shape[2]
    at = torch.arange(length, device=u.device)
    lag = at[:, None] - at[None, :]
    inside = (lag >= 0) & (lag < kernel.shape[1])
    matrix = torch.where(inside, kernel.to(dtype)[:, lag.clamp(0, kernel.shape[1] - 1)], 0)
    y = torch.einsum("cij,bcj->bci", matrix, x)
    if d is not None:
        y = y + d.to(dtype)[:, None] * x
    if post_gate is not None:
        y = y * post_gate.to(dtype)
    return y.to(u.dtype)
