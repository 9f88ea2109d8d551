"""Submitting a sweep: a recipe for each combination of values, and one array of jobs that trains them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from potamos.pretrain.config import Recipe, to_yaml
from potamos.pretrain.job_draft import absolute, draft, with_options
from potamos.pretrain.submission import (
    Asked,
    Forecast,
    check_continuation,
    check_data,
    environment_text,
    foresee,
    gpu_of,
)
from potamos.slurm import client, submit
from potamos.slurm.checks import check_cluster, check_disk, check_place, check_writable
from potamos.slurm.job import Job
from potamos.slurm.prepare import check_folder
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.site import Site, load_site
from potamos.slurm.sweep import Point, SweepError, points

SHARED = ("slurm", "name")
"""Sections that all runs of an array have in common: the array has one script and one name."""


@dataclass(frozen=True)
class Sweep:
    """The job, and the recipe of each of its runs. ``hours``: of all runs one after another, None if unknown."""

    job: Job
    points: Sequence[Point]
    recipes: Sequence[Recipe]
    hours: float | None = None
    checkpoint: int = 0
    remarks: Sequence[str] = ()


def resolve(asked: Asked, site: Site, most: int | None = None) -> Sweep:
    """The runs that are asked for: each recipe as its job will read it. Writes nothing, and needs no Slurm.

    Args:
        most: how many may train at a time.

    Raises:
        SweepError: nothing varies, or what all runs must have in common does.
        RecipeError, JobError, SubmitError: a combination that no recipe can have; a job that cannot be asked for.
    """
    submit.check_dependency(asked.after)
    fixed, found = points(asked.overrides)
    for override in found[0].overrides:
        if override.partition("=")[0].partition(".")[0] in SHARED:
            raise SweepError(f"{override.partition('=')[0]}: all runs of a sweep have it in common; give one value")
    here = Path(os.path.abspath("."))
    recipes = [absolute(with_options(asked.recipe, [*fixed, *p.overrides], asked.options), here) for p in found]
    folder = Path(os.path.abspath(asked.run if asked.run is not None else here / "runs" / f"{recipes[0].name}-sweep"))
    array = f"0-{len(found) - 1}" + (f"%{most}" if most is not None else "")
    runs = {task: folder / point.name for task, point in enumerate(found)}
    job = draft(recipes[0], site, folder, runs=runs, array=array, chain=asked.chain)
    return Sweep(job, found, recipes)


def rehearse(asked: Asked, most: int | None = None) -> Sweep:
    """What `send` would queue, as far as can be told without Slurm and without the data. Writes nothing."""
    return _foreseen(resolve(asked, load_site(), most), asked.gpu, [])


def send(asked: Asked, most: int | None = None) -> tuple[Sweep, submit.Submitted]:
    """Check every run of the sweep, prepare their folders, and queue them as one array. Raises as `submission.send`."""
    site = load_site()
    sweep = resolve(asked, site, most)
    job = sweep.job
    client.check_answers()
    partition, remarks = check_cluster(job, client.partitions())
    remarks += check_place(job.folder, site.shared)
    check_writable(job.folder)
    check_folder(job)
    sweep = _foreseen(sweep, asked.gpu or gpu_of(partition), remarks)
    remarks = [*sweep.remarks]
    seen: list[tuple[object, object]] = []
    for recipe, run in zip(sweep.recipes, job.runs, strict=True):
        if (recipe.data, recipe.tokenizer) not in seen:  # opening the same data for every run would take minutes
            seen.append((recipe.data, recipe.tokenizer))
            remarks += check_data(recipe, site)
        remarks += check_continuation(recipe, RunFolder(run))
    check_disk(job.folder, sweep.checkpoint, sweep.recipes[0].checkpoint.keep, runs=len(job.runs))
    submitted = submit.submit(
        job, [to_yaml(recipe) for recipe in sweep.recipes], environment_text(), after=asked.after, chain=asked.chain,
        refresh_code=asked.refresh_code,
    )  # fmt: skip
    return Sweep(
        job, sweep.points, sweep.recipes, sweep.hours, sweep.checkpoint, list(dict.fromkeys(remarks))
    ), submitted


def _foreseen(sweep: Sweep, gpu: str | None, remarks: Sequence[str]) -> Sweep:
    """With the plan of every run; those that differ in nothing the plan sees are planned once."""
    plans: list[tuple[tuple[object, ...], Forecast]] = []
    forecasts = []
    for recipe in sweep.recipes:
        seen = (
            recipe.model,
            recipe.objective,
            recipe.train.sequences,
            recipe.train.micro_sequences,
            recipe.train.steps,
        )
        seen += (recipe.train.precision, recipe.data.sequence_length, recipe.parallel, recipe.optimizer.kind)
        forecast = next((forecast for key, forecast in plans if key == seen), None)
        if forecast is None:
            forecast = foresee(recipe, sweep.job, gpu)
            plans.append((seen, forecast))
        forecasts.append(forecast)
    hours = [forecast.hours for forecast in forecasts]
    return Sweep(
        sweep.job,
        sweep.points,
        sweep.recipes,
        sum(h for h in hours if h is not None) if None not in hours else None,
        max(forecast.checkpoint for forecast in forecasts),
        list(dict.fromkeys([*remarks, *(text for forecast in forecasts for text in forecast.remarks)])),
    )
