"""A checkpoint's parameters as one plain safetensors file, by the model's own names, whatever layout trained them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from potamos.pretrain.runs import RunError, load_run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_weights(run: str | os.PathLike[str], out: Path, *, step: int | None = None, dtype: str = "fp32") -> int:
    """Write the parameters of a run's checkpoint to `out`, whole or not at all; returns how many numbers they hold.

    step: which checkpoint; None for the newest that is sound. dtype: "fp32", "bf16" or "fp16". The file's metadata hold
    the recipe, as YAML, and the step.

    Raises:
        RunError: no such run or checkpoint, another dtype, or a folder in `out`'s place.
        CheckpointError: the checkpoint is damaged.
    """
    from safetensors.torch import save_file

    if dtype not in DTYPES:
        raise RunError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if out.is_dir():
        raise RunError(f"{out} is a folder; name a file")
    loaded = load_run(run, step)
    tensors = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in loaded.model.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    half = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        save_file(tensors, half, {"format": "pt", "recipe": loaded.recipe, "step": str(loaded.step)})
        os.replace(half, out)
    finally:
        half.unlink(missing_ok=True)
    return sum(tensor.numel() for tensor in tensors.values())
