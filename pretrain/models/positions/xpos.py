"""xPos: rotary positions whose scores fall with the distance (Sun et al. 2022, "A Length-Extrapolatable
Transformer")."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from potamos.kernels.attention import Rotary, xpos_log_decay
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionPositions, Context, Positions
from potamos.pretrain.models.positions.rope import RotaryPositions
from potamos.pretrain.models.registry import register

# Of the exponents at the ends of a training row: at the end of one four times as long they are 7 times that, below 88,
# where fp32 ends.
LARGEST = 12.0
# Beyond e^80 a key of some thousands overflows fp32, and the query's factor has lost bits below its smallest number.
OVERFLOW = 80.0


class DecayingRotation(RotaryPositions):
    """A rotation, after which pair i of a query at position n is multiplied by zeta_i^((n - center) / scale_base), of a
    key by the inverse, so that the score carries zeta_i^((n - m) / scale_base) whatever the center."""

    log_decay: Tensor

    def __init__(
        self, head_dim: int, *, base: float, gamma: float, scale_base: float, interleaved: bool, center: int
    ) -> None:
        super().__init__(head_dim, base, 1.0, interleaved)
        self.center = center
        # At this position the steepest pair's exponent is OVERFLOW; before the center, positions end at 0.
        self.max_positions = center + math.floor(OVERFLOW * scale_base / math.log((1 + gamma) / gamma)) + 1
        with torch.device("cpu"):
            log_decay = xpos_log_decay(head_dim, gamma, scale_base)
        self.register_buffer("log_decay", log_decay, persistent=False)

    def rotary(self, query_positions: Tensor, key_positions: Tensor) -> Rotary:
        plain = super().rotary(query_positions, key_positions)
        # The center is the same in every call, because keys are kept with their factors.
        return replace(plain, log_decay=self.log_decay, center=self.center)


@register("positions", "xpos")
class Xpos(Positions):
    """zeta_i = (2 i / head dim + gamma) / (1 + gamma): fast rotations fade with the distance, slow ones stay.

    The paper evaluates rows that are longer than the training rows with blockwise causal attention, blocks of half the
    training length: ``potamos evaluate RUN --length 4x 'model.pattern={kind: blockwise, size: 32}'``.
    """

    class Options(interfaces.Options):
        kind: str = "xpos"
        base: float = Field(10000.0, gt=1)
        gamma: float = Field(0.4, gt=0)
        scale_base: float = Field(512.0, gt=0)
        interleaved: bool = False

    @classmethod
    def check(cls, options: Options, width: int, sequence_length: int) -> None:
        """Refuse rows at whose ends a factor would come near the end of fp32."""
        del width
        steepest = math.log((1 + options.gamma) / options.gamma)
        exponent = steepest * sequence_length / 2 / options.scale_base
        if exponent > LARGEST:
            raise ValueError(
                f"scale_base {options.scale_base:g} is too small for rows of {sequence_length}: keys at the ends would "
                f"be multiplied by e^{exponent:.0f}; raise it to {math.ceil(steepest * sequence_length / 2 / LARGEST)}"
            )

    def attention(self, context: Context, *, heads: int, head_dim: int, causal: bool) -> AttentionPositions:
        del heads, causal
        options = self.options
        return DecayingRotation(
            head_dim,
            base=options.base,
            gamma=options.gamma,
            scale_base=options.scale_base,
            interleaved=options.interleaved,
            center=context.sequence_length // 2,
        )
