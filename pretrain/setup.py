"""What a run is made of, each part from its section of the recipe. No state, no loop."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from potamos.data.loader import SourceSpec, StageSpec, TokenStream, Windows
from potamos.data.tokenizer import Tokenizer, load_tokenizer
from potamos.pretrain.models import registry
from potamos.pretrain.models.build import initializer, materialize
from potamos.pretrain.models.initialize import initialize
from potamos.pretrain.models.linear import set_compute_dtype
from potamos.pretrain.models.trunk import Model
from potamos.pretrain.objectives.base import Objective, System
from potamos.pretrain.recipe import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` is a GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r} (known: auto, cpu, cuda)")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no GPU here; choose cpu, or install a CUDA build of torch")
    return torch.device("cuda", local_rank)


def keep_freed_memory() -> None:
    """Tell glibc to keep what a step frees for the next one; elsewhere, nothing.

    By default blocks above 32 MiB go back to the kernel at once, and every step faults them in again, page by page.
    Only for training on a CPU: a GPU's tensors have an allocator of their own.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large allocation
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the top of the heap back


def build_system(recipe: Recipe, device: torch.device) -> System:
    """Model and objective, filled from the recipe's seed, computing in the recipe's precision."""
    seed, length = recipe.train.seed, recipe.data.sequence_length
    model: Model = materialize(recipe.model, seed, sequence_length=length, device=device)
    objective: Objective = registry.lookup("objective", recipe.objective.kind)(recipe.objective)
    with torch.device("meta"):
        objective.build(recipe.model, length)
    initialize(objective, initializer(recipe.model), seed, device)
    system = System(model, objective)
    dtype = DTYPES[recipe.train.precision]
    set_compute_dtype(system, None if dtype == torch.float32 else dtype)
    return system


def open_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer that the recipe names; ValueError where the model's vocabulary cannot hold it."""
    if not Path(recipe.tokenizer.path).exists():
        raise ValueError(
            f"tokenizer.path: {recipe.tokenizer.path} does not exist; make one (potamos data tokenizer), or name yours "
            "with tokenizer.path=PATH. What the laptop recipes read is made by: potamos demo"
        )
    tokenizer = load_tokenizer(recipe.tokenizer.kind, recipe.tokenizer.path)
    vocabulary = getattr(recipe.model.frontend, "vocabulary", None)
    if vocabulary is not None and tokenizer.vocabulary > vocabulary:
        raise ValueError(
            f"model.frontend.vocabulary: {vocabulary} is below the {tokenizer.vocabulary} ids of tokenizer "
            f"{recipe.tokenizer.path}; raise it to at least that"
        )
    return tokenizer


def open_stream(recipe: Recipe, tokenizer: Tokenizer) -> TokenStream:
    """The training data. In contiguous order every row of a global batch is a slot that goes on in the next step."""
    data = recipe.data
    stages = [
        StageSpec(stage.start, tuple(SourceSpec(s.path, s.weight, s.name) for s in stage.mixture))
        for stage in data.stages
    ]
    return TokenStream(
        stages,
        sequence_length=data.sequence_length,
        seed=recipe.train.seed,
        order=data.order,
        slots=recipe.train.sequences if data.order == "contiguous" else None,
        boundaries=data.boundaries,
        tokenizer_sha256=tokenizer.sha256,
        vocabulary=tokenizer.vocabulary,
    )


@dataclass(frozen=True)
class Validation:
    """One held-out dataset under the name that logs call it."""

    name: str
    windows: Windows


def open_validation(recipe: Recipe, tokenizer: Tokenizer) -> list[Validation]:
    """Every held-out dataset of the recipe."""
    return [
        Validation(
            source.label,
            Windows(
                source.path,
                sequence_length=recipe.data.sequence_length,
                boundaries=recipe.data.boundaries,
                tokenizer_sha256=tokenizer.sha256,
                vocabulary=tokenizer.vocabulary,
            ),
        )
        for source in recipe.data.validation
    ]


def scored_bytes(scored: np.ndarray, token_bytes: np.ndarray) -> int:
    """Bytes of text that the scored tokens (any shape, -1 = none) stand for."""
    return int(token_bytes[scored[scored >= 0]].sum())


def tokenizer_copy(folder: Path, kind: str) -> Path:
    """Where a run keeps its own copy of the tokenizer."""
    return folder / ("tokenizer.json" if kind == "json" else "tokenizer.tiktoken")
