"""Dropout whose mask depends on what is dropped, not on who computes it.

A bit is a function of (seed, purpose, step, layer) - hashed to the Philox key - and of its global sample, position and
channel (for attention scores: sample, head, query and key position) - the Philox counter. Any split over ranks,
micro-batches, sequence or channel shards therefore draws the same mask.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import WORD, philox

__all__ = ["DropoutKey", "attention_keep_mask", "dropout", "keep_mask", "philox"]


@dataclass(frozen=True)
class DropoutKey:
    """What a mask is keyed by besides position and channel.

    seed, step, layer: integers of any sign; purpose: a name such as "embedding" or "attention", one for each place
    that draws; samples: (batch,) int64 global sample indices, 0 <= sample < 2^48.
    """

    seed: int
    purpose: str
    step: int
    layer: int
    samples: Tensor

    def philox_key(self) -> int:
        """64 bits of BLAKE2b over an unambiguous spelling of (seed, purpose, step, layer)."""
        text = "\0".join(["potamos", str(self.seed), self.purpose, str(self.step), str(self.layer)])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def dropout(
    x: Tensor, p: float, *, key: DropoutKey, positions: Tensor | None = None, channel_offset: int = 0
) -> Tensor:
    """Zero each element of x (batch, length, channel) with probability p, scale the rest by 1 / (1 - p) in fp32.

    positions: (length,) or (batch or 1, length), the tokens' global positions in their row; None counts from 0.
    channel_offset: global index of x's first channel. Raises ValueError unless 0 <= p < 1.
    """
    if _threshold(p) == 0:
        return x
    keep = keep_mask(x.shape, p, key=key, positions=positions, channel_offset=channel_offset, device=x.device)
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.where(keep, wide * (1 / (1 - p)), 0).to(x.dtype)


def keep_mask(
    shape: torch.Size | tuple[int, int, int],
    p: float,
    *,
    key: DropoutKey,
    positions: Tensor | None = None,
    channel_offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(batch, length, channel) bool, True where `dropout` keeps. Counter: (channel // 4, position, sample)."""
    batch, length, channels = shape
    low, high = _sample_words(key, batch, device)
    if positions is None:
        positions = torch.arange(length, device=device)
    positions = positions.to(device=device, dtype=torch.int64).expand(batch, length)[:, :, None]
    blocks, first = _blocks(channel_offset, channels, device)
    bits = philox((blocks, positions, low[:, None, None], high[:, None, None]), key.philox_key())
    return _keep(bits, _threshold(p), first, channels)


def attention_keep_mask(
    shape: torch.Size | tuple[int, int, int, int],
    p: float,
    *,
    key: DropoutKey,
    query_offset: int = 0,
    key_offset: int = 0,
    head_offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(batch, head, query, key) bool, True where a probability is kept.

    Offsets are the global indices of the first query, key and head. Counter: (key position // 4, query position,
    sample low word, sample high 16 bits | head << 16); fewer than 65,536 heads.
    """
    batch, heads, queries, keys = shape
    low, high = _sample_words(key, batch, device)
    head = torch.arange(head_offset, head_offset + heads, device=device)
    query = torch.arange(query_offset, query_offset + queries, device=device)
    blocks, first = _blocks(key_offset, keys, device)
    counters = (blocks, query[:, None], low[:, None, None, None], (high[:, None] | (head << 16))[:, :, None, None])
    return _keep(philox(counters, key.philox_key()), _threshold(p), first, keys)


def _threshold(p: float) -> int:
    """A word below this is dropped."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: the probability must satisfy 0 <= p < 1, got {p!r}")
    return round(p * 2**32)


def _sample_words(key: DropoutKey, batch: int, device) -> tuple[Tensor, Tensor]:
    samples = key.samples
    if samples.shape != (batch,) or samples.dtype != torch.int64:
        raise ValueError(
            f"dropout: key.samples must be int64 ({batch},), got {samples.dtype} {tuple(samples.shape)}: "
            "one global sample index for each row"
        )
    samples = samples.to(device)
    return samples & WORD, samples >> 32


def _blocks(offset: int, count: int, device) -> tuple[Tensor, int]:
    """Counters of four words covering [offset, offset + count), and where the range starts in the first of them."""
    return torch.arange(offset // 4, (offset + count + 3) // 4, device=device), offset % 4


def _keep(bits: tuple[Tensor, ...], threshold: int, first: int, count: int) -> Tensor:
    """Four (..., block) words -> (..., count) bool; a counter's four words are four neighbors."""
    keep = torch.stack([word >= threshold for word in bits], dim=-1).flatten(-2)
    return keep[..., first : first + count]
