"""Several processes of one machine, one per rank, as a launcher starts them: same command, torchrun's environment.

Signals are passed on to every rank, so Ctrl-C and a scheduler's signals mean what they mean for one process. When a
rank fails, the others cannot go on: they are ended within seconds, and its words come first.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE_SECONDS = 5.0
"""How long the other ranks have to end by themselves after one has failed."""


def run_processes(command: Sequence[str], count: int, environment: Mapping[str, str] = os.environ) -> int:
    """Run `command` once per rank and wait for all; the exit status of the first that failed, or 0.

    Rank 0 writes to this process's terminal. What the others write to standard error is kept and shown if they fail.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
        ranks: list[subprocess.Popen[bytes]] = []
        before = {number: signal.getsignal(number) for number in PASSED_ON}
        try:
            for number in PASSED_ON:
                signal.signal(number, lambda number, _: [_send(rank, number) for rank in ranks])
            for rank in range(count):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
                with Path(scratch, f"{rank}").open("wb") as words:
                    ranks.append(
                        subprocess.Popen(
                            command,
                            env={**environment, **meeting, **place},
                            stdin=subprocess.DEVNULL,
                            stdout=None if rank == 0 else subprocess.DEVNULL,
                            stderr=None if rank == 0 else words,
                            start_new_session=True,  # a terminal's Ctrl-C comes through this process, once
                        )
                    )
            return _wait(ranks, Path(scratch))
        finally:
            for rank in ranks:
                _send(rank, signal.SIGKILL)
                rank.wait()
            for number, handler in before.items():
                signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]], scratch: Path) -> int:
    """Until all have ended, or one has failed and the others have had their time."""
    failed: int | None = None
    deadline = float("inf")
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if failed is None:
            failed = next((i for i, rank in enumerate(ranks) if rank.poll() not in (None, 0)), None)
            if failed is not None:
                deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(0.02)
    if failed is None:
        failed = next((i for i, rank in enumerate(ranks) if rank.poll() not in (None, 0)), None)
    if failed is None:
        return 0
    code = ranks[failed].returncode
    status = 128 - code if code < 0 else code
    alike = all(rank.poll() in (code, None) for rank in ranks)
    if failed > 0 and not (alike and ranks[0].poll() == code):
        words = (scratch / f"{failed}").read_text(errors="replace").strip()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        print(f"rank {failed} {how}" + (f":\n{words}" if words else ""), file=sys.stderr, flush=True)
    return status


def _send(rank: subprocess.Popen[bytes], number: int) -> None:
    if rank.poll() is None:
        rank.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
