"""Which layouts of a recipe fit a number of devices, how fast each should be, and what a run of it will take.

Nothing here needs the data, a device or other ranks. Times come first, because they are cheap; memory is counted for
the fastest layouts until enough of them fit.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from potamos.parallel.facts import Layout
from potamos.parallel.mesh import LayoutError, Sizes, sizes
from potamos.pretrain.ceilings import CEILINGS, NOT_REACHABLE, Ceiling, Reached
from potamos.pretrain.opening import check_spread
from potamos.pretrain.plan_forms import Form, form_on
from potamos.pretrain.plan_memory import Memory, Moments, memory
from potamos.pretrain.plan_time import Costs, Time, step_time
from potamos.pretrain.plan_trace import Trace, splits_backward, trace
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.show_plan import gigabytes

SHOWN = 5
MOST_COUNTED = 48
"""Layouts that are counted and do not fit before the search gives up."""
SHARED_PARTS = ("weights", "gradients", "optimizer", "communication")
"""Of a memory: what data ranks may share. The rest they do not."""
ROUNDING = 1e-9
"""By how much a sum in another order may differ, and more."""


MOST_CHANGED = 4
"""Layouts for which less is tried, before it is said that nothing fits."""


class PlanError(ValueError):
    """A run that cannot fit its devices; says what is too big, and the nearest change that fits."""


@dataclass(frozen=True)
class Planned:
    """A recipe under one layout. recipe: with the layout, and with what had to change for it to fit; own: the layout
    that it had before."""

    recipe: Recipe
    sizes: Sizes
    memory: Memory
    time: Time
    own: Layout

    @property
    def layout(self) -> Layout:
        return self.recipe.parallel.layout()

    @property
    def spelled(self) -> str:
        """The layout as overrides of the recipe on a command line."""
        given = {axis: getattr(self.sizes, axis) for axis in ("dp_replicate", "dp_shard", "tp", "pp", "cp")}
        words = [
            f"parallel.{axis}={size}"
            for axis, size in given.items()
            if size > 1 or axis == "dp_replicate" or getattr(self.own, axis) != 1
        ]
        if self.sizes.pp > 1:
            words.append(f"parallel.schedule={self.layout.schedule}")
        if self.layout.checkpointing != "none":
            words.append(f"parallel.checkpointing={self.layout.checkpointing}")
        return " ".join(words)


@dataclass(frozen=True)
class RunPlan:
    """What a run will take. own: the recipe's layout, None where it is none for this model or number of devices; best:
    the fastest that fit, which may hold it; usable: bytes of a device that tensors can have. refused: why the recipe's
    own layout cannot run, or None."""

    recipe: Recipe
    gpus: int
    ceiling: Ceiling
    reached: Reached
    usable: int
    parameters: int
    flops_per_token: float
    own: Planned | None
    best: Sequence[Planned]
    refused: str | None

    def hours(self, planned: Planned) -> float:
        """From the first step to the last, without validation, checkpoints and waiting."""
        return self.recipe.train.steps * planned.time.seconds / 3600


class Planner:
    """Plans for one recipe; traces of its layers are kept from layout to layout."""

    def __init__(self, recipe: Recipe, gpus: int, gpu: str) -> None:
        if gpu not in CEILINGS:
            raise ValueError(f"--gpu: unknown device {gpu!r}; known are {', '.join(CEILINGS)}")
        if gpus < 1:
            raise ValueError(f"--gpus: {gpus} devices are none; give 1 or more")
        self.recipe, self.gpus, self.ceiling = recipe, gpus, CEILINGS[gpu]
        self.form: Form = form_on(gpu)
        self.usable = int(self.ceiling.memory * NOT_REACHABLE)
        self._traces: dict[Any, Trace] = {}
        self._moments = Moments(recipe)

    @cached_property
    def costs(self) -> Costs:
        """What the model costs in any layout."""
        return Costs(self.recipe)

    def plan(self, shown: int = SHOWN) -> RunPlan:
        """The recipe's own layout, or why it cannot be had, and the fastest ones."""
        try:
            own, refused = self.planned(self.recipe), None
        except LayoutError as error:
            own, refused = None, str(error)
        fits = own is not None and own.memory.peak <= self.usable
        best = self.best(shown)
        if own is not None and fits:
            best = sorted(
                [own, *(each for each in best if each.sizes != own.sizes)], key=lambda each: each.time.seconds
            )
        return RunPlan(
            self.recipe,
            self.gpus,
            self.ceiling,
            self.ceiling.row(self.recipe.model.width),
            self.usable,
            self.costs.parameters,
            self.costs.flops_per_token,
            own,
            best[:shown],
            f"{refused}. {self._instead(best)}" if own is None else self._refusal(own),
        )

    def planned(self, recipe: Recipe) -> Planned:
        """Time and memory of a recipe that differs from the planner's in layout and micro-batches alone."""
        size = self._checked(recipe)
        return Planned(
            recipe, size, self._memory(recipe, size), self._time(recipe, size), self.recipe.parallel.layout()
        )

    def best(self, shown: int) -> list[Planned]:
        """The fastest layouts that fit, the fastest first."""
        found: list[Planned] = []
        own = self.recipe.parallel.layout()
        failed: list[tuple[Planned, int]] = []
        for time, size, recipe in self._fastest_first() if shown else ():
            if any(self._needs_more(size, recipe, *each) for each in failed):
                continue
            memory = self._memory(recipe, size)
            if memory.peak > self.usable:
                kept = sum(count for part, count in memory.parts.items() if part not in SHARED_PARTS)
                failed.append((Planned(recipe, size, memory, time, own), kept))
                if len(failed) == MOST_COUNTED:
                    break
                continue
            found.append(Planned(recipe, size, memory, time, own))
            if len(found) == shown:
                break
        return found

    def _needs_more(self, size: Sizes, recipe: Recipe, failed: Planned, kept: int) -> bool:
        """Whether a layout cannot fit, seeing that one did not which kept so many bytes of activations: over n times
        the tensor and sequence ranks they shrink by n at best, and with fewer data ranks no fewer are in flight."""
        more = size.tp * size.cp / (failed.sizes.tp * failed.sizes.cp)
        same = size.pp == failed.sizes.pp and recipe.parallel.schedule == failed.recipe.parallel.schedule
        return same and more >= 1 and kept / more > self.usable

    def _fastest_first(self) -> Iterator[tuple[Time, Sizes, Recipe]]:
        """All layouts that a trainer takes, by their times. A pipeline is played only when its turn may have come."""
        allowed = []
        for number, recipe in enumerate(self._candidates()):
            try:
                size = self._checked(recipe)
                allowed.append((self._time(recipe, size, idle=False).seconds * (1.0 - ROUNDING), number, size, recipe))
            except ValueError:
                continue
        played: list[tuple[float, int, Time, Sizes, Recipe]] = []
        for least, number, size, recipe in sorted(allowed, key=lambda entry: entry[:2]):
            while played and played[0][0] <= least:
                yield heapq.heappop(played)[2:]
            time = self._time(recipe, size)
            heapq.heappush(played, (time.seconds, number, time, size, recipe))
        while played:
            yield heapq.heappop(played)[2:]

    # --- parts -----------------------------------------------------------------------------------------------------

    def _checked(self, recipe: Recipe) -> Sizes:
        size = sizes(recipe.parallel.layout(), self.gpus)
        check_spread(recipe, self.costs.system, size)
        return size

    def _time(self, recipe: Recipe, size: Sizes, *, idle: bool = True) -> Time:
        costs = self.costs
        if recipe.train.micro_sequences != self.recipe.train.micro_sequences:
            costs = Costs(recipe, costs.system)
        return step_time(costs, size, self.ceiling, recipe.parallel.layout(), idle=idle)

    def _memory(self, recipe: Recipe, size: Sizes) -> Memory:
        layout = recipe.parallel.layout()
        key = (
            size.tp, size.cp, recipe.train.micro_sequences, layout.checkpointing, layout.sequence_parallel,
            layout.cp_order, layout.cp_kinds, splits_backward(recipe),
        )  # fmt: skip
        if key not in self._traces:
            self._traces[key] = trace(recipe, tp=size.tp, cp=size.cp, form=self.form)
        return memory(recipe, self._traces[key], size, self.costs.stage_costs, self._moments)

    def _candidates(self) -> Iterator[Recipe]:
        """Every way to put the devices on the axes."""
        own, inside = self.recipe.parallel, min(self.gpus, self.ceiling.per_node)
        for tp in _divisors(inside):
            for pp in _divisors(self.gpus // tp):
                for cp in _divisors(self.gpus // (tp * pp)):
                    data = self.gpus // (tp * pp * cp)
                    for shard in _divisors(data):
                        if shard not in (1, data, inside // tp):
                            continue
                        changed = {"tp": tp, "pp": pp, "cp": cp, "dp_shard": shard, "dp_replicate": data // shard}
                        schedules = [own.schedule]
                        if pp > 1:
                            schedules = list(dict.fromkeys((own.schedule, "1f1b", "interleaved_1f1b", "zero_bubble")))
                        for schedule in schedules:
                            yield changed_layout(self.recipe, **changed, schedule=schedule)

    def _refusal(self, own: Planned) -> str | None:
        if own.memory.peak <= self.usable:
            return None
        name, most = max(own.memory.parts.items(), key=lambda part: part[1])
        change = self._nearest_change(own)
        remedy = f"the nearest change that fits: {change}" if change else "nothing that this program can change fits"
        return (
            f"{self.recipe.name} does not fit {self.gpus} x {self.ceiling.name}: {own.sizes} needs "
            f"{gigabytes(own.memory.peak)} a device of {gigabytes(self.usable)} usable ({own.memory.when}); "
            f"most of it, {gigabytes(most)}, is {name}; {remedy}"
        )

    def _nearest_change(self, own: Planned) -> str | None:
        """What changes least: the rows of a micro-batch, then also what is kept, then the layout."""
        less = self._less(own)
        if less is not None:
            return " ".join(less)
        best = self.best(1)
        return best[0].spelled if best else None

    def _less(self, own: Planned) -> list[str] | None:
        """Fewer rows of a micro-batch, and less that is kept, with which a layout fits, as overrides; [] where it fits
        as it is, None where it cannot."""
        for mode in dict.fromkeys((own.layout.checkpointing, "full")):
            rows = self._rows_that_fit(own, mode)
            if rows is not None:
                words = [f"train.micro_sequences={rows}"] if rows != own.recipe.train.micro_sequences else []
                return words + ([f"parallel.checkpointing={mode}"] if mode != own.layout.checkpointing else [])
        return None

    def _instead(self, best: Sequence[Planned]) -> str:
        """What to do about a layout that is refused, whose own remedy need not fit."""
        where = f"{self.gpus} x {self.ceiling.name}"
        found = list(best) or self.best(1)
        if found:
            return f"The fastest that fits {where}: {found[0].spelled}"
        tried = f"No layout of {where} fits with the recipe's micro-batches"
        for _, _, recipe in itertools.islice(self._fastest_first(), MOST_CHANGED):
            planned = self.planned(recipe)
            less = self._less(planned)
            if less is not None:
                return f"{tried}; what does: {' '.join([planned.spelled, *less])}"
        return f"{tried}, nor with fewer rows at a time or parallel.checkpointing=full; take more devices"

    def _rows_that_fit(self, own: Planned, mode: str) -> int | None:
        """The most rows of a micro-batch, halved from the recipe's, that fit; None where one row does not."""

        def peak(rows: int) -> int:
            changed = changed_layout(own.recipe, checkpointing=mode)
            train = changed.train.model_copy(update={"micro_sequences": rows})
            return self._memory(changed.model_copy(update={"train": train}), own.sizes).peak

        least = peak(1)
        if least > self.usable:
            return None
        rows = own.recipe.train.micro_sequences
        if rows == 1:
            return 1
        per_row = max(0.0, (peak(rows) - least) / (rows - 1))
        while rows > 1 and (least + per_row * (rows - 1) > self.usable or peak(rows) > self.usable):
            rows //= 2
        return rows


def changed_layout(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe under another layout."""
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=changes)})


def check_fits(recipe: Recipe, gpus: int, gpu: str) -> None:
    """Refuse, before a queue is entered, what cannot fit. Raises PlanError, LayoutError."""
    planner = Planner(recipe, gpus, gpu)
    own = planner.planned(recipe)
    if own.memory.peak > planner.usable:
        raise PlanError(planner._refusal(own))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
