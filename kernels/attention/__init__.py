"""Softmax attention over described masks, biases and rotations."""

from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import Backend, resolve_backend
from ..dropout import DropoutKey
from .biases import (
    Bias,
    Disentangled,
    Toeplitz,
    alibi_slopes,
    bias_values,
    deberta_rows,
    resolve_bias,
    sandwich_table,
    t5_bucket,
)
from .masks import BlockLayout, Blocks, Mask, documents_from_lengths, padding_documents
from .reference import attention_reference
from .rotary import Rotary, rotary_angles, rotary_frequencies, rotate, xpos_log_decay

__all__ = [
    "Bias",
    "BlockLayout",
    "Blocks",
    "Decision",
    "Disentangled",
    "Mask",
    "Rotary",
    "Toeplitz",
    "alibi_slopes",
    "attention",
    "attention_reference",
    "deberta_rows",
    "documents_from_lengths",
    "padding_documents",
    "rotary_angles",
    "rotary_frequencies",
    "rotate",
    "sandwich_table",
    "t5_bucket",
    "xpos_log_decay",
]


@dataclass(frozen=True)
class Decision:
    """Which form `attention` runs and why: "sdpa_causal", "sdpa_full" and "sdpa_mask" are torch's fused kernel with
    its own causal mask, without a mask, and with a mask in memory; "plain" writes the scores out."""

    form: Literal["sdpa_causal", "sdpa_full", "sdpa_mask", "plain"]
    reason: str


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    bias: Bias | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_key: DropoutKey | None = None,
    head_offset: int = 0,
    return_lse: Literal[False] = False,
    backend: Backend = "auto",
    explain: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    bias: Bias | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_key: DropoutKey | None = None,
    head_offset: int = 0,
    return_lse: Literal[True],
    backend: Backend = "auto",
    explain: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    bias: Bias | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_key: DropoutKey | None = None,
    head_offset: int = 0,
    return_lse: bool = False,
    backend: Backend = "auto",
    explain: Literal[True],
) -> Decision: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    bias: Bias | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_key: DropoutKey | None = None,
    head_offset: int = 0,
    return_lse: bool = False,
    backend: Backend = "auto",
    explain: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | Decision:
    """softmax(scale q k^T + bias, masked) v.

    q: (batch, head, queries, dim); k: (batch, kv head, keys, dim); v: (batch, kv head, keys, value dim); kv heads
    divide heads (grouped-query attention: query head h reads kv head h // group).
    scale: None means dim^-0.5. dropout needs dropout_key; its bits depend on global head (`head_offset` + h), query and
    key positions (the mask's offsets). A query that sees no key gives 0 and zero gradients.

    Returns the output in q's dtype; with return_lse (out, lse) in fp32 (fp64 for fp64), lse (batch, head, queries),
    -inf where nothing is seen. With explain=True nothing is computed and the `Decision` is returned instead.
    Raises ValueError for shapes that do not fit, BackendUnavailableError for backend="triton".
    """
    resolve_backend(backend, "attention")
    _check(q, k, v, mask, bias, dropout, dropout_key)
    decision = _decide(q, k, mask, bias, dropout, return_lse)
    if explain:
        return decision
    if decision.form == "plain":
        out, lse = attention_reference(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            rotary=rotary,
            scale=scale,
            dropout=dropout,
            dropout_key=dropout_key,
            head_offset=head_offset,
        )
        return (out, lse) if return_lse else out.to(q.dtype)
    if rotary is not None:
        q, k = rotary.rotate_query(q), rotary.rotate_key(k)
    grouped = q.shape[1] != k.shape[1]
    if decision.form == "sdpa_mask":
        return _with_mask(q, k, v, mask, bias, scale, grouped)
    causal = decision.form == "sdpa_causal"
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)


def _decide(q: Tensor, k: Tensor, mask: Mask, bias: Bias | None, dropout: float, return_lse: bool) -> Decision:
    queries, keys = q.shape[2], k.shape[2]
    if dropout > 0:
        return Decision("plain", "dropout on the probabilities uses the counter-based mask")
    if return_lse:
        return Decision("plain", "torch's fused attention does not return the log-sum-exp")
    if bias is not None:
        return Decision("sdpa_mask", "the bias is added to the scores")
    if mask.hides_nothing(queries, keys):
        return Decision("sdpa_full", "every query sees every key")
    if mask.is_plain_causal():
        return Decision("sdpa_causal", "plain causal: query i sees keys 0..i")
    return Decision("sdpa_mask", "documents, a window, a prefix or an offset hide keys")


def _with_mask(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Bias | None, scale: float | None, grouped: bool
) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    visible = mask.visible(queries, keys, q.device)
    # A row without a key would be NaN in some of torch's forms: let it see everything, then blank it.
    blank = ~visible.any(-1, keepdim=True)
    allowed = visible | blank
    if bias is not None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        own = q.shape[3] ** -0.5 if scale is None else scale
        rows, columns = (torch.arange(n, device=q.device) for n in (queries, keys))
        terms = resolve_bias(bias, q, k, own)
        scores = bias_values(terms, rows + mask.query_offset, columns + mask.key_offset, wide)
        allowed = torch.where(allowed, scores, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=grouped)
    return torch.where(blank, 0, out)


def _check(q, k, v, mask: Mask, bias: Bias | None, dropout: float, dropout_key: DropoutKey | None) -> None:
    if not (q.dim() == k.dim() == v.dim() == 4):
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"attention: q, k, v must be (batch, head, length, dim), got {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"attention: shapes do not fit: {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {k.shape[1]} key-value heads do not divide {q.shape[1]} heads")
    if bias is not None and bias.heads != q.shape[1]:
        raise ValueError(f"attention: bias is of {bias.heads} heads, q has {q.shape[1]}")
    for name, documents, length in (
        ("query_documents", mask.query_documents, q.shape[2]),
        ("key_documents", mask.key_documents, k.shape[2]),
    ):
        if documents is not None and documents.shape != (q.shape[0], length):
            expected = (q.shape[0], length)
            raise ValueError(f"attention: mask.{name} has shape {tuple(documents.shape)}, expected {expected}")
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout must satisfy 0 <= dropout < 1, got {dropout!r}")
    if dropout > 0 and dropout_key is None:
        raise ValueError("attention: dropout > 0 needs dropout_key (its mask is a function of the key, not of a seed)")
