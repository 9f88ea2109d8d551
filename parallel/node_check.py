"""Examine every node of a job before it trains: GPUs, memory, disks, the shared folder, clocks, and the network.

    srun --ntasks-per-node=1 ... python -P -m potamos.parallel.node_check --out logs --attempt 3 --gpus 8
    python -P -m potamos.parallel.node_check --judge logs --attempt 3 --nodes n0,n1    # prints: n1

The first runs once on each node, in the run folder, and leaves one line of JSON in ``logs/preflight-3.<node>.json``:
what was measured, and every problem in words. It ends with status 0 once that is written, whatever it says, since a
launcher may end all tasks where one fails. A stage that does not come back (a GPU that hangs, a dead file server) is
left after ``--timeout`` seconds, and the record says which. The second, wherever the files can be read, names the bad
nodes; one that left no record is one of them (`node_judge.py`).

One broken GPU or a folder that is not shared costs an attempt of a large job, and its error says little. A minute here
says it before, and the node can be left out.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from potamos.parallel.node_local import Machine, Stages, examine_disks, examine_folder, examine_gpus
from potamos.parallel.node_record import Limits, Record

LAST_WORD_SECONDS = 10.0
"""How long a record may take to be written when a stage has hung: its file system may be what hangs."""


def node_name() -> str:
    """As Slurm calls this node, else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def check(
    out: Path, run: Path, attempt: int, limits: Limits, machine: Machine, leave: Callable[[int], object] = os._exit
) -> Record:
    """Examine this node, then the network with the others, and write the record; see the module.

    Args:
        out: where the records go.
        run: the run folder.
        leave: ends the process where a stage hangs.

    Raises:
        LaunchError: the environment does not say which rank this is and where to meet.
    """
    record = Record(node_name(), attempt)

    def leave_with_record() -> None:
        writer = threading.Thread(target=_write, args=(out, record), daemon=True)
        writer.start()
        writer.join(LAST_WORD_SECONDS)
        leave(0)

    def expired(stage: str) -> None:
        record.problem(stage, f"no end within {limits.timeout:g} s")
        leave_with_record()

    def expired_together(stage: str) -> None:
        record.network = f"{stage} did not end within {limits.timeout:g} s"
        leave_with_record()

    stages, began = Stages(limits.timeout, expired), time.monotonic()
    with stages.stage("importing torch"):
        from potamos.parallel import node_network
        from potamos.parallel.launch import Rank
    place = Rank.from_environment()
    record.rank, record.world = place.rank, place.world
    with stages.stage("disks"):
        examine_disks(record, limits, machine, run)
    with stages.stage("run folder"):
        examine_folder(record, limits, machine, run)
    with stages.stage("gpus"):
        gpus = examine_gpus(record, limits, machine)
    record.figures["seconds"] = round(time.monotonic() - began, 2)
    if place.world == 1:
        _write(out, record)
    else:
        between = Stages(limits.timeout, expired_together)
        node_network.examine(
            record, limits, machine, run, gpus, between, lambda: _write(out, record), lambda other: _write(out, other)
        )
    return record


def _write(out: Path, record: Record) -> bool:
    """Whether the record could be written; standard error has it in any case."""
    for check, words in [*record.problems, *([("network", record.network)] if record.network else [])]:
        print(f"{record.node}: {check}: {words}", file=sys.stderr, flush=True)
    try:
        record.save(out)
    except OSError as error:
        print(f"{record.node}: {out} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
        return False
    return True


def main(arguments: Sequence[str] | None = None, machine: Machine | None = None) -> int:
    """The exit status. 0: examined or judged, whatever was found. 2: a wrong call. 4, of ``--judge``: no node has
    passed, which leaving them out would not mend."""
    asked = _parser().parse_args(arguments)
    if asked.judge is not None:
        from potamos.parallel.node_judge import judge

        return judge(asked.judge, asked.attempt, [name for name in asked.nodes.split(",") if name])
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # whoever waits in vain is in the record, in words
    fields = {name: getattr(asked, name) for name in Limits.__dataclass_fields__}
    try:
        record = check(asked.out, asked.run.absolute(), asked.attempt, Limits(**fields), machine or Machine())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(record.line().decode(), end="", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    usual = Limits()
    parser = argparse.ArgumentParser(prog="python -m potamos.parallel.node_check", description=__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="DIR", help="examine this node; its record goes here")
    task.add_argument("--judge", type=Path, metavar="DIR", help="print the bad nodes of --nodes, a line each")
    parser.add_argument("--attempt", type=int, required=True, metavar="K")
    parser.add_argument("--nodes", default="", help="with --judge: all nodes, with commas between")
    parser.add_argument("--run", type=Path, default=Path(), help="the run folder (default: the working directory)")
    parser.add_argument("--gpus", type=int, default=usual.gpus, help="GPUs that every node must have")
    parser.add_argument("--run-disk", type=_positive, default=usual.run_disk, help="GB free in the run folder")
    parser.add_argument("--tmp-disk", type=_positive, default=usual.tmp_disk, help="GB free in TMPDIR")
    parser.add_argument("--free-memory", type=_positive, default=usual.free_memory, help="free share of a GPU's memory")
    parser.add_argument("--skew", type=_positive, default=usual.skew, help="seconds that clocks may differ by")
    parser.add_argument("--timeout", type=_positive, default=usual.timeout, help="seconds for each stage")
    parser.add_argument("--pairs", action="store_true", help="measure every pair of nodes too, to name a slow one")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # what hangs in the network must not hold the process
