"""How sequences are cut into chunks: plainly, or from each document's own start.

A chunk operator is one matrix per channel, shared by all its columns, so a document boundary inside a chunk would
need another matrix per column. Instead every document is cut from its own first token: columns never contain two
documents, and a flag per column says whether it continues the one before. Shorter last pieces are padded with zeros
on the right, where causality makes them harmless.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..once import differentiable_once

CHUNK = 64
"""Tokens per chunk, chosen by measurement (kernels/README.md)."""
SHORT_CHUNKS = (16, 32, 64)
"""Candidates when documents are shorter than a chunk."""


@dataclass(frozen=True)
class Segments:
    """A cut of (batch, length) into `count` chunks of `chunk` tokens per row.

    Without documents `slot` is None and the chunks are the plain ones. With documents:
    slot (batch, length): where token t of a row goes, in [0, count * chunk);
    token (batch, count * chunk): the inverse, `length` for padding;
    continues (batch, count) bool: the chunk belongs to the document of the chunk before it (for the first chunk: of
    the carried state);
    last (batch,), filled (batch,): the chunk of the row's last token, and how many tokens it holds;
    offset (batch, length): tokens since the document's first one in this call;
    inside (batch, length) bool: the token's document begins in this call, after its row's first token.
    """

    length: int
    chunk: int
    count: int
    slot: Tensor | None = None
    token: Tensor | None = None
    continues: Tensor | None = None
    last: Tensor | None = None
    filled: Tensor | None = None
    offset: Tensor | None = None
    inside: Tensor | None = None

    def split(self, x: Tensor) -> Tensor:
        """(channel, batch, length) -> (channel, batch, count, chunk), zero-padded."""
        if self.slot is not None:
            x = permute(x, self.token, self.slot)
        elif self.count * self.chunk != self.length:
            x = F.pad(x, (0, self.count * self.chunk - self.length))
        return x.reshape(*x.shape[:2], self.count, self.chunk)

    def merge(self, x: Tensor) -> Tensor:
        """(channel, batch, count, chunk) -> (channel, batch, length): the inverse of `split`."""
        x = x.flatten(2)
        if self.slot is not None:
            return permute(x, self.slot, self.token)
        return x[..., : self.length]


class _Permute(torch.autograd.Function):
    """out[c, b, i] = x[c, b, forward[b, i]], zero where forward points past the end; backward by the inverse map.

    Both directions are gathers: autograd's own backward would be a scatter-add, slower and, on a GPU, not
    deterministic.
    """

    @staticmethod
    def forward(ctx, x: Tensor, forward_map: Tensor, inverse_map: Tensor) -> Tensor:
        ctx.save_for_backward(forward_map, inverse_map)
        return _gather(x, forward_map)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor):
        _, inverse_map = ctx.saved_tensors
        return _gather(grad, inverse_map), None, None


def permute(x: Tensor, forward_map: Tensor | None, inverse_map: Tensor | None) -> Tensor:
    """(channel, batch, n) -> (channel, batch, m) by maps (batch, m) and (batch, n), each the other's inverse; an index
    at or past the end stands for zero."""
    result = _Permute.apply(x, forward_map, inverse_map)
    assert isinstance(result, Tensor)
    return result


def _gather(x: Tensor, index: Tensor) -> Tensor:
    channels, batch, length = x.shape
    outside = index >= length
    rows = torch.arange(batch, device=x.device)[:, None] * length
    flat = (rows + index.clamp(max=length - 1)).flatten()
    out = x.reshape(channels, batch * length).index_select(1, flat)
    if bool(outside.any()):
        out.masked_fill_(outside.flatten(), 0)
    return out.view(channels, batch, index.shape[1])


def plain_segments(length: int, chunk: int = CHUNK) -> Segments:
    """One document a row: chunks from the row's start."""
    chunk = min(chunk, max(1, 1 << (length - 1).bit_length()))
    return Segments(length, chunk, -(-length // chunk))


def cut(length: int, document_ids: Tensor | None, carried_document: Tensor | None) -> Segments:
    """Plan the chunks of a call.

    document_ids (batch, length) or None for one document a row (the one of the carried state, if any);
    carried_document (batch,) or None without a carried state. Reads the boundaries on the host: on a GPU this waits
    for the device, so callers that know there is one document pass None.
    """
    if document_ids is None:
        return plain_segments(length)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    if carried_document is not None:
        starts[:, 0] = document_ids[:, 0] != carried_document
    if not bool(starts[:, 1:].any()) and (carried_document is None or not bool(starts[:, 0].any())):
        return plain_segments(length)
    return _document_segments(starts, carried_document is not None)


def _document_segments(starts: Tensor, carried: bool) -> Segments:
    batch, length = starts.shape
    position = torch.arange(length, device=starts.device).expand(batch, length)
    first = torch.where(starts, position, 0).cummax(dim=1).values
    offset = position - first
    chunk, count = min(
        ((q, int((offset % q == 0).sum(1).max())) for q in SHORT_CHUNKS),
        # Work per padded token grows with the chunk (its triangle) and with the number of chunks (their states).
        key=lambda option: option[1] * (option[0] + 64) * option[0] + option[1] * 4096,
    )
    opens = offset % chunk == 0
    segment = opens.long().cumsum(1) - 1
    slot = segment * chunk + offset % chunk
    token = torch.full((batch, count * chunk), length, dtype=torch.long, device=starts.device)
    token.scatter_(1, slot, position)
    continues = torch.zeros(batch, count, dtype=torch.bool, device=starts.device)
    rows, columns = torch.nonzero(opens, as_tuple=True)
    continues[rows, segment[rows, columns]] = ~starts[rows, columns]
    if not carried:
        continues[:, 0] = False
    last, filled = segment[:, -1], offset[:, -1] % chunk + 1
    return Segments(length, chunk, count, slot, token, continues, last, filled, offset, inside=first > 0)
