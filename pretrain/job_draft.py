"""From a recipe to a job: options go into the recipe, its paths are made whole, a job is drawn up from it.

What a job is, and how it is queued, is of `potamos.slurm`, which knows no recipes: it gets plain data from here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from potamos.pretrain.config import Recipe, load_recipe, parse_recipe, to_yaml
from potamos.pretrain.recipe_file import write_text
from potamos.slurm.checks import SubmitError, check_names
from potamos.slurm.job import ARRAY, Container, Job
from potamos.slurm.site import Site, SiteContainer

MOST_TASKS = 10_000
"""Of an array; Slurm's own limit (MaxArraySize) is 1,001 unless the cluster raised it."""


def with_options(recipe: str, overrides: Sequence[str], options: Mapping[str, Any]) -> Recipe:
    """The recipe, with what the command line asks of Slurm in its section ``slurm``; None asks for nothing.

    Raises:
        RecipeError: the recipe, an override or an option is refused.
    """
    given = [f"slurm.{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    return load_recipe(recipe, [*overrides, *given])


def draft(
    recipe: Recipe, site: Site, folder: Path, *, runs: Mapping[int, Path] | None = None, array: str | None = None,
    chain: int = 1,
) -> Job:  # fmt: skip
    """The job that trains ``recipe``: what it asks for itself, else what the site has every job ask for.

    Args:
        folder: of the job; absolute.
        runs: the run folder of each task of an array; None for a job that is no array and runs in ``folder``.
        array: the tasks as sbatch takes them.
        chain: jobs one after another; then none of them goes back into the queue.

    Raises:
        JobError, SubmitError: a value that no job can have.
    """
    asked = recipe.slurm
    gpus = asked.gpus_per_node or 0
    if not gpus and recipe.train.device == "cuda":
        raise SubmitError(
            "train.device: cuda, but the job asks for no GPU; ask with --gpus-per-node or slurm.gpus_per_node"
        )
    places = tuple(runs.values()) if runs else (folder,)
    job = Job(
        name=recipe.name,
        folder=folder,
        runs=places,
        tasks=tuple(runs) if runs else (),
        array=array,
        nodes=asked.nodes or 1,
        tasks_per_node=asked.tasks_per_node or gpus or 1,
        gpus_per_node=gpus,
        cpus_per_task=asked.cpus_per_task,
        memory=asked.memory,
        time=asked.time,
        partition=site.partition if asked.partition is None else asked.partition,
        account=site.account if asked.account is None else asked.account,
        qos=site.qos if asked.qos is None else asked.qos,
        constraint=site.constraint if asked.constraint is None else asked.constraint,
        reservation=asked.reservation,
        exclude=asked.exclude,
        requeue=chain == 1,
        warning=asked.warning,
        crashes=asked.crashes,
        preflight=asked.preflight,
        container=_container(asked.container, site, [recipe], (folder, *places)) if asked.container else None,
        python=site.python or sys.executable,
        prologue=site.prologue,
        environment=site.environment,
    )
    check_names(job)
    return job


def _container(image: str, site: Site, recipes: Iterable[Recipe], folders: Iterable[Path]) -> Container:
    """The image as the site runs it, with what the recipe reads mounted where it is."""
    how = site.container or SiteContainer(kind="apptainer" if image.endswith((".sif", ".simg")) else "pyxis")
    read = [path for recipe in recipes for path in local_paths(recipe)]
    for path in (*folders, *map(Path, read)):
        if any(mark in str(path) for mark in ",:"):
            raise SubmitError(f"{path}: a path with , or : cannot be mounted in a container; choose another name")
    if image.startswith("/") and not Path(image).exists():
        raise SubmitError(f"slurm.container: {image} does not exist; name an image with --container")
    return Container(how.kind, image, tuple(dict.fromkeys((*how.mounts, *read))), how.arguments, how.python)


def tasks_of(array: str) -> tuple[int, ...]:
    """The tasks that ``--array`` asks for, in rising order: ``1-3%2`` is 1, 2, 3; ``0-6:3`` is 0, 3, 6.

    Raises:
        SubmitError: it asks for none, for one twice or for too many.
    """
    if not ARRAY.fullmatch(array):
        raise SubmitError(f"--array: {array!r} names no tasks; write seeds, as in 1-4, 1,3,5 or 0-99%4")
    found: list[int] = []
    for part in array.partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        tasks = range(int(first), int(last or first) + 1, max(1, int(step or 1)))
        if not tasks or len(found) + len(tasks) > MOST_TASKS:
            raise SubmitError(f"--array: {part!r} is {len(tasks) or 'no'} tasks; write seeds, as in 1-4")
        found += tasks
    if len(set(found)) < len(found):
        raise SubmitError(f"--array: {array!r} names a task twice; name each seed once")
    return tuple(sorted(found))


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """The same recipe from another seed."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})


# --- paths ----------------------------------------------------------------------------------------------------------


def absolute(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with the files that it reads named by whole paths: the job runs in its folder, not in ``base``."""

    def whole(path: str) -> str:
        return path if "://" in path else str(base / path)

    tree = recipe.model_dump(by_alias=True)
    for block in _blocks(tree):
        block["path"] = whole(block["path"])
    return parse_recipe(write_text(tree), "resolved recipe")


def local_paths(recipe: Recipe) -> list[str]:
    """Files and folders on this machine's file systems that the recipe names, each once."""
    paths = (block["path"] for block in _blocks(recipe.model_dump(by_alias=True)))
    return list(dict.fromkeys(path for path in paths if "://" not in path))


def _blocks(tree: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Every block of a recipe's tree that has a `path`: the tokenizer, the datasets, the cache."""
    found: list[dict[str, Any]] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("path"), str):
                found.append(value)
            for item in value.values():
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)

    walk(tree["tokenizer"])
    walk(tree["data"])
    return found


def texts(recipe: Recipe, tasks: Sequence[int]) -> list[str]:
    """The resolved recipe of each run of a job, as text."""
    return [to_yaml(with_seed(recipe, seed)) for seed in tasks] or [to_yaml(recipe)]
