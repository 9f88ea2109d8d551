"""What a run is made of, each part from its section of the recipe. No state, no loop."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from potamos.data.loader import SourceSpec, StageSpec, TokenStream, Windows
from potamos.data.mixtures import published
from potamos.data.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer
from potamos.parallel.apply import Fill
from potamos.pretrain.models import registry
from potamos.pretrain.models.build import build, initializer
from potamos.pretrain.models.initialize import initialize
from potamos.pretrain.models.linear import set_compute_dtype
from potamos.pretrain.models.trunk import Model
from potamos.pretrain.objectives.base import Objective, System
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.recipe_data import Cache, Published, Stage
from potamos.pretrain.recipe_data import Tokenizer as TokenizerSection

if TYPE_CHECKING:
    from potamos.data.remote import CacheSpec

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
    system = draft_system(recipe)
    filler(recipe, device)(system, lambda _, whole: whole, {name: p.shape for name, p in system.named_parameters()})
    return system


def draft_system(recipe: Recipe) -> System:
    """Model and objective without memory for their parameters, computing in the recipe's precision."""
    length = recipe.data.sequence_length
    objective: Objective = registry.lookup("objective", recipe.objective.kind)(recipe.objective)
    with torch.device("meta"):
        model: Model = build(recipe.model, sequence_length=length)
        objective.build(recipe.model, length)
    system = System(model, objective)
    dtype = DTYPES[recipe.train.precision]
    set_compute_dtype(system, None if dtype == torch.float32 else dtype)
    return system


def filler(recipe: Recipe, device: torch.device) -> Fill:
    """What gives a drafted system its initial values, from the recipe's seed, however it has been cut."""

    def fill(system: nn.Module, cut: Callable[[str, Tensor], Tensor], shapes: Mapping[str, torch.Size]) -> None:
        for part, module in system.named_children():
            prefix = f"{part}."
            own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
            initialize(
                module,
                initializer(recipe.model),
                recipe.train.seed,
                device,
                shapes=own,
                cut=lambda name, whole, prefix=prefix: cut(prefix + name, whole),
            )

    return fill


def open_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer that the recipe names; ValueError where the model's vocabulary cannot hold it."""
    if not Path(recipe.tokenizer.path).exists():
        raise ValueError(
            f"tokenizer.path: {recipe.tokenizer.path} does not exist; make one (potamos data tokenizer), or name yours "
            "with tokenizer.path=PATH. What the laptop recipes read is made by: potamos demo"
        )
    tokenizer = load(recipe.tokenizer, recipe.tokenizer.path)
    vocabulary = getattr(recipe.model.frontend, "vocabulary", None)
    if vocabulary is not None and tokenizer.vocabulary > vocabulary:
        raise ValueError(
            f"model.frontend.vocabulary: {vocabulary} is below the {tokenizer.vocabulary} ids of tokenizer "
            f"{recipe.tokenizer.path}; raise it to at least that"
        )
    return tokenizer


def load(section: TokenizerSection, path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a recipe's section from ``path``: the section's own, or a copy of it."""
    return load_tokenizer(
        section.kind, path, end_of_document=section.end_of_document, special_tokens=section.special_tokens
    )


def open_stream(recipe: Recipe, tokenizer: Tokenizer) -> TokenStream:
    """The training data. In contiguous order every row of a global batch is a slot that goes on in the next step."""
    data = recipe.data
    return TokenStream(
        [StageSpec(stage.start, _sources(stage)[0]) for stage in data.stages],
        sequence_length=data.sequence_length,
        seed=recipe.train.seed,
        order=data.order,
        slots=recipe.train.sequences if data.order == "contiguous" else None,
        window=data.window,
        skip=data.skip,
        boundaries=data.boundaries,
        tokenizer_sha256=tokenizer.sha256,
        vocabulary=tokenizer.vocabulary,
        on_bad_shard=data.on_bad_shard,
        cache=_cache(data.cache),
    )


def _cache(section: Cache | None) -> CacheSpec | None:
    if section is None:
        return None
    from potamos.data.remote import CacheSpec  # and with it fsspec, which only URLs need

    return CacheSpec(section.path, section.bytes)


def notices(recipe: Recipe, stream: TokenStream) -> list[str]:
    """What a user should know of the data before training: subsets that are missing, shards that are left out."""
    found = [notice for stage in recipe.data.stages for notice in _sources(stage)[1]]
    found += [
        f"dataset {dataset.path}: {len(dataset.dropped)} shards are left out: {', '.join(dataset.dropped)}"
        for dataset in stream.datasets
        if dataset.dropped
    ]
    return list(dict.fromkeys(found))


def _sources(stage: Stage) -> tuple[tuple[SourceSpec, ...], tuple[str, ...]]:
    if isinstance(stage.mixture, Published):
        return published(stage.mixture.published, stage.mixture.path)
    return tuple(SourceSpec(s.path, s.weight, s.label) for s in stage.mixture), ()


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
    return folder / FILE_NAMES[kind]
