"""Causal linear attention (Katharopoulos et al. 2020, "Transformers are RNNs")."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils import _pytree as pytree

from potamos.parallel.facts import Traits
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import Context, Mixer, Out, Seq, State
from potamos.pretrain.models.linear import Linear
from potamos.pretrain.models.registry import register


@dataclass(frozen=True)
class LinearAttentionState:
    """Sum of f(k) v^T, (B, heads, d, d); sum of f(k), (B, heads, d); the document they belong to, (B,)."""

    products: Tensor
    keys: Tensor
    document: Tensor


pytree.register_dataclass(LinearAttentionState)


@register("mixer", "linear_attention")
class LinearAttention(Mixer):
    """y_t = f(q_t) S_t / (f(q_t) z_t + epsilon), S_t and z_t the sums of f(k) v^T and f(k) up to t, f = elu + 1.

    Quadratic inside chunks of ``chunk`` tokens, and sums carried from one to the next: O(L) time and memory.
    """

    traits = Traits(shard="head", cp=("a2a",), carries=True)

    class Options(interfaces.Options):
        kind: str = "linear_attention"
        heads: int = Field(gt=0)
        chunk: int = Field(64, gt=0)
        epsilon: float = Field(1e-6, gt=0)

    @classmethod
    def check(cls, options: Options, width: int, sequence_length: int) -> None:
        """Refuse heads that do not fit the width."""
        del sequence_length
        if width % options.heads:
            raise ValueError(f"heads {options.heads} does not divide the width {width}; choose a divisor")

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__()
        width = context.width
        self.options, self.head_dim = options, width // options.heads
        self.traits = replace(type(self).traits, units=options.heads)
        self.q, self.k, self.v = (Linear(width, width, role="column") for _ in range(3))
        self.out = Linear(width, width, role="row", into_residual=True)

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        wide = torch.promote_types(x.dtype, torch.float32)  # sums over a whole document need more than bf16
        q, k, v = (
            linear(x).to(wide).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if self.cp.size > 1:  # whole rows of a share of the heads
            q, k, v = (self.cp.to_units(t, 1, 2) for t in (q, k, v))
            y = self.cp.to_slices(self._mix(q, k, v, seq.row, None)[0], 1, 2)
            return Out(self._leave(y, x))
        y, state = self._mix(q, k, v, seq, state)
        return Out(self._leave(y, x), state=state)

    def _leave(self, y: Tensor, x: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2).to(x.dtype))

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, seq: Seq, state: LinearAttentionState | None
    ) -> tuple[Tensor, LinearAttentionState]:
        """Whole rows of some heads, (B, heads, L, d) each, -> (y like v, the state after them)."""
        documents = seq.document_ids
        if documents is None:  # one document: the carried one, if there is one
            first = torch.zeros_like(seq.positions[:, 0], dtype=torch.int32) if state is None else state.document
            documents = first[:, None].expand(-1, q.shape[2])
        if state is None:
            sums = k.new_zeros(*k.shape[:2], self.head_dim, self.head_dim)
            state = LinearAttentionState(sums, k.new_zeros(*k.shape[:2], self.head_dim), documents[:, 0])
        parts = []
        for qc, kc, vc, dc in zip(
            *(t.split(self.options.chunk, 2) for t in (q, k, v)), documents.split(self.options.chunk, 1), strict=True
        ):
            y, state = self._chunk(qc, kc, vc, dc, state)
            parts.append(y)
        return torch.cat(parts, 2), state

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor, state: LinearAttentionState
    ) -> tuple[Tensor, LinearAttentionState]:
        """One chunk, q, k, v (B, heads, C, d): its own tokens by a masked square, earlier ones by the carried sums."""
        same = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
        goes_on = (documents == state.document[:, None])[:, None, :, None]
        scores = (q @ k.mT).masked_fill(~same, 0)
        past = torch.where(goes_on, q, 0)
        above = scores @ v + past @ state.products
        below = scores.sum(-1, keepdim=True) + past @ state.keys[..., None]
        k = torch.where((documents == documents[:, -1:])[:, None, :, None], k, 0)
        kept = goes_on[:, :, -1:]
        products = torch.where(kept, state.products, 0) + k.mT @ v
        keys = torch.where(kept[..., 0], state.keys, 0) + k.sum(2)
        return above / (below + self.options.epsilon), LinearAttentionState(products, keys, documents[:, -1])

    def mixing_flops(self, length: int) -> float:
        """By the recurrence: a multiply-add to add f(k) v^T, and one to read it, per channel and head channel."""
        del length
        return 4.0 * self.q.weight.shape[0] * self.head_dim
