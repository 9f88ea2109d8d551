"""Gradients of attention in Triton: queries in one kernel, keys and values in another, no atomics.

With p = exp(s - lse) of the biased scores s, o the output and g its gradient, per query i and key j:

    dv_j = sum_i p_ij g_i,   ds_ij = p_ij (g_i . v_j - delta_i),   delta_i = g_i . o_i - grad_lse_i
    dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i

Both kernels compute p again from the log-sum-exp, so that extra memory is O(length). A program of the first owns a tile
of queries of one head, a program of the second a tile of keys and, one after another, all query heads that share it;
each adds up in registers and writes once: two runs agree bitwise. Dropout multiplies p by keep / (1 - p_drop) where it
meets g and v; delta, made from the dropped output, stays as it is.

out and lse may be those of a merge, with keys here only a part of the keys attended to.
Sources: Dao et al. 2022 (FlashAttention), appendix B.4; Dao 2023 (FlashAttention-2), section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .biases import BiasTerms
from .function import Drop, Gradients
from .masks import Mask
from .tiles import Visits, key_visits, query_visits
from .triton import Config, _ceil, padded_dim
from .triton_backward_configurations import HOPPER, choose_dkv, choose_dq, choose_dtable, weigh
from .triton_backward_kernels import attention_dkv_kernel, attention_dq_kernel, delta_kernel
from .triton_bias_backward import find_segments, sum_rows, table_gradient
from .triton_tiles import tile_arguments

_delta_kernel: Any = delta_kernel
BAND_BYTES = 2**28
"""Most memory for the score gradients by distance of a disentangled bias; more go through the batch in pieces."""
DELTA_ELEMENTS = 4096


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    terms: BiasTerms,
    mask: Mask,
    scale: float,
    drop: Drop | None,
    needs: tuple[bool, ...],
) -> Gradients:
    """Gradients of (q, k, v, table, content, position), each in its dtype, None where `needs` is False.

    q, out, grad_out: (batch, head, queries, dim), k, v: (batch, kv head, keys, dim); q, k, v of one dtype of fp32, fp16
    and bf16, out and grad_out of that dtype or fp32; any strides; dim at most 256. lse, grad_lse: (batch, head,
    queries) fp32, natural log. Products run in q's dtype, sums and all else in fp32. Deterministic.
    """
    if 0 in (*q.shape[:3], k.shape[2]):
        given = zip((q, k, v, terms.table, terms.content, terms.position), needs, strict=True)
        return tuple(torch.zeros_like(x) if need and x is not None else None for x, need in given)  # type: ignore[return-value]
    dq, dk, dv = (_like(x) if need else None for x, need in zip((q, k, v), needs[:3], strict=True))
    q, k, v, grad_out, out = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, grad_out, out))
    normalizer, delta = _row_statistics(grad_out, grad_lse, out, lse)
    call = _Call(q, k, v, grad_out, normalizer, delta, terms, mask, scale, drop)
    dtable = None
    if needs[3] and terms.table is not None:
        config = choose_dtable(q.dtype, q.shape[3])
        shared = call.arguments | {"batch": len(q)}
        dtable = table_gradient(mask, q.shape[2], k.shape[2], terms.table, terms.least, shared, config)
    dcontent, dposition = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need and x is not None else None
        for x, need in zip((terms.content, terms.position), needs[4:], strict=True)
    )
    if dq is not None or dcontent is not None:
        call.query_gradients(dq, dcontent)
    if dk is not None or dv is not None or dposition is not None:
        call.key_gradients(dk, dv, dposition)
    return dq, dk, dv, dtable, dcontent, dposition


class _Call:
    """One call's tensors and numbers, as the arguments that all its kernels share."""

    def __init__(self, q, k, v, grad, normalizer, delta, terms: BiasTerms, mask: Mask, scale: float, drop) -> None:
        (self.batch, self.heads, self.queries, dim), self.keys, self.mask = q.shape, k.shape[2], mask
        self.q, self.kv_heads, self.rows = q, k.shape[1], terms.rows
        # Every tile of keys starts on a multiple of 16.
        shared = tile_arguments(mask, terms, drop, self.keys, q.device, key_tile=16)
        self.weight, self.shared = weigh(shared.flags), HOPPER
        if q.is_cuda:
            self.shared = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
        self.arguments: dict[str, Any] = shared.values | shared.flags
        self.arguments |= {"Q_": q, "K_": k, "V_": v, "GRAD_": grad, "NORMALIZER_": normalizer, "DELTA_": delta}
        for name, x in (("q", q), ("k", k), ("v", v), ("grad", grad)):
            self.arguments |= _strides(name, x)
        self.arguments |= {
            "heads": self.heads, "group": self.heads // self.kv_heads, "queries": self.queries, "keys": self.keys,
            "scale": scale, "rescale": 1.0 if drop is None else 1 / (1 - drop.p), "DIM": dim, "WIDTH": padded_dim(dim),
        }  # fmt: skip

    def query_gradients(self, dq: Tensor | None, dcontent: Tensor | None) -> None:
        """Fill dq and dcontent, those that are there."""
        config = choose_dq(self.q.dtype, self.q.shape[3], self.weight, self.shared)
        visits = query_visits(self.mask, self.queries, self.keys, config.block_m, config.block_n, self.q.device)
        own = {"DQ_": dq, "NEED_Q": dq is not None} | _strides("dq", dq)
        tiles = _ceil(self.queries, config.block_m)
        self._launch(attention_dq_kernel, own, config, visits, tiles, self.heads, dcontent)

    def key_gradients(self, dk: Tensor | None, dv: Tensor | None, dposition: Tensor | None) -> None:
        """Fill dk, dv and dposition, those that are there."""
        config = choose_dkv(self.q.dtype, self.q.shape[3], self.weight, self.shared)
        visits = key_visits(self.mask, self.queries, self.keys, config.block_m, config.block_n, self.q.device)
        own = {"DK_": dk, "DV_": dv, "NEED_K": dk is not None, "NEED_V": dv is not None}
        own |= _strides("dk", dk) | _strides("dv", dv)
        tiles = _ceil(self.keys, config.block_n)
        self._launch(attention_dkv_kernel, own, config, visits, tiles, self.kv_heads, dposition)

    def _launch(
        self,
        kernel: Any,
        own: dict[str, Any],
        config: Config,
        visits: Visits,
        tiles: int,
        heads: int,
        term: Tensor | None,
    ) -> None:
        """Run a kernel over the batch; where the gradient of a disentangled term is wanted, in as many pieces as keep
        its band (batch row, head, token, entries) within bounds."""
        table, rows, band, segments = visits.table, self.batch, None, None
        if term is not None:
            assert self.rows is not None
            entries, segments = len(self.rows), find_segments(self.rows, term.shape[3])
            rows = max(1, min(self.batch, BAND_BYTES // (4 * term[0, :, :, 0].numel() * entries)))
            band = self.q.new_empty(rows, *term.shape[1:3], entries, dtype=torch.float32)
        for begin in range(0, self.batch, rows):
            count = min(rows, self.batch - begin)
            if band is not None:
                band.zero_()  # what no tile visits
            with torch.cuda.device_of(self.q):  # Triton launches on the current device, whatever its arguments are on
                kernel[(count * heads * tiles,)](
                    **self.arguments, **own, BAND_=band, VISITS_=table, tiles=tiles, row_offset=begin,
                    visits_batch=table.stride(0) if table.shape[0] > 1 else 0,
                    visits_head=table.stride(1) if table.shape[1] > 1 else 0, visits_tile=table.stride(2),
                    BLOCK_M=config.block_m, BLOCK_N=config.block_n, LISTS=visits.lists, NEED_BAND=band is not None,
                    num_warps=config.warps, num_stages=config.stages,
                )  # fmt: skip
            if band is not None and segments is not None and term is not None:
                sum_rows(band[:count], segments, term[begin : begin + count])


def _row_statistics(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(normalizer, delta) of `delta_kernel`, both like lse."""
    batch, heads, queries, dim = out.shape
    lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    normalizer, delta = torch.empty_like(lse), torch.empty_like(lse)
    width = padded_dim(dim)
    block = DELTA_ELEMENTS // width
    tiles = _ceil(queries, block)
    with torch.cuda.device_of(out):
        _delta_kernel[(batch * heads * tiles,)](
            out, grad_out, lse, grad_lse, normalizer, delta, *out.stride()[:3], *grad_out.stride()[:3],
            heads, queries, tiles, BLOCK_M=block, DIM=dim, WIDTH=width, LSE=grad_lse is not None,
        )  # fmt: skip
    return normalizer, delta


def _strides(name: str, x: Tensor | None) -> dict[str, int]:
    """The strides of x (batch, head, row, channel) as a kernel's arguments."""
    strides = (0, 0, 0) if x is None else x.stride()[:3]
    return dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), strides, strict=True))


def _like(x: Tensor) -> Tensor:
    """An unwritten tensor of the same shape, dtype and order of dimensions, channels last."""
    like = torch.empty_like(x)
    return like if like.stride(3) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)
