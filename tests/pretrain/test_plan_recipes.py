"""Every packaged recipe can be planned, on a machine that has neither its data nor its devices."""

from __future__ import annotations

import pytest

from potamos.pretrain.config import available, load_recipe
from potamos.pretrain.plan_layouts import Planner

# On a CPU's forms, those that are for CPUs: a large one is traced for half a minute.
CASES = [
    (name, device) for name in sorted(available()) for device in ("h100", "cpu") if device == "h100" or "tiny" in name
]


@pytest.mark.parametrize(("name", "device"), CASES)
def test_every_recipe_can_be_planned(name: str, device: str) -> None:
    recipe = load_recipe(name)
    gpus = (recipe.slurm.nodes or 1) * (recipe.slurm.gpus_per_node or 1)
    run = Planner(recipe, gpus, device).plan(0)
    assert run.own is not None
    assert run.own.memory.peak > 0
    assert run.own.time.seconds > 0
    if device == "h100":
        assert run.refused is None
