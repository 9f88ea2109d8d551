"""The two-layer feed-forward network of the Transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from potamos.parallel.facts import Traits
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import ChannelMixer, Context, Out, Seq
from potamos.pretrain.models.linear import Linear
from potamos.pretrain.models.registry import register

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


@register("channel", "mlp")
class Mlp(ChannelMixer):
    """down(activation(up(x))), ``ratio`` times as wide inside (Vaswani et al. 2017)."""

    traits = Traits(shard="ff", cp=("pointwise",))

    class Options(interfaces.Options):
        kind: str = "mlp"
        ratio: float = Field(4.0, gt=0)
        activation: Literal["gelu_tanh", "gelu", "relu"] = "gelu_tanh"

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__()
        inner = round(options.ratio * context.width)
        self.traits = replace(type(self).traits, units=inner)
        self.activation = ACTIVATIONS[options.activation]
        self.up = Linear(context.width, inner, role="column")
        self.down = Linear(inner, context.width, role="row", into_residual=True)

    def forward(self, x: Tensor, seq: Seq) -> Out:
        return Out(self.down(self.activation(self.up(x))))
