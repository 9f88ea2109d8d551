"""What each fault costs a run on a cluster: seconds from the fault to the first step that was not trained before.

A real Slurm of four nodes is started on this machine (Debian's slurmctld, slurmd, slurm-client and munge), and one run
of `h3_hybrid_tiny` on two of them goes through every fault. Slurm's own delays are as short as `potamos cluster up` has
them: 5 s until a requeued job may start again (its default: 120) and 5 s of silence until a node counts as dead (300).
The ranks stand still (SIGSTOP) until the fault has been done to them, the controller's restart included, during which
they would otherwise just go on.

    python benchmarks/slurm_faults.py [--out benchmarks/results/slurm_faults.csv]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from machine import load_from_tests, stamp, write_table

from potamos.slurm.cluster import Cluster

RESULTS = Path(__file__).parent / "results" / "slurm_faults.csv"
STEPS = 80


def measure(life: ModuleType, cluster: Cluster, folder: Path) -> list[dict[str, Any]]:
    """A row for the start and for each fault, of one run."""
    began = time.time()
    run = life.submit(cluster, folder / "run", *life.prepare_text(folder), *life.short_run(STEPS))
    submitted = time.time()
    run.until(run.records, "the first step")
    rows = [_row("start (submitted)", round(run.records()[0]["time"] - submitted, 1))]
    print(f"prepared and submitted in {submitted - began:.0f} s, first step after {rows[0]['seconds_to_new_step']} s")

    died: list[str] = []

    def kill(*, tell: bool, first: bool = False) -> Callable[[], object]:
        return lambda: died.append(run.kill_node(tell=tell, first=first))

    faults: list[tuple[str, Callable[[], object], dict[str, Any]]] = [
        ("warning before the time limit (SIGUSR1)", run.warn, {}),
        ("preemption by a higher partition", run.preempt, {}),
        ("SIGKILL of a rank", run.kill_rank, {}),
        ("death of a node, told (scontrol state=down)", kill(tell=True), {}),
        ("death of the first node, with the script, told", kill(tell=True, first=True), {}),
        ("death of a node, noticed by Slurm", kill(tell=False), {}),
        ("scontrol requeue", run.requeue, {}),
        ("restart of the controller", cluster.restart_controller, {"first": cluster.save, "restarts": False}),
    ]
    for name, act, how in faults:
        outage = run.suffer(name, act, **how)
        rows.append(_row(name, outage.seconds, outage.again, outage.saved, outage.before, outage.after))
        print(f"{name}: {outage.seconds} s, {outage.again} steps again")
        while died:
            run.revive(died.pop())
    assert run.until_ended() == "COMPLETED"
    return rows


def _row(
    fault: str, seconds: float, again: int = 0, saved: bool = False, before: str = "", after: str = ""
) -> dict[str, Any]:
    return {
        "fault": fault,
        "seconds_to_new_step": seconds,
        "steps_trained_again": again,
        "saved": "yes" if saved else "no",
        "nodes_before": before,
        "nodes_after": after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    life = load_from_tests("slurm_life", "slurm/life.py")
    folder = Path(tempfile.mkdtemp(prefix="potamos-faults-"))
    try:
        cluster = Cluster.up(folder / "cluster", nodes=4, deadline=120.0)
        try:
            version = cluster.run("sinfo", "--version").split()[-1]
            rows = measure(life, cluster, folder)
        finally:
            cluster.down()
        shape = cluster.shape
        settings = {"slurm": version, "requeue_delay": shape.requeue_delay, "node_timeout": shape.node_timeout,
                    "kill_wait": shape.kill_wait, "grace": shape.grace}  # fmt: skip
        write_table(out, [row | settings | stamp() for row in rows])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
