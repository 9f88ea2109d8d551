"""`potamos submit` with a tiny dataset and stand-ins for Slurm's commands: what is said, and what mistakes cost."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from potamos.pretrain import sweeps
from potamos.pretrain.ceilings import CEILINGS
from potamos.pretrain.config import load_recipe
from potamos.pretrain.plan_layouts import Planner
from potamos.pretrain.submission import Asked
from potamos.slurm import prepare
from potamos.slurm.client import SEPARATOR, SlurmError

PARTITIONS = """\
PartitionName=main Default=YES DefaultTime=02:00:00 MaxNodes=UNLIMITED MaxTime=2-00:00:00 State=UP TotalNodes=4
PartitionName=cpu Default=NO DefaultTime=NONE MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=4
"""
NODES = SEPARATOR.join(("main", "gpu:h200:8", "64", "64000")) + "\n" + SEPARATOR.join(("cpu", "(null)", "64", "64000"))
COMMANDS = {
    "sinfo": 'cat "${0%/*}/nodes"',
    "scontrol": 'cat "${0%/*}/partitions"',
    "squeue": "",
    "sbatch": 'echo "$@" >>"${0%/*}/calls"; case "$*" in *--test-only*) ;; *) echo 12 ;; esac',
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, on a machine with Slurm and nothing else."""
    (tmp_path / "bin").mkdir()
    for name, body in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "partitions").write_text(PARTITIONS)
    (tmp_path / "bin" / "nodes").write_text(NODES)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "POTAMOS_SITE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(prepare, "take_snapshot", lambda code: (code / "potamos").mkdir(parents=True, exist_ok=True))
    return tmp_path / "here"


@pytest.fixture
def submit(here: Path, trial: Any, potamos: Callable[..., Any]) -> Callable[..., Any]:
    """`submit(*changes)`: the tiny recipe; (exit status, standard output, standard error)."""
    return partial(potamos, "submit", "h3_hybrid_tiny", *trial.overrides())


def calls() -> list[str]:
    path = Path(os.environ["PATH"].split(":")[0]) / "calls"
    return path.read_text().splitlines() if path.exists() else []


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def test_a_submission_says_where_to_look_and_what_it_costs(submit, here: Path, trial: Any):
    shutil.copytree(trial.folder, here / "data")
    moved = [f"tokenizer.path={trial.folder}/tokenizer.json", "data.stages.0.mixture.0.path=data/train"]
    status, out, err = submit(*moved, "train.device=auto", "--nodes", "2", "--gpus-per-node", "1", "--run", "r")
    assert status == 0, err
    assert f"job 12: h3_hybrid_tiny, 2 nodes x 1 GPU, 02:00:00\nfolder: {here}/r\n" in out
    assert "cost: at most 4.0 GPU-hours; a run that is not finished then goes back" in out
    assert "look: potamos status" in out
    assert "on h200" in out, "the plan is made for what the partition has"
    assert "/tmp, which other nodes usually do not see" in err
    recipe = load_recipe(here / "r" / "recipe.yaml")
    assert recipe.data.stages[0].sources[0].path == str(here / "data" / "train")
    assert (recipe.slurm.nodes, recipe.slurm.gpus_per_node) == (2, 1)
    assert "torch: " in (here / "r" / "environment.txt").read_text()
    assert len(calls()) == 2
    assert json.loads((here / "r" / "job.json").read_text())["ids"] == ["12"]


def test_seeds_are_runs_of_one_array(submit, here: Path):
    status, out, err = submit("--array", "1-2%1", "--chain", "2", "--time", "10")
    assert status == 0, err
    assert "job 12, 12: h3_hybrid_tiny, 1 node x 1 process, 2 seeds, 00:10:00" in out
    run = here / "runs" / "h3_hybrid_tiny"
    assert [load_recipe(run / f"seed-{k}" / "recipe.yaml").train.seed for k in (1, 2)] == [1, 2]
    assert "#SBATCH --array=1-2%1\n" in (run / "submit.sbatch").read_text()
    assert "#SBATCH --no-requeue\n" in (run / "submit.sbatch").read_text()


def test_what_a_chain_of_arrays_costs(submit):
    gpus = ("--nodes", "2", "--gpus-per-node", "1", "train.device=auto")
    status, _, err = submit("--dry-run", *gpus, "--time", "60", "--chain", "3", "--array", "1-2")
    assert status == 0
    assert "cost: at most 12 GPU-hours\n" in err  # 2 nodes x 1 GPU x 1 hour, of 2 seeds, 3 times; none is requeued
    assert "tokens, on h100\n" in err
    assert "for each seed" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.stepz=1"], "command line: train.stepz: value 1: unknown key; did you mean `steps`?"),
        (["--partition", "gpus"], "slurm.partition: 'gpus' is no partition of this cluster (known: main, cpu)"),
        (["--nodes", "5"], "slurm.nodes: 5 nodes, but a job in partition main can have 4"),
        (["--gpus-per-node", "9"], "slurm.gpus_per_node: 9, but a node of partition main has 8"),
        (["--partition", "cpu", "--gpus-per-node", "1"], "slurm.gpus_per_node: 1, but a node of partition cpu has 0"),
        (["--time", "2-00:00:01"], "slurm.time: 2-00:00:01, but partition main allows 2-00:00:00"),
        (["--time", "tomorrow"], "slurm.time: 'tomorrow' cannot be asked of sbatch: give minutes"),
        (["--array", "4-1"], "--array: '4-1' is no tasks"),
        (["--after", "soon"], "--after: 'soon' is no job"),
        (["--nodes", "3"], "train.sequences: 8 is not a multiple of 3 data ranks x train.micro_sequences 4"),
        (["parallel.tp=3", "--nodes", "2"], "needs 3 processes, and this run has 2"),
        (
            ["--nodes", "2", "parallel.dp_replicate=1", "parallel.pp=2", "train.micro_sequences=8"],
            "over 2 stages cannot",
        ),
        (["--gpu", "b200", "--gpus-per-node", "1", "train.device=auto"], "--gpu: unknown device 'b200'"),
        (["tokenizer.path=nowhere.json"], "here/nowhere.json does not exist; make one"),
        (["data.stages.0.mixture.0.path=nowhere"], "here/nowhere"),
        (["data.validation=[{path: nowhere}]"], "here/nowhere"),
        (["train.sequences=4096", "train.micro_sequences=4096"], "a batch of 4096 needs 4096 of them"),
        (["--run", "50%"], "50%: Slurm reads the % of a folder's name"),
        (["--run", "full"], "full holds other files and no run; name a new folder with --run"),
        (["--run", "a file"], "a file is a file; name a folder with --run"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(submit, here: Path, changes: list[str], message: str):
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("")
    (here / "a file").write_text("")
    before = files()
    status, out, err = submit(*changes)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert files() == before
    assert calls() == []


def test_memory_is_planned_for_what_the_partition_has(submit, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(CEILINGS, "h200", replace(CEILINGS["h200"], memory=1_500_000))
    status, out, err = submit("--gpus-per-node", "1", "train.device=auto")
    assert (status, out) == (2, "")
    assert "h3_hybrid_tiny does not fit 1 x H200 SXM: 1 process needs" in err
    assert "(planned for h200; --gpu names another)" in err
    assert calls() == files() == []
    assert submit("--gpus-per-node", "1", "train.device=auto", "--gpu", "h100")[0] == 0


def test_a_plan_that_cannot_be_made_does_not_stop_a_run(submit, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError("an operation without a fake form")

    monkeypatch.setattr(Planner, "planned", fail)
    status, out, err = submit()
    assert status == 0
    assert "plan:" not in out
    assert "time and memory are unknown: the plan met NotImplementedError" in err


def test_a_full_disk(submit, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))
    status, _, err = submit()
    assert status == 2
    assert "0.1 MB are free, but checkpoint.keep 2 needs" in err
    assert files() == []


def test_without_slurm(submit, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(here))
    status, _, err = submit()
    assert status == 2
    assert "error: no Slurm here: `sinfo` is not on PATH" in err
    assert files() == []
    status, out, _ = submit("--dry-run")
    assert status == 0
    assert out.startswith("#!/bin/bash\n#SBATCH --job-name=h3_hybrid_tiny\n")
    assert files() == []


@pytest.mark.parametrize("command", ["submit", "sweep"])
def test_a_controller_that_is_away_is_not_waited_for(submit, here: Path, monkeypatch: pytest.MonkeyPatch, command: str):
    """Slurm's other commands try for 9 to 18 s."""
    folder = here.parent / "bin"
    for name in ("sinfo", "squeue", "sbatch"):
        (folder / name).write_text("#!/bin/bash\nexec sleep 20\n")
    (folder / "scontrol").write_text(
        '#!/bin/bash\n[ "$1" = ping ] || exec sleep 20\necho "Slurmctld(primary) at head is DOWN"\nexit 1\n'
    )
    began = time.monotonic()
    if command == "submit":
        status, _, err = submit()
    else:
        with pytest.raises(SlurmError) as refused:
            sweeps.send(Asked("h3_hybrid_tiny", ["train.seed=[1,2]"]))
        status, err = 2, str(refused.value)
    assert (status, "the controller does not answer, so nothing was done" in err) == (2, True)
    assert time.monotonic() - began < 15
    assert list(here.iterdir()) == []


def test_a_dry_run_refuses_what_can_be_told_without_slurm(submit):
    carried = ("data.order=contiguous", "parallel={dp_replicate: 1, tp: 2}")
    status, out, err = submit("--dry-run", "--nodes", "2", *carried)
    assert (status, out) == (2, "")
    assert "contiguous carries states that only data parallelism deals yet" in " ".join(err.split())
    status, out, err = submit("--dry-run", "--nodes", "3")
    assert (status, out) == (2, "")
    assert "train.sequences: 8 is not a multiple of 3 data ranks" in err


def test_the_site_file_counts_and_its_mistakes_are_told(submit, here: Path):
    site = here.parent / ".config" / "potamos" / "site.yaml"
    site.parent.mkdir(parents=True)
    site.write_text("prologue: [module load cuda]\npartition: cpu\nshared: [/elsewhere]\n")
    status, out, _ = submit("--dry-run")
    assert status == 0
    assert "\nmodule load cuda\n" in out
    assert "#SBATCH --partition=cpu\n" in out
    status, _, err = submit()
    assert status == 2
    assert "lies in none of the folders that the nodes share" in err
    site.write_text("partitoin: cpu\n")
    status, _, err = submit("--dry-run")
    assert status == 2
    assert f"{site}:1: partitoin: unknown key; did you mean `partition`?" in err


def test_an_interpreter_that_nodes_do_not_see(submit, here: Path, monkeypatch: pytest.MonkeyPatch):
    for python, remarked in (("/tmp/venv/bin/python", True), ("/usr/bin/python3", False), ("python3", False)):
        (here.parent / "site.yaml").write_text(f"python: {python}\n")
        monkeypatch.setenv("POTAMOS_SITE", str(here.parent / "site.yaml"))
        status, _, err = submit()
        assert status == 0
        assert (f"{python} lies in /tmp, which other nodes usually do not see; `python` in" in err) == remarked
        assert f'"python": "{python}"' in (here / "runs" / "h3_hybrid_tiny" / "job.json").read_text()


def begin(run: Path, step: int) -> None:
    (run / "state.json").write_text(json.dumps({"step": step, "next_sample": 8 * step}))
    (run / "checkpoints" / f"step-{step:08}").mkdir(parents=True)


def test_a_run_that_has_begun_may_change_only_what_it_may(submit, here: Path):
    assert submit("--run", "r")[0] == 0
    begin(here / "r", 4)
    status, out, err = submit("--run", "r", "train.steps=24", "--time", "60")
    assert status == 0, err
    assert "the copy that the run began with, --refresh-code takes today's" in out
    assert "train.steps: 12 -> 24" in err
    assert load_recipe(here / "r" / "recipe.yaml").train.steps == 24
    status, _, err = submit("--run", "r", "optimizer.lr=0.5")
    assert status == 2
    assert "optimizer.lr: value 0.5: the run was started with" in err
    assert load_recipe(here / "r" / "recipe.yaml").optimizer.lr != 0.5
