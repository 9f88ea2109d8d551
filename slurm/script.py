"""The batch script: lines for the scheduler, the values of one job in quotes, and `body.sh`, which is the same for all.

A recipe's values never come near the shell: the ranks read them from `recipe.yaml` in the run folder. What does come is
checked by `Job` where the scheduler reads it, and quoted where the shell does.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from potamos.slurm.job import Job

BODY = Path(__file__).with_name("body.sh")


def script(job: Job) -> str:
    """The text of `submit.sbatch`; to be submitted with the job's folder as working directory (`sbatch --chdir`)."""
    return "\n".join(["#!/bin/bash", *header(job), "", *_values(job), "", BODY.read_text(encoding="utf-8")])


def header(job: Job) -> list[str]:
    """The lines `#SBATCH`. Paths are relative to the job's folder: no rule of quoting applies to any of the values."""
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_task,
        "mem": job.memory,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "reservation": job.reservation,
        "exclude": job.exclude,
        "array": job.array,
        "output": "logs/job-%A_%a.txt" if job.tasks else "logs/job-%j.txt",
        "open-mode": "append",  # or each restart would wipe what the attempts before it said
        "signal": f"USR1@{job.warning}",  # to every rank, not to the shell (which would be B:)
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    return [*lines, "#SBATCH --requeue" if job.requeue else "#SBATCH --no-requeue"]


def _values(job: Job) -> list[str]:
    """Assignments that `body.sh` reads, and the site's own lines, which come first."""
    before, options, python = _container(job)
    variables = [f"export {name}={shlex.quote(value)}" for name, value in sorted(job.environment.items())]
    return [
        *(["# The site's own lines.", *job.prologue, ""] if job.prologue else []),
        *variables,
        f"TASKS={_array(map(str, job.tasks or (0,)))}  # the numbers of an array's tasks ...",
        f"RUNS={_array(map(str, job.runs))}  # ... and the folder that each of them trains",
        f"CODE={shlex.quote(str(job.folder / 'code'))}",
        f"PYTHON={shlex.quote(job.python)}",
        f"RANK_PYTHON={shlex.quote(python)}",
        f"CONTAINER_OPTIONS={_array(options)}",
        f"CONTAINER={_array(before)}",
        f"EXCLUDE={shlex.quote(job.exclude or '')}",
        f"GPUS={job.gpus_per_node}",
        f"REQUEUE={int(job.requeue)}",
        f"CRASHES={job.crashes}",
        f"PREFLIGHT={int(job.preflight)}",
    ]


def _container(job: Job) -> tuple[list[str], list[str], str]:
    """Words before the ranks' command, options of srun, and the interpreter."""
    container = job.container
    if container is None:
        return [], [], job.python
    mounts = list(dict.fromkeys([str(job.folder), *map(str, job.runs), *container.mounts]))
    if container.kind == "pyxis":
        both = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        return (
            [],
            [f"--container-image={container.image}", f"--container-mounts={both}", *container.arguments],
            (container.python),
        )
    binds = [word for mount in mounts for word in ("--bind", mount)]
    gpus = ["--nv"] if job.gpus_per_node else []
    return ["apptainer", "exec", *gpus, *binds, *container.arguments, container.image], [], container.python


def _array(words: Iterable[str]) -> str:
    return "(" + " ".join(map(shlex.quote, words)) + ")"
