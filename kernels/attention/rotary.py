"""Rotations of query and key channels by their positions: RoPE and, with a decay, xPos."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..backend import resolve_backend


@dataclass(frozen=True)
class Rotary:
    """Rotation of query and key pairs by angles proportional to position (RoPE, Su et al. 2021).

    inv_freq: (pairs,) fp32 or fp64; the first 2 x pairs channels of a head rotate, the rest pass unchanged.
    query_positions, key_positions: (batch or 1, length); None leaves that side as it is (keys rotated when cached).
    interleaved: pairs are (0, 1), (2, 3), ... as in RoFormer; else (0, pairs), (1, pairs + 1), ... as in GPT-NeoX.
    log_decay: (pairs,) of inv_freq's dtype, xPos (Sun et al. 2022): queries are multiplied by exp(log_decay (p -
    center)), keys by exp(-log_decay (p - center)), so that scores fall with the distance. The center cancels; it
    keeps both factors in the range of half precision.
    """

    inv_freq: Tensor
    query_positions: Tensor | None
    key_positions: Tensor | None
    interleaved: bool = False
    log_decay: Tensor | None = None
    center: int = 0

    def rotate_query(self, x: Tensor) -> Tensor:
        if self.query_positions is None:
            return x
        # A compiler cannot trace a cached property, nor keep a traced tensor.
        table = self._table(self.query_positions, 1) if torch.compiler.is_compiling() else self._query_table
        return _turn(x, *table, self.interleaved)

    def rotate_key(self, x: Tensor) -> Tensor:
        if self.key_positions is None:
            return x
        table = self._table(self.key_positions, -1) if torch.compiler.is_compiling() else self._key_table
        return _turn(x, *table, self.interleaved)

    @cached_property
    def _query_table(self) -> tuple[Tensor, Tensor]:
        assert self.query_positions is not None
        return self._table(self.query_positions, 1)

    @cached_property
    def _key_table(self) -> tuple[Tensor, Tensor]:
        assert self.key_positions is not None
        return self._table(self.key_positions, -1)

    def _table(self, positions: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines with the factors in them; sign: 1 for queries, -1 for keys."""
        angles = rotary_angles(self.inv_freq, positions)
        if self.log_decay is None:
            return angles.cos(), angles.sin()
        factors = (rotary_angles(self.log_decay, positions - self.center) * sign).exp()
        return angles.cos() * factors, angles.sin() * factors


def rotary_frequencies(head_dim: int, base: float = 10000.0, fraction: float = 1.0) -> Tensor:
    """(pairs,) fp32: base^(-2 i / rotated) for the first `fraction` of the head's channels."""
    rotated = int(head_dim * fraction)
    if rotated < 2 or rotated % 2:
        raise ValueError(f"rotary: {fraction} of head_dim={head_dim} is {rotated} channels; an even number is needed")
    return (base ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)).float()


def xpos_log_decay(head_dim: int, gamma: float = 0.4, scale_base: float = 512.0) -> Tensor:
    """(head_dim / 2,) fp32: ln(zeta_i) / scale_base with zeta_i = (2 i + gamma d) / ((1 + gamma) d) (Sun et al. 2022,
    section 2.2): a pair's score falls by zeta_i over a distance of scale_base."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
    return (((pairs + gamma * head_dim) / ((1 + gamma) * head_dim)).log() / scale_base).float()


def rotary_angles(inv_freq: Tensor, positions: Tensor) -> Tensor:
    """(batch or 1, 1, length, pairs), in fp32 or fp64: half-precision angles would be off by radians."""
    dtype = torch.float64 if inv_freq.dtype == torch.float64 else torch.float32
    return (positions.to(dtype)[:, :, None] * inv_freq.to(dtype))[:, None]


def rotate(x: Tensor, angles: Tensor, interleaved: bool = False, factors: Tensor | None = None) -> Tensor:
    """Rotate the leading pairs of x (batch, head, length, dim) by `angles` (batch or 1, 1, length, pairs), each pair
    times its factor (of the angles' shape) if there are factors; arithmetic in fp32, or fp64 for fp64 x.

    On a GPU one kernel does it, forward and backward; elsewhere, in fp64, and where the angles take a gradient, torch.
    """
    cos, sin = angles.cos(), angles.sin()
    if factors is not None:
        cos, sin = cos * factors, sin * factors
    return _turn(x, cos, sin, interleaved)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`rotate` by cosines and sines that have the factors in them."""
    pairs = cos.shape[-1]
    if 2 * pairs > x.shape[-1]:
        raise ValueError(f"rotary: {pairs} frequencies rotate {2 * pairs} channels, but heads have {x.shape[-1]}")
    if _fused(x, cos):
        from .triton_rotary import rotate_by_table

        return rotate_by_table(x, cos[:, 0], sin[:, 0], interleaved)
    return turn_by_torch(x, cos, sin, interleaved)


def turn_by_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The torch form of a rotation: cos and sin (batch or 1, 1, length, pairs), factors multiplied in."""
    pairs = cos.shape[-1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(wide), sin.to(wide)
    turned, rest = x[..., : 2 * pairs].to(wide), x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        out = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([out.to(x.dtype), rest], -1) if rest.shape[-1] else out.to(x.dtype)


def _fused(x: Tensor, cos: Tensor) -> bool:
    """Whether the Triton kernel takes it. A compiler that traces fuses the torch form by itself."""
    if torch.compiler.is_compiling() or cos.dtype != torch.float32 or (cos.requires_grad and torch.is_grad_enabled()):
        return False
    return resolve_backend("auto", "rotary", x) == "triton"
