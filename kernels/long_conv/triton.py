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

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rows(start, pair, batch, length, stride_b, N1: tl.constexpr, N2: tl.constexpr):
    """Offsets and mask of a tile (N1, N2): S tokens of row 2 pair in its upper half, of row 2 pair + 1 in its lower."""
    a = tl.arange(0, N1)[:, None]
    row = pair * 2 + a // (N1 // 2)
    token = start + (a % (N1 // 2)) * N2 + tl.arange(0, N2)[None, :]
    return row.to(tl.int64) * stride_b + token, (token < length) & (row < batch)


@triton.jit
def _product(a, b, HALF: tl.constexpr):
    """The matrix product of two tiles, to fp32: of fp16 roundings on tensor cores, or exact products without."""
    if HALF:
        c = tl.dot(a.to(tl.float16), b.to(tl.float16))
    else:
        c = tl.dot(a, b, input_precision="ieee")
    return c


@triton.jit
def _normalise(x, y, HALF: tl.constexpr):
    """(x / peak, y / peak, peak), peak the largest magnitude in both; for fp32 nothing is done."""
    peak = 1.0
    if HALF:
        peak = tl.maximum(tl.maximum(tl.max(tl.abs(x)), tl.max(tl.abs(y))), 1e-30)
        x = x / peak
        y = y / peak
    return x, y, peak


@triton.jit
def _transform(x, tables, twiddles, N1: tl.constexpr, N2: tl.constexpr, HALF: tl.constexpr):
    """The spectrum (re, im), in the order of Z, of the two zero-padded rows in tile x."""
    i = tl.arange(0, N1)
    j = tl.arange(0, N2)
    outer = i[:, None] * N1 + i[None, :]
    inner = j[:, None] * N2 + j[None, :]
    grid = i[:, None] * N2 + j[None, :]
    x, _, peak = _normalise(x, x, HALF)
    y_re = _product(tl.load(tables + outer), x, HALF)
    y_im = _product(tl.load(tables + N1 * N1 + outer), x, HALF)
    cos = tl.load(twiddles + grid)
    sin = tl.load(twiddles + N1 * N2 + grid)
    t_re = y_re * cos + y_im * sin
    t_im = y_im * cos - y_re * sin
    cos = tl.load(tables + 2 * N1 * N1 + inner)
    sin = tl.load(tables + 2 * N1 * N1 + N2 * N2 + inner)
    re = _product(t_re, cos, HALF) + _product(t_im, sin, HALF)
    im = _product(t_im, cos, HALF) - _product(t_re, sin, HALF)
    return re * peak, im * peak


@triton.jit
def _inverse(re, im, tables, twiddles, N1: tl.constexpr, N2: tl.constexpr, HALF: tl.constexpr):
    """The two rows, first half of the N points, of a spectrum in the order of Z; without the division by N."""
    i = tl.arange(0, N1)
    j = tl.arange(0, N2)
    outer = i[:, None] + i[None, :] * N1
    inner = j[:, None] * N2 + j[None, :]
    grid = i[:, None] * N2 + j[None, :]
    re, im, peak = _normalise(re, im, HALF)
    cos = tl.load(tables + 2 * N1 * N1 + inner)
    sin = tl.load(tables + 2 * N1 * N1 + N2 * N2 + inner)
    v_re = _product(re, cos, HALF) - _product(im, sin, HALF)
    v_im = _product(im, cos, HALF) + _product(re, sin, HALF)
    cos = tl.load(twiddles + grid)
    sin = tl.load(twiddles + N1 * N2 + grid)
    t_re = v_re * cos - v_im * sin
    t_im = v_im * cos + v_re * sin
    upper = tl.load(tables + outer)
    lower = tl.load(tables + N1 * N1 + outer)
    return (_product(upper, t_re, HALF) + _product(lower, t_im, HALF)) * peak


@triton.jit
def _load(x, gate, offsets, inside, GATED: tl.constexpr):
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        value *= tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def long_conv_transform_kernel(
    x, gate, spectra, tables, twiddles, batch, length, pairs, blocks, stride_b, stride_c,
    GATED: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program: the spectrum of one block of two rows, to spectra (channel, pair, block, 2, N)."""
    program = tl.program_id(0).to(tl.int64)
    block = (program % blocks).to(tl.int32)
    pair = (program // blocks % pairs).to(tl.int32)
    channel = program // blocks // pairs
    offsets, inside = _rows(block * (N1 * N2 // 2), pair, batch, length, stride_b, N1, N2)
    value = _load(x, gate, channel * stride_c + offsets, inside, GATED)
    re, im = _transform(value, tables, twiddles, N1, N2, HALF)
    grid = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tl.store(spectra + program * (2 * N1 * N2) + grid, re)
    tl.store(spectra + program * (2 * N1 * N2) + N1 * N2 + grid, im)


@triton.jit
def long_conv_kernel(
    x, gate, spectra, weights, out_gate, out, second_gate, second, tables, twiddles,
    batch, length, pairs, blocks, parts, stride_b, stride_c,
    GATED: tl.constexpr, OUT_GATED: tl.constexpr, SECOND: tl.constexpr, SPLIT: tl.constexpr, ADJOINT: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program: one block of two rows of out = out_gate * (kernel convolved with gate * x), or its adjoint.

    weights (channel, parts, 2, N) is the kernel's spectrum, part p for the lags around p blocks. With SPLIT the blocks'
    spectra are read from `spectra`, else the only block is transformed here. SECOND writes a second product,
    second = second_gate * convolution: a backward pass wants the gradients of both factors of its input.
    """
    program = tl.program_id(0).to(tl.int64)
    block = (program % blocks).to(tl.int32)
    pair = (program // blocks % pairs).to(tl.int32)
    channel = program // blocks // pairs
    points: tl.constexpr = N1 * N2
    grid = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    offsets, inside = _rows(block * (points // 2), pair, batch, length, stride_b, N1, N2)
    offsets += channel * stride_c
    weights += channel * parts * (2 * points)
    if SPLIT:
        spectra += program * (2 * points)
        step = 2 * points if ADJOINT else -2 * points
        re = tl.zeros([N1, N2], tl.float32)
        im = tl.zeros([N1, N2], tl.float32)
        for p in range(0, tl.minimum(blocks - block if ADJOINT else block + 1, parts)):
            k_re = tl.load(weights + p * (2 * points) + grid)
            k_im = tl.load(weights + p * (2 * points) + points + grid)
            x_re = tl.load(spectra + p * step + grid)
            x_im = tl.load(spectra + p * step + points + grid)
            if ADJOINT:
                k_im = -k_im
            re += k_re * x_re - k_im * x_im
            im += k_re * x_im + k_im * x_re
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


@triton.jit
def long_conv_weight_gradient_kernel(
    x, gate, grad, grad_gate, out, tables, twiddles,
    batch, length, channels, pairs, group, stride_b, stride_c,
    GATED: tl.constexpr, GRAD_GATED: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of one channel's only part, summed over `group` pairs of rows, in order.

    out (groups, channel, 2, N): sum of G conj(X); the groups are added by the caller.
    """
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


@triton.jit
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
        base = (channel * pairs + pair) * blocks * (2 * POINTS) + frequency
        for block in range(part, blocks):
            g_re = tl.load(grad_spectra + base + block * (2 * POINTS))
            g_im = tl.load(grad_spectra + base + block * (2 * POINTS) + POINTS)
            x_re = tl.load(x_spectra + base + (block - part) * (2 * POINTS))
            x_im = tl.load(x_spectra + base + (block - part) * (2 * POINTS) + POINTS)
            re += g_re * x_re + g_im * x_im
            im += g_im * x_re - g_re * x_im
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
"""16-bit and fp32 inputs. None of these spills a register; the next larger ones do (64 x 64: 8 bytes forward and 180
backward, fp32 64 x 32: 740). 64 rows because Hopper's wgmma has no fewer."""


class Plan:
    """How one call is cut: shapes, strides and the tables of its transform."""

    def __init__(self, u: Tensor, taps: int):
        self.batch, self.channels, self.length = u.shape
        self.half = u.dtype != torch.float32
        configs = CONFIGS[self.half]
        self.config = next((config for config in configs if self.length <= config.block), configs[-1])
        self.pairs = (self.batch + 1) // 2
        self.blocks = triton.cdiv(self.length, self.config.block)
        self.parts = min(self.blocks, (taps + self.config.block - 2) // self.config.block + 1)
        self.strides = u.stride()[:2]
        self.tables, self.twiddles = _tables(self.config, u.device)

    def spectra(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """(channel, pair, block, 2, N): the spectrum of each block of gate * x."""
        shape = (self.channels, self.pairs, self.blocks, 2, self.config.points)
        spectra = torch.empty(shape, dtype=torch.float32, device=x.device)
        long_conv_transform_kernel[(self.channels * self.pairs * self.blocks,)](
            x, x if gate is None else gate, spectra, self.tables, self.twiddles,
            self.batch, self.length, self.pairs, self.blocks, *self.strides,
            GATED=gate is not None, **self._constants(),
        )  # fmt: skip
        return spectra

    def convolve(
        self,
        weights: Tensor,
        x: Tensor,
        gate: Tensor | None,
        spectra: Tensor | None,
        out_gate: Tensor | None,
        second_gate: Tensor | None = None,
        *,
        adjoint: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """out_gate * c and second_gate * c, c the convolution (or its adjoint) of gate * x. Without a second gate the
        second tensor is the first. `spectra` of gate * x are needed where there is more than one block."""
        out = torch.empty_like(x)
        second = out if second_gate is None else torch.empty_like(x)
        long_conv_kernel[(self.channels * self.pairs * self.blocks,)](
            x, x if gate is None else gate, weights if spectra is None else spectra, weights,
            x if out_gate is None else out_gate, out, x if second_gate is None else second_gate, second,
            self.tables, self.twiddles,
            self.batch, self.length, self.pairs, self.blocks, self.parts, *self.strides,
            GATED=gate is not None, OUT_GATED=out_gate is not None, SECOND=second_gate is not None,
            SPLIT=spectra is not None, ADJOINT=adjoint, **self._constants(),
        )  # fmt: skip
        return out, second

    def weight_gradient(self, x: Tensor, gate: Tensor | None, grad: Tensor, grad_gate: Tensor | None) -> Tensor:
        """(channel, 1, 2, N): gradient of the spectrum where one block is the whole sequence."""
        groups, group = self._groups(self.channels)
        out = torch.empty((groups, self.channels, 1, 2, self.config.points), dtype=torch.float32, device=x.device)
        long_conv_weight_gradient_kernel[(groups * self.channels,)](
            x, x if gate is None else gate, grad, x if grad_gate is None else grad_gate, out,
            self.tables, self.twiddles,
            self.batch, self.length, self.channels, self.pairs, group, *self.strides,
            GATED=gate is not None, GRAD_GATED=grad_gate is not None, **self._constants(),
        )  # fmt: skip
        return out.sum(0)

    def correlate(self, x_spectra: Tensor, grad_spectra: Tensor) -> Tensor:
        """(channel, parts, 2, N): gradient of the kernel's spectrum from the blocks' spectra."""
        points = self.config.points
        tile = min(points, CORRELATE_TILE)
        programs = self.channels * self.parts * (points // tile)
        groups, group = self._groups(programs)
        shape = (groups, self.channels, self.parts, 2, points)
        out = torch.empty(shape, dtype=torch.float32, device=x_spectra.device)
        long_conv_correlate_kernel[(groups * programs,)](
            x_spectra, grad_spectra, out, self.channels, self.pairs, self.blocks, self.parts, group,
            POINTS=points, TILE=tile, num_warps=4,
        )  # fmt: skip
        return out.sum(0)

    def weights(self, taps: Tensor) -> Tensor:
        """(channel, parts, 2, N): spectra, over N, of the kernel (channel, taps) fp32 in the order of the transforms.

        Part p is the circulant of the lags p S - S + 1 ... p S + S - 1: lag p S + m at m, negative m from the end.
        """
        block, parts, channels = self.config.block, self.parts, taps.shape[0]
        lags = torch.nn.functional.pad(taps, (block, parts * block - taps.shape[1]))
        ahead, behind = lags[:, block:], lags[:, :-block]
        circulant = torch.stack([ahead.view(channels, parts, block), behind.view(channels, parts, block)], 2)
        spectrum = torch.fft.fft(circulant.flatten(2), norm="forward")
        spectrum = spectrum.view(channels, parts, self.config.n2, self.config.n1).transpose(2, 3)
        return torch.view_as_real(spectrum).permute(0, 1, 4, 2, 3).contiguous()

    def taps(self, gradient: Tensor, taps: int) -> Tensor:
        """(channel, taps): the adjoint of `weights`."""
        block, parts, channels = self.config.block, self.parts, gradient.shape[0]
        parted = gradient.view(channels, parts, 2, self.config.n1, self.config.n2).permute(0, 1, 4, 3, 2).contiguous()
        circulant = torch.fft.ifft(torch.view_as_complex(parted).flatten(2)).real
        lags = circulant.new_zeros(channels, (parts + 1) * block)
        lags[:, block:] = circulant[..., :block].reshape(channels, -1)
        lags[:, :-block] += circulant[..., block:].reshape(channels, -1)
        return lags[:, block : block + taps].contiguous()

    def _constants(self) -> dict[str, Any]:
        config = self.config
        return {"N1": config.n1, "N2": config.n2, "HALF": config.half, "num_warps": config.warps}

    def _groups(self, programs: int) -> tuple[int, int]:
        """Groups of rows, so that there are programs enough for a GPU, and the pairs of rows in each."""
        group = triton.cdiv(self.pairs, min(self.pairs, triton.cdiv(ENOUGH_PROGRAMS, programs)))
        return triton.cdiv(self.pairs, group), group


CORRELATE_TILE = 1024
ENOUGH_PROGRAMS = 1024


@lru_cache(maxsize=32)
def _tables(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """The matrices of the two products (fp16 or fp32) and the twiddles (fp32); cos and sin in each, from fp64.

    The first matrix acts on the two rows of the batch, one above the other: [cos | sin] gives the real part of the
    transform of row 0 + i row 1, [-sin | cos] the imaginary; transposed they do the inverse.
    """

    def angles(rows: int, columns: int, points: int) -> Tensor:
        turns = torch.arange(rows)[:, None] * torch.arange(columns)[None, :] % points
        return turns.double() * (2 * torch.pi / points)

    first = angles(config.n1, config.n1 // 2, config.n1)
    second = angles(config.n2, config.n2, config.n2)
    twiddle = angles(config.n1, config.n2, config.points)
    matrices = (
        torch.cat([first.cos(), first.sin()], 1),
        torch.cat([-first.sin(), first.cos()], 1),
        second.cos(),
        second.sin(),
    )
    table = torch.cat([matrix.flatten() for matrix in matrices])
    twiddles = torch.stack([twiddle.cos(), twiddle.sin()])
    return table.to(device, torch.float16 if config.half else torch.float32), twiddles.to(device, torch.float32)


def forward(u: Tensor, taps: Tensor, pre_gate: Tensor | None, post_gate: Tensor | None) -> Tensor:
    """y = post_gate * causal_conv(pre_gate * u, taps).

    u and the gates: (batch, channel, length) of one dtype (fp32, fp16, bf16) and one memory order, the length
    contiguous; taps: (channel, taps) fp32, no more than the length. Returns u's shape, dtype and order.
    """
    with _device(u):
        plan = Plan(u, taps.shape[1])
        spectra = plan.spectra(u, pre_gate) if plan.blocks > 1 else None
        return plan.convolve(plan.weights(taps), u, pre_gate, spectra, post_gate)[0]


def backward(
    grad: Tensor,
    u: Tensor,
    taps: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    *,
    inputs: bool,
    kernel: bool,
    gate: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of u, taps, pre_gate and post_gate, those asked for: `inputs` (u and pre_gate), `kernel`, `gate`.

    Arguments as `forward`; grad like u. Nothing but the inputs is kept from the forward pass. One launch each for the
    inputs, the kernel and post_gate; with more than one block (or in fp32) two more, for the spectra that they share.
    """
    with _device(u):
        plan = Plan(u, taps.shape[1])
        weights = plan.weights(taps)
        split = plan.blocks > 1
        stored = kernel and (split or not plan.half)
        x_spectra = plan.spectra(u, pre_gate) if stored or (gate and split) else None
        grad_spectra = plan.spectra(grad, post_gate) if stored or (inputs and split) else None
        grad_u = grad_taps = grad_pre = grad_post = None
        if inputs:
            second = None if pre_gate is None else u
            grad_u, grad_pre = plan.convolve(
                weights, grad, post_gate, grad_spectra, pre_gate, second, adjoint=True
            )
        if kernel:
            if x_spectra is not None and grad_spectra is not None:
                gradient = plan.correlate(x_spectra, grad_spectra)
            else:
                gradient = plan.weight_gradient(u, pre_gate, grad, post_gate)
            grad_taps = plan.taps(gradient, taps.shape[1])
        if gate:
            grad_post = plan.convolve(weights, u, pre_gate, x_spectra, grad)[0]
        return grad_u, grad_taps, grad_pre if pre_gate is not None else None, grad_post


def _device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
