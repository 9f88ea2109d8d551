"""Canaries: what the interpreter gets wrong today, and that what these tests rely on is right."""

import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="about the interpreter alone")


@triton.jit
def product_kernel(a, b, c, SIDE: tl.constexpr):
    i = tl.arange(0, SIDE)
    at = i[:, None] * SIDE + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee"))


@triton.jit
def add_kernel(a, b, c, SIDE: tl.constexpr, WIDEN: tl.constexpr):
    i = tl.arange(0, SIDE)
    x, y = tl.load(a + i), tl.load(b + i)
    if WIDEN:
        x, y = x.to(tl.float32), y.to(tl.float32)
    tl.store(c + i, (x + y).to(tl.float32))


def launch(kernel: Any, *tensors: torch.Tensor, **constants: Any) -> None:
    kernel[(1,)](*tensors, **constants)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_right_in_every_dtype(dtype, assert_close):
    a, b = (torch.randn(16, 16).to(dtype) for _ in range(2))
    c = torch.full((16, 16), float("nan"))
    launch(product_kernel, a, b, c, SIDE=16)
    assert_close(c, a.double() @ b.double(), 1e-6)


def test_bf16_sums_are_wrong_unless_widened(assert_close):
    """When this fails, Triton's interpreter has learned bf16: the replaced `create_dot` can go."""
    a, b = (torch.randn(16).bfloat16() for _ in range(2))
    c = torch.empty(16)
    launch(add_kernel, a, b, c, SIDE=16, WIDEN=True)
    assert_close(c, a.double() + b.double(), 1e-6)
    launch(add_kernel, a, b, c, SIDE=16, WIDEN=False)
    with pytest.raises(AssertionError):
        assert_close(c, a.double() + b.double(), 1e-2)


@triton.jit
def round_kernel(x, y, SIDE: tl.constexpr):
    i = tl.arange(0, SIDE)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


def test_casts_to_bf16_round_to_nearest():
    x = torch.cat([torch.randn(506), torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, float("inf"), 1e-41])])
    y = torch.empty(512, dtype=torch.bfloat16)
    launch(round_kernel, x, y, SIDE=512)
    assert torch.equal(y, x.bfloat16())
    nan = torch.full((512,), float("nan"))
    launch(round_kernel, nan, y, SIDE=512)
    assert y.isnan().all()


@triton.jit
def pick(x, y, chosen):
    return tl.where(chosen, x, y)


@triton.jit
def step(a, x, b, y):
    """Two steps s -> a s + x, left first, as one; a negative b begins anew."""
    return a * b, pick(b * x + y, y, b >= 0)


@triton.jit
def scan_kernel(a, x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    factors, sums = tl.associative_scan((tl.load(a + at), tl.load(x + at)), AXIS, step, reverse=REVERSE)  # pyright: ignore[reportArgumentType]
    tl.store(out + at, factors)
    tl.store(out + ROWS * COLUMNS + at, sums)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_by_slices_is_the_scan_by_elements(axis, reverse, monkeypatch):
    a, x, found = torch.randn(4, 16), torch.randn(4, 16), []
    for form in ("generic_scan", "by_element"):
        monkeypatch.setattr(interpreter.ScanOps, "generic_scan", getattr(interpreter.ScanOps, form))
        found.append(torch.full((2, 4, 16), float("nan")))
        launch(scan_kernel, a, x, found[-1], ROWS=4, COLUMNS=16, AXIS=axis, REVERSE=reverse)
    assert torch.equal(*found)
    first = torch.stack([a, x]).select(axis + 1, -1 if reverse else 0)
    assert torch.equal(found[0].select(axis + 1, -1 if reverse else 0), first)
    assert len(found[0].unique()) == 128


def test_the_language_is_replaced_for_each_launch(monkeypatch):
    """And restored after it: between launches a device function's names are the compiler's."""
    before, seen = tl.where, []
    patch = interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: seen.append(fn.__name__) or patch(fn))
    x = torch.randn(4, 16)
    for _ in range(2):
        launch(scan_kernel, x, x, torch.empty(2, 4, 16), ROWS=4, COLUMNS=16, AXIS=1, REVERSE=False)
        assert tl.where is before
    assert seen == ["scan_kernel", "pick"] * 2


def test_devices_that_a_gpu_would_not_mix_are_refused_here():
    """The mark of `two_devices` follows operations, indices, moves and gradients."""
    ours, host = torch.randn(3, requires_grad=True), torch.randn(3, device="cpu")
    mixtures = (
        lambda: ours + host,
        lambda: ours * ours.detach().cpu(),
        lambda: torch.cat([torch.zeros(2), torch.arange(2).to("cpu")]),
        lambda: host[torch.arange(2)],
        lambda: torch.where(host > 0, ours, 0),
        lambda: torch.autograd.grad(ours.square().sum(), ours)[0] - host,
    )
    for mixture in mixtures:
        with pytest.raises(RuntimeError, match="of the accelerator and of the host"):
            mixture()
    assert (ours.detach() + host.to(ours)).isfinite().all()
    assert ours[torch.arange(2, device="cpu")].shape == (2,)
    assert (ours.cpu() * host.sum() + host).isfinite().all()
