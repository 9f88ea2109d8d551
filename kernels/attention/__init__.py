"""Softmax attention over described masks, biases and rotations."""

from typing import Literal, overload

import torch
from torch import Tensor

from ..backend import Backend, own_precision
from ..dropout import DropoutKey
from .biases import (
    Bias,
    BiasTerms,
    Disentangled,
    Toeplitz,
    alibi_slopes,
    deberta_rows,
    resolve_bias,
    resolve_row,
    sandwich_table,
    t5_bucket,
)
from .dispatch import Decision, announce, decide, form_of, run_fused
from .function import Drop, Form, attend
from .library import traced_attend
from .masks import BlockLayout, Blocks, Mask, documents_from_lengths, padding_documents
from .merge import merge
from .reference import attention_reference
from .rotary import Rotary, rotary_angles, rotary_frequencies, rotate, xpos_log_decay

__all__ = [
    "Bias",
    "BiasTerms",
    "BlockLayout",
    "Blocks",
    "Decision",
    "Disentangled",
    "Drop",
    "DropoutKey",
    "Form",
    "Mask",
    "Rotary",
    "Toeplitz",
    "alibi_slopes",
    "attention",
    "attention_reference",
    "deberta_rows",
    "decide",
    "documents_from_lengths",
    "form_of",
    "merge",
    "padding_documents",
    "resolve_bias",
    "rotary_angles",
    "rotary_frequencies",
    "rotate",
    "sandwich_table",
    "t5_bucket",
    "xpos_log_decay",
]


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

    q: (batch, head, queries, dim); k: (batch, kv head, keys, dim); v: (batch, kv head, keys, value dim); one dtype; kv
    heads divide heads (grouped-query attention: query head h reads kv head h // group).
    scale: None means dim^-0.5. dropout needs dropout_key; its bits depend on global head (`head_offset` + h), query and
    key positions (the mask's offsets). A query that sees no key gives 0 and zero gradients.

    Returns the output in q's dtype; with return_lse (out, lse) in fp32 (fp64 for fp64), lse (batch, head, queries),
    the natural log of the sum of exponentials, -inf where nothing is seen: what `merge` joins. Memory is linear in
    length, forward and backward, in every form; gradients reach q, k, v and the tensors of `bias` except slopes.

    backend: "auto" takes torch's fused attention where the mask is plain and there is no bias, dropout or lse (cuDNN or
    FlashAttention on CUDA); else Triton on CUDA devices for fp32, fp16, bf16 and head dimensions up to 256; else plain
    torch in chunks, or on the CPU, where all is small, torch's fused attention with the mask in memory. With
    explain=True nothing is computed and the `Decision` is returned; each new one is logged once at INFO.
    Autocast changes nothing inside.
    Raises ValueError for shapes that do not fit, BackendUnavailableError for backend="triton" where it cannot run.
    """
    _check(q, k, v, mask, bias, dropout, dropout_key)
    decision = decide(q, k, v, mask, bias, dropout, return_lse, backend)
    if explain:
        return decision
    announce(decision)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    with own_precision(q):
        if rotary is not None:
            q, k = rotary.rotate_query(q), rotary.rotate_key(k)
        if isinstance(bias, Disentangled) and q.shape[2] == 1:
            terms = resolve_row(bias, q, k, factor, mask.query_offset - mask.key_offset)
        else:
            terms = resolve_bias(bias, q, k, factor)
        if decision.form not in ("chunked", "triton"):
            return run_fused(decision, q, k, v, mask, terms, factor)
        drop = Drop(dropout, dropout_key, head_offset) if dropout_key is not None and dropout > 0 else None
        if torch.compiler.is_compiling():
            out, lse = traced_attend(decision.form, q, k, v, terms, mask, factor, drop, return_lse)
        else:
            out, lse = attend(form_of(decision), q, k, v, terms, mask, factor, drop, return_lse)
    return (out, lse) if return_lse else out


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Bias | None, dropout: float, dropout_key: DropoutKey | None
) -> None:
    """Refuse what does not fit together."""
    if not (q.dim() == k.dim() == v.dim() == 4) or 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"attention: q, k, v must be (batch, head, length, dim), none zero, got {_described(q, k, v)}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: shapes do not fit: {_described(q, k, v)}")
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.is_floating_point():
        given = _described(q, k, v)
        raise ValueError(f"attention: q, k and v must have one floating-point dtype, got {given}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {k.shape[1]} key-value heads do not divide {q.shape[1]} heads")
    if bias is not None:
        _check_bias(q, bias)
    _check_mask(q, k, mask)
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout must satisfy 0 <= dropout < 1, got {dropout!r}")
    if dropout > 0 and dropout_key is None:
        raise ValueError("attention: dropout > 0 needs dropout_key (its mask is a function of the key, not of a seed)")


def _described(q: Tensor, k: Tensor, v: Tensor) -> str:
    return ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in (("q", q), ("k", k), ("v", v)))


def _check_bias(q: Tensor, bias: Bias) -> None:
    if bias.heads != q.shape[1]:
        kind = "bias" if isinstance(bias, Disentangled) else "table" if bias.slopes is None else "slopes"
        raise ValueError(f"attention: {kind} of {bias.heads} heads, q has {q.shape[1]}")
    if isinstance(bias, Disentangled):
        for name, x in (("position_keys", bias.position_keys), ("position_queries", bias.position_queries)):
            if x is not None and x.shape[2] != q.shape[3]:
                raise ValueError(f"attention: bias.{name} has shape {tuple(x.shape)}, q has dim {q.shape[3]}")


def _check_mask(q: Tensor, k: Tensor, mask: Mask) -> None:
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    for name, length in (
        ("query_documents", queries),
        ("key_documents", keys),
        ("query_positions", queries),
        ("key_positions", keys),
    ):
        x = getattr(mask, name)
        if x is not None and x.shape != (batch, length):
            raise ValueError(f"attention: mask.{name} has shape {tuple(x.shape)}, expected {(batch, length)}")
    if isinstance(mask.prefix, Tensor) and mask.prefix.shape != (batch,):
        raise ValueError(f"attention: mask.prefix has shape {tuple(mask.prefix.shape)}, expected {(batch,)}")
    if mask.layout is not None:
        have, rows = mask.layout.counts.shape
        need = (mask.query_offset + queries - 1) // mask.layout.size + 1
        if have not in (1, heads) or rows < need:
            raise ValueError(
                f"attention: mask.layout is of {have} heads and {rows} query blocks, expected 1 or {heads} heads and "
                f"at least {need} blocks of {mask.layout.size} columns"
            )
