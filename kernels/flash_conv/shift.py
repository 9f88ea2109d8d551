"""H3's shift convolution: a causal depthwise filter as chunk matrices, with its own short history as state."""

import torch
from torch import Tensor

from ..diag_ssm.chunked import toeplitz
from ..diag_ssm.segments import Segments


def shift_conv(x: Tensor, taps: Tensor, segments: Segments, history: Tensor | None) -> Tensor:
    """y[t] = sum_l taps[l] x[t - l], never across a document.

    x (channel, batch, C, Q) cut by `segments`; taps (channel, N), tap 0 the current token; history (channel, batch,
    N - 1), the tokens before the first, already zero where they belong to another document.
    One GEMM multiplies every chunk with the matrices of its own and of the following chunks' outputs.
    """
    channels, batch, count, chunk = x.shape
    reach = -(-(taps.shape[1] - 1) // chunk)
    # Block m is what a chunk adds to the chunk m places later.
    blocks = [toeplitz(taps, chunk, chunk, m * chunk).transpose(1, 2) for m in range(reach + 1)]
    needed = min(reach, count - 1) + 1
    products = torch.bmm(x.flatten(1, 2), torch.cat(blocks[:needed], 2)).unflatten(1, (batch, count))
    products = products.unflatten(3, (needed, chunk))
    y = products[:, :, :, 0]
    link = segments.continues
    for m in range(1, needed):
        part = products[:, :, :-m, m]
        if link is not None:
            # Chunk c continues chunk c - m only if every chunk between does.
            joined = torch.stack([link[:, m - i : count - i] for i in range(m)]).all(0)
            part = torch.where(joined[None, :, :, None], part, 0)
        y = torch.cat([y[:, :, :m], y[:, :, m:] + part], 2)
    if history is not None and reach:
        y = y + _from_history(history, blocks[1:], count, segments)
    return y


def _from_history(history: Tensor, blocks: list[Tensor], count: int, segments: Segments) -> Tensor:
    """What the carried tokens add to the first chunks: (channel, batch, C, Q)."""
    channels, batch, length = history.shape
    reach, chunk = len(blocks), blocks[0].shape[1]
    past = torch.nn.functional.pad(history, (reach * chunk - length, 0)).unflatten(2, (reach, chunk))
    out = []
    for c in range(min(reach, count)):
        # past[reach - 1 - j] lies j + 1 chunks before chunk 0.
        total = sum(torch.bmm(past[:, :, reach - m + c], blocks[m - 1]) for m in range(c + 1, reach + 1))
        assert isinstance(total, Tensor)
        if segments.continues is not None:
            total = torch.where(segments.continues[:, : c + 1].all(1)[None, :, None], total, 0)
        out.append(total)
    rest = history.new_zeros(channels, batch, count - len(out), chunk)
    return torch.cat([torch.stack(out, 2), rest], 2)


def next_history(x: Tensor, length: int, document_ids: Tensor | None, history: Tensor | None) -> Tensor:
    """The last `length` raw tokens of x (channel, batch, L), zero where they are not of the last token's document."""
    if document_ids is not None:
        same = (document_ids == document_ids[:, -1:]).flip(1).cummin(1).values.flip(1)
        recent = torch.where(same[None, :, -length:], x[:, :, -length:], 0) if length else x[:, :, :0]
        if history is not None:
            history = torch.where(same[:, 0][None, :, None], history, 0)
    else:
        recent = x[:, :, max(0, x.shape[2] - length) :]
    missing = length - recent.shape[2]
    if missing <= 0:
        return recent
    past = x.new_zeros(*x.shape[:2], missing) if history is None else history[:, :, -missing:]
    return torch.cat([past, recent], 2)
