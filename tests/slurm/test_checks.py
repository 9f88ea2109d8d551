"""What a job is refused for before it is queued: each mistake named with its value, its place and the remedy."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from potamos.slurm import checks
from potamos.slurm.checks import SubmitError, check_cluster, check_disk, check_names, check_place, check_writable
from potamos.slurm.client import Partition
from potamos.slurm.job import Container, Job

RUN = Path("/shared/runs/trial")
JOB = Job(name="trial", folder=RUN, runs=(RUN,), nodes=4, tasks_per_node=8, gpus_per_node=8, time="1-00:00:00")
GPU = Partition("gpu", 16, None, 2 * 86400, 600, True, "UP", 8, 64, 512_000, "h100")
CPU = replace(GPU, name="cpu", gpus_per_node=0, default=False, gpu=None)
SHORT = replace(GPU, name="short", max_time=3600, max_nodes=2, default=False)
ALL = {each.name: each for each in (GPU, CPU, SHORT)}


def ask(**changes: object) -> Job:
    return replace(JOB, **changes)


def test_a_job_that_fits_names_its_partition():
    assert check_cluster(JOB, ALL) == (GPU, [])
    assert check_cluster(ask(partition="gpu"), ALL)[0] == GPU
    assert check_cluster(ask(partition="short,gpu"), ALL)[0] == GPU, "of several, one that serves is enough"
    full = ask(nodes=16, cpus_per_task=8, memory="500G", time="2-00:00:00")
    assert check_cluster(full, ALL)[0] == GPU, "all of a partition is not too much"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition": "gpus"}, r"slurm\.partition: 'gpus' is no partition of this cluster \(known: gpu, cpu, short\)"),
        ({"partition": "gpu,nope"}, r"slurm\.partition: 'nope' is no partition"),
        ({"nodes": 17}, r"slurm\.nodes: 17 nodes, but a job in partition gpu can have 16; see --nodes"),
        ({"partition": "short", "time": "30"}, r"slurm\.nodes: 4 nodes, but a job in partition short can have 2"),
        (
            {"tasks_per_node": 9, "gpus_per_node": 9},
            r"slurm\.gpus_per_node: 9, but a node of partition gpu has 8; see --gpus-per-node",
        ),
        ({"partition": "cpu"}, r"slurm\.gpus_per_node: 8, but a node of partition cpu has 0"),
        (
            {"cpus_per_task": 9},
            r"slurm\.cpus_per_task: 8 tasks a node of 9 each are 72, .* 64 CPUs; ask for at most 8",
        ),
        ({"memory": "501G"}, r"slurm\.memory: 501G, but a node of partition gpu has 512000M"),
        ({"memory": "1T"}, r"slurm\.memory: 1T, but"),
        ({"time": "2-00:00:01"}, r"slurm\.time: 2-00:00:01, but partition gpu allows 2-00:00:00; ask for that"),
        ({"time": "4"}, r"slurm\.time: 4 ends within a minute of slurm\.warning, 180 s"),
        ({"time": None, "warning": 600}, r"slurm\.time: 00:10:00 ends within a minute of slurm\.warning, 600 s"),
    ],
)
def test_what_the_partition_has_not(changes: dict[str, object], message: str):
    with pytest.raises(SubmitError, match=message):
        check_cluster(ask(**changes), ALL)


def test_partitions_that_take_no_jobs():
    for state in ("DRAIN", "INACTIVE"):
        with pytest.raises(SubmitError, match=rf"gpu takes no jobs now \({state}\); name another"):
            check_cluster(JOB, {"gpu": replace(GPU, state=state)})
    _, notes = check_cluster(JOB, {"gpu": replace(GPU, state="DOWN")})
    assert notes == ["partition gpu is DOWN: the job waits until it is UP"]
    with pytest.raises(SubmitError, match=r"has no default; name one with --partition \(known: cpu, short\)"):
        check_cluster(JOB, {"cpu": CPU, "short": SHORT})


def test_without_limits_nothing_is_too_long():
    endless = replace(GPU, max_time=None, default_time=None)
    assert check_cluster(ask(time="300-0"), {"gpu": endless})[0] == endless
    assert check_cluster(ask(time=None), {"gpu": endless})[0] == endless


# --- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["%", "\\"])
def test_slurm_reads_patterns_in_folder_names(mark: str):
    folder = Path(f"/shared/50{mark}j")
    with pytest.raises(SubmitError, match=r"Slurm reads the . of a folder's name as part of a pattern"):
        check_names(ask(folder=folder, runs=(folder,)))
    check_names(ask(folder=Path('/shared/it\'s "a" $(b) *?;&|'), runs=(Path("/shared/é"),)))
    with pytest.raises(SubmitError, match="no text in UTF-8"):
        check_names(ask(runs=(Path(os.fsdecode(b"/shared/\xff")),)))


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_names_that_a_container_would_split(kind: Literal["pyxis", "apptainer"]):
    """Both take a list of places, which commas separate."""
    job = ask(folder=Path("/shared/lr=1,2"), runs=(Path("/shared/lr=1,2"),))
    check_names(job)
    with pytest.raises(SubmitError, match="lr=1,2: a , separates the folders that a container is given"):
        check_names(replace(job, container=Container(kind, "/image.sif")))


def test_python_reads_lists_in_folder_names():
    """PYTHONPATH would be two folders, neither of them the copy, and the installed program would run unnoticed."""
    for folder in (Path("/shared/10:30"), Path("/a:b/runs/x")):
        with pytest.raises(SubmitError, match=rf"{folder}: a : separates .* PYTHONPATH.*name another with --run"):
            check_names(ask(folder=folder, runs=(folder,)))


def test_places_that_other_nodes_do_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "/tmp, which other nodes usually do not see" in check_place(Path("/tmp/runs/x"))[0]
    assert "which other nodes usually do not see" in check_place(Path("/dev/shm/x"))[0]
    monkeypatch.setattr(checks, "NODE_LOCAL", ())
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(checks, "file_system", lambda _: ("nfs4", "/"))
    assert check_place(tmp_path / "runs") == []
    assert "which other nodes usually" in check_place(tmp_path / "scratch" / "runs")[0]
    monkeypatch.setattr(checks, "file_system", lambda _: ("tmpfs", "/"))
    assert "lies in a tmpfs, which other nodes do not see" in check_place(tmp_path / "runs")[0]


def test_the_sites_word_on_what_is_shared(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert check_place(tmp_path / "link" / "runs", (tmp_path / "real",)) == [], "links are followed"
    with pytest.raises(SubmitError, match=r"lies in none of the folders that the nodes share .*name another"):
        check_place(tmp_path / "real-not" / "runs", (tmp_path / "real",))


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_writable(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(SubmitError, match=r"file is a file; name a folder with --run"):
        check_writable(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(SubmitError, match=r"cannot be written by \w+; name another"):
        check_writable(tmp_path / "a" / "b")


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def usage(place: Path) -> SimpleNamespace:
        asked.append(place)
        return SimpleNamespace(free=40 * 10**9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    run = tmp_path / "runs" / "x"
    check_disk(run, 10 * 10**9, kept=3)
    assert asked == [tmp_path], "the disk of the nearest folder that exists"
    with pytest.raises(SubmitError, match=r"40\.0 GB are free, but checkpoint\.keep 4 needs 50\.0 GB"):
        check_disk(run, 10 * 10**9, kept=4)
    with pytest.raises(SubmitError, match=r"needs 80\.0 GB \(4 checkpoints of 10\.0 GB in 2 runs\)"):
        check_disk(run, 10 * 10**9, kept=3, runs=2)
    (run / "checkpoints" / "step-00000100").mkdir(parents=True)
    check_disk(run, 10 * 10**9, kept=4)  # what is there already needs no more room
