"""How `potamos plan` prints what it found. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from potamos.pretrain.show import _table as table
from potamos.pretrain.show import line, out

if TYPE_CHECKING:
    from potamos.pretrain.plan_layouts import Planned, RunPlan


def run(found: RunPlan) -> None:
    """The recipe's own layout in full, if it is one, then the best layouts, a line each."""
    own, recipe = found.own, found.recipe
    layout = "its layout is refused, as the last message says" if own is None else str(own.sizes)
    line(f"{recipe.name} on {found.gpus} x {found.ceiling.name}: {layout}", "bold")
    line(
        f"{found.parameters:,} parameters, {found.flops_per_token / 1e9:.3g} GFLOP a token; "
        f"{recipe.train.sequences} rows of {recipe.data.sequence_length:,} tokens a step, "
        f"{recipe.train.micro_sequences} at a time"
    )
    if own is not None:
        memory(own, found.usable)
        seconds(own)
        hours = found.hours(own)
        line(
            f"{own.time.tokens_per_second:,.0f} tokens/s, {own.time.seconds:.3g} s a step, {recipe.train.steps:,} "
            f"steps: {hours:,.1f} hours, {hours * found.gpus:,.0f} GPU-hours"
        )
    reached = found.reached
    line(f"estimated from {reached.share:.0%} of the peak, {reached.kind}: {reached.source} ({reached.date})", "dim")
    if found.best:
        layouts(found)


def memory(planned: Planned, usable: int) -> None:
    """What a device holds at its fullest."""
    rows = table("memory of the fullest device", right=("bytes", "share"))
    peak = planned.memory.peak
    for name, count in sorted(planned.memory.parts.items(), key=lambda part: -part[1]):
        rows.add_row(name, gigabytes(count), f"{100 * count / peak:.0f} %")
    rows.add_row("in all", gigabytes(peak), f"of {gigabytes(usable)} usable", style="bold")
    out.print(rows)
    stage = f", rank {planned.memory.stage_rank} of the pipeline" if planned.sizes.pp > 1 else ""
    line(f"fullest in: {planned.memory.when}{stage}; kernels in their {planned.memory.form} form", "dim")


def seconds(planned: Planned) -> None:
    """What a step's time is made of."""
    time = planned.time
    rows = table("a step", right=("seconds", "sent by a rank"))
    rows.add_row("computing", f"{time.compute:.3g}", "")
    if planned.sizes.pp > 1:
        rows.add_row(
            f"bubble {time.bubble:.1%} ({planned.layout.schedule}; equal stages {time.formula:.1%})",
            f"{time.length - time.compute:.3g}",
            "",
        )
    names = {"data": "sums of gradients", "gather": "gathered parameters", "pp": "between stages"}
    for axis, count in time.sent.items():
        waited = time.exposed[axis]
        rows.add_row(names.get(axis, f"{axis} ranks"), f"{waited:.3g} of {time.links[axis]:.3g}", gigabytes(count))
    rows.add_row("optimizer", f"{time.update:.3g}", "")
    out.print(rows)


def layouts(found: RunPlan) -> None:
    """The fastest layouts that fit."""
    rows = table("fastest that fit", right=("tokens/s", "memory", "bubble", "hours"))
    for each in found.best:
        own = found.own is not None and (each.sizes, each.layout) == (found.own.sizes, found.own.layout)
        mark = " (this recipe)" if own else ""
        rows.add_row(
            each.spelled + mark, f"{each.time.tokens_per_second:,.0f}", gigabytes(each.memory.peak),
            f"{each.time.bubble:.1%}", f"{found.hours(each):,.1f}",
        )  # fmt: skip
    out.print(rows)


def gigabytes(count: float) -> str:
    """As devices are sold: 10^9 bytes."""
    return f"{count / 1e9:.1f} GB" if abs(count) >= 1e8 else f"{count / 1e6:.1f} MB"
