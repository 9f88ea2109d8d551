"""The options ``--slurm N`` and its like, of commands that a cluster may share out; see ``slurm.small_jobs``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potamos.pretrain import show

if TYPE_CHECKING:
    from potamos.slurm.small_jobs import Resources, Submission

PANEL = "On a cluster"

Slurm = Annotated[
    int | None,
    typer.Option(
        "--slurm", metavar="N", min=1, help="Share the work out to N jobs of an array.", rich_help_panel=PANEL
    ),
]
Partition = Annotated[
    str | None, typer.Option(help="Where the jobs run; the site file's by default.", rich_help_panel=PANEL)
]
Account = Annotated[str | None, typer.Option(help="Whom the jobs are charged to.", rich_help_panel=PANEL)]
Qos = Annotated[str | None, typer.Option("--qos", help="Quality of service of the jobs.", rich_help_panel=PANEL)]
Constraint = Annotated[str | None, typer.Option(help="Features that their nodes must have.", rich_help_panel=PANEL)]
Time = Annotated[
    str | None,
    typer.Option(
        help="Limit of each, as in 30 (minutes) or 2:00:00; by default 4 hours, or the partition's.",
        rich_help_panel=PANEL,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory of each, as in 8G; by default the cluster's, at worst a whole node's.", rich_help_panel=PANEL
    ),
]
Cpus = Annotated[int | None, typer.Option("--cpus", min=1, help="CPUs of each; 1 by default.", rich_help_panel=PANEL)]
Gpus = Annotated[
    int | None, typer.Option("--gpus", min=0, help="GPUs of each; none by default.", rich_help_panel=PANEL)
]
AtOnce = Annotated[
    int | None,
    typer.Option("--at-once", min=1, help="Run at most so many at a time; all by default.", rich_help_panel=PANEL),
]


class OptionError(ValueError):
    """Options that do not go together."""


def resources(
    slurm: int | None,
    *,
    partition: str | None,
    account: str | None,
    qos: str | None,
    constraint: str | None,
    time: str | None,
    memory: str | None,
    cpus: int | None,
    gpus: int | None,
    at_once: int | None,
) -> Resources | None:
    """What the tasks ask for; None where there are none.

    Raises:
        OptionError: an option of the cluster without --slurm, or no time.
        SlurmError: a value that no script can carry.
    """
    named = {
        "partition": partition, "account": account, "qos": qos, "constraint": constraint, "time": time,
        "memory": memory, "cpus": cpus, "gpus": gpus, "at-once": at_once,
    }  # fmt: skip
    if slurm is None:
        if given := [f"--{name}" for name, value in named.items() if value is not None]:
            raise OptionError(
                f"{', '.join(given)}: of no effect without --slurm N, which shares the work out to N jobs"
            )
        return None
    from potamos.slurm.client import parse_time
    from potamos.slurm.small_jobs import Resources

    seconds = None if time is None else parse_time(time)
    if time is not None and not seconds:
        raise OptionError(f"--time {time}: each job needs a limit; write minutes, or hours:minutes:seconds")
    return Resources(
        partition=partition, account=account, qos=qos, constraint=constraint, time=seconds, cpus=cpus or 1,
        memory=memory, gpus=gpus or 0, at_once=at_once,
    )  # fmt: skip


def submission(folder: Path, wanted: Resources) -> Submission:
    """Jobs with their logs in `folder`, as the site file wants them."""
    from potamos.slurm.site import load_site
    from potamos.slurm.small_jobs import Submission

    return Submission(folder, load_site(), wanted)


def options(**given: object) -> list[str]:
    """The options as words of a command line: None and False are left out, lists repeated."""
    words: list[str] = []
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif isinstance(value, list | tuple):
            words += [f"{option}={each}" for each in value]
        elif value is not None and value is not False:
            words.append(f"{option}={os.fspath(value) if isinstance(value, os.PathLike) else value}")
    return words


def tell(submitted: Submission, lines: Sequence[str], job: str) -> None:
    """Which jobs do what, and where to look."""
    for line in lines:
        show.line(line)
    show.line(f"watch them: squeue -j {','.join(submitted.ids)}; end them: scancel {' '.join(submitted.ids)}")
    show.line(f"logs: {shlex.quote(str(submitted.folder))}/{job}_*_log.out")


# --- the two commands ---------------------------------------------------------------------------------------------


def submit_prepare(
    wanted: Resources, count: int, inputs: int, source: str, out: Path, words: Sequence[str], *, deduplicate: bool,
    force: bool, wait: float,
) -> None:  # fmt: skip
    """An array of `prepare`, each with its rank, and `finalize` when all have succeeded.

    Duplicates are only found when every input has been hashed, and tasks that wait for others would keep nodes from
    those. So a first array hashes, however it ends, and a second one finds all hashes there.
    """
    from dataclasses import replace

    count = min(count, inputs)
    submitted = submission(out.with_name(f"{out.name}.logs"), wanted)
    command = ["data", "prepare", source, str(out), *words]
    shares = [[*command, *options(rank=rank, world=count)] for rank in range(count)]
    first = None
    if deduplicate:
        first = submitted.add("hash", [[*s, *options(wait=HASH_WAIT)] for s in shares], forgiving=True)
    array = submitted.add("prepare", [[*s, *options(wait=wait)] for s in shares], after=first, whatever=True)
    last = submitted.add(
        "finalize",
        [["data", "finalize", str(out), *options(force=force, wait=wait)]],
        after=array,
        resources=replace(wanted, cpus=1, gpus=0),
    )
    tasks = f"{count} task{'s' if count > 1 else ''}"
    lines = [f"job {first}: {tasks} look for duplicates"] if first is not None else []
    lines += [
        f"job {array}: {tasks} prepare{'s' * (count == 1)} {inputs} inputs",
        f"job {last}: makes them one dataset, {out}, when all have succeeded",
        "after a failure, the same command goes on with what is finished",
    ]
    tell(submitted, lines, array)


HASH_WAIT = 5.0
"""Seconds that a task which has hashed its inputs waits for the others', in the hope that they are nearly done."""


def submit_evaluations(
    wanted: Resources, count: int, run: Path, steps: Sequence[int], words: Sequence[str], table: Path
) -> None:
    """An array of `evaluate`, each with its share of the checkpoints; each adds its rows to the table."""
    count = min(count, len(steps))
    submitted = submission(run / "logs" / "evaluate", wanted)
    shares = [",".join(map(str, steps[task::count])) for task in range(count)]
    array = submitted.add("evaluate", [["evaluate", str(run), *words, *options(steps=share)] for share in shares])
    checkpoints = f"{len(steps)} checkpoint{'s' if len(steps) > 1 else ''}"
    tell(submitted, [f"job {array}: {count} tasks score {checkpoints} and write into {table}"], array)
