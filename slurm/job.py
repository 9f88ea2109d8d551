"""What a job asks of the cluster and what it runs: plain data, checked where a shell or a scheduler will read it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,:@+/=-]*")
"""Values of the lines `#SBATCH`, where the scheduler's own rules of quoting would apply: nothing that needs any."""

CONSTRAINT = re.compile(r"[A-Za-z0-9\[(][A-Za-z0-9_.,:@+/=*&|()\[\]-]*")
MEMORY = re.compile(r"\d+[KMGT]?")
TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d(:\d\d)?)?")
ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_PATTERNS = {
    "name": WORD,
    "partition": WORD,
    "account": WORD,
    "qos": WORD,
    "reservation": WORD,
    "exclude": re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,\[\]-]*"),
    "constraint": CONSTRAINT,
    "memory": MEMORY,
    "time": TIME,
    "array": ARRAY,
}
_WANTED = {
    "memory": "a number with K, M, G or T, as in 400G",
    "time": "minutes, hours:minutes:seconds or days-hours:minutes:seconds, as in 2-00:00:00",
    "array": "task numbers, as in 0-7, 1,3,5 or 0-99%4",
    "exclude": "a list of nodes, as in node[3-5],node9",
}


class JobError(ValueError):
    """A value that no job can have. Names the value, its place and what would do."""


@dataclass(frozen=True)
class Container:
    """An image to run in: by pyxis (options of srun) or by Apptainer (a command in front).

    ``mounts`` are places, ``source`` or ``source:target``; the folders of the runs and of the code are added to them.
    """

    kind: Literal["pyxis", "apptainer"]
    image: str
    mounts: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    python: str = "python3"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job, or one array of them, which trains what lies in ``runs``.

    Args:
        name: as the queue shows it.
        folder: holds `submit.sbatch`, `code/` and `logs/`; absolute.
        runs: the run folders, absolute. A job has one, which is usually ``folder``; task i of an array has the one at
            its place in ``tasks``.
        tasks: the numbers of an array's tasks, in the order of ``runs``; empty for a job that is no array.
        array: the same as `sbatch --array` takes it, with its limit of tasks at a time.
        nodes, tasks_per_node, gpus_per_node: one task a GPU; without GPUs (0), as many tasks as are asked for.
        cpus_per_task, memory (a node's), time, partition, account, qos, constraint, reservation, exclude: as sbatch
            takes them; None leaves them to the cluster.
        requeue: whether a job that has saved and stopped goes back into the queue; False where another one follows.
        warning: seconds before the time limit at which the ranks are told to save.
        crashes: how many attempts in a row may fail without a new checkpoint.
        preflight: examine every node before each attempt.
        python: the interpreter on the nodes, which also judges how an attempt ended.
        prologue: lines of shell, run first as they are (modules, environments). They are the site's, not a recipe's.
        environment: variables for the ranks.

    Raises:
        JobError: a value that the scheduler or a shell could misread.
    """

    name: str
    folder: Path
    runs: tuple[Path, ...]
    tasks: tuple[int, ...] = ()
    array: str | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: str | None = None
    requeue: bool = True
    warning: int = 180
    crashes: int = 3
    preflight: bool = False
    container: Container | None = None
    python: str = "python3"
    prologue: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, pattern in _PATTERNS.items():
            value = getattr(self, key)
            if value is not None and not pattern.fullmatch(value):
                wanted = _WANTED.get(key, "letters, digits and _ . , : @ + / = -")
                raise JobError(f"slurm.{key}: {value!r} cannot be asked of sbatch: give {wanted}")
        for key in ("nodes", "tasks_per_node", "warning", "crashes"):
            if getattr(self, key) < 1:
                raise JobError(f"slurm.{key}: {getattr(self, key)}: give a number from 1")
        if self.gpus_per_node and self.tasks_per_node != self.gpus_per_node:
            raise JobError(
                f"slurm.tasks_per_node: {self.tasks_per_node} tasks for {self.gpus_per_node} GPUs a node: each GPU has "
                "one task; leave it out"
            )
        if len(self.runs) != max(1, len(self.tasks)) or bool(self.tasks) != (self.array is not None):
            raise JobError(f"{len(self.runs)} run folders for the tasks {self.tasks} of array {self.array}")
        for path in (self.folder, *self.runs):
            check_path(path)
        for name in self.environment:
            if not VARIABLE.fullmatch(name):
                raise JobError(f"environment: {name!r} is no name of a variable: use letters, digits and _")
        for text in (self.python, *self.prologue, *self.environment.values(), *_container_texts(self.container)):
            if "\0" in text or "\n" in text:
                raise JobError(f"{text!r} holds the end of a line, which a job's script cannot carry; give one line")

    @property
    def world(self) -> int:
        """Ranks of one attempt."""
        return self.nodes * self.tasks_per_node


def check_path(path: Path) -> None:
    """Refuse a folder that Slurm could not be told of: relative, or with a control character.

    Raises:
        JobError: names it.
    """
    if not path.is_absolute():
        raise JobError(f"{path} is relative, and a job starts elsewhere: give the whole path")
    if any(ord(character) < 32 or ord(character) == 127 for character in str(path)):
        raise JobError(f"{str(path)!r} holds a control character, which a job's script cannot carry; choose another")


def _container_texts(container: Container | None) -> tuple[str, ...]:
    if container is None:
        return ()
    return (container.image, container.python, *container.mounts, *container.arguments)
