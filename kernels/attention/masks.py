"""Which keys a query sees, described without making anything of length x length.

Queries and keys are counted in columns of their row: query i is at column `query_offset + i`, key j at `key_offset +
j`, so a key-value cache and a sequence shard are served by the same description.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class Blocks:
    """Local attention by blocks: a query of block b sees the keys of blocks b - behind .. b + ahead.

    size: tokens a block. shift: positions are moved up by it before they are cut into blocks (half a block in every
    second layer, say). behind = 1, ahead = 0 under a causal mask is blockwise causal attention (Sun et al. 2022).
    """

    size: int
    behind: int = 0
    ahead: int = 0
    shift: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or min(self.behind, self.ahead, self.shift) < 0:
            raise ValueError(f"{self}: size must be at least 1; behind, ahead and shift at least 0")


@dataclass(frozen=True)
class BlockLayout:
    """Block sparsity: the blocks of keys that each block of queries may see; other parts of the mask hold inside too.

    size: columns a block, for queries and keys alike; rows of the layout are blocks of the whole row's columns.
    counts: (heads or 1, query blocks) int32; indices: (heads or 1, query blocks, most) int32, the first `counts` of
    each row are key blocks in rising order, the rest is unread. heads: the local heads of the call.
    Source of the form: block-sparse FlashAttention (Dao et al. 2022, section 3.3).
    """

    size: int
    counts: Tensor
    indices: Tensor

    @classmethod
    def from_dense(cls, visible: Tensor, size: int) -> BlockLayout:
        """visible: (heads or 1, query blocks, key blocks) bool."""
        counts = visible.sum(-1, dtype=torch.int32)
        # A plan counts memory without values: there, any block may see all.
        most = visible.shape[-1] if isinstance(visible, FakeTensor) else max(1, int(counts.max()))
        # A stable sort puts the seen blocks first and leaves them in order.
        order = (~visible).to(torch.int8).sort(dim=-1, stable=True).indices
        return cls(size, counts, order[..., :most].to(torch.int32))

    def dense(self, columns: int) -> Tensor:
        """(heads or 1, query blocks, `columns` key blocks) bool."""
        places = torch.arange(self.indices.shape[-1], device=self.indices.device)
        seen = torch.zeros(*self.counts.shape, columns + 1, dtype=torch.bool, device=self.indices.device)
        at = torch.where(places < self.counts[..., None], self.indices.long().clamp(max=columns), columns)
        return seen.scatter(-1, at, True)[..., :columns]


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: a key inside the band, or below the prefix; of the layout; of the query's document.

    causal: keys at or before the query's column. window: only keys closer than `window` columns (window=1 is the
    token itself; both sides when not causal). blocks: only keys of near blocks. first: the first `first` positions see
    and are seen as if there were neither window nor blocks (global tokens); causality holds.
    prefix: keys at columns below it are seen whatever causal, window and blocks say (a prefix language model); an int
    or (batch,).
    layout: block sparsity on top of all that.
    query_documents, key_documents: (batch, length) int32 for this call's queries and keys, given together; a query
    sees only keys of its own document, and -1 (padding) sees and is seen by nothing.
    Tensors must not be changed behind torch's back (through NumPy, say): what is derived from them is remembered.
    query_positions, key_positions: (batch, length) int32, 0 and above, given together: what `blocks` and `first` count
    in, so that a packed document has the blocks that it has alone; None counts columns.
    """

    causal: bool = True
    query_offset: int = 0
    key_offset: int = 0
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    window: int | None = None
    prefix: int | Tensor | None = None
    blocks: Blocks | None = None
    first: int = 0
    layout: BlockLayout | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.query_documents is None) != (self.key_documents is None):
            raise ValueError("Mask: give query_documents and key_documents together (self-attention: the same ids)")
        if (self.query_positions is None) != (self.key_positions is None):
            raise ValueError("Mask: give query_positions and key_positions together")
        if self.window is not None and self.window < 1:
            raise ValueError(f"Mask: window={self.window} must be at least 1 (the token itself)")
        if self.first < 0 or min(self.query_offset, self.key_offset) < 0:
            raise ValueError(
                f"Mask: first={self.first}, query_offset={self.query_offset} and key_offset={self.key_offset} must be "
                "at least 0"
            )

    @property
    def banded(self) -> bool:
        """Whether a window or blocks bound the distance."""
        return self.window is not None or self.blocks is not None

    def hides_nothing(self, queries: int, keys: int) -> bool:
        """True when no query of this call is denied any key, known without looking at tensors."""
        if self.query_documents is not None or self.banded or self.layout is not None:
            return False
        return not self.causal or self.query_offset >= self.key_offset + keys - 1

    def is_plain_causal(self) -> bool:
        """True when query i sees exactly keys 0..i."""
        return (
            self.causal
            and self.query_offset == self.key_offset
            and self.query_documents is None
            and not self.banded
            and self.prefix is None
            and self.layout is None
        )

    def part(self, queries: range, keys: range) -> Mask:
        """The mask of some of the queries and some of the keys, ranges of this one's own."""

        def cut(x: Tensor | None, of: range) -> Tensor | None:
            return None if x is None else x[:, of.start : of.stop]

        return replace(
            self,
            query_offset=self.query_offset + queries.start,
            key_offset=self.key_offset + keys.start,
            query_documents=cut(self.query_documents, queries),
            key_documents=cut(self.key_documents, keys),
            query_positions=cut(self.query_positions, queries),
            key_positions=cut(self.key_positions, keys),
        )

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(batch or 1, heads or 1, queries, keys) bool: the mask itself, for forms that need one."""
        query = torch.arange(self.query_offset, self.query_offset + queries, device=device)[:, None]
        key = torch.arange(self.key_offset, self.key_offset + keys, device=device)[None, :]
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
        if self.banded:
            seen = seen & self._band(query, key)
        if self.causal:
            seen = seen & (key <= query)
        if self.prefix is not None:
            limit = self.prefix[:, None, None, None] if isinstance(self.prefix, Tensor) else self.prefix
            seen = seen | (key < limit)
        if self.layout is not None:
            size = self.layout.size
            blocks = self.layout.dense((self.key_offset + keys - 1) // size + 1)
            seen = seen & blocks[:, query[:, 0] // size][:, :, key[0] // size]
        if self.query_documents is not None and self.key_documents is not None:
            ours, theirs = self.query_documents[:, None, :, None], self.key_documents[:, None, None, :]
            seen = seen & (ours == theirs) & (ours >= 0)
        return seen

    def _band(self, query: Tensor, key: Tensor) -> Tensor:
        """(batch or 1, 1, queries, keys): window, blocks and global tokens, of columns (queries, 1) and (1, keys)."""
        near = torch.ones(1, 1, *torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool, device=query.device)
        if self.window is not None:
            near = near & ((query - key).abs() < self.window)
        if self.query_positions is not None and self.key_positions is not None:
            query, key = self.query_positions[:, None, :, None], self.key_positions[:, None, None, :]
        if self.blocks is not None:
            size, shift = self.blocks.size, self.blocks.shift
            apart = (query + shift) // size - (key + shift) // size
            near = near & (apart <= self.blocks.behind) & (-apart <= self.blocks.ahead)
        return near | (query < self.first) | (key < self.first)


def padding_documents(valid: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor]:
    """(query_documents, key_documents) that hide padding: valid (batch, keys) bool.

    queries: None where queries and keys are the same tokens (padding then sees nothing either); otherwise how many
    queries there are, all real.
    """
    keys = torch.where(valid, 0, -1).to(torch.int32)
    if queries is None:
        return keys, keys
    return keys.new_zeros(len(keys), queries), keys


def documents_from_lengths(cumulative: Tensor, length: int) -> Tensor:
    """(1, length) int32 document ids of one packed row: cumulative (documents + 1,) starts at 0, as in variable-length
    attention; columns from the last entry on are padding."""
    columns = torch.arange(length, device=cumulative.device)
    ids = torch.searchsorted(cumulative[1:].contiguous(), columns, right=True)
    return torch.where(columns < cumulative[-1], ids, -1).to(torch.int32)[None]
