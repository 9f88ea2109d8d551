"""Attention as torch.library and torch.compile see it: one node, the eager results, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from potamos.kernels import backend as backend_module
from potamos.kernels.attention import (
    BlockLayout,
    Blocks,
    Disentangled,
    Mask,
    Rotary,
    Toeplitz,
    alibi_slopes,
    attention,
    deberta_rows,
    dispatch,
    rotary_frequencies,
)
from potamos.kernels.attention.biases import BiasTerms, resolve_bias
from potamos.kernels.attention.function import Drop
from potamos.kernels.attention.library import backward_operation, flatten, operation, restore
from potamos.kernels.dropout import DropoutKey

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 37, 8
SCALE = 0.3
IDS = (torch.arange(LENGTH) // 15).to(torch.int32).expand(BATCH, LENGTH).contiguous()
POSITIONS = (torch.arange(LENGTH) % 15).to(torch.int32).expand(BATCH, LENGTH).contiguous()
KEY = DropoutKey(7, "attention", 3, 1, torch.tensor([5, 900], dtype=torch.int64))


def layout() -> BlockLayout:
    visible = torch.tensor([[[1, 0, 0], [1, 1, 0], [0, 1, 1]]], dtype=torch.bool)
    return BlockLayout.from_dense(visible, 16)


MASKS = {
    "causal": lambda: Mask(),
    "everything": lambda: Mask(causal=False),
    "documents": lambda: Mask(query_documents=IDS, key_documents=IDS),
    "window": lambda: Mask(window=5, first=2),
    "prefix": lambda: Mask(prefix=torch.tensor([4, 9], dtype=torch.int32)),
    "prefix number": lambda: Mask(prefix=6, window=3),
    "blocks": lambda: Mask(blocks=Blocks(4, behind=1, shift=2), query_positions=POSITIONS, key_positions=POSITIONS),
    "layout": lambda: Mask(layout=layout()),
    "offset": lambda: Mask(window=9, query_offset=3, key_offset=2),
}


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


class Case:
    """Leaves and descriptions of one call; q in the memory order of a projection."""

    def __init__(self, mask: Mask, bias: str = "", *, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        self.q = leaf(BATCH, LENGTH, HEADS, DIM, dtype=dtype).detach().transpose(1, 2).requires_grad_()
        self.k, self.v = (leaf(BATCH, KV_HEADS, LENGTH, DIM, dtype=dtype) for _ in range(2))
        self.mask, self.dropout = mask, dropout
        self.leaves, self.bias = [self.q, self.k, self.v], None
        if bias == "slopes":
            self.bias = Toeplitz(slopes=alibi_slopes(HEADS))
        elif bias == "table":
            table = leaf(HEADS, 9)
            self.bias = Toeplitz(table=table, least=-3)
            self.leaves.append(table)
        elif bias == "disentangled":
            rows, least = deberta_rows(4, 4, 12)
            keys, queries = (leaf(HEADS, 8, DIM, dtype=dtype) for _ in range(2))
            self.bias = Disentangled(keys, queries, rows, least)
            self.leaves += [keys, queries]

    def __call__(self) -> tuple[Tensor, Tensor]:
        key = KEY if self.dropout else None
        return attention(
            self.q, self.k, self.v, mask=self.mask, bias=self.bias, scale=SCALE, dropout=self.dropout, dropout_key=key,
            head_offset=2, return_lse=True,
        )  # fmt: skip

    def gradients(self, results: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        weights = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in results)
        finite = (torch.where(x.isfinite(), x, 0) for x in results)
        total = torch.stack([(x * w).sum() for x, w in zip(finite, weights, strict=True)]).sum()
        return torch.autograd.grad(total, self.leaves)

    def flat(self) -> tuple:
        terms = resolve_bias(self.bias, self.q, self.k, SCALE)
        of_its_own = (None if x is None else x.detach().requires_grad_() for x in terms[1:4])
        terms = BiasTerms(terms.slopes, *of_its_own, rows=terms.rows, least=terms.least)
        drop = Drop(self.dropout, KEY, 2) if self.dropout else None
        tensors, options = flatten("chunked", self.q, self.k, self.v, terms, self.mask, SCALE, drop, True)
        return *tensors, *options


CASES = [(name, bias, 0.0) for name, bias in zip(MASKS, ["", "table", "disentangled", "slopes"] * 3, strict=False)]
CASES += [("causal", "disentangled", 0.2), ("documents", "table", 0.2)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("mask", "bias", "dropout"), CASES)
def test_compiled_attention_is_the_eager_one(mask, bias, dropout, assert_close):
    """fullgraph: not one graph break; output, log-sum-exp and every gradient."""
    case = Case(MASKS[mask](), bias, dropout=dropout)
    want = case()
    got = torch.compile(case, backend="aot_eager", fullgraph=True)()
    assert_close(got[0], want[0], 1e-12)
    assert torch.equal(got[1], want[1])
    for gradient, reference in zip(case.gradients(got), case.gradients(want), strict=True):
        assert_close(gradient, reference, 1e-12)
        assert gradient.stride() == reference.stride()


@pytest.mark.parametrize(("mask", "bias", "dropout"), CASES)
def test_descriptions_survive_being_flat(mask, bias, dropout):
    """Every field comes back, so none is silently dropped on the way through the operation."""
    case = Case(MASKS[mask](), bias, dropout=dropout)
    terms = resolve_bias(case.bias, case.q, case.k, SCALE)
    drop = Drop(dropout, KEY, 2) if dropout else None
    again = restore(*flatten("chunked", case.q, case.k, case.v, terms, case.mask, SCALE, drop, False))
    for got, want in zip(again, (terms, case.mask, drop), strict=True):
        _same(got, want)


def _same(got: Any, want: Any) -> None:
    if isinstance(want, Tensor) or want is None:
        assert got is want
    elif hasattr(want, "_fields") or hasattr(want, "__dataclass_fields__"):
        for name in getattr(want, "_fields", None) or want.__dataclass_fields__:
            _same(getattr(got, name), getattr(want, name))
    else:
        assert got == want


@pytest.mark.parametrize("name", ["sdpa", "sdpa in memory", "chunked"])
def test_one_node_and_plain_cases_stay_torchs(name, monkeypatch):
    """What the compiler sees: one node of ours, or torch's own attention where that is what runs."""
    monkeypatch.setattr(dispatch, "MASK_PAIRS", LENGTH**2 if name == "sdpa in memory" else 0)
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    case = Case(Mask() if name == "sdpa" else Mask(window=5))
    want = attention(case.q, case.k, case.v, mask=case.mask)
    got = torch.compile(lambda: attention(case.q, case.k, case.v, mask=case.mask), backend=backend, fullgraph=True)()
    torch.testing.assert_close(got, want)
    assert sum("potamos" in node for node in nodes) == (name == "chunked")
    assert sum("scaled_dot_product" in node for node in nodes) == (name != "chunked")


@pytest.mark.parametrize(("window", "forward"), [(None, "scaled_dot_product"), (5, "potamos.attention")])
@pytest.mark.parametrize("kv_heads", [HEADS, KV_HEADS])
def test_tracing_for_a_gpu_needs_none(window, forward, kv_heads, monkeypatch):
    """No graph break where the tensors are on CUDA: neither the capability nor torch's choice of kernels stops it."""
    for module in (backend_module, dispatch):
        monkeypatch.setattr(module, "capability", lambda device: (9, 0))
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with FakeTensorMode():
        q, k, v = (
            torch.empty(BATCH, heads, 256, 64, device="cuda:0", dtype=torch.bfloat16)
            for heads in (HEADS, kv_heads, kv_heads)
        )
        run = torch.compile(lambda: attention(q, k, v, mask=Mask(window=window)), backend=backend, fullgraph=True)
        assert run().shape == q.shape
    assert sum(forward in node for node in nodes) == 1
    assert sum("potamos" in node for node in nodes) == (window is not None)


def test_a_growing_cache_is_compiled_twice_at_most(assert_close, monkeypatch):
    """Offsets and lengths that change at every token become symbols: decoding does not compile per token."""
    compilations = 0

    def backend(graph: torch.fx.GraphModule, _: list) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    def step(q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
        return attention(q, k, v, mask=Mask(window=9, query_offset=offset), bias=Toeplitz(slopes=alibi_slopes(HEADS)))

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    monkeypatch.setattr(dispatch, "MASK_PAIRS", 0)
    with torch.no_grad():
        for length in range(20, 27):
            q, k, v = leaf(BATCH, HEADS, 1, DIM), leaf(BATCH, KV_HEADS, length, DIM), leaf(BATCH, KV_HEADS, length, DIM)
            assert_close(compiled(q, k, v, length - 1), step(q, k, v, length - 1), 1e-12)
    assert compilations <= 2


def test_dropout_of_every_step_is_one_graph(assert_close):
    """The step is a number of the graph, not a constant of it: training does not compile per step."""
    compilations = 0

    def backend(graph: torch.fx.GraphModule, _: list) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    case = Case(MASKS["causal"]())

    def run(step: int) -> Tensor:
        key = DropoutKey(7, "attention", step, 1, KEY.samples)
        return attention(case.q, case.k, case.v, mask=case.mask, dropout=0.5, dropout_key=key)

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    with torch.no_grad():
        outs = [compiled(step) for step in range(5)]
        for step, out in enumerate(outs):
            assert_close(out, run(step), 1e-12)
    assert not torch.equal(outs[3], outs[4])
    assert compilations <= 3  # 0 and 1 are constants to the compiler, then it is a symbol


def test_compiled_rotation(assert_close):
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    rotary = Rotary(rotary_frequencies(DIM), positions, positions)
    case = Case(Mask(window=5), dtype=torch.float32)

    def run() -> Tensor:
        return attention(case.q, case.k, case.v, mask=case.mask, rotary=rotary)

    got, want = torch.compile(run, backend="aot_eager", fullgraph=True)(), run()
    assert_close(got, want, 1e-6)
    pairs = (torch.autograd.grad(x.square().sum(), case.leaves) for x in (got, want))
    for gradient, reference in zip(*pairs, strict=True):
        assert_close(gradient, reference, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_low_precision(dtype):
    case = Case(Mask(window=5), dtype=dtype)
    want, got = case(), torch.compile(case, backend="aot_eager", fullgraph=True)()
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype == torch.float32
        assert torch.equal(x, y)


@pytest.mark.parametrize(("mask", "bias", "dropout"), CASES[:4] + CASES[-2:])
def test_opcheck(mask, bias, dropout):
    """torch's own checks of schema, fake implementation and autograd, with shapes that may vary."""
    case = Case(MASKS[mask](), bias, dropout=dropout)
    results = torch.library.opcheck(operation, case.flat(), test_utils=CHECKS)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_backward_operation_gives_what_tracing_was_told(needs):
    """Only what is needed, in the inputs' shapes and strides, in memory of its own."""
    case = Case(MASKS["causal"](), "table")
    flat = case.flat()
    out, lse = (x.detach() for x in operation(*flat))
    given = (torch.randn_like(out), None, out, lse, [*needs, True, False, False], *flat)
    torch.library.opcheck(backward_operation, given, test_utils=("test_schema", "test_faketensor"))
    found = backward_operation(*given)
    expected = [x for x, need in zip(flat, (*needs, True), strict=False) if need]
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert [x.stride() for x in found] == [torch.empty_like(x).stride() for x in expected]
    assert all(x.any() for x in found)


def test_a_loss_of_the_log_sum_exp_alone(assert_close):
    case = Case(MASKS["causal"]())
    compiled = torch.compile(case, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(run()[1].square().sum(), case.leaves[:2]) for run in (compiled, case))
    for gradient, reference in zip(got, want, strict=True):
        assert_close(gradient, reference, 1e-12)


def test_frozen_inputs_get_no_gradient(assert_close):
    case = Case(MASKS["window"](), "disentangled")
    case.k = case.k.detach()
    case.leaves = [x for x in (case.q, case.v, *case.leaves[3:]) if x.requires_grad]
    compiled = torch.compile(case, backend="aot_eager", fullgraph=True)
    for gradient, reference in zip(case.gradients(compiled()), case.gradients(case()), strict=True):
        assert_close(gradient, reference, 1e-12)


def test_mistakes_are_named_while_tracing():
    case = Case(MASKS["causal"]())
    case.v = case.v[:, :, 1:]
    with pytest.raises(Exception, match="shapes do not fit"):
        torch.compile(case, backend="aot_eager", fullgraph=True)()
