"""Ranks read the same data, or none begins; where one cannot read on, all end with its message, and soon.

"All end" is what is hard: a rank that raises by itself leaves the others in a collective for minutes.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import time
from pathlib import Path

import pytest

from potamos.data.errors import CorruptShardError, DatasetError
from potamos.data.loader import Loader
from potamos.parallel import launch
from potamos.parallel.launch import PeerError, Rank
from potamos.pretrain import cli, guard
from potamos.pretrain.agreement import blank_rows
from potamos.pretrain.checkpoint import step_folders
from potamos.slurm.run_folder import RunFolder

SECONDS = 20.0  # a hang would last the collectives' timeout, 60 s; the two cores may be busy


def copy_of(dataset: Path, place: Path) -> Path:
    return shutil.copytree(dataset, place)


def flip_tokens(dataset: Path) -> None:
    """Damage every 8 KiB block of every shard's tokens, tar headers left alone, so that the first read meets it."""
    for shard in sorted(dataset.glob("*.tar")):
        content = bytearray(shard.read_bytes())
        for place in range(1024, len(content) - 1024, 512):
            if b".npy" not in content[place : place + 100] and b".json" not in content[place : place + 100]:
                content[place + 300] ^= 0xFF
        shard.write_bytes(content)


def at(dataset: Path) -> str:
    return f"data.stages=[{{from: 0, mixture: [{{path: {dataset}}}]}}]"


def outcome(action) -> tuple[str, float]:
    """The error of ``action`` as text, and how long it took."""
    began = time.monotonic()
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "no error", time.monotonic() - began


def ends(trial, run_ranks, run, changes, kind=None, world=2) -> list[str]:
    """The errors of all ranks; ``changes``: rank -> overrides."""

    def work(rank, size):
        guard.clear_stop()
        made = []

        def fit():
            place = Rank(rank, size, rank, size)
            made.append(trial.trainer(run, "train.micro_sequences=2", *changes(rank), rank=place, kind=kind))
            made[0].fit()

        found = outcome(fit)
        for trainer in made:
            trainer.checkpoints.wait()  # as a program does at its end; a forked rank just leaves
        return found

    found = run_ranks(world, work)
    assert max(seconds for _, seconds in found) < SECONDS
    return [error for error, _ in found]


# --- while training ---------------------------------------------------------------------------------------------------


def test_damage_that_one_rank_meets_ends_all(trial, run_ranks, tmp_path):
    """Rank 2's own copy is damaged behind tar headers and index, so only reading finds it."""
    damaged = copy_of(trial.folder / "train", tmp_path / "damaged")
    flip_tokens(damaged)
    whole = trial.folder / "train"
    errors = ends(trial, run_ranks, tmp_path / "run", lambda rank: [at(damaged if rank == 2 else whole)], world=4)
    assert errors[2].startswith(f"CorruptShardError: shard {damaged}")
    assert "crc32" in errors[2]
    told = errors[2].removeprefix("CorruptShardError: ")
    assert [error for i, error in enumerate(errors) if i != 2] == [f"PeerError: rank 2: {told}"] * 3
    alone, _ = outcome(lambda: trial.fit(tmp_path / "alone", at(damaged)))
    assert alone.startswith(f"CorruptShardError: shard {damaged}")


class Failing(Loader):
    """A loader whose read fails in a later step, as one over a network does."""

    def __next__(self):
        if self.rank == 1 and self.next_sample >= 40:
            raise OSError(5, "Input/output error", "far/shard.tar")
        return super().__next__()


def test_a_read_that_fails_in_mid_run_ends_all_and_keeps_what_was_saved(trial, run_ranks, tmp_path, monkeypatch):
    from potamos.pretrain import trainer

    monkeypatch.setattr(trainer, "Loader", Failing)
    run = tmp_path / "run"
    first, second = ends(trial, run_ranks, run, lambda _: [])
    assert second == "OSError: [Errno 5] Input/output error: 'far/shard.tar'"
    assert first == "PeerError: rank 1: [Errno 5] Input/output error: 'far/shard.tar'"
    assert sorted(step_folders(RunFolder.of(run).checkpoints)) == [4]
    assert len(trial.losses(run)) == 5, "the step whose rows were missing left no record"
    monkeypatch.undo()
    assert trial.fit(run, "train.micro_sequences=2") == 0
    assert trial.fit(tmp_path / "whole", "train.micro_sequences=2") == 0
    assert trial.losses(run) == pytest.approx(trial.losses(tmp_path / "whole"), rel=1e-5)


def test_damaged_held_out_text_ends_all(trial, run_ranks, tmp_path):
    damaged = copy_of(trial.folder / "held_out", tmp_path / "damaged")
    flip_tokens(damaged)
    path = {0: trial.folder / "held_out", 1: damaged}
    errors = ends(
        trial, run_ranks, tmp_path / "run", lambda rank: [f"data.validation=[{{path: {path[rank]}}}]", "train.steps=3"]
    )
    assert errors[1].startswith(f"CorruptShardError: shard {damaged}")
    assert errors[0] == f"PeerError: rank 1: {errors[1].removeprefix('CorruptShardError: ')}"


def test_blank_rows_have_the_counts_of_real_ones(trial, tmp_path):
    """Or the sum that carries the failure would have another length on the rank that failed."""
    made = trial.trainer(tmp_path / "run")
    blank = made.prepare(blank_rows(8, made.recipe.data.sequence_length))
    real = made.prepare(made.stream.read(0, 8))
    assert [batch.counts.keys() for batch in blank] == [batch.counts.keys() for batch in real]
    made.telemetry.close("built only")


def test_the_command_says_it_once_and_fails_on_every_rank(trial, run_ranks, tmp_path):
    damaged = copy_of(trial.folder / "train", tmp_path / "damaged")
    flip_tokens(damaged)

    def work(rank, world):
        changes = trial.overrides("train.micro_sequences=2", at(damaged if rank else trial.folder / "train"))
        sys.argv = ["potamos", "train", "h3_hybrid_tiny", *changes, "--run", str(tmp_path / "run")]
        text = io.StringIO()
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
            try:
                cli.main()
            except SystemExit as exit:
                return exit.code, text.getvalue()
        return None, text.getvalue()

    (first, told), (second, silent) = run_ranks(2, work, init=False)
    assert (first, second) == (2, 2)
    assert told.startswith(f"error: rank 1: shard {damaged}")
    assert silent == ""


# --- at the start -----------------------------------------------------------------------------------------------------


def test_ranks_with_other_data_do_not_begin(trial, run_ranks, tmp_path):
    others = {
        "train": at(trial.folder / "held_out"),
        "held_out": f"data.validation=[{{path: {trial.folder / 'train'}}}]",
    }
    for name, change in others.items():
        errors = ends(trial, run_ranks, tmp_path / name, lambda rank, change=change: [change] if rank else [])
        assert errors[1].startswith("DatasetError: the data on ")
        assert f"are not rank 0's: dataset {trial.folder}" in errors[1]
        assert "here," in errors[1]
        assert errors[0] == f"PeerError: rank 1: {errors[1].removeprefix('DatasetError: ')}"
        assert not (tmp_path / name / "checkpoints").exists()
    place = trial.folder / "train"
    later = f"data.stages=[{{from: 0, mixture: [{{path: {place}}}]}}, {{from: 8000, mixture: [{{path: {place}}}]}}]"
    for name, change in {"seed": "train.seed=6", "stages": later}.items():
        order = ends(trial, run_ranks, tmp_path / name, lambda rank, change=change: [change] if rank else [])
        assert "the order of samples" in order[1]


def test_a_tokenizer_that_one_rank_lacks_is_told_to_all(trial, run_ranks, tmp_path):
    missing = tmp_path / "missing" / "tokenizer.json"
    errors = ends(trial, run_ranks, tmp_path / "run", lambda rank: [f"tokenizer.path={missing}"] if rank else [])
    assert errors[1].startswith(f"ValueError: tokenizer.path: {missing} does not exist")
    assert errors[0] == f"PeerError: rank 1: {errors[1].removeprefix('ValueError: ')}"


def test_a_shard_that_one_rank_lacks_is_told_to_all(trial, run_ranks, tmp_path):
    lacking = copy_of(trial.folder / "train", tmp_path / "lacking")
    shard = sorted(lacking.glob("*.tar"))[1]
    shard.unlink()
    whole = trial.folder / "train"
    for missing in (0, 1):
        errors = ends(
            trial, run_ranks, tmp_path / f"run{missing}", lambda rank, m=missing: [at(lacking if rank == m else whole)]
        )
        assert errors[missing].startswith(f"CorruptShardError: shard {shard} is missing")
        assert errors[1 - missing] == f"PeerError: rank {missing}: {errors[missing].partition(': ')[2]}"


def test_shards_left_out_must_be_the_same_on_all(trial, run_ranks, tmp_path, capsys):
    lacking = copy_of(trial.folder / "train", tmp_path / "lacking")
    shard = sorted(lacking.glob("*.tar"))[1]
    shard.unlink()
    skip = "data.on_bad_shard=skip"
    errors = ends(
        trial, run_ranks, tmp_path / "run", lambda rank: [skip, at(lacking if rank else trial.folder / "train")]
    )
    assert f"lacks the shards ['{shard.name}'] here, none there" in errors[1]
    assert errors[0].startswith("PeerError: rank 1: the data on")
    assert ends(trial, run_ranks, tmp_path / "both", lambda _: [skip, at(lacking), "train.steps=2"]) == ["no error"] * 2
    assert f"1 shards are left out: {shard.name}" in RunFolder.of(tmp_path / "both").notes.read_text()


def test_fail_together_tells_the_first_of_several(run_ranks):
    def work(rank, world):
        mine = {0: None, 1: DatasetError("one"), 2: CorruptShardError("two"), 3: None}[rank]
        try:
            launch.fail_together(mine)
        except (PeerError, DatasetError) as error:
            return f"{type(error).__name__}: {error}"

    told = "PeerError: rank 1: one"
    assert run_ranks(4, work) == [told, "DatasetError: one", "CorruptShardError: two", told]
    with pytest.raises(DatasetError, match="alone"):
        launch.fail_together(DatasetError("alone"))
