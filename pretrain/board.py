"""TensorBoard on all runs of a folder: one process, every run under its own name, those that come later too."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from potamos.slurm.checks import user_name
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.status import find_runs

LOOK = 30.0  # seconds between two looks for new runs


class BoardError(ValueError):
    """A board that cannot be opened. Says why, and what to do."""


@contextmanager
def opened(folder: Path, port: int | None = None) -> Iterator[tuple[str, Callable[[], int]]]:
    """A running board of the runs in and below ``folder``: its address, and what looks for new runs and counts all.

    TensorBoard would name each run after its folder of events, and also find what lies in copies of code and
    checkpoints. It is shown a folder of links instead, which are named as the runs are.

    Raises:
        StatusError: no such folder.
        BoardError: no run in it has events, or the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="potamos-board-") as links:

        def look() -> int:
            return link(folder, Path(links))

        if not look():
            raise BoardError(
                f"no run in {folder} has anything for TensorBoard yet; a run writes it at its first log line"
            )
        yield launch(Path(links), port), look


def link(folder: Path, links: Path) -> int:
    """Make a link for each run with events that has none; how many there are."""
    count = 0
    for run in find_runs([folder]):
        events = RunFolder(run).tensorboard
        name = str(run.relative_to(folder)) if run != folder else run.absolute().name
        if not events.is_dir():
            continue
        count += 1
        place = links / name
        if not place.is_symlink():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(events.absolute())
    return count


def launch(links: Path, port: int | None) -> str:
    """Start TensorBoard on this machine's own address; where it listens. It ends with this process."""
    from tensorboard import program

    board = program.TensorBoard()
    # Only this machine: a board has no password. Whoever sits elsewhere comes through ssh.
    board.configure(argv=["", f"--logdir={links}", "--host=localhost", f"--port={port or 0}", "--reload_interval=15"])
    try:
        return board.launch()
    except program.TensorBoardServerException as error:
        raise BoardError(f"TensorBoard cannot be started: {error}; name another --port, or leave it out") from None


def tunnel(url: str) -> str:
    """The command that brings the board to the machine that one sits at."""
    port = url.rstrip("/").rpartition(":")[2].partition("/")[0]
    host = socket.getfqdn()
    host = socket.gethostname() if host.startswith("localhost") else host
    return f"ssh -N -L {port}:localhost:{port} {user_name()}@{host}"


def serve(look: Callable[[], int], tell: Callable[[str], object], count: int) -> None:
    """Look for new runs until interrupted."""
    while True:
        time.sleep(LOOK)
        if (now := look()) != count:
            tell(f"{now} runs")
            count = now
