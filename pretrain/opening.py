"""Before the first step of a run: refusals that need more than the recipe, and what telemetry tells first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch

from potamos.data.loader import TokenStream
from potamos.data.skips import SkipList
from potamos.data.tokenizer import Tokenizer
from potamos.files import write_atomically
from potamos.parallel import launch
from potamos.parallel.apply import Spread
from potamos.parallel.check import check_layout, check_micro_batches
from potamos.parallel.mesh import LayoutError, Sizes
from potamos.pretrain import setup
from potamos.pretrain.config import Change, to_yaml
from potamos.pretrain.environment import write_environment
from potamos.pretrain.guard import remove_done
from potamos.pretrain.models.trunk import Model
from potamos.pretrain.objectives.base import System
from potamos.pretrain.plan_time import predict
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.records import attempt_number
from potamos.pretrain.telemetry import Telemetry
from potamos.slurm.run_folder import RunFolder

logger = logging.getLogger(__name__)


def open_telemetry(
    recipe: Recipe,
    folder: RunFolder,
    rank: launch.Rank,
    *,
    step: int,
    next_sample: int,
    stream: TokenStream,
    tokenizer: Tokenizer,
    spread: Spread,
    changes: Sequence[Change],
) -> Telemetry:
    """Begin an attempt at ``step``: what it is made of goes into the run folder, what is worth knowing into the notes.

    Every rank calls. changes: how the recipe differs from the one that the run was begun with.
    """
    attempt = launch.broadcast_object(launch.on_main(lambda: attempt_number(folder.path)))
    telemetry = launch.together(
        lambda: Telemetry(
            folder.path,
            attempt,
            total_steps=recipe.train.steps,
            tokens_before=partial(tokens_before, stream.skip, recipe.data.sequence_length),
            step=step,
            next_sample=next_sample,
            save_every=recipe.checkpoint.every,
            main=rank.is_main,
        )
    )

    def write() -> None:
        write_atomically(folder.recipe, to_yaml(recipe).encode())
        write_environment(folder.path)
        tokenizer.save(setup.tokenizer_copy(folder.path, recipe.tokenizer.kind))
        if step < recipe.train.steps:
            remove_done(folder.path)

    launch.on_main(write)
    if rank.is_main:
        telemetry.text("recipe", step, to_yaml(recipe))
    parameters = sum(shape.numel() for shape in spread.shapes.values())
    telemetry.note(f"{recipe.name}: {parameters:,} parameters, step {step} of {recipe.train.steps}, {folder.path}")
    if recipe.telemetry.samples.every is not None and spread.sizes.dp_replicate != rank.world:
        telemetry.note(f"no samples are written: {spread.sizes} leaves no rank the whole model")
    for notice in setup.notices(recipe, stream):
        telemetry.note(notice)
    for key, before, after in changes:
        telemetry.note(f"resumed with {key}: {after} (was {before})")
    return telemetry


def predicted_speed(recipe: Recipe, world: int, device: torch.device) -> float | None:
    """Tokens per second that `potamos plan` expects of this run, to be logged beside what it reaches."""
    try:
        return predict(recipe, world, device)
    except Exception as error:  # whatever it is: a prediction is not worth a run, and only one rank makes one
        logger.warning("no prediction of the speed: %s: %s", type(error).__name__, error)
        return None


def tokens_before(skips: SkipList, sequence_length: int, next_sample: int) -> int:
    """Tokens that a run has trained on when it comes to this sample."""
    left_out = sum(end - first for first, end in skips.before(next_sample))
    return (next_sample - left_out) * sequence_length


def check_spread(recipe: Recipe, draft: System, size: Sizes) -> int:
    """Everything that a recipe is refused for on ``size`` before its data are opened and its model is built: of the
    trainer and of whoever tells beforehand what a trainer will do. Returns the micro-batches of a step on one rank.

    draft: its system, which may be on the meta device. Raises LayoutError where the layout is to blame or the number of
    ranks, ValueError where no layout would help.
    """
    layout = recipe.parallel.layout()
    check_carried(recipe, draft.model, size)
    check_layout(draft, layout, size, recipe.data.sequence_length)
    count = micro_batches(recipe, size.data)
    check_micro_batches(layout, size, count)
    return count


def check_carried(recipe: Recipe, model: Model, size: Sizes) -> None:
    """Refuse rows that go on in the next step where nothing can carry their states."""
    if recipe.data.order != "contiguous":
        return
    if not model.carries:
        raise ValueError(
            "data.order: contiguous continues each row in the next step, but no layer of this model carries a state; "
            "set data.order: shuffled"
        )
    if model.frontend.max_positions is not None:
        raise ValueError(
            "data.order: contiguous gives a token its place in the whole document, but model.positions has only "
            f"{model.frontend.max_positions}; choose positions without an end, or data.order: shuffled"
        )
    if size.data != size.world:
        raise LayoutError(
            f"parallel: {size}: data.order: contiguous carries states that only data parallelism deals yet; set tp, pp "
            "and cp to 1, or data.order: shuffled"
        )


def micro_batches(recipe: Recipe, ranks: int) -> int:
    """Micro-batches of a step on one rank; refuses sizes that do not fit, since rows are never padded or dropped."""
    sequences, micro = recipe.train.sequences, recipe.train.micro_sequences
    if sequences % (ranks * micro):
        unit = ranks * micro
        below, above = sequences // unit * unit, -(-sequences // unit) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise LayoutError(
            f"train.sequences: {sequences} is not a multiple of {ranks} data ranks x train.micro_sequences {micro}; "
            f"use {near}, or change train.micro_sequences"
        )
    return sequences // (ranks * micro)
