"""The rotation kernel against `rotate` in fp64: both orders, factors, partial heads, any strides, gradients."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from potamos.kernels.attention import Rotary, rotary_angles, rotary_frequencies, rotate, xpos_log_decay
from potamos.kernels.attention import rotary as rotary_module
from potamos.kernels.attention.triton_rotary import rotate_by_table, turn

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCES = {torch.float32: 2e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
LAYOUTS = {
    "head major": lambda b, h, n, d: torch.randn(b, h, n, d, device=DEVICE),
    "token major": lambda b, h, n, d: torch.randn(b, n, h, d, device=DEVICE).transpose(1, 2),
    "part of a projection": lambda b, h, n, d: torch.randn(b, n, 3, h, d, device=DEVICE)[:, :, 1].transpose(1, 2),
    "channel major": lambda b, h, n, d: torch.randn(b, h, d, n, device=DEVICE).transpose(2, 3),
}


def tables(positions: Tensor, pairs: int, *, decay: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """(angles in fp64, angles in fp32, factors in fp32 or None) of positions (batch or 1, length)."""
    frequencies = rotary_frequencies(2 * pairs).to(DEVICE)
    wide, narrow = (rotary_angles(f, positions) for f in (frequencies.double(), frequencies))
    factors = (rotary_angles(xpos_log_decay(2 * pairs).to(DEVICE), positions - 100)).exp() if decay else None
    return wide, narrow, factors


def by_kernel(x: Tensor, angles: Tensor, interleaved: bool, factors: Tensor | None = None) -> Tensor:
    cos, sin = (f if factors is None else f * factors for f in (angles.cos(), angles.sin()))
    return rotate_by_table(x, cos[:, 0], sin[:, 0], interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("pairs", "dim"), [(8, 16), (5, 13), (40, 80), (16, 64)])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_rotation_and_its_gradient(dtype, pairs, dim, interleaved, assert_close):
    """Against fp64 arithmetic at the same (fp32) angles; odd lengths, head counts that fill no program, own positions
    a row, factors."""
    positions = torch.randint(0, 2000, (2, 37), device=DEVICE)
    _, angles, factors = tables(positions, pairs, decay=True)
    x = torch.randn(2, 5, 37, dim, device=DEVICE).to(dtype).requires_grad_()
    grad = torch.randn(2, 5, 37, dim, device=DEVICE).to(dtype)
    got = by_kernel(x, angles, interleaved, factors)
    assert got.dtype == dtype
    leaf = x.detach().double().requires_grad_()
    assert factors is not None
    want = rotate(leaf, angles, interleaved, factors)
    assert_close(got, want, TOLERANCES[dtype])
    (gradient,) = torch.autograd.grad(got, x, grad)
    (reference,) = torch.autograd.grad(want, leaf, grad.double())
    assert_close(gradient, reference, TOLERANCES[dtype], "gradient")
    assert torch.equal(got[..., 2 * pairs :], x[..., 2 * pairs :]), "channels behind the pairs pass"
    other = rotate(leaf, angles, not interleaved, factors)
    for bug in (torch.zeros_like(got), got.roll(1, 2), got.roll(1, 1), other, rotate(leaf, -angles, interleaved)):
        with pytest.raises(AssertionError, match="relative rms"):
            assert_close(bug, want, TOLERANCES[dtype])
    with pytest.raises(AssertionError, match="relative rms"):
        assert_close(by_kernel(grad, angles, interleaved, factors), reference, TOLERANCES[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_strides_and_one_row_of_positions(layout, interleaved, assert_close):
    x = LAYOUTS[layout](2, 3, 21, 16)
    wide, angles, _ = tables(torch.arange(21, device=DEVICE)[None], 8)
    got = by_kernel(x, angles, interleaved)
    assert_close(got, rotate(x.double(), wide, interleaved), 1e-6)
    assert got.stride() == torch.empty_like(x).stride(), "the memory order is kept"
    assert torch.equal(got, by_kernel(x.contiguous(), angles, interleaved))


def test_gradients_of_any_strides(assert_close):
    x = torch.randn(1, 2, 9, 16, device=DEVICE, requires_grad=True)
    wide, angles, _ = tables(torch.arange(9, device=DEVICE)[None], 8)
    leaf = x.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(by_kernel(x, angles, False).sum(), x)  # an expanded gradient, all strides 0
    (want,) = torch.autograd.grad(rotate(leaf, wide).sum(), leaf)
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place(interleaved):
    """The pairs are turned where they lie and nothing behind them is touched; the inverse brings them back."""
    storage = torch.randn(2, 20, 3, 24, device=DEVICE)
    x, before = storage.transpose(1, 2), storage.clone().transpose(1, 2)
    _, angles, _ = tables(torch.arange(20, device=DEVICE)[None], 8)
    cos, sin = angles.cos()[:, 0], angles.sin()[:, 0]
    assert turn(x, cos, sin, x, interleaved=interleaved) is x
    assert torch.equal(x, by_kernel(before, angles, interleaved))
    assert not torch.equal(x[..., :16], before[..., :16])
    turn(x, cos, sin, x, interleaved=interleaved, inverse=True)
    torch.testing.assert_close(x, before)


def test_far_positions_turn_as_torch_turns_them():
    """At position 3 million an angle of fp32 is off by a tenth of a radian, the same tenth for both forms."""
    positions = 3_000_000 + torch.arange(5, device=DEVICE)[None]
    x = torch.randn(1, 2, 5, 16, device=DEVICE)
    _, angles, _ = tables(positions, 8)
    torch.testing.assert_close(by_kernel(x, angles, False), rotate(x.double(), angles).float(), rtol=1e-5, atol=1e-6)


def test_nothing_to_rotate():
    cos = torch.ones(1, 0, 4, device=DEVICE)
    x = torch.empty(2, 3, 0, 8, device=DEVICE)
    assert rotate_by_table(x, cos, cos).shape == x.shape


def test_double_backward(assert_close):
    """The backward is a rotation too, so what is differentiated twice comes back to where it was."""
    x = torch.randn(1, 1, 4, 8, device=DEVICE, requires_grad=True)
    _, angles, _ = tables(torch.arange(4, device=DEVICE)[None], 4)
    grad = torch.randn(1, 1, 4, 8, device=DEVICE, requires_grad=True)
    (first,) = torch.autograd.grad(by_kernel(x, angles, False), x, grad, create_graph=True)
    (second,) = torch.autograd.grad(first, grad, x.detach())
    assert_close(second, by_kernel(x, angles, False), 1e-6)


@pytest.mark.parametrize("decay", [False, True])
def test_described_rotations_take_the_kernel(decay, assert_close, monkeypatch):
    """`Rotary`, where the backend is Triton: queries by exp(+), keys by exp(-), as torch turns them."""
    positions = torch.randint(0, 500, (2, 11), device=DEVICE)
    x = torch.randn(2, 3, 11, 16, device=DEVICE)

    def described() -> Rotary:
        log_decay = xpos_log_decay(16).to(DEVICE) if decay else None
        return Rotary(rotary_frequencies(16).to(DEVICE), positions, positions, log_decay=log_decay, center=250)

    monkeypatch.setattr(rotary_module, "resolve_backend", lambda *a: "torch")
    want = described().rotate_query(x), described().rotate_key(x)
    monkeypatch.setattr(rotary_module, "resolve_backend", lambda *a: "triton")
    got = described().rotate_query(x), described().rotate_key(x)
    assert_close(got[0], want[0], 1e-6)
    assert_close(got[1], want[1], 1e-6)
    if decay:
        with pytest.raises(AssertionError, match="relative rms"):
            assert_close(got[0], want[1], 1e-6)


def test_what_the_kernel_leaves_to_torch(monkeypatch):
    monkeypatch.setattr(rotary_module, "resolve_backend", lambda *a: "triton")
    cos = torch.ones(1, 1, 3, 4)
    x = torch.ones(1, 1, 3, 8)
    assert rotary_module._fused(x, cos)
    assert not rotary_module._fused(x, cos.double())
    assert not rotary_module._fused(x, cos.clone().requires_grad_())
    with torch.no_grad():
        assert rotary_module._fused(x, cos.clone().requires_grad_())
