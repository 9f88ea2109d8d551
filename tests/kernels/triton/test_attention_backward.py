"""The backward kernels against fp64 autograd of the definition: every mask and bias, each gradient, no forward kernel.

`definition` is the reference of `potamos.kernels.attention` over bias terms in place of a bias, so that the gradient of
each term is compared by itself. Every test runs on memory that is NaN until written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels.attention import (
    BlockLayout,
    Blocks,
    Mask,
    Toeplitz,
    alibi_slopes,
    attention_reference,
    deberta_rows,
)
from potamos.kernels.attention.biases import BiasTerms, bias_values
from potamos.kernels.attention.function import Drop
from potamos.kernels.attention.triton_backward import backward
from potamos.kernels.dropout import DropoutKey, attention_keep_mask

NAMES = ("q", "k", "v", "table", "content", "position")
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def definition(
    x: dict[str, Tensor], terms: BiasTerms, mask: Mask, scale: float, drop: Drop | None, normalized: bool = True
):
    """(out, lse) of the tensors in x, plain torch in their dtype, the softmax in fp32 at least.

    normalized=False forgets, in its gradient, that the weights of a query add up to one.
    """
    q, k, v = x["q"], x["k"], x["v"]
    group, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * scale
    if not terms.empty:
        rows, others = torch.arange(queries) + mask.query_offset, torch.arange(keys) + mask.key_offset
        scores = scores + bias_values(terms, rows, others, q.dtype)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    seen = mask.visible(queries, keys, q.device)
    lse = scores.masked_fill(~seen, -math.inf).logsumexp(-1)
    blind = lse == -math.inf
    top = torch.where(blind, 0, lse)[..., None]
    weights = torch.where(seen, (scores - (top if normalized else top.detach())).exp(), 0)
    if drop is not None:
        keep = attention_keep_mask(
            weights.shape,
            drop.p,
            key=drop.key,
            query_offset=mask.query_offset,
            key_offset=mask.key_offset,
            head_offset=drop.head_offset,
            device=q.device,
        )
        weights = torch.where(keep, weights / (1 - drop.p), 0)
    return weights.to(q.dtype) @ v, lse


class Case:
    """Inputs of one call at unit scale, and gradients of both outputs."""

    def __init__(
        self,
        mask: Mask,
        bias: str = "none",
        *,
        batch: int = 2,
        heads: int = 2,
        kv_heads: int = 1,
        queries: int = 70,
        keys: int = 101,
        dim: int = 16,
        dtype: torch.dtype = torch.float32,
        dropout: float = 0.0,
        lse: bool = True,
    ) -> None:
        torch.manual_seed(0)
        self.mask, self.dtype, self.scale = mask, dtype, 1.25 * dim**-0.5
        self.x = {"q": torch.randn(batch, heads, queries, dim)}
        self.x |= {name: torch.randn(batch, kv_heads, keys, dim) for name in "kv"}
        self.rest: dict[str, Any] = {}
        if bias == "slopes":
            self.rest = {"slopes": alibi_slopes(heads)}
        elif bias == "table":
            self.x["table"] = torch.randn(heads, 25)
            self.rest = {"least": -9}
        elif bias != "none":
            rows, least = deberta_rows(8, 8, 24) if bias.endswith("buckets") else deberta_rows(12)
            self.rest = {"rows": rows, "least": least}
            many = int(rows.max()) + 1
            if not bias.startswith("position"):
                self.x["content"] = torch.randn(batch, heads, queries, many)
            if not bias.startswith("content"):
                self.x["position"] = torch.randn(batch, heads, keys, many)
        self.x = {name: value if name == "table" else value.to(dtype) for name, value in self.x.items()}
        samples = torch.tensor([2**40 + 7, 3, 11])[:batch]
        key = DropoutKey(5, "attention", 3, 1, samples)
        self.drop = Drop(dropout, key, 1) if dropout else None
        self.grad_out = torch.randn(batch, heads, queries, dim).to(dtype)
        self.grad_lse = torch.randn(batch, heads, queries) if lse else None

    def terms(self, x: dict[str, Tensor]) -> BiasTerms:
        return BiasTerms(**{name: x[name] for name in NAMES[3:] if name in x}, **self.rest)

    def autograd(self, dtype: torch.dtype, defined: Callable = definition) -> dict[str, Tensor]:
        leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in self.x.items()}
        out, lse = defined(leaves, self.terms(leaves), self.mask, self.scale, self.drop)
        loss = (out * self.grad_out.to(dtype)).sum()
        if self.grad_lse is not None:
            loss = loss + torch.where(lse.isfinite(), lse * self.grad_lse.to(lse.dtype), 0).sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def forward(self) -> tuple[Tensor, Tensor]:
        wide = {name: value.double() for name, value in self.x.items()}
        out, lse = definition(wide, self.terms(wide), self.mask, self.scale, self.drop)
        return out.to(self.dtype), lse.float()

    def backward(self, needs: tuple[bool, ...] | None = None) -> dict[str, Tensor | None]:
        out, lse = self.forward()
        wanted = tuple(name in self.x for name in NAMES) if needs is None else needs
        inputs = (self.grad_out, self.grad_lse, self.x["q"], self.x["k"], self.x["v"], out, lse)
        found = backward(*inputs, self.terms(self.x), self.mask, self.scale, self.drop, wanted)
        return dict(zip(NAMES, found, strict=True))


def documents(batch: int, queries: int, keys: int) -> dict[str, Any]:
    """Ids of a few documents each, one of which comes back later, with padding in both and a document that only the
    queries have."""
    ids = torch.tensor([3, 4, 3, -1, 9]), torch.tensor([3, 3, 4, -1, 3])
    cuts = [torch.arange(n) * len(part) // n for n, part in zip((queries, keys), ids, strict=True)]
    found = [part[cut].expand(batch, -1).to(torch.int32).contiguous() for part, cut in zip(ids, cuts, strict=True)]
    found[0][-1, : queries // 3] = 4
    return {"query_documents": found[0], "key_documents": found[1]}


def positions(batch: int, queries: int, keys: int) -> dict[str, Any]:
    """Positions that restart."""
    both = [(torch.arange(n) % 37).expand(batch, -1).to(torch.int32).contiguous() for n in (queries, keys)]
    return {"query_positions": both[0], "key_positions": both[1]}


def layout(size: int, queries: int, keys: int, heads: int = 2) -> BlockLayout:
    """Random blocks; the second head has others, the last blocks of queries see nothing."""
    torch.manual_seed(1)
    visible = torch.rand(heads, -(-queries // size), -(-keys // size)) < 0.4
    visible[:, 0, 0], visible[:, -1] = True, False
    return BlockLayout.from_dense(visible, size)


MASKS = {
    "full": Mask(causal=False),
    "causal": Mask(query_offset=31),
    "blind rows": Mask(key_offset=23),
    "aligned": Mask(causal=False),
    "documents": Mask(causal=False, **documents(2, 70, 101)),
    "causal documents": Mask(query_offset=40, **documents(2, 70, 101)),
    "window": Mask(query_offset=31, window=17),
    "both sides": Mask(causal=False, window=17, query_offset=3),
    "prefix": Mask(query_offset=20, prefix=33),
    "prefix of each": Mask(window=9, query_offset=20, prefix=torch.tensor([5, 77])),
    "blocks": Mask(blocks=Blocks(24, behind=1), query_offset=31),
    "shifted blocks": Mask(causal=False, blocks=Blocks(24, behind=1, ahead=1, shift=12)),
    "global": Mask(causal=False, window=9, first=5),
    "positions": Mask(blocks=Blocks(16, behind=1), first=2, query_offset=31, **positions(2, 70, 101)),
    "layout": Mask(causal=False, layout=layout(16, 70, 101)),
    "causal layout": Mask(layout=layout(64, 140, 140)),
}
SIZES: dict[str, Any] = {
    "aligned": {"queries": 64, "keys": 128},
    "causal layout": {"queries": 140, "keys": 140, "batch": 1},
}
BIASES = ("slopes", "table", "content", "position", "both", "both buckets")


def check(case: Case, tolerance: float, close: Callable[..., None]) -> None:
    want, got = case.autograd(torch.float64), case.backward()
    for name in NAMES:
        if name in want:
            close(got[name], want[name], tolerance, name)
        else:
            assert got[name] is None


def test_definition(assert_close):
    """The definition here is the reference of the package."""
    case = Case(MASKS["causal documents"], "table", dropout=0.3, lse=False)

    def reference(x, terms, mask, scale, drop):
        bias = Toeplitz(table=terms.table, least=terms.least)
        extra = {"dropout": drop.p, "dropout_key": drop.key, "head_offset": drop.head_offset}
        return attention_reference(x["q"], x["k"], x["v"], mask=mask, bias=bias, scale=scale, **extra)

    want, got = case.autograd(torch.float64, reference), case.autograd(torch.float64)
    for name in want:
        assert_close(got[name], want[name], 1e-12, name)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, assert_close):
    check(Case(MASKS[name], **SIZES.get(name, {})), 1e-5, assert_close)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", ["full", "causal documents"])
def test_biases(name, bias, assert_close):
    check(Case(MASKS[name], bias, batch=2 if name != "full" else 1), 1e-5, assert_close)


@pytest.mark.parametrize("bias", ["table", "both"])
@pytest.mark.parametrize("name", ["prefix of each", "positions", "layout", "window"])
def test_biases_under_masks_of_rows_and_heads(name, bias, assert_close):
    """A second row and a second head have masks of their own."""
    check(Case(MASKS[name], bias), 1e-5, assert_close)


@pytest.mark.parametrize("least", [-200, -100, -9, 50, 90, 200])
def test_table_ends(least, assert_close):
    """Tables that hold some, all or none of the distances, which are -100 .. 69."""
    case = Case(MASKS["full"], "table", batch=1)
    case.rest["least"] = least
    check(case, 1e-5, assert_close)


@pytest.mark.parametrize("entries", [1, 2])
def test_small_tables(entries, assert_close):
    """A single distance carries everything; two have no inside."""
    case = Case(MASKS["full"], "both", batch=1, lse=True)
    case.rest |= {"rows": torch.arange(entries, dtype=torch.int32), "least": 0}
    check(case, 1e-5, assert_close)


@pytest.mark.parametrize("dim", [24, 80, 96, 128, 256])
def test_head_dimensions(dim, assert_close):
    check(Case(MASKS["causal"], batch=1, heads=1, dim=dim), 1e-5, assert_close)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 130), (65, 1), (63, 64), (129, 65)])
def test_lengths(queries, keys, assert_close):
    mask = Mask(query_offset=max(0, keys - queries))
    if keys == 1:  # softmax of one score is constant: q and k have no gradient but through the log-sum-exp
        mask = Mask(causal=False)
    check(Case(mask, batch=1, queries=queries, keys=keys), 1e-5, assert_close)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_queries(kv_heads, assert_close):
    check(Case(MASKS["causal"], "both", batch=1, heads=4, kv_heads=kv_heads, keys=70), 1e-5, assert_close)


@pytest.mark.parametrize("bias", ["none", "table", "both"])
@pytest.mark.parametrize("key_offset", [0, 2])
def test_dropout(key_offset, bias, assert_close):
    mask = Mask(query_offset=40, key_offset=key_offset)
    check(Case(mask, bias, batch=1, heads=2, dropout=0.3), 1e-5, assert_close)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("causal", {"dim": 64}),
        ("documents", {"bias": "table"}),
        ("full", {"bias": "both", "dropout": 0.2}),
        ("window", {"dim": 80, "kv_heads": 2}),
    ],
)
def test_half_precision(name, rest, dtype, assert_close):
    """As near as three times the plain form in the same dtype, and near."""
    case = Case(MASKS[name], dtype=HALVES[dtype], batch=2 if name == "documents" else 1, **rest)
    want, plain, got = case.autograd(torch.float64), case.autograd(HALVES[dtype]), case.backward()

    def error(x: Tensor | None, name: str) -> float:
        assert x is not None
        return ((x.double() - want[name]).norm() / want[name].norm()).item()

    for name in want:
        got_name = got[name]
        assert got_name is not None
        assert got_name.dtype == case.x[name].dtype
        assert_close(got_name, want[name], 1e-2, name)
        assert error(got_name, name) <= 3 * error(plain[name], name), name


def test_parts_add_up(assert_close):
    """Two calls with a part of the keys each and the merged output give the gradients of one call with all."""
    case = Case(MASKS["causal"], "slopes", batch=1, kv_heads=2, keys=120, lse=False)
    want, (out, lse) = case.autograd(torch.float64), case.forward()
    x, needs = case.x, (True, True, True, False, False, False)
    total = torch.zeros_like(x["q"])
    for part in (slice(0, 72), slice(72, 120)):
        mask = Mask(query_offset=31, key_offset=part.start)
        k, v = x["k"][:, :, part], x["v"][:, :, part]  # not contiguous
        found = backward(case.grad_out, None, x["q"], k, v, out, lse, case.terms(x), mask, case.scale, None, needs)
        dq, dk, dv = found[:3]
        assert dq is not None
        total += dq
        assert_close(dk, want["k"][:, :, part], 1e-5, "k")
        assert_close(dv, want["v"][:, :, part], 1e-5, "v")
    assert_close(total, want["q"], 1e-5, "q")


def test_strides(assert_close):
    """Token-major inputs give token-major gradients; an expanded gradient, as of a sum, is read as it is."""
    case = Case(MASKS["causal"], batch=2, kv_heads=2)
    for name in "qkv":
        case.x[name] = case.x[name].transpose(1, 2).contiguous().transpose(1, 2)
    case.grad_out = torch.randn(()).expand(case.grad_out.shape)
    got = case.backward()
    for name, want in case.autograd(torch.float64).items():
        found = got[name]
        assert found is not None
        assert found.stride() == case.x[name].stride()
        assert_close(found, want, 1e-5, name)


def test_wide_output(assert_close):
    """fp32 output and gradient of bf16 inputs, as a ring of devices has them."""
    case = Case(MASKS["causal"], batch=1, dtype=torch.bfloat16)
    out, lse = case.forward()
    x, needs = case.x, (True, True, True, False, False, False)
    grad = case.grad_out.float()
    found = backward(grad, case.grad_lse, x["q"], x["k"], x["v"], out.float(), lse, case.terms(x), case.mask,
                     case.scale, None, needs)  # fmt: skip
    for name, got in zip("qkv", found[:3], strict=True):
        assert got is not None
        assert got.dtype == torch.bfloat16
        assert_close(got, case.autograd(torch.float64)[name], 1e-2, name)


def test_band_in_pieces(assert_close, monkeypatch):
    """The batch goes through a band of one row at a time."""
    monkeypatch.setattr("potamos.kernels.attention.triton_backward.BAND_BYTES", 1)
    check(Case(MASKS["documents"], "both", dropout=0.2, heads=1), 1e-5, assert_close)


@pytest.mark.parametrize("missing", range(6))
def test_only_what_is_needed(missing):
    """Every gradient but one, and only one: the same bits as all of them together."""
    case = Case(MASKS["causal"], "both" if missing != 3 else "table", batch=1, queries=40, keys=50)
    there, everything = [name in case.x for name in NAMES], case.backward()
    for alone in (False, True):
        needs = tuple(t and (n == missing) == alone for n, t in enumerate(there))
        for name, need, found in zip(NAMES, needs, case.backward(needs).values(), strict=True):
            assert (found is not None) == need
            assert found is None or torch.equal(found, everything[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", ["table", "both buckets"])
def test_deterministic(bias):
    first, second = (Case(MASKS["causal documents"], bias, dropout=0.2).backward() for _ in range(2))
    for name in NAMES:
        assert (first[name] is None) == (second[name] is None)
        assert first[name] is None or torch.equal(first[name], second[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", ["table", "both"])
def test_blind_rows(bias):
    """Queries that see nothing have zero gradients, whatever arrives at them, and harm nobody."""
    case = Case(MASKS["blind rows"], bias, batch=1)
    assert case.grad_lse is not None
    blind = torch.arange(70) < 23
    case.grad_lse[:, :, blind] = torch.inf
    got = case.backward()
    assert all(bool(x.isfinite().all()) for x in got.values() if x is not None)
    for name in ("q", "content"):
        x = got[name]
        assert x is None or (not x[:, :, blind].any() and bool(x[:, :, ~blind].any()))
    nothing = Case(Mask(key_offset=200), bias, batch=1).backward()
    assert not any(x.any() for x in nothing.values() if x is not None)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}, {"keys": 0}])
def test_nothing(empty):
    case = Case(MASKS["full"], "both", **empty)
    out, lse = torch.zeros_like(case.x["q"]), torch.full(case.x["q"].shape[:3], -torch.inf)
    x = case.x
    found = backward(case.grad_out, None, x["q"], x["k"], x["v"], out, lse, case.terms(x), case.mask, 1.0, None,
                     tuple(n in x for n in NAMES))  # fmt: skip
    assert not any(g.any() for g in found if g is not None)


@pytest.mark.parametrize("name", ["causal", "window", "layout"])
def test_hidden_tiles_are_not_visited(name):
    """NaN in tiles that a tile must not visit does not reach its gradients: queries 0 .. 63, keys 128 .. 191."""
    visible = torch.tensor([[True, True, False], [True, True, False], [False, True, True]])
    mask = {
        "causal": Mask(),
        "window": Mask(causal=False, window=60),
        "layout": Mask(causal=False, layout=BlockLayout.from_dense(visible[None], 64)),
    }[name]
    case = Case(mask, "table", batch=1, queries=192, keys=192, lse=False)
    clean = case.backward()
    out, lse = case.forward()
    x = dict(case.x)
    near, far = slice(0, 64), slice(128, 192)

    def poisoned(part: slice, *names: str):
        inputs = {"grad": case.grad_out, **x}
        for n in names:
            inputs[n] = inputs[n].clone()
            inputs[n][:, :, part] = torch.nan
        needs = (True, True, True, False, False, False)
        terms = case.terms(x)
        return backward(inputs["grad"], None, inputs["q"], inputs["k"], inputs["v"], out, lse, terms, mask, case.scale,
                        None, needs)  # fmt: skip

    dq = poisoned(far, "k", "v")[0]
    assert dq is not None
    assert torch.equal(dq[:, :, near], clean["q"][:, :, near])  # type: ignore[index]
    assert not bool(dq[:, :, far].isfinite().any())
    _, dk, dv = poisoned(near, "q", "grad")[:3]
    for found, n in ((dk, "k"), (dv, "v")):
        assert found is not None
        assert torch.equal(found[:, :, far], clean[n][:, :, far])  # type: ignore[index]
        assert not bool(found[:, :, near].isfinite().any())


def test_table_visits_visible_tiles_only():
    """NaN in a document of its own, of whole tiles, reaches no entry of the table through other documents' tiles."""
    ids = torch.tensor([0, 1, -1]).repeat_interleave(64)[None].to(torch.int32)
    case = Case(Mask(causal=False, query_documents=ids, key_documents=ids), "table", batch=1, queries=192, keys=192)
    clean = case.backward()["table"]
    for name in "qkv":
        case.x[name] = case.x[name].clone()
    out, lse = case.forward()
    for name in "qkv":
        case.x[name][:, :, 128:] = torch.nan
    x = case.x
    got = backward(case.grad_out, case.grad_lse, x["q"], x["k"], x["v"], out, lse, case.terms(x), case.mask, case.scale,
                   None, (False, False, False, True, False, False))[3]  # fmt: skip
    assert got is not None
    assert torch.equal(got, clean)  # type: ignore[arg-type]


def planted(case: Case) -> dict[str, dict[str, Tensor]]:
    """Gradients as typical mistakes would have them; what a mistake does not touch is left out."""
    right = case.autograd(torch.float64)
    found = {
        "zeros": {name: torch.zeros_like(x) for name, x in right.items()},
        "shifted": {name: x.roll(1, -1 if name == "table" else -2) for name, x in right.items()},
        "scale dropped": {name: x / case.scale for name, x in right.items() if name in "qk"},
        "a kv head for another": {name: right[name].flip(1) for name in "kv"},
    }

    def define(x, terms, mask, scale, drop):
        return definition(x, terms, mask, scale, drop, normalized=False)

    without_delta = case.autograd(torch.float64, define)
    found["delta missing"] = {name: without_delta[name] for name in ("q", "k", "table")}
    assert case.drop is not None
    factor = 1 - case.drop.p
    found["dropout's factor missing"] = {"v": right["v"] * factor}
    changes: dict[str, tuple[str, Any, tuple[str, ...]]] = {
        "no dropout": ("drop", None, NAMES[:4]),
        "other bits": ("drop", case.drop._replace(head_offset=0), NAMES[:4]),
        "no gradient of lse": ("grad_lse", None, ("q", "k", "table")),
        "a head of the group missing": (
            "grad_out",
            case.grad_out * torch.tensor([1, 0, 1, 0.0])[:, None, None],
            ("v",),
        ),
    }
    for bug, (attribute, value, names) in changes.items():
        kept = getattr(case, attribute)
        setattr(case, attribute, value)
        wrong = case.autograd(torch.float64)
        setattr(case, attribute, kept)
        found[bug] = {name: wrong[name] for name in names}
    return found


def test_planted_bugs_fail(assert_close):
    """Each wrong gradient is refused, by the widest bound of these tests, where the kernels' passes the narrowest."""
    case = Case(MASKS["causal"], "table", heads=4, kv_heads=2, dropout=0.2)
    check(case, 1e-5, assert_close)
    got = case.backward()

    def refused(name: str, value: Tensor) -> bool:
        try:
            assert_close(got[name], value, 1e-2, name)
        except AssertionError:
            return True
        return False

    found = planted(case).items()
    accepted = [f"{bug}: {name}" for bug, wrong in found for name, x in wrong.items() if not refused(name, x)]
    assert not accepted
