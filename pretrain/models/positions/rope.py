"""Rotary positions (Su et al. 2021, "RoFormer")."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from potamos.kernels.attention import Rotary
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionPositions, Positions
from potamos.pretrain.models.registry import register


class RotaryPositions(AttentionPositions):
    """Rotates pairs of query and key channels by angles proportional to the position."""

    def __init__(self, base: float, fraction: float, interleaved: bool) -> None:
        super().__init__()
        self.base, self.fraction, self.interleaved = base, fraction, interleaved

    def rotary(self, query_positions: Tensor, key_positions: Tensor) -> Rotary:
        return Rotary(
            query_positions=query_positions,
            key_positions=key_positions,
            base=self.base,
            fraction=self.fraction,
            interleaved=self.interleaved,
        )


@register("positions", "rope")
class Rope(Positions):
    """Rotary positions on the first ``fraction`` of each head's channels, pairs split in halves (GPT-NeoX) or
    ``interleaved`` (RoFormer)."""

    class Options(interfaces.Options):
        kind: str = "rope"
        base: float = Field(10000.0, gt=1)
        fraction: float = Field(1.0, gt=0, le=1)
        interleaved: bool = False

    def attention(self, heads: int, head_dim: int) -> AttentionPositions:
        rotated = int(self.options.fraction * head_dim)
        if rotated % 2 or rotated == 0:
            raise ValueError(
                f"positions.fraction {self.options.fraction} of a head of {head_dim} channels rotates {rotated}, "
                "but pairs are rotated: choose heads or a fraction that give an even number"
            )
        return RotaryPositions(self.options.base, self.options.fraction, self.options.interleaved)
