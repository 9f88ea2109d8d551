"""Absolute positions, added to the input: learned (Devlin et al. 2019) and sinusoidal (Vaswani et al. 2017)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import Context, Positions
from potamos.pretrain.models.linear import Embedding
from potamos.pretrain.models.registry import register


class LearnedTable(Embedding):
    """An embedding with an end. Whoever goes on beyond a training row asks for ``limit`` first."""

    @property
    def limit(self) -> int:
        """Positions that there are."""
        return len(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        known = not (ids.is_cuda or isinstance(ids, FakeTensor))  # a GPU would have to wait; a plan has no values
        if known and ids.numel() and int(ids.max()) >= self.limit:
            raise ValueError(
                f"position {int(ids.max())} is beyond positions.max_length {self.limit}: "
                "use shorter rows, or train with a larger max_length"
            )
        return super().forward(ids)


@register("positions", "learned")
class Learned(Positions):
    """One learned vector per position up to ``max_length``."""

    class Options(interfaces.Options):
        kind: str = "learned"
        max_length: int = Field(gt=0)

    @classmethod
    def check(cls, options: Options, width: int, sequence_length: int) -> None:
        """Refuse rows longer than the table."""
        del width
        if options.max_length < sequence_length:
            raise ValueError(
                f"max_length {options.max_length} is below data.sequence_length {sequence_length}; raise it to that"
            )

    def embedding(self, context: Context) -> nn.Module:
        return LearnedTable(self.options.max_length, context.width)


class SinusoidalTable(nn.Module):
    """p[2i] = sin(pos / base^(2i/D)), p[2i+1] = cos(...); no parameters, any length."""

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        self.width, self.base = width, base

    def forward(self, positions: Tensor) -> Tensor:
        exponent = torch.arange(0, self.width, 2, device=positions.device, dtype=torch.float64) / self.width
        angle = positions[..., None].double() * self.base**-exponent
        # Computed in fp64 and then rounded: fp32 angles lose three digits at position 10,000.
        table = torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., : self.width]
        return table.to(torch.get_default_dtype())


@register("positions", "sinusoidal")
class Sinusoidal(Positions):
    """The fixed embedding of the Transformer."""

    class Options(interfaces.Options):
        kind: str = "sinusoidal"
        base: float = Field(10000.0, gt=1)

    def embedding(self, context: Context) -> nn.Module:
        return SinusoidalTable(context.width, self.options.base)
