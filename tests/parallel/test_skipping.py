"""One rank's gradient spoils a step, or all ranks' together do: every rank skips it, to the bit, and counts it once.

A rank that decides by itself goes on with other parameters than its neighbors, and no loss shows it at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.parallel.gradients import Gradients
from potamos.parallel.launch import Rank
from potamos.pretrain.records import read_metrics
from potamos.pretrain.trainer import Trainer

pytestmark = pytest.mark.distributed

MODEL = ("model.at={1: {mixer: {kind: attention, heads: 4}}}", "model.layers=2")
MODEL += (
    "train={steps: 7, sequences: 2, micro_sequences: 1, seed: 5, device: cpu}",
    "checkpoint={every: 99, keep: 1}",
    "validate={every: 99, sequences: 1}",
)
LAYOUTS = [{"tp": 2}, {"pp": 2}, {"cp": 2}, {"dp_shard": 2}]
STEP = 5  # finished steps before the one that is spoiled; the spike rule wants 4, half its window

Change = Callable[[Trainer, str, Tensor], Tensor]
"""(trainer, name, this rank's part of a gradient) -> what it is made to be."""


def plant(made: Trainer, change: Change) -> Callable[[], object]:
    """Change this rank's part of every gradient in the step to come; returns what ends it.

    Copies of one parameter (slices of sequences) each add their part to the sum, so there it is changed in the backward
    of every micro-batch; elsewhere when all sums are made, since a shard has no part of its own before.
    """
    if made.sizes.cp > 1:
        parts = made.spread.parameters.items()
        handles = [p.register_hook(lambda g, n=n: change(made, n, g) / made.micro_batches) for n, p in parts]
        return lambda: [handle.remove() for handle in handles]
    measure = made.norm.measure

    def planted() -> tuple[Tensor, Tensor]:
        for name, parameter in made.parameters.items():
            assert parameter.grad is not None
            parameter.grad.copy_(change(made, name, parameter.grad))
        return measure()

    made.norm.measure = planted
    return lambda: delattr(made.norm, "measure")


def own(made: Trainer) -> str:
    """The largest parameter of which this rank holds a part that no other rank of its axis holds."""
    cut = [n for n in made.parameters if made.sizes.tp == 1 or made.spread.cuts[n].dim is not None]
    return max((n for n in cut if not n.startswith("model.frontend.")), key=lambda n: made.parameters[n].numel())


def not_finite(value: float) -> Change:
    """One element of one gradient of the last rank, in one step."""

    def change(made: Trainer, name: str, gradient: Tensor) -> Tensor:
        changed = gradient.clone() if made.sizes.cp == 1 else gradient * made.micro_batches
        if made.step == STEP and made.rank.rank == 1 and name == own(made):
            changed.view(-1)[-1] = value
        return changed

    return change


def spike(made: Trainer, name: str, gradient: Tensor) -> Tensor:
    """Gradients whose norm is 5 at every step but one, whose two parts vary more than that one does.

    Parts are 3 and 4 in turns, then 4 and 4: 5.66. A part's own norms have a mean of 3.4 and a limit of 6.7.
    Slices of sequences hold summands of one gradient: 2 and 3 in turns, then 3 and 3.
    """
    large = made.step == STEP or (made.step + made.rank.rank) % 2 == 1
    norm = (2.0 if made.sizes.cp > 1 else 3.0) + large
    return torch.full_like(gradient, norm / math.sqrt(gradient.numel()) if name == own(made) else 0.0)


def state(made: Trainer) -> dict[str, Tensor]:
    """Everything that an accepted step changes on this rank, copied."""
    held = {f"parameter {name}": p.detach() for name, p in made.parameters.items()} | made.optimizer.state_tensors()
    return {name: tensor.clone() for name, tensor in held.items()}


def training(trial, run, axes: dict[str, Any], change: Change):
    """What each rank makes of such a run: {step: (refused, norm, whether nothing changed)}, and its guard's state."""

    def work(rank: int, world: int) -> tuple[dict[int, tuple[bool, float, bool]], dict[str, Tensor]]:
        steps = {}

        class Planted(trial.variant()):
            def train_step(self, rows):
                before, end = state(self), plant(self, change)
                result = super().train_step(rows)
                end()
                unchanged = not trial.different_tensors(before, state(self))
                steps[self.step] = (bool(result.refused), float(result.norm), unchanged)
                return result

        layout = "parallel={" + ", ".join(f"{k}: {v}" for k, v in {"dp_replicate": 1, **axes}.items()) + "}"
        made = trial.trainer(run, *MODEL, layout, rank=Rank(rank, world, rank, world), kind=Planted)
        assert made.fit() == 0
        return steps, made.guard.state_tensors()

    return work


def check(trial, run, ranks) -> None:
    """Both ranks refuse that step and no other, change nothing in it, and know the same of it."""
    for steps, guard in ranks:
        assert {step: refused for step, (refused, _, _) in steps.items()} == {s: s == STEP for s in range(7)}
        assert {step: unchanged for step, (_, _, unchanged) in steps.items()} == {s: s == STEP for s in range(7)}
        assert guard["skipped"] == 1
        assert not trial.different_tensors(guard, ranks[0][1])
        assert [norm for _, norm, _ in steps.values()] == pytest.approx(
            [n for _, n, _ in ranks[0][0].values()], nan_ok=True
        )
    records = [record for record in read_metrics(run) if record["kind"] == "train"]
    assert [record["skipped_steps"] for record in records] == [0] * 5 + [1, 1]
    assert all(math.isfinite(record["loss"]) for record in records)


def decide_alone(patch) -> None:
    """Each rank takes the norm of what it holds for that of all."""
    squares = Gradients.squares

    def alone(self, kinds, count):
        mesh, self.mesh = self.mesh, SimpleNamespace(size=lambda *axes: 1, index=self.mesh.index)
        try:
            return squares(self, kinds, count)
        finally:
            self.mesh = mesh

    patch.setattr(Gradients, "squares", alone)


@pytest.mark.parametrize(("axes", "value"), list(zip(LAYOUTS, [math.nan, math.inf] * 2, strict=True)), ids=str)
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(trial, tmp_path, run_ranks, axes, value):
    ranks = run_ranks(2, training(trial, tmp_path / "run", axes, not_finite(value)))
    check(trial, tmp_path / "run", ranks)
    assert not math.isfinite(ranks[0][0][STEP][1])


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_a_spike_that_no_rank_sees_by_itself_is_skipped_by_all(trial, tmp_path, run_ranks, axes):
    ranks = run_ranks(2, training(trial, tmp_path / "run", axes, spike))
    check(trial, tmp_path / "run", ranks)
    norms = [norm for _, norm, _ in ranks[0][0].values()]
    assert norms == pytest.approx(
        [6 if "cp" in axes and s == STEP else 32**0.5 if s == STEP else 5 for s in range(7)], rel=1e-5
    )


@pytest.mark.parametrize(
    ("axes", "change"),
    [
        ({"tp": 2}, spike),
        ({"pp": 2}, not_finite(math.nan)),
        ({"cp": 2}, not_finite(math.nan)),
        ({"dp_shard": 2}, spike),
    ],
    ids=["tp, spike", "pp, nan", "cp, nan", "dp_shard, spike"],
)
def test_ranks_that_decide_alone_are_seen(trial, tmp_path, run_ranks, monkeypatch, axes, change):
    decide_alone(monkeypatch)
    ranks = run_ranks(2, training(trial, tmp_path / "run", axes, change))
    with pytest.raises(AssertionError):
        check(trial, tmp_path / "run", ranks)
