"""What a query sees and how scores are changed, described without making anything of length x length.

All positions are global indices in a row: query i is at `query_offset + i`, key j at `key_offset + j`, so a key-value
cache and a sequence shard are served by the same descriptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees.

    causal: keys at or before the query's position. window: only keys closer than `window` tokens (window=1 is the
    token itself; both sides when not causal). prefix: keys at positions below it are seen whatever the two say (a
    prefix language model); an int or (batch,).
    query_documents, key_documents: (batch, length) int32 for this call's queries and keys, given together; a query
    sees only keys of its own document, and -1 (padding) sees and is seen by nothing.
    """

    causal: bool = True
    query_offset: int = 0
    key_offset: int = 0
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    window: int | None = None
    prefix: int | Tensor | None = None

    def __post_init__(self) -> None:
        if (self.query_documents is None) != (self.key_documents is None):
            raise ValueError("Mask: give query_documents and key_documents together (self-attention: the same ids)")
        if self.window is not None and self.window < 1:
            raise ValueError(f"Mask: window={self.window} must be at least 1 (the token itself)")

    def hides_nothing(self, queries: int, keys: int) -> bool:
        """True when no query of this call is denied any key, known without looking at tensors."""
        if self.query_documents is not None or self.window is not None:
            return False
        return not self.causal or self.query_offset >= self.key_offset + keys - 1

    def is_plain_causal(self) -> bool:
        """True when query i sees exactly keys 0..i."""
        return (
            self.causal
            and self.query_offset == self.key_offset
            and self.query_documents is None
            and self.window is None
            and self.prefix is None
        )

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(batch or 1, 1, queries, keys) bool: the mask itself, for forms that need one."""
        query = torch.arange(self.query_offset, self.query_offset + queries, device=device)[:, None]
        key = torch.arange(self.key_offset, self.key_offset + keys, device=device)[None, :]
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
        if self.causal:
            seen = seen & (key <= query)
        if self.window is not None:
            seen = seen & ((query - key).abs() < self.window)
        if self.prefix is not None:
            limit = self.prefix[:, None, None, None] if isinstance(self.prefix, Tensor) else self.prefix
            seen = seen | (key < limit)
        if self.query_documents is not None and self.key_documents is not None:
            ours, theirs = self.query_documents[:, None, :, None], self.key_documents[:, None, None, :]
            seen = seen & (ours == theirs) & (ours >= 0)
        return seen


@dataclass(frozen=True)
class Toeplitz:
    """A bias per head that depends on the distance only: bias[h, i, j] = -slopes[h] |i - j| (ALiBi, Press et al. 2021).

    slopes: (head,) fp32, the local heads' own (a tensor-parallel shard passes its slice).
    """

    slopes: Tensor
    query_offset: int = 0
    key_offset: int = 0

    def share(self, rank: int, ranks: int) -> Toeplitz:
        """That of one of `ranks` equal shares of the heads."""
        return replace(self, slopes=self.slopes.chunk(ranks)[rank])

    def values(self, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
        """(1, head, queries, keys) in dtype. Distances are exact integers: never in half precision."""
        device = self.slopes.device
        query = torch.arange(self.query_offset, self.query_offset + queries, device=device)[:, None]
        key = torch.arange(self.key_offset, self.key_offset + keys, device=device)[None, :]
        return -self.slopes.to(dtype)[None, :, None, None] * (query - key).abs().to(dtype)


def alibi_slopes(heads: int) -> Tensor:
    """(heads,) fp32: r^1 .. r^heads with r = 2^(-8 / heads); for other counts than powers of two, the slopes of the
    lower power followed by every second slope of the next one (Press et al. 2021, reference code)."""

    def geometric(count: int) -> list[float]:
        return [2 ** (-8 * (h + 1) / count) for h in range(count)]

    lower = 2 ** math.floor(math.log2(heads))
    return torch.tensor(geometric(lower) + geometric(2 * lower)[0::2][: heads - lower], dtype=torch.float32)


@dataclass(frozen=True)
class Rotary:
    """Rotation of query and key pairs by angles proportional to position (RoPE, Su et al. 2021).

    inv_freq: (pairs,) fp32 or fp64; the first 2 x pairs channels of a head rotate, the rest pass unchanged.
    query_positions, key_positions: (batch or 1, length); None leaves that side as it is (keys rotated when cached).
    interleaved: pairs are (0, 1), (2, 3), ... as in RoFormer; else (0, pairs), (1, pairs + 1), ... as in GPT-NeoX.
    """

    inv_freq: Tensor
    query_positions: Tensor | None
    key_positions: Tensor | None
    interleaved: bool = False

    def rotate_query(self, x: Tensor) -> Tensor:
        return x if self.query_positions is None else rotate(x, self._query_angles, self.interleaved)

    def rotate_key(self, x: Tensor) -> Tensor:
        return x if self.key_positions is None else rotate(x, self._key_angles, self.interleaved)

    @cached_property
    def _query_angles(self) -> Tensor:
        assert self.query_positions is not None
        return rotary_angles(self.inv_freq, self.query_positions)

    @cached_property
    def _key_angles(self) -> Tensor:
        assert self.key_positions is not None
        return rotary_angles(self.inv_freq, self.key_positions)


def rotary_frequencies(head_dim: int, base: float = 10000.0, fraction: float = 1.0) -> Tensor:
    """(pairs,) fp32: base^(-2 i / rotated) for the first `fraction` of the head's channels."""
    rotated = int(head_dim * fraction)
    if rotated < 2 or rotated % 2:
        raise ValueError(f"rotary: {fraction} of head_dim={head_dim} is {rotated} channels; an even number is needed")
    return (base ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)).float()


def rotary_angles(inv_freq: Tensor, positions: Tensor) -> Tensor:
    """(batch or 1, 1, length, pairs), in fp32 or fp64: half-precision angles would be off by radians."""
    dtype = torch.float64 if inv_freq.dtype == torch.float64 else torch.float32
    return (positions.to(dtype)[:, :, None] * inv_freq.to(dtype))[:, None]


def rotate(x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the leading pairs of x (batch, head, length, dim) by `angles`; arithmetic in fp32, or fp64 for fp64 x."""
    pairs = angles.shape[-1]
    if 2 * pairs > x.shape[-1]:
        raise ValueError(f"rotary: {pairs} frequencies rotate {2 * pairs} channels, but heads have {x.shape[-1]}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    turned, rest = x[..., : 2 * pairs].to(wide), x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        out = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    out = out.to(x.dtype)
    return torch.cat([out, rest], -1) if rest.shape[-1] else out
