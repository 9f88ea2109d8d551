"""ALiBi: attention with linear biases (Press et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potamos.kernels.attention import Toeplitz
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionPositions, Positions
from potamos.pretrain.models.registry import register


def slopes(heads: int) -> Tensor:
    """(heads,) fp32: r^1..r^heads with r = 2^(-8/heads) for a power of two, else those of the lower power of two
    followed by every second slope of the next one."""

    def power_of_two(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]

    lower = 2 ** math.floor(math.log2(heads))
    return torch.tensor(power_of_two(lower) + power_of_two(2 * lower)[0::2][: heads - lower])


class LinearBias(AttentionPositions):
    """bias_h(i, j) = -slope_h * (i - j)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def bias(self, query_positions: Tensor, key_positions: Tensor) -> Toeplitz:
        return Toeplitz(slopes=slopes(self.heads).to(query_positions.device))


@register("positions", "alibi")
class Alibi(Positions):
    """Scores fall linearly with distance, each head with its own slope; nothing is learned or added to the input."""

    class Options(interfaces.Options):
        kind: str = "alibi"

    def attention(self, heads: int, head_dim: int) -> AttentionPositions:
        del head_dim
        return LinearBias(heads)
