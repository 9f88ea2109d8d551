"""Learned relative positions: one number per head and distance (the bias of Raffel et al. 2020 without its buckets;
clipped distances as in Shaw et al. 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from potamos.kernels.attention import Toeplitz
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionCall, AttentionPositions, Context, Positions, Projection
from potamos.pretrain.models.registry import register


class LearnedBias(AttentionPositions):
    """bias_h(i, j) = weight[h, entries[i - j - least]]; the last entry at either end goes on for ever.

    weight: (heads, values), fp32 whatever the layers multiply in. entries: (distances,) int64. std of the initial
    values: None takes the initializer's.
    """

    tags: ClassVar[dict[str, int]] = {"weight": 0}
    opt: ClassVar[dict[str, dict[str, Any]]] = {"weight": {"decay": False}}
    precision = "float32"
    entries: Tensor

    def __init__(self, heads: int, entries: Tensor, least: int, std: float | None = None) -> None:
        super().__init__()
        self.least, self.std = least, std
        self.weight = nn.Parameter(torch.empty(heads, int(entries.max()) + 1))
        self.register_buffer("entries", entries, persistent=False)

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator, std: float, layers: int) -> None:
        """Entries N(0, std)."""
        del name, layers
        parameter.normal_(0.0, self.std or std, generator=generator)

    def bias(self, call: AttentionCall, query: Projection, key: Projection) -> Toeplitz:
        del call, query, key
        return Toeplitz(table=self.weight[:, self.entries], least=self.least)


@register("positions", "rpe")
class RelativePositions(Positions):
    """A learned bias for each head and distance; ``furthest`` and all beyond share one."""

    class Options(interfaces.Options):
        kind: str = "rpe"
        furthest: int = Field(128, gt=0)

    def attention(self, context: Context, *, heads: int, head_dim: int, causal: bool) -> AttentionPositions:
        del context, head_dim
        furthest = self.options.furthest
        least = 0 if causal else -furthest
        with torch.device("cpu"):  # a constant, also while the model is being built without memory
            entries = torch.arange(furthest - least + 1)
        return LearnedBias(heads, entries, least)
