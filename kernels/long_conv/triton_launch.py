"""Launching the kernels of `triton`: how a call is cut, the tables of its transform, forward and backward."""

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import triton as kernels
from .triton import CONFIGS, CORRELATE_TILE, Config

# Typed as anything: a decorated kernel takes a grid in brackets, which its signature does not say.
_convolve: Any = kernels.long_conv_kernel
_transform: Any = kernels.long_conv_transform_kernel
_weight_gradient: Any = kernels.long_conv_weight_gradient_kernel
_correlate: Any = kernels.long_conv_correlate_kernel

ENOUGH_PROGRAMS = 1024
"""Programs that fill a large GPU several times over: rows are summed in groups until there are about as many."""


class Plan:
    """How one call is cut: shapes, strides and the tables of its transform."""

    def __init__(self, u: Tensor, taps: int):
        self.batch, self.channels, self.length = u.shape
        self.half = u.dtype != torch.float32
        configs = CONFIGS[self.half]
        self.config = next((config for config in configs if self.length <= config.block), configs[-1])
        self.pairs = (self.batch + 1) // 2
        self.blocks = _ceil_div(self.length, self.config.block)
        self.parts = min(self.blocks, (taps + self.config.block - 2) // self.config.block + 1)
        self.strides = u.stride()[:2]
        self.aligned = all(number % 16 == 0 for number in (self.length, *self.strides))
        self.tables, self.twiddles = _tables(self.config, u.device)

    def spectra(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """(channel, pair, block, 2, N): the spectrum of each block of gate * x."""
        shape = (self.channels, self.pairs, self.blocks, 2, self.config.points)
        spectra = torch.empty(shape, dtype=torch.float32, device=x.device)
        _transform[(self.channels * self.pairs * self.blocks,)](
            x, x if gate is None else gate, spectra, self.tables, self.twiddles,
            self.batch, self.length, self.pairs, self.blocks, *self.strides,
            GATED=gate is not None, ALIGNED=self.aligned, **self._constants(),
        )  # fmt: skip
        return spectra

    def convolve(
        self,
        weights: Tensor,
        x: Tensor,
        gate: Tensor | None,
        spectra: Tensor | None,
        out_gate: Tensor | None,
        out: Tensor,
        second_gate: Tensor | None = None,
        second: Tensor | None = None,
        *,
        adjoint: bool = False,
    ) -> Tensor:
        """Write out_gate * c to `out` and second_gate * c to `second`, c the convolution (or its adjoint) of gate * x.

        `spectra` of gate * x are needed where there is more than one block. Returns `out`.
        """
        _convolve[(self.channels * self.pairs * self.blocks,)](
            x, x if gate is None else gate, weights if spectra is None else spectra, weights,
            x if out_gate is None else out_gate, out,
            x if second_gate is None else second_gate, out if second is None else second,
            self.tables, self.twiddles,
            self.batch, self.length, self.pairs, self.blocks, self.parts, *self.strides,
            GATED=gate is not None, OUT_GATED=out_gate is not None, SECOND=second_gate is not None,
            SPLIT=spectra is not None, ADJOINT=adjoint, ALIGNED=self.aligned, **self._constants(),
        )  # fmt: skip
        return out

    def weight_gradient(self, x: Tensor, gate: Tensor | None, grad: Tensor, grad_gate: Tensor | None) -> Tensor:
        """(channel, 1, 2, N): gradient of the spectrum where one block is the whole sequence."""
        groups, group = self._groups(self.channels)
        out = torch.empty((groups, self.channels, 1, 2, self.config.points), dtype=torch.float32, device=x.device)
        _weight_gradient[(groups * self.channels,)](
            x, x if gate is None else gate, grad, x if grad_gate is None else grad_gate, out,
            self.tables, self.twiddles,
            self.batch, self.length, self.channels, self.pairs, group, *self.strides,
            GATED=gate is not None, GRAD_GATED=grad_gate is not None, ALIGNED=self.aligned, **self._constants(),
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
        _correlate[(groups * programs,)](
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
        group = _ceil_div(self.pairs, min(self.pairs, _ceil_div(ENOUGH_PROGRAMS, programs)))
        return _ceil_div(self.pairs, group), group


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

    u and the gates: (batch, channel, length) fp32, fp16 or bf16, of one memory order with the length contiguous;
    taps: (channel, taps) fp32, no more than the length. Returns u's shape, dtype and order.
    """
    with _device(u):
        plan = Plan(u, taps.shape[1])
        spectra = plan.spectra(u, pre_gate) if plan.blocks > 1 else None
        return plan.convolve(plan.weights(taps), u, pre_gate, spectra, post_gate, torch.empty_like(u))


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
            second_gate, grad_pre = (None, None) if pre_gate is None else (u, torch.empty_like(pre_gate))
            into = (torch.empty_like(u), second_gate, grad_pre)
            spectra = grad_spectra if split else None
            grad_u = plan.convolve(weights, grad, post_gate, spectra, pre_gate, *into, adjoint=True)
        if kernel:
            if x_spectra is not None and grad_spectra is not None:
                gradient = plan.correlate(x_spectra, grad_spectra)
            else:
                gradient = plan.weight_gradient(u, pre_gate, grad, post_gate)
            grad_taps = plan.taps(gradient, taps.shape[1])
        if gate:
            assert post_gate is not None
            grad_post = plan.convolve(
                weights, u, pre_gate, x_spectra if split else None, grad, torch.empty_like(post_gate)
            )
        return grad_u, grad_taps, grad_pre, grad_post


def _device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
