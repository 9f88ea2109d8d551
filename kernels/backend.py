"""The choice of implementation shared by every operation: `auto | triton | torch`."""

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class BackendUnavailableError(ValueError):
    """The caller asked for an implementation that this version or this machine does not have."""


def resolve_backend(
    backend: str, operation: str, inputs: Tensor | None = None, *, obstacle: str | None = None
) -> Literal["torch", "triton"]:
    """Turn the caller's wish into the implementation that runs.

    inputs: the main input of an operation that has a Triton form; None for one that has not. obstacle: why the Triton
    form cannot take these arguments, in words that follow "backend='triton' ", or None.

    `auto` never fails: Triton on CUDA devices of compute capability 8.0 or more for fp32, fp16 and bf16, torch
    otherwise. A named backend is used or refused, never replaced silently; on the CPU "triton" means its interpreter.

    Raises:
        BackendUnavailableError: for "triton" where it cannot run, saying why.
        ValueError: for an unknown name.
    """
    if backend == "torch":
        return "torch"
    if backend not in ("auto", "triton"):
        raise ValueError(f"{operation}: unknown backend {backend!r}; choose 'auto', 'triton' or 'torch'")
    if inputs is None:
        obstacle = "is not available in this version"
    obstacle = obstacle or _machine_obstacle(inputs)
    if backend == "triton" and obstacle is not None:
        raise BackendUnavailableError(
            f"{operation}: backend='triton' {obstacle}; use backend='auto' or backend='torch'"
        )
    if obstacle is None and inputs is not None and (inputs.is_cuda or backend == "triton"):
        return "triton"
    return "torch"  # Also where only the interpreter could run: it is for tests.


def _machine_obstacle(inputs: Tensor | None) -> str | None:
    assert inputs is not None
    if inputs.dtype not in TRITON_DTYPES:
        return f"takes fp32, fp16 or bf16, not {inputs.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package, which is not installed"
    if not inputs.is_cuda:
        if inputs.device.type == "cpu" and interpreted():
            return None
        return f"needs a CUDA device, or TRITON_INTERPRET=1 on the CPU; the inputs are on {inputs.device}"
    if (found := capability(inputs.device)) < (8, 0):
        return f"needs compute capability 8.0, the device has {'.'.join(map(str, found))}"
    return None


def own_precision(inputs: Tensor) -> torch.autocast:
    """Turns autocast off: operations choose their precision, and autocast would round operators and states to bf16."""
    return torch.autocast(inputs.device.type, enabled=False)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter: decided by the environment when they are first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, in a call that `torch.compile` can trace."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor
