"""Submitting to a real Slurm: its own words on every recipe, and runs that were submitted as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from potamos.pretrain.config import available, load_recipe
from potamos.pretrain.job_draft import draft, texts
from potamos.slurm import client, prepare
from potamos.slurm.attempt import jobs_of, read_attempts
from potamos.slurm.client import SlurmError
from potamos.slurm.cluster import Cluster
from potamos.slurm.job import Job
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.site import Site
from potamos.slurm.submit import command, submit

PATIENCE = 120.0


@pytest.fixture
def large(large_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Sixteen nodes of 8 GPUs and 64 CPUs, without a time limit."""
    for name, value in large_cluster.environment.items():
        monkeypatch.setenv(name, value)
    return large_cluster


@pytest.fixture
def potamos(
    cluster: Cluster, trial: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, potamos: Callable[..., Any]
) -> Callable[..., Any]:
    """`potamos(...)` submits the tiny recipe from a folder of its own: exit status, standard output, standard error."""
    del cluster
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return partial(potamos, "submit", "h3_hybrid_tiny", *trial.overrides())


def prepared(recipe: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Job:
    """A recipe's job as it would be submitted, with its folder."""
    monkeypatch.setattr(prepare, "take_snapshot", lambda code: (code / "potamos").mkdir(parents=True, exist_ok=True))
    loaded = load_recipe(recipe, overrides)
    job = draft(loaded, Site(), folder)
    prepare.prepare(job, texts(loaded, ()), "")
    return job


# --- every recipe ---------------------------------------------------------------------------------------------------

PRODUCTION = [
    ("h3_hybrid_1.3b", (), 8),
    ("h3_hybrid_2.7b", (), 16),
    ("h3_hybrid_1.3b", ("slurm.nodes=4",), 4),
    ("h3_hybrid_355m", (), 2),
    ("h3_hybrid_125m", (), 1),
    ("gpt_125m", (), 1),
]


@pytest.mark.parametrize(("recipe", "changes", "nodes"), PRODUCTION)
def test_production_recipes_can_start(
    large: Cluster, recipe: str, changes: tuple[str, ...], nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The script as it is: sbatch says where it could start, and takes it into the queue with what it asks for."""
    job = prepared(recipe, tmp_path / "run", monkeypatch, *changes)
    *words, script = command(job)
    tried = subprocess.run(
        [*words, "--test-only", script], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert tried.returncode == 0, tried.stderr
    found = re.search(r"to start at \S+ using (\d+) processors on nodes (\S+) in partition main", tried.stderr)
    assert found is not None, tried.stderr
    assert int(found[1]) == 8 * nodes
    assert len(client.run("scontrol", "show", "hostnames", found[2]).split()) == nodes

    number = client.run(*words, "--hold", script).strip()
    (told,) = client.show("job", number)
    client.run("scancel", number)
    assert told["JobName"] == recipe
    assert (told["NumNodes"].split("-")[0], told["NumTasks"]) == (str(nodes), str(8 * nodes))
    assert told["TresPerNode"] == "gres:gpu:8"
    assert (told["TimeLimit"], told["Requeue"], told["WorkDir"]) == ("2-00:00:00", "1", str(job.folder))
    assert told["StdOut"] == f"{job.folder}/logs/job-{number}.txt"


@pytest.mark.parametrize("recipe", [name for name in available() if name.endswith("_tiny")])
def test_small_recipes_can_start(large: Cluster, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = prepared(recipe, tmp_path / "run", monkeypatch)
    *words, script = command(job)
    client.run(*words, "--test-only", script)


def test_what_a_real_cluster_tells_of_itself(large: Cluster):
    main = client.partitions()["main"]
    assert (main.nodes, main.gpus_per_node, main.cpus, main.max_time, main.default) == (16, 8, 64, None, True)
    assert client.alive()
    assert client.queue(["999999"]) == {}
    with pytest.raises(SlurmError, match="Partition nope not found"):
        client.show("partition", "nope")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--partition", "gpus"], "slurm.partition: 'gpus' is no partition of this cluster (known: main"),
        (["--nodes", "5"], "slurm.nodes: 5 nodes, but a job in partition main can have 4"),
        (["--gpus-per-node", "9", "train.device=auto"], "slurm.gpus_per_node: 9, but a node of partition main has 8"),
        (["slurm.constraint=h100"], "`sbatch` says: allocation failure: Invalid feature specification"),
        (["slurm.reservation=mine"], "`sbatch` says: allocation failure: Requested reservation is invalid"),
    ],
)
def test_what_the_cluster_has_not(potamos, tmp_path: Path, arguments: list[str], message: str):
    status, out, err = potamos(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert client.queue() == {}
    assert jobs_of(tmp_path / "runs" / "h3_hybrid_tiny") == []


def test_slurm_really_reads_patterns_in_folder_names(cluster: Cluster, tmp_path: Path, until: Callable[..., Any]):
    """Why such names are refused: the job ends at once, and nowhere is a word of it."""
    del cluster
    for name in ("50%j", "a\\b"):
        folder = tmp_path / name
        folder.mkdir()
        job = client.run(
            "sbatch", "--parsable", f"--chdir={folder}", "--output=job-%j.txt", "--wrap", "echo ran >ran"
        ).strip()
        until(lambda job=job: job not in client.queue([job]), f"job {job}")
        assert os.listdir(folder) == []
        assert client.show("job", job)[0]["JobState"] == "FAILED"


def test_the_users_variables_do_not_overrule_the_script(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    del cluster
    job = prepared("h3_hybrid_tiny", tmp_path / "run", monkeypatch)
    monkeypatch.setenv("SBATCH_JOB_NAME", "another")
    *words, script = command(job)
    bare = subprocess.check_output([*words, "--hold", script], text=True).strip()
    ours = client.run(*words, "--hold", script).strip()
    assert [client.show("job", number)[0]["JobName"] for number in (bare, ours)] == ["another", "h3_hybrid_tiny"]


# --- runs -----------------------------------------------------------------------------------------------------------


def test_seeds_in_a_chain_from_a_folder_with_a_hostile_name(potamos, tmp_path: Path, until: Callable[..., Any]):
    """Two runs of one array, each in its own folder, and a second array behind it that finds nothing to do."""
    folder = tmp_path / 'it\'s "a" $(touch pwned) *; é'
    arguments = ("--run", str(folder), "--array", "3,7", "--chain", "2", "--time", "30")
    status, out, err = potamos(*arguments)
    assert status == 0, err
    first, second = json.loads((folder / "job.json").read_text())["ids"]
    assert f"job {first}, {second}: h3_hybrid_tiny, 1 node x 1 process, 2 seeds, 00:30:00" in out

    status, _, err = potamos(*arguments)
    assert status == 2
    assert re.search(rf"has job ({first}|{second})_[37] already", err), err

    until(lambda: not client.queue([first, second]), "both arrays")
    losses = []
    for seed in (3, 7):
        run = RunFolder(folder / f"seed-{seed}")
        logs = "".join(path.read_text() for path in sorted(run.logs.glob("*")) if path.suffix == ".txt")
        assert run.done.exists(), logs
        (attempt,) = read_attempts(run)
        assert (attempt.verdict, attempt.job) == ("done", f"{first}_{seed}")
        losses.append(json.loads(run.metrics.read_text().splitlines()[-1]))
        assert (folder / "logs" / f"job-{first}_{seed}.txt").exists()
    assert losses[0] != losses[1]
    assert not list(tmp_path.rglob("pwned"))

    status, _, err = potamos(*arguments)
    assert status == 2
    assert "is finished; raise train.steps to go on" in err


def test_a_job_after_another(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Callable[..., Any]
):
    """Behind a job that fails it is taken out of the queue, rather than wait for ever."""
    del cluster
    job = prepared("h3_hybrid_tiny", tmp_path / "run", monkeypatch)
    failing = client.run("sbatch", "--parsable", f"--chdir={tmp_path}", "--hold", "--wrap", "exit 3").strip()
    (number,) = submit(job, [(job.folder / "recipe.yaml").read_text()], "", after=failing).ids
    assert client.queue([number])[number].reason == "Dependency"
    client.run("scontrol", "release", failing)
    until(lambda: not client.queue([failing, number]), "both jobs to leave the queue")
    assert client.show("job", number)[0]["JobState"] == "CANCELLED"
