"""Document ids of any integer dtype and size: they are compared whole, never cut to 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels.diag_ssm import diag_ssm, diag_ssm_reference, diag_ssm_step, initial_diag_state
from potamos.kernels.diag_ssm.sequence import diag_ssm_correct, diag_ssm_local
from potamos.kernels.flash_conv import h3_mix, h3_mix_step, initial_h3_state
from potamos.kernels.flash_conv.reference import h3_mix_reference
from potamos.kernels.flash_conv.sequence import h3_mix_correct, h3_mix_local

HEADS, MODES, TAPS, LENGTH = 2, 3, 5, 90
FAR = 2**32 + 7
"""Cut to 32 bits it is 7."""


class Case:
    """`h3_mix` and `diag_ssm` of k, split at any token into two calls."""

    def __init__(self, make_diagonal: Any) -> None:
        torch.manual_seed(0)
        self.diag, self.d = make_diagonal(HEADS, MODES)
        self.q, self.k, self.v = (torch.randn(2, HEADS, LENGTH, dtype=torch.float64) for _ in range(3))
        self.shift, self.d_k = torch.randn(HEADS, TAPS).double(), torch.randn(HEADS).double()

    def mix(self, ids: Tensor | None, state: Any, span: slice, operation: Any = h3_mix) -> tuple[Tensor, Any]:
        q, k, v = (x[..., span] for x in (self.q, self.k, self.v))
        rest = {"d_k": self.d_k, "d": self.d}
        return operation(q, k, v, self.shift, self.diag, **rest, document_ids=ids, state=state)

    def ssm(self, ids: Tensor | None, state: Any, span: slice, operation: Any = diag_ssm) -> tuple[Tensor, Any]:
        return operation(self.k[..., span], self.diag, d=self.d, document_ids=ids, state=state)


@pytest.fixture
def case(make_diagonal) -> Case:
    return Case(make_diagonal)


@pytest.mark.parametrize("name", ["mix", "ssm"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_distant_id_is_another_document(case, name, compiled):
    """2^32 + 7 carried into a call of document 7, and the other way round: nothing may pass."""
    run = getattr(case, name)
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    first, second = slice(0, 40), slice(40, LENGTH)
    alone = getattr(case, name)(None, None, second)[0]
    for before, after in ((FAR, 7), (7, FAR)):
        for dtype in (torch.int64, torch.int32) if before == 7 else (torch.int64,):
            _, state = run(torch.full((2, 40), before, dtype=dtype), None, first)
            assert state.document.dtype == dtype
            assert state.document.tolist() == [before] * 2
            later = torch.int64 if after == FAR else torch.int32
            y, end = run(torch.full((2, LENGTH - 40), after, dtype=later), state, second)
            torch.testing.assert_close(y, alone, atol=1e-12, rtol=0)
            assert end.document.tolist() == [after] * 2


@pytest.mark.parametrize("name", ["mix", "ssm"])
def test_the_same_distant_id_goes_on(case, name, assert_close):
    run, ids = getattr(case, name), torch.full((2, LENGTH), FAR)
    whole = run(ids, None, slice(0, LENGTH))[0]
    reference = {"mix": h3_mix_reference, "ssm": diag_ssm_reference}[name]
    want, last = run(ids, None, slice(0, LENGTH), reference)
    assert last.document.tolist() == [FAR] * 2
    _, state = run(ids[:, :40], None, slice(0, 40))
    y, end = run(ids[:, 40:], state, slice(40, LENGTH))
    assert_close(whole, want, 1e-10)
    assert_close(y, want[..., 40:], 1e-10)
    assert end.document.tolist() == [FAR] * 2


def test_steps_compare_whole_ids(case):
    far, near = torch.full((2,), FAR), torch.full((2,), 7, dtype=torch.int32)
    q, k, v = (x[..., 0] for x in (case.q, case.k, case.v))
    rest = {"d_k": case.d_k, "d": case.d}
    empty = initial_h3_state(2, HEADS, TAPS, case.diag, dtype=torch.float64)
    alone, state = h3_mix_step(q, k, v, case.shift, case.diag, **rest, document_ids=far, state=empty)
    assert torch.equal(state.document, far)
    y, _ = h3_mix_step(q, k, v, case.shift, case.diag, **rest, document_ids=near, state=state)
    assert torch.equal(y, alone)
    empty = initial_diag_state(2, HEADS, case.diag, dtype=torch.float64)
    alone, state = diag_ssm_step(k, case.diag, d=case.d, document_ids=far, state=empty)
    assert torch.equal(state.document, far)
    assert torch.equal(diag_ssm_step(k, case.diag, d=case.d, document_ids=near, state=state)[0], alone)


def test_slices_compare_whole_ids(case, assert_close):
    """A slice of document 7 (int32) after document 2^32 + 7 (int64): its output takes nothing from the state before."""
    ids, before = torch.full((2, LENGTH), 7, dtype=torch.int32), torch.full((2, TAPS - 1), FAR)
    everything = slice(0, LENGTH)
    y, _, passed = diag_ssm_local(case.k, case.diag, d=case.d, document_ids=ids, before=before[:, -1])
    assert not passed.any()
    incoming = torch.randn(2, HEADS, MODES, 2, dtype=torch.float64)
    y = diag_ssm_correct(y, case.diag, incoming, document_ids=ids, before=before[:, -1])
    assert_close(y, case.ssm(None, None, everything)[0], 1e-10)
    rest: dict[str, Any] = {
        "d_k": case.d_k,
        "d": case.d,
        "before_k": torch.randn(2, HEADS, TAPS - 1, dtype=torch.float64),
    }
    documents: dict[str, Any] = {"document_ids": ids, "before_ids": before}
    y, _, passed = h3_mix_local(case.q, case.k, case.v, case.shift, case.diag, **rest, **documents)
    assert not passed.any()
    y = h3_mix_correct(y, case.q, case.diag, incoming[:, :, None], **documents)
    assert_close(y, case.mix(None, None, everything)[0], 1e-10)
