"""The FFT convolution against its defining sum."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from potamos.kernels.long_conv import fast_size, long_conv, long_conv_reference


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("length", "taps"), [(1, 1), (2, 7), (63, 63), (64, 3), (65, 200), (127, 127), (257, 64)])
def test_fft_is_the_sum(length, taps, gated, assert_close):
    u, pre, post = (torch.randn(3, 5, length, dtype=torch.float64, requires_grad=True) for _ in range(3))
    kernel = torch.randn(5, taps, dtype=torch.float64, requires_grad=True)
    d = torch.randn(5, dtype=torch.float64, requires_grad=True)
    gates: Any = {"pre_gate": pre, "post_gate": post} if gated else {}
    wrt = [u, kernel, d, *gates.values()]
    got, want = (operation(u, kernel, d=d, **gates) for operation in (long_conv, long_conv_reference))
    assert_close(got, want, 1e-10, "y")
    weights = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), wrt), torch.autograd.grad((want * weights).sum(), wrt), strict=True
    ):
        assert_close(ours, theirs, 1e-10, "gradient")


def test_precisions(assert_close):
    u, kernel = torch.randn(2, 3, 500), torch.randn(3, 500)
    want = long_conv_reference(u.double(), kernel.double())
    assert_close(long_conv(u, kernel), want, 1e-6)
    half = long_conv(u.bfloat16(), kernel)
    assert half.dtype == torch.bfloat16
    assert_close(half, long_conv_reference(u.bfloat16().double(), kernel.double()), 2.5e-3)


def test_the_comparison_refuses_typical_bugs(assert_close):
    u, kernel, d = torch.randn(2, 3, 256), torch.randn(3, 256), torch.randn(3)
    want = long_conv_reference(u, kernel, d=d)
    circular = torch.fft.irfft(torch.fft.rfft(u) * torch.fft.rfft(kernel), n=256) + d[:, None] * u
    wrong = (torch.zeros_like(u), want.roll(1, 2), circular, long_conv(u, kernel), long_conv(u, kernel[:, :128], d=d))
    for output in wrong:
        with pytest.raises(AssertionError, match="relative rms error"):
            assert_close(output, want, 5e-3)


def test_fast_sizes():
    assert [fast_size(n) for n in (1, 2, 3, 7, 31, 511, 2047, 2049)] == [2, 2, 4, 8, 32, 512, 2048, 2160]


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        long_conv(torch.randn(2, 3, 8), torch.randn(3, 8), backend="triton")
    with pytest.raises(ValueError, match="takes fp32, fp16 or bf16"):
        long_conv(torch.randn(2, 3, 8).double(), torch.randn(3, 8).double(), backend="triton")


@pytest.mark.parametrize(
    ("length", "taps", "fused"),
    [(32_768, 32_768, True), (32_769, 32_769, False), (2**20, 32_768, True), (32_768, 2**20, True), (64, 64, True)],
)
def test_auto_leaves_very_long_kernels_to_the_fft(length, taps, fused, monkeypatch):
    """Where there is a GPU; a named backend is not replaced."""
    module = importlib.import_module("potamos.kernels.long_conv")
    monkeypatch.setattr(module, "resolve_backend", lambda name, *a, **k: "torch" if name == "torch" else "triton")
    u, kernel = torch.empty(1, 1, length), torch.empty(1, taps)
    assert module._fused(u, kernel, "auto") is fused
    assert module._fused(u, kernel, "triton")
    assert not module._fused(u, kernel, "torch")


def test_bad_arguments_are_named():
    u, kernel = torch.randn(2, 3, 8), torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"kernel must be \(3, taps\)"):
        long_conv(u, kernel[:2])
    with pytest.raises(ValueError, match="post_gate has shape"):
        long_conv(u, kernel, post_gate=u[..., :4])
    with pytest.raises(ValueError, match=r"u has dtype torch\.int64"):
        long_conv(u.long(), kernel)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        long_conv(u, kernel, backend="cuda")  # type: ignore[arg-type]
