"""Whether a folder is free: one submission at a time, one job a run, by whatever way it was submitted."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from potamos.slurm import client, prepare
from potamos.slurm.checks import SubmitError
from potamos.slurm.client import QueueEntry, SlurmError
from potamos.slurm.job import Job
from potamos.slurm.lock import lock_holder
from potamos.slurm.prepare import SUBMIT_LOCK
from potamos.slurm.submit import resubmit, submit
from potamos.slurm.taken import held

RECIPE = "name: trial\ntrain: {steps: 12}\n"


class Queue:
    """In place of Slurm: `entries` wait or run; what is queued is number 12, 13, ...; ``refuses`` all."""

    def __init__(self) -> None:
        self.entries: dict[str, QueueEntry] = {}
        self.count = 11
        self.refuses = False

    def has(self, job: str, folder: Path, state: str = "RUNNING") -> None:
        self.entries[job] = QueueEntry(
            id=job, array=job.partition("_")[0] if "_" in job else None, state=state, reason="", nodes="n0",
            time_left=None, partition="main", start="", user="me", name="x", folder=str(folder),
        )  # fmt: skip

    def run(self, *argv: str, **_: object) -> str:
        if self.refuses:
            raise SlurmError(f"`{argv[0]}` says: no")
        self.count += "--test-only" not in argv and argv[0] == "sbatch"
        return f"{self.count}\n"

    def ask(self, jobs: set[str] | None = None, *, user: str | None = None) -> dict[str, QueueEntry]:
        return {each.id: each for each in self.entries.values() if jobs is None or {each.id, each.array} & set(jobs)}


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    fake = Queue()
    monkeypatch.setattr(client, "run", fake.run)
    monkeypatch.setattr(client, "queue", fake.ask)
    monkeypatch.setattr(prepare, "take_snapshot", lambda code: (code / "potamos").mkdir(parents=True, exist_ok=True))
    return fake


@pytest.fixture
def array(tmp_path: Path) -> Job:
    folder = tmp_path / "it's" / "arr"
    return Job(name="s", folder=folder, runs=(folder / "seed-0", folder / "seed-1"), tasks=(0, 1), array="0-1")


def alone(run: Path) -> Job:
    return Job(name="s", folder=run, runs=(run,))


# --- one job a run --------------------------------------------------------------------------------------------------


def test_a_run_of_an_array_that_runs_is_taken(queue: Queue, array: Job):
    submit(array, [RECIPE] * 2, "")
    queue.has("12_0", array.folder)
    with pytest.raises(SubmitError, match=r"seed-0 has job 12_0 already \(RUNNING\), which runs in .*arr; .*cancel"):
        submit(alone(array.runs[0]), [RECIPE], "")
    assert submit(alone(array.runs[1]), [RECIPE], "").ids == ("13",), "its own task is over"


def test_a_run_that_is_taken_is_in_no_array(queue: Queue, array: Job):
    submit(alone(array.runs[0]), [RECIPE], "")
    queue.has("12", array.runs[0], "PENDING")
    with pytest.raises(SubmitError, match=r"seed-0 has job 12 already \(PENDING\); .*potamos cancel .*/seed-0'"):
        submit(array, [RECIPE] * 2, "")
    (array.runs[0] / "attempts.jsonl").unlink()  # a submission that was killed before it could write that down
    with pytest.raises(SubmitError, match=r"seed-0 has job 12 already .*scancel 12\)"):
        submit(array, [RECIPE] * 2, "")
    assert queue.count == 12


def test_an_array_that_nobody_wrote_down_is_found_by_its_script(queue: Queue, array: Job):
    prepare.prepare(array, [RECIPE] * 2, "")
    queue.has("12_1", array.folder)
    with pytest.raises(SubmitError, match="seed-1 has job 12_1 already"):
        submit(alone(array.runs[1]), [RECIPE], "")
    assert submit(alone(array.runs[0]), [RECIPE], "").ids == ("12",)
    assert submit(alone(array.folder / "seed-9"), [RECIPE], "").ids == ("13",)


def test_a_job_in_the_folder_above_is_no_job_of_the_run(queue: Queue, tmp_path: Path):
    queue.has("12_0", tmp_path)  # someone's own array, submitted from there
    queue.has("15", tmp_path)
    assert submit(alone(tmp_path / "x"), [RECIPE], "").ids == ("12",)


def test_a_job_of_an_earlier_submission_elsewhere_counts(queue: Queue, array: Job):
    """The array's task goes on though the run's own job.json tells of a later submission."""
    submit(array, [RECIPE] * 2, "")
    submit(alone(array.runs[0]), [RECIPE], "")
    (array.folder / "submit.sbatch").unlink()
    queue.has("12_0", array.folder)
    with pytest.raises(SubmitError, match="has job 12_0 already"):
        resubmit(array.runs[0])


def test_a_moved_run_whose_job_goes_on_is_taken(queue: Queue, tmp_path: Path):
    submit(alone(tmp_path / "a"), [RECIPE], "")
    queue.has("12", tmp_path / "a")
    moved = (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(SubmitError, match=r"once no job of it waits or runs \(potamos status\): potamos submit"):
        resubmit(moved)
    with pytest.raises(SubmitError, match=r"b has job 12 already .* which runs in .*/a"):
        submit(alone(moved), [RECIPE], "")


def test_a_run_that_someone_trains_is_taken(queue: Queue, array: Job, held: Callable[[Path], Any], tmp_path: Path):
    submit(array, [RECIPE] * 2, "")
    with held(array.runs[1] / "lock"):
        for again in (lambda: submit(array, [RECIPE] * 2, ""), lambda: resubmit(array.runs[1])):
            with pytest.raises(SubmitError, match="seed-1 is trained by process 7 on vm; stop that first"):
                again()
        assert resubmit(array.runs[0]) == ["13"]


def test_who_only_reads_under_the_lock_holds_it_too(tmp_path: Path):
    """A shared lock keeps a run from starting as well."""
    lock = tmp_path / "lock"
    lock.write_text("process 8 on vm")
    with other(lock, "LOCK_SH"):
        assert lock_holder(lock) == "process 8 on vm"
    assert lock_holder(lock) is None


# --- one submission at a time ---------------------------------------------------------------------------------------


@contextmanager
def other(lock: Path, kind: str = "LOCK_EX") -> Iterator[None]:
    """Another process has the lock."""
    program = f"import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.{kind}); print(1, flush=True)"
    command = [sys.executable, "-c", f"{program}; input()", str(lock)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "1\n"
        yield
    finally:
        child.communicate("\n", timeout=30)


def test_every_run_is_held(queue: Queue, array: Job):
    array.runs[1].mkdir(parents=True)
    (array.runs[1] / SUBMIT_LOCK).touch()
    refused = pytest.raises(SubmitError, match="seed-1 is being submitted by another command")
    with other(array.runs[1] / SUBMIT_LOCK), refused:
        submit(array, [RECIPE] * 2, "")
    submit(array, [RECIPE] * 2, "")
    for run in array.runs:
        with other(run / SUBMIT_LOCK), pytest.raises(SubmitError, match="is being submitted by another command"):
            resubmit(run)


def _enter(job: Job, places: tuple[Path, ...], count: int, results: Any) -> None:
    got = 0
    for _ in range(count):
        try:
            with held(replace(job, runs=places)):
                mark = os.open(job.folder.parent / "inside", os.O_CREAT | os.O_EXCL)  # fails where two are inside
                os.close(mark)
                (job.folder.parent / "inside").unlink()
                got += 1
        except SubmitError:
            pass
    results.put(got)


def test_of_submissions_that_meet_one_at_a_time_gets_through(array: Job):
    """Each makes the folders, and removes them: a lock that was removed under another's hands is none."""
    array.folder.parent.mkdir()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    orders = (array.runs, array.runs[::-1])
    children = [context.Process(target=_enter, args=(array, runs, 100, results)) for runs in orders]
    for child in children:
        child.start()
    got = [results.get(timeout=20) for _ in children]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert sum(got) > 0


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between opening and locking, who held it has let go and removed it: a third would make another."""
    lock, take = tmp_path / "x" / SUBMIT_LOCK, fcntl.lockf

    def late(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "lockf", take)
        lock.unlink()
        take(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with held(alone(tmp_path / "x")):
        assert lock.exists()


def test_what_is_refused_leaves_only_folders_that_were_there(queue: Queue, array: Job):
    queue.refuses = True
    with pytest.raises(SlurmError, match="no"):
        submit(array, [RECIPE] * 2, "")
    assert not array.folder.exists()
    array.runs[0].mkdir(parents=True)
    with pytest.raises(SlurmError, match="no"):
        submit(array, [RECIPE] * 2, "")
    assert array.runs[0].is_dir()
    assert not array.runs[1].exists()


def test_a_sweep_may_have_more_runs_than_files_may_be_open(array: Job, monkeypatch: pytest.MonkeyPatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (96, hard))
    try:
        runs = tuple(array.folder / f"{k}" for k in range(100))
        with held(replace(array, runs=runs, tasks=tuple(range(100)), array="0-99")):
            assert all((run / SUBMIT_LOCK).exists() for run in runs)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
