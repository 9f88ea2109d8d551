"""The tiles of the backward kernels, and what is compiled of them ahead of time."""

import torch

from .triton import Config


def choose_dq(dtype: torch.dtype, dim: int) -> Config:
    """Tiles of `attention_dq_kernel`."""
    return Config(64, 64, 8, 2)


def choose_dkv(dtype: torch.dtype, dim: int) -> Config:
    """Tiles of `attention_dkv_kernel`."""
    return Config(64, 64, 8, 2)


def choose_dtable(dtype: torch.dtype, dim: int) -> Config:
    """Tiles of `attention_dtable_kernel`, which are square."""
    return Config(64, 64, 8, 1)
