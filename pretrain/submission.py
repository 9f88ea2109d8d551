"""Submitting a recipe: all that can be known before it is queued is checked before it is queued."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potamos.pretrain.config import Recipe, load_recipe, parse_recipe, resume_check
from potamos.pretrain.job_draft import absolute, draft, local_paths, tasks_of, texts, with_options
from potamos.slurm import client, submit
from potamos.slurm.checks import (
    check_cluster,
    check_disk,
    check_place,
    check_writable,
    seen_here_alone,
)
from potamos.slurm.client import Partition
from potamos.slurm.job import Job
from potamos.slurm.prepare import begun, read_json
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.site import Site, load_site

GPU = "h100"
"""What a plan is made for where nothing says what a node has."""
BYTES_PER_PARAMETER = 12
"""Of a checkpoint at most: an fp32 weight and two moments. Muon keeps one of them for matrices."""


@dataclass(frozen=True)
class Asked:
    """What the command line asks for. ``options``: keys of the recipe's section ``slurm``; ``array``: seeds, each of
    which is a run of its own; ``gpu``: what to plan for; None for what the partition has."""

    recipe: str
    overrides: Sequence[str] = ()
    run: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    array: str | None = None
    after: str | None = None
    chain: int = 1
    gpu: str | None = None
    refresh_code: bool = False


@dataclass(frozen=True)
class Forecast:
    """What a run should take. ``hours``: of training alone, None if unknown; ``checkpoint``: bytes of one at most;
    ``remarks``: what the reader should know."""

    gpu: str
    hours: float | None
    tokens: int
    checkpoint: int
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Submission:
    """A job, and all that is known of it before it runs. ``seconds``: its time limit; None without one, or where it is
    unknown. ``chain``: how often it was queued."""

    recipe: Recipe
    job: Job
    forecast: Forecast
    seconds: int | None
    chain: int
    remarks: tuple[str, ...]

    @property
    def gpu_hours(self) -> float | None:
        """What one start of every task costs at most; None without a time limit."""
        gpus = self.job.nodes * self.job.gpus_per_node * len(self.job.runs)
        return None if self.seconds is None else gpus * self.seconds / 3600


def resolve(asked: Asked, site: Site) -> tuple[Recipe, Job]:
    """The recipe as the job will read it, and the job. Writes nothing, and needs no Slurm.

    Raises:
        RecipeError, JobError, SubmitError: something that was asked for cannot be had.
    """
    submit.check_dependency(asked.after)
    here = Path(os.path.abspath("."))
    recipe = absolute(with_options(asked.recipe, asked.overrides, asked.options), here)
    folder = Path(os.path.abspath(asked.run if asked.run is not None else here / "runs" / recipe.name))
    runs = None if asked.array is None else {task: folder / f"seed-{task}" for task in tasks_of(asked.array)}
    return recipe, draft(recipe, site, folder, runs=runs, array=asked.array, chain=asked.chain)


def rehearse(asked: Asked) -> Submission:
    """What `send` would queue, as far as can be told without Slurm and without the data. Writes nothing.

    Raises:
        LayoutError, PlanError: the run cannot be spread so, or does not fit.
    """
    recipe, job = resolve(asked, load_site())
    forecast = foresee(recipe, job, asked.gpu)
    seconds = client.parse_time(job.time) if job.time is not None else None
    return Submission(recipe, job, forecast, seconds, asked.chain, forecast.remarks)


def send(asked: Asked) -> tuple[Submission, submit.Submitted]:
    """Check everything, prepare the run folder, and queue the job.

    Raises:
        SlurmError: there is no Slurm, it has not what is asked for, or it refuses.
        LayoutError, PlanError: the run cannot be spread so, or does not fit.
        DataError, ValueError: the data or the tokenizer are missing, or are others.
        SubmitError, PrepareError: the folder is taken, finished, or lies where it cannot.
        RecipeError: the run has begun, and this may not change any more.
    """
    site = load_site()
    recipe, job = resolve(asked, site)
    client.check_answers()
    partition, remarks = check_cluster(job, client.partitions())
    remarks += check_place(job.folder, site.shared)
    check_writable(job.folder)
    remarks += check_interpreter(job, site)
    forecast = foresee(recipe, job, asked.gpu or gpu_of(partition))
    remarks += [*forecast.remarks, *check_data(recipe, site)]
    recipes = texts(recipe, job.tasks)
    for run, text in zip(job.runs, recipes, strict=True):
        remarks += check_continuation(parse_recipe(text), RunFolder(run))
    check_disk(job.folder, forecast.checkpoint, recipe.checkpoint.keep, runs=len(job.runs))
    submitted = submit.submit(
        job, recipes, environment_text(), after=asked.after, chain=asked.chain, refresh_code=asked.refresh_code
    )
    seconds = client.parse_time(job.time) if job.time is not None else partition.default_time
    return Submission(recipe, job, forecast, seconds, asked.chain, tuple(dict.fromkeys(remarks))), submitted


# --- looking ahead --------------------------------------------------------------------------------------------------


def foresee(recipe: Recipe, job: Job, gpu: str | None) -> Forecast:
    """Whether the recipe can be spread over the job's ranks, and what the plan says of memory and time.

    Raises:
        LayoutError: the layout or the batch does not divide among the ranks.
        PlanError: it needs more memory than a GPU has.
    """
    from potamos.parallel.check import check_micro_batches
    from potamos.parallel.mesh import sizes
    from potamos.pretrain.plan_layouts import PlanError, Planner

    device = "cpu" if not job.gpus_per_node else gpu or GPU
    layout = recipe.parallel.layout()
    size = sizes(layout, job.world)
    planner, remarks = Planner(recipe, job.world, device), []
    hours = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about tensors without data
            planned = planner.planned(recipe)
    except RuntimeError as error:  # that an operation cannot be followed without data is no reason not to train
        remarks.append(f"time and memory are unknown: the plan met {type(error).__name__}; see potamos plan")
    else:
        hours = recipe.train.steps * planned.time.seconds / 3600
        if planned.memory.peak > planner.usable and device != "cpu":  # of a CPU's memory the plan knows nothing
            raise PlanError(f"{planner.plan(shown=0).refused} (planned for {device}; --gpu names another)")
    check_micro_batches(layout, size, recipe.train.sequences // (size.data * recipe.train.micro_sequences))
    tokens = recipe.train.steps * recipe.train.sequences * recipe.data.sequence_length
    return Forecast(device, hours, tokens, planner.costs.parameters * BYTES_PER_PARAMETER, tuple(remarks))


def gpu_of(partition: Partition) -> str | None:
    """The planner's name of a partition's GPUs, if it knows them."""
    from potamos.pretrain.ceilings import CEILINGS

    return next((name for name in CEILINGS if name != "cpu" and name in (partition.gpu or "").lower()), None)


def check_data(recipe: Recipe, site: Site) -> list[str]:
    """Open what the run will read, as its ranks will; remarks on what the nodes may not see.

    Raises:
        DataError, ValueError: what training would refuse.
    """
    from potamos.pretrain.plan import plan

    found = plan(recipe)
    places = {path: seen_here_alone(Path(path), site.shared) for path in local_paths(recipe)}
    return [*found.notices, *(f"{path} {why}" for path, why in places.items() if why)]


def check_interpreter(job: Job, site: Site) -> list[str]:
    """A remark on a Python that the nodes may not see. What the system brings along, every node has."""
    python = Path(job.python)
    if not python.is_absolute() or python.parts[1] in ("usr", "bin", "opt"):
        return []
    why = seen_here_alone(python.parent, site.shared)  # a venv's python is a link, and may well lead to /usr
    return [f"{python} {why}; `python` in the site file names another"] if why else []


def check_continuation(recipe: Recipe, run: RunFolder) -> list[str]:
    """What changes for a run that has begun, as remarks; nothing for one that has not.

    Raises:
        RecipeError: what may not change any more.
    """
    next_sample = read_json(run.state).get("next_sample")
    if not begun(run) or not run.recipe.exists() or not isinstance(next_sample, int):
        return []
    changes = resume_check(load_recipe(run.recipe), recipe, next_sample)
    return [f"{run.path}: {key}: {before!r} -> {after!r}" for key, before, after in changes]


def environment_text() -> str:
    """What is installed here, as each attempt writes it down for its own node."""
    from potamos.pretrain.environment import write_environment

    with tempfile.TemporaryDirectory() as folder:
        return write_environment(folder).read_text(encoding="utf-8")
