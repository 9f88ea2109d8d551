"""Gradients of biases by distance, deterministic: of a table from sums along diagonals, of disentangled terms from
bands of score gradients.

A table's entry gets the score gradients of every pair at its distance, from all rows and tiles: one program per head
and diagonal of tiles walks along it, keeps one tile of sums and folds its diagonals at the end. A disentangled term is
of one query (or key) and one row: the kernels of `triton_backward` write score gradients by distance, each place once,
and here the distances of each row are added up in their order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masks import Mask
from .tiles import tile_matrices
from .triton import _ceil
from .triton_backward_kernels import probabilities
from .triton_tiles import LOG2E, NOT_SPECIALIZED, kept, load_facts, load_prefix, load_rows


@triton.jit(do_not_specialize=["batch", "queries", "keys", "query_tiles", "key_tiles", "diagonals", *NOT_SPECIALIZED])
def attention_dtable_kernel(
    Q_, K_, V_, GRAD_, NORMALIZER_, DELTA_, SUMS_, TILES_,
    QUERY_DOCUMENTS_, KEY_DOCUMENTS_, QUERY_POSITIONS_, KEY_POSITIONS_, PREFIX_, LAYOUT_, SLOPES_, TABLE_, CONTENT_,
    POSITION_, ROWS_, SAMPLES_,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    tiles_batch, tiles_head, batch, heads, group, queries, keys, query_tiles, key_tiles, diagonals, scale, rescale,
    query_offset, key_offset, window, block_size, block_shift, behind, ahead, first, prefix, layout_size,
    layout_columns, layout_head, least, entries, position_rows, threshold, head_offset, seed,
    BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCKS: tl.constexpr, FIRST: tl.constexpr, PREFIX: tl.constexpr, LAYOUT: tl.constexpr, DOCUMENTS: tl.constexpr,
    POSITIONS: tl.constexpr, SLOPES: tl.constexpr, TABLE: tl.constexpr, CONTENT: tl.constexpr,
    POSITION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Sums of score gradients by distance along one diagonal of tiles, over all batch rows.

    Grid (heads x diagonals). SUMS_ (head, diagonal, 2 BLOCK): place p is of pairs with i_at - j_at = (diagonal -
    key_tiles) BLOCK + p. TILES_ (batch or 1, head or 1, query tiles, key tiles) bool: whether any pair is visible.
    """
    h, diagonal = tl.program_id(0) // diagonals, tl.program_id(0) % diagonals
    offset = diagonal - (key_tiles - 1)  # query tile - key tile
    n = tl.arange(0, BLOCK)
    TILES_ += h * tiles_head
    if LAYOUT:
        LAYOUT_ += h * layout_head
    if TABLE:
        TABLE_ += h * entries
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    begin = tl.maximum(0, offset)
    for batch_row in range(0, batch):
        b = tl.cast(batch_row, tl.int64)
        limit = load_prefix(PREFIX_, prefix, b, PREFIX)
        sample = tl.zeros([], tl.int64)
        if DROPOUT:
            sample = tl.load(SAMPLES_ + b)
        row = (b * heads + h) * queries
        k_from, v_from = K_ + b * k_batch + (h // group) * k_head, V_ + b * v_batch + (h // group) * v_head
        for step in range(0, tl.minimum(query_tiles, key_tiles + offset) - begin):
            tile = begin + step
            if tl.load(TILES_ + b * tiles_batch + tile.to(tl.int64) * key_tiles + tile - offset):
                first_query, first_key = tile * BLOCK, (tile - offset) * BLOCK
                i_at, j_at = first_query + n[:, None], first_key + n[None, :]
                exists, present = i_at < queries, j_at < keys
                i, j = query_offset + i_at, key_offset + j_at
                i_document, i_position = load_facts(
                    b * queries + i_at, exists, i, QUERY_DOCUMENTS_, QUERY_POSITIONS_, DOCUMENTS, POSITIONS
                )
                j_document, j_position = load_facts(
                    b * keys + j_at, present, j, KEY_DOCUMENTS_, KEY_POSITIONS_, DOCUMENTS, POSITIONS
                )
                q = load_rows(Q_ + b * q_batch + h * q_head, first_query, queries, q_row, BLOCK, DIM, WIDTH, True)
                k = load_rows(k_from, first_key, keys, k_row, BLOCK, DIM, WIDTH, True)
                normalizer = tl.load(NORMALIZER_ + row + i_at, mask=exists, other=float("inf"))
                p = probabilities(
                    tl.dot(q, tl.trans(k), input_precision="ieee"), scale * LOG2E, normalizer, i, j, i_at, j_at,
                    exists & present, i_document, j_document, i_position, j_position, window, block_size,
                    block_shift, behind, ahead, first, limit, LAYOUT_, layout_size, layout_columns, SLOPES_, TABLE_,
                    CONTENT_, POSITION_, ROWS_, least, entries, position_rows, True, CAUSAL, WINDOW, BLOCKS, FIRST,
                    PREFIX, LAYOUT, DOCUMENTS, SLOPES, TABLE, CONTENT, POSITION,
                )  # fmt: skip
                from_ = GRAD_ + b * grad_batch + h * grad_head
                grad = load_rows(from_, first_query, queries, grad_row, BLOCK, DIM, WIDTH, True).to(q.dtype)
                v = load_rows(v_from, first_key, keys, v_row, BLOCK, DIM, WIDTH, True)
                dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
                if DROPOUT:
                    keep = kept(
                        i, key_offset + first_key, sample, head_offset + h, seed, threshold, BLOCK, BLOCK, DROPOUT
                    )
                    dp = tl.where(keep, dp * rescale, 0.0)
                sums += p * (dp - tl.load(DELTA_ + row + i_at, mask=exists, other=0.0))
    # Row l of `turned` is one distance, l, and above the diagonal l - BLOCK.
    turned = tl.gather(sums, (n[:, None] + n[None, :]) % BLOCK, 0)
    near = n[:, None] + n[None, :] < BLOCK
    at = SUMS_ + (h.to(tl.int64) * diagonals + diagonal) * (2 * BLOCK) + n
    tl.store(at, tl.sum(tl.where(near, 0.0, turned), 1))
    tl.store(at + BLOCK, tl.sum(tl.where(near, turned, 0.0), 1))


@triton.jit(do_not_specialize=["count", "entries", "tiles"])
def sum_rows_kernel(
    BAND_, ORDER_, STARTS_, OUT_, count, entries, rows, tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """OUT_ (count, rows) of the inputs' dtype: entry r is the sum of the band's entries ORDER_[STARTS_[r]] ..
    ORDER_[STARTS_[r + 1] - 1], in this order; BAND_ (count, entries) fp32. Grid (blocks of count x blocks of rows)."""
    tile = tl.program_id(0) % tiles
    i = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    r = tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    start = tl.load(STARTS_ + r, mask=r < rows, other=0)
    many = tl.load(STARTS_ + r + 1, mask=r < rows, other=0) - start
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, tl.max(many)):
        entry = tl.load(ORDER_ + start + step, mask=step < many, other=0)
        total += tl.load(BAND_ + i * entries + entry, mask=(i < count) & (step < many), other=0.0)
    tl.store(OUT_ + i * rows + r, total.to(OUT_.dtype.element_ty), mask=(i < count) & (r < rows))


_dtable_kernel: Any = attention_dtable_kernel
_sum_rows_kernel: Any = sum_rows_kernel


class Segments(NamedTuple):
    """The entries of each row, one row after another: order (entries,) and starts (rows + 1,) int32."""

    order: Tensor
    starts: Tensor


def find_segments(row_of_entry: Tensor, rows: int) -> Segments:
    """Group the entries of `BiasTerms.rows` by their row, rising in each."""
    ordered = row_of_entry.sort(stable=True)
    bounds = torch.arange(rows + 1, dtype=ordered.values.dtype, device=row_of_entry.device)
    starts = torch.searchsorted(ordered.values, bounds)
    return Segments(ordered.indices.to(torch.int32), starts.to(torch.int32))


def sum_rows(band: Tensor, segments: Segments, out: Tensor) -> None:
    """out[..., r] = the sum of band[..., e] over the entries e of row r: band (..., entries) fp32 and out (..., rows),
    both contiguous."""
    assert band.is_contiguous()
    assert out.is_contiguous()
    entries, rows = band.shape[-1], out.shape[-1]
    count = out.numel() // rows
    block_m, block_n = 16, min(128, 1 << (rows - 1).bit_length())
    tiles = _ceil(rows, block_n)
    with torch.cuda.device_of(band):
        _sum_rows_kernel[(_ceil(count, block_m) * tiles,)](
            band, *segments, out, count, entries, rows, tiles, BLOCK_M=block_m, BLOCK_N=block_n
        )  # fmt: skip


def table_gradient(
    mask: Mask, queries: int, keys: int, table: Tensor, least: int, arguments: dict[str, Any], config: Any
) -> Tensor:
    """(head, entries) fp32. arguments: those of `attention_dtable_kernel` that all kernels of a backward share."""
    block, device, heads = config.block_m, table.device, len(table)
    query_tiles, key_tiles = _ceil(queries, block), _ceil(keys, block)
    some = tile_matrices(mask, queries, keys, block, block, device)[0].contiguous()
    diagonals = query_tiles + key_tiles - 1
    sums = torch.empty(heads, diagonals, 2 * block, dtype=torch.float32, device=device)
    with torch.cuda.device_of(table):
        _dtable_kernel[(heads * diagonals,)](
            SUMS_=sums, TILES_=some, query_tiles=query_tiles, key_tiles=key_tiles, diagonals=diagonals,
            tiles_batch=0 if len(some) == 1 else some.stride(0),
            tiles_head=0 if some.shape[1] == 1 else some.stride(1),
            BLOCK=block, num_warps=config.warps, num_stages=config.stages, **arguments,
        )  # fmt: skip
    by_distance = sums.new_zeros(heads, diagonals + 1, block)
    by_distance[:, :-1] += sums[:, :, :block]
    by_distance[:, 1:] += sums[:, :, block:]
    furthest_ahead = mask.query_offset - mask.key_offset - key_tiles * block
    return fold_table(by_distance.flatten(1), furthest_ahead - least, table.shape[1])


def fold_table(by_distance: Tensor, first_entry: int, entries: int) -> Tensor:
    """(head, distances), of which column c is of entry first_entry + c -> (head, entries): what lies beyond either
    end of the table belongs to its end."""
    heads, distances = by_distance.shape
    low = min(max(1 - first_entry, 0), distances)  # columns of entry 0 and below
    high = min(max(entries - 1 - first_entry, low), distances)  # from here on the last entry and above
    gradient = by_distance.new_zeros(heads, entries)
    gradient[:, first_entry + low : first_entry + high] = by_distance[:, low:high]
    gradient[:, 0] += by_distance[:, :low].sum(1)
    gradient[:, -1] += by_distance[:, high:].sum(1)
    return gradient
