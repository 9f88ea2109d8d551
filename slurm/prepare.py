"""The folder of a job before it is submitted: recipes, the program, what was installed, the script.

A folder that holds something else is refused. One that was prepared and never ran is prepared anew. A run that has
begun goes on with the code that it began with, unless asked for today's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potamos.files import write_atomically
from potamos.slurm.attempt import newest_step, read_attempts
from potamos.slurm.job import Job
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.script import script
from potamos.slurm.snapshot import take_snapshot
from potamos.slurm.undo import UNDO

SUBMIT_LOCK = "submit.lock"
OURS = (SUBMIT_LOCK, "submit.sbatch", "job.json", "code", "logs")
"""What the folder of an array holds beside its runs."""


class PrepareError(ValueError):
    """A folder that no job can be prepared in. Says why, and what to do."""


@dataclass(frozen=True)
class Prepared:
    """``commit``: what the job will run, as `code/COMMIT` has it; ``modified``: the tree differed from it;
    ``refreshed``: the code was copied now; ``continued``: a run in here has begun before."""

    commit: str
    modified: bool
    refreshed: bool
    continued: bool


def prepare(job: Job, recipes: Sequence[str], environment: str, *, refresh_code: bool = False) -> Prepared:
    """Write everything that ``job`` needs into its folder, each file whole or not at all.

    Args:
        recipes: the resolved recipe of each of ``job.runs``, as text.
        environment: what is installed where the job is submitted, as text; each attempt writes down its own.
        refresh_code: take today's program also where a run has begun.

    Raises:
        PrepareError: a folder holds other files.
        SnapshotError: the program cannot be copied.
        OSError: no room, no permission.
    """
    assert len(recipes) == len(job.runs)
    folder, runs = RunFolder(job.folder), [RunFolder(run) for run in job.runs]
    check_folder(job)
    continued, refreshed = any(map(begun, runs)), copies_code(job, refresh_code)
    if refreshed:
        take_snapshot(folder.code)
    for run, recipe in zip(runs, recipes, strict=True):
        run.logs.mkdir(parents=True, exist_ok=True)
        write_atomically(run.recipe, recipe.encode())
        if refreshed or not run.environment.exists():
            write_atomically(run.environment, environment.encode())
    folder.logs.mkdir(parents=True, exist_ok=True)  # Slurm opens the job's own log here, and makes no folder for it
    write_atomically(folder.script, script(job).encode())
    return Prepared(*snapshot_of(folder), refreshed, continued)


def copies_code(job: Job, refresh_code: bool) -> bool:
    """Whether `prepare` copies the program, or leaves the copy that a run has begun with."""
    return (
        refresh_code or not any(begun(RunFolder(run)) for run in job.runs) or not (job.folder / "code/potamos").is_dir()
    )


def changes(job: Job, refresh_code: bool) -> dict[Path, list[str]]:
    """The names that `prepare` and the queueing after it may change, in each folder."""
    changed = {run: ["recipe.yaml", "environment.txt", "logs", "job.json", "cancelled"] for run in job.runs}
    changed.setdefault(job.folder, ["logs", "job.json"])
    changed[job.folder] += ["submit.sbatch", *(["code"] if copies_code(job, refresh_code) else [])]
    return changed


def check_folder(job: Job) -> None:
    """Refuse folders that hold anything but these runs. Writes nothing. Raises PrepareError."""
    folder = RunFolder(job.folder)
    for run in map(RunFolder, job.runs):
        if run.path.exists() and not run.path.is_dir():
            raise PrepareError(f"{run.path} is a file; name a folder with --run")
        if _names(run.path) and not run.begun:
            raise PrepareError(f"{run.path} holds other files and no run; name a new folder with --run")
    if folder.path in job.runs:
        return
    if folder.path.exists() and not folder.path.is_dir():
        raise PrepareError(f"{folder.path} is a file; name a folder with --run")
    if folder.recipe.exists() or folder.checkpoints.exists():
        raise PrepareError(f"{folder.path} holds a run of its own, and this is for several; name another with --run")
    names = _names(folder.path)
    if names and not any(name in OURS for name in names) and not any(run.exists() for run in job.runs):
        raise PrepareError(f"{folder.path} holds other files and no runs; name a new folder with --run")


def begun(run: RunFolder) -> bool:
    """Whether training has begun here, under Slurm or not; a run that was only prepared has not."""
    return bool(run.state.exists() or newest_step(run) or read_attempts(run) or run.done.exists())


def is_done(run: RunFolder, recipe: str) -> bool:
    """Whether ``run`` was trained to the last step of ``recipe``, which need not be in its folder yet (there,
    `attempt.is_done` compares)."""
    import yaml

    step = read_json(run.done).get("step", -1)
    return isinstance(step, int) and step >= yaml.safe_load(recipe)["train"]["steps"]


def snapshot_of(folder: RunFolder) -> tuple[str, bool]:
    """The commit of a folder's copy of the program, and whether it was modified."""
    try:
        commit = (folder.code / "COMMIT").read_text(encoding="utf-8").strip()
        diff = folder.code / "dirty.diff"
        return commit, diff.exists() and diff.stat().st_size > 0
    except OSError:
        return "unknown", False


def read_json(path: Path) -> dict[str, Any]:
    """What a file of ours holds; empty if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _names(folder: Path) -> set[str]:
    """What lies in a folder, apart from the lock that a submission takes and what a killed one left."""
    if not folder.is_dir():
        return set()
    return {path.name for path in folder.iterdir()} - {SUBMIT_LOCK, UNDO, *(p.name for p in folder.glob(".*.tmp"))}
