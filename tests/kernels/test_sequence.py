"""The sequence in ordered slices: local, combine and correct give the unsplit result, in one process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels.diag_ssm import Diagonal, DiagState, diag_ssm
from potamos.kernels.diag_ssm.sequence import (
    by_row,
    by_slice,
    combine,
    diag_ssm_correct,
    diag_ssm_local,
    fold,
    halos,
    unfold,
)
from potamos.kernels.flash_conv import H3State, h3_mix
from potamos.kernels.flash_conv.sequence import h3_mix_correct, h3_mix_local, halo_tail

NAMES = ("log_dt", "log_a", "b", "B", "C")


def diagonal(values: dict[str, Tensor]) -> Diagonal:
    return Diagonal(*(values[name] for name in NAMES), rule="bilinear")


def inputs(values: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return values["q"], values["k"], values["v"]


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def documents(batch: int, length: int, borders: list[int]) -> Tensor:
    """Row 0 one document from end to end; row 1 starts at slice borders and next to them; the rest at random."""
    starts = torch.rand(batch, length) < 0.05
    starts[0] = False
    if batch > 1:
        starts[1] = False
        for border in borders:
            starts[1, [border, min(border + 1, length - 1)]] = True
            starts[1, border - 1] = border % 2 == 0
    return starts.cumsum(1).to(torch.int32)


def h3_case(heads: int, batch: int, length: int, head_dim: int, taps: int, make_diagonal: Any) -> dict[str, Tensor]:
    diag, d = make_diagonal(heads, 4)
    channels = heads * head_dim
    leaves = {name: leaf(batch, channels, length) for name in "qkv"}
    leaves |= {"shift": leaf(channels, taps, scale=taps**-0.5), "d_k": leaf(channels), "d": d}
    return leaves | {name: getattr(diag, name) for name in NAMES}


def project(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        total = total + (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()
    return total


def in_slices(values: dict[str, Tensor], ids: Tensor | None, state: H3State, count: int, head_dim: int):
    """The whole of `h3_mix` from `count` slices as rows of one batch."""
    diag = diagonal(values)
    taps = values["shift"].shape[1]
    reach = max(1, taps - 1)
    q, k, v = (fold(values[name], count) for name in "qkv")
    first = torch.nn.functional.pad(state.shift, (reach - taps + 1, 0))
    before = halos(by_slice(halo_tail(k, taps), count), first)
    rest: dict[str, Any] = {}
    first_ids = state.document[:, None].expand(-1, reach)
    if ids is not None:
        rows = fold(ids, count)
        before_ids = by_row(halos(by_slice(halo_tail(rows, taps), count), first_ids)[:-1])
        rest = {"document_ids": rows, "before_ids": before_ids}
    kernel: dict[str, Any] = {
        "d_k": values["d_k"],
        "d": values["d"],
        "before_k": by_row(before[:-1]),
        "head_dim": head_dim,
    }
    y, end, transition = h3_mix_local(q, k, v, values["shift"], diag, **kernel, **rest)
    states = combine(by_slice(end, count), by_slice(transition, count), state.diag)
    y = h3_mix_correct(y, q, diag, by_row(states[:-1]), head_dim=head_dim, **rest)
    return unfold(y, count), states[-1]


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize(
    ("count", "length", "head_dim", "taps"),
    [(2, 140, 1, 64), (6, 180, 1, 64), (4, 96, 2, 5), (3, 9, 1, 1), (5, 5, 1, 4)],
)
def test_h3_in_slices_is_h3(count, length, head_dim, taps, with_documents, make_diagonal, assert_close):
    """Outputs, final state and every gradient, also of the state before the first slice; slices shorter than the
    filter included."""
    values = h3_case(2, 3, length, head_dim, taps, make_diagonal)
    shift, modes = leaf(3, 2 * head_dim, taps - 1), leaf(3, 2, head_dim**2, 4, 2)
    state = H3State(shift, modes, torch.tensor([0, 0, 7], dtype=torch.int32))
    ids = documents(3, length, list(range(length // count, length, length // count))) if with_documents else None
    wrt = values | {"state.diag": modes} | ({"state.shift": shift} if taps > 1 else {})
    diag = diagonal(values)
    rest: dict[str, Any] = {"d_k": values["d_k"], "d": values["d"], "head_dim": head_dim}
    want, after = h3_mix(*inputs(values), values["shift"], diag, **rest, document_ids=ids, state=state)
    got, last = in_slices(values, ids, state, count, head_dim)
    assert_close(got, want, 1e-10, "y")
    assert_close(last, after.diag, 1e-10, "state")
    expected = torch.autograd.grad(project([want, after.diag]), list(wrt.values()))
    gradients = torch.autograd.grad(project([got, last]), list(wrt.values()))
    for name, gradient, reference in zip(wrt, gradients, expected, strict=True):
        assert_close(gradient, reference, 1e-10, f"d{name}")


@pytest.mark.parametrize("group", [1, 3])
def test_diag_ssm_in_slices_of_any_length(group, make_diagonal, assert_close):
    """Slices need no common length when nobody folds them."""
    diag, d = make_diagonal(2, 4)
    cuts = [0, 1, 66, 70, 200]
    u, modes = leaf(3, 2 * group, cuts[-1]), leaf(3, 2 * group, 4, 2)
    ids = documents(3, cuts[-1], cuts[1:-1])
    state = DiagState(modes, torch.tensor([0, 0, 7], dtype=torch.int32))
    want, after = diag_ssm(u, diag, d=d, document_ids=ids, state=state)
    spans = [slice(begin, end) for begin, end in itertools.pairwise(cuts)]
    before = [state.document] + [ids[:, span.stop - 1] for span in spans[:-1]]
    parts = [
        diag_ssm_local(u[..., span], diag, d=d, document_ids=ids[:, span], before=b)
        for span, b in zip(spans, before, strict=True)
    ]
    states = combine(torch.stack([p[1] for p in parts]), torch.stack([p[2] for p in parts]), modes)
    got = torch.cat(
        [
            diag_ssm_correct(part[0], diag, states[g], document_ids=ids[:, span], before=before[g])
            for g, (part, span) in enumerate(zip(parts, spans, strict=True))
        ],
        2,
    )
    assert_close(got, want, 1e-10, "y")
    assert_close(states[-1], after.modes, 1e-10, "state")
    wrt = {"u": u, "state": modes, "d": d} | {name: getattr(diag, name) for name in NAMES}
    expected = torch.autograd.grad(project([want, after.modes]), list(wrt.values()))
    gradients = torch.autograd.grad(project([got, states[-1]]), list(wrt.values()))
    for name, gradient, reference in zip(wrt, gradients, expected, strict=True):
        assert_close(gradient, reference, 1e-10, f"d{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_slices(dtype, make_diagonal, assert_close):
    values = {n: x.detach().float() for n, x in h3_case(3, 2, 256, 1, 64, make_diagonal).items()}
    values |= {name: values[name].to(dtype) for name in "qkv"}
    state = H3State(torch.zeros(2, 3, 63), torch.zeros(2, 3, 1, 4, 2), torch.zeros(2).int())
    got, last = in_slices(values, None, state, 4, 1)
    wide = {name: value.double() for name, value in values.items()}
    diag = diagonal(wide)
    want, after = h3_mix(*inputs(wide), wide["shift"], diag, d_k=wide["d_k"], d=wide["d"])
    assert got.dtype == dtype
    assert last.dtype == torch.float32
    assert_close(got, want, 1e-6 if dtype == torch.float32 else 5e-3, "y")
    assert_close(last, after.diag, 1e-6, "state")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_corrections_are_added_before_they_are_rounded(dtype, make_diagonal):
    diag, _ = make_diagonal(2, 4, dtype=torch.float32)
    y, incoming = torch.randn(2, 2, 90).to(dtype), torch.randn(2, 2, 4, 2)
    got = diag_ssm_correct(y, diag, incoming)
    assert got.dtype == dtype
    assert torch.equal(got, diag_ssm_correct(y.float(), diag, incoming).to(dtype))


def test_the_comparison_refuses_what_can_go_wrong_between_slices(make_diagonal, assert_close, monkeypatch):
    """No carry, no halo, a transition without decay or through a document's start: each must be seen."""
    values = h3_case(2, 3, 180, 1, 64, make_diagonal)
    ids = documents(3, 180, [45, 90, 135])
    state = H3State(torch.zeros(3, 2, 63).double(), torch.zeros(3, 2, 1, 4, 2).double(), torch.zeros(3).int())
    diag = diagonal(values)
    rest: dict[str, Any] = {"d_k": values["d_k"], "d": values["d"]}
    want, _ = h3_mix(*inputs(values), values["shift"], diag, **rest, document_ids=ids, state=state)
    assert_close(in_slices(values, ids, state, 4, 1)[0], want, 1e-10)
    here = globals()
    real_halos, real_combine, real_local = halos, combine, h3_mix_local

    def through(*args, **kwargs):
        y, end, transition = real_local(*args, **kwargs)
        return y, end, transition.amax(0, keepdim=True).expand_as(transition)

    breaks = {
        "no carry": ("combine", lambda e, t, initial: torch.zeros_like(real_combine(e, t))),
        "no decay": ("combine", lambda e, t, initial: real_combine(e, t / t.square().sum(-1, True).sqrt().clamp(1e-9))),
        "ends not accumulated": ("combine", lambda e, t, initial: real_combine(e, torch.zeros_like(t))),
        "the state one slice late": ("combine", lambda e, t, initial: real_combine(e, t).roll(1, 0)),
        "no halo": ("halos", lambda t, f: real_halos(t, f) * (0 if t.is_floating_point() else 1)),
        "halo of the slice itself": ("halos", lambda t, f: real_halos(t, f).roll(-1, 0)),
        "carried into other documents": ("h3_mix_local", through),
    }
    for name, (target, wrong) in breaks.items():
        with monkeypatch.context() as patch:
            patch.setitem(here, target, wrong)
            with pytest.raises(AssertionError, match="relative rms error"):
                assert_close(in_slices(values, ids, state, 4, 1)[0], want, 1e-10, name)


def test_what_lies_before_each_slice():
    line = torch.arange(1, 13).view(1, 12)
    for count, reach in ((3, 4), (4, 3), (6, 5), (12, 5), (1, 3)):
        rows = fold(line, count)
        tails = by_slice(rows[:, max(0, rows.shape[1] - reach) :], count)
        got = halos(tails, torch.zeros(1, reach, dtype=torch.long))
        padded = torch.cat([torch.zeros(1, reach, dtype=torch.long), line], 1)
        for g in range(count + 1):
            assert torch.equal(got[g], padded[:, g * 12 // count : g * 12 // count + reach])
    with pytest.raises(ValueError, match="reach of 2"):
        halos(torch.zeros(2, 1, 3), torch.zeros(1, 2))


def test_fold_is_a_view_of_channel_major_memory():
    x = torch.randn(5, 2, 12).transpose(0, 1)
    rows = fold(x, 3)
    assert rows.data_ptr() == x.data_ptr()
    assert torch.equal(rows[4], x[1, :, 4:8])
    assert torch.equal(unfold(rows, 3), x)
    assert unfold(rows, 3).data_ptr() == x.data_ptr()
    assert torch.equal(by_row(by_slice(rows, 3)), rows)
    assert torch.equal(by_slice(rows, 3)[1], x[:, :, 4:8])
    with pytest.raises(ValueError, match="multiple of 5"):
        fold(x, 5)


def test_bad_arguments_are_named(make_diagonal):
    values = h3_case(2, 1, 12, 1, 4, make_diagonal)
    diag = diagonal(values)
    rest: dict[str, Any] = {"d_k": values["d_k"], "d": values["d"]}
    ids = torch.zeros(1, 12).int()
    with pytest.raises(ValueError, match="4 taps need 3"):
        h3_mix_local(*inputs(values), values["shift"], diag, **rest, before_k=torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="before_ids of at least 3"):
        h3_mix_local(*inputs(values), values["shift"], diag, **rest, before_k=torch.zeros(1, 2, 3), document_ids=ids)
    with pytest.raises(ValueError, match="before="):
        diag_ssm_local(values["q"], diag, d=None, document_ids=ids)
