"""Hand a job to Slurm: hold its folder, prepare it, queue it, and remember what was asked.

What can be known before is checked before (`checks.py`); what only the controller can tell (accounts, limits of a user,
a reservation) `sbatch --test-only` says first.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potamos.files import write_atomically
from potamos.slurm import client
from potamos.slurm.attempt import jobs_of, note_submission
from potamos.slurm.checks import SubmitError
from potamos.slurm.job import Container, Job
from potamos.slurm.prepare import Prepared, changes, check_folder, is_done, prepare, read_json
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.sbatch import UnheardError, check_dependency, check_known, command, find, rehearse, send
from potamos.slurm.taken import check_idle, check_seeds, held
from potamos.slurm.undo import Pending, settle, unless_accepted


@dataclass(frozen=True)
class Submitted:
    """What was queued. ``ids`` in the order in which they run; ``remarks``: what Slurm says of their start."""

    ids: tuple[str, ...]
    prepared: Prepared
    remarks: tuple[str, ...] = ()


def submit(
    job: Job,
    recipes: Sequence[str],
    environment: str,
    *,
    after: str | None = None,
    chain: int = 1,
    refresh_code: bool = False,
) -> Submitted:
    """Prepare a job's folder and queue it, once, or ``chain`` times one after another. What is refused changes nothing.

    Args:
        recipes: the resolved recipe of each of ``job.runs``, as text.
        environment: what is installed here, as text.
        after: a job that must have succeeded first.
        refresh_code: see `prepare`.

    Raises:
        NoSlurm, SlurmError: Slurm is not here, or refuses.
        UnheardError: Slurm does not say whether it has the job.
        SubmitError, PrepareError: the folder is taken, or its runs are finished.
    """
    check_dependency(after)
    check_folder(job)
    with held(job):
        check_idle(job)
        check_known(after)
        for folder in {job.folder, *job.runs}:
            _settle(folder)
        check_seeds(job)
        if all(is_done(RunFolder(run), recipe) for run, recipe in zip(job.runs, recipes, strict=True)):
            raise SubmitError(
                f"{job.folder} is finished; raise train.steps to go on, or name another folder with --run"
            )
        with unless_accepted(changes(job, refresh_code)) as pending:
            prepared = prepare(job, recipes, environment, refresh_code=refresh_code)
            asked = {"job": _plain(job), "after": after, "chain": chain}
            ids, remarks = _queue(job, asked, pending)
            return Submitted(ids, prepared, remarks)


def resubmit(run: str | os.PathLike[str]) -> list[str]:
    """Queue a run once more, as it was asked for before; of an array, this run alone. The ids.

    Raises:
        NoSlurm, SlurmError: Slurm is not here, or refuses.
        UnheardError: Slurm does not say whether it has the job.
        SubmitError: the run was never submitted, has a job already, or its folder is being submitted.
    """
    folder = RunFolder.of(run)
    with held(_only(_job_in(folder)[0], folder.path)):
        before = _job_in(folder)[0]
        check_idle(_only(before, folder.path), alone=bool(before.tasks))
        _settle(folder.path)  # not the array's own folder, which its other tasks may be using
        job, asked = _job_in(folder)  # which of two submissions counts is settled only now
        one = _only(job, folder.path)
        with unless_accepted({folder.path: ["job.json", "cancelled", "logs"]}) as pending:
            return list(_queue(one, asked | {"after": None}, pending, narrowed=bool(job.tasks))[0])


def _job_in(folder: RunFolder) -> tuple[Job, dict[str, Any]]:
    """The job that a run was submitted as, and all that was asked for."""
    asked = read_json(folder.job)
    try:
        return job_of(asked), asked
    except (KeyError, TypeError, ValueError):
        raise SubmitError(f"{folder.path} was never submitted; do so with: potamos submit RECIPE --run ...") from None


def _only(job: Job, run: Path) -> Job:
    """The job narrowed to what trains this folder: all of it, or one task of an array."""
    places = [each for each in job.runs if each.resolve() == run.resolve()]
    if not places:
        recipe = shlex.quote(str(run / "recipe.yaml"))
        raise SubmitError(
            f"{run} was submitted as {', '.join(map(str, job.runs[:2]))}{', ...' if job.runs[2:] else ''}, and its "
            "script says so still. Write another, once no job of it waits or runs (potamos status): potamos "
            f"submit {recipe} --run {shlex.quote(str(run))}"
        )
    if not job.tasks:
        return job
    task = job.tasks[job.runs.index(places[0])]
    return replace(job, runs=(places[0],), tasks=(task,), array=str(task))


def _settle(folder: Path) -> None:
    """Put back what a submission that was killed has changed; or finish to write it down, if it was accepted."""
    place = settle(folder)
    if place is None:
        return
    asked = read_json(RunFolder(place).job)
    job = job_of(asked)
    if read_json(RunFolder(folder).job) != asked:
        write_atomically(RunFolder(folder).job, RunFolder(place).job.read_bytes())
    if folder in job.runs:
        _note(folder, asked["ids"], job.tasks[job.runs.index(folder)] if job.tasks else None)


# --- the queue ------------------------------------------------------------------------------------------------------


def _queue(
    job: Job, asked: Mapping[str, Any], pending: Pending, *, narrowed: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Test, then queue: the ids, and remarks. What was queued is taken back if the rest of its chain is refused, or
    cannot be written down; of an interrupt, what is in the queue by then stays, and is written down.

    narrowed: to a task of an array, though its script asks for all.
    """
    options = [f"--array={job.array}"] if narrowed else []
    first = _with(command(job, after=asked["after"]), options)
    remarks = rehearse(first, job)
    for run in job.runs:  # a mark of a cancelled run would end the job as it begins
        RunFolder(run).cancelled.unlink(missing_ok=True)
    for folder in {job.folder, *job.runs}:  # Slurm opens the job's log there, and ends the job without a word if not
        RunFolder(folder).logs.mkdir(exist_ok=True)
    asked = {**asked, "submission": pending.token, "command": first}
    places = job.runs if narrowed else None
    ids: list[str] = []
    pending.outcome = "unknown"  # until Slurm has answered: who is killed, or interrupted twice, cannot know
    try:
        for _ in range(asked["chain"]):
            words = command(job, after=asked["after"], previous=ids[-1] if ids else None)
            ids.append(send(_with(words, options), job, ids))
        _remember(job, {**asked, "ids": ids, "submitted": _now()}, places)
    except UnheardError:
        raise
    except KeyboardInterrupt:
        if (number := find(job, ids, "interrupted")) is not None:
            ids.append(number)
        if not ids:
            pending.outcome = "refused"
            raise
        _remember(job, {**asked, "ids": ids, "submitted": _now()}, places)
        pending.outcome = "accepted"
        raise SubmitError(
            f"interrupted, but job {', '.join(ids)} is in the queue already; to take it out: potamos cancel "
            f"{shlex.quote(str(job.folder))}"
        ) from None
    except BaseException as error:  # raised again, once nothing is left in the queue
        if ids and not _withdrawn(ids):
            raise SubmitError(
                f"{error}. Job {', '.join(ids)} could not be taken back: scancel {' '.join(ids)}"
            ) from error
        pending.outcome = "refused"
        raise
    return tuple(ids), tuple(remarks)


def _withdrawn(ids: Sequence[str]) -> bool:
    try:
        client.run("scancel", *ids, check=False)
    except client.SlurmError:
        return False
    return True


def _remember(job: Job, asked: Mapping[str, Any], places: Sequence[Path] | None = None) -> None:
    content = (json.dumps(asked, indent=1) + "\n").encode()
    for place in places or dict.fromkeys((*job.runs, job.folder)):
        write_atomically(RunFolder(place).job, content)
    for task, run in zip(job.tasks or (None,), job.runs, strict=True):
        _note(run, asked["ids"], task)


def _note(run: Path, ids: Sequence[str], task: int | None) -> None:
    """Write down a run's jobs, unless they are: whoever was cut short does so again."""
    jobs = [job_id if task is None else f"{job_id}_{task}" for job_id in ids]
    if not set(jobs) <= set(jobs_of(run)[-len(jobs) :]):
        note_submission(run, jobs)


def _with(words: list[str], options: Sequence[str]) -> list[str]:
    return [*words[:-1], *options, words[-1]]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- job.json -------------------------------------------------------------------------------------------------------


def _plain(job: Job) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(job), default=str))


def job_of(asked: Mapping[str, Any]) -> Job:
    """The job that `job.json` tells of. Raises KeyError, TypeError or ValueError if it tells of none."""
    told: dict[str, Any] = dict(asked["job"])
    told |= {"folder": Path(told["folder"]), "runs": tuple(Path(run) for run in told["runs"])}
    told |= {key: tuple(told[key]) for key in ("tasks", "prologue")}
    if told["container"] is not None:
        container: dict[str, Any] = dict(told["container"])
        container |= {key: tuple(container[key]) for key in ("mounts", "arguments")}
        told["container"] = Container(**container)
    return Job(**told)
