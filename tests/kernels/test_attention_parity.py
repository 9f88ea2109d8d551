"""Attention against Hugging Face's BLOOM, MPT, T5, DeBERTa, BigBird, GPT-NeoX and RoFormer, given the same weights.

Largest difference over largest value: 1e-5 in fp32, 1e-9 in fp64.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels.attention import (
    BlockLayout,
    Disentangled,
    Mask,
    Rotary,
    Toeplitz,
    alibi_slopes,
    attention,
    deberta_rows,
    dispatch,
    rotary_angles,
    rotary_frequencies,
    rotate,
    t5_bucket,
)

pytest.importorskip("transformers", reason="Hugging Face's models are the oracle here")
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-9}
both_dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=str)


@pytest.fixture(autouse=True, params=["in memory", "chunked"])
def form(request, monkeypatch) -> str:
    """Every module is compared with both torch forms."""
    if request.param == "chunked":
        monkeypatch.setattr(dispatch, "MASK_PAIRS", 0)
    return request.param


def assert_same(ours: Tensor, theirs: Tensor, dtype: torch.dtype, name: str = "value") -> None:
    """The rule of this file; zeros or a shift would fail it, as theirs is of the order of 1."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == dtype
    largest = theirs.abs().max()
    assert largest > 1e-3, f"{name}: nothing to compare with"
    error = ((ours - theirs).abs().max() / largest).item()
    assert error <= LIMITS[dtype], f"{name}: {error:.1e} of the largest value"
    assert not (ours - theirs.roll(1, -2)).abs().max() / largest <= 1e-2, f"{name}: the same in every row"


def split(x: Tensor, heads: int) -> Tensor:
    """(batch, length, width) -> (batch, head, length, dim)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """The inverse of `split`."""
    return x.transpose(1, 2).flatten(2)


def gradients(ours: Tensor, theirs: Tensor, wrt: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    weights = torch.randn_like(ours)
    pairs = (torch.autograd.grad((x * weights).sum(), wrt, retain_graph=True) for x in (ours, theirs))
    return list(zip(*pairs, strict=True))


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12, 16, 20, 25])
def test_alibi_slopes_are_those_of_bloom_and_mpt(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bloom = build_alibi_tensor(torch.ones(1, 30), heads, torch.float32).view(heads, 30)
    mpt = build_mpt_alibi_tensor(heads, 30)[:, 0]
    slopes = alibi_slopes(heads)[:, None]
    # BLOOM adds slope * column, MPT -slope * (columns from the last): a row's constants away from -slope * distance.
    torch.testing.assert_close(slopes * torch.arange(30.0), bloom, rtol=1e-6, atol=0)
    torch.testing.assert_close(-slopes * torch.arange(29, -1, -1.0), mpt, rtol=1e-6, atol=0)


@both_dtypes
@pytest.mark.parametrize("heads", [4, 6])
def test_alibi_attention_is_blooms(heads, dtype):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    q, k, v = (torch.randn(2, heads, 40, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    alibi = build_alibi_tensor(torch.ones(2, 40), heads, dtype).view(2, heads, 1, 40)
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    theirs = (q @ k.transpose(2, 3) / 4 + alibi).masked_fill(hidden, -math.inf).softmax(-1) @ v
    ours = attention(q, k, v, mask=Mask(), bias=Toeplitz(alibi_slopes(heads)))
    assert_same(ours, theirs, dtype)
    for mine, other in gradients(ours, theirs, (q, k, v)):
        assert_same(mine, other, dtype, "gradient")


def test_alibi_attention_is_mpts_module():
    from transformers import MptConfig
    from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

    module = MptAttention(MptConfig(d_model=48, n_heads=6)).eval()
    x = torch.randn(2, 40, 48)
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    theirs = module(x, build_mpt_alibi_tensor(6, 40), attention_mask=hidden)[0]
    q, k, v = (split(part, 6) for part in module.Wqkv(x).chunk(3, -1))
    ours = module.out_proj(joined(attention(q, k, v, mask=Mask(), bias=Toeplitz(alibi_slopes(6)))))
    assert_same(ours, theirs, torch.float32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (16, 40), (64, 256)])
def test_t5_buckets_are_hugging_faces(causal, buckets, furthest):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-1000, 1001)
    theirs = T5Attention._relative_position_bucket(-distance, not causal, buckets, furthest)
    assert torch.equal(t5_bucket(distance, buckets=buckets, furthest=furthest, causal=causal), theirs)


@both_dtypes
@pytest.mark.parametrize("causal", [True, False])
def test_t5_attention_is_hugging_faces_module(causal, dtype):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(d_model=32, d_kv=8, num_heads=4, dropout_rate=0.0, is_decoder=causal)
    config._attn_implementation = "eager"
    module = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).to(dtype).eval()
    learned = module.relative_attention_bias.weight
    x = torch.randn(2, 150, 32, dtype=dtype)
    hidden = torch.ones(150, 150, dtype=torch.bool).triu(1) if causal else torch.zeros(150, 150, dtype=torch.bool)
    theirs = module(x, mask=hidden.to(dtype)[None, None] * torch.finfo(dtype).min)[0]
    q, k, v = (split(layer(x), 4) for layer in (module.q, module.k, module.v))
    distance = torch.arange(-149, 150)
    table = learned[t5_bucket(distance, causal=causal)].T
    bias = Toeplitz(table=table, least=-149)
    ours = module.o(joined(attention(q, k, v, mask=Mask(causal=causal), bias=bias, scale=1.0)))
    assert_same(ours, theirs, dtype)
    wrt = (learned, module.q.weight, module.k.weight, module.v.weight)
    for mine, other in gradients(ours, theirs, wrt):
        # The table's gradient is a sum over all pairs: in fp32 its terms cancel to the last digits.
        assert ((mine - other).abs().max() / other.abs().max()).item() <= 10 * LIMITS[dtype]


@both_dtypes
@pytest.mark.parametrize("buckets", [-1, 16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kinds", [("c2p", "p2c"), ("c2p",), ("p2c",)], ids="|".join)
def test_disentangled_attention_is_debertas_module(kinds, shared, buckets, dtype):
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    heads, span = 4, 16 if buckets > 0 else 24
    options: dict[str, Any] = {
        "hidden_size": 48, "num_attention_heads": heads, "relative_attention": True, "pos_att_type": list(kinds),
        "share_att_key": shared, "position_buckets": buckets, "max_relative_positions": 60 if buckets > 0 else span,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    config = DebertaV2Config(**options)
    module = DisentangledSelfAttention(config).to(dtype).eval()
    x = torch.randn(2, 70, 48, dtype=dtype)
    embeddings = torch.randn(2 * span, 48, dtype=dtype, requires_grad=True)
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[1, 61:] = False
    theirs = module(x, valid[:, None, None, :], rel_embeddings=embeddings)[0]

    def project(name: str) -> Tensor:
        layer = getattr(module, f"{name}_proj" if shared else f"pos_{name}_proj")
        return layer(embeddings).unflatten(-1, (heads, -1)).transpose(0, 1)

    q, k, v = (split(layer(x), heads) for layer in (module.query_proj, module.key_proj, module.value_proj))
    rows, least = deberta_rows(span, buckets, 60) if buckets > 0 else deberta_rows(span)
    bias = Disentangled(
        project("key") if "c2p" in kinds else None, project("query") if "p2c" in kinds else None, rows, least
    )
    keys = torch.where(valid, 0, -1).int()
    mask = Mask(causal=False, query_documents=torch.zeros_like(keys), key_documents=keys)
    # As the module rounds it: the root is taken in fp32.
    scale = 1 / torch.tensor(12.0 * (1 + len(kinds))).sqrt().to(dtype).item()
    ours = joined(attention(q, k, v, mask=mask, bias=bias, scale=scale))
    assert_same(ours, theirs, dtype)
    for mine, other in gradients(ours, theirs, (embeddings, module.query_proj.weight, module.key_proj.weight)):
        assert_same(mine, other, dtype, "gradient")


@both_dtypes
def test_block_sparse_attention_is_bigbirds_module(dtype, monkeypatch):
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    size, blocks, heads = 8, 14, 3
    config = BigBirdConfig(hidden_size=24, num_attention_heads=heads, num_random_blocks=3, block_size=size)
    module = BigBirdBlockSparseAttention(config, seed=7).to(dtype).train()  # random blocks are drawn in training only
    drawn, draw = [], module._bigbird_block_rand_mask_with_head
    monkeypatch.setattr(module, "_bigbird_block_rand_mask_with_head", lambda **o: drawn.append(draw(**o)) or drawn[-1])
    x = torch.randn(2, size * blocks, 24, dtype=dtype)
    own, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(2, size * blocks).to(dtype), size
    )
    theirs = module(x, band, rows, columns, own, own)[0]

    seen = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    seen[:, [0, -1]] = seen[:, :, [0, -1]] = True
    for i in range(1, blocks - 1):
        seen[:, i, i - 1 : i + 2] = True
        for h in range(heads):
            seen[h, i, torch.tensor(drawn[0][h][i - 1])] = True
    assert seen.float().mean() < 0.8
    assert not torch.equal(seen[0], seen[1])
    q, k, v = (split(layer(x), heads) for layer in (module.query, module.key, module.value))
    mask = Mask(causal=False, layout=BlockLayout.from_dense(seen, size))
    ours = joined(attention(q, k, v, mask=mask))
    assert_same(ours, theirs, dtype)
    for mine, other in gradients(ours, theirs, (module.query.weight, module.key.weight, module.value.weight)):
        assert_same(mine, other, dtype, "gradient")
    without = Mask(causal=False, layout=BlockLayout.from_dense(seen[:1], size))
    with pytest.raises(AssertionError, match="of the largest value"):
        assert_same(joined(attention(q, k, v, mask=without)), theirs, dtype)


def test_rotary_is_gpt_neoxs():
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

    x, y = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16)
    positions = torch.stack([torch.arange(9), torch.arange(9) + 100])
    angles = rotary_angles(rotary_frequencies(16), positions)
    doubled = torch.cat([angles, angles], -1)[:, 0]
    theirs = apply_rotary_pos_emb(x, y, doubled.cos(), doubled.sin())
    for ours, other in ((x, theirs[0]), (y, theirs[1])):
        assert_same(rotate(ours, angles), other, torch.float32)


@both_dtypes
def test_rotary_attention_is_roformers_module(dtype):
    from transformers import RoFormerConfig
    from transformers.models.roformer.modeling_roformer import (
        RoFormerSelfAttention,
        RoFormerSinusoidalPositionalEmbedding,
    )

    config = RoFormerConfig(hidden_size=48, num_attention_heads=4, attention_probs_dropout_prob=0.0, rotary_value=False)
    module = RoFormerSelfAttention(config).to(dtype).eval()
    x = torch.randn(2, 50, 48, dtype=dtype)
    table = RoFormerSinusoidalPositionalEmbedding(64, 12)
    table.weight.data = table.create_weight()
    theirs = module(x, sinusoidal_pos=table((2, 50))[None, None].to(dtype))[0]
    q, k, v = (split(layer(x), 4) for layer in (module.query, module.key, module.value))
    positions = torch.arange(50)[None]
    rotary = Rotary(rotary_frequencies(12).double(), positions, positions, interleaved=True)
    ours = joined(attention(q, k, v, mask=Mask(causal=False), rotary=rotary))
    # The module's sines are in fp32 whatever it computes in.
    assert ours.dtype == theirs.dtype == dtype
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
