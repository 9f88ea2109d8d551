"""Rotary positions (Su et al. 2021, "RoFormer")."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from potamos.kernels.attention import Rotary, rotary_frequencies
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionPositions, Context, Positions
from potamos.pretrain.models.registry import register


class RotaryPositions(AttentionPositions):
    """Rotates pairs of query and key channels by angles proportional to the position."""

    frequencies: Tensor

    def __init__(self, head_dim: int, base: float, fraction: float, interleaved: bool) -> None:
        super().__init__()
        self.interleaved = interleaved
        # A constant, not a parameter; made here, so that channels which cannot be paired are refused before a run, and
        # on a real device even while the model is being built without memory.
        with torch.device("cpu"):
            frequencies = rotary_frequencies(head_dim, base, fraction)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def rotary(self, query_positions: Tensor, key_positions: Tensor) -> Rotary:
        return Rotary(self.frequencies, query_positions, key_positions, self.interleaved)


@register("positions", "rope")
class Rope(Positions):
    """Rotary positions on the first ``fraction`` of each head's channels; pairs are split in halves (GPT-NeoX) or
    ``interleaved`` (RoFormer)."""

    class Options(interfaces.Options):
        kind: str = "rope"
        base: float = Field(10000.0, gt=1)
        fraction: float = Field(1.0, gt=0, le=1)
        interleaved: bool = False

    def attention(self, context: Context, *, heads: int, head_dim: int, causal: bool) -> AttentionPositions:
        del context, heads, causal
        return RotaryPositions(head_dim, self.options.base, self.options.fraction, self.options.interleaved)
