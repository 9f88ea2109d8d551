"""What a layout becomes: scores of held-out text, ways of joining slices, stages of like cost, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from potamos.parallel.apply import Spread, apply
from potamos.parallel.checkpointing import compile_blocks
from potamos.parallel.facts import Layout
from potamos.parallel.launch import PeerError, Rank
from potamos.parallel.mesh import LayoutError
from potamos.parallel.pipeline import balanced
from potamos.pretrain import resume, setup
from potamos.pretrain.evaluate import EvaluationError
from potamos.pretrain.records import read_metrics

pytestmark = pytest.mark.distributed

MODEL = ("model.layers=4", "model.at={1: {mixer: {kind: attention, heads: 4}}}", "train.micro_sequences=1")
SCORED = (*MODEL, "validate={every: 6, sequences: 11}")


def spelled(axes: dict[str, Any]) -> str:
    return "parallel={" + ", ".join(f"{k}: {v}" for k, v in {"dp_replicate": 1, **axes}.items()) + "}"


def processes(axes: dict[str, Any]) -> int:
    return math.prod(axes.get(axis, 1) for axis in ("dp_replicate", "dp_shard", "tp", "pp", "cp"))


@pytest.fixture(scope="module")
def alone(trial, tmp_path_factory):
    made = trial.trainer(tmp_path_factory.mktemp("alone") / "run", *SCORED)
    made.validate()
    made.telemetry.close("built only")
    return read_metrics(made.folder.path)[0]


LAYOUTS = [
    {"tp": 2},
    {"cp": 2},
    {"pp": 2},
    {"pp": 2, "schedule": "zbv"},
    {"pp": 2, "dp_shard": 2},
    {"pp": 2, "dp_shard": 2, "schedule": "interleaved_1f1b"},
    {"cp": 2, "dp_shard": 2},
]


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_validation_scores_are_those_of_one_process(trial, tmp_path, run_ranks, alone, axes):
    """11 windows: ranks that share rows must not count them twice, nor the last stage alone see them."""
    run, world = tmp_path / "run", processes(axes)

    def work(rank: int, world: int) -> None:
        made = trial.trainer(run, *SCORED, spelled(axes), rank=Rank(rank, world, rank, world))
        made.validate()
        made.telemetry.close("built only")

    run_ranks(world, work)
    found = read_metrics(run)[0]
    for name in ("held_out/loss", "held_out/bits_per_byte"):
        assert found[name] == pytest.approx(alone[name], rel=1e-6), name


def test_buffers_are_the_same_from_the_start_and_never_sent(trial, tmp_path, run_ranks):
    """They are constants of the model: sending rank 0's before every forward would only cost time."""
    changes = (*MODEL, "model.positions={kind: rope}", "model.mixer={kind: attention, heads: 4}", "model.at={}")

    def work(rank: int, world: int) -> tuple[dict[str, torch.Tensor], bool]:
        made = trial.trainer(tmp_path / f"{world}", *changes, rank=Rank(rank, world, rank, world))
        made.telemetry.close("built only")
        buffers = dict(made.system.named_buffers())
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        for buffer in buffers.values():
            buffer.add_(rank)
        share = 8 // world
        made.train_step(made.stream.rows(torch.arange(rank * share, (rank + 1) * share).numpy()))
        return before, all(torch.equal(buffers[name], before[name] + rank) for name in buffers)

    (alone, _), (first, _), (second, kept) = work(0, 1), *run_ranks(2, work)
    assert alone
    assert not trial.different_tensors(alone, first)
    assert not trial.different_tensors(alone, second)
    assert kept


def test_sharded_stages_train_under_interleaved_schedules(trial, tmp_path, run_ranks):
    """Two stages on each rank, both sharded: the losses of one process."""
    changes = (*MODEL, "train.steps=3", "optimizer={kind: adamw, lr: 1.0e-3}")
    assert trial.fit(tmp_path / "whole", *changes) == 0
    for schedule in ("interleaved_1f1b", "looped_bfs"):
        run, axes = tmp_path / schedule, {"pp": 2, "dp_shard": 2, "schedule": schedule}

        def work(rank: int, world: int, run=run, axes=axes) -> int:
            return trial.trainer(run, *changes, spelled(axes), rank=Rank(rank, world, rank, world)).fit()

        assert run_ranks(4, work) == [0] * 4
        assert trial.losses(run) == pytest.approx(trial.losses(tmp_path / "whole"), rel=1e-5)


def build(trial, layout: Layout, rank: int, world: int, *changes: str) -> Spread:
    recipe = trial.recipe(*MODEL, *changes)
    draft, device = setup.draft_system(recipe), torch.device("cpu")
    length = recipe.data.sequence_length
    return apply(draft, layout, rank, world, device, setup.filler(recipe, device), length=length)


@pytest.mark.parametrize("world", [1, 2])
def test_what_cannot_be_measured_is_refused_by_all_stages(trial, tmp_path, run_ranks, world):
    """The last one alone sees that there is no such term; the others would wait for it."""

    def work(rank: int, world: int) -> tuple[str, str]:
        place = Rank(rank, world, rank, world)
        made = trial.trainer(tmp_path / "run", *MODEL, spelled({"pp": world}), rank=place)
        made.objective.options = made.objective.options.model_copy(update={"kind": "absent"})
        with pytest.raises((EvaluationError, PeerError)) as refused:
            made.validate()
        made.telemetry.close("built only")
        return type(refused.value).__name__, str(refused.value)

    words = "objective 'absent' has no term of its name to measure"
    expected = [("PeerError", f"rank 1: {words}"), ("EvaluationError", words)]
    assert run_ranks(world, work, timeout=20) == expected[-world:]


@pytest.mark.parametrize("shards", [3, 5])
def test_rows_that_do_not_divide_are_restored_whole(trial, run_ranks, shards):
    """Of every parameter, its elements numbered: what the ranks are given goes together to the same."""

    def work(rank: int, world: int) -> Any:
        spread = build(trial, Layout(dp_replicate=1, dp_shard=world), rank, world)
        numbered = {name: torch.arange(s.numel(), dtype=torch.float32).view(s) for name, s in spread.shapes.items()}
        with torch.no_grad():
            resume.read_parameters(spread, numbered)
        wrong = [
            name for name, p in spread.parameters.items() if not torch.equal(spread.whole(name, p), numbered[name])
        ]
        uneven = [name for name, s in spread.shapes.items() if s[0] % world]
        own = {name: spread.local(name, whole) for name, whole in numbered.items()}
        return wrong, uneven, own

    ranks = run_ranks(shards, work)
    assert [wrong for wrong, *_ in ranks] == [[]] * shards
    uneven = ranks[0][1]
    assert len(uneven) > 10, "the sizes of the model are to be such that rows do not divide"
    for name, first in ranks[0][2].items():
        together = torch.cat([own[name] for *_, own in ranks])
        assert torch.equal(together.flatten(), torch.arange(together.numel())), name
        assert together.shape[1:] == first.shape[1:]


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("kinds", [(), ("a2a",), ("ring",), ("state",)])
def test_slices_are_joined_and_dealt_as_the_layout_says(trial, run_ranks, order, kinds):
    def work(rank: int, world: int) -> Any:
        spread = build(trial, Layout(dp_replicate=1, cp=2, cp_order=order, cp_kinds=kinds), rank, world)
        blocks = spread.system.model.stack.blocks
        return blocks["0"].mixer.cp.kind, blocks["1"].mixer.cp.kind, blocks["1"].mixer.cp.held

    ranks = run_ranks(2, work)
    wanted = kinds[0] if kinds else None
    recurrent, attention = "a2a" if wanted == "a2a" else "state", "ring" if wanted == "ring" else "a2a"
    held = [[0, 3], [1, 2]] if order == "zigzag" else [[0], [1]]
    assert ranks == [(recurrent, attention, held[rank]) for rank in range(2)]


@pytest.mark.parametrize(
    ("axes", "length", "message"),
    [({"tp": 2}, 31, "31"), ({"cp": 2}, 30, "30"), ({"cp": 2, "tp": 2}, 36, "36")],
)
def test_rows_that_cannot_be_cut_are_refused_before_anything_starts(trial, run_ranks, axes, length, message):
    def work(rank: int, world: int) -> str:
        layout = Layout(**{"dp_replicate": 1, **axes})
        with pytest.raises(LayoutError) as refused:
            build(trial, layout, rank, world, f"data.sequence_length={length}")
        return str(refused.value)

    for words in run_ranks(processes(axes), work):
        assert "data.sequence_length" in words
        assert message in words


def test_stages_are_of_like_cost():
    """Against every way to cut, with an embedding and a dear last stage."""
    from itertools import combinations

    costs = [3.0, 1.0, 1.0, 4.0, 1.0, 5.0, 2.0]
    for stages in (1, 2, 3, 5, 7):
        cuts = balanced(costs, stages, first=1.0, last=6.0)

        def dearest(ranges) -> float:
            own = [math.fsum(costs[i] for i in r) for r in ranges]
            own[0] += 1.0
            own[-1] += 6.0
            return max(own)

        every = [
            [range(a, b) for a, b in zip((0, *at), (*at, len(costs)), strict=True)]
            for at in combinations(range(1, len(costs)), stages - 1)
        ]
        assert dearest(cuts) == min(map(dearest, every))
        assert [i for r in cuts for i in r] == list(range(len(costs)))
    with pytest.raises(LayoutError, match="8 stages need as many layers, the model has 7"):
        balanced(costs, 8)


def test_compiled_blocks_are_compiled():
    block = torch.nn.Linear(2, 2)
    compile_blocks([block], "aot_eager")
    assert block._compiled_call_impl is not None
    plain = torch.nn.Linear(2, 2)
    compile_blocks([plain], None)
    assert plain._compiled_call_impl is None
