"""A small copy of a recipe that a laptop trains in a second, with every kind of layer and all that a layout divides.

What is reduced is said, one line for each, and only sizes are: width, layers, row length, vocabulary, rows. What a
recipe cannot be spread over at its full size is refused at its full size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from potamos.parallel.check import check_layout
from potamos.parallel.facts import Layout
from potamos.parallel.mesh import LayoutError, Sizes, sizes
from potamos.parallel.pipeline import SCHEDULES
from potamos.pretrain import setup
from potamos.pretrain.models.trunk import Model
from potamos.pretrain.opening import check_carried
from potamos.pretrain.recipe import Layer, Recipe
from potamos.pretrain.verify_layouts import world_of

WIDTH, LENGTH, VOCABULARY, SMALL_VOCABULARY, ROWS = 32, 32, 64, 512, 12
LEARNING_RATE = 1e-3
CLIP = 0.25
"""Below the gradient's norm of any copy, so that clipping acts."""


class ReductionError(ValueError):
    """No copy of the wanted size is a model that the layout divides; says which size to change."""


@dataclass(frozen=True)
class Reductions:
    """Sizes of the copy; None takes the smallest that will do."""

    width: int | None = None
    layers: int | None = None
    length: int | None = None
    vocabulary: int | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Small:
    """A small recipe, and what was changed, in words."""

    recipe: Recipe
    said: tuple[str, ...]


def make_small(recipe: Recipe, layout: Layout, wanted: Reductions) -> Small:
    """The copy with which ``layout`` is verified.

    Raises:
        LayoutError: ``recipe`` itself cannot be spread so.
        ReductionError: no copy can be.
    """
    size = sizes(layout, world_of(layout))
    draft = setup.draft_system(recipe)
    check_layout(draft, layout, size, recipe.data.sequence_length)
    check_carried(recipe, draft.model, size)
    layers = wanted.layers or min(recipe.model.layers, _layers(recipe, layout, size))
    length = wanted.length or min(recipe.data.sequence_length, _multiple(LENGTH, _unit(layout, size)))
    rows, micro = batch(layout, size, wanted.rows or ROWS)
    tree = recipe.model_dump(by_alias=True)
    tree["model"] |= _layer_settings(recipe, layers)
    tree["data"] |= {"sequence_length": length}
    tree["optimizer"] = _optimizer(recipe)
    tree["schedule"] = {"kind": "constant"}
    tree["train"] |= {"sequences": rows, "micro_sequences": micro, "precision": "fp32", "device": "cpu"}
    vocabulary = tree["model"]["frontend"].get("vocabulary")
    if vocabulary is not None:
        tree["model"]["frontend"] |= {"vocabulary": wanted.vocabulary or _vocabulary(vocabulary, size)}
    small = _narrow(tree, recipe, layout, size, wanted.width)
    return Small(small, tuple(_said(recipe, small)))


# --- sizes -----------------------------------------------------------------------------------------------------------


def batch(layout: Layout, size: Sizes, rows: int) -> tuple[int, int]:
    """(rows of a step, rows of a micro-batch): about ``rows``, in as odd a number of micro-batches as can be."""
    count = micro_batches(layout.schedule, size.pp)
    micro = max(1, rows // (size.data * count))
    return size.data * count * micro, micro


def micro_batches(schedule: str, ranks: int) -> int:
    """Micro-batches of one rank and step: an odd number, three or more, as the schedule allows; or an even one."""
    stages = SCHEDULES[schedule].stages
    one_by_one = stages == 1 or SCHEDULES[schedule].v  # needs as many as there are stages, the others whole rounds
    candidates = [n for n in range(3, 8 * ranks * stages) if ranks == 1 or not one_by_one or n >= ranks * stages]
    if ranks > 1 and not one_by_one:
        candidates = [n for n in candidates if n % max(1, n // ranks) == 0]
    return min(candidates, key=lambda n: (n % 2 == 0, n))


def _layers(recipe: Recipe, layout: Layout, size: Sizes) -> int:
    stages = size.pp * SCHEDULES[layout.schedule].stages if size.pp > 1 else 1
    return max(stages, len(_kinds(recipe)) + 1)


def _unit(layout: Layout, size: Sizes) -> int:
    """What a row's length must be a multiple of, with room for a slice of some tokens."""
    return 2 * size.cp * (size.tp if layout.sequence_parallel else 1)


def _multiple(least: int, unit: int) -> int:
    return -(-least // unit) * unit


def _vocabulary(full: int, size: Sizes) -> int:
    """Small tables are kept whole: an objective may own ids of theirs."""
    return full if full <= SMALL_VOCABULARY else _multiple(VOCABULARY, size.tp)


def _kinds(recipe: Recipe) -> list[Layer]:
    """The different layers, by first appearance."""
    kinds: list[Layer] = []
    for index in range(recipe.model.layers):
        if (layer := recipe.model.layer(index)) not in kinds:
            kinds.append(layer)
    return kinds


def _layer_settings(recipe: Recipe, layers: int) -> dict[str, Any]:
    """``layers`` and ``at`` of a model in which the recipe's kinds of layers take turns; as it is where none is cut."""
    if layers == recipe.model.layers:
        return {}
    kinds, first = _kinds(recipe), {}
    for index in reversed(range(recipe.model.layers)):
        first[kinds.index(recipe.model.layer(index))] = recipe.model.at.get(index)
    at = {}
    for index in range(layers):
        override = first[index % len(kinds)]
        if override:
            at[index] = {n: v.model_dump() if v is not None else None for n, v in override.items()}  # pyright: ignore
    return {"layers": layers, "at": at}


def _optimizer(recipe: Recipe) -> dict[str, Any]:
    """The recipe's own update rule and constants. Its learning rates let steps stand out of rounding; clipping acts
    where the recipe clips at all; no step is skipped."""
    tree = recipe.optimizer.model_dump()
    if tree.get("matrix_lr") is not None:
        tree["matrix_lr"] = LEARNING_RATE
    clip = recipe.optimizer.clip
    return tree | {"lr": LEARNING_RATE, "clip": None if clip is None else min(clip, CLIP), "spike": None}


def _narrow(tree: dict[str, Any], recipe: Recipe, layout: Layout, size: Sizes, width: int | None) -> Recipe:
    """The recipe at the smallest width at which it is a model and the layout divides it as it does the full one."""
    ways = _ways(setup.draft_system(recipe).model, layout, size)
    reason = ""
    for candidate in [width] if width is not None else _widths(recipe.model.width):
        try:
            small = Recipe.model_validate({**tree, "model": {**tree["model"], "width": candidate}})
            system = setup.draft_system(small)
            check_layout(system, layout, size, small.data.sequence_length)
        except (ValidationError, LayoutError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            continue
        if set(ways) <= set(_ways(system.model, layout, size)) or width is not None or candidate == recipe.model.width:
            return small
        reason = f"at width {candidate} layers join slices in other ways than at {recipe.model.width}"
    raise ReductionError(
        f"no copy of width {width or f'{WIDTH} to {recipe.model.width}'} can be spread so: {reason}; "
        "choose --width and --layers"
    )


def _widths(full: int) -> Iterator[int]:
    yield from range(min(WIDTH, full), full, 4)
    yield full


def _ways(model: Model, layout: Layout, size: Sizes) -> list[tuple[str, str, str]]:
    """How each kind of region is split, and how it joins slices."""
    from potamos.parallel.context import choose_kind

    found = []
    for region in model.regions():
        tp = size.tp if region.traits.shard != "none" else 1
        kind = choose_kind(region.traits, tp, size.cp, layout.cp_kinds) if size.cp > 1 else ""
        found.append((type(region).__name__, region.traits.shard, kind))
    return found


# --- words -----------------------------------------------------------------------------------------------------------


def _said(full: Recipe, small: Recipe) -> Iterator[str]:
    pairs = {
        "model.width": (full.model.width, small.model.width),
        "model.layers": (full.model.layers, small.model.layers),
        "model.frontend.vocabulary": tuple(getattr(r.model.frontend, "vocabulary", None) for r in (full, small)),
        "data.sequence_length": (full.data.sequence_length, small.data.sequence_length),
        "train.sequences": (full.train.sequences, small.train.sequences),
        "train.micro_sequences": (full.train.micro_sequences, small.train.micro_sequences),
        "train.precision": (full.train.precision, small.train.precision),
        "optimizer.lr": (full.optimizer.lr, small.optimizer.lr),
        "optimizer.matrix_lr": tuple(getattr(r.optimizer, "matrix_lr", None) for r in (full, small)),
        "optimizer.clip": (full.optimizer.clip, small.optimizer.clip),
        "optimizer.spike": (full.optimizer.spike, small.optimizer.spike),
        "schedule.kind": (full.schedule.kind, small.schedule.kind),
    }
    for key, (before, after) in pairs.items():
        if before != after:
            yield f"{key}: {after} (was {before})"
    kinds = [type(region).__name__ for region in setup.draft_system(small).model.regions()]
    if small.model.layers != full.model.layers:
        yield f"layers: {', '.join(kinds)}"


def cp_kinds(recipe: Recipe) -> set[str]:
    """Ways of joining slices that some region of the recipe allows."""
    return {kind for region in setup.draft_system(recipe).model.regions() for kind in region.traits.cp}
