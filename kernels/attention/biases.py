"""What is added to the scaled scores, described in O(length) memory: by distance per head, or disentangled.

The distance of query i from key j is the difference of their columns, positive where the key is older; inside a
document it is the difference of their positions too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Toeplitz:
    """A bias per head that depends on the distance only; exactly one of:

    slopes: (head,) fp32, bias = -slopes[h] |distance| (ALiBi, Press et al. 2021); a constant, it takes no gradient.
    table: (head, entries), bias = table[h, distance - least] in fp32, the ends of the table going on for ever (T5's
    buckets, Sandwich, learned relative positions); gradients reach it. least: the distance of entry 0.
    Heads are the call's own: a tensor-parallel shard passes its slice.
    """

    slopes: Tensor | None = None
    table: Tensor | None = None
    least: int = 0

    def __post_init__(self) -> None:
        if (self.slopes is None) == (self.table is None):
            raise ValueError("Toeplitz: give either slopes or a table")

    @property
    def heads(self) -> int:
        """How many heads it has."""
        return len(self.slopes if self.slopes is not None else self.table)  # type: ignore[arg-type]

    def share(self, rank: int, ranks: int) -> Toeplitz:
        """That of one of `ranks` equal shares of the heads."""
        return replace(self, slopes=_share(self.slopes, rank, ranks), table=_share(self.table, rank, ranks))


@dataclass(frozen=True)
class Disentangled:
    """DeBERTa's two position terms (He et al. 2020, equation 4, with the index that the released code uses for both):

        bias[h, i, j] = scale (q_i . position_keys[h, r] + k_j . position_queries[h, r]),  r = rows[distance - least]

    position_keys (content to position), position_queries (position to content): (head, P, dim) or None, in q's dtype.
    rows: (entries,) int32, the row of each distance from `least` on; the ends go on for ever. scale is the call's.
    """

    position_keys: Tensor | None
    position_queries: Tensor | None
    rows: Tensor
    least: int

    @property
    def heads(self) -> int:
        """How many heads it has."""
        given = self.position_keys if self.position_keys is not None else self.position_queries
        assert given is not None
        return len(given)

    def share(self, rank: int, ranks: int) -> Disentangled:
        """That of one of `ranks` equal shares of the heads."""
        keys, queries = (_share(x, rank, ranks) for x in (self.position_keys, self.position_queries))
        return replace(self, position_keys=keys, position_queries=queries)


def _share(x: Tensor | None, rank: int, ranks: int) -> Tensor | None:
    return None if x is None else x.chunk(ranks)[rank]


Bias = Toeplitz | Disentangled


class BiasTerms(NamedTuple):
    """A bias as the forms of attention read it; all None is no bias. What they add to the scaled score of (i, j), with
    e = clamp(distance - least, 0, entries - 1):

    slopes (head,): -slopes[h] |distance|; table (head, entries): table[h, e];
    content (batch, head, queries, P): content[b, h, i, rows[e]]; position (batch, head, keys, P): position[b, h, j,
    rows[e]]. rows (entries,) int32. All but content and position, which have q's dtype, are fp32 (fp64 for fp64).
    """

    slopes: Tensor | None = None
    table: Tensor | None = None
    content: Tensor | None = None
    position: Tensor | None = None
    rows: Tensor | None = None
    least: int = 0

    @property
    def empty(self) -> bool:
        """Whether nothing is added."""
        return self.slopes is None and self.table is None and self.content is None and self.position is None


def resolve_bias(bias: Bias | None, q: Tensor, k: Tensor, scale: float) -> BiasTerms:
    """The terms of a bias for these queries (batch, head, queries, dim) and keys (batch, kv head, keys, dim).

    Differentiable: gradients of the terms reach q, k and the description's tensors through torch.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if bias is None:
        return BiasTerms()
    if isinstance(bias, Toeplitz):
        slopes = None if bias.slopes is None else bias.slopes.detach().to(wide)
        return BiasTerms(slopes, None if bias.table is None else bias.table.to(wide), least=bias.least)
    content = position = None
    if bias.position_keys is not None:
        content = (q * scale) @ bias.position_keys.to(q.dtype).transpose(-1, -2)
    if bias.position_queries is not None:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        position = (keys * scale) @ bias.position_queries.to(q.dtype).transpose(-1, -2)
    return BiasTerms(None, None, content, position, bias.rows, bias.least)


def resolve_row(bias: Disentangled, q: Tensor, k: Tensor, scale: float, apart: int) -> BiasTerms:
    """`resolve_bias` for a single query, `apart` columns after the first key (decoding): every key has one distance, so
    one row of the position queries is needed for each, not all. The terms come as `content` by distance."""
    keys = k.shape[2]
    distance = apart - torch.arange(keys, device=q.device)
    row = bias.rows.long()[(distance - bias.least).clamp(0, len(bias.rows) - 1)]
    total = q.new_zeros(())
    if bias.position_keys is not None:
        total = ((q * scale) @ bias.position_keys.to(q.dtype).transpose(-1, -2))[..., row]
    if bias.position_queries is not None:
        tables = bias.position_queries.to(q.dtype)[:, row].unflatten(0, (k.shape[1], -1))
        total = total + (torch.einsum("bkld,kgld->bkgl", k, tables) * scale).flatten(1, 2)[:, :, None]
    entries = torch.arange(keys, dtype=torch.int32, device=q.device)
    return BiasTerms(content=total.flip(-1), rows=entries, least=apart - (keys - 1))


def bias_values(terms: BiasTerms, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch or 1, head, n, m) in dtype: the bias of queries at columns `queries` (n,) and keys at `keys` (m,).

    content and position must already be cut to these queries and keys. The definition; distances are exact integers.
    """
    distance = queries[:, None] - keys[None, :]
    if terms.slopes is not None:
        return -terms.slopes.to(dtype)[None, :, None, None] * distance.abs().to(dtype)
    if terms.table is not None:
        return terms.table.to(dtype)[:, (distance - terms.least).clamp(0, terms.table.shape[1] - 1)][None]
    assert terms.rows is not None
    row = terms.rows.long()[(distance - terms.least).clamp(0, len(terms.rows) - 1)]
    total = torch.zeros((), dtype=dtype, device=distance.device)
    if terms.content is not None:
        total = total + terms.content.to(dtype).gather(3, row.expand(*terms.content.shape[:2], *row.shape))
    if terms.position is not None:
        turned = terms.position.to(dtype).gather(3, row.T.expand(*terms.position.shape[:2], *row.T.shape))
        total = total + turned.transpose(2, 3)
    return total


def alibi_slopes(heads: int) -> Tensor:
    """(heads,) fp32: r^1 .. r^heads with r = 2^(-8 / heads); for other counts than powers of two, the slopes of the
    lower power followed by every second slope of the next one (Press et al. 2021, reference code)."""

    def geometric(count: int) -> list[float]:
        return [2 ** (-8 * (h + 1) / count) for h in range(count)]

    lower = 2 ** math.floor(math.log2(heads))
    return torch.tensor(geometric(lower) + geometric(2 * lower)[0::2][: heads - lower], dtype=torch.float32)


def sandwich_table(heads: int, distances: int, dim: int = 128) -> Tensor:
    """(heads, distances) fp32: entry d >= 0 of head h is (sum_i cos(d / 10000^(2 i / dim)) - dim / 2) / c_h, with
    i = 0 .. dim / 2 - 1 and c_h = 8 (h + 1) / heads: the product of two sinusoidal embeddings d apart, less its value
    at distance 0, which softmax does not see (Chi et al. 2022, section 5)."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    sums = (torch.arange(distances, dtype=torch.float64)[:, None] * frequencies).cos().sum(1) - dim / 2
    strength = 8 * torch.arange(1, heads + 1, dtype=torch.float64) / heads
    return (sums / strength[:, None]).float()


def t5_bucket(distance: Tensor, *, buckets: int = 32, furthest: int = 128, causal: bool = True) -> Tensor:
    """int64 bucket of each distance (query - key) in Raffel et al. 2020: exact for the nearest half, logarithmic up to
    `furthest`, one beyond. Without `causal` half of the buckets are for keys that come later."""
    offset = torch.zeros_like(distance)
    if causal:
        distance = distance.clamp(min=0)
    else:
        buckets //= 2
        offset = (distance < 0).long() * buckets
        distance = distance.abs()
    exact = buckets // 2
    # fp32 and truncated, as the released models compute it: a bucket's edge is a matter of rounding.
    far = (distance.clamp(min=1).float() / exact).log() / math.log(furthest / exact) * (buckets - exact)
    far = (exact + far.long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


def deberta_rows(span: int, buckets: int = 0, furthest: int = 0) -> tuple[Tensor, int]:
    """(rows (entries,) int32, least) of `Disentangled`, 2 x span rows: row = clamp(f(distance) + span, 0, 2 span - 1).

    f is the identity (DeBERTa v1: span = k), or with `buckets` (v2 and v3: span = buckets) exact up to buckets / 2
    and logarithmic up to `furthest` distances.
    """
    reach = max(span, furthest)
    distance = torch.arange(-reach, reach + 1)
    if buckets:
        middle = buckets // 2
        size = distance.abs().clamp(min=middle).double()
        far = middle + ((size / middle).log() / math.log((furthest - 1) / middle) * (middle - 1)).ceil()
        distance = torch.where(distance.abs() <= middle, distance, distance.sign() * far.long())
    return (distance + span).clamp(0, 2 * span - 1).to(torch.int32), -reach
