"""What is made of sbatch's answers: dependencies, nodes that are away, and no answer at all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potamos.slurm import client, prepare, sbatch
from potamos.slurm.attempt import jobs_of
from potamos.slurm.checks import SubmitError
from potamos.slurm.client import QueueEntry, SlurmError
from potamos.slurm.job import Job
from potamos.slurm.sbatch import UnheardError
from potamos.slurm.submit import resubmit, submit

OLD, NEW = "name: trial\ntrain: {steps: 12}\n", "name: trial\ntrain: {steps: 24}\n"
TIMEOUT = SlurmError("`sbatch` did not answer within 120 s: the controller may be down; see `scontrol ping`")


class Slurm:
    """In place of Slurm. ``loses``: by the count of jobs, what is raised though (``queues``) the job was queued.
    ``silent``: squeue does not answer. ``jobs``: what scontrol knows. ``nodes``: sinfo's lines."""

    def __init__(self) -> None:
        self.folder, self.names, self.count = Path(), ("trial", "trial"), 11
        self.entries: dict[str, QueueEntry] = {}
        self.loses: dict[int, BaseException] = {}
        self.queues, self.silent, self.impossible = True, False, False
        self.jobs: dict[str, str] = {}
        self.nodes: list[str] = []
        self.calls: list[tuple[str, ...]] = []
        self.patience: list[float | None] = []

    def run(self, *argv: str, timeout: float | None = None, check: bool = True) -> str:
        self.calls.append(argv)
        if argv[0] == "sinfo":
            return "".join(line.replace("|", client.SEPARATOR) + "\n" for line in self.nodes)
        if argv[:3] == ("scontrol", "show", "job"):
            if argv[3] not in self.jobs:
                raise SlurmError("`scontrol` says: slurm_load_jobs error: Invalid job id specified")
            return self.jobs[argv[3]]
        if argv[0] == "scancel":
            for number in argv[1:]:
                self.entries.pop(number, None)
            return ""
        assert argv[0] == "sbatch", argv
        self.patience.append(timeout)
        if "--test-only" in argv:
            if self.impossible:
                raise SlurmError("`sbatch` says: allocation failure: Requested node configuration is not available")
            return ""
        lost = self.loses.get(self.count + 1)
        if lost is None or self.queues:
            self.count += 1
            (where,) = [word.partition("=")[2] for word in argv if word.startswith("--chdir=")]
            tasks = [word.partition("=")[2] for word in argv if word.startswith("--array=")]
            self.has(str(self.count) + (f"_{tasks[0]}" if tasks else ""), where)
        if lost is not None:
            raise lost
        return f"{self.count}\n"

    def has(self, job: str, folder: object, name: str = "trial") -> None:
        self.entries[job] = QueueEntry(
            id=job, array=job.partition("_")[0] if "_" in job else None, state="PENDING", reason="", nodes="",
            time_left=None, partition="main", start="", user="me", name=name, folder=str(folder),
        )  # fmt: skip

    def queue(self, jobs: Any = None, *, user: str | None = None) -> dict[str, QueueEntry]:
        if self.silent:
            raise SlurmError("`squeue` did not answer within 30 s")
        return {each.id: each for each in self.entries.values() if jobs is None or {each.id, each.array} & set(jobs)}


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    fake = Slurm()
    monkeypatch.setattr(client, "run", fake.run)
    monkeypatch.setattr(client, "queue", fake.queue)
    monkeypatch.setattr(sbatch, "LOOKS", (0.0, 0.01))
    monkeypatch.setattr(prepare, "take_snapshot", lambda code: (code / "potamos").mkdir(parents=True, exist_ok=True))
    return fake


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(name="trial", folder=tmp_path / "a b", runs=(tmp_path / "a b",), nodes=3)


def recipe(job: Job) -> str:
    return (job.folder / "recipe.yaml").read_text()


# --- dependencies ---------------------------------------------------------------------------------------------------


def test_a_job_that_nobody_knows_is_not_waited_for(slurm: Slurm, job: Job):
    with pytest.raises(SubmitError, match=r"--after: neither squeue nor scontrol knows job 999999.*leave out --after"):
        submit(job, [OLD], "", after="999999")
    assert slurm.count == 11
    assert not job.folder.exists()


@pytest.mark.parametrize("state", ["COMPLETED", "PENDING", "RUNNING", "COMPLETING"])
def test_a_job_that_is_known_is_waited_for(slurm: Slurm, job: Job, state: str):
    slurm.jobs["7"] = f"JobId=7 JobName=x UserId=me(1) GroupId=me(1) JobState={state} Reason=None\n"
    assert submit(job, [OLD], "", after="7").ids == ("12",)


def test_a_job_that_only_squeue_knows_is_waited_for(slurm: Slurm, job: Job):
    slurm.has("7_2", "/elsewhere")
    assert submit(job, [OLD], "", after="7").ids == ("12",)


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"])
def test_a_job_that_has_failed_is_not_waited_for(slurm: Slurm, job: Job, state: str):
    slurm.jobs["7"] = f"JobId=8 ArrayJobId=7 JobState=COMPLETED\nJobId=9 ArrayJobId=7 JobState={state}\n"
    with pytest.raises(SubmitError, match=f"--after: job 7 is {state}, so what waits for its success would never run"):
        submit(job, [OLD], "", after="7")


def test_that_scontrol_does_not_answer_is_not_that_it_knows_no_such_job(
    slurm: Slurm, job: Job, monkeypatch: pytest.MonkeyPatch
):
    def away(*_: str) -> list[dict[str, str]]:
        raise SlurmError("`scontrol` did not answer within 30 s")

    monkeypatch.setattr(client, "show", away)
    with pytest.raises(SlurmError, match="`scontrol` did not answer"):
        submit(job, [OLD], "", after="7")


# --- nodes that are away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["drained", "draining", "down", "down*", "idle*"])
def test_nodes_that_are_away_are_waited_for(slurm: Slurm, job: Job, state: str):
    slurm.impossible = True
    slurm.nodes = ["main*|n0|idle|(null)|8|100", "main*|n1|allocated|(null)|8|100", f"main*|n2|{state}|(null)|8|100"]
    found = submit(job, [OLD], "")
    assert found.ids == ("12",)
    assert found.remarks == (f"the job waits until nodes return: n2 is {state.rstrip('*')}",)


@pytest.mark.parametrize(
    "last",
    [
        "main*|n2|idle|(null)|8|100",  # nothing is away
        "other|n2|drained|(null)|8|100",
        "main*|n1|drained|(null)|8|100",  # still too few
        "main*|n2|drained|(null)|0|100",  # nor would it do
    ],
)
def test_what_cannot_run_when_all_nodes_are_back_is_refused(slurm: Slurm, job: Job, last: str):
    slurm.impossible = True
    slurm.nodes = ["main*|n0|idle|(null)|8|100", "main*|n1|idle|(null)|8|100", last]
    if "|n1|drained" in last:
        slurm.nodes.pop(1)
    with pytest.raises(SlurmError, match="Requested node configuration is not available"):
        submit(job, [OLD], "")
    assert slurm.count == 11


# --- no answer ------------------------------------------------------------------------------------------------------

LOST = [
    TIMEOUT,
    SlurmError("`sbatch` says: Socket timed out on send/recv operation"),
    SlurmError("`sbatch` says: exit -9"),
]


def test_sbatch_is_waited_for(slurm: Slurm, job: Job):
    """A busy controller takes more than the half minute that the other commands have."""
    submit(job, [OLD], "")
    assert slurm.patience == [120, 120]


@pytest.mark.parametrize("lost", LOST, ids=["deadline", "socket", "killed"])
def test_a_job_that_was_queued_without_an_answer_counts(slurm: Slurm, job: Job, lost: SlurmError):
    submit(job, [OLD], "")
    slurm.entries.clear()
    slurm.has("3", "/elsewhere")
    slurm.has("4", job.folder, name="another")
    slurm.entries.pop("4")
    slurm.loses[14] = lost
    assert submit(job, [NEW], "", chain=3).ids == ("13", "14", "15")
    assert recipe(job) == NEW
    assert jobs_of(job.folder) == ["12", "13", "14", "15"]
    assert json.loads((job.folder / "job.json").read_text())["ids"] == ["13", "14", "15"]
    assert not list(job.folder.glob(".*"))


def test_a_job_that_comes_into_the_queue_late_is_seen(slurm: Slurm, job: Job, monkeypatch: pytest.MonkeyPatch):
    slurm.loses[12], slurm.queues = TIMEOUT, False
    sleep = time.sleep

    def meanwhile(seconds: float) -> None:
        if seconds:
            slurm.has("12", job.folder)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", meanwhile)
    assert submit(job, [OLD], "").ids == ("12",)


def test_another_job_in_the_folder_is_not_taken_for_ours(slurm: Slurm, job: Job, monkeypatch: pytest.MonkeyPatch):
    slurm.loses[12], slurm.queues = TIMEOUT, False
    monkeypatch.setattr(time, "sleep", lambda _: slurm.has("12", job.folder, name="someone's"))
    with pytest.raises(SlurmError, match="did not answer within 120 s"):
        submit(job, [OLD], "")
    assert not job.folder.exists()


def test_a_task_that_was_queued_without_an_answer_is_told_from_others(slurm: Slurm, tmp_path: Path):
    folder = tmp_path / "arr"
    runs = (folder / "seed-3", folder / "seed-8")
    submit(Job(name="trial", folder=folder, runs=runs, tasks=(3, 8), array="3,8"), [OLD] * 2, "")
    slurm.entries.clear()
    slurm.has("12_3", folder)
    slurm.loses[13] = TIMEOUT
    assert resubmit(runs[1]) == ["13"]
    assert jobs_of(runs[1]) == ["12_8", "13_8"]


@pytest.mark.parametrize("lost", [*LOST, KeyboardInterrupt()], ids=["deadline", "socket", "killed", "interrupt"])
def test_without_an_answer_and_without_a_job_all_is_put_back(slurm: Slurm, job: Job, lost: BaseException):
    submit(job, [OLD], "")
    slurm.entries.clear()
    slurm.loses[13], slurm.queues = lost, False
    with pytest.raises(type(lost)):
        submit(job, [NEW], "")
    assert recipe(job) == OLD
    assert not list(job.folder.glob(".*"))


@pytest.mark.parametrize("lost", [TIMEOUT, KeyboardInterrupt()], ids=["deadline", "interrupt"])
@pytest.mark.parametrize("queues", [True, False])
def test_where_slurm_does_not_say_nothing_is_put_back_unsaid(
    slurm: Slurm, job: Job, monkeypatch: pytest.MonkeyPatch, lost: BaseException, queues: bool
):
    submit(job, [OLD], "")
    slurm.entries.clear()
    slurm.loses[13], slurm.queues = lost, queues
    run = slurm.run

    def falls_silent(*argv: str, **named: Any) -> str:
        slurm.silent = argv[0] == "sbatch" and "--test-only" not in argv
        return run(*argv, **named)

    monkeypatch.setattr(client, "run", falls_silent)
    with pytest.raises(UnheardError, match=r"`squeue` did not answer.*a b was left as .* squeue --user .*submit again"):
        submit(job, [NEW], "")
    assert recipe(job) == NEW, "for the job may train it"
    slurm.silent, slurm.loses = False, {}
    if queues:
        with pytest.raises(SubmitError, match=r"has job 13 already .*scancel 13\)"):
            submit(job, [NEW], "")
    else:
        assert resubmit(job.folder) == ["13"]
        assert recipe(job) == OLD


@pytest.mark.parametrize("chain", [1, 2])
def test_an_interrupt_after_the_job_was_queued(slurm: Slurm, job: Job, chain: int):
    slurm.loses[11 + chain] = KeyboardInterrupt()
    ids = ["12", "13"][:chain]
    with pytest.raises(
        SubmitError, match=f"interrupted, but job {', '.join(ids)} is in the queue already.*potamos can"
    ):
        submit(job, [NEW], "", chain=2)
    assert jobs_of(job.folder) == ids
    assert recipe(job) == NEW
    assert not list(job.folder.glob(".*"))


def test_an_interrupt_while_the_job_is_written_down(slurm: Slurm, job: Job, monkeypatch: pytest.MonkeyPatch):
    from potamos.slurm import submit as module

    note = module.note_submission

    def interrupted(run: Path, jobs: list[str]) -> None:
        monkeypatch.setattr(module, "note_submission", note)
        note(run, jobs)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "note_submission", interrupted)
    with pytest.raises(SubmitError, match="interrupted, but job 12 is in the queue"):
        submit(job, [NEW], "")
    assert jobs_of(job.folder) == ["12"]


def test_a_chain_that_cannot_be_taken_back_is_told(slurm: Slurm, job: Job, monkeypatch: pytest.MonkeyPatch):
    run: Callable[..., str] = slurm.run

    def refuses(*argv: str, **named: Any) -> str:
        if argv[0] == "scancel" or (argv[0] == "sbatch" and slurm.count == 12 and "--test-only" not in argv):
            raise SlurmError(f"`{argv[0]}` says: no")
        return run(*argv, **named)

    monkeypatch.setattr(client, "run", refuses)
    with pytest.raises(SubmitError, match=r"`sbatch` says: no\. Job 12 could not be taken back: scancel 12"):
        submit(job, [NEW], "", chain=2)
    assert recipe(job) == NEW, "which job 12 trains"
