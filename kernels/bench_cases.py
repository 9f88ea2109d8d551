"""What the mixer is measured on, and the FFT form that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .diag_ssm import Diagonal
from .diag_ssm.chunked import power_table
from .diag_ssm.parameters import discretise
from .flash_conv import h3_mix
from .long_conv import long_conv

TAPS, MODES = 64, 32
DOCUMENT = 1000
"""Mean length of packed documents, about that of web text."""


@dataclass(frozen=True)
class Cell:
    """One shape: width channels, rows of `length` tokens; the mixer, or `long_conv` with both gates.

    documents: without ids, with ids but one document a row, or rows of documents of 1,000 tokens in the mean.
    """

    width: int
    length: int
    rows: int
    operation: str = "h3_mix"
    documents: Literal["", "one", "packed"] = ""

    @property
    def title(self) -> str:
        return f"{self.operation}, {self.documents}" if self.documents else self.operation

    @property
    def forms(self) -> tuple[str, ...]:
        """What it can be computed by: an FFT knows no documents, and is itself the torch form of `long_conv`."""
        if self.documents:
            return "triton", "chunked"
        return ("triton", "rfft", "chunked") if self.operation == "h3_mix" else ("triton", "rfft")

    @property
    def elements(self) -> int:
        return self.width * self.length * self.rows


@dataclass
class Problem:
    """Inputs of unit variance and S4D-Lin's initial parameters; every tensor in `leaves` takes a gradient."""

    leaves: dict[str, Tensor]
    grad: Tensor
    operation: str = "h3_mix"
    document_ids: Tensor | None = None

    @classmethod
    def draw(cls, cell: Cell, device: torch.device, dtype: torch.dtype) -> Problem:
        generator = torch.Generator(device=device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def sequence() -> Tensor:
            return normal(cell.width, cell.rows, cell.length).to(dtype).transpose(0, 1)

        width, uniform = cell.width, torch.rand(cell.width, generator=generator, device=device)
        frequencies = torch.pi * torch.arange(MODES, device=device).expand(width, MODES)
        leaves = {
            **{name: sequence() for name in "qkv"},
            "shift": normal(width, TAPS) / TAPS**0.5,
            "d_k": normal(width),
            "d": normal(width),
            "log_dt": uniform * 4.6 - 6.9,  # steps of 1e-3 to 1e-1
            "log_a": torch.full((width, MODES), -0.693, device=device),
            "b": frequencies.clone(),
            "B": torch.tensor([1.0, 0.0], device=device).expand(width, MODES, 2).clone(),
            "C": normal(width, MODES, 2) * 0.7,
        }
        if cell.operation == "long_conv":
            leaves = {name: leaves[name] for name in "qkv"} | {"kernel": normal(width, cell.length) / cell.length**0.5}
        grad, ids = sequence(), None
        if cell.documents:
            begins = torch.rand(cell.rows, cell.length, generator=generator, device=device) < 1 / DOCUMENT
            ids = (begins & (cell.documents == "packed")).cumsum(1).to(torch.int32)
        return cls({name: leaf.requires_grad_() for name, leaf in leaves.items()}, grad, cell.operation, ids)

    def form(self, name: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """The function of one form of the operation ("triton", "rfft" or "chunked"), and what takes a gradient.

        The torch form of `long_conv` is its real FFT.
        """
        if self.operation == "long_conv":
            return self.long_conv("torch" if name == "rfft" else name)
        return self.rfft() if name == "rfft" else self.mixer("torch" if name == "chunked" else name)

    def diagonal(self) -> Diagonal:
        at = self.leaves
        return Diagonal(at["log_dt"], at["log_a"], at["b"], at["B"], at["C"])

    def mixer(self, backend: Any) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """`h3_mix` from the parameters to the output, and what takes a gradient."""
        leaves = self.leaves

        def run() -> Tensor:
            q, k, v, shift = (leaves[name] for name in ("q", "k", "v", "shift"))
            rest = {"d_k": leaves["d_k"], "d": leaves["d"], "document_ids": self.document_ids}
            return h3_mix(q, k, v, shift, self.diagonal(), **rest, backend=backend)[0]

        return run, list(leaves.values())

    def long_conv(self, backend: Any) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """`long_conv` with both gates and a kernel of the sequence's length."""
        q, k, v, kernel = self.leaves.values()
        return lambda: long_conv(v, kernel, pre_gate=k, post_gate=q, backend=backend), [q, k, v, kernel]

    def rfft(self) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """The same by two real FFT convolutions in fp32, as H3's own reference path; the kernel is given, not made."""
        leaves = self.leaves
        length = leaves["q"].shape[-1]
        kernel = long_kernel(self.diagonal(), length).requires_grad_()

        def convolve(x: Tensor, taps: Tensor) -> Tensor:
            spectrum = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(taps, n=2 * length)[:, None]
            return torch.fft.irfft(spectrum, n=2 * length)[..., :length]

        def run() -> Tensor:
            q, k, v = (leaves[name].transpose(0, 1).float() for name in "qkv")
            kv = (convolve(k, leaves["shift"]) + leaves["d_k"][:, None, None] * k) * v
            y = q * (convolve(kv, kernel) + leaves["d"][:, None, None] * kv)
            return y.to(leaves["q"].dtype).transpose(0, 1)

        return run, [*(leaves[name] for name in ("q", "k", "v", "shift", "d_k", "d")), kernel]


@torch.no_grad()
def long_kernel(diag: Diagonal, length: int, chunk: int = 64) -> Tensor:
    """K[l] = 2 Re sum_n C_n Bbar_n Abar_n^l for l < length, (H, length) fp32, by chunks: a GEMM a channel."""
    a_bar, b_bar, c = discretise(diag)
    inner = power_table(a_bar, chunk, torch.float32)
    jump = a_bar.to(torch.complex128) ** chunk
    outer = power_table(jump, -(-length // chunk), torch.float32) * (2 * c * b_bar).to(inner.dtype)[:, None]
    real = torch.view_as_real(outer).flatten(-2) @ torch.view_as_real(inner.conj().resolve_conj()).flatten(-2).mT
    return real.flatten(1)[:, :length].contiguous()
