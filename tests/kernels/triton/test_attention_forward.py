"""The forward kernel of attention against the definition in fp64: every mask, bias, head dimension and length."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from potamos.kernels.attention import (
    BlockLayout,
    Blocks,
    Disentangled,
    Mask,
    Toeplitz,
    alibi_slopes,
    attention_reference,
    deberta_rows,
    triton,
)
from potamos.kernels.attention.biases import BiasTerms, resolve_bias
from potamos.kernels.attention.function import Drop
from potamos.kernels.attention.triton import Config, attention_forward
from potamos.kernels.dropout import DropoutKey, attention_keep_mask

Inputs = tuple[Tensor, Tensor, Tensor]
SMALL = Config(64, 32, 4, 2)
"""Tiles so small that short rows have full, partial, ragged and unseen ones."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory is NaN, so that an output that was not written cannot pass."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def fill(*args, _make=make, **options):
            out = _make(*args, **options)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, fill)
    torch.manual_seed(1)


def make_inputs(batch=2, heads=2, kv_heads=1, queries=100, keys=100, dim=16, dtype=torch.float32) -> Inputs:
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    q, k, v = (torch.randn(batch, *shape, dim).to(dtype) for shape in shapes)
    return q, k, v


def make_drop(p: float, batch: int, head_offset: int = 5) -> Drop | None:
    """Samples that need both words of the counter."""
    samples = torch.arange(batch) * 2**40 + 2**31 + 12345
    return Drop(p, DropoutKey(3, "attention", 1, 2, samples), head_offset) if p else None


def run(q, k, v, mask: Mask, bias=None, drop: Drop | None = None, scale: float | None = None, **options):
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return attention_forward(q, k, v, resolve_bias(bias, q, k, scale), mask, scale, drop, **options)


def define(q, k, v, mask: Mask, bias=None, drop: Drop | None = None, scale: float | None = None):
    rest: dict[str, Any] = {}
    if drop is not None:
        rest = {"dropout": drop.p, "dropout_key": drop.key, "head_offset": drop.head_offset}
    return attention_reference(q.double(), k.double(), v.double(), mask=mask, bias=bias, scale=scale, **rest)


def check(assert_close, got, want, tolerance: float, name: str = "") -> None:
    """Output and log-sum-exp, whose -inf must be in the same places."""
    assert_close(got[0], want[0], tolerance, f"{name} out")
    seen = want[1].isfinite()
    assert torch.equal(got[1], torch.where(seen, got[1], -float("inf"))), f"{name}: -inf where nothing is seen"
    assert got[1][seen].isfinite().all()
    # A log-sum-exp may be zero where it should be: its error counts against the scores' unit.
    assert (got[1].double() - want[1])[seen].abs().max() <= 10 * tolerance, f"{name}: lse"


def ids(batch: int, length: int, documents: int = 4) -> Tensor:
    """Sorted document ids with padding in front of some rows."""
    return torch.randint(-1, documents, (batch, length)).sort(1).values.int()


def positions(documents: Tensor) -> Tensor:
    """Each document counted from 0."""
    columns = torch.arange(documents.shape[1]).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return (columns - torch.where(begins, columns, 0).cummax(1).values).int()


def layout(heads: int, size: int, queries: int, keys: int, density: float = 0.4) -> BlockLayout:
    dense = torch.rand(heads, -(-queries // size), -(-keys // size)) < density
    dense[:, -1, :-1:2] = True
    if dense.shape[1] > 1:
        dense[:, 0] = False  # some queries see nothing at all
    return BlockLayout.from_dense(dense, size)


def packed(queries: int, keys: int, **rest: Any) -> Mask:
    """Documents of one row; fewer queries than keys are the row's last. Positions where asked for."""
    row = ids(2, max(queries, keys))
    offset = max(0, keys - queries)
    ours, theirs = row[:, offset : offset + queries], row[:, :keys]
    if rest.pop("count", False):
        counted = positions(row)
        rest |= {"query_positions": counted[:, offset : offset + queries], "key_positions": counted[:, :keys]}
    return Mask(query_documents=ours, key_documents=theirs, query_offset=offset, **rest)


MASKS: dict[str, Callable[[int, int], Mask]] = {
    "full": lambda n, m: Mask(causal=False),
    "causal": lambda n, m: Mask(),
    "causal, queries later": lambda n, m: Mask(query_offset=50, key_offset=10),
    "causal, keys later": lambda n, m: Mask(query_offset=3, key_offset=40),
    "window": lambda n, m: Mask(window=20),
    "window of one": lambda n, m: Mask(window=1),
    "window, both sides, offset": lambda n, m: Mask(causal=False, window=33, query_offset=30),
    "window, first": lambda n, m: Mask(window=10, first=5),
    "blocks": lambda n, m: Mask(causal=False, blocks=Blocks(16)),
    "blocks, shifted": lambda n, m: Mask(causal=False, blocks=Blocks(24, 1, 1, shift=12), first=3),
    "blocks, causal": lambda n, m: Mask(blocks=Blocks(10, behind=1)),
    "prefix": lambda n, m: Mask(prefix=37),
    "prefix, each row": lambda n, m: Mask(prefix=torch.tensor([0, 70]), window=8),
    "documents": lambda n, m: packed(n, m),
    "documents, not causal": lambda n, m: packed(n, m, causal=False, prefix=20),
    "documents, blocks by positions": lambda n, m: packed(n, m, blocks=Blocks(8, 1), first=2, count=True),
    "layout, a head each": lambda n, m: Mask(causal=False, layout=layout(2, 32, n, m)),
    "layout, blocks unlike tiles": lambda n, m: Mask(layout=layout(1, 12, n, m)),
    "layout, offset": lambda n, m: Mask(
        causal=False, query_offset=7, key_offset=40, layout=layout(2, 20, n + 7, m + 40)
    ),
    "everything": lambda n, m: packed(
        n, m, blocks=Blocks(16, 1), window=30, first=2, count=True, prefix=9, layout=layout(2, 16, max(n, m), m, 0.7)
    ),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("queries", "keys"), [(100, 100), (65, 130)])
def test_every_mask(name, queries, keys, assert_close):
    x, mask = make_inputs(queries=queries, keys=keys), MASKS[name](queries, keys)
    check(assert_close, run(*x, mask, config=SMALL), define(*x, mask), 1e-6)


def disentangled(heads: int, dim: int, *, content: bool = True, position: bool = True, buckets: int = 0):
    rows, least = deberta_rows(12, buckets, 40) if buckets else deberta_rows(12)
    keys, queries = (torch.randn(heads, 24, dim) if there else None for there in (content, position))
    return Disentangled(keys, queries, rows, least)


BIASES: dict[str, Callable[[int, int], Any]] = {
    "slopes": lambda heads, dim: Toeplitz(slopes=alibi_slopes(heads) * 0.5),
    "table": lambda heads, dim: Toeplitz(table=torch.randn(heads, 50), least=-20),
    "table of one entry and none": lambda heads, dim: Toeplitz(table=torch.tensor([[2.0], [-float("inf")]][:heads])),
    "table, all later than it": lambda heads, dim: Toeplitz(table=torch.randn(heads, 9), least=500),
    "disentangled": lambda heads, dim: disentangled(heads, dim),
    "content to position": lambda heads, dim: disentangled(heads, dim, position=False),
    "position to content, buckets": lambda heads, dim: disentangled(heads, dim, content=False, buckets=12),
}


def narrow(bias, dtype: torch.dtype):
    """Position keys and queries in q's dtype."""
    if not isinstance(bias, Disentangled):
        return bias
    keys, queries = (None if x is None else x.to(dtype) for x in (bias.position_keys, bias.position_queries))
    return Disentangled(keys, queries, bias.rows, bias.least)


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize(
    ("mask", "kv_heads"), [(Mask(), 1), (Mask(causal=False, query_offset=4, key_offset=30, window=50), 2)]
)
def test_every_bias(name, mask, kv_heads, assert_close):
    x = make_inputs(queries=70, keys=100, kv_heads=kv_heads)
    bias = BIASES[name](2, 16)
    check(assert_close, run(*x, mask, bias, config=SMALL), define(*x, mask, bias), 1e-6)


@pytest.mark.parametrize("dim", [16, 24, 32, 40, 64, 80, 96, 128, 192, 256])
def test_every_head_dimension(dim, assert_close):
    x = make_inputs(1, 2, 1, 40, 70, dim)
    mask = Mask(query_offset=30)
    check(assert_close, run(*x, mask), define(*x, mask), 1e-6)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 100, 130])
def test_every_length_with_the_chosen_tiles(length, assert_close):
    x, mask = make_inputs(1, 2, 1, length, length, 16), Mask()
    check(assert_close, run(*x, mask), define(*x, mask), 1e-6, "causal")
    y = (x[0][:, :, :1], *x[1:])
    check(assert_close, run(*y, Mask(causal=False)), define(*y, Mask(causal=False)), 1e-6, "one query")
    z = x[0], x[1][:, :, :1], x[2][:, :, :1]
    check(assert_close, run(*z, mask), define(*z, mask), 1e-6, "one key")


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_query_heads_share_keys(heads, kv_heads, assert_close):
    x, mask = make_inputs(2, heads, kv_heads, 20, 40), Mask(query_offset=20)
    check(assert_close, run(*x, mask, config=SMALL), define(*x, mask), 1e-6)


@pytest.mark.parametrize("scale", [1.7, 0.0, -0.4])
def test_any_scale(scale, assert_close):
    x, mask = make_inputs(queries=40, keys=40), Mask()
    check(assert_close, run(*x, mask, scale=scale), define(*x, mask, scale=scale), 1e-6)


@pytest.mark.parametrize("offsets", [(0, 0), (3, 8), (70, 5), (4, 42)])
@pytest.mark.parametrize("p", [0.1, 0.7])
def test_dropout_draws_the_bits_of_the_definition(offsets, p):
    """Values that are a unit matrix: the output is the probabilities, zero where dropped."""
    q, k, _ = make_inputs(queries=40, keys=70, dim=128)
    v = torch.eye(70, 128).expand(2, 2, 70, 128)
    mask, drop = Mask(causal=False, query_offset=offsets[0], key_offset=offsets[1]), make_drop(p, 2)
    out, _ = run(q, k, v, mask, drop=drop, config=SMALL)
    assert drop is not None
    keep = attention_keep_mask(
        (2, 2, 40, 70), p, key=drop.key, query_offset=offsets[0], key_offset=offsets[1], head_offset=5,
        device=out.device,
    )  # fmt: skip
    assert torch.equal(out[..., :70] != 0, keep)
    assert 0.5 * p < 1 - keep.float().mean() < 2 * p


@pytest.mark.parametrize("name", ["causal", "documents", "everything"])
@pytest.mark.parametrize("bias", ["slopes", "disentangled"])
def test_dropout_beside_masks_and_biases(name, bias, assert_close):
    x, mask, drop = make_inputs(queries=50, keys=66), MASKS[name](50, 66), make_drop(0.3, 2)
    added = BIASES[bias](2, 16)
    check(assert_close, run(*x, mask, added, drop, config=SMALL), define(*x, mask, added, drop), 1e-6)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias, dtype: torch.dtype) -> Tensor:
    """Attention as one writes it in torch in a half-precision type: fp32 softmax of half-precision scores."""
    scale = q.shape[3] ** -0.5
    scores = (q @ k.transpose(2, 3)) * scale
    if bias is not None:
        from potamos.kernels.attention.biases import bias_values

        rows, columns = torch.arange(q.shape[2]) + mask.query_offset, torch.arange(k.shape[2]) + mask.key_offset
        scores = scores + bias_values(resolve_bias(bias, q, k, scale), rows, columns, torch.float32).to(dtype)
    scores = scores.masked_fill(~mask.visible(q.shape[2], k.shape[2], q.device), -float("inf"))
    return torch.nan_to_num(scores.float().softmax(-1)).to(dtype) @ v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("mask", "bias", "dim"),
    [("causal", None, 64), ("full", None, 128), ("causal", "slopes", 80), ("documents", "table", 32),
     ("documents, not causal", "disentangled", 64), ("everything", None, 96), ("window", None, 256)],
)  # fmt: skip
def test_half_precision_is_as_good_as_plain_torch_in_it(dtype, mask, bias, dim, assert_close):
    x = make_inputs(queries=130, keys=130, dim=dim, dtype=dtype)
    masked, added = MASKS[mask](130, 130), None if bias is None else narrow(BIASES[bias](2, dim), dtype)
    got, want = run(*x, masked, added), define(*x, masked, added)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert_close(got[0], want[0], 5e-3 if dtype == torch.bfloat16 else 1e-3)
    rms = want[0].square().mean().sqrt()
    error = (got[0].double() - want[0]).square().mean((0, 2)).sqrt() / rms
    theirs = (plain(*x, masked, added, dtype).double() - want[0]).square().mean().sqrt() / rms
    assert error.square().mean().sqrt() <= 2 * theirs
    assert error.max() <= 3 * error.mean(), "one channel is worse than the others"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_output_is_not_rounded(dtype, assert_close):
    x, mask = make_inputs(queries=40, keys=40, dtype=dtype), Mask()
    wide, lse = run(*x, mask, wide=True)
    out, other = run(*x, mask)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(dtype), out)
    assert torch.equal(lse, other)
    assert not torch.equal(wide, out.float())


def test_a_row_that_sees_nothing_gives_zero():
    x = make_inputs(queries=70, keys=40)
    documents = torch.zeros(2, 70, dtype=torch.int32)
    documents[0, 3:50], documents[1] = -1, 9
    mask = Mask(causal=False, query_documents=documents, key_documents=torch.zeros(2, 40, dtype=torch.int32))
    out, lse = run(*x, mask, config=SMALL)
    blind = documents != 0
    assert not out.transpose(1, 2)[blind].any()
    assert (lse.transpose(1, 2)[blind] == -float("inf")).all()
    assert out.transpose(1, 2)[~blind].any(-1).all()


SPARSE = [
    "causal", "causal, queries later", "window", "window, both sides, offset", "blocks", "blocks, causal", "prefix",
    "prefix, each row", "documents", "documents, not causal", "documents, blocks by positions",
    "layout, a head each", "layout, offset", "everything",
]  # fmt: skip


@pytest.mark.parametrize("name", SPARSE)
def test_tiles_that_no_query_sees_are_not_read(name, assert_close):
    """Keys and values of unseen tiles are NaN: zero times NaN would show."""
    q, k, v = make_inputs(queries=32, keys=256)
    mask = MASKS[name](32, 256)
    seen = mask.visible(32, 256, q.device).expand(2, 2, -1, -1).any(2)
    tiles = seen.unflatten(2, (8, 32)).any(3)
    unread = ~tiles.repeat_interleave(32, 2)[..., None]
    assert unread.any(), "the mask sees every tile: nothing is tested"
    want = define(q, k, v, mask)
    k, v = (torch.where(unread, torch.nan, x) for x in (k, v))
    check(assert_close, run(q, k, v, mask, config=SMALL), want, 1e-6)
    k, v = (torch.where(unread | tiles.repeat_interleave(32, 2)[..., None], torch.nan, x) for x in (k, v))
    assert run(q, k, v, mask, config=SMALL)[0].isnan().any()


def test_inputs_of_any_strides(assert_close):
    mask = Mask()
    q, k, v = (
        x.transpose(1, 2) for x in (torch.randn(2, 50, 3, 16), torch.randn(2, 50, 1, 16), torch.randn(2, 50, 1, 16))
    )
    out, lse = run(q, k.expand(2, 3, 50, 16), v.expand(2, 3, 50, 16), mask, config=SMALL)
    check(assert_close, (out, lse), define(q, k, v, mask), 1e-6, "transposed, expanded")
    assert out.stride() == q.stride(), "the layout of q is that of its output"
    big = torch.randn(2, 3, 100, 48)
    parts = big[:, :, ::2, 16:32], big[:, :, 1::2, :16], big[:, :, 1::2, 32:]
    check(assert_close, run(*parts, mask, config=SMALL), define(*parts, mask), 1e-6, "parts of one tensor")
    q, k, v = torch.randn(3, 2, 3, 16, 50).transpose(3, 4)
    check(assert_close, run(q, k, v, mask, config=SMALL), define(q, k, v, mask), 1e-6, "last stride not 1")


@pytest.mark.parametrize("name", ["full", "causal, queries later", "window", "layout, a head each", "documents"])
@pytest.mark.parametrize("splits", [2, 3, 7])
def test_splits_of_the_keys_join_exactly(name, splits, assert_close):
    """Also more splits than tiles: a part without any tile adds nothing."""
    x, mask, drop = make_inputs(queries=3, keys=150), MASKS[name](3, 150), make_drop(0.2, 2)
    bias = Toeplitz(slopes=alibi_slopes(2))
    got = run(*x, mask, bias, drop, config=Config(16, 32, 4, 2, splits))
    check(assert_close, got, define(*x, mask, bias, drop), 1e-6)


def test_keys_are_split_where_rows_are_few_and_long():
    assert triton.choose_splits(132, 1000, 132) == 1  # enough programs
    assert triton.choose_splits(67, 1000, 132) == 1  # no two parts of every row fit at once
    assert triton.choose_splits(8, 7, 132) == 1  # too short
    assert triton.choose_splits(8, 1000, 132) == 16
    assert triton.choose_splits(8, 16, 132) == 4  # at least four tiles each
    assert triton.choose_splits(1, 100_000, 132) == triton.MOST_SPLITS


def test_decoding_step_by_step_is_the_whole_row(assert_close):
    q, k, v = make_inputs(2, 4, 2, 70, 70)
    bias = Toeplitz(table=torch.randn(4, 30))
    for mask in (Mask(window=40), packed(70, 70)):
        want = define(q, k, v, mask, bias)[0]
        steps = []
        for token in (0, 1, 33, 69):
            ours = None if mask.query_documents is None else mask.query_documents[:, token : token + 1]
            theirs = None if mask.key_documents is None else mask.key_documents[:, : token + 1]
            now = Mask(window=mask.window, query_offset=token, query_documents=ours, key_documents=theirs)
            parts = q[:, :, token : token + 1], k[:, :, : token + 1], v[:, :, : token + 1]
            steps.append(run(*parts, now, bias)[0])
        assert_close(torch.cat(steps, 2), want[:, :, [0, 1, 33, 69]], 1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_drawn_combinations(seed, assert_close):
    draw = random.Random(seed)
    queries, keys, dim = (
        draw.choice([1, 17, 63, 64, 65, 90]),
        draw.choice([1, 31, 65, 100]),
        draw.choice([16, 40, 64, 80]),
    )
    name, bias = draw.choice(list(MASKS)), draw.choice([None, *BIASES])
    dtype = draw.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    kv_heads, p = draw.choice([1, 2]), draw.choice([0.0, 0.0, 0.25])
    x = make_inputs(2, 2, kv_heads, queries, keys, dim, dtype)
    mask, added = MASKS[name](queries, keys), None if bias is None else narrow(BIASES[bias](2, dim), dtype)
    drop = make_drop(p, 2)
    config = draw.choice([None, SMALL, Config(16, 64, 4, 2), Config(64, 16, 4, 2, 2)])
    got, want = run(*x, mask, added, drop, config=config), define(*x, mask, added, drop)
    label = f"{name}, {bias}, {queries}x{keys}x{dim}, {dtype}, {p}, {config}"
    if not want[0].any():  # nothing is visible: exact
        assert not got[0].any(), label
        assert torch.equal(got[1].double(), want[1]), label
        return
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    check(assert_close, got, want, tolerance, label)


def test_the_comparison_refuses_typical_bugs(assert_close):
    q, k, v = make_inputs(queries=100, keys=100)
    ours = ids(2, 100)
    mask = Mask(query_documents=ours, key_documents=ours, window=10)
    bias, drop = Toeplitz(table=torch.randn(2, 30)), make_drop(0.2, 2)
    want, right = define(q, k, v, mask, bias, drop), run(q, k, v, mask, bias, drop, config=SMALL)
    other = make_drop(0.2, 2, head_offset=0)
    plain_mask = Mask(query_documents=ours, key_documents=ours)
    assert bias.table is not None
    stale = right[0].clone()
    stale[:, :, 64:] = right[0][:, :, 32:68]
    wrong = {
        "zeros": torch.zeros_like(right[0]),
        "shifted by one token": right[0].roll(1, 2),
        "a stale tile": stale,
        "heads swapped": right[0].flip(1),
        "without the bias": run(q, k, v, mask, None, drop)[0],
        "bias off by one": run(q, k, v, mask, Toeplitz(table=bias.table, least=1), drop)[0],
        "without dropout": run(q, k, v, mask, bias)[0],
        "dropout of other heads": run(q, k, v, mask, bias, other)[0],
        "window ignored": run(q, k, v, plain_mask, bias, drop)[0],
        "documents ignored": run(q, k, v, Mask(window=10), bias, drop)[0],
        "sees the next token": run(q, k, v, Mask(True, 1, 0, ours, ours, 10), bias, drop)[0],
        "scale forgotten": run(q, k, v, mask, bias, drop, scale=1.0)[0],
        "rows not divided by their sum": right[0] * right[1].exp().nan_to_num(posinf=0)[..., None],
    }
    for tolerance in (1e-6, 5e-3):
        check(assert_close, right, want, tolerance)
        for name, output in wrong.items():
            with pytest.raises(AssertionError, match=f"{name}: relative rms error"):
                assert_close(output, want[0], tolerance, name)
        with pytest.raises(AssertionError, match="lse"):
            check(assert_close, (right[0], right[1] + 0.1), want, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_visible_changes_no_bit(dtype):
    q, k, v = make_inputs(1, 2, 2, 100, 100, dtype=dtype)
    before = run(q, k, v, Mask(), config=SMALL)[0]
    for token in (1, 32, 70):
        other_k, other_v = k.clone(), v.clone()
        for x in (other_k, other_v):
            x[:, :, token:] = 100 * torch.randn_like(x[:, :, token:])
        after = run(q, other_k, other_v, Mask(), config=SMALL)[0]
        assert torch.equal(before[:, :, :token], after[:, :, :token])
        assert not torch.equal(before[:, :, token], after[:, :, token])


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(queries, keys):
    out, lse = run(*make_inputs(queries=queries, keys=keys), Mask(causal=False))
    assert out.shape == (2, 2, queries, 16)
    assert not out.any()
    assert (lse == -float("inf")).all()


@pytest.mark.parametrize("name", ["causal", "documents", "documents, not causal"])
def test_nothing_waits_for_the_device(name, monkeypatch):
    """Fake tensors have no values: whatever the host wanted to read would raise."""
    monkeypatch.undo()
    mask, launched = MASKS[name](100, 100), []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(grid)

    monkeypatch.setattr(triton, "attention_fwd_kernel", Kernel())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors: dict[str, Any] = {n: mode.from_tensor(x) for n, x in vars(mask).items() if isinstance(x, Tensor)}
        fake = Mask(**(vars(mask) | tensors))
        q, k, v = (mode.from_tensor(t) for t in make_inputs())
        terms = BiasTerms(table=mode.from_tensor(torch.randn(2, 30)))
        out, lse = attention_forward(q, k, v, terms, fake, 0.25, make_drop(0.1, 2))
    assert launched
    assert out.shape == (2, 2, 100, 16)
    assert lse.shape == (2, 2, 100)
