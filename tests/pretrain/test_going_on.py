"""Who may go on with a run, and from where: one process at a time, one step for all ranks."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

from potamos.parallel.launch import Rank, together
from potamos.pretrain.checkpoint import CheckpointError
from potamos.pretrain.resume import RunBusyError, hold
from potamos.pretrain.spikes import SpikeGuard
from potamos.slurm.run_folder import RunFolder


def test_a_run_folder_has_one_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.of(tmp_path / "run")
    reading, writing = os.pipe()
    release_reading, release = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(release)  # so that it ends with this process, however that ends
        _held = hold(folder)
        os.write(writing, b"held")
        os.read(release_reading, 1)
        os._exit(0)
    os.read(reading, 4)
    with pytest.raises(RunBusyError, match=rf"in use by process {child} on .*another folder with --run"):
        hold(folder)
    assert list(folder.path.glob("busy.*")) == []  # nobody judges what was started by hand
    monkeypatch.setenv("POTAMOS_ATTEMPT", "3")
    with pytest.raises(RunBusyError):
        hold(folder)
    assert json.loads(folder.busy(3).read_text())["holder"] == f"process {child} on {socket.gethostname()}"
    os.write(release, b".")
    os.waitpid(child, 0)
    monkeypatch.setenv("POTAMOS_ATTEMPT", "4")
    (folder.path / ".undo").mkdir()  # what a killed submission replaced is not put back under what is trained
    hold(folder).close()  # a process that ended has let go
    assert not folder.busy(4).exists()
    assert not (folder.path / ".undo").exists()


def test_ranks_go_on_from_the_step_that_rank_0_chooses(trial, run_ranks, tmp_path: Path) -> None:
    """A folder that only rank 0 sees stops all ranks; one that all see gives all the same step."""
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    assert trial.fit(shared, "train.steps=4", "checkpoint={every: 2, keep: 3}") == 0
    shutil.copytree(shared, alone)
    newest = sorted((shared / "checkpoints").glob("step-*"))[-1]
    (newest / "trainer.json").write_text("{}")  # the newest is corrupt: both must take the one before

    def steps(rank: int, world: int) -> int:
        return trial.trainer(shared, rank=Rank(rank, world, rank, world)).step

    assert run_ranks(2, steps) == [2, 2]

    def apart(rank: int, world: int) -> str:
        folder = alone if rank == 0 else tmp_path / "empty"
        try:
            trial.trainer(folder, rank=Rank(rank, world, rank, world))
        except CheckpointError as error:
            return str(error)
        return "nothing was said"

    for said in run_ranks(2, apart):
        assert said.startswith("none of the 2 checkpoints in ")
        for step in (2, 4):
            missing = tmp_path / "empty" / "checkpoints" / f"step-{step:08d}" / "manifest.json"
            assert f"rank 1: {missing} is missing" in said


def test_together_raises_on_all(run_ranks) -> None:
    """A rank that failed keeps its own error, the others are told the first one's: in words, whatever its type."""

    def attempt(rank: int, world: int) -> str:
        def action() -> int:
            if rank == 1:
                raise ValueError("mine")
            if rank == 2:
                raise KeyError("a fault")
            return rank

        try:
            together(action)
        except (KeyError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    assert run_ranks(3, attempt) == ["PeerError: rank 1: mine", "ValueError: mine", "KeyError: 'a fault'"]
    assert run_ranks(2, lambda rank, world: together(lambda: rank)) == [0, 1]
    assert together(lambda: 5) == 5
    with pytest.raises(KeyError):
        together(lambda: {}["missing"])


def test_spikes_in_a_row_are_remembered_across_a_restart() -> None:
    """The last of `patience` spikes makes the guard forget; a restart in between must not begin the count again."""
    loss = torch.tensor(1.0)

    def fresh() -> SpikeGuard:
        return SpikeGuard(8, 3.0, patience=3)

    straight, before, after = fresh(), fresh(), fresh()
    normal = [torch.tensor(1.0 + 0.01 * i) for i in range(8)]
    spikes = [torch.tensor(50.0)] * 5
    expected = [bool(straight.accept(norm, loss)) for norm in [*normal, *spikes]]
    found = [bool(before.accept(norm, loss)) for norm in [*normal, *spikes[:2]]]
    after.load_tensors(before.state_tensors())
    found += [bool(after.accept(norm, loss)) for norm in spikes[2:]]
    assert expected == found
    assert expected[8:] == [False, False, False, True, True]


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RunBusyError, match="holds other files and no run; name a new folder with --run"):
        hold(RunFolder.of(tmp_path))
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_changes_are_kept_and_fewer_steps_than_trained_refused(trial, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert trial.fit(run, "train.steps=4") == 0
    with pytest.raises(ValueError, match=r"train\.steps: 3 is below the 4 steps that .* has trained"):
        trial.trainer(run, "train.steps=3")
    assert trial.fit(run, "train.steps=5") == 0
    assert "attempt 1  resumed with train.steps: 5 (was 4)" in RunFolder.of(run).notes.read_text()
