"""Pieces of a call: one query against a cache, and parts of the keys whose results and gradients are joined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels.attention import (
    Bias,
    BlockLayout,
    Blocks,
    Disentangled,
    Mask,
    Toeplitz,
    alibi_slopes,
    attention,
    attention_reference,
    chunked,
    deberta_rows,
    dispatch,
    merge,
)
from potamos.kernels.attention.biases import BiasTerms
from potamos.kernels.dropout import DropoutKey

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 33, 8
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 20 + [-1] * 4, [5] * 12 + [6] * 10 + [5] * 11], dtype=torch.int32)
POSITIONS = torch.stack([torch.arange(LENGTH) % 9, torch.arange(LENGTH) % 12]).int()
LAYOUT = BlockLayout.from_dense(torch.rand(HEADS, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5, 8)
RULES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 6},
    "prefix": {"prefix": 7},
    "prefix per row and window": {"prefix": torch.tensor([3, 20]), "window": 4},
    "documents": {"documents": DOCUMENTS},
    "blocks": {"blocks": Blocks(8, 1)},
    "blocks of documents": {"blocks": Blocks(4, 1), "documents": DOCUMENTS, "positions": POSITIONS},
    "global tokens": {"window": 5, "first": 2},
    "layout": {"layout": LAYOUT},
}


def make_mask(rules: dict[str, Any], queries: slice, keys: slice) -> Mask:
    """The mask of a part of the rows and columns."""
    rest = {name: value for name, value in rules.items() if name not in ("documents", "positions")}
    for name in ("documents", "positions"):
        if name in rules:
            rest[f"query_{name}"], rest[f"key_{name}"] = rules[name][:, queries], rules[name][:, keys]
    return Mask(query_offset=queries.start, key_offset=keys.start, **rest)


def make_bias(name: str) -> Bias | None:
    rows, least = deberta_rows(8, 8, 20)
    tables = (torch.randn(HEADS, 16, DIM, dtype=torch.float64) for _ in range(2))
    return {
        "none": None,
        "slopes": Toeplitz(alibi_slopes(HEADS).double()),
        "table": Toeplitz(table=torch.randn(HEADS, 11, dtype=torch.float64), least=-3),
        "disentangled": Disentangled(*tables, rows, least),  # type: ignore[call-arg]
    }[name]


@pytest.fixture(params=["in memory", "chunked"])
def form(request, monkeypatch) -> str:
    if request.param == "chunked":
        monkeypatch.setattr(dispatch, "MASK_PAIRS", 0)
        monkeypatch.setattr(chunked, "TILE_Q", 4)
        monkeypatch.setattr(chunked, "TILE_K", 5)
    return request.param


@pytest.mark.parametrize("bias_name", ["none", "slopes", "table", "disentangled"])
@pytest.mark.parametrize("name", RULES)
def test_one_query_against_a_cache_is_its_row(name, bias_name, form, assert_close):
    """Row by row: a causal row sees the cache so far, one of a mask in both directions all of it."""
    q, k, v = (torch.randn(BATCH, h, LENGTH, DIM, dtype=torch.float64) for h in (HEADS, KV_HEADS, KV_HEADS))
    bias, rules = make_bias(bias_name), RULES[name]
    everything = slice(0, LENGTH)
    want = attention_reference(q, k, v, mask=make_mask(rules, everything, everything), bias=bias)[0]
    # A prefix is seen before it is reached: its keys must be there.
    ahead = 20 if "prefix" in rules else LENGTH if not rules.get("causal", True) else 0
    rows = []
    for i in range(LENGTH):
        keys = slice(0, max(i + 1, ahead))
        mask = make_mask(rules, slice(i, i + 1), keys)
        rows.append(attention(q[:, :, i : i + 1], k[:, :, keys], v[:, :, keys], mask=mask, bias=bias))
    assert_close(torch.cat(rows, 2), want, 1e-10)
    with pytest.raises(AssertionError, match="relative rms error"):
        assert_close(torch.cat(rows[1:] + rows[:1], 2), want, 1e-2)


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("bias_name", ["none", "slopes", "table", "disentangled"])
@pytest.mark.parametrize("name", RULES)
def test_parts_of_the_keys_merge(name, bias_name, drop, assert_close):
    """Three shards of the keys, one of which nobody may see, give the output, the log-sum-exp and the gradients."""
    leaves = [torch.randn(BATCH, h, LENGTH, DIM, dtype=torch.float64) for h in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (x.requires_grad_() for x in leaves)
    bias, rules = make_bias(bias_name), RULES[name]
    rows = slice(0, 25)
    key = DropoutKey(1, "attention", 2, 3, torch.tensor([5, 9]))
    more = {"dropout": drop, "dropout_key": key}
    whole = attention_reference(q[:, :, rows], k, v, mask=make_mask(rules, rows, slice(0, LENGTH)), bias=bias, **more)
    parts = []
    for keys in (slice(0, 11), slice(11, 14), slice(14, LENGTH)):
        mask = make_mask(rules, rows, keys)
        parts.append(
            attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask=mask, bias=bias, return_lse=True, **more)
        )
    out, lse = merge(*zip(*parts, strict=True))
    seen = whole[1].isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert not out[~seen].any()
    assert_close(out, whole[0], 1e-10, "out")
    assert_close(lse[seen], whole[1][seen], 1e-10, "lse")
    for_out, for_lse = torch.randn_like(out), torch.randn_like(lse)
    results = []
    for o, s in ((out, lse), whole):
        total = (o * for_out).sum() + (torch.where(seen, s, 0) * for_lse).sum()
        results.append(torch.autograd.grad(total, (q, k, v)))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, 1e-10, "gradient")


def test_backward_of_a_part_takes_the_merged_result(assert_close):
    """What a ring of ranks does: each part's gradients from the merged output and log-sum-exp add up to the whole."""
    q, k, v = (torch.randn(BATCH, h, LENGTH, DIM, dtype=torch.float64) for h in (HEADS, KV_HEADS, KV_HEADS))
    rules = RULES["documents"]
    everything = slice(0, LENGTH)
    leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))
    want, lse = attention_reference(*leaves, mask=make_mask(rules, everything, everything))  # type: ignore[misc]
    upper = torch.randn_like(want)
    gradients = torch.autograd.grad((want * upper).sum(), leaves)
    total = torch.zeros_like(q)
    for keys in (slice(0, 15), slice(15, LENGTH)):
        grad_q, *rest = chunked.backward(
            upper, None, q, k[:, :, keys], v[:, :, keys], want.detach(), lse.detach(), BiasTerms(),
            make_mask(rules, everything, keys), DIM**-0.5, None, (True, True, True, False, False, False),
        )[:3]  # fmt: skip
        assert isinstance(grad_q, Tensor)
        total += grad_q
        for ours, theirs in zip(rest, gradients[1:], strict=True):
            assert isinstance(ours, Tensor)
            assert_close(ours, theirs[:, :, keys], 1e-10, "keys or values")
    assert_close(total, gradients[0], 1e-10, "queries")


def test_merge_refuses_what_it_cannot_join():
    out, lse = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="got 2 and 1"):
        merge([out, out], [lse])
    with pytest.raises(ValueError, match="at least one"):
        merge([], [])
    with pytest.raises(ValueError, match="bfloat16"):
        merge([out.bfloat16()], [lse])


def test_merge_fails_on_planted_bugs(assert_close):
    """A mean instead of the weights, a part left out, weights of the wrong part."""
    q, k, v = (torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=torch.float64) for _ in range(3))
    want = attention_reference(q, k, v, mask=Mask())[0]
    parts = [
        attention(q, k[:, :, keys], v[:, :, keys], mask=replace(Mask(), key_offset=keys.start), return_lse=True)
        for keys in (slice(0, 15), slice(15, LENGTH))
    ]
    (a, b), (s, t) = zip(*parts, strict=True)
    assert_close(merge([a, b], [s, t])[0], want, 1e-10)
    for wrong in ((a + b) / 2, merge([a], [s])[0], merge([a, b], [t, s])[0]):
        with pytest.raises(AssertionError, match="relative rms error"):
            assert_close(wrong, want, 1e-2)
