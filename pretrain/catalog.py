"""The packaged recipes, each in one line."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from potamos.pretrain.config import available, load_recipe
from potamos.pretrain.models.build import build
from potamos.pretrain.recipe import Recipe


@dataclass(frozen=True)
class Entry:
    """A recipe and the number of its model's parameters."""

    name: str
    family: str
    parameters: int
    description: str


def catalog() -> list[Entry]:
    """Every packaged recipe, by family and size."""
    recipes = [load_recipe(name) for name in available()]
    entries = [Entry(r.name, r.family, parameters(r), r.description) for r in recipes]
    return sorted(entries, key=lambda entry: (entry.family, entry.parameters))


def parameters(recipe: Recipe) -> int:
    """Numbers that training changes; a shared one counts once. Counted without allocating any."""
    with torch.device("meta"):
        model = build(recipe.model, sequence_length=recipe.data.sequence_length)
    return sum(p.numel() for p in model.parameters())
