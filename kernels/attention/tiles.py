"""Which tiles of keys each tile of queries visits: from the description of a mask, without its pairs.

A tile pair is judged by the bounds of its tiles (columns, positions, document ids). The judgment errs on one side
only: a pair called empty has no visible (query, key), one called full has no hidden one. So documents may come back
later in a row and positions may be any; it only costs work.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..remember import remembered
from .masks import BlockLayout, Mask

_RECENT_LIMIT = 16


class Visits(NamedTuple):
    """What the tiles of one side visit of the other; table: (batch or 1, heads or 1, tiles, width) int32, contiguous.

    lists False, width 4: (lo, full_lo, full_hi, hi): visit tiles lo .. hi - 1; those in full_lo .. full_hi - 1 are
    full: every pair is visible and both tiles are whole, no test is needed. full_lo = full_hi = hi where none is.
    lists True, width 2 + most: (full count, count, tiles...): the full tiles first, then the others, each part rising;
    what follows `count` tiles is unread.
    """

    lists: bool
    table: Tensor


class _Bounds(NamedTuple):
    """Smallest and largest value in each tile; queries (batch or 1, 1, tiles, 1), keys (batch or 1, 1, 1, tiles)."""

    low: Tensor
    high: Tensor


def query_visits(mask: Mask, queries: int, keys: int, tile_q: int, tile_k: int, device: torch.device) -> Visits:
    """The key tiles that each query tile visits."""
    return _visits(mask, queries, keys, tile_q, tile_k, torch.device(device), transposed=False)


def key_visits(mask: Mask, queries: int, keys: int, tile_q: int, tile_k: int, device: torch.device) -> Visits:
    """The query tiles that each key tile visits, or is visited by."""
    return _visits(mask, queries, keys, tile_q, tile_k, torch.device(device), transposed=True)


def tile_matrices(
    mask: Mask, queries: int, keys: int, tile_q: int, tile_k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(some, full), both (batch or 1, heads or 1, query tiles, key tiles) bool: False in `some` means that no pair of
    the two tiles is visible; True in `full` that all are and that both tiles are whole."""
    query, whole_queries = _columns(mask.query_offset, queries, tile_q, device)
    key, whole_keys = _columns(mask.key_offset, keys, tile_k, device)
    query, key = _of_queries(query), _of_keys(key)
    some = torch.ones(1, 1, query.low.shape[2], key.low.shape[3], dtype=torch.bool, device=device)
    full = whole_queries[:, None] & whole_keys[None, :] & some
    edges = full
    if mask.banded:
        near, inside = _band(mask, query, key, tile_q, tile_k)
        some, full = some & near, full & inside
    if mask.causal:
        some, full = some & (key.low <= query.high), full & (key.high <= query.low)
    if mask.prefix is not None:
        limit = mask.prefix[:, None, None, None] if isinstance(mask.prefix, Tensor) else mask.prefix
        some, full = some | (key.low < limit), full | (edges & (key.high < limit))
    if mask.layout is not None:
        columns = (mask.key_offset + keys - 1) // mask.layout.size + 1
        near, inside = _blocks(mask.layout, query, key, columns)
        some, full = some & near, full & inside
    if mask.query_documents is not None and mask.key_documents is not None:
        near, inside = _documents(mask.query_documents, mask.key_documents, tile_q, tile_k)
        some, full = some & near, full & inside
    return torch.broadcast_tensors(some, full)  # type: ignore[return-value]


def _band(mask: Mask, query: _Bounds, key: _Bounds, tile_q: int, tile_k: int) -> tuple[Tensor, Tensor]:
    """Window, blocks and global tokens."""
    some = full = torch.ones((), dtype=torch.bool, device=query.low.device)
    if mask.window is not None:
        low, high = query.low - key.high, query.high - key.low
        some, full = (low < mask.window) & (-high < mask.window), (high < mask.window) & (-low < mask.window)
    if mask.query_positions is not None and mask.key_positions is not None:
        query = _of_queries(_extremes(mask.query_positions, tile_q))
        key = _of_keys(_extremes(mask.key_positions, tile_k))
    if mask.blocks is not None:
        size, shift, behind, ahead = mask.blocks.size, mask.blocks.shift, mask.blocks.behind, mask.blocks.ahead
        (first, last), (first_key, last_key) = ([(x + shift) // size for x in side] for side in (query, key))
        low, high = first - last_key, last - first_key
        some, full = some & (low <= behind) & (-high <= ahead), full & (high <= behind) & (-low <= ahead)
    some = some | (query.low < mask.first) | (key.low < mask.first)
    full = full | (query.high < mask.first) | (key.high < mask.first)
    return some, full


def _blocks(layout: BlockLayout, query: _Bounds, key: _Bounds, columns: int) -> tuple[Tensor, Tensor]:
    """Whether some and whether all of the layout's blocks under a tile pair are seen, of `columns` blocks of keys."""
    seen = layout.dense(columns)
    # sums[h, a, b]: how many of the first a x b blocks are seen; a rectangle is four of them.
    sums = torch.nn.functional.pad(seen.cumsum(1).cumsum(2), (1, 0, 1, 0))
    size = layout.size
    top, bottom = query.low[0, 0] // size, query.high[0, 0] // size + 1
    left, right = key.low[0, 0] // size, key.high[0, 0] // size + 1
    count = sums[:, bottom, right] - sums[:, top, right] - sums[:, bottom, left] + sums[:, top, left]
    return (count > 0)[None], (count == (bottom - top) * (right - left))[None]


def _documents(queries: Tensor, keys: Tensor, tile_q: int, tile_k: int) -> tuple[Tensor, Tensor]:
    """Whether two tiles can have a document in common, and whether both lie in one; negative ids are nobody's."""
    query, key = _of_queries(_extremes(queries, tile_q)), _of_keys(_extremes(keys, tile_k))
    largest = torch.iinfo(queries.dtype).max
    query_low = _of_queries(_extremes(torch.where(queries < 0, largest, queries), tile_q)).low
    key_low = _of_keys(_extremes(torch.where(keys < 0, largest, keys), tile_k)).low
    some = (query_low <= key.high) & (key_low <= query.high)
    full = (query.low == key.high) & (query.high == key.low) & (query.low == query.high) & (query.low >= 0)
    return some, full


def _columns(offset: int, length: int, tile: int, device: torch.device) -> tuple[_Bounds, Tensor]:
    """First and last column of each tile (1, tiles), and which tiles are whole (tiles,)."""
    low = torch.arange(offset, offset + length, tile, device=device)
    high = (low + tile - 1).clamp(max=offset + length - 1)
    return _Bounds(low[None], high[None]), high - low == tile - 1


def _extremes(x: Tensor, tile: int) -> _Bounds:
    """Bounds (batch, tiles) of x (batch, length); a short last tile is filled up with its last value."""
    fill = -x.shape[1] % tile
    tiles = torch.cat([x, x[:, -1:].expand(-1, fill)], 1).unflatten(1, (-1, tile))
    return _Bounds(tiles.amin(-1), tiles.amax(-1))


def _of_queries(bounds: _Bounds) -> _Bounds:
    return _Bounds(*(x[:, None, :, None] for x in bounds))


def _of_keys(bounds: _Bounds) -> _Bounds:
    return _Bounds(*(x[:, None, None, :] for x in bounds))


def _visits(
    mask: Mask, queries: int, keys: int, tile_q: int, tile_k: int, device: torch.device, *, transposed: bool
) -> Visits:
    """The table, from memory where the same one was asked for: every layer of a model asks, forward and backward."""
    sizes = (queries, keys, tile_q, tile_k)
    tensors = _tensors(mask)
    if not tensors:
        return _plain_visits(mask, sizes, device, transposed)
    if _cannot_remember(tensors, device):
        return _compute(mask, sizes, device, transposed)
    # A table made on one stream may not be ready on another.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (_without_tensors(mask), sizes, device, stream, transposed, tuple(_identity(x) for x in tensors))
    with _lock:  # backward runs on threads of its own
        if key in _recent:
            _recent.move_to_end(key)
            return _recent[key][0]
    visits = _compute(mask, sizes, device, transposed)
    with _lock:
        # The tensors are kept with the table: while they live, nothing else has their addresses.
        _recent[key] = (visits, tensors)
        if len(_recent) > _RECENT_LIMIT:
            _recent.popitem(last=False)
    return visits


_recent: OrderedDict[Hashable, tuple[Visits, tuple[Tensor, ...]]] = OrderedDict()
_lock = threading.Lock()


@remembered(256)
def _plain_visits(mask: Mask, sizes: tuple[int, int, int, int], device: torch.device, transposed: bool) -> Visits:
    lists, table = _compute(mask, sizes, torch.device("cpu"), transposed)
    return Visits(lists, table.to(device))


def _compute(mask: Mask, sizes: tuple[int, int, int, int], device: torch.device, transposed: bool) -> Visits:
    some, full = tile_matrices(mask, *sizes, device)
    if transposed:
        some, full = some.transpose(2, 3), full.transpose(2, 3)
    # Not one run of tiles: a layout; global tokens or a prefix to the left of a band.
    lists = mask.layout is not None or (mask.banded and (mask.first > 0 or mask.prefix is not None))
    table = _list_table(some, full) if lists else _range_table(some, full)
    return Visits(lists, table.to(torch.int32).contiguous())


def _range_table(some: Tensor, full: Tensor) -> Tensor:
    """(batch, heads, tiles, 4): one range over all that is seen, and in it the longest run of full tiles."""
    tiles = some.shape[-1]
    at = torch.arange(tiles, device=some.device)
    low, high = torch.where(some, at, tiles).amin(-1), torch.where(some, at + 1, 0).amax(-1)
    low = torch.minimum(low, high)
    run = at - torch.where(full, -1, at).cummax(-1).values  # how many full tiles end here
    longest = run.argmax(-1, keepdim=True)
    length = run.gather(-1, longest)[..., 0]
    full_high = torch.where(length > 0, longest[..., 0] + 1, high)
    return torch.stack([low, full_high - length, full_high, high], -1)


def _list_table(some: Tensor, full: Tensor) -> Tensor:
    """(batch, heads, tiles, 2 + most): counts, then the full tiles and after them the others."""
    counts = torch.stack([full.sum(-1), some.sum(-1)], -1)
    # How many the longest list has is only read where there are values, and reading does not wait for a device.
    unread = some.is_cuda or isinstance(some, FakeTensor)
    most = some.shape[-1] if unread else max(1, int(counts[..., 1].max()))
    order = 2 - some.to(torch.int8) - full.to(torch.int8)
    return torch.cat([counts, order.sort(dim=-1, stable=True).indices[..., :most]], -1)


def _tensors(mask: Mask) -> tuple[Tensor, ...]:
    own = tuple(x for x in (getattr(mask, field.name) for field in fields(mask)) if isinstance(x, Tensor))
    return own if mask.layout is None else (*own, mask.layout.counts, mask.layout.indices)


def _without_tensors(mask: Mask) -> Hashable:
    plain = dict.fromkeys(("query_documents", "key_documents", "query_positions", "key_positions", "layout"))
    given = tuple(getattr(mask, name) is not None for name in plain)
    prefix = "tensor" if isinstance(mask.prefix, Tensor) else mask.prefix
    size = None if mask.layout is None else mask.layout.size
    return replace(mask, prefix=None, **plain), given, prefix, size  # type: ignore[arg-type]


def _cannot_remember(tensors: tuple[Tensor, ...], device: torch.device) -> bool:
    """Without a version a change in place would go unseen, a subclass (a fake tensor, say) may have no address, and a
    captured graph must compute its tables itself."""
    if any(x.is_inference() or type(x) is not Tensor for x in tensors):
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _identity(x: Tensor) -> Hashable:
    return x.data_ptr(), x._version, x.dtype, tuple(x.shape), x.stride()
