"""How attempts of a run are judged, from the marks that a run leaves and the lines that Slurm printed (22.05.8)."""

import errno
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from potamos.slurm import attempt as attempts
from potamos.slurm.attempt import (
    AttemptError,
    Told,
    UnusableNodeError,
    begin,
    end,
    jobs_of,
    newest_step,
    note_submission,
    read_attempts,
    replaced,
)
from potamos.slurm.lock import await_lock, mark_busy
from potamos.slurm.run_folder import RunFolder

RUNNING = "JobId=3 JobName=t JobState=RUNNING Reason=None Restarts=2 RunTime=00:01:00 TimeLimit=00:10:00"
PREEMPTED = RUNNING + " PreemptEligibleTime=2026-11-22T10:10:30 PreemptTime=2026-11-22T10:12:00"
CANCELLED = RUNNING.replace("RUNNING", "COMPLETING") + " EndTime=2026-11-22T10:10:32 PreemptTime=None"
REQUEUED = CANCELLED.replace("Restarts=2", "Restarts=3").replace("00:01:00", "00:00:00")
TIMEOUT = CANCELLED.replace("00:01:00", "00:10:02")


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / 'a run\'s "folder"')
    run.logs.mkdir(parents=True)
    run.recipe.write_text("train: {steps: 100}\n")
    return run


def start(folder, crashes=3):
    return begin(folder, "3", 2, "n[0-1]", crashes)


def saved(folder, step):
    (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)


def asked_to_stop(folder, number, reason="SIGUSR1"):
    folder.stop(number).write_text(json.dumps({"attempt": number, "reason": reason, "step": 7}))


def ends(folder, number, *, status=0, told=RUNNING, requeue=True, crashes=3):
    return end(folder, number, status, Told.read(told, 2), requeue=requeue, crashes=crashes)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (RUNNING, Told()),
        (PREEMPTED, Told(preempted=True)),
        (CANCELLED, Told(cancelled=True)),
        (REQUEUED, Told(requeued=True)),
        (TIMEOUT, Told(out_of_time=True)),
        (CANCELLED.replace("TimeLimit=00:10:00", "TimeLimit=UNLIMITED"), Told(cancelled=True)),
        (CANCELLED.replace("00:01:00", "1-00:10:02").replace("00:10:00", "1-00:10:00"), Told(out_of_time=True)),
        (RUNNING.replace("RUNNING", "TIMEOUT"), Told(out_of_time=True)),
        (RUNNING + " WorkDir=/runs/x Restarts=9 JobState=CANCELLED", Told()),  # a folder's name
        ("", Told()),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", Told()),
    ],
)  # fmt: skip
def test_what_slurm_says_of_a_job(line, told):
    assert Told.read(line, 2) == told


def test_finished(folder):
    number = start(folder)
    saved(folder, 100)
    folder.done.write_text('{"step": 100}')
    assert ends(folder, number) == ("done", "finished")
    assert start(folder) is None  # a requeue of a finished run does nothing
    folder.recipe.write_text("train: {steps: 101}\n")
    assert start(folder) == 1  # and one that was given more steps goes on


def test_a_run_that_saved_on_request_goes_back_into_the_queue(folder):
    number = start(folder)
    saved(folder, 7)
    asked_to_stop(folder, number)
    assert ends(folder, number) == ("requeue", "SIGUSR1")
    assert ends(folder, number, requeue=False) == ("next", "SIGUSR1")  # in a chain, another job goes on


@pytest.mark.parametrize(
    ("told", "verdict", "reason"),
    [
        (PREEMPTED, "requeue", "SIGTERM, preempted"),
        (REQUEUED, "waiting", "SIGTERM, requeued from outside"),
        (TIMEOUT, "requeue", "SIGTERM, time limit"),
        (CANCELLED, "stopped", "cancelled"),
    ],
)
def test_who_sent_the_signal(folder, told, verdict, reason):
    number = start(folder)
    saved(folder, 7)
    asked_to_stop(folder, number, "SIGTERM")
    assert ends(folder, number, told=told) == (verdict, reason)


def test_a_cancelled_run_is_never_requeued(folder):
    number = start(folder)
    folder.cancelled.touch()
    assert ends(folder, number, status=137) == ("stopped", "cancelled")
    with pytest.raises(AttemptError, match="cancelled"):
        start(folder)


def test_crashes_in_a_row_meet_the_bound(folder):
    verdicts = [ends(folder, start(folder), status=1)[0] for _ in range(3)]
    assert verdicts == ["requeue", "requeue", "failed"]
    with pytest.raises(AttemptError, match=r"3 attempts in a row .* status 1 .* potamos requeue"):
        start(folder)
    note_submission(folder, ["9"])  # someone mended it and submitted again
    assert start(folder) == 3


def test_progress_never_meets_the_bound(folder):
    for step in range(1, 20):
        number = start(folder)
        saved(folder, step)
        assert ends(folder, number, status=137)[0] == "requeue"
    assert [a.fruitless for a in read_attempts(folder)] == [False] * 19


def test_a_crash_after_progress_begins_the_count_anew(folder):
    for made_progress in (False, False, True, False, False):
        number = start(folder)
        if made_progress:
            saved(folder, 5)
        assert ends(folder, number, status=1)[0] == "requeue"
    assert ends(folder, start(folder), status=1)[0] == "failed"


def test_progress_of_an_attempt_that_nobody_judged_counts(folder):
    for _ in range(2):
        ends(folder, start(folder), status=1)
    start(folder)
    saved(folder, 8)  # and then its node died
    assert ends(folder, start(folder), status=1)[0] == "requeue"


def test_deaths_from_outside_are_no_crashes(folder):
    for _ in range(9):
        start(folder)  # never judged: the node died
    for told in (PREEMPTED, REQUEUED) * 3:
        assert ends(folder, start(folder), status=143, told=told)[0] in ("requeue", "waiting")
    assert not any(attempt.fruitless for attempt in read_attempts(folder))


def test_a_limit_too_short_to_save_anything_new_is_an_end(folder):
    for number in range(3):
        assert start(folder) == number
        asked_to_stop(folder, number)
        verdict, reason = ends(folder, number)
    assert verdict == "failed"
    assert "SIGUSR1, before the first new checkpoint (3 such attempts in a row)" in reason


def test_neither_done_nor_stopped_is_a_crash_whatever_the_status(folder):
    verdict, reason = ends(folder, start(folder), status=0)
    assert verdict == "requeue"
    assert "status 0" in reason
    assert ends(folder, start(folder), status=0, requeue=False)[0] == "crashed"


# --- the lock -------------------------------------------------------------------------------------------------------


def refused(folder, number):
    mark_busy(folder, number, "process 7 on vm")  # as the trainer does
    return number


def test_a_held_lock_is_neither_a_crash_nor_progress(folder):
    assert ends(folder, start(folder, 2), status=1, crashes=2)[0] == "requeue"
    for step in (0, 0, 5):
        number = refused(folder, start(folder, 2))
        if step:
            saved(folder, step)  # by whoever holds it
        assert ends(folder, number, status=2, crashes=2) == ("busy", "process 7 on vm holds the run's lock")
    last = read_attempts(folder)[-1]
    assert (last.held_by, last.fruitless, last.verdict) == ("process 7 on vm", False, "busy")


def test_a_held_lock_between_crashes_does_not_begin_their_count_anew(folder):
    for _ in range(2):
        assert ends(folder, start(folder), status=1)[0] == "requeue"
    ends(folder, refused(folder, start(folder)), status=2)
    assert ends(folder, start(folder), status=1)[0] == "failed"


def test_a_lock_that_is_held_for_ever_is_an_end_that_names_the_holder(folder, monkeypatch):
    monkeypatch.setattr(attempts, "HELD_TIMES", 3)
    for step in (1, 2):
        number = refused(folder, start(folder))
        saved(folder, step)
        assert ends(folder, number, status=2)[0] == "busy"
    start(folder)  # killed from outside, which says nothing
    verdict, reason = ends(folder, refused(folder, start(folder)), status=2)
    assert verdict == "failed"
    assert "process 7 on vm holds the run's lock (3 attempts in a row found it so; end that process" in reason
    assert str(folder.path) in reason
    number = start(folder)  # not held any more: it is of use to go on
    assert number == 4
    assert ends(folder, number, status=1)[0] == "requeue"
    assert ends(folder, refused(folder, start(folder)), status=2)[0] == "busy"  # counted anew after one that trained


def test_a_submission_begins_the_wait_for_the_lock_anew(folder, monkeypatch):
    monkeypatch.setattr(attempts, "HELD_TIMES", 2)
    ends(folder, refused(folder, start(folder)), status=2)
    note_submission(folder, ["9"])
    assert ends(folder, refused(folder, start(folder)), status=2)[0] == "busy"


@pytest.mark.parametrize(
    ("told", "requeue", "verdict"),
    [(REQUEUED, True, "waiting"), (RUNNING, False, "next"), (CANCELLED, True, "stopped")],
)
def test_a_busy_attempt_that_slurm_or_a_chain_takes_care_of(folder, told, requeue, verdict):
    assert ends(folder, refused(folder, start(folder)), status=2, told=told, requeue=requeue)[0] == verdict


def test_a_run_that_its_holder_has_finished_is_done(folder):
    number = refused(folder, start(folder))
    folder.done.write_text('{"step": 100}')
    assert ends(folder, number, status=2) == ("done", "finished")


def test_an_attempt_that_begins_while_the_lock_is_held_need_not_start_its_ranks(folder, held):
    with held(folder.lock):
        assert start(folder) == 0
        assert ends(folder, 0, status=1) == ("busy", "process 7 on vm holds the run's lock")
        assert ends(folder, 0, status=1, requeue=False)[0] == "next"
    assert start(folder) == 1
    assert not folder.busy(1).exists()


def test_the_lock_is_waited_for_and_a_cancelled_run_is_not(folder, held):
    told = []
    with held(folder.lock):
        assert await_lock(folder, 0.1, told.append) == "process 7 on vm"
        assert told == ["process 7 on vm holds the run's lock, and trains here still; waiting 0 min for it to end"]
        folder.cancelled.touch()
        began = time.monotonic()
        assert await_lock(folder, 60, told.append) == "process 7 on vm"
        assert time.monotonic() - began < 5
    assert await_lock(folder, 0, told.append) is None
    with pytest.raises(AttemptError, match="cancelled"):
        start(folder)


def test_nodes_that_fail_the_check_are_no_crash(folder):
    number = start(folder)
    assert number is not None
    replaced(folder, number, "n3,n4")
    last = read_attempts(folder)[-1]
    assert (last.verdict, last.fruitless) == ("next", False)
    assert "n3,n4" in (last.reason or "")


@pytest.mark.parametrize(
    ("logs", "reason"),
    [
        (
            {"rank-0": "error: rank 1: no room\n", "rank-1": "x\nerror: no room on the disk\n"},
            "rank 1: no room on the disk",
        ),
        (
            {
                "rank-0": "torch.distributed.DistBackendError: Connection closed by peer\n",
                "rank-3": "Traceback ...\ntorch.OutOfMemoryError: no memory\nmore\n",
            },
            "rank 3: torch.OutOfMemoryError: no memory",
        ),
        (
            {"srun": "srun: error: n1: task 1: Terminated\nsrun: error: n0: task 0: Killed\n", "rank-0": "step 3\n"},
            "n0: task 0: Killed",
        ),
        ({"rank-10": "ValueError: ten\n", "rank-9": "ValueError: nine\n"}, "rank 10: ValueError: ten"),
        ({"rank-0": "Exception in thread Thread-3:\n"}, "srun ended with status 9 and left no words"),
        ({"rank-0": "[rank0]: OSError: [Errno 28] full\n"}, "rank 0: OSError: [Errno 28] full"),
        ({}, "srun ended with status 9 and left no words"),
    ],
)
def test_the_reason_is_the_words_of_the_rank_that_failed(folder, logs, reason):
    number = start(folder)
    for second, (name, text) in enumerate(logs.items()):
        path = folder.logs / f"attempt-{number}.{name}.txt"
        path.write_text(text)
        os.utime(path, (second, second))  # in the order in which their ranks wrote last
    (folder.logs / "attempt-7.rank-0.txt").write_text("ValueError: of another attempt\n")
    assert ends(folder, number, status=9)[1].startswith(reason)


def test_numbers_avoid_the_marks_of_attempts_outside_of_slurm(folder):
    asked_to_stop(folder, 4)
    folder.state.write_text('{"attempt": 6, "step": 3}')
    assert start(folder) == 7
    assert start(folder) == 8


def test_torn_lines_are_passed_over_and_not_written_into(folder):
    start(folder)
    with open(folder.attempts, "a") as file:
        file.write('{"event": "begin", "attempt": 5}\n')  # of another version
        file.write('{"event": "end", "attem')
    assert start(folder) == 1
    assert [a.number for a in read_attempts(folder)] == [0, 1]


def test_a_full_disk_is_said_and_does_not_end_the_run(folder, monkeypatch, capsys):
    number = start(folder)
    monkeypatch.setattr(attempts.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(attempts, "_append", refuse)
    verdict, reason = ends(folder, number, status=1)
    assert verdict == "requeue"
    assert "the disk of the run folder is full" in reason
    assert "attempts.jsonl could not be written" in capsys.readouterr().err


def test_jobs_of_a_run_in_order(folder):
    note_submission(folder, ["3", "4"])
    note_submission(folder, ["9"])
    assert jobs_of(folder) == ["3", "4", "9"]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "make room"),
        (PermissionError(errno.EACCES, "Permission denied"), "that the nodes share"),
    ],
)
def test_a_folder_that_this_node_cannot_write(folder, monkeypatch, capsys, error, remedy):
    def refuse(*_):
        raise error

    monkeypatch.setattr(attempts, "_append", refuse)
    with pytest.raises(UnusableNodeError, match=rf"cannot write into .* \({error.strerror}\): .*{remedy}") as caught:
        start(folder)
    assert ("that the nodes share" in str(caught.value)) == (remedy == "that the nodes share")
    assert attempts.main(["begin", str(folder.path)]) not in (0, attempts.REFUSED)  # another node may do
    folder.cancelled.touch()
    assert attempts.main(["begin", str(folder.path)]) == attempts.REFUSED
    assert capsys.readouterr().err.startswith("error: ")


def test_checkpoints_that_cannot_be_listed_are_not_missing(folder, monkeypatch):
    """Or an attempt that saved would be a crash."""
    saved(folder, 3)
    number = start(folder)

    def refuse(path):
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr(attempts.os, "listdir", refuse)
    with pytest.raises(OSError, match="Stale"):
        ends(folder, number)
    with pytest.raises(UnusableNodeError, match="Stale"):
        start(folder)
    assert newest_step(folder) == 0  # for those who only look


@pytest.mark.parametrize("content", ['{"step": "x"}', '{"step": null}', "{", "[1]"])
def test_a_damaged_mark_of_the_end_is_none(folder, content):
    number = start(folder)
    folder.done.write_text(content)
    saved(folder, 7)
    asked_to_stop(folder, number)
    assert ends(folder, number)[0] == "requeue"


def test_a_recipe_that_kills_its_nodes_meets_a_bound(folder):
    for _ in range(5):
        start(folder)
    assert ends(folder, start(folder), status=1)[0] == "requeue"  # does not part them
    for _ in range(5):
        start(folder)
    with pytest.raises(
        AttemptError, match=r"10 attempts in a row from step 0 were killed .* potamos requeue"
    ) as caught:
        start(folder)
    assert not isinstance(caught.value, UnusableNodeError)
    last = read_attempts(folder)[-1]
    assert (last.verdict, last.reason) == ("failed", str(caught.value))  # which `potamos status` shows
    with pytest.raises(AttemptError, match="10 attempts in a row"):
        start(folder)
    note_submission(folder, ["9"])
    assert start(folder) == 11


def test_deaths_between_which_there_is_progress_meet_no_bound(folder):
    for step in range(1, 25):
        start(folder)
        start(folder)
        saved(folder, step)
    for _ in range(10):
        start(folder)
    saved(folder, 25)  # by the last of them
    assert start(folder) is not None


def test_a_job_that_follows_without_bad_nodes_does_not_count_anew(folder):
    for job in ("4", "5;cluster"):
        ends(folder, start(folder), status=1)
        attempts.main(["follow", str(folder.path), "--job", job])
    assert jobs_of(folder) == ["4", "5"]
    assert ends(folder, start(folder), status=1)[0] == "failed"


def test_numbers_avoid_marks_of_attempts_that_found_the_lock_held(folder):
    """A mark left over would make another attempt look busy."""
    mark_busy(folder, 4, "process 7 on vm")
    assert start(folder) == 5


def test_how_long_the_lock_is_waited_for(folder, monkeypatch):
    waits = []
    monkeypatch.setattr(attempts, "await_lock", lambda run, seconds, tell: waits.append(seconds))
    for requeue in ("1", "0"):
        attempts.main(["await", str(folder.path), "--requeue", requeue])
    assert waits == [300, 3600]
    verdicts = [ends(folder, refused(folder, start(folder)), status=2)[0] for _ in range(12)]
    assert verdicts == ["busy"] * 11 + ["failed"]


def test_records_are_on_the_disk_when_they_are_written(folder, monkeypatch):
    sizes = []
    monkeypatch.setattr(attempts.os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    start(folder)
    assert sizes == [folder.attempts.stat().st_size]
    ends(folder, 0)
    assert sizes[1:] == [folder.attempts.stat().st_size]


def test_the_commands_of_the_script(folder):
    def call(*arguments):
        command = [sys.executable, "-P", "-m", "potamos.slurm.attempt", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder.path, timeout=60)

    assert call("begin", ".", "--job", "3", "--restart", "2", "--nodes", "n0").stdout == "0\n"
    done = call("end", ".", "--attempt", "0", "--status", "1", "--told", CANCELLED, "--restart", "2")
    assert (done.returncode, done.stdout) == (0, "stopped\n")
    assert "attempt 0: stopped: cancelled" in done.stderr
    folder.cancelled.touch()
    refused = call("begin", ".")
    assert (refused.returncode, refused.stdout) == (attempts.REFUSED, "")
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr
