"""What a run will read, worked out before any time on a GPU is spent: nothing is trained, no model is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from potamos.data.loader import Loader, SourcePlan
from potamos.pretrain import setup
from potamos.pretrain.recipe import Recipe


@dataclass(frozen=True)
class HeldOut:
    """A validation set: its windows of the run's length, and how many of them each validation scores."""

    name: str
    path: Path
    tokens: int
    windows: int
    scored: int


@dataclass(frozen=True)
class Plan:
    """A run's data from its first step to its last.

    ``samples``: rows trained on. ``end``: the place in the order of samples that the run comes to; beyond ``samples``
    by those that ``data.skip`` leaves out. ``sources``: one entry for each stage and source, later stages included.
    ``notices``: subsets that are missing, shards that are left out.
    """

    name: str
    steps: int
    sequences: int
    sequence_length: int
    samples: int
    end: int
    starts: Sequence[int]
    sources: Sequence[SourcePlan]
    validation: Sequence[HeldOut]
    notices: Sequence[str]

    @property
    def tokens(self) -> int:
        return self.samples * self.sequence_length


def plan(recipe: Recipe) -> Plan:
    """What ``recipe`` will read from sample 0 to its last step.

    Raises:
        DataError: the data are missing, belong to another tokenizer, or hold less than a batch needs: what training
            would refuse as well.
    """
    tokenizer = setup.open_tokenizer(recipe)
    stream = setup.open_stream(recipe, tokenizer)
    samples, train = recipe.train.steps * recipe.train.sequences, recipe.train
    with Loader(stream, sequences=train.sequences, allow_repeat=recipe.data.allow_repeat):
        pass  # made for its refusals; it reads when it is asked for rows
    limit = recipe.validation.sequences
    return Plan(
        name=recipe.name,
        steps=train.steps,
        sequences=train.sequences,
        sequence_length=recipe.data.sequence_length,
        samples=samples,
        end=stream.after(0, samples),
        starts=[stage.start for stage in recipe.data.stages],
        sources=stream.plan(samples),
        validation=[
            HeldOut(
                held_out.name,
                held_out.windows.dataset.path,
                held_out.windows.dataset.manifest.tokens,
                len(held_out.windows),
                min(limit or len(held_out.windows), len(held_out.windows)),
            )
            for held_out in setup.open_validation(recipe, tokenizer)
        ],
        notices=setup.notices(recipe, stream),
    )
