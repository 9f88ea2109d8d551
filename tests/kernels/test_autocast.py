"""Autocast changes nothing inside any operation of the state-space kernels: results are bitwise those without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels import backend
from potamos.kernels.diag_ssm import DiagState, diag_ssm, diag_ssm_step
from potamos.kernels.diag_ssm import sequence as diag_sequence
from potamos.kernels.flash_conv import H3State, h3_mix, h3_mix_step
from potamos.kernels.flash_conv import sequence as h3_sequence
from potamos.kernels.long_conv import long_conv

HEADS, HEAD_DIM, MODES, TAPS, LENGTH = 2, 2, 3, 5, 70
CHANNELS = HEADS * HEAD_DIM


@pytest.fixture
def calls(make_diagonal) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    diag, d = make_diagonal(HEADS, MODES, dtype=torch.float32)
    q, k, v = (torch.randn(2, CHANNELS, LENGTH) for _ in range(3))
    shift, d_k = torch.randn(CHANNELS, TAPS), torch.randn(CHANNELS)
    ids, documents = (torch.arange(LENGTH) // 27).int().expand(2, -1), torch.zeros(2, dtype=torch.int32)
    state = H3State(torch.randn(2, CHANNELS, TAPS - 1), torch.randn(2, HEADS, HEAD_DIM**2, MODES, 2), documents)
    diag_state = DiagState(torch.randn(2, CHANNELS, MODES, 2), documents)
    mix: dict[str, Any] = {"d_k": d_k, "d": d, "head_dim": HEAD_DIM}
    before: dict[str, Any] = {"document_ids": ids, "before_ids": torch.zeros(2, TAPS - 1, dtype=torch.int32)}
    taps = torch.randn(CHANNELS, LENGTH)

    def states(pair) -> tuple[Tensor, ...]:
        return pair[0], *vars(pair[1]).values()

    def h3_slice() -> tuple[Tensor, ...]:
        y, end, passed = h3_sequence.h3_mix_local(q, k, v, shift, diag, **mix, before_k=state.shift, **before)
        incoming = h3_sequence.combine(end[None], passed[None], state.diag)[0]
        return y, end, passed, h3_sequence.h3_mix_correct(y, q, diag, incoming, head_dim=HEAD_DIM, **before)

    def diag_slice() -> tuple[Tensor, ...]:
        y, end, passed = diag_sequence.diag_ssm_local(k, diag, d=d, document_ids=ids, before=documents)
        incoming = diag_sequence.combine(end[None], passed[None], diag_state.modes)[0]
        return y, end, passed, diag_sequence.diag_ssm_correct(y, diag, incoming, document_ids=ids, before=documents)

    return {
        "h3_mix": lambda: states(h3_mix(q, k, v, shift, diag, **mix, document_ids=ids, state=state)),
        "h3_mix_step": lambda: states(h3_mix_step(q[..., 0], k[..., 0], v[..., 0], shift, diag, **mix, state=state)),
        "diag_ssm": lambda: states(diag_ssm(k, diag, d=d, document_ids=ids, state=diag_state)),
        "diag_ssm_step": lambda: states(diag_ssm_step(k[..., 0], diag, d=d, state=diag_state)),
        "h3 slices": h3_slice,
        "diag slices": diag_slice,
        "long_conv": lambda: (long_conv(v, taps, d=d_k, pre_gate=k, post_gate=q),),
    }


OPERATIONS = ("h3_mix", "h3_mix_step", "diag_ssm", "diag_ssm_step", "h3 slices", "diag slices", "long_conv")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_autocast_changes_nothing(operation, calls):
    wanted = calls[operation]()
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.randn(2, 2) @ torch.randn(2, 2)).dtype == torch.bfloat16, "autocast is on"
        got = calls[operation]()
    for value, want in zip(got, wanted, strict=True):
        assert value.dtype == want.dtype
        assert torch.equal(value, want)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_turns_it_off(operation, calls, monkeypatch):
    """Also those in which no product would be rounded today."""
    entered = []
    enter = torch.autocast.__enter__

    def count(self):
        entered.append(self._enabled)
        return enter(self)

    monkeypatch.setattr(torch.autocast, "__enter__", count)
    calls[operation]()
    assert entered
    assert not any(entered)
    assert backend.own_precision(torch.zeros(1)).device == "cpu"
