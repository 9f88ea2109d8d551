"""Every recipe at the layout and size that it declares, and on 1,024 ranks: built without memory, in one process.

torch's fake process group answers every collective at once, so one rank of any number can be built alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from potamos.parallel.apply import LayoutError, Spread, apply
from potamos.parallel.check import check_layout, check_micro_batches
from potamos.parallel.data import SHARDS
from potamos.parallel.mesh import sizes
from potamos.parallel.pipeline import SCHEDULES
from potamos.pretrain import setup
from potamos.pretrain.config import available, load_recipe
from potamos.pretrain.opening import micro_batches
from potamos.pretrain.recipe import Recipe

pytestmark = pytest.mark.distributed

THOUSAND = 1024


def build(recipe: Recipe, rank: int, world: int) -> Spread:
    """A rank as the trainer builds it, with everything that it checks first; on the meta device."""
    layout, dtype = recipe.parallel.layout(), setup.DTYPES[recipe.train.precision]
    size = sizes(layout, world)
    check_micro_batches(layout, size, micro_batches(recipe, size.data))
    compute, length = None if dtype == torch.float32 else dtype, recipe.data.sequence_length
    device, draft = torch.device("cpu"), setup.draft_system(recipe)
    return apply(draft, layout, rank, world, device, lambda system, cut, shapes: None, compute, length)


def as_ranks(run_ranks: Any, world: int, ranks: Iterable[int], work: Callable[[int], Any]) -> list[Any]:
    """`work(rank)` of each, by a process that believes to be that rank of `world`."""

    def child(_: int, __: int) -> Any:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        found = []
        for rank in ranks:
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
            found.append(work(rank))
            dist.destroy_process_group()
        return found

    return run_ranks(1, child, init=False)[0]


def looked_at(world: int) -> list[int]:
    """The first rank, the last, and one of the middle, which in a pipeline of three or more holds neither end."""
    return sorted({0, world // 2, world - 1})


def wrong_shares(spread: Spread) -> dict[str, tuple[int, int]]:
    """{parameter: (elements stored, elements that the axes' sizes say)} where the two differ."""
    wrong = {}
    for name, stored in spread.stored.items():
        cut, size = spread.cuts[name], spread.sizes
        whole = list(cut.shape)
        if cut.dim is not None:
            whole[cut.dim] //= size.tp
        rows = whole[0]
        if size.dp_shard > 1:  # rows as chunk cuts them: the last ranks may have fewer, or none
            step = math.ceil(rows / (size.dp_shard * size.cp))
            rows = max(0, min(step, rows - spread.mesh.index(*SHARDS) * step))
        if stored.numel() != rows * math.prod(whole[1:]):
            wrong[name] = (stored.numel(), rows * math.prod(whole[1:]))
    return wrong


def layers_of(spread: Spread) -> set[str]:
    return {name.split(".")[3] for name in spread.stored if ".blocks." in name}


def check(run_ranks: Any, recipe: Recipe, world: int, ranks: Sequence[int] | None = None) -> None:
    """First, middle and last rank hold what they should: shares of every parameter, and layers of their own stage."""
    ranks = looked_at(world) if ranks is None else ranks

    def work(rank: int) -> Any:
        spread = build(recipe, rank, world)
        assert spread.sizes.world == world
        return wrong_shares(spread), layers_of(spread), spread.sizes.pp, spread.mesh.index("pp"), len(spread.stored)

    found = as_ranks(run_ranks, world, ranks, work)
    assert [wrong for wrong, *_ in found] == [{}] * len(found)
    assert all(stored for *_, stored in found)
    pipeline, every = found[0][2], {str(index) for index in range(recipe.model.layers)}
    by_stage = {stage: layers for _, layers, _, stage, _ in found}
    assert len(by_stage) == min(pipeline, len(found))
    assert sum(map(len, by_stage.values())) == len(set().union(*by_stage.values())), "stages share a layer"
    if len(by_stage) == pipeline:
        assert set().union(*by_stage.values()) == every
    else:
        assert all(layers < every for layers in by_stage.values())
    if not SCHEDULES[recipe.parallel.schedule].v:
        for stage, layers in by_stage.items():
            ends = ("0" in layers, str(recipe.model.layers - 1) in layers)
            assert ends == (stage == 0, stage == pipeline - 1)


def changed(name: str, world: int, axes: dict[str, Any], *more: str) -> Recipe:
    """The recipe under a layout, with a batch that every data rank has a part of."""
    recipe = load_recipe(name, [*more, *(f"parallel.{axis}={size}" for axis, size in axes.items())])
    size = sizes(recipe.parallel.layout(), world)
    rows = recipe.train.micro_sequences if recipe.train.sequences >= size.data * recipe.train.micro_sequences else 1
    rounds = 2 * size.pp
    train = {"micro_sequences": rows, "sequences": size.data * rows * rounds}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


@pytest.mark.parametrize("name", available())
def test_every_recipe_is_built_as_it_declares(name, run_ranks):
    recipe = load_recipe(name)
    world = (recipe.slurm.nodes or 1) * (recipe.slurm.gpus_per_node or 1)
    check(run_ranks, recipe, world)


@pytest.mark.parametrize("name", available())
def test_every_recipe_goes_to_a_thousand_ranks(name, run_ranks):
    """As declared, data parallelism taking the rest: its own batch is refused where it is too small, with the nearest
    that is not, and that one works. Then with all axes."""
    recipe = load_recipe(name)
    micro = recipe.train.micro_sequences
    assert recipe.train.sequences < THOUSAND * micro, "a recipe whose own batch is enough is to be tested with it"
    with pytest.raises(ValueError, match=rf"train\.sequences: .* not a multiple of 1024 .*; use {THOUSAND * micro}, "):
        micro_batches(recipe, THOUSAND)
    check(run_ranks, load_recipe(name, [f"train.sequences={THOUSAND * micro}"]), THOUSAND)
    axes = {"dp_replicate": 32, "dp_shard": "all", "tp": 2, "cp": 2, "pp": 4 if recipe.model.layers >= 4 else 2}
    if name == "linear_tiny":  # three heads a tensor slice, which two sequence slices cannot share
        layout = changed(name, THOUSAND, axes).parallel.layout()
        with pytest.raises(LayoutError, match=r"parallel\.cp: 2 .* 6 heads .* tp 2 .*; use a divisor of 3"):
            check_layout(setup.draft_system(recipe), layout, sizes(layout, THOUSAND))
        del axes["cp"]
    check(run_ranks, changed(name, THOUSAND, axes), THOUSAND)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("gpt_125m", {"dp_replicate": 1, "dp_shard": "all"}),
        ("gpt_125m", {"dp_replicate": 1, "dp_shard": "all", "cp": 8, "tp": 2}),
        ("gpt_125m", {"dp_replicate": "all", "tp": 4, "pp": 4, "schedule": "gpipe"}),
        ("h3_hybrid_2.7b", {"dp_replicate": 1, "dp_shard": "all", "tp": 4, "pp": 8, "schedule": "interleaved_1f1b"}),
        ("h3_hybrid_2.7b", {"dp_replicate": 8, "dp_shard": "all", "pp": 8, "cp": 4}),
        ("h3_hybrid_2.7b", {"dp_replicate": "all", "dp_shard": 1, "pp": 4, "schedule": "zbv"}),
    ],
    ids=str,
)
def test_large_axes_of_a_thousand_ranks(name, axes, run_ranks):
    """The last rank: rows of a table may have run out before it."""
    check(run_ranks, changed(name, THOUSAND, axes), THOUSAND, [THOUSAND - 1])


def test_a_wrong_share_is_seen(run_ranks, monkeypatch):
    """Of one parameter, on the last rank alone."""

    def work(rank: int) -> Any:
        spread = build(changed("gpt_125m", 8, {"dp_replicate": 1, "dp_shard": "all", "tp": 2}), rank, 8)
        name = "model.stack.blocks.3.mixer.q.weight"
        spread.stored[name] = torch.empty(spread.stored[name].numel() + 768, device="meta")
        return list(wrong_shares(spread))

    assert as_ranks(run_ranks, 8, [7], work) == [["model.stack.blocks.3.mixer.q.weight"]]


def test_what_does_not_divide_is_refused_before_anything_starts(run_ranks):
    def work(rank: int) -> str:
        with pytest.raises(LayoutError) as refused:
            build(changed("h3_hybrid_125m", THOUSAND, {"tp": 8}), rank, THOUSAND)
        return str(refused.value)

    (message,) = as_ranks(run_ranks, THOUSAND, [THOUSAND - 1], work)
    assert "parallel.tp: 8 does not divide the 12 key-value heads of model.stack.blocks.1.mixer; use 4, or" in message
