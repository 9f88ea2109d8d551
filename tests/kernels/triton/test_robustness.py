"""What happens to the fused kernels by accident: numbers that are not finite, mixed types, autocast, many modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from potamos.kernels.backend import BackendUnavailableError
from potamos.kernels.diag_ssm import Diagonal, diag_ssm, triton
from potamos.kernels.diag_ssm.fused import fused_obstacle
from potamos.kernels.flash_conv import H3State, h3_mix

HEADS, MODES, TAPS = 2, 3, 5
BACKENDS = ("triton", "torch")


@pytest.fixture
def mixer(make_diagonal):
    """mixer(length) -> q, k, v and a function of them and keyword arguments of `h3_mix`."""

    def make(length: int):
        torch.manual_seed(length)
        diag, d = make_diagonal(HEADS, MODES, dtype=torch.float32)
        diag = Diagonal(*(getattr(diag, n).detach() for n in ("log_dt", "log_a", "b", "B", "C")))
        shift, d_k = torch.randn(HEADS, TAPS), torch.randn(HEADS)
        q, k, v = (torch.randn(1, HEADS, length) for _ in range(3))

        def run(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, H3State]:
            return h3_mix(q, k, v, shift, diag, d_k=d_k, d=d.detach(), **options)

        return q, k, v, run

    return make


def ids_from(start: int, length: int) -> Tensor:
    return (torch.arange(length) >= start).int()[None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("start", [128, 150, 299])
@pytest.mark.parametrize("which", ["k", "v"])
def test_what_is_not_finite_stays_in_its_document(mixer, backend, value, start, which):
    q, k, v, run = mixer(300)
    ids = ids_from(start, 300)
    want, after = run(q, k, v, document_ids=ids, backend=backend)
    poisoned = {"k": k.clone(), "v": v.clone()}
    poisoned[which][:, :, start - 30] = value
    y, state = run(q, poisoned["k"], poisoned["v"], document_ids=ids, backend=backend)
    assert not y[:, :, start - 1].isfinite().any(), "the document itself shows it"
    assert torch.equal(y[:, :, start:], want[:, :, start:])
    assert torch.equal(state.diag, after.diag)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("which", "first"), [("k", 192), ("v", 192), ("q", 200)])
def test_what_is_not_finite_stays_out_of_earlier_chunks(mixer, backend, value, which, first):
    """Token 200 reaches back to the beginning of its chunk of 64 tokens at most; from q not even there."""
    q, k, v, run = mixer(300)
    want, _ = run(q, k, v, backend=backend)
    inputs = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
    inputs[which][:, :, 200] = value
    y, after = run(**inputs, backend=backend)
    assert torch.equal(y[:, :, :first], want[:, :, :first])
    assert not y[:, :, 200].isfinite().any()
    if which == "q":
        assert torch.equal(y[:, :, 201:], want[:, :, 201:])
        assert after.diag.isfinite().all()


def test_what_is_not_finite_stays_in_its_document_in_segments(mixer, monkeypatch):
    monkeypatch.setattr(triton, "choose_segments", lambda programs, supers, multiprocessors: supers)
    q, k, v, run = mixer(2200)
    ids = ids_from(1500, 2200)
    want, after = run(q, k, v, document_ids=ids, backend="triton")
    v = v.clone()
    v[:, :, 700] = torch.nan
    y, state = run(q, k, v, document_ids=ids, backend="triton")
    assert y[:, :, 1499].isnan().all()
    assert torch.equal(y[:, :, 1500:], want[:, :, 1500:])
    assert torch.equal(state.diag, after.diag)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_state_of_another_document_is_not_read(mixer, backend):
    q, k, v, run = mixer(100)
    v.requires_grad_()
    ids, none = ids_from(50, 100), torch.zeros(1, dtype=torch.int32) - 1
    nan = torch.full((1, HEADS, 1, MODES, 2), torch.nan)
    broken = H3State(torch.full((1, HEADS, TAPS - 1), torch.nan), nan, none)
    y, after = run(q, k, v, document_ids=ids, state=broken, backend=backend)
    assert torch.equal(y, run(q, k, v, document_ids=ids, backend=backend)[0])
    assert after.diag.isfinite().all()
    assert torch.autograd.grad(y.sum(), v)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(mixer, make_diagonal, backend):
    q, k, v, run = mixer(100)
    device = torch.get_default_device().type
    want, after = run(q, k, v, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        y, state = run(q, k, v, backend=backend)
    assert torch.equal(y, want)
    assert state.diag.dtype == torch.float32
    assert torch.equal(state.diag, after.diag)
    diag, d = make_diagonal(HEADS, MODES, dtype=torch.float32)
    want = diag_ssm(v, diag, d=d, backend=backend)[0]
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(diag_ssm(v, diag, d=d, backend=backend)[0], want)


@pytest.mark.parametrize("narrow", ["q", "k", "v"])
def test_the_output_has_the_type_of_q(mixer, narrow, assert_close):
    q, k, v, run = mixer(100)
    x = {"q": q, "k": k, "v": v}
    want = run(**{n: value.bfloat16().double() if n == narrow else value.double() for n, value in x.items()})[0]
    x[narrow] = x[narrow].bfloat16()
    y = run(**x, backend="triton")[0]
    assert y.dtype == x["q"].dtype
    assert_close(y, want, 1e-2 if narrow == "q" else 1e-6)


def test_fp32_takes_at_most_32_modes(make_diagonal):
    """More would be kept in local memory in the backward; `auto` takes the torch form then."""
    assert fused_obstacle(torch.float32, 32) is None
    assert fused_obstacle(torch.bfloat16, 64) is None
    diag, d = make_diagonal(1, 33, dtype=torch.float32)
    u = torch.randn(1, 1, 10)
    with pytest.raises(BackendUnavailableError, match=r"at most 32 modes of torch\.float32, not 33"):
        diag_ssm(u, diag, d=d, backend="triton")
    assert diag_ssm(u, diag, d=d)[0].isfinite().all()
    assert diag_ssm(u.bfloat16(), diag, d=d, backend="triton")[0].isfinite().all()
