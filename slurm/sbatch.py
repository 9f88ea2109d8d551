"""What is said to sbatch, and what its answer means; also no answer, after which a job may wait all the same."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Collection
from pathlib import Path

from potamos.slurm import client
from potamos.slurm.checks import SubmitError, capable_nodes, user_name
from potamos.slurm.client import NoSlurm, SlurmError
from potamos.slurm.job import Job
from potamos.slurm.run_folder import RunFolder

JOB_ID = re.compile(r"[1-9][0-9]*(_[0-9]+)?", re.ASCII)
PATIENCE = 120
"""Seconds that sbatch may take: one that is cut short may have queued the job all the same."""
LOOKS = (0.0, 2.0, 5.0)
"""Seconds before each look for a job of which sbatch did not tell: a busy controller may be about to take it."""
IMPOSSIBLE = "Requested node configuration is not available"
"""What `sbatch --test-only` says of a job that cannot run, and of one that waits for nodes that are away."""
FAILED = (
    "BOOT_FAIL",
    "CANCELLED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
# After these the controller may have the job. A failure to connect is not among them: it has heard nothing.
_UNHEARD = re.compile(r"did not answer within|timed out|Zero Bytes|reset by peer|Communication connection|exit -\d+")


class UnheardError(SubmitError):
    """Whether a job was queued is not known."""


def command(job: Job, *, after: str | None = None, previous: str | None = None) -> list[str]:
    """The words that submit a job's script. ``after``: a job that must succeed; ``previous``: one that must end."""
    words = ["sbatch", "--parsable", f"--chdir={job.folder}"]
    if previous is not None:
        words += [f"--dependency=afterany:{previous}", "--kill-on-invalid-dep=yes"]
    elif after is not None:
        words += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return [*words, str(RunFolder(job.folder).script)]


# --- dependencies ---------------------------------------------------------------------------------------------------


def check_dependency(after: str | None) -> None:
    """Refuse what is no number of a job. Raises SubmitError."""
    if after is not None and not JOB_ID.fullmatch(after):
        raise SubmitError(f"--after: {after!r} is no job; give the number that sbatch or potamos submit printed")


def check_known(after: str | None) -> None:
    """Refuse a job that Slurm does not know, for which it would not wait, and one that has failed.

    Raises:
        SubmitError: names the job, and its state.
        SlurmError: Slurm cannot be asked.
    """
    if after is None:
        return
    waits = any(after in (entry.id, entry.array) for entry in client.queue([after]).values())
    try:
        records = client.show("job", after)
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        records = []
    if not waits and not records:
        raise SubmitError(
            f"--after: neither squeue nor scontrol knows job {after}, and Slurm takes an unknown job for one that has "
            "succeeded: this one would not wait. If it did succeed, leave out --after; Slurm forgets jobs after minutes"
        )
    for record in records:
        state = record.get("JobState", "")
        if state in FAILED:
            raise SubmitError(
                f"--after: job {after} is {state}, so what waits for its success would never run; name one that may "
                "succeed, or leave out --after"
            )


# --- asking ---------------------------------------------------------------------------------------------------------


def rehearse(words: list[str], job: Job) -> list[str]:
    """Ask the controller whether it would take this; remarks.

    It says of nodes that are down or drained what it says of nodes that do not exist, though it queues the job: with
    as many in the partition as are asked for, that is a remark.

    Raises:
        SlurmError: it refuses.
    """
    try:
        client.run(*words[:-1], "--test-only", words[-1], timeout=PATIENCE)
    except SlurmError as error:
        if IMPOSSIBLE not in str(error):
            raise
        ready, away = capable_nodes(job)
        if not away or len(ready) + len(away) < job.nodes:
            raise
        names = [f"{name} is {state}" for name, state in sorted(away.items())]
        more = f", and {len(names) - 4} more" if names[4:] else ""
        return [f"the job waits until nodes return: {', '.join(names[:4])}{more}"]
    return []


def send(words: list[str], job: Job, before: Collection[str]) -> str:
    """Queue a job's script; its number, also where sbatch was cut short and the controller has it.

    Args:
        before: the numbers that this script was queued as before.

    Raises:
        SlurmError: Slurm has refused, and nothing was queued.
        UnheardError: whether it was queued is not known.
    """
    try:
        return client.run(*words, timeout=PATIENCE).strip().partition(";")[0]
    except NoSlurm:
        raise
    except SlurmError as error:
        if not _UNHEARD.search(str(error)):
            raise
        found = find(job, before, error)
        if found is None:
            raise
        return found


def find(job: Job, before: Collection[str], why: object) -> str | None:
    """The number that a job has in the queue beside those ``before``; None if it is not there.

    Raises:
        UnheardError: squeue does not answer; ``why`` it was asked is part of the message.
    """
    silence: SlurmError | None = None
    tasks = {str(task) for task in job.tasks}
    for pause in LOOKS:
        time.sleep(pause)
        try:
            entries = client.queue(user=user_name()).values()
        except SlurmError as error:
            silence = error
            continue
        silence = None
        for entry in entries:
            number, _, task = entry.id.partition("_")
            mine = entry.name == job.name and entry.is_in([job.folder]) and (not tasks or task in tasks)
            if mine and number not in before:
                return number
    if silence is not None:
        raise UnheardError(_unheard(job.folder, why, silence)) from silence
    return None


def _unheard(folder: Path, why: object, silence: SlurmError) -> str:
    return (
        f"{why}. Whether the job was queued is not known: {silence}. So {folder} was left as the job needs it. Later "
        f"ask: squeue --user {shlex.quote(user_name())} --format '%i %T %j %Z'. A job in that folder is this one; "
        "where there is none, submit again, which first puts back what was there before"
    )
