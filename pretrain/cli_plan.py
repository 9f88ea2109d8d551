"""``potamos plan``: what a run will take, before any device is asked for. Imports nothing heavy; see ``cli.py``."""

from __future__ import annotations

from typing import Annotated

import typer

from potamos.pretrain import show, show_plan
from potamos.pretrain.arguments import Overrides, RecipeName


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(help="How many; by default as many as the recipe's section slurm asks for, or 1.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100 or cpu (then --gpus counts processes).")] = "h100",
    layouts: Annotated[int, typer.Option(help="How many of the fastest layouts to show.", min=0)] = 5,
) -> None:
    """Say what a run needs and how long it takes: memory, communication, bubble, hours; and which layouts are best.

    Ends with status 2 where the run cannot fit. Needs no GPU and no data; where the data are here, says what is read.

    Example: potamos plan h3_hybrid_1.3b --gpus 16 --gpu h100 parallel.dp_shard=all parallel.dp_replicate=1
    """
    from potamos.pretrain.config import load_recipe
    from potamos.pretrain.plan import plan as plan_data
    from potamos.pretrain.plan_layouts import PlanError, Planner

    loaded = load_recipe(recipe, overrides or [])
    asked = (loaded.slurm.nodes or 1) * (loaded.slurm.gpus_per_node or 1)
    found = Planner(loaded, asked if gpus is None else gpus, gpu).plan(layouts)
    show_plan.run(found)
    try:
        show.plan(plan_data(loaded))
    except (ValueError, OSError) as error:
        show.note(f"what the run reads is not known here: {error}")
    if found.refused is not None:
        raise PlanError(found.refused)
