"""H3: two state-space models and two gates (Fu et al. 2022, "Hungry Hungry Hippos", section 3)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from potamos.kernels.diag_ssm import Diagonal
from potamos.kernels.flash_conv import H3State, h3_mix, h3_mix_step
from potamos.kernels.flash_conv.sequence import h3_mix_over
from potamos.parallel.facts import Axis, Traits, on_share
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import Context, Mixer, Out, Seq, State
from potamos.pretrain.models.linear import Linear
from potamos.pretrain.models.mixers.ssm import SSM_FACTS, DiagonalParameters
from potamos.pretrain.models.registry import register


class H3Core(nn.Module):
    """The parameters of both state-space models. Always fp32, whatever the linears around it multiply in.

    The shift SSM's state holds the last N inputs; with its B and C its kernel is the correlation
    taps[l] = sum_i B_i C_{i+l}, which is C itself at B = e_1, where B starts.
    """

    precision = "float32"
    tags: ClassVar[dict[str, int]] = {"shift_b": 0, "shift_c": 0, "d_k": 0, "d": 0}
    opt: ClassVar[dict[str, dict[str, Any]]] = {"shift_b": SSM_FACTS}

    def __init__(self, width: int, options: H3.Options) -> None:
        super().__init__()
        heads = width // options.head_dim
        self.head_dim = options.head_dim
        self.shift_b = nn.Parameter(torch.empty(width, options.shift_state))
        self.shift_c = nn.Parameter(torch.empty(width, options.shift_state))
        self.d_k = nn.Parameter(torch.empty(width))
        self.diagonal = DiagonalParameters(heads, options.state, options.dt_min, options.dt_max, options.rule)
        self.d = nn.Parameter(torch.empty(heads))

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator, std: float, layers: int) -> None:
        """B = e_1, C uniform as a convolution's taps, both skips N(0, 1)."""
        del std, layers
        if name == "shift_b":
            parameter.zero_()
            parameter[:, 0] = 1.0
        elif name == "shift_c":
            bound = 1.0 / math.sqrt(parameter.shape[1])
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            parameter.normal_(generator=generator)

    def taps(self) -> Tensor:
        """The shift convolution's kernel, (channel, N), tap 0 the current token."""
        states = self.shift_b.shape[1]
        padded = nn.functional.pad(self.shift_c, (0, states - 1))
        # Not a batched product: that would copy the N overlapping windows of every channel first.
        return (padded.unfold(1, states, 1) * self.shift_b[:, None]).sum(-1)

    def arguments(self) -> tuple[Tensor, Diagonal, dict[str, Any]]:
        """What both forms of the kernel take after q, k, v."""
        return self.taps(), self.diagonal(), {"d_k": self.d_k, "d": self.d, "head_dim": self.head_dim}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, state: H3State | None) -> Any:
        """q, k, v (B, D, L) -> (y (B, D, L), state)."""
        taps, diagonal, rest = self.arguments()
        return h3_mix(q, k, v, taps, diagonal, **rest, document_ids=documents, state=state)

    def over(self, axis: Axis, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        """The same for this rank's slices of a split row, q, k, v (B, D, own L) -> y like them."""
        taps, diagonal, rest = self.arguments()
        return h3_mix_over(axis, q, k, v, taps, diagonal, **rest, document_ids=documents)

    def step(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, state: H3State) -> Any:
        """q, k, v (B, D) -> (y (B, D), state)."""
        taps, diagonal, rest = self.arguments()
        return h3_mix_step(q, k, v, taps, diagonal, **rest, document_ids=documents, state=state)


@register("mixer", "h3")
class H3(Mixer):
    """out(q * diag_ssm(shift_ssm(k) * v)), with skips; ``head_dim`` > 1 makes the product an outer one per head.

    State of the diagonal SSM per head: ``state`` real numbers (``state``/2 complex modes), of the shift SSM
    ``shift_state`` per channel: constant in length.
    """

    traits = Traits(shard="channel", cp=("state", "a2a"), carries=True)

    class Options(interfaces.Options):
        kind: str = "h3"
        state: int = Field(64, gt=0, multiple_of=2)
        shift_state: int = Field(64, gt=0)
        head_dim: int = Field(1, gt=0)
        dt_min: float = Field(1e-3, gt=0)
        dt_max: float = Field(1e-1, gt=0)
        rule: Literal["bilinear", "zoh"] = "bilinear"

    @classmethod
    def check(cls, options: Options, width: int, sequence_length: int) -> None:
        """Refuse heads that do not fit the width, and an empty range of steps."""
        del sequence_length
        if width % options.head_dim:
            raise ValueError(f"head_dim {options.head_dim} does not divide the width {width}; choose a divisor")
        if options.dt_min > options.dt_max:
            raise ValueError(f"dt_min {options.dt_min} is above dt_max {options.dt_max}; swap them")

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__()
        width = context.width
        self.options = options
        self.traits = replace(type(self).traits, units=width // options.head_dim)
        self.q, self.k, self.v = (Linear(width, width, role="column") for _ in range(3))
        self.core = H3Core(width, options)
        self.out = Linear(width, width, role="row")

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        q, k, v = (linear.channel_major(x) for linear in (self.q, self.k, self.v))
        if self.cp.size > 1:
            return Out(self.out(self._split(q, k, v, seq).transpose(1, 2)))
        y, state = self.core(q, k, v, seq.document_ids, state)
        return Out(self.out(y.transpose(1, 2)), state=state)

    def _split(self, q: Tensor, k: Tensor, v: Tensor, seq: Seq) -> Tensor:
        """A row whose slices lie on several ranks: by its carried states, or by channels on whole rows."""
        if self.cp.kind == "state":
            return self.core.over(self.cp, q, k, v, seq.document_ids)
        documents = seq.row.document_ids
        q, k, v = (self.cp.to_units(x, 1, 2) for x in (q, k, v))
        y, _ = on_share(self.core, self.cp, q, k, v, documents, None)
        return self.cp.to_slices(y, 1, 2)

    def step(self, x: Tensor, seq: Seq, state: State) -> Out:
        q, k, v = (linear(x)[:, 0] for linear in (self.q, self.k, self.v))
        documents = None if seq.document_ids is None else seq.document_ids[:, 0]
        y, state = self.core.step(q, k, v, documents, state)
        return Out(self.out(y[:, None]), state=state)

    def mixing_flops(self, length: int) -> float:
        """By the recurrences, the least that the mathematics asks for and the same at every length: a multiply-add per
        shift tap; per complex mode 8 for the update and 4 for the read-out; skips, product and gate."""
        del length
        width, head_dim = self.q.weight.shape[0], self.options.head_dim
        return width * (2.0 * self.options.shift_state + head_dim * (6.0 * self.options.state + 4.0) + 4.0)

    def handed_on(self, length: int, itemsize: int) -> float:
        """Keys that the next slice's taps reach; fp32 states at the slice's end, and what multiplies states in it."""
        width, head_dim = self.q.weight.shape[0], self.options.head_dim
        tail = min(max(1, self.options.shift_state - 1), length)
        return width * (tail * itemsize + 4.0 * self.options.state * (head_dim + 1.0 / head_dim))
