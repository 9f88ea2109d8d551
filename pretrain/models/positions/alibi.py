"""ALiBi: attention with linear biases (Press et al. 2021)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from potamos.kernels.attention import Toeplitz, alibi_slopes
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionPositions, Positions
from potamos.pretrain.models.registry import register


class LinearBias(AttentionPositions):
    """bias_h(i, j) = -slope_h * (i - j)."""

    tags: ClassVar[dict[str, int]] = {"slopes": 0}
    slopes: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        # A constant, not a parameter; made on a real device even while the model is being built without memory.
        with torch.device("cpu"):
            slopes = alibi_slopes(heads)
        self.register_buffer("slopes", slopes, persistent=False)

    def bias(self, query_offset: int) -> Toeplitz:
        return Toeplitz(self.slopes, query_offset=query_offset)


@register("positions", "alibi")
class Alibi(Positions):
    """Scores fall linearly with distance, each head with its own slope; nothing is learned or added to the input."""

    class Options(interfaces.Options):
        kind: str = "alibi"

    def attention(self, heads: int, head_dim: int) -> AttentionPositions:
        del head_dim
        return LinearBias(heads)
