"""Attention through its public function, forward and backward, on whatever hypothesis thinks of: masks together,
biases, head dimensions, groups, lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels.attention import (
    BlockLayout,
    Blocks,
    Disentangled,
    Mask,
    Toeplitz,
    alibi_slopes,
    attention,
    attention_reference,
    deberta_rows,
)
from potamos.kernels.dropout import DropoutKey

pytest.importorskip("hypothesis")  # a bare GPU image has none
from hypothesis import given, settings
from hypothesis import strategies as st


def draw_mask(draw: Any, batch: int, heads: int, queries: int, keys: int) -> Mask:
    options: dict[str, Any] = {"causal": draw(st.booleans()), "query_offset": draw(st.sampled_from([0, 7, 40]))}
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 50))
    if draw(st.booleans()):
        options["blocks"] = Blocks(draw(st.sampled_from([5, 16, 24])), behind=1, ahead=1, shift=draw(st.integers(0, 4)))
        options["first"] = draw(st.integers(0, 3))
        if draw(st.booleans()):
            for name, count in (("query_positions", queries), ("key_positions", keys)):
                options[name] = (torch.arange(count) % 19).expand(batch, -1).to(torch.int32).contiguous()
    if draw(st.booleans()):
        options["prefix"] = torch.randint(0, keys + 1, (batch,)) if draw(st.booleans()) else draw(st.integers(0, keys))
    if draw(st.booleans()):
        for name, count in (("query_documents", queries), ("key_documents", keys)):
            options[name] = torch.randint(-1, 3, (batch, count)).sort(1).values.to(torch.int32)
    if draw(st.booleans()):
        shape = (heads, -(-(queries + options["query_offset"]) // 16), -(-keys // 16))
        options["layout"] = BlockLayout.from_dense(torch.rand(shape) < 0.6, 16)
    return Mask(**options)


def draw_bias(draw: Any, heads: int, dim: int) -> tuple[Any, dict[str, Tensor]]:
    """A function from leaves to the bias, and the leaves."""
    kind = draw(st.sampled_from(["none", "slopes", "table", "content", "position", "both"]))
    if kind == "none":
        return (lambda _: None), {}
    if kind == "slopes":
        return (lambda _: Toeplitz(alibi_slopes(heads).to(torch.get_default_device()))), {}
    if kind == "table":
        least = draw(st.integers(-30, 10))
        return (lambda x: Toeplitz(table=x["table"], least=least)), {"table": torch.randn(heads, 23)}
    rows, least = deberta_rows(8, 8, 24) if draw(st.booleans()) else deberta_rows(9)
    rows = rows.to(torch.get_default_device())
    names = {"content": ["keys"], "position": ["queries"], "both": ["keys", "queries"]}[kind]
    leaves = {name: torch.randn(heads, int(rows.max()) + 1, dim) for name in names}
    return (lambda x: Disentangled(x.get("keys"), x.get("queries"), rows, least)), leaves


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_whatever_is_asked_is_the_definition(data: Any) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, group, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    queries, keys, dim = draw(st.integers(1, 70)), draw(st.integers(1, 70)), draw(st.sampled_from([16, 24, 40, 64]))
    heads = group * kv_heads
    mask = draw_mask(draw, batch, heads, queries, keys)
    make_bias, leaves = draw_bias(draw, heads, dim)
    leaves |= {"q": torch.randn(batch, heads, queries, dim), "k": torch.randn(batch, kv_heads, keys, dim)}
    leaves["v"] = torch.randn(batch, kv_heads, keys, dim)
    dropout = draw(st.sampled_from([0.0, 0.3]))
    rest: dict[str, Any] = {"mask": mask, "scale": 0.3, "dropout": dropout, "head_offset": 3}
    rest["dropout_key"] = DropoutKey(1, "attention", 2, 3, torch.arange(batch)) if dropout else None
    weight, tilt = torch.randn(batch, heads, queries, dim), torch.randn(batch, heads, queries)

    def run(dtype: torch.dtype, **backend: Any) -> dict[str, Tensor]:
        x = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
        form: Any = attention if backend else attention_reference
        out, lse = form(x["q"], x["k"], x["v"], bias=make_bias(x), **rest, **backend)
        loss = (out * weight).sum() + torch.where(lse.isfinite(), lse * tilt, 0).sum()
        found = torch.autograd.grad(loss, list(x.values()), allow_unused=True)
        return {"out": out, "lse": lse, **dict(zip(x, found, strict=True))}

    want, got = run(torch.float64), run(torch.float32, backend="triton", return_lse=True)
    for name, value in want.items():
        if value is None:
            continue
        finite = value.isfinite()
        assert torch.equal(finite, got[name].isfinite()), name
        scale = max(value[finite].square().mean().sqrt().item() if finite.any() else 0.0, 1e-3)
        error = (got[name].double() - value)[finite].square().mean().sqrt().item() if finite.any() else 0.0
        assert error <= 1e-5 * scale, f"{name}: {error:.1e} beside {scale:.1e}"
