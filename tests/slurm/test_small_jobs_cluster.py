"""Small jobs on a real Slurm: an array makes what one process makes, and outlives kills, limits and preemption."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from potamos.slurm.site import Site
from potamos.slurm.small_jobs import RESTARTS, Resources, Submission, still_queued

PREPARE = ("data", "prepare", "raw")
TOKENIZER = ("--tokenizer", "tokenizer.json")


def content(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    assert len(found) > 2
    return found


@pytest.fixture(scope="module")
def of_one_process(corpus: Path) -> dict[str, bytes]:
    """What one process makes of the corpus, without duplicates: every array must make the same bytes."""
    from potamos.data.prepare import prepare
    from potamos.data.tokenizer import load_tokenizer

    expected = corpus / "expected" / "d"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(corpus)  # a dataset remembers the names of its inputs as they were given
        prepare("raw", "all", load_tokenizer("json", "tokenizer.json"), expected, deduplicate=True)
    return content(expected)


@pytest.fixture
def gone(until: Callable[..., Any]) -> Callable[[Path], None]:
    """`gone(folder)`: wait until no job of a folder is in the queue."""
    return lambda folder: until(lambda: not still_queued(folder))


def said(folder: Path) -> str:
    """All logs of a folder, for messages."""
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("*_log.out")))


def process(*words: str) -> int | None:
    """The process whose command line has all of the words, in order."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = place.read_bytes().decode(errors="replace").split("\0")
            if "potamos.pretrain.cli" in line and all(word in line for word in words):
                return int(place.parent.name)
    return None


@pytest.mark.usefixtures("cluster")
def test_an_array_makes_the_bytes_of_one_process(
    in_corpus: Path, potamos: Callable[..., Any], gone: Callable[..., Any], of_one_process: dict[str, bytes]
) -> None:
    done = potamos(*PREPARE, "array/d", *TOKENIZER, "--slurm", 3, "--deduplicate", "--memory", "1G")
    assert done.status == 0, done
    gone(in_corpus / "array" / "d.logs")
    assert (in_corpus / "array" / "d").exists(), said(in_corpus / "array" / "d.logs")
    assert content(in_corpus / "array" / "d") == of_one_process
    assert "sacct" not in said(in_corpus / "array" / "d.logs")
    main = json.loads((in_corpus / "array" / "d.logs" / "jobs.json").read_text())["ids"]
    assert [p.name for p in sorted((in_corpus / "array" / "d.logs").glob(f"{main[1]}*_log.out"))] == [
        f"{main[1]}_{task}_0_log.out" for task in range(3)
    ], "a log a task, at the place that was printed"


@pytest.mark.usefixtures("cluster")
def test_a_task_that_was_killed_is_made_good_by_the_same_command(
    in_corpus: Path,
    potamos: Callable[..., Any],
    until: Callable[..., Any],
    gone: Callable[..., Any],
    of_one_process: dict[str, bytes],
) -> None:
    logs = in_corpus / "killed" / "d.logs"
    command = (*PREPARE, "killed/d", *TOKENIZER, "--slurm", 2, "--deduplicate", "--memory", "1G")
    assert potamos(*command).status == 0
    os.kill(until(lambda: process("killed/d", "--rank=1", "--wait=600.0")), signal.SIGKILL)
    gone(logs)
    assert not (in_corpus / "killed" / "d").exists(), "finalize had to wait for all"
    assert "it ended with status -9, see above" in said(logs)
    assert potamos(*command).status == 0
    gone(logs)
    assert (in_corpus / "killed" / "d").exists(), said(logs)
    assert content(in_corpus / "killed" / "d") == of_one_process


SLEEPER = """
import os, sys, time
if "potamos.pretrain.cli" in sys.orig_argv:
    os.chdir(HERE)
    with open("starts", "a") as file:
        file.write("x")
    while not os.path.exists("go") and os.path.getsize("starts") == 1:
        time.sleep(0.05)
    open("done", "w").close()
    os._exit(0)
"""


@dataclass
class Sleeping:
    """A submitted command whose first start waits until it is let go."""

    shared: Path
    logs: Path
    job: str

    @property
    def starts(self) -> int:
        return os.path.getsize(self.shared / "starts") if (self.shared / "starts").exists() else 0

    @property
    def done(self) -> bool:
        return (self.shared / "done").exists()

    def signal(self, name: str) -> None:
        subprocess.run(["scancel", f"--signal={name}", self.job], check=True, timeout=60)


@pytest.fixture
def sleeping(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Callable[..., Any]) -> Sleeping:
    """A small job that runs, in place of a long one: where the nodes look for modules first, one stands in for it."""
    (tmp_path / "sitecustomize.py").write_text(SLEEPER.replace("HERE", repr(str(tmp_path))))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    submitted = Submission(tmp_path / "logs", Site(), Resources(memory="1G", time=120))
    found = Sleeping(tmp_path, tmp_path / "logs", submitted.add("sleeping", [["data", "prepare"]]))
    until(lambda: found.starts == 1)
    return found


def test_a_job_at_its_time_limit_goes_on_in_another_start(
    sleeping: Sleeping, until: Callable[..., Any], gone: Callable[..., Any]
) -> None:
    """submitit takes any stop signal to so short a job for its time limit, and by default gives up after three."""
    import submitit

    sleeping.signal("USR2")
    until(lambda: sleeping.starts == 2)
    gone(sleeping.logs)
    assert sleeping.done
    log = said(sleeping.logs)
    assert "this job is timed-out" in log
    assert f"({RESTARTS - 1} remaining timeouts)" in log
    assert submitit.SlurmJob(sleeping.logs, sleeping.job).state == "UNKNOWN", "what nothing here relies on"


def test_a_preempted_job_uses_the_grace(
    sleeping: Sleeping, until: Callable[..., Any], gone: Callable[..., Any]
) -> None:
    """SIGTERM announces it: who ends then is taken for failed, and is not requeued."""
    sleeping.signal("TERM")
    until(lambda: "Bypassing signal SIGTERM" in said(sleeping.logs))
    assert still_queued(sleeping.logs) == [sleeping.job]
    assert process("data", "prepare"), "the command itself has had the signal too"
    (sleeping.shared / "go").touch()
    gone(sleeping.logs)
    assert (sleeping.done, sleeping.starts) == (True, 1)
    assert "Job completed successfully" in said(sleeping.logs)


@pytest.mark.nightly
def test_a_preempted_job_that_needs_longer_comes_back(sleeping: Sleeping, gone: Callable[..., Any]) -> None:
    """Slurm ends it after the grace and requeues it, which it does not do with a job that has ended by itself."""
    everything = ["sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(everything, check=True, capture_output=True, timeout=60)
    gone(sleeping.logs)
    assert (sleeping.done, sleeping.starts) == (True, 2)
    assert "DUE TO PREEMPTION" in said(sleeping.logs)


def test_a_sweep_over_checkpoints_on_the_cluster(
    cluster: Any,
    trial: Any,
    tmp_path: Path,
    in_corpus: Path,
    potamos: Callable[..., Any],
    gone: Callable[..., Any],
) -> None:
    """Each row is what `evaluate` of that checkpoint alone says, to the last bit."""
    from potamos.pretrain.evaluations import read_rows
    from potamos.pretrain.runs import open_run, score_run

    run = tmp_path / "run"
    trial.fit(run, "train.steps=12", "checkpoint={every: 4, keep: 3}")
    done = potamos("evaluate", run, "--steps", "all", "--length", "2x", "--slurm", 2, "--memory", "1G", "--device=cpu")
    assert done.status == 0, done
    assert "2 tasks score 3 checkpoints and write into" in done.out
    gone(run / "logs" / "evaluate")
    rows = read_rows(run / "evaluations.csv")
    assert [row.step for row in rows] == [4, 8, 12], said(run / "logs" / "evaluate")
    for row in rows:
        ((name, score),) = score_run(open_run(run, step=row.step), length="2x").items()
        assert (row.data, row.length, row.changes) == (name, 64, "")
        assert (row.bits_per_byte, row.perplexity, row.loss) == (score.bits_per_byte, score.perplexity, score.loss)
        assert (row.targets, row.bytes) == (score.targets, score.bytes)
    assert len({row.loss for row in rows}) == 3
