"""A run that goes on under another layout: the same rows and losses, whatever axis had cut what is on the disk."""

from __future__ import annotations

from typing import Any

import pytest

from potamos.parallel.launch import Rank
from potamos.pretrain import resume

pytestmark = [pytest.mark.resume, pytest.mark.distributed]

MODEL = ("model.layers=4", "model.at={1: {mixer: {kind: attention, heads: 4}}}", "train.micro_sequences=1")
STEPS = 6


def attempt(trial, run, *changes, stop=-1, world=1):
    def work(rank: int, world: int) -> Any:
        read = []

        class Reading(trial.variant(stop=stop)):
            def prepare(self, rows):
                read.append((self.step, rows.samples.tolist()))
                return super().prepare(rows)

        made = trial.trainer(run, *changes, rank=Rank(rank, world, rank, world), kind=Reading)
        return made.fit(), read, made.spread.data_index

    return work


def layout(**axes: Any) -> tuple[str, int]:
    """The recipe's override, and how many processes it takes."""
    axes = {"dp_replicate": 1, **axes}
    world = 1
    for axis in ("dp_replicate", "dp_shard", "tp", "pp", "cp"):
        world *= axes.get(axis, 1)
    return "parallel={" + ", ".join(f"{k}: {v}" for k, v in axes.items()) + "}", world


ROUTES = {
    "4 -> 2 -> 8 data ranks": [{"dp_shard": 4}, {"dp_replicate": 2}, {"dp_replicate": 2, "dp_shard": 4}],
    "tp2 -> pp2 -> cp2": [{"tp": 2}, {"pp": 2}, {"cp": 2}],
    "pp2 x tp2 -> dp2 x cp2 -> 1": [{"pp": 2, "tp": 2}, {"dp_shard": 2, "cp": 2}, {}],
    "zbv x dp2 -> tp2 x dp2 -> interleaved": [
        {"pp": 2, "dp_shard": 2, "schedule": "zbv"}, {"tp": 2, "dp_shard": 2},
        {"pp": 2, "schedule": "interleaved_1f1b"},
    ],
}  # fmt: skip
SHARDED_STAGES = [{"dp_shard": 2, "pp": 2}, {"tp": 2}, {"dp_shard": 4}]


@pytest.fixture(scope="module")
def whole(trial, tmp_path_factory):
    """The run of one process from its first step to its last, per optimizer."""
    done = {}

    def fit(optimizer: str):
        if optimizer not in done:
            run = tmp_path_factory.mktemp("whole") / "run"
            assert attempt(trial, run, *MODEL, optimizer, f"train.steps={STEPS}")(0, 1)[0] == 0
            done[optimizer] = run
        return done[optimizer]

    return fit


ADAMW = "optimizer={kind: adamw, lr: 1.0e-3}"
MUON = "optimizer={kind: muon, lr: 1.0e-3, matrix_lr: 1.0e-3}"
OPTIMIZERS = {"adamw": ADAMW, "muon": MUON}


CASES = {f"{name}, {kind}": (route, o) for name, route in ROUTES.items() for kind, o in OPTIMIZERS.items()}
CASES["dp2 x pp2 -> tp2 -> dp4, muon"] = SHARDED_STAGES, MUON  # and AdamW, for what is no hidden matrix


@pytest.mark.parametrize(("route", "optimizer"), CASES.values(), ids=CASES)
def test_a_run_goes_on_under_another_layout(trial, tmp_path, run_ranks, whole, route, optimizer):
    run = tmp_path / "run"
    for number, axes in enumerate(route):
        change, world = layout(**axes)
        stop = 2 * (number + 1)
        work = attempt(
            trial, run, *MODEL, optimizer, f"train.steps={STEPS}", change, stop=stop - 1 if stop < STEPS else -1
        )
        ranks = run_ranks(world, work, timeout=100)
        assert {status for status, _, _ in ranks} == {0}
        for step in range(stop - 2, stop):
            rows = {index: dict(read)[step] for _, read, index in ranks}
            assert [n for i in sorted(rows) for n in rows[i]] == list(range(8 * step, 8 * step + 8))
    expected, found = (trial.history(path) for path in (whole(optimizer), run))
    assert [record["step"] for record in found] == [record["step"] for record in expected] == list(range(1, STEPS + 1))
    for name in ("loss", "gradient_norm/total", "gradient_norm/mixer", "gradient_norm/frontend"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in expected], rel=2e-5), name


@pytest.mark.parametrize("last", [{}, {"dp_replicate": 4}], ids=["one process", "replicas"])
def test_rows_keep_the_states_that_they_carry(trial, tmp_path, run_ranks, last):
    """Rows that go on in the next step: shards in replicas deal them in one order with the states on the disk."""
    changes = (*MODEL, ADAMW, "data.order=contiguous", "train.steps=4")
    assert attempt(trial, tmp_path / "whole", *changes)(0, 1)[0] == 0
    run = tmp_path / "run"
    for axes, stop in (({"dp_replicate": 2, "dp_shard": 2}, 1), (last, -1)):
        change, world = layout(**axes)
        run_ranks(world, attempt(trial, run, *changes, change, stop=stop), timeout=100)
        if stop > 0:
            states = trial.newest(run).carried
            assert states
            # Or it would not matter which row has which.
            assert all(len(set(map(str, leaf.tolist()))) == len(leaf) == 8 for leaf in states.values())
    expected, found = (trial.history(path) for path in (tmp_path / "whole", run))
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    for name in ("loss", "gradient_norm/total"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in expected], rel=2e-5), name


def test_the_comparison_sees_lost_moments(trial, tmp_path, run_ranks, whole, monkeypatch):
    monkeypatch.setattr(resume, "OwnMoments", lambda spread, stored: {})
    run = tmp_path / "run"
    for axes, stop in (({"tp": 2}, 1), ({"pp": 2}, -1)):
        change, world = layout(**axes)
        run_ranks(world, attempt(trial, run, *MODEL, ADAMW, f"train.steps={STEPS}", change, stop=stop), timeout=100)
    expected, found = (trial.history(path) for path in (whole(ADAMW), run))
    assert [r["loss"] for r in found] != pytest.approx([r["loss"] for r in expected], rel=1e-3)
