"""What a layout is refused for: facts that modules declare, asked before anything starts."""

from __future__ import annotations

from typing import Any

from torch import nn

from potamos.parallel import tensor
from potamos.parallel.context import choose_kind, held_slices
from potamos.parallel.facts import Layout
from potamos.parallel.mesh import LayoutError, Sizes
from potamos.parallel.pipeline import SCHEDULES, balanced


def check_layout(system: Any, layout: Layout, size: Sizes, length: int | None = None) -> None:
    """Refuse a layout that a system cannot have. The system may be on the meta device.

    length: of its rows, where it is known. Raises LayoutError, which names the axis and what to change.
    """
    if size.tp > 1:
        tensor.check_units(system, size.tp)
    if size.pp > 1:
        _check_pipeline(system, layout, size)
    if size.cp > 1:
        _check_context(system, layout, size)
    if length is not None:
        _check_length(layout, size, length)


def _check_pipeline(system: Any, layout: Layout, size: Sizes) -> None:
    forbidden = [path for path, m in system.named_modules() if tensor.is_region(m) and not m.traits.pp]
    if forbidden:
        raise LayoutError(f"parallel.pp: {forbidden[0]} does not allow stages (its trait pp is false); set it to 1")
    if layout.schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise LayoutError(f"parallel.schedule: {layout.schedule!r} is unknown; choose one of {known}")
    schedule = SCHEDULES[layout.schedule]
    if schedule.splits_backward:
        _check_split_backward(layout)
    costs, first, last = system.stage_costs()
    balanced(costs, size.pp * schedule.stages, first, last)


def _check_split_backward(layout: Layout) -> None:
    """Taking the gradients of weights later walks the graph behind them again, weight by weight."""
    if layout.checkpointing == "selective":
        raise LayoutError(
            f"parallel.checkpointing: selective does not go with schedule {layout.schedule}, which comes to "
            "what is computed again more than once; use full, none, or interleaved_1f1b"
        )
    if layout.compile is not None:
        raise LayoutError(
            f"parallel.compile: {layout.compile!r} does not go with schedule {layout.schedule}: a compiled block's "
            "backward is one piece, and this schedule takes the gradients of weights later; leave it out, or use "
            "interleaved_1f1b"
        )


def check_micro_batches(layout: Layout, size: Sizes, count: int) -> None:
    """Refuse a number of micro-batches that the schedule cannot order; names the nearest that it can."""
    if size.pp == 1 or _takes(layout.schedule, size.pp, count):
        return
    more = next(n for n in range(count + 1, 8 * size.pp + count) if _takes(layout.schedule, size.pp, n))
    less = next((n for n in range(count - 1, 0, -1) if _takes(layout.schedule, size.pp, n)), None)
    near = f"{more}" if less is None else f"{less} or {more}"
    raise LayoutError(
        f"parallel.schedule: {layout.schedule} over {size.pp} stages cannot order {count} micro-batches a step; make "
        f"them {near} by train.micro_sequences or train.sequences, or choose another schedule"
    )


def _takes(schedule: str, pp: int, count: int) -> bool:
    """torch's own conditions: no fewer micro-batches than stages, or equal rounds of about as many as ranks."""
    if schedule in ("1f1b", "dualpipe_v"):
        return count >= pp * SCHEDULES[schedule].stages
    if schedule in ("interleaved_1f1b", "zero_bubble"):
        return count % max(1, count // pp) == 0
    return True


def _check_context(system: nn.Module, layout: Layout, size: Sizes) -> None:
    """Every region must have a way to join the slices of a row."""
    for path, module in system.named_modules():
        if tensor.is_region(module):
            traits: Any = module.traits
            if not traits.cp:
                raise LayoutError(
                    f"parallel.cp: {path} does not allow a split sequence (its trait cp is empty); set it to 1"
                )
            choose_kind(traits, size.tp if traits.shard != "none" else 1, size.cp, layout.cp_kinds)


def _check_length(layout: Layout, size: Sizes, length: int) -> None:
    slices = size.cp * len(held_slices(layout.cp_order, 0, size.cp)) if size.cp > 1 else 1
    unit = slices * (size.tp if layout.sequence_parallel else 1)
    if length % unit:
        near = [n for n in (length // unit * unit, -(-length // unit) * unit) if n]
        cuts = [f"{slices} slices for cp {size.cp}"] if slices > 1 else []
        cuts += [f"{size.tp} for tp"] if unit > slices else []
        raise LayoutError(
            f"data.sequence_length: {length} cannot be cut into {' and '.join(cuts)}; use {' or '.join(map(str, near))}"
        )
