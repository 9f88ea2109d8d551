"""From a recipe to a job: whose word counts, and which paths travel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from potamos.pretrain.config import RecipeError, load_recipe, parse_recipe, to_yaml
from potamos.pretrain.job_draft import absolute, draft, local_paths, tasks_of, texts, with_options
from potamos.slurm.checks import SubmitError
from potamos.slurm.job import Job
from potamos.slurm.site import Site, SiteContainer

FOLDER = Path("/shared/runs/x")
SITE = Site(
    prologue=("module load cuda",),
    python="/shared/python",
    partition="site-partition",
    account="site-account",
    qos="site-qos",
    constraint="site-constraint",
    environment={"NCCL_DEBUG": "WARN"},
)


def drafted(*overrides: str, site: Site = Site(), **options: object) -> Job:  # noqa: B008 (frozen)
    return draft(with_options("h3_hybrid_tiny", overrides, options), site, FOLDER)


def test_nothing_asked_for_is_one_process():
    job = drafted()
    assert job == Job(name="h3_hybrid_tiny", folder=FOLDER, runs=(FOLDER,), python=sys.executable)
    assert (job.nodes, job.tasks_per_node, job.gpus_per_node, job.time) == (1, 1, 0, None)


def test_a_process_for_each_gpu():
    job = drafted(nodes=2, gpus_per_node=4)
    assert (job.nodes, job.tasks_per_node, job.gpus_per_node, job.world) == (2, 4, 4, 8)
    assert drafted("slurm.tasks_per_node=3", nodes=2).world == 6


def test_options_win_over_overrides_over_the_recipe_over_the_site():
    assert drafted(site=SITE).partition == "site-partition"
    assert drafted("slurm.partition=recipe", site=SITE).partition == "recipe"
    assert drafted("slurm.partition=recipe", site=SITE, partition="option").partition == "option"
    job = drafted(site=SITE)
    assert (job.account, job.qos, job.constraint) == ("site-account", "site-qos", "site-constraint")
    assert (job.python, job.prologue, job.environment) == ("/shared/python", SITE.prologue, SITE.environment)


def test_every_key_of_the_section_reaches_the_job():
    """A key that is added to the recipe and forgotten here would do nothing."""
    values = {
        "nodes": 3, "gpus_per_node": 2, "tasks_per_node": 2, "cpus_per_task": 5, "memory": "7G", "time": "1:30:00",
        "partition": "p", "account": "a", "qos": "q", "constraint": "c", "reservation": "r", "exclude": "n[1-2]",
        "warning": 99, "crashes": 7, "preflight": True, "container": "image",
    }  # fmt: skip
    recipe = with_options("h3_hybrid_tiny", [], values)
    assert set(type(recipe.slurm).model_fields) == set(values)
    job = draft(recipe, Site(), FOLDER)
    assert job.container is not None
    assert {key: getattr(job, key) for key in values if key != "container"} | {
        "container": job.container.image
    } == values


def test_options_are_checked_as_the_recipe_is():
    with pytest.raises(RecipeError, match=r"command line: slurm\.nodes: value 0: must be above 0"):
        drafted(nodes=0)
    with pytest.raises(ValueError, match=r"slurm\.partition: 'a b' cannot be asked of sbatch"):
        drafted(partition="a b")
    assert drafted(time="1:30:00").time == "1:30:00", "not the number 5400, as YAML 1.1 would read it"
    assert drafted(partition="1").partition == "1"


def test_a_gpu_that_nobody_asked_for():
    with pytest.raises(
        SubmitError, match=r"train\.device: cuda, but the job asks for no GPU; ask with --gpus-per-node"
    ):
        drafted("train.device=cuda")


def test_a_chain_is_not_requeued():
    recipe = load_recipe("h3_hybrid_tiny")
    assert draft(recipe, Site(), FOLDER).requeue
    assert not draft(recipe, Site(), FOLDER, chain=2).requeue


def test_each_seed_has_its_run():
    recipe = load_recipe("h3_hybrid_tiny")
    runs = {task: FOLDER / f"seed-{task}" for task in tasks_of("5,2-3%1")}
    job = draft(recipe, Site(), FOLDER, runs=runs, array="5,2-3%1")
    assert (job.tasks, job.array) == ((2, 3, 5), "5,2-3%1")
    assert job.runs == (FOLDER / "seed-2", FOLDER / "seed-3", FOLDER / "seed-5")
    seeds = [parse_recipe(text).train.seed for text in texts(recipe, job.tasks)]
    assert seeds == [2, 3, 5]
    assert parse_recipe(texts(recipe, ())[0]) == recipe
    assert (
        len({text.replace(f"seed: {seed}", "") for text, seed in zip(texts(recipe, job.tasks), seeds, strict=True)})
        == 1
    )


@pytest.mark.parametrize(
    ("array", "tasks"),
    [("1-4%2", (1, 2, 3, 4)), ("0-6:3", (0, 3, 6)), ("7", (7,)), ("9,1-2", (1, 2, 9)), ("5-5", (5,))],
)
def test_tasks_of_an_array(array: str, tasks: tuple[int, ...]):
    assert tasks_of(array) == tasks


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ("", "names no tasks"),
        ("a-b", "names no tasks"),
        ("1-4; id", "names no tasks"),
        ("4-1", "'4-1' is no tasks"),
        ("1-3,2", "names a task twice"),
        ("0-99999", "is 100000 tasks"),
    ],
)
def test_arrays_that_are_none(array: str, message: str):
    with pytest.raises(SubmitError, match=f"--array: .*{message}"):
        tasks_of(array)


# --- paths ----------------------------------------------------------------------------------------------------------

MIXED = [
    "tokenizer.path=demo/tokenizer.json",
    "data.order=window",
    "data.cache={path: cache, bytes: 1000}",
    "data.stages=[{from: 0, mixture: [{path: a b}, {path: /abs/c}, {path: 's3://bucket/d'}]}, "
    "{from: 640, mixture: {published: pile, path: pile}}]",
    "data.validation=[{path: ../held}]",
]


def test_relative_paths_are_of_where_the_user_stands():
    recipe = absolute(load_recipe("h3_hybrid_tiny", MIXED), Path("/home/me"))
    assert recipe.tokenizer.path == "/home/me/demo/tokenizer.json"
    assert recipe.data.cache is not None
    assert recipe.data.cache.path == "/home/me/cache"
    sources = recipe.data.stages[0].sources
    assert [source.path for source in sources] == ["/home/me/a b", "/abs/c", "s3://bucket/d"]
    assert [source.label for source in sources] == ["a b", "c", "d"]
    assert recipe.data.stages[1].mixture.path == "/home/me/pile"  # pyright: ignore[reportAttributeAccessIssue]
    assert recipe.data.validation[0].path == "/home/me/../held"
    assert local_paths(recipe) == [
        "/home/me/demo/tokenizer.json", "/home/me/cache", "/home/me/a b", "/abs/c", "/home/me/pile", "/home/me/../held",
    ]  # fmt: skip


def test_nothing_but_paths_changes():
    recipe = load_recipe("h3_hybrid_tiny", MIXED)
    moved = to_yaml(absolute(recipe, Path("/home/me")))
    assert moved.replace("/home/me/", "") == to_yaml(recipe)
    assert absolute(absolute(recipe, Path("/home/me")), Path("/elsewhere")) == absolute(recipe, Path("/home/me"))


# --- containers -----------------------------------------------------------------------------------------------------


def test_a_container_sees_what_the_run_reads():
    recipe = absolute(load_recipe("h3_hybrid_tiny", ["slurm.container=image:tag"]), Path("/data"))
    container = draft(recipe, Site(), FOLDER).container
    assert container is not None
    assert (container.kind, container.image, container.python) == ("pyxis", "image:tag", "python3")
    assert container.mounts == tuple(local_paths(recipe))
    site = Site(container=SiteContainer("apptainer", ("/scratch",), ("--cleanenv",), "python3.12"))
    ours = draft(recipe, site, FOLDER).container
    assert ours is not None
    assert (ours.kind, ours.arguments, ours.python) == ("apptainer", ("--cleanenv",), "python3.12")
    assert ours.mounts == ("/scratch", *local_paths(recipe))


def test_an_image_file_is_apptainers(tmp_path: Path):
    image = tmp_path / "a b.sif"
    with pytest.raises(SubmitError, match=r"slurm\.container: .*sif does not exist"):
        drafted(container=str(image))
    image.write_bytes(b"")
    container = drafted(container=str(image)).container
    assert container is not None
    assert container.kind == "apptainer"


@pytest.mark.parametrize("path", ["/data/a:b", "/data/a,b"])
def test_paths_that_no_mount_can_name(path: str):
    with pytest.raises(SubmitError, match="cannot be mounted in a container"):
        drafted(f"tokenizer.path='{path}'", container="image")
