"""The tiles of the backward kernels, and what is compiled of them ahead of time.

Registers decide. dq keeps its sums, (queries x dim) fp32, beside a tile of scores; dk and dv keep twice the sums. What
a mask, a bias and dropout compute for each pair comes on top, so tiles shrink with what a call asks for, its weight.
On Hopper 8 warps want 128 rows in the product of the scores, 64 for each warpgroup: with fewer both compute the same.
Readings of ptxas; no speed has been measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ..aot import SHARED_LIMIT, TARGETS, Configuration
from .triton import Config, padded_dim
from .triton_backward_kernels import attention_dkv_kernel, attention_dq_kernel, delta_kernel
from .triton_bias_backward import attention_dtable_kernel, sum_rows_kernel
from .triton_tiles import TYPES

HOPPER = SHARED_LIMIT["sm_90a"]
DQ = {
    64: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(128, 16, 8, 2)),
    128: (Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(128, 16, 8, 2), Config(128, 16, 8, 2)),
    256: (Config(128, 16, 8, 2), Config(128, 16, 8, 2), Config(64, 16, 8, 2), Config(64, 16, 8, 2)),
}
"""Padded head dimension (64 for less) -> tiles of fp16 and bf16 for each weight."""
DKV = {
    64: (Config(64, 128, 8, 2), Config(32, 128, 8, 2), Config(16, 128, 8, 2), Config(16, 128, 8, 2)),
    128: (Config(32, 128, 8, 2), Config(16, 128, 8, 2), Config(16, 64, 8, 2), Config(16, 64, 8, 2)),
    256: (Config(16, 64, 8, 2), Config(16, 64, 8, 2), Config(16, 64, 8, 2), Config(16, 64, 8, 2)),
}
"""The same for dk and dv."""


def weigh(flags: dict[str, Any]) -> int:
    """0 .. 3: how much a call computes for each pair beside the products, by the flags of `tile_arguments`."""
    masks = sum(bool(flags[name]) for name in ("WINDOW", "BLOCKS", "PREFIX", "LAYOUT", "DOCUMENTS"))
    intricate = masks > 2 or bool(flags["BLOCKS"] or flags["LAYOUT"] or flags["PREFIX"] == 2)
    toeplitz = bool(flags["SLOPES"] or flags["TABLE"])
    disentangled = bool(flags["CONTENT"] or flags["POSITION"])
    return min(3, intricate + toeplitz + 2 * disentangled + flags["DROPOUT"])


def choose_dq(dtype: torch.dtype, dim: int, weight: int, shared: int = HOPPER) -> Config:
    """Tiles of `attention_dq_kernel`; shared: bytes of shared memory that a program may have."""
    config = DQ[max(64, padded_dim(dim))][weight]
    if dtype == torch.float32:
        config = Config(64 if dim <= 64 else 32, 32, 8, 1)
    return _fit(config, dtype.itemsize * padded_dim(dim), weight, shared, "block_n")


def choose_dkv(dtype: torch.dtype, dim: int, weight: int, shared: int = HOPPER) -> Config:
    """Tiles of `attention_dkv_kernel`."""
    config = Config(32, 32, 8, 1) if dtype == torch.float32 else DKV[max(64, padded_dim(dim))][weight]
    return _fit(config, dtype.itemsize * padded_dim(dim), weight, shared, "block_m")


def choose_dtable(dtype: torch.dtype, dim: int) -> Config:
    """Tiles of `attention_dtable_kernel`, which are square."""
    return Config(32, 32, 4, 1) if dtype == torch.float32 else Config(64, 64, 8, 1)


def _fit(config: Config, row_bytes: int, weight: int, shared: int, streamed: str) -> Config:
    """The configuration with fewer stages, then fewer rows of the `streamed` side, until it fits: two tiles that stay,
    two of each stage that stream past, and scratch to move a byte or an fp32 number of each pair between threads."""

    def needed(c: Config) -> int:
        moving = getattr(c, streamed)
        staying = c.block_m + c.block_n - moving
        scratch = (5 if weight > 0 else 1) * c.block_m * c.block_n + 2048
        return 2 * (staying + c.stages * moving) * row_bytes + scratch

    while needed(config) > shared:
        if config.stages > 1:
            config = replace(config, stages=1)
        elif getattr(config, streamed) > 16:
            config = replace(config, **{streamed: getattr(config, streamed) // 2})
        else:
            assert config.block_m * config.block_n > 16 * 16, f"no tile fits {shared} bytes of shared memory"
            config = replace(config, block_m=max(16, config.block_m // 2), block_n=max(16, config.block_n // 2))
    return config


MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"CAUSAL": True},
    "documents": {"CAUSAL": True, "DOCUMENTS": True},
    "window": {"CAUSAL": True, "DOCUMENTS": True, "WINDOW": True},
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
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FLAGS: dict[str, Any] = {
    **dict.fromkeys(("CAUSAL", "WINDOW", "BLOCKS", "FIRST", "LAYOUT", "DOCUMENTS", "POSITIONS", "LISTS"), False),
    **dict.fromkeys(("SLOPES", "TABLE", "CONTENT", "POSITION", "NEED_BAND"), False),
    **dict.fromkeys(("PREFIX", "DROPOUT"), 0),
    **dict.fromkeys(("NEED_Q", "NEED_K", "NEED_V", "LSE"), True),
}
HEAVIEST = (
    ("window", "", 0), ("window", "slopes", 0), ("window", "", 1), ("every mask", "", 0), ("window", "disentangled", 0),
    ("every mask", "table", 1), ("window", "disentangled", 1), ("every mask", "disentangled", 2),
)  # fmt: skip
"""(mask, bias, dropout): calls that compute the most for each pair among those of their weight."""


FOR_AMPERE = ("causal", "every mask", "window disentangled")
"""Titles that are compiled for Ampere too; the others would show nothing else and take minutes."""


def configurations() -> list[Configuration]:
    """dq, dk and dv in every dtype; at 64, 128 and 256 channels in bf16 also the heaviest calls of each weight; the
    gradient of a table; what runs before and after them."""
    chosen: dict[str, list[str]] = {}
    launched: dict[str, tuple[Any, torch.dtype, int, dict[str, Any], Config]] = {}
    for dtype, dim, title, flags in _cases():
        for target, shared in SHARED_LIMIT.items():
            if target != "sm_90a" and title not in FOR_AMPERE:
                continue
            for side, kernel, choose in (
                ("dq", attention_dq_kernel, choose_dq),
                ("dkv", attention_dkv_kernel, choose_dkv),
            ):
                config = choose(dtype, dim, weigh(flags), shared)
                name = f"attention {side} {title} {NAMES[dtype]} {dim} {_tile(config)}"
                launched[name] = (kernel, dtype, dim, flags, config)
                chosen.setdefault(name, []).append(target)
    found = [_make(name, *launched[name], tuple(targets)) for name, targets in chosen.items()]
    for dtype, dim in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 64)):
        config = choose_dtable(dtype, dim)
        flags = FLAGS | MASKS["documents"] | BIASES["table"]
        name = f"attention dtable documents {NAMES[dtype]} {dim} {_tile(config)}"
        found.append(_make(name, attention_dtable_kernel, dtype, dim, flags, config, TARGETS))
    small = Config(32, 128, 4, 3)
    found.append(_make("attention delta bf16 128", delta_kernel, torch.bfloat16, 128, FLAGS, small, TARGETS))
    return [*found, _make("attention sum_rows bf16", sum_rows_kernel, torch.bfloat16, 128, FLAGS, small, TARGETS)]


def _cases() -> Iterator[tuple[torch.dtype, int, str, dict[str, Any]]]:
    """(dtype, head dimension, title, flags)."""
    for dtype, dims in (
        (torch.bfloat16, (16, 64, 80, 128, 256)),
        (torch.float16, (64, 128)),
        (torch.float32, (64, 128)),
    ):
        for dim in dims:
            yield dtype, dim, "causal", FLAGS | MASKS["causal"]
    for mask in ("full", "layout"):
        yield torch.bfloat16, 64, mask, FLAGS | MASKS[mask]
    heaviest = "every mask disentangled dropout"
    yield torch.float16, 64, heaviest, FLAGS | MASKS["every mask"] | BIASES["disentangled"] | {"DROPOUT": 1}
    for dim in (64, 128, 256):
        for mask, bias, dropout in HEAVIEST:
            title = " ".join(filter(None, (mask, bias, ("", "dropout", "dropout unaligned")[dropout])))
            yield torch.bfloat16, dim, title, FLAGS | MASKS[mask] | BIASES[bias] | {"DROPOUT": dropout}


def _tile(config: Config) -> str:
    return f"{config.block_m}x{config.block_n}x{config.warps}x{config.stages}"


def _make(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    dim: int,
    flags: dict[str, Any],
    config: Config,
    targets: tuple[str, ...],
) -> Configuration:
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK": config.block_m}
    constants = {**flags, **sizes, "DIM": dim, "WIDTH": padded_dim(dim)}
    constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
    inputs = ("Q_", "K_", "V_", "OUT_", "GRAD_", "DQ_", "DK_", "DV_", "CONTENT_", "POSITION_")
    fp32 = ("NORMALIZER_", "DELTA_", "BAND_", "SUMS_", "LSE_", "GRAD_LSE_")
    types = TYPES | dict.fromkeys(inputs, f"*{NAMES[dtype]}") | dict.fromkeys(fp32, "*fp32")
    types |= {
        "VISITS_": "*i32",
        "ORDER_": "*i32",
        "STARTS_": "*i32",
        "TILES_": "*i1",
        "scale": "fp32",
        "rescale": "fp32",
    }
    signature = {n: types.get(n, "i32") for n in kernel.arg_names if n not in constants}
    products = kernel not in (delta_kernel, sum_rows_kernel)
    return Configuration(
        name,
        kernel,
        signature,
        constants,
        num_warps=config.warps,
        num_stages=config.stages,
        aligned=tuple(n for n in signature if n.endswith(("_batch", "_head", "_row")) and n[0] in "qkvgdo"),
        dtype=NAMES[dtype] if products else "",
        chosen=targets,
        targets=targets,
    )
