"""Local attention in three forms (Xiong et al. 2021, "Simple Local Attentions Remain Competitive for Long-Context
Tasks")."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from potamos.kernels.attention import Blocks, Mask
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionCall, Pattern
from potamos.pretrain.models.patterns.full import documents_of
from potamos.pretrain.models.registry import register


@register("pattern", "local")
class Local(Pattern):
    """A token sees its neighborhood of ``size`` positions, and the ``first`` tokens of its document see and are seen by
    all of it (global tokens).

    form: ``disjoint``, its own block; ``overlapping``, its block and the blocks beside it; ``sliding``, what is closer
    than ``size`` (the token itself included). shift: blocks move up by half a block in every second layer, so that
    disjoint blocks reach each other through depth.
    """

    class Options(interfaces.Options):
        kind: str = "local"
        size: int = Field(gt=0)
        form: Literal["disjoint", "overlapping", "sliding"] = "disjoint"
        first: int = Field(0, ge=0)
        shift: bool = False

    @classmethod
    def check(cls, options: Options, width: int, sequence_length: int) -> None:
        """Refuse to shift what has no blocks."""
        del width, sequence_length
        if options.shift and options.form == "sliding":
            raise ValueError("shift moves blocks, and a sliding window has none; take it out")

    @property
    def counts(self) -> Literal["distances", "positions"]:
        return "distances" if self.options.form == "sliding" and self.options.first == 0 else "positions"

    def mask(self, call: AttentionCall) -> Mask:
        options = self.options
        mask = replace(
            documents_of(call),
            first=options.first,
            query_positions=call.query_positions,
            key_positions=call.key_positions,
        )
        if options.form == "sliding":
            return replace(mask, window=options.size)
        beside = 1 if options.form == "overlapping" else 0
        shift = options.size // 2 if options.shift and call.layer % 2 else 0
        return replace(mask, blocks=Blocks(options.size, beside, 0 if call.causal else beside, shift))

    def visible_keys(self, length: int, *, causal: bool) -> float:
        size = self.options.size
        if self.options.form == "sliding":
            near = size if causal else 2 * size - 1
        else:
            own = (size + 1) / 2 if causal else size
            near = own + (size * (1 if causal else 2) if self.options.form == "overlapping" else 0)
        first = self.options.first * (1 if causal else 2)  # seen by all; and without causality they see all
        return min(super().visible_keys(length, causal=causal), near + first)
