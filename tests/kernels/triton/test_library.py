"""The fused kernels below torch.compile: a compiled call runs them, with their results and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from potamos.kernels.diag_ssm import Diagonal, fused
from potamos.kernels.flash_conv import h3_mix

HEADS, MODES, LENGTH, TAPS = 2, 3, 70, 5


@pytest.mark.parametrize("documents", [False, True])
def test_compiled_mixing_runs_the_fused_kernel(documents, make_diagonal, assert_close, monkeypatch):
    diag, d = make_diagonal(HEADS, MODES, dtype=torch.float32)
    ids = (torch.arange(LENGTH) // 27).to(torch.int32)[None] if documents else None
    inputs = [torch.randn(1, HEADS, LENGTH, requires_grad=True) for _ in range(3)]
    shift, d_k = torch.randn(HEADS, TAPS, requires_grad=True), torch.randn(HEADS, requires_grad=True)
    leaves = [*inputs, shift, d_k, d, diag.log_dt, diag.log_a, diag.b, diag.B, diag.C]
    calls = 0
    apply = fused._FusedScan.apply

    def counted(*arguments):
        nonlocal calls
        calls += 1
        return apply(*arguments)

    monkeypatch.setattr(fused._FusedScan, "apply", counted)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        diagonal = Diagonal(diag.log_dt, diag.log_a, diag.b, diag.B, diag.C)
        return h3_mix(q, k, v, shift, diagonal, d_k=d_k, d=d, document_ids=ids, backend="triton")[0]

    want = run(*inputs)
    expected = torch.autograd.grad(want.square().sum(), leaves)
    assert calls == 1
    torch._dynamo.reset()
    got = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)
    gradients = torch.autograd.grad(got.square().sum(), leaves)
    assert calls == 3, "one forward, and one more in the backward"
    assert_close(got, want, 1e-6)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert_close(gradient, reference, 1e-6)
