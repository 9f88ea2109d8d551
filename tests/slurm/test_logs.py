"""Which log is shown, how its end is found, and following a run through its attempts."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.slurm import logs
from potamos.slurm.logs import Follower, LogError, choose
from potamos.slurm.status import Status


class Run:
    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "logs").mkdir(parents=True)

    def event(self, event: str, **other: Any) -> Run:
        with open(self.path / "attempts.jsonl", "a") as file:
            file.write(json.dumps({"event": event, "at": "2026-11-22T10:00:00+00:00"} | other) + "\n")
        return self

    def begin(self, attempt: int, job: str = "12") -> Run:
        return self.event("begin", attempt=attempt, job=job, restart=attempt, nodes="n[0-1]", step=0)

    def end(self, attempt: int, reason: str, status: int = 1, verdict: str = "requeue") -> Run:
        facts = {"attempt": attempt, "verdict": verdict, "reason": reason, "status": status, "step": 4}
        return self.event("end", fruitless=False, **facts)

    def log(self, name: str, text: str = "") -> Run:
        with open(self.path / "logs" / name, "a") as file:
            file.write(text)
        return self


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / 'it\'s "x"')


# --- choosing -------------------------------------------------------------------------------------------------------


def test_the_newest_attempt_and_rank_0(run: Run):
    run.event("submitted", jobs=["12"])
    for attempt in (9, 10):  # by number, not by name
        run.begin(attempt)
        for rank in (0, 1, 10):
            run.log(f"attempt-{attempt}.rank-{rank}.txt")
    assert choose(run.path).path.name == "attempt-10.rank-0.txt"
    assert choose(run.path, rank=10).path.name == "attempt-10.rank-10.txt"
    assert choose(run.path, attempt=9).path.name == "attempt-9.rank-0.txt"
    with pytest.raises(LogError, match="attempt 10 has no rank 2; there are ranks 0, 1, 10"):
        choose(run.path, rank=2)
    with pytest.raises(LogError, match="no attempt 3; there are attempts 9, 10"):
        choose(run.path, attempt=3)


@pytest.mark.parametrize(
    ("reason", "status", "rank"),
    [
        ("rank 1: RuntimeError: x", 1, 1),
        ("n1: task 1: Killed, before the first new checkpoint", 137, 1),
        ("n1: tasks 1-3: Exited with exit code 1", 1, 1),
        ("rank 7: RuntimeError: x", 1, 0),  # which left no log
        ("SIGUSR1", 0, 0),
        ("srun ended with status 1 and left no words", 1, 0),
        ("rank 1: was asked to stop", 0, 0),
    ],
)
def test_of_a_crash_the_rank_that_failed(run: Run, reason: str, status: int, rank: int):
    run.begin(0).log("attempt-0.rank-0.txt").log("attempt-0.rank-1.txt").end(0, reason, status)
    assert choose(run.path).rank == rank
    assert choose(run.path, rank=0).rank == 0


def test_the_batch_script_speaks_until_a_rank_does(run: Run, tmp_path: Path):
    with pytest.raises(LogError, match="never submitted"):
        choose(run.path)
    run.event("submitted", jobs=["12"])
    with pytest.raises(LogError, match=r"job 12 .* has not begun"):
        choose(run.path)
    run.log("job-12.txt").begin(0)
    assert choose(run.path).path.name == "job-12.txt"
    with pytest.raises(LogError, match="no rank has started"):
        choose(run.path, rank=0)
    run.log("attempt-0.rank-0.txt")
    assert choose(run.path).path.name == "attempt-0.rank-0.txt"
    assert choose(run.path, job=True).path.name == "job-12.txt"
    with pytest.raises(LogError, match="no run folder"):
        choose(tmp_path / "none")


def test_an_array_has_its_scripts_logs_in_its_own_folder(tmp_path: Path):
    run = Run(tmp_path / "sweep" / "lr=1").event("submitted", jobs=["12_3"])
    (run.path / "job.json").write_text(json.dumps({"job": {"folder": str(tmp_path / "sweep")}}))
    (tmp_path / "sweep" / "logs").mkdir()
    (tmp_path / "sweep" / "logs" / "job-12_3.txt").write_text("x")
    assert choose(run.path).path == tmp_path / "sweep" / "logs" / "job-12_3.txt"


def test_a_run_outside_of_slurm_has_its_notes(run: Run):
    run.log("notes.log", "resumed\n")
    assert choose(run.path).path.name == "notes.log"


# --- the last lines -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40).map(lambda text: text.replace(b"\r", b"\n").replace(b"a", b"\n")), st.integers(0, 8))
def test_the_last_lines_are_those_of_tail(tmp_path_factory: pytest.TempPathFactory, text: bytes, lines: int):
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_bytes(text)
    naive = text.split(b"\n")
    ends = naive[:-1] if naive[-1] == b"" else naive
    kept = ends[-lines:] if lines else []
    expected = b"\n".join(kept) + (b"\n" if kept and text.endswith(b"\n") else b"")
    for block in (1, 3, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logs, "BLOCK", block)
            assert b"".join(logs.read(path, lines)) == expected
            assert b"".join(logs.read(path)) == text


def test_the_end_of_a_long_log_is_found_without_reading_it(tmp_path: Path):
    path = tmp_path / "log"
    with open(path, "wb") as file:
        file.truncate(8 << 30)  # holes
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast but one\nlast\n")
    began = time.perf_counter()
    assert b"".join(logs.read(path, 2)) == b"last but one\nlast\n"
    assert time.perf_counter() - began < 1


# --- following ------------------------------------------------------------------------------------------------------


class Following:
    """A follower in a thread, and what it has written and told."""

    def __init__(self, run: Run, **options: Any) -> None:
        self.out, self.told, self.state = b"", [], "running"
        self.ended: Status | None = None
        self.error: BaseException | None = None
        options = {
            "poll": 0.01,
            "ask": 0.02,
            "status": lambda path: Status(path, self.state, why="BeginTime"),
        } | options
        self.follower = Follower(run.path, self._write, self.told.append, **options)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _write(self, piece: bytes) -> None:
        self.out += piece

    def _run(self) -> None:
        try:
            self.ended = self.follower.follow()
        except LogError as error:
            self.error = error

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, (self.out, self.told, self.state, self.error)
            time.sleep(0.005)

    def end(self, state: str) -> Status | None:
        self.state = state
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.ended


@pytest.fixture
def follow() -> Iterator[Callable[..., Following]]:
    started: list[Following] = []

    def start(run: Run, **options: Any) -> Following:
        started.append(Following(run, **options))
        return started[-1]

    yield start
    for each in started:
        each.end("cancelled")


def test_following_goes_on_in_the_next_attempt(run: Run, follow: Callable[..., Following]):
    run.event("submitted", jobs=["12"])
    shown = follow(run)
    shown.state = "queued"
    shown.until(lambda: "queued: BeginTime" in shown.told)
    run.log("job-12.txt", "attempt 0 of x\n").begin(0)
    shown.until(lambda: shown.out == b"attempt 0 of x\n")
    shown.state = "running"
    run.log("attempt-0.rank-0.txt", "step 1\nste").log("attempt-0.rank-1.txt", "other\n")
    shown.until(lambda: shown.out.endswith(b"step 1\nste"))
    run.log("attempt-0.rank-0.txt", "p 2\n")
    shown.until(lambda: shown.out.endswith(b"step 1\nstep 2\n"))
    run.log("attempt-0.rank-1.txt", "RuntimeError: x\n").end(0, "rank 1: RuntimeError: x")
    shown.state = "requeued"
    shown.until(lambda: "requeued: BeginTime" in shown.told)
    shown.state = "running"
    run.begin(1).log("attempt-1.rank-0.txt", "step 3\n")
    shown.until(lambda: shown.out.endswith(b"step 2\nstep 3\n"))
    run.log("attempt-1.rank-0.txt", "step 4\n").end(1, "finished", 0, "done")
    ended = shown.end("finished")
    assert ended is not None
    assert ended.state == "finished"
    assert shown.out == b"attempt 0 of x\nstep 1\nstep 2\nstep 3\nstep 4\n"
    assert [told.split("/")[-1] for told in shown.told if told.startswith("==>")] == [
        "job-12.txt", "attempt-0.rank-0.txt", "attempt-1.rank-0.txt",
    ]  # fmt: skip
    assert "attempt 0 ended: rank 1: RuntimeError: x (its log: --attempt 0 --rank 1)" in shown.told
    assert shown.told[-1] == "attempt 1 ended: finished"


def test_words_that_come_last_are_not_lost(run: Run, follow: Callable[..., Following]):
    """What is written between the last look at the file and the run's end is shown, however many times."""
    run.begin(0).log("attempt-0.rank-0.txt", "a")
    shown = follow(run)
    shown.until(lambda: shown.out == b"a")
    run.log("attempt-0.rank-0.txt", "b" * 3_000_000)
    shown.end("failed")
    assert shown.out == b"a" + b"b" * 3_000_000


def test_words_that_come_after_the_end_are_not_lost(run: Run, follow: Callable[..., Following]):
    """A job may have left the queue before a file server tells what its ranks said last."""
    run.begin(0).log("attempt-0.rank-0.txt", "a")
    asked: list[Path] = []

    def status(path: Path) -> Status:
        asked.append(path)
        if len(asked) == 1:
            run.log("attempt-0.rank-0.txt", "b")
        return Status(path, "failed")

    shown = follow(run, status=status)
    shown.thread.join(20)
    assert (shown.out, shown.ended) == (b"ab", Status(run.path, "failed"))


def test_what_an_attempt_said_last_is_shown_before_the_next_one(run: Run, follow: Callable[..., Following]):
    run.begin(0).log("attempt-0.rank-0.txt", "a")
    shown = follow(run, poll=0.5)
    shown.until(lambda: shown.out == b"a")
    run.log("attempt-0.rank-0.txt", "b").begin(1).log("attempt-1.rank-0.txt", "c")
    shown.until(lambda: shown.out == b"abc")


def test_following_begins_with_the_last_lines_and_keeps_to_a_rank(run: Run, follow: Callable[..., Following]):
    run.begin(0).log("attempt-0.rank-1.txt", "1\n2\n3\n").log("attempt-0.rank-0.txt", "no\n")
    shown = follow(run, rank=1, lines=2)
    shown.until(lambda: shown.out == b"2\n3\n")
    run.begin(1).log("attempt-1.rank-0.txt", "no\n").log("attempt-1.rank-1.txt", "4\n5\n6\n")
    shown.until(lambda: shown.out == b"2\n3\n4\n5\n6\n")  # of a new file everything


def test_following_one_attempt_ends_with_it(run: Run, follow: Callable[..., Following]):
    run.begin(0).log("attempt-0.rank-0.txt", "a\n")
    shown = follow(run, attempt=0)
    shown.until(lambda: shown.out == b"a\n")
    run.end(0, "SIGUSR1", 0)
    shown.thread.join(20)
    assert (shown.out, shown.ended is not None) == (b"a\n", True)
    run.begin(1).log("attempt-1.rank-0.txt", "b\n")
    (run.path / "attempts.jsonl").write_text((run.path / "attempts.jsonl").read_text().replace('"end"', '"lost"'))
    shown = follow(run, attempt=0)  # killed from outside: nobody was left to judge it
    shown.thread.join(20)
    assert (shown.out, shown.ended is not None) == (b"a\n", True)


def test_following_an_attempt_that_was_never_made_is_refused(run: Run, follow: Callable[..., Following]):
    run.begin(0).log("attempt-0.rank-0.txt", "a\n")
    shown = follow(run, attempt=5)
    shown.thread.join(20)
    assert "no attempt 5" in str(shown.error)


def test_a_log_that_was_emptied_is_shown_anew(run: Run, follow: Callable[..., Following]):
    run.begin(0).log("attempt-0.rank-0.txt", "long\n")
    shown = follow(run)
    shown.until(lambda: shown.out == b"long\n")
    (run.path / "logs" / "attempt-0.rank-0.txt").write_text("x\n")
    shown.until(lambda: shown.out == b"long\nx\n")
