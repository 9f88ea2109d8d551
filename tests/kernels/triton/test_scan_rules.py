"""What the fused mixer promises beyond its values in fp32: 16 bits with documents and a carried state, causality and
isolation of gradients, long rows, strange strides, extreme parameters, segments of channels that share a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels.backend import BackendUnavailableError
from potamos.kernels.diag_ssm import Diagonal, DiagState, diag_ssm, diag_ssm_reference, triton, triton_backward
from potamos.kernels.flash_conv import H3State, h3_mix
from potamos.kernels.flash_conv.reference import h3_mix_reference

NAMES = ("log_dt", "log_a", "b", "B", "C")
Values = dict[str, Tensor]


@pytest.fixture
def make_values(make_diagonal):
    """make_values(batch, heads, length, ...) -> leaves of one call, q, k and v in `dtype`, all others fp32."""

    def make(
        batch: int, heads: int, length: int, dtype=torch.float32, modes=32, taps=64, carried=False, **kind
    ) -> Values:
        torch.manual_seed(length)
        diag, d = make_diagonal(heads, modes, dtype=torch.float32, **kind)
        values = {name: torch.randn(batch, heads, length).to(dtype) for name in "qkv"}
        values |= {"shift": torch.randn(heads, taps) * taps**-0.5, "d_k": torch.randn(heads), "d": d.detach()}
        values |= {name: getattr(diag, name).detach() for name in NAMES}
        if carried:
            values |= {"history": torch.randn(batch, heads, taps - 1), "modes": torch.randn(batch, heads, 1, modes, 2)}
        return {name: x.requires_grad_() for name, x in values.items()}

    return make


def run(operation: Any, x: Values, ids: Tensor | None = None, **rest: Any) -> tuple[Tensor, H3State]:
    state = None
    if "modes" in x:
        state = H3State(x["history"], x["modes"], torch.zeros(x["q"].shape[0], dtype=torch.int32))
    diag = Diagonal(x["log_dt"], x["log_a"], x["b"], x["B"], x["C"])
    rest |= {} if operation is h3_mix_reference else {"backend": "triton"}
    inputs = (x["q"], x["k"], x["v"], x["shift"], diag)
    return operation(*inputs, d_k=x["d_k"], d=x["d"], document_ids=ids, state=state, **rest)


def as_type(x: Values, dtype: torch.dtype) -> Values:
    return {name: value.detach().to(dtype).requires_grad_() for name, value in x.items()}


def all_of(operation: Any, x: Values, ids: Tensor | None = None, *, state: bool = True, output: bool = True) -> Values:
    """Output, final state, and the gradients of fixed projections of both."""
    y, after = run(operation, x, ids)
    torch.manual_seed(11)
    weights = torch.randn(y.shape), torch.randn(after.diag.shape)
    loss = torch.zeros((), dtype=after.diag.dtype)
    if output:
        loss = loss + (y * weights[0].to(y)).sum()
    if state:
        loss = loss + (after.diag * weights[1].to(after.diag)).sum()
    gradients = torch.autograd.grad(loss, list(x.values()), allow_unused=True)
    found = {f"d{name}": g for name, g in zip(x, gradients, strict=True) if g is not None}
    return {"y": y.detach(), "state": after.diag.detach()} | found


def documents(length: int) -> Tensor:
    """Two rows: starts at, next to and away from chunks' borders, several in a chunk, one token long."""
    ids = torch.zeros(2, length, dtype=torch.int32)
    for row, starts in enumerate([(5, 30, 64, 65, 130, 190), (63, 100, 128, 170, 171, 199)]):
        for start in starts:
            ids[row, start:] += 1
    return ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_documents_and_a_carried_state(dtype, make_values, assert_close):
    """Forward and backward against the definition in fp64: within the type's own rounding, each channel like the
    others; and what a part left out would give is refused."""
    x, ids = make_values(2, 3, 210, dtype, carried=True), documents(210)
    got = all_of(h3_mix, x, ids)
    want = all_of(h3_mix_reference, as_type(x, torch.float64), ids)
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for name, value in got.items():
        assert_close(value, want[name], 3 * unit if name in ("y", "state") else 6 * unit, name)
    error = (got["y"].double() - want["y"]).square().mean((0, 2)) / want["y"].square().mean((0, 2))
    assert error.sqrt().max() <= 2 * error.sqrt().mean()
    others = {
        "no documents": run(h3_mix_reference, as_type(x, torch.float64))[0],
        "no carried state": run(
            h3_mix_reference, {n: v.double() for n, v in x.items() if n not in ("history", "modes")}, ids
        )[0],
        "no history": run(h3_mix_reference, as_type(x | {"history": 0 * x["history"]}, torch.float64), ids)[0],
    }
    for name, other in others.items():
        with pytest.raises(AssertionError, match="relative rms"):
            assert_close(got["y"], other, 3 * unit, name)


def test_states_stay_fp32_between_super_chunks(make_values, assert_close):
    """16-bit inputs that they hold exactly: were the carried state rounded to 16 bits, slow modes would lose it."""
    x = as_type(make_values(1, 1, 2048, modes=4), torch.float32)
    for name in "qkv":
        x[name] = x[name].detach().bfloat16()
    starts: list[Tensor] = []
    scan_forward = triton.scan_forward

    def spy(*arguments, **options):
        starts.append(scan_forward(*arguments, **options)[2])
        return scan_forward(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "scan_forward", spy)
        _, after = run(h3_mix, x)
    (found,) = starts
    rounded = found[:, :, 1:].bfloat16().float()
    assert not torch.equal(found[:, :, 1:], rounded)
    assert not torch.equal(after.diag, after.diag.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_causal_and_stay_in_their_document(dtype, make_values):
    x, ids = make_values(1, 2, 150, dtype), documents(150)[:1]
    y = run(h3_mix, x)[0]
    for token in (0, 63, 64, 100):
        gradients = torch.autograd.grad(y[..., token].sum(), [x[name] for name in "qkv"], retain_graph=True)
        for gradient in gradients:
            assert not gradient[..., token + 1 :].any()
            assert gradient[..., token].any()
    packed = run(h3_mix, x, ids)[0]
    for begin, end in ((5, 30), (30, 64), (65, 130)):
        gradients = torch.autograd.grad(packed[..., begin:end].sum(), [x[name] for name in "qkv"], retain_graph=True)
        for gradient in gradients:
            assert not gradient[..., :begin].any()
            assert not gradient[..., end:].any()
            assert gradient[..., begin:end].any(0).any(0).all()


@pytest.mark.parametrize("length", [2048, 2049])
def test_long_rows(length, make_values, assert_close):
    x = make_values(1, 1, length)
    got, want = run(h3_mix, x), run(h3_mix_reference, as_type(x, torch.float64))
    assert_close(got[0], want[0], 1e-6, "y")
    assert_close(got[1].diag, want[1].diag, 1e-6, "state")


def test_strides_change_nothing(make_values):
    """Tokens apart in memory, rows that begin at odd addresses, one row expanded to two; outputs and gradients."""
    x = {name: value.detach() for name, value in make_values(2, 2, 80, modes=3, taps=5).items()}
    x |= {name: x[name][:1].expand(2, 2, 80) for name in "qkv"}
    shapes = {
        "every third": lambda v: torch.stack([v] * 3, 3).flatten(2)[..., ::3],
        "odd addresses": lambda v: torch.cat([v[..., :1], v], 2)[..., 1:],
        "length first": lambda v: v.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "expanded": lambda v: v,
    }
    plain = x | {name: x[name].contiguous() for name in "qkv"}
    want = all_of(h3_mix, {name: value.requires_grad_() for name, value in plain.items()})
    for title, stride in shapes.items():
        strided = {name: (stride(v) if name in "qkv" else v).detach().requires_grad_() for name, v in x.items()}
        for name, value in all_of(h3_mix, strided).items():
            assert torch.equal(value, want[name]), f"{title}: {name}"


def test_gradients_at_extreme_parameters(make_values, assert_close):
    """Steps at both ends, a mode almost undamped, C a hundred times larger."""
    x = make_values(1, 2, 300, stress=True)
    got, want = all_of(h3_mix, x), all_of(h3_mix_reference, as_type(x, torch.float64))
    for name, value in got.items():
        assert_close(value, want[name], 1e-6 if name in ("y", "state") else 1e-5, name)


def test_a_loss_of_the_state_alone(make_values, assert_close):
    x = make_values(1, 2, 100, modes=3, taps=5)
    got = all_of(h3_mix, x, output=False)
    want = all_of(h3_mix_reference, as_type(x, torch.float64), output=False)
    for name, value in got.items():
        if name in want and want[name].any():
            assert_close(value, want[name], 1e-5, name)
        else:
            assert not value.any(), name
    assert {"dk", "dv", "dshift", "dlog_dt", "dB"} <= {name for name, value in got.items() if value.any()}


def test_channels_that_share_a_kernel_in_segments(make_diagonal, assert_close, monkeypatch):
    """Each segment's state decays at its own kernel's rate; forward and backward in three pieces."""
    monkeypatch.setattr(triton, "choose_segments", lambda programs, supers, multiprocessors: supers)
    monkeypatch.setattr(triton_backward, "plan", lambda channels, batch, supers: (1, 1))
    diag, d = make_diagonal(2, 2, dtype=torch.float32)
    with torch.no_grad():  # slow modes, so that a state lives through a segment, and rates that differ
        diag.log_dt.copy_(torch.tensor([-6.9, -6.0]))
    u, modes = torch.randn(1, 4, 2100, requires_grad=True), torch.randn(1, 4, 2, 2)
    x = {name: getattr(diag, name) for name in NAMES} | {"d": d, "u": u, "modes": modes.requires_grad_()}
    exact = as_type(x, torch.float64)
    document, weights, found = torch.zeros(1, dtype=torch.int32), torch.randn(u.shape), []
    forms: Any = ((x, diag_ssm, {"backend": "triton"}), (exact, diag_ssm_reference, {}))
    for leaves, operation, rest in forms:
        same = Diagonal(*(leaves[name] for name in NAMES), rule=diag.rule)
        state = DiagState(leaves["modes"], document)
        y, after = operation(leaves["u"], same, d=leaves["d"], state=state, **rest)
        gradients = torch.autograd.grad((y * weights).sum() + after.modes.sum(), list(leaves.values()))
        found.append([y, after.modes, *gradients])
    for name, got, want in zip(("y", "state", *x), *found, strict=True):
        assert_close(got, want, 1e-6 if name in ("y", "state") else 1e-5, name)


def test_few_long_rows_are_cut_in_the_backward():
    """(super-chunks a segment, segments a part): enough rows are whole, few long ones are cut."""
    assert triton_backward.plan(768, 8, 16) == (16, 4)
    assert triton_backward.plan(768, 1, 64) == (64, 1)
    assert triton_backward.plan(1, 1, 1024) == (4, 1)
    assert triton_backward.plan(16, 2, 64)[0] == 8
    assert triton_backward.plan(1, 1, 7) == (7, 1)


def test_many_taps_and_large_heads_are_refused_by_name_and_left_to_torch(make_values):
    """head_dim 8 with 90 taps: the kernel takes 64 taps, whatever the heads."""
    x = {name: value.detach() for name, value in make_values(1, 8, 70, modes=3, taps=90).items()}
    x |= {name: x[name][:1] for name in (*NAMES, "d")}
    with pytest.raises(BackendUnavailableError, match="at most 64 shift taps, not 90"):
        run(h3_mix, x, head_dim=8)
    diag = Diagonal(*(x[name] for name in NAMES))
    inputs, rest = (x["q"], x["k"], x["v"], x["shift"], diag), {"d_k": x["d_k"], "d": x["d"], "head_dim": 8}
    auto, torch_form = (h3_mix(*inputs, **rest, backend=name)[0] for name in ("auto", "torch"))
    assert torch.equal(auto, torch_form)
