"""Disentangled attention: what a token is against where the other stands (He et al. 2020, "DeBERTa")."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from potamos.kernels.attention import Disentangled, deberta_rows
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionCall, AttentionPositions, Context, Positions, Projection
from potamos.pretrain.models.linear import Embedding, Linear, Norm, NormOptions
from potamos.pretrain.models.registry import register


class RelativeVectors(AttentionPositions):
    """Vectors for relative positions, (2 span, D), normalized and then projected to keys and to queries.

    With ``share_att_key`` by the layer's own projections (versions 2 and 3), else by two of this module (version 1).
    """

    rows: Tensor

    def __init__(self, options: Disentangle.Options, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        span = options.buckets or options.furthest
        with torch.device("cpu"):  # a constant, also while the model is being built without memory
            rows, self.least = deberta_rows(span, options.buckets, options.furthest)
        self.register_buffer("rows", rows, persistent=False)
        self.content = options.terms in ("both", "c2p")
        self.position = options.terms in ("both", "p2c")
        self.terms = 1 + self.content + self.position
        self.table = Embedding(2 * span, width)
        self.norm = Norm(width, NormOptions(place="post", epsilon=1e-7))
        own = not options.share_att_key
        # A bias on position keys would add the same to all scores of a query, which softmax does not see.
        self.key = Linear(width, width, role="column", bias=False) if own and self.content else None
        self.query = Linear(width, width, role="column") if own and self.position else None

    def bias(self, call: AttentionCall, query: Projection, key: Projection) -> Disentangled:
        vectors = self.norm(self.table.weight)
        keys = queries = None
        if self.content:
            keys = key(vectors) if self.key is None else self._heads(self.key(vectors))
            keys = keys.repeat_interleave(len(call.heads) // len(keys), 0)  # grouped queries share key heads
        if self.position:
            queries = query(vectors) if self.query is None else self._heads(self.query(vectors))
        return Disentangled(keys, queries, self.rows, self.least)

    def _heads(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)

    def mixing_flops(self) -> float:
        """Every query against every position key, every key against every position query."""
        entries, width = self.table.weight.shape
        return 2.0 * (self.terms - 1) * entries * width


@register("positions", "disentangled")
class Disentangle(Positions):
    """score = (q_i . k_j + q_i . K_r + k_j . Q_r) / sqrt(3 head dim), r the relative position of i and j: content to
    content, content to position (``c2p``) and position to content (``p2c``).

    Distances up to ``buckets`` / 2 have a vector each, further ones share them logarithmically up to ``furthest``
    (versions 2 and 3; 256 and 512 in the released models); with ``buckets`` 0 each distance up to ``furthest`` has its
    own (version 1; 512). Every layer has its own vectors here, where the released models share theirs among all.

    Both terms take the relative position i - j, as the released code does and the paper's equation 4 does not.
    """

    class Options(interfaces.Options):
        kind: str = "disentangled"
        buckets: int = Field(256, ge=0, multiple_of=2)
        furthest: int = Field(512, gt=0)
        terms: Literal["both", "c2p", "p2c"] = "both"
        share_att_key: bool = True

    @classmethod
    def check(cls, options: Options, width: int, sequence_length: int) -> None:
        """Refuse a reach that the exact buckets alone would fill."""
        del width, sequence_length
        if options.buckets and options.furthest <= options.buckets // 2 + 1:
            raise ValueError(
                f"furthest {options.furthest} must exceed {options.buckets // 2 + 1}: half of the buckets stand for "
                "one distance each; raise it, or set buckets 0 for one vector per distance"
            )

    def attention(self, context: Context, *, heads: int, head_dim: int, causal: bool) -> AttentionPositions:
        del heads, causal
        return RelativeVectors(self.options, context.width, head_dim)
