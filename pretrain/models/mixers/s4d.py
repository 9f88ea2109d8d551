"""S4D: a diagonal state-space model per channel (Gu et al. 2022)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from potamos.kernels.diag_ssm import DiagState, diag_ssm, diag_ssm_step
from potamos.kernels.diag_ssm.sequence import diag_ssm_over
from potamos.parallel.facts import Axis, Traits, on_share
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import Context, Mixer, Out, Seq, State
from potamos.pretrain.models.linear import Linear
from potamos.pretrain.models.mixers.ssm import DiagonalParameters
from potamos.pretrain.models.registry import register


class S4DCore(nn.Module):
    """One model and one skip per channel; fp32."""

    precision = "float32"
    tags: ClassVar[dict[str, int]] = {"d": 0}

    def __init__(self, width: int, options: S4D.Options) -> None:
        super().__init__()
        self.diagonal = DiagonalParameters(width, options.state, options.dt_min, options.dt_max, options.rule)
        self.d = nn.Parameter(torch.empty(width))

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator, std: float, layers: int) -> None:
        """The skip D ~ N(0, 1)."""
        del name, std, layers
        parameter.normal_(generator=generator)

    def forward(self, u: Tensor, documents: Tensor | None, state: DiagState | None) -> Any:
        """u (B, D, L) -> (y (B, D, L), state)."""
        return diag_ssm(u, self.diagonal(), d=self.d, document_ids=documents, state=state)

    def over(self, axis: Axis, u: Tensor, documents: Tensor | None) -> Tensor:
        """The same for this rank's slices of a split row, u (B, D, own L) -> y like it."""
        return diag_ssm_over(axis, u, self.diagonal(), d=self.d, document_ids=documents)

    def step(self, u: Tensor, documents: Tensor | None, state: DiagState) -> Any:
        """u (B, D) -> (y (B, D), state)."""
        return diag_ssm_step(u, self.diagonal(), d=self.d, document_ids=documents, state=state)


@register("mixer", "s4d")
class S4D(Mixer):
    """u = W x, y = GELU(ssm(u) + D u), then a linear layer to twice the width and a gated linear unit.

    The input projection is an addition to the paper's layer: every mixer here is linear -> core -> linear, so that a
    layout can split any of them by channel in the same way.
    """

    traits = Traits(shard="channel", cp=("state", "a2a"), carries=True)

    class Options(interfaces.Options):
        kind: str = "s4d"
        state: int = Field(64, gt=0, multiple_of=2)
        dt_min: float = Field(1e-3, gt=0)
        dt_max: float = Field(1e-1, gt=0)
        rule: Literal["bilinear", "zoh"] = "zoh"

    @classmethod
    def check(cls, options: Options, width: int, sequence_length: int) -> None:
        """Refuse an empty range of steps."""
        del width, sequence_length
        if options.dt_min > options.dt_max:
            raise ValueError(f"dt_min {options.dt_min} is above dt_max {options.dt_max}; swap them")

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__()
        width = context.width
        self.options = options
        self.traits = replace(type(self).traits, units=width)
        self.inputs = Linear(width, width, role="column")
        self.core = S4DCore(width, options)
        self.out = Linear(width, 2 * width, role="row")

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        u = self.inputs.channel_major(x)
        if self.cp.size > 1:
            return Out(self._leave(self._split(u, seq).transpose(1, 2)))
        y, state = self.core(u, seq.document_ids, state)
        return Out(self._leave(y.transpose(1, 2)), state=state)

    def _split(self, u: Tensor, seq: Seq) -> Tensor:
        """A row whose slices lie on several ranks: by its carried states, or by channels on whole rows."""
        if self.cp.kind == "state":
            return self.core.over(self.cp, u, seq.document_ids)
        y, _ = on_share(self.core, self.cp, self.cp.to_units(u, 1, 2), seq.row.document_ids, None)
        return self.cp.to_slices(y, 1, 2)

    def step(self, x: Tensor, seq: Seq, state: State) -> Out:
        documents = None if seq.document_ids is None else seq.document_ids[:, 0]
        y, state = self.core.step(self.inputs(x)[:, 0], documents, state)
        return Out(self._leave(y[:, None]), state=state)

    def _leave(self, y: Tensor) -> Tensor:
        return F.glu(self.out(F.gelu(y, approximate="tanh")), dim=-1)

    def mixing_flops(self, length: int) -> float:
        """By the recurrence: per complex mode 8 for the update and 4 for the read-out, and the skip."""
        del length
        return self.inputs.weight.shape[0] * (6.0 * self.options.state + 2.0)

    def handed_on(self, length: int, itemsize: int) -> float:
        """fp32 states at the slice's end, and what multiplies states in it."""
        del length, itemsize
        return 8.0 * self.inputs.weight.shape[0] * self.options.state
