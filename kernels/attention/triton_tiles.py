"""What the attention kernels share: the tiles to visit, who sees whom in a tile, what is added to a score, what dropout
keeps; and the arguments that bring masks, biases and dropout to a kernel.

Device functions take coordinates that broadcast to the tile: what belongs to queries is (BLOCK_M, 1), what belongs to
keys (1, BLOCK_N); in a transposed tile (1, BLOCK_M) and (BLOCK_N, 1) serve as well. i and j are columns of the row,
offsets added; i_at and j_at count from 0 in this call's tensors.

Every kernel names the arguments and flags of `tile_arguments` alike, so that a launch passes them by name. A flag is a
`tl.constexpr`: what a call does not use costs nothing.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .biases import BiasTerms
from .masks import Mask

LOG2E = tl.constexpr(1.4426950408889634)
"""Scores are kept in units of log 2, because the hardware's exponential is 2^x."""

TYPES = {
    "QUERY_DOCUMENTS_": "*i32", "KEY_DOCUMENTS_": "*i32", "QUERY_POSITIONS_": "*i32", "KEY_POSITIONS_": "*i32",
    "PREFIX_": "*i32", "LAYOUT_": "*i8", "SLOPES_": "*fp32", "TABLE_": "*fp32", "ROWS_": "*i32", "SAMPLES_": "*i64",
    "query_offset": "i32", "key_offset": "i32", "window": "i32", "block_size": "i32", "block_shift": "i32",
    "behind": "i32", "ahead": "i32", "first": "i32", "prefix": "i32", "layout_size": "i32", "layout_columns": "i32",
    "layout_head": "i32", "least": "i32", "entries": "i32", "position_rows": "i32", "threshold": "i32",
    "head_offset": "i32", "seed": "i64",
}  # fmt: skip
"""Type of each shared argument, for compilation ahead of time; CONTENT_ and POSITION_ are of the inputs' dtype."""
NOT_SPECIALIZED = [name for name in TYPES if name.islower()]
"""Numbers that change from call to call (an offset, step by step) must not compile a kernel each."""


@triton.jit
def open_visits(VISITS_, LISTS: tl.constexpr):
    """What `visited` needs of one row of the visits table: (full tiles, all tiles, first tile, tiles before the full
    ones). Steps 0 .. full - 1 are full tiles, which need no mask; steps full .. all - 1 are the others."""
    if LISTS:
        full, total = tl.load(VISITS_), tl.load(VISITS_ + 1)
        start, before = full, full
    else:
        start, full_start = tl.load(VISITS_), tl.load(VISITS_ + 1)
        full_end, end = tl.load(VISITS_ + 2), tl.load(VISITS_ + 3)
        full, total, before = full_end - full_start, end - start, full_start - start
    return full, total, start, before


@triton.jit
def visited(VISITS_, step, full, start, before, LISTS: tl.constexpr, MASKED: tl.constexpr):
    """The tile of a step: of a full one without MASKED, of one of the others with it."""
    if LISTS:
        tile = tl.load(VISITS_ + 2 + step)
    elif MASKED:
        tile = start + step - full
        tile += tl.where(step - full >= before, full, 0)
    else:
        tile = start + before + step
    return tile


@triton.jit
def load_rows(
    X_, start, limit, stride, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):
    """(ROWS, WIDTH) of a matrix of DIM columns from row `start` on, zero beyond DIM and, if MASKED, from row `limit`
    on. The start is added in 64 bits, the place inside the tile in 32: it costs half the registers."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    at = X_ + start.to(tl.int64) * stride + (row * stride + column)
    if MASKED and WIDTH > DIM:
        x = tl.load(at, mask=(row < limit - start) & (column < DIM), other=0.0)
    elif MASKED:
        x = tl.load(at, mask=row < limit - start, other=0.0)
    elif WIDTH > DIM:
        x = tl.load(at, mask=column < DIM, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def load_facts(at, inside, column, DOCUMENTS_, POSITIONS_, DOCUMENTS: tl.constexpr, POSITIONS: tl.constexpr):
    """(document, position) of tokens `at` of one batch row, shaped like `at`; positions count columns without
    POSITIONS. What is not `inside` is of document -1."""
    document, position = column, column
    if DOCUMENTS:
        document = tl.load(DOCUMENTS_ + at, mask=inside, other=-1)
    if POSITIONS:
        position = tl.load(POSITIONS_ + at, mask=inside, other=0)
    return document, position


@triton.jit
def visible(
    i, j, inside, i_document, j_document, i_position, j_position,
    window, block_size, block_shift, behind, ahead, first, prefix, LAYOUT_, layout_size, layout_columns,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr, PREFIX: tl.constexpr,
    LAYOUT: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Which pairs of a tile see each other, as `Mask.visible` defines it; `inside`: pairs of existing tokens.

    prefix: of this batch row. LAYOUT_: the head's dense layout, one byte for each pair of blocks.
    """
    seen = inside
    if WINDOW or BLOCKS:
        near = inside
        if WINDOW:
            near = near & (tl.abs(i - j) < window)
        if BLOCKS:
            apart = (i_position + block_shift) // block_size - (j_position + block_shift) // block_size
            near = near & (apart <= behind) & (-apart <= ahead)
        if FIRST:
            near = near | (i_position < first) | (j_position < first)
        seen = seen & near
    if CAUSAL:
        seen = seen & (j <= i)
    if PREFIX:
        seen = seen | (j < prefix)
    if DOCUMENTS:
        seen = seen & (i_document == j_document) & (i_document >= 0)
    seen = seen & inside
    if LAYOUT:
        at = (i // layout_size) * layout_columns + j // layout_size
        seen = seen & (tl.load(LAYOUT_ + at, mask=inside, other=0) != 0)
    return seen


@triton.jit
def load_prefix(PREFIX_, prefix, b, PREFIX: tl.constexpr):
    """The prefix of batch row b: a number of the call, or with PREFIX = 2 one of each row."""
    if PREFIX == 2:
        prefix = tl.load(PREFIX_ + b)
    return prefix


@triton.jit
def add_bias(
    scores, i, j, i_at, j_at, inside, SLOPES_, TABLE_, CONTENT_, POSITION_, ROWS_, least, entries, position_rows,
    SLOPES: tl.constexpr, TABLE: tl.constexpr, CONTENT: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """scores + log2(e) bias, both in units of log 2. The pointers are those of one head (and batch row)."""
    if SLOPES:
        scores -= (tl.load(SLOPES_) * LOG2E) * tl.abs(i - j).to(tl.float32)
    if TABLE or CONTENT or POSITION:
        entry = tl.minimum(tl.maximum(i - j - least, 0), entries - 1)
    if TABLE:
        scores += tl.load(TABLE_ + entry) * LOG2E
    if CONTENT or POSITION:
        row = tl.load(ROWS_ + entry)
    if CONTENT:
        at = CONTENT_ + i_at.to(tl.int64) * position_rows + row
        scores += tl.load(at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if POSITION:
        at = POSITION_ + j_at.to(tl.int64) * position_rows + row
        scores += tl.load(at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return scores


@triton.jit
def kept(
    i, first_column, sample, head, seed, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) bool, the bits of `attention_keep_mask`: i (BLOCK_M, 1), keys from column `first_column` on.

    sample: int64; head: of all heads of the model; seed: the 64-bit Philox key. A counter gives the words of four
    neighbors; with DROPOUT = 1 the tile starts on such a four, with 2 it may not, and every key draws its own four.
    """
    low, high = (sample & 0xFFFFFFFF).to(tl.uint32), (sample >> 32).to(tl.uint32) | (head.to(tl.uint32) << 16)
    limit = threshold.to(tl.uint32, bitcast=True)
    rows = i.to(tl.uint32)
    if DROPOUT == 1:
        fours = (first_column // 4 + tl.arange(0, BLOCK_N // 4)[None, :]).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, fours, rows, low, high)  # pyright: ignore[reportGeneralTypeIssues]
        k0, k1 = (w0 >= limit).to(tl.int8), (w1 >= limit).to(tl.int8)
        k2, k3 = (w2 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8)
        keep = tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), [BLOCK_M, BLOCK_N]) != 0
    else:
        columns = first_column + tl.arange(0, BLOCK_N)[None, :]
        fours = (columns // 4).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, fours, rows, low, high)  # pyright: ignore[reportGeneralTypeIssues]
        place = columns % 4
        word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
        keep = word >= limit
    return keep


class TileArguments(NamedTuple):
    """What a launch passes by name: `values` for the arguments in `TYPES` and CONTENT_, POSITION_; `flags` for the
    constants."""

    values: dict[str, Any]
    flags: dict[str, Any]


def tile_arguments(
    mask: Mask, terms: BiasTerms, drop: Any, keys: int, device: torch.device, *, key_tile: int
) -> TileArguments:
    """Mask, bias and dropout of one call (with `keys` keys, cut into tiles of `key_tile`) as arguments and flags.

    Bias tensors are made contiguous here and must outlive the launch, as the arguments do. drop: None or a `Drop`.
    """
    flags = mask_flags(mask) | bias_flags(terms)
    flags["DROPOUT"] = 0 if drop is None else 1 if mask.key_offset % 4 == 0 and key_tile % 4 == 0 else 2
    values = _mask_values(mask, keys) | _bias_values(terms) | _dropout_values(drop, device)
    return TileArguments(values, flags)


def mask_flags(mask: Mask) -> dict[str, Any]:
    """The constants of a mask."""
    return {
        "CAUSAL": mask.causal,
        "WINDOW": mask.window is not None,
        "BLOCKS": mask.blocks is not None,
        "FIRST": mask.first > 0 and mask.banded,
        "PREFIX": 0 if mask.prefix is None else 2 if isinstance(mask.prefix, Tensor) else 1,
        "LAYOUT": mask.layout is not None,
        "DOCUMENTS": mask.query_documents is not None,
        "POSITIONS": mask.query_positions is not None and mask.banded,
    }


def bias_flags(terms: BiasTerms) -> dict[str, Any]:
    """The constants of a bias."""
    return {
        "SLOPES": terms.slopes is not None,
        "TABLE": terms.table is not None,
        "CONTENT": terms.content is not None,
        "POSITION": terms.position is not None,
    }


def _mask_values(mask: Mask, keys: int) -> dict[str, Any]:
    def ids(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(torch.int32).contiguous()

    blocks, layout, prefix = mask.blocks, None, mask.prefix
    if mask.layout is not None:
        # Tiles need not be blocks, so a tile that is seen in part looks its pairs up.
        layout = mask.layout.dense(-(-(mask.key_offset + keys) // mask.layout.size)).to(torch.int8).contiguous()
    return {
        "QUERY_DOCUMENTS_": ids(mask.query_documents),
        "KEY_DOCUMENTS_": ids(mask.key_documents),
        "QUERY_POSITIONS_": ids(mask.query_positions),
        "KEY_POSITIONS_": ids(mask.key_positions),
        "PREFIX_": ids(prefix) if isinstance(prefix, Tensor) else None,
        "LAYOUT_": layout,
        "query_offset": mask.query_offset,
        "key_offset": mask.key_offset,
        "window": mask.window or 0,
        "block_size": 1 if blocks is None else blocks.size,
        "block_shift": 0 if blocks is None else blocks.shift,
        "behind": 0 if blocks is None else blocks.behind,
        "ahead": 0 if blocks is None else blocks.ahead,
        "first": mask.first,
        "prefix": prefix if isinstance(prefix, int) else 0,
        "layout_size": 1 if mask.layout is None else mask.layout.size,
        "layout_columns": 0 if layout is None else layout.shape[2],
        "layout_head": 0 if layout is None or len(layout) == 1 else layout.stride(0),
    }


def _bias_values(terms: BiasTerms) -> dict[str, Any]:
    tensors = (terms.slopes, terms.table, terms.content, terms.position, terms.rows)
    slopes, table, content, position, rows = (None if x is None else x.contiguous() for x in tensors)
    counted = rows if rows is not None else None if table is None else table[0]
    wide = content if content is not None else position
    return {
        "SLOPES_": slopes,
        "TABLE_": table,
        "CONTENT_": content,
        "POSITION_": position,
        "ROWS_": rows,
        "least": terms.least,
        "entries": 0 if counted is None else len(counted),
        "position_rows": 0 if wide is None else wide.shape[3],
    }


def _dropout_values(drop: Any, device: torch.device) -> dict[str, Any]:
    if drop is None:
        return {"SAMPLES_": None, "threshold": 0, "head_offset": 0, "seed": 0}
    threshold, seed = round(drop.p * 2**32), drop.key.philox_key()
    assert threshold < 2**32, f"dropout: {drop.p} leaves nothing"
    return {
        "SAMPLES_": drop.key.samples.to(device).contiguous(),
        # Unsigned words, passed as the signed numbers of the same bits.
        "threshold": threshold - 2**32 if threshold >= 2**31 else threshold,
        "head_offset": drop.head_offset,
        "seed": seed - 2**64 if seed >= 2**63 else seed,
    }
