"""Attention: every form that the CPU takes against a brute-force loop, what is decided, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from potamos.kernels.attention import (
    BlockLayout,
    Decision,
    Disentangled,
    Mask,
    Rotary,
    Toeplitz,
    alibi_slopes,
    attention,
    attention_reference,
    deberta_rows,
    dispatch,
    rotary_angles,
    rotary_frequencies,
    rotate,
)
from potamos.kernels.backend import BackendUnavailableError
from potamos.kernels.dropout import DropoutKey, attention_keep_mask

DOCUMENTS = torch.tensor([[3] * 10 + [4] * 20 + [-1] * 7, [7] * 36 + [8]], dtype=torch.int32)
MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window": Mask(window=5),
    "both-sided window": Mask(causal=False, window=4),
    "prefix": Mask(prefix=7),
    "prefix per row": Mask(prefix=torch.tensor([3, 20]), window=6),
    "documents": Mask(query_documents=DOCUMENTS, key_documents=DOCUMENTS),
    "documents, both directions": Mask(causal=False, query_documents=DOCUMENTS, key_documents=DOCUMENTS),
    "later queries": Mask(query_offset=40),
    "some queries before every key": Mask(key_offset=5),
}


def inputs(heads: int = 4, kv_heads: int = 4, queries: int = 37, keys: int = 37, dim: int = 8, dtype=torch.float64):
    q = torch.randn(2, heads, queries, dim, dtype=torch.float64).to(dtype).requires_grad_()
    k, v = (torch.randn(2, kv_heads, keys, dim, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2))
    return q, k, v


def brute_force(q: Tensor, k: Tensor, v: Tensor, mask: Mask, slopes: Tensor | None = None) -> Tensor:
    """One query at a time, one `if` per rule of the mask."""
    batch, heads, queries, dim = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=q.dtype)
    for b in range(batch):
        for i in range(queries):
            at = i + mask.query_offset
            seen = []
            for j in range(k.shape[2]):
                key = j + mask.key_offset
                ok = (not mask.causal or key <= at) and (mask.window is None or abs(at - key) < mask.window)
                if mask.prefix is not None:
                    ok = ok or key < (mask.prefix if isinstance(mask.prefix, int) else int(mask.prefix[b]))
                if mask.query_documents is not None and mask.key_documents is not None:
                    ok = ok and mask.query_documents[b, i] == mask.key_documents[b, j] != -1
                if ok:
                    seen.append(j)
            for h in range(heads if seen else 0):
                scores = k[b, h // group, seen] @ q[b, h, i] / math.sqrt(dim)
                if slopes is not None:
                    scores = scores - slopes[h] * (at - mask.key_offset - torch.tensor(seen)).abs()
                out[b, h, i] = scores.softmax(0) @ v[b, h // group, seen]
    return out


def gradients(out: Tensor, wrt: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((out.double() * weights).sum(), wrt)


@pytest.fixture(params=["in memory", "chunked"])
def form(request, monkeypatch) -> str:
    """Small calls go to torch's fused attention with the mask in memory, unless that is forbidden."""
    if request.param == "chunked":
        monkeypatch.setattr(dispatch, "MASK_PAIRS", 0)
    return request.param


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_every_form_is_the_definition(name, alibi, kv_heads, form, assert_close):
    mask = MASKS[name]
    q, k, v = inputs(kv_heads=kv_heads)
    slopes = alibi_slopes(4).double() if alibi else None
    bias = None if slopes is None else Toeplitz(slopes)
    with torch.no_grad():
        want = brute_force(q, k, v, mask, slopes)
    plain, lse = attention_reference(q, k, v, mask=mask, bias=bias)
    fast = attention(q, k, v, mask=mask, bias=bias)
    assert_close(plain, want, 1e-10, "reference")
    assert_close(fast, want, 1e-10, "fast")
    out, same_lse = attention(q, k, v, mask=mask, bias=bias, return_lse=True)
    assert_close(out, want, 1e-10, "beside the log-sum-exp")
    assert torch.allclose(same_lse, lse, rtol=1e-12)
    for ours, theirs in zip(gradients(fast, (q, k, v)), gradients(plain, (q, k, v)), strict=True):
        assert_close(ours, theirs, 1e-10, "gradient")


def test_a_row_without_keys_is_zero_with_zero_gradients(form):
    for mask in (MASKS["documents"], MASKS["some queries before every key"]):
        for operation in (attention, lambda *x, **y: attention_reference(*x, **y)[0]):
            q, k, v = inputs(dtype=torch.float32)
            out = operation(q, k, v, mask=mask)
            empty = ~mask.visible(37, 37, torch.device("cpu")).any(-1).expand(2, 1, 37)
            assert empty.any()
            rows = empty[:, 0]
            assert not out.transpose(1, 2)[rows].any()
            grad_q, grad_k, grad_v = gradients(out, (q, k, v))
            assert all(g.isfinite().all() and g.any() for g in (grad_q, grad_k, grad_v))
            assert not grad_q.transpose(1, 2)[rows].any()
    lse = attention(q, k, v, mask=mask, return_lse=True)[1]
    assert torch.equal(lse == -math.inf, empty.expand(2, 4, 37))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "documents"])
def test_precisions(name, dtype, form, assert_close):
    q, k, v = inputs(dtype=dtype, dim=32)
    wide = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    want = attention_reference(*wide, mask=MASKS[name])[0]
    half = dtype == torch.bfloat16
    for bias in (None, Toeplitz(alibi_slopes(4))):
        want = attention_reference(*wide, mask=MASKS[name], bias=bias)[0]
        out = attention(q, k, v, mask=MASKS[name], bias=bias)
        assert out.dtype == dtype
        assert_close(out, want, 5e-3 if half else 1e-6, "out")
        for ours, theirs in zip(gradients(out, (q, k, v)), gradients(want, wide), strict=True):
            assert_close(ours, theirs, 1e-2 if half else 1e-5, "gradient")
    assert attention(q, k, v, mask=MASKS[name], return_lse=True)[0].dtype == torch.float32


def test_the_comparison_refuses_typical_bugs(assert_close):
    q, k, v = inputs()
    mask = MASKS["documents"]
    want, _ = attention_reference(q, k, v, mask=mask)
    wrong = {
        "zeros": torch.zeros_like(want),
        "shifted": want.roll(1, 2),
        "documents ignored": attention(q, k, v, mask=Mask()),
        "not causal": attention(q, k, v, mask=MASKS["documents, both directions"]),
        "no scale": attention(q, k, v, mask=mask, scale=1.0),
        "biased": attention(q, k, v, mask=mask, bias=Toeplitz(alibi_slopes(4))),
    }
    for name, output in wrong.items():
        with pytest.raises(AssertionError, match="relative rms error"):
            assert_close(output, want, 5e-3, name)


def test_other_documents_change_no_bit(form, assert_close):
    mask = MASKS["documents"]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out = attention(q, k, v, mask=mask)
        mine = out[0, :, 10:30]
        return mine, *torch.autograd.grad((mine * torch.arange(20)[:, None]).sum(), (q, k, v))

    original = inputs(dtype=torch.float32)
    changed = tuple((100 * torch.randn_like(x)).detach() for x in original)
    for new, old in zip(changed, original, strict=True):
        new[0, :, 10:30] = old.detach()[0, :, 10:30]
    before, after = run(*original), run(*(x.requires_grad_() for x in changed))
    for ours, theirs in zip(before, after, strict=True):
        assert torch.equal(ours, theirs)
    for gradient in before[1:]:
        assert not gradient[:, :, :10].any()
        assert not gradient[:, :, 30:].any()
    alone = attention(*(x[:1, :, 10:30] for x in original), mask=Mask())[0]
    assert_close(before[0], alone, 1e-6)


@pytest.mark.parametrize("alibi", [False, True])
def test_a_cache_and_a_shard_are_served_by_offsets(alibi, form, assert_close):
    q, k, v = inputs(kv_heads=2)
    slopes = alibi_slopes(4).double()

    def call(begin: int, end: int, first_key: int, last_key: int) -> Tensor:
        ours, theirs = DOCUMENTS[:, begin:end], DOCUMENTS[:, first_key:last_key]
        return attention(
            q[:, :, begin:end],
            k[:, :, first_key:last_key],
            v[:, :, first_key:last_key],
            mask=Mask(query_offset=begin, key_offset=first_key, query_documents=ours, key_documents=theirs),
            bias=Toeplitz(slopes) if alibi else None,
        )

    whole = call(0, 37, 0, 37)
    assert_close(torch.cat([call(t, t + 1, 0, t + 1) for t in range(37)], 2), whole, 1e-10, "cache")
    assert_close(call(12, 30, 0, 37), whole[:, :, 12:30], 1e-10, "shard")
    row = call(12, 30, 10, 30)[:1]  # row 0's document begins at key 10: nothing earlier matters
    assert_close(row, whole[:1, :, 12:30], 1e-10, "keys from an offset")


def test_dispatch_says_what_it_runs():
    q, k, v = inputs()
    key = DropoutKey(0, "attention", 0, 0, torch.arange(2))
    forms = {
        "causal": "sdpa_causal",
        "full": "sdpa_full",
        "later queries": "sdpa_full",
        "documents": "sdpa_mask",
        "window": "sdpa_mask",
    }
    for name, form in forms.items():
        decision = attention(q, k, v, mask=MASKS[name], explain=True)
        assert isinstance(decision, Decision)
        assert decision.form == form
    assert attention(q, k, v, mask=Mask(), bias=Toeplitz(alibi_slopes(4)), explain=True).form == "sdpa_mask"
    assert attention(q, k, v, mask=Mask(), dropout=0.1, dropout_key=key, explain=True).form == "chunked"
    assert attention(q, k, v, mask=Mask(), return_lse=True, explain=True).form == "chunked"
    # torch's kernel would write the scores out for values of another width.
    assert attention(q, k, v[..., :5], mask=MASKS["full"], explain=True).form == "sdpa_mask"
    one, many = torch.empty(1, 1, 1, 8), torch.empty(1, 1, 5000, 8)
    assert attention(one, many, many, mask=MASKS["window"], explain=True).form == "sdpa_mask"
    assert attention(many, many, many, mask=MASKS["window"], explain=True).form == "chunked"
    assert attention(many, many, many[..., :5], mask=Mask(), explain=True).form == "chunked"
    batch = torch.empty(600, 8, 128, 8)
    ids = torch.zeros(600, 128, dtype=torch.int32)
    documents = Mask(query_documents=ids, key_documents=ids)
    assert (
        attention(batch, batch, batch, mask=documents, bias=Toeplitz(alibi_slopes(8)), explain=True).form == "chunked"
    )


def test_decisions_are_logged_once(caplog):
    q, k, v = inputs()
    dispatch._announce.cache_clear()
    with caplog.at_level("INFO", logger="potamos.kernels.attention"):
        for _ in range(3):
            attention(q, k, v, mask=Mask())
            attention(q, k, v, mask=MASKS["window"])
            attention(q, k, v, mask=MASKS["documents"], return_lse=True)
            attention(q, k, v, mask=MASKS["documents"], explain=True)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in messages] == [
        "attention runs as sdpa_causal",
        "attention runs as sdpa_mask",
        "attention runs as chunked",
    ]


def test_autocast_changes_nothing_inside(form):
    q, k, v = inputs(dtype=torch.float32)
    for mask in (MASKS["causal"], MASKS["documents"]):
        want = attention(q, k, v, mask=mask, bias=Toeplitz(alibi_slopes(4)))
        with torch.autocast("cpu", torch.bfloat16):
            got = attention(q, k, v, mask=mask, bias=Toeplitz(alibi_slopes(4)))
        assert torch.equal(got, want)


def test_dropout_is_the_counter_based_mask(assert_close):
    q, k, v = inputs(dtype=torch.float32)
    key = DropoutKey(0, "attention", 4, 1, torch.tensor([8, 3]))
    out = attention(q, k, v, mask=Mask(), dropout=0.3, dropout_key=key)
    scores = (q @ k.transpose(2, 3) / math.sqrt(8)).masked_fill(~Mask().visible(37, 37, q.device), -math.inf)
    keep = attention_keep_mask((2, 4, 37, 37), 0.3, key=key)
    assert_close(out, (scores.softmax(-1) * keep / 0.7) @ v, 1e-6)
    shard = attention(
        q[:, 2:, 20:],
        k[:, 2:],
        v[:, 2:],
        mask=Mask(query_offset=20),
        dropout=0.3,
        dropout_key=key,
        head_offset=2,
    )
    assert_close(shard, out[:, 2:, 20:], 1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotary_scores_depend_on_distance_only(interleaved, fraction, assert_close):
    q, k, v = inputs()
    frequencies = rotary_frequencies(8, fraction=fraction).double()
    assert len(frequencies) == 4 * fraction

    def call(shift: int, key_shift: int = 0) -> Tensor:
        queries = torch.arange(37)[None] + shift
        return attention(q, k, v, mask=Mask(), rotary=Rotary(frequencies, queries, queries + key_shift, interleaved))

    assert_close(call(1000), call(0), 1e-10)
    for wrong in (call(0, 1), attention(q, k, v, mask=Mask())):
        with pytest.raises(AssertionError, match="relative rms error"):
            assert_close(wrong, call(0), 1e-3)


def test_rotated_keys_can_be_cached(assert_close):
    q, k, v = inputs()
    frequencies, positions = rotary_frequencies(8).double(), torch.arange(37)[None]
    whole = attention(q, k, v, mask=Mask(), rotary=Rotary(frequencies, positions, positions))
    cached = rotate(k, rotary_angles(frequencies, positions))
    one = attention(
        q[:, :, 30:31],
        cached[:, :, :31],
        v[:, :, :31],
        mask=Mask(query_offset=30),
        rotary=Rotary(frequencies, positions[:, 30:31], None),
    )
    assert_close(one, whole[:, :, 30:31], 1e-10)


def test_bad_arguments_are_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="3 key-value heads do not divide 4 heads"):
        attention(q, k[:, :3], v[:, :3], mask=Mask())
    with pytest.raises(ValueError, match="needs dropout_key"):
        attention(q, k, v, mask=Mask(), dropout=0.1)
    with pytest.raises(ValueError, match="slopes"):
        attention(q, k, v, mask=Mask(), bias=Toeplitz(alibi_slopes(3)))
    with pytest.raises(ValueError, match="together"):
        Mask(query_documents=DOCUMENTS)
    with pytest.raises(ValueError, match="window=0"):
        Mask(window=0)
    with pytest.raises(ValueError, match=r"query_documents has shape \(2, 36\)"):
        attention(q, k, v, mask=Mask(query_documents=DOCUMENTS[:, 1:], key_documents=DOCUMENTS))
    with pytest.raises(ValueError, match="even number"):
        rotary_frequencies(10, fraction=0.5)
    with pytest.raises(ValueError, match="prefix has shape"):
        attention(q, k, v, mask=Mask(prefix=torch.tensor([1, 2, 3])))
    with pytest.raises(ValueError, match=r"query_positions has shape \(2, 36\)"):
        attention(q, k, v, mask=Mask(query_positions=DOCUMENTS[:, 1:], key_positions=DOCUMENTS))
    layout = BlockLayout.from_dense(torch.ones(3, 5, 5, dtype=torch.bool), 8)
    with pytest.raises(ValueError, match="3 heads and 5 query blocks"):
        attention(q, k, v, mask=Mask(layout=layout))
    with pytest.raises(ValueError, match="at least 6 blocks of 8 columns"):
        attention(q, k, v, mask=Mask(layout=BlockLayout(8, layout.counts[:1], layout.indices[:1]), query_offset=9))
    with pytest.raises(ValueError, match=r"one floating-point dtype, .*k .*float32"):
        attention(q, k.float(), v, mask=Mask())
    with pytest.raises(ValueError, match="none zero"):
        attention(q, k[:, :, :0], v[:, :, :0], mask=Mask())
    rows, least = deberta_rows(4)
    with pytest.raises(ValueError, match="q has dim 8"):
        attention(q, k, v, mask=Mask(), bias=Disentangled(torch.ones(4, 8, 7), None, rows, least))


def test_the_triton_kernels_say_what_they_cannot_take():
    q, k, v = inputs()
    with pytest.raises(BackendUnavailableError, match="takes fp32, fp16 or bf16"):
        attention(q, k, v, mask=Mask(), backend="triton")
    with pytest.raises(BackendUnavailableError, match="values of the queries' dimension, 8, not 5"):
        attention(q, k, v[..., :5], mask=Mask(), backend="triton")
    wide = torch.empty(1, 1, 4, 257)
    with pytest.raises(BackendUnavailableError, match="head dimensions up to 256, not 257"):
        attention(wide, wide, wide, mask=Mask(), backend="triton")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        attention(q, k, v, mask=Mask(), backend="cuda")  # type: ignore[arg-type]
