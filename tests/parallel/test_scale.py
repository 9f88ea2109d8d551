"""Every recipe at the size that it declares, and layouts of a thousand ranks: built without memory, in one process.

torch's fake process group answers every collective at once, so one rank of any number can be built alone.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from potamos.parallel.apply import LayoutError, Spread, apply
from potamos.parallel.facts import Layout
from potamos.pretrain import setup
from potamos.pretrain.config import available, load_recipe

pytestmark = pytest.mark.distributed


def build(name: str, layout: Layout | None, rank: int, world: int) -> Spread:
    recipe = load_recipe(name)
    draft = setup.draft_system(recipe)
    return apply(
        draft, layout or recipe.parallel.layout(), rank, world, torch.device("cpu"), lambda system, cut, shapes: None
    )


def held(spread: Spread) -> dict[str, int]:
    """How many elements of each parameter this rank stores."""
    return {name: value.numel() for name, value in spread.stored.items()}


def with_fake_group(run_ranks, work, world: int) -> Any:
    """`work()` in a process that believes to be the last of `world` ranks."""

    def child(rank: int, _: int) -> Any:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        del rank
        dist.init_process_group("fake", store=FakeStore(), rank=world - 1, world_size=world)
        return work()

    return run_ranks(1, child, init=False)[0]


@pytest.mark.parametrize("name", available())
def test_every_recipe_is_built_at_its_declared_size(name, run_ranks):
    slurm = load_recipe(name).slurm
    world = (slurm.nodes or 1) * (slurm.gpus_per_node or 1)
    if world == 1:
        assert build(name, None, 0, 1).sizes.world == 1
        return
    assert with_fake_group(run_ranks, lambda: build(name, None, world - 1, world).sizes.world, world) == world


THOUSAND = [
    {"dp_shard": "all"},
    {"dp_replicate": "all", "dp_shard": 8},
    {"dp_shard": "all", "tp": 4, "pp": 4},
    {"dp_shard": "all", "cp": 8, "tp": 2},
    {"dp_shard": "all", "pp": 8, "cp": 4},
]


@pytest.mark.parametrize("axes", THOUSAND, ids=str)
@pytest.mark.parametrize("name", ["h3_hybrid_125m", "h3_hybrid_2.7b", "gpt_125m"])
def test_a_thousand_ranks_hold_their_share(name, axes, run_ranks):
    """The last rank's shares are those that the axes' sizes say, parameter by parameter."""
    layout = Layout(**{"dp_replicate": 1, **axes})

    def work() -> Any:
        spread = build(name, layout, 1023, 1024)
        shares = {}
        for parameter, count in held(spread).items():
            cut = spread.cuts[parameter]
            whole = list(cut.shape)
            if cut.dim is not None:
                whole[cut.dim] //= spread.sizes.tp
            # FSDP cuts rows as chunk does: the last rank may have fewer, or none.
            rows, ranks = whole[0], spread.sizes.dp_shard * spread.sizes.cp if spread.sizes.dp_shard > 1 else 1
            step = math.ceil(rows / ranks)
            own = max(0, min(rows, ranks * step) - (ranks - 1) * step) if ranks > 1 else rows
            shares[parameter] = (count, own * math.prod(whole[1:]))
        layers = {n.split(".")[3] for n in shares if ".blocks." in n}
        return shares, len(layers), spread.sizes.pp

    shares, layers, stages = with_fake_group(run_ranks, work, 1024)
    assert all(found == expected for found, expected in shares.values()), shares
    whole = load_recipe(name).model.layers
    assert layers < whole if stages > 1 else layers == whole


def test_what_does_not_divide_is_refused_before_anything_starts(run_ranks):
    def work() -> str:
        with pytest.raises(LayoutError) as refused:
            build("h3_hybrid_125m", Layout(dp_replicate="all", tp=8), 1023, 1024)
        return str(refused.value)

    message = with_fake_group(run_ranks, work, 1024)
    assert "parallel.tp: 8 does not divide the 12 key-value heads of model.stack.blocks.1.mixer; use 4, or" in message
