"""A run that ended early and was taken up again is, bit for bit, the run that never ended.

Here attempts follow one another in one process, built anew each time; `test_kill.py` kills real ones. The comparison is
itself tested: of each thing that a resume could forget, one is forgotten on purpose.
"""

import re
import shutil

import pytest
import torch

from potamos.pretrain import carried
from potamos.pretrain.optim import Optimizer
from potamos.pretrain.spikes import SpikeGuard
from potamos.pretrain.trainer import Trainer

# Every run is poisoned alike, so that the count of skipped steps and the norms' history have something to remember.
POISON = {2: float("nan"), 8: 1e6}
CONFIGURATIONS = {
    "muon, fp32": (),
    "adamw, bf16": ("optimizer={kind: adamw, lr: 1.0e-2, spike: 6.0, window: 4}", "train.precision=bf16"),
    "muon, bf16, carried state": ("data.order=contiguous", "train.precision=bf16"),
    "windows of shards, samples left out": (
        "data.order=window",
        "data.window=2",
        "data.skip=[[20, 27], [48, 60], [88, 89]]",
        "data.stages=[{from: 0, mixture: [{path: TRAIN, weight: 3}, {path: HELD_OUT}]}]",
        "optimizer={kind: adamw, lr: 1.0e-2, spike: 6.0, window: 4}",
    ),
    "adamw, fp32, carried state": (
        "data.order=contiguous",
        "optimizer={kind: adamw, lr: 1.0e-2, spike: 6.0, window: 4}",
    ),
}
CARRIED = CONFIGURATIONS["adamw, fp32, carried state"]


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_a_run_in_pieces_equals_the_run_in_one(trial, tmp_path, changes):
    folders = {"TRAIN": str(trial.folder / "train"), "HELD_OUT": str(trial.folder / "held_out")}
    changes = [re.sub("TRAIN|HELD_OUT", lambda found: folders[found[0]], change) for change in changes]
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert trial.fit(whole, *changes, kind=trial.variant(poison=POISON)) == 0
    for crash in (2, 5):  # before the first save, and between two
        with pytest.raises(trial.Crash):
            trial.fit(pieces, *changes, kind=trial.variant(poison=POISON, crash=crash))
    assert trial.fit(pieces, *changes, kind=trial.variant(poison=POISON, stop=6)) == 0
    with pytest.raises(trial.Crash):
        trial.fit(pieces, *changes, kind=trial.variant(poison=POISON, crash=11))
    assert trial.fit(pieces, *changes, kind=trial.variant(poison=POISON)) == 0
    assert trial.differences(whole, pieces) == []
    assert trial.newest(whole).optimizer["guard.skipped"] == len(POISON)
    assert trial.newest(whole).carried.keys() == trial.newest(pieces).carried.keys()
    assert bool(trial.newest(whole).carried) == ("data.order=contiguous" in changes)
    records = trial.history(whole)
    assert [record["tokens"] for record in records] == [8 * 32 * step for step in range(1, 13)], "of what was trained"
    left_out = 20 if "data.order=window" in changes else 0
    assert records[-1]["next_sample"] == 8 * 12 + left_out


def test_looking_at_a_run_does_not_disturb_it(trial, tmp_path):
    """Validation and generation draw no random number of training's and leave no state behind."""
    watched, alone = tmp_path / "watched", tmp_path / "alone"
    samples = "telemetry={every: 1, samples: {every: 2, prompts: ['the river', ''], tokens: 5}}"
    assert trial.fit(watched, *CARRIED, samples, "validate={every: 1}") == 0
    assert trial.fit(alone, *CARRIED, "data.validation=[]") == 0
    assert trial.differences(watched, alone) == []


# --- the comparison itself ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(trial, tmp_path_factory):
    """A run that ended at step 9 with its last save at step 8, and the same run uninterrupted."""
    folder = tmp_path_factory.mktemp("stopped")
    assert trial.fit(folder / "whole", *CARRIED, kind=trial.variant(poison=POISON)) == 0
    with pytest.raises(trial.Crash):
        trial.fit(folder / "stopped", *CARRIED, kind=trial.variant(poison=POISON, crash=9))
    return folder


def forget_moments(patch):
    patch.setattr(Optimizer, "load_tensors", lambda self, tensors: None)


def forget_first_moment_of_one_parameter(patch):
    load = Optimizer.load_tensors
    name = "model.stack.blocks.0.mixer.q.weight.exp_avg"

    def forgetful(self, tensors):
        assert name in tensors
        load(self, {n: torch.zeros_like(t) if n == name else t for n, t in tensors.items()})

    patch.setattr(Optimizer, "load_tensors", forgetful)


def forget_count_of_updates(patch):
    load = Optimizer.load_tensors
    patch.setattr(
        Optimizer,
        "load_tensors",
        lambda self, tensors: load(
            self, {n: torch.zeros_like(t) if n.endswith(".step") else t for n, t in tensors.items()}
        ),
    )


def forget_guard(patch):
    patch.setattr(SpikeGuard, "load_tensors", lambda self, tensors: None)


def forget_carried_state(patch):
    patch.setattr(carried, "scatter", lambda stored, example, micro_batches, *_: [None] * micro_batches)


def swap_slots(patch):
    scatter = carried.scatter
    patch.setattr(carried, "scatter", lambda *arguments: scatter(*arguments)[::-1])


def restored(change):
    """A bug planted at the end of `Trainer.restore`."""

    def plant(patch):
        restore = Trainer.restore

        def wrong(self, loaded):
            restore(self, loaded)
            change(self)

        patch.setattr(Trainer, "restore", wrong)

    plant.__name__ = change.__name__
    return plant


def repeat_a_batch(trainer):
    trainer.next_sample -= trainer.recipe.train.sequences


def skip_a_batch(trainer):
    trainer.next_sample += trainer.recipe.train.sequences


def skip_a_step(trainer):
    trainer.step += 1


def round_the_parameters(trainer):
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.copy_(parameter.bfloat16())


BUGS = [
    forget_moments,
    forget_first_moment_of_one_parameter,
    forget_count_of_updates,
    forget_guard,
    forget_carried_state,
    swap_slots,
    *map(restored, [repeat_a_batch, skip_a_batch, skip_a_step, round_the_parameters]),
]


@pytest.mark.parametrize("bug", [None, *BUGS], ids=lambda bug: bug.__name__ if bug else "none")
def test_the_comparison_sees_what_a_resume_forgets(trial, stopped, tmp_path, monkeypatch, bug):
    shutil.copytree(stopped / "stopped", tmp_path / "run")
    if bug is not None:
        bug(monkeypatch)
    assert trial.fit(tmp_path / "run", *CARRIED, kind=trial.variant(poison=POISON)) == 0
    found = trial.differences(stopped / "whole", tmp_path / "run")
    assert bool(found) == (bug is not None), found
