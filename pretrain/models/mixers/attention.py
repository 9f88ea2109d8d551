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
from potamos.pretrain.models.interfaces import AttentionCall, Context, Mixer, Out, Seq, State
from potamos.pretrain.models.linear import Linear
from potamos.pretrain.models.registry import register


@dataclass(frozen=True)
class AttentionState:
    """Keys (rotated, where positions rotate) and values seen so far, (B, key heads, T, head dim); documents (B, T)."""

    keys: Tensor
    values: Tensor
    documents: Tensor


@dataclass(frozen=True)
class PlacedState(AttentionState):
    """Where the pattern counts in positions: the keys' positions too, (B, T) int32."""

    positions: Tensor


pytree.register_dataclass(AttentionState)
pytree.register_dataclass(PlacedState)


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
        self.pattern, scheme = context.pattern, context.positions
        self.positions = (
            None
            if scheme is None
            else scheme.attention(context, heads=heads, head_dim=self.head_dim, causal=self.traits.causal)
        )
        terms = 1 if self.positions is None else self.positions.terms
        self.scale = 1.0 / math.sqrt(terms * self.head_dim)
        self.q = Linear(width, width, role="column", bias=options.bias)
        self.k = Linear(width, kv_heads * self.head_dim, role="column", bias=options.bias)
        self.v = Linear(width, kv_heads * self.head_dim, role="column", bias=options.bias)
        self.out = Linear(width, width, role="row", bias=options.bias, into_residual=True)

    @property
    def counts_columns(self) -> bool:
        return self.pattern.counts == "columns"

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        q, k, v = self._query(x), self._key(x), self._heads(self.v(x))
        if self.cp.size > 1:
            return Out(self.out(self._split(q, k, v, seq).transpose(1, 2).flatten(2)))
        positions = self.positions
        rotary = positions.rotary(seq.positions, seq.positions) if positions is not None else None
        if rotary is not None:  # keys are rotated once, before they are kept
            k, rotary = rotary.rotate_key(k), replace(rotary, key_positions=None)
        seen = self._extend(state, k, v, seq)
        call = self._call(q, seen, one_document=seq.document_ids is None and state is None)
        drop = self.dropout if self.training else 0.0
        y = attention(
            q,
            seen.keys,
            seen.values,
            mask=self.pattern.mask(call),
            bias=positions.bias(call, self._query, self._key) if positions is not None else None,
            rotary=rotary,
            scale=self.scale,
            dropout=drop,
            dropout_key=seq.key("attention", self.layer) if drop > 0.0 else None,
            head_offset=call.heads.start,
        )
        return Out(self.out(y.transpose(1, 2).flatten(2)), state=seen if self.traits.carries else None)

    def _query(self, x: Tensor) -> Tensor:
        return self._heads(self.q(x))

    def _key(self, x: Tensor) -> Tensor:
        return self._heads(self.k(x))

    def _heads(self, y: Tensor) -> Tensor:
        """(..., L, heads x head dim) to (..., heads, L, head dim). Head counts are never stored: under a split by head
        a rank holds some of them."""
        return y.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)

    def _call(self, q: Tensor, seen: AttentionState, *, one_document: bool) -> AttentionCall:
        heads, queries, keys = q.shape[1], q.shape[2], seen.keys.shape[2]
        call = AttentionCall(
            layer=self.layer,
            causal=self.traits.causal,
            heads=range(self.tp.rank * heads, (self.tp.rank + 1) * heads),
            queries=queries,
            keys=keys,
            device=q.device,
        )
        if one_document:
            return call
        own = slice(keys - queries, None)
        call = replace(call, query_documents=seen.documents[:, own], key_documents=seen.documents)
        if isinstance(seen, PlacedState):
            call = replace(call, query_positions=seen.positions[:, own], key_positions=seen.positions)
        return call

    def _split(self, q: Tensor, k: Tensor, v: Tensor, seq: Seq) -> Tensor:
        """A row whose slices lie on several ranks -> y like q. "a2a": whole rows of a share of the heads; "ring": keys
        and values of all slices come by."""
        row, axis, positions = seq.row, self.cp, self.positions
        if positions is not None:
            rotary = positions.rotary(seq.positions, seq.positions)
            if rotary is not None:
                q, k = rotary.rotate_query(q), rotary.rotate_key(k)
        call = self._row_call(row, self.tp.rank * q.shape[1], q.shape[1], q.device)
        bias = positions.bias(call, self._query, self._key) if positions is not None else None
        drop = self.dropout if self.training else 0.0
        key = row.key("attention", self.layer) if drop > 0.0 else None
        if axis.kind == "ring":
            return axis.ring(
                q, k, v, self.pattern.mask(call), bias, self.scale, drop, key, call.heads.start
            )  # fmt: skip
        share = len(call.heads) // axis.size
        call = replace(call, heads=call.heads[axis.rank * share :][:share])
        q, k, v = (axis.to_units(x, 1, 2) for x in (q, k, v))
        y = attention(
            q, k, v, mask=self.pattern.mask(call), bias=None if bias is None else bias.share(axis.rank, axis.size),
            scale=self.scale, dropout=drop, dropout_key=key, head_offset=call.heads.start,
        )  # fmt: skip
        return axis.to_slices(y, 1, 2)

    def _row_call(self, row: Seq, first: int, heads: int, device: torch.device) -> AttentionCall:
        """The call of a whole row by itself."""
        length, ids = row.positions.shape[1], row.document_ids
        call = AttentionCall(
            layer=self.layer,
            causal=self.traits.causal,
            heads=range(first, first + heads),
            queries=length,
            keys=length,
            device=device,
        )
        if ids is None:
            return call
        call = replace(call, query_documents=ids, key_documents=ids)
        if self.pattern.counts == "positions":
            places = row.positions.int().expand(len(ids), -1)
            call = replace(call, query_positions=places, key_positions=places)
        return call

    def _extend(self, state: AttentionState | None, k: Tensor, v: Tensor, seq: Seq) -> AttentionState:
        """The keys, values and documents of the past and of this call, joined."""
        documents = seq.document_ids
        if documents is None:
            # Without ids a continued row goes on in the document in which it stopped.
            first = torch.zeros(len(k), 1, dtype=torch.int32, device=k.device)
            documents = (first if state is None else state.documents[:, -1:]).expand(-1, k.shape[2])
        new = AttentionState(k, v, documents)
        if self.pattern.counts == "positions":
            new = PlacedState(k, v, documents, seq.positions.int().expand(len(k), -1))
        if state is None:
            return new
        return pytree.tree_map(lambda past, more: torch.cat([past, more], _time(past)), state, new)

    def segment_state(self, state: State) -> State:
        """The last ``memory`` keys; None where the layer looks at its own segment only."""
        if self.memory == 0:
            return None
        return pytree.tree_map(lambda leaf: _last(leaf, self.memory), state)

    def mixing_flops(self, length: int) -> float:
        """Scores and their product with the values, 2 x 2 per visible key and channel; and what the bias costs."""
        visible = self.pattern.visible_keys(length, causal=self.traits.causal)
        own = 0.0 if self.positions is None else self.positions.mixing_flops()
        return 4.0 * self.q.weight.shape[0] * visible + own


def _time(leaf: Tensor) -> int:
    """The dimension of a state's tensor that counts keys."""
    return 2 if leaf.dim() == 4 else 1


def _last(leaf: Tensor, count: int) -> Tensor:
    """The last ``count`` keys of a state's tensor, or all there are."""
    time = _time(leaf)
    kept = min(count, leaf.shape[time])
    return leaf.narrow(time, leaf.shape[time] - kept, kept)
