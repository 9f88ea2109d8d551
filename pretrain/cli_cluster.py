"""``potamos cluster``: a real Slurm of several nodes on this machine. Imports nothing heavy; see ``cli.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from potamos.pretrain import show

app = typer.Typer(help="Run a real Slurm of several nodes on this machine, without root.", no_args_is_help=True)

Folder = Annotated[Path, typer.Option(help="Everything of the cluster is inside.")]
DEFAULT = Path("~/.potamos/cluster")
Deadline = Annotated[float, typer.Option(help="Give up after this many seconds.")]


@app.command()
def up(
    folder: Folder = DEFAULT,
    nodes: Annotated[int, typer.Option(help="How many nodes: n0, n1, ...")] = 2,
    gpus: Annotated[int, typer.Option(help="GPUs of a node; Slurm counts them, there are none.")] = 8,
    cpus: Annotated[int, typer.Option(help="CPUs of a node, whatever this machine has.")] = 64,
    memory: Annotated[int, typer.Option(help="Memory of a node in MiB, whatever this machine has.")] = 1_000_000,
    max_time: Annotated[
        int | None, typer.Option(help="Longest time limit of a job in minutes; none by default.")
    ] = None,
    requeue_delay: Annotated[int, typer.Option(help="Seconds until a requeued job may start again.")] = 5,
    node_timeout: Annotated[int, typer.Option(help="Seconds of silence until a node counts as dead.")] = 5,
    kill_wait: Annotated[int, typer.Option(help="Seconds from SIGTERM to SIGKILL of a job that is ended.")] = 5,
    grace: Annotated[int, typer.Option(help="Seconds from SIGTERM to SIGKILL of a job that is preempted.")] = 10,
    deadline: Deadline = 60.0,
) -> None:
    """Start a cluster: slurmctld, a slurmd for each node, munge; a second or two, as any user.

    Partitions are main, and urgent, whose jobs preempt those of main. Prints what a shell needs to use it.

    Example: eval "$(potamos cluster up --nodes 4)"
    """
    from potamos.slurm.cluster import Cluster

    cluster = Cluster.up(
        folder,
        deadline=deadline,
        nodes=nodes,
        gpus=gpus,
        cpus=cpus,
        memory=memory,
        max_time=max_time,
        requeue_delay=requeue_delay,
        node_timeout=node_timeout,
        kill_wait=kill_wait,
        grace=grace,
    )
    show.note(f"{nodes} nodes are idle in {cluster.folder}; logs are in its log/")
    show.line(cluster.export)


@app.command()
def down(folder: Folder = DEFAULT, deadline: Deadline = 60.0) -> None:
    """Stop a cluster and whatever runs on it, at once. Jobs are forgotten, their numbers not given again.

    Example: potamos cluster down
    """
    from potamos.slurm.cluster import Cluster

    cluster = Cluster.at(folder)
    show.note(f"{cluster.folder}: {'stopped' if cluster.down(deadline=deadline) else 'was not up'}")


@app.command()
def status(folder: Folder = DEFAULT) -> None:
    """Say whether a cluster is up, with its nodes and jobs. Exit status 1 where it is not.

    Example: potamos cluster status
    """
    from potamos.slurm.cluster import Cluster

    cluster = Cluster.at(folder)
    if dead := cluster.dead():
        show.line(f"{cluster.folder}: not running: {', '.join(dead)}")
        show.line(f"to start it: potamos cluster up --folder {cluster.folder}")
    if "slurmctld" not in dead and "munged" not in dead:
        for name, state in cluster.states().items():
            show.line(f"{name}: {state}")
        show.line(cluster.run("squeue", "-o", "%i %P %j %T %M %R").rstrip())
        show.line(cluster.export)
    raise typer.Exit(1 if dead else 0)
