"""The forward of attention as one Triton kernel: a program owns a tile of queries of one head and walks the tiles of
keys that the mask lets it see, with the online softmax.

    s = scale q k^T + bias,  m' = max(m, max s),  l' = 2^(m - m') l + sum 2^(s - m'),  o' = 2^(m - m') o + 2^(s - m') v

Scores are in units of log 2 (the scale carries log2 e), so that an exponential is one instruction. Tiles whose every
pair is visible go through a loop without a mask; the others, at the edges, through one with it.

Few queries and many keys (decoding) leave most of the device idle: then the visited tiles of a row are cut among
several programs, whose partial outputs and log-sum-exps are merged afterwards.

Sources: Dao 2023 (FlashAttention-2), sections 3.1 and 3.2; Milakov and Gimelshein 2018 for the online softmax.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Configuration
from .biases import BiasTerms
from .masks import Mask
from .tiles import query_visits
from .triton_tiles import (
    LOG2E,
    NOT_SPECIALIZED,
    TYPES,
    add_bias,
    bias_flags,
    kept,
    load_facts,
    load_prefix,
    load_rows,
    mask_flags,
    open_visits,
    tile_arguments,
    visible,
    visited,
)


@triton.jit
def attend(
    acc, top, total, q, K_, V_, VISITS_, begin, end, full, start, before, i, i_at, i_document, i_position,
    queries, keys, k_row, v_row, scale, sample, head, prefix,
    KEY_DOCUMENTS_, KEY_POSITIONS_, LAYOUT_, SLOPES_, TABLE_, CONTENT_, POSITION_, ROWS_, key_offset, window,
    block_size, block_shift, behind, ahead, first, layout_size, layout_columns, least, entries, position_rows,
    threshold, seed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, FOLD: tl.constexpr,
    MASKED: tl.constexpr, LISTS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    FIRST: tl.constexpr, PREFIX: tl.constexpr, LAYOUT: tl.constexpr, DOCUMENTS: tl.constexpr, POSITIONS: tl.constexpr,
    SLOPES: tl.constexpr, TABLE: tl.constexpr, CONTENT: tl.constexpr, POSITION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Steps begin .. end - 1 of the visits: the output not yet divided (BLOCK_M, WIDTH), the largest score so far and
    the sum of exponentials, both (BLOCK_M)."""
    n = tl.arange(0, BLOCK_N)[None, :]
    # Without hoisting: invariants of the loop would stay in registers that the tiles need.
    for step in tl.range(begin, end, disable_licm=True):  # pyright: ignore[reportGeneralTypeIssues]
        first_key = visited(VISITS_, step, full, start, before, LISTS, MASKED) * BLOCK_N
        k = load_rows(K_, first_key, keys, k_row, BLOCK_N, DIM, WIDTH, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        j_at = first_key + n
        j = key_offset + j_at
        inside = j_at < keys
        if CONTENT or LAYOUT:  # read by query; otherwise rows beyond the end cost nothing, nobody stores them
            inside = inside & (i_at < queries)
        if SLOPES or TABLE or CONTENT or POSITION:
            s = add_bias(
                s * scale, i, j, i_at, j_at, inside, SLOPES_, TABLE_, CONTENT_, POSITION_, ROWS_, least, entries,
                position_rows, SLOPES, TABLE, CONTENT, POSITION,
            )  # fmt: skip
            unit = 1.0
        elif FOLD:
            unit = scale
        else:
            s *= scale
            unit = 1.0
        if MASKED:
            j_document, j_position = load_facts(
                j_at, j_at < keys, j, KEY_DOCUMENTS_, KEY_POSITIONS_, DOCUMENTS, POSITIONS
            )
            seen = visible(
                i, j, inside, i_document, j_document, i_position, j_position, window, block_size, block_shift, behind,
                ahead, first, prefix, LAYOUT_, layout_size, layout_columns,
                CAUSAL, WINDOW, BLOCKS, FIRST, PREFIX, LAYOUT, DOCUMENTS,
            )  # fmt: skip
            s = tl.where(seen, s, -float("inf"))
        # A positive scale commutes with the maximum: with FOLD it is applied to a row here and inside the exponent's
        # fused multiply-add below, not to the tile.
        new_top = tl.maximum(top, tl.max(s, 1) * unit)
        base = new_top
        if MASKED or TABLE:  # a row that has seen nothing yet has -inf, which must not be subtracted from itself
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(s * unit - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            keep = kept(i, key_offset + first_key, sample, head, seed, threshold, BLOCK_M, BLOCK_N, DROPOUT)
            p = tl.where(keep, p, 0.0)
        v = load_rows(V_, first_key, keys, v_row, BLOCK_N, DIM, WIDTH, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["queries", "keys", "tiles", *NOT_SPECIALIZED])
def attention_fwd_kernel(
    Q_, K_, V_, OUT_, LSE_, VISITS_,
    QUERY_DOCUMENTS_, KEY_DOCUMENTS_, QUERY_POSITIONS_, KEY_POSITIONS_, PREFIX_, LAYOUT_, SLOPES_, TABLE_, CONTENT_,
    POSITION_, ROWS_, SAMPLES_,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row, out_split,
    lse_split, visits_batch, visits_head, visits_tile, heads, group, queries, keys, tiles, scale, rescale,
    query_offset, key_offset, window, block_size, block_shift, behind, ahead, first, prefix, layout_size,
    layout_columns, layout_head, least, entries, position_rows, threshold, head_offset, seed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, FOLD: tl.constexpr,
    SPLIT: tl.constexpr, LISTS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    FIRST: tl.constexpr, PREFIX: tl.constexpr, LAYOUT: tl.constexpr, DOCUMENTS: tl.constexpr, POSITIONS: tl.constexpr,
    SLOPES: tl.constexpr, TABLE: tl.constexpr, CONTENT: tl.constexpr, POSITION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Grid (batch x heads x query tiles, splits); scale is log2(e) times the call's, positive."""
    program, split = tl.program_id(0), tl.program_id(1)
    # Tiles of one head are neighbors: they run together and share its keys and values in the cache.
    tile, pair = program % tiles, program // tiles
    if CAUSAL:  # the heaviest first: the light ones fill the gaps at the end
        tile = tiles - 1 - tile
    b, h = (pair // heads).to(tl.int64), pair % heads
    first_query = tile * BLOCK_M
    i_at = first_query + tl.arange(0, BLOCK_M)[:, None]
    i = query_offset + i_at
    q = load_rows(Q_ + b * q_batch + h * q_head, first_query, queries, q_row, BLOCK_M, DIM, WIDTH, True)
    i_document, i_position = load_facts(
        b * queries + i_at, i_at < queries, i, QUERY_DOCUMENTS_, QUERY_POSITIONS_, DOCUMENTS, POSITIONS
    )
    limit = load_prefix(PREFIX_, prefix, b, PREFIX)
    sample = tl.zeros([], tl.int64)
    if DROPOUT:
        sample = tl.load(SAMPLES_ + b)
    K_ += b * k_batch + (h // group) * k_head
    V_ += b * v_batch + (h // group) * v_head
    VISITS_ += b * visits_batch + h * visits_head + tile * visits_tile
    if DOCUMENTS:
        KEY_DOCUMENTS_ += b * keys
    if POSITIONS:
        KEY_POSITIONS_ += b * keys
    if LAYOUT:
        LAYOUT_ += h * layout_head
    if SLOPES:
        SLOPES_ += h
    if TABLE:
        TABLE_ += h * entries
    if CONTENT:
        CONTENT_ += pair.to(tl.int64) * queries * position_rows
    if POSITION:
        POSITION_ += pair.to(tl.int64) * keys * position_rows

    full, steps, start, before = open_visits(VISITS_, LISTS)
    begin, end = 0, steps
    if SPLIT:
        begin, end = steps * split // tl.num_programs(1), steps * (split + 1) // tl.num_programs(1)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for MASKED in tl.static_range(2):
        low = tl.maximum(begin, full) if MASKED else tl.minimum(begin, full)
        high = tl.maximum(end, full) if MASKED else tl.minimum(end, full)
        acc, top, total = attend(
            acc, top, total, q, K_, V_, VISITS_, low, high, full, start, before, i, i_at, i_document, i_position,
            queries, keys, k_row, v_row, scale, sample, head_offset + h, limit,
            KEY_DOCUMENTS_, KEY_POSITIONS_, LAYOUT_, SLOPES_, TABLE_, CONTENT_, POSITION_, ROWS_, key_offset, window,
            block_size, block_shift, behind, ahead, first, layout_size, layout_columns, least, entries, position_rows,
            threshold, seed, BLOCK_M, BLOCK_N, DIM, WIDTH, FOLD, MASKED, LISTS, CAUSAL, WINDOW, BLOCKS, FIRST, PREFIX,
            LAYOUT, DOCUMENTS, POSITIONS, SLOPES, TABLE, CONTENT, POSITION, DROPOUT,
        )  # fmt: skip

    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    out = acc * (rescale / safe)[:, None]
    lse = tl.where(empty, -float("inf"), (top + tl.log2(safe)) / LOG2E)
    row, column = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, WIDTH)[None, :]
    at = OUT_ + split.to(tl.int64) * out_split + b * out_batch + h * out_head + first_query.to(tl.int64) * out_row
    written = (row < queries - first_query) & (column < DIM)
    tl.store(at + row * out_row + column, out.to(OUT_.dtype.element_ty), mask=written)
    m = tl.arange(0, BLOCK_M)
    lse_at = LSE_ + split.to(tl.int64) * lse_split + pair.to(tl.int64) * queries + first_query + m
    tl.store(lse_at, lse, mask=m < queries - first_query)


@dataclass(frozen=True)
class Config:
    """How a call is cut: queries and keys a tile, warps and pipeline stages of a program, splits of the keys (None:
    chosen from the number of programs and visited tiles).

    fold: multiply the scale in with the exponent, an instruction less for each score; a matter of a few registers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    splits: int | None = None
    fold: bool = True


MOST_SPLITS = 64


def padded_dim(dim: int) -> int:
    """Channels as a side of a tile: a power of two, at least the 16 that tensor cores take."""
    return max(16, 1 << (dim - 1).bit_length())


def choose_config(dtype: torch.dtype, dim: int, queries: int, flags: dict[str, Any]) -> Config:
    """The cut for an input dtype, head dimension, number of queries and the flags of mask, bias and dropout.

    What is chosen for bf16 and fp16 spills no register on Hopper; the registers named are those of sm_90a in bf16.
    """
    width = padded_dim(dim)
    gathers = flags["TABLE"] or flags["CONTENT"] or flags["POSITION"]
    looks_up = flags["CONTENT"] or flags["POSITION"] or flags["LAYOUT"]
    if queries <= 16:  # decoding: bound by reading keys, and no tile of 64 rows would be full
        return Config(16, 64 if width <= 128 and not looks_up else 32, 4, 2)
    if dtype == torch.float32:  # no tensor cores: small tiles that a thread's multiply-adds can hold
        return Config(64, 32, 8, 2) if width <= 64 else Config(32, 16, 8, 2)
    if width <= 64:
        # Four warps and 64 KiB: two programs share a multiprocessor, one's exponentials beside the other's products
        # (full 245 registers, causal and documents 255). Folding the scale spills 12 bytes without documents, not
        # folding it 20 with them. More in a tile's arithmetic needs eight warps (165 to 255).
        slopes = flags["SLOPES"] and (flags["DOCUMENTS"] or flags["WINDOW"])
        if not (gathers or looks_up or flags["DROPOUT"] or flags["BLOCKS"] or slopes):
            return Config(128, 64, 4, 3, fold=flags["DOCUMENTS"])
        return Config(128, 32 if looks_up and flags["DROPOUT"] else 64, 8, 2)
    if width == 128:
        # 128 queries, because a tile of keys is then read half as often from the cache as with 64; three stages of keys
        # and values are what shared memory holds (causal 220 registers, dropout 255).
        if looks_up:
            return Config(64, 32, 8, 2)
        return Config(128, 32, 8, 2) if gathers or flags["BLOCKS"] else Config(128, 64, 8, 3)
    # The output alone takes 128 of a thread's registers: narrow tiles of keys (causal 255, with tables 255).
    if looks_up:
        return Config(64, 16, 8, 2)
    return Config(64 if gathers or flags["BLOCKS"] else 128, 32, 8, 2)


def choose_splits(programs: int, key_tiles: int, multiprocessors: int) -> int:
    """Programs that share one row's keys, so that few rows still occupy the device.

    Splitting costs a merge of fp32 outputs, so it starts where at least half of the device would idle, and a part
    keeps at least four tiles.
    """
    if 2 * programs > multiprocessors:
        return 1
    return max(1, min(multiprocessors // programs, key_tiles // 4, MOST_SPLITS))


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Mask,
    scale: float,
    drop: Any,
    *,
    wide: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp.

    q: (batch, head, queries, dim), k, v: (batch, kv head, keys, dim) of one dtype of fp32, fp16, bf16, any strides; dim
    from 1 to 256. terms, mask, scale: as `resolve_bias`, `Mask` and `attention` describe them. drop: a `Drop` or None.

    Returns out (batch, head, queries, dim) in q's dtype, fp32 with `wide`, and lse (batch, head, queries) fp32, the
    natural logarithm; a query that sees no key has 0 and -inf.
    """
    batch, heads, queries, dim = q.shape
    keys, group = k.shape[2], heads // max(1, k.shape[1])
    if 0 in (batch, heads, queries, keys):
        lse = torch.full((batch, heads, queries), -float("inf"), device=q.device)
        return torch.zeros_like(q, dtype=torch.float32 if wide else q.dtype), lse
    flags = mask_flags(mask) | bias_flags(terms) | {"DROPOUT": drop is not None}
    config = config or choose_config(q.dtype, dim, queries, flags)
    if scale <= 0:  # the kernel takes the maximum before it scales
        q, scale = (q.neg(), -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    visits = query_visits(mask, queries, keys, config.block_m, config.block_n, q.device)
    arguments = tile_arguments(mask, terms, drop, keys, q.device, key_tile=config.block_n)
    tiles = _ceil(queries, config.block_m)
    splits = config.splits or choose_splits(
        batch * heads * tiles, _ceil(keys, config.block_n), _multiprocessors(q.device)
    )
    if splits > 1:
        outs = torch.empty(splits, batch, heads, queries, dim, dtype=torch.float32, device=q.device)
    else:
        outs = torch.empty_like(q, dtype=torch.float32 if wide else q.dtype)[None]
    lses = torch.empty(splits, batch, heads, queries, dtype=torch.float32, device=q.device)
    table = visits.table
    constants: dict[str, Any] = arguments.flags | {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "DIM": dim, "WIDTH": padded_dim(dim),
        "FOLD": config.fold, "SPLIT": splits > 1, "LISTS": visits.lists,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever its arguments are on
        attention_fwd_kernel[(batch * heads * tiles, splits)](
            q, k, v, outs, lses, table,
            **arguments.values,
            q_batch=q.stride(0), q_head=q.stride(1), q_row=q.stride(2),
            k_batch=k.stride(0), k_head=k.stride(1), k_row=k.stride(2),
            v_batch=v.stride(0), v_head=v.stride(1), v_row=v.stride(2),
            out_batch=outs.stride(1), out_head=outs.stride(2), out_row=outs.stride(3), out_split=outs.stride(0),
            lse_split=lses.stride(0),
            visits_batch=table.stride(0) if table.shape[0] > 1 else 0,
            visits_head=table.stride(1) if table.shape[1] > 1 else 0,
            visits_tile=table.stride(2), heads=heads, group=group, queries=queries, keys=keys, tiles=tiles,
            scale=scale * math.log2(math.e), rescale=1.0 if drop is None else 1 / (1 - drop.p),
            **constants,
        )  # fmt: skip
    if splits == 1:
        return outs[0], lses[0]
    from .merge import merge

    out, lse = merge(outs.unbind(), lses.unbind())
    return out if wide else out.to(q.dtype), lse


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_NO_FLAGS: dict[str, Any] = mask_flags(Mask(causal=False)) | bias_flags(BiasTerms()) | {"DROPOUT": 0}
_FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"CAUSAL": True},
    "documents": {"CAUSAL": True, "DOCUMENTS": True},
    "window": {"CAUSAL": True, "WINDOW": True, "FIRST": True},
    "blocks": {"CAUSAL": True, "BLOCKS": True, "DOCUMENTS": True, "POSITIONS": True},
    "prefix": {"CAUSAL": True, "PREFIX": 2},
    "slopes": {"CAUSAL": True, "SLOPES": True},
    "slopes documents": {"CAUSAL": True, "SLOPES": True, "DOCUMENTS": True},
    "table": {"CAUSAL": True, "TABLE": True},
    "dropout": {"CAUSAL": True, "DROPOUT": 1},
    "unaligned dropout": {"CAUSAL": True, "DROPOUT": 2},
    "table dropout documents": {"CAUSAL": True, "TABLE": True, "DROPOUT": 1, "DOCUMENTS": True},
    "disentangled": {"CONTENT": True, "POSITION": True, "DOCUMENTS": True},
    "disentangled dropout": {"CONTENT": True, "POSITION": True, "DOCUMENTS": True, "DROPOUT": 1},
    "layout": {"LAYOUT": True},
    "everything masked": dict.fromkeys(
        ("CAUSAL", "WINDOW", "BLOCKS", "FIRST", "LAYOUT", "DOCUMENTS", "POSITIONS"), True
    ) | {"PREFIX": 2, "DROPOUT": 1},
}  # fmt: skip


def configurations() -> list[Configuration]:
    """What `attention_forward` launches: every feature in bf16 at the two common dimensions, some in other types and
    dimensions, and one query (decoding), whole and in splits. fp16 compiles like bf16."""
    bf16, found = torch.bfloat16, []
    for dim in (64, 128):
        found += [configuration(name, bf16, dim) for name in _FEATURES]
    for dim in (16, 96, 256):
        found += [configuration(name, bf16, dim) for name in ("full", "causal", "documents", "table dropout documents")]
    found += [configuration(name, bf16, 256) for name in ("dropout", "disentangled dropout", "everything masked")]
    for dtype in (torch.float16, torch.float32):
        found += [configuration("causal", dtype, dim) for dim in (64, 128, 256)]
        found.append(configuration("disentangled", dtype, 64))
    found += [
        configuration("causal", bf16, dim, queries=1, split=split) for dim in (64, 128) for split in (False, True)
    ]
    return found


def configuration(
    features: str, dtype: torch.dtype, dim: int, queries: int = 4096, split: bool = False, config: Config | None = None
) -> Configuration:
    """One form of the kernel for compilation ahead of time; `features` is a key of `_FEATURES`."""
    flags = _NO_FLAGS | _FEATURES[features]
    config = config or choose_config(dtype, dim, queries, flags)
    constants = flags | {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "DIM": dim, "WIDTH": padded_dim(dim),
        "FOLD": config.fold, "SPLIT": split, "LISTS": flags["LAYOUT"] or flags["FIRST"],
    }  # fmt: skip
    typed = TYPES | dict.fromkeys(("Q_", "K_", "V_", "OUT_", "CONTENT_", "POSITION_"), f"*{_NAMES[dtype]}")
    typed |= {"LSE_": "*fp32", "VISITS_": "*i32", "scale": "fp32", "rescale": "fp32"}
    if split:
        typed["OUT_"] = "*fp32"
    names = attention_fwd_kernel.arg_names
    title = f"attention forward {features}{' one query' if queries == 1 else ''}{' split' if split else ''}"
    return Configuration(
        f"{title} {_NAMES[dtype]} D{dim} {config.block_m}x{config.block_n}x{config.warps}x{config.stages}",
        attention_fwd_kernel,
        {n: typed.get(n, "i32") for n in names if n not in constants},
        constants,
        num_warps=config.warps,
        num_stages=config.stages,
        aligned=tuple(n for n in names if n.split("_")[0] in ("q", "k", "v", "out")),
        dtype=_NAMES[dtype],
    )
