"""Processes of a local cluster: found by their pid files and by /proc, started with a deadline, ended for certain.

Never found by name alone: several clusters, and other people's daemons, may run side by side on one machine.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin")
"""Where daemons are that an ordinary user's PATH leaves out."""

# The Debian package of every program that a cluster runs.
PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "scontrol": "slurm-client",
    "sinfo": "slurm-client",
    "squeue": "slurm-client",
    "sbatch": "slurm-client",
    "srun": "slurm-client",
}

# Below Linux's ephemeral ports (32768 and up), which any program may be given, and below 20000, where jobs' ranks meet.
PORTS = range(11000, 19900)


class ClusterError(ValueError):
    """A local cluster that cannot be started, reached or stopped; the message says which part, why, and what to do."""


def programs() -> dict[str, str]:
    """The path of every program that a cluster needs.

    Raises:
        ClusterError: some are not installed; names the Debian packages.
    """
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *SYSTEM_FOLDERS))
    found = {name: shutil.which(name, path=path) for name in PACKAGES}
    if missing := [name for name, where in found.items() if where is None]:
        packages = " ".join(dict.fromkeys(PACKAGES[name] for name in missing))
        root = "" if os.geteuid() == 0 else "sudo "
        raise ClusterError(
            f"no local Slurm without {', '.join(missing)}: not found on PATH. On Debian and Ubuntu: "
            f"{root}apt-get install --no-install-recommends {packages}"
        )
    return {name: where for name, where in found.items() if where is not None}


# --- processes -----------------------------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    """Whether a process runs. A zombie does not: where process 1 of a container does not reap, it stays for ever."""
    try:
        # The state follows the name, which is in parentheses and may hold anything.
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


def pid_of(pid_file: Path, mention: str) -> int | None:
    """The live process that a pid file names, or None.

    `mention` must be in its command line: the number may have gone to another process since.
    """
    try:
        pid = int(pid_file.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if mention.encode() in command and is_alive(pid) else None


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def with_environment(wanted: Mapping[str, str]) -> set[int]:
    """Processes that were started with all of these variables."""
    entries = [f"{name}={value}".encode() for name, value in wanted.items()]
    found = set()
    for pid in all_pids():
        with contextlib.suppress(OSError):  # gone, or another user's
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if all(entry in variables for entry in entries) and is_alive(pid):
                found.add(pid)
    return found


def that_hold_open(path: Path) -> set[int]:
    """Processes with an open descriptor of a file."""
    found = set()
    for pid in all_pids():
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{name}").removesuffix(" (deleted)") == str(path):
                    found.add(pid)
                    break
    return found


def with_descendants(pids: Iterable[int]) -> set[int]:
    """The processes and all that descend from them."""
    children: dict[int, list[int]] = {}
    for pid in all_pids():
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(pid)
    found, waiting = set(), list(pids)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    return found


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """A signal to processes, some of which may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end(pids: Iterable[int], *, grace: float, deadline: float) -> None:
    """SIGTERM, SIGKILL after `grace` seconds; returns when all are dead.

    Raises:
        ClusterError: some still run after `deadline` seconds.
    """
    waiting, began, killed = set(pids), time.monotonic(), False
    send(waiting, signal.SIGTERM)
    while waiting := {pid for pid in waiting if is_alive(pid)}:
        passed = time.monotonic() - began
        if passed > deadline:
            raise ClusterError(f"processes {sorted(waiting)} still run {deadline:g} s after SIGKILL: see `ps -l`")
        if passed > grace and not killed:
            send(waiting, signal.SIGKILL)
            killed = True
        time.sleep(0.02)


# --- starting ------------------------------------------------------------------------------------------------------


def launch(name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, *, deadline: float) -> None:
    """Run a program that puts itself in the background; returns when the foreground part has ended well.

    Raises:
        ClusterError: it failed, or did not leave the foreground within `deadline` seconds.
    """
    said = log.with_suffix(".start")  # a file, not a pipe, which the daemon might keep open
    with said.open("wb") as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=log.parent,
                timeout=deadline,
                start_new_session=True,  # Ctrl-C in this terminal is not meant for it
            )
        except subprocess.TimeoutExpired as error:
            raise failure(name, log, f"did not start within {deadline:g} s") from error
    if done.returncode != 0:
        raise failure(name, log, f"did not start (exit status {done.returncode})")


def complaint(log: Path) -> str:
    """The last thing that a daemon complained of: its newest fatal line, else its newest error, else its last line."""
    lines: list[str] = []
    for path in (log, log.with_suffix(".start")):
        with contextlib.suppress(OSError):
            lines += [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    # Slurm looks for every MPI plugin and for a mailer; their absence is no reason for anything.
    lines = [line for line in lines if "mpi" not in line.lower() and "MailProg" not in line]
    for word in ("fatal:", "error:"):
        if said := [line for line in lines if word in line.lower()]:
            return said[-1].strip()
    return lines[-1].strip() if lines else "(it wrote nothing)"


def failure(name: str, log: Path, what: str) -> ClusterError:
    """An error of one line about a daemon: what happened, its last words, where to read on."""
    remedy = f"see {log}"
    said = complaint(log)
    if "in use" in said:
        remedy = "another program took the port; try again"
    elif "No space left" in said:
        remedy = "free some space on that disk"
    return ClusterError(f"{name} {what}: {said}; {remedy}")


def wait(condition: Callable[[], object], deadline: float, what: str) -> None:
    """Until `condition()` is true, looked at every tenth of a second.

    Raises:
        ClusterError: it was not within `deadline` seconds; the message says `what` was waited for.
    """
    end_of_wait = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end_of_wait:
            raise ClusterError(f"waited {deadline:g} s in vain for {what}")
        time.sleep(0.1)


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that nobody listens on.

    Raises:
        ClusterError: no such range.
    """
    bases = list(PORTS[: len(PORTS) - count])
    random.SystemRandom().shuffle(bases)  # two clusters that start at once should not look at the same ports
    for base in bases[:200]:
        with contextlib.ExitStack() as stack:
            try:
                for port in range(base, base + count):
                    stack.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
            return base
    raise ClusterError(f"no {count} consecutive free ports between {PORTS[0]} and {PORTS[-1]}")
