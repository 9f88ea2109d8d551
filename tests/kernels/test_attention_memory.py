"""Memory of attention on the CPU: linear in length, counted from torch's own allocations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from potamos.kernels.attention import (
    Bias,
    BlockLayout,
    Disentangled,
    Mask,
    Toeplitz,
    alibi_slopes,
    attention,
    attention_reference,
    deberta_rows,
)
from potamos.kernels.dropout import DropoutKey

HEADS, DIM = 2, 16
MEGABYTE = 2**20


def peak(run: Callable[[], object]) -> int:
    """The most bytes that were allocated at once during `run` beyond those before it, those inside operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    results: Any = record.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def test_the_count_sees_what_operators_allocate_inside():
    """And torch's fused attention does write the scores out where values have another width: no case for it."""
    x = torch.randn(1, 1, 1024, 16)

    def fused(width: int) -> int:
        return peak(lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x[..., :width]))

    assert 4 * MEGABYTE <= peak(lambda: torch.empty(MEGABYTE)) < 4.1 * MEGABYTE
    assert fused(16) < MEGABYTE
    assert fused(5) >= 1024 * 1024 * 4


def problem(length: int, name: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    q, k, v = (torch.randn(1, HEADS, length, DIM, requires_grad=True) for _ in range(3))
    documents = (torch.arange(length, dtype=torch.int32) // 300)[None]
    rows, least = deberta_rows(16)
    tables = [torch.randn(HEADS, 32, DIM, requires_grad=True) for _ in range(2)]
    learned = torch.randn(HEADS, 64, requires_grad=True)
    cases: dict[str, tuple[Mask, Bias | None, tuple[Tensor, ...]]] = {
        "plain": (Mask(), None, ()),
        "documents": (Mask(query_documents=documents, key_documents=documents), None, ()),
        "both directions": (Mask(causal=False, window=length // 2), None, ()),
        "layout": (
            Mask(layout=BlockLayout.from_dense(torch.rand(HEADS, length // 64, length // 64) < 0.3, 64)), None, ()
        ),
        "slopes": (Mask(), Toeplitz(alibi_slopes(HEADS)), ()),
        "table": (Mask(), Toeplitz(table=learned), (learned,)),
        "disentangled": (Mask(causal=False), Disentangled(tables[0], tables[1], rows, least), tuple(tables)),
        "dropout": (Mask(), None, ()),
    }  # fmt: skip
    mask, bias, extra = cases[name]
    drop = 0.1 if name == "dropout" else 0.0
    key = DropoutKey(0, "attention", 0, 0, torch.arange(1))

    def call(form: Callable = attention) -> Tensor:
        return form(q, k, v, mask=mask, bias=bias, dropout=drop, dropout_key=key)

    return call, (q, k, v, *extra)


def both_ways(length: int, name: str, form: Callable = attention) -> int:
    call, wrt = problem(length, name)

    def run() -> None:
        out = call(form)
        out = out if isinstance(out, Tensor) else out[0]
        torch.autograd.grad(out.sum(), wrt)

    return peak(run)


@pytest.mark.parametrize(
    "name", ["plain", "documents", "both directions", "layout", "slopes", "table", "disentangled", "dropout"]
)
def test_memory_is_linear_in_length(name):
    """Forward and backward together, four times the length: at most four times the memory, far below L x L scores."""
    short, long = 512, 2048
    small, large = both_ways(short, name), both_ways(long, name)
    scores = HEADS * long * long * 4
    assert large <= 4.2 * small, f"{small / MEGABYTE:.1f} MiB at {short}, {large / MEGABYTE:.1f} MiB at {long}"
    assert large <= scores / 4, f"{large / MEGABYTE:.1f} MiB, the scores have {scores / MEGABYTE:.0f}"


def test_the_definition_fails_the_same_limits():
    """Planted: it writes the scores out."""
    small, large = both_ways(512, "plain", attention_reference), both_ways(2048, "plain", attention_reference)
    assert large > 8 * small
    assert large > HEADS * 2048 * 2048 * 4


def test_what_is_kept_for_backward():
    """The inputs, the output and the log-sum-exp."""
    call, (q, *_) = problem(1024, "documents")
    kept = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    assert kept == 4 * q.nbytes + q[..., 0].nbytes
