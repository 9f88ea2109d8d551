"""The tiles of the backward kernels, and what is compiled of them ahead of time.

Registers decide. A tile of dq keeps its sums, (queries x dim) fp32, and its scores; a tile of dk and dv keeps twice the
sums. What a mask, a bias and dropout need beside that makes tiles smaller step by step, so that on Hopper in 16 bits dq
spills nothing whatever the call asks for. Readings of ptxas; no speed has been measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..aot import Configuration
from .triton import Config, padded_dim
from .triton_backward_kernels import attention_dkv_kernel, attention_dq_kernel, delta_kernel
from .triton_bias_backward import attention_dtable_kernel, sum_rows_kernel
from .triton_tiles import TYPES

DQ = {
    64: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
    128: (Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 16, 8, 2)),
    256: (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 16, 8, 2), Config(64, 16, 8, 2)),
}
"""Padded head dimension -> the tiles of fp16 and bf16 for each weight."""
DKV = {
    64: (Config(64, 128, 8, 2), Config(64, 64, 8, 2), Config(32, 64, 8, 2), Config(32, 64, 8, 2)),
    128: (Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(16, 64, 8, 2), Config(16, 64, 8, 2)),
    256: (Config(16, 64, 8, 2), Config(16, 64, 8, 2), Config(16, 64, 8, 2), Config(16, 32, 8, 2)),
}
"""The same for dk and dv."""


def weigh(flags: dict[str, Any]) -> int:
    """0 .. 3: how much a call asks for beside the products, by the flags of `tile_arguments`."""
    parts = [flags["WINDOW"], flags["DOCUMENTS"], flags["PREFIX"], flags["LAYOUT"], flags["BLOCKS"]]
    intricate = flags["LAYOUT"] or flags["BLOCKS"] or flags["PREFIX"] == 2 or sum(map(bool, parts)) > 2
    bias = 2 * (flags["CONTENT"] or flags["POSITION"]) + (flags["SLOPES"] or flags["TABLE"])
    return min(3, intricate + bias + flags["DROPOUT"])


def choose_dq(dtype: torch.dtype, dim: int, weight: int) -> Config:
    """Tiles of `attention_dq_kernel`."""
    if dtype == torch.float32:
        return Config(32, 32, 4, 1) if dim <= 64 else Config(32, 32, 8, 1)
    return DQ[max(64, padded_dim(dim))][weight]


def choose_dkv(dtype: torch.dtype, dim: int, weight: int) -> Config:
    """Tiles of `attention_dkv_kernel`."""
    if dtype == torch.float32:
        return Config(32, 32, 8, 1)
    return DKV[max(64, padded_dim(dim))][weight]


def choose_dtable(dtype: torch.dtype, dim: int) -> Config:
    """Tiles of `attention_dtable_kernel`, which are square."""
    return Config(32, 32, 4, 1) if dtype == torch.float32 or dim > 128 else Config(64, 64, 8, 1)


MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"CAUSAL": True},
    "documents": {"CAUSAL": True, "DOCUMENTS": True},
    "windows": {"CAUSAL": True, "DOCUMENTS": True, "WINDOW": True},
    "layout": {"LAYOUT": True, "LISTS": True},
    "every mask": {
        "CAUSAL": True, "WINDOW": True, "BLOCKS": True, "FIRST": True, "PREFIX": 2, "LAYOUT": True, "LISTS": True,
        "DOCUMENTS": True, "POSITIONS": True,
    },
}  # fmt: skip
BIASES: dict[str, dict[str, Any]] = {
    "": {},
    "slopes": {"SLOPES": True},
    "table": {"TABLE": True},
    "disentangled": {"CONTENT": True, "POSITION": True, "NEED_BAND": True},
}
NAMES = ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32"))
FLAGS = {
    **dict.fromkeys(("CAUSAL", "WINDOW", "BLOCKS", "FIRST", "LAYOUT", "DOCUMENTS", "POSITIONS", "LISTS"), False),
    **dict.fromkeys(("SLOPES", "TABLE", "CONTENT", "POSITION", "NEED_BAND"), False),
    **dict.fromkeys(("PREFIX", "DROPOUT"), 0),
    **dict.fromkeys(("NEED_Q", "NEED_K", "NEED_V", "LSE"), True),
}  # fmt: skip


def _cases(dim: int, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Title and flags of what is compiled at a head dimension: at 64 in bf16 each mask, bias and dropout by itself,
    elsewhere the plain case; at the most usual dimensions the heaviest of each weight."""
    yield "causal", MASKS["causal"]
    if dim not in (64, 128, 256) or name == "fp32":
        return
    if dim == 64 and name == "bf16":
        for mask in ("full", "documents", "layout"):
            yield mask, MASKS[mask]
        yield "dropout", MASKS["causal"] | {"DROPOUT": 1}
    heaviest = [
        ("windows", "", 0), ("windows", "slopes", 0), ("windows", "table", 0), ("windows", "", 1),
        ("every mask", "", 0), ("every mask", "slopes", 0), ("every mask", "table", 0), ("every mask", "", 1),
        ("windows", "slopes", 1), ("windows", "table", 1), ("windows", "disentangled", 0),
        ("every mask", "slopes", 2), ("every mask", "table", 2), ("every mask", "disentangled", 2),
    ]  # fmt: skip
    for mask, bias, dropout in heaviest:
        title = " ".join(filter(None, (mask, bias, f"dropout {dropout}" if dropout else "")))
        yield title, MASKS[mask] | BIASES[bias] | {"DROPOUT": dropout}
