"""Softmax attention: multi-head, grouped-query and multi-query (Vaswani et al. 2017; Ainslie et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor
from torch.utils import _pytree as pytree

from potamos.kernels.attention import attention
from potamos.parallel.facts import Traits
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import Context, Mixer, Out, Seq, State
from potamos.pretrain.models.linear import Linear
from potamos.pretrain.models.registry import register


@dataclass(frozen=True)
class AttentionState:
    """Keys (rotated, where positions rotate) and values seen so far, (B, key heads, T, head dim); documents (B, T)."""

    keys: Tensor
    values: Tensor
    documents: Tensor


pytree.register_dataclass(AttentionState)


@register("mixer", "attention")
class Attention(Mixer):
    """out(softmax(q k^T / sqrt(head dim) + bias) v), with the layer's positions and pattern.

    ``kv_heads`` < ``heads`` shares keys and values among groups of query heads. ``memory`` is how many keys of earlier
    segments a training segment sees where the data order carries state (Transformer-XL); generation always sees all.
    """

    traits = Traits(shard="head", cp=("a2a", "ring"), carries=True)

    class Options(interfaces.Options):
        kind: str = "attention"
        heads: int = Field(gt=0)
        kv_heads: int | None = Field(None, gt=0)
        dropout: float = Field(0.0, ge=0.0, lt=1.0)
        bias: bool = True
        memory: int = Field(0, ge=0)

    @classmethod
    def check(cls, options: Options, width: int, sequence_length: int) -> None:
        """Refuse heads that do not fit the width or each other."""
        del sequence_length
        if width % options.heads:
            raise ValueError(f"heads {options.heads} does not divide the width {width}; choose a divisor")
        if options.kv_heads is not None and options.heads % options.kv_heads:
            raise ValueError(f"kv_heads {options.kv_heads} does not divide heads {options.heads}; choose a divisor")

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__()
        width, heads, kv_heads = context.width, options.heads, options.kv_heads or options.heads
        assert context.pattern is not None
        self.layer, self.dropout, self.memory = context.layer, options.dropout, options.memory
        self.head_dim = width // heads
        self.traits = replace(type(self).traits, units=kv_heads)
        self.pattern = context.pattern
        self.positions = context.positions.attention(heads, self.head_dim) if context.positions is not None else None
        self.q = Linear(width, width, role="column", bias=options.bias)
        self.k = Linear(width, kv_heads * self.head_dim, role="column", bias=options.bias)
        self.v = Linear(width, kv_heads * self.head_dim, role="column", bias=options.bias)
        self.out = Linear(width, width, role="row", bias=options.bias, into_residual=True)

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        # Head counts are never stored: under a split by head a rank holds some of them.
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        if self.cp.size > 1:
            return Out(self.out(self._split(q, k, v, seq).transpose(1, 2).flatten(2)))
        positions = self.positions
        rotary = positions.rotary(seq.positions, seq.positions) if positions is not None else None
        if rotary is not None:  # keys are rotated once, before they are kept
            k, rotary = rotary.rotate_key(k), replace(rotary, key_positions=None)
        seen = self._extend(state, k, v, seq)
        query_offset = seen.keys.shape[2] - q.shape[2]
        documents = None if seq.document_ids is None and state is None else seen.documents
        mask = self.pattern.mask(
            causal=self.traits.causal,
            query_offset=query_offset,
            query_documents=None if documents is None else documents[:, query_offset:],
            key_documents=documents,
        )
        drop = self.dropout if self.training else 0.0
        y = attention(
            q,
            seen.keys,
            seen.values,
            mask=mask,
            bias=positions.bias(query_offset) if positions is not None else None,
            rotary=rotary,
            scale=1.0 / math.sqrt(self.head_dim),
            dropout=drop,
            dropout_key=seq.key("attention", self.layer) if drop > 0.0 else None,
            head_offset=self.tp.rank * q.shape[1],
        )
        return Out(self.out(y.transpose(1, 2).flatten(2)), state=seen)

    def _split(self, q: Tensor, k: Tensor, v: Tensor, seq: Seq) -> Tensor:
        """A row whose slices lie on several ranks -> y like q. "a2a": whole rows of a share of the heads; "ring": this
        rank's queries see the keys of all slices up to their own."""
        row, axis, length = seq.row, self.cp, q.shape[2]
        positions = self.positions
        head = self.tp.rank * q.shape[1]
        if axis.kind == "a2a":
            q, k, v = (axis.to_units(x, 1, 2) for x in (q, k, v))
            head += axis.rank * q.shape[1]
            rotary = positions.rotary(row.positions, row.positions) if positions is not None else None
            whole = self._attend(q, k, v, row, 0, rotary, head, share=True)
            return axis.to_slices(whole, 1, 2)
        rotary = positions.rotary(seq.positions, seq.positions) if positions is not None else None
        if rotary is not None:
            q, k = rotary.rotate_query(q), rotary.rotate_key(k)
        k, v = axis.whole(k, 2), axis.whole(v, 2)
        step = length // len(axis.held)
        parts = []
        for part, place in zip(q.split(step, 2), axis.held, strict=True):
            end = (place + 1) * step if self.traits.causal else k.shape[2]
            parts.append(self._attend(part, k[:, :, :end], v[:, :, :end], row, place * step, None, head))
        return torch.cat(parts, 2)

    def _attend(self, q, k, v, row: Seq, offset: int, rotary, head: int, share: bool = False) -> Tensor:
        """Queries at columns `offset` and on against the row's first keys."""
        ids = row.document_ids
        mask = self.pattern.mask(
            causal=self.traits.causal,
            query_offset=offset,
            query_documents=None if ids is None else ids[:, offset : offset + q.shape[2]],
            key_documents=None if ids is None else ids[:, : k.shape[2]],
        )
        bias = self.positions.bias(offset) if self.positions is not None else None
        if bias is not None and share:
            bias = bias.share(self.cp.rank, self.cp.size)
        drop = self.dropout if self.training else 0.0
        return attention(
            q, k, v, mask=mask, bias=bias, rotary=rotary, scale=1.0 / math.sqrt(self.head_dim), dropout=drop,
            dropout_key=row.key("attention", self.layer) if drop > 0.0 else None, head_offset=head,
        )  # fmt: skip

    def _extend(self, state: AttentionState | None, k: Tensor, v: Tensor, seq: Seq) -> AttentionState:
        """The keys, values and documents of the past and of this call, joined."""
        documents = seq.document_ids
        if documents is None:
            # Without ids a continued row goes on in the document in which it stopped.
            first = torch.zeros(len(k), 1, dtype=torch.int32, device=k.device)
            documents = (first if state is None else state.documents[:, -1:]).expand(-1, k.shape[2])
        if state is None:
            return AttentionState(k, v, documents)
        return AttentionState(
            torch.cat([state.keys, k], 2),
            torch.cat([state.values, v], 2),
            torch.cat([state.documents, documents], 1),
        )

    def segment_state(self, state: State) -> State:
        """The last ``memory`` keys; None where the layer looks at its own segment only."""
        if self.memory == 0:
            return None
        keep = slice(-self.memory, None)
        return AttentionState(state.keys[:, :, keep], state.values[:, :, keep], state.documents[:, keep])

    def mixing_flops(self, length: int) -> float:
        """Scores and their product with the values: 2 x 2 per visible key and channel; half of the row is visible."""
        visible = (length + 1) / 2 if self.traits.causal else length
        return 4.0 * self.q.weight.shape[0] * visible
