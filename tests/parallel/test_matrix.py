"""Every layout leaves every parameter's gradient as it is: three systems, all axes, alone and together, to eight ranks.

Dropout on, documents packed across every border, an odd number of micro-batches where the schedule allows one, rows,
micro-batches, ranks and slices without a target. fp64 for all; fp32 for some, because kernels and reductions have other
paths there.
"""

from __future__ import annotations

from typing import Any

import pytest

from potamos.parallel.facts import Layout
from potamos.parallel.mesh import sizes
from potamos.parallel.pipeline import SCHEDULES
from potamos.pretrain.config import load_recipe
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.verify import verify_small
from potamos.pretrain.verify_layouts import PLAIN, matrix, parse_layout, spell, world_of
from potamos.pretrain.verify_small import batch

SHARED = (
    "model.width=16",
    "model.frontend={kind: tokens, vocabulary: 40, embedding_dropout: 0.1}",
    "model.residual_dropout=0.1",
    "model.channel={kind: mlp, ratio: 2}",
    "data.sequence_length=16",
    "optimizer={kind: adamw, lr: 1.0e-3, clip: 0.5}",
    "schedule={kind: constant}",
)
H3 = "{kind: h3, state: 4, shift_state: 6, head_dim: 2}"
SYSTEMS = {
    "h3 hybrid": (
        "h3_hybrid_tiny",
        f"model.mixer={H3}",
        "model.at={1: {mixer: {kind: attention, heads: 4, dropout: 0.1}, positions: {kind: rope}}}",
    ),
    "attention": (
        "gpt_tiny",
        "model.mixer={kind: attention, heads: 8, kv_heads: 4, dropout: 0.1}",
        "model.positions={kind: learned, max_length: 16}",
        "model.frontend={kind: tokens, vocabulary: 40, tied: false}",
        "model.at={1: {positions: {kind: alibi}}}",
        "model.norm={kind: rmsnorm, place: post}",
    ),
    "s4d": ("s4d_tiny", "model.mixer={kind: s4d, state: 4}", "model.channel={kind: swiglu}"),
}
KINDS = {"h3 hybrid": ("state", "a2a", "ring"), "attention": ("a2a", "ring"), "s4d": ("state", "a2a")}
SINGLE = (
    "tp=2",
    "cp=2",
    "dp_shard=2",
    "pp=2 schedule=zero_bubble",
    "cp=2 tp=2",
    "pp=2 dp_replicate=2 tp=2",
    "pp=2 cp=2 sequence_parallel=false",
)


def recipe_of(system: str, layout: Layout) -> Recipe:
    """A small recipe with as many layers and rows as the layout needs."""
    name, *changes = SYSTEMS[system]
    size = sizes(layout, world_of(layout))
    stages = size.pp * SCHEDULES[layout.schedule].stages if size.pp > 1 else 1
    rows, micro = batch(layout, size, 12)
    train = f"train={{steps: 3, sequences: {rows}, micro_sequences: {micro}, seed: 5, device: cpu}}"
    return load_recipe(name, [*SHARED, *changes, train, f"model.layers={4 if stages > 2 else 2}"])


def layouts(system: str) -> list[str]:
    """The whole matrix for the first system. For the others what a mixer can make a difference to: not larger axes, nor
    replicas where shards are, nor several variations at once."""
    every = list(matrix(KINDS[system], 8, PLAIN))
    if system == next(iter(SYSTEMS)):
        return [spell(layout) for layout in every]
    return [spell(layout) for layout in every if worth_repeating(layout)]


def worth_repeating(layout: Layout) -> bool:
    used = [getattr(layout, axis) for axis in ("dp_replicate", "dp_shard", "tp", "pp", "cp")]
    varied = layout.schedule != PLAIN.schedule or not layout.sequence_parallel or layout.cp_order != PLAIN.cp_order
    varied = varied or layout.checkpointing != PLAIN.checkpointing
    several = sum(size > 1 for size in used)
    assert isinstance(layout.dp_replicate, int)
    assert isinstance(layout.dp_shard, int)
    if max(used) > 2 or (several > 1 and varied):
        return False
    if layout.dp_replicate > 1 and several > 1:
        return layout.dp_shard > 1 and several == 2
    return several < 3 or (layout.dp_shard, layout.tp, layout.pp) == (2, 2, 2)


def check(system: str, words: str, dtype: Any) -> None:
    layout = parse_layout(words.split())
    found = verify_small(recipe_of(system, layout), layout, dtype=dtype, timeout=60)
    assert found.passed, "\n".join(found.failures)
    assert found.ranks == world_of(layout) > 1
    assert found.lines
    assert all(line.gradient_norm > 0 for line in found.lines), "a gradient of zero proves nothing"


@pytest.mark.parametrize(("system", "words"), [(system, words) for system in SYSTEMS for words in layouts(system)])
def test_no_layout_changes_a_gradient(system, words):
    """Within 1e-10 of its norm in fp64, and what two steps of AdamW make of it within 1e-9."""
    check(system, words, "fp64")


@pytest.mark.parametrize("words", SINGLE)
@pytest.mark.parametrize("system", SYSTEMS)
def test_nor_in_single_precision(system, words):
    """Within 1e-5 of its norm in fp32, updates within 1e-3."""
    check(system, words, "fp32")


def test_the_matrix_holds_what_it_is_meant_to():
    """Every axis, every schedule, and the pairs and triples of axes that are used together."""
    every = list(matrix(("state", "a2a", "ring")))
    assert len(set(every)) == len(every)
    axes = ("dp_replicate", "dp_shard", "tp", "pp", "cp")
    used = {frozenset(axis for axis in axes if getattr(layout, axis) == 2) for layout in every}
    for data in ("dp_replicate", "dp_shard"):
        wanted = [{data}, {data, "tp"}, {data, "pp"}, {data, "tp", "pp"}, {data, "cp"}]
        assert {frozenset(names) for names in wanted} <= used
    wanted = [{"tp"}, {"pp"}, {"cp"}, {"tp", "pp"}, {"cp", "tp"}, {"cp", "pp"}, {"dp_replicate", "dp_shard"}]
    assert {frozenset(names) for names in wanted} <= used
    assert {layout.schedule for layout in every if layout.pp == 2} == set(SCHEDULES)
    assert {layout.sequence_parallel for layout in every if layout.tp > 1} == {True, False}
    sliced = {(layout.cp_order, layout.cp_kinds) for layout in every if layout.cp == 2}
    assert {(o, (k,)) for o in ("zigzag", "contiguous") for k in ("state", "a2a", "ring")} <= sliced
    assert max(map(world_of, every)) == 8
