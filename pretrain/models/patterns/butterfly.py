"""Flat block butterfly plus global blocks (Chen et al. 2021, "Pixelated Butterfly", section 3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from potamos.kernels.attention import BlockLayout, Mask
from potamos.kernels.remember import remembered
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionCall, Pattern
from potamos.pretrain.models.patterns.full import documents_of
from potamos.pretrain.models.registry import register


@register("pattern", "butterfly")
class Butterfly(Pattern):
    """In blocks of ``size`` columns: block i of queries sees block j of keys where i = j or i xor j is a power of two
    below 2^``factors`` (null: any), the sum of that many butterfly factors; and the ``first`` blocks see and are seen
    by all, which is the low-rank part.

    The blocks are the corners of a cube of log2(blocks) dimensions, and every layer walks one edge. The work is that of
    1 + log2(blocks) + ``first`` blocks of keys for each query.
    """

    class Options(interfaces.Options):
        kind: str = "butterfly"
        size: int = Field(gt=0)
        first: int = Field(1, ge=0)
        factors: int | None = Field(None, ge=0)

    @property
    def counts(self) -> Literal["columns"]:
        return "columns"

    def mask(self, call: AttentionCall) -> Mask:
        blocks = 1 << (-(-call.keys // self.options.size) - 1).bit_length()
        return replace(documents_of(call), layout=_layout(self.options, blocks, call.device))

    def visible_keys(self, length: int, *, causal: bool) -> float:
        size, blocks = self.options.size, -(-length // self.options.size)
        factors = (blocks - 1).bit_length()
        factors = factors if self.options.factors is None else min(factors, self.options.factors)
        first = self.options.first  # seen by all; and without causality they see all
        visible = (1 + factors) / 2 + first if causal else 1 + factors + 2 * first
        return min(super().visible_keys(length, causal=causal), size * visible)


@remembered(64)
def _layout(options: Butterfly.Options, blocks: int, device: torch.device) -> BlockLayout:
    with torch.device("cpu"):
        layout = BlockLayout.from_dense(visible_blocks(options, blocks)[None], options.size)
    return BlockLayout(layout.size, layout.counts.to(device), layout.indices.to(device))


def visible_blocks(options: Butterfly.Options, blocks: int) -> Tensor:
    """(blocks, blocks) bool: which blocks of keys each block of queries sees, later ones included."""
    at = torch.arange(blocks)
    apart = at[:, None] ^ at
    power = (apart & (apart - 1)) == 0  # 0 too: the diagonal
    limit = blocks if options.factors is None else 2**options.factors
    seen = power & (apart < limit)
    return seen | (at < options.first) | (at[:, None] < options.first)
