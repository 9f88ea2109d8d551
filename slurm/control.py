"""Stopping runs for good, and sending them back into the queue."""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from potamos.files import write_atomically
from potamos.slurm import client
from potamos.slurm.attempt import newest_step
from potamos.slurm.checks import user_name
from potamos.slurm.client import QueueEntry, SlurmError
from potamos.slurm.lock import lock_holder
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.status import (
    WAITING,
    Facts,
    Status,
    entries_of,
    find_runs,
    is_run,
    judge,
    printable,
    read_facts,
)
from potamos.slurm.submit import resubmit

GRACE = 60.0  # seconds that the ranks get to finish their step and save
AGAIN = 5.0  # seconds between two such requests
LEAVE = 30.0  # seconds that Slurm gets to end what did not leave by itself
AT_ONCE = 500  # ids that one command is given: a command line has an end

ENDING = ("COMPLETING", "STAGE_OUT")
HELD = ("JobHeldUser", "JobHeldAdmin", "launch failed requeued held", "job requeued in held state")


class ControlError(ValueError):
    """A run to which this cannot be done. Says why, and what can be."""


# --- cancel ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cancelled:
    """A run that was cancelled: its jobs, the step of its newest checkpoint, and whether it trained until then.

    ``left``: whether it is over; ``holder``: who trains it all the same, as ranks do that outlived their slurmd.
    """

    folder: Path
    jobs: Sequence[str]
    saved: int
    trained: bool
    left: bool
    holder: str | None = None

    def __str__(self) -> str:
        name = printable(self.folder)
        if self.holder is not None:
            return f"{name}: no job of it is left, but {self.holder} trains it; send that SIGTERM on its machine"
        if not self.left:
            return f"{name}: job {', '.join(self.jobs)} is still ending; see potamos status"
        if not self.trained:
            return f"{name}: taken out of the queue" + (f"; saved at step {self.saved}" if self.saved else "")
        return f"{name}: " + (f"saved at step {self.saved}" if self.saved else "ended before its first checkpoint")


def cancel(
    folders: Iterable[str | os.PathLike[str]],
    *,
    grace: float = GRACE,
    tell: Callable[[str], object] = lambda text: None,
    poll: float = 1.0,
) -> list[Cancelled]:
    """End every job of these runs, those that wait in a chain or an array included; nothing requeues them.

    A run is marked before its jobs hear of it, so that a batch script which ends meanwhile does not put it back. What
    waits is taken out at once. What runs is told to save, as before a time limit, and gets ``grace`` seconds for it
    (0: none); what is still there then is ended by Slurm.

    Args:
        folders: runs, or folders of runs such as a sweep's.

    Raises:
        StatusError: no such folder.
        ControlError: none of them waits or runs.
        SlurmError: Slurm cannot be asked, or refuses.
    """
    facts = [read_facts(run) for run in find_runs(folders)]
    client.check_answers()
    queue = client.queue({job for fact in facts for job in fact.jobs})
    own = [(fact, entries) for fact in facts if (entries := entries_of(fact, queue))]
    if not own:
        raise ControlError(_nothing(facts))
    for fact, _ in own:
        mark_cancelled(fact.folder)
    waits = [entry.id for _, entries in own for entry in entries if entry.state in WAITING]
    runs = [entry.id for _, entries in own for entry in entries if entry.state not in WAITING]
    _scancel(waits)  # first: the next of a chain would begin when this one ends
    left: set[str] = {*waits, *runs}
    if runs and grace > 0:
        tell(f"{len(runs)} {'job' if len(runs) == 1 else 'jobs'} told to save; up to {grace:.0f} s for it")
        left = _await(left, grace, poll, save=True)
    _scancel(sorted(left.intersection(runs)))
    left = _await(left, LEAVE, poll)
    done = []
    for fact, entries in [*own, *((fact, []) for fact in facts if not any(fact is each for each, _ in own))]:
        there = any(entry.id in left for entry in entries)
        holder = None if there else lock_holder(fact.folder.lock)
        if entries or holder is not None:  # nothing is told of the others, which were over before
            trained = any(entry.id in runs for entry in entries)
            jobs, saved = [entry.id for entry in entries], newest_step(fact.folder)
            done.append(Cancelled(fact.folder.path, jobs, saved, trained, not there and holder is None, holder))
    return done


def mark_cancelled(folder: RunFolder) -> None:
    """Leave word that nothing may go on with this run until someone requeues it."""
    facts = {"by": user_name(), "host": socket.gethostname(), "at": datetime.now(UTC).isoformat("T", "seconds")}
    write_atomically(folder.cancelled, (json.dumps(facts) + "\n").encode())


def _nothing(facts: Sequence[Facts]) -> str:
    if not facts:
        return "there is no run to cancel"
    names = ", ".join(printable(fact.folder.path) for fact in facts[:4]) + (", ..." if len(facts) > 4 else "")
    holders = [holder for fact in facts if (holder := lock_holder(fact.folder.lock))]
    if holders:
        return f"{names}: no job of Slurm's, but {holders[0]} trains it; press Ctrl-C there, or send it SIGTERM"
    return f"{names}: no job of it waits or runs; see potamos status"


def _scancel(ids: Sequence[str], *options: str) -> None:
    for begin in range(0, len(ids), AT_ONCE):
        try:
            client.run("scancel", *options, *ids[begin : begin + AT_ONCE])
        except SlurmError as error:
            # A job that has just ended, or that has no step to signal yet, is no reason to leave the others alone.
            if not any(
                word in str(error) for word in ("Invalid job id", "completed", "can not be altered", "No active")
            ):
                raise


def _await(ids: Iterable[str], seconds: float, poll: float, *, save: bool = False) -> set[str]:
    """Those of these jobs that are still there when the time is over.

    Args:
        save: tell them to save meanwhile; again and again, because ranks that have not started yet hear nothing. A job
            that its script was just sending back into the queue is taken out.
    """
    left, now = set(ids), time.monotonic()
    end, again = now + seconds, now
    while True:
        queue = client.queue(left)
        left &= queue.keys()
        if not left or time.monotonic() >= end:
            return left
        if save and time.monotonic() >= again:
            again = time.monotonic() + AGAIN
            there = sorted(left)
            _scancel([job for job in there if queue[job].state not in WAITING], "--signal=USR1")
            _scancel([job for job in there if queue[job].state in WAITING])
        time.sleep(min(poll, max(0.0, end - time.monotonic())))


# --- requeue --------------------------------------------------------------------------------------------------------


def requeue_all(folders: Iterable[str | os.PathLike[str]], *, grace: float = GRACE) -> Iterator[str]:
    """`requeue` each of these runs; of a folder of runs those that can be. What was done, or why not, as sentences.

    Raises:
        StatusError: no such folder.
        ControlError: a run that was named itself cannot be requeued.
    """
    for folder in map(Path, folders):
        if not folder.is_dir() or is_run(folder):
            yield requeue(folder, grace=grace)
            continue
        for run in find_runs([folder]):
            try:
                yield requeue(run, grace=grace)
            except ControlError as error:
                yield str(error)


def requeue(run: str | os.PathLike[str], *, grace: float = GRACE, poll: float = 0.5) -> str:
    """Send a run back into the queue; what was done, as a sentence.

    A job that trains is told to save, as before a time limit, upon which its script puts it back (or the next of its
    chain goes on). Slurm's own requeue would grant it no more than KillWait, usually 30 s, so that is for a job which
    has not saved after ``grace`` seconds. A run that was cancelled, failed or stopped is submitted again, as it was
    asked for before, and its earlier failures no longer count.

    Raises:
        ControlError: it is finished, waits already, or is trained outside of Slurm.
        SlurmError: Slurm cannot be asked, or refuses.
    """
    folder = RunFolder.of(run)
    name = printable(folder.path)
    if not folder.path.is_dir():
        raise ControlError(f"there is no run folder {name}")
    facts = read_facts(folder)
    client.check_answers()
    queue = client.queue(facts.jobs)
    status, own = judge(facts, queue, datetime.now(UTC)), entries_of(facts, queue)
    if status.state == "finished":
        raise ControlError(
            f"{name} is finished at step {(facts.done or {}).get('step')}: raise train.steps to go on, as in "
            f"potamos submit RECIPE train.steps=N --run {shlex.quote(str(folder.path))}"
        )
    active = [entry for entry in own if entry.state not in (*WAITING, "COMPLETING")]
    if active:
        return f"{name}: {_send_back(folder, active[0], grace, poll)}"
    if own:
        return _of_waiting(name, own, status)
    return f"{name}: {_again(folder)}"


def _again(folder: RunFolder) -> str:
    if holder := lock_holder(folder.lock):
        raise ControlError(f"{printable(folder.path)} is trained by {holder}; stop that first, with Ctrl-C or SIGTERM")
    jobs, saved = resubmit(folder), newest_step(folder)
    return f"submitted again, job {', '.join(jobs)}" + (f", from step {saved}" if saved else "")


def _send_back(folder: RunFolder, entry: QueueEntry, grace: float, poll: float) -> str:
    """Tell a job to save, and wait for what becomes of it: a job that is ending may go back into the queue or leave."""
    job, state, ran, ends = entry.id, entry.state, entry.state == "RUNNING", False
    again, end = time.monotonic(), time.monotonic() + grace
    while time.monotonic() < end:
        if not ends and time.monotonic() >= again:
            again = time.monotonic() + AGAIN
            _scancel([job], "--signal=USR1")
        time.sleep(poll)
        found = client.queue([job]).get(job)
        if found is None:
            return f"job {job} has ended; {_after(folder)}"
        state = found.state
        if state in WAITING or (ran and state == "CONFIGURING") or (ends and state == "RUNNING"):
            return f"job {job} has saved and goes back into the queue"
        ran = ran or state == "RUNNING"
        if state in ENDING and not ends:
            ends, end = True, max(end, time.monotonic() + LEAVE)
    if ends:
        return f"job {job} is still ending; see potamos status, and try again if nothing goes on"
    client.run("scontrol", "requeue", job)
    return f"job {job} goes back into the queue"


def _after(folder: RunFolder) -> str:
    """What goes on when a job has left the queue for good; where nothing would, the run is submitted again."""
    facts = read_facts(folder)
    if facts.finished:
        return "the run is finished"
    if facts.cancelled:
        return "the run was cancelled meanwhile"
    if rest := entries_of(facts, client.queue(facts.jobs)):
        return f"job {rest[0].id} goes on"
    return _again(folder)


def _of_waiting(name: str, own: Sequence[QueueEntry], status: Status) -> str:
    held = [entry.id for entry in own if entry.reason in HELD or entry.state == "REQUEUE_HOLD"]
    if not held:
        ending = own[0].state == "COMPLETING"
        raise ControlError(
            f"{name}: job {own[0].id} is still ending; try again in a moment"
            if ending
            else f"{name}: job {own[0].id} waits already ({status.why or own[0].reason})"
        )
    client.run("scontrol", "release", ",".join(held))
    return f"{name}: job {', '.join(held)} was held; released"
