"""Whether a folder is free for a job: not being submitted, without a job in the queue, and nobody trains there.

A run belongs to its own folder's jobs and to the array's above it: two jobs of one run would replace each other's
checkpoints, however they were submitted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import resource
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TextIO

from potamos.slurm import client
from potamos.slurm.attempt import jobs_of
from potamos.slurm.checks import SubmitError, check_writable, user_name
from potamos.slurm.client import QueueEntry
from potamos.slurm.job import Job
from potamos.slurm.lock import lock_holder
from potamos.slurm.prepare import SUBMIT_LOCK
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.status import places_of

SPARE = 64  # open files beside the locks


# --- one submission at a time ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(job: Job) -> Iterator[None]:
    """Hold a job's folder and its runs' against other submissions, from any machine where their file system has locks.

    A run may be submitted alone and within an array, so each has its own lock. All are taken in the order of their
    names: of two submissions that meet, one gets through. Folders that are made for this go again if nothing is put
    into them.

    Raises:
        SubmitError: another submission holds one of them.
    """
    folders = sorted({job.folder, *job.runs})
    _allow_open_files(len(folders) + SPARE)
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_held(folder))
        yield


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    check_writable(folder)
    made = not folder.exists()
    with _locked(folder):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # someone put something there just now
                if made and os.listdir(folder) == [SUBMIT_LOCK]:
                    (folder / SUBMIT_LOCK).unlink()  # while it is held: who opened it meanwhile finds that it is gone
                    folder.rmdir()


def _locked(folder: Path) -> TextIO:
    """The lock's file, held until it is closed."""
    path = folder / SUBMIT_LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (it is closed by whoever holds it)
        except (FileNotFoundError, FileExistsError):
            if folder.exists() and not folder.is_dir():
                raise
            continue  # another submission has just removed the folder that it had made
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file  # a file system without locks
            file.close()
            raise SubmitError(f"{folder} is being submitted by another command; wait for that one") from None
        file.close()


def _allow_open_files(count: int) -> None:
    """Raise this process's limit, which is 1024 in most places: a sweep may have as many runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


# --- one job at a time ----------------------------------------------------------------------------------------------


def check_idle(job: Job, *, alone: bool = False) -> None:
    """Refuse runs with a job in the queue, or that someone trains; and an array beside another in its folder, whose
    script and code it would replace.

    Args:
        alone: the job goes on with one task of an array, by the array's own script, whatever the other tasks do.

    Raises:
        SubmitError: names the job, or who trains.
    """
    ids = {run: set(jobs_of(run)) for run in job.runs}
    known = client.queue(named) if (named := set().union(*ids.values())) else {}
    for run in job.runs:
        # Numbers alone do not tell whose a job is. Where it runs does: in a folder that the run was ever submitted in.
        places = [*places_of(RunFolder(run)), job.folder, run, run.parent]
        for entry in known.values():
            if {entry.id, entry.array} & ids[run] and entry.is_in(places):
                raise SubmitError(_busy(job, run, entry, recorded=True))
    # Also what was queued by a command that was killed before it could write that down.
    tasks, above = {str(task) for task in job.tasks}, _task_above(job)
    for entry in client.queue(user=user_name()).values():
        if entry.is_in([job.folder]) and (not alone or _task(entry) in tasks):
            raise SubmitError(_busy(job, job.folder, entry, recorded=bool({entry.id, entry.array} & _all_jobs(job))))
        if above is not None and _task(entry) == above and entry.is_in([job.folder.parent]):
            raise SubmitError(_busy(job, job.folder, entry, recorded=False))
        if places := [run for run in job.runs if entry.is_in([run])]:
            raise SubmitError(_busy(job, places[0], entry, recorded=False))
    for run in job.runs:
        if holder := lock_holder(RunFolder(run).lock):
            raise SubmitError(
                f"{run} is trained by {holder}; stop that first, with Ctrl-C or SIGTERM, or name another folder with "
                "--run"
            )


def check_seeds(job: Job) -> None:
    """Refuse an array in a folder that holds other runs: their script would be gone, and no requeue could use it.

    Raises:
        SubmitError: names these runs.
    """
    if not job.tasks or not job.folder.is_dir():
        return
    own = {run.resolve() for run in job.runs}
    others = sorted(
        path for path in job.folder.iterdir() if RunFolder(path).recipe.exists() and path.resolve() not in own
    )
    if others:
        names = ", ".join(path.name for path in others[:4]) + (", ..." if len(others) > 4 else "")
        raise SubmitError(
            f"{job.folder} holds {names} of another array, which could not be requeued any more: ask for those seeds "
            f"too, name another folder with --run, or go on with one: potamos requeue {shlex.quote(str(others[0]))}"
        )


def _task(entry: QueueEntry) -> str:
    """The number of an array's task; empty for a job that is none."""
    return entry.id.partition("_")[2]


def _all_jobs(job: Job) -> set[str]:
    """The jobs that anything in the job's folder was submitted as, cancelled ones and other seeds' included."""
    below = [path for path in job.folder.iterdir() if path.is_dir()] if job.tasks and job.folder.is_dir() else []
    return {number for run in {*job.runs, *below} for number in jobs_of(run)}


def _task_above(job: Job) -> str | None:
    """The task that trains this job's run by the script of an array in the folder above, if there is one."""
    if job.tasks:
        return None
    try:
        text = RunFolder(job.folder.parent).script.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    runs = map(os.path.realpath, _words(text, "RUNS"))
    return dict(zip(runs, _words(text, "TASKS"), strict=False)).get(os.path.realpath(job.folder))


def _words(script: str, name: str) -> Collection[str]:
    """The words of an array of the shell that `script.py` wrote: on one line, for no path holds a line's end."""
    match = re.search(rf"^{name}=\((.*)\)  #", script, re.MULTILINE)
    try:
        return shlex.split(match[1]) if match else []
    except ValueError:
        return []


def _busy(job: Job, run: Path, entry: QueueEntry, *, recorded: bool) -> str:
    folder = run if recorded and run != job.folder else job.folder
    end = f"potamos cancel {shlex.quote(str(folder))}" if recorded else f"scancel {entry.id}"
    where = "" if entry.is_in([run]) else f", which runs in {entry.folder}"
    return (
        f"{run} has job {entry.id} already ({entry.state}{f', {entry.reason}' if entry.reason else ''}){where}; wait "
        f"for it, end it ({end}), or name another folder with --run"
    )
