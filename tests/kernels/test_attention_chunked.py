"""The chunked form against the definition: every mask with every bias, every gradient, every precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
)
from potamos.kernels.attention.biases import bias_values, resolve_bias
from potamos.kernels.dropout import DropoutKey

BATCH, HEADS, DIM = 2, 4, 8
ROW = 64  # columns that masks with tensors describe; calls take queries and keys out of them


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


PACKED = ids([3] * 10 + [4] * 20 + [9] * 27 + [-1] * 7, [7] * 33 + [8] * 31)
RETURNING = torch.randint(-1, 3, (BATCH, ROW), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
RESTARTING = torch.stack([torch.arange(ROW) % 23, torch.arange(ROW) % 31]).int()
PADDED = ids([0] * 50 + [-1] * 14, [-1] * 5 + [0] * 59)
LAYOUT = torch.rand(HEADS, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.4
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "later keys": {"key_offset": 30},
    "window": {"window": 9},
    "both-sided window": {"window": 9, "causal": False},
    "prefix": {"prefix": 13},
    "prefix per row and window": {"prefix": torch.tensor([4, 30]), "window": 6},
    "documents": {"documents": PACKED},
    "returning documents, both directions": {"documents": RETURNING, "causal": False},
    "padding": {"documents": PADDED, "causal": False},
    "blockwise causal": {"blocks": Blocks(8, 1)},
    "shifted blocks of documents": {
        "blocks": Blocks(8, 1, 1, shift=4), "documents": PACKED, "positions": RESTARTING, "causal": False
    },
    "global tokens": {"window": 5, "first": 3, "causal": False},
    "layout": {"layout": BlockLayout.from_dense(LAYOUT[:1], 8), "causal": False},
    "layout per head, causal": {"layout": BlockLayout.from_dense(LAYOUT, 8)},
    "everything": {
        "window": 20, "blocks": Blocks(16, 1), "first": 2, "prefix": 5, "documents": RETURNING,
        "positions": RESTARTING, "layout": BlockLayout.from_dense(LAYOUT | torch.eye(8, dtype=torch.bool), 8),
    },
}  # fmt: skip
BIASES = ("none", "slopes", "table", "content", "position", "disentangled", "buckets")


def make_mask(spec: dict[str, Any], queries: int, keys: int, query_offset: int = 0) -> Mask:
    """A mask of MASKS for these lengths."""
    rest = {name: value for name, value in spec.items() if name not in ("documents", "positions")}
    key_offset = rest.get("key_offset", 0)
    for name in ("documents", "positions"):
        if name in spec:
            rest[f"query_{name}"] = spec[name][:, query_offset : query_offset + queries]
            rest[f"key_{name}"] = spec[name][:, key_offset : key_offset + keys]
    return Mask(query_offset=query_offset, **rest)


def make_bias(name: str, heads: int = HEADS, dtype=torch.float64) -> tuple[Bias | None, tuple[Tensor, ...]]:
    """A bias and its tensors that take gradients."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

    if name == "none":
        return None, ()
    if name == "slopes":
        return Toeplitz(alibi_slopes(heads).double()), ()
    if name == "table":
        table = leaf(heads, 15)
        return Toeplitz(table=table, least=-4), (table,)
    rows, least = deberta_rows(8, 8, 24) if name == "buckets" else deberta_rows(8)
    keys, queries = leaf(heads, 16, DIM), leaf(heads, 16, DIM)
    own = {"content": (keys, None), "position": (None, queries)}.get(name, (keys, queries))
    return Disentangled(own[0], own[1], rows, least), tuple(x for x in own if x is not None)


def make_inputs(queries: int, keys: int, heads=HEADS, kv_heads=HEADS, value_dim=DIM, dtype=torch.float64) -> Any:
    shapes = ((heads, queries, DIM), (kv_heads, keys, DIM), (kv_heads, keys, value_dim))
    return tuple(torch.randn(BATCH, *s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    """Many tiles in short rows, ragged at both ends, and nothing small enough for another form."""
    monkeypatch.setattr(chunked, "TILE_Q", 16)
    monkeypatch.setattr(chunked, "TILE_K", 8)
    monkeypatch.setattr(dispatch, "MASK_PAIRS", 0)


def draw_weights(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse))  # type: ignore


def evaluate(result: tuple[Tensor, Tensor], wrt: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """out, lse where it is finite, and the gradients of a random sum of both."""
    out, lse = result
    seen = lse.isfinite()
    assert torch.equal(~seen, lse == -math.inf)
    assert not out.detach()[~seen].any()
    for_out, for_lse = draw_weights(out, lse)
    finite = torch.where(seen, lse, 0)
    gradients = torch.autograd.grad((out.double() * for_out).sum() + (finite.double() * for_lse).sum(), wrt)
    return {"out": out, "lse": finite} | {f"gradient {i}": g for i, g in enumerate(gradients)}


def check(ours: dict[str, Tensor], theirs: dict[str, Tensor], assert_close: Callable, tolerance: float = 1e-10) -> None:
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert_close(ours[name], want, tolerance, name)


def check_degenerate(ours: dict[str, Tensor], theirs: dict[str, Tensor], assert_close: Callable) -> None:
    """Where a query sees one key at most, gradients are zero but for rounding: no relative error there."""
    vanishing = [name for name, x in theirs.items() if x.detach().square().mean().sqrt() < 1e-8]
    for name in vanishing:
        assert ours[name].shape == theirs[name].shape
        assert ours[name].detach().abs().max() < 1e-8, name
    rest = theirs.keys() - vanishing
    check({name: ours[name] for name in rest}, {name: theirs[name] for name in rest}, assert_close)


@pytest.mark.parametrize("bias_name", BIASES)
@pytest.mark.parametrize("mask_name", MASKS)
def test_every_mask_with_every_bias(mask_name, bias_name, assert_close):
    queries, keys = (43, 53) if "key_offset" not in MASKS[mask_name] else (50, 21)
    mask = make_mask(MASKS[mask_name], queries, keys, query_offset=7)
    inputs = make_inputs(queries, keys, kv_heads=2, value_dim=5)
    bias, extra = make_bias(bias_name)
    want = attention_reference(*inputs, mask=mask, bias=bias)
    assert attention(*inputs, mask=mask, bias=bias, return_lse=True, explain=True).form == "chunked"
    got = attention(*inputs, mask=mask, bias=bias, return_lse=True)
    check(evaluate(got, inputs + extra), evaluate(want, inputs + extra), assert_close)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("bias_name", ["none", "table", "disentangled"])
def test_dropout_and_shared_heads(bias_name, heads, assert_close):
    mask = make_mask(MASKS["documents"], 37, 41, query_offset=5)
    inputs = make_inputs(37, 41, *heads)
    bias, extra = make_bias(bias_name, heads[0])
    key = DropoutKey(1, "attention", 2, 3, torch.tensor([5, 2**40]))
    arguments = {"mask": mask, "bias": bias, "dropout": 0.3, "dropout_key": key, "head_offset": 3, "scale": 0.7}
    want = evaluate(attention_reference(*inputs, **arguments), inputs + extra)
    check(evaluate(attention(*inputs, **arguments, return_lse=True), inputs + extra), want, assert_close)
    without = evaluate(attention_reference(*inputs, mask=mask, bias=bias, scale=0.7), inputs + extra)
    with pytest.raises(AssertionError, match="relative rms error"):
        check(without, want, assert_close)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 50), (50, 1), (2, 3), (16, 8), (17, 33), (15, 64)], ids=str)
def test_lengths(lengths, assert_close):
    inputs = make_inputs(*lengths, kv_heads=2)
    bias, extra = make_bias("disentangled")
    for mask in (Mask(query_offset=lengths[1]), Mask(causal=False, window=4), make_mask(MASKS["layout"], *lengths)):
        want = attention_reference(*inputs, mask=mask, bias=bias)
        got = attention(*inputs, mask=mask, bias=bias, return_lse=True)
        check_degenerate(evaluate(got, inputs + extra), evaluate(want, inputs + extra), assert_close)


def test_gradcheck(monkeypatch):
    """Finite differences, which know nothing of the reference; with a lse that is used alone."""
    monkeypatch.setattr(chunked, "TILE_Q", 4)
    monkeypatch.setattr(chunked, "TILE_K", 3)
    inputs = make_inputs(5, 6, heads=2, kv_heads=1)
    bias, extra = make_bias("disentangled", 2)
    assert isinstance(bias, Disentangled)
    mask = Mask(query_offset=2, window=4)

    def call(q, k, v, *tables):
        own = replace(bias, position_keys=tables[0], position_queries=tables[1])
        return attention(q, k, v, mask=mask, bias=own, return_lse=True)

    assert torch.autograd.gradcheck(call, inputs + extra, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: call(*x)[1], inputs + extra, fast_mode=True)
    table = make_bias("table", 2)[1]

    def with_table(q, k, v, table):
        return attention(q, k, v, mask=mask, bias=Toeplitz(table=table, least=-4))

    assert torch.autograd.gradcheck(with_table, inputs + table, fast_mode=True)


def test_work_is_proportional_to_what_is_visible(monkeypatch):
    """Scores that are computed, of 64 x 64 pairs a sample and head, in tiles of 16 x 8."""
    computed, scores = [], chunked._scores

    def count(query: Tensor, key: Tensor, tile: Any) -> Tensor:
        computed.append(scores(query, key, tile))
        return computed[-1]

    monkeypatch.setattr(chunked, "_scores", count)
    apart = torch.arange(ROW).expand(BATCH, -1).int() // 16
    other = torch.zeros_like(apart)
    other[0] = apart[0]
    eye = torch.eye(8, dtype=torch.bool).expand(HEADS, -1, -1).clone()
    eye[0] = True
    for spec, share in (
        ({"causal": False}, 1.0),
        ({}, 0.625),  # of 8 columns of tiles 2, 4, 6 and 8
        ({"window": 8}, 0.375 - 2 / 64),  # 2, 3, 3 and 3
        ({"documents": apart, "causal": False}, 0.25),
        ({"documents": other, "causal": False}, (0.25 + 1) / 2),  # sample by sample
        ({"layout": BlockLayout.from_dense(eye, 8), "causal": False}, (1 + 3 * 0.25) / 4),  # head by head
    ):
        computed.clear()
        attention(*make_inputs(ROW, ROW), mask=make_mask(spec, ROW, ROW), return_lse=True)
        assert sum(x.numel() for x in computed) == share * BATCH * HEADS * ROW * ROW


def test_only_wanted_gradients_are_made():
    q, k, v = make_inputs(20, 20)
    bias, (table,) = make_bias("table")
    for wanted in (q, v, table):
        for x in (q, k, v, table):
            x.requires_grad_(x is wanted)
        out = attention(q, k, v, mask=Mask(), bias=bias)
        (gradient,) = torch.autograd.grad(out.sum(), wanted)
        assert gradient.any() or wanted is not v


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Bias | None) -> Tensor:
    """What anybody would write, all in the inputs' precision."""
    scale = q.shape[3] ** -0.5
    scores = q @ k.transpose(2, 3) * scale
    if bias is not None:
        columns = torch.arange(q.shape[2])
        scores = scores + bias_values(resolve_bias(bias, q, k, scale), columns, columns, q.dtype)
    hidden = ~mask.visible(q.shape[2], k.shape[2], q.device)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias_name", ["none", "slopes", "table", "disentangled"])
def test_precisions(bias_name, dtype, assert_close):
    """Close to fp64, and not much further from it than plain torch in the same precision."""
    inputs = make_inputs(60, 60, dtype=dtype)
    bias, extra = make_bias(bias_name, dtype=dtype)
    wide = tuple(x.detach().double().requires_grad_() for x in inputs + extra)
    wide_bias = bias
    if isinstance(bias, Disentangled):
        wide_bias = replace(bias, position_keys=wide[3], position_queries=wide[4])
    elif isinstance(bias, Toeplitz) and bias.table is not None:
        wide_bias = replace(bias, table=wide[3])
    mask = make_mask(MASKS["causal"], 60, 60)
    out = attention(*inputs, mask=mask, bias=bias)
    assert out.dtype == dtype
    assert attention(*inputs, mask=mask, bias=bias, return_lse=True)[0].dtype == torch.float32
    want = attention_reference(wide[0], wide[1], wide[2], mask=mask, bias=wide_bias)[0]
    naive = plain(inputs[0], inputs[1], inputs[2], mask, bias)
    weights = draw_weights(out, out)[0]
    results = [
        (x.detach(), *torch.autograd.grad((x.double() * weights).sum(), leaves))
        for x, leaves in ((out, inputs + extra), (want, wide), (naive, inputs + extra))
    ]
    half = dtype != torch.float32
    for i, (ours, exact, theirs) in enumerate(zip(*results, strict=True)):
        assert i == 0 or ours.dtype == dtype
        limit = (5e-3 if half else 1e-6) if i == 0 else (1e-2 if half else 1e-5)
        assert_close(ours, exact, limit, f"result {i}")
        error, naive_error = ((x.double() - exact).square().mean().sqrt() for x in (ours, theirs))
        assert error <= (2 if i == 0 else 3) * naive_error, f"result {i}: {error:.2e}, plain torch {naive_error:.2e}"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_combination(data, assert_close):
    """Random rules together, random lengths, offsets, heads, bias and dropout."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6), "seed"))
    queries, keys = draw(st.integers(2, 40), "queries"), draw(st.integers(2, 40), "keys")
    rules = {rule: draw(st.sampled_from([None, *values]), rule) for rule, values in {
        "window": [1, 7, 20], "prefix": [3, 25, torch.tensor([2, 9])], "blocks": [Blocks(5, 1, 1, 2), Blocks(16)],
        "documents": [PACKED, RETURNING], "positions": [RESTARTING],
        "layout": [MASKS["layout"]["layout"], MASKS["layout per head, causal"]["layout"]],
    }.items()}  # fmt: skip
    spec = {name: value for name, value in rules.items() if value is not None}
    spec |= {
        "causal": draw(st.booleans()),
        "first": draw(st.sampled_from([0, 4])),
        "key_offset": draw(st.integers(0, 20)),
    }
    mask = make_mask(spec, queries, keys, draw(st.integers(0, 20)))
    inputs = make_inputs(queries, keys, kv_heads=draw(st.sampled_from([4, 2, 1])), value_dim=draw(st.integers(1, 9)))
    bias, extra = make_bias(draw(st.sampled_from(BIASES)))
    drop = draw(st.sampled_from([0.0, 0.2]))
    key = DropoutKey(1, "attention", 2, 3, torch.tensor([5, 9]))
    arguments = {"mask": mask, "bias": bias, "dropout": drop, "dropout_key": key}
    got, want = attention(*inputs, **arguments, return_lse=True), attention_reference(*inputs, **arguments)
    check_degenerate(evaluate(got, inputs + extra), evaluate(want, inputs + extra), assert_close)


def _without(tile: Any, name: str) -> Any:
    return tile._replace(**{name: None})


def plant(bug: str, monkeypatch) -> None:
    """Break one thing in the chunked form."""
    calls, form, tile = chunked._Calls, chunked.forward, chunked._Calls.tile
    over_group, add = chunked._over_group, chunked._BiasGradients.add
    changes: dict[str, tuple[Any, str, Any]] = {
        "zeros": (chunked, "forward", lambda *a, **o: tuple(0 * x for x in form(*a, **o))),
        "shifted": (chunked, "forward", lambda *a, **o: tuple(x.roll(1, 2) for x in form(*a, **o))),
        "mask missing": (calls, "tile", lambda *a: _without(tile(*a), "hidden")),
        "not causal": (
            chunked, "forward",
            lambda q, k, v, t, m, *a, **o: form(q, k, v, t, replace(m, causal=False), *a, **o),
        ),
        "bias dropped": (calls, "tile", lambda *a: _without(tile(*a), "bias")),
        "one bias term dropped": (
            chunked, "forward", lambda q, k, v, t, *a, **o: form(q, k, v, t._replace(position=None), *a, **o)
        ),
        "wrong head": (chunked, "forward", lambda q, k, *a, **o: form(q, k.roll(1, 1), *a, **o)),
        "scale missing": (chunked, "forward", lambda q, k, v, t, m, s, *a, **o: form(q, k, v, t, m, 1.0, *a, **o)),
        "dropout missing": (calls, "tile", lambda *a: _without(tile(*a), "keep")),
        "lse without its gradient": (chunked, "row_delta", lambda g, out, _: (g * out).sum(-1)),
        "no delta": (chunked, "row_delta", lambda g, out, grad_lse: -grad_lse),
        "stale bias gradient": (
            chunked._BiasGradients, "add", lambda self, x, p, r, c, m: add(self, x.roll(1, 2), p, r, c, m)
        ),
        "keys' gradient of another head": (chunked, "_over_group", lambda x, y, p: over_group(x, y.roll(1, 1), p)),
    }  # fmt: skip
    monkeypatch.setattr(*changes[bug])


BUGS = (
    "zeros", "shifted", "mask missing", "not causal", "bias dropped", "one bias term dropped", "wrong head",
    "scale missing", "dropout missing", "lse without its gradient", "no delta", "stale bias gradient",
    "keys' gradient of another head",
)  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_fail(bug, monkeypatch, assert_close):
    """The comparison of every test above, at the widest tolerance of any precision."""
    mask = make_mask(MASKS["documents"], 50, 50)
    inputs = make_inputs(50, 50, kv_heads=2)
    bias, extra = make_bias("disentangled")
    key = DropoutKey(1, "attention", 2, 3, torch.tensor([5, 9]))
    arguments = {"mask": mask, "bias": bias, "dropout": 0.2, "dropout_key": key}
    want = evaluate(attention_reference(*inputs, **arguments), inputs + extra)
    check(evaluate(attention(*inputs, **arguments, return_lse=True), inputs + extra), want, assert_close)
    plant(bug, monkeypatch)
    with pytest.raises(AssertionError, match="relative rms error"):
        check(evaluate(attention(*inputs, **arguments, return_lse=True), inputs + extra), want, assert_close, 1e-2)
