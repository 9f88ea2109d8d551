"""Hand a job to Slurm: hold its folder, prepare it, queue it, and remember what was asked.

What can be known before is checked before (`checks.py`); what only the controller can tell (accounts, limits of a user,
a reservation) `sbatch --test-only` says first.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potamos.files import write_atomically
from potamos.slurm import client
from potamos.slurm.attempt import note_submission
from potamos.slurm.checks import SubmitError
from potamos.slurm.job import Container, Job
from potamos.slurm.prepare import Prepared, changes, check_folder, is_done, prepare, read_json
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.taken import check_idle, check_seeds, held
from potamos.slurm.undo import roll_back, unless_accepted

JOB_ID = re.compile(r"[1-9][0-9]*(_[0-9]+)?", re.ASCII)
PATIENCE = 120
"""Seconds that sbatch may take: one that is cut short may have queued the job all the same."""


@dataclass(frozen=True)
class Submitted:
    """What was queued. ``ids`` in the order in which they run."""

    ids: tuple[str, ...]
    prepared: Prepared


# --- submitting -----------------------------------------------------------------------------------------------------


def command(job: Job, *, after: str | None = None, previous: str | None = None) -> list[str]:
    """The words that submit a job's script. ``after``: a job that must succeed; ``previous``: one that must end."""
    words = ["sbatch", "--parsable", f"--chdir={job.folder}"]
    if previous is not None:
        words += [f"--dependency=afterany:{previous}", "--kill-on-invalid-dep=yes"]
    elif after is not None:
        words += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return [*words, str(RunFolder(job.folder).script)]


def check_dependency(after: str | None) -> None:
    """Refuse what is no number of a job. Raises SubmitError."""
    if after is not None and not JOB_ID.fullmatch(after):
        raise SubmitError(f"--after: {after!r} is no job; give the number that sbatch or potamos submit printed")


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
        SubmitError, PrepareError: the folder is taken, or its runs are finished.
    """
    check_dependency(after)
    check_folder(job)
    with held(job):
        check_idle(job)
        for folder in {job.folder, *job.runs}:
            roll_back(folder)  # what a submission that was killed has changed
        check_seeds(job)
        if all(is_done(RunFolder(run), recipe) for run, recipe in zip(job.runs, recipes, strict=True)):
            raise SubmitError(
                f"{job.folder} is finished; raise train.steps to go on, or name another folder with --run"
            )
        with unless_accepted(changes(job, refresh_code)):
            prepared = prepare(job, recipes, environment, refresh_code=refresh_code)
            asked = {"job": _plain(job), "after": after, "chain": chain}
            return Submitted(_queue(job, asked), prepared)


def resubmit(run: str | os.PathLike[str]) -> list[str]:
    """Queue a run once more, as it was asked for before; of an array, this run alone. The ids.

    Raises:
        NoSlurm, SlurmError: Slurm is not here, or refuses.
        SubmitError: the run was never submitted, has a job already, or its folder is being submitted.
    """
    folder = RunFolder.of(run)
    asked = read_json(folder.job)
    try:
        job = job_of(asked)
    except (KeyError, TypeError, ValueError):
        raise SubmitError(f"{folder.path} was never submitted; do so with: potamos submit RECIPE --run ...") from None
    one = _only(job, folder.path)
    with held(one):
        check_idle(one, alone=bool(job.tasks))
        roll_back(folder.path)  # not the array's own folder, which its other tasks may be using
        with unless_accepted({folder.path: ["job.json", "cancelled"]}):
            return list(_queue(one, asked | {"after": None}, narrowed=bool(job.tasks)))


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


def _queue(job: Job, asked: Mapping[str, Any], *, narrowed: bool = False) -> tuple[str, ...]:
    """Test, then queue; what was queued is taken back if the rest of its chain is refused, or cannot be written down.

    narrowed: to a task of an array, though its script asks for all.
    """
    options = [f"--array={job.array}"] if narrowed else []
    first = _with(command(job, after=asked["after"]), options)
    client.run(*_with(first, ["--test-only"]), timeout=PATIENCE)
    for run in job.runs:  # a mark of a cancelled run would end the job as it begins
        RunFolder(run).cancelled.unlink(missing_ok=True)
    ids: list[str] = []
    try:
        for _ in range(asked["chain"]):
            words = _with(command(job, after=asked["after"], previous=ids[-1] if ids else None), options)
            ids.append(client.run(*words, timeout=PATIENCE).strip().partition(";")[0])
        _remember(job, {**asked, "ids": ids, "submitted": _now(), "command": first}, job.runs if narrowed else None)
    except BaseException:
        if ids:
            with contextlib.suppress(client.SlurmError):  # what went wrong before is what to tell
                client.run("scancel", *ids, check=False)
        raise
    return tuple(ids)


def _remember(job: Job, asked: Mapping[str, Any], places: Sequence[Path] | None = None) -> None:
    content = (json.dumps(asked, indent=1) + "\n").encode()
    for place in places or dict.fromkeys((*job.runs, job.folder)):
        write_atomically(RunFolder(place).job, content)
    for task, run in zip(job.tasks or (None,), job.runs, strict=True):
        note_submission(run, [job_id if task is None else f"{job_id}_{task}" for job_id in asked["ids"]])


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
