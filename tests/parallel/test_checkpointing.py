"""Recomputed, compiled and half-precision blocks: the same gradients, less memory kept."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from potamos.parallel import checkpointing, data
from potamos.parallel.apply import apply
from potamos.parallel.facts import Layout
from potamos.pretrain import setup

pytestmark = pytest.mark.distributed


def step(trial, run, rank, world, layout: Layout, *changes: str, dtype=torch.float64) -> dict[str, Any]:
    """Gradients of one step of a tiny hybrid under a layout, whole, and the bytes that its forward kept."""
    recipe = trial.recipe("model.layers=3", *changes)
    fill = setup.filler(recipe, torch.device("cpu"))
    made = trial.trainer(run / f"{rank}", "model.layers=3", "train.sequences=8", *changes)  # for its rows
    made.telemetry.close("built only")

    def filled(system, cut, shapes):
        fill(system, cut, shapes)
        system.to(dtype)

    compute = {"bf16": torch.bfloat16, "fp32": None}[recipe.train.precision]
    draft = setup.draft_system(recipe)
    spread = apply(draft, layout, rank, world, torch.device("cpu"), filled, compute)
    batches = made.prepare(made.stream.rows(torch.arange(8).numpy()))
    mine = batches[spread.data_index :: spread.sizes.data]
    spread.system.train()
    kept: dict[int, int] = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        spread.run(mine, [None] * len(mine), lambda out: out.terms["causal"].sum / 100)
    gradients = {name: spread.whole(name, p.grad) for name, p in spread.stored.items() if p.grad is not None}
    return {"gradients": gradients, "bytes": sum(kept.values())}


def worst(found, expected):
    whole = math.sqrt(sum(g.square().sum().item() for g in expected.values()))
    return max(
        ((found[n].double() - g.double()).norm() / max(g.norm().item(), 1e-6 * whole)).item()
        for n, g in expected.items()
    )


@pytest.fixture(scope="module")
def alone(trial, tmp_path_factory):
    return step(trial, tmp_path_factory.mktemp("alone"), 0, 1, Layout())


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("axes", [{}, {"tp": 2}, {"dp_shard": 2}, {"cp": 2}], ids=["alone", "tp", "dp_shard", "cp"])
def test_recomputed_blocks_have_the_same_gradients(trial, tmp_path, run_ranks, alone, mode, axes):
    layout = Layout(**{"dp_replicate": 1, **axes}, checkpointing=mode)
    world = math.prod(axes.values())
    ranks = run_ranks(world, lambda rank, world: step(trial, tmp_path, rank, world, layout))
    assert worst(ranks[0]["gradients"], alone["gradients"]) <= 1e-10
    if not axes:
        assert ranks[0]["bytes"] < {"full": 0.6, "selective": 0.9}[mode] * alone["bytes"]


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_block_that_forbids_recomputing_is_left_alone(trial, tmp_path, monkeypatch, alone, mode):
    """By the trait of one of its regions: it keeps what it would without, the others do not, and it runs once."""
    from potamos.pretrain.models.mixers import attention

    calls: list[bool] = []
    forward = attention.Attention.forward

    def counted(self, *arguments, **named):
        calls.append(True)
        return forward(self, *arguments, **named)

    monkeypatch.setattr(attention.Attention, "forward", counted)
    layout = Layout(checkpointing=mode)
    allowed = step(trial, tmp_path / "allowed", 0, 1, layout)
    twice = len(calls)
    calls.clear()
    traits = dataclasses.replace(attention.Attention.traits, checkpointing=False)
    monkeypatch.setattr(attention.Attention, "traits", traits)
    forbidden = step(trial, tmp_path / "forbidden", 0, 1, layout)
    assert twice == 2 * len(calls) > 0
    assert allowed["bytes"] < forbidden["bytes"] < alone["bytes"]
    assert worst(forbidden["gradients"], alone["gradients"]) <= 1e-10


class Counting(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        self.counts[operation] += 1
        return operation(*arguments, **(named or {}))


def test_selective_computes_what_it_keeps_once(trial, tmp_path):
    """The same gradients and less memory would come of keeping nothing at all, too, for the time of all products."""
    counts, plain = {}, "model.at={1: {mixer: {kind: attention, heads: 2}}}"
    for mode in ("none", "selective", "full"):
        with Counting() as counting:
            step(trial, tmp_path / mode, 0, 1, Layout(checkpointing=mode), plain)
        counts[mode] = counting.counts
    kept = [operation for operation in checkpointing.KEPT if counts["none"][operation]]
    assert any("scaled_dot_product" in str(operation) for operation in kept)
    assert any("mm" in str(operation) for operation in kept)
    for operation in kept:
        assert counts["selective"][operation] == counts["none"][operation] < counts["full"][operation], operation
    gelu = torch.ops.aten.gelu.default
    assert counts["none"][gelu] < counts["selective"][gelu] == counts["full"][gelu], "it does not keep all"


def test_what_is_recomputed_must_be_the_same(trial, tmp_path, monkeypatch, alone):
    """Dropout that draws anew would be another function in the backward: the comparison sees it."""
    from potamos.pretrain.models import trunk

    drop = trunk.dropout
    count = iter(range(10**6))

    def anew(x, p, *, key, positions):
        return drop(x, p, key=key, positions=positions + 1000 * next(count))

    monkeypatch.setattr(trunk, "dropout", anew)
    found = step(trial, tmp_path, 0, 1, Layout(checkpointing="full"), "model.residual_dropout=0.5")
    monkeypatch.undo()
    again = step(trial, tmp_path, 0, 1, Layout(checkpointing="full"), "model.residual_dropout=0.5")
    assert worst(found["gradients"], again["gradients"]) > 1e-2


def test_compiled_blocks_have_the_same_gradients(trial, tmp_path, alone):
    found = step(trial, tmp_path, 0, 1, Layout(compile="aot_eager", checkpointing="none"))
    assert worst(found["gradients"], alone["gradients"]) <= 1e-10


def test_sharded_half_precision_is_that_of_one_process(trial, tmp_path, run_ranks, monkeypatch):
    """bf16 blocks, fp32 norms, state-space parameters and sums: sharding rounds nothing that one process does not."""
    alone = step(trial, tmp_path / "one", 0, 1, Layout(), "train.precision=bf16", dtype=torch.float32)["gradients"]
    layout = Layout(dp_replicate=1, dp_shard=2)

    def work(rank, world):
        return step(trial, tmp_path, rank, world, layout, "train.precision=bf16", dtype=torch.float32)

    found = run_ranks(2, work)[0]["gradients"]
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert worst(found, alone) <= 1e-6
    monkeypatch.setattr(data, "_fp32_modules", lambda block: [])  # what one policy for all would do
    assert worst(run_ranks(2, work)[0]["gradients"], alone) > 1e-2
