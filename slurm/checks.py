"""What a job is refused for before it is queued: what its partition has, where its folder lies, room on the disk."""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from potamos.slurm import client
from potamos.slurm.client import Partition, SlurmError
from potamos.slurm.job import Job
from potamos.slurm.storage import file_system

EARLY = 60
"""Seconds that Slurm may send its warning before the moment asked for."""
NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/local", "/localscratch")
LOCAL_KINDS = ("tmpfs", "ramfs", "overlay", "squashfs")
AWAY = ("down", "drain", "fail", "inval", "maint", "perfctrs", "power", "reboot", "reserved", "unk", "future")
"""How the states of nodes begin that take no jobs now."""
_UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


class SubmitError(SlurmError):
    """A job that would not run as asked. Names the value, its place and what to do."""


# --- the cluster ----------------------------------------------------------------------------------------------------


def check_cluster(job: Job, partitions: Mapping[str, Partition]) -> tuple[Partition, list[str]]:
    """The partition that the job asks for, and remarks.

    Raises:
        SubmitError: there is no such partition, or it has less than the job asks for.
    """
    known = ", ".join(partitions) or "none"
    names = job.partition.split(",") if job.partition else [p.name for p in partitions.values() if p.default]
    if not names:
        raise SubmitError(f"slurm.partition: this cluster has no default; name one with --partition (known: {known})")
    for name in names:
        if name not in partitions:
            raise SubmitError(f"slurm.partition: {name!r} is no partition of this cluster (known: {known})")
    refusals: list[SubmitError] = []
    for name in names:  # of several, Slurm takes whichever serves first
        try:
            return partitions[name], _check_partition(job, partitions[name])
        except SubmitError as error:
            refusals.append(error)
    raise refusals[0]


def _check_partition(job: Job, partition: Partition) -> list[str]:
    name, notes = partition.name, []
    if partition.state in ("DRAIN", "INACTIVE"):
        raise SubmitError(f"slurm.partition: {name} takes no jobs now ({partition.state}); name another (--partition)")
    if partition.state != "UP":
        notes.append(f"partition {name} is {partition.state}: the job waits until it is UP")
    most = min(partition.nodes, partition.max_nodes if partition.max_nodes is not None else partition.nodes)
    if job.nodes > most:
        raise SubmitError(f"slurm.nodes: {job.nodes} nodes, but a job in partition {name} can have {most}; see --nodes")
    if job.gpus_per_node > partition.gpus_per_node:
        raise SubmitError(
            f"slurm.gpus_per_node: {job.gpus_per_node}, but a node of partition {name} has {partition.gpus_per_node}; "
            "see --gpus-per-node, or name another partition"
        )
    cpus = job.tasks_per_node * (job.cpus_per_task or 1)
    if cpus > partition.cpus:
        raise SubmitError(
            f"slurm.cpus_per_task: {job.tasks_per_node} tasks a node of {job.cpus_per_task or 1} each are {cpus}, but "
            f"a node of partition {name} has {partition.cpus} CPUs; ask for at most "
            f"{max(1, partition.cpus // job.tasks_per_node)} a task, or fewer tasks"
        )
    if job.memory is not None and _mebibytes(job.memory) > partition.memory:
        raise SubmitError(
            f"slurm.memory: {job.memory}, but a node of partition {name} has {partition.memory}M; ask for less"
        )
    _check_time(job, partition)
    return notes


def _check_time(job: Job, partition: Partition) -> None:
    limit = client.parse_time(job.time) if job.time is not None else partition.default_time
    if job.time is not None and limit is not None and partition.max_time is not None and limit > partition.max_time:
        longest = client.format_time(partition.max_time)
        raise SubmitError(
            f"slurm.time: {job.time}, but partition {partition.name} allows {longest}; ask for that (--time "
            f"{longest}): a run is requeued until it is finished"
        )
    if limit is not None and limit <= job.warning + EARLY:
        raise SubmitError(
            f"slurm.time: {job.time or client.format_time(limit)} ends within a minute of slurm.warning, "
            f"{job.warning} s, at which the run saves and stops; ask for more (--time), or lower slurm.warning"
        )


def capable_nodes(job: Job) -> tuple[set[str], dict[str, str]]:
    """The nodes of the job's partition that have what it asks for: those that may be used now, and the others, which
    are down or drained, with their states. Raises SlurmError."""
    wanted = job.partition.split(",") if job.partition else None
    cpus, memory = job.tasks_per_node * (job.cpus_per_task or 1), _mebibytes(job.memory) if job.memory else 0
    ready, away = set[str](), dict[str, str]()
    columns = client.SEPARATOR.join(("%P", "%N", "%T", "%G", "%c", "%m"))
    for line in client.run("sinfo", "--noheader", "--all", "--Node", "-o", columns).splitlines():
        if line.count(client.SEPARATOR) != 5:
            continue
        partition, node, state, gres, has_cpus, has_memory = (word.strip() for word in line.split(client.SEPARATOR))
        if partition.rstrip("*") not in wanted if wanted else not partition.endswith("*"):
            continue
        if client.gpus(gres) < job.gpus_per_node or int(has_cpus) < cpus or int(has_memory) < memory:
            continue
        word = state.rstrip("*~#!%$@^-+")
        if word.startswith(AWAY) or "*" in state:  # the star: it does not respond
            away[node] = word
        else:
            ready.add(node)
    return ready, away


def _mebibytes(memory: str) -> float:
    return int(memory.rstrip("KMGT")) * _UNITS.get(memory[-1], 1)


# --- the folder -----------------------------------------------------------------------------------------------------


def check_names(job: Job) -> None:
    """Refuse folders whose names something would read otherwise: Slurm takes patterns for the log's name (the job would
    end before its first line), Python takes a list for PYTHONPATH (the job would run the installed program in place of
    the folder's copy).

    Raises:
        SubmitError: names the character.
    """
    for path in (job.folder, *job.runs):
        if ":" in str(path):
            raise SubmitError(
                f"{path}: a : separates the folders in PYTHONPATH, so the job would not find the copy of the program "
                "that lies there; name another with --run"
            )
        if job.container is not None and "," in str(path):
            raise SubmitError(
                f"{path}: a , separates the folders that a container is given, so it would not see this one; name "
                "another with --run"
            )
        for mark in "%\\":
            if mark in str(path):
                raise SubmitError(
                    f"{path}: Slurm reads the {mark} of a folder's name as part of a pattern, and would find no place "
                    "for the job's log; name another with --run"
                )
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise SubmitError(f"{path!a}: the name is no text in UTF-8; name another with --run") from None


def check_place(folder: Path, shared: Sequence[Path] = ()) -> list[str]:
    """Remarks on where a run folder lies: nodes must see it.

    Raises:
        SubmitError: it is in none of the folders that the site file calls shared.
    """
    why = seen_here_alone(folder, shared)
    if why and shared:
        raise SubmitError(f"{folder} {why}; name another folder with --run")
    return [f"{folder} {why}"] if why else []


def seen_here_alone(path: Path, shared: Sequence[Path] = ()) -> str | None:
    """Why the nodes may not see a path; None where nothing speaks against it. ``shared``: folders that they see."""
    place = path.resolve()
    if shared:
        if any(place.is_relative_to(each.resolve()) for each in shared):
            return None
        return f"lies in none of the folders that the nodes share (`shared` in the site file: {_listed(shared)})"
    for local in (*NODE_LOCAL, os.environ.get("TMPDIR", "")):
        if local and place.is_relative_to(Path(local).resolve()):
            return f"lies in {local}, which other nodes usually do not see"
    kind, _ = file_system(place)
    return f"lies in a {kind}, which other nodes do not see" if kind in LOCAL_KINDS else None


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def check_writable(folder: Path) -> None:
    """Refuse a folder that this user cannot make or write into. Raises SubmitError."""
    place = existing(folder)
    if not place.is_dir():
        raise SubmitError(f"{place} is a file; name a folder with --run")
    if not os.access(place, os.W_OK | os.X_OK):
        raise SubmitError(f"{place} cannot be written by {user_name()}; name another folder with --run")


def check_disk(folder: Path, checkpoint: int, kept: int, runs: int = 1) -> list[str]:
    """Refuse a disk without room for what a run keeps; remarks where all that it keeps for good will not fit.

    Args:
        checkpoint: bytes of one.
        kept: how many the run keeps at a time; one more is written before the oldest goes.
        runs: runs that write here at a time.

    Raises:
        SubmitError: not enough is free.
    """
    place = existing(folder)
    free, needed = shutil.disk_usage(place).free, checkpoint * (kept + 1) * runs
    present = len(list(folder.glob("checkpoints/step-*"))) + len(list(folder.glob("*/checkpoints/step-*")))
    if free + present * checkpoint >= needed:
        return []
    raise SubmitError(
        f"{place}: {gigabytes(free)} are free, but checkpoint.keep {kept} needs {gigabytes(needed)} "
        f"({kept + 1} checkpoints of {gigabytes(checkpoint)}{f' in {runs} runs' if runs > 1 else ''}); free some, "
        "lower checkpoint.keep, or name a folder on another disk with --run"
    )


def gigabytes(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def existing(folder: Path) -> Path:
    """The nearest folder that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def user_name() -> str:
    """Whom the system takes this process for, whatever its variables say."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
