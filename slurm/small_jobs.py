"""Arrays of small Python jobs on the cluster: commands of this program that share out work, and one that follows them.

For data preparation and evaluation, whose commands can be killed anywhere and run again; training has a script of its
own (`script.py`). Built on submitit (`pip install 'potamos[slurm]'`; the package `submit` is an unrelated program),
which writes the batch script, starts the array and puts a job that meets its time limit back into the queue. Where its
ways cost users dearly, ours differ:

* Its jobs' states come from `sacct`, which fails on clusters without a database of jobs. Nothing here asks for them:
  `still_queued` reads squeue.
* It lets SIGTERM, which announces a preemption, pass. So do the commands here, by design: they use the grace until
  Slurm ends the job and requeues it. A process that ended in time would be taken for one that failed. The price:
  `scancel` takes Slurm's KillWait, usually 30 s.
* It counts every stop signal within ten minutes of the limit as a time limit, which of a short job is any, and by
  default gives a job up after three. Here the count is `RESTARTS`: a command that goes on where it was may need many.
* It pickles the function. What is pickled here is `Command`, by its name, with a list of words and a bool.
* A job's time is 5 minutes unless it is told otherwise, its working key "submitit", and srun does not take the job's
  --cpus-per-task over by itself. All are given.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from potamos.files import write_atomically
from potamos.slurm import client
from potamos.slurm.client import NoSlurm, SlurmError
from potamos.slurm.job import CONSTRAINT, MEMORY, WORD
from potamos.slurm.site import Site

RESTARTS = 50
"""How often a job that meets its time limit goes back into the queue."""
WARNING_SECONDS = 30
"""How long before its time limit a job is stopped. Slurm may do it a minute earlier."""
DEFAULT_TIME = 4 * 3600
JOBS = "jobs.json"


class MissingExtra(SlurmError):
    """submitit is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "small jobs on a cluster need submitit: pip install 'potamos[slurm]' (the package `submit` is an unrelated "
            "program), in the environment that the nodes use too"
        )


@dataclass(frozen=True)
class Resources:
    """What each task is given. None leaves it to the site file, then to the cluster.

    time: seconds; None for four hours, or the partition's limit where that is less. memory: of a task, as in 8G; where
    the cluster has no default, a task without it takes all of a node's. at_once: tasks that run at a time, at most.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: int | None = None
    cpus: int = 1
    memory: str | None = None
    gpus: int = 0
    at_once: int | None = None

    def __post_init__(self) -> None:
        for key, pattern in (
            ("partition", WORD), ("account", WORD), ("qos", WORD), ("constraint", CONSTRAINT), ("memory", MEMORY)
        ):  # fmt: skip
            value = getattr(self, key)
            if value is not None and not pattern.fullmatch(value):
                raise SlurmError(f"--{key} {value!r} cannot be asked of sbatch; write it as in {_EXAMPLES[key]}")


_EXAMPLES = {"partition": "cpu", "account": "lab", "qos": "normal", "constraint": "'icelake|skylake'", "memory": "8G"}


class Command:
    """Runs one command of this program on a node; what submitit pickles, by name.

    forgiving: a failure counts as success, because a job that follows does the same again.
    """

    def __init__(self, *, forgiving: bool = False) -> None:
        self.forgiving = forgiving

    def __call__(self, arguments: list[str]) -> int:
        command = [sys.executable, "-P", "-m", "potamos.pretrain.cli", *arguments]
        print(shlex.join(["potamos", *arguments]), flush=True)
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_in_child)
        try:
            status = child.wait()
        finally:  # submitit's handler leaves through here at the time limit
            child.kill()
            child.wait()
        if status and not self.forgiving:
            raise SlurmError(f"it ended with status {status}, see above: {shlex.join(['potamos', *arguments])}")
        return status

    def checkpoint(self, arguments: list[str]) -> Any:
        """At the time limit: the same again. What is finished is on the disk already."""
        import submitit

        return submitit.helpers.DelayedSubmission(Command(forgiving=self.forgiving), arguments)


def _in_child() -> None:
    """Slurm signals every process of a task. Only its SIGKILL ends the command, or the end of its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


# --- submitting ---------------------------------------------------------------------------------------------------


class Submission:
    """Jobs that share a folder of scripts, logs and notes; one at a time, whatever it takes of jobs.

    Raises:
        MissingExtra, NoSlurm: what is needed is not here.
        SlurmError: jobs submitted into this folder before are in the queue still; their ids are named.
    """

    def __init__(self, folder: Path, site: Site, resources: Resources) -> None:
        self.folder, self.site, self.resources = folder.absolute(), site, resources
        self.ids: list[str] = []
        _submitit()
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise NoSlurm("sbatch")
        if "%" in str(self.folder):
            raise SlurmError(f"{self.folder}: Slurm replaces % in the names of logs; choose a name without")
        if waiting := still_queued(folder):
            jobs = sorted({each.partition("_")[0] for each in waiting}, key=int)
            raise SlurmError(
                f"{len(waiting)} tasks with logs in {folder} are in the queue still. Wait for them (squeue -j "
                f"{','.join(jobs)}), or end them first (scancel {' '.join(jobs)})"
            )

    def add(
        self,
        name: str,
        commands: Sequence[Sequence[str]],
        *,
        after: str | None = None,
        whatever: bool = False,
        forgiving: bool = False,
        resources: Resources | None = None,
    ) -> str:
        """Submit an array with a task for each command of this program (arguments without `potamos`); returns its id.

        Args:
            after: the id of a job to wait for. If that fails, this one is removed from the queue.
            whatever: it need not succeed.
            forgiving: see `Command`.
            resources: other ones than the submission's.

        Raises:
            SlurmError: sbatch refuses it, in Slurm's own words. The jobs added before are ended.
        """
        submitit = _submitit()
        self.folder.mkdir(parents=True, exist_ok=True)
        python = f"{shlex.quote(self.site.python or sys.executable)} -P"
        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=RESTARTS, python=python)
        executor.update_parameters(**self._parameters(name, after, whatever, resources or self.resources))
        words = [[str(word) for word in command] for command in commands]
        try:
            # submitit prints what sbatch says before it raises it.
            with _clean_environment(), contextlib.redirect_stderr(io.StringIO()):
                jobs = executor.map_array(Command(forgiving=forgiving), words)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            if self.ids:
                client.run("scancel", *self.ids, check=False)
            raise SlurmError(f"`sbatch` says: {client.complaint(str(error)) or error}") from None
        (main,) = {job.job_id.partition("_")[0] for job in jobs}
        self.ids.append(main)
        note = {"ids": self.ids, "submitted": datetime.now(UTC).isoformat(timespec="seconds")}
        write_atomically(self.folder / JOBS, json.dumps(note).encode() + b"\n")
        return main

    def logs(self, job: str) -> str:
        """A pattern of the logs of one job's tasks, which hold what both streams said, of every start."""
        return f"{self.folder}/{job}*_log.out"

    def _parameters(self, name: str, after: str | None, whatever: bool, wanted: Resources) -> dict[str, Any]:
        site = self.site
        more: dict[str, Any] = {"requeue": True}
        if after is not None:
            more |= {"dependency": f"{'afterany' if whatever else 'afterok'}:{after}", "kill-on-invalid-dep": "yes"}
        seconds = _time(wanted, site)
        return {
            "job_name": name,
            "time": -(-seconds // 60),
            "signal_delay_s": WARNING_SECONDS,
            "cpus_per_task": wanted.cpus,
            "srun_args": [f"--cpus-per-task={wanted.cpus}"],
            "gpus_per_node": wanted.gpus or None,
            "mem": wanted.memory,
            **{
                key: getattr(wanted, key) or getattr(site, key) for key in ("partition", "account", "qos", "constraint")
            },
            "array_parallelism": wanted.at_once or 10_000,
            "setup": [
                *site.prologue,
                *(f"export {key}={shlex.quote(value)}" for key, value in sorted(site.environment.items())),
            ],
            "stderr_to_stdout": True,
            "wckey": None,
            "additional_parameters": more,
        }


def still_queued(folder: Path) -> list[str]:
    """Ids of the jobs last submitted into this folder that wait or run: 12, or 12_3 of an array."""
    try:
        ids = json.loads((folder / JOBS).read_bytes())["ids"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return list(client.queue([str(each) for each in ids]))


def _submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        if error.name not in ("submitit", "cloudpickle"):
            raise
        raise MissingExtra from None
    return submitit


def _time(wanted: Resources, site: Site) -> int:
    """Seconds of a task. Longer than the partition allows, it would wait in the queue for ever."""
    if wanted.time is not None:
        return wanted.time
    known = client.partitions()
    name = wanted.partition or site.partition
    chosen = known.get(name) if name else next((p for p in known.values() if p.default), None)
    limit = chosen.max_time if chosen is not None else None
    return DEFAULT_TIME if limit is None else min(DEFAULT_TIME, limit)


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """SBATCH_PARTITION and its like win over a script; nobody expects that of what was set for another job."""
    kept = client.environment()
    dropped = {name: os.environ.pop(name) for name in list(os.environ) if name not in kept}
    try:
        yield
    finally:
        os.environ.update(dropped)
