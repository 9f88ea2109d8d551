"""What the kernel tests share: one comparison that cannot pass on nothing, and parameters at honest scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels.diag_ssm import Diagonal

Close = Callable[..., None]


def _assert_close(got: Tensor, want: Tensor, tolerance: float, name: str = "value") -> None:
    """rms(got - want) <= tolerance * rms(want), and the reference is not so small that anything would pass."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert tolerance <= 0.1, f"{name}: a tolerance of {tolerance} would accept an output of zeros"
    got, want = got.detach().double(), want.detach().double()
    scale = want.square().mean().sqrt().item()
    assert scale > 1e-8, f"{name}: the reference is zero (rms {scale:.1e}), the comparison would prove nothing"
    error = (got - want).square().mean().sqrt().item() / scale
    assert error <= tolerance, f"{name}: relative rms error {error:.2e} above {tolerance:.0e}"


@pytest.fixture
def assert_close() -> Close:
    """assert_close(got, want, tolerance, name): relative rms error; shapes must agree, NaN fails."""
    return _assert_close


@pytest.fixture
def make_diagonal() -> Callable[..., tuple[Diagonal, Tensor]]:
    """make_diagonal(heads, modes, rule=..., dtype=..., stress=...) -> (Diagonal, d), every tensor a leaf with gradient.

    S4D-Lin's initial values with noise, so that no gradient is special; `stress` puts the step at both ends of its
    range, makes a mode almost undamped (|Abar|^64 close to 1) and C a hundred times larger.
    """

    def make(heads: int, modes: int, rule: str = "bilinear", dtype=torch.float64, stress: bool = False) -> Any:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        log_dt = torch.empty(heads, dtype=torch.float64).uniform_(-6.9, -2.3)
        log_a = torch.full((heads, modes), 0.5, dtype=torch.float64).log() + 0.1 * normal(heads, modes)
        c = normal(heads, modes, 2) * 0.7
        if stress:
            log_dt[0::2], log_dt[1::2] = -6.9, -2.3
            log_a[:, 0] = -9.0
            c = c * 100
        values = {
            "log_dt": log_dt,
            "log_a": log_a,
            "b": torch.pi * torch.arange(modes).double().expand(heads, modes) + 0.1 * normal(heads, modes),
            "B": torch.tensor([1.0, 0.0], dtype=torch.float64).expand(heads, modes, 2) + 0.1 * normal(heads, modes, 2),
            "C": c,
        }
        leaves = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
        return Diagonal(**leaves, rule=rule), normal(heads).to(dtype).requires_grad_()  # type: ignore[arg-type]

    return make
