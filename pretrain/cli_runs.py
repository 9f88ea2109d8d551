"""Commands over runs that are there: status, logs, cancel, requeue, board; and doctor and sweep before them.

Imports nothing heavy; see ``cli.py``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from potamos.pretrain import show
from potamos.pretrain.arguments import (
    Account,
    After,
    Container,
    GpusPerNode,
    Nodes,
    Partition,
    PlannedGpu,
    Preflight,
    Qos,
    RecipeName,
    RefreshCode,
    RunPath,
    TimeLimit,
)

RUNS = Path("runs")

Folders = Annotated[
    list[Path] | None, typer.Argument(metavar="FOLDER", help="Runs, or folders of runs; runs/ by default.")
]
Grace = Annotated[float, typer.Option(min=0, help="Seconds to finish the step and save; 0: end at once.")]
SomeRuns = Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, or a sweep's.")]


def status(
    folders: Folders = None,
    table: Annotated[
        bool, typer.Option("--table", help="A row for each run: settings in which they differ, and scores.")
    ] = False,
    csv: Annotated[
        Path | None, typer.Option(help="Write that table into this file, as comma-separated values.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Everything known, for programs.")] = False,
) -> None:
    """Say where runs stand: state, step, loss, speed, time left, nodes, crashes, and why they wait or ended.

    Asks Slurm's queue, once, and the run folders; works without accounting, and for runs outside of Slurm.

    States: prepared, queued, running, requeued (waits to go on), finished, stopped (on request, saved), cancelled,
    failed, stale (says that it trains, but nothing does), unknown (has a job, and there is no Slurm to ask here).

    Example: potamos status

    Of a sweep, best first: potamos status runs/h3_hybrid_tiny-sweep --table --csv sweep.csv
    """
    from potamos.pretrain import show_runs
    from potamos.slurm.status import find_runs, statuses

    places = folders or [RUNS]
    if not folders and not RUNS.is_dir():
        show.note("there is no folder runs/ here; train or submit a recipe, or name a folder")
        return
    if table or csv is not None:
        _table(places, table, csv)
        return
    found = statuses(find_runs(places), tell=show.note)
    if json:
        _print_json([each.plain() for each in found])
    elif found:
        show_runs.statuses(found)
    else:
        show.note(f"no runs in {', '.join(show_runs.shorter(place) for place in places)}")


def _table(folders: list[Path], shown: bool, csv: Path | None) -> None:
    from potamos.files import write_atomically
    from potamos.pretrain import show_runs
    from potamos.slurm.sweep import results, to_csv

    rows = results(folders, tell=show.note)
    if csv is not None:
        write_atomically(csv, to_csv(rows).encode())
        show.note(f"{csv}: {len(rows)} runs")
    if shown:
        show_runs.sweep(rows)


def _print_json(content: object) -> None:
    import json

    typer.echo(json.dumps(content, indent=1))


def logs(
    run: RunPath,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show what is added, through requeues, to the end.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Which process, from 0; by default the one that failed, else 0.")
    ] = None,
    attempt: Annotated[int | None, typer.Option(min=0, help="Which start, from 0; the newest by default.")] = None,
    job: Annotated[bool, typer.Option("--job", help="What the batch script printed instead.")] = False,
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", min=0, help="Only so many of the end; by default all, with -f 50.")
    ] = None,
) -> None:
    """Print what a run printed: of its newest start, the rank that failed, or rank 0.

    Example: potamos logs runs/h3_hybrid_tiny -f

    What ended the third start: potamos logs runs/h3_hybrid_tiny --attempt 2
    """
    from potamos.slurm.logs import Follower, choose, read
    from potamos.slurm.status import printable

    def write(piece: bytes) -> None:
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()

    try:
        if follow:
            last = 50 if lines is None else lines
            ended = Follower(run, write, show.note, rank=rank, attempt=attempt, job=job, lines=last).follow()
            why = f": {printable(ended.why)}" if ended.why else ""
            show.note(f"{ended.state} at step {ended.step}{why}" if ended.step is not None else f"{ended.state}{why}")
            return
        log = choose(run, rank=rank, attempt=attempt, job=job)
        show.note(f"==> {printable(log.path)}")
        for piece in read(log.path, lines):
            write(piece)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:  # `potamos logs RUN | head`: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cancel(
    runs: SomeRuns,
    grace: Grace = 60.0,
) -> None:
    """End every job of a run, a chain or a sweep for good. What trains is told to save first.

    Go on with it later: potamos requeue RUN

    Example: potamos cancel runs/h3_hybrid_tiny
    """
    from potamos.slurm.control import cancel as end

    done = end(runs, grace=grace, tell=show.note)
    for each in done:
        show.line(str(each))
    if not all(each.left for each in done):
        raise typer.Exit(1)


def requeue(runs: SomeRuns, grace: Grace = 60.0) -> None:
    """Send a run back into the queue: one that trains, when it has saved; one that ended early, anew.

    A finished run is refused: to go on with one, submit it again with more train.steps. Of a sweep, all are sent back
    that neither wait nor are finished.

    Example: potamos requeue runs/h3_hybrid_tiny
    """
    from potamos.slurm.control import requeue_all

    for done in requeue_all(runs, grace=grace):
        show.line(done)


def doctor(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where runs are to live.")] = RUNS,
    job: Annotated[bool, typer.Option("--job", help="Look at a node as well, in a job of a minute.")] = False,
    partition: Annotated[
        str | None, typer.Option(help="Where that job runs; by default the site file's, else the cluster's own.")
    ] = None,
) -> None:
    """Examine this machine and its cluster: what is wrong, and how to mend it. Ends with 1 if anything is wrong.

    Example: potamos doctor --job
    """
    from potamos.pretrain import show_runs
    from potamos.slurm.doctor import diagnose

    wrong = 0
    for found in diagnose(folder, job=job, partition=partition):
        show_runs.finding(found)
        wrong += found.level == "wrong"
    raise typer.Exit(1 if wrong else 0)


def sweep(
    recipe: RecipeName,
    overrides: Annotated[
        list[str],
        typer.Argument(metavar="KEY=[VALUE,VALUE]", help="Lists to vary; other key=value hold for all runs."),
    ],
    run: Annotated[Path | None, typer.Option(help="The folder of the runs; runs/NAME-sweep by default.")] = None,
    max_parallel: Annotated[int | None, typer.Option(min=1, help="Train at most so many at a time.")] = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    time: TimeLimit = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    after: After = None,
    container: Container = None,
    preflight: Preflight = None,
    gpu: PlannedGpu = None,
    refresh_code: RefreshCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs, print the script; write and submit nothing.")
    ] = False,
) -> None:
    """Train every combination of the values of lists, as one array of jobs with a run folder for each.

    A setting that is a list itself stands in another: 'data.skip=[[[0,100]],[]]' makes two runs.

    What the options leave open, the recipe's section slurm says, then the site file (~/.config/potamos/site.yaml).

    Example: potamos sweep h3_hybrid_tiny 'optimizer.lr=[1e-3,3e-4]' 'train.seed=[1,2,3]' --max-parallel 4

    Then: potamos status runs/h3_hybrid_tiny-sweep --table
    """
    from potamos.pretrain import sweeps
    from potamos.pretrain.submission import Asked

    options = {
        "nodes": nodes, "gpus_per_node": gpus_per_node, "time": time, "partition": partition, "account": account,
        "qos": qos, "container": container, "preflight": preflight,
    }  # fmt: skip
    asked = Asked(recipe, overrides, run, options, after=after, gpu=gpu, refresh_code=refresh_code)
    if dry_run:
        from potamos.slurm.script import script

        found = sweeps.rehearse(asked, max_parallel)
        typer.echo(script(found.job), nl=False)
        for point in found.points:
            show.note(f"{point.name}: {' '.join(point.overrides)}")
    else:
        found, submitted = sweeps.send(asked, max_parallel)
        show.line(f"job {', '.join(submitted.ids)}: {len(found.points)} runs of {found.job.world} ranks each")
        show.line(f"folder: {found.job.folder}")
        for text in submitted.remarks:
            show.note(text)
    if found.hours is not None:
        gpus = found.job.nodes * found.job.gpus_per_node
        spent = f", {found.hours * gpus:,.0f} GPU-hours" if gpus else ""
        show.note(f"plan: {found.hours:,.1f} hours of all runs together{spent}")
    for text in found.remarks:
        show.note(text)
    if not dry_run:
        import shlex

        show.line(f"look: potamos status {shlex.quote(str(found.job.folder))} --table")


def board(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of runs, or a run.")] = RUNS,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Where it listens; a free port by default.")
    ] = None,
) -> None:
    """Open TensorBoard on all runs of a folder, each under its name; runs that come later appear too. Ctrl-C ends it.

    Example: potamos board runs
    """
    from potamos.pretrain import board as boards

    with boards.opened(folder, port) as (url, look):
        count = look()
        show.line(f"{url}  ({count} runs)")
        show.line(f"from another machine: {boards.tunnel(url)}")
        try:
            boards.serve(look, show.note, count)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None
