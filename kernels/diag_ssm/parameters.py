"""Parameters, discretisation and carried state of a diagonal state-space model."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Diagonal:
    """Continuous-time parameters of H independent diagonal SSMs with M conjugate pairs of modes (M = N / 2).

    Mode n of channel h has A = -exp(log_a) + i b, step dt = exp(log_dt); complex numbers are real pairs [re, im].

    Shapes: log_dt (H), log_a (H, M), b (H, M), B (H, M, 2), C (H, M, 2). Real dtype, fp32 or fp64.
    rule: "bilinear" (H3's default) or "zoh" (S4D's default).
    Source: S4D (Gu et al. 2022, section 3), H3 (Fu et al. 2022, section 3).
    """

    log_dt: Tensor
    log_a: Tensor
    b: Tensor
    B: Tensor
    C: Tensor
    rule: Literal["bilinear", "zoh"] = "bilinear"

    def __post_init__(self) -> None:
        if self.rule not in ("bilinear", "zoh"):
            raise ValueError(f"Diagonal: rule={self.rule!r} is unknown; choose 'bilinear' or 'zoh'")
        if self.log_a.dim() != 2:
            raise ValueError(f"Diagonal: log_a must be (H, M), got {tuple(self.log_a.shape)}")
        channels, modes = self.log_a.shape
        expected = {"log_dt": (channels,), "b": (channels, modes), "B": (channels, modes, 2), "C": (channels, modes, 2)}
        for name, shape in expected.items():
            got = tuple(getattr(self, name).shape)
            if got != shape:
                raise ValueError(f"Diagonal: {name} has shape {got}, but log_a {(channels, modes)} asks for {shape}")

    @property
    def channels(self) -> int:
        return self.log_a.shape[0]

    @property
    def modes(self) -> int:
        return self.log_a.shape[1]


@dataclass(frozen=True)
class DiagState:
    """What the next call needs: `modes` (batch, channel, M, 2) and `document` (batch,).

    `modes` is fp32 (fp64 for fp64 inputs); `document` is the id of the last token seen, in the ids' own integer dtype,
    so that a later call or step resets where the document changes.
    """

    modes: Tensor
    document: Tensor


pytree.register_dataclass(DiagState)


def discretise(diag: Diagonal) -> tuple[Tensor, Tensor, Tensor]:
    """(Abar, Bbar, C), each (H, M) complex128, differentiable.

    Double precision whatever the parameters' dtype: these are H x M numbers, and a relative error e in Abar becomes
    l * e in the kernel's tap l.
    """
    dt = diag.log_dt.double().exp()[:, None]
    a = torch.complex(-diag.log_a.double().exp(), diag.b.double())
    b = torch.view_as_complex(diag.B.double().contiguous())
    c = torch.view_as_complex(diag.C.double().contiguous())
    if diag.rule == "bilinear":
        denominator = 1 - a * (dt / 2)
        return (1 + a * (dt / 2)) / denominator, b * dt / denominator, c
    a_bar = torch.exp(a * dt)
    return a_bar, b * (a_bar - 1) / a, c


def compute_dtype(inputs: Tensor) -> torch.dtype:
    """SSM arithmetic is fp32, or fp64 for fp64 inputs; never half precision."""
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32
