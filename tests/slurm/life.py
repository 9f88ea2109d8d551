"""One run on a real Slurm through everything that happens to runs: submitted by the real command, hurt, watched.

Shared by `test_life.py` and `benchmarks/slurm_faults.py`, which load it by its path.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potamos.slurm import daemons
from potamos.slurm.attempt import Attempt, newest_step, read_attempts
from potamos.slurm.cluster import Cluster
from potamos.slurm.run_folder import RunFolder

# An upper bound, not a wait: a machine that runs other work besides is many times slower.
PATIENCE = 300.0


@dataclass(frozen=True)
class Outage:
    """What a fault cost.

    `step`: the last that was trained before it. `seconds`: from the fault to the end of the first step that had not
    been trained before. `again`: steps that had been, and were trained once more. `saved`: it stopped on request.
    """

    fault: str
    step: int
    seconds: float
    again: int
    saved: bool
    before: str
    after: str
    restarted: bool


@dataclass
class Submitted:
    """A run whose job is in the queue, or was."""

    cluster: Cluster
    folder: RunFolder
    job: str
    outages: list[Outage] = field(default_factory=list)

    # --- looking ---------------------------------------------------------------------------------------------------

    def records(self) -> list[dict[str, Any]]:
        """What was recorded of every step, steps that were trained again included; whole lines only."""
        try:
            lines = self.folder.metrics.read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in found if record["kind"] == "train"]

    @property
    def attempts(self) -> list[Attempt]:
        return read_attempts(self.folder)

    @property
    def step(self) -> int:
        """The furthest step that any attempt has trained."""
        return max((record["step"] for record in self.records()), default=0)

    @property
    def done(self) -> bool:
        return self.folder.done.exists()

    def facts(self) -> dict[str, str]:
        """What Slurm says of the job."""
        line = self.cluster.run("scontrol", "show", "job", self.job, "-o").splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def state(self) -> str:
        return self.facts()["JobState"]

    def nodes(self) -> list[str]:
        """The nodes of the running job, by name."""
        return self.cluster.run("scontrol", "show", "hostnames", self.facts()["NodeList"]).split()

    def ranks(self, number: int | None = None) -> set[int]:
        """The processes of all ranks, or of one."""
        found = {"SLURM_JOB_ID": self.job, "SLURM_STEP_ID": "0"} | self.cluster.environment
        return daemons.with_environment(found if number is None else found | {"SLURM_PROCID": str(number)})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The ranks stand still, so that what takes Slurm seconds costs no steps, however fast the machine is."""
        found = self.ranks()
        daemons.send(found, signal.SIGSTOP)
        yield
        daemons.send(found, signal.SIGCONT)

    def log(self) -> str:
        """The end of every log, for messages."""
        parts = []
        for path in sorted(self.folder.logs.glob("*.txt")):
            parts += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-12:]]
        return "\n".join([self.cluster.run("squeue"), *parts])

    def until(self, condition: Callable[[], object], what: str, deadline: float = PATIENCE) -> None:
        end = time.monotonic() + deadline
        while not condition():
            assert time.monotonic() < end, f"waited {deadline:g} s in vain for {what}:\n{self.log()}"
            time.sleep(0.05)

    def until_ended(self, deadline: float = PATIENCE) -> str:
        """Until nothing of the job runs or waits; its last state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.state() in ended, "the job to end", deadline)
        return self.state()

    def until_progress(self, steps: int = 2) -> None:
        """Until the attempt that runs has a checkpoint of its own and steps that no attempt had trained."""

        def progressed() -> bool:
            assert not self.done, f"the run was finished too early:\n{self.log()}"
            records = self.records()
            if not records or not self.attempts:
                return False
            newest = records[-1]
            known = max((r["step"] for r in records if r["attempt"] < newest["attempt"]), default=0)
            current = self.attempts[-1]
            return (
                newest["attempt"] == current.number
                and newest["step"] >= known + steps
                and newest_step(self.folder) > max(current.step, known - steps)
            )

        self.until(progressed, "progress")

    # --- faults ----------------------------------------------------------------------------------------------------

    def suffer(
        self, fault: str, act: Callable[[], object], *, first: Callable[[], object] = int, restarts: bool = True
    ) -> Outage:
        """Let something happen to the run while it makes progress, and wait until it makes progress again.

        Args:
            first: done before the clock starts.
            restarts: whether another attempt must follow, or the same must go on.
        """
        self.until_progress()
        with self.paused():
            before, known = self.attempts[-1], self.step
            first()
            began = time.time()
            act()

        def recovered() -> dict[str, Any] | None:
            assert not self.done, f"the run was finished before it could recover from {fault}:\n{self.log()}"
            records = self.records()
            if restarts:
                old = max((r["step"] for r in records if r["attempt"] <= before.number), default=0)
                found = [r for r in records if r["attempt"] > before.number and r["step"] > old]
            else:
                found = [r for r in records if r["step"] > known]
            return found[0] if found else None

        self.until(recovered, f"a new step after {fault}")
        new = recovered()
        assert new is not None
        after = self.attempts[-1]
        furthest = max((r["step"] for r in self.records() if r["attempt"] <= before.number), default=0)
        outage = Outage(
            fault,
            known,
            round(new["time"] - began, 1),
            max(0, furthest - after.step) if restarts else 0,
            self.folder.stop(before.number).exists(),
            before.nodes,
            after.nodes,
            restarts,
        )
        self.outages.append(outage)
        return outage

    def warn(self) -> None:
        """What Slurm does before the time limit."""
        self.cluster.run("scancel", "--signal=USR1", self.job)

    def preempt(self) -> None:
        """A job of the partition `urgent` takes the nodes for a moment; returns when it has them."""
        asked = ("-p", "urgent", "-N2", "--exclusive", "-w", ",".join(self.nodes()), "--output=/dev/null")
        urgent = self.cluster.run("sbatch", "--parsable", *asked, "--wrap=sleep 1").strip()
        shown = lambda: self.cluster.run("scontrol", "show", "job", urgent, "-o")  # noqa: E731
        self.until(lambda: "JobState=COMPLETED" in shown(), "the urgent job to run")

    def kill_rank(self) -> None:
        """SIGKILL to rank 1."""
        found = self.ranks(1)
        assert found, f"rank 1 was not found:\n{self.log()}"
        daemons.send(found, signal.SIGKILL)

    def kill_node(self, *, tell: bool, first: bool = False) -> str:
        """The job's last node dies, or its first, and the batch script with it; its name.

        With `tell` the controller hears of it, else it must notice.
        """
        name = self.nodes()[0 if first else -1]
        self.cluster.kill_node(int(name[1:]))
        if tell:
            self.cluster.run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")
        return name

    def revive(self, name: str) -> None:
        self.cluster.start_node(int(name[1:]))

    def requeue(self) -> None:
        """What an operator does."""
        self.cluster.run("scontrol", "requeue", self.job)


def submit(cluster: Cluster, run: Path, *arguments: str) -> Submitted:
    """`potamos submit h3_hybrid_tiny ARGUMENTS --run RUN`, in a process of its own; what it put into the queue."""
    done = potamos(cluster, "submit", "h3_hybrid_tiny", *arguments, "--run", str(run))
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[0] == "job", done.stdout
    return Submitted(cluster, RunFolder.of(run), words[1].rstrip(":"))


def potamos(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command on this cluster, with no site file."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "POTAMOS"))}
    home = str(cluster.folder.parent / "no-site")
    return subprocess.run(
        [sys.executable, "-P", "-m", "potamos.pretrain.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=kept | cluster.environment | {"XDG_CONFIG_HOME": home, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def prepare_text(folder: Path) -> list[str]:
    """Addresses to the nation as `h3_hybrid_tiny` reads them, with a smaller vocabulary; the overrides that say so."""
    from potamos.data.commands import prepare_dataset, train

    tokenizer, _ = train("sotu", 1024, folder / "tokenizer.json", split="validation")
    prepare_dataset("sotu", folder / "text", tokenizer_path=folder / "tokenizer.json", split="validation")
    return [
        f"model.frontend={{kind: tokens, vocabulary: {tokenizer.vocabulary}, tied: true}}",
        f"tokenizer.path={folder / 'tokenizer.json'}",
        f"data.stages=[{{from: 0, mixture: [{{path: {folder / 'text'}}}]}}]",
        "data.validation=[]",
    ]


def short_run(steps: int) -> list[str]:
    """`h3_hybrid_tiny` on two nodes with a process on each: a few steps a second, saved every third."""
    return [
        "data.sequence_length=64",
        f"train={{steps: {steps}, sequences: 4, micro_sequences: 2, seed: 2222, device: cpu}}",
        "checkpoint={every: 3, keep: 2}",
        "telemetry={every: 1}",
        "parallel={dp_replicate: 2}",
        # One failure without progress ends it: a run that makes progress must never meet that bound.
        "slurm={nodes: 2, tasks_per_node: 1, crashes: 1}",
    ]
