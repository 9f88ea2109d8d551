"""``potamos submit``: a recipe into a cluster's queue. Imports nothing heavy; see ``cli.py``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potamos.pretrain import show
from potamos.pretrain.arguments import (
    Account,
    After,
    Container,
    GpusPerNode,
    Nodes,
    Overrides,
    Partition,
    PlannedGpu,
    Preflight,
    Qos,
    RecipeName,
    RefreshCode,
    TimeLimit,
)

if TYPE_CHECKING:
    from potamos.pretrain.submission import Submission
    from potamos.slurm.submit import Submitted


def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    run: Annotated[
        Path | None, typer.Option(help="The run folder; runs/NAME by default. All nodes must see it.")
    ] = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    time: TimeLimit = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    array: Annotated[str | None, typer.Option(help="A run for each seed, as in 1-4 or 1-8%2 (two at a time).")] = None,
    after: After = None,
    chain: Annotated[int, typer.Option(min=1, help="So many jobs one after another, in place of requeueing.")] = 1,
    container: Container = None,
    preflight: Preflight = None,
    gpu: PlannedGpu = None,
    refresh_code: RefreshCode = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; write and submit nothing.")] = False,
) -> None:
    """Check a recipe, prepare its run folder, and queue it on a Slurm cluster.

    Nothing is queued before memory, batch sizes, data, disk and the cluster's limits were checked. The run saves and
    goes back into the queue before its time limit, when it is preempted, and when a process or a node fails.

    What the options leave open, the recipe's section slurm says, then the site file (~/.config/potamos/site.yaml).

    Example: potamos submit h3_hybrid_1.3b data.stages.0.mixture.0.path=/data/pile --nodes 8 --time 1-00:00:00

    To see the script, with or without Slurm: potamos submit h3_hybrid_1.3b --dry-run
    """
    from potamos.pretrain.submission import Asked, rehearse, send

    options = {
        "nodes": nodes, "gpus_per_node": gpus_per_node, "time": time, "partition": partition, "account": account,
        "qos": qos, "container": container, "preflight": preflight,
    }  # fmt: skip
    asked = Asked(
        recipe, overrides or [], run, options, array=array, after=after, chain=chain, gpu=gpu,
        refresh_code=refresh_code,
    )  # fmt: skip
    if dry_run:
        print_script(rehearse(asked), after)
    else:
        print_submitted(*send(asked))


def print_script(found: Submission, after: str | None) -> None:
    """The script alone on standard output, so that it can be kept or piped; what else is known goes beside it."""
    from potamos.slurm.script import script
    from potamos.slurm.submit import command

    typer.echo(script(found.job), nl=False)
    typer.echo(f"# {shlex.join(command(found.job, after=after))}")
    for text in (*found.remarks, *expectations(found), "not checked without submitting: cluster, data, disk"):
        show.note(text)


def print_submitted(found: Submission, submitted: Submitted) -> None:
    """Job, folder, code, costs, and where to look."""
    from potamos.slurm.client import format_time

    job, prepared = found.job, submitted.prepared
    ranks = _count(job.gpus_per_node, "GPU") if job.gpus_per_node else _count(job.tasks_per_node, "process")
    where = f"{_count(job.nodes, 'node')} x {ranks}" + (f", {len(job.tasks)} seeds" if job.tasks else "")
    limit = "no time limit" if found.seconds is None else format_time(found.seconds)
    show.line(f"job {', '.join(submitted.ids)}: {job.name}, {where}, {limit}")
    show.line(f"folder: {job.folder}")
    known = not prepared.commit.startswith("unknown")
    code = f"{'commit ' if known else ''}{prepared.commit}" + (
        " with changes (code/dirty.diff)" if prepared.modified else ""
    )
    kept = "" if prepared.refreshed else "; the copy that the run began with, --refresh-code takes today's"
    show.line(f"code: {code}{kept}")
    for text in expectations(found):
        show.line(text)
    folder = shlex.quote(str(job.folder))
    show.line(f"look: potamos status {folder}; potamos logs -f {folder}")
    for text in (*found.remarks, *submitted.remarks):
        show.note(text)


def expectations(found: Submission) -> list[str]:
    """What the run will take by the plan, and what the job may cost."""
    job, forecast = found.job, found.forecast
    gpus = job.nodes * job.gpus_per_node
    lines = []
    if forecast.hours is not None:
        spent = f", {forecast.hours * gpus * len(job.runs):,.0f} GPU-hours" if gpus and forecast.hours >= 1 else ""
        each = " for each seed" if job.tasks else ""
        lines.append(
            f"plan: {_duration(forecast.hours)}{each}{spent}, {_amount(forecast.tokens)} tokens, on {forecast.gpu}"
        )
    if gpus and found.gpu_hours is not None:
        again = "; a run that is not finished then goes back into the queue" if job.requeue else ""
        cost = found.gpu_hours * found.chain
        lines.append(f"cost: at most {cost:,.{0 if cost >= 10 else 1}f} GPU-hours{again}")
    return lines


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.0f} minutes" if hours >= 1 / 30 else f"{hours * 3600:.0f} seconds"


def _amount(number: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,}"


def _count(number: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number} {what if number == 1 else plural}"
