"""Parameters of diagonal state-space models, shared by every mixer that has one."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from potamos.kernels.diag_ssm import Diagonal

SSM_FACTS: dict[str, Any] = {"lr_cap": 1e-3, "decay": False}
"""Dynamics learn at 1e-3 at most and are not decayed, as in the authors' training recipes: decay would pull every time
scale toward one."""


class DiagonalParameters(nn.Module):
    """S4D-Lin parameters (Gu et al. 2022, equation 9) of ``heads`` models with ``state`` real dimensions each.

    A_n = -1/2 + i pi n for n < state/2, B = 1, C complex standard normal, steps log-uniform in [dt_min, dt_max].
    Complex numbers are stored as real pairs: optimizers, sharding and safetensors then need no special case.
    """

    precision = "float32"
    tags: ClassVar[dict[str, int]] = {"log_dt": 0, "log_a": 0, "b": 0, "B": 0, "C": 0}
    opt: ClassVar[dict[str, dict[str, Any]]] = dict.fromkeys(("log_dt", "log_a", "b", "B"), SSM_FACTS)

    def __init__(self, heads: int, state: int, dt_min: float, dt_max: float, rule: Literal["bilinear", "zoh"]) -> None:
        super().__init__()
        modes = state // 2
        self.dt_min, self.dt_max = dt_min, dt_max
        self.rule: Literal["bilinear", "zoh"] = rule
        self.log_dt = nn.Parameter(torch.empty(heads))
        self.log_a = nn.Parameter(torch.empty(heads, modes))
        self.b = nn.Parameter(torch.empty(heads, modes))
        self.B = nn.Parameter(torch.empty(heads, modes, 2))
        self.C = nn.Parameter(torch.empty(heads, modes, 2))

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator, std: float, layers: int) -> None:
        """S4D-Lin; the scale of other weights does not apply."""
        del std, layers
        if name == "log_dt":
            parameter.uniform_(math.log(self.dt_min), math.log(self.dt_max), generator=generator)
        elif name == "log_a":
            parameter.fill_(math.log(0.5))
        elif name == "b":
            parameter.copy_(math.pi * torch.arange(parameter.shape[1]).expand(parameter.shape))
        elif name == "B":
            parameter.copy_(torch.tensor([1.0, 0.0]).expand(parameter.shape))
        else:
            parameter.normal_(0.0, math.sqrt(0.5), generator=generator)

    def forward(self) -> Diagonal:
        return Diagonal(self.log_dt, self.log_a, self.b, self.B, self.C, self.rule)
