"""The diagonal SSM: recurrence, convolution, chunks, steps and carried state are one function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from potamos.kernels.diag_ssm import (
    Diagonal,
    DiagState,
    diag_ssm,
    diag_ssm_reference,
    diag_ssm_step,
    initial_diag_state,
)
from potamos.kernels.diag_ssm.reference import diag_ssm_convolution, kernel
from potamos.kernels.long_conv import long_conv
from potamos.kernels.once import SecondDerivativeError

LENGTHS = (1, 2, 63, 64, 65, 127, 257)
NAMES = ("log_dt", "log_a", "b", "B", "C")


def parameters(diag: Diagonal, d: Tensor) -> dict[str, Tensor]:
    return {name: getattr(diag, name) for name in NAMES} | {"d": d}


def gradients(y: Tensor, state: DiagState | None, wrt: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a fixed random projection of the output and, if given, of the state."""
    weights = torch.Generator().manual_seed(7)
    loss = (y * torch.randn(y.shape, generator=weights, dtype=y.dtype)).sum()
    if state is not None:
        loss = loss + (state.modes * torch.randn(state.modes.shape, generator=weights, dtype=y.dtype)).sum()
    return dict(zip(wrt, torch.autograd.grad(loss, list(wrt.values())), strict=True))


def random_documents(batch: int, length: int, change: float = 0.05) -> Tensor:
    return (torch.rand(batch, length) < change).cumsum(1).to(torch.int32)


@pytest.mark.parametrize("rule", ["bilinear", "zoh"])
@pytest.mark.parametrize("length", LENGTHS)
def test_all_forms_agree_in_fp64(length, rule, make_diagonal, assert_close):
    """Recurrence = convolution = FFT = chunks, outputs and every gradient, at 1e-10."""
    diag, d = make_diagonal(3, 5, rule)
    u = torch.randn(3, 3, length, dtype=torch.float64, requires_grad=True)
    wrt = {"u": u, **parameters(diag, d)}
    want, state = diag_ssm_reference(u, diag, d=d)
    want_gradients = gradients(want, None, wrt)
    others = {
        "chunked": diag_ssm(u, diag, d=d)[0],
        "convolution": diag_ssm_convolution(u, diag, d=d),
        "fft": long_conv(u, kernel(diag, length), d=d),
    }
    for form, y in others.items():
        assert_close(y, want, 1e-10, form)
        for name, gradient in gradients(y, None, wrt).items():
            assert_close(gradient, want_gradients[name], 1e-10, f"{form} d{name}")
    assert_close(diag_ssm(u, diag, d=d)[1].modes, state.modes, 1e-10, "state")


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", [1, 65, 130])
def test_carried_state_and_its_gradients(length, documents, group, make_diagonal, assert_close):
    diag, d = make_diagonal(2, 4)
    u = torch.randn(3, 2 * group, length, dtype=torch.float64, requires_grad=True)
    modes = torch.randn(3, 2 * group, 4, 2, dtype=torch.float64, requires_grad=True)
    state = DiagState(modes, torch.tensor([0, 9, 0], dtype=torch.int32))
    ids = random_documents(3, length) if documents else None
    wrt = {"u": u, "state": modes, **parameters(diag, d)}
    want, want_state = diag_ssm_reference(u, diag, d=d, document_ids=ids, state=state)
    got, got_state = diag_ssm(u, diag, d=d, document_ids=ids, state=state)
    assert_close(got, want, 1e-10, "y")
    assert_close(got_state.modes, want_state.modes, 1e-10, "state")
    assert torch.equal(got_state.document, want_state.document)
    want_gradients = gradients(want, want_state, wrt)
    for name, gradient in gradients(got, got_state, wrt).items():
        assert_close(gradient, want_gradients[name], 1e-10, f"d{name}")


@pytest.mark.parametrize("documents", [False, True])
def test_any_split_and_steps_continue_the_whole(documents, make_diagonal, assert_close):
    diag, d = make_diagonal(3, 4)
    length = 150
    u = torch.randn(2, 3, length, dtype=torch.float64)
    ids = random_documents(2, length) if documents else None
    whole, last = diag_ssm(u, diag, d=d, document_ids=ids)
    state, parts = None, []
    for begin, end in ((0, 1), (1, 70), (70, 71), (71, 135)):
        part, state = diag_ssm(
            u[..., begin:end], diag, d=d, document_ids=None if ids is None else ids[:, begin:end], state=state
        )
        parts.append(part)
    assert state is not None
    for t in range(135, length):
        y, state = diag_ssm_step(u[..., t], diag, d=d, document_ids=None if ids is None else ids[:, t], state=state)
        parts.append(y[..., None])
    assert_close(torch.cat(parts, 2), whole, 1e-10, "pieces")
    assert_close(state.modes, last.modes, 1e-10, "state")


def test_steps_from_the_initial_state(make_diagonal, assert_close):
    diag, d = make_diagonal(2, 3)
    u = torch.randn(2, 2, 5, dtype=torch.float64)
    state, outputs = initial_diag_state(2, 2, diag, torch.float64), []
    for t in range(5):
        y, state = diag_ssm_step(u[..., t], diag, d=d, document_ids=torch.zeros(2).int(), state=state)
        outputs.append(y)
    assert_close(torch.stack(outputs, 2), diag_ssm(u, diag, d=d)[0], 1e-10)


@pytest.mark.parametrize("rule", ["bilinear", "zoh"])
def test_gradcheck(rule, make_diagonal):
    diag, d = make_diagonal(2, 2, rule)
    u = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    modes = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(u, modes, d, *leaves):
        y, state = diag_ssm(
            u,
            Diagonal(**dict(zip(NAMES, leaves, strict=True)), rule=rule),
            d=d,
            state=DiagState(modes, torch.zeros(1).int()),
        )
        return y, state.modes

    torch.autograd.gradcheck(run, (u, modes, d, *(getattr(diag, n) for n in NAMES)))


def test_second_derivatives_are_refused(make_diagonal):
    diag, d = make_diagonal(2, 2)
    u = torch.randn(1, 2, 70, dtype=torch.float64, requires_grad=True)
    with pytest.raises(SecondDerivativeError, match="create_graph=True is not possible"):
        torch.autograd.grad(diag_ssm(u, diag, d=d)[0].square().sum(), u, create_graph=True)


@pytest.mark.parametrize("stress", [False, True])
def test_fp32_against_fp64(stress, make_diagonal, assert_close):
    diag, d = make_diagonal(5, 32, dtype=torch.float32, stress=stress)
    u = torch.randn(3, 5, 600, requires_grad=True)
    y, _ = diag_ssm(u, diag, d=d)
    got = gradients(y, None, {"u": u, **parameters(diag, d)})
    wide = {name: value.detach().double().requires_grad_() for name, value in {"u": u, **parameters(diag, d)}.items()}
    wide_diag = Diagonal(**{n: wide[n] for n in NAMES}, rule=diag.rule)
    want = diag_ssm_convolution(wide["u"], wide_diag, d=wide["d"])
    assert_close(y, want, 1e-6, "y")
    # The projection's weights are drawn in the output's type: use the same ones.
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).double()
    expected = torch.autograd.grad((want * weights).sum(), list(wide.values()))
    for (name, gradient), reference in zip(got.items(), expected, strict=True):
        assert_close(gradient, reference, 1e-5, f"d{name}")


def test_bf16_input_costs_only_its_own_rounding(make_diagonal, assert_close):
    """The arithmetic is fp32: the error is that of rounding the output once, in every channel."""
    diag, d = make_diagonal(6, 32, dtype=torch.float32)
    u = torch.randn(2, 6, 300).bfloat16()
    y, state = diag_ssm(u, diag, d=d)
    want, _ = diag_ssm_reference(u.double(), diag, d=d)
    assert y.dtype == torch.bfloat16
    assert state.modes.dtype == torch.float32
    assert_close(y, want, 2.5e-3)
    per_channel = (y.double() - want).square().mean((0, 2)).sqrt() / want.square().mean((0, 2)).sqrt()
    assert per_channel.max() <= 2 * per_channel.mean()


def test_the_comparison_refuses_typical_bugs(make_diagonal, assert_close):
    diag, d = make_diagonal(4, 32, dtype=torch.float32)
    u = torch.randn(2, 4, 256)
    want, _ = diag_ssm_reference(u.double(), diag, d=d)
    taps = kernel(diag, 256).float()
    spectrum = torch.fft.rfft(u) * torch.fft.rfft(taps)
    pieces = [diag_ssm(u[..., i : i + 64], diag, d=d)[0] for i in range(0, 256, 64)]
    wrong = {
        "zeros": torch.zeros_like(u),
        "shifted by one token": diag_ssm(u, diag, d=d)[0].roll(1, 2),
        "without D": diag_ssm(u, diag, d=None)[0],
        "circular": torch.fft.irfft(spectrum, n=256) + d[:, None] * u,
        "state dropped at each chunk": torch.cat(pieces, 2),
        "not a number": torch.full_like(u, torch.nan),
    }
    assert_close(diag_ssm(u, diag, d=d)[0], want, 5e-3, "the right one")
    for name, output in wrong.items():
        with pytest.raises(AssertionError, match="relative rms error"):
            assert_close(output, want, 5e-3, name)


def test_causality_is_exact(make_diagonal):
    diag, d = make_diagonal(3, 8, dtype=torch.float32)
    u = torch.randn(1, 3, 150, requires_grad=True)
    y, _ = diag_ssm(u, diag, d=d)
    for t in (0, 62, 63, 64, 100, 149):
        (gradient,) = torch.autograd.grad(y[..., t].sum(), u, retain_graph=True)
        assert (gradient[..., t + 1 :] == 0).all()
        assert (gradient[..., t] != 0).all()


def test_other_documents_change_no_bit_and_packed_equals_alone(make_diagonal, assert_close):
    diag, d = make_diagonal(3, 8)
    lengths = (40, 1, 90, 7, 64, 3)
    ids = torch.repeat_interleave(torch.tensor([4, 5, 9, 2, -1, 7]), torch.tensor(lengths)).int()[None]
    u = torch.randn(1, 3, sum(lengths), dtype=torch.float64)
    begin = 41
    inside = slice(begin, begin + 90)

    def run(u: Tensor) -> tuple[Tensor, Tensor]:
        u = u.clone().requires_grad_()
        y, _ = diag_ssm(u, diag, d=d, document_ids=ids)
        (gradient,) = torch.autograd.grad((y[..., inside] * torch.arange(90)).sum(), u)
        return y[..., inside], gradient

    y, gradient = run(u)
    changed = torch.randn_like(u)
    changed[..., inside] = u[..., inside]
    changed_y, changed_gradient = run(changed)
    assert torch.equal(y, changed_y)
    assert torch.equal(gradient, changed_gradient)
    assert (gradient[..., :begin] == 0).all()
    assert (gradient[..., begin + 90 :] == 0).all()
    alone, _ = diag_ssm(u[..., inside], diag, d=d)
    assert_close(y, alone, 1e-10)
    with pytest.raises(AssertionError, match="relative rms error"):
        assert_close(diag_ssm(u, diag, d=d)[0][..., inside], alone, 1e-10, "documents ignored")


@pytest.mark.parametrize("order", ["batch", "channel", "length"])
def test_any_memory_order(order, make_diagonal):
    diag, d = make_diagonal(3, 4)
    u = torch.randn(2, 3, 70, dtype=torch.float64)
    permutation = {"batch": (0, 1, 2), "channel": (1, 0, 2), "length": (2, 1, 0)}[order]
    inverse = [permutation.index(i) for i in range(3)]
    strided = u.permute(permutation).contiguous().permute(inverse)
    assert torch.equal(diag_ssm(strided, diag, d=d)[0], diag_ssm(u, diag, d=d)[0])


def test_bad_arguments_are_named(make_diagonal):
    diag, d = make_diagonal(3, 4)
    u = torch.randn(2, 3, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"takes fp32, fp16 or bf16, not torch\.float64"):
        diag_ssm(u, diag, d=d, backend="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        diag_ssm(u, diag, d=d, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of the 3 kernels"):
        diag_ssm(torch.randn(2, 4, 8), diag, d=d)
    with pytest.raises(ValueError, match="document_ids has shape"):
        diag_ssm(u, diag, d=d, document_ids=torch.zeros(2, 7).int())
    for dtype in (torch.int64, torch.complex128):
        with pytest.raises(ValueError, match=f"the input has dtype {dtype}, expected a real"):
            diag_ssm(u.to(dtype), diag, d=d)
    with pytest.raises(ValueError, match=r"state\.document has shape \(1,\), expected \(2,\)"):
        diag_ssm(u, diag, d=d, state=DiagState(torch.zeros(2, 3, 4, 2).double(), torch.zeros(1).int()))
    with pytest.raises(ValueError, match="rule='euler'"):
        Diagonal(diag.log_dt, diag.log_a, diag.b, diag.B, diag.C, rule="euler")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="B has shape"):
        Diagonal(diag.log_dt, diag.log_a, diag.b, diag.b, diag.C)
