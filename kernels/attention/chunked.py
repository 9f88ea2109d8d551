"""Attention in plain torch with O(length) memory: tiles of scores, an online softmax, and a backward that makes the
tiles again (Rabe & Staats 2021; Dao et al. 2022). Any dtype and device; arithmetic in fp32, or fp64 for fp64.

Work is proportional to the tiles that the mask does not empty. A tile covers all samples and heads at once unless
they visit very different ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..dropout import attention_keep_mask
from .biases import BiasTerms, bias_values
from .function import Drop, Gradients, row_delta
from .masks import Mask
from .tiles import tile_matrices

# The fastest of 64 to 512 on CPUs: a tile of scores of eight heads is half a megabyte.
TILE_Q = 128
TILE_K = 128
WASTE = 1.5
"""How many times the tiles that are needed are visited rather than going through samples or heads one by one."""


class _Part(NamedTuple):
    """Samples and heads whose tiles are visited together; `some` and `full` are theirs, as nested lists."""

    samples: slice
    heads: slice
    kv_heads: slice
    some: list[list[bool]]
    full: list[list[bool]]


class _Tile(NamedTuple):
    """What a pair of tiles needs: (samples, heads, tile_q, tile_k), or None where it changes nothing."""

    bias: Tensor | None
    hidden: Tensor | None
    keep: Tensor | None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Mask,
    scale: float,
    drop: Drop | None,
    *,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """See `function.Form.forward`."""
    dtype = _wide(q)
    calls = _Calls(q, k, terms, mask, drop)
    # In the memory order of q, so that a caller's transposes undo each other.
    like = q if q.shape[3] == v.shape[3] else q.new_empty(*q.shape[:3], v.shape[3])
    out = torch.zeros_like(like, dtype=dtype if wide else q.dtype)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    for part, rows, columns in calls.rows():
        here = (part.samples, part.heads, rows)
        query = q[here].to(dtype) * scale
        top, total, acc = lse[here][..., None], lse.new_zeros(()), lse.new_zeros(())
        for keys, full in columns:
            there = (part.samples, part.kv_heads, keys)
            tile = calls.tile(part, rows, keys, full, dtype)
            scores = _scores(query, k[there].to(dtype), tile)
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))
            safe = torch.where(higher == float("-inf"), 0, higher)
            weights, old = (scores - safe).exp_(), (top - safe).exp_()
            total = total * old + weights.sum(-1, keepdim=True)
            if tile.keep is not None:
                weights = torch.where(tile.keep, weights, 0)
            acc = acc * old + _grouped(weights, v[there].to(dtype))
            top = higher
        if not columns:
            continue
        empty = total == 0
        total = torch.where(empty, 1, total)
        factor = 1.0 if drop is None else 1 / (1 - drop.p)
        out[here] = (acc * (factor / total)).to(out.dtype)
        lse[here] = torch.where(empty, float("-inf"), top + total.log())[..., 0]
    return out, lse


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
    """See `function.Form.backward`."""
    dtype = _wide(q)
    calls = _Calls(q, k, terms, mask, drop)
    inputs = (q, k, v, terms.table, terms.content, terms.position)
    grads = [
        torch.zeros_like(x, dtype=dtype) if need and x is not None else None
        for x, need in zip(inputs, needs, strict=True)
    ]
    grad_q, grad_k, grad_v = grads[:3]
    bias_grads = _BiasGradients(terms, *grads[3:])
    delta = row_delta(grad_out, out, grad_lse)[..., None]
    # A row that sees nothing has no probabilities: exp(score - inf) = 0.
    ends = torch.where(lse == float("-inf"), float("inf"), lse.to(dtype))[..., None]
    factor = 1.0 if drop is None else 1 / (1 - drop.p)
    for part, rows, columns in calls.rows():
        here = (part.samples, part.heads, rows)
        query, upper = q[here].to(dtype) * scale, grad_out[here].to(dtype)
        for keys, full in columns:
            there = (part.samples, part.kv_heads, keys)
            tile = calls.tile(part, rows, keys, full, dtype)
            key = k[there].to(dtype)
            weights = _scores(query, key, tile).sub_(ends[here]).exp_()
            grad_weights = _grouped(upper, v[there].to(dtype).transpose(2, 3))
            dropped = weights
            if tile.keep is not None:
                kept = tile.keep.to(dtype) * factor
                dropped, grad_weights = weights * kept, grad_weights * kept
            if grad_v is not None:
                grad_v[there] += _over_group(dropped, upper, part)
            grad_scores = grad_weights.sub_(delta[here]).mul_(weights)
            if grad_q is not None:
                grad_q[here] += _grouped(grad_scores, key)
            if grad_k is not None:
                grad_k[there] += _over_group(grad_scores, query, part)
            bias_grads.add(grad_scores, part, rows, keys, mask)
    if grad_q is not None:
        grad_q *= scale
    return tuple(None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))  # type: ignore


class _Calls:
    """The tiles of a call, in order, and the bias, mask and dropout of each."""

    def __init__(self, q: Tensor, k: Tensor, terms: BiasTerms, mask: Mask, drop: Drop | None) -> None:
        self.batch, self.heads, self.queries, _ = q.shape
        self.group, self.keys = self.heads // k.shape[1], k.shape[2]
        self.terms, self.mask, self.drop, self.device = terms, mask, drop, q.device
        # Few queries (decoding) take longer tiles of keys: as many scores at once, fewer steps.
        self.tile_q = min(TILE_Q, self.queries)
        self.tile_k = TILE_K * (TILE_Q // self.tile_q)
        self.layout: Tensor | None = None
        if mask.layout is not None:
            self.layout = mask.layout.dense((mask.key_offset + self.keys - 1) // mask.layout.size + 1)

    def rows(self) -> Iterator[tuple[_Part, slice, list[tuple[slice, bool]]]]:
        """Each part's tiles of queries with the key tiles they visit and whether those are full."""
        for part in self._parts():
            for m, (some, full) in enumerate(zip(part.some, part.full, strict=True)):
                columns = [(_cut(n, self.tile_k, self.keys), full[n]) for n, seen in enumerate(some) if seen]
                yield part, _cut(m, self.tile_q, self.queries), columns

    def _parts(self) -> Iterator[_Part]:
        some, full = tile_matrices(self.mask, self.queries, self.keys, self.tile_q, self.tile_k, self.device)
        if isinstance(some, FakeTensor):  # there is only memory to count, and one tile of keys takes what any does
            one = [[True] + [False] * (some.shape[3] - 1)] * some.shape[2]
            none = [[False] * some.shape[3]] * some.shape[2]
            yield _Part(slice(0, self.batch), slice(0, self.heads), slice(0, self.heads // self.group), one, none)
            return
        for axis in (0, 1):
            together = some.any(axis, keepdim=True)
            # Little to skip: one call over all is cheaper than many over one each.
            if together.sum() * some.shape[axis] <= WASTE * some.sum():
                some, full = together, full.all(axis, keepdim=True)
        for b in range(some.shape[0]):
            samples = slice(b, b + 1) if some.shape[0] > 1 else slice(0, self.batch)
            for h in range(some.shape[1]):
                one = some.shape[1] > 1
                heads = slice(h, h + 1) if one else slice(0, self.heads)
                kv_heads = slice(h // self.group, h // self.group + 1) if one else slice(0, self.heads // self.group)
                yield _Part(samples, heads, kv_heads, some[b, h].tolist(), full[b, h].tolist())

    def tile(self, part: _Part, rows: slice, keys: slice, full: bool, dtype: torch.dtype) -> _Tile:
        bias = hidden = keep = None
        if not self.terms.empty:
            bias = bias_values(_terms_of(self.terms, part, rows, keys), *self._columns(rows, keys), dtype)
        if not full:
            hidden = ~self._visible(part, rows, keys)
        if self.drop is not None:
            samples = self.drop.key.samples[part.samples]
            keep = attention_keep_mask(
                (len(samples), part.heads.stop - part.heads.start, rows.stop - rows.start, keys.stop - keys.start),
                self.drop.p,
                key=replace(self.drop.key, samples=samples),
                query_offset=self.mask.query_offset + rows.start,
                key_offset=self.mask.key_offset + keys.start,
                head_offset=self.drop.head_offset + part.heads.start,
                device=self.device,
            )
        return _Tile(bias, hidden, keep)

    def _columns(self, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        first_query, first_key = self.mask.query_offset, self.mask.key_offset
        return (
            torch.arange(first_query + rows.start, first_query + rows.stop, device=self.device),
            torch.arange(first_key + keys.start, first_key + keys.stop, device=self.device),
        )

    def _visible(self, part: _Part, rows: slice, keys: slice) -> Tensor:
        """(samples or 1, heads or 1, tile_q, tile_k): the mask of these tiles alone."""
        mask = self.mask
        here = replace(
            mask,
            query_offset=mask.query_offset + rows.start,
            key_offset=mask.key_offset + keys.start,
            query_documents=_cells(mask.query_documents, part.samples, rows),
            key_documents=_cells(mask.key_documents, part.samples, keys),
            query_positions=_cells(mask.query_positions, part.samples, rows),
            key_positions=_cells(mask.key_positions, part.samples, keys),
            prefix=mask.prefix[part.samples] if isinstance(mask.prefix, Tensor) else mask.prefix,
            layout=None,
        )
        seen = here.visible(rows.stop - rows.start, keys.stop - keys.start, self.device)
        if self.layout is None or mask.layout is None:
            return seen
        layout = self.layout if len(self.layout) == 1 else self.layout[part.heads]
        query, key = (x // mask.layout.size for x in self._columns(rows, keys))
        return seen & layout[:, query][:, :, key]


class _BiasGradients:
    """Adds up what flows into the terms of the bias."""

    def __init__(self, terms: BiasTerms, table: Tensor | None, content: Tensor | None, position: Tensor | None) -> None:
        self.terms, self.table, self.content, self.position = terms, table, content, position

    def add(self, grad_scores: Tensor, part: _Part, rows: slice, keys: slice, mask: Mask) -> None:
        if self.table is None and self.content is None and self.position is None:
            return
        n, m = grad_scores.shape[2:]
        apart = mask.query_offset + rows.start - mask.key_offset - keys.start
        distance = torch.arange(apart - (m - 1), apart + n, device=grad_scores.device)
        if self.table is not None:
            entry = (distance - self.terms.least).clamp(0, self.table.shape[1] - 1)
            sums = _by_distance(grad_scores.sum(0)).sum(1)
            self.table[part.heads] = _add_at(self.table[part.heads], entry, sums)
            return
        assert self.terms.rows is not None
        entry = self.terms.rows.long()[(distance - self.terms.least).clamp(0, len(self.terms.rows) - 1)]
        if self.content is not None:
            here = (part.samples, part.heads, rows)
            self.content[here] = _add_at(self.content[here], entry, _by_distance(grad_scores))
        if self.position is not None:
            here = (part.samples, part.heads, keys)
            turned = _by_distance(grad_scores.transpose(2, 3))
            self.position[here] = _add_at(self.position[here], entry.flip(0), turned)


def _by_distance(x: Tensor) -> Tensor:
    """(..., n, m) -> (..., n, n + m - 1): element (i, j) goes to (i, i - j + m - 1), zeros elsewhere."""
    n, m = x.shape[-2:]
    # Rows as long as one more than the result has, read in rows of the result: each row starts one further right.
    padded = torch.nn.functional.pad(x.flip(-1), (0, n)).flatten(-2)
    return padded[..., : n * (n + m - 1)].unflatten(-1, (n, n + m - 1))


def _add_at(into: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """into[..., index[c]] += x[..., c], in an order that does not change from run to run; index (columns,)."""
    if into.is_cpu:
        return into.scatter_add(-1, index.expand_as(x), x)
    choice = torch.nn.functional.one_hot(index, into.shape[-1]).to(x.dtype)
    return into + x @ choice


def _scores(query: Tensor, key: Tensor, tile: _Tile) -> Tensor:
    scores = _grouped(query, key.transpose(2, 3))
    if tile.bias is not None:
        scores = scores.add_(tile.bias)
    if tile.hidden is not None:
        scores = scores.masked_fill_(tile.hidden, float("-inf"))
    return scores


def _grouped(x: Tensor, y: Tensor) -> Tensor:
    """x (batch, head, n, a) @ y (batch, kv head, a, b), each kv head for its group of heads -> (batch, head, n, b)."""
    batch, heads, n, _ = x.shape
    if heads == y.shape[1]:
        return x @ y
    # The heads of a group are more rows of one product: nothing is repeated.
    return (x.reshape(batch, y.shape[1], -1, x.shape[3]) @ y).view(batch, heads, n, y.shape[3])


def _over_group(x: Tensor, y: Tensor, part: _Part) -> Tensor:
    """x^T y for x (batch, head, n, a), y (batch, head, n, b), summed over each group -> (batch, kv head, a, b)."""
    kv_heads = part.kv_heads.stop - part.kv_heads.start
    x, y = (z.reshape(len(z), kv_heads, -1, z.shape[3]) for z in (x, y))
    return x.transpose(2, 3) @ y


def _terms_of(terms: BiasTerms, part: _Part, rows: slice, keys: slice) -> BiasTerms:
    """The terms of one tile pair; what is small stays whole."""
    return terms._replace(
        slopes=None if terms.slopes is None else terms.slopes[part.heads],
        table=None if terms.table is None else terms.table[part.heads],
        content=None if terms.content is None else terms.content[part.samples, part.heads, rows],
        position=None if terms.position is None else terms.position[part.samples, part.heads, keys],
    )


def _cells(x: Tensor | None, samples: slice, columns: slice) -> Tensor | None:
    """Part of (batch or 1, length)."""
    if x is None:
        return None
    return x[:, columns] if len(x) == 1 else x[samples, columns]


def _cut(index: int, size: int, length: int) -> slice:
    return slice(index * size, min(index * size + size, length))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
