"""What `scan_backward` launches, for compilation ahead of time."""

import torch

from ..aot import Configuration
from .segments import CHUNK
from .triton_backward import DOT, adjoint_kernel, choose_config, scan_backward_kernel

NAMES = ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32"))


def configurations() -> list[Configuration]:
    """The mixer's and the plain SSM's backward for H3's 32 modes in every dtype, with and without documents, and for
    16 and 64 modes in bf16; with everything at once (documents, a carried state and its gradient, segments); the
    adjoints of segments."""
    found = []
    for dtype, name in NAMES:
        for documents in (False, True):
            found += [_backward(dtype, name, 32, mix, documents) for mix in (True, False)]
            found.append(_adjoint(dtype, name, documents))
        found.append(_backward(dtype, name, 32, True, True, carried=True))
    for modes in (16, 64):
        found += [_backward(torch.bfloat16, "bf16", modes, True, documents) for documents in (False, True)]
    return found


def _backward(
    dtype: torch.dtype, name: str, modes: int, mix: bool, documents: bool, carried: bool = False
) -> Configuration:
    flags = {"SHIFT": mix, "GATE": mix, "DOCUMENTS": documents, "HISTORY": carried, "AFTER": carried, "FINAL": carried}
    title = (
        f"{'h3_mix' if mix else 'diag_ssm'} backward{' documents' if documents else ''}{' carried' if carried else ''}"
    )
    return _make(scan_backward_kernel, title, dtype, name, modes, flags | {"OPERATORS": True})


def _adjoint(dtype: torch.dtype, name: str, documents: bool) -> Configuration:
    flags = {"GATE": True, "DOCUMENTS": documents, "FINAL": False}
    return _make(adjoint_kernel, f"h3_mix adjoint{' documents' if documents else ''}", dtype, name, 32, flags)


def _make(kernel, title: str, dtype: torch.dtype, name: str, modes: int, flags: dict) -> Configuration:
    config = choose_config(dtype, modes)
    constants = {"Q": CHUNK, "NB": config.columns, "M": modes, "DOT": DOT[dtype], **flags}
    types = dict.fromkeys(("Q_", "K_", "V_", "GRAD_", "DQ_", "DK_", "DV_"), f"*{name}")
    types |= {"RELATIVE_": "*i8", "CONTINUES_": "*i8", "MOST_": "*i32"}
    signature = {n: types.get(n, "*fp32" if n.endswith("_") else "i32") for n in kernel.arg_names if n not in constants}
    suffix = "" if modes == 32 else f" M{modes}"
    return Configuration(
        f"{title} {name} {config.columns}x{config.warps}{suffix}",
        kernel,
        signature,
        constants,
        num_warps=config.warps,
        num_stages=config.stages,
        aligned=("length",),
        dtype=name,
    )
