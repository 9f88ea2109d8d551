"""Blockwise attention: a block and the blocks behind it (Sun et al. 2022, "A Length-Extrapolatable Transformer")."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from potamos.kernels.attention import Blocks, Mask
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionCall, Pattern
from potamos.pretrain.models.patterns.full import documents_of
from potamos.pretrain.models.registry import register


@register("pattern", "blockwise")
class Blockwise(Pattern):
    """A token sees its own block of ``size`` positions and the ``behind`` blocks before it; where later keys may be
    seen, as many after it.

    Made for evaluation: a model that was trained on rows of T sees no distance beyond T in blocks of T / 2, however
    long the row (``potamos evaluate RUN --length 4x 'model.pattern={kind: blockwise, size: 32}'``).
    """

    class Options(interfaces.Options):
        kind: str = "blockwise"
        size: int = Field(gt=0)
        behind: int = Field(1, ge=0)

    @property
    def counts(self) -> Literal["positions"]:
        return "positions"

    def mask(self, call: AttentionCall) -> Mask:
        options = self.options
        return replace(
            documents_of(call),
            blocks=Blocks(options.size, options.behind, 0 if call.causal else options.behind),
            query_positions=call.query_positions,
            key_positions=call.key_positions,
        )

    def visible_keys(self, length: int, *, causal: bool) -> float:
        own = (self.options.size + 1) / 2 if causal else self.options.size
        sides = self.options.behind * (1 if causal else 2)
        return min(super().visible_keys(length, causal=causal), own + sides * self.options.size)
