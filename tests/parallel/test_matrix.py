"""Every layout leaves every parameter's gradient as it is: three systems, all axes, alone and together, to eight ranks.

Dropout on, documents packed across every border, an odd number of micro-batches where the schedule allows one, rows,
micro-batches, ranks and slices without a target. In fp64, and in fp32, where kernels and reductions have other paths.
"""

from __future__ import annotations

from typing import Any

import pytest

from potamos.parallel.apply import Spread
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
MUON = "optimizer={kind: muon, lr: 1.0e-3, matrix_lr: 2.0e-3, momentum: 0.9, clip: 0.5}"
MATRICES = (
    "dp_replicate=2",
    "tp=2",
    "dp_shard=2 tp=2",
    "cp=2 tp=2 sequence_parallel=false",
    "dp_replicate=2 dp_shard=2 tp=2",
    "pp=2 dp_shard=2 tp=2 schedule=interleaved_1f1b",
    "pp=2 tp=2 schedule=zbv",
)
"""Layouts that cut matrices, which Muon must make whole, and some that do not."""


def recipe_of(system: str, layout: Layout, *more: str) -> Recipe:
    """A small recipe with as many layers and rows as the layout needs."""
    name, *changes = SYSTEMS[system]
    size = sizes(layout, world_of(layout))
    stages = size.pp * SCHEDULES[layout.schedule].stages if size.pp > 1 else 1
    rows, micro = batch(layout, size, 12)
    train = f"train={{steps: 3, sequences: {rows}, micro_sequences: {micro}, seed: 5, device: cpu}}"
    return load_recipe(name, [*SHARED, *changes, *more, train, f"model.layers={4 if stages > 2 else 2}"])


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


def worth_repeating_in_fp32(layout: Layout) -> bool:
    """Two of each axis at most, every schedule and way of joining slices, every pair and triple: kernels and sums have
    other paths there, larger axes and recomputation have not."""
    plain = layout.checkpointing == "none" and (layout.sequence_parallel or layout.pp == 1)
    return max(getattr(layout, axis) for axis in ("dp_replicate", "dp_shard", "tp", "pp", "cp")) == 2 and plain


def in_fp32(system: str) -> list[str]:
    """All that a certificate is asked for, of the first system; of the others what fp64 repeats too."""
    first = system == next(iter(SYSTEMS))
    every = [layout for layout in matrix(KINDS[system], 8, PLAIN) if worth_repeating_in_fp32(layout)]
    return [spell(layout) for layout in every if first or worth_repeating(layout)]


def check(system: str, words: str, dtype: Any, *more: str) -> None:
    layout = parse_layout(words.split())
    found = verify_small(recipe_of(system, layout, *more), layout, dtype=dtype, timeout=60)
    assert found.passed, "\n".join(found.failures)
    assert found.ranks == world_of(layout) > 1
    assert found.lines
    assert all(line.gradient_norm > 0 for line in found.lines), "a gradient of zero proves nothing"


@pytest.mark.parametrize(("system", "words"), [(system, words) for system in SYSTEMS for words in layouts(system)])
def test_no_layout_changes_a_gradient(system, words):
    """Within 1e-10 of its norm in fp64, and what two steps of AdamW make of it within 1e-9."""
    check(system, words, "fp64")


@pytest.mark.parametrize(("system", "words"), [(system, words) for system in SYSTEMS for words in in_fp32(system)])
def test_nor_in_single_precision(system, words):
    """Within 1e-5 of its norm in fp32, updates within 1e-3."""
    check(system, words, "fp32")


@pytest.mark.parametrize("words", MATRICES)
def test_nor_an_update_of_whole_matrices(words):
    """Muon's: a slice of a matrix has other singular values, so that each is made whole first."""
    check("attention", words, "fp64", MUON)


@pytest.mark.parametrize("words", ["tp=2", "dp_shard=2"])
def test_muon_of_slices_is_seen(words, monkeypatch):
    monkeypatch.setattr(Spread, "matrices", None)
    layout = parse_layout(words.split())
    found = verify_small(recipe_of("attention", layout, MUON), layout, dtype="fp64", timeout=60)
    assert not found.passed
    assert found.worst_gradient.gradient_passed
    assert found.worst_update.update_error > 0.01


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(
    ("system", "words"),
    [
        ("s4d", "cp=2 cp_kinds=state"), ("attention", "cp=2 cp_kinds=ring"), ("attention", "dp_replicate=2 tp=2"),
        ("attention", "pp=2 dp_shard=2 schedule=zbv"),
    ],
)  # fmt: skip
def test_nothing_is_called_by_a_name_that_torch_will_drop(system, words):
    check(system, words, "fp32")


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_the_matrix_holds_what_it_is_meant_to(dtype):
    """Every axis, every schedule, and the pairs and triples of axes that are used together."""
    system = next(iter(SYSTEMS))
    words = in_fp32(system) if dtype == "fp32" else layouts(system)
    every = [parse_layout(text.split()) for text in words]
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
    for others in list(SYSTEMS)[1:]:
        held = [parse_layout(text.split()) for text in (in_fp32(others) if dtype == "fp32" else layouts(others))]
        assert {layout.schedule for layout in held if layout.pp == 2} == set(SCHEDULES)
        assert all(any(getattr(layout, axis) == 2 for layout in held) for axis in axes)
