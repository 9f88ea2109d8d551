"""The examination of nodes as tasks of a real Slurm: a task that sleeps or ends without a word is the bad one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from potamos.parallel.node_judge import find_bad, read_record
from potamos.slurm import client
from potamos.slurm.attempt import read_attempts

# Runs before any module of a task's interpreter, where the test wants it.
FAULTS = """
import os, sys, time
node = os.environ.get("SLURMD_NODENAME")
if "potamos.parallel.node_check" in sys.orig_argv and node == "n1":
    while not all(os.path.exists(f"logs/preflight-0.{other}.json") for other in ("n0", "n2")):
        time.sleep(0.1)
    os._exit(0)
if "potamos.parallel.node_check" in sys.orig_argv and node == "n3":
    os._exit(7)
"""


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("faulty", [False, True])
def test_nodes_of_a_real_slurm(faulty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if faulty:
        (tmp_path / "sitecustomize.py").write_text(FAULTS)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "logs").mkdir()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    check = [sys.executable, "-P", "-m", "potamos.parallel.node_check", "--attempt", "0"]
    step = ["srun", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "--mem=1G", "--kill-on-bad-exit=0"]
    limits = ["--timeout=6" if faulty else "--timeout=60", "--run-disk=0.01"]
    done = run(*step, *check, "--out", "logs", *limits, cwd=tmp_path)
    records = {f"n{k}": read_record(tmp_path / "logs", 0, f"n{k}") for k in range(4)}
    judged = run(*check, "--judge", "logs", "--nodes", "n0,n1,n2,n3", cwd=tmp_path)
    assert judged.returncode == 0, done.stderr
    if faulty:
        assert judged.stdout.split() == ["n1", "n3"], judged.stderr + done.stderr
        good = [record for record in records.values() if record is not None]
        assert [record.node for record in good] == ["n0", "n2"]
        assert all(record.missing == [1, 3] for record in good)
    else:
        assert (judged.stdout, judged.stderr) == ("", ""), done.stderr
        assert find_bad(records) == {}
        ranks = [(record.rank, record.world) for record in records.values() if record is not None]
        assert ranks == [(k, 4) for k in range(4)]


FULL = """
import collections, os, shutil, sys
if "potamos.parallel.node_check" in sys.orig_argv and os.environ.get("SLURMD_NODENAME") == "n0":
    shutil.disk_usage = lambda folder: collections.namedtuple("Usage", "total used free")(1, 1, 0)
"""


@pytest.mark.usefixtures("cluster")
def test_a_run_goes_on_without_the_node_that_fails(trial: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it: `submit --preflight`, a node with a full disk, and nothing else to do."""
    (tmp_path / "fault.py").write_text(FULL)
    (tmp_path / "site.yaml").write_text(f"prologue: ['cp {tmp_path}/fault.py code/sitecustomize.py']")
    monkeypatch.setenv("POTAMOS_SITE", str(tmp_path / "site.yaml"))
    folder = tmp_path / "run"
    asked = ["--run", str(folder), "--nodes", "2", "--gpus-per-node", "0", "--preflight"]
    command = [sys.executable, "-m", "potamos.pretrain.cli", "submit", "h3_hybrid_tiny", *trial.overrides(), *asked]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    end = time.monotonic() + 120
    while client.queue():
        assert time.monotonic() < end, run("squeue", cwd=tmp_path).stdout
        time.sleep(0.1)
    first, second = read_attempts(folder)
    assert (first.verdict, first.reason) == ("next", "nodes n0 failed the check before training")
    assert "n[0" in first.nodes
    assert (second.verdict, second.end_step) == ("done", 12)
    assert "n0" not in second.nodes
    assert "n[0" not in second.nodes
    assert "has 0 GB free; 1 GB are asked for" in (folder / "logs" / f"job-{first.job}.txt").read_text()


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=os.environ, capture_output=True, text=True, timeout=120, check=False)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
