"""Where runs stand: folders as runs leave them, and the queue as Slurm 22.05.8 prints it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.slurm import status
from potamos.slurm.client import QueueEntry
from potamos.slurm.lock import lock_holder
from potamos.slurm.status import Status, StatusError, find_runs, read_facts, statuses

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
ODD = 'it\'s "odd"\n$(touch x)\x1b[31m;[b]'
SEPARATOR = "\x1f"


def ago(seconds: float) -> str:
    return (NOW - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def entry(job: str, state: str = "RUNNING", **other: Any) -> QueueEntry:
    values = {"reason": "", "nodes": "n[0-1]" if state == "RUNNING" else "", "time_left": 600, "partition": "main"}
    values |= {"start": "", "user": "ann", "name": "x", "folder": "/r"} | other
    return QueueEntry(id=job, array=job.partition("_")[0] if "_" in job else None, state=state, **values)


class Run:
    """A run folder, as trainer, batch script and commands write it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "logs").mkdir(parents=True)
        (path / "recipe.yaml").write_text("name: x\ntrain: {steps: 100}\n")

    def state(self, reason: str = "running", **other: Any) -> Run:
        facts = {"attempt": 0, "step": 40, "total_steps": 100, "next_sample": 160, "loss": 2.5, "eta": 90.0}
        facts |= {"tokens_per_second": 1234.5, "reason": reason, "updated": ago(30)} | other
        (self.path / "state.json").write_text(json.dumps(facts))
        return self

    def event(self, event: str, **other: Any) -> Run:
        with open(self.path / "attempts.jsonl", "a") as file:
            file.write(json.dumps({"event": event, "at": ago(60)} | other) + "\n")
        return self

    def submitted(self, *jobs: str) -> Run:
        (self.path / "job.json").write_text('{"job": {"folder": "/r"}}')
        return self.event("submitted", jobs=list(jobs))

    def begin(self, attempt: int, job: str = "12", step: int = 0, restart: int = 0) -> Run:
        return self.event("begin", attempt=attempt, job=job, restart=restart, nodes="n[2-3]", step=step)

    def end(self, attempt: int, verdict: str, reason: str, status: int = 0, step: int = 40, **other: Any) -> Run:
        facts = other | {"attempt": attempt, "verdict": verdict, "reason": reason, "status": status, "step": step}
        return self.event("end", fruitless=False, **facts)

    def mark(self, name: str, **facts: Any) -> Run:
        (self.path / name).write_text(json.dumps(facts | {"at": ago(60)}))
        return self

    def judged(self, *entries: QueueEntry, asked: bool = True) -> Status:
        queue = {e.id: e for e in entries}
        return status.judge(read_facts(self.path), queue if asked else None, NOW)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "x")


# --- one run --------------------------------------------------------------------------------------------------------


def test_prepared_queued_and_running(run: Run):
    assert run.judged().state == "prepared"
    run.submitted("12")
    queued = run.judged(entry("12", "PENDING", reason="Resources", start="2026-11-22T13:00:00"))
    assert (queued.state, queued.why) == ("queued", "Resources, may start 2026-11-22 13:00:00")
    run.begin(0)
    starting = run.judged(entry("12"))
    assert (starting.state, starting.why, starting.eta, starting.step) == ("running", "starting", None, None)
    run.state()
    trains = run.judged(entry("12"), entry("13"))
    assert trains == Status(
        folder=run.path, state="running", why="", step=40, total_steps=100, loss=2.5, tokens_per_second=1234.5,
        eta=60.0, nodes="n[0-1]", job="12", attempts=1, crashes=0, saved=0, time_left=600, updated=ago(30),
    )  # fmt: skip


def test_what_an_earlier_attempt_wrote_is_not_told_as_news(run: Run):
    run.submitted("12").begin(0).end(0, "requeue", "SIGUSR1").begin(1, step=40, restart=1).state()
    found = run.judged(entry("12"))
    assert (found.why, found.eta, found.step) == ("starting", None, 40)
    run.state(attempt=1)
    assert run.judged(entry("12")).why == "before: SIGUSR1"


def test_requeued_after_a_save_a_crash_and_a_death(run: Run):
    run.submitted("12").begin(0).end(0, "requeue", "rank 1: ValueError: x", status=1).begin(1, restart=1).state()
    waits = run.judged(entry("12", "PENDING", reason="BeginTime"))
    assert (waits.state, waits.attempts, waits.crashes) == ("requeued", 2, 1)
    assert waits.why == "BeginTime; before: killed from outside"
    run.end(1, "requeue", "SIGUSR1")
    waits = run.judged(entry("12", "PENDING", reason="BeginTime"))
    assert (waits.why, waits.crashes) == ("BeginTime; before: SIGUSR1", 1)
    assert run.judged(entry("12", "REQUEUED")).state == "requeued"


def test_a_chain_counts_what_waits_behind(run: Run):
    run.submitted("12", "13", "14").begin(0).state()
    behind = [entry("13", "PENDING", reason="Dependency"), entry("14", "PENDING", reason="Dependency")]
    trains = run.judged(*behind, entry("12"))
    assert (trains.state, trains.job, trains.behind) == ("running", "12", 2)
    run.end(0, "next", "SIGUSR1")
    waits = run.judged(*behind)
    assert (waits.state, waits.job, waits.behind) == ("requeued", "13", 1)


def test_a_finished_run_stays_so_while_the_rest_of_its_chain_waits(run: Run):
    run.submitted("12", "13").begin(0).end(0, "done", "finished").state("finished", step=100).mark(
        "done.json", step=100
    )
    assert run.judged(entry("13", "PENDING", reason="Dependency")).state == "finished"
    assert run.judged(entry("13")).state == "running"
    assert run.judged(asked=False).state == "finished"


def test_a_run_is_finished_at_the_steps_of_its_recipe(run: Run):
    """As the batch script judges it: steps may be raised after `done.json` was written."""
    run.submitted("12").begin(0).end(0, "done", "finished").state("finished", step=100).mark("done.json", step=100)
    assert run.judged().state == "finished"
    (run.path / "recipe.yaml").write_text("name: x\ntrain: {steps: 200}\n")
    assert run.judged(entry("13", "PENDING", reason="Priority")).state != "finished"
    found = run.judged()
    assert (found.state, found.why.partition(",")[0]) == ("stopped", "was trained to step 100")
    run.submitted("13")
    assert run.judged(entry("13", "PENDING", reason="Priority")).state == "requeued"
    (run.path / "recipe.yaml").unlink()
    assert run.judged().state == "finished", "nothing to compare with"


@pytest.mark.parametrize("skew", [-7200, 0, 7200])
@pytest.mark.parametrize("steps", [100, 120])
def test_the_clocks_of_nodes_do_not_decide_whether_a_run_is_finished(run: Run, skew: float, steps: int):
    """Submitted again, to go on or not, and told so by a machine whose clock is another than that of the nodes."""
    run.submitted("12").begin(0).end(0, "done", "finished", step=100).state("finished", step=100, updated=ago(skew))
    (run.path / "done.json").write_text(json.dumps({"step": 100, "next_sample": 400, "at": ago(skew)}))
    (run.path / "recipe.yaml").write_text(f"name: x\ntrain: {{steps: {steps}}}\n")
    run.submitted("13")
    (run.path / "job.json").write_text(json.dumps({"job": {"folder": "/r"}, "ids": ["13"], "submitted": ago(0)}))
    expected = "finished" if steps == 100 else "requeued"
    assert run.judged(entry("13", "PENDING", reason="Priority")).state == expected
    assert run.judged(entry("13")).state == "running"


def test_one_task_of_an_array_is_not_its_neighbor(run: Run):
    run.submitted("12_3")
    others = [entry("12_2"), entry("12_30", "PENDING"), entry("12", "PENDING")]
    assert run.judged(*others).state == "cancelled"
    assert run.judged(*others, entry("12_3")).state == "running"
    run.submitted("15")  # in its place, after a check of nodes
    assert run.judged(*others, entry("15_3")).job == "15_3"


def test_a_job_of_that_number_elsewhere_is_anothers(run: Run):
    run.submitted("12").begin(0).end(0, "failed", "rank 0: ValueError: x", status=1)
    assert run.judged(entry("12", folder="/elsewhere")).state == "failed"
    assert run.judged(entry("12")).state == "running"
    (run.path / "job.json").unlink()  # then it may be this folder's, or of the array above it
    assert run.judged(entry("12")).state == "failed"
    for place in (run.path, run.path.parent):
        assert run.judged(entry("12", folder=str(place))).state == "running"


@pytest.mark.parametrize(
    ("verdict", "reason", "code", "state", "why"),
    [
        ("failed", "rank 3: RuntimeError: x", 1, "failed", "rank 3: RuntimeError: x"),
        ("stopped", "cancelled", 0, "cancelled", "cancelled"),
        ("crashed", "rank 3: RuntimeError: x", 1, "failed", "rank 3: RuntimeError: x; no job follows"),
        ("next", "SIGUSR1", 0, "failed", "SIGUSR1; no job follows"),
    ],
)
def test_how_runs_end(run: Run, verdict: str, reason: str, code: int, state: str, why: str):
    run.submitted("12").begin(0).end(0, verdict, reason, status=code).state("failed: RuntimeError")
    found = run.judged()
    assert (found.state, found.why, found.nodes, found.eta) == (state, why, "n[2-3]", None)
    assert run.judged(entry("11")).state == state  # someone else's job
    assert run.judged(asked=False).state == (state if verdict in ("failed", "stopped") else "unknown")


def test_a_held_lock_is_no_crash(run: Run):
    run.submitted("12").begin(0).end(0, "busy", "process 7 on vm holds the run's lock", 2, held_by="process 7 on vm")
    waits = run.judged(entry("12", "PENDING", reason="BeginTime"))
    assert (waits.state, waits.crashes, waits.attempts) == ("requeued", 0, 1)
    assert waits.why == "BeginTime; before: process 7 on vm holds the run's lock"
    run.begin(1).end(1, "failed", "process 7 on vm holds the run's lock (12 ...)", 2, held_by="process 7 on vm")
    assert (run.judged().state, run.judged().crashes) == ("failed", 0)


def test_a_chain_that_is_used_up(run: Run):
    run.submitted("12").begin(0).end(0, "next", "SIGUSR1").state("SIGUSR1").mark("stop.0", attempt=0, reason="SIGUSR1")
    assert (run.judged().state, run.judged().why) == ("stopped", "SIGUSR1; no job follows")
    run.state("running", attempt=1)  # someone goes on with it by hand
    assert run.judged().state == "stale"


def test_cancelled_by_command(run: Run):
    run.submitted("12", "13").begin(0).state().mark("cancelled")
    assert run.judged().state == "cancelled"
    assert run.judged(entry("13", "PENDING", reason="Dependency")).state == "cancelled"
    assert run.judged(entry("12", "COMPLETING")).state == "cancelled"
    assert run.judged(entry("12")).why == "is being cancelled"


def test_a_job_that_left_without_a_word(run: Run):
    run.submitted("12")
    assert (run.judged().state, run.judged().why) == ("cancelled", "job 12 left the queue before it began")
    assert run.judged(asked=False).state == "unknown"
    run.begin(0).state(updated=ago(2 * status.QUIET))
    assert run.judged().state == "stale"
    assert (run.judged(asked=False).state, run.judged(asked=False).why) == ("unknown", "job 12")


def test_recent_news_count_while_the_controller_is_down(run: Run):
    run.submitted("12").begin(0).state()
    found = run.judged(asked=False)
    assert (found.state, found.why, found.eta) == ("running", "Slurm does not answer; last news 30 s ago", 60.0)
    assert run.judged().state == "stale", "Slurm answers, and has no such job"
    run.begin(1)
    assert run.judged(asked=False).state == "unknown", "news of an earlier attempt"
    run.state(attempt=1).end(1, "requeue", "rank 0: ValueError: x", status=1)
    assert (run.judged(asked=False).state, run.judged(asked=False).why) == ("unknown", "job 12; rank 0: ValueError: x")


def test_ranks_that_outlived_their_job_are_named(run: Run, held: Callable[[Path], Any]):
    run.submitted("12").begin(0).state()
    with held(run.path / "lock"):
        lost = "has no job in the queue, but is trained by process 7 on vm"
        assert (run.judged().state, run.judged().why) == ("running", lost)
        run.state("SIGTERM").mark("stop.0", attempt=0, reason="SIGTERM").mark("cancelled")
        assert (run.judged().state, run.judged().why) == ("running", lost)
        assert run.judged(asked=False).why == "process 7 on vm; Slurm does not answer"
        assert run.judged(entry("12", "COMPLETING")).why == "is being cancelled"
    assert run.judged().state == "cancelled"


def test_runs_outside_of_slurm(run: Run):
    run.state("SIGINT").mark("stop.0", attempt=0, reason="SIGINT", step=40)
    assert (run.judged().state, run.judged().why) == ("stopped", "SIGINT")
    run.state("running", attempt=1)
    assert run.judged().state == "stale"
    assert run.judged().attempts == 2
    for attempt in (9, 10):  # by number, not by name
        run.state("SIGTERM", attempt=attempt).mark(
            f"stop.{attempt}", attempt=attempt, reason=f"asked {attempt}", step=4
        )
    assert (run.judged().state, run.judged().why) == ("stopped", "asked 10")
    for attempt in (9, 10):
        (run.path / f"stop.{attempt}").unlink()
    run.state("failed: KeyError", attempt=2)
    assert (run.judged().state, run.judged().why) == ("failed", "failed: KeyError")
    run.state("finished", step=100).mark("done.json", step=100)
    assert run.judged(asked=False).state == "finished"


def test_a_lock_tells_a_living_run_from_a_dead_one(run: Run, held: Callable[[Path], Any]):
    run.state()
    lock = run.path / "lock"
    with held(lock):
        found = run.judged()
        assert (found.state, found.why, found.eta) == ("running", "process 7 on vm", 60.0)
        with open(lock, "a+") as file, pytest.raises(OSError):  # looking has not taken it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert run.judged().state == "stale"
    assert lock_holder(run.path / "none") is None


def test_saves_that_fail_or_lag_are_remarked_on(run: Run, held: Callable[[Path], Any]):
    run.submitted("12").begin(0)

    def why(step: int, every: Any = 10, failed: Any = None) -> str:
        return run.state(step=step, save_every=every, save_failed=failed).judged(entry("12")).why

    # The save of step 10 may be under way until that of step 20 begins, and that one until that of step 30.
    assert [why(step) for step in (9, 10, 20)] == ["", "", ""]
    assert why(21) == "saves lag: there is no checkpoint yet, and they are due every 10"
    (run.path / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert [why(step) for step in (21, 30)] == ["", ""]
    assert why(31) == "saves lag: the last checkpoint is of step 10, and they are due every 10"
    assert why(40, every=25) == why(40, every=None) == why(40, every="x") == why(40, every=0) == ""
    full = {"step": 20, "why": "No space left on device"}
    said = "the save of step 20 failed (No space left on device); the last checkpoint is of step 10"
    assert why(21, failed=full) == said
    assert why(21, failed={"step": "x"}) == why(21, failed=[]) == ""
    run.end(0, "requeue", "SIGUSR1").begin(1, restart=1)
    assert why(21, failed=full) == "starting", "that is news of the attempt before"
    run.state(attempt=1, step=21, save_every=10, save_failed=full)
    assert run.judged(entry("12")).why == f"{said}; before: SIGUSR1"
    with held(run.path / "lock"):
        assert run.judged().why.endswith(f"process 7 on vm; {said}")
    (run.path / "checkpoints" / "step-00000020").mkdir()  # a later attempt at it
    assert run.judged(entry("12")).why == "before: SIGUSR1"


def test_silence_is_remarked_on(run: Run):
    run.submitted("12").begin(0).state(updated=ago(1200))
    found = run.judged(entry("12"))
    assert (found.why, found.eta) == ("no news for 20 min", 0.0)
    run.state(updated=(NOW + timedelta(hours=1)).isoformat())  # a clock that is ahead
    assert run.judged(entry("12")).eta == 90.0


# --- files that are not as they should be ---------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=2)
)
STATE = st.dictionaries(
    st.sampled_from(["attempt", "step", "total_steps", "loss", "eta", "reason", "updated", "tokens_per_second", "at"]),
    VALUES,
)


@settings(max_examples=40, deadline=None)
@given(STATE, STATE, st.sampled_from(["state.json", "done.json", "stop.0", "job.json"]))
def test_any_content_gives_a_status(tmp_path_factory: pytest.TempPathFactory, state: Any, mark: Any, name: str):
    run = Run(tmp_path_factory.mktemp("run") / "x").submitted("12").begin(0)
    (run.path / "state.json").write_text(json.dumps(state))
    (run.path / name).write_text(json.dumps(mark))
    for found in (run.judged(), run.judged(entry("12")), run.judged(entry("12", "PENDING")), run.judged(asked=False)):
        assert found.state in status.STATES
        json.dumps(found.plain())


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path, no_slurm: None):
    for name, content in {"a": b"\xff\xfe{", "b": b"[]", "c": b"3", "d": b""}.items():
        (Run(tmp_path / name).path / "state.json").write_bytes(content)
    (Run(tmp_path / "e").path / "attempts.jsonl").write_text('{"event": "begin"}\nnot json\n{"event": "submitted"}\n')
    Run(tmp_path / "f").state("finished").mark("done.json", step=100)
    found = statuses(find_runs([tmp_path]))
    assert [each.folder.name for each in found] == list("abcdef")
    assert (found[4].state, found[5].state) == ("unknown", "finished")
    assert "attempts" in found[4].why or "files" in found[4].why


# --- many runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))


@pytest.fixture
def squeue(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A squeue that prints this and counts its calls."""
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(text: str) -> Path:
        (folder / "out").write_text(text)
        (folder / "squeue").write_text(f"#!/bin/sh\nprintf '%s\\n' \"$*\" >> {folder}/calls\ncat {folder}/out\n")
        (folder / "squeue").chmod(0o755)
        return folder / "calls"

    return make


def line(*columns: str) -> str:
    return SEPARATOR.join(columns) + "\n"


def test_hundreds_of_runs_are_one_question(tmp_path: Path, squeue: Callable[[str], Path]):
    # As 22.05.8 prints them with --array: ids, the array's id, state, reason, nodes, time left, partition, start, ...
    calls = squeue(
        line("7_0", "7", "RUNNING", "None", "n0", "9:58", "main", "2026-11-22T10:05:35", "ann", "x", "/r")
        + line("7_1", "7", "PENDING", "JobArrayTaskLimit", "", "10:00", "main", "N/A", "ann", "x", "/r")
        + line("900", "900", "PENDING", "JobHeldUser", "", "1-00:00:00", "main", "N/A", "ann", "a b|c'd\"e", "/r\n")
    )
    for k in range(300):
        Run(tmp_path / f"x{k:03}").state("finished").mark("done.json", step=100).submitted(str(100 + k))
    for k in range(3):
        Run(tmp_path / "sweep" / f"lr={k}").submitted(f"7_{k}")
    Run(tmp_path / "held").submitted("900")
    began = time.perf_counter()
    found = {str(each.folder.relative_to(tmp_path)): each for each in statuses(find_runs([tmp_path]))}
    assert time.perf_counter() - began < 5
    assert len(found) == 304
    assert len(calls.read_text().splitlines()) == 1
    assert "7_" not in calls.read_text()  # an array as a whole, however many tasks it has
    assert found["sweep/lr=0"].state == "running"
    assert (found["sweep/lr=1"].state, found["sweep/lr=1"].why) == ("queued", "JobArrayTaskLimit")
    assert found["sweep/lr=2"].state == "cancelled"
    assert (found["held"].state, found["held"].why, found["held"].job) == ("queued", "JobHeldUser", "900")
    assert found["x299"].state == "finished"


def test_slurm_is_asked_how_jobs_ended_that_left_no_word(tmp_path: Path, squeue: Callable[[str], Path]):
    """As 22.05.8 tells of a chain whose first job failed. What it forgot is no error, and it is not asked of all."""
    calls = squeue("")
    record = (
        "JobId=12 JobName=x UserId=ann(1) GroupId=ann(1) JobState=CANCELLED Reason=DependencyNeverSatisfied Dep=(null)"
    )
    (calls.parent / "scontrol").write_text(
        f'#!/bin/sh\necho "$*" >> {calls}\n'
        f'[ "$3" = 12 ] || {{ echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }}\necho "{record}"\n'
    )
    (calls.parent / "scontrol").chmod(0o755)
    Run(tmp_path / "a").submitted("12")
    for k in range(20):
        Run(tmp_path / f"b{k:02}").submitted(f"{100 + k}").begin(0).state()
    found = statuses(find_runs([tmp_path]))
    assert found[0].why == "job 12 left the queue before it began: cancelled, DependencyNeverSatisfied"
    assert {each.why for each in found[1:]} == {f"no job and no process trains it; last news {ago(30)}"}
    assert [line.split()[0] for line in calls.read_text().splitlines()] == [
        "ping",
        "--noheader",
        *["show"] * status.PUZZLES,
    ]


def test_a_controller_that_is_down_is_asked_once(tmp_path: Path, squeue: Callable[[str], Path]):
    """As 22.05.8 says it; its squeue would try for 18 s."""
    calls = squeue("")
    scontrol = calls.parent / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$*" >> {calls}\necho "Slurmctld(primary) at head is DOWN"\nexit 1\n')
    scontrol.chmod(0o755)
    told: list[str] = []
    for name in "ab":
        Run(tmp_path / name).submitted("12").begin(0).state()
    found = statuses(find_runs([tmp_path]), now=NOW, tell=told.append)
    assert [each.state for each in found] == ["running", "running"]
    assert calls.read_text() == "ping\n"
    assert told == ["what waits and runs is not known: the controller does not answer; see `scontrol ping`"]
    scontrol.write_text('#!/bin/sh\necho "Slurmctld(primary) at a is DOWN"\necho "Slurmctld(backup) at b is UP"\n')
    assert {each.state for each in statuses(find_runs([tmp_path]), now=NOW)} == {"stale"}


def test_without_slurm_it_is_said_once(tmp_path: Path, no_slurm: None):
    told: list[str] = []
    Run(tmp_path / "a").state("finished").mark("done.json", step=100)
    assert statuses(find_runs([tmp_path]), tell=told.append)[0].state == "finished"
    assert told == []  # nothing to ask
    for name in "bc":
        Run(tmp_path / name).submitted("12").begin(0).state(updated="2020-01-01T00:00:00+00:00")
    assert [each.state for each in statuses(find_runs([tmp_path]), tell=told.append)] == [
        "finished",
        "unknown",
        "unknown",
    ]
    assert len(told) == 1
    assert "squeue" in told[0]


def test_runs_are_found_below_and_nothing_else(tmp_path: Path):
    run = Run(tmp_path / "runs" / "plain")
    (run.path / "checkpoints" / "step-00000040").mkdir(parents=True)
    (run.path / "checkpoints" / "step-00000040" / "recipe.yaml").write_text("x")
    sweep = tmp_path / "runs" / "sweep"
    for name in ("a", "b"):
        Run(sweep / name)
    (sweep / "code" / "potamos" / "recipes").mkdir(parents=True)
    (sweep / "code" / "recipe.yaml").write_text("x")
    (tmp_path / "runs" / ".hidden").mkdir()
    (tmp_path / "runs" / ".hidden" / "state.json").write_text("{}")
    (tmp_path / "runs" / "file").write_text("")
    Run(tmp_path / "runs" / ODD.replace("/", ""))
    names = [path.name for path in find_runs([tmp_path / "runs", run.path])]
    assert names == [ODD, "plain", "a", "b"]
    with pytest.raises(StatusError, match=r"no folder .*there are: .*plain"):
        find_runs([tmp_path / "runs" / "absent"])


def test_names_are_printed_as_one_line_and_are_found_again():
    shown = status.printable(ODD)
    assert shown == 'it\'s "odd"\\n$(touch x)\\x1b[31m;[b]'
    assert status.printable(os.fsdecode(b"a\xffb")) == "a\\udcffb"
    assert status.printable("größe 大") == "größe 大"
