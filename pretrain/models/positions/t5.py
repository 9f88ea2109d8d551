"""T5's relative positions: a learned bias for each head and bucket of distances (Raffel et al. 2020, section 2.1)."""

from __future__ import annotations

import torch
from pydantic import Field

from potamos.kernels.attention import t5_bucket
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionPositions, Context, Positions
from potamos.pretrain.models.positions.rpe import LearnedBias
from potamos.pretrain.models.registry import register


@register("positions", "t5")
class T5(Positions):
    """Near distances have a bucket each, further ones share buckets that grow with the logarithm, and all from
    ``furthest`` on share the last; without causality half of the ``buckets`` are for keys that come later.

    Every layer has a table of its own, where the released models share one among all; the initial values are theirs,
    N(0, 1 / width). Scores are divided by sqrt(head dim) as everywhere, which the released models leave to the
    initial values of their projections.
    """

    class Options(interfaces.Options):
        kind: str = "t5"
        buckets: int = Field(32, ge=4, multiple_of=4)
        furthest: int = Field(128, gt=0)

    @classmethod
    def check(cls, options: Options, width: int, sequence_length: int) -> None:
        """Refuse a reach that the exact buckets alone would fill."""
        del width, sequence_length
        if options.furthest <= options.buckets // 2:
            raise ValueError(
                f"furthest {options.furthest} must exceed half of the buckets, {options.buckets // 2}, which stand for "
                "one distance each; raise it, or lower buckets"
            )

    def attention(self, context: Context, *, heads: int, head_dim: int, causal: bool) -> AttentionPositions:
        del head_dim
        buckets, furthest = self.options.buckets, self.options.furthest
        least = 0 if causal else -furthest
        with torch.device("cpu"):  # a constant, also while the model is being built without memory
            distances = torch.arange(least, furthest + 1)
            entries = t5_bucket(distances, buckets=buckets, furthest=furthest, causal=causal)
        return LearnedBias(heads, entries, least, std=context.width**-0.5)
