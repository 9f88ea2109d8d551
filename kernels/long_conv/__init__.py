"""Causal convolution with an arbitrary kernel as long as the sequence, with optional gates."""

import torch
from torch import Tensor

from ..backend import Backend, own_precision, resolve_backend
from .operator import fused_long_conv
from .reference import long_conv_reference

__all__ = ["long_conv", "long_conv_reference"]

AUTO_TAPS = 32_768


def long_conv(
    u: Tensor,
    kernel: Tensor,
    *,
    d: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """y = post_gate * (causal_conv(x, kernel) + d x) with x = pre_gate * u.

    u and the gates: (batch, channel, length), any length; kernel: (channel, taps), tap 0 the current token, any number
    of taps (those beyond the length have no effect); d: (channel). Returns u's shape and dtype.

    backend: "torch" computes in fp32 (fp64 for fp64 inputs), by real FFTs of at least length + taps - 1 points, so
    nothing wraps around; "triton" by block FFTs in one launch to 2048 tokens (fp32: 512) and in blocks of so many above
    it, in fp32 for fp32 inputs and with products of fp16, block floating, for fp16 and bf16 (see `triton.py`). "auto"
    is "triton" on CUDA devices, but not above 32,768 taps and tokens: the work on blocks grows with the square of their
    number, and by its memory traffic a plain FFT is ahead from about there (computed, not measured).

    An FFT mixes all tokens: a later token changes an earlier output, and another document's token would change this
    one's, by rounding (about 1e-7 in fp32), and a number that is not finite reaches its whole row, in the Triton form
    also the row that shares its transform. Where exactly zero is needed use `diag_ssm`. No documents, therefore.
    Autocast changes nothing inside.
    Raises ValueError for shapes that do not fit, BackendUnavailableError for backend="triton" where it cannot run: on
    the CPU (except under TRITON_INTERPRET=1), for fp64, without Triton.
    """
    _check(u, kernel, d, pre_gate, post_gate)
    with own_precision(u):
        return _convolve(u, kernel, d, pre_gate, post_gate, backend)


def _convolve(
    u: Tensor, kernel: Tensor, d: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None, backend: Backend
) -> Tensor:
    if _fused(u, kernel, backend):
        taps = kernel[:, : u.shape[2]].float()
        if d is not None:  # The skip is an addition to the tap of the current token.
            taps = torch.cat([taps[:, :1] + d.float()[:, None], taps[:, 1:]], 1)
        return fused_long_conv(u, taps, pre_gate, post_gate)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    x = u.to(dtype) if pre_gate is None else u.to(dtype) * pre_gate.to(dtype)
    length = u.shape[2]
    taps = kernel[:, :length].to(dtype)
    points = fast_size(length + taps.shape[1] - 1)
    spectrum = torch.fft.rfft(x, n=points) * torch.fft.rfft(taps, n=points)
    y = torch.fft.irfft(spectrum, n=points)[..., :length]
    if d is not None:
        y = y + d.to(dtype)[:, None] * x
    if post_gate is not None:
        y = y * post_gate.to(dtype)
    return y.to(u.dtype)


def _fused(u: Tensor, kernel: Tensor, backend: str) -> bool:
    if backend == "auto" and min(u.shape[2], kernel.shape[1]) > AUTO_TAPS:
        backend = "torch"
    most = 2**31 - 2**16  # Places inside a row are 32 bits wide in the kernels.
    obstacle = f"takes rows of at most {most} tokens, not {u.shape[2]}" if u.shape[2] > most else None
    return resolve_backend(backend, "long_conv", u, obstacle=obstacle) == "triton"


def fast_size(points: int) -> int:
    """The smallest even 2^a 3^b 5^c at or above `points`: sizes that every FFT library does quickly."""
    best = 1 << max(1, (points - 1).bit_length())
    five = 1
    while five < best:
        three = five
        while three < best:
            size = three * 2
            while size < points:
                size *= 2
            best = min(best, size)
            three *= 3
        five *= 5
    return best


def _check(u: Tensor, kernel: Tensor, d: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None) -> None:
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"long_conv: u must be (batch, channel, length), none zero, got {tuple(u.shape)}")
    if not u.is_floating_point():
        raise ValueError(f"long_conv: u has dtype {u.dtype}, expected a real floating-point type")
    channels = u.shape[1]
    if kernel.dim() != 2 or kernel.shape[0] != channels or kernel.shape[1] < 1:
        raise ValueError(f"long_conv: kernel must be ({channels}, taps), got {tuple(kernel.shape)}")
    if d is not None and d.shape != (channels,):
        raise ValueError(f"long_conv: d has shape {tuple(d.shape)}, expected ({channels},)")
    for name, gate in (("pre_gate", pre_gate), ("post_gate", post_gate)):
        if gate is not None and gate.shape != u.shape:
            raise ValueError(f"long_conv: {name} has shape {tuple(gate.shape)}, expected {tuple(u.shape)}")
