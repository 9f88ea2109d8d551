"""The gated causal convolution as fused block FFTs on the GPU.

A transform of N = N1 x N2 points is two small matrix products and a multiplication (Bailey's four steps without the
transposition): with x reshaped to (N1, N2) in memory order,

    Y = F_N1 x,   Y *= exp(-2 pi i a b / N),   Z = Y F_N2,   Z[i, l] = frequency i + N1 l,

and nothing is ever put in order: the kernel's spectrum is stored in the order of Z, and the inverse is the mirror
image. Four savings: two rows of the batch travel as real and imaginary part of one transform (the kernel is real, so
the parts of the result are the two answers); the half of the rows of x that is zero padding is neither loaded nor
multiplied, and the half of the result that would be thrown away is not computed; 1/N is part of the kernel's spectrum;
and the gates, and the skip as an addition to tap 0, cost no pass over memory.

Sequences longer than a block of S = N/2 tokens are cut in blocks. Block j reaches block i by a Toeplitz matrix of the
2S - 1 lags around (i - j) S, which is a corner of a circulant matrix of N points, so that

    Y_i = sum_{p <= i} K_p X_{i-p},     y_i = first half of the inverse transform of Y_i,

with one transform for each input block (first launch) and one inverse for each output block (second launch). The
adjoint takes conj(K_p) and X_{i+p}; the gradient of K_p is the sum over rows and blocks of G_i conj(X_{i-p}).

fp32 is computed in fp32. fp16 and bf16 both multiply in fp16 on tensor cores, with block floating point: a tile is
divided by its largest value before each pair of products, so the exponent never matters and every rounding is that of
fp16 (5e-4, bf16: 4e-3). Sums, spectra and the products of spectra are fp32.

Everything is deterministic: there are no atomics.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl


@triton.jit
def _rows(start, pair, batch, length, stride_b, N1: tl.constexpr, N2: tl.constexpr) -> "Any":
    """Offsets and mask of a tile (N1, N2): S tokens of row 2 pair in its upper half, of row 2 pair + 1 in its lower."""
    a = tl.arange(0, N1)[:, None]
    row = pair * 2 + a // (N1 // 2)
    token = start + (a % (N1 // 2)) * N2 + tl.arange(0, N2)[None, :]
    return row.to(tl.int64) * stride_b + token, (token < length) & (row < batch)


@triton.jit
def _product(a, b, HALF: tl.constexpr) -> "Any":
    """The matrix product of two tiles, to fp32: on tensor cores after rounding to fp16, or in fp32 without them."""
    return tl.dot(a.to(tl.float16), b.to(tl.float16)) if HALF else tl.dot(a, b, input_precision="ieee")


@triton.jit
def _normalise(x, y, HALF: tl.constexpr) -> "Any":
    """(x / peak, y / peak, peak), peak the largest magnitude in both; for fp32 nothing is done."""
    peak = 1.0
    if HALF:
        # Between these bounds the reciprocal is a normal number; what lies above comes out as infinite or NaN.
        peak = tl.minimum(tl.maximum(tl.maximum(tl.max(tl.abs(x)), tl.max(tl.abs(y))), 1e-37), 1e37)
        x *= 1.0 / peak
        y *= 1.0 / peak
    return x, y, peak


@triton.jit
def _transform(x, tables, twiddles, N1: tl.constexpr, N2: tl.constexpr, HALF: tl.constexpr) -> "Any":
    """The spectrum (re, im), in the order of Z, of the two zero-padded rows in tile x."""
    i = tl.arange(0, N1)
    j = tl.arange(0, N2)
    outer = i[:, None] * N1 + i[None, :]
    inner = j[:, None] * N2 + j[None, :]
    grid = i[:, None] * N2 + j[None, :]
    x, _, peak = _normalise(x, x, HALF)  # pyright: ignore
    y_re = _product(tl.load(tables + outer), x, HALF)
    y_im = _product(tl.load(tables + N1 * N1 + outer), x, HALF)
    cos = tl.load(twiddles + grid)
    sin = tl.load(twiddles + N1 * N2 + grid)
    t_re = y_re * cos + y_im * sin
    t_im = y_im * cos - y_re * sin
    cos = tl.load(tables + 2 * N1 * N1 + inner)
    sin = tl.load(tables + 2 * N1 * N1 + N2 * N2 + inner)
    re = _product(t_re, cos, HALF) + _product(t_im, sin, HALF)
    im = _product(t_im, cos, HALF) + _product(-t_re, sin, HALF)  # A sum accumulates in place, a difference does not.
    return re * peak, im * peak


@triton.jit
def _inverse(re, im, tables, twiddles, N1: tl.constexpr, N2: tl.constexpr, HALF: tl.constexpr) -> "Any":
    """The two rows, first half of the N points, of a spectrum in the order of Z; without the division by N."""
    i = tl.arange(0, N1)
    j = tl.arange(0, N2)
    outer = i[:, None] + i[None, :] * N1
    inner = j[:, None] * N2 + j[None, :]
    grid = i[:, None] * N2 + j[None, :]
    re, im, peak = _normalise(re, im, HALF)  # pyright: ignore
    cos = tl.load(tables + 2 * N1 * N1 + inner)
    sin = tl.load(tables + 2 * N1 * N1 + N2 * N2 + inner)
    v_re = _product(re, cos, HALF) + _product(-im, sin, HALF)
    v_im = _product(im, cos, HALF) + _product(re, sin, HALF)
    cos = tl.load(twiddles + grid)
    sin = tl.load(twiddles + N1 * N2 + grid)
    t_re = v_re * cos - v_im * sin
    t_im = v_im * cos + v_re * sin
    upper = tl.load(tables + outer)
    lower = tl.load(tables + N1 * N1 + outer)
    return (_product(upper, t_re, HALF) + _product(lower, t_im, HALF)) * peak


@triton.jit
def _load(x, gate, offsets, inside, GATED: tl.constexpr) -> "Any":
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        value *= tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32)
    return value


SIZES = ("batch", "length", "pairs", "blocks", "parts", "channels", "group", "stride_b", "stride_c")
"""Numbers to the compiler, whatever their value: one form of a kernel serves them all."""


@triton.jit
def _known(number, ALIGNED: tl.constexpr) -> "Any":
    """The number, with the knowledge that it is a multiple of 16 where that is so: loads are in whole vectors then."""
    return number // 16 * 16 if ALIGNED else number


def _sized(kernel: Any) -> Any:
    names = inspect.signature(kernel).parameters
    return triton.jit(do_not_specialize=[name for name in SIZES if name in names])(kernel)


@_sized
def long_conv_transform_kernel(
    x, gate, spectra, tables, twiddles, batch, length, pairs, blocks, stride_b, stride_c,
    GATED: tl.constexpr, ALIGNED: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program: the spectrum of one block of two rows, to spectra (channel, pair, block, 2, N)."""
    length, stride_b, stride_c = _known(length, ALIGNED), _known(stride_b, ALIGNED), _known(stride_c, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    block = (program % blocks).to(tl.int32)
    pair = (program // blocks % pairs).to(tl.int32)
    channel = program // blocks // pairs
    offsets, inside = _rows(block * (N1 * N2 // 2), pair, batch, length, stride_b, N1, N2)  # pyright: ignore
    value = _load(x, gate, channel * stride_c + offsets, inside, GATED)
    re, im = _transform(value, tables, twiddles, N1, N2, HALF)
    grid = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tl.store(spectra + program * (2 * N1 * N2) + grid, re)
    tl.store(spectra + program * (2 * N1 * N2) + N1 * N2 + grid, im)


@_sized
def long_conv_kernel(
    x, gate, spectra, weights, out_gate, out, second_gate, second, tables, twiddles,
    batch, length, pairs, blocks, parts, stride_b, stride_c,
    GATED: tl.constexpr, OUT_GATED: tl.constexpr, SECOND: tl.constexpr, SPLIT: tl.constexpr, ADJOINT: tl.constexpr,
    ALIGNED: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program: one block of two rows of out = out_gate * (kernel convolved with gate * x), or its adjoint.

    weights (channel, parts, 2, N) is the kernel's spectrum, part p for the lags around p blocks. With SPLIT the blocks'
    spectra are read from `spectra`, else the only block is transformed here. SECOND writes a second product,
    second = second_gate * convolution: a backward pass wants the gradients of both factors of its input.
    """
    length, stride_b, stride_c = _known(length, ALIGNED), _known(stride_b, ALIGNED), _known(stride_c, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    block = (program % blocks).to(tl.int32)
    pair = (program // blocks % pairs).to(tl.int32)
    channel = program // blocks // pairs
    points: tl.constexpr = N1 * N2
    grid = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    offsets, inside = _rows(block * (points // 2), pair, batch, length, stride_b, N1, N2)  # pyright: ignore
    offsets += channel * stride_c
    weights += channel * parts * (2 * points)
    if SPLIT:
        spectra += program * (2 * points)
        step = 2 * points if ADJOINT else -2 * points
        re = tl.zeros([N1, N2], tl.float32)
        im = tl.zeros([N1, N2], tl.float32)
        for _ in range(0, tl.minimum(blocks - block if ADJOINT else block + 1, parts)):
            k_re = tl.load(weights + grid)
            k_im = tl.load(weights + points + grid)
            x_re = tl.load(spectra + grid)
            x_im = tl.load(spectra + points + grid)
            if ADJOINT:
                k_im = -k_im
            re += k_re * x_re - k_im * x_im
            im += k_re * x_im + k_im * x_re
            weights += 2 * points
            spectra += step
    else:
        x_re, x_im = _transform(_load(x, gate, offsets, inside, GATED), tables, twiddles, N1, N2, HALF)
        k_re = tl.load(weights + grid)
        k_im = tl.load(weights + points + grid)
        if ADJOINT:
            k_im = -k_im
        re = k_re * x_re - k_im * x_im
        im = k_re * x_im + k_im * x_re
    y = _inverse(re, im, tables, twiddles, N1, N2, HALF)
    if SECOND:
        factor = tl.load(second_gate + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(second + offsets, (y * factor).to(second.dtype.element_ty), mask=inside)
    if OUT_GATED:
        y *= tl.load(out_gate + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=inside)


@_sized
def long_conv_weight_gradient_kernel(
    x, gate, grad, grad_gate, out, tables, twiddles,
    batch, length, channels, pairs, group, stride_b, stride_c,
    GATED: tl.constexpr, GRAD_GATED: tl.constexpr, ALIGNED: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of one channel's only part, summed over `group` pairs of rows, in order.

    out (groups, channel, 2, N): sum of G conj(X); the groups are added by the caller.
    """
    length, stride_b, stride_c = _known(length, ALIGNED), _known(stride_b, ALIGNED), _known(stride_c, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    channel = program % channels
    first = (program // channels).to(tl.int32) * group
    points: tl.constexpr = N1 * N2
    re = tl.zeros([N1, N2], tl.float32)
    im = tl.zeros([N1, N2], tl.float32)
    for pair in range(first, tl.minimum(first + group, pairs)):
        offsets, inside = _rows(0, pair, batch, length, stride_b, N1, N2)
        offsets += channel * stride_c
        x_re, x_im = _transform(_load(x, gate, offsets, inside, GATED), tables, twiddles, N1, N2, HALF)
        value = _load(grad, grad_gate, offsets, inside, GRAD_GATED)
        g_re, g_im = _transform(value, tables, twiddles, N1, N2, HALF)
        re += g_re * x_re + g_im * x_im
        im += g_im * x_re - g_re * x_im
    grid = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tl.store(out + program * (2 * points) + grid, re)
    tl.store(out + program * (2 * points) + points + grid, im)


@_sized
def long_conv_correlate_kernel(
    x_spectra, grad_spectra, out, channels, pairs, blocks, parts, group, POINTS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """One program: TILE frequencies of the gradient of one channel's part p, from the spectra of all blocks.

    out (groups, channel, parts, 2, N): sum over `group` pairs of rows and the blocks i >= p of G_i conj(X_{i-p}).
    """
    program = tl.program_id(0).to(tl.int64)
    slices: tl.constexpr = POINTS // TILE
    frequency = (program % slices) * TILE + tl.arange(0, TILE)
    part = (program // slices % parts).to(tl.int32)
    channel = program // slices // parts % channels
    first = (program // slices // parts // channels).to(tl.int32) * group
    re = tl.zeros([TILE], tl.float32)
    im = tl.zeros([TILE], tl.float32)
    for pair in range(first, tl.minimum(first + group, pairs)):
        at_x = (channel * pairs + pair) * blocks * (2 * POINTS)
        at_g = at_x + part.to(tl.int64) * (2 * POINTS)
        for _ in range(part, blocks):
            g_re = tl.load(grad_spectra + at_g + frequency)
            g_im = tl.load(grad_spectra + at_g + POINTS + frequency)
            x_re = tl.load(x_spectra + at_x + frequency)
            x_im = tl.load(x_spectra + at_x + POINTS + frequency)
            re += g_re * x_re + g_im * x_im
            im += g_im * x_re - g_re * x_im
            at_x += 2 * POINTS
            at_g += 2 * POINTS
    out += program // slices * (2 * POINTS) + frequency
    tl.store(out, re)
    tl.store(out + POINTS, im)


@dataclass(frozen=True)
class Config:
    """A transform of n1 x n2 points by `warps` warps; a block is half as many tokens."""

    n1: int
    n2: int
    warps: int
    half: bool

    @property
    def points(self) -> int:
        return self.n1 * self.n2

    @property
    def block(self) -> int:
        return self.points // 2


CONFIGS = {
    True: (Config(64, 16, 4, True), Config(64, 32, 4, True), Config(128, 32, 8, True)),
    False: (Config(32, 16, 4, False), Config(32, 32, 8, False)),
}
"""16-bit and fp32 inputs. None spills a register on Hopper, the largest 8 to 16 bytes on Ampere where the length is not
a multiple of 16; larger ones do: fp32 64 x 32 328 bytes forward, and 128 x 64 none forward (248 registers) but 772 in
the kernel gradient. 64 rows, because Hopper's wgmma has no fewer."""

CORRELATE_TILE = 1024
"""Frequencies per program of the correlation of stored spectra."""
