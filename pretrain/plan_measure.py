"""The peak of a real step on CPU ranks, to hold a plan against: every tensor's storage followed, and, independent of
that, torch's own record of its CPU allocator.

    run_ranks(2, lambda rank, world: measure(recipe, rank, world))
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from potamos.data.loader import Rows
from potamos.parallel.apply import Spread, apply
from potamos.pretrain import setup
from potamos.pretrain.objectives.base import Objective, Terms
from potamos.pretrain.optim import Optimizer
from potamos.pretrain.plan_trace import CPU, LiveBytes
from potamos.pretrain.recipe import Recipe


@dataclass(frozen=True)
class Measured:
    """Bytes at the fullest moment of a rank: of tensors, and, where it was asked, of the allocator."""

    tensors: int
    allocator: int | None = None


def measure(recipe: Recipe, rank: int, world: int, *, allocator: bool = False) -> Measured:
    """Two steps of `recipe` under its layout, as the trainer makes them, on rows of one document of random tokens.

    allocator: one more step under torch's profiler, whose record knows what operations allocate inside as well.
    """
    system = setup.draft_system(recipe)
    system.train()
    objective, dtype = system.objective, setup.DTYPES[recipe.train.precision]
    compute = None if dtype == torch.float32 else dtype
    with Meter() as meter:
        spread = apply(system, recipe.parallel.layout(), rank, world, CPU, setup.filler(recipe, CPU), compute)
        optimizer = Optimizer(spread.stored, spread.table, recipe.optimizer, spread.matrices)
        for step in range(2):
            _step(recipe, spread, objective, optimizer, step)
    if not allocator:
        return Measured(meter.peak)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        _step(recipe, spread, objective, optimizer, 2)
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # pyright: ignore
    return Measured(meter.peak, meter.live + max(0, int(np.cumsum(changes).max())))


class Meter(LiveBytes):
    """Follows real storages too: those inside distributed tensors, and those that FSDP empties and fills again."""

    def follow(self, tensor: Tensor) -> None:
        if is_traceable_wrapper_subclass(tensor):
            for inner in _inside(tensor):
                self.follow(inner)
        else:
            super().follow(tensor)

    def __enter__(self) -> Meter:
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            result = resize(storage, size)
            self._changed(storage, before)
            return result

        torch.UntypedStorage.resize_ = resized  # pyright: ignore[reportAttributeAccessIssue]
        super().__enter__()
        return self

    def __exit__(self, *arguments: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*arguments)

    def _changed(self, storage: torch.UntypedStorage, before: int) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.live += size - before
            self.peak = max(self.peak, self.live)


def _inside(tensor: Any) -> Iterable[Tensor]:
    return [x for x in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]) if isinstance(x, Tensor)]


def _step(recipe: Recipe, spread: Spread, objective: Objective, optimizer: Optimizer, step: int) -> None:
    size, length = recipe.train.micro_sequences, recipe.data.sequence_length + 1
    count = recipe.train.sequences // spread.sizes.data
    tokens = np.random.default_rng(step).integers(0, recipe.model.frontend.vocabulary, (count, length))  # pyright: ignore
    rows = Rows(
        tokens=tokens.astype(np.int64),
        document_ids=np.repeat(np.arange(count, dtype=np.int32)[:, None], length, 1),
        positions=np.repeat(np.arange(length, dtype=np.int32)[None], count, 0),
        samples=np.arange(count),
        source=np.zeros(count, np.int32),
    )
    batches = [objective.prepare(rows.slice(begin, begin + size), seed=0, step=step) for begin in range(0, count, size)]
    results = spread.run(batches, [None] * len(batches), _loss)
    spread.gradients.squares(dict.fromkeys(spread.parameters, 0), 1)
    optimizer.step(1.0, torch.zeros(()))
    spread.zero_grad()
    del results


def _loss(out: Terms) -> Tensor:
    return torch.stack([term.weight * term.sum for term in out.terms.values()]).sum()
