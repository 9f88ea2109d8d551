"""What the main rank does for all and cannot: all ranks end within seconds, and its words come first."""

from __future__ import annotations

import time

import pytest

from potamos.parallel import launch
from potamos.parallel.launch import PeerError, Rank
from potamos.pretrain import opening, telemetry, trainer
from potamos.pretrain.checkpoint import Checkpoints, Snapshot
from potamos.pretrain.generate import generate

pytestmark = pytest.mark.distributed

FEW = ("train.steps=2", "validate={every: 9, sequences: 6}", "train.micro_sequences=1")
FULL = "the disk of the main rank is full"


def failing(*_, **__):
    raise OSError(28, FULL)


PLACES = {
    "the folder of checkpoints": (Checkpoints, "_prepare", FEW),
    "the number of the attempt": (opening, "attempt_number", FEW),
    "the records": (telemetry, "RecordWriter", FEW),
    "the recipe": (opening, "write_atomically", FEW),
    "the environment": (opening, "write_environment", FEW),
    "a sample": (trainer, generate.__name__, (*FEW, "telemetry.samples={every: 1, prompts: [a], tokens: 3}")),
    "the snapshot": (Checkpoints, "_begin", FEW),
    "the end": (trainer, "write_done", FEW),
}


def outcome(action) -> tuple[str, str, float]:
    began = time.monotonic()
    try:
        action()
    except (OSError, ValueError) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "nothing", "", time.monotonic() - began


@pytest.mark.parametrize("place", PLACES)
def test_all_ranks_end_when_the_main_rank_fails(place, trial, tmp_path, run_ranks, monkeypatch):
    owner, name, changes = PLACES[place]

    def work(rank, world):
        if rank == 0:
            monkeypatch.setattr(owner, name, failing)
        return outcome(lambda: trial.trainer(tmp_path / "run", *changes, rank=Rank(rank, world, rank, world)).fit())

    found = run_ranks(2, work, timeout=60)
    (kind, words, _), *others = found
    assert kind == "OSError"
    assert FULL in words
    assert [(other[0], other[1]) for other in others] == [("PeerError", f"rank 0: {words}")]
    assert max(seconds for *_, seconds in found) < 20


def test_a_folder_that_cannot_be_made_is_named_on_all_ranks(tmp_path, run_ranks):
    """A file where the folder should be, as the main rank finds it; the others never look."""
    (tmp_path / "run").write_text("not a folder")

    def work(rank, world):
        return outcome(lambda: Checkpoints(tmp_path / "run" / "steps", main=rank == 0, together=launch.together))

    (kind, words, _), (peer, theirs, _) = run_ranks(2, work, timeout=30)
    assert (kind, peer) == ("CheckpointError", PeerError.__name__)
    assert "steps cannot be made ready for checkpoints: [Errno 20] Not a directory" in words
    assert theirs == f"rank 0: {words}"


def test_what_cannot_be_saved_is_refused_on_all_ranks(tmp_path, run_ranks):
    """In a save that nobody waits for as well: the next collective is steps away."""

    def work(rank, world):
        saved = Checkpoints(tmp_path / "steps", main=rank == 0, together=launch.together)
        return outcome(lambda: saved.save(Snapshot(step=1, next_sample=8, model={}, trainer={"a": {1}})))

    (kind, words, _), (peer, theirs, _) = run_ranks(2, work, timeout=30)
    assert (kind, peer) == ("CheckpointError", PeerError.__name__)
    assert theirs == f"rank 0: {words}"


def test_the_main_rank_alone_acts(run_ranks):
    def work(rank, world):
        acted = []
        value = launch.on_main(lambda: (acted.append(rank), 7)[1])
        return acted, value

    assert run_ranks(3, work) == [([0], 7), ([], None), ([], None)]
    assert launch.on_main(lambda: 7) == 7
