"""The kernels as torch.library and torch.compile see them: one node each, the eager results, every gradient."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import potamos.kernels.library as library
from potamos.kernels.diag_ssm import Diagonal, DiagState, diag_ssm
from potamos.kernels.flash_conv import H3State, h3_mix
from potamos.kernels.long_conv import long_conv

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
BATCH, HEADS, LENGTH, TAPS, MODES = 2, 3, 70, 9, 4


class Case:
    """Leaves of one call of `h3_mix` and, from the same parameters, of `diag_ssm`."""

    def __init__(self, make_diagonal: Any, head_dim: int = 1, dtype: torch.dtype = torch.float64) -> None:
        self.diag, self.d = make_diagonal(HEADS, MODES, dtype=dtype)
        self.head_dim, channels = head_dim, HEADS * head_dim

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

        self.q, self.k, self.v = (leaf(BATCH, channels, LENGTH) for _ in range(3))
        self.shift, self.d_k = leaf(channels, TAPS), leaf(channels)
        self.history = leaf(BATCH, channels, TAPS - 1)
        self.modes = leaf(BATCH, HEADS, head_dim**2, MODES, 2)
        self.ids = (torch.rand(BATCH, LENGTH) < 0.1).cumsum(1).to(torch.int32)
        self.document = torch.tensor([0, 3], dtype=torch.int32)

    @property
    def diagonal(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.diag.log_dt, self.diag.log_a, self.diag.b, self.diag.B, self.diag.C

    def leaves(self, *, carried: bool) -> list[Tensor]:
        state = [self.history, self.modes] if carried else []
        return [self.q, self.k, self.v, self.shift, *self.diagonal, self.d_k, self.d, *state]

    def mix(self, *, documents: bool, carried: bool) -> tuple[Tensor, H3State]:
        ids = self.ids if documents else None
        state = H3State(self.history, self.modes, self.document) if carried else None
        diag = Diagonal(*self.diagonal)
        rest = {"d_k": self.d_k, "d": self.d, "head_dim": self.head_dim}
        return h3_mix(self.q, self.k, self.v, self.shift, diag, **rest, document_ids=ids, state=state)


def gradients(y: Tensor, state: H3State, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    outputs = [y, state.shift, state.diag]
    weighted = [(o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs]
    return torch.autograd.grad(sum(weighted, torch.zeros(())), leaves)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("head_dim", [1, 2])
def test_compiled_mixing_is_the_eager_one(documents, carried, head_dim, make_diagonal, assert_close):
    """fullgraph: not one graph break, though documents are read on the host; outputs, state and every gradient."""
    case = Case(make_diagonal, head_dim)
    want, want_state = case.mix(documents=documents, carried=carried)
    compiled = torch.compile(case.mix, backend="aot_eager", fullgraph=True)
    got, state = compiled(documents=documents, carried=carried)
    assert_close(got, want, 1e-12, "y")
    assert_close(state.shift, want_state.shift, 1e-12, "shift")
    assert_close(state.diag, want_state.diag, 1e-12, "diag")
    assert torch.equal(state.document, want_state.document)
    leaves = case.leaves(carried=carried)
    for got_gradient, want_gradient in zip(
        gradients(got, state, leaves), gradients(want, want_state, leaves), strict=True
    ):
        assert_close(got_gradient, want_gradient, 1e-12)


def test_compiled_diag_ssm_and_long_conv(make_diagonal, assert_close):
    case = Case(make_diagonal)
    state = DiagState(case.modes[:, :, 0], case.document)
    taps = torch.randn(HEADS, LENGTH, dtype=torch.float64, requires_grad=True)

    def both(u: Tensor) -> tuple[Tensor, Tensor]:
        y, after = diag_ssm(u, Diagonal(*case.diagonal), d=None, document_ids=case.ids, state=state)
        return long_conv(y, taps, d=case.d), after.modes

    leaves = [case.q, taps, case.modes, *case.diagonal, case.d]
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(case.q), both(case.q), strict=True):
        assert_close(got, want, 1e-12)
    got, want = (torch.autograd.grad(f(case.q)[0].square().sum(), leaves) for f in (compiled, both))
    for name, gradient, reference in zip(range(len(leaves)), got, want, strict=True):
        assert_close(gradient, reference, 1e-12, str(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_low_precision(dtype, make_diagonal, assert_close):
    case = Case(make_diagonal, dtype=torch.float32)
    u = case.q.detach().to(dtype)
    want, state = diag_ssm(u, case.diag, d=case.d)
    got, after = torch.compile(lambda u: diag_ssm(u, case.diag, d=case.d), backend="aot_eager", fullgraph=True)(u)
    assert got.dtype == dtype
    assert after.modes.dtype == torch.float32
    assert torch.equal(got, want)
    assert torch.equal(after.modes, state.modes)


@pytest.mark.parametrize("operation", ["h3_mix", "diag_ssm"])
def test_tracing_is_told_the_types_of_low_precision(operation, make_diagonal):
    """Of bf16 inputs: the output is bf16, the states are fp32, in the fake results as in the real ones."""
    case = Case(make_diagonal, dtype=torch.float32)
    q, k, v = (x.detach().bfloat16() for x in (case.q, case.k, case.v))
    if operation == "h3_mix":
        rest = (case.shift, *case.diagonal, case.d_k, case.d, case.ids, case.history, case.modes, case.document)
        arguments = (q, k, v, *rest, 1, "zoh", "torch")
    else:
        arguments = (q, *case.diagonal, case.d, case.ids, case.modes[:, :, 0], case.document, "bilinear", "auto")
    arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    run = getattr(torch.ops.potamos, operation)
    real = run(*arguments)
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
    assert [x.dtype for x in fake] == [x.dtype for x in real]
    assert [x.shape for x in fake] == [x.shape for x in real]
    assert real[0].dtype == torch.bfloat16
    assert {x.dtype for x in real[1:-1]} == {torch.float32}


@pytest.mark.parametrize("operation", ["h3_mix", "diag_ssm"])
def test_opcheck(operation, make_diagonal):
    """torch's own checks of schema, fake implementation and autograd, with shapes that may vary."""
    case = Case(make_diagonal)
    carried = (case.modes, case.document)
    if operation == "h3_mix":
        arguments = (*case.leaves(carried=False), case.ids, case.history, *carried, 1, "zoh", "torch")
    else:
        modes = case.modes[:, :, 0].detach().requires_grad_()
        arguments = (case.q, *case.diagonal, case.d, case.ids, modes, case.document, "bilinear", "auto")
    results = torch.library.opcheck(getattr(torch.ops.potamos, operation).default, arguments, test_utils=CHECKS)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("major", [False, True])
def test_backward_operations_give_what_tracing_was_told(major, make_diagonal):
    """Gradients in their inputs' shapes and strides, in memory of their own, in either memory order."""
    case = Case(make_diagonal, dtype=torch.float32)
    u = case.q.detach()
    u = u.transpose(0, 1).contiguous().transpose(0, 1) if major else u
    inputs = [u, *(x.detach() for x in case.diagonal), case.d.detach(), case.ids, None, None]
    needed = [True] * 7 + [False] * 3
    gradients = [torch.randn(BATCH, HEADS, LENGTH), None, None]
    operation = torch.ops.potamos.diag_ssm_backward.default
    arguments = (gradients, inputs, needed, "zoh", "torch")
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))
    for gradient, x in zip(operation(*arguments), inputs, strict=False):
        assert gradient.stride() == torch.empty_like(x).stride()
        assert gradient.any()


def test_what_a_loss_does_not_see_gets_zeros(make_diagonal):
    """A loss of the SSM's state alone: neither q nor C nor the skip takes part."""
    case = Case(make_diagonal)
    inputs = [x.detach() for x in case.leaves(carried=False)]
    gradients = [None, None, torch.randn_like(case.modes), None]
    needed = [True] * len(inputs) + [False] * 4
    found = torch.ops.potamos.h3_mix_backward(gradients, [*inputs, *(None,) * 4], needed, 1, "zoh", "torch")
    seen = {"q": False, "k": True, "v": True, "shift": True} | dict.fromkeys(("log_dt", "log_a", "b", "B"), True)
    seen |= {"C": False, "d_k": True, "d": False}
    assert {name: bool(gradient.any()) for name, gradient in zip(seen, found, strict=True)} == seen


def test_frozen_inputs_get_no_gradient(make_diagonal, assert_close):
    case = Case(make_diagonal)
    case.k, case.d = case.k.detach(), case.d.detach()
    leaves = [x for x in case.leaves(carried=False) if x.requires_grad]
    want = gradients(*case.mix(documents=True, carried=False), leaves)
    compiled = torch.compile(case.mix, backend="aot_eager", fullgraph=True)
    got = gradients(*compiled(documents=True, carried=False), leaves)
    for gradient, reference in zip(got, want, strict=True):
        assert_close(gradient, reference, 1e-12)


def test_operations_run_as_if_eager(monkeypatch, make_diagonal, assert_close):
    """The first call of a compiled graph runs with lazy conjugation switched off, and complex products go wrong without
    a word: the protection against it, taken away, must be missed."""
    case = Case(make_diagonal)
    want, _ = case.mix(documents=False, carried=False)
    monkeypatch.setattr(library, "_eager_dispatch", contextlib.nullcontext)
    compiled = torch.compile(case.mix, backend="aot_eager", fullgraph=True)
    with pytest.raises(AssertionError, match="relative rms error"):
        assert_close(compiled(documents=False, carried=False)[0], want, 1e-12)


def test_mistakes_are_named_while_tracing(make_diagonal):
    case = Case(make_diagonal)
    case.d_k = case.d_k[:1]
    with pytest.raises(Exception, match="d_k has shape"):
        torch.compile(case.mix, backend="aot_eager", fullgraph=True)(documents=False, carried=False)
