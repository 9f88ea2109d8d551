"""The attention kernels below torch.compile: a compiled call runs them, forward once and backward once."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from potamos.kernels.attention import Disentangled, Mask, attention, deberta_rows, triton_form

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.mark.parametrize("disentangled", [False, True])
def test_compiled_attention_runs_the_kernels(disentangled, assert_close, monkeypatch):
    q = torch.randn(1, 70, 2, 16, device=DEVICE).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(1, 1, 70, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    positions = [torch.randn(2, 8, 16, device=DEVICE, requires_grad=True) for _ in range(2)]
    rows, least = deberta_rows(4)
    leaves = [q, k, v, *positions] if disentangled else [q, k, v]
    calls: list[str] = []
    for name in ("forward", "backward"):
        original = getattr(triton_form, name)

        def counted(*arguments, original=original, name=name, **rest):
            calls.append(name)
            return original(*arguments, **rest)

        monkeypatch.setattr(triton_form, name, counted)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = Disentangled(*positions, rows.to(DEVICE), least) if disentangled else None  # type: ignore[arg-type]
        return attention(q, k, v, mask=Mask(window=30), bias=bias, backend="triton")

    want = run(q, k, v)
    expected = torch.autograd.grad(want.square().sum(), leaves)
    assert calls == ["forward", "backward"]
    torch._dynamo.reset()
    got = torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v)
    gradients = torch.autograd.grad(got.square().sum(), leaves)
    assert calls == ["forward", "backward"] * 2, "nothing runs twice"
    assert_close(got, want, 1e-6)
    assert got.stride() == want.stride()
    for gradient, reference in zip(gradients, expected, strict=True):
        assert_close(gradient, reference, 1e-6)
