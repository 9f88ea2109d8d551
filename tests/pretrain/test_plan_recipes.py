"""Every packaged recipe can be planned, on a machine that has neither its data nor its devices."""

from __future__ import annotations

import pytest
import torch

from potamos.pretrain.config import available, load_recipe
from potamos.pretrain.models.build import materialize
from potamos.pretrain.models.interfaces import Seq
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


@pytest.mark.parametrize("name", ["sandwich_tiny", "bigbird_tiny", "butterfly_tiny", "t5_tiny", "rpe_tiny", "gpt_tiny"])
def test_a_plan_leaves_no_table_behind(name: str) -> None:
    """A plan is traced with tensors that have no values; a run of the same process makes tables of its own."""
    recipe = load_recipe(name)
    for device in ("cpu", "h100"):
        Planner(recipe, 1, device).plan(0)
    model = materialize(recipe.model, seed=1, sequence_length=recipe.data.sequence_length)
    with torch.no_grad():
        out = model({"tokens": torch.zeros(1, 256, dtype=torch.long)}, Seq(positions=torch.arange(256)[None])).hidden
    assert type(out) is torch.Tensor
    assert out.isfinite().all()
