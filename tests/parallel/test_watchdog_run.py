"""The watchdog in a run: it covers every phase up to the end, tells which one, and leaves slow progress alone."""

from __future__ import annotations

import functools
import time

import pytest

from potamos.data.loader import Windows
from potamos.parallel.launch import Rank
from potamos.parallel.watchdog import EXIT_CODE, Watchdog
from potamos.pretrain import checkpoint, evaluate, trainer
from potamos.slurm.run_folder import RunFolder

pytestmark = pytest.mark.distributed

SECONDS = 1.0  # a step takes hundredths, and the machine may be busy
FEW = ("train.steps=4", "validate={every: 3, sequences: 6}", "checkpoint={every: 2, keep: 2}")
FEW += ("train.micro_sequences=1", "telemetry.samples={every: 2, prompts: [a], tokens: 3}")
WATCHED = (*FEW, f"telemetry.watchdog={SECONDS}", "validate={every: 9, sequences: 6}")  # validation: at the end alone


class Noted(Watchdog):
    """Keeps what it was told, and whether it was watching then."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.told = []

    def beat(self, doing):
        self.told.append((doing, self._thread is not None and self._thread.is_alive()))
        super().beat(doing)


def test_every_phase_of_a_run_is_watched_and_has_its_name(trial, tmp_path, run_ranks, monkeypatch):
    monkeypatch.setattr(trainer, "Watchdog", Noted)

    def work(rank, world):
        made = trial.trainer(tmp_path / f"{world}", *FEW, rank=Rank(rank, world, rank, world))
        assert made.fit() == 0
        return made.watchdog.told

    step = lambda n: [f"step {n}", f"agreeing whether to stop after step {n}"]  # noqa: E731
    save = lambda n: [f"collecting the checkpoint of step {n}", f"writing the checkpoint of step {n}"]  # noqa: E731
    score = lambda n, batches: [f"validation on held_out after step {n}"] * batches  # noqa: E731
    sample = lambda n: [f"step {n}", f"samples after step {n}", f"agreeing whether to stop after step {n}"]  # noqa: E731
    start = ["opening the data", "building the model", "looking for a checkpoint", "opening the records"]
    for world in (1, 2):
        expected = [
            *start,
            *step(1),
            *sample(2),
            *save(2),
            "step 3",
            *score(3, 6 // world),
            step(3)[1],
            *sample(4),
            *save(4),
        ]
        expected += [*score(4, 6 // world), "the end of the run"]
        for told in run_ranks(world, work):
            assert [doing for doing, _ in told] == expected
            assert all(watching for _, watching in told)


def slow_rows(patch):
    """Six batches, each well within the limit, together beyond it."""
    read = Windows.read
    patch.setattr(Windows, "read", lambda *arguments: (time.sleep(0.4 * SECONDS), read(*arguments))[1])


@pytest.fixture
def ended(monkeypatch):
    """The exit codes that watchdogs would have ended this process with."""
    codes = []
    monkeypatch.setattr(trainer, "Watchdog", functools.partial(Watchdog, exit=codes.append, gather=0.05))
    return codes


def test_a_slow_validation_that_goes_on_is_no_hang(trial, tmp_path, monkeypatch, ended):
    slow_rows(monkeypatch)
    assert trial.fit(tmp_path / "run", *WATCHED) == 0
    assert ended == []
    assert not (tmp_path / "run" / "logs" / "hang.txt").exists()


def test_a_validation_that_told_nothing_would_be_taken_for_one(trial, tmp_path, monkeypatch, ended):
    slow_rows(monkeypatch)
    score = evaluate.score
    monkeypatch.setattr(trainer, "score", lambda *arguments, progress, **named: score(*arguments, **named))
    trial.fit(tmp_path / "run", *WATCHED)
    assert EXIT_CODE in ended


def in_the_last_save(patch):
    write = checkpoint._write_files
    patch.setattr(checkpoint, "_write_files", lambda folder, *rest: (stuck(folder.name), write(folder, *rest))[1])


def in_the_last_validation(patch):
    read = Windows.read
    patch.setattr(
        Windows, "read", lambda self, begin, size: (stuck("00000004" * (begin == 3)), read(self, begin, size))[1]
    )


def while_records_end(patch):
    done = trainer.write_done
    patch.setattr(trainer, "write_done", lambda *a, **n: (stuck("00000004"), done(*a, **n)))


def stuck(where):
    time.sleep(2.2 * SECONDS if "00000004" in where else 0)


PLACES = {
    in_the_last_save: "writing the checkpoint of step 4",
    in_the_last_validation: "validation on held_out after step 4",
    while_records_end: "the end of the run",
}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_what_hangs_at_the_end_is_reported_by_its_name(trial, tmp_path, monkeypatch, ended, place):
    place(monkeypatch)
    trial.fit(tmp_path / "run", *WATCHED)
    assert ended == [EXIT_CODE]
    report = (RunFolder.of(tmp_path / "run").path / "logs" / "hang.txt").read_text()
    assert repr(PLACES[place]) in report


def test_a_rank_that_is_stuck_before_the_first_step_is_named(trial, tmp_path, monkeypatch, run_ranks):
    """In the restore, for whose end the others wait. Groups are made without a collective that is counted, so where a
    rank hangs while the model is built its stack tells."""
    trial.fit(tmp_path / "run", *FEW[1:], "train.steps=2")

    def work(rank, world, owner, name):
        codes = []
        monkeypatch.setattr(trainer, "Watchdog", functools.partial(Watchdog, exit=codes.append, gather=1.0))
        real = getattr(owner, name)
        if rank == 1:
            monkeypatch.setattr(owner, name, lambda *a, **n: (time.sleep(4 * SECONDS), real(*a, **n))[1])
        trial.trainer(tmp_path / "run", *WATCHED, rank=Rank(rank, world, rank, world)).telemetry.close("ended")
        return codes

    places = {"restoring the checkpoint of step 2": (trainer.resume, "read_parameters")}
    places["building the model"] = (trainer, "apply")
    for doing, (owner, name) in places.items():
        assert run_ranks(2, functools.partial(work, owner=owner, name=name), timeout=60) == [[EXIT_CODE]] * 2
        report = tmp_path / "run" / "logs" / "hang.txt"
        words = report.read_text()
        assert "2 of 2 ranks report that nothing moves" in words
        assert ("Behind the others: rank 1." in words) is ("restoring" in doing)
        stuck = words[words.index("rank 1 on ") :].partition("rank 0 on")[0]
        assert repr(doing) in stuck
        assert "time.sleep(4 * SECONDS)" in stuck
        report.unlink()


def test_a_start_may_take_longer_than_a_step(tmp_path):
    codes = []
    dog = Watchdog(tmp_path, 0, 1, seconds=0.4, gather=0.0, exit=codes.append)
    with dog.starting("building"):
        time.sleep(0.5)
    assert codes == []
    with dog.starting("building"):
        time.sleep(0.8)
    assert codes == [EXIT_CODE]
    assert "'building'" in (tmp_path / "hang.txt").read_text()
    with dog:  # the limit of steps again
        time.sleep(0.55)
    assert codes == [EXIT_CODE] * 2
