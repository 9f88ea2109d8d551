"""The rotation of query and key channels as one elementwise kernel, forward and backward.

It reads each channel once and writes it once; torch's form makes six to eight passes over temporaries in fp32. Cosines
and sines come as tables, an angle costs one entry for all heads: made by torch, they are those of `rotary.rotate` to
the bit, at any position. The backward is the inverse rotation, the same kernel with the sines negated.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Configuration

ELEMENTS = 4096
"""Channels that one program turns of each head, in tiles of as many tokens as that makes."""
HEADS = 4
"""Heads that one program turns with the angles it has read."""
WARPS = 4


@triton.jit
def rotate_kernel(
    x, out, cos, sin, heads, length, tiles, groups,
    x_batch, x_head, x_token, x_channel, out_batch, out_head, out_token, out_channel, table_batch,
    PAIRS: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, REST_WIDE: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Turn PAIRS pairs of TOKENS tokens of HEADS heads; copy the REST channels behind them.

    x, out (batch, head, token, channel) of any strides, out may be x; cos, sin (batch or 1, token, PAIRS) fp32
    contiguous. WIDE, REST_WIDE: powers of two at or above PAIRS and REST; a REST of 0 copies nothing.
    """
    program = tl.program_id(0)
    group = program % groups
    tile = (program // groups) % tiles
    batch = (program // (groups * tiles)).to(tl.int64)
    token = tile.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < length
    pair = tl.arange(0, WIDE)
    table = batch * table_batch + token[:, None] * PAIRS + pair[None, :]
    some = inside[:, None] & (pair < PAIRS)[None, :]
    c = tl.load(cos + table, mask=some, other=0.0)
    s = tl.load(sin + table, mask=some, other=0.0)
    if INVERSE:
        s = -s
    for h in range(HEADS):
        head = (group * HEADS + h).to(tl.int64)
        from_ = x + batch * x_batch + head * x_head + token[:, None] * x_token
        to = out + batch * out_batch + head * out_head + token[:, None] * out_token
        present = inside[:, None] & (head < heads)
        if INTERLEAVED:
            # Both channels of a pair in one access, as wide as the halves of the other order would be.
            channel = tl.arange(0, 2 * WIDE)[None, :].to(tl.int64)
            both = present & (channel < 2 * PAIRS)
            values = tl.load(from_ + channel * x_channel, mask=both, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(values, (TOKENS, WIDE, 2)))
            turned = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (TOKENS, 2 * WIDE))
            tl.store(to + channel * out_channel, turned.to(out.dtype.element_ty), mask=both)
        else:
            first = pair[None, :].to(tl.int64)
            second = first + PAIRS
            each = present & (first < PAIRS)
            a = tl.load(from_ + first * x_channel, mask=each, other=0.0).to(tl.float32)
            b = tl.load(from_ + second * x_channel, mask=each, other=0.0).to(tl.float32)
            tl.store(to + first * out_channel, (a * c - b * s).to(out.dtype.element_ty), mask=each)
            tl.store(to + second * out_channel, (a * s + b * c).to(out.dtype.element_ty), mask=each)
        if REST > 0:
            behind = tl.arange(0, REST_WIDE)[None, :].to(tl.int64)
            left = present & (behind < REST)
            untouched = tl.load(from_ + (2 * PAIRS + behind) * x_channel, mask=left, other=0.0)
            tl.store(to + (2 * PAIRS + behind) * out_channel, untouched, mask=left)


_kernel: Any = rotate_kernel


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, interleaved: bool, inverse: bool = False) -> Tensor:
    """Write x (batch, head, length, dim) turned by the angles to out, which may be x, the same object; return out.

    cos, sin: (batch or 1, length, pairs) fp32, factors multiplied in; the `inverse` of a rotation, or the adjoint of
    one with factors. Not differentiable: see `rotate_by_table`.
    """
    batch, heads, length, dim = x.shape
    pairs = cos.shape[-1]
    if x.numel() == 0:
        return out
    assert cos.shape == sin.shape
    assert cos.shape[0] in (1, batch)
    assert cos.shape[1] == length
    assert 2 * pairs <= dim
    assert cos.dtype == sin.dtype == torch.float32
    in_place = out is x
    assert out.shape == x.shape
    assert not in_place or out.stride() == x.stride()
    cos, sin = cos.contiguous(), sin.contiguous()
    constants = _constants(pairs, 0 if in_place else dim - 2 * pairs)
    tiles, groups = -(-length // constants["TOKENS"]), -(-heads // HEADS)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _kernel[(batch * tiles * groups,)](
            x, out, cos, sin, heads, length, tiles, groups, *x.stride(), *out.stride(),
            0 if cos.shape[0] == 1 else length * pairs,
            **constants, INTERLEAVED=interleaved, INVERSE=inverse, num_warps=WARPS,
        )  # fmt: skip
    return out


def _constants(pairs: int, rest: int) -> dict[str, int]:
    wide, rest_wide = (1 << (max(size, 1) - 1).bit_length() for size in (pairs, rest))
    tokens = max(1, min(64, ELEMENTS // (2 * wide)))
    sizes = {"PAIRS": pairs, "WIDE": wide, "REST": rest, "REST_WIDE": rest_wide}
    return {**sizes, "TOKENS": tokens, "HEADS": HEADS}


class _Rotate(torch.autograd.Function):
    """The rotation; its backward is itself with the angles negated."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.inverse = interleaved, inverse
        return turn(x, cos, sin, torch.empty_like(x), interleaved=interleaved, inverse=inverse)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(gradients[0], cos, sin, ctx.interleaved, not ctx.inverse), None, None, None, None


def rotate_by_table(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`rotary.rotate` for fp32, fp16 and bf16 on a GPU: x (batch, head, length, dim) of any strides, kept in their
    order; cos, sin (batch or 1, length, pairs) fp32, which take no gradient. Arithmetic in fp32."""
    apply: Callable[..., Tensor] = _Rotate.apply
    return apply(x, cos, sin, interleaved, False)


def configurations() -> list[Configuration]:
    """Both orders of pairs at the usual head dimensions, and a partial rotation; no matrix products."""
    forms = [("bf16", pairs, 0, order) for pairs in (32, 64) for order in (False, True)]
    forms += [("bf16", 16, 48, False), ("fp32", 64, 0, False)]
    integers = ("heads", "length", "tiles", "groups", "table_batch")
    strides = tuple(f"{side}_{axis}" for side in ("x", "out") for axis in ("batch", "head", "token"))
    return [
        Configuration(
            f"rotary {'interleaved' if interleaved else 'halves'} {dtype} {2 * pairs}+{rest}",
            rotate_kernel,
            {"x": f"*{dtype}", "out": f"*{dtype}", "cos": "*fp32", "sin": "*fp32"}
            | dict.fromkeys((*integers, *strides), "i32"),
            {**_constants(pairs, rest), "INTERLEAVED": interleaved, "INVERSE": False, "x_channel": 1, "out_channel": 1},
            num_warps=WARPS,
            aligned=(*strides, "table_batch"),
            dtype="",
        )
        for dtype, pairs, rest, interleaved in forms
    ]
