"""BigBird: global, window and random blocks of keys (Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences",
section 2 and appendix D)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from potamos.kernels.attention import BlockLayout, Mask
from potamos.kernels.dropout import DropoutKey, philox
from potamos.kernels.remember import remembered
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionCall, Pattern
from potamos.pretrain.models.patterns.full import documents_of
from potamos.pretrain.models.registry import register


@register("pattern", "bigbird")
class BigBird(Pattern):
    """In blocks of ``size`` columns: a query sees the first and the last ``first`` blocks, a ``window`` of blocks
    around its own, and ``random`` others, drawn for each layer, head and block of queries; the global blocks see all.

    Under causality there are no last global blocks, and blocks are drawn from the past alone: what a query sees does
    not depend on how the row goes on. The draw is keyed by (seed, layer, global head, block), so that it is the same
    for any split of the heads, in training and in decoding. The paper's is the encoder's form: size 64, random 3.
    """

    class Options(interfaces.Options):
        kind: str = "bigbird"
        size: int = Field(gt=0)
        first: int = Field(1, ge=0)
        window: int = Field(3, gt=0)
        random: int = Field(3, ge=0)
        seed: int = Field(0, ge=0, lt=2**63)

    @classmethod
    def check(cls, options: Options, width: int, sequence_length: int) -> None:
        """Refuse a window without a middle."""
        del width, sequence_length
        if options.window % 2 == 0:
            raise ValueError(f"window {options.window} must be odd: as many blocks before the query's own as after it")

    @property
    def counts(self) -> Literal["columns"]:
        return "columns"

    def mask(self, call: AttentionCall) -> Mask:
        blocks = -(-call.keys // self.options.size)
        if call.causal:  # rows of the layout do not depend on how many follow: few layouts serve a row that grows
            blocks = 1 << (blocks - 1).bit_length()
        layout = _layout(self.options, call.layer, call.heads, blocks, call.causal, call.device)
        return replace(documents_of(call), layout=layout)

    def visible_keys(self, length: int, *, causal: bool) -> float:
        options = self.options
        # Without causality there are global blocks at both ends, and they see as many as see them.
        blocks = options.window // 2 + 0.5 + options.first if causal else options.window + 4 * options.first
        return min(super().visible_keys(length, causal=causal), options.size * (blocks + options.random))


@remembered(256)
def _layout(
    options: BigBird.Options, layer: int, heads: range, blocks: int, causal: bool, device: torch.device
) -> BlockLayout:
    with torch.device("cpu"):
        layout = BlockLayout.from_dense(visible_blocks(options, layer, heads, blocks, causal), options.size)
    return BlockLayout(layout.size, layout.counts.to(device), layout.indices.to(device))


def visible_blocks(options: BigBird.Options, layer: int, heads: range, blocks: int, causal: bool) -> Tensor:
    """(heads, blocks, blocks) bool: which blocks of keys each block of queries sees, for each of these heads."""
    at, half, first = torch.arange(blocks), options.window // 2, options.first
    apart = at[:, None] - at
    seen = (apart.abs() <= half) | (at < first) | (at[:, None] < first)
    end = at + 1  # where blocks to draw from end, for each block of queries
    if not causal:
        last = max(first, blocks - first)
        seen |= (at >= last) | (at[:, None] >= last)
        end = torch.full_like(at, last)
    end = end.clamp(min=first)
    # One block more than there are takes what was not drawn for want of candidates.
    drawn = torch.zeros(len(heads), blocks, blocks + 1, dtype=torch.bool)
    low, high = ((at + offset).clamp(min=first).minimum(end) for offset in (-half, half + 1))
    drawn.scatter_(2, _draw(options, layer, heads, first, low, high, end, blocks), True)
    seen = seen | drawn[..., :blocks]
    return seen & (apart >= 0) if causal else seen


def _draw(
    options: BigBird.Options, layer: int, heads: range, first: int, low: Tensor, high: Tensor, end: Tensor, none: int
) -> Tensor:
    """(heads, blocks, random) block numbers drawn without replacement from first .. low - 1 and high .. end - 1 of each
    block of queries; ``none`` where too few are left."""
    head, at = torch.tensor(list(heads))[:, None], torch.arange(len(low))
    key = DropoutKey(options.seed, "bigbird", 0, layer, torch.empty(0, dtype=torch.int64)).philox_key()
    candidates = (low - first + end - high).expand(len(heads), -1)
    taken: list[Tensor] = []  # places among the candidates, rising
    for turn in range(options.random):
        left = candidates - turn
        word = philox((torch.full_like(at, turn), at, head, torch.zeros_like(at)), key)[0]
        place = (word * left.clamp(min=0)) >> 32  # of those not taken yet
        for other in taken:
            place = place + (place >= other).long()
        place = torch.where(left > 0, place, none + turn)
        taken = list(torch.stack([*taken, place]).sort(0).values)
    if not taken:
        return torch.empty(len(heads), len(low), 0, dtype=torch.int64)
    places = torch.stack(taken, -1)
    chosen = places + first
    chosen = torch.where(chosen >= low[:, None], chosen - low[:, None] + high[:, None], chosen)
    return torch.where(places < none, chosen, none)
