"""What attention is timed on, by the Triton kernels: each case runs, and computes what its peers compute."""

from __future__ import annotations

import os

import pytest
import torch

from potamos.kernels.bench_attention_cases import AttentionCell, forms

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.mark.parametrize("case", ["plain", "documents", "deberta", "alibi", "table", "decode", "rotary"])
def test_the_forms_of_a_case_compute_one_thing(case, assert_close):
    causal, kv_heads = case != "deberta", 1 if case == "decode" else 2
    cell = AttentionCell.of(case, 16, 70, causal=causal, rows=1, heads=2, kv_heads=kv_heads)
    # On a GPU torch's kernels take 16-bit inputs alone.
    dtype, tolerance, wide = (torch.float32, 1e-5, 1e-5) if INTERPRETED else (torch.float16, 5e-3, 1e-2)
    found = forms(cell, DEVICE, dtype, "auto" if case == "rotary" and INTERPRETED else "triton")
    (_, first), *others = found.items()
    want = first.compare(first.run())
    compared = 0
    for name, other in others:
        if "cudnn" in name or name == "in place":
            continue
        got = other.compare(other.run())
        assert_close(got, want, tolerance, name)
        with pytest.raises(AssertionError, match="relative rms"):
            assert_close(got.roll(1, -1), want, tolerance, name)
        compared += 1
        if case not in ("documents", "decode"):
            grad = torch.randn_like(want)
            ours, theirs = (torch.autograd.grad(form.run(), form.leaves, grad) for form in (first, other))
            for x, y in zip(ours, theirs, strict=case != "table"):  # in memory, the table takes no gradient
                assert_close(y, x, wide, name)
    assert compared == 1
