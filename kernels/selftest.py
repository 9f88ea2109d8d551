"""A small comparison of the fused mixer with its definition, for an installed package, which has no tests.

    TRITON_INTERPRET=1 python -m potamos.kernels.selftest        in Triton's interpreter
    TRITON_INTERPRET=0 python -m potamos.kernels.selftest        compiled, on this machine's GPU

A checkout has far more: tests/kernels/triton.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from .bench_cases import Cell, Problem
from .flash_conv.reference import h3_mix_reference

LENGTHS = (65, 1134)
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5


def difference(got: Tensor, want: Tensor) -> float:
    """Relative rms error; infinite where `got` is not finite."""
    error = (got.double() - want.double()).norm() / want.double().norm()
    return error.item() if torch.isfinite(error) else float("inf")


def compare(cell: Cell, device: torch.device) -> dict[str, float]:
    """Relative rms errors of the output and of every gradient, fp32 kernel against the recurrence in fp64."""
    problem = Problem.draw(cell, device, torch.float32)
    run, leaves = problem.mixer("triton")
    y = run()
    wide = Problem({name: x.detach().double().requires_grad_() for name, x in problem.leaves.items()}, problem.grad)
    at = wide.leaves
    inputs = (at["q"], at["k"], at["v"], at["shift"], wide.diagonal())
    want = h3_mix_reference(*inputs, d_k=at["d_k"], d=at["d"])[0]
    gradients = torch.autograd.grad(y, leaves, problem.grad)
    references = torch.autograd.grad(want, list(at.values()), problem.grad.double())
    errors = {"y": difference(y, want)}
    for name, got, reference in zip(at, gradients, references, strict=True):
        errors[f"d{name}"] = difference(got, reference)
    return errors


def failures(errors: dict[str, float]) -> list[str]:
    """Those above their tolerance: 1e-6 for the output, 1e-5 for gradients."""
    bound = {"y": FORWARD_TOLERANCE}
    return [name for name, error in errors.items() if not error <= bound.get(name, GRADIENT_TOLERANCE)]


def main() -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = torch.device("cpu" if interpreted else "cuda")
    torch.set_default_device(device)  # the definition makes its tensors there
    failed = False
    for length in LENGTHS:
        errors = compare(Cell(2, length, 2), device)
        wrong = failures(errors)
        failed |= bool(wrong)
        worst = max(errors.values())
        print(f"h3_mix, {length} tokens: {'FAILED ' + ', '.join(wrong) if wrong else 'ok'} (largest error {worst:.1e})")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
