"""Sandwich: the bias that sinusoidal embeddings would give each other (Chi et al. 2022, "Dissecting Transformer Length
Extrapolation via the Lens of Receptive Field Analysis")."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from potamos.kernels.attention import Toeplitz, sandwich_table
from potamos.kernels.remember import remembered
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionCall, AttentionPositions, Context, Positions, Projection
from potamos.pretrain.models.registry import register


class SinusoidalProducts(AttentionPositions):
    """bias_h(i, j) = (p_i . p_j - dim / 2) / c_h with sinusoidal p of ``dim`` channels and c_h = 8 (h + 1) / heads."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim

    def bias(self, call: AttentionCall, query: Projection, key: Projection) -> Toeplitz:
        del query, key
        # As many distances as the next power of two: a row that grows token by token meets few tables.
        reach = 1 << (call.keys - 1).bit_length()
        table = _table(self.heads, reach, self.dim, call.causal, call.device)
        return Toeplitz(table=table[call.heads.start : call.heads.stop], least=0 if call.causal else 1 - reach)


@remembered(16)
def _table(heads: int, reach: int, dim: int, causal: bool, device: torch.device) -> Tensor:
    """(heads, distances) fp32: distances 0 .. reach - 1, and those below 0 too where keys may come later."""
    with torch.device("cpu"):
        table = sandwich_table(heads, reach, dim)
    table = table if causal else torch.cat([table[:, 1:].flip(1), table], 1)
    return table.to(device)


@register("positions", "sandwich")
class Sandwich(Positions):
    """Scores fall about as the logarithm of the distance, each head at its own strength; nothing is learned or added to
    the input. ``dim`` is of the embeddings that are imagined, whatever the model's width."""

    class Options(interfaces.Options):
        kind: str = "sandwich"
        dim: int = Field(128, gt=0, multiple_of=2)

    def attention(self, context: Context, *, heads: int, head_dim: int, causal: bool) -> AttentionPositions:
        del context, head_dim, causal
        return SinusoidalProducts(heads, self.options.dim)
