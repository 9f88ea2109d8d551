"""The parameter-owning leaves that every system shares: Linear, Embedding and the norms.

Each declares its facts on the class and draws its own initial values (``draw``), so that an initializer only decides
the scale and a layout only reads facts. Compute dtype: parameters stay in their own dtype; a linear layer multiplies in
``compute`` (set once on instances by ``set_compute_dtype``), or in the dtype of what it is given when that is None.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from potamos.parallel.facts import IDENTITY, Axis, Role
from potamos.pretrain.models.interfaces import Frontend, Options


class Linear(nn.Module):
    """y = x W^T + b with a role: ``column`` shards outputs, ``row`` shards inputs and sums, ``replicated`` neither.

    ``into_residual`` marks projections that write into the residual stream; GPT-2's initialization scales those by
    1/sqrt(2 * layers). The bias of a row layer is added after the sum over ranks, so it counts once.
    """

    opt: ClassVar[dict[str, dict[str, Any]]] = {"weight": {"matrix": True}, "bias": {"decay": False}}
    compute: torch.dtype | None = None
    tp: Axis = IDENTITY

    def __init__(
        self, inputs: int, outputs: int, *, role: Role = "replicated", bias: bool = True, into_residual: bool = False
    ) -> None:
        super().__init__()
        self.role: Role = role
        self.tags = {"weight": 0, "bias": 0} if role == "column" else {"weight": 1} if role == "row" else {}
        self.into_residual = into_residual
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator, std: float, layers: int) -> None:
        """Weights N(0, std), scaled down where they write into the residual stream; biases zero."""
        if name == "bias":
            parameter.zero_()
        else:
            parameter.normal_(0.0, std / math.sqrt(2 * layers) if self.into_residual else std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute or x.dtype
        y = F.linear(x.to(dtype), self.weight.to(dtype), None if self.role == "row" else self._bias(dtype))
        if self.role == "row":
            y = self.tp.leave(y)
            bias = self._bias(dtype)
            y = y if bias is None else y + bias
        return y

    def channel_major(self, x: Tensor) -> Tensor:
        """The same map, (B, L, inputs) to (B, outputs, L) with length contiguous, as state-space kernels want it.

        One product W X^T over all rows; memory order is (outputs, B, L), so no transpose is ever copied.
        """
        assert self.role != "row", "a row layer sums over ranks and writes into the residual stream, row by row"
        dtype = self.compute or x.dtype
        columns = x.to(dtype).flatten(0, 1).T
        weight, bias = self.weight.to(dtype), self._bias(dtype)
        y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
        return y.view(len(weight), *x.shape[:2]).transpose(0, 1)

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)


class Embedding(nn.Module):
    """A table of vectors, (entries, width). Not decayed: a row that is never read must not shrink."""

    opt: ClassVar[dict[str, dict[str, Any]]] = {"weight": {"decay": False}}
    tp: Axis = IDENTITY

    def __init__(self, entries: int, width: int, *, tags: dict[str, int] | None = None) -> None:
        super().__init__()
        self.tags = tags or {}
        self.weight = nn.Parameter(torch.empty(entries, width))

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator, std: float, layers: int) -> None:
        """Entries N(0, std)."""
        del name, layers
        parameter.normal_(0.0, std, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        if not self.tags or self.tp.size == 1:
            return F.embedding(ids, self.weight)
        # The table's rows are divided: each rank looks up what it has, and the sum over ranks is the vector.
        local = ids - self.tp.rank * len(self.weight)
        has = (local >= 0) & (local < len(self.weight))
        found = F.embedding(local.clamp(0, len(self.weight) - 1), self.weight)
        return self.tp.leave(torch.where(has[..., None], found, 0))


class NormOptions(Options):
    """Which norm, and whether it stands before a sub-layer (``pre``, GPT-2) or after its residual sum (``post``)."""

    kind: str = "layernorm"
    place: str = Field("pre", pattern="^(pre|post)$")
    epsilon: float = Field(1e-5, gt=0)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last dimension, computed in the dtype of
    its parameters: fp32 in every training policy."""

    opt: ClassVar[dict[str, dict[str, Any]]] = {"weight": {"decay": False}, "bias": {"decay": False}}
    precision = "float32"

    def __init__(self, width: int, options: NormOptions) -> None:
        super().__init__()
        self.epsilon = options.epsilon
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if options.kind == "layernorm" else None

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator, std: float, layers: int) -> None:
        """The identity: weights one, biases zero."""
        del generator, std, layers
        parameter.fill_(1.0 if name == "weight" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


NORMS = ("layernorm", "rmsnorm")


def set_compute_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Let every linear layer outside ``precision = "float32"`` modules multiply in ``dtype``; parameters stay."""

    def visit(module: nn.Module, keep: bool) -> None:
        keep = keep or getattr(module, "precision", None) == "float32"
        if isinstance(module, Linear | Frontend):
            module.compute = None if keep else dtype
        for child in module.children():
            visit(child, keep)

    visit(model, False)
