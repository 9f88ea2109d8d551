"""Documents inside rows, as the fused kernel wants them: computed on the device, without a word to the host.

A chunk's operators are shared by all its columns, so a boundary inside a chunk is handled by masks: the tokens of a
chunk carry their document's number counted from the chunk's first token, and the kernel goes through the numbers that
occur. Nearly all chunks of ordinary text hold one document or two.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Chunks(NamedTuple):
    """Where documents begin in (batch, length) tokens cut into chunks, and these into super-chunks.

    relative (batch, length) int8: documents that began in the token's chunk after its first token, up to the token;
    continues (batch, chunks) int8: 1 where a chunk's first token belongs to the document of the token before it (for
    the first chunk: of the carried state);
    most (batch, supers) int32: the highest relative number in each super-chunk;
    unbroken (batch, chunks) bool: no document begins in the chunk, so that the state passes through it.
    """

    relative: Tensor
    continues: Tensor
    most: Tensor
    unbroken: Tensor


def find_chunks(document_ids: Tensor, carried_document: Tensor | None, chunk: int, columns: int) -> Chunks:
    """Find the documents of a call in chunks of `chunk` tokens and super-chunks of `columns` chunks.

    document_ids (batch, length); carried_document (batch,): the document of the carried state, None without one.
    """
    batch, length = document_ids.shape
    starts = torch.zeros_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    if carried_document is not None:
        starts[:, 0] = document_ids[:, 0] != carried_document
    supers = -(-length // (chunk * columns))
    starts = F.pad(starts, (0, supers * columns * chunk - length)).view(batch, supers * columns, chunk)
    inner = starts.to(torch.int8)
    inner[:, :, 0] = 0
    relative = inner.cumsum(2, dtype=torch.int8)
    most = relative[:, :, -1].view(batch, supers, columns).amax(2).to(torch.int32)
    chunks = -(-length // chunk)
    return Chunks(
        relative.flatten(1)[:, :length].contiguous(),
        (~starts[:, :chunks, 0]).to(torch.int8).contiguous(),
        most,
        ~starts[:, :chunks].any(2),
    )


def last_document_mask(document_ids: Tensor) -> Tensor:
    """(batch, length) bool: tokens of the document that each row ends in."""
    return (document_ids == document_ids[:, -1:]).flip(1).cummin(1).values.flip(1)
