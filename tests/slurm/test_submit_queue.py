"""Submissions on a real Slurm that meet each other, wait for others, or for nodes that are away."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potamos.slurm import client, prepare, sbatch
from potamos.slurm.checks import SubmitError
from potamos.slurm.client import SlurmError
from potamos.slurm.cluster import Cluster
from potamos.slurm.job import Job
from potamos.slurm.status import statuses
from potamos.slurm.submit import resubmit, submit

OLD, NEW = "name: x\ntrain: {steps: 12}\n", "name: x\ntrain: {steps: 24}\n"


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "take_snapshot", lambda code: (code / "potamos").mkdir(parents=True, exist_ok=True))


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that do nothing, for long."""
    monkeypatch.setattr(prepare, "script", lambda job: sleeping(job))


def sleeping(job: Job) -> str:
    from potamos.slurm.script import header, script

    values = [line for line in script(job).splitlines() if line.startswith(("TASKS=", "RUNS="))]
    return "\n".join(["#!/bin/bash", *header(job), *values, "exec sleep 600", ""])


def alone(folder: Path, **asked: Any) -> Job:
    return Job(name="x", folder=folder, runs=(folder,), time="10", **asked)


def array(folder: Path) -> Job:
    runs = (folder / "seed-0", folder / "seed-1")
    return Job(name="x", folder=folder, runs=runs, tasks=(0, 1), array="0-1", time="10")


def test_a_run_has_one_job_by_whatever_way_it_came(cluster: Cluster, sleeps: None, tmp_path: Path, until: Any):
    first, second = array(tmp_path / "arr"), array(tmp_path / "arr2")
    (number,) = submit(first, [OLD] * 2, "").ids
    with pytest.raises(SubmitError, match=f"seed-0 has job {number}_0 already"):
        submit(alone(first.runs[0]), [OLD], "")
    cluster.run("scancel", f"{number}_0")
    until(lambda: f"{number}_0" not in client.queue([number]), "task 0 to leave")
    (other,) = submit(alone(first.runs[0]), [OLD], "").ids
    with pytest.raises(SubmitError, match=f"has job ({other}|{number}_1) already"):
        submit(first, [OLD] * 2, "")

    (waits,) = submit(alone(second.runs[0]), [OLD], "").ids
    with pytest.raises(SubmitError, match=f"seed-0 has job {waits} already"):
        submit(second, [OLD] * 2, "")


def test_a_job_after_one_that_is_unknown_over_or_failed(
    cluster: Cluster, sleeps: None, tmp_path: Path, until: Callable[..., Any]
):
    with pytest.raises(SubmitError, match="neither squeue nor scontrol knows job 999999"):
        submit(alone(tmp_path / "a"), [OLD], "", after="999999")
    assert client.queue() == {}
    ended = {
        status: cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", f"exit {status}").strip()
        for status in (0, 3)
    }
    until(lambda: not client.queue(ended.values()), "both to end")
    with pytest.raises(SubmitError, match=f"job {ended[3]} is FAILED"):
        submit(alone(tmp_path / "a"), [OLD], "", after=ended[3])
    (number,) = submit(alone(tmp_path / "a"), [OLD], "", after=ended[0]).ids
    (behind,) = submit(alone(tmp_path / "b"), [OLD], "", after=number).ids
    assert client.queue([behind])[behind].reason == "Dependency"
    assert submit(array(tmp_path / "arr"), [OLD] * 2, "", after=behind).ids


def test_nodes_that_are_away_are_waited_for(cluster: Cluster, sleeps: None, tmp_path: Path):
    """sbatch queues such a job, of which --test-only says what it says of one that is too large."""
    job = alone(tmp_path / "a", nodes=4)
    cluster.run("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    found = submit(job, [OLD], "")
    assert found.remarks == ("the job waits until nodes return: n2 is drained",)
    (entry,) = client.queue(found.ids).values()
    assert entry.state == "PENDING"
    cluster.run("scancel", *found.ids)
    with pytest.raises(SlurmError, match="Node count specification invalid"):
        submit(alone(tmp_path / "b", nodes=5), [OLD], "")
    with pytest.raises(SlurmError, match="node configuration is not available"):
        submit(alone(tmp_path / "b", nodes=4, gpus_per_node=9, tasks_per_node=9), [OLD], "")
    assert resubmit(job.folder)


def test_an_sbatch_that_is_killed_after_the_controller_took_the_job(
    cluster: Cluster, sleeps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = subprocess.check_output(["which", "sbatch"], text=True).strip()
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "sbatch"
    fake.write_text(
        f'#!/bin/bash\ncase "$*" in *--test-only*) exec {real} "$@" ;; esac\n{real} "$@" >/dev/null\nexec sleep 60\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sbatch, "PATIENCE", 5)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    job = alone(tmp_path / "a")
    (number,) = submit(job, [NEW], "").ids
    assert client.queue([number])[number].is_in([job.folder])
    assert (job.folder / "recipe.yaml").read_text() == NEW


def test_a_job_without_its_logs_is_no_cancelled_one(
    cluster: Cluster, sleeps: None, tmp_path: Path, until: Callable[..., Any]
):
    """Slurm opens the log before the first line of the script, and fails the job where it cannot."""
    job = alone(tmp_path / "a")
    (number,) = submit(job, [OLD], "", after=submit(alone(tmp_path / "b"), [OLD], "").ids[0]).ids
    (job.folder / "logs").rmdir()
    cluster.run("scontrol", "update", f"jobid={number}", "dependency=")
    until(lambda: not client.queue([number]), "the job to leave")
    (found,) = statuses([job.folder])
    assert found.state == "failed"
    assert "there is no logs/ any more" in found.why
    assert "potamos requeue" in found.why
    (again,) = resubmit(job.folder)
    until(lambda: client.queue([again])[again].state == "RUNNING", "it to run")
