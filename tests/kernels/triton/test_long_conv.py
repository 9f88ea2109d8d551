"""The block FFT kernels against the defining sum in fp64: outputs, every gradient, precisions, cuts and layouts."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels.long_conv import long_conv, long_conv_reference, triton_launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ("u", "kernel", "d", "pre_gate", "post_gate")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel should write is NaN before."""

    def poison(make):
        def made(*args, **options):
            fresh = make(*args, **options)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def inputs(batch: int, channels: int, length: int, taps: int, dtype=torch.float32, gated=True) -> dict[str, Tensor]:
    torch.manual_seed(length + taps)
    values = {"u": torch.randn(batch, channels, length).to(dtype), "kernel": torch.randn(channels, taps)}
    values["d"] = 2 * torch.randn(channels)
    if gated:
        values |= {name: torch.randn(batch, channels, length).to(dtype) for name in ("pre_gate", "post_gate")}
    return {name: value.requires_grad_() for name, value in values.items()}


def widened(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().double().requires_grad_() for name, value in values.items()}


def differentiated(operation, values: dict[str, Tensor], weights: Tensor, **options: Any) -> list[Tensor]:
    """Output and gradients, in the order of `values`."""
    y = operation(
        *(values[name] for name in ("u", "kernel")), **{n: values[n] for n in NAMES[2:] if n in values}, **options
    )
    return [y, *torch.autograd.grad(y, list(values.values()), weights.to(y))]


def both(values: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    weights = torch.randn(values["u"].shape).to(values["u"].dtype)
    got = differentiated(long_conv, values, weights, backend="triton")
    want = differentiated(long_conv_reference, widened(values), weights.double())
    return [value.cpu() for value in got], want, weights


@pytest.mark.parametrize(
    ("batch", "channels", "length", "taps", "gated"),
    [
        (3, 2, 1, 1, True),
        (2, 5, 2, 7, False),
        (3, 1, 63, 63, True),
        (1, 3, 64, 3, True),
        (2, 2, 65, 200, False),
        (1, 1, 127, 127, True),
        (3, 2, 1000, 1000, False),
        (1, 2, 1024, 1, True),
        (1, 1, 1024, 514, True),
        (1, 1, 1100, 514, False),
        (3, 1, 1134, 1134, True),
        (2, 1, 2048, 300, True),
        (1, 1, 2048, 2048, False),
    ],
)
def test_fp32_is_the_sum(batch, channels, length, taps, gated, assert_close):
    values = inputs(batch, channels, length, taps, gated=gated)
    got, want, _ = both(values)
    assert_close(got[0], want[0], 1e-6, "y")
    for name, ours, theirs in zip(values, got[1:], want[1:], strict=True):
        assert_close(ours, theirs, 1e-6, name)


def plain(u: Tensor, kernel: Tensor, d: Tensor, pre_gate: Tensor, post_gate: Tensor) -> Tensor:
    """What a model in u's type computes: each operation, and the kernel, rounded to it; sums in fp32."""
    x = u * pre_gate
    y = long_conv(x.float(), kernel.to(u.dtype).float(), backend="torch").to(u.dtype)
    return (y + d.to(u.dtype)[:, None] * x) * post_gate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "channels", "length", "taps"),
    [(3, 2, 127, 127), (1, 2, 1000, 1000), (2, 1, 2048, 90), (3, 1, 2500, 2500)],
)
def test_16_bits_are_as_good_as_plain_ones(batch, channels, length, taps, dtype, assert_close):
    values = inputs(batch, channels, length, taps, dtype)
    got, want, weights = both(values)
    leaves = {name: value.detach().cpu().requires_grad_() for name, value in values.items()}
    naive = differentiated(plain, leaves, weights)
    for i, name in enumerate(["y", *values]):
        assert_close(got[i], want[i], 1e-2 if i else 5e-3, name)
        if name == "d":  # A number per channel is too few to compare errors of; it is the kernel's gradient at tap 0.
            continue
        allowed = (3 if i else 2) * relative(naive[i], want[i])
        assert relative(got[i], want[i]) <= allowed, f"{name}: {relative(got[i], want[i]):.2e}, allowed {allowed:.2e}"
    errors = [relative(got[0][:, c], want[0][:, c]) for c in range(channels)]
    assert max(errors) <= 2 * sum(errors) / channels


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def test_the_comparisons_refuse_typical_bugs(assert_close):
    values = inputs(3, 2, 1134, 1134)
    got, want, _ = both(values)
    u, kernel, d, pre, post = (value.detach().cpu() for value in values.values())
    x = u * pre

    def convolved(taps: Tensor, points: int = 4096) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x, n=points) * torch.fft.rfft(taps, n=points), n=points)[..., :1134]

    y = convolved(kernel) + d[:, None] * x
    near = torch.where(torch.arange(1134, device="cpu") < 600, kernel, 0)
    assert_close(y * post, want[0], 1e-6)  # The bugs are planted in what would pass.
    wrong = {
        "zeros": torch.zeros_like(u),
        "one token late": (y * post).roll(1, 2),
        "no skip": convolved(kernel) * post,
        "no gate": y,
        "wrapped around": (convolved(kernel, 1134) + d[:, None] * x) * post,
        "not causal": (convolved(kernel).flip(2) + d[:, None] * x) * post,
        "far blocks dropped": (convolved(near) + d[:, None] * x) * post,
        "rows exchanged": (y * post)[[1, 0, 2]],
        "last row dropped": torch.cat([(y * post)[:2], u.new_zeros(1, 2, 1134)]),
    }
    for output in wrong.values():
        with pytest.raises(AssertionError, match="relative rms error"):
            assert_close(output, want[0], 5e-3)
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        for output in (torch.zeros_like(ours), ours.roll(1, -1), 2 * ours, ours.flip(-1)):
            with pytest.raises(AssertionError, match="relative rms error"):
                assert_close(output, theirs, 1e-2)


def test_a_later_token_matters_by_rounding_alone():
    """An FFT is not causal to the bit; see `long_conv`. Across blocks it is."""
    values = inputs(1, 1, 1100, 1100, gated=False)
    u, kernel = values["u"].detach(), values["kernel"].detach()
    changed = u.clone()
    changed[..., 900:] += 1
    before, after = (long_conv(x, kernel, backend="triton") for x in (u, changed))
    assert torch.equal(before[..., :512], after[..., :512])
    leak = (before - after)[..., 512:900].abs().max() / before.abs().max()
    assert 0 < leak < 1e-6
    assert (before - after)[..., 900:].abs().min() > 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_shows(value, dtype):
    values = inputs(1, 1, 40, 40, dtype, gated=False)
    u, kernel = values["u"].detach(), 4 + values["kernel"].detach().abs()
    u[0, 0, 3] = value
    assert not long_conv(u, kernel, backend="triton")[..., 3:].isfinite().any()


@pytest.mark.parametrize("power", [-60, 60])
def test_16_bits_float_by_blocks(power):
    values = inputs(3, 1, 200, 200, torch.bfloat16, gated=False)
    u, kernel = values["u"].detach(), values["kernel"].detach()
    y = long_conv(u, kernel, backend="triton")
    assert torch.equal(long_conv(u * 2.0**power, kernel, backend="triton"), y * 2.0**power)
    assert torch.equal(long_conv(torch.zeros_like(u), kernel, backend="triton"), torch.zeros_like(y))


def test_memory_orders_and_mixed_types(assert_close):
    values = {name: value.detach() for name, value in inputs(3, 2, 100, 40, torch.bfloat16).items()}
    values["post_gate"] = values["post_gate"].float()
    want = long_conv(**values, backend="triton")
    assert want.dtype == torch.bfloat16
    plain_strides = want.stride()
    turned = {**values, "u": values["u"].transpose(0, 1).contiguous().transpose(0, 1)}
    assert torch.equal(long_conv(**turned, backend="triton"), want)
    assert long_conv(**turned, backend="triton").stride() == turned["u"].stride() != plain_strides
    strided = {**values, "u": torch.stack([values["u"]] * 2, 3)[..., 1], "pre_gate": values["pre_gate"][:, :1]}
    strided["pre_gate"] = strided["pre_gate"].expand(3, 2, 100)
    expanded = {**values, "pre_gate": strided["pre_gate"].contiguous()}
    assert torch.equal(long_conv(**strided, backend="triton"), long_conv(**expanded, backend="triton"))
    leaves = {name: value.requires_grad_() for name, value in turned.items()}
    got, exact, _ = both(leaves)
    for name, ours, theirs in zip(["y", *leaves], got, exact, strict=True):
        assert_close(ours, theirs, 5e-3, name)
        assert ours.dtype == (leaves[name].dtype if name != "y" else torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_rows_and_repetition(dtype, assert_close, monkeypatch):
    values = inputs(7, 1, 300, 300, dtype)
    weights = torch.randn(7, 1, 300).to(dtype)
    grouped, again = (differentiated(long_conv, values, weights, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(grouped, again, strict=True))
    monkeypatch.setattr(triton_launch, "ENOUGH_PROGRAMS", 3)
    assert triton_launch.Plan(values["u"], 300)._groups(1) == (2, 2)
    in_two = differentiated(long_conv, values, weights, backend="triton")
    assert_close(in_two[2].cpu(), grouped[2].cpu().double(), 1e-6)


@pytest.mark.parametrize("wanted", [("u",), ("kernel",), ("post_gate",), ("pre_gate", "d")])
def test_gradients_of_some(wanted, assert_close):
    values = {name: value.detach() for name, value in inputs(2, 2, 600, 600).items()}
    leaves = {name: value.requires_grad_(name in wanted) for name, value in values.items()}
    y = long_conv(**leaves, backend="triton")
    y.sum().backward()
    exact = widened(leaves)
    long_conv_reference(**exact).sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        if leaf.grad is not None:
            assert_close(leaf.grad.cpu(), exact[name].grad, 1e-6, name)


def test_operator_is_declared_rightly():
    values = inputs(3, 2, 20, 20)
    u, kernel = values["u"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(), values["kernel"]
    operator = torch.ops.potamos.long_conv.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (u, kernel, None, None), test_utils=checks)
    torch.library.opcheck(operator, (values["u"], kernel, values["pre_gate"], values["post_gate"]), test_utils=checks)


def test_compiles_whole():
    values = inputs(2, 2, 20, 20)
    compiled = torch.compile(lambda v: long_conv(**v, backend="triton"), fullgraph=True, backend="aot_eager")
    y = compiled(values)
    assert torch.equal(y, long_conv(**values, backend="triton"))
    ours = torch.autograd.grad(y.sum(), list(values.values()))
    theirs = torch.autograd.grad(long_conv(**values, backend="triton").sum(), list(values.values()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_every_choice_is_covered_here():
    """The lengths above reach each transform, in one launch and in blocks."""
    lengths = {torch.float32: (127, 1134), torch.float16: (127, 1000, 2500)}
    plans = [triton_launch.Plan(torch.ones(1, 1, n, dtype=dtype), n) for dtype, some in lengths.items() for n in some]
    assert {plan.config for plan in plans} == {config for some in triton_launch.CONFIGS.values() for config in some}
    assert [plan.blocks for plan in plans] == [1, 3, 1, 1, 2]
