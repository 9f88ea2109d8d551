"""The token frontend: token and position embeddings in, vocabulary scores out."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from potamos.kernels.cross_entropy import linear_cross_entropy
from potamos.kernels.dropout import dropout
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import Context, Frontend, Out, Seq
from potamos.pretrain.models.linear import Embedding
from potamos.pretrain.models.registry import register


@register("frontend", "tokens")
class Tokens(Frontend):
    """Token embedding plus, if the position scheme has one, a position embedding; scores by the same (``tied``) or by
    a second table. ``vocabulary`` may exceed the tokenizer's, to a multiple that hardware likes."""

    class Options(interfaces.Options):
        kind: str = "tokens"
        vocabulary: int = Field(gt=0)
        tied: bool = True
        embedding_dropout: float = Field(0.0, ge=0.0, lt=1.0)

    def __init__(self, options: Options, context: Context) -> None:
        super().__init__()
        self.embedding_dropout = options.embedding_dropout
        self.tokens = Embedding(options.vocabulary, context.width, tags={"weight": 0})
        self.positions = context.positions.embedding(context) if context.positions is not None else None
        self.max_positions = getattr(self.positions, "limit", None)
        self.head = None if options.tied else Embedding(options.vocabulary, context.width, tags={"weight": 0})

    def embed(self, inputs: Mapping[str, Tensor], seq: Seq) -> Out:
        hidden = self.tokens(inputs["tokens"])
        if self.positions is not None:
            hidden = hidden + self.positions(self.tp.own(seq.positions))
        if self.training and self.embedding_dropout > 0.0:
            key = seq.key("embedding", 0)
            hidden = dropout(hidden, self.embedding_dropout, key=key, positions=self.tp.own(seq.all_columns))
        return Out(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(*self._scoring(hidden))

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        hidden, weight = self._scoring(self.tp.enter(hidden))
        return linear_cross_entropy(hidden.flatten(0, -2), weight, targets.flatten(), vocabulary=self.tp)

    def _scoring(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        weight = (self.tokens if self.head is None else self.head).weight
        dtype = self.compute or hidden.dtype
        return hidden.to(dtype), weight.to(dtype)

    def mixing_flops(self, length: int) -> float:
        del length
        return 2.0 * self.tokens.weight.numel()
