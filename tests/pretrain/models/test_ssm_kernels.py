"""The state-space mixers leave their mathematics to the kernels, and the choice of the kernel's form to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels import diag_ssm, flash_conv
from potamos.pretrain.models.interfaces import Context, Seq
from potamos.pretrain.models.mixers.h3 import H3
from potamos.pretrain.models.mixers.s4d import S4D

WIDTH, LENGTH, BATCH = 8, 12, 2


class Reached(Exception):
    """The fused kernel was called; it needs a GPU, so the call ends here."""


@pytest.mark.parametrize("rule", ["bilinear", "zoh"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize(("mixer", "kernel"), [(S4D, diag_ssm), (H3, flash_conv)])
def test_auto_takes_every_forward_to_the_fused_kernel(mixer, kernel, carried, documents, rule, monkeypatch):
    """As on a CUDA device: with and without documents and a carried state, under both rules; the state that the torch
    form returned is taken on. Channels come as rows of memory, as the kernel wants them."""
    region = mixer(mixer.Options(state=4, rule=rule), Context(width=WIDTH, layers=1))
    with torch.no_grad():
        for parameter in region.parameters():
            parameter.uniform_(-0.5, 0.5)
    ids = torch.arange(LENGTH, dtype=torch.int32).div(5, rounding_mode="floor").expand(BATCH, -1)
    seq = Seq(torch.arange(LENGTH).expand(BATCH, -1), ids if documents else None)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    state = region(x, seq).state if carried else None
    wishes: list[str] = []

    def as_on_cuda(backend: str, operation: str, inputs: Tensor, *, obstacle: str | None = None) -> str:
        wishes.append(backend)
        assert obstacle is None
        return "triton"

    def fused(q, k, v, shift_taps, diag, d, *, document_ids, carried_document, initial, history) -> Any:
        assert v.shape == (WIDTH, BATCH, LENGTH)
        assert v.stride(2) == 1
        assert (document_ids is None) == (not documents)
        assert (initial is None) == (carried_document is None) == (not carried)
        assert diag.rule == rule
        raise Reached

    monkeypatch.setattr(kernel, "resolve_backend", as_on_cuda)
    monkeypatch.setattr(kernel, "fused_mix", fused)
    with pytest.raises(Reached):
        region(x, seq, state)
    assert wishes == ["auto"]
