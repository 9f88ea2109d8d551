"""H3's shift convolution: a causal depthwise filter over windows that never hold two documents.

A depthwise convolution beats a Toeplitz GEMM here: 64 taps waste half of a 64 x 128 block, and torch's own weight
gradient of a depthwise convolution is an order of magnitude slower than asking for it as another convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diag_ssm.segments import Segments, permute
from ..once import differentiable_once

PIECE = 2048
"""Longest filter that the weight gradient's convolution is given; longer sequences are summed over pieces."""


class _DepthwiseFilter(torch.autograd.Function):
    """y[c, s, t] = sum_l taps[c, l] windows[c, s, t + N - 1 - l]: (channel, S, N - 1 + L) -> (channel, S, L)."""

    @staticmethod
    def forward(ctx, windows: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(windows, taps)
        return _correlate(windows, taps.flip(1))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor):
        windows, taps = ctx.saved_tensors
        reach = taps.shape[1] - 1
        grad_windows = _correlate(F.pad(grad, (reach, reach)), taps) if ctx.needs_input_grad[0] else None
        grad_taps = None
        if ctx.needs_input_grad[1]:
            length = grad.shape[2]
            parts = [
                _correlate(windows[:, :, t : t + PIECE + reach], grad[:, :, t : t + PIECE]).sum(1)
                for t in range(0, length, PIECE)
            ]
            grad_taps = sum(parts[1:], parts[0]).flip(1)
        return grad_windows, grad_taps


def _correlate(x: Tensor, weight: Tensor) -> Tensor:
    """Each row of x (channel, S, X) with its own filter, weight (channel, n) or (channel, S, n): -> (.., X - n + 1)."""
    channels, rows, length = x.shape
    if weight.dim() == 2:
        weight = weight[:, None].expand(channels, rows, weight.shape[1])
    filters = weight.reshape(channels * rows, 1, -1)
    out = F.conv1d(x.reshape(1, channels * rows, length), filters, groups=channels * rows)
    return out.view(channels, rows, -1)


def shift_conv(x: Tensor, taps: Tensor, segments: Segments, history: Tensor | None) -> Tensor:
    """y[t] = sum_l taps[l] x[t - l], never across a document: (channel, batch, L) -> the same shape.

    taps (channel, N), tap 0 the current token; history (channel, batch, N - 1), the tokens before the first, zero
    where they belong to another document. The rows are filtered as if they held one document each; the first N - 1
    tokens of every document that begins inside a row are then filtered again, alone, and replaced.
    """
    reach = taps.shape[1] - 1
    past = x.new_zeros(*x.shape[:2], reach) if history is None else history
    y = _filter(torch.cat([past, x], 2), taps)
    if segments.offset is None or segments.inside is None or reach == 0:
        return y
    again = (segments.inside & (segments.offset < reach)).flatten()
    documents = (segments.inside & (segments.offset == 0)).flatten().cumsum(0)
    count = int(documents[-1])
    if count == 0:
        return y
    # Each such token has one slot in the (document, reach) table and each slot at most one token.
    slot = torch.where(again, (documents - 1) * reach + segments.offset.flatten(), count * reach)
    token = torch.full((count * reach + 1,), again.numel(), device=x.device)
    token[slot] = torch.where(again, torch.arange(again.numel(), device=x.device), again.numel())
    slot, token = slot[None], token[None, :-1]
    heads = permute(x.flatten(1)[:, None], token, slot).unflatten(2, (count, reach))[:, 0]
    alone = permute(_filter(F.pad(heads, (reach, 0)), taps).flatten(1)[:, None], slot, token)
    return torch.where(again.view(x.shape[1:]), alone.view(x.shape), y)


def _filter(windows: Tensor, taps: Tensor) -> Tensor:
    result = _DepthwiseFilter.apply(windows, taps)
    assert isinstance(result, Tensor)
    return result


def next_history(x: Tensor, length: int, document_ids: Tensor | None, history: Tensor | None) -> Tensor:
    """The last `length` raw tokens of x (channel, batch, L), zero where they are not of the last token's document."""
    if document_ids is not None:
        same = (document_ids == document_ids[:, -1:]).flip(1).cummin(1).values.flip(1)
        recent = torch.where(same[None, :, -length:], x[:, :, -length:], 0) if length else x[:, :, :0]
        if history is not None:
            history = torch.where(same[:, 0][None, :, None], history, 0)
    else:
        # A copy: a slice would keep all of x alive with the state.
        recent = x[:, :, max(0, x.shape[2] - length) :].clone()
    missing = length - recent.shape[2]
    if missing <= 0:
        return recent
    past = x.new_zeros(*x.shape[:2], missing) if history is None else history[:, :, -missing:]
    return torch.cat([past, recent], 2)
