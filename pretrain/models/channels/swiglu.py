"""The gated feed-forward network SwiGLU (Shazeer 2020)."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from potamos.parallel.facts import Traits
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import ChannelMixer, Context, Out, Seq
from potamos.pretrain.models.linear import Linear
from potamos.pretrain.models.registry import register


@register("channel", "swiglu")
class SwiGlu(ChannelMixer):
    """down(silu(gate(x)) * up(x)), without biases. The default inner width, 8/3 of the model's rounded up to a multiple
    of 8, costs what an MLP of ratio 4 costs."""

    traits = Traits(shard="ff", cp=("pointwise",))

    class Options(interfaces.Options):
        kind: str = "swiglu"
        hidden: int | None = Field(None, gt=0)

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__()
        inner = options.hidden or -(-8 * context.width // 3 // 8) * 8
        self.traits = replace(type(self).traits, units=inner)
        self.gate = Linear(context.width, inner, role="column", bias=False)
        self.up = Linear(context.width, inner, role="column", bias=False)
        self.down = Linear(inner, context.width, role="row", bias=False, into_residual=True)

    def forward(self, x: Tensor, seq: Seq) -> Out:
        return Out(self.down(F.silu(self.gate(x)) * self.up(x)))
