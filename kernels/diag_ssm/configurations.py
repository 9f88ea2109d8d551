"""Every form of the fused kernels that a launch can compile, for compilation ahead of time.

What makes a form: the flags of a call, the dtype of its inputs, the tile that its modes are padded to. Nothing else:
numbers are not specialised (`SIZES`), rows are a multiple of 16 tokens and addresses of 16 bytes (`even`, `aligned`).
`tests/kernels/triton/test_configurations.py` launches the public operations in all ways and finds each launch here.
"""

from collections.abc import Iterator
from typing import Any

import torch

from ..aot import Configuration
from . import triton as forward
from . import triton_backward as backward
from .fused import MOST_MODES, MOST_MODES_FP32

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TILES = (32, 64)
"""Of `padded_modes`."""
SEQUENCES = ("Q_", "K_", "V_", "Y_", "GRAD_", "DQ_", "DK_", "DV_")
NARROW = {"RELATIVE_": "*i8", "CONTINUES_": "*i8", "MOST_": "*i32"}
DOCUMENTS = ("RELATIVE_", "CONTINUES_", "MOST_")
assert TILES[-1] == MOST_MODES


def configurations() -> list[Configuration]:
    """The mixer and the plain SSM, each with documents and without: the forward pass with a carried shift filter and
    without, the states of segments alone, the backward pass with anything at its rows' borders and without, the
    adjoints of segments."""
    found = []
    for dtype in NAMES:
        for modes in TILES:
            if modes > MOST_MODES_FP32 and dtype == torch.float32:
                continue
            for documents in (False, True):
                for mix in (True, False):
                    found += _forms(dtype, modes, mix, documents)
    return found


def _forms(dtype: torch.dtype, modes: int, mix: bool, documents: bool) -> Iterator[Configuration]:
    block, columns = forward.choose_config(dtype, modes), backward.choose_config(dtype, modes)
    common = {"SHIFT": mix, "GATE": mix, "DOCUMENTS": documents}
    tile = {"CHUNK": forward.CHUNK, "COLUMNS": block.columns, "MODES": modes, "DOT": backward.DOT[dtype]}
    for carried in (False, True) if mix else (False,):
        for output in (True, False):
            flags = {**tile, **common, "HISTORY": carried, "OUTPUT": output}
            absent = () if carried else ("HISTORY_",)
            title = "forward" if output else "states"
            yield _make(forward.scan_fwd_kernel, title, dtype, modes, flags, absent, block, carried and "carried")
    tile = {"Q": forward.CHUNK, "NB": columns.columns, "M": modes, "DOT": backward.DOT[dtype]}
    for borders in (False, True):
        absent = () if borders else ("HISTORY_", "AFTER_", "FINAL_")
        absent += () if mix else ("HALO_", "DSHIFT_", "DQ_", "DK_")
        flags = {**tile, **common, "BORDERS": borders}
        kernel, more = backward.scan_backward_kernel, borders and "borders"
        yield _make(kernel, "backward", dtype, modes, flags, absent, columns, more)
    flags = {**tile, "GATE": mix, "DOCUMENTS": documents}
    yield _make(backward.adjoint_kernel, "adjoint", dtype, modes, flags, (), columns, False)


def _make(
    kernel: Any, title: str, dtype: torch.dtype, modes: int, flags: dict, absent: tuple, block: Any, more: str | bool
) -> Configuration:
    """`absent`: pointers that a launch gives None for, besides those that its flags say."""
    name = NAMES[dtype]
    if not flags["GATE"]:
        absent += ("Q_", "K_", "SHIFT_")
    if not flags["DOCUMENTS"]:
        absent += DOCUMENTS
    constants = flags | dict.fromkeys([n for n in kernel.arg_names if n in absent])
    types = NARROW | dict.fromkeys(SEQUENCES, f"*{name}")
    signature = {n: types.get(n, "*fp32" if n.endswith("_") else "i32") for n in kernel.arg_names if n not in constants}
    words = ("h3_mix" if flags["GATE"] else "diag_ssm", title, "documents" if flags["DOCUMENTS"] else "", more or "")
    words += (name, f"{block.columns}x{block.warps}", "" if modes == 32 else f"M{modes}")
    return Configuration(
        " ".join(str(word) for word in words if word),
        kernel,
        signature,
        constants,
        num_warps=block.warps,
        num_stages=block.stages,
        aligned=("length",),
        dtype=name,
    )
