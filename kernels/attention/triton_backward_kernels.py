"""The kernels of `triton_backward`: what leads up to a tile's score gradients, queries' gradients, keys' and values'.

Arguments are named as in `triton_tiles`. BLOCK_M counts queries, BLOCK_N keys, also where a tile is transposed.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    LOG2E,
    NOT_SPECIALIZED,
    add_bias,
    kept,
    load_facts,
    load_prefix,
    load_rows,
    open_visits,
    visible,
    visited,
)


@triton.jit
def store_rows(X_, x, start, limit, stride, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_rows`."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    at = X_ + start.to(tl.int64) * stride + (row * stride + column)
    tl.store(at, x.to(X_.dtype.element_ty), mask=(row < limit - start) & (column < DIM))


@triton.jit
def probabilities(
    product, unit, normalizer, i, j, i_at, j_at, inside, i_document, j_document, i_position, j_position,
    window, block_size, block_shift, behind, ahead, first, prefix, LAYOUT_, layout_size, layout_columns,
    SLOPES_, TABLE_, CONTENT_, POSITION_, ROWS_, least, entries, position_rows,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr,
    PREFIX: tl.constexpr, LAYOUT: tl.constexpr, DOCUMENTS: tl.constexpr, SLOPES: tl.constexpr, TABLE: tl.constexpr,
    CONTENT: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """The forward's weights of a tile from q k^T: 2^(unit product + log2(e) bias - normalizer), 0 for hidden pairs.

    A normalizer of +inf, of a query that sees nothing or does not exist, gives 0 without a mask.
    """
    scores = add_bias(
        product * unit, i, j, i_at, j_at, inside, SLOPES_, TABLE_, CONTENT_, POSITION_, ROWS_, least, entries,
        position_rows, SLOPES, TABLE, CONTENT, POSITION,
    )  # fmt: skip
    p = tl.exp2(scores - normalizer)
    if MASKED:
        seen = visible(
            i, j, inside, i_document, j_document, i_position, j_position, window, block_size, block_shift, behind,
            ahead, first, prefix, LAYOUT_, layout_size, layout_columns,
            CAUSAL, WINDOW, BLOCKS, FIRST, PREFIX, LAYOUT, DOCUMENTS,
        )  # fmt: skip
        p = tl.where(seen, p, 0.0)
    return p


@triton.jit
def store_band(BAND_, row, ds, entry, entries, inside):
    """Score gradients into the bands of their rows, where a distance lies strictly inside: each place is met once.
    row: inside the tile that BAND_ starts at."""
    tl.store(BAND_ + (row * entries + entry), ds, mask=inside & (entry > 0) & (entry < entries - 1))


@triton.jit
def store_ends(BAND_, row, low, high, entries, inside):
    """The sums over all distances at or beyond either end of the band, which a row meets many times."""
    tl.store(BAND_ + row * entries, low, mask=inside)
    tl.store(BAND_ + (row * entries + entries - 1), high, mask=inside & (entries > 1))


@triton.jit
def add_ends(low, high, ds, entry, entries):
    """Add a tile to the sums that `store_ends` stores."""
    low += tl.sum(tl.where((entry <= 0) | (entries == 1), ds, 0.0), 1, keep_dims=True)
    high += tl.sum(tl.where(entry >= entries - 1, ds, 0.0), 1, keep_dims=True)
    return low, high


@triton.jit
def delta_kernel(
    OUT_, GRAD_, LSE_, GRAD_LSE_, NORMALIZER_, DELTA_, out_batch, out_head, out_row, grad_batch, grad_head, grad_row,
    heads, queries, tiles, BLOCK_M: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """delta = out . grad - grad_lse, and log2(e) lse, +inf for queries that see nothing; all (batch, head, query)."""
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (pair // heads).to(tl.int64), pair % heads
    start = tile * BLOCK_M
    out = load_rows(OUT_ + b * out_batch + h * out_head, start, queries, out_row, BLOCK_M, DIM, WIDTH, True)
    grad = load_rows(GRAD_ + b * grad_batch + h * grad_head, start, queries, grad_row, BLOCK_M, DIM, WIDTH, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    i = start + tl.arange(0, BLOCK_M)
    inside, at = i < queries, pair.to(tl.int64) * queries + i
    lse = tl.load(LSE_ + at, mask=inside, other=0.0)
    if LSE:
        delta -= tl.load(GRAD_LSE_ + at, mask=inside, other=0.0)
    blind = lse == -float("inf")
    tl.store(DELTA_ + at, tl.where(blind, 0.0, delta), mask=inside)
    tl.store(NORMALIZER_ + at, tl.where(blind, float("inf"), lse * LOG2E), mask=inside)


@triton.jit(do_not_specialize=["queries", "keys", "tiles", "row_offset", *NOT_SPECIALIZED])
def attention_dq_kernel(
    Q_, K_, V_, GRAD_, NORMALIZER_, DELTA_, DQ_, BAND_, VISITS_,
    QUERY_DOCUMENTS_, KEY_DOCUMENTS_, QUERY_POSITIONS_, KEY_POSITIONS_, PREFIX_, LAYOUT_, SLOPES_, TABLE_, CONTENT_,
    POSITION_, ROWS_, SAMPLES_,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    dq_batch, dq_head, dq_row, visits_batch, visits_head, visits_tile, heads, group, queries, keys, tiles, row_offset,
    scale, rescale,
    query_offset, key_offset, window, block_size, block_shift, behind, ahead, first, prefix, layout_size,
    layout_columns, layout_head, least, entries, position_rows, threshold, head_offset, seed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, LISTS: tl.constexpr,
    NEED_Q: tl.constexpr, NEED_BAND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    FIRST: tl.constexpr, PREFIX: tl.constexpr, LAYOUT: tl.constexpr, DOCUMENTS: tl.constexpr, POSITIONS: tl.constexpr,
    SLOPES: tl.constexpr, TABLE: tl.constexpr, CONTENT: tl.constexpr, POSITION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries; with NEED_BAND, their score gradients by distance, BAND_ (row, head, queries, entries).

    Grid (rows x heads x query tiles): batch rows from `row_offset` on, which BAND_ counts from 0.
    """
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if CAUSAL:  # the heaviest first
        tile = tiles - 1 - tile
    b, h = (row_offset + pair // heads).to(tl.int64), pair % heads
    start = tile * BLOCK_M
    m = tl.arange(0, BLOCK_M)[:, None]
    i_at = start + m
    exists, i = i_at < queries, query_offset + i_at
    q = load_rows(Q_ + b * q_batch + h * q_head, start, queries, q_row, BLOCK_M, DIM, WIDTH, True)
    grad = load_rows(GRAD_ + b * grad_batch + h * grad_head, start, queries, grad_row, BLOCK_M, DIM, WIDTH, True)
    grad = grad.to(q.dtype)
    i_document, i_position = load_facts(
        b * queries + i_at, exists, i, QUERY_DOCUMENTS_, QUERY_POSITIONS_, DOCUMENTS, POSITIONS
    )
    limit = load_prefix(PREFIX_, prefix, b, PREFIX)
    sample = tl.zeros([], tl.int64)
    if DROPOUT:
        sample = tl.load(SAMPLES_ + b)
    row = b * heads + h
    normalizer = tl.load(NORMALIZER_ + row * queries + i_at, mask=exists, other=float("inf"))
    delta = tl.load(DELTA_ + row * queries + i_at, mask=exists, other=0.0)
    K_ += b * k_batch + (h // group) * k_head
    V_ += b * v_batch + (h // group) * v_head
    VISITS_ += b * visits_batch + h * visits_head + tile * visits_tile
    if LAYOUT:
        LAYOUT_ += h * layout_head
    if SLOPES:
        SLOPES_ += h
    if TABLE:
        TABLE_ += h * entries
    if CONTENT:
        CONTENT_ += row * queries * position_rows
    if POSITION:
        POSITION_ += row * keys * position_rows
    if NEED_BAND:
        BAND_ += (pair.to(tl.int64) * queries + start) * entries
    low, high = tl.zeros([BLOCK_M, 1], tl.float32), tl.zeros([BLOCK_M, 1], tl.float32)
    dq = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    full, steps, first_tile, before = open_visits(VISITS_, LISTS)
    for MASKED in tl.static_range(2):
        begin = full if MASKED else full - full
        end = steps if MASKED else full
        # Hoisted out of the loop, what addresses q and grad for wgmma would take up to a hundred registers.
        for step in tl.range(begin, end, disable_licm=q.dtype != tl.float32):
            first_key = visited(VISITS_, step, full, first_tile, before, LISTS, MASKED) * BLOCK_N
            j_at = first_key + tl.arange(0, BLOCK_N)[None, :]
            j, inside = key_offset + j_at, exists & (j_at < keys)
            k = load_rows(K_, first_key, keys, k_row, BLOCK_N, DIM, WIDTH, MASKED)
            v = load_rows(V_, first_key, keys, v_row, BLOCK_N, DIM, WIDTH, MASKED)
            j_document, j_position = load_facts(
                b * keys + j_at, j_at < keys, j, KEY_DOCUMENTS_, KEY_POSITIONS_, DOCUMENTS, POSITIONS
            )
            product = tl.dot(q, tl.trans(k), input_precision="ieee")
            p = probabilities(
                product, scale * LOG2E, normalizer, i, j, i_at, j_at, inside, i_document, j_document, i_position,
                j_position, window, block_size, block_shift, behind, ahead, first, limit, LAYOUT_, layout_size,
                layout_columns, SLOPES_, TABLE_, CONTENT_, POSITION_, ROWS_, least, entries, position_rows,
                MASKED, CAUSAL, WINDOW, BLOCKS, FIRST, PREFIX, LAYOUT, DOCUMENTS, SLOPES, TABLE, CONTENT, POSITION,
            )  # fmt: skip
            dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
            if DROPOUT:
                keep = kept(
                    i, key_offset + first_key, sample, head_offset + h, seed, threshold, BLOCK_M, BLOCK_N, DROPOUT
                )
                dp = tl.where(keep, dp * rescale, 0.0)
            ds = p * (dp - delta)
            if NEED_BAND:
                entry = i - j - least
                store_band(BAND_, m, ds, entry, entries, inside)
                low, high = add_ends(low, high, ds, entry, entries)
            if NEED_Q:
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    if NEED_BAND:
        store_ends(BAND_, m, low, high, entries, exists)
    if NEED_Q:
        store_rows(DQ_ + b * dq_batch + h * dq_head, dq * scale, start, queries, dq_row, BLOCK_M, DIM, WIDTH)


@triton.jit(do_not_specialize=["queries", "keys", "tiles", "row_offset", *NOT_SPECIALIZED])
def attention_dkv_kernel(
    Q_, K_, V_, GRAD_, NORMALIZER_, DELTA_, DK_, DV_, BAND_, VISITS_,
    QUERY_DOCUMENTS_, KEY_DOCUMENTS_, QUERY_POSITIONS_, KEY_POSITIONS_, PREFIX_, LAYOUT_, SLOPES_, TABLE_, CONTENT_,
    POSITION_, ROWS_, SAMPLES_,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, visits_batch, visits_head, visits_tile,
    heads, group, queries, keys, tiles, row_offset, scale, rescale,
    query_offset, key_offset, window, block_size, block_shift, behind, ahead, first, prefix, layout_size,
    layout_columns, layout_head, least, entries, position_rows, threshold, head_offset, seed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, LISTS: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, NEED_BAND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCKS: tl.constexpr, FIRST: tl.constexpr, PREFIX: tl.constexpr, LAYOUT: tl.constexpr, DOCUMENTS: tl.constexpr,
    POSITIONS: tl.constexpr, SLOPES: tl.constexpr, TABLE: tl.constexpr, CONTENT: tl.constexpr,
    POSITION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys; with NEED_BAND, their score gradients by distance, BAND_ (row, head, keys, entries).

    Grid (rows x kv heads x key tiles). A program walks through the query heads of its kv head, so that nothing is
    added up between programs. Tiles are transposed, (BLOCK_N, BLOCK_M): the weights enter the next product as they are.
    """
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    kv_heads = heads // group
    row, kv = pair // kv_heads, pair % kv_heads
    b = (row_offset + row).to(tl.int64)
    start = tile * BLOCK_N
    n = tl.arange(0, BLOCK_N)[:, None]
    j_at = start + n
    exists, j = j_at < keys, key_offset + j_at
    k = load_rows(K_ + b * k_batch + kv * k_head, start, keys, k_row, BLOCK_N, DIM, WIDTH, True)
    v = load_rows(V_ + b * v_batch + kv * v_head, start, keys, v_row, BLOCK_N, DIM, WIDTH, True)
    j_document, j_position = load_facts(
        b * keys + j_at, exists, j, KEY_DOCUMENTS_, KEY_POSITIONS_, DOCUMENTS, POSITIONS
    )
    limit = load_prefix(PREFIX_, prefix, b, PREFIX)
    sample = tl.zeros([], tl.int64)
    if DROPOUT:
        sample = tl.load(SAMPLES_ + b)
    dk, dv = tl.zeros([BLOCK_N, WIDTH], tl.float32), tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for member in range(0, group):
        h = kv * group + member
        head = b * heads + h
        q_from, grad_from = Q_ + b * q_batch + h * q_head, GRAD_ + b * grad_batch + h * grad_head
        layout, slopes, table, content, position, band = LAYOUT_, SLOPES_, TABLE_, CONTENT_, POSITION_, BAND_
        if LAYOUT:
            layout = LAYOUT_ + h * layout_head
        if SLOPES:
            slopes = SLOPES_ + h
        if TABLE:
            table = TABLE_ + h * entries
        if CONTENT:
            content = CONTENT_ + head * queries * position_rows
        if POSITION:
            position = POSITION_ + head * keys * position_rows
        if NEED_BAND:
            band = BAND_ + ((row.to(tl.int64) * heads + h) * keys + start) * entries
        low, high = tl.zeros([BLOCK_N, 1], tl.float32), tl.zeros([BLOCK_N, 1], tl.float32)
        visits = VISITS_ + b * visits_batch + h * visits_head + tile * visits_tile
        full, steps, first_tile, before = open_visits(visits, LISTS)
        for MASKED in tl.static_range(2):
            begin = full if MASKED else full - full
            end = steps if MASKED else full
            for step in tl.range(begin, end, disable_licm=k.dtype != tl.float32):
                first_query = visited(visits, step, full, first_tile, before, LISTS, MASKED) * BLOCK_M
                i_at = first_query + tl.arange(0, BLOCK_M)[None, :]
                i, present = query_offset + i_at, i_at < queries
                inside = exists & present
                q = load_rows(q_from, first_query, queries, q_row, BLOCK_M, DIM, WIDTH, MASKED)
                grad = load_rows(grad_from, first_query, queries, grad_row, BLOCK_M, DIM, WIDTH, MASKED).to(q.dtype)
                i_document, i_position = load_facts(
                    b * queries + i_at, present, i, QUERY_DOCUMENTS_, QUERY_POSITIONS_, DOCUMENTS, POSITIONS
                )
                normalizer = tl.load(NORMALIZER_ + head * queries + i_at, mask=present, other=float("inf"))
                product = tl.dot(k, tl.trans(q), input_precision="ieee")
                p = probabilities(
                    product, scale * LOG2E, normalizer, i, j, i_at, j_at, inside, i_document, j_document, i_position,
                    j_position, window, block_size, block_shift, behind, ahead, first, limit, layout, layout_size,
                    layout_columns, slopes, table, content, position, ROWS_, least, entries, position_rows,
                    MASKED, CAUSAL, WINDOW, BLOCKS, FIRST, PREFIX, LAYOUT, DOCUMENTS, SLOPES, TABLE, CONTENT, POSITION,
                )  # fmt: skip
                dropped = p
                if DROPOUT:
                    turned = kept(
                        query_offset + first_query + tl.arange(0, BLOCK_M)[:, None], key_offset + start, sample,
                        head_offset + h, seed, threshold, BLOCK_M, BLOCK_N, DROPOUT,
                    )  # fmt: skip
                    keep = tl.trans(turned)
                    dropped = tl.where(keep, p, 0.0)
                if NEED_V:
                    dv = tl.dot(dropped.to(grad.dtype), grad, dv, input_precision="ieee")
                if NEED_K or NEED_BAND:
                    delta = tl.load(DELTA_ + head * queries + i_at, mask=present, other=0.0)
                    dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
                    if DROPOUT:
                        dp = tl.where(keep, dp * rescale, 0.0)
                    ds = p * (dp - delta)
                    if NEED_BAND:
                        entry = i - j - least
                        store_band(band, n, ds, entry, entries, inside)
                        low, high = add_ends(low, high, ds, entry, entries)
                    if NEED_K:
                        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        if NEED_BAND:
            store_ends(band, n, low, high, entries, exists)
    if NEED_K:
        store_rows(DK_ + b * dk_batch + kv * dk_head, dk * scale, start, keys, dk_row, BLOCK_N, DIM, WIDTH)
    if NEED_V:
        store_rows(DV_ + b * dv_batch + kv * dv_head, dv * rescale, start, keys, dv_row, BLOCK_N, DIM, WIDTH)
