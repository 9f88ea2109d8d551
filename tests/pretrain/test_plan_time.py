"""Times, bytes between ranks, hours, and which layouts are refused or recommended."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from potamos.parallel import axes, context, ring
from potamos.parallel.mesh import LayoutError, Sizes, sizes
from potamos.pretrain import plan_layouts, plan_time, show_plan
from potamos.pretrain.ceilings import CEILINGS, LINK_SHARE
from potamos.pretrain.config import load_recipe
from potamos.pretrain.plan_layouts import PlanError, Planner, changed_layout, check_fits
from potamos.pretrain.plan_memory import Memory, Moments, optimizer_bytes
from potamos.pretrain.plan_pipeline import bubble
from potamos.pretrain.plan_time import Costs, _link, bytes_sent, known_device, predict, step_time
from potamos.pretrain.plan_trace import trace
from potamos.pretrain.recipe import Recipe

TINY = (
    "model.width=96", "model.frontend.vocabulary=512", "model.layers=2", "data.sequence_length=64",
    "train={steps: 100, sequences: 16, micro_sequences: 2, seed: 1}",
)  # fmt: skip


def recipe(*changes: str) -> Recipe:
    return load_recipe("h3_hybrid_tiny", (*TINY, *changes))


def sent(of: Recipe, size: Sizes) -> dict[str, float]:
    micro = of.train.sequences // (size.data * of.train.micro_sequences)
    return bytes_sent(Costs(of), size, of.parallel.layout(), micro)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_of_tensor_ranks_are_what_the_axes_send(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the collectives of a traced step, against the formula; scores and maxima are left out of both."""
    counted = [0.0]
    gather, scatter = axes._gather, axes._scatter_sum

    def gathers(x, group, dim):
        counted[0] += x.numel() * x.element_size()  # (r-1)/r of r slices, r = 2
        return gather(x, group, dim)

    def scatters(x, group, dim):
        counted[0] += x.numel() * x.element_size() / 2
        return scatter(x, group, dim)

    monkeypatch.setattr(axes, "_gather", gathers)
    monkeypatch.setattr(axes, "_scatter_sum", scatters)
    tiny = recipe(f"train.precision={precision}")
    trace(tiny, tp=2)  # two micro-batches
    expected = bytes_sent(Costs(tiny), Sizes(tp=2), tiny.parallel.layout(), 2)["tp"]
    assert expected == pytest.approx(counted[0], rel=0.02)


def test_bytes_of_sequence_ranks_are_what_the_axes_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = [0.0]
    exchange = context.dist.all_to_all_single

    def exchanges(out, x, **more):
        counted[0] += x.numel() * x.element_size() / 2
        return exchange(out, x, **more)

    monkeypatch.setattr(context.dist, "all_to_all_single", exchanges)
    tiny = recipe("parallel.cp_kinds=[a2a]")
    trace(tiny, cp=2)
    expected = bytes_sent(Costs(tiny), Sizes(cp=2), tiny.parallel.layout(), 2)["cp"]
    assert expected == pytest.approx(counted[0], rel=0.02)


S4D = "model.mixer={kind: s4d, state: 16}"
H3 = "model.at={}"
RING = "model.mixer={kind: attention, heads: 4, kv_heads: 2}"


@pytest.mark.parametrize(
    ("changes", "cp", "tp"),
    [
        ((H3,), 2, 1),
        ((H3, "train.precision=bf16", "parallel.cp_order=contiguous"), 2, 2),
        ((H3, "model.mixer.head_dim=4"), 4, 1),
        ((S4D, H3), 4, 1),
        ((S4D, H3, "parallel.cp_kinds=[a2a]"), 4, 1),
        ((RING, H3, "parallel.cp_kinds=[a2a]"), 2, 1),
        ((RING, H3, "parallel.cp_kinds=[ring]", "train.precision=bf16"), 2, 2),
    ],
)
def test_bytes_of_each_way_to_join_slices(
    changes: tuple[str, ...], cp: int, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at the collectives of a traced step, against the formula; ids of documents are left out of it."""
    counted = [0.0]
    exchange, pass_on = context.dist.all_to_all_single, ring.Ring.pass_on

    def bytes_of(x: torch.Tensor) -> float:
        return float(x.numel() * x.element_size() * x.dtype.is_floating_point)

    class Gather(axes.Gather):  # those of slices; tensor ranks have their own
        @staticmethod
        def forward(ctx, x, group, dim):
            counted[0] += (cp - 1) * bytes_of(x)
            return axes.Gather.forward(ctx, x, group, dim)

        @staticmethod
        def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
            counted[0] += (cp - 1) / cp * bytes_of(gradient)
            return axes.Gather.backward(ctx, gradient)

    def exchanges(out, x, **more):
        counted[0] += bytes_of(x) * (cp - 1) / cp
        return exchange(out, x, **more)

    def passes(self, *tensors):
        counted[0] += sum(map(bytes_of, tensors))
        return pass_on(self, *tensors)

    monkeypatch.setattr(context, "Gather", Gather)
    monkeypatch.setattr(context.dist, "all_to_all_single", exchanges)
    monkeypatch.setattr(ring.Ring, "pass_on", passes)
    tiny = recipe(*changes)
    trace(tiny, cp=cp, tp=tp)  # two micro-batches through one layer of each kind
    costs = Costs(tiny)
    layers = len(costs.layers)
    expected = bytes_sent(costs, Sizes(cp=cp, tp=tp), tiny.parallel.layout(), 2)["cp"] / layers
    assert counted[0] > 0
    assert expected == pytest.approx(counted[0], rel=0.02)


def test_bytes_of_data_ranks() -> None:
    tiny = recipe()
    parameters = Costs(tiny).parameters
    assert sent(tiny, Sizes(dp_replicate=4)) == {"data": pytest.approx(2 * 3 / 4 * 4 * parameters)}
    shards = sent(tiny, Sizes(dp_shard=4))
    assert shards["data"] == pytest.approx(3 / 4 * 4 * parameters)
    micro = tiny.train.sequences // (4 * tiny.train.micro_sequences)
    assert shards["gather"] == pytest.approx(2 * micro * 3 / 4 * 4 * parameters)  # forward and backward of each
    both = sent(tiny, Sizes(dp_replicate=2, dp_shard=2))
    assert both["data"] == pytest.approx(4 * parameters * (1 / 2 + 2 * 1 / 2 / 2))


def test_one_device_computes_and_nothing_else() -> None:
    of = load_recipe("gpt_125m")
    ceiling = CEILINGS["h100"]
    time = step_time(Costs(of), Sizes(), ceiling, of.parallel.layout())
    tokens = of.train.sequences * of.data.sequence_length
    assert time.compute == pytest.approx(tokens * Costs(of).flops_per_token / (989e12 * ceiling.share(768)))
    assert (time.sent, time.bubble, time.tokens_per_second) == ({}, 0.0, pytest.approx(tokens / time.seconds))
    # The published run of this model on eight of these reached 474,800 tokens/s a GPU.
    assert time.tokens_per_second == pytest.approx(474_800, rel=0.03)


def test_what_is_computed_again_is_counted() -> None:
    of = load_recipe("h3_hybrid_125m")
    costs, layout = Costs(of), of.parallel.layout()
    plain, full, some = (
        step_time(costs, Sizes(), CEILINGS["h100"], replace(layout, checkpointing=mode)).compute
        for mode in ("none", "full", "selective")
    )
    layers = sum(map(sum, costs.layers))
    assert full / plain == pytest.approx((4 * layers + 3 * costs.output) / (3 * layers + 3 * costs.output))
    assert plain < some < full


def test_a_split_backward_calls_mixers_more_often() -> None:
    of = load_recipe("h3_hybrid_125m", ["model.layers=24", "model.frontend.vocabulary=512", "model.at={}"])
    costs, size = Costs(of), sizes(changed_layout(of, dp_replicate=1, pp=4).parallel.layout(), 4)
    once = step_time(costs, size, CEILINGS["h100"], replace(of.parallel.layout(), schedule="interleaved_1f1b"))
    split = step_time(costs, size, CEILINGS["h100"], replace(of.parallel.layout(), schedule="zero_bubble"))
    assert split.compute > once.compute
    assert split.bubble < once.bubble
    micro = of.train.sequences // of.train.micro_sequences
    assert once.formula == bubble("interleaved_1f1b", 4, micro)
    assert once.length > once.compute


def test_prediction_for_a_device() -> None:
    tiny = recipe("train.threads=1", "train.sequences=16")
    found = predict(tiny, 1, torch.device("cpu"))
    assert found is not None
    assert 0.5 < found / (90.6e9 / Costs(tiny).flops_per_token) < 1.0  # the optimizer's share of a step this small
    assert predict(tiny, 1, torch.device("meta")) is None
    assert known_device(torch.device("cpu")) is CEILINGS["cpu"]


# --- layouts --------------------------------------------------------------------------------------------------------


def test_the_best_layouts_fit_and_are_ranked() -> None:
    found = Planner(recipe("parallel.dp_replicate=2"), 2, "h100").plan()
    assert found.refused is None
    assert found.own in found.best
    speeds = [each.time.tokens_per_second for each in found.best]
    assert speeds == sorted(speeds, reverse=True)
    assert len({each.spelled for each in found.best}) == len(found.best) > 1
    assert all(each.memory.peak <= found.usable for each in found.best)


@pytest.mark.parametrize("between", [50e9, 1e6])
def test_the_search_finds_what_timing_every_layout_finds(between: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of rows among the others, wherever they lie by their time; the search goes on behind what does not fit."""
    monkeypatch.setitem(plan_layouts.CEILINGS, "h100", replace(CEILINGS["h100"], between=between, per_node=2))
    planner = Planner(recipe("model.layers=4"), 8, "h100")
    bytes_of = {1: 3, 2: 1, 4: 2, 8: 1}
    planner.usable = 4

    def memory(of: Recipe, size: Sizes) -> Memory:
        del of
        return Memory(bytes_of[size.cp] * (1 if size.dp_shard > 1 else 2), {"weights": 1}, "")

    monkeypatch.setattr(planner, "_memory", memory)
    every = []
    for changed in planner._candidates():
        try:
            every.append(planner.planned(changed))
        except LayoutError:
            continue
    assert {each.sizes.cp for each in every} == {1, 2, 4, 8}
    every.sort(key=lambda each: each.time.seconds)
    fits = [each for each in every if each.memory.peak <= planner.usable]
    found = planner.best(12)
    assert len(fits) < len(every)
    assert [each.time.seconds for each in found] == [each.time.seconds for each in fits[:12]]
    cuts = [each.sizes.cp > 1 for each in found]
    assert any(cuts)
    assert not all(cuts)


def test_what_is_sent_between_slices_moves_a_layout_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def place_of_slices() -> int:
        order = Planner(recipe("model.layers=4"), 8, "h100")._fastest_first()
        return next(i for i, (_, size, _) in enumerate(order) if size.cp == 2)

    before, real = place_of_slices(), plan_time._split_row
    monkeypatch.setattr(plan_time, "_split_row", lambda *given: 1e6 * real(*given))
    assert place_of_slices() > before


@pytest.mark.parametrize(("kind", "shards"), [("adamw", 2), ("muon", 1)])
def test_moments_of_many_layers_are_counted_from_two(kind: str, shards: int) -> None:
    """Against an optimizer of all of them; four layers of one kind, one of another."""
    tiny = recipe(f"optimizer={{kind: {kind}, lr: 1.0e-3}}", "model.layers=5")
    traced = trace(tiny)
    held = {traced.parameters[k]: n for k, n in {**Counter(traced.layers), "input": 1, "output": 1}.items()}
    assert sorted(held.values()) == [1, 1, 1, 4]
    every = [each for unit, count in held.items() for _ in range(count) for each in unit]
    assert Moments(tiny).bytes(held, shards) == optimizer_bytes(tiny, every, shards)


def test_hours_of_each_layout_are_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = Planner(recipe("parallel.dp_replicate=2", "train.steps=1000000000"), 2, "h100").plan()
    hours = [10**9 * each.time.seconds / 3600 for each in found.best]
    assert [found.hours(each) for each in found.best] == pytest.approx(hours)
    assert len({f"{count:,.1f}" for count in hours}) == len(hours) > 1
    show_plan.layouts(found)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "parallel." in line]
    assert [row[-1] for row in rows] == [f"{count:,.1f}" for count in hours]


def test_rows_are_split_where_nothing_else_will_do() -> None:
    """One micro-batch of all rows: data ranks have nothing to share, and the heads allow two tensor slices."""
    tiny = recipe("train.micro_sequences=16", "model.at={1: {mixer: {kind: attention, heads: 2}}}")
    planner = Planner(tiny, 4, "h100")
    found = planner.plan()
    assert {"cp 4", "cp 2 x tp 2"} <= {str(each.sizes) for each in found.best}
    assert {each.sizes.data for each in found.best} == {1}
    for each in found.best:
        assert planner.planned(each.recipe) == each
        assert each.memory.peak <= found.usable
    refused = Planner(recipe("parallel.tp=2", "parallel.pp=2"), 2, "h100").plan(9)
    assert refused.own is None
    assert {each.sizes.cp for each in refused.best} == {1, 2}


def test_what_the_trainer_refuses_is_refused_here() -> None:
    """Rows that go on in the next step: their states go with data ranks alone, and learned positions come to an end."""
    carried = recipe("data.order=contiguous", "parallel.tp=2", "parallel.dp_replicate=1")
    found = Planner(carried, 2, "h100").plan(9)
    assert found.own is None
    assert "data.order: contiguous carries states that only data parallelism deals yet" in (found.refused or "")
    assert {each.sizes.data for each in found.best} == {2}
    with pytest.raises(LayoutError, match="carries states that only data parallelism deals yet"):
        check_fits(carried, 2, "h100")
    ending = recipe("data.order=contiguous", "model.positions={kind: learned, max_length: 64}")
    with pytest.raises(ValueError, match=r"model\.positions has only 64"):
        Planner(ending, 1, "h100").plan()
    with pytest.raises(ValueError, match=r"model\.positions has only 64"):
        check_fits(ending, 1, "h100")


def test_what_cannot_fit_is_refused_with_the_nearest_change(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = recipe()
    needed = {
        rows: Planner(recipe(f"train.micro_sequences={rows}"), 1, "h100").planned(
            recipe(f"train.micro_sequences={rows}")
        ).memory.peak
        for rows in (2, 1)
    }  # fmt: skip
    assert needed[1] < needed[2]
    small = replace(CEILINGS["h100"], memory=int((needed[1] + needed[2]) / 2 / plan_layouts.NOT_REACHABLE))
    monkeypatch.setitem(plan_layouts.CEILINGS, "h100", small)
    with pytest.raises(PlanError, match=r"does not fit 1 x H100.*most of it.*fits: train.micro_sequences=1$"):
        check_fits(tiny, 1, "h100")
    check_fits(recipe("train.micro_sequences=1"), 1, "h100")
    monkeypatch.setitem(plan_layouts.CEILINGS, "h100", replace(small, memory=1000))
    with pytest.raises(PlanError, match="nothing that this program can change fits"):
        check_fits(tiny, 1, "h100")


@pytest.mark.parametrize(
    ("gpus", "changes", "refused"),
    [
        (2, ("parallel.tp=2", "parallel.pp=2", "parallel.dp_replicate=1"), "needs 4 processes, and this run has 2"),
        (4, ("train.sequences=4",), r"train.sequences: 4 is not a multiple of 4 data ranks"),
        (5, ("parallel.tp=5",), "parallel.tp: 5 does not divide"),
        (2, ("parallel.pp=2", "train.micro_sequences=16"), "1f1b over 2 stages cannot order 1 micro-batches"),
    ],
)
def test_a_layout_that_is_none_is_refused_beside_those_that_are(gpus, changes, refused) -> None:
    tiny = recipe(*changes)
    planner = Planner(tiny, gpus, "h100")
    found = planner.plan(1)
    assert found.own is None
    assert re.search(refused, found.refused or "")
    for each in found.best:
        assert planner.planned(each.recipe) == each  # which refuses what does not work
        assert each.sizes.world == gpus
    assert bool(found.best) is (gpus != 5)  # 16 rows of 2 at a time go to no five ranks
    with pytest.raises(LayoutError, match=refused):
        check_fits(tiny, gpus, "h100")


def overridden(of: Recipe, remedy: str) -> Recipe:
    """The recipe with what a message says to change."""
    words = [word for word in remedy.split() if "=" in word]
    assert words
    return recipe(*(f"parallel={{dp_shard: {of.parallel.dp_shard}}}", *words))


def test_the_last_words_of_a_refusal_are_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layout is refused for names processes that there are not, and changes with which it would not fit."""
    wide = recipe("parallel={dp_shard: 8}")
    refused = Planner(wide, 2, "h100").plan(0).refused or ""
    assert refused.startswith("parallel: dp_shard 8 needs 8 processes, and this run has 2")
    _, _, remedy = refused.rpartition("The fastest that fits 2 x H100 SXM: ")
    check_fits(overridden(wide, remedy), 2, "h100")

    needed = [
        Planner(wide, 1, "h100").planned(recipe("parallel={dp_shard: 1}", *changes)).memory.peak
        for changes in ((), ("train.micro_sequences=1", "parallel.checkpointing=full"))
    ]
    assert needed[1] < needed[0]
    small = replace(CEILINGS["h100"], memory=int((needed[0] + needed[1]) / 2 / plan_layouts.NOT_REACHABLE))
    monkeypatch.setitem(plan_layouts.CEILINGS, "h100", small)
    refused = Planner(wide, 1, "h100").plan().refused or ""
    assert ". No layout of 1 x H100 SXM fits with the recipe's micro-batches; what does: parallel.dp_" in refused
    check_fits(overridden(wide, refused.rpartition("what does: ")[2]), 1, "h100")
    monkeypatch.setitem(plan_layouts.CEILINGS, "h100", replace(small, memory=1000))
    refused = Planner(wide, 1, "h100").plan().refused or ""
    assert refused.endswith("nor with fewer rows at a time or parallel.checkpointing=full; take more devices")


def test_a_part_of_a_device_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The context of CUDA, NCCL's buffers and fragments: a run that needs 95 % does not fit."""
    assert Planner(recipe(), 1, "h100").usable == int(0.94 * 80e9)
    need = Planner(recipe(), 1, "h100").planned(recipe()).memory.peak
    for share, fits in ((0.93, True), (0.95, False)):
        monkeypatch.setitem(plan_layouts.CEILINGS, "h100", replace(CEILINGS["h100"], memory=int(need / share)))
        assert (Planner(recipe(), 1, "h100").plan(0).refused is None) is fits


def test_a_link_leaves_the_node_where_an_axis_does() -> None:
    """Ranks of tp, cp, dp_shard, dp_replicate and pp lie in this order, eight of them in a node."""
    h100, of = CEILINGS["h100"], recipe("train.sequences=32")
    assert h100.per_node == 8
    inside, between = LINK_SHARE * h100.inside, LINK_SHARE * h100.between
    assert between < inside
    for size, axis, speed in (
        (Sizes(tp=2, dp_shard=4), "gather", inside),
        (Sizes(tp=2, dp_shard=8), "gather", between),
        (Sizes(tp=2, dp_shard=8), "tp", inside),
        (Sizes(dp_shard=8, dp_replicate=2), "gather", inside),
        (Sizes(dp_shard=8, dp_replicate=2), "data", between),
        (Sizes(dp_replicate=8), "data", inside),
        (Sizes(dp_replicate=8, pp=2), "pp", between),
    ):
        assert _link(axis, size, h100) == speed, (size, axis)
    time = step_time(Costs(of), Sizes(dp_replicate=16), h100, changed_layout(of, dp_replicate=16).parallel.layout())
    assert time.links["data"] == time.sent["data"] / between


def test_gathers_longer_than_the_step_computes_are_waited_for() -> None:
    """With a link that all but stands still, nothing hides what FSDP gathers."""
    of = recipe("parallel={dp_shard: 2}")
    slow = replace(CEILINGS["h100"], inside=1e6)
    time = step_time(Costs(of), Sizes(dp_shard=2), slow, of.parallel.layout())
    assert time.exposed["gather"] == pytest.approx(time.sent["gather"] / (LINK_SHARE * 1e6) - time.compute)
    assert time.seconds == pytest.approx(time.length + time.exposed["gather"] + time.exposed["data"] + time.update)
    assert time.exposed["gather"] > 0.3 * time.seconds


def test_a_device_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="unknown device 'tpu'; known are h100"):
        Planner(recipe(), 1, "tpu")


def test_the_command(potamos: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    command = partial(potamos, "plan")
    status, out, err = command("h3_hybrid_tiny", *TINY, "--gpus", "2")
    assert status == 0, err
    for words in ("on 2 x H100 SXM: dp_replicate 2", "weights", "gradients", "optimizer", "activations of h3 + mlp",
                  "sums of gradients", "GPU-hours", "published", "(this recipe)"):  # fmt: skip
        assert words in out, words
    monkeypatch.setitem(plan_layouts.CEILINGS, "h100", replace(CEILINGS["h100"], memory=1000))
    status, out, err = command("h3_hybrid_tiny", *TINY, "--gpus", "1", "--layouts", "0")
    assert status == 2
    assert "does not fit 1 x H100 SXM" in err
    monkeypatch.undo()
    status, out, err = command("h3_hybrid_tiny", *TINY, "--gpus", "2", "parallel.tp=2", "parallel.pp=2")
    assert (status, "(this recipe)" in out) == (2, False)
    assert "its layout is refused" in out
    assert "parallel.dp_replicate=2" in out.partition("fastest that fit")[2]
    assert "error: parallel: pp 2 x tp 2 needs 4 processes" in err.replace("\n", " ")
    status, _, err = command("h3_hybrid_tiny", *TINY, "--gpus", "0")
    assert (status, "--gpus: 0 devices are none; give 1 or more" in err) == (2, True)
    status, out, _ = command("--help")
    assert (status, "Example: potamos plan" in out) == (0, True)
